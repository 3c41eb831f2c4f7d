//! TLS between nodes: one certificate for what a node serves and what it calls, read anew when its files change.
//!
//! Nothing here knows about gRPC: [`PeerTls::server_config`] serves any protocol. A connection uses what the files
//! held when it began. Sessions are not resumed, so that a connection never outlives the check of its certificate.

mod names;
mod reload;
mod verify;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::{NoServerSessionStorage, ParsedCertificate};
use rustls::{ClientConfig, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use self::reload::Current;
use self::verify::{CheckClient, CheckServer};

/// HTTP/2, as it is called when a connection is negotiated.
pub const ALPN_H2: &[u8] = b"h2";
/// HTTP/1.1, as it is called when a connection is negotiated.
pub const ALPN_HTTP1: &[u8] = b"http/1.1";

/// Where the certificates are, and whose are accepted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TlsFiles {
    /// Certificates of the authorities that peers and clients are checked against, PEM.
    pub ca: PathBuf,
    /// The certificate chain of this node, its own one first, PEM.
    pub cert: PathBuf,
    /// Its private key, PEM.
    pub key: PathBuf,
    /// Names of which a peer's own certificate must have one, as its common name or as an alternative name; every
    /// certificate of the authorities is accepted when empty. Spaces around a name do not count; the common name of
    /// this node is always among them, because nodes of one cluster often share a certificate.
    pub allowed_names: Vec<String>,
    /// Whether who connects must show a certificate. It must as well when `allowed_names` is not empty.
    pub client_required: bool,
}

/// Why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file cannot be read, or is not PEM of the right kind.
    #[error("{what} {path:?} cannot be used: {why}; it must be a readable PEM file")]
    File {
        /// Which of the files.
        what: &'static str,
        /// Where it is.
        path: PathBuf,
        /// What is wrong; nothing of the content.
        why: String,
    },
    /// The files do not fit together.
    #[error("the certificate and the private key do not fit")]
    Unfit(#[source] rustls::Error),
    /// A peer has shown no certificate, and has to.
    #[error("the peer has shown no certificate")]
    NoCertificate,
    /// A peer's certificate is good, but it is somebody else's.
    #[error("the peer's certificate does not speak for {host}")]
    OtherHost {
        /// Where the peer says that it listens.
        host: String,
    },
    /// A host that no certificate can be for.
    #[error("{0:?} is no name of a host")]
    Host(String),
}

/// TLS of a node, in both directions. A cheap handle.
#[derive(Clone)]
pub struct PeerTls {
    current: Arc<Current>,
    provider: Arc<CryptoProvider>,
    client: Arc<ClientConfig>,
}

impl std::fmt::Debug for PeerTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PeerTls").field("files", self.current.files()).finish_non_exhaustive()
    }
}

impl PeerTls {
    /// Reads the files. They are looked at again when a connection begins, at most once a second; files that cannot
    /// be used then are logged once, and the ones before stay.
    ///
    /// # Errors
    /// Names the file that cannot be used.
    pub fn load(files: TlsFiles) -> Result<Self, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let current = Arc::new(Current::load(files, Arc::clone(&provider))?);
        let client = client_config(&current, &provider)?;
        Ok(Self { current, provider, client: Arc::new(client) })
    }

    /// For connections that come in, with the protocols that are served, the preferred one first. To be made once.
    ///
    /// # Errors
    /// When the versions of TLS do not fit the cryptography; does not happen with what this crate brings.
    pub fn server_config(&self, protocols: &[&[u8]]) -> Result<ServerConfig, TlsError> {
        let mut config = ServerConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_safe_default_protocol_versions()
            .map_err(TlsError::Unfit)?
            .with_client_cert_verifier(Arc::new(CheckClient::new(&self.current)))
            .with_cert_resolver(Arc::clone(&self.current) as Arc<dyn rustls::server::ResolvesServerCert>);
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(config)
    }

    /// For HTTP/2 connections to other nodes; shows this node's certificate.
    #[must_use]
    pub fn client_config(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.client)
    }

    /// Looks at the files now.
    ///
    /// # Errors
    /// When they have changed and cannot be used; the ones before stay.
    pub fn reload(&self) -> Result<bool, TlsError> {
        self.current.reload()
    }

    /// Common name of this node's own certificate.
    #[must_use]
    pub fn own_name(&self) -> Option<String> {
        self.current.loaded().own_name.clone()
    }

    /// Makes a connection to `host` secure.
    pub(crate) async fn connect<T>(&self, host: &str, io: T) -> io::Result<TlsStream<T>>
    where
        T: AsyncRead + AsyncWrite + Unpin,
    {
        let name = ServerName::try_from(host.to_owned())
            .map_err(|_| io::Error::other(TlsError::Host(host.to_owned())))?;
        let stream = TlsConnector::from(Arc::clone(&self.client)).connect(name, io).await?;
        if stream.get_ref().1.alpn_protocol() != Some(ALPN_H2) {
            return Err(io::Error::other("the peer does not speak HTTP/2"));
        }
        Ok(stream)
    }

    /// Whether whoever showed a certificate may speak for the node that listens at `host`. With allowed names every
    /// node of the cluster may; with certificates only, the one whose certificate is for that host.
    ///
    /// # Errors
    /// When it may not.
    pub fn may_act_for(&self, identity: Option<&PeerIdentity>, host: &str) -> Result<(), TlsError> {
        let loaded = self.current.loaded();
        if !self.current.client_required() {
            return Ok(());
        }
        let identity = identity.ok_or(TlsError::NoCertificate)?;
        if !loaded.allowed.is_empty() {
            return Ok(());
        }
        let other = || TlsError::OtherHost { host: host.to_owned() };
        let name = ServerName::try_from(host).map_err(|_| TlsError::Host(host.to_owned()))?;
        let cert = ParsedCertificate::try_from(identity.leaf.as_ref()).map_err(|_| other())?;
        rustls::client::verify_server_name(&cert, &name).map_err(|_| other())
    }
}

fn client_config(current: &Arc<Current>, provider: &Arc<CryptoProvider>) -> Result<ClientConfig, TlsError> {
    let mut config = ClientConfig::builder_with_provider(Arc::clone(provider))
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Unfit)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(CheckServer::new(current)))
        .with_client_cert_resolver(Arc::clone(current) as Arc<dyn rustls::client::ResolvesClientCert>);
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    Ok(config)
}

/// Whose connection it is: the certificate that the other side has shown and that was checked. Whoever serves
/// [`MessageService`](super::MessageService) over TLS puts it into the extensions of each request.
#[derive(Clone, Debug)]
pub struct PeerIdentity {
    leaf: Arc<CertificateDer<'static>>,
}

impl PeerIdentity {
    /// What a connection has shown; `None` when it has shown nothing.
    #[must_use]
    pub fn of(connection: &rustls::ServerConnection) -> Option<Self> {
        let leaf = connection.peer_certificates()?.first()?;
        Some(Self { leaf: Arc::new(leaf.clone()) })
    }

    /// Names in the certificate: common names first, then alternative ones.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        names::of(&self.leaf)
    }
}
