//! Everything outside of the nodes, in one place: time, connections, the databases, and what was found to be wrong.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use coordinator::backend::LeaseId;
use heartbeatpb::{Gid, NodeId, WritePermit};
use messaging::MessageCenter;
use parking_lot::Mutex;

use super::feed::{Feed, Wrong};
use super::streams::Streams;
use super::wire::Wire;
use crate::Random;

/// The world as its inhabitants hold it. The lock is never held while a node runs.
pub(super) type Shared = Arc<Mutex<World>>;

/// Entries of the history that are kept; older ones are dropped, so that a long run needs little memory.
const HISTORY: usize = 20_000;

/// A process.
pub(super) struct Process {
    pub(super) center: MessageCenter,
    pub(super) streams: Streams,
    /// It is stopped (SIGSTOP): it hears nothing and does nothing.
    pub(super) paused: bool,
    /// It has lost its lease and knows it.
    pub(super) lost: bool,
    /// What it looks at before it writes.
    pub(super) permit: WritePermit,
    /// It does not reach the metadata store before this time.
    pub(super) store_cut_until: u64,
    /// Its sinks fail writes before this time.
    pub(super) sink_fails_until: u64,
    /// The target takes longer for it: until when, and by how many milliseconds.
    pub(super) sink_slow: (u64, u64),
}

impl Process {
    /// A process that has no lease yet.
    pub(super) fn new(center: MessageCenter, permit: WritePermit) -> Self {
        Self {
            center,
            streams: Streams::default(),
            paused: false,
            lost: false,
            permit,
            store_cut_until: 0,
            sink_fails_until: 0,
            sink_slow: (0, 0),
        }
    }
}

/// Everything outside of the nodes.
pub(super) struct World {
    /// Milliseconds since the beginning.
    pub(super) now: u64,
    /// The beginning, on a clock that does not stop while a process does.
    dawn: Instant,
    /// That clock, in microseconds since the beginning.
    ticks: Arc<AtomicU64>,
    /// Leases, and when they were renewed last, by the metadata store.
    pub(super) leases: BTreeMap<LeaseId, u64>,
    pub(super) random: Random,
    pub(super) processes: BTreeMap<NodeId, Process>,
    /// Pairs that cannot talk before a time, both ways; the smaller id first.
    pub(super) cuts: BTreeMap<(NodeId, NodeId), u64>,
    /// What these processes send, to everybody or to one, takes longer: until when, and by how many milliseconds.
    pub(super) slow: BTreeMap<(NodeId, Option<NodeId>), (u64, u64)>,
    /// What these processes send comes again: until when, and up to how many milliseconds later.
    pub(super) echoes: BTreeMap<NodeId, (u64, u64)>,
    /// Nobody reaches the metadata store before this time.
    pub(super) store_down_until: u64,
    /// So many percent of the requests to the metadata store fail: until when, and how many.
    pub(super) store_flaky: (u64, u64),
    pub(super) wire: Wire,
    pub(super) feeds: BTreeMap<Gid, Feed>,
    /// Nodes about which a drain said that nothing is left.
    pub(super) emptied: BTreeSet<NodeId>,
    pub(super) sessions: u64,
    pub(super) violation: Option<String>,
    pub(super) history: VecDeque<(u64, String)>,
    /// Print the history while it happens.
    pub(super) verbose: bool,
}

impl World {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            now: 0,
            dawn: Instant::now(),
            ticks: Arc::default(),
            leases: BTreeMap::new(),
            random: Random::new(seed, 1),
            processes: BTreeMap::new(),
            cuts: BTreeMap::new(),
            slow: BTreeMap::new(),
            echoes: BTreeMap::new(),
            store_down_until: 0,
            store_flaky: (0, 0),
            wire: Wire::default(),
            feeds: BTreeMap::new(),
            emptied: BTreeSet::new(),
            sessions: 0,
            violation: None,
            history: VecDeque::new(),
            verbose: false,
        }
    }

    /// Now, on the clock that does not stop.
    pub(super) fn clock(&self) -> Instant {
        self.dawn + Duration::from_millis(self.now)
    }

    /// A moment of that clock in microseconds since the beginning.
    pub(super) fn micros(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.dawn).as_micros()).unwrap_or(u64::MAX)
    }

    /// Time passes.
    pub(super) fn set_now(&mut self, now: u64) {
        self.now = now;
        self.ticks.store(now * 1_000, Ordering::Release);
    }

    /// A permit to write that nobody has given yet.
    pub(super) fn permit(&self) -> WritePermit {
        let ticks = Arc::clone(&self.ticks);
        WritePermit::new(move || ticks.load(Ordering::Acquire))
    }

    /// The metadata store was asked to renew a lease that it has, or gives a new one.
    pub(super) fn renew(&mut self, lease: LeaseId, new: bool) {
        let now = self.now;
        if new {
            self.leases.insert(lease, now);
        } else if let Some(renewed) = self.leases.get_mut(&lease) {
            *renewed = now;
        }
    }

    /// Whether a process is one of the cluster, as far as anybody can say.
    pub(super) fn is_trusted(&self, node: &NodeId) -> bool {
        self.processes.get(node).is_some_and(|process| !process.lost && process.permit.holds())
    }

    /// Adds to the history.
    pub(super) fn note(&mut self, what: String) {
        if self.verbose {
            println!("{:>9.3} {what}", seconds(self.now));
        }
        if self.history.len() == HISTORY {
            self.history.pop_front();
        }
        self.history.push_back((self.now, what));
    }

    /// Something happened that must not happen. Only the first is kept: the rest follows from it.
    pub(super) fn violated(&mut self, invariant: &str, what: &str) {
        self.note(format!("VIOLATION {invariant}: {what}"));
        if self.violation.is_none() {
            self.violation = Some(format!("{invariant}: {what}"));
        }
    }

    /// The same for what was found in one go.
    pub(super) fn all_violated(&mut self, wrong: Wrong) {
        for (invariant, what) in wrong {
            self.violated(invariant, &what);
        }
    }

    /// Whether a chance of `percent` in a hundred comes.
    pub(super) fn chance(&mut self, percent: u64) -> bool {
        percent > 0 && self.random.between(1, 100) <= percent
    }

    /// Whether two processes live and can talk.
    pub(super) fn linked(&self, one: &NodeId, other: &NodeId) -> bool {
        if !self.processes.contains_key(one) || !self.processes.contains_key(other) {
            return false;
        }
        one == other || self.cuts.get(&pair(one, other)).is_none_or(|until| *until <= self.now)
    }

    /// Milliseconds that the network adds to what a process sends to another one.
    pub(super) fn slowness(&self, from: &NodeId, to: &NodeId) -> u64 {
        let of = |to: Option<&NodeId>| {
            let slow = self.slow.get(&(from.clone(), to.cloned()));
            slow.filter(|(until, _)| *until > self.now).map_or(0, |(_, extra)| *extra)
        };
        if self.slow.is_empty() { 0 } else { of(None).max(of(Some(to))) }
    }

    /// In how many milliseconds what a process sends comes again, if it does.
    pub(super) fn echo(&mut self, from: &NodeId) -> Option<u64> {
        let now = self.now;
        let (_, late) = self.echoes.get(from).filter(|(until, _)| *until > now)?;
        Some(self.random.between(1, *late))
    }

    /// Breaks the connection of two processes.
    pub(super) fn cut(&mut self, one: &NodeId, other: &NodeId, millis: u64) {
        let until = self.now + millis;
        let entry = self.cuts.entry(pair(one, other)).or_default();
        *entry = until.max(*entry);
        self.wire.lose_between(one, other);
    }

    /// Whether a process reaches the metadata store.
    pub(super) fn reaches_store(&self, node: &NodeId) -> bool {
        self.store_down_until <= self.now
            && self.processes.get(node).is_some_and(|p| p.store_cut_until <= self.now)
    }

    /// Whether a request of a process to the metadata store gets there, or its answer back.
    pub(super) fn store_answers(&mut self, node: &NodeId) -> bool {
        let (until, percent) = self.store_flaky;
        self.reaches_store(node) && !(until > self.now && self.chance(percent))
    }

    /// Milliseconds that the target adds to whatever it does for a process.
    pub(super) fn sink_slowness(&self, node: &NodeId) -> u64 {
        let slow = self.processes.get(node).map_or((0, 0), |process| process.sink_slow);
        if slow.0 > self.now { slow.1 } else { 0 }
    }

    /// All faults end.
    pub(super) fn heal(&mut self) {
        self.cuts.clear();
        self.slow.clear();
        self.echoes.clear();
        self.store_down_until = 0;
        self.store_flaky = (0, 0);
        self.wire.faults = super::wire::Faults::default();
        for process in self.processes.values_mut() {
            process.store_cut_until = 0;
            process.sink_fails_until = 0;
            process.sink_slow = (0, 0);
        }
    }

    /// A process is gone: what it wrote and nobody confirmed may or may not be there.
    pub(super) fn bury(&mut self, node: &NodeId) {
        self.processes.remove(node);
        self.emptied.remove(node);
        self.slow.retain(|(from, to), _| from != node && to.as_ref() != Some(node));
        self.echoes.remove(node);
        self.cuts.retain(|(one, other), _| one != node && other != node);
        self.wire.forget(node);
        let mut wrong = Wrong::new();
        for feed in self.feeds.values_mut() {
            feed.bury(node, &mut self.random, &mut wrong);
        }
        self.all_violated(wrong);
    }
}

fn pair(one: &NodeId, other: &NodeId) -> (NodeId, NodeId) {
    if one < other { (one.clone(), other.clone()) } else { (other.clone(), one.clone()) }
}

/// For people.
#[expect(clippy::cast_precision_loss, reason = "minutes at most")]
pub(super) fn seconds(millis: u64) -> f64 {
    millis as f64 / 1000.0
}
