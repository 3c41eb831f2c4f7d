//! Who may connect when certificates decide.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use messaging::grpc::tls::{ALPN_H2, PeerTls, TlsError, TlsFiles};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::sleep;
use tokio_rustls::TlsConnector;

use crate::support::{List, Node, connected, listen, next};

/// Signs certificates.
struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    dir: TempDir,
}

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let dir = TempDir::new().unwrap();
        std::fs::write(dir.path().join("ca.pem"), issuer.pem()).unwrap();
        Self { issuer, dir }
    }

    fn ca(&self) -> PathBuf {
        self.dir.path().join("ca.pem")
    }

    /// Writes a certificate and its key under a file name.
    fn issue(&self, file: &str, common_name: &str, hosts: &[&str]) -> TlsFiles {
        let hosts: Vec<_> = hosts.iter().map(|host| (*host).to_owned()).collect();
        let mut params = CertificateParams::new(hosts).unwrap();
        params.distinguished_name.push(DnType::CommonName, common_name);
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        let files = TlsFiles {
            ca: self.ca(),
            cert: self.dir.path().join(format!("{file}.crt")),
            key: self.dir.path().join(format!("{file}.key")),
            allowed_names: Vec::new(),
            client_required: false,
        };
        std::fs::write(&files.cert, cert.pem()).unwrap();
        std::fs::write(&files.key, key.serialize_pem()).unwrap();
        files
    }
}

/// Where the dialling node says that it is; nobody dials it.
const DIALLER: &str = "0.0.0.0";
const HOSTS: &[&str] = &[DIALLER, "127.0.0.1"];

struct Pair {
    a: Node,
    b: Node,
}

/// Two nodes with certificates; `a` dials.
async fn pair(a: Option<TlsFiles>, b: Option<TlsFiles>) -> Pair {
    let load = |files: Option<TlsFiles>| files.map(|files| PeerTls::load(files).unwrap());
    let (nowhere, _) = listen().await;
    let a = Node::on("a", nowhere, &format!("{DIALLER}:1"), load(a));
    let (listener, address) = listen().await;
    let b = Node::on("b", listener, &address, load(b));
    let list = List::from([
        (a.id.clone(), a.address.clone()),
        (b.id.clone(), format!("{}{address}", if b.tls { "https://" } else { "" })),
    ]);
    a.knows(&list);
    b.knows(&list);
    Pair { a, b }
}

impl Pair {
    async fn connects(&self) {
        connected(&[&self.a, &self.b]).await;
        let mut inbox = self.a.inbox(4);
        self.b.command(&self.a.id, 7).unwrap();
        assert_eq!(next(&mut inbox).await, ("b".to_owned(), 7));
    }

    async fn stays_apart(&self) {
        // Several attempts, each of which is refused within milliseconds.
        for _ in 0..60 {
            sleep(Duration::from_millis(20)).await;
            for (one, other) in [(&self.a, &self.b), (&self.b, &self.a)] {
                let sessions = one.peer(&other.id).map(|peer| (peer.event.sessions, peer.command.sessions));
                assert_eq!(sessions, Some((0, 0)), "{} talks to {}", one.id, other.id);
            }
        }
    }
}

fn mutual(files: TlsFiles) -> TlsFiles {
    TlsFiles { client_required: true, ..files }
}

fn allowing(names: &[&str], files: TlsFiles) -> TlsFiles {
    TlsFiles { allowed_names: names.iter().map(|name| (*name).to_owned()).collect(), ..files }
}

// behaviour: messaging-18
#[tokio::test]
async fn with_tls_on_both_sides_nodes_connect_and_with_tls_on_one_they_do_not() {
    let authority = Authority::new("the authority");
    let (a, b) = (authority.issue("a", "node a", HOSTS), authority.issue("b", "node b", HOSTS));
    pair(Some(a.clone()), Some(b.clone())).await.connects().await;
    pair(Some(a), None).await.stays_apart().await;
    pair(None, Some(b)).await.stays_apart().await;
}

// behaviour: messaging-18
#[tokio::test]
async fn the_certificate_of_the_accepting_side_must_be_for_its_host_and_of_the_authority() {
    let (authority, other) = (Authority::new("the authority"), Authority::new("another one"));
    let a = authority.issue("a", "node a", HOSTS);
    let elsewhere = authority.issue("b", "node b", &["elsewhere.example"]);
    pair(Some(a.clone()), Some(elsewhere)).await.stays_apart().await;
    let strange = other.issue("b", "node b", HOSTS);
    pair(Some(a), Some(strange)).await.stays_apart().await;
}

// behaviour: messaging-18
#[tokio::test]
async fn with_mutual_tls_the_dialling_side_must_show_a_certificate_of_the_authority_for_its_own_host() {
    let (authority, other) = (Authority::new("the authority"), Authority::new("another one"));
    let b = mutual(authority.issue("b", "node b", HOSTS));
    let a = authority.issue("a", "node a", HOSTS);
    pair(Some(a), Some(b.clone())).await.connects().await;
    let strange = TlsFiles { ca: authority.ca(), ..other.issue("a", "node a", HOSTS) };
    pair(Some(strange), Some(b.clone())).await.stays_apart().await;
    // A good certificate, but of somebody else: it cannot speak for this peer.
    let thief = authority.issue("thief", "node c", &["other.example"]);
    pair(Some(thief), Some(b)).await.stays_apart().await;
}

// behaviour: messaging-18
#[tokio::test]
async fn allowed_names_are_those_of_the_peers_own_certificate_on_both_sides() {
    let authority = Authority::new("the authority");
    let (a, b) = (authority.issue("a", "node a", HOSTS), authority.issue("b", "node b", HOSTS));
    let with_uri = authority.issue("c", "node c", &[DIALLER, "127.0.0.1", "millrace.cluster.example"]);
    let apart = [
        (a.clone(), allowing(&["node c"], b.clone())),
        // Whoever vouches for a certificate does not count.
        (a.clone(), allowing(&["the authority"], b.clone())),
        // The dialling side checks as well.
        (allowing(&["node c"], a.clone()), b.clone()),
    ];
    for (a, b) in apart {
        pair(Some(a), Some(b)).await.stays_apart().await;
    }
    let together = [
        (a.clone(), allowing(&[" node a "], b.clone())),
        (with_uri, allowing(&["millrace.cluster.example"], b.clone())),
        // The own name is always allowed: nodes may share a certificate.
        (b.clone(), allowing(&["somebody"], b.clone())),
        (allowing(&["node b"], a.clone()), b.clone()),
        // Spaces are no names.
        (a, allowing(&["", "  "], b)),
    ];
    for (a, b) in together {
        pair(Some(a), Some(b)).await.connects().await;
    }
}

/// The names of the certificate that a server shows, as seen by a client without one; and whether the server goes on.
async fn look_at(address: &str, authority: &Authority) -> (Vec<u8>, bool) {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(authority.issuer.der().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    let stream = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let mut stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap();
    let leaf: &CertificateDer<'_> = &stream.get_ref().1.peer_certificates().unwrap()[0];
    let leaf = leaf.to_vec();
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let goes_on = stream.read(&mut [0; 64]).await.is_ok_and(|count| count > 0);
    (leaf, goes_on)
}

// behaviour: messaging-18
#[tokio::test]
async fn a_client_without_a_certificate_is_served_only_where_none_is_required() {
    let authority = Authority::new("the authority");
    let files = authority.issue("b", "node b", HOSTS);
    for (files, expected) in
        [(files.clone(), true), (mutual(files.clone()), false), (allowing(&["node a"], files), false)]
    {
        let pair = pair(None, Some(files)).await;
        assert_eq!(look_at(&pair.b.listens, &authority).await.1, expected);
    }
}

// behaviour: messaging-18
#[tokio::test]
async fn a_renewed_certificate_is_used_for_new_connections_and_a_bad_one_is_not() {
    let authority = Authority::new("the authority");
    let (a, b) = (authority.issue("a", "node a", HOSTS), authority.issue("b", "node b", HOSTS));
    let pair = pair(Some(mutual(a)), Some(mutual(b.clone()))).await;
    pair.connects().await;
    let open = TlsFiles { client_required: false, ..b.clone() };
    let tls = PeerTls::load(open.clone()).unwrap();
    let (listener, address) = listen().await;
    let _server = Node::on("server", listener, &address, Some(tls.clone()));
    let (before, _) = look_at(&address, &authority).await;

    std::fs::write(&b.cert, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").unwrap();
    let error = tls.reload().unwrap_err();
    assert!(matches!(&error, TlsError::File { .. } | TlsError::Unfit(_)), "{error}");
    assert!(!tls.reload().unwrap(), "what cannot be used is looked at once");
    let (meanwhile, goes_on) = look_at(&address, &authority).await;
    assert!(goes_on && meanwhile == before, "the one before stays");

    // The key of another certificate, as in the moment when only one of two files was replaced.
    let other = authority.issue("other", "node b", HOSTS);
    std::fs::copy(&other.cert, &b.cert).unwrap();
    assert!(matches!(tls.reload().unwrap_err(), TlsError::Unfit(_)));
    std::fs::copy(&other.key, &b.key).unwrap();
    // Nobody reloads: a connection that begins looks at the files, at most once a second.
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    let renewed = CertificateDer::from_pem_file(&b.cert).unwrap();
    loop {
        let (shown, goes_on) = look_at(&address, &authority).await;
        assert!(goes_on);
        if shown != before {
            assert_eq!(shown, renewed.to_vec());
            break;
        }
        assert!(tokio::time::Instant::now() < deadline, "the renewed certificate is not used");
        sleep(Duration::from_millis(100)).await;
    }
    // The connection of before has gone on all the time.
    assert_eq!(
        pair.a.peer(&pair.b.id).map(|peer| (peer.command.sessions, peer.command.ready)),
        Some((1, true))
    );
}

#[test]
fn files_that_cannot_be_used_are_named() {
    let authority = Authority::new("the authority");
    let good = authority.issue("a", "node a", HOSTS);
    let missing = PathBuf::from("/nowhere/file.pem");
    for files in [
        TlsFiles { ca: missing.clone(), ..good.clone() },
        TlsFiles { cert: missing.clone(), ..good.clone() },
        TlsFiles { key: missing, ..good.clone() },
    ] {
        let error = PeerTls::load(files).unwrap_err();
        assert!(error.to_string().contains("\"/nowhere/file.pem\" cannot be used"), "{error}");
    }
    let swapped = TlsFiles { cert: good.key.clone(), key: good.cert.clone(), ..good };
    let error = PeerTls::load(swapped).unwrap_err();
    assert!(matches!(error, TlsError::File { .. }), "{error}");
}
