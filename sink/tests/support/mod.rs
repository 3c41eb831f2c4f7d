//! Hand-made tables and batches for the tests of encodings and files.
#![allow(dead_code, reason = "each test uses a part")]

use std::sync::Arc;

use bytes::BytesMut;
use event::{
    Column, ColumnType, Datum, IdentityKind, ReplicaIdentity, RowBatch, RowOp, TableInfo, TupleWriter,
    TxnMark, TypeKind, UniqueKey, put_row,
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
pub(crate) struct Rows {
    table: Arc<TableInfo>,
    txns: Vec<TxnMark>,
    rows: BytesMut,
}

fn write(out: &mut BytesMut, values: &[&str]) {
    let mut writer = TupleWriter::new(out);
    for value in values {
        writer.push(match *value {
            "\\N" => Datum::Null,
            "\\U" => Datum::Unchanged,
            text => Datum::Text(text.as_bytes()),
        });
    }
    writer.finish();
}

impl Rows {
    pub(crate) fn of(table: &Arc<TableInfo>) -> Self {
        Self { table: Arc::clone(table), txns: Vec::new(), rows: BytesMut::new() }
    }

    /// Begins a transaction whose rows of this table are numbered from `first_row`.
    pub(crate) fn at(mut self, ts: u64, first_row: u64) -> Self {
        let time = WallTime(1_700_000_000_000_000 + i64::try_from(ts).expect("small") * 1000);
        let txn = TxnMark { commit_ts: Ts(ts), start_ts: Ts(ts - 1), commit_time: time, rows: 0, first_row };
        self.txns.push(txn);
        self
    }

    pub(crate) fn op(mut self, op: RowOp, old: Option<&[&str]>, new: Option<&[&str]>) -> Self {
        self.txns.last_mut().expect("a transaction").rows += 1;
        let mut write_old = |out: &mut BytesMut| write(out, old.unwrap_or_default());
        let mut write_new = |out: &mut BytesMut| write(out, new.unwrap_or_default());
        put_row(
            &mut self.rows,
            op,
            old.map(|_| &mut write_old as &mut dyn FnMut(&mut BytesMut)),
            new.map(|_| &mut write_new as &mut dyn FnMut(&mut BytesMut)),
        );
        self
    }

    pub(crate) fn insert(self, new: &[&str]) -> Self {
        self.op(RowOp::Insert, None, Some(new))
    }

    /// An insert of values in which nothing has a special meaning.
    pub(crate) fn insert_values(mut self, new: &[Option<String>]) -> Self {
        self.txns.last_mut().expect("a transaction").rows += 1;
        let mut write = |out: &mut BytesMut| {
            let mut writer = TupleWriter::new(out);
            for value in new {
                writer.push(value.as_ref().map_or(Datum::Null, |value| Datum::Text(value.as_bytes())));
            }
            writer.finish();
        };
        put_row(&mut self.rows, RowOp::Insert, None, Some(&mut write));
        self
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
        RowBatch::new(self.table, self.txns, self.rows.freeze()).expect("well formed")
    }
}
