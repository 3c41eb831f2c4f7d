//! What the server is told that it may forget, and where a reader begins.

use std::sync::atomic::Ordering;

use heartbeatpb::Ts;
use testkit::PgServer;

use crate::rig::{Running, eventually, spec};

// behaviour: dataplane-11
#[tokio::test(flavor = "multi_thread")]
async fn an_idle_changefeed_lets_the_server_forget_its_log() {
    let server = PgServer::start().await.expect("server");
    server
        .sql("postgres", "CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE noise (id int)")
        .await
        .expect("tables");
    server.sql("postgres", "CREATE DATABASE elsewhere").await.expect("database");
    let running = Running::start(spec(&server.uri("postgres"), &["public.t"])).await;
    for (database, sql) in [
        ("postgres", "INSERT INTO noise SELECT generate_series(1, 1000)"),
        ("elsewhere", "CREATE TABLE n AS SELECT generate_series(1, 1000)"),
    ] {
        server.sql(database, sql).await.expect("noise");
        let position = running.upstream.current_position().await.expect("position").start_ts;
        running.reach(position).await;
        running.persisted.send_replace(running.store.resolved().0);
        let client = server.client("postgres").await.expect("client");
        eventually("the slot follows", async || {
            let row = client
                .query_one("SELECT (confirmed_flush_lsn - '0/0')::bigint FROM pg_replication_slots", &[])
                .await
                .expect("slot");
            (u64::try_from(row.get::<_, i64>(0)).expect("position") >= position.0).then_some(())
        })
        .await;
    }
    // Without any news the time still goes on, so that an idle changefeed does not seem to lag.
    let before = running.store.resolved().1;
    eventually("time goes on", async || (running.store.resolved().1 > before).then_some(())).await;
    assert_eq!(running.history("t"), [] as [String; 0]);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_is_persisted_is_confirmed() {
    let server = PgServer::start().await.expect("server");
    server.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY)").await.expect("table");
    let running = Running::start(spec(&server.uri("postgres"), &["*.*"])).await;
    server.sql("postgres", "INSERT INTO t SELECT generate_series(1, 1000)").await.expect("insert");
    running.catch_up().await;
    // Several status updates go out meanwhile.
    let since = running.store.resolved().1;
    eventually("three seconds pass", async || {
        (since.seconds_until(running.store.resolved().1) > 3.0).then_some(())
    })
    .await;
    let client = server.client("postgres").await.expect("client");
    let row = client
        .query_one("SELECT (confirmed_flush_lsn - '0/0')::bigint FROM pg_replication_slots", &[])
        .await
        .expect("slot");
    assert_eq!(u64::try_from(row.get::<_, i64>(0)).expect("position"), running.start.start_ts.0);
    running.stop().await;
}

// A checkpoint may be any number: the maintainer's is often one less than the end of the oldest transaction that is not
// downstream. The server skips a transaction whose commit record begins before the position that it is asked for.
#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_inside_a_commit_record_does_not_lose_its_transaction() {
    let server = PgServer::start().await.expect("server");
    server.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY)").await.expect("table");
    let running = Running::start(spec(&server.uri("postgres"), &["*.*"])).await;
    for id in 0..20 {
        server.sql("postgres", &format!("INSERT INTO t VALUES ({id})")).await.expect("insert");
    }
    running.catch_up().await;
    let changes = running.changes("t");
    let (spec, start) = (running.spec.clone(), running.start);
    running.stop().await;
    // One after the other, each in the log of the one before: also confirmed positions must leave it alone.
    for (lost, back) in [(5, 1), (10, 8), (15, 1)] {
        let checkpoint = Ts(changes[lost].commit_ts.0 - back);
        let resumed = Running::resume(spec.clone(), start, checkpoint, 256 << 20).await;
        resumed.catch_up().await;
        assert_eq!(
            resumed.changes("t"),
            changes[lost..],
            "from {checkpoint}, {back} before a transaction's end"
        );
        let last = changes[changes.len() - 1].commit_ts;
        resumed.persisted.send_replace(if lost == 15 { last } else { checkpoint });
        eventually("an end of a transaction is confirmed", async || {
            let confirmed = resumed.progress.confirmed.load(Ordering::Relaxed);
            (lost < 15 || confirmed == last.0).then_some(())
        })
        .await;
        resumed.stop().await;
    }
}
