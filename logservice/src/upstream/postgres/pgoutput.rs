//! Decoder of the logical replication stream: WAL messages, and `pgoutput` protocol version 1 inside them.
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
    /// Something without meaning for us: origin, type name, a logical message outside of a transaction.
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

    fn text(&mut self) -> Result<String, Error> {
        let end = memchr::memchr(0, self.0).ok_or_else(cut_off)?;
        let (text, rest) = self.0.split_at(end);
        self.0 = &rest[1..];
        let text = std::str::from_utf8(text).map_err(|_| Error::protocol("a name is not UTF-8"))?;
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

/// The table of a row change of which only the beginning is there, as the content of a CopyData message.
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

/// Decodes a `pgoutput` message.
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
        b'O' | b'Y' => return Ok(Message::Other),
        kind => return Err(Error::protocol(format_args!("log message of kind {kind:#04x}"))),
    };
    if cursor.0.is_empty() { Ok(message) } else { Err(Error::protocol("a log message is too long")) }
}

fn logical<'a>(cursor: &mut Cursor<'a>) -> Result<Message<'a>, Error> {
    let is_transactional = cursor.u8()? & 1 != 0;
    cursor.u64()?;
    let end = memchr::memchr(0, cursor.0).ok_or_else(cut_off)?;
    let (prefix, rest) = cursor.0.split_at(end);
    cursor.0 = &rest[1..];
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
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tuple(values: &[Option<&str>]) -> Vec<u8> {
        let mut out = u16::try_from(values.len()).expect("few").to_be_bytes().to_vec();
        for value in values {
            match value {
                Some("<unchanged>") => out.push(b'u'),
                Some(text) => {
                    out.push(b't');
                    out.extend(u32::try_from(text.len()).expect("short").to_be_bytes());
                    out.extend(text.as_bytes());
                }
                None => out.push(b'n'),
            }
        }
        out
    }

    fn update() -> Vec<u8> {
        let mut message = b"U\0\0\0\x07K".to_vec();
        message.extend(tuple(&[Some("1"), None]));
        message.push(b'N');
        message.extend(tuple(&[Some("2"), Some("<unchanged>")]));
        message
    }

    fn relation_message() -> Vec<u8> {
        b"R\0\0\0\x07app\0t\0d\0\x01\x01id\0\0\0\0\x17\xff\xff\xff\xff".to_vec()
    }

    #[test]
    fn an_update_with_a_key_is_decoded_in_place() {
        let message = update();
        let Message::Update { relation: 7, old: Some(OldImage::Key(old)), new } =
            decode(&message).expect("decode")
        else {
            panic!("not an update")
        };
        assert_eq!(old.iter().collect::<Vec<_>>(), [Datum::Text(b"1"), Datum::Null]);
        assert_eq!(new.iter().collect::<Vec<_>>(), [Datum::Text(b"2"), Datum::Unchanged]);
    }

    #[test]
    fn the_table_of_a_row_is_known_from_its_beginning() {
        let body: Vec<u8> = std::iter::once(b'w').chain([0; 24]).chain(update()).collect();
        assert_eq!(relation_of(&body), Some(7));
        assert_eq!(relation_of(&body[..30]), Some(7));
        assert_eq!(relation_of(&body[..29]), None);
        let body: Vec<u8> = std::iter::once(b'w').chain([0; 24]).chain(relation_message()).collect();
        assert_eq!(relation_of(&body), None);
    }

    #[test]
    fn a_relation_is_decoded() {
        let Message::Relation(relation) = decode(&relation_message()).expect("decode") else {
            panic!("no relation")
        };
        assert_eq!((relation.schema.as_str(), relation.name.as_str(), relation.identity), ("app", "t", b'd'));
        assert_eq!(relation.columns[0].type_oid, 23);
        assert_eq!(relation.columns[0].type_mod, -1);
    }

    fn logical_message() -> Vec<u8> {
        b"M\x01\0\0\0\0\0\0\0\x09pre\0\0\0\0\x02ab".to_vec()
    }

    #[test]
    fn a_logical_message_is_decoded_unless_it_belongs_to_no_transaction() {
        let mut message = logical_message();
        let Message::Logical { prefix, content } = decode(&message).expect("decode") else {
            panic!("no logical message")
        };
        assert_eq!((prefix, content), (&b"pre"[..], &b"ab"[..]));
        message[1] = 0;
        assert!(matches!(decode(&message), Ok(Message::Other)));
    }

    #[test]
    fn every_cut_and_every_addition_is_an_error() {
        for message in [update(), relation_message(), logical_message()] {
            for len in 0..message.len() {
                assert!(decode(&message[..len]).is_err(), "cut at {len}");
            }
            let mut longer = message.clone();
            longer.push(0);
            assert!(decode(&longer).is_err());
        }
        assert!(decode(b"Z").is_err());
        assert!(decode(b"T\xff\xff\xff\xff\0").is_err());
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            drop(decode(&bytes));
            drop(decode_stream(&bytes));
        }

        #[test]
        fn damaged_messages_never_panic(at in 0usize..64, with in any::<u8>(), which in any::<bool>()) {
            let mut message = if which { update() } else { relation_message() };
            let at = at % message.len();
            message[at] = with;
            if let Ok(Message::Update { new, .. }) = decode(&message) {
                prop_assert_eq!(new.iter().count(), new.columns());
            }
        }
    }
}
