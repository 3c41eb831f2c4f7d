//! Nodes that join, are emptied, and die: where the spans go.

use heartbeatpb::ScheduleAction;

use replica::Standing;

use super::super::*;
use super::rig::{Rig, status};

impl Rig {
    /// Nodes do what they were asked for so far and say so. Says how many requests there were.
    pub(super) fn obey(&mut self) -> usize {
        let mut reports = Vec::new();
        for effect in std::mem::take(&mut self.out) {
            match effect {
                Effect::Dispatch(node, ToHeartbeatCollector::Schedule(request)) => {
                    assert_eq!(request.epoch, self.core.epoch, "every request carries the epoch");
                    let id = request.config.dispatcher.low;
                    let status = match request.action {
                        ScheduleAction::Create => {
                            status(id, ComponentState::Working, request.config.start_ts.0)
                        }
                        ScheduleAction::Remove => status(id, ComponentState::Stopped, 150),
                    };
                    reports.push((node, status));
                }
                Effect::Dispatch(node, ToHeartbeatCollector::Merge(request)) => {
                    assert_eq!(request.epoch, self.core.epoch, "every request carries the epoch");
                    reports.push((node, status(request.merged.low, ComponentState::Working, 150)));
                }
                // What is for others stays to be looked at.
                Effect::Points { .. } | Effect::Answer(..) => self.kept.push(effect),
                Effect::Orchestrate(..)
                | Effect::Dispatch(..)
                | Effect::Load
                | Effect::Confirm(_)
                | Effect::Initialized
                | Effect::Leave
                | Effect::OperatorStarted(_)
                | Effect::OperatorFinished(..)
                | Effect::Fence { .. }
                | Effect::Stale(_) => {}
            }
        }
        let count = reports.len();
        for (node, status) in reports {
            self.report(node.as_str(), &[status], 100, 4);
        }
        count
    }

    /// Time passes and nodes obey until nothing is asked of them any more.
    pub(super) fn come_to_rest(&mut self) {
        for _ in 0..20 {
            self.tick(100);
            while self.obey() > 0 {}
        }
    }

    pub(super) fn drain(&mut self, node: &str, epoch: u64) {
        let node = (!node.is_empty()).then(|| node.into());
        self.core.on_drain(&DrainTarget { node, epoch }, self.now);
    }

    pub(super) fn with_a_second_node(tables: i64) -> Self {
        let mut rig = Self::working(tables);
        rig.nodes(&["n1", "n2"]);
        rig.answer("n2", vec![]);
        rig.out.clear();
        rig
    }
}

// behaviour: maintainer-67, scheduling-106
#[test]
fn a_node_that_joins_gets_half_of_the_tables_and_gives_them_back_when_it_dies() {
    let mut rig = Rig::with_a_second_node(100);
    rig.tick(15_000);
    assert_eq!(rig.core.placement().operators.len(), 50);
    assert_eq!(rig.sizes(), "n1=100", "their origins run them until they say that they do not");
    while rig.obey() > 0 {}
    assert_eq!(rig.sizes(), "n1=50 n2=50");
    rig.tick(15_000);
    assert!(rig.core.placement().operators.is_empty(), "nothing is left to even out");
    rig.nodes(&["n1"]);
    while rig.obey() > 0 {}
    assert_eq!(
        (rig.sizes(), rig.core.placement().spans.count(Standing::Replicating)),
        ("n1=100".to_owned(), 100)
    );
}

// behaviour: maintainer-68, scheduling-27
#[test]
fn tables_that_were_moving_to_a_node_that_dies_are_placed_anew() {
    let mut rig = Rig::with_a_second_node(10);
    rig.tick(15_000);
    let before = rig.core.placement().operators.len();
    rig.nodes(&["n1"]);
    assert_eq!((before, rig.sizes().as_str()), (5, "n1=10"), "the origins may still run them");
    for _ in 0..10 {
        rig.obey();
        rig.tick(500);
    }
    assert_eq!((rig.sizes(), rig.core.placement().operators.len()), ("n1=10".to_owned(), 0));
    assert_eq!(rig.core.placement().spans.count(Standing::Replicating), 10);
}

// behaviour: scheduling-103, scheduling-105, scheduling-115
#[test]
fn a_node_that_is_to_be_emptied_is_emptied_and_stays_so_for_a_while() {
    let mut rig = Rig::with_a_second_node(50);
    rig.tick(15_000);
    while rig.obey() > 0 {}
    assert_eq!(rig.sizes(), "n1=25 n2=25");
    rig.drain("n2", 7);
    rig.tick(200);
    assert_eq!(
        rig.core.status().drain.map(|drain| (drain.dispatchers, drain.inflight_moves)),
        Some((25, 10))
    );
    rig.tick(200);
    assert_eq!(rig.core.placement().operators.len(), 10, "ten at a time");
    for _ in 0..20 {
        while rig.obey() > 0 {}
        rig.tick(200);
    }
    assert_eq!(rig.sizes(), "n1=50");
    let left = rig.core.status().drain.map(|drain| (drain.dispatchers, drain.inflight_moves));
    assert_eq!(left, Some((0, 0)), "the coordinator hears that it is empty");
    rig.drain("", 7);
    rig.tick(100_000);
    assert_eq!(
        (rig.sizes().as_str(), rig.core.placement().operators.len()),
        ("n1=50", 0),
        "not back at once"
    );
    rig.tick(15_000);
    rig.tick(15_000);
    assert_eq!(rig.core.placement().operators.len(), 25, "it has become an ordinary node");
}

// behaviour: scheduling-119
#[test]
fn a_maintainer_whose_own_node_is_to_be_emptied_moves_nothing() {
    let mut rig = Rig::with_a_second_node(10);
    rig.drain("n1", 7);
    for _ in 0..100 {
        rig.tick(500);
    }
    assert_eq!((rig.sizes().as_str(), rig.core.placement().operators.len()), ("n1=10", 0));
}

#[test]
fn an_operator_that_is_stuck_keeps_nobody_else_from_being_balanced() {
    let mut rig = Rig::with_a_second_node(10);
    let wish = crate::placements::Wish::Move { table: heartbeatpb::TableId(1), to: "n2".into(), wait: false };
    rig.wish(1, wish);
    for _ in 0..39 {
        rig.tick(15_000);
        assert_eq!(rig.core.placement().operators.len(), 1, "it may still end");
    }
    rig.tick(15_000);
    assert_eq!(rig.core.placement().operators.len(), 6, "it was warned of for ten minutes");
}
