//! What an operator is.

use std::fmt::Debug;

use heartbeatpb::{DispatcherId, NodeId, OperatorType, TableSpanStatus};

/// An effect that the owner of an operator performs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Action {
    /// The span belongs to a node from now on; nobody else may be asked to run it.
    Bind {
        /// The span.
        span: DispatcherId,
        /// The node.
        to: NodeId,
    },
    /// Ask a node to create the span's dispatcher.
    Create {
        /// The span.
        span: DispatcherId,
        /// The node.
        on: NodeId,
        /// The operator behind it.
        operator: OperatorType,
    },
    /// Ask a node to remove the span's dispatcher.
    Remove {
        /// The span.
        span: DispatcherId,
        /// The node.
        on: NodeId,
        /// The operator behind it.
        operator: OperatorType,
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
}

/// A change of placement of one span (spec/scheduling.md §5). Deterministic: events in, actions out.
pub trait Operator: Debug + Send {
    /// The span.
    fn span(&self) -> DispatcherId;

    /// What kind it is.
    fn kind(&self) -> OperatorType;

    /// Begins. Called once, before anything else.
    fn start(&mut self, out: &mut Vec<Action>);

    /// A node reported the span.
    fn on_status(&mut self, from: &NodeId, status: &TableSpanStatus, out: &mut Vec<Action>);

    /// A node is gone.
    fn on_node_removed(&mut self, node: &NodeId, out: &mut Vec<Action>);

    /// Says again what has not been answered.
    fn resend(&self, out: &mut Vec<Action>);

    /// Whether nothing is left to do.
    fn is_finished(&self) -> bool;

    /// Whether the changefeed's checkpoint must not pass the span's while the operator runs.
    fn holds_checkpoint(&self) -> bool;
}
