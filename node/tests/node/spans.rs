//! A table that is divided into key ranges and joined again while its rows change, also through a restart.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use node::cli::Client;
use serde_json::json;
use testkit::{PgServer, Random};

use crate::common::{TARGET, assert_same, caught_up, create, eventually, servers, start};

const FEED: &str = "/api/v2/changefeeds/f";
/// Keys of the table are below this number, or above it after they were changed.
const KEYS: u64 = 5_000;

/// Changes rows of `hot` until told to stop: values, keys that move to the other end of the table, deletions,
/// insertions.
async fn change(source: &PgServer, seed: u64, stop: Arc<AtomicBool>) -> tokio::task::JoinHandle<u64> {
    let client = source.client("postgres").await.unwrap();
    tokio::spawn(async move {
        let (mut random, mut statements) = (Random::new(seed, 0), 0);
        while !stop.load(Ordering::Relaxed) {
            let (key, range) = (random.between(1, KEYS), random.between(1, 20));
            let statement = match random.between(0, 9) {
                0..=4 => format!("UPDATE hot SET n = n + 1 WHERE id BETWEEN {key} AND {}", key + range),
                5 | 6 => format!("UPDATE hot SET id = {} - id WHERE id = {key}", 3 * KEYS),
                7 => format!("DELETE FROM hot WHERE id = {key}"),
                _ => format!(
                    "INSERT INTO hot SELECT {key}, 'again', 0 WHERE NOT EXISTS (SELECT FROM hot WHERE id = {key}) \
                     ON CONFLICT DO NOTHING"
                ),
            };
            // The others may have moved a row to the same key, or hold it: then this one did nothing.
            statements += u64::from(client.batch_execute(&statement).await.is_ok());
        }
        statements
    })
}

async fn dispatchers(client: &Client) -> u64 {
    let count = client.get(&format!("{FEED}/get_dispatcher_count")).await.unwrap();
    count["count"].as_u64().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hot_table_is_divided_and_joined_while_rows_flow_and_nothing_is_lost_or_doubled() {
    let (source, target) = servers().await;
    source
        .sql(
            "postgres",
            &format!(
                "CREATE TABLE hot (id bigint PRIMARY KEY, v text, n bigint); \
                 INSERT INTO hot SELECT g, repeat('v', 30), 0 FROM generate_series(1, {KEYS}) g; ANALYZE hot"
            ),
        )
        .await
        .unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (node, client) = start(dir.path()).await;
    let scheduler =
        json!({ "enable_table_across_nodes": true, "region_threshold": 0, "write_key_threshold": 0 });
    create(&client, &source, &target.uri(TARGET), json!({ "scheduler": scheduler })).await.unwrap();
    caught_up(&client, &source).await;
    let tables = client.get(&format!("{FEED}/tables")).await.unwrap();
    let table = tables["items"][0]["table_ids"].as_array().unwrap().iter().filter_map(|id| id.as_i64()).max();
    let table = table.expect("the table is replicated");
    let (split, merge) = (
        format!("{FEED}/split_table_by_region_count?tableID={table}"),
        format!("{FEED}/merge_table?tableID={table}"),
    );

    let stop = Arc::new(AtomicBool::new(false));
    let load = [change(&source, 1, Arc::clone(&stop)).await, change(&source, 2, Arc::clone(&stop)).await];
    for _ in 0..3 {
        client.post(&split, &json!({})).await.unwrap();
        eventually("the table is in parts", async || dispatchers(&client).await > 2).await;
        caught_up(&client, &source).await;
        eventually("the parts are one again", async || {
            // Refused while a part stands at something; asked again until there is one part.
            let _ = client.post(&merge, &json!({})).await;
            dispatchers(&client).await == 2
        })
        .await;
        caught_up(&client, &source).await;
    }

    // The end of the process finds the table in parts, and the next one goes on with it whole or divided.
    client.post(&split, &json!({})).await.unwrap();
    node.stop().await.unwrap();
    let (node, client) = start(dir.path()).await;
    eventually("the changefeed runs again", async || {
        client.get(&format!("{FEED}/get_dispatcher_count")).await.is_ok()
    })
    .await;
    caught_up(&client, &source).await;
    stop.store(true, Ordering::Relaxed);
    let mut statements = 0;
    for task in load {
        statements += task.await.unwrap();
    }
    assert!(statements > 100, "the table was hot: {statements}");
    caught_up(&client, &source).await;
    assert_same(&source, &target, "hot", "after it was divided and joined").await;
    node.stop().await.unwrap();
}
