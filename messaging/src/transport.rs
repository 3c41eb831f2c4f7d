//! What a binding to a network has to do.

use heartbeatpb::NodeId;
use heartbeatpb::wire::proto::Message as Envelope;

use crate::{SendError, StreamClass};

/// Carries envelopes to other nodes. A binding reconnects by itself and keeps the order per
/// (receiver, stream class) inside one session.
pub trait Transport: Send + Sync + 'static {
    /// Queues an envelope; never blocks.
    ///
    /// # Errors
    /// When the node is unknown, not connected yet, or its queue is full.
    fn send(&self, to: &NodeId, class: StreamClass, envelope: Envelope) -> Result<(), SendError>;
}
