//! What owners are told, how often, and how far it goes.

use super::*;

// behaviour: dispatcher-56
#[test]
fn intervals_follow_the_performance_mode() {
    let options = CoreOptions::of(&ReplicaConfig::default(), false);
    assert_eq!(options.heartbeat_interval, Duration::from_millis(200));
    assert_eq!(options.first_heartbeat, Duration::from_secs(1));
    let low = ReplicaConfig { performance_mode: PerformanceMode::LowLatency, ..ReplicaConfig::default() };
    let options = CoreOptions::of(&low, false);
    assert_eq!(options.heartbeat_interval, Duration::from_millis(50));
    assert_eq!(options.first_heartbeat, Duration::ZERO);
}

#[test]
fn heartbeats_begin_with_the_first_dispatcher_and_list_everybody_now_and_then() {
    let mut x = Bench::new();
    assert_eq!(x.wait(60_000), "");
    x.schedule(&a(), ScheduleAction::Create, 1, 1);
    x.opened(1, 60);
    assert_eq!(x.wait(999), "");
    assert_eq!(x.wait(1), "beat 60/60 seq 1 complete", "one that has seen nothing counts, but is not listed");
    assert_eq!(x.arrive(1, resolved(70)), "");
    assert_eq!(x.wait(10), "beat 60/60 seq 1 1:Working@70");
    assert_eq!(x.wait(190), "beat 70/70 seq 1");
    let mut complete = 0;
    for _ in 0..100 {
        complete += u32::from(x.wait(200).contains("1:Working@70 complete"));
    }
    assert_eq!(complete, 2);
}

#[test]
fn a_watermark_counts_every_dispatcher_from_its_creation_on() {
    let mut x = Bench::new();
    x.working(1);
    x.arrive(1, resolved(500));
    x.beat();
    x.schedule(&a(), ScheduleAction::Create, 2, 1);
    x.opened(2, 60);
    x.arrive(2, resolved(61));
    assert_eq!(x.wait(10), "beat 60/60 seq 2 2:Working@61");
    assert_eq!(x.beat(), "beat 61/61 seq 2");
}

#[test]
fn a_watermark_that_tells_of_one_newcomer_counts_those_before_it_too() {
    let mut x = Bench::new();
    x.working(1);
    x.arrive(1, resolved(500));
    x.beat();
    x.schedule(&a(), ScheduleAction::Create, 2, 1);
    x.opened(2, 60);
    x.arrive(2, resolved(61));
    x.schedule(&a(), ScheduleAction::Create, 3, 1);
    x.opened(3, 400);
    assert_eq!(x.wait(10), "beat 60/60 seq 3 2:Working@61");
    x.arrive(3, resolved(401));
    assert_eq!(x.wait(10), "beat 60/60 seq 3 3:Working@401", "its own progress is not that of the second");
}

#[test]
fn what_could_not_leave_leaves_later() {
    let mut x = Bench::new();
    x.working(1);
    x.schedule(&a(), ScheduleAction::Remove, 1, 1);
    x.beat();
    let unsent =
        x.last(|action| if let Action::HeartBeat(request) = action { Some(request.clone()) } else { None });
    x.core.on_heartbeat_unsent(unsent, x.now);
    assert_eq!(x.wait(10), "beat 60/60 seq 1 1:Stopped@60");
}

// The checks that divide tables live on it: only complete lists carry a rate, of each dispatcher for itself.
#[test]
fn complete_lists_tell_the_measured_rate_of_each_dispatcher() {
    let mut x = Bench::new();
    x.working(1);
    x.working(2);
    let rates = |x: &mut Bench, seconds: u64| {
        x.now += Duration::from_secs(seconds);
        x.core.next_complete = Some(x.now);
        x.core.next_heartbeat = Some(x.now);
        x.wait(0);
        let complete = |action: &Action| {
            let Action::HeartBeat(request) = action else { return None };
            request.complete.then(|| request.clone())
        };
        let beat = x.last(complete);
        let rates: Vec<f32> = beat.statuses.iter().map(|status| status.event_size_per_second).collect();
        (beat, rates)
    };
    rates(&mut x, 10);
    x.arrive(1, rows(&[70, 71, 72]));
    let bytes =
        x.last(|action| if let Action::Write { batch, .. } = action { Some(batch.bytes()) } else { None });
    assert_eq!(rates(&mut x, 10).1, [1.0, 1.0], "what is not durable is not measured");
    x.core.on_flushed(x.slot(1), x.last_ticket());
    let (unsent, measured) = rates(&mut x, 10);
    assert!((f64::from(measured[0]) - bytes as f64 / 10.0).abs() < 0.01, "{measured:?} of {bytes}");
    assert!((measured[1] - 1.0).abs() < f32::EPSILON);
    x.core.on_heartbeat_unsent(unsent, x.now);
    let (_, again) = rates(&mut x, 10);
    assert!((f64::from(again[0]) - bytes as f64 / 20.0).abs() < 0.01, "what nobody heard is not lost");
    assert_eq!(rates(&mut x, 10).1, [1.0, 1.0]);
}

#[test]
fn the_first_error_is_repeated_until_the_manager_is_closed() {
    let mut x = Bench::new();
    x.core.on_sink_failed(fault(), x.now);
    let other = Fault { code: "CDC:ErrOther".into(), ..fault() };
    x.core.on_error(other, x.now);
    assert_eq!(x.wait(0), "error CDC:ErrSinkUnavailable");
    assert_eq!(x.wait(4_999), "");
    assert_eq!(x.wait(1), "error CDC:ErrSinkUnavailable");
    assert_eq!(x.core.life(), Life::Open, "the owner decides");
    x.core.stop();
    x.take();
    assert_eq!(x.wait(60_000), "");
}
