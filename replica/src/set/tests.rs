//! The span set against the slow way of computing what it says.

use heartbeatpb::{ComponentState, Mode};
use proptest::prelude::*;

use super::*;
use crate::holes;

const TRIGGER: DispatcherId = DispatcherId::new(9, 9);

fn id(n: u64) -> DispatcherId {
    DispatcherId::new(1, n + 1)
}

fn empty() -> SpanSet {
    SpanSet::new(SpanReplica::absent(TRIGGER, SchemaId::DDL, TableSpan::ddl(), Ts(1)))
}

/// Every third span is a part of its table.
fn span(n: u64) -> SpanReplica {
    let table = TableId(n.cast_signed() + 1);
    let mut range = TableSpan::whole(table);
    if n % 3 == 2 {
        range.end = vec![7];
    }
    SpanReplica::absent(id(n), SchemaId(1), range, Ts(n * 10))
}

fn status(id: DispatcherId, ts: u64) -> TableSpanStatus {
    TableSpanStatus {
        id,
        state: ComponentState::Working,
        checkpoint: Ts(ts),
        event_size_per_second: 0.0,
        mode: Mode::Default,
    }
}

/// What the set must say, computed the slow way.
fn check(set: &SpanSet) {
    let held = |id| set.spans.get(id).is_some_and(|entry| entry.held);
    let floor = set
        .iter()
        .filter(|(standing, span)| *standing != Standing::Replicating || held(span.id))
        .map(|(_, span)| span.checkpoint)
        .min();
    assert_eq!(set.floor(), floor);
    for standing in [Standing::Absent, Standing::Scheduling, Standing::Replicating] {
        assert_eq!(set.count(standing), set.iter().filter(|(s, _)| *s == standing).count());
        for (group, index) in set.groups() {
            let slow = set.iter().filter(|(s, span)| *s == standing && span.group() == group).count();
            assert_eq!(index.count(standing), slow);
            assert!(group == GroupId::Default || !index.is_empty(), "only the default group may be empty");
        }
    }
    for (standing, span) in set.iter() {
        assert_eq!(span.node.is_none(), standing == Standing::Absent, "RP-1");
        assert!(set.by_table(span.span.table).any(|s| s.id == span.id));
        assert!(set.by_schema(span.schema).any(|s| s.id == span.id));
    }
    for schema in (1..=4).map(SchemaId) {
        let slow = set.iter().filter(|(_, span)| span.schema == schema).count();
        assert_eq!(set.by_schema(schema).count(), slow);
    }
    assert_eq!(set.by_schema.values().map(|count| *count as usize).sum::<usize>(), set.len());
    for node in ["a", "b"].map(NodeId::from) {
        let bound = || set.iter().filter(|(_, s)| s.node.as_ref() == Some(&node));
        assert_eq!(set.size_by_node(&node), bound().count());
        for (group, index) in set.groups() {
            let counts = index.on_node(&node);
            let scheduling =
                bound().filter(|(s, r)| *s == Standing::Scheduling && r.group() == group).count();
            assert_eq!(counts.spans, bound().filter(|(_, r)| r.group() == group).count());
            assert_eq!(counts.scheduling, scheduling);
        }
    }
}

proptest! {
    // behaviour: scheduling-3, scheduling-78, scheduling-79, scheduling-80
    #[test]
    fn the_indexes_agree_with_the_spans_after_any_changes(
        steps in prop::collection::vec((0u8..11, 0u64..9, 0u64..200), 0..200)
    ) {
        let mut set = empty();
        let mut known_nodes = BTreeSet::new();
        for (what, n, ts) in steps {
            let node = NodeId::from(if ts % 2 == 0 { "a" } else { "b" });
            match what {
                0 => { set.add_absent(span(n)); }
                1 => { set.bind(id(n), node); }
                2 => { set.mark_replicating(id(n)); }
                3 => { set.mark_absent(id(n)); }
                4 => { set.remove(id(n)); }
                5 => { set.observe(&status(id(n), ts)); }
                6 => { set.hold(id(n), ts % 3 == 0); }
                7 => { set.raise(id(n), Ts(ts)); }
                8 => { set.mark_scheduling(id(n)); }
                9 => set.change_schema(TableId(n.cast_signed() + 1), SchemaId(ts.cast_signed() % 3 + 1)),
                _ => { set.add_replicating(span(n), node); }
            }
            check(&set);
            for node in set.take_crossings() {
                if set.size_by_node(&node) > 0 { known_nodes.insert(node); } else { known_nodes.remove(&node); }
            }
            prop_assert_eq!(known_nodes.iter().collect::<Vec<_>>(), set.nodes().collect::<Vec<_>>());
        }
    }
}

// behaviour: scheduling-74, scheduling-77
#[test]
fn a_span_is_replaced_by_its_parts_in_one_step_or_not_at_all() {
    let mut set = empty();
    set.add_table(id(0), SchemaId(3), TableId(5), true, Ts(50));
    set.bind(id(0), "a".into());
    set.mark_replicating(id(0));
    let part = |n: u64, start: &[u8], end: &[u8]| {
        (id(n), TableSpan { start: start.into(), end: end.into(), ..TableSpan::whole(TableId(5)) })
    };
    let halves = [part(1, b"", b"m"), part(2, b"m", b"")];
    assert_eq!(set.replace(id(7), &halves, Ts(80), &[]), None, "an unknown span");
    assert_eq!(set.replace(id(0), &[part(1, b"", b"m"), part(1, b"m", b"")], Ts(80), &[]), None, "one id");
    assert_eq!(
        set.replace(id(0), &[part(1, b"", b"m"), part(0, b"m", b"")], Ts(80), &[]),
        None,
        "its own id"
    );
    assert_eq!(set.replace(id(0), &[part(1, b"", b"m"), part(2, b"n", b"")], Ts(80), &[]), None, "a hole");
    assert_eq!((set.len(), set.is_replicating(id(0)), set.floor()), (1, true, None), "nothing changed");

    assert_eq!(set.replace(id(0), &halves, Ts(80), &["a".into()]), Some(false), "one node for two parts");
    check(&set);
    assert_eq!((set.count(Standing::Absent), set.floor()), (2, Some(Ts(50))), "the smaller checkpoint");
    assert_eq!(set.by_schema(SchemaId(3)).filter(|span| span.splittable).count(), 2);
    let quarters = [part(3, b"", b"c"), part(4, b"c", b"m")];
    assert_eq!(set.replace(id(1), &quarters, Ts(40), &["a".into(), "b".into()]), Some(true));
    check(&set);
    assert_eq!((set.count(Standing::Scheduling), set.floor()), (2, Some(Ts(40))));
    let group = GroupId::Table(TableId(5));
    assert_eq!(set.ids_on_node_in(&"b".into(), group).collect::<Vec<_>>(), [id(4)]);
    assert_eq!(set.ids_on_node_in(&"b".into(), GroupId::Default).count(), 0);
    assert!(holes(TableId(5), set.by_table(TableId(5)).map(|span| &span.span)).is_empty());
}

// behaviour: scheduling-67, scheduling-68, scheduling-70
#[test]
fn a_table_is_added_once_and_found_by_id_table_and_schema() {
    let mut set = empty();
    assert!(set.add_table(id(0), SchemaId(1), TableId(5), true, Ts(10)));
    assert!(!set.add_table(id(1), SchemaId(1), TableId(5), true, Ts(20)), "it has a span");
    assert!(!set.add_table(id(1), SchemaId(1), TableId(6), true, Ts::ZERO), "zero is no position");
    assert_eq!((set.task_size(), set.len(), set.table_count()), (2, 1, 1));
    assert_eq!(set.get(id(0)).map(|span| span.checkpoint), Some(Ts(10)));
    assert_eq!(set.by_table(TableId(5)).count(), 1);
    assert_eq!(set.by_schema(SchemaId(1)).count(), 1);
    assert_eq!(set.by_schema(SchemaId(7)).count() + set.by_table(TableId(7)).count(), 0);
    assert!(set.get(id(7)).is_none());
    assert_eq!(set.by_schema(SchemaId::DDL).map(|span| span.id).collect::<Vec<_>>(), [TRIGGER]);
    assert_eq!(set.by_table(TableId::DDL).map(|span| span.id).collect::<Vec<_>>(), [TRIGGER]);
}

// behaviour: scheduling-69, maintainer-88
#[test]
fn a_table_that_moves_to_another_schema_is_found_there() {
    let mut set = empty();
    set.add_table(id(0), SchemaId(1), TableId(5), true, Ts(10));
    set.change_schema(TableId(5), SchemaId(2));
    assert_eq!(set.by_schema(SchemaId(1)).count(), 0);
    assert_eq!(set.by_schema(SchemaId(2)).map(|span| span.schema).collect::<Vec<_>>(), [SchemaId(2)]);
}

// behaviour: scheduling-71, scheduling-72
#[test]
fn the_committed_checkpoint_starts_at_the_triggers_and_never_goes_back() {
    let mut set = empty();
    assert_eq!(set.committed(), Ts(1));
    set.advance_committed(Ts(10));
    set.advance_committed(Ts(5));
    set.advance_committed(Ts::MAX);
    assert_eq!(set.committed(), Ts(10));
    set.advance_committed(Ts(20));
    set.add_table(id(0), SchemaId(1), TableId(5), true, Ts(5));
    let config = set.get(id(0)).map(|span| span.create_config(set.committed(), Mode::Default));
    assert_eq!(config.map(|config| config.start_ts), Some(Ts(20)));
}

// behaviour: scheduling-76, scheduling-77
#[test]
fn spans_that_nobody_replicates_hold_the_floor() {
    let mut set = empty();
    set.add_table(id(0), SchemaId(1), TableId(5), true, Ts(100));
    set.add_table(id(1), SchemaId(1), TableId(6), true, Ts(80));
    assert_eq!(set.floor(), Some(Ts(80)));
    set.bind(id(1), "a".into());
    set.observe(&status(id(1), 120));
    assert_eq!(set.floor(), Some(Ts(100)));
    set.observe(&status(TRIGGER, 3));
    set.observe(&status(id(1), 110));
    assert_eq!(set.floor(), Some(Ts(100)), "neither the trigger nor old news count");
    set.bind(id(0), "a".into());
    set.mark_replicating(id(0));
    assert_eq!(set.floor(), Some(Ts(120)));
    set.mark_replicating(id(1));
    assert_eq!(set.floor(), None);
    set.hold(id(1), true);
    assert_eq!(set.floor(), Some(Ts(120)), "an operator holds it");
    set.remove(id(1));
    assert_eq!(set.floor(), None);
}

// behaviour: scheduling-73, scheduling-75
#[test]
fn what_cannot_be_is_refused() {
    let mut set = empty();
    for refused in [
        set.mark_absent(TRIGGER),
        set.bind(TRIGGER, "a".into()),
        set.mark_replicating(id(3)),
        set.bind(id(3), "a".into()),
        set.observe(&status(id(3), 1)),
        set.add_absent(SpanReplica::absent(id(3), SchemaId::DDL, TableSpan::ddl(), Ts(1))),
        set.add_absent(SpanReplica::absent(TRIGGER, SchemaId(1), TableSpan::whole(TableId(3)), Ts(1))),
    ] {
        assert!(!refused);
    }
    set.add_absent(span(0));
    assert!(
        !set.mark_replicating(id(0)) && !set.mark_scheduling(id(0)),
        "a span without a node runs nowhere"
    );
    set.bind(id(0), "a".into());
    assert!(set.mark_replicating(id(0)));
    assert!(set.mark_absent(id(0)));
    assert_eq!((set.count(Standing::Absent), set.size_by_node(&"a".into())), (1, 0));
    assert!(set.remove(id(0)).is_some() && set.remove(id(0)).is_none());
    assert!(set.is_empty() && set.nodes().next().is_none());
    assert_eq!(set.remove(TRIGGER).map(|span| span.id), Some(TRIGGER));
    assert_eq!(set.task_size(), 0);
}
