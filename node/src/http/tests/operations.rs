//! What is remembered of requests that change something, also by the coordinator after the present one.

use super::forwarding::{code_of, send};
use super::*;
use axum::http::{StatusCode, header};

async fn operations(cluster: &Cluster) -> Vec<Value> {
    cluster.client.get("/api/v2/operations").await.unwrap()["items"].as_array().unwrap().clone()
}

#[tokio::test]
// behaviour: api-M-6
async fn every_operation_leaves_one_record_and_the_oldest_goes() {
    let cluster = Cluster::start().await;
    let none = "/api/v2/changefeeds/none";
    cluster.client.delete(none).await.unwrap();
    cluster.client.post(&format!("{none}/pause"), &json!({})).await.unwrap_err();
    let long =
        json!({ "changefeed_id": "a b ".repeat(200), "upstream": { "uri": "postgres://u:s3cr3t@h/d" } });
    cluster.client.post("/api/v2/changefeeds", &long).await.unwrap_err();
    let items = operations(&cluster).await;
    let told = |at: usize, keys: [&str; 4]| keys.map(|key| items[at][key].clone());
    let keys = ["operation", "changefeed", "user", "result"];
    assert_eq!(told(2, keys), ["delete", "none", "anonymous", "success"].map(Value::from));
    assert_eq!(told(1, keys), ["pause", "none", "anonymous", "failed"].map(Value::from));
    assert!(items[1]["error"].as_str().unwrap().contains("does not exist"), "{}", items[1]);
    let name = items[0]["changefeed"].as_str().unwrap();
    assert!(name.chars().count() == 256 && name.ends_with("..."), "{name}");
    assert!(!json!(items).to_string().contains("s3cr3t"));

    for _ in 0..101 {
        cluster.client.delete(none).await.unwrap();
    }
    let items = operations(&cluster).await;
    let events: Vec<u64> = items.iter().filter_map(|item| item["event"].as_u64()).collect();
    assert_eq!((events.len(), events[0], events[99]), (100, 104, 5), "the newest first");
    let stored = cluster.client.get("/api/v2/unsafe/metadata").await.unwrap();
    let documents =
        stored.as_array().unwrap().iter().filter(|kv| kv["key"].as_str().unwrap().contains("/operation/"));
    assert!((100..103).contains(&documents.count()), "the store forgets too");
    cluster.stop().await;
}

#[tokio::test]
async fn a_creation_is_not_repeated_by_the_coordinator_after_the_one_that_carried_it_out() {
    let cluster = Cluster::start().await;
    let (leader, follower) = (&cluster.addresses[0], &cluster.addresses[1]);
    let body = json!({ "upstream": { "uri": "generator://bank" }, "sink_uri": "blackhole://" }).to_string();
    let feeds = "/api/v2/changefeeds";
    let create = async |address: &str, key: &str, body: &str| {
        let (status, _, text) = send(address, "POST", feeds, &[("idempotency-key", key)], body).await;
        (status.as_u16(), text)
    };
    let first = create(leader, "s3cr3t-key", &body).await;
    assert_eq!(first.0, 200, "{}", first.1);
    let name = serde_json::from_str::<Value>(&first.1).unwrap()["id"].clone();
    let before = operations(&cluster).await;
    cluster.client.post("/api/v2/owner/resign", &json!({})).await.unwrap();
    cluster.eventually("somebody leads", async |client| client.get("/api/v2/health").await.is_ok()).await;
    for address in [follower, leader] {
        assert_eq!(create(address, "s3cr3t-key", &body).await, first);
    }
    assert_eq!(cluster.client.get(feeds).await.unwrap()["total"], 1);
    assert_eq!(operations(&cluster).await, before, "and the list is the same");
    assert_eq!((&before[0]["id"], &before[0]["result"]), (&name, &json!("success")));
    let one = cluster.client.get(&format!("/api/v2/operations/{}", name.as_str().unwrap())).await.unwrap();
    assert_eq!(
        (&one["state"], &one["status"], &one["result"]["id"]),
        (&json!("success"), &json!(200), &name)
    );

    let other = create(leader, "s3cr3t-key", "{}").await;
    assert_eq!((other.0, code_of(&other.1)), (400, "CDC:ErrAPIInvalidParam".to_owned()), "another request");
    assert!(other.1.contains("Idempotency-Key"));
    let another = create(leader, "another", &body).await;
    assert_eq!(another.0, 200, "{}", another.1);
    assert_eq!(cluster.client.get(feeds).await.unwrap()["total"], 2);
    let stored = cluster.client.get("/api/v2/unsafe/metadata").await.unwrap().to_string();
    assert!(stored.contains("/operation/") && !stored.contains("s3cr3t-key"), "a key is a key");
    cluster.stop().await;
}

#[tokio::test]
async fn an_answer_is_kept_for_whoever_asks_with_the_same_key_or_later() {
    let cluster = Cluster::start().await;
    let (leader, follower) = (&cluster.addresses[0], &cluster.addresses[1]);
    let pause = "/api/v2/changefeeds/none/pause";
    let (status, headers, text) =
        send(follower, "POST", pause, &[("prefer", "wait=1, respond-async")], "").await;
    assert_eq!(status, StatusCode::ACCEPTED, "{text}");
    let location = headers.get(header::LOCATION).unwrap().to_str().unwrap().to_owned();
    cluster
        .eventually("it ended", async |client| client.get(&location).await.unwrap()["state"] != "running")
        .await;
    let done = cluster.client.get(&location).await.unwrap();
    assert_eq!((&done["state"], &done["status"]), (&json!("failed"), &json!(400)));
    assert_eq!(done["result"]["error_code"], "CDC:ErrChangeFeedNotExists");

    let count = async || cluster.client.get("/api/v2/operations").await.unwrap()["total"].clone();
    let before = count().await;
    let mut answers = Vec::new();
    for address in [leader, follower, leader] {
        answers.push(send(address, "POST", pause, &[("idempotency-key", "k1")], "").await.2);
    }
    assert!(answers.windows(2).all(|pair| pair[0] == pair[1]), "{answers:?}");
    assert_eq!(count().await.as_u64(), before.as_u64().map(|n| n + 1), "it was done once");
    for bad in ["", &"k".repeat(257)] {
        let (status, _, text) = send(leader, "POST", pause, &[("idempotency-key", bad)], "").await;
        assert_eq!((status, code_of(&text).as_str()), (StatusCode::BAD_REQUEST, "CDC:ErrAPIInvalidParam"));
    }
    assert_eq!(code(cluster.client.get("/api/v2/operations/none").await), "CDC:ErrAPINotFound");
    cluster.stop().await;
}
