//! Tables with rows that come to a changefeed while it runs, and are copied while everything else goes on.

use std::path::Path;
use std::time::Duration;

use node::Node;
use node::cli::Client;
use serde_json::{Value, json};
use testkit::{Load, Millrace, PgServer, load};

use crate::common::{
    TARGET, assert_same, caught_up, checkpoint, create, eventually, position, process_caught_up, same,
    servers, start,
};
use crate::resync::{ask, assert_equal, number, removes_rows, resyncs, until_done};

/// Rows of the tables that the load changes.
const ROWS: u64 = 4_000;

const ENTERING: &str = "CREATE TABLE a (id int PRIMARY KEY, v text); INSERT INTO a VALUES (1, 'first'); \
     CREATE TABLE late (id int PRIMARY KEY, v text, big text); ALTER TABLE late ALTER big SET STORAGE EXTERNAL; \
     INSERT INTO late SELECT i, 'old', repeat(md5(i::text), 200) FROM generate_series(1, 500) i";

/// Rows of somebody else in the place of a table that comes.
const THEIRS: &str =
    "CREATE TABLE late (id int PRIMARY KEY, v text, big text); INSERT INTO late VALUES (7, 'theirs', '')";

fn rules(rules: &[&str]) -> Value {
    json!({ "filter": { "rules": rules } })
}

/// A changefeed of the tables of [`ENTERING`] that these rules want; both ends are equal in them.
async fn begun(wanted: &[&str]) -> (PgServer, PgServer, tempfile::TempDir, Node, Client) {
    let (source, target) = servers().await;
    source.sql("postgres", ENTERING).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (node, client) = start(dir.path()).await;
    create(&client, &source, &target.uri(TARGET), rules(wanted)).await.unwrap();
    caught_up(&client, &source).await;
    (source, target, dir, node, client)
}

/// The changefeed goes on with other rules.
async fn with_rules(client: &Client, wanted: &[&str]) {
    client.post("/api/v2/changefeeds/f/pause", &json!({})).await.unwrap();
    client.put("/api/v2/changefeeds/f", &json!({ "replica_config": rules(wanted) })).await.unwrap();
    client.post("/api/v2/changefeeds/f/resume", &json!({})).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_with_rows_that_the_filter_comes_to_want_is_copied_while_the_others_go_on() {
    let (source, target, dir, node, client) = begun(&["public.a"]).await;
    client.post("/api/v2/changefeeds/f/pause", &json!({})).await.unwrap();
    client
        .put("/api/v2/changefeeds/f", &json!({ "replica_config": rules(&["public.a", "public.late"]) }))
        .await
        .unwrap();
    // The copy cannot end before somebody lets go of the target's table.
    target.sql(TARGET, "CREATE TABLE late (id int PRIMARY KEY, v text, big text)").await.unwrap();
    let locker = target.client(TARGET).await.unwrap();
    locker.batch_execute("BEGIN; LOCK TABLE late IN EXCLUSIVE MODE").await.unwrap();
    client.post("/api/v2/changefeeds/f/resume", &json!({})).await.unwrap();
    eventually("the table is being copied", async || {
        let all = client.get("/api/v2/changefeeds/f/resyncs").await.unwrap_or_default();
        all["items"][0]["table"] == "public.late" && all["items"][0]["state"] == "copying"
    })
    .await;
    // A change that does not say all of its row, and one of the other table.
    source
        .sql("postgres", "UPDATE late SET v = 'new' WHERE id <= 10; DELETE FROM late WHERE id = 500; INSERT INTO a VALUES (2, 'second')")
        .await
        .unwrap();
    eventually("a row of the other table arrives", async || {
        number(&target, TARGET, "SELECT count(*) FROM a").await == 2
    })
    .await;
    let end = position(&source.client("postgres").await.unwrap()).await;
    assert!(checkpoint(&client).await < end, "rows of the table are not at the target");
    locker.batch_execute("ROLLBACK").await.unwrap();
    let done = until_done(&client, "public.late").await;
    assert_eq!(done["entering"], false, "{done}");
    source
        .sql("postgres", "UPDATE late SET v = 'last' WHERE id = 20; ALTER TABLE late ADD n int DEFAULT 7")
        .await
        .unwrap();
    caught_up(&client, &source).await;
    for table in ["a", "late"] {
        assert_same(&source, &target, table, "entered").await;
    }
    // Started anew it is a table like the others.
    node.stop().await.unwrap();
    let (node, client) = start(dir.path()).await;
    source.sql("postgres", "INSERT INTO late VALUES (1000, 'more', 'x')").await.unwrap();
    caught_up(&client, &source).await;
    assert_same(&source, &target, "late", "started anew").await;
    assert_eq!(resyncs(&client).await.len(), 1);
    node.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_with_rows_that_gets_a_wanted_name_or_a_key_is_copied_without_a_stop() {
    let (source, target) = servers().await;
    let tables = "CREATE TABLE a (id int PRIMARY KEY); CREATE SCHEMA elsewhere; \
                  CREATE TABLE elsewhere.renamed (id int PRIMARY KEY, v text); \
                  INSERT INTO elsewhere.renamed SELECT i, 'old' FROM generate_series(1, 300) i";
    source.sql("postgres", tables).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (node, client) = start(dir.path()).await;
    // One that cannot be replicated is left out, until it can.
    let filter = json!({ "filter": { "rules": ["public.*"] }, "ignore_ineligible_table": true });
    create(&client, &source, &target.uri(TARGET), filter).await.unwrap();
    caught_up(&client, &source).await;
    source
        .sql(
            "postgres",
            "ALTER TABLE elsewhere.renamed SET SCHEMA public; UPDATE renamed SET v = 'new' WHERE id = 3",
        )
        .await
        .unwrap();
    until_done(&client, "public.renamed").await;
    caught_up(&client, &source).await;
    assert_same(&source, &target, "renamed", "renamed").await;
    // Filled in the statement that makes it.
    source
        .sql(
            "postgres",
            "CREATE TABLE made AS SELECT i AS id, 'v' || i AS v FROM generate_series(1, 300) i; \
                          ALTER TABLE made ADD PRIMARY KEY (id)",
        )
        .await
        .unwrap();
    until_done(&client, "public.made").await;
    source.sql("postgres", "DELETE FROM made WHERE id = 7; INSERT INTO a VALUES (1)").await.unwrap();
    caught_up(&client, &source).await;
    for table in ["a", "renamed", "made"] {
        assert_same(&source, &target, table, "entered").await;
    }
    node.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_of_somebody_else_in_the_place_of_a_table_that_comes_stay_and_the_others_go_on() {
    let (source, target, dir, node, client) = begun(&["public.a"]).await;
    client.post("/api/v2/changefeeds/f/pause", &json!({})).await.unwrap();
    client.put("/api/v2/changefeeds/f", &json!({ "replica_config": rules(&["public.*"]) })).await.unwrap();
    target.sql(TARGET, THEIRS).await.unwrap();
    client.post("/api/v2/changefeeds/f/resume", &json!({})).await.unwrap();
    eventually("the copy fails", async || {
        let all = client.get("/api/v2/changefeeds/f/resyncs").await.unwrap_or_default();
        all["items"][0]["state"] == "failed" && all["items"][0]["error"]["code"] == "CDC:ErrTargetNotEmpty"
    })
    .await;
    source
        .sql("postgres", "UPDATE late SET v = 'new' WHERE id = 8; INSERT INTO a VALUES (2, 'second')")
        .await
        .unwrap();
    eventually("a row of the other table arrives", async || {
        number(&target, TARGET, "SELECT count(*) FROM a").await == 2
    })
    .await;
    // Changes of the schema wait for nobody: those of all tables, and of the one that comes.
    source
        .sql(
            "postgres",
            "CREATE VIEW both_tables AS SELECT id FROM a UNION ALL SELECT id FROM late; ALTER TABLE late ADD n int DEFAULT 7; \
             UPDATE late SET v = 'newer' WHERE id = 9; CREATE TABLE b (id int PRIMARY KEY); INSERT INTO b VALUES (1)",
        )
        .await
        .unwrap();
    same(&source, &target, "b").await;
    assert_eq!(number(&target, TARGET, "SELECT count(*) FROM late WHERE v = 'theirs' AND n = 7").await, 1);
    assert_eq!(number(&target, TARGET, "SELECT count(*) FROM late").await, 1, "nothing of it is applied");
    // Mended and asked for again; also by a server that was started in between.
    node.stop().await.unwrap();
    target.sql(TARGET, "TRUNCATE late").await.unwrap();
    let (node, client) = start(dir.path()).await;
    eventually("it is asked for again", async || ask(&client, "resync_table", "public.late").await.is_ok())
        .await;
    until_done(&client, "public.late").await;
    caught_up(&client, &source).await;
    for table in ["a", "b", "late"] {
        assert_same(&source, &target, table, "entered").await;
    }
    node.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_was_not_wanted_for_a_while_gets_the_changes_that_it_missed() {
    let (source, target, _dir, node, client) = begun(&["public.*"]).await;
    with_rules(&client, &["public.a"]).await;
    let missed = "UPDATE late SET v = 'missed' WHERE id <= 10; DELETE FROM late WHERE id = 20; INSERT INTO a VALUES (2, 'second')";
    source.sql("postgres", missed).await.unwrap();
    caught_up(&client, &source).await;
    assert_eq!(number(&target, TARGET, "SELECT count(*) FROM late WHERE v = 'old'").await, 500);
    with_rules(&client, &["public.*"]).await;
    until_done(&client, "public.late").await;
    source.sql("postgres", "UPDATE late SET v = 'new' WHERE id = 30").await.unwrap();
    caught_up(&client, &source).await;
    for table in ["a", "late"] {
        assert_same(&source, &target, table, "wanted again").await;
    }
    node.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_somebody_puts_into_the_publication_is_copied() {
    let (source, target) = servers().await;
    source.sql("postgres", "CREATE TABLE a (id int PRIMARY KEY, v text)").await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (node, client) = start(dir.path()).await;
    create(&client, &source, &target.uri(TARGET), rules(&["public.*"])).await.unwrap();
    caught_up(&client, &source).await;
    // Made where the triggers do not see it.
    let hidden = "SELECT set_config('millrace_capture.own', 'on', false); \
        CREATE TABLE late (id int PRIMARY KEY, v text); INSERT INTO late SELECT i, 'old' FROM generate_series(1, 300) i";
    source.sql("postgres", hidden).await.unwrap();
    let database = source.client("postgres").await.unwrap();
    let publication: String =
        database.query_one("SELECT pubname::text FROM pg_publication", &[]).await.unwrap().get(0);
    let add = format!(
        "BEGIN; ALTER PUBLICATION \"{publication}\" ADD TABLE late; UPDATE late SET v = 'new' WHERE id = 3; COMMIT"
    );
    database.batch_execute(&add).await.unwrap();
    database.batch_execute("DELETE FROM late WHERE id = 4; INSERT INTO a VALUES (1, 'first')").await.unwrap();
    until_done(&client, "public.late").await;
    caught_up(&client, &source).await;
    for table in ["a", "late"] {
        assert_same(&source, &target, table, "put in").await;
    }
    node.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_comes_and_is_dropped_before_it_was_copied_holds_nobody_up() {
    let (source, target, _dir, node, client) = begun(&["public.a"]).await;
    target.sql(TARGET, THEIRS).await.unwrap();
    with_rules(&client, &["public.*"]).await;
    let state = async |wanted: &str| {
        let all = client.get("/api/v2/changefeeds/f/resyncs").await.unwrap_or_default();
        all["items"][0]["state"] == wanted
    };
    eventually("the copy fails", async || state("failed").await).await;
    source
        .sql("postgres", "UPDATE late SET v = 'new'; DROP TABLE late; INSERT INTO a VALUES (2, 'second')")
        .await
        .unwrap();
    caught_up(&client, &source).await;
    assert_same(&source, &target, "a", "dropped").await;
    // What came of it is told until somebody has read it.
    assert!(state("failed").await);
    ask(&client, "cancel_resync", "public.late").await.unwrap();
    assert_eq!(resyncs(&client).await, Vec::<Value>::new());
    node.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_is_withdrawn_leaves_the_table_to_its_later_changes() {
    let (source, target, _dir, node, client) = begun(&["public.a"]).await;
    target.sql(TARGET, THEIRS).await.unwrap();
    with_rules(&client, &["public.*"]).await;
    eventually("the copy fails", async || {
        client.get("/api/v2/changefeeds/f/resyncs").await.unwrap_or_default()["items"][0]["state"] == "failed"
    })
    .await;
    ask(&client, "cancel_resync", "public.late").await.unwrap();
    source
        .sql("postgres", "INSERT INTO late VALUES (1000, 'later', 'x'); DELETE FROM late WHERE id = 1")
        .await
        .unwrap();
    caught_up(&client, &source).await;
    let there = "SELECT count(*) FROM late WHERE (id, v) IN ((7, 'theirs'), (1000, 'later'))";
    assert_eq!(number(&target, TARGET, there).await, 2);
    assert_eq!(number(&target, TARGET, "SELECT count(*) FROM late").await, 2);
    node.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_comes_is_copied_once_however_often_the_process_is_killed() {
    let (source, target) = servers().await;
    load::prepare(&source.client("postgres").await.unwrap(), ROWS).await.unwrap();
    source
        .sql(
            "postgres",
            "CREATE SCHEMA elsewhere; CREATE TABLE elsewhere.wide (id int PRIMARY KEY, v text, big text); \
             ALTER TABLE elsewhere.wide ALTER big SET STORAGE EXTERNAL; \
             INSERT INTO elsewhere.wide SELECT i, 'old', repeat(md5(i::text), 100) FROM generate_series(1, 10000) i",
        )
        .await
        .unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut millrace = Millrace::new(Path::new(env!("CARGO_BIN_EXE_millrace")), dir.path()).unwrap();
    millrace.start().await.unwrap();
    let config = json!({ "force_replicate": true, "filter": { "rules": ["*.*", "!elsewhere.*"] } });
    millrace.api().create("f", &source.uri("postgres"), &target.uri(TARGET), &config).await.unwrap();
    process_caught_up(&millrace, &source).await;
    let work = Load::start(&source, "postgres", 12, 2, 60, ROWS).await.unwrap();

    target.sql(TARGET, "CREATE TABLE wide (id int PRIMARY KEY, v text, big text)").await.unwrap();
    let locker = target.client(TARGET).await.unwrap();
    locker.batch_execute("BEGIN; LOCK TABLE wide IN EXCLUSIVE MODE").await.unwrap();
    let changes = source.client("postgres").await.unwrap();
    changes.batch_execute("ALTER TABLE elsewhere.wide SET SCHEMA public").await.unwrap();
    eventually("the copy has begun", async || removes_rows(&target).await).await;
    millrace.kill().unwrap();
    // Changes that do not say all of a row, before and behind the snapshot.
    changes.batch_execute("UPDATE wide SET v = 'while nobody was there' WHERE id <= 100").await.unwrap();
    locker.batch_execute("ROLLBACK").await.unwrap();
    let seen = async || number(&target, TARGET, "SELECT count(*) FROM wide").await;
    for round in 0..4 {
        millrace.start().await.unwrap();
        changes.execute("UPDATE wide SET v = v || '!' WHERE id % 1000 = $1", &[&round]).await.unwrap();
        tokio::time::sleep(Duration::from_millis(200 * u64::try_from(round).unwrap())).await;
        millrace.kill().unwrap();
        let rows = seen().await;
        assert!(rows == 0 || rows == 10_000, "{rows} rows");
    }
    millrace.start().await.unwrap();
    let api = millrace.api();
    eventually("the request is answered", async || {
        let list = api.get("/api/v2/changefeeds/f/resyncs").await.unwrap_or_default();
        assert_ne!(list["items"][0]["state"], "failed", "{list}");
        list["items"][0]["state"] == "done" && list["items"][0]["entering"] == false
    })
    .await;
    assert_eq!(seen().await, 10_000);
    work.stop().await.unwrap();
    process_caught_up(&millrace, &source).await;
    assert_equal(&source, &target, &["wide"]).await;
    millrace.stop().await.unwrap();
}
