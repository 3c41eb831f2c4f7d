//! The first frame of each stream: who opens it, for whom, and what it will carry (messaging §4.3).

use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use heartbeatpb::NodeId;
use heartbeatpb::wire::proto::Message as Envelope;
use serde_json::{Map, Value};

use crate::codec::io_type;
use crate::{SendError, SendErrorKind, StreamClass};

/// Version of the handshake that this node sends. A peer with another one is not refused.
const VERSION: u8 = 1;
/// A handshake is far smaller; more is somebody who means something else.
const MAX_BYTES: usize = 4_096;

/// What a peer says when it opens a stream.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Handshake {
    /// Who opens the stream. Believed only as far as the connection proves it.
    pub(crate) from: NodeId,
    /// Whom it wants to talk to.
    pub(crate) to: NodeId,
    /// What the stream will carry.
    pub(crate) class: StreamClass,
}

impl Handshake {
    /// The first frame.
    pub(crate) fn envelope(&self) -> Envelope {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let json = serde_json::json!({
            "Version": VERSION,
            "Timestamp": seconds,
            "StreamType": self.class.as_str(),
        });
        Envelope {
            r#type: io_type::MESSAGE_HAND_SHAKE,
            from: self.from.as_str().to_owned(),
            to: self.to.as_str().to_owned(),
            topic: String::new(),
            payload: vec![Bytes::from(json.to_string())],
            sequence: 0,
        }
    }

    /// Reads a first frame.
    ///
    /// # Errors
    /// When it is no handshake, or one that cannot be used.
    pub(crate) fn read(envelope: &Envelope) -> Result<Self, SendError> {
        if envelope.r#type != io_type::MESSAGE_HAND_SHAKE {
            let name = io_type::name(envelope.r#type);
            return Err(unusable(&format!("a stream began with {name} and not with a handshake")));
        }
        if envelope.from.is_empty() {
            return Err(unusable("a handshake does not say who sent it"));
        }
        let payload = envelope.payload.first().ok_or_else(|| unusable("a handshake is empty"))?;
        if payload.len() > MAX_BYTES {
            return Err(unusable("a handshake is too long"));
        }
        let json: Map<String, Value> =
            serde_json::from_slice(payload).map_err(|_| unusable("a handshake is no JSON object"))?;
        // Peers write the keys in their own case.
        let stream = json.iter().find(|(key, _)| key.eq_ignore_ascii_case("StreamType"));
        let class = match stream.and_then(|(_, value)| value.as_str()) {
            Some("event") => StreamClass::Event,
            Some("command") => StreamClass::Command,
            Some(_) | None => return Err(unusable("a handshake has no known stream type")),
        };
        let (from, to) = (NodeId::from(envelope.from.as_str()), NodeId::from(envelope.to.as_str()));
        Ok(Self { from, to, class })
    }
}

fn unusable(reason: &str) -> SendError {
    SendError::new(SendErrorKind::InvalidMessage, reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handshake() -> Handshake {
        Handshake { from: "a".into(), to: "b".into(), class: StreamClass::Event }
    }

    #[test]
    fn a_first_frame_has_the_keys_of_the_wire() {
        let frame = handshake().envelope();
        assert_eq!((frame.r#type, frame.from.as_str(), frame.to.as_str()), (36, "a", "b"));
        assert_eq!((frame.topic.as_str(), frame.payload.len()), ("", 1));
        let json: Map<String, Value> = serde_json::from_slice(&frame.payload[0]).expect("an object");
        assert_eq!(json.keys().collect::<Vec<_>>(), ["Version", "Timestamp", "StreamType"]);
        assert_eq!((&json["Version"], &json["StreamType"]), (&Value::from(1), &Value::from("event")));
        assert!(json["Timestamp"].as_u64().is_some_and(|seconds| seconds > 1_700_000_000));
    }

    #[test]
    fn a_first_frame_is_read_in_any_case_and_of_any_version() {
        assert_eq!(Handshake::read(&handshake().envelope()), Ok(handshake()));
        let mut other = handshake().envelope();
        other.payload = vec![Bytes::from_static(br#"{"version":9,"more":[],"streamTYPE":"command"}"#)];
        let read = Handshake::read(&other).expect("readable");
        assert_eq!(read.class, StreamClass::Command);
    }

    // behaviour: messaging-11
    #[test]
    fn what_is_no_handshake_is_an_error_and_not_a_panic() {
        let with = |payload: Vec<Bytes>| Envelope { payload, ..handshake().envelope() };
        let text = |text: &'static str| vec![Bytes::from_static(text.as_bytes())];
        let broken = [
            Envelope { r#type: 13, ..handshake().envelope() },
            Envelope { from: String::new(), ..handshake().envelope() },
            with(Vec::new()),
            with(text("")),
            with(text("[]")),
            with(text("{\"StreamType\":\"event\"")),
            with(text("{\"Version\":1}")),
            with(text("{\"StreamType\":7}")),
            with(text("{\"StreamType\":\"rows\"}")),
            with(vec![Bytes::from(vec![b' '; MAX_BYTES + 1])]),
        ];
        for envelope in broken {
            let error = Handshake::read(&envelope).expect_err("no handshake");
            assert_eq!(error.kind, SendErrorKind::InvalidMessage);
        }
    }
}
