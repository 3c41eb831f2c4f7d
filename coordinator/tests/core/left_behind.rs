//! Histories in which something could be left behind, or waited for in vain: found by the walk, told shortly.

use coordinator::Error;
use coordinator::core::Command;
use expect_test::expect;
use heartbeatpb::config::{ChangefeedState, Progress};
use heartbeatpb::{NodeHeartbeat, NodeLiveness};
use messaging::ToCoordinator;

use crate::world::{NORMAL, World, doc, running, stopped, working};

fn heartbeat(liveness: NodeLiveness) -> ToCoordinator {
    ToCoordinator::NodeHeartbeat(NodeHeartbeat {
        liveness,
        node_epoch: 3,
        drain_target: None,
        drain_epoch: 0,
    })
}

#[test]
fn a_start_on_a_node_that_is_stopping_is_taken_back_and_goes_elsewhere() {
    let disk = vec![doc("a", NORMAL, 5, Progress::None)];
    let mut w = World::started(disk, &[("n1", vec![]), ("n2", vec![])]);
    w.expect(&expect![[r#"
        wrote bump for n1
        n1: Add a epoch 6 at 100"#]]);
    w.hear("n1", heartbeat(NodeLiveness::Stopping));
    // It may have taken the start before.
    w.expect(&expect!["n1: Remove a epoch 6 cascade"]);
    w.beat("n1", stopped("a", 6));
    w.ask(Command::Drain { node: "n1".into(), clock: Some(1) });
    w.hear(
        "n2",
        ToCoordinator::NodeHeartbeat(NodeHeartbeat {
            liveness: NodeLiveness::Alive,
            node_epoch: 4,
            drain_target: Some("n1".into()),
            drain_epoch: 2,
        }),
    );
    w.log.retain(|line| !line.contains("Target") && !line.contains("Liveness"));
    w.expect(&expect![[r#"
        wrote stop done
        reply 1: remaining 1
        wrote bump for n2
        n2: Add a epoch 7 at 100"#]]);
}

#[test]
fn a_resume_whose_answer_was_lost_is_carried_out_again() {
    let disk = vec![doc("a", ChangefeedState::Stopped, 5, Progress::None)];
    let mut w = World::started(disk, &[("n1", vec![])]);
    w.held = true;
    w.resume("a", None);
    let (id, write) = w.pending.remove(0);
    w.write(&id, &write).unwrap();
    let actions = w.core.on_written(&id, Err(Error::Conflict("a".to_owned())), w.now);
    w.perform(actions);
    w.held = false;
    w.tick(500);
    w.expect(&expect![[r#"
        begin resume
        wrote resume
        reply 1: checkpoint 100
        wrote bump for n1
        n1: Add a epoch 8 at 100"#]]);
}

#[test]
fn of_two_resumes_at_once_the_second_is_refused() {
    let disk = vec![doc("a", ChangefeedState::Stopped, 5, Progress::None)];
    let mut w = World::started(disk, &[("n1", vec![])]);
    w.held = true;
    w.resume("a", Some(40));
    w.resume("a", Some(30));
    w.settle_one();
    w.held = false;
    w.settle();
    w.expect(&expect![[r#"
        begin resume
        reply 1: checkpoint 40
        reply 2: CDC:ErrChangefeedUpdateRefused
        begin bump for n1
        wrote bump for n1
        n1: Add a epoch 7 at 40 new"#]]);
}

#[test]
fn the_stop_of_a_stale_maintainer_ends_with_its_node() {
    let disk = vec![doc("a", NORMAL, 5, Progress::None)];
    let (owner, stale) = (working("a", 5, 100), working("a", 4, 100));
    let mut w = World::started(disk, &[("n1", vec![owner]), ("n2", vec![stale])]);
    w.expect(&expect!["n2: Remove a epoch 4 cascade"]);
    w.nodes(&["n1"]);
    // The node of the owner would not stop epoch 4, whoever asks for it.
    w.expect(&expect!["wrote stop done"]);
    assert_eq!(w.table(), "a normal Replicating n1 saved=100");
}

#[test]
fn a_pause_while_a_stale_maintainer_is_stopped_stops_the_owner_too() {
    let disk = vec![doc("a", NORMAL, 5, Progress::None)];
    let found = || (working("a", 5, 100), working("a", 4, 100));
    let (owner, stale) = found();
    let mut w = World::started(disk.clone(), &[("n1", vec![]), ("n2", vec![owner]), ("n3", vec![stale])]);
    w.log.clear();
    w.pause("a");
    w.beat("n3", stopped("a", 4));
    w.beat("n2", stopped("a", 5));
    w.expect(&expect![[r#"
        wrote pause
        n2: Remove a epoch 5 cascade
        wrote stop done
        reply 1: checkpoint 100"#]]);

    // The owner is gone with its node, its dispatchers elsewhere are not.
    let (owner, stale) = found();
    let mut w = World::started(disk, &[("n1", vec![]), ("n2", vec![owner]), ("n3", vec![stale])]);
    w.log.clear();
    w.held = true;
    w.nodes(&["n1", "n3"]);
    w.pause("a");
    w.beat("n3", stopped("a", 4));
    w.held = false;
    w.settle();
    w.beat("n1", stopped("a", 5));
    w.expect(&expect![[r#"
        begin pause
        wrote pause
        n1: Remove a epoch 5 cascade
        wrote stop done
        reply 1: checkpoint 100"#]]);
}

#[test]
fn a_maintainer_of_which_its_node_does_not_speak_is_started_anew() {
    let mut w = running();
    for _ in 0..7 {
        w.tick(5000);
        w.hear("n1", heartbeat(NodeLiveness::Alive));
        w.log.retain(|line| !line.contains("Checkpoint"));
        if !w.log.is_empty() {
            break;
        }
    }
    w.expect(&expect!["n1: Remove a epoch 5 cascade"]);
    w.beat("n1", stopped("a", 5));
    w.expect(&expect![[r#"
        wrote stop done
        wrote bump for n1
        n1: Add a epoch 6 at 100"#]]);
}

#[test]
fn a_node_that_is_silent_is_asked_again_and_takes_nothing_with_it() {
    let mut w = running();
    w.answered.clear();
    let mut asked = 0;
    for _ in 0..30 {
        w.tick(2000);
        asked += w.log.iter().filter(|line| line.contains("Bootstrap")).count();
        w.log.clear();
    }
    assert_eq!(asked, 6, "every ten seconds");
    assert_eq!(w.table(), "a normal Replicating n1 saved=100", "only its node can say that it does not run");
    // The coordinator itself may have stood still: silence is measured from the first word on.
    w.hear("n1", heartbeat(NodeLiveness::Alive));
    w.tick(500);
    assert_eq!(w.table(), "a normal Replicating n1 saved=100");
}
