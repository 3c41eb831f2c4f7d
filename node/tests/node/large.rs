//! One transaction that is larger than what the node may hold in memory, with small ones around it.
//!
//! The node runs as a process of its own, so that the memory that is measured is its own.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;
use testkit::{Api, Millrace, PgServer, compare};

use crate::common::{TARGET, position, servers};

/// Most memory that the process may have held at once: its bounded stores and buffers, and room for the rest.
const MOST_MEMORY: u64 = 300 << 20;
/// The upstream alone takes minutes to decode the largest transactions on a busy machine.
const PATIENCE: Duration = Duration::from_secs(1200);
const LOOK: Duration = Duration::from_millis(50);
/// Between two small transactions.
const PAUSE: Duration = Duration::from_millis(5);

const SCHEMA: &str = "CREATE TABLE big (id int PRIMARY KEY, v int); \
                      CREATE TABLE small (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v text, \
                        at timestamptz DEFAULT clock_timestamp())";
/// The same at the target, which also notes when a row came.
const SMALL_AT_TARGET: &str = "CREATE TABLE small (id bigint PRIMARY KEY, v text, at timestamptz, \
                               arrived timestamptz DEFAULT clock_timestamp())";

/// A running process with the changefeed `f`.
struct Process {
    server: Millrace,
    api: Api,
    /// Where the checkpoint stands while the initial copy runs.
    begin: u64,
    _dir: tempfile::TempDir,
}

impl Process {
    async fn start(source: &PgServer, sink_uri: &str, copy: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut server = Millrace::new(Path::new(env!("CARGO_BIN_EXE_millrace")), dir.path()).unwrap();
        server.start().await.unwrap();
        let api = server.api();
        let config = json!({ "initial_copy": { "enabled": copy } });
        let feed = api.create("f", &source.uri("postgres"), sink_uri, &config).await.unwrap();
        let begin = if copy { feed["start_ts"].as_u64().unwrap() } else { 0 };
        Self { server, api, begin, _dir: dir }
    }

    /// Waits until the checkpoint has reached the source's end. Answers the number of rows that were written.
    async fn caught_up(&self, source: &PgServer) -> u64 {
        let end = position(&source.client("postgres").await.unwrap()).await.max(self.begin + 1);
        let deadline = Instant::now() + PATIENCE;
        loop {
            let progress = self.api.progress("f").await.unwrap();
            assert_ne!(progress.state, "failed", "{}", self.server.log_tail(20));
            if progress.checkpoint >= end {
                return progress.rows_written;
            }
            assert!(Instant::now() < deadline, "the checkpoint does not reach {end}: {}", progress.all);
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// Inserts `rows` rows in each of `large` transactions that run at once, while small transactions come and go. Answers how
/// many came.
async fn load(source: &PgServer, rows: u64, large: u64) -> u64 {
    let stop = Arc::new(AtomicBool::new(false));
    let around = {
        let (client, stop) = (source.client("postgres").await.unwrap(), Arc::clone(&stop));
        tokio::spawn(async move {
            let mut count = 0;
            while !stop.load(Ordering::Relaxed) {
                client.execute("INSERT INTO small (v) VALUES ('around')", &[]).await.unwrap();
                count += 1;
                tokio::time::sleep(PAUSE).await;
            }
            count
        })
    };
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..large {
        let client = source.client("postgres").await.unwrap();
        let (from, to) = (writer * rows + 1, (writer + 1) * rows);
        let sql = format!("INSERT INTO big SELECT i, -i FROM generate_series({from}, {to}) i");
        writers.spawn(async move { client.batch_execute(&sql).await.unwrap() });
    }
    writers.join_all().await;
    stop.store(true, Ordering::Relaxed);
    around.await.unwrap()
}

/// Replicates `large` transactions at once. Says how long the parts took and how much memory the process had.
async fn replicate(source: &PgServer, sink_uri: &str, rows: u64, large: u64) -> Process {
    source.sql("postgres", SCHEMA).await.unwrap();
    let mut process = Process::start(source, sink_uri, false).await;
    let begun = Instant::now();
    let small = load(source, rows, large).await;
    let loaded = begun.elapsed();
    let written = process.caught_up(source).await;
    let peak = process.server.peak_bytes();
    println!(
        "{large} transactions of {rows} rows, {small} small ones: loaded in {:.1} s, replicated after {:.1} s, \
         {} MiB at most, {} s of processor time",
        loaded.as_secs_f64(),
        begun.elapsed().as_secs_f64(),
        peak >> 20,
        process.server.usage().unwrap().cpu_seconds,
    );
    assert_eq!(written, large * rows + small, "every row once");
    assert!(peak < MOST_MEMORY, "{} MiB at most", peak >> 20);
    process.server.still_running().unwrap();
    process
}

/// Two transactions at once into a database, with the delay of the small ones beside them.
async fn two_at_once(rows: u64) {
    let (source, target) = servers().await;
    target.sql(TARGET, SMALL_AT_TARGET).await.unwrap();
    let mut process = replicate(&source, &target.uri(TARGET), rows, 2).await;
    let (from, to) = (source.client("postgres").await.unwrap(), target.client(TARGET).await.unwrap());
    let delay = "SELECT count(*), extract(epoch FROM percentile_disc(0.5) WITHIN GROUP (ORDER BY arrived - at))::float8, \
                 extract(epoch FROM max(arrived - at))::float8 FROM small";
    let row = to.query_one(delay, &[]).await.unwrap();
    let (count, median, most): (i64, f64, f64) = (row.get(0), row.get(1), row.get(2));
    println!(
        "{count} small transactions arrived after {median:.2} s in the median, after {most:.2} s at most"
    );
    to.batch_execute("ALTER TABLE small DROP COLUMN arrived").await.unwrap();
    let comparison = compare(&from, &to, &["big", "small"]).await.unwrap();
    assert!(comparison.equal(), "{comparison}");
    process.server.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_of_five_million_rows_passes_through_little_memory() {
    let source = PgServer::start().await.unwrap();
    let mut process = replicate(&source, "blackhole://", 5_000_000, 1).await;
    process.server.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_large_transactions_at_once_are_written_to_a_database_exactly_once_beside_small_ones() {
    two_at_once(150_000).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes; docs/postgresql.md has figures of the same load"]
async fn two_transactions_of_ten_million_rows_at_once_are_written_to_a_database_exactly_once() {
    two_at_once(10_000_000).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn existing_rows_are_copied_through_little_memory() {
    let source = PgServer::start().await.unwrap();
    let rows = 2_000_000;
    source.sql("postgres", SCHEMA).await.unwrap();
    let fill = format!("INSERT INTO big SELECT i, -i FROM generate_series(1, {rows}) i");
    source.sql("postgres", &fill).await.unwrap();
    let mut process = Process::start(&source, "blackhole://", true).await;
    process.caught_up(&source).await;
    let (copied, peak) = (process.api.progress("f").await.unwrap().copy_rows, process.server.peak_bytes());
    println!("{rows} rows copied, {} MiB at most", peak >> 20);
    assert_eq!(copied, rows);
    assert!(peak < MOST_MEMORY, "{} MiB at most", peak >> 20);
    process.server.stop().await.unwrap();
}

/// Bytes of a large value: in text, as the log carries it, twice as many.
const LARGE: u64 = 200 << 20;
/// In text more than a message may have.
const TOO_LARGE: u64 = 600 << 20;

async fn put(source: &PgServer, id: i32, bytes: u64) {
    let sql = format!("INSERT INTO v VALUES ({id}, convert_to(repeat('x', {bytes}), 'UTF8'))");
    source.sql("postgres", &sql).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_value_of_two_hundred_mebibytes_is_carried_and_one_that_cannot_be_sent_is_refused_by_name() {
    let (source, target) = servers().await;
    source.sql("postgres", "CREATE TABLE v (id int PRIMARY KEY, raw bytea)").await.unwrap();
    put(&source, 1, LARGE).await;
    let mut process = Process::start(&source, &target.uri(TARGET), true).await;
    process.caught_up(&source).await;
    println!("copied with {} MiB at most", process.server.peak_bytes() >> 20);
    assert!(process.server.peak_bytes() < LARGE, "a copy passes values on as they come");
    put(&source, 2, LARGE).await;
    process.caught_up(&source).await;
    println!("streamed with {} MiB at most", process.server.peak_bytes() >> 20);
    let rows = target.client(TARGET).await.unwrap();
    let rows = rows.query("SELECT id, length(raw)::bigint, md5(raw) FROM v ORDER BY id", &[]).await.unwrap();
    let wanted = source.client("postgres").await.unwrap();
    let wanted =
        wanted.query("SELECT id, length(raw)::bigint, md5(raw) FROM v ORDER BY id", &[]).await.unwrap();
    assert_eq!(rows.len(), 2);
    for (row, wanted) in rows.iter().zip(&wanted) {
        assert_eq!(row.get::<_, i32>(0), wanted.get::<_, i32>(0));
        assert_eq!(row.get::<_, i64>(1).unsigned_abs(), LARGE);
        assert_eq!(row.get::<_, &str>(2), wanted.get::<_, &str>(2));
    }

    put(&source, 3, TOO_LARGE).await;
    let deadline = Instant::now() + PATIENCE;
    let told = loop {
        let progress = process.api.progress("f").await.unwrap();
        if progress.state == "failed" {
            break progress.all["error"].clone();
        }
        assert!(Instant::now() < deadline, "it is not refused: {}", progress.all);
        tokio::time::sleep(LOOK).await;
    };
    assert_eq!(told["code"], "CDC:ErrUpstreamValueTooLarge", "{told}");
    assert!(told["message"].as_str().unwrap().contains("1 GiB"), "{told}");
    process.server.stop().await.unwrap();
}
