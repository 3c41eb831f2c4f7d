//! What the tests of a whole node share.

use std::time::{Duration, Instant};

use node::Node;
use node::cli::{ApiError, Client};
use node::config::ServerConfig;
use serde_json::{Value, json};
use testkit::{Millrace, PgServer};

/// How long a state may take to come: the machines that run this are busy.
const PATIENCE: Duration = Duration::from_secs(90);

/// Database of the target. The servers are copies of one template, so that only the name tells them apart.
pub(crate) const TARGET: &str = "target";

/// Waits for a state; fails with its name.
pub(crate) async fn eventually(what: &str, mut probe: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !probe().await {
        assert!(Instant::now() < deadline, "never came true: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A node on a free port with its data in `dir`, ready, and a client of its API.
pub(crate) async fn start(dir: &std::path::Path) -> (Node, Client) {
    let config =
        ServerConfig { addr: "127.0.0.1:0".to_owned(), data_dir: dir.to_owned(), ..ServerConfig::default() };
    if let Ok(log_level) = std::env::var("MILLRACE_TEST_LOG") {
        node::telemetry::init_logging(&ServerConfig { log_level, ..config.clone() }).unwrap();
    }
    let node = Node::start(config).await.unwrap();
    let client = Client::new(&format!("http://{}", node.address())).unwrap();
    eventually("the node is ready", async || client.get("/api/v2/health").await.is_ok()).await;
    (node, client)
}

/// Number and content of a table's rows.
pub(crate) async fn content(server: &PgServer, database: &str, table: &str) -> Option<String> {
    let client = server.client(database).await.unwrap();
    let query = format!(
        "SELECT count(*) || ' ' || coalesce(md5(string_agg(t::text, '|' ORDER BY t::text)), '') FROM {table} t"
    );
    client.query_one(&query, &[]).await.ok().map(|row| row.get(0))
}

/// Compares a table of the source's database `postgres` with the target's at once, without a second look.
pub(crate) async fn assert_same(source: &PgServer, target: &PgServer, table: &str, when: &str) {
    let want = content(source, "postgres", table).await;
    let have = content(target, TARGET, table).await;
    assert!(want.is_some() && have == want, "{table}, {when}: {want:?} became {have:?}");
}

/// Waits until a table of the source's database `postgres` is the same in the target's [`TARGET`].
pub(crate) async fn same(source: &PgServer, target: &PgServer, table: &str) {
    eventually(table, async || {
        let want = content(source, "postgres", table).await;
        want.is_some() && content(target, TARGET, table).await == want
    })
    .await;
}

/// A source and a target, whose database [`TARGET`] is empty.
pub(crate) async fn servers() -> (PgServer, PgServer) {
    let (source, target) = tokio::try_join!(PgServer::start(), PgServer::start()).unwrap();
    target.sql("postgres", &format!("CREATE DATABASE {TARGET}")).await.unwrap();
    (source, target)
}

/// Creates the changefeed `f` from the source's database `postgres`.
pub(crate) async fn create(
    client: &Client,
    source: &PgServer,
    sink_uri: &str,
    config: Value,
) -> Result<Value, ApiError> {
    let upstream = json!({ "uri": source.uri("postgres") });
    let body =
        json!({ "changefeed_id": "f", "sink_uri": sink_uri, "upstream": upstream, "replica_config": config });
    client.post("/api/v2/changefeeds", &body).await
}

/// End of the source's log: every transaction that was committed before the call is at or before it.
pub(crate) async fn position(source: &tokio_postgres::Client) -> u64 {
    let row = source.query_one("SELECT (pg_current_wal_flush_lsn() - '0/0')::bigint", &[]).await.unwrap();
    u64::try_from(row.get::<_, i64>(0)).unwrap()
}

/// Checkpoint of the changefeed `f`, which must not have failed.
pub(crate) async fn checkpoint(client: &Client) -> u64 {
    let feed = client.get("/api/v2/changefeeds/f").await.unwrap();
    assert_ne!(feed["state"], "failed", "{}", feed["error"]);
    feed["checkpoint_ts"].as_u64().unwrap()
}

/// Waits until everything that the source has committed by now is at the target. While the initial copy runs,
/// the checkpoint stands at the start position, which may already be the end of the source's log.
pub(crate) async fn caught_up(client: &Client, source: &PgServer) {
    let end = position(&source.client("postgres").await.unwrap()).await;
    let feed = client.get("/api/v2/changefeeds/f").await.unwrap();
    let copies = feed["config"]["initial_copy"]["enabled"] == true;
    let least = end.max(feed["start_ts"].as_u64().unwrap() + u64::from(copies));
    eventually("the checkpoint reaches the source's position", async || checkpoint(client).await >= least)
        .await;
}

/// The same for a node that is a process of its own, and for a changefeed that copies. A process that is being started
/// again may not know of it yet.
pub(crate) async fn process_caught_up(millrace: &Millrace, source: &PgServer) {
    let (api, end) = (millrace.api(), position(&source.client("postgres").await.unwrap()).await);
    eventually("everything is at the target", async || {
        let feed = api.get("/api/v2/changefeeds/f").await.unwrap_or(Value::Null);
        assert_ne!(feed["state"], "failed", "{}\n{}", feed["error"], millrace.log_tail(30));
        let (at, start) = (feed["checkpoint_ts"].as_u64(), feed["start_ts"].as_u64());
        at > start && at >= Some(end)
    })
    .await;
}

/// State of the changefeed `f`, empty where there is none.
pub(crate) async fn state(client: &Client) -> String {
    let feed = client.get("/api/v2/changefeeds/f").await.unwrap_or(Value::Null);
    feed["state"].as_str().unwrap_or_default().to_owned()
}
