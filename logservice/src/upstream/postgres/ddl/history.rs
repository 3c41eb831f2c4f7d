//! The tables as they were at a checkpoint, and where the changes behind it are.

use std::collections::BTreeSet;

use heartbeatpb::Ts;

use super::message::TableShape;
use super::table;
use crate::Error;
use crate::upstream::FeedSpec;
use crate::upstream::postgres::admin;
use crate::upstream::postgres::catalog::{self, CatalogTable, Selection};
use crate::upstream::postgres::conn::Connection;
use crate::upstream::postgres::names::Names;
use crate::upstream::postgres::sql::literal;

/// Attempts to find a transaction that the log has and its server does not show yet, and the pause between them.
const ATTEMPTS: u32 = 200;
const PAUSE: std::time::Duration = std::time::Duration::from_millis(25);

/// A condition on `millrace_capture.changes c`: the changefeed has not passed the change at `at`.
fn ahead(names: &Names, at: Ts) -> String {
    format!(
        "CASE WHEN c.committed IS NOT NULL THEN c.committed + c.seq > {at} \
         ELSE c.id <> ALL ((SELECT f.applied FROM millrace_capture.feeds f WHERE f.slot = {slot})::bigint[]) END",
        at = at.0,
        slot = literal(&names.slot)
    )
}

/// The tables that a changefeed follows at `at`, in order of their ids. Before its initial copy, those that are there now:
/// the copy brings them.
///
/// # Errors
/// When the upstream cannot be asked.
pub(crate) async fn tables_at(
    conn: &mut Connection,
    spec: &FeedSpec,
    names: &Names,
    at: Ts,
) -> Result<Vec<CatalogTable>, Error> {
    let sql = format!(
        "SELECT start FROM millrace_capture.feeds WHERE slot = {} AND start = {}",
        literal(&names.slot),
        at.0
    );
    let begins = !conn.query("look where a changefeed begins", &sql).await?.is_empty();
    load(conn, spec, names, at, begins && spec.initial_copy).await
}

/// The tables that a changefeed follows at `at`, or those that are there now.
///
/// # Errors
/// When the upstream cannot be asked.
pub(crate) async fn load(
    conn: &mut Connection,
    spec: &FeedSpec,
    names: &Names,
    at: Ts,
    now: bool,
) -> Result<Vec<CatalogTable>, Error> {
    let selection = Selection { version: at, ..admin::selection(spec) };
    let mut tables = catalog::load(conn, &selection).await?;
    let sql = format!(
        "SELECT r.prrelid FROM pg_publication p JOIN pg_publication_rel r ON r.prpubid = p.oid WHERE p.pubname = {}",
        literal(&names.slot)
    );
    let mut members = BTreeSet::new();
    for row in conn.query("list the tables of a publication", &sql).await? {
        members.insert(row.number::<i64>(0)?);
    }
    tables.retain(|table| members.contains(&table.info.id.0));
    if now {
        return Ok(tables);
    }
    // After the catalog: whatever was seen changed there is seen here.
    let sql = format!(
        "SELECT DISTINCT ON (c.object) c.object, c.before FROM millrace_capture.changes c \
         WHERE c.class = 'table' AND {} ORDER BY c.object, c.id",
        ahead(names, at)
    );
    let mut earlier = Vec::new();
    for row in conn.query("list earlier shapes of tables", &sql).await? {
        let object: u32 = row.number(0)?;
        tables.retain(|table| table.info.id.0 != i64::from(object));
        let Some(text) = row.opt(1) else { continue };
        let shape = read(text)?;
        // Not one that an altered filter does not want any more.
        if shape.published.contains(&names.slot) && spec.filter.matches(&shape.schema, &shape.name) {
            earlier.push((object, shape));
        }
    }
    let types = table::types(conn, earlier.iter().map(|(_, shape)| shape)).await?;
    tables.extend(earlier.iter().map(|(object, shape)| table::table(*object, shape, &types, &selection)));
    tables.sort_by_key(|table| table.info.id);
    Ok(tables)
}

/// The transaction in which a checkpoint may lie: where its commit record begins, and the tables that it changed, as they
/// were before it; `None` for one that was not followed.
pub(crate) type Straddling = (u64, Vec<(u32, Option<CatalogTable>)>);

/// The last transaction with changes that begins to commit before `at`.
///
/// # Errors
/// When the upstream cannot be asked.
pub(crate) async fn straddling(
    conn: &mut Connection,
    spec: &FeedSpec,
    names: &Names,
    at: Ts,
) -> Result<Option<Straddling>, Error> {
    let sql = format!(
        "SELECT t.object, t.before, l.committed \
         FROM (SELECT max(c.committed) AS committed FROM millrace_capture.changes c WHERE c.committed < {}) l \
         LEFT JOIN LATERAL (SELECT DISTINCT ON (c.object) c.object, c.before FROM millrace_capture.changes c \
           WHERE c.class = 'table' AND c.committed = l.committed ORDER BY c.object, c.seq) t ON true \
         WHERE l.committed IS NOT NULL",
        at.0
    );
    let (mut commit, mut shapes) = (None, Vec::new());
    for row in conn.query("look for a change at the checkpoint", &sql).await? {
        commit = Some(row.number::<u64>(2)?);
        // What else was changed has no shape that rows depend on, but the transaction has parts all the same.
        if row.opt(0).is_none() {
            continue;
        }
        let shape = row.opt(1).map(read).transpose()?;
        let shape = shape.filter(|shape| shape.published.contains(&names.slot));
        shapes.push((row.number::<u32>(0)?, shape));
    }
    let Some(commit) = commit else { return Ok(None) };
    let types = table::types(conn, shapes.iter().filter_map(|(_, shape)| shape.as_ref())).await?;
    let selection = Selection { version: Ts(commit), ..admin::selection(spec) };
    let tables = shapes
        .into_iter()
        .map(|(object, shape)| (object, shape.map(|shape| table::table(object, &shape, &types, &selection))));
    Ok(Some((commit, tables.collect())))
}

/// Reads a kept shape.
fn read(text: &str) -> Result<TableShape, Error> {
    TableShape::read(serde_json::from_str(text).map_err(|_| Error::protocol("a kept shape is malformed"))?)
}

/// A table that a copy concerns and that changed behind `start`: one of `copied`, or one that came or went before
/// `position`, where the log goes on.
///
/// # Errors
/// When the upstream cannot be asked.
pub(crate) async fn changed_since(
    conn: &mut Connection,
    names: &Names,
    start: Ts,
    position: Ts,
    copied: &[i64],
) -> Result<Option<String>, Error> {
    let list = copied.iter().map(i64::to_string).collect::<Vec<_>>().join(",");
    let slot = literal(&names.slot);
    let sql = format!(
        "SELECT COALESCE(s.shape, c.before) ->> 'schema', COALESCE(s.shape, c.before) ->> 'name' \
         FROM millrace_capture.changes c LEFT JOIN millrace_capture.shapes s ON s.class = c.class AND s.object = c.object \
         WHERE c.class = 'table' AND {ahead} AND (c.object = ANY (ARRAY[{list}]::oid[]) OR (c.at <= {position} \
           AND (COALESCE(s.shape -> 'published' ? {slot}, false) OR COALESCE(c.before -> 'published' ? {slot}, false)))) \
         ORDER BY c.id LIMIT 1",
        ahead = ahead(names, start),
        position = position.0,
    );
    let rows = conn.query("look for schema changes", &sql).await?;
    Ok(rows.first().map(|row| format!("{}.{}", row.text(0), row.text(1))))
}

/// Writes down where the commit record of a transaction with changes begins, before the first of them has an effect.
///
/// # Errors
/// When the upstream cannot be asked.
pub(crate) async fn place(conn: &mut Connection, xid: u32, commit: Ts) -> Result<(), Error> {
    let sql = format!(
        "WITH placed AS (UPDATE millrace_capture.changes SET committed = {commit} WHERE xid = {xid} \
           AND committed IS DISTINCT FROM {commit} RETURNING id) \
         SELECT count(*) > 0 FROM millrace_capture.changes WHERE xid = {xid}",
        commit = commit.0
    );
    // A commit is in the log a moment before others see it.
    for _ in 0..ATTEMPTS {
        let rows = conn.query("write down the place of a schema change", &sql).await?;
        if rows.first().is_some_and(|row| row.flag(0)) {
            return Ok(());
        }
        tokio::time::sleep(PAUSE).await;
    }
    // The history was removed or emptied by somebody else.
    Err(Error::SchemaChange {
        table: "millrace_capture.changes".to_owned(),
        change: format!(
            "it does not hold the schema changes of transaction {xid}, which the log has; remove the changefeed and \
             create it again"
        ),
    })
}

/// Forgets changes that every changefeed has passed for good.
///
/// # Errors
/// When the upstream cannot be asked.
pub(crate) async fn forget(conn: &mut Connection) -> Result<(), Error> {
    let sql = "WITH passed (until) AS (SELECT min(s.confirmed_flush_lsn - '0/0'::pg_lsn)::bigint \
                 FROM pg_catalog.pg_replication_slots s JOIN millrace_capture.feeds f ON f.slot = s.slot_name) \
               DELETE FROM millrace_capture.changes c USING passed p \
               WHERE c.committed + c.seq <= p.until OR (c.committed IS NULL AND c.at <= p.until \
                 AND NOT EXISTS (SELECT FROM millrace_capture.feeds f WHERE c.id <> ALL (f.applied)))";
    conn.query("forget passed schema changes", sql).await.map(drop)
}

/// What became of a table that could not be followed when it was created.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fate {
    /// It is followed now, or gone.
    Settled,
    /// It still cannot be followed.
    Open,
}

/// Whether a table is followed by now, or gone.
///
/// # Errors
/// When the upstream cannot be asked.
pub(crate) async fn fate(conn: &mut Connection, names: &Names, object: u32) -> Result<Fate, Error> {
    let sql = format!(
        "SELECT NOT EXISTS (SELECT FROM millrace_capture.shapes s WHERE s.class = 'table' AND s.object = {object} \
           AND NOT s.shape -> 'published' ? {})",
        literal(&names.slot)
    );
    let rows = conn.query("look at a table", &sql).await?;
    Ok(if rows.first().is_some_and(|row| row.flag(0)) { Fate::Settled } else { Fate::Open })
}
