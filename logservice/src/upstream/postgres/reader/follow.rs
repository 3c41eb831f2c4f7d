//! The reader at schema changes: splits their transaction, and gives the tables their new shapes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use heartbeatpb::config::{DdlConfig, DdlPolicy};
use heartbeatpb::{Ts, WallTime};

use super::{Session, Stream};
use crate::Error;
use crate::upstream::FeedSpec;
use crate::upstream::postgres::admin;
use crate::upstream::postgres::catalog::{CatalogTable, Selection};
use crate::upstream::postgres::conn::Connection;
use crate::upstream::postgres::ddl::event::{Answer, Becomes, Feed, Found, Meaning, Place, meaning, refused};
use crate::upstream::postgres::ddl::history::{self, Fate};
use crate::upstream::postgres::ddl::message::{Change, Notice};
use crate::upstream::postgres::ddl::{entrance, install, table};
use crate::upstream::postgres::names::Names;
use crate::upstream::postgres::options::ConnectOptions;
use crate::upstream::postgres::publication;
use crate::upstream::postgres::shape::Shape;

/// How long a table may take to become one that can be replicated: tools create it first and its key afterwards.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two looks at such a table.
const PAUSE: Duration = Duration::from_millis(250);

/// The open transaction.
#[derive(Default)]
pub(super) struct Txn {
    /// Where its commit record begins.
    commit: u64,
    time: WallTime,
    xid: u32,
    /// Its schema changes so far; each ends a part of it.
    seq: u64,
    /// Tables with another shape, for the next connection, which begins behind the transaction or in front of it.
    tables: Becoming,
    /// Tables whose truncation is not applied, in the part that is open. Only that part's end tells whether it was passed
    /// already, if the changefeed is behind the part's beginning.
    withheld: Vec<String>,
}

impl Txn {
    /// A transaction that has begun.
    pub(super) fn new(commit: u64, time: WallTime, xid: u32) -> Self {
        Self { commit, time, xid, ..Self::default() }
    }
}

/// A table that is followed.
pub(super) type Followed = (CatalogTable, Arc<Shape>);
/// Tables by their ids; `None` is not followed.
type Becoming = Vec<(u32, Option<Followed>)>;
/// Where the commit record of a transaction begins, and tables that it changed, as they were before it.
pub(super) type Straddling = (u64, Becoming);

/// What is asked about a change on a connection of its own.
struct Look<'a> {
    options: &'a ConnectOptions,
    names: &'a Names,
    spec: &'a FeedSpec,
    xid: u32,
    commit: Ts,
    place: Place,
    /// The first change of its transaction.
    first: bool,
}

impl Look<'_> {
    /// Writes down where the transaction is, and answers what the catalog has for the change.
    async fn found(
        &self,
        side: &mut Option<Connection>,
        notice: &Notice,
        change: &Change,
    ) -> Result<Found, Error> {
        if let Change::Untold { .. } | Change::Sequences { .. } | Change::Publication { .. } = change {
            return Ok(Found::default());
        }
        let mut conn = match side.take() {
            Some(conn) => conn,
            None => admin::connect(self.options).await?,
        };
        if self.first {
            history::place(&mut conn, self.xid, self.commit).await?;
        }
        let mut found = Found::default();
        match change {
            Change::Table { after: Some(shape), .. } => {
                let types = table::types(&mut conn, [&**shape]).await?;
                let selection = Selection { version: self.place.at, ..admin::selection(self.spec) };
                found.table = Some(table::table(notice.object, shape, &types, &selection));
            }
            Change::Object { after: Some(shape), .. } => {
                found.types = table::field_types(&mut conn, shape).await?;
            }
            Change::Table { .. } | Change::Object { .. } | Change::Schema { .. } => {}
            Change::Truncate { .. } | Change::Sequences { .. } => {}
            Change::Publication { .. } | Change::Untold { .. } => {}
        }
        // An error closes it instead.
        *side = Some(conn);
        Ok(found)
    }

    /// Waits until a table is followed, or gone. One that may be left out is looked at once.
    async fn settled(&self, side: &mut Option<Connection>, object: u32) -> Result<bool, Error> {
        let deadline = Instant::now() + if self.spec.ignore_ineligible { Duration::ZERO } else { PATIENCE };
        loop {
            let mut conn = match side.take() {
                Some(conn) => conn,
                None => admin::connect(self.options).await?,
            };
            let fate = history::fate(&mut conn, self.names, object).await?;
            // One that has rows comes all the same, if somebody sees to them.
            let settled = fate == Fate::Settled
                || entrance::open(&mut conn, self.spec, self.names, Some(object)).await? > 0;
            *side = Some(conn);
            if settled {
                return Ok(true);
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// Every change is followed, and none is executed.
fn followed() -> DdlConfig {
    DdlConfig {
        create_schema: DdlPolicy::Ignore,
        drop_schema: DdlPolicy::Ignore,
        create_table: DdlPolicy::Ignore,
        drop_table: DdlPolicy::Ignore,
        rename_table: DdlPolicy::Ignore,
        alter_table: DdlPolicy::Ignore,
        truncate_table: DdlPolicy::Ignore,
        other: DdlPolicy::Ignore,
        ..DdlConfig::default()
    }
}

impl Stream<'_> {
    /// A transaction begins.
    ///
    /// The server repeats transactions that were passed before the reader began. The tables are known as they were at the
    /// checkpoint, so these are not looked at closely. The checkpoint may lie inside the last one with schema changes, whose
    /// tables are therefore put back to where they were before it.
    pub(super) fn on_begin(&mut self, commit: u64, time: WallTime, xid: u32) {
        self.txn = Txn::new(commit, time, xid);
        if !self.session.captured {
            return;
        }
        let straddling = self.session.straddling.as_ref().filter(|(at, _)| *at == commit);
        self.tables.begin(commit < self.session.checkpoint.0 && straddling.is_none());
        for (object, table) in straddling.into_iter().flat_map(|(_, tables)| tables) {
            if let Some((table, _)) = table {
                self.session.writer.register_table(Arc::clone(&table.info));
            }
            self.tables.change(*object, table.as_ref().map(|(_, shape)| Arc::clone(shape)));
        }
    }

    /// A schema change. `None`: told to stop.
    pub(super) async fn on_ddl(&mut self) -> Result<Option<()>, Error> {
        let Some(mut notice) = self.tables.take_notice() else { return Ok(Some(())) };
        if self.tables.is_former() {
            return Ok(Some(()));
        }
        // While questions are asked, nothing else is done.
        self.publish();
        let change = notice.change()?;
        if let Change::Publication { slot, lost } = &change {
            let Session { names, spec, captured, .. } = &*self.session;
            return match *captured && *slot == names.slot {
                true => publication::judge(names, &spec.filter, lost).map(Some),
                false => Ok(Some(())),
            };
        }
        // Those of other changefeeds of the database.
        let ours = match &change {
            Change::Sequences { slot, .. } => *slot == self.session.names.slot,
            Change::Table { .. } | Change::Schema { .. } | Change::Object { .. } => self.session.captured,
            Change::Truncate { .. } | Change::Publication { .. } | Change::Untold { .. } => {
                self.session.captured
            }
        };
        if !ours {
            return Ok(Some(()));
        }
        self.txn.seq += 1;
        let place = Place { at: Ts(self.txn.commit + self.txn.seq), time: self.txn.time };
        let (options, names, spec) =
            (self.session.options.clone(), self.session.names.clone(), self.session.spec.clone());
        let look = Look {
            options: &options,
            names: &names,
            spec: &spec,
            xid: self.txn.xid,
            commit: Ts(self.txn.commit),
            place,
            first: self.txn.seq == 1,
        };
        let mut side = self.side.take();
        let mut found = Found::default();
        let asked = async {
            found = look.found(&mut side, &notice, &change).await?;
            Ok(())
        };
        if self.link.hold(asked, &self.session.shutdown).await?.is_none() {
            return Ok(None);
        }
        let found = match self.meaning(&notice, &change, found, place)? {
            Answer::Known(found) => *found,
            Answer::Unfollowed(error) => {
                let mut settled = false;
                let asked = async {
                    settled = look.settled(&mut side, notice.object).await?;
                    Ok(())
                };
                if self.link.hold(asked, &self.session.shutdown).await?.is_none() {
                    return Ok(None);
                }
                if !settled && !spec.ignore_ineligible {
                    return Err(error);
                }
                Meaning { event: None, table: Becomes::Same }
            }
        };
        if let Becomes::Table(table) = &found.table
            && place.at > self.resume
            && self.tables.known(notice.object).is_none()
        {
            let comes = entrance::come(&spec, &notice.tag, table);
            if self.link.hold(comes, &self.session.shutdown).await?.is_none() {
                return Ok(None);
            }
        }
        self.side = side;
        self.take_effect(notice.object, found, place).await
    }

    /// Tables lost their rows, and keep them downstream.
    pub(super) fn on_withheld(&mut self) -> Result<(), Error> {
        self.txn.withheld.extend(self.tables.take_withheld());
        // What was passed already was judged by the policy that was then.
        if self.txn.commit + self.txn.seq >= self.resume.0 { self.judge_withheld() } else { Ok(()) }
    }

    /// What the policy says of truncations that are not applied.
    pub(super) fn judge_withheld(&mut self) -> Result<(), Error> {
        if self.txn.withheld.is_empty() {
            return Ok(());
        }
        let tables = std::mem::take(&mut self.txn.withheld).join(", ");
        let spec = &self.session.spec;
        if spec.ddl.truncate_table == DdlPolicy::Fail {
            // What is in front of the transaction is not held up by it.
            self.publish();
            return Err(refused(tables, "truncate-table"));
        }
        tracing::info!(changefeed = %spec.changefeed, tables, position = %Ts(self.txn.commit), executed = false,
            "tables were truncated");
        Ok(())
    }

    fn meaning(&self, notice: &Notice, change: &Change, found: Found, place: Place) -> Result<Answer, Error> {
        let (spec, names) = (&self.session.spec, &self.session.names);
        let known = |id: u32| self.tables.known(id).map(|shape| Arc::clone(&shape.info));
        // What was passed already only tells how the tables go on: policies may have been others then.
        let passed = place.at <= self.resume;
        let policy = if passed { followed() } else { spec.ddl.clone() };
        let feed = Feed {
            slot: &names.slot,
            filter: &spec.filter,
            policy: &policy,
            passed,
            ignore_ineligible: spec.ignore_ineligible,
            known: &known,
        };
        meaning(notice, change, found, place, &feed)
    }

    /// Ends a part of the transaction with an event, and gives a table its new shape.
    async fn take_effect(&mut self, object: u32, found: Meaning, place: Place) -> Result<Option<()>, Error> {
        if let Some(event) = found.event {
            if object == 0 {
                // Sequences, as often as they are looked at.
                tracing::debug!(changefeed = %self.session.spec.changefeed, commit_ts = %event.commit_ts,
                    "values of sequences");
            } else {
                tracing::info!(
                    changefeed = %self.session.spec.changefeed, kind = ?event.kind, schema = event.schema,
                    table = event.table, commit_ts = %event.commit_ts, executed = !event.not_sync, "a schema change"
                );
            }
            if place.at > self.resume {
                self.judge_withheld()?;
                self.session.writer.ddl(event);
                let commit = self.session.writer.commit(place.at, place.time);
                if self.link.hold(commit, &self.session.shutdown).await?.is_none() {
                    return Ok(None);
                }
                self.session.complete = Some((place.at, place.time));
            } else {
                // In the store already, with the rows before it.
                self.session.writer.abort();
                self.txn.withheld.clear();
            }
            self.session.writer.begin(place.at);
        }
        match found.table {
            Becomes::Same => {}
            Becomes::Table(table) => {
                let shape = Arc::new(Shape::new(&table));
                self.session.writer.register_table(Arc::clone(&table.info));
                self.tables.change(object, Some(Arc::clone(&shape)));
                self.txn.tables.push((object, Some((*table, shape))));
            }
            Becomes::Gone => {
                self.tables.change(object, None);
                self.txn.tables.push((object, None));
            }
        }
        Ok(Some(()))
    }

    /// The transaction is complete: whoever connects next knows the tables as it left them.
    pub(super) fn keep_tables(&mut self, end: Ts) -> Result<(), Error> {
        if let Some(error) = self.tables.take_mismatch().filter(|_| end > self.session.checkpoint) {
            return Err(error);
        }
        // Each change leaves an invalidation in the commit record, which takes more bytes than the change takes numbers.
        if end.0 <= self.txn.commit + self.txn.seq {
            return Err(Error::protocol(format_args!(
                "a commit record of {} bytes ends a transaction with {} schema changes",
                end.0.saturating_sub(self.txn.commit),
                self.txn.seq
            )));
        }
        let Some(known) = &mut self.session.tables else { return Ok(()) };
        for (object, becomes) in self.txn.tables.drain(..) {
            known.retain(|(table, _)| table.info.id.0 != i64::from(object));
            known.extend(becomes);
        }
        Ok(())
    }
}

impl Session {
    /// The tables that the stream begins with, once the publication was recognized.
    pub(super) async fn current_tables(&mut self, conn: &mut Connection) -> Result<Vec<CatalogTable>, Error> {
        if self.captured {
            install::refresh(conn, &self.spec, &self.names).await?;
            if self.copied {
                entrance::open(conn, &self.spec, &self.names, None).await?;
            }
            history::forget(conn).await?;
            let straddling = history::straddling(conn, &self.spec, &self.names, self.checkpoint).await?;
            self.straddling = straddling.map(|(at, tables)| {
                let with_shape = |table: CatalogTable| {
                    let shape = Arc::new(Shape::new(&table));
                    (table, shape)
                };
                (at, tables.into_iter().map(|(object, table)| (object, table.map(with_shape))).collect())
            });
        }
        admin::published_tables(conn, &self.spec, &self.names, (self.checkpoint, self.captured)).await
    }
}
