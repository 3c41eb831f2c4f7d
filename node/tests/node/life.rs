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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_requests_are_refused_with_a_code_and_leave_nothing_behind() {
    let source = PgServer::builder().setting("wal_level", "logical").start().await.unwrap();
    source.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY)").await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (node, client) = start(dir.path()).await;
    let uri = source.uri("postgres");
    let upstream = json!({ "uri": uri });
    let cases = [
        (json!({ "sink_uri": "blackhole://" }), "CDC:ErrAPIInvalidParam"),
        (json!({ "upstream": upstream }), "CDC:ErrSinkURIInvalid"),
        (json!({ "upstream": upstream, "sink_uri": "gopher://x" }), "CDC:ErrSinkURIInvalid"),
        (
            json!({ "upstream": { "uri": "gopher://x" }, "sink_uri": "blackhole://" }),
            "CDC:ErrUpstreamURIInvalid",
        ),
        (
            json!({ "upstream": { "uri": "postgres://u:secret@127.0.0.1:1/d" }, "sink_uri": "blackhole://" }),
            "CDC:ErrUpstreamUnreachable",
        ),
        (
            json!({ "upstream": upstream, "sink_uri": "blackhole://", "changefeed_id": "a b" }),
            "CDC:ErrAPIInvalidParam",
        ),
        (
            json!({ "upstream": upstream, "sink_uri": "blackhole://", "start_ts": 9, "target_ts": 3 }),
            "CDC:ErrTargetTsBeforeStartTs",
        ),
        (
            json!({ "upstream": upstream, "sink_uri": "blackhole://", "keyspace": "other" }),
            "CDC:ErrAPIInvalidParam",
        ),
        (json!({ "upstream": upstream, "sink_uri": uri }), "CDC:ErrSameUpstreamDownstream"),
        (json!([1]), "CDC:ErrAPIInvalidParam"),
    ];
    for (body, code) in cases {
        let error = client.post("/api/v2/changefeeds", &body).await.unwrap_err();
        assert_eq!(error.code(), code, "{body}: {error}");
        assert!(!error.to_string().contains("secret"), "{error}");
    }
    for path in
        ["/api/v2/changefeeds/none", "/api/v2/changefeeds/none/status", "/api/v2/changefeeds/none/progress"]
    {
        assert_eq!(client.get(path).await.unwrap_err().code(), "CDC:ErrChangeFeedNotExists", "{path}");
    }
    for path in ["/api/v2/changefeeds/none/pause", "/api/v2/changefeeds/none/resume"] {
        assert_eq!(
            client.post(path, &json!({})).await.unwrap_err().code(),
            "CDC:ErrChangeFeedNotExists",
            "{path}"
        );
    }
    assert_eq!(
        client.get("/api/v2/changefeeds?state=odd").await.unwrap_err().code(),
        "CDC:ErrAPIInvalidParam"
    );
    assert_eq!(client.get("/nowhere").await.unwrap_err().code(), "CDC:ErrAPINotFound");
    client.delete("/api/v2/changefeeds/none").await.unwrap();
    let slots = source
        .client("postgres")
        .await
        .unwrap()
        .query_one("SELECT count(*) FROM pg_replication_slots", &[])
        .await
        .unwrap();
    assert_eq!(slots.get::<_, i64>(0), 0);
    node.stop().await.unwrap();
}
