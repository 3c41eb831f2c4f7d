//! One run: time passes in small steps, in each of which the network delivers, every process runs, and the
//! invariants are checked.

mod faults;
mod upkeep;
mod verdict;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use coordinator::Layout;
use coordinator::backend::LocalStore;
use coordinator::backend::memory::{Disk, open};
use heartbeatpb::config::{ChangefeedInfo, ReplicaConfig, UpstreamInfo};
use heartbeatpb::{ChangefeedId, Gid, NodeId, Ts, WallTime, simulated};
use parking_lot::Mutex;

use super::feed::{Feed, Wrong};
use super::people::People;
use super::plan::Plan;
use super::process::{Birth, Node};
use super::wire::{self, GRAIN};
use super::world::{Shared, World, seconds};

/// Commit ts at which changefeeds begin.
const START: u64 = 1_000;
/// After the faults everything has to be right again within this time. The coordinator's pause after an error is
/// the longest part of it.
const CONVERGENCE: u64 = 150_000;
/// Rows go on for this time after the faults.
const CALM_LOAD: u64 = 1_500;
/// Between two looks at the stored checkpoints.
const LOOK: u64 = 100;
/// Between two looks at what is kept of the logs.
const TRIM: u64 = 500;
/// A step after the faults: nothing is lost or late any more, and what is left is to see that everything comes to its end.
const CALM_STEP: u64 = 50;

/// How a run ended.
#[derive(Clone, PartialEq, Debug)]
pub struct Outcome {
    /// What was violated.
    pub violation: Option<String>,
    /// What happened, with seconds since the beginning.
    pub history: Vec<(f64, String)>,
    /// Simulated milliseconds.
    pub simulated: u64,
    /// Milliseconds from the end of the faults until everything was right.
    pub converged: u64,
    /// Rows written downstream.
    pub rows: u64,
    /// Schema changes.
    pub ddls: usize,
    /// Messages between nodes.
    pub messages: u64,
}

/// Runs a plan. The same plan gives the same outcome every time.
#[must_use]
pub fn run(plan: &Plan, verbose: bool) -> Outcome {
    heartbeatpb::switch_off(plan.without);
    simulated::enter(plan.seed ^ 0x5eed, WallTime(0));
    let mut simulation = Simulation::new(plan, verbose);
    let outcome = simulation.run();
    // A process's plug holds the world, which holds the process.
    let mut world = simulation.world.lock();
    let (processes, feeds) = (std::mem::take(&mut world.processes), std::mem::take(&mut world.feeds));
    drop(world);
    drop((processes, feeds));
    drop(simulation);
    simulated::leave();
    heartbeatpb::switch_off([None; 2]);
    outcome
}

struct Simulation<'a> {
    plan: &'a Plan,
    world: Shared,
    store: LocalStore,
    layout: Layout,
    nodes: BTreeMap<u32, Node>,
    incarnations: BTreeMap<u32, u32>,
    /// Machines whose process starts again, and when.
    starting: BTreeMap<u32, u64>,
    feeds: Vec<ChangefeedId>,
    people: People,
    /// Machines whose process ends by itself at a time.
    doomed: Vec<(u32, u64)>,
    next_rows: u64,
    gaps: (u64, u64),
    paused_feeds_until: Option<u64>,
}

impl<'a> Simulation<'a> {
    fn new(plan: &'a Plan, verbose: bool) -> Self {
        let mut world = World::new(plan.seed);
        world.verbose = verbose;
        world.wire.faults = plan.faults;
        let mut feeds = Vec::new();
        for n in 0..plan.feeds {
            let id = ChangefeedId {
                gid: Gid::new(7, u64::from(n) + 1),
                name: format!("feed{n}").into(),
                keyspace: "default".into(),
            };
            world.feeds.insert(id.gid, Feed::new(id.clone(), START, plan.tables));
            feeds.push(id);
        }
        let store = open(&Disk::new()).expect("an empty disk can be opened");
        let mut simulation = Self {
            plan,
            world: Arc::new(Mutex::new(world)),
            store,
            layout: Layout::new("sim").expect("a valid name"),
            nodes: BTreeMap::new(),
            incarnations: BTreeMap::new(),
            starting: BTreeMap::new(),
            feeds,
            people: People::default(),
            doomed: Vec::new(),
            next_rows: 0,
            gaps: (0, 0),
            paused_feeds_until: None,
        };
        for machine in 0..plan.machines {
            simulation.start(machine, 0);
        }
        simulation
    }

    fn start(&mut self, machine: u32, now: u64) {
        let incarnation = self.incarnations.entry(machine).or_default();
        *incarnation += 1;
        let node = Node::start(&Birth {
            machine,
            incarnation: *incarnation,
            store: &self.store,
            layout: &self.layout,
            world: &self.world,
            now,
            uncertain: self.plan.uncertain,
            unreached_after: Duration::from_millis(self.plan.unreached_after),
            skew: 0,
        });
        self.note(format!("{} starts", node.id));
        self.nodes.insert(machine, node);
    }

    fn note(&self, what: String) {
        self.world.lock().note(what);
    }

    fn run(&mut self) -> Outcome {
        let mut now = 0;
        let mut events = self.plan.events.clone();
        events.reverse();
        let mut converged = None;
        let end = self.plan.chaos + CONVERGENCE;
        for id in self.feeds.clone() {
            self.people.create(description(&id));
        }
        let mut calm = false;
        while now < end && self.world.lock().violation.is_none() {
            // The longer steps begin where they fit, so that nothing that happens at round times is stepped over.
            let is_calm = calm && now > self.plan.chaos + CALM_LOAD && now.is_multiple_of(CALM_STEP);
            let step = if is_calm { CALM_STEP } else { GRAIN };
            now += step;
            self.world.lock().set_now(now);
            while events.last().is_some_and(|(at, _)| *at <= now) {
                if let Some((_, event)) = events.pop() {
                    self.happen(&event, now);
                }
            }
            if now >= self.plan.chaos && !calm {
                calm = true;
                self.calm(now);
            }
            self.housekeeping(now);
            self.load(now);
            wire::deliver(&self.world);
            self.step(now, step);
            self.apply(now);
            if now.is_multiple_of(TRIM) {
                super::streams::trim(&mut self.world.lock());
            }
            if now.is_multiple_of(LOOK) {
                self.check_checkpoints();
                if calm && now > self.plan.chaos + CALM_LOAD && events.is_empty() && self.is_done() {
                    converged = Some(now - self.plan.chaos);
                    break;
                }
            }
        }
        self.judge(converged);
        self.outcome(now, converged.unwrap_or(CONVERGENCE))
    }

    fn outcome(&mut self, now: u64, converged: u64) -> Outcome {
        let mut world = self.world.lock();
        Outcome {
            violation: world.violation.take(),
            history: std::mem::take(&mut world.history)
                .into_iter()
                .map(|(at, what)| (seconds(at), what))
                .collect(),
            simulated: now,
            converged,
            rows: world.feeds.values().map(|feed| feed.rows_written).sum(),
            ddls: world.feeds.values().map(|feed| feed.ddls.len()).sum(),
            messages: world.wire.carried,
        }
    }

    /// The faults end.
    fn calm(&mut self, now: u64) {
        self.note("the faults end".to_owned());
        self.world.lock().heal();
        self.gaps = (0, 0);
        for node in self.nodes.values_mut() {
            node.paused_until = node.paused_until.map(|until| until.min(now));
        }
        for at in self.starting.values_mut() {
            *at = (*at).min(now);
        }
        self.paused_feeds_until = self.paused_feeds_until.map(|until| until.min(now));
    }

    /// Every process runs for a step, in an order that changes.
    fn step(&mut self, now: u64, millis: u64) {
        let first = self.world.lock().random.between(0, self.nodes.len().max(1) as u64 - 1);
        let order: Vec<u32> = self.nodes.keys().copied().collect();
        for n in 0..order.len() {
            let machine = order[(n + usize::try_from(first).unwrap_or(0)) % order.len()];
            if let Some(node) = self.nodes.get_mut(&machine) {
                node.run(now, millis);
            }
        }
    }

    /// Rows are committed, delivered to dispatchers, and written.
    fn load(&mut self, now: u64) {
        let mut guard = self.world.lock();
        let world = &mut *guard;
        let (gaps_until, percent) = self.gaps;
        let restart = if gaps_until > now { percent } else { 0 };
        let hasty = now < self.plan.chaos;
        super::streams::serve(world, if hasty { 60 } else { 100 }, restart);
        if now < self.next_rows {
            return;
        }
        self.next_rows = now + world.random.between(20, 120);
        let (random, feeds) = (&mut world.random, &mut world.feeds);
        for feed in feeds.values_mut() {
            if now < self.plan.chaos + CALM_LOAD {
                feed.commit_rows(random);
            }
        }
    }

    fn apply(&mut self, now: u64) {
        let mut flushed = Vec::new();
        {
            let mut guard = self.world.lock();
            let world = &mut *guard;
            let mut wrong = Wrong::new();
            let processes = &world.processes;
            let refused =
                |node: &NodeId| processes.get(node).is_none_or(|process| process.sink_fails_until > now);
            let permitted = |node: &NodeId| {
                processes.get(node).is_some_and(|process| !process.paused && process.permit.holds())
            };
            for feed in world.feeds.values_mut() {
                flushed.extend(feed.apply_due(now, &refused, &permitted, &mut wrong));
            }
            world.all_violated(wrong);
        }
        flushed.into_iter().for_each(sink::Flushed::done);
    }

    fn node_of(&self, machine: u32) -> Option<NodeId> {
        self.nodes.get(&machine).map(|node| node.id.clone())
    }
}

fn description(id: &ChangefeedId) -> ChangefeedInfo {
    let mut config = ReplicaConfig::default();
    config.scheduler.enable_table_across_nodes = true;
    let upstream = UpstreamInfo { uri: "generator://bank".to_owned(), ..UpstreamInfo::default() };
    ChangefeedInfo::new(id.clone(), upstream, "blackhole://", config, Ts(START))
}
