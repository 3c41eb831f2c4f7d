//! Rows that are larger than a message between nodes may be.

use std::time::{Duration, Instant};

use event::RowOp;
use heartbeatpb::{TableId, Ts, WallTime};
use logservice::event_store::StoreWriter;
use messaging::testing::Faults;

use crate::rig::*;
use crate::{PATIENCE, at_once};

/// Bytes of the largest message.
const MESSAGE: usize = 5 << 20;
/// Bytes of a large row: a few messages.
const LARGE: usize = 22 << 20;

/// A transaction of a small row, a large one and a small one; answers them.
async fn transaction(writer: &mut StoreWriter, table: i64, commit_ts: u64) -> Vec<Row> {
    writer.begin(Ts(commit_ts - 1));
    let mut sent = Vec::new();
    for number in 0..3 {
        let value = commit_ts * 10 + number;
        let width = if number == 1 { LARGE } else { 64 };
        let digits = value.to_string();
        let mut new = image_of("0".repeat(width - digits.len()) + &digits);
        writer.row(TableId(table), RowOp::Insert, None, Some(&mut new)).unwrap();
        writer.room().await.unwrap();
        sent.push((commit_ts, number, value));
    }
    writer.commit(Ts(commit_ts), WallTime(1)).await.unwrap();
    publish(writer, commit_ts);
    sent
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_larger_than_a_message_arrives_on_another_node_between_its_neighbours() {
    // From memory, and from disk.
    for memory_bytes in [256 << 20, 1 << 20] {
        let rig = Rig::over_network(LogLimits { memory_bytes, disk_bytes: 1 << 30 }, 1);
        rig.set_largest_message(MESSAGE);
        let mut writer = rig.open(Ts(1));
        // One such row is more than the window.
        let mut manager = rig.manager(1 << 20);
        let mut sent = [Vec::new(), Vec::new()];
        for table in [1, 2] {
            register(&mut writer, table);
            manager.subscribe(table, Ts(1));
        }
        for commit_ts in [10, 20, 30] {
            for (table, sent) in (1..).zip(&mut sent) {
                sent.extend(transaction(&mut writer, table, commit_ts + table.cast_unsigned()).await);
            }
        }
        publish(&mut writer, 40);
        manager.until_resolved(40, PATIENCE).await;
        for (table, sent) in (1..).zip(&sent) {
            assert_eq!(manager.rows(table), *sent, "table {table}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_larger_than_a_message_arrives_although_pieces_are_lost_and_repeated() {
    let rig = Rig::over_network(at_once(), 5);
    rig.set_largest_message(MESSAGE);
    let mut writer = rig.open(Ts(1));
    let mut manager = rig.manager(64 << 20);
    register(&mut writer, 1);
    manager.subscribe(1, Ts(1));
    manager.until_resolved(1, PATIENCE).await;
    let begun = manager.begins();
    rig.set_faults(Faults { loss: 0.1, duplication: 0.3, ..Faults::NONE });
    let mut sent = Vec::new();
    for commit_ts in 10..16 {
        sent.extend(transaction(&mut writer, 1, commit_ts).await);
    }
    // Until something was lost and everything has come.
    let (mut resolved, deadline) = (16, Instant::now() + PATIENCE);
    while manager.resolved_of_all() < Ts(16) || manager.begins() == begun {
        assert!(Instant::now() < deadline, "stands still at {}", manager.resolved_of_all());
        resolved += 1;
        if manager.begins() == begun {
            sent.extend(transaction(&mut writer, 1, resolved).await);
        } else {
            rig.set_faults(Faults::NONE);
            publish(&mut writer, resolved);
        }
        while manager.take(Duration::from_millis(100)).await {}
    }
    manager.until_resolved(resolved, PATIENCE).await;
    assert_eq!(manager.rows(1), sent);
}
