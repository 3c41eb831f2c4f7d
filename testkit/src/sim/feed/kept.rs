//! What is kept of a changefeed's log where it is read: the rules of the event store and its service, without its rows.

use std::collections::BTreeMap;

/// The log from where its reader began, without what nobody needs again.
#[derive(Default)]
pub(in crate::sim) struct Kept {
    /// Where the reader began: what is at or before was never read.
    begin: u64,
    /// Below it the maintainer lets nobody begin; `None` before it has taken over.
    floor: Option<u64>,
    /// Up to where the rows of a table are gone.
    trimmed: BTreeMap<i64, u64>,
}

impl Kept {
    /// A reader begins: nothing is kept of what there was.
    pub(in crate::sim) fn begin_at(ts: u64) -> Self {
        Self { begin: ts, ..Self::default() }
    }

    /// The maintainer lets nobody begin below `floor` any more.
    pub(in crate::sim) fn raise_floor(&mut self, floor: u64) {
        self.floor = self.floor.max(Some(floor));
    }

    /// Everybody who reads a table has passed `slowest`. A reader on another node may be lost together with what it has
    /// told; one on this node (`all_here`) is lost together with the log.
    pub(in crate::sim) fn trim(&mut self, table: i64, slowest: u64, all_here: bool) {
        let Some(floor) = self.floor else { return };
        let until = if all_here { slowest } else { slowest.min(floor) };
        let trimmed = self.trimmed.entry(table).or_default();
        *trimmed = until.max(*trimmed);
    }

    /// From where on the log of a table can be read.
    pub(in crate::sim) fn starts_at(&self, table: i64) -> u64 {
        self.trimmed.get(&table).copied().unwrap_or_default().max(self.begin)
    }

    /// Whether somebody who has everything at or before `position` is refused: what follows was there and is gone.
    pub(in crate::sim) fn refuses(&self, table: i64, position: u64) -> bool {
        self.trimmed.get(&table).is_some_and(|trimmed| position < *trimmed)
    }
}
