//! What a PostgreSQL server says when it refuses, and what that means for us.

use super::conn::Purpose;
use super::options::ConnectOptions;
use crate::Error;

/// An ErrorResponse. The detail field is left out: it may hold row values.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct ServerError {
    pub(crate) sqlstate: String,
    pub(crate) message: String,
    pub(crate) hint: String,
    /// The place in the log that the server was at, from the context field, whose other words may hold row values.
    pub(crate) position: Option<String>,
}

impl ServerError {
    /// Reads the fields; anything malformed is simply absent.
    pub(crate) fn parse(body: &[u8]) -> Self {
        let mut error = Self::default();
        for field in body.split(|&b| b == 0) {
            let Some((&kind, text)) = field.split_first() else { continue };
            let text = || String::from_utf8_lossy(text).into_owned();
            match kind {
                b'C' => error.sqlstate = text(),
                b'M' => error.message = text(),
                b'H' => error.hint = text(),
                b'W' => error.position = position_in(&text()),
                _ => {}
            }
        }
        error
    }

    /// The error of a statement. `action` completes "the upstream refused to …".
    pub(crate) fn into_error(self, action: &str) -> Error {
        let class = self.sqlstate.get(..2).unwrap_or_default();
        match self.sqlstate.as_str() {
            "42501" => Error::UpstreamPrivilege {
                what: format!("the upstream does not allow its role to {action}: {}", self.words()),
            },
            "57P01" | "57P02" | "57P03" | "57P05" | "57014" | "55006" | "55P03" | "40001" | "40P01"
            | "25P03" | "25P04" => self.unavailable(action),
            _ if self.is_too_large() => {
                self.too_large(action, "a row", "; make the row smaller, or leave its table out")
            }
            // These quote the value, which may be one of a row or of a condition.
            "22P02" | "22P03" | "22003" | "22007" | "22008" => Error::UpstreamQuery {
                action: action.to_owned(),
                message: "a value does not fit the type that it is cast to".to_owned(),
                sqlstate: self.sqlstate,
            },
            _ if class == "53" || (class == "08" && self.sqlstate != "08P01") => self.unavailable(action),
            _ => Error::UpstreamQuery {
                action: action.to_owned(),
                message: self.words(),
                sqlstate: self.sqlstate,
            },
        }
    }

    /// The error of the stream. `table` was announced right before, so that its row was the next to come.
    ///
    /// Whatever is done about a row that is too large, the log has it and the server does not come past it: it looks at
    /// the publication as that was then.
    pub(crate) fn into_stream_error(self, table: Option<&str>) -> Error {
        const ACTION: &str = "stream the log";
        if !self.is_too_large() {
            return self.into_error(ACTION);
        }
        let row = table.map_or_else(|| "a row".to_owned(), |table| format!("a row of table {table}"));
        let find = match (table, &self.position) {
            (Some(_), _) => String::new(),
            (None, Some(lsn)) => format!(
                ". It does not say of which table: `pg_waldump -p PGDATA/pg_wal -s {lsn} -n 1` on its host, or SELECT \
                 block_ref FROM pg_get_wal_record_info('{lsn}') of the extension pg_walinspect, shows \"rel \
                 tablespace/database/file\", and SELECT pg_filenode_relation(tablespace, file) in that database names it"
            ),
            (None, None) => {
                ". It does not say of which table: octet_length of columns of type text, json and bytea tells"
                    .to_owned()
            }
        };
        let advice = format!(
            "{find}. The row stays in the log: make it smaller or leave its table out, then remove the changefeed and \
             create it again"
        );
        self.too_large(ACTION, &row, &advice)
    }

    /// The error of a connection attempt.
    pub(crate) fn into_login_error(self, options: &ConnectOptions, purpose: Purpose) -> Error {
        match self.sqlstate.as_str() {
            "28P01" | "28000" => Error::UpstreamAuth { user: options.user.clone(), message: self.words() },
            "3D000" => Error::UpstreamNoDatabase { database: options.database.clone() },
            "42501" if purpose == Purpose::Replication => Error::UpstreamPrivilege {
                what: format!(
                    "role {0:?} may not read the log; run: ALTER ROLE {1} REPLICATION",
                    options.user,
                    super::sql::ident(&options.user)
                ),
            },
            "42501" => Error::UpstreamPrivilege {
                what: format!("role {:?} may not connect: {}", options.user, self.words()),
            },
            _ => self.into_error("log in"),
        }
    }

    /// A message is built in memory and may have 1 GiB; `bytea` takes twice its size in text.
    fn is_too_large(&self) -> bool {
        match self.sqlstate.as_str() {
            "54000" => true,
            "XX000" => self.message.starts_with("invalid memory alloc request size"),
            _ => false,
        }
    }

    fn too_large(&self, action: &str, row: &str, advice: &str) -> Error {
        Error::ValueTooLarge {
            what: format!(
                "the upstream cannot {action}: {row} is larger than the 1 GiB that PostgreSQL sends in one message, where \
                 bytea counts twice in text form ({}){advice}",
                self.words()
            ),
        }
    }

    fn unavailable(self, action: &str) -> Error {
        Error::UpstreamUnavailable { message: format!("it did not {action}: {}", self.words()) }
    }

    fn words(&self) -> String {
        if self.hint.is_empty() { self.message.clone() } else { format!("{} ({})", self.message, self.hint) }
    }
}

/// The last word of a text that is a place in the log. A server says it in its own language.
fn position_in(context: &str) -> Option<String> {
    let is_hex = |part: &str| (1..=8).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_hexdigit());
    let mut words = context.split(|c: char| c != '/' && !c.is_ascii_alphanumeric());
    let is_place = |word: &&str| word.split_once('/').is_some_and(|(high, low)| is_hex(high) && is_hex(low));
    words.rfind(is_place).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_that_is_too_large_is_told_by_its_table_or_by_its_place() {
        let error = |context: &str| {
            let message = "string buffer exceeds maximum allowed length (1073741823 bytes)";
            let body = format!("SERROR\0C54000\0M{message}\0W{context}\0\0");
            ServerError::parse(body.as_bytes())
        };
        let context =
            r#"slot "a/b", output plugin "pgoutput", in the change callback, associated LSN 1A/2B00C8"#;
        let told = |context, table| error(context).into_stream_error(table).to_string();
        assert_eq!(error(context).position.as_deref(), Some("1A/2B00C8"));
        assert!(told(context, None).contains("-s 1A/2B00C8 -n 1"));
        assert!(told(context, Some("app.t")).contains("a row of table app.t is larger"));
        assert!(!told(context, Some("app.t")).contains("pg_waldump"));
        assert!(told("COPY t, line 1/x", None).contains("octet_length"));
        assert!(told(context, None).ends_with("create it again"));
    }
}
