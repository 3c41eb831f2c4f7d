//! Faults of the source that a restart does not mend: other shapes of tables, slots that are gone. And a source
//! that is idle, which is no fault.

use serde_json::json;
use testkit::PgServer;

use super::{assert_error, becomes, feed};
use crate::common::{TARGET, caught_up, content, create, eventually, position, same, servers, start};

/// What a person does to a table, one table each, and words that the error must have.
const CHANGES: &[(&str, &str, &str)] = &[
    ("adds", "ALTER TABLE adds ADD COLUMN more int; INSERT INTO adds VALUES (9, 9, 'new', 9)", "more"),
    ("drops", "ALTER TABLE drops DROP COLUMN v; INSERT INTO drops VALUES (9, 9)", "v"),
    ("renames", "ALTER TABLE renames RENAME COLUMN v TO w; INSERT INTO renames VALUES (9, 9, 'new')", "w"),
    ("retypes", "ALTER TABLE retypes ALTER n TYPE numeric; INSERT INTO retypes VALUES (9, 9.5, 'new')", "n"),
    ("moves", "ALTER TABLE moves RENAME TO removes; INSERT INTO removes VALUES (9, 9, 'new')", "removes"),
    (
        "rekeys",
        "ALTER TABLE rekeys DROP CONSTRAINT rekeys_pkey, ADD PRIMARY KEY (n); UPDATE rekeys SET n = 5, v = 'new' WHERE id = 1",
        "key",
    ),
];

async fn make_feed(client: &node::cli::Client, source: &PgServer, target: &PgServer, table: &str) {
    let body = json!({
        "changefeed_id": table, "sink_uri": format!("{}?worker-count=1", target.uri(TARGET)),
        "upstream": { "uri": source.uri("postgres") },
        "replica_config": { "filter": { "rules": [format!("public.{table}")] }, "ddl": { "capture": "off" } },
    });
    client.post("/api/v2/changefeeds", &body).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_changes_its_shape_stops_its_changefeed_with_a_named_error_before_the_first_new_row() {
    let (source, target) = servers().await;
    let dir = tempfile::tempdir().unwrap();
    let (node, client) = start(dir.path()).await;
    for (table, _, _) in CHANGES {
        let sql = format!(
            "CREATE TABLE {table} (id int PRIMARY KEY, n int NOT NULL, v text); INSERT INTO {table} VALUES (1, 1, 'old')"
        );
        source.sql("postgres", &sql).await.unwrap();
        make_feed(&client, &source, &target, table).await;
    }
    let admin = source.client("postgres").await.unwrap();
    for (table, change, _) in CHANGES {
        same(&source, &target, table).await;
        // A copy that is not known to be complete is made anew, and then with the new shape.
        eventually("the copy is complete", async || {
            let feed = feed(&client, table).await;
            feed["checkpoint_ts"].as_u64() > feed["start_ts"].as_u64()
        })
        .await;
        source.sql("postgres", &format!("INSERT INTO {table} VALUES (2, 2, 'before')")).await.unwrap();
        source.sql("postgres", change).await.unwrap();
    }
    let end = position(&admin).await;
    let downstream = target.client(TARGET).await.unwrap();
    // Trying again does not make it right, and is not a way to get around it.
    for attempt in 0..3 {
        for (table, _, word) in CHANGES {
            let failed = becomes(&client, table, "failed").await;
            println!("{attempt}: {} {}", failed["error"]["code"], failed["error"]["message"]);
            // Behind the last row of the old shape it may be the target that has the wrong shape.
            if attempt == 0 {
                assert_error(&failed, "CDC:ErrSchemaChangeUnsupported", &[table, word]);
            }
            assert!(failed["error"]["message"].as_str().unwrap().contains(table), "{}", failed["error"]);
            assert!(failed["checkpoint_ts"].as_u64().unwrap() < end, "{table} went on");
            let news = format!("SELECT count(*) FROM {table} WHERE v = 'new'");
            assert_eq!(downstream.query_one(&news, &[]).await.unwrap().get::<_, i64>(0), 0, "{table}");
        }
        for (table, _, _) in CHANGES {
            client.post(&format!("/api/v2/changefeeds/{table}/resume"), &json!({})).await.unwrap();
        }
    }
    node.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_somebody_dropped_stops_the_changefeed_with_advice() {
    let (source, target) = servers().await;
    source
        .sql("postgres", "CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (id int PRIMARY KEY)")
        .await
        .unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (node, client) = start(dir.path()).await;
    for table in ["a", "b"] {
        make_feed(&client, &source, &target, table).await;
        source.sql("postgres", &format!("INSERT INTO {table} VALUES (1)")).await.unwrap();
        same(&source, &target, table).await;
    }
    let admin = source.client("postgres").await.unwrap();
    // While it is read: the reader comes back at once, so it takes a few attempts.
    eventually("the slot of a is dropped", async || {
        let slots = "FROM pg_replication_slots WHERE slot_name LIKE 'millrace_a_%'";
        let _ =
            admin.batch_execute(&format!("SELECT pg_terminate_backend(active_pid) {slots} AND active")).await;
        let _ = admin.batch_execute(&format!("SELECT pg_drop_replication_slot(slot_name) {slots}")).await;
        let left = admin.query_one(&format!("SELECT count(*) {slots}"), &[]).await.unwrap();
        left.get::<_, i64>(0) == 0
    })
    .await;
    // And while it is not read.
    client.post("/api/v2/changefeeds/b/pause", &json!({})).await.unwrap();
    let drop = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name LIKE 'millrace_b_%'";
    admin.batch_execute(drop).await.unwrap();
    client.post("/api/v2/changefeeds/b/resume", &json!({})).await.unwrap();
    for table in ["a", "b"] {
        source.sql("postgres", &format!("INSERT INTO {table} VALUES (2)")).await.unwrap();
        let failed = becomes(&client, table, "failed").await;
        let advice = "remove the changefeed and create it again";
        assert_error(&failed, "CDC:ErrStartTsBeforeGC", &[&format!("millrace_{table}_"), advice]);
        client.delete(&format!("/api/v2/changefeeds/{table}")).await.unwrap();
    }
    let left = admin.query_one("SELECT count(*) FROM pg_publication", &[]).await.unwrap();
    assert_eq!(left.get::<_, i64>(0), 0, "removal takes the publication along");
    node.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_is_idle_while_another_one_writes_lets_the_server_recycle_its_log() {
    let (source, target) = servers().await;
    source.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)").await.unwrap();
    source.sql("postgres", "CREATE DATABASE busy").await.unwrap();
    source.sql("busy", "CREATE TABLE noise (at int, what text)").await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (node, client) = start(dir.path()).await;
    create(&client, &source, &target.uri(TARGET), json!({ "ddl": { "capture": "off" } })).await.unwrap();
    same(&source, &target, "t").await;
    caught_up(&client, &source).await;
    let admin = source.client("postgres").await.unwrap();
    let relations = "SELECT count(*) FROM pg_class WHERE oid >= 16384 AND relkind IN ('r', 'p')";
    let own_tables: i64 = admin.query_one(relations, &[]).await.unwrap().get(0);
    assert_eq!(own_tables, 1, "nothing of ours is in the source's database");

    for round in 0..3 {
        let begin = position(&admin).await;
        let noise = format!(
            "INSERT INTO noise SELECT {round}, repeat('x', 500) FROM generate_series(1, 20000); CHECKPOINT"
        );
        source.sql("busy", &noise).await.unwrap();
        eventually("the slot moves past the log of the other database", async || {
            // A checkpoint writes what the server needs to move the restart position.
            source.sql("busy", "CHECKPOINT").await.unwrap();
            let sql = "SELECT (confirmed_flush_lsn - '0/0')::bigint, (restart_lsn - '0/0')::bigint FROM pg_replication_slots";
            let row = admin.query_one(sql, &[]).await.unwrap();
            [row.get::<_, i64>(0), row.get::<_, i64>(1)].iter().all(|lsn| u64::try_from(*lsn).unwrap() > begin)
        })
        .await;
        let checkpoint = feed(&client, "f").await["checkpoint_ts"].as_u64().unwrap();
        assert!(checkpoint > begin, "the checkpoint {checkpoint} is still before {begin}");
    }
    assert_eq!(admin.query_one(relations, &[]).await.unwrap().get::<_, i64>(0), 1);
    assert_eq!(content(&source, "postgres", "t").await, content(&target, TARGET, "t").await);
    node.stop().await.unwrap();
}
