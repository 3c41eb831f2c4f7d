//! From the reader's hand to the dispatcher manager's: store, event service and collector over one bus.

#![expect(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

mod barrier;
mod disk;
mod early;
mod floor;
mod hold;
mod large;
mod neighbours;
mod ranges;
mod reset;
mod rig;
mod silence;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use heartbeatpb::{ChangefeedId, DispatcherId, NodeId, Ts};
use logservice::topic::{
    DispatcherProgress, EventCollectorTopic, EventServiceTopic, ToEventCollector, ToEventService,
};
use logservice::{DispatcherEvent, LogConfig, LogService};
use messaging::testing::Faults;
use messaging::{MessageCenter, MessagingConfig};
use proptest::prelude::*;
use rig::*;
use tokio_util::sync::CancellationToken;

/// More than any step takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn at_once() -> LogLimits {
    LogLimits { memory_bytes: 4 << 20, disk_bytes: 1 << 30 }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_several_tables_arrive_complete_and_in_order_with_a_resolved_ts() {
    let rig = Rig::new(at_once());
    let mut writer = rig.open(Ts(1));
    let mut manager = rig.manager(64 << 20);
    for table in 1..=5 {
        register(&mut writer, table);
        manager.subscribe(table, Ts(1));
    }
    let mut sent = Sent::default();
    for commit_ts in (10..2000).step_by(3) {
        sent.transaction(&mut writer, commit_ts, &[(1 + commit_ts.cast_signed() % 4, 3), (5, 1)]).await;
        if commit_ts % 7 == 0 {
            publish(&mut writer, commit_ts);
        }
    }
    publish(&mut writer, 2000);
    manager.until_resolved(2000, PATIENCE).await;
    for table in 1..=5 {
        assert_eq!(manager.rows(table), sent.rows(table), "table {table}");
    }
}

// behaviour: dispatcher-103
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_consumer_holds_no_more_than_the_window_and_gets_everything_in_the_end() {
    let rig = Rig::new(at_once());
    let mut writer = rig.open(Ts(1));
    let window = 512 << 10;
    let mut manager = rig.manager(window);
    manager.hold = true;
    let mut sent = Sent::default();
    for table in 1..=3 {
        register(&mut writer, table);
        manager.subscribe(table, Ts(1));
    }
    for commit_ts in 10..400 {
        sent.transaction(&mut writer, commit_ts, &[(1, 40), (2, 40), (3, 40)]).await;
        publish(&mut writer, commit_ts);
    }
    assert!(sent.bytes() > 4 * window, "the test needs more than the window");
    let deadline = Instant::now() + PATIENCE;
    while manager.resolved_of_all() < Ts(399) {
        assert!(Instant::now() < deadline, "stands still at {}", manager.resolved_of_all());
        if !manager.take(Duration::from_millis(300)).await {
            // Nothing more comes: what is held is all that fits.
            let most = window + 3 * (300 << 10);
            assert!(manager.held_bytes() <= most, "{} bytes are held", manager.held_bytes());
            manager.free_held();
        }
    }
    for table in 1..=3 {
        assert_eq!(manager.rows(table), sent.rows(table), "table {table}");
    }
}

// A full receiver is nobody else's business.
#[tokio::test(flavor = "multi_thread")]
async fn a_blocked_stream_does_not_hold_up_the_resolved_ts_of_another_changefeed() {
    let rig = Rig::new(at_once());
    let other = rig.other_changefeed();
    let (mut writer, mut writer_of_other) = (rig.open(Ts(1)), other.open(Ts(1)));
    let (mut slow, mut quick) = (rig.manager(1000), other.manager(1 << 20));
    slow.hold = true;
    register(&mut writer, 1);
    register(&mut writer_of_other, 1);
    slow.subscribe(1, Ts(1));
    quick.subscribe(1, Ts(1));
    let mut sent = Sent::default();
    for commit_ts in 10..50 {
        sent.transaction(&mut writer, commit_ts, &[(1, 50)]).await;
        publish(&mut writer, commit_ts);
    }
    while slow.held_bytes() == 0 {
        assert!(slow.take(PATIENCE).await);
    }
    for resolved in 10..30 {
        publish(&mut writer_of_other, resolved);
        quick.until_resolved(resolved, PATIENCE).await;
    }
}

// behaviour: dataplane-1
#[tokio::test(flavor = "multi_thread")]
async fn lost_messages_lead_to_resets_and_no_row_is_lost() {
    for seed in [3, 4] {
        let rig = Rig::over_network(at_once(), seed);
        let mut writer = rig.open(Ts(1));
        let mut manager = rig.manager(256 << 10);
        for table in 1..=4 {
            register(&mut writer, table);
            manager.subscribe(table, Ts(1));
        }
        manager.until_resolved(1, PATIENCE).await;
        let begun = manager.begins();
        rig.set_faults(Faults { loss: 0.05, ..Faults::NONE });
        let mut sent = Sent::default();
        let deadline = Instant::now() + PATIENCE;
        let mut commit_ts = 10;
        while manager.begins() < begun + 4 {
            assert!(Instant::now() < deadline, "nothing is lost: the test shows nothing");
            commit_ts += 1;
            sent.transaction(&mut writer, commit_ts, &[(1 + commit_ts.cast_signed() % 4, 8)]).await;
            publish(&mut writer, commit_ts);
            while manager.take(Duration::from_millis(1)).await {}
        }
        // The keep-alive of an upstream that stands still shows the last gap.
        rig.set_faults(Faults::NONE);
        let mut resolved = commit_ts;
        let deadline = Instant::now() + PATIENCE;
        while manager.resolved_of_all() < Ts(commit_ts) {
            assert!(Instant::now() < deadline, "stands still at {}", manager.resolved_of_all());
            resolved += 1;
            publish(&mut writer, resolved);
            manager.take(Duration::from_millis(100)).await;
        }
        for table in 1..=4 {
            assert_eq!(manager.rows(table), sent.rows(table), "table {table}, seed {seed}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_of_300_000_rows_arrives_whole() {
    let rig = Rig::new(LogLimits { memory_bytes: 2 << 20, disk_bytes: 1 << 30 });
    let mut writer = rig.open(Ts(1));
    let mut manager = rig.manager(4 << 20);
    register(&mut writer, 1);
    manager.subscribe(1, Ts(1));
    let mut sent = Sent::default();
    sent.transaction(&mut writer, 10, &[(1, 3)]).await;
    sent.transaction(&mut writer, 20, &[(1, 300_000)]).await;
    sent.transaction(&mut writer, 30, &[(1, 3)]).await;
    publish(&mut writer, 30);
    manager.until_resolved(30, PATIENCE).await;
    assert!(manager.rows(1) == sent.rows(1), "{} of {} rows", manager.rows(1).len(), sent.rows(1).len());
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_a_copy_arrive_while_it_is_open_and_survive_a_reset_after_they_were_trimmed() {
    let rig = Rig::over_network(at_once(), 5);
    let mut writer = rig.open(Ts(1));
    let mut manager = rig.manager(64 << 20);
    register(&mut writer, 1);
    manager.subscribe(1, Ts(1));
    let mut sent = Sent::default();
    let mut copy = writer.copy_writer(table(1), Ts(100), Ts(99), heartbeatpb::WallTime(1));
    sent.copy_start(1, 100);
    sent.copy_rows(&mut copy, 1, 20_000).await;
    while manager.rows(1).len() < 10_000 {
        assert!(manager.take(PATIENCE).await, "rows wait for the end of the copy");
    }
    assert!(manager.resolved_of_all() < Ts(100), "the copy is not complete");
    let before = rig.stats();
    let copied = manager.rows(1).len() as u64;
    manager.tell_copied(1, Ts(100), copied);
    let deadline = Instant::now() + PATIENCE;
    while rig.stats().memory_bytes + rig.stats().disk_bytes as usize
        >= before.memory_bytes + before.disk_bytes as usize
    {
        assert!(Instant::now() < deadline, "copied rows stay in the store");
        manager.take(Duration::from_millis(50)).await;
    }
    // A lost event: the stream begins again behind what was copied.
    rig.lose_one_event(|| async {
        sent.copy_rows(&mut copy, 1, 8_000).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
    })
    .await;
    sent.copy_rows(&mut copy, 1, 8_000).await;
    copy.finish();
    sent.transaction(&mut writer, 200, &[(1, 2)]).await;
    publish(&mut writer, 200);
    manager.until_resolved(200, PATIENCE).await;
    assert!(manager.rows(1) == sent.rows(1), "{} of {} rows", manager.rows(1).len(), sent.rows(1).len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dispatcher_that_is_unsubscribed_and_subscribed_again_begins_anew() {
    let rig = Rig::new(at_once());
    let mut writer = rig.open(Ts(1));
    let mut manager = rig.manager(64 << 20);
    register(&mut writer, 1);
    manager.subscribe(1, Ts(1));
    let mut sent = Sent::default();
    for commit_ts in 10..60 {
        sent.transaction(&mut writer, commit_ts, &[(1, 5)]).await;
        publish(&mut writer, commit_ts);
    }
    for _ in 0..20 {
        manager.take(Duration::from_millis(1)).await;
        manager.unsubscribe(1);
        manager.subscribe(1, Ts(1));
    }
    manager.forget();
    manager.until_resolved(59, PATIENCE).await;
    assert_eq!(manager.rows(1), sent.rows(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manager_that_opens_again_gets_everything_though_the_one_before_holds_its_window() {
    let rig = Rig::new(at_once());
    let mut writer = rig.open(Ts(1));
    let mut first = rig.manager(10_000);
    first.hold = true;
    register(&mut writer, 1);
    first.subscribe(1, Ts(1));
    let mut sent = Sent::default();
    for commit_ts in 10..200 {
        sent.transaction(&mut writer, commit_ts, &[(1, 20)]).await;
        publish(&mut writer, commit_ts);
    }
    while first.held_bytes() < 10_000 {
        assert!(first.take(PATIENCE).await);
    }
    let mut second = rig.manager(10_000);
    second.subscribe(1, Ts(1));
    second.until_resolved(199, PATIENCE).await;
    assert_eq!(second.rows(1), sent.rows(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_begin_again_by_themselves_when_the_store_is_opened_again() {
    let rig = Rig::new(at_once());
    let mut writer = rig.open(Ts(1));
    let mut manager = rig.manager(64 << 10);
    for table in 1..=2 {
        register(&mut writer, table);
        manager.subscribe(table, Ts(1));
    }
    let mut sent = Sent::default();
    for commit_ts in 10..100 {
        sent.transaction(&mut writer, commit_ts, &[(1, 10), (2, 10)]).await;
        publish(&mut writer, commit_ts);
    }
    manager.until_resolved(50, PATIENCE).await;
    let begins = manager.begins();
    for with_pause in [false, true] {
        let checkpoint = manager.checkpoint_all(50);
        rig.close();
        if with_pause {
            manager.take(Duration::from_millis(1500)).await;
        }
        let mut writer = rig.open(checkpoint);
        for table in 1..=2 {
            register(&mut writer, table);
        }
        let last = if with_pause { 220 } else { 180 };
        for commit_ts in checkpoint.0 + 1..last {
            sent.transaction_again(&mut writer, commit_ts, &[(1, 10), (2, 10)]).await;
            publish(&mut writer, commit_ts);
        }
        manager.until_resolved(last - 1, PATIENCE).await;
    }
    for table in 1..=2 {
        assert_eq!(manager.rows(table), sent.rows(table), "table {table}");
    }
    assert!(manager.begins() >= begins + 4, "each stream began again each time");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_behind_the_checkpoints_leaves_memory_and_disk() {
    let rig = Rig::new(LogLimits { memory_bytes: 256 << 10, disk_bytes: 1 << 30 });
    let mut writer = rig.open(Ts(1));
    let mut manager = rig.manager(64 << 20);
    register(&mut writer, 1);
    manager.subscribe(1, Ts(1));
    let mut sent = Sent::default();
    for commit_ts in 10..300 {
        sent.transaction(&mut writer, commit_ts, &[(1, 60)]).await;
        publish(&mut writer, commit_ts);
    }
    manager.until_resolved(299, PATIENCE).await;
    assert!(rig.stats().disk_bytes > 0, "the test needs something on disk");
    manager.checkpoint_all(299);
    let deadline = Instant::now() + PATIENCE;
    while rig.stats().memory_bytes > 0 || rig.stats().disk_bytes > 0 {
        assert!(Instant::now() < deadline, "left: {:?}", rig.stats());
        manager.take(Duration::from_millis(50)).await;
    }
}

// A store that is full lets its writer go on when the slowest of several readers of a table has moved.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_two_dispatchers_read_is_trimmed_by_the_slower_one() {
    let rig = Rig::new(at_once());
    let mut writer = rig.open(Ts(1));
    let mut manager = rig.manager(64 << 20);
    register(&mut writer, 1);
    let (one, two) = (manager.subscribe(1, Ts(1)), manager.subscribe(1, Ts(1)));
    let mut sent = Sent::default();
    for commit_ts in 10..20 {
        sent.transaction(&mut writer, commit_ts, &[(1, 60)]).await;
        publish(&mut writer, commit_ts);
    }
    manager.until_resolved(19, PATIENCE).await;
    manager.checkpoint(one, 19);
    let full = rig.stats().memory_bytes;
    let heartbeats = Instant::now() + Duration::from_millis(2500);
    while Instant::now() < heartbeats {
        manager.take(Duration::from_millis(100)).await;
    }
    assert_eq!(rig.stats().memory_bytes, full, "the slower one still needs it");
    manager.checkpoint(two, 19);
    let deadline = Instant::now() + PATIENCE;
    while rig.stats().memory_bytes > 0 {
        assert!(Instant::now() < deadline);
        manager.take(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schema_change_comes_after_rows_of_its_commit_ts_and_before_later_ones() {
    let rig = Rig::new(at_once());
    let mut writer = rig.open(Ts(1));
    let mut manager = rig.manager(64 << 20);
    register(&mut writer, 1);
    manager.subscribe(1, Ts(1));
    let mut expected = Vec::new();
    let mut sent = Sent::default();
    for commit_ts in 10..600 {
        if commit_ts % 3 == 0 {
            sent.transaction_with_ddl(&mut writer, commit_ts, &[(1, 1)]).await;
            expected.extend([Seen::Row(commit_ts), Seen::Ddl(commit_ts)]);
        } else {
            sent.transaction(&mut writer, commit_ts, &[(1, 1)]).await;
            expected.push(Seen::Row(commit_ts));
        }
        if commit_ts % 2 == 0 {
            publish(&mut writer, commit_ts);
        }
        tokio::task::yield_now().await;
    }
    publish(&mut writer, 600);
    manager.until_resolved(600, PATIENCE).await;
    assert_eq!(manager.seen(1), expected);
}

// behaviour: dataplane-7
// behaviour: dispatcher-103
#[tokio::test(flavor = "multi_thread")]
async fn a_manager_that_never_receives_overflows_and_gets_everything_when_it_does() {
    let rig = Rig::new(at_once());
    let mut writer = rig.open(Ts(1));
    let mut manager = rig.manager(64 << 20);
    register(&mut writer, 1);
    manager.subscribe(1, Ts(1));
    let mut sent = Sent::default();
    // More events than may wait for a manager.
    for commit_ts in 10..70_010 {
        sent.transaction(&mut writer, commit_ts, &[(1, 1)]).await;
        publish(&mut writer, commit_ts);
        if commit_ts % 64 == 0 {
            tokio::task::yield_now().await;
        }
    }
    let idle = Instant::now() + Duration::from_secs(2);
    while Instant::now() < idle {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    manager.until_resolved(70_009, PATIENCE).await;
    assert!(manager.rows(1) == sent.rows(1), "{} of {} rows", manager.rows(1).len(), sent.rows(1).len());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    /// G3: whatever is published, in whatever portions, a resolved ts comes after every row at or before it.
    /// The manager of the rig panics when a row arrives behind a resolved ts of its stream.
    #[test]
    fn a_resolved_ts_never_passes_a_row_that_was_not_delivered(
        steps in prop::collection::vec((1u64..4, 1i64..5, 0usize..4, any::<bool>(), 0u8..8), 50..300),
        window in 200usize..20_000,
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(3).enable_all().build().unwrap();
        runtime.block_on(async {
            let rig = Rig::new(at_once());
            let mut writer = rig.open(Ts(1));
            let mut manager = rig.manager(window);
            for table in 1..=4 {
                register(&mut writer, table);
                manager.subscribe(table, Ts(1));
            }
            let writing = tokio::spawn(async move {
                let (mut sent, mut commit_ts) = (Sent::default(), 10);
                for (step, table, rows, published, yields) in steps {
                    commit_ts += step;
                    sent.transaction(&mut writer, commit_ts, &[(table, rows)]).await;
                    if published {
                        publish(&mut writer, commit_ts);
                    }
                    for _ in 0..yields {
                        tokio::task::yield_now().await;
                    }
                }
                publish(&mut writer, commit_ts);
                (sent, commit_ts, writer)
            });
            while !writing.is_finished() {
                manager.take(Duration::from_millis(1)).await;
            }
            let (sent, last, _writer) = writing.await.unwrap();
            manager.until_resolved(last, PATIENCE).await;
            let mut expected = BTreeMap::new();
            let mut found = BTreeMap::new();
            for table in 1..=4 {
                expected.insert(table, sent.rows(table));
                found.insert(table, manager.rows(table));
            }
            assert_eq!(found, expected);
        });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_event_tells_the_shape_of_the_table() {
    let rig = Rig::new(at_once());
    let mut writer = rig.open(Ts(1));
    let mut manager = rig.manager(1 << 20);
    register(&mut writer, 1);
    manager.subscribe(1, Ts(1));
    let delivery = manager.next(PATIENCE).await.unwrap();
    let DispatcherEvent::Begin(Some(shape)) = delivery.event else { panic!("{:?}", delivery.event) };
    assert_eq!(shape, table(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn heartbeats_and_resets_of_unknown_changefeeds_and_dispatchers_are_answered() {
    let center = MessageCenter::new(NodeId::from("one"), MessagingConfig::default());
    let dir = tempfile::tempdir().unwrap();
    let config = LogConfig { dir: dir.path().to_owned(), memory_bytes: 1 << 20, disk_bytes: 1 << 20 };
    let log = LogService::new(center.clone(), config);
    let mut events = center.register::<EventCollectorTopic>(64);
    let (service, stop) = (log.clone(), CancellationToken::new());
    let task = tokio::spawn({
        let stop = stop.clone();
        async move { service.run(stop).await }
    });
    let (known, unknown) = (ChangefeedId::fresh("known"), ChangefeedId::fresh("unknown"));
    let _writer = log.open(&known, Ts(1)).unwrap();
    let dispatcher = DispatcherId::new(1, 1);
    for changefeed in [known, unknown] {
        let entry = DispatcherProgress { dispatcher, epoch: 1, checkpoint: Ts(1), copied: None };
        let heartbeat = ToEventService::Heartbeat { changefeed: changefeed.clone(), progress: vec![entry] };
        let (epoch, start_ts, copied) = (1, Ts(1), None);
        let reset =
            ToEventService::Reset { changefeed: changefeed.clone(), dispatcher, epoch, start_ts, copied };
        for message in [heartbeat, reset] {
            let expected = ToEventCollector::NotRegistered { changefeed: changefeed.gid, dispatcher };
            let deadline = Instant::now() + PATIENCE;
            // What is said before the service listens has no answer.
            loop {
                let _ = center.send::<EventServiceTopic>(center.node(), message.clone());
                let answer = tokio::time::timeout(Duration::from_millis(100), events.recv()).await;
                if answer.ok().flatten().is_some_and(|answer| answer.message == expected) {
                    break;
                }
                assert!(Instant::now() < deadline, "no answer to {message:?}");
            }
        }
    }
    stop.cancel();
    task.await.unwrap();
}
