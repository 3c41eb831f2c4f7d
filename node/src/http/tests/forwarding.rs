//! Requests to a node that does not lead, to one that needs a password, and to nobody.

use axum::Router;
use axum::body::Bytes;
use axum::extract::Request;
use axum::http::{HeaderMap, StatusCode, header};
use axum::routing::any;
use base64::Engine as _;
use http_body_util::{BodyExt as _, Full};
use parking_lot::Mutex;

use super::*;
use crate::http::password;

/// Sends a request; its answer's status, headers and text.
pub(super) async fn send(
    address: &str,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> (StatusCode, HeaderMap, String) {
    let mut request = axum::http::Request::builder().method(method).uri(path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(Full::new(Bytes::from(body.to_owned()))).unwrap();
    let (parts, body) = crate::connect::send(address, None, request).await.unwrap().into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    (parts.status, parts.headers, String::from_utf8_lossy(&body).into_owned())
}

pub(super) fn code_of(text: &str) -> String {
    let value: Value = serde_json::from_str(text).unwrap();
    value["error_code"].as_str().unwrap_or_default().to_owned()
}

/// What a server that stands for another node was asked.
type Seen = Arc<Mutex<Vec<(String, String, HeaderMap, String)>>>;

/// A node that remembers what it was asked.
async fn other(seen: &Seen) -> String {
    let seen = Arc::clone(seen);
    let app = Router::new().fallback(any(async move |request: Request| {
        let (parts, body) = request.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        let body = String::from_utf8_lossy(&body).into_owned();
        seen.lock().push((parts.method.to_string(), parts.uri.to_string(), parts.headers, body));
        (StatusCode::IM_A_TEAPOT, [("x-mark", "kept"), ("connection", "x-hop"), ("x-hop", "1")], "the answer")
    }));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(crate::serve::Server::new(listener, app).run(CancellationToken::new()));
    address
}

#[tokio::test]
// behaviour: api-M-1
async fn a_request_reaches_the_leader_as_it_is_and_the_answer_comes_back_as_it_is() {
    let cluster = Cluster::start().await;
    let seen = Seen::default();
    let address = other(&seen).await;
    let mut members = (**cluster.members.borrow()).clone();
    members.insert("n9".into(), address);
    cluster.members.send_replace(Arc::new(members));
    cluster.leading.send_replace(Some("n9".into()));
    let body = r#"{"changefeed_id":"a"}"#;
    let sent =
        [("x-client-version", "1.2.3"), ("authorization", "Basic eDp5"), ("x-forwarded-for", "10.0.0.1")];
    let (status, headers, text) =
        send(&cluster.addresses[1], "POST", "/api/v2/changefeeds?keyspace=default", &sent, body).await;
    assert_eq!((status, text.as_str()), (StatusCode::IM_A_TEAPOT, "the answer"));
    assert_eq!((headers.get("x-mark").unwrap(), headers.get("x-hop")), (&"kept".parse().unwrap(), None));
    let (method, uri, headers, got) = seen.lock().pop().unwrap();
    assert_eq!(
        (method.as_str(), uri.as_str(), got.as_str()),
        ("POST", "/api/v2/changefeeds?keyspace=default", body)
    );
    for (name, value) in [
        ("ticdc-forwardfrom", "n2"),
        ("ticdc-forwardtimes", "1"),
        ("x-client-version", "1.2.3"),
        ("authorization", "Basic eDp5"),
        ("x-forwarded-for", "10.0.0.1, 127.0.0.1"),
    ] {
        assert_eq!(headers.get(name).unwrap(), value, "{name}");
    }
    cluster.stop().await;
}

#[tokio::test]
// behaviour: api-M-2
async fn a_request_that_goes_in_circles_is_refused_without_a_call() {
    let cluster = Cluster::start().await;
    let seen = Seen::default();
    let address = other(&seen).await;
    let mut members = (**cluster.members.borrow()).clone();
    members.insert("n9".into(), address);
    cluster.members.send_replace(Arc::new(members));
    cluster.leading.send_replace(Some("n9".into()));
    let ask = async |times: &str| {
        let headers = [("TiCDC-ForwardTimes", times)];
        let (status, headers, text) =
            send(&cluster.addresses[1], "GET", "/api/v2/changefeeds", &headers, "").await;
        (status, headers.contains_key(header::RETRY_AFTER), text)
    };
    for times in ["2", "3", "4294967295"] {
        let (status, later, text) = ask(times).await;
        assert_eq!((status, later), (StatusCode::SERVICE_UNAVAILABLE, true), "{times}");
        assert_eq!(code_of(&text), "CDC:ErrClusterIsUnhealthy");
    }
    for times in ["x", "-1", "4294967296"] {
        let (status, _, text) = ask(times).await;
        assert_eq!(
            (status, code_of(&text).as_str()),
            (StatusCode::BAD_REQUEST, "CDC:ErrAPIInvalidParam"),
            "{times}"
        );
    }
    assert!(seen.lock().is_empty());
    assert_eq!(ask("1").await.0, StatusCode::IM_A_TEAPOT, "the second time it may pass");
    assert_eq!(seen.lock()[0].2.get("ticdc-forwardtimes").unwrap(), "2");
    cluster.stop().await;
}

#[tokio::test]
// behaviour: api-M-3
async fn the_leader_answers_itself_and_nobody_is_an_error() {
    let cluster = Cluster::start().await;
    let follower = cluster.addresses[1].clone();
    // What the leader answers is what a follower answers.
    let mut answers = Vec::new();
    for address in &cluster.addresses {
        let (status, _, text) = send(address, "GET", "/api/v2/changefeeds", &[], "").await;
        assert_eq!(status, StatusCode::OK);
        answers.push(text);
    }
    assert!(answers.windows(2).all(|pair| pair[0] == pair[1]), "{answers:?}");
    assert_eq!(send(&follower, "GET", "/api/v2/health", &[], "").await.0, StatusCode::OK);
    let (status, _, text) = send(&follower, "PUT", "/api/v2/captures/n9/drain", &[], "").await;
    assert_eq!((status, code_of(&text).as_str()), (StatusCode::BAD_REQUEST, "CDC:ErrCaptureNotExist"));
    let (status, _, text) =
        send(&follower, "POST", "/api/v2/changefeeds/none/move_table?tableID=1&targetNodeID=n1", &[], "")
            .await;
    assert_eq!((status, code_of(&text).as_str()), (StatusCode::BAD_REQUEST, "CDC:ErrChangeFeedNotExists"));
    // A body that is too large goes nowhere.
    let (status, _, _) = send(&follower, "POST", "/api/v2/changefeeds", &[], &"x".repeat(3 << 20)).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);

    for address in &cluster.addresses {
        assert_eq!(send(address, "GET", "/readyz", &[], "").await.0, StatusCode::OK, "whoever leads");
    }
    let refused = async |leading: Option<&str>| {
        cluster.leading.send_replace(leading.map(NodeId::from));
        let (status, headers, text) = send(&follower, "GET", "/api/v2/changefeeds", &[], "").await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{text}");
        assert!(headers.contains_key(header::RETRY_AFTER));
        code_of(&text)
    };
    assert_eq!(refused(None).await, "CDC:ErrOwnerNotFound");
    let (status, _, text) = send(&follower, "GET", "/readyz", &[], "").await;
    assert_eq!((status, text.as_str()), (StatusCode::SERVICE_UNAVAILABLE, "no coordinator is known\n"));
    assert_eq!(refused(Some("n2")).await, "CDC:ErrOwnerNotFound", "it is to lead and does not yet");
    assert_eq!(refused(Some("n8")).await, "CDC:ErrOwnerNotFound", "nobody knows where that is");
    let mut members = (**cluster.members.borrow()).clone();
    members.insert("n8".into(), "127.0.0.1:1".to_owned());
    cluster.members.send_replace(Arc::new(members));
    assert_eq!(refused(Some("n8")).await, "CDC:ErrClusterIsUnhealthy", "nobody is there");
    // What a node knows itself it tells without a leader.
    for path in [
        "/api/v2/status",
        "/api/v2/captures",
        "/livez",
        "/metrics",
        "/",
        "/api/v2/openapi.json",
        "/debug/info",
    ] {
        assert_eq!(send(&follower, "GET", path, &[], "").await.0, StatusCode::OK, "{path}");
    }
    cluster.stop().await;
}

#[tokio::test]
async fn tables_are_asked_of_the_node_that_has_them() {
    let cluster = Cluster::start().await;
    // The maintainer's node was resolved by the leader: it does not look for the changefeed again.
    let path = "/api/v2/changefeeds/a/tables";
    let headers = [("millrace-changefeed-gid", "7-8")];
    let (status, _, text) = send(&cluster.addresses[2], "GET", path, &headers, "").await;
    assert_eq!(code_of(&text), "CDC:ErrMaintainerNotFounded", "{status} {text}");
    for (path, gid) in [(path, "x"), (path, "7"), ("/api/v2/changefeeds/a%20b/tables", "7-8")] {
        let (_, _, text) =
            send(&cluster.addresses[2], "GET", path, &[("millrace-changefeed-gid", gid)], "").await;
        assert_eq!(code_of(&text), "CDC:ErrAPIInvalidParam", "{path} {gid}");
    }
    cluster.stop().await;
}

#[tokio::test]
// behaviour: api-M-7
async fn what_changes_or_shows_more_than_positions_needs_a_user_when_users_are_asked_for() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("passwords");
    std::fs::write(&file, password::line("ann", "s3cret").unwrap()).unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    let security = SecuritySection {
        client_user_required: true,
        client_allowed_user: vec!["ann".to_owned()],
        client_password_file: file,
        ..SecuritySection::default()
    };
    let cluster = Cluster::start_with(&security).await;
    let right = format!("Basic {}", base64::engine::general_purpose::STANDARD.encode("ann:s3cret"));
    let wrong = format!("Basic {}", base64::engine::general_purpose::STANDARD.encode("ann:other"));
    let follower = &cluster.addresses[1];
    let closed = [
        ("POST", "/api/v2/changefeeds"),
        ("PUT", "/api/v2/changefeeds/a"),
        ("PATCH", "/api/v2/changefeeds/a"),
        ("DELETE", "/api/v2/changefeeds/a"),
        ("POST", "/api/v2/changefeeds/a/pause"),
        ("POST", "/api/v2/changefeeds/a/resume"),
        ("GET", "/api/v2/changefeeds/a/status"),
        ("GET", "/api/v2/changefeeds/a/synced"),
        ("POST", "/api/v1/changefeeds"),
        ("DELETE", "/api/v1/changefeeds/a"),
        ("PUT", "/api/v1/captures/drain"),
        ("PUT", "/api/v2/captures/n2/drain"),
        ("DELETE", "/api/v2/captures/n2/drain"),
        ("POST", "/api/v2/owner/resign"),
        ("POST", "/api/v2/log"),
        ("POST", "/api/v2/log/redact"),
        ("POST", "/api/v2/verify_table"),
        ("POST", "/api/v2/get_all_tables"),
        ("POST", "/api/v2/tso"),
        ("GET", "/api/v2/operations"),
        ("GET", "/api/v2/unsafe/metadata"),
        ("DELETE", "/api/v2/unsafe/service_gc_safepoint"),
        ("GET", "/config"),
        ("GET", "/debug/info"),
    ];
    for (method, path) in closed {
        let (status, headers, text) = send(follower, method, path, &[], "{}").await;
        assert_eq!(
            (status, code_of(&text).as_str()),
            (StatusCode::UNAUTHORIZED, "CDC:ErrCredentialNotFound"),
            "{method} {path}"
        );
        assert_eq!(headers.get(header::WWW_AUTHENTICATE).unwrap(), "Basic realm=\"millrace\"");
        let (status, _, text) = send(follower, method, path, &[("authorization", &right)], "{}").await;
        assert_ne!(status, StatusCode::UNAUTHORIZED, "{method} {path}: {text}");
        assert!(!text.contains("s3cret"), "{text}");
        if method == "POST" && path.ends_with("resign") {
            cluster
                .eventually("somebody leads", async |client| client.get("/api/v2/health").await.is_ok())
                .await;
        }
    }
    let (status, _, text) =
        send(follower, "DELETE", "/api/v2/changefeeds/a", &[("authorization", &wrong)], "").await;
    assert_eq!((status, code_of(&text).as_str()), (StatusCode::UNAUTHORIZED, "CDC:ErrUnauthorized"));
    for path in [
        "/",
        "/status",
        "/livez",
        "/metrics",
        "/api/v2/status",
        "/api/v2/health",
        "/api/v2/changefeeds",
        "/api/v2/captures",
    ] {
        assert_eq!(send(follower, "GET", path, &[], "").await.0, StatusCode::OK, "{path}");
    }
    // Each attempt to change something left a record, on the node that leads, with the user when there was one.
    let (_, _, text) = send(follower, "GET", "/api/v2/operations", &[("authorization", &right)], "").await;
    let items = serde_json::from_str::<Value>(&text).unwrap()["items"].clone();
    let of =
        |item: &Value| format!("{} {} {}", item["operation"], item["user"], item["result"]).replace('"', "");
    assert_eq!(of(&items[0]), "delete anonymous failed", "{items}");
    let all: Vec<String> = items.as_array().unwrap().iter().map(of).collect();
    assert!(
        all.contains(&"delete ann success".to_owned()) && all.contains(&"create ann failed".to_owned()),
        "{all:?}"
    );
    cluster.stop().await;
}

#[tokio::test]
// behaviour: api-A-10
async fn what_the_log_shows_of_values_can_be_made_less_and_never_more() {
    let cluster = Cluster::start().await;
    let ask = async |mode: &str| {
        let body = json!({ "redact_info_log": mode }).to_string();
        let (status, _, text) = send(&cluster.addresses[0], "POST", "/api/v2/log/redact", &[], &body).await;
        (status.as_u16(), serde_json::from_str::<Value>(&text).unwrap())
    };
    for bad in ["", "loud", "off"] {
        assert_eq!(ask(bad).await.0, 400, "{bad:?}: the mode is marker");
    }
    let same = ask(" MARK ").await;
    assert_eq!(same, (200, json!({ "previous_mode": "MARKER", "current_mode": "MARKER" })));
    let tries = ["on", "marker", "enabled", "1", "marker"].map(ask);
    futures_util::future::join_all(tries).await;
    assert_eq!(ask("true").await, (200, json!({ "previous_mode": "ON", "current_mode": "ON" })));
    assert_eq!(ask("marker").await.0, 400);
    cluster.stop().await;
}

#[tokio::test]
// behaviour: api-M-8
async fn what_the_cluster_stores_and_what_this_api_is_can_be_read() {
    let cluster = Cluster::start().await;
    let document = cluster.client.get("/api/v2/openapi.json").await.unwrap();
    assert!(document["paths"]["/api/v2/changefeeds"]["post"].is_object());
    let stored = cluster.client.get("/api/v2/unsafe/metadata").await.unwrap();
    let keys: Vec<&str> = stored.as_array().unwrap().iter().filter_map(|kv| kv["key"].as_str()).collect();
    assert!(keys.iter().any(|key| key.contains("/owner/")), "{keys:?}");
    for (method, path) in
        [("POST", "/api/v2/unsafe/resolve_lock"), ("DELETE", "/api/v2/unsafe/service_gc_safepoint")]
    {
        let (status, _, text) = send(&cluster.addresses[0], method, path, &[], "{}").await;
        assert_eq!((status, code_of(&text).as_str()), (StatusCode::GONE, "CDC:ErrAPIGone"));
    }
    assert!(cluster.client.get("/config").await.is_ok());
    let (_, headers, page) = send(&cluster.addresses[0], "GET", "/", &[], "").await;
    assert!(page.contains("<title>Millrace</title>") && headers.contains_key("content-security-policy"));
    assert_eq!(
        send(&cluster.addresses[0], "GET", "/api/v2/unsafe/metadata?raw=maybe", &[], "").await.0,
        StatusCode::BAD_REQUEST
    );
    cluster.stop().await;
}
