//! What goes on beside the plan: leases and members, processes that wake or start again, and people.

use coordinator::backend::{LeaseId, Store};
use coordinator::watchdog::Verdict;
use futures_util::FutureExt;
use heartbeatpb::NodeId;

use super::Simulation;
use crate::sim::members::LEASE;
use crate::sim::process::Node;
use crate::sim::world::World;

/// A process that was told to stop is killed after this time.
const GRACE: u64 = 8_000;
/// How often a process looks at its lease, as the thread of a node does.
const LOOK: u64 = 50;

impl Simulation<'_> {
    /// Leases, members, processes that wake or start, and people.
    pub(super) fn housekeeping(&mut self, now: u64) {
        self.wake(now);
        self.end_leases(now);
        if now.is_multiple_of(LOOK) {
            self.watch_leases(now);
        }
        let starting: Vec<u32> =
            self.starting.iter().filter(|(_, at)| **at <= now).map(|(m, _)| *m).collect();
        for machine in starting {
            self.starting.remove(&machine);
            if !self.nodes.contains_key(&machine) {
                self.start(machine, now);
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

    /// A person ends a process, and another one starts in its place: in good order, or not.
    fn stop(&mut self, node: &NodeId, machine: u32, now: u64, why: &str) {
        let Some(present) = self.nodes.get_mut(&machine).filter(|present| present.id == *node) else {
            return;
        };
        let mut world = self.world.lock();
        world.note(format!("{node} {why}"));
        let orderly = world.chance(50) && present.paused_until.is_none() && !present.lost;
        drop(world);
        if !orderly {
            self.crash(machine, now, 500);
        } else if present.leaving.is_none() {
            present.leave(now + GRACE);
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

    /// The metadata store gives up leases that were not renewed. While nobody reaches it, it gives up none, and all of
    /// them begin anew afterwards, as those of an etcd without a leader do.
    fn end_leases(&mut self, now: u64) {
        let ttl = u64::try_from(LEASE.as_millis()).unwrap_or(u64::MAX);
        let ended: Vec<LeaseId> = {
            let mut world = self.world.lock();
            let is_down = world.store_down_until > now;
            let leases = &mut world.leases;
            if is_down {
                leases.values_mut().for_each(|renewed| *renewed = now);
            }
            let ended: Vec<LeaseId> = leases
                .iter()
                .filter(|(_, renewed)| now >= **renewed + ttl)
                .map(|(lease, _)| *lease)
                .collect();
            leases.retain(|lease, _| !ended.contains(lease));
            ended
        };
        for lease in ended {
            self.note(format!("the lease {:x} ends", lease.0));
            drop(self.store.revoke(lease).now_or_never());
        }
    }

    /// Every process that runs looks at its lease. One that may not write any more ends by itself and is started again.
    fn watch_leases(&mut self, now: u64) {
        let mut ended = Vec::new();
        for node in self.nodes.values_mut().filter(|node| node.paused_until.is_none()) {
            let why = watch_lease(node, &mut self.world.lock(), now);
            if let Some(why) = why.filter(|_| !node.lost) {
                self.world.lock().note(format!("{} fences itself: {why}", node.id));
                node.lose_lease();
                self.doomed.push((node.machine, now + 200));
            } else if node.has_left() || node.leaving.is_some_and(|deadline| deadline <= now) {
                ended.push(node.machine);
            }
        }
        for machine in ended {
            self.crash(machine, now, 500);
        }
        let doomed: Vec<u32> =
            self.doomed.iter().filter(|(_, at)| *at <= now).map(|(machine, _)| *machine).collect();
        self.doomed.retain(|(_, at)| *at > now);
        for machine in doomed {
            if self.nodes.get(&machine).is_some_and(|node| node.lost) {
                self.crash(machine, now, 300);
            }
        }
    }
}

/// Looks at a process's lease; says why it may not write any more.
fn watch_lease(node: &mut Node, world: &mut World, now: u64) -> Option<String> {
    let mut why = node.has_failed().then(|| "it cannot stand for election any more".to_owned());
    if node.blind_until <= now {
        for verdict in node.watch(world.clock(), |at| world.micros(at)) {
            match verdict {
                Verdict::Suspended => world.note(format!("{} writes nothing for now", node.id)),
                Verdict::Resumed { after } => world.note(format!("{} writes again after {after:?}", node.id)),
                Verdict::Lost(lost) => why = Some(lost.to_string()),
            }
        }
    }
    if why.is_some()
        && let Some(process) = world.processes.get_mut(&node.id)
    {
        process.lost = true;
    }
    why
}
