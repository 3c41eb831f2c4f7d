//! The bootstrap merge: what nodes run and what the upstream has become one desired state (maintainer §8).
//!
//! Planning reads and decides; carrying out cannot fail. So nothing is ever half taken over.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use heartbeatpb::{
    BlockState, BootstrapTableSpan, ComponentState, DispatcherId, MaintainerBootstrapResponse,
    MergeDispatcherRequest, Mode, NodeId, OperatorType, ScheduleAction, ScheduleDispatcherRequest, TableId,
    TableSpan, Ts,
};
use operator::Operator;
use operator::span::{AddSpan, Afterwards, RemoveSpan};
use replica::{SpanReplica, contains, holes, is_terminal, overlap};

use self::joins::Join;
use crate::placement::{IdSource, Placement};
use crate::upstream::SourceTable;

mod joins;

/// What a plan is made from.
pub(super) struct Input<'a> {
    /// Answers by node, in the order of nodes.
    pub(super) answers: &'a [(&'a NodeId, &'a MaintainerBootstrapResponse)],
    pub(super) tables: &'a [SourceTable],
    pub(super) trigger: DispatcherId,
    /// Where new spans start.
    pub(super) start: Ts,
    /// Whether every table may be divided, whatever is said of it.
    pub(super) divides_all: bool,
}

/// A desired state and the operators that are in flight.
#[derive(Debug)]
pub(super) struct Plan {
    /// Where the table trigger really starts.
    pub(super) start: Ts,
    /// Those that requests and merges are about.
    spans: BTreeMap<DispatcherId, SpanReplica>,
    /// All others, table by table: nearly all, and only carried out.
    adopted: Vec<SpanReplica>,
    operators: BTreeMap<DispatcherId, Restored>,
    /// Tables that the upstream does not have here, and that dispatchers were found of: dropped already, or
    /// created by a schema change that is still to be replayed.
    strangers: BTreeSet<TableId>,
    joins: Vec<Join>,
    blocks: Vec<(DispatcherId, BlockState)>,
}

#[derive(Debug, PartialEq, Eq)]
enum Restored {
    Add { to: NodeId },
    Remove { from: NodeId, intent: OperatorType, afterwards: Afterwards },
}

/// A span that a node runs.
type Found<'a> = (&'a NodeId, &'a BootstrapTableSpan);

type Reported<'a> = BTreeMap<DispatcherId, Found<'a>>;

/// Plans the take-over.
///
/// # Errors
/// When no node has the table trigger.
pub(super) fn plan(input: &Input<'_>, ids: &mut IdSource) -> Result<Plan, &'static str> {
    let start = input.answers.iter().map(|(_, answer)| answer.checkpoint).max().unwrap_or(Ts::ZERO);
    if start == Ts::ZERO {
        return Err("all bootstrap responses reported an empty checkpoint");
    }
    let wanted: BTreeMap<TableId, &SourceTable> =
        input.tables.iter().map(|table| (table.id, table)).collect();
    let mut reported = reported(input);
    let mut plan = Plan {
        start,
        spans: BTreeMap::new(),
        adopted: Vec::with_capacity(reported.len()),
        operators: BTreeMap::new(),
        strangers: BTreeSet::new(),
        joins: Vec::new(),
        blocks: Vec::new(),
    };
    for (node, answer) in input.answers {
        let mut requests: Vec<&ScheduleDispatcherRequest> = answer.operators.iter().collect();
        requests.sort_by_key(|request| request.config.dispatcher);
        for request in requests {
            plan.restore(node, request, &reported, &wanted);
        }
    }
    for (node, answer) in input.answers {
        let mut merges: Vec<&MergeDispatcherRequest> = answer.merges.iter().collect();
        merges.sort_by_key(|request| request.merged);
        for request in merges {
            plan.judge(node, request, &mut reported, &wanted);
        }
    }
    let mut found: Vec<Found<'_>> = reported.into_values().collect();
    found.sort_by_cached_key(|(_, span)| span.span.table);
    let mut by_table: BTreeMap<TableId, &mut [Found<'_>]> = found
        .chunk_by_mut(|(_, a), (_, b)| a.span.table == b.span.table)
        .filter_map(|spans| Some((spans.first()?.1.span.table, spans)))
        .collect();
    let mut restored: BTreeMap<TableId, BTreeSet<DispatcherId>> = BTreeMap::new();
    for (id, span) in &plan.spans {
        restored.entry(span.span.table).or_default().insert(*id);
    }
    for table in wanted.values() {
        let spans = by_table.remove(&table.id).unwrap_or_default();
        plan.cover(table, spans, &restored.remove(&table.id).unwrap_or_default(), input, ids);
    }
    plan.settle_joins();
    for (table, spans) in by_table {
        tracing::info!(%table, spans = spans.len(), "spans of a table that is not replicated (yet) are removed");
        plan.dismiss(table, spans);
    }
    for (_, answer) in input.answers {
        let blocks = answer.spans.iter().filter(|span| span.mode == Mode::Default);
        plan.blocks.extend(blocks.filter_map(|span| Some((span.id, span.block.clone()?))));
    }
    Ok(plan)
}

/// Spans that can be taken over as they are. Of two nodes that run one dispatcher the first one counts.
fn reported<'a>(input: &Input<'a>) -> Reported<'a> {
    let mut reported: Vec<(DispatcherId, Found<'a>)> = Vec::new();
    for (node, answer) in input.answers {
        reported.reserve(answer.spans.len());
        for span in &answer.spans {
            let range = &span.span;
            let usable = span.mode == Mode::Default
                && span.id != input.trigger
                && !span.id.is_zero()
                && range.table != TableId::DDL
                && (range.end.is_empty() || range.start < range.end)
                && span.checkpoint != Ts::ZERO
                && span.checkpoint != Ts::MAX
                && !is_terminal(span.state);
            if usable {
                reported.push((span.id, (node, span)));
            } else if span.id != input.trigger {
                tracing::warn!(%node, dispatcher = %span.id, state = ?span.state, "a reported span is not taken over");
            }
        }
    }
    // A map is made fastest from all at once; of equal keys it keeps the last.
    reported.into_iter().rev().collect()
}

fn replica(span: &BootstrapTableSpan, table: Option<&SourceTable>, node: &NodeId) -> SpanReplica {
    let schema = table.map_or(span.schema, |table| table.schema_id);
    let mut replica = SpanReplica::absent(span.id, schema, span.span.clone(), span.checkpoint);
    replica.splittable = table.is_some_and(|table| table.splittable);
    replica.state = span.state;
    replica.block = span.block.clone().map(Box::new);
    replica.node = Some(node.clone());
    replica
}

impl Plan {
    /// Continues a request that was in flight.
    fn restore(
        &mut self,
        node: &NodeId,
        request: &ScheduleDispatcherRequest,
        reported: &Reported<'_>,
        wanted: &BTreeMap<TableId, &SourceTable>,
    ) {
        let config = &request.config;
        let id = config.dispatcher;
        if id.is_zero() || config.mode != Mode::Default || self.operators.contains_key(&id) {
            return;
        }
        let here = reported.get(&id).filter(|(reporter, _)| *reporter == node).map(|(_, span)| *span);
        let mut range = config.span.clone();
        if range.table == TableId::DDL
            && let Some(span) = here
        {
            range = span.span.clone();
        }
        if range.table == TableId::DDL {
            return;
        }
        let table = wanted.get(&range.table).copied();
        match request.action {
            ScheduleAction::Create => {
                let bound = self.spans.get(&id).is_some_and(|span| span.node.is_some());
                let Some(table) = table.filter(|_| here.is_none() && !bound && config.start_ts != Ts::ZERO)
                else {
                    return;
                };
                self.spans.entry(id).or_insert_with(|| {
                    let mut span = SpanReplica::absent(id, table.schema_id, range, config.start_ts);
                    span.splittable = table.splittable;
                    span
                });
                self.operators.insert(id, Restored::Add { to: node.clone() });
            }
            ScheduleAction::Remove => {
                match (self.spans.get_mut(&id), here) {
                    (None, None) => return,
                    (None, Some(span)) => drop(self.spans.insert(id, replica(span, table, node))),
                    (Some(span), _) => drop(span.node.get_or_insert_with(|| node.clone())),
                }
                if table.is_none() {
                    self.strangers.insert(range.table);
                }
                let afterwards = match (request.operator, table) {
                    (OperatorType::Move | OperatorType::Split, Some(_)) => Afterwards::Release,
                    (OperatorType::Add | OperatorType::Remove | OperatorType::Merge, Some(_)) | (_, None) => {
                        Afterwards::Forget
                    }
                };
                let intent = request.operator;
                self.operators.insert(id, Restored::Remove { from: node.clone(), intent, afterwards });
            }
        }
    }

    /// Removes the dispatchers of a table that is not there at the start. They stay in the desired state until they
    /// are gone: when a replayed schema change creates the table, nobody else may write it before.
    fn dismiss(&mut self, table: TableId, spans: &[Found<'_>]) {
        self.strangers.insert(table);
        let spans = if heartbeatpb::Rule::StrangersFirst.holds() { spans } else { &[] };
        for (node, span) in spans {
            self.spans.entry(span.id).or_insert_with(|| replica(span, None, node));
            self.operators.entry(span.id).or_insert_with(|| Restored::Remove {
                from: (*node).clone(),
                intent: OperatorType::Remove,
                afterwards: Afterwards::Forget,
            });
        }
    }

    /// Makes every key of a table somebody's. `restored`: those of the table that are planned already.
    fn cover(
        &mut self,
        table: &SourceTable,
        reported: &mut [Found<'_>],
        restored: &BTreeSet<DispatcherId>,
        input: &Input<'_>,
        ids: &mut IdSource,
    ) {
        reported.sort_by(|(_, a), (_, b)| range_order(&a.span).cmp(&range_order(&b.span)));
        self.reject_overlaps(reported);
        let mut known: Vec<&TableSpan> = Vec::with_capacity(reported.len() + restored.len());
        for (node, span) in &*reported {
            if !self.spans.contains_key(&span.id) {
                self.adopted.push(replica(span, Some(table), node));
                known.push(&span.span);
            }
        }
        known.extend(restored.iter().filter_map(|id| self.spans.get(id)).map(|span| &span.span));
        for range in holes(table.id, known) {
            let id = ids();
            let mut span = SpanReplica::absent(id, table.schema_id, range, input.start);
            span.splittable = table.splittable || input.divides_all;
            self.adopted.push(span);
        }
    }

    /// Of two spans that share keys the later one is temporary, unless something explains them. The spans come in the
    /// order of their ranges.
    fn reject_overlaps(&mut self, mut reported: &mut [Found<'_>]) {
        while let Some(count) = entangled(reported) {
            let (together, rest) = reported.split_at_mut(count);
            reported = rest;
            if count > 1 {
                self.reject_among(together);
            }
        }
    }

    fn reject_among(&mut self, reported: &mut [Found<'_>]) {
        let unfinished = |span: &BootstrapTableSpan| {
            matches!(span.state, ComponentState::Preparing | ComponentState::MergeReady)
        };
        reported.sort_by_key(|(_, span)| unfinished(span));
        let mut accepted: Vec<&BootstrapTableSpan> = Vec::new();
        for (node, span) in reported.iter() {
            let explained = |other: &BootstrapTableSpan| {
                self.operators.contains_key(&other.id)
                    || self.operators.contains_key(&span.id)
                    || is_source_of(span, other)
                    || is_source_of(other, span)
            };
            if accepted.iter().all(|other| !overlap(&other.span, &span.span) || explained(other)) {
                accepted.push(span);
            } else {
                tracing::warn!(%node, dispatcher = %span.id, range = ?span.span, "a span that overlaps another one is removed");
                let from = (*node).clone();
                let (intent, afterwards) = (OperatorType::Remove, Afterwards::Forget);
                self.operators.insert(span.id, Restored::Remove { from, intent, afterwards });
            }
        }
    }

    /// Makes the plan the state. Says which dispatchers stood at events.
    pub(super) fn carry_out(
        self,
        placement: &mut Placement,
        now: Instant,
    ) -> Vec<(DispatcherId, BlockState)> {
        for span in self.spans.into_values().chain(self.adopted) {
            match span.node.clone() {
                Some(node) => placement.spans.add_replicating(span, node),
                None => placement.spans.add_absent(span),
            };
        }
        for join in &self.joins {
            placement.spans.add_scheduling(join.target.clone(), join.node.clone());
        }
        placement.strangers = self.strangers.into_iter().map(|table| (table, None)).collect();
        placement.drive(now, |operators, cx| {
            for (id, restored) in self.operators {
                let operator: Box<dyn Operator> = match restored {
                    Restored::Add { to } => Box::new(AddSpan::new(id, to, OperatorType::Add)),
                    Restored::Remove { from, intent, afterwards } => {
                        let Some(span) = cx.spans.get(id) else { continue };
                        Box::new(RemoveSpan::new(span, from, intent, afterwards))
                    }
                };
                operators.add(operator, cx);
            }
        });
        for join in self.joins {
            let target = join.target.id;
            let begun = placement.drive(now, |operators, cx| operators.merge(&join.sources, target, cx));
            if !begun {
                // Its sources go on. Should its node have a dispatcher for it, that one is not wanted.
                tracing::warn!(dispatcher = %target, node = %join.node, "a merge does not go on");
                placement.spans.remove(target);
            }
        }
        self.blocks
    }
}

/// How many of the first spans, in the order of their ranges, have to be looked at together: none of them shares a key
/// with one that comes later. `None` when there is no span.
fn entangled(reported: &[Found<'_>]) -> Option<usize> {
    let (_, first) = reported.first()?;
    let mut reach = first.span.end.as_slice();
    let reached = |reach: &[u8], start: &[u8]| reach.is_empty() || start < reach;
    let mut count = 1;
    while let Some((_, next)) = reported.get(count)
        && reached(reach, &next.span.start)
    {
        let end = next.span.end.as_slice();
        if !reach.is_empty() && (end.is_empty() || end > reach) {
            reach = end;
        }
        count += 1;
    }
    Some(count)
}

/// The narrower of two spans that start together comes first; the end of the table is the widest end.
fn range_order(span: &TableSpan) -> (&[u8], bool, &[u8], u32) {
    (&span.start, span.end.is_empty(), &span.end, span.keyspace_id)
}

/// Whether a span waits to become a part of another one that has taken over.
fn is_source_of(source: &BootstrapTableSpan, target: &BootstrapTableSpan) -> bool {
    source.state == ComponentState::WaitingMerge
        && matches!(target.state, ComponentState::Initializing | ComponentState::Working)
        && contains(&target.span, &source.span)
}

#[cfg(test)]
mod tests {
    use heartbeatpb::SchemaId;

    use super::*;

    #[test]
    fn only_spans_that_may_share_keys_are_compared_with_each_other() {
        let spans = |ranges: &[(&str, &str)]| -> Vec<BootstrapTableSpan> {
            let span = |(start, end): &(&str, &str)| BootstrapTableSpan {
                id: DispatcherId::new(1, 1),
                schema: SchemaId(1),
                span: TableSpan {
                    keyspace_id: 0,
                    table: TableId(1),
                    start: (*start).into(),
                    end: (*end).into(),
                },
                state: ComponentState::Working,
                checkpoint: Ts(1),
                block: None,
                mode: Mode::Default,
            };
            ranges.iter().map(span).collect()
        };
        let node = NodeId::from("a");
        let groups = |ranges: &[(&str, &str)]| {
            let spans = spans(ranges);
            let all: Vec<Found<'_>> = spans.iter().map(|span| (&node, span)).collect();
            let mut rest = all.as_slice();
            let mut counts = Vec::new();
            while let Some(count) = entangled(rest) {
                counts.push(count);
                rest = &rest[count..];
            }
            counts
        };
        assert_eq!(groups(&[]), [0; 0]);
        assert_eq!(groups(&[("", "b"), ("b", "d"), ("d", "")]), [1, 1, 1], "parts of a table");
        assert_eq!(groups(&[("", "b"), ("b", "f"), ("c", "d"), ("e", "g"), ("g", "")]), [1, 3, 1]);
        assert_eq!(
            groups(&[("", ""), ("b", "c"), ("x", "")]),
            [3],
            "the end of the table is after every key"
        );
        assert_eq!(groups(&[("a", "c"), ("b", ""), ("x", "y")]), [3]);
    }
}
