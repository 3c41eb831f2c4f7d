//! Tables with rows that come to a changefeed while its log is read: wanted ones that it does not follow, since nobody
//! would bring their rows. They are taken in when somebody sees to the rows ([`crate::upstream::Entrance`]).
//!
//! ```text
//!   the filter was altered, or a table got a name or a key that is wanted
//!     │ noted durably downstream: copy it, and apply nothing of it before
//!     ▼
//!   ALTER PUBLICATION … ADD TABLE, with a change of the schema in the log ──▶ the reader follows it from there on
//!                                                                              like a table that was created
//! ```
//!
//! What somebody has put into the publication by hand comes with such a change too, which the triggers write; then the
//! reader has it noted when it comes to that ([`come`]).

use heartbeatpb::TableId;

use crate::Error;
use crate::upstream::FeedSpec;
use crate::upstream::postgres::admin;
use crate::upstream::postgres::catalog::{self, CatalogTable, Selection};
use crate::upstream::postgres::conn::Connection;
use crate::upstream::postgres::names::Names;
use crate::upstream::postgres::sql::{ident, literal};

/// The tag of changes by which we take a table in; a person's has that of the statement.
const TAG: &str = "MILLRACE ADD TABLE";
/// The tag of changes by which somebody else does.
const BY_HAND: &str = "ALTER PUBLICATION";
/// Tables that are looked up one by one; more are found among all.
const FEW: usize = 8;
/// How long a lock on a table of others is waited for at once, and how often.
const LOCK_TIMEOUT: &str = "1s";
const LOCK_ATTEMPTS: u32 = 5;

/// Takes in the wanted tables that can be replicated and are not followed, or only this one. Answers how many came.
///
/// # Errors
/// When the upstream or the downstream cannot be asked.
pub(crate) async fn open(
    conn: &mut Connection,
    spec: &FeedSpec,
    names: &Names,
    only: Option<u32>,
) -> Result<usize, Error> {
    let mut came = 0;
    for table in outside(conn, spec, names, only).await? {
        match admit(conn, spec, names, &table).await? {
            None => came += 1,
            Some(why) => tracing::warn!(changefeed = %spec.changefeed, table = table.sql_name(),
                "a table that the filter wants is not replicated: {why}"),
        }
    }
    Ok(came)
}

/// A table comes to the changefeed by a change with this tag. Unless it was seen to before that, its rows have to be copied.
///
/// # Errors
/// When the downstream cannot be asked.
pub(crate) async fn come(spec: &FeedSpec, tag: &str, table: &CatalogTable) -> Result<(), Error> {
    if tag != BY_HAND || !spec.initial_copy || see_to(spec, table).await? {
        return Ok(());
    }
    tracing::warn!(changefeed = %spec.changefeed, table = table.sql_name(),
        "a table was put into the publication: only changes of it are replicated, since rows that it has cannot be copied \
         while the changefeed runs");
    Ok(())
}

/// Has it noted that the rows of a table have to be copied. False: nobody does that.
async fn see_to(spec: &FeedSpec, table: &CatalogTable) -> Result<bool, Error> {
    let Some(entrance) = &spec.entrance else { return Ok(false) };
    let info = &table.info;
    entrance.enter(info.id, &format!("{}.{}", info.schema, info.name)).await
}

/// Wanted tables that can be replicated and are not followed.
async fn outside(
    conn: &mut Connection,
    spec: &FeedSpec,
    names: &Names,
    only: Option<u32>,
) -> Result<Vec<CatalogTable>, Error> {
    let sql = format!(
        "SELECT c.oid::bigint, n.nspname, c.relname FROM pg_catalog.pg_class c \
         JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
         LEFT JOIN millrace_capture.shapes s ON s.class = 'table' AND s.object = c.oid \
         WHERE c.relkind IN ('r', 'p') AND c.relpersistence = 'p' AND NOT c.relispartition AND n.nspname !~ '^pg_' \
           AND n.nspname NOT IN ('information_schema', 'millrace', 'millrace_capture') \
           AND NOT COALESCE(s.shape -> 'published' ? {}, false){}",
        literal(&names.slot),
        only.map(|table| format!(" AND c.oid = {table}")).unwrap_or_default()
    );
    let mut ids = Vec::new();
    for row in conn.query("list tables that are not replicated", &sql).await? {
        if spec.filter.matches(row.text(1), row.text(2)) {
            ids.push(TableId(row.number(0)?));
        }
    }
    let selection = |only| Selection { only, ..admin::selection(spec) };
    let mut tables = Vec::new();
    if ids.len() > FEW {
        tables = catalog::load(conn, &selection(None)).await?;
        tables.retain(|table| ids.contains(&table.info.id));
    } else {
        for id in ids {
            tables.extend(catalog::load(conn, &selection(Some(id))).await?);
        }
    }
    tables.retain(|table| table.obstacle.is_none());
    Ok(tables)
}

/// Takes a table in. Answers why not, if it cannot be.
async fn admit(
    conn: &mut Connection,
    spec: &FeedSpec,
    names: &Names,
    table: &CatalogTable,
) -> Result<Option<&'static str>, Error> {
    let id = table.info.id.0;
    let sql = format!(
        "SELECT COALESCE(has_function_privilege(pg_catalog.to_regprocedure(\
             'millrace_capture.note(text, oid, jsonb, text, text, boolean)'), 'EXECUTE'), false), \
           EXISTS (SELECT FROM pg_catalog.pg_publication p JOIN pg_catalog.pg_publication_rel r ON r.prpubid = p.oid \
             WHERE p.pubname = {} AND r.prrelid = {id})",
        literal(&names.slot)
    );
    let rows = conn.query("look at a table that is to be published", &sql).await?;
    let (may, member) = rows.first().map_or((false, false), |row| (row.flag(0), row.flag(1)));
    if !(may && table.readable && (table.owned || member)) {
        return Ok(Some(
            "Millrace's role does not own it, may not read it, or does not own what captures schema changes",
        ));
    }
    if spec.initial_copy && !see_to(spec, table).await? {
        return Ok(Some("it has rows that cannot be copied while the changefeed runs"));
    }
    let add = match member {
        true => String::new(),
        false => format!("ALTER PUBLICATION {} ADD TABLE ONLY {};", ident(&names.slot), table.sql_name()),
    };
    // Nobody else makes this change, which the triggers would tell.
    let sql = format!(
        "BEGIN; SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'; SELECT set_config('millrace_capture.own', 'on', true); {add} \
         SELECT millrace_capture.note('table', {id}, millrace_capture.table_shape({id}), {}, \
         current_setting('search_path'), false); COMMIT",
        literal(TAG)
    );
    for _ in 0..LOCK_ATTEMPTS {
        let Err(error) = conn.query("publish a table", &sql).await else {
            tracing::info!(changefeed = %spec.changefeed, table = table.sql_name(), copied = spec.initial_copy,
                "a table comes to the changefeed");
            return Ok(None);
        };
        conn.query("end a transaction", "ROLLBACK").await?;
        // A former reader, or somebody else, was faster; or it is gone.
        let settled = |state: &str| matches!(state, "42710" | "42P01" | "3F000");
        if matches!(&error, Error::UpstreamQuery { sqlstate, .. } if settled(sqlstate)) {
            return Ok(None);
        }
        if !matches!(error, Error::UpstreamUnavailable { .. }) {
            return Err(error);
        }
    }
    Ok(Some("somebody keeps it locked; resume the changefeed when that has ended"))
}
