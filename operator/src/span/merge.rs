//! Joins spans, and keeps everybody else off them meanwhile.

use heartbeatpb::{ComponentState, DispatcherId, NodeId, TableSpanStatus};
use replica::is_terminal;

use crate::operator::{Action, Kind, Operator};

/// Joins neighbours that run on one node into one span there, without a gap: the node prepares the target while
/// the sources go on (scheduling §5.7). Built by [`crate::Controller::merge`], which reserves the sources.
///
/// ```text
/// Merging --Working of the target--> Done (sources forgotten, target replicating)
/// Merging --node gone--------------> Done (sources released, target dropped)
/// Merging --terminal of the target, or cancelled--> Done (sources go on, target dropped)
/// ```
#[derive(Debug)]
pub struct MergeSpans {
    target: DispatcherId,
    sources: Vec<DispatcherId>,
    node: NodeId,
    done: bool,
}

impl MergeSpans {
    /// Joins `sources`, in the order of their keys, into `target` on `node`.
    pub(crate) fn new(target: DispatcherId, sources: Vec<DispatcherId>, node: NodeId) -> Self {
        Self { target, sources, node, done: false }
    }

    fn finish(&mut self, outcome: impl FnOnce(Vec<DispatcherId>) -> Vec<Action>, out: &mut Vec<Action>) {
        if !self.done {
            self.done = true;
            let sources = std::mem::take(&mut self.sources);
            out.extend(outcome(sources.clone()));
            // Last: a late word of a source must not find a known span that nobody has.
            out.extend(sources.into_iter().map(|span| Action::Free { span }));
        }
    }

    fn give_up(&mut self, out: &mut Vec<Action>) {
        let target = self.target;
        let drop_target = move |sources: Vec<DispatcherId>| {
            let mut actions: Vec<Action> = sources.into_iter().map(|span| Action::Resume { span }).collect();
            actions.push(Action::Discard { span: target });
            actions
        };
        self.finish(drop_target, out);
    }
}

impl Operator for MergeSpans {
    fn span(&self) -> DispatcherId {
        self.target
    }

    fn kind(&self) -> Kind {
        Kind::Merge
    }

    fn affected_nodes(&self) -> Vec<NodeId> {
        vec![self.node.clone()]
    }

    fn holds_checkpoint(&self) -> bool {
        false
    }

    fn start(&mut self, out: &mut Vec<Action>) {
        // The sources go on until all of them rest at one place, which may be behind a schema change: they stay
        // replicating, or its barrier would wait for somebody who does not count, and the merge for the barrier.
        self.resend(out);
    }

    fn resend(&self, out: &mut Vec<Action>) {
        if !self.done {
            out.push(Action::Merge {
                sources: self.sources.clone(),
                target: self.target,
                on: self.node.clone(),
            });
        }
    }

    fn on_status(&mut self, from: &NodeId, status: &TableSpanStatus, out: &mut Vec<Action>) {
        if self.done || *from != self.node {
            return;
        }
        if status.state == ComponentState::Working {
            let target = self.target;
            let commit = move |sources: Vec<DispatcherId>| {
                let mut actions: Vec<Action> =
                    sources.into_iter().map(|span| Action::Discard { span }).collect();
                actions.push(Action::Replicating { span: target });
                actions
            };
            self.finish(commit, out);
        } else if is_terminal(status.state) {
            self.give_up(out);
        }
    }

    fn on_node_removed(&mut self, node: &NodeId, out: &mut Vec<Action>) {
        if *node == self.node {
            let target = self.target;
            let release = move |sources: Vec<DispatcherId>| {
                let mut actions: Vec<Action> =
                    sources.into_iter().map(|span| Action::Release { span }).collect();
                actions.push(Action::Discard { span: target });
                actions
            };
            self.finish(release, out);
        }
    }

    fn on_cancelled(&mut self, out: &mut Vec<Action>) {
        self.give_up(out);
    }

    fn is_finished(&self) -> bool {
        self.done
    }
}

/// Reserves a source of a merge: it does nothing, and it ends when its merge does. What becomes of the span is
/// the merge's to say, also when their node dies.
#[derive(Debug)]
pub struct OccupySpan {
    span: DispatcherId,
    merge: DispatcherId,
    done: bool,
}

impl OccupySpan {
    /// Reserves `span` for the merge into `merge`.
    pub(crate) fn new(span: DispatcherId, merge: DispatcherId) -> Self {
        Self { span, merge, done: false }
    }
}

impl Operator for OccupySpan {
    fn span(&self) -> DispatcherId {
        self.span
    }

    fn kind(&self) -> Kind {
        Kind::Occupy
    }

    fn affected_nodes(&self) -> Vec<NodeId> {
        Vec::new()
    }

    fn holds_checkpoint(&self) -> bool {
        false
    }

    fn reserved_for(&self) -> Option<DispatcherId> {
        Some(self.merge)
    }

    fn start(&mut self, _out: &mut Vec<Action>) {}

    fn resend(&self, _out: &mut Vec<Action>) {}

    fn on_status(&mut self, _from: &NodeId, _status: &TableSpanStatus, _out: &mut Vec<Action>) {}

    fn on_node_removed(&mut self, _node: &NodeId, _out: &mut Vec<Action>) {}

    fn on_cancelled(&mut self, _out: &mut Vec<Action>) {
        self.done = true;
    }

    fn is_finished(&self) -> bool {
        self.done
    }
}
