//! What a plan lets happen: to processes, to links, to the databases, and what people ask for.

use std::sync::Arc;

use heartbeatpb::{NodeId, TableId};

use super::Simulation;
use crate::sim::feed::DdlChoice;
use crate::sim::plan::Event;
use crate::sim::world::Process;

impl Simulation<'_> {
    pub(super) fn happen(&mut self, event: &Event, now: u64) {
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
            Event::SlowPath(to, extra, millis) => {
                if let Some(to) = self.node_of(to) {
                    self.slow_to(self.maintainer(), Some(to), now + millis, extra);
                }
            }
            Event::EchoLeader(late, millis) => self.echo(self.leader(), now + millis, late),
            Event::EchoMaintainer(late, millis) => self.echo(self.maintainer(), now + millis, late),
            Event::Cut(one, other, millis) => {
                if let (Some(one), Some(other)) = (self.node_of(one), self.node_of(other)) {
                    self.world.lock().cut(&one, &other, millis);
                }
            }
            Event::CutPath(to, millis) => {
                let from = self.maintainer().and_then(|machine| self.node_of(machine));
                if let (Some(from), Some(to)) = (from, self.node_of(to))
                    && from != to
                {
                    self.world.lock().cut(&from, &to, millis);
                }
            }
            Event::Isolate(machine, millis) => self.isolate(machine, millis),
            Event::CutStore(machine, millis) => {
                self.with_process(machine, |process| process.store_cut_until = now + millis);
            }
            Event::StoreDown(millis) => self.world.lock().store_down_until = now + millis,
            Event::FlakyStore(percent, millis) => {
                self.world.lock().store_flaky = (now + millis, percent);
            }
            Event::SinkFails(machine, millis) => {
                self.with_process(machine, |process| process.sink_fails_until = now + millis);
            }
            Event::SlowTarget(machine, extra, millis) => {
                self.with_process(machine, |process| process.sink_slow = (now + millis, extra));
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
            Event::Drain(machine) => self.drain(Some(machine)),
            Event::DrainLeader => self.drain(self.leader()),
            Event::DrainMaintainer => self.drain(self.maintainer()),
            Event::CancelDrain => self.people.cancel_drain(),
            Event::PauseFeeds(millis) => {
                for id in &self.feeds {
                    self.people.pause(&id.name);
                }
                self.paused_feeds_until = Some(now + millis);
            }
            Event::MoveTable(_) | Event::SplitTable(_) | Event::MergeTable => self.place(event),
            Event::Ddl(choice) => self.change_schema(choice),
        }
    }

    pub(super) fn crash(&mut self, machine: u32, now: u64, restart: u64) {
        let Some(node) = self.nodes.remove(&machine) else { return };
        self.note(format!("{} is killed", node.id));
        self.world.lock().bury(&node.id);
        self.starting.insert(machine, now + restart);
    }

    fn pause(&mut self, machine: u32, now: u64, millis: u64) {
        let Some(node) = self.nodes.get_mut(&machine) else { return };
        node.paused_until = Some(now + millis);
        if let Some(process) = self.world.lock().processes.get_mut(&node.id) {
            process.paused = true;
        }
    }

    fn slow(&self, machine: Option<u32>, until: u64, extra: u64) {
        self.slow_to(machine, None, until, extra);
    }

    fn slow_to(&self, machine: Option<u32>, to: Option<NodeId>, until: u64, extra: u64) {
        if let Some(node) = machine.and_then(|machine| self.node_of(machine)) {
            self.world.lock().slow.insert((node, to), (until, extra));
        }
    }

    fn echo(&self, machine: Option<u32>, until: u64, late: u64) {
        if let Some(node) = machine.and_then(|machine| self.node_of(machine)) {
            self.world.lock().echoes.insert(node, (until, late));
        }
    }

    fn with_process(&self, machine: u32, change: impl FnOnce(&mut Process)) {
        if let Some(node) = self.node_of(machine)
            && let Some(process) = self.world.lock().processes.get_mut(&node)
        {
            change(process);
        }
    }

    fn isolate(&self, machine: u32, millis: u64) {
        let Some(one) = self.node_of(machine) else { return };
        let others: Vec<NodeId> = self.nodes.values().map(|node| node.id.clone()).collect();
        let mut world = self.world.lock();
        others.iter().filter(|other| **other != one).for_each(|other| world.cut(&one, other, millis));
    }

    /// A person wants the process of a machine emptied, unless it is the only one.
    fn drain(&mut self, machine: Option<u32>) {
        let machine = machine.filter(|_| self.nodes.len() > 1);
        if let Some((machine, node)) = machine.and_then(|machine| Some((machine, self.node_of(machine)?))) {
            self.people.drain(node, machine);
        }
    }

    fn change_schema(&self, choice: DdlChoice) {
        let mut guard = self.world.lock();
        let world = &mut *guard;
        let mut notes = Vec::new();
        for feed in world.feeds.values_mut() {
            let done = feed.commit_ddl(choice, &mut world.random);
            notes.extend(done.map(|text| format!("{}: {text}", feed.id.name)));
        }
        notes.into_iter().for_each(|text| world.note(text));
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
}
