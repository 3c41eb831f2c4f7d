//! Requests that wait in a shard: at most one per changefeed and kind, the newest owner's (dispatcher §1).

use std::collections::{BTreeMap, VecDeque};

use heartbeatpb::{ChangefeedId, Gid, MaintainerEpoch, NodeId};
use messaging::ToOrchestrator;

/// What a request asks for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Kind {
    Bootstrap,
    PostBootstrap,
    Close,
}

/// A request with its sender.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) from: NodeId,
    pub(crate) message: ToOrchestrator,
}

/// What became of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Pushed {
    /// It waits at the end.
    Queued,
    /// It waits in the place of an earlier one.
    Replaced,
    /// The one that waits already is as good, or the queue is closed.
    Dropped,
}

type Key = (Gid, Kind);

impl Request {
    pub(crate) fn changefeed(&self) -> &ChangefeedId {
        match &self.message {
            ToOrchestrator::Bootstrap(request) => &request.changefeed,
            ToOrchestrator::PostBootstrap(request) => &request.changefeed,
            ToOrchestrator::Close(request) => &request.changefeed,
        }
    }

    pub(crate) fn kind(&self) -> Kind {
        match &self.message {
            ToOrchestrator::Bootstrap(_) => Kind::Bootstrap,
            ToOrchestrator::PostBootstrap(_) => Kind::PostBootstrap,
            ToOrchestrator::Close(_) => Kind::Close,
        }
    }

    fn key(&self) -> Key {
        (self.changefeed().gid, self.kind())
    }

    /// Its owner's epoch; that of a sender without epochs is smaller than every other.
    pub(crate) fn epoch(&self) -> u64 {
        MaintainerEpoch::to_wire(match &self.message {
            ToOrchestrator::Bootstrap(request) => request.epoch,
            ToOrchestrator::PostBootstrap(request) => request.epoch,
            ToOrchestrator::Close(request) => request.epoch,
        })
    }

    /// Whether it deletes the changefeed.
    fn removes(&self) -> bool {
        match &self.message {
            ToOrchestrator::Close(request) => request.removed,
            ToOrchestrator::Bootstrap(_) | ToOrchestrator::PostBootstrap(_) => false,
        }
    }

    /// Whether it takes the place of `old`, which waits under the same key.
    fn replaces(&self, old: &Request) -> bool {
        self.epoch() > old.epoch() || (!old.removes() && self.removes() && self.epoch() >= old.epoch())
    }
}

/// The shard of a changefeed.
pub(crate) fn shard_of(gid: Gid, shards: usize) -> usize {
    let hash = gid.low ^ (gid.high << 1);
    usize::try_from(hash % shards as u64).expect("smaller than the number of shards")
}

/// Keys in order of arrival, and the newest request of each.
#[derive(Debug, Default)]
pub(crate) struct PendingQueue {
    order: VecDeque<Key>,
    pending: BTreeMap<Key, Request>,
    closed: bool,
}

impl PendingQueue {
    /// A request arrived.
    pub(crate) fn push(&mut self, request: Request) -> Pushed {
        if self.closed {
            return Pushed::Dropped;
        }
        let key = request.key();
        match self.pending.get_mut(&key) {
            None => {
                self.order.push_back(key);
                self.pending.insert(key, request);
                Pushed::Queued
            }
            Some(old) if request.replaces(old) => {
                *old = request;
                Pushed::Replaced
            }
            Some(_) => Pushed::Dropped,
        }
    }

    /// The next request. Its key is free from now on: a repetition may wait while this one runs.
    pub(crate) fn pop(&mut self) -> Option<Request> {
        let key = self.order.pop_front()?;
        self.pending.remove(&key)
    }

    /// Takes nothing more; what waits stays.
    pub(crate) fn close(&mut self) {
        self.closed = true;
    }

    /// Whether nothing comes any more.
    pub(crate) fn is_finished(&self) -> bool {
        self.closed && self.order.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use heartbeatpb::{
        ConfigBytes, DispatcherId, MaintainerBootstrapRequest, MaintainerCloseRequest,
        MaintainerPostBootstrapRequest, Ts,
    };

    use super::*;

    fn feed(n: u64) -> ChangefeedId {
        ChangefeedId { gid: Gid::new(0, n), name: "test".into(), keyspace: "default".into() }
    }

    fn request(message: ToOrchestrator) -> Request {
        Request { from: NodeId::from("a"), message }
    }

    fn bootstrap(n: u64, epoch: u64) -> Request {
        request(ToOrchestrator::Bootstrap(MaintainerBootstrapRequest {
            changefeed: feed(n),
            config: ConfigBytes([].into()),
            start_ts: Ts(1),
            trigger: None,
            is_new: false,
            redo_trigger: None,
            keyspace_id: 0,
            epoch: MaintainerEpoch::from_wire(epoch),
        }))
    }

    fn post_bootstrap(n: u64, epoch: u64) -> Request {
        request(ToOrchestrator::PostBootstrap(MaintainerPostBootstrapRequest {
            changefeed: feed(n),
            trigger: DispatcherId::new(0, 1),
            schemas: Vec::new(),
            redo_schemas: Vec::new(),
            epoch: MaintainerEpoch::from_wire(epoch),
        }))
    }

    fn close(n: u64, epoch: u64, removed: bool) -> Request {
        request(ToOrchestrator::Close(MaintainerCloseRequest {
            changefeed: feed(n),
            removed,
            epoch: MaintainerEpoch::from_wire(epoch),
        }))
    }

    fn shown(queue: &mut PendingQueue) -> Vec<(Kind, u64, u64, bool)> {
        let mut all = Vec::new();
        while let Some(request) = queue.pop() {
            all.push((request.kind(), request.changefeed().gid.low, request.epoch(), request.removes()));
        }
        all
    }

    // behaviour: dispatcher-4
    #[test]
    fn a_key_waits_once_and_is_free_when_taken() {
        let mut queue = PendingQueue::default();
        assert_eq!(queue.push(bootstrap(1, 1)), Pushed::Queued);
        assert_eq!(queue.push(bootstrap(1, 1)), Pushed::Dropped);
        assert!(queue.pop().is_some());
        assert_eq!(queue.push(bootstrap(1, 1)), Pushed::Queued);
    }

    // behaviour: dispatcher-5
    #[test]
    fn keys_keep_their_order() {
        let mut queue = PendingQueue::default();
        queue.push(bootstrap(1, 1));
        queue.push(bootstrap(2, 1));
        queue.push(bootstrap(1, 1));
        let order: Vec<u64> = shown(&mut queue).iter().map(|entry| entry.1).collect();
        assert_eq!(order, [1, 2]);
    }

    // behaviour: dispatcher-6
    #[test]
    fn a_closed_queue_ends_after_what_it_holds() {
        let mut queue = PendingQueue::default();
        queue.push(bootstrap(1, 1));
        queue.close();
        assert_eq!(queue.push(bootstrap(2, 1)), Pushed::Dropped);
        assert!(!queue.is_finished());
        assert!(queue.pop().is_some());
        assert!(queue.is_finished());
        assert!(queue.pop().is_none());
    }

    // behaviour: dispatcher-7
    #[test]
    fn a_removal_takes_the_place_of_a_plain_close() {
        let mut queue = PendingQueue::default();
        queue.push(close(1, 2, false));
        assert_eq!(queue.push(close(1, 2, true)), Pushed::Replaced);
        assert_eq!(queue.push(close(1, 2, false)), Pushed::Dropped);
        assert_eq!(shown(&mut queue), [(Kind::Close, 1, 2, true)]);
    }

    // behaviour: dispatcher-8
    #[test]
    fn a_stale_removal_displaces_nothing() {
        let mut queue = PendingQueue::default();
        queue.push(close(1, 2, false));
        assert_eq!(queue.push(close(1, 1, true)), Pushed::Dropped);
        assert_eq!(shown(&mut queue), [(Kind::Close, 1, 2, false)]);
    }

    // behaviour: dispatcher-9
    #[test]
    fn a_newer_owner_takes_the_place_of_an_older_one() {
        let mut queue = PendingQueue::default();
        queue.push(bootstrap(1, 1));
        queue.push(post_bootstrap(1, 1));
        queue.push(close(1, 1, true));
        assert_eq!(queue.push(close(1, 2, false)), Pushed::Replaced);
        assert_eq!(queue.push(bootstrap(1, 2)), Pushed::Replaced);
        assert_eq!(queue.push(post_bootstrap(1, 2)), Pushed::Replaced);
        assert_eq!(queue.push(bootstrap(1, 1)), Pushed::Dropped);
        let expected =
            [(Kind::Bootstrap, 1, 2, false), (Kind::PostBootstrap, 1, 2, false), (Kind::Close, 1, 2, false)];
        assert_eq!(shown(&mut queue), expected);
    }

    // behaviour: dispatcher-10
    #[test]
    fn a_removal_waits_while_a_close_runs() {
        let mut queue = PendingQueue::default();
        queue.push(close(1, 1, false));
        let running = queue.pop();
        assert!(running.is_some());
        assert_eq!(queue.push(close(1, 1, true)), Pushed::Queued);
        assert_eq!(shown(&mut queue), [(Kind::Close, 1, 1, true)]);
    }

    // behaviour: dispatcher-11
    #[test]
    fn each_kind_has_a_key_of_its_own() {
        let keys = [bootstrap(1, 0), post_bootstrap(1, 0), close(1, 0, false)].map(|request| request.key());
        assert_eq!(
            keys,
            [
                (Gid::new(0, 1), Kind::Bootstrap),
                (Gid::new(0, 1), Kind::PostBootstrap),
                (Gid::new(0, 1), Kind::Close),
            ]
        );
    }

    #[test]
    fn changefeeds_spread_over_the_shards() {
        assert_eq!(shard_of(Gid::new(0, 13), 8), 5);
        assert_eq!(shard_of(Gid::new(u64::MAX, 0), 8), 6);
        assert_eq!(shard_of(Gid::new(1, 3), 8), 1);
    }
}
