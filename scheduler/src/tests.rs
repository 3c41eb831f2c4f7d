//! Draining and balancing: what they decide, and what that costs.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use heartbeatpb::{DispatcherId, NodeId, SchemaId, TableId, TableSpan, Ts};
use replica::{GroupId, SpanReplica, SpanSet, Standing};

use super::*;

const INTERVAL: Duration = Duration::from_secs(15);

/// Whole tables on nodes, and moves that have been decided and are in flight.
struct Town {
    spans: SpanSet,
    nodes: BTreeSet<NodeId>,
    moving: BTreeMap<DispatcherId, (NodeId, NodeId)>,
    draining: Option<(NodeId, u64)>,
    is_own: bool,
    is_paused: bool,
    others: usize,
    asked: Cell<usize>,
    next: u64,
}

impl Town {
    fn new(counts: &[(&str, u64)]) -> Self {
        let trigger = SpanReplica::absent(DispatcherId::new(9, 9), SchemaId::DDL, TableSpan::ddl(), Ts(1));
        let mut town = Self {
            spans: SpanSet::new(trigger),
            nodes: counts.iter().map(|(node, _)| NodeId::from(*node)).collect(),
            moving: BTreeMap::new(),
            draining: None,
            is_own: false,
            is_paused: false,
            others: 0,
            asked: Cell::new(0),
            next: 0,
        };
        for (node, count) in counts {
            town.fill(node, *count);
        }
        town
    }

    fn fill(&mut self, node: &str, count: u64) {
        for _ in 0..count {
            self.next += 1;
            let n = self.next;
            let id = DispatcherId::new(1, n);
            let range = TableSpan::whole(TableId(n.cast_signed()));
            self.spans.add_replicating(SpanReplica::absent(id, SchemaId(1), range, Ts(1)), node.into());
        }
    }

    fn tick(&mut self, scheduler: &mut dyn Scheduler) -> (usize, Duration) {
        let is_occupied = |span| {
            self.asked.set(self.asked.get() + 1);
            self.moving.contains_key(&span)
        };
        let draining = self.draining.as_ref().map(|(node, epoch)| Draining {
            node,
            epoch: *epoch,
            in_flight: self.moving.values().filter(|(from, _)| from == node).count(),
            is_own: self.is_own,
        });
        let view = View {
            spans: &self.spans,
            nodes: &self.nodes,
            draining,
            is_paused: self.is_paused,
            operators: self.moving.len() + self.others,
            is_occupied: &is_occupied,
            now: Instant::now(),
        };
        let mut out = Vec::new();
        let next = scheduler.tick(&view, &mut out);
        let count = out.len();
        for decision in out {
            match decision {
                Decision::Move { span, from, dest } => {
                    assert_eq!(self.spans.get(span).and_then(|span| span.node.as_ref()), Some(&from));
                    assert!(self.nodes.contains(&dest) && from != dest);
                    assert_ne!(self.draining.as_ref().map(|(node, _)| node), Some(&dest));
                    assert!(self.moving.insert(span, (from, dest)).is_none(), "moved twice");
                    self.spans.mark_scheduling(span);
                }
                Decision::Add { span, dest } => {
                    self.spans.bind(span, dest);
                    self.spans.mark_replicating(span);
                }
                Decision::Split { .. } | Decision::Merge { .. } => panic!("tables stay whole here"),
            }
        }
        (count, next)
    }

    /// Some of the moves end.
    fn arrive(&mut self, count: usize) {
        for _ in 0..count {
            let Some((span, (_, dest))) = self.moving.pop_first() else { break };
            self.spans.bind(span, dest);
            self.spans.mark_replicating(span);
        }
    }

    fn counts(&self) -> Vec<usize> {
        self.nodes.iter().map(|node| self.spans.size_by_node(node)).collect()
    }
}

// behaviour: scheduling-1
#[test]
fn the_shortage_is_what_nodes_lack_of_their_even_share() {
    let check = |counts: &[(&str, u64)]| {
        let town = Town::new(counts);
        shortage(town.spans.group(GroupId::Default).unwrap(), town.nodes.iter())
    };
    assert_eq!(check(&[]), 0);
    assert_eq!(check(&[("a", 2), ("b", 2), ("c", 0)]), 1);
    assert_eq!(check(&[("a", 2), ("b", 0)]), 1);
    assert_eq!(check(&[("a", 16), ("b", 16), ("c", 16), ("d", 16), ("e", 16), ("f", 11)]), 4);
    assert_eq!(check(&[("a", 3), ("b", 3), ("c", 5)]), 0, "more than a share is no shortage");
}

// behaviour: scheduling-120
#[test]
fn one_span_in_a_hundred_may_leave_at_once_and_never_less_than_ten() {
    assert_eq!([0, 999, 1000, 1001, 1100].map(limit), [10, 10, 10, 11, 11]);
}

// behaviour: scheduling-114, scheduling-115
#[test]
fn a_node_is_emptied_ten_spans_at_a_time_until_nothing_is_left() {
    let mut town = Town::new(&[("a", 5), ("b", 25), ("c", 3)]);
    town.draining = Some(("b".into(), 1));
    let mut drain = Drain::new(10_000);
    assert_eq!(town.tick(&mut drain).0, 10);
    assert_eq!((town.tick(&mut drain).0, town.tick(&mut drain).0), (0, 0), "the limit is used up");
    town.arrive(1);
    assert_eq!(town.tick(&mut drain).0, 1);
    for _ in 0..100 {
        town.arrive(3);
        town.tick(&mut drain);
    }
    assert!(town.moving.is_empty());
    let counts = town.counts();
    assert_eq!((counts[1], counts[0] + counts[2]), (0, 33));
    assert!(
        counts[0].abs_diff(counts[2]) <= MOVES_AT_LEAST,
        "whoever has least takes the next one: {counts:?}"
    );
}

// behaviour: scheduling-116
#[test]
fn operators_of_others_and_a_small_batch_do_not_stop_draining() {
    let mut town = Town::new(&[("a", 0), ("b", 25)]);
    town.draining = Some(("b".into(), 1));
    town.others = 100_000;
    assert_eq!(town.tick(&mut Drain::new(1)).0, 1);
}

// behaviour: scheduling-117, scheduling-118
#[test]
fn the_limit_of_a_request_does_not_shrink_with_the_node() {
    let mut town = Town::new(&[("a", 0), ("b", 1_100)]);
    town.draining = Some(("b".into(), 1));
    let mut drain = Drain::new(10_000);
    assert_eq!(town.tick(&mut drain).0, 11);
    town.arrive(11);
    let gone: Vec<DispatcherId> = town.spans.ids_by_node(&"b".into()).take(189).collect();
    for id in gone {
        town.spans.remove(id);
    }
    assert_eq!(town.spans.size_by_node(&"b".into()), 900);
    assert_eq!(town.tick(&mut drain).0, 11);
    town.arrive(11);
    town.draining = Some(("b".into(), 2));
    assert_eq!(town.tick(&mut drain).0, 10, "a new request counts anew");
    town.arrive(10);
    town.fill("b", 1_000);
    assert_eq!(town.tick(&mut drain).0, 19, "and may grow");
}

// behaviour: scheduling-119
#[test]
fn the_own_node_is_emptied_by_the_next_maintainer_and_nowhere_is_no_place() {
    let mut town = Town::new(&[("a", 5), ("b", 25)]);
    town.draining = Some(("b".into(), 1));
    town.is_own = true;
    assert_eq!(town.tick(&mut Drain::new(100)).0, 0);
    town.is_own = false;
    town.nodes.remove(&NodeId::from("a"));
    assert_eq!(town.tick(&mut Drain::new(100)), (0, Duration::from_secs(1)));
    town.draining = None;
    assert_eq!(town.tick(&mut Drain::new(100)).0, 0);
}

// behaviour: scheduling-102, scheduling-104
#[test]
fn balance_begins_a_batch_of_moves_and_looks_again_after_its_interval() {
    let mut town = Town::new(&[("a", 20), ("b", 0), ("c", 0)]);
    let mut balance = Balance::new(5, INTERVAL);
    assert_eq!(town.tick(&mut balance), (5, INTERVAL));
    assert_eq!(town.tick(&mut balance), (0, INTERVAL), "operators run");
    for _ in 0..3 {
        town.arrive(100);
        town.tick(&mut balance);
    }
    town.arrive(100);
    assert_eq!(town.counts(), [8, 6, 6]);
    assert_eq!(town.tick(&mut balance).0, 0);
}

// behaviour: scheduling-103, scheduling-105
#[test]
fn nothing_is_balanced_while_or_shortly_after_a_node_is_emptied() {
    let mut town = Town::new(&[("a", 20), ("b", 0), ("c", 0)]);
    town.draining = Some(("c".into(), 1));
    assert_eq!(town.tick(&mut Balance::new(5, INTERVAL)).0, 0);
    let now = Instant::now();
    let mut cooldown = Cooldown::default();
    assert!(!cooldown.is_on(now));
    cooldown.start(now);
    town.draining = None;
    town.is_paused = cooldown.is_on(now + COOLDOWN - Duration::from_millis(1));
    assert_eq!(town.tick(&mut Balance::new(5, INTERVAL)).0, 0);
    town.is_paused = cooldown.is_on(now + COOLDOWN);
    assert_eq!(town.tick(&mut Balance::new(5, INTERVAL)).0, 5);
}

// behaviour: scheduling-106
#[test]
fn a_node_that_joins_takes_half_and_what_it_loses_again_goes_back() {
    let mut town = Town::new(&[("a", 100)]);
    let mut balance = Balance::new(1_024, INTERVAL);
    assert_eq!(town.tick(&mut balance).0, 0);
    town.nodes.insert("b".into());
    assert_eq!(town.tick(&mut balance).0, 50);
    assert_eq!((town.spans.count(Standing::Scheduling), town.counts()), (50, vec![100, 0]));
    town.nodes.remove(&NodeId::from("b"));
    while let Some((span, _)) = town.moving.pop_first() {
        town.spans.mark_absent(span);
    }
    assert_eq!(town.tick(&mut balance).0, 0, "placing comes first");
    assert_eq!(town.tick(&mut Basic::new(1_000, 20)).0, 50);
    assert_eq!(town.spans.count(Standing::Replicating), 100);
}

// behaviour: scheduling-110
#[test]
fn what_a_dead_node_had_is_spread_evenly_and_needs_no_balancing() {
    let mut town = Town::new(&[("a", 200), ("b", 200), ("c", 200)]);
    let lost: Vec<DispatcherId> = town.spans.ids_by_node(&"b".into()).collect();
    town.nodes.remove(&NodeId::from("b"));
    for span in lost {
        town.spans.mark_absent(span);
    }
    assert_eq!(town.tick(&mut Basic::new(10_000, 20)).0, 200);
    assert_eq!(town.counts(), [300, 300]);
    assert_eq!(town.tick(&mut Balance::new(1_024, INTERVAL)).0, 0);
}

#[test]
fn a_span_that_cannot_move_is_passed_over_once() {
    let mut town = Town::new(&[("a", 10), ("b", 0)]);
    let stuck: Vec<DispatcherId> = town.spans.ids_by_node(&"a".into()).take(8).collect();
    for span in stuck {
        town.spans.mark_scheduling(span);
    }
    assert_eq!(town.tick(&mut Balance::new(1_024, INTERVAL)).0, 2, "all that is free, and it ends");
}

// behaviour: scheduling-4
#[test]
fn a_tick_looks_at_what_it_decides_however_many_spans_there_are() {
    let mut town = Town::new(&[("a", 20_000), ("b", 20_000), ("c", 19_000)]);
    town.tick(&mut Balance::new(50, INTERVAL));
    assert_eq!(town.asked.take(), 50);
    town.arrive(50);
    town.draining = Some(("b".into(), 1));
    assert_eq!(town.tick(&mut Drain::new(10_000)).0, 200);
    assert_eq!(town.asked.take(), 200);
    town.arrive(200);
    town.draining = None;
    for n in 0..100 {
        let range = TableSpan::whole(TableId(1_000_000 + n));
        let id = DispatcherId::new(0, n.unsigned_abs() + 1);
        town.spans.add_absent(SpanReplica::absent(id, SchemaId(1), range, Ts(1)));
    }
    assert_eq!(town.tick(&mut Basic::new(3, 20)).0, 3);
    assert_eq!(town.asked.take(), 3);
    assert_eq!(town.spans.count(Standing::Absent), 97);
    assert_eq!(town.tick(&mut Basic::new(1_000, 20)).0, 97);
    town.asked.take();
    assert_eq!(
        town.tick(&mut Basic::new(1_000, 20)).0 + town.asked.take(),
        0,
        "nothing to do, nothing visited"
    );
}
