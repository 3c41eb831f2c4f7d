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
            // A message is built in memory and may have 1 GiB; `bytea` takes twice its size in text.
            "54000" => self.too_large(action),
            "XX000" if self.message.starts_with("invalid memory alloc request size") => {
                self.too_large(action)
            }
            _ if class == "53" || (class == "08" && self.sqlstate != "08P01") => self.unavailable(action),
            _ => Error::UpstreamQuery {
                action: action.to_owned(),
                message: self.words(),
                sqlstate: self.sqlstate,
            },
        }
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

    fn too_large(self, action: &str) -> Error {
        Error::ValueTooLarge {
            what: format!(
                "the upstream cannot {action}: a row is larger than the 1 GiB that PostgreSQL sends in one message, where \
                 bytea counts twice in text form ({}); make the row smaller, or leave its table out",
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
