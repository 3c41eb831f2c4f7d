//! `[store]`: where a cluster keeps its metadata.

use std::path::PathBuf;

#[cfg(feature = "etcd")]
use coordinator::backend::etcd::{EtcdConfig, EtcdCredentials, EtcdTls};
use serde::{Deserialize, Serialize};

use super::SecuritySection;

/// Which database holds the metadata.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StoreKind {
    /// A file in the data directory: the process is the whole cluster.
    #[default]
    Embedded,
    /// An etcd cluster that the nodes share.
    Etcd,
}

/// `[store]`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct StoreSection {
    /// Which database.
    pub kind: StoreKind,
    /// etcd: `http://host:port` or `https://host:port` of its servers.
    pub endpoints: Vec<String>,
    /// etcd: put before every key, such as `/team`; empty by default, as tools of operators expect it.
    pub prefix: String,
    /// Embedded: its directory; `meta` in the data directory when empty.
    pub path: PathBuf,
}

impl StoreSection {
    /// An etcd cluster, by a list of endpoints with commas between.
    #[must_use]
    pub fn etcd(endpoints: &str) -> Self {
        let endpoints = endpoints.split(',').map(|endpoint| endpoint.trim().to_owned()).collect();
        Self { kind: StoreKind::Etcd, endpoints, ..Self::default() }
    }

    /// How to reach the etcd cluster. Endpoints with `https` are trusted and met with the certificates of `[security]`.
    /// The user, if etcd asks for one, is in the environment: `MILLRACE_STORE_USER` and `MILLRACE_STORE_PASSWORD`.
    #[cfg(feature = "etcd")]
    #[must_use]
    pub fn etcd_config(&self, security: &SecuritySection) -> EtcdConfig {
        let credentials = std::env::var("MILLRACE_STORE_USER").ok().map(|user| EtcdCredentials {
            user,
            password: std::env::var("MILLRACE_STORE_PASSWORD").unwrap_or_default(),
        });
        let tls = security.has_tls().then(|| EtcdTls {
            ca: security.ca_path.clone(),
            identity: Some((security.cert_path.clone(), security.key_path.clone())),
        });
        EtcdConfig { credentials, tls, prefix: self.prefix.clone(), ..EtcdConfig::new(&self.endpoints) }
    }

    /// Checks every value; an error names its key and says what to do.
    pub(super) fn validate(&self, security: &SecuritySection) -> Result<(), (&'static str, String)> {
        match self.kind {
            StoreKind::Embedded if !self.endpoints.is_empty() => {
                Err(("store.endpoints", "belong to an etcd store: write kind = \"etcd\" too".to_owned()))
            }
            StoreKind::Embedded if !self.prefix.is_empty() => {
                Err(("store.prefix", "belongs to an etcd store; leave it out".to_owned()))
            }
            StoreKind::Embedded => Ok(()),
            StoreKind::Etcd if !self.path.as_os_str().is_empty() => {
                Err(("store.path", "belongs to an embedded store; leave it out".to_owned()))
            }
            StoreKind::Etcd if !self.has_prefix() => Err((
                "store.prefix",
                "must be empty or /words/with/slashes/between, such as /team".to_owned(),
            )),
            StoreKind::Etcd => self.check_endpoints(security),
        }
    }

    #[cfg(feature = "etcd")]
    fn check_endpoints(&self, security: &SecuritySection) -> Result<(), (&'static str, String)> {
        let endpoints = self.etcd_config(security).normal_endpoints();
        endpoints.map(drop).map_err(|error| ("store.endpoints", error.to_string()))
    }

    #[cfg(not(feature = "etcd"))]
    fn check_endpoints(&self, _: &SecuritySection) -> Result<(), (&'static str, String)> {
        Err(("store.kind", "this program was built without etcd".to_owned()))
    }

    /// Whether the prefix is one, or empty.
    fn has_prefix(&self) -> bool {
        let part = |part: &str| {
            let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
            !part.is_empty() && part.bytes().all(fits)
        };
        self.prefix.is_empty() || self.prefix.strip_prefix('/').is_some_and(|rest| rest.split('/').all(part))
    }
}

#[cfg(all(test, feature = "etcd"))]
mod tests {
    use super::*;

    #[test]
    fn keys_that_belong_to_another_kind_of_store_are_refused() {
        let plain = SecuritySection::default();
        assert_eq!(StoreSection::default().validate(&plain), Ok(()));
        assert_eq!(StoreSection::etcd("http://a:2379, http://b:2379").validate(&plain), Ok(()));
        let etcd = || StoreSection::etcd("http://a:2379");
        let with = |prefix: &str| StoreSection { prefix: prefix.to_owned(), ..etcd() };
        assert_eq!(with("/team/a").validate(&plain), Ok(()));
        let cases = [
            ("store.endpoints", StoreSection::etcd("http://me:secret@a:2379")),
            ("store.endpoints", StoreSection::etcd("https://a:2379")),
            ("store.endpoints", StoreSection { endpoints: Vec::new(), ..etcd() }),
            ("store.endpoints", StoreSection { kind: StoreKind::Embedded, ..etcd() }),
            ("store.path", StoreSection { path: "meta".into(), ..etcd() }),
            ("store.prefix", with("team")),
            ("store.prefix", with("/team/")),
            ("store.prefix", StoreSection { kind: StoreKind::Embedded, endpoints: Vec::new(), ..with("/a") }),
        ];
        for (key, section) in cases {
            let (found, what) = section.validate(&plain).unwrap_err();
            assert!(found == key && !what.contains("secret"), "{key}: {found}: {what}");
        }
    }

    #[test]
    fn an_etcd_with_tls_is_met_with_the_certificates_of_the_node() {
        let security = SecuritySection {
            ca_path: "ca.pem".into(),
            cert_path: "node.pem".into(),
            key_path: "node.key".into(),
            ..SecuritySection::default()
        };
        let store = StoreSection::etcd("https://a:2379,b:2379,http://c:2379");
        assert_eq!(store.validate(&security), Ok(()));
        let config = store.etcd_config(&security);
        let endpoints = ["https://a:2379", "https://b:2379", "http://c:2379"];
        assert_eq!(config.normal_endpoints().unwrap(), endpoints);
        let tls = config.tls.unwrap();
        assert_eq!(tls.ca, PathBuf::from("ca.pem"));
        assert_eq!(tls.identity, Some(("node.pem".into(), "node.key".into())));
    }
}
