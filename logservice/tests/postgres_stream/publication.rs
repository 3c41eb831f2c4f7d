//! Publications that somebody alters: what is not in the log any more must not go unnoticed.

use std::sync::atomic::Ordering;

use heartbeatpb::config::DdlCapture;
use logservice::upstream::{FeedSpec, open};
use testkit::PgServer;

use crate::rig::{Running, eventually, partial, slot, spec, version};

const TAKEN: &str = "1 of its tables were taken out: public.t";
const CONFLICT: &str = "CDC:ErrUpstreamSlotConflict";

/// What somebody does to the publication `P`, since which version, and the code and words of the error.
const ALTERATIONS: &[(&str, u32, &str, &str)] = &[
    ("ALTER PUBLICATION P DROP TABLE t", 14, CONFLICT, TAKEN),
    ("ALTER PUBLICATION P DROP TABLE t; ALTER PUBLICATION P ADD TABLE t", 14, CONFLICT, TAKEN),
    ("ALTER PUBLICATION P SET (publish = 'insert')", 14, CONFLICT, "every kind of change"),
    ("ALTER PUBLICATION P SET (publish_via_partition_root = off)", 14, CONFLICT, "every kind of change"),
    (
        "ALTER PUBLICATION P SET TABLE other, t WHERE (id > 5)",
        15,
        CONFLICT,
        "a row filter or a column list on public.t",
    ),
    (
        "ALTER PUBLICATION P SET TABLE other, t (id)",
        15,
        CONFLICT,
        "a row filter or a column list on public.t",
    ),
    ("DROP PUBLICATION P CASCADE", 14, "CDC:ErrStartTsBeforeGC", "does not exist any more"),
];

async fn connected(running: &Running) {
    eventually("the reader follows the log", async || {
        running.progress.connected.load(Ordering::Relaxed).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publication_that_somebody_alters_stops_its_reader_and_names_the_table() {
    let server = PgServer::start().await.expect("server");
    let tables = "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE other (id int PRIMARY KEY)";
    server.sql("postgres", tables).await.expect("tables");
    let version = version(&server).await;
    let mut readers = Vec::new();
    for (alteration, since, code, words) in ALTERATIONS {
        if *since > version {
            continue;
        }
        let running = Running::start(spec(&server.uri("postgres"), &["public.*"])).await;
        connected(&running).await;
        readers.push((running, alteration, code, words));
    }
    // All at once: a reader looks only now and then.
    for (running, alteration, ..) in &readers {
        let sql = alteration.replace(" P ", &format!(" {} ", slot(&running.spec)));
        server.sql("postgres", &sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
    }
    for (running, alteration, code, words) in readers {
        let (spec, start, upstream) =
            (running.spec.clone(), running.start, std::sync::Arc::clone(&running.upstream));
        let error = running.failed().await;
        assert_eq!(error.code(), *code, "{alteration}: {error}");
        assert!(error.to_string().contains(words), "{alteration}: {error}");
        assert!(error.to_string().contains("create it again"), "{alteration}: {error}");
        // Whoever comes later is told the same before anything is read.
        let error = upstream.tables(&FeedSpec { start_ts: start.start_ts, ..spec }).await;
        match error {
            Err(error) => assert_eq!(error.code(), *code, "{alteration}: {error}"),
            Ok(_) => assert!(alteration.starts_with("DROP"), "{alteration}: nobody is told"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_taken_out_is_noticed_where_schema_changes_are_captured() {
    let server = PgServer::start().await.expect("server");
    server
        .sql("postgres", "CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE u (id int PRIMARY KEY)")
        .await
        .expect("tables");
    let mut spec = spec(&server.uri("postgres"), &["public.*", "!public.hidden"]);
    spec.ddl.capture = DdlCapture::On;
    let running = Running::start(spec).await;
    connected(&running).await;
    // What the triggers do to it is as it should be: a new table, one that is dropped, one that gets an unwanted name.
    server
        .sql("postgres", "CREATE TABLE n (id int PRIMARY KEY); DROP TABLE u; ALTER TABLE n RENAME TO hidden")
        .await
        .expect("changes");
    running.catch_up().await;
    let sql = format!("ALTER PUBLICATION {} DROP TABLE t", slot(&running.spec));
    server.sql("postgres", &sql).await.expect("alter");
    let error = running.failed().await;
    assert_eq!(error.code(), CONFLICT, "{error}");
    assert!(error.to_string().contains(TAKEN), "{error}");
}

/// What somebody does to the publication `$P` of a changefeed with captured schema changes and puts right at once, since
/// which version, and the code and words of the error.
const PUT_RIGHT: &[(&str, u32, &str, &str)] = &[
    (
        "ALTER PUBLICATION $P DROP TABLE t; INSERT INTO t VALUES (2); ALTER PUBLICATION $P ADD TABLE t",
        14,
        CONFLICT,
        TAKEN,
    ),
    (
        "ALTER PUBLICATION $P SET TABLE other; INSERT INTO t VALUES (3); ALTER PUBLICATION $P ADD TABLE t",
        14,
        CONFLICT,
        TAKEN,
    ),
    (
        "ALTER PUBLICATION $P SET (publish = 'insert'); UPDATE t SET id = -id; \
         ALTER PUBLICATION $P SET (publish = 'insert, update, delete, truncate')",
        14,
        CONFLICT,
        "every kind of change",
    ),
    (
        "ALTER PUBLICATION $P SET TABLE other, t WHERE (id > 5); INSERT INTO t VALUES (4); \
         ALTER PUBLICATION $P SET TABLE other, t",
        15,
        CONFLICT,
        "public.t",
    ),
    (
        "ALTER PUBLICATION $P RENAME TO gone; INSERT INTO other VALUES (1); ALTER PUBLICATION gone RENAME TO $P",
        14,
        "CDC:ErrStartTsBeforeGC",
        "does not exist any more",
    ),
];

#[tokio::test(flavor = "multi_thread")]
async fn a_publication_that_is_put_right_before_a_reader_looks_is_noticed_where_schema_changes_are_captured()
{
    let server = PgServer::start().await.expect("server");
    let tables = "CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE other (id int PRIMARY KEY)";
    server.sql("postgres", tables).await.expect("tables");
    let version = version(&server).await;
    let mut stopped = Vec::new();
    for (alteration, since, code, words) in PUT_RIGHT {
        if *since > version {
            continue;
        }
        let mut spec = spec(&server.uri("postgres"), &["public.*"]);
        spec.ddl.capture = DdlCapture::On;
        let running = Running::start(spec).await;
        connected(&running).await;
        // While it is paused nobody looks at all.
        let (spec, start) = (running.spec.clone(), running.start);
        running.stop().await;
        stopped.push((spec, start, alteration, code, words));
    }
    server.sql("postgres", "INSERT INTO t VALUES (1)").await.expect("insert");
    for (spec, _, alteration, ..) in &stopped {
        for sql in alteration.split("; ") {
            let sql = sql.replace("$P", &slot(spec));
            server.sql("postgres", &sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
        }
    }
    for (spec, start, alteration, code, words) in stopped {
        let resumed = Running::resume(spec, start, start.start_ts, 1 << 20).await;
        let store = std::sync::Arc::clone(&resumed.store);
        let table = resumed.tables["t"].id;
        let error = resumed.failed().await;
        assert_eq!(error.code(), *code, "{alteration}: {error}");
        assert!(error.to_string().contains(words), "{alteration}: {error}");
        assert!(error.to_string().contains("create it again"), "{alteration}: {error}");
        let history: Vec<String> =
            crate::rig::changes(&store, table).iter().map(ToString::to_string).collect();
        assert_eq!(
            history.first().map(String::as_str),
            Some("Insert new 1"),
            "{alteration}: it has what came before"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publication_that_is_dropped_is_told_of_in_the_log_where_schema_changes_are_captured() {
    let server = PgServer::start().await.expect("server");
    server.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY)").await.expect("table");
    let mut spec = spec(&server.uri("postgres"), &["public.*"]);
    spec.ddl.capture = DdlCapture::On;
    let running = Running::start(spec).await;
    connected(&running).await;
    let sql = format!("INSERT INTO t VALUES (1); DROP PUBLICATION {}", slot(&running.spec));
    server.sql("postgres", &sql).await.expect("drop");
    let error = running.failed().await;
    assert_eq!(error.code(), "CDC:ErrStartTsBeforeGC", "{error}");
    assert!(error.to_string().contains("does not exist any more"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn that_a_table_of_a_paused_changefeed_was_taken_out_is_not_forgotten_when_another_one_is_created() {
    let server = PgServer::start().await.expect("server");
    let tables = "CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE other (id int PRIMARY KEY)";
    server.sql("postgres", tables).await.expect("tables");
    let captured = |rules: &[&str]| {
        let mut spec = spec(&server.uri("postgres"), rules);
        spec.ddl.capture = DdlCapture::On;
        spec
    };
    let paused = Running::start(captured(&["public.*"])).await;
    connected(&paused).await;
    let (spec, start) = (paused.spec.clone(), paused.start);
    paused.stop().await;
    // As somebody who has switched the event triggers off for a moment.
    let sql = format!(
        "ALTER EVENT TRIGGER millrace_drop DISABLE; ALTER PUBLICATION {} DROP TABLE t; \
         ALTER EVENT TRIGGER millrace_drop ENABLE ALWAYS",
        slot(&spec)
    );
    server.sql("postgres", &sql).await.expect("alter");
    let second = Running::start(captured(&["public.other"])).await;
    let upstream = open(&spec.upstream_uri).expect("uri");
    let error =
        upstream.tables(&FeedSpec { start_ts: start.start_ts, ..spec }).await.expect_err("it is told");
    assert_eq!(error.code(), CONFLICT, "{error}");
    assert!(error.to_string().contains(TAKEN), "{error}");
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_not_wanted_any_more_may_be_taken_out_where_schema_changes_are_captured() {
    let server = PgServer::start().await.expect("server");
    let tables = "CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE unwanted (id int PRIMARY KEY)";
    server.sql("postgres", tables).await.expect("tables");
    let mut wide = spec(&server.uri("postgres"), &["public.*"]);
    wide.ddl.capture = DdlCapture::On;
    let running = Running::start(wide).await;
    connected(&running).await;
    let (mut narrow, start) = (running.spec.clone(), running.start);
    running.stop().await;
    let sql = format!("ALTER PUBLICATION {} DROP TABLE unwanted; INSERT INTO t VALUES (1)", slot(&narrow));
    server.sql("postgres", &sql).await.expect("alter");
    narrow.filter = spec("postgres://a@h/d", &["public.*", "!public.unwanted"]).filter;
    let resumed = Running::resume(narrow, start, start.start_ts, 1 << 20).await;
    resumed.catch_up().await;
    assert_eq!(resumed.history("t"), ["Insert new 1"]);
    resumed.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_was_dropped_or_is_not_wanted_any_more_leaves_the_publication_in_peace() {
    let server = PgServer::start().await.expect("server");
    let tables = "CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE dropped (id int PRIMARY KEY); \
        CREATE TABLE unwanted (id int PRIMARY KEY)";
    server.sql("postgres", tables).await.expect("tables");
    let running = Running::start(spec(&server.uri("postgres"), &["public.*"])).await;
    connected(&running).await;
    server.sql("postgres", "DROP TABLE dropped; INSERT INTO t VALUES (1)").await.expect("drop");
    running.catch_up().await;
    let (mut spec, start) = (running.spec.clone(), running.start);
    running.stop().await;
    // The filter was narrowed while it was paused, and the table taken out, as the error about it says.
    let sql = format!("ALTER PUBLICATION {} DROP TABLE unwanted", slot(&spec));
    spec.filter = crate::rig::spec("postgres://a@h/d", &["public.*", "!public.unwanted"]).filter;
    let early =
        open(&spec.upstream_uri).expect("uri").tables(&spec).await.expect_err("it is still published");
    assert!(early.to_string().contains("DROP TABLE public.unwanted"), "{early}");
    server.sql("postgres", &sql).await.expect("alter");
    let resumed = Running::resume(spec, start, start.start_ts, 1 << 20).await;
    server
        .sql("postgres", "INSERT INTO unwanted VALUES (1); INSERT INTO t VALUES (2)")
        .await
        .expect("insert");
    resumed.catch_up().await;
    assert_eq!(resumed.history("t"), ["Insert new 1", "Insert new 2"]);
    resumed.stop().await;
}

/// Tables of which only a part is published.
const PARTIAL: &str = "CREATE TABLE t (id int, region text NOT NULL, v text, big text, hidden int, PRIMARY KEY (id, region)); \
    ALTER TABLE t ALTER big SET STORAGE EXTERNAL; \
    CREATE TABLE f (id int PRIMARY KEY, v text); ALTER TABLE f REPLICA IDENTITY FULL; \
    CREATE TABLE p (id int PRIMARY KEY, v int, hidden int) PARTITION BY RANGE (id); \
    CREATE TABLE p_a PARTITION OF p FOR VALUES FROM (MINVALUE) TO (10); \
    CREATE TABLE p_b PARTITION OF p FOR VALUES FROM (10) TO (MAXVALUE)";

fn partial_spec(server: &PgServer) -> FeedSpec {
    partial(
        &server.uri("postgres"),
        &["public.*"],
        &[
            ("public.t", &["big", "v", "region", "id"], "region = 'eu'"),
            ("public.f", &[], "v LIKE 'a%'"),
            ("public.p", &["id", "v"], "id <> 3 AND id <> 13"),
        ],
    )
}

#[tokio::test(flavor = "multi_thread")]
// behaviour: dataplane-P-1
async fn what_a_filter_takes_comes_with_the_listed_columns_and_moves_into_and_out_of_it() {
    let server = PgServer::start().await.expect("server");
    if version(&server).await < 15 {
        return;
    }
    server.sql("postgres", PARTIAL).await.expect("tables");
    let running = Running::start(partial_spec(&server)).await;
    connected(&running).await;
    for sql in [
        "INSERT INTO t VALUES (1, 'eu', 'a', 'x', 0), (2, 'us', 'b', 'y', 0)",
        "UPDATE t SET v = 'c', hidden = 1",
        "UPDATE t SET region = 'eu' WHERE id = 2",
        "UPDATE t SET region = 'us' WHERE id = 1",
        "UPDATE t SET id = 3 WHERE id = 2",
        "DELETE FROM t",
        "INSERT INTO f VALUES (1, 'ab'), (2, 'b'), (3, NULL)",
        "UPDATE f SET v = 'a' || v",
        "UPDATE f SET v = 'c' WHERE id = 1",
        "DELETE FROM f",
        "INSERT INTO p VALUES (1, 1, 0), (3, 1, 0), (11, 1, 0), (13, 1, 0)",
        "UPDATE p SET hidden = 1; UPDATE p SET id = 12 WHERE id = 1; UPDATE p SET id = 13 WHERE id = 11 AND false",
        // What is not in the list may come; what is may not go.
        "ALTER TABLE t ADD COLUMN more int DEFAULT 7; ALTER TABLE t DROP COLUMN hidden",
        "INSERT INTO t VALUES (4, 'eu', 'd', 'z', 1)",
        "TRUNCATE t",
    ] {
        server.sql("postgres", sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
    }
    server.sql("postgres", "ALTER TABLE t DROP COLUMN v").await.expect_err("the publication needs it");
    running.catch_up().await;
    let history = running.history("t");
    let expected = [
        "Insert new 1,eu,a,x",
        "Update new 1,eu,c,x",
        "Insert new 2,eu,c,y",
        "Delete old 1,eu,<unchanged>,<unchanged>",
        "Update old 2,eu,<unchanged>,<unchanged> new 3,eu,c,y",
        "Delete old 3,eu,<unchanged>,<unchanged>",
        "Insert new 4,eu,d,z",
        "Truncate",
    ];
    assert_eq!(history, expected);
    let expected = [
        "Insert new 1,ab",
        "Update old 1,ab new 1,aab",
        "Insert new 2,ab",
        "Delete old 1,aab",
        "Delete old 2,ab",
    ];
    assert_eq!(running.history("f"), expected);
    let expected = ["Insert new 1,1", "Insert new 11,1", "Update new 1,1", "Update new 11,1"];
    let history = running.history("p");
    assert_eq!(history[..4], expected);
    assert_eq!(history[4..], ["Delete old 1,<unchanged>", "Insert new 12,1"], "between partitions");

    // It is read again after a restart, by the shape that the list makes.
    let (spec, start) = (running.spec.clone(), running.start);
    running.stop().await;
    let running = Running::resume(spec, start, start.start_ts, 1 << 20).await;
    server.sql("postgres", "INSERT INTO t VALUES (5, 'eu', 'e', 'z', 1)").await.expect("insert");
    running.catch_up().await;
    assert_eq!(running.history("t").last().map(String::as_str), Some("Insert new 5,eu,e,z"));

    // A row that an update takes in has all of its values, or is refused.
    let sql = "INSERT INTO t VALUES (6, 'us', 'e', (SELECT string_agg(md5(i::text), '') FROM generate_series(1, 300) i)); \
               UPDATE t SET region = 'eu' WHERE id = 6";
    server.sql("postgres", sql).await.expect("update");
    let error = running.failed().await;
    assert_eq!(error.code(), "CDC:ErrFilterRuleInvalid", "{error}");
    assert!(error.to_string().contains("public.t") && error.to_string().contains("out-of-line"), "{error}");
}

/// What somebody does to the publication `P` of [`PARTIAL`], and the words of the error.
const PART_ALTERATIONS: &[(&str, &str)] = &[
    (
        "ALTER PUBLICATION P SET TABLE t (big, id, region, v) WHERE (region = 'us'), f WHERE (v LIKE 'a%'), p (id, v) WHERE (id <> 3 AND id <> 13)",
        "of public.t is not the one",
    ),
    (
        "ALTER PUBLICATION P SET TABLE t (big, id, region) WHERE (region = 'eu'), f WHERE (v LIKE 'a%'), p (id, v) WHERE (id <> 3 AND id <> 13)",
        "of public.t is not the one",
    ),
    (
        "ALTER PUBLICATION P SET TABLE t (big, id, region, v) WHERE (region = 'eu'), f, p (id, v) WHERE (id <> 3 AND id <> 13)",
        "of public.f is not the one",
    ),
    ("ALTER PUBLICATION P DROP TABLE f", "were taken out: public.f"),
    ("ALTER PUBLICATION P ADD TABLE other (id)", "a row filter or a column list on public.other"),
    (
        "ALTER PUBLICATION P DROP TABLE f; ALTER PUBLICATION P ADD TABLE f WHERE (v LIKE 'a%')",
        "were taken out: public.f",
    ),
];

#[tokio::test(flavor = "multi_thread")]
// behaviour: dataplane-P-2
async fn a_row_filter_or_a_column_list_that_somebody_alters_adds_or_removes_stops_its_reader_by_name() {
    let server = PgServer::start().await.expect("server");
    if version(&server).await < 15 {
        return;
    }
    server.sql("postgres", PARTIAL).await.expect("tables");
    let mut readers = Vec::new();
    for (alteration, words) in PART_ALTERATIONS {
        let running = Running::start(partial_spec(&server)).await;
        connected(&running).await;
        readers.push((running, alteration, words));
    }
    // Set to what it was, it is what it was.
    let kept = Running::start(partial_spec(&server)).await;
    connected(&kept).await;
    let same = "ALTER PUBLICATION P SET TABLE t (id, region, v, big) WHERE ((region) = 'eu'), f WHERE (v LIKE 'a%'), \
                p (id, v) WHERE (id <> 3 AND id <> 13), more";
    server
        .sql(
            "postgres",
            "CREATE TABLE other (id int PRIMARY KEY, v int); CREATE TABLE more (id int PRIMARY KEY)",
        )
        .await
        .expect("tables");
    server.sql("postgres", &same.replace(" P ", &format!(" {} ", slot(&kept.spec)))).await.expect("alter");
    for (running, alteration, _) in &readers {
        let sql = alteration.replace(" P ", &format!(" {} ", slot(&running.spec)));
        server.sql("postgres", &sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
    }
    for (running, alteration, words) in readers {
        let (spec, start) = (running.spec.clone(), running.start);
        let error = running.failed().await;
        assert_eq!(error.code(), CONFLICT, "{alteration}: {error}");
        assert!(error.to_string().contains(words), "{alteration}: {error}");
        assert!(!error.to_string().contains("'eu'"), "{error}");
        // Whoever comes later is told the same before anything is read.
        let upstream = open(&spec.upstream_uri).expect("uri");
        let spec = FeedSpec { start_ts: start.start_ts, ..spec };
        let again = upstream.tables(&spec).await.expect_err("it is told");
        assert!(again.to_string().contains(words), "{alteration}: {again}");
    }
    kept.catch_up().await;
    let (spec, start) = (kept.spec.clone(), kept.start);
    kept.stop().await;
    let tables =
        open(&spec.upstream_uri).expect("uri").tables(&FeedSpec { start_ts: start.start_ts, ..spec }).await;
    assert_eq!(tables.expect("as it was made").len(), 4, "with the one that was put into it");
}
