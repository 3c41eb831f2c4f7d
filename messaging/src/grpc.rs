//! The bus over gRPC: nodes that are processes of their own (messaging §4–§8).
//!
//! ```text
//!   list of nodes (watch)
//!        |                                                    other node
//!        v                                             .----------------------.
//!   run: one task per peer, which dials when its       |  MessageService      |
//!        own address is the smaller one                |  checks the handshake|
//!        |                                             |  attaches the stream |
//!        |  handshake, then what is queued             |                      |
//!   send -> queue per (peer, class) ==== stream ======>|  MessageCenter       |
//!           16384 messages, 64 MiB   <=== "event" =====|   ::receive          |
//!                                    <== "command" ====|                      |
//!                                                      '----------------------'
//! ```
//!
//! Both nodes send on the same two streams, whoever opened them. A full receiver stops reading its stream, HTTP/2
//! stops the sender's, its queue fills, and [`Transport::send`] says that it is congested.
//!
//! - **GR-1** A queue belongs to a peer, not to a stream: what waits leaves in order over the next stream. What was
//!   handed to a stream that broke may be lost; nothing leaves twice.
//! - **GR-2** Only the newest stream of a class takes from the queue, and only one hands over what arrives.
//! - **GR-3** Nothing that a peer sends is believed before its handshake was checked; later frames must come from
//!   the same node.
//! - **GR-4** What waits for a peer is bounded in number and bytes, and is dropped when the peer leaves or has been
//!   away for 30 s. Who dropped it is told: in the log, a metric, and [`GrpcTransport::events`].
//!
//! How soon a dead peer is noticed: see [`tcp`]; a machine or cable that is gone within 11 s, a process that hangs
//! within 50 s ([`PING_EVERY`] + [`PING_TIMEOUT`]). The list of nodes is normally faster.

mod address;
mod backoff;
mod dial;
mod handshake;
mod http2;
mod link;
mod peer;
mod serve;
mod service;
mod stream;
pub mod tcp;
pub mod tls;

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use heartbeatpb::NodeId;
use heartbeatpb::wire::proto::Message as Envelope;
use tokio::sync::{Semaphore, broadcast, watch};
use tokio::task::{Id, JoinSet};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::address::Address;
use self::peer::{Links, Peer};
use self::tls::PeerTls;
use crate::metrics::TransportMetrics;
use crate::{MessageCenter, SendError, SendErrorKind, StreamClass, Transport};

pub use http2::{CONNECTION_WINDOW, PING_EVERY, PING_TIMEOUT, STREAM_WINDOW};
pub use link::Lost;
pub use peer::{PeerEvent, PeerReport, StreamReport};
pub use serve::serve;
pub use service::MessageService;

/// Path of the one method.
pub const PATH: &str = "/proto.MessageService/streamMessages";
/// Largest message on the wire, in either direction.
pub const MAX_MESSAGE_BYTES: usize = 1 << 28;
/// Streams that may wait at one time to be accepted.
const GREETINGS: usize = 256;
/// Events of peers that a slow listener may be behind.
const EVENTS: usize = 1024;
/// How long what is queued may take to leave when the node stops.
const FLUSH: Duration = Duration::from_secs(1);

type Peers = Arc<HashMap<NodeId, Arc<Peer>>>;

pub(crate) struct Shared {
    center: MessageCenter,
    own: Address,
    tls: Option<PeerTls>,
    list: watch::Receiver<Arc<BTreeMap<NodeId, String>>>,
    /// Written by [`GrpcTransport::run`] alone.
    peers: watch::Sender<Peers>,
    events: broadcast::Sender<PeerEvent>,
    greetings: Semaphore,
    /// Receiving halves of accepted streams.
    streams: TaskTracker,
    stopped: CancellationToken,
}

/// A node's connections to the others. Cheap to clone; all clones are one transport.
///
/// It works while [`run`](Self::run) does, once [`handle`](Self::handle) is given to the center and
/// [`service`](Self::service) is served at the node's address.
#[derive(Clone)]
pub struct GrpcTransport {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for GrpcTransport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GrpcTransport({})", self.shared.center.node())
    }
}

impl GrpcTransport {
    /// The connections of `center`, which others reach at `own_address` (`host:port`, a scheme does not matter).
    /// `peers` lists the cluster with addresses; this node itself may be among them. With `tls` everything is spoken
    /// over TLS.
    #[must_use]
    pub fn new(
        center: MessageCenter,
        own_address: &str,
        tls: Option<PeerTls>,
        peers: watch::Receiver<Arc<BTreeMap<NodeId, String>>>,
    ) -> Self {
        let shared = Shared {
            center,
            own: Address::new(own_address),
            tls,
            list: peers,
            peers: watch::Sender::new(Arc::default()),
            events: broadcast::Sender::new(EVENTS),
            greetings: Semaphore::new(GREETINGS),
            streams: TaskTracker::new(),
            stopped: CancellationToken::new(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// What [`MessageCenter::connect`] takes. Does not keep the transport alive.
    #[must_use]
    pub fn handle(&self) -> Arc<dyn Transport> {
        Arc::new(Handle { peers: self.shared.peers.subscribe() })
    }

    /// The service to be served at the node's address, beside whatever else is.
    #[must_use]
    pub fn service(&self) -> MessageService {
        MessageService::new(Arc::clone(&self.shared))
    }

    /// What happens to the streams from now on. A listener that is slow misses events.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<PeerEvent> {
        self.shared.events.subscribe()
    }

    /// State of every peer, by id.
    #[must_use]
    pub fn report(&self) -> Vec<PeerReport> {
        let mut report: Vec<_> = self.shared.peers.borrow().values().map(|peer| peer.report()).collect();
        report.sort_by(|one, other| one.node.cmp(&other.node));
        report
    }

    /// Follows the list of nodes and keeps the connections until `stop`; then what is queued for connected peers has
    /// one second to leave.
    pub async fn run(self, stop: CancellationToken) {
        let mut list = self.shared.list.clone();
        let mut keeper = Keeper {
            shared: Arc::clone(&self.shared),
            tasks: JoinSet::new(),
            ids: HashMap::new(),
            arrivals: Arrivals::default(),
        };
        loop {
            let wanted = Arc::clone(&list.borrow_and_update());
            keeper.apply(&wanted);
            let changed = async {
                loop {
                    tokio::select! {
                        changed = list.changed() => match changed {
                            Ok(()) => return,
                            // Nobody will ever change it again.
                            Err(_) => std::future::pending().await,
                        },
                        Some(ended) = keeper.tasks.join_next_with_id() => keeper.ended(ended),
                    }
                }
            };
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                () = changed => {}
            }
        }
        keeper.finish().await;
    }
}

/// What senders hold.
struct Handle {
    peers: watch::Receiver<Peers>,
}

impl Transport for Handle {
    fn send(&self, to: &NodeId, class: StreamClass, envelope: Envelope) -> Result<(), SendError> {
        let peer = self.peers.borrow().get(to).map(Arc::clone);
        let peer = peer.ok_or_else(|| {
            SendError::new(SendErrorKind::TargetNotFound, format!("node {to} is not known"))
        })?;
        let bytes = link::wire_bytes(&envelope);
        if bytes > MAX_MESSAGE_BYTES {
            let reason = format!("a message of {bytes} bytes for {to} is larger than a peer takes");
            return Err(SendError::new(SendErrorKind::InvalidMessage, reason));
        }
        peer.links.of(class).push(envelope, bytes)
    }
}

/// The one writer of the set of peers, and the owner of their tasks.
struct Keeper {
    shared: Arc<Shared>,
    tasks: JoinSet<()>,
    ids: HashMap<Id, NodeId>,
    arrivals: Arrivals,
}

impl Keeper {
    /// Makes the peers what the list says. Never waits for a peer.
    fn apply(&mut self, list: &BTreeMap<NodeId, String>) {
        let before = Arc::clone(&self.shared.peers.borrow());
        let present = self.arrivals.present(list);
        let mut peers = HashMap::with_capacity(present.len());
        let mut started = Vec::new();
        for (id, address) in present {
            if id == *self.shared.center.node() {
                continue;
            }
            let known = before.get(&id);
            if let Some(same) = known.filter(|peer| peer.address == address) {
                peers.insert(id, Arc::clone(same));
                continue;
            }
            if let Some(elsewhere) = known {
                tracing::info!(peer = %id, address = address.as_str(), "a peer has a new address");
                elsewhere.leave_address();
            }
            let links = known.map_or_else(|| Links::new(&id), |peer| peer.links.clone());
            let peer = Arc::new(self.peer(&id, address, links));
            started.push(Arc::clone(&peer));
            peers.insert(id, peer);
        }
        let mut gone: Vec<_> = before.values().filter(|peer| !peers.contains_key(&peer.id)).collect();
        gone.sort_by(|one, other| one.id.cmp(&other.id));
        self.shared.peers.send_replace(Arc::new(peers));
        for peer in gone {
            tracing::info!(peer = %peer.id, "a peer has left");
            peer.remove();
        }
        for peer in started {
            self.start(peer);
        }
    }

    fn peer(&self, id: &NodeId, address: Address, links: Links) -> Peer {
        let shared = &self.shared;
        Peer {
            dials: address::dials((&shared.own, shared.center.node()), (&address, id)),
            id: id.clone(),
            address,
            links,
            gone: CancellationToken::new(),
            events: shared.events.clone(),
            metrics: TransportMetrics::new(id),
        }
    }

    fn start(&mut self, peer: Arc<Peer>) {
        let id = peer.id.clone();
        let task = self.tasks.spawn(dial::run(Arc::clone(&self.shared), peer));
        self.ids.insert(task.id(), id);
    }

    /// The task of a peer ended: as it should, because the peer is gone, or by a panic, and is started again.
    fn ended(&mut self, ended: Result<(Id, ()), tokio::task::JoinError>) {
        let id = match &ended {
            Ok((id, ())) => *id,
            Err(error) => error.id(),
        };
        let Some(node) = self.ids.remove(&id) else { return };
        if let Err(error) = ended {
            tracing::error!(peer = %node, %error, "the task of a peer ended abnormally and is started again");
            let peer = self.shared.peers.borrow().get(&node).map(Arc::clone);
            if let Some(peer) = peer.filter(|peer| !peer.gone.is_cancelled()) {
                self.start(peer);
            }
        }
    }

    /// Lets what is queued leave, then ends everything.
    async fn finish(mut self) {
        self.shared.stopped.cancel();
        let peers = Arc::clone(&self.shared.peers.borrow());
        let links = || peers.values().flat_map(|peer| peer.links.both());
        links().for_each(|link| link.finish());
        let flushed = async {
            while links().any(|link| link.look().2 > 0) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let _ = tokio::time::timeout(FLUSH, flushed).await;
        let mut peers: Vec<_> = peers.values().collect();
        peers.sort_by(|one, other| one.id.cmp(&other.id));
        peers.iter().for_each(|peer| peer.remove());
        self.tasks.shutdown().await;
        self.shared.streams.close();
        self.shared.streams.wait().await;
    }
}

/// When each node of the list was first seen at its address.
#[derive(Default)]
struct Arrivals {
    round: u64,
    seen: BTreeMap<NodeId, (Address, u64)>,
}

impl Arrivals {
    /// The nodes of a list that are there. A process that starts again has a new id at its old address, and its
    /// registration may still be in the list: whoever was at an address before is no more.
    fn present(&mut self, list: &BTreeMap<NodeId, String>) -> Vec<(NodeId, Address)> {
        self.round += 1;
        self.seen.retain(|id, _| list.contains_key(id));
        for (id, text) in list {
            let address = Address::new(text);
            if self.seen.get(id).is_none_or(|(known, _)| *known != address) {
                self.seen.insert(id.clone(), (address, self.round));
            }
        }
        let mut newest: BTreeMap<&str, u64> = BTreeMap::new();
        for (address, round) in self.seen.values() {
            let known = newest.entry(address.as_str()).or_default();
            *known = (*known).max(*round);
        }
        let is_newest = |address: &Address, round| newest.get(address.as_str()) == Some(&round);
        let present = self.seen.iter().filter(|(_, (address, round))| is_newest(address, *round));
        present.map(|(id, (address, _))| (id.clone(), address.clone())).collect()
    }
}

#[cfg(test)]
mod tests;
