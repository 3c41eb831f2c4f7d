//! Merges that nodes remember: which go on, which are over, and what becomes of those that cannot go on
//! (maintainer §8.6).
//!
//! A merge has happened once its target initialises: from then on the target has the keys, before that the sources
//! have them.

use std::collections::{BTreeMap, BTreeSet};

use heartbeatpb::{
    BootstrapTableSpan, ComponentState, DispatcherId, MergeDispatcherRequest, Mode, NodeId, OperatorType,
    TableId, TableSpan,
};
use operator::span::Afterwards;
use replica::SpanReplica;

use super::{Plan, Reported, Restored, replica};
use crate::upstream::SourceTable;

/// A merge that goes on.
#[derive(Debug)]
pub(super) struct Join {
    pub(super) node: NodeId,
    /// In the order of their keys.
    pub(super) sources: Vec<DispatcherId>,
    pub(super) target: SpanReplica,
    /// Whether the node has a dispatcher for the target.
    reported: bool,
}

/// Whether a dispatcher in this state has taken the keys of its sources.
fn has_taken_over(state: ComponentState) -> bool {
    matches!(state, ComponentState::Initializing | ComponentState::Working)
}

impl Plan {
    /// Decides about a merge that `node` remembers. Spans that have lost are taken out of `reported`.
    pub(super) fn judge(
        &mut self,
        node: &NodeId,
        request: &MergeDispatcherRequest,
        reported: &mut Reported<'_>,
        wanted: &BTreeMap<TableId, &SourceTable>,
    ) {
        let target = request.merged;
        let distinct: BTreeSet<DispatcherId> = request.sources.iter().copied().collect();
        if request.mode != Mode::Default
            || target.is_zero()
            || distinct.len() < 2
            || distinct.contains(&target)
        {
            return;
        }
        let here = |id: &DispatcherId| -> Option<BootstrapTableSpan> {
            reported.get(id).filter(|(reporter, _)| *reporter == node).map(|(_, span)| (*span).clone())
        };
        let joined = here(&target);
        let mut sources: Vec<BootstrapTableSpan> = distinct.iter().filter_map(here).collect();
        let gone = |span: &BootstrapTableSpan| !wanted.contains_key(&span.span.table);
        if joined.iter().chain(&sources).any(gone) {
            // Their nodes are told to remove them when they next report that they work.
            return;
        }
        let conflict = distinct.iter().chain([&target]).any(|id| self.operators.contains_key(id));
        let over = joined.as_ref().is_some_and(|span| span.state == ComponentState::Working);
        sources.sort_by(|a, b| a.span.cmp(&b.span));
        let union = union(&sources).filter(|_| sources.len() == distinct.len());
        let fits = joined.as_ref().is_none_or(|span| Some(&span.span) == union.as_ref());
        let goes_on = union.filter(|_| fits && !conflict && !over);
        let table = goes_on.as_ref().and_then(|range| wanted.get(&range.table).copied());
        match goes_on.zip(table) {
            Some((range, table)) => {
                let span = match &joined {
                    Some(span) => replica(span, Some(table), node),
                    None => unborn(target, range, &sources, table),
                };
                reported.remove(&target);
                let sources = sources.iter().map(|span| span.id).collect();
                let (node, reported) = (node.clone(), joined.is_some());
                self.joins.push(Join { node, sources, target: span, reported });
            }
            None => self.choose(node, joined.as_ref(), &distinct, reported, wanted),
        }
    }

    /// A merge cannot go on, or is over: either its target or its sources stay.
    fn choose(
        &mut self,
        node: &NodeId,
        joined: Option<&BootstrapTableSpan>,
        sources: &BTreeSet<DispatcherId>,
        reported: &mut Reported<'_>,
        wanted: &BTreeMap<TableId, &SourceTable>,
    ) {
        let Some(target) = joined else { return };
        if has_taken_over(target.state) && !self.operators.contains_key(&target.id) {
            for source in sources {
                self.drop_source(node, *source, reported);
            }
        } else if !self.operators.contains_key(&target.id) {
            self.make_temporary(node, replica(target, wanted.get(&target.span.table).copied(), node));
        }
    }

    /// The target has the source's keys. What is on its way with the source must not bring it back.
    fn drop_source(&mut self, node: &NodeId, source: DispatcherId, reported: &mut Reported<'_>) {
        if reported.get(&source).is_some_and(|(reporter, _)| *reporter == node) {
            reported.remove(&source);
        }
        match self.operators.get_mut(&source) {
            Some(Restored::Remove { afterwards, .. }) => *afterwards = Afterwards::Forget,
            Some(Restored::Add { .. }) => {
                self.operators.remove(&source);
                self.spans.remove(&source);
            }
            None => {}
        }
    }

    /// The span covers its keys until its dispatcher is known to be gone.
    fn make_temporary(&mut self, node: &NodeId, span: SpanReplica) {
        tracing::info!(%node, dispatcher = %span.id, "the target of a merge that does not go on is removed");
        let (intent, afterwards) = (OperatorType::Remove, Afterwards::Forget);
        self.operators.insert(span.id, Restored::Remove { from: node.clone(), intent, afterwards });
        self.spans.insert(span.id, span);
    }

    /// Keeps the merges whose sources are still what they were judged to be.
    pub(super) fn settle_joins(&mut self) {
        if !self.joins.is_empty() {
            let adopted = std::mem::take(&mut self.adopted);
            self.spans.extend(adopted.into_iter().map(|span| (span.id, span)));
        }
        for join in std::mem::take(&mut self.joins) {
            let whole = join.sources.iter().all(|source| {
                !self.operators.contains_key(source)
                    && self.spans.get(source).is_some_and(|span| span.node.as_ref() == Some(&join.node))
            });
            if whole {
                self.joins.push(join);
            } else if join.reported {
                self.make_temporary(&join.node, join.target);
            }
        }
    }
}

/// The keys of spans that follow each other; `None` when they do not.
fn union(sources: &[BootstrapTableSpan]) -> Option<TableSpan> {
    let (first, last) = (sources.first()?, sources.last()?);
    let together = sources.windows(2).all(|pair| pair[0].span.is_followed_by(&pair[1].span));
    together.then(|| TableSpan { end: last.span.end.clone(), ..first.span.clone() })
}

/// A target that its node has not begun with.
fn unborn(
    id: DispatcherId,
    range: TableSpan,
    sources: &[BootstrapTableSpan],
    table: &SourceTable,
) -> SpanReplica {
    let checkpoint = sources.iter().map(|span| span.checkpoint).min().unwrap_or_default();
    let mut span = SpanReplica::absent(id, table.schema_id, range, checkpoint);
    span.splittable = true;
    span.state = ComponentState::Preparing;
    span
}
