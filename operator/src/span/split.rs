//! Divides a span.

use heartbeatpb::{DispatcherId, NodeId, OperatorType, TableSpan, TableSpanStatus};
use replica::{SpanReplica, is_terminal};

use crate::operator::{Action, Kind, Operator};

/// Stops a span's dispatcher, then puts several spans in its place (scheduling §5.6).
///
/// ```text
/// Stopping --terminal from origin--> Done (replaced by the parts)
/// Stopping --origin gone-----------> Done (released whole)
/// Stopping --cancelled-------------> Done (released whole: a removal takes over)
/// ```
#[derive(Debug)]
pub struct SplitSpan {
    span: DispatcherId,
    range: TableSpan,
    origin: NodeId,
    parts: Vec<(DispatcherId, TableSpan)>,
    nodes: Vec<NodeId>,
    done: bool,
}

impl SplitSpan {
    /// Divides `span`, which `origin` must run, into `parts`: fresh ids with the ranges, in order. With a node for
    /// each part they go there; otherwise whoever places absent spans finds them. Parts that are not exactly the
    /// span are refused when they are put in its place: then it is released whole.
    #[must_use]
    pub fn new(
        span: &SpanReplica,
        origin: NodeId,
        parts: Vec<(DispatcherId, TableSpan)>,
        nodes: Vec<NodeId>,
    ) -> Self {
        Self { span: span.id, range: span.span.clone(), origin, parts, nodes, done: false }
    }

    fn release(&mut self, out: &mut Vec<Action>) {
        if !self.done {
            self.done = true;
            out.push(Action::Release { span: self.span });
        }
    }
}

impl Operator for SplitSpan {
    fn span(&self) -> DispatcherId {
        self.span
    }

    fn kind(&self) -> Kind {
        Kind::Split
    }

    fn affected_nodes(&self) -> Vec<NodeId> {
        vec![self.origin.clone()]
    }

    fn occupied_nodes(&self) -> Vec<NodeId> {
        let mut nodes = self.nodes.clone();
        nodes.push(self.origin.clone());
        nodes.sort();
        nodes.dedup();
        nodes
    }

    fn holds_checkpoint(&self) -> bool {
        true
    }

    fn takes_from(&self) -> Option<&NodeId> {
        Some(&self.origin)
    }

    fn start(&mut self, out: &mut Vec<Action>) {
        out.push(Action::Scheduling { span: self.span });
        self.resend(out);
    }

    fn resend(&self, out: &mut Vec<Action>) {
        if !self.done {
            out.push(Action::Remove {
                span: self.span,
                range: self.range.clone(),
                on: self.origin.clone(),
                operator: OperatorType::Split,
            });
        }
    }

    fn on_status(&mut self, from: &NodeId, status: &TableSpanStatus, out: &mut Vec<Action>) {
        if !self.done && *from == self.origin && is_terminal(status.state) {
            self.done = true;
            out.push(Action::Observe(status.clone()));
            out.push(Action::Replace {
                span: self.span,
                parts: std::mem::take(&mut self.parts),
                nodes: std::mem::take(&mut self.nodes),
            });
        }
    }

    fn on_node_removed(&mut self, node: &NodeId, out: &mut Vec<Action>) {
        if *node == self.origin {
            self.release(out);
        }
    }

    fn on_cancelled(&mut self, out: &mut Vec<Action>) {
        self.release(out);
    }

    fn is_finished(&self) -> bool {
        self.done
    }
}
