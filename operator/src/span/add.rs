//! Gives a span that nobody runs to a node.

use heartbeatpb::{ComponentState, DispatcherId, NodeId, OperatorType, TableSpanStatus};

use crate::{Action, Operator};

/// Creates a span's dispatcher on `dest` (spec/scheduling.md §5, add).
///
/// ```text
/// Creating --Working from dest--> Done (replicating)
/// Creating --Stopped/Removed from dest, or dest gone--> Done (released)
/// ```
#[derive(Debug)]
pub struct AddSpan {
    span: DispatcherId,
    dest: NodeId,
    phase: Phase,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Creating,
    Done,
}

impl AddSpan {
    /// Places `span` on `dest`.
    #[must_use]
    pub fn new(span: DispatcherId, dest: NodeId) -> Self {
        Self { span, dest, phase: Phase::Creating }
    }

    fn create(&self) -> Action {
        Action::Create { span: self.span, on: self.dest.clone(), operator: OperatorType::Add }
    }
}

impl Operator for AddSpan {
    fn span(&self) -> DispatcherId {
        self.span
    }

    fn kind(&self) -> OperatorType {
        OperatorType::Add
    }

    fn start(&mut self, out: &mut Vec<Action>) {
        out.push(Action::Bind { span: self.span, to: self.dest.clone() });
        out.push(self.create());
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
            ComponentState::Stopped | ComponentState::Removed => {
                self.phase = Phase::Done;
                out.push(Action::Release { span: self.span });
            }
            ComponentState::Initializing
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

    fn resend(&self, out: &mut Vec<Action>) {
        if self.phase == Phase::Creating {
            out.push(self.create());
        }
    }

    fn is_finished(&self) -> bool {
        self.phase == Phase::Done
    }

    fn holds_checkpoint(&self) -> bool {
        true
    }
}
