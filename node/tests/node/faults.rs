//! Faults around a whole node: servers that go away, a process that is killed, tables that change, slots that
//! are dropped, targets that refuse. After each of them both ends are equal.

mod process;
mod source;
mod target;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use node::Node;
use node::cli::Client;
use serde_json::{Value, json};
use testkit::{PgServer, StopMode, compare};
use tokio::task::JoinHandle;

use crate::common::{TARGET, caught_up, create, eventually, position, same, servers, start};

/// How long a server is away when nothing else is said: the first restart of a changefeed comes before its end.
const OUTAGE: Duration = Duration::from_secs(20);
/// A table with a key, and one without, in which a row that is written twice shows.
const SCHEMA: &str = "CREATE TABLE t (id bigint PRIMARY KEY, n bigint NOT NULL, v text); \
    CREATE TABLE log (at bigint, what text); ALTER TABLE log REPLICA IDENTITY FULL; \
    INSERT INTO t SELECT g, 0, 'v' || g FROM generate_series(1, 2000) g";
/// Between two transactions of the load.
const PACE: Duration = Duration::from_millis(5);

/// Changes both tables of the source until it is stopped, through outages of the server.
struct Writer {
    stop: Arc<AtomicBool>,
    committed: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Writer {
    fn start(server: &Arc<PgServer>) -> Self {
        let (stop, committed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let task = tokio::spawn(write(Arc::clone(server), Arc::clone(&stop), Arc::clone(&committed)));
        Self { stop, committed, task }
    }

    /// Waits until some more transactions were committed.
    async fn goes_on(&self) {
        let before = self.committed.load(Ordering::Relaxed);
        eventually("the load goes on", async || self.committed.load(Ordering::Relaxed) >= before + 50).await;
    }

    async fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.unwrap();
    }
}

async fn write(server: Arc<PgServer>, stop: Arc<AtomicBool>, committed: Arc<AtomicU64>) {
    let mut connection = None;
    let mut round = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        tokio::time::sleep(PACE).await;
        round += 1;
        let client = match connection.take() {
            Some(client) => client,
            None => match server.client("postgres").await {
                Ok(client) => client,
                Err(_) => continue,
            },
        };
        let (new, old) = (1_000_000 + round, 1_000_000 + round.saturating_sub(50));
        let sql = format!(
            "BEGIN; INSERT INTO t VALUES ({new}, 0, 'new'); UPDATE t SET n = n + 1 WHERE id % 97 = {}; \
             DELETE FROM t WHERE id = {old}; INSERT INTO log VALUES ({kind}, 'same'), ({kind}, 'same'); COMMIT",
            round % 97,
            kind = round % 10
        );
        // A transaction that broke off may have been committed or not: the ends are compared, not the counts.
        if client.batch_execute(&sql).await.is_ok() {
            committed.fetch_add(1, Ordering::Relaxed);
            connection = Some(client);
        }
    }
}

/// A changefeed `f` between two servers.
struct Rig {
    source: Arc<PgServer>,
    target: PgServer,
    node: Node,
    client: Client,
    _dir: tempfile::TempDir,
}

impl Rig {
    async fn start() -> Self {
        let (source, target) = servers().await;
        source.sql("postgres", SCHEMA).await.unwrap();
        let dir = tempfile::tempdir().unwrap();
        let (node, client) = start(dir.path()).await;
        create(&client, &source, &target.uri(TARGET), json!({ "force_replicate": true })).await.unwrap();
        same(&source, &target, "t").await;
        Self { source: Arc::new(source), target, node, client, _dir: dir }
    }

    async fn becomes(&self, state: &str) -> Value {
        becomes(&self.client, "f", state).await
    }

    /// Ends the load; the changefeed gets well by itself and loses nothing.
    async fn recovers(self, writer: Writer) {
        self.becomes("normal").await;
        writer.goes_on().await;
        writer.stop().await;
        caught_up(&self.client, &self.source).await;
        let (up, down) =
            tokio::try_join!(self.source.client("postgres"), self.target.client(TARGET)).unwrap();
        let comparison = compare(&up, &down, &["t", "log"]).await.unwrap();
        assert!(comparison.equal(), "{comparison}");
        self.becomes("normal").await;
        self.node.stop().await.unwrap();
    }
}

async fn feed(client: &Client, name: &str) -> Value {
    client.get(&format!("/api/v2/changefeeds/{name}")).await.unwrap()
}

/// Waits for a state of a changefeed, and answers the changefeed.
async fn becomes(client: &Client, name: &str, state: &str) -> Value {
    becomes_one_of(client, name, &[state]).await
}

async fn becomes_one_of(client: &Client, name: &str, states: &[&str]) -> Value {
    let mut last = Value::Null;
    eventually(&format!("{name} becomes {states:?}"), async || {
        last = feed(client, name).await;
        states.iter().any(|state| last["state"] == *state)
    })
    .await;
    last
}

/// An error says what happened and where, and keeps the password to itself.
fn assert_error(feed: &Value, code: &str, words: &[&str]) {
    let error = &feed["error"];
    assert_eq!(error["code"], code, "{error}");
    let message = error["message"].as_str().unwrap();
    for word in words {
        assert!(message.contains(word), "{word:?} is not in {message:?}");
    }
    for secret in ["pass of", "pass%20of"] {
        assert!(!feed.to_string().contains(secret), "{feed}");
    }
}

/// The outage of a run: `MILLRACE_TEST_OUTAGE_SECONDS` makes it longer.
fn outage() -> Duration {
    let seconds = std::env::var("MILLRACE_TEST_OUTAGE_SECONDS").ok();
    seconds.map_or(OUTAGE, |text| Duration::from_secs(text.parse().unwrap()))
}

/// Lets an outage last.
async fn lasts(began: Instant, outage: Duration) {
    tokio::time::sleep_until((began + outage).into()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_is_down_for_a_while_is_waited_for_and_nothing_is_lost_or_doubled() {
    let rig = Rig::start().await;
    let writer = Writer::start(&rig.source);
    writer.goes_on().await;
    rig.target.stop(StopMode::Immediate).await.unwrap();
    let began = Instant::now();
    let warned = rig.becomes("warning").await;
    assert_error(&warned, "CDC:ErrSinkUnavailable", &["downstream database", &rig.target.port().to_string()]);
    lasts(began, outage()).await;
    rig.target.resume().await.unwrap();
    rig.recovers(writer).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_is_restarted_under_load_is_followed_from_where_it_was() {
    let rig = Rig::start().await;
    let writer = Writer::start(&rig.source);
    for mode in [StopMode::Fast, StopMode::Immediate] {
        writer.goes_on().await;
        rig.source.restart(mode).await.unwrap();
        let end = position(&rig.source.client("postgres").await.unwrap()).await;
        writer.goes_on().await;
        eventually("the checkpoint passes the restart", async || {
            feed(&rig.client, "f").await["checkpoint_ts"].as_u64().unwrap() > end
        })
        .await;
    }
    rig.recovers(writer).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_stays_away_is_told_by_the_state_and_followed_again_when_it_is_back() {
    let rig = Rig::start().await;
    let writer = Writer::start(&rig.source);
    writer.goes_on().await;
    rig.source.stop(StopMode::Immediate).await.unwrap();
    let began = Instant::now();
    let warned = rig.becomes("warning").await;
    let address = format!("127.0.0.1:{}", rig.source.port());
    assert_error(&warned, "CDC:ErrUpstreamUnreachable", &["upstream", &address]);
    lasts(began, outage()).await;
    rig.source.resume().await.unwrap();
    rig.recovers(writer).await;
}
