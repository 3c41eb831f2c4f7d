//! The initial copy while the source changes, without it, and beginnings at a position.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use node::cli::Client;
use serde_json::{Value, json};
use testkit::{Load, Millrace, PgServer, compare, load};

use crate::common::{
    TARGET, assert_same, caught_up, checkpoint, create, eventually, position, servers, start, state,
};

/// Often enough to see a copy grow.
const LOOK: Duration = Duration::from_millis(5);
const PATIENCE: Duration = Duration::from_secs(300);
/// Rows of the tables that the load changes.
const ROWS: u64 = 20_000;
/// Rows of the table that nobody changes.
const QUIET: i64 = 60_000;

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

/// Lets the target note every row of the table that nobody changes, which has these columns, also rows that are cleared later.
async fn watch_quiet(target: &PgServer, columns: &str) {
    let watch = format!(
        "CREATE TABLE quiet ({columns}); CREATE TABLE seen (id int); \
         CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS \
         $$ BEGIN INSERT INTO public.seen VALUES (NEW.id); RETURN NEW; END $$; \
         CREATE TRIGGER note AFTER INSERT ON quiet FOR EACH ROW EXECUTE FUNCTION note(); \
         ALTER TABLE quiet ENABLE ALWAYS TRIGGER note"
    );
    target.sql(TARGET, &watch).await.unwrap();
}

/// Waits until parts with so many rows are at the target while the copy goes on, and answers with how many.
async fn until_parts(target: &PgServer, least: i64) -> i64 {
    let mut rows = 0;
    eventually("parts of this run are at the target", async || {
        let parts = "SELECT coalesce(sum(row_count), 0)::bigint FROM millrace.parts";
        let client = target.client(TARGET).await.unwrap();
        rows = client.query_one(parts, &[]).await.map_or(0, |row| row.get(0));
        rows >= least
    })
    .await;
    rows
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
    watch_quiet(&target, "id int PRIMARY KEY, v text").await;
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
async fn a_copy_that_is_killed_goes_on_where_it_was_while_rows_change() {
    let (source, target) = servers().await;
    prepare(&source).await;
    watch_quiet(&target, "id int PRIMARY KEY, v text").await;
    let dir = tempfile::tempdir().unwrap();
    let mut millrace = Millrace::new(Path::new(env!("CARGO_BIN_EXE_millrace")), dir.path()).unwrap();
    millrace.start().await.unwrap();
    let api = millrace.api();
    let work = Load::start(&source, "postgres", 8, 3, 150, ROWS).await.unwrap();
    let config = json!({ "force_replicate": true, "initial_copy": { "parallel": 1, "part_bytes": 65536 } });
    let feed = api.create("f", &source.uri("postgres"), &target.uri(TARGET), &config).await.unwrap();
    let begin = feed["start_ts"].as_u64().unwrap();
    // In the table that nobody changes, and in those that everybody changes.
    for least in [QUIET / 8, QUIET / 2, QUIET + 1000] {
        let rows = until_parts(&target, least).await;
        assert_eq!(api.progress("f").await.unwrap().checkpoint, begin, "the copy is over with {rows} rows");
        millrace.kill().unwrap();
        println!("killed when {rows} rows were there");
        millrace.start().await.unwrap();
    }
    eventually("the copy is complete", async || api.progress("f").await.unwrap().checkpoint > begin).await;
    work.stop().await.unwrap();
    let end = position(&source.client("postgres").await.unwrap()).await;
    let deadline = Instant::now() + PATIENCE;
    while api.progress("f").await.unwrap().checkpoint < end {
        assert!(Instant::now() < deadline, "not everything comes downstream: {}", millrace.log_tail(40));
        tokio::time::sleep(LOOK).await;
    }
    assert_equal(&source, &target).await;
    assert_eq!(quiet_writes(&target).await, QUIET, "what was copied was not copied again");
    let left =
        "SELECT count(*), count(*) FILTER (WHERE NOT finished) FROM millrace.parts WHERE table_id <> 0";
    let left = target.client(TARGET).await.unwrap().query_one(left, &[]).await.unwrap();
    assert_eq!((left.get::<_, i64>(0), left.get::<_, i64>(1)), (8, 0), "one note for each table");
    millrace.stop().await.unwrap();
}

/// Rows of tables whose values lie outside of them.
const WIDE: i64 = 4_000;

// behaviour: dataplane-14
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_is_killed_goes_on_though_the_log_leaves_values_out_and_copies_again_what_it_lacks() {
    let (source, target) = servers().await;
    // Even keys, so that there is room between them.
    let wide = |name: &str| {
        format!(
            "CREATE TABLE {name} (id int PRIMARY KEY, n int DEFAULT 0, body text); \
             ALTER TABLE {name} ALTER body SET STORAGE EXTERNAL; \
             INSERT INTO {name} SELECT i * 2, 0, repeat(md5(i::text), 100) FROM generate_series(1, {WIDE}) i; "
        )
    };
    source.sql("postgres", &format!("{} {} ANALYZE", wide("quiet"), wide("moved"))).await.unwrap();
    watch_quiet(&target, "id int PRIMARY KEY, n int, body text").await;
    let dir = tempfile::tempdir().unwrap();
    let mut millrace = Millrace::new(Path::new(env!("CARGO_BIN_EXE_millrace")), dir.path()).unwrap();
    millrace.start().await.unwrap();
    let api = millrace.api();
    let config = json!({ "initial_copy": { "parallel": 1, "part_bytes": 65536 } });
    api.create("f", &source.uri("postgres"), &target.uri(TARGET), &config).await.unwrap();
    // In the midst of either table, whichever is first.
    for least in [WIDE / 2, WIDE + WIDE / 2] {
        let rows = until_parts(&target, least).await;
        millrace.kill().unwrap();
        println!("killed when {rows} rows were there");
        // A row goes to a part that was copied, and one comes from there; the others stay and leave their values alone.
        let (round, last) = (least / WIDE * 10, 2 * WIDE - least / WIDE * 10);
        let changes = format!(
            "UPDATE moved SET id = {0} WHERE id = {last}; UPDATE moved SET id = {last} - 1 WHERE id = {1}; \
             UPDATE quiet SET n = n + 1; UPDATE moved SET n = n + 1",
            round + 3,
            round + 6,
        );
        source.sql("postgres", &changes).await.unwrap();
        millrace.start().await.unwrap();
    }
    let again = "SELECT string_agg(name || ' ' || state, ',') FROM millrace.resyncs";
    eventually("the table whose row lacks a value is copied again", async || {
        let client = target.client(TARGET).await.unwrap();
        let row = client.query_one(again, &[]).await;
        row.is_ok_and(|row| row.get::<_, Option<&str>>(0) == Some("public.moved done"))
    })
    .await;
    source.sql("postgres", "UPDATE moved SET n = n + 1; UPDATE quiet SET n = n + 1").await.unwrap();
    let end = position(&source.client("postgres").await.unwrap()).await;
    eventually("everything comes downstream", async || api.progress("f").await.unwrap().checkpoint >= end)
        .await;
    let (from, to) = (source.client("postgres").await.unwrap(), target.client(TARGET).await.unwrap());
    let comparison = compare(&from, &to, &["quiet", "moved"]).await.unwrap();
    assert!(comparison.equal(), "{comparison}");
    assert_eq!(quiet_writes(&target).await, WIDE, "what was copied was not copied again");
    millrace.stop().await.unwrap();
}

/// Tables that are divided in every way, each large enough for several parts.
const DIVISIONS: &[(&str, &str)] = &[
    (
        "by_int",
        "CREATE TABLE by_int (id int PRIMARY KEY, b bool, f float8, n numeric, t timestamptz, j jsonb, a int[], x bytea); \
                INSERT INTO by_int SELECT i, i % 3 = 0, i / 7.0, i / 3::numeric, now() + i * interval '1 s', \
                  jsonb_build_object('i', i), ARRAY[i, NULL], decode(md5(i::text), 'hex') FROM generate_series(-9000, 9000) i",
    ),
    (
        "by_pair",
        "CREATE TABLE by_pair (d date, n numeric(12, 3), v text, PRIMARY KEY (d, n)); \
                 INSERT INTO by_pair SELECT '2020-01-01'::date + i / 100, -i / 8.0, E'tab\\t\\\\' || i FROM generate_series(1, 12000) i",
    ),
    (
        "by_page",
        "CREATE TABLE by_page (id uuid PRIMARY KEY, v text); \
                 INSERT INTO by_page SELECT gen_random_uuid(), md5(i::text) FROM generate_series(1, 12000) i",
    ),
    (
        "by_name",
        "CREATE TABLE by_name (name text PRIMARY KEY, v int); \
                 INSERT INTO by_name SELECT md5(i::text), i FROM generate_series(1, 12000) i",
    ),
    (
        "loose",
        "CREATE TABLE loose (v text, n int); ALTER TABLE loose REPLICA IDENTITY FULL; \
               INSERT INTO loose SELECT repeat('x', 50), i % 100 FROM generate_series(1, 12000) i",
    ),
    (
        "two_keys",
        "CREATE TABLE two_keys (id int PRIMARY KEY, u int UNIQUE, v text); \
                  INSERT INTO two_keys SELECT i, -i, md5(i::text) FROM generate_series(1, 12000) i",
    ),
    (
        "parted",
        "CREATE TABLE parted (id int PRIMARY KEY, v text) PARTITION BY RANGE (id); \
                CREATE TABLE parted_a PARTITION OF parted FOR VALUES FROM (MINVALUE) TO (3000); \
                CREATE TABLE parted_b PARTITION OF parted FOR VALUES FROM (3000) TO (MAXVALUE); \
                INSERT INTO parted SELECT i, md5(i::text) FROM generate_series(1, 12000) i",
    ),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_is_divided_in_any_way_arrives_whole_and_tells_how_far_it_is() {
    let (source, target) = servers().await;
    for (_, sql) in DIVISIONS {
        source.sql("postgres", sql).await.unwrap();
    }
    let others = "CREATE TABLE small (id int PRIMARY KEY, big text); INSERT INTO small VALUES (1, repeat('long ', 300000)); \
                  CREATE TABLE nothing (id int PRIMARY KEY); \
                  CREATE TABLE made (id int PRIMARY KEY, twice int GENERATED ALWAYS AS (id * 2) STORED); \
                  INSERT INTO made SELECT generate_series(1, 10); ANALYZE";
    source.sql("postgres", others).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (node, client) = start(dir.path()).await;
    let config = json!({ "force_replicate": true, "initial_copy": { "parallel": 4, "part_bytes": 65536 } });
    create(&client, &source, &target.uri(TARGET), config).await.unwrap();
    caught_up(&client, &source).await;
    let copy = progress(&client).await["copy"].clone();
    for (table, _) in DIVISIONS {
        assert_same(&source, &target, table, "copied").await;
        let all = copy["tables"].as_array().unwrap();
        let told = all.iter().find(|told| told["table"] == format!("public.{table}")).unwrap();
        assert!(told["parts_total"].as_u64().unwrap() > 2, "{told}");
        assert_eq!((&told["parts_done"], &told["state"]), (&told["parts_total"], &json!("done")), "{told}");
        assert_eq!(told["rows"], told["rows_expected"], "{told}");
    }
    for table in ["small", "nothing", "made"] {
        assert_same(&source, &target, table, "copied").await;
    }
    assert_eq!(copy["tables_done"], DIVISIONS.len() + 3);
    assert_eq!(copy["remaining_seconds"], 0);
    assert!(
        copy["rows_per_second"].as_f64().unwrap() > 0.0 && copy["bytes"].as_u64().unwrap() > 1 << 20,
        "{copy}"
    );
    // The stream goes on behind it, in every table.
    source
        .sql(
            "postgres",
            "UPDATE by_int SET f = 1 WHERE id % 10 = 0; DELETE FROM by_pair WHERE n < -1000; UPDATE by_page SET v = 'new'; \
             DELETE FROM by_name WHERE v % 2 = 0; DELETE FROM loose WHERE n = 7; UPDATE two_keys SET u = u - 20000; \
             UPDATE parted SET id = id + 100000 WHERE id % 5 = 0",
        )
        .await
        .unwrap();
    caught_up(&client, &source).await;
    for (table, _) in DIVISIONS {
        assert_same(&source, &target, table, "changed").await;
    }
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
            "upstream": { "uri": source.uri("postgres") },
            // What follows schema changes is installed before there is a slot, and moves the log.
            "replica_config": { "initial_copy": { "enabled": copy }, "ddl": { "capture": "off" } },
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
