//! Schedule requests between their acceptance and their completion (dispatcher §9.4).
//!
//! J1 at most one entry per dispatcher · J2 an entry lives from acceptance to completion · J3 an entry of a
//! superseded owner blocks nobody · J4 a Remove entry has a dispatcher · J5 every entry can go.

use std::collections::BTreeMap;

use heartbeatpb::{DispatcherId, Mode, NodeId, Owner, Rule, ScheduleAction, ScheduleDispatcherRequest};

#[derive(Debug)]
struct Entry {
    from: NodeId,
    request: ScheduleDispatcherRequest,
}

/// The requests in flight, one per dispatcher.
#[derive(Debug, Default)]
pub(crate) struct Journal {
    entries: BTreeMap<DispatcherId, Entry>,
}

impl Journal {
    /// A request was accepted; it replaces an earlier one for the same dispatcher.
    pub(crate) fn put(&mut self, from: &NodeId, request: ScheduleDispatcherRequest) {
        self.entries.insert(request.config.dispatcher, Entry { from: from.clone(), request });
    }

    /// The request for a dispatcher, if any.
    pub(crate) fn get(&self, id: DispatcherId) -> Option<&ScheduleDispatcherRequest> {
        self.entries.get(&id).map(|entry| &entry.request)
    }

    /// A request is complete, failed, or void.
    pub(crate) fn delete(&mut self, id: DispatcherId) {
        self.entries.remove(&id);
    }

    /// A creation is complete.
    pub(crate) fn created(&mut self, id: DispatcherId) {
        if self.get(id).is_some_and(|request| request.action == ScheduleAction::Create) {
            self.delete(id);
        }
    }

    /// Deletes the entry of a dispatcher if its sender is not the owner any more.
    pub(crate) fn prune(&mut self, id: DispatcherId, owner: &Owner) {
        if self.entries.get(&id).is_some_and(|entry| !allowed(entry, owner)) && Rule::OwnerFence.holds() {
            self.entries.remove(&id);
        }
    }

    /// What a bootstrap tells the owner: its own requests, and removals by earlier owners of dispatchers that
    /// the same answer lists. Everything else is stale and goes.
    pub(crate) fn bootstrap(
        &mut self,
        owner: &Owner,
        reported: impl Fn(DispatcherId, Mode) -> bool,
    ) -> Vec<ScheduleDispatcherRequest> {
        self.entries.retain(|id, entry| {
            let config = &entry.request.config;
            let removing = entry.request.action == ScheduleAction::Remove;
            let keep = allowed(entry, owner) || (removing && reported(*id, config.mode));
            if !keep {
                tracing::debug!(dispatcher = %id, "dropped a request of an earlier owner");
            }
            keep
        });
        self.entries.values().map(|entry| entry.request.clone()).collect()
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.entries.clear();
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }
}

fn allowed(entry: &Entry, owner: &Owner) -> bool {
    owner.allows(&entry.from, entry.request.epoch)
}

#[cfg(test)]
mod tests {
    use heartbeatpb::{ChangefeedId, MaintainerEpoch, OperatorType};

    use super::*;
    use crate::dispatcher::testing::{config, id};

    fn request(n: u64, action: ScheduleAction, epoch: u64) -> ScheduleDispatcherRequest {
        ScheduleDispatcherRequest {
            changefeed: ChangefeedId::fresh("test"),
            config: config(n, 1, 5),
            action,
            operator: OperatorType::Add,
            epoch: MaintainerEpoch::from_wire(epoch),
        }
    }

    fn owner(epoch: u64) -> Owner {
        Owner { node: "a".into(), epoch: MaintainerEpoch::from_wire(epoch) }
    }

    // behaviour: dispatcher-15, dispatcher-16
    #[test]
    fn a_new_owner_hears_of_its_own_requests_and_of_removals_that_still_run() {
        let mut journal = Journal::default();
        let from = NodeId::from("a");
        journal.put(&from, request(1, ScheduleAction::Create, 2));
        journal.put(&from, request(2, ScheduleAction::Create, 1));
        journal.put(&from, request(3, ScheduleAction::Remove, 1));
        journal.put(&from, request(4, ScheduleAction::Remove, 1));
        // The list of spans is the answer's own; what the live table says by now does not matter.
        let reported = |dispatcher, _| dispatcher == id(3);
        let listed: Vec<_> =
            journal.bootstrap(&owner(2), reported).iter().map(|r| r.config.dispatcher).collect();
        assert_eq!(listed, vec![id(1), id(3)]);
        assert_eq!(journal.len(), 2, "what is stale is gone at once");
    }

    // behaviour: dispatcher-36
    #[test]
    fn the_list_is_a_copy() {
        let mut journal = Journal::default();
        journal.put(&NodeId::from("a"), request(1, ScheduleAction::Create, 2));
        let mut listed = journal.bootstrap(&owner(2), |_, _| true);
        listed[0].operator = OperatorType::Merge;
        assert_eq!(journal.get(id(1)).map(|r| r.operator), Some(OperatorType::Add));
    }

    #[test]
    fn only_a_creation_is_completed_by_a_creation() {
        let mut journal = Journal::default();
        journal.put(&NodeId::from("a"), request(1, ScheduleAction::Create, 2));
        journal.put(&NodeId::from("a"), request(1, ScheduleAction::Remove, 2));
        assert_eq!(journal.len(), 1);
        journal.created(id(1));
        assert_eq!(journal.len(), 1);
        journal.delete(id(1));
        assert_eq!(journal.len(), 0);
    }
}
