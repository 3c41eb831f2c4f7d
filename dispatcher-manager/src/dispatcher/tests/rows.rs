//! Rows, resolved positions, shapes and the initial copy.

use std::sync::Arc;
use std::time::{Duration, Instant};

use event::DdlEvent;
use heartbeatpb::{BlockAction, ComponentState, DispatcherConfig, InfluencedTables, SchemaId, Ts};
use proptest::prelude::*;

use crate::Fault;
use crate::arrival::{Arrival, Credit};
use crate::dispatcher::testing::*;

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

// behaviour: dispatcher-84
#[test]
fn a_broken_sink_is_not_waited_for() {
    let mut d = Bench::table(50);
    d.arrive(rows(&[60]));
    assert!(!d.dispatcher.can_close(true));
    assert!(d.dispatcher.can_close(false));
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
