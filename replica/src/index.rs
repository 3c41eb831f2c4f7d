//! The counters and indexes that follow every change of a span.

use std::collections::{BTreeMap, BTreeSet};

use heartbeatpb::{DispatcherId, NodeId, TableId, Ts};

use crate::set::Entry;
use crate::store::Slot;
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

/// The spans of one node. Most are whole tables, and these need no more than their slots.
#[derive(Clone, Debug, Default)]
pub(crate) struct NodeIndex {
    whole: BTreeSet<Slot>,
    parts: BTreeSet<(TableId, Slot)>,
}

impl NodeIndex {
    pub(crate) fn len(&self) -> usize {
        self.whole.len() + self.parts.len()
    }

    /// All of them, those of one group side by side.
    pub(crate) fn slots(&self) -> impl Iterator<Item = Slot> {
        self.whole.iter().copied().chain(self.parts.iter().map(|(_, slot)| *slot))
    }

    /// Those of one group.
    pub(crate) fn slots_of(&self, group: GroupId) -> impl Iterator<Item = Slot> {
        let (whole, parts) = match group {
            GroupId::Default => (Some(&self.whole), None),
            GroupId::Table(table) => (None, Some(self.parts.range((table, Slot::MIN)..=(table, Slot::MAX)))),
        };
        let parts = parts.into_iter().flatten().map(|(_, slot)| *slot);
        whole.into_iter().flatten().copied().chain(parts)
    }

    fn insert(&mut self, group: GroupId, slot: Slot) {
        match group {
            GroupId::Default => self.whole.insert(slot),
            GroupId::Table(table) => self.parts.insert((table, slot)),
        };
    }

    fn remove(&mut self, group: GroupId, slot: Slot) {
        match group {
            GroupId::Default => self.whole.remove(&slot),
            GroupId::Table(table) => self.parts.remove(&(table, slot)),
        };
    }
}

/// Everything that is derived from the spans.
#[derive(Clone, Debug, Default)]
pub(crate) struct Index {
    pub(crate) groups: BTreeMap<GroupId, GroupIndex>,
    /// Spans by node.
    pub(crate) nodes: BTreeMap<NodeId, NodeIndex>,
    pub(crate) counts: [usize; 3],
    /// Checkpoints of the spans that hold the changefeed's checkpoint.
    pub(crate) floor: MinSet<Ts>,
    /// Nodes whose number of spans became zero, or stopped being zero.
    pub(crate) crossings: BTreeSet<NodeId>,
}

impl Index {
    pub(crate) fn enter(&mut self, slot: Slot, entry: &Entry) {
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
            if ids.len() == 0 {
                self.crossings.insert(node.clone());
            }
            ids.insert(span.group(), slot);
        }
        if entry.holds() {
            self.floor.insert(span.checkpoint);
        }
    }

    /// Undoes [`Self::enter`].
    pub(crate) fn leave(&mut self, slot: Slot, entry: &Entry) {
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
            ids.remove(span.group(), slot);
            if ids.len() == 0 {
                self.nodes.remove(node);
                self.crossings.insert(node.clone());
            }
        }
        if entry.holds() {
            self.floor.remove(span.checkpoint);
        }
    }
}
