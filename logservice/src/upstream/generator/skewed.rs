//! Hot keys: one table whose rows are updated with a frequency of about one over their number.

use event::{RowOp, TableInfo};
use heartbeatpb::Ts;

use super::mix;
use super::params::Params;
use super::workload::{Change, Filler, RowText, Workload, bigint, column, keyed_table, text};

#[derive(Debug)]
pub(super) struct Skewed {
    seed: u64,
    keys: u64,
    rows_per_txn: u64,
    value_bytes: u64,
}

impl Skewed {
    pub(super) fn new(params: &Params) -> Self {
        Self {
            seed: params.seed,
            keys: params.get("keys"),
            rows_per_txn: params.get("rows-per-txn"),
            value_bytes: params.get("value-bytes"),
        }
    }

    /// A key from 1: a power of two is drawn evenly, then a key evenly between it and the next. That is a
    /// Zipf distribution with exponent 1 in whole numbers, the same on every machine.
    fn key(&self, hash: u64) -> u64 {
        let powers = u64::from(self.keys.ilog2()) + 1;
        let from = 1 << (hash % powers);
        let to = (from * 2).min(self.keys + 1);
        from + mix(hash, 1, 1) % (to - from)
    }

    fn image(&self, key: u64, n: u64, out: &mut RowText) {
        let payload = Filler { hash: mix(self.seed, n, key), bytes: self.value_bytes };
        out.clear().put(key).put(n).put(payload);
    }
}

impl Workload for Skewed {
    fn tables(&self) -> usize {
        1
    }

    fn table(&self, _table: usize, _ddls: u64, version: Ts) -> Option<TableInfo> {
        let columns = vec![
            column("id", bigint(), false),
            column("changed_by", bigint(), false),
            column("payload", text(), true),
        ];
        Some(keyed_table(3000, "skewed", "events".into(), version, columns))
    }

    fn first_rows(&self, _table: usize) -> u64 {
        self.keys
    }

    fn first_row(&self, _table: usize, number: u64, out: &mut RowText) {
        self.image(number + 1, 0, out);
    }

    fn transaction(&self, n: u64, emit: &mut dyn FnMut(Change<'_>)) {
        let mut row = RowText::default();
        for at in 0..self.rows_per_txn {
            self.image(self.key(mix(self.seed, n, at)), n, &mut row);
            emit(Change { table: 0, op: RowOp::Update, old: None, new: Some(&row) });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_keys_are_hot_and_every_key_occurs() {
        let skewed = Skewed { seed: 1, keys: 100, rows_per_txn: 1, value_bytes: 0 };
        let mut counts = [0u32; 101];
        for n in 0..100_000u64 {
            counts[usize::try_from(skewed.key(mix(1, n, 0))).expect("small")] += 1;
        }
        assert_eq!(counts[0], 0);
        assert!(counts[1..].iter().all(|&count| count > 0));
        assert!(counts[1] > 10 * counts[50], "{counts:?}");
    }
}
