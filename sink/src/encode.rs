//! Encodings of row changes as text: canal-json, debezium JSON and CSV (dataplane §7).
//!
//! Shared rules:
//!
//! - A value that the upstream did not send ([`Datum::Unchanged`]) is never written as NULL. An update takes
//!   it from the old image where that has it. Otherwise canal-json leaves the column out of `data` (or writes
//!   [`EncodeOptions::canal_unchanged`]), debezium writes `__debezium_unavailable_value`, and CSV writes
//!   [`CsvOptions::unchanged`].
//! - An old image that holds only the replica identity leaves the other columns out (canal-json, debezium) or
//!   writes the CSV marker.
//! - Generated columns are skipped.
//! - Every encoding carries `(commit ts, row number)` where it has room, so that a consumer can drop repeated
//!   rows: canal-json in `_tidb.commitTs` and `_tidb.rowNumber`, debezium in `source.commit_ts` and
//!   `source.row`, CSV the commit ts if asked for.
//! - A value that does not fit its type is an [`EncodeError`]; it names the column and never quotes the value.
//!
//! Types go to the nearest one of MySQL and of debezium:
//!
//! | kind | canal-json: mysqlType, sqlType, value | debezium: schema, value | CSV |
//! |---|---|---|---|
//! | Bool | tinyint −6, `1` `0` | boolean, true false | `true` `false` |
//! | Int16, Int32, Int64 | smallint 5, int 4, bigint −5, decimal | int16, int32, int64, number | number |
//! | Float32, Float64 | float 7, double 8, shortest decimal without exponent | float, double, number; `"NaN"` `"Infinity"` `"-Infinity"` | as upstream |
//! | Numeric | decimal 3, as upstream | string, as upstream (or double) | string |
//! | Char, Varchar | char 1, varchar 12, text | string | string |
//! | Text, Xml | text 2005, text | string, `io.debezium.data.Xml` for xml | string |
//! | Bytes | blob 2004, ISO-8859-1 text | bytes, base64 | base64 or hex, string |
//! | Date | date 91, as upstream | int32 `io.debezium.time.Date`; the infinities are the ends of int32 | string |
//! | Time | time 92, as upstream | int64 `io.debezium.time.MicroTime` | string |
//! | TimeTz | varchar 12, as upstream | string `io.debezium.time.ZonedTime` | string |
//! | Timestamp | datetime 93, as upstream | int64 `io.debezium.time.Timestamp` (≤ 3 digits) or `MicroTimestamp`; the infinities as debezium has them; after the year 294246 an error | string |
//! | TimestampTz | timestamp 93, without `+00` | string `io.debezium.time.ZonedTimestamp` | string, as upstream |
//! | Interval | varchar 12, as upstream | string, as upstream | string |
//! | Uuid | char 1 | string `io.debezium.data.Uuid` | string |
//! | Json, Jsonb | json 12 | string `io.debezium.data.Json` | string |
//! | Bit, fixed, 1 to 64 | bit −7, decimal | boolean for 1, else bytes `io.debezium.data.Bits`, little endian | decimal |
//! | Bit, longer or varying | varchar 12, digits | string, digits | string |
//! | Enum | enum 4, position from 1 | string `io.debezium.data.Enum` | string |
//! | Array, Other | text 2005, as upstream | string, as upstream | string |
//! | Domain | as its base type | as its base type | as its base type |
//!
//! A label that the table's shape does not know yet (`ALTER TYPE … ADD VALUE`) is written as text.

mod canal_json;
mod csv;
mod debezium;
pub(crate) mod json;
pub(crate) mod moment;
pub(crate) mod value;

pub(crate) use self::debezium::UNAVAILABLE;

use std::sync::Arc;

use event::{Datum, RowChange, RowOp, TableInfo};
use heartbeatpb::WallTime;

/// Which encoding.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    /// One canal-json object per row.
    CanalJson,
    /// One debezium envelope per row.
    Debezium,
    /// One or two records per row.
    Csv,
}

impl Format {
    /// Reads a protocol name; `None` when files cannot have it.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        match name.to_ascii_lowercase().as_str() {
            "canal-json" => Some(Self::CanalJson),
            "debezium" => Some(Self::Debezium),
            "csv" => Some(Self::Csv),
            _ => None,
        }
    }

    /// Extension of data files, with its dot.
    #[must_use]
    pub const fn extension(self) -> &'static str {
        match self {
            Self::CanalJson | Self::Debezium => ".json",
            Self::Csv => ".csv",
        }
    }

    /// The protocol's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::CanalJson => "canal-json",
            Self::Debezium => "debezium",
            Self::Csv => "csv",
        }
    }
}

/// How debezium writes numeric values.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum DecimalMode {
    /// As a string with every digit; also carries NaN and the infinities.
    #[default]
    Exact,
    /// As a JSON number of type double, which loses digits.
    Double,
}

/// How bytes look in CSV.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum BinaryEncoding {
    /// Base64 with padding.
    #[default]
    Base64,
    /// Lower-case hexadecimal.
    Hex,
}

/// What may be chosen about CSV.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CsvOptions {
    /// Between two values.
    pub delimiter: String,
    /// Around strings; `None` escapes with backslashes instead.
    pub quote: Option<char>,
    /// NULL, unquoted.
    pub null: String,
    /// A value that the upstream did not send, unquoted. In an `I` record that directly follows a `D` record
    /// of the same commit it stands for the deleted row's value.
    pub unchanged: String,
    /// Whether the commit ts is a column.
    pub include_commit_ts: bool,
    /// How bytes look.
    pub binary: BinaryEncoding,
    /// Whether an update is a `D` and an `I` record with a column that says so.
    pub output_old_value: bool,
    /// Whether a file begins with the names of the columns.
    pub header: bool,
}

impl Default for CsvOptions {
    fn default() -> Self {
        Self {
            delimiter: ",".into(),
            quote: Some('"'),
            null: "\\N".into(),
            unchanged: "\\U".into(),
            include_commit_ts: false,
            binary: BinaryEncoding::Base64,
            output_old_value: false,
            header: false,
        }
    }
}

/// Everything that may be chosen about an encoding.
#[derive(Clone, PartialEq, Eq, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is one key of the configuration")]
pub struct EncodeOptions {
    /// Which encoding.
    pub format: Format,
    /// Ends each row.
    pub terminator: String,
    /// canal-json: `old` of an update holds only columns that changed.
    pub only_updated_columns: bool,
    /// canal-json and debezium: a delete holds only key columns.
    pub only_key_on_delete: bool,
    /// canal-json: whether rows have the `_tidb` object. Files need it so that readers can stop at the checkpoint.
    pub canal_extension: bool,
    /// canal-json: text of a value that the upstream did not send; `None` leaves the column out.
    pub canal_unchanged: Option<String>,
    /// debezium: whether each envelope carries its schema.
    pub debezium_schema: bool,
    /// debezium: whether an update has a `before`.
    pub debezium_old_value: bool,
    /// debezium: whether `source` has the start ts.
    pub debezium_start_ts: bool,
    /// debezium: numeric values.
    pub debezium_decimal: DecimalMode,
    /// debezium: first part of schema names.
    pub cluster_id: String,
    /// CSV.
    pub csv: CsvOptions,
}

impl EncodeOptions {
    /// The defaults of an encoding.
    #[must_use]
    pub fn new(format: Format) -> Self {
        Self {
            format,
            terminator: "\r\n".into(),
            only_updated_columns: false,
            only_key_on_delete: false,
            canal_extension: true,
            canal_unchanged: None,
            debezium_schema: true,
            debezium_old_value: true,
            debezium_start_ts: false,
            debezium_decimal: DecimalMode::Exact,
            cluster_id: "default".into(),
            csv: CsvOptions::default(),
        }
    }
}

/// Why a row cannot be encoded. Holds no value.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// A value is not text of its type.
    #[error("a value of column {column:?} of {table} is not valid {expected}")]
    Malformed {
        /// Schema and table.
        table: String,
        /// The column.
        column: String,
        /// What it should be.
        expected: &'static str,
    },
    /// An image has another number of columns than the table.
    #[error("a row of {table} has {got} columns where the table has {expected}")]
    Columns {
        /// Schema and table.
        table: String,
        /// Of the image.
        got: usize,
        /// Of the table.
        expected: usize,
    },
    /// An insert, update or delete without the image it must have.
    #[error("a row of {table} has no image")]
    NoImage {
        /// Schema and table.
        table: String,
    },
}

/// Encodes the rows of one version of one table.
#[derive(Debug)]
pub struct TableEncoder(Kind);

#[derive(Debug)]
enum Kind {
    CanalJson(canal_json::CanalJson),
    Debezium(debezium::Debezium),
    Csv(csv::Csv),
}

impl TableEncoder {
    /// An encoder for `table`; prepares everything that is the same for each row.
    #[must_use]
    pub fn new(options: &Arc<EncodeOptions>, table: &TableInfo) -> Self {
        Self(match options.format {
            Format::CanalJson => Kind::CanalJson(canal_json::CanalJson::new(options, table)),
            Format::Debezium => Kind::Debezium(debezium::Debezium::new(options, table)),
            Format::Csv => Kind::Csv(csv::Csv::new(options, table)),
        })
    }

    /// Appends what a file begins with, usually nothing.
    pub fn header(&self, out: &mut Vec<u8>) {
        match &self.0 {
            Kind::CanalJson(_) | Kind::Debezium(_) => {}
            Kind::Csv(csv) => csv.header(out),
        }
    }

    /// Appends one row, `built` being the time of encoding. Truncations and copy marks append nothing: they
    /// are schema files. On an error `out` is as before.
    ///
    /// # Errors
    /// When a value is not text of its type, or the row's images do not fit the table.
    pub fn encode(&self, row: &RowChange<'_>, built: WallTime, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        let start = out.len();
        let result = match &self.0 {
            Kind::CanalJson(canal) => canal.encode(row, built, out),
            Kind::Debezium(debezium) => debezium.encode(row, built, out),
            Kind::Csv(csv) => csv.encode(row, out),
        };
        if result.is_err() {
            out.truncate(start);
        }
        result
    }
}

/// What every encoding knows about its table.
#[derive(Debug)]
struct Shape {
    /// `schema.table`, for errors.
    name: String,
    columns: Vec<ShapeColumn>,
    /// Positions in [`TableInfo::columns`] of the key that identifies a row.
    key: Option<Vec<usize>>,
    /// Positions that an absent old image vouches for: they did not change.
    identity: Vec<usize>,
    /// Number of columns of the table, generated ones included.
    width: usize,
}

/// A column that is written.
#[derive(Debug)]
struct ShapeColumn {
    index: usize,
    name: String,
    class: value::Class,
    in_key: bool,
}

/// The images of a row, with unchanged values filled in where they are known.
struct Images<'a> {
    old: Option<Vec<Datum<'a>>>,
    new: Option<Vec<Datum<'a>>>,
}

impl Shape {
    fn new(table: &TableInfo) -> Self {
        let key = table.handle_key().map(|key| key.columns.clone());
        let columns = table
            .columns
            .iter()
            .enumerate()
            .filter(|(_, column)| column.generated.is_none())
            .map(|(index, column)| ShapeColumn {
                index,
                name: column.name.clone(),
                class: value::Class::of(&column.ty),
                in_key: key.as_ref().is_some_and(|key| key.contains(&index)),
            })
            .collect();
        let identity = match &table.identity {
            event::ReplicaIdentity::Key(columns) => columns.clone(),
            event::ReplicaIdentity::Full | event::ReplicaIdentity::Nothing => Vec::new(),
        };
        Self {
            name: format!("{}.{}", table.schema, table.name),
            columns,
            key,
            identity,
            width: table.columns.len(),
        }
    }

    /// The images that `row` has to have; `None` for rows without images.
    fn images<'a>(&self, row: &RowChange<'a>) -> Result<Option<Images<'a>>, EncodeError> {
        let collect = |tuple: Option<event::Tuple<'a>>| match tuple {
            None => Ok(None),
            Some(tuple) if tuple.len() == self.width => Ok(Some(tuple.iter().collect::<Vec<_>>())),
            Some(tuple) => {
                Err(EncodeError::Columns { table: self.name.clone(), got: tuple.len(), expected: self.width })
            }
        };
        let (old, mut new) = (collect(row.old)?, collect(row.new)?);
        let complete = match row.op {
            RowOp::Truncate | RowOp::CopyStart => return Ok(None),
            RowOp::Insert | RowOp::Update => new.is_some(),
            RowOp::Delete => old.is_some(),
        };
        if !complete {
            return Err(EncodeError::NoImage { table: self.name.clone() });
        }
        if let (Some(old), Some(new)) = (&old, &mut new) {
            for (new, old) in new.iter_mut().zip(old) {
                if *new == Datum::Unchanged {
                    *new = *old;
                }
            }
        }
        Ok(Some(Images { old, new }))
    }

    fn malformed(&self, column: &ShapeColumn, expected: &'static str) -> EncodeError {
        EncodeError::Malformed { table: self.name.clone(), column: column.name.clone(), expected }
    }

    /// Whether `old` and `new` are different rows to a consumer that knows rows by their key.
    fn key_changed(&self, images: &Images<'_>) -> bool {
        let (Some(old), Some(new)) = (&images.old, &images.new) else { return false };
        match &self.key {
            Some(key) => {
                key.iter().any(|&column| old[column] != Datum::Unchanged && old[column] != new[column])
            }
            None => true,
        }
    }
}
