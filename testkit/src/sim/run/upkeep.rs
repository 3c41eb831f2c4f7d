//! What goes on beside the plan: leases and members, processes that wake or start again, and people.

use std::sync::Arc;

use coordinator::backend::{LeaseId, Store};
use futures_util::FutureExt;
use heartbeatpb::NodeId;

use super::Simulation;
use crate::sim::process::Node;

/// A lease ends when it was not renewed for so long.
const LEASE: u64 = 3_000;
/// A process that could not renew its lease for so long stops writing by itself.
const LOCAL_FENCE: u64 = 2_000;

impl Simulation<'_> {
    /// Leases, members, processes that wake or start, and people.
    pub(super) fn housekeeping(&mut self, now: u64) {
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
}
