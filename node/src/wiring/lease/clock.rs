//! A clock that does not stop while the machine sleeps, in the terms of one that does.

use std::time::{Duration, Instant};

/// The clock. Copies show the same time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    born: Instant,
    uptime: Duration,
}

impl Clock {
    pub(super) fn new() -> Self {
        Self { born: Instant::now(), uptime: uptime() }
    }

    fn elapsed(&self) -> Duration {
        uptime().saturating_sub(self.uptime)
    }

    /// Microseconds since its beginning.
    pub(super) fn micros(&self) -> u64 {
        micros(self.elapsed())
    }

    /// Now.
    pub(super) fn now(&self) -> Instant {
        self.born + self.elapsed()
    }

    /// How long the machine has slept so far.
    pub(super) fn slept(&self) -> Duration {
        self.now().saturating_duration_since(Instant::now())
    }

    /// A moment of [`Clock::now`] in microseconds since its beginning.
    pub(super) fn micros_of(&self, at: Instant) -> u64 {
        micros(at.saturating_duration_since(self.born))
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Time since the machine started, with the time for which it slept.
#[cfg(target_os = "linux")]
fn uptime() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let (seconds, nanos) = (u64::try_from(time.tv_sec), u32::try_from(time.tv_nsec));
    Duration::new(seconds.unwrap_or(0), nanos.unwrap_or(0))
}

/// Time since the first call.
#[cfg(not(target_os = "linux"))]
fn uptime() -> Duration {
    static BORN: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    BORN.get_or_init(Instant::now).elapsed()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_goes_forward_and_knows_no_sleep_that_was_none() {
        let clock = Clock::new();
        std::thread::sleep(Duration::from_millis(20));
        assert!(clock.elapsed() >= Duration::from_millis(20));
        assert!(clock.slept() < Duration::from_millis(500), "{:?}", clock.slept());
        assert!(clock.micros() >= 20_000 && clock.micros_of(clock.now()) <= clock.micros());
    }
}
