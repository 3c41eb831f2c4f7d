//! Nodes that share a log: one that falls behind slows its own dispatchers and nobody else's.

use std::time::{Duration, Instant};

use heartbeatpb::Ts;
use messaging::testing::Faults;

use crate::PATIENCE;
use crate::rig::*;

const MEMORY: usize = 1 << 20;
const WINDOW: usize = 256 << 10;
/// What may be beyond a limit: the chunk that passes it, and the transaction that is being written.
const SLACK: usize = 600 << 10;
/// Transactions, of two tables with some rows each: several times the memory and the window.
const TRANSACTIONS: u64 = 600;

fn limits() -> LogLimits {
    LogLimits { memory_bytes: MEMORY, disk_bytes: 1 << 30 }
}

/// Tables 1 and 2: each node has a dispatcher of one.
fn two_nodes(rig: &Rig) -> (Manager, Manager) {
    let (mut slow, mut quick) = (rig.manager(WINDOW), rig.other_node("quick").manager(WINDOW));
    quick.first_id = 2;
    slow.hold = true;
    slow.subscribe(1, Ts(1));
    quick.subscribe(2, Ts(1));
    (slow, quick)
}

/// Writes transactions, each of which the quick node has before the next one is written; answers how long that took.
async fn follow(rig: &Rig, sent: &mut Sent, quick: &mut Manager, from: u64) -> Duration {
    let begun = Instant::now();
    let mut writer = rig.open(Ts(from));
    register(&mut writer, 1);
    register(&mut writer, 2);
    for commit_ts in from + 1..=from + TRANSACTIONS {
        sent.transaction(&mut writer, commit_ts, &[(1, 60), (2, 20)]).await;
        publish(&mut writer, commit_ts);
        quick.until_resolved(commit_ts, PATIENCE).await;
        quick.checkpoint_all(commit_ts);
        assert!(rig.stats().memory_bytes <= MEMORY + SLACK, "{:?}", rig.stats());
    }
    begun.elapsed()
}

// behaviour: dispatcher-103
#[tokio::test(flavor = "multi_thread")]
async fn a_node_whose_sink_stands_still_slows_only_its_own_dispatchers_and_memory_stays_bounded() {
    let rig = Rig::over_network(limits(), 11);
    let (mut slow, mut quick) = two_nodes(&rig);
    let mut sent = Sent::default();
    follow(&rig, &mut sent, &mut quick, 1).await;
    assert_eq!(quick.rows(2), sent.rows(2), "the quick node has everything");
    // Everything that the slow one was given and has not freed.
    while slow.take(Duration::from_millis(200)).await {}
    let held = slow.held_bytes();
    assert!(held > 0 && held <= WINDOW + SLACK, "{held} bytes are held");
    let got = slow.rows(1).len();
    assert!(got * 4 < sent.rows(1).len(), "the slow node is far behind: {got} rows");
    let stats = rig.stats();
    assert!(stats.disk_bytes > 0, "what it has not read is on disk: {stats:?}");
    // Its sink goes on: it misses nothing.
    let deadline = Instant::now() + PATIENCE;
    while slow.resolved_of_all() < Ts(1 + TRANSACTIONS) {
        assert!(Instant::now() < deadline, "stands still at {}", slow.resolved_of_all());
        slow.free_held();
        slow.take(Duration::from_millis(20)).await;
        assert!(rig.stats().memory_bytes <= MEMORY + SLACK, "{:?}", rig.stats());
    }
    assert_eq!(slow.rows(1), sent.rows(1));
}

#[tokio::test(start_paused = true)]
async fn a_node_behind_a_slow_link_does_not_delay_the_events_of_another() {
    // Time is virtual: what is measured is waiting alone.
    let mut took = Vec::new();
    for delay in [Duration::ZERO, Duration::from_millis(400)] {
        let rig = Rig::over_network(limits(), 12);
        let (mut slow, mut quick) = two_nodes(&rig);
        slow.hold = false;
        rig.slow_link(Faults { delay: delay..delay, ..Faults::NONE });
        let begun = tokio::time::Instant::now();
        let mut sent = Sent::default();
        let mut writer = rig.open(Ts(1));
        register(&mut writer, 1);
        register(&mut writer, 2);
        for commit_ts in 2..200 {
            sent.transaction(&mut writer, commit_ts, &[(1, 20), (2, 10)]).await;
            publish(&mut writer, commit_ts);
            quick.until_resolved(commit_ts, PATIENCE).await;
        }
        took.push(begun.elapsed());
        slow.until_resolved(199, PATIENCE).await;
        assert_eq!(slow.rows(1), sent.rows(1));
    }
    let (alone, beside) = (took[0], took[1]);
    assert!(beside < alone + Duration::from_secs(2), "{alone:?} alone, {beside:?} beside a slow link");
}
