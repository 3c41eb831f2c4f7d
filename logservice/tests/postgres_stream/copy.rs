//! The initial copy, and where the stream takes over from it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use event::RowOp;
use heartbeatpb::Ts;
use logservice::event_store::Position;
use logservice::upstream::ReaderPhase;
use testkit::{PgServer, StopMode};

use crate::rig::{Running, content, eventually, replay, spec};

#[tokio::test(flavor = "multi_thread")]
async fn copy_and_stream_meet_without_a_gap_or_an_overlap() {
    let server = PgServer::start().await.expect("server");
    server
        .sql(
            "postgres",
            "CREATE TABLE a (id int PRIMARY KEY, v int); INSERT INTO a SELECT g, 0 FROM generate_series(1, 20000) g;
             CREATE TABLE b (id int PRIMARY KEY, v int); INSERT INTO b SELECT g, 0 FROM generate_series(1, 20000) g;
             CREATE TABLE nothing (id int PRIMARY KEY)",
        )
        .await
        .expect("tables");
    let mut spec = spec(&server.uri("postgres"), &["*.*"]);
    spec.initial_copy = true;
    let upstream = logservice::upstream::open(&spec.upstream_uri).expect("uri");
    let start = upstream.create_retention(&spec, None).await.expect("retention");
    let client = Arc::new(server.client("postgres").await.expect("client"));
    let busy = tokio::spawn({
        let client = Arc::clone(&client);
        async move {
            for round in 1..=150 {
                let sql = format!(
                    "BEGIN; UPDATE a SET v = {round} WHERE id % 97 = {round} % 97;
                     UPDATE b SET v = {round} WHERE id % 97 = {round} % 97;
                     DELETE FROM a WHERE id = {round}; INSERT INTO b VALUES (20000 + {round}, {round}); COMMIT"
                );
                client.batch_execute(&sql).await.expect("round");
            }
        }
    });
    let running = Running::resume(spec, start, start.start_ts, 256 << 20).await;
    busy.await.expect("busy");
    running.catch_up().await;
    for table in ["a", "b"] {
        let changes = running.changes(table);
        assert_eq!(changes[0].op, RowOp::CopyStart);
        assert!(changes[0].commit_ts > start.start_ts);
        assert!(changes.is_sorted_by_key(|change| change.commit_ts));
        assert_eq!(replay(&changes), content(&server, "postgres", table, &["id", "v"]).await, "{table}");
    }
    assert_eq!(running.history("nothing"), ["CopyStart"]);
    assert_eq!(running.progress.copy_tables_done.load(Ordering::Relaxed), 3);
    assert_eq!(running.progress.copy_tables_total.load(Ordering::Relaxed), 3);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_breaks_begins_again_with_a_new_snapshot() {
    let server = PgServer::start().await.expect("server");
    server
        .sql(
            "postgres",
            "CREATE TABLE t (id int PRIMARY KEY, v text);
             INSERT INTO t SELECT g, repeat('x', 1000) FROM generate_series(1, 20000) g;",
        )
        .await
        .expect("table");
    let mut spec = spec(&server.uri("postgres"), &["*.*"]);
    spec.initial_copy = true;
    let upstream = logservice::upstream::open(&spec.upstream_uri).expect("uri");
    let start = upstream.create_retention(&spec, None).await.expect("retention");
    // The store is too small for the table, so the copy is in its middle until somebody takes the rows.
    let running = Running::resume(spec, start, start.start_ts, 1 << 20).await;
    eventually("the copy has begun", async || {
        (running.progress.copy_rows.load(Ordering::Relaxed) > 0).then_some(())
    })
    .await;
    assert_eq!(running.progress.phase(), ReaderPhase::Copying);
    server.restart(StopMode::Immediate).await.expect("restart");
    server
        .sql("postgres", "UPDATE t SET v = 'y' WHERE id <= 10; DELETE FROM t WHERE id = 20")
        .await
        .expect("changes");
    assert_eq!(running.store.resolved().0, start.start_ts);
    let target = upstream.current_position().await.expect("position").start_ts;
    let table = running.tables["t"].id;
    let (mut changes, mut at) = (Vec::new(), Position::default());
    eventually("everything arrives", async || {
        let done = running.store.resolved().0 >= target;
        crate::rig::take(&running.store, table, &mut at, &mut changes);
        running.store.trim(table, start.start_ts, Some(at));
        done.then_some(())
    })
    .await;
    let copies = changes.iter().filter(|change| change.op == RowOp::CopyStart).map(|change| change.commit_ts);
    let copies: Vec<Ts> = copies.collect();
    assert_eq!(copies.len(), 2);
    assert!(start.start_ts < copies[0] && copies[0] < copies[1]);
    assert!(changes.is_sorted_by_key(|change| change.commit_ts));
    assert_eq!(replay(&changes), content(&server, "postgres", "t", &["id", "v"]).await);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_waits_for_a_transaction_says_so_and_can_be_stopped() {
    let server = PgServer::start().await.expect("server");
    server.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY)").await.expect("table");
    let mut spec = spec(&server.uri("postgres"), &["*.*"]);
    spec.initial_copy = true;
    let upstream = logservice::upstream::open(&spec.upstream_uri).expect("uri");
    let start = upstream.create_retention(&spec, None).await.expect("retention");
    let slow = server.client("postgres").await.expect("client");
    slow.batch_execute("BEGIN; INSERT INTO t VALUES (1)").await.expect("begin");
    let running = Running::resume(spec, start, start.start_ts, 1 << 20).await;
    eventually("the reader says what it waits for", async || {
        running.progress.last_error().filter(|error| error.contains("transactions that are running"))
    })
    .await;
    running.stop().await;
    slow.batch_execute("COMMIT").await.expect("commit");
    let client = server.client("postgres").await.expect("client");
    eventually("the temporary slot is gone", async || {
        let rows =
            client.query("SELECT FROM pg_replication_slots WHERE temporary", &[]).await.expect("slots");
        rows.is_empty().then_some(())
    })
    .await;
}
