//! Hand-made tables and batches for the tests of encodings and files.
#![allow(dead_code, reason = "each test uses a part")]

use std::sync::Arc;

use event::testing::BatchBuilder;
use event::{
    Column, ColumnType, IdentityKind, ReplicaIdentity, RowBatch, RowOp, TableInfo, TypeKind, UniqueKey,
};
use heartbeatpb::{SchemaId, TableId, Ts, WallTime};

pub(crate) fn column(name: &str, kind: TypeKind, sql: &str, nullable: bool) -> Column {
    let ty = ColumnType { kind, sql: sql.into(), oid: 0, definitions: Vec::new() };
    Column { name: name.into(), ty, nullable, generated: None, identity: IdentityKind::None, default: None }
}

pub(crate) fn table(
    id: i64,
    name: &str,
    version: u64,
    columns: Vec<Column>,
    key: &[usize],
) -> Arc<TableInfo> {
    let keys = if key.is_empty() {
        Vec::new()
    } else {
        vec![UniqueKey {
            name: format!("{name}_pkey"),
            columns: key.to_vec(),
            primary: true,
            nulls_not_distinct: false,
        }]
    };
    let identity = if key.is_empty() { ReplicaIdentity::Full } else { ReplicaIdentity::Key(key.to_vec()) };
    Arc::new(TableInfo {
        id: TableId(id),
        schema_id: SchemaId(1),
        schema: "app".into(),
        name: name.into(),
        version: Ts(version),
        columns,
        keys,
        identity,
    })
}

/// `id bigint PRIMARY KEY, note text`.
pub(crate) fn notes(id: i64, version: u64) -> Arc<TableInfo> {
    let columns =
        vec![column("id", TypeKind::Int64, "bigint", false), column("note", TypeKind::Text, "text", true)];
    table(id, &format!("notes{id}"), version, columns, &[0])
}

/// Builds a batch row by row; `\N` is NULL and `\U` unchanged.
pub(crate) struct Rows(BatchBuilder);

impl Rows {
    pub(crate) fn of(table: &Arc<TableInfo>) -> Self {
        Self(BatchBuilder::new(table))
    }

    /// Begins a transaction whose rows of this table are numbered from `first_row`.
    pub(crate) fn at(self, ts: u64, first_row: u64) -> Self {
        let time = WallTime(1_700_000_000_000_000 + i64::try_from(ts).expect("small") * 1000);
        Self(self.0.begin(ts, time, first_row))
    }

    pub(crate) fn op(self, op: RowOp, old: Option<&[&str]>, new: Option<&[&str]>) -> Self {
        Self(self.0.row(op, old, new))
    }

    pub(crate) fn insert(self, new: &[&str]) -> Self {
        self.op(RowOp::Insert, None, Some(new))
    }

    /// An insert of values in which nothing has a special meaning.
    pub(crate) fn insert_values(self, new: &[Option<String>]) -> Self {
        Self(self.0.insert_values(new))
    }

    pub(crate) fn update(self, old: Option<&[&str]>, new: &[&str]) -> Self {
        self.op(RowOp::Update, old, Some(new))
    }

    pub(crate) fn delete(self, old: &[&str]) -> Self {
        self.op(RowOp::Delete, Some(old), None)
    }

    pub(crate) fn truncate(self) -> Self {
        self.op(RowOp::Truncate, None, None)
    }

    pub(crate) fn copy_start(self) -> Self {
        self.op(RowOp::CopyStart, None, None)
    }

    pub(crate) fn build(self) -> RowBatch {
        self.0.build()
    }
}
