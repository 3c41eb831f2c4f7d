//! What the sink keeps downstream for itself: progress per queue, copy markers, executed DDLs.
//!
//! Progress rows are changed in the transaction of the rows they speak of, and only from the value that the
//! writer knows. A writer that is behind, because another one took over or because the answer to its commit
//! was lost, changes no row and must read again. Hence a row change is applied exactly once.

use heartbeatpb::{TableId, Ts};
use tokio_postgres::{Client, GenericClient};

use super::config::PgConfig;
use super::connection::{Failure, classify};
use super::route::Position;
use super::sql::TextArray;
use crate::Error;
use crate::causality::{SHARDS, Shard};

/// Progress of the queues of one table.
pub(crate) type Positions = [Position; SHARDS];

/// Held while the sink's own tables, or target tables, are created: two nodes may start at once.
pub(crate) const CREATE_LOCK: &str = "SELECT pg_catalog.pg_advisory_xact_lock(5577006791947779410)";

/// Creates the sink's own schema and tables where they are missing.
pub(crate) async fn prepare(client: &Client, config: &PgConfig) -> Result<(), Failure> {
    let schema = &config.own_schema;
    let exists = client
        .query_one(
            "SELECT count(c.oid), count(n.oid) > 0 FROM pg_catalog.pg_namespace n LEFT JOIN pg_catalog.pg_class c \
             ON n.oid = c.relnamespace AND c.relname IN ('progress', 'copy', 'ddl') WHERE n.nspname = $1",
            &[&config.own_schema_name],
        )
        .await
        .map_err(|e| classify(e, "looking for the sink's own tables"))?;
    if exists.get::<_, i64>(0) == 3 {
        return Ok(());
    }
    // The statement needs its permission even where it would do nothing.
    let create_schema =
        if exists.get(1) { String::new() } else { format!("CREATE SCHEMA IF NOT EXISTS {schema};") };
    let sql = format!(
        "BEGIN; {CREATE_LOCK}; {create_schema} \
         CREATE TABLE IF NOT EXISTS {schema}.progress (changefeed text NOT NULL, table_id bigint NOT NULL, \
             shard smallint NOT NULL, commit_ts numeric(20) NOT NULL, row_number bigint NOT NULL, \
             PRIMARY KEY (changefeed, table_id, shard)) \
             WITH (fillfactor = 40, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_scale_factor = 0); \
         CREATE TABLE IF NOT EXISTS {schema}.copy (changefeed text NOT NULL, table_id bigint NOT NULL, \
             copy_ts numeric(20) NOT NULL, PRIMARY KEY (changefeed, table_id)); \
         CREATE TABLE IF NOT EXISTS {schema}.ddl (changefeed text NOT NULL, table_id bigint NOT NULL, \
             commit_ts numeric(20) NOT NULL, PRIMARY KEY (changefeed, table_id)); COMMIT"
    );
    if let Err(error) = client.batch_execute(&sql).await {
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

/// Makes sure that a table has its progress rows, and reads them.
pub(crate) async fn load(
    client: &Client,
    config: &PgConfig,
    changefeed: &str,
    table: TableId,
) -> Result<Positions, Failure> {
    let own = &config.own_schema;
    let create = format!(
        "INSERT INTO {own}.progress (changefeed, table_id, shard, commit_ts, row_number) \
         SELECT $1, $2, shard, 0, -1 FROM pg_catalog.generate_series(0, 15) AS shard ON CONFLICT DO NOTHING"
    );
    let read = format!(
        "SELECT shard, commit_ts::text, row_number FROM {own}.progress WHERE changefeed = $1 AND table_id = $2"
    );
    let failed = |e| classify(e, "reading the progress of a table");
    let mut rows = client.query(&read, &[&changefeed, &table.0]).await.map_err(failed)?;
    if rows.len() < SHARDS {
        client.execute(&create, &[&changefeed, &table.0]).await.map_err(failed)?;
        rows = client.query(&read, &[&changefeed, &table.0]).await.map_err(failed)?;
    }
    let mut positions = [Position::START; SHARDS];
    for row in rows {
        let shard: i16 = row.get(0);
        let commit_ts = parse_ts(row.get(1))?;
        if let Some(position) = usize::try_from(shard).ok().and_then(|shard| positions.get_mut(shard)) {
            *position = Position { commit_ts, row_number: row.get(2) };
        }
    }
    Ok(positions)
}

fn parse_ts(text: &str) -> Result<Ts, Failure> {
    text.parse().map(Ts).map_err(|_| {
        Failure::Fatal(Error::Rejected {
            code: "CDC:ErrSinkProgress",
            what: "the sink's own tables in the target hold a position that is no number".into(),
        })
    })
}

/// A step forward of one table in one queue.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Advance {
    pub(crate) table: TableId,
    pub(crate) from: Position,
    pub(crate) to: Position,
}

/// The statement that moves the progress of several tables in one queue; it changes as many rows as there
/// are tables unless someone else moved one of them.
pub(crate) fn advance_sql(own: &str) -> String {
    format!(
        "UPDATE {own}.progress AS p SET commit_ts = u.ts::numeric, row_number = u.n::bigint \
         FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[]) \
             AS u(changefeed, table_id, shard, ts, n, old_ts, old_n) \
         WHERE p.changefeed = u.changefeed AND p.table_id = u.table_id::bigint AND p.shard = u.shard::smallint \
             AND p.commit_ts = u.old_ts::numeric AND p.row_number = u.old_n::bigint"
    )
}

/// Parameters of [`advance_sql`].
pub(crate) fn advance_params(changefeed: &str, shard: Shard, steps: &[Advance]) -> Vec<TextArray> {
    let mut arrays: Vec<TextArray> = (0..7).map(|_| TextArray::new()).collect();
    for step in steps {
        let values = [
            changefeed.to_owned(),
            step.table.0.to_string(),
            shard.index().to_string(),
            step.to.commit_ts.0.to_string(),
            step.to.row_number.to_string(),
            step.from.commit_ts.0.to_string(),
            step.from.row_number.to_string(),
        ];
        for (array, value) in arrays.iter_mut().zip(values) {
            array.push_text(&value);
        }
    }
    arrays
}

/// Moves every queue of a table to a barrier that all of them have reached.
pub(crate) async fn pass(
    client: &impl GenericClient,
    own: &str,
    changefeed: &str,
    table: TableId,
    to: Position,
) -> Result<(), Failure> {
    let sql = format!(
        "UPDATE {own}.progress SET commit_ts = $3::text::numeric, row_number = $4 WHERE changefeed = $1 \
         AND table_id = $2 AND (commit_ts, row_number) < ($3::text::numeric, $4)"
    );
    client
        .execute(&sql, &[&changefeed, &table.0, &to.commit_ts.0.to_string(), &to.row_number])
        .await
        .map_err(|e| classify(e, "writing progress"))?;
    Ok(())
}

/// The snapshot position of the copy that filled a table, if one began.
pub(crate) async fn copy_marker(
    client: &impl GenericClient,
    own: &str,
    changefeed: &str,
    table: TableId,
) -> Result<Option<Ts>, Failure> {
    let sql = format!("SELECT copy_ts::text FROM {own}.copy WHERE changefeed = $1 AND table_id = $2");
    let row = client
        .query_opt(&sql, &[&changefeed, &table.0])
        .await
        .map_err(|e| classify(e, "reading the copy marker of a table"))?;
    row.map(|row| parse_ts(row.get(0))).transpose()
}

/// Notes that the copy of a table at `ts` has begun.
pub(crate) async fn set_copy_marker(
    client: &impl GenericClient,
    own: &str,
    changefeed: &str,
    table: TableId,
    ts: Ts,
) -> Result<(), Failure> {
    upsert_ts(client, &format!("{own}.copy"), "copy_ts", changefeed, table, ts).await
}

/// The last DDL of a table that was executed.
pub(crate) async fn last_ddl(
    client: &impl GenericClient,
    own: &str,
    changefeed: &str,
    table: TableId,
) -> Result<Option<Ts>, Failure> {
    let sql = format!("SELECT commit_ts::text FROM {own}.ddl WHERE changefeed = $1 AND table_id = $2");
    let row = client
        .query_opt(&sql, &[&changefeed, &table.0])
        .await
        .map_err(|e| classify(e, "reading the executed DDLs"))?;
    row.map(|row| parse_ts(row.get(0))).transpose()
}

/// Notes that a DDL of a table was executed.
pub(crate) async fn set_last_ddl(
    client: &impl GenericClient,
    own: &str,
    changefeed: &str,
    table: TableId,
    ts: Ts,
) -> Result<(), Failure> {
    upsert_ts(client, &format!("{own}.ddl"), "commit_ts", changefeed, table, ts).await
}

async fn upsert_ts(
    client: &impl GenericClient,
    relation: &str,
    column: &str,
    changefeed: &str,
    table: TableId,
    ts: Ts,
) -> Result<(), Failure> {
    let sql = format!(
        "INSERT INTO {relation} (changefeed, table_id, {column}) VALUES ($1, $2, $3::text::numeric) \
         ON CONFLICT (changefeed, table_id) DO UPDATE SET {column} = EXCLUDED.{column}"
    );
    client
        .execute(&sql, &[&changefeed, &table.0, &ts.0.to_string()])
        .await
        .map_err(|e| classify(e, "writing the sink's own tables"))?;
    Ok(())
}

/// Removes everything of a changefeed.
pub(crate) async fn forget(client: &Client, config: &PgConfig, changefeed: &str) -> Result<(), Failure> {
    for relation in ["progress", "copy", "ddl"] {
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
