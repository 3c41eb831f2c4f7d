//! Requests that are repeated when another node leads.

use std::net::SocketAddr;
use std::sync::Arc;

use coordinator::backend::{Op, Store};
use coordinator::operations::{OperationDoc, OperationState};
use heartbeatpb::Gid;
use heartbeatpb::config::ChangefeedState;
use node::Node;
use node::config::ServerConfig;
use serde_json::{Value, json};
use xxhash_rust::xxh3::xxh3_128;

use crate::common::{described, documents, eventually, layout, put, send, shown, start, store, stored, tell};

const FEEDS: &str = "/api/v2/changefeeds";

/// A request with a key; status and answer.
async fn keyed(address: SocketAddr, request: &str, key: &str, body: &str) -> (u16, Value) {
    let headers = format!("Idempotency-Key: {key}\r\n");
    let (status, text) = send(address, request, &headers, body).await.unwrap();
    (status, serde_json::from_str(&text).unwrap_or(Value::Null))
}

/// The operations that a node tells of, by their ids.
async fn operations(address: SocketAddr) -> Vec<Value> {
    shown(address, "/api/v2/operations").await["items"].as_array().cloned().unwrap_or_default()
}

async fn operation(address: SocketAddr, id: &str) -> Value {
    shown(address, &format!("/api/v2/operations/{id}")).await
}

/// Lets another node lead.
async fn hand_over(from: &Node, to: &Node) {
    let (status, answer) = tell(from.address(), "POST", "/api/v2/owner/resign", &json!({})).await;
    assert_eq!(status, 200, "{answer}");
    let address = to.address();
    eventually("the other one leads and knows its nodes", async || {
        shown(address, "/status").await["is_owner"] == true
            && send(address, "GET /api/v2/health", "", "").await.is_ok_and(|(status, _)| status == 200)
    })
    .await;
}

async fn pair(store: &Arc<dyn Store>) -> (tempfile::TempDir, Node, Node) {
    let dir = tempfile::tempdir().unwrap();
    let first = start(&dir.path().join("a"), store, ServerConfig::default()).await;
    let second = start(&dir.path().join("b"), store, ServerConfig::default()).await;
    (dir, first, second)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_is_repeated_after_a_change_of_the_leader_is_not_carried_out_twice() {
    let store = store();
    let (_dir, first, second) = pair(&store).await;
    let body =
        json!({ "upstream": { "uri": "generator://bank?rate=1" }, "sink_uri": "blackhole://" }).to_string();
    let create = format!("POST {FEEDS}");
    let made = keyed(first.address(), &create, "c", &body).await;
    assert_eq!(made.0, 200, "{}", made.1);
    let name = made.1["id"].as_str().unwrap().to_owned();
    let pause = format!("POST {FEEDS}/{name}/pause");
    assert_eq!(keyed(second.address(), &pause, "p", "").await, (200, json!({})));
    let resume = format!("{FEEDS}/{name}/resume");
    assert_eq!(tell(first.address(), "POST", &resume, &json!({})).await.0, 200);
    let before = operations(first.address()).await;
    assert_eq!(before.len(), 3, "{before:?}");

    hand_over(&first, &second).await;
    for address in [first.address(), second.address()] {
        assert_eq!(operations(address).await, before, "the list is known to whoever leads");
        assert_eq!(keyed(address, &create, "c", &body).await, made, "the same answer");
        assert_eq!(keyed(address, &pause, "p", "").await, (200, json!({})));
    }
    let list = shown(second.address(), FEEDS).await;
    assert_eq!((&list["total"], &list["items"][0]["id"]), (&json!(1), &json!(name)));
    let state = stored(&*store, &name).await.unwrap().state;
    assert!(state.should_run(), "what was paused once and resumed since runs: {state}");
    assert_eq!(operations(second.address()).await.len(), 3);

    // And back: what the first one remembers is not what is.
    let removal = format!("DELETE {FEEDS}/{name}");
    assert_eq!(keyed(second.address(), &removal, "d", "").await, (200, json!({})));
    let again = keyed(second.address(), &create, "c2", &body).await;
    assert_eq!(again.0, 200, "{}", again.1);
    hand_over(&second, &first).await;
    assert_eq!(operations(first.address()).await.len(), 5);
    assert_eq!(keyed(first.address(), &removal, "d", "").await, (200, json!({})));
    assert_eq!(keyed(first.address(), &create, "c2", &body).await, again);
    assert_eq!(shown(first.address(), FEEDS).await["total"], 1);
    let id = before[0]["id"].as_str().unwrap();
    assert_eq!(operation(first.address(), id).await["state"], "success");
    second.stop().await.unwrap();
    first.stop().await.unwrap();
}

/// An operation as a coordinator that died has left it.
fn left(id: &str, operation: &str, name: &str, gid: Option<Gid>, request: &str, body: &str) -> OperationDoc {
    OperationDoc {
        id: id.to_owned(),
        event: u64::from(id.as_bytes()[0]),
        operation: operation.to_owned(),
        keyspace: "default".to_owned(),
        changefeed: name.to_owned(),
        gid,
        user: "anonymous".to_owned(),
        begun_ms: heartbeatpb::WallTime::now().millis(),
        coordinator: 1,
        attempt: 1,
        keeps: true,
        idempotency_key: format!("anonymous {request} {id}"),
        idempotency_key_request: format!("{:032x}", xxh3_128(body.as_bytes())),
        ..OperationDoc::default()
    }
}

fn document(doc: &OperationDoc) -> Op {
    Op::put(layout().operation(&doc.id), doc.to_json())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_dead_leader_had_applied_is_answered_and_what_it_had_only_begun_is_done() {
    let store = store();
    let (runs, stands) =
        (described("runs", ChangefeedState::Normal), described("stands", ChangefeedState::Stopped));
    let (run, stand) = (Some(runs.id.gid), Some(stands.id.gid));
    let pause = |name: &str| format!("POST {FEEDS}/{name}/pause");
    let body = json!({ "changefeed_id": "made", "upstream": { "uri": "generator://bank?rate=1" }, "sink_uri": "blackhole://" });
    let body = body.to_string();
    let applied = left("a", "pause", "runs", run, &pause("runs"), "").applied();
    let begun = left("b", "resume", "stands", stand, &format!("POST {FEEDS}/stands/resume"), "");
    let other = left("c", "delete", "runs", Some(Gid::random()), &format!("DELETE {FEEDS}/runs"), "");
    let gone = left("d", "pause", "gone", Some(Gid::random()), &pause("gone"), "");
    let create = left("e", "create", "made", Some(Gid::random()), &format!("POST {FEEDS}"), &body);
    let made = left("f", "create", "stands", stand, &format!("POST {FEEDS}"), &body).applied();
    let docs = [&applied, &begun, &other, &gone, &create, &made];
    let all = documents(&runs).into_iter().chain(documents(&stands)).chain(docs.into_iter().map(document));
    put(&*store, all.chain([Op::put(layout().operation("torn"), b"{".to_vec())]).collect()).await;
    let dir = tempfile::tempdir().unwrap();
    let node = start(dir.path(), &store, ServerConfig::default()).await;
    let address = node.address();
    let states: Vec<(String, String)> = operations(address)
        .await
        .iter()
        .map(|item| (item["id"].as_str().unwrap().to_owned(), item["result"].as_str().unwrap().to_owned()))
        .collect();
    let expected =
        ["f success", "e interrupted", "d interrupted", "c interrupted", "b interrupted", "a success"];
    assert_eq!(states.iter().map(|(id, is)| format!("{id} {is}")).collect::<Vec<_>>(), expected);

    assert_eq!(keyed(address, &pause("runs"), "a", "").await, (200, json!({})));
    assert!(stored(&*store, "runs").await.unwrap().state.should_run(), "it was resumed since");
    assert_eq!(keyed(address, &format!("POST {FEEDS}/stands/resume"), "b", "").await, (200, json!({})));
    assert!(stored(&*store, "stands").await.unwrap().state.should_run(), "nobody had done it");
    assert_eq!(keyed(address, &format!("DELETE {FEEDS}/runs"), "c", "").await, (200, json!({})));
    assert!(stored(&*store, "runs").await.is_some(), "another one of the same name was meant");
    let (status, refused) = keyed(address, &pause("gone"), "d", "").await;
    assert_eq!(
        (status, refused["error_code"].as_str()),
        (400, Some("CDC:ErrChangeFeedNotExists")),
        "{refused}"
    );
    let (status, feed) = keyed(address, &format!("POST {FEEDS}"), "e", &body).await;
    assert_eq!((status, &feed["id"]), (200, &json!("made")), "{feed}");
    assert_ne!(stored(&*store, "made").await.map(|info| info.id.gid), create.gid, "another incarnation");
    let (status, feed) = keyed(address, &format!("POST {FEEDS}"), "f", &body).await;
    assert_eq!((status, &feed["id"]), (200, &json!("stands")), "what is there is told: {feed}");

    for (id, state) in [
        ("a", "success"),
        ("b", "success"),
        ("c", "success"),
        ("d", "failed"),
        ("e", "success"),
        ("f", "success"),
    ] {
        let doc = store.get(&layout().operation(id)).await.unwrap().found.unwrap();
        let doc: OperationDoc = serde_json::from_slice(&doc.value).unwrap();
        let (ended, attempts) = (doc.has_ended(), if matches!(id, "b" | "e") { 2 } else { 1 });
        assert_eq!(
            (ended, doc.attempt, operation(address, id).await["state"].as_str()),
            (true, attempts, Some(state)),
            "{id}"
        );
        assert_ne!(doc.state, OperationState::Unknown);
    }
    assert!(store.get(&layout().operation("torn")).await.unwrap().found.is_none(), "nobody can read it");
    node.stop().await.unwrap();
}
