//! The life of maintainers on one node, over the real message bus.

mod world;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use heartbeatpb::{
    ChangefeedId, CheckpointTsMessage, ComponentState, NodeId, NodeLiveness, RunningError,
    SetDispatcherDrainTargetRequest, SetNodeLivenessRequest, TableId, Ts, WallTime,
};
use maintainer::Whom;
use messaging::ToMaintainerManager;
use world::{Does, FakeFence, NODE_EPOCH, World, within};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_tables_are_placed_followed_and_let_go() {
    let world = World::with_coordinator(10_000).await;
    let id = ChangefeedId::fresh("big");
    world.add(&id, 3);
    within("all tables are created", || world.dispatchers.lock().running.len() == 10_001).await;
    within("the bootstrap is done", || world.status(&id).is_some_and(|status| status.bootstrap_done)).await;
    assert!(world.dispatchers.lock().started, "the table trigger runs");

    world.dispatchers.lock().advance(500);
    // Replicating one by one: the checkpoint holds until the last one is.
    within("the checkpoint moves", || {
        world.heartbeat(&id, vec![], false);
        world.status(&id).is_some_and(|status| status.checkpoint == Ts(500))
    })
    .await;
    let status = world.status(&id).unwrap();
    assert_eq!((status.last_synced, status.epoch.map(|epoch| epoch.get())), (Ts(7), Some(3)));

    let message = CheckpointTsMessage { changefeed: id.clone(), checkpoint: Ts(400) };
    world.send(ToMaintainerManager::CheckpointTs(message));
    within("the upstream may forget", || world.upstream.confirmed.load(Ordering::Relaxed) == 400).await;
    within("the sink may publish", || world.dispatchers.lock().persisted == Ts(400)).await;

    world.dispatchers.lock().slow_closes = 1;
    world.remove(&id, 3, true, true);
    within("it has stopped", || world.is_stopped(&id)).await;
    assert_eq!(*world.upstream.stopped.lock(), [Some(3)], "the reader stopped first");
    assert_eq!(world.dispatchers.lock().closes, 2, "asked again while closing");
    within("it is forgotten", || {
        world.bootstrap(1);
        world.heard.lock().bootstraps.last().is_some_and(|response| response.statuses.is_empty())
    })
    .await;
    world.stop().await;
}

/// Everybody has flushed everything up to `ts`, and the maintainer knows.
async fn advance(world: &World, id: &ChangefeedId, ts: u64) {
    world.dispatchers.lock().advance(ts);
    within("the checkpoint moves", || {
        world.heartbeat(id, vec![], false);
        // Only what is behind the checkpoint is confirmed.
        world.send(ToMaintainerManager::CheckpointTs(CheckpointTsMessage {
            changefeed: id.clone(),
            checkpoint: Ts(ts),
        }));
        world.upstream.confirmed.load(Ordering::Relaxed) == ts
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn whoever_follows_a_node_that_stops_or_a_maintainer_that_moves_begins_at_its_last_checkpoint() {
    for moves in [false, true] {
        let world = World::with_coordinator(1).await;
        let id = ChangefeedId::fresh("t");
        world.add(&id, 7);
        within("it works", || world.status(&id).is_some_and(|status| status.bootstrap_done)).await;
        within("it was told", || world.status(&id).is_some_and(|status| status.checkpoint == Ts(100))).await;
        advance(&world, &id, 640).await;
        assert_eq!(world.status(&id).unwrap().checkpoint, Ts(100), "it is told once in a second");
        let heard = Arc::clone(&world.heard);
        if moves {
            world.remove(&id, 7, false, false);
            within("it has stopped", || world.is_stopped(&id)).await;
            world.stop().await;
        } else {
            world.stop().await;
        }
        let last = heard.lock().last(&id).cloned().unwrap();
        assert_eq!((last.checkpoint, last.epoch.map(|epoch| epoch.get())), (Ts(640), Some(7)));
        assert_eq!(last.checkpoint_time, Some(WallTime(1_640)), "and when that was");
    }
}

#[tokio::test(start_paused = true)]
async fn that_a_maintainer_has_stopped_is_told_at_once() {
    let world = World::with_coordinator(1).await;
    let id = ChangefeedId::fresh("t");
    world.add(&id, 7);
    within("it works", || world.status(&id).is_some_and(|status| status.bootstrap_done)).await;
    let begun = tokio::time::Instant::now();
    world.remove(&id, 7, false, false);
    within("it has stopped", || world.is_stopped(&id)).await;
    assert!(begun.elapsed() < Duration::from_millis(150), "{:?}", begun.elapsed());
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn what_is_being_tried_again_is_told_until_it_is_over_and_is_no_error() {
    let world = World::with_coordinator(1).await;
    let id = ChangefeedId::fresh("t");
    world.add(&id, 7);
    within("it works", || world.status(&id).is_some_and(|status| status.bootstrap_done)).await;
    *world.upstream.trouble.lock() = Some(RunningError {
        time: "t".to_owned(),
        node: "n1".to_owned(),
        code: "CDC:ErrUpstreamUnreachable".to_owned(),
        message: "nothing answers".to_owned(),
    });
    within("it is told", || world.status(&id).is_some_and(|status| status.trouble.is_some())).await;
    let told = world.status(&id).unwrap();
    assert!(told.errors.is_empty());
    assert_eq!(told.trouble.unwrap().code, "CDC:ErrUpstreamUnreachable");
    *world.upstream.trouble.lock() = None;
    within("it is over", || world.status(&id).is_some_and(|status| status.trouble.is_none())).await;
    world.stop().await;
}

// behaviour: maintainer-14, maintainer-21a, coordinator-ND-7
#[tokio::test]
async fn a_maintainer_moves_away_and_only_a_newer_one_comes_back() {
    let world = World::with_coordinator(2).await;
    let id = ChangefeedId::fresh("t");
    world.add(&id, 7);
    within("it works", || world.status(&id).is_some_and(|status| status.bootstrap_done)).await;
    world.add(&id, 9);
    world.remove(&id, 6, true, true);
    world.remove(&id, 7, false, false);
    within("it has stopped", || world.is_stopped(&id)).await;
    assert_eq!(world.status(&id).unwrap().epoch.map(|epoch| epoch.get()), Some(7));
    let left: Vec<_> = world.dispatchers.lock().running.keys().copied().collect();
    assert_eq!(left.len(), 2, "the tables stay, the trigger does not");
    within("it is forgotten", || {
        world.bootstrap(1);
        world.heard.lock().bootstraps.last().is_some_and(|response| response.statuses.is_empty())
    })
    .await;
    for late in [5, 7] {
        world.add(&id, late);
    }
    world.add(&id, 8);
    within("the newer one works", || {
        world.status(&id).is_some_and(|s| s.epoch.map(|epoch| epoch.get()) == Some(8) && s.bootstrap_done)
    })
    .await;
    let readers: Vec<Option<u64>> = world.upstream.started.lock().iter().map(|(epoch, _)| *epoch).collect();
    assert_eq!(readers, [Some(7), Some(8)]);
    let now: Vec<_> = world.dispatchers.lock().running.keys().copied().collect();
    assert!(left.iter().all(|table| now.contains(table)), "what ran was taken over");
    world.stop().await;
}

// behaviour: maintainer-11, maintainer-12, maintainer-20, coordinator-ND-5
#[tokio::test]
async fn what_cannot_be_used_starts_nothing() {
    let world = World::with_coordinator(1).await;
    let id = ChangefeedId::fresh("t");
    let other = ChangefeedId::fresh("other");
    let foreign = World::add_request(&other, 1, 100);
    world.add_with(&id, 1, b"not-json", 100);
    world.add_with(&id, 1, b"{}", 100);
    world.add_with(&id, 1, &foreign.config.0, 100);
    world.add_with(&id, 1, &World::add_request(&id, 1, 100).config.0, 0);
    world.add(&other, 1);
    within("a good one starts", || world.status(&other).is_some()).await;
    assert!(world.status(&id).is_none());
    world.stop().await;
}

// behaviour: maintainer-9, maintainer-10
#[tokio::test]
async fn nobody_but_the_newest_coordinator_commands() {
    let world = World::new(1);
    let id = ChangefeedId::fresh("t");
    world.add(&id, 1);
    world.bootstrap(0);
    world.bootstrap(5);
    within("the coordinator is known", || world.heard.lock().bootstraps.len() == 1).await;
    world.bootstrap(4);
    world.bootstrap(5);
    within("it is answered again", || world.heard.lock().bootstraps.len() == 2).await;
    assert!(world.heard.lock().bootstraps.iter().all(|response| response.statuses.is_empty()));
    assert_eq!(world.heard.lock().heartbeats.len(), 2, "each answer is followed by a node heartbeat");
    world.stop().await;
}

// behaviour: maintainer-1, maintainer-2, maintainer-3, coordinator-ND-1, coordinator-ND-2
#[tokio::test]
async fn the_liveness_follows_requests_for_this_process_step_by_step() {
    let world = World::with_coordinator(1).await;
    let ask = |target, node_epoch| {
        world.send(ToMaintainerManager::SetNodeLiveness(SetNodeLivenessRequest { target, node_epoch }));
    };
    let before = world.node_heartbeats();
    ask(NodeLiveness::Draining, NODE_EPOCH + 1);
    ask(NodeLiveness::Stopping, NODE_EPOCH);
    ask(NodeLiveness::Draining, NODE_EPOCH);
    ask(NodeLiveness::Alive, NODE_EPOCH);
    within("all are answered", || world.heard.lock().liveness.len() == 4).await;
    let applied: Vec<NodeLiveness> =
        world.heard.lock().liveness.iter().map(|answer| answer.applied).collect();
    use NodeLiveness::{Alive, Draining};
    assert_eq!(applied, [Alive, Alive, Draining, Draining]);
    assert!(world.heard.lock().liveness.iter().all(|answer| answer.node_epoch == NODE_EPOCH));
    assert_eq!(world.node_heartbeats(), before + 1);
    assert_eq!(world.liveness.get(), Draining);
    world.stop().await;
}

// behaviour: maintainer-20
#[tokio::test]
async fn a_draining_node_takes_maintainers_and_a_stopping_one_does_not() {
    let world = World::with_coordinator(1).await;
    let (first, second) = (ChangefeedId::fresh("a"), ChangefeedId::fresh("b"));
    assert!(world.liveness.advance(NodeLiveness::Draining));
    world.add(&first, 1);
    within("it works", || world.status(&first).is_some_and(|status| status.bootstrap_done)).await;
    assert!(world.liveness.advance(NodeLiveness::Stopping));
    world.add(&second, 1);
    world.bootstrap(1);
    within("the request was handled", || world.heard.lock().bootstraps.len() == 2).await;
    assert!(world.status(&second).is_none());
    world.stop().await;
}

// behaviour: maintainer-6, maintainer-7, maintainer-8, coordinator-ND-3, coordinator-ND-4
#[tokio::test]
async fn drain_targets_are_always_acknowledged_and_reach_every_maintainer() {
    let world = World::with_coordinator(2).await;
    let (first, second) = (ChangefeedId::fresh("a"), ChangefeedId::fresh("b"));
    world.add(&first, 1);
    within("it works", || world.status(&first).is_some_and(|status| status.bootstrap_done)).await;
    let ask = |node: &str, epoch| {
        let target = (!node.is_empty()).then(|| NodeId::from(node));
        let request = SetDispatcherDrainTargetRequest { target, epoch };
        world.send(ToMaintainerManager::SetDrainTarget(request));
    };
    let before = world.node_heartbeats();
    ask("n2", 1);
    ask("", 1);
    ask("n2", 1);
    within("all are acknowledged", || world.node_heartbeats() >= before + 3).await;
    let told: Vec<(Option<NodeId>, u64)> = world.heard.lock().heartbeats[before..before + 3]
        .iter()
        .map(|heartbeat| (heartbeat.drain_target.clone(), heartbeat.drain_epoch))
        .collect();
    assert_eq!(told, [(Some("n2".into()), 1), (None, 1), (None, 1)]);

    ask("n1", 7);
    world.add(&second, 1);
    for id in [&first, &second] {
        within("the target is known", || {
            world.status(id).is_some_and(|status| status.drain.is_some_and(|drain| drain.epoch == 7))
        })
        .await;
    }
    world.bootstrap(2);
    within("the coordinator is answered", || world.heard.lock().bootstraps.len() == 2).await;
    let response = world.heard.lock().bootstraps.last().cloned().unwrap();
    assert_eq!((response.drain_target, response.drain_epoch), (Some("n1".into()), 7));
    assert_eq!((response.drain_protocol_version, response.statuses.len()), (1, 2));
    world.stop().await;
}

// behaviour: maintainer-18, maintainer-19, coordinator-ND-9
#[tokio::test]
async fn a_changefeed_that_is_not_here_is_stopped_or_closed_everywhere() {
    let world = World::with_coordinator(1).await;
    let (moved, deleted) = (ChangefeedId::fresh("a"), ChangefeedId::fresh("b"));
    world.remove(&moved, 7, false, false);
    within("it is answered", || world.is_stopped(&moved)).await;
    assert_eq!(world.status(&moved).unwrap().epoch.map(|epoch| epoch.get()), Some(7));
    world.remove(&deleted, 9, true, true);
    within("it is closed", || world.is_stopped(&deleted)).await;
    assert_eq!(world.dispatchers.lock().closes, 1);
    let status = world.status(&deleted).unwrap();
    assert_eq!((status.checkpoint, status.epoch.map(|epoch| epoch.get())), (Ts(1), Some(9)));
    assert!(world.upstream.started.lock().is_empty() && world.upstream.stopped.lock().is_empty());
    world.stop().await;
}

// behaviour: maintainer-21a
#[tokio::test]
async fn an_order_to_begin_that_comes_after_the_answer_that_nobody_is_here_is_not_followed() {
    let world = World::with_coordinator(1).await;
    let id = ChangefeedId::fresh("t");
    world.remove(&id, 7, false, false);
    within("it is answered", || world.is_stopped(&id)).await;
    for late in [6, 7] {
        world.add(&id, late);
    }
    world.bootstrap(1);
    within("the late orders were handled", || world.heard.lock().bootstraps.len() == 2).await;
    let known = world.heard.lock().bootstraps[1].statuses.len();
    assert_eq!((known, world.upstream.started.lock().len()), (0, 0), "nothing was revived");
    world.add(&id, 8);
    within("a newer one works", || world.status(&id).is_some_and(|status| status.bootstrap_done)).await;
    world.stop().await;
}

// behaviour: maintainer-21
#[tokio::test]
async fn a_maintainer_that_stops_slowly_delays_no_other() {
    let world = World::with_coordinator(1).await;
    let (slow, quick) = (ChangefeedId::fresh("slow"), ChangefeedId::fresh("quick"));
    world.add(&slow, 1);
    within("it works", || world.status(&slow).is_some_and(|status| status.bootstrap_done)).await;
    *world.upstream.slow_stop.lock() = Duration::from_secs(3600);
    world.remove(&slow, 1, true, true);
    world.add(&slow, 2);
    world.add(&quick, 1);
    within("the other one works", || world.status(&quick).is_some_and(|status| status.bootstrap_done)).await;
    assert!(!world.is_stopped(&slow), "its log reader has not stopped");
    let epochs: Vec<Option<u64>> = world.upstream.started.lock().iter().map(|(epoch, _)| *epoch).collect();
    assert_eq!(epochs, [Some(1), Some(1)], "no second one beside it");
    *world.upstream.slow_stop.lock() = Duration::ZERO;
    drop(world);
}

#[tokio::test]
async fn an_error_reaches_the_coordinator_once_and_a_stopped_process_stops_its_readers() {
    let world = World::with_coordinator(1).await;
    let id = ChangefeedId::fresh("t");
    *world.upstream.fails.lock() = Some(RunningError {
        time: "t".to_owned(),
        node: "n1".to_owned(),
        code: "CDC:ErrX".to_owned(),
        message: "no".to_owned(),
    });
    world.add(&id, 1);
    within("the error is told", || {
        world.heard.lock().statuses.iter().any(|status| !status.errors.is_empty())
    })
    .await;
    let count = world.heard.lock().statuses.len();
    within("more is told", || world.heard.lock().statuses.len() >= count + 2).await;
    let told: usize = world.heard.lock().statuses.iter().map(|status| status.errors.len()).sum();
    assert_eq!(told, 1);
    assert_eq!(world.status(&id).unwrap().state, ComponentState::Working);
    let upstream = std::sync::Arc::clone(&world.upstream);
    world.stop().await;
    assert_eq!(*upstream.stopped.lock(), [Some(1)]);
}

#[tokio::test]
async fn people_divide_a_table_and_see_where_its_parts_are() {
    let world = World::with_coordinator(2).await;
    let id = ChangefeedId::fresh("t");
    let placements = world.placements.clone();
    let nobody = placements.dispatcher_count(&id).await;
    assert_eq!(nobody, Err(maintainer::PlacementError::NoSuchChangefeed));
    world.add_across_nodes(&id, 3);
    within("the bootstrap is done", || world.status(&id).is_some_and(|status| status.bootstrap_done)).await;
    within("both tables run", || world.dispatchers.lock().running.len() == 3).await;
    let divide = async {
        // The operator of the first creation may not have heard yet.
        while let Err(error) = placements.split_table(&id, TableId(1), Some(4)).await {
            assert!(error.is_retryable(), "{error}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), divide).await.unwrap();
    assert_eq!(placements.dispatcher_count(&id).await, Ok(6));
    let tables = placements.tables(&id).await.unwrap();
    assert_eq!(tables[&NodeId::from("n1")], [TableId(0), TableId(1), TableId(2)]);
    let mut ranges: Vec<_> = {
        let dispatchers = world.dispatchers.lock();
        let spans = dispatchers.running.values().map(|(_, span, _)| span.clone());
        spans.filter(|span| span.table == TableId(1)).collect()
    };
    ranges.sort();
    assert_eq!(ranges.len(), 4);
    assert!(ranges.windows(2).all(|pair| pair[0].is_followed_by(&pair[1])), "{ranges:?}");
    world.stop().await;
    assert_eq!(placements.dispatcher_count(&id).await, Err(maintainer::PlacementError::Ended));
}

#[tokio::test]
async fn a_downstream_is_asked_until_it_refuses_whoever_is_no_member() {
    let fence = Arc::<FakeFence>::default();
    fence.does.lock().extend([Does::Fail, Does::Panic]);
    let world = World::with_fence(1, Arc::clone(&fence) as Arc<dyn maintainer::DownstreamFence>);
    world.bootstrap(1);
    let id = ChangefeedId::fresh("t");
    world.add(&id, 7);
    within("it works", || world.status(&id).is_some_and(|status| status.bootstrap_done)).await;
    let members = Whom::AllBut([NodeId::from("n1")].into());
    assert_eq!(
        *fence.asked.lock(),
        [(Some(7), members.clone()), (Some(7), members.clone()), (Some(7), members)]
    );
    within("its table is created", || world.dispatchers.lock().running.len() == 2).await;
    world.stop().await;
}

/// Until it has taken over it may let dispatchers that are further begin anew, where it began itself.
#[tokio::test(start_paused = true)]
async fn the_log_may_drop_nothing_before_the_take_over_and_then_what_is_behind_the_checkpoint() {
    let fence = Arc::<FakeFence>::default();
    fence.does.lock().extend([Does::Fail, Does::Fail]);
    let world = World::with_fence(1, Arc::clone(&fence) as Arc<dyn maintainer::DownstreamFence>);
    world.bootstrap(1);
    let id = ChangefeedId::fresh("t");
    world.add(&id, 7);
    within("it waits for the downstream", || fence.asked.lock().len() == 2).await;
    world.heartbeat(&id, vec![], false);
    assert_eq!(*world.upstream.floors.lock(), []);
    within("it works", || world.status(&id).is_some_and(|status| status.bootstrap_done)).await;
    assert_eq!(*world.upstream.floors.lock(), [(Some(7), Ts(100))], "where it began");
    within("its table is created", || world.dispatchers.lock().running.len() == 2).await;
    advance(&world, &id, 500).await;
    assert_eq!(world.upstream.floors.lock().last(), Some(&(Some(7), Ts(500))));
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_downstream_that_never_answers_is_asked_again_and_a_maintainer_ends_meanwhile() {
    let fence = Arc::<FakeFence>::default();
    fence.does.lock().extend([Does::Nothing, Does::Nothing]);
    let world = World::with_fence(1, Arc::clone(&fence) as Arc<dyn maintainer::DownstreamFence>);
    world.bootstrap(1);
    let id = ChangefeedId::fresh("t");
    world.add(&id, 7);
    within("it is asked again", || fence.asked.lock().len() == 2).await;
    assert_eq!(world.dispatchers.lock().running.len(), 1, "the table trigger alone");
    world.remove(&id, 7, true, false);
    within("it has stopped", || world.is_stopped(&id)).await;
    world.stop().await;
}
