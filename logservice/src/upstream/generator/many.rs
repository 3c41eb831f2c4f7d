//! Many small tables: each transaction inserts a row into one of them and deletes the oldest row.

use event::{RowOp, TableInfo};
use heartbeatpb::Ts;

use super::mix;
use super::params::Params;
use super::workload::{Change, Filler, RowText, Workload, bigint, column, keyed_table, text};

#[derive(Debug)]
pub(super) struct Many {
    seed: u64,
    tables: u64,
    history: u64,
}

impl Many {
    pub(super) fn new(params: &Params) -> Self {
        Self { seed: params.seed, tables: params.get("tables"), history: params.get("history") }
    }

    fn table_of(&self, n: u64) -> usize {
        usize::try_from(mix(self.seed, n, 1) % self.tables).unwrap_or_default()
    }
}

impl Workload for Many {
    fn tables(&self) -> usize {
        usize::try_from(self.tables).unwrap_or(usize::MAX)
    }

    fn table(&self, table: usize, _ddls: u64, version: Ts) -> Option<TableInfo> {
        let columns = vec![column("id", bigint(), false), column("v", text(), true)];
        let id = i64::try_from(10_000 + table).unwrap_or(i64::MAX);
        Some(keyed_table(id, "many", format!("t{table:07}"), version, columns))
    }

    fn first_rows(&self, _table: usize) -> u64 {
        0
    }

    fn first_row(&self, _table: usize, _number: u64, _out: &mut RowText) {}

    fn transaction(&self, n: u64, emit: &mut dyn FnMut(Change<'_>)) {
        let mut row = RowText::default();
        row.put(n).put(Filler { hash: mix(self.seed, n, 2), bytes: 16 });
        emit(Change { table: self.table_of(n), op: RowOp::Insert, old: None, new: Some(&row) });
        if self.history > 0 && n > self.history {
            row.clear().put(n - self.history).unchanged();
            let table = self.table_of(n - self.history);
            emit(Change { table, op: RowOp::Delete, old: Some(&row), new: None });
        }
    }
}
