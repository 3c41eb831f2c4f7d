//! Streams whose rows are on disk.

use std::time::{Duration, Instant};

use heartbeatpb::Ts;

use crate::rig::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_does_not_answer_holds_up_only_the_streams_that_read_from_it() {
    let rig = Rig::new(LogLimits { memory_bytes: 64 << 10, disk_bytes: 1 << 30 });
    let mut writer = rig.open(Ts(1));
    let mut manager = rig.manager(64 << 20);
    for table in 1..=2 {
        register(&mut writer, table);
    }
    let mut sent = Sent::default();
    for commit_ts in 10..40 {
        sent.transaction(&mut writer, commit_ts, &[(1, 200)]).await;
        publish(&mut writer, commit_ts);
    }
    // A pipe gives no answer before somebody writes to it.
    let segments = rig.segments();
    assert!(!segments.is_empty(), "the test needs something on disk");
    for path in &segments {
        std::fs::remove_file(path).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(path).status().unwrap().success());
    }
    let (stalled, other) = (manager.subscribe(1, Ts(1)), manager.subscribe(2, Ts(1)));
    sent.transaction(&mut writer, 50, &[(2, 3)]).await;
    publish(&mut writer, 50);
    let deadline = Instant::now() + Duration::from_secs(20);
    while manager.resolved(other) < Ts(50) {
        assert!(Instant::now() < deadline, "a table in memory waits for the disk of another one");
        manager.take(Duration::from_millis(100)).await;
    }
    assert_eq!(manager.rows(2), sent.rows(2));
    assert_eq!(manager.resolved(stalled), Ts::ZERO);
    // Ends the reads, so that the runtime can end.
    for path in segments {
        let _ = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_streams_that_read_from_disk_keep_each_its_order() {
    let rig = Rig::new(LogLimits { memory_bytes: 64 << 10, disk_bytes: 1 << 30 });
    let mut writer = rig.open(Ts(1));
    let mut manager = rig.manager(256 << 10);
    let mut sent = Sent::default();
    for table in 1..=24 {
        register(&mut writer, table);
    }
    for commit_ts in 10..60 {
        let rows: Vec<_> = (1..=24).map(|table| (table, 40)).collect();
        sent.transaction(&mut writer, commit_ts, &rows).await;
        publish(&mut writer, commit_ts);
    }
    for table in 1..=24 {
        manager.subscribe(table, Ts(1));
    }
    manager.until_resolved(59, crate::PATIENCE).await;
    for table in 1..=24 {
        assert!(manager.rows(table) == sent.rows(table), "table {table}");
    }
}
