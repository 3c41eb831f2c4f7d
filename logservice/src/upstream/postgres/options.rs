//! Connection options of a PostgreSQL upstream, from its URI.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use heartbeatpb::config::Uri;

use crate::Error;

/// How much TLS is demanded; the words are libpq's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum SslMode {
    /// Never.
    Disable,
    /// If the server offers it; the certificate is not checked.
    Prefer,
    /// Always; the certificate is checked only when a root certificate is given.
    Require,
    /// Always, and the certificate comes from a trusted authority.
    VerifyCa,
    /// Always, and the certificate also names the host.
    VerifyFull,
}

/// Where a server listens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Endpoint {
    /// Host name or address, and port.
    Tcp(String, u16),
    /// Path of a Unix socket.
    Unix(PathBuf),
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Endpoint::Tcp(host, port) if host.contains(':') => write!(f, "[{host}]:{port}"),
            Endpoint::Tcp(host, port) => write!(f, "{host}:{port}"),
            Endpoint::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

/// Everything a connection needs. `Debug` hides the password.
#[derive(Clone)]
pub(crate) struct ConnectOptions {
    /// Tried in order.
    pub(crate) endpoints: Vec<Endpoint>,
    pub(crate) user: String,
    pub(crate) password: Option<String>,
    pub(crate) database: String,
    pub(crate) ssl_mode: SslMode,
    /// PEM file with trusted authorities; without one the public web authorities are trusted.
    pub(crate) ssl_root_cert: Option<PathBuf>,
    /// PEM files with a client certificate and its key.
    pub(crate) ssl_client: Option<(PathBuf, PathBuf)>,
    /// For reaching one endpoint and logging in.
    pub(crate) connect_timeout: Duration,
}

impl fmt::Debug for ConnectOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectOptions")
            .field("endpoints", &self.endpoints)
            .field("user", &self.user)
            .field("database", &self.database)
            .field("ssl_mode", &self.ssl_mode)
            .finish_non_exhaustive()
    }
}

const DEFAULT_PORT: u16 = 5432;
const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

impl ConnectOptions {
    /// Reads `postgres://user:password@host:port[,host:port…]/database?sslmode=…`.
    ///
    /// Parameters: `sslmode`, `sslrootcert`, `sslcert`, `sslkey`, `connect_timeout` (seconds), and `host` for
    /// the directory of a Unix socket.
    pub(crate) fn parse(text: &str) -> Result<Self, Error> {
        let wrong = |reason: String| Error::UpstreamUri { reason };
        let uri = Uri::parse(text).map_err(|reason| wrong(reason.to_owned()))?;
        if uri.scheme != "postgres" && uri.scheme != "postgresql" {
            return Err(wrong(format!("scheme {:?} is not postgres", uri.scheme)));
        }
        if uri.user.is_empty() {
            return Err(wrong("it names no user; write postgres://user:password@host/database".to_owned()));
        }
        let database = uri.path.trim_start_matches('/');
        if database.is_empty() || database.contains('\0') {
            return Err(wrong(
                "it names no database; write postgres://user:password@host/database".to_owned(),
            ));
        }
        let mut endpoints: Vec<Endpoint> = uri
            .hosts
            .iter()
            .map(|(host, port)| Endpoint::Tcp(host.clone(), port.unwrap_or(DEFAULT_PORT)))
            .collect();
        let (mut ssl_mode, mut ssl_root_cert, mut ssl_cert, mut ssl_key) = (None, None, None, None);
        let mut connect_timeout = DEFAULT_CONNECT_TIMEOUT;
        for (key, value) in &uri.params {
            match key.as_str() {
                "sslmode" => {
                    ssl_mode = Some(match value.as_str() {
                        "disable" => SslMode::Disable,
                        "prefer" => SslMode::Prefer,
                        "require" => SslMode::Require,
                        "verify-ca" => SslMode::VerifyCa,
                        "verify-full" => SslMode::VerifyFull,
                        _ => {
                            return Err(wrong(format!(
                                "sslmode {value:?} is none of disable, prefer, require, verify-ca, verify-full"
                            )));
                        }
                    });
                }
                "sslrootcert" => ssl_root_cert = (value != "system").then(|| PathBuf::from(value)),
                "sslcert" => ssl_cert = Some(PathBuf::from(value)),
                "sslkey" => ssl_key = Some(PathBuf::from(value)),
                "connect_timeout" => {
                    let seconds: u64 =
                        value.parse().ok().filter(|seconds| (1..=600).contains(seconds)).ok_or_else(
                            || wrong("connect_timeout is not between 1 and 600 seconds".to_owned()),
                        )?;
                    connect_timeout = Duration::from_secs(seconds);
                }
                "host" if value.starts_with('/') => {
                    let port = uri.hosts.first().and_then(|(_, port)| *port).unwrap_or(DEFAULT_PORT);
                    endpoints = vec![Endpoint::Unix(PathBuf::from(format!("{value}/.s.PGSQL.{port}")))];
                }
                _ => return Err(wrong(format!("parameter {key:?} is not known"))),
            }
        }
        if endpoints.is_empty() {
            return Err(wrong("it names no host".to_owned()));
        }
        let ssl_client = match (ssl_cert, ssl_key) {
            (Some(cert), Some(key)) => Some((cert, key)),
            (None, None) => None,
            _ => return Err(wrong("sslcert and sslkey must be given together".to_owned())),
        };
        Ok(Self {
            endpoints,
            user: uri.user.clone(),
            password: uri.password.clone(),
            database: database.to_owned(),
            ssl_mode: ssl_mode.unwrap_or(SslMode::Prefer),
            ssl_root_cert,
            ssl_client,
            connect_timeout,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_complete_uri_is_read() {
        let options = ConnectOptions::parse(
            "postgresql://al%40ice:p%3Ass@db1:5433,[::1]/shop?sslmode=verify-full&sslrootcert=/ca.pem&connect_timeout=3",
        )
        .expect("uri");
        assert_eq!(options.user, "al@ice");
        assert_eq!(options.password.as_deref(), Some("p:ss"));
        assert_eq!(options.database, "shop");
        assert_eq!(options.endpoints.len(), 2);
        assert_eq!(options.endpoints[0], Endpoint::Tcp("db1".to_owned(), 5433));
        assert_eq!(options.ssl_mode, SslMode::VerifyFull);
        assert_eq!(options.connect_timeout, Duration::from_secs(3));
        assert!(!format!("{options:?}").contains("p:ss"));
    }

    #[test]
    fn wrong_uris_are_refused_without_repeating_them() {
        for uri in [
            "",
            "mysql://a:sesame@h/d",
            "postgres://h/d",
            "postgres://a:sesame@h",
            "postgres://a:sesame@h/d?sslmode=maybe",
            "postgres://a:sesame@h/d?connect_timeout=0",
            "postgres://a:sesame@h/d?sslcert=x",
            "postgres://a:sesame@/d",
            "postgres://a:sesame@h/d?flavour=3",
        ] {
            let error = ConnectOptions::parse(uri).expect_err(uri);
            assert_eq!(error.code(), "CDC:ErrUpstreamURIInvalid");
            assert!(!error.to_string().contains("sesame"), "{error}");
        }
    }
}
