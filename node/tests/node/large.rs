//! One transaction that is larger than what the node may hold in memory, with small ones around it.
//!
//! The node runs as a process of its own, so that the memory that is measured is its own.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use testkit::{Api, Millrace, PgServer, compare};

use crate::common::{TARGET, position, servers};

/// Most memory that the process may have held at once: its bounded stores and buffers, and room for the rest.
const MOST_MEMORY: u64 = 300 << 20;
/// Bytes of a wide row, and rows that are twice as much together as the process may hold.
const WIDE: u64 = 2000;
const WIDE_ROWS: u64 = 2 * MOST_MEMORY / WIDE;
/// The upstream alone takes minutes to decode the largest transactions on a busy machine.
const PATIENCE: Duration = Duration::from_secs(1200);
const LOOK: Duration = Duration::from_millis(50);
/// Between two small transactions.
const PAUSE: Duration = Duration::from_millis(5);

const SCHEMA: &str = "CREATE TABLE big (id int PRIMARY KEY, v int, wide text); \
                      CREATE TABLE small (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v text, \
                        at timestamptz DEFAULT clock_timestamp())";
/// The same at the target, which also notes when a row came.
const SMALL_AT_TARGET: &str = "CREATE TABLE small (id bigint PRIMARY KEY, v text, at timestamptz, \
                               arrived timestamptz DEFAULT clock_timestamp())";

fn wide_insert() -> String {
    format!("INSERT INTO big SELECT i, -i, repeat('w', {WIDE}) FROM generate_series(1, {WIDE_ROWS}) i")
}

/// The program: this build's, or the one that `MILLRACE_TEST_PROGRAM` names.
pub(crate) fn program() -> PathBuf {
    std::env::var_os("MILLRACE_TEST_PROGRAM")
        .map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_millrace")), PathBuf::from)
}

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
        let config = json!({ "initial_copy": { "enabled": copy } });
        Self::start_as(&program(), source, sink_uri, &config).await
    }

    async fn start_as(program: &Path, source: &PgServer, sink_uri: &str, config: &Value) -> Self {
        let copy = config["initial_copy"]["enabled"] == true;
        let dir = tempfile::tempdir().unwrap();
        let mut server = Millrace::new(program, dir.path()).unwrap();
        server.start().await.unwrap();
        let api = server.api();
        let feed = api.create("f", &source.uri("postgres"), sink_uri, config).await.unwrap();
        let begin = if copy { feed["start_ts"].as_u64().unwrap() } else { 0 };
        Self { server, api, begin, _dir: dir }
    }

    /// Waits until the changefeed has failed; answers its error.
    async fn failed(&self) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let progress = self.api.progress("f").await.unwrap();
            if progress.state == "failed" {
                return progress.all["error"].clone();
            }
            assert!(Instant::now() < deadline, "it is not refused: {}", progress.all);
            tokio::time::sleep(LOOK).await;
        }
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

/// Small transactions, one after the other until they are stopped.
struct Around {
    stop: Arc<AtomicBool>,
    count: tokio::task::JoinHandle<u64>,
}

impl Around {
    async fn start(source: &PgServer) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (client, stopped) = (source.client("postgres").await.unwrap(), Arc::clone(&stop));
        let count = tokio::spawn(async move {
            let mut count = 0;
            while !stopped.load(Ordering::Relaxed) {
                client.execute("INSERT INTO small (v) VALUES ('around')", &[]).await.unwrap();
                count += 1;
                tokio::time::sleep(PAUSE).await;
            }
            count
        });
        Self { stop, count }
    }

    /// Answers how many there were.
    async fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.count.await.unwrap()
    }
}

/// Runs transactions at once, to their ends.
async fn run(source: &PgServer, transactions: &[String]) {
    let mut writers = tokio::task::JoinSet::new();
    for sql in transactions {
        let (client, sql) = (source.client("postgres").await.unwrap(), sql.clone());
        writers.spawn(async move { client.batch_execute(&sql).await.unwrap() });
    }
    writers.join_all().await;
}

/// Replicates large transactions at once, each of so many rows of `big`, while small ones come and go until the large ones are
/// there. Says how long the parts took and how much memory the process had.
async fn replicate(source: &PgServer, sink_uri: &str, large: &[String], rows: u64) -> Process {
    let mut process = Process::start(source, sink_uri, false).await;
    let begun = Instant::now();
    let around = Around::start(source).await;
    run(source, large).await;
    let loaded = begun.elapsed();
    process.caught_up(source).await;
    let replicated = begun.elapsed();
    let small = around.stop().await;
    let written = process.caught_up(source).await;
    let peak = process.server.peak_bytes();
    println!(
        "{} transactions of {rows} rows, {small} small ones: loaded in {:.1} s, replicated after {:.1} s, \
         {} MiB at most, {} s of processor time",
        large.len(),
        loaded.as_secs_f64(),
        replicated.as_secs_f64(),
        peak >> 20,
        process.server.usage().unwrap().cpu_seconds,
    );
    assert_eq!(written, large.len() as u64 * rows + small, "every row once");
    assert!(peak < MOST_MEMORY, "{} MiB at most", peak >> 20);
    process.server.still_running().unwrap();
    process
}

/// Two transactions at once into a database, with the delay of the small ones beside them.
async fn two_at_once(rows: u64) {
    let (source, target) = servers().await;
    source.sql("postgres", SCHEMA).await.unwrap();
    target.sql(TARGET, SMALL_AT_TARGET).await.unwrap();
    let insert = |from, to| format!("INSERT INTO big SELECT i, -i FROM generate_series({from}, {to}) i");
    let large = [insert(1, rows), insert(rows + 1, 2 * rows)];
    let mut process = replicate(&source, &target.uri(TARGET), &large, rows).await;
    let (from, to) = (source.client("postgres").await.unwrap(), target.client(TARGET).await.unwrap());
    let delay = "SELECT count(*), (SELECT array_agg(extract(epoch FROM p)) \
                 FROM unnest(percentile_disc(ARRAY[0.5, 0.95, 1]) WITHIN GROUP (ORDER BY arrived - at)) p)::float8[] FROM small";
    let row = to.query_one(delay, &[]).await.unwrap();
    let (count, delays): (i64, Vec<f64>) = (row.get(0), row.get(1));
    println!("{count} small transactions arrived after {delays:.2?} s: median, 95 of 100, at most");
    to.batch_execute("ALTER TABLE small DROP COLUMN arrived").await.unwrap();
    let comparison = compare(&from, &to, &["big", "small"]).await.unwrap();
    assert!(comparison.equal(), "{comparison}");
    process.server.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_that_is_larger_than_memory_may_be_passes_through_little_of_it() {
    let source = PgServer::start().await.unwrap();
    source.sql("postgres", SCHEMA).await.unwrap();
    let mut process = replicate(&source, "blackhole://", &[wide_insert()], WIDE_ROWS).await;
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
    source.sql("postgres", SCHEMA).await.unwrap();
    source.sql("postgres", &wide_insert()).await.unwrap();
    let mut process = Process::start(&source, "blackhole://", true).await;
    process.caught_up(&source).await;
    let (copied, peak) = (process.api.progress("f").await.unwrap().copy_rows, process.server.peak_bytes());
    println!("{copied} rows copied, {} MiB at most", peak >> 20);
    assert_eq!(copied, WIDE_ROWS);
    assert!(peak < MOST_MEMORY, "{} MiB at most", peak >> 20);
    process.server.stop().await.unwrap();
}

/// Bytes of the largest value that is promised to be carried: in text, as the log carries it, twice as many.
const LARGEST: u64 = 200 << 20;
/// Bytes of a value of which one copy too many is more than [`BESIDE`], also while nothing but the process itself is held.
const LARGE: u64 = 64 << 20;
/// In text more than a message may have.
const TOO_LARGE: u64 = 600 << 20;
/// What the process takes beside the rows that it holds.
const BESIDE: u64 = 100 << 20;

fn insert(id: i32, bytes: u64) -> String {
    format!("INSERT INTO v VALUES ({id}, convert_to(repeat('x', {bytes}), 'UTF8'))")
}

async fn put(source: &PgServer, id: i32, bytes: u64) {
    source.sql("postgres", &insert(id, bytes)).await.unwrap();
}

/// Waits until the source need not repeat anything that was written.
async fn all_confirmed(source: &PgServer) {
    let client = source.client("postgres").await.unwrap();
    let end = client.query_one("SELECT pg_current_wal_lsn()::text", &[]).await.unwrap();
    let end: String = end.get(0);
    let sql = format!("SELECT FROM pg_replication_slots WHERE confirmed_flush_lsn < '{end}'");
    let deadline = Instant::now() + PATIENCE;
    while !client.query(&sql, &[]).await.unwrap().is_empty() {
        assert!(Instant::now() < deadline, "{end} is not confirmed");
        tokio::time::sleep(LOOK).await;
    }
}

/// The table that somebody finds who does what an error says.
async fn found(source: &PgServer, words: &str) -> String {
    let lsn = words.split_once(" -s ").and_then(|(_, rest)| rest.split_once(' ')).unwrap().0;
    let client = source.client("postgres").await.unwrap();
    let dir = client.query_one("SHOW data_directory", &[]).await.unwrap();
    let logs = Path::new(dir.get::<_, &str>(0)).join("pg_wal");
    let dump = std::process::Command::new(testkit::postgres::program("pg_waldump"))
        .arg("-p")
        .arg(logs)
        .args(["-s", lsn, "-n", "1"])
        .output()
        .unwrap();
    let dump = String::from_utf8(dump.stdout).unwrap();
    let rel = dump.split_once("rel ").unwrap_or_else(|| panic!("{dump}")).1.split([' ', ',']).next().unwrap();
    let [space, _, file] = rel.split('/').collect::<Vec<_>>()[..] else { panic!("{dump}") };
    let sql = format!("SELECT pg_filenode_relation({space}, {file})::text");
    client.query_one(&sql, &[]).await.unwrap().get(0)
}

/// Compares ids, lengths and hashes of large values at both ends.
async fn same_values(source: &PgServer, target: &PgServer, rows: usize) {
    let sql = "SELECT ARRAY[id::text, length(raw)::text, md5(raw), length(other)::text, md5(other)] FROM v ORDER BY id";
    let here = source.client("postgres").await.unwrap().query(sql, &[]).await.unwrap();
    let there = target.client(TARGET).await.unwrap().query(sql, &[]).await.unwrap();
    let texts = |rows: &[tokio_postgres::Row]| -> Vec<Vec<Option<String>>> {
        rows.iter().map(|row| row.get(0)).collect()
    };
    assert_eq!(texts(&here), texts(&there));
    assert_eq!(here.len(), rows);
}

const VALUES: &str = "CREATE TABLE v (id int PRIMARY KEY, raw bytea, other text)";

/// Carries a value of so many bytes, and a row of twice as many more, through no more memory than their text takes twice.
async fn carried(bytes: u64) -> (PgServer, PgServer, Process) {
    let (source, target) = servers().await;
    source.sql("postgres", VALUES).await.unwrap();
    put(&source, 1, bytes).await;
    let process = Process::start(&source, &target.uri(TARGET), true).await;
    process.caught_up(&source).await;
    let copied = process.server.peak_bytes();
    println!("copied with {} MiB at most", copied >> 20);
    assert!(copied < bytes, "a copy passes values on as they come");

    // Inserted, left alone by an update, and updated.
    put(&source, 2, bytes).await;
    process.caught_up(&source).await;
    source.sql("postgres", "UPDATE v SET other = 'small' WHERE id = 2").await.unwrap();
    source.sql("postgres", "UPDATE v SET raw = raw || 'y' WHERE id = 1").await.unwrap();
    process.caught_up(&source).await;
    let streamed = process.server.peak_bytes();
    println!("streamed with {} MiB at most", streamed >> 20);
    // Twice in text: as it comes, and as it is kept.
    assert!(streamed < 2 * 2 * bytes + BESIDE, "{} MiB for a value of {}", streamed >> 20, bytes >> 20);
    same_values(&source, &target, 2).await;

    // A row of several, as large as a message of the server may be.
    let several = format!(
        "INSERT INTO v VALUES (3, convert_to(repeat('a', {bytes}), 'UTF8'), repeat('b', {bytes} * 2))"
    );
    source.sql("postgres", &several).await.unwrap();
    process.caught_up(&source).await;
    let several = process.server.peak_bytes();
    println!("a row of several: {} MiB at most", several >> 20);
    assert!(several < 2 * 4 * bytes + BESIDE, "{} MiB for a row of {}", several >> 20, (4 * bytes) >> 20);
    same_values(&source, &target, 3).await;
    (source, target, process)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_value_is_carried_and_one_that_cannot_be_sent_is_refused_by_name() {
    let (source, _target, mut process) = carried(LARGE).await;
    // One that is not committed is nobody's business, although the server sees it before.
    let sql = format!("BEGIN; {}; ROLLBACK", insert(4, TOO_LARGE));
    source.sql("postgres", &sql).await.unwrap();
    process.caught_up(&source).await;
    all_confirmed(&source).await;
    put(&source, 4, TOO_LARGE).await;
    let named = |told: &Value| {
        let words = told["message"].as_str().unwrap_or_default();
        words.contains("a row of table public.v is larger") && words.contains("stays in the log")
    };
    let told = process.failed().await;
    assert_eq!(told["code"], "CDC:ErrUpstreamValueTooLarge", "{told}");
    assert!(named(&told), "{told}");

    // That the row is gone by now does not help.
    source.sql("postgres", "DELETE FROM v WHERE id = 4").await.unwrap();
    process.api.resume("f").await.unwrap();
    let told = process.failed().await;
    assert!(named(&told), "{told}");
    process.server.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_cannot_be_sent_and_comes_without_its_name_is_found_by_its_place() {
    let source = PgServer::start().await.unwrap();
    source.sql("postgres", VALUES).await.unwrap();
    let config = json!({ "initial_copy": { "enabled": false }, "source": { "streaming": false } });
    let mut process = Process::start_as(&program(), &source, "blackhole://", &config).await;
    // The table is announced with this row, and not again with the next one.
    put(&source, 1, 1).await;
    process.caught_up(&source).await;
    put(&source, 2, TOO_LARGE).await;
    let told = process.failed().await;
    assert_eq!(told["code"], "CDC:ErrUpstreamValueTooLarge", "{told}");
    let words = told["message"].as_str().unwrap();
    assert!(words.contains("1 GiB") && words.contains("stays in the log"), "{told}");
    assert_eq!(found(&source, words).await, "v", "{told}");
    process.server.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes in a build that is not optimised; docs/performance.md has its figures"]
async fn a_value_of_two_hundred_mebibytes_is_carried() {
    let (_source, _target, mut process) = carried(LARGEST).await;
    process.server.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_the_process_has_no_memory_for_is_refused_by_the_name_of_its_table() {
    let (source, target) = servers().await;
    source.sql("postgres", VALUES).await.unwrap();
    // 384 MiB at most for a row; the value takes 400 as text.
    let dir = tempfile::tempdir().unwrap();
    let small = dir.path().join("small");
    let script = format!("#!/bin/sh\nulimit -v {}\nexec '{}' \"$@\"\n", 1536 << 10, program().display());
    std::fs::write(&small, script).unwrap();
    std::fs::set_permissions(&small, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let config = json!({ "initial_copy": { "enabled": false } });
    let mut process = Process::start_as(&small, &source, &target.uri(TARGET), &config).await;
    put(&source, 1, 1000).await;
    process.caught_up(&source).await;
    put(&source, 2, LARGEST).await;
    let told = process.failed().await;
    assert_eq!(told["code"], "CDC:ErrUpstreamValueTooLarge", "{told}");
    let words = told["message"].as_str().unwrap();
    assert!(words.contains("public.v") && words.contains("more memory"), "{told}");
    process.server.still_running().unwrap();
    assert!(process.server.peak_bytes() < LARGEST, "it was refused before it was there");
    process.server.stop().await.unwrap();
}
