//! Dispatchers whose node says nothing any more. Time is virtual: it jumps when nothing is left to do.

use heartbeatpb::Ts;
use std::time::Duration;

use crate::PATIENCE;
use crate::rig::*;

const SECOND: Duration = Duration::from_secs(1);

/// Lets both managers take what comes, for so many seconds.
async fn go_on(seconds: u64, one: &mut Manager, other: &mut Manager) {
    let until = tokio::time::Instant::now() + Duration::from_secs(seconds);
    while tokio::time::Instant::now() < until {
        one.take(SECOND / 4).await;
        other.take(SECOND / 4).await;
    }
}

fn small() -> LogLimits {
    LogLimits { memory_bytes: 4 << 20, disk_bytes: 1 << 30 }
}

#[tokio::test(start_paused = true)]
async fn what_only_a_dead_node_has_not_read_is_trimmed_and_if_it_comes_back_it_is_told() {
    let rig = Rig::over_network(small(), 1);
    let mut writer = rig.open(Ts(1));
    let successor = rig.other_node("successor");
    let (mut gone, mut manager) = (rig.manager(64 << 20), successor.manager(64 << 20));
    manager.first_id = 2;
    register(&mut writer, 1);
    gone.subscribe(1, Ts(1));
    let id = manager.subscribe(1, Ts(1));
    let mut sent = Sent::default();
    for commit_ts in 10..20 {
        sent.transaction(&mut writer, commit_ts, &[(1, 60)]).await;
    }
    publish(&mut writer, 19);
    gone.until_resolved(19, PATIENCE).await;
    manager.until_resolved(19, PATIENCE).await;
    rig.cut_off(true);
    manager.checkpoint(id, 19);
    rig.floor(Ts(19));
    go_on(30, &mut gone, &mut manager).await;
    assert!(rig.stats().memory_bytes > 0, "half a minute is a pause, not the end of a node");
    go_on(60, &mut gone, &mut manager).await;
    assert_eq!(rig.stats().memory_bytes, 0, "the successor needs nothing of it any more");
    gone.may_fail = true;
    rig.cut_off(false);
    go_on(10, &mut gone, &mut manager).await;
    assert_eq!(gone.failed, ["CDC:ErrEventStoreOutOfRange"]);
}

/// The lost node told the log how far it was, and had no time to tell the maintainer.
#[tokio::test(start_paused = true)]
async fn the_successor_of_a_lost_node_begins_where_its_maintainer_knows_it_was() {
    let rig = Rig::over_network(small(), 5);
    let mut writer = rig.open(Ts(1));
    let successor = rig.other_node("successor");
    let (mut lost, mut manager) = (rig.manager(64 << 20), successor.manager(64 << 20));
    manager.first_id = 2;
    register(&mut writer, 1);
    lost.subscribe(1, Ts(1));
    let mut sent = Sent::default();
    for commit_ts in 10..20 {
        sent.transaction(&mut writer, commit_ts, &[(1, 60)]).await;
        publish(&mut writer, commit_ts);
    }
    lost.until_resolved(19, PATIENCE).await;
    rig.floor(Ts(12));
    lost.checkpoint_all(19);
    go_on(5, &mut lost, &mut manager).await;
    rig.cut_off(true);
    manager.subscribe(1, Ts(12));
    manager.until_resolved(19, PATIENCE).await;
    let after: Vec<Row> = sent.rows(1).into_iter().filter(|(commit_ts, _, _)| *commit_ts > 12).collect();
    assert_eq!(manager.rows(1), after);
    manager.checkpoint_all(19);
    rig.floor(Ts(19));
    go_on(90, &mut lost, &mut manager).await;
    assert_eq!(rig.stats().memory_bytes, 0, "nothing is kept for good");
}

#[tokio::test(start_paused = true)]
async fn a_node_that_comes_back_after_a_long_silence_registers_again_and_misses_nothing() {
    let rig = Rig::over_network(small(), 2);
    let mut writer = rig.open(Ts(1));
    let other = rig.other_node("other");
    let (mut manager, mut idle) = (rig.manager(64 << 20), other.manager(64 << 20));
    register(&mut writer, 1);
    manager.subscribe(1, Ts(1));
    let mut sent = Sent::default();
    sent.transaction(&mut writer, 10, &[(1, 60)]).await;
    publish(&mut writer, 10);
    manager.until_resolved(10, PATIENCE).await;
    manager.checkpoint_all(10);
    let begins = manager.begins();
    rig.cut_off(true);
    for commit_ts in 20..30 {
        sent.transaction(&mut writer, commit_ts, &[(1, 60)]).await;
        publish(&mut writer, commit_ts);
        go_on(12, &mut manager, &mut idle).await;
    }
    rig.cut_off(false);
    go_on(10, &mut manager, &mut idle).await;
    assert_eq!(manager.resolved_of_all(), Ts(29));
    assert_eq!(manager.rows(1), sent.rows(1));
    assert!(manager.begins() > begins);
}

#[tokio::test(start_paused = true)]
async fn a_schema_change_that_was_forgotten_is_not_skipped_by_whoever_comes_back() {
    let rig = Rig::over_network(small(), 3);
    let mut writer = rig.open(Ts(1));
    let successor = rig.other_node("successor");
    let (mut gone, mut manager) = (rig.manager(64 << 20), successor.manager(64 << 20));
    manager.first_id = 2;
    register(&mut writer, 1);
    gone.subscribe(1, Ts(1));
    manager.subscribe(1, Ts(1));
    publish(&mut writer, 5);
    gone.until_resolved(5, PATIENCE).await;
    manager.until_resolved(5, PATIENCE).await;
    rig.cut_off(true);
    // A table without rows.
    Sent::default().wide_ddl(&mut writer, 10, &[1]).await;
    publish(&mut writer, 20);
    manager.until_resolved(20, PATIENCE).await;
    rig.floor(Ts(20));
    go_on(90, &mut gone, &mut manager).await;
    gone.may_fail = true;
    rig.cut_off(false);
    go_on(10, &mut gone, &mut manager).await;
    assert_eq!(gone.failed, ["CDC:ErrEventStoreOutOfRange"]);
    assert_eq!(gone.resolved_of_all(), Ts(5), "nothing is promised beyond the change");
}

#[tokio::test(start_paused = true)]
async fn a_process_that_stood_still_itself_forgets_nobody() {
    let rig = Rig::over_network(small(), 4);
    let mut writer = rig.open(Ts(1));
    let other = rig.other_node("other");
    let (mut manager, mut idle) = (rig.manager(64 << 20), other.manager(64 << 20));
    register(&mut writer, 1);
    manager.subscribe(1, Ts(1));
    publish(&mut writer, 10);
    manager.until_resolved(10, PATIENCE).await;
    let begins = manager.begins();
    for _ in 0..3 {
        tokio::time::advance(Duration::from_secs(200)).await;
        go_on(5, &mut manager, &mut idle).await;
    }
    publish(&mut writer, 20);
    manager.until_resolved(20, PATIENCE).await;
    assert_eq!(manager.begins(), begins);
}
