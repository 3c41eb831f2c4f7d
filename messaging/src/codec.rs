//! Type numbers and the envelope (spec/messaging.md §1, §3).

use bytes::Bytes;
use heartbeatpb::wire::proto::Message as Envelope;
use heartbeatpb::{DecodeError, NodeId};

/// Numbers that say how a payload is encoded. Wire facts: append only, ours start at 1000.
pub mod io_type {
    /// Node to maintainer.
    pub const HEART_BEAT_REQUEST: i32 = 13;
    /// Maintainer to node.
    pub const HEART_BEAT_RESPONSE: i32 = 14;
    /// Maintainer to node.
    pub const SCHEDULE_DISPATCHER_REQUEST: i32 = 15;
    /// Coordinator to maintainer, maintainer to its node.
    pub const CHECKPOINT_TS_MESSAGE: i32 = 17;
    /// Node to maintainer.
    pub const BLOCK_STATUS_REQUEST: i32 = 18;
    /// Maintainer to node.
    pub const MERGE_DISPATCHER_REQUEST: i32 = 22;
    /// Coordinator to nodes.
    pub const COORDINATOR_BOOTSTRAP_REQUEST: i32 = 24;
    /// Node to coordinator.
    pub const COORDINATOR_BOOTSTRAP_RESPONSE: i32 = 25;
    /// Coordinator to node.
    pub const ADD_MAINTAINER_REQUEST: i32 = 26;
    /// Coordinator to node.
    pub const REMOVE_MAINTAINER_REQUEST: i32 = 27;
    /// Node to coordinator.
    pub const MAINTAINER_HEARTBEAT_REQUEST: i32 = 28;
    /// Maintainer to nodes.
    pub const MAINTAINER_BOOTSTRAP_REQUEST: i32 = 29;
    /// Node to maintainer.
    pub const MAINTAINER_BOOTSTRAP_RESPONSE: i32 = 30;
    /// Maintainer to the table trigger's node.
    pub const MAINTAINER_POST_BOOTSTRAP_REQUEST: i32 = 31;
    /// Node to maintainer.
    pub const MAINTAINER_POST_BOOTSTRAP_RESPONSE: i32 = 32;
    /// Maintainer to nodes.
    pub const MAINTAINER_CLOSE_REQUEST: i32 = 33;
    /// Node to maintainer.
    pub const MAINTAINER_CLOSE_RESPONSE: i32 = 34;
    /// First frame of a stream between nodes.
    pub const MESSAGE_HAND_SHAKE: i32 = 36;
    /// Node to coordinator.
    pub const NODE_HEARTBEAT_REQUEST: i32 = 42;
    /// Coordinator to node.
    pub const SET_NODE_LIVENESS_REQUEST: i32 = 43;
    /// Node to coordinator.
    pub const SET_NODE_LIVENESS_RESPONSE: i32 = 44;
    /// Coordinator to nodes.
    pub const SET_DISPATCHER_DRAIN_TARGET_REQUEST: i32 = 45;
    /// First number of messages that only Millrace nodes understand.
    pub const FIRST_OWN: i32 = 1000;
}

/// A message of a topic: one type number per variant, and a byte form for each.
pub trait WireMessage: Clone + Send + Sync + 'static {
    /// How the payload is encoded; see [`io_type`].
    fn io_type(&self) -> i32;
    /// Appends the payload.
    fn encode(&self, out: &mut Vec<u8>);
    /// Reads a payload of a type.
    ///
    /// # Errors
    /// When the type is not one of this topic's, or the bytes are malformed. Never panics.
    fn decode(io_type: i32, bytes: &[u8]) -> Result<Self, DecodeError>;
}

/// Wraps one message for a peer.
#[must_use]
pub fn envelope<M: WireMessage>(from: &NodeId, to: &NodeId, topic: &str, message: &M) -> Envelope {
    let mut payload = Vec::new();
    message.encode(&mut payload);
    Envelope {
        r#type: message.io_type(),
        from: from.as_str().to_owned(),
        to: to.as_str().to_owned(),
        topic: topic.to_owned(),
        payload: vec![Bytes::from(payload)],
    }
}

/// Reads the messages of an envelope. Elements that cannot be read are left out and counted: a peer may
/// send an envelope that is empty for us, and nobody is handed an empty one.
pub fn open<M: WireMessage>(envelope: &Envelope) -> (Vec<M>, usize) {
    let mut messages = Vec::with_capacity(envelope.payload.len());
    let mut unreadable = 0;
    for payload in &envelope.payload {
        match M::decode(envelope.r#type, payload) {
            Ok(message) => messages.push(message),
            Err(_) => unreadable += 1,
        }
    }
    (messages, unreadable)
}
