//! canal-json, the variant for files: one object per row.
//!
//! Keys in order: id, database, table, pkNames, isDdl, type, es, ts, sql, sqlType, mysqlType, old, data, `_tidb`.
//! `_tidb` (on by default in files, because a reader needs the commit ts to stop at the checkpoint) holds
//! commitTs, startTs, rowNumber, and `onlyHandleKey: true` where the row holds only its key. An update whose
//! old image the upstream did not send has the key columns in `old`, which are known not to have changed.

use std::sync::Arc;

use event::{Datum, RowChange, RowOp, TableInfo};
use heartbeatpb::WallTime;

use super::value::{self, Class};
use super::{EncodeError, EncodeOptions, Images, Shape, ShapeColumn, json};

#[derive(Debug)]
pub(super) struct CanalJson {
    shape: Shape,
    options: Arc<EncodeOptions>,
    /// From `{` up to the value of `type`.
    head: Vec<u8>,
    /// From `sql` to `mysqlType`, for all columns and for the key alone.
    types: [Vec<u8>; 2],
    /// `"name":` of each column.
    names: Vec<Vec<u8>>,
}

impl CanalJson {
    pub(super) fn new(options: &Arc<EncodeOptions>, table: &TableInfo) -> Self {
        let shape = Shape::new(table);
        let mut head = b"{\"id\":0,\"database\":".to_vec();
        json::string(&mut head, &table.schema);
        head.extend_from_slice(b",\"table\":");
        json::string(&mut head, &table.name);
        head.extend_from_slice(b",\"pkNames\":");
        match &shape.key {
            None => head.extend_from_slice(b"null"),
            Some(key) => {
                head.push(b'[');
                for (at, &column) in key.iter().enumerate() {
                    comma(&mut head, at > 0);
                    json::string(&mut head, &table.columns[column].name);
                }
                head.push(b']');
            }
        }
        head.extend_from_slice(b",\"isDdl\":false,\"type\":\"");
        let names = shape
            .columns
            .iter()
            .map(|column| {
                let mut name = json::quoted(&column.name);
                name.push(b':');
                name
            })
            .collect();
        let types = [false, true].map(|only_key| {
            let mut out = b",\"sql\":\"\",\"sqlType\":{".to_vec();
            let columns = || shape.columns.iter().filter(|column| !only_key || column.in_key).enumerate();
            for (at, column) in columns() {
                comma(&mut out, at > 0);
                json::string(&mut out, &column.name);
                json::display(&mut out, format_args!(":{}", column.class.mysql().java));
            }
            out.extend_from_slice(b"},\"mysqlType\":{");
            for (at, column) in columns() {
                comma(&mut out, at > 0);
                json::string(&mut out, &column.name);
                out.push(b':');
                json::string(&mut out, column.class.mysql().name);
            }
            out.push(b'}');
            out
        });
        Self { shape, options: Arc::clone(options), head, types, names }
    }

    pub(super) fn encode(
        &self,
        row: &RowChange<'_>,
        built: WallTime,
        out: &mut Vec<u8>,
    ) -> Result<(), EncodeError> {
        let Some(images) = self.shape.images(row)? else { return Ok(()) };
        let delete = row.op == RowOp::Delete;
        let only_key = delete && self.options.only_key_on_delete && self.shape.key.is_some();
        out.extend_from_slice(&self.head);
        let kind = match row.op {
            RowOp::Insert => "INSERT",
            RowOp::Update => "UPDATE",
            RowOp::Delete | RowOp::Truncate | RowOp::CopyStart => "DELETE",
        };
        let (es, ts) = (row.txn.commit_time.millis(), built.millis());
        json::display(out, format_args!("{kind}\",\"es\":{es},\"ts\":{ts}"));
        out.extend_from_slice(&self.types[usize::from(only_key)]);
        out.extend_from_slice(b",\"old\":");
        if row.op == RowOp::Update {
            self.old(&images, out)?;
        } else {
            out.extend_from_slice(b"null");
        }
        out.extend_from_slice(b",\"data\":");
        let image = if delete { &images.old } else { &images.new };
        let image = image.as_deref().unwrap_or_default();
        self.object(image, out, |column| !only_key || column.in_key, !delete)?;
        if self.options.canal_extension {
            let (commit_ts, start_ts) = (row.txn.commit_ts, row.txn.start_ts);
            let number = row.row_number;
            json::display(
                out,
                format_args!(
                    ",\"_tidb\":{{\"commitTs\":{commit_ts},\"startTs\":{start_ts},\"rowNumber\":{number}"
                ),
            );
            let partial =
                delete && self.shape.columns.iter().any(|column| image[column.index] == Datum::Unchanged);
            out.extend_from_slice(if only_key || partial { b",\"onlyHandleKey\":true}" } else { b"}" });
        }
        out.push(b'}');
        out.extend_from_slice(self.options.terminator.as_bytes());
        Ok(())
    }

    fn old(&self, images: &Images<'_>, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        let new = images.new.as_deref().unwrap_or_default();
        match images.old.as_deref() {
            Some(old) => {
                let changed = |column: &ShapeColumn| old[column.index] != new[column.index];
                self.object(old, out, |column| !self.options.only_updated_columns || changed(column), false)
            }
            None => {
                let vouched = |column: &ShapeColumn| self.shape.identity.contains(&column.index);
                self.object(new, out, |column| !self.options.only_updated_columns && vouched(column), false)
            }
        }
    }

    /// `[{"column":"value",…}]`, without what the upstream did not send.
    fn object(
        &self,
        image: &[Datum<'_>],
        out: &mut Vec<u8>,
        wanted: impl Fn(&ShapeColumn) -> bool,
        mark_unchanged: bool,
    ) -> Result<(), EncodeError> {
        out.extend_from_slice(b"[{");
        let mut any = false;
        for (column, name) in self.shape.columns.iter().zip(&self.names) {
            let datum = image[column.index];
            let marker = self.options.canal_unchanged.as_deref().filter(|_| mark_unchanged);
            if !wanted(column) || datum == Datum::Unchanged && marker.is_none() {
                continue;
            }
            comma(out, any);
            any = true;
            out.extend_from_slice(name);
            match datum {
                Datum::Null => out.extend_from_slice(b"null"),
                Datum::Unchanged => json::string(out, marker.unwrap_or_default()),
                Datum::Text(text) => self.value(column, text, out)?,
            }
        }
        out.extend_from_slice(b"}]");
        Ok(())
    }

    fn value(&self, column: &ShapeColumn, text: &[u8], out: &mut Vec<u8>) -> Result<(), EncodeError> {
        let text = std::str::from_utf8(text).map_err(|_| self.shape.malformed(column, "UTF-8"))?;
        let bad = |expected| self.shape.malformed(column, expected);
        match &column.class {
            Class::Bool => {
                let value = value::boolean(text).ok_or_else(|| bad("boolean"))?;
                out.extend_from_slice(if value { b"\"1\"" } else { b"\"0\"" });
            }
            Class::Float32 | Class::Float64 => {
                let plain = value::plain_float(text).ok_or_else(|| bad("float"))?;
                json::string(out, &plain);
            }
            Class::Bytes => {
                let bytes = value::bytes(text).ok_or_else(|| bad("bytea"))?;
                let latin: String = bytes.into_iter().map(char::from).collect();
                json::string(out, &latin);
            }
            Class::TimestampTz => json::string(out, &value::plain_utc(text)),
            Class::Bit(_) => {
                let bits = value::bits(text).ok_or_else(|| bad("bit string"))?;
                json::display(out, format_args!("\"{bits}\""));
            }
            Class::Enum(labels) => match labels.iter().position(|label| label == text) {
                Some(at) => json::display(out, format_args!("\"{}\"", at + 1)),
                None => json::string(out, text),
            },
            Class::Int16
            | Class::Int32
            | Class::Int64
            | Class::Numeric { .. }
            | Class::Char(_)
            | Class::Varchar(_)
            | Class::Text
            | Class::Date
            | Class::Time
            | Class::TimeTz
            | Class::Timestamp { .. }
            | Class::Interval
            | Class::Uuid
            | Class::Json
            | Class::LongBit
            | Class::Xml
            | Class::Other => json::string(out, text),
        }
        Ok(())
    }
}

fn comma(out: &mut Vec<u8>, needed: bool) {
    if needed {
        out.push(b',');
    }
}
