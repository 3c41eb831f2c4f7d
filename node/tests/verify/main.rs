//! `millrace verify` asks a server that runs, with two PostgreSQL servers, while rows flow.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use testkit::{Millrace, PgServer};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

const SCHEMA: &str =
    "CREATE TABLE accounts (id bigint PRIMARY KEY, owner text NOT NULL, amount numeric NOT NULL);
    INSERT INTO accounts SELECT n, 'owner ' || n, n FROM generate_series(1, 30000) n;
    CREATE TABLE named (name text COLLATE \"und-x-icu\" PRIMARY KEY, v int);
    INSERT INTO named SELECT 'Ä' || n, n FROM generate_series(1, 2000) n;
    CREATE TABLE lines (a int, b text); ALTER TABLE lines REPLICA IDENTITY FULL;
    INSERT INTO lines SELECT n % 50, 'x' FROM generate_series(1, 500) n;";

struct World {
    source: PgServer,
    target: PgServer,
    server: Millrace,
    _dir: tempfile::TempDir,
}

impl World {
    async fn start() -> Self {
        Self::start_with(&json!({ "force_replicate": true })).await
    }

    async fn start_with(config: &Value) -> Self {
        let (source, target) =
            tokio::join!(PgServer::builder().setting("wal_level", "logical").start(), PgServer::start());
        let (source, target) = (source.unwrap(), target.unwrap());
        source.sql("postgres", "CREATE DATABASE here").await.unwrap();
        target.sql("postgres", "CREATE DATABASE there").await.unwrap();
        source.sql("here", SCHEMA).await.unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut server = Millrace::new(Path::new(env!("CARGO_BIN_EXE_millrace")), dir.path()).unwrap();
        server.start().await.unwrap();
        server.api().create("pair", &source.uri("here"), &target.uri("there"), config).await.unwrap();
        Self { source, target, server, _dir: dir }
    }

    async fn verify(&self, more: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_millrace"));
        command.args(["verify", "--server", &self.server.api().base(), "-c", "pair"]).args(more);
        tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
    }

    /// What the server answers, head and all.
    async fn answer(&self, request: &str) -> String {
        let mut stream = TcpStream::connect(("127.0.0.1", self.server.api().port())).await.unwrap();
        let request = format!("{request} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    /// A metric of the changefeed, if it is there.
    async fn metric(&self, name: &str) -> Option<f64> {
        let page = self.answer("GET /metrics").await;
        let line =
            page.lines().find(|line| line.starts_with(name) && line.contains("changefeed=\"pair\""))?;
        line.rsplit(' ').next()?.parse().ok()
    }

    /// Waits until a metric is as it should be.
    async fn until(&self, name: &str, is: impl Fn(f64) -> bool) -> f64 {
        let deadline = Instant::now() + Duration::from_secs(90);
        loop {
            let value = self.metric(name).await;
            if let Some(value) = value.filter(|value| is(*value)) {
                return value;
            }
            assert!(Instant::now() < deadline, "{name} is {value:?}\n{}", self.server.log_tail(40));
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Changes rows at the source until it is told to stop, and counts the transactions.
    fn load(&self, stop: &Arc<AtomicBool>, count: &Arc<AtomicU64>) -> tokio::task::JoinHandle<()> {
        let (uri, stop, done) = (self.source.uri("here"), Arc::clone(stop), Arc::clone(count));
        tokio::spawn(async move {
            let (client, connection) = tokio_postgres::connect(&uri, tokio_postgres::NoTls).await.unwrap();
            tokio::spawn(connection);
            let mut count = 0_u64;
            let mut pace = tokio::time::interval(Duration::from_millis(10));
            while !stop.load(Ordering::Relaxed) {
                let (n, new) = (count * 37 % 20_000 + 1, 100_000 + count);
                let text = format!(
                    "BEGIN; UPDATE accounts SET amount = amount + 1 WHERE id IN ({n}, {n} + 1);
                     INSERT INTO accounts VALUES ({new}, 'new', 0); DELETE FROM accounts WHERE id = {new} - 30;
                     UPDATE named SET v = v + 1 WHERE name = 'Ä{}';
                     INSERT INTO lines VALUES ({new}, 'new'); DELETE FROM lines WHERE a = {new} - 10; COMMIT",
                    count % 1000
                );
                client.batch_execute(&text).await.unwrap();
                count += 1;
                done.store(count, Ordering::Relaxed);
                pace.tick().await;
            }
        })
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_ends_are_compared_while_rows_flow_and_what_was_spoiled_is_found() {
    let world = World::start().await;
    let stop = Arc::new(AtomicBool::new(false));
    let count = Arc::new(AtomicU64::new(0));
    let load = world.load(&stop, &count);
    // Again and again, until enough was changed meanwhile.
    let deadline = Instant::now() + Duration::from_secs(60);
    while count.load(Ordering::Relaxed) < 50 {
        let equal = world.verify(&["--json"]).await;
        assert_eq!(equal.status.code(), Some(0), "{}{}", text(&equal.stdout), text(&equal.stderr));
        let result: Value = serde_json::from_slice(&equal.stdout).unwrap();
        assert_eq!(result["report"]["outcome"], "equal", "{result}");
        assert_eq!(result["report"]["tables"].as_array().unwrap().len(), 3, "{result}");
        assert!(Instant::now() < deadline, "the load goes on");
    }
    let spoil = "UPDATE accounts SET amount = -1 WHERE id = 29000; DELETE FROM accounts WHERE id = 29001;
        INSERT INTO accounts VALUES (-3, 'nobody', 1); UPDATE named SET v = -1 WHERE name = 'Ä1999';
        DELETE FROM lines WHERE ctid = (SELECT min(ctid) FROM lines WHERE a = 7);";
    world.target.sql("there", spoil).await.unwrap();
    let different = world.verify(&[]).await;
    let said = text(&different.stdout);
    assert_eq!(different.status.code(), Some(3), "{said}{}", text(&different.stderr));
    for line in [
        "id = 29000: other values",
        "id = 29001: missing in the target",
        "id = -3: only in the target",
        "name = Ä1999: other values",
        "hash = ",
    ] {
        assert!(said.contains(line), "{line}: {said}");
    }
    assert!(text(&different.stderr).contains("not equal"), "{}", text(&different.stderr));
    let result = world.server.api().get("/api/v2/changefeeds/pair/verify").await.unwrap();
    let differences: Vec<u64> = result["report"]["tables"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|table| table["differences"].as_u64())
        .collect();
    assert_eq!(differences.iter().sum::<u64>(), 5, "{result}");
    // One table, and slowly: 2,000 rows take two seconds at least.
    let began = Instant::now();
    let one = world.verify(&["--table", "public.named", "--rows-per-second", "1000"]).await;
    assert!(began.elapsed() >= Duration::from_secs(2), "it took {:?}", began.elapsed());
    assert_eq!(one.status.code(), Some(3));
    assert!(!text(&one.stdout).contains("accounts"), "{}", text(&one.stdout));
    stop.store(true, Ordering::Relaxed);
    load.await.unwrap();
    let log = std::fs::read_to_string(world.server.log_path()).unwrap();
    assert!(
        log.contains("both ends are not equal") && !log.contains("nobody") && !log.contains("29000"),
        "{log}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_could_not_be_decided_has_an_exit_code_of_its_own() {
    let world = World::start().await;
    let equal = world.verify(&[]).await;
    assert_eq!(equal.status.code(), Some(0), "{}{}", text(&equal.stdout), text(&equal.stderr));
    // Somebody renames a column of the target while the table is compared: several seconds, a part each.
    let compared = world.verify(&["--table", "public.accounts", "--rows-per-second", "5000"]);
    let renamed = async {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let state = world.server.api().get("/api/v2/changefeeds/pair/verify").await.unwrap();
            if state["ended"].is_null() && state["report"]["tables"][0]["parts"].as_u64() >= Some(1) {
                break;
            }
            assert!(Instant::now() < deadline, "{state}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        world.target.sql("there", "ALTER TABLE accounts RENAME amount TO sum").await.unwrap();
    };
    let (undecided, ()) = tokio::join!(compared, renamed);
    let (said, why) = (text(&undecided.stdout), text(&undecided.stderr));
    assert_eq!(undecided.status.code(), Some(4), "{said}{why}");
    assert!(said.contains("UNDECIDED") && said.contains("its shape was changed"), "{said}");
    assert!(why.contains("not everything could be compared"), "{why}");
    // Seen from its beginning, that is a difference: the target lacks a column.
    let different = world.verify(&["--table", "public.accounts"]).await;
    assert_eq!(different.status.code(), Some(3), "{}", text(&different.stdout));
    assert!(
        text(&different.stdout).contains("the target has no column amount"),
        "{}",
        text(&different.stdout)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_an_interval_both_ends_are_compared_again_and_again_and_metrics_tell_what_differs() {
    let config =
        json!({ "force_replicate": true, "verify": { "interval": "10s", "rows_per_second": 1_000_000 } });
    let world = World::start_with(&config).await;
    let equal = world.until("ticdc_verify_equal_timestamp_seconds", |at| at > 0.0).await;
    assert_eq!(world.metric("ticdc_verify_different_rows").await, Some(0.0));
    assert_eq!(world.metric("ticdc_verify_undecided_rows").await, Some(0.0));
    world.target.sql("there", "DELETE FROM accounts WHERE id <= 3").await.unwrap();
    world.until("ticdc_verify_different_rows", |rows| rows == 3.0).await;
    assert!(world.metric("ticdc_verify_ended_timestamp_seconds").await > Some(equal));
    // A mended target is found to be equal.
    world
        .target
        .sql("there", "INSERT INTO accounts SELECT n, 'owner ' || n, n FROM generate_series(1, 3) n")
        .await
        .unwrap();
    world.until("ticdc_verify_different_rows", |rows| rows == 0.0).await;
    world.until("ticdc_verify_equal_timestamp_seconds", |at| at > equal).await;
    // Without the changefeed there is nothing to tell.
    let removed = world.answer("DELETE /api/v2/changefeeds/pair").await;
    assert!(removed.starts_with("HTTP/1.1 200"), "{removed}");
    let deadline = Instant::now() + Duration::from_secs(30);
    while world.metric("ticdc_verify_different_rows").await.is_some() {
        assert!(Instant::now() < deadline, "the series stays");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_compared_is_refused_in_words() {
    let world = World::start().await;
    let api = world.server.api();
    let url = "/api/v2/changefeeds/pair/verify";
    for (body, words) in [
        (json!({ "tables": ["public.none"] }), "replicates no table"),
        (json!({ "rows_per_second": 0 }), "at least 1"),
        (json!({ "part_rows": 0 }), "between 1 and"),
        (json!({ "speed": 1 }), "speed"),
        (json!({ "tables": "public.accounts" }), "tables"),
    ] {
        let error = format!("{:#}", api.post(url, &body).await.unwrap_err());
        assert!(error.contains(words), "{words}: {error}");
    }
    let error = format!("{:#}", api.get(url).await.unwrap_err());
    assert!(error.contains("nobody has compared"), "{error}");
    let error = format!("{:#}", api.post("/api/v2/changefeeds/other/verify", &json!({})).await.unwrap_err());
    assert!(error.contains("other"), "{error}");
    api.create("nowhere", &world.source.uri("here"), "blackhole://", &json!({ "force_replicate": true }))
        .await
        .unwrap();
    let error =
        format!("{:#}", api.post("/api/v2/changefeeds/nowhere/verify", &json!({})).await.unwrap_err());
    assert!(error.contains("the downstream is something else"), "{error}");
    let wished = json!({ "verify": { "interval": "1h" } });
    let error = api.create("files", &world.source.uri("here"), "blackhole://", &wished).await.unwrap_err();
    assert!(format!("{error:#}").contains("verify.interval"), "{error:#}");
    let unknown = world.verify(&["--table", "public.none"]).await;
    assert_eq!(unknown.status.code(), Some(1), "{}", text(&unknown.stderr));
}
