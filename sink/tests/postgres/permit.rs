//! A sink whose process may not write for a while: its lease is not confirmed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use event::{BlockEvent, DdlEvent, DdlKind, TableInfo};
use heartbeatpb::{InfluencedTables, SchemaId, Ts, WritePermit};
use sink::SinkOptions;

use crate::harness::{Rig, Rows, Running, table, until};

/// How long is looked whether something happens that must not.
const WHILE: Duration = Duration::from_millis(400);
/// The permit holds until then.
const LATER: u64 = 1_000;

/// A permit whose clock a test moves.
fn permit() -> (Arc<AtomicU64>, WritePermit) {
    let time = Arc::new(AtomicU64::new(0));
    let clock = Arc::clone(&time);
    let permit = WritePermit::new(move || clock.load(Ordering::SeqCst));
    permit.hold_until(LATER);
    (time, permit)
}

impl Rig {
    async fn permitted(&self, permit: &WritePermit, params: &str) -> Running {
        let options =
            SinkOptions { permit: permit.clone(), ..SinkOptions::new(self.changefeed.clone(), "unused") };
        Running::open_with(&self.uri(params), &options).await.expect("opens")
    }

    /// Sessions of sinks with an open transaction.
    async fn in_transaction(&self) -> i64 {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'millrace' AND xact_start IS NOT NULL";
        // Not by the client that may have a transaction itself: it would see the same activity all the time.
        self.source.query_one(sql, &[]).await.expect("select").get(0)
    }
}

/// Without a key: a row that is written twice is there twice.
fn keyless() -> Arc<TableInfo> {
    Arc::new(table(1, "lines", &[("id", "integer"), ("v", "text")], &[], &[]))
}

fn lines(table: &Arc<TableInfo>, from: u64, count: u64) -> event::RowBatch {
    let mut batch = Rows::of(table);
    for id in from..from + count {
        batch = batch.insert(100 + id, &[&id.to_string(), "x"]);
    }
    batch.build()
}

#[tokio::test]
async fn rows_wait_while_the_process_may_not_write_and_are_written_once_afterwards() {
    let rig = Rig::new().await;
    let (time, permit) = permit();
    let lines_table = keyless();
    let sink = rig.permitted(&permit, "worker-count=4").await;
    sink.table(&lines_table).await.expect("opens");
    sink.write(lines(&lines_table, 0, 10));
    sink.flush().await;
    // It ends by the clock; nobody tells the sink.
    time.store(LATER, Ordering::SeqCst);
    for from in (10..100).step_by(10) {
        sink.write(lines(&lines_table, from, 10));
    }
    tokio::time::sleep(WHILE).await;
    assert_eq!(
        (rig.target_rows("lines").await.len(), sink.flushed(), rig.in_transaction().await),
        (10, 1, 0)
    );
    assert!(sink.sink.healthy());
    permit.hold_until(2 * LATER);
    sink.flush().await;
    assert_eq!(rig.target_rows("lines").await.len(), 100);
    sink.stop().await.expect("no error");
}

#[tokio::test]
async fn a_transaction_that_has_begun_is_not_committed_and_keeps_nobody_waiting() {
    let rig = Rig::new().await;
    let (time, permit) = permit();
    let lines_table = keyless();
    let sink = rig.permitted(&permit, "worker-count=1").await;
    sink.table(&lines_table).await.expect("opens");
    // Its first statement waits for this one.
    rig.exec("BEGIN; LOCK TABLE lines").await;
    sink.write(lines(&lines_table, 0, 10));
    until("the transaction waits", || async { rig.in_transaction().await == 1 }).await;
    time.store(LATER, Ordering::SeqCst);
    rig.exec("COMMIT").await;
    until("the transaction is over", || async { rig.in_transaction().await == 0 }).await;
    tokio::time::sleep(WHILE).await;
    assert_eq!((rig.target_rows("lines").await.len(), sink.flushed()), (0, 0));
    permit.hold_until(2 * LATER);
    sink.flush().await;
    assert_eq!(rig.target_rows("lines").await.len(), 10);
    sink.stop().await.expect("no error");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_permit_that_comes_and_goes_loses_and_doubles_nothing() {
    let rig = Rig::new().await;
    let (time, permit) = permit();
    let lines_table = keyless();
    let sink = rig.permitted(&permit, "worker-count=4&max-txn-row=20").await;
    sink.table(&lines_table).await.expect("opens");
    for from in (0..20_000).step_by(100) {
        sink.write(lines(&lines_table, from, 100));
    }
    for turn in 1_u64.. {
        let now = turn * LATER;
        time.store(now, Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(3)).await;
        permit.hold_until(now + 1);
        tokio::time::sleep(Duration::from_millis(10)).await;
        if sink.flushed() == 200 {
            assert!(turn > 5, "it came and went");
            break;
        }
    }
    permit.hold_until(u64::MAX);
    sink.flush().await;
    let ids: std::collections::BTreeSet<String> = rig.target_rows("lines").await.into_iter().collect();
    assert_eq!((ids.len(), rig.target_rows("lines").await.len()), (20_000, 20_000));
    sink.stop().await.expect("no error");
}

#[tokio::test]
async fn a_schema_change_waits_and_a_sink_that_closes_waits_for_nothing() {
    let rig = Rig::new().await;
    let (time, permit) = permit();
    let lines_table = keyless();
    let sink = rig.permitted(&permit, "").await;
    sink.table(&lines_table).await.expect("opens");
    time.store(LATER, Ordering::SeqCst);
    let ddl = DdlEvent {
        query: "ALTER TABLE lines ADD COLUMN more text".into(),
        schema: "public".into(),
        table: "lines".into(),
        table_id: lines_table.id,
        schema_id: SchemaId(1),
        blocked: Some(InfluencedTables::Normal(vec![lines_table.id])),
        ..DdlEvent::new(DdlKind::AlterTable, Ts(500))
    };
    let change = {
        let (sink, event) = (Arc::clone(&sink.sink), BlockEvent::Ddl(Arc::new(ddl)));
        tokio::spawn(async move { sink.write_block_event(&event).await })
    };
    let columns = async || {
        let sql = "SELECT count(*) FROM pg_attribute WHERE attrelid = 'lines'::regclass AND attname = 'more'";
        rig.target.query_one(sql, &[]).await.expect("select").get::<_, i64>(0)
    };
    tokio::time::sleep(WHILE).await;
    assert_eq!(columns().await, 0);
    permit.hold_until(2 * LATER);
    change.await.expect("no panic").expect("executed");
    assert_eq!(columns().await, 1);
    permit.hold_until(0);
    sink.write(lines(&lines_table, 0, 10));
    tokio::time::timeout(Duration::from_secs(10), sink.stop()).await.expect("in time").expect("no error");
}
