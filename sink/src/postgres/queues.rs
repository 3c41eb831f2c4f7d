//! Progress in one transaction: which changes of its batch are still to be applied, and how far its queues come.
//!
//! A change of a row's key belongs to two keys, and so to two queues, perhaps of two pieces; the transaction moves both.
//! The key that the row leaves and the key that it enters may have been different dispatchers' at an earlier time, and
//! then one half of the change may be done already: the other half is applied alone.

use std::sync::Arc;

use event::{KeyCodec, TableInfo};
use heartbeatpb::{DispatcherId, TableId};
use rustc_hash::FxHashMap;

use super::connection::Connection;
use super::failure::Failure;
use super::keys;
use super::pieces::{QueueProgress, Range};
use super::progress::{self, Advance, Join};
use super::route::Position;
use super::shared::Shared;
use super::worker::{Held, QueuedChange};
use crate::causality::Shard;

/// A change that is still to be applied.
pub(crate) enum Wanted<'b> {
    All(&'b QueuedChange),
    /// One that was made of it: its place among the halves.
    Half(usize),
    /// One of the table as a whole, with the keys that it still concerns.
    Table(&'b QueuedChange, Vec<Range>),
}

impl<'b> Wanted<'b> {
    /// The change, and what it clears.
    pub(crate) fn of(self, halves: &'b [QueuedChange]) -> (&'b QueuedChange, Vec<Range>) {
        match self {
            Wanted::All(change) => (change, Vec::new()),
            Wanted::Half(at) => (&halves[at], Vec::new()),
            Wanted::Table(change, ranges) => (change, ranges),
        }
    }
}

/// One queue of a dispatcher.
struct Queue {
    dispatcher: DispatcherId,
    table: TableId,
    shard: Shard,
    range: Range,
    /// As it is committed.
    from: QueueProgress,
    /// The last change that the transaction has come to.
    last: Position,
}

impl Queue {
    /// Whether a change of a key is still to be applied.
    fn wants(&self, at: Position, key: impl FnOnce() -> Result<Vec<u8>, Failure>) -> Result<bool, Failure> {
        let known = match &self.from {
            QueueProgress::One(known) => *known,
            QueueProgress::Many(_) => self.from.at(&key()?),
        };
        Ok(at > known.max(self.last))
    }

    fn to(&self) -> QueueProgress {
        let mut to = self.from.clone();
        to.advance(self.last);
        to
    }
}

/// The queues that a transaction moves.
#[derive(Default)]
pub(crate) struct Queues {
    found: Vec<Queue>,
    /// Where each of them is.
    places: FxHashMap<(DispatcherId, TableId, Shard), usize>,
}

fn key(codec: Option<&KeyCodec>, change: &QueuedChange, after: bool) -> Result<Vec<u8>, Failure> {
    let mut key = Vec::new();
    let found = codec.and_then(|codec| change.key(codec, after, &mut key).ok());
    found.map(|()| key).ok_or_else(|| keys::indivisible(change.table()))
}

impl Queues {
    fn place(&self, held: &Held, shard: Shard) -> Option<usize> {
        self.places.get(&(held.dispatcher, held.span.table, shard)).copied()
    }

    /// Makes sure that the progress of a queue is known; answers its place.
    pub(crate) async fn find(
        &mut self,
        shared: &Shared,
        connection: &Connection,
        stale: bool,
        held: &Held,
        shard: Shard,
    ) -> Result<usize, Failure> {
        if let Some(place) = self.place(held, shard) {
            return Ok(place);
        }
        let (dispatcher, table) = (held.dispatcher, held.span.table);
        let range = Range::of(&held.span);
        let known = shared.progress.lock().get(&(dispatcher, table)).map(|known| known.queue(shard).clone());
        let from = match known.filter(|_| !stale) {
            Some(known) => known,
            None => {
                let read = progress::load(connection.client(), shared, table, &range).await?;
                let from = read.queue(shard).clone();
                shared.learn(dispatcher, table, read);
                from
            }
        };
        self.found.push(Queue { dispatcher, table, shard, range, from, last: Position::START });
        self.places.insert((dispatcher, table, shard), self.found.len() - 1);
        Ok(self.found.len() - 1)
    }

    /// Whether the keys of changes have to be looked at.
    pub(crate) fn divided(&self) -> bool {
        self.found.iter().any(|queue| matches!(queue.from, QueueProgress::Many(_)))
    }

    /// What is still to be applied of the next change of a queue. Changes of one table come in their order, whatever their
    /// queues. `codec` is that of the table, needed where queues are [`Queues::divided`].
    pub(crate) fn wanted<'b>(
        &mut self,
        own: usize,
        change: &'b QueuedChange,
        codec: Option<&KeyCodec>,
        halves: &mut Vec<QueuedChange>,
    ) -> Result<Option<Wanted<'b>>, Failure> {
        let queue = &self.found[own];
        if change.is_for_table() {
            let ranges = queue.from.before(&queue.range, change.at);
            let wanted = change.at > queue.last && !ranges.is_empty();
            self.pass(own, change.at);
            return Ok(wanted.then_some(Wanted::Table(change, ranges)));
        }
        let goes = queue.wants(change.at, || key(codec, change, false))?;
        let Some(to) = change.moves_to.and_then(|hash| self.place(&change.batch, Shard::of(hash))) else {
            self.pass(own, change.at);
            return Ok(goes.then_some(Wanted::All(change)));
        };
        let comes = self.found[to].wants(change.at, || key(codec, change, true))?;
        let wanted = match (goes, comes) {
            (true, true) => Some(Wanted::All(change)),
            (false, false) => None,
            (false, true) if !change.brings_all() => {
                return Err(Failure::Incomplete(Arc::clone(change.table())));
            }
            (_, comes) => {
                halves.push(change.half(comes));
                Some(Wanted::Half(halves.len() - 1))
            }
        };
        self.pass(own, change.at);
        self.pass(to, change.at);
        Ok(wanted)
    }

    fn pass(&mut self, queue: usize, at: Position) {
        let last = &mut self.found[queue].last;
        *last = at.max(*last);
    }

    /// What moves the progress.
    pub(crate) fn steps(&self) -> (Vec<Advance>, Vec<Join>) {
        let (mut steps, mut joins) = (Vec::new(), Vec::new());
        for queue in &self.found {
            let (table, shard, to) = (queue.table, queue.shard, queue.to());
            if queue.from == to {
                continue;
            }
            let joined = matches!((&queue.from, &to), (QueueProgress::Many(_), QueueProgress::One(_)));
            for piece in queue.from.pieces(&queue.range) {
                let to = to.at(&piece.range.start);
                if joined || to != piece.at {
                    steps.push(Advance { table, shard, range: piece.range, from: piece.at, to });
                }
            }
            if joined {
                joins.push(Join { table, shard, range: queue.range.clone() });
            }
        }
        (steps, joins)
    }

    /// The transaction has committed.
    pub(crate) fn learn(self, shared: &Shared, passed: bool) {
        let mut known = shared.progress.lock();
        for queue in self.found {
            let owner = (queue.dispatcher, queue.table);
            if passed {
                known.remove(&owner);
            } else if let Some(progress) = known.get_mut(&owner) {
                progress.set(queue.shard, queue.to());
            }
        }
    }
}

/// The changes of one shape of a table, in order.
pub(crate) struct Table<'b> {
    pub(crate) info: &'b Arc<TableInfo>,
    pub(crate) codec: Option<KeyCodec>,
    pub(crate) wanted: Vec<Wanted<'b>>,
}

/// The changes of a transaction by table.
pub(crate) struct Tables<'b> {
    pub(crate) found: Vec<Table<'b>>,
    /// The last shape of each table.
    last: FxHashMap<TableId, usize>,
    /// Keys of rows are looked at.
    divided: bool,
}

impl<'b> Tables<'b> {
    /// None yet. Whether the keys of their rows are looked at.
    pub(crate) fn new(divided: bool) -> Self {
        Self { found: Vec::new(), last: FxHashMap::default(), divided }
    }

    /// Where the next change of a table belongs.
    pub(crate) fn of(&mut self, info: &'b Arc<TableInfo>) -> &mut Table<'b> {
        let same = |at: &usize| Arc::ptr_eq(self.found[*at].info, info) || **self.found[*at].info == **info;
        let at = self.last.get(&info.id).copied().filter(same).unwrap_or_else(|| {
            let codec = self.divided.then(|| KeyCodec::new(info)).flatten();
            self.found.push(Table { info, codec, wanted: Vec::new() });
            self.last.insert(info.id, self.found.len() - 1);
            self.found.len() - 1
        });
        &mut self.found[at]
    }
}
