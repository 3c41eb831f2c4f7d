//! The port as clients find it: protocols, certificates, limits and the end.

use std::path::Path;

use axum::routing::{get, post};
use http_body_util::BodyExt as _;
use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::HttpConnector;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType};
use tokio::io::AsyncWriteExt as _;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;

use super::*;
use crate::tls::TlsFiles;

struct Port {
    address: SocketAddr,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Port {
    async fn open(change: impl FnOnce(&mut Server)) -> Self {
        let http = Router::new().route("/", get(async || "people")).route(
            "/slow",
            get(async || {
                tokio::time::sleep(Duration::from_millis(300)).await;
                "slow"
            }),
        );
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut server = Server::new(listener, http);
        server.grpc = Some(Router::new().route("/", post(async || "nodes")));
        change(&mut server);
        let stop = CancellationToken::new();
        let task = tokio::spawn(server.run(stop.clone()));
        Self { address, stop, task }
    }

    async fn close(self) {
        self.stop.cancel();
        self.task.await.unwrap();
    }
}

async fn read_all(stream: &mut (impl AsyncRead + Unpin)) -> String {
    let mut text = Vec::new();
    // A connection that is cut ends what was read.
    let _ = stream.read_to_end(&mut text).await;
    String::from_utf8_lossy(&text).into_owned()
}

const GET: &[u8] = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";

#[tokio::test]
async fn one_port_serves_http_1_and_grpc_by_what_a_connection_begins_with() {
    let port = Port::open(|_| {}).await;
    // Byte by byte: the preface of HTTP/2 begins as a POST, a PUT or a PATCH does.
    let mut stream = TcpStream::connect(port.address).await.unwrap();
    for byte in b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" {
        stream.write_all(&[*byte]).await.unwrap();
        stream.flush().await.unwrap();
    }
    assert!(read_all(&mut stream).await.starts_with("HTTP/1.1 405"));
    let mut stream = TcpStream::connect(port.address).await.unwrap();
    stream.write_all(GET).await.unwrap();
    assert!(read_all(&mut stream).await.ends_with("people"));

    let client: HttpClient<HttpConnector, Body> =
        HttpClient::builder(TokioExecutor::new()).http2_only(true).build_http();
    for (kind, method, expected) in [
        ("application/grpc", "POST", "nodes"),
        ("application/grpc+proto", "POST", "nodes"),
        ("text/plain", "GET", "people"),
    ] {
        let request = Request::builder()
            .method(method)
            .uri(format!("http://{}/", port.address))
            .header("content-type", kind)
            .body(Body::empty())
            .unwrap();
        let answer = client.request(request).await.unwrap();
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(body, expected, "{kind}");
    }
    drop(client);
    port.close().await;
}

#[tokio::test]
async fn connections_over_the_limit_wait_for_a_place_and_idle_ones_lose_theirs() {
    let port = Port::open(|server| {
        server.limits.http_connections = 1;
        server.limits.idle = Duration::from_millis(400);
    })
    .await;
    let mut first = TcpStream::connect(port.address).await.unwrap();
    first.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    let mut byte = [0];
    first.read_exact(&mut byte).await.unwrap();
    // The first connection has the only place, and says nothing more.
    let began = Instant::now();
    let mut second = TcpStream::connect(port.address).await.unwrap();
    second.write_all(GET).await.unwrap();
    assert!(read_all(&mut second).await.ends_with("people"));
    assert!(began.elapsed() >= Duration::from_millis(300), "it waited: {:?}", began.elapsed());
    assert!(read_all(&mut first).await.ends_with("people"));
    port.close().await;
}

#[tokio::test]
async fn a_stop_lets_the_present_request_end_and_cuts_what_does_not() {
    let port = Port::open(|server| server.limits.close = Duration::from_secs(20)).await;
    let mut slow = TcpStream::connect(port.address).await.unwrap();
    slow.write_all(b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    let mut silent = TcpStream::connect(port.address).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let began = Instant::now();
    port.close().await;
    assert!(began.elapsed() < Duration::from_secs(10), "nobody waits for connections without a request");
    assert!(read_all(&mut slow).await.ends_with("slow"));
    assert_eq!(read_all(&mut silent).await, "");

    let port = Port::open(|server| server.limits.close = Duration::from_millis(50)).await;
    let mut slow = TcpStream::connect(port.address).await.unwrap();
    slow.write_all(b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    port.close().await;
    assert_eq!(read_all(&mut slow).await, "", "it was cut");
}

/// Certificates of one authority, as files.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new(dir: &Path) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "authority");
        let key = KeyPair::generate().unwrap();
        let cert = params.self_signed(&key).unwrap();
        std::fs::write(dir.join("ca.pem"), cert.pem()).unwrap();
        Self { issuer: Issuer::new(params, key) }
    }

    fn issue(&self, dir: &Path, file: &str, name: &str) {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.subject_alt_names.push(SanType::IpAddress("127.0.0.1".parse().unwrap()));
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        std::fs::write(dir.join(format!("{file}.key")), key.serialize_pem()).unwrap();
        std::fs::write(dir.join(format!("{file}.pem")), cert.pem()).unwrap();
    }
}

fn files(dir: &Path, name: &str) -> TlsFiles {
    TlsFiles {
        ca: dir.join("ca.pem"),
        cert: dir.join(format!("{name}.pem")),
        key: dir.join(format!("{name}.key")),
        allowed_names: Vec::new(),
        client_required: false,
    }
}

async fn ask(
    address: SocketAddr,
    client: Arc<rustls::ClientConfig>,
) -> std::io::Result<(String, Option<String>)> {
    let stream = TcpStream::connect(address).await?;
    let name = rustls::pki_types::ServerName::from(address.ip());
    let mut stream = TlsConnector::from(client).connect(name, stream).await?;
    stream.write_all(GET).await?;
    let shown = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first()).map(|cert| {
        let (_, cert) = x509_parser::parse_x509_certificate(cert).unwrap();
        cert.subject().to_string()
    });
    let mut text = Vec::new();
    stream.read_to_end(&mut text).await?;
    Ok((String::from_utf8_lossy(&text).into_owned(), shown))
}

#[tokio::test]
async fn certificates_are_checked_in_both_directions_and_changed_while_serving() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path());
    for name in ["server", "friend", "stranger"] {
        authority.issue(dir.path(), name, name);
    }
    let tls = Tls::load(TlsFiles {
        allowed_names: vec!["friend".to_owned()],
        client_required: true,
        ..files(dir.path(), "server")
    })
    .unwrap();
    assert_eq!(tls.peers().own_name().as_deref(), Some("server"));
    let served = Arc::clone(&tls);
    let port = Port::open(|server| server.tls = Some(served)).await;

    let of = |name: &str| Tls::load(files(dir.path(), name)).unwrap().client();
    // The own name is allowed too: nodes of a cluster may share a certificate.
    for name in ["friend", "server"] {
        let (answer, shown) = ask(port.address, of(name)).await.unwrap();
        assert!(answer.ends_with("people"), "{name}: {answer}");
        assert_eq!(shown.as_deref(), Some("CN=server"));
    }
    ask(port.address, of("stranger")).await.unwrap_err();
    let ca = dir.path().join("ca.pem");
    ask(port.address, crate::tls::client(Some(&ca), None).unwrap()).await.unwrap_err();
    let own = (dir.path().join("friend.pem"), dir.path().join("friend.key"));
    let person = crate::tls::client(Some(&ca), Some((&own.0, &own.1))).unwrap();
    assert!(ask(port.address, person).await.unwrap().0.ends_with("people"));
    let mut clear = TcpStream::connect(port.address).await.unwrap();
    clear.write_all(GET).await.unwrap();
    assert!(!read_all(&mut clear).await.contains("people"));

    // Nothing changed; then the files are half written; then they are right.
    assert!(!tls.peers().reload().unwrap());
    let (cert, key) = (dir.path().join("server.pem"), dir.path().join("server.key"));
    let old = std::fs::read(&cert).unwrap();
    std::fs::write(&cert, "-----BEGIN CERTIFICATE-----\n").unwrap();
    assert!(tls.peers().reload().unwrap_err().to_string().contains("server.pem"));
    assert!(ask(port.address, of("friend")).await.unwrap().0.ends_with("people"), "the old one stays in use");
    std::fs::write(&cert, old).unwrap();
    authority.issue(dir.path(), "renewed", "renewed");
    std::fs::copy(dir.path().join("renewed.key"), key).unwrap();
    std::fs::copy(dir.path().join("renewed.pem"), cert).unwrap();
    assert!(tls.peers().reload().unwrap());
    let (answer, shown) = ask(port.address, of("friend")).await.unwrap();
    assert!(answer.ends_with("people") && shown.as_deref() == Some("CN=renewed"), "{shown:?}");
    port.close().await;
}

#[test]
fn certificates_that_cannot_be_used_are_named() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path());
    authority.issue(dir.path(), "a", "a");
    authority.issue(dir.path(), "b", "b");
    let right = files(dir.path(), "a");
    std::fs::write(dir.path().join("empty"), "").unwrap();
    let cases = [
        (TlsFiles { ca: dir.path().join("none"), ..right.clone() }, "the CA file"),
        (TlsFiles { ca: dir.path().join("empty"), ..right.clone() }, "no certificate"),
        (TlsFiles { cert: dir.path().join("empty"), ..right.clone() }, "the certificate"),
        (TlsFiles { key: dir.path().join("a.pem"), ..right.clone() }, "the private key"),
        (TlsFiles { key: dir.path().join("b.key"), ..right.clone() }, "do not fit"),
    ];
    for (files, words) in cases {
        let error = Tls::load(files).unwrap_err().to_string();
        assert!(error.contains(words), "{words}: {error}");
    }
    Tls::load(right).unwrap();
}
