//! Which tables are replicated: filter rules, tables that cannot be, and partitions.

use node::cli::Client;
use serde_json::{Value, json};
use testkit::PgServer;

use crate::common::{TARGET, assert_same, caught_up, create, servers, start};

/// Tables of a database, without those that Millrace keeps for itself.
async fn tables(server: &PgServer, database: &str) -> Vec<String> {
    let sql = "SELECT format('%I.%I', schemaname, tablename) FROM pg_tables \
               WHERE schemaname NOT IN ('pg_catalog', 'information_schema', 'millrace') ORDER BY 1";
    let rows = server.client(database).await.unwrap().query(sql, &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

/// Slots and publications of the source.
async fn retention(source: &PgServer) -> i64 {
    let sql = "SELECT (SELECT count(*) FROM pg_replication_slots) + (SELECT count(*) FROM pg_publication)";
    source.client("postgres").await.unwrap().query_one(sql, &[]).await.unwrap().get(0)
}

/// Removes the changefeed and what it wrote.
async fn start_over(client: &Client, target: &PgServer) {
    client.delete("/api/v2/changefeeds/f").await.unwrap();
    let sql = format!("DROP DATABASE {TARGET} WITH (FORCE)");
    target.sql("postgres", &sql).await.unwrap();
    target.sql("postgres", &format!("CREATE DATABASE {TARGET}")).await.unwrap();
}

const SHOP: [&str; 8] = [
    "shop.orders",
    "shop.tmp_1",
    "shop.tmp_keep",
    "shop.\"Orders\"",
    "\"Shop\".tmp_1",
    "\"Shop\".lines",
    "other.orders",
    "\"a.b\".\"x*y\"",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_tables_that_the_rules_want_reach_the_target() {
    let (source, target) = servers().await;
    source
        .sql(
            "postgres",
            "CREATE SCHEMA shop; CREATE SCHEMA \"Shop\"; CREATE SCHEMA other; CREATE SCHEMA \"a.b\"",
        )
        .await
        .unwrap();
    for table in SHOP {
        let sql = format!("CREATE TABLE {table} (id int PRIMARY KEY); INSERT INTO {table} VALUES (1)");
        source.sql("postgres", &sql).await.unwrap();
    }
    let dir = tempfile::tempdir().unwrap();
    let (node, client) = start(dir.path()).await;
    let cases: [(Value, bool, &[&str]); 6] = [
        // Without rules everything is wanted.
        (json!(["*.*"]), false, &SHOP),
        // The last rule that matches decides; upper and lower case do not count.
        (
            json!(["shop.*", "!shop.tmp_*", "shop.tmp_keep"]),
            false,
            &["shop.orders", "shop.\"Orders\"", "\"Shop\".lines", "shop.tmp_keep"],
        ),
        (
            json!(["shop.*", "!shop.tmp_*", "shop.tmp_keep"]),
            true,
            &["shop.orders", "shop.\"Orders\"", "shop.tmp_keep"],
        ),
        (json!(["*.orders", "!*.*", "SHOP.ORDERS"]), false, &["shop.orders", "shop.\"Orders\""]),
        (json!(["\"a.b\".\"x*y\"", "?hop.[l-m]*"]), true, &["\"a.b\".\"x*y\"", "\"Shop\".lines"]),
        (json!(["*.*", "!*.*"]), false, &[]),
    ];
    for (number, (rules, case_sensitive, wanted)) in cases.into_iter().enumerate() {
        let config = json!({ "filter": { "rules": rules }, "case_sensitive": case_sensitive });
        let feed = create(&client, &source, &target.uri(TARGET), config).await.unwrap();
        if wanted.is_empty() {
            assert!(feed["warnings"].to_string().contains("no table that matches"), "{}", feed["warnings"]);
        }
        caught_up(&client, &source).await;
        for table in SHOP {
            source.sql("postgres", &format!("INSERT INTO {table} VALUES ({number} + 2)")).await.unwrap();
        }
        caught_up(&client, &source).await;
        let mut expected: Vec<&str> = wanted.to_vec();
        let mut have = tables(&target, TARGET).await;
        expected.sort_unstable();
        have.sort_unstable();
        assert_eq!(have, expected, "{rules}, case {case_sensitive}");
        for table in wanted {
            assert_same(&source, &target, table, &rules.to_string()).await;
        }
        start_over(&client, &target).await;
    }
    assert_eq!(retention(&source).await, 0);
    node.stop().await.unwrap();
}

const ODD_TABLES: &str = "
CREATE TABLE good (id int PRIMARY KEY, v text);
CREATE TABLE keyless (v text);
CREATE TABLE keyless_full (v text); ALTER TABLE keyless_full REPLICA IDENTITY FULL;
CREATE TABLE nullable_key (a int UNIQUE);
CREATE TABLE no_identity (id int PRIMARY KEY); ALTER TABLE no_identity REPLICA IDENTITY NOTHING;
CREATE UNLOGGED TABLE unlogged (id int PRIMARY KEY);
CREATE TABLE parted (id int, k int, PRIMARY KEY (id, k)) PARTITION BY LIST (k);
CREATE TABLE parted_1 PARTITION OF parted FOR VALUES IN (1); ALTER TABLE parted_1 REPLICA IDENTITY FULL;
CREATE EXTENSION file_fdw; CREATE SERVER files FOREIGN DATA WRAPPER file_fdw;
CREATE FOREIGN TABLE remote (v text) SERVER files OPTIONS (filename '/dev/null');
CREATE VIEW seen AS SELECT * FROM good; CREATE MATERIALIZED VIEW kept AS SELECT * FROM good;
INSERT INTO good VALUES (1, 'x'); INSERT INTO keyless VALUES ('x'), ('x'); INSERT INTO keyless_full VALUES ('x'), ('x');
INSERT INTO nullable_key VALUES (NULL), (1); INSERT INTO no_identity VALUES (1); INSERT INTO unlogged VALUES (1);
";

/// Tables that cannot be replicated, and a word of the reason.
const OBSTACLES: [(&str, &str); 7] = [
    ("keyless", "REPLICA IDENTITY FULL"),
    ("keyless_full", "force-replicate"),
    ("nullable_key", "NOT NULL"),
    ("no_identity", "no replica identity"),
    ("unlogged", "SET LOGGED"),
    ("parted", "partition public.parted_1"),
    ("remote", "foreign table"),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tables_that_cannot_be_replicated_are_listed_or_left_out() {
    let (source, target) = servers().await;
    source.sql("postgres", ODD_TABLES).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (node, client) = start(dir.path()).await;
    let uri = target.uri(TARGET);

    let refused = create(&client, &source, &uri, json!({})).await.unwrap_err();
    assert_eq!(refused.code(), "CDC:ErrTableIneligible");
    let body = json!({ "sink_uri": uri, "upstream": { "uri": source.uri("postgres") } });
    let report = client.post("/api/v2/verify_table", &body).await.unwrap();
    assert_eq!(report["ineligible_tables"].as_array().unwrap().len(), OBSTACLES.len(), "{report}");
    for (table, reason) in OBSTACLES {
        let text = refused.to_string();
        assert!(text.contains(&format!("public.{table} (")) && text.contains(reason), "{table}: {text}");
        let listed =
            report["ineligible_tables"].as_array().unwrap().iter().find(|item| item["table_name"] == table);
        assert!(listed.unwrap()["reason"].as_str().unwrap().contains(reason), "{table}: {report}");
    }
    assert_eq!(report["eligible_tables"][0]["table_name"], "good");
    assert!(client.get("/api/v2/changefeeds/f").await.is_err());
    assert_eq!(retention(&source).await, 0, "a refused changefeed leaves nothing behind");
    assert!(tables(&target, TARGET).await.is_empty());

    // What can be done about each: leave them out, filter them out, replicate what has its whole rows in the log.
    let left_out = json!({ "ignore_ineligible_table": true });
    let filtered = json!({ "filter": { "rules": ["public.good"] } });
    let forced = json!({ "ignore_ineligible_table": true, "force_replicate": true });
    for (config, wanted) in
        [(left_out, &["good"][..]), (filtered, &["good"]), (forced, &["good", "keyless_full"])]
    {
        create(&client, &source, &uri, config.clone()).await.unwrap();
        caught_up(&client, &source).await;
        source
            .sql(
                "postgres",
                "INSERT INTO good SELECT max(id) + 1, 'new' FROM good; UPDATE good SET v = v || '!'; \
                 UPDATE keyless_full SET v = 'y' WHERE ctid = (SELECT min(ctid) FROM keyless_full); \
                 INSERT INTO keyless VALUES ('y'); INSERT INTO no_identity SELECT max(id) + 1 FROM no_identity; \
                 INSERT INTO parted SELECT count(*), 1 FROM parted; INSERT INTO unlogged SELECT max(id) + 1 FROM unlogged",
            )
            .await
            .unwrap();
        caught_up(&client, &source).await;
        let expected: Vec<String> = wanted.iter().map(|table| format!("public.{table}")).collect();
        assert_eq!(tables(&target, TARGET).await, expected, "{config}");
        for table in wanted {
            assert_same(&source, &target, table, &config.to_string()).await;
        }
        start_over(&client, &target).await;
    }

    // A table whose log does not say which row changed cannot be forced.
    let refused = create(&client, &source, &uri, json!({ "force_replicate": true })).await.unwrap_err();
    assert_eq!(refused.code(), "CDC:ErrTableIneligible", "{refused}");
    assert_eq!(retention(&source).await, 0, "a refused changefeed leaves nothing behind");
    node.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partitioned_table_is_one_table() {
    let (source, target) = servers().await;
    source
        .sql(
            "postgres",
            "CREATE TABLE sales (id int, region text, v text, PRIMARY KEY (id, region)) PARTITION BY LIST (region); \
             CREATE TABLE sales_a PARTITION OF sales FOR VALUES IN ('a'); \
             CREATE TABLE sales_rest PARTITION OF sales DEFAULT PARTITION BY RANGE (id); \
             CREATE TABLE sales_low (v text, region text NOT NULL, id int NOT NULL, PRIMARY KEY (id, region)); \
             ALTER TABLE sales_rest ATTACH PARTITION sales_low FOR VALUES FROM (MINVALUE) TO (1000); \
             CREATE TABLE sales_high PARTITION OF sales_rest FOR VALUES FROM (1000) TO (MAXVALUE); \
             INSERT INTO sales SELECT i, substr('abc', i % 3 + 1, 1), 'v' || i FROM generate_series(1, 1500) i",
        )
        .await
        .unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (node, client) = start(dir.path()).await;
    create(&client, &source, &target.uri(TARGET), json!({})).await.unwrap();
    caught_up(&client, &source).await;
    assert_eq!(tables(&target, TARGET).await, ["public.sales"]);
    assert_same(&source, &target, "sales", "copied").await;
    // Rows move between partitions, and changes name a partition.
    let changes = "UPDATE sales SET region = 'a' WHERE region = 'b' AND id < 100; UPDATE sales SET id = id + 5000 WHERE id % 10 = 0; \
                   DELETE FROM sales_high WHERE id % 7 = 0; INSERT INTO sales_low VALUES ('direct', 'z', -1); \
                   UPDATE sales_a SET v = v || '!'";
    source.sql("postgres", changes).await.unwrap();
    caught_up(&client, &source).await;
    assert_same(&source, &target, "sales", "changed").await;
    source.sql("postgres", "TRUNCATE sales; INSERT INTO sales VALUES (1, 'a', 'after')").await.unwrap();
    caught_up(&client, &source).await;
    assert_same(&source, &target, "sales", "truncated").await;
    node.stop().await.unwrap();
}
