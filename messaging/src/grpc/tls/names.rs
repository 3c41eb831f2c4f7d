//! The names inside a certificate.

use std::net::{Ipv4Addr, Ipv6Addr};

use rustls::pki_types::CertificateDer;
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

/// Common names, then alternative names: hosts, addresses, URIs. None of a certificate that cannot be read.
pub(super) fn of(cert: &CertificateDer<'_>) -> Vec<String> {
    let Ok((_, cert)) = X509Certificate::from_der(cert) else { return Vec::new() };
    let mut names = common(&cert);
    if let Ok(Some(alternatives)) = cert.subject_alternative_name() {
        names.extend(alternatives.value.general_names.iter().filter_map(alternative));
    }
    names
}

/// The first common name.
pub(super) fn own(cert: &CertificateDer<'_>) -> Option<String> {
    let (_, cert) = X509Certificate::from_der(cert).ok()?;
    common(&cert).into_iter().next()
}

fn common(cert: &X509Certificate<'_>) -> Vec<String> {
    let names = cert.subject().iter_common_name().filter_map(|name| name.as_str().ok());
    names.map(str::to_owned).collect()
}

#[expect(clippy::wildcard_enum_match_arm, reason = "other kinds of names name no node")]
fn alternative(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) | GeneralName::URI(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => match bytes.len() {
            4 => <[u8; 4]>::try_from(*bytes).ok().map(|bytes| Ipv4Addr::from(bytes).to_string()),
            16 => <[u8; 16]>::try_from(*bytes).ok().map(|bytes| Ipv6Addr::from(bytes).to_string()),
            _ => None,
        },
        _ => None,
    }
}
