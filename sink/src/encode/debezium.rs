//! Debezium JSON: one envelope per row.
//!
//! `source.row` is the position of the row among its transaction's rows of the table, so that
//! `(source.commit_ts, source.row)` identifies a change. Numeric values are strings by default, because a
//! double loses digits. NULL stays null even where the column has a default.

use std::sync::Arc;

use event::{Column, Datum, RowChange, RowOp, TableInfo};
use heartbeatpb::WallTime;
use serde_json::{Value, json};

use super::value::{self, Class};
use super::{DecimalMode, EncodeError, EncodeOptions, Shape, ShapeColumn, json, moment};

/// Stands for a value that the upstream did not send; consumers of debezium know it.
pub(crate) const UNAVAILABLE: &str = "__debezium_unavailable_value";

#[derive(Debug)]
pub(super) struct Debezium {
    shape: Shape,
    options: Arc<EncodeOptions>,
    /// From `{` to the value of `source.ts_ms`.
    head: Vec<u8>,
    /// From the comma behind `source.ts_ms` to the value of `source.row`.
    place: Vec<u8>,
    /// `,"cluster_id":…}` and what follows up to the value of `ts_ms`.
    cluster: Vec<u8>,
    /// The schema and everything behind the payload.
    tail: Vec<u8>,
    /// `"name":` of each column.
    names: Vec<Vec<u8>>,
}

/// A part of a schema name: letters, digits and `_`; not beginning with a digit.
fn sanitise(name: &str) -> String {
    let mut out: String = name
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || c == '_' || c == '-' { c } else { '_' })
        .collect();
    if out.starts_with(|c: char| c.is_ascii_digit() || c == '-') {
        out.insert(0, '_');
    }
    out
}

impl Debezium {
    pub(super) fn new(options: &Arc<EncodeOptions>, table: &TableInfo) -> Self {
        let shape = Shape::new(table);
        let mut head =
            b"{\"payload\":{\"source\":{\"version\":\"2.4.0.Final\",\"connector\":\"millrace\",\"name\":"
                .to_vec();
        json::string(&mut head, &options.cluster_id);
        head.extend_from_slice(b",\"ts_ms\":");
        let mut place = b",\"snapshot\":\"false\",\"db\":".to_vec();
        json::string(&mut place, &table.schema);
        place.extend_from_slice(b",\"table\":");
        json::string(&mut place, &table.name);
        place.extend_from_slice(b",\"server_id\":0,\"gtid\":null,\"file\":\"\",\"pos\":0,\"row\":");
        let mut cluster = b",\"cluster_id\":".to_vec();
        json::string(&mut cluster, &options.cluster_id);
        cluster.extend_from_slice(b"},\"ts_ms\":");
        let mut tail = b"}".to_vec();
        if options.debezium_schema {
            json::display(&mut tail, format_args!(",\"schema\":{}", envelope_schema(options, table, &shape)));
        }
        tail.push(b'}');
        tail.extend_from_slice(options.terminator.as_bytes());
        let names = shape
            .columns
            .iter()
            .map(|column| {
                let mut name = json::quoted(&column.name);
                name.push(b':');
                name
            })
            .collect();
        Self { shape, options: Arc::clone(options), head, place, cluster, tail, names }
    }

    pub(super) fn encode(
        &self,
        row: &RowChange<'_>,
        built: WallTime,
        out: &mut Vec<u8>,
    ) -> Result<(), EncodeError> {
        let Some(images) = self.shape.images(row)? else { return Ok(()) };
        out.extend_from_slice(&self.head);
        json::display(out, format_args!("{}", row.txn.commit_time.millis()));
        out.extend_from_slice(&self.place);
        json::display(
            out,
            format_args!(
                "{},\"thread\":0,\"query\":null,\"commit_ts\":{}",
                row.row_number, row.txn.commit_ts
            ),
        );
        if self.options.debezium_start_ts {
            json::display(out, format_args!(",\"start_ts\":{}", row.txn.start_ts));
        }
        out.extend_from_slice(&self.cluster);
        let (op, before) = match row.op {
            RowOp::Insert => ("c", None),
            RowOp::Update => ("u", images.old.as_deref().filter(|_| self.options.debezium_old_value)),
            RowOp::Delete | RowOp::Truncate | RowOp::CopyStart => ("d", images.old.as_deref()),
        };
        json::display(
            out,
            format_args!("{},\"transaction\":null,\"op\":\"{op}\",\"before\":", built.millis()),
        );
        let only_key = row.op == RowOp::Delete && self.options.only_key_on_delete && self.shape.key.is_some();
        self.image(before, true, only_key, out)?;
        out.extend_from_slice(b",\"after\":");
        self.image(images.new.as_deref(), false, false, out)?;
        out.extend_from_slice(&self.tail);
        Ok(())
    }

    fn image(
        &self,
        image: Option<&[Datum<'_>]>,
        before: bool,
        only_key: bool,
        out: &mut Vec<u8>,
    ) -> Result<(), EncodeError> {
        let Some(image) = image else {
            out.extend_from_slice(b"null");
            return Ok(());
        };
        out.push(b'{');
        let mut any = false;
        for (column, name) in self.shape.columns.iter().zip(&self.names) {
            let datum = image[column.index];
            if only_key && !column.in_key || before && datum == Datum::Unchanged {
                continue;
            }
            if any {
                out.push(b',');
            }
            any = true;
            out.extend_from_slice(name);
            match datum {
                Datum::Null => out.extend_from_slice(b"null"),
                Datum::Unchanged if column.class == Class::Bytes => {
                    json::string(out, &value::base64(UNAVAILABLE.as_bytes()));
                }
                Datum::Unchanged => json::string(out, UNAVAILABLE),
                Datum::Text(text) => self.value(column, text, out)?,
            }
        }
        out.push(b'}');
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
                if !json::is_number(text.as_bytes()) || !value::is_integer(text) {
                    return Err(bad("integer"));
                }
                out.extend_from_slice(text.as_bytes());
            }
            Class::Float32 | Class::Float64 => number(text, out).ok_or_else(|| bad("float"))?,
            Class::Numeric { .. } => match self.options.debezium_decimal {
                DecimalMode::Exact => json::string(out, text),
                DecimalMode::Double => {
                    let double = text.parse::<f64>().map_err(|_| bad("numeric"))?;
                    if double.is_finite() {
                        json::display(out, format_args!("{double}"));
                    } else {
                        number(text, out).ok_or_else(|| bad("numeric"))?;
                    }
                }
            },
            Class::Bytes => {
                let bytes = value::bytes(text).ok_or_else(|| bad("bytea"))?;
                json::string(out, &value::base64(&bytes));
            }
            Class::Bit(1) => {
                let bit = value::bits(text).ok_or_else(|| bad("bit string"))?;
                json::display(out, format_args!("{}", bit == 1));
            }
            Class::Bit(len) => {
                let bits = value::bits(text).ok_or_else(|| bad("bit string"))?;
                let used = len.div_ceil(8) as usize;
                json::string(out, &value::base64(&bits.to_le_bytes()[..used.min(8)]));
            }
            Class::Date => {
                let days = moment::date_days(text).ok_or_else(|| bad("date"))?;
                json::display(out, format_args!("{days}"));
            }
            Class::Time => {
                let micros = moment::time_micros(text).ok_or_else(|| bad("time"))?;
                json::display(out, format_args!("{micros}"));
            }
            Class::Timestamp { millis } => {
                let micros = moment::timestamp_micros(text).ok_or_else(|| bad("timestamp"))?;
                json::display(
                    out,
                    format_args!("{}", if *millis { micros.div_euclid(1000) } else { micros }),
                );
            }
            Class::TimestampTz => {
                json::string(
                    out,
                    &moment::zoned_timestamp(text).ok_or_else(|| bad("timestamp with time zone"))?,
                );
            }
            Class::TimeTz => {
                json::string(out, &moment::zoned_time(text).ok_or_else(|| bad("time with time zone"))?)
            }
            Class::Char(_)
            | Class::Varchar(_)
            | Class::Text
            | Class::Interval
            | Class::Uuid
            | Class::Json
            | Class::LongBit
            | Class::Xml
            | Class::Enum(_)
            | Class::Other => json::string(out, text),
        }
        Ok(())
    }
}

/// A number as it is; NaN and the infinities as strings, which is how debezium has them.
fn number(text: &str, out: &mut Vec<u8>) -> Option<()> {
    if value::is_special(text) {
        json::string(out, text);
    } else if json::is_number(text.as_bytes()) {
        out.extend_from_slice(text.as_bytes());
    } else {
        return None;
    }
    Some(())
}

/// Type, and name and parameters where the type has a meaning beyond it.
fn column_type(class: &Class, decimal: DecimalMode) -> (&'static str, Option<&'static str>, Option<Value>) {
    match class {
        Class::Bool | Class::Bit(1) => ("boolean", None, None),
        Class::Int16 => ("int16", None, None),
        Class::Int32 => ("int32", None, None),
        Class::Int64 => ("int64", None, None),
        Class::Float32 => ("float", None, None),
        Class::Float64 => ("double", None, None),
        Class::Numeric { .. } => match decimal {
            DecimalMode::Exact => ("string", None, None),
            DecimalMode::Double => ("double", None, None),
        },
        Class::Bytes => ("bytes", None, None),
        Class::Bit(len) => {
            ("bytes", Some("io.debezium.data.Bits"), Some(json!({ "length": len.to_string() })))
        }
        Class::Date => ("int32", Some("io.debezium.time.Date"), None),
        Class::Time => ("int64", Some("io.debezium.time.MicroTime"), None),
        Class::TimeTz => ("string", Some("io.debezium.time.ZonedTime"), None),
        Class::Timestamp { millis: true } => ("int64", Some("io.debezium.time.Timestamp"), None),
        Class::Timestamp { millis: false } => ("int64", Some("io.debezium.time.MicroTimestamp"), None),
        Class::TimestampTz => ("string", Some("io.debezium.time.ZonedTimestamp"), None),
        Class::Uuid => ("string", Some("io.debezium.data.Uuid"), None),
        Class::Json => ("string", Some("io.debezium.data.Json"), None),
        Class::Xml => ("string", Some("io.debezium.data.Xml"), None),
        Class::Enum(labels) => {
            ("string", Some("io.debezium.data.Enum"), Some(json!({ "allowed": labels.join(",") })))
        }
        Class::Char(_)
        | Class::Varchar(_)
        | Class::Text
        | Class::Interval
        | Class::LongBit
        | Class::Other => ("string", None, None),
    }
}

fn column_schema(options: &EncodeOptions, class: &Class, column: &Column) -> Value {
    let (kind, name, parameters) = column_type(class, options.debezium_decimal);
    let mut schema = json!({ "type": kind, "optional": column.nullable });
    if let Some(name) = name {
        schema["name"] = name.into();
        schema["version"] = 1.into();
    }
    if let Some(parameters) = parameters {
        schema["parameters"] = parameters;
    }
    schema["field"] = column.name.clone().into();
    schema
}

fn envelope_schema(options: &EncodeOptions, table: &TableInfo, shape: &Shape) -> Value {
    let prefix = [&options.cluster_id, &table.schema, &table.name].map(|part| sanitise(part)).join(".");
    let columns: Vec<Value> = shape
        .columns
        .iter()
        .map(|column| column_schema(options, &column.class, &table.columns[column.index]))
        .collect();
    let image = |field: &str| json!({ "type": "struct", "optional": true, "name": format!("{prefix}.Value"), "field": field, "fields": columns });
    let plain = |kind: &str, optional: bool, field: &str| json!({ "type": kind, "optional": optional, "field": field });
    let mut source = vec![
        plain("string", false, "version"),
        plain("string", false, "connector"),
        plain("string", false, "name"),
        plain("int64", false, "ts_ms"),
        json!({ "type": "string", "optional": true, "name": "io.debezium.data.Enum", "version": 1,
            "parameters": { "allowed": "true,last,false,incremental" }, "default": "false", "field": "snapshot" }),
        plain("string", false, "db"),
        plain("string", true, "table"),
        plain("int64", false, "server_id"),
        plain("string", true, "gtid"),
        plain("string", false, "file"),
        plain("int64", false, "pos"),
        plain("int64", false, "row"),
        plain("int64", true, "thread"),
        plain("string", true, "query"),
        plain("int64", false, "commit_ts"),
    ];
    if options.debezium_start_ts {
        source.push(plain("int64", false, "start_ts"));
    }
    source.push(plain("string", false, "cluster_id"));
    json!({
        "type": "struct",
        "optional": false,
        "name": format!("{prefix}.Envelope"),
        "version": 1,
        "fields": [
            image("before"),
            image("after"),
            { "type": "struct", "optional": false, "name": "io.debezium.connector.mysql.Source", "field": "source", "fields": source },
            plain("string", false, "op"),
            plain("int64", true, "ts_ms"),
            { "type": "struct", "optional": true, "name": "event.block", "version": 1, "field": "transaction", "fields": [
                plain("string", false, "id"),
                plain("int64", false, "total_order"),
                plain("int64", false, "data_collection_order"),
            ] },
        ],
    })
}
