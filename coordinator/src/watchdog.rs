//! Whether this process may still write: the lease of its session, by what the store says and by the clock.
//!
//! A core: signs and time in, at most one verdict out. The loop around it asks the store how long the lease has left
//! and waits for the session's end at the same time, and acts on the verdict: liveness goes to stopping, the write
//! path is closed, and the process ends.
//!
//! ```text
//!               confirmed (at the time the question was sent)
//!                 +-----+
//!                 v     |
//!   granted --> trusted-+-- the session is done ---------------------> lost: fence, once
//!                       +-- the lease is gone ------------------------> lost: fence, once
//!                       +-- not confirmed for ttl - margin, by clock --> lost: fence, once
//! ```

use std::time::{Duration, Instant};

/// Between two questions to the store.
pub const PERIOD: Duration = Duration::from_secs(1);
/// The least time between the fence by the clock and the earliest moment at which the store may give the lease up.
const LEAST_MARGIN: Duration = Duration::from_secs(1);

/// Why a process may not write any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Lost {
    /// The session said so.
    #[error("the session of the metadata store ended")]
    Done,
    /// The store said so.
    #[error("the lease is gone from the metadata store")]
    Gone,
    /// Nobody said anything for too long: by the clock another node may have taken over.
    #[error("the metadata store did not confirm the lease in time")]
    Silent,
}

impl Lost {
    /// Stable code with which the process ends.
    #[must_use]
    pub const fn code(self) -> &'static str {
        heartbeatpb::codes::CAPTURE_SUICIDE
    }
}

/// The verdict on one session.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Watchdog {
    ttl: Duration,
    /// The lease lives at least until its time to live after this.
    confirmed: Instant,
    lost: Option<Lost>,
}

impl Watchdog {
    /// A session whose lease of `ttl` was asked for at `asked`.
    #[must_use]
    pub fn new(ttl: Duration, asked: Instant) -> Self {
        Self { ttl, confirmed: asked, lost: None }
    }

    /// Longest time to wait for an answer about the lease.
    #[must_use]
    pub fn answer_limit(&self) -> Duration {
        PERIOD.min(self.ttl / 3)
    }

    /// When [`Watchdog::on_time`] has to be called at the latest.
    #[must_use]
    pub fn deadline(&self) -> Instant {
        let margin = LEAST_MARGIN.max(self.ttl / 5);
        self.confirmed + self.ttl.saturating_sub(margin)
    }

    /// The store renewed the lease, or said that it lives, in answer to a question sent at `asked`. An answer that
    /// comes after the verdict changes nothing: others may have acted on it.
    pub fn on_confirmed(&mut self, asked: Instant) {
        self.confirmed = self.confirmed.max(asked);
    }

    /// The store said that the lease is gone. Returns the verdict the first time there is one.
    pub fn on_gone(&mut self) -> Option<Lost> {
        self.lose(Lost::Gone)
    }

    /// The session ended.
    pub fn on_done(&mut self) -> Option<Lost> {
        self.lose(Lost::Done)
    }

    /// Time passes, whether the store answers or not.
    pub fn on_time(&mut self, now: Instant) -> Option<Lost> {
        if now >= self.deadline() { self.lose(Lost::Silent) } else { None }
    }

    /// The verdict, if there is one.
    #[must_use]
    pub fn lost(&self) -> Option<Lost> {
        self.lost
    }

    fn lose(&mut self, why: Lost) -> Option<Lost> {
        if self.lost.is_some() {
            return None;
        }
        self.lost = Some(why);
        self.lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(10);

    fn watchdog() -> (Watchdog, Instant) {
        let start = Instant::now();
        (Watchdog::new(TTL, start), start)
    }

    #[test]
    // behaviour: coordinator-ST-20
    fn a_store_that_does_not_answer_is_not_waited_for_longer_than_the_lease_surely_lives() {
        let (mut dog, start) = watchdog();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(dog.on_time(at(7)), None);
        // The answer came at 7, to a question of 5: the lease lives until 15.
        dog.on_confirmed(at(5));
        assert_eq!((dog.deadline(), dog.on_time(at(12))), (at(13), None));
        dog.on_confirmed(at(3));
        assert_eq!(dog.deadline(), at(13), "an older answer takes nothing back");
        assert_eq!(dog.on_time(at(13)), Some(Lost::Silent));
        dog.on_confirmed(at(13));
        assert_eq!((dog.on_time(at(14)), dog.lost()), (None, Some(Lost::Silent)), "it stays lost");
    }

    #[test]
    // behaviour: coordinator-ST-9
    // behaviour: coordinator-ST-10
    fn the_end_of_a_session_is_told_once_whatever_tells_it() {
        let (dog, start) = watchdog();
        let late = start + 2 * TTL;
        for first in 0..3 {
            let mut dog = dog.clone();
            let mut told = Vec::new();
            for turn in 0..6 {
                told.extend(match (first + turn) % 3 {
                    0 => dog.on_done(),
                    1 => dog.on_gone(),
                    _ => dog.on_time(late),
                });
            }
            let expected = [Lost::Done, Lost::Gone, Lost::Silent][first];
            assert_eq!((told.as_slice(), dog.lost()), (&[expected][..], Some(expected)));
            assert_eq!(expected.code(), heartbeatpb::codes::CAPTURE_SUICIDE);
        }
    }

    #[test]
    fn short_leases_keep_a_margin_of_a_second() {
        let start = Instant::now();
        let dog = Watchdog::new(Duration::from_secs(3), start);
        assert_eq!(dog.deadline(), start + Duration::from_secs(2));
        assert_eq!(dog.answer_limit(), Duration::from_secs(1));
        let dog = Watchdog::new(Duration::from_millis(900), start);
        assert_eq!((dog.deadline(), dog.answer_limit()), (start, Duration::from_millis(300)));
    }
}
