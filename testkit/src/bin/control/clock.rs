//! Processor time of the calling thread.

use std::hint::black_box;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// Processor time that the calling thread has used.
pub(crate) fn used() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// What something took.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub(crate) struct Spent {
    /// Processor time of the thread.
    pub(crate) cpu: Duration,
    /// Time on the clock.
    pub(crate) wall: Duration,
}

impl std::ops::AddAssign for Spent {
    fn add_assign(&mut self, other: Self) {
        self.cpu += other.cpu;
        self.wall += other.wall;
    }
}

/// Calls once.
pub(crate) fn spent<R>(call: impl FnOnce() -> R) -> (Spent, R) {
    let (started, before) = (Instant::now(), used());
    let result = black_box(call());
    (Spent { cpu: used() - before, wall: started.elapsed() }, result)
}

/// Nanoseconds of processor time.
pub(crate) fn nanoseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e9
}

/// The cheapest of several rounds of `calls` calls, in nanoseconds for each call.
pub(crate) fn per_call(rounds: usize, calls: u64, mut call: impl FnMut(u64)) -> f64 {
    let mut least = f64::INFINITY;
    for _ in 0..rounds.max(1) {
        let before = used();
        for n in 0..calls {
            call(black_box(n));
        }
        least = least.min(nanoseconds(used() - before) / float(calls));
    }
    least
}

/// A count as a number to calculate with.
#[expect(clippy::cast_precision_loss, reason = "counts are far below what a double holds exactly")]
pub(crate) fn float(count: u64) -> f64 {
    count as f64
}
