//! What these tests share: nodes over one store, and plain HTTP.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use coordinator::Layout;
use coordinator::backend::memory::{self, Disk};
use coordinator::backend::{Op, Store, Txn};
use heartbeatpb::config::{
    ChangefeedInfo, ChangefeedState, ChangefeedStatusDoc, ReplicaConfig, UpstreamInfo,
};
use heartbeatpb::{ChangefeedId, Ts};
use node::config::ServerConfig;
use node::{Node, Surroundings};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// How long a state may take to come: the machines that run this are busy.
const PATIENCE: Duration = Duration::from_secs(90);

/// Waits for a state; fails with its name.
pub(crate) async fn eventually(what: &str, mut probe: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !probe().await {
        assert!(Instant::now() < deadline, "never came true: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A store that several nodes may share.
pub(crate) fn store() -> Arc<dyn Store> {
    Arc::new(memory::open(&Disk::new()).unwrap())
}

pub(crate) fn layout() -> Layout {
    Layout::new("default").unwrap()
}

/// Stores documents as they are.
pub(crate) async fn put(store: &dyn Store, then: Vec<Op>) {
    assert!(store.txn(Txn { then, ..Txn::default() }).await.unwrap().succeeded);
}

/// Documents of a changefeed in a state, as an earlier coordinator may have left them.
pub(crate) fn documents(info: &ChangefeedInfo) -> Vec<Op> {
    let (layout, name) = (layout(), &*info.id.name);
    let status = ChangefeedStatusDoc::at(info.start_ts, info.epoch);
    vec![
        Op::put(layout.info("default", name), info.to_json()),
        Op::put(layout.status("default", name), status.to_json()),
    ]
}

/// A changefeed from a generator that changes nothing to nowhere.
pub(crate) fn described(name: &str, state: ChangefeedState) -> ChangefeedInfo {
    let upstream = UpstreamInfo {
        kind: "generator".to_owned(),
        uri: "generator://bank?rate=1".to_owned(),
        ..UpstreamInfo::default()
    };
    let id = ChangefeedId::fresh(name);
    let mut info = ChangefeedInfo::new(id, upstream, "blackhole://", ReplicaConfig::default(), Ts(1));
    info.state = state;
    info
}

/// A changefeed as it is stored.
pub(crate) async fn stored(store: &dyn Store, name: &str) -> Option<ChangefeedInfo> {
    let found = store.get(&layout().info("default", name)).await.unwrap().found?;
    Some(ChangefeedInfo::from_json(&found.value, "default", name).unwrap().0)
}

/// A node with a store that it may share.
pub(crate) async fn start(dir: &Path, store: &Arc<dyn Store>, config: ServerConfig) -> Node {
    let config = ServerConfig { addr: "127.0.0.1:0".to_owned(), data_dir: dir.to_owned(), ..config };
    let surroundings = Surroundings { store: Some(Arc::clone(store)), ..Surroundings::default() };
    let node = Node::start_in(config, surroundings).await.unwrap();
    let address = node.address();
    eventually("the cluster answers", async || ask(address, "GET", "/api/v2/health").await.0 == 200).await;
    node
}

/// A request, its headers with line ends behind each; status and body.
pub(crate) async fn send(
    address: SocketAddr,
    request: &str,
    headers: &str,
    body: &str,
) -> std::io::Result<(u16, String)> {
    let mut stream = TcpStream::connect(address).await?;
    let length = body.len();
    let text = format!(
        "{request} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n{body}"
    );
    stream.write_all(text.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    let text = String::from_utf8_lossy(&answer).into_owned();
    let status = text.split(' ').nth(1).and_then(|code| code.parse().ok());
    let status = status.ok_or(std::io::ErrorKind::UnexpectedEof)?;
    // Everything behind the headers, chunk lengths included: what is looked for is in it either way.
    let body = text.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    Ok((status, body.to_owned()))
}

/// The same without headers and body.
pub(crate) async fn ask(address: SocketAddr, method: &str, path: &str) -> (u16, String) {
    send(address, &format!("{method} {path}"), "", "").await.unwrap_or_default()
}

/// The same with a JSON body.
pub(crate) async fn tell(address: SocketAddr, method: &str, path: &str, body: &Value) -> (u16, Value) {
    let answer = send(address, &format!("{method} {path}"), "", &body.to_string()).await.unwrap();
    (answer.0, serde_json::from_str(&answer.1).unwrap_or(Value::Null))
}

/// What a path shows.
pub(crate) async fn shown(address: SocketAddr, path: &str) -> Value {
    serde_json::from_str(&ask(address, "GET", path).await.1).unwrap_or(Value::Null)
}

/// Code of an error answer.
pub(crate) fn code(answer: &Value) -> &str {
    answer["error_code"].as_str().unwrap_or_default()
}
