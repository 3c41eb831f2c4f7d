//! Building blocks of SQL text, and values as the driver sends them.

use std::io::Write as _;

use bytes::{BufMut, BytesMut};
use event::Datum;
use postgres_types::{IsNull, ToSql, Type, to_sql_checked};

/// A quoted identifier.
pub(crate) fn quote(name: &str) -> String {
    let mut out = String::with_capacity(name.len() + 2);
    out.push('"');
    for c in name.chars() {
        if c == '"' {
            out.push('"');
        }
        out.push(c);
    }
    out.push('"');
    out
}

/// A quoted, qualified name.
pub(crate) fn qualified(schema: &str, name: &str) -> String {
    format!("{}.{}", quote(schema), quote(name))
}

/// A quoted string. Sessions have `standard_conforming_strings` on.
pub(crate) fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// Bytes as hex digits.
pub(crate) struct Hex<'a>(pub(crate) &'a [u8]);

impl std::fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// One column of many rows as a `text[]` parameter in binary form: the bytes of each value without escapes.
#[derive(Debug)]
pub(crate) struct TextArray {
    bytes: Vec<u8>,
    count: i32,
}

const TEXT_OID: u32 = 25;
const COUNT_AT: usize = 12;
/// Bytes before the first value.
const HEAD: usize = 20;
/// Bytes of the length before a value.
const LENGTH: usize = 4;
/// Bytes that a value may be longer than expected.
const SPARE: usize = 8;

impl TextArray {
    /// For so many values, most of which are short.
    pub(crate) fn new(values: usize) -> Self {
        Self::for_values(values, 0)
    }

    /// For so many values, which will have about so many bytes together.
    pub(crate) fn for_values(values: usize, len: usize) -> Self {
        let room = values.saturating_mul(LENGTH + SPARE).saturating_add(len);
        let mut bytes = Vec::with_capacity(HEAD + room);
        bytes.put_i32(1); // dimensions
        bytes.put_i32(1); // may hold nulls
        bytes.put_u32(TEXT_OID);
        bytes.put_i32(0); // count, filled in when sent
        bytes.put_i32(1); // lower bound
        Self { bytes, count: 0 }
    }

    /// Appends a value; `Unchanged` must have been dealt with before and goes as NULL.
    pub(crate) fn push(&mut self, datum: Datum<'_>) {
        match datum {
            Datum::Text(text) => {
                // A value is at most 1 GiB: PostgreSQL's limit, which decoders enforce.
                let len = u32::try_from(text.len()).unwrap_or(u32::MAX);
                self.bytes.extend_from_slice(&len.to_be_bytes());
                self.bytes.extend_from_slice(text);
            }
            Datum::Null | Datum::Unchanged => self.bytes.extend_from_slice(&(-1_i32).to_be_bytes()),
        }
        self.count = self.count.saturating_add(1);
    }

    pub(crate) fn push_text(&mut self, text: &str) {
        self.push(Datum::Text(text.as_bytes()));
    }

    /// Appends the text of a value that has one.
    pub(crate) fn push_text_of(&mut self, value: impl std::fmt::Display) {
        let at = self.bytes.len();
        self.bytes.extend_from_slice(&[0; LENGTH]);
        // A vector takes everything.
        let _ = write!(self.bytes, "{value}");
        let len = u32::try_from(self.bytes.len() - at - LENGTH).unwrap_or(u32::MAX);
        self.bytes[at..at + LENGTH].copy_from_slice(&len.to_be_bytes());
        self.count = self.count.saturating_add(1);
    }

    /// Appends the array in the form in which it is sent.
    pub(crate) fn put(&self, out: &mut BytesMut) {
        out.extend_from_slice(&self.bytes[..COUNT_AT]);
        out.put_i32(self.count);
        out.extend_from_slice(&self.bytes[COUNT_AT + 4..]);
    }
}

impl ToSql for TextArray {
    fn to_sql(
        &self,
        _ty: &Type,
        out: &mut BytesMut,
    ) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        self.put(out);
        Ok(IsNull::No)
    }

    fn accepts(ty: &Type) -> bool {
        *ty == Type::TEXT_ARRAY
    }

    to_sql_checked!();
}

/// Appends one value in the text form of `COPY`.
pub(crate) fn copy_value(out: &mut BytesMut, datum: Datum<'_>) {
    let Datum::Text(text) = datum else {
        out.put_slice(b"\\N");
        return;
    };
    let mut rest = text;
    while let Some(at) = rest.iter().position(|b| matches!(b, b'\\' | b'\n' | b'\r' | b'\t')) {
        out.put_slice(&rest[..at]);
        out.put_slice(match rest[at] {
            b'\n' => b"\\n",
            b'\r' => b"\\r",
            b'\t' => b"\\t",
            _ => b"\\\\",
        });
        rest = &rest[at + 1..];
    }
    out.put_slice(rest);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_in_names_are_doubled() {
        assert_eq!(qualified("a\"b", "Tä"), "\"a\"\"b\".\"Tä\"");
    }

    #[test]
    fn quotes_in_strings_are_doubled() {
        assert_eq!(literal("it's \\"), "'it''s \\'");
    }

    #[test]
    fn copy_text_escapes_what_copy_would_interpret() {
        let mut out = BytesMut::new();
        copy_value(&mut out, Datum::Text(b"a\\b\tc\nd\re"));
        out.put_u8(b'|');
        copy_value(&mut out, Datum::Null);
        assert_eq!(&out[..], b"a\\\\b\\tc\\nd\\re|\\N");
    }

    #[test]
    fn a_text_array_carries_its_count_and_nulls() {
        let mut array = TextArray::new(3);
        array.push_text("ab");
        array.push(Datum::Null);
        array.push_text_of(-17);
        let mut out = BytesMut::new();
        array.to_sql(&Type::TEXT_ARRAY, &mut out).expect("never fails");
        assert_eq!(&out[12..16], &3i32.to_be_bytes());
        assert_eq!(&out[20..], &[0, 0, 0, 2, b'a', b'b', 255, 255, 255, 255, 0, 0, 0, 3, b'-', b'1', b'7']);
    }
}
