//! Merges that nodes remember, and what a new maintainer does with them.

use expect_test::expect;
use heartbeatpb::BootstrapTableSpan;
use heartbeatpb::ComponentState::{Initializing, MergeReady, Preparing, Stopped, WaitingMerge, Working};
use heartbeatpb::OperatorType::{Add, Remove};
use heartbeatpb::ScheduleAction::{Create, Remove as RemoveIt};

use super::rig::{Rig, WHOLE, span, status};

/// One node, `tables` tables at the upstream, and merges of 71 and 72 into 70.
fn taken_over(tables: i64, spans: Vec<BootstrapTableSpan>) -> Rig {
    let mut rig = Rig::new();
    rig.nodes(&["n1"]);
    rig.load(tables);
    rig.answer_with("n1", spans, vec![], vec![(70, &[72, 71])], 5);
    rig
}

fn sources() -> Vec<BootstrapTableSpan> {
    vec![span(71, 1, ("", "m"), WaitingMerge), span(72, 1, ("m", ""), WaitingMerge)]
}

fn with(mut spans: Vec<BootstrapTableSpan>, more: BootstrapTableSpan) -> Vec<BootstrapTableSpan> {
    spans.push(more);
    spans
}

// behaviour: maintainer-56, scheduling-45, scheduling-135
#[test]
fn a_merge_that_is_on_its_way_goes_on_under_the_new_epoch() {
    for target in [None, Some(Preparing), Some(MergeReady), Some(Initializing)] {
        let mut spans = sources();
        spans.extend(target.map(|state| span(70, 1, WHOLE, state)));
        let mut rig = taken_over(1, spans);
        rig.desired(&expect![[r#"
            t1 - Scheduling on n1 @120 merge
            t1 -m Replicating on n1 @120 occupy
            t1 m- Replicating on n1 @120 occupy"#]]);
        rig.tick(0);
        rig.tick(500);
        let said: Vec<String> = std::mem::take(&mut rig.out).iter().map(super::rig::text).collect();
        assert!(said.contains(&"merge d71+d72 into d70 on n1".to_owned()), "{target:?}: {said:?}");
        rig.report("n1", &[status(70, Working, 130)], 120, 1);
        rig.desired(&expect!["t1 - Replicating on n1 @130"]);
        assert!(rig.core.placement().operators.is_empty());
    }
}

#[test]
fn the_checkpoint_does_not_pass_a_merge_that_goes_on() {
    let mut rig = taken_over(1, sources());
    rig.report("n1", &[], 500, 9);
    assert_eq!(rig.checkpoint(), 120);
    rig.report("n1", &[status(70, Working, 130)], 500, 10);
    assert_eq!(rig.checkpoint(), 500, "the node answers for its spans");
}

#[test]
fn a_merge_that_is_over_leaves_its_target() {
    let mut rig = taken_over(1, with(sources(), span(70, 1, WHOLE, Working)));
    rig.desired(&expect!["t1 - Replicating on n1 @120"]);
    rig.report("n1", &[status(71, Stopped, 120), status(72, Stopped, 120)], 120, 1);
    rig.desired(&expect!["t1 - Replicating on n1 @120"]);
}

// behaviour: maintainer-59
#[test]
fn a_merge_that_misses_a_source_goes_by_how_far_its_target_is() {
    let one = || vec![span(71, 1, ("", "m"), WaitingMerge)];
    let rig = taken_over(1, one());
    rig.desired(&expect![[r#"
        t1 -m Replicating on n1 @120
        t1 m- Scheduling on n1 @100 add"#]]);
    for state in [Preparing, MergeReady] {
        let mut rig = taken_over(1, with(one(), span(70, 1, WHOLE, state)));
        rig.desired(&expect![[r#"
            t1 - Replicating on n1 @120 remove
            t1 -m Replicating on n1 @120"#]]);
        rig.report("n1", &[status(70, Stopped, 0)], 100, 1);
        rig.desired(&expect![[r#"
            t1 -m Replicating on n1 @120
            t1 m- Scheduling on n1 @100 add"#]]);
    }
    let mut rig = taken_over(1, with(one(), span(70, 1, WHOLE, Initializing)));
    rig.desired(&expect!["t1 - Replicating on n1 @120"]);
    rig.out.clear();
    rig.report("n1", &[status(70, Working, 130)], 100, 1);
    rig.desired(&expect!["t1 - Replicating on n1 @130"]);
    rig.says(&expect!["-"]);
}

// behaviour: maintainer-60
#[test]
fn a_merge_of_spans_that_are_no_neighbours_does_not_go_on() {
    let apart = || vec![span(71, 1, ("", "g"), WaitingMerge), span(72, 1, ("m", ""), WaitingMerge)];
    let mut rig = taken_over(1, with(apart(), span(70, 1, WHOLE, Preparing)));
    rig.desired(&expect![[r#"
        t1 - Replicating on n1 @120 remove
        t1 -g Replicating on n1 @120
        t1 m- Replicating on n1 @120"#]]);
    rig.report("n1", &[status(70, Stopped, 0)], 100, 1);
    rig.desired(&expect![[r#"
        t1 -g Replicating on n1 @120
        t1 g-m Scheduling on n1 @100 add
        t1 m- Replicating on n1 @120"#]]);
    let rig = taken_over(1, apart());
    rig.desired(&expect![[r#"
        t1 -g Replicating on n1 @120
        t1 g-m Scheduling on n1 @100 add
        t1 m- Replicating on n1 @120"#]]);
}

// behaviour: maintainer-61, scheduling-135
#[test]
fn a_merge_of_a_table_that_is_gone_is_forgotten() {
    let mut rig = taken_over(0, with(sources(), span(70, 1, WHOLE, Preparing)));
    rig.desired(&expect![[r#"
        t1 - Replicating on n1 @120 remove
        t1 -m Replicating on n1 @120 remove
        t1 m- Replicating on n1 @120 remove"#]]);
    rig.report("n1", &[status(70, Stopped, 0), status(71, Stopped, 120), status(72, Stopped, 120)], 100, 1);
    rig.desired(&expect![""]);
    assert!(rig.core.placement().operators.is_empty());
}

// behaviour: maintainer-62, scheduling-135
#[test]
fn a_merge_against_a_creation_or_removal_of_its_source_does_not_go_on() {
    let conflict = |action, operator, target| {
        let mut rig = Rig::new();
        rig.nodes(&["n1"]);
        rig.load(1);
        let mut request = rig.journal(72, 1, action, operator);
        request.config.span.start = b"m".to_vec();
        let mut spans = vec![span(71, 1, ("", "m"), WaitingMerge), span(70, 1, WHOLE, target)];
        if action == RemoveIt {
            spans.push(span(72, 1, ("m", ""), Working));
        }
        rig.answer_with("n1", spans, vec![request], vec![(70, &[71, 72])], 5);
        rig
    };
    let mut rig = conflict(Create, Add, Preparing);
    rig.desired(&expect![[r#"
        t1 - Replicating on n1 @120 remove
        t1 -m Replicating on n1 @120
        t1 m- Scheduling on n1 @110 add"#]]);
    rig.report("n1", &[status(70, Stopped, 0), status(72, Working, 125)], 100, 1);
    rig.desired(&expect![[r#"
        t1 -m Replicating on n1 @120
        t1 m- Replicating on n1 @125"#]]);

    let mut rig = conflict(RemoveIt, Remove, Preparing);
    rig.desired(&expect![[r#"
        t1 - Replicating on n1 @120 remove
        t1 -m Replicating on n1 @120
        t1 m- Replicating on n1 @120 remove"#]]);
    rig.report("n1", &[status(70, Stopped, 0), status(72, Stopped, 125)], 100, 1);
    rig.desired(&expect![[r#"
        t1 -m Replicating on n1 @120
        t1 m- Scheduling on n1 @100 add"#]]);

    let mut rig = conflict(RemoveIt, Remove, Initializing);
    rig.desired(&expect![[r#"
        t1 - Replicating on n1 @120
        t1 m- Replicating on n1 @120 remove"#]]);
    rig.report("n1", &[status(72, Stopped, 125)], 100, 1);
    rig.desired(&expect!["t1 - Replicating on n1 @120"]);
    assert!(rig.core.placement().operators.is_empty());
    let rig = conflict(Create, Add, Initializing);
    rig.desired(&expect!["t1 - Replicating on n1 @120"]);
}

#[test]
fn journals_that_say_nothing_usable_change_nothing() {
    let mut rig = Rig::new();
    rig.nodes(&["n1", "n2"]);
    rig.load(1);
    // One source, itself as a source, nobody as the target, and another node's spans.
    let merges: Vec<(u64, &[u64])> = vec![(70, &[71, 71]), (71, &[71, 72]), (0, &[71, 72]), (73, &[71, 72])];
    rig.answer_with("n1", vec![], vec![], merges, 5);
    rig.answer("n2", vec![span(71, 1, ("", "m"), Working), span(72, 1, ("m", ""), Working)]);
    rig.desired(&expect![[r#"
        t1 -m Replicating on n2 @120
        t1 m- Replicating on n2 @120"#]]);
    assert!(rig.core.placement().operators.is_empty());
}
