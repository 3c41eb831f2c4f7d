//! Nodes that are gone: nobody takes their place before the downstream refuses what they write.

use expect_test::expect;
use heartbeatpb::ComponentState::Working;
use heartbeatpb::TableId;

use super::super::*;
use super::rig::{Rig, WHOLE, span, status};
use crate::fence::FenceOutcome;

impl Rig {
    /// The downstream answers an attempt; some nodes may still write.
    pub(super) fn fenced(&mut self, attempt: u64, busy: &[&str]) {
        let busy = busy.iter().map(|node| (NodeId::from(*node), "a transaction does not end".to_owned()));
        let outcome = FenceOutcome { busy: busy.collect(), writers: None };
        self.core.on_fenced(attempt, Ok(outcome), self.now, &mut self.out);
        self.core.settle();
    }

    fn fence_fails(&mut self, attempt: u64) {
        let error = RunningError {
            time: String::new(),
            node: "n1".to_owned(),
            code: codes::SINK_UNAVAILABLE.to_owned(),
            message: "nothing answers".to_owned(),
        };
        self.core.on_fenced(attempt, Err(error), self.now, &mut self.out);
        self.core.settle();
    }

    pub(super) fn held_by(&self) -> String {
        let holder = self.core.standstill(self.now).unwrap().holder;
        format!("{}: {holder}", holder.kind())
    }

    /// `n1` and `n2` with a table each, `t1` on `n1` as d2 and `t2` on `n2` as d3; nothing is left to say.
    pub(super) fn two_nodes() -> Self {
        let mut rig = Rig::fencing();
        rig.nodes(&["n1", "n2"]);
        rig.load(2);
        rig.answer("n1", vec![span(70, 1, WHOLE, Working)]);
        rig.answer("n2", vec![span(80, 2, WHOLE, Working)]);
        rig.fenced(1, &[]);
        rig.post_answer("n1", 5);
        rig.report("n1", &[status(70, Working, 200)], 200, 3);
        rig.report("n2", &[status(80, Working, 200)], 200, 3);
        rig.tick(0);
        rig.core.load_at = None;
        rig.out.clear();
        assert_eq!(rig.checkpoint(), 200);
        rig
    }
}

// (b)
#[test]
fn a_new_maintainer_takes_over_only_after_everybody_else_was_refused() {
    let mut rig = Rig::fencing();
    rig.nodes(&["n1", "n2"]);
    rig.load(2);
    rig.answer("n1", vec![span(70, 1, WHOLE, Working)]);
    rig.out.clear();
    rig.answer("n2", vec![]);
    rig.says(&expect!["fence 1: all but n1 n2"]);
    assert_eq!(
        rig.held_by(),
        "fence: earlier nodes may still write; the downstream has not refused them yet"
    );
    assert!(!rig.core.status().bootstrap_done);
    assert_eq!(rig.core.waits_for().unwrap(), "the downstream to refuse nodes that are gone");
    rig.tick(5_000);
    rig.says(&expect!["load"]);
    rig.fenced(1, &[]);
    rig.says(&expect!["initialized, post n1: 1=public[1=t1 2=t2], +add, create d2 t2@100 on n2"]);
    assert!(rig.core.status().bootstrap_done);
}

#[test]
fn the_fence_does_not_wait_for_the_upstream_nor_the_take_over_for_one_alone() {
    let mut rig = Rig::fencing();
    rig.nodes(&["n1"]);
    rig.answer("n1", vec![]);
    rig.says(&expect!["bootstrap n1 with trigger, fence 1: all but n1"]);
    rig.fenced(1, &[]);
    rig.says(&expect!["-"]);
    assert_eq!(
        rig.held_by(),
        "upstream: the log reader has not started: the upstream's tables are not known"
    );
    rig.load(1);
    rig.says(&expect!["initialized, post n1: 1=public[1=t1], +add, create d2 t1@100 on n1"]);
}

#[test]
fn a_member_that_leaves_while_everybody_else_is_refused_is_refused_too() {
    let mut rig = Rig::fencing();
    rig.nodes(&["n1", "n2"]);
    rig.load(1);
    rig.answer("n1", vec![]);
    rig.answer("n2", vec![span(80, 1, WHOLE, Working)]);
    rig.out.clear();
    rig.nodes(&["n1"]);
    rig.says(&expect!["-"]);
    rig.fenced(1, &[]);
    rig.says(&expect!["fence 2: all but n1"]);
    rig.fenced(1, &[]);
    rig.says(&expect!["-"]);
    rig.fenced(2, &[]);
    rig.says(&expect!["initialized, post n1: 1=public[1=t1], +add, create d2 t1@100 on n1"]);
}

#[test]
fn a_member_that_leaves_before_the_upstream_has_answered_is_refused_too() {
    let mut rig = Rig::fencing();
    rig.nodes(&["n1", "n2"]);
    rig.answer("n1", vec![]);
    rig.answer("n2", vec![span(80, 1, WHOLE, Working)]);
    rig.fenced(1, &[]);
    rig.out.clear();
    rig.nodes(&["n1"]);
    rig.says(&expect!["fence 2: all but n1"]);
    rig.load(1);
    rig.says(&expect!["-"]);
    rig.fenced(2, &[]);
    rig.says(&expect!["initialized, post n1: 1=public[1=t1], +add, create d2 t1@100 on n1"]);
}

/// Its sink would be taken for one of those that are refused.
#[test]
fn a_newcomer_is_asked_after_everybody_else_was_refused() {
    let mut rig = Rig::fencing();
    rig.nodes(&["n1"]);
    rig.load(1);
    rig.answer("n1", vec![]);
    rig.out.clear();
    rig.nodes(&["n1", "n2"]);
    rig.tick(2_000);
    rig.says(&expect!["load"]);
    rig.fenced(1, &[]);
    rig.says(&expect!["bootstrap n2"]);
    rig.answer("n2", vec![]);
    rig.says(&expect!["initialized, post n1: 1=public[1=t1], +add, create d2 t1@100 on n1"]);
}

#[test]
fn newcomers_are_asked_also_when_the_downstream_did_not_answer() {
    let mut rig = Rig::fencing();
    rig.nodes(&["n1"]);
    rig.load(1);
    rig.answer("n1", vec![]);
    rig.nodes(&["n1", "n2"]);
    rig.out.clear();
    rig.fence_fails(1);
    rig.says(&expect!["bootstrap n2"]);
}

// (a)
#[test]
fn spans_of_a_lost_node_stay_its_own_until_it_is_refused() {
    let mut rig = Rig::two_nodes();
    rig.nodes(&["n1"]);
    rig.says(&expect!["fence 2: n2"]);
    rig.report("n1", &[status(70, Working, 900)], 900, 3);
    rig.tick(5_000);
    rig.says(&expect!["-"]);
    rig.desired(&expect![[r#"
        t1 - Replicating on n1 @900
        t2 - Replicating on n2 @200"#]]);
    assert_eq!(rig.checkpoint(), 200);
    assert_eq!(
        rig.held_by(),
        "fence: nodes are gone and may still write: n2; the downstream has not refused them yet"
    );
    rig.fenced(2, &[]);
    rig.says(&expect!["+add, create d80 t2@200 on n1"]);
    assert_eq!(rig.checkpoint(), 200);
}

#[test]
fn a_lost_node_is_not_heard() {
    let mut rig = Rig::two_nodes();
    rig.nodes(&["n1"]);
    rig.report("n1", &[status(70, Working, 900)], 900, 3);
    rig.report("n2", &[status(80, Working, 900)], 900, 4);
    assert_eq!(rig.checkpoint(), 200);
}

#[test]
fn a_move_of_a_lost_nodes_span_creates_nothing_before_the_node_is_refused() {
    let mut rig = Rig::two_nodes();
    let to = NodeId::from("n1");
    rig.wish(1, crate::placements::Wish::Move { table: TableId(2), to, wait: false });
    rig.out.clear();
    rig.nodes(&["n1"]);
    rig.says(&expect!["fence 2: n2"]);
    rig.tick(5_000);
    let said: Vec<String> = std::mem::take(&mut rig.out).iter().map(super::rig::text).collect();
    assert!(said.iter().all(|word| word == "remove d80 on n2"), "{said:?}");
    rig.fenced(2, &[]);
    rig.says(&expect!["create d80 t2@200 on n1"]);
}

#[test]
fn a_dropped_table_of_a_lost_node_is_forgotten_only_when_the_node_is_refused() {
    let mut rig = Rig::two_nodes();
    rig.nodes(&["n1"]);
    rig.drop_tables(&[2]);
    rig.tick(0);
    assert!(rig.core.placement().operators.contains(rig.id(80)));
    rig.fenced(2, &[]);
    assert!(!rig.core.placement().operators.contains(rig.id(80)));
}

#[test]
fn two_nodes_that_are_lost_one_after_the_other_are_refused_one_after_the_other() {
    let mut rig = Rig::two_nodes();
    rig.nodes(&["n1", "n2", "n3"]);
    rig.answer("n3", vec![]);
    rig.out.clear();
    rig.nodes(&["n1", "n3"]);
    rig.nodes(&["n1"]);
    rig.says(&expect!["fence 2: n2"]);
    rig.fenced(2, &[]);
    rig.says(&expect!["fence 3: n3, +add, create d80 t2@200 on n1"]);
    rig.fenced(3, &[]);
    rig.says(&expect!["-"]);
}

#[test]
fn a_downstream_that_does_not_answer_is_asked_again_with_pauses_and_told_after_a_while() {
    let mut rig = Rig::two_nodes();
    rig.nodes(&["n1"]);
    rig.report("n1", &[status(70, Working, 900)], 900, 3);
    rig.out.clear();
    rig.fence_fails(2);
    assert!(rig.held_by().ends_with("(nothing answers)"), "{}", rig.held_by());
    rig.tick(400);
    rig.says(&expect!["-"]);
    rig.tick(100);
    rig.says(&expect!["fence 3: n2"]);
    assert!(rig.core.status().errors.is_empty());
    let mut attempts = 3;
    for failure in 0..20 {
        rig.fence_fails(attempts);
        // However long it was away: its return is noticed within a second.
        rig.tick(1_000);
        attempts += 1;
        let said: Vec<String> = rig.out.drain(..).map(|effect| super::rig::text(&effect)).collect();
        assert!(said.contains(&format!("fence {attempts}: n2")), "{failure}: {said:?}");
    }
    let told = rig.core.status();
    assert!(told.errors.is_empty(), "nothing has to be started again: {:?}", told.errors);
    assert_eq!(told.trouble.expect("people are told").code, codes::SINK_UNAVAILABLE);
    rig.fenced(attempts, &[]);
    assert_eq!(rig.core.status().trouble, None, "it is over");
    rig.says(&expect!["+add, create d80 t2@200 on n1"]);
}

#[test]
fn a_node_whose_transaction_does_not_end_keeps_its_spans_and_others_do_not_wait_for_it() {
    let mut rig = Rig::two_nodes();
    rig.nodes(&["n1", "n2", "n3"]);
    rig.answer("n3", vec![]);
    rig.add_tables(300, &[9]);
    rig.tick(0);
    let created = rig.core.placement().spans.by_table(TableId(9)).next().unwrap();
    assert_eq!(created.node, Some("n3".into()), "the test wants it there");
    let id = created.id.low;
    rig.report("n3", &[status(id, Working, 300)], 300, 1);
    rig.out.clear();
    rig.nodes(&["n1"]);
    rig.says(&expect!["fence 2: n2 n3"]);
    rig.fenced(2, &["n2"]);
    let said: Vec<String> = rig.out.drain(..).map(|effect| super::rig::text(&effect)).collect();
    assert_eq!(said, ["+add".to_owned(), format!("create d{id} t9@300 on n1")]);
    rig.report("n1", &[status(id, Working, 300)], 300, 4);
    assert!(rig.held_by().ends_with("(node n2: a transaction does not end)"), "{}", rig.held_by());
    rig.out.clear();
    rig.tick(500);
    rig.says(&expect!["fence 3: n2"]);
    rig.fenced(3, &[]);
    rig.says(&expect!["+add, create d80 t2@200 on n1"]);
}

#[test]
fn late_and_repeated_answers_change_nothing() {
    let mut rig = Rig::two_nodes();
    rig.fenced(1, &[]);
    rig.fence_fails(7);
    rig.says(&expect!["-"]);
    rig.nodes(&["n1"]);
    rig.out.clear();
    rig.fenced(1, &[]);
    rig.fenced(3, &[]);
    rig.says(&expect!["-"]);
    rig.fenced(2, &[]);
    rig.says(&expect!["+add, create d80 t2@200 on n1"]);
    rig.fenced(2, &[]);
    rig.fence_fails(2);
    rig.says(&expect!["-"]);
}

#[test]
fn a_lost_answer_is_asked_for_again() {
    let mut rig = Rig::two_nodes();
    rig.nodes(&["n1"]);
    rig.out.clear();
    rig.tick(29_900);
    rig.says(&expect!["-"]);
    rig.tick(100);
    rig.says(&expect!["fence 3: n2"]);
    rig.fenced(2, &[]);
    rig.says(&expect!["-"]);
    rig.fenced(3, &[]);
    rig.says(&expect!["+add, create d80 t2@200 on n1"]);
}

#[test]
fn a_maintainer_that_leaves_fences_nobody() {
    let mut rig = Rig::two_nodes();
    rig.remove(5, false, false);
    rig.out.clear();
    rig.nodes(&["n1"]);
    rig.tick(1_000);
    rig.fenced(2, &[]);
    assert!(!rig.out.iter().any(|effect| matches!(effect, Effect::Fence { .. })), "{:?}", rig.out);
}
