//! A node, a target database, and what both ends must hold.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use heartbeatpb::Ts;
use heartbeatpb::config::ReplicaConfig;
use logservice::upstream::generator::expected_state;
use serde_json::Value;
use testkit::{Api, Millrace, PgServer};

/// How long a state may take to come: the machines that run this are busy.
pub(crate) const PATIENCE: Duration = Duration::from_secs(90);
pub(crate) const TARGET: &str = "target";

pub(crate) type Rows = Vec<Vec<Option<String>>>;

/// What both ends must hold in the end, by table.
pub(crate) fn expected(uri: &str, at: Ts) -> BTreeMap<String, Rows> {
    let tables = expected_state(uri, at).unwrap();
    let named =
        |((schema, name), table): ((String, String), logservice::upstream::generator::ExpectedTable)| {
            let mut rows: Rows = table.rows.into_values().collect();
            rows.sort();
            (format!("{schema}.{name}"), rows)
        };
    tables.into_iter().map(named).collect()
}

/// Both are sorted.
pub(crate) fn assert_same(table: &str, found: &Rows, expected: &Rows) {
    let differs = found.iter().zip(expected).find(|(found, expected)| found != expected);
    assert!(differs.is_none(), "{table}: {differs:?}");
    assert_eq!(found.len(), expected.len(), "{table}");
}

pub(crate) async fn in_database(server: &PgServer, table: &str) -> Rows {
    let client = server.client(TARGET).await.unwrap();
    let sql = "SELECT string_agg(format('%I::text', attname), ', ' ORDER BY attnum) FROM pg_attribute \
               WHERE attrelid = $1::text::regclass AND attnum > 0 AND NOT attisdropped";
    let columns: String = client.query_one(sql, &[&table]).await.unwrap().get(0);
    let rows = client.query(&format!("SELECT {columns} FROM {table}"), &[]).await.unwrap();
    let mut rows: Rows = rows.iter().map(|row| (0..row.len()).map(|at| row.get(at)).collect()).collect();
    rows.sort();
    rows
}

pub(crate) async fn feed(api: &Api) -> Value {
    api.get("/api/v2/changefeeds/f").await.unwrap_or(Value::Null)
}

pub(crate) async fn until(what: &str, api: &Api, log: &Millrace, probe: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let feed = feed(api).await;
        if probe(&feed) {
            return feed;
        }
        if Instant::now() >= deadline {
            let status = api.get("/api/v2/changefeeds/f/status").await;
            let tables = api.get("/api/v2/changefeeds/f/tables").await;
            panic!("never came true: {what}: {feed}\n{status:?}\n{tables:?}\n{}", log.log_tail(40));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

pub(crate) fn checkpoint(feed: &Value) -> u64 {
    feed["checkpoint_ts"].as_u64().unwrap_or_default()
}

pub(crate) async fn server(dir: &Path) -> (Millrace, Api) {
    let mut millrace = Millrace::new(Path::new(env!("CARGO_BIN_EXE_millrace")), dir).unwrap();
    millrace.start().await.unwrap();
    let api = millrace.api();
    (millrace, api)
}

pub(crate) async fn target() -> PgServer {
    let server = PgServer::start().await.unwrap();
    server.sql("postgres", &format!("CREATE DATABASE {TARGET}")).await.unwrap();
    server
}

/// Waits until the files say that they are complete up to `end`.
pub(crate) async fn files_say(dir: &Path, end: Ts) {
    let said = dir.join("metadata");
    let deadline = Instant::now() + PATIENCE;
    let says_end = |text: Vec<u8>| {
        let said: Value = serde_json::from_slice(&text).unwrap_or_default();
        said["checkpoint-ts"].as_u64().is_some_and(|ts| ts >= end.0)
    };
    while !std::fs::read(&said).is_ok_and(says_end) {
        assert!(Instant::now() < deadline, "the files never say that they are complete");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The tables that files hold at `end`.
pub(crate) fn in_files(dir: &Path, to: &str, end: Ts) -> BTreeMap<String, Rows> {
    let mut replica = ReplicaConfig::default();
    replica.validate_and_adjust(to).unwrap();
    let config = sink::FileConfig::for_changefeed(to, &replica).unwrap();
    let replay = sink::replay(dir, &config.encode, Some(end)).unwrap();
    let table = |((schema, name), table): ((String, String), sink::ReplayedTable)| {
        let mut rows: Rows = table.rows.into_values().collect();
        rows.sort();
        (format!("{schema}.{name}"), rows)
    };
    replay.tables.into_iter().map(table).collect()
}
