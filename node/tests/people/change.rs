//! What may be changed in which state, and what becomes of a change whose asker leaves.

use std::net::SocketAddr;

use heartbeatpb::config::{ChangefeedInfo, ChangefeedState};
use node::config::ServerConfig;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::common::{ask, code, described, documents, eventually, put, shown, start, store, stored, tell};

const FEEDS: &str = "/api/v2/changefeeds";
const REFUSED: &str = "CDC:ErrChangefeedUpdateRefused";
const CANARY: &str = "s3cr3t-canary";

/// States in which a changefeed may be stored, and a name for each.
fn states() -> impl Iterator<Item = (ChangefeedState, String)> {
    ChangefeedState::ALL.into_iter().map(|state| {
        let name = if state.name().is_empty() { "uninitialized" } else { state.name() };
        (state, name.to_owned())
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
// behaviour: api-A-1
async fn stopped_failed_and_finished_changefeeds_are_resumed_and_no_others() {
    let store = store();
    let all = states().flat_map(|(state, name)| documents(&described(&name, state)));
    put(&*store, all.collect()).await;
    let dir = tempfile::tempdir().unwrap();
    let node = start(dir.path(), &store, ServerConfig::default()).await;
    let address = node.address();
    let resume =
        async |name: &str| tell(address, "POST", &format!("{FEEDS}/{name}/resume"), &json!({})).await;
    for (state, name) in states() {
        let (status, answer) = resume(&name).await;
        if state.is_resumable() {
            assert_eq!((status, answer), (200, json!({})), "{name}");
            assert!(stored(&*store, &name).await.unwrap().state.should_run(), "{name}");
        } else {
            assert_eq!((status, code(&answer)), (400, REFUSED), "{name}: {answer}");
            assert!(
                answer["error_msg"].as_str().unwrap().contains("stopped, failed or finished"),
                "{answer}"
            );
        }
    }
    let (status, answer) = resume("none").await;
    assert_eq!((status, code(&answer)), (400, "CDC:ErrChangeFeedNotExists"));
    node.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
// behaviour: api-A-2
async fn a_resume_of_a_running_changefeed_is_refused_before_its_upstream_is_asked() {
    let store = store();
    // Nothing answers there: whoever asked would be told that.
    let away = |name: &str, state| {
        let mut info = described(name, state);
        info.upstream_info.as_mut().unwrap().uri = format!("postgres://u:{CANARY}@127.0.0.1:1/d");
        info
    };
    let feeds = [away("runs", ChangefeedState::Normal), away("stands", ChangefeedState::Stopped)];
    put(&*store, feeds.iter().flat_map(documents).collect()).await;
    let dir = tempfile::tempdir().unwrap();
    let node = start(dir.path(), &store, ServerConfig::default()).await;
    let resume = async |name: &str, body: Value| {
        let (status, answer) = tell(node.address(), "POST", &format!("{FEEDS}/{name}/resume"), &body).await;
        assert!(!answer.to_string().contains(CANARY), "{answer}");
        (status, code(&answer).to_owned())
    };
    for body in
        [json!({}), json!({ "overwrite_checkpoint_ts": 7 }), json!({ "overwrite_checkpoint_ts": "now" })]
    {
        assert_eq!(resume("runs", body.clone()).await, (400, REFUSED.to_owned()), "{body}");
    }
    let asked = resume("stands", json!({ "overwrite_checkpoint_ts": 7 })).await;
    assert_eq!(
        asked,
        (400, "CDC:ErrUpstreamUnreachable".to_owned()),
        "of one that may be resumed it is asked"
    );
    assert_eq!(stored(&*store, "stands").await.unwrap().state, ChangefeedState::Stopped);
    node.stop().await.unwrap();
}

/// One with secrets wherever there may be some.
fn secretive(name: &str, state: ChangefeedState) -> ChangefeedInfo {
    let mut info = described(name, state);
    info.sink_uri = format!("blackhole://u:{CANARY}@h/");
    info.config.consistent.storage = format!("s3://b/p?secret-access-key={CANARY}");
    info.config.memory_quota = 123_456_789;
    info.config.filter.rules = vec!["public.*".to_owned()];
    info
}

async fn update(address: SocketAddr, method: &str, name: &str, body: &Value) -> (u16, Value) {
    let (status, answer) = tell(address, method, &format!("{FEEDS}/{name}"), body).await;
    assert!(!answer.to_string().contains(CANARY), "{answer}");
    (status, answer)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
// behaviour: api-A-13
async fn only_stopped_and_failed_changefeeds_change_wholly_or_key_by_key_and_hidden_secrets_stay() {
    let store = store();
    let fresh = secretive("kept", ChangefeedState::Stopped);
    let all = states().flat_map(|(state, name)| documents(&secretive(&name, state)));
    put(&*store, all.chain(documents(&fresh)).collect()).await;
    let dir = tempfile::tempdir().unwrap();
    let node = start(dir.path(), &store, ServerConfig::default()).await;
    let address = node.address();
    for (state, name) in states() {
        let changes = matches!(state, ChangefeedState::Stopped | ChangefeedState::Failed);
        for (method, quota) in [("PUT", 1 << 20), ("PATCH", 2 << 20)] {
            let body = json!({ "replica_config": { "memory_quota": quota } });
            let (status, answer) = update(address, method, &name, &body).await;
            let now = stored(&*store, &name).await.unwrap();
            if changes {
                assert_eq!(status, 200, "{method} {name}: {answer}");
                assert_eq!((now.config.memory_quota, now.state), (quota, state), "{method} {name}");
            } else {
                assert_eq!((status, code(&answer)), (400, REFUSED), "{method} {name}: {answer}");
                assert_eq!(now.config.memory_quota, 123_456_789, "{method} {name}");
            }
        }
    }

    let stopped = stored(&*store, "stopped").await.unwrap();
    assert_eq!(stopped.config.filter.rules, ["*.*"], "PUT sets what is absent to its default");
    let name = "kept";
    let info = async || stored(&*store, name).await.unwrap();
    let body = json!({ "replica_config": { "memory_quota": 5 << 20, "filter": { "case_sensitive": null } } });
    assert_eq!(update(address, "PATCH", name, &body).await.0, 200);
    assert_eq!(info().await.config.filter.rules, ["public.*"], "PATCH keeps what is absent");
    assert_eq!(info().await.config.consistent.storage, fresh.config.consistent.storage);

    // What was shown is sent back, with one key changed.
    let mut seen = shown(address, &format!("{FEEDS}/{name}")).await;
    assert!(!seen.to_string().contains(CANARY), "{seen}");
    assert!(seen["sink_uri"].as_str().unwrap().contains("xxxxx"), "{seen}");
    seen["config"]["memory_quota"] = json!(6 << 20);
    let body = json!({
        "replica_config": seen["config"], "sink_uri": seen["sink_uri"], "upstream": seen["upstream"],
    });
    for method in ["PUT", "PATCH"] {
        let (status, answer) = update(address, method, name, &body).await;
        assert_eq!(status, 200, "{method}: {answer}");
        let now = info().await;
        assert_eq!(now.config.memory_quota, 6 << 20);
        assert_eq!(now.config.consistent.storage, fresh.config.consistent.storage, "{method}");
        assert_eq!(
            (&now.sink_uri, now.upstream_info),
            (&fresh.sink_uri, fresh.upstream_info.clone()),
            "{method}"
        );
    }
    let body = json!({ "replica_config": { "consistent": { "storage": "******" } } });
    assert_eq!(update(address, "PATCH", name, &body).await.0, 200);
    assert_eq!(info().await.config.consistent.storage, fresh.config.consistent.storage);
    let body =
        json!({ "replica_config": { "consistent": { "storage": "s3://b/p?secret-access-key=other" } } });
    assert_eq!(update(address, "PATCH", name, &body).await.0, 200);
    assert_eq!(info().await.config.consistent.storage, "s3://b/p?secret-access-key=other");
    node.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
// behaviour: api-A-14
async fn a_removal_succeeds_when_there_is_nothing_or_somebody_else_removes_and_ends_without_its_asker() {
    let store = store();
    let names: Vec<String> = (0..3).map(|at| format!("f{at}")).collect();
    put(
        &*store,
        names.iter().flat_map(|name| documents(&described(name, ChangefeedState::Normal))).collect(),
    )
    .await;
    let dir = tempfile::tempdir().unwrap();
    let node = start(dir.path(), &store, ServerConfig::default()).await;
    let address = node.address();
    let remove = async |name: &str| {
        let (status, text) = ask(address, "DELETE", &format!("{FEEDS}/{name}")).await;
        (status, serde_json::from_str::<Value>(&text).unwrap())
    };
    let done = (200, json!({}));
    assert_eq!(remove("none").await, done);
    let (first, second) = tokio::join!(remove("f0"), remove("f0"));
    assert_eq!((first, second), (done.clone(), done.clone()), "both at once");
    assert_eq!(remove("f0").await, done, "once more");
    assert!(stored(&*store, "f0").await.is_none());
    assert_eq!(shown(address, FEEDS).await["total"], 2);

    for (name, headers) in [("f1", ""), ("f2", "Idempotency-Key: k\r\n")] {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("DELETE {FEEDS}/{name} HTTP/1.1\r\nHost: x\r\n{headers}\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        // Begun, and not yet answered: a removal waits for its maintainer.
        let named = |item: &Value| item["operation"] == "delete" && item["changefeed"] == name;
        eventually("it is begun", async || {
            let items = shown(address, "/api/v2/operations").await["items"].clone();
            items.as_array().is_some_and(|items| items.iter().any(named))
        })
        .await;
        drop(stream);
        eventually("it is removed although nobody waits", async || stored(&*store, name).await.is_none())
            .await;
    }
    assert_eq!(shown(address, FEEDS).await["total"], 0);
    eventually("its record says so", async || {
        let items = shown(address, "/api/v2/operations").await["items"].clone();
        let removed = items.as_array().into_iter().flatten();
        removed.filter(|item| item["operation"] == "delete" && item["result"] == "success").count() == 6
    })
    .await;
    node.stop().await.unwrap();
}
