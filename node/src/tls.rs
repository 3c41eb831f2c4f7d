//! Certificates: those of a node, for what it serves and what it calls, and those of a person at the command line.

use std::path::Path;
use std::sync::Arc;

use messaging::grpc::tls::{ALPN_H2, ALPN_HTTP1, PeerTls};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore, ServerConfig};

pub use messaging::grpc::tls::{TlsError, TlsFiles};

/// TLS of a node: HTTP and the bus on one port, and calls to other nodes. Files that change are read anew by themselves.
pub struct Tls {
    peers: PeerTls,
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tls").field("peers", &self.peers).finish_non_exhaustive()
    }
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// Names the file that cannot be used.
    pub fn load(files: TlsFiles) -> Result<Arc<Self>, TlsError> {
        let peers = PeerTls::load(files)?;
        let server = Arc::new(peers.server_config(&[ALPN_H2, ALPN_HTTP1])?);
        let mut client = (*peers.client_config()).clone();
        client.alpn_protocols = vec![ALPN_HTTP1.to_vec()];
        Ok(Arc::new(Self { peers, server, client: Arc::new(client) }))
    }

    /// For the bus.
    #[must_use]
    pub fn peers(&self) -> &PeerTls {
        &self.peers
    }

    /// For connections that come in.
    #[must_use]
    pub fn server(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.server)
    }

    /// For HTTP/1 requests to other nodes; shows this node's certificate.
    #[must_use]
    pub fn client(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.client)
    }
}

/// TLS of a person: the authorities of a file, or the usual ones of the web, and a certificate with its key.
///
/// # Errors
/// Names the file that cannot be used.
pub(crate) fn client(ca: Option<&Path>, own: Option<(&Path, &Path)>) -> Result<Arc<ClientConfig>, TlsError> {
    let roots = match ca {
        None => RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() },
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for cert in chain("the CA file", path)? {
                roots.add(cert).map_err(|error| unusable("the CA file", path, error.to_string()))?;
            }
            roots
        }
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Unfit)?
        .with_root_certificates(roots);
    let mut config = match own {
        None => config.with_no_client_auth(),
        Some((cert, key)) => {
            let chain = chain("the certificate", cert)?;
            let key = PrivateKeyDer::from_pem_file(key)
                .map_err(|error| unusable("the private key", key, error.to_string()))?;
            config.with_client_auth_cert(chain, key).map_err(TlsError::Unfit)?
        }
    };
    config.alpn_protocols = vec![ALPN_HTTP1.to_vec()];
    Ok(Arc::new(config))
}

fn chain(what: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let failed = |error: rustls::pki_types::pem::Error| unusable(what, path, error.to_string());
    let chain: Vec<_> =
        CertificateDer::pem_file_iter(path).map_err(failed)?.collect::<Result<_, _>>().map_err(failed)?;
    if chain.is_empty() {
        return Err(unusable(what, path, "it holds no certificate".to_owned()));
    }
    Ok(chain)
}

fn unusable(what: &'static str, path: &Path, why: String) -> TlsError {
    TlsError::File { what, path: path.to_owned(), why }
}
