//! The last checkpoint of a maintainer that stops, and what is being tried again without stopping it.

use expect_test::expect;
use heartbeatpb::config::Progress;
use heartbeatpb::{ComponentState, MaintainerStatus, RunningError, Ts, WallTime, codes};

use crate::world::{NORMAL, World, doc, erring, id, report, running, working};

/// The last word of a maintainer.
fn left_at(epoch: u64, checkpoint: u64) -> MaintainerStatus {
    report("a", epoch, ComponentState::Stopped, checkpoint)
}

fn waiting(epoch: u64, checkpoint: u64, message: &str) -> MaintainerStatus {
    let trouble = RunningError {
        time: String::new(),
        node: "n1".to_owned(),
        code: codes::SINK_UNAVAILABLE.to_owned(),
        message: message.to_owned(),
    };
    MaintainerStatus { trouble: Some(trouble), ..working("a", epoch, checkpoint) }
}

/// A changefeed on the second of two nodes, which is then drained: a move to the first is under way.
fn moving() -> World {
    let disk = vec![doc("a", NORMAL, 5, Progress::None), doc("b", NORMAL, 5, Progress::None)];
    let both = vec![working("a", 5, 100), working("b", 5, 100)];
    let mut w = World::started(disk, &[("n1", vec![]), ("n2", both)]);
    w.tick(500);
    w.tick(15_000);
    assert!(w.log.contains(&"n2: Remove a epoch 5".to_owned()), "{:?}", w.log);
    w.log.clear();
    w
}

#[test]
fn a_move_begins_where_its_origin_has_left_off() {
    let mut w = moving();
    // While it leaves it is not the current one any more: only its last word counts.
    w.beat("n2", working("a", 5, 600));
    w.beat("n1", left_at(5, 900));
    w.expect(&expect![""]);
    w.beat("n2", left_at(5, 640));
    w.expect(&expect!["n1: Add a epoch 6 at 640"]);
    w.tick(500);
    w.log.retain(|line| line.starts_with("save"));
    w.expect(&expect!["save a@640"]);
}

#[test]
fn a_pause_ends_with_the_last_checkpoint_stored() {
    let mut w = running();
    w.pause("a");
    w.log.clear();
    w.beat("n1", left_at(5, 640));
    w.expect(&expect![[r#"
        wrote stop done
        reply 1: checkpoint 640"#]]);
    assert_eq!(w.stored(&id("a")).unwrap().status.checkpoint_ts, Ts(640));
    w.resume("a", None);
    w.log.retain(|line| line.contains("Add"));
    w.expect(&expect!["n1: Add a epoch 7 at 640"]);
}

#[test]
fn the_last_word_of_a_generation_that_a_person_has_set_back_is_not_heard() {
    let mut w = running();
    w.pause("a");
    w.resume("a", Some(50));
    w.log.clear();
    w.beat("n1", left_at(5, 640));
    w.tick(500);
    assert!(!w.log.iter().any(|line| line.contains("640")), "{:?}", w.log);
    assert_eq!(w.stored(&id("a")).unwrap().status.checkpoint_ts, Ts(50));
}

#[test]
fn what_a_maintainer_waits_for_is_shown_and_stops_nothing() {
    let mut w = running();
    w.beat("n1", waiting(5, 100, "nothing answers"));
    w.expect(&expect!["wrote state warning"]);
    let stored = w.stored(&id("a")).unwrap().info.clone();
    assert_eq!(stored.error.unwrap().code, codes::SINK_UNAVAILABLE);
    for _ in 0..60 {
        w.beat("n1", waiting(5, 100, "nothing answers"));
        w.tick(500);
    }
    w.log.retain(|line| !line.contains("Checkpoint"));
    w.expect(&expect![""]);
    // It is back: no pause is waited for.
    w.beat("n1", working("a", 5, 200));
    w.expect(&expect!["wrote state normal"]);
    assert_eq!(w.stored(&id("a")).unwrap().info.error, None);
}

#[test]
fn an_error_beside_a_wait_starts_the_changefeed_again() {
    let mut w = running();
    w.beat("n1", waiting(5, 100, "nothing answers"));
    w.log.clear();
    let both = MaintainerStatus {
        trouble: waiting(5, 100, "nothing answers").trouble,
        ..erring("a", 5, 100, "CDC:ErrX")
    };
    w.beat("n1", both);
    w.expect(&expect![[r#"
        wrote bump with warning CDC:ErrX
        n1: Remove a epoch 5 cascade"#]]);
    // What is being stopped waits for something: that is no reason to take the restart back.
    w.beat("n1", waiting(5, 100, "nothing answers"));
    w.expect(&expect![""]);
}

#[test]
fn the_time_of_the_stored_checkpoint_is_that_which_its_maintainer_told() {
    let at = |checkpoint, micros: Option<i64>| MaintainerStatus {
        checkpoint_time: micros.map(WallTime),
        ..working("a", 5, checkpoint)
    };
    let mut w = running();
    let time = |w: &World| w.core.views(None, w.now)[0].saved_time;
    assert_eq!(time(&w), None);
    w.beat("n1", at(200, Some(7_000)));
    assert_eq!(time(&w), None, "it is not stored yet");
    w.tick(500);
    assert_eq!(time(&w), Some(WallTime(7_000)));
    w.beat("n1", at(300, Some(9_000)));
    assert_eq!(time(&w), Some(WallTime(7_000)), "that of what is stored");
    w.tick(500);
    assert_eq!(time(&w), Some(WallTime(9_000)));
    w.beat("n1", at(400, None));
    w.tick(500);
    assert_eq!(time(&w), None, "nobody knows");
}
