//! The statements: names, settings under which both servers print values alike, and what is asked of a part.

use std::fmt;

use postgres_protocol::escape::escape_identifier;

use crate::Error;
use crate::catalog::Shape;
use crate::part::Part;

/// Which of both databases.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum End {
    Source,
    Target,
}

impl End {
    pub(crate) fn failed(self, doing: &'static str, source: tokio_postgres::Error) -> Error {
        let end = if self == Self::Source { "source" } else { "target" };
        Error::Database { end, doing, source }
    }
}

/// A table of one database.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct TableName {
    /// Its schema.
    pub schema: String,
    /// Its name in the schema.
    pub name: String,
}

impl TableName {
    /// As in a statement.
    pub(crate) fn quoted(&self) -> String {
        format!("{}.{}", escape_identifier(&self.schema), escape_identifier(&self.name))
    }
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.schema, self.name)
    }
}

/// What both sessions are set to, so that equal values have equal texts; nothing can be written, and a policy that hides
/// rows is an error instead of a difference (PostgreSQL manual, "Client Connection Defaults"). A session that rests is not ended.
pub(crate) const SETTINGS: &str = "SET client_encoding = 'UTF8'; SET TimeZone = 'UTC'; SET DateStyle = 'ISO, YMD'; \
    SET IntervalStyle = 'iso_8601'; SET extra_float_digits = 1; SET bytea_output = 'hex'; SET xmloption = 'content'; \
    SET lc_monetary = 'C'; SET search_path = ''; SET row_security = off; SET default_transaction_read_only = on; \
    SET idle_session_timeout = 0; SET application_name = 'millrace verify'";

/// The position behind everything that statements before this one have seen: the commit record of a transaction is in
/// the log before anybody sees the transaction. A standby shows what it has replayed.
pub(crate) const POSITION: &str = "SELECT (CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() \
    ELSE pg_current_wal_insert_lsn() END - '0/0')::int8";

/// Number of rows and their checksum: the sums of both halves of the rows' hashes, which do not depend on an order and do
/// not cancel out.
const SUMS: &str = "count(*), coalesce(sum(('x' || substr(h, 1, 16))::bit(64)::int8::numeric), 0)::text, \
    coalesce(sum(('x' || substr(h, 17, 16))::bit(64)::int8::numeric), 0)::text";

/// What is asked about one table at one end.
pub(crate) struct Statements<'a> {
    table: String,
    shape: &'a Shape,
}

impl<'a> Statements<'a> {
    /// Of the rows of a table, or of those that fulfil a condition.
    pub(crate) fn new(table: &TableName, shape: &'a Shape, condition: Option<&str>) -> Self {
        let table = match condition {
            None => table.quoted(),
            Some(condition) => {
                let columns: Vec<String> = shape.columns.iter().map(|name| escape_identifier(name)).collect();
                format!("(SELECT {} FROM {} WHERE ({condition}\n))", columns.join(", "), table.quoted())
            }
        };
        Self { table, shape }
    }

    /// The hash of a row: of what the server prints for it, in UTF-8 whatever the database's own encoding is.
    fn hash(&self) -> String {
        let columns: Vec<String> =
            self.shape.columns.iter().map(|column| format!("t.{}", escape_identifier(column))).collect();
        format!("md5(convert_to(ROW({})::text, 'UTF8'))", columns.join(", "))
    }

    /// The names of the key, of this end's table.
    fn key(&self) -> Vec<String> {
        self.shape.key.iter().map(|key| format!("t.{}", escape_identifier(&key.name))).collect()
    }

    /// What a row is called: the texts of its key, or its hash.
    fn identity(&self) -> String {
        if self.shape.key.is_empty() {
            return format!("ARRAY[{}]", self.hash());
        }
        let texts: Vec<String> = self.key().iter().map(|column| format!("{column}::text")).collect();
        format!("ARRAY[{}]", texts.join(", "))
    }

    /// The bucket of a row among so many.
    fn bucket(&self, of: u32) -> String {
        let hashed = if self.shape.key.is_empty() {
            self.hash()
        } else {
            format!("md5(convert_to({}::text, 'UTF8'))", self.identity())
        };
        format!("(('x' || substr({hashed}, 1, 7))::bit(28)::int4 % {of})")
    }

    /// One end of a range; the values are parameters of type text, from `first` on.
    fn bound(&self, comparison: &str, first: usize) -> String {
        let values: Vec<String> = self
            .shape
            .key
            .iter()
            .enumerate()
            .map(|(at, key)| format!("${}::text::{}", first + at, key.type_name))
            .collect();
        format!("({}) {comparison} ({})", self.key().join(", "), values.join(", "))
    }

    /// Which rows belong to a part, and the parameters of that, all of type text.
    fn condition<'p>(&self, part: &'p Part) -> (String, Vec<&'p str>) {
        match part {
            Part::Range { after, upto } => {
                let mut parts = Vec::new();
                let mut values: Vec<&str> = Vec::new();
                for (bound, comparison) in [(after, ">"), (upto, "<=")] {
                    if let Some(key) = bound {
                        parts.push(self.bound(comparison, values.len() + 1));
                        values.extend(key.iter().map(String::as_str));
                    }
                }
                let text = if parts.is_empty() { "true".to_owned() } else { parts.join(" AND ") };
                (text, values)
            }
            Part::Buckets { of, which } => {
                let list: Vec<String> = which.iter().map(u32::to_string).collect();
                (format!("{} IN ({})", self.bucket(*of), list.join(", ")), Vec::new())
            }
        }
    }

    /// Number and checksum of the next rows of a range, at most so many, and the key of the last one.
    pub(crate) fn next_range<'p>(&self, part: &'p Part, limit: u32) -> (String, Vec<&'p str>) {
        let (condition, values) = self.condition(part);
        let key = self.key().join(", ");
        let downward: Vec<String> = (1..=self.shape.key.len()).map(|at| format!("o{at} DESC")).collect();
        let ordered: Vec<String> =
            self.key().iter().enumerate().map(|(at, column)| format!("{column} AS o{}", at + 1)).collect();
        let text = format!(
            "WITH part AS (SELECT {}, {} AS i, {} AS h FROM {} t WHERE {condition} ORDER BY {key} LIMIT {limit}) \
             SELECT {SUMS}, (SELECT i FROM part ORDER BY {} LIMIT 1) FROM part",
            ordered.join(", "),
            self.identity(),
            self.hash(),
            self.table,
            downward.join(", "),
        );
        (text, values)
    }

    /// Number and checksum of a part.
    pub(crate) fn sums<'p>(&self, part: &'p Part) -> (String, Vec<&'p str>) {
        let (condition, values) = self.condition(part);
        let text = format!(
            "SELECT {SUMS} FROM (SELECT {} AS h FROM {} t WHERE {condition}) part",
            self.hash(),
            self.table
        );
        (text, values)
    }

    /// Number and checksum of every bucket that has rows.
    pub(crate) fn buckets(&self, of: u32) -> String {
        format!(
            "SELECT b, {SUMS} FROM (SELECT {} AS b, {} AS h FROM {} t) part GROUP BY b",
            self.bucket(of),
            self.hash(),
            self.table
        )
    }

    /// Identity and hash of the rows of a part and how often they are there, at most so many.
    pub(crate) fn rows<'p>(&self, part: &'p Part, limit: u32) -> (String, Vec<&'p str>) {
        let (condition, values) = self.condition(part);
        let text = format!(
            "SELECT i, h, count(*) FROM (SELECT {} AS i, {} AS h FROM {} t WHERE {condition}) part GROUP BY i, h LIMIT {limit}",
            self.identity(),
            self.hash(),
            self.table
        );
        (text, values)
    }

    /// The same of rows by their identities: a parameter of type text[] for each column of the key, or for the hash.
    pub(crate) fn by_identity(&self) -> String {
        let (identity, hash) = (self.identity(), self.hash());
        let from = if self.shape.key.is_empty() {
            format!("{} t WHERE {hash} = ANY($1::text[])", self.table)
        } else {
            let arrays: Vec<String> = (1..=self.shape.key.len()).map(|at| format!("${at}::text[]")).collect();
            let names: Vec<String> = (1..=self.shape.key.len()).map(|at| format!("w{at}")).collect();
            let on: Vec<String> = self
                .key()
                .iter()
                .zip(&self.shape.key)
                .zip(&names)
                .map(|((column, key), name)| format!("{column} = w.{name}::{}", key.type_name))
                .collect();
            let (arrays, names, on) = (arrays.join(", "), names.join(", "), on.join(" AND "));
            format!("unnest({arrays}) AS w({names}) JOIN {} t ON {on}", self.table)
        };
        format!(
            "SELECT i, h, count(*) FROM (SELECT {identity} AS i, {hash} AS h FROM {from}) part GROUP BY i, h"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::KeyColumn;

    fn shape() -> Shape {
        let key = |name: &str| KeyColumn { name: name.to_owned(), type_name: "bigint".to_owned() };
        Shape {
            columns: vec!["a".to_owned(), "b\"c".to_owned()],
            key: vec![key("a"), key("b\"c")],
            is_indexed: true,
        }
    }

    #[test]
    fn names_are_quoted_and_values_are_parameters() {
        let shape = shape();
        let table = TableName { schema: "s".to_owned(), name: "x;y".to_owned() };
        let part = Part::Range {
            after: Some(vec!["1".to_owned(), "'2".to_owned()]),
            upto: Some(vec!["3".to_owned(), "4".to_owned()]),
        };
        let (text, values) = Statements::new(&table, &shape, None).rows(&part, 9);
        assert_eq!(values, ["1", "'2", "3", "4"]);
        assert!(text.contains("FROM \"s\".\"x;y\" t"), "{text}");
        assert!(text.contains("(t.\"a\", t.\"b\"\"c\") > ($1::text::bigint, $2::text::bigint)"), "{text}");
        assert!(text.contains("<= ($3::text::bigint, $4::text::bigint)"), "{text}");
        let (text, _) = Statements::new(&table, &shape, Some("(a > 1)")).rows(&part, 9);
        let rows = "FROM (SELECT \"a\", \"b\"\"c\" FROM \"s\".\"x;y\" WHERE ((a > 1)\n)) t WHERE (t.";
        assert!(text.contains(rows), "{text}");
    }
}
