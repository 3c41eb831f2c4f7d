//! Keeps a table in memory from its row changes, as a consumer of batches would.
//!
//! `cargo run -p event --example materialize`

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::Arc;

use bytes::BytesMut;
use event::{
    Column, ColumnType, Datum, IdentityKind, ReplicaIdentity, RowBatch, RowOp, TableInfo, Tuple, TupleWriter,
    TxnMark, TypeKind, UniqueKey, put_row,
};
use heartbeatpb::{SchemaId, TableId, Ts, WallTime};

/// Rows by their key. `None` is NULL.
type Rows = BTreeMap<Vec<u8>, Vec<Option<Vec<u8>>>>;

fn table() -> TableInfo {
    let column = |name: &str, kind: TypeKind, sql: &str| Column {
        name: name.into(),
        ty: ColumnType { kind, sql: sql.into(), oid: 0, definitions: Vec::new() },
        nullable: true,
        generated: None,
        identity: IdentityKind::None,
        default: None,
    };
    let name = "stock_pkey".into();
    TableInfo {
        id: TableId(1),
        schema_id: SchemaId(1),
        schema: "shop".into(),
        name: "stock".into(),
        version: Ts(1),
        columns: vec![
            column("article", TypeKind::Text, "text"),
            column("pieces", TypeKind::Int32, "integer"),
            column("picture", TypeKind::Text, "text"),
        ],
        keys: vec![UniqueKey { name, columns: vec![0], primary: true, nulls_not_distinct: false }],
        identity: ReplicaIdentity::Key(vec![0]),
    }
}

/// What an upstream's decoder does: every change is written into one buffer, once.
fn write(rows: &mut BytesMut, op: RowOp, old: Option<[Datum<'_>; 3]>, new: Option<[Datum<'_>; 3]>) {
    let image = |values: [Datum<'_>; 3], out: &mut BytesMut| {
        let mut writer = TupleWriter::new(out);
        values.into_iter().for_each(|value| writer.push(value));
        writer.finish();
    };
    let mut old = old.map(|values| move |out: &mut BytesMut| image(values, out));
    let mut new = new.map(|values| move |out: &mut BytesMut| image(values, out));
    put_row(
        rows,
        op,
        old.as_mut().map(|write| write as &mut dyn FnMut(&mut BytesMut)),
        new.as_mut().map(|write| write as &mut dyn FnMut(&mut BytesMut)),
    );
}

fn batch() -> Result<RowBatch, Box<dyn Error>> {
    let text = |text: &'static str| Datum::Text(text.as_bytes());
    let mut rows = BytesMut::new();
    write(&mut rows, RowOp::Insert, None, Some([text("cup"), text("12"), text("(large)")]));
    write(&mut rows, RowOp::Insert, None, Some([text("jug"), Datum::Null, Datum::Null]));
    // The picture is stored out of line and was not touched: the log does not repeat it.
    write(&mut rows, RowOp::Update, None, Some([text("cup"), text("11"), Datum::Unchanged]));
    // The key changed, so the old one is there too.
    let old = [text("jug"), Datum::Unchanged, Datum::Unchanged];
    write(&mut rows, RowOp::Update, Some(old), Some([text("pitcher"), text("3"), Datum::Null]));
    let txn = |commit_ts: u64, rows: u32| TxnMark {
        commit_ts: Ts(commit_ts),
        start_ts: Ts(commit_ts - 1),
        commit_time: WallTime(1_700_000_000_000_000),
        rows,
        first_row: 0,
    };
    Ok(RowBatch::new(Arc::new(table()), vec![txn(100, 2), txn(200, 2)], rows.freeze())?)
}

fn key(tuple: Tuple<'_>) -> Option<Vec<u8>> {
    match tuple.get(0)? {
        Datum::Text(text) => Some(text.to_vec()),
        Datum::Null | Datum::Unchanged => None,
    }
}

fn apply(batch: &RowBatch, rows: &mut Rows) {
    for change in batch.iter() {
        if matches!(change.op, RowOp::Truncate | RowOp::CopyStart) {
            rows.clear();
        }
        let before = change.old.or(change.new).and_then(key).and_then(|key| rows.remove(&key));
        let Some((image, key)) = change.new.and_then(|image| Some((image, key(image)?))) else { continue };
        let values = image.iter().enumerate().map(|(column, value)| match value {
            Datum::Text(text) => Some(text.to_vec()),
            Datum::Null => None,
            Datum::Unchanged => before.as_ref().and_then(|before| before.get(column)?.clone()),
        });
        rows.insert(key, values.collect());
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let batch = batch()?;
    println!("for a log, without a value: {batch:?}");
    let mut rows = Rows::new();
    apply(&batch, &mut rows);
    for values in rows.values() {
        let shown: Vec<String> = values
            .iter()
            .map(|value| value.as_ref().map_or("NULL".into(), |text| String::from_utf8_lossy(text).into()))
            .collect();
        println!("{}", shown.join(" | "));
    }
    // A part of it shares the buffer; bytes that are not what the marks say are refused.
    let first = batch.first_txns(batch.txns()[..1].to_vec());
    println!("the first transaction has {} of {} rows", first.row_count(), batch.row_count());
    let cut = batch.encoded_rows().slice(..batch.encoded_rows().len() - 1);
    match RowBatch::new(Arc::clone(&batch.table), batch.txns().to_vec(), cut) {
        Err(error) => println!("cut short: {error}"),
        Ok(_) => return Err("half a row was taken for a whole one".into()),
    }
    Ok(())
}
