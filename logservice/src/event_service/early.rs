//! Dispatchers that registered before the log of their changefeed is read here: pure.
//!
//! When a maintainer moves, the nodes turn to the new place at once and its log opens a moment later. Whoever came too
//! early is remembered and served when the log opens, instead of having to ask again. Memory is bounded: beyond the bound, and
//! after a while, a registration is forgotten, and its collector repeats it.

use std::collections::BTreeMap;
use std::time::Duration;

use heartbeatpb::{DispatcherId, Gid, NodeId, TableSpan, Ts};
use tokio::time::Instant;

/// Registrations that are remembered, of all changefeeds: about 200 bytes each.
const MOST: usize = 100_000;
/// A registration that was not repeated for so long is forgotten; collectors repeat theirs at least every few seconds.
const FORGET: Duration = Duration::from_secs(15);

/// What a dispatcher has asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Candidate {
    /// Node of its collector.
    pub(super) node: NodeId,
    /// What it wants.
    pub(super) span: TableSpan,
    /// Events with a larger commit ts are wanted.
    pub(super) start: Ts,
}

/// Who came early.
#[derive(Debug, Default)]
pub(super) struct Early {
    by_feed: BTreeMap<Gid, BTreeMap<DispatcherId, (Candidate, Instant)>>,
    count: usize,
}

impl Early {
    /// Remembers a registration; the newest of a dispatcher counts.
    pub(super) fn put(&mut self, gid: Gid, id: DispatcherId, candidate: Candidate, now: Instant) {
        let known = self.by_feed.get(&gid).is_some_and(|feed| feed.contains_key(&id));
        if !known && self.count >= MOST {
            return;
        }
        self.count += usize::from(!known);
        self.by_feed.entry(gid).or_default().insert(id, (candidate, now));
    }

    /// A dispatcher does not want anything any more. It may have been given to another node meanwhile.
    pub(super) fn remove(&mut self, gid: Gid, id: DispatcherId, node: &NodeId) {
        let Some(feed) = self.by_feed.get_mut(&gid) else { return };
        if feed.get(&id).is_some_and(|(candidate, _)| candidate.node == *node) {
            feed.remove(&id);
            self.count -= 1;
        }
        if feed.is_empty() {
            self.by_feed.remove(&gid);
        }
    }

    /// The log of a changefeed is open: everybody who waits for it.
    pub(super) fn take(&mut self, gid: Gid) -> BTreeMap<DispatcherId, (Candidate, Instant)> {
        let feed = self.by_feed.remove(&gid).unwrap_or_default();
        self.count -= feed.len();
        feed
    }

    /// Forgets what was not repeated for long.
    pub(super) fn forget(&mut self, now: Instant) {
        let Some(since) = now.checked_sub(FORGET) else { return };
        self.by_feed.retain(|_, feed| {
            feed.retain(|_, (_, at)| *at > since);
            !feed.is_empty()
        });
        self.count = self.by_feed.values().map(BTreeMap::len).sum();
    }
}

#[cfg(test)]
mod tests {
    use heartbeatpb::TableId;

    use super::*;

    const FEED: Gid = Gid { low: 1, high: 1 };
    const OTHER: Gid = Gid { low: 2, high: 1 };

    fn id(n: u64) -> DispatcherId {
        DispatcherId::new(1, n)
    }

    fn candidate(node: &str) -> Candidate {
        Candidate { node: node.into(), span: TableSpan::whole(TableId(1)), start: Ts(7) }
    }

    #[test]
    fn the_newest_registration_of_a_dispatcher_counts_and_only_its_node_takes_it_back() {
        let (mut early, now) = (Early::default(), Instant::now());
        early.put(FEED, id(1), candidate("a"), now);
        early.put(FEED, id(1), candidate("b"), now);
        early.put(OTHER, id(2), candidate("a"), now);
        early.remove(FEED, id(1), &"a".into());
        let found: Vec<_> = early.take(FEED).into_values().map(|(candidate, _)| candidate).collect();
        assert_eq!(found, [candidate("b")]);
        assert!(early.take(FEED).is_empty(), "taken once");
        early.remove(OTHER, id(2), &"a".into());
        assert!(early.take(OTHER).is_empty());
        assert_eq!(early.count, 0);
    }

    #[test]
    fn what_is_not_repeated_is_forgotten() {
        let (mut early, start) = (Early::default(), Instant::now());
        early.put(FEED, id(1), candidate("a"), start);
        early.put(FEED, id(2), candidate("a"), start);
        let later = start + FORGET - Duration::from_secs(1);
        early.put(FEED, id(2), candidate("a"), later);
        early.forget(start + FORGET);
        assert_eq!(early.count, 1);
        assert_eq!(early.take(FEED).into_keys().collect::<Vec<_>>(), [id(2)]);
    }

    #[test]
    fn memory_is_bounded_and_those_who_are_known_are_still_heard() {
        let (mut early, now) = (Early::default(), Instant::now());
        for n in 0..=MOST as u64 {
            early.put(FEED, id(n), candidate("a"), now);
        }
        assert_eq!(early.count, MOST);
        early.put(FEED, id(3), candidate("b"), now);
        let taken = early.take(FEED);
        assert_eq!(taken.len(), MOST);
        assert_eq!(taken[&id(3)].0.node, "b".into());
    }
}
