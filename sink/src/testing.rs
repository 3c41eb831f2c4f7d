//! Hand-made tables and batches for the tests of this crate.

use std::sync::Arc;

use bytes::BytesMut;
use event::{
    Column, ColumnType, Datum, IdentityKind, ReplicaIdentity, RowBatch, RowOp, TableInfo, TupleWriter,
    TxnMark, TypeKind, UniqueKey, put_row,
};
use heartbeatpb::{SchemaId, TableId, Ts, WallTime};

/// A NOT NULL column of a built-in type.
pub(crate) fn column(name: &str, kind: TypeKind, sql: &str) -> Column {
    Column {
        name: name.into(),
        ty: ColumnType { kind, sql: sql.into(), oid: 0, definitions: Vec::new() },
        nullable: false,
        generated: None,
        identity: IdentityKind::None,
        default: None,
    }
}

/// A table `t<id>` with `columns` text columns, of which the first is the primary key and the others are nullable.
pub(crate) fn table(id: i64, columns: usize) -> Arc<TableInfo> {
    let columns = (0..columns)
        .map(|i| Column { nullable: i > 0, ..column(&format!("c{i}"), TypeKind::Text, "text") })
        .collect();
    Arc::new(TableInfo {
        id: TableId(id),
        schema_id: SchemaId(1),
        schema: "public".into(),
        name: format!("t{id}"),
        version: Ts(1),
        columns,
        keys: vec![key(&[0], true)],
        identity: ReplicaIdentity::Key(vec![0]),
    })
}

/// A unique key.
pub(crate) fn key(columns: &[usize], primary: bool) -> UniqueKey {
    UniqueKey {
        name: format!("key_{columns:?}"),
        columns: columns.to_vec(),
        primary,
        nulls_not_distinct: false,
    }
}

/// Builds a batch row by row; `\N` is NULL and `\U` unchanged.
pub(crate) struct BatchBuilder {
    table: Arc<TableInfo>,
    txns: Vec<TxnMark>,
    rows: BytesMut,
}

fn datum(text: &str) -> Datum<'_> {
    match text {
        "\\N" => Datum::Null,
        "\\U" => Datum::Unchanged,
        text => Datum::Text(text.as_bytes()),
    }
}

fn write(out: &mut BytesMut, values: &[&str]) {
    let mut writer = TupleWriter::new(out);
    for value in values {
        writer.push(datum(value));
    }
    writer.finish();
}

impl BatchBuilder {
    pub(crate) fn new(table: &Arc<TableInfo>) -> Self {
        Self { table: Arc::clone(table), txns: Vec::new(), rows: BytesMut::new() }
    }

    pub(crate) fn op(mut self, ts: u64, op: RowOp, old: Option<&[&str]>, new: Option<&[&str]>) -> Self {
        match self.txns.last_mut() {
            Some(txn) if txn.commit_ts == Ts(ts) => txn.rows += 1,
            _ => self.txns.push(TxnMark {
                commit_ts: Ts(ts),
                start_ts: Ts(ts - 1),
                commit_time: WallTime(0),
                rows: 1,
                first_row: 0,
            }),
        }
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

    pub(crate) fn insert(self, ts: u64, new: &[&str]) -> Self {
        self.op(ts, RowOp::Insert, None, Some(new))
    }

    pub(crate) fn build(self) -> RowBatch {
        RowBatch::new(self.table, self.txns, self.rows.freeze()).expect("well formed")
    }
}
