//! Keys as bytes: an order-preserving encoding of a table's primary key, in which key ranges are told.
//!
//! A table is divided by key only if equal keys always have equal bytes; a key whose equality is not decided by its
//! text alone makes the table indivisible ([`KeyCodec::new`] answers `None`), nothing is guessed.
//!
//! | column type | bytes | order |
//! |---|---|---|
//! | `boolean` | one byte | the database's |
//! | `smallint`, `integer`, `bigint`, `oid` | eight bytes, sign bit inverted | the database's |
//! | `numeric` | class, exponent, pairs of digits; without trailing zeros | the database's, `NaN` last |
//! | `date`, `time`, `timestamp` with and without zone | days or microseconds as eight bytes | the database's, `infinity` at the ends |
//! | `uuid` | sixteen bytes | the database's |
//! | `bytea`, `text`, `varchar`, `char(n)` without its blanks, `bit`, `varbit` | the bytes, escaped and ended | of the bytes (`COLLATE "C"`) |
//!
//! Indivisible are tables with a key of any other type: floating point (its text depends on settings), enumerations
//! (labels may be renamed), `timetz`, `interval`, JSON, arrays, extensions' types, and text with a nondeterministic
//! collation ([`TypeKind::Nondeterministic`]). Domains are as what is below them.
//!
//! - **KE-1** The encoding of a key is never empty, and none is the beginning of another one.
//! - **KE-2** Keys that the database calls equal have equal bytes, other keys have different ones.

mod moment;
mod number;

use crate::{Datum, ReplicaIdentity, TableInfo, Tuple, TypeKind};

/// Ends a value of variable length.
const END: [u8; 2] = [0, 0];
/// Stands for a zero byte in such a value.
const ZERO: [u8; 2] = [0, 0xff];

/// How a column of the key becomes bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KeyForm {
    /// `t` or `f`.
    Bool,
    /// A whole number of at most 64 bits.
    Int,
    /// A decimal number of any length.
    Numeric,
    /// Days.
    Date,
    /// Microseconds of a day.
    Time,
    /// Microseconds, without a zone.
    Timestamp,
    /// Microseconds in UTC.
    TimestampTz,
    /// Sixteen bytes.
    Uuid,
    /// Bytes, told as `\x` and hex digits.
    Bytes,
    /// Text; also bit strings.
    Text,
    /// Text whose trailing blanks mean nothing.
    Padded,
}

impl KeyForm {
    fn of(kind: &TypeKind) -> Option<Self> {
        Some(match kind {
            TypeKind::Bool => KeyForm::Bool,
            TypeKind::Int16 | TypeKind::Int32 | TypeKind::Int64 => KeyForm::Int,
            TypeKind::Numeric { .. } => KeyForm::Numeric,
            TypeKind::Date => KeyForm::Date,
            TypeKind::Time => KeyForm::Time,
            TypeKind::Timestamp => KeyForm::Timestamp,
            TypeKind::TimestampTz => KeyForm::TimestampTz,
            TypeKind::Uuid => KeyForm::Uuid,
            TypeKind::Bytes => KeyForm::Bytes,
            TypeKind::Text | TypeKind::Varchar(_) | TypeKind::Bit(_) => KeyForm::Text,
            TypeKind::Char(_) => KeyForm::Padded,
            TypeKind::Domain(inner) => return Self::of(inner),
            TypeKind::Nondeterministic(_)
            | TypeKind::Float32
            | TypeKind::Float64
            | TypeKind::TimeTz
            | TypeKind::Interval
            | TypeKind::Json
            | TypeKind::Jsonb
            | TypeKind::Xml
            | TypeKind::Enum(_)
            | TypeKind::Array(_)
            | TypeKind::Other => return None,
        })
    }

    /// Appends a value; `None` when the text is none of this form.
    fn put(self, text: &[u8], out: &mut Vec<u8>) -> Option<()> {
        match self {
            KeyForm::Bool => out.push(match text {
                b"f" => 0,
                b"t" => 1,
                _ => return None,
            }),
            KeyForm::Int => put_i64(std::str::from_utf8(text).ok()?.parse().ok()?, out),
            KeyForm::Numeric => number::put(text, out)?,
            KeyForm::Date => put_i64(moment::date(text)?, out),
            KeyForm::Time => put_i64(moment::time(text)?, out),
            KeyForm::Timestamp => put_i64(moment::timestamp(text, false)?, out),
            KeyForm::TimestampTz => put_i64(moment::timestamp(text, true)?, out),
            KeyForm::Uuid => put_uuid(text, out)?,
            KeyForm::Bytes => put_hex(text, out)?,
            KeyForm::Text => put_text(text, out),
            KeyForm::Padded => {
                let end = text.iter().rposition(|b| *b != b' ').map_or(0, |at| at + 1);
                put_text(&text[..end], out);
            }
        }
        Some(())
    }

    /// Takes a value off the front of `key`; `None` when there is none.
    fn take(self, key: &mut &[u8]) -> Option<String> {
        Some(match self {
            KeyForm::Bool => match take_bytes::<1>(key)? {
                [0] => "f".to_owned(),
                [1] => "t".to_owned(),
                _ => return None,
            },
            KeyForm::Int => take_i64(key)?.to_string(),
            KeyForm::Numeric => number::take(key)?,
            KeyForm::Date => moment::date_text(take_i64(key)?)?,
            KeyForm::Time => moment::time_text(take_i64(key)?)?,
            KeyForm::Timestamp => moment::timestamp_text(take_i64(key)?, false)?,
            KeyForm::TimestampTz => moment::timestamp_text(take_i64(key)?, true)?,
            KeyForm::Uuid => {
                let hex = hex_text(&take_bytes::<16>(key)?);
                format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
            }
            KeyForm::Bytes => format!("\\x{}", hex_text(&take_text(key)?)),
            KeyForm::Text | KeyForm::Padded => String::from_utf8(take_text(key)?).ok()?,
        })
    }
}

/// Why a row has no key bytes. Holds no value.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum KeyError {
    /// An image lacks a value of its key.
    #[error("a row change came without its key")]
    Missing,
    /// A value is not what its column's type says.
    #[error("a value of the key in column {column} is none of its type")]
    Malformed {
        /// Position in [`TableInfo::columns`].
        column: usize,
    },
    /// A row moves to another key range, and the log lacks values of it that stayed as they were.
    #[error("an update moves a row into another key range, but the log holds only a part of the row")]
    Incomplete,
}

/// The key encoding of one table shape.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeyCodec {
    parts: Box<[(usize, KeyForm)]>,
    /// Columns whose values are in the log.
    logged: Box<[bool]>,
}

impl KeyCodec {
    /// The encoding of a table's primary key. `None` when the table cannot be divided by it: no primary key, another
    /// unique key beside it (rows of different ranges could then collide), a column whose equality is not that of its
    /// text, a key that old images do not hold, or one that the log does not have.
    #[must_use]
    pub fn new(table: &TableInfo) -> Option<Self> {
        let [key] = &table.keys[..] else { return None };
        let held = |column: &usize| match &table.identity {
            ReplicaIdentity::Full => true,
            ReplicaIdentity::Key(columns) => columns.contains(column),
            ReplicaIdentity::Nothing => false,
        };
        if !key.primary || key.columns.is_empty() || !key.columns.iter().all(held) {
            return None;
        }
        let part = |&column: &usize| {
            let info = table.columns.get(column).filter(|info| info.generated.is_none())?;
            Some((column, KeyForm::of(&info.ty.kind)?))
        };
        Some(Self {
            parts: key.columns.iter().map(part).collect::<Option<_>>()?,
            logged: table.columns.iter().map(|column| column.generated.is_none()).collect(),
        })
    }

    /// The columns of the key by position in [`TableInfo::columns`], in key order, each with its form.
    #[must_use]
    pub fn parts(&self) -> &[(usize, KeyForm)] {
        &self.parts
    }

    /// Replaces `out` by the key of an image; what `image` does not hold is taken from `fallback`.
    ///
    /// # Errors
    /// When a value of the key is missing or malformed.
    pub fn encode(
        &self,
        image: Tuple<'_>,
        fallback: Option<Tuple<'_>>,
        out: &mut Vec<u8>,
    ) -> Result<(), KeyError> {
        out.clear();
        for &(column, form) in &self.parts {
            let value = match image.get(column) {
                Some(Datum::Unchanged) | None => fallback.and_then(|tuple| tuple.get(column)),
                value => value,
            };
            let Some(Datum::Text(text)) = value else { return Err(KeyError::Missing) };
            form.put(text, out).ok_or(KeyError::Malformed { column })?;
        }
        Ok(())
    }

    /// The bytes of a key that is given by its values in key order; `None` when they are none.
    #[must_use]
    pub fn encode_values(&self, values: &[&str]) -> Option<Vec<u8>> {
        if values.len() != self.parts.len() {
            return None;
        }
        let mut out = Vec::new();
        for ((_, form), value) in self.parts.iter().zip(values) {
            form.put(value.as_bytes(), &mut out)?;
        }
        Some(out)
    }

    /// The values of a key in key order, each in a text that the database reads as this value; `None` when the bytes
    /// are no key. Row values: not for logs.
    #[must_use]
    pub fn decode(&self, mut key: &[u8]) -> Option<Vec<String>> {
        let values: Vec<String> =
            self.parts.iter().map(|(_, form)| form.take(&mut key)).collect::<Option<_>>()?;
        key.is_empty().then_some(values)
    }

    /// Whether an image holds every value that the log can have.
    #[must_use]
    pub fn is_complete(&self, image: Tuple<'_>) -> bool {
        image.len() == self.logged.len()
            && image.iter().zip(&self.logged).all(|(value, logged)| !logged || value != Datum::Unchanged)
    }
}

impl TableInfo {
    /// Whether the rows of the table can be divided into key ranges.
    #[must_use]
    pub fn is_divisible(&self) -> bool {
        KeyCodec::new(self).is_some()
    }
}

fn put_i64(value: i64, out: &mut Vec<u8>) {
    out.extend_from_slice(&(value ^ i64::MIN).to_be_bytes());
}

fn take_i64(key: &mut &[u8]) -> Option<i64> {
    Some(i64::from_be_bytes(take_bytes::<8>(key)?) ^ i64::MIN)
}

fn take_bytes<const N: usize>(key: &mut &[u8]) -> Option<[u8; N]> {
    let (first, rest) = key.split_first_chunk::<N>()?;
    *key = rest;
    Some(*first)
}

fn put_text(text: &[u8], out: &mut Vec<u8>) {
    let mut rest = text;
    while let Some(at) = rest.iter().position(|b| *b == 0) {
        out.extend_from_slice(&rest[..at]);
        out.extend_from_slice(&ZERO);
        rest = &rest[at + 1..];
    }
    out.extend_from_slice(rest);
    out.extend_from_slice(&END);
}

fn take_text(key: &mut &[u8]) -> Option<Vec<u8>> {
    let mut text = Vec::new();
    loop {
        let at = key.iter().position(|b| *b == 0)?;
        text.extend_from_slice(&key[..at]);
        let mark = *key.get(at + 1)?;
        *key = &key[at + 2..];
        match mark {
            0 => return Some(text),
            0xff => text.push(0),
            _ => return None,
        }
    }
}

fn nibble(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
}

fn put_uuid(text: &[u8], out: &mut Vec<u8>) -> Option<()> {
    if text.len() != 36 {
        return None;
    }
    let mut high = None;
    for (at, &digit) in text.iter().enumerate() {
        if matches!(at, 8 | 13 | 18 | 23) {
            if digit != b'-' {
                return None;
            }
            continue;
        }
        let digit = nibble(digit)?;
        match high.take() {
            None => high = Some(digit),
            Some(high) => out.push(high << 4 | digit),
        }
    }
    Some(())
}

fn put_hex(text: &[u8], out: &mut Vec<u8>) -> Option<()> {
    let digits = text.strip_prefix(b"\\x")?;
    if !digits.len().is_multiple_of(2) {
        return None;
    }
    for pair in digits.chunks_exact(2) {
        match nibble(pair[0])? << 4 | nibble(pair[1])? {
            0 => out.extend_from_slice(&ZERO),
            byte => out.push(byte),
        }
    }
    out.extend_from_slice(&END);
    Some(())
}

fn hex_text(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a string takes everything");
        text
    })
}

#[cfg(test)]
mod tests;
