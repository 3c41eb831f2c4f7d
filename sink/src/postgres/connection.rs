//! One connection: how it is opened, and what its session is set to.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rand::Rng;
use tokio::task::JoinHandle;
use tokio_postgres::Client;
use tokio_postgres::config::{SslMode, SslNegotiation, TargetSessionAttrs};
use tokio_postgres::error::SqlState;
use tokio_util::sync::CancellationToken;

use super::config::PgConfig;
use super::dial::{self, Unreached};
use super::failure::{Failure, classify};
use super::pipeline::Exchange;
use super::wire::{Secured, Wire};
use crate::Error;

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// A user who has logged in.
pub(super) struct Session {
    pub(super) client: Client,
    /// The task that carries the client's requests.
    pub(super) driver: JoinHandle<()>,
    wire: Wire,
}

/// A live connection, set up for writing.
pub(crate) struct Connection {
    client: Client,
    driver: JoinHandle<()>,
    pub(super) wire: Wire,
    pub(super) exchange: Exchange,
    /// The client may have requests under way.
    used: AtomicBool,
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
        let Session { client, driver, wire } = Session::open(config).await?;
        let (exchange, used) = (Exchange::default(), AtomicBool::new(true));
        let this = Self { client, driver, wire, exchange, used, may_stage: None };
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

    /// The driver, for single statements and for `COPY`.
    pub(crate) fn client(&self) -> &Client {
        self.used.store(true, Ordering::Relaxed);
        &self.client
    }

    /// Waits until the driver has nothing under way.
    pub(super) async fn settle(&mut self) -> Result<(), tokio_postgres::Error> {
        if !*self.used.get_mut() && !self.wire.is_for_driver() {
            return Ok(());
        }
        // Requests are answered in order: the driver also gives prepared statements up when nobody waits for it.
        self.client.batch_execute("").await?;
        *self.used.get_mut() = false;
        Ok(())
    }
}

impl Session {
    /// Connects to the first server of a configuration that takes the user.
    pub(super) async fn open(config: &PgConfig) -> Result<Self, Failure> {
        let limit = config.driver.get_connect_timeout().copied().unwrap_or(Duration::MAX);
        let unreached = |error: Unreached| {
            let what = format!("cannot connect to the downstream database at {}: {error}", config.address());
            Failure::Lost(Error::Unavailable { what, source: Some(Box::new(error)) })
        };
        let mut last = Failure::Fatal(Error::Config("the sink URI names no host".into()));
        for server in dial::servers(&config.driver)? {
            let addresses = match dial::resolve(&config.driver, server).await {
                Ok(addresses) => addresses,
                Err(error) => {
                    last = unreached(error);
                    continue;
                }
            };
            for address in addresses {
                let attempt = async {
                    let stream = dial::dial(config, &address).await.map_err(unreached)?;
                    Self::log_in(config, Wire::new(stream)).await
                };
                match tokio::time::timeout(limit, attempt).await {
                    Ok(Ok(session)) => return Ok(session),
                    Ok(Err(failure)) => last = failure,
                    Err(_) => last = unreached(Unreached::timed_out()),
                }
            }
        }
        Err(last)
    }

    async fn log_in(config: &PgConfig, wire: Wire) -> Result<Self, Failure> {
        let failed = |error| connecting(error, &config.address());
        // The stream is secured already; what it is secured with still counts for the password.
        let mut driver = config.driver.clone();
        driver.ssl_mode(SslMode::Require).ssl_negotiation(SslNegotiation::Direct);
        let (client, connection) = driver.connect_raw(wire.driver_end(), Secured).await.map_err(failed)?;
        let driver = tokio::spawn(async move {
            // The client reports the failure of the connection to whoever uses it.
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection to the downstream database ended");
            }
        });
        let session = Self { client, driver, wire };
        let attributes = config.driver.get_target_session_attrs();
        let wanted = if attributes == TargetSessionAttrs::ReadOnly { "on" } else { "off" };
        if attributes == TargetSessionAttrs::Any {
            return Ok(session);
        }
        let row = session.client.query_one("SHOW transaction_read_only", &[]).await.map_err(failed)?;
        if row.get::<_, &str>(0) == wanted {
            return Ok(session);
        }
        let what = format!(
            "the server at {} is not what target_session_attrs of the sink URI asks for",
            config.address()
        );
        Err(Failure::Lost(Error::Unavailable { what, source: None }))
    }
}

fn connecting(error: tokio_postgres::Error, address: &str) -> Failure {
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
}
