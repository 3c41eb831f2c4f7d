//! The store of the walk, which is slow and forgets to answer, and what must hold of it.

use std::collections::BTreeMap;

use coordinator::Error;
use coordinator::core::Write;
use coordinator::meta::{CheckpointWrite, Stored};
use heartbeatpb::{ChangefeedId, NodeId};
use messaging::ToMaintainerManager;

use super::model::Node;
use super::{Walk, wire};

/// What was true of a changefeed.
#[derive(Clone, Copy, Debug, Default)]
struct Past {
    epoch: u64,
    checkpoint: u64,
    /// Nobody got further.
    reached: u64,
    /// The epoch since which that counts: a person set the checkpoint then.
    since: u64,
}

/// What was stored, and what maintainers got to.
#[derive(Debug, Default)]
pub(super) struct History {
    feeds: BTreeMap<ChangefeedId, Past>,
    /// Whom each epoch of a drain was for.
    targets: BTreeMap<u64, NodeId>,
}

impl History {
    /// The largest epoch that was stored.
    pub(super) fn epoch(&self, id: &ChangefeedId) -> u64 {
        self.feeds.get(id).map_or(0, |past| past.epoch)
    }

    /// Takes a look at how far maintainers are.
    pub(super) fn reached(&mut self, nodes: &BTreeMap<NodeId, Node>) {
        for (id, maintainer) in nodes.values().flat_map(|node| &node.maintainers) {
            if let Some(past) = self.feeds.get_mut(id).filter(|past| maintainer.epoch >= past.since) {
                past.reached = past.reached.max(maintainer.checkpoint);
            }
        }
    }

    /// Epochs and checkpoints only grow.
    pub(super) fn check_disk(&mut self, disk: &[Stored]) {
        for stored in disk {
            let id = &stored.info.id;
            let (epoch, checkpoint) = (wire(stored.info.epoch), stored.status.checkpoint_ts.0);
            let first = Past { reached: checkpoint, ..Past::default() };
            let past = self.feeds.entry(id.clone()).or_insert(first);
            assert!(past.epoch <= epoch, "the epoch of {id} went back");
            assert!(past.checkpoint <= checkpoint, "the checkpoint of {id} went back");
            assert!(checkpoint <= past.reached, "the checkpoint of {id} is further than anybody got");
            (past.epoch, past.checkpoint) = (epoch, checkpoint);
        }
    }

    /// A person set the checkpoint.
    fn overwritten(&mut self, stored: &Stored) {
        let (epoch, checkpoint) = (wire(stored.info.epoch), stored.status.checkpoint_ts.0);
        let past = Past { epoch, checkpoint, reached: checkpoint, since: epoch };
        self.feeds.insert(stored.info.id.clone(), past);
    }
}

impl Walk {
    /// Nothing is told that is not stored.
    pub(super) fn check_command(&mut self, message: &ToMaintainerManager) {
        if let ToMaintainerManager::AddMaintainer(add) = message {
            let past = self.history.feeds.get(&add.changefeed).copied().unwrap_or_default();
            let stored = self.world.disk.iter().find(|stored| stored.info.id == add.changefeed);
            let epoch = stored.map_or(past.epoch, |stored| wire(stored.info.epoch));
            assert!(wire(add.epoch) <= epoch, "an epoch is durable before it is told");
            let current = wire(add.epoch) >= past.since;
            assert!(!current || add.checkpoint.0 <= past.reached, "a start further than anybody got");
        }
        if let ToMaintainerManager::CheckpointTs(told) = message
            && let Some(past) = self.history.feeds.get(&told.changefeed)
        {
            let stored = self.world.disk.iter().find(|stored| stored.info.id == told.changefeed);
            let known = stored.map_or(past.checkpoint, |stored| stored.status.checkpoint_ts.0);
            // Who was told before a person set it back is not the maintainer any more.
            assert!(
                told.checkpoint.0 <= known || past.since > 0,
                "a checkpoint is durable before it is told"
            );
        }
        if let ToMaintainerManager::SetDrainTarget(request) = message
            && let Some(target) = &request.target
        {
            let stored = self.world.drain.as_ref().unwrap();
            assert!(request.epoch <= stored.epoch, "a drain is durable before it is told");
            let first = self.history.targets.entry(request.epoch).or_insert_with(|| target.clone());
            assert_eq!(first, target, "two drains of one epoch");
        }
    }

    fn apply(&mut self, id: &ChangefeedId, write: &Write) -> Result<Option<Stored>, Error> {
        let result = self.world.write(id, write);
        self.trace(Some(id), || format!("wrote {}: {}", crate::world::name_of(write), result.is_ok()));
        if let (Write::Resume { overwrite: Some(_), .. }, Ok(Some(stored))) = (write, &result) {
            self.history.overwritten(stored);
        }
        self.history.check_disk(&self.world.disk);
        result
    }

    /// Some of the writes under way happen.
    pub(super) fn write(&mut self) {
        while !(self.world.pending.is_empty() || self.faults && self.random.one_in(3)) {
            let at = self.random.below(self.world.pending.len());
            let (id, write) = self.world.pending.remove(at);
            let result = if self.faults && self.random.one_in(8) {
                // Whether a creation was stored is found out before it is answered.
                if self.random.one_in(2) && !matches!(write, Write::Create { .. }) {
                    let _ = self.apply(&id, &write);
                }
                Err(Error::Conflict(id.to_string()))
            } else {
                self.apply(&id, &write)
            };
            let actions = self.world.core.on_written(&id, result, self.world.now);
            self.perform(actions);
        }
        if self.faults && self.random.one_in(3) {
            return;
        }
        if let Some(doc) = self.world.pending_drain.take() {
            // A lost answer: the document may be stored although the coordinator does not know.
            let lost = self.faults && self.random.one_in(6);
            if !lost || self.random.one_in(2) {
                self.world.drain = Some(doc);
            }
            let result = if lost { Err(Error::Conflict("drain".to_owned())) } else { Ok(()) };
            let actions = self.world.core.on_drain_written(result, self.world.now);
            self.perform(actions);
        }
    }

    /// Checkpoints are stored, or some of them, or the answer is lost.
    pub(super) fn save(&mut self, writes: &[CheckpointWrite]) {
        let mut durable = Vec::new();
        for write in writes {
            if self.faults && self.random.one_in(10) {
                continue;
            }
            let Some(stored) = self.world.stored(&write.id) else { continue };
            if write.epoch < stored.status.epoch {
                continue;
            }
            if write.checkpoint > stored.status.checkpoint_ts {
                (stored.status.checkpoint_ts, stored.status.epoch) = (write.checkpoint, write.epoch);
            }
            durable.push(write.clone());
        }
        if self.faults && self.random.one_in(10) {
            durable.clear();
        }
        self.history.check_disk(&self.world.disk);
        let actions = self.world.core.on_checkpoints_saved(&durable, self.world.now);
        self.perform(actions);
    }

    /// The coordinator is replaced: writes under way are applied or not, and only the former one may hear of it.
    pub(super) fn leave_writes(&mut self) {
        for (id, write) in std::mem::take(&mut self.world.pending) {
            if !self.random.one_in(2) {
                continue;
            }
            let result = self.apply(&id, &write);
            if self.random.one_in(2)
                && let Some((_, core)) = &mut self.former
            {
                let actions = core.on_written(&id, result, self.world.now);
                self.perform_former(actions);
            }
        }
        if let Some(doc) = self.world.pending_drain.take()
            && self.random.one_in(2)
        {
            self.world.drain = Some(doc);
            if self.random.one_in(2)
                && let Some((_, core)) = &mut self.former
            {
                let actions = core.on_drain_written(Ok(()), self.world.now);
                self.perform_former(actions);
            }
        }
    }
}
