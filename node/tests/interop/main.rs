//! A node and a peer that uses nothing of ours but the .proto files: a program in Python, with the gRPC of its
//! distribution. The node is the real transport, orchestrator and maintainer manager; only what lies behind the
//! dispatchers is a fake.

#![expect(clippy::unwrap_used, reason = "a test fails where it cannot go on")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use dispatcher_manager::testing::{FakeSinks, FakeSource};
use dispatcher_manager::{EventSource, SinkFactory};
use dispatcher_orchestrator::Orchestrator;
use heartbeatpb::config::ChangefeedInfo;
use heartbeatpb::{ChangefeedId, MaintainerEpoch, NodeId, RunningError, Ts};
use maintainer::{LivenessCell, MaintainerManager, ManagerConfig, SourceTable, Upstream};
use messaging::grpc::{GrpcTransport, serve};
use messaging::{MessageCenter, MessagingConfig};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio::net::TcpListener;
use tokio::process::Command;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// The whole conversation takes a few seconds.
const DEADLINE: Duration = Duration::from_secs(120);
/// What the peer calls itself.
const PEER: &str = "peer-in-python";

/// Which of the two opens the streams.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Dials {
    Peer,
    Node,
}

/// Nothing is read here: no maintainer is ever started.
struct NoUpstream;

#[async_trait]
impl Upstream for NoUpstream {
    async fn start(
        &self,
        _: &ChangefeedInfo,
        _: Option<MaintainerEpoch>,
        _: Ts,
    ) -> Result<Vec<SourceTable>, RunningError> {
        panic!("the peer starts no maintainer");
    }

    fn confirm(&self, _: &ChangefeedId, _: Option<MaintainerEpoch>, _: Ts) {}

    async fn stop(&self, _: &ChangefeedId, _: Option<MaintainerEpoch>) {}

    fn error(&self, _: &ChangefeedId, _: Option<MaintainerEpoch>) -> Option<RunningError> {
        None
    }

    fn lag_seconds(&self, _: &ChangefeedId, _: Ts) -> Option<f64> {
        None
    }
}

/// A node that serves until it is dropped.
struct Node {
    id: NodeId,
    listens: String,
    members: watch::Sender<Arc<BTreeMap<NodeId, String>>>,
    own: String,
    stop: CancellationToken,
    /// The manager ends with it.
    _nodes: watch::Sender<BTreeSet<NodeId>>,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Node {
    async fn start(dials: Dials) -> Self {
        let id = NodeId::random();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let listens = listener.local_addr().unwrap().to_string();
        // The smaller address dials.
        let own = if dials == Dials::Node { "0.0.0.0:1".to_owned() } else { listens.clone() };
        let center = MessageCenter::new(id.clone(), MessagingConfig::default());
        let (members, list) = watch::channel(Arc::default());
        let transport = GrpcTransport::new(center.clone(), &own, None, list);
        center.connect(transport.handle());
        let stop = CancellationToken::new();
        let (orchestrator, _handle) = Orchestrator::new(
            center.clone(),
            Arc::new(FakeSource::default()) as Arc<dyn EventSource>,
            Arc::new(FakeSinks::default()) as Arc<dyn SinkFactory>,
        );
        let (nodes_sender, nodes) = watch::channel(BTreeSet::from([id.clone()]));
        let config = ManagerConfig { node_epoch: 11, liveness: Arc::new(LivenessCell::default()), nodes };
        let manager = MaintainerManager::new(center, Arc::new(NoUpstream), config);
        tokio::spawn(transport.clone().run(stop.clone()));
        tokio::spawn(orchestrator.run(stop.clone()));
        tokio::spawn(manager.run(stop.clone()));
        let serving = stop.clone();
        tokio::spawn(async move { serve(listener, &transport, None, serving).await.unwrap() });
        Self { id, listens, members, own, stop, _nodes: nodes_sender }
    }

    fn knows_the_peer_at(&self, address: &str) {
        let list = [(self.id.clone(), self.own.clone()), (PEER.into(), address.to_owned())];
        self.members.send_replace(Arc::new(list.into()));
    }
}

/// The interpreter that has its distribution's gRPC.
fn python() -> PathBuf {
    let folder =
        std::env::var_os("MILLRACE_TEST_PYTHON_BIN").map_or_else(|| "/usr/bin".into(), PathBuf::from);
    folder.join("python3")
}

/// Lets the peer talk to a node and gives what it said, line by line.
async fn converse(dials: Dials) -> Vec<String> {
    let node = Node::start(dials).await;
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let out = tempfile::tempdir().unwrap();
    let mut peer = Command::new(python())
        .arg(here.join("tests/interop/peer.py"))
        .arg(here.parent().unwrap().join("heartbeatpb/proto"))
        .arg(out.path())
        .args([node.id.as_str(), &node.listens, if dials == Dials::Peer { "dial" } else { "accept" }])
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("python3, python3-grpcio and protobuf-compiler are installed");
    if dials == Dials::Peer {
        // Nobody can reach it there: it is the one that dials.
        node.knows_the_peer_at("0.0.0.0:1");
    }
    let mut lines = BufReader::new(peer.stdout.take().unwrap()).lines();
    let mut stderr = peer.stderr.take().unwrap();
    let errors = tokio::spawn(async move {
        let mut text = String::new();
        stderr.read_to_string(&mut text).await.map(|_| text)
    });
    let mut said = Vec::new();
    while let Some(line) = lines.next_line().await.unwrap() {
        match line.strip_prefix("listening ") {
            Some(address) => node.knows_the_peer_at(address),
            None => said.push(line),
        }
    }
    let status = peer.wait().await.unwrap();
    let errors = errors.await.unwrap().unwrap();
    assert!(status.success(), "the peer ended with {status} after {said:?}:\n{errors}");
    said
}

const CONVERSATION: [&str; 7] = [
    "greeted",
    "known as coordinator",
    "drain target applied, and the stale one not",
    "dispatcher manager bootstrapped",
    "dispatchers created",
    "fenced by the newer owner",
    "closed",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_is_not_ours_dials_and_drives_a_dispatcher_manager() {
    let said = timeout(DEADLINE, converse(Dials::Peer)).await.expect("in time");
    assert_eq!(said[..7], CONVERSATION);
    assert_eq!(said[7..], ["done"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_is_not_ours_is_dialled_and_drives_a_dispatcher_manager() {
    let said = timeout(DEADLINE, converse(Dials::Node)).await.expect("in time");
    assert_eq!(said[..7], CONVERSATION);
    assert_eq!(said[7..], ["done"]);
}
