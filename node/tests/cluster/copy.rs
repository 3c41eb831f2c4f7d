//! An initial copy whose parts are written by the nodes that own the spans, also when one of them is lost on the way.

use serde_json::{Value, json};

use crate::common::{Cluster, TARGET, copying, eventually, until};

/// Rows of each of the tables that are copied in parts.
const ROWS: i64 = 6_000;
const TABLES: [&str; 4] = ["parts.t1", "parts.t2", "parts.t3", "parts.t4"];

/// Tables with a key, and one that is divided by pages.
fn tables() -> String {
    let table = |(number, name): (usize, &&str)| {
        let key = if number == 3 { "md5(i::text)::uuid" } else { "i" };
        let of = if number == 3 { "uuid" } else { "bigint" };
        format!(
            "CREATE TABLE {name} (id {of} PRIMARY KEY, v text); \
             INSERT INTO {name} SELECT {key}, repeat(md5(i::text), 8) FROM generate_series(1, {ROWS}) i;"
        )
    };
    format!("CREATE SCHEMA parts; {} ANALYZE", TABLES.iter().enumerate().map(table).collect::<String>())
}

/// The same tables, where every row that is ever committed is counted and a part takes its time.
fn slow_tables() -> String {
    let table = |(number, name): (usize, &&str)| {
        let of = if number == 3 { "uuid" } else { "bigint" };
        format!(
            "CREATE TABLE {name} (id {of} PRIMARY KEY, v text); \
             CREATE TRIGGER slow BEFORE INSERT ON {name} FOR EACH STATEMENT EXECUTE FUNCTION parts.wait(); \
             CREATE TRIGGER seen AFTER INSERT ON {name} REFERENCING NEW TABLE AS new_rows \
                 FOR EACH STATEMENT EXECUTE FUNCTION parts.note(); \
             ALTER TABLE {name} ENABLE ALWAYS TRIGGER slow; ALTER TABLE {name} ENABLE ALWAYS TRIGGER seen;"
        )
    };
    format!(
        "CREATE SCHEMA parts; CREATE TABLE parts.seen (name text, rows bigint); \
         CREATE FUNCTION parts.wait() RETURNS trigger LANGUAGE plpgsql AS \
             $$ BEGIN PERFORM pg_sleep(0.1); RETURN NULL; END $$; \
         CREATE FUNCTION parts.note() RETURNS trigger LANGUAGE plpgsql AS \
             $$ BEGIN INSERT INTO parts.seen SELECT TG_TABLE_NAME, count(*) FROM new_rows; RETURN NULL; END $$; {}",
        TABLES.iter().enumerate().map(table).collect::<String>()
    )
}

fn config() -> Value {
    let mut config = copying();
    config["initial_copy"]["part_bytes"] = json!(65_536);
    config["initial_copy"]["parallel"] = json!(4);
    config["filter"] = json!({ "rules": ["parts.*"] });
    config
}

/// Parts that a node has written for another one.
async fn written_by(cluster: &Cluster, at: usize) -> u64 {
    let text = cluster.nodes[at].api().metrics().await.unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("ticdc_event_service_copied_part_count"));
    line.and_then(|rest| rest.trim().parse().ok()).unwrap_or(0)
}

/// Everything is at the target, and what can go on in another snapshot was written there once: `in_one`, all of it was read
/// in one.
async fn is_complete(cluster: &Cluster, in_one: bool) {
    cluster.caught_up().await;
    for table in TABLES {
        cluster.same(table).await;
    }
    let target = cluster.target.client(TARGET).await.unwrap();
    let seen = "SELECT name, sum(rows)::bigint FROM parts.seen GROUP BY name ORDER BY name";
    for row in target.query(seen, &[]).await.unwrap() {
        let (name, rows): (String, i64) = (row.get(0), row.get(1));
        // The last one is divided by pages, and begins anew in another snapshot.
        assert!(rows == ROWS || name == "t4" && !in_one, "{rows} rows were committed to {name}");
    }
    let left = "SELECT count(*) FILTER (WHERE finished), count(*) FROM millrace.parts WHERE table_id <> 0";
    let left = target.query_one(left, &[]).await.unwrap();
    assert_eq!((left.get::<_, i64>(0), left.get::<_, i64>(1)), (4, 4), "one note for each table");
    let writers = "SELECT count(*) FROM millrace.writers WHERE node LIKE '%/copy%'";
    let writers = target.query_one(writers, &[]).await.unwrap();
    assert_eq!(writers.get::<_, i64>(0), 0, "nobody may copy any more");
}

async fn begin(nodes: usize) -> (Cluster, usize) {
    let cluster = Cluster::start(nodes, "").await;
    cluster.source.sql("postgres", &tables()).await.unwrap();
    cluster.target.sql(TARGET, &slow_tables()).await.unwrap();
    cluster.create(0, &config()).await;
    let reader = cluster.maintainer().await;
    (cluster, reader)
}

// behaviour: dataplane-13
#[tokio::test(flavor = "multi_thread")]
async fn parts_are_written_by_the_nodes_that_own_their_spans() {
    let (cluster, reader) = begin(3).await;
    is_complete(&cluster, true).await;
    let mut counts = Vec::new();
    for at in 0..3 {
        counts.push(written_by(&cluster, at).await);
    }
    println!("node {reader} reads the log; parts that were written for it: {counts:?}");
    assert_eq!(counts[reader], 0);
    assert!(counts.iter().enumerate().all(|(at, count)| at == reader || *count > 0), "{counts:?}");
}

/// Waits until a node that does not read the log has written parts, and answers it.
async fn helper(cluster: &Cluster, reader: usize) -> usize {
    until("another node writes parts", async || {
        for at in (0..cluster.nodes.len()).filter(|at| *at != reader) {
            if written_by(cluster, at).await > 1 {
                return Some(at);
            }
        }
        None
    })
    .await
}

// behaviour: dataplane-13
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_killed_while_it_writes_parts_is_replaced() {
    let (mut cluster, reader) = begin(3).await;
    let helper = helper(&cluster, reader).await;
    cluster.nodes[helper].kill().unwrap();
    is_complete(&cluster, true).await;
    assert_eq!(cluster.maintainer().await, reader, "it went on");
}

// behaviour: dataplane-13
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_falls_asleep_while_it_writes_parts_writes_nothing_when_it_wakes() {
    let (mut cluster, reader) = begin(3).await;
    let helper = helper(&cluster, reader).await;
    cluster.nodes[helper].signal("STOP").unwrap();
    cluster.asleep = Some(helper);
    is_complete(&cluster, true).await;
    // It ends, since others have its work.
    cluster.nodes[helper].signal("CONT").unwrap();
    eventually("it has found out that it was away", async || {
        cluster.nodes[helper].log_tail(400).contains("this node may not go on")
    })
    .await;
    is_complete(&cluster, true).await;
}

// behaviour: dataplane-13
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_is_killed_leaves_its_parts_to_the_next_one() {
    let (mut cluster, reader) = begin(3).await;
    helper(&cluster, reader).await;
    cluster.nodes[reader].kill().unwrap();
    is_complete(&cluster, false).await;
}
