//! The operators of one changefeed: one for a span at most, repeated until done.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use heartbeatpb::{DispatcherId, NodeId, TableSpanStatus};

use crate::{Action, Operator};

/// A request without an observed effect is repeated after this time.
pub const RESEND_INTERVAL: Duration = Duration::from_millis(500);

struct Running {
    operator: Box<dyn Operator>,
    sent_at: Instant,
}

/// Owns operators and drives them (spec/scheduling.md §6).
#[derive(Default)]
pub struct Controller {
    running: BTreeMap<DispatcherId, Running>,
    quiesced: bool,
}

impl std::fmt::Debug for Controller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_map().entries(self.running.iter().map(|(id, running)| (id, &running.operator))).finish()
    }
}

impl Controller {
    /// A controller without operators.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Number of unfinished operators.
    #[must_use]
    pub fn len(&self) -> usize {
        self.running.len()
    }

    /// Whether no operator runs.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.running.is_empty()
    }

    /// Whether an operator runs for the span.
    #[must_use]
    pub fn contains(&self, span: DispatcherId) -> bool {
        self.running.contains_key(&span)
    }

    /// Spans whose operators hold the checkpoint.
    pub fn holding(&self) -> impl Iterator<Item = DispatcherId> {
        self.running.iter().filter(|(_, running)| running.operator.holds_checkpoint()).map(|(id, _)| *id)
    }

    /// Starts an operator. Refused (`false`) when the span has one, or when the controller was quiesced.
    pub fn add(&mut self, mut operator: Box<dyn Operator>, now: Instant, out: &mut Vec<Action>) -> bool {
        let span = operator.span();
        if self.quiesced || self.running.contains_key(&span) {
            return false;
        }
        operator.start(out);
        self.running.insert(span, Running { operator, sent_at: now });
        true
    }

    /// Starts an operator in place of the one that the span has.
    pub fn replace(&mut self, operator: Box<dyn Operator>, now: Instant, out: &mut Vec<Action>) -> bool {
        self.running.remove(&operator.span());
        self.add(operator, now, out)
    }

    /// A node reported a span.
    pub fn on_status(&mut self, from: &NodeId, status: &TableSpanStatus, out: &mut Vec<Action>) {
        let Some(running) = self.running.get_mut(&status.id) else { return };
        running.operator.on_status(from, status, out);
        if running.operator.is_finished() {
            self.running.remove(&status.id);
        }
    }

    /// A node is gone.
    pub fn on_node_removed(&mut self, node: &NodeId, out: &mut Vec<Action>) {
        if self.quiesced {
            return;
        }
        for running in self.running.values_mut() {
            running.operator.on_node_removed(node, out);
        }
        self.running.retain(|_, running| !running.operator.is_finished());
    }

    /// Repeats requests that are due.
    pub fn on_tick(&mut self, now: Instant, out: &mut Vec<Action>) {
        if self.quiesced {
            return;
        }
        for running in self.running.values_mut() {
            if now.duration_since(running.sent_at) >= RESEND_INTERVAL {
                running.sent_at = now;
                running.operator.resend(out);
            }
        }
    }

    /// Nothing starts, repeats or finishes by itself any more; what runs keeps holding the checkpoint.
    /// Terminal: the changefeed is being removed.
    pub fn quiesce(&mut self) {
        self.quiesced = true;
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};
    use heartbeatpb::{ComponentState, Mode, Ts};

    use super::*;
    use crate::span::{AddSpan, RemoveSpan};

    const SPAN: DispatcherId = DispatcherId::new(0, 1);

    enum Event {
        Status(&'static str, ComponentState),
        Gone(&'static str),
        Later(u64),
    }

    fn check(operator: Box<dyn Operator>, events: &[Event], expected: &Expect) {
        let mut now = Instant::now();
        let mut controller = Controller::new();
        let mut history = Vec::new();
        let mut out = Vec::new();
        controller.add(operator, now, &mut out);
        history.push(text(&mut out));
        for event in events {
            match event {
                Event::Status(from, state) => {
                    let status = TableSpanStatus {
                        id: SPAN,
                        state: *state,
                        checkpoint: Ts(1),
                        event_size_per_second: 0.0,
                        mode: Mode::Default,
                    };
                    controller.on_status(&NodeId::from(*from), &status, &mut out);
                }
                Event::Gone(node) => controller.on_node_removed(&NodeId::from(*node), &mut out),
                Event::Later(millis) => {
                    now += Duration::from_millis(*millis);
                    controller.on_tick(now, &mut out);
                }
            }
            history.push(text(&mut out));
        }
        history.push(if controller.is_empty() { "done" } else { "running" }.to_owned());
        expected.assert_eq(&history.join(" / "));
    }

    fn text(actions: &mut Vec<Action>) -> String {
        if actions.is_empty() {
            return "-".to_owned();
        }
        let words: Vec<String> = actions
            .drain(..)
            .map(|action| match action {
                Action::Bind { to, .. } => format!("bind {to}"),
                Action::Create { on, .. } => format!("create {on}"),
                Action::Remove { on, .. } => format!("remove {on}"),
                Action::Replicating { .. } => "replicating".to_owned(),
                Action::Release { .. } => "release".to_owned(),
            })
            .collect();
        words.join(", ")
    }

    fn add() -> Box<AddSpan> {
        Box::new(AddSpan::new(SPAN, "n1".into()))
    }

    #[test]
    fn a_span_is_bound_before_it_is_created_and_replicates_when_its_node_says_so() {
        check(
            add(),
            &[Event::Status("n1", ComponentState::Working)],
            &expect!["bind n1, create n1 / replicating / done"],
        );
    }

    #[test]
    fn a_create_request_is_repeated_until_it_is_answered() {
        check(
            add(),
            &[
                Event::Later(499),
                Event::Later(1),
                Event::Later(500),
                Event::Status("n1", ComponentState::Working),
                Event::Later(500),
            ],
            &expect!["bind n1, create n1 / - / create n1 / create n1 / replicating / - / done"],
        );
    }

    #[test]
    fn reports_of_other_nodes_and_of_a_dispatcher_that_is_not_up_yet_change_nothing() {
        check(
            add(),
            &[
                Event::Status("n2", ComponentState::Working),
                Event::Status("n1", ComponentState::Initializing),
            ],
            &expect!["bind n1, create n1 / - / - / running"],
        );
    }

    #[test]
    fn a_span_whose_node_dies_or_refuses_is_released() {
        check(
            add(),
            &[Event::Gone("n2"), Event::Gone("n1")],
            &expect!["bind n1, create n1 / - / release / done"],
        );
        check(
            add(),
            &[Event::Status("n1", ComponentState::Stopped)],
            &expect!["bind n1, create n1 / release / done"],
        );
    }

    #[test]
    fn a_removal_is_repeated_until_the_node_says_stopped_or_is_gone() {
        let remove = || Box::new(RemoveSpan::new(SPAN, "n1".into()));
        check(
            remove(),
            &[
                Event::Status("n1", ComponentState::Working),
                Event::Later(500),
                Event::Status("n1", ComponentState::Stopped),
            ],
            &expect!["remove n1 / - / remove n1 / - / done"],
        );
        check(remove(), &[Event::Gone("n1")], &expect!["remove n1 / - / done"]);
    }

    #[test]
    fn a_span_has_one_operator_and_a_quiesced_controller_takes_none() {
        let mut controller = Controller::new();
        let mut out = Vec::new();
        assert!(controller.add(add(), Instant::now(), &mut out));
        assert!(!controller.add(add(), Instant::now(), &mut out));
        controller.quiesce();
        out.clear();
        controller.on_tick(Instant::now() + RESEND_INTERVAL * 2, &mut out);
        assert!(out.is_empty());
        assert_eq!(controller.holding().collect::<Vec<_>>(), [SPAN]);
    }
}
