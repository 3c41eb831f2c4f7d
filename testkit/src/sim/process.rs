//! One process of the cluster: the real shells on a runtime of their own, whose clock the simulation moves.
//!
//! A crash drops the runtime, and with it every task where it stands. A stopped process is not run for a while, and
//! finds its clock advanced when it wakes.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use coordinator::backend::{LeaseId, LocalStore, Store};
use coordinator::{CoordinatorConfig, CoordinatorHandle, Election, Layout, Members, Neighbours};
use dispatcher_orchestrator::{Orchestrator, OrchestratorHandle};
use heartbeatpb::{NodeId, WallTime, simulated};
use maintainer::{LivenessCell, MaintainerManager, ManagerConfig, PlacementHandle};
use messaging::{MessageCenter, MessagingConfig};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::sinks::Sinks;
use super::store::NodeStore;
use super::streams::{Source, Streams};
use super::upstream::Hub;
use super::wire::Plug;
use super::world::{Process, Shared};

/// The simulation begins at this time of day: 2026-01-01 in microseconds.
const DAWN: i64 = 1_767_225_600_000_000;

/// A running process.
pub(super) struct Node {
    pub(super) id: NodeId,
    /// Which of the machines it runs on.
    pub(super) machine: u32,
    runtime: Runtime,
    pub(super) leader: watch::Receiver<Option<CoordinatorHandle>>,
    nodes: watch::Sender<BTreeSet<NodeId>>,
    members: watch::Sender<Members>,
    pub(super) lease: LeaseId,
    done: CancellationToken,
    fence: OrchestratorHandle,
    /// Ends its maintainers.
    manager: CancellationToken,
    /// When its lease was renewed last.
    pub(super) renewed: u64,
    /// Its view of the members is of this version.
    pub(super) seen: u64,
    /// Microseconds that its clock is wrong.
    pub(super) skew: i64,
    /// It runs again at this time.
    pub(super) paused_until: Option<u64>,
    /// Time that passed while it was stopped.
    missed: u64,
    /// It has not looked at its lease since it woke.
    pub(super) blind_until: u64,
    pub(super) placements: PlacementHandle,
    /// It has lost its lease and waits for its end.
    pub(super) fenced: bool,
}

/// What a process is started with.
pub(super) struct Birth<'a> {
    pub(super) machine: u32,
    pub(super) incarnation: u32,
    pub(super) store: &'a LocalStore,
    pub(super) layout: &'a Layout,
    pub(super) world: &'a Shared,
    pub(super) now: u64,
    pub(super) uncertain: u64,
    pub(super) members: &'a Members,
    pub(super) skew: i64,
}

impl Node {
    /// Starts a process as `node::Node::start` does.
    pub(super) fn start(birth: &Birth<'_>) -> Self {
        let Birth { machine, incarnation, store, layout, world, now, uncertain, members, skew } = *birth;
        simulated::set_wall(wall(now, skew));
        let id = NodeId::from(format!("n{machine}.{incarnation}"));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a runtime without input and output needs nothing");
        let entered = runtime.enter();
        let center = MessageCenter::new(id.clone(), MessagingConfig::default());
        let process = Process {
            center: center.clone(),
            streams: Streams::default(),
            paused: false,
            fenced: false,
            store_cut_until: 0,
            sink_fails_until: 0,
            sink_slow: (0, 0),
        };
        world.lock().processes.insert(id.clone(), process);
        center.connect(Arc::new(Plug { from: id.clone(), world: Arc::clone(world) }));
        let lease = runtime.block_on(store.grant(Duration::ZERO)).expect("the store itself does not fail");
        let done = CancellationToken::new();
        let hub = Arc::new(Hub { node: id.clone(), world: Arc::clone(world) });
        let source = Arc::new(Source { node: id.clone(), world: Arc::clone(world) });
        let sinks = Arc::new(Sinks { node: id.clone(), world: Arc::clone(world) });
        let (orchestrator, fence) = Orchestrator::new(center.clone(), source, sinks);
        let (nodes, nodes_view) = watch::channel(members.keys().cloned().collect::<BTreeSet<_>>());
        let (members, members_view) = watch::channel(Arc::clone(members));
        let liveness = Arc::<LivenessCell>::default();
        let liveness_view = liveness.watch();
        let managed: Arc<dyn maintainer::Upstream> = Arc::clone(&hub) as Arc<dyn maintainer::Upstream>;
        let node_epoch = u64::from(machine) * 1_000 + u64::from(incarnation) + 1;
        let config = ManagerConfig { node_epoch, liveness: Arc::clone(&liveness), nodes: nodes_view };
        let manager = MaintainerManager::new(center.clone(), managed, config);
        let placements = manager.placements();
        let node_store = NodeStore {
            inner: store.clone(),
            node: id.clone(),
            world: Arc::clone(world),
            done: done.clone(),
            lease,
            uncertain,
        };
        let confirmed = coordinator::backend::Confirmations::always();
        let session = coordinator::backend::Session { lease, done: done.clone(), confirmed };
        let neighbours = Neighbours {
            center,
            members: members_view,
            retention: Arc::clone(&hub) as Arc<dyn coordinator::RetentionHook>,
            clock: hub,
        };
        let settings = CoordinatorConfig::default();
        let (election, leader) =
            Election::new(Arc::new(node_store), layout.clone(), neighbours, settings, liveness_view);
        runtime.spawn(orchestrator.run(CancellationToken::new()));
        let manager_stop = CancellationToken::new();
        runtime.spawn(manager.run(manager_stop.clone()));
        let last = fence.clone();
        runtime.spawn(async move {
            if election.run(session, CancellationToken::new()).await.is_err() {
                last.local_fence();
            }
        });
        drop(entered);
        Self {
            id,
            machine,
            runtime,
            leader,
            nodes,
            members,
            lease,
            done,
            fence,
            manager: manager_stop,
            renewed: now,
            seen: 0,
            skew,
            paused_until: None,
            missed: 0,
            blind_until: 0,
            placements,
            fenced: false,
        }
    }

    /// Lets it run for some time.
    pub(super) fn run(&mut self, now: u64, millis: u64) {
        simulated::set_wall(wall(now, self.skew));
        if self.paused_until.is_some() {
            self.missed += millis;
            return;
        }
        let missed = std::mem::take(&mut self.missed);
        let _at = tracing::error_span!("at", node = %self.id).entered();
        self.runtime.block_on(async {
            if missed > 0 {
                tokio::time::advance(Duration::from_millis(missed)).await;
            }
            tokio::time::sleep(Duration::from_millis(millis)).await;
        });
    }

    /// Tells it who lives.
    pub(super) fn tell_members(&mut self, version: u64, members: &Members) {
        self.seen = version;
        let alive: BTreeSet<NodeId> = members.keys().cloned().collect();
        self.nodes.send_replace(alive);
        self.members.send_replace(Arc::clone(members));
    }

    /// Its lease may have ended: it must not write any more.
    pub(super) fn lose_lease(&mut self) {
        self.fenced = true;
        self.done.cancel();
        self.fence.local_fence();
        self.manager.cancel();
    }

    /// Runs something of a person beside the process's own tasks.
    pub(super) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.runtime.spawn(work);
    }

    /// The coordinator, if this process has it.
    pub(super) fn coordinator(&self) -> Option<CoordinatorHandle> {
        self.leader.borrow().clone()
    }
}

/// Seconds since the simulation began, by the clock of the process that runs now.
#[must_use]
pub fn elapsed() -> f64 {
    WallTime(DAWN).seconds_until(WallTime::now())
}

fn wall(now: u64, skew: i64) -> WallTime {
    WallTime(DAWN + i64::try_from(now).unwrap_or(0) * 1_000 + skew)
}
