//! How to reach an etcd cluster, checked before anything is sent.

use std::path::PathBuf;
use std::time::Duration;

use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use url::Url;

use crate::backend::StoreError;

/// Longest time to open a connection.
pub(super) const DIAL: Duration = Duration::from_secs(5);
/// A connection on which nothing happens is probed after this time,
const PROBE_AFTER: Duration = Duration::from_secs(10);
/// and given up when the probe is not answered within this time.
const PROBE_LIMIT: Duration = Duration::from_secs(3);
/// Longest that one call takes with all of its attempts.
pub const DEFAULT_CALL_LIMIT: Duration = Duration::from_secs(30);

/// Files for TLS. They are read again when they change, so certificates can be renewed while the server runs.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct EtcdTls {
    /// Certificates of the authorities that sign the servers' certificates, PEM.
    pub ca: PathBuf,
    /// Our own certificate with its chain, and its key, PEM; for servers that demand one.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// A user of etcd.
#[derive(Clone, PartialEq, Eq)]
pub struct EtcdCredentials {
    /// Name.
    pub user: String,
    /// Password.
    pub password: String,
}

impl std::fmt::Debug for EtcdCredentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:***", self.user)
    }
}

/// How to reach an etcd cluster.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EtcdConfig {
    /// Client URLs of members: `http://host:2379` or `https://…`; without a scheme `http`, or `https` when `tls` is set.
    /// One that answers is enough, the others are learnt from it.
    pub endpoints: Vec<String>,
    /// Files for endpoints with `https`.
    pub tls: Option<EtcdTls>,
    /// Whom to introduce ourselves as; `None` where etcd does not ask.
    pub credentials: Option<EtcdCredentials>,
    /// Put before every key, so that one etcd can be shared; empty by default.
    pub prefix: String,
    /// Longest that one call takes with all of its attempts.
    pub call_limit: Duration,
}

impl EtcdConfig {
    /// These endpoints without TLS files, credentials or prefix.
    pub fn new<E: Into<String>>(endpoints: impl IntoIterator<Item = E>) -> Self {
        Self {
            endpoints: endpoints.into_iter().map(Into::into).collect(),
            tls: None,
            credentials: None,
            prefix: String::new(),
            call_limit: DEFAULT_CALL_LIMIT,
        }
    }

    /// The endpoints in their normal form, without repetitions.
    ///
    /// # Errors
    /// [`StoreError::Misconfigured`] when there is none, or one is not a URL of a server.
    pub fn normal_endpoints(&self) -> Result<Vec<String>, StoreError> {
        let mut endpoints: Vec<String> = Vec::new();
        for endpoint in &self.endpoints {
            let endpoint = normal(endpoint, self.tls.is_some())?;
            if !endpoints.contains(&endpoint) {
                endpoints.push(endpoint);
            }
        }
        if endpoints.is_empty() {
            return Err(StoreError::Misconfigured(
                "no endpoint is given; name at least one as http://host:2379".to_owned(),
            ));
        }
        if self.tls.is_none()
            && let Some(endpoint) = endpoints.iter().find(|endpoint| endpoint.starts_with("https:"))
        {
            return Err(StoreError::Misconfigured(format!(
                "{endpoint} needs TLS; set security.ca-path to the authority of its certificate"
            )));
        }
        Ok(endpoints)
    }

    /// Reads the files of TLS.
    pub(super) fn read_tls(&self) -> Result<Option<TlsFiles>, StoreError> {
        let Some(tls) = &self.tls else { return Ok(None) };
        let read = |path: &PathBuf| {
            std::fs::read(path).map_err(|error| {
                StoreError::Misconfigured(format!("the file {} cannot be read: {error}", path.display()))
            })
        };
        let identity = match &tls.identity {
            Some((certificate, key)) => Some((read(certificate)?, read(key)?)),
            None => None,
        };
        Ok(Some(TlsFiles { ca: read(&tls.ca)?, identity }))
    }

    /// A way to an endpoint in normal form; connects at the first request.
    pub(super) fn channel(&self, endpoint: &str, tls: Option<&TlsFiles>) -> Result<Channel, StoreError> {
        let wrong = |error: &dyn std::fmt::Display| StoreError::Misconfigured(format!("{endpoint}: {error}"));
        let mut way = Endpoint::from_shared(endpoint.to_owned())
            .map_err(|error| wrong(&error))?
            .connect_timeout(DIAL)
            .http2_keep_alive_interval(PROBE_AFTER)
            .keep_alive_timeout(PROBE_LIMIT)
            .keep_alive_while_idle(true);
        if let Some(files) = tls
            && endpoint.starts_with("https:")
        {
            let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&files.ca));
            if let Some((certificate, key)) = &files.identity {
                tls = tls.identity(Identity::from_pem(certificate, key));
            }
            way = way.tls_config(tls).map_err(|_| {
                StoreError::Misconfigured(
                    "the files of security.ca-path, cert-path and key-path are not certificates and a key in PEM"
                        .to_owned(),
                )
            })?;
        }
        Ok(way.connect_lazy())
    }
}

/// Content of the files of TLS.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct TlsFiles {
    ca: Vec<u8>,
    identity: Option<(Vec<u8>, Vec<u8>)>,
}

/// `scheme://host:port`.
pub(super) fn normal(endpoint: &str, tls: bool) -> Result<String, StoreError> {
    let wrong = |what: &str| {
        // The text is not repeated: it may hold a password.
        StoreError::Misconfigured(format!("an endpoint is not a URL like http://host:2379: {what}"))
    };
    let endpoint = endpoint.trim();
    let scheme = if tls { "https" } else { "http" };
    let full = if endpoint.contains("://") { endpoint.to_owned() } else { format!("{scheme}://{endpoint}") };
    let url = Url::parse(&full).map_err(|error| wrong(&error.to_string()))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(wrong("the scheme has to be http or https"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(wrong("user and password are settings of their own"));
    }
    if !matches!(url.path(), "" | "/") || url.query().is_some() || url.fragment().is_some() {
        return Err(wrong("nothing may follow the port"));
    }
    let host = url.host_str().ok_or_else(|| wrong("the host is missing"))?;
    let port = url.port().or(explicit_default(&full, url.scheme())).unwrap_or(2379);
    Ok(format!("{}://{host}:{port}", url.scheme()))
}

/// A port that a URL does not keep because it is the usual one of its scheme.
fn explicit_default(text: &str, scheme: &str) -> Option<u16> {
    let port = if scheme == "http" { 80 } else { 443 };
    text.trim_end_matches('/').ends_with(&format!(":{port}")).then_some(port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_have_one_form_and_wrong_ones_are_refused_without_repeating_passwords() {
        let config = EtcdConfig::new(["a:2379", "http://a:2379/", "http://b", "http://[::1]:80", "c:443"]);
        assert_eq!(
            config.normal_endpoints().unwrap(),
            ["http://a:2379", "http://b:2379", "http://[::1]:80", "http://c:443"]
        );
        let tls = EtcdConfig {
            tls: Some(EtcdTls::default()),
            ..EtcdConfig::new(["a", "http://b:1", "https://c:443"])
        };
        assert_eq!(tls.normal_endpoints().unwrap(), ["https://a:2379", "http://b:1", "https://c:443"]);
        for wrong in ["http://user:secret@a:2379", "ftp://a", "http://a/secret", "http://", "http://a?secret"]
        {
            let error = EtcdConfig::new([wrong]).normal_endpoints().unwrap_err().to_string();
            assert!(error.contains("http://host:2379") && !error.contains("secret"), "{wrong}: {error}");
        }
        assert!(EtcdConfig::new([""; 0]).normal_endpoints().is_err());
        let error = EtcdConfig::new(["https://a:2379"]).normal_endpoints().unwrap_err().to_string();
        assert!(error.contains("https://a:2379") && error.contains("ca-path"), "{error}");
    }

    #[test]
    fn a_password_is_not_shown() {
        let credentials = Some(EtcdCredentials { user: "me".to_owned(), password: "secret".to_owned() });
        let shown = format!("{:?}", EtcdConfig { credentials, ..EtcdConfig::new(["a"]) });
        assert!(shown.contains("me:***") && !shown.contains("secret"), "{shown}");
    }
}
