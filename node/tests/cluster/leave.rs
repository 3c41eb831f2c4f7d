//! Nodes that leave in order: drained, or told to stop.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::common::{Cluster, copying, eventually};

/// Between two questions of whoever drains.
const POLL: Duration = Duration::from_millis(300);

/// Empties a node as a rolling upgrade does, the one that leads included.
async fn drain(cluster: &Cluster, at: usize) {
    let id = cluster.id(at).await;
    let other = &cluster.nodes[(at + 1) % cluster.nodes.len()];
    let began = Instant::now();
    if cluster.leader().await == at {
        cluster.nodes[at].api().post("/api/v2/owner/resign", &json!({})).await.unwrap();
    }
    eventually("the node is empty", async || {
        tokio::time::sleep(POLL).await;
        let left = other.api().put(&format!("/api/v2/captures/{id}/drain"), &json!({})).await;
        left.is_ok_and(|left| left["current_table_count"] == 0)
    })
    .await;
    println!("node {at} was empty after {:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn every_node_is_drained_stopped_and_started_in_turn() {
    let mut cluster = Cluster::start(3, "").await;
    cluster.create(0, &copying()).await;
    let load = cluster.load(11, 150).await;
    cluster.caught_up().await;
    for at in 0..3 {
        drain(&cluster, at).await;
        cluster.nodes[at].stop().await.unwrap();
        let outage = cluster.outage().await;
        println!("rows waited {outage:?} after node {at} had left");
        cluster.nodes[at].start().await.unwrap();
        cluster.sees(at, 3).await;
    }
    load.stop().await.unwrap();
    cluster.equal().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_told_to_stop_says_goodbye_when_it_writes_no_more() {
    // So long that whoever waits for the lease is found out.
    let mut cluster = Cluster::start(3, "capture-session-ttl = \"60s\"").await;
    cluster.create(0, &copying()).await;
    let load = cluster.load(12, 150).await;
    cluster.caught_up().await;
    for role in ["maintainer", "leader"] {
        let at = if role == "leader" { cluster.leader().await } else { cluster.maintainer().await };
        cluster.nodes[at].stop().await.unwrap();
        let outage = cluster.outage().await;
        println!("rows waited {outage:?} after the {role} was told to stop");
        assert!(outage < Duration::from_secs(20), "rows waited {outage:?}: for the lease");
        cluster.nodes[at].start().await.unwrap();
        cluster.sees(at, 3).await;
    }
    load.stop().await.unwrap();
    cluster.equal().await;
}
