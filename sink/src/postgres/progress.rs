//! What the sink keeps downstream for itself: progress per queue and key range, copy markers, executed DDLs.
//!
//! Progress rows are changed in the transaction of the rows they speak of, and only from the value that the
//! writer knows. A writer that is behind, because another one took over or because the answer to its commit
//! was lost, changes no row and must read again. Hence a row change is applied exactly once. A writer whose table was
//! divided meanwhile finds no row with its bounds any more, which is the same to it. Key ranges are those of
//! [`super::pieces`]; the whole of a table is one piece.

use heartbeatpb::{TableId, Ts};
use tokio_postgres::{Client, GenericClient};

use super::config::PgConfig;
use super::failure::{Failure, classify};
use super::pieces::{self, Piece, Range, SpanProgress, Stored};
use super::route::Position;
use super::shared::Shared;
use super::sql::{Hex, TextArray};
use crate::Error;
use crate::causality::Shard;

/// Held while the sink's own tables, or target tables, are created: two nodes may start at once.
pub(crate) const CREATE_LOCK: &str = "SELECT pg_catalog.pg_advisory_xact_lock(5577006791947779410)";

/// Columns that an earlier version's tables do not have.
const SPAN_COLUMNS: &str =
    "ADD COLUMN span_start bytea NOT NULL DEFAULT '', ADD COLUMN span_end bytea NOT NULL DEFAULT ''";

/// Which of the sink's own tables exist, and which of them know key ranges.
const OWN_TABLES: &str = "SELECT count(c.oid), count(n.oid) > 0, count(a.attnum), \
        count(a.attnum) FILTER (WHERE c.relname = 'progress') > 0, \
        count(c.oid) FILTER (WHERE c.relname = 'progress') > 0, \
        count(c.oid) FILTER (WHERE c.relname = 'copy') > 0, \
        count(a.attnum) FILTER (WHERE c.relname = 'copy') > 0 \
     FROM pg_catalog.pg_namespace n LEFT JOIN pg_catalog.pg_class c \
        ON n.oid = c.relnamespace AND c.relname IN ('progress', 'copy', 'ddl') \
     LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attname = 'span_start' WHERE n.nspname = $1";

/// Creates the sink's own schema and tables where they are missing.
pub(crate) async fn prepare(client: &Client, config: &PgConfig) -> Result<(), Failure> {
    let schema = &config.own_schema;
    let looking = |e| classify(e, "looking for the sink's own tables");
    let exists = client.query_one(OWN_TABLES, &[&config.own_schema_name]).await.map_err(looking)?;
    if exists.get::<_, i64>(0) == 3 && exists.get::<_, i64>(2) == 2 {
        return Ok(());
    }
    // The statement needs its permission even where it would do nothing.
    let create_schema =
        if exists.get(1) { String::new() } else { format!("CREATE SCHEMA IF NOT EXISTS {schema};") };
    if let Err(error) = create(client, config, &create_schema).await {
        // The connection may be used again; a failed rollback shows at its next use.
        let _ = client.batch_execute("ROLLBACK").await;
        let failure = classify(error, "creating the sink's own tables");
        let Failure::Fatal(Error::Rejected { code: "CDC:ErrSinkPermission", what }) = failure else {
            return Err(failure);
        };
        let user = super::sql::quote(config.driver.get_user().unwrap_or_default());
        let what = format!("{what}; run `CREATE SCHEMA {schema} AUTHORIZATION {user}` in the target");
        return Err(Failure::Fatal(Error::Rejected { code: "CDC:ErrSinkPermission", what }));
    }
    Ok(())
}

/// Creates tables of the sink's own that are missing: `tables` are their names, `statements` make them, each ended by a
/// semicolon and harmless where its table is there. Nothing is asked for that needs a permission if all are there.
pub(crate) async fn create_missing(
    client: &Client,
    config: &PgConfig,
    tables: &[&str],
    statements: &str,
) -> Result<(), Failure> {
    let missing = "SELECT EXISTS (SELECT FROM pg_catalog.unnest($2::text[]) AS own WHERE NOT EXISTS (\
                       SELECT FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
                       WHERE n.nspname = $1 AND c.relname = own))";
    let failed = |e| classify(e, "creating the sink's own tables");
    let row = client.query_one(missing, &[&config.own_schema_name, &tables]).await.map_err(failed)?;
    if !row.get::<_, bool>(0) {
        return Ok(());
    }
    let result = client.batch_execute(&format!("BEGIN; {CREATE_LOCK}; {statements} COMMIT")).await;
    if result.is_err() {
        // The connection may be used again; a failed rollback shows at its next use.
        let _ = client.batch_execute("ROLLBACK").await;
    }
    result.map_err(failed)
}

/// Ends a transaction by how its statements went. The error is that of the commit, or of the roll-back.
pub(crate) async fn end(client: &Client, commit: bool) -> Result<(), Failure> {
    let end = if commit { "COMMIT" } else { "ROLLBACK" };
    client.batch_execute(end).await.map_err(|e| classify(e, "committing"))
}

async fn create(
    client: &Client,
    config: &PgConfig,
    create_schema: &str,
) -> Result<(), tokio_postgres::Error> {
    let schema = &config.own_schema;
    client.batch_execute(&format!("BEGIN; {CREATE_LOCK}; {create_schema}")).await?;
    let row = client.query_one(OWN_TABLES, &[&config.own_schema_name]).await?;
    let lacks = |table: usize, column: usize| row.get::<_, bool>(table) && !row.get::<_, bool>(column);
    if lacks(4, 3) {
        let sql = format!(
            "ALTER TABLE {schema}.progress {SPAN_COLUMNS}, DROP CONSTRAINT progress_pkey, \
             ADD PRIMARY KEY (changefeed, table_id, shard, span_start)"
        );
        client.batch_execute(&sql).await?;
    }
    if lacks(5, 6) {
        let sql = format!(
            "ALTER TABLE {schema}.copy {SPAN_COLUMNS}, DROP CONSTRAINT copy_pkey, \
             ADD PRIMARY KEY (changefeed, table_id, span_start, span_end)"
        );
        client.batch_execute(&sql).await?;
    }
    let sql = format!(
        "CREATE TABLE IF NOT EXISTS {schema}.progress (changefeed text NOT NULL, table_id bigint NOT NULL, \
             shard smallint NOT NULL, commit_ts numeric(20) NOT NULL, row_number bigint NOT NULL, \
             span_start bytea NOT NULL DEFAULT '', span_end bytea NOT NULL DEFAULT '', \
             PRIMARY KEY (changefeed, table_id, shard, span_start)) \
             WITH (fillfactor = 40, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_scale_factor = 0); \
         CREATE TABLE IF NOT EXISTS {schema}.copy (changefeed text NOT NULL, table_id bigint NOT NULL, \
             copy_ts numeric(20) NOT NULL, span_start bytea NOT NULL DEFAULT '', span_end bytea NOT NULL DEFAULT '', \
             PRIMARY KEY (changefeed, table_id, span_start, span_end)); \
         CREATE TABLE IF NOT EXISTS {schema}.ddl (changefeed text NOT NULL, table_id bigint NOT NULL, \
             commit_ts numeric(20) NOT NULL, PRIMARY KEY (changefeed, table_id)); COMMIT"
    );
    client.batch_execute(&sql).await
}

/// Reads how far a span of a table is, and makes sure that its bounds are those of progress rows: whoever wrote with
/// other bounds finds its rows gone.
pub(crate) async fn load(
    client: &Client,
    shared: &Shared,
    table: TableId,
    span: &Range,
) -> Result<SpanProgress, Failure> {
    let (own, changefeed) = (&shared.config.own_schema, &shared.gid);
    let found = pieces::cut(span, &read(client, own, changefeed, table, "").await?);
    if found.remove.is_empty() && found.add.is_empty() {
        return Ok(found.progress);
    }
    let failed = |e| classify(e, "reading the progress of a table");
    shared.registration.begin_checked(client).await?;
    // One at a time; and the rows themselves wait for whoever is writing with them.
    let lock = "SELECT pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtextextended($1 || ' ' || $2, 5577006791947779410))";
    client.execute(lock, &[changefeed, &table.0.to_string()]).await.map_err(failed)?;
    let cut = pieces::cut(span, &read(client, own, changefeed, table, "FOR UPDATE").await?);
    let delete = format!(
        "DELETE FROM {own}.progress AS p USING unnest($3::text[], $4::text[]) AS u(shard, s) \
         WHERE p.changefeed = $1 AND p.table_id = $2 AND p.shard = u.shard::smallint \
             AND p.span_start = pg_catalog.decode(u.s, 'hex')"
    );
    let insert = format!(
        "INSERT INTO {own}.progress (changefeed, table_id, shard, span_start, span_end, commit_ts, row_number) \
         SELECT $1, $2, u.shard::smallint, pg_catalog.decode(u.s, 'hex'), pg_catalog.decode(u.e, 'hex'), \
             u.ts::numeric, u.n::bigint \
         FROM unnest($3::text[], $4::text[], $5::text[], $6::text[], $7::text[]) AS u(shard, s, e, ts, n)"
    );
    if !cut.remove.is_empty() {
        let [shard, start, ..] = stored_params(&cut.remove);
        client.execute(&delete, &[changefeed, &table.0, &shard, &start]).await.map_err(failed)?;
    }
    if !cut.add.is_empty() {
        let [shard, start, end, ts, number] = stored_params(&cut.add);
        let params: [&(dyn tokio_postgres::types::ToSql + Sync); 7] =
            [changefeed, &table.0, &shard, &start, &end, &ts, &number];
        client.execute(&insert, &params).await.map_err(failed)?;
    }
    client.batch_execute("COMMIT").await.map_err(failed)?;
    Ok(cut.progress)
}

/// The progress rows of a table.
async fn read(
    client: &Client,
    own: &str,
    changefeed: &str,
    table: TableId,
    lock: &str,
) -> Result<Vec<Stored>, Failure> {
    let sql = format!(
        "SELECT shard, commit_ts::text, row_number, span_start, span_end FROM {own}.progress \
         WHERE changefeed = $1 AND table_id = $2 {lock}"
    );
    let failed = |e| classify(e, "reading the progress of a table");
    let mut stored = Vec::new();
    for row in client.query(&sql, &[&changefeed, &table.0]).await.map_err(failed)? {
        let shard = usize::try_from(row.get::<_, i16>(0)).ok().and_then(Shard::from_index);
        let at = Position { commit_ts: parse_ts(row.get(1))?, row_number: row.get(2) };
        let range = Range { start: row.get(3), end: row.get(4) };
        stored.extend(shard.map(|shard| Stored { shard, piece: Piece { range, at } }));
    }
    Ok(stored)
}

fn stored_params(rows: &[Stored]) -> [TextArray; 5] {
    let mut arrays = std::array::from_fn(|_| TextArray::new(rows.len()));
    let [shards, start, end, ts, number] = &mut arrays;
    for Stored { shard, piece: Piece { range, at } } in rows {
        shards.push_text_of(shard.index());
        start.push_text_of(Hex(&range.start));
        end.push_text_of(Hex(&range.end));
        ts.push_text_of(at.commit_ts.0);
        number.push_text_of(at.row_number);
    }
    arrays
}

pub(super) fn parse_ts(text: &str) -> Result<Ts, Failure> {
    text.parse().map(Ts).map_err(|_| {
        Failure::Fatal(Error::Rejected {
            code: "CDC:ErrSinkProgress",
            what: "the sink's own tables in the target hold a position that is no number".into(),
        })
    })
}

/// A step forward of a piece of one table in one queue.
#[derive(Clone, Debug)]
pub(crate) struct Advance {
    pub(crate) table: TableId,
    pub(crate) shard: Shard,
    pub(crate) range: Range,
    pub(crate) from: Position,
    pub(crate) to: Position,
}

/// Pieces of one queue that have come to the same position and become one.
#[derive(Clone, Debug)]
pub(crate) struct Join {
    pub(crate) table: TableId,
    pub(crate) shard: Shard,
    pub(crate) range: Range,
}

/// The statement that moves the progress of several pieces; it changes as many rows as there are pieces unless someone
/// else moved or cut one of them, or the writer has lost its right to write, which is the `condition`.
pub(crate) fn advance_sql(own: &str, condition: &str) -> String {
    format!(
        "UPDATE {own}.progress AS p SET commit_ts = u.ts::numeric, row_number = u.n::bigint \
         FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[], \
             $9::text[]) AS u(changefeed, table_id, shard, ts, n, old_ts, old_n, s, e) \
         WHERE p.changefeed = u.changefeed AND p.table_id = u.table_id::bigint AND p.shard = u.shard::smallint \
             AND p.span_start = pg_catalog.decode(u.s, 'hex') AND p.span_end = pg_catalog.decode(u.e, 'hex') \
             AND p.commit_ts = u.old_ts::numeric AND p.row_number = u.old_n::bigint \
             AND {condition}"
    )
}

/// Number of parameters of [`advance_sql`].
const ADVANCE_PARAMS: usize = 9;

/// Parameters of [`advance_sql`].
pub(crate) fn advance_params(changefeed: &str, steps: &[Advance]) -> [TextArray; ADVANCE_PARAMS] {
    let mut arrays = std::array::from_fn(|_| TextArray::new(steps.len()));
    let [feed, table, shard, ts, number, old_ts, old_number, start, end] = &mut arrays;
    for step in steps {
        feed.push_text(changefeed);
        table.push_text_of(step.table.0);
        shard.push_text_of(step.shard.index());
        ts.push_text_of(step.to.commit_ts.0);
        number.push_text_of(step.to.row_number);
        old_ts.push_text_of(step.from.commit_ts.0);
        old_number.push_text_of(step.from.row_number);
        start.push_text_of(Hex(&step.range.start));
        end.push_text_of(Hex(&step.range.end));
    }
    arrays
}

/// Makes one piece of those in a range, which all have the same position and are locked by this transaction.
pub(crate) async fn join(
    client: &impl GenericClient,
    own: &str,
    changefeed: &str,
    join: &Join,
) -> Result<(), Failure> {
    let failed = |e| classify(e, "writing progress");
    let shard = i16::try_from(join.shard.index()).unwrap_or_default();
    let Range { start, end } = &join.range;
    let delete = format!(
        "DELETE FROM {own}.progress WHERE changefeed = $1 AND table_id = $2 AND shard = $3 AND span_start > $4 \
         AND ($5 = ''::bytea OR span_start < $5)"
    );
    client.execute(&delete, &[&changefeed, &join.table.0, &shard, start, end]).await.map_err(failed)?;
    let widen = format!(
        "UPDATE {own}.progress SET span_end = $5 WHERE changefeed = $1 AND table_id = $2 AND shard = $3 \
         AND span_start = $4"
    );
    client.execute(&widen, &[&changefeed, &join.table.0, &shard, start, end]).await.map_err(failed)?;
    Ok(())
}

/// Moves every queue of a key range of a table to a barrier that all of them have reached.
pub(crate) async fn pass(
    client: &impl GenericClient,
    own: &str,
    changefeed: &str,
    table: TableId,
    Range { start, end }: &Range,
    to: Position,
) -> Result<(), Failure> {
    let sql = format!(
        "UPDATE {own}.progress SET commit_ts = $3::text::numeric, row_number = $4 WHERE changefeed = $1 \
         AND table_id = $2 AND (commit_ts, row_number) < ($3::text::numeric, $4) AND span_start >= $5 \
         AND ($6 = ''::bytea OR (span_end <> ''::bytea AND span_end <= $6))"
    );
    client
        .execute(&sql, &[&changefeed, &table.0, &to.commit_ts.0.to_string(), &to.row_number, start, end])
        .await
        .map_err(|e| classify(e, "writing progress"))?;
    Ok(())
}

/// What is known about initial copies of a key range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Copied {
    /// None has begun.
    No,
    /// Another one has begun, of some of its keys at least.
    Before,
    /// This one has begun.
    This,
}

/// Whether the copy of a key range at `snapshot` has begun, or another one.
pub(crate) async fn copy_marker(
    client: &impl GenericClient,
    own: &str,
    changefeed: &str,
    table: TableId,
    range: &Range,
    snapshot: Ts,
) -> Result<Copied, Failure> {
    let sql = format!(
        "SELECT copy_ts::text, span_start, span_end FROM {own}.copy WHERE changefeed = $1 AND table_id = $2"
    );
    let rows = client
        .query(&sql, &[&changefeed, &table.0])
        .await
        .map_err(|e| classify(e, "reading the copy marker of a table"))?;
    let mut copied = Copied::No;
    for row in rows {
        let marked = Range { start: row.get(1), end: row.get(2) };
        if range.is_within(&marked) && parse_ts(row.get(0))? == snapshot {
            return Ok(Copied::This);
        }
        if range.common(&marked).is_some() {
            copied = Copied::Before;
        }
    }
    Ok(copied)
}

/// Forgets that copies of a table have begun.
pub(crate) async fn forget_copy_markers(
    client: &impl GenericClient,
    own: &str,
    changefeed: &str,
    table: TableId,
) -> Result<(), Failure> {
    let sql = format!("DELETE FROM {own}.copy WHERE changefeed = $1 AND table_id = $2");
    client
        .execute(&sql, &[&changefeed, &table.0])
        .await
        .map(|_| ())
        .map_err(|e| classify(e, "writing the sink's own tables"))
}

/// Notes that the copy of a key range at `ts` has begun.
pub(crate) async fn set_copy_marker(
    client: &impl GenericClient,
    own: &str,
    changefeed: &str,
    table: TableId,
    range: &Range,
    ts: Ts,
) -> Result<(), Failure> {
    let sql = format!(
        "INSERT INTO {own}.copy (changefeed, table_id, span_start, span_end, copy_ts) \
         VALUES ($1, $2, $4, $5, $3::text::numeric) \
         ON CONFLICT (changefeed, table_id, span_start, span_end) DO UPDATE SET copy_ts = EXCLUDED.copy_ts"
    );
    client
        .execute(&sql, &[&changefeed, &table.0, &ts.0.to_string(), &range.start, &range.end])
        .await
        .map_err(|e| classify(e, "writing the sink's own tables"))?;
    Ok(())
}

/// Notes that a DDL of a table was executed.
pub(crate) async fn set_last_ddl(
    client: &impl GenericClient,
    own: &str,
    changefeed: &str,
    table: TableId,
    ts: Ts,
) -> Result<(), Failure> {
    let sql = format!(
        "INSERT INTO {own}.ddl (changefeed, table_id, commit_ts) VALUES ($1, $2, $3::text::numeric) \
         ON CONFLICT (changefeed, table_id) DO UPDATE SET commit_ts = EXCLUDED.commit_ts"
    );
    client
        .execute(&sql, &[&changefeed, &table.0, &ts.0.to_string()])
        .await
        .map_err(|e| classify(e, "writing the sink's own tables"))?;
    Ok(())
}

/// Removes everything of a changefeed.
pub(crate) async fn forget(client: &Client, config: &PgConfig, changefeed: &str) -> Result<(), Failure> {
    for relation in ["progress", "copy", "parts", "created", "ddl", "resyncs"] {
        let sql = format!("DELETE FROM {}.{relation} WHERE changefeed = $1", config.own_schema);
        match client.execute(&sql, &[&changefeed]).await {
            Ok(_) => {}
            // Never created: nothing to forget.
            Err(e) if e.code().is_some_and(|code| matches!(code.code(), "42P01" | "3F000")) => {}
            Err(e) => return Err(classify(e, "removing the progress of a changefeed")),
        }
    }
    Ok(())
}
