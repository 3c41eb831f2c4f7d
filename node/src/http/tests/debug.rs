//! What is told of the process, and what is refused.

use super::forwarding::{code_of, send};
use super::*;
use axum::http::StatusCode;

#[tokio::test]
async fn the_process_tells_its_tasks_and_threads_and_says_what_it_cannot_tell() {
    let cluster = Cluster::start().await;
    let get = async |path: &str| send(&cluster.addresses[0], "GET", path, &[], "").await;
    for path in ["/debug/pprof/", "/debug/pprof/goroutine", "/debug/threads?seconds=1", "/debug/info"] {
        let (status, headers, text) = get(path).await;
        assert_eq!(status, StatusCode::OK, "{path}: {text}");
        assert!(headers["content-type"].to_str().unwrap().starts_with("text/plain"), "{path}");
        assert!(!text.is_empty(), "{path}");
    }
    let runtime = cluster.client.get("/debug/runtime").await.unwrap();
    assert!(runtime["runtime"]["alive_tasks"].as_u64().unwrap() > 0, "{runtime}");
    assert!(runtime["process"]["memory_kib"].as_u64().unwrap() > 0, "{runtime}");
    let info = cluster.client.get("/debug/info?format=json").await.unwrap();
    assert_eq!((&info["node"], &info["coordinator"]["changefeeds"]), (&json!(LEADER), &json!([])));
    assert_eq!(info["members"].as_object().unwrap().len(), 3);

    let (bad, none, not_here) = ("CDC:ErrAPIInvalidParam", "CDC:ErrAPINotFound", "CDC:ErrAPINotSupported");
    for (path, status, code) in [
        ("/debug/threads?seconds=0", 400, bad),
        ("/debug/threads?seconds=121", 400, bad),
        ("/debug/threads?seconds=-1", 400, bad),
        ("/debug/threads?seconds=soon", 400, bad),
        ("/debug/threads?seconds=1&seconds=2", 400, bad),
        ("/debug/threads?seconds=%FF", 400, bad),
        ("/debug/info?format=xml", 400, bad),
        ("/debug/info?format=%00", 400, bad),
        ("/debug/pprof/none", 404, none),
        ("/debug/pprof/..%2fconfig", 404, none),
        ("/debug/pprof/%FF", 400, bad),
        ("/debug/pprof/goroutine/x", 404, none),
        ("/debug/pprof/profile?seconds=1", 501, not_here),
        ("/debug/pprof/heap", 501, not_here),
        ("/debug/pprof/allocs", 501, not_here),
        ("/debug/pprof/block", 501, not_here),
        ("/debug/pprof/mutex", 501, not_here),
        ("/debug/pprof/threadcreate", 501, not_here),
        ("/debug/pprof/trace", 501, not_here),
        ("/debug/pprof/symbol", 501, not_here),
        ("/debug/pprof/cmdline", 501, not_here),
        ("/debug/failpoints", 404, none),
    ] {
        let (is, _, text) = get(path).await;
        assert_eq!((is.as_u16(), code_of(&text).as_str()), (status, code), "{path}: {text}");
    }
    for path in ["/debug/info", "/debug/log", "/debug/runtime", "/debug/threads", "/debug/pprof/heap"] {
        let (status, _, _) = send(&cluster.addresses[0], "POST", path, &[], "").await;
        assert_eq!(status, StatusCode::METHOD_NOT_ALLOWED, "{path}");
    }
    // One at a time looks.
    let (first, second) = tokio::join!(get("/debug/threads?seconds=1"), get("/debug/threads?seconds=1"));
    let mut both = [first.0.as_u16(), second.0.as_u16()];
    both.sort_unstable();
    assert_eq!(both, [200, 429]);
    cluster.stop().await;
}

#[tokio::test]
async fn an_upstream_of_the_configuration_is_named_in_place_of_a_uri() {
    let cluster = Cluster::start().await;
    let named = json!({ "upstream_name": "bank", "sink_uri": "blackhole://", "changefeed_id": "f" });
    cluster.client.post("/api/v2/changefeeds", &named).await.unwrap();
    let feed = cluster.client.get("/api/v2/changefeeds/f").await.unwrap();
    assert_eq!(feed["upstream"]["uri"], "generator://bank?seed=3");
    let position = cluster.client.post("/api/v2/tso", &json!({ "upstream_name": "bank" })).await.unwrap();
    assert!(position["position"].is_u64(), "{position}");
    assert!(cluster.client.post("/api/v2/tso", &json!({})).await.is_ok(), "there is only one");
    for (path, body, words) in [
        ("changefeeds", json!({ "upstream_name": "none", "sink_uri": "blackhole://" }), "it has bank"),
        ("changefeeds", json!({ "upstream_name": 7 }), "upstream_name"),
        (
            "changefeeds",
            json!({ "upstream_name": "bank", "upstream": { "uri": "generator://bank" } }),
            "keep one",
        ),
        ("verify_table", json!({ "upstream_name": "none", "sink_uri": "blackhole://" }), "it has bank"),
        ("get_all_tables", json!({ "upstream_name": "" }), "upstream.uri is missing"),
        ("tso", json!({ "upstream_name": "none" }), "it has bank"),
        ("tso", json!({ "upstream_name": "bank", "upstream": { "uri": "generator://bank" } }), "keep one"),
    ] {
        let error = cluster.client.post(&format!("/api/v2/{path}"), &body).await.unwrap_err();
        assert_eq!(error.code(), "CDC:ErrAPIInvalidParam", "{path} {body}");
        assert!(error.to_string().contains(words), "{path} {body}: {error}");
    }
    cluster.stop().await;
}
