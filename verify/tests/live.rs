//! Two servers, PostgreSQL's own replication between them, and rows that are changed behind its back.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use heartbeatpb::Ts;
use testkit::PgServer;
use tokio_postgres::Client;
use verify::{Checkpoint, Error, Kind, Options, Outcome, Reading, Report, TableName, TablePair, Verifier};

const TABLES: [&str; 5] = ["numbered", "named", "pairs", "keyless", "kinds"];
const SCHEMA: &str = "
    CREATE TABLE numbered (id bigint PRIMARY KEY, v text NOT NULL, n int NOT NULL DEFAULT 0);
    CREATE TABLE named (name text COLLATE \"und-x-icu\" PRIMARY KEY, v int);
    CREATE TABLE pairs (a date, b uuid, v numeric, PRIMARY KEY (a, b));
    CREATE TABLE keyless (a int, b text);
    ALTER TABLE keyless REPLICA IDENTITY FULL;
    CREATE TABLE kinds (id int PRIMARY KEY, f float8, t timestamptz, i interval, b bytea, j json, a text[], c char(5), m money, r int4range);";
const ROWS: &str = "
    INSERT INTO numbered SELECT n, 'row ' || n FROM generate_series(1, 5000) n;
    INSERT INTO named SELECT CASE WHEN n % 2 = 0 THEN 'Ä' ELSE 'a' END || n, n FROM generate_series(1, 3000) n;
    INSERT INTO pairs SELECT date '2020-01-01' + n % 50, md5(n::text)::uuid, n / 7.0 FROM generate_series(1, 2500) n;
    INSERT INTO keyless SELECT n % 100, 'x' FROM generate_series(1, 1000) n;
    INSERT INTO kinds SELECT n, n / 3.0, timestamptz '2024-01-31 12:00:00+03' + n * interval '1 hour', n * interval '1 month 3 days',
        decode(md5(n::text), 'hex'), json_build_object('n', n), ARRAY['a,b', NULL, n::text], 'x', n, int4range(n, n + 3)
        FROM generate_series(1, 300) n;";

/// A target that prints values in its own way unless it is told otherwise.
const MANNERS: &str = "ALTER DATABASE target SET TimeZone = 'Asia/Tokyo'; ALTER DATABASE target SET DateStyle = 'SQL, DMY'; \
    ALTER DATABASE target SET extra_float_digits = 0; ALTER DATABASE target SET bytea_output = 'escape'; \
    ALTER DATABASE target SET IntervalStyle = 'postgres_verbose'; ALTER DATABASE target SET lc_monetary = 'C';";

/// What is in the target: what the slot of the subscription says, once a second, or the last commit that was applied.
struct Progress {
    source: Client,
    target: Client,
}

impl Checkpoint for Progress {
    async fn checkpoint(&self) -> Result<Ts, String> {
        let slot =
            "SELECT (confirmed_flush_lsn - '0/0')::int8 FROM pg_replication_slots WHERE slot_name = 'pair'";
        let applied = "SELECT coalesce(max(remote_lsn) - '0/0', 0)::int8 FROM pg_replication_origin_status";
        let mut newest = 0;
        for (client, text) in [(&self.source, slot), (&self.target, applied)] {
            let row = client.query_one(text, &[]).await.map_err(|error| error.to_string())?;
            newest = newest.max(row.get::<_, i64>(0).unsigned_abs());
        }
        Ok(Ts(newest))
    }
}

/// One row that is another each time somebody asks how far the target is, and that the target has only then.
struct Restless {
    progress: Progress,
    /// Holds the row in the target.
    holder: Client,
    /// The backend that compares at the source.
    comparing: i32,
}

impl Restless {
    async fn change(&self) -> i32 {
        let text = "UPDATE numbered SET n = n + 1 WHERE id = 7 RETURNING n";
        self.progress.source.query_one(text, &[]).await.unwrap().get(0)
    }

    /// Waits until the comparison has looked at the source again, if it does.
    async fn seen(&self) {
        let since = "SELECT clock_timestamp()::text";
        let since: String = self.progress.source.query_one(since, &[]).await.unwrap().get(0);
        let text = "SELECT query_start > $1::text::timestamptz AND state = 'idle' FROM pg_stat_activity WHERE pid = $2";
        let deadline = Instant::now() + Duration::from_secs(1);
        while Instant::now() < deadline {
            let row = self.progress.source.query_one(text, &[&since, &self.comparing]).await.unwrap();
            if row.get::<_, Option<bool>>(0) == Some(true) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Checkpoint for Restless {
    async fn checkpoint(&self) -> Result<Ts, String> {
        let n = self.change().await;
        self.seen().await;
        self.holder.batch_execute("COMMIT; BEGIN").await.unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        let text = "SELECT n FROM numbered WHERE id = 7";
        while self.progress.target.query_one(text, &[]).await.unwrap().get::<_, i32>(0) != n {
            assert!(Instant::now() < deadline, "{n} does not arrive");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.holder.batch_execute("SELECT FROM numbered WHERE id = 7 FOR UPDATE").await.unwrap();
        self.change().await;
        self.progress.checkpoint().await
    }
}

struct Pair {
    source: PgServer,
    target: PgServer,
}

impl Pair {
    async fn start() -> Self {
        Self::start_in(false).await
    }

    /// With ICU for all texts, where databases can have that: since version 15.
    async fn start_in(icu: bool) -> Self {
        let source = PgServer::builder().setting("wal_level", "logical").setting("wal_sender_timeout", "2s");
        let (source, target) = tokio::join!(
            source.start(),
            PgServer::builder().setting("wal_receiver_status_interval", "1").start()
        );
        let (source, target) = (source.unwrap(), target.unwrap());
        for (server, name) in [(&source, "source"), (&target, "target")] {
            let client = server.client("postgres").await.unwrap();
            let version = "SELECT current_setting('server_version_num')::int4 >= 150000";
            let icu = icu && client.query_one(version, &[]).await.unwrap().get(0);
            let collation = if icu {
                "TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'en' LOCALE 'C.UTF-8'"
            } else {
                ""
            };
            client.batch_execute(&format!("CREATE DATABASE {name} {collation}")).await.unwrap();
        }
        target.sql("target", MANNERS).await.unwrap();
        source.sql("source", SCHEMA).await.unwrap();
        target.sql("target", SCHEMA).await.unwrap();
        source.sql("source", ROWS).await.unwrap();
        source.sql("source", "CREATE PUBLICATION pair FOR ALL TABLES").await.unwrap();
        let uri = source.uri("source");
        target
            .sql("target", &format!("CREATE SUBSCRIPTION pair CONNECTION '{uri}' PUBLICATION pair"))
            .await
            .unwrap();
        let pair = Self { source, target };
        pair.until("SELECT bool_and(srsubstate = 'r') FROM pg_subscription_rel").await;
        pair
    }

    /// Waits until the target says so.
    async fn until(&self, question: &str) {
        let client = self.target.client("target").await.unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while !client.query_one(question, &[]).await.unwrap().get::<_, bool>(0) {
            assert!(Instant::now() < deadline, "{question}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn compare(&self, options: Options, tables: &[&str]) -> Result<Report, Error> {
        let source = self.source.client("source").await.unwrap();
        self.compare_from(source, self.progress().await, options, tables).await
    }

    async fn progress(&self) -> Progress {
        let (source, target) = (self.source.client("source").await, self.target.client("target").await);
        Progress { source: source.unwrap(), target: target.unwrap() }
    }

    async fn compare_from(
        &self,
        source: Client,
        progress: impl Checkpoint,
        options: Options,
        tables: &[&str],
    ) -> Result<Report, Error> {
        let target = self.target.client("target").await.unwrap();
        let name = |table: &&str| TableName { schema: "public".to_owned(), name: (*table).to_owned() };
        let pairs: Vec<TablePair> = tables.iter().map(|table| TablePair::same(name(table))).collect();
        let mut seen = 0;
        let report = Verifier::new(source, target, progress, options).await?.run(&pairs, |_| seen += 1).await;
        assert!(seen > 0 || report.is_err(), "progress is told");
        report
    }

    /// Changes rows at the source until it is told to stop, and counts the transactions.
    fn load(&self, stop: &Arc<AtomicBool>, count: &Arc<AtomicU64>) -> tokio::task::JoinHandle<()> {
        let (uri, stop, done) = (self.source.uri("source"), Arc::clone(stop), Arc::clone(count));
        tokio::spawn(async move {
            let (client, connection) = tokio_postgres::connect(&uri, tokio_postgres::NoTls).await.unwrap();
            tokio::spawn(connection);
            let mut count = 0_u64;
            // What PostgreSQL's own replication can follow.
            let mut pace = tokio::time::interval(Duration::from_millis(50));
            while !stop.load(Ordering::Relaxed) {
                // No row changes all the time: one that changes more often than anybody can look is never decided.
                let (n, new, ninth) = (count % 5000 + 1, 100_000 + count, count % 9);
                let text = format!(
                    "BEGIN; UPDATE numbered SET n = n + 1 WHERE id IN ({n}, 17 + {ninth}, 4990 + {ninth});
                     UPDATE named SET v = v + 1 WHERE name LIKE 'a1{ninth}%'; UPDATE pairs SET v = v + 1 WHERE a = date '2020-01-1{ninth}' AND b < '10000000-0000-0000-0000-000000000000';
                     INSERT INTO keyless VALUES ({new}, 'new'); DELETE FROM keyless WHERE a = {new} - 20;
                     INSERT INTO numbered VALUES ({new}, 'new'); DELETE FROM numbered WHERE id = {new} - 50; COMMIT"
                );
                client.batch_execute(&text).await.unwrap();
                count += 1;
                done.store(count, Ordering::Relaxed);
                pace.tick().await;
            }
        })
    }
}

fn small() -> Options {
    Options { part_rows: 400, ..Options::default() }
}

fn found(report: &Report, table: &str) -> Vec<(String, Kind)> {
    let table = report.tables.iter().find(|all| all.source.ends_with(table)).unwrap();
    let mut all: Vec<(String, Kind)> = table
        .shown
        .iter()
        .map(|difference| (difference.key.values().cloned().collect::<Vec<_>>().join(" "), difference.kind))
        .collect();
    all.sort();
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_on_their_way_are_no_differences_and_those_that_differ_are_found() {
    let pair = Pair::start().await;
    let stop = Arc::new(AtomicBool::new(false));
    let count = Arc::new(AtomicU64::new(0));
    let load = pair.load(&stop, &count);
    // Again and again, until enough was changed meanwhile.
    let deadline = Instant::now() + Duration::from_secs(60);
    while count.load(Ordering::Relaxed) < 20 {
        let report = pair.compare(small(), &TABLES).await.unwrap();
        for table in &report.tables {
            assert_eq!(table.outcome, Outcome::Equal, "{report}\n{table:?}");
        }
        assert!(report.tables[0].parts > 10 && report.tables[0].rows >= 5000, "{report}");
        assert!(Instant::now() < deadline, "the load goes on");
    }
    // Behind the back of the replication, on rows that the load leaves alone: it would repair the others.
    let spoil = "UPDATE numbered SET v = 'spoiled' WHERE id = 4000; DELETE FROM numbered WHERE id = 1;
        INSERT INTO numbered VALUES (-5, 'extra'), (9000000, 'extra');
        DELETE FROM named WHERE name = 'Ä2'; UPDATE named SET v = -7 WHERE name = 'a1';
        UPDATE pairs SET v = v + 0.001 WHERE a = date '2020-01-07' AND b = md5('6')::uuid;
        DELETE FROM keyless WHERE ctid = (SELECT min(ctid) FROM keyless WHERE a = 7);
        UPDATE kinds SET f = f + 1e-13 WHERE id = 3; UPDATE kinds SET a[2] = '' WHERE id = 4;";
    pair.target.sql("target", spoil).await.unwrap();
    let report = pair.compare(small(), &TABLES).await.unwrap();
    stop.store(true, Ordering::Relaxed);
    load.await.unwrap();
    let expected =
        [("-5", Kind::Extra), ("1", Kind::Missing), ("4000", Kind::Other), ("9000000", Kind::Extra)];
    assert_eq!(found(&report, "numbered"), expected.map(|(key, kind)| (key.to_owned(), kind)), "{report}");
    assert_eq!(
        found(&report, "named"),
        [("a1".to_owned(), Kind::Other), ("Ä2".to_owned(), Kind::Missing)],
        "{report}"
    );
    assert_eq!(found(&report, "pairs").len(), 1, "{report}");
    assert_eq!(
        found(&report, "keyless").iter().map(|one| one.1).collect::<Vec<_>>(),
        [Kind::Missing],
        "{report}"
    );
    assert_eq!(
        found(&report, "kinds"),
        [("3".to_owned(), Kind::Other), ("4".to_owned(), Kind::Other)],
        "{report}"
    );
    assert_eq!(report.outcome, Outcome::Different);
    let readings: Vec<Option<Reading>> = report.tables.iter().map(|table| table.reading).collect();
    let (ranges, scans) = (Some(Reading::Ranges), Some(Reading::Scans));
    assert_eq!(readings, [ranges, ranges, ranges, scans, ranges], "only rows without a key are read whole");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_changes_all_the_time_is_the_same_when_the_target_goes_along() {
    let pair = Pair::start().await;
    let source = pair.source.client("source").await.unwrap();
    let comparing = source.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    let holder = pair.target.client("target").await.unwrap();
    holder.batch_execute("BEGIN").await.unwrap();
    let restless = Restless { progress: pair.progress().await, holder, comparing };
    restless.checkpoint().await.unwrap();
    let report = pair.compare_from(source, restless, small(), &["numbered"]).await.unwrap();
    let table = &report.tables[0];
    assert!(table.suspects > 0, "it differed at first: {report}");
    assert_eq!((table.outcome, table.undecided), (Outcome::Equal, 0), "{report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_or_a_column_that_the_target_lacks_is_a_difference_and_never_equal() {
    let pair = Pair::start().await;
    pair.source.sql("source", "CREATE TABLE new (id int PRIMARY KEY)").await.unwrap();
    pair.target.sql("target", "ALTER TABLE pairs DROP COLUMN v; ALTER TABLE named ADD w int").await.unwrap();
    let report = pair.compare(small(), &["new", "pairs", "named"]).await.unwrap();
    let outcomes: Vec<Outcome> = report.tables.iter().map(|table| table.outcome).collect();
    assert_eq!(outcomes, [Outcome::Different, Outcome::Different, Outcome::Equal], "{report}");
    assert_eq!(report.tables[0].notes, ["the target has no table public.new"]);
    assert_eq!(report.tables[1].notes, ["the target has no column v"]);
    assert_eq!(report.tables[2].notes, ["column w exists only at the target and is not compared"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_does_not_catch_up_is_an_error_that_says_so() {
    let pair = Pair::start().await;
    pair.target.sql("target", "ALTER SUBSCRIPTION pair DISABLE").await.unwrap();
    pair.source.sql("source", "UPDATE numbered SET n = -1 WHERE id = 3").await.unwrap();
    let options = Options { patience: Duration::from_millis(300), ..small() };
    let error = pair.compare(options, &["numbered"]).await.unwrap_err();
    assert!(matches!(error, Error::Behind { .. }), "{error}");
    assert!(error.to_string().contains("did not reach"), "{error}");
    // What is the same is the same, however far the changefeed is.
    assert_eq!(pair.compare(options, &["pairs"]).await.unwrap().outcome, Outcome::Equal);
}

/// Words in both cases and with accents: bytes have another order than dictionaries.
const WORDS: &str = "INSERT INTO {table} SELECT w || n, n FROM
    unnest(ARRAY['apple', 'Apple', 'äpfel', 'Äpfel', 'zebra', 'Zebra', 'éclair', 'Eclair', 'o-k', 'ok', 'OK']) w, generate_series(1, 100) n;
    ANALYZE {table}";

#[tokio::test(flavor = "multi_thread")]
async fn texts_are_read_by_ranges_where_both_ends_have_one_collation_and_whole_where_not() {
    let pair = Pair::start_in(true).await;
    let english = "\"en-x-icu\"";
    // The collation of the key at the source and at the target.
    let tables = [
        ("english", english, english, Reading::Ranges),
        ("usual", "\"default\"", "\"default\"", Reading::Ranges),
        ("code_points", "\"C.utf8\"", "\"C.utf8\"", Reading::Ranges),
        ("bytes", "\"C\"", "\"POSIX\"", Reading::Ranges),
        ("unlike", english, "\"sv-x-icu\"", Reading::Scans),
        ("bytes_here", "\"C\"", english, Reading::Scans),
    ];
    for (table, here, there, _) in tables {
        for (server, database, collation) in [(&pair.source, "source", here), (&pair.target, "target", there)]
        {
            let make = format!("CREATE TABLE {table} (word text COLLATE {collation} PRIMARY KEY, v int)");
            server.sql(database, &make).await.unwrap();
            server.sql(database, &WORDS.replace("{table}", table)).await.unwrap();
        }
        let spoil = "UPDATE {table} SET v = -1 WHERE word = 'Äpfel7'; DELETE FROM {table} WHERE word IN ('apple1', 'zebra100');
            INSERT INTO {table} VALUES ('Éclair5', 5), ('', 0)";
        pair.target.sql("target", &spoil.replace("{table}", table)).await.unwrap();
    }
    // An index of another collation than its column has is of no use for ranges.
    let odd = format!(
        "CREATE TABLE odd (word text COLLATE {english} NOT NULL, v int); CREATE UNIQUE INDEX ON odd (word COLLATE \"C\");"
    );
    pair.source.sql("source", &odd).await.unwrap();
    pair.target.sql("target", &odd).await.unwrap();
    let names: Vec<&str> = tables.iter().map(|table| table.0).chain(["odd"]).collect();
    let report = pair.compare(Options { part_rows: 50, ..small() }, &names).await.unwrap();
    let expected = [
        ("", Kind::Extra),
        ("apple1", Kind::Missing),
        ("zebra100", Kind::Missing),
        ("Äpfel7", Kind::Other),
        ("Éclair5", Kind::Extra),
    ];
    for (at, (table, _, _, reading)) in tables.into_iter().enumerate() {
        assert_eq!(found(&report, table), expected.map(|(word, kind)| (word.to_owned(), kind)), "{report}");
        let table = &report.tables[at];
        assert_eq!(table.reading, Some(reading), "{table:?}");
        assert_eq!((table.rows, table.undecided, table.suspects), (1100, 0, 5), "{table:?}");
        let why =
            "it is read whole, in one scan of each end: both ends may put its key into different orders";
        match reading {
            Reading::Ranges => assert!(table.parts > 20 && table.notes.is_empty(), "{table:?}"),
            Reading::Scans => assert_eq!(table.notes, [why], "{table:?}"),
        }
    }
    let odd = report.tables.last().unwrap();
    assert_eq!((odd.reading, odd.outcome), (Some(Reading::Scans), Outcome::Equal), "{odd:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_holds_by_ranges_and_by_scans_and_for_whatever_is_looked_at_again() {
    let pair = Pair::start().await;
    let timed = async |rows_per_second: u32, tables: &[&str]| {
        let options = Options { rows_per_second: Some(rows_per_second), ..small() };
        let began = Instant::now();
        let report = pair.compare(options, tables).await.unwrap();
        (began.elapsed(), report)
    };
    // Never less than the rows take at the limit, however fast both ends are: without it each of these takes a moment.
    let (took, report) = timed(5000, &["numbered"]).await;
    assert_eq!(
        (report.outcome, report.tables[0].reading),
        (Outcome::Equal, Some(Reading::Ranges)),
        "{report}"
    );
    assert!(took >= Duration::from_secs(1), "5000 rows by ranges in {took:?}");
    let (took, report) = timed(200, &["kinds"]).await;
    assert_eq!(
        (report.outcome, report.tables[0].parts),
        (Outcome::Equal, 2),
        "a part is what a second allows: {report}"
    );
    assert!(took >= Duration::from_millis(1500), "300 rows by ranges in {took:?}");
    let (took, report) = timed(2000, &["keyless", "pairs"]).await;
    assert_eq!(
        (report.outcome, report.tables[0].reading),
        (Outcome::Equal, Some(Reading::Scans)),
        "{report}"
    );
    assert!(took >= Duration::from_millis(1750), "1000 rows in one scan and 2500 by ranges in {took:?}");
    // Buckets twice, the rows of those that differ, and those that differ before and after each of two rounds: seven scans.
    pair.target
        .sql("target", "UPDATE keyless SET b = 'y' WHERE ctid = (SELECT min(ctid) FROM keyless)")
        .await
        .unwrap();
    let (took, report) = timed(2000, &["keyless"]).await;
    assert_eq!(report.tables[0].differences, 2, "{report}");
    assert!(took >= Duration::from_millis(3500), "seven scans of 1000 rows in {took:?}");
    // A part twice, its rows, and those that differ before and after each of two rounds.
    pair.target.sql("target", "UPDATE kinds SET f = -1 WHERE id <= 200").await.unwrap();
    let (took, report) = timed(400, &["kinds"]).await;
    assert_eq!(report.tables[0].differences, 200, "{report}");
    assert!(took >= Duration::from_secs(4), "1700 rows in {took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_comparison_that_fails_has_kept_to_the_limit_too() {
    let pair = Pair::start().await;
    pair.target.sql("target", "ALTER SUBSCRIPTION pair DISABLE").await.unwrap();
    pair.source.sql("source", "UPDATE keyless SET b = 'z' WHERE a = 3").await.unwrap();
    let options = Options { patience: Duration::from_millis(100), rows_per_second: Some(1000), ..small() };
    let began = Instant::now();
    let error = pair.compare(options, &["keyless"]).await.unwrap_err();
    let took = began.elapsed();
    assert!(matches!(error, Error::Behind { .. }), "{error}");
    assert!(took >= Duration::from_secs(1), "1000 rows in {took:?}");
}
