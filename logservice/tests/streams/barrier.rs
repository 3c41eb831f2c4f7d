//! Schema changes: what waits at them, and what does not.

use std::time::{Duration, Instant};

use heartbeatpb::Ts;
use messaging::testing::Faults;

use crate::rig::*;
use crate::{PATIENCE, at_once};

/// About 64 KiB of rows.
const LARGE: usize = 800;

#[tokio::test(flavor = "multi_thread")]
async fn rows_behind_a_schema_change_do_not_take_the_room_that_its_barrier_needs() {
    let rig = Rig::new(at_once());
    let mut writer = rig.open(Ts(1));
    let mut manager = rig.manager(256 << 10);
    manager.wait_at_ddls = true;
    for table in 1..=2 {
        register(&mut writer, table);
        manager.subscribe(table, Ts(1));
    }
    publish(&mut writer, 10);
    manager.until_resolved(10, PATIENCE).await;
    // Table 2 has eight windows of rows before the change, table 1 sixteen behind it.
    let mut sent = Sent::default();
    for n in 0..32 {
        sent.transaction(&mut writer, 100 + n, &[(2, LARGE)]).await;
    }
    sent.wide_ddl(&mut writer, 5000, &[1, 2]).await;
    for n in 0..64 {
        sent.transaction(&mut writer, 6000 + n, &[(1, LARGE)]).await;
    }
    publish(&mut writer, 7000);
    let deadline = Instant::now() + Duration::from_secs(20);
    while !manager.all_wait_at_ddls() {
        assert!(Instant::now() < deadline, "a dispatcher never comes to the barrier");
        manager.take(Duration::from_millis(100)).await;
    }
    // As long as the barrier stands nothing else comes; the rig fails if it does.
    let standing = Instant::now() + Duration::from_millis(1500);
    while Instant::now() < standing {
        manager.take(Duration::from_millis(100)).await;
    }
    manager.pass_ddls();
    manager.wait_at_ddls = false;
    manager.until_resolved(7000, PATIENCE).await;
    for table in 1..=2 {
        assert!(manager.rows(table) == sent.rows(table), "table {table}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_table_advances_and_gets_schema_changes_while_another_one_has_taken_the_whole_window() {
    let rig = Rig::new(at_once());
    let mut writer = rig.open(Ts(1));
    let mut manager = rig.manager(128 << 10);
    manager.hold = true;
    for table in 1..=2 {
        register(&mut writer, table);
    }
    manager.subscribe(1, Ts(1));
    let mut sent = Sent::default();
    for n in 0..16 {
        sent.transaction(&mut writer, 100 + n, &[(1, LARGE)]).await;
    }
    publish(&mut writer, 200);
    while manager.held_bytes() < 128 << 10 {
        assert!(manager.take(PATIENCE).await);
    }
    let idle = manager.subscribe(2, Ts(1));
    sent.wide_ddl(&mut writer, 300, &[2]).await;
    publish(&mut writer, 400);
    let deadline = Instant::now() + Duration::from_secs(20);
    while manager.resolved(idle) < Ts(400) {
        assert!(Instant::now() < deadline, "the idle table stands still at {}", manager.resolved(idle));
        manager.take(Duration::from_millis(100)).await;
    }
    assert_eq!(manager.seen(2), [Seen::Ddl(300)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_passes_schema_changes_over_a_link_that_loses_messages() {
    for seed in 1..=3 {
        let rig = Rig::over_network(at_once(), seed);
        let mut writer = rig.open(Ts(1));
        let mut manager = rig.manager(256 << 10);
        for table in 1..=2 {
            register(&mut writer, table);
            manager.subscribe(table, Ts(1));
        }
        rig.set_faults(Faults { loss: 0.1, ..Faults::NONE });
        let mut sent = Sent::default();
        let mut last = 0;
        for n in 0..20 {
            sent.transaction(&mut writer, 100 + 10 * n, &[(1, 3), (2, 3)]).await;
            last = 105 + 10 * n;
            sent.wide_ddl(&mut writer, last, &[1, 2]).await;
            publish(&mut writer, last);
        }
        let deadline = Instant::now() + PATIENCE;
        let mut resolved = last;
        while manager.resolved_of_all() < Ts(last) {
            assert!(Instant::now() < deadline, "seed {seed} stands still at {}", manager.resolved_of_all());
            resolved += 1;
            publish(&mut writer, resolved);
            manager.take(Duration::from_millis(50)).await;
        }
        for table in 1..=2 {
            assert_eq!(manager.rows(table), sent.rows(table), "table {table}, seed {seed}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schema_change_that_finds_no_place_in_the_managers_queue_comes_again() {
    let rig = Rig::new(at_once());
    let mut writer = rig.open(Ts(1));
    let mut manager = rig.manager(64 << 20);
    for table in 1..=2 {
        register(&mut writer, table);
        manager.subscribe(table, Ts(1));
    }
    publish(&mut writer, 9);
    manager.until_resolved(9, PATIENCE).await;
    // More events of table 1 than may wait for a manager, then one of table 2.
    let mut sent = Sent::default();
    for commit_ts in 10..70_010 {
        sent.transaction(&mut writer, commit_ts, &[(1, 1)]).await;
        publish(&mut writer, commit_ts);
        if commit_ts % 64 == 0 {
            tokio::task::yield_now().await;
        }
    }
    sent.wide_ddl(&mut writer, 80_000, &[2]).await;
    publish(&mut writer, 80_000);
    let idle = Instant::now() + Duration::from_secs(2);
    while Instant::now() < idle {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    manager.until_resolved(80_000, PATIENCE).await;
    assert_eq!(manager.seen(2), [Seen::Ddl(80_000)]);
    assert!(manager.rows(1) == sent.rows(1));
}
