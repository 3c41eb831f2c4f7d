//! What people ask of a changefeed's placement: each wish is begun once and watched until it has come true.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use heartbeatpb::{DispatcherId, NodeId, OperatorType, TableId};
use operator::span::{AddSpan, MoveSpan};
use operator::{Controller, Operator};
use replica::{SpanReplica, Standing};
use scheduler::MAX_RANGES;

use super::planning::{Purpose, Wanted};
use super::{Core, Effect};
use crate::placements::{Answer, PlacementError, Wish};

/// Wishes that may be watched at once: each of them is somebody who waits.
const WISHES: usize = 256;
/// A move that takes longer is no longer waited for.
const MOVE_PATIENCE: Duration = Duration::from_secs(60);
/// A division that takes longer is no longer waited for: it asks the upstream first.
const SPLIT_PATIENCE: Duration = Duration::from_secs(45);
/// A merge may wait for others, then move a part, then join.
const MERGE_PATIENCE: Duration = Duration::from_secs(120);

/// A wish that was begun.
pub(super) struct Watched {
    ticket: u64,
    table: TableId,
    until: Instant,
    step: Step,
}

/// What a wish waits for.
enum Step {
    /// The spans are to run on a node.
    Moving { spans: Vec<DispatcherId>, to: NodeId },
    /// The span is to be replaced by its parts.
    Splitting { span: DispatcherId },
    /// Two neighbours are to be found, or brought, together.
    Pairing,
    /// A span is to take the place of its sources.
    Merging { target: DispatcherId },
}

/// How far a wish is.
enum Outcome {
    Waits(Step),
    Over(Answer),
}

type Progress = Result<Outcome, PlacementError>;

impl Core {
    /// Somebody wishes for something. Answered now or later, by [`Effect::Answer`].
    pub(crate) fn on_wish(&mut self, ticket: u64, wish: Wish, now: Instant, out: &mut Vec<Effect>) {
        match self.begin(ticket, &wish, now) {
            Ok(Outcome::Over(answer)) => out.push(Effect::Answer(ticket, Ok(answer))),
            Err(error) => out.push(Effect::Answer(ticket, Err(error))),
            // What was begun goes on; nobody is told how it ends.
            Ok(Outcome::Waits(_)) if self.wishes.len() >= WISHES => {
                out.push(Effect::Answer(ticket, Err(PlacementError::Busy)));
            }
            Ok(Outcome::Waits(step)) => {
                let patience = match &step {
                    Step::Moving { .. } => MOVE_PATIENCE,
                    Step::Splitting { .. } => SPLIT_PATIENCE,
                    Step::Pairing | Step::Merging { .. } => MERGE_PATIENCE,
                };
                self.wishes.push(Watched { ticket, table: wish.table(), until: now + patience, step });
            }
        }
        self.after_change(now, out);
    }

    fn begin(&mut self, ticket: u64, wish: &Wish, now: Instant) -> Progress {
        // What holds the checkpoint can be said at any time.
        let only_asks = *wish == Wish::Standstill;
        if !only_asks && (self.removal.is_some() || self.stopped) {
            return Err(PlacementError::Leaving);
        }
        if !only_asks && !self.initialized {
            return Err(PlacementError::NotReady);
        }
        match wish {
            Wish::Standstill => Ok(Outcome::Over(Answer::Standstill(self.standstill(now).map(Box::new)))),
            Wish::Count => Ok(Outcome::Over(Answer::Count(self.placement.spans.task_size()))),
            Wish::Tables => Ok(Outcome::Over(Answer::Tables(self.tables_by_node()))),
            Wish::Move { table, to, wait } => {
                let spans = self.spans_of(*table)?;
                if spans.len() > 1 {
                    return Err(PlacementError::Divided { table: *table, spans: spans.len() });
                }
                self.begin_moves(*table, &spans, to, *wait, now)
            }
            Wish::MoveParts { table, to, wait } => {
                let spans = self.spans_of(*table)?;
                self.begin_moves(*table, &spans, to, *wait, now)
            }
            Wish::Split { table, pieces } => self.begin_split(ticket, *table, *pieces),
            Wish::Merge { table } => {
                self.spans_of(*table)?;
                self.pair(*table, now)
            }
        }
    }

    /// Looks how far the wishes are, and goes on with them.
    pub(super) fn watch_wishes(&mut self, now: Instant, out: &mut Vec<Effect>) {
        for mut watched in std::mem::take(&mut self.wishes) {
            match self.advance(&watched, now) {
                Ok(Outcome::Over(answer)) => out.push(Effect::Answer(watched.ticket, Ok(answer))),
                Err(error) => out.push(Effect::Answer(watched.ticket, Err(error))),
                Ok(Outcome::Waits(_)) if now >= watched.until => {
                    out.push(Effect::Answer(watched.ticket, Err(PlacementError::Timeout)));
                }
                Ok(Outcome::Waits(step)) => {
                    watched.step = step;
                    self.wishes.push(watched);
                }
            }
        }
    }

    /// The maintainer leaves: nobody waits in vain.
    pub(super) fn abandon_wishes(&mut self, out: &mut Vec<Effect>) {
        for watched in std::mem::take(&mut self.wishes) {
            out.push(Effect::Answer(watched.ticket, Err(PlacementError::Leaving)));
        }
    }

    /// What was planned for a wish cannot be done.
    pub(super) fn fail_wish(&mut self, ticket: u64, error: PlacementError, out: &mut Vec<Effect>) {
        let before = self.wishes.len();
        self.wishes.retain(|watched| watched.ticket != ticket);
        if self.wishes.len() < before {
            out.push(Effect::Answer(ticket, Err(error)));
        }
    }

    fn advance(&mut self, watched: &Watched, now: Instant) -> Progress {
        match &watched.step {
            Step::Moving { spans, to } => {
                let mut waits = false;
                for span in spans {
                    waits |= self.is_under_way(*span, to)?;
                }
                let step = Step::Moving { spans: spans.clone(), to: to.clone() };
                Ok(if waits { Outcome::Waits(step) } else { Outcome::Over(Answer::Done) })
            }
            Step::Splitting { span } => Ok(self.look_at_split(watched.table, *span)?),
            Step::Pairing => self.pair(watched.table, now),
            Step::Merging { target } => match self.placement.spans.standing(*target) {
                Some(Standing::Replicating) => Ok(Outcome::Over(Answer::Done)),
                Some(Standing::Absent | Standing::Scheduling) => {
                    Ok(Outcome::Waits(Step::Merging { target: *target }))
                }
                None => Err(PlacementError::Interrupted),
            },
        }
    }

    /// Spans of a table in the order of their keys.
    fn spans_of(&self, table: TableId) -> Result<Vec<SpanReplica>, PlacementError> {
        if table == TableId::DDL {
            return Err(PlacementError::NotMovable);
        }
        let mut spans: Vec<SpanReplica> = self.placement.spans.by_table(table).cloned().collect();
        spans.sort_by(|a, b| a.span.cmp(&b.span));
        if spans.is_empty() { Err(PlacementError::UnknownTable(table)) } else { Ok(spans) }
    }

    fn tables_by_node(&self) -> BTreeMap<NodeId, Vec<TableId>> {
        let mut tables: BTreeMap<NodeId, BTreeSet<TableId>> = BTreeMap::new();
        for span in self.placement.spans.all() {
            if let Some(node) = &span.node {
                tables.entry(node.clone()).or_default().insert(span.span.table);
            }
        }
        tables.into_iter().map(|(node, tables)| (node, tables.into_iter().collect())).collect()
    }

    fn begin_moves(
        &mut self,
        table: TableId,
        spans: &[SpanReplica],
        to: &NodeId,
        wait: bool,
        now: Instant,
    ) -> Progress {
        if !self.usable_nodes().contains(to) {
            return Err(PlacementError::NodeNotReady(to.clone()));
        }
        // All or nothing: somebody else's operator is not interrupted.
        let mut operators: Vec<Box<dyn Operator>> = Vec::new();
        for span in spans {
            match (self.placement.operators.get(span.id), &span.node) {
                (Some(operator), _) if operator.brings_to() == Some(to) => {}
                (Some(operator), _) => {
                    return Err(PlacementError::Occupied { table, kind: operator.kind().name() });
                }
                (None, Some(node)) if node == to => {}
                (None, Some(node)) => {
                    operators.push(Box::new(MoveSpan::new(span, node.clone(), to.clone())));
                }
                (None, None) => {
                    operators.push(Box::new(AddSpan::new(span.id, to.clone(), OperatorType::Add)))
                }
            }
        }
        self.placement.drive(now, |controller, cx| {
            for operator in operators {
                controller.add(operator, cx);
            }
        });
        let step = Step::Moving { spans: spans.iter().map(|span| span.id).collect(), to: to.clone() };
        if !wait {
            return Ok(Outcome::Over(Answer::Done));
        }
        self.advance(&Watched { ticket: 0, table, until: now, step }, now)
    }

    /// Whether a span is still on its way to a node.
    fn is_under_way(&self, span: DispatcherId, to: &NodeId) -> Result<bool, PlacementError> {
        let spans = &self.placement.spans;
        let replica = spans.get(span).ok_or(PlacementError::Interrupted)?;
        let settled = spans.is_replicating(span) && !self.placement.operators.contains(span);
        if settled && replica.node.as_ref() != Some(to) {
            return Err(PlacementError::Interrupted);
        }
        Ok(!settled)
    }

    fn begin_split(&mut self, ticket: u64, table: TableId, pieces: Option<usize>) -> Progress {
        let spans = self.spans_of(table)?;
        if !self.across_nodes {
            return Err(PlacementError::WholeOnly);
        }
        let [span] = spans.as_slice() else { return Ok(Outcome::Over(Answer::Done)) };
        if let Some(kind) = kind_of(&self.placement.operators, span.id) {
            return Err(PlacementError::Occupied { table, kind });
        }
        let Some(origin) = span.node.clone().filter(|_| self.placement.spans.is_replicating(span.id)) else {
            return Err(PlacementError::NotReady);
        };
        let pieces = pieces.unwrap_or_else(|| self.usable_nodes().len()).clamp(2, MAX_RANGES);
        let wanted = Wanted {
            span: span.id,
            range: span.span.clone(),
            origin,
            pieces,
            nodes: Vec::new(),
            purpose: Purpose::Wish(ticket),
        };
        if !self.planning.want(wanted) {
            return Err(PlacementError::Busy);
        }
        Ok(Outcome::Waits(Step::Splitting { span: span.id }))
    }

    fn look_at_split(&self, table: TableId, span: DispatcherId) -> Progress {
        let spans = &self.placement.spans;
        if spans.get(span).is_none() {
            let parts: Vec<DispatcherId> = spans.by_table(table).map(|span| span.id).collect();
            return match parts.len() {
                0 | 1 => Err(PlacementError::Interrupted),
                _ if parts.iter().all(|part| spans.is_replicating(*part)) => Ok(Outcome::Over(Answer::Done)),
                _ => Ok(Outcome::Waits(Step::Splitting { span })),
            };
        }
        let goes_on = self.planning.reserves(span) || self.placement.operators.contains(span);
        if goes_on { Ok(Outcome::Waits(Step::Splitting { span })) } else { Err(PlacementError::Interrupted) }
    }

    /// Joins the first two neighbours that run on one node; without such a pair, brings one together.
    fn pair(&mut self, table: TableId, now: Instant) -> Progress {
        let spans = self.spans_of(table)?;
        if spans.len() < 2 {
            return Ok(Outcome::Over(Answer::Done));
        }
        let free =
            |span: &SpanReplica| self.placement.spans.is_replicating(span.id) && !self.is_occupied(span.id);
        let pairs = || {
            let follow = |pair: &&[SpanReplica]| pair[0].span.is_followed_by(&pair[1].span);
            spans.windows(2).filter(follow).filter(|pair| pair.iter().all(free))
        };
        if let Some(pair) = pairs().find(|pair| pair[0].node == pair[1].node) {
            let sources = [pair[0].id, pair[1].id];
            let target = (self.placement.ids)();
            let begun = self.placement.drive(now, |operators, cx| operators.merge(&sources, target, cx));
            let step = if begun { Step::Merging { target } } else { Step::Pairing };
            return Ok(Outcome::Waits(step));
        }
        // One after the other: whoever is on its way may come to be a neighbour.
        let quiet = spans.iter().all(free);
        let apart = pairs().next().filter(|_| quiet);
        if let Some((origin, dest, span)) = apart
            .and_then(|pair| Some((pair[1].node.clone()?, pair[0].node.clone()?, &pair[1])))
            .filter(|(_, dest, _)| self.usable_nodes().contains(dest))
        {
            let operator = MoveSpan::new(span, origin, dest);
            self.placement.drive(now, |operators, cx| operators.add(Box::new(operator), cx));
        }
        Ok(Outcome::Waits(Step::Pairing))
    }
}

fn kind_of(operators: &Controller, span: DispatcherId) -> Option<&'static str> {
    operators.get(span).map(|operator| operator.kind().name())
}
