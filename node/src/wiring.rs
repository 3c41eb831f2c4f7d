//! Puts a process together, starts it, and stops it from the edge inward.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use coordinator::{CoordinatorConfig, Election, Layout, Neighbours};
use dispatcher_orchestrator::Orchestrator;
use heartbeatpb::{NodeId, NodeLiveness, WallTime};
use logservice::{Collector, LogConfig, LogService};
use maintainer::{LivenessCell, MaintainerManager, ManagerConfig};
use messaging::{MessageCenter, MessagingConfig};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::config::ServerConfig;
use crate::http::{ApiState, router};
use crate::sinks::Sinks;
use crate::upstream::UpstreamHub;

/// How long each part may take to stop before the process goes on without it.
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// How often the exporter forgets what nobody will ask for.
const UPKEEP: Duration = Duration::from_secs(5);

/// Now, as documents and errors carry it.
pub(crate) fn rfc3339_now() -> String {
    time::OffsetDateTime::now_utc().format(&time::format_description::well_known::Rfc3339).unwrap_or_default()
}

/// An error and its causes in one line.
pub(crate) fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

/// One part of the process: a task with its own stop signal.
struct Part {
    name: &'static str,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Part {
    fn start<F: Future<Output = ()> + Send + 'static>(
        name: &'static str,
        run: impl FnOnce(CancellationToken) -> F,
    ) -> Self {
        let stop = CancellationToken::new();
        let task = tokio::spawn(run(stop.clone()));
        Self { name, stop, task }
    }

    async fn stop(self) {
        self.stop.cancel();
        match tokio::time::timeout(STOP_LIMIT, self.task).await {
            Ok(Ok(())) => tracing::debug!(part = self.name, "stopped"),
            Ok(Err(error)) => tracing::error!(part = self.name, %error, "ended abnormally"),
            Err(_) => tracing::warn!(part = self.name, "did not stop in time"),
        }
    }
}

/// A running server. Stop it with [`Node::stop`]; dropping it leaves its tasks running until the runtime ends.
pub struct Node {
    address: std::net::SocketAddr,
    liveness: Arc<LivenessCell>,
    upstreams: Arc<UpstreamHub>,
    /// Why the process cannot go on.
    failed: watch::Receiver<Option<String>>,
    /// Writers of the set of nodes; a reader takes their end for the end of the process.
    _membership: (watch::Sender<BTreeSet<NodeId>>, watch::Sender<coordinator::Members>),
    /// In the order in which they stop.
    parts: Vec<Part>,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Node {
    /// Builds a server and starts it. Whatever can fail on bad configuration fails before anything runs.
    ///
    /// # Errors
    /// When the configuration is wrong, the address is taken, or the data directory cannot be used.
    pub async fn start(config: ServerConfig) -> anyhow::Result<Self> {
        config.validate()?;
        // Another provider may have been installed by the program that embeds this node: either serves.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let metrics = crate::telemetry::init_metrics()?;
        describe_metrics();
        let data_dir = absolute(&config.data_dir)?;
        let listener = TcpListener::bind(&config.addr)
            .await
            .with_context(|| format!("cannot listen on {}", config.addr))?;
        let address = listener.local_addr()?;
        let store_dir = data_dir.join("meta");
        let store = tokio::task::spawn_blocking(move || coordinator::backend::redb::open(&store_dir))
            .await?
            .context("cannot open the metadata store")?;
        let store: Arc<dyn coordinator::backend::Store> = Arc::new(store);
        let advertised = if config.advertise_addr.is_empty() {
            address.to_string()
        } else {
            config.advertise_addr.clone()
        };
        let layout = Layout::new(&config.cluster_id)?;

        let node = NodeId::random();
        let center = MessageCenter::new(node.clone(), MessagingConfig::default());
        let log = LogService::new(
            center.clone(),
            LogConfig {
                dir: data_dir.join("log"),
                memory_bytes: usize::try_from(config.event_store.memory_bytes).unwrap_or(usize::MAX),
                disk_bytes: config.event_store.disk_bytes,
            },
        );
        let upstreams = Arc::new(UpstreamHub::new(node.clone(), log.clone()));
        let liveness = Arc::new(LivenessCell::default());
        let (collector, collector_handle) = Collector::new(center.clone());
        let sinks = Arc::new(Sinks { data_dir: data_dir.join("sink"), upstreams: Arc::clone(&upstreams) });
        let (orchestrator, fence) = Orchestrator::new(center.clone(), Arc::new(collector_handle), sinks);
        // One node is the whole cluster; its set of members never changes.
        let (nodes_sender, nodes) = watch::channel(BTreeSet::from([node.clone()]));
        let (members_sender, members) =
            watch::channel(Arc::new(BTreeMap::from([(node.clone(), advertised.clone())])));
        let managed: Arc<dyn maintainer::Upstream> = Arc::clone(&upstreams) as Arc<dyn maintainer::Upstream>;
        let manager = MaintainerManager::new(
            center.clone(),
            managed,
            ManagerConfig {
                node_epoch: u64::try_from(WallTime::now().0).unwrap_or(1).max(1),
                liveness: Arc::clone(&liveness),
                nodes: nodes.clone(),
            },
        );
        let settings = CoordinatorConfig::default();
        let session = store
            .session(settings.session_ttl)
            .await
            .context("cannot open a session of the metadata store")?;
        let neighbours = Neighbours {
            center: center.clone(),
            members: members.clone(),
            retention: Arc::clone(&upstreams) as Arc<dyn coordinator::RetentionHook>,
            clock: Arc::clone(&upstreams) as Arc<dyn coordinator::UpstreamClock>,
        };
        let (election, leader) = Election::new(store, layout, neighbours, settings, liveness.watch());
        let app = router(ApiState {
            node: node.clone(),
            members: members.clone(),
            cluster_id: config.cluster_id.clone(),
            config: serde_json::to_value(&config)?,
            data_dir: data_dir.join("sink"),
            started: Instant::now(),
            leader,
            upstreams: Arc::clone(&upstreams),
            placements: manager.placements(),
            metrics: metrics.clone(),
            liveness: Arc::clone(&liveness),
        });

        let http = Part::start("http", move |stop| async move {
            let served = axum::serve(listener, app).with_graceful_shutdown(stop.cancelled_owned()).await;
            if let Err(error) = served {
                tracing::error!(%error, "the HTTP server failed");
            }
        });
        let upkeep = Part::start("metrics upkeep", move |stop| async move {
            let mut tick = tokio::time::interval(UPKEEP);
            while !stop.is_cancelled() {
                tokio::select! {
                    () = stop.cancelled() => {}
                    _ = tick.tick() => metrics.run_upkeep(),
                }
            }
        });
        let log_part = Part::start("log service", move |stop| async move { log.run(stop).await });
        let collector = Part::start("event collector", move |stop| collector.run(stop));
        let orchestrator = Part::start("dispatcher orchestrator", move |stop| async move {
            orchestrator.run(stop).await;
        });
        let manager = Part::start("maintainer manager", move |stop| manager.run(stop));
        let (failure, failed) = watch::channel(None);
        let fenced = Arc::clone(&liveness);
        let election = Part::start("coordinator", move |stop| async move {
            if let Err(error) = election.run(session, stop).await {
                // The metadata store is lost: this process may not write any more. No new work comes, then the write path
                // is closed, then the process ends.
                fenced.advance(NodeLiveness::Draining);
                fenced.advance(NodeLiveness::Stopping);
                fence.local_fence();
                let why = error_chain(&error);
                tracing::error!(error = why, "the coordinator failed; downstream writes are stopped");
                failure.send_replace(Some(why));
            }
        });
        let parts = vec![http, election, manager, orchestrator, collector, log_part, upkeep];
        tracing::info!(nodeID = %node, addr = %address, "server is ready");
        let membership = (nodes_sender, members_sender);
        Ok(Self { address, liveness, upstreams, failed, _membership: membership, parts })
    }

    /// Where the API listens.
    #[must_use]
    pub fn address(&self) -> std::net::SocketAddr {
        self.address
    }

    /// Waits until the process cannot go on: it has stopped to write and is to be stopped and started anew. Returns why.
    pub async fn failed(&self) -> String {
        let mut failed = self.failed.clone();
        loop {
            if let Some(why) = failed.borrow_and_update().clone() {
                return why;
            }
            if failed.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Stops everything in order; what does not stop in time is left to the end of the process.
    ///
    /// # Errors
    /// None now; a failed part is logged.
    pub async fn stop(self) -> anyhow::Result<()> {
        tracing::info!("server is stopping");
        self.liveness.advance(NodeLiveness::Draining);
        self.liveness.advance(NodeLiveness::Stopping);
        let mut parts = self.parts.into_iter();
        for part in parts.by_ref().take(3) {
            part.stop().await;
        }
        if tokio::time::timeout(STOP_LIMIT, self.upstreams.stop_all()).await.is_err() {
            tracing::warn!("log readers did not stop in time");
        }
        for part in parts {
            part.stop().await;
        }
        tracing::info!("server has stopped");
        Ok(())
    }
}

fn absolute(path: &std::path::Path) -> anyhow::Result<PathBuf> {
    std::fs::create_dir_all(path)
        .with_context(|| format!("cannot create the data directory {}", path.display()))?;
    path.canonicalize().with_context(|| format!("cannot use the data directory {}", path.display()))
}

fn describe_metrics() {
    crate::metrics::describe();
    messaging::metrics::describe();
    logservice::metrics::describe();
    logservice::upstream::metrics::describe();
    sink::metrics::describe();
    dispatcher_manager::metrics::describe();
    maintainer::metrics::describe();
    coordinator::metrics::describe();
}
