//! What the files hold now.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{ClientHello, ResolvesServerCert, VerifierBuilderError, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{RootCertStore, SignatureScheme};

use super::{TlsError, TlsFiles, names};

/// Between two looks at the files.
const LOOK: Duration = Duration::from_secs(1);

/// What one reading of the files gave; everything in it fits together.
pub(super) struct Loaded {
    pub(super) key: Arc<CertifiedKey>,
    pub(super) servers: Arc<dyn ServerCertVerifier>,
    pub(super) clients: Arc<dyn ClientCertVerifier>,
    /// Whose certificates are accepted; everybody's when empty.
    pub(super) allowed: Vec<String>,
    pub(super) own_name: Option<String>,
}

/// Change time, size and inode of a file: a renewed one differs in one of them.
type Stamp = Option<(Option<SystemTime>, u64, u64)>;

/// The newest usable content of the files.
pub(super) struct Current {
    files: TlsFiles,
    provider: Arc<CryptoProvider>,
    loaded: ArcSwap<Loaded>,
    seen: Mutex<Seen>,
}

struct Seen {
    stamps: [Stamp; 3],
    at: Instant,
}

impl std::fmt::Debug for Current {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Current").field("files", &self.files).finish_non_exhaustive()
    }
}

impl Current {
    pub(super) fn load(files: TlsFiles, provider: Arc<CryptoProvider>) -> Result<Self, TlsError> {
        // Stamps first: a change while the files are read is noticed by the next look.
        let seen = Mutex::new(Seen { stamps: stamps(&files), at: Instant::now() });
        let loaded = ArcSwap::from_pointee(Loaded::read(&files, &provider)?);
        Ok(Self { files, provider, loaded, seen })
    }

    pub(super) fn files(&self) -> &TlsFiles {
        &self.files
    }

    /// Whether who connects must show a certificate.
    pub(super) fn client_required(&self) -> bool {
        self.files.client_required || !self.loaded.load().allowed.is_empty()
    }

    pub(super) fn provider(&self) -> &CryptoProvider {
        &self.provider
    }

    /// What is in use.
    pub(super) fn loaded(&self) -> Arc<Loaded> {
        self.loaded.load_full()
    }

    /// What a new connection uses: looks at the files first, if that was not done just now.
    pub(super) fn fresh(&self) -> Arc<Loaded> {
        let due = self.seen.try_lock().is_some_and(|seen| seen.at.elapsed() >= LOOK);
        if due {
            match self.reload() {
                Ok(true) => tracing::info!(cert = %self.files.cert.display(), "new certificates are in use"),
                Ok(false) => {}
                Err(error) => {
                    let cause = std::error::Error::source(&error).map(ToString::to_string);
                    tracing::error!(%error, cause, "new certificates cannot be used; the ones before stay");
                }
            }
        }
        self.loaded()
    }

    /// Reads the files if they have changed. Files that cannot be used are not read again until they change.
    pub(super) fn reload(&self) -> Result<bool, TlsError> {
        let mut seen = self.seen.lock();
        let now = stamps(&self.files);
        seen.at = Instant::now();
        if seen.stamps == now {
            return Ok(false);
        }
        seen.stamps = now;
        self.loaded.store(Arc::new(Loaded::read(&self.files, &self.provider)?));
        Ok(true)
    }
}

impl ResolvesServerCert for Current {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.fresh().key))
    }
}

impl rustls::client::ResolvesClientCert for Current {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.fresh().key))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

fn stamps(files: &TlsFiles) -> [Stamp; 3] {
    [&files.ca, &files.cert, &files.key].map(|path| {
        let data = std::fs::metadata(path).ok()?;
        Some((data.modified().ok(), data.len(), inode(&data)))
    })
}

#[cfg(unix)]
fn inode(data: &std::fs::Metadata) -> u64 {
    std::os::unix::fs::MetadataExt::ino(data)
}

#[cfg(not(unix))]
fn inode(_: &std::fs::Metadata) -> u64 {
    0
}

impl Loaded {
    fn read(files: &TlsFiles, provider: &Arc<CryptoProvider>) -> Result<Self, TlsError> {
        let roots = Arc::new(read_roots(&files.ca)?);
        let chain = read_chain("the certificate", &files.cert)?;
        let key = PrivateKeyDer::from_pem_file(&files.key)
            .map_err(|error| file("the private key", &files.key, &error))?;
        let own_name = chain.first().and_then(names::own);
        let mut allowed: Vec<_> = files
            .allowed_names
            .iter()
            .map(|name| name.trim().to_owned())
            .filter(|name| !name.is_empty())
            .collect();
        let restricted = !allowed.is_empty();
        if restricted {
            allowed.extend(own_name.clone());
        }
        // Says also when the key is not that of the certificate.
        let key = CertifiedKey::from_der(chain, key, provider).map_err(TlsError::Unfit)?;
        let unusable = |error: VerifierBuilderError| file("the CA file", &files.ca, &error);
        let servers = WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(provider))
            .build()
            .map_err(unusable)?;
        let clients = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(provider));
        let required = files.client_required || restricted;
        let clients = if required { clients } else { clients.allow_unauthenticated() };
        let clients = clients.build().map_err(unusable)?;
        Ok(Self { key: Arc::new(key), servers, clients, allowed, own_name })
    }
}

fn read_roots(path: &Path) -> Result<RootCertStore, TlsError> {
    let what = "the CA file";
    let mut roots = RootCertStore::empty();
    for cert in read_chain(what, path)? {
        roots.add(cert).map_err(|error| file(what, path, &error))?;
    }
    Ok(roots)
}

fn read_chain(what: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let chain: Vec<_> = CertificateDer::pem_file_iter(path)
        .and_then(|certs| certs.collect())
        .map_err(|error| file(what, path, &error))?;
    if chain.is_empty() {
        let why = "it holds no certificate".to_owned();
        return Err(TlsError::File { what, path: path.to_owned(), why });
    }
    Ok(chain)
}

fn file(what: &'static str, path: &Path, error: &dyn std::error::Error) -> TlsError {
    TlsError::File { what, path: path.to_owned(), why: error.to_string() }
}
