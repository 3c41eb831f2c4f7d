//! A seeded random walk: messages are lost, repeated, late and out of order, writes fail or are applied without an
//! answer, nodes join, leave, or go on without knowing that they are out, drains begin, change their target and are
//! taken back, changefeeds are made and removed and meet errors, the coordinator stands still, is replaced, and goes
//! on without knowing it. What must hold is checked after every step, and once the faults stop everything finds its
//! place within a bound.

#[path = "walk/model.rs"]
mod model;
#[path = "walk/store.rs"]
mod store;
#[path = "walk/trace.rs"]
mod trace;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use coordinator::core::{Action, Command, Core, OpId, Reply};
use coordinator::{CoordinatorConfig, Error};
use heartbeatpb::config::{ChangefeedState, Progress};
use heartbeatpb::{ChangefeedId, Gid, MaintainerEpoch, NodeId, NodeLiveness, Ts};
use messaging::{ToCoordinator, ToMaintainerManager};

use crate::world::{NORMAL, World, doc};
use model::{Dispatchers, Node};

const STEP: Duration = Duration::from_millis(100);
const FEEDS: [&str; 6] = ["a", "b", "c", "d", "e", "f"];
/// Steps until everything has its place after the faults stopped: five minutes, because errors are waited out.
const BOUND: usize = 3000;

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

    fn choose<T: Clone>(&mut self, of: &[T]) -> Option<T> {
        of.get(self.below(of.len())).cloned()
    }
}

#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "a test has few of them")]
enum Packet {
    Down { from: NodeId, to: NodeId, message: ToMaintainerManager },
    Up { from: NodeId, to: NodeId, message: ToCoordinator },
}

struct Walk {
    world: World,
    random: Random,
    faults: bool,
    /// Where the coordinator is.
    me: NodeId,
    /// A coordinator that was replaced and has yet to find out.
    former: Option<(NodeId, Core)>,
    nodes: BTreeMap<NodeId, Node>,
    dispatchers: Dispatchers,
    net: Vec<(usize, Packet)>,
    step: usize,
    joined: usize,
    version: u64,
    /// Requests that wait for an answer, and which node is to be drained.
    asked: BTreeMap<u64, Option<NodeId>>,
    history: store::History,
    drained: usize,
    /// Print what happens to the changefeed of this name, and to nodes.
    trace: Option<String>,
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
            me: "m0".into(),
            former: None,
            nodes: BTreeMap::new(),
            dispatchers: Dispatchers::new(),
            net: Vec::new(),
            step: 0,
            joined: 0,
            version: 7,
            asked: BTreeMap::new(),
            history: store::History::default(),
            drained: 0,
            trace: std::env::var("COORDINATOR_TRACE").ok(),
        };
        walk.join();
        walk.join();
        walk.elect();
        walk
    }

    fn join(&mut self) {
        let name = format!("m{}", self.joined);
        self.joined += 1;
        self.nodes.insert(name.as_str().into(), Node::new(100 + u64::try_from(self.joined).unwrap()));
    }

    fn members(&self) -> Vec<NodeId> {
        self.nodes.iter().filter(|(_, node)| node.cut_off.is_none()).map(|(name, _)| name.clone()).collect()
    }

    fn alive(&self) -> Vec<NodeId> {
        let alive = |name: &NodeId| self.nodes[name].liveness == NodeLiveness::Alive;
        self.members().into_iter().filter(alive).collect()
    }

    /// A node is gone with all that ran on it.
    fn leave(&mut self, node: &NodeId) {
        self.nodes.remove(node);
        self.dispatchers.retain(|(_, on), _| on != node);
        if self.former.as_ref().is_some_and(|(on, _)| on == node) {
            self.former = None;
        }
        self.tell_members();
    }

    /// A node is out of the cluster and goes on for a while.
    fn cut_off(&mut self, node: &NodeId) {
        let known = self.members().into_iter().filter(|name| name != node).collect();
        if let Some(node) = self.nodes.get_mut(node) {
            node.cut_off = Some(known);
        }
        self.dispatchers.retain(|(_, on), _| on != node);
        self.tell_members();
    }

    fn tell_members(&mut self) {
        let members: BTreeSet<NodeId> = self.members().into_iter().collect();
        if self.nodes.values().all(|node| node.cut_off.is_some() || node.liveness != NodeLiveness::Alive) {
            self.join();
            return self.tell_members();
        }
        if !members.contains(&self.me) {
            return self.elect();
        }
        self.trace(None, || format!("members {members:?}"));
        let actions = self.world.core.on_nodes(members.clone(), self.world.now);
        self.perform(actions);
        if let Some((_, core)) = &mut self.former {
            let actions = core.on_nodes(members, self.world.now);
            self.perform_former(actions);
        }
    }

    /// Another coordinator takes over from what is stored.
    fn elect(&mut self) {
        self.version += 1;
        let alive = self.alive();
        let Some(elected) = self.random.choose(&alive) else {
            self.join();
            return self.elect();
        };
        let core = Core::new(elected.clone(), self.version, CoordinatorConfig::default());
        let former = std::mem::replace(&mut self.world.core, core);
        let from = std::mem::replace(&mut self.me, elected);
        self.former = None;
        self.trace(None, || format!("{} is coordinator after {from}", self.me));
        let goes_on = self.faults && self.step > 0 && from != self.me && self.nodes.contains_key(&from);
        if goes_on {
            self.former = Some((from, former));
        }
        self.leave_writes();
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
                    self.send(Packet::Down { from: self.me.clone(), to, message });
                }
                Action::Write { id, write } => self.world.pending.push((id, write)),
                Action::WriteDrain(doc) => self.world.pending_drain = Some(doc),
                Action::SaveCheckpoints(writes) => self.save(&writes),
                Action::Reply { op, result } => self.on_reply(op, &result),
                Action::Count { .. } => {}
            }
        }
    }

    /// What a coordinator says that was replaced. The first write tells it.
    fn perform_former(&mut self, actions: Vec<Action>) {
        let Some((from, _)) = &self.former else { return };
        let from = from.clone();
        for action in actions {
            match action {
                Action::Send { to, message } => {
                    self.check_command(&message);
                    self.send(Packet::Down { from: from.clone(), to, message });
                }
                Action::Write { .. } | Action::WriteDrain(_) | Action::SaveCheckpoints(_) => {
                    self.former = None
                }
                Action::Reply { .. } | Action::Count { .. } => {}
            }
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
            let longest = if self.random.one_in(10) { 300 } else { 60 };
            let delay = if self.random.one_in(5) { self.random.below(longest) } else { 1 };
            self.net.push((self.step + delay, packet.clone()));
        }
    }

    fn deliver(&mut self) {
        let (mut due, later): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.net).into_iter().partition(|(at, _)| *at <= self.step);
        self.net = later;
        if self.faults && self.random.one_in(4) {
            due.reverse();
        }
        for (_, packet) in due {
            self.trace_packet(&packet);
            match packet {
                Packet::Down { from, to, message } => {
                    let Some(node) = self.nodes.get_mut(&to) else { continue };
                    let answers = node.on_command(&from, message, &self.dispatchers);
                    self.report(&to, answers);
                }
                Packet::Up { from, to, message } if to == self.me => {
                    let actions = self.world.core.on_message(&from, message, self.world.now);
                    self.perform(actions);
                }
                Packet::Up { from, to, message } => {
                    if let Some((_, core)) = self.former.as_mut().filter(|(on, _)| *on == to) {
                        let actions = core.on_message(&from, message, self.world.now);
                        self.perform_former(actions);
                    }
                }
            }
        }
    }

    /// A node says something to the coordinator that it knows.
    fn report(&mut self, from: &NodeId, messages: Vec<ToCoordinator>) {
        let Some(to) = self.nodes.get(from).and_then(Node::coordinator).cloned() else { return };
        for message in messages {
            self.send(Packet::Up { from: from.clone(), to: to.clone(), message });
        }
    }

    fn ask(&mut self, command: Command) -> u64 {
        self.world.next_op += 1;
        let op = self.world.next_op;
        let target = if let Command::Drain { node, .. } = &command { Some(node.clone()) } else { None };
        self.asked.insert(op, target);
        self.trace(None, || format!("ask {op}: {command:?}").chars().take(120).collect());
        let actions = self.world.core.on_command(OpId(op), command, self.world.now);
        self.perform(actions);
        op
    }

    fn drain(&mut self, node: NodeId) {
        let clock = [None, Some(0), Some(1000), Some(1_000_000)][self.random.below(4)];
        self.ask(Command::Drain { node, clock });
    }

    /// "0" is a promise.
    fn on_reply(&mut self, op: OpId, result: &Result<Reply, Error>) {
        let Some(target) = self.asked.remove(&op.0) else { return };
        self.trace(None, || format!("reply {}: {}", op.0, crate::world::show_reply(result)));
        let (Some(node), Ok(Reply::Drain(view))) = (target, result) else { return };
        if view.remaining > 0 || self.nodes.get(&node).is_none_or(|node| node.cut_off.is_some()) {
            return;
        }
        for (id, maintainer) in &self.nodes[&node].maintainers {
            let current = self.history.epoch(id) == maintainer.epoch && maintainer.runs();
            assert!(!current, "{id} still has its maintainer on {node}");
        }
        for ((id, on), (_, count)) in &self.dispatchers {
            assert!(on != &node || *count == 0, "{id} still has dispatchers on {node}");
        }
        assert_eq!(self.nodes[&node].liveness, NodeLiveness::Stopping);
        self.drained += 1;
        // What is started from now on must not be this node's.
        self.nodes.remove(&node);
    }

    /// Something happens to a node, to the coordinator or to a changefeed, or people want something.
    fn disturb(&mut self) {
        let members = self.members();
        let others: Vec<NodeId> = members.iter().filter(|node| **node != self.me).cloned().collect();
        match self.random.below(90) {
            0 | 1 if members.len() < 6 => {
                self.join();
                self.tell_members();
            }
            2 => {
                if let Some(node) = self.random.choose(&members) {
                    self.leave(&node);
                }
            }
            3 => {
                if let Some(node) = self.random.choose(&members) {
                    self.cut_off(&node);
                }
            }
            4 => {
                let out: Vec<NodeId> = self
                    .nodes
                    .iter()
                    .filter(|(_, node)| node.cut_off.is_some())
                    .map(|(name, _)| name.clone())
                    .collect();
                if let Some(node) = self.random.choose(&out) {
                    self.leave(&node);
                }
            }
            5..=9 => {
                let target = self.world.core.drain_view(self.world.now).map(|view| view.target);
                let target = target.filter(|_| !self.random.one_in(5));
                if let Some(node) = target.or_else(|| self.random.choose(&others)) {
                    self.drain(node);
                    self.tell_members();
                }
            }
            10 if self.random.one_in(3) => {
                if let Some(view) = self.world.core.drain_view(self.world.now) {
                    self.ask(Command::CancelDrain { node: view.target });
                }
            }
            11 | 12 => self.want(),
            13 if self.random.one_in(3) => self.elect(),
            14 => {
                if let Some(node) = self.random.choose(&members).and_then(|node| self.nodes.get_mut(&node)) {
                    node.fail(&mut self.random);
                }
            }
            // The process of the coordinator stood still, or its machine.
            15 if self.random.one_in(8) => self.world.now += Duration::from_secs(40),
            _ => {}
        }
    }

    /// A person wants something of a changefeed.
    fn want(&mut self) {
        let name = FEEDS[self.random.below(FEEDS.len())].to_owned();
        let keyspace = "default".to_owned();
        let command = match self.random.below(8) {
            0..=2 => Command::Pause { keyspace, name },
            3..=4 => Command::Resume { keyspace, name, overwrite: None },
            5 => Command::Resume { keyspace, name, overwrite: Some(Ts(50 + self.random.next() % 100)) },
            6 => Command::Remove { keyspace, name },
            _ => {
                let mut info = doc(&name, NORMAL, 0, Progress::None).info;
                info.id.gid = Gid::new(self.random.next(), 1);
                if self.random.one_in(3) {
                    info.target_ts = Ts(150);
                }
                Command::Create { info: Box::new(info), candidate: 1 }
            }
        };
        self.ask(command);
    }

    fn advance(&mut self) {
        self.step += 1;
        self.world.now += STEP;
        if self.faults {
            self.disturb();
        }
        self.write();
        self.deliver();
        let names = self.members();
        for (name, node) in &mut self.nodes {
            node.work(name, &names, &mut self.dispatchers, &mut self.random);
        }
        self.history.reached(&self.nodes);
        if self.step.is_multiple_of(5) {
            self.beat();
        }
        self.check();
    }

    fn beat(&mut self) {
        let names: Vec<NodeId> = self.nodes.keys().cloned().collect();
        for name in &names {
            let Some(node) = self.nodes.get_mut(name) else { continue };
            let mut news = vec![ToCoordinator::MaintainerHeartbeat(node.statuses(&self.dispatchers))];
            if self.step.is_multiple_of(20) {
                news.push(node.heartbeat());
            }
            self.report(name, news);
        }
        let actions = self.world.core.on_tick(self.world.now);
        self.perform(actions);
        if let Some((_, core)) = &mut self.former {
            let actions = core.on_tick(self.world.now);
            self.perform_former(actions);
        }
    }

    fn check(&mut self) {
        self.history.check_disk(&self.world.disk);
        let mut owners = BTreeSet::new();
        for (name, node) in &self.nodes {
            for (id, maintainer) in node.maintainers.iter().filter(|(_, maintainer)| maintainer.runs()) {
                assert!(maintainer.epoch <= self.history.epoch(id), "{id}: an epoch that is not stored");
                assert!(owners.insert((id, maintainer.epoch)), "{id} has two owners, one of them {name}");
            }
        }
    }

    /// Whether every changefeed that is to run does so once, and nothing else does.
    fn settled(&self) -> Result<(), String> {
        let views = self.world.core.views(None, self.world.now);
        if let Some(view) = self.world.core.drain_view(self.world.now) {
            let waits: Vec<_> = views.into_iter().filter_map(|view| view.waiting_for).collect();
            return Err(format!("{view:?} {waits:?}"));
        }
        if !self.asked.is_empty() {
            return Err(format!("requests without an answer: {:?}", self.asked));
        }
        for view in &views {
            let id = &view.info.id;
            let run: Vec<(&NodeId, u64)> = self
                .nodes
                .iter()
                .filter_map(|(name, node)| Some((name, node.maintainers.get(id)?.epoch)))
                .collect();
            let expected = match (&view.node, view.info.state) {
                (Some(node), ChangefeedState::Normal) => vec![(node, wire(view.info.epoch))],
                (None, ChangefeedState::Stopped | ChangefeedState::Finished) => Vec::new(),
                (node, state) => return Err(format!("{id} is {state} on {node:?}: {:?}", view.waiting_for)),
            };
            if run != expected || view.waiting_for.is_some() {
                return Err(format!("{id}: {run:?}, expected {expected:?}, {:?}", view.waiting_for));
            }
        }
        let idle = |id: &ChangefeedId| views.iter().all(|view| view.info.id != *id || view.node.is_none());
        let strays = self.nodes.values().flat_map(|node| node.maintainers.keys()).filter(|id| idle(id));
        if let Some(stray) = strays.into_iter().next() {
            return Err(format!("a maintainer of {stray} is left"));
        }
        let left = self.dispatchers.iter().find(|((id, _), (_, count))| *count > 0 && idle(id));
        left.map_or(Ok(()), |(key, held)| Err(format!("dispatchers are left: {key:?} {held:?}")))
    }

    /// Without faults, with the drain that is under way polled until its node may go, and with a person who resumes
    /// what failed.
    fn settle(&mut self) {
        self.faults = false;
        self.former = None;
        self.nodes.retain(|_, node| node.cut_off.is_none());
        self.tell_members();
        let mut why = String::new();
        for _ in 0..BOUND {
            self.advance();
            if self.step.is_multiple_of(10) {
                if let Some(view) = self.world.core.drain_view(self.world.now) {
                    self.drain(view.target);
                    self.tell_members();
                }
                for view in self.world.core.views(None, self.world.now) {
                    if view.info.state == ChangefeedState::Failed {
                        let (keyspace, name) =
                            (view.info.id.keyspace.to_string(), view.info.id.name.to_string());
                        self.ask(Command::Resume { keyspace, name, overwrite: None });
                    }
                }
            }
            match self.settled() {
                Ok(()) => return,
                Err(reason) => why = reason,
            }
        }
        panic!("not settled: {why}");
    }
}

/// `COORDINATOR_SEED=7`, `COORDINATOR_SEED=0..20000`, or a range that takes seconds.
fn seeds() -> std::ops::Range<u64> {
    match std::env::var("COORDINATOR_SEED") {
        Ok(text) => match text.split_once("..") {
            Some((first, end)) => first.parse().unwrap()..end.parse().unwrap(),
            None => text.parse().map(|seed| seed..seed + 1).unwrap(),
        },
        Err(_) => 0..120,
    }
}

#[test]
fn one_owner_durable_epochs_honest_drains_and_everything_placed_in_the_end() {
    let mut drained = 0;
    for seed in seeds() {
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
    let seeds = usize::try_from(seeds().end - seeds().start).unwrap();
    assert!(seeds < 20 || drained > seeds / 2, "drains ended: {drained}");
}
