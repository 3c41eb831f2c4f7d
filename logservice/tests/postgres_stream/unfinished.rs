//! Transactions that come before they end: what is in the store at last is what is there when they come as a whole.

use std::sync::atomic::Ordering;

use heartbeatpb::config::DdlCapture;
use heartbeatpb::{TableId, Ts};
use logservice::upstream::FeedSpec;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use testkit::PgServer;
use tokio_postgres::Client;

use crate::rig::{Running, changes, eventually, slot, spec};

/// Little memory, so that what waits is on disk.
const MEMORY: usize = 1 << 20;
const DISK: u64 = 1 << 30;

/// A server that sends everything but small transactions before they end.
async fn server() -> PgServer {
    PgServer::builder().setting("logical_decoding_work_mem", "64kB").start().await.expect("server")
}

async fn start(spec: FeedSpec, disk: u64) -> Running {
    let upstream = logservice::upstream::open(&spec.upstream_uri).expect("uri");
    let start = upstream.create_retention(&spec, None).await.expect("retention");
    Running::resume_with(spec, start, start.start_ts, MEMORY, disk).await
}

/// The same log, read in both ways.
struct Both {
    before: Running,
    whole: Running,
}

impl Both {
    async fn start(server: &PgServer, capture: bool) -> Self {
        let mut before = spec(&server.uri("postgres"), &["*.*"]);
        if capture {
            before.ddl.capture = DdlCapture::On;
        }
        let mut whole = before.clone();
        whole.changefeed = heartbeatpb::ChangefeedId::fresh("test");
        whole.streaming = false;
        Self { before: start(before, DISK).await, whole: start(whole, DISK).await }
    }

    /// Waits for both, and compares them from the place on where the later one began. Answers the changes of a table.
    async fn same(&self, tables: &[&str]) -> Vec<usize> {
        self.before.catch_up().await;
        self.whole.catch_up().await;
        let mut counts = Vec::new();
        for table in tables {
            let id = self.whole.tables[*table].id;
            let (one, other) = (changes(&self.before.store, id), changes(&self.whole.store, id));
            assert!(one == other, "{table}: {} changes and {} as a whole", one.len(), other.len());
            assert_eq!(self.ddls(&self.before, id), self.ddls(&self.whole, id));
            counts.push(one.len());
        }
        assert_eq!(self.before.store.stats().unfinished_bytes, 0, "nothing is left");
        counts
    }

    fn ddls(&self, running: &Running, table: TableId) -> Vec<(Ts, String)> {
        let ddls = running.store.ddls(table, Ts::ZERO);
        ddls.iter().map(|ddl| (ddl.commit_ts, format!("{:?} {}", ddl.kind, ddl.query))).collect()
    }

    async fn stop(self) {
        self.before.stop().await;
        self.whole.stop().await;
    }
}

/// Transactions that the server has sent to a changefeed before their ends.
async fn streamed(client: &Client, spec: &FeedSpec) -> i64 {
    let sql =
        "SELECT coalesce(sum(stream_txns), 0)::int8 FROM pg_stat_replication_slots WHERE slot_name = $1";
    client.query_one(sql, &[&slot(spec)]).await.expect("statistics").get(0)
}

/// Waits until something of a transaction that has not ended is on disk.
async fn something_waits(running: &Running) {
    eventually("something waits on disk", async || {
        (running.store.stats().unfinished_bytes > 0).then_some(())
    })
    .await;
}

fn insert(from: u32, to: u32) -> String {
    format!("INSERT INTO t SELECT g, repeat('x', 200), repeat('y', 20) FROM generate_series({from}, {to}) g;")
}

const TABLES: &str =
    "CREATE TABLE t (id int PRIMARY KEY, a text, big text); ALTER TABLE t ALTER big SET STORAGE EXTERNAL;
     CREATE TABLE u (id int PRIMARY KEY, v int); CREATE TABLE s (id int PRIMARY KEY)";

// behaviour: dataplane-15
#[tokio::test(flavor = "multi_thread")]
async fn rolled_back_released_and_nested_parts_leave_what_was_committed_in_the_order_of_commits() {
    let server = server().await;
    server.sql("postgres", TABLES).await.expect("tables");
    let both = Both::start(&server, false).await;
    let (a, b, c, small) = (
        server.client("postgres").await.expect("client"),
        server.client("postgres").await.expect("client"),
        server.client("postgres").await.expect("client"),
        server.client("postgres").await.expect("client"),
    );
    let run = async |client: &Client, sql: &str| client.batch_execute(sql).await.expect("a statement");
    run(&a, &format!("BEGIN; {} SAVEPOINT one; {}", insert(1, 3000), insert(3001, 5000))).await;
    run(&small, "INSERT INTO s VALUES (1)").await;
    run(&b, &format!("BEGIN; {}", insert(10_001, 13_000))).await;
    run(&a, "SAVEPOINT two; UPDATE t SET a = 'u' WHERE id <= 1000; RELEASE two").await;
    run(&c, &format!("BEGIN; {}", insert(20_001, 25_000))).await;
    // Every second of these is rolled back, one inside another.
    run(
        &b,
        "DO $$ BEGIN FOR i IN 1..2000 LOOP BEGIN INSERT INTO u VALUES (i, 0);
           BEGIN UPDATE u SET v = 1 WHERE id = i; IF i % 3 = 0 THEN RAISE 'inner'; END IF;
           EXCEPTION WHEN raise_exception THEN NULL; END;
           IF i % 2 = 0 THEN RAISE 'outer'; END IF;
         EXCEPTION WHEN raise_exception THEN NULL; END; END LOOP; END $$",
    )
    .await;
    something_waits(&both.before).await;
    run(&a, "ROLLBACK TO one").await;
    run(&a, &insert(4001, 6000)).await;
    run(&small, "INSERT INTO s VALUES (2); UPDATE u SET v = v + 1 WHERE false").await;
    run(&a, "SAVEPOINT three; UPDATE t SET id = -id WHERE id <= 500; DELETE FROM t WHERE id > 5500; RELEASE three").await;
    run(&c, "ROLLBACK").await;
    run(&b, "COMMIT").await;
    run(&small, "INSERT INTO s VALUES (3)").await;
    run(&a, "COMMIT").await;
    run(
        &small,
        &format!(
            "UPDATE t SET big = repeat('z', 3000) WHERE id < 100; BEGIN; {} TRUNCATE s; ROLLBACK",
            insert(30_000, 31_000)
        ),
    )
    .await;
    run(&small, &format!("BEGIN; {} TRUNCATE s; COMMIT", insert(30_000, 31_000))).await;
    let counts = both.same(&["t", "u", "s"]).await;
    assert_eq!(counts[2], 4, "three rows and a truncation");
    assert!(counts[0] > 10_000, "{counts:?}");
    assert!(streamed(&a, &both.before.spec).await >= 4);
    assert_eq!(streamed(&a, &both.whole.spec).await, 0);
    assert_eq!(both.before.progress.reconnects.load(Ordering::Relaxed), 0);
    both.stop().await;
}

// behaviour: dataplane-15
#[tokio::test(flavor = "multi_thread")]
async fn schemas_that_change_in_a_part_that_is_rolled_back_do_not_change() {
    let server = server().await;
    server.sql("postgres", TABLES).await.expect("tables");
    let both = Both::start(&server, true).await;
    let client = server.client("postgres").await.expect("client");
    let run = async |sql: &str| client.batch_execute(sql).await.expect("a statement");
    // A change that stays.
    run(&format!(
        "BEGIN; {} ALTER TABLE t ADD n int DEFAULT 7; {} COMMIT",
        insert(1, 2000).replace(" SELECT", " (id, a, big) SELECT"),
        insert(2001, 4000).replace("INTO t", "INTO t (id, a, big)")
    ))
    .await;
    assert_eq!(both.same(&["t"]).await, [4000]);
    let before = streamed(&client, &both.before.spec).await;
    assert!(before >= 1);
    // One that goes, with rows behind it and without.
    let rows = |from, to| insert(from, to).replace("INTO t", "INTO t (id, a, big)");
    run(&format!(
        "BEGIN; {} SAVEPOINT one; ALTER TABLE t ADD m int DEFAULT 8; {} ROLLBACK TO one; {} COMMIT",
        rows(5001, 7000),
        rows(7001, 9000),
        rows(7001, 8000)
    ))
    .await;
    assert_eq!(both.same(&["t"]).await, [7000]);
    run(&format!(
        "BEGIN; {} SAVEPOINT one; ALTER TABLE t ADD m int; ALTER TABLE u ADD m int; SAVEPOINT two; {} ROLLBACK TO one; {} COMMIT",
        rows(11_001, 13_000), rows(13_001, 15_000), rows(13_001, 14_000)
    ))
    .await;
    assert_eq!(both.same(&["t", "u"]).await, [10_000, 0]);
    // What comes later is read before its end again.
    let before = streamed(&client, &both.before.spec).await;
    run(&format!("BEGIN; {} COMMIT", rows(20_001, 23_000))).await;
    assert_eq!(both.same(&["t"]).await, [13_000]);
    assert!(streamed(&client, &both.before.spec).await > before);
    assert_eq!(both.before.progress.reconnects.load(Ordering::Relaxed), 0, "nothing was lost");
    both.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_that_others_announce_meanwhile_keep_their_newer_shape() {
    let server = server().await;
    server.sql("postgres", "CREATE SCHEMA x; CREATE TABLE x.t (id int PRIMARY KEY, a text, big text); CREATE TABLE s (id int PRIMARY KEY)").await.expect("tables");
    let both = Both::start(&server, true).await;
    let (a, b) =
        (server.client("postgres").await.expect("client"), server.client("postgres").await.expect("client"));
    a.batch_execute(&format!("BEGIN; {}", insert(1, 3000).replace("INTO t", "INTO x.t")))
        .await
        .expect("rows");
    something_waits(&both.before).await;
    b.batch_execute("ALTER SCHEMA x RENAME TO y").await.expect("no lock is in its way");
    b.batch_execute("INSERT INTO y.t VALUES (-1)").await.expect("a row");
    a.batch_execute("COMMIT").await.expect("commit");
    b.batch_execute("INSERT INTO y.t VALUES (-2)").await.expect("a row");
    assert_eq!(both.same(&["t"]).await, [3002]);
    both.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_breaks_in_the_middle_neither_loses_nor_repeats_anything() {
    let server = server().await;
    server.sql("postgres", TABLES).await.expect("tables");
    let both = Both::start(&server, false).await;
    let (a, small) =
        (server.client("postgres").await.expect("client"), server.client("postgres").await.expect("client"));
    for round in 0..4_u32 {
        a.batch_execute("BEGIN").await.expect("begin");
        for part in 0..4 {
            let from = round * 10_000 + part * 1000;
            a.batch_execute(&insert(from, from + 999)).await.expect("rows");
            small.batch_execute(&format!("INSERT INTO s VALUES ({from})")).await.expect("a row");
            if part == round {
                something_waits(&both.before).await;
                let sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_replication";
                small.batch_execute(sql).await.expect("terminate");
            }
        }
        a.batch_execute("COMMIT").await.expect("commit");
    }
    assert_eq!(both.same(&["t", "s"]).await, [16_000, 16]);
    assert!(both.before.progress.reconnects.load(Ordering::Relaxed) >= 4);
    assert!(streamed(&a, &both.before.spec).await >= 4);
    both.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_half_of_the_disk_comes_at_its_end() {
    let server = server().await;
    server.sql("postgres", TABLES).await.expect("tables");
    let running = start(spec(&server.uri("postgres"), &["*.*"]), 4 << 20).await;
    let (a, b) =
        (server.client("postgres").await.expect("client"), server.client("postgres").await.expect("client"));
    a.batch_execute(&format!("BEGIN; {}", insert(1, 6000))).await.expect("rows");
    b.batch_execute(&format!("BEGIN; {}", insert(10_001, 16_000))).await.expect("rows");
    // A transaction sees the statistics of its beginning.
    let other = server.client("postgres").await.expect("client");
    eventually("the log is read as a whole", async || {
        let sql = "SELECT FROM pg_stat_activity WHERE query LIKE 'START_REPLICATION%proto_version ''1''%'";
        let whole = !other.query(sql, &[]).await.expect("connections").is_empty();
        (whole && running.store.stats().unfinished_bytes == 0).then_some(())
    })
    .await;
    b.batch_execute("INSERT INTO s VALUES (1); COMMIT").await.expect("commit");
    running.catch_up().await;
    assert_eq!((running.changes("t").len(), running.changes("s").len()), (6000, 1));
    running.store.trim(running.tables["t"].id, running.store.resolved().0, None);
    let streamed_before = streamed(&b, &running.spec).await;
    a.batch_execute("COMMIT").await.expect("commit");
    running.catch_up().await;
    assert_eq!(
        crate::rig::changes_after(&running.store, running.tables["t"].id, running.changes("s")[0].commit_ts)
            .len(),
        6000
    );
    assert_eq!(streamed(&b, &running.spec).await, streamed_before);
    running.stop().await;
}

/// A session with a table of its own that does whatever comes to its mind.
struct Anybody {
    client: Client,
    table: String,
    random: StdRng,
    /// Savepoints that are open; `None` outside of a transaction.
    open: Option<usize>,
    columns: usize,
    next: u32,
}

impl Anybody {
    async fn new(server: &PgServer, number: u64, seed: u64) -> Self {
        let client = server.client("postgres").await.expect("client");
        let table = format!("t{number}");
        let random = StdRng::seed_from_u64(seed * 100 + number);
        Self { client, table, random, open: None, columns: 0, next: 1 }
    }

    fn change(&mut self) -> String {
        let (table, rows) = (&self.table, self.random.random_range(1..600_u32));
        let from = self.random.random_range(0..=self.next);
        let some = format!("abs(id) BETWEEN {from} AND {}", from + rows);
        match self.random.random_range(0..10_u8) {
            0..5 => {
                self.next += rows;
                let (from, to) = (self.next - rows, self.next - 1);
                format!(
                    "INSERT INTO {table} (id, a, big) SELECT g, repeat('x', 150), repeat('y', 20) \
                     FROM generate_series({from}, {to}) g ON CONFLICT DO NOTHING"
                )
            }
            5 => format!("UPDATE {table} SET a = a || 'u' WHERE {some}"),
            6 => format!("UPDATE {table} SET id = -id WHERE {some}"),
            7 => format!("DELETE FROM {table} WHERE {some}"),
            8 => format!(
                "UPDATE {table} SET big = repeat('z', 3000) WHERE abs(id) BETWEEN {from} AND {from} + 5"
            ),
            _ => format!("UPDATE {table} SET a = 'short' WHERE {some} AND length(big) > 1000"),
        }
    }

    async fn act(&mut self, ddl: bool) {
        let savepoint = self.random.random::<u8>();
        let sql = match (self.open, self.random.random_range(0..20_u8)) {
            (None, _) => {
                self.open = Some(0);
                "BEGIN".to_owned()
            }
            (Some(0), 0) => self.end("COMMIT"),
            (Some(0), 1) => self.end("ROLLBACK"),
            (Some(0), 2) => {
                let name = format!("p{}", self.table);
                let ends = if self.random.random() { "COMMIT" } else { "ROLLBACK" };
                self.run(&format!("PREPARE TRANSACTION '{name}'")).await;
                self.end(&format!("{ends} PREPARED '{name}'"))
            }
            (Some(depth), 3..6) => {
                self.open = Some(depth + 1);
                format!("SAVEPOINT s{}", depth + 1)
            }
            (Some(depth), 6) if depth > 0 => {
                self.open = Some(depth - 1);
                format!("RELEASE s{depth}")
            }
            (Some(depth), 7..9) if depth > 0 => {
                self.open = Some(depth - 1);
                format!("ROLLBACK TO s{depth}; RELEASE s{depth}")
            }
            (Some(_), 9) if ddl && savepoint < 100 => {
                self.columns += 1;
                format!("ALTER TABLE {} ADD c{} int DEFAULT {savepoint}", self.table, self.columns)
            }
            _ => self.change(),
        };
        self.run(&sql).await;
    }

    fn end(&mut self, sql: &str) -> String {
        self.open = None;
        sql.to_owned()
    }

    async fn run(&self, sql: &str) {
        self.client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }
}

// behaviour: dataplane-15
#[tokio::test(flavor = "multi_thread")]
async fn whatever_sessions_do_is_the_same_in_both_ways() {
    const SESSIONS: u64 = 3;
    let server = PgServer::builder()
        .setting("logical_decoding_work_mem", "64kB")
        .setting("max_prepared_transactions", "10")
        .start()
        .await
        .expect("server");
    let table = "(id int PRIMARY KEY, a text, big text)";
    let mut came = 0;
    for seed in seeds() {
        let (sql, tables): (Vec<String>, Vec<String>) = (0..SESSIONS)
            .map(|number| {
                let name = format!("t{number}");
                let sql = format!(
                    "DROP TABLE IF EXISTS {name}; CREATE TABLE {name} {table}; ALTER TABLE {name} ALTER big SET STORAGE EXTERNAL"
                );
                (sql, name)
            })
            .unzip();
        server.sql("postgres", &sql.join(";")).await.expect("tables");
        let both = Both::start(&server, seed % 2 == 0).await;
        let mut sessions = Vec::new();
        for number in 0..SESSIONS {
            sessions.push(Anybody::new(&server, number, seed).await);
        }
        let mut random = StdRng::seed_from_u64(seed);
        for _ in 0..250 {
            let session = random.random_range(0..sessions.len());
            sessions[session].act(seed % 2 == 0).await;
        }
        for session in &sessions {
            if session.open.is_some() {
                session.run("COMMIT").await;
            }
        }
        println!("seed {seed}");
        let tables: Vec<&str> = tables.iter().map(String::as_str).collect();
        let counts = both.same(&tables).await;
        let before = streamed(&sessions[0].client, &both.before.spec).await;
        println!("{counts:?} changes, {before} transactions before their ends");
        came += before;
        let (upstream, feeds) = (
            std::sync::Arc::clone(&both.before.upstream),
            [both.before.spec.changefeed.clone(), both.whole.spec.changefeed.clone()],
        );
        both.stop().await;
        for feed in feeds {
            upstream.drop_retention(&feed).await.expect("retention");
        }
    }
    assert!(came > 0);
}

/// `MILLRACE_TEST_SEEDS=1000..1100` for a search.
fn seeds() -> std::ops::Range<u64> {
    let Ok(range) = std::env::var("MILLRACE_TEST_SEEDS") else { return 1..5 };
    let (from, to) = range.split_once("..").expect("two numbers with two points between them");
    from.parse().expect("a number")..to.parse().expect("a number")
}
