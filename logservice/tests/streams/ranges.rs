//! Dispatchers of parts of a table: each gets its rows and no other, and nothing is kept or dropped for the wrong one.

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use event::{Datum, RowOp, TableInfo, TupleWriter};
use heartbeatpb::{TableId, Ts, WallTime};
use logservice::event_store::StoreWriter;
use messaging::testing::Faults;

use crate::rig::*;
use crate::{PATIENCE, at_once};

const TABLE: TableId = TableId(1);
const KEYS: u64 = 1_000_003;

/// A value that is anywhere among the keys.
fn value(commit_ts: u64, number: u64) -> u64 {
    (commit_ts * 7919 + number * 104_729) % KEYS
}

async fn inserts(writer: &mut StoreWriter, commit_ts: u64, rows: u64) -> Vec<Row> {
    writer.begin(Ts(commit_ts - 1));
    let mut sent = Vec::new();
    for number in 0..rows {
        let value = value(commit_ts, number);
        writer.row(TABLE, RowOp::Insert, None, Some(&mut image(value))).unwrap();
        sent.push((commit_ts, number, value));
    }
    writer.commit(Ts(commit_ts), WallTime(1)).await.unwrap();
    sent
}

fn within(rows: &[Row], [start, end]: [Option<u64>; 2]) -> Vec<Row> {
    let inside = |(_, _, value): &&Row| start.is_none_or(|s| *value >= s) && end.is_none_or(|e| *value < e);
    rows.iter().filter(inside).copied().collect()
}

fn ranges(pieces: u64) -> Vec<[Option<u64>; 2]> {
    let bound = |at: u64| (at > 0 && at < pieces).then_some(KEYS * at / pieces);
    (0..pieces).map(|at| [bound(at), bound(at + 1)]).collect()
}

/// Rows of memory and of disk, over a network that loses, repeats and reorders.
async fn each_range_gets_its_rows(limits: LogLimits, faults: Faults, last: u64) {
    let rig = Rig::over_network(limits, last);
    let mut writer = rig.open(Ts(1));
    writer.register_table(Arc::new(keyed_table(1)));
    let mut manager = rig.manager(256 << 10);
    let parts: Vec<_> =
        ranges(5).into_iter().map(|range| (range, manager.subscribe_range(1, range, Ts(1)))).collect();
    rig.set_faults(faults);
    let mut sent = Vec::new();
    for commit_ts in 10..last {
        sent.extend(inserts(&mut writer, commit_ts, 40).await);
        if commit_ts % 3 == 0 {
            writer.publish(Ts(commit_ts), WallTime(1));
        }
        manager.take(Duration::ZERO).await;
    }
    writer.publish(Ts(last), WallTime(1));
    manager.until_resolved(last, PATIENCE).await;
    for (range, id) in parts {
        let rows = manager.rows_of(id);
        assert_eq!(rows, within(&sent, range), "{range:?}");
        assert!(rows.len() > sent.len() / 10);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_part_of_a_table_gets_its_rows_and_no_other() {
    each_range_gets_its_rows(at_once(), Faults::NONE, 400).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn parts_of_a_table_come_from_disk_like_the_whole() {
    let limits = LogLimits { memory_bytes: 64 << 10, disk_bytes: 1 << 30 };
    each_range_gets_its_rows(limits, Faults::NONE, 400).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_part_of_a_table_gets_its_rows_although_messages_are_lost_and_repeated() {
    let faults = Faults { loss: 0.05, duplication: 0.05, ..Faults::NONE };
    each_range_gets_its_rows(at_once(), faults, 50).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_without_rows_does_not_keep_an_initial_copy_in_the_store() {
    let rig = Rig::new(LogLimits { memory_bytes: 256 << 10, disk_bytes: 256 << 10 });
    let mut writer = rig.open(Ts(1));
    let table = Arc::new(keyed_table(1));
    writer.register_table(Arc::clone(&table));
    let mut manager = rig.manager(128 << 10);
    // Rows come in the order of the key: nothing of the second part before all of the first.
    let rows = 40_000u64;
    let middle = rows / 2;
    let low = manager.subscribe_range(1, [None, Some(middle)], Ts(1));
    let high = manager.subscribe_range(1, [Some(middle), None], Ts(1));
    let mut copy = writer.copy_writer(table, Ts(100), Ts(99), WallTime(1));
    let copying = tokio::spawn(async move {
        for value in 0..rows {
            copy.row(&mut image(value));
            if value % 500 == 0 {
                copy.room().await.unwrap();
            }
        }
        copy.finish();
    });
    let deadline = std::time::Instant::now() + PATIENCE;
    while !copying.is_finished() {
        assert!(std::time::Instant::now() < deadline, "the store is full of what nobody wants");
        manager.take(Duration::from_millis(50)).await;
        manager.tell_all_copied();
    }
    copying.await.unwrap();
    writer.publish(Ts(100), WallTime(1));
    manager.until_resolved(100, PATIENCE).await;
    // Each has the beginning of the copy, and its half of the rows.
    let counts = [low, high].map(|id| manager.rows_of(id).len() as u64);
    assert_eq!(counts, [middle + 1, rows - middle + 1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_part_without_a_dispatcher_needs_is_kept_for_the_one_that_comes() {
    let rig = Rig::new(at_once());
    let mut writer = rig.open(Ts(1));
    writer.register_table(Arc::new(keyed_table(1)));
    let mut manager = rig.manager(8 << 20);
    let [one, other] = ranges(2)[..] else { unreachable!() };
    let low = manager.subscribe_range(1, one, Ts(1));
    let high = manager.subscribe_range(1, other, Ts(1));
    let mut sent = Vec::new();
    for commit_ts in 10..20 {
        sent.extend(inserts(&mut writer, commit_ts, 20).await);
    }
    writer.publish(Ts(20), WallTime(1));
    manager.until_resolved(20, PATIENCE).await;
    // The second part moves elsewhere, before its checkpoint was told; the first one goes on.
    manager.remove(high);
    let kept = rig.stats().memory_bytes;
    manager.checkpoint(low, 20);
    tokio::time::timeout(Duration::from_millis(2500), async { while manager.take(PATIENCE).await {} })
        .await
        .unwrap_err();
    assert_eq!(rig.stats().memory_bytes, kept, "who reads the second part next is not known yet");
    let moved = manager.subscribe_range(1, other, Ts(1));
    manager.until_resolved(20, PATIENCE).await;
    assert_eq!(manager.rows_of(moved), within(&sent, other));
    manager.checkpoint(moved, 20);
    let deadline = std::time::Instant::now() + PATIENCE;
    while rig.stats().memory_bytes > 0 {
        assert!(std::time::Instant::now() < deadline, "both parts have passed, but the rows are kept");
        manager.take(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_of_a_table_that_cannot_be_divided_fails_with_its_own_code() {
    let rig = Rig::new(at_once());
    let mut writer = rig.open(Ts(1));
    register(&mut writer, 1);
    let mut manager = rig.manager(8 << 20);
    manager.may_fail = true;
    manager.subscribe_range(1, [None, Some(5)], Ts(1));
    inserts(&mut writer, 10, 3).await;
    writer.publish(Ts(10), WallTime(1));
    let deadline = std::time::Instant::now() + PATIENCE;
    while manager.failed.is_empty() {
        assert!(std::time::Instant::now() < deadline, "it must not get rows of others");
        manager.take(Duration::from_millis(50)).await;
    }
    assert_eq!(manager.failed, ["CDC:ErrTableSplitUnsupported"]);
}

// behaviour: dispatcher-101
#[tokio::test(flavor = "multi_thread")]
async fn the_last_dispatcher_takes_the_changefeeds_room_with_it() {
    let rig = Rig::new(at_once());
    let mut writer = rig.open(Ts(1));
    writer.register_table(Arc::new(keyed_table(1)));
    let mut manager = rig.manager(64 << 10);
    manager.hold = true;
    let first = manager.subscribe(1, Ts(1));
    for commit_ts in 10..40 {
        inserts(&mut writer, commit_ts, 100).await;
    }
    writer.publish(Ts(40), WallTime(1));
    let deadline = std::time::Instant::now() + PATIENCE;
    while manager.held_bytes() < 64 << 10 {
        assert!(std::time::Instant::now() < deadline, "rows come as long as there is room");
        manager.take(Duration::from_millis(50)).await;
    }
    manager.remove(first);
    let next = manager.subscribe(1, Ts(1));
    while manager.rows_of(next).is_empty() {
        assert!(
            std::time::Instant::now() < deadline,
            "the room that the first one holds is not the second one's"
        );
        manager.take(Duration::from_millis(50)).await;
    }
}

// behaviour: dispatcher-102
#[tokio::test(flavor = "multi_thread")]
async fn a_schema_change_of_another_table_leaves_a_stream_its_shape() {
    let rig = Rig::new(at_once());
    let mut writer = rig.open(Ts(1));
    register(&mut writer, 1);
    register(&mut writer, 2);
    let mut manager = rig.manager(8 << 20);
    let mine = manager.subscribe(1, Ts(1));
    manager.subscribe(2, Ts(1));
    let mut sent = Sent::default();
    sent.transaction(&mut writer, 10, &[(1, 2), (2, 2)]).await;
    sent.transaction_with_ddl(&mut writer, 20, &[(2, 1)]).await;
    writer.register_table(Arc::new(TableInfo { version: Ts(20), ..(*table(2)).clone() }));
    sent.transaction(&mut writer, 30, &[(1, 2), (2, 2)]).await;
    publish(&mut writer, 30);
    manager.until_resolved(30, PATIENCE).await;
    assert_eq!(manager.seen(1), [10, 10, 30, 30].map(Seen::Row));
    assert!(manager.seen(2).contains(&Seen::Ddl(20)));
    assert_eq!(manager.shapes(mine), [Ts(1)], "rows before and behind it have one shape");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_moving_row_that_is_not_all_in_the_log_reaches_neither_of_its_ranges() {
    let rig = Rig::new(at_once());
    let mut writer = rig.open(Ts(1));
    let mut table = keyed_table(1);
    table.columns.push(event::Column {
        name: "large".to_owned(),
        nullable: true,
        ..table.columns[0].clone()
    });
    writer.register_table(Arc::new(table));
    let mut manager = rig.manager(8 << 20);
    manager.may_fail = true;
    let [low, high] =
        [[None, Some(100)], [Some(100), None]].map(|range| manager.subscribe_range(1, range, Ts(1)));
    let row = |value: u64, large: Datum<'static>| {
        move |out: &mut BytesMut| {
            let text = format!("{value:0>64}");
            let mut tuple = TupleWriter::new(out);
            tuple.push(Datum::Text(text.as_bytes()));
            tuple.push(large);
            tuple.finish();
        }
    };
    for (commit_ts, value) in [(10, 1), (20, 101)] {
        writer.begin(Ts(commit_ts - 1));
        writer.row(TABLE, RowOp::Insert, None, Some(&mut row(value, Datum::Text(b"large")))).unwrap();
        writer.commit(Ts(commit_ts), WallTime(1)).await.unwrap();
    }
    writer.publish(Ts(20), WallTime(1));
    manager.until_resolved(20, PATIENCE).await;
    // Within a range the row moves; to another one it cannot be told what the row is.
    for (commit_ts, from, to) in [(30, 1, 2), (40, 2, 102)] {
        writer.begin(Ts(commit_ts - 1));
        let (mut old, mut new) = (row(from, Datum::Unchanged), row(to, Datum::Unchanged));
        writer.row(TABLE, RowOp::Update, Some(&mut old), Some(&mut new)).unwrap();
        writer.commit(Ts(commit_ts), WallTime(1)).await.unwrap();
        writer.publish(Ts(commit_ts), WallTime(1));
        if commit_ts == 30 {
            manager.until_resolved(30, PATIENCE).await;
        }
    }
    let deadline = std::time::Instant::now() + PATIENCE;
    while manager.failed.len() < 2 {
        assert!(std::time::Instant::now() < deadline, "one half alone would lose the value");
        manager.take(Duration::from_millis(50)).await;
    }
    assert_eq!(manager.failed, ["CDC:ErrSplitRowIncomplete"; 2]);
    let places = |id| manager.rows_of(id).into_iter().map(|(ts, ..)| ts).collect::<Vec<_>>();
    assert_eq!((places(low), places(high)), (vec![10, 30], vec![20]));
}
