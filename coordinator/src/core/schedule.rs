//! Which changefeed goes to which node: the least loaded one that takes work (coordinator §15).

use std::collections::BTreeMap;
use std::time::Instant;

use heartbeatpb::{ChangefeedId, NodeId, NodeLiveness};

use super::{Core, Write};

impl Core {
    /// Gives changefeeds that are on no node to nodes, within the budget of operators. Each placement begins
    /// with a larger epoch; the operator follows once that is durable.
    pub(super) fn schedule(&mut self, now: Instant) {
        if !self.initialized {
            return;
        }
        let busy = self.feeds.values().filter(|feed| feed.slot.is_some() || feed.writing.is_some()).count();
        let budget = self.config.batch.saturating_sub(busy);
        if budget == 0 {
            return;
        }
        let waiting: Vec<ChangefeedId> = self
            .feeds
            .iter()
            .filter(|(_, feed)| {
                let idle = feed.slot.is_none() && feed.writing.is_none() && feed.queue.is_empty();
                idle && !feed.removing && feed.changefeed.is_runnable(now)
            })
            .map(|(id, _)| id.clone())
            .take(budget)
            .collect();
        if waiting.is_empty() {
            return;
        }
        let mut load = self.load();
        for id in waiting {
            let Some(dest) = load.iter().min_by_key(|(_, count)| **count).map(|(node, _)| node.clone())
            else {
                return;
            };
            if let Some(count) = load.get_mut(&dest) {
                *count += 1;
            }
            self.want(&id, Write::BumpForAdd { dest }, now);
        }
    }

    /// Maintainers on, or on their way to, each node that takes work.
    fn load(&self) -> BTreeMap<NodeId, usize> {
        let mut load: BTreeMap<NodeId, usize> =
            self.members.iter().filter(|node| self.takes_work(node)).map(|node| (node.clone(), 0)).collect();
        for feed in self.feeds.values() {
            let coming = match &feed.writing {
                Some(Write::BumpForAdd { dest }) => Some(dest),
                Some(_) | None => None,
            };
            if let Some(count) = feed.changefeed.node().or(coming).and_then(|node| load.get_mut(node)) {
                *count += 1;
            }
        }
        load
    }

    /// Whether a node may be given a maintainer.
    pub(super) fn takes_work(&self, node: &NodeId) -> bool {
        let alive = self.nodes.get(node).is_none_or(|record| record.liveness == NodeLiveness::Alive);
        self.members.contains(node) && self.bootstrapper.has_answered(node) && alive
    }
}
