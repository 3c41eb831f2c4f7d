//! Schema changes and sync points.
//!
//! The life of one that concerns several tables, here `DROP TABLE t`, whose participants are `t` and the table trigger:
//!
//! ```text
//!  log        event store gives it to t and to the trigger, after their rows up to its commit ts
//!              │                                   │
//!  t          flush rows, report "waiting"        trigger: the same
//!              │                                   │
//!  maintainer  └──────────▶ all are there ◀────────┘
//!                                 │ write
//!  trigger                        ▼ the sink executes it and notes that it did, in one transaction; "done"
//!                                 │
//!  maintainer                     ▼ the table is removed (new ones are placed, moved ones change their schema)
//!                                 │ pass, repeated until each says "done"
//!  others                         ▼ go on behind it
//! ```
//!
//! One that concerns a whole table alone is executed by its dispatcher; one that concerns the trigger alone, such as
//! `CREATE TABLE`, by the trigger, which then tells the maintainer of the new tables and holds its checkpoint until that
//! is acknowledged. A process that dies anywhere on the way meets the event again: the sink knows whether it ran, and a
//! table that is past it begins just in front of it, without rows at it, and meets it again.

use std::sync::Arc;

use heartbeatpb::{AddedTable, InfluencedTables, SchemaChange, SchemaId, TableId, Ts, WallTime};

use crate::TableInfo;

/// What a DDL does, as far as placement and codecs distinguish it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[non_exhaustive]
pub enum DdlKind {
    /// `CREATE SCHEMA`.
    CreateSchema,
    /// `DROP SCHEMA`.
    DropSchema,
    /// `CREATE TABLE`.
    CreateTable,
    /// `DROP TABLE`.
    DropTable,
    /// A rename of a table.
    RenameTable,
    /// Columns, constraints, indexes, comments of one table.
    AlterTable,
    /// A truncation that gives the table another id: the old one ends and the new one begins.
    TruncateTable,
    /// Anything else: blocks every table.
    Other,
}

/// A schema change at its place in commit order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DdlEvent {
    /// Commit ts.
    pub commit_ts: Ts,
    /// Identifies its transaction.
    pub start_ts: Ts,
    /// Upstream wall time of the commit.
    pub commit_time: WallTime,
    /// What it does.
    pub kind: DdlKind,
    /// Its schema.
    pub schema_id: SchemaId,
    /// Its table, the one that ends in a truncation; [`TableId::DDL`] for a schema.
    pub table_id: TableId,
    /// Schema name, before a rename.
    pub schema: String,
    /// Table name, before a rename; empty for a schema.
    pub table: String,
    /// The statement.
    pub query: String,
    /// Shape afterwards, with the name that a rename gave it.
    pub table_info: Option<Arc<TableInfo>>,
    /// Participants of its barrier.
    pub blocked: Option<InfluencedTables>,
    /// Tables that end.
    pub dropped: Option<InfluencedTables>,
    /// Tables that begin.
    pub added: Vec<AddedTable>,
    /// Tables that change their schema.
    pub schema_changes: Vec<SchemaChange>,
    /// Tracked, but not executed downstream.
    pub not_sync: bool,
    /// Set: the event cannot be followed, and the changefeed must fail with this text.
    pub error: Option<String>,
}

impl DdlEvent {
    /// A change that names nothing, concerns nobody and changes no table: what is special about one is added.
    #[must_use]
    pub fn new(kind: DdlKind, commit_ts: Ts) -> Self {
        Self {
            commit_ts,
            start_ts: commit_ts.before(),
            commit_time: WallTime::default(),
            kind,
            schema_id: SchemaId::DDL,
            table_id: TableId::DDL,
            schema: String::new(),
            table: String::new(),
            query: String::new(),
            table_info: None,
            blocked: None,
            dropped: None,
            added: Vec::new(),
            schema_changes: Vec::new(),
            not_sync: false,
            error: None,
        }
    }
}

/// A sync point: every table has exactly the events at or before it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SyncPointEvent {
    /// Its position.
    pub commit_ts: Ts,
}

/// An event that its dispatcher executes alone.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum BlockEvent {
    /// A schema change.
    Ddl(Arc<DdlEvent>),
    /// A sync point.
    SyncPoint(SyncPointEvent),
}
