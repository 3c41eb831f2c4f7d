//! The receiving end of a topic.

use std::marker::PhantomData;
use std::time::Duration;

use heartbeatpb::NodeId;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::codec::{WireMessage, io_type};
use crate::metrics;
use crate::{MessageCenter, Topic};

/// A handler that takes longer is counted: it should only enqueue.
pub const SLOW: Duration = Duration::from_millis(100);
/// A slow handler is logged at most once per this time, however many messages it gets.
const SLOW_LOG_PAUSE: Duration = Duration::from_secs(10);

/// A message with its sender.
#[derive(Clone, PartialEq, Debug)]
pub struct Inbound<M> {
    /// Node that sent it.
    pub from: NodeId,
    /// The message.
    pub message: M,
}

/// A registered receiver of one topic. Dropping it deregisters.
///
/// The time from one message to the next call of `recv` is the time that the message took to handle.
pub struct Inbox<T: Topic> {
    receiver: mpsc::Receiver<Inbound<T::Message>>,
    registration: u64,
    center: MessageCenter,
    handling: Option<(Instant, i32)>,
    logged: Option<Instant>,
    topic: PhantomData<fn() -> T>,
}

impl<T: Topic> std::fmt::Debug for Inbox<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Inbox({})", T::NAME)
    }
}

impl<T: Topic> Inbox<T> {
    pub(crate) fn new(
        center: MessageCenter,
        registration: u64,
        receiver: mpsc::Receiver<Inbound<T::Message>>,
    ) -> Self {
        Self { receiver, registration, center, handling: None, logged: None, topic: PhantomData }
    }

    /// The next message; `None` after another receiver took the topic over. Safe to use in `select!`.
    pub async fn recv(&mut self) -> Option<Inbound<T::Message>> {
        self.handled();
        let inbound = self.receiver.recv().await;
        self.taken(inbound.as_ref());
        inbound
    }

    /// A message that is already there.
    pub fn try_recv(&mut self) -> Option<Inbound<T::Message>> {
        self.handled();
        let inbound = self.receiver.try_recv().ok();
        self.taken(inbound.as_ref());
        inbound
    }

    /// Messages that wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.receiver.len()
    }

    fn taken(&mut self, inbound: Option<&Inbound<T::Message>>) {
        self.handling = inbound.map(|inbound| (Instant::now(), inbound.message.io_type()));
    }

    /// The message before is handled now.
    fn handled(&mut self) {
        let Some((since, number)) = self.handling.take() else { return };
        let took = since.elapsed();
        if took <= SLOW {
            return;
        }
        metrics::count_slow(io_type::name(number));
        if self.logged.is_none_or(|logged| logged.elapsed() >= SLOW_LOG_PAUSE) {
            self.logged = Some(Instant::now());
            tracing::warn!(
                topic = T::NAME,
                r#type = io_type::name(number),
                took_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
                "handling a message took long"
            );
        }
    }
}

impl<T: Topic> Drop for Inbox<T> {
    fn drop(&mut self) {
        self.center.deregister(T::NAME, self.registration);
    }
}
