//! What an operator is.

use std::fmt::Debug;

use heartbeatpb::{DispatcherId, NodeId, OperatorType, TableSpan, TableSpanStatus};

/// A change that the owner of an operator carries out, in order.
#[derive(Clone, PartialEq, Debug)]
pub enum Action {
    /// The span belongs to a node from now on; nobody else may be asked to run it.
    Bind {
        /// The span.
        span: DispatcherId,
        /// The node.
        to: NodeId,
    },
    /// The span is on its way; its node stays.
    Scheduling {
        /// The span.
        span: DispatcherId,
    },
    /// The span's node runs it.
    Replicating {
        /// The span.
        span: DispatcherId,
    },
    /// Nobody runs the span: it is to be placed again.
    Release {
        /// The span.
        span: DispatcherId,
    },
    /// A report is to be folded into its span.
    Observe(TableSpanStatus),
    /// The span is not wanted any more. Keys of its table may have nobody who runs them now.
    Forget {
        /// The span.
        span: DispatcherId,
    },
    /// The span is gone, and others have its keys.
    Discard {
        /// The span.
        span: DispatcherId,
    },
    /// The span's node runs it as before, unless it reported meanwhile that it does not.
    Resume {
        /// The span.
        span: DispatcherId,
    },
    /// A reservation ends.
    Free {
        /// The span.
        span: DispatcherId,
    },
    /// Parts take the place of a span; those that have nodes are created there.
    Replace {
        /// The span.
        span: DispatcherId,
        /// Ids and ranges of the parts, in order.
        parts: Vec<(DispatcherId, TableSpan)>,
        /// A node for each part, or none.
        nodes: Vec<NodeId>,
    },
    /// Ask a node to join dispatchers.
    Merge {
        /// The dispatchers, in the order of their keys.
        sources: Vec<DispatcherId>,
        /// The dispatcher that they become.
        target: DispatcherId,
        /// The node.
        on: NodeId,
    },
    /// Ask a node to create the span's dispatcher.
    Create {
        /// The span.
        span: DispatcherId,
        /// The node.
        on: NodeId,
        /// The intent behind it.
        operator: OperatorType,
    },
    /// Ask a node to remove a dispatcher.
    Remove {
        /// The dispatcher.
        span: DispatcherId,
        /// Its key range.
        range: TableSpan,
        /// The node.
        on: NodeId,
        /// The intent behind it.
        operator: OperatorType,
    },
}

impl Action {
    /// Whether it is a request to a node.
    #[must_use]
    pub fn is_request(&self) -> bool {
        match self {
            Self::Create { .. } | Self::Remove { .. } | Self::Merge { .. } => true,
            Self::Bind { .. }
            | Self::Scheduling { .. }
            | Self::Replicating { .. }
            | Self::Release { .. }
            | Self::Observe(_)
            | Self::Discard { .. }
            | Self::Resume { .. }
            | Self::Free { .. }
            | Self::Replace { .. }
            | Self::Forget { .. } => false,
        }
    }
}

/// What kind an operator is; a metric label.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[non_exhaustive]
pub enum Kind {
    /// A span gets a node.
    Add,
    /// A dispatcher goes away.
    Remove,
    /// A span changes its node.
    Move,
    /// A span becomes several.
    Split,
    /// Several spans become one.
    Merge,
    /// A span is reserved for a merge.
    Occupy,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 6] = [Self::Add, Self::Remove, Self::Move, Self::Split, Self::Merge, Self::Occupy];

    /// Value of the metric label.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Remove => "remove",
            Self::Move => "move",
            Self::Split => "split",
            Self::Merge => "merge",
            Self::Occupy => "occupy",
        }
    }
}

/// A change of placement (scheduling §5). Deterministic: events in, actions out. After it is finished it
/// says nothing any more, whatever it hears.
pub trait Operator: Debug + Send {
    /// The dispatcher that it occupies: no other operator may touch it meanwhile.
    fn span(&self) -> DispatcherId;

    /// What kind it is.
    fn kind(&self) -> Kind;

    /// Nodes whose death matters; looked at once, after the start.
    fn affected_nodes(&self) -> Vec<NodeId>;

    /// Nodes that have, or may get, a dispatcher by it: none of them is empty while it runs.
    fn occupied_nodes(&self) -> Vec<NodeId> {
        self.affected_nodes()
    }

    /// Whether the changefeed's checkpoint must not pass the span's while the operator runs.
    fn holds_checkpoint(&self) -> bool;

    /// The node that a span is moving away from.
    fn moves_away_from(&self) -> Option<&NodeId> {
        None
    }

    /// The node that must have the span when the operator starts: it is the one that is told to let go.
    fn takes_from(&self) -> Option<&NodeId> {
        None
    }

    /// The node that the operator brings its span to.
    fn brings_to(&self) -> Option<&NodeId> {
        None
    }

    /// The merge that the operator reserves its span for.
    fn reserved_for(&self) -> Option<DispatcherId> {
        None
    }

    /// Begins, with the first request if there is one. Called exactly once, before anything else.
    fn start(&mut self, out: &mut Vec<Action>);

    /// Says again what has not been answered.
    fn resend(&self, out: &mut Vec<Action>);

    /// A node reported the span.
    fn on_status(&mut self, from: &NodeId, status: &TableSpanStatus, out: &mut Vec<Action>);

    /// A node is gone.
    fn on_node_removed(&mut self, node: &NodeId, out: &mut Vec<Action>);

    /// The span is being deleted, or another operator takes this one's place, in the same step. Finishes at once.
    fn on_cancelled(&mut self, out: &mut Vec<Action>);

    /// Whether nothing is left to do.
    fn is_finished(&self) -> bool;
}
