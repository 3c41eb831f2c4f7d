//! The API of a cluster of three nodes on an in-memory network: nodes are drained by request and by command.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use coordinator::{CoordinatorConfig, Election, Layout, Neighbours};
use heartbeatpb::{NodeId, NodeLiveness};
use logservice::{LogConfig, LogService};
use maintainer::{LivenessCell, MaintainerManager, ManagerConfig};
use messaging::testing::Network;
use messaging::{MessageCenter, MessagingConfig};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::{Access, ApiState, router};
use crate::cli::{ApiError, CliArgs, CliError, Client};
use crate::config::{SecuritySection, UpstreamSection};
use crate::upstream::UpstreamHub;

const LEADER: &str = "n1";

struct Cluster {
    client: Client,
    address: String,
    /// Of every node, the leader first.
    addresses: Vec<String>,
    leading: watch::Sender<Option<NodeId>>,
    nodes: BTreeMap<&'static str, Arc<LivenessCell>>,
    alive: watch::Sender<BTreeSet<NodeId>>,
    members: watch::Sender<coordinator::Members>,
    network: Network,
    stop: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
    _dir: tempfile::TempDir,
    _liveness: watch::Sender<NodeLiveness>,
}

#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    cli: CliArgs,
}

impl Cluster {
    async fn start() -> Self {
        Self::start_with(&SecuritySection::default()).await
    }

    async fn start_with(security: &SecuritySection) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (network, stop) = (Network::new(1), CancellationToken::new());
        let names = [LEADER, "n2", "n3"];
        let alive = watch::Sender::new(names.iter().map(|name| NodeId::from(*name)).collect());
        let mut ports = Vec::new();
        for _ in names {
            ports.push(tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap());
        }
        let addresses: Vec<String> =
            ports.iter().map(|port| port.local_addr().unwrap().to_string()).collect();
        let known =
            names.iter().zip(&addresses).map(|(name, at)| (NodeId::from(*name), at.clone())).collect();
        let members = watch::Sender::new(Arc::new(known));
        let leading = watch::Sender::new(Some(NodeId::from(LEADER)));
        let mut tasks = Vec::new();
        let mut nodes = BTreeMap::new();
        let mut state = None;
        let mut followers = Vec::new();
        for name in names {
            let center = MessageCenter::new(name.into(), MessagingConfig::default());
            network.join(&center);
            let log = LogService::new(
                center.clone(),
                LogConfig { dir: dir.path().join(name), memory_bytes: 1 << 20, disk_bytes: 1 << 20 },
            );
            let hub = Arc::new(UpstreamHub::new(name.into(), log));
            let liveness = Arc::new(LivenessCell::default());
            nodes.insert(name, Arc::clone(&liveness));
            let config =
                ManagerConfig { node_epoch: 7, liveness: Arc::clone(&liveness), nodes: alive.subscribe() };
            let upstream = Arc::clone(&hub) as Arc<dyn maintainer::Upstream>;
            let manager = MaintainerManager::new(center.clone(), upstream, config);
            let placements = manager.placements();
            tasks.push(tokio::spawn(manager.run(stop.clone())));
            if name == LEADER {
                state = Some((center, hub, liveness, placements));
            } else {
                followers.push((name, hub, liveness, placements));
            }
        }
        let (center, upstreams, liveness, placements) = state.unwrap();
        let neighbours = Neighbours {
            center,
            members: members.subscribe(),
            retention: Arc::clone(&upstreams) as Arc<dyn coordinator::RetentionHook>,
            clock: Arc::clone(&upstreams) as Arc<dyn coordinator::UpstreamClock>,
        };
        let config = CoordinatorConfig { tick: Duration::from_millis(20), ..CoordinatorConfig::default() };
        let store: Arc<dyn coordinator::backend::Store> =
            Arc::new(coordinator::backend::memory::open(&coordinator::backend::memory::Disk::new()).unwrap());
        let liveness_view = watch::Sender::new(NodeLiveness::Alive);
        let session = store.session(config.session_ttl).await.unwrap();
        let layout = Layout::new("default").unwrap();
        let (election, leader) =
            Election::new(Arc::clone(&store), layout.clone(), neighbours, config, liveness_view.subscribe());
        let stopped = stop.clone();
        tasks.push(tokio::spawn(async move { election.run(session, stopped).await.unwrap() }));
        followers.insert(0, (LEADER, upstreams, liveness, placements));
        let bank =
            UpstreamSection { uri: "generator://bank?seed=3".to_owned(), ..UpstreamSection::default() };
        for ((name, upstreams, liveness, placements), port) in followers.into_iter().zip(ports) {
            let leads = name == LEADER;
            let app = router(Arc::new(ApiState {
                node: name.into(),
                members: members.subscribe(),
                leading: leading.subscribe(),
                cluster_id: "default".to_owned(),
                config: json!({}),
                data_dir: dir.path().join("sink"),
                started: Instant::now(),
                leader: if leads { leader.clone() } else { watch::channel(None).1 },
                upstreams,
                verifications: crate::verification::Verifications::default(),
                placements,
                metrics: crate::telemetry::init_metrics().unwrap(),
                liveness,
                access: Access::new(security).unwrap(),
                tls: None,
                store: Arc::clone(&store),
                layout: layout.clone(),
                lease: Arc::new(crate::wiring::Lease::new()),
                unreached: watch::channel(std::collections::BTreeSet::new()).1,
                named: [("bank".to_owned(), bank.clone())].into(),
                tasks: Arc::default(),
                looking: tokio::sync::Semaphore::new(1),
            }));
            tasks.push(tokio::spawn(crate::serve::Server::new(port, app).run(stop.clone())));
        }
        let address = format!("http://{}", addresses[0]);
        let client = Client::new(&address).unwrap();
        let cluster = Self {
            client,
            address,
            addresses,
            leading,
            nodes,
            alive,
            members,
            network,
            stop,
            tasks,
            _dir: dir,
            _liveness: liveness_view,
        };
        cluster.eventually("it is healthy", async |client| client.get("/api/v2/health").await.is_ok()).await;
        cluster
    }

    async fn eventually(&self, what: &str, mut probe: impl AsyncFnMut(&Client) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !probe(&self.client).await {
            assert!(Instant::now() < deadline, "never came true: {what}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// A node is gone.
    fn leave(&self, name: &str) {
        let gone = NodeId::from(name);
        self.network.leave(&gone);
        self.alive.send_modify(|alive| {
            alive.remove(&gone);
        });
        let mut left = (**self.members.borrow()).clone();
        left.remove(&gone);
        self.members.send_replace(Arc::new(left));
    }

    async fn command(&self, words: &[&str]) -> Result<(), CliError> {
        let all = [&["millrace", "--server", self.address.as_str()][..], words].concat();
        crate::cli::run(Arguments::parse_from(all).cli).await
    }

    async fn stop(self) {
        self.stop.cancel();
        for task in self.tasks {
            task.abort();
        }
    }
}

fn drain(node: &str) -> String {
    format!("/api/v2/captures/{node}/drain")
}

mod debug;
mod forwarding;
mod operations;

fn code(result: Result<Value, ApiError>) -> String {
    result.unwrap_err().code().to_owned()
}

#[tokio::test]
async fn a_node_is_drained_by_request_until_nothing_remains() {
    let cluster = Cluster::start().await;
    let client = &cluster.client;
    let captures = client.get("/api/v2/captures").await.unwrap();
    let bare = client.get("/api/v1/captures").await.unwrap();
    assert_eq!((&captures["total"], &captures["items"]), (&json!(3), &bare));
    let owners: Vec<&Value> = bare.as_array().unwrap().iter().map(|node| &node["is_owner"]).collect();
    assert_eq!(owners, [true, false, false]);
    assert_eq!(bare[1]["address"], cluster.addresses[1]);

    assert_eq!(code(client.get(&drain("n2")).await), "CDC:ErrSchedulerRequestFailed", "none is under way");
    // Other nodes may not have said what they can do: something remains.
    cluster
        .eventually("n2 is empty and knows it", async |client| {
            let answer = client.put(&drain("n2"), &json!({})).await.unwrap();
            answer["current_table_count"] == 0
        })
        .await;
    assert_eq!(cluster.nodes["n2"].get(), NodeLiveness::Stopping);
    let progress = client.get(&drain("n2")).await.unwrap();
    assert_eq!(
        progress,
        json!({
            "current_table_count": 0, "maintainers": 0, "operators": 0, "dispatchers": 0,
            "inflight_moves": 0, "pending_changefeeds": 0, "state": "stopping",
        })
    );
    let old = client.put("/api/v1/captures/drain", &json!({ "capture_id": "n2" })).await.unwrap();
    assert_eq!(old, json!({ "current_table_count": 0 }));

    // One drain at a time, and the next says what it waits for.
    let other = client.put(&drain("n3"), &json!({})).await.unwrap();
    assert_eq!(
        (&other["current_table_count"], &other["waiting_for"]),
        (&json!(1), &json!("the drain of node n2 to end"))
    );
    assert_eq!(cluster.nodes["n3"].get(), NodeLiveness::Alive);
    cluster.leave("n2");
    cluster
        .eventually("the end of the drain is known", async |client| {
            code(client.get(&drain("n2")).await) == "CDC:ErrSchedulerRequestFailed"
        })
        .await;
    let again = client.put(&drain("n2"), &json!({})).await.unwrap();
    assert_eq!(again["current_table_count"], 0, "it was drained and it is gone");
    cluster.stop().await;
}

#[tokio::test]
async fn drains_that_cannot_be_are_refused_with_a_code() {
    let cluster = Cluster::start().await;
    let client = &cluster.client;
    let owner = client.put(&drain(LEADER), &json!({})).await;
    let words = owner.as_ref().unwrap_err().to_string();
    assert!(words.contains("cannot drain the owner") && words.contains("/api/v2/owner/resign"), "{words}");
    assert_eq!(code(owner), "CDC:ErrSchedulerRequestFailed");
    assert_eq!(code(client.put(&drain("n9"), &json!({})).await), "CDC:ErrCaptureNotExist");
    assert_eq!(code(client.delete(&drain("n2")).await), "CDC:ErrSchedulerRequestFailed", "none is under way");
    let old = "/api/v1/captures/drain";
    for (body, expected) in [
        (json!({ "capture_id": LEADER }), "CDC:ErrSchedulerRequestFailed"),
        (json!({ "capture_id": "n9" }), "CDC:ErrCaptureNotExist"),
        (json!({ "capture_id": "" }), "CDC:ErrAPIInvalidParam"),
        (json!({ "capture_id": "a b" }), "CDC:ErrAPIInvalidParam"),
        (json!({ "capture_id": 7 }), "CDC:ErrAPIInvalidParam"),
        (json!({}), "CDC:ErrAPIInvalidParam"),
        (json!([]), "CDC:ErrAPIInvalidParam"),
    ] {
        assert_eq!(code(client.put(old, &body).await), expected, "{body}");
    }
    for bad in ["a%20b", "%00", "a%2Fb", "%FF", &"a".repeat(129)] {
        for result in [
            client.put(&drain(bad), &json!({})).await,
            client.get(&drain(bad)).await,
            client.delete(&drain(bad)).await,
        ] {
            assert_eq!(code(result), "CDC:ErrAPIInvalidParam", "{bad}");
        }
    }
    assert!(cluster.nodes.values().all(|node| node.get() == NodeLiveness::Alive));
    cluster.stop().await;
}

#[tokio::test]
async fn the_command_waits_for_a_drain_and_takes_it_back() {
    let cluster = Cluster::start().await;
    let drain_n2 = ["capture", "drain", "--capture-id", "n2", "--interval", "20ms"];
    cluster.command(&drain_n2).await.unwrap();
    assert_eq!(cluster.nodes["n2"].get(), NodeLiveness::Stopping);
    let n3 = ["capture", "drain", "--capture-id", "n3"];
    let late = cluster.command(&[&n3[..], &["--interval", "20ms", "--timeout", "1s"]].concat()).await;
    assert!(late.unwrap_err().to_string().contains("1 remaining"), "the drain of n2 is under way");
    let refused = cluster.command(&[&n3[..], &["--cancel"]].concat()).await.unwrap_err();
    assert!(refused.to_string().contains("no drain of this node is under way"), "{refused}");
    cluster.command(&["capture", "drain", "--capture-id", "n2", "--cancel"]).await.unwrap();
    cluster.command(&[&n3[..], &["--interval", "20ms"]].concat()).await.unwrap();
    let unknown = cluster.command(&["capture", "drain", "--capture-id", "n9"]).await.unwrap_err();
    assert!(unknown.to_string().contains("n9 is not in the cluster"), "{unknown}");
    cluster.stop().await;
}

#[tokio::test]
async fn an_owner_that_resigns_is_followed_by_a_larger_version() {
    let cluster = Cluster::start().await;
    for path in ["/api/v2/owner/resign", "/api/v1/owner/resign"] {
        cluster.client.post(path, &json!({})).await.unwrap();
        cluster.eventually("somebody leads", async |client| client.get("/api/v2/health").await.is_ok()).await;
    }
    cluster.stop().await;
}
