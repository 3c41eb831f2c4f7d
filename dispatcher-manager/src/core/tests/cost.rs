//! What an event costs does not depend on how many dispatchers there are.

use super::*;

/// A manager of `n` dispatchers that work.
fn crowd(n: u64) -> Bench {
    let mut x = Bench::new();
    for dispatcher in 1..=n {
        let request = x.request(ScheduleAction::Create, dispatcher, 1);
        x.core.on_schedule(&a(), request, x.now);
        let start = TableStart { start_ts: Ts(60), skip_dml_at_start: false };
        x.core.on_dispatcher_opened(id(dispatcher), Ts(60), Ok(start), x.now);
        x.core.on_arrival(id(dispatcher), Arrival::Begin(Some(table(1, 1))), x.now);
        x.core.on_table_opened(x.slot(dispatcher), Ok(()), x.now);
        x.core.on_arrival(id(dispatcher), resolved(60), x.now);
    }
    x.now += Duration::from_secs(20);
    x.core.on_tick(x.now);
    x.core.take_actions(&mut x.seen);
    x.seen.clear();
    x
}

/// Everything that happens to one dispatcher, many times.
fn one_lives(x: &mut Bench, events: u64) -> Duration {
    let first = x.core.dispatchers.get(x.slot(1)).expect("present").resolved().0 + 1;
    let begun = Instant::now();
    for n in 0..events {
        let ts = first + 3 * n;
        x.core.on_arrival(id(1), rows(&[ts]), x.now);
        x.core.take_actions(&mut x.seen);
        let ticket = x.last_ticket();
        x.core.on_flushed(x.slot(1), ticket);
        x.core.on_arrival(id(1), block(ddl(ts + 1)), x.now);
        x.core.on_flush_finished(x.slot(1), Ok(()), x.now);
        x.core.on_block_written(x.slot(1), Ok(()), x.now);
        x.core.on_arrival(id(1), resolved(ts + 2), x.now);
        // Between two heartbeats.
        x.core.next_heartbeat = None;
        x.core.on_tick(x.now);
        x.core.take_actions(&mut x.seen);
        x.seen.clear();
    }
    begun.elapsed()
}

fn one_is_replaced(x: &mut Bench, times: u64, first: u64) -> Duration {
    let begun = Instant::now();
    for n in first..first + times {
        let request = x.request(ScheduleAction::Create, n, 1);
        x.core.on_schedule(&a(), request, x.now);
        let start = TableStart { start_ts: Ts(60), skip_dml_at_start: false };
        x.core.on_dispatcher_opened(id(n), Ts(60), Ok(start), x.now);
        let request = x.request(ScheduleAction::Remove, n, 1);
        x.core.on_schedule(&a(), request, x.now);
        x.core.take_actions(&mut x.seen);
        x.seen.clear();
    }
    begun.elapsed()
}

// A scan of all dispatchers at each event would cost three hundred times as much with the crowd.
#[test]
fn an_event_costs_the_same_among_many_dispatchers() {
    let least = |x: &mut Bench| (0..5).map(|_| one_lives(x, 200)).min().expect("several");
    let (mut few, mut many) = (crowd(100), crowd(30_000));
    let (alone, crowded) = (least(&mut few), least(&mut many));
    assert!(crowded < alone * 30, "{crowded:?} among many, {alone:?} among few");
    let least =
        |x: &mut Bench| (0..5).map(|n| one_is_replaced(x, 200, 50_000 + 200 * n)).min().expect("several");
    let (alone, crowded) = (least(&mut few), least(&mut many));
    assert!(crowded < alone * 30, "{crowded:?} among many, {alone:?} among few");
    let begun = Instant::now();
    many.core.next_heartbeat = Some(many.now);
    many.core.next_complete = Some(many.now + Duration::from_secs(10));
    many.core.on_tick(many.now);
    let beat = begun.elapsed();
    assert!(beat < Duration::from_secs(1), "a heartbeat of many took {beat:?}");
}
