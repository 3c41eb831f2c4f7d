//! An in-memory network between centers, with faults from a seed.
//!
//! Each pair of nodes and stream class is a link: a bounded queue and a task that carries one envelope after
//! the other, so order within a link holds as it does on a real stream. Faults are drawn per link from
//! the network's seed, so what happens on one link does not depend on how tasks of other links are scheduled.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::{Arc, Weak};
use std::time::Duration;

use heartbeatpb::NodeId;
use heartbeatpb::wire::proto::Message as Envelope;
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::sync::{mpsc, watch};
use tokio_util::task::AbortOnDropHandle;

use crate::{MessageCenter, QUEUE_CAPACITY, SendError, SendErrorKind, StreamClass, Transport};

/// What goes wrong on a link.
#[derive(Clone, PartialEq, Debug)]
pub struct Faults {
    /// Probability that an envelope is lost.
    pub loss: f64,
    /// Probability that an envelope arrives twice. A real stream never does that; senders that repeat
    /// themselves do.
    pub duplication: f64,
    /// How long an envelope travels. Envelopes of a link do not overtake each other.
    pub delay: Range<Duration>,
}

impl Faults {
    /// A perfect link.
    pub const NONE: Self = Self { loss: 0.0, duplication: 0.0, delay: Duration::ZERO..Duration::ZERO };
}

/// What happened to envelopes so far.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Carried {
    /// Handed to the receiver's center, repetitions included.
    pub delivered: u64,
    /// Lost by chance, by a partition or because the receiver is gone.
    pub lost: u64,
    /// Delivered a second time.
    pub duplicated: u64,
}

type LinkKey = (NodeId, NodeId, StreamClass);

struct Link {
    queue: mpsc::Sender<Envelope>,
    _pump: AbortOnDropHandle<()>,
}

struct State {
    seed: u64,
    capacity: usize,
    /// Bytes of the largest payload that a link takes.
    largest: usize,
    faults: Faults,
    nodes: BTreeMap<NodeId, MessageCenter>,
    links: BTreeMap<LinkKey, Link>,
    link_faults: BTreeMap<(NodeId, NodeId), Faults>,
    /// Ordered pairs that cannot talk.
    cuts: BTreeSet<(NodeId, NodeId)>,
    /// Ordered pairs whose streams were never opened.
    closed: BTreeSet<(NodeId, NodeId)>,
    /// How often each pair was cut: what travels during a cut is lost even when the cut is over on arrival.
    cut_counts: BTreeMap<(NodeId, NodeId), u64>,
    carried: Carried,
}

struct Shared {
    state: Mutex<State>,
    changed: watch::Sender<()>,
}

/// A network in memory. Dropping it disconnects everybody.
pub struct Network {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Network({} nodes)", self.shared.state.lock().nodes.len())
    }
}

impl Network {
    /// A perfect network whose faults, once there are any, come from `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self::with_capacity(seed, QUEUE_CAPACITY)
    }

    /// A network whose links queue only `capacity` envelopes.
    #[must_use]
    pub fn with_capacity(seed: u64, capacity: usize) -> Self {
        let state = State {
            seed,
            capacity: capacity.max(1),
            largest: usize::MAX,
            faults: Faults::NONE,
            nodes: BTreeMap::new(),
            links: BTreeMap::new(),
            link_faults: BTreeMap::new(),
            cuts: BTreeSet::new(),
            closed: BTreeSet::new(),
            cut_counts: BTreeMap::new(),
            carried: Carried::default(),
        };
        let (changed, _) = watch::channel(());
        Self { shared: Arc::new(Shared { state: Mutex::new(state), changed }) }
    }

    /// Makes a node known to the others, and the others to it.
    pub fn join(&self, center: &MessageCenter) {
        self.shared.state.lock().nodes.insert(center.node().clone(), center.clone());
        center.connect(Arc::new(Endpoint {
            from: center.node().clone(),
            network: Arc::downgrade(&self.shared),
        }));
    }

    /// Forgets a node, as when it left the list of nodes: what is queued for it is dropped.
    pub fn leave(&self, node: &NodeId) {
        let mut state = self.shared.state.lock();
        state.nodes.remove(node);
        let gone: Vec<_> =
            state.links.keys().filter(|key| key.0 == *node || key.1 == *node).cloned().collect();
        for key in gone {
            state.links.remove(&key);
        }
    }

    /// Makes every link refuse envelopes whose payload has more bytes, as a real one does beyond its limit.
    pub fn set_largest(&self, bytes: usize) {
        self.shared.state.lock().largest = bytes;
    }

    /// Faults of every link that has none of its own.
    pub fn set_faults(&self, faults: Faults) {
        self.shared.state.lock().faults = faults;
    }

    /// Faults of what `from` sends to `to`.
    pub fn set_link_faults(&self, from: &NodeId, to: &NodeId, faults: Faults) {
        self.shared.state.lock().link_faults.insert((from.clone(), to.clone()), faults);
    }

    /// Breaks the streams between two nodes, both ways. What travels is lost, what is queued waits.
    pub fn partition(&self, one: &NodeId, other: &NodeId) {
        let mut state = self.shared.state.lock();
        for pair in [(one.clone(), other.clone()), (other.clone(), one.clone())] {
            *state.cut_counts.entry(pair.clone()).or_default() += 1;
            state.cuts.insert(pair);
        }
        drop(state);
        self.shared.changed.send_replace(());
    }

    /// Breaks the streams between a node and all others.
    pub fn isolate(&self, node: &NodeId) {
        let others: Vec<_> =
            self.shared.state.lock().nodes.keys().filter(|other| *other != node).cloned().collect();
        for other in others {
            self.partition(node, &other);
        }
    }

    /// Makes `from` find no connection to `to`, as before its streams are opened: sending fails at once.
    pub fn close(&self, from: &NodeId, to: &NodeId) {
        self.shared.state.lock().closed.insert((from.clone(), to.clone()));
    }

    /// Connects two nodes again.
    pub fn heal(&self, one: &NodeId, other: &NodeId) {
        let mut state = self.shared.state.lock();
        for pair in [(one.clone(), other.clone()), (other.clone(), one.clone())] {
            state.cuts.remove(&pair);
            state.closed.remove(&pair);
        }
        drop(state);
        self.shared.changed.send_replace(());
    }

    /// Connects everybody again and removes all faults.
    pub fn heal_all(&self) {
        let mut state = self.shared.state.lock();
        state.cuts.clear();
        state.closed.clear();
        state.link_faults.clear();
        state.faults = Faults::NONE;
        drop(state);
        self.shared.changed.send_replace(());
    }

    /// What happened so far.
    #[must_use]
    pub fn carried(&self) -> Carried {
        self.shared.state.lock().carried
    }
}

/// A node's plug.
struct Endpoint {
    from: NodeId,
    network: Weak<Shared>,
}

impl Transport for Endpoint {
    fn send(&self, to: &NodeId, class: StreamClass, envelope: Envelope) -> Result<(), SendError> {
        let unknown = || SendError::new(SendErrorKind::TargetNotFound, format!("node {to} is not known"));
        let network = self.network.upgrade().ok_or_else(unknown)?;
        let mut state = network.state.lock();
        if !state.nodes.contains_key(to) || !state.nodes.contains_key(&self.from) {
            return Err(unknown());
        }
        if state.closed.contains(&(self.from.clone(), to.clone())) {
            return Err(SendError::new(
                SendErrorKind::ConnectionNotFound,
                format!("{} stream to {to} is not open", class.as_str()),
            ));
        }
        let bytes: usize = envelope.payload.iter().map(bytes::Bytes::len).sum();
        if bytes > state.largest {
            let reason = format!("a message of {bytes} bytes for {to} is larger than a peer takes");
            return Err(SendError::new(SendErrorKind::InvalidMessage, reason));
        }
        let key = (self.from.clone(), to.clone(), class);
        if !state.links.contains_key(&key) {
            let link = open(&network, &state, key.clone());
            state.links.insert(key.clone(), link);
        }
        let queue = state.links.get(&key).map(|link| link.queue.clone()).ok_or_else(unknown)?;
        drop(state);
        queue.try_send(envelope).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => SendError::new(
                SendErrorKind::MessageCongested,
                format!("{} stream to {to} is full", class.as_str()),
            ),
            mpsc::error::TrySendError::Closed(_) => unknown(),
        })
    }
}

fn open(network: &Arc<Shared>, state: &State, key: LinkKey) -> Link {
    let (queue, envelopes) = mpsc::channel(state.capacity);
    let pump = Pump {
        random: StdRng::seed_from_u64(seed_of(state.seed, &key)),
        key,
        network: Arc::downgrade(network),
        changed: network.changed.subscribe(),
        envelopes,
    };
    Link { queue, _pump: AbortOnDropHandle::new(tokio::spawn(pump.run())) }
}

/// FNV-1a over the link's name, so that a link's faults depend on the seed and the names alone.
fn seed_of(seed: u64, (from, to, class): &LinkKey) -> u64 {
    let name = format!("{from}>{to}>{}", class.as_str());
    name.bytes().fold(seed ^ 0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// Carries the envelopes of one link.
struct Pump {
    key: LinkKey,
    network: Weak<Shared>,
    changed: watch::Receiver<()>,
    envelopes: mpsc::Receiver<Envelope>,
    random: StdRng,
}

impl Pump {
    async fn run(mut self) {
        loop {
            if self.connected().await.is_none() {
                return;
            }
            let Some(envelope) = self.envelopes.recv().await else { return };
            // A cut while nothing was queued: this envelope was not travelling yet, so it waits.
            if self.connected().await.is_none() || self.carry(envelope).await.is_none() {
                return;
            }
        }
    }

    /// Waits until the link is not cut. `None` when the network is gone.
    async fn connected(&mut self) -> Option<()> {
        loop {
            self.changed.borrow_and_update();
            let cut = {
                let network = self.network.upgrade()?;
                let state = network.state.lock();
                state.cuts.contains(&(self.key.0.clone(), self.key.1.clone()))
            };
            if !cut {
                return Some(());
            }
            self.changed.changed().await.ok()?;
        }
    }

    async fn carry(&mut self, envelope: Envelope) -> Option<()> {
        let (from, to, class) = self.key.clone();
        let pair = (from.clone(), to.clone());
        let (faults, cuts_before) = {
            let network = self.network.upgrade()?;
            let state = network.state.lock();
            let faults = state.link_faults.get(&pair).unwrap_or(&state.faults).clone();
            (faults, state.cut_counts.get(&pair).copied())
        };
        // Always the same number of draws per envelope, so that one fault does not shift the next.
        let (lost, twice, speed) =
            (self.random.random::<f64>(), self.random.random::<f64>(), self.random.random::<f64>());
        let delay = faults.delay.start + faults.delay.end.saturating_sub(faults.delay.start).mul_f64(speed);
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        let receiver = {
            let network = self.network.upgrade()?;
            let mut state = network.state.lock();
            let broken = state.cut_counts.get(&pair).copied() != cuts_before;
            let receiver = state.nodes.get(&to).cloned();
            if lost < faults.loss || broken || receiver.is_none() {
                state.carried.lost += 1;
                return Some(());
            }
            receiver?
        };
        let copies = if twice < faults.duplication { 2 } else { 1 };
        for copy in 0..copies {
            // Nothing of the network is held meanwhile: dropping it must end this task, even in front of a
            // receiver that is full for ever.
            receiver.receive(class, &from, &envelope).await;
            let network = self.network.upgrade()?;
            let mut state = network.state.lock();
            state.carried.delivered += 1;
            state.carried.duplicated += u64::from(copy == 1);
        }
        Some(())
    }
}
