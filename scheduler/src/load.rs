//! Who has least to do.

use std::collections::BTreeSet;

use heartbeatpb::NodeId;

/// How busy a node is. The order of the fields is the policy: first who is busiest with new spans, then who has
/// most, then a rank that differs from group to group, so that single tables do not all go to one node.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Load {
    /// Spans of the group that are on their way to it: their first scans run together.
    pub starting: usize,
    /// All its spans.
    pub spans: usize,
    /// Breaks ties.
    pub rank: usize,
    /// The node.
    pub node: NodeId,
}

/// Candidates, the least loaded one first.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Loads(BTreeSet<Load>);

impl FromIterator<Load> for Loads {
    fn from_iter<I: IntoIterator<Item = Load>>(loads: I) -> Self {
        Self(loads.into_iter().collect())
    }
}

impl Loads {
    /// Whether there is no candidate.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Gives one more span to the least loaded node that may have it, and says which one that is. `ceiling`
    /// bounds the spans that start on one node together.
    pub fn place(&mut self, ceiling: Option<usize>) -> Option<NodeId> {
        let least = self.0.first().filter(|load| ceiling.is_none_or(|ceiling| load.starting < ceiling))?;
        let node = least.node.clone();
        let mut load = self.0.pop_first()?;
        load.starting += 1;
        load.spans += 1;
        self.0.insert(load);
        Some(node)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loads(loads: &[(&str, usize, usize)]) -> Loads {
        let of = |(rank, (node, starting, spans)): (usize, &(&str, usize, usize))| Load {
            starting: *starting,
            spans: *spans,
            rank,
            node: (*node).into(),
        };
        loads.iter().enumerate().map(of).collect()
    }

    #[test]
    fn starting_spans_count_first_then_all_spans_then_rank() {
        let mut loads = loads(&[("a", 1, 0), ("b", 0, 9), ("c", 0, 8), ("d", 0, 8)]);
        let placed: Vec<String> =
            std::iter::from_fn(|| loads.place(None)).take(5).map(|node| node.to_string()).collect();
        assert_eq!(placed, ["c", "d", "b", "a", "c"]);
    }

    #[test]
    fn nobody_starts_more_than_the_ceiling_allows() {
        let mut loads = loads(&[("a", 1, 0), ("b", 0, 0)]);
        let placed = std::iter::from_fn(|| loads.place(Some(2))).count();
        assert_eq!(placed, 3);
        assert_eq!(Loads::default().place(None), None);
    }
}
