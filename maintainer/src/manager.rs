//! The manager: a node's endpoint for the coordinator, and the registry of its maintainers.

mod registry;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use heartbeatpb::config::{ChangefeedInfo, ReplicaConfig, UpstreamInfo};
use heartbeatpb::{
    AddMaintainerRequest, ChangefeedId, ComponentState, CoordinatorBootstrapResponse, MaintainerEpoch,
    MaintainerStatus, NodeHeartbeat, NodeId, NodeLiveness, RemoveMaintainerRequest, RunningError,
    SetDispatcherDrainTargetRequest, SetNodeLivenessRequest, SetNodeLivenessResponse, Ts,
};
use messaging::{
    CoordinatorTopic, Inbound, Inbox, MaintainerManagerTopic, MaintainerTopic, MessageCenter, ToCoordinator,
    ToMaintainer, ToMaintainerManager,
};
use snapshot::Publisher;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::{Id as TaskId, JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

use self::registry::{Admission, Registry, Slot};
use crate::drain::DrainTarget;
use crate::fence::{DownstreamFence, NothingToFence};
use crate::liveness::LivenessCell;
use crate::maintainer::{Control, Maintainer, Setup, now, rfc3339};
use crate::placements::{PlacementError, PlacementHandle, QUESTIONS, Question};
use crate::upstream::Upstream;

/// Messages that wait for the manager. Its handlers only sort and enqueue, so a full inbox empties by itself.
const INBOX: usize = 16_384;
/// Status heartbeats and clean-up (maintainer §4).
const TICK: Duration = Duration::from_millis(200);
/// A node heartbeat that nobody asked for.
const NODE_HEARTBEAT: Duration = Duration::from_secs(5);
/// A maintainer that only removes reports this: a checkpoint that passes nothing.
const REMOVAL_ONLY_CHECKPOINT: Ts = Ts(1);

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

/// The endpoint. One task: registry, liveness and drain target have one writer, commands are handled strictly one
/// after the other, and no handler waits for anything.
pub struct MaintainerManager {
    center: MessageCenter,
    upstream: Arc<dyn Upstream>,
    fence: Arc<dyn DownstreamFence>,
    config: ManagerConfig,
    coordinator: Option<NodeId>,
    version: i64,
    /// Members that this node does not reach.
    unreached: Option<watch::Receiver<BTreeSet<NodeId>>>,
    /// Every maintainer has a view of it from its birth, so none can miss a change.
    drain: Publisher<DrainTarget>,
    registry: Registry,
    tasks: JoinSet<()>,
    prompt: Arc<Notify>,
    node_heartbeat: Option<Instant>,
    stop: CancellationToken,
    asked: (mpsc::Sender<Question>, mpsc::Receiver<Question>),
    inbox: Inbox<MaintainerManagerTopic>,
    closes: Inbox<MaintainerTopic>,
}

impl std::fmt::Debug for MaintainerManager {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MaintainerManager")
            .field("coordinator", &self.coordinator)
            .field("maintainers", &self.registry.len())
            .finish_non_exhaustive()
    }
}

impl MaintainerManager {
    /// A manager without maintainers. From here on it receives; what it receives waits until it runs.
    #[must_use]
    pub fn new(center: MessageCenter, upstream: Arc<dyn Upstream>, config: ManagerConfig) -> Self {
        Self {
            inbox: center.register::<MaintainerManagerTopic>(INBOX),
            closes: center.register::<MaintainerTopic>(INBOX),
            center,
            upstream,
            fence: Arc::new(NothingToFence),
            config,
            coordinator: None,
            version: 0,
            unreached: None,
            drain: Publisher::new(DrainTarget::default()),
            registry: Registry::default(),
            tasks: JoinSet::new(),
            prompt: Arc::default(),
            node_heartbeat: None,
            stop: CancellationToken::new(),
            asked: mpsc::channel(QUESTIONS),
        }
    }

    /// Lets its maintainers fence nodes that are gone; without it, nobody waits for that.
    #[must_use]
    pub fn with_fence(mut self, fence: Arc<dyn DownstreamFence>) -> Self {
        self.fence = fence;
        self
    }

    /// Lets its maintainers give members up that this node does not reach, where a fence keeps them from writing. Without
    /// a fence they keep what they have: two could write it.
    #[must_use]
    pub fn with_unreached(mut self, unreached: watch::Receiver<BTreeSet<NodeId>>) -> Self {
        self.unreached = Some(unreached);
        self
    }

    /// The way in for people; good from now until the manager ends.
    #[must_use]
    pub fn placements(&self) -> PlacementHandle {
        PlacementHandle::new(self.asked.0.clone())
    }

    /// Serves until `shutdown`, then waits until all maintainers and their log readers have ended.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut nodes = self.config.nodes.clone();
        let mut unreached = self.unreached.clone();
        let prompt = Arc::clone(&self.prompt);
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                _ = tick.tick() => self.on_tick(now()),
                () = prompt.notified() => self.send_statuses(now()),
                changed = nodes.changed() => {
                    if changed.is_err() {
                        break;
                    }
                    self.tell_nodes();
                }
                () = set_changed(&mut unreached) => self.tell_nodes(),
                Some(ended) = self.tasks.join_next_with_id(), if !self.tasks.is_empty() => self.on_ended(ended),
                Some(question) = self.asked.1.recv() => self.on_question(question),
                message = self.inbox.recv() => match message {
                    Some(inbound) => self.on_message(inbound),
                    None => break,
                },
                message = self.closes.recv() => match message {
                    Some(Inbound { from, message: ToMaintainer::CloseResponse(response) }) => {
                        let id = response.changefeed.clone();
                        self.route(&id, Control::Closed(from, response));
                    }
                    None => break,
                },
            }
        }
        self.stop.cancel();
        while self.tasks.join_next().await.is_some() {}
        self.say_last();
    }

    /// Where the maintainers of a node that stops have come to: whoever takes their places begins there.
    fn say_last(&mut self) {
        let mut last: Vec<MaintainerStatus> =
            self.statuses(|slot| !slot.is_stopped()).into_iter().map(|(_, _, status)| status).collect();
        last.retain(|status| status.bootstrap_done);
        if !last.is_empty() && self.tell(ToCoordinator::MaintainerHeartbeat(last)) {
            tracing::debug!("the coordinator was told the last checkpoints");
        }
    }

    fn on_ended(&mut self, ended: Result<(TaskId, ()), JoinError>) {
        let (task, failure) = match ended {
            Ok((task, ())) => (task, None),
            Err(error) => {
                tracing::error!(%error, "a maintainer ended abnormally");
                let failure = RunningError {
                    time: rfc3339(),
                    node: self.center.node().to_string(),
                    code: "CDC:ErrMaintainerFailed".to_owned(),
                    message: "the maintainer ended abnormally".to_owned(),
                };
                (error.id(), Some(failure))
            }
        };
        let failed = failure.is_some();
        let mut orphaned = None;
        for (id, slot) in self.registry.slots_mut().filter(|(_, slot)| slot.task == task) {
            slot.on_ended(failure.clone());
            orphaned = failed.then(|| (id.clone(), slot.handle.epoch));
        }
        if let Some((id, epoch)) = orphaned {
            // Its log reader must not outlive it.
            let upstream = Arc::clone(&self.upstream);
            self.tasks.spawn(async move { upstream.stop(&id, epoch).await });
        }
    }

    /// Somebody wishes for something: its maintainer answers.
    fn on_question(&self, question: Question) {
        let Question { changefeed, wish, reply } = question;
        match self.registry.get(&changefeed) {
            Some(slot) => drop(slot.handle.mailbox.control(Control::Wish(wish, reply))),
            // Whoever asked may have gone.
            None => drop(reply.send(Err(PlacementError::NoSuchChangefeed))),
        }
    }

    /// The nodes that a maintainer works with.
    fn nodes_for(&self, fences: bool) -> BTreeSet<NodeId> {
        let mut nodes = self.config.nodes.borrow().clone();
        if let Some(unreached) = self.unreached.as_ref().filter(|_| fences) {
            let unreached = unreached.borrow();
            nodes.retain(|node| !unreached.contains(node));
        }
        nodes
    }

    fn tell_nodes(&self) {
        for slot in self.registry.slots() {
            slot.handle.mailbox.control(Control::Nodes(self.nodes_for(slot.fences)));
        }
    }

    /// Hands something to a maintainer.
    fn route(&self, id: &ChangefeedId, control: Control) {
        match self.registry.get(id) {
            Some(slot) => drop(slot.handle.mailbox.control(control)),
            None => tracing::debug!(changefeedID = %id, "message for a maintainer that is not here"),
        }
    }

    fn on_message(&mut self, inbound: Inbound<ToMaintainerManager>) {
        let Inbound { from, message } = inbound;
        let from_coordinator = self.coordinator.as_ref() == Some(&from);
        match message {
            ToMaintainerManager::HeartBeat(request) => {
                if let Some(slot) = self.registry.get(&request.changefeed) {
                    slot.handle.mailbox.heartbeat(from, request);
                }
            }
            ToMaintainerManager::BlockStatus(request) => {
                if let Some(slot) = self.registry.get(&request.changefeed) {
                    slot.handle.mailbox.block_statuses(&from, request);
                }
            }
            ToMaintainerManager::BootstrapResponse(response) => {
                let id = response.changefeed.clone();
                self.route(&id, Control::Bootstrap(from, Box::new(response)));
            }
            ToMaintainerManager::PostBootstrapResponse(response) => {
                let id = response.changefeed.clone();
                self.route(&id, Control::PostBootstrap(from, response));
            }
            ToMaintainerManager::CoordinatorBootstrap(request) => self.on_coordinator(from, request.version),
            ToMaintainerManager::AddMaintainer(request) if from_coordinator => self.on_add(&request),
            ToMaintainerManager::RemoveMaintainer(request) if from_coordinator => self.on_remove(&request),
            ToMaintainerManager::SetNodeLiveness(request) if from_coordinator => self.on_liveness(request),
            ToMaintainerManager::SetDrainTarget(request) if from_coordinator => self.on_drain_target(request),
            ToMaintainerManager::CheckpointTs(message) if from_coordinator => {
                let id = message.changefeed.clone();
                self.route(&id, Control::Persisted(message));
            }
            ToMaintainerManager::AddMaintainer(_)
            | ToMaintainerManager::RemoveMaintainer(_)
            | ToMaintainerManager::SetNodeLiveness(_)
            | ToMaintainerManager::SetDrainTarget(_)
            | ToMaintainerManager::CheckpointTs(_) => {
                // Names only: the message may hold a configuration.
                tracing::warn!(%from, expected = ?self.coordinator, "command from a node that is not the coordinator");
            }
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
        if self.coordinator.as_ref() != Some(&from) {
            tracing::info!(coordinator = %from, version, "the coordinator is known");
        }
        self.coordinator = Some(from);
        self.version = version;
        let drain = self.drain.current();
        let told: Vec<(ChangefeedId, u64, MaintainerStatus)> = self.statuses(|_| true);
        let sent = self.tell(ToCoordinator::BootstrapResponse(CoordinatorBootstrapResponse {
            statuses: told.iter().map(|(_, _, status)| status.clone()).collect(),
            drain_protocol_version: 1,
            drain_target: drain.node.clone(),
            drain_epoch: drain.epoch,
        }));
        if sent {
            self.on_told(&told, now());
        }
        self.node_heartbeat(true);
    }

    fn statuses(&mut self, wanted: impl Fn(&mut Slot) -> bool) -> Vec<(ChangefeedId, u64, MaintainerStatus)> {
        let upstream = &self.upstream;
        self.registry
            .slots_mut()
            .filter_map(|(id, slot)| {
                wanted(slot).then(|| {
                    let (version, mut status) = slot.status();
                    // Where it is read is where that is known.
                    status.checkpoint_time = upstream.time_of(id, status.checkpoint);
                    (id.clone(), version, status)
                })
            })
            .collect()
    }

    fn on_told(&mut self, told: &[(ChangefeedId, u64, MaintainerStatus)], now: Instant) {
        for (id, version, status) in told {
            if let Some(slot) = self.registry.get_mut(id) {
                slot.on_told(*version, status.state == ComponentState::Stopped, now);
            }
        }
    }

    fn node_heartbeat(&mut self, forced: bool) {
        let now = self::now();
        let recent = self.node_heartbeat.is_some_and(|at| now.duration_since(at) < NODE_HEARTBEAT);
        if self.coordinator.is_none() || (!forced && recent) {
            return;
        }
        // Before sending, so that a failure is no reason to try at every tick.
        self.node_heartbeat = Some(now);
        let drain = self.drain.current();
        self.tell(ToCoordinator::NodeHeartbeat(NodeHeartbeat {
            liveness: self.config.liveness.get(),
            node_epoch: self.config.node_epoch,
            drain_target: drain.node.clone(),
            drain_epoch: drain.epoch,
        }));
    }

    fn on_liveness(&mut self, request: SetNodeLivenessRequest) {
        if request.node_epoch == self.config.node_epoch && self.config.liveness.advance(request.target) {
            tracing::info!(liveness = ?request.target, "the coordinator changed the liveness of this node");
            self.node_heartbeat(true);
        }
        self.tell(ToCoordinator::SetNodeLivenessResponse(SetNodeLivenessResponse {
            applied: self.config.liveness.get(),
            node_epoch: self.config.node_epoch,
        }));
    }

    fn on_drain_target(&mut self, request: SetDispatcherDrainTargetRequest) {
        let target = DrainTarget { node: request.target, epoch: request.epoch };
        let described = format!("{target:?}");
        if self.drain.publish(target) {
            tracing::info!(target = described, "the node that is to be emptied changed");
            for slot in self.registry.slots() {
                slot.handle.mailbox.control(Control::Drain);
            }
        }
        // The heartbeat is the acknowledgement, also of a duplicate and of what was refused.
        self.node_heartbeat(true);
    }

    fn on_add(&mut self, request: &AddMaintainerRequest) {
        let id = &request.changefeed;
        let refuse = |why: &str| tracing::warn!(changefeedID = %id, epoch = ?request.epoch, why, "refused a maintainer");
        if self.config.liveness.get() == NodeLiveness::Stopping {
            return refuse("the node is stopping");
        }
        if request.checkpoint == Ts::ZERO {
            return refuse("it has no checkpoint");
        }
        match self.registry.admit(id, request.epoch) {
            Admission::Accepted => {}
            Admission::Repeated => return,
            Admission::Occupied => return refuse("the one before has not stopped yet"),
            Admission::Stopped => return refuse("one of its epoch or a newer one was stopped here"),
        }
        let mut info = match ChangefeedInfo::from_json(&request.config.0, &id.keyspace, &id.name) {
            Ok((info, false)) if info.id == *id => info,
            Ok((info, true)) => ChangefeedInfo { id: id.clone(), ..info },
            Ok(_) => return refuse("its configuration names another changefeed"),
            Err(error) => {
                tracing::warn!(changefeedID = %id, bytes = request.config.0.len(), %error, "refused a maintainer");
                return;
            }
        };
        // The request is what counts, whatever the document says.
        info.epoch = request.epoch;
        let start = (request.checkpoint, request.is_new);
        self.start(info, request.epoch, start, None);
    }

    fn start(
        &mut self,
        info: ChangefeedInfo,
        epoch: Option<MaintainerEpoch>,
        (checkpoint, is_new): (Ts, bool),
        removal: Option<Control>,
    ) {
        let id = info.id.clone();
        let fences = self.fence.applies_to(&info);
        tracing::info!(changefeedID = %id, ?epoch, checkpointTs = %checkpoint, removal_only = removal.is_some(),
            "maintainer starts");
        let (maintainer, handle) = Maintainer::new(Setup {
            center: self.center.clone(),
            upstream: Arc::clone(&self.upstream),
            fence: Arc::clone(&self.fence),
            info,
            epoch,
            checkpoint,
            is_new,
            removal_only: removal.is_some(),
            drain: self.drain.view(),
            prompt: Arc::clone(&self.prompt),
        });
        if let Some(removal) = removal {
            handle.mailbox.control(removal);
        }
        handle.mailbox.control(Control::Nodes(self.nodes_for(fences)));
        let task = self.tasks.spawn(maintainer.run(self.stop.child_token()));
        let mut slot = Slot::new(handle, task.id());
        slot.fences = fences;
        self.registry.insert(id, slot);
    }

    fn on_remove(&mut self, request: &RemoveMaintainerRequest) {
        let id = &request.changefeed;
        let (cascade, removed) = (request.cascade || request.removed, request.removed);
        let control = Control::Remove { epoch: request.epoch, cascade, removed };
        if self.registry.get(id).is_some() {
            return self.route(id, control);
        }
        if cascade {
            let info =
                ChangefeedInfo::new(id.clone(), UpstreamInfo::default(), "", ReplicaConfig::default(), Ts(1));
            return self.start(info, request.epoch, (REMOVAL_ONLY_CHECKPOINT, false), Some(control));
        }
        // What is answered now has to stay true: an order to begin that comes late is not followed.
        self.registry.remember(id.clone(), request.epoch);
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
            checkpoint_time: None,
            trouble: None,
        };
        self.tell(ToCoordinator::MaintainerHeartbeat(vec![status]));
    }

    fn on_tick(&mut self, now: Instant) {
        self.node_heartbeat(false);
        self.send_statuses(now);
        self.registry.clean_up(now);
    }

    fn send_statuses(&mut self, now: Instant) {
        if self.coordinator.is_none() {
            return;
        }
        let due = self.statuses(|slot| slot.is_due(now));
        if due.is_empty() {
            return;
        }
        let statuses = due.iter().map(|(_, _, status)| status.clone()).collect();
        if self.tell(ToCoordinator::MaintainerHeartbeat(statuses)) {
            self.on_told(&due, now);
        }
    }
}

/// Waits until a set has changed; for ever when nobody keeps it.
async fn set_changed(set: &mut Option<watch::Receiver<BTreeSet<NodeId>>>) {
    if let Some(receiver) = set {
        if receiver.changed().await.is_ok() {
            return;
        }
        *set = None;
    }
    std::future::pending().await
}
