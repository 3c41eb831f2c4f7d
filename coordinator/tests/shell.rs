//! The coordinator's task over a real store and a real bus, against a node that plays the maintainers' part.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "shell/leading.rs"]
mod leading;
#[path = "shell/node.rs"]
mod node;
#[path = "shell/operations.rs"]
mod operations;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use coordinator::{Error, Layout};
use heartbeatpb::config::{ChangefeedState, Progress};
use heartbeatpb::{MaintainerEpoch, RunningError, Ts};

use node::{Node, info, replicating, until, within};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changefeed_lives_from_creation_to_removal() {
    let dir = tempfile::tempdir().unwrap();
    let mut node = Node::start(dir.path());
    let coordinator = node.coordinator().await;

    let created = coordinator.create(info("orders")).await.unwrap();
    assert!(matches!(coordinator.create(info("orders")).await, Err(Error::AlreadyExists(_))));
    until(&coordinator, "orders", "it replicates", replicating).await;
    let first = node.maintainers.lock().epochs[0];
    assert!(first > MaintainerEpoch::to_wire(created.epoch), "a placement bumps the epoch");
    let stored = coordinator.get_persisted("default", "orders").await.unwrap();
    assert_eq!(MaintainerEpoch::to_wire(stored.info.epoch), first, "and it is durable");
    assert_eq!(node.maintainers.lock().new, [true]);

    node.report("orders", |status| status.checkpoint = Ts(150));
    within("the checkpoint is told", async || node.maintainers.lock().told.contains(&Ts(150))).await;
    let stored = coordinator.get_persisted("default", "orders").await.unwrap();
    assert_eq!(stored.status.checkpoint_ts, Ts(150), "what is told is durable");

    assert_eq!(coordinator.pause("default", "orders").await.unwrap(), Ts(150));
    assert!(!node.is_running("orders"));
    let stored = coordinator.get_persisted("default", "orders").await.unwrap();
    assert_eq!((stored.info.state, stored.status.progress), (ChangefeedState::Stopped, Progress::None));

    assert_eq!(coordinator.resume("default", "orders", None).await.unwrap(), Ts(150));
    until(&coordinator, "orders", "it replicates again", replicating).await;
    {
        let maintainers = node.maintainers.lock();
        assert!(maintainers.epochs[1] > first);
        assert_eq!(maintainers.new, [true, false]);
    }

    node.retention.failures.store(2, Ordering::Relaxed);
    assert_eq!(coordinator.remove("default", "orders").await.unwrap(), Ts(150));
    assert_eq!(*node.retention.dropped.lock(), ["default/orders"]);
    assert!(!node.is_running("orders"));
    assert!(matches!(coordinator.get_persisted("default", "orders").await, Err(Error::NotExists(_))));
    assert!(matches!(coordinator.remove("default", "orders").await, Err(Error::NotExists(_))));
    assert!(coordinator.list(None).await.unwrap().is_empty());
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_error_becomes_a_warning_that_people_can_read() {
    let dir = tempfile::tempdir().unwrap();
    let mut node = Node::start(dir.path());
    let coordinator = node.coordinator().await;
    coordinator.create(info("orders")).await.unwrap();
    until(&coordinator, "orders", "it replicates", replicating).await;
    node.report("orders", |status| {
        status.errors = vec![RunningError {
            time: "2026-03-01T08:00:00Z".to_owned(),
            node: "n".to_owned(),
            code: "CDC:ErrSinkUnavailable".to_owned(),
            message: "the downstream does not answer".to_owned(),
        }];
    });
    until(&coordinator, "orders", "it waits after the error", |view| {
        view.info.state == ChangefeedState::Warning
            && view.waiting_for.as_ref().is_some_and(|text| text.contains("next attempt"))
    })
    .await;
    assert!(!node.is_running("orders"));
    let stored = coordinator.get_persisted("default", "orders").await.unwrap();
    assert_eq!(stored.info.error.unwrap().code, "CDC:ErrSinkUnavailable");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_starts_again_goes_on_at_the_persisted_checkpoint_under_a_larger_epoch() {
    let dir = tempfile::tempdir().unwrap();
    let mut node = Node::start(dir.path());
    let coordinator = node.coordinator().await;
    for name in ["orders", "paused", "removed"] {
        coordinator.create(info(name)).await.unwrap();
        until(&coordinator, name, "it replicates", replicating).await;
    }
    node.report("orders", |status| status.checkpoint = Ts(170));
    within("the checkpoint is told", async || node.maintainers.lock().told.contains(&Ts(170))).await;
    coordinator.pause("default", "paused").await.unwrap();
    // The removal gets as far as its intent: the upstream never answers in this process.
    node.retention.failures.store(usize::MAX, Ordering::Relaxed);
    let removal = tokio::spawn({
        let coordinator = coordinator.clone();
        async move { coordinator.remove("default", "removed").await }
    });
    within("the removal is stored", async || {
        coordinator
            .get_persisted("default", "removed")
            .await
            .is_ok_and(|stored| stored.status.progress == Progress::Removing)
    })
    .await;
    let version = coordinator.version();
    let epochs = node.maintainers.lock().epochs.clone();
    node.kill().await;
    assert!(matches!(removal.await.unwrap(), Err(Error::Stopped)));
    assert!(matches!(coordinator.list(None).await, Err(Error::Stopped)));
    drop(coordinator);

    let mut node = Node::start(dir.path());
    let coordinator = node.coordinator().await;
    assert!(coordinator.version() > version, "each coordinator has a larger version");
    until(&coordinator, "orders", "it replicates again", replicating).await;
    let view = coordinator.get("default", "orders").await.unwrap();
    assert_eq!((view.checkpoint, view.saved_checkpoint), (Ts(170), Ts(170)));
    assert!(node.maintainers.lock().epochs.iter().all(|epoch| epochs.iter().all(|old| epoch > old)));
    within("the removal is finished", async || {
        coordinator.get_persisted("default", "removed").await.is_err()
    })
    .await;
    assert_eq!(*node.retention.dropped.lock(), ["default/removed"]);
    let names: Vec<_> =
        coordinator.list(None).await.unwrap().iter().map(|v| v.info.id.name.to_string()).collect();
    assert_eq!(names, ["orders", "paused"]);
    assert_eq!(coordinator.get("default", "paused").await.unwrap().info.state, ChangefeedState::Stopped);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_orderly_stop_stores_the_newest_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let mut node = Node::start(dir.path());
    let coordinator = node.coordinator().await;
    coordinator.create(info("orders")).await.unwrap();
    until(&coordinator, "orders", "it replicates", replicating).await;
    node.report("orders", |status| status.checkpoint = Ts(999));
    until(&coordinator, "orders", "the checkpoint is known", |view| view.checkpoint == Ts(999)).await;
    let store = Arc::clone(&node.store);
    node.stop().await;
    let key = Layout::new("default").unwrap().status("default", "orders");
    let status = store.get(&key).await.unwrap().found.unwrap();
    assert!(String::from_utf8(status.value).unwrap().contains("\"checkpoint-ts\":999"));
    assert!(
        store.leader(&Layout::new("default").unwrap().owner_prefix()).await.unwrap().is_none(),
        "it resigned"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
// behaviour: coordinator-ST-22
async fn a_coordinator_whose_role_went_to_another_stops_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let mut node = Node::start(dir.path());
    let coordinator = node.coordinator().await;
    coordinator.create(info("orders")).await.unwrap();
    until(&coordinator, "orders", "it replicates", replicating).await;
    let prefix = Layout::new("default").unwrap().owner_prefix();
    let leader = node.store.leader(&prefix).await.unwrap().unwrap();
    node.store.resign(&prefix, leader.lease.unwrap()).await.unwrap();
    node.report("orders", |status| status.checkpoint = Ts(500));
    within("the old coordinator is gone", async || coordinator.list(None).await.is_err()).await;
    let stored = coordinator.get_persisted("default", "orders").await.unwrap();
    assert_eq!(stored.status.checkpoint_ts, Ts(100), "it wrote nothing");
    // The loop stands again and the next coordinator goes on.
    let before = coordinator.version();
    within("another coordinator leads", async || {
        node.view.borrow().as_ref().is_some_and(|handle| handle.version() > before)
    })
    .await;
    let coordinator = node.coordinator().await;
    until(&coordinator, "orders", "the checkpoint is stored", |view| view.saved_checkpoint == Ts(500)).await;
    assert_eq!(node.maintainers.lock().epochs.len(), 1, "the running maintainer was adopted");
    node.stop().await;
}
