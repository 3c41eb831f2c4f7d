//! Tables that keep the order of their changes for a while, because a unique value was in the way of one of them.
//!
//! Each change of such a table waits for the one before it: whatever its queue, a transaction has the first ones of those that
//! are left, or none. The order begins when every transaction has ended that was taken before: then all changes of the table
//! that are left are in the queues.

use heartbeatpb::TableId;

use super::{Batch, Causality, Entry, Shard};

/// Pushes for which a table keeps the order of its changes after a unique value was in the way. Twice as many each further
/// time: what happens seldom costs little, and what happens often happens seldom.
pub(super) const IN_ORDER: u64 = 16_384;

/// A table that keeps the order of its changes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Order {
    /// The last change of which this is so.
    pub(super) until: u64,
    pub(super) length: u64,
    /// Transactions up to this one may have changes of the table in any order.
    pub(super) since: u64,
}

impl<T> Causality<T> {
    /// The batches of a transaction were rolled back because of a unique value of a table. They go again, and for a while
    /// the changes of this table keep their order: a transaction has the first of those that are left, or none.
    ///
    /// # Errors
    /// The batches, if the changes of the table in them were in order.
    pub fn again_in_order(&mut self, batches: Vec<Batch<T>>, table: TableId) -> Result<(), Vec<Batch<T>>> {
        let entries = batches.iter().flat_map(|batch| &batch.entries);
        let last = entries.filter(|entry| entry.table == table).map(|entry| entry.seq).max();
        let number = batches.iter().map(|batch| batch.number).max();
        let order = self.ordered.get(&table).copied();
        match order.filter(|order| last.is_none_or(|last| last <= order.until)) {
            Some(order) if number > Some(order.since) => return Err(batches),
            // Another transaction has met a value before this one.
            Some(_) => {}
            None => {
                let length = order.map_or(IN_ORDER, |order| order.length.saturating_mul(2));
                let until = self.next_seq.saturating_add(length);
                self.ordered.insert(table, Order { until, length, since: self.transactions });
                self.unordered.push(table);
            }
        }
        batches.into_iter().for_each(|batch| self.give_back(batch));
        Ok(())
    }

    /// Whether a change waits for whatever is being written.
    pub(super) fn stops(&self, entry: &Entry<T>) -> bool {
        self.unordered.contains(&entry.table)
    }

    /// Puts the changes of tables in order in which nothing is in another order any more.
    pub(super) fn put_in_order(&mut self) {
        if self.unordered.is_empty() {
            return;
        }
        let oldest = self.queues.iter().filter_map(|queue| queue.writing).map(|(_, number)| number).min();
        let is_over = |table: &TableId| {
            self.ordered.get(table).is_none_or(|order| oldest.is_none_or(|n| n > order.since))
        };
        let over: Vec<TableId> = self.unordered.iter().copied().filter(is_over).collect();
        self.unordered.retain(|table| !over.contains(table));
        for table in over {
            let mut chain: Vec<(u64, Shard)> = Vec::new();
            for (index, queue) in self.queues.iter().enumerate() {
                let own = queue.waiting.iter().filter(|entry| entry.table == table);
                chain.extend(own.filter_map(|entry| Some((entry.seq, Shard::from_index(index)?))));
            }
            chain.sort_unstable_by_key(|(seq, _)| *seq);
            // What is committed may have been pushed later than what is left.
            if let Some(pending) = self.tables.get_mut(&table) {
                pending.latest = chain.last().map(|&(seq, shard)| (shard, seq));
            }
            for entry in self.queues.iter_mut().flat_map(|queue| &mut queue.waiting) {
                let place = chain.binary_search_by_key(&entry.seq, |(seq, _)| *seq).ok();
                if let Some(&(seq, shard)) = place.and_then(|at| chain.get(at.checked_sub(1)?)) {
                    entry.ties.get_or_insert_default().previous = Some((shard, seq));
                }
            }
        }
    }
}
