//! What keeps the checkpoint where it is: the first thing to look at when a changefeed does not get on.
//!
//! Read-only, and made when somebody asks: it visits the spans of one node, or all of them.

use std::time::{Duration, Instant};

use heartbeatpb::{DispatcherId, NodeId, TableId, Ts};
use operator::Kind;
use replica::{SpanReplica, Standing};

use super::Core;

/// A checkpoint that did not move for this long is worth a warning, once in so long.
pub(crate) const STANDSTILL: Duration = Duration::from_secs(30);
/// A checkpoint that is no further behind than this is where the log is, which says so every two seconds.
const UP_TO_DATE: Duration = Duration::from_secs(5);
/// Nodes that are named; more of them are not read anyway.
const NAMED: usize = 5;

/// Why a changefeed's checkpoint is where it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Standstill {
    /// The checkpoint.
    pub checkpoint: Ts,
    /// For how long it has not moved.
    pub lasts: Duration,
    /// What holds it.
    pub holder: Holder,
}

/// What holds a checkpoint.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Holder {
    /// Nodes that have not answered the maintainer, which cannot know what runs there.
    Bootstrap {
        /// Some of them.
        nodes: Vec<NodeId>,
    },
    /// The log reader has not started, so the tables are not known.
    Upstream,
    /// Nodes are gone, and the downstream has not refused yet what they may still write. Their spans wait for that.
    Fence {
        /// Some of them; none when it is not known who may still write, as before a take-over.
        nodes: Vec<NodeId>,
        /// Why it has not.
        why: Option<String>,
    },
    /// The maintainer is being removed.
    Leaving,
    /// Nodes that run spans and have not reported how far they are.
    Silent {
        /// Some of them.
        nodes: Vec<NodeId>,
    },
    /// A span that nobody runs.
    Homeless {
        /// The span.
        span: Place,
        /// What is being done about it.
        operator: Option<Kind>,
    },
    /// A span that an operator is at work with.
    Operator {
        /// The span.
        span: Place,
        /// The kind of the operator.
        operator: Kind,
    },
    /// A schema change that adds tables, until they are placed.
    Barrier {
        /// Its position.
        commit_ts: Ts,
        /// Who has yet to say something.
        waits_for: String,
    },
    /// A node whose slowest span is no further.
    Node {
        /// The node.
        node: NodeId,
        /// The span that holds it, once the node has told.
        slowest: Option<Place>,
        /// The schema change at which that span stands, and who has yet to say something about it.
        waits_at: Option<(Ts, String)>,
    },
}

/// A span, for people.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// The dispatcher.
    pub dispatcher: DispatcherId,
    /// Its table; 0 is the table trigger.
    pub table: TableId,
}

impl Holder {
    /// A short name that does not change: what holds, by kind.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Bootstrap { .. } => "bootstrap",
            Self::Upstream => "upstream",
            Self::Fence { .. } => "fence",
            Self::Leaving => "leaving",
            Self::Silent { .. } => "silent_node",
            Self::Homeless { .. } => "homeless_span",
            Self::Operator { .. } => "operator",
            Self::Barrier { .. } => "barrier",
            Self::Node { .. } => "node",
        }
    }

    /// Where it is: the node, or the first of several.
    #[must_use]
    pub fn node(&self) -> Option<&NodeId> {
        match self {
            Self::Bootstrap { nodes } | Self::Silent { nodes } | Self::Fence { nodes, .. } => nodes.first(),
            Self::Node { node, .. } => Some(node),
            Self::Upstream
            | Self::Leaving
            | Self::Homeless { .. }
            | Self::Operator { .. }
            | Self::Barrier { .. } => None,
        }
    }

    /// The span that it is about.
    #[must_use]
    pub const fn place(&self) -> Option<Place> {
        match self {
            Self::Homeless { span, .. } | Self::Operator { span, .. } => Some(*span),
            Self::Node { slowest, .. } => *slowest,
            Self::Bootstrap { .. }
            | Self::Upstream
            | Self::Fence { .. }
            | Self::Leaving
            | Self::Silent { .. }
            | Self::Barrier { .. } => None,
        }
    }
}

impl From<&SpanReplica> for Place {
    fn from(span: &SpanReplica) -> Self {
        Self { dispatcher: span.id, table: span.span.table }
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.table == TableId::DDL {
            write!(f, "the table trigger ({})", self.dispatcher)
        } else {
            write!(f, "table {} ({})", self.table, self.dispatcher)
        }
    }
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names = |nodes: &[NodeId]| nodes.iter().map(NodeId::as_str).collect::<Vec<_>>().join(", ");
        match self {
            Self::Bootstrap { nodes } => {
                write!(f, "nodes have not answered the maintainer: {}", names(nodes))
            }
            Self::Upstream => {
                f.write_str("the log reader has not started: the upstream's tables are not known")
            }
            Self::Fence { nodes, why } => {
                match nodes.as_slice() {
                    [] => f.write_str("earlier nodes may still write")?,
                    nodes => write!(f, "nodes are gone and may still write: {}", names(nodes))?,
                }
                f.write_str("; the downstream has not refused them yet")?;
                why.as_ref().map_or(Ok(()), |why| write!(f, " ({why})"))
            }
            Self::Leaving => f.write_str("the maintainer is being removed"),
            Self::Silent { nodes } => write!(f, "nodes have not reported how far they are: {}", names(nodes)),
            Self::Homeless { span, operator: None } => write!(f, "{span} runs on no node"),
            Self::Homeless { span, operator: Some(kind) } => {
                write!(f, "{span} runs on no node yet; operator {} is at work", kind.name())
            }
            Self::Operator { span, operator } => {
                write!(f, "operator {} is at work with {span}", operator.name())
            }
            Self::Barrier { commit_ts, waits_for } => {
                write!(f, "the schema change at {commit_ts} adds tables and waits for {waits_for}")
            }
            Self::Node { node, slowest: None, .. } => write!(f, "node {node} has got no further"),
            Self::Node { node, slowest: Some(span), waits_at: None } => {
                write!(f, "{span} on node {node} has got no further")
            }
            Self::Node { node, slowest: Some(span), waits_at: Some((commit_ts, waits_for)) } => {
                write!(
                    f,
                    "{span} on node {node} stands at the schema change at {commit_ts}, which waits for {waits_for}"
                )
            }
        }
    }
}

/// Since when the checkpoint is where it is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Watch {
    checkpoint: Ts,
    since: Instant,
    told: Option<Instant>,
}

impl Watch {
    pub(super) fn new(checkpoint: Ts, now: Instant) -> Self {
        Self { checkpoint, since: now, told: None }
    }
}

impl Core {
    /// Time passed: looks whether the checkpoint moved.
    pub(super) fn watch_checkpoint(&mut self, now: Instant) {
        let checkpoint = self.progress().checkpoint;
        // An upstream to which nothing happens has nothing behind the checkpoint, and nobody waits.
        let is_up_to_date = self.schedule.lag.is_some_and(|lag| lag < UP_TO_DATE);
        if checkpoint != self.watch.checkpoint || is_up_to_date {
            self.watch = Watch::new(checkpoint, now);
        }
    }

    /// What is worth a warning now: a checkpoint that has stood still for long, once in [`STANDSTILL`].
    pub(crate) fn stalled(&mut self, now: Instant) -> Option<Standstill> {
        let quiet = self.watch.told.unwrap_or(self.watch.since);
        if now.saturating_duration_since(quiet) < STANDSTILL || self.removal.is_some() {
            return None;
        }
        self.watch.told = Some(now);
        self.standstill(now)
    }

    /// What holds the checkpoint, however long it has been there. A checkpoint that moves all the time is held too: by
    /// the slowest.
    pub(crate) fn standstill(&self, now: Instant) -> Option<Standstill> {
        if self.stopped {
            return None;
        }
        let lasts = now.saturating_duration_since(self.watch.since);
        Some(Standstill { checkpoint: self.progress().checkpoint, lasts, holder: self.holder()? })
    }

    fn holder(&self) -> Option<Holder> {
        if self.removal.is_some() {
            return Some(Holder::Leaving);
        }
        if !self.initialized {
            let nodes: Vec<NodeId> =
                self.must_close().chain(self.bootstrapper.silent()).take(NAMED).cloned().collect();
            return Some(match (nodes.is_empty(), &self.tables) {
                (false, _) => Holder::Bootstrap { nodes },
                (true, Some(_)) if self.fencing.wants_sweep() => self.held_by_fence(Vec::new()),
                (true, _) => Holder::Upstream,
            });
        }
        let silent: Vec<NodeId> = self.fold.missing().take(NAMED).cloned().collect();
        if !silent.is_empty() {
            if silent.iter().all(|node| self.fencing.is_lost(node)) {
                return Some(self.held_by_fence(silent));
            }
            return Some(Holder::Silent { nodes: silent });
        }
        let slowest = self.fold.slowest();
        let (floor, barrier) = (self.placement.spans.floor(), self.barrier.floor());
        let least = [floor, barrier, slowest.map(|(_, ts)| ts)].into_iter().flatten().min()?;
        // What nobody runs comes first: as long as that is so, nodes can do nothing about it.
        if floor == Some(least)
            && let Some(holder) = self.held_by_span(least)
        {
            return Some(holder);
        }
        if barrier == Some(least) {
            let waits_for =
                self.barrier.waits_at(least).unwrap_or_else(|| "its tables to be placed".to_owned());
            return Some(Holder::Barrier { commit_ts: least, waits_for });
        }
        let (node, mark) = slowest?;
        if self.fencing.is_lost(node) {
            return Some(self.held_by_fence(vec![node.clone()]));
        }
        Some(self.held_by_node(node, mark))
    }

    fn held_by_fence(&self, nodes: Vec<NodeId>) -> Holder {
        Holder::Fence { nodes, why: self.fencing.trouble().map(str::to_owned) }
    }

    /// The span that nobody runs, or that an operator has, at the floor.
    fn held_by_span(&self, floor: Ts) -> Option<Holder> {
        let spans = &self.placement.spans;
        let kind = |span: &SpanReplica| self.placement.operators.get(span.id).map(|operator| operator.kind());
        let (standing, span) = spans.iter().find(|(standing, span)| {
            span.checkpoint == floor && (*standing != Standing::Replicating || kind(span).is_some())
        })?;
        let place = Place::from(span);
        Some(match (standing, kind(span)) {
            (Standing::Replicating, Some(operator)) => Holder::Operator { span: place, operator },
            (_, operator) => Holder::Homeless { span: place, operator },
        })
    }

    /// Nodes report single spans now and then, and how far all of theirs are all the time: the span that was last seen
    /// exactly there is the one. While the checkpoint moves there may be none.
    fn held_by_node(&self, node: &NodeId, mark: Ts) -> Holder {
        let spans = &self.placement.spans;
        let trigger = spans.trigger().filter(|trigger| trigger.node.as_ref() == Some(node));
        let slowest = spans
            .ids_by_node(node)
            .filter_map(|id| spans.get(id))
            .chain(trigger)
            .filter(|span| span.checkpoint == mark)
            .min_by_key(|span| span.id);
        let at = slowest.and_then(|span| span.block.as_ref()).map(|block| block.key.commit_ts);
        let waits_at = at.and_then(|at| Some((at, self.barrier.waits_at(at)?)));
        Holder::Node { node: node.clone(), slowest: slowest.map(Place::from), waits_at }
    }
}
