//! Which row batches of a dispatcher are still on their way downstream, and the checkpoint that follows.

use std::collections::VecDeque;

use heartbeatpb::Ts;

/// Names one batch of one dispatcher between handing it to the sink and its flush.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Ticket(u64);

#[derive(Debug)]
struct Batch {
    first_commit: Ts,
    end: RowEnd,
    bytes: usize,
    flushed: bool,
}

/// The end of a batch among the rows of its table: rows of earlier transactions, and the first `rows` rows of
/// the one at `commit_ts`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct RowEnd {
    /// Commit ts of the last transaction.
    pub(crate) commit_ts: Ts,
    /// Number of its rows.
    pub(crate) rows: u64,
}

/// What a flush brought.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Flush {
    /// Largest commit ts of the batch.
    pub(crate) commit_ts: Ts,
    /// Its size.
    pub(crate) bytes: usize,
}

/// Batches in arrival order. They complete in any order; a ticket tells equal ones apart.
///
/// Invariant DM-1: the checkpoint is below every commit ts of a batch that is not flushed.
#[derive(Debug, Default)]
pub(crate) struct TableProgress {
    batches: VecDeque<Batch>,
    /// Ticket of the front.
    front: u64,
    /// Largest commit ts added or passed.
    max_commit: Ts,
    /// Everything before it is flushed.
    durable: Option<RowEnd>,
}

impl TableProgress {
    /// A batch goes to the sink. A stream that begins again repeats rows; those before the largest commit ts are
    /// held by the batches that brought them first, so a repeated batch never pulls the checkpoint back.
    pub(crate) fn add(&mut self, first_commit: Ts, end: RowEnd, bytes: usize) -> Ticket {
        let first_commit = first_commit.max(self.max_commit);
        let ticket = Ticket(self.front + self.batches.len() as u64);
        self.batches.push_back(Batch { first_commit, end, bytes, flushed: false });
        self.max_commit = self.max_commit.max(end.commit_ts);
        ticket
    }

    /// A batch is durable. `None` for a ticket that was completed before.
    pub(crate) fn complete(&mut self, ticket: Ticket) -> Option<Flush> {
        let index = usize::try_from(ticket.0.checked_sub(self.front)?).ok()?;
        let batch = self.batches.get_mut(index).filter(|batch| !batch.flushed)?;
        batch.flushed = true;
        let flush = Flush { commit_ts: batch.end.commit_ts, bytes: batch.bytes };
        while let Some(end) = self.batches.front().filter(|batch| batch.flushed).map(|batch| batch.end) {
            self.durable = self.durable.max(Some(end));
            self.batches.pop_front();
            self.front += 1;
        }
        Some(flush)
    }

    /// An event is done without a batch: a block event, written here or elsewhere.
    pub(crate) fn pass(&mut self, commit_ts: Ts) {
        self.max_commit = self.max_commit.max(commit_ts);
    }

    /// Whether nothing is on its way.
    pub(crate) fn is_empty(&self) -> bool {
        self.batches.is_empty()
    }

    /// Batches on their way.
    pub(crate) fn len(&self) -> usize {
        self.batches.len()
    }

    /// Rows up to here are durable, in order, whether or not their transaction is complete.
    pub(crate) fn durable(&self) -> Option<RowEnd> {
        self.durable
    }

    /// The checkpoint that batches allow: just before the oldest one that is not flushed. When all are, just
    /// before the largest commit ts, because more rows of that transaction may follow. `None` before the first.
    pub(crate) fn checkpoint(&self) -> Option<Ts> {
        match self.batches.front() {
            Some(batch) => Some(batch.first_commit.before()),
            None => (self.max_commit > Ts::ZERO).then(|| self.max_commit.before()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add(progress: &mut TableProgress, commit: u64) -> Ticket {
        progress.add(Ts(commit), RowEnd { commit_ts: Ts(commit), rows: 1 }, 10)
    }

    // behaviour: dispatcher-86
    #[test]
    fn the_checkpoint_follows_the_oldest_batch_in_flight() {
        let mut progress = TableProgress::default();
        assert_eq!(progress.checkpoint(), None);
        let a = add(&mut progress, 10);
        let b = add(&mut progress, 20);
        let c = add(&mut progress, 30);
        assert_eq!(progress.checkpoint(), Some(Ts(9)));
        assert_eq!(progress.complete(b), Some(Flush { commit_ts: Ts(20), bytes: 10 }));
        assert_eq!(progress.checkpoint(), Some(Ts(9)));
        progress.complete(a);
        assert_eq!(progress.checkpoint(), Some(Ts(29)));
        progress.complete(c);
        assert!(progress.is_empty());
        assert_eq!(progress.checkpoint(), Some(Ts(29)));
        progress.pass(Ts(50));
        assert_eq!(progress.checkpoint(), Some(Ts(49)));
    }

    // behaviour: dispatcher-86
    #[test]
    fn parts_of_one_transaction_are_told_apart() {
        let mut progress = TableProgress::default();
        let a = add(&mut progress, 10);
        let b = add(&mut progress, 10);
        assert!(progress.complete(b).is_some());
        assert!(progress.complete(b).is_none());
        assert_eq!(progress.len(), 2);
        assert_eq!(progress.checkpoint(), Some(Ts(9)));
        assert!(progress.complete(a).is_some());
        assert!(progress.complete(a).is_none());
        assert!(progress.is_empty());
    }

    proptest::proptest! {
        #[test]
        fn the_checkpoint_never_passes_an_unflushed_batch_and_never_goes_back(
            steps in proptest::collection::vec((0u64..3, 0usize..64, proptest::bool::ANY), 1..200),
        ) {
            let mut progress = TableProgress::default();
            let mut open: Vec<(Ticket, Ts)> = Vec::new();
            let mut commit = 1;
            let mut last = Ts::ZERO;
            for (advance, pick, add) in steps {
                if add || open.is_empty() {
                    commit += advance;
                    let end = commit + pick as u64 % 3;
                    open.push((progress.add(Ts(commit), RowEnd { commit_ts: Ts(end), rows: 1 }, 1), Ts(commit)));
                    commit = end;
                } else {
                    let (ticket, _) = open.swap_remove(pick % open.len());
                    proptest::prop_assert!(progress.complete(ticket).is_some());
                }
                let checkpoint = progress.checkpoint().unwrap_or_default();
                proptest::prop_assert!(open.iter().all(|(_, first)| checkpoint < *first));
                proptest::prop_assert!(checkpoint >= last);
                proptest::prop_assert_eq!(progress.is_empty(), open.is_empty());
                last = checkpoint;
            }
        }
    }
}
