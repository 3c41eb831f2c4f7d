//! What went wrong downstream, and what to do about it.

use std::collections::BTreeSet;
use std::sync::Arc;

use event::TableInfo;
use heartbeatpb::{TableId, codes};
use tokio_postgres::error::DbError;

use crate::Error;

/// SQLSTATE of a text that is no value of its type.
const INVALID_TEXT: &str = "22P02";

/// Why an attempt failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The connection or the server is gone, or short of something: the same again later.
    Lost(Error),
    /// The server broke a deadlock or the like: the same again on this connection.
    Again(Error),
    /// A unique or exclusion constraint was violated, which another order may avoid: that of the changes of a table, if it is
    /// known of which.
    Conflict(Error, Option<TableId>),
    /// The progress found downstream is not the one expected: someone else wrote, or a commit whose answer
    /// was lost had happened.
    Overtaken,
    /// A statement changed fewer rows than it should have.
    Missing,
    /// The same, of whole rows, which can be written without looking whether the table has them.
    Absent(TableId),
    /// A row comes to a part of a table that was copied in an older snapshot than the part that it comes from, which does
    /// not have it any more, and the log lacks a value of it: the table has to be copied again.
    Incomplete(Arc<TableInfo>),
    /// This process may not write now: the same again when it may.
    Suspended,
    /// A person must look.
    Fatal(Error),
}

impl Failure {
    /// The same, of changes of a table.
    pub(super) fn of(self, table: Option<TableId>) -> Self {
        if let Failure::Conflict(error, _) = self { Failure::Conflict(error, table) } else { self }
    }

    /// The error for a caller for whom trying again is not an option.
    pub(crate) fn into_error(self) -> Error {
        match self {
            Failure::Lost(e) | Failure::Again(e) | Failure::Conflict(e, _) | Failure::Fatal(e) => e,
            Failure::Overtaken => Error::Rejected {
                code: "CDC:ErrSinkProgress",
                what: "another writer moved the progress of this changefeed downstream".into(),
            },
            Failure::Missing | Failure::Absent(_) => Error::Rejected {
                code: "CDC:ErrTargetRowMissing",
                what: "a row to update does not exist in the target".into(),
            },
            Failure::Incomplete(table) => Error::Rejected {
                code: codes::SPLIT_ROW_INCOMPLETE,
                what: format!(
                    "an update moves a row of table {}.{} between parts that were copied at different times, and the log \
                     lacks an out-of-line value of it; the table is copied again",
                    table.schema, table.name
                ),
            },
            Failure::Suspended => Error::Unavailable {
                what: "writing is suspended: the lease of this node is not confirmed".into(),
                source: None,
            },
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Fatal(error)
    }
}

/// An error that a server has reported (PostgreSQL manual, "Error and Notice Message Fields").
#[derive(Clone, Default, Debug)]
pub(super) struct Said {
    /// SQLSTATE.
    pub(super) code: String,
    /// May quote values.
    pub(super) message: String,
    pub(super) table: Option<String>,
    pub(super) column: Option<String>,
    pub(super) constraint: Option<String>,
}

impl From<&DbError> for Said {
    fn from(error: &DbError) -> Self {
        Self {
            code: error.code().code().to_owned(),
            message: error.message().to_owned(),
            table: error.table().map(str::to_owned),
            column: error.column().map(str::to_owned),
            constraint: error.constraint().map(str::to_owned),
        }
    }
}

/// Why a request to the server has failed.
#[derive(Debug)]
pub(super) enum Cause {
    /// The server refused it.
    Said(Said),
    /// It cannot be asked, or its answer cannot be read.
    Gone(Box<dyn std::error::Error + Send + Sync>),
}

impl Cause {
    /// Name of the table that the server speaks of.
    pub(super) fn table(&self) -> Option<&str> {
        match self {
            Self::Said(said) => said.table.as_deref(),
            Self::Gone(_) => None,
        }
    }
}

impl From<tokio_postgres::Error> for Cause {
    fn from(error: tokio_postgres::Error) -> Self {
        match error.as_db_error() {
            Some(db) => Self::Said(db.into()),
            None => Self::Gone(Box::new(error)),
        }
    }
}

impl From<std::io::Error> for Cause {
    fn from(error: std::io::Error) -> Self {
        Self::Gone(Box::new(error))
    }
}

/// What the server said, without the parts in which it quotes values.
fn describe(said: &Said) -> String {
    let code = said.code.as_str();
    // Messages of the other classes quote the value that they complain about.
    let harmless = ["08", "0A", "23", "25", "28", "3D", "3F", "40", "42", "53", "55", "57", "58"];
    let mut text = if harmless.iter().any(|class| code.starts_with(class)) && code != "42601" {
        format!("{} (SQLSTATE {code})", said.message)
    } else {
        format!("SQLSTATE {code}")
    };
    if let Some(name) = refused_type(said) {
        text.push_str(&format!(", type {name}"));
    }
    let parts = [("table", &said.table), ("column", &said.column), ("constraint", &said.constraint)];
    for (what, name) in parts.into_iter().filter_map(|(what, name)| Some((what, name.as_ref()?))) {
        text.push_str(&format!(", {what} {name:?}"));
    }
    text
}

/// The type to which the server could not read a value, as far as its words tell it in front of the value.
fn refused_type(said: &Said) -> Option<&str> {
    if said.code == INVALID_TEXT { type_in(&said.message) } else { None }
}

fn type_in(message: &str) -> Option<&str> {
    let begin = ["invalid input value for enum ", "invalid input syntax for type "];
    let rest = begin.iter().find_map(|begin| message.strip_prefix(begin))?;
    rest.split_once(": \"").map(|(name, _)| name)
}

/// As [`classify`], of values of a table. Where the server does not name the type that lacks one, the types of the table
/// that are not built in are named.
pub(super) fn classify_values(cause: impl Into<Cause>, doing: &str, info: &TableInfo) -> Failure {
    let cause = cause.into();
    let unnamed =
        matches!(&cause, Cause::Said(said) if said.code == INVALID_TEXT && type_in(&said.message).is_none());
    let failure = classify(cause, doing);
    let own = info.columns.iter().flat_map(|column| &column.ty.definitions);
    let own: BTreeSet<String> = own.map(|ty| format!("{}.{}", ty.schema, ty.name)).collect();
    match failure {
        Failure::Fatal(Error::Rejected { code, what }) if unnamed && !own.is_empty() => {
            let own = own.into_iter().collect::<Vec<_>>().join(", ");
            let what = format!("{what}; one of the types that are not the same in the target: {own}");
            Failure::Fatal(Error::Rejected { code, what })
        }
        Failure::Lost(_) | Failure::Again(_) | Failure::Conflict(..) | Failure::Fatal(_) => failure,
        Failure::Overtaken
        | Failure::Missing
        | Failure::Absent(_)
        | Failure::Incomplete(_)
        | Failure::Suspended => failure,
    }
}

/// Sorts errors by what to do about them. `doing` says what was tried, without values.
pub(crate) fn classify(cause: impl Into<Cause>, doing: &str) -> Failure {
    let said = match cause.into() {
        Cause::Said(said) => said,
        Cause::Gone(source) => {
            let what = format!("{doing}: the connection to the downstream database failed");
            return Failure::Lost(Error::Unavailable { what, source: Some(source) });
        }
    };
    let code = said.code.as_str();
    let text = format!("{doing}: {}", describe(&said));
    let unavailable = |text| Error::Unavailable { what: text, source: None };
    match code {
        "40001" | "40P01" | "55P03" | "57014" | "25P02" => Failure::Again(unavailable(text)),
        // A server that became a standby, was started again, or is short of memory, disk or connections.
        "25006" | "57P01" | "57P02" | "57P03" | "57P05" | "25P03" => Failure::Lost(unavailable(text)),
        _ if code.starts_with("08") || code.starts_with("53") || code.starts_with("58") => {
            Failure::Lost(unavailable(text))
        }
        "23505" | "23P01" => {
            Failure::Conflict(Error::Rejected { code: "CDC:ErrSinkConflict", what: text }, None)
        }
        _ => Failure::Fatal(Error::Rejected { code: sink_code(code), what: text }),
    }
}

fn sink_code(sqlstate: &str) -> &'static str {
    match &sqlstate[..sqlstate.len().min(2)] {
        "28" => "CDC:ErrSinkAuth",
        "3D" => "CDC:ErrSinkDatabaseMissing",
        "22" => "CDC:ErrSinkData",
        "23" => "CDC:ErrSinkConstraint",
        "42" if sqlstate == "42501" => "CDC:ErrSinkPermission",
        "42" => "CDC:ErrSinkSchema",
        _ => "CDC:ErrSinkSQL",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_type_is_named_without_the_value_that_it_lacks() {
        assert_eq!(type_in("invalid input value for enum app.mood: \"secret: \"x\"\""), Some("app.mood"));
        assert_eq!(type_in("invalid input syntax for type integer: \"secret\""), Some("integer"));
        assert_eq!(type_in("malformed record literal: \"(1,secret)\""), None);
        assert_eq!(type_in("ungültiger Eingabewert für Enum app.mood: »secret«"), None);
    }

    #[test]
    fn sql_states_have_stable_codes() {
        assert_eq!(sink_code("42501"), "CDC:ErrSinkPermission");
        assert_eq!(sink_code("22P02"), "CDC:ErrSinkData");
        assert_eq!(sink_code("XX000"), "CDC:ErrSinkSQL");
        assert_eq!(sink_code(""), "CDC:ErrSinkSQL");
    }
}
