//! Moves, splits and merges.

use super::*;
use crate::span::{MoveSpan, SplitSpan};

const LEFT: DispatcherId = DispatcherId::new(0, 11);
const RIGHT: DispatcherId = DispatcherId::new(0, 12);
const TARGET: DispatcherId = DispatcherId::new(0, 20);

fn part(start: &[u8], end: &[u8]) -> TableSpan {
    TableSpan { keyspace_id: 0, table: TableId(7), start: start.into(), end: end.into() }
}

impl Rig {
    /// Both spans replicate on the first node.
    fn running() -> Self {
        let mut rig = Self::new();
        for id in [SPAN, OTHER] {
            rig.spans.bind(id, "n1".into());
            rig.spans.mark_replicating(id);
        }
        rig
    }

    fn start_move(&mut self, id: DispatcherId, origin: &str, dest: &str) -> bool {
        let span = self.spans.get(id).cloned().unwrap();
        let operator = MoveSpan::new(&span, origin.into(), dest.into());
        self.call(|controller, cx| controller.add(Box::new(operator), cx))
    }

    fn split(&mut self, at: &[u8], nodes: &[&str]) -> bool {
        let span = self.spans.get(SPAN).cloned().unwrap();
        let parts = vec![(LEFT, part(b"", at)), (RIGHT, part(at, b"m"))];
        let nodes = nodes.iter().map(|node| NodeId::from(*node)).collect();
        let operator = SplitSpan::new(&span, "n1".into(), parts, nodes);
        self.call(|controller, cx| controller.add(Box::new(operator), cx))
    }

    fn merge(&mut self) -> bool {
        self.call(|controller, cx| controller.merge(&[SPAN, OTHER], TARGET, cx))
    }

    fn stands(&self, id: DispatcherId) -> String {
        let node = self.spans.get(id).and_then(|span| span.node.as_ref());
        match (self.spans.standing(id), node) {
            (None, _) => "gone".to_owned(),
            (Some(standing), None) => format!("{standing:?}"),
            (Some(standing), Some(node)) => format!("{standing:?} on {node}"),
        }
    }
}

// behaviour: scheduling-22, scheduling-23
#[test]
fn a_moved_span_is_created_only_after_its_origin_let_go() {
    let mut rig = Rig::running();
    assert!(rig.start_move(SPAN, "n1", "n2"));
    rig.status("n2", SPAN, Working, 30);
    rig.status("n1", SPAN, WaitingMerge, 12);
    rig.says(&expect!["+move, remove 1 to n1, [Scheduling on n1]"]);
    rig.status("n1", SPAN, Stopped, 15);
    rig.says(&expect!["create@15 1 to n2, [Scheduling on n2]"]);
    rig.status("n1", SPAN, Stopped, 15);
    rig.gone("n1");
    rig.status("n2", SPAN, Stopped, 0);
    rig.later(500);
    rig.says(&expect!["create@15 1 to n2, [Scheduling on n2]"]);
    rig.status("n2", SPAN, Working, 15);
    rig.says(&expect!["-move, [Replicating on n2]"]);

    let mut rig = Rig::running();
    rig.start_move(SPAN, "n1", "n2");
    rig.gone("n1");
    rig.says(&expect!["+move, remove 1 to n1, create@10 1 to n2, [Scheduling on n2]"]);
    rig.status("n2", SPAN, Working, 10);
    rig.says(&expect!["-move, [Replicating on n2]"]);
}

// behaviour: scheduling-20, scheduling-25
#[test]
fn a_move_whose_destination_dies_first_still_waits_for_its_origin() {
    let mut rig = Rig::running();
    rig.start_move(SPAN, "n1", "n2");
    rig.gone("n2");
    rig.later(500);
    rig.says(&expect!["+move, remove 1 to n1, remove 1 to n1, [Scheduling on n1]"]);
    rig.alive.insert("n2".into());
    rig.status("n1", SPAN, Stopped, 12);
    rig.says(&expect!["-move, [Absent]"]);
    assert_eq!(rig.spans.floor(), Some(Ts(12)), "where its origin ended");

    let mut rig = Rig::running();
    rig.start_move(SPAN, "n1", "n2");
    rig.gone("n2");
    rig.gone("n1");
    rig.says(&expect!["+move, remove 1 to n1, -move, [Absent]"]);
}

// behaviour: scheduling-21
#[test]
fn a_move_whose_destination_dies_after_the_origin_stopped_gives_the_span_back() {
    let mut rig = Rig::running();
    rig.start_move(SPAN, "n1", "n2");
    rig.status("n1", SPAN, Removed, 0);
    rig.gone("n2");
    rig.says(&expect!["+move, remove 1 to n1, create@10 1 to n2, -move, [Absent]"]);
}

// behaviour: scheduling-24
#[test]
fn a_move_between_dead_nodes_is_admitted_and_ends_with_an_absent_span() {
    let mut rig = Rig::running();
    rig.alive.clear();
    assert!(rig.start_move(SPAN, "n1", "n2"));
    assert_eq!((rig.stands(SPAN), rig.controller.len()), ("Absent".to_owned(), 0));
}

// behaviour: scheduling-26
#[test]
fn a_cancelled_move_leaves_the_span_where_it_was() {
    let mut rig = Rig::running();
    rig.start_move(SPAN, "n1", "n2");
    rig.out.clear();
    rig.call(|controller, cx| controller.cancel(SPAN, cx));
    rig.later(500);
    rig.says(&expect!["-move, [Replicating on n1]"]);
}

// behaviour: scheduling-27, scheduling-46
#[test]
fn moves_are_counted_by_the_node_they_leave_until_they_end() {
    let mut rig = Rig::running();
    rig.spans.bind(OTHER, "n2".into());
    rig.spans.mark_replicating(OTHER);
    assert!(!rig.start_move(SPAN, "n2", "n1"), "it is not there");
    assert!(rig.start_move(SPAN, "n1", "n1") && rig.controller.is_empty(), "it is there already");
    rig.start_move(SPAN, "n1", "n2");
    rig.start_move(OTHER, "n2", "n1");
    let count = |rig: &Rig, node: &str| rig.controller.moves_away_from(&node.into());
    assert_eq!(["n1", "n2", "n3"].map(|node| count(&rig, node)), [1, 1, 0]);
    rig.gone("n1");
    rig.gone("n2");
    assert_eq!((rig.spans.count(Standing::Absent), rig.spans.nodes().count()), (2, 0));
    assert_eq!(["n1", "n2"].map(|node| count(&rig, node)), [0, 0]);
}

// behaviour: scheduling-30, scheduling-33
#[test]
fn a_split_span_becomes_absent_parts_once_its_origin_stopped() {
    for nodes in [&[][..], &["n1"][..]] {
        let mut rig = Rig::running();
        assert!(rig.split(b"c", nodes));
        rig.status("n1", SPAN, WaitingMerge, 12);
        rig.later(500);
        rig.says(&expect!["+split, remove 1 to n1, remove 1 to n1, [Scheduling on n1]"]);
        rig.status("n1", SPAN, Stopped, 15);
        rig.says(&expect!["-split, [gone]"]);
        assert_eq!([LEFT, RIGHT].map(|id| rig.stands(id)), ["Absent", "Absent"]);
        assert_eq!(rig.spans.floor(), Some(Ts(15)), "where the origin ended");
    }
}

// behaviour: scheduling-31, scheduling-32
#[test]
fn parts_with_places_are_created_there_under_the_same_epoch() {
    let mut rig = Rig::running();
    rig.split(b"c", &["n2", "n9"]);
    rig.status("n1", SPAN, Stopped, 15);
    rig.says(&expect![
        "+split, remove 1 to n1, +add, create@15 11 to n2, +add, create@15 12 to n9, -add, -split, [gone]"
    ]);
    assert_eq!([LEFT, RIGHT].map(|id| rig.stands(id)), ["Scheduling on n2", "Absent"]);

    let mut rig = Rig::new();
    rig.spans.remove(SPAN);
    rig.spans.remove(OTHER);
    rig.spans.add_replicating(SpanReplica::absent(SPAN, SchemaId(1), part(b"", b"m"), Ts(5)), "n1".into());
    rig.split(b"c", &["n1", "n2"]);
    rig.status("n1", SPAN, Stopped, 5);
    assert_eq!([LEFT, RIGHT].map(|id| rig.stands(id)), ["Scheduling on n1", "Scheduling on n2"]);
}

// behaviour: scheduling-28, scheduling-34
#[test]
fn a_split_that_cannot_go_on_gives_the_whole_span_back() {
    let mut rig = Rig::running();
    rig.split(b"c", &["n1", "n2"]);
    rig.gone("n1");
    rig.says(&expect!["+split, remove 1 to n1, -split, [Absent]"]);
    assert_eq!(rig.spans.len(), 2);

    let mut rig = Rig::running();
    rig.split(b"c", &["n1", "n2"]);
    rig.call(|controller, cx| controller.cancel(SPAN, cx));
    rig.says(&expect!["+split, remove 1 to n1, -split, [Absent]"]);

    let mut rig = Rig::running();
    rig.split(b"x", &[]);
    rig.status("n1", SPAN, Stopped, 15);
    rig.says(&expect!["+split, remove 1 to n1, -split, [Absent]"]);
    assert_eq!(rig.spans.len(), 2, "parts that are not the span take nobody's place");
}

#[test]
fn dropping_a_table_that_is_being_split_leaves_no_part() {
    let mut rig = Rig::running();
    rig.split(b"c", &["n1", "n2"]);
    rig.out.clear();
    rig.call(|controller, cx| controller.remove_tables(&[TableId(7)], cx));
    rig.status("n1", SPAN, Stopped, 15);
    rig.says(&expect!["-split, +remove, remove 1 to n1, +remove, remove 2 to n1, -remove, [gone]"]);
    assert!(rig.spans.is_empty());
}

// behaviour: scheduling-35, scheduling-38, scheduling-39
#[test]
fn neighbours_become_one_span_when_their_node_says_that_it_works() {
    let mut rig = Rig::running();
    assert!(rig.merge());
    rig.says(&expect!["+occupy, +occupy, +merge, merge 1+2 into 20 to n1, [Replicating on n1]"]);
    assert_eq!(
        rig.spans.get(TARGET).map(|span| (span.checkpoint, span.span.clone())),
        Some((Ts(10), part(b"", b"")))
    );
    rig.status("n1", SPAN, Stopped, 30);
    rig.status("n2", TARGET, Working, 30);
    rig.later(500);
    rig.says(&expect!["merge 1+2 into 20 to n1, [Replicating on n1]"]);
    rig.status("n1", TARGET, Working, 30);
    rig.says(&expect!["-occupy, -occupy, -merge, [gone]"]);
    assert_eq!((rig.spans.len(), rig.stands(TARGET)), (1, "Replicating on n1".to_owned()));
    assert_eq!((rig.controller.len(), rig.spans.floor()), (0, None));
}

// behaviour: scheduling-36, scheduling-43, scheduling-48
#[test]
fn the_death_of_its_node_ends_a_merge_and_releases_the_sources() {
    let mut rig = Rig::running();
    rig.merge();
    rig.gone("n2");
    assert_eq!(rig.controller.len(), 3, "another node is nothing to it");
    rig.gone("n1");
    assert_eq!([SPAN, OTHER, TARGET].map(|id| rig.stands(id)), ["Absent", "Absent", "gone"]);
    assert!(rig.controller.is_empty());
}

// behaviour: scheduling-37, scheduling-44
#[test]
fn a_merge_that_is_given_up_leaves_its_sources_running() {
    let mut rig = Rig::running();
    rig.merge();
    assert!(rig.call(|controller, cx| controller.cancel_merge(TARGET, cx)));
    assert!(!rig.call(|controller, cx| controller.cancel_merge(TARGET, cx)));
    let after = ["Replicating on n1", "Replicating on n1", "gone"];
    assert_eq!([SPAN, OTHER, TARGET].map(|id| rig.stands(id)), after);
    assert!(rig.controller.is_empty());

    // A terminal word of the target does the same, except to a source that is known to have ended.
    rig.merge();
    rig.call(|_, cx| {
        let ended = TableSpanStatus {
            id: OTHER,
            state: Stopped,
            checkpoint: Ts(0),
            event_size_per_second: 0.0,
            mode: Mode::Default,
        };
        cx.spans.observe(&ended)
    });
    rig.status("n1", TARGET, Stopped, 0);
    assert_eq!([SPAN, OTHER, TARGET].map(|id| rig.stands(id)), ["Replicating on n1", "Absent", "gone"]);
}

#[test]
fn dropping_a_table_ends_its_merge_whichever_of_its_spans_comes_first() {
    for target in [TARGET, DispatcherId::new(0, u64::MAX), DispatcherId::new(0, 0xff)] {
        let mut rig = Rig::running();
        rig.call(|controller, cx| controller.merge(&[SPAN, OTHER], target, cx));
        rig.call(|controller, cx| controller.remove_tables(&[TableId(7)], cx));
        assert!(rig.spans.is_empty());
        let kinds: Vec<Kind> = rig.controller.kinds().collect();
        assert_eq!(kinds, [Kind::Remove; 3], "the target may have been created already");
        assert!(!rig.out.iter().any(|effect| matches!(effect, Effect::Uncovered(_))), "nothing to fill");
    }
}

// behaviour: scheduling-49
#[test]
fn a_refused_merge_leaves_everything_as_it_was() {
    let mut rig = Rig::running();
    rig.start_move(OTHER, "n1", "n2");
    rig.out.clear();
    assert!(!rig.merge(), "somebody has a source");
    assert!(rig.out.is_empty() && rig.controller.len() == 1 && !rig.controller.contains(SPAN));
    assert_eq!((rig.stands(TARGET), rig.spans.len()), ("gone".to_owned(), 2));

    let mut rig = Rig::running();
    let mut try_merge =
        |sources: &[DispatcherId], target| rig.call(|controller, cx| controller.merge(sources, target, cx));
    assert!(!try_merge(&[SPAN], TARGET), "one source");
    assert!(!try_merge(&[OTHER, SPAN], TARGET), "order");
    assert!(!try_merge(&[SPAN, OTHER], SPAN), "a target that is a source");
    assert!(!try_merge(&[SPAN, LEFT], TARGET), "unknown");
    rig.spans.mark_absent(OTHER);
    assert!(!rig.merge(), "nobody runs one");
    rig.spans.mark_absent(SPAN);
    assert!(!rig.merge(), "nobody runs both");
    let mut rig = Rig::running();
    rig.controller.quiesce_except([TARGET]);
    assert!(!rig.merge());
    assert!(rig.out.is_empty() && rig.controller.is_empty() && rig.spans.len() == 2);
}

// behaviour: scheduling-45
#[test]
fn a_merge_that_a_node_remembers_is_continued() {
    let mut rig = Rig::running();
    let span = SpanReplica::absent(TARGET, SchemaId(1), part(b"", b"x"), Ts(10));
    rig.spans.add_scheduling(span.clone(), "n1".into());
    assert!(!rig.merge(), "other keys");
    rig.spans.remove(TARGET);
    rig.spans.add_scheduling(SpanReplica { span: part(b"", b""), ..span }, "n1".into());
    assert!(rig.merge());
    rig.says(&expect!["+occupy, +occupy, +merge, merge 1+2 into 20 to n1, [Replicating on n1]"]);
}

// behaviour: scheduling-40
#[test]
fn no_source_of_a_large_merge_is_ever_known_without_an_operator() {
    let mut rig = Rig::new();
    let count = 4_096u16;
    let key = |n: u16| if n == 0 || n == count { vec![] } else { n.to_be_bytes().to_vec() };
    let ids: Vec<DispatcherId> = (0..count).map(|n| DispatcherId::new(7, u64::from(n) + 1)).collect();
    for (n, id) in (0..count).zip(&ids) {
        let range = TableSpan { table: TableId(8), ..part(&key(n), &key(n + 1)) };
        rig.spans.add_replicating(SpanReplica::absent(*id, SchemaId(1), range, Ts(30)), "n1".into());
    }
    assert!(rig.call(|controller, cx| controller.merge(&ids, TARGET, cx)));
    assert_eq!(rig.controller.len(), ids.len() + 1);
    assert!(ids.iter().all(|id| rig.controller.contains(*id)));
    rig.status("n1", TARGET, Working, 30);
    assert!(ids.iter().all(|id| rig.spans.get(*id).is_none() && !rig.controller.contains(*id)));
    let first_free = rig.out.iter().position(|effect| matches!(effect, Effect::Finished(Kind::Occupy, _)));
    let merged = rig.out.iter().position(|effect| matches!(effect, Effect::Finished(Kind::Merge, _)));
    assert!(first_free < merged, "reservations end within the merge");
}

// behaviour: scheduling-2
#[test]
fn operators_are_looked_at_in_the_order_in_which_they_are_due() {
    let mut rig = Rig::new();
    rig.add(SPAN, "n1");
    rig.now += Duration::from_millis(300);
    rig.add(OTHER, "n2");
    rig.out.clear();
    let mut said = Vec::new();
    for _ in 0..16 {
        rig.later(100);
        said.extend(rig.out.drain(..).map(|effect| text(&effect)));
    }
    assert_eq!(said, ["create@10 1 to n1", "create@20 2 to n2", "create@10 1 to n1", "create@20 2 to n2"]);
}
