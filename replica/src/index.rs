//! The counters and indexes that follow every change of a span.

use std::collections::{BTreeMap, BTreeSet};

use heartbeatpb::{DispatcherId, NodeId, Ts};

use crate::set::Entry;
use crate::{GroupId, MinSet, Standing};

/// Spans that a node has in one group.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct NodeCounts {
    /// Bound to it.
    pub spans: usize,
    /// Of these: not running there yet.
    pub scheduling: usize,
}

/// One group of spans.
#[derive(Clone, Debug, Default)]
pub struct GroupIndex {
    absent: BTreeSet<DispatcherId>,
    counts: [usize; 3],
    nodes: BTreeMap<NodeId, NodeCounts>,
}

impl GroupIndex {
    /// Number of spans.
    #[must_use]
    pub fn len(&self) -> usize {
        self.counts.iter().sum()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of spans in a standing.
    #[must_use]
    pub fn count(&self, standing: Standing) -> usize {
        self.counts[standing as usize]
    }

    /// Ids of absent spans, in order.
    pub fn absent(&self) -> impl Iterator<Item = DispatcherId> {
        self.absent.iter().copied()
    }

    /// Nodes that have spans of the group, with what they have.
    pub fn nodes(&self) -> impl Iterator<Item = (&NodeId, NodeCounts)> {
        self.nodes.iter().map(|(node, counts)| (node, *counts))
    }

    /// What a node has of the group. O(log nodes).
    #[must_use]
    pub fn on_node(&self, node: &NodeId) -> NodeCounts {
        self.nodes.get(node).copied().unwrap_or_default()
    }
}

/// Everything that is derived from the spans.
#[derive(Clone, Debug, Default)]
pub(crate) struct Index {
    pub(crate) groups: BTreeMap<GroupId, GroupIndex>,
    /// Spans by node, those of one group side by side.
    pub(crate) nodes: BTreeMap<NodeId, BTreeSet<(GroupId, DispatcherId)>>,
    pub(crate) counts: [usize; 3],
    /// Checkpoints of the spans that hold the changefeed's checkpoint.
    pub(crate) floor: MinSet<Ts>,
    /// Nodes whose number of spans became zero, or stopped being zero.
    pub(crate) crossings: BTreeSet<NodeId>,
}

impl Index {
    pub(crate) fn enter(&mut self, entry: &Entry) {
        let (standing, span) = (entry.standing, &entry.span);
        self.counts[standing as usize] += 1;
        let group = self.groups.entry(span.group()).or_default();
        group.counts[standing as usize] += 1;
        if standing == Standing::Absent {
            group.absent.insert(span.id);
        }
        if let Some(node) = &span.node {
            let counts = group.nodes.entry(node.clone()).or_default();
            counts.spans += 1;
            counts.scheduling += usize::from(standing == Standing::Scheduling);
            let ids = self.nodes.entry(node.clone()).or_default();
            if ids.is_empty() {
                self.crossings.insert(node.clone());
            }
            ids.insert((span.group(), span.id));
        }
        if entry.holds() {
            self.floor.insert(span.checkpoint);
        }
    }

    /// Undoes [`Self::enter`].
    pub(crate) fn leave(&mut self, entry: &Entry) {
        let (standing, span) = (entry.standing, &entry.span);
        self.counts[standing as usize] -= 1;
        if let Some(group) = self.groups.get_mut(&span.group()) {
            group.counts[standing as usize] -= 1;
            group.absent.remove(&span.id);
            if let Some(node) = &span.node
                && let Some(counts) = group.nodes.get_mut(node)
            {
                counts.spans -= 1;
                counts.scheduling -= usize::from(standing == Standing::Scheduling);
                if counts.spans == 0 {
                    group.nodes.remove(node);
                }
            }
            if group.is_empty() && span.group() != GroupId::Default {
                self.groups.remove(&span.group());
            }
        }
        if let Some(node) = &span.node
            && let Some(ids) = self.nodes.get_mut(node)
        {
            ids.remove(&(span.group(), span.id));
            if ids.is_empty() {
                self.nodes.remove(node);
                self.crossings.insert(node.clone());
            }
        }
        if entry.holds() {
            self.floor.remove(span.checkpoint);
        }
    }
}
