//! Schema changes through a whole node: each is executed once, at its place between the rows.

#![expect(clippy::unwrap_used, reason = "a test fails where it cannot go on")]

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use heartbeatpb::Ts;
use heartbeatpb::config::ReplicaConfig;
use logservice::upstream::generator::expected_state;
use serde_json::{Value, json};
use testkit::{Api, Millrace, PgServer, Random};

/// How long a state may take to come: the machines that run this are busy.
const PATIENCE: Duration = Duration::from_secs(90);
const TARGET: &str = "target";
/// Transactions of a stream, and between two schema changes: the last one leaves the column there.
const TRANSACTIONS: u64 = 1990;
const DDL_EVERY: u64 = 50;
const DDLS: i64 = 39;
/// Notes each statement that changes a table; rows of it are what was really executed.
const NOTES: &str = "CREATE TABLE notes (at serial, what text); \
    CREATE FUNCTION note() RETURNS event_trigger LANGUAGE plpgsql SECURITY DEFINER AS \
    $$ BEGIN INSERT INTO public.notes (what) VALUES (tg_tag); END $$; \
    CREATE EVENT TRIGGER note ON ddl_command_end WHEN TAG IN ('ALTER TABLE') EXECUTE FUNCTION note(); \
    ALTER EVENT TRIGGER note ENABLE ALWAYS";

type Rows = Vec<Vec<Option<String>>>;

fn from(rate: u64) -> String {
    format!(
        "generator://bank?seed=3&rate={rate}&tables=2&accounts=50&transactions={TRANSACTIONS}&ddl-every={DDL_EVERY}"
    )
}

/// Behind the last transaction.
fn end() -> Ts {
    Ts((TRANSACTIONS + 1) * 16)
}

/// What both ends must hold in the end, by table.
fn expected(uri: &str) -> BTreeMap<String, Rows> {
    let tables = expected_state(uri, end()).unwrap();
    let named =
        |((schema, name), table): ((String, String), logservice::upstream::generator::ExpectedTable)| {
            let mut rows: Rows = table.rows.into_values().collect();
            rows.sort();
            (format!("{schema}.{name}"), rows)
        };
    tables.into_iter().map(named).collect()
}

/// Both are sorted.
fn assert_same(table: &str, found: &Rows, expected: &Rows) {
    let differs = found.iter().zip(expected).find(|(found, expected)| found != expected);
    assert!(differs.is_none(), "{table}: {differs:?}");
    assert_eq!(found.len(), expected.len(), "{table}");
}

async fn in_database(server: &PgServer, table: &str) -> Rows {
    let client = server.client(TARGET).await.unwrap();
    let sql = "SELECT string_agg(format('%I::text', attname), ', ' ORDER BY attnum) FROM pg_attribute \
               WHERE attrelid = $1::text::regclass AND attnum > 0 AND NOT attisdropped";
    let columns: String = client.query_one(sql, &[&table]).await.unwrap().get(0);
    let rows = client.query(&format!("SELECT {columns} FROM {table}"), &[]).await.unwrap();
    let mut rows: Rows = rows.iter().map(|row| (0..row.len()).map(|at| row.get(at)).collect()).collect();
    rows.sort();
    rows
}

async fn feed(api: &Api) -> Value {
    api.get("/api/v2/changefeeds/f").await.unwrap_or(Value::Null)
}

async fn until(what: &str, api: &Api, log: &Millrace, probe: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let feed = feed(api).await;
        if probe(&feed) {
            return feed;
        }
        assert!(Instant::now() < deadline, "never came true: {what}: {feed}\n{}", log.log_tail(40));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn checkpoint(feed: &Value) -> u64 {
    feed["checkpoint_ts"].as_u64().unwrap_or_default()
}

async fn server(dir: &Path) -> (Millrace, Api) {
    let mut millrace = Millrace::new(Path::new(env!("CARGO_BIN_EXE_millrace")), dir).unwrap();
    millrace.start().await.unwrap();
    let api = millrace.api();
    (millrace, api)
}

async fn target() -> PgServer {
    let server = PgServer::start().await.unwrap();
    server.sql("postgres", &format!("CREATE DATABASE {TARGET}")).await.unwrap();
    server
}

async fn check_database(target: &PgServer, uri: &str) {
    for (table, rows) in expected(uri) {
        let found = in_database(target, &table).await;
        assert_same(&table, &found, &rows);
    }
    let client = target.client(TARGET).await.unwrap();
    let notes: i64 = client.query_one("SELECT count(*) FROM notes", &[]).await.unwrap().get(0);
    assert_eq!(notes, DDLS, "every schema change was executed once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_of_a_table_are_executed_once_between_its_rows() {
    let target = target().await;
    target.sql(TARGET, NOTES).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (mut millrace, api) = server(dir.path()).await;
    let uri = from(0);
    api.create("f", &uri, &target.uri(TARGET), &json!({})).await.unwrap();
    until("the checkpoint reaches the end", &api, &millrace, |feed| checkpoint(feed) >= end().0).await;
    check_database(&target, &uri).await;
    millrace.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_is_killed_at_schema_changes_executes_none_twice() {
    let target = target().await;
    target.sql(TARGET, NOTES).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (mut millrace, api) = server(dir.path()).await;
    let uri = from(400);
    api.create("f", &uri, &target.uri(TARGET), &json!({})).await.unwrap();
    let mut random = Random::new(7, 0);
    let client = target.client(TARGET).await.unwrap();
    for round in 1..=4 {
        // Somewhere behind a few more changes: the checkpoint is behind what was executed.
        let wanted = round * 7;
        let deadline = Instant::now() + PATIENCE;
        while client.query_one("SELECT count(*) FROM notes", &[]).await.unwrap().get::<_, i64>(0) < wanted {
            assert!(Instant::now() < deadline, "stands still\n{}", millrace.log_tail(40));
            tokio::time::sleep(Duration::from_millis(random.between(1, 20))).await;
        }
        millrace.kill().unwrap();
        millrace.start().await.unwrap();
    }
    until("the checkpoint reaches the end", &api, &millrace, |feed| checkpoint(feed) >= end().0).await;
    check_database(&target, &uri).await;
    millrace.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_hold_every_shape_and_the_rows_of_each() {
    let (dir, files) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (mut millrace, api) = server(dir.path()).await;
    let (from, to) = (
        from(0),
        format!("file://{}?protocol=canal-json&enable-tidb-extension=true", files.path().display()),
    );
    api.create("f", &from, &to, &json!({})).await.unwrap();
    until("the checkpoint reaches the end", &api, &millrace, |feed| checkpoint(feed) >= end().0).await;
    // The files say it a little later.
    let said = files.path().join("metadata");
    let deadline = Instant::now() + PATIENCE;
    let says_end = |text: Vec<u8>| {
        let said: Value = serde_json::from_slice(&text).unwrap_or_default();
        said["checkpoint-ts"].as_u64().is_some_and(|ts| ts >= end().0)
    };
    while !std::fs::read(&said).is_ok_and(says_end) {
        assert!(Instant::now() < deadline, "the files never say that they are complete");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    millrace.stop().await.unwrap();
    let mut replica = ReplicaConfig::default();
    replica.validate_and_adjust(&to).unwrap();
    let config = sink::FileConfig::for_changefeed(&to, &replica).unwrap();
    let replay = sink::replay(files.path(), &config.encode, Some(end())).unwrap();
    for (table, rows) in expected(&from) {
        let (schema, name) = table.split_once('.').unwrap();
        let found = &replay.tables[&(schema.to_owned(), name.to_owned())];
        let mut found: Rows = found.rows.values().cloned().collect();
        found.sort();
        assert_same(&table, &found, &rows);
    }
    let shapes = std::fs::read_dir(files.path().join("bank/accounts_0/meta")).unwrap().count();
    assert!(shapes >= usize::try_from(DDLS).unwrap(), "{shapes} shapes");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_statement_that_the_target_refuses_stops_the_changefeed_and_names_itself() {
    let target = target().await;
    target
        .sql(
            TARGET,
            "CREATE FUNCTION refuse() RETURNS event_trigger LANGUAGE plpgsql AS \
             $$ BEGIN RAISE insufficient_privilege USING MESSAGE = 'no changes today'; END $$; \
             CREATE EVENT TRIGGER refuse ON ddl_command_start WHEN TAG IN ('ALTER TABLE') \
             EXECUTE FUNCTION refuse(); ALTER EVENT TRIGGER refuse ENABLE ALWAYS",
        )
        .await
        .unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (mut millrace, api) = server(dir.path()).await;
    api.create("f", &from(0), &target.uri(TARGET), &json!({})).await.unwrap();
    let feed = until("the refusal is told", &api, &millrace, |feed| {
        feed["error"]["code"].is_string() && feed["state"] != "normal"
    })
    .await;
    let message = feed["error"]["message"].as_str().unwrap();
    assert_eq!(feed["error"]["code"], "CDC:ErrSinkPermission", "{feed}");
    assert!(message.contains("an ALTER TABLE of"), "{message}");
    let first = (DDL_EVERY + 1) * 16 - 4;
    assert!(checkpoint(&feed) < first, "{feed}");
    target.sql(TARGET, "DROP EVENT TRIGGER refuse").await.unwrap();
    let _ = api.resume("f").await;
    until("the changefeed goes on", &api, &millrace, |feed| checkpoint(feed) >= end().0).await;
    millrace.stop().await.unwrap();
}
