//! Decides which row changes may be written at the same time: a pure core without clock or connection.
//!
//! Row changes are spread over [`SHARDS`] queues by the key of their row. A queue is first in, first out, and
//! at most one batch of it is being written. What crosses queues is expressed as a dependency on an earlier
//! change: it is met once the transaction of that change has committed, or in that transaction itself behind it.
//! Dependencies only point to changes that were pushed earlier, so the earliest pending change is always free to go and
//! nothing can deadlock.
//!
//! A change that gives a row another key belongs to the queue of the key before, and is ordered in that of the key after
//! as well: it waits for all changes of its table there, and later ones there wait for it.
//!
//! Which unique values a change frees is not always known: of the row before it, the log may have no more than the key.
//! So two changes between which such a value has changed hands may go in the wrong order, and the target refuses the one that
//! takes the value. Then the changes of its table keep their order for a while ([`Causality::again_in_order`]).
//!
//! - **CA-1** Changes that share a known unique key value, or that lie on different sides of a barrier of their
//!   table, complete in the order in which they were pushed, and so do all changes of a table that keeps their order.
//! - **CA-2** While changes are pending and none is being written, [`Causality::take`] returns a batch.
//!
//! Transactions that are being written at the same time do not depend on each other. One of several queues
//! ([`Causality::take_together`]) brings what its changes wait for: with rows that change their keys, or unique values that
//! change hands, a queue alone would seldom have more than a few changes that may go.

mod order;

use std::collections::VecDeque;

use heartbeatpb::TableId;
use rustc_hash::FxHashMap;

use self::order::Order;

/// Number of queues. Fixed: progress is stored downstream per queue, and the place of a row must not change.
pub const SHARDS: usize = 16;

/// One of the [`SHARDS`] queues.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Shard(u8);

impl Shard {
    /// The queue of a hash.
    #[must_use]
    pub const fn of(hash: u64) -> Self {
        // The upper bits: the lower ones choose buckets in hash maps.
        Self((hash >> 60) as u8)
    }

    /// Position, below [`SHARDS`].
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// The queue at a position.
    #[must_use]
    pub fn from_index(index: usize) -> Option<Self> {
        (index < SHARDS).then_some(Self(u8::try_from(index).ok()?))
    }
}

/// What a change touches.
#[derive(Clone, Debug)]
pub struct Access {
    /// Its table.
    pub table: TableId,
    /// Its queue: that of the row's key, the old one if the change alters the key.
    pub shard: Shard,
    /// Hash of the row's key.
    pub row: u64,
    /// The change gives the row another key, whose changes live in this queue under this hash.
    pub moves_to: Option<(Shard, u64)>,
    /// Hashes of the values of the table's other unique keys, before and after, as far as they are known.
    pub keys: Vec<u64>,
    /// Waits for every earlier change of the table, and every later one waits for it.
    pub barrier: bool,
    /// Size in bytes.
    pub bytes: usize,
    /// Its share of the room that a batch has; see [`Causality::take`].
    pub weight: u32,
}

/// A change on its way. Many of them wait at a time, so it holds no more than is asked for again.
#[derive(Debug)]
pub struct Entry<T> {
    /// Place in the order of pushes, from 1.
    pub seq: u64,
    /// What to do.
    pub payload: T,
    table: TableId,
    weight: u32,
    bytes: u32,
    barrier: bool,
    /// What most changes have not.
    ties: Option<Box<Ties>>,
}

/// What ties a change to those of other queues.
#[derive(Default, Debug)]
struct Ties {
    /// The changes that it waits for.
    waits: Vec<(Shard, u64)>,
    /// The unique values under which later changes find it: its new key, if it has one, and those of the other keys.
    values: Vec<u64>,
    /// The row gets another key.
    moves: bool,
    /// The change of its table before it, where the table keeps their order.
    previous: Option<(Shard, u64)>,
}

/// Changes of one queue that may be written in one transaction, in order.
#[derive(Debug)]
pub struct Batch<T> {
    /// Their queue.
    pub shard: Shard,
    /// The changes; never empty.
    pub entries: Vec<Entry<T>>,
    /// Whether the changes go one by one, because together they failed.
    pub serial: bool,
    /// Counts the transactions.
    number: u64,
}

impl<T> Batch<T> {
    /// Sum of the weights of its changes.
    #[must_use]
    pub fn weight(&self) -> u64 {
        self.entries.iter().map(|entry| u64::from(entry.weight)).sum()
    }
}

#[derive(Debug)]
struct Queue<T> {
    waiting: VecDeque<Entry<T>>,
    /// First change of the batch being written, and the transaction.
    writing: Option<(u64, u64)>,
    /// Every change of this queue up to here has completed.
    completed: u64,
    /// Changes up to here go one by one, each after every earlier change of all queues.
    serial_until: u64,
}

#[derive(Debug, Default)]
struct Pending {
    count: usize,
    last: [u64; SHARDS],
    /// The last change, for those that keep their order.
    latest: Option<(Shard, u64)>,
    barrier: Option<(Shard, u64)>,
    /// The last change of each queue that gives a row a key of another one: queue, the other one, number.
    moved: Vec<(Shard, Shard, u64)>,
}

/// The queues and what they wait for.
#[derive(Debug)]
pub struct Causality<T> {
    queues: Vec<Queue<T>>,
    /// The latest pending change of a unique key value.
    latest: FxHashMap<u64, (Shard, u64)>,
    tables: FxHashMap<TableId, Pending>,
    ordered: FxHashMap<TableId, Order>,
    /// Those of them that wait for transactions in which there may be changes in any order.
    unordered: Vec<TableId>,
    /// Transactions so far.
    transactions: u64,
    next_seq: u64,
    /// Pending changes with [`Access::moves_to`]; while 0, the row's own hash needs no look-up.
    moves: usize,
    pending: usize,
    /// Sum of the weights of those that nobody writes.
    waiting: u64,
    next_shard: usize,
}

impl<T> Default for Causality<T> {
    fn default() -> Self {
        let queue = || Queue { waiting: VecDeque::new(), writing: None, completed: 0, serial_until: 0 };
        Self {
            queues: (0..SHARDS).map(|_| queue()).collect(),
            latest: FxHashMap::default(),
            tables: FxHashMap::default(),
            ordered: FxHashMap::default(),
            unordered: Vec::new(),
            transactions: 0,
            next_seq: 1,
            moves: 0,
            pending: 0,
            waiting: 0,
            next_shard: 0,
        }
    }
}

impl<T> Causality<T> {
    /// Adds a change behind all others.
    pub fn push(&mut self, access: Access, payload: T) {
        let seq = self.next_seq;
        self.next_seq += 1;
        let mut waits = Waits::default();
        let table = self.tables.entry(access.table).or_default();
        if access.barrier {
            for (index, &last) in table.last.iter().enumerate() {
                waits.add(Shard(u8::try_from(index).unwrap_or(0)), last);
            }
        } else if let Some((shard, barrier)) = table.barrier {
            waits.add(shard, barrier);
        }
        if let Some((shard, _)) = access.moves_to {
            waits.add(shard, table.last[shard.index()]);
        }
        // A change that moves a row to a queue counts in both: whoever writes down how far that queue is, has it.
        let own = access.moves_to.map_or(access.shard, |(shard, _)| shard);
        for &(from, to, earlier) in &table.moved {
            if to == access.shard || to == own {
                waits.add(from, earlier);
            }
        }
        if let Some((to, _)) = access.moves_to.filter(|(to, _)| *to != access.shard) {
            match table.moved.iter_mut().find(|(f, t, _)| (*f, *t) == (access.shard, to)) {
                Some((_, _, last)) => *last = seq,
                None => table.moved.push((access.shard, to, seq)),
            }
        }
        if access.barrier {
            table.barrier = Some((access.shard, seq));
        }
        table.last[access.shard.index()] = seq;
        let ordered = self.ordered.get(&access.table).is_some_and(|order| seq <= order.until);
        let previous = table.latest.replace((access.shard, seq)).filter(|_| ordered);
        table.count += 1;

        if self.moves > 0
            && let Some(&(shard, earlier)) = self.latest.get(&access.row)
        {
            waits.add(shard, earlier);
        }
        let Access { table, shard, moves_to, keys: mut values, barrier, bytes, weight, .. } = access;
        values.extend(moves_to.map(|(_, to)| to));
        for &value in &values {
            if let Some((shard, earlier)) = self.latest.insert(value, (shard, seq)) {
                waits.add(shard, earlier);
            }
        }
        let moves = moves_to.is_some();
        self.moves += usize::from(moves);
        self.pending += 1;
        self.waiting += u64::from(weight);
        // Order inside a queue needs no dependency.
        let mut waits = waits.0;
        waits.retain(|(other, _)| *other != shard);
        let tied = moves || !waits.is_empty() || !values.is_empty() || previous.is_some();
        let ties = tied.then(|| Box::new(Ties { waits, values, moves, previous }));
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let entry = Entry { seq, payload, table, weight, bytes, barrier, ties };
        self.queues[shard.index()].waiting.push_back(entry);
    }

    /// A change that another one waits for, if it is neither committed nor in the same transaction.
    fn unmet(&self, entry: &Entry<T>, taken: &Taken) -> Option<(Shard, u64)> {
        let ties = entry.ties.as_ref()?;
        let unmet = |&(shard, seq): &(Shard, u64)| {
            self.queues[shard.index()].completed < seq && taken.through[shard.index()] < seq
        };
        ties.waits.iter().copied().chain(ties.previous).find(unmet)
    }

    /// The earliest pending change.
    fn earliest(&self) -> Option<u64> {
        self.queues
            .iter()
            .filter_map(|q| q.writing.map(|(first, _)| first).or_else(|| q.waiting.front().map(|e| e.seq)))
            .min()
    }

    /// Takes a batch of a queue that is not being written: no further change once the sum of weights reaches
    /// `max_weight` or the sum of bytes `max_bytes`. It must be given back with [`Causality::complete`] or
    /// [`Causality::retry_serially`].
    pub fn take(&mut self, max_weight: u64, max_bytes: usize) -> Option<Batch<T>> {
        self.put_in_order();
        self.take_next(max_weight, max_bytes)
    }

    /// Takes batches of several queues for one transaction, with the limits of [`Causality::take`] for all of them. Empty
    /// when nothing may be written. They may depend on each other: the changes are to be applied in the order of
    /// `Entry::seq`, at least those of one table. A change that has to go by itself is alone. Each batch is given back as
    /// one of [`Causality::take`].
    pub fn take_together(&mut self, max_weight: u64, max_bytes: usize) -> Vec<Batch<T>> {
        self.put_in_order();
        let mut taken = Taken::default();
        let begin = self.next_shard;
        for index in (0..SHARDS).map(|offset| (begin + offset) % SHARDS) {
            let before = taken.weight;
            if !self.goes_alone(index) {
                self.fill(&mut taken, index, (max_weight, max_bytes));
            } else if taken.weight == 0
                && let Some(batch) = self.take_from(index, max_weight, max_bytes)
            {
                self.next_shard = index + 1;
                return vec![batch];
            }
            if taken.weight > before {
                self.next_shard = index + 1;
            }
        }
        self.transactions += 1;
        (0..SHARDS).filter_map(|index| self.drain(index, taken.counts[index], false)).collect()
    }

    /// Whether the next change of a queue has to go by itself.
    fn goes_alone(&self, index: usize) -> bool {
        let queue = &self.queues[index];
        queue.waiting.front().is_some_and(|front| front.barrier || front.seq <= queue.serial_until)
    }

    /// Adds what may be written of a queue, with the changes of other queues that it waits for.
    fn fill(&self, taken: &mut Taken, index: usize, (max_weight, max_bytes): (u64, usize)) {
        // Queues, and the change up to which each is wanted. A dependency is earlier than what waits for it, so that a
        // queue is never wanted for its own sake.
        let mut path = vec![(index, u64::MAX)];
        while let Some(&(index, until)) = path.last() {
            let queue = &self.queues[index];
            if queue.writing.is_some() || taken.weight >= max_weight || taken.bytes >= max_bytes {
                return;
            }
            let next = queue.waiting.get(taken.counts[index]);
            let Some(entry) = next.filter(|entry| entry.seq <= until) else {
                path.pop();
                continue;
            };
            if entry.barrier || entry.seq <= queue.serial_until || self.stops(entry) {
                return;
            }
            match self.unmet(entry, taken) {
                Some((shard, seq)) => path.push((shard.index(), seq)),
                None => taken.add(index, entry),
            }
        }
    }

    fn take_next(&mut self, max_weight: u64, max_bytes: usize) -> Option<Batch<T>> {
        let begin = self.next_shard;
        (0..SHARDS).map(|offset| (begin + offset) % SHARDS).find_map(|index| {
            let batch = self.take_from(index, max_weight, max_bytes)?;
            self.next_shard = index + 1;
            Some(batch)
        })
    }

    fn take_from(&mut self, index: usize, max_weight: u64, max_bytes: usize) -> Option<Batch<T>> {
        let queue = &self.queues[index];
        if queue.writing.is_some() {
            return None;
        }
        let front = queue.waiting.front()?;
        let serial = front.seq <= queue.serial_until;
        if serial && self.earliest() != Some(front.seq) {
            return None;
        }
        let mut taken = Taken::default();
        for entry in &queue.waiting {
            let alone = serial || entry.barrier;
            let full = alone || taken.bytes >= max_bytes || taken.weight >= max_weight;
            if (taken.counts[index] > 0 && full) || self.stops(entry) || self.unmet(entry, &taken).is_some() {
                break;
            }
            taken.add(index, entry);
            if alone {
                break;
            }
        }
        self.transactions += 1;
        self.drain(index, taken.counts[index], serial)
    }

    /// Takes the first changes of a queue.
    fn drain(&mut self, index: usize, count: usize, serial: bool) -> Option<Batch<T>> {
        let queue = &mut self.queues[index];
        let entries: Vec<_> = queue.waiting.drain(..count).collect();
        queue.writing = Some((entries.first()?.seq, self.transactions));
        let batch = Batch { shard: Shard::from_index(index)?, entries, serial, number: self.transactions };
        self.waiting -= batch.weight();
        Some(batch)
    }

    /// The transaction of a batch has committed.
    pub fn complete(&mut self, batch: &Batch<T>) {
        let Some(last) = batch.entries.last() else { return };
        let queue = &mut self.queues[batch.shard.index()];
        assert!(queue.writing.is_some() && queue.completed < last.seq, "a batch completes once (CA-1)");
        queue.completed = last.seq;
        queue.writing = None;
        self.pending -= batch.entries.len();
        for entries in batch.entries.chunk_by(|one, next| one.table == next.table) {
            self.settle(entries);
        }
    }

    /// Changes of one table are no longer pending.
    fn settle(&mut self, entries: &[Entry<T>]) {
        let Some(id) = entries.first().map(|entry| entry.table) else { return };
        for entry in entries {
            let Some(ties) = &entry.ties else { continue };
            for value in &ties.values {
                if self.latest.get(value).is_some_and(|(_, seq)| *seq == entry.seq) {
                    self.latest.remove(value);
                }
            }
            self.moves -= usize::from(ties.moves);
        }
        let Some(table) = self.tables.get_mut(&id) else { return };
        table.count -= entries.len();
        if table.barrier.is_some_and(|(_, seq)| entries.iter().any(|entry| entry.seq == seq)) {
            table.barrier = None;
        }
        if table.count == 0 {
            self.tables.remove(&id);
        }
    }

    /// A batch was rolled back because of a constraint. Its changes go again, one by one and each after every
    /// change that was pushed before it: then the order is exactly that of the upstream.
    pub fn retry_serially(&mut self, batch: Batch<T>) {
        let queue = &mut self.queues[batch.shard.index()];
        if let Some(last) = batch.entries.last() {
            queue.serial_until = queue.serial_until.max(last.seq);
        }
        self.give_back(batch);
    }

    fn give_back(&mut self, batch: Batch<T>) {
        self.waiting += batch.weight();
        let queue = &mut self.queues[batch.shard.index()];
        queue.writing = None;
        for entry in batch.entries.into_iter().rev() {
            queue.waiting.push_front(entry);
        }
    }

    /// Sum of the weights of the pending changes that nobody writes.
    #[must_use]
    pub const fn waiting(&self) -> u64 {
        self.waiting
    }

    /// Number of pending changes, those being written included.
    #[must_use]
    pub const fn pending(&self) -> usize {
        self.pending
    }
}

/// What a transaction has of each queue: its first changes.
#[derive(Default)]
struct Taken {
    counts: [usize; SHARDS],
    /// The last one of each queue.
    through: [u64; SHARDS],
    weight: u64,
    bytes: usize,
}

impl Taken {
    fn add<T>(&mut self, index: usize, entry: &Entry<T>) {
        self.counts[index] += 1;
        self.through[index] = entry.seq;
        self.weight += u64::from(entry.weight);
        self.bytes += entry.bytes as usize;
    }
}

/// The latest change to wait for, per queue.
#[derive(Default)]
struct Waits(Vec<(Shard, u64)>);

impl Waits {
    fn add(&mut self, shard: Shard, seq: u64) {
        if seq == 0 {
            return;
        }
        match self.0.iter_mut().find(|(s, _)| *s == shard) {
            Some((_, latest)) => *latest = (*latest).max(seq),
            None => self.0.push((shard, seq)),
        }
    }
}

#[cfg(test)]
mod tests;
