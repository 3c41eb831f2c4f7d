//! Takes a dispatcher away from the node that runs it.

use heartbeatpb::{DispatcherId, NodeId, OperatorType, TableSpan, TableSpanStatus};
use replica::{SpanReplica, is_terminal};

use crate::operator::{Action, Kind, Operator};

/// What follows once the dispatcher is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Afterwards {
    /// Nothing: the span has left the desired state already.
    Nothing,
    /// The span was temporary: it leaves, and what only it covered is placed anew.
    Forget,
    /// The span is still wanted: it is placed anew.
    Release,
}

/// Removes a dispatcher from the node that it was on when the operator was built, whatever becomes of the span
/// meanwhile (scheduling §5.4).
///
/// ```text
/// Removing --Stopped or Removed from its node, or node gone--> Done (afterwards)
/// Removing --cancelled--> Done (nothing)
/// ```
#[derive(Debug)]
pub struct RemoveSpan {
    span: DispatcherId,
    range: TableSpan,
    node: NodeId,
    intent: OperatorType,
    afterwards: Afterwards,
    done: bool,
}

impl RemoveSpan {
    /// Removes the dispatcher of `span` from `node`.
    #[must_use]
    pub fn new(span: &SpanReplica, node: NodeId, intent: OperatorType, afterwards: Afterwards) -> Self {
        Self { span: span.id, range: span.span.clone(), node, intent, afterwards, done: false }
    }

    fn finish(&mut self, out: &mut Vec<Action>) {
        self.done = true;
        match self.afterwards {
            Afterwards::Nothing => {}
            Afterwards::Forget => out.push(Action::Forget { span: self.span }),
            Afterwards::Release => out.push(Action::Release { span: self.span }),
        }
    }
}

impl Operator for RemoveSpan {
    fn span(&self) -> DispatcherId {
        self.span
    }

    fn kind(&self) -> Kind {
        Kind::Remove
    }

    fn affected_nodes(&self) -> Vec<NodeId> {
        vec![self.node.clone()]
    }

    /// Once the dispatcher is gone, and before anybody else has its keys, nothing but this holds the checkpoint. A
    /// span that has left the desired state holds nothing.
    fn holds_checkpoint(&self) -> bool {
        self.afterwards != Afterwards::Nothing
    }

    fn start(&mut self, out: &mut Vec<Action>) {
        self.resend(out);
    }

    fn resend(&self, out: &mut Vec<Action>) {
        if !self.done {
            out.push(Action::Remove {
                span: self.span,
                range: self.range.clone(),
                on: self.node.clone(),
                operator: self.intent,
            });
        }
    }

    fn on_status(&mut self, from: &NodeId, status: &TableSpanStatus, out: &mut Vec<Action>) {
        if !self.done && *from == self.node && is_terminal(status.state) {
            out.push(Action::Observe(status.clone()));
            self.finish(out);
        }
    }

    fn on_node_removed(&mut self, node: &NodeId, out: &mut Vec<Action>) {
        if !self.done && *node == self.node {
            self.finish(out);
        }
    }

    fn on_cancelled(&mut self, _out: &mut Vec<Action>) {
        self.done = true;
    }

    fn is_finished(&self) -> bool {
        self.done
    }
}
