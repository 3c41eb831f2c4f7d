//! Decoder of the logical replication stream: WAL messages, and `pgoutput` protocol version 2 inside them (PostgreSQL
//! manual, *Logical Replication Message Formats*).
//!
//! A transaction that takes more than `logical_decoding_work_mem` comes before it ends, in blocks between a `StreamStart`
//! and a [`Streamed::Stop`], and later its `StreamCommit` or `StreamAbort`. Within a block every message of a transaction
//! has the id of its subtransaction behind its kind.
//!
//! Everything borrows the received bytes. Every length is checked once, here; a decoded [`TupleData`] can be
//! walked without further checks.

use event::{Datum, TupleWriter};

use super::conn::PG_EPOCH_MICROS;
use crate::Error;

/// A message of the replication stream.
#[derive(Debug)]
pub(crate) enum StreamMessage<'a> {
    /// A piece of the log; its content is a [`Message`].
    Data {
        /// The `pgoutput` message.
        content: &'a [u8],
    },
    /// A sign of life.
    KeepAlive {
        /// Everything that ends at or before this position has been sent.
        end: u64,
        /// The server's clock, microseconds since the Unix epoch.
        clock: i64,
        /// Whether the server wants a status update at once.
        reply: bool,
    },
}

/// A `pgoutput` message.
#[derive(Debug)]
pub(crate) enum Message<'a> {
    /// A transaction begins; they never overlap.
    Begin {
        /// Position of its commit record.
        commit_lsn: u64,
        /// Commit time, microseconds since the Unix epoch.
        time: i64,
        /// Its transaction id.
        xid: u32,
    },
    /// The transaction is complete.
    Commit {
        /// End of its commit record.
        end_lsn: u64,
        /// Commit time, microseconds since the Unix epoch.
        time: i64,
    },
    /// The shape of a table, before its first row and after every change.
    Relation(Relation),
    /// A row appeared.
    Insert { relation: u32, new: TupleData<'a> },
    /// A row changed.
    Update { relation: u32, old: Option<OldImage<'a>>, new: TupleData<'a> },
    /// A row disappeared.
    Delete { relation: u32, old: OldImage<'a> },
    /// Tables were emptied.
    Truncate { relations: Relations<'a> },
    /// What somebody wrote into the log with `pg_logical_emit_message`, as a part of the transaction.
    Logical { prefix: &'a [u8], content: &'a [u8] },
    /// Until [`Streamed::Stop`] comes what a transaction has done that has not ended.
    StreamStart {
        /// Id of the transaction.
        xid: u32,
    },
    /// A transaction is complete that came before its end. They come in the order of their commits with all others.
    StreamCommit(StreamCommit),
    /// A transaction that came before its end, or a subtransaction of it with those inside, was rolled back.
    StreamAbort {
        /// Id of the transaction.
        xid: u32,
        /// What was rolled back: the same for all of it.
        subxid: u32,
    },
    /// Something without meaning for us: origin, type name, a logical message outside of a transaction.
    Other,
}

/// The end of a transaction that came before it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct StreamCommit {
    /// Its id.
    pub(crate) xid: u32,
    /// Position of its commit record.
    pub(crate) commit_lsn: u64,
    /// End of its commit record.
    pub(crate) end_lsn: u64,
    /// Commit time, microseconds since the Unix epoch.
    pub(crate) time: i64,
}

/// A message within a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Streamed<'a> {
    /// The block is complete.
    Stop,
    /// A [`Message`], without the id behind its kind.
    Message {
        /// Id of the subtransaction, or of the transaction. Of a logical message always that of the transaction.
        xid: u32,
        /// Its kind.
        kind: &'a [u8],
        /// What follows.
        rest: &'a [u8],
    },
    /// Something without meaning for us.
    Other,
}

/// The image of a row before its change.
#[derive(Clone, Copy, Debug)]
pub(crate) enum OldImage<'a> {
    /// The identity's columns; the others are NULL on the wire.
    Key(TupleData<'a>),
    /// Every column.
    Full(TupleData<'a>),
}

/// Shape of a table on the wire.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Relation {
    pub(crate) id: u32,
    pub(crate) schema: String,
    pub(crate) name: String,
    /// `d`, `n`, `f` or `i`.
    pub(crate) identity: u8,
    pub(crate) columns: Vec<RelationColumn>,
}

/// Column of a [`Relation`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct RelationColumn {
    pub(crate) key: bool,
    pub(crate) name: String,
    pub(crate) type_oid: u32,
    pub(crate) type_mod: i32,
}

/// Values of one row, checked.
#[derive(Clone, Copy)]
pub(crate) struct TupleData<'a> {
    columns: u16,
    bytes: &'a [u8],
}

impl std::fmt::Debug for TupleData<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "<{} columns>", self.columns)
    }
}

/// Ids of the tables of a truncation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Relations<'a>(&'a [u8]);

impl Relations<'_> {
    pub(crate) fn iter(&self) -> impl Iterator<Item = u32> {
        self.0.chunks_exact(4).map(|id| u32::from_be_bytes([id[0], id[1], id[2], id[3]]))
    }
}

impl<'a> TupleData<'a> {
    /// Number of columns.
    pub(crate) fn columns(self) -> usize {
        usize::from(self.columns)
    }

    /// The values in order.
    pub(crate) fn iter(self) -> Values<'a> {
        Values(self.bytes)
    }

    /// Writes all values as they are.
    pub(crate) fn write(self, out: &mut TupleWriter<'_>) {
        for value in self.iter() {
            out.push(value);
        }
    }
}

/// Iterator over a checked tuple.
#[derive(Clone)]
pub(crate) struct Values<'a>(&'a [u8]);

impl<'a> Iterator for Values<'a> {
    type Item = Datum<'a>;

    #[inline]
    fn next(&mut self) -> Option<Datum<'a>> {
        let (&kind, rest) = self.0.split_first()?;
        match kind {
            b't' => {
                let (len, rest) = rest.split_first_chunk::<4>()?;
                let (text, rest) = rest.split_at_checked(u32::from_be_bytes(*len) as usize)?;
                self.0 = rest;
                Some(Datum::Text(text))
            }
            b'u' => {
                self.0 = rest;
                Some(Datum::Unchanged)
            }
            _ => {
                self.0 = rest;
                Some(Datum::Null)
            }
        }
    }
}

struct Cursor<'a>(&'a [u8]);

fn cut_off() -> Error {
    Error::protocol("a log message is cut off")
}

impl<'a> Cursor<'a> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let (head, rest) = self.0.split_first_chunk::<N>().ok_or_else(cut_off)?;
        self.0 = rest;
        Ok(*head)
    }

    fn u8(&mut self) -> Result<u8, Error> {
        Ok(self.array::<1>()?[0])
    }

    fn u16(&mut self) -> Result<u16, Error> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    fn u32(&mut self) -> Result<u32, Error> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, Error> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    /// A server time as microseconds since the Unix epoch.
    fn time(&mut self) -> Result<i64, Error> {
        Ok(i64::from_be_bytes(self.array()?).saturating_add(PG_EPOCH_MICROS))
    }

    /// Bytes up to a zero byte, which is taken too.
    fn terminated(&mut self) -> Result<&'a [u8], Error> {
        let end = memchr::memchr(0, self.0).ok_or_else(cut_off)?;
        let (bytes, rest) = self.0.split_at(end);
        self.0 = &rest[1..];
        Ok(bytes)
    }

    fn text(&mut self) -> Result<String, Error> {
        let text =
            std::str::from_utf8(self.terminated()?).map_err(|_| Error::protocol("a name is not UTF-8"))?;
        Ok(text.to_owned())
    }

    #[inline]
    fn tuple(&mut self) -> Result<TupleData<'a>, Error> {
        let columns = self.u16()?;
        let start = self.0;
        for _ in 0..columns {
            match self.u8()? {
                b't' => {
                    let len = self.u32()? as usize;
                    self.0 = self.0.get(len..).ok_or_else(cut_off)?;
                }
                b'n' | b'u' => {}
                kind => return Err(Error::protocol(format_args!("value of kind {kind:#04x}"))),
            }
        }
        Ok(TupleData { columns, bytes: &start[..start.len() - self.0.len()] })
    }

    fn old_image(&mut self, kind: u8) -> Result<OldImage<'a>, Error> {
        match kind {
            b'K' => Ok(OldImage::Key(self.tuple()?)),
            b'O' => Ok(OldImage::Full(self.tuple()?)),
            _ => Err(Error::protocol(format_args!("row image of kind {kind:#04x}"))),
        }
    }

    fn new_image(&mut self, kind: u8) -> Result<TupleData<'a>, Error> {
        if kind == b'N' {
            self.tuple()
        } else {
            Err(Error::protocol(format_args!("row image of kind {kind:#04x}")))
        }
    }
}

/// Decodes the content of a CopyData message.
pub(crate) fn decode_stream(body: &[u8]) -> Result<StreamMessage<'_>, Error> {
    let mut cursor = Cursor(body);
    match cursor.u8()? {
        b'w' => {
            cursor.array::<24>()?;
            Ok(StreamMessage::Data { content: cursor.0 })
        }
        b'k' => {
            let end = cursor.u64()?;
            let clock = cursor.time()?;
            Ok(StreamMessage::KeepAlive { end, clock, reply: cursor.u8()? != 0 })
        }
        kind => Err(Error::protocol(format_args!("replication message of kind {kind:#04x}"))),
    }
}

/// The table of a row change of which only the beginning is there, as the content of a CopyData message outside of a block.
pub(crate) fn relation_of(body: &[u8]) -> Option<u32> {
    let mut cursor = Cursor(body);
    if cursor.u8().ok()? != b'w' {
        return None;
    }
    cursor.array::<24>().ok()?;
    match cursor.u8().ok()? {
        b'I' | b'U' | b'D' => cursor.u32().ok(),
        _ => None,
    }
}

/// Decodes a `pgoutput` message within a block, as far as is needed to keep it.
#[inline]
pub(crate) fn decode_streamed(content: &[u8]) -> Result<Streamed<'_>, Error> {
    let (kind, rest) = content.split_at_checked(1).ok_or_else(cut_off)?;
    match kind[0] {
        b'I' | b'U' | b'D' | b'R' | b'T' | b'M' => {
            let mut cursor = Cursor(rest);
            let xid = cursor.u32()?;
            Ok(Streamed::Message { xid, kind, rest: cursor.0 })
        }
        b'E' if rest.is_empty() => Ok(Streamed::Stop),
        b'O' | b'Y' => Ok(Streamed::Other),
        kind => Err(Error::protocol(format_args!("log message of kind {kind:#04x} in a block"))),
    }
}

/// The prefix of a logical message without its kind.
pub(crate) fn prefix_of(rest: &[u8]) -> Result<&[u8], Error> {
    let mut cursor = Cursor(rest);
    cursor.array::<9>()?;
    cursor.terminated()
}

/// Decodes a `pgoutput` message outside of a block, or one of a block without its id.
pub(crate) fn decode(content: &[u8]) -> Result<Message<'_>, Error> {
    let mut cursor = Cursor(content);
    let message = match cursor.u8()? {
        b'I' => {
            let relation = cursor.u32()?;
            let kind = cursor.u8()?;
            Message::Insert { relation, new: cursor.new_image(kind)? }
        }
        b'U' => {
            let relation = cursor.u32()?;
            let kind = cursor.u8()?;
            if kind == b'N' {
                Message::Update { relation, old: None, new: cursor.tuple()? }
            } else {
                let old = cursor.old_image(kind)?;
                let kind = cursor.u8()?;
                Message::Update { relation, old: Some(old), new: cursor.new_image(kind)? }
            }
        }
        b'D' => {
            let relation = cursor.u32()?;
            let kind = cursor.u8()?;
            Message::Delete { relation, old: cursor.old_image(kind)? }
        }
        b'B' => {
            let commit_lsn = cursor.u64()?;
            let time = cursor.time()?;
            Message::Begin { commit_lsn, time, xid: cursor.u32()? }
        }
        b'C' => {
            cursor.array::<9>()?;
            let end_lsn = cursor.u64()?;
            Message::Commit { end_lsn, time: cursor.time()? }
        }
        b'R' => Message::Relation(relation(&mut cursor)?),
        b'T' => {
            let count = cursor.u32()? as usize;
            cursor.u8()?;
            let bytes = count.checked_mul(4).ok_or_else(cut_off)?;
            let (ids, rest) = cursor.0.split_at_checked(bytes).ok_or_else(cut_off)?;
            cursor.0 = rest;
            Message::Truncate { relations: Relations(ids) }
        }
        b'M' => logical(&mut cursor)?,
        b'S' => {
            let xid = cursor.u32()?;
            // Whether it is the first block of the transaction on this connection, which is known.
            cursor.u8()?;
            Message::StreamStart { xid }
        }
        b'c' => {
            let xid = cursor.u32()?;
            cursor.u8()?;
            let (commit_lsn, end_lsn) = (cursor.u64()?, cursor.u64()?);
            Message::StreamCommit(StreamCommit { xid, commit_lsn, end_lsn, time: cursor.time()? })
        }
        b'A' => Message::StreamAbort { xid: cursor.u32()?, subxid: cursor.u32()? },
        b'O' | b'Y' => return Ok(Message::Other),
        kind => return Err(Error::protocol(format_args!("log message of kind {kind:#04x}"))),
    };
    if cursor.0.is_empty() { Ok(message) } else { Err(Error::protocol("a log message is too long")) }
}

fn logical<'a>(cursor: &mut Cursor<'a>) -> Result<Message<'a>, Error> {
    let is_transactional = cursor.u8()? & 1 != 0;
    cursor.u64()?;
    let prefix = cursor.terminated()?;
    let len = cursor.u32()? as usize;
    let (content, rest) = cursor.0.split_at_checked(len).ok_or_else(cut_off)?;
    cursor.0 = rest;
    Ok(if is_transactional { Message::Logical { prefix, content } } else { Message::Other })
}

fn relation(cursor: &mut Cursor<'_>) -> Result<Relation, Error> {
    let id = cursor.u32()?;
    let schema = cursor.text()?;
    let name = cursor.text()?;
    let identity = cursor.u8()?;
    let count = cursor.u16()?;
    let mut columns = Vec::with_capacity(usize::from(count).min(1600));
    for _ in 0..count {
        columns.push(RelationColumn {
            key: cursor.u8()? & 1 != 0,
            name: cursor.text()?,
            type_oid: cursor.u32()?,
            type_mod: i32::from_be_bytes(cursor.array()?),
        });
    }
    Ok(Relation { id, schema, name, identity, columns })
}

#[cfg(test)]
mod tests;
