//! How long a reader pauses when its socket has run dry: a pure core.
//!
//! A server sends every change of its log by itself. A reader that looks at once is woken, and wakes the server's side of the
//! connection, for each; and while its receive window is open each change becomes a packet, which costs the server more than
//! decoding it. While the window is closed changes gather at the sender and leave as large packets. So a reader that is as fast as
//! its server, and near to it, looks less often while much comes.
//!
//! Only a server of the same machine is near enough: behind a network a window that is closed for long limits the rate, and the
//! sender's buffer does not hold what comes in a pause.

use std::time::{Duration, Instant};

/// Shortest pause, and the only one unless the server is near and fast.
pub(super) const SHORT: Duration = Duration::from_millis(1);
/// Longest pause: what a change of a busy server waits at most for others.
const LONG: Duration = Duration::from_millis(8);
/// Bytes that a pause shall gather; a fraction of what the sender's buffer holds.
const GATHERED: u64 = 256 << 10;
/// Bytes that would have to come in the longest pause for it to be worth it: a few hundred small changes. A server that is fast
/// but has few of the processors is paused for as well: it has the more of them, the fewer packets it sends.
const WORTHWHILE: u64 = 16 << 10;

/// See the module.
#[derive(Debug)]
pub(super) struct Pace {
    /// The server is on this machine.
    near: bool,
    since: Instant,
    /// What had been received then.
    received: u64,
}

impl Pace {
    /// Of a connection that has received so many bytes.
    pub(super) fn new(near: bool, received: u64, now: Instant) -> Self {
        Self { near, since: now, received }
    }

    /// The next pause of a socket that ran dry after `received` bytes. The rate is that since it ran dry before.
    pub(super) fn pause(&mut self, received: u64, now: Instant) -> Duration {
        let bytes = received.saturating_sub(std::mem::replace(&mut self.received, received));
        let took = now.saturating_duration_since(std::mem::replace(&mut self.since, now)).max(SHORT);
        if !self.near || bytes == 0 || share(bytes, LONG, took) < u128::from(WORTHWHILE) {
            return SHORT;
        }
        let enough = u64::try_from(took.as_nanos() * u128::from(GATHERED) / u128::from(bytes));
        Duration::from_nanos(enough.unwrap_or(u64::MAX)).clamp(SHORT, LONG)
    }
}

/// Bytes in `part`, when so many came in `whole`.
fn share(bytes: u64, part: Duration, whole: Duration) -> u128 {
    u128::from(bytes) * part.as_nanos() / whole.as_nanos().max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The pause of a server that has sent `rate` bytes a millisecond for ten of them.
    fn pause(near: bool, rate: u64) -> Duration {
        let begin = Instant::now();
        let mut pace = Pace::new(near, 100, begin);
        pace.pause(100 + 10 * rate, begin + Duration::from_millis(10))
    }

    #[test]
    fn a_slow_server_and_one_that_is_far_are_looked_at_soon() {
        assert_eq!(pause(true, 0), SHORT);
        assert_eq!(pause(true, 1000), SHORT);
        assert_eq!(pause(false, 30_000), SHORT);
    }

    #[test]
    fn a_fast_server_that_is_near_is_given_time_to_gather_but_never_long() {
        assert_eq!(pause(true, 3_000), LONG, "also one that has few of the processors");
        assert_eq!(pause(true, 10_000), LONG);
        assert_eq!(pause(true, 30_000), LONG);
        assert!(pause(true, 60_000) < LONG);
        assert_eq!(pause(true, 1 << 30), SHORT, "there is more than a pause shall gather");
    }

    #[test]
    fn the_rate_is_that_since_the_last_pause() {
        let mut now = Instant::now();
        let mut pace = Pace::new(true, 0, now);
        now += Duration::from_millis(10);
        assert_eq!(pace.pause(300_000, now), LONG);
        now += Duration::from_millis(10);
        assert_eq!(pace.pause(301_000, now), SHORT);
        now += Duration::from_secs(3600);
        assert_eq!(pace.pause(601_000, now), SHORT, "most of the time nothing came");
        assert_eq!(pace.pause(1 << 40, now), SHORT, "a clock that stands still does no harm");
    }
}
