//! CSV files of several writers of one table: their records have no numbers.
//!
//! Writers that wrote at the same time have different keys; writers that followed each other may both have a commit, one
//! of them perhaps only its beginning. Of a row's changes at one commit every writer has the first ones, in order, so
//! that the writer with most of them has all that there are.

use std::collections::BTreeMap;

use super::parse::{Cell, Change};

/// A row by its key at one commit, and in it the changes of each writer.
type OfRow = BTreeMap<u64, Vec<usize>>;

fn key_of(change: &Change, key: &[usize]) -> Vec<Option<String>> {
    let image = change.old.as_ref().or(change.new.as_ref());
    let text = |&at: &usize| match image.and_then(|image| image.get(at)) {
        Some(Cell::Text(text)) => Some(text.clone()),
        Some(Cell::Null | Cell::Unchanged) | None => None,
    };
    key.iter().map(text).collect()
}

/// Leaves of each row at each commit the changes of one writer, and numbers them. `sources` tells the writer of each
/// change, `key` the columns that identify a row.
pub(super) fn merge(changes: &mut Vec<Change>, sources: &[u64], key: &[usize]) {
    let mut rows: BTreeMap<(u64, Vec<Option<String>>), OfRow> = BTreeMap::new();
    for (at, (change, source)) in changes.iter().zip(sources).enumerate() {
        let row = rows.entry((change.position.commit_ts.0, key_of(change, key))).or_default();
        row.entry(*source).or_default().push(at);
    }
    let mut keep = vec![false; changes.len()];
    for writers in rows.into_values() {
        let most = writers.into_values().max_by_key(Vec::len).unwrap_or_default();
        most.into_iter().for_each(|at| keep[at] = true);
    }
    let mut keep = keep.into_iter();
    changes.retain(|_| keep.next().unwrap_or(true));
    changes.sort_by_key(|change| change.position.commit_ts);
    for (number, change) in changes.iter_mut().enumerate() {
        change.position.row = number as u64;
    }
}
