//! Requests that wait: one per changefeed and type, in order of arrival (spec/dispatcher.md §1).

use std::collections::{BTreeMap, VecDeque};

use heartbeatpb::{Gid, MaintainerEpoch, NodeId};
use messaging::ToOrchestrator;

/// Type of a request.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Kind {
    Bootstrap,
    PostBootstrap,
    Close,
}

type Key = (Gid, Kind);

fn key(request: &ToOrchestrator) -> Key {
    match request {
        ToOrchestrator::Bootstrap(request) => (request.changefeed.gid, Kind::Bootstrap),
        ToOrchestrator::PostBootstrap(request) => (request.changefeed.gid, Kind::PostBootstrap),
        ToOrchestrator::Close(request) => (request.changefeed.gid, Kind::Close),
    }
}

fn epoch(request: &ToOrchestrator) -> Option<MaintainerEpoch> {
    match request {
        ToOrchestrator::Bootstrap(request) => request.epoch,
        ToOrchestrator::PostBootstrap(request) => request.epoch,
        ToOrchestrator::Close(request) => request.epoch,
    }
}

/// Whether `new` takes the place of `old` in the queue.
fn replaces(new: &ToOrchestrator, old: &ToOrchestrator) -> bool {
    if epoch(new) > epoch(old) {
        return true;
    }
    match (new, old) {
        (ToOrchestrator::Close(new), ToOrchestrator::Close(old)) => {
            !old.removed && new.removed && new.epoch >= old.epoch
        }
        (
            ToOrchestrator::Bootstrap(_) | ToOrchestrator::PostBootstrap(_) | ToOrchestrator::Close(_),
            ToOrchestrator::Bootstrap(_) | ToOrchestrator::PostBootstrap(_) | ToOrchestrator::Close(_),
        ) => false,
    }
}

/// The queue of one shard.
#[derive(Debug, Default)]
pub(crate) struct Pending {
    order: VecDeque<Key>,
    requests: BTreeMap<Key, (NodeId, ToOrchestrator)>,
}

impl Pending {
    /// Queues a request, or lets it replace the one of its key in place; says whether it was taken.
    pub(crate) fn push(&mut self, from: NodeId, request: ToOrchestrator) -> bool {
        let key = key(&request);
        match self.requests.get_mut(&key) {
            Some(waiting) => {
                let taken = replaces(&request, &waiting.1);
                if taken {
                    *waiting = (from, request);
                }
                taken
            }
            None => {
                self.requests.insert(key, (from, request));
                self.order.push_back(key);
                true
            }
        }
    }

    /// The next request; its key is free again, so that a retry can wait while this one is handled.
    pub(crate) fn pop(&mut self) -> Option<(NodeId, ToOrchestrator)> {
        let key = self.order.pop_front()?;
        self.requests.remove(&key)
    }
}

#[cfg(test)]
mod tests {
    use heartbeatpb::{ChangefeedId, ConfigBytes, MaintainerBootstrapRequest, MaintainerCloseRequest, Ts};

    use super::*;

    fn id(n: u64) -> ChangefeedId {
        ChangefeedId { gid: Gid::new(0, n), name: "t".into(), keyspace: "default".into() }
    }

    fn close(n: u64, epoch: u64, removed: bool) -> ToOrchestrator {
        let epoch = MaintainerEpoch::from_wire(epoch);
        ToOrchestrator::Close(MaintainerCloseRequest { changefeed: id(n), removed, epoch })
    }

    fn bootstrap(n: u64, epoch: u64) -> ToOrchestrator {
        ToOrchestrator::Bootstrap(MaintainerBootstrapRequest {
            changefeed: id(n),
            config: ConfigBytes(Vec::new().into()),
            start_ts: Ts(1),
            trigger: None,
            is_new: false,
            redo_trigger: None,
            keyspace_id: 0,
            epoch: MaintainerEpoch::from_wire(epoch),
        })
    }

    fn queue(requests: Vec<ToOrchestrator>) -> Vec<ToOrchestrator> {
        let mut pending = Pending::default();
        for request in requests {
            pending.push("n".into(), request);
        }
        std::iter::from_fn(|| pending.pop().map(|(_, request)| request)).collect()
    }

    // behaviour: dispatcher-4, dispatcher-5, dispatcher-11
    #[test]
    fn a_key_waits_once_and_other_keys_keep_their_order() {
        let queued = queue(vec![bootstrap(1, 1), bootstrap(2, 1), bootstrap(1, 1), close(1, 1, false)]);
        assert_eq!(queued, [bootstrap(1, 1), bootstrap(2, 1), close(1, 1, false)]);
    }

    // behaviour: dispatcher-7, dispatcher-8
    #[test]
    fn a_removal_replaces_a_plain_close_but_not_one_of_a_newer_epoch() {
        assert_eq!(queue(vec![close(1, 1, false), close(1, 1, true)]), [close(1, 1, true)]);
        assert_eq!(queue(vec![close(1, 2, false), close(1, 1, true)]), [close(1, 2, false)]);
        assert_eq!(queue(vec![close(1, 1, true), close(1, 1, false)]), [close(1, 1, true)]);
    }

    // behaviour: dispatcher-9
    #[test]
    fn a_newer_owner_takes_the_place_of_an_older_one() {
        let queued = queue(vec![bootstrap(1, 1), bootstrap(2, 1), bootstrap(1, 2)]);
        assert_eq!(queued, [bootstrap(1, 2), bootstrap(2, 1)]);
        assert_eq!(queue(vec![bootstrap(1, 2), bootstrap(1, 1), bootstrap(1, 0)]), [bootstrap(1, 2)]);
    }

    // behaviour: dispatcher-10
    #[test]
    fn a_request_can_wait_while_one_of_its_key_is_handled() {
        let mut pending = Pending::default();
        pending.push("n".into(), close(1, 1, false));
        assert!(pending.pop().is_some());
        assert!(pending.push("n".into(), close(1, 1, true)));
        assert_eq!(pending.pop().map(|(_, request)| request), Some(close(1, 1, true)));
    }
}
