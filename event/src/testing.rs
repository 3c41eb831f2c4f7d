//! Hand-made tables and batches for the tests of this crate.

use std::sync::Arc;

use bytes::BytesMut;
use heartbeatpb::{SchemaId, TableId, Ts, WallTime};

use crate::{
    Column, ColumnType, Datum, IdentityKind, ReplicaIdentity, RowBatch, RowOp, TableInfo, Tuple, TupleWriter,
    TxnMark, TypeKind, UniqueKey, put_row,
};

/// A NOT NULL column.
pub(crate) fn column(name: &str, kind: TypeKind) -> Column {
    Column {
        name: name.into(),
        ty: ColumnType { kind, sql: "any".into(), oid: 0, definitions: Vec::new() },
        nullable: false,
        generated: None,
        identity: IdentityKind::None,
        default: None,
    }
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

/// A table whose primary key has columns of these types; a text column follows.
pub(crate) fn table_of(kinds: &[TypeKind]) -> TableInfo {
    let keys: Vec<usize> = (0..kinds.len()).collect();
    let columns = kinds.iter().enumerate().map(|(at, kind)| column(&format!("k{at}"), kind.clone()));
    TableInfo {
        id: TableId(1),
        schema_id: SchemaId(1),
        schema: "public".into(),
        name: "t".into(),
        version: Ts(1),
        columns: columns.chain([Column { nullable: true, ..column("v", TypeKind::Text) }]).collect(),
        keys: vec![key(&keys, true)],
        identity: ReplicaIdentity::Key(keys),
    }
}

/// Builds a batch row by row; `\N` is NULL and `\U` unchanged.
pub(crate) struct BatchBuilder {
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

/// An image as a text.
pub(crate) fn text(image: Tuple<'_>) -> String {
    let values = image.iter().map(|value| match value {
        Datum::Null => "\\N".to_owned(),
        Datum::Unchanged => "\\U".to_owned(),
        Datum::Text(text) => String::from_utf8_lossy(text).into_owned(),
    });
    values.collect::<Vec<_>>().join(",")
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

    pub(crate) fn build(self) -> RowBatch {
        RowBatch::new(self.table, self.txns, self.rows.freeze()).expect("well formed")
    }
}
