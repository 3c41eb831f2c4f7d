//! The changefeed's checkpoint: a fold over what nodes report and what nobody runs.

use std::collections::BTreeMap;

use heartbeatpb::{NodeId, Ts, Watermark};

/// Result of a fold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fold {
    /// Everything at or before it is durable downstream, for every span.
    pub checkpoint: Ts,
    /// Everything at or before it was received.
    pub resolved: Ts,
}

/// Watermarks of nodes, and the committed checkpoint (spec/maintainer.md §11). One task reads and writes all
/// inputs, so a fold is one consistent snapshot.
#[derive(Clone, Debug)]
pub struct CheckpointFold {
    by_node: BTreeMap<NodeId, Watermark>,
    committed: Fold,
    /// Largest commit ts that any node flushed.
    pub last_synced: Ts,
}

impl CheckpointFold {
    /// A fold that is committed at `start`.
    #[must_use]
    pub fn new(start: Ts) -> Self {
        let committed = Fold { checkpoint: start, resolved: start };
        Self { by_node: BTreeMap::new(), committed, last_synced: Ts::ZERO }
    }

    /// Takes a node's watermark unless it is of an older membership; says whether it did.
    pub fn on_watermark(&mut self, node: &NodeId, mark: Watermark) -> bool {
        if self.by_node.get(node).is_some_and(|known| mark.seq < known.seq) {
            return false;
        }
        self.last_synced = self.last_synced.max(mark.last_synced);
        self.by_node.insert(node.clone(), mark);
        true
    }

    /// A node is gone. Its spans must be absent in the span set already: that is what holds the checkpoint now.
    pub fn on_node_removed(&mut self, node: &NodeId) {
        self.by_node.remove(node);
    }

    /// What was committed last.
    #[must_use]
    pub fn committed(&self) -> Fold {
        self.committed
    }

    /// Folds: `relevant` nodes (the own one, and those with spans), and `limits` from spans that nobody
    /// replicates, operators and barriers. Says whether the committed checkpoint moved.
    pub fn advance<'a>(&mut self, relevant: impl Iterator<Item = &'a NodeId>, limits: &[Option<Ts>]) -> bool {
        let mut fold = Fold { checkpoint: Ts::MAX, resolved: Ts::MAX };
        for node in relevant {
            // A node that has spans and has not reported could be anywhere.
            let Some(mark) = self.by_node.get(node) else { return false };
            fold.checkpoint = fold.checkpoint.min(mark.checkpoint);
            fold.resolved = fold.resolved.min(mark.resolved);
        }
        for limit in limits.iter().flatten() {
            fold.checkpoint = fold.checkpoint.min(*limit);
            fold.resolved = fold.resolved.min(*limit);
        }
        if fold.checkpoint == Ts::MAX {
            return false;
        }
        let moved = fold.checkpoint > self.committed.checkpoint;
        self.committed.checkpoint = self.committed.checkpoint.max(fold.checkpoint);
        if fold.resolved != Ts::MAX {
            self.committed.resolved = self.committed.resolved.max(fold.resolved);
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

    #[test]
    fn a_node_that_has_not_reported_and_a_span_without_a_home_hold_the_checkpoint() {
        let (a, b) = (NodeId::from("a"), NodeId::from("b"));
        let mut fold = CheckpointFold::new(Ts(10));
        assert!(fold.on_watermark(&a, mark(50, 1)));
        assert!(!fold.advance([&a, &b].into_iter(), &[]), "b is relevant and silent");
        fold.on_watermark(&b, mark(40, 1));
        assert!(fold.advance([&a, &b].into_iter(), &[Some(Ts(30))]), "up to the absent span");
        assert_eq!(fold.committed().checkpoint, Ts(30));
        assert!(fold.advance([&a, &b].into_iter(), &[None]));
        assert_eq!(fold.committed(), Fold { checkpoint: Ts(40), resolved: Ts(45) });
    }

    #[test]
    fn a_watermark_of_an_older_membership_is_dropped() {
        let a = NodeId::from("a");
        let mut fold = CheckpointFold::new(Ts(10));
        fold.on_watermark(&a, mark(50, 7));
        assert!(!fold.on_watermark(&a, mark(90, 6)));
        fold.advance([&a].into_iter(), &[]);
        assert_eq!(fold.committed().checkpoint, Ts(50));
    }

    #[test]
    fn nobody_having_anything_to_say_moves_nothing() {
        let a = NodeId::from("a");
        let mut fold = CheckpointFold::new(Ts(10));
        fold.on_watermark(&a, Watermark::NONE);
        assert!(!fold.advance([&a].into_iter(), &[None]));
        assert_eq!(fold.committed().checkpoint, Ts(10));
    }

    proptest! {
        #[test]
        fn the_committed_checkpoint_never_goes_back(
            steps in prop::collection::vec((0u64..3, 0u64..100, 0u64..10, prop::option::of(0u64..100)), 1..100)
        ) {
            let nodes: Vec<NodeId> = ["a", "b", "c"].map(NodeId::from).into();
            let mut fold = CheckpointFold::new(Ts(1));
            let mut last = Ts(1);
            for (node, ts, seq, limit) in steps {
                fold.on_watermark(&nodes[usize::try_from(node).unwrap()], mark(ts, seq));
                fold.advance(nodes.iter(), &[limit.map(Ts)]);
                prop_assert!(fold.committed().checkpoint >= last);
                last = fold.committed().checkpoint;
            }
        }
    }
}
