//! A node's end of the bus: registration, local delivery, remote sending.

use std::sync::Arc;

use heartbeatpb::NodeId;
use heartbeatpb::wire::proto::Message as Envelope;
use parking_lot::RwLock;

use crate::codec::{self, io_type};
use crate::metrics::{BusMetrics, Drop};
use crate::order::{Arrivals, Departures};
use crate::router::{Outcome, Refused, Router};
use crate::{Inbound, Inbox, SendError, SendErrorKind, StreamClass, Topic, Transport};

/// How a center treats messages to its own node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MessagingConfig {
    /// Commands to the own node pass through the codec, so that one node behaves like many.
    pub encode_local_commands: bool,
}

impl Default for MessagingConfig {
    fn default() -> Self {
        Self { encode_local_commands: true }
    }
}

struct Shared {
    node: NodeId,
    config: MessagingConfig,
    router: Router,
    transport: RwLock<Option<Arc<dyn Transport>>>,
    metrics: BusMetrics,
    departures: Departures,
    arrivals: Arrivals,
}

/// A node's end of the bus. Cheap to clone; all clones are one center.
#[derive(Clone)]
pub struct MessageCenter {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for MessageCenter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MessageCenter({})", self.shared.node)
    }
}

impl MessageCenter {
    /// The center of `node`, without a network.
    #[must_use]
    pub fn new(node: NodeId, config: MessagingConfig) -> Self {
        let shared = Shared {
            node,
            config,
            router: Router::default(),
            transport: RwLock::default(),
            metrics: BusMetrics::new(),
            departures: Departures::default(),
            arrivals: Arrivals::default(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Plugs a network in, replacing the one before.
    pub fn connect(&self, transport: Arc<dyn Transport>) {
        *self.shared.transport.write() = Some(transport);
    }

    /// The own node.
    #[must_use]
    pub fn node(&self) -> &NodeId {
        &self.shared.node
    }

    /// Receives a topic from now on, with room for `capacity` waiting messages; replaces the receiver before,
    /// which still gets what was queued for it.
    #[must_use]
    pub fn register<T: Topic>(&self, capacity: usize) -> Inbox<T> {
        let (registration, receiver) = self.shared.router.register::<T>(capacity);
        Inbox::new(self.clone(), registration, receiver)
    }

    pub(crate) fn deregister(&self, topic: &'static str, registration: u64) {
        self.shared.router.deregister(topic, registration);
    }

    /// Sends a message; never blocks. `Ok` means queued: it may still be lost.
    ///
    /// # Errors
    /// When the node is unknown or not connected, or a queue is full.
    pub fn send<T: Topic>(&self, to: &NodeId, message: T::Message) -> Result<(), SendError> {
        let result = self.send_inner::<T>(to, message);
        let metrics = &self.shared.metrics;
        match &result {
            Ok(()) => metrics.of(T::CLASS).sent.increment(1),
            Err(error) if error.kind == SendErrorKind::MessageCongested => {
                metrics.of(T::CLASS).congested.increment(1);
            }
            Err(_) => metrics.errors.increment(1),
        }
        result
    }

    fn send_inner<T: Topic>(&self, to: &NodeId, message: T::Message) -> Result<(), SendError> {
        let shared = &self.shared;
        if to.is_empty() {
            let reason = format!("no receiver given for {}", T::NAME);
            return Err(SendError::new(SendErrorKind::InvalidMessage, reason));
        }
        if *to != shared.node {
            let transport = shared.transport.read().as_ref().map(Arc::clone);
            let transport = transport.ok_or_else(|| {
                SendError::new(SendErrorKind::TargetNotFound, format!("node {to} is not known"))
            })?;
            let mut envelope = codec::envelope(&shared.node, to, T::NAME, &message);
            return match T::CLASS {
                // Events have numbers of their own.
                StreamClass::Event => transport.send(to, T::CLASS, envelope),
                StreamClass::Command => shared.departures.next(to, T::NAME, |sequence| {
                    envelope.sequence = sequence;
                    transport.send(to, T::CLASS, envelope)
                }),
            };
        }
        let through_codec = T::CLASS == StreamClass::Command && shared.config.encode_local_commands;
        let refused = if through_codec {
            let envelope = codec::envelope(&shared.node, to, T::NAME, &message);
            self.try_receive(T::CLASS, to, &envelope).err()
        } else {
            let from = shared.node.clone();
            match shared.router.hand_over::<T>(Inbound { from, message }) {
                Ok(()) => {
                    shared.metrics.of(T::CLASS).received.increment(1);
                    None
                }
                Err(Refused::NoReceiver) => {
                    self.drop_for_nobody(T::CLASS, T::NAME, 1);
                    None
                }
                Err(Refused::Full) => Some(full(T::NAME)),
            }
        };
        refused.map_or(Ok(()), Err)
    }

    /// Takes an envelope that came from `peer` and waits until its topic's queue has room, so that a slow
    /// receiver pushes back on the stream. To give up, drop the future. Whatever cannot be delivered is
    /// dropped and counted.
    pub async fn receive(&self, class: StreamClass, peer: &NodeId, envelope: &Envelope) {
        if !self.is_addressed(class, peer, envelope) {
            return;
        }
        let Some(queue) = self.shared.router.queue(&envelope.topic) else {
            return self.drop_for_nobody(class, &envelope.topic, envelope.payload.len());
        };
        if self.is_late(class, peer, envelope) {
            return;
        }
        // The first try needs no allocation and is what nearly always happens.
        let outcome = match queue.offer(peer, envelope) {
            Err(Refused::Full) => queue.push(peer, envelope).await,
            done => done,
        };
        self.shared.arrivals.arrived(peer, envelope);
        self.account(class, envelope, outcome);
    }

    /// Like [`Self::receive`], but refuses when there is no room; then nothing of the envelope was taken.
    ///
    /// # Errors
    /// When the topic's queue is full.
    pub fn try_receive(
        &self,
        class: StreamClass,
        peer: &NodeId,
        envelope: &Envelope,
    ) -> Result<(), SendError> {
        if !self.is_addressed(class, peer, envelope) {
            return Ok(());
        }
        let Some(queue) = self.shared.router.queue(&envelope.topic) else {
            self.drop_for_nobody(class, &envelope.topic, envelope.payload.len());
            return Ok(());
        };
        if self.is_late(class, peer, envelope) {
            return Ok(());
        }
        let outcome = queue.offer(peer, envelope);
        if outcome == Err(Refused::Full) {
            return Err(full(&envelope.topic));
        }
        self.shared.arrivals.arrived(peer, envelope);
        self.account(class, envelope, outcome);
        Ok(())
    }

    /// Whether an envelope says the truth about who sent it, and is for this node.
    fn is_addressed(&self, class: StreamClass, peer: &NodeId, envelope: &Envelope) -> bool {
        let fine = envelope.from == peer.as_str() && envelope.to == self.shared.node.as_str();
        if !fine {
            self.shared.metrics.of(class).dropped(Drop::Misaddressed, envelope.payload.len());
            tracing::warn!(%peer, from = envelope.from, to = envelope.to, "dropped a message with a wrong address");
        }
        fine
    }

    /// Whether an envelope came again, or was overtaken by a later one of its sender and topic.
    fn is_late(&self, class: StreamClass, peer: &NodeId, envelope: &Envelope) -> bool {
        let late = self.shared.arrivals.is_late(peer, envelope) && heartbeatpb::Rule::CommandOrder.holds();
        if late {
            self.shared.metrics.of(class).dropped(Drop::Late, envelope.payload.len());
            tracing::debug!(%peer, topic = envelope.topic, "dropped a command that was overtaken or came again");
        }
        late
    }

    fn drop_for_nobody(&self, class: StreamClass, topic: &str, count: usize) {
        self.shared.metrics.of(class).dropped(Drop::NoReceiver, count);
        tracing::debug!(topic, count, "nobody receives this topic");
    }

    fn account(&self, class: StreamClass, envelope: &Envelope, outcome: Result<Outcome, Refused>) {
        let metrics = self.shared.metrics.of(class);
        let Ok(outcome) = outcome else {
            return self.drop_for_nobody(class, &envelope.topic, envelope.payload.len());
        };
        metrics.received.increment(outcome.delivered as u64);
        metrics.dropped(Drop::Unknown, outcome.unknown);
        metrics.dropped(Drop::Unreadable, outcome.unreadable);
        if outcome.unreadable + outcome.unknown > 0 {
            tracing::warn!(
                topic = envelope.topic,
                r#type = io_type::name(envelope.r#type),
                number = envelope.r#type,
                from = envelope.from,
                unknown = outcome.unknown,
                unreadable = outcome.unreadable,
                "dropped messages that this node does not understand"
            );
        }
    }

    /// Sets the gauges; for a task that does so every ten seconds.
    pub fn observe(&self) {
        let (events, commands) = self.shared.router.waiting();
        #[expect(clippy::cast_precision_loss, reason = "queue lengths are small")]
        {
            self.shared.metrics.of(StreamClass::Event).waiting.set(events as f64);
            self.shared.metrics.of(StreamClass::Command).waiting.set(commands as f64);
        }
    }
}

fn full(topic: &str) -> SendError {
    SendError::new(SendErrorKind::MessageCongested, format!("queue of {topic} is full"))
}
