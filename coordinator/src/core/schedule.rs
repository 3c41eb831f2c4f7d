//! Which changefeed goes to which node: the least loaded one that takes work (coordinator §15).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use heartbeatpb::{ChangefeedId, NodeId};

use super::{Core, Write};
use crate::changefeed::Group;
use crate::drain::NodeState;

impl Core {
    /// Gives changefeeds that are on no node to nodes, within the budget of operators. Each placement begins
    /// with a larger epoch; the operator follows once that is durable.
    pub(super) fn schedule(&mut self, now: Instant) {
        if !self.initialized || self.is_frozen() {
            return;
        }
        self.empty_nodes(now);
        let budget = self.config.batch.saturating_sub(self.busy());
        // Waits until there is room for a good many: small portions would be spread badly.
        if budget == 0 || budget < self.config.batch / 2 {
            return;
        }
        let waiting: Vec<ChangefeedId> = self
            .feeds
            .iter()
            .filter(|(_, feed)| feed.is_idle() && !feed.removing && feed.changefeed.is_runnable(now))
            .map(|(id, _)| id.clone())
            .take(budget)
            .collect();
        if waiting.is_empty() {
            return;
        }
        let mut load = self.load(now);
        for id in waiting {
            let Some(dest) = least(&load) else { return };
            if let Some(count) = load.get_mut(&dest) {
                *count += 1;
            }
            self.want(&id, Write::BumpForAdd { dest }, now);
        }
    }

    /// Moves changefeeds away from nodes that are being emptied, to the least loaded others. What else changes
    /// does not count against it, and several nodes take turns.
    fn empty_nodes(&mut self, now: Instant) {
        let mut nodes = self.emptied_nodes();
        if nodes.is_empty() {
            return;
        }
        let under_way: usize = nodes.iter().map(|node| self.moves_from(node)).sum();
        let budget = self.config.batch.saturating_sub(under_way);
        let mut load = self.load(now);
        if let Some(last) = &self.drain_cursor {
            let next = nodes.iter().position(|node| node > last).unwrap_or(0);
            nodes.rotate_left(next);
        }
        let mut stocks: VecDeque<(NodeId, VecDeque<ChangefeedId>)> =
            nodes.into_iter().map(|node| (node.clone(), self.movable(&node))).collect();
        let mut moves = 0;
        while moves < budget
            && let Some((origin, mut stock)) = stocks.pop_front()
        {
            let Some(id) = stock.pop_front() else { continue };
            let Some(dest) = least(&load) else { return };
            if let Some(count) = load.get_mut(&dest) {
                *count += 1;
            }
            moves += 1;
            self.drain_cursor = Some(origin.clone());
            stocks.push_back((origin.clone(), stock));
            self.want(&id, Write::BumpForMove { origin, dest }, now);
        }
    }

    /// Changefeeds that run on a node and that nothing else is being done with.
    fn movable(&self, node: &NodeId) -> VecDeque<ChangefeedId> {
        let movable = |feed: &super::Feed| feed.is_idle() && !feed.removing && feed.replicates_on(node);
        self.feeds.iter().filter(|(_, feed)| movable(feed)).map(|(id, _)| id.clone()).collect()
    }

    /// Moves changefeeds from nodes with more than their share to nodes with less. It waits until nothing
    /// else changes; when a whole batch was needed it looks again as soon as that is done.
    pub(super) fn balance(&mut self, now: Instant) {
        let at = *self.balance_at.get_or_insert(now + self.config.balance_interval);
        let unsettled = |feed: &super::Feed| !feed.is_idle() || feed.changefeed.group() == Group::Absent;
        let leaving = self.drain.session().is_some() || self.members.iter().any(|node| self.is_leaving(node));
        if leaving {
            self.leaving_seen = Some(now);
        }
        // What left a node is not to come back at once.
        let quiet = self.config.balance_interval.max(Duration::from_secs(1));
        let lately = self.leaving_seen.is_some_and(|seen| now < seen + quiet);
        if now < at || leaving || lately || self.feeds.values().any(unsettled) {
            return;
        }
        let moves = even_out(self.holdings(now), self.config.batch);
        let full = moves.len() == self.config.batch;
        self.balance_at = Some(if full { now } else { now + self.config.balance_interval });
        for (id, origin, dest) in moves {
            self.want(&id, Write::BumpForMove { origin, dest }, now);
        }
    }

    /// What each node that takes work holds.
    fn holdings(&self, now: Instant) -> BTreeMap<NodeId, BTreeSet<ChangefeedId>> {
        let mut holdings: BTreeMap<NodeId, BTreeSet<ChangefeedId>> = self
            .members
            .iter()
            .filter(|node| self.takes_work(node, now))
            .map(|node| (node.clone(), BTreeSet::new()))
            .collect();
        for (id, feed) in &self.feeds {
            if let Some(held) = feed.changefeed.node().and_then(|node| holdings.get_mut(node)) {
                held.insert(id.clone());
            }
        }
        holdings
    }

    /// Changefeeds whose placement changes.
    fn busy(&self) -> usize {
        self.feeds.values().filter(|feed| feed.slot.is_some() || feed.writing.is_some()).count()
    }

    /// Maintainers on, or on their way to, each node that takes work.
    pub(super) fn load(&self, now: Instant) -> BTreeMap<NodeId, usize> {
        let mut load: BTreeMap<NodeId, usize> = self
            .members
            .iter()
            .filter(|node| self.takes_work(node, now))
            .map(|node| (node.clone(), 0))
            .collect();
        for feed in self.feeds.values() {
            if let Some(count) = feed.home().and_then(|node| load.get_mut(node)) {
                *count += 1;
            }
        }
        load
    }

    /// Whether a node may be given a maintainer.
    pub(super) fn takes_work(&self, node: &NodeId, now: Instant) -> bool {
        let alive = self.nodes.get(node).is_none_or(|record| record.state(now) == NodeState::Alive);
        self.members.contains(node)
            && self.bootstrapper.has_answered(node)
            && alive
            && self.drain_admits(node)
    }

    /// Changes of placement under way that concern a node.
    #[must_use]
    pub fn operators_on(&self, node: &NodeId) -> usize {
        let concerns = |feed: &super::Feed| {
            feed.slot.as_ref().is_some_and(|slot| !slot.finishing && slot.operator.involves(node))
                || feed.coming() == Some(node)
                || feed.leaving() == Some(node)
        };
        self.feeds.values().filter(|feed| concerns(feed)).count()
    }

    /// Moves under way that go away from a node.
    #[must_use]
    pub fn moves_from(&self, node: &NodeId) -> usize {
        self.feeds.values().filter(|feed| feed.leaving() == Some(node)).count()
    }
}

/// The least loaded node.
pub(super) fn least(load: &BTreeMap<NodeId, usize>) -> Option<NodeId> {
    load.iter().min_by_key(|(_, count)| **count).map(|(node, _)| node.clone())
}

/// By how many changefeeds nodes fall short of their even share, which is rounded down.
fn shortage(loads: &[usize]) -> usize {
    let share = loads.iter().sum::<usize>().checked_div(loads.len()).unwrap_or(0);
    loads.iter().map(|load| share.saturating_sub(*load)).sum()
}

/// At most `batch` moves (what, from, to) after which no node is short, or fewer are.
fn even_out(
    mut holdings: BTreeMap<NodeId, BTreeSet<ChangefeedId>>,
    batch: usize,
) -> Vec<(ChangefeedId, NodeId, NodeId)> {
    let mut loads: BTreeMap<NodeId, usize> =
        holdings.iter().map(|(node, held)| (node.clone(), held.len())).collect();
    let needed = shortage(&loads.values().copied().collect::<Vec<_>>()).min(batch);
    let mut moves = Vec::with_capacity(needed);
    // A changefeed moves at most once in a round, so this ends.
    while moves.len() < needed {
        let most = loads.iter().max_by_key(|(_, load)| **load).map(|(node, _)| node.clone());
        let (Some(origin), Some(dest)) = (most, least(&loads)) else { break };
        let Some(id) = holdings.get_mut(&origin).and_then(BTreeSet::pop_first) else { break };
        for (node, up) in [(&origin, false), (&dest, true)] {
            if let Some(load) = loads.get_mut(node) {
                *load = if up { *load + 1 } else { load.saturating_sub(1) };
            }
        }
        moves.push((id, origin, dest));
    }
    moves
}

#[cfg(test)]
mod tests {
    use heartbeatpb::Gid;

    use super::*;

    fn holdings(loads: &[usize]) -> BTreeMap<NodeId, BTreeSet<ChangefeedId>> {
        let id = |node: usize, n: usize| ChangefeedId {
            gid: Gid::new(u64::try_from(node).unwrap_or(0), u64::try_from(n).unwrap_or(0)),
            name: format!("f{node}-{n}").into(),
            keyspace: "default".into(),
        };
        let of = |(node, load): (usize, &usize)| {
            (NodeId::from(format!("n{node}").as_str()), (0..*load).map(|n| id(node, n)).collect())
        };
        loads.iter().enumerate().map(of).collect()
    }

    #[test]
    // behaviour: coordinator-SC-1
    fn the_moves_needed_are_what_nodes_lack_of_their_even_share() {
        for (loads, needed) in [
            (vec![2, 2, 0], 1),
            (vec![2, 0], 1),
            (vec![16, 16, 16, 16, 16, 11], 4),
            (vec![3, 3, 4], 0),
            (vec![], 0),
        ] {
            assert_eq!(shortage(&loads), needed, "{loads:?}");
            let moves = even_out(holdings(&loads), 100);
            assert_eq!(moves.len(), needed);
            let mut after = loads.clone();
            let position = |node: &NodeId| node.as_str()[1..].parse::<usize>().unwrap_or(0);
            for (_, origin, dest) in &moves {
                after[position(origin)] -= 1;
                after[position(dest)] += 1;
            }
            assert_eq!(shortage(&after), 0, "{after:?}");
        }
        assert_eq!(even_out(holdings(&[50, 0]), 10).len(), 10, "a batch is a batch");
    }
}
