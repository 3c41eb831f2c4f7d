//! The manager: a node's endpoint for the coordinator, and the registry of its maintainers.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use heartbeatpb::config::{ChangefeedInfo, ReplicaConfig, UpstreamInfo};
use heartbeatpb::{
    AddMaintainerRequest, ChangefeedId, ComponentState, CoordinatorBootstrapResponse, Gid, MaintainerEpoch,
    MaintainerStatus, NodeHeartbeat, NodeId, NodeLiveness, RemoveMaintainerRequest,
    SetDispatcherDrainTargetRequest, SetNodeLivenessRequest, SetNodeLivenessResponse, Ts,
};
use messaging::{
    CoordinatorTopic, Inbound, MaintainerManagerTopic, MaintainerTopic, MessageCenter, ToCoordinator,
    ToMaintainer, ToMaintainerManager,
};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::drain::DrainTarget;
use crate::liveness::LivenessCell;
use crate::maintainer::{Event, Handle, Maintainer};
use crate::upstream::Upstream;

/// Messages that wait for the manager; senders repeat what does not fit.
const INBOX: usize = 16_384;
/// Status heartbeats and clean-up (spec/maintainer.md §4).
const TICK: Duration = Duration::from_millis(200);
/// A maintainer is reported at least this often.
const MAX_SILENCE: Duration = Duration::from_secs(1);
/// A node heartbeat that nobody asked for.
const NODE_HEARTBEAT: Duration = Duration::from_secs(5);
/// Changes are told this soon, and no sooner: a busy feed changes with every heartbeat.
const PROMPT_PAUSE: Duration = Duration::from_millis(50);
/// Epochs of maintainers that stopped here, remembered so that a late request does not revive them.
const REMEMBERED: usize = 10_000;

/// What a manager is told at its start.
#[derive(Debug)]
pub struct ManagerConfig {
    /// Epoch of this process; never 0.
    pub node_epoch: u64,
    /// Liveness of this node.
    pub liveness: Arc<LivenessCell>,
    /// The live nodes, this one included.
    pub nodes: watch::Receiver<BTreeSet<NodeId>>,
}

struct Slot {
    handle: Handle,
    reported: Option<Instant>,
    /// Since when the coordinator has been told that it stopped.
    told_stopped: bool,
}

/// The endpoint. One task: registry, liveness and drain target have one writer.
pub struct MaintainerManager {
    center: MessageCenter,
    upstream: Arc<dyn Upstream>,
    config: ManagerConfig,
    coordinator: Option<NodeId>,
    version: i64,
    drain: DrainTarget,
    slots: BTreeMap<Gid, Slot>,
    stopped: BTreeMap<Gid, MaintainerEpoch>,
    tasks: JoinSet<Gid>,
    prompt: Arc<Notify>,
    node_heartbeat: Option<Instant>,
}

impl std::fmt::Debug for MaintainerManager {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MaintainerManager").field("slots", &self.slots.len()).finish_non_exhaustive()
    }
}

impl MaintainerManager {
    /// A manager without maintainers.
    #[must_use]
    pub fn new(center: MessageCenter, upstream: Arc<dyn Upstream>, config: ManagerConfig) -> Self {
        Self {
            center,
            upstream,
            config,
            coordinator: None,
            version: 0,
            drain: DrainTarget::default(),
            slots: BTreeMap::new(),
            stopped: BTreeMap::new(),
            tasks: JoinSet::new(),
            prompt: Arc::default(),
            node_heartbeat: None,
        }
    }

    /// Serves until `shutdown`, then lets its maintainers go.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut inbox = self.center.register::<MaintainerManagerTopic>(INBOX);
        let mut closes = self.center.register::<MaintainerTopic>(INBOX);
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut nodes = self.config.nodes.clone();
        let prompt = Arc::clone(&self.prompt);
        let mut prompted = false;
        let mut pause = tokio::time::interval(PROMPT_PAUSE);
        pause.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                _ = tick.tick() => self.on_tick(),
                _ = pause.tick(), if prompted => {
                    prompted = false;
                    self.send_statuses(Instant::now());
                }
                () = prompt.notified(), if !prompted => prompted = true,
                changed = nodes.changed() => {
                    if changed.is_err() {
                        break;
                    }
                    let alive = nodes.borrow_and_update().clone();
                    for slot in self.slots.values() {
                        slot.handle.tell(Event::Nodes(alive.clone()));
                    }
                }
                Some(ended) = self.tasks.join_next(), if !self.tasks.is_empty() => {
                    if let Err(error) = ended {
                        tracing::error!(%error, "a maintainer's task ended abnormally");
                    }
                }
                message = inbox.recv() => match message {
                    Some(inbound) => self.on_message(inbound),
                    None => break,
                },
                message = closes.recv() => match message {
                    Some(Inbound { from, message: ToMaintainer::CloseResponse(response) }) => {
                        if let Some(slot) = self.slots.get(&response.changefeed.gid) {
                            slot.handle.tell(Event::Closed(from, response));
                        }
                    }
                    None => break,
                },
            }
        }
        self.slots.clear();
        while self.tasks.join_next().await.is_some() {}
    }

    fn on_message(&mut self, inbound: Inbound<ToMaintainerManager>) {
        let Inbound { from, message } = inbound;
        let feed = match &message {
            ToMaintainerManager::HeartBeat(m) => Some(m.changefeed.gid),
            ToMaintainerManager::BlockStatus(m) => Some(m.changefeed.gid),
            ToMaintainerManager::BootstrapResponse(m) => Some(m.changefeed.gid),
            ToMaintainerManager::PostBootstrapResponse(m) => Some(m.changefeed.gid),
            ToMaintainerManager::CheckpointTs(m) => Some(m.changefeed.gid),
            ToMaintainerManager::CoordinatorBootstrap(_)
            | ToMaintainerManager::AddMaintainer(_)
            | ToMaintainerManager::RemoveMaintainer(_)
            | ToMaintainerManager::SetNodeLiveness(_)
            | ToMaintainerManager::SetDrainTarget(_) => None,
        };
        if let Some(gid) = feed {
            if let Some(slot) = self.slots.get(&gid) {
                slot.handle.tell(Event::Message(from, Box::new(message)));
            }
            return;
        }
        if let ToMaintainerManager::CoordinatorBootstrap(request) = message {
            return self.on_coordinator(from, request.version);
        }
        if self.coordinator.as_ref() != Some(&from) {
            tracing::warn!(%from, expected = ?self.coordinator, "command from a node that is not the coordinator");
            return;
        }
        match message {
            ToMaintainerManager::AddMaintainer(request) => self.on_add(request),
            ToMaintainerManager::RemoveMaintainer(request) => self.on_remove(&request),
            ToMaintainerManager::SetNodeLiveness(request) => self.on_liveness(request),
            ToMaintainerManager::SetDrainTarget(request) => self.on_drain_target(request),
            ToMaintainerManager::HeartBeat(_)
            | ToMaintainerManager::BlockStatus(_)
            | ToMaintainerManager::BootstrapResponse(_)
            | ToMaintainerManager::PostBootstrapResponse(_)
            | ToMaintainerManager::CheckpointTs(_)
            | ToMaintainerManager::CoordinatorBootstrap(_) => {}
        }
    }

    fn tell(&self, message: ToCoordinator) -> bool {
        let Some(coordinator) = &self.coordinator else { return false };
        match self.center.send::<CoordinatorTopic>(coordinator, message) {
            Ok(()) => true,
            Err(error) => {
                tracing::debug!(to = %coordinator, %error, "the coordinator was not told");
                false
            }
        }
    }

    fn on_coordinator(&mut self, from: NodeId, version: i64) {
        if version < self.version || version <= 0 {
            tracing::warn!(%from, version, known = self.version, "bootstrap of an older coordinator");
            return;
        }
        self.coordinator = Some(from);
        self.version = version;
        let now = Instant::now();
        let statuses = self
            .slots
            .values_mut()
            .map(|slot| {
                // Cleared before the snapshot, so that a change in between stays visible.
                slot.handle.shared.take_dirty();
                slot.reported = Some(now);
                slot.handle.shared.status()
            })
            .collect();
        self.tell(ToCoordinator::BootstrapResponse(CoordinatorBootstrapResponse {
            statuses,
            drain_protocol_version: 1,
            drain_target: self.drain.node.clone(),
            drain_epoch: self.drain.epoch,
        }));
        self.node_heartbeat(true);
    }

    fn node_heartbeat(&mut self, forced: bool) {
        let now = Instant::now();
        if !forced && self.node_heartbeat.is_some_and(|at| now.duration_since(at) < NODE_HEARTBEAT) {
            return;
        }
        self.node_heartbeat = Some(now);
        self.tell(ToCoordinator::NodeHeartbeat(NodeHeartbeat {
            liveness: self.config.liveness.get(),
            node_epoch: self.config.node_epoch,
            drain_target: self.drain.node.clone(),
            drain_epoch: self.drain.epoch,
        }));
    }

    fn on_liveness(&mut self, request: SetNodeLivenessRequest) {
        if request.node_epoch == self.config.node_epoch && self.config.liveness.advance(request.target) {
            self.node_heartbeat(true);
        }
        self.tell(ToCoordinator::SetNodeLivenessResponse(SetNodeLivenessResponse {
            applied: self.config.liveness.get(),
            node_epoch: self.config.node_epoch,
        }));
    }

    fn on_drain_target(&mut self, request: SetDispatcherDrainTargetRequest) {
        self.drain.update(request.target, request.epoch);
        // The heartbeat is the acknowledgement, also of a duplicate.
        self.node_heartbeat(true);
    }

    /// Whether a request with `epoch` may take the slot (spec/maintainer.md §5.5).
    fn admits(&self, id: &ChangefeedId, epoch: Option<MaintainerEpoch>) -> bool {
        if let Some(slot) = self.slots.get(&id.gid) {
            let stopped = slot.handle.shared.status().state == ComponentState::Stopped;
            return stopped && epoch.is_some() && epoch > slot.handle.epoch;
        }
        match (epoch, self.stopped.get(&id.gid)) {
            (Some(epoch), Some(stopped)) => epoch > *stopped,
            (None | Some(_), _) => true,
        }
    }

    fn on_add(&mut self, request: AddMaintainerRequest) {
        let id = &request.changefeed;
        if self.config.liveness.get() == NodeLiveness::Stopping {
            tracing::info!(changefeedID = %id, "refused a maintainer: the node is stopping");
            return;
        }
        if request.checkpoint == Ts::ZERO {
            tracing::warn!(changefeedID = %id, "refused a maintainer without a checkpoint");
            return;
        }
        if !self.admits(id, request.epoch) {
            return;
        }
        let bytes = request.config.0.len();
        let info = match ChangefeedInfo::from_json(&request.config.0, &id.keyspace, &id.name) {
            Ok((info, _)) if info.id == *id => info,
            Ok(_) => {
                tracing::warn!(changefeedID = %id, "refused a maintainer: its configuration names another changefeed");
                return;
            }
            Err(error) => {
                tracing::warn!(changefeedID = %id, bytes, %error, "refused a maintainer with an unusable configuration");
                return;
            }
        };
        self.start(info, request.epoch, Some((request.checkpoint, request.is_new)));
    }

    fn start(&mut self, info: ChangefeedInfo, epoch: Option<MaintainerEpoch>, start: Option<(Ts, bool)>) {
        let gid = info.id.gid;
        tracing::info!(changefeedID = %info.id, ?epoch, checkpointTs = ?start.map(|s| s.0), "maintainer starts");
        let (maintainer, handle) = Maintainer::new(
            self.center.clone(),
            Arc::clone(&self.upstream),
            info,
            epoch,
            start,
            Arc::clone(&self.prompt),
        );
        handle.tell(Event::Nodes(self.config.nodes.borrow().clone()));
        self.slots.insert(gid, Slot { handle, reported: None, told_stopped: false });
        self.tasks.spawn(async move {
            maintainer.run().await;
            gid
        });
    }

    fn on_remove(&mut self, request: &RemoveMaintainerRequest) {
        let id = &request.changefeed;
        let event = || Event::Remove { cascade: request.cascade, removed: request.removed };
        if let Some(slot) = self.slots.get(&id.gid) {
            let matches =
                slot.handle.epoch.is_none() || request.epoch.is_none() || slot.handle.epoch == request.epoch;
            if matches {
                slot.handle.tell(event());
            }
            return;
        }
        if request.cascade && self.admits(id, request.epoch) {
            let info =
                ChangefeedInfo::new(id.clone(), UpstreamInfo::default(), "", ReplicaConfig::default(), Ts(1));
            self.start(info, request.epoch, None);
            if let Some(slot) = self.slots.get(&id.gid) {
                slot.handle.tell(event());
            }
            return;
        }
        let status = MaintainerStatus {
            changefeed: id.clone(),
            feed_state: String::new(),
            state: ComponentState::Stopped,
            checkpoint: Ts::ZERO,
            errors: Vec::new(),
            bootstrap_done: false,
            last_synced: Ts::ZERO,
            drain: None,
            epoch: request.epoch,
        };
        self.tell(ToCoordinator::MaintainerHeartbeat(vec![status]));
    }

    fn on_tick(&mut self) {
        if self.coordinator.is_none() {
            return;
        }
        self.node_heartbeat(false);
        self.send_statuses(Instant::now());
        self.clean_up();
    }

    fn send_statuses(&mut self, now: Instant) {
        if self.coordinator.is_none() {
            return;
        }
        let mut due = Vec::new();
        for (gid, slot) in &mut self.slots {
            let dirty = slot.handle.shared.take_dirty();
            if dirty || slot.reported.is_none_or(|at| now.duration_since(at) >= MAX_SILENCE) {
                slot.reported = Some(now);
                due.push((*gid, slot.handle.shared.status()));
            }
        }
        if due.is_empty() {
            return;
        }
        let (gids, statuses): (Vec<Gid>, Vec<MaintainerStatus>) = due.into_iter().unzip();
        let stopped: Vec<bool> = statuses.iter().map(|s| s.state == ComponentState::Stopped).collect();
        if self.tell(ToCoordinator::MaintainerHeartbeat(statuses)) {
            for (gid, stopped) in gids.iter().zip(stopped) {
                if let Some(slot) = self.slots.get_mut(gid) {
                    slot.told_stopped |= stopped;
                }
            }
        }
    }

    /// Lets maintainers go that have stopped and were reported so.
    fn clean_up(&mut self) {
        let gone: Vec<Gid> =
            self.slots.iter().filter(|(_, slot)| slot.told_stopped).map(|(gid, _)| *gid).collect();
        for gid in gone {
            let Some(slot) = self.slots.remove(&gid) else { continue };
            if let Some(epoch) = slot.handle.epoch {
                let known = self.stopped.entry(gid).or_insert(epoch);
                *known = (*known).max(epoch);
            }
            if self.stopped.len() > REMEMBERED {
                self.stopped.pop_first();
            }
        }
    }
}
