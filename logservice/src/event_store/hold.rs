//! Tables whose streams stand still: what was complete when they were held is served, and nothing behind it.
//!
//! ```text
//!   hold at h ──▶ rows, schema changes and resolved ts up to h     ──▶ every reader has told a checkpoint ≥ h: flushed
//!      │          what is published later is kept, and not served                │
//!      └──────────────────────────── release ◀───────────────────────────────────┘  everything behind h comes
//! ```
//!
//! A hold belongs to whoever has asked for it, and ends with him. That of a table that came with rows that nobody has copied
//! is kept beside that: it outlives attempts that fail, and no row is served while it lasts. What is up to its place is left
//! out for good, because a copy will hold it; so the place can be moved past schema changes, for which others wait, before
//! the copy is made. Before it is known which tables those are, all are held.
//!
//! ```text
//!   kept at h ──▶ no rows; schema changes and resolved ts up to h ──▶ moved to h' ──▶ owned ──▶ copied at s ≥ h': released,
//!                                                                        ▲    │                 rows behind h' come, and what
//!                                                                        └────┘                 s held is left out downstream
//! ```
//!
//! - **ES-4** While a table is held, nothing of it behind the place of the hold is served, and no reader is told a resolved
//!   ts behind it; so its dispatchers, and the changefeed's checkpoint with them, stay at or before that place.
//! - **ES-5** A kept hold is moved only to where it is noted downstream that no older snapshot answers for the table.

use std::collections::BTreeMap;
use std::sync::Arc;

use event::TableInfo;
use heartbeatpb::{TableId, Ts};

use super::state::State;
use super::{Scan, Store};
use crate::Error;

/// Tables that are held, and where.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct HeldTables {
    all: Option<Ts>,
    tables: BTreeMap<TableId, Ts>,
}

impl HeldTables {
    /// Where a table is held.
    pub(crate) fn at(&self, table: TableId) -> Option<Ts> {
        self.tables.get(&table).copied().or(self.all)
    }
}

/// One held table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Hold {
    /// Everything up to here is served.
    pub(super) at: Ts,
    /// Everything up to there is durable downstream.
    flushed: bool,
    /// Somebody has a [`Held`] for it.
    owned: bool,
    /// It stays when he drops it, and rows are left out.
    kept: bool,
}

impl Hold {
    fn new(at: Ts) -> Self {
        Self { at, flushed: false, owned: false, kept: false }
    }
}

/// What the next events of a table are.
pub(crate) struct Next {
    pub(crate) rows: Scan,
    /// The first schema change.
    pub(crate) ddl: Option<Arc<event::DdlEvent>>,
    /// The table is held: rows on disk that are behind this are not for now.
    pub(crate) until: Option<Ts>,
    /// Rows up to here are left out, and there are none now.
    pub(crate) left_out: Option<Ts>,
}

impl State {
    fn held_at(&self, table: TableId) -> Option<Ts> {
        self.held.get(&table).map(|hold| hold.at).or(self.all_held)
    }

    /// Where tables are held, as of the resolved ts.
    pub(super) fn held_tables(&self) -> HeldTables {
        let tables = self.held.iter().map(|(table, hold)| (*table, hold.at)).collect();
        HeldTables { all: self.all_held, tables }
    }

    /// Leaves out of the next events of a table what its hold does not let through.
    pub(super) fn restrict(&self, table: TableId, rows: Scan, ddl: Option<Arc<event::DdlEvent>>) -> Next {
        let until = self.held_at(table);
        let Some(at) = until else { return Next { rows, ddl, until, left_out: None } };
        let left_out = self.held.get(&table).filter(|hold| hold.kept).map(|hold| hold.at);
        let rows = match rows {
            Scan::Rows(batch, _) if batch.first_commit_ts() > Some(at) => Scan::End,
            rows @ (Scan::Rows(..) | Scan::OnDisk(_) | Scan::End) => rows,
        };
        let rows = if left_out.is_some() { Scan::End } else { rows };
        Next { rows, ddl: ddl.filter(|ddl| ddl.commit_ts <= at), until, left_out }
    }
}

impl Store {
    /// Changes holds; whoever serves the tables hears of it, also when nothing else happens.
    fn change_holds<R>(&self, change: impl FnOnce(&mut State) -> R) -> R {
        let result = change(&mut self.state.lock());
        self.changed.notify_one();
        result
    }

    /// Holds a table where everything is complete now, or takes over a hold that was kept. False: somebody else has it.
    fn hold(&self, table: TableId) -> bool {
        self.change_holds(|state| {
            let hold = state.held.entry(table).or_insert(Hold::new(state.resolved));
            !std::mem::replace(&mut hold.owned, true)
        })
    }

    /// Whoever has a hold lets go of it.
    fn release(&self, table: TableId) {
        self.change_holds(|state| {
            if let Some(hold) = state.held.get_mut(&table).filter(|hold| hold.kept) {
                hold.owned = false;
            } else {
                state.held.remove(&table);
                state.mark_dirty(table);
            }
        });
    }

    /// All readers of a held table have told a checkpoint of at least `checkpoint`.
    pub(crate) fn on_held_checkpoint(&self, table: TableId, checkpoint: Ts) {
        let mut state = self.state.lock();
        if let Some(hold) = state.held.get_mut(&table)
            && !hold.flushed
            && checkpoint >= hold.at
        {
            hold.flushed = true;
            drop(state);
            self.told.notify_waiters();
        }
    }

    /// Where a table is held that somebody has a [`Held`] for.
    fn held_at(&self, table: TableId) -> Option<Ts> {
        self.state.lock().held.get(&table).map(|hold| hold.at)
    }

    fn forget(&self, table: TableId) {
        self.change_holds(|state| {
            if let Some(hold) = state.held.get_mut(&table) {
                hold.kept = false;
                if !hold.owned {
                    state.held.remove(&table);
                    state.mark_dirty(table);
                }
            }
        });
    }

    /// Whether everything up to the place of a hold is durable. An error when there is no such hold any more.
    fn is_flushed(&self, table: TableId) -> Result<bool, Error> {
        let state = self.state.lock();
        let hold = state.held.get(&table).filter(|_| !state.closed);
        hold.map(|hold| hold.flushed).ok_or(Error::Closed { what: "the event store" })
    }
}

/// A way to make the streams of single tables stand still.
#[derive(Clone, Debug)]
pub struct Gate {
    store: Arc<Store>,
}

impl Gate {
    pub(crate) fn new(store: Arc<Store>) -> Self {
        Self { store }
    }

    /// Holds all tables where everything is complete now.
    pub fn hold_all(&self) {
        self.store.change_holds(|state| state.all_held = Some(state.resolved));
    }

    /// No table is held any more because all are; these are kept where they stand, until [`Gate::forget`].
    pub fn release_but(&self, tables: &[TableId]) {
        self.store.change_holds(|state| {
            let all = state.all_held.take();
            for table in tables {
                keep(state, *table, all);
            }
            let others: Vec<TableId> = state.tables.keys().copied().collect();
            others.into_iter().for_each(|table| state.mark_dirty(table));
        });
    }

    /// Holds a table where everything is complete now, until [`Gate::forget`]. One that is held stays where it is.
    pub fn keep(&self, table: TableId) {
        self.store.change_holds(|state| keep(state, table, None));
    }

    /// A table is not kept any more.
    pub fn forget(&self, table: TableId) {
        self.store.forget(table);
    }

    /// Moves the place of a table that is kept to `at`: rows up to there are left out, schema changes pass. That no older
    /// snapshot answers for the table was noted downstream before, and none has been taken by whoever holds it.
    pub fn pass(&self, table: TableId, at: Ts) {
        self.store.change_holds(|state| {
            let resolved = state.resolved;
            if let Some(hold) = state.held.get_mut(&table).filter(|hold| hold.kept && hold.at < at) {
                (hold.at, hold.flushed) = (at.min(resolved), false);
                state.mark_dirty(table);
            }
        });
    }

    /// Whether a table is kept.
    #[must_use]
    pub fn is_kept(&self, table: TableId) -> bool {
        self.store.state.lock().held.get(&table).is_some_and(|hold| hold.kept)
    }

    /// Tables that are kept.
    #[must_use]
    pub fn kept(&self) -> Vec<TableId> {
        let state = self.store.state.lock();
        state.held.iter().filter(|(_, hold)| hold.kept).map(|(table, _)| *table).collect()
    }

    /// Tables that are kept, with schema changes behind the place where they stand: whoever takes part in those waits for them.
    /// Of each the last such change. Their dispatchers, and the checkpoint with them, need not go further than to that.
    #[must_use]
    pub fn delaying(&self) -> Vec<(TableId, Ts)> {
        let state = self.store.state.lock();
        let kept = state.held.iter().filter(|(_, hold)| hold.kept);
        kept.filter_map(|(table, hold)| Some((*table, state.last_ddl(*table, hold.at)?))).collect()
    }

    /// The log has been read up to here.
    #[must_use]
    pub fn resolved(&self) -> Ts {
        self.store.resolved().0
    }

    /// Makes the streams of a table stand still at the resolved ts until the answer is dropped; or takes over the hold of a
    /// table that is kept, and then it stays when the answer is dropped. `None`: they do already.
    #[must_use]
    pub fn hold(&self, table: TableId) -> Option<Held> {
        self.store.hold(table).then(|| Held { store: Arc::clone(&self.store), table })
    }

    /// Whether the log is not read here any more.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.store.is_closed()
    }

    /// The shape of a table by its schema and name, written with a point between them, as of the resolved ts.
    #[must_use]
    pub fn table_named(&self, name: &str) -> Option<Arc<TableInfo>> {
        let state = self.store.state.lock();
        let mut found: Vec<Arc<TableInfo>> = state
            .tables
            .keys()
            .filter_map(|table| state.table_at(*table, state.resolved))
            .filter(|info| format!("{}.{}", info.schema, info.name) == name)
            .collect();
        // One that was dropped is known for a while.
        found.sort_by_key(|info| info.version);
        found.pop()
    }

    /// The shape of a table as of the resolved ts.
    #[must_use]
    pub fn table(&self, table: TableId) -> Option<Arc<TableInfo>> {
        let state = self.store.state.lock();
        state.table_at(table, state.resolved)
    }
}

/// Holds a table from `at` on, or from where everything is complete, and lets nobody's end end it.
fn keep(state: &mut State, table: TableId, at: Option<Ts>) {
    let at = at.unwrap_or(state.resolved);
    state.held.entry(table).or_insert(Hold::new(at)).kept = true;
}

/// A table whose streams stand still. They go on when it is dropped.
#[derive(Debug)]
pub struct Held {
    store: Arc<Store>,
    table: TableId,
}

impl Held {
    /// Everything up to here is served, and nothing behind it. Never, when the streams are not held any more.
    #[must_use]
    pub fn at(&self) -> Ts {
        self.store.held_at(self.table).unwrap_or(Ts::MAX)
    }

    /// The shape of the table there.
    #[must_use]
    pub fn shape(&self) -> Option<Arc<TableInfo>> {
        self.store.table_at(self.table, self.at())
    }

    /// The rows that were missing are there: the table is not kept any more.
    pub fn complete(self) {
        self.store.forget(self.table);
    }

    /// Waits until everything that is served is durable downstream.
    ///
    /// # Errors
    /// When the log is not read here any more.
    pub async fn flushed(&self) -> Result<(), Error> {
        loop {
            let told = self.store.told.notified();
            tokio::pin!(told);
            told.as_mut().enable();
            if self.store.is_flushed(self.table)? {
                return Ok(());
            }
            told.await;
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.store.release(self.table);
    }
}
