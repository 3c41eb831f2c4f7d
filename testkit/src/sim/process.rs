//! One process of the cluster: the real shells on a runtime of their own, whose clock the simulation moves.
//!
//! A crash drops the runtime, and with it every task where it stands. A stopped process is not run for a while, and
//! finds its clock advanced when it wakes. Its lease is watched over by the project's [`Watchdog`], on a clock that does
//! not stop: before the process has looked, sinks ask until when it may write.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use coordinator::backend::{LocalStore, PermittedStore, Session, Store};
use coordinator::membership::Registry;
use coordinator::reach::Greeter;
use coordinator::watchdog::{Verdict, Watchdog};
use coordinator::{CoordinatorConfig, CoordinatorHandle, Election, Layout, Neighbours};
use dispatcher_orchestrator::{Orchestrator, OrchestratorHandle};
use heartbeatpb::{NodeId, NodeLiveness, Rule, WallTime, WritePermit, simulated};
use maintainer::{LivenessCell, MaintainerManager, ManagerConfig, PlacementHandle};
use messaging::{MessageCenter, MessagingConfig};
use parking_lot::Mutex;
use tokio::runtime::Runtime;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::members::{DELAY, Entry, LEASE, address};
use super::sinks::{Fences, Sinks};
use super::store::NodeStore;
use super::streams::Source;
use super::upstream::Hub;
use super::wire::Plug;
use super::world::{Process, Shared};

/// The simulation begins at this time of day: 2026-01-01 in microseconds.
const DAWN: i64 = 1_767_225_600_000_000;

/// Between two questions for the registration.
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// What the tasks of a process and its watchdog tell each other.
#[derive(Default)]
struct Told {
    session: Mutex<Option<Session>>,
    /// Rung when the store is to be asked for the registration.
    wanted: Notify,
    /// When it was asked, and whether it has the registration.
    registered: Mutex<Option<(Instant, bool)>>,
    /// It cannot go on.
    failed: AtomicBool,
    /// It has said goodbye.
    left: AtomicBool,
}

/// A task that is asked to end, and waited for.
struct Part {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

/// A running process.
pub(super) struct Node {
    pub(super) id: NodeId,
    /// Which of the machines it runs on.
    pub(super) machine: u32,
    runtime: Runtime,
    pub(super) leader: watch::Receiver<Option<CoordinatorHandle>>,
    told: Arc<Told>,
    dog: Option<Watchdog>,
    permit: WritePermit,
    entry: Entry,
    liveness: Arc<LivenessCell>,
    fence: OrchestratorHandle,
    /// Ends its maintainers.
    manager: CancellationToken,
    /// In the order in which they stop.
    parts: Vec<Part>,
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
    pub(super) lost: bool,
    /// A person has told it to stop, and ends it at this time at the latest.
    pub(super) leaving: Option<u64>,
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
    pub(super) unreached_after: Duration,
    pub(super) skew: i64,
}

impl Node {
    /// Starts a process as `node::Node::start` does.
    pub(super) fn start(birth: &Birth<'_>) -> Self {
        let Birth { machine, incarnation, store, layout, world, now, uncertain, unreached_after, skew } =
            *birth;
        simulated::set_wall(wall(now, skew));
        let id = NodeId::from(format!("n{machine}.{incarnation}"));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a runtime without input and output needs nothing");
        let entered = runtime.enter();
        let center = MessageCenter::new(id.clone(), MessagingConfig::default());
        let permit = world.lock().permit();
        world.lock().processes.insert(id.clone(), Process::new(center.clone(), permit.clone()));
        center.connect(Arc::new(Plug { from: id.clone(), world: Arc::clone(world) }));
        let hub = Arc::new(Hub { node: id.clone(), world: Arc::clone(world), permit: permit.clone() });
        let source = Arc::new(Source { node: id.clone(), world: Arc::clone(world) });
        let sinks = Sinks { node: id.clone(), world: Arc::clone(world), permit: permit.clone() };
        let (orchestrator, fence) = Orchestrator::new(center.clone(), source, Arc::new(sinks));
        let node_store =
            NodeStore { inner: store.clone(), node: id.clone(), world: Arc::clone(world), uncertain };
        let shared: Arc<dyn Store> = Arc::new(node_store.clone());
        let (registry, views) = Registry::new(Arc::clone(&shared), layout, (id.clone(), address(&id)), DELAY);
        let liveness = Arc::<LivenessCell>::default();
        let managed: Arc<dyn maintainer::Upstream> = Arc::clone(&hub) as Arc<dyn maintainer::Upstream>;
        let node_epoch = u64::from(machine) * 1_000 + u64::from(incarnation) + 1;
        let config =
            ManagerConfig { node_epoch, liveness: Arc::clone(&liveness), nodes: views.nodes.clone() };
        let fences = Fences { node: id.clone(), world: Arc::clone(world), permit: permit.clone() };
        let (greeter, reach) = Greeter::new(center.clone(), views.members.clone(), unreached_after);
        let manager = MaintainerManager::new(center.clone(), managed, config)
            .with_fence(Arc::new(fences))
            .with_unreached(reach.unreached);
        let placements = manager.placements();
        let neighbours = Neighbours {
            center,
            members: reach.reached,
            retention: Arc::clone(&hub) as Arc<dyn coordinator::RetentionHook>,
            clock: hub,
        };
        let settings = CoordinatorConfig { session_ttl: LEASE, ..CoordinatorConfig::default() };
        let (election, leader) = Election::new(
            Arc::new(PermittedStore::new(shared, permit.clone())),
            layout.clone(),
            neighbours,
            settings,
            liveness.watch(),
        );
        let entry = Entry::new(node_store, layout.clone());
        let told = Arc::<Told>::default();
        runtime.spawn(registry.run(CancellationToken::new()));
        runtime.spawn(greeter.run(leader.clone(), CancellationToken::new()));
        runtime.spawn(ask_registration(entry.clone(), Arc::clone(&told)));
        let manager_stop = CancellationToken::new();
        let joining = Joining { entry: entry.clone(), epoch: node_epoch, known: views.known.clone() };
        let lead = |stop| lead(joining, election, Arc::clone(&told), stop);
        let parts = vec![
            Part::start(&runtime, CancellationToken::new(), lead),
            Part::start(&runtime, manager_stop.clone(), |stop| manager.run(stop)),
            Part::start(&runtime, CancellationToken::new(), |stop| orchestrator.run(stop)),
        ];
        drop(entered);
        Self {
            id,
            machine,
            runtime,
            leader,
            told,
            dog: None,
            permit,
            entry,
            liveness,
            fence,
            manager: manager_stop,
            parts,
            skew,
            paused_until: None,
            missed: 0,
            blind_until: 0,
            placements,
            lost: false,
            leaving: None,
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

    /// Looks at its lease as the thread of a node does, and says what has changed. `micros` turns a moment into the
    /// permit's time.
    pub(super) fn watch(&mut self, now: Instant, micros: impl Fn(Instant) -> u64) -> Vec<Verdict> {
        let Some(session) = self.told.session.lock().clone() else { return Vec::new() };
        let asked = session.confirmed.last(now);
        let dog = self.dog.get_or_insert_with(|| Watchdog::new(LEASE, asked));
        let mut verdicts = Vec::new();
        if session.done.is_cancelled() {
            verdicts.extend(dog.on_done());
        }
        verdicts.extend(dog.on_confirmed(asked));
        if let Some((asked, found)) = self.told.registered.lock().take() {
            verdicts.extend(dog.on_registration(asked, found));
        }
        verdicts.extend(dog.on_time(now));
        if dog.wants_registration() {
            self.told.wanted.notify_one();
        }
        if !Rule::PermitEnds.holds() {
            self.permit.hold_until(u64::MAX);
        } else if dog.may_write(now) {
            self.permit.hold_until(micros(dog.deadline()));
        } else if !verdicts.is_empty() {
            self.permit.hold_until(0);
        }
        verdicts
    }

    /// Whether it cannot go on, whatever its lease says.
    pub(super) fn has_failed(&self) -> bool {
        self.told.failed.load(Ordering::Acquire)
    }

    /// It must not write any more.
    pub(super) fn lose_lease(&mut self) {
        self.lost = true;
        self.permit.hold_until(0);
        self.liveness.advance(NodeLiveness::Draining);
        self.liveness.advance(NodeLiveness::Stopping);
        self.fence.local_fence();
        if let Some(session) = &*self.told.session.lock() {
            session.done.cancel();
        }
        self.manager.cancel();
    }

    /// A person tells it to stop: it ends what it has begun, and says goodbye when nothing of it can write any more.
    pub(super) fn leave(&mut self, deadline: u64) {
        self.leaving = Some(deadline);
        self.liveness.advance(NodeLiveness::Draining);
        self.liveness.advance(NodeLiveness::Stopping);
        let (parts, fence) = (std::mem::take(&mut self.parts), self.fence.clone());
        let (entry, told) = (self.entry.clone(), Arc::clone(&self.told));
        self.runtime.spawn(async move {
            for part in parts {
                part.stop.cancel();
                drop(part.task.await);
            }
            fence.local_fence();
            entry.leave().await;
            told.left.store(true, Ordering::Release);
        });
    }

    /// Whether it has said goodbye.
    pub(super) fn has_left(&self) -> bool {
        self.told.left.load(Ordering::Acquire)
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

impl Part {
    fn start<F>(runtime: &Runtime, stop: CancellationToken, run: impl FnOnce(CancellationToken) -> F) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let task = runtime.spawn(run(stop.clone()));
        Self { stop, task }
    }
}

/// A process on its way into the cluster.
struct Joining {
    entry: Entry,
    epoch: u64,
    /// Up to where it knows the registrations.
    known: watch::Receiver<u64>,
}

/// Joins the cluster, and stands for election until `stop`.
async fn lead(joining: Joining, election: Election, told: Arc<Told>, stop: CancellationToken) {
    let opened = |session| *told.session.lock() = Some(session);
    let Joining { entry, epoch, known } = joining;
    let joined = tokio::select! {
        biased;
        () = stop.cancelled() => return,
        joined = entry.join(epoch, known, opened) => joined,
    };
    let result = match joined {
        Ok(session) => election.run(session, stop).await,
        Err(error) => Err(error.into()),
    };
    if result.is_err() {
        told.failed.store(true, Ordering::Release);
    }
}

/// Asks the store for the registration whenever it is wanted, as long as the process lives.
async fn ask_registration(entry: Entry, told: Arc<Told>) {
    loop {
        told.wanted.notified().await;
        let lease = told.session.lock().as_ref().map(|session| session.lease);
        let asked = entry.store.world.lock().clock();
        if let Some(lease) = lease
            && let Ok(found) = entry.is_registered(lease).await
        {
            *told.registered.lock() = Some((asked, found));
        }
        tokio::time::sleep(ASK_AGAIN).await;
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
