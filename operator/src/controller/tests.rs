//! Histories of operators as their controller lives them.

use expect_test::{Expect, expect};
use heartbeatpb::ComponentState::{self, Removed, Stopped, WaitingMerge, Working};
use replica::Standing;

use super::*;
use crate::span::AddSpan;

const TRIGGER: DispatcherId = DispatcherId::new(0, 99);
const SPAN: DispatcherId = DispatcherId::new(0, 1);
const OTHER: DispatcherId = DispatcherId::new(0, 2);

/// A controller, its spans (both of table 7, schema 1, at 10 and 20), and what was said so far.
struct Rig {
    controller: Controller,
    spans: SpanSet,
    alive: BTreeSet<NodeId>,
    now: Instant,
    out: Vec<Effect>,
}

impl Rig {
    fn new() -> Self {
        let trigger = SpanReplica::absent(TRIGGER, SchemaId::DDL, TableSpan::ddl(), Ts(1));
        let mut spans = SpanSet::new(trigger);
        for (id, start, end, ts) in [(SPAN, b"".as_slice(), b"m".as_slice(), 10), (OTHER, b"m", b"", 20)] {
            let range = TableSpan { keyspace_id: 0, table: TableId(7), start: start.into(), end: end.into() };
            spans.add_absent(SpanReplica::absent(id, SchemaId(1), range, Ts(ts)));
        }
        let controller =
            Controller::new(ChangefeedId::fresh("t"), Mode::Default, MaintainerEpoch::from_wire(5));
        let alive = ["n1", "n2"].map(NodeId::from).into();
        Self { controller, spans, alive, now: Instant::now(), out: Vec::new() }
    }

    fn call<R>(&mut self, f: impl FnOnce(&mut Controller, &mut Context<'_>) -> R) -> R {
        let mut cx =
            Context { spans: &mut self.spans, alive: &self.alive, now: self.now, out: &mut self.out };
        f(&mut self.controller, &mut cx)
    }

    fn add(&mut self, id: DispatcherId, node: &str) -> bool {
        let operator = Box::new(AddSpan::new(id, node.into(), OperatorType::Add));
        self.call(|controller, cx| controller.add(operator, cx))
    }

    /// The span runs on its node, and its dispatcher is to be removed.
    fn remove(&mut self, id: DispatcherId, afterwards: Afterwards) -> bool {
        self.spans.bind(id, "n1".into());
        self.spans.mark_replicating(id);
        let span = self.spans.get(id).cloned().unwrap();
        let operator = RemoveSpan::new(&span, "n1".into(), OperatorType::Remove, afterwards);
        self.call(|controller, cx| controller.add(Box::new(operator), cx))
    }

    fn status(&mut self, from: &str, id: DispatcherId, state: ComponentState, checkpoint: u64) {
        let status = TableSpanStatus {
            id,
            state,
            checkpoint: Ts(checkpoint),
            event_size_per_second: 0.0,
            mode: Mode::Default,
        };
        self.call(|controller, cx| controller.on_status(&from.into(), &status, cx));
    }

    fn gone(&mut self, node: &str) {
        self.alive.remove(&NodeId::from(node));
        self.call(|controller, cx| controller.on_node_removed(&node.into(), cx));
    }

    fn later(&mut self, millis: u64) {
        self.now += Duration::from_millis(millis);
        self.call(Controller::on_tick);
    }

    /// What was said since the last call, and where the first span stands.
    fn says(&mut self, expected: &Expect) {
        let mut words: Vec<String> = self.out.drain(..).map(|effect| text(&effect)).collect();
        let standing = match self.spans.standing(SPAN) {
            None => "gone".to_owned(),
            Some(standing) => {
                let node = self.spans.get(SPAN).and_then(|span| span.node.clone());
                format!("{standing:?}{}", node.map_or(String::new(), |node| format!(" on {node}")))
            }
        };
        words.push(format!("[{standing}]"));
        expected.assert_eq(&words.join(", "));
    }
}

fn text(effect: &Effect) -> String {
    match effect {
        Effect::Send(to, request) => {
            assert_eq!(request.epoch, MaintainerEpoch::from_wire(5), "every request carries the epoch");
            let what = match request.action {
                ScheduleAction::Create => format!("create@{}", request.config.start_ts),
                ScheduleAction::Remove => "remove".to_owned(),
            };
            format!("{what} {} to {to}", request.config.dispatcher.low)
        }
        Effect::Merge(to, request) => {
            assert_eq!(request.epoch, MaintainerEpoch::from_wire(5), "every request carries the epoch");
            let sources: Vec<String> = request.sources.iter().map(|id| id.low.to_string()).collect();
            format!("merge {} into {} to {to}", sources.join("+"), request.merged.low)
        }
        Effect::Uncovered(span) => format!("uncovered {}", span.id.low),
        Effect::Started(kind) => format!("+{}", kind.name()),
        Effect::Finished(kind, _) => format!("-{}", kind.name()),
    }
}

// behaviour: scheduling-12, scheduling-55
#[test]
fn a_span_is_bound_before_it_is_created_and_replicates_when_its_node_says_so() {
    let mut rig = Rig::new();
    assert!(rig.add(SPAN, "n1"));
    rig.says(&expect!["+add, create@10 1 to n1, [Scheduling on n1]"]);
    rig.status("n2", SPAN, Working, 11);
    rig.status("n1", SPAN, ComponentState::Initializing, 11);
    rig.says(&expect!["[Scheduling on n1]"]);
    rig.status("n1", SPAN, Working, 11);
    rig.says(&expect!["-add, [Replicating on n1]"]);
    rig.later(60_000);
    rig.says(&expect!["[Replicating on n1]"]);
}

// behaviour: scheduling-11
#[test]
fn a_span_whose_node_dies_before_it_works_is_placed_anew() {
    let mut rig = Rig::new();
    rig.add(SPAN, "n1");
    rig.gone("n2");
    rig.gone("n1");
    rig.says(&expect!["+add, create@10 1 to n1, -add, [Absent]"]);
}

// behaviour: scheduling-13, scheduling-14
#[test]
fn a_node_refuses_a_span_by_removed_and_not_by_stopped() {
    let mut rig = Rig::new();
    rig.add(SPAN, "n1");
    rig.status("n1", SPAN, Stopped, 0);
    rig.later(500);
    rig.says(&expect!["+add, create@10 1 to n1, create@10 1 to n1, [Scheduling on n1]"]);
    rig.status("n1", SPAN, Removed, 0);
    rig.says(&expect!["-add, [Absent]"]);
}

// behaviour: scheduling-15
#[test]
fn an_operator_that_is_cancelled_after_its_span_was_deleted_brings_no_ghost_back() {
    let mut rig = Rig::new();
    rig.add(SPAN, "n1");
    rig.spans.remove(SPAN);
    rig.call(|controller, cx| controller.cancel(SPAN, cx));
    rig.says(&expect!["+add, create@10 1 to n1, -add, [gone]"]);
    assert_eq!(rig.spans.count(Standing::Absent), 1, "the other one");
}

#[test]
fn a_request_is_repeated_with_growing_pauses_and_starts_where_the_changefeed_is_now() {
    let mut rig = Rig::new();
    rig.add(SPAN, "n1");
    rig.later(499);
    rig.says(&expect!["+add, create@10 1 to n1, [Scheduling on n1]"]);
    rig.spans.advance_committed(Ts(15));
    rig.later(1);
    rig.later(999);
    rig.says(&expect!["create@15 1 to n1, [Scheduling on n1]"]);
    rig.later(1);
    rig.says(&expect!["create@15 1 to n1, [Scheduling on n1]"]);
    for _ in 0..100 {
        rig.later(1_000);
    }
    let sent = rig.out.iter().filter(|effect| matches!(effect, Effect::Send(..))).count();
    assert!((9..=12).contains(&sent), "{sent} in 100 s");
}

#[test]
fn an_operator_for_a_dead_node_starts_and_ends() {
    let mut rig = Rig::new();
    assert!(rig.add(SPAN, "n9"));
    rig.says(&expect!["+add, create@10 1 to n9, -add, [Absent]"]);
}

// behaviour: scheduling-57, scheduling-16, scheduling-17, scheduling-18, scheduling-19
#[test]
fn a_removal_talks_to_its_node_until_the_dispatcher_is_gone() {
    let mut rig = Rig::new();
    rig.remove(SPAN, Afterwards::Nothing);
    rig.spans.mark_absent(SPAN);
    rig.status("n1", SPAN, Working, 12);
    rig.status("n1", SPAN, WaitingMerge, 12);
    rig.status("n2", SPAN, Stopped, 12);
    rig.later(500);
    rig.says(&expect!["+remove, remove 1 to n1, remove 1 to n1, [Absent]"]);
    rig.status("n1", SPAN, Removed, 0);
    rig.says(&expect!["-remove, [Absent]"]);
    assert_eq!(rig.spans.get(SPAN).map(|span| span.state), Some(Removed));

    let mut rig = Rig::new();
    rig.remove(SPAN, Afterwards::Nothing);
    rig.spans.remove(SPAN);
    rig.gone("n1");
    rig.says(&expect!["+remove, remove 1 to n1, -remove, [gone]"]);
}

#[test]
fn what_follows_a_removal_follows_once_and_not_when_it_was_cancelled() {
    let mut rig = Rig::new();
    rig.remove(SPAN, Afterwards::Release);
    rig.status("n1", SPAN, Stopped, 0);
    rig.says(&expect!["+remove, remove 1 to n1, -remove, [Absent]"]);
    rig.remove(SPAN, Afterwards::Forget);
    rig.status("n1", SPAN, Stopped, 0);
    rig.status("n1", SPAN, Stopped, 0);
    rig.says(&expect!["+remove, remove 1 to n1, uncovered 1, -remove, [gone]"]);
}

// behaviour: scheduling-47, scheduling-50
#[test]
fn a_removal_that_another_one_replaces_does_not_do_what_should_follow_it() {
    let mut rig = Rig::new();
    rig.remove(SPAN, Afterwards::Release);
    assert!(rig.call(|controller, cx| controller.remove_tables(&[TableId(7)], cx)));
    rig.says(&expect!["+remove, remove 1 to n1, -remove, +remove, remove 1 to n1, [gone]"]);
    assert!(rig.controller.contains(SPAN));
    rig.status("n1", SPAN, Stopped, 0);
    rig.says(&expect!["-remove, [gone]"]);
}

#[test]
fn dropping_a_table_or_its_schema_removes_its_dispatchers_and_forgets_its_spans() {
    let mut rig = Rig::new();
    rig.add(SPAN, "n1");
    rig.call(|controller, cx| controller.remove_schema(SchemaId(1), cx));
    rig.says(&expect!["+add, create@10 1 to n1, -add, +remove, remove 1 to n1, [gone]"]);
    assert!(rig.spans.is_empty());
    assert_eq!(rig.spans.floor(), None);
    rig.status("n1", SPAN, Working, 30);
    rig.says(&expect!["[gone]"]);
    assert!(!rig.controller.contains(OTHER), "nobody ran it");
    assert!(rig.call(|controller, cx| controller.remove_tables(&[TableId(7)], cx)), "again: nothing to do");
    rig.says(&expect!["[gone]"]);
}

// behaviour: scheduling-48
#[test]
fn a_dead_node_gives_back_its_spans_and_operators_decide_for_theirs() {
    let mut rig = Rig::new();
    rig.spans.bind(OTHER, "n1".into());
    rig.spans.mark_replicating(OTHER);
    rig.remove(SPAN, Afterwards::Forget);
    rig.gone("n1");
    assert_eq!(rig.spans.standing(OTHER), Some(Standing::Absent));
    rig.says(&expect!["+remove, remove 1 to n1, uncovered 1, -remove, [gone]"]);
    assert_eq!(rig.spans.size_by_node(&"n1".into()), 0);
}

// behaviour: scheduling-51, scheduling-52, scheduling-54, maintainer-33
#[test]
fn a_quiesced_controller_freezes_all_but_what_is_allowed_and_frozen_operators_hold_the_checkpoint() {
    let mut rig = Rig::new();
    rig.add(SPAN, "n1");
    rig.add(OTHER, "n1");
    rig.out.clear();
    rig.controller.quiesce_except([OTHER, DispatcherId::new(0, 0)]);
    assert!(!rig.call(|controller, cx| controller.remove_tables(&[TableId(7)], cx)), "refused as a whole");
    rig.status("n1", SPAN, Working, 50);
    rig.gone("n1");
    rig.later(500);
    let sent: Vec<String> = rig.out.drain(..).map(|effect| text(&effect)).collect();
    assert_eq!(sent, ["create@20 2 to n1"]);
    assert_eq!(rig.spans.floor(), Some(Ts(10)));
    rig.status("n1", OTHER, Working, 50);
    rig.says(&expect!["-add, [Scheduling on n1]"]);
    assert_eq!((rig.controller.len(), rig.spans.floor()), (1, Some(Ts(10))));
    rig.later(100_000);
    rig.says(&expect!["[Scheduling on n1]"]);
    assert!(rig.controller.due.is_empty(), "nothing is left to look at");
    rig.spans.add_table(DispatcherId::new(0, 3), SchemaId(1), TableId(8), false, Ts(60));
    assert!(!rig.add(DispatcherId::new(0, 3), "n2"));
}

#[test]
fn a_refused_operator_has_no_effect() {
    let mut rig = Rig::new();
    rig.add(SPAN, "n1");
    rig.out.clear();
    assert!(!rig.add(SPAN, "n2"), "occupied");
    assert!(!rig.add(DispatcherId::new(0, 77), "n2"), "unknown span");
    rig.says(&expect!["[Scheduling on n1]"]);
    assert_eq!(rig.controller.len(), 1);
}

#[test]
fn the_oldest_slow_operator_is_named_once_in_a_while() {
    let mut rig = Rig::new();
    rig.add(SPAN, "n1");
    rig.now += SLOW;
    rig.add(OTHER, "n1");
    let slow = rig.controller.slow(rig.now).unwrap();
    assert_eq!((slow.span, slow.kind, slow.age, slow.operators), (SPAN, Kind::Add, SLOW, 2));
    assert_eq!(rig.controller.slow(rig.now), None);
    assert!(rig.controller.slow(rig.now + SLOW).is_some());
}

mod placements;
mod walk;
