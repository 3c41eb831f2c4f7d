//! Histories of changefeeds: what is stored, sent and answered.

use coordinator::core::Command;
use coordinator::meta::Stored;
use expect_test::expect;
use heartbeatpb::config::{ChangefeedState, Progress};
use heartbeatpb::{MaintainerStatus, NodeId};

use crate::world::{NORMAL, World, answer, doc, erring, running, stopped, working};

#[test]
// behaviour: coordinator-OP-4
// behaviour: coordinator-OP-11
// behaviour: coordinator-DB-1
fn a_stored_changefeed_is_placed_under_a_durable_larger_epoch_and_repeated_until_it_runs() {
    let mut w = World::started(vec![doc("a", NORMAL, 5, Progress::None)], &[("n1", vec![])]);
    w.expect(&expect![[r#"
        wrote bump for n1
        n1: Add a epoch 6 at 100"#]]);
    w.tick(400);
    w.expect(&expect![""]);
    w.tick(100);
    w.expect(&expect!["n1: Add a epoch 6 at 100"]);
    w.beat("n1", MaintainerStatus { bootstrap_done: false, ..working("a", 6, 100) });
    w.beat("n1", working("a", 5, 100));
    w.beat("n1", working("a", 0, 100));
    assert_eq!(w.table(), "a normal Scheduling n1 saved=100");
    w.beat("n1", working("a", 6, 100));
    assert_eq!(w.table(), "a normal Replicating n1 saved=100");
    w.expect(&expect![[r#"
        n1: Remove a epoch 5 cascade
        n1: Checkpoint a 100"#]]);
    w.tick(500);
    w.expect(&expect![""]);
}

#[test]
fn a_checkpoint_is_told_only_after_it_is_durable() {
    let mut w = running();
    w.beat("n1", working("a", 5, 150));
    w.beat("n1", working("a", 5, 160));
    w.expect(&expect![""]);
    w.failing = true;
    w.tick(500);
    w.expect(&expect!["save a@160"]);
    w.failing = false;
    w.tick(500);
    w.expect(&expect![[r#"
        save a@160
        n1: Checkpoint a 160"#]]);
    w.tick(5000);
    w.expect(&expect!["n1: Checkpoint a 160"]);
    assert_eq!(w.table(), "a normal Replicating n1 saved=160");
}

#[test]
// behaviour: coordinator-CO-17
fn a_new_changefeed_is_stored_then_placed_as_new() {
    let mut w = World::started(vec![], &[("n1", vec![])]);
    let info = doc("a", NORMAL, 0, Progress::None).info;
    let create = Command::Create { info: Box::new(info), candidate: 9 };
    w.ask(create.clone());
    w.expect(&expect![[r#"
        wrote create
        reply 1: info a epoch 9
        wrote bump for n1
        n1: Add a epoch 10 at 10 new"#]]);
    w.ask(create.clone());
    w.expect(&expect!["reply 2: CDC:ErrChangeFeedAlreadyExists"]);
    let mut new = World::new(vec![]);
    new.ask(create);
    new.expect(&expect!["reply 1: CDC:ErrCaptureNotInitialized"]);
}

#[test]
fn a_changefeed_that_is_not_stored_yet_is_not_said_to_exist() {
    let mut w = World::started(vec![], &[("n1", vec![])]);
    w.held = true;
    let info = doc("a", NORMAL, 0, Progress::None).info;
    let create = Command::Create { info: Box::new(info), candidate: 9 };
    w.ask(create.clone());
    w.ask(create.clone());
    w.expect(&expect![[r#"
        begin create
        reply 2: CDC:ErrChangeFeedCreationUnfinished"#]]);
    w.failing = true;
    w.settle();
    w.expect(&expect![[r#"
        lost create
        reply 1: CDC:ErrMetaOpFailed"#]]);
    w.failing = false;
    w.ask(create);
    w.expect(&expect!["begin create"]);
    w.settle_one();
    w.expect(&expect![[r#"
        reply 3: info a epoch 9
        begin bump for n1"#]]);
}

#[test]
// behaviour: coordinator-CO-18
fn a_pause_is_durable_before_the_maintainer_hears_of_it() {
    let mut w = running();
    w.held = true;
    w.pause("a");
    w.expect(&expect!["begin pause"]);
    w.held = false;
    w.settle();
    w.expect(&expect![[r#"
        wrote pause
        n1: Remove a epoch 5 cascade"#]]);
    w.tick(500);
    w.expect(&expect!["n1: Remove a epoch 5 cascade"]);
    w.beat("n1", stopped("a", 4));
    w.expect(&expect![""]);
    w.beat("n1", stopped("a", 5));
    w.expect(&expect![[r#"
        wrote stop done
        reply 1: checkpoint 100"#]]);
    w.pause("a");
    w.expect(&expect!["reply 2: checkpoint 100"]);
    w.pause("b");
    w.remove("b");
    w.expect(&expect![[r#"
        reply 3: CDC:ErrChangeFeedNotExists
        reply 4: CDC:ErrChangeFeedNotExists"#]]);
}

#[test]
// behaviour: coordinator-CO-14
// behaviour: coordinator-CO-15
// behaviour: coordinator-CO-16
fn a_resume_starts_under_a_larger_epoch_with_nothing_held_against_it() {
    let mut w = running();
    w.resume("a", None);
    w.expect(&expect!["reply 1: CDC:ErrChangefeedUpdateRefused"]);
    w.beat("n1", erring("a", 5, 100, "CDC:ErrDispatcherFailed"));
    w.beat("n1", stopped("a", 5));
    w.expect(&expect![[r#"
        wrote state failed
        n1: Remove a epoch 5 cascade
        wrote stop done"#]]);
    assert_eq!(w.table(), "a failed Stopped - saved=100");
    w.resume("a", Some(40));
    w.expect(&expect![[r#"
        wrote resume
        reply 2: checkpoint 40
        wrote bump for n1
        n1: Add a epoch 7 at 40 new"#]]);
    assert_eq!(w.table(), "a normal Scheduling n1 saved=40");
}

#[test]
// behaviour: coordinator-OP-19
// behaviour: coordinator-OP-22
fn a_removal_ends_only_when_nothing_is_left() {
    let mut w = running();
    w.remove("a");
    w.remove("a");
    w.expect(&expect![[r#"
        wrote removing
        n1: Remove a epoch 5 cascade removed"#]]);
    assert_eq!(w.table(), "", "people do not see it any more");
    w.failing = true;
    w.beat("n1", stopped("a", 5));
    w.expect(&expect!["lost drop retention"]);
    w.tick(100);
    w.expect(&expect![""]);
    w.tick(900);
    w.expect(&expect!["lost drop retention"]);
    let info = doc("a", NORMAL, 0, Progress::None).info;
    w.ask(Command::Create { info: Box::new(info), candidate: 9 });
    w.expect(&expect!["reply 3: CDC:ErrChangeFeedDeletionUnfinished"]);
    w.failing = false;
    w.tick(30_000);
    w.expect(&expect![[r#"
        wrote drop retention
        wrote delete
        reply 1: checkpoint 100
        reply 2: checkpoint 100"#]]);
    assert!(w.disk.is_empty());
}

#[test]
// behaviour: coordinator-CO-7
// behaviour: coordinator-CO-6
fn a_retryable_error_restarts_the_maintainer_once_per_incident() {
    let mut w = running();
    w.beat("n1", erring("a", 5, 100, "CDC:ErrX"));
    w.expect(&expect![[r#"
        wrote bump with warning CDC:ErrX
        n1: Remove a epoch 5 cascade"#]]);
    w.beat("n1", erring("a", 5, 100, "CDC:ErrX"));
    w.expect(&expect![""]);
    assert_eq!(w.table(), "a warning Absent - saved=100");
    w.beat("n1", stopped("a", 5));
    w.expect(&expect!["wrote stop done"]);
    w.tick(5_000);
    w.expect(&expect![""]);
    w.tick(6_500);
    w.expect(&expect![[r#"
        wrote bump for n1
        n1: Add a epoch 7 at 100"#]]);
    w.beat("n1", working("a", 7, 100));
    w.log.clear();
    // The same error again, while the state still is warning: restarted, although nothing new is to be stored.
    w.beat("n1", erring("a", 7, 100, "CDC:ErrX"));
    w.expect(&expect![[r#"
        wrote bump with warning CDC:ErrX
        n1: Remove a epoch 7 cascade"#]]);
    w.beat("n1", stopped("a", 7));
    w.tick(25_000);
    w.beat("n1", working("a", 9, 100));
    w.log.clear();
    w.beat("n1", working("a", 9, 101));
    w.expect(&expect!["wrote state normal"]);
}

#[test]
fn an_error_before_the_maintainer_finished_starting_replaces_the_start() {
    let mut w = World::started(vec![doc("a", NORMAL, 5, Progress::None)], &[("n1", vec![])]);
    w.log.clear();
    w.beat("n1", MaintainerStatus { bootstrap_done: false, ..erring("a", 6, 100, "CDC:ErrX") });
    w.expect(&expect![[r#"
        wrote bump with warning CDC:ErrX
        n1: Remove a epoch 6 cascade"#]]);
    w.tick(500);
    w.expect(&expect!["n1: Remove a epoch 6 cascade"]);
}

#[test]
// behaviour: coordinator-CO-8
// behaviour: coordinator-CO-27
// behaviour: coordinator-CO-30
fn a_failed_state_is_applied_however_often_its_write_fails() {
    let mut w = running();
    w.failing = true;
    w.beat("n1", erring("a", 5, 100, "CDC:ErrDispatcherFailed"));
    w.beat("n1", working("a", 5, 120));
    w.tick(700);
    w.expect(&expect![[r#"
        lost state failed
        save a@120
        lost state failed"#]]);
    assert_eq!(w.table(), "a normal Replicating n1 saved=100", "memory follows the store, not the other way");
    w.failing = false;
    w.tick(30_000);
    w.expect(&expect![[r#"
        n1: Checkpoint a 100
        save a@120
        n1: Checkpoint a 120
        wrote state failed
        n1: Remove a epoch 5 cascade"#]]);
}

#[test]
// behaviour: coordinator-CO-9
// behaviour: coordinator-CO-10
// behaviour: coordinator-CO-11
fn reports_count_only_from_whom_they_should_come() {
    let mut w =
        World::started(vec![doc("a", NORMAL, 2, Progress::None)], &[("n1", vec![working("a", 2, 100)])]);
    w.nodes(&["n1", "n2"]);
    w.log.clear();
    w.beat("n2", working("x", 7, 1));
    w.expect(&expect![""]);
    w.hear("n2", answer(vec![]));
    w.beat("n2", working("x", 7, 1));
    w.beat("n2", working("x", 7, 1));
    w.expect(&expect!["n2: Remove x epoch 7 cascade removed"]);
    w.beat("n1", working("a", 1, 900));
    w.beat("n2", working("a", 2, 900));
    w.tick(500);
    assert!(!w.log.iter().any(|line| line.contains("900")), "{:?}", w.log);
    w.beat("n1", working("a", 2, 130));
    w.log.clear();
    w.tick(500);
    w.expect(&expect![[r#"
        save a@130
        n1: Checkpoint a 130"#]]);
}

#[test]
// behaviour: coordinator-CO-3
// behaviour: coordinator-CO-12
fn stored_intents_are_finished_after_a_restart() {
    for (progress, state) in [(Progress::Removing, NORMAL), (Progress::Stopping, ChangefeedState::Stopped)] {
        let removed = if progress == Progress::Removing { " removed" } else { "" };
        let disk = vec![doc("a", state, 2, progress)];
        let mut w = World::started(disk.clone(), &[("n1", vec![]), ("n2", vec![])]);
        assert_eq!(w.log, [format!("n1: Remove a epoch 2 cascade{removed}")], "addressed to the own node");

        let mut w2 = World::started(disk, &[("n1", vec![]), ("n2", vec![working("a", 1, 100)])]);
        assert_eq!(w2.log, [format!("n2: Remove a epoch 1 cascade{removed}")], "its own epoch names it");
        w2.log.clear();
        w2.beat("n2", stopped("a", 1));
        let again = format!("n1: Remove a epoch 2 cascade{removed}");
        assert_eq!(w2.log, [again], "it may have left dispatchers behind");
        w2.beat("n1", stopped("a", 2));
        w.beat("n1", stopped("a", 2));
        for w in [&w, &w2] {
            assert_eq!(w.disk.is_empty(), progress == Progress::Removing);
        }
    }
    let mut w = World::started(
        vec![doc("a", NORMAL, 2, Progress::None)],
        &[("n1", vec![]), ("n2", vec![working("a", 1, 100)])],
    );
    w.expect(&expect!["n2: Remove a epoch 1 cascade"]);
    w.beat("n2", stopped("a", 1));
    w.expect(&expect![[r#"
        wrote stop done
        wrote bump for n1
        n1: Add a epoch 3 at 100"#]]);
}

#[test]
// behaviour: coordinator-CO-13
// behaviour: coordinator-CO-28
fn one_current_maintainer_is_adopted_and_two_are_both_stopped() {
    let disk = vec![doc("a", NORMAL, 2, Progress::None)];
    let old = ("n2", vec![working("a", 1, 100)]);
    let mut w = World::started(disk.clone(), &[("n1", vec![working("a", 2, 120)]), old]);
    w.expect(&expect!["n2: Remove a epoch 1 cascade"]);
    assert_eq!(w.table(), "a normal Replicating n1 saved=100", "only the stored checkpoint is durable");

    let mut w =
        World::started(disk, &[("n1", vec![working("a", 2, 120)]), ("n2", vec![working("a", 2, 110)])]);
    w.expect(&expect![[r#"
        n1: Remove a epoch 2 cascade
        n2: Remove a epoch 2 cascade"#]]);
    w.beat("n1", stopped("a", 2));
    w.expect(&expect![[r#"
        wrote stop done
        wrote bump for n1
        n1: Add a epoch 3 at 100"#]]);
}

#[test]
// behaviour: coordinator-CO-29, coordinator-OP-2
fn a_late_node_with_a_stale_maintainer_is_told_to_stop_it_while_it_reports() {
    let mut w = running();
    w.nodes(&["n1", "n2"]);
    w.expect(&expect!["n2: Bootstrap v7"]);
    w.hear("n2", answer(vec![working("a", 4, 90)]));
    w.expect(&expect!["n2: Remove a epoch 4 cascade"]);
    w.beat("n2", working("a", 4, 90));
    w.expect(&expect![""]);
    w.tick(1000);
    w.beat("n2", working("a", 4, 90));
    w.expect(&expect!["n2: Remove a epoch 4 cascade"]);
    assert_eq!(w.table(), "a normal Replicating n1 saved=100", "the current one is left alone");
}

#[test]
fn the_newest_answers_count_and_a_node_that_joins_while_changefeeds_are_read_is_waited_for() {
    let mut w = World::new(vec![doc("a", NORMAL, 5, Progress::None)]);
    w.nodes(&["n1"]);
    w.hear("n1", answer(vec![working("a", 5, 100)]));
    w.hear("n1", answer(Vec::new()));
    w.nodes(&["n1", "n2"]);
    w.log.clear();
    let loaded = w.disk.clone();
    let actions = w.core.on_loaded(loaded, w.now);
    w.perform(actions);
    w.expect(&expect![""]);
    assert!(!w.core.is_initialized(), "what runs on n2 is not known");
    w.hear("n2", answer(vec![working("a", 5, 110)]));
    assert_eq!(w.table(), "a normal Replicating n2 saved=100");
    w.hear("n3", answer(vec![working("a", 5, 120)]));
    w.beat("n1", working("a", 5, 130));
    assert_eq!(w.table(), "a normal Replicating n2 saved=100", "n3 is nobody's node, n1 not its node");
}

#[test]
fn a_stopped_changefeed_found_running_is_stopped() {
    let disk = vec![doc("a", ChangefeedState::Stopped, 2, Progress::None)];
    let mut w = World::started(disk, &[("n1", vec![working("a", 2, 120)])]);
    w.expect(&expect!["n1: Remove a epoch 2 cascade"]);
}

#[test]
// behaviour: coordinator-CO-1
fn many_changefeeds_are_placed_within_the_budget_on_the_least_loaded_nodes() {
    let disk: Vec<Stored> = (0..1000).map(|n| doc(&format!("f{n}"), NORMAL, 1, Progress::None)).collect();
    let mut w = World::started(disk, &[("n1", vec![]), ("n2", vec![])]);
    for _ in 0..200 {
        let adds: Vec<(String, String)> = std::mem::take(&mut w.log)
            .iter()
            .filter_map(|line| line.split_once(": Add "))
            .map(|(node, rest)| (node.to_owned(), rest.split(' ').next().unwrap_or_default().to_owned()))
            .collect();
        assert!(adds.len() <= 10, "at most one batch at a time");
        for (node, name) in adds {
            w.beat(&node, working(&name, 2, 100));
        }
    }
    let counts = w.core.counts();
    assert_eq!((counts.total, counts.working, counts.absent, counts.scheduling), (1000, 1000, 0, 0));
    let on = |node: &str| {
        w.core.views(None, w.now).iter().filter(|view| view.node == Some(NodeId::from(node))).count()
    };
    assert_eq!((on("n1"), on("n2")), (500, 500));
}

#[test]
// behaviour: coordinator-SC-9, coordinator-DB-5
fn changefeeds_that_wait_after_an_error_hold_up_no_others() {
    let names: Vec<String> = (10..25).map(|n| format!("f{n}")).collect();
    let disk = names.iter().map(|name| doc(name, NORMAL, 5, Progress::None)).collect();
    let all = names.iter().map(|name| working(name, 5, 100)).collect();
    let mut w = World::started(disk, &[("n1", all)]);
    let (waiting, others) = names.split_at(10);
    for name in waiting {
        w.beat("n1", erring(name, 5, 100, "CDC:ErrX"));
        w.beat("n1", stopped(name, 5));
    }
    let added = |w: &mut World| {
        let adds = std::mem::take(&mut w.log).into_iter().filter(|line| line.contains(": Add ")).count();
        (adds, w.core.counts().absent)
    };
    assert_eq!(added(&mut w), (0, 10), "a batch of changefeeds waits");
    for name in others {
        w.beat("n1", stopped(name, 5));
    }
    assert_eq!(added(&mut w), (5, 10), "the others have a new place at once");
    for name in others {
        w.beat("n1", working(name, 6, 100));
    }
    w.tick(12_000);
    assert_eq!(added(&mut w), (10, 0));
}

#[test]
// behaviour: coordinator-OP-9
// behaviour: coordinator-OP-18
fn the_loss_of_a_node_frees_its_changefeeds_and_redirects_stops() {
    let disk = vec![doc("a", NORMAL, 5, Progress::None), doc("b", NORMAL, 5, Progress::None)];
    let both = vec![working("a", 5, 100), working("b", 5, 100)];
    let mut w = World::started(disk, &[("n1", vec![]), ("n2", both)]);
    w.pause("b");
    w.log.clear();
    w.nodes(&["n1"]);
    w.expect(&expect![[r#"
        n1: Remove b epoch 5 cascade
        wrote bump for n1
        n1: Add a epoch 6 at 100"#]]);
    w.nodes(&["n1", "n3"]);
    w.hear("n3", answer(vec![]));
    w.beat("n1", stopped("b", 5));
    w.beat("n1", working("a", 6, 100));
    w.resume("b", None);
    w.log.clear();
    w.nodes(&["n1"]);
    w.expect(&expect![[r#"
        wrote bump for n1
        n1: Add b epoch 8 at 100"#]]);
}

#[test]
// behaviour: coordinator-OP-1
// behaviour: coordinator-OP-10
fn a_pause_wins_over_a_start_and_a_removal_over_a_pause() {
    let mut w = World::started(vec![doc("a", NORMAL, 5, Progress::None)], &[("n1", vec![])]);
    w.log.clear();
    w.pause("a");
    w.expect(&expect![[r#"
        wrote pause
        n1: Remove a epoch 6 cascade"#]]);
    w.remove("a");
    w.expect(&expect![[r#"
        wrote removing
        n1: Remove a epoch 6 cascade removed"#]]);
    w.pause("a");
    w.expect(&expect!["reply 3: CDC:ErrChangeFeedNotExists"]);
    w.beat("n1", working("a", 6, 100));
    w.expect(&expect![""]);
    w.beat("n1", stopped("a", 6));
    w.expect(&expect![[r#"
        wrote drop retention
        wrote delete
        reply 2: checkpoint 100
        reply 1: CDC:ErrChangeFeedNotExists"#]]);
}

#[test]
// behaviour: coordinator-OP-3
// behaviour: coordinator-OP-5
// behaviour: coordinator-OP-6
fn a_pause_during_a_bump_wins_and_nothing_starts() {
    let mut w = World::new(vec![doc("a", NORMAL, 5, Progress::None)]);
    w.held = true;
    w.nodes(&["n1"]);
    let loaded = w.disk.clone();
    let actions = w.core.on_loaded(loaded, w.now);
    w.perform(actions);
    w.log.clear();
    w.hear("n1", answer(vec![]));
    w.expect(&expect!["begin bump for n1"]);
    w.tick(500);
    w.expect(&expect![""]);
    w.pause("a");
    w.beat("n1", working("zzz", 1, 1));
    w.log.clear();
    w.held = false;
    w.settle();
    w.expect(&expect![[r#"
        wrote bump for n1
        wrote pause
        n1: Remove a epoch 6 cascade"#]]);
}

#[test]
fn a_pause_that_meets_the_end_of_a_stop_is_answered_by_it() {
    let mut w = running();
    w.held = true;
    w.beat("n1", erring("a", 5, 100, "CDC:ErrDispatcherFailed"));
    w.settle_one();
    w.pause("a");
    w.beat("n1", stopped("a", 5));
    w.remove("a");
    w.log.clear();
    w.held = false;
    w.settle();
    w.expect(&expect![[r#"
        wrote pause
        wrote stop done
        reply 1: checkpoint 100
        wrote removing
        n1: Remove a epoch 5 cascade removed"#]]);
}

#[test]
fn a_maintainer_that_ends_by_itself_gets_a_new_place() {
    let mut w = running();
    w.beat("n1", stopped("a", 5));
    w.expect(&expect![[r#"
        wrote bump for n1
        n1: Add a epoch 6 at 100"#]]);
}

#[test]
fn an_unusable_sink_uri_fails_the_changefeed_and_not_the_coordinator() {
    let mut broken = doc("a", NORMAL, 5, Progress::None);
    broken.info.sink_uri = "nowhere".to_owned();
    let mut w = World::started(vec![broken, doc("b", NORMAL, 5, Progress::None)], &[("n1", vec![])]);
    w.log.sort();
    w.expect(&expect![[r#"
        n1: Add b epoch 6 at 100
        n1: Remove a epoch 5 cascade
        wrote bump for n1
        wrote state failed"#]]);
    assert_eq!(w.disk[0].info.error.as_ref().map(|error| error.code.as_str()), Some("CDC:ErrSinkURIInvalid"));
}

#[test]
// behaviour: coordinator-CO-19
// behaviour: coordinator-DB-6, coordinator-CF-2
fn what_people_get_is_a_copy_and_an_update_needs_a_stopped_changefeed() {
    let mut w = running();
    let mut view = w.core.views(None, w.now).remove(0);
    std::sync::Arc::make_mut(&mut view.info).sink_uri = "file:///x".to_owned();
    assert_eq!(w.core.views(None, w.now)[0].info.sink_uri, "blackhole://");
    let info = Box::new((*view.info).clone());
    w.ask(Command::Update { info: info.clone() });
    w.expect(&expect!["reply 1: CDC:ErrChangefeedUpdateRefused"]);
    w.pause("a");
    w.beat("n1", stopped("a", 5));
    w.log.clear();
    let before = w.core.views(None, w.now).remove(0);
    w.ask(Command::Update { info });
    w.expect(&expect![[r#"
        wrote update
        reply 3: info a epoch 5"#]]);
    assert_eq!(w.core.views(None, w.now)[0].info.sink_uri, "file:///x");
    assert_eq!(before.info.sink_uri, "blackhole://", "whoever looked before keeps the whole old one");
    assert_eq!(w.table(), "a stopped Stopped - saved=100");
}
