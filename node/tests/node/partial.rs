//! Tables of which only some columns and rows leave the source: `filter.publish`.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use serde_json::{Value, json};
use testkit::{Api, Millrace, PgServer};

use crate::common::{TARGET, create, eventually, process_caught_up, servers, start, state};

/// Every table is large enough for several parts of the least size, and has what may not arrive: values with `hidden`.
/// `orders` is divided by pages, `ranged` and `parted` by key, `whole` has no list, and of `plain` everything comes.
const SCHEMA: &str = "\
    CREATE TABLE orders (id int PRIMARY KEY, region text NOT NULL, total numeric, note text DEFAULT 'hidden'); \
    CREATE UNIQUE INDEX orders_region ON orders (id, region); ALTER TABLE orders REPLICA IDENTITY USING INDEX orders_region; \
    INSERT INTO orders SELECT i, CASE WHEN i % 3 = 0 THEN 'eu' ELSE 'hidden' END, i / 7.0 FROM generate_series(1, 15000) i; \
    CREATE TABLE ranged (id int PRIMARY KEY, gone text, v text UNIQUE, w int, made int GENERATED ALWAYS AS (w + 1) STORED); \
    ALTER TABLE ranged DROP COLUMN gone; ALTER TABLE ranged ADD COLUMN secret text DEFAULT 'hidden'; \
    INSERT INTO ranged (id, v, w) SELECT i, md5(i::text), i FROM generate_series(1, 15000) i; \
    CREATE INDEX ranged_w ON ranged (w); CREATE INDEX ranged_secret ON ranged (w, secret); \
    CREATE INDEX ranged_lower ON ranged (lower(secret)); CREATE INDEX ranged_where ON ranged (w) WHERE secret <> ''; \
    CREATE INDEX ranged_with ON ranged (w) INCLUDE (secret); \
    CREATE TABLE parted (id int PRIMARY KEY, v text, secret text DEFAULT 'hidden') PARTITION BY RANGE (id); \
    CREATE TABLE parted_a PARTITION OF parted FOR VALUES FROM (MINVALUE) TO (3000); \
    CREATE TABLE parted_b PARTITION OF parted FOR VALUES FROM (3000) TO (MAXVALUE); \
    INSERT INTO parted SELECT i, md5(i::text) FROM generate_series(1, 15000) i; \
    CREATE TABLE whole (id int PRIMARY KEY, v text, made text GENERATED ALWAYS AS (v || '!') STORED); \
    ALTER TABLE whole REPLICA IDENTITY FULL; \
    INSERT INTO whole (id, v) SELECT i, CASE WHEN i % 2 = 0 THEN 'a' ELSE 'hidden' END || i FROM generate_series(1, 10000) i; \
    CREATE TABLE plain (id int PRIMARY KEY, v text); INSERT INTO plain VALUES (1, 'x'); ANALYZE";

/// What of each table is to be at the target, as a query of the source, and the table's columns there.
const TABLES: [(&str, &str, &str); 5] = [
    ("orders", "SELECT id, region, total FROM orders WHERE region = 'eu'", "id,region,total"),
    ("ranged", "SELECT id, v, w FROM ranged WHERE id % 3 <> 0", "id,v,w"),
    ("parted", "SELECT id, v FROM parted WHERE id NOT BETWEEN 2000 AND 4000", "id,v"),
    ("whole", "SELECT * FROM whole WHERE v LIKE 'a%'", "id,v,made"),
    ("plain", "SELECT * FROM plain", "id,v"),
];

fn config() -> Value {
    json!({
        "filter": { "publish": [
            { "matcher": ["public.orders"], "columns": ["total", "region", "id"], "where": "region = 'eu' -- not 'hidden'" },
            { "matcher": ["public.r*"], "columns": ["id", "v", "w"], "where": "id % 3 <> 0" },
            { "matcher": ["*.parted"], "columns": ["id", "v"], "where": "id NOT BETWEEN 2000 AND 4000" },
            { "matcher": ["public.whole"], "where": "v LIKE 'a%'" },
            { "matcher": ["public.orders", "public.plain"] },
        ]},
        "initial_copy": { "parallel": 2, "part_bytes": 65536 },
    })
}

/// Number and content of the rows of a query.
async fn rows(server: &PgServer, database: &str, query: &str) -> Option<String> {
    let sql = format!(
        "SELECT count(*) || ' ' || coalesce(md5(string_agg(t::text, '|' ORDER BY t::text)), '') FROM ({query}) t"
    );
    server.client(database).await.unwrap().query_one(&sql, &[]).await.ok().map(|row| row.get(0))
}

async fn assert_parts(source: &PgServer, target: &PgServer, when: &str) {
    for (table, wanted, columns) in TABLES {
        let want = rows(source, "postgres", wanted).await;
        let have = rows(target, TARGET, &format!("SELECT {columns} FROM {table}")).await;
        assert!(want.is_some() && want == have, "{table}, {when}: {want:?} became {have:?}");
    }
}

/// Rows that move into and out of what is published, change, get other keys and go, until it is told to stop.
fn load(source: &PgServer, stop: &Arc<AtomicBool>, done: &Arc<AtomicU64>) -> tokio::task::JoinHandle<()> {
    let (uri, stop, done) = (source.uri("postgres"), Arc::clone(stop), Arc::clone(done));
    tokio::spawn(async move {
        let (client, connection) = tokio_postgres::connect(&uri, tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        let mut pace = tokio::time::interval(std::time::Duration::from_millis(10));
        let mut n: u64 = 0;
        while !stop.load(Ordering::Relaxed) {
            let (a, b, new) = (n * 37 % 14_000 + 1, n * 53 % 9_000 + 1, 100_000 + n * 2);
            let sql = format!(
                "BEGIN; UPDATE orders SET region = CASE region WHEN 'eu' THEN 'hidden' ELSE 'eu' END WHERE id IN ({a}, {a} + 1); \
                 UPDATE orders SET total = total + 1, note = 'hidden {n}' WHERE id BETWEEN {b} AND {b} + 5; \
                 INSERT INTO orders VALUES ({new}, 'eu', 1), ({new} + 1, 'hidden', 2); DELETE FROM orders WHERE id = {new} - 40; \
                 UPDATE ranged SET id = -id WHERE id = {a}; UPDATE ranged SET id = {new}, v = v || 'x' WHERE id = {b}; \
                 UPDATE ranged SET secret = 'hidden {n}' WHERE id = {a} + 2; DELETE FROM ranged WHERE id = {new} - 60; \
                 UPDATE parted SET id = id + 50000 WHERE id = {a}; UPDATE parted SET v = 'v{n}' WHERE id = {b}; \
                 UPDATE whole SET v = CASE WHEN v LIKE 'a%' THEN 'hidden' ELSE 'a' END || id WHERE id IN ({b}, {b} + 1); \
                 UPDATE whole SET id = id + 50000 WHERE id = {b} + 2; DELETE FROM whole WHERE id = {b} + 3; \
                 UPDATE plain SET v = '{n}'; COMMIT"
            );
            client.batch_execute(&sql).await.unwrap();
            n += 1;
            done.store(n, Ordering::Relaxed);
            pace.tick().await;
        }
    })
}

/// Compares both ends.
async fn verify(api: &Api) -> Value {
    let url = "/api/v2/changefeeds/f/verify";
    let mut told = api.post(url, &json!({})).await.unwrap();
    eventually("the comparison ends", async || {
        told = api.get(url).await.unwrap();
        told["ended"].is_string()
    })
    .await;
    assert_eq!(told["error"], Value::Null, "{told}");
    told["report"].clone()
}

async fn until_transactions(done: &AtomicU64, more: u64) {
    let least = done.load(Ordering::Relaxed) + more;
    eventually("the load goes on", async || done.load(Ordering::Relaxed) >= least).await;
}

/// A source under load, a target, and a server that replicates nothing yet.
struct Rig {
    source: PgServer,
    target: PgServer,
    millrace: Millrace,
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    work: tokio::task::JoinHandle<()>,
    _dir: tempfile::TempDir,
}

impl Rig {
    async fn start() -> Self {
        let (source, target) = servers().await;
        source.sql("postgres", SCHEMA).await.unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut millrace = Millrace::new(Path::new(env!("CARGO_BIN_EXE_millrace")), dir.path()).unwrap();
        millrace.start().await.unwrap();
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let work = load(&source, &stop, &done);
        Self { source, target, millrace, stop, done, work, _dir: dir }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
// behaviour: dataplane-P-3
async fn what_is_published_in_part_is_copied_followed_compared_and_copied_again_and_nothing_else_leaves() {
    let Rig { source, target, mut millrace, stop, done, work, _dir } = Rig::start().await;
    let api = millrace.api();
    until_transactions(&done, 5).await;
    let made = api.create("f", &source.uri("postgres"), &target.uri(TARGET), &config()).await.unwrap();
    let warnings = made["warnings"].to_string();
    assert!(warnings.contains("ddl.capture is off because of filter.publish"), "{warnings}");
    assert_eq!(made["config"]["ddl"]["capture"], "off");
    process_caught_up(&millrace, &source).await;
    let copy = api.get("/api/v2/changefeeds/f/progress").await.unwrap()["copy"].clone();
    for (table, ..) in &TABLES[..4] {
        let all = copy["tables"].as_array().unwrap();
        let told = all.iter().find(|told| told["table"] == format!("public.{table}")).unwrap();
        assert!(told["parts_total"].as_u64().unwrap() > 2, "{told}");
        // Not those of the table that are left out.
        let expected = told["rows_expected"].as_u64().unwrap();
        assert!(told["rows"].as_u64().unwrap() > 2000 && expected < 14_000, "{told}");
    }
    // In the middle of the stream.
    until_transactions(&done, 50).await;
    millrace.kill().unwrap();
    until_transactions(&done, 20).await;
    millrace.start().await.unwrap();
    // A column that nobody wants stops nothing.
    // In the order in which the load takes them.
    source.sql("postgres", "ALTER TABLE orders DROP COLUMN note; ALTER TABLE orders ADD COLUMN note text DEFAULT 'hidden'; ALTER TABLE ranged ADD COLUMN more int DEFAULT 7").await.unwrap();
    until_transactions(&done, 50).await;
    process_caught_up(&millrace, &source).await;
    let report = verify(&api).await;
    assert_eq!(report["outcome"], "equal", "while rows flow: {report}");
    assert_eq!(report["tables"].as_array().unwrap().len(), TABLES.len(), "{report}");

    // A table again, while rows flow.
    let damage = "UPDATE orders SET total = -1 WHERE id < 500; DELETE FROM orders WHERE id > 14000; \
                  INSERT INTO orders VALUES (-1, 'hidden', 0); DELETE FROM whole";
    target.sql(TARGET, damage).await.unwrap();
    for table in ["public.orders", "public.whole"] {
        api.post("/api/v2/changefeeds/f/resync_table", &json!({ "table": table })).await.unwrap();
        eventually("the table is copied again", async || {
            let list = api.get("/api/v2/changefeeds/f/resyncs").await.unwrap_or_default();
            let mut all = list["items"].as_array().into_iter().flatten();
            all.any(|one| one["table"] == table && one["state"] == "done")
        })
        .await;
    }
    stop.store(true, Ordering::Relaxed);
    work.await.unwrap();
    process_caught_up(&millrace, &source).await;
    assert_parts(&source, &target, "at the end").await;
    let report = verify(&api).await;
    assert_eq!(report["outcome"], "equal", "{report}");

    // The tables that the copy has made have what is listed, and indexes of that.
    let client = target.client(TARGET).await.unwrap();
    for (table, _, columns) in TABLES {
        let sql = "SELECT string_agg(attname::text, ',' ORDER BY attnum) FROM pg_attribute \
                   WHERE attrelid = $1::text::regclass AND attnum > 0 AND NOT attisdropped";
        let have: String = client.query_one(sql, &[&table]).await.unwrap().get(0);
        let (mut have, mut want): (Vec<&str>, Vec<&str>) =
            (have.split(',').collect(), columns.split(',').collect());
        have.sort_unstable();
        want.sort_unstable();
        assert_eq!(have, want, "{table}");
    }
    let sql =
        "SELECT string_agg(indexname, ',' ORDER BY indexname) FROM pg_indexes WHERE tablename = 'ranged'";
    let have: String = client.query_one(sql, &[]).await.unwrap().get(0);
    assert_eq!(have, "ranged_pkey,ranged_v_key,ranged_w");

    // What is planted is found: a row that the condition leaves out is one too many.
    let plant = "INSERT INTO orders VALUES (-2, 'hidden', 0); UPDATE whole SET v = 'hidden' WHERE id = (SELECT min(id) FROM whole); \
                 DELETE FROM ranged WHERE id = (SELECT max(id) FROM ranged); \
                 INSERT INTO parted SELECT 2500, 'left the filter'";
    target.sql(TARGET, plant).await.unwrap();
    let report = verify(&api).await;
    assert_eq!(report["outcome"], "different", "{report}");
    let differences = |table: &str| {
        let mut tables = report["tables"].as_array().unwrap().iter();
        tables.find(|told| told["source"] == format!("public.{table}")).unwrap()["differences"].clone()
    };
    let found = TABLES.map(|(table, ..)| differences(table));
    assert_eq!(found, [1, 1, 1, 1, 0].map(Value::from), "{report}");

    // The rules stay what they are, and nobody reads them in the log.
    api.pause("f").await.unwrap();
    eventually("it is stopped", async || {
        api.get("/api/v2/changefeeds/f").await.is_ok_and(|feed| feed["state"] == "stopped")
    })
    .await;
    let mut other = config();
    other["filter"]["publish"][3]["where"] = json!("v LIKE 'b%'");
    let refused = api.put("/api/v2/changefeeds/f", &json!({ "replica_config": other })).await.unwrap_err();
    let refused = format!("{refused:#}");
    assert!(
        refused.contains("filter.publish cannot be changed") && refused.contains("create it again"),
        "{refused}"
    );
    api.put("/api/v2/changefeeds/f", &json!({ "replica_config": config() })).await.unwrap();
    millrace.stop().await.unwrap();
    let log = std::fs::read_to_string(millrace.log_path()).unwrap();
    assert!(!log.contains("region =") && !log.contains("hidden") && !log.contains("LIKE"), "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
// behaviour: dataplane-P-3
async fn a_copy_in_part_that_is_killed_goes_on_while_rows_move_into_and_out_of_the_filters() {
    let Rig { source, target, mut millrace, stop, done, work, _dir } = Rig::start().await;
    let api = millrace.api();
    let mut config = config();
    config["initial_copy"]["parallel"] = json!(1);
    api.create("f", &source.uri("postgres"), &target.uri(TARGET), &config).await.unwrap();
    for least in [1000, 12_000] {
        eventually("parts are at the target", async || {
            let parts = "SELECT coalesce(sum(row_count), 0)::bigint FROM millrace.parts";
            let client = target.client(TARGET).await.unwrap();
            let rows: i64 = client.query_one(parts, &[]).await.map_or(0, |row| row.get(0));
            rows >= least
        })
        .await;
        millrace.kill().unwrap();
        until_transactions(&done, 10).await;
        millrace.start().await.unwrap();
    }
    until_transactions(&done, 30).await;
    stop.store(true, Ordering::Relaxed);
    work.await.unwrap();
    process_caught_up(&millrace, &source).await;
    assert_parts(&source, &target, "at the end").await;
    millrace.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
// behaviour: dataplane-P-4
async fn files_get_the_listed_columns_of_the_rows_that_the_filter_takes() {
    let source = PgServer::start().await.unwrap();
    let sql = "CREATE TABLE t (id int PRIMARY KEY, v text, secret text DEFAULT 'hidden'); \
               INSERT INTO t SELECT i, 'copied ' || i FROM generate_series(1, 100) i";
    source.sql("postgres", sql).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (node, client) = start(&dir.path().join("data")).await;
    let out = dir.path().join("out");
    let sink = format!("file://{}?protocol=canal-json&flush-interval=200ms", out.display());
    let part = json!({ "filter": { "publish": [
        { "matcher": ["public.t"], "columns": ["id", "v"], "where": "id % 10 = 0" }
    ]}});
    let mut captured = part.clone();
    captured["ddl"] = json!({ "capture": "on" });
    let refused = format!("{:#}", create(&client, &source, &sink, captured).await.unwrap_err());
    assert!(refused.contains("filter.publish") && refused.contains("set ddl.capture to"), "{refused}");
    let mut unknown = part.clone();
    unknown["filter"]["publish"][0]["columns"] = json!(["id", "nope"]);
    let refused = format!("{:#}", create(&client, &source, &sink, unknown).await.unwrap_err());
    assert!(refused.contains("CDC:ErrFilterRuleInvalid") && refused.contains("public.t"), "{refused}");
    create(&client, &source, &sink, part.clone()).await.unwrap();
    source.sql("postgres", "INSERT INTO t VALUES (200, 'streamed 200'), (201, 'streamed 201'); UPDATE t SET id = 300 WHERE id = 1").await.unwrap();
    let written = async || {
        let (mut text, mut open) = (String::new(), vec![out.clone()]);
        while let Some(dir) = open.pop() {
            for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
                if entry.path().is_dir() {
                    open.push(entry.path());
                } else {
                    text.push_str(&String::from_utf8_lossy(&std::fs::read(entry.path()).unwrap_or_default()));
                }
            }
        }
        text
    };
    let mut text = String::new();
    eventually("everything is written", async || {
        assert_ne!(state(&client).await, "failed");
        text = written().await;
        text.contains("copied 100") && text.contains("streamed 200") && text.contains("\"300\"")
    })
    .await;
    assert!(text.contains("copied 10\"") && !text.contains("copied 11"), "{text}");
    assert!(!text.contains("streamed 201") && !text.contains("hidden") && !text.contains("secret"), "{text}");
    let generated = json!({ "changefeed_id": "g", "sink_uri": "blackhole://", "upstream": { "uri": "generator://bank" }, "replica_config": part });
    let refused = format!("{:#}", client.post("/api/v2/changefeeds", &generated).await.unwrap_err());
    assert!(refused.contains("only a PostgreSQL source"), "{refused}");
    node.stop().await.unwrap();
}
