//! The initial copy while the source changes, without it, and beginnings at a position.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use node::cli::Client;
use serde_json::{Value, json};
use testkit::{Load, PgServer, compare, load};

use crate::common::{
    TARGET, assert_same, caught_up, checkpoint, create, eventually, position, servers, start, state,
};

/// Often enough to see a copy grow.
const LOOK: Duration = Duration::from_millis(5);
const PATIENCE: Duration = Duration::from_secs(90);
/// Rows of the tables that the load changes.
const ROWS: u64 = 20_000;
/// Rows of the table that nobody changes.
const QUIET: i64 = 40_000;

async fn progress(client: &Client) -> Value {
    client.get("/api/v2/changefeeds/f/progress").await.unwrap()
}

/// The tables of the load, and one that stays as it is, so that every row of it that is written is a copy. It is
/// the largest and known to be, so it is copied first.
async fn prepare(source: &PgServer) {
    load::prepare(&source.client("postgres").await.unwrap(), ROWS).await.unwrap();
    let quiet = format!(
        "CREATE TABLE quiet (id int PRIMARY KEY, v text); \
         INSERT INTO quiet SELECT i, md5(i::text) FROM generate_series(1, {QUIET}) i; ANALYZE"
    );
    source.sql("postgres", &quiet).await.unwrap();
}

/// Lets the target note every row of the table that nobody changes, also those that are cleared later.
async fn watch_quiet(target: &PgServer) {
    let watch = "CREATE TABLE quiet (id int PRIMARY KEY, v text); CREATE TABLE seen (id int); \
                 CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS \
                 $$ BEGIN INSERT INTO public.seen VALUES (NEW.id); RETURN NEW; END $$; \
                 CREATE TRIGGER note AFTER INSERT ON quiet FOR EACH ROW EXECUTE FUNCTION note(); \
                 ALTER TABLE quiet ENABLE ALWAYS TRIGGER note";
    target.sql(TARGET, watch).await.unwrap();
}

/// How many rows were ever committed to that table.
async fn quiet_writes(target: &PgServer) -> i64 {
    let client = target.client(TARGET).await.unwrap();
    client.query_one("SELECT count(*) FROM seen", &[]).await.unwrap().get(0)
}

async fn assert_equal(source: &PgServer, target: &PgServer) {
    let (from, to) = (source.client("postgres").await.unwrap(), target.client(TARGET).await.unwrap());
    let mut tables = load::TABLES.to_vec();
    tables.push("quiet");
    let comparison = compare(&from, &to, &tables).await.unwrap();
    assert!(comparison.equal(), "{comparison}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_exist_are_copied_once_while_they_change() {
    let (source, target) = servers().await;
    prepare(&source).await;
    watch_quiet(&target).await;
    let dir = tempfile::tempdir().unwrap();
    let (node, client) = start(dir.path()).await;
    let work = Load::start(&source, "postgres", 7, 3, 150, ROWS).await.unwrap();
    let config = json!({ "force_replicate": true, "initial_copy": { "parallel": 2 } });
    let feed = create(&client, &source, &target.uri(TARGET), config).await.unwrap();
    let begin = feed["checkpoint_ts"].as_u64().unwrap();
    let mut seen = BTreeSet::new();
    let deadline = Instant::now() + PATIENCE;
    while checkpoint(&client).await == begin {
        let now = progress(&client).await;
        assert!(now["copy_tables_done"].as_u64() <= now["copy_tables_total"].as_u64(), "{now}");
        seen.insert(now["copy_rows"].as_u64().unwrap_or_default());
        assert!(Instant::now() < deadline, "the copy is not complete: {now}");
        tokio::time::sleep(LOOK).await;
    }
    println!("rows copied as the progress was looked at: {seen:?}");
    assert!(seen.len() > 2, "progress moved: {seen:?}");
    let after = progress(&client).await;
    assert_eq!((&after["copy_tables_done"], &after["copy_tables_total"]), (&json!(8), &json!(8)));
    assert!(after["copy_rows"].as_u64().unwrap() > ROWS / 2 + QUIET.unsigned_abs(), "{after}");

    // Another node that takes over does not copy again.
    node.stop().await.unwrap();
    let (node, client) = start(dir.path()).await;
    let stats = work.stop().await.unwrap();
    caught_up(&client, &source).await;
    assert_equal(&source, &target).await;
    assert_eq!(progress(&client).await["copy_tables_total"], 0);
    assert_eq!(quiet_writes(&target).await, QUIET, "copied once");
    println!("{} transactions beside the copy", stats.transactions);
    node.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_is_cut_off_begins_again_and_leaves_no_row_twice() {
    let (source, target) = servers().await;
    prepare(&source).await;
    watch_quiet(&target).await;
    let dir = tempfile::tempdir().unwrap();
    let (mut node, mut client) = start(dir.path()).await;
    let work = Load::start(&source, "postgres", 8, 3, 150, ROWS).await.unwrap();
    let config = json!({ "force_replicate": true, "initial_copy": { "parallel": 1 } });
    let feed = create(&client, &source, &target.uri(TARGET), config).await.unwrap();
    let begin = feed["checkpoint_ts"].as_u64().unwrap();
    for _ in 0..2 {
        let before = quiet_writes(&target).await;
        eventually("rows of this copy are at the target", async || quiet_writes(&target).await > before)
            .await;
        println!("stopped at {}", progress(&client).await);
        assert_eq!(checkpoint(&client).await, begin, "the copy was still running");
        node.stop().await.unwrap();
        (node, client) = start(dir.path()).await;
    }
    eventually("the copy is complete", async || checkpoint(&client).await > begin).await;
    work.stop().await.unwrap();
    caught_up(&client, &source).await;
    assert_equal(&source, &target).await;
    assert!(quiet_writes(&target).await > QUIET, "what was cut off had begun to write");
    node.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_the_target_has_already_are_kept_unless_told_otherwise() {
    let (source, target) = servers().await;
    source
        .sql(
            "postgres",
            "CREATE TABLE a (id int PRIMARY KEY, v text); INSERT INTO a SELECT i, 'source' FROM generate_series(1, 3000) i; \
             CREATE TABLE b (v text); ALTER TABLE b REPLICA IDENTITY FULL; INSERT INTO b VALUES ('source'), ('source')",
        )
        .await
        .unwrap();
    let occupy = "CREATE TABLE a (id int PRIMARY KEY, v text); INSERT INTO a VALUES (2, 'target'), (-2, 'target'); \
                  CREATE TABLE b (v text); INSERT INTO b VALUES ('target')";
    target.sql(TARGET, occupy).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (node, client) = start(dir.path()).await;
    let force = json!({ "force_replicate": true });
    create(&client, &source, &target.uri(TARGET), force.clone()).await.unwrap();
    let failed = async || {
        eventually("the changefeed fails", async || state(&client).await == "failed").await;
        let feed = client.get("/api/v2/changefeeds/f").await.unwrap();
        assert_eq!(feed["error"]["code"], "CDC:ErrTargetNotEmpty", "{}", feed["error"]);
        assert!(feed["error"]["message"].as_str().unwrap().contains("on-existing-rows"), "{}", feed["error"]);
    };
    failed().await;
    // One table is emptied: the other still stops it, and keeps its row.
    target.sql(TARGET, "TRUNCATE a").await.unwrap();
    client.post("/api/v2/changefeeds/f/resume", &json!({})).await.unwrap();
    failed().await;
    target.sql(TARGET, "DELETE FROM b WHERE v = 'target'").await.unwrap();
    source
        .sql("postgres", "UPDATE a SET v = 'changed' WHERE id % 3 = 0; INSERT INTO b VALUES ('new')")
        .await
        .unwrap();
    client.post("/api/v2/changefeeds/f/resume", &json!({})).await.unwrap();
    caught_up(&client, &source).await;
    assert_same(&source, &target, "a", "resumed").await;
    assert_same(&source, &target, "b", "resumed").await;
    client.delete("/api/v2/changefeeds/f").await.unwrap();

    for word in ["append", "truncate"] {
        target.sql(TARGET, "DROP TABLE a, b").await.unwrap();
        target.sql(TARGET, occupy).await.unwrap();
        let uri = format!("{}?on-existing-rows={word}", target.uri(TARGET));
        create(&client, &source, &uri, force.clone()).await.unwrap();
        caught_up(&client, &source).await;
        source.sql("postgres", "UPDATE a SET v = v || '!' WHERE id = 2").await.unwrap();
        caught_up(&client, &source).await;
        let counted = target.client(TARGET).await.unwrap();
        let counts =
            "SELECT (SELECT count(*) FROM a), (SELECT count(*) FROM b), (SELECT v FROM a WHERE id = 2)";
        let row = counted.query_one(counts, &[]).await.unwrap();
        let appended = i64::from(word == "append");
        assert_eq!(row.get::<_, i64>(0), 3000 + appended, "{word}");
        assert_eq!(row.get::<_, i64>(1), 3 + appended, "{word}");
        assert!(row.get::<_, &str>(2).starts_with("source!"), "{word}: the source's row wins");
        client.delete("/api/v2/changefeeds/f").await.unwrap();
    }
    node.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_copy_only_changes_are_written() {
    let (source, target) = servers().await;
    source
        .sql(
            "postgres",
            "CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT i, 'old' FROM generate_series(1, 9) i; \
             CREATE TABLE wide (id int PRIMARY KEY, n int, body text); ALTER TABLE wide ALTER body SET STORAGE EXTERNAL; \
             INSERT INTO wide VALUES (1, 1, repeat('x', 9000))",
        )
        .await
        .unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (node, client) = start(dir.path()).await;
    let config = json!({ "initial_copy": { "enabled": false } });
    create(&client, &source, &target.uri(TARGET), config).await.unwrap();
    source
        .sql(
            "postgres",
            "INSERT INTO t VALUES (10, 'new'); UPDATE t SET v = 'changed' WHERE id = 5; DELETE FROM t WHERE id = 6; \
             UPDATE t SET id = 11 WHERE id = 7",
        )
        .await
        .unwrap();
    caught_up(&client, &source).await;
    let rows =
        target.client(TARGET).await.unwrap().query("SELECT id, v FROM t ORDER BY id", &[]).await.unwrap();
    let rows: Vec<(i32, &str)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert_eq!(rows, [(5, "changed"), (10, "new"), (11, "old")]);
    assert_eq!(progress(&client).await["copy_rows"], 0);

    // A value that the log leaves out, of a row that was never copied, cannot be made up.
    source.sql("postgres", "UPDATE wide SET n = 2").await.unwrap();
    eventually("the changefeed fails", async || {
        client.get("/api/v2/changefeeds/f").await.unwrap()["state"] == "failed"
    })
    .await;
    let feed = client.get("/api/v2/changefeeds/f").await.unwrap();
    assert_eq!(feed["error"]["code"], "CDC:ErrTargetRowMissing", "{}", feed["error"]);
    assert!(feed["error"]["message"].as_str().unwrap().contains("initial copy"), "{}", feed["error"]);
    node.stop().await.unwrap();
}

/// Inserts rows one by one until the source's log is beyond a position. Answers those that must have been
/// committed up to it, and those that must have been committed after it.
async fn write_past(source: &PgServer, limit: u64) -> (Vec<i32>, Vec<i32>) {
    let writer = source.client("postgres").await.unwrap();
    let (mut before, mut after) = (Vec::new(), Vec::new());
    for id in 1.. {
        let begun = position(&writer).await;
        writer.execute("INSERT INTO t SELECT $1, repeat('x', 2000)", &[&id]).await.unwrap();
        let ended = position(&writer).await;
        if ended <= limit {
            before.push(id);
        } else if begun >= limit {
            after.push(id);
        }
        if after.len() == 5 {
            break;
        }
    }
    (before, after)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_position_divides_what_is_written_from_what_is_not() {
    let (source, target) = servers().await;
    source.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY, v text)").await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (node, client) = start(dir.path()).await;
    let now = position(&source.client("postgres").await.unwrap()).await;
    let body = |start_ts: u64, copy: bool| {
        json!({
            "changefeed_id": "f", "start_ts": start_ts, "sink_uri": target.uri(TARGET),
            "upstream": { "uri": source.uri("postgres") }, "replica_config": { "initial_copy": { "enabled": copy } },
        })
    };
    // The server no longer promises to have what comes before a new slot.
    let refused = client.post("/api/v2/changefeeds", &body(now - 1, false)).await.unwrap_err();
    assert_eq!(refused.code(), "CDC:ErrStartTsBeforeGC", "{refused}");
    // A copy is newer than what an earlier position would add, and older than what a later one leaves out.
    let refused = client.post("/api/v2/changefeeds", &body(now + 100_000, true)).await.unwrap_err();
    assert_eq!(refused.code(), "CDC:ErrAPIInvalidParam", "{refused}");
    let left = source.client("postgres").await.unwrap();
    let left = left
        .query_one(
            "SELECT (SELECT count(*) FROM pg_replication_slots) + (SELECT count(*) FROM pg_publication)",
            &[],
        )
        .await
        .unwrap();
    assert_eq!(left.get::<_, i64>(0), 0, "a refused changefeed leaves nothing behind");

    let limit = now + 100_000;
    let feed = client.post("/api/v2/changefeeds", &body(limit, false)).await.unwrap();
    assert_eq!((&feed["start_ts"], &feed["checkpoint_ts"]), (&json!(limit), &json!(limit)));
    let (before, after) = write_past(&source, limit).await;
    caught_up(&client, &source).await;
    let rows = target.client(TARGET).await.unwrap().query("SELECT id FROM t", &[]).await.unwrap();
    let rows: BTreeSet<i32> = rows.iter().map(|row| row.get(0)).collect();
    println!("{} rows before the position, {} rows arrived", before.len(), rows.len());
    assert!(before.len() > 5);
    assert!(before.iter().all(|id| !rows.contains(id)), "committed before the position: {rows:?}");
    assert!(after.iter().all(|id| rows.contains(id)), "committed after the position: {rows:?}");
    node.stop().await.unwrap();
}
