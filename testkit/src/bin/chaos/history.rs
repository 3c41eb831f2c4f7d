//! Compares what was done to each row at the source with what was done to it at the target: pure.
//!
//! A row's version grows by one with each of its changes, deletes included, and goes on when the row comes back.
//! Triggers at both ends keep a history of versions, so a change that was applied twice, or late, is seen even when
//! the rows are equal at the end.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;

/// What happened to a row.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Op {
    /// It was inserted or updated, and has the version.
    Put,
    /// It was deleted. The version is one more than the row had where it was deleted.
    Delete,
}

/// One change of one row, in the order in which the row saw it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Entry {
    pub(crate) table: i32,
    pub(crate) key: i64,
    pub(crate) op: Op,
    pub(crate) version: i64,
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = match self.op {
            Op::Put => "put",
            Op::Delete => "delete",
        };
        write!(f, "{word} {}", self.version)
    }
}

fn told(entries: &[Entry]) -> String {
    entries.iter().map(Entry::to_string).collect::<Vec<_>>().join(", ")
}

/// Changes that did not arrive as they were made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Counts {
    /// Changes that were compared.
    pub(crate) changes: u64,
    /// Changes that the target never saw.
    pub(crate) lost: u64,
    /// Changes that the target saw again.
    pub(crate) doubled: u64,
    /// Changes that the target saw for the first time after a later one of the same row.
    pub(crate) reordered: u64,
    /// Changes at the target that nobody made at the source.
    pub(crate) invented: u64,
}

impl Counts {
    /// Adds the counts of another comparison.
    pub(crate) fn add(&mut self, other: &Counts) {
        let Counts { changes, lost, doubled, reordered, invented } = other;
        self.changes += changes;
        self.lost += lost;
        self.doubled += doubled;
        self.reordered += reordered;
        self.invented += invented;
    }

    /// Whether every change arrived once and in order.
    pub(crate) fn clean(&self) -> bool {
        let Counts { changes: _, lost, doubled, reordered, invented } = self;
        [lost, doubled, reordered, invented] == [&0; 4]
    }
}

/// How strictly a table's history is to be repeated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Rule {
    /// Every change by itself.
    Exact,
    /// A change that makes an earlier one of its row superfluous may replace it, as sinks do that write in batches;
    /// what is written must still only go forward, and end where the source ended.
    Newest,
}

/// Where a row was when it was looked at last.
#[derive(Clone, Copy, Debug, Default)]
struct Place {
    version: i64,
    present: bool,
}

/// Rows whose histories are told when they differ.
const TOLD: usize = 3;

/// Knows where each row was at the last comparison, so that a change that comes again much later is seen too.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    rows: HashMap<(i32, i64), Place>,
    /// The first rows of the last comparison that did not arrive as they were made, in words.
    pub(crate) wrong: Vec<String>,
}

impl Ledger {
    /// Begins with rows that are at both ends.
    pub(crate) fn begin(rows: impl IntoIterator<Item = (i32, i64, i64)>) -> Self {
        let place = |version| Place { version, present: true };
        let rows = rows.into_iter().map(|(table, key, version)| ((table, key), place(version)));
        Self { rows: rows.collect(), wrong: Vec::new() }
    }

    /// Compares what was done since the last comparison. Nothing may be on its way.
    ///
    /// # Errors
    /// When the source's own versions of a row do not grow: then they say nothing about the target.
    pub(crate) fn compare(
        &mut self,
        source: &[Entry],
        target: &[Entry],
        rule: impl Fn(i32) -> Rule,
    ) -> Result<Counts, String> {
        self.wrong.clear();
        let mut rows: BTreeMap<(i32, i64), (Vec<Entry>, Vec<Entry>)> = BTreeMap::new();
        for entry in source {
            rows.entry((entry.table, entry.key)).or_default().0.push(*entry);
        }
        for entry in target {
            rows.entry((entry.table, entry.key)).or_default().1.push(*entry);
        }
        let mut counts = Counts { changes: source.len() as u64, ..Counts::default() };
        for (row, (source, target)) in rows {
            let place = self.rows.entry(row).or_default();
            let versions: Vec<i64> =
                std::iter::once(place.version).chain(source.iter().map(|entry| entry.version)).collect();
            if !versions.is_sorted_by(|before, after| before < after) {
                return Err(format!(
                    "table {} row {}: the source itself went back: {}",
                    row.0,
                    row.1,
                    told(&source)
                ));
            }
            let found = match rule(row.0) {
                Rule::Exact => exact(place.version, &source, &target),
                Rule::Newest => newest(*place, &source, &target),
            };
            if !found.clean() && self.wrong.len() < TOLD {
                let (made, seen) = (told(&source), told(&target));
                self.wrong.push(format!("table {} row {}: made {made}; arrived {seen}", row.0, row.1));
            }
            counts.add(&found);
            if let Some(last) = source.last() {
                *place = Place { version: last.version, present: last.op == Op::Put };
            }
        }
        Ok(counts)
    }
}

/// Every version once, in order.
fn exact(base: i64, source: &[Entry], target: &[Entry]) -> Counts {
    let made: BTreeMap<i64, Op> = source.iter().map(|entry| (entry.version, entry.op)).collect();
    let mut seen = BTreeSet::new();
    let mut counts = Counts::default();
    for entry in target {
        let made_so = made.get(&entry.version) == Some(&entry.op);
        if !made_so && entry.version > base {
            counts.invented += 1;
        } else if !made_so || seen.contains(&entry.version) {
            counts.doubled += 1;
        } else {
            counts.reordered += u64::from(seen.last().is_some_and(|last| *last > entry.version));
            seen.insert(entry.version);
        }
    }
    counts.lost = made.keys().filter(|version| !seen.contains(version)).count() as u64;
    counts
}

/// Only forward, and to the end.
fn newest(place: Place, source: &[Entry], target: &[Entry]) -> Counts {
    let made: BTreeMap<i64, Op> = source.iter().map(|entry| (entry.version, entry.op)).collect();
    let mut at = place.version;
    let mut present = place.present;
    let mut seen = BTreeSet::new();
    let mut counts = Counts::default();
    for entry in target {
        present = entry.op == Op::Put;
        // A delete tells the version that it met, which is older where the changes between were left out.
        let version = match entry.op {
            Op::Put => made.get(&entry.version).filter(|op| **op == Op::Put).map(|_| entry.version),
            Op::Delete => {
                let deletes = made
                    .range(entry.version..)
                    .filter(|(_, op)| **op == Op::Delete)
                    .map(|(version, _)| *version);
                let behind = deletes.clone().find(|version| *version > at);
                behind.or_else(|| deletes.clone().find(|version| seen.contains(version)))
            }
        };
        match version {
            None if entry.version > place.version => counts.invented += 1,
            None => counts.doubled += 1,
            Some(version) if seen.contains(&version) => counts.doubled += 1,
            Some(version) if version < at => {
                counts.reordered += 1;
                seen.insert(version);
            }
            Some(version) => {
                at = version;
                seen.insert(version);
            }
        }
    }
    if let Some(last) = source.last() {
        let arrived = match last.op {
            Op::Put => present && seen.contains(&last.version),
            Op::Delete => !present,
        };
        counts.lost = u64::from(!arrived);
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `p3` is a row that got version 3, `d4` a delete.
    fn entries(text: &str) -> Vec<Entry> {
        let entry = |word: &str| {
            let (op, version) = word.split_at(1);
            let op = if op == "p" { Op::Put } else { Op::Delete };
            Entry { table: 1, key: 7, op, version: version.parse().unwrap() }
        };
        text.split_whitespace().map(entry).collect()
    }

    fn compare(rule: Rule, source: &str, target: &str) -> (u64, u64, u64, u64) {
        let mut ledger = Ledger::begin([(1, 7, 2)]);
        let counts = ledger.compare(&entries(source), &entries(target), |_| rule).unwrap();
        assert_eq!(ledger.wrong.is_empty(), counts.clean(), "{:?}", ledger.wrong);
        (counts.lost, counts.doubled, counts.reordered, counts.invented)
    }

    #[test]
    fn an_exact_history_is_repeated_as_it_was() {
        let check = |source, target| compare(Rule::Exact, source, target);
        assert_eq!(check("p3 p4 d5 p6", "p3 p4 d5 p6"), (0, 0, 0, 0));
        assert_eq!(check("p3 p4 p5", "p3 p5"), (1, 0, 0, 0), "lost, though the end is equal");
        assert_eq!(check("p3 p4 p5", "p3 p4 p4 p5"), (0, 1, 0, 0), "doubled, though the end is equal");
        assert_eq!(check("p3 p4 p5", "p4 p3 p5"), (0, 0, 1, 0), "reordered, though the end is equal");
        assert_eq!(check("p3 p4", "p3 p4 p3 p4"), (0, 2, 0, 0), "an old stretch came again");
        assert_eq!(check("", "p2"), (0, 1, 0, 0), "again, long after it was compared");
        assert_eq!(check("p3", "p3 p9"), (0, 0, 0, 1));
        assert_eq!(check("p3 d4", "p3 p4"), (1, 0, 0, 1));
    }

    #[test]
    fn what_was_superfluous_may_be_left_out_where_only_the_newest_counts() {
        let check = |source, target| compare(Rule::Newest, source, target);
        assert_eq!(check("p3 p4 p5", "p3 p5"), (0, 0, 0, 0));
        assert_eq!(check("p3 p4 d5", "d3"), (0, 0, 0, 0), "the delete met version 2");
        assert_eq!(check("d3 p4 d5", "d3"), (0, 0, 0, 0), "what came and went was never written");
        assert_eq!(check("p3 p4 p5", "p3 p4"), (1, 0, 0, 0), "the last one is missing");
        assert_eq!(check("p3 d4", "p3"), (1, 0, 0, 0), "the row stayed");
        assert_eq!(check("p3 p4 p5", "p3 p5 p5"), (0, 1, 0, 0));
        assert_eq!(check("p3 p4 p5", "p4 p3 p5"), (0, 0, 1, 0));
        assert_eq!(check("p3 d4 p5", "p3 d4 p5 d6"), (1, 0, 0, 1), "nobody deleted the new row");
        assert_eq!(check("", "p2"), (0, 1, 0, 0));
    }

    #[test]
    fn a_change_of_an_earlier_round_that_comes_again_is_doubled() {
        let mut ledger = Ledger::default();
        assert!(ledger.compare(&entries("p1 p2"), &entries("p1 p2"), |_| Rule::Exact).unwrap().clean());
        let late = ledger.compare(&entries("p3"), &entries("p3 p2"), |_| Rule::Exact).unwrap();
        assert_eq!((late.doubled, late.lost), (1, 0));
        assert_eq!(ledger.wrong, ["table 1 row 7: made put 3; arrived put 3, put 2"]);
    }

    #[test]
    fn versions_of_the_source_that_do_not_grow_are_a_fault_of_the_load() {
        for made in ["p3 d4 p1", "p2", "p3 p3"] {
            let mut ledger = Ledger::begin([(1, 7, 2)]);
            let error = ledger.compare(&entries(made), &entries(made), |_| Rule::Newest).unwrap_err();
            assert!(error.contains("the source itself went back"), "{error}");
        }
    }
}
