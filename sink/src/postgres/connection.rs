//! One connection: how it is opened, what its session is set to, and what its failures mean.

use std::collections::BTreeSet;
use std::time::Duration;

use event::TableInfo;
use heartbeatpb::TableId;
use rand::Rng;
use rustc_hash::FxHashMap;
use tokio::task::JoinHandle;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;
use tokio_postgres::{Client, Statement};
use tokio_util::sync::CancellationToken;

use super::config::PgConfig;
use crate::Error;

/// Prepared statements that a connection keeps; beyond it the cache starts again.
const MAX_STATEMENTS: usize = 512;
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// Why an attempt failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The connection or the server is gone, or short of something: the same again later.
    Lost(Error),
    /// The server broke a deadlock or the like: the same again on this connection.
    Again(Error),
    /// A unique or exclusion constraint was violated, which another order may avoid.
    Conflict(Error),
    /// The progress found downstream is not the one expected: someone else wrote, or a commit whose answer
    /// was lost had happened.
    Overtaken,
    /// A statement changed fewer rows than it should have.
    Missing,
    /// The same, of whole rows, which can be written without looking whether the table has them.
    Absent(TableId),
    /// This process may not write now: the same again when it may.
    Suspended,
    /// A person must look.
    Fatal(Error),
}

impl Failure {
    /// The error for a caller for whom trying again is not an option.
    pub(crate) fn into_error(self) -> Error {
        match self {
            Failure::Lost(e) | Failure::Again(e) | Failure::Conflict(e) | Failure::Fatal(e) => e,
            Failure::Overtaken => Error::Rejected {
                code: "CDC:ErrSinkProgress",
                what: "another writer moved the progress of this changefeed downstream".into(),
            },
            Failure::Missing | Failure::Absent(_) => Error::Rejected {
                code: "CDC:ErrTargetRowMissing",
                what: "a row to update does not exist in the target".into(),
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

/// What the server said, without the parts in which it quotes values.
fn describe(db: &tokio_postgres::error::DbError) -> String {
    let code = db.code().code();
    // Messages of the other classes quote the value that they complain about.
    let harmless = ["08", "0A", "23", "25", "28", "3D", "3F", "40", "42", "53", "55", "57", "58"];
    let mut text = if harmless.iter().any(|class| code.starts_with(class)) && code != "42601" {
        format!("{} (SQLSTATE {code})", db.message())
    } else {
        format!("SQLSTATE {code}")
    };
    if let Some(name) = refused_type(db) {
        text.push_str(&format!(", type {name}"));
    }
    let parts = [("table", db.table()), ("column", db.column()), ("constraint", db.constraint())];
    for (what, name) in parts.into_iter().filter_map(|(what, name)| Some((what, name?))) {
        text.push_str(&format!(", {what} {name:?}"));
    }
    text
}

/// The type to which the server could not read a value, as far as its words tell it in front of the value.
fn refused_type(db: &tokio_postgres::error::DbError) -> Option<&str> {
    if *db.code() != SqlState::INVALID_TEXT_REPRESENTATION {
        return None;
    }
    type_in(db.message())
}

fn type_in(message: &str) -> Option<&str> {
    let begin = ["invalid input value for enum ", "invalid input syntax for type "];
    let rest = begin.iter().find_map(|begin| message.strip_prefix(begin))?;
    rest.split_once(": \"").map(|(name, _)| name)
}

/// As [`classify`], of values of a table. Where the server does not name the type that lacks one, the types of the table
/// that are not built in are named.
pub(super) fn classify_values(error: tokio_postgres::Error, doing: &str, info: &TableInfo) -> Failure {
    let unnamed = error.as_db_error().is_some_and(|db| {
        *db.code() == SqlState::INVALID_TEXT_REPRESENTATION && type_in(db.message()).is_none()
    });
    let failure = classify(error, doing);
    let own = info.columns.iter().flat_map(|column| &column.ty.definitions);
    let own: BTreeSet<String> = own.map(|ty| format!("{}.{}", ty.schema, ty.name)).collect();
    match failure {
        Failure::Fatal(Error::Rejected { code, what }) if unnamed && !own.is_empty() => {
            let own = own.into_iter().collect::<Vec<_>>().join(", ");
            let what = format!("{what}; one of the types that are not the same in the target: {own}");
            Failure::Fatal(Error::Rejected { code, what })
        }
        Failure::Lost(_) | Failure::Again(_) | Failure::Conflict(_) | Failure::Fatal(_) => failure,
        Failure::Overtaken | Failure::Missing | Failure::Absent(_) | Failure::Suspended => failure,
    }
}

/// Sorts an error of the driver by what to do about it. `doing` says what was tried, without values.
pub(crate) fn classify(error: tokio_postgres::Error, doing: &str) -> Failure {
    let Some(db) = error.as_db_error() else {
        let what = format!("{doing}: the connection to the downstream database failed");
        return Failure::Lost(Error::Unavailable { what, source: Some(Box::new(error)) });
    };
    let code = db.code().code();
    let text = format!("{doing}: {}", describe(db));
    let unavailable = |text| Error::Unavailable { what: text, source: None };
    match code {
        "40001" | "40P01" | "55P03" | "57014" | "25P02" => Failure::Again(unavailable(text)),
        // A server that became a standby, was started again, or is short of memory, disk or connections.
        "25006" | "57P01" | "57P02" | "57P03" | "57P05" | "25P03" => Failure::Lost(unavailable(text)),
        _ if code.starts_with("08") || code.starts_with("53") || code.starts_with("58") => {
            Failure::Lost(unavailable(text))
        }
        "23505" | "23P01" => Failure::Conflict(Error::Rejected { code: "CDC:ErrSinkConflict", what: text }),
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

/// A live connection with its prepared statements.
pub(crate) struct Connection {
    pub(crate) client: Client,
    driver: JoinHandle<()>,
    statements: FxHashMap<String, Statement>,
    /// Whether temporary tables may be created; `None`: nobody has asked.
    pub(super) may_stage: Option<bool>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// Settings that make values read back as they were written, and plans that use the key's index however
/// little the target knows about itself, made once, since they do not depend on values. An empty search path: everything
/// is written with its schema.
const SESSION: &str = "SET search_path = ''; SET timezone = 'UTC'; SET datestyle = 'ISO, YMD'; \
    SET intervalstyle = 'postgres'; SET bytea_output = 'hex'; SET xmloption = 'content'; SET lc_monetary = 'C'; \
    SET extra_float_digits = 1; SET array_nulls = on; \
    SET standard_conforming_strings = on; SET client_min_messages = 'error'; \
    SET statement_timeout = 0; SET lock_timeout = 0; SET idle_in_transaction_session_timeout = 0; \
    SET row_security = off; SET default_transaction_isolation = 'read committed'; \
    SET default_transaction_read_only = off; SET default_transaction_deferrable = off; SET jit = off; \
    SET enable_seqscan = off; SET enable_hashjoin = off; SET enable_mergejoin = off; \
    SET plan_cache_mode = force_generic_plan; \
    SET tcp_keepalives_idle = 20; SET tcp_keepalives_interval = 10; SET tcp_keepalives_count = 4";

impl Connection {
    /// Connects and sets the session up.
    pub(crate) async fn open(config: &PgConfig) -> Result<Self, Failure> {
        let (client, connection) =
            config.driver.connect(config.tls.clone()).await.map_err(|e| connecting(e, &config.address()))?;
        let driver = tokio::spawn(async move {
            // The client reports the failure of the connection to whoever uses it.
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection to the downstream database ended");
            }
        });
        let this = Self { client, driver, statements: FxHashMap::default(), may_stage: None };
        this.client.batch_execute(SESSION).await.map_err(|e| classify(e, "setting up the session"))?;
        let role = format!("SET session_replication_role = '{}'", config.replication_role);
        if let Err(error) = this.client.batch_execute(&role).await {
            return Err(match error.code() {
                Some(&SqlState::INSUFFICIENT_PRIVILEGE) if config.replication_role == "origin" => {
                    return Ok(this);
                }
                Some(&SqlState::INSUFFICIENT_PRIVILEGE) => Failure::Fatal(Error::Rejected {
                    code: "CDC:ErrSinkPermission",
                    what: format!(
                        "user {:?} may not set session_replication_role in the target: run `GRANT SET ON PARAMETER \
                         session_replication_role TO {}` there (PostgreSQL 15 and later), use a superuser, or add \
                         session-replication-role=origin to the sink URI, which lets triggers and foreign keys of \
                         the target act on replicated rows",
                        config.driver.get_user().unwrap_or_default(),
                        super::sql::quote(config.driver.get_user().unwrap_or_default()),
                    ),
                }),
                _ => classify(error, "setting session_replication_role"),
            });
        }
        Ok(this)
    }

    /// Whether the connection is known to be gone.
    pub(crate) fn is_closed(&self) -> bool {
        self.client.is_closed()
    }

    /// A prepared statement whose `params` parameters are all `text[]`.
    pub(crate) async fn prepare(&mut self, sql: &str, params: usize) -> Result<Statement, Failure> {
        if let Some(statement) = self.statements.get(sql) {
            return Ok(statement.clone());
        }
        if self.statements.len() >= MAX_STATEMENTS {
            self.statements.clear();
        }
        let types = vec![Type::TEXT_ARRAY; params];
        let statement =
            self.client.prepare_typed(sql, &types).await.map_err(|e| classify(e, "preparing a statement"))?;
        self.statements.insert(sql.to_owned(), statement.clone());
        Ok(statement)
    }
}

pub(super) fn connecting(error: tokio_postgres::Error, address: &str) -> Failure {
    if error.as_db_error().is_some() {
        return classify(error, &format!("connecting to the downstream database at {address}"));
    }
    // The driver's texts for these name the step that failed, never the password.
    let cause = std::error::Error::source(&error).map(|cause| format!(" ({cause})")).unwrap_or_default();
    let what = format!("cannot connect to the downstream database at {address}: {error}{cause}");
    if error.to_string().starts_with("invalid configuration") {
        return Failure::Fatal(Error::Config(what));
    }
    Failure::Lost(Error::Unavailable { what, source: Some(Box::new(error)) })
}

/// Pauses between attempts: twice as long each time, up to a limit, with jitter so that workers spread out.
#[derive(Debug)]
pub(crate) struct Backoff {
    next: Duration,
}

impl Backoff {
    pub(crate) const fn new() -> Self {
        Self { next: FIRST_PAUSE }
    }

    /// The next pause.
    pub(crate) fn advance(&mut self) -> Duration {
        let pause = self.next;
        self.next = (self.next * 2).min(LONGEST_PAUSE);
        pause.mul_f64(rand::rng().random_range(0.5..1.0))
    }

    /// As [`Backoff::pause`], but the first attempt after a success is followed at once.
    pub(crate) async fn pause_unless_first(&mut self, closing: &CancellationToken) -> Result<(), Error> {
        if self.next == FIRST_PAUSE {
            self.advance();
            return Ok(());
        }
        self.pause(closing).await
    }

    /// Waits; `Err` when `closing` happens first.
    pub(crate) async fn pause(&mut self, closing: &CancellationToken) -> Result<(), Error> {
        let pause = self.advance();
        tokio::select! {
            biased;
            () = closing.cancelled() => Err(Error::Closed),
            () = tokio::time::sleep(pause) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_limit() {
        let mut backoff = Backoff::new();
        let pauses: Vec<_> = (0..12).map(|_| backoff.advance()).collect();
        assert!(pauses[0] < FIRST_PAUSE && pauses[11] > LONGEST_PAUSE / 3);
        assert!(pauses.iter().all(|pause| *pause <= LONGEST_PAUSE));
    }

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
