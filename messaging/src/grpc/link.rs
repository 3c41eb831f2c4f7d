//! What waits for a peer on one of the two streams, and which stream may take it.
//!
//! ```text
//!            attach         ready              detach            30 s
//!   New -----------> New ----------> Up ----------------> Down ---------> New (queue dropped)
//!    ^                               ^                      |
//!    '-- send: ConnectionNotFound    '----------------------'
//!                                       attach, ready           send is queued in Up and Down
//! ```
//!
//! Each stream that is attached gets a number of its own. Only the stream with the newest number takes from the
//! queue; the check and the taking are one step, so a stream that was replaced never takes a message with it.

use std::collections::VecDeque;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use heartbeatpb::NodeId;
use heartbeatpb::wire::proto::Message as Envelope;
use parking_lot::Mutex;
use prost::Message as _;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{QUEUE_CAPACITY, SendError, SendErrorKind, StreamClass};

/// Bytes that wait for a peer on one stream: what a receiver that stands still may cost its sender.
pub(crate) const QUEUE_BYTES: usize = 64 << 20;
/// How long a queue outlives its stream. Longer than a restart or a pause takes; after it, what waits is stale.
pub(crate) const KEPT: Duration = Duration::from_secs(30);
/// A frame is filled up to this size with messages of one type and topic: enough to hide what a frame costs.
const FRAME_BYTES: usize = 64 << 10;
/// Messages in one frame, so that a receiver's queue can take them.
const FRAME_MESSAGES: usize = 64;

/// Whether a stream to the peer exists.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// None yet, or none for a long time.
    New,
    /// One is there.
    Up,
    /// It broke, at this time.
    Down(Instant),
    /// The bus is shutting down: what is queued still leaves.
    Closing,
    /// The peer left.
    Gone,
}

/// What waited for a peer and will not be sent.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Lost {
    /// Messages.
    pub envelopes: usize,
    /// Their size.
    pub bytes: usize,
}

/// A stream's right to take from the queue, until another stream gets it.
#[derive(Clone, Debug)]
pub(crate) struct Session {
    generation: u64,
    /// Cancelled when the stream has to end.
    pub(crate) ended: CancellationToken,
}

struct State {
    phase: Phase,
    /// Envelopes with their sizes on the wire.
    queue: VecDeque<(Envelope, usize)>,
    bytes: usize,
    session: Session,
    /// How many streams became ready so far.
    sessions: u64,
    waker: Option<Waker>,
}

/// One of the two streams to a peer, and its queue.
pub(crate) struct Link {
    peer: NodeId,
    class: StreamClass,
    capacity: usize,
    max_bytes: usize,
    state: Mutex<State>,
    /// Held by the stream that hands over what arrives, so that the one before has ended.
    pub(crate) receiving: tokio::sync::Mutex<()>,
}

impl Link {
    pub(crate) fn new(peer: NodeId, class: StreamClass) -> Self {
        Self::with_room(peer, class, QUEUE_CAPACITY, QUEUE_BYTES)
    }

    fn with_room(peer: NodeId, class: StreamClass, capacity: usize, max_bytes: usize) -> Self {
        let state = State {
            phase: Phase::New,
            queue: VecDeque::new(),
            bytes: 0,
            session: Session { generation: 0, ended: CancellationToken::new() },
            sessions: 0,
            waker: None,
        };
        let receiving = tokio::sync::Mutex::new(());
        Self { peer, class, capacity, max_bytes, state: Mutex::new(state), receiving }
    }

    /// What the stream carries.
    pub(crate) fn class(&self) -> StreamClass {
        self.class
    }

    fn error(&self, kind: SendErrorKind, what: &str) -> SendError {
        SendError::new(kind, format!("{} stream to {} {what}", self.class.as_str(), self.peer))
    }

    /// Queues an envelope of a known size.
    pub(crate) fn push(&self, envelope: Envelope, bytes: usize) -> Result<(), SendError> {
        let mut state = self.state.lock();
        match state.phase {
            Phase::Up | Phase::Down(_) => {}
            Phase::New => return Err(self.error(SendErrorKind::ConnectionNotFound, "is not open")),
            Phase::Closing => return Err(self.error(SendErrorKind::Closed, "is closing")),
            Phase::Gone => return Err(self.error(SendErrorKind::TargetNotFound, "is closed")),
        }
        // One is always taken, however large: else it could never be sent.
        let full = state.bytes + bytes > self.max_bytes && !state.queue.is_empty();
        if full || state.queue.len() >= self.capacity {
            return Err(self.error(SendErrorKind::MessageCongested, "is full"));
        }
        state.bytes += bytes;
        state.queue.push_back((envelope, bytes));
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
        Ok(())
    }

    /// Gives the queue to a new stream; the one before ends. Says also whether that one had worked until now.
    pub(crate) fn attach(&self) -> Option<(Session, bool)> {
        let mut state = self.state.lock();
        match state.phase {
            Phase::New | Phase::Up | Phase::Down(_) => {}
            Phase::Closing | Phase::Gone => return None,
        }
        let was_up = state.go_down();
        Some((next_session(state), was_up))
    }

    /// The stream works: from now on it takes messages. Says the number of the session the first time.
    pub(crate) fn ready(&self, session: &Session) -> Option<u64> {
        let mut state = self.state.lock();
        if state.session.generation != session.generation {
            return None;
        }
        match state.phase {
            Phase::New | Phase::Down(_) => {
                state.phase = Phase::Up;
                state.sessions += 1;
                Some(state.sessions)
            }
            Phase::Up | Phase::Closing | Phase::Gone => None,
        }
    }

    /// The stream ended. Says whether it was the one that counted, and had been ready.
    pub(crate) fn detach(&self, session: &Session) -> bool {
        session.ended.cancel();
        let mut state = self.state.lock();
        if state.session.generation != session.generation {
            return false;
        }
        // Whatever is left of this stream takes nothing any more.
        state.session.generation += 1;
        state.waker = None;
        state.go_down()
    }

    /// The next frame for a stream; `None` when the stream has to end.
    pub(crate) fn poll_take(&self, session: &Session, cx: &mut Context<'_>) -> Poll<Option<Envelope>> {
        let mut state = self.state.lock();
        if state.session.generation != session.generation || state.phase == Phase::Gone {
            return Poll::Ready(None);
        }
        match state.take() {
            Some(envelope) => Poll::Ready(Some(envelope)),
            None if state.phase == Phase::Closing => Poll::Ready(None),
            None => {
                state.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    /// Drops what waits for a stream that has been broken for long; sending fails from then on.
    pub(crate) fn forget_stale(&self, now: Instant) -> Option<Lost> {
        let mut state = self.state.lock();
        match state.phase {
            Phase::Down(since) if now.saturating_duration_since(since) >= KEPT => {
                state.phase = Phase::New;
                Some(state.clear())
            }
            Phase::Down(_) | Phase::New | Phase::Up | Phase::Closing | Phase::Gone => None,
        }
    }

    /// The peer left: ends the stream and drops what waits. Says also whether the stream had worked until now.
    pub(crate) fn close(&self) -> (Lost, bool) {
        let mut state = self.state.lock();
        let was_up = state.phase == Phase::Up;
        state.phase = Phase::Gone;
        let lost = state.clear();
        next_session(state);
        (lost, was_up)
    }

    /// Takes no more; a stream ends when nothing waits.
    pub(crate) fn finish(&self) {
        let mut state = self.state.lock();
        state.phase = match state.phase {
            Phase::Up => Phase::Closing,
            Phase::New | Phase::Down(_) | Phase::Closing | Phase::Gone => Phase::Gone,
        };
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Ends the present stream and keeps the queue. Says whether the stream had worked until now.
    pub(crate) fn interrupt(&self) -> bool {
        let mut state = self.state.lock();
        let was_up = state.go_down();
        next_session(state);
        was_up
    }

    /// Ready, sessions so far, waiting envelopes and their bytes.
    pub(crate) fn look(&self) -> (bool, u64, usize, usize) {
        let state = self.state.lock();
        (state.phase == Phase::Up, state.sessions, state.queue.len(), state.bytes)
    }
}

impl State {
    /// There is no stream any more. Says whether there was one.
    fn go_down(&mut self) -> bool {
        let was_up = self.phase == Phase::Up;
        if was_up {
            self.phase = Phase::Down(Instant::now());
        }
        was_up
    }

    /// The oldest envelope, filled up with those behind it that look like it.
    fn take(&mut self) -> Option<Envelope> {
        let (mut envelope, mut size) = self.queue.pop_front()?;
        self.bytes -= size;
        while let Some((next, bytes)) = self.queue.front() {
            let fits = size + bytes <= FRAME_BYTES
                && envelope.payload.len() + next.payload.len() <= FRAME_MESSAGES
                && envelope.r#type == next.r#type
                && envelope.topic == next.topic
                && envelope.from == next.from
                // A frame has one number, that of its last message: all are counted, or none.
                && (envelope.sequence == 0) == (next.sequence == 0);
            if !fits {
                break;
            }
            let Some((next, bytes)) = self.queue.pop_front() else { break };
            size += bytes;
            self.bytes -= bytes;
            envelope.sequence = next.sequence;
            envelope.payload.extend(next.payload);
        }
        Some(envelope)
    }

    fn clear(&mut self) -> Lost {
        let lost = Lost { envelopes: self.queue.len(), bytes: self.bytes };
        self.queue = VecDeque::new();
        self.bytes = 0;
        lost
    }
}

/// Ends the stream that has the queue, and makes the right to it for another one.
fn next_session(mut state: parking_lot::MutexGuard<'_, State>) -> Session {
    let generation = state.session.generation + 1;
    let session = Session { generation, ended: CancellationToken::new() };
    let before = std::mem::replace(&mut state.session, session.clone());
    let waker = state.waker.take();
    drop(state);
    before.ended.cancel();
    if let Some(waker) = waker {
        waker.wake();
    }
    session
}

/// Size of an envelope on the wire, bytes.
pub(crate) fn wire_bytes(envelope: &Envelope) -> usize {
    envelope.encoded_len()
}

#[cfg(test)]
mod tests;
