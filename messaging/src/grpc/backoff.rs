//! Pauses between attempts to reach a peer.

use std::time::Duration;

use rand::Rng;

/// The first pause: a peer that restarts is back soon, and every moment without it is lag.
const BASE: Duration = Duration::from_millis(250);
/// Each pause is longer than the one before by this factor.
const FACTOR: f64 = 1.6;
/// The longest pause: a peer that returns waits at most this long.
const MAX: Duration = Duration::from_secs(3);
/// Part by which a pause differs, so that nodes do not dial in step.
const JITTER: f64 = 0.2;

/// Pauses that grow until something works.
#[derive(Debug)]
pub(crate) struct Backoff {
    next: Duration,
}

impl Backoff {
    pub(crate) fn new() -> Self {
        Self { next: BASE }
    }

    /// It worked: begin again with short pauses.
    pub(crate) fn reset(&mut self) {
        self.next = BASE;
    }

    /// How long to wait now.
    pub(crate) fn pause(&mut self) -> Duration {
        let pause = self.next;
        self.next = pause.mul_f64(FACTOR).min(MAX);
        pause.mul_f64(rand::rng().random_range(1.0 - JITTER..=1.0 + JITTER))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_up_to_a_bound_and_begin_again() {
        let mut backoff = Backoff::new();
        let pauses: Vec<_> = (0..20).map(|_| backoff.pause()).collect();
        assert!(pauses[0] >= BASE.mul_f64(0.8) && pauses[0] <= BASE.mul_f64(1.2));
        assert!(pauses.iter().all(|pause| *pause <= MAX.mul_f64(1.2)));
        assert!(pauses[15..].iter().all(|pause| *pause >= MAX.mul_f64(0.8)));
        let distinct: std::collections::BTreeSet<_> = pauses[10..].iter().collect();
        assert!(distinct.len() > 1, "nodes would dial in step");
        backoff.reset();
        assert!(backoff.pause() <= BASE.mul_f64(1.2));
    }
}
