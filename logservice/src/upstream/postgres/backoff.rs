//! Pauses between attempts to reach the upstream.

use std::time::Duration;

/// Pauses between connection attempts: the first, and the longest, which is what an upstream that comes back waits for at
/// most.
const FIRST: Duration = Duration::from_millis(100);
const LAST: Duration = Duration::from_secs(2);
/// A connection that stood this long begins a new series of attempts.
const FORGET: Duration = Duration::from_secs(30);

/// Doubling pauses, each shortened by a random part so that readers do not come back in step.
#[derive(Debug)]
pub(super) struct Backoff(Duration);

impl Default for Backoff {
    fn default() -> Self {
        Self(FIRST)
    }
}

impl Backoff {
    /// The pause after a connection that lived so long. One that brought transactions begins a new series as well: what
    /// fails at the same place again and again brings none.
    pub(super) fn after(&mut self, lived: Duration, brought_any: bool) -> Duration {
        if lived > FORGET || brought_any {
            self.0 = FIRST;
        }
        let pause = self.0;
        self.0 = (pause * 2).min(LAST);
        pause.mul_f64(rand::random_range(0.5..=1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(10);

    #[test]
    fn an_outage_is_not_paid_for_by_the_next_one() {
        let mut backoff = Backoff::default();
        for _ in 0..10 {
            backoff.after(SHORT, false);
        }
        assert!(backoff.after(SHORT, false) >= LAST / 2, "it is away for long");
        let back_for_a_moment = Duration::from_secs(9);
        assert!(backoff.after(back_for_a_moment, true) <= FIRST, "it was back, and rows came");
        backoff.after(SHORT, false);
        assert!(backoff.after(FORGET * 2, false) <= FIRST, "it was back for long, and idle");
    }

    #[test]
    fn what_fails_at_the_same_place_is_tried_ever_more_rarely() {
        let mut backoff = Backoff::default();
        let pauses: Vec<Duration> = (0..10).map(|_| backoff.after(Duration::from_secs(2), false)).collect();
        assert!(pauses[0] <= FIRST && pauses[9] >= LAST / 2, "{pauses:?}");
    }
}
