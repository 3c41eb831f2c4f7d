//! The changefeed's checkpoint: an incremental minimum over what nodes report and what nobody runs.

use std::collections::BTreeMap;

use heartbeatpb::{NodeId, Rule, Ts, Watermark};
use replica::MinSet;
use snapshot::Versioned;

/// How far a changefeed is. Published as one value.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Progress {
    /// Everything at or before it is durable downstream, for every span.
    pub checkpoint: Ts,
    /// Everything at or before it was received.
    pub resolved: Ts,
    /// Largest commit ts that any node flushed.
    pub last_synced: Ts,
}

impl Versioned for Progress {
    type Version = Self;

    fn version(&self) -> Self {
        *self
    }
}

#[derive(Clone, Copy, Debug)]
struct Node {
    /// The own node hosts the table trigger: it always counts.
    own: bool,
    has_spans: bool,
    mark: Option<Watermark>,
}

impl Node {
    fn is_relevant(&self) -> bool {
        self.own || self.has_spans
    }
}

/// Watermarks of nodes, and what follows from them (maintainer §11). One task changes all inputs, so every
/// fold is one consistent snapshot; a fold costs the same for one span and for a million.
#[derive(Clone, Debug)]
pub struct CheckpointFold {
    nodes: BTreeMap<NodeId, Node>,
    /// Relevant nodes that have not reported: they could be anywhere.
    missing: usize,
    checkpoints: MinSet<Ts>,
    resolved: MinSet<Ts>,
    committed: Progress,
}

impl CheckpointFold {
    /// A fold that is committed at `start`, of a maintainer on `own`.
    #[must_use]
    pub fn new(own: NodeId, start: Ts) -> Self {
        let committed = Progress { checkpoint: start, resolved: start, last_synced: Ts::ZERO };
        Self {
            nodes: BTreeMap::from([(own, Node { own: true, has_spans: false, mark: None })]),
            missing: 1,
            checkpoints: MinSet::new(),
            resolved: MinSet::new(),
            committed,
        }
    }

    fn edit(&mut self, node: &NodeId, edit: impl FnOnce(&mut Node)) {
        let empty = Node { own: false, has_spans: false, mark: None };
        let entry = self.nodes.entry(node.clone()).or_insert(empty);
        let before = *entry;
        edit(entry);
        let after = *entry;
        self.count(&before, false);
        self.count(&after, true);
    }

    fn count(&mut self, node: &Node, enters: bool) {
        match (node.is_relevant(), node.mark, enters) {
            (false, _, _) => {}
            (true, None, true) => self.missing += 1,
            (true, None, false) => self.missing -= 1,
            (true, Some(mark), true) => {
                self.checkpoints.insert(mark.checkpoint);
                self.resolved.insert(mark.resolved);
            }
            (true, Some(mark), false) => {
                self.checkpoints.remove(mark.checkpoint);
                self.resolved.remove(mark.resolved);
            }
        }
    }

    /// Takes a node's watermark if it is of a newer membership, or of the same one and further; says whether it
    /// did. A newer membership counts even when it is behind: a dispatcher may have started earlier.
    pub fn on_watermark(&mut self, node: &NodeId, mark: Watermark) -> bool {
        self.committed.last_synced = self.committed.last_synced.max(mark.last_synced);
        let known = self.nodes.get(node).and_then(|node| node.mark);
        let newer = known.is_none_or(|known| {
            let generation = |mark: &Watermark| if Rule::WatermarkGeneration.holds() { mark.seq } else { 0 };
            (generation(&mark), mark.checkpoint, mark.resolved)
                > (generation(&known), known.checkpoint, known.resolved)
        });
        if newer {
            self.edit(node, |node| node.mark = Some(mark));
        }
        newer
    }

    /// A node got its first span, or lost its last one.
    pub fn on_spans(&mut self, node: &NodeId, has_spans: bool) {
        if has_spans || self.nodes.contains_key(node) {
            self.edit(node, |node| node.has_spans = has_spans);
        }
    }

    /// A node is gone. Its spans must be absent already: they hold the checkpoint now. The own node, which begins anew when it
    /// is said to be gone, has the table trigger again afterwards: it counts, and has not reported.
    pub fn on_node_removed(&mut self, node: &NodeId) {
        let Some(gone) = self.nodes.remove(node) else { return };
        self.count(&gone, false);
        if gone.own {
            let empty = Node { own: true, has_spans: false, mark: None };
            self.count(&empty, true);
            self.nodes.insert(node.clone(), empty);
        }
    }

    /// What was committed last.
    #[must_use]
    pub fn committed(&self) -> Progress {
        self.committed
    }

    /// Relevant nodes that have not reported yet.
    pub fn missing(&self) -> impl Iterator<Item = &NodeId> {
        self.nodes.iter().filter(|(_, node)| node.is_relevant() && node.mark.is_none()).map(|(id, _)| id)
    }

    /// The relevant node that is least far, and its checkpoint; it visits every node.
    #[must_use]
    pub fn slowest(&self) -> Option<(&NodeId, Ts)> {
        let mark = |node: &Node| node.mark.filter(|_| node.is_relevant()).map(|mark| mark.checkpoint);
        self.nodes
            .iter()
            .filter_map(|(id, node)| Some((id, mark(node)?)))
            .min_by_key(|(id, ts)| (*ts, (*id).clone()))
    }

    /// Folds once: nodes, and `limits` from spans that nobody replicates, operators and barriers. Says whether
    /// the committed checkpoint moved; it never moves back.
    pub fn advance(&mut self, limits: impl IntoIterator<Item = Option<Ts>>) -> bool {
        if self.missing > 0 {
            return false;
        }
        let limit = limits.into_iter().flatten().min().unwrap_or(Ts::MAX);
        let least = |set: &MinSet<Ts>| set.min().unwrap_or(Ts::MAX).min(limit);
        let (checkpoint, resolved) = (least(&self.checkpoints), least(&self.resolved));
        if checkpoint == Ts::MAX {
            return false;
        }
        let moved = checkpoint > self.committed.checkpoint;
        self.committed.checkpoint = self.committed.checkpoint.max(checkpoint);
        if resolved != Ts::MAX {
            self.committed.resolved = self.committed.resolved.max(resolved).max(self.committed.checkpoint);
        }
        moved
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn mark(checkpoint: u64, seq: u64) -> Watermark {
        Watermark {
            checkpoint: Ts(checkpoint),
            resolved: Ts(checkpoint + 5),
            seq,
            last_synced: Ts(checkpoint),
        }
    }

    fn at(fold: &CheckpointFold) -> (u64, u64) {
        (fold.committed().checkpoint.0, fold.committed().resolved.0)
    }

    #[test]
    fn a_node_that_has_not_reported_and_a_span_without_a_home_hold_the_checkpoint() {
        let (a, b) = (NodeId::from("a"), NodeId::from("b"));
        let mut fold = CheckpointFold::new(a.clone(), Ts(10));
        assert!(!fold.advance([]), "the own node has not reported");
        assert!(fold.on_watermark(&a, mark(50, 1)));
        fold.on_spans(&b, true);
        assert!(!fold.advance([]), "b is relevant and silent");
        assert_eq!(fold.missing().collect::<Vec<_>>(), [&b]);
        fold.on_watermark(&b, mark(40, 1));
        assert!(fold.advance([Some(Ts(30)), None]), "up to the absent span");
        assert_eq!(at(&fold), (30, 30));
        assert!(fold.advance([]));
        assert_eq!(at(&fold), (40, 45));
    }

    #[test]
    fn a_node_without_spans_holds_nothing_and_a_dead_one_is_forgotten() {
        let (a, b) = (NodeId::from("a"), NodeId::from("b"));
        let mut fold = CheckpointFold::new(a.clone(), Ts(10));
        fold.on_watermark(&a, mark(50, 1));
        fold.on_watermark(&b, mark(20, 1));
        fold.on_spans(&b, true);
        assert!(fold.advance([]));
        assert_eq!(at(&fold).0, 20);
        fold.on_spans(&b, false);
        assert!(fold.advance([]));
        assert_eq!(at(&fold).0, 50);
        fold.on_spans(&b, true);
        fold.on_node_removed(&b);
        fold.on_watermark(&a, mark(60, 1));
        assert!(fold.advance([]));
        assert_eq!(at(&fold).0, 60);
    }

    #[test]
    fn the_own_node_that_begins_anew_holds_the_checkpoint_until_it_reports_again() {
        let (a, b) = (NodeId::from("a"), NodeId::from("b"));
        let mut fold = CheckpointFold::new(a.clone(), Ts(10));
        fold.on_watermark(&a, mark(50, 7));
        fold.on_spans(&b, true);
        fold.on_watermark(&b, mark(90, 1));
        fold.on_node_removed(&a);
        assert!(!fold.advance([]), "the table trigger is there, and nothing is known of it");
        assert_eq!(fold.missing().collect::<Vec<_>>(), [&a]);
        assert!(fold.on_watermark(&a, mark(20, 1)), "what it said before is forgotten");
        assert!(fold.advance([]));
        assert_eq!(at(&fold).0, 20);
        fold.on_watermark(&a, mark(60, 2));
        assert!(fold.advance([]));
        assert_eq!(at(&fold).0, 60);
    }

    // behaviour: maintainer-42
    #[test]
    fn a_watermark_of_an_older_membership_is_dropped_and_a_newer_one_counts_even_if_behind() {
        let a = NodeId::from("a");
        let mut fold = CheckpointFold::new(a.clone(), Ts(10));
        assert!(fold.on_watermark(&a, mark(50, 7)));
        assert!(!fold.on_watermark(&a, mark(90, 6)));
        assert!(!fold.on_watermark(&a, mark(40, 7)), "same membership, behind");
        assert!(fold.on_watermark(&a, mark(40, 8)));
        assert!(fold.advance([]));
        assert_eq!(at(&fold).0, 40);
    }

    // behaviour: maintainer-32, scheduling-134
    #[test]
    fn nobody_having_anything_to_say_moves_nothing() {
        let a = NodeId::from("a");
        let mut fold = CheckpointFold::new(a.clone(), Ts(1));
        fold.on_watermark(&a, Watermark::NONE);
        assert!(!fold.advance([None]));
        assert_eq!(at(&fold), (1, 1));
        fold.on_watermark(&a, mark(2, 1));
        assert!(fold.advance([]));
        assert_eq!(at(&fold).0, 2);
    }

    proptest! {
        #[test]
        fn the_fold_is_the_minimum_and_never_goes_back(
            steps in prop::collection::vec((0usize..3, 0u8..4, 1u64..100, 0u64..6, prop::option::of(1u64..100)), 1..100)
        ) {
            let nodes: Vec<NodeId> = ["a", "b", "c"].map(NodeId::from).into();
            let mut fold = CheckpointFold::new(nodes[0].clone(), Ts(1));
            let mut last = Ts(1);
            for (node, what, ts, seq, limit) in steps {
                let id = &nodes[node];
                match what {
                    0 | 1 => { fold.on_watermark(id, mark(ts, seq)); }
                    2 => fold.on_spans(id, ts % 2 == 0),
                    _ => fold.on_node_removed(id),
                }
                fold.advance([limit.map(Ts)]);
                let now = fold.committed().checkpoint;
                let relevant: Vec<&Node> = fold.nodes.values().filter(|node| node.is_relevant()).collect();
                prop_assert!(relevant.iter().any(|node| node.own), "the table trigger always counts");
                if now > last {
                    for node in relevant {
                        prop_assert!(now <= node.mark.map_or(Ts::ZERO, |mark| mark.checkpoint));
                    }
                    prop_assert!(limit.is_none_or(|limit| now <= Ts(limit)));
                }
                prop_assert!(now >= last && fold.committed().resolved >= now);
                last = now;
            }
        }
    }
}
