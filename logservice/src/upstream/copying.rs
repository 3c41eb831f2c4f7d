//! How far an initial copy is, table by table: written by its workers, read by anyone.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Instant;

use parking_lot::Mutex;
use serde_json::{Value, json};

/// Tables that a view names; the rest is in its sums.
const NAMED: usize = 50;

/// What is being done with a table.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum TableCopyState {
    /// Rows are on their way.
    Copying,
    /// All of its rows are downstream, and its indexes are being made.
    Indexing,
    /// Its turn has not come.
    Waiting,
    /// All of its rows are downstream.
    Done,
}

/// One table of a copy.
#[derive(Debug)]
pub struct TableCopy {
    /// Schema and name, for people.
    name: String,
    state: AtomicU8,
    /// About how many rows it has; 0 when nobody knows.
    expected_rows: AtomicU64,
    rows: AtomicU64,
    bytes: AtomicU64,
    /// Rows and bytes that were there when this run began.
    kept_rows: AtomicU64,
    kept_bytes: AtomicU64,
    parts: AtomicU64,
    parts_done: AtomicU64,
    began: Mutex<Option<Instant>>,
}

impl TableCopy {
    /// A table whose turn has not come.
    #[must_use]
    pub fn new(schema: &str, name: &str) -> Self {
        Self {
            name: format!("{schema}.{name}"),
            state: AtomicU8::new(1),
            expected_rows: AtomicU64::new(0),
            rows: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            kept_rows: AtomicU64::new(0),
            kept_bytes: AtomicU64::new(0),
            parts: AtomicU64::new(0),
            parts_done: AtomicU64::new(0),
            began: Mutex::new(None),
        }
    }

    /// What is being done with it.
    #[must_use]
    pub fn state(&self) -> TableCopyState {
        match self.state.load(Ordering::Relaxed) {
            0 => TableCopyState::Copying,
            1 => TableCopyState::Waiting,
            2 => TableCopyState::Indexing,
            _ => TableCopyState::Done,
        }
    }

    /// Rows that are downstream or on their way.
    #[must_use]
    pub fn rows(&self) -> u64 {
        self.rows.load(Ordering::Relaxed)
    }

    /// It has about so many rows.
    pub(crate) fn expect(&self, rows: u64) {
        self.expected_rows.store(rows, Ordering::Relaxed);
    }

    /// Its turn has come: about so many rows, in so many parts, of which `done` with `rows` and `bytes` are there.
    pub(crate) fn begin(&self, expected_rows: Option<u64>, parts: u64, (done, rows, bytes): (u64, u64, u64)) {
        self.expected_rows.store(expected_rows.unwrap_or(0).max(rows), Ordering::Relaxed);
        self.parts.store(parts, Ordering::Relaxed);
        self.parts_done.store(done, Ordering::Relaxed);
        self.rows.store(rows, Ordering::Relaxed);
        self.bytes.store(bytes, Ordering::Relaxed);
        self.kept_rows.store(rows, Ordering::Relaxed);
        self.kept_bytes.store(bytes, Ordering::Relaxed);
        *self.began.lock() = Some(Instant::now());
        self.state.store(0, Ordering::Relaxed);
    }

    /// More of it is on its way.
    pub(crate) fn add(&self, rows: u64, bytes: u64) {
        self.rows.fetch_add(rows, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// A part is there.
    pub(crate) fn part_done(&self) {
        self.parts_done.fetch_add(1, Ordering::Relaxed);
    }

    /// All of its rows are there, and its indexes are not.
    pub(crate) fn index(&self) {
        self.expected_rows.store(self.rows(), Ordering::Relaxed);
        self.state.store(2, Ordering::Relaxed);
    }

    /// All of it is there.
    pub(crate) fn finish(&self) {
        self.expected_rows.store(self.rows(), Ordering::Relaxed);
        self.state.store(3, Ordering::Relaxed);
    }

    /// Rows per second since its turn came, and rows that are left as far as somebody knows.
    fn pace(&self, now: Instant) -> (f64, Option<u64>) {
        let rows = self.rows();
        let since = (*self.began.lock()).map_or(0.0, |began| now.duration_since(began).as_secs_f64());
        let expected = self.expected_rows.load(Ordering::Relaxed);
        let left = (expected > 0).then(|| expected.saturating_sub(rows));
        (rate(rows.saturating_sub(self.kept_rows.load(Ordering::Relaxed)), since), left)
    }

    fn view(&self, now: Instant) -> Value {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let state = self.state();
        let (per_second, left) = self.pace(now);
        let running = state == TableCopyState::Copying;
        json!({
            "table": self.name,
            "state": match state {
                TableCopyState::Copying => "copying",
                TableCopyState::Indexing => "indexing",
                TableCopyState::Waiting => "waiting",
                TableCopyState::Done => "done",
            },
            "rows": read(&self.rows),
            "bytes": read(&self.bytes),
            "rows_expected": read(&self.expected_rows),
            "parts_done": read(&self.parts_done),
            "parts_total": read(&self.parts),
            "rows_per_second": running.then_some(per_second),
            "remaining_seconds": left.filter(|_| running).and_then(|left| remaining(left, per_second)),
        })
    }
}

#[expect(clippy::cast_precision_loss, reason = "a rate for people")]
fn rate(count: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { (count as f64 / seconds * 10.0).round() / 10.0 } else { 0.0 }
}

#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a time for people"
)]
fn remaining(left: u64, per_second: f64) -> Option<u64> {
    (per_second > 0.0).then(|| (left as f64 / per_second).ceil() as u64)
}

/// All tables of a copy.
#[derive(Debug, Default)]
pub struct CopyBoard(Mutex<Copy>);

#[derive(Debug, Default)]
struct Copy {
    tables: Vec<Arc<TableCopy>>,
    began: Option<Instant>,
    ended: Option<Instant>,
}

/// All tables together.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct CopySum {
    /// Rows that are downstream or on their way.
    pub rows: u64,
    /// What they took on their way.
    pub bytes: u64,
    /// Rows per second of this run.
    pub rows_per_second: f64,
    /// Bytes per second of this run.
    pub bytes_per_second: f64,
    /// About how long it will take; `None` when nobody knows.
    pub remaining_seconds: Option<u64>,
}

impl CopyBoard {
    /// A copy begins.
    pub(crate) fn begin(&self, tables: Vec<Arc<TableCopy>>) {
        *self.0.lock() = Copy { tables, began: Some(Instant::now()), ended: None };
    }

    /// It is complete.
    pub(crate) fn end(&self) {
        self.0.lock().ended = Some(Instant::now());
    }

    /// The tables, as of now.
    #[must_use]
    pub fn tables(&self) -> Vec<Arc<TableCopy>> {
        self.0.lock().tables.clone()
    }

    /// All tables together.
    #[must_use]
    pub fn sum(&self) -> CopySum {
        let copy = self.0.lock();
        let Some(began) = copy.began else { return CopySum::default() };
        let seconds = copy.ended.unwrap_or_else(Instant::now).duration_since(began).as_secs_f64();
        let (mut sum, mut new, mut kept, mut left) = (CopySum::default(), 0, 0, Some(0u64));
        for table in &copy.tables {
            sum.rows += table.rows();
            sum.bytes += table.bytes.load(Ordering::Relaxed);
            kept += table.kept_bytes.load(Ordering::Relaxed);
            new += table.rows().saturating_sub(table.kept_rows.load(Ordering::Relaxed));
            let expected = table.expected_rows.load(Ordering::Relaxed);
            left = match table.state() {
                TableCopyState::Done | TableCopyState::Indexing => left,
                // Of a table that nobody has looked at nothing is known.
                TableCopyState::Copying | TableCopyState::Waiting if expected == 0 => None,
                TableCopyState::Copying | TableCopyState::Waiting => {
                    left.map(|left| left + expected.saturating_sub(table.rows()))
                }
            };
        }
        sum.rows_per_second = rate(new, seconds);
        sum.bytes_per_second = rate(sum.bytes.saturating_sub(kept), seconds);
        sum.remaining_seconds = left.and_then(|left| match left {
            0 => Some(0),
            left => remaining(left, sum.rows_per_second),
        });
        sum
    }

    /// The same for people, with the tables that are being copied first; `null` before a copy.
    #[must_use]
    pub fn view(&self) -> Value {
        let mut tables = self.tables();
        if tables.is_empty() {
            return Value::Null;
        }
        let (now, sum, all) = (Instant::now(), self.sum(), tables.len());
        let done = tables.iter().filter(|table| table.state() == TableCopyState::Done).count();
        tables.sort_by_key(|table| table.state());
        json!({
            "tables_total": all,
            "tables_done": done,
            "rows": sum.rows,
            "bytes": sum.bytes,
            "rows_per_second": sum.rows_per_second,
            "bytes_per_second": sum.bytes_per_second,
            "remaining_seconds": sum.remaining_seconds,
            "tables": tables.iter().take(NAMED).map(|table| table.view(now)).collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_copied_comes_first_and_what_nobody_knows_is_not_guessed() {
        let board = CopyBoard::default();
        assert_eq!(board.view(), Value::Null);
        let tables: Vec<_> = ["a", "b", "c"].map(|name| Arc::new(TableCopy::new("s", name))).into();
        board.begin(tables.clone());
        tables[0].begin(Some(10), 1, (0, 0, 0));
        tables[0].add(10, 100);
        tables[0].finish();
        tables[1].begin(Some(100), 4, (1, 20, 200));
        tables[1].add(30, 300);
        let view = board.view();
        let names: Vec<&str> =
            view["tables"].as_array().unwrap().iter().map(|table| table["table"].as_str().unwrap()).collect();
        assert_eq!(names, ["s.b", "s.c", "s.a"]);
        assert_eq!(
            (&view["tables_done"], &view["rows"], &view["bytes"]),
            (&json!(1), &json!(60), &json!(600))
        );
        assert_eq!(view["remaining_seconds"], Value::Null, "nobody has looked at c");
        let b = &view["tables"][0];
        assert_eq!((&b["rows"], &b["rows_expected"], &b["parts_done"]), (&json!(50), &json!(100), &json!(1)));
        for table in &tables[1..] {
            table.begin(Some(0), 1, (0, 0, 0));
            table.finish();
        }
        assert_eq!(board.sum().remaining_seconds, Some(0));
    }

    #[test]
    fn the_time_that_is_left_follows_from_the_pace() {
        assert_eq!(remaining(100, 10.0), Some(10));
        assert_eq!(remaining(1, 10.0), Some(1));
        assert_eq!(remaining(100, 0.0), None);
        assert!((rate(10, 2.0) - 5.0).abs() < f64::EPSILON);
        assert!(rate(10, 0.0).abs() < f64::EPSILON);
    }
}
