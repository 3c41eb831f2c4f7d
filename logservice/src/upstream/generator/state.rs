//! The rows that the tables of a generator have at a position: what a downstream must equal.

use std::collections::BTreeMap;
use std::sync::Arc;

use event::{Datum, RowOp, TableInfo};
use heartbeatpb::Ts;

use super::workload::{Change, RowText, Step, Workload};
use super::{Feed, POPULATED};

/// A row's values as text; NULL is `None`.
pub type Row = Vec<Option<String>>;

/// Rows by the values of their key columns.
pub type Rows = BTreeMap<Row, Row>;

/// A table at a position.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExpectedTable {
    /// Its shape there.
    pub info: Arc<TableInfo>,
    /// Its rows; the key is that of [`TableInfo::handle_key`].
    pub rows: Rows,
}

fn datum(value: Datum<'_>) -> Option<Option<String>> {
    match value {
        Datum::Null => Some(None),
        Datum::Unchanged => None,
        Datum::Text(text) => Some(Some(String::from_utf8_lossy(text).into_owned())),
    }
}

/// The key of an image; every table of a generator has its key in the first column.
fn key(image: &RowText) -> Row {
    image.values().take(1).map(|value| datum(value).flatten()).collect()
}

fn apply(tables: &mut [Rows], change: &Change<'_>) {
    let Some(rows) = tables.get_mut(change.table) else { return };
    match (change.op, change.old, change.new) {
        (RowOp::Delete, Some(old), _) => {
            rows.remove(&key(old));
        }
        (RowOp::Insert | RowOp::Update, old, Some(new)) => {
            let new_key = key(new);
            let before = rows.remove(&old.map_or_else(|| new_key.clone(), key));
            let known = |at: usize| before.as_ref().and_then(|row| row.get(at).cloned().flatten());
            let row = new
                .values()
                .enumerate()
                .map(|(at, value)| datum(value).unwrap_or_else(|| known(at)))
                .collect();
            rows.insert(new_key, row);
        }
        (RowOp::Truncate | RowOp::CopyStart, ..) => rows.clear(),
        (RowOp::Insert | RowOp::Update | RowOp::Delete, ..) => {}
    }
}

/// Plays the stream from its beginning to `ts`. Takes time in proportion to the number of transactions.
pub(super) fn play(workload: &dyn Workload, ts: Ts) -> Vec<Rows> {
    let mut tables = vec![Rows::new(); workload.tables()];
    if ts < POPULATED {
        return tables;
    }
    let mut text = RowText::default();
    for (table, rows) in tables.iter_mut().enumerate() {
        for number in 0..workload.first_rows(table) {
            workload.first_row(table, number, &mut text);
            rows.insert(key(&text), text.values().map(|value| datum(value).flatten()).collect());
        }
    }
    let feed = Feed { ddl_every: workload.ddl_every() };
    let (last, ddls) = (Feed::transactions_at(ts), feed.ddls_at(ts));
    for n in 1..=last {
        if let Some(ddl) = feed.ddl_before(n) {
            alter(workload, ddl, &mut tables);
        }
        workload.transaction(n, &mut |change| apply(&mut tables, &change));
    }
    if let Some(ddl) = feed.ddl_before(last + 1).filter(|ddl| *ddl <= ddls) {
        alter(workload, ddl, &mut tables);
    }
    tables
}

fn alter(workload: &dyn Workload, ddl: u64, tables: &mut [Rows]) {
    let Some(step) = workload.ddl(ddl) else { return };
    let mut empty = |slots: &[usize]| {
        for slot in slots {
            if let Some(rows) = tables.get_mut(*slot) {
                rows.clear();
            }
        }
    };
    match step.what {
        Step::Alter { slot, added } => {
            for row in tables.get_mut(slot).into_iter().flat_map(Rows::values_mut) {
                if added {
                    row.push(None);
                } else {
                    row.pop();
                }
            }
        }
        Step::Create { slot } | Step::Drop { slot } | Step::Truncate { slot } => empty(&[slot]),
        Step::DropSchema { slots, .. } => empty(&slots),
        Step::Rename { .. } | Step::CreateSchema { .. } | Step::Everything { .. } => {}
    }
}
