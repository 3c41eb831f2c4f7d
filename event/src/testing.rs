//! Hand-made tables and batches, for tests.

use std::sync::Arc;

use bytes::BytesMut;
use heartbeatpb::{SchemaId, TableId, Ts, WallTime};

use crate::{
    Column, ColumnType, Datum, IdentityKind, ReplicaIdentity, RowBatch, RowOp, TableInfo, Tuple, TupleWriter,
    TxnMark, TypeKind, UniqueKey, put_row,
};

/// A NOT NULL column.
#[must_use]
pub fn column(name: &str, kind: TypeKind) -> Column {
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
#[must_use]
pub fn key(columns: &[usize], primary: bool) -> UniqueKey {
    UniqueKey {
        name: format!("key_{columns:?}"),
        columns: columns.to_vec(),
        primary,
        nulls_not_distinct: false,
    }
}

/// A table whose primary key has columns of these types; a text column follows.
#[must_use]
pub fn table_of(kinds: &[TypeKind]) -> TableInfo {
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

/// Builds a batch row by row; in values `\N` is NULL and `\U` unchanged.
#[derive(Debug)]
pub struct BatchBuilder {
    table: Arc<TableInfo>,
    txns: Vec<TxnMark>,
    rows: BytesMut,
    first_row: u64,
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
#[must_use]
pub fn text(image: Tuple<'_>) -> String {
    let values = image.iter().map(|value| match value {
        Datum::Null => "\\N".to_owned(),
        Datum::Unchanged => "\\U".to_owned(),
        Datum::Text(text) => String::from_utf8_lossy(text).into_owned(),
    });
    values.collect::<Vec<_>>().join(",")
}

impl BatchBuilder {
    /// A batch without rows.
    #[must_use]
    pub fn new(table: &Arc<TableInfo>) -> Self {
        Self { table: Arc::clone(table), txns: Vec::new(), rows: BytesMut::new(), first_row: 0 }
    }

    /// The first transaction continues one whose earlier rows are in another batch.
    #[must_use]
    pub fn continuing(mut self, first_row: u64) -> Self {
        self.first_row = first_row;
        self
    }

    /// Begins a transaction without rows at a time, its rows of this table numbered from `first_row`.
    #[must_use]
    pub fn begin(mut self, ts: u64, commit_time: WallTime, first_row: u64) -> Self {
        let commit_ts = Ts(ts);
        self.txns.push(TxnMark { commit_ts, start_ts: commit_ts.before(), commit_time, rows: 0, first_row });
        self
    }

    /// A row of the transaction that was begun last.
    ///
    /// # Panics
    /// Without a transaction.
    #[must_use]
    pub fn row(mut self, op: RowOp, old: Option<&[&str]>, new: Option<&[&str]>) -> Self {
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

    /// An insert, in the transaction that was begun last, of values in which nothing has a special meaning.
    ///
    /// # Panics
    /// Without a transaction.
    #[must_use]
    pub fn insert_values(mut self, new: &[Option<String>]) -> Self {
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

    /// A row of the transaction at `ts`, which begins if it is not the last one.
    #[must_use]
    pub fn op(mut self, ts: u64, op: RowOp, old: Option<&[&str]>, new: Option<&[&str]>) -> Self {
        if self.txns.last().is_none_or(|txn| txn.commit_ts != Ts(ts)) {
            let first_row = std::mem::take(&mut self.first_row);
            self = self.begin(ts, WallTime(0), first_row);
        }
        self.row(op, old, new)
    }

    /// An inserted row of the transaction at `ts`.
    #[must_use]
    pub fn insert(self, ts: u64, new: &[&str]) -> Self {
        self.op(ts, RowOp::Insert, None, Some(new))
    }

    /// The batch.
    ///
    /// # Panics
    /// When the rows do not fit the table.
    #[must_use]
    pub fn build(self) -> RowBatch {
        RowBatch::new(self.table, self.txns, self.rows.freeze()).expect("well formed")
    }
}
