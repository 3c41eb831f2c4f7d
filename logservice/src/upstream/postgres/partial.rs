//! Tables of which only some columns or rows are published: what a person wants, held against the catalog and tried out.
//!
//! A condition is the text of a person, and it becomes a part of statements: the server has to find that it is one
//! expression before it is used. In parentheses of its own it is read as the condition of a query by the protocol that
//! takes a single statement, so that it cannot end one; and whatever may follow such a condition in a query cannot follow
//! it in the list of a publication, so that a text which closes the parentheses itself fails in one of both. From then on
//! what the server prints of the publication is used, which has no constants left that depend on a session.

use std::collections::BTreeMap;

use event::ReplicaIdentity;
use heartbeatpb::TableId;
use heartbeatpb::config::DdlCapture;

use super::catalog::CatalogTable;
use super::conn::Connection;
use super::names::Names;
use super::sql::{ident, literal, qualified};
use crate::Error;
use crate::upstream::{FeedSpec, TablePart};

/// Row filters and column lists are known since.
const MIN_VERSION: u32 = 15;

/// What is wanted of a table, and by which entry.
pub(super) type Wanted = (usize, TablePart);

/// What is wanted of tables whose shapes are whole, of those for which an entry holds.
///
/// # Errors
/// Names the table, or the entry, that does not fit, and says what to do.
pub(super) async fn wanted(
    conn: &mut Connection,
    spec: &FeedSpec,
    tables: &[CatalogTable],
) -> Result<BTreeMap<TableId, Wanted>, Error> {
    let mut wanted = BTreeMap::new();
    if spec.publish.is_empty() {
        return Ok(wanted);
    }
    if spec.ddl.capture == DdlCapture::On {
        let what =
            "it cannot be used while schema changes are captured; set ddl.capture to \"off\"".to_owned();
        return Err(Error::PublishRule { what });
    }
    if conn.version() < MIN_VERSION {
        let what = format!(
            "PostgreSQL {} has no publications with row filters and column lists; {MIN_VERSION} is the first that has \
             them: upgrade the server, or remove the entries",
            conn.version()
        );
        return Err(Error::PublishRule { what });
    }
    let mut unused: Vec<usize> = (0..spec.publish.len()).collect();
    for table in tables {
        let Some((at, part)) = spec.publish.of(&table.info.schema, &table.info.name) else { continue };
        if table.obstacle.is_some() {
            // Whether it is left out or refused is decided elsewhere; left out, it is none of the changefeed.
            unused.retain(|entry| *entry != at || spec.ignore_ineligible);
            continue;
        }
        unused.retain(|entry| *entry != at);
        if let Some(reason) = refusal(table, part) {
            return Err(refused(table, at, &reason));
        }
        if let Some(condition) = part.sql_condition() {
            let sql = format!("SELECT 1 FROM ONLY {} WHERE {condition} LIMIT 0", table.sql_name());
            let read = conn.parse("read a condition", &sql).await;
            read.map_err(|error| unreadable(table, at, error))?;
        }
        wanted.insert(table.info.id, (at, part.clone()));
    }
    match unused.first() {
        None => Ok(wanted),
        Some(at) => Err(Error::PublishRule {
            what: format!(
                "entry {at} fits no table of the changefeed that no earlier entry fits; correct its matcher, or remove it"
            ),
        }),
    }
}

/// Why a list of columns cannot be published.
fn refusal(table: &CatalogTable, part: &TablePart) -> Option<String> {
    let (info, columns) = (&table.info, part.columns.as_ref()?);
    for name in columns {
        match info.column_index(name).map(|at| &info.columns[at]) {
            None => {
                return Some(format!(
                    "it has no column {name:?} (upper and lower case matter); correct the list"
                ));
            }
            Some(column) if column.generated.is_some() => {
                return Some(format!(
                    "column {name:?} is generated and not in the log; take it out of the list, and make it at the target"
                ));
            }
            Some(_) => {}
        }
    }
    let name = qualified(&info.schema, &info.name);
    let identity = match &info.identity {
        // The server would refuse its updates and deletes: a list has to cover the identity, which all columns are.
        ReplicaIdentity::Full => {
            return Some(format!(
                "its replica identity is FULL, which needs every column; list none, or give it a key and run: \
                 ALTER TABLE {name} REPLICA IDENTITY DEFAULT"
            ));
        }
        ReplicaIdentity::Key(columns) => columns.as_slice(),
        ReplicaIdentity::Nothing => &[],
    };
    let key = info.handle_key().map_or(&[][..], |key| &key.columns);
    let mut needed = identity.iter().chain(key).map(|&at| &info.columns[at].name);
    let missing = needed.find(|name| !columns.contains(name))?;
    Some(format!("column {missing:?} belongs to its key or its replica identity; add it to the list"))
}

/// A table in the list of a publication.
pub(super) fn member(table: &CatalogTable, part: TablePart) -> String {
    let mut member = format!("ONLY {}", table.sql_name());
    if let Some(columns) = &part.columns {
        let columns: Vec<String> = columns.iter().map(|name| ident(name)).collect();
        member.push_str(&format!(" ({})", columns.join(", ")));
    }
    if let Some(condition) = part.sql_condition() {
        member.push_str(&format!(" WHERE {condition}"));
    }
    member
}

/// Has the server publish the rows of one table in a transaction that is rolled back. It refuses what no filter may have;
/// what would make it refuse updates and deletes of the table later is refused here.
///
/// # Errors
/// Names the table and says what to do.
pub(super) async fn try_out(
    conn: &mut Connection,
    names: &Names,
    table: &CatalogTable,
    at: usize,
    part: &TablePart,
) -> Result<(), Error> {
    if part.condition.is_none() {
        return Ok(());
    }
    let rows_only = TablePart { columns: None, condition: part.condition.clone() };
    let sql = format!(
        "BEGIN; CREATE PUBLICATION {} FOR TABLE {} WITH (publish_via_partition_root = true); \
         SELECT DISTINCT a.attname FROM pg_catalog.pg_publication p \
           JOIN pg_catalog.pg_publication_rel r ON r.prpubid = p.oid \
           JOIN pg_catalog.pg_depend d ON d.classid = 'pg_catalog.pg_publication_rel'::regclass AND d.objid = r.oid \
             AND d.refclassid = 'pg_catalog.pg_class'::regclass AND d.refobjid = r.prrelid \
           JOIN pg_catalog.pg_attribute a ON a.attrelid = r.prrelid AND a.attnum = d.refobjsubid AND a.attnum > 0 \
         WHERE p.pubname = {} ORDER BY 1; ROLLBACK",
        ident(&names.slot),
        member(table, rows_only),
        literal(&names.slot)
    );
    let rows = match conn.query("publish rows by a condition", &sql).await {
        Ok(rows) => rows,
        Err(error) => {
            conn.query("end a transaction", "ROLLBACK").await?;
            return Err(unreadable(table, at, error));
        }
    };
    let info = &table.info;
    let ReplicaIdentity::Key(identity) = &info.identity else { return Ok(()) };
    let mut used = rows.iter().map(|row| row.text(0));
    let outside = used.find(|name| identity.iter().all(|&at| info.columns[at].name != *name));
    let Some(column) = outside else { return Ok(()) };
    let name = qualified(&info.schema, &info.name);
    let full = if part.columns.is_some() {
        "without a list of columns, ALTER TABLE … REPLICA IDENTITY FULL does, too".to_owned()
    } else {
        format!("or run: ALTER TABLE {name} REPLICA IDENTITY FULL")
    };
    let reason = format!(
        "its condition has column {column:?}, which is not in the replica identity, so the server would refuse updates \
         and deletes of the table; make a unique index over NOT NULL columns, those of the primary key and {column:?}, and \
         run: ALTER TABLE {name} REPLICA IDENTITY USING INDEX …; {full}"
    );
    Err(refused(table, at, &reason))
}

fn refused(table: &CatalogTable, at: usize, reason: &str) -> Error {
    let (schema, name) = (&table.info.schema, &table.info.name);
    Error::PublishRule { what: format!("table {schema}.{name}, for which entry {at} holds: {reason}") }
}

/// What a server says of a condition may quote it.
fn unreadable(table: &CatalogTable, at: usize, error: Error) -> Error {
    let Error::UpstreamQuery { sqlstate, .. } = &error else { return error };
    let reason = match sqlstate.as_str() {
        "42601" => "is not one SQL expression; correct it",
        "42703" | "42P01" | "42P02" => "has something in it that is no column of the table; correct it",
        "42804" => "is not true or false, or mixes types; correct it",
        "42883" | "42704" | "42725" => {
            "has a function, an operator or a type that PostgreSQL itself does not have; use its own, or a cast"
        }
        "42803" | "42P20" | "0A000" | "42P17" | "42611" => {
            "is more than a row filter may be: only columns, constants, and functions and operators of PostgreSQL itself \
             whose results never change; no queries, system columns, types or functions of your own, and nothing like now()"
        }
        class if class.starts_with("22") && class != "22023" => {
            "has a constant that does not fit its type; correct it"
        }
        _ => "is refused by the server; see the PostgreSQL manual, CREATE PUBLICATION",
    };
    refused(table, at, &format!("its condition {reason} (SQLSTATE {sqlstate})"))
}
