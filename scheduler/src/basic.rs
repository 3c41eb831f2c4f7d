//! The basic scheduler: what nobody runs goes to whoever has least to do.

use heartbeatpb::{DispatcherId, NodeId};

use crate::Loads;

/// A span and the node that should run it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Decision {
    /// The span.
    pub span: DispatcherId,
    /// The node.
    pub dest: NodeId,
}

/// Places up to `budget` absent spans, in their order (spec/scheduling.md §7, basic).
#[must_use]
pub fn basic(absent: impl Iterator<Item = DispatcherId>, mut loads: Loads, budget: usize) -> Vec<Decision> {
    let mut decisions = Vec::new();
    for span in absent.take(budget) {
        let Some(dest) = loads.least().cloned() else { break };
        loads.add(&dest);
        decisions.push(Decision { span, dest });
    }
    decisions
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spans(count: u64) -> impl Iterator<Item = DispatcherId> {
        (1..=count).map(|n| DispatcherId::new(0, n))
    }

    fn counts(decisions: &[Decision]) -> Vec<(String, usize)> {
        let mut counts = std::collections::BTreeMap::new();
        for decision in decisions {
            *counts.entry(decision.dest.to_string()).or_insert(0) += 1;
        }
        counts.into_iter().collect()
    }

    #[test]
    fn the_least_loaded_nodes_are_filled_up_first() {
        let loads = Loads::new([("a".into(), 10), ("b".into(), 0), ("c".into(), 4)]);
        let decisions = basic(spans(10), loads, 100);
        assert_eq!(counts(&decisions), [("b".to_owned(), 7), ("c".to_owned(), 3)]);
    }

    #[test]
    fn the_budget_bounds_a_round_and_without_nodes_nothing_is_decided() {
        let loads = Loads::new([("a".into(), 0)]);
        assert_eq!(basic(spans(10), loads, 3).len(), 3);
        assert!(basic(spans(10), Loads::default(), 3).is_empty());
    }

    #[test]
    fn one_view_gives_one_answer() {
        let loads = || Loads::new([("a".into(), 1), ("b".into(), 1)]);
        assert_eq!(basic(spans(7), loads(), 7), basic(spans(7), loads(), 7));
    }
}
