//! Servers that go away, and stores that are full.

use std::sync::atomic::Ordering;

use heartbeatpb::Ts;
use logservice::upstream::ReaderPhase;
use testkit::{PgServer, StopMode};

use crate::rig::{Running, eventually, replay, spec};

#[tokio::test(flavor = "multi_thread")]
async fn restarts_and_crashes_of_the_server_neither_lose_nor_repeat_a_row() {
    let server = PgServer::builder().setting("fsync", "on").start().await.expect("server");
    server.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY, v text)").await.expect("table");
    let running = Running::start(spec(&server.uri("postgres"), &["*.*"])).await;
    let mut next = 0;
    for round in 0..4 {
        for _ in 0..5 {
            let sql = format!("INSERT INTO t SELECT g, 'v' FROM generate_series({next}, {next} + 999) g");
            server.sql("postgres", &sql).await.expect("insert");
            next += 1000;
        }
        match round {
            0 => server.restart(StopMode::Immediate).await.expect("restart"),
            1 => {
                server.kill().expect("kill");
                server.resume().await.expect("resume");
            }
            2 => {
                // Half of what was read is confirmed when the connection breaks.
                running.catch_up().await;
                running.persisted.send_replace(running.changes("t")[9_999].commit_ts);
                server
                    .sql("postgres", "SELECT pg_terminate_backend(pid) FROM pg_stat_replication")
                    .await
                    .expect("terminate");
            }
            _ => {}
        }
    }
    running.catch_up().await;
    let changes = running.changes("t");
    assert_eq!(changes.len(), 20_000);
    assert!(changes.is_sorted_by_key(|change| change.commit_ts));
    assert_eq!(replay(&changes).len(), 20_000);
    assert!(running.progress.reconnects.load(Ordering::Relaxed) >= 3);
    // A second reader that resumes at a checkpoint gets exactly what is after it.
    let middle = changes[9_999].commit_ts;
    let (spec, start) = (running.spec.clone(), running.start);
    running.stop().await;
    let resumed = Running::resume(spec, start, middle, 256 << 20).await;
    resumed.catch_up().await;
    let expected: Vec<_> = changes.into_iter().filter(|change| change.commit_ts > middle).collect();
    assert_eq!(resumed.changes("t"), expected);
    resumed.stop().await;
}

/// A reader with a small store, waiting for room in the middle of forty transactions of a thousand rows.
async fn waiting_for_room(server: &PgServer) -> Running {
    server.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY, v text)").await.expect("table");
    let spec = spec(&server.uri("postgres"), &["*.*"]);
    let upstream = logservice::upstream::open(&spec.upstream_uri).expect("uri");
    let start = upstream.create_retention(&spec, None).await.expect("retention");
    let running = Running::resume(spec, start, start.start_ts, 1 << 20).await;
    for round in 0..40 {
        let sql = format!(
            "INSERT INTO t SELECT g, repeat('x', 1000) FROM generate_series({round}000, {round}999) g"
        );
        server.sql("postgres", &sql).await.expect("insert");
    }
    eventually("the reader waits", async || {
        (running.progress.phase() == ReaderPhase::WaitingForRoom).then_some(())
    })
    .await;
    running
}

/// Makes room by and by until everything has come; the transactions must come once and in order.
async fn take_everything(running: &Running) {
    let table = running.tables["t"].id;
    let mut transactions: Vec<(Ts, usize)> = Vec::new();
    eventually("everything arrives", async || {
        let done = transactions.last().map_or(Ts::ZERO, |(ts, _)| *ts);
        for change in crate::rig::changes_after(&running.store, table, done) {
            match transactions.last_mut() {
                Some((ts, rows)) if *ts == change.commit_ts => *rows += 1,
                _ => transactions.push((change.commit_ts, 1)),
            }
        }
        let done = transactions.last().map_or(Ts::ZERO, |(ts, _)| *ts);
        running.store.trim(table, done, None);
        (transactions.len() >= 40).then_some(())
    })
    .await;
    assert!(transactions.is_sorted());
    assert_eq!(transactions.iter().map(|(_, rows)| *rows).collect::<Vec<_>>(), [1000; 40]);
    running.catch_up().await;
    assert_eq!(crate::rig::changes_after(&running.store, table, transactions[39].0), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_store_stops_reading_and_keeps_the_connection() {
    let server = PgServer::builder().setting("wal_sender_timeout", "2s").start().await.expect("server");
    let running = waiting_for_room(&server).await;
    let rows = running.progress.log_rows.load(Ordering::Relaxed);
    assert!(rows < 40_000);
    // Longer than the server's patience with a silent reader.
    let before = running.upstream.current_position().await.expect("position").time;
    eventually("the server's patience is over", async || {
        let now = running.upstream.current_position().await.expect("position").time;
        (before.seconds_until(now) > 5.0).then_some(())
    })
    .await;
    let client = server.client("postgres").await.expect("client");
    let row = client.query_one("SELECT count(*) FROM pg_stat_replication", &[]).await.expect("count");
    assert_eq!(row.get::<_, i64>(0), 1);
    assert_eq!(running.progress.log_rows.load(Ordering::Relaxed), rows);
    take_everything(&running).await;
    assert_eq!(running.progress.reconnects.load(Ordering::Relaxed), 0);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_restarts_while_the_store_is_full_repeats_nothing() {
    let server = PgServer::start().await.expect("server");
    let running = waiting_for_room(&server).await;
    server.restart(StopMode::Immediate).await.expect("restart");
    // Some status updates go into the void.
    let before = running.upstream.current_position().await.expect("position").time;
    eventually("the reader tries to report", async || {
        let now = running.upstream.current_position().await.expect("position").time;
        (before.seconds_until(now) > 3.0).then_some(())
    })
    .await;
    assert_eq!(running.progress.phase(), ReaderPhase::WaitingForRoom);
    take_everything(&running).await;
    assert!(running.progress.reconnects.load(Ordering::Relaxed) >= 1);
    running.stop().await;
}
