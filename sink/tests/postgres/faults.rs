//! Replays, lost connections, and two writers at once: nothing is lost and nothing is doubled.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use event::{RowBatch, TableInfo};
use testkit::StopMode;

use crate::harness::{Rig, Rows, Running, table, until};

fn keyed() -> Arc<TableInfo> {
    Arc::new(table(1, "keyed", &[("id", "integer"), ("v", "text")], &[0], &[&[1]]))
}

fn loose() -> Arc<TableInfo> {
    Arc::new(table(2, "loose", &[("n", "integer"), ("v", "text")], &[], &[]))
}

/// A history that would show every change that is lost or applied twice.
fn history(keyed: &Arc<TableInfo>, loose: &Arc<TableInfo>, rounds: u64) -> Vec<RowBatch> {
    let mut batches = Vec::new();
    for round in 0..rounds {
        let ts = 100 + round * 10;
        let mut rows = Rows::of(keyed);
        for id in 0..20 {
            let id = (round * 20 + id).to_string();
            rows = rows.insert(ts, &[&id, &format!("v{id}")]);
        }
        for id in 0..10 {
            let id = (round * 20 + id).to_string();
            rows = rows.update(ts + 1, &[&id, &format!("w{id}")]);
        }
        rows = rows.delete(ts + 2, &[&(round * 20).to_string(), "\\U"]);
        batches.push(rows.build());
        let n = round.to_string();
        let mut rows = Rows::of(loose);
        for _ in 0..3 {
            rows = rows.insert(ts + 3, &[&n, "x"]);
        }
        rows = rows.delete(ts + 4, &[&n, "x"]).update_from(ts + 4, &[&n, "x"], &[&n, "y"]);
        batches.push(rows.build());
    }
    batches
}

async fn check(rig: &Rig, rounds: u64) {
    let mut expected = Vec::new();
    let mut expected_loose = Vec::new();
    for round in 0..rounds {
        for id in 1..20 {
            let letter = if id < 10 { 'w' } else { 'v' };
            let id = round * 20 + id;
            expected.push(format!("{id}|{letter}{id}"));
        }
        expected_loose.extend([format!("{round}|x"), format!("{round}|y")]);
    }
    rig.expect("keyed", &expected.iter().map(String::as_str).collect::<Vec<_>>()).await;
    rig.expect("loose", &expected_loose.iter().map(String::as_str).collect::<Vec<_>>()).await;
}

async fn opened(rig: &Rig, keyed: &Arc<TableInfo>, loose: &Arc<TableInfo>, params: &str) -> Running {
    let sink = rig.sink(params).await;
    for (table, dispatcher) in [(keyed, sink.dispatcher), (loose, heartbeatpb::DispatcherId::random())] {
        sink.sink
            .open_dispatcher(dispatcher, &heartbeatpb::TableSpan::whole(table.id), heartbeatpb::Ts(1))
            .await
            .expect("opens");
        sink.sink.open_table(dispatcher, table).await.expect("opens");
    }
    sink
}

// behaviour: dataplane-2
#[tokio::test]
async fn a_history_that_is_replayed_after_a_restart_changes_nothing_twice() {
    let rig = Rig::new().await;
    let (k, l) = (keyed(), loose());
    let all = history(&k, &l, 20);
    for upto in [10, 25, all.len(), all.len()] {
        let sink = opened(&rig, &k, &l, "worker-count=4&max-txn-row=7").await;
        for batch in &all[..upto] {
            sink.write(batch.clone());
        }
        sink.flush().await;
        sink.stop().await.expect("no error");
    }
    check(&rig, 20).await;
}

// behaviour: dataplane-2
#[tokio::test]
async fn a_sink_that_is_stopped_in_the_middle_goes_on_exactly_there() {
    let rig = Rig::new().await;
    let (k, l) = (keyed(), loose());
    let all = history(&k, &l, 40);
    for stop_after in [1, 9, 30] {
        let sink = opened(&rig, &k, &l, "worker-count=4&max-txn-row=5").await;
        for batch in &all {
            sink.write(batch.clone());
        }
        until("some batches are flushed", || async { sink.flushed() >= stop_after }).await;
        sink.stop().await.expect("no error");
    }
    let sink = opened(&rig, &k, &l, "worker-count=4").await;
    for batch in &all {
        sink.write(batch.clone());
    }
    sink.flush().await;
    check(&rig, 40).await;
}

// behaviour: dataplane-2
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_connections_lose_and_double_nothing() {
    let rig = Rig::new().await;
    let (k, l) = (keyed(), loose());
    let rounds = 150;
    let sink = opened(&rig, &k, &l, "worker-count=4&max-txn-row=10").await;
    let done = Arc::new(AtomicBool::new(false));
    let killer = {
        let client = rig.server.client("dst").await.expect("a client");
        let done = Arc::clone(&done);
        tokio::spawn(async move {
            let mut kills = 0i64;
            while !done.load(Ordering::Acquire) {
                let killed = client
                    .query_one(
                        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'millrace' \
                         AND state <> 'idle'",
                        &[],
                    )
                    .await
                    .expect("kills");
                kills += killed.get::<_, i64>(0);
                // A pace, not a wait: connections get time to do something between kills.
                tokio::time::sleep(std::time::Duration::from_millis(40)).await;
            }
            kills
        })
    };
    for batch in history(&k, &l, rounds) {
        sink.write(batch);
    }
    sink.flush().await;
    done.store(true, Ordering::Release);
    assert!(killer.await.expect("no panic") > 0, "something was killed");
    assert!(sink.sink.healthy());
    check(&rig, rounds).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_restarts_is_waited_for() {
    let mut rig = Rig::new().await;
    let (k, l) = (keyed(), loose());
    let sink = opened(&rig, &k, &l, "worker-count=2&max-txn-row=10").await;
    let all = history(&k, &l, 60);
    for batch in &all[..60] {
        sink.write(batch.clone());
    }
    rig.server.stop(StopMode::Immediate).await.expect("stops");
    for batch in &all[60..] {
        sink.write(batch.clone());
    }
    assert!(sink.sink.healthy());
    rig.server.resume().await.expect("starts");
    rig.target = rig.server.client("dst").await.expect("a client");
    sink.flush().await;
    check(&rig, 60).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_writers_of_one_changefeed_do_not_double_anything() {
    let rig = Rig::new().await;
    let (k, l) = (keyed(), loose());
    let rounds = 60;
    let first = opened(&rig, &k, &l, "worker-count=3&max-txn-row=9").await;
    let second = opened(&rig, &k, &l, "worker-count=3&max-txn-row=13").await;
    for batch in history(&k, &l, rounds) {
        first.write(batch.clone());
        second.write(batch);
    }
    first.flush().await;
    second.flush().await;
    check(&rig, rounds).await;
}

/// A writer that was overtaken must not put rows of an earlier copy behind the truncation of a later one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_overtaken_writer_adds_nothing_behind_a_barrier() {
    let rig = Rig::new().await;
    let (k, l) = (keyed(), loose());
    let copy = |t: &Arc<TableInfo>, ts: u64, rows: u32, text: &str| {
        let mut batch = Rows::of(t).copy_start(ts);
        for id in 0..rows {
            batch = batch.insert(ts, &[&id.to_string(), &format!("{text}{id}")]);
        }
        batch.build()
    };
    let old = opened(&rig, &k, &l, "worker-count=3&max-txn-row=2").await;
    let new = opened(&rig, &k, &l, "worker-count=3&max-txn-row=2").await;
    old.write(copy(&k, 50, 3000, "old"));
    until("the old copy is under way", || async { rig.target_rows("keyed").await.len() > 300 }).await;
    new.write(copy(&k, 70, 200, "new"));
    new.flush().await;
    old.flush().await;
    let rows = rig.target_rows("keyed").await;
    assert_eq!(rows.len(), 200);
    assert!(rows.iter().all(|row| row.contains("new")));
}

#[tokio::test]
async fn a_replay_that_reaches_the_sink_while_the_rows_are_on_their_way_is_harmless() {
    let rig = Rig::new().await;
    let (k, l) = (keyed(), loose());
    let sink = opened(&rig, &k, &l, "worker-count=4&max-txn-row=5").await;
    let all = history(&k, &l, 20);
    for batch in all.iter().chain(&all) {
        sink.write(batch.clone());
    }
    sink.flush().await;
    check(&rig, 20).await;
}

#[tokio::test]
async fn a_deleted_changefeed_leaves_no_progress_and_all_rows() {
    let rig = Rig::new().await;
    let (k, l) = (keyed(), loose());
    let sink = opened(&rig, &k, &l, "").await;
    for batch in history(&k, &l, 3) {
        sink.write(batch);
    }
    sink.flush().await;
    sink.sink.forget_changefeed().await.expect("forgets");
    sink.sink.forget_changefeed().await.expect("again");
    check(&rig, 3).await;
    let left = rig.target.query_one("SELECT count(*) FROM millrace.progress", &[]).await.expect("count");
    assert_eq!(left.get::<_, i64>(0), 0);
}
