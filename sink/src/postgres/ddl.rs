//! Schema changes in the target: each once, and what a restart has to know about them.
//!
//! The transaction that executes a change also notes, for every table that took part, that it ran. Whoever starts such a
//! table again starts just in front of it, without the rows at it, and never behind it: all rows before the change were
//! flushed before it ran, and have a shape that the target may not have any more. A change of a schema, or of everything, concerns tables that its event does not
//! name, so the schema of each table is kept too.
//!
//! ```text
//!               opened, created                  dropped, with its schema or alone, or truncated
//!   unknown ───────────────────────▶ in schema s ───────────────────────────────────────────────▶ gone at ts
//!      ▲                                 │  ▲                                                        │
//!      │                                 └──┘ moved: in schema r                                     │
//!      └────────── the changefeed starts again at ts or later: nobody can come for it any more ──────┘
//! ```
//!
//! A table that is gone has no progress, and nobody creates it in the target again. A table with its name and another
//! id is another table.

use std::sync::Arc;

use event::{DdlEvent, DdlKind, TableInfo};
use heartbeatpb::{InfluencedTables, SchemaId, TableId, Ts};
use tokio_postgres::{Client, GenericClient};

use super::config::PgConfig;
use super::connection::Connection;
use super::failure::{Failure, classify};
use super::progress::{self, CREATE_LOCK};
use super::shared::Shared;
use super::sql;
use super::target::{self, Target};
use crate::Error;

/// The key of the lock that whoever changes or opens a table takes; [`TableId::DDL`] stands for all of them.
const LOCK_KEY: &str = "pg_catalog.hashtextextended($1, $2)";

/// SQLSTATE that statements of an upstream raise for what the target cannot follow.
const CANNOT_FOLLOW: &str = "MR001";

/// What the target has seen of a table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Past {
    /// Commit ts of the last change that it took part in.
    pub(crate) last: Option<Ts>,
    /// That change ended it.
    pub(crate) gone: bool,
}

/// Creates the table of tables where it is missing.
pub(crate) async fn prepare(client: &Client, config: &PgConfig) -> Result<(), Failure> {
    let schema = &config.own_schema;
    let statements = format!(
        "CREATE TABLE IF NOT EXISTS {schema}.tables (changefeed text NOT NULL, table_id bigint NOT NULL, \
             schema_id bigint NOT NULL, gone numeric(20), PRIMARY KEY (changefeed, table_id));"
    );
    progress::create_missing(client, config, &["tables"], &statements).await
}

/// What the target has seen of a table.
pub(crate) async fn past(
    client: &impl GenericClient,
    own: &str,
    changefeed: &str,
    table: TableId,
) -> Result<Past, Failure> {
    let sql = format!(
        "SELECT (SELECT commit_ts::text FROM {own}.ddl WHERE changefeed = $1 AND table_id = $2), \
             (SELECT gone::text FROM {own}.tables WHERE changefeed = $1 AND table_id = $2)"
    );
    let row = client
        .query_one(&sql, &[&changefeed, &table.0])
        .await
        .map_err(|e| classify(e, "reading the executed DDLs"))?;
    let ts = |at: usize| row.get::<_, Option<String>>(at).map(|text| progress::parse_ts(&text)).transpose();
    let (last, gone) = (ts(0)?, ts(1)?);
    Ok(Past { last: last.max(gone), gone: gone.is_some() })
}

/// Forgets tables that ended at or before `start_ts`, where the changefeed starts again.
pub(crate) async fn forget_gone(
    client: &impl GenericClient,
    own: &str,
    changefeed: &str,
    start_ts: Ts,
) -> Result<(), Failure> {
    let sql = format!("DELETE FROM {own}.tables WHERE changefeed = $1 AND gone <= $2::text::numeric");
    client
        .execute(&sql, &[&changefeed, &start_ts.0.to_string()])
        .await
        .map(|_| ())
        .map_err(|e| classify(e, "removing what is known of dropped tables"))
}

/// Describes the target of a table, creating it where allowed. `None` when the target is past this shape: the table is
/// gone, or its next rows have another one. Nobody changes the table meanwhile.
pub(crate) async fn open(
    client: &Client,
    shared: &Shared,
    info: &Arc<TableInfo>,
) -> Result<Option<Target>, Failure> {
    let (own, feed) = (&shared.config.own_schema, &shared.gid);
    let failed = |e| classify(e, "opening a table of the target");
    // The first lock lets a fence find the session, whose other locks would be in the way of schema changes.
    let lock = format!(
        "SELECT {share}, pg_catalog.pg_advisory_lock_shared({LOCK_KEY}), \
             pg_catalog.pg_advisory_lock(pg_catalog.hashtextextended($1, $3))",
        share = shared.registration.share(),
    );
    client.execute(&lock, &[feed, &TableId::DDL.0, &info.id.0]).await.map_err(failed)?;
    shared.registration.check(client).await?;
    let past = past(client, own, feed, info.id).await?;
    let outdated = past.gone || past.last.is_some_and(|last| info.version < last);
    let target = if outdated {
        None
    } else {
        let target = target::open(client, info, shared.config.create_tables).await?;
        note_table(client, own, feed, info.id, info.schema_id).await?;
        Some(target)
    };
    // An error closes the connection, which ends its locks.
    client.execute("SELECT pg_catalog.pg_advisory_unlock_all()", &[]).await.map_err(failed)?;
    Ok(target)
}

async fn note_table(
    client: &impl GenericClient,
    own: &str,
    changefeed: &str,
    table: TableId,
    schema: SchemaId,
) -> Result<(), Failure> {
    let sql = format!(
        "INSERT INTO {own}.tables AS t (changefeed, table_id, schema_id) VALUES ($1, $2, $3) \
         ON CONFLICT (changefeed, table_id) DO UPDATE SET schema_id = EXCLUDED.schema_id \
             WHERE t.schema_id <> EXCLUDED.schema_id AND t.gone IS NULL"
    );
    client
        .execute(&sql, &[&changefeed, &table.0, &schema.0])
        .await
        .map(|_| ())
        .map_err(|e| classify(e, "writing the sink's own tables"))
}

/// Executes a DDL once: the transaction that runs it also notes that it ran.
pub(crate) async fn execute(connection: &Connection, shared: &Shared, ddl: &DdlEvent) -> Result<(), Failure> {
    let (client, own, feed) = (connection.client(), &shared.config.own_schema, &shared.gid);
    let named = if ddl.table.is_empty() {
        format!("schema {}", sql::quote(&ddl.schema))
    } else {
        sql::qualified(&ddl.schema, &ddl.table)
    };
    let doing = || format!("executing {} of {named}", statement(ddl.kind));
    let run = async |text: &str| client.batch_execute(text).await.map_err(|e| classify(e, &doing()));
    shared.check_permit()?;
    shared.registration.begin_checked(client).await?;
    // Waits for an attempt whose connection was lost while the server went on with it, and for who opens a table.
    let ids = named_tables(ddl);
    let lock = format!("SELECT pg_catalog.pg_advisory_xact_lock({LOCK_KEY})");
    for id in &ids {
        client.execute(&lock, &[feed, &id.0]).await.map_err(|e| classify(e, &doing()))?;
    }
    for id in &ids {
        if past(client, own, feed, *id).await?.last.is_some_and(|last| last >= ddl.commit_ts) {
            return run("ROLLBACK").await;
        }
    }
    if let Some(after) = ddl.table_info.as_ref().filter(|after| is_new_there(ddl, after)) {
        // A schema that was there before the changefeed, and of which no table was opened so far.
        run(CREATE_LOCK).await?;
        target::create_schema(client, &after.schema).await.map_err(|e| classify(e, &doing()))?;
    }
    let path = sql::quote(&ddl.schema);
    run(&format!("SET LOCAL search_path = {path}, public; SAVEPOINT ddl")).await?;
    match client.batch_execute(&ddl.query).await {
        Ok(()) => {}
        Err(error) if already_so(ddl.kind, &error) => run("ROLLBACK TO SAVEPOINT ddl").await?,
        // Statements such as CREATE INDEX CONCURRENTLY refuse a transaction.
        Err(error) if error.code().is_some_and(|code| code.code() == "25001") => {
            run(&format!("ROLLBACK; SET search_path = {path}, public")).await?;
            shared.registration.share_checked(client).await?;
            shared.check_permit()?;
            let result = client.batch_execute(&ddl.query).await;
            run("SET search_path = ''").await?;
            result.map_err(|e| classify(e, &doing()))?;
            // The session's share ends behind that of the transaction.
            shared.registration.begin_checked(client).await?;
            shared.registration.unshare(client).await?;
        }
        Err(error) => return Err(refused(error, &doing())),
    }
    note(client, own, feed, ddl, &ids).await?;
    shared.check_permit()?;
    run("COMMIT").await
}

/// What the failure of a statement means: where the target cannot follow, the statement itself says why and what to do.
fn refused(error: tokio_postgres::Error, doing: &str) -> Failure {
    match error.as_db_error() {
        Some(db) if db.code().code() == CANNOT_FOLLOW => Failure::Fatal(Error::Rejected {
            code: "CDC:ErrDDLUnsupported",
            what: format!("{doing}: {}", db.message()),
        }),
        Some(_) | None => classify(error, doing),
    }
}

/// Whether a table comes to the schema that it is in afterwards.
fn is_new_there(ddl: &DdlEvent, after: &TableInfo) -> bool {
    ddl.kind == DdlKind::CreateTable || after.schema != ddl.schema
}

/// Tables that a DDL names, in the order of their locks: those that take part, and those that begin.
fn named_tables(ddl: &DdlEvent) -> Vec<TableId> {
    let mut ids = match &ddl.blocked {
        Some(InfluencedTables::Normal(tables)) => tables.clone(),
        Some(InfluencedTables::Schema(_) | InfluencedTables::All) => vec![TableId::DDL],
        None => vec![ddl.table_id],
    };
    ids.extend(ddl.added.iter().map(|added| added.table));
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// Notes that a DDL ran, and what became of the tables.
async fn note(
    client: &impl GenericClient,
    own: &str,
    feed: &str,
    ddl: &DdlEvent,
    ids: &[TableId],
) -> Result<(), Failure> {
    let failed = |e| classify(e, "writing the sink's own tables");
    let ts = ddl.commit_ts.0.to_string();
    for id in ids {
        progress::set_last_ddl(client, own, feed, *id, ddl.commit_ts).await?;
    }
    let wide = match &ddl.blocked {
        Some(InfluencedTables::All) => Some("true OR $3::bigint IS NULL"),
        Some(InfluencedTables::Schema(_)) => Some("schema_id = $3"),
        Some(InfluencedTables::Normal(_)) | None => None,
    };
    if let Some(condition) = wide {
        let sql = format!(
            "INSERT INTO {own}.ddl (changefeed, table_id, commit_ts) \
             SELECT changefeed, table_id, $2::text::numeric FROM {own}.tables \
             WHERE changefeed = $1 AND gone IS NULL AND ({condition}) \
             ON CONFLICT (changefeed, table_id) DO UPDATE SET commit_ts = EXCLUDED.commit_ts"
        );
        client.execute(&sql, &[&feed, &ts, &ddl.schema_id.0]).await.map_err(failed)?;
    }
    for added in &ddl.added {
        note_table(client, own, feed, added.table, added.schema).await?;
    }
    for change in &ddl.schema_changes {
        note_table(client, own, feed, change.table, change.new).await?;
    }
    match &ddl.dropped {
        None | Some(InfluencedTables::All) => return Ok(()),
        Some(InfluencedTables::Schema(schema)) => {
            let sql = format!(
                "UPDATE {own}.tables SET gone = $3::text::numeric \
                 WHERE changefeed = $1 AND schema_id = $2 AND gone IS NULL"
            );
            client.execute(&sql, &[&feed, &schema.0, &ts]).await.map_err(failed)?;
        }
        Some(InfluencedTables::Normal(tables)) => {
            let sql = format!(
                "INSERT INTO {own}.tables (changefeed, table_id, schema_id, gone) \
                 VALUES ($1, $2, $3, $4::text::numeric) \
                 ON CONFLICT (changefeed, table_id) DO UPDATE SET gone = EXCLUDED.gone"
            );
            for table in tables.iter().filter(|table| **table != TableId::DDL) {
                client.execute(&sql, &[&feed, &table.0, &ddl.schema_id.0, &ts]).await.map_err(failed)?;
            }
        }
    }
    // Nothing is left of a table that is gone but that it is.
    for relation in ["progress", "copy", "ddl"] {
        let sql = format!(
            "DELETE FROM {own}.{relation} AS r USING {own}.tables AS t WHERE r.changefeed = $1 \
             AND t.changefeed = $1 AND t.table_id = r.table_id AND t.gone = $2::text::numeric"
        );
        client.execute(&sql, &[&feed, &ts]).await.map_err(failed)?;
    }
    Ok(())
}

/// Removes what is kept of a changefeed.
pub(crate) async fn forget(client: &Client, config: &PgConfig, changefeed: &str) -> Result<(), Failure> {
    let sql = format!("DELETE FROM {}.tables WHERE changefeed = $1", config.own_schema);
    match client.execute(&sql, &[&changefeed]).await {
        Ok(_) => Ok(()),
        // Never created: nothing to forget.
        Err(e) if e.code().is_some_and(|code| matches!(code.code(), "42P01" | "3F000")) => Ok(()),
        Err(e) => Err(classify(e, "removing the progress of a changefeed")),
    }
}

/// What a statement is, for people. Its text may hold values, such as those of a default.
const fn statement(kind: DdlKind) -> &'static str {
    match kind {
        DdlKind::CreateSchema => "a CREATE SCHEMA",
        DdlKind::DropSchema => "a DROP SCHEMA",
        DdlKind::CreateTable => "a CREATE TABLE",
        DdlKind::DropTable => "a DROP TABLE",
        DdlKind::TruncateTable => "a TRUNCATE",
        DdlKind::RenameTable => "a rename",
        DdlKind::AlterTable => "an ALTER TABLE",
        DdlKind::Other | _ => "a DDL",
    }
}

/// Whether the failure says that the target already is as the DDL would make it.
fn already_so(kind: DdlKind, error: &tokio_postgres::Error) -> bool {
    let Some(code) = error.code() else { return false };
    match kind {
        DdlKind::CreateSchema => code.code() == "42P06",
        DdlKind::CreateTable => code.code() == "42P07",
        DdlKind::DropSchema => code.code() == "3F000",
        // No such table, or not even its schema.
        DdlKind::DropTable => matches!(code.code(), "42P01" | "3F000"),
        DdlKind::TruncateTable | DdlKind::RenameTable | DdlKind::AlterTable | DdlKind::Other | _ => false,
    }
}
