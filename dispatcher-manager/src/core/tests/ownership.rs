//! Who owns a manager: bootstraps, closes, and requests of earlier owners.

use super::*;

// behaviour: dispatcher-52
#[test]
fn ownership_follows_the_truth_tables() {
    let cases: &[(u64, u64, &str, &str, bool, bool)] = &[
        // sender's epoch, current epoch, current owner, sender, may bootstrap, may do the rest
        (0, 0, "a", "a", true, true),
        (0, 0, "", "a", true, true),
        (0, 0, "a", "b", true, false),
        (0, 3, "a", "a", false, false),
        (3, 0, "a", "a", true, false),
        (3, 2, "a", "b", true, false),
        (3, 3, "a", "a", true, true),
        (3, 3, "", "a", true, false),
        (3, 3, "a", "b", false, false),
        (3, 4, "a", "a", false, false),
    ];
    for (e, current, node, from, can_update, allows) in cases {
        let mut owner = Owner { node: NodeId::from(*node), epoch: epoch(*current) };
        let from = NodeId::from(*from);
        assert_eq!(owner.allows(&from, epoch(*e)), *allows, "{e} {current} {node} {from}");
        assert_eq!(owner.can_update(&from, epoch(*e)), *can_update, "{e} {current} {node} {from}");
        let before = owner.clone();
        assert_eq!(owner.try_update(&from, epoch(*e)), *can_update);
        assert!(*can_update || owner == before);
        assert!(owner.epoch >= before.epoch);
    }
}

#[test]
fn a_bootstrap_creates_the_trigger_and_answers() {
    let mut x = Bench::new();
    let request = x.bootstrap_request(Some(1), 1);
    assert!(matches!(x.core.on_bootstrap(&a(), &request, true), BootstrapStep::Wait));
    assert_eq!(x.take(), "open 1@50");
    assert_eq!(x.opened(1, 70), "bootstrapped reply e1 @70 [1] []");
    assert_eq!(x.bootstrap(&a(), Some(1), 1), "reply e1 @70 [1] []");
    let PostBootstrapStep::Reply(reply) = x.post_bootstrap(&a(), 1, 1) else { panic!("allowed") };
    assert_eq!((reply.trigger, reply.epoch), (Some(id(1)), epoch(1)));
    assert_eq!(x.take(), "subscribe 1@70 at a");
    assert!(matches!(x.post_bootstrap(&a(), 1, 1), PostBootstrapStep::Reply(_)), "a retry succeeds");
    assert_eq!(x.take(), "");
}

#[test]
fn the_trigger_of_an_owner_that_starts_earlier_than_one_before_sees_the_schema_changes_between() {
    // The first one was told how far the changefeed was before that was stored, and the leader that knew is gone.
    let mut x = Bench::new();
    let ahead = MaintainerBootstrapRequest { start_ts: Ts(90), ..x.bootstrap_request(None, 1) };
    assert!(matches!(x.core.on_bootstrap(&a(), &ahead, true), BootstrapStep::Reply(_)));
    assert_eq!(x.bootstrap(&b(), Some(1), 2), "wait");
    assert_eq!(x.take(), "open 1@50");
    assert_eq!(x.opened(1, 50), "bootstrapped reply e2 @50 [1] []");
    assert!(matches!(x.post_bootstrap(&b(), 1, 2), PostBootstrapStep::Reply(_)));
    assert_eq!(x.take(), "subscribe 1@50 at b");
}

#[test]
fn a_new_changefeed_ignores_what_the_downstream_knows() {
    let mut x = Bench::new();
    let request = MaintainerBootstrapRequest { is_new: true, ..x.bootstrap_request(Some(1), 1) };
    x.core.on_bootstrap(&a(), &request, true);
    x.take();
    assert_eq!(x.opened(1, 70), "bootstrapped reply e1 @50 [1] []");
}

#[test]
fn a_trigger_that_failed_is_created_by_the_next_bootstrap_of_the_same_owner() {
    let mut x = Bench::new();
    assert_eq!(x.bootstrap(&a(), Some(1), 2), "wait");
    assert_eq!(x.take(), "open 1@50");
    x.core.on_dispatcher_opened(id(1), Ts(50), Err(fault()), x.now);
    assert_eq!(x.take(), "bootstrapped refuse CDC:ErrSinkUnavailable");
    assert_eq!(x.core.owner().epoch, epoch(2), "the new owner stays");
    assert_eq!(x.bootstrap(&a(), Some(1), 2), "wait");
    assert_eq!(x.take(), "open 1@50");
    assert_eq!(x.opened(1, 50), "bootstrapped reply e2 @50 [1] []");
}

// behaviour: dispatcher-17, dispatcher-18, dispatcher-19
#[test]
fn a_bootstrap_with_another_trigger_is_refused_and_the_owner_stays() {
    let mut x = Bench::new();
    x.trigger(1);
    let refused = "refuse CDC:ErrChangefeedInitTableTriggerDispatcherFailed";
    assert_eq!(x.bootstrap(&b(), Some(2), 2), refused);
    assert_eq!(x.bootstrap(&b(), None, 2), refused);
    let redo = MaintainerBootstrapRequest { redo_trigger: Some(id(9)), ..x.bootstrap_request(Some(1), 2) };
    assert_eq!(show_step(&x.core.on_bootstrap(&b(), &redo, false)), refused);
    assert_eq!(x.core.owner(), &Owner { node: a(), epoch: epoch(1) });
    assert_eq!(x.core.on_close(&a(), epoch(1), false), CloseStep::Closing);
}

#[test]
fn a_manager_whose_sink_has_failed_goes_when_a_new_owner_asks() {
    let mut x = Bench::new();
    x.working(2);
    x.core.on_sink_failed(fault(), x.now);
    x.take();
    assert_eq!(x.bootstrap(&a(), None, 1), "reply e1 @0 [2] []", "its own owner hears of the failure");
    assert_eq!(x.take(), "");
    assert_eq!(x.bootstrap(&b(), None, 2), "closing");
    assert_eq!(x.take(), "unsubscribe 2; close 2; stop");
    assert_eq!(x.bootstrap(&b(), None, 2), "closing");
    x.core.on_stopped();
    assert_eq!(x.bootstrap(&b(), None, 2), "closed", "the next one is another manager's");
    // The owner's own node: without a table trigger there is no owner that could hear of anything.
    let mut x = Bench::new();
    x.core.on_sink_failed(fault(), x.now);
    assert_eq!(x.bootstrap(&a(), Some(1), 1), "closing");
}

#[test]
fn a_stale_bootstrap_is_dropped() {
    let mut x = Bench::owned_by(epoch(5));
    assert_eq!(x.bootstrap(&a(), None, 4), "drop");
    assert_eq!(x.bootstrap(&a(), None, 0), "drop");
    assert_eq!(x.bootstrap(&b(), None, 5), "drop");
    assert_eq!(x.bootstrap(&b(), None, 6), "reply e6 @0 [] []");
}

// behaviour: dispatcher-22
#[test]
fn a_post_bootstrap_without_its_trigger_is_answered_with_an_error() {
    let mut x = Bench::new();
    let PostBootstrapStep::Refuse(fault) = x.post_bootstrap(&a(), 1, 1) else { panic!("no trigger") };
    assert_eq!(fault.code, "CDC:ErrChangefeedInitTableTriggerDispatcherFailed");
    x.trigger(1);
    assert!(matches!(x.post_bootstrap(&a(), 2, 1), PostBootstrapStep::Refuse(_)));
    assert!(matches!(x.post_bootstrap(&b(), 1, 1), PostBootstrapStep::Drop));
    assert!(matches!(x.post_bootstrap(&a(), 1, 2), PostBootstrapStep::Drop));
}

// behaviour: dispatcher-21, dispatcher-46
#[test]
fn a_closing_manager_says_nothing_and_creates_nothing() {
    let mut x = Bench::new();
    x.trigger(1);
    x.core.stop();
    assert_eq!(x.take(), "unsubscribe 1; close 1; stop");
    assert!(matches!(x.post_bootstrap(&a(), 1, 1), PostBootstrapStep::Drop));
    assert_eq!(x.bootstrap(&a(), Some(1), 2), "closing");
    assert_eq!(x.schedule(&a(), ScheduleAction::Create, 2, 1), "");
    assert_eq!(x.wait(10_000), "");
    x.core.on_stopped();
    assert_eq!(x.bootstrap(&a(), Some(1), 2), "closed");
}

// behaviour: dispatcher-23
#[test]
fn a_trigger_that_opens_after_the_write_path_closed_answers_nobody() {
    let mut x = Bench::new();
    let request = x.bootstrap_request(Some(1), 1);
    x.core.on_bootstrap(&a(), &request, true);
    x.take();
    x.core.stop();
    assert_eq!(x.take(), "bootstrapped closing; stop");
    assert_eq!(x.opened(1, 50), "");
}

// behaviour: dispatcher-24
#[test]
fn a_trigger_that_fails_otherwise_is_answered_with_an_error() {
    let mut x = Bench::new();
    let request = x.bootstrap_request(Some(1), 1);
    x.core.on_bootstrap(&a(), &request, true);
    x.take();
    x.core.on_dispatcher_opened(id(1), Ts(50), Err(fault()), x.now);
    assert_eq!(x.take(), "bootstrapped refuse CDC:ErrSinkUnavailable");
}

// behaviour: dispatcher-20
#[test]
fn a_close_by_a_superseded_owner_changes_nothing() {
    let mut x = Bench::owned_by(epoch(2));
    assert_eq!(x.core.on_close(&a(), epoch(1), true), CloseStep::NotAllowed);
    assert_eq!(x.core.life(), Life::Open);
    assert_eq!(x.take(), "");
}

// behaviour: dispatcher-40
#[test]
fn a_closed_manager_cleans_up_when_the_changefeed_is_removed() {
    let mut x = Bench::new();
    assert_eq!(x.core.on_close(&a(), epoch(1), false), CloseStep::Closing);
    assert_eq!(x.take(), "stop");
    assert_eq!(x.core.on_close(&a(), epoch(1), false), CloseStep::Closing);
    x.core.on_stopped();
    assert_eq!(x.take(), "");
    assert_eq!(x.core.on_close(&a(), epoch(1), true), CloseStep::Closed);
    assert_eq!(x.take(), "forget");
    assert_eq!(x.core.on_close(&a(), epoch(1), true), CloseStep::Closed);
    assert_eq!(x.take(), "", "not twice at the same time");
    x.core.on_forgotten(false);
    assert_eq!(x.core.on_close(&a(), epoch(1), false), CloseStep::Closed);
    assert_eq!(x.take(), "forget", "again until it worked once; removal is remembered");
    x.core.on_forgotten(true);
    x.core.on_close(&a(), epoch(1), true);
    assert_eq!(x.take(), "");
}

#[test]
fn removal_asked_for_while_closing_is_remembered() {
    let mut x = Bench::new();
    x.core.on_close(&a(), epoch(1), false);
    x.core.on_close(&a(), epoch(1), true);
    x.take();
    x.core.on_stopped();
    assert_eq!(x.take(), "forget");
}
