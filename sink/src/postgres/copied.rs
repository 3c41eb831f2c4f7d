//! What the sink keeps downstream about copies of existing rows: the parts that are there, and what follows from them.
//!
//! While a table is being copied, each of its parts has a row, written in the transaction of the part's rows. When all are
//! there, one transaction turns them into progress of the stream, key range by key range ([`super::pieces`]), and leaves one
//! row that says that the table is finished. So the stream leaves out exactly what a part's snapshot held.

use event::{Blocks, CopiedPart, CopyPart, TableInfo};
use heartbeatpb::{TableId, Ts, WallTime};
use tokio_postgres::{Client, Row};

use super::config::PgConfig;
use super::failure::{Failure, classify};
use super::pieces::{Piece, Range};
use super::progress::{create_missing, parse_ts};
use super::route::Position;
use super::sql::{Hex, TextArray};
use crate::Error;
use crate::causality::SHARDS;

/// Creates the table of parts where it is missing.
pub(crate) async fn prepare(client: &Client, config: &PgConfig) -> Result<(), Failure> {
    let schema = &config.own_schema;
    let statements = format!(
        "CREATE TABLE IF NOT EXISTS {schema}.parts (changefeed text NOT NULL, table_id bigint NOT NULL, \
             span_start bytea NOT NULL, span_end bytea NOT NULL, block_start bigint NOT NULL, block_end bigint NOT NULL, \
             copy_ts numeric(20) NOT NULL, copy_time bigint NOT NULL, row_count bigint NOT NULL, \
             byte_count bigint NOT NULL, finished boolean NOT NULL, \
             PRIMARY KEY (changefeed, table_id, span_start, block_start));"
    );
    create_missing(client, config, &["parts"], &statements).await
}

const COLUMNS: &str = "table_id, span_start, span_end, block_start, block_end, copy_ts::text, copy_time, row_count, \
                       byte_count, finished";

/// Keys by which parts are told have no block.
const NO_BLOCK: i64 = -1;

fn of_row(row: &Row) -> Result<CopiedPart, Failure> {
    let block = |at: usize| u32::try_from(row.get::<_, i64>(at)).unwrap_or(u32::MAX);
    let blocks = (row.get::<_, i64>(3) != NO_BLOCK).then(|| Blocks { from: block(3), to: block(4) });
    let count = |at: usize| u64::try_from(row.get::<_, i64>(at)).unwrap_or_default();
    Ok(CopiedPart {
        part: CopyPart { start: row.get(1), end: row.get(2), blocks },
        at: parse_ts(row.get(5))?,
        time: WallTime(row.get(6)),
        rows: count(7),
        bytes: count(8),
    })
}

fn reading(error: tokio_postgres::Error) -> Failure {
    classify(error, "reading which parts of a table are copied")
}

fn writing(error: tokio_postgres::Error) -> Failure {
    classify(error, "noting a part of a table")
}

/// The number that tells the shapes with which a copy began: the position of a row of no table.
pub(crate) async fn shapes(client: &Client, own: &str, changefeed: &str) -> Result<Option<u32>, Failure> {
    let sql = format!(
        "SELECT copy_ts::text FROM {own}.parts WHERE changefeed = $1 AND table_id = {} AND NOT finished",
        TableId::DDL.0
    );
    let row = client.query_opt(&sql, &[&changefeed]).await.map_err(reading)?;
    let number = row.map(|row| parse_ts(row.get(0))).transpose()?;
    Ok(number.and_then(|number| u32::try_from(number.0).ok()))
}

/// The tables whose copy is complete, with their oldest position and all their rows.
pub(crate) async fn finished(
    client: &Client,
    own: &str,
    changefeed: &str,
) -> Result<Vec<(TableId, CopiedPart)>, Failure> {
    let sql = format!("SELECT {COLUMNS} FROM {own}.parts WHERE changefeed = $1 AND finished");
    let rows = client.query(&sql, &[&changefeed]).await.map_err(reading)?;
    rows.iter().map(|row| Ok((TableId(row.get(0)), of_row(row)?))).collect()
}

/// The parts of a table, and whether its copy is complete.
pub(crate) async fn load(
    client: &Client,
    own: &str,
    changefeed: &str,
    table: TableId,
) -> Result<(Vec<CopiedPart>, bool), Failure> {
    let sql = format!(
        "SELECT {COLUMNS} FROM {own}.parts WHERE changefeed = $1 AND table_id = $2 ORDER BY span_start, block_start"
    );
    let rows = client.query(&sql, &[&changefeed, &table.0]).await.map_err(reading)?;
    let finished = rows.iter().any(|row| row.get(9));
    Ok((rows.iter().map(of_row).collect::<Result<_, _>>()?, finished))
}

/// Notes a part in the transaction of its rows. False: the sink may not write any more, as its `condition` says.
pub(crate) async fn add(
    client: &Client,
    own: &str,
    (changefeed, table): (&str, TableId),
    part: &CopiedPart,
    (condition, finished): (&str, bool),
) -> Result<bool, Failure> {
    let sql = format!(
        "INSERT INTO {own}.parts (changefeed, table_id, span_start, span_end, block_start, block_end, copy_ts, \
             copy_time, row_count, byte_count, finished) \
         SELECT $1, $2, $3, $4, $5, $6, $7::text::numeric, $8, $9, $10, $11 WHERE {condition}"
    );
    let (from, to) = part.part.blocks.map_or((NO_BLOCK, NO_BLOCK), |b| (i64::from(b.from), i64::from(b.to)));
    let count = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
    let (at, rows, bytes) = (part.at.0.to_string(), count(part.rows), count(part.bytes));
    let params: [&(dyn tokio_postgres::types::ToSql + Sync); 11] = [
        &changefeed,
        &table.0,
        &part.part.start,
        &part.part.end,
        &from,
        &to,
        &at,
        &part.time.0,
        &rows,
        &bytes,
        &finished,
    ];
    Ok(client.execute(&sql, &params).await.map_err(writing)? == 1)
}

/// Forgets the parts of a table, in a transaction of the caller.
pub(crate) async fn remove(
    client: &Client,
    own: &str,
    changefeed: &str,
    table: TableId,
) -> Result<(), Failure> {
    let sql = format!("DELETE FROM {own}.parts WHERE changefeed = $1 AND table_id = $2");
    client.execute(&sql, &[&changefeed, &table.0]).await.map(|_| ()).map_err(writing)
}

/// What the parts of a table come to, if none is missing: key ranges with the position of their rows, neighbours of one
/// position joined.
pub(crate) fn pieces(parts: &[CopiedPart]) -> Option<Vec<Piece>> {
    let at = |part: &CopiedPart| Position { commit_ts: part.at, row_number: i64::MAX };
    let mut sorted: Vec<&CopiedPart> = parts.iter().collect();
    sorted.sort_unstable_by(|one, other| one.part.cmp(&other.part));
    let first = sorted.first()?;
    if first.part.blocks.is_some() {
        // A row may have moved from one block to another between two snapshots.
        let mut next = 0;
        for part in &sorted {
            let blocks = part.part.blocks.filter(|blocks| blocks.from == next && part.at == first.at)?;
            next = blocks.to;
        }
        return (next == u32::MAX).then(|| vec![Piece { range: Range::default(), at: at(first) }]);
    }
    let mut pieces: Vec<Piece> = Vec::new();
    let mut open = Some(Vec::new());
    for part in sorted {
        // Behind the one that has no end there is nothing, and a gap is none of ours to close.
        if part.part.blocks.is_some() || open.as_ref() != Some(&part.part.start) {
            return None;
        }
        match pieces.last_mut() {
            Some(last) if last.at == at(part) => last.range.end.clone_from(&part.part.end),
            Some(_) | None => pieces.push(Piece {
                range: Range { start: part.part.start.clone(), end: part.part.end.clone() },
                at: at(part),
            }),
        }
        open = (!part.part.end.is_empty()).then(|| part.part.end.clone());
    }
    open.is_none().then_some(pieces)
}

/// Keeps others from cutting or replacing the progress of a table until the caller's transaction ends.
pub(crate) async fn lock_table(client: &Client, changefeed: &str, table: TableId) -> Result<(), Failure> {
    let lock = "SELECT pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtextextended($1 || ' ' || $2, 5577006791947779410))";
    client.execute(lock, &[&changefeed, &table.0.to_string()]).await.map(drop).map_err(writing)
}

/// Makes the parts of a table the progress of all its queues, in a transaction of the caller. Whoever had opened the table
/// before finds its rows gone and reads them again.
pub(crate) async fn set_progress(
    client: &Client,
    own: &str,
    changefeed: &str,
    table: TableId,
    pieces: &[Piece],
) -> Result<(), Failure> {
    lock_table(client, changefeed, table).await?;
    let delete = format!("DELETE FROM {own}.progress WHERE changefeed = $1 AND table_id = $2");
    client.execute(&delete, &[&changefeed, &table.0]).await.map_err(writing)?;
    let [mut start, mut end, mut ts] = std::array::from_fn(|_| TextArray::new(pieces.len()));
    for piece in pieces {
        start.push_text_of(Hex(&piece.range.start));
        end.push_text_of(Hex(&piece.range.end));
        ts.push_text_of(piece.at.commit_ts.0);
    }
    let insert = format!(
        "INSERT INTO {own}.progress (changefeed, table_id, shard, span_start, span_end, commit_ts, row_number) \
         SELECT $1, $2, q::smallint, pg_catalog.decode(u.s, 'hex'), pg_catalog.decode(u.e, 'hex'), u.ts::numeric, $6 \
         FROM unnest($3::text[], $4::text[], $5::text[]) AS u(s, e, ts), \
             pg_catalog.generate_series(0, {}) AS q",
        SHARDS - 1
    );
    let params: [&(dyn tokio_postgres::types::ToSql + Sync); 6] =
        [&changefeed, &table.0, &start, &end, &ts, &i64::MAX];
    client.execute(&insert, &params).await.map(|_| ()).map_err(writing)
}

/// The rows of a table are a copy as of `at`, in a transaction of the caller: schema changes up to there are in them and will
/// not come, whatever an earlier copy has seen of them.
pub(crate) async fn begin_stream(
    client: &Client,
    own: &str,
    changefeed: &str,
    table: &TableInfo,
    at: Ts,
) -> Result<(), Failure> {
    let seen = format!(
        "DELETE FROM {own}.ddl WHERE changefeed = $1 AND table_id = $2 AND commit_ts <= $3::text::numeric"
    );
    client.execute(&seen, &[&changefeed, &table.id.0, &at.0.to_string()]).await.map_err(writing)?;
    let note = format!(
        "INSERT INTO {own}.tables AS t (changefeed, table_id, schema_id) VALUES ($1, $2, $3) \
         ON CONFLICT (changefeed, table_id) DO UPDATE SET schema_id = EXCLUDED.schema_id, gone = NULL"
    );
    client.execute(&note, &[&changefeed, &table.id.0, &table.schema_id.0]).await.map(drop).map_err(writing)
}

/// A part is missing, which the caller said was there.
pub(crate) fn incomplete(table: &str) -> Error {
    Error::Rejected {
        code: "CDC:ErrSinkProgress",
        what: format!(
            "the copy of {table} is not complete: the sink's own tables in the target lack a part of it"
        ),
    }
}

/// The oldest position of parts, and all their rows, as what is left of them.
pub(crate) fn summary(parts: &[CopiedPart]) -> Option<CopiedPart> {
    let oldest = parts.iter().min_by_key(|part| part.at)?;
    Some(CopiedPart {
        part: CopyPart::default(),
        at: oldest.at,
        time: oldest.time,
        rows: parts.iter().map(|part| part.rows).sum(),
        bytes: parts.iter().map(|part| part.bytes).sum(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(start: &str, end: &str, at: u64) -> CopiedPart {
        let part = CopyPart { start: start.into(), end: end.into(), blocks: None };
        CopiedPart { part, at: Ts(at), time: WallTime(0), rows: 10, bytes: 100 }
    }

    fn blocks(from: u32, to: u32, at: u64) -> CopiedPart {
        let part = CopyPart { blocks: Some(Blocks { from, to }), ..CopyPart::default() };
        CopiedPart { part, ..part_at(at) }
    }

    fn part_at(at: u64) -> CopiedPart {
        part("", "", at)
    }

    fn shown(parts: &[CopiedPart]) -> Option<String> {
        let piece = |piece: &Piece| {
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            format!("[{},{}) {}", text(&piece.range.start), text(&piece.range.end), piece.at.commit_ts)
        };
        pieces(parts).map(|pieces| pieces.iter().map(piece).collect::<Vec<_>>().join(" "))
    }

    #[test]
    fn parts_of_one_snapshot_are_one_piece_and_those_of_others_keep_their_own_position() {
        assert_eq!(shown(&[part("", "", 5)]).as_deref(), Some("[,) 5"));
        assert_eq!(shown(&[part("g", "", 5), part("", "g", 5)]).as_deref(), Some("[,) 5"));
        let resumed = [part("m", "", 9), part("", "g", 5), part("g", "k", 5), part("k", "m", 9)];
        assert_eq!(shown(&resumed).as_deref(), Some("[,k) 5 [k,) 9"));
        let summary = summary(&resumed).unwrap();
        assert_eq!((summary.at, summary.rows, summary.bytes), (Ts(5), 40, 400));
    }

    #[test]
    fn a_missing_part_is_noticed_wherever_it_is() {
        for parts in [
            vec![],
            vec![part("", "g", 5)],
            vec![part("g", "", 5)],
            vec![part("", "g", 5), part("m", "", 5)],
            vec![part("", "m", 5), part("g", "", 5)],
            vec![part("", "", 5), part("g", "", 5)],
            vec![blocks(0, 10, 5)],
            vec![blocks(10, u32::MAX, 5)],
            vec![blocks(0, 10, 5), blocks(11, u32::MAX, 5)],
            vec![blocks(0, 10, 5), blocks(10, 20, 5), part("g", "", 5)],
        ] {
            assert_eq!(shown(&parts), None, "{parts:?}");
        }
    }

    #[test]
    fn parts_by_block_make_a_table_only_in_one_snapshot() {
        assert_eq!(shown(&[blocks(10, u32::MAX, 5), blocks(0, 10, 5)]).as_deref(), Some("[,) 5"));
        assert_eq!(shown(&[blocks(10, u32::MAX, 6), blocks(0, 10, 5)]), None);
    }
}
