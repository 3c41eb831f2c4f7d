//! Tables whose streams stand still: what was complete when they were held is served, and nothing behind it.
//!
//! ```text
//!   hold at h ──▶ rows, schema changes and resolved ts up to h     ──▶ every reader has told a checkpoint ≥ h: flushed
//!      │          what is published later is kept, and not served                │
//!      └──────────────────────────── release ◀───────────────────────────────────┘  everything behind h comes
//! ```
//!
//! - **ES-4** While a table is held, nothing of it behind the place of the hold is served, and no reader is told a resolved
//!   ts behind it; so its dispatchers, and the changefeed's checkpoint with them, stay at or before that place.

use std::collections::BTreeMap;
use std::sync::Arc;

use event::TableInfo;
use heartbeatpb::{TableId, Ts};

use super::state::State;
use super::{Scan, Store};
use crate::Error;

/// Tables that are held, and where.
pub(crate) type HeldTables = BTreeMap<TableId, Ts>;

/// One held table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Hold {
    /// Everything up to here is served.
    pub(super) at: Ts,
    /// Everything up to there is durable downstream.
    flushed: bool,
}

/// What the next events of a table are.
pub(crate) struct Next {
    pub(crate) rows: Scan,
    /// The first schema change.
    pub(crate) ddl: Option<Arc<event::DdlEvent>>,
    /// The table is held: rows on disk that are behind this are not for now.
    pub(crate) until: Option<Ts>,
}

impl State {
    fn held_at(&self, table: TableId) -> Option<Ts> {
        self.held.get(&table).map(|hold| hold.at)
    }

    /// Where tables are held, as of the resolved ts.
    pub(super) fn held_tables(&self) -> HeldTables {
        self.held.iter().map(|(table, hold)| (*table, hold.at)).collect()
    }

    /// Leaves out of the next events of a table what its hold does not let through.
    pub(super) fn restrict(&self, table: TableId, rows: Scan, ddl: Option<Arc<event::DdlEvent>>) -> Next {
        let until = self.held_at(table);
        let Some(at) = until else { return Next { rows, ddl, until } };
        let rows = match rows {
            Scan::Rows(batch, _) if batch.first_commit_ts() > Some(at) => Scan::End,
            rows @ (Scan::Rows(..) | Scan::OnDisk(_) | Scan::End) => rows,
        };
        Next { rows, ddl: ddl.filter(|ddl| ddl.commit_ts <= at), until }
    }
}

impl Store {
    /// Holds a table where everything is complete now. `None`: it is held already.
    fn hold(&self, table: TableId) -> Option<Ts> {
        let mut state = self.state.lock();
        if state.held.contains_key(&table) {
            return None;
        }
        let at = state.resolved;
        state.held.insert(table, Hold { at, flushed: false });
        // Whoever serves it has to hear of it, also when nothing else happens.
        drop(state);
        self.changed.notify_one();
        Some(at)
    }

    fn release(&self, table: TableId) {
        let mut state = self.state.lock();
        state.held.remove(&table);
        state.mark_dirty(table);
        drop(state);
        self.changed.notify_one();
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

    /// The log has been read up to here.
    #[must_use]
    pub fn resolved(&self) -> Ts {
        self.store.resolved().0
    }

    /// Makes the streams of a table stand still at the resolved ts until the answer is dropped. `None`: they do already.
    #[must_use]
    pub fn hold(&self, table: TableId) -> Option<Held> {
        let at = self.store.hold(table)?;
        Some(Held { store: Arc::clone(&self.store), table, at })
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

/// A table whose streams stand still. They go on when it is dropped.
#[derive(Debug)]
pub struct Held {
    store: Arc<Store>,
    table: TableId,
    at: Ts,
}

impl Held {
    /// Everything up to here is served, and nothing behind it.
    #[must_use]
    pub fn at(&self) -> Ts {
        self.at
    }

    /// The shape of the table there.
    #[must_use]
    pub fn shape(&self) -> Option<Arc<TableInfo>> {
        self.store.table_at(self.table, self.at)
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
