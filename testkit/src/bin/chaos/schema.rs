//! Changes the schema while rows change: columns that come, are widened, renamed and go again, indexes, and a table that
//! comes with rows, is emptied and goes.

use crate::tables::Tables;

/// What happens to each of the tables with a key, one after the other.
const OF_A_TABLE: [&str; 8] = [
    "ALTER TABLE {table} ADD COLUMN extra int NOT NULL DEFAULT {number}",
    "UPDATE {table} SET extra = extra + 1, v = v + 1, at = clock_timestamp() WHERE id BETWEEN 1 AND 9",
    // A row of each shape in one transaction.
    "BEGIN; ALTER TABLE {table} ALTER extra DROP NOT NULL; \
     UPDATE {table} SET extra = NULL, v = v + 1, at = clock_timestamp() WHERE id = 5; \
     ALTER TABLE {table} ADD COLUMN more text DEFAULT 'more'; \
     UPDATE {table} SET more = 'changed', v = v + 1, at = clock_timestamp() WHERE id = 6; COMMIT",
    "ALTER TABLE {table} ALTER extra TYPE bigint",
    "ALTER TABLE {table} RENAME extra TO wide",
    "CREATE INDEX ON {table} (wide)",
    "UPDATE {table} SET wide = id, v = v + 1, at = clock_timestamp() WHERE id BETWEEN 3 AND 7",
    "ALTER TABLE {table} DROP COLUMN wide, DROP COLUMN more",
];
/// What happens between two of them.
const OF_A_GUEST: [&str; 5] = [
    "BEGIN; CREATE TABLE chaos.guest (id bigint PRIMARY KEY, v bigint NOT NULL); \
     INSERT INTO chaos.guest SELECT i, {number} FROM generate_series(1, 20) i; COMMIT",
    "UPDATE chaos.guest SET v = v + id",
    "TRUNCATE chaos.guest",
    "INSERT INTO chaos.guest SELECT i, -i FROM generate_series(1, 10) i",
    "DROP TABLE chaos.guest",
];

/// Says which statement is next.
#[derive(Debug)]
pub(crate) struct Changes {
    tables: Tables,
    /// Statements that were executed.
    number: usize,
    /// The next one may have been executed before its connection broke.
    uncertain: bool,
}

impl Changes {
    pub(crate) fn new(tables: Tables) -> Self {
        Self { tables, number: 0, uncertain: false }
    }

    /// The same until it [has been executed](Self::done).
    pub(crate) fn statement(&self) -> String {
        let round = OF_A_TABLE.len() + OF_A_GUEST.len();
        let (turn, step) = (self.number / round, self.number % round);
        let text = OF_A_TABLE.iter().chain(&OF_A_GUEST).nth(step).copied().unwrap_or_default();
        // The self-check has the first ones for itself.
        let table = self.tables.keyed - 1 - i32::try_from(turn).unwrap_or_default() % self.tables.keyed;
        text.replace("{table}", &self.tables.name(table)).replace("{number}", &self.number.to_string())
    }

    pub(crate) fn done(&mut self) {
        self.number += 1;
        self.uncertain = false;
    }

    /// The connection broke while it was being executed.
    pub(crate) fn broke(&mut self) {
        self.uncertain = true;
    }

    /// Whether a refusal may mean that it was executed before.
    pub(crate) fn may_be_done(&self) -> bool {
        self.uncertain
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_table_has_its_turn_and_a_guest_comes_between() {
        let mut changes = Changes::new(Tables { keyed: 2, accounts: 10 });
        let mut seen = Vec::new();
        for _ in 0..27 {
            seen.push(changes.statement());
            assert_eq!(changes.statement(), seen[seen.len() - 1], "until it is done");
            changes.done();
        }
        assert!(seen.iter().all(|text| !text.is_empty() && !text.contains('{')), "{seen:?}");
        assert_eq!(seen[0], "ALTER TABLE chaos.t01 ADD COLUMN extra int NOT NULL DEFAULT 0");
        assert_eq!(seen[12], "DROP TABLE chaos.guest");
        assert_eq!(seen[13], "ALTER TABLE chaos.t00 ADD COLUMN extra int NOT NULL DEFAULT 13");
        assert!(seen[26].contains("chaos.t01"));
    }

    #[test]
    fn a_refusal_is_forgiven_only_after_a_broken_connection() {
        let mut changes = Changes::new(Tables { keyed: 2, accounts: 10 });
        assert!(!changes.may_be_done());
        changes.broke();
        assert!(changes.may_be_done());
        changes.done();
        assert!(!changes.may_be_done());
    }
}
