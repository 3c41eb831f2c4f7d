//! The header of a binary message, and reading without trust.

use heartbeatpb::{DecodeError, DispatcherId, Gid, Ts};

/// First bytes of every binary message.
const MAGIC: u32 = 0xDA7A_6A6A;
/// Magic, kind, version, payload length.
pub const HEADER_BYTES: usize = 16;
/// Size of a 128-bit id.
pub(crate) const ID_BYTES: usize = 16;

/// What a binary message is. The numbers are wire facts.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u16)]
pub enum EventKind {
    /// Rows of one transaction and table.
    Dml = 0,
    /// Rows of several transactions.
    BatchDml = 1,
    /// A statement that changes a table.
    Ddl = 2,
    /// Everything before a position is complete.
    Resolved = 3,
    /// Several of them. Has no header of its own.
    BatchResolved = 4,
    /// A consistent point in time.
    SyncPoint = 5,
    /// A dispatcher can be served.
    Ready = 6,
    /// First message of a served dispatcher.
    Handshake = 7,
    /// A dispatcher cannot be served from existing data.
    NotReusable = 8,
    /// Local only.
    Drop = 9,
    /// Memory left at the receiver.
    CongestionControl = 10,
    /// Progress of dispatchers.
    DispatcherHeartbeat = 11,
    /// Which dispatchers the service does not know.
    DispatcherHeartbeatResponse = 12,
}

/// A message with a binary form.
pub trait BinaryMessage: Sized {
    /// Name for errors.
    const NAME: &'static str;

    /// Appends the message, header included.
    fn encode(&self, out: &mut Vec<u8>);

    /// Reads a message, header included.
    ///
    /// # Errors
    /// When the bytes are not this message, or their version is not known. Never panics.
    fn decode(bytes: &[u8]) -> Result<Self, DecodeError>;
}

/// Appends a header and what `payload` writes after it.
pub(crate) fn frame(out: &mut Vec<u8>, kind: EventKind, version: u16, payload: impl FnOnce(&mut Vec<u8>)) {
    out.extend_from_slice(&MAGIC.to_be_bytes());
    out.extend_from_slice(&(kind as u16).to_be_bytes());
    out.extend_from_slice(&version.to_be_bytes());
    let length_at = out.len();
    out.extend_from_slice(&[0; 8]);
    payload(out);
    let length = (out.len() - length_at - 8) as u64;
    out[length_at..length_at + 8].copy_from_slice(&length.to_be_bytes());
}

pub(crate) fn put_id(out: &mut Vec<u8>, high: u64, low: u64) {
    out.extend_from_slice(&low.to_le_bytes());
    out.extend_from_slice(&high.to_le_bytes());
}

pub(crate) fn put_dispatcher(out: &mut Vec<u8>, id: DispatcherId) {
    put_id(out, id.high, id.low);
}

pub(crate) fn put_u64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_be_bytes());
}

/// A count on the wire has 32 bits; more entries than that cannot be in memory.
pub(crate) fn put_count(out: &mut Vec<u8>, count: usize) {
    out.extend_from_slice(&u32::try_from(count).unwrap_or(u32::MAX).to_be_bytes());
}

/// A cursor over bytes of a peer.
pub(crate) struct Reader<'a> {
    bytes: &'a [u8],
    message: &'static str,
}

impl<'a> Reader<'a> {
    /// Reads and checks the header; gives its version, the payload, and what follows the payload.
    pub(crate) fn open(
        bytes: &'a [u8],
        kind: EventKind,
        message: &'static str,
    ) -> Result<(u16, Self, &'a [u8]), DecodeError> {
        let unusable = |field| Err(DecodeError::Unusable { message, field });
        let mut header = Reader { bytes, message };
        if header.u32()? != MAGIC {
            return unusable("magic");
        }
        if header.u16()? != kind as u16 {
            return unusable("type");
        }
        let version = header.u16()?;
        let length = header.u64()?;
        let Some((payload, rest)) =
            usize::try_from(length).ok().and_then(|length| header.bytes.split_at_checked(length))
        else {
            return unusable("length");
        };
        Ok((version, Reader { bytes: payload, message }, rest))
    }

    /// Like [`Self::open`] for a message that has one version only.
    pub(crate) fn open_version(
        bytes: &'a [u8],
        kind: EventKind,
        message: &'static str,
        version: u16,
    ) -> Result<Self, DecodeError> {
        let (found, reader, _) = Self::open(bytes, kind, message)?;
        if found != version {
            return Err(reader.unusable("version"));
        }
        Ok(reader)
    }

    pub(crate) fn unusable(&self, field: &'static str) -> DecodeError {
        DecodeError::Unusable { message: self.message, field }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let (head, rest) =
            self.bytes.split_first_chunk::<N>().ok_or(DecodeError::Malformed { message: self.message })?;
        self.bytes = rest;
        Ok(*head)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, DecodeError> {
        self.array::<1>().map(|[byte]| byte)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, DecodeError> {
        self.array().map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, DecodeError> {
        self.array().map(u64::from_be_bytes)
    }

    pub(crate) fn ts(&mut self) -> Result<Ts, DecodeError> {
        self.u64().map(Ts)
    }

    /// Both halves of a 128-bit id: high, low.
    fn id(&mut self) -> Result<(u64, u64), DecodeError> {
        let low = self.array().map(u64::from_le_bytes)?;
        let high = self.array().map(u64::from_le_bytes)?;
        Ok((high, low))
    }

    pub(crate) fn gid(&mut self) -> Result<Gid, DecodeError> {
        self.id().map(|(high, low)| Gid::new(high, low))
    }

    pub(crate) fn dispatcher(&mut self) -> Result<DispatcherId, DecodeError> {
        let (high, low) = self.id()?;
        let id = DispatcherId::new(high, low);
        if id.is_zero() { Err(self.unusable("dispatcher id")) } else { Ok(id) }
    }

    /// A count of entries of at least `entry_bytes` each: more than fit into what is left is a lie.
    pub(crate) fn count(&mut self, entry_bytes: usize) -> Result<usize, DecodeError> {
        let count = self.u32()? as usize;
        let room = self.bytes.len() / entry_bytes.max(1);
        if count > room { Err(self.unusable("count")) } else { Ok(count) }
    }

    pub(crate) fn rest(self) -> &'a [u8] {
        self.bytes
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub(crate) fn remaining(&self) -> usize {
        self.bytes.len()
    }
}
