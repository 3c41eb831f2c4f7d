//! Constraints and indexes of a table that changed.

use super::super::message::{ConstraintShape, IndexShape};
use super::super::statement::{Follows, Script, create_index, if_true, wanted};
use super::Diff;
use crate::upstream::postgres::sql::{ident, literal, qualified};

impl Diff<'_> {
    /// Whether a constraint is there afterwards. What a new type made anew counts if it reads as before: the target makes
    /// it anew in the same way.
    fn is_kept(&self, old: &ConstraintShape) -> bool {
        self.after.constraints.iter().any(|new| same_constraint(old, new))
    }

    fn is_new(&self, new: &ConstraintShape) -> bool {
        !self.before.constraints.iter().any(|old| same_constraint(old, new))
    }

    fn index_is_kept(&self, old: &IndexShape) -> bool {
        self.after.indexes.iter().any(|new| same_index(old, new))
    }

    fn index_is_new(&self, new: &IndexShape) -> bool {
        !self.before.indexes.iter().any(|old| same_index(old, new))
    }

    pub(super) fn drop_parts(&self, script: &mut Script, follows: Follows<'_>) {
        let gone = self.before.constraints.iter().filter(|old| !self.is_kept(old) && wanted(old, follows));
        for constraint in gone {
            if matches!(constraint.kind, 'p' | 'u') {
                let index = self.before.indexes.iter().find(|index| index.name == constraint.name);
                script.add(format_args!("{}", self.drop_key(&constraint.name, index)));
            } else {
                script.add(format_args!(
                    "ALTER TABLE {} DROP CONSTRAINT IF EXISTS {}{}",
                    self.table,
                    ident(&constraint.name),
                    self.cascade()
                ));
            }
        }
        for index in self.before.indexes.iter().filter(|i| !i.constraint && !self.index_is_kept(i)) {
            if index.unique && index.plain {
                script.add(format_args!("{}", self.drop_key(&index.name, Some(index))));
            } else {
                let name = qualified(&self.after.schema, &index.name);
                script.add(format_args!("DROP INDEX IF EXISTS {name}{}", self.cascade()));
            }
        }
        for column in &self.before.columns {
            if self.after.column(column.number).is_none() {
                script.add(format_args!(
                    "ALTER TABLE {} DROP COLUMN IF EXISTS {}{}",
                    self.table,
                    ident(&column.name),
                    self.cascade()
                ));
            }
        }
    }

    /// Drops a unique key. The sink makes keys under names of its own, as constraints: one that is not there by its name
    /// is found by its columns.
    fn drop_key(&self, name: &str, index: Option<&IndexShape>) -> String {
        let columns: Vec<String> = index
            .iter()
            .flat_map(|index| &index.key)
            .filter_map(|number| self.before.column(*number))
            .map(|column| literal(&column.name))
            .collect();
        let primary = index.is_some_and(|index| index.primary);
        let body = format!(
            "DECLARE key record; BEGIN \
             SELECT x.relname, n.nspname, k.conname INTO key FROM pg_catalog.pg_index i \
             JOIN pg_catalog.pg_class x ON x.oid = i.indexrelid JOIN pg_catalog.pg_namespace n ON n.oid = x.relnamespace \
             LEFT JOIN pg_catalog.pg_constraint k ON k.conrelid = i.indrelid AND k.conindid = i.indexrelid \
             AND k.contype IN ('p', 'u', 'x') \
             WHERE i.indrelid = pg_catalog.to_regclass({table}) AND (x.relname = {name} OR (i.indisunique AND \
             i.indisprimary = {primary} AND ARRAY[{columns}]::text[] = ARRAY(SELECT a.attname::text \
             FROM pg_catalog.unnest(i.indkey::smallint[]) WITH ORDINALITY AS c (number, place) \
             JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = c.number \
             WHERE c.place <= i.indnkeyatts ORDER BY c.place))) \
             ORDER BY x.relname = {name} DESC LIMIT 1; \
             IF key.conname IS NOT NULL THEN \
             EXECUTE pg_catalog.format('ALTER TABLE %s DROP CONSTRAINT %I{cascade}', {table}, key.conname); \
             ELSIF key.relname IS NOT NULL THEN \
             EXECUTE pg_catalog.format('DROP INDEX %I.%I{cascade}', key.nspname, key.relname); \
             END IF; END",
            table = literal(&self.table),
            name = literal(name),
            columns = columns.join(", "),
            cascade = self.cascade(),
        );
        format!("DO {}", literal(&body))
    }

    pub(super) fn add_parts(&self, script: &mut Script, follows: Follows<'_>) {
        self.rename_parts(script);
        for index in self.after.indexes.iter().filter(|i| !i.constraint && self.index_is_new(i)) {
            script.add(format_args!("{}", create_index(self.after, index)));
        }
        for new in self.after.constraints.iter().filter(|new| self.is_new(new) && wanted(new, follows)) {
            // An index that became a constraint is made anew: the target may have it under another name.
            let index = self.after.indexes.iter().find(|index| index.constraint && index.name == new.name);
            let old = index.and_then(|new| self.before.indexes.iter().find(|old| old.oid == new.oid));
            if let Some(old) = old.filter(|old| !old.constraint) {
                script.add(format_args!("{}", self.drop_key(&old.name, Some(old))));
            }
            script.add(format_args!(
                "ALTER TABLE {} ADD CONSTRAINT {} {}",
                self.table,
                ident(&new.name),
                new.definition
            ));
        }
    }

    fn rename_parts(&self, script: &mut Script) {
        for new in &self.after.constraints {
            let Some(old) = self.before.constraints.iter().find(|old| old.oid == new.oid) else { continue };
            let there = |name: &str| {
                format!(
                    "EXISTS (SELECT FROM pg_catalog.pg_constraint WHERE conrelid = pg_catalog.to_regclass({}) \
                     AND conname = {})",
                    literal(&self.table),
                    literal(name)
                )
            };
            let (from, to) = (ident(&old.name), ident(&new.name));
            if from != to {
                let rename = format!("ALTER TABLE {} RENAME CONSTRAINT {from} TO {to}", self.table);
                script.add(format_args!("{}", if_true(&there(&old.name), &rename)));
            }
            if !old.validated && new.validated {
                let validate = format!("ALTER TABLE {} VALIDATE CONSTRAINT {to}", self.table);
                script.add(format_args!("{}", if_true(&there(&new.name), &validate)));
            }
            if (old.deferrable, old.deferred) != (new.deferrable, new.deferred) {
                let words = match (new.deferrable, new.deferred) {
                    (false, _) => "NOT DEFERRABLE",
                    (true, false) => "DEFERRABLE INITIALLY IMMEDIATE",
                    (true, true) => "DEFERRABLE INITIALLY DEFERRED",
                };
                let change = format!("ALTER TABLE {} ALTER CONSTRAINT {to} {words}", self.table);
                script.add(format_args!("{}", if_true(&there(&new.name), &change)));
            }
        }
        for new in self.after.indexes.iter().filter(|index| !index.constraint) {
            let Some(old) = self.before.indexes.iter().find(|old| old.oid == new.oid) else { continue };
            if old.name != new.name && !old.constraint {
                let from = qualified(&self.after.schema, &old.name);
                script.add(format_args!("ALTER INDEX IF EXISTS {from} RENAME TO {}", ident(&new.name)));
            }
        }
    }
}

/// Whether a constraint is the same one as before: itself, or made anew as it was.
fn same_constraint(old: &ConstraintShape, new: &ConstraintShape) -> bool {
    if old.oid == new.oid {
        return true;
    }
    old.kind == new.kind && old.name == new.name && old.definition == new.definition
}

/// As [`same_constraint`]. An index that became one of a constraint is that constraint's.
fn same_index(old: &IndexShape, new: &IndexShape) -> bool {
    if old.oid == new.oid {
        return true;
    }
    old.name == new.name && old.unique == new.unique && old.definition == new.definition
}
