//! Histories of maintainers that leave.

use expect_test::expect;
use heartbeatpb::ComponentState::{Stopped, Working};

use super::rig::{Rig, status};

// behaviour: maintainer-25
#[test]
fn a_move_removes_the_trigger_and_leaves_the_tables_to_the_successor() {
    let mut rig = Rig::working(2);
    rig.remove(5, false, false);
    rig.says(&expect!["+remove, remove d1 on n1"]);
    rig.remove(5, false, false);
    rig.says(&expect!["-"]);
    rig.tick(500);
    rig.says(&expect!["remove d1 on n1"]);
    rig.report("n1", &[status(1, Stopped, 100)], 100, 4);
    rig.tick(0);
    rig.says(&expect!["-remove, leave"]);
    assert_eq!(rig.core.status().state, Working, "the log reader still runs");
    rig.core.on_left();
    assert_eq!(rig.core.status().state, Stopped);
    rig.tick(10_000);
    rig.says(&expect!["-"]);
}

// behaviour: maintainer-40
#[test]
fn a_trigger_that_its_node_does_not_know_has_left() {
    let mut rig = Rig::working(1);
    rig.remove(5, false, false);
    rig.out.clear();
    rig.report("n1", &[status(1, Stopped, 0)], 100, 4);
    rig.tick(0);
    rig.says(&expect!["-remove, leave"]);
}

// behaviour: maintainer-39
#[test]
fn after_the_trigger_was_asked_to_leave_its_last_position_holds_the_checkpoint() {
    let mut rig = Rig::working(1);
    rig.report("n1", &[status(1, Working, 150)], 150, 3);
    rig.remove(5, false, false);
    rig.report("n1", &[status(1, Stopped, 150)], 900, 4);
    assert_eq!(rig.checkpoint(), 150);
    assert_eq!(rig.core.status().checkpoint.0, 150);
}

// behaviour: maintainer-29
#[test]
fn the_status_says_the_committed_checkpoint_and_the_epoch() {
    let mut rig = Rig::working(1);
    rig.report("n1", &[], 120, 3);
    rig.add_tables(125, &[9]);
    rig.report("n1", &[], 130, 3);
    let status = rig.core.status();
    let epoch = status.epoch.map(|epoch| epoch.get());
    assert_eq!((status.checkpoint.0, epoch), (125, Some(5)), "a table without a home holds it");
}

// behaviour: maintainer-27
#[test]
fn a_removal_of_another_epoch_is_none() {
    let mut rig = Rig::working(1);
    rig.remove(4, true, true);
    rig.remove(0, true, true);
    rig.remove(6, true, true);
    rig.says(&expect!["stale remove_request, stale remove_request, stale remove_request"]);
    assert!(rig.core.removal.is_none());
}

// behaviour: maintainer-28
#[test]
fn a_close_answer_that_nobody_asked_for_is_nothing() {
    let mut rig = Rig::working(1);
    rig.closed("n1", true, 5);
    rig.says(&expect!["-"]);
    rig.remove(5, true, false);
    rig.says(&expect!["close n1"]);
}

// behaviour: maintainer-31
#[test]
fn a_pause_closes_every_node_and_asks_again_those_that_have_not_said_so() {
    let mut rig = Rig::working(1);
    rig.nodes(&["n1", "n2"]);
    rig.answer("n2", vec![]);
    rig.out.clear();
    rig.remove(5, true, false);
    rig.says(&expect!["close n1, close n2"]);
    rig.closed("n1", true, 5);
    rig.closed("n2", false, 5);
    rig.closed("n2", true, 4);
    rig.tick(499);
    rig.says(&expect!["stale close_response"]);
    rig.tick(1);
    rig.says(&expect!["close n2"]);
    rig.nodes(&["n1", "n2", "n3"]);
    rig.says(&expect!["close n3"]);
    rig.closed("n3", true, 5);
    rig.closed("n2", true, 5);
    rig.says(&expect!["leave"]);
}

// behaviour: maintainer-41
#[test]
fn a_node_that_dies_last_needs_not_close_and_a_plain_removal_does_not_undo_a_cascade() {
    let mut rig = Rig::working(1);
    rig.nodes(&["n1", "n2"]);
    rig.answer("n2", vec![]);
    rig.remove(5, true, true);
    rig.remove(5, false, false);
    rig.closed("n1", true, 5);
    rig.out.clear();
    rig.tick(1_000);
    rig.says(&expect!["close n2 for good"]);
    rig.nodes(&["n1"]);
    rig.says(&expect!["leave"]);
}

#[test]
fn a_deletion_after_a_pause_closes_again_for_good() {
    let mut rig = Rig::working(1);
    rig.nodes(&["n1", "n2"]);
    rig.answer("n2", vec![]);
    rig.out.clear();
    rig.remove(5, true, false);
    rig.closed("n1", true, 5);
    rig.remove(5, true, true);
    rig.says(&expect!["close n1, close n2, close n1 for good, close n2 for good"]);
}

// behaviour: maintainer-37
#[test]
fn before_it_is_initialised_a_maintainer_ignores_a_move_and_obeys_a_cascade() {
    let mut rig = Rig::new();
    rig.nodes(&["n1"]);
    rig.out.clear();
    rig.remove(5, false, false);
    rig.says(&expect!["-"]);
    assert!(rig.core.removal.is_none());
    rig.remove(5, true, false);
    rig.says(&expect!["close n1"]);
    rig.load(1);
    rig.answer("n1", vec![]);
    assert!(!rig.core.status().bootstrap_done, "nothing is taken over any more");
    rig.tick(100);
    rig.says(&expect!["-"]);
}

// behaviour: maintainer-30, maintainer-31, scheduling-131, coordinator-ND-10
#[test]
fn while_it_leaves_nothing_is_created_healed_or_answered() {
    let mut rig = Rig::working(2);
    rig.remove(5, false, false);
    rig.out.clear();
    rig.report("n1", &[status(2, Stopped, 130), status(77, Working, 100)], 130, 4);
    rig.add_tables(300, &[9]);
    rig.nodes(&[]);
    rig.tick(400);
    rig.says(&expect!["-"]);
    let span = rig.core.placement().spans.get(rig.id(2)).cloned().unwrap();
    assert_eq!((span.state, span.node.is_some()), (Stopped, true), "recorded, and still bound");
}

// behaviour: scheduling-132, maintainer-33
#[test]
fn a_creation_in_flight_holds_the_checkpoint_while_leaving() {
    let mut rig = Rig::working(1);
    rig.add_tables(110, &[9]);
    rig.report("n1", &[], 108, 3);
    rig.remove(5, false, false);
    rig.report("n1", &[], 500, 4);
    assert!(rig.checkpoint() <= 110, "{}", rig.checkpoint());
}
