//! Tables that are copied again while they and the others change.

use std::path::Path;
use std::time::{Duration, Instant};

use node::cli::Client;
use serde_json::{Value, json};
use testkit::{Load, Millrace, PgServer, compare, load};

use crate::common::{TARGET, assert_same, caught_up, create, eventually, position, servers, start};

/// Rows of the tables that the load changes.
const ROWS: u64 = 8_000;
const PATIENCE: Duration = Duration::from_secs(300);

pub(crate) async fn resyncs(client: &Client) -> Vec<Value> {
    let list = client.get("/api/v2/changefeeds/f/resyncs").await.unwrap();
    list["items"].as_array().unwrap().clone()
}

pub(crate) async fn resync(client: &Client, table: &str) -> Value {
    // While the log is not read, nobody tells.
    let list = client.get("/api/v2/changefeeds/f/resyncs").await.unwrap_or_default();
    let mut all = list["items"].as_array().into_iter().flatten();
    all.find(|one| one["table"] == table).cloned().unwrap_or(Value::Null)
}

pub(crate) async fn ask(client: &Client, what: &str, table: &str) -> Result<Value, node::cli::ApiError> {
    client.post(&format!("/api/v2/changefeeds/f/{what}"), &json!({ "table": table })).await
}

pub(crate) async fn until_done(client: &Client, table: &str) -> Value {
    let mut last = Value::Null;
    eventually("the table is copied again", async || {
        last = resync(client, table).await;
        assert_ne!(last["state"], "failed", "{last}");
        last["state"] == "done"
    })
    .await;
    last
}

pub(crate) async fn assert_equal(source: &PgServer, target: &PgServer, more: &[&str]) {
    let (from, to) = (source.client("postgres").await.unwrap(), target.client(TARGET).await.unwrap());
    let mut tables = load::TABLES.to_vec();
    tables.extend(more);
    let comparison = compare(&from, &to, &tables).await.unwrap();
    assert!(comparison.equal(), "{comparison}");
}

pub(crate) async fn number(server: &PgServer, database: &str, sql: &str) -> i64 {
    server.client(database).await.unwrap().query_one(sql, &[]).await.unwrap().get(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_table_is_copied_again_while_it_and_the_others_change() {
    let (source, target) = servers().await;
    load::prepare(&source.client("postgres").await.unwrap(), ROWS).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (node, client) = start(dir.path()).await;
    create(&client, &source, &target.uri(TARGET), json!({ "force_replicate": true })).await.unwrap();
    caught_up(&client, &source).await;
    let work = Load::start(&source, "postgres", 9, 3, 100, ROWS).await.unwrap();
    // With a key, without one, and with a name and values that are hard to write.
    for (name, damage) in [
        ("shop.documents", "UPDATE shop.documents SET title = 'damaged'"),
        (
            "shop.events",
            "DELETE FROM shop.events WHERE ctid IN (SELECT ctid FROM shop.events LIMIT 300); \
             INSERT INTO shop.events SELECT * FROM shop.events LIMIT 50",
        ),
        (
            "Odd Schema.Weird \"Table",
            "DELETE FROM \"Odd Schema\".\"Weird \"\"Table\" WHERE \"Key A\" % 2 = 0; \
             INSERT INTO \"Odd Schema\".\"Weird \"\"Table\" VALUES (-1, 'nobody''s', '', '')",
        ),
    ] {
        target.sql(TARGET, damage).await.unwrap();
        let asked = ask(&client, "resync_table", name).await.unwrap();
        assert_eq!(asked["table"], name, "{asked}");
        let done = until_done(&client, name).await;
        assert!(done["rows"].as_u64().unwrap() > 0 && done["ended"].is_string(), "{done}");
        assert_eq!(done["table_id"], asked["table_id"]);
    }
    work.stop().await.unwrap();
    caught_up(&client, &source).await;
    assert_equal(&source, &target, &[]).await;
    let names: Vec<Value> = resyncs(&client).await.iter().map(|one| one["table"].clone()).collect();
    assert_eq!(names, ["shop.documents", "shop.events", "Odd Schema.Weird \"Table"], "oldest first");

    // Again, which forgets the first time; and by id.
    let id = resync(&client, "shop.events").await["table_id"].as_i64().unwrap();
    client.post(&format!("/api/v2/changefeeds/f/resync_table?tableID={id}"), &json!({})).await.unwrap();
    until_done(&client, "shop.events").await;
    assert_equal(&source, &target, &[]).await;
    node.stop().await.unwrap();
}

/// Keeps a copy from ending: somebody has a row of the table at the target.
pub(crate) struct Blocked {
    client: tokio_postgres::Client,
}

impl Blocked {
    pub(crate) async fn new(target: &PgServer, table: &str) -> Self {
        let client = target.client(TARGET).await.unwrap();
        client.batch_execute(&format!("BEGIN; SELECT FROM {table} LIMIT 1 FOR UPDATE")).await.unwrap();
        Self { client }
    }

    pub(crate) async fn end(self) {
        self.client.batch_execute("ROLLBACK").await.unwrap();
    }
}

/// Whether the sink is about to remove the rows of the table.
pub(crate) async fn removes_rows(target: &PgServer) -> bool {
    let sql =
        "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'DELETE FROM %' AND wait_event_type = 'Lock'";
    number(target, TARGET, sql).await > 0
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_other_tables_go_on_while_one_is_copied_and_readers_see_it_as_it_was() {
    let (source, target) = servers().await;
    let tables = "CREATE TABLE a (id int PRIMARY KEY, v text); INSERT INTO a SELECT i, 'old' FROM generate_series(1, 1000) i; \
                  CREATE TABLE b (id int PRIMARY KEY, v text); INSERT INTO b VALUES (0, 'first')";
    source.sql("postgres", tables).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (node, client) = start(dir.path()).await;
    create(&client, &source, &target.uri(TARGET), json!({})).await.unwrap();
    caught_up(&client, &source).await;
    target
        .sql(TARGET, "DELETE FROM a WHERE id > 500; UPDATE a SET v = 'damaged' WHERE id = 2")
        .await
        .unwrap();
    let blocked = Blocked::new(&target, "a").await;
    ask(&client, "resync_table", "public.a").await.unwrap();
    eventually("the copy has begun", async || removes_rows(&target).await).await;
    let shown = resync(&client, "public.a").await;
    assert_eq!(shown["state"], "copying", "{shown}");
    let progress = client.get("/api/v2/changefeeds/f/progress").await.unwrap();
    assert_eq!(progress["resync"]["table_id"], shown["table_id"], "{progress}");

    // Changes of both tables; those of the other one arrive.
    source
        .sql("postgres", "UPDATE a SET v = 'new' WHERE id <= 10; DELETE FROM a WHERE id = 1000; INSERT INTO b VALUES (1, 'second')")
        .await
        .unwrap();
    eventually("a row of the other table arrives", async || {
        number(&target, TARGET, "SELECT count(*) FROM b").await == 2
    })
    .await;
    assert_eq!(number(&target, TARGET, "SELECT count(*) FROM a WHERE v = 'damaged' OR id > 500").await, 1);
    let end = position(&source.client("postgres").await.unwrap()).await;
    let checkpoint = async || {
        let feed = client.get("/api/v2/changefeeds/f").await.unwrap();
        feed["checkpoint_ts"].as_u64().unwrap()
    };
    assert!(checkpoint().await < end, "changes of the table are not at the target");

    let again = ask(&client, "resync_table", "public.a").await.unwrap_err();
    assert_eq!(again.code(), "CDC:ErrSchedulerRequestFailed", "{again}");
    assert!(again.to_string().contains("already"), "{again}");
    blocked.end().await;
    until_done(&client, "public.a").await;
    caught_up(&client, &source).await;
    for table in ["a", "b"] {
        assert_same(&source, &target, table, "copied again").await;
    }
    node.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_rests_goes_on_and_is_withdrawn_when_told_so() {
    let (source, target) = servers().await;
    let tables = "CREATE TABLE a (id int PRIMARY KEY, v text); INSERT INTO a SELECT i, 'old' FROM generate_series(1, 1000) i";
    source.sql("postgres", tables).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (node, client) = start(dir.path()).await;
    create(&client, &source, &target.uri(TARGET), json!({})).await.unwrap();
    caught_up(&client, &source).await;
    target.sql(TARGET, "DELETE FROM a WHERE id > 500").await.unwrap();
    let blocked = Blocked::new(&target, "a").await;
    ask(&client, "resync_table", "public.a").await.unwrap();
    eventually("the copy has begun", async || removes_rows(&target).await).await;
    let paused = ask(&client, "pause_resync", "public.a").await.unwrap();
    assert!(paused["state"] == "paused", "{paused}");
    // It lets go of the table although nothing else does, and changes arrive.
    eventually("the copy has ended", async || !removes_rows(&target).await).await;
    blocked.end().await;
    source.sql("postgres", "INSERT INTO a VALUES (2000, 'new')").await.unwrap();
    caught_up(&client, &source).await;
    assert_eq!(number(&target, TARGET, "SELECT count(*) FROM a").await, 501, "as it was, and the new row");
    assert_eq!(resync(&client, "public.a").await["state"], "paused");
    for (what, table) in
        [("pause_resync", "public.a"), ("resume_resync", "public.b"), ("resync_table", "public.a")]
    {
        let refused = ask(&client, what, table).await.unwrap_err();
        assert!(
            matches!(refused.code(), "CDC:ErrSchedulerRequestFailed" | "CDC:ErrAPIInvalidParam"),
            "{refused}"
        );
    }
    ask(&client, "resume_resync", "public.a").await.unwrap();
    until_done(&client, "public.a").await;
    assert_same(&source, &target, "a", "copied again").await;

    target.sql(TARGET, "DELETE FROM a WHERE id > 500").await.unwrap();
    let blocked = Blocked::new(&target, "a").await;
    ask(&client, "resync_table", "public.a").await.unwrap();
    eventually("the copy has begun", async || removes_rows(&target).await).await;
    ask(&client, "cancel_resync", "public.a").await.unwrap();
    eventually("the copy has ended", async || !removes_rows(&target).await).await;
    blocked.end().await;
    assert_eq!(resyncs(&client).await, Vec::<Value>::new());
    assert_eq!(number(&target, TARGET, "SELECT count(*) FROM a").await, 500, "as it was");
    node.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_copied_again_is_refused_with_what_to_do() {
    let (source, target) = servers().await;
    let tables = "CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE hidden (id int PRIMARY KEY)";
    source.sql("postgres", tables).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (node, client) = start(dir.path()).await;
    let filter = json!({ "filter": { "rules": ["*.*", "!*.hidden"] } });
    create(&client, &source, &target.uri(TARGET), filter.clone()).await.unwrap();
    caught_up(&client, &source).await;
    let refused = async |table: &str| ask(&client, "resync_table", table).await.unwrap_err();
    for table in ["public.hidden", "a", "public.A", "1"] {
        let error = refused(table).await;
        assert_eq!(error.code(), "CDC:ErrAPIInvalidParam", "{error}");
        assert!(error.to_string().contains("filter"), "{error}");
    }
    assert_eq!(refused("").await.code(), "CDC:ErrAPIInvalidParam");
    client.post("/api/v2/changefeeds/f/pause", &json!({})).await.unwrap();
    let error = refused("public.a").await;
    assert!(error.to_string().contains("resume the changefeed first"), "{error}");
    client.delete("/api/v2/changefeeds/f").await.unwrap();

    let uri = format!("{}?on-existing-rows=append", target.uri(TARGET));
    create(&client, &source, &uri, filter).await.unwrap();
    caught_up(&client, &source).await;
    let error = refused("public.a").await;
    assert!(error.to_string().contains("on-existing-rows=append"), "{error}");
    node.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_whose_process_is_killed_begins_anew_by_itself_and_half_a_table_is_never_seen() {
    let (source, target) = servers().await;
    load::prepare(&source.client("postgres").await.unwrap(), ROWS).await.unwrap();
    source
        .sql(
            "postgres",
            "CREATE TABLE wide (id int PRIMARY KEY, v text); \
             INSERT INTO wide SELECT i, repeat(md5(i::text), 8) FROM generate_series(1, 40000) i",
        )
        .await
        .unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut millrace = Millrace::new(Path::new(env!("CARGO_BIN_EXE_millrace")), dir.path()).unwrap();
    millrace.start().await.unwrap();
    let api = millrace.api();
    let config = json!({ "force_replicate": true });
    let feed = api.create("f", &source.uri("postgres"), &target.uri(TARGET), &config).await.unwrap();
    let begin = feed["start_ts"].as_u64().unwrap();
    let is_past =
        async |position: u64| api.progress("f").await.is_ok_and(|progress| progress.checkpoint > position);
    eventually("the initial copy is complete", async || is_past(begin).await).await;
    target.sql(TARGET, "DELETE FROM wide WHERE id % 2 = 0").await.unwrap();
    let work = Load::start(&source, "postgres", 11, 2, 60, ROWS).await.unwrap();
    // Whatever is seen of the table is what it was, or all of it.
    let seen = async || number(&target, TARGET, "SELECT count(*) FROM wide").await;
    let changes = source.client("postgres").await.unwrap();

    let blocked = Blocked::new(&target, "wide").await;
    let asked = json!({ "table": "public.wide" });
    api.post("/api/v2/changefeeds/f/resync_table", &asked).await.unwrap();
    eventually("the copy has begun", async || removes_rows(&target).await).await;
    millrace.kill().unwrap();
    // Rows that the target has: an update of one that it lacks would bring it back, copy or not.
    changes
        .batch_execute("UPDATE wide SET v = 'while nobody was there' WHERE id <= 100 AND id % 2 = 1")
        .await
        .unwrap();
    assert_eq!(seen().await, 20_000);
    blocked.end().await;
    // Killed again and again, wherever that is.
    for round in 0..4 {
        millrace.start().await.unwrap();
        let rows = seen().await;
        assert!(rows == 20_000 || rows == 40_000, "{rows} rows");
        let own = 2 * round + 1;
        changes.execute("UPDATE wide SET v = v || '!' WHERE id % 1000 = $1", &[&own]).await.unwrap();
        tokio::time::sleep(Duration::from_millis(150 * u64::try_from(round).unwrap())).await;
        millrace.kill().unwrap();
        let rows = seen().await;
        assert!(rows == 20_000 || rows == 40_000, "{rows} rows");
    }
    millrace.start().await.unwrap();
    let done = async || {
        let list = api.get("/api/v2/changefeeds/f/resyncs").await.unwrap_or_default();
        assert_ne!(list["items"][0]["state"], "failed", "{list}");
        list["items"][0]["state"] == "done"
    };
    eventually("the request is answered", done).await;
    assert_eq!(seen().await, 40_000);
    work.stop().await.unwrap();
    let end = position(&source.client("postgres").await.unwrap()).await;
    let deadline = Instant::now() + PATIENCE;
    while !is_past(end - 1).await {
        assert!(Instant::now() < deadline, "not everything comes downstream: {}", millrace.log_tail(40));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_equal(&source, &target, &["wide"]).await;
    millrace.stop().await.unwrap();
}
