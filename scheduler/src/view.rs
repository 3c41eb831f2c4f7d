//! What a scheduler sees, and what it can decide.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::time::{Duration, Instant};

use heartbeatpb::{DispatcherId, NodeId};
use replica::SpanSet;

use crate::planner::Method;

/// The node that is being emptied.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Draining<'a> {
    /// The node.
    pub node: &'a NodeId,
    /// Epoch of the request.
    pub epoch: u64,
    /// Moves in flight that leave it, whoever began them.
    pub in_flight: usize,
    /// Whether it is the node of the maintainer.
    pub is_own: bool,
}

/// One consistent look at a changefeed; good for one tick.
#[derive(Clone, Copy)]
pub struct View<'a> {
    /// Its spans.
    pub spans: &'a SpanSet,
    /// Nodes that may take work: they live, and their dispatcher manager has answered.
    pub nodes: &'a BTreeSet<NodeId>,
    /// The node that is being emptied: it takes nothing.
    pub draining: Option<Draining<'a>>,
    /// Whether a node was emptied only lately: nothing is balanced yet.
    pub is_paused: bool,
    /// Number of operators.
    pub operators: usize,
    /// Whether an operator occupies a span.
    pub is_occupied: &'a dyn Fn(DispatcherId) -> bool,
    /// Now.
    pub now: Instant,
}

impl View<'_> {
    /// Nodes that may be given a span.
    pub fn candidates(&self) -> impl Iterator<Item = &NodeId> {
        self.nodes.iter().filter(|node| self.draining.is_none_or(|draining| draining.node != *node))
    }
}

impl Debug for View<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("View")
            .field("spans", &self.spans.len())
            .field("nodes", self.nodes)
            .field("draining", &self.draining)
            .field("operators", &self.operators)
            .finish_non_exhaustive()
    }
}

/// What should change. Its owner turns it into an operator, or finds that it cannot.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Decision {
    /// A span that nobody runs goes to a node.
    Add {
        /// The span.
        span: DispatcherId,
        /// The node.
        dest: NodeId,
    },
    /// A span that a node runs goes to another one.
    Move {
        /// The span.
        span: DispatcherId,
        /// The node that has it.
        from: NodeId,
        /// The node that is to have it.
        dest: NodeId,
    },
    /// A span becomes several. Where it is cut, and whether it can be, is for the upstream to say.
    Split {
        /// The span.
        span: DispatcherId,
        /// The node that has it.
        on: NodeId,
        /// About how many parts.
        pieces: usize,
        /// What the parts are to have in common.
        method: Method,
        /// A node for each part, used if there are as many; otherwise the parts are placed like new spans.
        nodes: Vec<NodeId>,
    },
    /// Spans that follow each other on one node become one.
    Merge {
        /// The spans, in the order of their keys.
        sources: Vec<DispatcherId>,
    },
}

/// A source of decisions. It may remember what it saw before, but holds no clock and no randomness: one sequence
/// of views gives one sequence of decisions.
pub trait Scheduler: Debug + Send {
    /// Its name in logs.
    fn name(&self) -> &'static str;

    /// Looks, decides, and says after which time it wants to look again.
    fn tick(&mut self, view: &View<'_>, out: &mut Vec<Decision>) -> Duration;
}
