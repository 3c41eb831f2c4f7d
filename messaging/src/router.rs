//! From a topic's name to its queue: one bounded queue per topic, so a slow one stalls nobody else.

use std::any::Any;
use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use heartbeatpb::NodeId;
use heartbeatpb::wire::proto::Message as Envelope;
use parking_lot::RwLock;
use tokio::sync::mpsc;

use crate::codec::{self, Opened};
use crate::{Inbound, StreamClass, Topic};

/// What happened to an envelope that reached its topic's queue.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct Outcome {
    pub(crate) delivered: usize,
    pub(crate) unknown: usize,
    pub(crate) unreadable: usize,
}

/// Why an envelope or a message did not reach a queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Refused {
    /// The queue has no room.
    Full,
    /// Nobody receives the topic, or the receiver went away.
    NoReceiver,
}

pub(crate) type Waiting<'a> = Pin<Box<dyn Future<Output = Result<Outcome, Refused>> + Send + 'a>>;

/// A topic's queue without its type.
pub(crate) trait Queue: Any + Send + Sync {
    /// Queues all messages of an envelope, or none.
    fn offer(&self, from: &NodeId, envelope: &Envelope) -> Result<Outcome, Refused>;
    /// Queues all messages of an envelope as room comes up.
    fn push<'a>(&'a self, from: &'a NodeId, envelope: &'a Envelope) -> Waiting<'a>;
    /// Waiting messages.
    fn len(&self) -> usize;
    /// Stream of the topic.
    fn class(&self) -> StreamClass;
}

/// The queue of one topic.
pub(crate) struct TopicQueue<T: Topic> {
    sender: mpsc::Sender<Inbound<T::Message>>,
}

impl<T: Topic> TopicQueue<T> {
    /// Queues a message of the own node without encoding it.
    pub(crate) fn hand_over(&self, inbound: Inbound<T::Message>) -> Result<(), Refused> {
        self.sender.try_send(inbound).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => Refused::Full,
            mpsc::error::TrySendError::Closed(_) => Refused::NoReceiver,
        })
    }
}

fn outcome<M>(opened: &Opened<M>) -> Outcome {
    Outcome { delivered: opened.messages.len(), unknown: opened.unknown, unreadable: opened.unreadable }
}

impl<T: Topic> Queue for TopicQueue<T> {
    fn offer(&self, from: &NodeId, envelope: &Envelope) -> Result<Outcome, Refused> {
        // Room first: a refused envelope is offered again as a whole, so none of it may be queued, and a
        // full queue should not cost a decoding.
        let room = self.sender.try_reserve_many(envelope.payload.len()).map_err(|error| match error {
            mpsc::error::TrySendError::Full(()) => Refused::Full,
            mpsc::error::TrySendError::Closed(()) => Refused::NoReceiver,
        })?;
        let opened = codec::open::<T::Message>(envelope);
        let outcome = outcome(&opened);
        for (permit, message) in room.zip(opened.messages) {
            permit.send(Inbound { from: from.clone(), message });
        }
        Ok(outcome)
    }

    fn push<'a>(&'a self, from: &'a NodeId, envelope: &'a Envelope) -> Waiting<'a> {
        Box::pin(async move {
            let opened = codec::open::<T::Message>(envelope);
            let outcome = outcome(&opened);
            for message in opened.messages {
                let inbound = Inbound { from: from.clone(), message };
                self.sender.send(inbound).await.map_err(|_| Refused::NoReceiver)?;
            }
            Ok(outcome)
        })
    }

    fn len(&self) -> usize {
        self.sender.max_capacity() - self.sender.capacity()
    }

    fn class(&self) -> StreamClass {
        T::CLASS
    }
}

struct Entry {
    registration: u64,
    queue: Arc<dyn Queue>,
}

/// Every registered topic.
#[derive(Default)]
pub(crate) struct Router {
    topics: RwLock<HashMap<&'static str, Entry>>,
    registrations: AtomicU64,
}

impl Router {
    /// Replaces the queue of a topic. The number identifies this registration.
    pub(crate) fn register<T: Topic>(&self, capacity: usize) -> (u64, mpsc::Receiver<Inbound<T::Message>>) {
        let (sender, receiver) = mpsc::channel(capacity.max(1));
        let registration = self.registrations.fetch_add(1, Ordering::Relaxed);
        let queue = Arc::new(TopicQueue::<T> { sender });
        self.topics.write().insert(T::NAME, Entry { registration, queue });
        (registration, receiver)
    }

    /// Removes a registration, unless another one took the topic over.
    pub(crate) fn deregister(&self, topic: &'static str, registration: u64) {
        let mut topics = self.topics.write();
        if topics.get(topic).is_some_and(|entry| entry.registration == registration) {
            topics.remove(topic);
        }
    }

    /// The queue of a topic.
    pub(crate) fn queue(&self, topic: &str) -> Option<Arc<dyn Queue>> {
        self.topics.read().get(topic).map(|entry| Arc::clone(&entry.queue))
    }

    /// Queues a message of the own node without encoding it.
    pub(crate) fn hand_over<T: Topic>(&self, inbound: Inbound<T::Message>) -> Result<(), Refused> {
        let topics = self.topics.read();
        let queue: Option<&dyn Any> = topics.get(T::NAME).map(|entry| &*entry.queue as &dyn Any);
        // Two topics of one name and different types would be a mistake; the message is then nobody's.
        let queue = queue.and_then(|queue| queue.downcast_ref::<TopicQueue<T>>());
        queue.ok_or(Refused::NoReceiver)?.hand_over(inbound)
    }

    /// Waiting messages per stream class: events, commands.
    pub(crate) fn waiting(&self) -> (usize, usize) {
        let topics = self.topics.read();
        topics.values().fold((0, 0), |(events, commands), entry| match entry.queue.class() {
            StreamClass::Event => (events + entry.queue.len(), commands),
            StreamClass::Command => (events, commands + entry.queue.len()),
        })
    }
}
