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
    spans: BTreeMap<DispatcherId, SpanReplica>,
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

type Reported<'a> = BTreeMap<DispatcherId, (&'a NodeId, &'a BootstrapTableSpan)>;

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
    let mut by_table: BTreeMap<TableId, Vec<(&NodeId, &BootstrapTableSpan)>> = BTreeMap::new();
    for (node, span) in reported.values() {
        by_table.entry(span.span.table).or_default().push((node, span));
    }
    let mut restored: BTreeMap<TableId, BTreeSet<DispatcherId>> = BTreeMap::new();
    for (id, span) in &plan.spans {
        restored.entry(span.span.table).or_default().insert(*id);
    }
    for table in wanted.values() {
        let spans = by_table.remove(&table.id).unwrap_or_default();
        plan.cover(table, spans, restored.remove(&table.id).unwrap_or_default(), input, ids);
    }
    plan.settle_joins();
    for (table, spans) in by_table {
        tracing::info!(%table, spans = spans.len(), "spans of a table that is not replicated (yet) are removed");
        plan.dismiss(table, &spans);
    }
    for (_, answer) in input.answers {
        let blocks = answer.spans.iter().filter(|span| span.mode == Mode::Default);
        plan.blocks.extend(blocks.filter_map(|span| Some((span.id, span.block.clone()?))));
    }
    Ok(plan)
}

/// Spans that can be taken over as they are. Of two nodes that run one dispatcher the first one counts.
fn reported<'a>(input: &Input<'a>) -> Reported<'a> {
    let mut reported = Reported::new();
    for (node, answer) in input.answers {
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
                reported.entry(span.id).or_insert((node, span));
            } else if span.id != input.trigger {
                tracing::warn!(%node, dispatcher = %span.id, state = ?span.state, "a reported span is not taken over");
            }
        }
    }
    reported
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
    fn dismiss(&mut self, table: TableId, spans: &[(&NodeId, &BootstrapTableSpan)]) {
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

    /// Makes every key of a table somebody's. `spans`: those of the table that are planned already.
    fn cover(
        &mut self,
        table: &SourceTable,
        mut reported: Vec<(&NodeId, &BootstrapTableSpan)>,
        mut spans: BTreeSet<DispatcherId>,
        input: &Input<'_>,
        ids: &mut IdSource,
    ) {
        reported.sort_by(|(_, a), (_, b)| range_order(&a.span).cmp(&range_order(&b.span)));
        self.reject_overlaps(&mut reported);
        for (node, span) in &reported {
            self.spans.entry(span.id).or_insert_with(|| replica(span, Some(table), node));
            spans.insert(span.id);
        }
        let known = spans.iter().filter_map(|id| self.spans.get(id)).map(|span| &span.span);
        let known: Vec<&TableSpan> = known.filter(|range| range.table == table.id).collect();
        for range in holes(table.id, known) {
            let id = ids();
            let mut span = SpanReplica::absent(id, table.schema_id, range, input.start);
            span.splittable = table.splittable || input.divides_all;
            self.spans.insert(id, span);
        }
    }

    /// Of two spans that share keys the later one is temporary, unless something explains them.
    fn reject_overlaps(&mut self, reported: &mut [(&NodeId, &BootstrapTableSpan)]) {
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
        for span in self.spans.into_values() {
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
