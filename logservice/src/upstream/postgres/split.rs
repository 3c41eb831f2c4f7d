//! Where a table can be divided: keys of some of its pages.

use event::KeyCodec;
use heartbeatpb::TableSpan;

use super::admin::{connect, selection};
use super::catalog::{self, CatalogTable, Selection};
use super::conn::Connection;
use super::options::ConnectOptions;
use super::sql::ident;
use crate::Error;
use crate::upstream::FeedSpec;
use crate::upstream::split::{Sample, SplitPoints};

/// Pages that are read: enough for a few hundred pieces, and a second's work for a slow disk.
const PAGES: u64 = 500;
/// Rows that are read at most.
const ROWS: u64 = 50_000;
/// Longest that the server may take. In milliseconds.
const PATIENCE: u64 = 8_000;

/// Divides a span; see [`crate::upstream::Upstream::split_points`].
pub(crate) async fn points(
    options: &ConnectOptions,
    spec: &FeedSpec,
    span: &TableSpan,
    pieces: usize,
) -> Result<SplitPoints, Error> {
    let mut conn = connect(options).await?;
    let result = ask(&mut conn, spec, span, pieces).await;
    conn.close().await;
    result
}

async fn ask(
    conn: &mut Connection,
    spec: &FeedSpec,
    span: &TableSpan,
    pieces: usize,
) -> Result<SplitPoints, Error> {
    let selection = Selection { only: Some(span.table), ..selection(spec) };
    let tables = catalog::load(conn, &selection).await?;
    let Some(table) = tables.first() else { return Ok(SplitPoints::default()) };
    let codec = KeyCodec::new(&table.info).filter(|_| table.source().splittable);
    let Some(codec) = codec else { return Ok(SplitPoints::default()) };
    let size = size(conn, table).await?;
    let pages = size.bytes.unwrap_or(0) / PAGE;
    let patience = format!("SET LOCAL statement_timeout = {PATIENCE}; ");
    let keys = sample(conn, table, &codec, pages, &patience).await?.keys;
    Ok(Sample { keys, ..size }.divide(span, pieces))
}

/// Keys of some of a table's rows. `before` is what the statement begins with. Answers nothing about the table's size.
pub(crate) async fn sample(
    conn: &mut Connection,
    table: &CatalogTable,
    codec: &KeyCodec,
    pages: u64,
    before: &str,
) -> Result<Sample, Error> {
    let names: Vec<String> =
        codec.parts().iter().map(|(column, _)| ident(&table.info.columns[*column].name)).collect();
    let part = if pages <= PAGES {
        String::new()
    } else {
        // In hundredths of a percent, at least one.
        let share = (PAGES * 10_000 / pages).max(1);
        format!(" TABLESAMPLE SYSTEM ({}.{:02})", share / 100, share % 100)
    };
    let only = if table.partitioned { "" } else { "ONLY " };
    let (columns, name) = (names.join(", "), table.sql_name());
    let condition = table.part.sql_condition().map(|text| format!(" WHERE {text}")).unwrap_or_default();
    let sql = format!("{before}SELECT {columns} FROM {only}{name}{part}{condition} LIMIT {ROWS}");
    let mut sample = Sample::default();
    for row in conn.query("sample the keys of a table", &sql).await? {
        let values: Vec<&str> = (0..names.len()).map(|column| row.text(column)).collect();
        sample.add(codec, &values);
    }
    Ok(sample)
}

/// Bytes of a page, as sizes are counted here.
pub(crate) const PAGE: u64 = 8192;

/// How large a table is: what its files take, and rows as of the last analysis, scaled to the files' present size. Of a
/// table with a condition, the rows that the server expects to fulfil it.
pub(crate) async fn size(conn: &mut Connection, table: &CatalogTable) -> Result<Sample, Error> {
    let sql = format!(
        "SELECT sum(pg_table_size(c.oid))::bigint, \
           CASE WHEN min(c.reltuples) >= 0 AND sum(c.relpages) > 0 THEN \
             (sum(c.reltuples) / sum(c.relpages) * sum(pg_relation_size(c.oid)) \
               / current_setting('block_size')::bigint)::bigint END \
         FROM pg_catalog.pg_class c WHERE c.relkind = 'r' AND (c.oid = {oid} OR c.oid IN \
           (SELECT relid FROM pg_catalog.pg_partition_tree({oid}::regclass) WHERE isleaf))",
        oid = table.info.id.0
    );
    let rows = conn.query("ask for the size of a table", &sql).await?;
    let Some(row) = rows.first() else { return Ok(Sample::default()) };
    let number = |column| row.opt(column).and_then(|text| text.parse().ok());
    let mut sample = Sample { keys: Vec::new(), rows: number(1), bytes: number(0) };
    if sample.rows.is_some() && table.part.condition.is_some() {
        sample.rows = Some(expected(conn, table).await?);
    }
    Ok(sample)
}

/// About how many rows of a table fulfil its condition, as the server plans.
pub(crate) async fn expected(conn: &mut Connection, table: &CatalogTable) -> Result<u64, Error> {
    let only = if table.partitioned { "" } else { "ONLY " };
    let condition = table.part.sql_condition().unwrap_or_else(|| "true".to_owned());
    let sql = format!("EXPLAIN (FORMAT JSON) SELECT FROM {only}{} WHERE {condition}", table.sql_name());
    let rows = conn.query("estimate the rows of a table", &sql).await?;
    let plan: serde_json::Value =
        rows.first().and_then(|row| serde_json::from_str(row.text(0)).ok()).unwrap_or_default();
    Ok(plan[0]["Plan"]["Plan Rows"].as_u64().unwrap_or_default())
}
