//! Asks every node of a set once, again until it answers, and says when all have.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use heartbeatpb::NodeId;

/// A node that stays silent is asked again after this time.
pub const RESEND: Duration = Duration::from_millis(500);

/// What a change of the node set means.
#[derive(Clone, PartialEq, Debug)]
pub struct NodeChange<R> {
    /// Nodes that joined; each is to be asked now.
    pub added: Vec<NodeId>,
    /// Nodes that left.
    pub removed: Vec<NodeId>,
    /// The answers, when the change made the initial round complete.
    pub complete: Option<BTreeMap<NodeId, R>>,
}

/// What an answer means.
#[derive(Clone, PartialEq, Debug)]
pub enum Heard<R> {
    /// Nobody asked this node.
    Unknown,
    /// Others have yet to answer.
    Waiting,
    /// The initial round is complete; said exactly once.
    Complete(BTreeMap<NodeId, R>),
    /// A node that joined later answered.
    Late(R),
}

/// The round of questions to a changing set of nodes.
#[derive(Clone, Debug)]
pub struct Bootstrapper<R> {
    nodes: BTreeMap<NodeId, Entry<R>>,
    complete: bool,
}

#[derive(Clone, Debug)]
struct Entry<R> {
    asked_at: Instant,
    answered: bool,
    /// Kept until the initial round is complete.
    answer: Option<R>,
}

impl<R> Default for Bootstrapper<R> {
    fn default() -> Self {
        Self { nodes: BTreeMap::new(), complete: false }
    }
}

impl<R> Bootstrapper<R> {
    /// The set of nodes is `alive` now.
    pub fn on_nodes(&mut self, alive: &BTreeSet<NodeId>, now: Instant) -> NodeChange<R> {
        let removed: Vec<NodeId> = self.nodes.keys().filter(|node| !alive.contains(*node)).cloned().collect();
        for node in &removed {
            self.nodes.remove(node);
        }
        let added: Vec<NodeId> =
            alive.iter().filter(|node| !self.nodes.contains_key(*node)).cloned().collect();
        for node in &added {
            self.nodes.insert(node.clone(), Entry { asked_at: now, answered: false, answer: None });
        }
        NodeChange { added, removed, complete: self.take_complete() }
    }

    /// A node answered. A second answer before the round is complete replaces the first.
    pub fn on_answer(&mut self, from: &NodeId, answer: R) -> Heard<R> {
        let Some(entry) = self.nodes.get_mut(from) else { return Heard::Unknown };
        entry.answered = true;
        if self.complete {
            return Heard::Late(answer);
        }
        entry.answer = Some(answer);
        self.take_complete().map_or(Heard::Waiting, Heard::Complete)
    }

    fn take_complete(&mut self) -> Option<BTreeMap<NodeId, R>> {
        if self.complete || self.nodes.is_empty() || !self.nodes.values().all(|entry| entry.answered) {
            return None;
        }
        self.complete = true;
        Some(
            self.nodes
                .iter_mut()
                .filter_map(|(node, entry)| Some((node.clone(), entry.answer.take()?)))
                .collect(),
        )
    }

    /// Nodes that are to be asked again.
    pub fn resend(&mut self, now: Instant) -> Vec<NodeId> {
        self.nodes
            .iter_mut()
            .filter(|(_, entry)| !entry.answered && now >= entry.asked_at + RESEND)
            .map(|(node, entry)| {
                entry.asked_at = now;
                node.clone()
            })
            .collect()
    }

    /// Whether a node has answered.
    #[must_use]
    pub fn has_answered(&self, node: &NodeId) -> bool {
        self.nodes.get(node).is_some_and(|entry| entry.answered)
    }

    /// Nodes that have yet to answer.
    pub fn silent(&self) -> impl Iterator<Item = &NodeId> {
        self.nodes.iter().filter(|(_, entry)| !entry.answered).map(|(node, _)| node)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes(names: &[&str]) -> BTreeSet<NodeId> {
        names.iter().map(|name| NodeId::from(*name)).collect()
    }

    #[test]
    // behaviour: coordinator-ST-13
    fn silent_nodes_are_asked_again_and_completion_is_said_once() {
        let start = Instant::now();
        let mut round = Bootstrapper::default();
        assert!(round.on_nodes(&nodes(&[]), start).complete.is_none(), "an empty set is never ready");
        let change = round.on_nodes(&nodes(&["a", "b"]), start);
        assert_eq!((change.added.len(), change.removed.len()), (2, 0));
        assert!(round.resend(start + Duration::from_millis(499)).is_empty());
        assert_eq!(round.on_answer(&"x".into(), 9), Heard::Unknown);
        assert_eq!(round.on_answer(&"a".into(), 1), Heard::Waiting);
        assert_eq!(round.on_answer(&"a".into(), 2), Heard::Waiting);
        assert_eq!(round.resend(start + RESEND), ["b".into()]);
        assert!(round.resend(start + RESEND).is_empty());

        assert_eq!(round.on_nodes(&nodes(&["a", "b", "c"]), start).added, ["c".into()]);
        assert_eq!(round.on_answer(&"b".into(), 3), Heard::Waiting, "a node that joins extends the wait");
        let change = round.on_nodes(&nodes(&["a", "b"]), start);
        assert_eq!(
            change.complete,
            Some([("a".into(), 2), ("b".into(), 3)].into()),
            "one that leaves ends it"
        );

        assert!(!round.has_answered(&"c".into()));
        round.on_nodes(&nodes(&["a", "b", "c"]), start);
        assert_eq!(round.on_answer(&"c".into(), 4), Heard::Late(4));
    }
}
