//! Puts the triggers and the history into an upstream, and takes them away with the last changefeed.

use heartbeatpb::Ts;
use heartbeatpb::config::DdlCapture;

use crate::Error;
use crate::upstream::FeedSpec;
use crate::upstream::postgres::conn::Connection;
use crate::upstream::postgres::names::Names;
use crate::upstream::postgres::sql::{ident, literal};

/// Tables, functions; may be repeated.
const OBJECTS: &str = include_str!("install.sql");
/// One installs or removes at a time: the key of an advisory lock, "millrace" in ASCII.
const LOCK: &str = "SELECT pg_catalog.pg_advisory_xact_lock(7883963434930823013)";
/// How long a lock on a table of others is waited for at once, how often, and the pause in which they go on.
const LOCK_TIMEOUT: &str = "1s";
const LOCK_ATTEMPTS: u32 = 40;
const LOCK_PAUSE: std::time::Duration = std::time::Duration::from_millis(500);
/// The tag of changes by which a table that is not wanted any more leaves a publication.
pub(crate) const TAKE_OUT: &str = "MILLRACE DROP TABLE";
/// Statements that may change the shape of what is followed.
const TAGS: [&str; 17] = [
    "CREATE TABLE",
    "CREATE TABLE AS",
    "SELECT INTO",
    "ALTER TABLE",
    "CREATE INDEX",
    "ALTER INDEX",
    "CREATE SCHEMA",
    "ALTER SCHEMA",
    "CREATE VIEW",
    "ALTER VIEW",
    "CREATE SEQUENCE",
    "ALTER SEQUENCE",
    "CREATE TYPE",
    "ALTER TYPE",
    "CREATE DOMAIN",
    "ALTER DOMAIN",
    "ALTER PUBLICATION",
];

/// Event, name of the trigger, function.
const TRIGGERS: [(&str, &str, &str); 3] = [
    ("ddl_command_end", "millrace_command_end", "on_command_end"),
    ("sql_drop", "millrace_drop", "on_drop"),
    ("table_rewrite", "millrace_rewrite", "on_rewrite"),
];

/// Statements that make the event triggers where they are missing, or fire at fewer statements. They fire whatever `session_replication_role` says:
/// what another replication applies here is in our log too.
fn triggers() -> String {
    let tags = TAGS.map(literal).join(", ");
    let mut body = String::new();
    for (event, name, function) in TRIGGERS {
        let when = if event == "ddl_command_end" { format!(" WHEN TAG IN ({tags})") } else { String::new() };
        if !when.is_empty() {
            body.push_str(&format!(
                "IF EXISTS (SELECT FROM pg_catalog.pg_event_trigger WHERE evtname = '{name}' \
                 AND NOT evttags @> ARRAY[{tags}]) THEN DROP EVENT TRIGGER {name}; END IF; "
            ));
        }
        body.push_str(&format!(
            "IF NOT EXISTS (SELECT FROM pg_catalog.pg_event_trigger WHERE evtname = '{name}') THEN \
             CREATE EVENT TRIGGER {name} ON {event}{when} EXECUTE FUNCTION millrace_capture.{function}(); \
             ALTER EVENT TRIGGER {name} ENABLE ALWAYS; END IF; "
        ));
    }
    format!("DO {}", literal(&format!("BEGIN {body} END")))
}

/// Whether the triggers are there for a changefeed, and our role may read what they keep.
///
/// # Errors
/// When the upstream cannot be asked.
pub(crate) async fn is_active(conn: &mut Connection, names: &Names) -> Result<bool, Error> {
    let sql = "SELECT COALESCE((SELECT has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT') \
               FROM pg_catalog.pg_namespace n JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid \
               WHERE n.nspname = 'millrace_capture' AND c.relname = 'feeds'), false)";
    let rows = conn.query("look for the capture of schema changes", sql).await?;
    if !rows.first().is_some_and(|row| row.flag(0)) {
        return Ok(false);
    }
    let sql =
        format!("SELECT EXISTS (SELECT FROM millrace_capture.feeds WHERE slot = {})", literal(&names.slot));
    let rows = conn.query("look for the capture of schema changes", &sql).await?;
    Ok(rows.first().is_some_and(|row| row.flag(0)))
}

/// Installs what is missing and registers a changefeed. `false`: it is not wanted, or our role may not, and the
/// changefeed goes without.
///
/// # Errors
/// When it is demanded and our role may not, or when the upstream cannot be asked.
pub(crate) async fn install(conn: &mut Connection, spec: &FeedSpec, names: &Names) -> Result<bool, Error> {
    if spec.ddl.capture == DdlCapture::Off {
        return Ok(false);
    }
    let register = format!(
        "INSERT INTO millrace_capture.feeds (slot, rules, force) VALUES ({}, {}, {}) \
         ON CONFLICT (slot) DO UPDATE SET rules = excluded.rules, force = excluded.force",
        literal(&names.slot),
        literal(&spec.filter.to_patterns().to_string()),
        spec.force_replicate
    );
    let sql = format!("BEGIN; {LOCK}; {OBJECTS}; {}; {register}; COMMIT", triggers());
    match conn.query("install the capture of schema changes", &sql).await {
        Ok(_) => Ok(true),
        Err(Error::UpstreamPrivilege { what }) => {
            conn.query("end a transaction", "ROLLBACK").await?;
            if spec.ddl.capture == DdlCapture::Auto {
                return Ok(false);
            }
            let what = format!(
                "schema changes cannot be captured: {what}; event triggers need a superuser, so let one create the \
                 changefeed, or set ddl.capture to \"off\""
            );
            Err(Error::UpstreamPrivilege { what })
        }
        Err(error) => {
            conn.query("end a transaction", "ROLLBACK").await?;
            Err(error)
        }
    }
}

/// What a changefeed wants may have been altered while it was paused.
///
/// # Errors
/// When the upstream cannot be asked.
pub(crate) async fn refresh(conn: &mut Connection, spec: &FeedSpec, names: &Names) -> Result<(), Error> {
    let sql = format!(
        "UPDATE millrace_capture.feeds f SET rules = n.rules, force = n.force \
         FROM (SELECT {}::jsonb AS rules, {} AS force) n \
         WHERE f.slot = {} AND (f.rules <> n.rules OR f.force <> n.force)",
        literal(&spec.filter.to_patterns().to_string()),
        spec.force_replicate,
        literal(&names.slot)
    );
    conn.query("tell which tables are wanted", &sql).await?;
    // What is not wanted any more leaves the publication: should it be wanted again, changes of it will be missing from the
    // log, and it has to come anew.
    let sql = format!(
        "SELECT c.oid::bigint, n.nspname, c.relname FROM pg_catalog.pg_publication p \
         JOIN pg_catalog.pg_publication_rel r ON r.prpubid = p.oid JOIN pg_catalog.pg_class c ON c.oid = r.prrelid \
         JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE p.pubname = {}",
        literal(&names.slot)
    );
    for row in conn.query("list the tables of a publication", &sql).await? {
        if !spec.filter.matches(row.text(1), row.text(2)) {
            take_out(conn, spec, row.number(0)?).await?;
        }
    }
    Ok(())
}

/// Takes a table out of the publications of the changefeeds that do not want it.
async fn take_out(conn: &mut Connection, spec: &FeedSpec, table: i64) -> Result<(), Error> {
    let sql = format!(
        "BEGIN; SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'; SELECT millrace_capture.note('table', {table}, \
         millrace_capture.table_shape({table}), {}, current_setting('search_path'), false); COMMIT",
        literal(TAKE_OUT)
    );
    let Err(error) = conn.query("take a table out of a publication", &sql).await else { return Ok(()) };
    conn.query("end a transaction", "ROLLBACK").await?;
    if !matches!(
        error,
        Error::UpstreamUnavailable { .. } | Error::UpstreamPrivilege { .. } | Error::UpstreamQuery { .. }
    ) {
        return Err(error);
    }
    // Whoever keeps it locked ends some time, and it is tried again when the log is read anew.
    tracing::warn!(changefeed = %spec.changefeed, table, error = error.chain(),
        "a table that is not wanted any more stays in the publication");
    Ok(())
}

/// Whether our role may install, as far as it can be told without trying.
///
/// # Errors
/// When the upstream cannot be asked.
pub(crate) async fn may_install(conn: &mut Connection) -> Result<bool, Error> {
    let sql = "SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user";
    let rows = conn.query("look up its role", sql).await?;
    Ok(rows.first().is_some_and(|row| row.flag(0)))
}

/// Has truncations of partitions told, of those that are there; the triggers see to those that come. Each waits for the
/// transactions that write its table, but never for long at once, since whoever writes later waits behind it.
///
/// # Errors
/// When a table is written by one transaction for longer than we wait, or the upstream cannot be asked.
async fn guard(conn: &mut Connection) -> Result<(), Error> {
    let action = "note truncations of a partition (it waits for transactions that write it)";
    let rows = conn.query(action, "SELECT millrace_capture.unguarded(NULL)").await?;
    for row in rows {
        let guard = format!("SELECT millrace_capture.guard({})", row.number::<u32>(0)?);
        patiently(conn, action, &guard).await?;
    }
    Ok(())
}

/// Executes a statement that needs a lock on a table of others.
async fn patiently(conn: &mut Connection, action: &str, statement: &str) -> Result<(), Error> {
    let sql = format!("BEGIN; SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'; {statement}; COMMIT");
    let mut attempt = 1;
    loop {
        let Err(error) = conn.query(action, &sql).await else { return Ok(()) };
        conn.query("end a transaction", "ROLLBACK").await?;
        if attempt == LOCK_ATTEMPTS || !matches!(error, Error::UpstreamUnavailable { .. }) {
            return Err(error);
        }
        attempt += 1;
        tokio::time::sleep(LOCK_PAUSE).await;
    }
}

/// Notes the shapes of everything that is there, and has truncations of its partitions told.
///
/// # Errors
/// As for the locks of partitions, or when the upstream cannot be asked.
pub(crate) async fn look(conn: &mut Connection) -> Result<(), Error> {
    // A moment for each table, of which there may be very many.
    let sql = "SELECT set_config('statement_timeout', '0', true); SELECT millrace_capture.look()";
    conn.query("note the shapes of tables", sql).await?;
    guard(conn).await
}

/// A changefeed begins at `start`: changes that were made before are no business of it.
///
/// # Errors
/// When the upstream cannot be asked.
pub(crate) async fn begin_at(conn: &mut Connection, names: &Names, start: Ts) -> Result<(), Error> {
    let start = Ts(start.0.min(i64::MAX.unsigned_abs()));
    let sql = format!(
        "UPDATE millrace_capture.feeds SET start = COALESCE(start, {start}), applied = ARRAY(SELECT c.id FROM millrace_capture.changes c \
         WHERE c.committed IS NULL AND c.at <= {start}) WHERE slot = {slot}",
        start = start.0,
        slot = literal(&names.slot)
    );
    conn.query("note where a changefeed begins", &sql).await.map(drop)
}

/// Removes a changefeed, and everything with the last one. Idempotent.
///
/// # Errors
/// When the upstream cannot be asked.
pub(crate) async fn remove(conn: &mut Connection, names: &Names) -> Result<(), Error> {
    if !is_active(conn, names).await? {
        return Ok(());
    }
    // Each table alone: the schema goes in one transaction, which must not collect locks of tables.
    let last =
        format!("NOT EXISTS (SELECT FROM millrace_capture.feeds WHERE slot <> {})", literal(&names.slot));
    let action = "remove a trigger (it waits for transactions that use its table)";
    let sql = format!(
        "SELECT t.tgname, t.tgrelid::regclass FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid \
         JOIN pg_namespace n ON n.oid = p.pronamespace WHERE n.nspname = 'millrace_capture' AND {last}"
    );
    for row in conn.query(action, &sql).await? {
        let drop = format!("DROP TRIGGER IF EXISTS {} ON {}", ident(row.text(0)), row.text(1));
        let body = format!("BEGIN IF {last} THEN {drop}; END IF; END");
        patiently(conn, action, &format!("{LOCK}; DO {}", literal(&body))).await?;
    }
    let drops: String =
        TRIGGERS.map(|(_, name, _)| format!("DROP EVENT TRIGGER IF EXISTS {}; ", ident(name))).concat();
    let body = format!(
        "BEGIN DELETE FROM millrace_capture.feeds WHERE slot = {}; \
         IF NOT EXISTS (SELECT FROM millrace_capture.feeds) THEN {drops} DROP SCHEMA millrace_capture CASCADE; \
         END IF; END",
        literal(&names.slot)
    );
    let sql = format!("BEGIN; {LOCK}; DO {}; COMMIT", literal(&body));
    if let Err(error) = conn.query("remove the capture of schema changes", &sql).await {
        conn.query("end a transaction", "ROLLBACK").await?;
        return Err(error);
    }
    Ok(())
}
