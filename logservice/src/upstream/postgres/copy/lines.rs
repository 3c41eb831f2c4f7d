//! Rows out of lines of COPY's text format.

use event::{Datum, TupleWriter};

use super::super::shape::Shape;
use crate::Error;
use crate::event_store::CopyWriter;

/// Decodes lines of COPY's text format; keeps its scratch space between lines.
#[derive(Default)]
pub(super) struct LineDecoder {
    /// Unescaped values, one after the other.
    scratch: Vec<u8>,
    /// Fields of the line.
    fields: Vec<Field>,
}

#[derive(Clone, Copy)]
enum Field {
    Null,
    /// Range of the line itself.
    Plain(usize, usize),
    /// Range of the scratch space.
    Unescaped(usize, usize),
}

impl LineDecoder {
    /// Decodes one CopyData message, which is one line, into a row.
    pub(super) fn copy_row(
        &mut self,
        line: &[u8],
        shape: &Shape,
        writer: &mut CopyWriter,
    ) -> Result<(), Error> {
        self.parse(line)?;
        // A table without columns has empty lines.
        if self.fields.len() != shape.wire_columns() && !(shape.wire_columns() == 0 && line == b"\n") {
            return Err(Error::protocol(format_args!(
                "copied row of {} columns instead of {}",
                self.fields.len(),
                shape.wire_columns()
            )));
        }
        writer.row(&mut |out| {
            let mut tuple = TupleWriter::new(out);
            shape.put_values(self.values(line), &mut tuple);
            tuple.finish();
        });
        Ok(())
    }

    fn values<'a>(&'a self, line: &'a [u8]) -> impl Iterator<Item = Datum<'a>> {
        self.fields.iter().map(move |field| match *field {
            Field::Null => Datum::Null,
            Field::Plain(from, to) => Datum::Text(&line[from..to]),
            Field::Unescaped(from, to) => Datum::Text(&self.scratch[from..to]),
        })
    }

    fn parse(&mut self, line: &[u8]) -> Result<(), Error> {
        let Some((b'\n', content)) = line.split_last() else {
            return Err(Error::protocol("a copied row has no end of line"));
        };
        self.scratch.clear();
        self.fields.clear();
        let mut from = 0;
        loop {
            let to = memchr::memchr(b'\t', &content[from..]).map_or(content.len(), |at| from + at);
            self.push_field(content, from, to)?;
            if to == content.len() {
                return Ok(());
            }
            from = to + 1;
        }
    }

    fn push_field(&mut self, content: &[u8], from: usize, to: usize) -> Result<(), Error> {
        let raw = &content[from..to];
        if raw == b"\\N" {
            self.fields.push(Field::Null);
            return Ok(());
        }
        let mut escapes = memchr::memchr_iter(b'\\', raw).peekable();
        if escapes.peek().is_none() {
            self.fields.push(Field::Plain(from, to));
            return Ok(());
        }
        let start = self.scratch.len();
        let mut done = 0;
        for at in escapes {
            // The second of two backslashes is part of the first one's escape.
            if at < done {
                continue;
            }
            self.scratch.extend_from_slice(&raw[done..at]);
            let escaped = *raw.get(at + 1).ok_or_else(|| Error::protocol("a copied value ends with \\"))?;
            self.scratch.push(match escaped {
                b'b' => 8,
                b'f' => 12,
                b'n' => b'\n',
                b'r' => b'\r',
                b't' => b'\t',
                b'v' => 11,
                other => other,
            });
            done = at + 2;
        }
        self.scratch.extend_from_slice(&raw[done..]);
        self.fields.push(Field::Unescaped(start, self.scratch.len()));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode(line: &[u8]) -> Result<Vec<Option<Vec<u8>>>, Error> {
        let mut decoder = LineDecoder::default();
        decoder.parse(line)?;
        let values = decoder.values(line).map(|value| match value {
            Datum::Text(text) => Some(text.to_vec()),
            Datum::Null | Datum::Unchanged => None,
        });
        Ok(values.collect())
    }

    fn encode(values: &[Option<Vec<u8>>]) -> Vec<u8> {
        let fields: Vec<Vec<u8>> = values
            .iter()
            .map(|value| match value {
                None => b"\\N".to_vec(),
                Some(text) => text
                    .iter()
                    .flat_map(|&b| match b {
                        8 => b"\\b".to_vec(),
                        12 => b"\\f".to_vec(),
                        b'\n' => b"\\n".to_vec(),
                        b'\r' => b"\\r".to_vec(),
                        b'\t' => b"\\t".to_vec(),
                        11 => b"\\v".to_vec(),
                        b'\\' => b"\\\\".to_vec(),
                        other => vec![other],
                    })
                    .collect(),
            })
            .collect();
        let mut line = fields.join(&b'\t');
        line.push(b'\n');
        line
    }

    #[test]
    fn nulls_empty_values_and_escapes_are_told_apart() {
        let values = decode(b"1\t\\N\t\t\\\\N\ta\\tb\\n\\\\\\\\c\n").expect("decode");
        let text = |text: &[u8]| Some(text.to_vec());
        assert_eq!(values, [text(b"1"), None, text(b""), text(b"\\N"), text(b"a\tb\n\\\\c")]);
        assert!(decode(b"1").is_err());
        assert!(decode(b"a\\\n").is_err());
    }

    proptest! {
        #[test]
        fn what_a_server_writes_is_read_back(
            values in prop::collection::vec(prop::option::of(prop::collection::vec(1u8..=255, 0..12)), 1..6),
        ) {
            prop_assert_eq!(decode(&encode(&values)).expect("decode"), values);
        }

        #[test]
        fn random_lines_never_panic(line in prop::collection::vec(any::<u8>(), 0..40)) {
            drop(decode(&line));
        }
    }
}
