//! Key ranges in statements: the rows of one part of a table.

use event::{KeyForm, TableInfo};

use super::failure::Failure;
use super::pieces::Range;
use super::target::Target;
use crate::Error;

/// A condition that holds for the rows of a key range, and its parameters.
pub(crate) struct Condition {
    /// Empty for all rows; otherwise a `WHERE` clause over the table as `t`.
    pub(crate) sql: String,
    pub(crate) params: Vec<String>,
}

/// The type in which values of a key are compared, and how: as [`event::KeyCodec`] orders them.
const fn comparison(form: KeyForm) -> (&'static str, &'static str) {
    match form {
        KeyForm::Bool => ("boolean", ""),
        KeyForm::Int => ("bigint", ""),
        KeyForm::Numeric => ("numeric", ""),
        KeyForm::Date => ("date", ""),
        KeyForm::Time => ("time", ""),
        KeyForm::Timestamp => ("timestamp", ""),
        KeyForm::TimestampTz => ("timestamptz", ""),
        KeyForm::Uuid => ("uuid", ""),
        KeyForm::Bytes => ("bytea", ""),
        KeyForm::Text | KeyForm::Padded => ("text", " COLLATE \"C\""),
    }
}

/// A table has no key ranges, or a row no key.
pub(crate) fn indivisible(table: &TableInfo) -> Failure {
    Failure::Fatal(Error::Rejected {
        code: "CDC:ErrTableSplitUnsupported",
        what: format!("table {}.{} cannot be divided into key ranges", table.schema, table.name),
    })
}

/// The condition of a range.
///
/// # Errors
/// When the table has no key by which it can be divided, or a bound is none of its keys.
pub(crate) fn condition(target: &Target, range: &Range) -> Result<Condition, Failure> {
    let mut condition = Condition { sql: String::new(), params: Vec::new() };
    if range.is_all() {
        return Ok(condition);
    }
    let refused = || indivisible(&target.info);
    let codec = target.routing.codec.as_ref().ok_or_else(refused)?;
    let mut columns = Vec::new();
    for &(source, form) in codec.parts() {
        let column = target.columns.iter().find(|column| column.source == source).ok_or_else(refused)?;
        let (ty, collation) = comparison(form);
        // `char(n)` loses its blanks on the way to text.
        columns.push(format!("t.{}::{ty}{collation}", column.name));
    }
    for (bound, operator) in [(&range.start, ">="), (&range.end, "<")] {
        if bound.is_empty() {
            continue;
        }
        let mut values = Vec::new();
        let texts = codec.decode(bound).ok_or_else(refused)?;
        for ((_, form), text) in codec.parts().iter().zip(texts) {
            let (ty, collation) = comparison(*form);
            condition.params.push(text);
            let cast = if ty == "text" { String::new() } else { format!("::{ty}") };
            values.push(format!("${}::text{cast}{collation}", condition.params.len()));
        }
        condition.sql.push_str(if condition.sql.is_empty() { " WHERE " } else { " AND " });
        let (columns, values) = (columns.join(", "), values.join(", "));
        condition.sql.push_str(&format!("ROW({columns}) {operator} ROW({values})"));
    }
    Ok(condition)
}
