//! Which orders a node has taken, and what is to be said about them: pure.
//!
//! ```text
//!   unknown ──order──▶ running ──ends──▶ ended: every further order hears how
//!                         │                │
//!                         └── nobody asks any more: dropped ──▶ forgotten
//! ```

use std::collections::BTreeMap;
use std::time::Duration;

use heartbeatpb::{NodeId, codes};
use tokio::time::Instant;

use super::topic::{OrderId, OrderState};

/// A copy that asks nothing for so long has ended, or its node has.
pub(super) const UNASKED: Duration = Duration::from_secs(30);
/// Parts that are written at the same time for all copies together: each takes a connection to either end.
pub(super) const MOST: usize = 64;

/// Whose order it is, and which.
pub(super) type Key = (NodeId, OrderId);

/// What to do about an order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Step {
    /// Carry it out.
    Begin,
    /// Answer.
    Say(OrderState),
}

struct Job {
    state: OrderState,
    asked: Instant,
}

/// The orders of a node.
#[derive(Default)]
pub(super) struct Jobs {
    jobs: BTreeMap<Key, Job>,
}

impl Jobs {
    pub(super) fn on_order(&mut self, key: &Key, now: Instant) -> Step {
        if let Some(job) = self.jobs.get_mut(key) {
            job.asked = now;
            return Step::Say(job.state.clone());
        }
        if self.running().count() >= MOST {
            let (code, message) =
                (codes::LOG_READER_FAILED.to_owned(), format!("{MOST} parts are written already"));
            return Step::Say(OrderState::Failed { code, message });
        }
        self.jobs.insert(key.clone(), Job { state: OrderState::Running, asked: now });
        Step::Begin
    }

    /// It is not carried out any more.
    pub(super) fn on_end(&mut self, key: &Key, state: OrderState) {
        if let Some(job) = self.jobs.get_mut(key) {
            job.state = state;
        }
    }

    /// Orders about which nobody asks any more are forgotten; these were running.
    pub(super) fn forget(&mut self, now: Instant) -> Vec<Key> {
        let unasked = |job: &Job| now.saturating_duration_since(job.asked) >= UNASKED;
        let dropped = self.running().filter(|key| self.jobs.get(key).is_some_and(unasked)).cloned().collect();
        self.jobs.retain(|_, job| !unasked(job));
        dropped
    }

    pub(super) fn running(&self) -> impl Iterator<Item = &Key> {
        self.jobs.iter().filter(|(_, job)| job.state == OrderState::Running).map(|(key, _)| key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: u64) -> Key {
        (NodeId::from("reader"), OrderId { run: 1, number })
    }

    #[test]
    fn an_order_is_carried_out_once_however_often_it_comes() {
        let (mut jobs, now) = (Jobs::default(), Instant::now());
        assert_eq!(jobs.on_order(&key(1), now), Step::Begin);
        assert_eq!(jobs.on_order(&key(1), now), Step::Say(OrderState::Running));
        assert_eq!(jobs.on_order(&key(2), now), Step::Begin);
        let written = OrderState::Written { rows: 3, bytes: 9 };
        jobs.on_end(&key(1), written.clone());
        assert_eq!(jobs.on_order(&key(1), now), Step::Say(written));
        assert_eq!(jobs.running().cloned().collect::<Vec<_>>(), [key(2)]);
        let other = (NodeId::from("another"), OrderId { run: 1, number: 1 });
        assert_eq!(jobs.on_order(&other, now), Step::Begin, "each node counts by itself");
    }

    #[test]
    fn what_nobody_asks_for_is_dropped_and_what_has_ended_is_only_forgotten() {
        let (mut jobs, begun) = (Jobs::default(), Instant::now());
        for number in 1..=3 {
            assert_eq!(jobs.on_order(&key(number), begun), Step::Begin);
        }
        jobs.on_end(&key(1), OrderState::Written { rows: 1, bytes: 1 });
        let later = begun + UNASKED / 2;
        assert_eq!(jobs.on_order(&key(3), later), Step::Say(OrderState::Running));
        assert_eq!(jobs.forget(later), []);
        assert_eq!(jobs.forget(begun + UNASKED), [key(2)]);
        assert_eq!(jobs.running().cloned().collect::<Vec<_>>(), [key(3)]);
        jobs.on_end(&key(2), OrderState::Running);
        assert_eq!(jobs.forget(later + UNASKED), [key(3)]);
    }

    #[test]
    fn more_orders_than_connections_are_refused() {
        let (mut jobs, now) = (Jobs::default(), Instant::now());
        for number in 0..MOST as u64 {
            assert_eq!(jobs.on_order(&key(number), now), Step::Begin);
        }
        assert!(matches!(jobs.on_order(&key(99), now), Step::Say(OrderState::Failed { .. })));
        jobs.on_end(&key(0), OrderState::Written { rows: 1, bytes: 1 });
        assert_eq!(jobs.on_order(&key(99), now), Step::Begin);
    }
}
