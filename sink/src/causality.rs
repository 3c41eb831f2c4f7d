//! Decides which row changes may be written at the same time: a pure core without clock or connection.
//!
//! Row changes are spread over [`SHARDS`] queues by the key of their row. A queue is first in, first out, and
//! at most one batch of it is being written. What crosses queues is expressed as a dependency on an earlier
//! change: it is met once the transaction of that change has committed. Dependencies only point to changes
//! that were pushed earlier, so the earliest pending change is always free to go and nothing can deadlock.
//!
//! A change that gives a row another key belongs to the queue of the key before, and is ordered in that of the key after
//! as well: it waits for all changes of its table there, and later ones there wait for it.
//!
//! - **CA-1** Changes that share a unique key value, or that lie on different sides of a barrier of their
//!   table, complete in the order in which they were pushed.
//! - **CA-2** While changes are pending and none is being written, [`Causality::take`] returns a batch.
//!
//! Batches that are being written at the same time do not depend on each other, so several of them may also be one
//! transaction ([`Causality::take_together`]).

use std::collections::VecDeque;

use heartbeatpb::TableId;
use rustc_hash::FxHashMap;

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
    /// Hashes of the values of the table's other unique keys, before and after.
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
#[derive(Debug)]
struct Ties {
    /// The changes that it waits for.
    waits: Vec<(Shard, u64)>,
    /// The unique values under which later changes find it: its new key, if it has one, and those of the other keys.
    values: Vec<u64>,
    /// The row gets another key.
    moves: bool,
}

impl<T> Entry<T> {
    fn ties(&self) -> (&[(Shard, u64)], &[u64], bool) {
        self.ties.as_ref().map_or((&[], &[], false), |ties| (&ties.waits, &ties.values, ties.moves))
    }
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
}

impl<T> Batch<T> {
    /// Sum of the sizes of its changes, in bytes.
    fn bytes(&self) -> usize {
        self.entries.iter().map(|entry| entry.bytes as usize).sum()
    }

    /// Sum of the weights of its changes.
    #[must_use]
    pub fn weight(&self) -> u64 {
        self.entries.iter().map(|entry| u64::from(entry.weight)).sum()
    }
}

#[derive(Debug)]
struct Queue<T> {
    waiting: VecDeque<Entry<T>>,
    /// First change of the batch being written.
    writing: Option<u64>,
    /// Every change of this queue up to here has completed.
    completed: u64,
    /// Changes up to here go one by one, each after every earlier change of all queues.
    serial_until: u64,
}

#[derive(Debug, Default)]
struct Pending {
    count: usize,
    last: [u64; SHARDS],
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
        let tied = moves || !waits.is_empty() || !values.is_empty();
        let ties = tied.then(|| Box::new(Ties { waits, values, moves }));
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let entry = Entry { seq, payload, table, weight, bytes, barrier, ties };
        self.queues[shard.index()].waiting.push_back(entry);
    }

    /// Whether a change may be written now.
    fn ready(&self, entry: &Entry<T>) -> bool {
        entry.ties().0.iter().all(|(shard, seq)| self.queues[shard.index()].completed >= *seq)
    }

    /// The earliest pending change.
    fn earliest(&self) -> Option<u64> {
        self.queues.iter().filter_map(|q| q.writing.or_else(|| q.waiting.front().map(|e| e.seq))).min()
    }

    /// Takes a batch of a queue that is not being written: no further change once the sum of weights reaches
    /// `max_weight` or the sum of bytes `max_bytes`. It must be given back with [`Causality::complete`] or
    /// [`Causality::retry_serially`].
    pub fn take(&mut self, max_weight: u64, max_bytes: usize) -> Option<Batch<T>> {
        self.take_next(max_weight, max_bytes, false)
    }

    /// Takes batches of several queues, for one transaction with room for all of them. Empty when nothing may be
    /// written. A change that has to go by itself is alone. Each batch is given back as one of [`Causality::take`].
    pub fn take_together(&mut self, max_weight: u64, max_bytes: usize) -> Vec<Batch<T>> {
        let mut batches: Vec<Batch<T>> = Vec::new();
        let (mut weight, mut bytes) = (0, 0);
        while weight < max_weight && bytes < max_bytes {
            let together = !batches.is_empty();
            let Some(batch) = self.take_next(max_weight - weight, max_bytes - bytes, together) else { break };
            weight += batch.weight();
            bytes += batch.bytes();
            let alone = batch.serial || batch.entries.iter().any(|entry| entry.barrier);
            batches.push(batch);
            if alone {
                break;
            }
        }
        batches
    }

    fn take_next(&mut self, max_weight: u64, max_bytes: usize, together: bool) -> Option<Batch<T>> {
        for offset in 0..SHARDS {
            let index = (self.next_shard + offset) % SHARDS;
            if let Some(batch) = self.take_from(index, max_weight, max_bytes, together) {
                self.next_shard = index + 1;
                return Some(batch);
            }
        }
        None
    }

    fn take_from(
        &mut self,
        index: usize,
        max_weight: u64,
        max_bytes: usize,
        together: bool,
    ) -> Option<Batch<T>> {
        let queue = &self.queues[index];
        if queue.writing.is_some() {
            return None;
        }
        let front = queue.waiting.front()?;
        let serial = front.seq <= queue.serial_until;
        if together && (serial || front.barrier) {
            return None;
        }
        if serial && self.earliest() != Some(front.seq) {
            return None;
        }
        let mut bytes = 0;
        let mut weight = 0;
        let mut count = 0;
        for entry in &queue.waiting {
            let alone = serial || entry.barrier;
            let full = alone || bytes >= max_bytes || weight >= max_weight;
            if (count > 0 && full) || !self.ready(entry) {
                break;
            }
            bytes += entry.bytes as usize;
            weight += u64::from(entry.weight);
            count += 1;
            if alone {
                break;
            }
        }
        let queue = &mut self.queues[index];
        let entries: Vec<_> = queue.waiting.drain(..count).collect();
        queue.writing = Some(entries.first()?.seq);
        let batch = Batch { shard: Shard::from_index(index)?, entries, serial };
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
            let (_, values, moves) = entry.ties();
            for value in values {
                if self.latest.get(value).is_some_and(|(_, seq)| *seq == entry.seq) {
                    self.latest.remove(value);
                }
            }
            self.moves -= usize::from(moves);
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
        self.waiting += batch.weight();
        let queue = &mut self.queues[batch.shard.index()];
        queue.writing = None;
        if let Some(last) = batch.entries.last() {
            queue.serial_until = queue.serial_until.max(last.seq);
        }
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
