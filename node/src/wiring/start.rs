//! The beginning of a process: everything that can fail, then the parts, then the cluster.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use coordinator::backend::{PermittedStore, Session, Store};
use coordinator::membership::{NodeInfo, Registration, Registry, Views, follow_leader};
use coordinator::reach::{Greeter, ReachViews};
use coordinator::{CoordinatorConfig, CoordinatorHandle, Election, Layout, Neighbours};
use dispatcher_orchestrator::{Orchestrator, OrchestratorHandle};
use heartbeatpb::{NodeId, WallTime, error_chain};
use logservice::{Collector, CopyEnds, LogConfig, LogService};
use maintainer::{LivenessCell, MaintainerManager, ManagerConfig};
use messaging::grpc::GrpcTransport;
use messaging::{MessageCenter, MessagingConfig};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;

use super::lease::{Guard, Lease};
use super::parts::Part;
use super::{Node, WritePath, store};
use crate::config::{ServerConfig, StoreKind};
use crate::copies::Copies;
use crate::http::{Access, ApiState, Tasks, dump_on_signal, router};
use crate::permitted::{PermittedRetention, PermittedUpstream};
use crate::serve::Server;
use crate::sinks::{Fences, Sinks};
use crate::tls::Tls;
use crate::upstream::UpstreamHub;

/// How often the exporter forgets what nobody will ask for.
const UPKEEP: Duration = Duration::from_secs(5);
/// How long a node waits to see its own registration before it stands for election.
const SEE_ONESELF: Duration = Duration::from_secs(10);

/// Connects a node's end of the bus to those of the others.
pub type Connect = Box<dyn FnOnce(&MessageCenter) + Send>;

/// What a node finds where it runs, in place of what its configuration names: for programs that embed nodes.
#[derive(Default)]
pub struct Surroundings {
    /// A metadata store; the configured one otherwise.
    pub store: Option<Arc<dyn Store>>,
    /// Connects the node's end of the bus to those of the others; the configured network otherwise.
    pub network: Option<Connect>,
}

impl std::fmt::Debug for Surroundings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Surroundings")
            .field("store", &self.store.is_some())
            .field("network", &self.network.is_some())
            .finish()
    }
}

/// What exists before the first task runs.
struct Ground {
    config: ServerConfig,
    listener: TcpListener,
    address: std::net::SocketAddr,
    advertised: String,
    data_dir: PathBuf,
    store: Arc<dyn Store>,
    layout: Layout,
    epoch: u64,
    access: Access,
    tls: Option<Arc<Tls>>,
    /// Whether others share the store.
    clustered: bool,
    /// Released when the process ends.
    lock: std::fs::File,
}

impl Ground {
    async fn prepare(config: ServerConfig, store: Option<Arc<dyn Store>>) -> anyhow::Result<Self> {
        config.validate()?;
        // Another provider may have been installed by the program that embeds this node: either serves.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let layout = Layout::new(&config.cluster_id)?;
        let tls = config.security.tls_files().map(Tls::load).transpose()?;
        let access = Access::new(&config.security).map_err(anyhow::Error::msg)?;
        let data_dir = absolute(&config.data_dir)?;
        let listener = TcpListener::bind(&config.addr)
            .await
            .with_context(|| format!("cannot listen on {}", config.addr))?;
        let address = listener.local_addr()?;
        let lock = store::lock(&data_dir)?;
        let clustered = store.is_some() || config.store.kind == StoreKind::Etcd;
        let store = match store {
            Some(store) => store,
            None => store::open(&config, &data_dir).await?,
        };
        let advertised = if config.advertise_addr.is_empty() {
            address.to_string()
        } else {
            config.advertise_addr.clone()
        };
        let epoch = u64::try_from(WallTime::now().0).unwrap_or(1).max(1);
        Ok(Self {
            config,
            listener,
            address,
            advertised,
            data_dir,
            store,
            layout,
            epoch,
            access,
            tls,
            clustered,
            lock,
        })
    }
}

/// The parts before they run. Their topics are registered: what is sent to them waits.
struct Modules {
    center: MessageCenter,
    log: LogService,
    upstreams: Arc<UpstreamHub>,
    lease: Arc<Lease>,
    liveness: Arc<LivenessCell>,
    collector: Collector,
    orchestrator: Orchestrator,
    dispatchers: OrchestratorHandle,
    manager: MaintainerManager,
    registry: Registry,
    views: Views,
    greeter: Greeter,
    reach: ReachViews,
    /// The way to other nodes; none where there are no others, or where the embedding program has one.
    transport: Option<GrpcTransport>,
}

impl Modules {
    fn new(ground: &Ground, node: &NodeId, network: Option<Connect>) -> Self {
        let config = &ground.config;
        let center = MessageCenter::new(node.clone(), MessagingConfig::default());
        let log = LogService::new(
            center.clone(),
            LogConfig {
                dir: ground.data_dir.join("log"),
                memory_bytes: usize::try_from(config.event_store.memory_bytes).unwrap_or(usize::MAX),
                disk_bytes: config.event_store.disk_bytes,
            },
        );
        let upstreams = Arc::new(UpstreamHub::new(node.clone(), log.clone()));
        let liveness = Arc::new(LivenessCell::default());
        let lease = Arc::new(Lease::new());
        let (collector, collector_handle) = Collector::new(center.clone());
        upstreams.copy_with(Copies {
            node: node.clone(),
            data_dir: ground.data_dir.join("sink"),
            permit: lease.permit().clone(),
        });
        let sinks = Arc::new(Sinks {
            data_dir: ground.data_dir.join("sink"),
            upstreams: Arc::clone(&upstreams),
            permit: lease.permit().clone(),
        });
        let (orchestrator, dispatchers) =
            Orchestrator::new(center.clone(), Arc::new(collector_handle), sinks);
        let own = (node.clone(), ground.advertised.clone());
        let delay = config.capture_removal_delay.0;
        let (registry, views) = Registry::new(Arc::clone(&ground.store), &ground.layout, own, delay);
        let managed = PermittedUpstream {
            inner: Arc::clone(&upstreams) as Arc<dyn maintainer::Upstream>,
            permit: lease.permit().clone(),
        };
        let (greeter, reach) = Greeter::new(center.clone(), views.members.clone(), config.unreached_after.0);
        let manager = MaintainerManager::new(
            center.clone(),
            Arc::new(managed),
            ManagerConfig {
                node_epoch: ground.epoch,
                liveness: Arc::clone(&liveness),
                nodes: views.nodes.clone(),
            },
        )
        .with_fence(Arc::new(Fences { node: node.clone(), permit: lease.permit().clone() }))
        .with_unreached(reach.unreached.clone());
        let transport = match network {
            Some(network) => {
                network(&center);
                None
            }
            None if ground.clustered => {
                let members = views.members.clone();
                let tls = ground.tls.as_ref().map(|tls| tls.peers().clone());
                let transport = GrpcTransport::new(center.clone(), &ground.advertised, tls, members);
                center.connect(transport.handle());
                Some(transport)
            }
            None => None,
        };
        Self {
            center,
            log,
            upstreams,
            lease,
            liveness,
            collector,
            orchestrator,
            dispatchers,
            manager,
            registry,
            views,
            greeter,
            reach,
            transport,
        }
    }

    /// The metadata store for everything that is done under the lease.
    fn store(&self, ground: &Ground) -> Arc<dyn Store> {
        Arc::new(PermittedStore::new(Arc::clone(&ground.store), self.lease.permit().clone()))
    }

    fn election(&self, ground: &Ground) -> (Election, watch::Receiver<Option<CoordinatorHandle>>) {
        let neighbours = Neighbours {
            center: self.center.clone(),
            members: self.reach.reached.clone(),
            retention: Arc::new(PermittedRetention {
                inner: Arc::clone(&self.upstreams) as Arc<dyn coordinator::RetentionHook>,
                permit: self.lease.permit().clone(),
            }),
            clock: Arc::clone(&self.upstreams) as Arc<dyn coordinator::UpstreamClock>,
        };
        let settings = CoordinatorConfig {
            session_ttl: ground.config.capture_session_ttl.0,
            ..CoordinatorConfig::default()
        };
        Election::new(self.store(ground), ground.layout.clone(), neighbours, settings, self.liveness.watch())
    }
}

impl Node {
    /// Builds a server and starts it. Whatever can fail on bad configuration fails before anything runs.
    ///
    /// # Errors
    /// When the configuration is wrong, the address is taken, the data directory cannot be used, or the metadata store
    /// does not take this node in.
    pub async fn start(config: ServerConfig) -> anyhow::Result<Self> {
        Self::start_in(config, Surroundings::default()).await
    }

    /// As [`Node::start`], with a store or a network that the embedding program has already.
    ///
    /// # Errors
    /// As [`Node::start`].
    pub async fn start_in(config: ServerConfig, surroundings: Surroundings) -> anyhow::Result<Self> {
        let Surroundings { store, network } = surroundings;
        let metrics = crate::telemetry::init_metrics()?;
        describe_metrics();
        let ground = Ground::prepare(config, store).await?;
        let id = NodeId::random();
        let modules = Modules::new(&ground, &id, network);
        let (election, coordinator) = modules.election(&ground);
        let (leading, leader) = watch::channel(None);
        let tasks = Arc::new(Tasks::default());
        let api = Arc::new(ApiState {
            node: id.clone(),
            members: modules.views.members.clone(),
            leading: leader.clone(),
            cluster_id: ground.config.cluster_id.clone(),
            config: shown(&ground.config)?,
            named: ground.config.upstreams.clone(),
            tasks: Arc::clone(&tasks),
            looking: Semaphore::new(1),
            data_dir: ground.data_dir.join("sink"),
            started: Instant::now(),
            leader: coordinator.clone(),
            verifications: crate::verification::Verifications::default(),
            upstreams: Arc::clone(&modules.upstreams),
            placements: modules.manager.placements(),
            metrics: metrics.clone(),
            liveness: Arc::clone(&modules.liveness),
            store: modules.store(&ground),
            access: ground.access,
            tls: ground.tls.clone(),
            layout: ground.layout.clone(),
            lease: Arc::clone(&modules.lease),
            unreached: modules.reach.unreached.clone(),
        });
        let app = router(Arc::clone(&api));

        let Ground { config, listener, address, advertised, store, layout, epoch, lock, tls, .. } = ground;
        let Modules {
            log,
            upstreams,
            lease,
            liveness,
            collector,
            orchestrator,
            dispatchers,
            manager,
            registry,
            views,
            greeter,
            transport,
            ..
        } = modules;
        let server = Server { grpc: transport.as_ref().map(bus), tls, ..Server::new(listener, app) };
        let port = Part::start("port", move |stop| async move {
            server.run(stop).await;
            drop(lock);
        });
        let network = transport.map(|transport| Part::start("network", move |stop| transport.run(stop)));
        let upkeep = Part::start("metrics upkeep", move |stop| async move {
            let mut tick = tokio::time::interval(UPKEEP);
            while !stop.is_cancelled() {
                tokio::select! {
                    () = stop.cancelled() => {}
                    _ = tick.tick() => metrics.run_upkeep(),
                }
            }
        });
        let beat = {
            let tasks = Arc::clone(&tasks);
            Part::start("heartbeat of the runtime", move |stop| async move { tasks.beat(&stop).await })
        };
        let comparisons = {
            let api = Arc::clone(&api);
            Part::start("comparisons", move |stop| crate::verification::run(api, stop))
        };
        let dump = Part::start("dump on SIGUSR1", move |stop| dump_on_signal(api, stop));
        let hands = {
            let (log, ends) = (log.clone(), Arc::clone(&upstreams) as Arc<dyn CopyEnds>);
            Part::start("copies for other nodes", move |stop| async move {
                log.copy_for_others(ends, stop).await;
            })
        };
        let log = Part::start("log service", move |stop| async move { log.run(stop).await });
        let collector = Part::start("event collector", move |stop| collector.run(stop));
        let orchestrator = Part::start("dispatcher orchestrator", move |stop| async move {
            orchestrator.run(stop).await;
        });
        let manager = Part::start("maintainer manager", move |stop| manager.run(stop));
        let registry = Part::start("members", move |stop| registry.run(stop));
        let greeter = Part::start("greeter", move |stop| greeter.run(coordinator, stop));
        let elected = {
            let (store, prefix) = (Arc::clone(&store), layout.owner_prefix());
            Part::start("leader", move |stop| follow_leader(store, prefix, leading, stop))
        };
        let write_path = WritePath {
            liveness,
            dispatchers,
            upstreams,
            maintainers: manager.token(),
            session: CancellationToken::new(),
            failure: watch::Sender::new(None),
        };
        let info = NodeInfo::own(&id, &advertised, epoch);
        let entry =
            Entry { store: &store, layout: &layout, write_path, lease, ttl: config.capture_session_ttl.0 };
        let (deciding, writing) = (vec![manager], vec![hands, orchestrator, collector]);
        let mut serving = vec![log, registry, elected, greeter];
        serving.extend(network);
        serving.extend([port, upkeep, dump, beat, comparisons]);
        match entry.join(info, views.known).await {
            Ok(Joined { session, registration, guard, write_path }) => {
                let mut deciding = deciding;
                deciding.insert(0, lead(election, session, write_path.clone()));
                for part in deciding.iter().chain(&writing).chain(&serving) {
                    let (name, handle) = part.seen();
                    tasks.watch(name, handle);
                }
                tracing::info!(nodeID = %id, addr = %address, "server is ready");
                let members = views.members;
                Ok(Self {
                    id,
                    address,
                    write_path,
                    store,
                    registration,
                    guard,
                    leader,
                    members,
                    deciding,
                    writing,
                    serving,
                })
            }
            Err(error) => {
                super::stop::give_up(deciding.into_iter().chain(writing).chain(serving)).await;
                Err(error)
            }
        }
    }
}

/// What it takes to be seen by others.
struct Entry<'a> {
    store: &'a Arc<dyn Store>,
    layout: &'a Layout,
    write_path: WritePath,
    lease: Arc<Lease>,
    ttl: Duration,
}

/// A node that others see.
struct Joined {
    session: Session,
    registration: Registration,
    guard: Guard,
    write_path: WritePath,
}

impl Entry<'_> {
    /// Opens a session, watches over it, and registers this node: everything that others may send it is served by now.
    async fn join(self, info: NodeInfo, mut known: watch::Receiver<u64>) -> anyhow::Result<Joined> {
        let asked = Instant::now();
        let session =
            self.store.session(self.ttl).await.context("cannot open a session of the metadata store")?;
        let write_path = WritePath { session: session.done.clone(), ..self.write_path };
        let fenced = write_path.clone();
        let guard = Guard::start(
            Arc::clone(self.store),
            session.clone(),
            (self.ttl, asked),
            self.lease,
            move |lost| fenced.on_lost(lost),
        )?;
        let (registration, at) = Registration::new(self.store.as_ref(), self.layout, info, session.lease)
            .await
            .context("the node cannot be registered")?;
        guard.on_registered(registration.key());
        // Who leads must know who is there, itself first of all.
        let seen = known.wait_for(|known| *known >= at);
        match tokio::time::timeout(SEE_ONESELF, seen).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) | Err(_) => {
                anyhow::bail!("the metadata store does not show this node's own registration")
            }
        }
        Ok(Joined { session, registration, guard, write_path })
    }
}

/// Stands for election. When that fails the process may not write any more.
fn lead(election: Election, session: Session, write_path: WritePath) -> Part {
    Part::start("coordinator", move |stop| async move {
        if let Err(error) = election.run(session, stop).await {
            write_path.fence(&error_chain(&error));
        }
    })
}

/// What other nodes are answered on the one port.
fn bus(transport: &GrpcTransport) -> axum::Router {
    axum::Router::new().route_service(messaging::grpc::PATH, transport.service())
}

/// The configuration as it may be shown.
fn shown(config: &ServerConfig) -> anyhow::Result<serde_json::Value> {
    let mut value = serde_json::to_value(config)?;
    // The rest of it has none: whoever checks the configuration sees to it.
    heartbeatpb::config::api::mask_secrets(&mut value["upstreams"]);
    Ok(value)
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
