//! How the server's process ends, and what it says.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use coordinator::Layout;
use coordinator::backend::Store as _;
use coordinator::backend::etcd::{self, EtcdConfig};
use testkit::etcd::Etcd;
use testkit::{Api, Millrace};

use crate::common::eventually;

const PATIENCE: Duration = Duration::from_secs(60);

fn server(dir: &Path, port: u16, more: &[&str]) -> Child {
    let log = std::fs::File::options().create(true).append(true).open(dir.join("log")).unwrap();
    Command::new(env!("CARGO_BIN_EXE_millrace"))
        .args(["server", "--addr", &format!("127.0.0.1:{port}"), "--data-dir"])
        .arg(dir.join("data"))
        .args(more)
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap()
}

fn signal(child: &Child, name: &str) {
    let script = format!("kill -{name} {}", child.id());
    assert!(Command::new("sh").args(["-c", &script]).status().unwrap().success());
}

/// Its exit code, once it has ended.
async fn code(mut child: Child) -> Option<i32> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("the server did not end");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

async fn ready(port: u16) {
    let api = Api::new(port);
    eventually("the server is ready", async || api.get("/api/v2/changefeeds").await.is_ok()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
// behaviour: api-S-3
async fn a_server_ends_with_zero_only_when_it_was_asked_to_stop() {
    let dir = tempfile::tempdir().unwrap();
    let log = || std::fs::read_to_string(dir.path().join("log")).unwrap_or_default();
    for name in ["TERM", "INT"] {
        let port = free_port();
        let running = server(dir.path(), port, &[]);
        ready(port).await;
        signal(&running, name);
        assert_eq!(code(running).await, Some(0), "{name}: {}", log());
    }
    // It cannot begin.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let refused = server(dir.path(), taken.local_addr().unwrap().port(), &[]);
    assert_eq!(code(refused).await, Some(1));
    assert!(log().contains("cannot listen on"), "{}", log());
    assert_eq!(code(server(dir.path(), 0, &["--log-level", "a=b=c"])).await, Some(1));
    // It cannot go on: somebody has ended its lease, and others may have its work.
    let etcd = Etcd::start().await.unwrap();
    let endpoints = etcd.endpoints();
    let port = free_port();
    let running = server(dir.path(), port, &["--store", &endpoints.join(",")]);
    ready(port).await;
    let store = etcd::connect(EtcdConfig::new(&endpoints)).await.unwrap();
    let registered = store.scan(&Layout::new("default").unwrap().capture_prefix()).await.unwrap().found;
    store.revoke(registered[0].lease.unwrap()).await.unwrap();
    assert_eq!(code(running).await, Some(1), "{}", log());
    assert!(log().contains("CDC:ErrCaptureSuicide"), "{}", log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_writes_what_it_knows_into_its_log_when_it_is_signalled() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Millrace::new(Path::new(env!("CARGO_BIN_EXE_millrace")), dir.path()).unwrap();
    server.start().await.unwrap();
    server.signal("USR1").unwrap();
    let log = || std::fs::read_to_string(server.log_path()).unwrap_or_default();
    eventually("the log has it", async || log().contains("coordinator: here")).await;
    for words in ["task \\\"port\\\" running", "runtime got on", "drain: none", "node "] {
        assert!(log().contains(words), "{words}: {}", log());
    }
    let runtime = server.api().get("/debug/runtime").await.unwrap();
    let names: Vec<&str> =
        runtime["tasks"].as_array().unwrap().iter().filter_map(|task| task["name"].as_str()).collect();
    for name in ["coordinator", "maintainer manager", "dispatcher orchestrator", "log service", "port"] {
        assert!(names.contains(&name), "{name}: {runtime}");
    }
    assert!(runtime["tasks"].as_array().unwrap().iter().all(|task| task["running"] == true), "{runtime}");
    server.stop().await.unwrap();
}
