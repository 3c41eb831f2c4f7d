//! Dispatchers are created and removed, whatever is late, repeated or refused.

use super::*;

#[test]
fn a_dispatcher_is_in_the_table_before_its_events_can_come() {
    let mut x = Bench::new();
    assert_eq!(x.schedule(&a(), ScheduleAction::Create, 1, 1), "open 1@60");
    assert_eq!(x.core.journal.len(), 1);
    assert_eq!(x.schedule(&a(), ScheduleAction::Create, 1, 1), "", "one creation at a time");
    assert_eq!(x.opened(1, 65), "subscribe 1@65 at a");
    assert_eq!(x.core.journal.len(), 0);
    let dispatcher = x.core.dispatchers.get(x.slot(1)).expect("present");
    assert_eq!((dispatcher.start_ts, x.core.latest().seq), (Ts(65), 1));
}

// behaviour: dispatcher-49
#[test]
fn a_creation_of_what_exists_is_skipped() {
    let mut x = Bench::new();
    x.working(1);
    assert_eq!(x.schedule(&a(), ScheduleAction::Create, 1, 1), "");
    assert_eq!(x.core.journal.len(), 0);
}

// behaviour: dispatcher-50
#[test]
fn only_the_owner_schedules() {
    let mut x = Bench::owned_by(epoch(10));
    assert_eq!(x.schedule(&a(), ScheduleAction::Create, 1, 9), "");
    assert_eq!(x.schedule(&a(), ScheduleAction::Create, 1, 0), "");
    assert_eq!(x.schedule(&b(), ScheduleAction::Create, 1, 10), "");
    assert_eq!(x.core.journal.len(), 0);
    assert_eq!(x.schedule(&a(), ScheduleAction::Create, 1, 10), "open 1@60");
    let mut x = Bench::owned_by(None);
    assert_eq!(x.schedule(&b(), ScheduleAction::Create, 1, 0), "");
    assert_eq!(x.schedule(&a(), ScheduleAction::Create, 1, 0), "open 1@60");
}

// behaviour: dispatcher-51
#[test]
fn a_request_of_an_earlier_owner_blocks_nobody() {
    let mut x = Bench::new();
    x.schedule(&a(), ScheduleAction::Create, 1, 1);
    assert_eq!(x.bootstrap(&b(), None, 2), "reply e2 @0 [] []");
    assert_eq!(x.core.journal.len(), 0);
    assert_eq!(x.schedule(&b(), ScheduleAction::Create, 1, 2), "", "the sink is still being asked");
    assert_eq!(x.core.journal.len(), 1);
    assert_eq!(x.opened(1, 60), "subscribe 1@60 at b");
}

#[test]
fn a_creation_whose_owner_was_superseded_meanwhile_is_undone() {
    let mut x = Bench::new();
    x.schedule(&a(), ScheduleAction::Create, 1, 1);
    x.bootstrap(&b(), None, 2);
    assert_eq!(x.opened(1, 60), "close 1");
    assert!(x.core.dispatchers.len() == 0);
}

#[test]
fn an_answer_to_another_start_is_not_used() {
    let mut x = Bench::new();
    x.schedule(&a(), ScheduleAction::Create, 1, 1);
    x.schedule(&a(), ScheduleAction::Remove, 1, 1);
    let mut again = x.request(ScheduleAction::Create, 1, 1);
    again.config.start_ts = Ts(70);
    x.core.on_schedule(&a(), again, x.now);
    assert_eq!(x.take(), "");
    let late = TableStart { start_ts: Ts(60), skip_dml_at_start: false };
    x.core.on_dispatcher_opened(id(1), Ts(60), Ok(late), x.now);
    assert_eq!(x.take(), "open 1@70");
    assert_eq!(x.opened(1, 70), "subscribe 1@70 at a");
}

// behaviour: dispatcher-47
#[test]
fn a_creation_cut_off_by_the_end_of_the_write_path_keeps_its_entry() {
    let mut x = Bench::new();
    x.schedule(&a(), ScheduleAction::Create, 1, 1);
    x.core.stop();
    x.take();
    assert_eq!(x.opened(1, 60), "");
    assert_eq!(x.core.journal.len(), 1);
}

#[test]
fn a_creation_that_failed_is_reported_and_may_be_repeated() {
    let mut x = Bench::new();
    x.schedule(&a(), ScheduleAction::Create, 1, 1);
    x.core.on_dispatcher_opened(id(1), Ts(60), Err(fault()), x.now);
    assert_eq!(x.wait(0), "error CDC:ErrSinkUnavailable");
    assert_eq!(x.core.journal.len(), 0);
    assert_eq!(x.schedule(&a(), ScheduleAction::Create, 1, 1), "open 1@60");
}

// behaviour: dispatcher-48
#[test]
fn a_removal_of_nobody_is_confirmed_and_clears_what_a_creation_left() {
    let mut x = Bench::new();
    x.schedule(&a(), ScheduleAction::Create, 1, 1);
    assert_eq!(x.schedule(&a(), ScheduleAction::Remove, 1, 1), "");
    assert_eq!(x.core.journal.len(), 0);
    assert_eq!(x.wait(10), "beat 50/50 seq 0 1:Stopped@0");
    assert_eq!(x.opened(1, 60), "close 1");
}

#[test]
fn a_removal_waits_for_the_flush_and_is_reported_once() {
    let mut x = Bench::new();
    x.working(1);
    assert_eq!(x.arrive(1, rows(&[70])), "write 1");
    assert_eq!(x.schedule(&a(), ScheduleAction::Remove, 1, 1), "unsubscribe 1");
    assert_eq!(x.schedule(&a(), ScheduleAction::Remove, 1, 1), "");
    assert_eq!(x.core.journal.len(), 1);
    assert_eq!(x.beat(), "beat 69/60 seq 1");
    x.core.on_flushed(x.slot(1), x.last_ticket());
    assert_eq!(x.beat(), "close 1; beat 69/60 seq 1 1:Stopped@69");
    assert_eq!(x.core.journal.len(), 0);
    assert_eq!(x.beat(), "beat max/max seq 1");
    assert_eq!(x.schedule(&a(), ScheduleAction::Remove, 1, 1), "");
}

// behaviour: dispatcher-84
#[test]
fn a_removal_does_not_wait_for_a_broken_sink() {
    let mut x = Bench::new();
    x.working(1);
    x.arrive(1, rows(&[70]));
    x.schedule(&a(), ScheduleAction::Remove, 1, 1);
    x.core.on_sink_failed(fault(), x.now);
    assert_eq!(x.beat(), "close 1; beat 69/60 seq 1 1:Stopped@69; error CDC:ErrSinkUnavailable");
}

#[test]
fn the_trigger_may_be_removed_and_created_again() {
    let mut x = Bench::new();
    x.trigger(1);
    assert_eq!(x.schedule(&a(), ScheduleAction::Remove, 1, 1), "unsubscribe 1");
    assert_eq!(x.beat(), "close 1; beat 55/55 seq 1 1:Stopped@55");
    assert_eq!(x.bootstrap(&b(), None, 2), "reply e2 @0 [] []");
}

#[test]
fn streams_begin_again_where_the_new_owner_reads_the_log() {
    let mut x = Bench::new();
    x.working(1);
    x.working(2);
    x.arrive(1, resolved(80));
    x.schedule(&a(), ScheduleAction::Remove, 2, 1);
    x.take();
    x.core.on_bootstrap(&a(), &x.bootstrap_request(None, 2), false);
    assert_eq!(x.take(), "", "the same node reads the same log");
    x.core.on_bootstrap(&b(), &x.bootstrap_request(None, 3), false);
    assert_eq!(x.take(), "unsubscribe 1; subscribe 1@80 at b");
}

// behaviour: dispatcher-15
#[test]
fn a_removal_that_still_runs_is_told_to_the_new_owner() {
    let mut x = Bench::new();
    x.working(1);
    x.working(2);
    x.arrive(1, rows(&[70]));
    x.schedule(&a(), ScheduleAction::Remove, 1, 1);
    x.schedule(&a(), ScheduleAction::Create, 3, 1);
    assert_eq!(x.bootstrap(&b(), None, 2), "reply e2 @0 [1,2] [Remove 1]");
    assert_eq!(x.core.journal.len(), 1);
}

#[test]
fn a_request_that_cannot_be_used_is_dropped() {
    let mut x = Bench::new();
    let mut zero = x.request(ScheduleAction::Create, 1, 1);
    zero.config.dispatcher = DispatcherId::new(0, 0);
    x.core.on_schedule(&a(), zero, x.now);
    let mut redo = x.request(ScheduleAction::Create, 1, 1);
    redo.config.mode = Mode::Redo;
    x.core.on_schedule(&a(), redo, x.now);
    assert_eq!(x.take(), "");
    assert_eq!(x.core.journal.len(), 0);
}
