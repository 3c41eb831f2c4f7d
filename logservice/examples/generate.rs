//! Runs a generator into an event store for some seconds and prints its speed.
//!
//! `cargo run -p logservice --example generate -- 'generator://bank?rate=0' 3`

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use heartbeatpb::{ChangefeedId, Ts};
use logservice::TableFilter;
use logservice::event_store::{Store, StoreConfig};
use logservice::upstream::{self, FeedSpec, ReaderProgress, ReaderStart};
use tokio_util::sync::CancellationToken;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let uri = args.next().unwrap_or_else(|| "generator://bank?rate=0".to_owned());
    let seconds = args.next().map_or(Ok(3), |text| text.parse())?;
    let upstream = upstream::open(&uri)?;
    let mut spec = FeedSpec {
        changefeed: ChangefeedId::fresh("example"),
        epoch: None,
        start_ts: Ts::ZERO,
        upstream_uri: uri.clone(),
        filter: Arc::new(TableFilter::new(&["*.*"], false)?),
        publish: Arc::default(),
        force_replicate: false,
        ignore_ineligible: false,
        initial_copy: true,
        copy_parallel: 1,
        copy_part_bytes: 64 << 20,
        streaming: true,
        copy_target: None,
        copy_crew: None,
        entrance: None,
        ddl: heartbeatpb::config::DdlConfig::default(),
    };
    let begun = Instant::now();
    let tables = upstream.tables(&spec).await?;
    println!("{} tables, listed in {:.1} s", tables.len(), begun.elapsed().as_secs_f64());
    let point = upstream.create_retention(&spec, None).await?;
    spec.start_ts = point.start_ts;
    let dir = tempfile::tempdir()?;
    let config = StoreConfig { dir: dir.path().join("store"), memory_bytes: 64 << 20, disk_bytes: 1 << 40 };
    let (store, writer) = Store::open(spec.changefeed.clone(), config, point.start_ts, Arc::default())?;
    let (_persisted, persisted) = tokio::sync::watch::channel(point.start_ts);
    let (progress, shutdown) = (Arc::new(ReaderProgress::default()), CancellationToken::new());
    let start = ReaderStart { start_ts: point.start_ts, checkpoint: point.start_ts };
    let begun = Instant::now();
    let stop = shutdown.clone();
    let watch = async {
        // Nobody reads here, so what is complete is dropped at once, as if it were replicated.
        while begun.elapsed() < Duration::from_secs(seconds) {
            tokio::time::sleep(Duration::from_millis(50)).await;
            for table in store.take_dirty().0 {
                store.trim(table, store.resolved().0, None);
            }
        }
        stop.cancel();
    };
    let run = upstream.run_reader(spec, start, writer, persisted, Arc::clone(&progress), shutdown);
    let (result, ()) = tokio::join!(run, watch);
    result?;
    let elapsed = begun.elapsed().as_secs_f64();
    let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    let (copied, rows, transactions) =
        (count(&progress.copy_rows), count(&progress.log_rows), count(&progress.transactions));
    println!("{copied} rows copied, {transactions} transactions with {rows} rows in {elapsed:.1} s");
    println!("position {}", store.resolved().0);
    Ok(())
}
