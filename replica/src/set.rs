//! The spans of one changefeed and mode, by every question that is asked of them.

use std::collections::{BTreeMap, BTreeSet};

use heartbeatpb::{BlockState, DispatcherId, NodeId, SchemaId, TableId, TableSpanStatus, Ts};

use crate::{MinSet, SpanReplica};

/// Where a span stands.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Group {
    /// No node runs it.
    Absent,
    /// A node is about to run it.
    Scheduling,
    /// A node runs it.
    Replicating,
}

/// All spans of a changefeed, its table trigger apart (spec/scheduling.md §3).
#[derive(Clone, Debug, Default)]
pub struct SpanSet {
    spans: BTreeMap<DispatcherId, (Group, SpanReplica)>,
    absent: BTreeSet<DispatcherId>,
    by_table: BTreeMap<TableId, BTreeSet<DispatcherId>>,
    by_schema: BTreeMap<SchemaId, BTreeSet<DispatcherId>>,
    by_node: BTreeMap<NodeId, BTreeSet<DispatcherId>>,
    /// Checkpoints of absent and scheduling spans.
    waiting: MinSet<Ts>,
    scheduling: usize,
}

impl SpanSet {
    /// A set without spans.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Number of spans.
    #[must_use]
    pub fn len(&self) -> usize {
        self.spans.len()
    }

    /// Whether there is no span.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// Number of spans in a group.
    #[must_use]
    pub fn count(&self, group: Group) -> usize {
        match group {
            Group::Absent => self.absent.len(),
            Group::Scheduling => self.scheduling,
            Group::Replicating => self.spans.len() - self.absent.len() - self.scheduling,
        }
    }

    /// Number of spans bound to a node. O(log n).
    #[must_use]
    pub fn size_by_node(&self, node: &NodeId) -> usize {
        self.by_node.get(node).map_or(0, BTreeSet::len)
    }

    /// A span.
    #[must_use]
    pub fn get(&self, id: DispatcherId) -> Option<&SpanReplica> {
        self.spans.get(&id).map(|(_, span)| span)
    }

    /// The group of a span.
    #[must_use]
    pub fn group(&self, id: DispatcherId) -> Option<Group> {
        self.spans.get(&id).map(|(group, _)| *group)
    }

    /// All spans in the order of their ids.
    pub fn iter(&self) -> impl Iterator<Item = (Group, &SpanReplica)> {
        self.spans.values().map(|(group, span)| (*group, span))
    }

    /// Ids of absent spans, in order.
    pub fn absent(&self) -> impl Iterator<Item = DispatcherId> {
        self.absent.iter().copied()
    }

    /// Spans of a table.
    pub fn by_table(&self, table: TableId) -> impl Iterator<Item = &SpanReplica> {
        self.by_table.get(&table).into_iter().flatten().filter_map(|id| self.get(*id))
    }

    /// Spans of a schema.
    pub fn by_schema(&self, schema: SchemaId) -> impl Iterator<Item = &SpanReplica> {
        self.by_schema.get(&schema).into_iter().flatten().filter_map(|id| self.get(*id))
    }

    /// Ids of the spans bound to a node.
    #[must_use]
    pub fn ids_by_node(&self, node: &NodeId) -> Vec<DispatcherId> {
        self.by_node.get(node).map_or_else(Vec::new, |ids| ids.iter().copied().collect())
    }

    /// Tables that have a span.
    pub fn tables(&self) -> impl Iterator<Item = TableId> {
        self.by_table.keys().copied()
    }

    /// Smallest checkpoint of spans that no node replicates; O(1).
    #[must_use]
    pub fn min_waiting(&self) -> Option<Ts> {
        self.waiting.min()
    }

    /// Adds an absent span. A known id is left as it is.
    pub fn add_absent(&mut self, span: SpanReplica) {
        self.add(Group::Absent, SpanReplica { node: None, ..span });
    }

    /// Adds a span that `node` replicates already. A known id is left as it is.
    pub fn add_replicating(&mut self, span: SpanReplica, node: NodeId) {
        self.add(Group::Replicating, SpanReplica { node: Some(node), ..span });
    }

    fn add(&mut self, group: Group, span: SpanReplica) {
        let id = span.id;
        if self.spans.contains_key(&id) {
            return;
        }
        self.by_table.entry(span.span.table).or_default().insert(id);
        self.by_schema.entry(span.schema).or_default().insert(id);
        self.enter(group, &span);
        self.spans.insert(id, (group, span));
    }

    /// Counts a span in its group and node.
    fn enter(&mut self, group: Group, span: &SpanReplica) {
        match group {
            Group::Absent => {
                self.absent.insert(span.id);
                self.waiting.insert(span.checkpoint);
            }
            Group::Scheduling => {
                self.scheduling += 1;
                self.waiting.insert(span.checkpoint);
            }
            Group::Replicating => {}
        }
        if let Some(node) = &span.node {
            self.by_node.entry(node.clone()).or_default().insert(span.id);
        }
    }

    /// Undoes [`Self::enter`].
    fn leave(&mut self, group: Group, span: &SpanReplica) {
        match group {
            Group::Absent => {
                self.absent.remove(&span.id);
                self.waiting.remove(span.checkpoint);
            }
            Group::Scheduling => {
                self.scheduling -= 1;
                self.waiting.remove(span.checkpoint);
            }
            Group::Replicating => {}
        }
        if let Some(node) = &span.node
            && let Some(ids) = self.by_node.get_mut(node)
        {
            ids.remove(&span.id);
            if ids.is_empty() {
                self.by_node.remove(node);
            }
        }
    }

    fn change(&mut self, id: DispatcherId, group: Group, edit: impl FnOnce(&mut SpanReplica)) {
        let Some((old_group, mut span)) = self.spans.remove(&id) else { return };
        self.leave(old_group, &span);
        edit(&mut span);
        self.enter(group, &span);
        self.spans.insert(id, (group, span));
    }

    /// Nobody runs the span any more. Idempotent.
    pub fn mark_absent(&mut self, id: DispatcherId) {
        self.change(id, Group::Absent, |span| span.node = None);
    }

    /// `node` is about to run the span. Idempotent.
    pub fn bind(&mut self, id: DispatcherId, node: NodeId) {
        self.change(id, Group::Scheduling, |span| span.node = Some(node));
    }

    /// The bound node runs the span. Does nothing for a span without a node. Idempotent.
    pub fn mark_replicating(&mut self, id: DispatcherId) {
        if self.get(id).is_some_and(|span| span.node.is_some()) {
            self.change(id, Group::Replicating, |_| {});
        }
    }

    /// Folds a report in. A replicating span costs a map look-up.
    pub fn observe(&mut self, status: &TableSpanStatus) {
        let Some((group, span)) = self.spans.get_mut(&status.id) else { return };
        let before = span.checkpoint;
        span.observe(status);
        if *group != Group::Replicating && span.checkpoint != before {
            self.waiting.remove(before);
            self.waiting.insert(span.checkpoint);
        }
    }

    /// Remembers the blocking event of a span.
    pub fn set_block(&mut self, id: DispatcherId, block: Option<BlockState>) {
        if let Some((_, span)) = self.spans.get_mut(&id) {
            span.block = block;
        }
    }

    /// Moves all spans of a table to another schema.
    pub fn change_schema(&mut self, table: TableId, schema: SchemaId) {
        let ids: Vec<DispatcherId> = self.by_table.get(&table).into_iter().flatten().copied().collect();
        for id in ids {
            if let Some((_, span)) = self.spans.get_mut(&id) {
                let old = std::mem::replace(&mut span.schema, schema);
                if let Some(ids) = self.by_schema.get_mut(&old) {
                    ids.remove(&id);
                }
                self.by_schema.entry(schema).or_default().insert(id);
            }
        }
    }

    /// Forgets a span. Idempotent.
    pub fn remove(&mut self, id: DispatcherId) -> Option<SpanReplica> {
        let (group, span) = self.spans.remove(&id)?;
        self.leave(group, &span);
        for ids in [self.by_table.get_mut(&span.span.table), self.by_schema.get_mut(&span.schema)]
            .into_iter()
            .flatten()
        {
            ids.remove(&id);
        }
        if self.by_table.get(&span.span.table).is_some_and(BTreeSet::is_empty) {
            self.by_table.remove(&span.span.table);
        }
        if self.by_schema.get(&span.schema).is_some_and(BTreeSet::is_empty) {
            self.by_schema.remove(&span.schema);
        }
        Some(span)
    }
}

#[cfg(test)]
mod tests {
    use heartbeatpb::{ComponentState, Mode, TableSpan};
    use proptest::prelude::*;

    use super::*;

    fn id(n: u64) -> DispatcherId {
        DispatcherId::new(1, n + 1)
    }

    fn span(n: u64) -> SpanReplica {
        SpanReplica::absent(id(n), SchemaId(1), TableSpan::whole(TableId(n.cast_signed())), Ts(n * 10))
    }

    /// What the set must say, computed the slow way.
    fn check(set: &SpanSet) {
        let waiting =
            set.iter().filter(|(group, _)| *group != Group::Replicating).map(|(_, s)| s.checkpoint).min();
        assert_eq!(set.min_waiting(), waiting);
        for group in [Group::Absent, Group::Scheduling, Group::Replicating] {
            assert_eq!(set.count(group), set.iter().filter(|(g, _)| *g == group).count());
        }
        for (group, span) in set.iter() {
            assert_eq!(span.node.is_none(), group == Group::Absent, "RP-1");
            assert!(set.by_table(span.span.table).any(|s| s.id == span.id));
        }
        for node in ["a", "b"].map(NodeId::from) {
            let slow = set.iter().filter(|(_, s)| s.node.as_ref() == Some(&node)).count();
            assert_eq!(set.size_by_node(&node), slow);
        }
    }

    proptest! {
        #[test]
        fn the_indexes_agree_with_the_spans_after_any_changes(
            steps in prop::collection::vec((0u8..7, 0u64..8, 0u64..200), 0..200)
        ) {
            let mut set = SpanSet::new();
            for (what, n, ts) in steps {
                match what {
                    0 => set.add_absent(span(n)),
                    1 => set.bind(id(n), if ts % 2 == 0 { "a" } else { "b" }.into()),
                    2 => set.mark_replicating(id(n)),
                    3 => set.mark_absent(id(n)),
                    4 => { set.remove(id(n)); }
                    5 => set.observe(&TableSpanStatus {
                        id: id(n),
                        state: ComponentState::Working,
                        checkpoint: Ts(ts),
                        event_size_per_second: 0.0,
                        mode: Mode::Default,
                    }),
                    _ => set.add_replicating(span(n), "a".into()),
                }
                check(&set);
            }
        }
    }
}
