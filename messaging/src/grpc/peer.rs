//! One other node: its address, its two streams, and the task that keeps them up.

use std::sync::Arc;

use heartbeatpb::NodeId;
use tokio::sync::broadcast;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::address::Address;
use super::link::{Link, Lost};
use super::stream::Attached;
use crate::StreamClass;
use crate::metrics::TransportMetrics;

/// What happened to the streams of a peer. Messages of a session that ended may have been lost on their way.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum PeerEvent {
    /// A stream works. Whoever waits for an answer should ask again when `session` is not the first.
    Opened {
        /// The peer.
        node: NodeId,
        /// What the stream carries.
        class: StreamClass,
        /// How many streams of this class to this peer have worked so far, this one included.
        session: u64,
    },
    /// A stream broke. What is queued waits for the next one.
    Broke {
        /// The peer.
        node: NodeId,
        /// What the stream carried.
        class: StreamClass,
    },
    /// What was queued for a peer was dropped: the peer left, or was away for long.
    Dropped {
        /// The peer.
        node: NodeId,
        /// What the stream would have carried.
        class: StreamClass,
        /// How much.
        lost: Lost,
    },
}

/// State of one stream to a peer.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct StreamReport {
    /// Whether it works.
    pub ready: bool,
    /// How many streams have worked so far.
    pub sessions: u64,
    /// Messages that wait.
    pub waiting: usize,
    /// Their size.
    pub waiting_bytes: usize,
}

/// State of a peer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PeerReport {
    /// The peer.
    pub node: NodeId,
    /// Where it listens.
    pub address: String,
    /// Whether this node opens the streams.
    pub dials: bool,
    /// Row events.
    pub event: StreamReport,
    /// Control.
    pub command: StreamReport,
}

/// Both streams of a peer. They outlive a change of its address.
#[derive(Clone)]
pub(crate) struct Links {
    event: Arc<Link>,
    command: Arc<Link>,
}

impl Links {
    pub(crate) fn new(peer: &NodeId) -> Self {
        Self {
            event: Arc::new(Link::new(peer.clone(), StreamClass::Event)),
            command: Arc::new(Link::new(peer.clone(), StreamClass::Command)),
        }
    }

    pub(crate) fn of(&self, class: StreamClass) -> &Arc<Link> {
        match class {
            StreamClass::Event => &self.event,
            StreamClass::Command => &self.command,
        }
    }

    pub(crate) fn both(&self) -> [&Arc<Link>; 2] {
        [&self.event, &self.command]
    }
}

/// One other node at one address.
pub(crate) struct Peer {
    pub(crate) id: NodeId,
    pub(crate) address: Address,
    /// Whether this node opens the streams.
    pub(crate) dials: bool,
    pub(crate) links: Links,
    /// Cancelled when the node left, or is somewhere else now.
    pub(crate) gone: CancellationToken,
    pub(crate) events: broadcast::Sender<PeerEvent>,
    pub(crate) metrics: TransportMetrics,
}

impl Peer {
    /// A stream works.
    pub(crate) fn opened(&self, class: StreamClass, session: u64) {
        tracing::info!(peer = %self.id, address = self.address.as_str(), stream = class.as_str(), session, "a stream to a peer is open");
        self.metrics.opened();
        self.tell(PeerEvent::Opened { node: self.id.clone(), class, session });
    }

    /// A stream that worked does not any more.
    pub(crate) fn broke(&self, class: StreamClass) {
        self.metrics.closed();
        self.tell(PeerEvent::Broke { node: self.id.clone(), class });
    }

    /// What was queued is dropped.
    pub(crate) fn lost(&self, class: StreamClass, lost: Lost, why: &'static str) {
        if lost.envelopes == 0 {
            return;
        }
        tracing::warn!(peer = %self.id, stream = class.as_str(), messages = lost.envelopes, bytes = lost.bytes, why, "messages for a peer are dropped");
        self.metrics.dropped(class, lost.envelopes);
        self.tell(PeerEvent::Dropped { node: self.id.clone(), class, lost });
    }

    fn tell(&self, event: PeerEvent) {
        // Nobody may be listening.
        let _ = self.events.send(event);
    }

    /// The node left: its streams end and what waits for it is dropped.
    pub(crate) fn remove(&self) {
        self.gone.cancel();
        for link in self.links.both() {
            let (lost, was_up) = link.close();
            if was_up {
                self.broke(link.class());
            }
            self.lost(link.class(), lost, "it left");
        }
    }

    /// The node is at another address now: its streams end, what waits for it stays.
    pub(crate) fn leave_address(&self) {
        self.gone.cancel();
        for link in self.links.both() {
            if link.interrupt() {
                self.broke(link.class());
            }
        }
    }

    /// A new stream's hold of a queue; the stream before ends. `None` when the node has left.
    pub(crate) fn attach(self: &Arc<Self>, class: StreamClass) -> Option<Attached> {
        let link = self.links.of(class);
        let (session, was_up) = link.attach()?;
        if was_up {
            self.broke(class);
        }
        Some(Attached { peer: Arc::clone(self), link: Arc::clone(link), session })
    }

    /// Drops what waits for streams that have been broken for long.
    pub(crate) fn forget_stale(&self) {
        for link in self.links.both() {
            if let Some(lost) = link.forget_stale(Instant::now()) {
                self.lost(link.class(), lost, "it was away for long");
            }
        }
    }

    pub(crate) fn report(&self) -> PeerReport {
        let stream = |class| {
            let (ready, sessions, waiting, waiting_bytes) = self.links.of(class).look();
            StreamReport { ready, sessions, waiting, waiting_bytes }
        };
        PeerReport {
            node: self.id.clone(),
            address: self.address.as_str().to_owned(),
            dials: self.dials,
            event: stream(StreamClass::Event),
            command: stream(StreamClass::Command),
        }
    }
}
