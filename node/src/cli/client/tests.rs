//! What the client sends, and what it makes of the answers.

use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use super::*;

#[test]
// behaviour: api-L-2
fn an_address_has_a_host_and_no_path_and_a_password_stays_out_of_it() {
    let tls = || {
        let login = Some(("ann".to_owned(), "s3cr3t".to_owned()));
        Credentials { login, tls: Some(crate::tls::client(None, None).unwrap()) }
    };
    for (server, credentials, base, address) in [
        ("http://h:1", Credentials::default(), "http://h:1", "h:1"),
        ("http://h:1/", Credentials::default(), "http://h:1", "h:1"),
        ("h:1", Credentials::default(), "http://h:1", "h:1"),
        ("h", Credentials::default(), "http://h", "h:80"),
        ("[::1]:1", Credentials::default(), "http://[::1]:1", "[::1]:1"),
        ("h:1", tls(), "https://h:1", "h:1"),
        ("https://h", tls(), "https://h", "h:443"),
    ] {
        let client = Client::with(server, credentials).unwrap();
        assert_eq!((client.base.as_str(), client.address.as_str()), (base, address), "{server}");
    }
    for bad in [
        "",
        "http://",
        "http://h/a",
        "http://h?a=b",
        "ftp://h",
        "https://h",
        "u:s3cr3t@h:1",
        "http://u:s3cr3t@h",
    ] {
        let error = Client::new(bad).unwrap_err().to_string();
        assert!(error.contains("not a server address") && !error.contains("s3cr3t"), "{bad}: {error}");
    }
    assert_eq!((major("v1.2.3"), major("10.0"), major("")), (Some(1), Some(10), None));
    let client = Client::with("h", tls()).unwrap();
    assert_eq!(client.authorization.as_ref().unwrap(), "Basic YW5uOnMzY3IzdA==");
    assert!(!format!("{client:?} {:?}", client.authorization).contains("YW5u"), "it is not printed");
}

/// A server that answers one request with this text, and tells what it was asked. Without an answer it says nothing.
async fn server(answer: Option<&str>) -> (String, JoinHandle<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let answer = answer.map(str::to_owned);
    let asked = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let (mut seen, mut buffer) = (Vec::new(), [0; 4096]);
        loop {
            let count = stream.read(&mut buffer).await.unwrap();
            seen.extend_from_slice(&buffer[..count]);
            let text = String::from_utf8_lossy(&seen).to_ascii_lowercase();
            let length = text.split("content-length: ").nth(1).and_then(|rest| rest.split("\r\n").next());
            let length: usize = length.map_or(0, |length| length.parse().unwrap());
            if text.split_once("\r\n\r\n").is_some_and(|(_, body)| body.len() >= length) || count == 0 {
                break;
            }
        }
        match answer {
            Some(answer) => stream.write_all(answer.as_bytes()).await.unwrap(),
            None => std::future::pending().await,
        }
        String::from_utf8(seen).unwrap()
    });
    (address, asked)
}

fn answer(status: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
    )
}

#[tokio::test]
// behaviour: api-L-1
async fn method_path_body_and_headers_are_as_asked() {
    let login = Some(("ann".to_owned(), "s3cr3t".to_owned()));
    for (method, path, body) in [
        ("GET", "/api/v2/changefeeds?state=all&limit=2", None),
        ("DELETE", "/api/v2/changefeeds/f", None),
        ("POST", "/api/v2/changefeeds/f/move_table?tableID=1&wait=false", Some(json!({ "a": "ü\"" }))),
        ("PUT", "/api/v2/captures/n/drain", Some(json!({}))),
    ] {
        let (address, asked) = server(Some(&answer("200 OK", r#"{"done":1}"#))).await;
        let credentials = Credentials { login: login.clone(), tls: None };
        let client = Client::with(&format!("http://{address}/"), credentials).unwrap();
        let result = match (method, &body) {
            ("GET", _) => client.get(path).await,
            ("DELETE", _) => client.delete(path).await,
            ("PUT", Some(body)) => client.put(path, body).await,
            (_, body) => client.post(path, body.as_ref().unwrap()).await,
        };
        assert_eq!(result.unwrap(), json!({ "done": 1 }));
        let asked = asked.await.unwrap();
        let (head, sent) = asked.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with(&format!("{method} {path} HTTP/1.1\r\n")), "{head}");
        let lower = head.to_ascii_lowercase();
        for header in [
            format!("host: {address}"),
            "content-type: application/json".to_owned(),
            "accept: application/json".to_owned(),
            format!("x-client-version: {}", env!("CARGO_PKG_VERSION")),
            "authorization: basic yw5uonmzy3izda==".to_owned(),
        ] {
            assert!(lower.contains(&header), "{header}: {head}");
        }
        assert!(!head.contains("s3cr3t"), "{head}");
        assert_eq!(sent, body.map_or_else(String::new, |body| body.to_string()));
    }
}

#[tokio::test]
// behaviour: api-L-1
async fn an_error_has_the_servers_code_and_words_and_an_answer_without_a_body_its_status() {
    let refused = async |answer: &str| {
        let (address, _asked) = server(Some(answer)).await;
        match Client::new(&address).unwrap().get("/a").await {
            Err(ApiError::Refused { status, code, message }) => (status, code, message),
            other => panic!("{other:?}"),
        }
    };
    let body = r#"{"error_msg":"[CDC:ErrX]no","error_code":"CDC:ErrX"}"#;
    let told = refused(&answer("400 Bad Request", body)).await;
    assert_eq!(told, (400, "CDC:ErrX".to_owned(), "[CDC:ErrX]no".to_owned()));
    for body in ["", "<html>", "[]", r#"{"error_msg":7}"#] {
        let (status, code, message) = refused(&answer("502 Bad Gateway", body)).await;
        assert!(status == 502 && code.is_empty() && message.contains("502"), "{body:?}: {message}");
    }
    for (body, words) in [("", "an empty answer"), ("<html>", "not JSON")] {
        let (status, _, message) = refused(&answer("200 OK", body)).await;
        assert!(status == 200 && message.contains(words) && message.contains("200"), "{body:?}: {message}");
    }
    let (address, _asked) = server(Some(&answer("202 Accepted", "null"))).await;
    assert_eq!(Client::new(&address).unwrap().get("/a").await.unwrap(), Value::Null, "it may be nothing");
}

#[tokio::test]
// behaviour: api-L-1
async fn a_call_that_takes_too_long_ends_and_so_does_one_that_its_caller_gives_up() {
    let (address, _asked) = server(None).await;
    let mut client = Client::new(&address).unwrap();
    client.patience = Duration::from_millis(50);
    let error = client.get("/a").await.unwrap_err().to_string();
    assert!(error.contains("timed out after 0.05 s") && error.contains(&address), "{error}");
    let (address, asked) = server(None).await;
    let client = Client::new(&address).unwrap();
    let given_up = tokio::time::timeout(Duration::from_millis(50), client.get("/a")).await;
    assert!(given_up.is_err(), "nothing else has come");
    assert!(!asked.is_finished());
    let (address, asked) =
        server(Some("HTTP/1.1 200 OK\r\ncontent-length: 5\r\nconnection: close\r\n\r\n{}")).await;
    let error = Client::new(&address).unwrap().get("/a").await.unwrap_err();
    assert!(matches!(error, ApiError::Unreachable { .. }), "the answer ended early: {error}");
    asked.await.unwrap();
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let error = Client::new(&nobody.to_string()).unwrap().get("/a").await.unwrap_err().to_string();
    assert!(error.contains("no answer from") && error.contains("millrace server"), "{error}");
}
