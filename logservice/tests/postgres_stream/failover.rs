//! Servers that take the place of the one that was read: promoted standbys, and restored copies.

use std::sync::atomic::Ordering;

use heartbeatpb::Ts;
use logservice::upstream::FeedSpec;
use testkit::{PgServer, StopMode};

use crate::rig::{Running, eventually, slot, spec, version};
use crate::standby::{Standby, copy, data_of, remove};

const DIVERGED: &str = "CDC:ErrUpstreamDiverged";

/// A changefeed whose URI names the standby first, and then its primary.
fn both(primary: &PgServer, standby: &Standby) -> FeedSpec {
    let host = format!("127.0.0.1:{}", primary.port());
    let hosts = format!("127.0.0.1:{},{host}", standby.port());
    spec(&primary.uri("postgres").replace(&host, &hosts), &["*.*"])
}

/// Waits until the standby has a copy of the slot that outlives a promotion (PostgreSQL 17 and later).
async fn synchronized(standby: &Standby, running: &Running, primary: &PgServer) {
    let client = standby.client().await;
    let sql =
        "SELECT FROM pg_replication_slots WHERE synced AND NOT temporary AND invalidation_reason IS NULL";
    let mut at = 1000;
    eventually("the slot is on the standby", async || {
        // It is taken over once the primary's does not need older log than the standby has.
        at += 1;
        primary
            .sql("postgres", &format!("INSERT INTO t VALUES ({at}); DELETE FROM t WHERE id = {at}"))
            .await
            .expect("noise");
        running.catch_up().await;
        running.persisted.send_replace(running.store.resolved().0);
        primary.sql("postgres", "SELECT pg_log_standby_snapshot(); CHECKPOINT").await.expect("snapshot");
        (!client.query(sql, &[]).await.expect("slots").is_empty()).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_goes_on_at_a_promoted_standby_that_has_everything_that_it_has_read() {
    let primary = PgServer::start().await.expect("server");
    primary.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY)").await.expect("table");
    let carries = version(&primary).await >= 17;
    let mut settings = vec!["hot_standby_feedback=on"];
    if carries {
        primary
            .sql("postgres", "SELECT pg_create_physical_replication_slot('standby', true)")
            .await
            .expect("slot");
        settings.extend(["primary_slot_name=standby", "sync_replication_slots=on"]);
    }
    let standby = Standby::of(&primary, &settings).await;
    let running = Running::start(both(&primary, &standby)).await;
    primary.sql("postgres", "INSERT INTO t VALUES (1), (2)").await.expect("insert");
    running.catch_up().await;
    if carries {
        synchronized(&standby, &running, &primary).await;
    }
    primary.sql("postgres", "INSERT INTO t VALUES (3)").await.expect("insert");
    running.catch_up().await;
    standby.caught_up(&primary).await;
    primary.stop(StopMode::Immediate).await.expect("stop");
    eventually("the standby is no server to read from", async || {
        let failure = running.progress.last_failure();
        failure
            .filter(|(code, words)| *code == "CDC:ErrUpstreamUnavailable" && words.contains("is a standby"))
    })
    .await;
    if !carries {
        // As tools do that keep logical slots over a failover of such a server.
        standby.stop();
        let place = format!("pg_replslot/{}", slot(&running.spec));
        copy(&data_of(&primary).join(&place), &standby.data().join(&place));
        standby.start();
    }
    standby.promote().await;
    standby
        .client()
        .await
        .batch_execute("INSERT INTO t VALUES (4); UPDATE t SET id = 5 WHERE id = 1")
        .await
        .expect("changes");
    let failed = || running.progress.last_failure();
    eventually("the changes at the promoted standby arrive", async || {
        assert!(!running.task.is_finished(), "{:?}", failed());
        running.history("t").iter().any(|change| change == "Update old 1 new 5").then_some(())
    })
    .await;
    let history: Vec<String> =
        running.history("t").into_iter().filter(|change| !change.contains("10")).collect();
    assert_eq!(
        history,
        ["Insert new 1", "Insert new 2", "Insert new 3", "Insert new 4", "Update old 1 new 5"]
    );
    // A later reader knows which history it reads.
    let (spec, start, resolved) = (running.spec.clone(), running.start, running.store.resolved().0);
    running.stop().await;
    let later = Running::resume(spec, start, resolved, 1 << 20).await;
    standby.client().await.batch_execute("INSERT INTO t VALUES (6)").await.expect("insert");
    eventually("a later reader reads", async || {
        assert!(!later.task.is_finished(), "{:?}", later.progress.last_failure());
        (later.history("t") == ["Insert new 6"]).then_some(())
    })
    .await;
    later.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_that_was_promoted_without_what_was_read_is_refused() {
    let primary = PgServer::start().await.expect("server");
    primary.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY)").await.expect("table");
    let standby = Standby::of(&primary, &[]).await;
    let (ahead, sleeping) = (both(&primary, &standby), both(&primary, &standby));
    let (running, slept) = (Running::start(ahead).await, Running::start(sleeping).await);
    primary.sql("postgres", "INSERT INTO t VALUES (1)").await.expect("insert");
    running.catch_up().await;
    slept.catch_up().await;
    let (sleeping, start, checkpoint) = (slept.spec.clone(), slept.start, slept.store.resolved().0);
    slept.stop().await;
    standby.caught_up(&primary).await;
    standby.cut_off().await;
    primary.sql("postgres", "INSERT INTO t VALUES (2)").await.expect("insert");
    running.catch_up().await;
    assert_eq!(running.history("t"), ["Insert new 1", "Insert new 2"]);
    primary.stop(StopMode::Immediate).await.expect("stop");
    standby.promote().await;
    let error = running.failed().await;
    assert_eq!(error.code(), DIVERGED, "{error}");
    assert!(
        error.to_string().contains("timeline 2") && error.to_string().contains("do not exist any more"),
        "{error}"
    );

    // One that was stopped before does not know what others have read; a person does, and says so.
    let resumed = Running::resume(sleeping.clone(), start, checkpoint, 1 << 20).await;
    let error = resumed.failed().await.to_string();
    let accept =
        error.split("run on the source: ").nth(1).and_then(|rest| rest.split(';').next()).expect(&error);
    assert!(accept.starts_with("COMMENT ON PUBLICATION"), "{error}");
    standby.client().await.batch_execute(accept).await.expect(accept);
    let resumed = Running::resume(sleeping, start, checkpoint, 1 << 20).await;
    let error = resumed.failed().await;
    assert_eq!(error.code(), "CDC:ErrStartTsBeforeGC", "nobody carried the slot over: {error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_was_put_back_to_an_older_state_is_refused() {
    let server = PgServer::start().await.expect("server");
    server.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY)").await.expect("table");
    let running = Running::start(spec(&server.uri("postgres"), &["*.*"])).await;
    running.catch_up().await;
    server.stop(StopMode::Immediate).await.expect("stop");
    let (data, kept) = (data_of(&server), server.socket_dir().join("kept"));
    copy(&data, &kept);
    server.resume().await.expect("resume");
    server.sql("postgres", "INSERT INTO t SELECT generate_series(1, 1000)").await.expect("insert");
    running.catch_up().await;
    assert_eq!(running.history("t").len(), 1000);
    let reconnects = running.progress.reconnects.load(Ordering::Relaxed);
    server.stop(StopMode::Immediate).await.expect("stop");
    remove(&data);
    copy(&kept, &data);
    server.resume().await.expect("resume");
    let error = running.failed().await;
    assert_eq!(error.code(), DIVERGED, "{error} after {reconnects} reconnects");
    assert!(error.to_string().contains("put back to an older state"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_position_that_is_not_reached_yet_is_no_older_state() {
    let server = PgServer::start().await.expect("server");
    server.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY)").await.expect("table");
    let spec = spec(&server.uri("postgres"), &["*.*"]);
    let upstream = logservice::upstream::open(&spec.upstream_uri).expect("uri");
    let now = upstream.current_position().await.expect("position").start_ts;
    let start = upstream.create_retention(&spec, Some(Ts(now.0 + (1 << 16)))).await.expect("retention");
    let running = Running::resume(spec, start, start.start_ts, 1 << 20).await;
    server.sql("postgres", "INSERT INTO t VALUES (1)").await.expect("insert");
    eventually("the reader follows the log", async || {
        assert!(!running.task.is_finished(), "{:?}", running.progress.last_failure());
        running.progress.connected.load(Ordering::Relaxed).then_some(())
    })
    .await;
    running.stop().await;
}
