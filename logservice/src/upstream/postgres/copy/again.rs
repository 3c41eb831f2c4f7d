//! One table again, while the log is read: all of it in one snapshot, into one transaction downstream.
//!
//! ```text
//!   source                          streams of the table          downstream
//!   lock it against changes of      │ go on                       │ as it was
//!     its shape and TRUNCATE        │                             │
//!   position w                      │                             │
//!                 the log is read up to w                         │
//!                                   ■ stand still at h ≥ w        │
//!                                     everything up to h  ──────▶ │ written
//!   snapshot at s ≥ h  ──────────────────────────────────────────▶│ replaced, in one transaction, that sets the progress to s
//!                                   ▼ go on                       │ changes up to s are left out
//! ```
//!
//! The lock is the one that every `SELECT` takes. From before the place of the hold to the end of the copy it keeps the
//! shape of the table: what is read fits what is downstream, and no rewrite or `TRUNCATE` makes the table look empty to an
//! old snapshot. The hold makes sure that nothing newer than the snapshot is applied, without which the progress could not be
//! set to it. It is lost with this process, and so is the copy: the downstream notices when it was not alone.

use std::sync::Arc;
use std::time::{Duration, Instant};

use event::{CopyPart, CopySession, CopyTarget, ResyncChange, TableInfo};
use heartbeatpb::{TableId, Ts};
use tokio_util::sync::CancellationToken;

use super::super::admin;
use super::super::catalog::{self, CatalogTable, Selection};
use super::super::conn::{Connection, Purpose};
use super::super::names::Names;
use super::super::options::ConnectOptions;
use super::super::shape::Shape;
use super::super::split;
use super::super::sql::parse_lsn;
use super::{CopyPlan, Snapshot, direct, parts};
use crate::Error;
use crate::event_store::{Gate, Held};
use crate::upstream::{FeedSpec, ReaderProgress, TableCopy};

/// Between two looks at how far the log was read.
const LOOK: Duration = Duration::from_millis(20);
/// How long a table that comes may take to be in the log, from when it is to be copied.
const COMES: Duration = Duration::from_secs(10);
/// What the connections of a copy call themselves.
const APPLICATION: &str = "millrace resync";

/// One run.
struct Again<'a> {
    options: &'a ConnectOptions,
    spec: &'a FeedSpec,
    table: TableId,
    gate: &'a Gate,
    progress: &'a Arc<ReaderProgress>,
    shutdown: &'a CancellationToken,
}

/// A table whose shape does not change.
struct Locked {
    conn: Connection,
    catalog: CatalogTable,
    /// Everything that changed its shape was committed before.
    since: Ts,
}

/// See [`crate::upstream::Upstream::resync`].
pub(crate) async fn run(
    options: &ConnectOptions,
    spec: &FeedSpec,
    table: TableId,
    gate: &Gate,
    progress: &Arc<ReaderProgress>,
    shutdown: &CancellationToken,
) -> Result<(), Error> {
    let again = Again { options, spec, table, gate, progress, shutdown };
    let outcome = again.run().await;
    progress.set_last_error(None);
    outcome
}

impl Again<'_> {
    async fn run(&self) -> Result<(), Error> {
        let nowhere = || Error::UpstreamPrerequisite {
            what:
                "a table can be copied again only into a PostgreSQL target, without on-existing-rows=append"
                    .to_owned(),
        };
        let target = self.spec.copy_target.as_ref().ok_or_else(nowhere)?;
        let (mut locked, held) = self.unless_stopped(self.prepare(target)).await?;
        let session = self.unless_stopped(async { Ok(target.begin().await?) }).await?.ok_or_else(nowhere)?;
        let outcome = self.unless_stopped(self.replace(&mut locked, &held, &session)).await;
        // Also after a failure: nothing of it is left at work downstream when the streams go on.
        session.end().await;
        if outcome.is_ok() {
            held.complete();
        } else {
            drop(held);
        }
        self.progress.copy.end();
        locked.conn.close().await;
        outcome
    }

    async fn unless_stopped<T>(&self, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        tokio::select! {
            result = work => result,
            () = self.shutdown.cancelled() => Err(Error::Closed { what: "the copy of a table" }),
        }
    }

    fn waits_for(&self, what: &str) {
        self.progress.set_last_error(Some(what.to_owned()));
    }

    /// Locks the table and lets its streams stand still, with everything before that written.
    async fn prepare(&self, target: &Arc<dyn CopyTarget>) -> Result<(Locked, Held), Error> {
        self.waits_for("it waits for the place in the log where the table comes");
        let begun = Instant::now();
        while self.gate.is_kept(self.table)
            && self.gate.table(self.table).is_none()
            && begun.elapsed() < COMES
        {
            tokio::time::sleep(LOOK).await;
        }
        self.waits_for("it waits for whoever alters the table in the source");
        let locked = self.lock().await?;
        self.waits_for("it waits for the log to be read up to where it begins");
        while self.gate.resolved() < locked.since {
            if self.gate.is_closed() {
                return Err(Error::Closed { what: "the event store" });
            }
            tokio::time::sleep(LOOK).await;
        }
        let held = self.gate.hold(self.table);
        let held = held.ok_or(Error::Closed { what: "the stream of the table" })?;
        self.pass(target).await?;
        self.waits_for("it waits for earlier changes of the table to be written");
        held.flushed().await?;
        self.progress.set_last_error(None);
        Ok((locked, held))
    }

    /// What nobody has copied stands in front of schema changes, for which this one or another such table may wait: all of
    /// them go on to the last one, without rows, which the copies will hold.
    async fn pass(&self, target: &Arc<dyn CopyTarget>) -> Result<(), Error> {
        for (table, until) in self.gate.delaying() {
            if target.change_resync(table, &ResyncChange::LeaveOut { until }).await? {
                self.gate.pass(table, until);
            } else if table == self.table {
                return Err(Error::Closed { what: "the request for a table" });
            }
        }
        Ok(())
    }

    async fn lock(&self) -> Result<Locked, Error> {
        let mut side = Connection::connect(self.options, Purpose::Admin, APPLICATION).await?;
        let before = self.look(&mut side).await?;
        let name = before.sql_name();
        let mut conn = Connection::connect(self.options, Purpose::Copy, APPLICATION).await?;
        let lock = format!("BEGIN; LOCK TABLE {name} IN ACCESS SHARE MODE");
        match conn.query("lock a table", &lock).await {
            // It was renamed or dropped in between.
            Err(Error::UpstreamQuery { sqlstate, .. }) if matches!(sqlstate.as_str(), "42P01" | "3F000") => {
                return Err(outdated(&before.info));
            }
            other => other?,
        };
        // As it is now, and stays.
        let catalog = self.look(&mut conn).await?;
        if catalog.sql_name() != name {
            return Err(outdated(&catalog.info));
        }
        let rows = conn.query("tell its position", "SELECT pg_current_wal_insert_lsn()").await?;
        let since = rows.first().and_then(|row| parse_lsn(row.text(0)));
        let since = since.map(Ts).ok_or_else(|| Error::protocol("malformed position"))?;
        // The end of a transaction behind it has the log sent up to there, also where nobody else writes.
        side.query("write to the log", "SELECT pg_current_xact_id()").await?;
        side.close().await;
        Ok(Locked { conn, catalog, since })
    }

    async fn look(&self, conn: &mut Connection) -> Result<CatalogTable, Error> {
        let selection = Selection { only: Some(self.table), ..admin::selection(self.spec) };
        let found = catalog::load(conn, &selection).await?.pop();
        found.ok_or_else(|| Error::TableIneligible {
            table: self.table.to_string(),
            reason: "the source has no such table any more, or the filter does not want its name".to_owned(),
        })
    }

    async fn replace(
        &self,
        locked: &mut Locked,
        held: &Held,
        session: &Arc<dyn CopySession>,
    ) -> Result<(), Error> {
        let catalog = &locked.catalog;
        // One that has come is told behind the place where it is held. Behind the lock it does not change.
        let shape = if self.gate.is_kept(self.table) { self.gate.table(self.table) } else { held.shape() };
        let info = shape.filter(|shape| is_same(shape, &catalog.info));
        let info = info.ok_or_else(|| outdated(&catalog.info))?;
        let copy = Arc::new(TableCopy::new(&info.schema, &info.name));
        self.progress.copy.begin(vec![Arc::clone(&copy)]);
        let stopped = || Error::Closed { what: "the copy of a table" };
        let plan = CopyPlan {
            changefeed: &self.spec.changefeed,
            options: self.options,
            names: &Names::of(&self.spec.changefeed),
            application: APPLICATION,
            tables: &[],
            parallel: 1,
            part_bytes: u64::MAX,
            target: None,
            crew: None,
            progress: self.progress,
            shutdown: self.shutdown,
        };
        let Snapshot { position, time, connections } =
            super::snapshot(&plan, 1).await?.ok_or_else(stopped)?;
        let mut conn = connections.into_iter().next().ok_or_else(stopped)?;
        if position < held.at() {
            // The server has another history than the one that was read.
            return Err(outdated(&info));
        }
        copy.begin(split::size(&mut conn, catalog).await?.rows, 1, (0, 0, 0));
        let (mut writer, format) = session.replace(&info, (position, time)).await?;
        let shape = Shape::new(catalog);
        let sql = parts::statement(catalog, &shape, &CopyPart::default(), format)
            .ok_or_else(|| Error::protocol("a whole table has no bounds"))?;
        let action = format!("copy table {}", catalog.sql_name());
        let mut count = |rows, bytes| self.progress.copied(&copy, rows, bytes);
        let rows = direct::relay(&mut conn, (&action, &sql), format, &mut *writer, &mut count).await?;
        conn.close().await;
        // Without the lock something else may have been read than what was there.
        locked.conn.query("keep a table locked", "SELECT 1").await?;
        writer.commit(rows).await?;
        copy.part_done();
        copy.finish();
        tracing::info!(changefeed = %self.spec.changefeed, table = locked.catalog.sql_name(), rows, %position,
            "a table was copied again");
        Ok(())
    }
}

fn outdated(info: &TableInfo) -> Error {
    Error::CopyOutdated { table: format!("{}.{}", info.schema, info.name) }
}

/// Whether rows of one shape have their values where the other has them.
fn is_same(one: &TableInfo, other: &TableInfo) -> bool {
    let columns = |info: &TableInfo| -> Vec<(String, bool)> {
        info.columns.iter().map(|column| (column.name.clone(), column.generated.is_some())).collect()
    };
    (&one.schema, &one.name) == (&other.schema, &other.name) && columns(one) == columns(other)
}
