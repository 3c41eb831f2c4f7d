//! Dispatchers that turn to a node before the log is read there, as when a maintainer moves. Time is virtual: it jumps
//! when nothing is left to do.

use std::time::Duration;

use heartbeatpb::Ts;
use tokio::time::Instant;

use crate::rig::*;
use crate::{PATIENCE, at_once};

/// Nobody polls: what has to wait for a timer of the collector takes longer.
const AT_ONCE: Duration = Duration::from_millis(200);

/// Opens the log with tables 1 and 2, resolved up to 5; answers how long it took until that was known.
async fn open_and_follow(rig: &Rig, manager: &mut Manager) -> Duration {
    let begun = Instant::now();
    let mut writer = rig.open(Ts(1));
    register(&mut writer, 1);
    register(&mut writer, 2);
    publish(&mut writer, 5);
    manager.until_resolved(5, PATIENCE).await;
    begun.elapsed()
}

#[tokio::test(start_paused = true)]
async fn whoever_registers_before_the_log_opens_is_served_as_soon_as_it_does() {
    // At any distance to the timers of the collector.
    for early in [Duration::from_millis(20), Duration::from_millis(930), Duration::from_secs(7)] {
        let rig = Rig::over_network(at_once(), 1);
        let mut manager = rig.manager(64 << 20);
        manager.subscribe(1, Ts(1));
        manager.subscribe(2, Ts(1));
        assert!(!manager.take(early).await, "there is no log");
        let took = open_and_follow(&rig, &mut manager).await;
        assert!(took < AT_ONCE, "{early:?} early, served after {took:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_log_that_closes_and_opens_again_goes_on_with_those_that_it_had() {
    let rig = Rig::over_network(at_once(), 3);
    let mut manager = rig.manager(64 << 20);
    manager.subscribe(1, Ts(1));
    manager.subscribe(2, Ts(1));
    open_and_follow(&rig, &mut manager).await;
    rig.close();
    assert!(!manager.take(Duration::from_secs(3)).await, "nothing comes without a log");
    let begun = Instant::now();
    let mut writer = rig.open(Ts(1));
    for table in [1, 2] {
        register(&mut writer, table);
    }
    publish(&mut writer, 9);
    manager.until_resolved(9, PATIENCE).await;
    assert!(begun.elapsed() < AT_ONCE, "{:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_registration_that_is_lost_is_repeated_within_a_second() {
    let rig = Rig::over_network(at_once(), 4);
    let mut manager = rig.manager(64 << 20);
    let mut writer = rig.open(Ts(1));
    register(&mut writer, 1);
    publish(&mut writer, 5);
    rig.cut_off(true);
    manager.subscribe(1, Ts(1));
    assert!(!manager.take(Duration::from_millis(100)).await, "it is lost");
    rig.cut_off(false);
    let begun = Instant::now();
    manager.until_resolved(5, PATIENCE).await;
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
}
