//! What a comparison found, for people and for programs.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// In which way a row differs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The target does not have it, or not as often.
    Missing,
    /// Only the target has it, or more often.
    Extra,
    /// The target has other values.
    Other,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Missing => "missing in the target",
            Self::Extra => "only in the target",
            Self::Other => "other values",
        })
    }
}

/// One row that is not the same.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Difference {
    /// The columns of its key with their values; for a row without a key, its hash.
    pub key: BTreeMap<String, String>,
    /// In which way.
    pub kind: Kind,
}

/// What is known about a table, or about all of them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// The same at both ends.
    Equal,
    /// Not finished yet.
    #[default]
    Running,
    /// Something could not be decided, and nothing is known to differ.
    Undecided,
    /// Something differs.
    Different,
}

/// How the rows of a table are read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reading {
    /// By ranges of its key, one after the other.
    Ranges,
    /// In one scan of each end, and in further ones where the ends differ.
    Scans,
}

/// One table.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct TableReport {
    /// Its name at the source.
    pub source: String,
    /// Its name at the target.
    pub target: String,
    /// How it is read; `None`: not at all.
    pub reading: Option<Reading>,
    /// Rows at the source, as its statistics say; 0 when they say nothing.
    pub expected_rows: u64,
    /// Rows that were compared at the source.
    pub rows: u64,
    /// Rows in the same parts of the target.
    pub target_rows: u64,
    /// Parts that were compared.
    pub parts: u64,
    /// Rows that were looked at one by one, most of them on their way.
    pub suspects: u64,
    /// Rows that differ; the first of them are in `shown`.
    pub differences: u64,
    /// The first rows that differ.
    pub shown: Vec<Difference>,
    /// Rows about which could not be decided, because they never stood still.
    pub undecided: u64,
    /// What else there is to say: columns and types that are not the same, what could not be compared.
    pub notes: Vec<String>,
    /// Whether the target lacks the table or a column.
    pub lacking: bool,
    /// The state of the comparison of this table.
    pub outcome: Outcome,
}

impl TableReport {
    /// Ends the table: what is known about it now.
    pub(crate) fn end(&mut self, complete: bool) {
        self.outcome = if self.differences > 0 || self.lacking {
            Outcome::Different
        } else if self.undecided > 0 || !complete {
            Outcome::Undecided
        } else {
            Outcome::Equal
        };
    }
}

/// All tables of a comparison.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Report {
    /// In the order in which they are compared.
    pub tables: Vec<TableReport>,
    /// The worst of them; running until all are done.
    pub outcome: Outcome,
}

impl Report {
    /// Rows compared so far, and how many are expected at least.
    #[must_use]
    pub fn progress(&self) -> (u64, u64) {
        let done: u64 = self.tables.iter().map(|table| table.rows).sum();
        let expected: u64 = self.tables.iter().map(|table| table.expected_rows.max(table.rows)).sum();
        (done, expected)
    }

    pub(crate) fn end(&mut self) {
        self.outcome = self.tables.iter().map(|table| table.outcome).max().unwrap_or(Outcome::Equal);
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width =
            self.tables.iter().map(|table| table.source.chars().count()).max().unwrap_or_default().max(5);
        writeln!(
            f,
            "{:width$}  {:>12}  {:>12}  {:>9}  result",
            "table", "source rows", "target rows", "different"
        )?;
        for table in &self.tables {
            let result = match table.outcome {
                Outcome::Equal => "equal",
                Outcome::Running => "not finished",
                Outcome::Undecided => "UNDECIDED",
                Outcome::Different => "DIFFERENT",
            };
            writeln!(
                f,
                "{:width$}  {:>12}  {:>12}  {:>9}  {result}",
                table.source, table.rows, table.target_rows, table.differences
            )?;
            for note in &table.notes {
                writeln!(f, "  {note}")?;
            }
            if table.undecided > 0 {
                writeln!(f, "  {} rows changed all the time and could not be compared", table.undecided)?;
            }
            for difference in &table.shown {
                let key: Vec<String> =
                    difference.key.iter().map(|(column, value)| format!("{column} = {value}")).collect();
                writeln!(f, "  {}: {}", key.join(", "), difference.kind)?;
            }
            let more = table.differences.saturating_sub(table.shown.len() as u64);
            if more > 0 && !table.shown.is_empty() {
                writeln!(f, "  and {more} more")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_table_decides_and_what_was_not_finished_is_not_equal() {
        let mut equal = TableReport::default();
        equal.end(true);
        let mut incomplete = TableReport::default();
        incomplete.end(false);
        let mut different = TableReport { differences: 1, undecided: 1, ..TableReport::default() };
        different.end(false);
        let outcome = |tables: &[&TableReport]| {
            let mut report =
                Report { tables: tables.iter().map(|&table| table.clone()).collect(), ..Report::default() };
            assert_eq!(report.outcome, Outcome::Running);
            report.end();
            report.outcome
        };
        assert_eq!(outcome(&[&equal]), Outcome::Equal);
        assert_eq!(outcome(&[&equal, &incomplete]), Outcome::Undecided);
        assert_eq!(outcome(&[&equal, &incomplete, &different]), Outcome::Different);
        assert_eq!(outcome(&[]), Outcome::Equal);
    }
}
