//! Takes a span from one node to another.

use heartbeatpb::{ComponentState, DispatcherId, NodeId, OperatorType, TableSpan, TableSpanStatus};
use replica::{SpanReplica, is_terminal};

use crate::operator::{Action, Kind, Operator};

/// Stops a span's dispatcher on `origin`, then creates it on `dest` (scheduling §5.5). The span keeps its id.
///
/// ```text
/// Stopping   --terminal from origin, or origin gone--> Creating (bound to dest)
/// Stopping   --dest gone-----------------------------> Abandoning: origin may still run it
/// Creating   --Working from dest---------------------> Done (replicating)
/// Creating   --dest gone-----------------------------> Done (released)
/// Abandoning --terminal from origin, or origin gone--> Done (released); a dest that came back is not used
/// ```
#[derive(Debug)]
pub struct MoveSpan {
    span: DispatcherId,
    range: TableSpan,
    origin: NodeId,
    dest: NodeId,
    phase: Phase,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Stopping,
    Creating,
    Abandoning,
    Done,
}

impl MoveSpan {
    /// Moves `span` from `origin`, which must run it, to `dest`.
    #[must_use]
    pub fn new(span: &SpanReplica, origin: NodeId, dest: NodeId) -> Self {
        let phase = if origin == dest { Phase::Done } else { Phase::Stopping };
        Self { span: span.id, range: span.span.clone(), origin, dest, phase }
    }

    /// The origin does not run the span any more.
    fn on_origin_let_go(&mut self, out: &mut Vec<Action>) {
        match self.phase {
            Phase::Stopping => {
                self.phase = Phase::Creating;
                out.push(Action::Bind { span: self.span, to: self.dest.clone() });
                self.resend(out);
            }
            Phase::Abandoning => self.release(out),
            Phase::Creating | Phase::Done => {}
        }
    }

    fn release(&mut self, out: &mut Vec<Action>) {
        self.phase = Phase::Done;
        out.push(Action::Release { span: self.span });
    }
}

impl Operator for MoveSpan {
    fn span(&self) -> DispatcherId {
        self.span
    }

    fn kind(&self) -> Kind {
        Kind::Move
    }

    fn affected_nodes(&self) -> Vec<NodeId> {
        vec![self.origin.clone(), self.dest.clone()]
    }

    fn holds_checkpoint(&self) -> bool {
        true
    }

    fn moves_away_from(&self) -> Option<&NodeId> {
        Some(&self.origin)
    }

    fn takes_from(&self) -> Option<&NodeId> {
        Some(&self.origin)
    }

    fn brings_to(&self) -> Option<&NodeId> {
        (self.phase != Phase::Abandoning).then_some(&self.dest)
    }

    fn start(&mut self, out: &mut Vec<Action>) {
        if self.phase == Phase::Stopping {
            out.push(Action::Scheduling { span: self.span });
            self.resend(out);
            if !heartbeatpb::Rule::OriginFirst.holds() {
                self.on_origin_let_go(out);
            }
        }
    }

    fn resend(&self, out: &mut Vec<Action>) {
        match self.phase {
            Phase::Stopping | Phase::Abandoning => out.push(Action::Remove {
                span: self.span,
                range: self.range.clone(),
                on: self.origin.clone(),
                operator: OperatorType::Move,
            }),
            Phase::Creating => out.push(Action::Create {
                span: self.span,
                on: self.dest.clone(),
                operator: OperatorType::Move,
            }),
            Phase::Done => {}
        }
    }

    fn on_status(&mut self, from: &NodeId, status: &TableSpanStatus, out: &mut Vec<Action>) {
        match self.phase {
            Phase::Stopping | Phase::Abandoning => {
                if *from == self.origin && is_terminal(status.state) {
                    // The last checkpoint is the largest one; after the rebind nobody would take it from origin.
                    out.push(Action::Observe(status.clone()));
                    self.on_origin_let_go(out);
                }
            }
            Phase::Creating => {
                if *from == self.dest && status.state == ComponentState::Working {
                    self.phase = Phase::Done;
                    out.push(Action::Replicating { span: self.span });
                }
            }
            Phase::Done => {}
        }
    }

    fn on_node_removed(&mut self, node: &NodeId, out: &mut Vec<Action>) {
        if *node == self.origin {
            self.on_origin_let_go(out);
        } else if *node == self.dest {
            match self.phase {
                Phase::Stopping => self.phase = Phase::Abandoning,
                Phase::Creating => self.release(out),
                Phase::Abandoning | Phase::Done => {}
            }
        }
    }

    fn on_cancelled(&mut self, out: &mut Vec<Action>) {
        if self.phase != Phase::Done {
            self.phase = Phase::Done;
            out.push(Action::Replicating { span: self.span });
        }
    }

    fn is_finished(&self) -> bool {
        self.phase == Phase::Done
    }
}
