//! Long histories of tables that come apart and together again.

use super::*;
use crate::{Basic, Scheduler};

// behaviour: scheduling-107
#[test]
fn a_hot_table_is_divided_into_four_and_its_parts_are_placed_evenly() {
    let mut field = Field::new(settings(0, 1_000), &["a", "b"]);
    let table = field.whole(1, "a");
    field.hear_all(&[table], &[1_200], 2);
    assert!(field.split(10).is_empty());
    field.hear(table, 1_200);
    let split = field.split(10);
    assert_eq!(text(&split), ["split 1 into 4 ByTraffic []"]);
    field.apply(&split);
    assert_eq!(field.spans.count(Standing::Absent), 4);
    let mut placed = Vec::new();
    field.look(|_, view| Basic::new(1_000, 20).tick(view, &mut placed));
    field.apply(&placed);
    assert_eq!(field.on_nodes(), "a=2 b=2");
}

// behaviour: scheduling-108
#[test]
fn a_node_that_joins_takes_half_of_every_table_and_gives_it_back_when_it_dies() {
    let mut field = Field::new(LoadSettings { max_lag: Duration::ZERO, ..settings(0, 0) }, &["a"]);
    let mut all = Vec::new();
    for table in 1..=100 {
        all.extend(field.parts(TableId(table), &["a"; 4]));
    }
    field.hear_all(&all, &[100; 400], 3);
    assert!(field.balance(CALM, 10_000).is_empty());
    field.nodes.insert("b".into());
    field.hear_all(&all, &[100; 400], 1);
    let moves = field.balance(CALM, 10_000);
    assert_eq!(moves.len(), 200);
    field.apply(&moves);
    for table in 1..=100 {
        let counts = field.spans.group(GroupId::Table(TableId(table))).unwrap();
        assert_eq!((counts.on_node(&"a".into()).spans, counts.on_node(&"b".into()).spans), (2, 2));
    }
    field.nodes.remove(&NodeId::from("b"));
    let lost: Vec<DispatcherId> = field.spans.ids_by_node(&"b".into()).collect();
    for span in lost {
        field.spans.mark_absent(span);
    }
    field.hear_all(&all, &[100; 400], 1);
    assert!(field.balance(CALM, 10_000).is_empty(), "placing comes first");
    let mut rounds = 0;
    while field.spans.count(Standing::Absent) > 0 {
        let mut placed = Vec::new();
        field.look(|_, view| Basic::new(10_000, 1).tick(view, &mut placed));
        assert!(placed.len() <= 100, "one part of each table at a time");
        field.apply(&placed);
        rounds += 1;
    }
    assert_eq!((rounds, field.on_nodes().as_str()), (2, "a=400"));
}

// behaviour: scheduling-109
#[test]
fn a_third_node_gets_its_share_of_tables_in_two_parts_by_dividing_them() {
    let mut field = Field::new(LoadSettings { max_lag: Duration::ZERO, ..settings(0, 0) }, &["a", "b", "c"]);
    let mut all = Vec::new();
    for table in 1..=100 {
        all.extend(field.parts(TableId(table), &["a", "b"]));
    }
    field.hear_all(&all, &[900; 200], 3);
    let splits = field.balance(CALM, 10_000);
    assert_eq!(splits.len(), 100);
    let from = |node: &str| {
        let on = |decision: &&Decision| matches!(decision, Decision::Split { on, .. } if on.as_str() == node);
        splits.iter().filter(on).count()
    };
    assert_eq!((from("a"), from("b")), (50, 50), "not all of one node");
    field.apply(&splits);
    assert_eq!(field.spans.len(), 300);
    assert_eq!(field.on_nodes(), "a=100 b=100 c=100");
}

// behaviour: scheduling-111
#[test]
fn traffic_that_shifts_is_followed_step_by_step_until_nothing_is_left_to_do() {
    let mut field = Field::new(LoadSettings { rounds: 2, ..settings(0, 4_000) }, &["a", "b"]);
    field.parts(TABLE, &["a", "b"]);
    let mut steps: Vec<(usize, String)> = Vec::new();
    // What the first part of the table handles, then what all of it does: hot at one end, then cool everywhere.
    for round in 0..60 {
        let spans: Vec<(DispatcherId, bool)> = field
            .spans
            .iter()
            .map(|(_, span)| (span.id, span.span.start.first().is_none_or(|first| *first < 0x80)))
            .collect();
        let heads = spans.iter().filter(|(_, head)| *head).count() as u64;
        let tails = spans.len() as u64 - heads;
        for (span, head) in spans {
            let sample = match (round < 30, head) {
                (true, true) => 9_000 / heads,
                (true, false) => 1_000 / tails.max(1),
                (false, true) => 2_400 / (heads + tails),
                (false, false) => 2_400 / (heads + tails),
            };
            field.hear(span, sample.max(1));
        }
        let decisions = field.balance(CALM, 100);
        for step in text(&decisions) {
            steps.push((round, step));
        }
        field.apply(&decisions);
        let of_table: Vec<TableSpan> = field.spans.by_table(TABLE).map(|span| span.span.clone()).collect();
        assert!(replica::holes(TABLE, &of_table).is_empty());
    }
    let words: Vec<&str> = steps.iter().map(|(_, step)| step.split(' ').next().unwrap()).collect();
    assert!(steps.iter().all(|(round, _)| *round >= 2), "nothing before three samples: {steps:?}");
    assert!(words.contains(&"split"), "{steps:?}");
    assert!(words.contains(&"merge"), "{steps:?}");
    assert!(steps.iter().any(|(_, step)| step.contains(" from ")), "{steps:?}");
    let last = steps.iter().map(|(round, _)| *round).max().unwrap();
    assert!(last < 55, "it comes to rest: {steps:?}");
}
