//! Tables that are held: their streams stand still at one place, the others go on, and nothing is lost or early.

use std::time::{Duration, Instant};

use heartbeatpb::{TableId, Ts};
use messaging::testing::Faults;

use crate::rig::*;
use crate::{PATIENCE, at_once};

/// Takes what comes, freeing the room of what came before whenever nothing more does, until `done`.
async fn until(manager: &mut Manager, what: &str, done: impl Fn(&Manager) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done(manager) {
        assert!(Instant::now() < deadline, "never came true: {what}");
        if !manager.take(Duration::from_millis(50)).await {
            manager.free_held();
        }
    }
}

/// Holds table 1 in the midst of rows of tables 1 and 2 that are on their way, of which so many transactions are published
/// at once.
async fn hold_and_release(rig: Rig, window: usize, slow: bool, every: u64) {
    let mut writer = rig.open(Ts(1));
    let mut manager = rig.manager(window);
    manager.hold = slow;
    for table in [1, 2] {
        register(&mut writer, table);
    }
    let (held_stream, other) = (manager.subscribe(1, Ts(1)), manager.subscribe(2, Ts(1)));
    let mut sent = Sent::default();
    for commit_ts in 10..100 {
        sent.transaction(&mut writer, commit_ts, &[(1, 30), (2, 30)]).await;
        if commit_ts % every == 0 || commit_ts == 99 {
            publish(&mut writer, commit_ts);
        }
    }
    let gate = rig.gate();
    let held = gate.hold(TableId(1)).unwrap();
    assert!(gate.hold(TableId(1)).is_none(), "once at a time");
    assert_eq!(held.at(), Ts(99));
    for commit_ts in 100..200 {
        sent.transaction(&mut writer, commit_ts, &[(1, 30), (2, 30)]).await;
        if commit_ts % every == 0 || commit_ts == 199 {
            publish(&mut writer, commit_ts);
        }
    }
    until(&mut manager, "the other table goes on", |manager| manager.resolved(other) >= Ts(199)).await;
    until(&mut manager, "the held one comes to its place", |manager| manager.resolved(held_stream) >= Ts(99))
        .await;
    assert_eq!(manager.resolved(held_stream), Ts(99));
    assert_eq!(manager.rows(2), sent.rows(2));
    let until_hold = |rows: Vec<Row>| rows.into_iter().filter(|row| row.0 < 100).collect::<Vec<_>>();
    assert_eq!(manager.rows(1), until_hold(sent.rows(1)), "nothing behind the hold");

    // Nobody has said that it is durable; then both do, one of them later.
    let flushed = tokio::spawn(async move {
        held.flushed().await.unwrap();
        held
    });
    manager.checkpoint(other, 199);
    manager.checkpoint(held_stream, 98);
    until(&mut manager, "the reports of a second have come", {
        let since = Instant::now();
        move |_| since.elapsed() > Duration::from_millis(1500)
    })
    .await;
    assert!(!flushed.is_finished(), "the held one has told 98");
    manager.checkpoint(held_stream, 99);
    until(&mut manager, "it has told 99", |_| flushed.is_finished()).await;
    assert_eq!(manager.resolved(held_stream), Ts(99), "still held");
    drop(flushed.await.unwrap());
    until(&mut manager, "it goes on", |manager| manager.resolved(held_stream) >= Ts(199)).await;
    assert_eq!(manager.rows(1), sent.rows(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_held_table_stands_still_while_the_others_go_on_and_then_gets_everything() {
    hold_and_release(Rig::new(at_once()), 64 << 20, false, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_held_table_whose_rows_are_on_disk_on_both_sides_of_the_hold_gets_them_once() {
    let limits = LogLimits { memory_bytes: 32 << 10, disk_bytes: 1 << 30 };
    hold_and_release(Rig::new(limits), 32 << 10, true, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hold_holds_although_messages_are_lost_and_repeated() {
    let rig = Rig::over_network(at_once(), 5);
    rig.set_faults(Faults { loss: 0.05, duplication: 0.05, ..Faults::NONE });
    // A stream that lost a message begins anew: few messages, so that one of its attempts loses none.
    hold_and_release(rig, 64 << 20, false, 25).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn schema_changes_behind_a_hold_wait_with_the_rows() {
    let rig = Rig::new(at_once());
    let mut writer = rig.open(Ts(1));
    let mut manager = rig.manager(1 << 20);
    for table in [1, 2] {
        register(&mut writer, table);
        manager.subscribe(table, Ts(1));
    }
    let mut sent = Sent::default();
    sent.transaction(&mut writer, 10, &[(1, 3), (2, 3)]).await;
    publish(&mut writer, 10);
    let held = rig.gate().hold(TableId(1)).unwrap();
    sent.transaction(&mut writer, 20, &[(1, 3), (2, 3)]).await;
    sent.wide_ddl(&mut writer, 30, &[1, 2]).await;
    sent.transaction(&mut writer, 40, &[(1, 3), (2, 3)]).await;
    publish(&mut writer, 50);
    until(&mut manager, "the other one passes the change", |manager| manager.rows(2) == sent.rows(2)).await;
    assert_eq!(manager.rows(1).len(), 3);
    assert!(!manager.seen(1).contains(&Seen::Ddl(30)), "{:?}", manager.seen(1));
    drop(held);
    manager.until_resolved(50, PATIENCE).await;
    assert_eq!(manager.rows(1), sent.rows(1));
    assert_eq!(manager.seen(1)[6], Seen::Ddl(30), "{:?}", manager.seen(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_comes_while_a_table_is_held_gets_no_further_and_a_hold_ends_with_its_store() {
    let rig = Rig::new(at_once());
    let mut writer = rig.open(Ts(1));
    let mut manager = rig.manager(1 << 20);
    register(&mut writer, 1);
    let mut sent = Sent::default();
    sent.transaction(&mut writer, 10, &[(1, 3)]).await;
    publish(&mut writer, 10);
    let held = rig.gate().hold(TableId(1)).unwrap();
    sent.transaction(&mut writer, 20, &[(1, 3)]).await;
    publish(&mut writer, 20);
    let late = manager.subscribe(1, Ts(1));
    until(&mut manager, "it comes to the place of the hold", |manager| manager.resolved(late) >= Ts(10))
        .await;
    assert_eq!((manager.rows(1).len(), manager.resolved(late)), (3, Ts(10)));

    let waiting = tokio::spawn(async move { held.flushed().await.is_err() });
    rig.close();
    assert!(waiting.await.unwrap(), "nobody will ever tell");
    let mut writer = rig.open(Ts(1));
    register(&mut writer, 1);
    let mut sent = Sent::default();
    for commit_ts in [10, 20] {
        sent.transaction(&mut writer, commit_ts, &[(1, 3)]).await;
    }
    publish(&mut writer, 20);
    manager.until_resolved(20, PATIENCE).await;
    assert_eq!(manager.rows(1), sent.rows(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn all_tables_are_held_until_it_is_known_which_have_to_be_and_those_stay() {
    let rig = Rig::new(at_once());
    let mut writer = rig.open(Ts(1));
    let gate = rig.gate();
    gate.hold_all();
    let mut manager = rig.manager(1 << 20);
    let streams = [1, 2].map(|table| {
        register(&mut writer, table);
        manager.subscribe(table, Ts(1))
    });
    let mut sent = Sent::default();
    sent.transaction(&mut writer, 10, &[(1, 3), (2, 3)]).await;
    publish(&mut writer, 10);
    until(&mut manager, "both have begun", |manager| manager.begins() == 2).await;
    gate.release_but(&[TableId(1)]);
    until(&mut manager, "the other one goes on", |manager| manager.resolved(streams[1]) >= Ts(10)).await;
    assert_eq!((manager.rows(1).len(), manager.rows(2)), (0, sent.rows(2)));
    assert_eq!(gate.kept(), [TableId(1)]);

    // Whoever takes it over and fails leaves it held; nothing of it is missing, so it is flushed at once.
    let held = gate.hold(TableId(1)).unwrap();
    assert!(gate.hold(TableId(1)).is_none());
    assert_eq!(held.at(), Ts(1));
    manager.checkpoint(streams[0], 1);
    let flushed = tokio::spawn(async move {
        held.flushed().await.unwrap();
        held
    });
    until(&mut manager, "it is flushed", |_| flushed.is_finished()).await;
    drop(flushed.await.unwrap());
    sent.transaction(&mut writer, 20, &[(1, 3), (2, 3)]).await;
    publish(&mut writer, 20);
    until(&mut manager, "the other one goes on", |manager| manager.resolved(streams[1]) >= Ts(20)).await;
    assert_eq!(manager.rows(1).len(), 0);

    // It is moved past a schema change, without the rows before it, and what nobody holds is served from there on.
    assert!(gate.delaying().is_empty());
    sent.wide_ddl(&mut writer, 30, &[1]).await;
    sent.transaction(&mut writer, 40, &[(1, 3)]).await;
    publish(&mut writer, 40);
    until(&mut manager, "somebody waits for it", |_| gate.delaying() == [(TableId(1), Ts(30))]).await;
    gate.pass(TableId(1), Ts(40));
    until(&mut manager, "it passes the change", |manager| manager.seen(1) == [Seen::Ddl(30)]).await;
    manager.checkpoint(streams[0], 30);
    until(&mut manager, "it comes to its new place", |manager| manager.resolved(streams[0]) >= Ts(40)).await;
    assert_eq!(manager.rows(1), []);
    assert!(gate.delaying().is_empty());
    let held = gate.hold(TableId(1)).unwrap();
    assert_eq!(held.at(), Ts(40));
    sent.transaction(&mut writer, 50, &[(1, 3)]).await;
    publish(&mut writer, 50);
    held.complete();
    assert!(gate.kept().is_empty());
    manager.until_resolved(50, PATIENCE).await;
    let behind: Vec<Row> = sent.rows(1).into_iter().filter(|row| row.0 > 40).collect();
    assert_eq!(manager.rows(1), behind);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_left_out_on_disk_and_in_memory_is_not_missed_when_it_is_trimmed() {
    let limits = LogLimits { memory_bytes: 32 << 10, disk_bytes: 1 << 30 };
    let rig = Rig::new(limits);
    let mut writer = rig.open(Ts(1));
    let gate = rig.gate();
    gate.hold_all();
    let mut manager = rig.manager(1 << 20);
    register(&mut writer, 1);
    let stream = manager.subscribe(1, Ts(1));
    let mut sent = Sent::default();
    for commit_ts in 10..100 {
        sent.transaction(&mut writer, commit_ts, &[(1, 30)]).await;
        publish(&mut writer, commit_ts);
    }
    // With a chunk at hand that was read from disk.
    until(&mut manager, "the stream has begun", |manager| manager.begins() == 1).await;
    gate.release_but(&[TableId(1)]);
    let held = gate.hold(TableId(1)).unwrap();
    gate.pass(TableId(1), Ts(80));
    until(&mut manager, "it comes to its place", |manager| manager.resolved(stream) >= Ts(80)).await;
    manager.checkpoint(stream, 80);
    held.flushed().await.unwrap();
    held.complete();
    manager.until_resolved(99, PATIENCE).await;
    let behind: Vec<Row> = sent.rows(1).into_iter().filter(|row| row.0 > 80).collect();
    assert_eq!(manager.rows(1), behind);
}
