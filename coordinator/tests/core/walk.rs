//! A seeded random walk: messages are lost, repeated and late, writes fail, nodes join and leave, drains begin and
//! are taken back, the coordinator is replaced. What must hold is checked after every step, and once the faults
//! stop everything finds its place within a bound.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use coordinator::core::{Action, Command, Core, OpId, Reply};
use coordinator::{CoordinatorConfig, Error};
use heartbeatpb::config::{ChangefeedState, Progress};
use heartbeatpb::{
    ChangefeedId, ComponentState, CoordinatorBootstrapResponse, DrainProgress, MaintainerEpoch,
    MaintainerStatus, NodeHeartbeat, NodeId, NodeLiveness, SetNodeLivenessResponse,
};
use messaging::{ToCoordinator, ToMaintainerManager};

use crate::world::{NORMAL, World, doc, report};

const STEP: Duration = Duration::from_millis(100);
const FEEDS: [&str; 6] = ["a", "b", "c", "d", "e", "f"];
/// Steps until everything has its place after the faults stopped: 90 seconds.
const BOUND: usize = 900;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(n.max(1)).unwrap()).unwrap()
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

#[derive(Clone, Debug)]
struct Maintainer {
    epoch: u64,
    bootstrapped: bool,
}

/// A node as far as the coordinator can tell: it keeps to the contract of maintainer managers.
#[derive(Clone, Debug)]
struct Node {
    process: u64,
    version: i64,
    liveness: NodeLiveness,
    target: Option<NodeId>,
    target_epoch: u64,
    maintainers: BTreeMap<ChangefeedId, Maintainer>,
}

#[derive(Clone, Debug)]
enum Packet {
    Down(NodeId, ToMaintainerManager),
    Up(NodeId, ToCoordinator),
}

struct Walk {
    world: World,
    random: Random,
    faults: bool,
    nodes: BTreeMap<NodeId, Node>,
    /// Dispatchers of a changefeed on a node, and the epoch that rules them there.
    dispatchers: BTreeMap<(ChangefeedId, NodeId), (u64, u32)>,
    net: Vec<(usize, Packet)>,
    step: usize,
    joined: usize,
    version: u64,
    epochs: BTreeMap<ChangefeedId, u64>,
    asked: BTreeMap<u64, NodeId>,
    drained: usize,
}

fn wire(epoch: Option<MaintainerEpoch>) -> u64 {
    MaintainerEpoch::to_wire(epoch)
}

impl Walk {
    fn new(seed: u64) -> Self {
        let disk = FEEDS.iter().map(|name| doc(name, NORMAL, 1, Progress::None)).collect();
        let mut walk = Self {
            world: World::new(disk),
            random: Random(seed),
            faults: true,
            nodes: BTreeMap::new(),
            dispatchers: BTreeMap::new(),
            net: Vec::new(),
            step: 0,
            joined: 0,
            version: 7,
            epochs: BTreeMap::new(),
            asked: BTreeMap::new(),
            drained: 0,
        };
        walk.join("n1");
        walk.join("n2");
        walk.elect();
        walk
    }

    fn join(&mut self, name: &str) {
        self.joined += 1;
        let node = Node {
            process: 100 + u64::try_from(self.joined).unwrap(),
            version: 0,
            liveness: NodeLiveness::Alive,
            target: None,
            target_epoch: 0,
            maintainers: BTreeMap::new(),
        };
        self.nodes.insert(name.into(), node);
    }

    /// A node is gone with all that ran on it.
    fn leave(&mut self, node: &NodeId) {
        self.nodes.remove(node);
        self.dispatchers.retain(|(_, on), _| on != node);
        self.tell_members();
    }

    fn tell_members(&mut self) {
        let alive: BTreeSet<NodeId> = self.nodes.keys().cloned().collect();
        let actions = self.world.core.on_nodes(alive, self.world.now);
        self.perform(actions);
    }

    /// Another coordinator takes over from what is stored.
    fn elect(&mut self) {
        self.version += 1;
        self.world.core = Core::new("n1".into(), self.version, CoordinatorConfig::default());
        self.world.pending.clear();
        self.world.pending_drain = None;
        self.asked.clear();
        self.world.core.on_drain_loaded(self.world.drain.clone());
        self.tell_members();
        let loaded = self.world.disk.clone();
        let actions = self.world.core.on_loaded(loaded, self.world.now);
        self.perform(actions);
    }

    fn perform(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Send { to, message } => {
                    self.check_command(&message);
                    self.send(Packet::Down(to, message));
                }
                Action::Write { id, write } => self.world.pending.push((id, write)),
                Action::WriteDrain(doc) => self.world.pending_drain = Some(doc),
                Action::SaveCheckpoints(writes) => {
                    let actions = self.world.core.on_checkpoints_saved(&writes, self.world.now);
                    self.perform(actions);
                }
                Action::Reply { op, result } => self.on_reply(op, &result),
                Action::Count { .. } => {}
            }
        }
    }

    /// Nothing is told that is not stored.
    fn check_command(&self, message: &ToMaintainerManager) {
        if let ToMaintainerManager::AddMaintainer(add) = message {
            let stored = self.world.disk.iter().find(|stored| stored.info.id == add.changefeed).unwrap();
            assert!(add.epoch <= stored.info.epoch, "an epoch is durable before it is told");
        }
        if let ToMaintainerManager::SetDrainTarget(request) = message
            && request.target.is_some()
        {
            let stored = self.world.drain.as_ref().unwrap();
            assert!(request.epoch <= stored.epoch, "a drain is durable before it is told");
        }
    }

    fn send(&mut self, packet: Packet) {
        if !self.faults {
            self.net.push((self.step + 1, packet));
            return;
        }
        if self.random.one_in(6) {
            return;
        }
        let copies = if self.random.one_in(6) { 2 } else { 1 };
        for _ in 0..copies {
            let delay = if self.random.one_in(5) { self.random.below(60) } else { 1 };
            self.net.push((self.step + delay, packet.clone()));
        }
    }

    fn deliver(&mut self) {
        let (due, later) = std::mem::take(&mut self.net).into_iter().partition(|(at, _)| *at <= self.step);
        self.net = later;
        let due: Vec<(usize, Packet)> = due;
        for (_, packet) in due {
            match packet {
                Packet::Down(to, message) => self.on_command(&to, message),
                Packet::Up(from, message) => {
                    let actions = self.world.core.on_message(&from, message, self.world.now);
                    self.perform(actions);
                }
            }
        }
    }

    fn on_command(&mut self, to: &NodeId, message: ToMaintainerManager) {
        let Some(node) = self.nodes.get_mut(to) else { return };
        match message {
            ToMaintainerManager::CoordinatorBootstrap(request) => {
                if request.version >= node.version {
                    node.version = request.version;
                    self.answer_bootstrap(to);
                }
            }
            ToMaintainerManager::AddMaintainer(add) => {
                if node.liveness != NodeLiveness::Stopping && !node.maintainers.contains_key(&add.changefeed)
                {
                    let maintainer = Maintainer { epoch: wire(add.epoch), bootstrapped: false };
                    node.maintainers.insert(add.changefeed, maintainer);
                }
            }
            ToMaintainerManager::RemoveMaintainer(remove) => {
                let epoch = wire(remove.epoch);
                let running = node.maintainers.get(&remove.changefeed).cloned();
                match running {
                    Some(running) if running.epoch != epoch => return,
                    Some(running) if !running.bootstrapped && !remove.cascade => return,
                    Some(_) => {
                        node.maintainers.remove(&remove.changefeed);
                    }
                    None => {}
                }
                if remove.cascade {
                    let stale = |(id, _): &(ChangefeedId, NodeId), (ruler, _): &(u64, u32)| {
                        *id == remove.changefeed && *ruler <= epoch
                    };
                    self.dispatchers.retain(|key, held| !stale(key, held));
                }
                let status = MaintainerStatus {
                    bootstrap_done: false,
                    ..report(&remove.changefeed.name, epoch, ComponentState::Stopped, 0)
                };
                self.send(Packet::Up(to.clone(), ToCoordinator::MaintainerHeartbeat(vec![status])));
            }
            ToMaintainerManager::SetNodeLiveness(request) => {
                let next = match node.liveness {
                    NodeLiveness::Alive => NodeLiveness::Draining,
                    NodeLiveness::Draining | NodeLiveness::Stopping => NodeLiveness::Stopping,
                };
                if request.node_epoch == node.process && request.target == next {
                    node.liveness = next;
                }
                let response = SetNodeLivenessResponse { applied: node.liveness, node_epoch: node.process };
                self.send(Packet::Up(to.clone(), ToCoordinator::SetNodeLivenessResponse(response)));
            }
            ToMaintainerManager::SetDrainTarget(request) => {
                let version = |target: &Option<NodeId>, epoch: u64| (epoch, target.is_none());
                if version(&request.target, request.epoch) > version(&node.target, node.target_epoch) {
                    (node.target, node.target_epoch) = (request.target, request.epoch);
                }
                self.beat(to);
            }
            ToMaintainerManager::CheckpointTs(_)
            | ToMaintainerManager::HeartBeat(_)
            | ToMaintainerManager::BlockStatus(_)
            | ToMaintainerManager::BootstrapResponse(_)
            | ToMaintainerManager::PostBootstrapResponse(_) => {}
        }
    }

    fn answer_bootstrap(&mut self, of: &NodeId) {
        let node = &self.nodes[of];
        let answer = CoordinatorBootstrapResponse {
            statuses: self.statuses(of),
            drain_protocol_version: 1,
            drain_target: node.target.clone(),
            drain_epoch: node.target_epoch,
        };
        self.send(Packet::Up(of.clone(), ToCoordinator::BootstrapResponse(answer)));
        self.beat(of);
    }

    fn beat(&mut self, of: &NodeId) {
        let node = &self.nodes[of];
        let heartbeat = NodeHeartbeat {
            liveness: node.liveness,
            node_epoch: node.process,
            drain_target: node.target.clone(),
            drain_epoch: node.target_epoch,
        };
        self.send(Packet::Up(of.clone(), ToCoordinator::NodeHeartbeat(heartbeat)));
    }

    fn statuses(&self, of: &NodeId) -> Vec<MaintainerStatus> {
        let node = &self.nodes[of];
        let status = |(id, maintainer): (&ChangefeedId, &Maintainer)| {
            let on = |target: &NodeId| {
                let held = self.dispatchers.get(&(id.clone(), target.clone()));
                held.map_or(0, |(_, count)| *count)
            };
            let drain = node.target.as_ref().map(|target| DrainProgress {
                target: target.clone(),
                epoch: node.target_epoch,
                dispatchers: if maintainer.bootstrapped { on(target) } else { 0 },
                inflight_moves: 0,
            });
            let base = report(&id.name, maintainer.epoch, ComponentState::Working, 100);
            MaintainerStatus { bootstrap_done: maintainer.bootstrapped, drain, ..base }
        };
        node.maintainers.iter().map(status).collect()
    }

    /// Each maintainer takes its dispatchers over, places some, and moves them away from the node that is emptied.
    fn work(&mut self) {
        let names: Vec<NodeId> = self.nodes.keys().cloned().collect();
        for (on, node) in &mut self.nodes {
            for (id, maintainer) in &mut node.maintainers {
                if !maintainer.bootstrapped {
                    maintainer.bootstrapped = names.iter().all(|name| {
                        let held = self.dispatchers.entry((id.clone(), name.clone())).or_insert((0, 0));
                        let rules = held.0 <= maintainer.epoch;
                        held.0 = held.0.max(maintainer.epoch);
                        rules
                    });
                    continue;
                }
                let to = names[self.random.below(names.len())].clone();
                let dest = if node.target.as_ref() == Some(&to) { on.clone() } else { to };
                if node.target.as_ref() == Some(&dest) {
                    continue;
                }
                let total: u32 = self
                    .dispatchers
                    .iter()
                    .filter(|((of, _), _)| of == id)
                    .map(|(_, (_, count))| *count)
                    .sum();
                let emptied = node.target.as_ref().and_then(|target| {
                    self.dispatchers
                        .get_mut(&(id.clone(), target.clone()))
                        .filter(|held| held.1 > 0 && held.0 == maintainer.epoch)
                });
                if let Some(held) = emptied {
                    held.1 -= 1;
                } else if total >= 3 {
                    continue;
                }
                let held = self.dispatchers.entry((id.clone(), dest)).or_insert((maintainer.epoch, 0));
                // The fence: an older maintainer changes nothing.
                if held.0 <= maintainer.epoch {
                    *held = (maintainer.epoch, held.1 + 1);
                }
            }
        }
    }

    fn write(&mut self) {
        while !(self.world.pending.is_empty() || self.faults && self.random.one_in(3)) {
            let at = self.random.below(self.world.pending.len());
            let (id, write) = self.world.pending.remove(at);
            let result = if self.faults && self.random.one_in(8) {
                Err(Error::Conflict(id.to_string()))
            } else {
                self.world.write(&id, &write)
            };
            let actions = self.world.core.on_written(&id, result, self.world.now);
            self.perform(actions);
        }
        if self.faults && self.random.one_in(3) {
            return;
        }
        if let Some(doc) = self.world.pending_drain.take() {
            // A lost answer: the document may be stored although the coordinator does not know.
            let lost = self.faults && self.random.one_in(6);
            if !lost || self.random.one_in(2) {
                self.world.drain = Some(doc);
            }
            let result = if lost { Err(Error::Conflict("drain".to_owned())) } else { Ok(()) };
            let actions = self.world.core.on_drain_written(result, self.world.now);
            self.perform(actions);
        }
    }

    fn ask(&mut self, command: Command) -> u64 {
        self.world.next_op += 1;
        let op = self.world.next_op;
        let actions = self.world.core.on_command(OpId(op), command, self.world.now);
        self.perform(actions);
        op
    }

    fn drain(&mut self, node: NodeId) {
        self.asked.insert(self.world.next_op + 1, node.clone());
        self.ask(Command::Drain { node, clock: Some(1000) });
    }

    /// "0" is a promise.
    fn on_reply(&mut self, op: OpId, result: &Result<Reply, Error>) {
        let Some(node) = self.asked.remove(&op.0) else { return };
        let Ok(Reply::Drain(view)) = result else { return };
        if view.remaining > 0 || !self.nodes.contains_key(&node) {
            return;
        }
        let current = |id: &ChangefeedId| self.epochs.get(id).copied().unwrap_or(0);
        for (id, maintainer) in &self.nodes[&node].maintainers {
            assert_ne!(maintainer.epoch, current(id), "{id} still has its maintainer on {node}");
        }
        for ((id, on), (_, count)) in &self.dispatchers {
            assert!(on != &node || *count == 0, "{id} still has dispatchers on {node}");
        }
        assert_eq!(self.nodes[&node].liveness, NodeLiveness::Stopping);
        self.drained += 1;
        // What is started from now on must not be this node's.
        self.nodes.remove(&node);
    }

    /// A fault, or something that people do.
    fn disturb(&mut self) {
        let others: Vec<NodeId> = self.nodes.keys().filter(|node| node.as_str() != "n1").cloned().collect();
        let some =
            |random: &mut Random| (!others.is_empty()).then(|| others[random.below(others.len())].clone());
        match self.random.below(60) {
            0 if self.nodes.len() < 6 => {
                self.join(&format!("m{}", self.joined));
                self.tell_members();
            }
            1 if others.len() > 1 => {
                if let Some(node) = some(&mut self.random) {
                    self.leave(&node);
                }
            }
            2..=5 => {
                let target = self.world.core.drain_view(self.world.now).map(|view| view.target);
                if let Some(node) = target.or_else(|| some(&mut self.random)) {
                    self.drain(node);
                    self.tell_members();
                }
            }
            6 if self.random.one_in(3) => {
                if let Some(view) = self.world.core.drain_view(self.world.now) {
                    self.ask(Command::CancelDrain { node: view.target });
                }
            }
            7 => {
                let name = FEEDS[self.random.below(FEEDS.len())].to_owned();
                let keyspace = "default".to_owned();
                if self.random.one_in(2) {
                    self.ask(Command::Pause { keyspace, name });
                } else {
                    self.ask(Command::Resume { keyspace, name, overwrite: None });
                }
            }
            8 if self.random.one_in(4) => self.elect(),
            _ => {}
        }
    }

    fn advance(&mut self) {
        self.step += 1;
        self.world.now += STEP;
        if self.faults {
            self.disturb();
        }
        self.write();
        self.deliver();
        self.work();
        let names: Vec<NodeId> = self.nodes.keys().cloned().collect();
        if self.step.is_multiple_of(5) {
            for name in &names {
                let statuses = self.statuses(name);
                self.send(Packet::Up(name.clone(), ToCoordinator::MaintainerHeartbeat(statuses)));
            }
            let actions = self.world.core.on_tick(self.world.now);
            self.perform(actions);
        }
        if self.step.is_multiple_of(20) {
            for name in &names {
                self.beat(name);
            }
        }
        self.check();
    }

    fn check(&mut self) {
        for stored in &self.world.disk {
            let epoch = wire(stored.info.epoch);
            let before = self.epochs.insert(stored.info.id.clone(), epoch).unwrap_or(0);
            assert!(before <= epoch, "the epoch of {} went back", stored.info.id);
        }
        let mut owners = BTreeSet::new();
        for (name, node) in &self.nodes {
            for (id, maintainer) in &node.maintainers {
                assert!(maintainer.epoch <= self.epochs[id], "{id} runs under an epoch that is not stored");
                assert!(owners.insert((id, maintainer.epoch)), "{id} has two owners, one of them {name}");
            }
        }
        for view in self.world.core.views(None, self.world.now) {
            if let Some(node) = &view.node {
                assert!(self.nodes.contains_key(node) || self.faults, "bound to nobody");
            }
        }
    }

    /// Whether every changefeed that is to run does so once, and nothing else does.
    fn settled(&self) -> Result<(), String> {
        if let Some(view) = self.world.core.drain_view(self.world.now) {
            let waits: Vec<_> = self
                .world
                .core
                .views(None, self.world.now)
                .into_iter()
                .filter_map(|view| view.waiting_for)
                .collect();
            return Err(format!("{view:?} {waits:?}"));
        }
        for view in self.world.core.views(None, self.world.now) {
            let id = &view.info.id;
            let run: Vec<(&NodeId, u64)> = self
                .nodes
                .iter()
                .filter_map(|(name, node)| Some((name, node.maintainers.get(id)?.epoch)))
                .collect();
            let expected = match (&view.node, view.info.state) {
                (Some(node), ChangefeedState::Normal) => vec![(node, wire(view.info.epoch))],
                (None, ChangefeedState::Stopped) => Vec::new(),
                (node, state) => return Err(format!("{id} is {state} on {node:?}: {:?}", view.waiting_for)),
            };
            if run != expected || view.waiting_for.is_some() {
                return Err(format!("{id}: {run:?}, expected {expected:?}, {:?}", view.waiting_for));
            }
        }
        Ok(())
    }

    /// Without faults, and with the drain that is under way polled until its node may go.
    fn settle(&mut self) {
        self.faults = false;
        self.tell_members();
        let mut why = String::new();
        for _ in 0..BOUND {
            self.advance();
            if self.step.is_multiple_of(10)
                && let Some(view) = self.world.core.drain_view(self.world.now)
            {
                self.drain(view.target);
                self.tell_members();
            }
            match self.settled() {
                Ok(()) => return,
                Err(reason) => why = reason,
            }
        }
        panic!("not settled: {why}");
    }
}

#[test]
fn one_owner_durable_epochs_honest_drains_and_everything_placed_in_the_end() {
    let seeds = match std::env::var("COORDINATOR_SEED") {
        Ok(seed) => vec![seed.parse().unwrap()],
        Err(_) => (0..150).collect::<Vec<u64>>(),
    };
    let mut drained = 0;
    for seed in seeds.clone() {
        let run = std::panic::catch_unwind(|| {
            let mut walk = Walk::new(seed);
            for _ in 0..4 {
                walk.faults = true;
                for _ in 0..400 {
                    walk.advance();
                }
                walk.settle();
            }
            walk.drained
        });
        match run {
            Ok(count) => drained += count,
            Err(cause) => {
                eprintln!("seed {seed}: again with COORDINATOR_SEED={seed}");
                std::panic::resume_unwind(cause);
            }
        }
    }
    assert!(seeds.len() == 1 || drained > seeds.len(), "drains ended: {drained}");
}
