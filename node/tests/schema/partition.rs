//! Partitions, and a target that divides the table in the same way, otherwise, or not at all.

use serde_json::json;

use crate::common::{Rig, TARGET, config, list};

/// A source that divides a table by its key in tens, with thirty rows.
const DIVIDED: &str = "CREATE SCHEMA app; CREATE TABLE app.p (id int PRIMARY KEY, v text) PARTITION BY RANGE (id); \
    CREATE TABLE app.p1 PARTITION OF app.p FOR VALUES FROM (0) TO (10); \
    CREATE TABLE app.p2 PARTITION OF app.p FOR VALUES FROM (10) TO (20); \
    CREATE TABLE app.p3 PARTITION OF app.p FOR VALUES FROM (20) TO (30)";
const ROWS: &str = "INSERT INTO app.p SELECT i, 'v' FROM generate_series(0, 29) i";
/// What the code of a changefeed says that the target cannot follow.
const CANNOT: &str = "CDC:ErrDDLUnsupported";

/// The rows of a table are the same at both ends.
async fn same_rows(rig: &Rig, tables: &[&str], after: &str) {
    for table in tables {
        let sql = format!("SELECT t::text FROM {table} t ORDER BY 1");
        let (here, there) =
            (list(&rig.source, "postgres", &sql).await, list(&rig.target, TARGET, &sql).await);
        assert_eq!(here, there, "{table} after {after}\n{}", rig.millrace.log_tail(20));
    }
}

/// Whether the target has a relation.
async fn is_there(rig: &Rig, name: &str) -> bool {
    let sql = format!("SELECT (pg_catalog.to_regclass('{name}') IS NOT NULL)::text");
    list(&rig.target, TARGET, &sql).await == ["true"]
}

/// A changefeed of thirty rows to a target with these tables, or none.
async fn divided(target: &str) -> Rig {
    let rig = Rig::start().await;
    rig.run(DIVIDED).await;
    rig.run(ROWS).await;
    rig.target.sql(TARGET, target).await.unwrap();
    rig.feed(config()).await;
    rig
}

/// The changefeed stops; a person sees to the target, has it go on without the change, and sets the policy back.
async fn goes_on_without(rig: &Rig, key: &str, words: &[&str], by_hand: &str) {
    let named = format!("set ddl.{} to \"ignore\"", key.replace('_', "-"));
    rig.fails(CANNOT, &[words, &[&named]].concat()).await;
    rig.target.sql(TARGET, by_hand).await.unwrap();
    for policy in ["ignore", "apply"] {
        let mut config = config();
        config["ddl"][key] = json!(policy);
        rig.goes_on(&config).await;
        rig.caught_up(policy).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_does_not_divide_the_table_has_the_same_rows() {
    let mut rig = divided("SELECT 1").await;
    rig.run("INSERT INTO app.p VALUES (5, 'again') ON CONFLICT (id) DO UPDATE SET v = excluded.v; DROP TABLE app.p1")
        .await;
    rig.run("ALTER TABLE app.p DETACH PARTITION app.p2; UPDATE app.p2 SET v = 'alone' WHERE id = 12").await;
    rig.caught_up("two partitions went").await;
    same_rows(&rig, &["app.p", "app.p2"], "two partitions went").await;
    rig.run("CREATE TABLE app.p5 PARTITION OF app.p FOR VALUES FROM (40) TO (50); INSERT INTO app.p VALUES (41, 'new')")
        .await;
    rig.run("CREATE TABLE app.p4 (LIKE app.p INCLUDING ALL); ALTER TABLE app.p ATTACH PARTITION app.p4 FOR VALUES FROM (30) TO (40)")
        .await;
    rig.run("INSERT INTO app.p4 VALUES (33, 'below'); UPDATE app.p SET v = 'moved', id = 34 WHERE id = 41")
        .await;
    rig.caught_up("an empty table was attached").await;
    same_rows(&rig, &["app.p", "app.p2"], "an empty table was attached").await;
    assert!(!is_there(&rig, "app.p4").await && !is_there(&rig, "app.p5").await, "its rows are in the whole");
    // Beside a default partition, what that takes depends on the others.
    rig.run("CREATE TABLE app.rest PARTITION OF app.p DEFAULT; INSERT INTO app.p VALUES (100, 'rest'), (65, 'rest')").await;
    rig.run("DELETE FROM app.p WHERE id = 65; CREATE TABLE app.p6 PARTITION OF app.p FOR VALUES FROM (60) TO (70); \
        INSERT INTO app.p VALUES (66, 'six')")
        .await;
    rig.run("DROP TABLE app.rest").await;
    rig.caught_up("the default partition went").await;
    same_rows(&rig, &["app.p"], "the default partition went").await;
    rig.run("ALTER TABLE app.p2 ADD COLUMN more int; ALTER TABLE app.p ADD COLUMN more int").await;
    rig.run("ALTER TABLE app.p ATTACH PARTITION app.p2 FOR VALUES FROM (10) TO (20)").await;
    goes_on_without(
        &rig,
        "other",
        &["does not divide", "app", "p2"],
        "INSERT INTO app.p SELECT * FROM app.p2; DROP TABLE app.p2",
    )
    .await;
    rig.run("UPDATE app.p SET v = 'together' WHERE id = 12; DROP TABLE app.p6").await;
    rig.caught_up("it went on").await;
    same_rows(&rig, &["app.p"], "it went on").await;
    rig.millrace.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_divides_the_table_otherwise_has_the_same_rows() {
    // Its parts have the names of the source's, and other rows.
    let mut rig = divided(
        "CREATE SCHEMA app; CREATE TABLE app.p (id int PRIMARY KEY, v text) PARTITION BY RANGE (id); \
         CREATE TABLE app.p1 PARTITION OF app.p FOR VALUES FROM (0) TO (15); \
         CREATE TABLE app.p2 PARTITION OF app.p FOR VALUES FROM (15) TO (45); \
         CREATE TABLE app.p3 PARTITION OF app.p FOR VALUES FROM (60) TO (100)",
    )
    .await;
    same_rows(&rig, &["app.p"], "the copy").await;
    rig.run("TRUNCATE app.p2; INSERT INTO app.p VALUES (17, 'later')").await;
    rig.run("CREATE TABLE app.p5 PARTITION OF app.p FOR VALUES FROM (40) TO (50); INSERT INTO app.p VALUES (44, 'fits')").await;
    rig.run("CREATE TABLE app.p6 PARTITION OF app.p FOR VALUES FROM (50) TO (60); INSERT INTO app.p VALUES (55, 'new')").await;
    rig.run("CREATE TABLE app.p4 (LIKE app.p INCLUDING ALL); ALTER TABLE app.p ATTACH PARTITION app.p4 FOR VALUES FROM (30) TO (40)").await;
    rig.run("INSERT INTO app.p4 VALUES (31, 'attached'); DROP TABLE app.p1").await;
    rig.caught_up("partitions came and went").await;
    same_rows(&rig, &["app.p"], "partitions came and went").await;
    assert!(
        is_there(&rig, "app.p1").await && is_there(&rig, "app.p6").await,
        "p1 has other rows, p6 has room"
    );
    assert!(!is_there(&rig, "app.p5").await && !is_there(&rig, "app.p4").await, "their rows have a place");
    // The name is taken at the target.
    rig.run("ALTER TABLE app.p DETACH PARTITION app.p3; DELETE FROM app.p3 WHERE id > 27; ALTER TABLE app.p3 RENAME TO old3")
        .await;
    rig.fails(CANNOT, &["another relation", "p3", "rename it"]).await;
    rig.target
        .sql(TARGET, "ALTER TABLE app.p3 RENAME TO far; ALTER INDEX app.p3_pkey RENAME TO far_pkey")
        .await
        .unwrap();
    rig.api.resume("f").await.unwrap();
    rig.until("it runs", |feed| feed["state"] == "normal").await;
    rig.caught_up("the name is free").await;
    same_rows(&rig, &["app.p", "app.old3"], "the name is free").await;
    rig.millrace.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_divides_by_hash_takes_rows_wherever_they_belong_there() {
    let mut rig = divided(
        "CREATE SCHEMA app; CREATE TABLE app.p (id int PRIMARY KEY, v text) PARTITION BY HASH (id); \
         CREATE TABLE app.p1 PARTITION OF app.p FOR VALUES WITH (MODULUS 2, REMAINDER 0); \
         CREATE TABLE app.odd PARTITION OF app.p FOR VALUES WITH (MODULUS 2, REMAINDER 1)",
    )
    .await;
    rig.run("DROP TABLE app.p1; TRUNCATE app.p2; INSERT INTO app.p VALUES (12, 'again')").await;
    rig.run("CREATE TABLE app.p4 PARTITION OF app.p FOR VALUES FROM (30) TO (40); INSERT INTO app.p VALUES (33, 'new')").await;
    rig.run("ALTER TABLE app.p DETACH PARTITION app.p3; UPDATE app.p3 SET v = 'alone'").await;
    rig.caught_up("partitions came and went").await;
    same_rows(&rig, &["app.p", "app.p3"], "partitions came and went").await;
    rig.run("ALTER TABLE app.p ATTACH PARTITION app.p3 FOR VALUES FROM (20) TO (30)").await;
    let by_hand = "INSERT INTO app.p SELECT * FROM app.p3; DROP TABLE app.p3";
    goes_on_without(&rig, "other", &["does not divide", "p3"], by_hand).await;
    rig.run("UPDATE app.p SET v = 'together' WHERE id = 25").await;
    rig.caught_up("it went on").await;
    same_rows(&rig, &["app.p"], "it went on").await;
    rig.millrace.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn truncating_one_partition_reaches_every_target() {
    let same = "CREATE SCHEMA app; CREATE TABLE app.p (id int PRIMARY KEY, v text) PARTITION BY RANGE (id); \
        CREATE TABLE app.p1 PARTITION OF app.p FOR VALUES FROM (0) TO (10); \
        CREATE TABLE app.p2 PARTITION OF app.p FOR VALUES FROM (10) TO (20); \
        CREATE TABLE app.p3 PARTITION OF app.p FOR VALUES FROM (20) TO (30)";
    for target in ["SELECT 1", same] {
        let mut rig = divided(target).await;
        rig.run("TRUNCATE app.p1").await;
        rig.caught_up("one partition").await;
        same_rows(&rig, &["app.p"], "one partition").await;
        // Between rows of its transaction, in one that is rolled back, and together with others.
        rig.run(
            "BEGIN; INSERT INTO app.p VALUES (1, 'goes'); UPDATE app.p SET v = 'goes' WHERE id = 11; TRUNCATE app.p1, app.p2; \
             INSERT INTO app.p VALUES (1, 'stays'), (2, 'stays'); TRUNCATE app.p2; INSERT INTO app.p VALUES (12, 'stays'); COMMIT",
        )
        .await;
        rig.run(
            "BEGIN; TRUNCATE app.p3; ROLLBACK; BEGIN; SAVEPOINT s; TRUNCATE app.p3; ROLLBACK TO s; COMMIT",
        )
        .await;
        rig.caught_up("two partitions").await;
        same_rows(&rig, &["app.p"], "two partitions").await;
        // Partitions that came later, one with partitions of its own.
        rig.run(
            "CREATE TABLE app.p4 PARTITION OF app.p FOR VALUES FROM (30) TO (50) PARTITION BY RANGE (id)",
        )
        .await;
        rig.run("CREATE TABLE app.p4a PARTITION OF app.p4 FOR VALUES FROM (30) TO (40)").await;
        rig.run("CREATE TABLE app.p4b (id int PRIMARY KEY, v text); ALTER TABLE app.p4 ATTACH PARTITION app.p4b FOR VALUES FROM (40) TO (50)")
            .await;
        rig.run("INSERT INTO app.p SELECT i, 'w' FROM generate_series(30, 49) i").await;
        rig.run("TRUNCATE app.p4b; INSERT INTO app.p VALUES (45, 'x')").await;
        rig.caught_up("a partition of a partition").await;
        same_rows(&rig, &["app.p"], "a partition of a partition").await;
        rig.run("TRUNCATE app.p4; INSERT INTO app.p VALUES (46, 'y')").await;
        rig.caught_up("a partition with partitions").await;
        same_rows(&rig, &["app.p"], "a partition with partitions").await;
        // The whole table is in the log itself, and its partitions say nothing about it.
        let told = "SELECT count(*)::text FROM millrace_capture.changes WHERE class = 'truncate'";
        let before = list(&rig.source, "postgres", told).await;
        rig.run("TRUNCATE app.p; INSERT INTO app.p VALUES (3, 'z'), (47, 'z')").await;
        assert_eq!(list(&rig.source, "postgres", told).await, before, "the root speaks for them");
        rig.run("TRUNCATE app.p4a").await;
        rig.caught_up("the whole table").await;
        same_rows(&rig, &["app.p"], "the whole table").await;
        rig.millrace.stop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn truncating_a_partition_obeys_the_policy_and_hash_partitions_say_what_to_do() {
    let mut rig = divided("SELECT 1").await;
    rig.run(
        "CREATE TABLE app.h (id int PRIMARY KEY) PARTITION BY HASH (id); \
         CREATE TABLE app.h0 PARTITION OF app.h FOR VALUES WITH (MODULUS 2, REMAINDER 0); \
         CREATE TABLE app.h1 PARTITION OF app.h FOR VALUES WITH (MODULUS 2, REMAINDER 1); \
         INSERT INTO app.h SELECT generate_series(1, 20)",
    )
    .await;
    // This one came as it is.
    rig.run("TRUNCATE app.h0").await;
    rig.caught_up("a hash partition that the target has").await;
    same_rows(&rig, &["app.h", "app.h1"], "a hash partition that the target has").await;
    let mut strict = config();
    strict["ddl"]["truncate_table"] = json!("fail");
    rig.goes_on(&strict).await;
    rig.run("TRUNCATE app.p2").await;
    rig.fails("CDC:ErrSchemaChangeUnsupported", &["app.p2", "ddl.truncate-table"]).await;
    assert_eq!(list(&rig.target, TARGET, "SELECT count(*)::text FROM app.p").await, ["30"]);
    rig.millrace.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hash_partition_that_the_target_does_not_have_stops_the_changefeed_until_its_rows_are_removed() {
    let mut rig = Rig::start().await;
    rig.run(
        "CREATE SCHEMA app; CREATE TABLE app.h (id int PRIMARY KEY) PARTITION BY HASH (id); \
         CREATE TABLE app.h0 PARTITION OF app.h FOR VALUES WITH (MODULUS 2, REMAINDER 0); \
         CREATE TABLE app.h1 PARTITION OF app.h FOR VALUES WITH (MODULUS 2, REMAINDER 1); \
         INSERT INTO app.h SELECT generate_series(1, 20)",
    )
    .await;
    rig.feed(config()).await;
    let gone = list(&rig.source, "postgres", "SELECT id::text FROM app.h0").await.join(", ");
    rig.run("TRUNCATE app.h0").await;
    goes_on_without(
        &rig,
        "truncate_table",
        &["hash", "h0", "remove them"],
        &format!("DELETE FROM app.h WHERE id IN ({gone})"),
    )
    .await;
    rig.run("INSERT INTO app.h VALUES (100)").await;
    rig.caught_up("it went on").await;
    same_rows(&rig, &["app.h"], "it went on").await;
    rig.millrace.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn truncations_of_partitions_are_executed_once_although_the_node_is_killed() {
    let mut rig = Rig::start().await;
    rig.run(DIVIDED).await;
    rig.run(ROWS).await;
    // Without a key a row that came twice would be there twice.
    rig.run("CREATE TABLE app.loose (id int, v text); ALTER TABLE app.loose REPLICA IDENTITY FULL").await;
    let mut config = config();
    config["force_replicate"] = json!(true);
    rig.feed(config).await;
    let mut random = testkit::Random::new(5, 0);
    for round in 0..8 {
        rig.run(&format!(
            "BEGIN; INSERT INTO app.p VALUES (1, 'goes {round}') ON CONFLICT (id) DO UPDATE SET v = excluded.v; \
             INSERT INTO app.loose VALUES ({round}, 'before'); TRUNCATE app.p1; \
             INSERT INTO app.p VALUES (2, 'stays {round}'); INSERT INTO app.loose VALUES ({round}, 'after'); COMMIT"
        ))
        .await;
        if round % 2 == 1 {
            tokio::time::sleep(std::time::Duration::from_millis(random.between(0, 200))).await;
            rig.millrace.kill().unwrap();
            rig.millrace.start().await.unwrap();
        }
    }
    rig.caught_up("the last round").await;
    same_rows(&rig, &["app.p", "app.loose"], "the last round").await;
    rig.millrace.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_writes_a_partition_does_not_prevent_a_changefeed_and_is_not_held_up() {
    let mut rig = Rig::start().await;
    rig.run(DIVIDED).await;
    let writer = rig.source.client("postgres").await.unwrap();
    writer.batch_execute("BEGIN; INSERT INTO app.p VALUES (1, 'open')").await.unwrap();
    let (from, to) = (rig.source.uri("postgres"), rig.target.uri(TARGET));
    let api = rig.api;
    let creating = tokio::spawn(async move { api.create("f", &from, &to, &config()).await });
    // The trigger waits for the writer; others go on all the same.
    let waits = "SELECT count(*)::text FROM pg_locks WHERE NOT granted AND mode = 'ShareRowExclusiveLock'";
    let deadline = std::time::Instant::now() + crate::common::PATIENCE;
    while list(&rig.source, "postgres", waits).await == ["0"] {
        assert!(std::time::Instant::now() < deadline, "nobody waits\n{}", rig.millrace.log_tail(20));
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    rig.run("INSERT INTO app.p VALUES (2, 'other')").await;
    writer.batch_execute("COMMIT").await.unwrap();
    creating.await.unwrap().unwrap();
    rig.until("the initial copy is complete", |feed| {
        feed["checkpoint_ts"].as_u64() > feed["start_ts"].as_u64()
    })
    .await;
    rig.run("INSERT INTO app.p VALUES (15, 'x'); TRUNCATE app.p1").await;
    rig.caught_up("a truncation").await;
    same_rows(&rig, &["app.p"], "a truncation").await;
    rig.millrace.stop().await.unwrap();
}
