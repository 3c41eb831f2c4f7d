//! The shape of a table at a point of its history.

use heartbeatpb::{SchemaId, TableId, Ts};
use serde::{Deserialize, Serialize};

/// One version of a table's shape. Immutable; shared by `Arc`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TableInfo {
    /// Physical id.
    pub id: TableId,
    /// Id of its schema.
    pub schema_id: SchemaId,
    /// Schema name, unquoted.
    pub schema: String,
    /// Table name, unquoted.
    pub name: String,
    /// Commit ts from which this shape is valid (a DDL's, or the start ts).
    pub version: Ts,
    /// Columns in table order, without dropped ones.
    pub columns: Vec<Column>,
    /// Unique keys, the primary key first if there is one.
    pub keys: Vec<UniqueKey>,
    /// What old images contain.
    pub identity: ReplicaIdentity,
}

/// A column.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Column {
    /// Name, unquoted.
    pub name: String,
    /// Type.
    pub ty: ColumnType,
    /// Whether NULL is allowed.
    pub nullable: bool,
    /// Generated (computed) by the database: its values are not in the log and must not be written.
    pub generated: Option<String>,
    /// `GENERATED … AS IDENTITY`.
    pub identity: IdentityKind,
    /// Default expression in the upstream's dialect.
    pub default: Option<String>,
}

/// `GENERATED … AS IDENTITY` of a column.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum IdentityKind {
    /// Not an identity column.
    #[default]
    None,
    /// `ALWAYS`.
    Always,
    /// `BY DEFAULT`.
    ByDefault,
}

/// The type of a column: a neutral kind for codecs and the upstream's own words for exact round trips.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ColumnType {
    /// Neutral kind.
    pub kind: TypeKind,
    /// The type in the upstream's SQL with its modifiers, schema-qualified where not built in,
    /// such as `numeric(10,2)`, `timestamp(3) with time zone`, `"app"."mood"`.
    pub sql: String,
    /// The upstream's type id (PostgreSQL: oid), 0 when it has none.
    pub oid: u32,
    /// How to create the type where it is missing, in order of dependency; empty for built-in types.
    pub definitions: Vec<TypeDefinition>,
}

/// A user-defined type that a target may have to create.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TypeDefinition {
    /// Schema, unquoted.
    pub schema: String,
    /// Name, unquoted.
    pub name: String,
    /// Complete statement that creates it.
    pub create_sql: String,
}

/// Neutral column types: what codecs distinguish. Values are text in the form given for each.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub enum TypeKind {
    /// `t` or `f`.
    Bool,
    /// Decimal.
    Int16,
    /// Decimal.
    Int32,
    /// Decimal.
    Int64,
    /// Shortest text that reads back; `NaN`, `Infinity`, `-Infinity`.
    Float32,
    /// As [`TypeKind::Float32`].
    Float64,
    /// Decimal text of any length; `NaN`, `Infinity`, `-Infinity`.
    Numeric {
        /// Digits, if limited.
        precision: Option<u32>,
        /// Digits after the point.
        scale: i32,
    },
    /// Blank-padded text.
    Char(Option<u32>),
    /// Text with an optional limit.
    Varchar(Option<u32>),
    /// Text.
    Text,
    /// `\x` and lower-case hex digits.
    Bytes,
    /// `YYYY-MM-DD`, `infinity`, `… BC`.
    Date,
    /// `HH:MM:SS[.ffffff]`.
    Time,
    /// Time with an offset.
    TimeTz,
    /// `YYYY-MM-DD HH:MM:SS[.ffffff]`, `infinity`, `… BC`.
    Timestamp,
    /// As [`TypeKind::Timestamp`] with an offset, in UTC.
    TimestampTz,
    /// ISO or `postgres` style interval.
    Interval,
    /// Hyphenated lower-case hex.
    Uuid,
    /// JSON text.
    Json,
    /// Normalised JSON text.
    Jsonb,
    /// `0` and `1` digits.
    Bit(Option<u32>),
    /// XML text.
    Xml,
    /// One of the labels.
    Enum(Vec<String>),
    /// `{…}` array literal of the element type.
    Array(Box<TypeKind>),
    /// A domain over another type.
    Domain(Box<TypeKind>),
    /// Text under a nondeterministic collation: values with different bytes may be equal to the database.
    Nondeterministic(Box<TypeKind>),
    /// Anything else: network, geometric, range, composite, text search, …
    Other,
}

impl TypeKind {
    /// The type below domains and collations.
    #[must_use]
    pub fn base(&self) -> &TypeKind {
        let mut kind = self;
        while let TypeKind::Domain(inner) | TypeKind::Nondeterministic(inner) = kind {
            kind = inner;
        }
        kind
    }
}

/// A unique key: a primary key, or a complete, immediate unique index over plain columns.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct UniqueKey {
    /// Name of the index.
    pub name: String,
    /// Positions in [`TableInfo::columns`], in key order.
    pub columns: Vec<usize>,
    /// Whether it is the primary key.
    pub primary: bool,
    /// Whether two NULLs collide.
    pub nulls_not_distinct: bool,
}

/// What the old image of an update or a delete contains.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum ReplicaIdentity {
    /// The columns of a unique key, by position in [`TableInfo::columns`].
    Key(Vec<usize>),
    /// Every column.
    Full,
    /// Nothing: only inserts can be replicated.
    Nothing,
}

impl TableInfo {
    /// The primary key.
    #[must_use]
    pub fn primary_key(&self) -> Option<&UniqueKey> {
        self.keys.iter().find(|key| key.primary)
    }

    /// The key that identifies a row: the primary key, else the first unique key whose columns are all
    /// NOT NULL. `None` for a table without a usable key.
    #[must_use]
    pub fn handle_key(&self) -> Option<&UniqueKey> {
        self.primary_key()
            .or_else(|| self.keys.iter().find(|key| key.columns.iter().all(|&c| !self.columns[c].nullable)))
    }

    /// Position of a column.
    #[must_use]
    pub fn column_index(&self, name: &str) -> Option<usize> {
        self.columns.iter().position(|column| column.name == name)
    }
}
