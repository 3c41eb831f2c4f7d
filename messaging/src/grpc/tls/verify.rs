//! Whose certificates are accepted: what the authorities vouch for, and of that only allowed names, if there are any.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, SignatureScheme,
};

use super::names;
use super::reload::{Current, Loaded};

/// A certificate that is good, of somebody who is not let in.
#[derive(Debug, thiserror::Error)]
#[error("none of the names {0:?} of the certificate is among the allowed ones")]
struct Stranger(Vec<String>);

/// Only the certificate of the peer itself counts, not those that vouch for it: an authority whose name is allowed
/// must not let in all that it has signed.
fn check_names(loaded: &Loaded, leaf: &CertificateDer<'_>) -> Result<(), Error> {
    if loaded.allowed.is_empty() {
        return Ok(());
    }
    let names = names::of(leaf);
    if names.iter().any(|name| loaded.allowed.contains(name)) {
        return Ok(());
    }
    let stranger = CertificateError::Other(OtherError(Arc::new(Stranger(names))));
    Err(Error::InvalidCertificate(stranger))
}

macro_rules! signatures {
    ($which:ident) => {
        fn verify_tls12_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            signed: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            self.current.loaded().$which.verify_tls12_signature(message, cert, signed)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            signed: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            self.current.loaded().$which.verify_tls13_signature(message, cert, signed)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.current.provider().signature_verification_algorithms.supported_schemes()
        }
    };
}

/// Checks who connects.
#[derive(Debug)]
pub(super) struct CheckClient {
    current: Arc<Current>,
}

impl CheckClient {
    pub(super) fn new(current: &Arc<Current>) -> Self {
        Self { current: Arc::clone(current) }
    }
}

impl ClientCertVerifier for CheckClient {
    fn client_auth_mandatory(&self) -> bool {
        self.current.client_required()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // Authorities may change while this lives; a client has one certificate and shows it.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let loaded = self.current.loaded();
        let verified = loaded.clients.verify_client_cert(end_entity, intermediates, now)?;
        check_names(&loaded, end_entity)?;
        Ok(verified)
    }

    signatures!(clients);
}

/// Checks who is connected to.
#[derive(Debug)]
pub(super) struct CheckServer {
    current: Arc<Current>,
}

impl CheckServer {
    pub(super) fn new(current: &Arc<Current>) -> Self {
        Self { current: Arc::clone(current) }
    }
}

impl ServerCertVerifier for CheckServer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let loaded = self.current.loaded();
        let verified =
            loaded.servers.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)?;
        check_names(&loaded, end_entity)?;
        Ok(verified)
    }

    signatures!(servers);
}
