//! Histories of one dispatcher.

use std::sync::Arc;
use std::time::{Duration, Instant};

use event::{DdlEvent, UniqueKey};
use heartbeatpb::{
    BarrierKey, BlockAction, BlockStage, ComponentState, DispatcherConfig, DispatcherStatus,
    InfluencedTables, SchemaChange, SchemaId, TableId, Ts,
};
use proptest::prelude::*;

use super::testing::*;
use crate::Fault;
use crate::arrival::{Arrival, Credit};

// behaviour: dispatcher-64
#[test]
fn rows_hold_the_checkpoint_until_they_are_flushed_and_resolved() {
    let mut d = Bench::table(50);
    assert_eq!(d.checkpoint(), 50);
    assert_eq!(d.arrive(rows(&[100])), "working; write 100");
    assert_eq!(d.checkpoint(), 99);
    assert!(d.flushed(0));
    assert_eq!(d.checkpoint(), 99);
    assert!(!d.flushed(0), "a second flush changes nothing");
    assert_eq!(d.arrive(resolved(100)), "");
    assert_eq!(d.checkpoint(), 100);
    assert_eq!(d.dispatcher.last_synced(), Ts(100));
}

// behaviour: dispatcher-64, dispatcher-79
#[test]
fn a_resolved_event_never_passes_rows_in_flight() {
    let mut d = Bench::table(50);
    d.arrive(rows(&[100]));
    d.arrive(rows(&[110]));
    d.arrive(rows(&[120]));
    d.arrive(resolved(200));
    assert_eq!(d.checkpoint(), 99);
    d.flushed(1);
    d.flushed(2);
    assert_eq!(d.checkpoint(), 99);
    d.flushed(0);
    assert_eq!(d.checkpoint(), 200);
}

// behaviour: dispatcher-79
#[test]
fn the_credit_of_a_batch_is_held_until_the_sink_lets_it_go() {
    let room = Arc::new(());
    let rows = |commits: &[u64]| Arrival::Rows(batch(commits), Credit::Watched(Arc::clone(&room)));
    let held = || Arc::strong_count(&room) - 1;
    let mut d = Bench::table(50);
    for commit in [100, 110, 120] {
        d.arrive(rows(&[commit]));
    }
    assert_eq!(held(), 3);
    d.credits.drain(..2);
    assert_eq!(held(), 1);
    d.credits.clear();
    assert_eq!(held(), 0);
    d.arrive(rows(&[40]));
    d.arrive(resolved(120));
    d.arrive(rows(&[110]));
    assert_eq!(held(), 0, "rows that are not wanted give their room back at once");
}

// behaviour: dispatcher-80
#[test]
fn rows_that_arrived_before_are_dropped_and_block_nothing() {
    let mut d = Bench::table(100);
    assert_eq!(d.arrive(rows(&[90, 100])), "");
    assert_eq!(d.arrive(rows(&[99, 100, 101, 102])), "working; write 101,102");
    assert_eq!(d.checkpoint(), 100);
    d.flushed(0);
    d.arrive(resolved(110));
    assert_eq!(d.arrive(rows(&[101, 102])), "");
    assert_eq!(d.checkpoint(), 110);
    assert_eq!(d.arrive(block(ddl(105))), "");
}

// behaviour: dispatcher-81
#[test]
fn rows_of_a_replayed_ddl_are_skipped_once() {
    let skip = DispatcherConfig { skip_dml_at_start: true, ..config(1, 1, 99) };
    let mut d = Bench::of(&skip, false);
    assert_eq!(d.arrive(rows(&[100])), "");
    assert_eq!(d.arrive(block(ddl(100))), "working; flush");
    d.flush_ok();
    d.written();
    assert_eq!(d.arrive(rows(&[100, 101])), "write 101");
    let mut d = Bench::table(99);
    assert_eq!(d.arrive(rows(&[100])), "working; write 100");
}

#[test]
fn it_works_from_its_first_event_on() {
    let mut d = Bench::table(50);
    assert_eq!(d.arrive(resolved(49)), "");
    assert_eq!(d.dispatcher.state, ComponentState::Initializing);
    assert_eq!(d.arrive(resolved(50)), "working");
    assert_eq!(d.dispatcher.state, ComponentState::Working);
    assert_eq!(d.arrive(resolved(60)), "");
}

#[test]
fn events_wait_while_the_table_is_prepared() {
    let mut d = Bench::fresh(&config(1, 1, 50), false);
    assert_eq!(d.arrive(Arrival::Begin(Some(table(1, 1)))), "open v1");
    assert_eq!(d.arrive(rows(&[100])), "");
    assert_eq!(d.arrive(resolved(100)), "");
    assert_eq!(d.arrive(resolved(105)), "");
    assert_eq!(d.checkpoint(), 50);
    assert!(!d.dispatcher.can_close(true));
    assert_eq!(d.opened(), "working; write 100");
    assert_eq!(d.checkpoint(), 99);
    assert_eq!(d.arrive(Arrival::Begin(Some(table(1, 1)))), "", "a repeated shape is not prepared again");
    assert_eq!(d.arrive(Arrival::Begin(Some(table(1, 7)))), "open v7");
}

#[test]
fn rows_of_another_shape_wait_until_the_sink_knows_it() {
    let mut d = Bench::fresh(&config(1, 1, 50), false);
    assert_eq!(d.arrive(rows(&[100])), "open v1", "the stream began without a shape");
    assert_eq!(d.opened(), "working; write 100");
    assert_eq!(d.arrive(rows(&[110])), "write 110");
}

#[test]
fn the_durable_part_of_a_large_transaction_is_known() {
    let mut d = Bench::table(50);
    d.arrive(rows(&[100; 5000]));
    d.arrive(rows(&[100; 5000]));
    assert!(d.dispatcher.durable_part().is_none());
    d.flushed(1);
    assert!(d.dispatcher.durable_part().is_none());
    d.flushed(0);
    let end = d.dispatcher.durable_part().expect("a large part");
    assert_eq!((end.commit_ts, end.rows), (Ts(100), 5000));
    d.arrive(resolved(100));
    assert!(d.dispatcher.durable_part().is_none());
}

#[test]
fn the_checkpoint_stands_still_until_the_whole_copy_is_durable() {
    let mut d = Bench::table(50);
    assert_eq!(d.arrive(Arrival::Rows(copy_start(100), Credit::default())), "working; write 100");
    assert_eq!(d.checkpoint(), 50, "rows that were committed at 60 may be among those to come");
    d.flushed(0);
    assert_eq!(d.checkpoint(), 50);
    d.arrive(rows(&[100]));
    d.arrive(rows(&[100]));
    d.arrive(resolved(100));
    d.arrive(rows(&[110]));
    d.flushed(1);
    assert_eq!(d.checkpoint(), 50, "the copy has arrived and is not durable");
    d.flushed(2);
    assert_eq!(d.checkpoint(), 109);
    d.arrive(resolved(120));
    d.flushed(3);
    assert_eq!(d.checkpoint(), 120);
}

#[test]
fn a_copy_that_begins_again_holds_the_checkpoint_where_the_first_began() {
    let mut d = Bench::table(50);
    d.arrive(Arrival::Rows(copy_start(100), Credit::default()));
    d.flushed(0);
    d.arrive(Arrival::Rows(copy_start(130), Credit::default()));
    assert_eq!(d.checkpoint(), 50);
    d.flushed(1);
    d.arrive(resolved(129));
    assert_eq!(d.checkpoint(), 50);
    d.arrive(resolved(130));
    assert_eq!(d.checkpoint(), 130);
}

#[test]
fn a_failed_dispatcher_keeps_its_checkpoint() {
    let mut d = Bench::table(50);
    d.arrive(rows(&[60]));
    let fault = Fault { code: "CDC:ErrX".into(), message: "x".into(), retryable: false };
    assert_eq!(d.arrive(Arrival::Failed(fault)), "fail CDC:ErrX");
    assert_eq!(d.arrive(resolved(100)), "");
    d.flushed(0);
    assert_eq!(d.checkpoint(), 59);
    assert!(d.dispatcher.can_close(true));
}

// behaviour: dispatcher-65
#[test]
fn a_ddl_of_one_table_is_written_without_telling_anybody() {
    let mut d = Bench::table(50);
    assert_eq!(d.arrive(rows(&[60])), "working; write 60");
    assert_eq!(d.arrive(block(ddl(100))), "flush");
    assert_eq!(d.arrive(rows(&[110])), "", "nothing behind it is sent before it is done");
    d.flushed(0);
    assert_eq!(d.flush_ok(), "execute 100");
    assert_eq!(d.checkpoint(), 59);
    assert_eq!(d.written(), "write 110");
    assert_eq!(d.checkpoint(), 109);
}

// behaviour: dispatcher-65
#[test]
fn a_ddl_that_is_not_synced_is_passed() {
    let mut d = Bench::table(50);
    d.arrive(block(DdlEvent { not_sync: true, ..ddl(100) }));
    assert_eq!(d.flush_ok(), "");
    assert_eq!(d.checkpoint(), 99);
    assert_eq!(d.arrive(resolved(100)), "");
    assert_eq!(d.checkpoint(), 100);
}

// behaviour: dispatcher-66
#[test]
fn a_drop_is_reported_until_it_is_acknowledged() {
    let mut d = Bench::table(50);
    d.arrive(block(DdlEvent { dropped: Some(InfluencedTables::Normal(vec![TableId(1)])), ..ddl(100) }));
    d.flush_ok();
    assert_eq!(d.written(), "NONE 100 -1");
    assert!(d.dispatcher.unacknowledged(key(100)).is_some());
    assert_eq!(d.status(&ack(99)), "");
    assert!(d.dispatcher.unacknowledged(key(100)).is_some());
    assert_eq!(d.status(&ack(100)), "");
    assert!(d.dispatcher.unacknowledged(key(100)).is_none());
}

// behaviour: dispatcher-67
#[test]
fn an_added_table_caps_the_triggers_checkpoint_until_acknowledged() {
    let mut d = Bench::trigger(50);
    assert_eq!(d.arrive(block(adding(100, &[5]))), "working; flush");
    assert_eq!(d.flush_ok(), "execute 100");
    assert_eq!(d.written(), "NONE 100 +5");
    d.arrive(resolved(200));
    assert_eq!(d.checkpoint(), 99);
    d.status(&ack(101));
    assert_eq!(d.checkpoint(), 99);
    d.status(&ack(100));
    assert_eq!(d.checkpoint(), 200);
}

// behaviour: dispatcher-68
#[test]
fn the_cap_follows_the_smallest_pending_addition() {
    let mut d = Bench::trigger(50);
    for commit in [100, 140, 200] {
        d.arrive(block(adding(commit, &[5])));
        d.flush_ok();
        d.written();
    }
    d.arrive(resolved(300));
    d.status(&ack(140));
    assert_eq!(d.checkpoint(), 99);
    d.status(&ack(100));
    assert_eq!(d.checkpoint(), 199);
    d.status(&ack(200));
    assert_eq!(d.checkpoint(), 300);
    let mut d = Bench::trigger(50);
    for commit in [100, 140] {
        d.arrive(block(adding(commit, &[5])));
        d.flush_ok();
        d.written();
    }
    d.arrive(resolved(300));
    d.status(&ack(100));
    assert_eq!(d.checkpoint(), 139);
}

// behaviour: dispatcher-69
#[test]
fn a_premature_acknowledgement_lifts_no_cap() {
    let mut d = Bench::trigger(50);
    d.arrive(block(adding(100, &[5])));
    assert!(!d.dispatcher.can_close(true));
    assert_eq!(d.status(&ack(100)), "");
    d.flush_ok();
    d.status(&ack(100));
    d.written();
    d.arrive(resolved(200));
    assert_eq!(d.checkpoint(), 99);
}

// behaviour: dispatcher-70
#[test]
fn a_failed_write_undoes_cap_and_counter() {
    let mut d = Bench::trigger(50);
    d.arrive(block(adding(100, &[5])));
    assert_eq!(d.flush_failed(), "fail CDC:ErrSinkUnavailable");
    assert_eq!(d.dispatcher.pending_acks, 0);
    assert!(d.dispatcher.can_close(true));
    assert_eq!(d.checkpoint(), 50);
    let mut d = Bench::trigger(50);
    d.arrive(block(adding(100, &[5])));
    d.flush_ok();
    assert_eq!(d.write_failed(), "fail CDC:ErrSinkUnavailable");
    assert_eq!(d.dispatcher.pending_acks, 0);
    assert_eq!(d.checkpoint(), 50);
}

// behaviour: dispatcher-71
#[test]
fn empty_lists_of_tables_are_not_reported() {
    let mut d = Bench::trigger(50);
    d.arrive(block(DdlEvent { dropped: Some(InfluencedTables::Normal(Vec::new())), ..adding(100, &[]) }));
    d.flush_ok();
    assert_eq!(d.written(), "");
    assert_eq!(d.dispatcher.pending_acks, 0);
}

// behaviour: dispatcher-72
#[test]
fn a_trigger_with_an_unknown_table_closes_in_front_of_it() {
    let mut d = Bench::trigger(50);
    d.arrive(block(adding(100, &[5])));
    d.flush_ok();
    d.written();
    // An owner that leaves acknowledges nothing any more; its successor starts in front of the change.
    assert!(d.dispatcher.can_close(true));
    d.dispatcher.remove();
    assert_eq!(d.dispatcher.checkpoint(), Ts(99));
}

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
fn a_ddl_that_cannot_be_followed_fails_with_its_text() {
    let mut d = Bench::table(50);
    let broken = DdlEvent { error: Some("column type changed".into()), ..ddl(100) };
    assert_eq!(d.arrive(block(broken)), "working; fail CDC:ErrSchemaChangeUnsupported");
    assert_eq!(d.checkpoint(), 50);
}

// behaviour: dispatcher-84
#[test]
fn a_broken_sink_is_not_waited_for() {
    let mut d = Bench::table(50);
    d.arrive(rows(&[60]));
    assert!(!d.dispatcher.can_close(true));
    assert!(d.dispatcher.can_close(false));
}

#[test]
fn a_rename_moves_this_dispatcher_only_and_at_once() {
    let change = SchemaChange { table: TableId(1), old: SchemaId(1), new: SchemaId(2) };
    let other = SchemaChange { table: TableId(9), old: SchemaId(1), new: SchemaId(3) };
    let mut d = Bench::table(50);
    let rename = DdlEvent { schema_changes: vec![other, change], ..wide(100) };
    assert_eq!(d.arrive(block(rename.clone())), "working; schema 1>2; flush");
    assert_eq!(d.dispatcher.schema, SchemaId(2));
    let mut trigger = Bench::trigger(50);
    assert_eq!(trigger.arrive(block(rename)), "working; flush");
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

#[test]
fn a_dispatcher_that_is_to_go_takes_nothing_more() {
    let mut d = Bench::fresh(&config(1, 1, 50), false);
    d.arrive(Arrival::Begin(Some(table(1, 1))));
    d.arrive(rows(&[60]));
    d.dispatcher.try_remove();
    d.arrive(resolved(100));
    assert_eq!(d.opened(), "");
    assert_eq!(d.checkpoint(), 50, "what was dropped is not counted as done");
    assert!(d.dispatcher.can_close(true));
}

#[test]
fn the_rate_is_one_when_idle() {
    let mut d = Bench::table(50);
    let start = Instant::now();
    assert!((d.dispatcher.take_event_size_per_second(start) - 1.0).abs() < f32::EPSILON);
    d.arrive(rows(&[60]));
    d.flushed(0);
    let rate = d.dispatcher.take_event_size_per_second(start + Duration::from_secs(1));
    assert!(rate > 1.0);
    let idle = d.dispatcher.take_event_size_per_second(start + Duration::from_secs(2));
    assert!((idle - 1.0).abs() < f32::EPSILON);
}

proptest! {
    /// DM-1: whatever the order of flushes, and however often a stream begins again, everything up to the
    /// checkpoint is durable, and the checkpoint never goes back.
    #[test]
    fn the_checkpoint_never_passes_an_unflushed_event(
        steps in proptest::collection::vec((0u8..5, 0usize..32), 1..200),
    ) {
        let start = 10u64;
        let mut d = Bench::table(start);
        let mut commit = start;
        let mut batches: Vec<Vec<u64>> = Vec::new();
        let mut open: Vec<usize> = Vec::new();
        let mut durable = std::collections::BTreeSet::new();
        let mut last = d.checkpoint();
        for (step, pick) in steps {
            match step {
                0 => {
                    let commits: Vec<u64> = (1..=1 + pick as u64 % 4).map(|n| commit + n).collect();
                    commit += commits.len() as u64;
                    open.push(batches.len());
                    d.arrive(rows(&commits));
                    batches.push(commits);
                }
                1 => {
                    d.arrive(resolved(commit));
                }
                2 | 3 if !open.is_empty() => {
                    let n = open.swap_remove(pick % open.len());
                    d.flushed(n);
                    durable.extend(batches[n].iter().copied());
                }
                _ => {
                    // A reset repeats everything after the checkpoint; what was resolved is not wanted again.
                    let resolved = d.dispatcher.resolved().0;
                    let commits: Vec<u64> = (d.checkpoint() + 1..=commit).collect();
                    if !commits.is_empty() {
                        d.arrive(rows(&commits));
                    }
                    if d.tickets.len() > batches.len() {
                        open.push(batches.len());
                        batches.push(commits.into_iter().filter(|commit| *commit > resolved).collect());
                    }
                }
            }
            let now = d.checkpoint();
            prop_assert!(now >= last, "went back from {last} to {now}");
            prop_assert!((start + 1..=now.min(commit)).all(|commit| durable.contains(&commit)));
            last = now;
        }
        for n in open {
            d.flushed(n);
        }
        d.arrive(resolved(commit));
        prop_assert_eq!(d.checkpoint(), commit);
    }
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

#[test]
fn a_stream_that_begins_again_at_a_barrier_brings_nothing_twice() {
    let mut d = Bench::table(50);
    d.arrive(rows(&[100]));
    d.flushed(0);
    assert_eq!(d.arrive(block(DdlEvent { table_info: None, ..wide(100) })), "flush");
    assert_eq!(d.flush_ok(), "WAITING 100");
    d.arrive(Arrival::Begin(Some(table(1, 2))));
    d.arrive(rows(&[100]));
    d.arrive(block(wide(100)));
    assert_eq!(d.status(&act(BlockAction::Write, 100)), "execute 100");
    assert_eq!(d.written(), "DONE 100", "rows and shape from before the DDL do not come after it");
    assert_eq!(d.arrive(rows(&[101])), "write 101");
}

// A downstream that is behind a rename moves the start behind it: the rename never comes.
#[test]
fn the_schema_of_a_table_is_that_of_the_shape_its_stream_begins_with() {
    let mut d = Bench::fresh(&DispatcherConfig { schema: SchemaId(7), ..config(1, 1, 50) }, false);
    assert_eq!(d.arrive(Arrival::Begin(Some(table(1, 40)))), "schema 7>1; open v40");
    d.opened();
    let drop_schema = DdlEvent { blocked: Some(InfluencedTables::Schema(SchemaId(1))), ..wide(100) };
    assert_eq!(d.arrive(block(drop_schema)), "working; flush");
}

// One commit ts names one DDL per table: readers of a log join several of one transaction.
#[test]
fn a_second_ddl_of_one_commit_ts_is_refused_and_not_lost() {
    let mut d = Bench::table(50);
    d.arrive(block(ddl(100)));
    d.flush_ok();
    assert_eq!(d.written(), "");
    assert_eq!(d.arrive(block(ddl(100))), "", "a repetition");
    d.arrive(resolved(100));
    let second = DdlEvent { query: "ALTER TABLE t1 ADD COLUMN d text".into(), ..ddl(100) };
    assert_eq!(d.arrive(block(second)), "fail CDC:ErrSchemaChangeUnsupported");
}

// The log side does not know the schema of a table of which nothing was told yet.
#[test]
fn a_change_of_another_schema_is_no_barrier() {
    let of_schema = |schema: i64| {
        block(DdlEvent { blocked: Some(InfluencedTables::Schema(SchemaId(schema))), ..wide(100) })
    };
    let mut d = Bench::table(50);
    assert_eq!(d.arrive(of_schema(2)), "");
    d.arrive(resolved(100));
    assert_eq!(d.checkpoint(), 100);
    let mut d = Bench::table(50);
    assert_eq!(d.arrive(of_schema(1)), "working; flush");
    let mut d = Bench::trigger(50);
    assert_eq!(d.arrive(of_schema(2)), "working; flush");
}
