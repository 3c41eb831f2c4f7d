//! Statements for partitions, which a target may have, have otherwise, or not have at all.
//!
//! Rows come under the name of the table at the top, so a target may divide it as it likes. A change of a partition is made
//! in the same way only where the target has that partition with the same rows; otherwise it is made by the table at the
//! top and the partition's condition. What neither way can do is an error that says what to do.
//!
//! ```text
//!  at the source             the target has the same partition    divides otherwise, or not at all
//!  CREATE … PARTITION OF     (has not yet) the same               the same where it fits; otherwise nothing
//!  TRUNCATE of a partition   the same                             DELETE FROM root WHERE condition
//!  DROP TABLE                the same                             DELETE FROM root WHERE condition
//!  DETACH                    the same                             CREATE TABLE, rows moved to it
//!  ATTACH, empty             the same                             DROP TABLE, which nobody needs any more
//!  ATTACH, with rows         the same                             an error
//!  hash partitions           the same                             an error: no condition tells their rows
//! ```

use super::message::{ConstraintShape, TableShape};
use super::statement::{do_block, refusal};
use crate::upstream::postgres::sql::{ident, literal};

/// What the server says to a bound that has no place: it overlaps, does not fit the key, or rows are in its way.
const NO_PLACE: &str = "invalid_object_definition OR invalid_table_definition OR check_violation OR data_exception OR datatype_mismatch \
     OR wrong_object_type OR undefined_table";

/// A new partition, where the target divides the table by the same columns and has room for it: otherwise its rows are in
/// the table itself.
pub(crate) fn create(table: &TableShape) -> String {
    let (Some(parent), Some(bound)) = (&table.parent_name, &table.bound) else { return String::new() };
    let key = table.partition_key.as_ref().map(|key| format!(" PARTITION BY {key}")).unwrap_or_default();
    let create =
        format!("CREATE TABLE IF NOT EXISTS {} PARTITION OF {parent} {bound}{key}", table.sql_name());
    block(&format!(
        "IF {} THEN BEGIN {create}; EXCEPTION WHEN {NO_PLACE} THEN RAISE WARNING '%', SQLERRM; END; END IF;",
        is_divided(table, parent)
    ))
}

/// A partition goes with its rows, or becomes a table of its own: then `detached` has its shape and creates it.
pub(crate) fn remove(
    before: &TableShape,
    root: &str,
    detached: Option<(&TableShape, &str)>,
    wide: bool,
) -> String {
    let name = before.sql_name();
    let parent = before.parent_name.as_deref().unwrap_or(root);
    let removal = match (detached, wide) {
        (Some((after, _)), _) => {
            format!("ALTER TABLE {parent} DETACH PARTITION {name}{}", new_checks(before, after))
        }
        (None, false) => format!("DROP TABLE {name}"),
        (None, true) => format!("DROP TABLE {name} CASCADE"),
    };
    let otherwise = match (condition(before), detached) {
        (Some(condition), None) => format!("DELETE FROM {root} WHERE {condition};"),
        (Some(condition), Some((_, create))) => moved(before, root, condition, create),
        (None, _) => refusal(&format!(
            "the target does not divide {root} as the source does, so it does not tell which rows were in the hash \
             partition {name}; {}",
            advice("remove them from it, or move them, there", "other")
        )),
    };
    block(&format!(
        "IF {} THEN {removal}; ELSIF {} THEN {otherwise} END IF;",
        has_same(before, root),
        is_table(root)
    ))
}

/// What `CONCURRENTLY` leaves to the table in the place of the partition's bound.
fn new_checks(before: &TableShape, after: &TableShape) -> String {
    let is_new = |name: &str| before.constraints.iter().all(|constraint| constraint.name != name);
    let checks =
        after.constraints.iter().filter(|constraint| constraint.kind == 'c' && is_new(&constraint.name));
    let add = |check: &ConstraintShape| {
        format!(
            "; ALTER TABLE {} ADD CONSTRAINT {} {}",
            after.sql_name(),
            ident(&check.name),
            check.definition
        )
    };
    checks.map(add).collect()
}

/// The rows of a partition leave the table at the top for a table of their own.
fn moved(before: &TableShape, root: &str, condition: &str, create: &str) -> String {
    let name = before.sql_name();
    let stored = before.columns.iter().filter(|column| column.generated.is_empty());
    let columns = stored.map(|column| ident(&column.name)).collect::<Vec<_>>().join(", ");
    let taken = refusal(&format!(
        "the target has another relation {name}, so the rows that left {root} cannot be put there; {}",
        advice("rename it there and resume, or move the rows yourself", "other")
    ));
    format!(
        "IF {} THEN {taken} END IF; {create}; \
         WITH moved AS (DELETE FROM {root} WHERE {condition} RETURNING {columns}) \
         INSERT INTO {name} ({columns}) OVERRIDING SYSTEM VALUE SELECT {columns} FROM moved;",
        exists(&name)
    )
}

/// A table becomes a partition and takes its rows along; `rows` says whether it has any.
pub(crate) fn attach(after: &TableShape, root: &str, rows: bool) -> String {
    let (Some(parent), Some(bound)) = (&after.parent_name, &after.bound) else { return String::new() };
    let name = after.sql_name();
    let otherwise = if rows {
        refusal(&format!(
            "the target does not divide {parent} as the source does, so {name} cannot be attached to it; {}",
            advice(&format!("move the rows of {name} into {root} there"), "other")
        ))
    } else {
        // Not there, or not empty: it is not the one that we made.
        format!(
            "IF {} THEN IF NOT EXISTS (SELECT FROM {name}) THEN DROP TABLE {name}; END IF; END IF;",
            is_alone(&name)
        )
    };
    block(&format!(
        "IF NOT ({same}) THEN IF {divided} THEN \
         BEGIN ALTER TABLE {parent} ATTACH PARTITION {name} {bound}; EXCEPTION WHEN {NO_PLACE} THEN {otherwise} END; \
         ELSE {otherwise} END IF; END IF;",
        same = has_same(after, root),
        divided = is_divided(after, parent),
    ))
}

/// A partition loses its rows.
pub(crate) fn truncate(table: &TableShape, root: &str) -> String {
    let name = table.sql_name();
    let otherwise = match condition(table) {
        Some(condition) => format!("DELETE FROM {root} WHERE {condition};"),
        None => refusal(&format!(
            "hash partition {name} was truncated, and the target does not divide {root} as the source does, so it does \
             not tell which rows were in it; {}",
            advice("remove them from it there", "truncate-table")
        )),
    };
    // A foreign key, or a missing privilege, forbids the quick way.
    block(&format!(
        "IF {} THEN BEGIN TRUNCATE {name}; \
         EXCEPTION WHEN feature_not_supported OR insufficient_privilege THEN DELETE FROM {name}; END; \
         ELSIF {} THEN {otherwise} END IF;",
        has_same(table, root),
        is_table(root)
    ))
}

/// Which rows a partition holds, in words that mean the same at the target.
fn condition(table: &TableShape) -> Option<&str> {
    match (&table.condition, &table.bound) {
        // The function of hash partitions names the upstream's ids.
        (Some(condition), _) => Some(condition.as_str()).filter(|text| !text.contains(HASH)),
        // Nothing is beside it.
        (None, Some(bound)) if bound == "DEFAULT" => Some("true"),
        (None, _) => None,
    }
}

const HASH: &str = "satisfies_hash_partition";

/// How a person who has done something at the target goes on.
fn advice(what: &str, key: &str) -> String {
    format!("{what}, set ddl.{key} to \"ignore\", resume, and set it back behind this change")
}

/// A block in which names mean what they mean in the shapes' texts. It has no variables, which columns might be taken for.
fn block(body: &str) -> String {
    do_block(&format!("PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true); {body}"))
}

/// A condition: the target has a partition of this name below the same table, and it takes the same rows.
fn has_same(table: &TableShape, root: &str) -> String {
    let plain = |text: &str| format!("pg_catalog.regexp_replace({text}, '''[0-9]+''::oid', '', 'g')");
    let ours = table.condition.as_ref().map_or_else(|| "NULL".to_owned(), |text| plain(&literal(text)));
    format!(
        "EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid = pg_catalog.to_regclass({}) AND c.relispartition \
         AND pg_catalog.pg_partition_root(c.oid) = pg_catalog.to_regclass({}) AND {} IS NOT DISTINCT FROM {ours})",
        literal(&table.sql_name()),
        literal(root),
        plain("pg_catalog.pg_get_partition_constraintdef(c.oid)")
    )
}

/// A condition: the target divides the table above by the same columns.
fn is_divided(table: &TableShape, parent: &str) -> String {
    let key = match &table.parent_key {
        Some(key) => format!("pg_catalog.pg_get_partkeydef(c.oid) = {}", literal(key)),
        None => "c.relkind = 'p'".to_owned(),
    };
    has(parent, &key)
}

/// A condition: the target has a table, divided or not.
fn is_table(name: &str) -> String {
    has(name, "c.relkind IN ('r', 'p')")
}

/// A condition: the target has a table that is no partition.
fn is_alone(name: &str) -> String {
    has(name, "c.relkind = 'r' AND NOT c.relispartition")
}

/// A condition: the target has a relation.
fn exists(name: &str) -> String {
    format!("pg_catalog.to_regclass({}) IS NOT NULL", literal(name))
}

fn has(name: &str, property: &str) -> String {
    format!(
        "EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid = pg_catalog.to_regclass({}) AND {property})",
        literal(name)
    )
}
