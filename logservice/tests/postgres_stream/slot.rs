//! Who reads, and what is in the publication.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use heartbeatpb::MaintainerEpoch;
use logservice::upstream::ReaderPhase;
use testkit::PgServer;

use crate::rig::{Running, eventually, forgetful_server, lose_slot, slot, spec, version};

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_schema_is_a_named_error() {
    let server = PgServer::start().await.expect("server");
    for (change, expected) in [
        ("ADD COLUMN c int", "column \"c\" is new"),
        ("DROP COLUMN b", "column \"b\" is gone"),
        ("RENAME COLUMN b TO bb", "column \"bb\" is where \"b\" was"),
        ("ALTER COLUMN b TYPE varchar(9)", "the type of column \"b\" is not text any more"),
        ("REPLICA IDENTITY FULL", "its replica identity is now 'f'"),
        ("REPLICA IDENTITY NOTHING", "column \"id\" entered or left the replica identity"),
        (
            "ALTER b SET NOT NULL, ALTER b SET DEFAULT 'd', ADD CONSTRAINT k UNIQUE (b); ALTER TABLE t REPLICA IDENTITY USING INDEX k",
            "replica identity",
        ),
        ("RENAME TO u", "its name is now public.u"),
    ] {
        server.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY, b text)").await.expect("table");
        let running = Running::start(spec(&server.uri("postgres"), &["*.*"])).await;
        server.sql("postgres", "INSERT INTO t VALUES (1, 'x')").await.expect("before");
        running.catch_up().await;
        let upstream = Arc::clone(&running.upstream);
        let changefeed = running.spec.changefeed.clone();
        server.sql("postgres", &format!("ALTER TABLE t {change}")).await.expect(change);
        let table = if change.starts_with("RENAME TO") { "u" } else { "t" };
        server.sql("postgres", &format!("INSERT INTO {table} (id) VALUES (2)")).await.expect("after");
        let error = running.failed().await;
        assert_eq!(error.code(), "CDC:ErrSchemaChangeUnsupported", "{change}: {error}");
        assert!(error.to_string().contains(expected), "{change}: {error}");
        assert!(error.to_string().contains("public.t"), "{error}");
        upstream.drop_retention(&changefeed).await.expect("drop");
        server.sql("postgres", &format!("DROP TABLE {table}")).await.expect("clean");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_reader_takes_the_slot_and_an_older_one_gives_way() {
    let server = PgServer::start().await.expect("server");
    server.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY)").await.expect("table");
    let first = Running::start(spec(&server.uri("postgres"), &["*.*"])).await;
    first.catch_up().await;
    let mut newer = first.spec.clone();
    newer.epoch = MaintainerEpoch::from_wire(2);
    let second = Running::resume(newer, first.start, first.start.start_ts, 1 << 20).await;
    let error = first.failed().await;
    assert_eq!(error.code(), "CDC:ErrReaderSuperseded");
    server.sql("postgres", "INSERT INTO t VALUES (1)").await.expect("insert");
    second.catch_up().await;
    assert_eq!(second.history("t"), ["Insert new 1"]);
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_former_reader_that_may_not_be_ended_is_named_and_waited_for() {
    let server = PgServer::start().await.expect("server");
    let other = "CREATE TABLE t (id int PRIMARY KEY); \
        CREATE ROLE other LOGIN REPLICATION PASSWORD 'p'; GRANT SELECT ON t TO other";
    server.sql("postgres", other).await.expect("table and role");
    let first = Running::start(spec(&server.uri("postgres"), &["*.*"])).await;
    first.catch_up().await;
    // Without a view of other roles' connections, and with one.
    for (epoch, grant) in [(2, ""), (3, "GRANT pg_read_all_stats TO other")] {
        server.sql("postgres", grant).await.expect("grant");
        let mut newer = first.spec.clone();
        newer.epoch = MaintainerEpoch::from_wire(epoch);
        newer.upstream_uri = server.uri_as("other", "p", "postgres");
        let second = Running::resume(newer, first.start, first.start.start_ts, 1 << 20).await;
        let (code, words) = eventually("it is named", async || {
            let failure = second.progress.last_failure();
            assert!(second.progress.phase() != ReaderPhase::Stopped, "{failure:?}");
            failure.filter(|(code, _)| *code == "CDC:ErrUpstreamSlotHeld")
        })
        .await;
        assert!(words.contains("wal_sender_timeout (1min)"), "{code}: {words}");
        assert!(words.contains("pg_terminate_backend("), "{words}");
        second.stop().await;
    }
    assert!(first.progress.connected.load(Ordering::Relaxed), "nobody took the slot");
    first.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_published_behind_our_back_is_an_error_once_it_has_rows() {
    let server = PgServer::start().await.expect("server");
    server.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY)").await.expect("table");
    let running = Running::start(spec(&server.uri("postgres"), &["public.*"])).await;
    running.catch_up().await;
    // A reader that has not looked yet would know the table from the beginning.
    eventually("the reader knows its tables", async || {
        running.progress.connected.load(Ordering::Relaxed).then_some(())
    })
    .await;
    let publication = slot(&running.spec);
    server
        .sql(
            "postgres",
            &format!(
                "CREATE TABLE late (id int PRIMARY KEY); CREATE SCHEMA s; CREATE TABLE s.unwanted (id int PRIMARY KEY);
                 ALTER PUBLICATION {publication} ADD TABLE late, s.unwanted; INSERT INTO s.unwanted VALUES (1)"
            ),
        )
        .await
        .expect("publish");
    running.catch_up().await;
    server.sql("postgres", "INSERT INTO late VALUES (1)").await.expect("insert");
    let error = running.failed().await;
    assert_eq!(error.code(), "CDC:ErrSchemaChangeUnsupported");
    assert!(error.to_string().contains("public.late"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_somebody_else_reads_or_moves_is_named() {
    let server = PgServer::start().await.expect("server");
    server.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY)").await.expect("table");
    let running = Running::start(spec(&server.uri("postgres"), &["*.*"])).await;
    running.catch_up().await;
    let (spec, start) = (running.spec.clone(), running.start);
    running.stop().await;
    let slot = slot(&spec);
    let stranger = testkit::postgres::program("pg_recvlogical");
    if std::path::Path::new(&stranger).exists() {
        let mut stranger = std::process::Command::new(stranger)
            .args(["-h", server.socket_dir().to_str().expect("UTF-8"), "-p", &server.port().to_string()])
            .args(["-U", "postgres", "-d", "postgres", "--slot", &slot, "--start", "-f", "/dev/null"])
            .args(["-o", "proto_version=1", "-o", &format!("publication_names={slot}")])
            .spawn()
            .expect("pg_recvlogical");
        let client = server.client("postgres").await.expect("client");
        eventually("the stranger reads", async || {
            let active =
                client.query("SELECT FROM pg_replication_slots WHERE active", &[]).await.expect("slots");
            (!active.is_empty()).then_some(())
        })
        .await;
        let kept_out = Running::resume(spec.clone(), start, start.start_ts, 1 << 20).await;
        let (_, words) = eventually("it is named", async || {
            kept_out.progress.last_failure().filter(|(code, _)| *code == "CDC:ErrUpstreamSlotHeld")
        })
        .await;
        assert!(words.contains("\"pg_recvlogical\"") && words.contains("pg_terminate_backend("), "{words}");
        kept_out.stop().await;
        stranger.kill().expect("kill");
        stranger.wait().expect("wait");
    }
    server.sql("postgres", "INSERT INTO t VALUES (1)").await.expect("insert");
    let sql = format!("SELECT pg_replication_slot_advance('{slot}', pg_current_wal_lsn())");
    let client = server.client("postgres").await.expect("client");
    eventually("the slot is moved", async || client.batch_execute(&sql).await.ok()).await;
    let error = Running::resume(spec, start, start.start_ts, 1 << 20).await.failed().await;
    assert_eq!(error.code(), "CDC:ErrStartTsBeforeGC", "{error}");
    assert!(error.to_string().contains("somebody else has read or moved it"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_is_invalidated_while_it_is_read_stops_the_reader_with_advice() {
    let server = forgetful_server().await;
    // Nothing is persisted meanwhile, as when the target is down.
    let running = Running::start(spec(&server.uri("postgres"), &["*.*"])).await;
    running.catch_up().await;
    lose_slot(&server).await;
    let error = running.failed().await;
    assert_eq!(error.code(), "CDC:ErrStartTsBeforeGC", "{error}");
    assert!(error.to_string().contains("max_slot_wal_keep_size"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_nobody_reads_for_longer_than_the_server_allows_is_named_with_the_setting() {
    let server = PgServer::start().await.expect("server");
    if version(&server).await < 18 {
        // Earlier servers keep a slot for as long as it has no reader.
        return;
    }
    server.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY)").await.expect("table");
    let running = Running::start(spec(&server.uri("postgres"), &["*.*"])).await;
    running.catch_up().await;
    let (spec, start) = (running.spec.clone(), running.start);
    running.stop().await;
    server.reload_with("idle_replication_slot_timeout", "1s").await.expect("reload");
    let client = server.client("postgres").await.expect("client");
    eventually("the slot is invalidated", async || {
        client.batch_execute("CHECKPOINT").await.expect("checkpoint");
        let sql = "SELECT FROM pg_replication_slots WHERE invalidation_reason = 'idle_timeout'";
        (!client.query(sql, &[]).await.expect("slots").is_empty()).then_some(())
    })
    .await;
    let error = Running::resume(spec, start, start.start_ts, 1 << 20).await.failed().await;
    assert_eq!(error.code(), "CDC:ErrStartTsBeforeGC", "{error}");
    assert!(error.to_string().contains("idle_replication_slot_timeout"), "{error}");
}
