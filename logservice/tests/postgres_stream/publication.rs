//! Publications that somebody alters: what is not in the log any more must not go unnoticed.

use std::sync::atomic::Ordering;

use heartbeatpb::config::DdlCapture;
use logservice::upstream::{FeedSpec, open};
use testkit::PgServer;

use crate::rig::{Running, eventually, spec};

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

fn name(spec: &FeedSpec) -> String {
    format!("millrace_test_{:08x}", spec.changefeed.gid.high >> 32)
}

async fn version(server: &PgServer) -> u32 {
    let client = server.client("postgres").await.expect("client");
    let row = client.query_one("SELECT current_setting('server_version_num')", &[]).await.expect("version");
    row.get::<_, &str>(0).parse::<u32>().expect("a number") / 10_000
}

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
        let sql = alteration.replace(" P ", &format!(" {} ", name(&running.spec)));
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
    let sql = format!("ALTER PUBLICATION {} DROP TABLE t", name(&running.spec));
    server.sql("postgres", &sql).await.expect("alter");
    let error = running.failed().await;
    assert_eq!(error.code(), CONFLICT, "{error}");
    assert!(error.to_string().contains(TAKEN), "{error}");
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
    let sql = format!("ALTER PUBLICATION {} DROP TABLE unwanted", name(&spec));
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
