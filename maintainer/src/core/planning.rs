//! Asking the upstream where tables can be divided, one question at a time, and what its answers lead to.
//!
//! The upstream answers later: what it is asked for is only a reservation until then, and everything is looked at
//! anew when the answer is there. Without an answer, or with one that does not fit, a table stays as it is.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use heartbeatpb::{DispatcherId, NodeId, TableSpan};
use operator::span::SplitSpan;
use scheduler::{BySize, Method, Unit, by_size, by_traffic};

use super::{Core, Effect};
use crate::placements::PlacementError;
use crate::upstream::SplitPoints;

/// Questions that may wait. What does not fit is found again at the next look.
const WAITING: usize = 1_024;
/// A span that could not be divided is not tried again for this time.
const REFUSAL: Duration = Duration::from_secs(300);
/// An answer that is not there by then is not waited for; its task has a deadline of its own before.
const GIVE_UP: Duration = Duration::from_secs(30);

/// What a question is asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Purpose {
    /// Somebody wishes for the division.
    Wish(u64),
    /// The load asks for it.
    Load(Method),
    /// How large the span is.
    Estimate,
}

/// A question.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Wanted {
    pub(super) span: DispatcherId,
    pub(super) range: TableSpan,
    /// The node that runs it.
    pub(super) origin: NodeId,
    pub(super) pieces: usize,
    /// A node for each part, or none.
    pub(super) nodes: Vec<NodeId>,
    pub(super) purpose: Purpose,
}

/// Questions that wait, and the one that was asked.
#[derive(Debug, Default)]
pub(super) struct Planning {
    sequence: u64,
    asked: Option<(u64, Instant, Wanted)>,
    waiting: VecDeque<Wanted>,
    /// Spans that are to be divided.
    reserved: BTreeSet<DispatcherId>,
    refused: BTreeMap<DispatcherId, Instant>,
}

impl Planning {
    /// Puts a question in line. Says whether it is there: a span is reserved once, and the line is bounded.
    pub(super) fn want(&mut self, wanted: Wanted) -> bool {
        if self.waiting.len() >= WAITING {
            return false;
        }
        match wanted.purpose {
            Purpose::Estimate => self.waiting.push_back(wanted),
            Purpose::Wish(_) | Purpose::Load(_) if !self.reserved.insert(wanted.span) => return false,
            Purpose::Wish(_) => self.waiting.push_front(wanted),
            Purpose::Load(_) => self.waiting.push_back(wanted),
        }
        true
    }

    /// Whether a span is to be divided.
    pub(super) fn reserves(&self, span: DispatcherId) -> bool {
        self.reserved.contains(&span)
    }

    /// Whether nothing was asked and nothing waits.
    pub(super) fn is_idle(&self) -> bool {
        self.asked.is_none() && self.waiting.is_empty()
    }

    /// Whether a division was tried in vain only lately.
    pub(super) fn is_refused(&self, span: DispatcherId, now: Instant) -> bool {
        self.refused.get(&span).is_some_and(|until| now < *until)
    }

    fn refuse(&mut self, span: DispatcherId, now: Instant) {
        self.refused.retain(|_, until| now < *until);
        self.refused.insert(span, now + REFUSAL);
    }

    /// The next question, when none is open.
    fn next(&mut self, now: Instant) -> Option<(u64, &Wanted)> {
        if self.asked.is_some() {
            return None;
        }
        let wanted = self.waiting.pop_front()?;
        self.sequence += 1;
        let (sequence, _, wanted) = &*self.asked.insert((self.sequence, now, wanted));
        Some((*sequence, wanted))
    }

    /// The question that an answer is for.
    fn answered(&mut self, question: u64) -> Option<Wanted> {
        let (_, _, wanted) = self.asked.take_if(|(asked, ..)| *asked == question)?;
        if wanted.purpose != Purpose::Estimate {
            self.reserved.remove(&wanted.span);
        }
        Some(wanted)
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        let sequence = self.sequence;
        *self = Self { sequence, ..Self::default() };
    }
}

impl Core {
    /// Whether a span is in somebody's hands: an operator's, or a planned division's.
    pub(super) fn is_occupied(&self, span: DispatcherId) -> bool {
        self.placement.operators.contains(span) || self.planning.reserves(span)
    }

    /// Asks the next question.
    pub(super) fn ask_points(&mut self, now: Instant, out: &mut Vec<Effect>) {
        let overdue = self.planning.asked.as_ref().map(|(question, at, _)| (*question, *at));
        if let Some((question, at)) = overdue.filter(|(_, at)| now.saturating_duration_since(*at) >= GIVE_UP)
        {
            tracing::debug!(changefeedID = %self.id, ?at, "the upstream did not say where to divide a table");
            self.on_points(question, Err("it did not answer".to_owned()), now, out);
        }
        self.next_size();
        if let Some((question, wanted)) = self.planning.next(now) {
            let (span, pieces) = (wanted.range.clone(), wanted.pieces);
            out.push(Effect::Points { question, span, pieces });
        }
    }

    /// The upstream says where a span can be divided, or cannot say. An answer to an older question is ignored.
    pub(crate) fn on_points(
        &mut self,
        question: u64,
        answer: Result<SplitPoints, String>,
        now: Instant,
        out: &mut Vec<Effect>,
    ) {
        let Some(wanted) = self.planning.answered(question) else { return };
        if self.removal.is_some() || self.stopped {
            return;
        }
        match (wanted.purpose, answer) {
            (Purpose::Estimate, Ok(points)) => {
                if let Some(units) = points.units() {
                    self.measured(&wanted, units, now);
                }
            }
            (Purpose::Estimate, Err(problem)) => {
                tracing::debug!(changefeedID = %self.id, table = %wanted.range.table, problem, "no estimate of a table's size");
            }
            (Purpose::Load(method), Ok(points)) => {
                if self.divide(&wanted, method, &points, now).is_err() {
                    self.planning.refuse(wanted.span, now);
                }
            }
            (Purpose::Load(_), Err(problem)) => {
                tracing::info!(changefeedID = %self.id, table = %wanted.range.table, problem, "a table is not divided");
                self.planning.refuse(wanted.span, now);
            }
            (Purpose::Wish(ticket), Ok(points)) => {
                if let Err(error) = self.divide(&wanted, Method::BySize, &points, now) {
                    self.fail_wish(ticket, error, out);
                }
            }
            (Purpose::Wish(ticket), Err(problem)) => {
                self.fail_wish(ticket, PlacementError::Upstream(problem), out);
            }
        }
        self.after_change(now, out);
    }

    /// Begins a division, if the span still stands as it did when the upstream was asked.
    fn divide(
        &mut self,
        wanted: &Wanted,
        method: Method,
        points: &SplitPoints,
        now: Instant,
    ) -> Result<(), PlacementError> {
        let spans = &self.placement.spans;
        let unchanged = |span: &replica::SpanReplica| {
            span.span == wanted.range
                && span.node.as_ref() == Some(&wanted.origin)
                && spans.is_replicating(span.id)
                && !self.placement.operators.contains(span.id)
        };
        let Some(span) = spans.get(wanted.span).filter(|span| unchanged(span)).cloned() else {
            return Err(PlacementError::Interrupted);
        };
        let units = units(&wanted.range, &points.keys);
        let ranges = match method {
            Method::BySize => by_size(&wanted.range, &units, BySize::Count(wanted.pieces.min(units.len()))),
            Method::ByTraffic => by_traffic(&wanted.range, &units, wanted.pieces),
        };
        if ranges.len() < 2 {
            return Err(PlacementError::NotDivisible(wanted.range.table));
        }
        let usable = self.usable_nodes();
        let fits =
            wanted.nodes.len() == ranges.len() && wanted.nodes.iter().all(|node| usable.contains(node));
        let nodes = if fits { wanted.nodes.clone() } else { Vec::new() };
        let parts: Vec<(DispatcherId, TableSpan)> =
            ranges.into_iter().map(|range| ((self.placement.ids)(), range)).collect();
        tracing::info!(changefeedID = %self.id, table = %wanted.range.table, dispatcher = %wanted.span,
            parts = parts.len(), "a span is divided");
        let operator = SplitSpan::new(&span, wanted.origin.clone(), parts, nodes);
        let begun = self.placement.drive(now, |operators, cx| operators.add(Box::new(operator), cx));
        if begun { Ok(()) } else { Err(PlacementError::Interrupted) }
    }
}

/// The pieces between the keys. Nothing is known of the traffic of each. Keys that do not divide the range give
/// pieces that are not exactly it, which leaves it whole.
fn units(range: &TableSpan, keys: &[Vec<u8>]) -> Vec<Unit> {
    let starts = std::iter::once(&range.start).chain(keys);
    let ends = keys.iter().chain([&range.end]);
    let unit = |(start, end): (&Vec<u8>, &Vec<u8>)| Unit {
        span: TableSpan { start: start.clone(), end: end.clone(), ..range.clone() },
        traffic: 0,
    };
    starts.zip(ends).map(unit).collect()
}
