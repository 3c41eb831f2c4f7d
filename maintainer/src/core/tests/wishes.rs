//! What people wish for, and what comes of it.

use expect_test::expect;
use heartbeatpb::ComponentState::Working;
use heartbeatpb::config::ReplicaConfig;
use heartbeatpb::{TableId, TableSpanStatus};

use super::rig::{Rig, span, status};
use crate::placements::Wish;

fn across(config: &mut ReplicaConfig) {
    config.scheduler.enable_table_across_nodes = true;
    config.scheduler.region_threshold = 0;
}

/// Two nodes; `tables` tables on the first one that may be divided.
fn divisible(tables: i64) -> Rig {
    let mut rig = Rig::working_with(tables, across);
    rig.nodes(&["n1", "n2"]);
    rig.answer("n2", vec![]);
    rig.out.clear();
    rig
}

fn table(n: i64) -> TableId {
    TableId(n)
}

fn shift(n: i64, to: &str, wait: bool) -> Wish {
    Wish::Move { table: table(n), to: to.into(), wait }
}

// behaviour: scheduling-66
#[test]
fn without_settings_tables_are_not_divided_whatever_they_handle() {
    let mut rig = Rig::with_a_second_node(1);
    for round in 1..20 {
        let hot = TableSpanStatus { event_size_per_second: 1e12, ..status(2, Working, 100 + round) };
        rig.report("n1", &[hot], 100 + round, 4);
        rig.tick(15_000);
    }
    rig.says(&expect!["-"]);
    assert!(rig.core.placement().operators.is_empty());
}

#[test]
fn a_table_is_moved_and_whoever_waits_hears_when_it_runs_there() {
    let mut rig = Rig::with_a_second_node(2);
    rig.wish(1, shift(1, "n2", true));
    rig.wish(2, shift(1, "n2", true));
    rig.wish(3, shift(2, "n2", false));
    assert_eq!(rig.answers(), ["answer 3: Ok(Done)"], "who does not wait hears that it has begun");
    rig.wish(4, shift(1, "n1", true));
    assert_eq!(rig.answers(), ["answer 4: Err(Occupied { table: 1, kind: \"move\" })"]);
    rig.tick(500);
    rig.come_to_rest();
    assert_eq!(rig.sizes(), "n2=2");
    assert_eq!(rig.answers(), ["answer 1: Ok(Done)", "answer 2: Ok(Done)"]);
    rig.wish(5, shift(1, "n2", true));
    assert_eq!(rig.answers(), ["answer 5: Ok(Done)"], "it is there");
}

#[test]
fn what_cannot_be_done_is_refused_by_name() {
    let mut rig = Rig::new();
    rig.wish(1, Wish::Count);
    assert_eq!(rig.answers(), ["answer 1: Err(NotReady)"]);
    let mut rig = Rig::with_a_second_node(1);
    rig.wish(1, shift(9, "n2", true));
    rig.wish(2, shift(0, "n2", true));
    rig.wish(3, shift(1, "n3", true));
    rig.wish(4, Wish::Split { table: table(1), pieces: None });
    rig.wish(5, Wish::Merge { table: table(1) });
    rig.nodes(&["n1", "n2", "n3"]);
    rig.wish(6, shift(1, "n3", true));
    rig.drain("n2", 4);
    rig.wish(7, shift(1, "n2", true));
    expect![[r#"
        answer 1: Err(UnknownTable(9))
        answer 2: Err(NotMovable)
        answer 3: Err(NodeNotReady(n3))
        answer 4: Err(WholeOnly)
        answer 5: Ok(Done)
        answer 6: Err(NodeNotReady(n3))
        answer 7: Err(NodeNotReady(n2))"#]]
    .assert_eq(&rig.answers().join("\n"));
    assert!(rig.core.placement().operators.is_empty(), "a refused wish has no effect");
    rig.remove(5, true, false);
    rig.wish(8, Wish::Tables);
    assert_eq!(rig.answers(), ["answer 8: Err(Leaving)"]);
}

#[test]
fn a_table_is_divided_where_the_upstream_says_and_joined_again() {
    let mut rig = divisible(1);
    rig.wish(1, Wish::Split { table: table(1), pieces: Some(3) });
    rig.wish(2, Wish::Split { table: table(1), pieces: None });
    assert_eq!(rig.answers(), ["answer 2: Err(Busy)"], "one after the other");
    rig.tick(100);
    rig.says(&expect!["ask 1 t1 for 3 pieces"]);
    rig.core.on_points(
        1,
        Ok(crate::SplitPoints { keys: vec![b"g".to_vec(), b"p".to_vec()], rows: None, bytes: None }),
        rig.now,
        &mut rig.out,
    );
    rig.come_to_rest();
    assert_eq!(rig.answers(), ["answer 1: Ok(Done)"]);
    rig.desired(&expect![[r#"
        t1 -g Replicating on n2 @150
        t1 g-p Replicating on n1 @150
        t1 p- Replicating on n2 @150"#]]);
    rig.wish(3, shift(1, "n2", true));
    rig.wish(4, Wish::Count);
    rig.wish(5, Wish::Tables);
    expect![[r#"
        answer 3: Err(Divided { table: 1, spans: 3 })
        answer 4: Ok(Count(4))
        answer 5: Ok(Tables({n1: [0, 1], n2: [1]}))"#]]
    .assert_eq(&rig.answers().join("\n"));
    rig.wish(6, Wish::Merge { table: table(1) });
    rig.come_to_rest();
    rig.desired(&expect![[r#"
        t1 -p Replicating on n2 @150
        t1 p- Replicating on n2 @150"#]]);
    rig.wish(7, Wish::MoveParts { table: table(1), to: "n1".into(), wait: true });
    rig.come_to_rest();
    rig.wish(8, Wish::Merge { table: table(1) });
    rig.come_to_rest();
    rig.desired(&expect!["t1 - Replicating on n1 @150"]);
    assert_eq!(rig.answers(), ["answer 6: Ok(Done)", "answer 7: Ok(Done)", "answer 8: Ok(Done)"]);
}

#[test]
fn without_an_answer_that_divides_it_a_table_stays_whole() {
    let mut rig = divisible(1);
    let before = rig.core.placement().spans.clone();
    for (ticket, keys) in [(1, vec![]), (2, vec!["p", "g"]), (3, vec![""])] {
        rig.wish(ticket, Wish::Split { table: table(1), pieces: None });
        rig.tick(100);
        rig.points(&keys);
    }
    rig.wish(4, Wish::Split { table: table(1), pieces: None });
    rig.tick(100);
    rig.core.on_points(4, Err("no connection".to_owned()), rig.now, &mut rig.out);
    rig.wish(5, Wish::Split { table: table(1), pieces: None });
    for _ in 0..320 {
        rig.tick(100);
    }
    expect![[r#"
        answer 1: Err(NotDivisible(1))
        answer 2: Err(NotDivisible(1))
        answer 3: Err(NotDivisible(1))
        answer 4: Err(Upstream("no connection"))
        answer 5: Err(Upstream("it did not answer"))"#]]
    .assert_eq(&rig.answers().join("\n"));
    rig.core.on_points(
        5,
        Ok(crate::SplitPoints { keys: vec![b"g".to_vec()], ..Default::default() }),
        rig.now,
        &mut rig.out,
    );
    rig.says(&expect!["-"]);
    assert_eq!(rig.core.placement().spans.iter().count(), before.iter().count());
}

#[test]
fn a_table_that_changes_while_the_upstream_thinks_is_not_divided() {
    let mut rig = divisible(1);
    rig.wish(1, Wish::Split { table: table(1), pieces: None });
    rig.tick(100);
    rig.wish(2, shift(1, "n2", false));
    rig.points(&["g"]);
    rig.come_to_rest();
    assert_eq!(rig.answers(), ["answer 2: Ok(Done)", "answer 1: Err(Interrupted)"]);
    assert_eq!(rig.sizes(), "n2=1");
    rig.wish(3, Wish::Split { table: table(1), pieces: None });
    rig.tick(100);
    rig.remove(5, true, false);
    rig.points(&["g"]);
    assert_eq!(rig.answers(), ["answer 3: Err(Leaving)"]);
    assert!(rig.core.placement().operators.is_empty());
}

#[test]
fn a_wish_that_something_comes_between_is_not_waited_for_in_vain() {
    let mut rig = Rig::with_a_second_node(2);
    rig.wish(1, shift(1, "n2", true));
    rig.nodes(&["n1"]);
    rig.come_to_rest();
    assert_eq!(rig.answers(), ["answer 1: Err(Interrupted)"]);
    rig.nodes(&["n1", "n2"]);
    rig.answer("n2", vec![]);
    rig.wish(2, shift(1, "n2", true));
    rig.drop_tables(&[1]);
    rig.tick(100);
    assert_eq!(rig.answers(), ["answer 2: Err(Interrupted)"]);
    rig.wish(3, shift(2, "n2", true));
    rig.tick(60_000);
    assert_eq!(rig.answers(), ["answer 3: Err(Timeout)"], "it goes on");
    assert!(!rig.core.placement().operators.is_empty());
}

#[test]
fn neighbours_on_two_nodes_are_brought_together_before_they_are_joined() {
    let mut rig = Rig::with(across);
    rig.nodes(&["n1", "n2"]);
    rig.load(1);
    rig.answer("n1", vec![span(71, 1, ("", "m"), Working)]);
    rig.answer("n2", vec![span(72, 1, ("m", ""), Working)]);
    rig.report("n1", &[status(71, Working, 120)], 120, 1);
    rig.wish(1, Wish::Merge { table: table(1) });
    rig.come_to_rest();
    rig.desired(&expect!["t1 - Replicating on n1 @150"]);
    assert_eq!(rig.answers(), ["answer 1: Ok(Done)"]);
}
