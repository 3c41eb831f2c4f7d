//! Applies made-up row changes to any sink and says how fast it took them.
//!
//! ```text
//! cargo run -p sink --example apply                                     # into a black hole
//! cargo run -p sink --example apply -- postgres://me@localhost/db 200000
//! ```
//!
//! A PostgreSQL target gets the table `public.millrace_example`.

use std::error::Error;
use std::sync::Arc;
use std::time::Instant;

use bytes::BytesMut;
use event::{
    Column, ColumnType, Datum, IdentityKind, ReplicaIdentity, RowBatch, RowOp, TableInfo, TupleWriter,
    TxnMark, TypeKind, UniqueKey, put_row,
};
use heartbeatpb::{ChangefeedId, DispatcherId, SchemaId, TableId, Ts, WallTime};
use sink::{Flushed, SinkOptions};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

const ROWS_PER_TXN: u32 = 10;
const TXNS_PER_BATCH: u64 = 100;

fn example_table() -> Arc<TableInfo> {
    let column = |name: &str, kind: TypeKind, sql: &str, nullable: bool| Column {
        name: name.into(),
        ty: ColumnType { kind, sql: sql.into(), oid: 0, definitions: Vec::new() },
        nullable,
        generated: None,
        identity: IdentityKind::None,
        default: None,
    };
    let primary = UniqueKey {
        name: "millrace_example_pkey".into(),
        columns: vec![0],
        primary: true,
        nulls_not_distinct: false,
    };
    Arc::new(TableInfo {
        id: TableId(1),
        schema_id: SchemaId(1),
        schema: "public".into(),
        name: "millrace_example".into(),
        version: Ts(1),
        columns: vec![
            column("id", TypeKind::Int64, "bigint", false),
            column("name", TypeKind::Text, "text", true),
            column("amount", TypeKind::Numeric { precision: Some(12), scale: 2 }, "numeric(12,2)", true),
        ],
        keys: vec![primary],
        identity: ReplicaIdentity::Key(vec![0]),
    })
}

/// One batch: of every ten rows, eight are inserted and two that exist are updated.
fn batch(table: &Arc<TableInfo>, number: u64) -> RowBatch {
    let mut rows = BytesMut::new();
    let mut txns = Vec::new();
    for txn in 0..TXNS_PER_BATCH {
        let commit_ts = Ts(100 + (number * TXNS_PER_BATCH + txn) * 2);
        txns.push(TxnMark {
            commit_ts,
            start_ts: commit_ts.before(),
            commit_time: WallTime(0),
            rows: ROWS_PER_TXN,
            first_row: 0,
        });
        for row in 0..u64::from(ROWS_PER_TXN) {
            let (op, id) =
                if row < 8 { (RowOp::Insert, commit_ts.0 * 10 + row) } else { (RowOp::Update, row) };
            let (id, amount) = (id.to_string(), format!("{}.50", commit_ts.0 % 100_000));
            let mut new = |out: &mut BytesMut| {
                let mut writer = TupleWriter::new(out);
                for value in [&id, "a name of common length", &amount] {
                    writer.push(Datum::Text(value.as_bytes()));
                }
                writer.finish();
            };
            put_row(&mut rows, op, None, Some(&mut new));
        }
    }
    RowBatch::trusted(Arc::clone(table), txns, rows.freeze())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let uri = args.next().unwrap_or_else(|| "blackhole://?check=true".into());
    let rows: u64 = args.next().map_or(Ok(100_000), |rows| rows.parse())?;
    let batches = rows.div_ceil(TXNS_PER_BATCH * u64::from(ROWS_PER_TXN));

    let options = SinkOptions::new(ChangefeedId::fresh("example"), std::env::temp_dir());
    let sink = sink::open(&uri, &options).await?;
    let shutdown = CancellationToken::new();
    let running = tokio::spawn({
        let (sink, shutdown) = (Arc::clone(&sink), shutdown.clone());
        async move { sink.run(shutdown).await }
    });

    let table = example_table();
    let dispatcher = DispatcherId::random();
    sink.open_dispatcher(dispatcher, &heartbeatpb::TableSpan::whole(table.id), Ts(1)).await?;
    sink.open_table(dispatcher, &table).await?;

    let made: Vec<RowBatch> = (0..batches).map(|number| batch(&table, number)).collect();
    let (done, mut flushed) = mpsc::unbounded_channel();
    let begun = Instant::now();
    for batch in made {
        let (done, rows) = (done.clone(), batch.row_count());
        sink.write_rows(dispatcher, batch, Flushed::new(move || done.send(rows).unwrap_or(())));
    }
    drop(done);
    let mut total = 0;
    // Ends early when the sink fails: it drops what it has not flushed.
    while let Some(rows) = flushed.recv().await {
        total += rows;
        if total == batches * TXNS_PER_BATCH * u64::from(ROWS_PER_TXN) || !sink.healthy() {
            break;
        }
    }
    let seconds = begun.elapsed().as_secs_f64();
    println!("{total} rows in {seconds:.3} s: {:.0} rows/s", f64::from(u32::try_from(total)?) / seconds);

    sink.close_dispatcher(dispatcher);
    sink.forget_changefeed().await?;
    shutdown.cancel();
    running.await??;
    Ok(())
}
