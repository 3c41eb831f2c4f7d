//! The spans of one changefeed and mode, by every question that is asked of them.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

use heartbeatpb::{
    BlockState, ComponentState, DispatcherId, NodeId, SchemaId, TableId, TableSpan, TableSpanStatus, Ts,
};

use crate::index::{GroupIndex, Index, NodeIndex};
use crate::store::{Slot, Store};
use crate::{GroupId, SpanReplica, divides};

/// Where a span stands.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Standing {
    /// No node runs it.
    Absent,
    /// A node is about to run it, or to let it go.
    Scheduling,
    /// A node runs it.
    Replicating,
}

#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) standing: Standing,
    /// Whether an operator holds the checkpoint at this span.
    held: bool,
    pub(crate) span: SpanReplica,
}

impl Entry {
    pub(crate) fn new(standing: Standing, span: SpanReplica) -> Self {
        Self { standing, held: false, span }
    }

    /// Whether the changefeed's checkpoint must not pass this span's.
    pub(crate) fn holds(&self) -> bool {
        self.held || self.standing != Standing::Replicating
    }
}

/// All spans of a changefeed (scheduling §3). Every transition goes through a method here, so that the
/// indexes and the minimum cannot miss one. Methods that are given an unknown id, or the table trigger's,
/// change nothing and say `false`.
#[derive(Clone, Debug)]
pub struct SpanSet {
    trigger: Option<SpanReplica>,
    spans: Store,
    by_table: BTreeSet<(TableId, Slot)>,
    /// How many spans of a table are of a schema. A table has one schema, so this stays small.
    by_schema: BTreeMap<(SchemaId, TableId), u32>,
    index: Index,
    committed: Ts,
}

impl SpanSet {
    /// A set that has only the table trigger, whose checkpoint is the committed one.
    #[must_use]
    pub fn new(trigger: SpanReplica) -> Self {
        let mut index = Index::default();
        index.groups.insert(GroupId::Default, GroupIndex::default());
        Self {
            committed: trigger.checkpoint,
            trigger: Some(trigger),
            spans: Store::default(),
            by_table: BTreeSet::new(),
            by_schema: BTreeMap::new(),
            index,
        }
    }

    /// The table trigger, until it was removed.
    #[must_use]
    pub fn trigger(&self) -> Option<&SpanReplica> {
        self.trigger.as_ref()
    }

    /// Whether this is the table trigger's id.
    #[must_use]
    pub fn is_trigger(&self, id: DispatcherId) -> bool {
        self.trigger.as_ref().is_some_and(|trigger| trigger.id == id)
    }

    /// Number of spans, the table trigger apart.
    #[must_use]
    pub fn len(&self) -> usize {
        self.spans.len()
    }

    /// Whether there is no span beside the table trigger.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.spans.len() == 0
    }

    /// Number of spans and the table trigger.
    #[must_use]
    pub fn task_size(&self) -> usize {
        self.spans.len() + usize::from(self.trigger.is_some())
    }

    /// Number of spans in a standing.
    #[must_use]
    pub fn count(&self, standing: Standing) -> usize {
        self.index.counts[standing as usize]
    }

    /// Number of tables: whole ones, and those that are in parts.
    #[must_use]
    pub fn table_count(&self) -> usize {
        let whole = self.index.groups.get(&GroupId::Default).map_or(0, GroupIndex::len);
        whole + self.index.groups.len() - usize::from(self.index.groups.contains_key(&GroupId::Default))
    }

    /// Number of spans bound to a node, the table trigger apart; no span is visited.
    #[must_use]
    pub fn size_by_node(&self, node: &NodeId) -> usize {
        self.index.nodes.get(node).map_or(0, NodeIndex::len)
    }

    /// A span, or the table trigger.
    #[must_use]
    pub fn get(&self, id: DispatcherId) -> Option<&SpanReplica> {
        match self.spans.get(id) {
            Some(entry) => Some(&entry.span),
            None => self.trigger.as_ref().filter(|trigger| trigger.id == id),
        }
    }

    /// Where a span stands.
    #[must_use]
    pub fn standing(&self, id: DispatcherId) -> Option<Standing> {
        self.spans.get(id).map(|entry| entry.standing)
    }

    /// Whether a node runs the span.
    #[must_use]
    pub fn is_replicating(&self, id: DispatcherId) -> bool {
        self.standing(id) == Some(Standing::Replicating)
    }

    /// All spans, the table trigger apart. Their order, here and below, is the same for the same history.
    pub fn iter(&self) -> impl Iterator<Item = (Standing, &SpanReplica)> {
        self.spans.iter().map(|entry| (entry.standing, &entry.span))
    }

    /// All spans and the table trigger.
    pub fn all(&self) -> impl Iterator<Item = &SpanReplica> {
        self.trigger.iter().chain(self.spans.iter().map(|entry| &entry.span))
    }

    /// The groups that have spans, and the default one.
    pub fn groups(&self) -> impl Iterator<Item = (GroupId, &GroupIndex)> {
        self.index.groups.iter().map(|(id, group)| (*id, group))
    }

    /// Spans of a table; of table zero the table trigger.
    pub fn by_table(&self, table: TableId) -> impl Iterator<Item = &SpanReplica> {
        let trigger = self.trigger.iter().filter(move |_| table == TableId::DDL);
        trigger.chain(self.of_table(table))
    }

    /// Spans of a schema; of schema zero the table trigger.
    pub fn by_schema(&self, schema: SchemaId) -> impl Iterator<Item = &SpanReplica> {
        let trigger = self.trigger.iter().filter(move |_| schema == SchemaId::DDL);
        let tables = self.by_schema.range((schema, TableId(i64::MIN))..=(schema, TableId(i64::MAX)));
        let spans = tables.flat_map(|((_, table), _)| self.of_table(*table));
        trigger.chain(spans.filter(move |span| span.schema == schema))
    }

    fn of_table(&self, table: TableId) -> impl Iterator<Item = &SpanReplica> {
        self.at(self.by_table.range(slots_of(table)).map(|(_, slot)| *slot))
    }

    fn at(&self, slots: impl Iterator<Item = Slot>) -> impl Iterator<Item = &SpanReplica> {
        slots.filter_map(|slot| self.spans.at(slot)).map(|entry| &entry.span)
    }

    /// Whether a table has a span.
    #[must_use]
    pub fn has_table(&self, table: TableId) -> bool {
        self.by_table.range(slots_of(table)).next().is_some()
    }

    /// Ids of the spans bound to a node, group by group.
    pub fn ids_by_node(&self, node: &NodeId) -> impl Iterator<Item = DispatcherId> {
        let slots = self.index.nodes.get(node).into_iter().flat_map(NodeIndex::slots);
        self.at(slots).map(|span| span.id)
    }

    /// Ids of the spans of one group bound to a node; spans of other groups are not visited.
    pub fn ids_on_node_in(&self, node: &NodeId, group: GroupId) -> impl Iterator<Item = DispatcherId> {
        let slots = self.index.nodes.get(node).into_iter().flat_map(move |index| index.slots_of(group));
        self.at(slots).map(|span| span.id)
    }

    /// A group, if it has spans or is the default one.
    #[must_use]
    pub fn group(&self, group: GroupId) -> Option<&GroupIndex> {
        self.index.groups.get(&group)
    }

    /// Nodes that have spans.
    pub fn nodes(&self) -> impl Iterator<Item = &NodeId> {
        self.index.nodes.keys()
    }

    /// Nodes that got their first span or lost their last one since the last call.
    pub fn take_crossings(&mut self) -> BTreeSet<NodeId> {
        std::mem::take(&mut self.index.crossings)
    }

    /// Smallest checkpoint of the spans that hold the changefeed's: those that no node replicates, and those
    /// that an operator holds.
    #[must_use]
    pub fn floor(&self) -> Option<Ts> {
        self.index.floor.min()
    }

    /// What the changefeed has committed: no dispatcher is created below it.
    #[must_use]
    pub fn committed(&self) -> Ts {
        self.committed
    }

    /// The changefeed committed `ts`; a smaller one changes nothing.
    pub fn advance_committed(&mut self, ts: Ts) {
        if ts != Ts::MAX {
            self.committed = self.committed.max(ts);
        }
    }

    /// Adds a span that nobody runs.
    pub fn add_absent(&mut self, span: SpanReplica) -> bool {
        self.add(Standing::Absent, SpanReplica { node: None, ..span })
    }

    /// Adds a span that `node` is about to run.
    pub fn add_scheduling(&mut self, span: SpanReplica, node: NodeId) -> bool {
        self.add(Standing::Scheduling, SpanReplica { node: Some(node), ..span })
    }

    /// Adds a span that `node` runs already.
    pub fn add_replicating(&mut self, span: SpanReplica, node: NodeId) -> bool {
        self.add(Standing::Replicating, SpanReplica { node: Some(node), ..span })
    }

    /// Adds the only span of a table. A table that has spans is left as it is.
    pub fn add_table(
        &mut self,
        id: DispatcherId,
        schema: SchemaId,
        table: TableId,
        splittable: bool,
        start_ts: Ts,
    ) -> bool {
        if start_ts == Ts::ZERO || self.has_table(table) {
            return false;
        }
        let mut span = SpanReplica::absent(id, schema, TableSpan::whole(table), start_ts);
        span.splittable = splittable;
        self.add_absent(span)
    }

    fn add(&mut self, standing: Standing, span: SpanReplica) -> bool {
        let id = span.id;
        let refused =
            id.is_zero() || span.span.table == TableId::DDL || self.spans.contains(id) || self.is_trigger(id);
        if refused {
            return false;
        }
        let (table, schema) = (span.span.table, span.schema);
        let Some(slot) = self.spans.insert(Entry::new(standing, span)) else { return false };
        self.by_table.insert((table, slot));
        *self.by_schema.entry((schema, table)).or_default() += 1;
        if let Some(entry) = self.spans.at(slot) {
            self.index.enter(slot, entry);
        }
        true
    }

    fn change(&mut self, id: DispatcherId, edit: impl FnOnce(&mut Entry)) -> bool {
        let Some(slot) = self.spans.slot(id) else { return false };
        let Some(entry) = self.spans.at_mut(slot) else { return false };
        self.index.leave(slot, entry);
        edit(entry);
        self.index.enter(slot, entry);
        true
    }

    /// Nobody runs the span any more. Idempotent.
    pub fn mark_absent(&mut self, id: DispatcherId) -> bool {
        self.change(id, |entry| {
            entry.standing = Standing::Absent;
            entry.span.node = None;
        })
    }

    /// The span is on its way; its node stays. Refused for a span without a node. Idempotent.
    pub fn mark_scheduling(&mut self, id: DispatcherId) -> bool {
        self.is_bound(id) && self.change(id, |entry| entry.standing = Standing::Scheduling)
    }

    /// The bound node runs the span. Refused for a span without a node. Idempotent.
    pub fn mark_replicating(&mut self, id: DispatcherId) -> bool {
        self.is_bound(id) && self.change(id, |entry| entry.standing = Standing::Replicating)
    }

    /// `node` is about to run the span. Idempotent. On another node its dispatcher begins anew: what was said of
    /// the one before says nothing of it.
    pub fn bind(&mut self, id: DispatcherId, node: NodeId) -> bool {
        self.change(id, |entry| {
            entry.standing = Standing::Scheduling;
            if entry.span.node.as_ref() != Some(&node) {
                entry.span.node = Some(node);
                entry.span.state = ComponentState::Initializing;
            }
        })
    }

    /// Puts parts in the place of a span, in one step: at `checkpoint`, or at the span's if that is smaller, with
    /// its schema. With one node for each part they are on their way there; otherwise nobody runs them.
    ///
    /// `None`, and nothing has changed, when the span is unknown, an id is taken, or the parts are not in order,
    /// do not follow each other, or are not exactly the span. `Some(true)` when the parts have nodes.
    pub fn replace(
        &mut self,
        id: DispatcherId,
        parts: &[(DispatcherId, TableSpan)],
        checkpoint: Ts,
        nodes: &[NodeId],
    ) -> Option<bool> {
        let old = self.spans.get(id).map(|entry| &entry.span)?;
        let fresh: BTreeSet<DispatcherId> = parts.iter().map(|(part, _)| *part).collect();
        let taken = |part: &DispatcherId| part.is_zero() || self.get(*part).is_some();
        let usable = fresh.len() == parts.len()
            && !fresh.iter().any(taken)
            && divides(&old.span, parts.iter().map(|(_, range)| range));
        if !usable {
            return None;
        }
        let old = self.remove(id)?;
        let placed = nodes.len() == parts.len();
        for (n, (part, range)) in parts.iter().enumerate() {
            let start = checkpoint.min(old.checkpoint);
            let mut span = SpanReplica::absent(*part, old.schema, range.clone(), start);
            span.splittable = old.splittable;
            match nodes.get(n).filter(|_| placed) {
                Some(node) => self.add_scheduling(span, node.clone()),
                None => self.add_absent(span),
            };
        }
        Some(placed)
    }

    fn is_bound(&self, id: DispatcherId) -> bool {
        self.spans.get(id).is_some_and(|entry| entry.span.node.is_some())
    }

    /// An operator holds the checkpoint at the span, or no longer does.
    pub fn hold(&mut self, id: DispatcherId, held: bool) -> bool {
        self.change(id, |entry| entry.held = held)
    }

    /// Folds a report of the span's node in. A replicating span costs a look-up.
    pub fn observe(&mut self, status: &TableSpanStatus) -> bool {
        self.touch(status.id, |span| span.observe(status))
    }

    /// The span has flushed everything up to `ts`.
    pub fn raise(&mut self, id: DispatcherId, ts: Ts) -> bool {
        self.touch(id, |span| span.raise(ts))
    }

    /// Remembers the blocking event of a span.
    pub fn set_block(&mut self, id: DispatcherId, block: Option<BlockState>) -> bool {
        self.touch(id, |span| span.block = block.map(Box::new))
    }

    /// Changes what a node reports of a span, the table trigger included.
    fn touch(&mut self, id: DispatcherId, edit: impl FnOnce(&mut SpanReplica)) -> bool {
        let slot = self.spans.slot(id);
        let Some(entry) = slot.and_then(|slot| self.spans.at_mut(slot)) else {
            let trigger = self.trigger.as_mut().filter(|trigger| trigger.id == id);
            return trigger.map(edit).is_some();
        };
        let before = entry.span.checkpoint;
        edit(&mut entry.span);
        if entry.holds() && entry.span.checkpoint != before {
            self.index.floor.remove(before);
            self.index.floor.insert(entry.span.checkpoint);
        }
        true
    }

    /// Moves all spans of a table to another schema.
    pub fn change_schema(&mut self, table: TableId, schema: SchemaId) {
        for (_, slot) in self.by_table.range(slots_of(table)) {
            let Some(entry) = self.spans.at_mut(*slot) else { continue };
            let old = std::mem::replace(&mut entry.span.schema, schema);
            one_less(&mut self.by_schema, (old, table));
            *self.by_schema.entry((schema, table)).or_default() += 1;
        }
    }

    /// Forgets a span, or the table trigger. Idempotent.
    pub fn remove(&mut self, id: DispatcherId) -> Option<SpanReplica> {
        if self.is_trigger(id) {
            return self.trigger.take();
        }
        let (slot, entry) = self.spans.remove(id)?;
        self.index.leave(slot, &entry);
        self.by_table.remove(&(entry.span.span.table, slot));
        one_less(&mut self.by_schema, (entry.span.schema, entry.span.span.table));
        Some(entry.span)
    }
}

/// Everything of one table.
fn slots_of(table: TableId) -> RangeInclusive<(TableId, Slot)> {
    (table, Slot::MIN)..=(table, Slot::MAX)
}

fn one_less<K: Ord>(counts: &mut BTreeMap<K, u32>, key: K) {
    if let Some(count) = counts.get_mut(&key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests;
