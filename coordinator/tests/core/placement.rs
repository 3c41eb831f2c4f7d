//! Histories of moves and of the schedulers.

use coordinator::core::Command;
use expect_test::expect;
use heartbeatpb::config::{ChangefeedState, Progress};
use heartbeatpb::{MaintainerStatus, NodeId};

use crate::world::{NORMAL, World, answer, doc, erring, stopped, working};

/// Two changefeeds on the second of three nodes, and a move of the first to the first node under way.
fn moving() -> World {
    let disk = vec![doc("a", NORMAL, 5, Progress::None), doc("b", NORMAL, 5, Progress::None)];
    let both = vec![working("a", 5, 100), working("b", 5, 100)];
    let mut w = World::started(disk, &[("n1", vec![]), ("n2", both)]);
    w.tick(500);
    w.log.clear();
    w.tick(15_000);
    w.log.retain(|line| !line.contains("Checkpoint"));
    w.expect(&expect![[r#"
        wrote bump for n2 to n1
        n2: Remove a epoch 5"#]]);
    w
}

#[test]
// behaviour: coordinator-OP-4, coordinator-OP-16, coordinator-SC-2
fn a_move_stops_the_origin_before_the_target_starts() {
    let mut w = moving();
    assert_eq!(w.table().lines().next(), Some("a normal Scheduling n2 saved=100"), "bound until it stopped");
    w.tick(500);
    w.expect(&expect!["n2: Remove a epoch 5"]);
    for status in [stopped("a", 6), stopped("a", 4), working("a", 5, 900)] {
        w.beat("n2", status);
    }
    w.beat("n1", stopped("a", 5));
    w.expect(&expect![""]);
    w.beat("n2", stopped("a", 5));
    w.expect(&expect!["n1: Add a epoch 6 at 100"]);
    w.tick(500);
    w.expect(&expect!["n1: Add a epoch 6 at 100"]);
    w.beat("n1", MaintainerStatus { bootstrap_done: false, ..working("a", 6, 100) });
    w.beat("n2", stopped("a", 5));
    w.expect(&expect![""]);
    w.beat("n1", working("a", 6, 100));
    w.expect(&expect!["n1: Checkpoint a 100"]);
    assert_eq!(w.table(), "a normal Replicating n1 saved=100\nb normal Replicating n2 saved=100");
    w.beat("n1", working("a", 6, 100));
    w.expect(&expect![""]);
}

#[test]
// behaviour: coordinator-OP-7, coordinator-OP-17
fn a_stop_during_a_move_goes_to_the_maintainer_that_runs() {
    let mut w = moving();
    w.pause("a");
    w.expect(&expect![[r#"
        wrote pause
        n2: Remove a epoch 5 cascade"#]]);
    w.tick(500);
    w.expect(&expect!["n2: Remove a epoch 5 cascade"]);
    w.beat("n2", stopped("a", 5));
    // It may have stopped for the move, and then its dispatchers are where they were.
    w.expect(&expect!["n1: Remove a epoch 6 cascade"]);
    w.beat("n2", stopped("a", 5));
    w.expect(&expect![""]);
    w.beat("n1", stopped("a", 6));
    w.expect(&expect![[r#"
        wrote stop done
        reply 1: checkpoint 100"#]]);

    let mut w = moving();
    w.beat("n2", stopped("a", 5));
    w.log.clear();
    w.remove("a");
    w.tick(500);
    w.expect(&expect![[r#"
        wrote removing
        n1: Remove a epoch 6 cascade removed
        n1: Remove a epoch 6 cascade removed"#]]);
}

#[test]
fn an_error_of_the_target_replaces_the_move() {
    let mut w = moving();
    w.beat("n2", stopped("a", 5));
    w.beat("n1", MaintainerStatus { bootstrap_done: false, ..erring("a", 6, 100, "CDC:ErrX") });
    w.expect(&expect![[r#"
        n1: Add a epoch 6 at 100
        wrote bump with warning CDC:ErrX
        n1: Remove a epoch 6 cascade"#]]);
}

#[test]
// behaviour: coordinator-OP-12
fn a_target_lost_before_the_origin_stopped_leaves_the_changefeed_where_it_was() {
    let mut w = moving_between("n2", "n3");
    w.nodes(&["n1", "n2"]);
    w.tick(500);
    w.expect(&expect!["n2: Remove a epoch 5"]);
    w.beat("n2", stopped("a", 5));
    w.expect(&expect!["n2: Add a epoch 6 at 100"]);
    w.nodes(&["n1"]);
    w.expect(&expect![[r#"
        wrote bump for n1
        n1: Add a epoch 7 at 100
        wrote bump for n1
        n1: Add b epoch 6 at 100"#]]);
}

/// A move of `a` between two nodes neither of which is the coordinator's own.
fn moving_between(origin: &str, dest: &str) -> World {
    let names = ["a", "b", "c"];
    let disk = names.iter().map(|name| doc(name, NORMAL, 5, Progress::None)).collect();
    let both = vec![working("a", 5, 100), working("b", 5, 100)];
    let mut w = World::started(disk, &[("n1", vec![working("c", 5, 100)]), (origin, both), (dest, vec![])]);
    w.tick(500);
    w.log.clear();
    w.tick(15_000);
    w.log.retain(|line| !line.contains("Checkpoint"));
    assert_eq!(w.log, [format!("wrote bump for {origin} to {dest}"), format!("{origin}: Remove a epoch 5")]);
    w.log.clear();
    w
}

#[test]
// behaviour: coordinator-OP-13, coordinator-OP-15
fn a_target_lost_after_it_may_have_started_is_not_replaced_under_the_same_epoch() {
    let mut w = moving_between("n2", "n3");
    w.beat("n2", stopped("a", 5));
    w.log.clear();
    w.nodes(&["n1", "n2"]);
    w.expect(&expect![[r#"
        wrote bump for n1
        n1: Add a epoch 7 at 100"#]]);
    w.beat("n3", working("a", 6, 900));
    w.tick(500);
    w.expect(&expect!["n1: Add a epoch 7 at 100"]);
}

#[test]
// behaviour: coordinator-OP-14
fn an_origin_that_left_is_not_waited_for() {
    let mut w = moving_between("n2", "n3");
    w.nodes(&["n1", "n3"]);
    w.log.sort();
    w.expect(&expect![[r#"
        n1: Add b epoch 6 at 100
        n3: Add a epoch 6 at 100
        wrote bump for n1"#]]);
    w.beat("n3", working("a", 6, 100));
    assert!(w.table().starts_with("a normal Replicating n3"));

    // Both leave: no target is left that could be bound.
    let mut w = moving_between("n2", "n3");
    w.nodes(&["n1"]);
    assert!(w.log.contains(&"n1: Add a epoch 7 at 100".to_owned()), "{:?}", w.log);
}

#[test]
fn a_move_whose_target_leaves_while_the_epoch_is_stored_still_replaces_the_maintainer() {
    let disk = vec![doc("a", NORMAL, 5, Progress::None), doc("b", NORMAL, 5, Progress::None)];
    let both = vec![working("a", 5, 100), working("b", 5, 100)];
    let mut w = World::started(disk, &[("n1", both), ("n2", vec![])]);
    w.held = true;
    w.tick(15_500);
    w.tick(15_500);
    w.pause("a");
    w.nodes(&["n1"]);
    w.log.retain(|line| !line.contains("Checkpoint") && !line.contains("Bootstrap"));
    w.expect(&expect!["begin bump for n1 to n2"]);
    w.held = false;
    w.settle();
    w.expect(&expect![[r#"
        wrote bump for n1 to n2
        n1: Remove a epoch 5
        wrote pause
        n1: Remove a epoch 5 cascade"#]]);
}

#[test]
// behaviour: coordinator-OP-8
fn operators_are_counted_by_the_nodes_they_concern() {
    let w = moving_between("n2", "n3");
    let count = |node: &str| (w.core.operators_on(&node.into()), w.core.moves_from(&node.into()));
    assert_eq!((count("n1"), count("n2"), count("n3")), ((0, 0), (1, 1), (1, 0)));
}

#[test]
// behaviour: coordinator-OP-20
fn commands_that_are_due_go_out_in_the_order_of_their_time() {
    let disk: Vec<_> = ["a", "b", "c"].iter().map(|name| doc(name, NORMAL, 5, Progress::None)).collect();
    let all = ["a", "b", "c"].iter().map(|name| working(name, 5, 100)).collect();
    let mut w = World::started(disk, &[("n1", all)]);
    for name in ["c", "a", "b"] {
        w.tick(100);
        w.pause(name);
    }
    w.beat("n1", stopped("a", 5));
    w.log.clear();
    w.tick(1000);
    w.log.retain(|line| line.contains("Remove"));
    w.expect(&expect![[r#"
        n1: Remove c epoch 5 cascade
        n1: Remove b epoch 5 cascade"#]]);
}

#[test]
// behaviour: coordinator-CO-2
fn nodes_that_join_get_their_share_and_what_a_lost_node_had_runs_on_the_rest() {
    let names: Vec<String> = (0..40).map(|n| format!("f{n}")).collect();
    let disk = names.iter().map(|name| doc(name, NORMAL, 5, Progress::None)).collect();
    let all = names.iter().map(|name| working(name, 5, 100)).collect();
    let mut w = World::started(disk, &[("n1", all)]);
    w.nodes(&["n1", "n2", "n3"]);
    w.hear("n2", answer(vec![]));
    w.hear("n3", answer(vec![]));
    w.log.clear();
    let spread = |w: &World, node: &str| {
        w.core.views(None, w.now).iter().filter(|view| view.node == Some(NodeId::from(node))).count()
    };
    w.tick(16_000);
    for _ in 0..200 {
        w.tick(500);
        w.obey();
    }
    assert_eq!((spread(&w, "n1"), spread(&w, "n2"), spread(&w, "n3")), (14, 13, 13));
    w.nodes(&["n1", "n3"]);
    for _ in 0..20 {
        w.tick(500);
        w.obey();
    }
    assert_eq!((spread(&w, "n1"), spread(&w, "n3")), (20, 20));
    assert_eq!(w.core.counts().working, 40);
}

#[test]
fn balancing_ends_when_nothing_may_move() {
    let disk: Vec<_> =
        ["a", "b"].iter().map(|name| doc(name, ChangefeedState::Stopped, 5, Progress::None)).collect();
    let mut w = World::started(disk, &[("n1", vec![]), ("n2", vec![])]);
    w.tick(60_000);
    w.expect(&expect![""]);
    let info = Box::new(doc("c", NORMAL, 0, Progress::None).info);
    w.ask(Command::Create { info, candidate: 9 });
    w.beat("n1", working("c", 10, 10));
    w.log.clear();
    w.tick(60_000);
    w.log.retain(|line| line.contains("bump"));
    w.expect(&expect![""]);
}

#[test]
// behaviour: coordinator-SC-10
fn balancing_ends_when_every_move_is_refused() {
    let names: Vec<String> = (0..30).map(|n| format!("f{n}")).collect();
    let disk = names.iter().map(|name| doc(name, NORMAL, 5, Progress::None)).collect();
    let all = names.iter().map(|name| working(name, 5, 100)).collect();
    let mut w = World::started(disk, &[("n1", all), ("n2", vec![])]);
    w.tick(500);
    w.log.clear();
    w.failing = true;
    w.tick(15_000);
    let tried = |w: &World| w.log.iter().filter(|line| line.starts_with("lost bump for n1 to n2")).count();
    assert_eq!(tried(&w), 10, "a batch, each once");
    w.log.clear();
    w.tick(500);
    assert!(tried(&w) <= 10, "{:?}", w.log);
    w.failing = false;
    w.log.clear();
    w.tick(30_000);
    assert_eq!(w.log.iter().filter(|line| line.starts_with("wrote bump for n1 to n2")).count(), 10);
}

#[test]
fn a_maintainer_in_the_way_of_a_start_or_a_stop_is_told_to_go() {
    let mut w = World::started(vec![doc("a", NORMAL, 5, Progress::None)], &[("n1", vec![])]);
    w.log.clear();
    w.beat("n1", working("a", 4, 100));
    w.expect(&expect!["n1: Remove a epoch 4 cascade"]);
    w.pause("a");
    w.log.clear();
    w.beat("n1", working("a", 6, 100));
    w.expect(&expect![""]);
    w.tick(1000);
    w.log.clear();
    w.beat("n1", working("a", 4, 100));
    w.expect(&expect!["n1: Remove a epoch 4 cascade"]);
}

#[test]
fn what_a_maintainer_that_came_back_left_on_other_nodes_is_closed() {
    let disk = vec![doc("a", ChangefeedState::Stopped, 5, Progress::None)];
    let mut w = World::started(disk, &[("n1", vec![]), ("n2", vec![])]);
    w.beat("n2", working("a", 5, 100));
    w.nodes(&["n1"]);
    w.expect(&expect![[r#"
        n2: Remove a epoch 5 cascade
        n1: Remove a epoch 5 cascade"#]]);
}

#[test]
fn the_loss_of_the_owner_is_seen_while_a_stale_maintainer_is_being_stopped() {
    let disk = vec![doc("a", NORMAL, 5, Progress::None)];
    let (owner, stale) = (working("a", 5, 100), working("a", 4, 100));
    let mut w = World::started(disk, &[("n1", vec![]), ("n2", vec![owner]), ("n3", vec![stale])]);
    w.log.clear();
    w.nodes(&["n1", "n3"]);
    w.beat("n3", stopped("a", 4));
    w.expect(&expect![[r#"
        wrote stop done
        wrote bump for n1
        n1: Add a epoch 6 at 100"#]]);
}
