//! Takes a span away from the node that runs it, for good.

use heartbeatpb::{ComponentState, DispatcherId, NodeId, OperatorType, TableSpanStatus};

use crate::{Action, Operator};

/// Removes a span's dispatcher from `origin`. The span has left the desired state already, so its end needs no
/// further action (spec/scheduling.md §5, remove).
#[derive(Debug)]
pub struct RemoveSpan {
    span: DispatcherId,
    origin: NodeId,
    done: bool,
}

impl RemoveSpan {
    /// Removes `span` from `origin`.
    #[must_use]
    pub fn new(span: DispatcherId, origin: NodeId) -> Self {
        Self { span, origin, done: false }
    }
}

impl Operator for RemoveSpan {
    fn span(&self) -> DispatcherId {
        self.span
    }

    fn kind(&self) -> OperatorType {
        OperatorType::Remove
    }

    fn start(&mut self, out: &mut Vec<Action>) {
        self.resend(out);
    }

    fn on_status(&mut self, from: &NodeId, status: &TableSpanStatus, _out: &mut Vec<Action>) {
        let ended = matches!(status.state, ComponentState::Stopped | ComponentState::Removed);
        self.done |= *from == self.origin && ended;
    }

    fn on_node_removed(&mut self, node: &NodeId, _out: &mut Vec<Action>) {
        self.done |= *node == self.origin;
    }

    fn resend(&self, out: &mut Vec<Action>) {
        if !self.done {
            out.push(Action::Remove {
                span: self.span,
                on: self.origin.clone(),
                operator: OperatorType::Remove,
            });
        }
    }

    fn is_finished(&self) -> bool {
        self.done
    }

    fn holds_checkpoint(&self) -> bool {
        false
    }
}
