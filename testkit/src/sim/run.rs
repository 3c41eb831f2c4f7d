//! One run: time passes in small steps, in each of which the network delivers, every process runs, and the
//! invariants are checked.

use std::collections::BTreeMap;
use std::sync::Arc;

use coordinator::backend::memory::{Disk, open};
use coordinator::backend::{LeaseId, LocalStore, Store};
use coordinator::{Layout, Members};
use futures_util::FutureExt;
use heartbeatpb::config::{ChangefeedInfo, ChangefeedStatusDoc, ReplicaConfig, UpstreamInfo};
use heartbeatpb::{ChangefeedId, Gid, NodeId, TableId, Ts, WallTime, simulated};
use parking_lot::Mutex;

use super::feed::Feed;
use super::people::People;
use super::plan::{Event, Plan};
use super::process::{Birth, Node};
use super::wire::{self, GRAIN};
use super::world::{Shared, World, seconds};

/// Commit ts at which changefeeds begin.
const START: u64 = 1_000;
/// A lease ends when it was not renewed for so long.
const LEASE: u64 = 3_000;
/// A process that could not renew its lease for so long stops writing by itself.
const LOCAL_FENCE: u64 = 2_000;
/// After the faults everything has to be right again within this time. The coordinator's pause after an error is
/// the longest part of it.
const CONVERGENCE: u64 = 150_000;
/// Rows go on for this time after the faults.
const CALM_LOAD: u64 = 1_500;
/// Between two looks at the stored checkpoints.
const LOOK: u64 = 100;

/// How a run ended.
#[derive(Clone, Debug)]
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
    members: Members,
    members_version: u64,
    feeds: Vec<ChangefeedId>,
    people: People,
    /// Leases of processes that were killed: when they were renewed last.
    leases: BTreeMap<NodeId, (LeaseId, u64)>,
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
            members: Arc::default(),
            members_version: 0,
            feeds,
            people: People::default(),
            leases: BTreeMap::new(),
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
            members: &self.members,
            skew: 0,
        });
        self.note(format!("{} starts", node.id));
        let mut members = (*self.members).clone();
        members.insert(node.id.clone(), format!("{}:8300", node.id));
        self.set_members(members);
        self.nodes.insert(machine, node);
    }

    fn set_members(&mut self, members: BTreeMap<NodeId, String>) {
        self.members = Arc::new(members);
        self.members_version += 1;
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
            now += GRAIN;
            self.world.lock().now = now;
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
            self.step(now);
            self.apply(now);
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
    fn step(&mut self, now: u64) {
        let first = self.world.lock().random.between(0, self.nodes.len().max(1) as u64 - 1);
        let order: Vec<u32> = self.nodes.keys().copied().collect();
        for n in 0..order.len() {
            let machine = order[(n + usize::try_from(first).unwrap_or(0)) % order.len()];
            if let Some(node) = self.nodes.get_mut(&machine) {
                node.run(now, GRAIN);
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
        let mut wrong = Vec::new();
        {
            let mut guard = self.world.lock();
            let world = &mut *guard;
            let processes = &world.processes;
            let refused =
                |node: &NodeId| processes.get(node).is_none_or(|p| p.fenced || p.sink_fails_until > now);
            for feed in world.feeds.values_mut() {
                flushed.extend(feed.apply_due(now, refused, &mut wrong));
            }
            for (invariant, what) in wrong {
                world.violated(invariant, &what);
            }
        }
        flushed.into_iter().for_each(sink::Flushed::done);
    }

    fn node_of(&self, machine: u32) -> Option<NodeId> {
        self.nodes.get(&machine).map(|node| node.id.clone())
    }

    fn crash(&mut self, machine: u32, now: u64, restart: u64) {
        let Some(node) = self.nodes.remove(&machine) else { return };
        self.note(format!("{} is killed", node.id));
        self.world.lock().bury(&node.id);
        self.starting.insert(machine, now + restart);
        // Its lease goes on until it ends.
        self.leases.insert(node.id.clone(), (node.lease, node.renewed));
    }

    fn pause(&mut self, machine: u32, now: u64, millis: u64) {
        let Some(node) = self.nodes.get_mut(&machine) else { return };
        node.paused_until = Some(now + millis);
        if let Some(process) = self.world.lock().processes.get_mut(&node.id) {
            process.paused = true;
        }
    }

    fn slow(&self, machine: Option<u32>, until: u64, extra: u64) {
        if let Some(node) = machine.and_then(|machine| self.node_of(machine)) {
            self.world.lock().slow.insert(node, (until, extra));
        }
    }

    fn happen(&mut self, event: &Event, now: u64) {
        self.note(format!("* {event}"));
        match *event {
            Event::Crash(machine, restart) => self.crash(machine, now, restart),
            Event::CrashLeader(restart) => {
                self.leader().into_iter().for_each(|machine| self.crash(machine, now, restart));
            }
            Event::CrashMaintainer(restart) => {
                self.maintainer().into_iter().for_each(|machine| self.crash(machine, now, restart));
            }
            Event::CrashBoth(restart) => {
                let both = [self.leader(), self.maintainer()];
                both.into_iter().flatten().for_each(|machine| self.crash(machine, now, restart));
            }
            Event::Pause(machine, millis) => self.pause(machine, now, millis),
            Event::PauseLeader(millis) => {
                self.leader().into_iter().for_each(|machine| self.pause(machine, now, millis));
            }
            Event::PauseMaintainer(millis) => {
                self.maintainer().into_iter().for_each(|machine| self.pause(machine, now, millis));
            }
            Event::SlowLeader(extra, millis) => self.slow(self.leader(), now + millis, extra),
            Event::SlowMaintainer(extra, millis) => self.slow(self.maintainer(), now + millis, extra),
            Event::Cut(one, other, millis) => {
                if let (Some(one), Some(other)) = (self.node_of(one), self.node_of(other)) {
                    self.world.lock().cut(&one, &other, millis);
                }
            }
            Event::Isolate(machine, millis) => {
                if let Some(one) = self.node_of(machine) {
                    let others: Vec<NodeId> = self.nodes.values().map(|node| node.id.clone()).collect();
                    let mut world = self.world.lock();
                    others
                        .iter()
                        .filter(|other| **other != one)
                        .for_each(|other| world.cut(&one, other, millis));
                }
            }
            Event::CutStore(machine, millis) => {
                if let Some(node) = self.node_of(machine)
                    && let Some(process) = self.world.lock().processes.get_mut(&node)
                {
                    process.store_cut_until = now + millis;
                }
            }
            Event::StoreDown(millis) => self.world.lock().store_down_until = now + millis,
            Event::SinkFails(machine, millis) => {
                if let Some(node) = self.node_of(machine)
                    && let Some(process) = self.world.lock().processes.get_mut(&node)
                {
                    process.sink_fails_until = now + millis;
                }
            }
            Event::Clock(machine, millis) => {
                if let Some(node) = self.nodes.get_mut(&machine) {
                    node.skew = millis * 1_000;
                }
            }
            Event::Gaps(percent, millis) => self.gaps = (now + millis, percent),
            Event::Join(machine) => {
                if !self.nodes.contains_key(&machine) && !self.starting.contains_key(&machine) {
                    self.start(machine, now);
                }
            }
            Event::Drain(machine) => {
                if let Some(node) = self.node_of(machine).filter(|_| self.nodes.len() > 1) {
                    self.people.drain(node, machine);
                }
            }
            Event::DrainLeader => {
                let leader = self.leader().filter(|_| self.nodes.len() > 1);
                if let Some((machine, node)) =
                    leader.and_then(|machine| Some((machine, self.node_of(machine)?)))
                {
                    self.people.drain(node, machine);
                }
            }
            Event::CancelDrain => self.people.cancel_drain(),
            Event::PauseFeeds(millis) => {
                for id in &self.feeds {
                    self.people.pause(&id.name);
                }
                self.paused_feeds_until = Some(now + millis);
            }
            Event::MoveTable(_) | Event::SplitTable(_) | Event::MergeTable => self.place(event),
            Event::Ddl(choice) => {
                let mut guard = self.world.lock();
                let world = &mut *guard;
                let mut notes = Vec::new();
                for feed in world.feeds.values_mut() {
                    notes.extend(
                        feed.commit_ddl(choice, &mut world.random)
                            .map(|text| format!("{}: {text}", feed.id.name)),
                    );
                }
                notes.into_iter().for_each(|text| world.note(text));
            }
        }
    }

    /// A person asks a maintainer for a change of placement. It may be refused, or end otherwise.
    fn place(&self, event: &Event) {
        let (reader, id, table) = {
            let mut guard = self.world.lock();
            let world = &mut *guard;
            let n = world.random.between(0, world.feeds.len() as u64 - 1);
            let Some(feed) = world.feeds.values().nth(usize::try_from(n).unwrap_or(0)) else { return };
            let live = feed.live_tables();
            let Some(last) = (live.len() as u64).checked_sub(1) else { return };
            let table = live[usize::try_from(world.random.between(0, last)).unwrap_or(0)];
            let Some(reader) = feed.reader.clone() else { return };
            (reader.node, feed.id.clone(), TableId(table))
        };
        let Some(node) = self.nodes.values().find(|node| node.id == reader && node.paused_until.is_none())
        else {
            return;
        };
        let (placements, world) = (node.placements.clone(), Arc::clone(&self.world));
        let dest = if let Event::MoveTable(machine) = event { self.node_of(*machine) } else { None };
        let event = event.clone();
        node.spawn(async move {
            let result = match (&event, dest) {
                (Event::MoveTable(_), Some(dest)) => {
                    placements.move_split_table(&id, table, dest, true).await
                }
                (Event::SplitTable(pieces), _) => {
                    placements.split_table(&id, table, usize::try_from(*pieces).ok()).await
                }
                _ => placements.merge_table(&id, table).await,
            };
            world.lock().note(format!("{}: {event} of table {table}: {result:?}", id.name));
        });
    }

    fn leader(&self) -> Option<u32> {
        self.nodes.values().find(|node| node.coordinator().is_some()).map(|node| node.machine)
    }

    /// Where a changefeed's maintainer is, by its reader.
    fn maintainer(&self) -> Option<u32> {
        let reader = self.world.lock().feeds.values().find_map(|feed| feed.reader.clone())?;
        self.nodes.values().find(|node| node.id == reader.node).map(|node| node.machine)
    }

    /// Leases, members, processes that wake or start, and people.
    fn housekeeping(&mut self, now: u64) {
        self.wake(now);
        self.renew_leases(now);
        let starting: Vec<u32> =
            self.starting.iter().filter(|(_, at)| **at <= now).map(|(m, _)| *m).collect();
        for machine in starting {
            self.starting.remove(&machine);
            if !self.nodes.contains_key(&machine) {
                self.start(machine, now);
            }
        }
        let (version, members) = (self.members_version, Arc::clone(&self.members));
        let awake = |node: &&mut Node| node.paused_until.is_none() && node.blind_until <= now;
        for node in self.nodes.values_mut().filter(|node| node.seen < version).filter(awake) {
            let mut world = self.world.lock();
            let told = world.reaches_store(&node.id) && world.chance(20);
            drop(world);
            if told {
                node.tell_members(version, &members);
            }
        }
        if self.paused_feeds_until.is_some_and(|until| until <= now) {
            self.paused_feeds_until = None;
            for id in &self.feeds {
                self.people.resume(&id.name);
            }
        }
        self.meet_people(now);
    }

    fn meet_people(&mut self, now: u64) {
        let leader = self
            .nodes
            .values()
            .filter(|node| node.paused_until.is_none())
            .find_map(|node| Some((node.coordinator()?, node)));
        if let Some((handle, host)) = leader {
            let is_up = |id: &NodeId| self.nodes.values().any(|node| node.id == *id);
            self.people.ask(&handle, host, is_up, now);
        }
        if let Some((node, machine)) = self.people.emptied(now, &self.world) {
            self.stop(&node, machine, now, "is empty and is stopped");
        }
        if let Some((node, machine)) = self.people.restarted() {
            self.stop(&node, machine, now, "is not to be emptied any more and is started again");
        }
    }

    /// A person ends a process, and another one starts in its place.
    fn stop(&mut self, node: &NodeId, machine: u32, now: u64, why: &str) {
        if self.nodes.get(&machine).is_some_and(|present| present.id == *node) {
            self.note(format!("{node} {why}"));
            self.crash(machine, now, 500);
        }
    }

    fn wake(&mut self, now: u64) {
        for node in self.nodes.values_mut() {
            if node.paused_until.is_some_and(|until| until <= now) {
                node.paused_until = None;
                // It notices only after a moment, in which it acts as if nothing had happened.
                node.blind_until = now + self.world.lock().random.between(0, 400);
                let mut world = self.world.lock();
                world.note(format!("{} runs again", node.id));
                if let Some(process) = world.processes.get_mut(&node.id) {
                    process.paused = false;
                }
            }
        }
    }

    fn renew_leases(&mut self, now: u64) {
        let mut ended = Vec::new();
        let mut dead = Vec::new();
        for node in self.nodes.values_mut() {
            let reaches = node.paused_until.is_none() && self.world.lock().reaches_store(&node.id);
            if reaches && !node.fenced && now < node.renewed + LEASE {
                node.renewed = now;
            }
            let silent = now - node.renewed;
            if silent >= LEASE && self.members.contains_key(&node.id) {
                ended.push((node.id.clone(), node.lease));
            }
            // The process's own clock stood still while it was stopped: it learns of its loss when it runs.
            if silent >= LOCAL_FENCE && node.paused_until.is_none() && !node.fenced && node.blind_until <= now
            {
                node.lose_lease();
                dead.push(node.machine);
            }
        }
        let orphans: Vec<(NodeId, LeaseId)> = self
            .leases
            .iter()
            .filter(|(_, (_, renewed))| now - renewed >= LEASE)
            .map(|(node, (lease, _))| (node.clone(), *lease))
            .collect();
        for (node, lease) in orphans {
            self.leases.remove(&node);
            ended.push((node, lease));
        }
        for (node, lease) in ended {
            self.end_lease(&node, lease);
        }
        for machine in dead {
            if let Some(node) = self.nodes.get(&machine) {
                self.note(format!("{} fences itself", node.id));
            }
            // The process ends by itself and is started again.
            self.doomed.push((machine, now + 200));
        }
        let doomed: Vec<u32> =
            self.doomed.iter().filter(|(_, at)| *at <= now).map(|(machine, _)| *machine).collect();
        self.doomed.retain(|(_, at)| *at > now);
        for machine in doomed {
            if self.nodes.get(&machine).is_some_and(|node| node.fenced) {
                self.crash(machine, now, 300);
            }
        }
    }

    /// A lease is over: the downstream refuses the process from now on, and only then the others learn of it.
    fn end_lease(&mut self, node: &NodeId, lease: LeaseId) {
        {
            let mut world = self.world.lock();
            world.note(format!("the lease of {node} ends"));
            if let Some(process) = world.processes.get_mut(node) {
                process.fenced = true;
            }
        }
        drop(self.store.revoke(lease).now_or_never());
        let mut members = (*self.members).clone();
        members.remove(node);
        self.set_members(members);
    }

    /// What is stored never goes back and never passes what is not written.
    fn check_checkpoints(&self) {
        for id in &self.feeds {
            let key = self.layout.status(&id.keyspace, &id.name);
            let Some(Ok(found)) = self.store.get(&key).now_or_never() else { continue };
            let Some(stored) = found.found else { continue };
            let Ok(status) = serde_json::from_slice::<ChangefeedStatusDoc>(&stored.value) else { continue };
            let checkpoint = status.checkpoint_ts.0;
            let mut world = self.world.lock();
            let Some(feed) = world.feeds.get_mut(&id.gid) else { continue };
            let (before, first) = (feed.persisted, feed.first_outstanding());
            feed.persisted = checkpoint.max(before);
            if checkpoint < before {
                world.violated("CHECKPOINT-BACK", &format!("{}: {checkpoint} after {before}", id.name));
            }
            if first.is_some_and(|(first, ..)| first <= checkpoint) {
                let text = format!("{}: {checkpoint} is stored, and {first:?} is not downstream", id.name);
                world.violated("CHECKPOINT", &text);
            }
        }
    }

    fn is_done(&self) -> bool {
        let world = self.world.lock();
        self.people.is_idle()
            && world.feeds.values().all(|feed| feed.persisted >= feed.head)
            && world.feeds.values().all(|feed| super::coverage::gap(&world, feed).is_none())
    }

    /// After the end: nothing stalled, nothing differs, everything is covered once.
    fn judge(&mut self, converged: Option<u64>) {
        if self.world.lock().violation.is_some() {
            return;
        }
        let Some(took) = converged else {
            let text = self.stalled();
            self.world.lock().violated("STALL", &text);
            return;
        };
        let mut world = self.world.lock();
        world.note(format!("everything is right {:.1} s after the faults", seconds(took)));
        let feeds = std::mem::take(&mut world.feeds);
        for feed in feeds.values() {
            if let Some(difference) = feed.difference() {
                world.violated("EQUAL", &difference);
            }
        }
        world.feeds = feeds;
    }

    /// Who holds what up, for people.
    fn stalled(&self) -> String {
        let world = self.world.lock();
        let mut text = format!("people wait for {}; ", self.people.waiting());
        for feed in world.feeds.values() {
            let gap = super::coverage::gap(&world, feed);
            text += &format!(
                "{}: stored {}, committed {}, not downstream {:?}, reader {:?}, coverage {gap:?}; ",
                feed.id.name,
                feed.persisted,
                feed.head,
                feed.first_outstanding(),
                feed.reader
            );
        }
        text + &self.people.last_view()
    }
}

fn description(id: &ChangefeedId) -> ChangefeedInfo {
    let mut config = ReplicaConfig::default();
    config.scheduler.enable_table_across_nodes = true;
    let upstream = UpstreamInfo { uri: "generator://bank".to_owned(), ..UpstreamInfo::default() };
    ChangefeedInfo::new(id.clone(), upstream, "blackhole://", config, Ts(START))
}
