//! What people look at and ask for beside creating changefeeds: where tables are, what keeps a changefeed from getting
//! on, and the older version of the API.

use node::cli::Client;
use serde_json::{Value, json};
use testkit::{PgServer, StopMode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::common::{eventually, start};

const FEED: &str = "/api/v2/changefeeds/f";

async fn own_id(client: &Client) -> String {
    client.get("/api/v2/captures").await.unwrap()["items"][0]["id"].as_str().unwrap().to_owned()
}

/// Runs a command against the node: its exit code, and what it printed.
fn command(node: &node::Node, words: &[&str]) -> (i32, Value) {
    let server = format!("http://{}", node.address());
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_millrace"))
        .args(["cli", "--server", &server])
        .args(words)
        .output()
        .unwrap();
    (output.status.code().unwrap(), serde_json::from_slice(&output.stdout).unwrap())
}

/// What a path answers that is not JSON.
async fn text(node: &node::Node, path: &str) -> String {
    let mut stream = tokio::net::TcpStream::connect(node.address()).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tables_are_listed_counted_and_moved_and_the_status_names_what_holds_the_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let (node, client) = start(dir.path()).await;
    let own = own_id(&client).await;
    let body = json!({
        "changefeed_id": "f", "upstream": { "uri": "generator://bank" }, "sink_uri": "blackhole://",
    });
    client.post("/api/v2/changefeeds", &body).await.unwrap();
    eventually("its tables are placed", async || {
        client.get(&format!("{FEED}/tables")).await.is_ok_and(|tables| tables["total"] == 1)
    })
    .await;
    let tables = client.get(&format!("{FEED}/tables")).await.unwrap();
    assert_eq!(tables["items"][0]["node_id"], own.as_str());
    let ids: Vec<i64> =
        tables["items"][0]["table_ids"].as_array().unwrap().iter().filter_map(Value::as_i64).collect();
    assert!(ids.contains(&0) && ids.len() > 1, "the table trigger and a table: {ids:?}");
    let count = client.get(&format!("{FEED}/get_dispatcher_count")).await.unwrap();
    assert_eq!(count, json!({ "count": ids.len() }));

    // It is there already; and redo logs have no tables.
    let table = ids.iter().find(|id| **id != 0).unwrap();
    for path in ["move_table", "move_split_table"] {
        let query = format!("{FEED}/{path}?tableID={table}&targetNodeID={own}");
        assert_eq!(client.post(&query, &json!({})).await.unwrap(), json!({}), "{path}");
    }
    assert_eq!(
        client.post(&format!("{FEED}/merge_table?tableID={table}"), &json!({})).await.unwrap(),
        json!({})
    );
    let redo = client.get(&format!("{FEED}/tables?mode=1")).await.unwrap();
    assert_eq!(redo, json!({ "total": 0, "items": [] }));
    assert_eq!(
        client.get(&format!("{FEED}/get_dispatcher_count?mode=1")).await.unwrap(),
        json!({ "count": 0 })
    );
    let old = json!({ "table_id": table, "capture_id": own });
    client.post("/api/v1/changefeeds/f/tables/move_table", &old).await.unwrap();

    // A checkpoint that moves is held too, by the slowest.
    eventually("somebody is named", async || {
        client.get(&format!("{FEED}/status")).await.is_ok_and(|status| status["held_by"]["kind"] == "node")
    })
    .await;
    let status = client.get(&format!("{FEED}/status")).await.unwrap();
    assert_eq!((&status["state"], &status["held_by"]["node_id"]), (&json!("normal"), &json!(own)));
    assert!(status["held_by"]["by"].as_str().unwrap().contains("got no further"), "{status}");
    let told = command(&node, &["changefeed", "tables", "-c", "f"]);
    assert_eq!(told, (0, json!([{ "node_id": own, "table_ids": ids }])));
    assert_eq!(command(&node, &["changefeed", "dispatcher-count", "-c", "f"]), (0, json!(ids.len())));
    let table = table.to_string();
    let moved = command(&node, &["changefeed", "move-table", "-c", "f", "-t", &table, "-d", &own]);
    assert_eq!(moved, (0, json!({ "success": true, "error": "" })));
    let (code, refused) =
        command(&node, &["changefeed", "split-table-by-region-count", "-c", "f", "-t", &table]);
    assert_eq!((code, &refused["success"]), (1, &json!(false)));
    assert!(refused["error"].as_str().unwrap().contains("enable-table-across-nodes"), "{refused}");
    let all = text(&node, "/debug/info").await;
    for words in ["coordinator: here", "changefeed default/f", "held for ", "drain: none", &own] {
        assert!(all.contains(words), "{words:?} is missing: {all}");
    }
    assert_eq!(client.get("/config").await.unwrap()["cluster-id"], "default");
    client.post(&format!("{FEED}/pause"), &json!({})).await.unwrap();
    let status = client.get(&format!("{FEED}/status")).await.unwrap();
    assert_eq!((&status["state"], &status["held_by"]), (&json!("stopped"), &Value::Null));
    node.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_is_away_is_named_as_what_holds_the_checkpoint() {
    let source = PgServer::start().await.unwrap();
    source.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY)").await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (node, client) = start(dir.path()).await;
    let body = json!({
        "changefeed_id": "f", "upstream": { "uri": source.uri("postgres") }, "sink_uri": "blackhole://",
    });
    client.post("/api/v2/changefeeds", &body).await.unwrap();
    let held = async |kind: &str| {
        let status = client.get(&format!("{FEED}/status")).await.unwrap();
        (status["held_by"]["kind"] == kind).then(|| status["held_by"].clone())
    };
    eventually("it replicates", async || held("node").await.is_some()).await;
    source.stop(StopMode::Immediate).await.unwrap();
    eventually("the source is named", async || held("reader").await.is_some()).await;
    let named = held("reader").await.unwrap();
    assert!(named["by"].as_str().unwrap().contains("does not read the upstream"), "{named}");
    source.resume().await.unwrap();
    eventually("it goes on", async || held("node").await.is_some_and(|held| held["seconds"] == 0)).await;
    node.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn programs_that_speak_version_1_are_understood() {
    let dir = tempfile::tempdir().unwrap();
    let (node, client) = start(dir.path()).await;
    let old = "/api/v1/changefeeds";
    let body = json!({
        "changefeed_id": "f", "upstream": { "uri": "generator://bank" }, "sink_uri": "blackhole://",
        "filter_rules": ["*.*"], "timezone": "SYSTEM", "sink_config": {},
    });
    let made = client.post(old, &body).await.unwrap();
    assert_eq!((&made["id"], &made["config"]["filter"]["rules"]), (&json!("f"), &json!(["*.*"])));
    let list = client.get(old).await.unwrap();
    assert_eq!((list.as_array().map(Vec::len), &list[0]["id"]), (Some(1), &json!("f")));
    assert_eq!(client.get(&format!("{old}/f")).await.unwrap()["gid"], made["gid"]);
    client.post(&format!("{old}/f/pause"), &json!({})).await.unwrap();
    let changed = client.put(&format!("{old}/f"), &json!({ "mounter_worker_num": 7 })).await.unwrap();
    assert_eq!(changed["config"]["mounter"]["worker_num"], 7);
    client.post(&format!("{old}/f/resume"), &json!({})).await.unwrap();
    eventually("it runs", async || {
        client.get(&format!("{old}/f")).await.is_ok_and(|feed| feed["state"] == "normal")
    })
    .await;
    client.post(&format!("{old}/f/tables/rebalance_table"), &json!({})).await.unwrap();
    client.delete(&format!("{old}/f")).await.unwrap();
    assert_eq!(client.get(old).await.unwrap(), json!([]));
    assert_eq!(client.get("/api/v1/processors").await.unwrap(), json!([]));
    assert_eq!(client.get("/api/v1/status").await.unwrap()["cluster_id"], "default");
    client.get("/api/v1/health").await.unwrap();
    node.stop().await.unwrap();
}
