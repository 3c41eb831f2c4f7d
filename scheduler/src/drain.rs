//! Empties a node, a few spans at a time.

use std::time::{Duration, Instant};

use heartbeatpb::NodeId;
use replica::GroupIndex;

use crate::load::{Load, Loads};
use crate::view::{Decision, Scheduler, View};

/// Moves in flight from a node that is being emptied, whatever it has.
pub const MOVES_AT_LEAST: usize = 10;
/// After a node was emptied nothing is balanced for this time: what left is not to come back at once.
pub const COOLDOWN: Duration = Duration::from_secs(120);
/// Time to the next look while spans are moving.
const BUSY: Duration = Duration::from_millis(200);
/// Time to the next look when there is nothing to do.
const IDLE: Duration = Duration::from_millis(500);
/// Time to the next look when nobody could take a span.
const NOWHERE: Duration = Duration::from_secs(1);

/// Moves that may be in flight for a node with so many spans: one in a hundred, and not less than ten.
#[must_use]
pub const fn limit(spans: usize) -> usize {
    let share = spans.div_ceil(100);
    if share > MOVES_AT_LEAST { share } else { MOVES_AT_LEAST }
}

/// Moves the spans of the node that is being emptied to those that have least (scheduling §7.6). Operators of
/// others do not count against it, and what it has moved it does not move back.
#[derive(Clone, Debug)]
pub struct Drain {
    batch: usize,
    /// Moves in flight that are allowed, for the epoch of a request. Within it the number only grows.
    limit: Option<(u64, NodeId, usize)>,
}

impl Drain {
    /// A scheduler that starts at most `batch` moves at once.
    #[must_use]
    pub fn new(batch: usize) -> Self {
        Self { batch: batch.max(1), limit: None }
    }

    fn limit_for(&mut self, node: &NodeId, epoch: u64, spans: usize) -> usize {
        let known = self.limit.take().filter(|(of, target, _)| *of == epoch && target == node);
        let allowed = limit(spans).max(known.map_or(0, |(_, _, before)| before));
        self.limit = Some((epoch, node.clone(), allowed));
        allowed
    }
}

impl Scheduler for Drain {
    fn name(&self) -> &'static str {
        "drain-scheduler"
    }

    fn tick(&mut self, view: &View<'_>, out: &mut Vec<Decision>) -> Duration {
        let Some(target) = &view.draining else {
            self.limit = None;
            return IDLE;
        };
        if target.is_own {
            // The maintainer leaves first; its successor moves the spans.
            return IDLE;
        }
        let spans = view.spans.size_by_node(target.node);
        let allowed = self.limit_for(target.node, target.epoch, spans);
        let budget = allowed.saturating_sub(target.in_flight).min(self.batch);
        if budget == 0 {
            return BUSY;
        }
        let mut loads = loads(view);
        if loads.is_empty() {
            return NOWHERE;
        }
        if spans == 0 {
            return IDLE;
        }
        let free = view.spans.ids_by_node(target.node).filter(|span| !(view.is_occupied)(*span));
        for span in free.take(budget) {
            let Some(dest) = loads.place(None) else { break };
            out.push(Decision::Move { span, from: target.node.clone(), dest });
        }
        BUSY
    }
}

/// Candidates by all that they have.
pub(crate) fn loads(view: &View<'_>) -> Loads {
    let of = |(rank, node): (usize, &NodeId)| Load {
        starting: 0,
        spans: view.spans.size_by_node(node),
        rank,
        node: node.clone(),
    };
    view.candidates().enumerate().map(of).collect()
}

/// Whether balancing is to wait: while a node is being emptied, and for a while afterwards.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cooldown {
    until: Option<Instant>,
}

impl Cooldown {
    /// A node is being emptied now, or the request for it has just been withdrawn.
    pub fn start(&mut self, now: Instant) {
        self.until = Some(now + COOLDOWN);
    }

    /// Whether balancing waits.
    #[must_use]
    pub fn is_on(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| now < until)
    }
}

/// By how many spans nodes fall short of their even share, which is rounded down (scheduling §7.4). Only nodes
/// that may take work count, with what they have.
#[must_use]
pub fn shortage<'a>(group: &GroupIndex, nodes: impl Iterator<Item = &'a NodeId>) -> usize {
    let counts: Vec<usize> = nodes.map(|node| group.on_node(node).spans).collect();
    let share = counts.iter().sum::<usize>().checked_div(counts.len()).unwrap_or(0);
    counts.into_iter().map(|count| share.saturating_sub(count)).sum()
}
