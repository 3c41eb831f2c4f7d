//! Gives a span that nobody runs to a node.

use heartbeatpb::{ComponentState, DispatcherId, NodeId, OperatorType, TableSpanStatus};

use crate::operator::{Action, Kind, Operator};

/// Creates a span's dispatcher on `dest` (scheduling §5.3).
///
/// ```text
/// Creating --Working from dest------------------> Done (replicating)
/// Creating --Removed from dest, or dest gone----> Done (released)
/// Creating --Stopped from dest------------------> Creating: may be the last word of an earlier dispatcher
/// ```
#[derive(Debug)]
pub struct AddSpan {
    span: DispatcherId,
    dest: NodeId,
    intent: OperatorType,
    phase: Phase,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Creating,
    Done,
}

impl AddSpan {
    /// Places `span` on `dest`. `intent` tells the node what it is part of; it changes nothing there.
    #[must_use]
    pub fn new(span: DispatcherId, dest: NodeId, intent: OperatorType) -> Self {
        Self { span, dest, intent, phase: Phase::Creating }
    }
}

impl Operator for AddSpan {
    fn span(&self) -> DispatcherId {
        self.span
    }

    fn kind(&self) -> Kind {
        Kind::Add
    }

    fn affected_nodes(&self) -> Vec<NodeId> {
        vec![self.dest.clone()]
    }

    fn holds_checkpoint(&self) -> bool {
        true
    }

    fn brings_to(&self) -> Option<&NodeId> {
        Some(&self.dest)
    }

    fn start(&mut self, out: &mut Vec<Action>) {
        if self.phase == Phase::Creating {
            out.push(Action::Bind { span: self.span, to: self.dest.clone() });
            self.resend(out);
        }
    }

    fn resend(&self, out: &mut Vec<Action>) {
        if self.phase == Phase::Creating {
            out.push(Action::Create { span: self.span, on: self.dest.clone(), operator: self.intent });
        }
    }

    fn on_status(&mut self, from: &NodeId, status: &TableSpanStatus, out: &mut Vec<Action>) {
        if self.phase == Phase::Done || *from != self.dest {
            return;
        }
        match status.state {
            ComponentState::Working => {
                self.phase = Phase::Done;
                out.push(Action::Replicating { span: self.span });
            }
            ComponentState::Removed => {
                self.phase = Phase::Done;
                out.push(Action::Release { span: self.span });
            }
            ComponentState::Stopped
            | ComponentState::Initializing
            | ComponentState::Preparing
            | ComponentState::MergeReady
            | ComponentState::WaitingMerge => {}
        }
    }

    fn on_node_removed(&mut self, node: &NodeId, out: &mut Vec<Action>) {
        if self.phase == Phase::Creating && *node == self.dest {
            self.phase = Phase::Done;
            out.push(Action::Release { span: self.span });
        }
    }

    fn on_cancelled(&mut self, _out: &mut Vec<Action>) {
        self.phase = Phase::Done;
    }

    fn is_finished(&self) -> bool {
        self.phase == Phase::Done
    }
}
