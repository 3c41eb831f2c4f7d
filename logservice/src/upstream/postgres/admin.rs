//! Prerequisites, retention (slot and publication), and questions to the server.

use std::time::Duration;

use heartbeatpb::config::DdlCapture;
use heartbeatpb::{ChangefeedId, Ts, WallTime};

use super::catalog::{self, CatalogTable, Selection};
use super::conn::{Connection, Purpose};
use super::ddl::{history, install};
use super::names::Names;
use super::options::ConnectOptions;
use super::sql::{ident, literal, lsn, parse_lsn};
use super::{origin, partial, publication, slot};
use crate::Error;
use crate::upstream::{CheckReport, FeedSpec, SourceTable, StartPoint, UpstreamIdentity};

/// Oldest server: the first that reports partitioned tables by their root for every statement we need.
const MIN_VERSION: u32 = 14;
/// Newest server that was tested.
const MAX_TESTED_VERSION: u32 = 18;
/// Attempts to drop a slot that its last reader is about to leave, and the pause between them.
const DROP_ATTEMPTS: u32 = 40;
const DROP_PAUSE: Duration = Duration::from_millis(250);
/// How long a reader that is told to end may take.
const TERMINATION: Duration = Duration::from_secs(2);
/// How many tables an error names.
const NAMED_TABLES: usize = 5;
/// The server's clock in microseconds since the Unix epoch.
const CLOCK: &str = "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint";

/// Opens a connection for short statements.
pub(crate) async fn connect(options: &ConnectOptions) -> Result<Connection, Error> {
    Connection::connect(options, Purpose::Admin, "millrace").await
}

/// What a changefeed wants of the catalog.
pub(crate) fn selection(spec: &FeedSpec) -> Selection<'_> {
    Selection {
        filter: &spec.filter,
        force_replicate: spec.force_replicate,
        version: spec.start_ts,
        only: None,
        publishes: (!spec.publish.is_empty()).then_some(&spec.changefeed),
    }
}

/// The same before there is a publication.
fn whole(spec: &FeedSpec) -> Selection<'_> {
    Selection { publishes: None, ..selection(spec) }
}

/// The wanted tables that a usable publication carries, as they were at `at` where schema changes are `captured`. Where they
/// are not, a published table that has become ineligible is an error.
pub(crate) async fn published_tables(
    conn: &mut Connection,
    spec: &FeedSpec,
    names: &Names,
    (at, captured): (Ts, bool),
) -> Result<Vec<CatalogTable>, Error> {
    if captured {
        let tables = history::tables_at(conn, spec, names, at).await?;
        if let Some((table, obstacle)) =
            tables.iter().find_map(|table| table.obstacle.as_ref().map(|obstacle| (table, obstacle)))
        {
            tracing::warn!(
                table = format!("{}.{}", table.info.schema, table.info.name),
                reason = obstacle,
                "a table that is replicated has become one that cannot be"
            );
        }
        return Ok(tables);
    }
    let sql = format!(
        "SELECT r.prrelid FROM pg_publication p JOIN pg_publication_rel r ON r.prpubid = p.oid WHERE p.pubname = {}",
        literal(&names.slot)
    );
    let mut members = std::collections::BTreeSet::new();
    for row in conn.query("list the tables of a publication", &sql).await? {
        members.insert(row.number::<i64>(0)?);
    }
    let mut tables = Vec::new();
    for table in catalog::load(conn, &selection(spec)).await? {
        let name = || format!("{}.{}", table.info.schema, table.info.name);
        if !members.contains(&table.info.id.0) {
            if table.obstacle.is_none() {
                tracing::warn!(
                    table = name(),
                    "a table that appeared after the changefeed was created is not replicated"
                );
            }
        } else if let Some(obstacle) = &table.obstacle {
            return Err(Error::SchemaChange { table: name(), change: obstacle.clone() });
        } else {
            members.remove(&table.info.id.0);
            tables.push(table);
        }
    }
    // A name that the filter does not match any more must not take a table out of the changefeed in silence.
    if let Some(renamed) = members.first() {
        let rows = conn.query("name a table", &format!("SELECT {renamed}::regclass")).await?;
        let table = rows.first().map_or_else(|| renamed.to_string(), |row| row.text(0).to_owned());
        let change = format!(
            "it belongs to the changefeed, but the filter does not match its name; if it was renamed, remove the \
             changefeed and create it again; if it is not wanted any more, run: ALTER PUBLICATION {} DROP TABLE {table}",
            ident(&names.slot)
        );
        return Err(Error::SchemaChange { table, change });
    }
    Ok(tables)
}

/// The tables that a reader delivers: those of the publication, or before there is one, the eligible ones.
pub(crate) async fn tables(options: &ConnectOptions, spec: &FeedSpec) -> Result<Vec<SourceTable>, Error> {
    let names = Names::of(&spec.changefeed);
    let mut conn = connect(options).await?;
    let tables = if publication::find(&mut conn, &names).await?.is_some() {
        let captured = install::is_active(&mut conn, &names).await?;
        publication::usable(&mut conn, spec, &names, captured).await?;
        published_tables(&mut conn, spec, &names, (spec.start_ts, captured)).await?
    } else {
        let mut tables = catalog::load(&mut conn, &whole(spec)).await?;
        tables.retain(|table| table.obstacle.is_none());
        tables
    };
    conn.close().await;
    Ok(tables.iter().map(CatalogTable::source).collect())
}

/// See [`crate::upstream::Upstream::check`].
pub(crate) async fn check(options: &ConnectOptions, spec: &FeedSpec) -> Result<CheckReport, Error> {
    let names = Names::of(&spec.changefeed);
    let mut conn = connect(options).await?;
    let mut report = CheckReport::default();
    check_server(&mut conn, spec, &names, &mut report).await?;
    Connection::connect(options, Purpose::Replication, "millrace check").await?.close().await;
    let captures = install::may_install(&mut conn).await?;
    let adopted = publication::find(&mut conn, &names).await?.is_some_and(|found| found.is_ours());
    let (mut unreadable, mut unowned) = (Vec::new(), Vec::new());
    let tables = catalog::load(&mut conn, &if adopted { selection(spec) } else { whole(spec) }).await?;
    if !adopted {
        partial::wanted(&mut conn, spec, &tables).await?;
    }
    for table in tables {
        if let Some(obstacle) = &table.obstacle {
            report.ineligible.push((table.source(), obstacle.clone()));
            continue;
        }
        if spec.initial_copy && !table.readable {
            unreadable.push(table.sql_name());
        }
        if !adopted && !table.owned {
            unowned.push(table.sql_name());
        }
        report.eligible.push(table.source());
    }
    conn.close().await;
    let role = ident(&options.user);
    if !unreadable.is_empty() {
        let what = format!(
            "role {role} may not read {} table(s), which the initial copy needs; run: GRANT SELECT ON {} TO {role} \
             (and GRANT USAGE on the schema)",
            unreadable.len(),
            some(&unreadable)
        );
        return Err(Error::UpstreamPrivilege { what });
    }
    if !unowned.is_empty() {
        let what = format!(
            "role {role} does not own {} table(s), which publishing them needs: {}; make it a member of the owning \
             role (GRANT owner TO {role})",
            unowned.len(),
            some(&unowned)
        );
        return Err(Error::UpstreamPrivilege { what });
    }
    if spec.ddl.capture == DdlCapture::Auto && spec.publish.is_empty() && !captures {
        report.warnings.push(format!(
            "role {role} is no superuser and may not be allowed to install event triggers: then the changefeed stops at \
             the first change of a table's schema"
        ));
    }
    if report.eligible.is_empty() {
        report.warnings.push("no table that matches the filter can be replicated".to_owned());
    }
    Ok(report)
}

fn some(names: &[String]) -> String {
    let mut text = names.iter().take(NAMED_TABLES).cloned().collect::<Vec<_>>().join(", ");
    if names.len() > NAMED_TABLES {
        text.push_str(", …");
    }
    text
}

async fn check_server(
    conn: &mut Connection,
    spec: &FeedSpec,
    names: &Names,
    report: &mut CheckReport,
) -> Result<(), Error> {
    let unmet = |what: String| Err(Error::UpstreamPrerequisite { what });
    let version = conn.version();
    if version < MIN_VERSION {
        return unmet(format!(
            "PostgreSQL {version} is too old; {MIN_VERSION} is the oldest supported version"
        ));
    }
    if version > MAX_TESTED_VERSION {
        report
            .warnings
            .push(format!("PostgreSQL {version} is newer than what was tested ({MAX_TESTED_VERSION})"));
    }
    let sql = "SELECT current_setting('wal_level'), pg_is_in_recovery(), \
                 current_setting('max_replication_slots')::int, (SELECT count(*) FROM pg_replication_slots), \
                 current_setting('max_wal_senders')::int, (SELECT count(*) FROM pg_stat_replication), \
                 has_database_privilege(current_database(), 'CREATE'), current_setting('max_slot_wal_keep_size'), \
                 quote_ident(current_database()), quote_ident(current_user)";
    let rows = conn.query("show its settings", sql).await?;
    let row = rows.first().ok_or_else(|| Error::protocol("no settings"))?;
    if row.flag(1) {
        return unmet("the server is a standby; use the primary".to_owned());
    }
    if row.text(0) != "logical" {
        return unmet(format!(
            "wal_level is {}; run: ALTER SYSTEM SET wal_level = 'logical' and restart the server",
            row.text(0)
        ));
    }
    let own = slot::find(conn, &names.slot).await?;
    // The initial copy takes a second slot and a second sender for a moment.
    let copy = i64::from(spec.initial_copy);
    let (slots, used): (i64, i64) = (row.number(2)?, row.number(3)?);
    if slots - used < i64::from(own.is_none()) + copy {
        return unmet(format!(
            "{used} of {slots} replication slots are in use and {} are needed; drop unused slots, or raise \
             max_replication_slots and restart the server",
            i64::from(own.is_none()) + copy
        ));
    }
    let (senders, used): (i64, i64) = (row.number(4)?, row.number(5)?);
    if senders - used < 1 + copy {
        return unmet(format!(
            "{used} of {senders} WAL senders are in use and {} are needed; raise max_wal_senders and restart the \
             server",
            1 + copy
        ));
    }
    if !row.flag(6) {
        let what = format!(
            "role {1} may not create a publication; run: GRANT CREATE ON DATABASE {0} TO {1}",
            row.text(8),
            row.text(9)
        );
        return Err(Error::UpstreamPrivilege { what });
    }
    if row.text(7) != "-1" {
        report.warnings.push(format!(
            "max_slot_wal_keep_size is {}: a changefeed that stands still for more log than this loses its place",
            row.text(7)
        ));
    }
    Ok(())
}

/// See [`crate::upstream::Upstream::create_retention`].
pub(crate) async fn create_retention(
    options: &ConnectOptions,
    spec: &FeedSpec,
    at: Option<Ts>,
) -> Result<StartPoint, Error> {
    let names = Names::of(&spec.changefeed);
    let mut conn = Connection::connect(options, Purpose::Admin, &names.creator()).await?;
    // Before the slot too: its creation waits for transactions that the triggers do not see.
    let captured = if spec.publish.is_empty() {
        install::install(&mut conn, spec, &names).await?
    } else {
        tracing::info!(changefeed = %spec.changefeed,
            "schema changes are not captured, since tables are published in part");
        false
    };
    // Decoding looks the publication up as of the changes, so it must be older than the slot.
    let result = create_slot(&mut conn, spec, &names, at, captured).await;
    if result.is_err() && captured {
        install::remove(&mut conn, &names).await?;
    }
    conn.close().await;
    result
}

/// Creates the publication, then the slot, and tells the capture of schema changes where it begins.
async fn create_slot(
    conn: &mut Connection,
    spec: &FeedSpec,
    names: &Names,
    at: Option<Ts>,
    captured: bool,
) -> Result<StartPoint, Error> {
    let made_publication = ensure_publication(conn, spec, names, captured).await?;
    let result = async {
        if captured {
            install::look(conn).await?;
        }
        let start = ensure_slot(conn, names, at).await?;
        if captured {
            install::look(conn).await?;
            install::begin_at(conn, names, start.start_ts).await?;
        }
        Ok(start)
    }
    .await;
    if result.is_err() && made_publication {
        publication::remove(conn, names).await?;
    }
    result
}

async fn ensure_publication(
    conn: &mut Connection,
    spec: &FeedSpec,
    names: &Names,
    captured: bool,
) -> Result<bool, Error> {
    match publication::find(conn, names).await? {
        Some(found) if found.is_ours() => return Ok(false),
        Some(_) => return Err(publication::foreign(names)),
        None => {}
    }
    let tables = catalog::load(conn, &whole(spec)).await?;
    let mut wanted = partial::wanted(conn, spec, &tables).await?;
    let mut list = Vec::new();
    for table in &tables {
        let part = wanted.remove(&table.info.id);
        match &table.obstacle {
            None => {
                if let Some((at, part)) = &part {
                    partial::try_out(conn, names, table, *at, part).await?;
                }
                list.push(partial::member(table, part.map(|(_, part)| part).unwrap_or_default()));
            }
            Some(_) if spec.ignore_ineligible => {}
            Some(reason) => {
                return Err(Error::TableIneligible {
                    table: format!("{}.{}", table.info.schema, table.info.name),
                    reason: reason.clone(),
                });
            }
        }
    }
    publication::create(conn, names, &list).await?;
    if let Some(found) = publication::find(conn, names).await? {
        let server = origin::ask(conn).await?;
        publication::note(conn, names, &found, server.origin, captured).await?;
    }
    Ok(true)
}

async fn ensure_slot(conn: &mut Connection, names: &Names, at: Option<Ts>) -> Result<StartPoint, Error> {
    let too_early = |begins: u64, at: Ts| Error::LogLost {
        what: format!(
            "the log before {} ({begins}) is not kept any more, so a changefeed cannot start at {at}; leave the start \
             position out",
            lsn(begins)
        ),
    };
    let existing = slot::find(conn, &names.slot).await?;
    let begins = match &existing {
        Some(slot) if !slot.ours => {
            let what = format!(
                "replication slot {:?} exists and is not a pgoutput slot of this database; drop it first",
                names.slot
            );
            return Err(Error::RetentionConflict { what });
        }
        Some(slot) if slot.lost.is_some() => {
            let what =
                format!("replication slot {:?} was invalidated by the server; drop it first", names.slot);
            return Err(Error::LogLost { what });
        }
        Some(slot) => slot.confirmed,
        None => {
            let action = "create a replication slot (it waits for the transactions that are running)";
            let rows = conn.query(action, &slot::creation(conn.version(), &names.slot)).await?;
            rows.first()
                .and_then(|row| parse_lsn(row.text(0)))
                .ok_or_else(|| Error::protocol("a new slot has no position"))?
        }
    };
    if let Some(at) = at.filter(|at| at.0 < begins) {
        if existing.is_none() {
            drop_slot(conn, names).await?;
        }
        return Err(too_early(begins, at));
    }
    let time = clock(conn).await?;
    Ok(StartPoint { start_ts: at.unwrap_or(Ts(begins)), time })
}

async fn clock(conn: &mut Connection) -> Result<WallTime, Error> {
    let rows = conn.query("tell the time", &format!("SELECT {CLOCK}")).await?;
    let row = rows.first().ok_or_else(|| Error::protocol("no time"))?;
    Ok(WallTime(row.number(0)?))
}

/// See [`crate::upstream::Upstream::drop_retention`].
pub(crate) async fn drop_retention(options: &ConnectOptions, changefeed: &ChangefeedId) -> Result<(), Error> {
    let names = Names::of(changefeed);
    let mut conn = connect(options).await?;
    end_creators(&mut conn, &names).await?;
    drop_slot(&mut conn, &names).await?;
    // Before the publication: nothing is added to it any more.
    install::remove(&mut conn, &names).await?;
    publication::remove(&mut conn, &names).await?;
    conn.close().await;
    Ok(())
}

/// Ends whoever still makes slot and publication: of a node that was killed, the server finishes the statement that is
/// running, and the creation of a slot waits for other transactions.
async fn end_creators(conn: &mut Connection, names: &Names) -> Result<(), Error> {
    let sql = format!(
        "SELECT pid FROM pg_stat_activity WHERE application_name = {} AND pid <> pg_backend_pid()",
        literal(&names.creator())
    );
    for _ in 0..DROP_ATTEMPTS {
        let rows = conn.query("look for unfinished creations", &sql).await?;
        if rows.is_empty() {
            return Ok(());
        }
        for row in rows {
            terminate(conn, row.number(0)?).await?;
        }
    }
    let what = format!(
        "somebody still makes replication slot {:?}; end the connections named {:?}",
        names.slot,
        names.creator()
    );
    Err(Error::RetentionConflict { what })
}

async fn drop_slot(conn: &mut Connection, names: &Names) -> Result<(), Error> {
    let mut attempt = 0;
    loop {
        match slot::find(conn, &names.slot).await? {
            None => return Ok(()),
            Some(slot) if !slot.ours => return Ok(()),
            Some(slot) => {
                if let Some(pid) = slot.active_pid {
                    match terminate(conn, pid).await {
                        // Where we may not end it, it ends by itself or the slot cannot be dropped.
                        Ok(_) | Err(Error::UpstreamPrivilege { .. }) => {}
                        Err(error) => return Err(error),
                    }
                }
            }
        }
        let sql = format!(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = {}",
            literal(&names.slot)
        );
        match conn.query("drop a replication slot", &sql).await {
            Ok(_) => return Ok(()),
            // Somebody else was faster.
            Err(Error::UpstreamQuery { sqlstate, .. }) if sqlstate == "42704" => return Ok(()),
            // Its reader has not left yet.
            Err(Error::UpstreamUnavailable { .. }) if attempt < DROP_ATTEMPTS => {
                attempt += 1;
                tokio::time::sleep(DROP_PAUSE).await;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Ends the log connection of a reader of ours, and waits until it is gone. `false`: it was gone already, or does not
/// go.
pub(crate) async fn terminate(conn: &mut Connection, pid: u32) -> Result<bool, Error> {
    let sql = format!(
        "SELECT pg_terminate_backend(pid, {}) FROM pg_stat_activity WHERE pid = {pid} AND application_name LIKE \
         'millrace%'",
        TERMINATION.as_millis()
    );
    let rows = conn.query("end a log connection", &sql).await?;
    Ok(rows.first().is_some_and(|row| row.flag(0)))
}

/// The value of a setting, as the server shows it.
pub(crate) async fn setting(conn: &mut Connection, name: &str) -> Result<String, Error> {
    let rows = conn.query("show a setting", &format!("SELECT current_setting({})", literal(name))).await?;
    Ok(rows.first().map(|row| row.text(0).to_owned()).unwrap_or_default())
}

/// See [`crate::upstream::Upstream::current_position`].
pub(crate) async fn current_position(options: &ConnectOptions) -> Result<StartPoint, Error> {
    let mut conn = connect(options).await?;
    let rows = conn.query("tell its position", &format!("SELECT pg_current_wal_lsn(), {CLOCK}")).await?;
    conn.close().await;
    let row = rows.first().ok_or_else(|| Error::protocol("no position"))?;
    let position = parse_lsn(row.text(0)).ok_or_else(|| Error::protocol("malformed position"))?;
    Ok(StartPoint { start_ts: Ts(position), time: WallTime(row.number(1)?) })
}

/// See [`crate::upstream::Upstream::identity`].
pub(crate) async fn identity(options: &ConnectOptions) -> Result<UpstreamIdentity, Error> {
    let mut conn = connect(options).await?;
    let sql = "SELECT s.system_identifier, d.oid, d.datname, current_setting('server_version') \
               FROM pg_control_system() s, pg_database d WHERE d.datname = current_database()";
    let rows = conn.query("identify itself", sql).await?;
    conn.close().await;
    let row = rows.first().ok_or_else(|| Error::protocol("no identity"))?;
    // The identifier is unsigned, the function's result is not.
    let system: i64 = row.number(0)?;
    Ok(UpstreamIdentity {
        system: system.cast_unsigned(),
        database_oid: row.number(1)?,
        database: row.text(2).to_owned(),
        version: row.text(3).to_owned(),
    })
}
