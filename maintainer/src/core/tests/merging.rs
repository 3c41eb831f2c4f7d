//! Histories of taking over what nodes run.

use expect_test::expect;
use heartbeatpb::ComponentState::{Initializing, Preparing, Stopped, WaitingMerge, Working};
use heartbeatpb::OperatorType::{Add, Move, Remove};
use heartbeatpb::ScheduleAction::{Create, Remove as RemoveIt};

use super::rig::{Rig, WHOLE, span, status};

/// One node, `tables` tables at the upstream.
fn rig(tables: i64) -> Rig {
    let mut rig = Rig::new();
    rig.nodes(&["n1"]);
    rig.load(tables);
    rig
}

// behaviour: maintainer-24, maintainer-51
#[test]
fn what_runs_is_taken_over_with_its_ids_and_the_rest_is_created() {
    let mut rig = rig(4);
    rig.answer("n1", vec![span(71, 1, WHOLE, Working), span(72, 2, WHOLE, Working)]);
    rig.desired(&expect![[r#"
        t1 - Replicating on n1 @120
        t2 - Replicating on n1 @120
        t3 - Scheduling on n1 @100 add
        t4 - Scheduling on n1 @100 add"#]]);
    assert!(rig.core.placement().spans.get(rig.id(71)).is_some());
    let before = rig.core.placement().spans.len();
    rig.answer("n1", vec![span(99, 1, WHOLE, Working)]);
    assert_eq!(rig.core.placement().spans.len(), before, "a second answer changes nothing");
}

// behaviour: maintainer-71
#[test]
fn what_cannot_be_taken_over_is_left_out() {
    let mut rig = rig(1);
    let mut unset = span(71, 1, WHOLE, Working);
    unset.checkpoint = heartbeatpb::Ts::ZERO;
    let backwards = span(72, 1, ("m", "c"), Working);
    rig.answer(
        "n1",
        vec![
            unset,
            backwards,
            span(73, 1, WHOLE, Stopped),
            span(1, 0, WHOLE, Working),
            span(74, 9, WHOLE, Working),
        ],
    );
    rig.desired(&expect![[r#"
        t1 - Absent @100
        t9 - Replicating on n1 @120 remove"#]]);
    rig.report("n1", &[status(74, Stopped, 130)], 100, 1);
    rig.desired(&expect!["t1 - Scheduling on n1 @100 add"]);
}

#[test]
fn a_table_that_a_replayed_change_creates_again_waits_until_its_earlier_dispatcher_is_gone() {
    let mut rig = rig(1);
    rig.answer("n1", vec![span(71, 1, WHOLE, Working), span(74, 9, WHOLE, Working)]);
    rig.desired(&expect![[r#"
        t1 - Replicating on n1 @120
        t9 - Replicating on n1 @120 remove"#]]);
    let created = heartbeatpb::AddedTable {
        table: heartbeatpb::TableId(9),
        schema: heartbeatpb::SchemaId(1),
        splittable: true,
    };
    let now = rig.now;
    rig.core.placement.apply(None, &[created], &[], heartbeatpb::Ts(115), now);
    rig.desired(&expect![[r#"
        t1 - Replicating on n1 @120
        t9 - Replicating on n1 @120 remove"#]]);
    rig.report("n1", &[status(74, Stopped, 130)], 100, 1);
    rig.desired(&expect![[r#"
        t1 - Replicating on n1 @120
        t9 - Scheduling on n1 @115 add"#]]);
}

// behaviour: maintainer-53
#[test]
fn creations_that_were_in_flight_go_on_and_stale_ones_do_not() {
    let mut rig = rig(2);
    let journal = vec![
        rig.journal(71, 1, Create, Add),
        rig.journal(72, 9, Create, Add),
        rig.journal(73, 9, Create, Move),
        rig.journal(74, 2, Create, Add),
    ];
    rig.answer_of("n1", vec![span(73, 9, WHOLE, Working), span(74, 2, WHOLE, Initializing)], journal, 5);
    rig.desired(&expect![[r#"
        t1 - Scheduling on n1 @110 add
        t2 - Replicating on n1 @120
        t9 - Replicating on n1 @120 remove"#]]);
    assert!(rig.core.placement().operators.contains(rig.id(71)));
}

// behaviour: maintainer-54
#[test]
fn a_removal_that_was_in_flight_is_finished_before_its_keys_are_placed_anew() {
    let mut rig = rig(1);
    let journal = vec![rig.journal(71, 1, RemoveIt, Remove)];
    rig.answer_of("n1", vec![span(71, 1, ("", "m"), Working), span(72, 1, ("m", ""), Working)], journal, 5);
    rig.desired(&expect![[r#"
        t1 -m Replicating on n1 @120 remove
        t1 m- Replicating on n1 @120"#]]);
    rig.report("n1", &[status(71, Stopped, 125)], 100, 1);
    rig.desired(&expect![[r#"
        t1 -m Scheduling on n1 @100 add
        t1 m- Replicating on n1 @120"#]]);
    assert!(rig.core.placement().spans.get(rig.id(71)).is_none());
}

// behaviour: maintainer-55
#[test]
fn a_removal_of_a_dropped_table_is_finished_and_nothing_comes_back() {
    let mut rig = rig(0);
    let journal = vec![rig.journal(71, 9, RemoveIt, Remove), rig.journal(72, 8, RemoveIt, Move)];
    rig.answer_of("n1", vec![span(71, 9, WHOLE, Working), span(72, 8, WHOLE, Working)], journal, 5);
    rig.desired(&expect![[r#"
        t8 - Replicating on n1 @120 remove
        t9 - Replicating on n1 @120 remove"#]]);
    assert_eq!(rig.core.placement().operators.len(), 2);
    rig.report("n1", &[status(71, Stopped, 125), status(72, Stopped, 125)], 100, 1);
    rig.desired(&expect![""]);
    assert_eq!(rig.core.placement().operators.len(), 0);
}

#[test]
fn a_removal_that_was_part_of_a_move_gives_the_span_a_new_home() {
    let mut rig = rig(1);
    let journal = vec![rig.journal(71, 1, RemoveIt, Move), rig.journal(75, 1, RemoveIt, Remove)];
    rig.answer_of("n1", vec![span(71, 1, WHOLE, Working)], journal, 5);
    rig.desired(&expect!["t1 - Replicating on n1 @120 remove"]);
    rig.report("n1", &[status(71, Stopped, 125)], 100, 1);
    rig.desired(&expect!["t1 - Scheduling on n1 @125 add"]);
    assert!(rig.core.placement().spans.get(rig.id(71)).is_some(), "the same span");
}

// behaviour: maintainer-58
#[test]
fn of_two_spans_that_overlap_the_later_one_is_temporary() {
    let mut rig = rig(1);
    rig.answer("n1", vec![span(72, 1, ("c", ""), Working), span(71, 1, ("", "m"), Working)]);
    rig.desired(&expect![[r#"
        t1 -m Replicating on n1 @120
        t1 c- Replicating on n1 @120 remove"#]]);
    rig.report("n1", &[status(72, Stopped, 130)], 100, 1);
    rig.desired(&expect![[r#"
        t1 -m Replicating on n1 @120
        t1 m- Scheduling on n1 @100 add"#]]);
}

#[test]
fn an_unfinished_merge_target_gives_way_to_its_sources() {
    let mut rig = rig(1);
    rig.answer(
        "n1",
        vec![span(70, 1, WHOLE, Preparing), span(71, 1, ("", "m"), Working), span(72, 1, ("m", ""), Working)],
    );
    rig.desired(&expect![[r#"
        t1 - Replicating on n1 @120 remove
        t1 -m Replicating on n1 @120
        t1 m- Replicating on n1 @120"#]]);
    rig.report("n1", &[status(70, Stopped, 0)], 100, 1);
    rig.desired(&expect![[r#"
        t1 -m Replicating on n1 @120
        t1 m- Replicating on n1 @120"#]]);
}

// behaviour: maintainer-57
#[test]
fn a_merge_target_that_has_taken_over_and_its_waiting_sources_are_all_kept() {
    let mut rig = rig(1);
    rig.answer("n1", vec![span(70, 1, WHOLE, Initializing), span(71, 1, ("", "m"), WaitingMerge)]);
    rig.desired(&expect![[r#"
        t1 - Replicating on n1 @120
        t1 -m Replicating on n1 @120"#]]);
    assert!(rig.core.placement().operators.is_empty());
}

// behaviour: maintainer-64
#[test]
fn keys_that_no_reported_span_covers_are_placed() {
    let mut rig = rig(1);
    rig.answer("n1", vec![span(71, 1, ("b", "c"), Working), span(72, 1, ("c", "e"), Working)]);
    rig.desired(&expect![[r#"
        t1 -b Scheduling on n1 @100 add
        t1 b-c Replicating on n1 @120
        t1 c-e Replicating on n1 @120
        t1 e- Scheduling on n1 @100 add"#]]);
}

#[test]
fn one_dispatcher_on_two_nodes_counts_once() {
    let mut rig = Rig::new();
    rig.nodes(&["n1", "n2"]);
    rig.load(1);
    rig.answer("n2", vec![span(71, 1, WHOLE, Working)]);
    rig.answer("n1", vec![span(71, 1, WHOLE, Working)]);
    rig.desired(&expect!["t1 - Replicating on n1 @120"]);
}

#[test]
fn a_trigger_that_starts_later_than_asked_for_leaves_tables_at_the_checkpoint() {
    let mut rig = Rig::new();
    rig.trigger_start = 180;
    rig.nodes(&["n1"]);
    rig.load(1);
    rig.answer("n1", vec![]);
    rig.desired(&expect!["t1 - Scheduling on n1 @100 add"]);
    let trigger = rig.core.placement().spans.trigger().map(|trigger| trigger.checkpoint.0);
    assert_eq!(trigger, Some(180));
}
