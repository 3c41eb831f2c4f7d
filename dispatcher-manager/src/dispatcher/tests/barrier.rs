//! Events that several dispatchers pass together.

use std::sync::Arc;

use event::{DdlEvent, UniqueKey};
use heartbeatpb::{BarrierKey, BlockAction, BlockStage, DispatcherStatus, InfluencedTables, TableId, Ts};

use crate::dispatcher::testing::*;

// behaviour: dispatcher-73
#[test]
fn a_barrier_flushes_once_waits_writes_and_goes_on() {
    let mut d = Bench::table(50);
    d.arrive(rows(&[60]));
    assert_eq!(d.arrive(block(wide(100))), "flush");
    assert!(d.dispatcher.block_state().is_none());
    d.arrive(rows(&[110]));
    d.flushed(0);
    assert_eq!(d.flush_ok(), "WAITING 100");
    let state = d.dispatcher.block_state().expect("in flight");
    assert_eq!((state.stage, state.is_blocked), (BlockStage::Waiting, true));
    assert!(d.dispatcher.can_close(true), "a waiting dispatcher can let go");
    d.status(&ack(100));
    assert_eq!(d.status(&act(BlockAction::Write, 100)), "execute 100");
    assert_eq!(d.dispatcher.block_state().map(|state| state.stage), Some(BlockStage::Writing));
    assert!(!d.dispatcher.can_close(true));
    assert_eq!(d.written(), "DONE 100; write 110");
    assert!(d.dispatcher.block_state().is_none());
}

// behaviour: dispatcher-74
#[test]
fn a_barrier_that_is_passed_writes_nothing() {
    let mut d = Bench::table(50);
    d.arrive(block(wide(100)));
    d.flush_ok();
    d.arrive(resolved(120));
    assert_eq!(d.status(&act(BlockAction::Pass, 100)), "DONE 100");
    assert_eq!(d.checkpoint(), 120);
    assert_eq!(d.status(&act(BlockAction::Pass, 100)), "DONE 100", "a lost answer is given again");
}

// behaviour: dispatcher-73
#[test]
fn a_ddl_that_is_not_synced_is_done_without_a_write() {
    let mut d = Bench::table(50);
    d.arrive(block(DdlEvent { not_sync: true, ..wide(100) }));
    d.flush_ok();
    assert_eq!(d.status(&act(BlockAction::Write, 100)), "DONE 100");
}

#[test]
fn an_event_in_writing_is_never_called_done_early() {
    let mut d = Bench::table(50);
    d.arrive(block(wide(100)));
    d.flush_ok();
    d.status(&act(BlockAction::Write, 100));
    assert_eq!(d.status(&act(BlockAction::Write, 100)), "");
    assert_eq!(d.status(&act(BlockAction::Pass, 100)), "");
    assert_eq!(d.status(&act(BlockAction::Pass, 90)), "DONE 90");
    assert_eq!(d.status(&act(BlockAction::Pass, 130)), "");
    assert_eq!(d.write_failed(), "fail CDC:ErrSinkUnavailable");
    assert_eq!(d.status(&act(BlockAction::Write, 100)), "", "a failed write is never done");
    assert_eq!(d.checkpoint(), 50);
}

#[test]
fn actions_for_other_events_are_told_apart() {
    let mut d = Bench::table(50);
    assert_eq!(d.status(&act(BlockAction::Write, 100)), "", "not received yet");
    assert_eq!(d.status(&act(BlockAction::Write, 50)), "DONE 50");
    d.arrive(sync_point(100));
    assert_eq!(d.flush_ok(), "WAITING 100s");
    assert_eq!(d.status(&act(BlockAction::Write, 100)), "DONE 100", "the DDL of the same ts comes before");
    let point = BarrierKey { commit_ts: Ts(100), is_sync_point: true };
    let write = DispatcherStatus { action: Some((BlockAction::Write, point)), ..status() };
    assert_eq!(d.status(&write), "execute 100s");
    let mut d = Bench::table(50);
    d.arrive(block(wide(100)));
    d.flush_ok();
    assert_eq!(d.status(&write), "", "the sync point of the same ts comes after");
}

#[test]
fn one_status_may_acknowledge_and_act() {
    let mut d = Bench::table(50);
    d.arrive(block(wide(100)));
    d.flush_ok();
    let both = DispatcherStatus { ack: Some(key(100)), ..act(BlockAction::Write, 100) };
    assert_eq!(d.status(&both), "execute 100");
    assert!(d.dispatcher.unacknowledged(key(100)).is_none());
}

// behaviour: dispatcher-75
#[test]
fn a_ddl_of_a_table_in_several_spans_blocks() {
    let mut part = config(1, 1, 50);
    part.span.end = vec![9];
    let mut d = Bench::of(&part, false);
    d.arrive(block(ddl(100)));
    assert_eq!(d.flush_ok(), "WAITING 100");
    let mut d = Bench::table(50);
    d.arrive(block(DdlEvent {
        blocked: Some(InfluencedTables::Normal(vec![TableId(1), TableId(2)])),
        ..ddl(100)
    }));
    assert_eq!(d.flush_ok(), "WAITING 100");
}

// behaviour: dispatcher-76
#[test]
fn an_ignored_report_is_repeated_once_while_waiting_and_never_while_writing() {
    let ignored = DispatcherStatus { ignored: Some(key(100)), ..status() };
    let mut d = Bench::table(50);
    assert_eq!(d.status(&ignored), "");
    d.arrive(block(wide(100)));
    assert_eq!(d.status(&ignored), "");
    d.flush_ok();
    assert_eq!(d.status(&ignored), "again WAITING 100");
    let with_action = DispatcherStatus { ignored: Some(key(100)), ..act(BlockAction::Write, 100) };
    assert_eq!(d.status(&with_action), "again WAITING 100", "an action beside it is not looked at");
    d.status(&act(BlockAction::Write, 100));
    assert_eq!(d.status(&ignored), "");
}

// behaviour: dispatcher-77
#[test]
fn a_wide_barrier_waits_for_earlier_reports_of_the_trigger() {
    let mut d = Bench::trigger(50);
    d.arrive(block(adding(100, &[5])));
    d.flush_ok();
    d.written();
    assert_eq!(d.arrive(block(wide(110))), "");
    assert!(d.dispatcher.waits_for().contains("110"));
    assert_eq!(d.arrive(resolved(120)), "");
    assert_eq!(d.status(&ack(100)), "flush");
    assert_eq!(d.flush_ok(), "WAITING 110");
    assert_eq!(d.checkpoint(), 99);
}

// behaviour: dispatcher-77
#[test]
fn a_held_event_stays_held_while_its_dispatcher_lets_go() {
    let mut d = Bench::trigger(50);
    d.arrive(block(adding(100, &[5])));
    d.flush_ok();
    d.written();
    d.arrive(block(wide(110)));
    d.dispatcher.remove();
    assert_eq!(d.status(&ack(100)), "");
    assert!(d.dispatcher.unacknowledged(key(100)).is_none());
}

// behaviour: dispatcher-82
#[test]
fn a_table_in_several_spans_must_stay_divisible() {
    let mut part = config(1, 1, 50);
    part.span.end = vec![9];
    let mut info = (*table(1, 100)).clone();
    info.keys.push(UniqueKey {
        name: "u".into(),
        columns: vec![0],
        primary: false,
        nulls_not_distinct: false,
    });
    let change = DdlEvent { table_info: Some(Arc::new(info)), ..ddl(100) };
    let mut d = Bench::of(&part, true);
    assert_eq!(d.arrive(block(change.clone())), "working; fail CDC:ErrTableAfterNotSplitable");
    let mut d = Bench::of(&part, false);
    assert_eq!(d.arrive(block(change.clone())), "working; flush");
    let mut d = Bench::of(&config(1, 1, 50), true);
    assert_eq!(d.arrive(block(change)), "working; flush");
}

#[test]
fn the_next_barrier_may_follow_at_once() {
    let mut d = Bench::table(50);
    d.arrive(block(wide(100)));
    d.arrive(block(wide(110)));
    d.flush_ok();
    assert_eq!(d.status(&act(BlockAction::Pass, 100)), "DONE 100; flush");
    assert_eq!(d.flush_ok(), "WAITING 110");
    assert_eq!(d.status(&act(BlockAction::Pass, 110)), "DONE 110");
}

fn about_sync_point(commit: u64) -> BarrierKey {
    BarrierKey { commit_ts: Ts(commit), is_sync_point: true }
}

#[test]
fn a_sync_point_that_is_not_done_is_not_called_done() {
    let write = DispatcherStatus { action: Some((BlockAction::Write, about_sync_point(100))), ..status() };
    let mut d = Bench::table(50);
    d.arrive(resolved(100));
    assert_eq!(d.arrive(sync_point(100)), "flush");
    assert_eq!(d.status(&write), "", "its rows are being flushed");
    assert_eq!(d.flush_ok(), "WAITING 100s");
    assert_eq!(d.status(&write), "execute 100s");
    assert_eq!(d.write_failed(), "fail CDC:ErrSinkUnavailable");
    assert_eq!(d.status(&write), "", "it failed");
    let mut d = Bench::table(50);
    d.arrive(resolved(101));
    assert_eq!(d.status(&write), "DONE 100s", "it is behind");
}
