//! A node's end of the bus: registration, local delivery, remote sending.

use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use heartbeatpb::NodeId;
use heartbeatpb::wire::proto::Message as Envelope;
use parking_lot::RwLock;
use tokio::sync::mpsc;

use crate::codec;
use crate::metrics::BusMetrics;
use crate::{SendError, SendErrorKind, StreamClass, Topic, Transport};

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

/// A message with its sender.
#[derive(Clone, PartialEq, Debug)]
pub struct Inbound<M> {
    /// Node that sent it.
    pub from: NodeId,
    /// The message.
    pub message: M,
}

/// A registered receiver of one topic. Dropping it deregisters.
pub struct Inbox<T: Topic> {
    receiver: mpsc::Receiver<Inbound<T::Message>>,
    registration: u64,
    center: MessageCenter,
    topic: PhantomData<fn() -> T>,
}

impl<T: Topic> std::fmt::Debug for Inbox<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Inbox({})", T::NAME)
    }
}

impl<T: Topic> Inbox<T> {
    /// The next message; `None` after another receiver took the topic over.
    pub async fn recv(&mut self) -> Option<Inbound<T::Message>> {
        self.receiver.recv().await
    }

    /// A message that is already there.
    pub fn try_recv(&mut self) -> Option<Inbound<T::Message>> {
        self.receiver.try_recv().ok()
    }
}

impl<T: Topic> Drop for Inbox<T> {
    fn drop(&mut self) {
        self.center.deregister(T::NAME, self.registration);
    }
}

/// Opens an envelope for a topic's queue; says how many elements were unreadable.
type Deliver = dyn Fn(&Envelope) -> Result<usize, SendError> + Send + Sync;

struct Handler {
    registration: u64,
    message_type: TypeId,
    /// The typed `mpsc::Sender<Inbound<M>>`.
    sender: Box<dyn Any + Send + Sync>,
    deliver: Arc<Deliver>,
}

struct Shared {
    node: NodeId,
    config: MessagingConfig,
    handlers: RwLock<HashMap<&'static str, Handler>>,
    transport: RwLock<Option<Arc<dyn Transport>>>,
    next_registration: AtomicU64,
    metrics: BusMetrics,
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
            handlers: RwLock::default(),
            transport: RwLock::default(),
            next_registration: AtomicU64::new(1),
            metrics: BusMetrics::new(),
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

    /// Receives a topic from now on, with room for `capacity` waiting messages; replaces the receiver before.
    #[must_use]
    pub fn register<T: Topic>(&self, capacity: usize) -> Inbox<T> {
        let (sender, receiver) = mpsc::channel::<Inbound<T::Message>>(capacity);
        let registration = self.shared.next_registration.fetch_add(1, Ordering::Relaxed);
        let queue = sender.clone();
        let deliver: Arc<Deliver> = Arc::new(move |envelope| {
            let (messages, unreadable) = codec::open::<T::Message>(envelope);
            for message in messages {
                let from = NodeId::from(envelope.from.as_str());
                enqueue::<T>(&queue, Inbound { from, message })?;
            }
            Ok(unreadable)
        });
        let handler = Handler {
            registration,
            message_type: TypeId::of::<T::Message>(),
            sender: Box::new(sender),
            deliver,
        };
        self.shared.handlers.write().insert(T::NAME, handler);
        Inbox { receiver, registration, center: self.clone(), topic: PhantomData }
    }

    fn deregister(&self, topic: &'static str, registration: u64) {
        let mut handlers = self.shared.handlers.write();
        if handlers.get(topic).is_some_and(|handler| handler.registration == registration) {
            handlers.remove(topic);
        }
    }

    /// Sends a message; never blocks. `Ok` means queued: it may still be lost.
    ///
    /// # Errors
    /// When the node is unknown or not connected, or a queue is full.
    pub fn send<T: Topic>(&self, to: &NodeId, message: T::Message) -> Result<(), SendError> {
        let result = self.send_inner::<T>(to, message);
        if let Err(error) = &result {
            match error.kind {
                SendErrorKind::MessageCongested => self.shared.metrics.congested.increment(1),
                SendErrorKind::ConnectionNotFound
                | SendErrorKind::TargetNotFound
                | SendErrorKind::InvalidMessage => {
                    self.shared.metrics.no_target.increment(1);
                }
            }
        }
        result
    }

    fn send_inner<T: Topic>(&self, to: &NodeId, message: T::Message) -> Result<(), SendError> {
        if to.is_empty() {
            return Err(SendError::new(
                SendErrorKind::InvalidMessage,
                format!("no receiver given for {}", T::NAME),
            ));
        }
        if *to != self.shared.node {
            let transport = self.shared.transport.read().as_ref().map(Arc::clone);
            let transport = transport.ok_or_else(|| {
                SendError::new(SendErrorKind::TargetNotFound, format!("node {to} is not known"))
            })?;
            return transport.send(to, T::CLASS, codec::envelope(&self.shared.node, to, T::NAME, &message));
        }
        let through_codec = T::CLASS == StreamClass::Command && self.shared.config.encode_local_commands;
        if through_codec {
            self.receive(&codec::envelope(&self.shared.node, to, T::NAME, &message))
        } else {
            self.deliver_by_reference::<T>(message)
        }
    }

    fn deliver_by_reference<T: Topic>(&self, message: T::Message) -> Result<(), SendError> {
        let handlers = self.shared.handlers.read();
        let sender = handlers
            .get(T::NAME)
            .filter(|handler| handler.message_type == TypeId::of::<T::Message>())
            .and_then(|handler| handler.sender.downcast_ref::<mpsc::Sender<Inbound<T::Message>>>());
        match sender {
            Some(sender) => enqueue::<T>(sender, Inbound { from: self.shared.node.clone(), message }),
            None => {
                self.shared.metrics.no_receiver.increment(1);
                Ok(())
            }
        }
    }

    /// Takes an envelope from a peer (or from this node) and queues its messages for the topic's receiver.
    /// A topic without a receiver drops it.
    ///
    /// # Errors
    /// When the receiver's queue is full: the caller may push back on the peer.
    pub fn receive(&self, envelope: &Envelope) -> Result<(), SendError> {
        let deliver = {
            let handlers = self.shared.handlers.read();
            handlers.get(envelope.topic.as_str()).map(|handler| Arc::clone(&handler.deliver))
        };
        let Some(deliver) = deliver else {
            self.shared.metrics.no_receiver.increment(1);
            tracing::debug!(topic = envelope.topic, r#type = envelope.r#type, "no receiver for message");
            return Ok(());
        };
        let unreadable = deliver(envelope)?;
        if unreadable > 0 {
            self.shared.metrics.unreadable.increment(unreadable as u64);
            tracing::warn!(
                topic = envelope.topic,
                r#type = envelope.r#type,
                from = envelope.from,
                count = unreadable,
                "dropped unreadable messages"
            );
        }
        Ok(())
    }
}

fn enqueue<T: Topic>(
    queue: &mpsc::Sender<Inbound<T::Message>>,
    inbound: Inbound<T::Message>,
) -> Result<(), SendError> {
    queue.try_send(inbound).map_err(|error| match error {
        mpsc::error::TrySendError::Full(_) => {
            SendError::new(SendErrorKind::MessageCongested, format!("queue of {} is full", T::NAME))
        }
        mpsc::error::TrySendError::Closed(_) => {
            SendError::new(SendErrorKind::ConnectionNotFound, format!("receiver of {} is gone", T::NAME))
        }
    })
}
