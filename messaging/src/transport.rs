//! What a binding to a network has to do.

use heartbeatpb::NodeId;
use heartbeatpb::wire::proto::Message as Envelope;

use crate::{SendError, StreamClass};

/// Queued envelopes per (peer, stream class): enough for the statuses of a big changefeed, after that the
/// sender should slow down.
pub const QUEUE_CAPACITY: usize = 16_384;

/// Carries envelopes to other nodes. A binding reconnects by itself, keeps the order per
/// (receiver, stream class) inside one session, and hands what it receives to
/// [`MessageCenter::receive`](crate::MessageCenter::receive) with the peer's proven identity.
pub trait Transport: Send + Sync + 'static {
    /// Queues an envelope; never blocks.
    ///
    /// # Errors
    /// When the node is unknown, not connected yet, or its queue is full.
    fn send(&self, to: &NodeId, class: StreamClass, envelope: Envelope) -> Result<(), SendError>;
}
