//! Type numbers and the envelope (messaging §1, §3).

pub mod io_type;

use bytes::Bytes;
use heartbeatpb::wire::proto::Message as Envelope;
use heartbeatpb::{DecodeError, NodeId};

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
        sequence: 0,
    }
}

/// What an envelope held.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Opened<M> {
    /// The messages, in order. May be empty: a peer skips what it cannot encode.
    pub messages: Vec<M>,
    /// Elements whose type the topic does not have.
    pub unknown: usize,
    /// Elements of a known type that could not be read.
    pub unreadable: usize,
}

/// Reads the messages of an envelope; elements that cannot be read are left out and counted.
#[must_use]
pub fn open<M: WireMessage>(envelope: &Envelope) -> Opened<M> {
    let messages = Vec::with_capacity(envelope.payload.len());
    let mut opened = Opened { messages, unknown: 0, unreadable: 0 };
    for payload in &envelope.payload {
        match M::decode(envelope.r#type, payload) {
            Ok(message) => opened.messages.push(message),
            Err(DecodeError::UnknownType(_)) => opened.unknown += 1,
            Err(_) => opened.unreadable += 1,
        }
    }
    opened
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{MaintainerTopic, ToMaintainer, Topic};
    use heartbeatpb::{ChangefeedId, MaintainerCloseResponse};

    fn closed(success: bool) -> ToMaintainer {
        ToMaintainer::CloseResponse(MaintainerCloseResponse {
            changefeed: ChangefeedId::fresh("feed"),
            success,
            epoch: None,
        })
    }

    fn sealed() -> Envelope {
        envelope(&"a".into(), &"b".into(), MaintainerTopic::NAME, &closed(true))
    }

    // behaviour: messaging-6
    #[test]
    fn an_envelope_keeps_type_topic_sender_receiver_and_payload() {
        let envelope = sealed();
        assert_eq!(envelope.r#type, io_type::MAINTAINER_CLOSE_RESPONSE);
        assert_eq!((envelope.from.as_str(), envelope.to.as_str()), ("a", "b"));
        assert_eq!(envelope.topic, "maintainer");
        assert_eq!(envelope.payload.len(), 1);
        let opened = open::<ToMaintainer>(&envelope);
        assert!(
            matches!(opened.messages.as_slice(), [ToMaintainer::CloseResponse(response)] if response.success)
        );
    }

    // behaviour: messaging-16
    #[test]
    fn unreadable_elements_and_unknown_types_are_left_out() {
        let mut envelope = sealed();
        envelope.payload.insert(0, Bytes::from_static(b"\xff\xff\xff"));
        envelope.payload.push(Bytes::new());
        let opened = open::<ToMaintainer>(&envelope);
        assert_eq!((opened.messages.len(), opened.unknown, opened.unreadable), (1, 0, 2));
        envelope.r#type = 9999;
        let opened = open::<ToMaintainer>(&envelope);
        assert_eq!((opened.messages.len(), opened.unknown, opened.unreadable), (0, 3, 0));
    }

    // behaviour: messaging-16
    #[test]
    fn an_envelope_may_be_empty() {
        let mut envelope = sealed();
        envelope.payload.clear();
        assert_eq!(open::<ToMaintainer>(&envelope), Opened { messages: vec![], unknown: 0, unreadable: 0 });
    }
}
