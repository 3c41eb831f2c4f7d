//! Changes that are asked for while the leading process is killed.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use testkit::etcd::Etcd;
use testkit::{Millrace, PgServer};

use crate::common::{eventually, send, shown};

/// Creations that are asked for.
const FEEDS: usize = 5;

fn address(node: &Millrace) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], node.api().port()))
}

/// Asks one node after the other, again and again, until one answers for good.
async fn until_answered(addresses: &[SocketAddr], key: &str, body: &str) -> Value {
    for at in 0..600 {
        let headers = format!("Idempotency-Key: {key}\r\n");
        let asked = send(addresses[at % addresses.len()], "POST /api/v2/changefeeds", &headers, body);
        match tokio::time::timeout(Duration::from_secs(20), asked).await {
            Ok(Ok((200, text))) => return serde_json::from_str(&text).unwrap(),
            Ok(Ok((202 | 500.., _)) | Err(_)) | Err(_) => {
                tokio::time::sleep(Duration::from_millis(100)).await
            }
            Ok(Ok((status, text))) => panic!("{status}: {text}"),
        }
    }
    panic!("never answered")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn creations_that_are_repeated_while_leaders_are_killed_leave_one_changefeed_and_one_slot_each() {
    let (etcd, source) = tokio::join!(Etcd::start(), PgServer::start());
    let (etcd, source) = (etcd.unwrap(), source.unwrap());
    source.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY)").await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut nodes = Vec::new();
    for at in 0..2 {
        let own = dir.path().join(format!("n{at}"));
        std::fs::create_dir_all(&own).unwrap();
        let program = Path::new(env!("CARGO_BIN_EXE_millrace"));
        let node = Millrace::new(program, &own).unwrap();
        nodes.push(node.with_arguments(["--store", &etcd.endpoints().join(",")]));
    }
    for node in &mut nodes {
        node.start().await.unwrap();
    }
    let addresses: Vec<SocketAddr> = nodes.iter().map(address).collect();
    // Nobody names them: a repetition that is taken for another request makes another one.
    let body = json!({
        "upstream": { "uri": source.uri("postgres") }, "sink_uri": "blackhole://",
        "replica_config": { "initial_copy": { "enabled": false } },
    })
    .to_string();
    let asking: Vec<_> = (0..FEEDS)
        .map(|at| {
            let (addresses, body) = (addresses.clone(), body.clone());
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(300 * u64::try_from(at).unwrap())).await;
                until_answered(&addresses, &format!("k{at}"), &body).await
            })
        })
        .collect();
    for _ in 0..2 {
        // In the midst of it, wherever that is.
        tokio::time::sleep(Duration::from_millis(700)).await;
        let mut leader = None;
        for (at, address) in addresses.iter().enumerate() {
            if nodes[at].is_started() && shown(*address, "/status").await["is_owner"] == true {
                leader = Some(at);
            }
        }
        if let Some(at) = leader {
            nodes[at].kill().unwrap();
            nodes[at].spawn().unwrap();
        }
    }
    let mut names = Vec::new();
    for asked in asking {
        names.push(asked.await.unwrap()["id"].as_str().unwrap().to_owned());
    }
    names.sort();
    let mut distinct = names.clone();
    distinct.dedup();
    assert_eq!(distinct.len(), FEEDS, "{names:?}");
    eventually("both answer", async || {
        shown(addresses[0], "/api/v2/changefeeds").await["total"] == FEEDS
            && shown(addresses[1], "/api/v2/operations").await["total"].as_u64() >= Some(FEEDS as u64)
    })
    .await;
    let list = shown(addresses[1], "/api/v2/changefeeds").await;
    let mut listed: Vec<&str> =
        list["items"].as_array().unwrap().iter().filter_map(|feed| feed["id"].as_str()).collect();
    listed.sort_unstable();
    assert_eq!(listed, names);
    let client = source.client("postgres").await.unwrap();
    let slots = "SELECT count(*) FROM pg_replication_slots WHERE slot_name LIKE 'millrace_%'";
    assert_eq!(
        client.query_one(slots, &[]).await.unwrap().get::<_, i64>(0),
        FEEDS as i64,
        "no slot is left behind"
    );
}
