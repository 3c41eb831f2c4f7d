//! Which managers the node has. All under one lock that is held for map edits only, never across a wait.

use std::collections::BTreeMap;
use std::time::Instant;

use dispatcher_manager::{ManagerHandle, WritePath};
use heartbeatpb::{ChangefeedId, Gid, MaintainerEpoch, Rule};
use parking_lot::Mutex;

use crate::tombstone::Tombstones;

/// What a bootstrap finds.
#[derive(Debug)]
pub(crate) enum Found {
    /// A manager.
    Manager(ManagerHandle),
    /// No manager, and none may be created for this owner.
    Blocked,
    /// No manager.
    Nothing,
}

#[derive(Debug, Default)]
struct State {
    managers: BTreeMap<Gid, ManagerHandle>,
    /// Write paths of managers that are being created.
    initializing: BTreeMap<Gid, WritePath>,
    tombstones: Tombstones,
    fenced: bool,
    closed: bool,
}

/// The managers of a node.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    state: Mutex<State>,
}

impl Registry {
    /// Whether requests are served. After a fence or a close they never are again.
    pub(crate) fn is_open(&self) -> bool {
        let state = self.state.lock();
        !state.fenced && !state.closed
    }

    pub(crate) fn find(&self, gid: Gid, epoch: Option<MaintainerEpoch>, now: Instant) -> Found {
        let state = self.state.lock();
        match state.managers.get(&gid) {
            Some(manager) => Found::Manager(manager.clone()),
            None if state.tombstones.blocks(gid, epoch, now) && Rule::Tombstone.holds() => Found::Blocked,
            None => Found::Nothing,
        }
    }

    pub(crate) fn manager(&self, gid: Gid) -> Option<ManagerHandle> {
        self.state.lock().managers.get(&gid).cloned()
    }

    /// A manager is about to be created; from now on a fence reaches it. `None` after a fence or a close.
    pub(crate) fn begin(&self, gid: Gid) -> Option<WritePath> {
        let mut state = self.state.lock();
        if state.fenced || state.closed {
            return None;
        }
        let write_path = WritePath::default();
        state.initializing.insert(gid, write_path.clone());
        Some(write_path)
    }

    /// The creation failed.
    pub(crate) fn abandon(&self, gid: Gid) {
        self.state.lock().initializing.remove(&gid);
    }

    /// The manager exists: it becomes visible and its tombstone goes, in one step. False after a fence or a
    /// close; the manager is then fenced.
    pub(crate) fn insert(&self, gid: Gid, manager: &ManagerHandle) -> bool {
        let mut state = self.state.lock();
        state.initializing.remove(&gid);
        if state.fenced || state.closed {
            manager.local_fence();
            return false;
        }
        state.tombstones.clear(gid);
        state.managers.insert(gid, manager.clone());
        true
    }

    /// Forgets a manager that has ended.
    pub(crate) fn remove_ended(&self, gid: Gid) {
        let mut state = self.state.lock();
        if state.managers.get(&gid).is_some_and(ManagerHandle::is_closed) {
            state.managers.remove(&gid);
        }
    }

    /// A changefeed was closed here.
    pub(crate) fn closed(
        &self,
        changefeed: &ChangefeedId,
        epoch: Option<MaintainerEpoch>,
        removed: bool,
        now: Instant,
    ) {
        let mut state = self.state.lock();
        state.managers.remove(&changefeed.gid);
        state.tombstones.record(changefeed.gid, epoch, removed, now);
    }

    /// Stops every downstream write at once, those of managers in creation too. For good.
    pub(crate) fn fence(&self) {
        let mut state = self.state.lock();
        state.fenced = true;
        state.initializing.values().for_each(WritePath::fence);
        state.managers.values().for_each(ManagerHandle::local_fence);
    }

    /// Serves nothing more. What is being created holds nothing yet and is given up.
    pub(crate) fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        state.initializing.values().for_each(WritePath::fence);
    }

    /// All managers.
    pub(crate) fn managers(&self) -> Vec<ManagerHandle> {
        self.state.lock().managers.values().cloned().collect()
    }
}
