//! Statements for the target, from the shapes of tables. `alter.rs` has those that make one shape of another.
//!
//! Nothing is taken from the text of the statement that a person wrote, except for `USING`: what a statement did depends
//! on the session, and one text may hold many. Names are quoted by us, expressions come from the catalog with complete
//! names. What the target may lack, because the sink made the table without it (indexes that are no keys, foreign keys,
//! checks), is dropped and renamed only where it is there.

use std::fmt::Write as _;

use super::message::{ColumnShape, ConstraintShape, IndexShape, TableShape};
use crate::upstream::postgres::sql::{ident, literal};

/// Why a change cannot be made again at the target.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Obstacle(pub(crate) String);

/// Which tables the changefeed follows, by id: a foreign key to another one is left out.
pub(crate) type Follows<'a> = &'a dyn Fn(u32) -> bool;

/// Statements one after the other.
#[derive(Default)]
pub(super) struct Script(pub(super) String);

impl Script {
    pub(super) fn add(&mut self, statement: std::fmt::Arguments<'_>) {
        if !self.0.is_empty() {
            self.0.push_str(";\n");
        }
        // Writing to a string cannot fail.
        let _ = self.0.write_fmt(statement);
    }
}

/// `CREATE TABLE` with everything that belongs to it.
pub(crate) fn create(table: &TableShape, types: &[event::TypeDefinition], follows: Follows<'_>) -> String {
    let mut script = Script::default();
    for definition in types {
        script.add(format_args!("{}", create_type(definition)));
    }
    let mut parts: Vec<String> = table.columns.iter().map(|column| column_sql(column, true)).collect();
    for constraint in table.constraints.iter().filter(|c| wanted(c, follows)) {
        parts.push(format!("CONSTRAINT {} {}", ident(&constraint.name), constraint.definition));
    }
    let key = table.partition_key.as_ref().map(|key| format!(" PARTITION BY {key}")).unwrap_or_default();
    script.add(format_args!("CREATE TABLE IF NOT EXISTS {} ({}){key}", table.sql_name(), parts.join(", ")));
    for index in table.indexes.iter().filter(|index| !index.constraint) {
        script.add(format_args!("{}", create_index(table, index)));
    }
    script.0
}

/// `DROP TABLE`.
pub(crate) fn drop(table: &TableShape, wide: bool) -> String {
    format!("DROP TABLE IF EXISTS {}{}", table.sql_name(), if wide { " CASCADE" } else { "" })
}

/// SQLSTATE of what a statement of ours raises when the target cannot follow: the sink knows it by that. Its class is nobody
/// else's.
const CANNOT_FOLLOW: &str = "MR001";

/// Raises an error that says why the target cannot follow, and what to do.
pub(super) fn refusal(text: &str) -> String {
    format!("RAISE EXCEPTION USING ERRCODE = '{CANNOT_FOLLOW}', MESSAGE = {};", literal(text))
}

/// A block of statements with conditions.
pub(super) fn do_block(body: &str) -> String {
    format!("DO {}", literal(&format!("BEGIN {body} END")))
}

/// A type that is made unless it is there.
pub(crate) fn create_type(definition: &event::TypeDefinition) -> String {
    let there = format!(
        "NOT EXISTS (SELECT FROM pg_catalog.pg_type t JOIN pg_catalog.pg_namespace n ON n.oid = t.typnamespace \
         WHERE n.nspname = {} AND t.typname = {})",
        literal(&definition.schema),
        literal(&definition.name)
    );
    let schema = format!("CREATE SCHEMA IF NOT EXISTS {}", ident(&definition.schema));
    format!("{schema};\n{}", if_true(&there, &definition.create_sql))
}

/// A statement under a condition.
pub(super) fn if_true(condition: &str, statement: &str) -> String {
    do_block(&format!("IF {condition} THEN {statement}; END IF;"))
}

pub(super) fn create_index(table: &TableShape, index: &IndexShape) -> String {
    let unique = if index.unique { "UNIQUE " } else { "" };
    format!(
        "CREATE {unique}INDEX IF NOT EXISTS {} ON {} USING {}",
        ident(&index.name),
        table.sql_name(),
        index.definition
    )
}

pub(super) fn wanted(constraint: &ConstraintShape, follows: Follows<'_>) -> bool {
    !constraint.inherited && (constraint.refers == 0 || follows(constraint.refers))
}

/// A column as `CREATE TABLE` and `ADD COLUMN` write it; a default that needs something of the upstream's database stays
/// behind, since rows come with their values.
pub(super) fn column_sql(column: &ColumnShape, with_default: bool) -> String {
    let mut sql = format!("{} {}", ident(&column.name), column.sql);
    if let Some(collation) = &column.collation {
        let _ = write!(sql, " COLLATE {collation}");
    }
    match (column.generated.as_str(), &column.default) {
        ("", Some(default)) if with_default && column.portable => {
            let _ = write!(sql, " DEFAULT {default}");
        }
        ("s", Some(expression)) => {
            let _ = write!(sql, " GENERATED ALWAYS AS ({expression}) STORED");
        }
        ("v", Some(expression)) => {
            let _ = write!(sql, " GENERATED ALWAYS AS ({expression}) VIRTUAL");
        }
        _ => {}
    }
    sql.push_str(identity_sql(&column.identity));
    if column.not_null {
        sql.push_str(" NOT NULL");
    }
    sql
}

pub(super) fn identity_sql(identity: &str) -> &'static str {
    match identity {
        "a" => " GENERATED ALWAYS AS IDENTITY",
        "d" => " GENERATED BY DEFAULT AS IDENTITY",
        _ => "",
    }
}
