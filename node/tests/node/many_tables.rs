//! A source with very many tables: what it takes to begin, to stand idle, and to go on. Run by hand, for its figures:
//!
//! `cargo test --release -p node --test node -- --ignored --nocapture fifty_thousand_tables`

use std::time::{Duration, Instant};

use node::cli::Client;
use serde_json::json;
use testkit::{Millrace, PgServer};

use crate::common::position;
use crate::large::program;

/// `MILLRACE_TEST_TABLES` names another number.
const TABLES: usize = 50_000;
/// So many are created in one statement, and as many of them get a row at the end.
const AT_ONCE: usize = 500;
const IDLE: Duration = Duration::from_secs(20);
const PATIENCE: Duration = Duration::from_secs(1800);

async fn source(tables: usize) -> PgServer {
    // Publishing a table takes a lock until the end of the statement.
    let server = PgServer::builder()
        .setting("max_locks_per_transaction", "2000")
        .setting("shared_buffers", "256MB")
        .start()
        .await
        .unwrap();
    let client = server.client("postgres").await.unwrap();
    for first in (0..tables).step_by(AT_ONCE) {
        let sql = format!(
            "DO $do$ BEGIN FOR i IN {first} .. {} LOOP EXECUTE format( \
             'CREATE TABLE t%s (id bigint PRIMARY KEY, name text NOT NULL, price numeric, at timestamptz)', i); \
             END LOOP; END $do$",
            (first + AT_ONCE).min(tables) - 1
        );
        client.batch_execute(&sql).await.unwrap();
    }
    server
}

/// One changefeed of all tables, with or without the capture of schema changes; `ids` are those of three rows.
async fn measure(source: &PgServer, capture: &str, ids: [u32; 3]) {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Millrace::new(&program(), dir.path()).unwrap();
    server.start().await.unwrap();
    let empty = server.peak_bytes();
    let api = server.api();
    let client = source.client("postgres").await.unwrap();
    let begun = Instant::now();
    let config = json!({ "initial_copy": { "enabled": false }, "ddl": { "capture": capture } });
    let body = json!({ "changefeed_id": "f", "sink_uri": "blackhole://",
        "upstream": { "uri": source.uri("postgres") }, "replica_config": config });
    let commands = Client::new(&api.base()).unwrap();
    commands.post("/api/v2/changefeeds", &body).await.unwrap();
    let created = begun.elapsed();
    let reach = async |end: u64| {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let progress = api.progress("f").await.unwrap();
            assert_ne!(progress.state, "failed", "{}", progress.all);
            if progress.checkpoint >= end {
                return;
            }
            assert!(Instant::now() < deadline, "{}", progress.all);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let insert = async |table: usize, id: u32| {
        client.batch_execute(&format!("INSERT INTO t{table} VALUES ({id}, 'a', 1, now())")).await.unwrap();
    };
    insert(0, ids[0]).await;
    reach(position(&client).await).await;
    let flowing = begun.elapsed();
    let peak = server.peak_bytes();
    let before = server.usage().unwrap();
    tokio::time::sleep(IDLE).await;
    let after = server.usage().unwrap();
    let changed = Instant::now();
    for table in 0..AT_ONCE {
        insert(table, ids[1]).await;
    }
    reach(position(&client).await).await;
    let changed = changed.elapsed();
    let restarted = Instant::now();
    server.stop().await.unwrap();
    server.start().await.unwrap();
    insert(0, ids[2]).await;
    reach(position(&client).await).await;
    println!(
        "capture {capture}: created after {:.1} s, first row after {:.1} s, {} MiB ({} MiB before), idle {:.1} ms of \
         processor time in a second, {AT_ONCE} rows of as many tables after {:.1} s, again after a restart {:.1} s",
        created.as_secs_f64(),
        flowing.as_secs_f64(),
        peak >> 20,
        empty >> 20,
        (after.cpu_seconds - before.cpu_seconds) * 1000.0 / IDLE.as_secs_f64(),
        changed.as_secs_f64(),
        restarted.elapsed().as_secs_f64(),
    );
    commands.delete("/api/v2/changefeeds/f").await.unwrap();
    server.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes; docs/postgresql.md has figures of the same load"]
async fn fifty_thousand_tables_begin_stand_idle_and_go_on() {
    let tables =
        std::env::var("MILLRACE_TEST_TABLES").ok().and_then(|text| text.parse().ok()).unwrap_or(TABLES);
    let source = source(tables).await;
    println!("{tables} tables");
    for (capture, ids) in [("off", [1, 2, 3]), ("auto", [4, 5, 6])] {
        measure(&source, capture, ids).await;
    }
}
