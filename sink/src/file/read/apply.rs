//! From row changes to rows.

use std::collections::BTreeMap;

use super::parse::{Cell, Change, Op};
use super::{ReadColumn, ReplayedTable, Rows};
use crate::file::progress::Position;

type Row = Vec<Option<String>>;

/// A table while its files are read.
#[derive(Debug, Default)]
pub(super) struct TableState {
    columns: Vec<ReadColumn>,
    /// Positions of the key columns; none for a table without key.
    key: Vec<usize>,
    keyed: BTreeMap<Row, Row>,
    /// Rows of a table without key, with the number of their copies.
    bag: BTreeMap<Row, u64>,
    changes: u64,
    duplicates: u64,
}

impl TableState {
    pub(super) fn columns(&self) -> &[ReadColumn] {
        &self.columns
    }

    pub(super) fn clear(&mut self) {
        self.keyed.clear();
        self.bag.clear();
    }

    /// Takes another shape; rows keep the columns of the same name, and a new column is NULL in them.
    pub(super) fn reshape(&mut self, columns: Vec<ReadColumn>) {
        if columns == self.columns {
            return;
        }
        let from: Vec<Option<usize>> =
            columns.iter().map(|new| self.columns.iter().position(|old| old.name == new.name)).collect();
        let map =
            |row: &Row| -> Row { from.iter().map(|from| from.and_then(|from| row[from].clone())).collect() };
        let key: Vec<usize> = (0..columns.len()).filter(|&at| columns[at].in_key).collect();
        let rows: Vec<(Row, u64)> = self
            .keyed
            .values()
            .map(|row| (map(row), 1))
            .chain(self.bag.iter().map(|(row, n)| (map(row), *n)))
            .collect();
        self.clear();
        self.columns = columns;
        self.key = key;
        for (row, copies) in rows {
            if self.key.is_empty() {
                *self.bag.entry(row).or_default() += copies;
            } else {
                self.keyed.insert(self.key_of(&row), row);
            }
        }
    }

    /// Applies the changes of a version: by position, each once.
    pub(super) fn apply(&mut self, mut changes: Vec<Change>, repeated: u64) -> Result<(), String> {
        self.duplicates += repeated;
        // Stable, so that the two records of a CSV update stay in order.
        changes.sort_by_key(|change| change.position);
        let mut previous: Option<Position> = None;
        let mut deleted: Option<Row> = None;
        for change in self.once(changes) {
            let same_commit =
                previous.is_some_and(|position| position.commit_ts == change.position.commit_ts);
            previous = Some(change.position);
            self.changes += 1;
            let base = deleted.take().filter(|_| same_commit);
            match change.op {
                Op::Insert => {
                    let new = need(change.new)?;
                    self.put(&new, base);
                }
                Op::Update => {
                    let new = need(change.new)?;
                    let base = self.take_old(change.old.as_deref(), &new)?;
                    self.put(&new, base);
                }
                Op::Delete => {
                    let old = need(change.old)?;
                    deleted = self.take(&old)?;
                }
            }
        }
        Ok(())
    }

    /// Each change once. A delete and an insert at one position are the halves of an update that took the row to
    /// another part of the table; where the whole update is there too, it says everything.
    fn once(&mut self, changes: Vec<Change>) -> Vec<Change> {
        let mut taken: Vec<Change> = Vec::with_capacity(changes.len());
        for change in changes {
            let position = change.position;
            let same = taken.iter().rev().take_while(|before| before.position == position).count();
            let from = taken.len() - same;
            let there = |op: Op| taken[from..].iter().any(|before| before.op == op);
            if there(Op::Update) || there(change.op) {
                self.duplicates += 1;
            } else if change.op == Op::Update {
                self.duplicates += same as u64;
                taken.truncate(from);
                taken.push(change);
            } else if change.op == Op::Delete {
                taken.insert(from, change);
            } else {
                taken.push(change);
            }
        }
        taken
    }

    fn key_of(&self, row: &Row) -> Row {
        self.key.iter().map(|&at| row[at].clone()).collect()
    }

    /// Removes the row before an update. Where the old image has no key, the new one's did not change.
    fn take_old(&mut self, old: Option<&[Cell]>, new: &[Cell]) -> Result<Option<Row>, String> {
        let image: Vec<Cell> = (0..new.len())
            .map(|at| match old.map(|old| &old[at]) {
                Some(cell @ (Cell::Null | Cell::Text(_))) => cell.clone(),
                Some(Cell::Unchanged) | None if self.key.is_empty() => Cell::Unchanged,
                Some(Cell::Unchanged) | None => new[at].clone(),
            })
            .collect();
        self.take(&image)
    }

    fn take(&mut self, image: &[Cell]) -> Result<Option<Row>, String> {
        if self.key.is_empty() {
            let row = image
                .iter()
                .map(known)
                .collect::<Option<Row>>()
                .ok_or("a table without key has a partial old row")?;
            let Some(copies) = self.bag.get_mut(&row) else { return Ok(None) };
            *copies -= 1;
            if *copies == 0 {
                self.bag.remove(&row);
            }
            return Ok(Some(row));
        }
        let key = self.key.iter().map(|&at| known(&image[at])).collect::<Option<Row>>();
        Ok(self.keyed.remove(&key.ok_or("an image has no key")?))
    }

    /// Adds a row; what was not sent comes from `base`, or from the row that has the key now.
    fn put(&mut self, new: &[Cell], base: Option<Row>) {
        let key = self.key.iter().map(|&at| known(&new[at])).collect::<Option<Row>>();
        let base =
            base.or_else(|| key.filter(|key| !key.is_empty()).and_then(|key| self.keyed.get(&key).cloned()));
        let row: Row = new
            .iter()
            .enumerate()
            .map(|(at, cell)| known(cell).unwrap_or_else(|| base.as_ref().and_then(|base| base[at].clone())))
            .collect();
        if self.key.is_empty() {
            *self.bag.entry(row).or_default() += 1;
        } else {
            self.keyed.insert(self.key_of(&row), row);
        }
    }

    pub(super) fn finish(self) -> ReplayedTable {
        let mut rows: Rows = self.keyed;
        for (row, copies) in self.bag {
            for copy in 0..copies {
                let mut key = row.clone();
                key.push(Some(copy.to_string()));
                rows.insert(key, row.clone());
            }
        }
        ReplayedTable {
            key: self.key.iter().map(|&at| self.columns[at].name.clone()).collect(),
            columns: self.columns.into_iter().map(|column| column.name).collect(),
            rows,
            changes: self.changes,
            duplicates: self.duplicates,
        }
    }
}

/// The value of a cell, `None` when it was not sent.
fn known(cell: &Cell) -> Option<Option<String>> {
    match cell {
        Cell::Null => Some(None),
        Cell::Unchanged => None,
        Cell::Text(text) => Some(Some(text.clone())),
    }
}

fn need<T>(image: Option<T>) -> Result<T, String> {
    image.ok_or_else(|| "a row has no image".to_owned())
}
