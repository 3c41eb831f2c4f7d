//! Messages about the position of one dispatcher's stream.

use bytes::Bytes;
use heartbeatpb::{DecodeError, DispatcherId, Ts};

use super::frame::{BinaryMessage, EventKind, Reader, frame, put_dispatcher, put_u64};

/// First message of a served dispatcher: where its stream begins, and the shape of its table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Handshake {
    /// Position where the stream begins.
    pub resolved: Ts,
    /// Number of this message in the stream, 1.
    pub seq: u64,
    /// Epoch of the stream.
    pub epoch: u64,
    /// The dispatcher.
    pub dispatcher: DispatcherId,
    /// Table info as JSON.
    pub table_info: Bytes,
}

impl BinaryMessage for Handshake {
    const NAME: &'static str = "HandshakeEvent";

    fn encode(&self, out: &mut Vec<u8>) {
        frame(out, EventKind::Handshake, 0, |out| {
            put_u64(out, self.resolved.0);
            put_u64(out, self.seq);
            put_u64(out, self.epoch);
            put_dispatcher(out, self.dispatcher);
            out.extend_from_slice(&self.table_info);
        });
    }

    fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut payload = Reader::open_version(bytes, EventKind::Handshake, Self::NAME, 0)?;
        Ok(Self {
            resolved: payload.ts()?,
            seq: payload.u64()?,
            epoch: payload.u64()?,
            dispatcher: payload.dispatcher()?,
            table_info: Bytes::copy_from_slice(payload.rest()),
        })
    }
}

/// A dispatcher can be served.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ready {
    /// The dispatcher.
    pub dispatcher: DispatcherId,
}

impl BinaryMessage for Ready {
    const NAME: &'static str = "ReadyEvent";

    fn encode(&self, out: &mut Vec<u8>) {
        frame(out, EventKind::Ready, 1, |out| put_dispatcher(out, self.dispatcher));
    }

    fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut payload = Reader::open_version(bytes, EventKind::Ready, Self::NAME, 1)?;
        Ok(Self { dispatcher: payload.dispatcher()? })
    }
}

/// A dispatcher cannot be served from data that is already there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NotReusable {
    /// The dispatcher.
    pub dispatcher: DispatcherId,
}

impl BinaryMessage for NotReusable {
    const NAME: &'static str = "NotReusableEvent";

    fn encode(&self, out: &mut Vec<u8>) {
        frame(out, EventKind::NotReusable, 0, |out| put_dispatcher(out, self.dispatcher));
    }

    fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut payload = Reader::open_version(bytes, EventKind::NotReusable, Self::NAME, 0)?;
        Ok(Self { dispatcher: payload.dispatcher()? })
    }
}

/// Everything up to a position was sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Resolved {
    /// The position.
    pub resolved: Ts,
    /// Epoch of the stream.
    pub epoch: u64,
    /// Number of the last message with data.
    pub seq: u64,
    /// The dispatcher.
    pub dispatcher: DispatcherId,
}

impl BinaryMessage for Resolved {
    const NAME: &'static str = "ResolvedEvent";

    fn encode(&self, out: &mut Vec<u8>) {
        frame(out, EventKind::Resolved, 1, |out| {
            put_u64(out, self.resolved.0);
            put_u64(out, self.epoch);
            put_u64(out, self.seq);
            put_dispatcher(out, self.dispatcher);
        });
    }

    fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        Self::decode_first(bytes).map(|(resolved, _)| resolved)
    }
}

impl Resolved {
    fn decode_first(bytes: &[u8]) -> Result<(Self, &[u8]), DecodeError> {
        let (version, mut payload, rest) = Reader::open(bytes, EventKind::Resolved, Self::NAME)?;
        if version != 1 {
            return Err(payload.unusable("version"));
        }
        let resolved = Self {
            resolved: payload.ts()?,
            epoch: payload.u64()?,
            seq: payload.u64()?,
            dispatcher: payload.dispatcher()?,
        };
        Ok((resolved, rest))
    }
}

/// Positions of many dispatchers: complete [`Resolved`] messages one after the other.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct BatchResolved(pub Vec<Resolved>);

impl BinaryMessage for BatchResolved {
    const NAME: &'static str = "BatchResolvedTs";

    fn encode(&self, out: &mut Vec<u8>) {
        for resolved in &self.0 {
            resolved.encode(out);
        }
    }

    fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut batch = Vec::new();
        let mut rest = bytes;
        while !rest.is_empty() {
            let (resolved, after) = Resolved::decode_first(rest)?;
            batch.push(resolved);
            rest = after;
        }
        Ok(Self(batch))
    }
}

/// A consistent point in time that all dispatchers stop at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SyncPoint {
    /// Number in the stream.
    pub seq: u64,
    /// Epoch of the stream.
    pub epoch: u64,
    /// The position.
    pub commit_ts: Ts,
    /// The dispatcher.
    pub dispatcher: DispatcherId,
}

impl BinaryMessage for SyncPoint {
    const NAME: &'static str = "SyncPointEvent";

    fn encode(&self, out: &mut Vec<u8>) {
        frame(out, EventKind::SyncPoint, 1, |out| {
            put_u64(out, self.seq);
            put_u64(out, self.epoch);
            put_u64(out, self.commit_ts.0);
            put_dispatcher(out, self.dispatcher);
        });
    }

    fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut payload = Reader::open_version(bytes, EventKind::SyncPoint, Self::NAME, 1)?;
        Ok(Self {
            seq: payload.u64()?,
            epoch: payload.u64()?,
            commit_ts: payload.ts()?,
            dispatcher: payload.dispatcher()?,
        })
    }
}
