//! The coordinator's task over a real store and a real bus, against a node that plays the maintainers' part.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use coordinator::backend::{Store, redb};
use coordinator::{
    ChangefeedView, CoordinatorConfig, CoordinatorHandle, Election, Error, Group, Layout, Neighbours,
    RetentionHook, UpstreamClock,
};
use heartbeatpb::config::{ChangefeedInfo, ChangefeedState, Progress, ReplicaConfig, UpstreamInfo};
use heartbeatpb::{
    ChangefeedId, ComponentState, CoordinatorBootstrapResponse, MaintainerEpoch, MaintainerStatus, NodeId,
    NodeLiveness, RunningError, Ts, WallTime,
};
use messaging::{
    CoordinatorTopic, MaintainerManagerTopic, MessageCenter, MessagingConfig, ToCoordinator,
    ToMaintainerManager,
};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// The maintainers of the node, as the test drives them.
#[derive(Default)]
struct Maintainers {
    running: BTreeMap<ChangefeedId, MaintainerStatus>,
    /// Every epoch that a maintainer was started with.
    epochs: Vec<u64>,
    /// Persisted checkpoints that were told.
    told: Vec<Ts>,
    new: Vec<bool>,
}

/// A node's process: its bus, its maintainers, its coordinator.
struct Node {
    maintainers: Arc<Mutex<Maintainers>>,
    view: watch::Receiver<Option<CoordinatorHandle>>,
    store: Arc<dyn Store>,
    shutdown: CancellationToken,
    retention: Arc<Retention>,
    tasks: Vec<JoinHandle<()>>,
    _members: watch::Sender<coordinator::Members>,
    _liveness: watch::Sender<NodeLiveness>,
}

#[derive(Default)]
struct Retention {
    failures: AtomicUsize,
    dropped: Mutex<Vec<String>>,
}

#[async_trait]
impl RetentionHook for Retention {
    async fn drop_retention(&self, info: &ChangefeedInfo) -> Result<(), String> {
        if self
            .failures
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1))
            .is_ok()
        {
            return Err("the upstream does not answer".to_owned());
        }
        self.dropped.lock().push(info.id.to_string());
        Ok(())
    }
}

struct NoClock;

impl UpstreamClock for NoClock {
    fn time_of(&self, _: &ChangefeedId, _: Ts) -> Option<WallTime> {
        None
    }
}

impl Node {
    fn start(dir: &Path) -> Self {
        let node = NodeId::random();
        let center = MessageCenter::new(node.clone(), MessagingConfig::default());
        let store: Arc<dyn Store> = Arc::new(redb::open(dir).unwrap());
        let maintainers = Arc::new(Mutex::new(Maintainers::default()));
        let retention = Arc::new(Retention::default());
        let members = watch::Sender::new(Arc::new(BTreeMap::from([(node, "127.0.0.1:8300".to_owned())])));
        let liveness = watch::Sender::new(NodeLiveness::Alive);
        let shutdown = CancellationToken::new();
        let neighbours = Neighbours {
            center: center.clone(),
            members: members.subscribe(),
            retention: Arc::clone(&retention) as Arc<dyn RetentionHook>,
            clock: Arc::new(NoClock),
        };
        let config = CoordinatorConfig { tick: Duration::from_millis(20), ..CoordinatorConfig::default() };
        let layout = Layout::new("default").unwrap();
        let (election, view) =
            Election::new(Arc::clone(&store), layout, neighbours, config, liveness.subscribe());
        let election = tokio::spawn({
            let (store, shutdown) = (Arc::clone(&store), shutdown.clone());
            async move {
                let session = store.session(Duration::from_secs(10)).await.unwrap();
                election.run(session, shutdown).await.unwrap();
            }
        });
        let manager = tokio::spawn(manage(center, Arc::clone(&maintainers), shutdown.clone()));
        Self {
            maintainers,
            view,
            store,
            shutdown,
            retention,
            tasks: vec![election, manager],
            _members: members,
            _liveness: liveness,
        }
    }

    async fn coordinator(&mut self) -> CoordinatorHandle {
        let handle = self.view.wait_for(Option::is_some).await.unwrap().clone().unwrap();
        within("the coordinator is initialised", async || handle.list(None).await.is_ok()).await;
        handle
    }

    fn report(&self, name: &str, change: impl Fn(&mut MaintainerStatus)) {
        let mut maintainers = self.maintainers.lock();
        let status = maintainers.running.values_mut().find(|status| &*status.changefeed.name == name);
        change(status.expect("the maintainer runs"));
    }

    fn is_running(&self, name: &str) -> bool {
        self.maintainers.lock().running.keys().any(|id| &*id.name == name)
    }

    async fn stop(self) {
        self.shutdown.cancel();
        for task in self.tasks {
            task.await.unwrap();
        }
    }

    /// Ends the process without any of its farewells.
    async fn kill(self) {
        for task in &self.tasks {
            task.abort();
        }
        for task in self.tasks {
            let _ = task.await;
        }
    }
}

/// The node's maintainer manager: starts and stops maintainers as told and reports all of them.
async fn manage(center: MessageCenter, maintainers: Arc<Mutex<Maintainers>>, shutdown: CancellationToken) {
    let mut inbox = center.register::<MaintainerManagerTopic>(1024);
    let mut tick = tokio::time::interval(Duration::from_millis(10));
    let me = center.node().clone();
    loop {
        let message = tokio::select! {
            () = shutdown.cancelled() => return,
            _ = tick.tick() => {
                let statuses: Vec<_> = maintainers.lock().running.values().cloned().collect();
                let _ = center.send::<CoordinatorTopic>(&me, ToCoordinator::MaintainerHeartbeat(statuses));
                continue;
            }
            Some(inbound) = inbox.recv() => inbound.message,
        };
        let mut maintainers = maintainers.lock();
        match message {
            ToMaintainerManager::CoordinatorBootstrap(_) => {
                let answer = CoordinatorBootstrapResponse {
                    statuses: maintainers.running.values().cloned().collect(),
                    drain_protocol_version: 1,
                    drain_target: None,
                    drain_epoch: 0,
                };
                let _ = center.send::<CoordinatorTopic>(&me, ToCoordinator::BootstrapResponse(answer));
            }
            ToMaintainerManager::AddMaintainer(add) => {
                if maintainers.running.contains_key(&add.changefeed) {
                    continue;
                }
                assert!(ChangefeedInfo::from_json(&add.config.0, "", "").is_ok());
                maintainers.epochs.push(MaintainerEpoch::to_wire(add.epoch));
                maintainers.new.push(add.is_new);
                let status = MaintainerStatus {
                    changefeed: add.changefeed.clone(),
                    feed_state: "normal".to_owned(),
                    state: ComponentState::Working,
                    checkpoint: add.checkpoint,
                    errors: Vec::new(),
                    bootstrap_done: true,
                    last_synced: Ts::ZERO,
                    drain: None,
                    epoch: add.epoch,
                };
                maintainers.running.insert(add.changefeed, status);
            }
            ToMaintainerManager::RemoveMaintainer(remove) => {
                let live = maintainers.running.get(&remove.changefeed).map(|status| status.epoch);
                if live.is_some_and(|epoch| epoch != remove.epoch) {
                    continue;
                }
                maintainers.running.remove(&remove.changefeed);
                let status = MaintainerStatus {
                    changefeed: remove.changefeed,
                    feed_state: "stopped".to_owned(),
                    state: ComponentState::Stopped,
                    checkpoint: Ts::ZERO,
                    errors: Vec::new(),
                    bootstrap_done: false,
                    last_synced: Ts::ZERO,
                    drain: None,
                    epoch: remove.epoch,
                };
                let _ =
                    center.send::<CoordinatorTopic>(&me, ToCoordinator::MaintainerHeartbeat(vec![status]));
            }
            ToMaintainerManager::CheckpointTs(message) => maintainers.told.push(message.checkpoint),
            ToMaintainerManager::SetNodeLiveness(_)
            | ToMaintainerManager::SetDrainTarget(_)
            | ToMaintainerManager::HeartBeat(_)
            | ToMaintainerManager::BlockStatus(_)
            | ToMaintainerManager::BootstrapResponse(_)
            | ToMaintainerManager::PostBootstrapResponse(_) => {}
        }
    }
}

async fn within(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while !holds().await {
        assert!(tokio::time::Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn until(handle: &CoordinatorHandle, name: &str, what: &str, holds: impl Fn(&ChangefeedView) -> bool) {
    within(what, async || handle.get("default", name).await.is_ok_and(|view| holds(&view))).await;
}

fn info(name: &str) -> ChangefeedInfo {
    ChangefeedInfo::new(
        ChangefeedId::fresh(name),
        UpstreamInfo::default(),
        "blackhole://",
        ReplicaConfig::default(),
        Ts(100),
    )
}

fn replicating(view: &ChangefeedView) -> bool {
    view.group == Group::Replicating
}

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
