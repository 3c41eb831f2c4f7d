//! The sink URI: what is meant for the driver, what is meant for the sink, and how TLS is done.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio_postgres::config::{Host, SslMode, SslNegotiation};
use tokio_postgres_rustls::MakeRustlsConnect;
use url::Url;

use super::sql::quote;
use crate::Error;

/// Connections that write, each with a queue of its own at a time; more than there are queues would idle.
const MAX_WORKERS: usize = crate::SHARDS;
const DEFAULT_WORKERS: usize = 4;
/// Row changes per downstream transaction: large enough to amortise the commit, small enough to retry.
const DEFAULT_TXN_ROWS: usize = 1000;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A peer that vanished without closing is noticed within about a minute.
const KEEPALIVE: Duration = Duration::from_secs(20);

/// What to do when a table already has rows when its initial copy begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum OnExistingRows {
    /// Fail with a named error.
    Error,
    /// Keep them; copied rows replace those with the same key.
    Append,
    /// Remove them.
    Truncate,
}

/// A parsed sink URI. Holds a password: deliberately without `Debug`.
#[derive(Clone)]
pub(crate) struct PgConfig {
    pub(crate) driver: tokio_postgres::Config,
    pub(crate) tls: MakeRustlsConnect,
    pub(crate) workers: usize,
    pub(crate) txn_rows: usize,
    /// `replica` or `origin`.
    pub(crate) replication_role: &'static str,
    pub(crate) create_tables: bool,
    pub(crate) on_existing_rows: OnExistingRows,
    /// Schema of the sink's own tables, quoted.
    pub(crate) own_schema: String,
    /// The same, unquoted.
    pub(crate) own_schema_name: String,
}

#[derive(Default)]
struct TlsFiles {
    mode: Option<String>,
    root: Option<PathBuf>,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
}

fn config_error(text: impl Into<String>) -> Error {
    Error::Config(text.into())
}

fn boolean(key: &str, value: &str) -> Result<bool, Error> {
    match value {
        "true" | "1" | "on" | "yes" | "" => Ok(true),
        "false" | "0" | "off" | "no" => Ok(false),
        _ => Err(config_error(format!("{key} in the sink URI is true or false"))),
    }
}

fn number(key: &str, value: &str, range: std::ops::RangeInclusive<usize>) -> Result<usize, Error> {
    value.parse().ok().filter(|n| range.contains(n)).ok_or_else(|| {
        config_error(format!("{key} in the sink URI is a number from {} to {}", range.start(), range.end()))
    })
}

impl PgConfig {
    /// Where the server is, for people: `host:port`.
    pub(crate) fn address(&self) -> String {
        let port = self.driver.get_ports().first().copied().unwrap_or(5432);
        match self.driver.get_hosts().first() {
            Some(Host::Tcp(name)) => format!("{name}:{port}"),
            Some(Host::Unix(path)) => format!("{}:{port}", path.display()),
            None => format!("port {port}"),
        }
    }

    /// Parses a `postgres://` URI.
    pub(crate) fn parse(uri: &str) -> Result<Self, Error> {
        let mut url = Url::parse(uri).map_err(|e| config_error(format!("the sink URI is not a URI: {e}")))?;
        let pairs: Vec<(String, String)> =
            url.query_pairs().map(|(key, value)| (key.into_owned(), value.into_owned())).collect();
        let mut tls = TlsFiles::default();
        let mut workers = DEFAULT_WORKERS;
        let mut txn_rows = DEFAULT_TXN_ROWS;
        let mut replication_role = "replica";
        let mut create_tables = true;
        let mut on_existing_rows = OnExistingRows::Error;
        let mut own_schema_name = "millrace".to_string();
        let mut for_driver = Vec::new();
        for (key, value) in pairs {
            match key.as_str() {
                "worker-count" => workers = number(&key, &value, 1..=MAX_WORKERS)?,
                "max-txn-row" => txn_rows = number(&key, &value, 1..=100_000)?,
                "session-replication-role" => {
                    replication_role = match value.as_str() {
                        "replica" => "replica",
                        "origin" => "origin",
                        _ => {
                            return Err(config_error(
                                "session-replication-role in the sink URI is replica or origin",
                            ));
                        }
                    }
                }
                "create-tables" => create_tables = boolean(&key, &value)?,
                "on-existing-rows" => {
                    on_existing_rows = match value.as_str() {
                        "error" => OnExistingRows::Error,
                        "append" => OnExistingRows::Append,
                        "truncate" => OnExistingRows::Truncate,
                        _ => {
                            return Err(config_error(
                                "on-existing-rows in the sink URI is error, append or truncate",
                            ));
                        }
                    }
                }
                "schema" if !value.is_empty() => own_schema_name = value,
                "sslmode" => tls.mode = Some(value),
                "sslrootcert" => tls.root = Some(value.into()),
                "sslcert" => tls.cert = Some(value.into()),
                "sslkey" => tls.key = Some(value.into()),
                _ => for_driver.push((key, value)),
            }
        }
        url.set_query(None);
        if !for_driver.is_empty() {
            url.query_pairs_mut().extend_pairs(&for_driver);
        }
        // The driver's error names a parameter or what is missing, never a value.
        let mut driver: tokio_postgres::Config =
            url.as_str().parse().map_err(|e: tokio_postgres::Error| {
                let cause = std::error::Error::source(&e).map_or_else(|| e.to_string(), ToString::to_string);
                config_error(format!("the sink URI is not usable: {cause}"))
            })?;
        if driver.get_hosts().is_empty() && driver.get_hostaddrs().is_empty() {
            return Err(config_error("the sink URI names no host"));
        }
        if driver.get_user().is_none() {
            return Err(config_error("the sink URI names no user"));
        }
        if driver.get_connect_timeout().is_none() {
            driver.connect_timeout(CONNECT_TIMEOUT);
        }
        driver.keepalives_idle(KEEPALIVE).keepalives_interval(KEEPALIVE / 2).keepalives_retries(4);
        driver.tcp_user_timeout(KEEPALIVE * 3);
        driver.application_name("millrace");
        let tls = tls.connector(&mut driver)?;
        if driver.get_ssl_negotiation() == SslNegotiation::Direct && driver.get_ssl_mode() == SslMode::Prefer
        {
            return Err(config_error(
                "sslnegotiation=direct in the sink URI needs sslmode=require or stricter",
            ));
        }
        Ok(Self {
            driver,
            tls,
            workers,
            txn_rows,
            replication_role,
            create_tables,
            on_existing_rows,
            own_schema: quote(&own_schema_name),
            own_schema_name,
        })
    }
}

impl TlsFiles {
    /// The meaning of `sslmode` is libpq's: `require` encrypts without looking at the certificate unless
    /// `sslrootcert` is given; `verify-ca` checks its issuer, `verify-full` also the host name.
    fn connector(self, driver: &mut tokio_postgres::Config) -> Result<MakeRustlsConnect, Error> {
        let mode = self.mode.as_deref().unwrap_or("prefer");
        driver.ssl_mode(match mode {
            "disable" => SslMode::Disable,
            "allow" | "prefer" => SslMode::Prefer,
            "require" | "verify-ca" | "verify-full" => SslMode::Require,
            _ => {
                return Err(config_error(
                    "sslmode in the sink URI is disable, prefer, require, verify-ca or verify-full",
                ));
            }
        });
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let check_issuer = mode.starts_with("verify") || (mode == "require" && self.root.is_some());
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|e| config_error(format!("TLS cannot be set up: {e}")))?;
        let verifier: Arc<dyn ServerCertVerifier> = if check_issuer {
            let inner =
                WebPkiServerVerifier::builder_with_provider(Arc::new(self.roots()?), Arc::clone(&provider))
                    .build()
                    .map_err(|e| config_error(format!("sslrootcert is not usable: {e}")))?;
            if mode == "verify-full" { inner } else { Arc::new(IssuerOnly(inner)) }
        } else {
            Arc::new(AnyCertificate(provider))
        };
        let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
        let config = match (&self.cert, &self.key) {
            (None, None) => builder.with_no_client_auth(),
            (Some(cert), Some(key)) => {
                let unreadable =
                    |what: &str| config_error(format!("{what} of the sink URI cannot be read as PEM"));
                let chain = CertificateDer::pem_file_iter(cert)
                    .and_then(Iterator::collect)
                    .map_err(|_| unreadable("sslcert"))?;
                let key = PrivateKeyDer::from_pem_file(key).map_err(|_| unreadable("sslkey"))?;
                builder
                    .with_client_auth_cert(chain, key)
                    .map_err(|e| config_error(format!("sslcert and sslkey do not fit: {e}")))?
            }
            (Some(_), None) | (None, Some(_)) => {
                return Err(config_error("sslcert and sslkey in the sink URI go together"));
            }
        };
        Ok(MakeRustlsConnect::new(config))
    }

    fn roots(&self) -> Result<RootCertStore, Error> {
        let mut roots = RootCertStore::empty();
        match &self.root {
            Some(path) if path.as_os_str() != "system" => {
                let unreadable = || config_error("sslrootcert of the sink URI cannot be read as PEM");
                for certificate in CertificateDer::pem_file_iter(path).map_err(|_| unreadable())? {
                    roots.add(certificate.map_err(|_| unreadable())?).map_err(|_| unreadable())?;
                }
            }
            Some(_) | None => roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned()),
        }
        Ok(roots)
    }
}

/// `sslmode=require`: encryption only.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// `sslmode=verify-ca`: the issuer must be known, the host name may differ.
#[derive(Debug)]
struct IssuerOnly(Arc<WebPkiServerVerifier>);

impl ServerCertVerifier for IssuerOnly {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        match self.0.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            other => other,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(uri: &str) -> String {
        match PgConfig::parse(uri) {
            Ok(_) => panic!("{uri} should be refused"),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn an_address_names_every_host_and_nothing_secret() {
        let address = |uri| PgConfig::parse(uri).unwrap().address();
        assert_eq!(address("postgres://u:secret@db.example/d"), "db.example:5432");
        assert_eq!(address("postgres://u:secret@10.0.0.1:1/d"), "10.0.0.1:1");
    }

    #[test]
    fn parameters_of_the_sink_do_not_reach_the_driver() {
        let config = PgConfig::parse(
            "postgres://u:p@h:5433/db?worker-count=16&max-txn-row=50&session-replication-role=origin\
             &create-tables=false&on-existing-rows=append&schema=Own&connect_timeout=3&sslmode=disable",
        );
        let Ok(config) = config else { panic!("valid") };
        assert_eq!((config.workers, config.txn_rows), (16, 50));
        assert_eq!(config.replication_role, "origin");
        assert!(!config.create_tables);
        assert_eq!(config.on_existing_rows, OnExistingRows::Append);
        assert_eq!(config.own_schema, "\"Own\"");
        assert_eq!(config.driver.get_dbname(), Some("db"));
        assert_eq!(config.driver.get_connect_timeout(), Some(&Duration::from_secs(3)));
    }

    #[test]
    fn wrong_parameters_are_named_and_values_are_not_quoted() {
        assert!(error("postgres://u:secret@h/db?worker-count=17").contains("worker-count"));
        assert!(error("postgres://u:secret@h/db?on-existing-rows=drop").contains("on-existing-rows"));
        assert!(error("postgres://u:secret@h/db?sslmode=perhaps").contains("sslmode"));
        assert!(error("postgres://u:secret@h/db?sslnegotiation=direct").contains("sslnegotiation"));
        assert!(error("postgres://u:secret@h/db?sslcert=/nowhere").contains("sslkey"));
        assert!(error("postgres:///db").contains("host"));
        for uri in [
            "postgres://u:secret@h/db?nonsense=1",
            "postgres://u:secret@h:port/db",
            "postgres://secret@[h/db",
        ] {
            assert!(!error(uri).contains("secret"));
        }
    }
}
