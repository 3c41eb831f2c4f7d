//! Shows one insert, update and delete in every encoding that files can have.
//!
//! `cargo run -p sink --example encode`

use std::error::Error;
use std::io::Write as _;
use std::sync::Arc;

use bytes::BytesMut;
use event::{
    Column, ColumnType, Datum, IdentityKind, ReplicaIdentity, RowBatch, RowOp, TableInfo, TupleWriter,
    TxnMark, TypeKind, UniqueKey, put_row,
};
use heartbeatpb::{SchemaId, TableId, Ts, WallTime};
use sink::encode::{EncodeOptions, Format, TableEncoder};

fn column(name: &str, kind: TypeKind, sql: &str, nullable: bool) -> Column {
    let ty = ColumnType { kind, sql: sql.into(), oid: 0, definitions: Vec::new() };
    Column { name: name.into(), ty, nullable, generated: None, identity: IdentityKind::None, default: None }
}

fn main() -> Result<(), Box<dyn Error>> {
    let table = Arc::new(TableInfo {
        id: TableId(1),
        schema_id: SchemaId(1),
        schema: "shop".into(),
        name: "orders".into(),
        version: Ts(1),
        columns: vec![
            column("id", TypeKind::Int64, "bigint", false),
            column("total", TypeKind::Numeric { precision: Some(10), scale: 2 }, "numeric(10,2)", false),
            column("note", TypeKind::Text, "text", true),
        ],
        keys: vec![UniqueKey {
            name: "orders_pkey".into(),
            columns: vec![0],
            primary: true,
            nulls_not_distinct: false,
        }],
        identity: ReplicaIdentity::Key(vec![0]),
    });
    let image = |values: [Datum<'static>; 3]| {
        move |out: &mut BytesMut| {
            let mut writer = TupleWriter::new(out);
            values.into_iter().for_each(|value| writer.push(value));
            writer.finish();
        }
    };
    let text = |text: &'static str| Datum::Text(text.as_bytes());
    let mut rows = BytesMut::new();
    let mut inserted = image([text("1"), text("12.50"), text("say \"hi\"")]);
    put_row(&mut rows, RowOp::Insert, None, Some(&mut inserted));
    // The note is large and was not changed, so the upstream did not send it.
    let mut updated = image([text("1"), text("15.00"), Datum::Unchanged]);
    put_row(&mut rows, RowOp::Update, None, Some(&mut updated));
    let mut deleted = image([text("1"), Datum::Unchanged, Datum::Unchanged]);
    put_row(&mut rows, RowOp::Delete, Some(&mut deleted), None);
    let txn = TxnMark {
        commit_ts: Ts(100),
        start_ts: Ts(99),
        commit_time: WallTime(1_700_000_000_000_000),
        rows: 3,
        first_row: 0,
    };
    let batch = RowBatch::new(Arc::clone(&table), vec![txn], rows.freeze())?;

    let mut out = Vec::new();
    for format in [Format::CanalJson, Format::Debezium, Format::Csv] {
        let mut options = EncodeOptions::new(format);
        options.terminator = "\n".into();
        options.debezium_schema = false;
        writeln!(out, "-- {}", format.name())?;
        let encoder = TableEncoder::new(&Arc::new(options), &table);
        encoder.header(&mut out);
        for row in batch.iter() {
            encoder.encode(&row, WallTime(1_700_000_000_000_000), &mut out)?;
        }
    }
    std::io::stdout().write_all(&out)?;
    Ok(())
}
