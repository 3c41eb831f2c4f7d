//! A node's process: its bus, its store, its coordinator, and maintainers as the test drives them.

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
use heartbeatpb::config::{ChangefeedInfo, ReplicaConfig, UpstreamInfo};
use heartbeatpb::{
    ChangefeedId, ComponentState, CoordinatorBootstrapResponse, MaintainerEpoch, MaintainerStatus, NodeId,
    NodeLiveness, Ts, WallTime,
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
pub(crate) struct Maintainers {
    pub(crate) running: BTreeMap<ChangefeedId, MaintainerStatus>,
    /// Every epoch that a maintainer was started with.
    pub(crate) epochs: Vec<u64>,
    /// Persisted checkpoints that were told.
    pub(crate) told: Vec<Ts>,
    pub(crate) new: Vec<bool>,
    /// It starts nothing and says nothing of it.
    pub(crate) deaf: bool,
    /// It reports nothing that it is not asked for.
    pub(crate) silent: bool,
    /// Changefeeds that it was told to start, whether it did or not.
    pub(crate) asked: std::collections::BTreeSet<String>,
}

/// A node's process: its bus, its maintainers, its coordinator.
pub(crate) struct Node {
    pub(crate) center: MessageCenter,
    pub(crate) maintainers: Arc<Mutex<Maintainers>>,
    pub(crate) view: watch::Receiver<Option<CoordinatorHandle>>,
    pub(crate) store: Arc<dyn Store>,
    shutdown: CancellationToken,
    /// Ends the maintainers, which outlive the coordinator.
    last: CancellationToken,
    pub(crate) retention: Arc<Retention>,
    tasks: Vec<JoinHandle<Result<(), Error>>>,
    _members: watch::Sender<coordinator::Members>,
    pub(crate) liveness: watch::Sender<NodeLiveness>,
}

#[derive(Default)]
pub(crate) struct Retention {
    pub(crate) failures: AtomicUsize,
    pub(crate) dropped: Mutex<Vec<String>>,
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
    pub(crate) fn start(dir: &Path) -> Self {
        let config = CoordinatorConfig { tick: Duration::from_millis(20), ..CoordinatorConfig::default() };
        Self::start_with(Arc::new(redb::open(dir).unwrap()), config)
    }

    pub(crate) fn start_with(store: Arc<dyn Store>, config: CoordinatorConfig) -> Self {
        let node = NodeId::random();
        let center = MessageCenter::new(node.clone(), MessagingConfig::default());
        let maintainers = Arc::new(Mutex::new(Maintainers::default()));
        let retention = Arc::new(Retention::default());
        let members = watch::Sender::new(Arc::new(BTreeMap::from([(node, "127.0.0.1:8300".to_owned())])));
        let liveness = watch::Sender::new(NodeLiveness::Alive);
        let (shutdown, last) = (CancellationToken::new(), CancellationToken::new());
        let neighbours = Neighbours {
            center: center.clone(),
            members: members.subscribe(),
            retention: Arc::clone(&retention) as Arc<dyn RetentionHook>,
            clock: Arc::new(NoClock),
        };
        let layout = Layout::new("default").unwrap();
        let (election, view) =
            Election::new(Arc::clone(&store), layout, neighbours, config, liveness.subscribe());
        let election = tokio::spawn({
            let (store, shutdown) = (Arc::clone(&store), shutdown.clone());
            async move {
                let session = store.session(Duration::from_secs(10)).await.unwrap();
                election.run(session, shutdown).await
            }
        });
        let managed = manage(center.clone(), Arc::clone(&maintainers), last.clone());
        let manager = tokio::spawn(async move {
            managed.await;
            Ok(())
        });
        Self {
            center,
            maintainers,
            view,
            store,
            shutdown,
            last,
            retention,
            tasks: vec![election, manager],
            _members: members,
            liveness,
        }
    }

    pub(crate) async fn coordinator(&mut self) -> CoordinatorHandle {
        let handle = self.view.wait_for(Option::is_some).await.unwrap().clone().unwrap();
        within("the coordinator is initialised", async || handle.list(None).await.is_ok()).await;
        handle
    }

    /// The coordinator that follows one of this version.
    pub(crate) async fn coordinator_after(&mut self, version: u64) -> CoordinatorHandle {
        let newer = |handle: &Option<CoordinatorHandle>| {
            handle.as_ref().is_some_and(|handle| handle.version() > version)
        };
        self.view.wait_for(newer).await.unwrap();
        self.coordinator().await
    }

    pub(crate) fn report(&self, name: &str, change: impl Fn(&mut MaintainerStatus)) {
        let mut maintainers = self.maintainers.lock();
        let status = maintainers.running.values_mut().find(|status| &*status.changefeed.name == name);
        change(status.expect("the maintainer runs"));
    }

    pub(crate) fn is_running(&self, name: &str) -> bool {
        self.maintainers.lock().running.keys().any(|id| &*id.name == name)
    }

    pub(crate) async fn stop(self) {
        self.shutdown.cancel();
        for task in self.tasks {
            task.await.unwrap().unwrap();
            // The coordinator first.
            self.last.cancel();
        }
    }

    /// Waits until the process cannot go on, and says why.
    pub(crate) async fn failure(mut self) -> Error {
        let election = self.tasks.remove(0);
        let error = election.await.unwrap().unwrap_err();
        self.shutdown.cancel();
        self.last.cancel();
        error
    }

    /// Ends the process without any of its farewells.
    pub(crate) async fn kill(self) {
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
                if maintainers.lock().silent {
                    continue;
                }
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
                maintainers.asked.insert(add.changefeed.to_string());
                if maintainers.deaf || maintainers.running.contains_key(&add.changefeed) {
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
                    checkpoint_time: None,
                    trouble: None,
                };
                maintainers.running.insert(add.changefeed, status);
            }
            ToMaintainerManager::RemoveMaintainer(remove) => {
                let live = maintainers.running.get(&remove.changefeed).map(|status| status.epoch);
                if live.is_some_and(|epoch| epoch != remove.epoch) {
                    continue;
                }
                let before = maintainers.running.remove(&remove.changefeed);
                let status = MaintainerStatus {
                    changefeed: remove.changefeed,
                    feed_state: "stopped".to_owned(),
                    state: ComponentState::Stopped,
                    checkpoint: before.map_or(Ts::ZERO, |status| status.checkpoint),
                    errors: Vec::new(),
                    bootstrap_done: false,
                    last_synced: Ts::ZERO,
                    drain: None,
                    epoch: remove.epoch,
                    checkpoint_time: None,
                    trouble: None,
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

pub(crate) async fn within(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while !holds().await {
        assert!(tokio::time::Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub(crate) async fn until(
    handle: &CoordinatorHandle,
    name: &str,
    what: &str,
    holds: impl Fn(&ChangefeedView) -> bool,
) {
    within(what, async || handle.get("default", name).await.is_ok_and(|view| holds(&view))).await;
}

pub(crate) fn info(name: &str) -> ChangefeedInfo {
    ChangefeedInfo::new(
        ChangefeedId::fresh(name),
        UpstreamInfo::default(),
        "blackhole://",
        ReplicaConfig::default(),
        Ts(100),
    )
}

pub(crate) fn replicating(view: &ChangefeedView) -> bool {
    view.group == Group::Replicating
}
