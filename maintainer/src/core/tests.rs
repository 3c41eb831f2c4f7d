//! Histories of one maintainer.

mod fencing;
mod joining;
mod leaving;
mod loads;
mod merging;
mod placing;
mod progress;
mod renewal;
mod rig;
mod stalling;
mod walk;
mod wishes;

use expect_test::expect;
use heartbeatpb::ComponentState::{Initializing, Stopped, Working};

use replica::Standing;

use super::*;
use rig::{Rig, status};

#[test]
fn a_maintainer_asks_its_nodes_takes_over_and_creates_what_is_missing() {
    let mut rig = Rig::new();
    rig.nodes(&["n1"]);
    rig.says(&expect!["bootstrap n1 with trigger"]);
    rig.tick(0);
    rig.says(&expect!["load"]);
    rig.answer("n1", vec![]);
    rig.says(&expect!["-"]);
    rig.load(3);
    rig.says(&expect![
        "initialized, post n1: 1=public[1=t1 2=t2 3=t3], +add, create d2 t1@100 on n1, +add, create d3 t2@100 on n1, +add, create d4 t3@100 on n1"
    ]);
    assert!(rig.core.status().bootstrap_done);
    for id in 2..=4 {
        rig.report("n1", &[status(id, Working, 100)], 100, 3);
    }
    rig.says(&expect!["-add, -add, -add"]);
    rig.report("n1", &[], 150, 3);
    assert_eq!(rig.checkpoint(), 150);
    rig.tick(60_000);
    rig.says(&expect!["post n1: 1=public[1=t1 2=t2 3=t3]"]);
}

#[test]
fn what_a_node_says_of_events_between_its_answer_and_the_take_over_is_heard() {
    let mut rig = Rig::new();
    rig.nodes(&["n1"]);
    // Before its answer, which holds it too.
    rig.add_tables(150, &[8]);
    rig.answer("n1", vec![]);
    rig.add_tables(160, &[9]);
    rig.out.clear();
    assert!(rig.core.placement().spans.is_empty(), "nothing is known yet");
    rig.load(0);
    let tables: Vec<i64> = rig.core.placement().spans.iter().map(|(_, span)| span.span.table.0).collect();
    assert!(tables.contains(&9) && !tables.contains(&8), "{tables:?}");
    let said: Vec<String> = rig.out.drain(..).map(|effect| rig::text(&effect)).collect();
    let acknowledged = |said: &String| said.starts_with("to n1") && said.contains("160");
    assert!(said.iter().any(acknowledged), "{said:?}");
}

// behaviour: maintainer-25
#[test]
fn a_hundred_tables_are_replicated_and_the_trigger_is_none_of_them() {
    let mut rig = Rig::working(100);
    assert_eq!(rig.core.placement().spans.count(Standing::Replicating), 100);
    assert_eq!(rig.core.placement().spans.task_size(), 101);
    assert_eq!(rig.core.placement().spans.trigger().map(|span| span.state), Some(Working));
    rig.tick(10_000);
    rig.says(&expect!["-"]);
}

// behaviour: maintainer-26
#[test]
fn only_answers_of_the_own_epoch_count() {
    let mut rig = Rig::new();
    rig.nodes(&["n1"]);
    rig.load(1);
    rig.answer_of("n1", vec![], vec![], 0);
    rig.answer_of("n1", vec![], vec![], 4);
    rig.says(&expect!["bootstrap n1 with trigger, stale bootstrap_response, stale bootstrap_response"]);
    rig.answer("n1", vec![]);
    rig.out.clear();
    rig.post_answer("n1", 1);
    assert!(rig.core.is_post_pending());
    rig.post_answer("n1", 0);
    assert!(rig.core.is_post_pending());
    rig.post_answer("n1", 5);
    assert!(!rig.core.is_post_pending());
    rig.says(&expect!["stale post_bootstrap_response, stale post_bootstrap_response"]);
}

#[test]
fn silent_nodes_are_asked_again_and_the_trigger_is_started_until_it_says_so() {
    let mut rig = Rig::new();
    rig.nodes(&["n1", "n2"]);
    rig.load(0);
    rig.answer("n1", vec![]);
    rig.tick(500);
    rig.says(&expect!["bootstrap n1 with trigger, bootstrap n2, load, bootstrap n2"]);
    rig.answer("n2", vec![]);
    rig.tick(999);
    rig.says(&expect!["initialized, post n1: "]);
    rig.tick(1);
    rig.says(&expect!["post n1: "]);
    rig.post_answer("n1", 5);
    rig.tick(10_000);
    rig.says(&expect!["-"]);
}

#[test]
fn an_error_of_a_node_is_told_once_and_the_node_is_asked_again() {
    let mut rig = Rig::new();
    rig.nodes(&["n1"]);
    rig.load(1);
    rig.refuses("n1", 5, "CDC:ErrX");
    rig.tick(500);
    rig.says(&expect!["bootstrap n1 with trigger, load, bootstrap n1 with trigger"]);
    let status = rig.core.status();
    assert_eq!(status.errors.iter().map(|e| e.code.as_str()).collect::<Vec<_>>(), ["CDC:ErrX"]);
    assert_eq!(rig.core.status().errors.len(), 1, "looking is not telling");
    rig.core.on_reported(rig.core.version());
    assert!(rig.core.status().errors.is_empty());
    rig.refuses("n1", 5, "CDC:ErrX");
    rig.core.on_reported(rig.core.version() - 1);
    assert_eq!(rig.core.status().errors.len(), 1, "newer than what was told");
}

#[test]
fn an_upstream_that_cannot_be_read_is_an_error_and_is_tried_again() {
    let mut rig = Rig::new();
    rig.nodes(&["n1"]);
    rig.answer("n1", vec![]);
    rig.tick(0);
    rig.out.clear();
    rig.load_fails();
    assert_eq!(rig.core.status().errors.len(), 1);
    rig.tick(9_999);
    rig.says(&expect!["-"]);
    rig.tick(1);
    rig.says(&expect!["load"]);
    rig.load(0);
    rig.says(&expect!["initialized, post n1: "]);
}

// behaviour: maintainer-52
#[test]
fn without_a_table_trigger_nothing_is_taken_over() {
    let mut rig = Rig::new();
    rig.nodes(&["n1"]);
    rig.load(1);
    rig.trigger_start = 0;
    rig.answer("n1", vec![]);
    assert!(!rig.core.status().bootstrap_done);
    let codes: Vec<String> = rig.core.status().errors.into_iter().map(|error| error.code).collect();
    assert_eq!(codes, ["CDC:ErrChangefeedInitTableTriggerDispatcherFailed"]);
    assert!(rig.core.placement().spans.is_empty(), "all or nothing");
    rig.trigger_start = 100;
    rig.nodes(&["n1", "n2"]);
    rig.answer("n1", vec![]);
    rig.answer("n2", vec![]);
    assert!(rig.core.status().bootstrap_done, "a later attempt sees no leftovers");
}

// behaviour: maintainer-23
#[test]
fn tables_move_to_the_living_when_nodes_come_and_go() {
    let mut rig = Rig::working(4);
    assert_eq!(rig.sizes(), "n1=4");
    rig.nodes(&["n1", "n2", "n3"]);
    rig.answer("n2", vec![]);
    rig.answer("n3", vec![]);
    assert_eq!(rig.sizes(), "n1=4");
    rig.drop_tables(&[1, 2]);
    assert_eq!(rig.sizes(), "n1=2");
    rig.add_tables(300, &[11, 12]);
    rig.create_all();
    assert_eq!(rig.sizes(), "n1=2 n2=1 n3=1");
    rig.nodes(&["n1", "n3"]);
    rig.create_all();
    assert_eq!(rig.sizes(), "n1=2 n3=2");
    rig.nodes(&["n1"]);
    rig.create_all();
    assert_eq!(rig.sizes(), "n1=4");
}

#[test]
fn a_node_that_joined_gets_spans_only_after_it_answered() {
    let mut rig = Rig::working(0);
    rig.nodes(&["n1", "n2"]);
    rig.add_tables(300, &[1, 2]);
    rig.create_all();
    assert_eq!(rig.sizes(), "n1=2");
    rig.answer("n2", vec![]);
    rig.add_tables(301, &[3]);
    rig.create_all();
    assert_eq!(rig.sizes(), "n1=2 n2=1");
}

// behaviour: maintainer-30, scheduling-130
#[test]
fn a_dispatcher_that_ends_by_itself_is_created_again() {
    let mut rig = Rig::working(1);
    rig.report("n1", &[status(2, Stopped, 0)], 100, 3);
    assert_eq!(rig.core.placement().spans.standing(rig.id(2)), Some(Standing::Scheduling));
    rig.says(&expect!["+add, create d2 t1@100 on n1"]);
}

#[test]
fn the_trigger_is_never_placed_whatever_is_said_of_it() {
    let mut rig = Rig::working(1);
    rig.report("n1", &[status(1, Stopped, 0)], 100, 3);
    rig.tick(1_000);
    rig.says(&expect!["-"]);
    assert_eq!(rig.core.placement().spans.count(Standing::Absent), 0);
}

// behaviour: maintainer-63, scheduling-133
#[test]
fn sources_of_a_merge_that_end_are_forgotten_when_another_span_covers_them() {
    let mut rig = Rig::working(1);
    for (id, start, end) in [(50, "", "m"), (51, "m", "")] {
        let range = TableSpan {
            keyspace_id: 0,
            table: heartbeatpb::TableId(1),
            start: start.into(),
            end: end.into(),
        };
        let span = SpanReplica::absent(rig.id(id), SchemaId(1), range, Ts(100));
        rig.core.placement.spans.add_replicating(span, "n1".into());
    }
    rig.report("n1", &[status(50, Stopped, 0), status(51, Stopped, 0)], 100, 3);
    assert_eq!(rig.core.placement().spans.len(), 1);
    assert_eq!(rig.core.placement().spans.count(Standing::Absent), 0);
}

#[test]
fn a_dispatcher_that_nobody_wants_is_removed_and_that_is_not_said_all_the_time() {
    let mut rig = Rig::working(1);
    rig.report("n1", &[status(77, Working, 100), status(78, Initializing, 100)], 100, 3);
    rig.report("n1", &[status(77, Working, 100)], 100, 3);
    rig.says(&expect!["remove d77 on n1"]);
    rig.tick(5_000);
    rig.report("n1", &[status(77, Working, 100), status(79, Stopped, 0)], 100, 3);
    rig.says(&expect!["remove d77 on n1"]);
}

#[test]
fn a_report_of_a_node_that_lost_the_span_is_ignored() {
    let mut rig = Rig::working(1);
    rig.nodes(&["n1", "n2"]);
    rig.answer("n2", vec![]);
    rig.out.clear();
    rig.report("n2", &[status(2, Stopped, 0), status(2, Working, 900)], u64::MAX, 1);
    rig.says(&expect!["-"]);
    let span = rig.core.placement().spans.get(rig.id(2)).map(|span| (span.state, span.checkpoint));
    assert_eq!(span, Some((Working, Ts(100))));
}

#[test]
fn a_dispatcher_that_is_left_out_of_two_complete_reports_is_created_again() {
    let mut rig = Rig::working(2);
    rig.complete("n1", &[status(2, Working, 100)]);
    rig.says(&expect!["-"]);
    rig.complete("n1", &[status(2, Working, 100), status(3, Working, 100)]);
    rig.complete("n1", &[status(2, Working, 100)]);
    rig.says(&expect!["-"]);
    rig.complete("n1", &[status(2, Working, 100)]);
    rig.says(&expect!["+add, create d3 t2@100 on n1"]);
}

#[test]
fn a_persisted_checkpoint_reaches_upstream_and_sink_unless_it_is_ahead() {
    let mut rig = Rig::working(1);
    rig.report("n1", &[], 200, 3);
    rig.persisted(200);
    rig.says(&expect!["confirm 200, checkpoint 200 to n1"]);
    rig.persisted(201);
    rig.says(&expect!["-"]);
}

#[test]
fn a_drain_target_is_told_with_what_is_left_on_it() {
    let mut rig = Rig::working(3);
    let before = rig.core.version();
    rig.core.on_drain(&DrainTarget { node: Some("n1".into()), epoch: 4 }, rig.now);
    assert!(rig.core.version() > before);
    let drain = rig.core.status().drain.map(|drain| (drain.epoch, drain.dispatchers, drain.inflight_moves));
    assert_eq!(drain, Some((4, 3, 0)));
    rig.core.on_drain(&DrainTarget { node: None, epoch: 4 }, rig.now);
    assert_eq!(rig.core.status().drain, None);
}
