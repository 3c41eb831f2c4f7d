//! Nodes as far as the coordinator can tell: they keep to the contract of maintainer managers, slowly.

use std::collections::{BTreeMap, BTreeSet};

use heartbeatpb::{
    AddMaintainerRequest, ChangefeedId, ComponentState, CoordinatorBootstrapResponse, DrainProgress,
    MaintainerStatus, NodeHeartbeat, NodeId, NodeLiveness, RemoveMaintainerRequest,
    SetDispatcherDrainTargetRequest, SetNodeLivenessRequest, SetNodeLivenessResponse,
};
use messaging::{ToCoordinator, ToMaintainerManager};

use super::{Random, wire};
use crate::world::report;

/// Dispatchers that a changefeed has in all.
const DISPATCHERS: u32 = 3;

#[derive(Clone, Debug)]
pub(super) struct Maintainer {
    pub(super) epoch: u64,
    pub(super) checkpoint: u64,
    pub(super) bootstrapped: bool,
    /// It is on its way out; with the dispatchers of the changefeed, or without them.
    leaving: Option<bool>,
    /// Nodes whose dispatchers it closed or took over.
    reached: BTreeSet<NodeId>,
    pub(super) stopped: bool,
    error: Option<&'static str>,
}

impl Maintainer {
    fn new(epoch: u64, checkpoint: u64, leaving: Option<bool>) -> Self {
        let reached = BTreeSet::new();
        Self { epoch, checkpoint, bootstrapped: false, leaving, reached, stopped: false, error: None }
    }

    /// Whether it may write.
    pub(super) fn runs(&self) -> bool {
        !self.stopped && self.leaving.is_none()
    }
}

/// A process.
#[derive(Clone, Debug)]
pub(super) struct Node {
    process: u64,
    coordinator: Option<NodeId>,
    version: i64,
    pub(super) liveness: NodeLiveness,
    target: Option<NodeId>,
    target_epoch: u64,
    pub(super) maintainers: BTreeMap<ChangefeedId, Maintainer>,
    /// The largest epoch of a changefeed that ended here.
    ended: BTreeMap<ChangefeedId, u64>,
    /// It is out of the cluster and does not know it: those that it still knows. Who joined later has never heard
    /// of it and takes nothing from it.
    pub(super) cut_off: Option<Vec<NodeId>>,
}

/// Dispatchers of a changefeed on a node, and what rules them there: twice the epoch, and one more once they were
/// closed, after which the epoch has no say any more.
pub(super) type Dispatchers = BTreeMap<(ChangefeedId, NodeId), (u64, u32)>;

impl Node {
    pub(super) fn new(process: u64) -> Self {
        Self {
            process,
            coordinator: None,
            version: 0,
            liveness: NodeLiveness::Alive,
            target: None,
            target_epoch: 0,
            maintainers: BTreeMap::new(),
            ended: BTreeMap::new(),
            cut_off: None,
        }
    }

    /// Who it reports to.
    pub(super) fn coordinator(&self) -> Option<&NodeId> {
        self.coordinator.as_ref()
    }

    /// Carries a command out and answers.
    pub(super) fn on_command(
        &mut self,
        from: &NodeId,
        message: ToMaintainerManager,
        dispatchers: &Dispatchers,
    ) -> Vec<ToCoordinator> {
        if let ToMaintainerManager::CoordinatorBootstrap(request) = &message {
            if request.version < self.version {
                return Vec::new();
            }
            (self.coordinator, self.version) = (Some(from.clone()), request.version);
            return vec![self.bootstrap(dispatchers), self.heartbeat()];
        }
        if self.coordinator.as_ref() != Some(from) {
            return Vec::new();
        }
        match message {
            ToMaintainerManager::AddMaintainer(add) => {
                self.on_add(add);
                Vec::new()
            }
            ToMaintainerManager::RemoveMaintainer(remove) => self.on_remove(&remove),
            ToMaintainerManager::SetNodeLiveness(request) => vec![self.on_liveness(&request)],
            ToMaintainerManager::SetDrainTarget(request) => vec![self.on_target(request)],
            ToMaintainerManager::CoordinatorBootstrap(_)
            | ToMaintainerManager::CheckpointTs(_)
            | ToMaintainerManager::HeartBeat(_)
            | ToMaintainerManager::BlockStatus(_)
            | ToMaintainerManager::BootstrapResponse(_)
            | ToMaintainerManager::PostBootstrapResponse(_) => Vec::new(),
        }
    }

    fn on_add(&mut self, add: AddMaintainerRequest) {
        let epoch = wire(add.epoch);
        let ended = self.ended.get(&add.changefeed).copied().unwrap_or(0);
        let free = match self.maintainers.get(&add.changefeed) {
            None => epoch > ended,
            Some(before) => before.stopped && epoch > ended.max(before.epoch),
        };
        if free && self.liveness != NodeLiveness::Stopping {
            self.forget(&add.changefeed);
            self.maintainers.insert(add.changefeed, Maintainer::new(epoch, add.checkpoint.0, None));
        }
    }

    fn on_remove(&mut self, remove: &RemoveMaintainerRequest) -> Vec<ToCoordinator> {
        let (id, epoch) = (&remove.changefeed, wire(remove.epoch));
        match self.maintainers.get_mut(id) {
            Some(running) => {
                let too_early = !running.bootstrapped && running.leaving.is_none() && !remove.cascade;
                if !running.stopped && running.epoch == epoch && !too_early {
                    let cascade = remove.cascade || running.leaving == Some(true);
                    if running.leaving != Some(cascade) {
                        running.reached.clear();
                    }
                    running.leaving = Some(cascade);
                }
                Vec::new()
            }
            None if remove.cascade => {
                self.maintainers.insert(id.clone(), Maintainer::new(epoch, 1, Some(true)));
                Vec::new()
            }
            None => {
                let base = report(&id.name, epoch, ComponentState::Stopped, 0);
                let status = MaintainerStatus { changefeed: id.clone(), bootstrap_done: false, ..base };
                vec![ToCoordinator::MaintainerHeartbeat(vec![status])]
            }
        }
    }

    fn on_liveness(&mut self, request: &SetNodeLivenessRequest) -> ToCoordinator {
        let next = match self.liveness {
            NodeLiveness::Alive => NodeLiveness::Draining,
            NodeLiveness::Draining | NodeLiveness::Stopping => NodeLiveness::Stopping,
        };
        if request.node_epoch == self.process && request.target == next {
            self.liveness = next;
        }
        ToCoordinator::SetNodeLivenessResponse(SetNodeLivenessResponse {
            applied: self.liveness,
            node_epoch: self.process,
        })
    }

    fn on_target(&mut self, request: SetDispatcherDrainTargetRequest) -> ToCoordinator {
        let version = |target: &Option<NodeId>, epoch: u64| (epoch, target.is_none());
        if version(&request.target, request.epoch) > version(&self.target, self.target_epoch) {
            (self.target, self.target_epoch) = (request.target, request.epoch);
        }
        self.heartbeat()
    }

    pub(super) fn heartbeat(&self) -> ToCoordinator {
        ToCoordinator::NodeHeartbeat(NodeHeartbeat {
            liveness: self.liveness,
            node_epoch: self.process,
            drain_target: self.target.clone(),
            drain_epoch: self.target_epoch,
        })
    }

    fn bootstrap(&mut self, dispatchers: &Dispatchers) -> ToCoordinator {
        ToCoordinator::BootstrapResponse(CoordinatorBootstrapResponse {
            statuses: self.statuses(dispatchers),
            drain_protocol_version: 1,
            drain_target: self.target.clone(),
            drain_epoch: self.target_epoch,
        })
    }

    /// What its maintainers are. Those that have stopped are told once and then forgotten.
    pub(super) fn statuses(&mut self, dispatchers: &Dispatchers) -> Vec<MaintainerStatus> {
        let mut statuses = Vec::new();
        for (id, maintainer) in &self.maintainers {
            let on = |target: &NodeId| {
                dispatchers.get(&(id.clone(), target.clone())).map_or(0, |(_, count)| *count)
            };
            let drain = self.target.as_ref().map(|target| DrainProgress {
                target: target.clone(),
                epoch: self.target_epoch,
                // One that has not heard of everybody knows of no dispatchers.
                dispatchers: if maintainer.bootstrapped { on(target) } else { 0 },
                inflight_moves: 0,
            });
            let state = if maintainer.stopped { ComponentState::Stopped } else { ComponentState::Working };
            let base = match maintainer.error {
                Some(code) => crate::world::erring(&id.name, maintainer.epoch, maintainer.checkpoint, code),
                None => report(&id.name, maintainer.epoch, state, maintainer.checkpoint),
            };
            statuses.push(MaintainerStatus {
                changefeed: id.clone(),
                state,
                bootstrap_done: maintainer.bootstrapped,
                drain,
                ..base
            });
        }
        let gone: Vec<ChangefeedId> =
            self.maintainers.iter().filter(|(_, m)| m.stopped).map(|(id, _)| id.clone()).collect();
        for id in gone {
            self.forget(&id);
        }
        statuses
    }

    fn forget(&mut self, id: &ChangefeedId) {
        if let Some(before) = self.maintainers.remove(id) {
            let ended = self.ended.entry(id.clone()).or_default();
            *ended = before.epoch.max(*ended);
        }
    }

    /// One of its maintainers meets an error.
    pub(super) fn fail(&mut self, random: &mut Random) {
        let running: Vec<&mut Maintainer> =
            self.maintainers.values_mut().filter(|maintainer| maintainer.runs()).collect();
        let at = random.below(running.len());
        let code = if random.one_in(3) { "CDC:ErrDispatcherFailed" } else { "CDC:ErrSinkUnavailable" };
        if let Some(maintainer) = running.into_iter().nth(at) {
            maintainer.error = Some(code);
        }
    }

    /// Its maintainers take their dispatchers over, place some, move them away from the node that is emptied, and
    /// leave when they are told to.
    pub(super) fn work(
        &mut self,
        me: &NodeId,
        names: &[NodeId],
        held: &mut Dispatchers,
        random: &mut Random,
    ) {
        let known = |name: &&NodeId| self.cut_off.as_ref().is_none_or(|known| known.contains(*name));
        let names: Vec<NodeId> = names.iter().filter(known).cloned().collect();
        if names.is_empty() {
            return;
        }
        for (id, maintainer) in &mut self.maintainers {
            if maintainer.stopped || random.one_in(3) {
                continue;
            }
            if let Some(cascade) = maintainer.leaving {
                maintainer.leave(id, cascade, &names, held, random);
            } else if maintainer.bootstrapped {
                if maintainer.error.is_none() && random.one_in(2) {
                    maintainer.checkpoint += 1;
                }
                maintainer.place(id, me, self.target.as_ref(), &names, held, random);
            } else {
                maintainer.bootstrap(id, &names, held, random);
            }
        }
    }
}

impl Maintainer {
    /// What it rules with.
    fn rank(&self) -> u64 {
        2 * self.epoch
    }

    /// Reaches one more node.
    fn reach(&mut self, names: &[NodeId], random: &mut Random) -> Option<NodeId> {
        let left: Vec<&NodeId> = names.iter().filter(|name| !self.reached.contains(*name)).collect();
        let name = (*left.get(random.below(left.len()))?).clone();
        self.reached.insert(name.clone());
        Some(name)
    }

    fn leave(
        &mut self,
        id: &ChangefeedId,
        cascade: bool,
        names: &[NodeId],
        held: &mut Dispatchers,
        random: &mut Random,
    ) {
        if cascade && let Some(name) = self.reach(names, random) {
            let on = held.entry((id.clone(), name)).or_insert((0, 0));
            if on.0 <= self.rank() + 1 {
                *on = (self.rank() + 1, 0);
            }
            return;
        }
        self.stopped = true;
    }

    fn bootstrap(
        &mut self,
        id: &ChangefeedId,
        names: &[NodeId],
        held: &mut Dispatchers,
        random: &mut Random,
    ) {
        if let Some(name) = self.reach(names, random) {
            let on = held.entry((id.clone(), name.clone())).or_insert((0, 0));
            if on.0 > self.rank() {
                // A newer maintainer rules there: this one never gets an answer.
                self.reached.remove(&name);
            } else {
                on.0 = self.rank();
            }
        }
        self.bootstrapped = names.iter().all(|name| self.reached.contains(name));
    }

    fn place(
        &mut self,
        id: &ChangefeedId,
        me: &NodeId,
        target: Option<&NodeId>,
        names: &[NodeId],
        held: &mut Dispatchers,
        random: &mut Random,
    ) {
        let to = names[random.below(names.len())].clone();
        let dest = if target == Some(&to) { me.clone() } else { to };
        if target == Some(&dest) || !names.contains(&dest) {
            return;
        }
        let total: u32 = held.iter().filter(|((of, _), _)| of == id).map(|(_, (_, count))| *count).sum();
        let emptied = target.and_then(|target| {
            held.get_mut(&(id.clone(), target.clone())).filter(|held| held.1 > 0 && held.0 == self.rank())
        });
        if let Some(held) = emptied {
            held.1 -= 1;
        } else if total >= DISPATCHERS {
            return;
        }
        let on = held.entry((id.clone(), dest)).or_insert((self.rank(), 0));
        // The fence: an older maintainer changes nothing.
        if on.0 <= self.rank() {
            *on = (self.rank(), on.1 + 1);
        }
    }
}
