//! How much of what waits a worker takes for its next transaction.
//!
//! One large transaction costs the target much less than several small ones: what is parsed, planned and written down as
//! progress is paid once. But a transaction writes on one connection, so a large batch is for all workers.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::route::ROW_WEIGHT;
use super::shared::Shared;
use super::worker::QueuedChange;
use crate::causality::Batch;

/// Row bytes in one downstream transaction.
const TXN_BYTES: usize = 8 << 20;
/// While a transaction is under way, less than this part of a transaction's room waits for more.
const PART: u64 = 2;
/// How long it waits at most: a transaction may take long, as for a lock.
pub(super) const LINGER: Duration = Duration::from_millis(5);

/// What a worker finds when it looks for work.
pub(super) enum Found {
    /// Batches for one transaction.
    Take(Vec<Batch<QueuedChange>>),
    /// Changes that wait for more of them.
    Wait,
    /// Nothing that may be written.
    Nothing,
}

/// Who is there to write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Crew {
    workers: usize,
    /// Of them in a transaction.
    busy: usize,
}

/// How much of `waiting` a worker takes that has nothing to do, with `room` in a transaction; all are weights. `None`:
/// it is too little as long as somebody else writes.
fn share(waiting: u64, room: u64, crew: Crew, impatient: bool) -> Option<u64> {
    let part = (room / PART).max(1);
    if crew.busy > 0 && waiting < part && !impatient {
        return None;
    }
    let idle = u64::try_from(crew.workers.saturating_sub(crew.busy)).unwrap_or(u64::MAX).max(1);
    Some(waiting.div_ceil(idle).clamp(part, room.max(1)))
}

impl Shared {
    /// Takes work for a worker that has none. One that is not impatient leaves little of it alone while others write.
    pub(super) fn take(&self, impatient: bool) -> Found {
        let room = self.config.txn_rows as u64 * u64::from(ROW_WEIGHT);
        let mut queues = self.queues.lock();
        let waiting = queues.waiting();
        if waiting == 0 {
            return Found::Nothing;
        }
        // Changes only while the queues are locked.
        let crew = Crew { workers: self.config.workers, busy: self.busy.load(Ordering::Relaxed) };
        let Some(most) = share(waiting, room, crew, impatient) else { return Found::Wait };
        let batches = queues.take_together(most, TXN_BYTES);
        if batches.is_empty() {
            return Found::Nothing;
        }
        self.busy.fetch_add(1, Ordering::Relaxed);
        Found::Take(batches)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What workers take one after the other, each staying busy.
    fn shares(mut waiting: u64, room: u64, workers: usize) -> Vec<u64> {
        let mut taken = Vec::new();
        for busy in 0..workers {
            let Some(most) = share(waiting, room, Crew { workers, busy }, false).filter(|_| waiting > 0)
            else {
                break;
            };
            taken.push(most.min(waiting));
            waiting -= most.min(waiting);
        }
        taken
    }

    #[test]
    fn a_large_batch_is_for_all_workers_and_a_small_one_is_one_transaction() {
        assert_eq!(shares(10_000, 1000, 4), [1000; 4]);
        assert_eq!(shares(3000, 1000, 4), [750; 4]);
        assert_eq!(shares(2000, 1000, 4), [500; 4]);
        assert_eq!(shares(1200, 1000, 4), [500, 500], "the rest waits for more");
        assert_eq!(shares(50, 1000, 4), [50]);
        assert_eq!(shares(50, 20, 4), [13, 13, 12, 12]);
    }

    #[test]
    fn little_waits_while_somebody_writes_but_not_for_long() {
        let crew = |busy| Crew { workers: 4, busy };
        assert_eq!(share(10, 1000, crew(1), false), None);
        assert_eq!(share(10, 1000, crew(1), true), Some(500));
        assert_eq!(share(10, 1000, crew(0), false), Some(500));
        assert_eq!(share(1, 1, crew(3), false), Some(1), "transactions of one change");
    }
}
