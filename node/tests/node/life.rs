//! A whole node between two real PostgreSQL servers: copy, stream, pause, kill of its connections, removal.

use serde_json::json;
use testkit::PgServer;

use crate::common::{TARGET, eventually, same, start, state};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_is_copied_followed_paused_resumed_restarted_and_let_go() {
    let source = PgServer::builder().setting("wal_level", "logical").start().await.unwrap();
    let target = PgServer::start().await.unwrap();
    target.sql("postgres", &format!("CREATE DATABASE {TARGET}")).await.unwrap();
    source
        .sql(
            "postgres",
            "CREATE TABLE t (id int PRIMARY KEY, v text, n numeric); \
             INSERT INTO t SELECT g, 'v' || g, g * 1.5 FROM generate_series(1, 5000) g; \
             CREATE TABLE \"Ünïcode\" (a int, b text, u int UNIQUE, PRIMARY KEY (a, b)); \
             INSERT INTO \"Ünïcode\" VALUES (1, 'x', 1), (2, 'y', 2)",
        )
        .await
        .unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (node, client) = start(dir.path()).await;
    let body = json!({ "changefeed_id": "f", "sink_uri": target.uri(TARGET), "upstream": { "uri": source.uri("postgres") } });
    client.post("/api/v2/changefeeds", &body).await.unwrap();
    let again = client.post("/api/v2/changefeeds", &body).await.unwrap_err();
    assert_eq!(again.code(), "CDC:ErrChangeFeedAlreadyExists");
    same(&source, &target, "t").await;
    same(&source, &target, "\"Ünïcode\"").await;

    source
        .sql(
            "postgres",
            "BEGIN; UPDATE t SET v = v || '!' WHERE id % 3 = 0; DELETE FROM t WHERE id % 7 = 0; \
             UPDATE t SET id = id + 100000 WHERE id % 11 = 0; COMMIT; \
             BEGIN; UPDATE \"Ünïcode\" SET u = 3 WHERE a = 1; UPDATE \"Ünïcode\" SET u = 1 WHERE a = 2; \
             UPDATE \"Ünïcode\" SET u = 2 WHERE a = 1; COMMIT",
        )
        .await
        .unwrap();
    same(&source, &target, "t").await;
    same(&source, &target, "\"Ünïcode\"").await;

    client.post("/api/v2/changefeeds/f/pause", &json!({})).await.unwrap();
    assert_eq!(state(&client).await, "stopped");
    source
        .sql("postgres", "INSERT INTO t SELECT g, 'later', 0 FROM generate_series(200000, 201000) g")
        .await
        .unwrap();
    client.post("/api/v2/changefeeds/f/resume", &json!({})).await.unwrap();
    same(&source, &target, "t").await;

    node.stop().await.unwrap();
    source.sql("postgres", "UPDATE t SET n = n + 1").await.unwrap();
    let (node, client) = start(dir.path()).await;
    same(&source, &target, "t").await;
    eventually("the feed is normal", async || state(&client).await == "normal").await;

    client.delete("/api/v2/changefeeds/f").await.unwrap();
    let slots = source
        .client("postgres")
        .await
        .unwrap()
        .query_one("SELECT count(*) FROM pg_replication_slots", &[])
        .await
        .unwrap();
    assert_eq!(slots.get::<_, i64>(0), 0, "the slot is gone with its changefeed");
    node.stop().await.unwrap();
}
