//! CSV: operation, table, schema, [commit ts], [is-update], then the columns in table order.
//!
//! An update is one `U` record. With `output-old-value` it is a `D` and an `I` record. It is those two also
//! when its key changed or its table has no key, because a consumer could not find the old row otherwise.

use std::sync::Arc;

use event::{Datum, RowChange, RowOp, TableInfo};

use super::value::{self, Class};
use super::{BinaryEncoding, EncodeError, EncodeOptions, Shape, ShapeColumn, json};

#[derive(Debug)]
pub(super) struct Csv {
    shape: Shape,
    options: Arc<EncodeOptions>,
    /// Table and schema with a delimiter before each.
    names: Vec<u8>,
}

impl Csv {
    pub(super) fn new(options: &Arc<EncodeOptions>, table: &TableInfo) -> Self {
        let mut csv = Self { shape: Shape::new(table), options: Arc::clone(options), names: Vec::new() };
        let mut names = Vec::new();
        for name in [&table.name, &table.schema] {
            csv.delimiter(&mut names);
            csv.string(&mut names, name);
        }
        csv.names = names;
        csv
    }

    pub(super) fn header(&self, out: &mut Vec<u8>) {
        let csv = &self.options.csv;
        if !csv.header {
            return;
        }
        let mut meta = vec!["operation", "table", "schema"];
        if csv.include_commit_ts {
            meta.push("commit-ts");
        }
        if csv.output_old_value {
            meta.push("is-update");
        }
        for (at, name) in meta.iter().enumerate() {
            if at > 0 {
                self.delimiter(out);
            }
            self.string(out, &format!("ticdc-meta${name}"));
        }
        for column in &self.shape.columns {
            self.delimiter(out);
            self.string(out, &column.name);
        }
        out.extend_from_slice(self.options.terminator.as_bytes());
    }

    pub(super) fn encode(&self, row: &RowChange<'_>, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        let Some(images) = self.shape.images(row)? else { return Ok(()) };
        let update = row.op == RowOp::Update;
        let split = update && (self.options.csv.output_old_value || self.shape.key_changed(&images));
        match (&images.old, &images.new) {
            (Some(old), Some(new)) if split => {
                self.record("D", row, old, update, out)?;
                self.record("I", row, new, update, out)
            }
            (_, Some(new)) => self.record(if update { "U" } else { "I" }, row, new, update, out),
            (Some(old), None) => self.record("D", row, old, update, out),
            (None, None) => Ok(()),
        }
    }

    fn record(
        &self,
        op: &str,
        row: &RowChange<'_>,
        image: &[Datum<'_>],
        update: bool,
        out: &mut Vec<u8>,
    ) -> Result<(), EncodeError> {
        let csv = &self.options.csv;
        self.string(out, op);
        out.extend_from_slice(&self.names);
        if csv.include_commit_ts {
            self.delimiter(out);
            json::display(out, format_args!("{}", row.txn.commit_ts));
        }
        if csv.output_old_value {
            self.delimiter(out);
            json::display(out, format_args!("{update}"));
        }
        for column in &self.shape.columns {
            self.delimiter(out);
            match image[column.index] {
                Datum::Null => out.extend_from_slice(csv.null.as_bytes()),
                Datum::Unchanged => out.extend_from_slice(csv.unchanged.as_bytes()),
                Datum::Text(text) => self.value(column, text, out)?,
            }
        }
        out.extend_from_slice(self.options.terminator.as_bytes());
        Ok(())
    }

    fn value(&self, column: &ShapeColumn, text: &[u8], out: &mut Vec<u8>) -> Result<(), EncodeError> {
        let text = std::str::from_utf8(text).map_err(|_| self.shape.malformed(column, "UTF-8"))?;
        let bad = |expected| self.shape.malformed(column, expected);
        match &column.class {
            Class::Bool => {
                let value = value::boolean(text).ok_or_else(|| bad("boolean"))?;
                json::display(out, format_args!("{value}"));
            }
            Class::Int16 | Class::Int32 | Class::Int64 => {
                if !value::is_integer(text) {
                    return Err(bad("integer"));
                }
                out.extend_from_slice(text.as_bytes());
            }
            Class::Float32 | Class::Float64 => {
                if !value::is_special(text) && !json::is_number(text.as_bytes()) {
                    return Err(bad("float"));
                }
                out.extend_from_slice(text.as_bytes());
            }
            Class::Bit(_) => {
                let bits = value::bits(text).ok_or_else(|| bad("bit string"))?;
                json::display(out, format_args!("{bits}"));
            }
            Class::Bytes => {
                let bytes = value::bytes(text).ok_or_else(|| bad("bytea"))?;
                match self.options.csv.binary {
                    BinaryEncoding::Base64 => self.string(out, &value::base64(&bytes)),
                    BinaryEncoding::Hex => self.string(out, &value::hex(&bytes)),
                }
            }
            Class::Numeric { .. }
            | Class::Char(_)
            | Class::Varchar(_)
            | Class::Text
            | Class::Date
            | Class::Time
            | Class::TimeTz
            | Class::Timestamp { .. }
            | Class::TimestampTz
            | Class::Interval
            | Class::Uuid
            | Class::Json
            | Class::LongBit
            | Class::Xml
            | Class::Enum(_)
            | Class::Other => self.string(out, text),
        }
        Ok(())
    }

    fn delimiter(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self.options.csv.delimiter.as_bytes());
    }

    fn string(&self, out: &mut Vec<u8>, text: &str) {
        let mut buffer = [0; 4];
        let Some(quote) = self.options.csv.quote else {
            for c in text.chars() {
                match c {
                    '\r' => out.extend_from_slice(b"\\r"),
                    '\n' => out.extend_from_slice(b"\\n"),
                    c => {
                        if c == '\\' || self.options.csv.delimiter.contains(c) {
                            out.push(b'\\');
                        }
                        out.extend_from_slice(c.encode_utf8(&mut buffer).as_bytes());
                    }
                }
            }
            return;
        };
        let quote = quote.encode_utf8(&mut buffer).as_bytes();
        out.extend_from_slice(quote);
        let mut rest = text;
        while let Some(at) = rest.find(self.options.csv.quote.unwrap_or_default()) {
            out.extend_from_slice(&rest.as_bytes()[..at]);
            out.extend_from_slice(quote);
            out.extend_from_slice(quote);
            rest = &rest[at + quote.len()..];
        }
        out.extend_from_slice(rest.as_bytes());
        out.extend_from_slice(quote);
    }
}
