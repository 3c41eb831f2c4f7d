//! Whether every table that takes part in a barrier has been heard of, completely.

use std::collections::BTreeMap;

use heartbeatpb::{TableId, TableSpan};
use replica::RangeCover;

use super::cost::step;

/// The tables that are required, each with what was reported of it. Reports of other tables do not count.
#[derive(Clone, Debug, Default)]
pub(crate) struct Coverage {
    /// `None`: the whole table was heard of.
    tables: BTreeMap<TableId, Option<RangeCover>>,
    open: usize,
}

impl Coverage {
    /// Requires `tables`; duplicates count once.
    pub(crate) fn of(tables: impl IntoIterator<Item = TableId>) -> Self {
        let tables: BTreeMap<_, _> = tables
            .into_iter()
            .inspect(|_| step())
            .map(|table| (table, Some(RangeCover::default())))
            .collect();
        Self { open: tables.len(), tables }
    }

    /// A span was heard of.
    pub(crate) fn add(&mut self, span: &TableSpan) {
        step();
        let Some(slot) = self.tables.get_mut(&span.table) else { return };
        let Some(cover) = slot else { return };
        if !span.is_whole() {
            cover.add(&span.start, &span.end);
            if !cover.is_full() {
                return;
            }
        }
        *slot = None;
        self.open -= 1;
    }

    /// Nothing more is to be heard of a table.
    pub(crate) fn close(&mut self, table: TableId) {
        if let Some(slot) = self.tables.get_mut(&table)
            && slot.take().is_some()
        {
            self.open -= 1;
        }
    }

    /// Requires a table, whatever was heard of it before.
    pub(crate) fn require(&mut self, table: TableId) {
        step();
        let before = self.tables.insert(table, Some(RangeCover::default()));
        if !matches!(before, Some(Some(_))) {
            self.open += 1;
        }
    }

    /// Whether a table is required and not complete yet.
    pub(crate) fn is_open(&self, table: TableId) -> bool {
        matches!(self.tables.get(&table), Some(Some(_)))
    }

    /// Whether every table was heard of completely.
    pub(crate) fn is_full(&self) -> bool {
        self.open == 0
    }

    /// Tables that are not complete yet.
    pub(crate) fn open(&self) -> impl Iterator<Item = TableId> {
        self.tables.iter().inspect(|_| step()).filter(|(_, cover)| cover.is_some()).map(|(table, _)| *table)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(table: i64, start: &[u8], end: &[u8]) -> TableSpan {
        TableSpan { keyspace_id: 0, table: TableId(table), start: start.to_vec(), end: end.to_vec() }
    }

    // behaviour: scheduling-126, scheduling-127
    #[test]
    fn only_required_tables_count_and_each_once() {
        let mut coverage = Coverage::of([TableId(1), TableId(2), TableId(2)]);
        coverage.add(&TableSpan::whole(TableId(3)));
        coverage.add(&TableSpan::whole(TableId(1)));
        coverage.add(&TableSpan::whole(TableId(1)));
        assert!(!coverage.is_full());
        for piece in [part(2, b"b", b"c"), part(2, b"", b"b"), part(9, b"c", b"")] {
            coverage.add(&piece);
            assert_eq!(coverage.open().collect::<Vec<_>>(), [TableId(2)]);
        }
        coverage.add(&part(2, b"c", b""));
        assert!(coverage.is_full());
        coverage.close(TableId(2));
        assert!(coverage.is_full());
        assert!(Coverage::of([]).is_full());
    }

    #[test]
    fn a_table_that_was_complete_can_be_required_again() {
        let mut coverage = Coverage::of([TableId(1)]);
        coverage.add(&TableSpan::whole(TableId(1)));
        for table in [1, 1, 2] {
            coverage.require(TableId(table));
            assert!(coverage.is_open(TableId(table)));
        }
        coverage.add(&TableSpan::whole(TableId(1)));
        assert_eq!(coverage.open().collect::<Vec<_>>(), [TableId(2)]);
        coverage.add(&TableSpan::whole(TableId(2)));
        assert!(coverage.is_full() && !coverage.is_open(TableId(2)));
    }

    #[test]
    fn a_table_that_is_gone_needs_no_report() {
        let mut coverage = Coverage::of([TableId(1)]);
        coverage.close(TableId(5));
        assert!(!coverage.is_full());
        coverage.close(TableId(1));
        assert!(coverage.is_full());
    }
}
