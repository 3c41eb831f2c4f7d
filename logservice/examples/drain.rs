//! How fast the log of a PostgreSQL is read, beside what `pg_recvlogical` does with the same log:
//! `cargo run --release -p logservice --example drain -- 1000000 [rows per transaction]`.
//!
//! Starts a private server, so PostgreSQL must be installed. Rows have four columns and about 60 bytes.

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use heartbeatpb::{ChangefeedId, Ts};
use logservice::TableFilter;
use logservice::event_store::{Store, StoreConfig};
use logservice::upstream::{self, FeedSpec, ReaderProgress, ReaderStart, StartPoint};
use testkit::PgServer;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

const ROUNDS: usize = 3;

#[tokio::main]
async fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let rows: u64 = args.next().map_or(Ok(500_000), |text| text.parse()).context("number of rows")?;
    let per_txn: u64 = args.next().map_or(Ok(1000), |text| text.parse()).context("rows per transaction")?;
    let server = PgServer::builder().setting("max_wal_size", "8GB").start().await?;
    let client = server.client("postgres").await?;
    client
        .batch_execute("CREATE TABLE t (id bigint PRIMARY KEY, a int, b text, c timestamptz DEFAULT now())")
        .await?;
    let uri = format!("{}?sslmode=disable", server.uri("postgres"));
    let spec = FeedSpec {
        changefeed: ChangefeedId::fresh("drain"),
        epoch: None,
        start_ts: Ts::ZERO,
        upstream_uri: uri.clone(),
        filter: Arc::new(TableFilter::new(&["*.*"], true)?),
        publish: Arc::default(),
        force_replicate: false,
        ignore_ineligible: false,
        initial_copy: false,
        copy_parallel: 1,
        copy_part_bytes: 64 << 20,
        streaming: true,
        copy_target: None,
        copy_crew: None,
        entrance: None,
        ddl: heartbeatpb::config::DdlConfig {
            capture: heartbeatpb::config::DdlCapture::Off,
            ..Default::default()
        },
    };
    let source = upstream::open(&uri)?;
    let start = source.create_retention(&spec, None).await?;
    let name = format!("millrace_drain_{:08x}", spec.changefeed.gid.high >> 32);
    for round in 0..ROUNDS {
        client
            .query(&format!("SELECT pg_copy_logical_replication_slot('{name}', 'other_{round}')"), &[])
            .await?;
    }
    println!("writing {rows} rows, {per_txn} per transaction");
    let mut written = 0;
    while written < rows {
        let until = (written + per_txn).min(rows);
        let sql = format!(
            "INSERT INTO t SELECT g, 7, 'text of row ' || g FROM generate_series({written}, {until} - 1) g"
        );
        client.batch_execute(&sql).await?;
        written = until;
    }
    let end = source.current_position().await?.start_ts;
    for round in 0..ROUNDS {
        let theirs = pg_recvlogical(&server, &name, &format!("other_{round}"), end)?;
        let ours = drain(&spec, start, end, rows).await?;
        #[expect(clippy::cast_precision_loss, reason = "rates for people")]
        let rate = |time: Duration| rows as f64 / time.as_secs_f64();
        println!(
            "pg_recvlogical {:>9.0} rows/s   reader {:>9.0} rows/s   ratio {:.2}",
            rate(theirs),
            rate(ours),
            theirs.as_secs_f64() / ours.as_secs_f64()
        );
    }
    source.drop_retention(&spec.changefeed).await?;
    Ok(())
}

fn pg_recvlogical(server: &PgServer, publication: &str, slot: &str, end: Ts) -> Result<Duration> {
    let began = Instant::now();
    let status = Command::new("pg_recvlogical")
        .args([
            "--dbname",
            &server.uri("postgres"),
            "--slot",
            slot,
            "--start",
            "--no-loop",
            "--file",
            "/dev/null",
        ])
        .args(["--endpos", &format!("{:X}/{:X}", end.0 >> 32, end.0 & 0xFFFF_FFFF)])
        .args(["-o", "proto_version=1", "-o", &format!("publication_names={publication}")])
        .stderr(Stdio::inherit())
        .status()?;
    ensure!(status.success(), "pg_recvlogical: {status}");
    Ok(began.elapsed())
}

/// Reads the whole log into a store whose rows are thrown away as they come. Nothing is confirmed, so that it
/// can be read again.
async fn drain(spec: &FeedSpec, start: StartPoint, end: Ts, rows: u64) -> Result<Duration> {
    let dir = std::env::temp_dir().join(format!("millrace-drain-{}", std::process::id()));
    let config = StoreConfig { dir: dir.clone(), memory_bytes: 64 << 20, disk_bytes: 0 };
    let changed = Arc::new(Notify::new());
    let (store, writer) = Store::open(spec.changefeed.clone(), config, start.start_ts, Arc::clone(&changed))?;
    let source = upstream::open(&spec.upstream_uri)?;
    let table = source.tables(spec).await?.first().context("no table")?.info.id;
    let (_persisted, receiver) = watch::channel(start.start_ts);
    let progress = Arc::new(ReaderProgress::default());
    let shutdown = CancellationToken::new();
    let began = Instant::now();
    let reader = tokio::spawn({
        let (spec, progress, shutdown) = (spec.clone(), Arc::clone(&progress), shutdown.clone());
        let start = ReaderStart { start_ts: start.start_ts, checkpoint: start.start_ts };
        async move { source.run_reader(spec, start, writer, receiver, progress, shutdown).await }
    });
    while store.resolved().0 < end {
        ensure!(!reader.is_finished(), "the reader ended: {:?}", progress.last_error());
        drop(tokio::time::timeout(Duration::from_millis(10), changed.notified()).await);
        store.trim(table, store.resolved().0, None);
    }
    let elapsed = began.elapsed();
    shutdown.cancel();
    reader.await??;
    ensure!(progress.log_rows.load(Ordering::Relaxed) == rows, "rows are missing");
    store.close();
    std::fs::remove_dir_all(&dir).ok();
    Ok(elapsed)
}
