//! From the two shapes of a table to the statements that make the one of the other.
//!
//! The order is that in which names are free and values are there: the table's name, what goes, names of columns, new
//! types, new columns, properties of columns, what comes (`keys.rs` has constraints and indexes).

mod keys;
#[cfg(test)]
mod tests;

use super::message::{ColumnShape, NEW_TYPE, NEW_VALUES, Notice, TableShape};
use super::statement::{Follows, Obstacle, Script, column_sql, create_type, identity_sql};
use super::using;
use crate::upstream::postgres::sql::{ident, literal, qualified};

/// The statements that make `after` of `before`; empty when the target sees no difference.
///
/// # Errors
/// When rows got values that the target cannot compute in the same way.
pub(crate) fn alter(
    before: &TableShape,
    after: &TableShape,
    notice: &Notice,
    types: &[event::TypeDefinition],
    follows: Follows<'_>,
) -> Result<String, Obstacle> {
    let mut script = Script::default();
    let diff = Diff { before, after, table: after.sql_name(), wide: notice.wide };
    if !diff.added_columns().all(|column| column.type_oid < 16_384) || diff.retyped().next().is_some() {
        for definition in types {
            script.add(format_args!("{}", create_type(definition)));
        }
    }
    diff.rename_table(&mut script);
    diff.drop_parts(&mut script, follows);
    diff.rename_columns(&mut script);
    diff.retype(notice, &mut script)?;
    diff.add_columns(notice, &mut script)?;
    for column in &after.columns {
        if let Some(old) = before.column(column.number) {
            diff.alter_column(old, column, &mut script);
        }
    }
    diff.add_parts(&mut script, follows);
    Ok(script.0)
}

/// Two shapes of one table.
struct Diff<'a> {
    before: &'a TableShape,
    after: &'a TableShape,
    /// Its name afterwards, quoted.
    table: String,
    /// Other objects went with what was dropped.
    wide: bool,
}

impl Diff<'_> {
    fn cascade(&self) -> &'static str {
        if self.wide { " CASCADE" } else { "" }
    }

    fn rename_table(&self, script: &mut Script) {
        let (before, after) = (self.before, self.after);
        // A schema that has another name now was renamed by a statement of its own.
        if before.schema_oid != after.schema_oid {
            script.add(format_args!("ALTER TABLE {} SET SCHEMA {}", before.sql_name(), ident(&after.schema)));
        }
        if before.name != after.name {
            let name = qualified(&after.schema, &before.name);
            script.add(format_args!("ALTER TABLE {name} RENAME TO {}", ident(&after.name)));
        }
    }

    fn added_columns(&self) -> impl Iterator<Item = &ColumnShape> {
        self.after.columns.iter().filter(|column| self.before.column(column.number).is_none())
    }

    /// Columns with another type or collation, before and after.
    fn retyped(&self) -> impl Iterator<Item = (&ColumnShape, &ColumnShape)> {
        self.after.columns.iter().filter_map(|new| {
            let old = self.before.column(new.number)?;
            let same =
                (old.type_oid, old.type_mod, &old.collation) == (new.type_oid, new.type_mod, &new.collation);
            (!same).then_some((old, new))
        })
    }

    fn has_new_names(&self) -> bool {
        let renamed =
            |new: &ColumnShape| self.before.column(new.number).is_some_and(|old| old.name != new.name);
        self.after.columns.iter().any(renamed)
    }

    fn rename_columns(&self, script: &mut Script) {
        for new in &self.after.columns {
            let Some(old) = self.before.column(new.number).filter(|old| old.name != new.name) else {
                continue;
            };
            let (old, new) = (ident(&old.name), ident(&new.name));
            script.add(format_args!("ALTER TABLE {} RENAME COLUMN {old} TO {new}", self.table));
        }
    }

    fn retype(&self, notice: &Notice, script: &mut Script) -> Result<(), Obstacle> {
        let remade = notice.rewritten.is_some_and(|why| why & NEW_TYPE != 0) && notice.rows;
        let told = if remade { self.expressions(notice)? } else { Vec::new() };
        let using = |name: &str| {
            let new = told.iter().find(|new| new.column == name || new.column == name.to_ascii_lowercase());
            new.and_then(|new| new.using.clone())
        };
        let mut statements = Vec::new();
        for (old, new) in self.retyped() {
            let expression = match using(&old.name) {
                Some(expression) => format!(" USING {expression}"),
                // Without rows any expression will do, and not every pair of types has a cast.
                None if notice.rewritten.is_some() && !notice.rows => {
                    format!(" USING {}::text::{}", ident(&new.name), new.sql)
                }
                None => String::new(),
            };
            statements.push((new, expression));
        }
        for new in &self.after.columns {
            // The same type, and other values.
            let retyped = statements.iter().any(|(known, _)| known.number == new.number);
            if let Some(expression) = using(&new.name).filter(|_| !retyped) {
                statements.push((new, format!(" USING {expression}")));
            }
        }
        if statements.is_empty() {
            return Ok(());
        }
        if !told.is_empty() {
            // What the expression names is found where the session found it.
            script.add(format_args!("SET LOCAL search_path = {}", safe_path(&notice.path)));
        }
        // The default of the old type may have no cast, so it is set anew afterwards.
        let mut actions = Vec::new();
        for (new, expression) in &statements {
            let column = ident(&new.name);
            if new.generated.is_empty() {
                actions.push(format!("ALTER COLUMN {column} DROP DEFAULT"));
            }
            let collation = new.collation.as_ref().map(|c| format!(" COLLATE {c}")).unwrap_or_default();
            actions.push(format!("ALTER COLUMN {column} TYPE {}{collation}{expression}", new.sql));
        }
        script.add(format_args!("ALTER TABLE {} {}", self.table, actions.join(", ")));
        for (new, _) in &statements {
            if let Some(default) = new.default.as_ref().filter(|_| new.generated.is_empty() && new.portable) {
                let column = ident(&new.name);
                script.add(format_args!(
                    "ALTER TABLE {} ALTER COLUMN {column} SET DEFAULT {default}",
                    self.table
                ));
            }
        }
        Ok(())
    }

    /// How the statement made new values.
    fn expressions(&self, notice: &Notice) -> Result<Vec<using::NewType>, Obstacle> {
        let alter = notice.query.as_deref().and_then(using::only_alter);
        let ours = |name: &str| name.eq_ignore_ascii_case(&self.before.name);
        match alter.filter(|alter| ours(&alter.table)) {
            Some(alter) if !alter.new_types.is_empty() => Ok(alter.new_types),
            Some(_) | None => Err(Obstacle(
                "it was written anew with a new type of a column, and the text of the session does not tell how the \
                 values were made, since it is not one ALTER TABLE of this table alone"
                    .to_owned(),
            )),
        }
    }

    fn add_columns(&self, notice: &Notice, script: &mut Script) -> Result<(), Obstacle> {
        let remade = notice.rewritten.is_some_and(|why| why & (NEW_VALUES | NEW_TYPE) != 0) && notice.rows;
        for column in self.added_columns() {
            let has_values =
                column.generated.is_empty() && (column.default.is_some() || !column.identity.is_empty());
            let constant = column.default.as_deref().is_some_and(is_constant);
            let unknown = match self.before.kind {
                // The root of partitions does not say what the rows of the partitions got.
                'p' => column.missing.is_none() && !constant,
                _ => remade && !constant,
            };
            if has_values && unknown {
                return Err(Obstacle(format!(
                    "the rows that it had got values in the new column {:?} which the target cannot compute in the same \
                     way; add the column without a default, fill it with UPDATE, and set the default then",
                    column.name
                )));
            }
            let name = ident(&column.name);
            let start = format!("ALTER TABLE {} ADD COLUMN IF NOT EXISTS", self.table);
            let Some(value) = column.missing.as_ref().filter(|_| !constant) else {
                script.add(format_args!("{start} {}", column_sql(column, true)));
                continue;
            };
            // The value that the rows got is a constant, whatever the default says now.
            let plain = ColumnShape {
                default: Some(format!("{}::{}", literal(value), column.sql)),
                portable: true,
                ..column.clone()
            };
            script.add(format_args!("{start} {}", column_sql(&plain, true)));
            match column.default.as_ref().filter(|_| column.portable) {
                Some(default) => script.add(format_args!(
                    "ALTER TABLE {} ALTER COLUMN {name} SET DEFAULT {default}",
                    self.table
                )),
                None => {
                    script.add(format_args!("ALTER TABLE {} ALTER COLUMN {name} DROP DEFAULT", self.table));
                }
            }
        }
        Ok(())
    }

    fn alter_column(&self, old: &ColumnShape, new: &ColumnShape, script: &mut Script) {
        let start = format!("ALTER TABLE {} ALTER COLUMN {}", self.table, ident(&new.name));
        if old.generated != new.generated && new.generated.is_empty() {
            script.add(format_args!("{start} DROP EXPRESSION IF EXISTS"));
        } else if old.default != new.default && new.generated.is_empty() && old.type_oid == new.type_oid {
            match new.default.as_ref().filter(|_| new.portable) {
                Some(default) => script.add(format_args!("{start} SET DEFAULT {default}")),
                None => script.add(format_args!("{start} DROP DEFAULT")),
            }
        } else if old.default != new.default && !new.generated.is_empty() && !self.has_new_names() {
            // A new type only writes the expression in another way.
            if let Some(expression) = new.default.as_ref().filter(|_| self.retyped().next().is_none()) {
                script.add(format_args!("{start} SET EXPRESSION AS ({expression})"));
            }
        }
        if old.not_null != new.not_null {
            let action = if new.not_null { "SET" } else { "DROP" };
            script.add(format_args!("{start} {action} NOT NULL"));
        }
        if old.identity != new.identity {
            script.add(format_args!("{start} DROP IDENTITY IF EXISTS"));
            if !new.identity.is_empty() {
                script.add(format_args!("{start} ADD{}", identity_sql(&new.identity)));
            }
        }
    }
}

/// Whether an expression is a constant: nothing in it is called, and none of the words that stand for calls is in it.
fn is_constant(expression: &str) -> bool {
    let mut outside = String::new();
    for (at, part) in expression.split('\'').enumerate() {
        if at % 2 == 0 {
            outside.push_str(part);
        }
    }
    let mut before = ' ';
    for c in outside.chars() {
        if c == '(' && (before.is_alphanumeric() || matches!(before, '_' | '"')) {
            return false;
        }
        before = c;
    }
    let upper = outside.to_ascii_uppercase();
    !["CURRENT_", "LOCALTIME", "SESSION_USER", "SYSTEM_USER", "USER", "SELECT", "ARRAY"]
        .iter()
        .any(|word| upper.contains(word))
}

/// A search path as it was shown, in a form that `SET` takes: names in double quotes.
fn safe_path(path: &str) -> String {
    let mut names = Vec::new();
    let mut chars = path.chars().peekable();
    while chars.peek().is_some() {
        while chars.next_if(|c| c.is_whitespace() || *c == ',').is_some() {}
        let mut name = String::new();
        if chars.next_if_eq(&'"').is_some() {
            while let Some(c) = chars.next() {
                if c == '"' && chars.next_if_eq(&'"').is_none() {
                    break;
                }
                name.push(c);
            }
        } else {
            while let Some(c) = chars.next_if(|c| *c != ',') {
                name.push(c);
            }
        }
        let name = name.trim_end();
        if !name.is_empty() {
            names.push(ident(name));
        }
    }
    if names.is_empty() { "''".to_owned() } else { names.join(", ") }
}
