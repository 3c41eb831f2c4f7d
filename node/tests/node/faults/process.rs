//! The process is killed, in the copy and in the stream, and started again on its data directory.

use std::path::Path;
use std::time::Duration;

use serde_json::json;
use testkit::{Load, Millrace, compare, load};

use crate::common::{TARGET, eventually, position, servers};

/// Rows before the load: the copy of so many lasts long enough to be met.
const ROWS: u64 = 30_000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_is_killed_in_the_copy_and_in_the_stream_goes_on_where_it_was() {
    let (source, target) = servers().await;
    let upstream = source.client("postgres").await.unwrap();
    load::prepare(&upstream, ROWS).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut millrace = Millrace::new(Path::new(env!("CARGO_BIN_EXE_millrace")), dir.path()).unwrap();
    millrace.start().await.unwrap();
    let api = millrace.api();
    let config = json!({ "force_replicate": true, "initial_copy": { "parallel": 1 } });
    let info = api.create("f", &source.uri("postgres"), &target.uri(TARGET), &config).await.unwrap();
    let start = info["start_ts"].as_u64().unwrap();
    let running = Load::start(&source, "postgres", 11, 3, 120, ROWS).await.unwrap();

    let mut met = None;
    eventually("the copy runs", async || {
        let progress = api.progress("f").await.unwrap();
        met = Some((progress.copy_rows, progress.checkpoint));
        progress.copy_rows > 0
    })
    .await;
    millrace.kill().unwrap();
    let (copied, checkpoint) = met.unwrap();
    assert_eq!(checkpoint, start, "the kill came after the copy, which had {copied} rows");
    millrace.start().await.unwrap();
    eventually("the copy is complete", async || api.progress("f").await.unwrap().checkpoint > start).await;

    for _ in 0..3 {
        let before = api.progress("f").await.unwrap().checkpoint;
        eventually("the stream goes on", async || api.progress("f").await.unwrap().checkpoint > before).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        millrace.kill().unwrap();
        millrace.start().await.unwrap();
    }

    let stats = running.stop().await.unwrap();
    assert!(stats.transactions > 0, "{stats:?}");
    let end = position(&upstream).await;
    eventually("everything is downstream", async || api.progress("f").await.unwrap().checkpoint >= end).await;
    let downstream = target.client(TARGET).await.unwrap();
    let comparison = compare(&upstream, &downstream, &load::TABLES).await.unwrap();
    assert!(comparison.equal(), "{comparison}\n{}", millrace.log_tail(40));
    assert_eq!(api.progress("f").await.unwrap().state, "normal");
    millrace.stop().await.unwrap();
}
