//! Histories of drains.

use coordinator::core::{Command, Core};
use coordinator::drain::{DrainDoc, NodeName, NodeState};
use coordinator::{CoordinatorConfig, DrainView};
use expect_test::expect;
use heartbeatpb::config::Progress;
use heartbeatpb::{
    CoordinatorBootstrapResponse, DrainProgress, MaintainerStatus, NodeHeartbeat, NodeId, NodeLiveness,
    SetNodeLivenessResponse,
};
use messaging::ToCoordinator;

use crate::world::{NORMAL, World, answer, doc, stopped, working};

use NodeLiveness::{Alive, Draining, Stopping};

impl World {
    /// A heartbeat of a node: liveness of process 8, and the target that it has applied.
    fn node(&mut self, from: &str, liveness: NodeLiveness, target: &str, drain_epoch: u64) {
        let drain_target = (!target.is_empty()).then(|| NodeId::from(target));
        let heartbeat = NodeHeartbeat { liveness, node_epoch: 8, drain_target, drain_epoch };
        self.hear(from, ToCoordinator::NodeHeartbeat(heartbeat));
    }

    fn drain(&mut self, node: &str, clock: Option<u64>) {
        self.ask(Command::Drain { node: node.into(), clock });
    }

    fn cancel(&mut self, node: &str) {
        self.ask(Command::CancelDrain { node: node.into() });
    }

    /// What the last answer to a person was.
    fn answered(&mut self) -> String {
        let replies: Vec<String> =
            std::mem::take(&mut self.log).into_iter().filter(|line| line.starts_with("reply")).collect();
        replies
            .last()
            .and_then(|line| line.split_once(": "))
            .map_or_else(String::new, |(_, text)| text.to_owned())
    }

    fn asked(&mut self, node: &str, clock: u64) -> String {
        self.drain(node, Some(clock));
        self.answered()
    }

    fn view(&self) -> DrainView {
        self.core.drain_view(self.now).unwrap()
    }

    /// Another coordinator starts with what is stored.
    fn fail_over(&mut self, nodes: &[(&str, ToCoordinator)]) {
        self.core = Core::new("n1".into(), 8, CoordinatorConfig::default());
        self.core.on_drain_loaded(self.drain.clone());
        self.nodes(&nodes.iter().map(|(node, _)| *node).collect::<Vec<_>>());
        let loaded = self.disk.clone();
        let actions = self.core.on_loaded(loaded, self.now);
        self.perform(actions);
        self.log.clear();
        for (node, answer) in nodes {
            self.hear(node, answer.clone());
        }
    }
}

fn answer_with(protocol: u32, target: &str, epoch: u64, statuses: Vec<MaintainerStatus>) -> ToCoordinator {
    ToCoordinator::BootstrapResponse(CoordinatorBootstrapResponse {
        statuses,
        drain_protocol_version: protocol,
        drain_target: (!target.is_empty()).then(|| NodeId::from(target)),
        drain_epoch: epoch,
    })
}

fn reporting(
    status: MaintainerStatus,
    epoch: u64,
    dispatchers: u32,
    inflight_moves: u32,
) -> MaintainerStatus {
    let drain = DrainProgress { target: "n2".into(), epoch, dispatchers, inflight_moves };
    MaintainerStatus { drain: Some(drain), ..status }
}

/// `a` on the first and `b` on the second of three nodes.
fn three() -> World {
    let disk = vec![doc("a", NORMAL, 5, Progress::None), doc("b", NORMAL, 5, Progress::None)];
    let mut w = World::started(
        disk,
        &[("n1", vec![working("a", 5, 100)]), ("n2", vec![working("b", 5, 100)]), ("n3", vec![])],
    );
    w.tick(500);
    w.log.clear();
    w
}

/// The second node is to be emptied under epoch 1001, and everybody knows.
fn draining() -> World {
    let mut w = three();
    w.drain("n2", Some(1000));
    for node in ["n3", "n1", "n2"] {
        w.node(node, if node == "n2" { Draining } else { Alive }, "n2", 1001);
    }
    w.log.clear();
    w
}

/// Ends the drain of [`draining`] up to the point where nothing is left and the node was told to stop.
fn emptied() -> World {
    let mut w = draining();
    w.beat("n2", stopped("b", 5));
    w.beat("n3", reporting(working("b", 6, 100), 1001, 0, 0));
    w.beat("n1", reporting(working("a", 5, 100), 1001, 0, 0));
    w.log.clear();
    w.tick(1000);
    w.log.retain(|line| !line.contains("Checkpoint"));
    w
}

#[test]
// behaviour: coordinator-SC-6, coordinator-DR-21, coordinator-DR-2
fn a_drain_is_stored_then_told_then_the_node_is_emptied_and_may_stop() {
    let mut w = three();
    w.held_drain = true;
    w.drain("n2", Some(1000));
    w.expect(&expect![""]);
    assert_eq!(w.pending_drain.as_ref().map(|doc| doc.epoch), Some(1001));
    w.held_drain = false;
    w.settle_drain();
    w.expect(&expect![[r#"
        n1: Target n2 epoch 1001
        n2: Target n2 epoch 1001
        n3: Target n2 epoch 1001
        n2: Liveness Draining epoch 0
        reply 1: remaining 2"#]]);
    w.node("n2", Draining, "n2", 1001);
    w.node("n1", Alive, "n2", 1001);
    w.expect(&expect![[r#"
        wrote bump for n2 to n1
        n2: Remove b epoch 5"#]]);
    w.beat("n2", stopped("b", 5));
    w.beat("n1", reporting(working("b", 6, 100), 1001, 0, 0));
    assert_eq!((w.view().pending, w.view().remaining), (1, 1), "of a nothing is known yet");
    w.log.clear();
    w.tick(1000);
    w.expect(&expect![""]);
    w.beat("n1", reporting(working("a", 5, 100), 1001, 0, 0));
    assert_eq!(w.view().remaining, 1, "nothing is left, but the node may still take work");
    w.tick(500);
    w.expect(&expect!["n2: Liveness Stopping epoch 8"]);
    assert_eq!(w.asked("n2", 1000), "remaining 1");
    w.node("n2", Stopping, "n2", 1001);
    assert_eq!(w.asked("n2", 1000), "remaining 0");
}

#[test]
// behaviour: coordinator-DR-1
fn while_the_coordinator_starts_something_remains() {
    let mut w = World::new(vec![]);
    w.nodes(&["n1", "n2"]);
    assert_eq!(w.asked("n2", 1000), "remaining 1");
    assert!(w.core.drain_view(w.now).is_none());
    let actions = w.core.on_loaded(vec![], w.now);
    w.perform(actions);
    w.hear("n1", answer(vec![]));
    w.hear("n2", answer(vec![]));
    w.node("n2", Draining, "", 0);
    w.log.clear();
    w.tick(5000);
    w.expect(&expect![""]);
}

#[test]
// behaviour: coordinator-DR-3
fn what_remains_is_the_largest_of_what_was_reported_under_this_drain() {
    let mut w = draining();
    w.beat("n1", reporting(working("a", 5, 100), 1001, 3, 2));
    assert_eq!((w.view().dispatchers, w.view().moves, w.view().remaining), (3, 2, 3));
    w.beat("n1", reporting(working("a", 5, 100), 1000, 90, 90));
    w.beat("n1", reporting(working("a", 4, 100), 1001, 90, 90));
    w.beat("n3", reporting(working("a", 5, 100), 1001, 90, 90));
    assert_eq!((w.view().dispatchers, w.view().moves, w.view().remaining), (3, 2, 3));
    w.beat("n1", reporting(working("a", 5, 100), 1001, 0, 0));
    let view = w.view();
    assert_eq!((view.maintainers, view.operators, view.pending, view.remaining), (1, 1, 1, 1));
}

#[test]
// behaviour: coordinator-DR-27
fn a_changefeed_that_was_on_no_node_may_have_left_something_behind() {
    let mut w = emptied();
    w.node("n2", Stopping, "n2", 1001);
    assert_eq!(w.view().remaining, 0);
    w.beat("n1", stopped("a", 5));
    assert!(w.view().pending >= 1, "it is on its way to another node");
    w.beat("n1", working("a", 6, 100));
    w.beat("n3", working("a", 6, 100));
    assert_eq!(w.view().remaining, 1, "the new maintainer has not reported");
    w.beat("n1", reporting(working("a", 6, 100), 1001, 2, 0));
    w.beat("n3", reporting(working("a", 6, 100), 1001, 2, 0));
    assert_eq!(w.view().remaining, 2);
    w.beat("n1", reporting(working("a", 6, 100), 1001, 0, 0));
    w.beat("n3", reporting(working("a", 6, 100), 1001, 0, 0));
    assert_eq!(w.view().remaining, 0);
}

#[test]
// behaviour: coordinator-DR-4, coordinator-DR-5, coordinator-DR-10, coordinator-DR-13, coordinator-DR-17, coordinator-DR-18
fn one_drain_at_a_time_and_its_end_is_told_until_everybody_has_taken_it() {
    let mut w = emptied();
    w.expect(&expect!["n2: Liveness Stopping epoch 8"]);
    assert_eq!(w.asked("n3", 2000), "remaining 1");
    assert_eq!(w.view().target, NodeId::from("n2"));
    w.node("n2", Stopping, "n2", 1001);
    w.nodes(&["n1", "n3"]);
    w.expect(&expect![[r#"
        n1: Target - epoch 1001
        n3: Target - epoch 1001"#]]);
    assert_eq!(w.asked("n2", 2000), "remaining 0");
    assert_eq!(w.asked("n3", 2000), "remaining 1");
    assert_eq!(w.drain.as_ref().map(|doc| (doc.target.clone(), doc.epoch)), Some((None, 1001)));
    w.node("n1", Alive, "", 1001);
    w.create("c");
    assert_eq!(w.placed(), ["n1"], "the other one still may think that n2 is emptied");
    w.tick(4000);
    w.tick(1000);
    w.log.retain(|line| line.contains("Target"));
    w.expect(&expect!["n3: Target - epoch 1001"]);
    w.node("n3", Alive, "", 1001);
    assert_eq!(w.asked("n3", 500), "remaining 3", "another epoch, larger than the last one");
    assert_eq!(w.view().epoch, 1002);
    w.cancel("n3");
    w.nodes(&["n1", "n2", "n3"]);
    w.nodes(&["n1", "n3"]);
    assert_eq!(w.asked("n2", 2000), "CDC:ErrCaptureNotExist", "it was there again");
}

#[test]
// behaviour: coordinator-DR-12, coordinator-DR-24
fn a_node_that_leaves_before_it_was_empty_was_not_drained() {
    let mut w = draining();
    w.nodes(&["n1", "n3"]);
    assert_eq!(w.asked("n2", 2000), "CDC:ErrCaptureNotExist");
    assert!(w.core.drain_view(w.now).is_none());
    w.node("n2", Stopping, "n2", 1001);
    w.node("n1", Alive, "", 1001);
    w.node("n3", Alive, "", 1001);
    w.create("c");
    assert!(!w.placed().is_empty(), "late news of it freeze nothing");
}

#[test]
// behaviour: coordinator-DR-6
fn epochs_of_drains_exceed_everything_that_was_seen() {
    let mut w = three();
    w.node("n3", Alive, "", 7000);
    w.drain("n2", Some(1000));
    assert_eq!(w.view().epoch, 7001);
}

#[test]
// behaviour: coordinator-DR-7, coordinator-DR-8
fn without_a_clock_or_a_further_epoch_no_drain_begins() {
    let mut w = three();
    w.drain("n2", None);
    assert_eq!(w.answered(), "CDC:ErrSchedulerRequestFailed");
    w.node("n3", Alive, "", u64::MAX);
    assert_eq!(w.asked("n2", 1000), "CDC:ErrSchedulerRequestFailed");
    assert!(w.core.drain_view(w.now).is_none() && w.drain.is_none());
}

#[test]
fn the_last_node_is_not_drained_and_neither_is_one_whose_neighbours_are_on_their_way_out() {
    let mut w = three();
    w.node("n1", Draining, "", 0);
    w.node("n3", Stopping, "", 0);
    assert_eq!(w.asked("n2", 1000), "CDC:ErrSchedulerRequestFailed");
    w.nodes(&["n2"]);
    assert_eq!(w.asked("n2", 1000), "CDC:ErrSchedulerRequestFailed");
    assert!(w.core.drain_view(w.now).is_none() && w.drain.is_none());
}

#[test]
// behaviour: coordinator-DR-9
fn a_node_that_leaves_while_its_drain_is_stored_is_not_drained() {
    let mut w = three();
    w.held_drain = true;
    w.drain("n2", Some(1000));
    w.nodes(&["n1", "n3"]);
    assert_eq!(w.answered(), "CDC:ErrCaptureNotExist");
    w.held_drain = false;
    w.settle_drain();
    assert!(w.core.drain_view(w.now).is_none());
    assert_eq!(w.drain.as_ref().and_then(|doc| doc.target.clone()), None);
    assert!(!w.log.iter().any(|line| line.contains("Target n2")), "{:?}", w.log);
}

#[test]
fn a_drain_that_cannot_be_stored_is_told_to_nobody_until_it_is() {
    let mut w = three();
    w.failing = true;
    w.drain("n2", Some(1000));
    w.tick(1500);
    w.log.retain(|line| !line.contains("Checkpoint"));
    w.expect(&expect![""]);
    w.failing = false;
    w.tick(1500);
    assert_eq!(w.answered(), "remaining 2");
}

#[test]
// behaviour: coordinator-DR-14
fn nodes_of_older_versions_cannot_be_drained_and_unknown_ones_are_waited_for() {
    for (two, three, expected) in [(0, 1, "remaining 0"), (1, 0, "remaining 0"), (1, 1, "remaining 1")] {
        let mut w = World::new(vec![]);
        w.nodes(&["n1", "n2", "n3"]);
        let actions = w.core.on_loaded(vec![], w.now);
        w.perform(actions);
        for (node, protocol) in [("n1", 1), ("n2", two), ("n3", three)] {
            w.hear(node, answer_with(protocol, "", 0, vec![]));
        }
        if expected == "remaining 1" {
            w.nodes(&["n1", "n2", "n3", "n4"]);
        }
        assert_eq!(w.asked("n2", 1000), expected);
        assert!(w.core.drain_view(w.now).is_none());
    }
}

#[test]
// behaviour: coordinator-DR-15, coordinator-DR-16, coordinator-SC-5
fn late_nodes_take_part_once_they_can_and_get_work_once_they_know_the_target() {
    let mut w = draining();
    w.nodes(&["n1", "n2", "n3", "n4", "n5"]);
    w.beat("n1", reporting(working("a", 5, 100), 1001, 7, 0));
    assert_eq!(w.view().dispatchers, 7, "others are heard meanwhile");
    w.log.clear();
    w.hear("n4", answer_with(1, "", 0, vec![]));
    w.hear("n5", answer_with(0, "", 0, vec![]));
    w.log.retain(|line| line.contains("Target"));
    w.expect(&expect!["n4: Target n2 epoch 1001"]);
    for name in ["c", "d", "e"] {
        w.create(name);
        assert!(w.placed().iter().all(|node| node == "n1" || node == "n3"), "n4 did not acknowledge");
    }
    w.node("n4", Alive, "n2", 1001);
    w.create("f");
    assert_eq!(w.placed(), ["n4"]);
    w.tick(5000);
    w.log.retain(|line| line.contains("Target"));
    w.expect(&expect![[r#"
        n1: Target n2 epoch 1001
        n2: Target n2 epoch 1001
        n3: Target n2 epoch 1001
        n4: Target n2 epoch 1001"#]]);
}

#[test]
// behaviour: coordinator-DR-19, coordinator-DR-20
fn targets_that_an_earlier_coordinator_left_are_cleared() {
    let mut w = three();
    w.node("n3", Alive, "n2", 900);
    w.expect(&expect![[r#"
        n1: Target - epoch 900
        n2: Target - epoch 900
        n3: Target - epoch 900"#]]);
    w.node("n1", Alive, "", 950);
    w.node("n2", Alive, "", 900);
    assert_eq!(w.asked("n2", 1000), "remaining 1", "one has yet to take it");
    w.node("n3", Alive, "n2", 970);
    w.log.retain(|line| line.contains("Target"));
    w.expect(&expect![[r#"
        n1: Target - epoch 970
        n2: Target - epoch 970
        n3: Target - epoch 970"#]]);
    for node in ["n1", "n2", "n3"] {
        w.node(node, Alive, "", 970);
    }
    assert_eq!(w.asked("n2", 1), "remaining 2");

    let mut w = World::new(vec![]);
    w.fail_over(&[("n1", answer_with(1, "", 0, vec![])), ("n2", answer_with(1, "n9", 40, vec![]))]);
    w.log.retain(|line| line.contains("Target"));
    w.expect(&expect![[r#"
        n1: Target - epoch 40
        n2: Target - epoch 40"#]]);
}

#[test]
// behaviour: coordinator-DR-25
fn a_drain_under_way_is_not_disturbed_by_what_is_left_of_another() {
    let mut w = draining();
    w.node("n3", Alive, "", 1000);
    w.node("n3", Alive, "n9", 900);
    w.log.retain(|line| line.contains("Target"));
    w.expect(&expect![""]);
    let mut placed = Vec::new();
    for name in ["c", "d"] {
        w.create(name);
        placed.extend(w.placed());
    }
    assert!(placed.contains(&"n3".to_owned()), "its acknowledgement stays: {placed:?}");
    w.node("n3", Alive, "n9", 5000);
    w.log.retain(|line| line.contains("Target"));
    w.expect(&expect![""]);
}

#[test]
// behaviour: coordinator-DR-26
fn the_next_coordinator_goes_on_with_a_drain() {
    let mut w = draining();
    w.fail_over(&[
        ("n1", answer_with(1, "n2", 1001, vec![working("a", 5, 100)])),
        ("n2", answer_with(1, "n2", 1001, vec![working("b", 6, 100)])),
        ("n3", answer_with(1, "n2", 1001, vec![])),
    ]);
    w.log.retain(|line| line.contains("Target") || line.contains("Liveness"));
    w.expect(&expect![[r#"
        n1: Target n2 epoch 1001
        n2: Target n2 epoch 1001
        n3: Target n2 epoch 1001
        n2: Liveness Draining epoch 0"#]]);
    assert_eq!((w.view().epoch, w.view().remaining), (1001, 2));

    // A node knows a newer one that is not stored: the drain goes on under an epoch that it will take.
    let mut w = draining();
    w.fail_over(&[
        ("n1", answer_with(1, "n9", 1500, vec![working("a", 5, 100)])),
        ("n2", answer_with(1, "", 1001, vec![working("b", 5, 100)])),
        ("n3", answer_with(1, "n2", 1001, vec![])),
    ]);
    assert_eq!(w.view().epoch, 1501);
    assert_eq!(w.drain.as_ref().map(|doc| doc.epoch), Some(1501));

    // The node left while nobody coordinated.
    let mut w = draining();
    w.fail_over(&[("n1", answer_with(1, "n2", 1001, vec![])), ("n3", answer_with(1, "n2", 1001, vec![]))]);
    w.log.retain(|line| line.contains("Target"));
    w.expect(&expect![[r#"
        n1: Target - epoch 1001
        n3: Target - epoch 1001"#]]);
}

#[test]
fn a_completed_drain_is_remembered_by_the_next_coordinator() {
    let mut w = emptied();
    w.node("n2", Stopping, "n2", 1001);
    w.tick(500);
    assert_eq!(w.drain.as_ref().and_then(|doc| doc.completed.clone()), Some(NodeName("n2".to_owned())));
    w.fail_over(&[("n1", answer_with(1, "n2", 1001, vec![])), ("n3", answer_with(1, "n2", 1001, vec![]))]);
    assert_eq!(w.asked("n2", 2000), "remaining 0");
}

#[test]
fn the_coordinators_own_node_is_drained_like_any_other() {
    let mut w = three();
    w.drain("n1", Some(1000));
    for node in ["n1", "n2", "n3"] {
        w.node(node, if node == "n1" { Draining } else { Alive }, "n1", 1001);
    }
    assert!(w.log.contains(&"wrote bump for n1 to n2".to_owned()), "{:?}", w.log);
    w.beat("n1", stopped("a", 5));
    for (node, status) in [("n2", working("a", 6, 100)), ("n2", working("b", 5, 100))] {
        let drain = DrainProgress { target: "n1".into(), epoch: 1001, dispatchers: 0, inflight_moves: 0 };
        w.beat(node, MaintainerStatus { drain: Some(drain), ..status });
    }
    w.log.clear();
    w.tick(1000);
    assert!(w.log.contains(&"n1: Liveness Stopping epoch 8".to_owned()), "{:?}", w.log);
    let response = SetNodeLivenessResponse { applied: Stopping, node_epoch: 8 };
    w.hear("n1", ToCoordinator::SetNodeLivenessResponse(response));
    assert_eq!(w.asked("n1", 1), "remaining 0");
}

#[test]
fn a_drain_that_is_taken_back_ends_and_its_node_gets_nothing_new() {
    let mut w = draining();
    w.cancel("n3");
    assert_eq!(w.answered(), "CDC:ErrSchedulerRequestFailed");
    w.beat("n2", stopped("b", 5));
    w.beat("n3", working("b", 6, 100));
    w.log.clear();
    w.cancel("n2");
    w.expect(&expect![[r#"
        reply 3: done
        n1: Target - epoch 1001
        n2: Target - epoch 1001
        n3: Target - epoch 1001"#]]);
    for node in ["n1", "n2", "n3"] {
        w.node(node, if node == "n2" { Draining } else { Alive }, "", 1001);
    }
    for name in ["c", "d", "e"] {
        w.create(name);
        let placed = w.placed();
        assert!(placed.len() == 1 && placed[0] != "n2", "{placed:?}");
    }
    w.fail_over(&[
        ("n1", answer_with(1, "", 1001, vec![])),
        ("n2", answer_with(1, "", 1001, vec![])),
        ("n3", answer_with(1, "", 1001, vec![])),
    ]);
    w.node("n2", Draining, "", 1001);
    w.create("f");
    assert!(!w.placed().is_empty(), "also the next coordinator knows that it was taken back");
}

#[test]
// behaviour: coordinator-SC-3, coordinator-SC-4
fn nodes_that_leave_without_a_drain_freeze_placement_and_balancing_waits_after_one() {
    let mut w = three();
    w.node("n3", Draining, "", 0);
    w.create("c");
    w.tick(60_000);
    assert_eq!(w.placed(), Vec::<String>::new());
    w.node("n3", Stopping, "", 0);
    w.nodes(&["n1", "n2"]);
    assert_eq!(w.placed(), ["n1"]);
    w.obey();

    let names = ["a", "b", "c", "d"];
    let disk = names.iter().map(|name| doc(name, NORMAL, 5, Progress::None)).collect();
    let all = names.iter().map(|name| working(name, 5, 100)).collect();
    let mut w = World::started(disk, &[("n1", all), ("n2", vec![]), ("n3", vec![])]);
    w.node("n3", Draining, "", 0);
    let moves = |w: &mut World| {
        std::mem::take(&mut w.log).iter().filter(|line| line.starts_with("wrote bump")).count()
    };
    w.tick(60_000);
    w.tick(60_000);
    w.nodes(&["n1", "n2"]);
    w.tick(14_900);
    assert_eq!(moves(&mut w), 0, "a full interval has to pass");
    w.tick(200);
    assert_eq!(moves(&mut w), 2);
}

#[test]
// behaviour: coordinator-SC-7, coordinator-SC-8
fn several_nodes_that_leave_share_the_moves_and_others_do_not_take_them() {
    let names: Vec<String> = (10..70).map(|n| format!("f{n}")).collect();
    let disk = names.iter().map(|name| doc(name, NORMAL, 5, Progress::None)).collect();
    let on = |range: std::ops::Range<usize>| names[range].iter().map(|name| working(name, 5, 100)).collect();
    let mut w = World::started(disk, &[("n1", on(0..20)), ("n2", on(20..40)), ("n3", on(40..60))]);
    // Others fill the batch.
    for name in &names[..10] {
        w.pause(name);
    }
    w.drain("n2", Some(1000));
    w.log.clear();
    w.node("n3", Draining, "n2", 1001);
    w.node("n1", Alive, "n2", 1001);
    let from = |w: &World, node: &str| {
        w.log.iter().filter(|line| line.starts_with(&format!("wrote bump for {node} to n1"))).count()
    };
    assert_eq!((from(&w, "n2"), from(&w, "n3")), (5, 5));
    for _ in 0..20 {
        w.tick(500);
        w.obey();
    }
    let nodes: Vec<_> = w.core.views(None, w.now).into_iter().filter_map(|view| view.node).collect();
    assert!(nodes.iter().all(|node| node.as_str() == "n1"), "{nodes:?}");
}

#[test]
fn what_a_maintainer_counts_before_its_bootstrap_is_no_proof() {
    let mut w = draining();
    w.beat("n1", MaintainerStatus { bootstrap_done: false, ..reporting(working("a", 5, 100), 1001, 0, 0) });
    assert_eq!(w.view().pending, 2);
}

#[test]
fn a_maintainer_that_should_not_be_on_the_node_holds_the_drain() {
    let mut w = emptied();
    w.node("n2", Stopping, "n2", 1001);
    w.beat("n2", working("b", 5, 100));
    assert_eq!(w.view().remaining, 1);
    w.beat("n2", working("zzz", 5, 100));
    assert_eq!(w.view().remaining, 2);
    w.tick(3000);
    assert_eq!(w.view().remaining, 0);
}

#[test]
fn a_node_that_fell_silent_is_not_proven_empty() {
    let mut w = emptied();
    w.node("n2", Stopping, "n2", 1001);
    assert_eq!(w.view().remaining, 0);
    w.tick(31_000);
    assert_eq!((w.view().state, w.view().remaining), (NodeState::Unknown, 1));
}

#[test]
fn the_stored_document_reads_back_and_old_ones_are_filled_up() {
    let mut w = draining();
    w.tick(500);
    let doc = w.drain.take().unwrap();
    let text = serde_json::to_string(&doc).unwrap();
    assert_eq!(text, r#"{"epoch":1001,"target":"n2","requested-at":0,"completed":null,"cancelled":[]}"#);
    assert_eq!(serde_json::from_str::<DrainDoc>(&text).unwrap(), doc);
    assert_eq!(serde_json::from_str::<DrainDoc>("{}").unwrap(), DrainDoc::default());
}
