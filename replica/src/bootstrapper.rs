//! Asks every node of a set once, again until it answers, and says when all have.
//!
//! Maintainers ask dispatcher managers this way, the coordinator asks its nodes. Answers are kept until the owner says
//! that its own bootstrap succeeded: an attempt that failed can be repeated with the old answers and those of nodes
//! that joined.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use heartbeatpb::NodeId;

/// A node that stays silent is asked again after this time.
pub const RESEND: Duration = Duration::from_millis(500);

/// What a change of the node set means.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct NodeChange {
    /// Nodes that joined; each is to be asked now.
    pub added: Vec<NodeId>,
    /// Nodes that left.
    pub removed: Vec<NodeId>,
    /// Whether the change made the round complete.
    pub completed: bool,
}

/// What an answer means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Heard {
    /// Nobody asked this node.
    Unknown,
    /// The round goes on, or was complete before.
    Noted,
    /// The round is complete by this answer.
    Completed,
}

/// The round of questions to a changing set of nodes.
#[derive(Clone, Debug)]
pub struct Bootstrapper<R> {
    nodes: BTreeMap<NodeId, Entry<R>>,
    ready: bool,
    cleared: bool,
}

#[derive(Clone, Debug)]
struct Entry<R> {
    asked_at: Instant,
    answered: bool,
    answer: Option<R>,
}

impl<R> Default for Bootstrapper<R> {
    fn default() -> Self {
        Self { nodes: BTreeMap::new(), ready: false, cleared: false }
    }
}

impl<R> Bootstrapper<R> {
    /// The set of nodes is `alive` now.
    pub fn on_nodes(&mut self, alive: &BTreeSet<NodeId>, now: Instant) -> NodeChange {
        let removed: Vec<NodeId> = self.nodes.keys().filter(|node| !alive.contains(*node)).cloned().collect();
        for node in &removed {
            self.nodes.remove(node);
        }
        let added: Vec<NodeId> =
            alive.iter().filter(|node| !self.nodes.contains_key(*node)).cloned().collect();
        for node in &added {
            self.nodes.insert(node.clone(), Entry { asked_at: now, answered: false, answer: None });
        }
        if !added.is_empty() {
            self.ready = false;
        }
        NodeChange { added, removed, completed: self.settle() }
    }

    /// A node answered. A later answer replaces an earlier one. Once the owner cleared the answers, further ones
    /// of the same nodes are not kept: they can be very large.
    pub fn on_answer(&mut self, from: &NodeId, answer: R) -> Heard {
        let Some(entry) = self.nodes.get_mut(from) else { return Heard::Unknown };
        if !(self.cleared && entry.answered) {
            entry.answer = Some(answer);
        }
        entry.answered = true;
        if self.settle() { Heard::Completed } else { Heard::Noted }
    }

    fn settle(&mut self) -> bool {
        let complete =
            !self.ready && !self.nodes.is_empty() && self.nodes.values().all(|entry| entry.answered);
        let complete = complete
            || (!heartbeatpb::Rule::EveryNodeAnswers.holds()
                && !self.ready
                && self.nodes.values().any(|entry| entry.answered));
        self.ready |= complete;
        complete
    }

    /// The answers that are kept, by node.
    pub fn answers(&self) -> impl Iterator<Item = (&NodeId, &R)> {
        self.nodes.iter().filter_map(|(node, entry)| Some((node, entry.answer.as_ref()?)))
    }

    /// The owner's bootstrap succeeded: answers are forgotten, and further ones are not kept.
    pub fn clear_answers(&mut self) {
        self.cleared = true;
        for entry in self.nodes.values_mut() {
            entry.answer = None;
        }
    }

    /// Nodes that are to be asked again.
    pub fn resend(&mut self, now: Instant) -> Vec<NodeId> {
        if self.ready {
            return Vec::new();
        }
        self.nodes
            .iter_mut()
            .filter(|(_, entry)| !entry.answered && now >= entry.asked_at + RESEND)
            .map(|(node, entry)| {
                entry.asked_at = now;
                node.clone()
            })
            .collect()
    }

    /// Whether every node has answered since the last one joined.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.ready
    }

    /// Whether a node is in the set.
    #[must_use]
    pub fn has(&self, node: &NodeId) -> bool {
        self.nodes.contains_key(node)
    }

    /// Whether a node has answered.
    #[must_use]
    pub fn has_answered(&self, node: &NodeId) -> bool {
        self.nodes.get(node).is_some_and(|entry| entry.answered)
    }

    /// The nodes of the set.
    pub fn nodes(&self) -> impl Iterator<Item = &NodeId> {
        self.nodes.keys()
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

    fn kept(round: &Bootstrapper<u32>) -> Vec<(&str, u32)> {
        round.answers().map(|(node, answer)| (node.as_str(), *answer)).collect()
    }

    // behaviour: maintainer-46, coordinator-ST-13
    #[test]
    fn a_round_is_complete_when_every_node_has_answered() {
        let start = Instant::now();
        let mut round = Bootstrapper::default();
        assert_eq!(round.on_nodes(&nodes(&[]), start), NodeChange::default());
        assert!(!round.is_ready(), "an empty set is never ready");
        let change = round.on_nodes(&nodes(&["a", "b"]), start);
        assert_eq!((change.added.len(), change.removed.len()), (2, 0));
        assert_eq!(round.on_answer(&"x".into(), 9), Heard::Unknown);
        assert_eq!(round.on_answer(&"a".into(), 1), Heard::Noted);
        assert_eq!(round.on_answer(&"a".into(), 2), Heard::Noted, "a later answer replaces the first");
        assert_eq!(round.on_answer(&"b".into(), 3), Heard::Completed);
        assert_eq!(round.on_answer(&"b".into(), 3), Heard::Noted, "completion is said once");
        assert_eq!(kept(&round), [("a", 2), ("b", 3)]);
    }

    // behaviour: maintainer-47, coordinator-ST-13
    #[test]
    fn a_node_that_joins_later_must_answer_and_one_that_leaves_need_not() {
        let start = Instant::now();
        let mut round = Bootstrapper::default();
        round.on_nodes(&nodes(&["a", "b"]), start);
        round.on_answer(&"a".into(), 1);
        round.on_answer(&"b".into(), 2);
        round.clear_answers();
        round.on_nodes(&nodes(&["a", "b", "c"]), start);
        assert!(!round.is_ready());
        assert_eq!(round.on_answer(&"a".into(), 7), Heard::Noted, "known already, and not kept");
        assert_eq!(round.on_answer(&"c".into(), 3), Heard::Completed);
        assert_eq!(kept(&round), [("c", 3)], "its answer alone");
        round.clear_answers();
        let change = round.on_nodes(&nodes(&["a", "b"]), start);
        assert!(round.is_ready() && !change.completed && kept(&round).is_empty());
        round.on_nodes(&nodes(&["a", "d"]), start);
        assert!(!round.is_ready());
        assert_eq!(round.on_answer(&"d".into(), 4), Heard::Completed);

        let mut waiting: Bootstrapper<u32> = Bootstrapper::default();
        waiting.on_nodes(&nodes(&["a", "b"]), start);
        waiting.on_answer(&"a".into(), 1);
        assert!(waiting.on_nodes(&nodes(&["a"]), start).completed, "the last silent node left");
    }

    // behaviour: maintainer-48
    #[test]
    fn answers_of_an_attempt_that_failed_are_there_for_the_next_one() {
        let start = Instant::now();
        let mut round = Bootstrapper::default();
        round.on_nodes(&nodes(&["a", "b"]), start);
        round.on_answer(&"a".into(), 1);
        round.on_answer(&"b".into(), 2);
        round.on_nodes(&nodes(&["a", "b", "c"]), start);
        assert_eq!(round.on_answer(&"c".into(), 3), Heard::Completed);
        assert_eq!(kept(&round), [("a", 1), ("b", 2), ("c", 3)]);
    }

    // behaviour: maintainer-49, coordinator-ST-13
    #[test]
    fn silent_nodes_are_asked_again_each_at_its_own_time() {
        let start = Instant::now();
        let mut round: Bootstrapper<u32> = Bootstrapper::default();
        round.on_nodes(&nodes(&["a"]), start);
        round.on_nodes(&nodes(&["a", "b"]), start + RESEND / 2);
        assert!(round.resend(start + RESEND / 2).is_empty());
        assert_eq!(round.resend(start + RESEND), ["a".into()]);
        assert!(round.resend(start + RESEND).is_empty());
        assert_eq!(round.resend(start + RESEND * 3 / 2), ["b".into()]);
        round.on_answer(&"a".into(), 1);
        round.on_answer(&"b".into(), 1);
        assert!(round.resend(start + RESEND * 9).is_empty());
    }
}
