//! Who reads a changefeed's log here, and how far each stream is.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use heartbeatpb::{DispatcherId, NodeId, TableId, TableSpan, Ts, WallTime};
use rustc_hash::FxHashMap;
use tokio::time::Instant;

use super::pieces::Pieces;
use super::range::{RangeFilter, cover};
use super::reads::Loaded;
use crate::event_store::{HeldTables, Position, Store};
use crate::metrics::FeedMetrics;

/// One registered dispatcher.
pub(super) struct Stream {
    pub(super) node: NodeId,
    pub(super) span: TableSpan,
    pub(super) epoch: u64,
    pub(super) seq: u64,
    pub(super) position: Position,
    /// Picks the rows of a part of a table; `None`: all rows are wanted.
    pub(super) filter: Option<Box<RangeFilter>>,
    /// Place after the last rows that were sent in this epoch.
    pub(super) sent: Position,
    /// The rows between these two places are not the stream's.
    skipped: (Position, Position),
    /// Largest DDL that was sent.
    pub(super) ddl_sent: Ts,
    /// A schema change that was sent and that the dispatcher has not passed. Nothing behind it is sent: at a barrier
    /// that would take room which other dispatchers need to come to it.
    pub(super) at_ddl: Option<Ts>,
    /// There are rows, and room is what they need.
    pub(super) wants_room: bool,
    /// Number of the read from disk that brings the next rows.
    pub(super) reading: Option<u64>,
    /// What the last read brought.
    pub(super) loaded: Option<Loaded>,
    /// Rows that are being sent piece by piece.
    pub(super) pieces: Option<Pieces>,
    pub(super) resolved_sent: Ts,
    /// Checkpoint and durable position that its receiver told in this registration.
    pub(super) progress: Option<(Ts, Position)>,
    pub(super) ready_sent: Instant,
    /// When its receiver was heard last.
    pub(super) heard: Instant,
    /// Where the current epoch began.
    pub(super) start_ts: Ts,
    pub(super) queued: bool,
    pub(super) failed: bool,
}

impl Stream {
    pub(super) fn new(node: NodeId, span: TableSpan, start: Ts) -> Self {
        let filter = (!span.is_whole()).then(Box::default);
        Self {
            node,
            span,
            epoch: 0,
            seq: 0,
            position: Position::after(start),
            filter,
            sent: Position::default(),
            skipped: Default::default(),
            ddl_sent: start,
            at_ddl: None,
            wants_room: false,
            reading: None,
            loaded: None,
            pieces: None,
            resolved_sent: Ts::ZERO,
            progress: None,
            ready_sent: Instant::now(),
            heard: Instant::now(),
            start_ts: start,
            queued: false,
            failed: false,
        }
    }

    /// Begins (again) after `start_ts`, and inside an initial copy after `position`.
    pub(super) fn begin(&mut self, epoch: u64, start_ts: Ts, position: Position) {
        self.epoch = epoch;
        self.seq = 1;
        self.start_ts = start_ts;
        // What was skipped may be gone from the store.
        let (from, to) = self.skipped;
        self.position = if position >= from { position.max(to) } else { position };
        self.sent = Position::default();
        self.ddl_sent = start_ts;
        self.at_ddl = None;
        self.wants_room = false;
        self.reading = None;
        self.loaded = None;
        self.pieces = None;
        self.resolved_sent = Ts::ZERO;
        self.failed = false;
    }

    /// Hears which of its rows are durable; answers the place up to which the store is not needed. In an initial copy
    /// a part of a table may have no row for long, and no position is resolved: it must not keep what it has skipped.
    pub(super) fn passed(&mut self, durable: Position) -> Position {
        let skips = self.filter.is_some()
            && durable >= self.sent
            && durable < self.position
            && durable.commit_ts == self.position.commit_ts;
        if !skips {
            return durable;
        }
        self.skipped = (durable, self.position);
        self.position
    }

    /// Hears how far the dispatcher is; says whether the stream goes on behind a schema change.
    pub(super) fn pass_ddl(&mut self, checkpoint: Ts) -> bool {
        let Some(at) = self.at_ddl else { return false };
        if checkpoint >= at {
            self.at_ddl = None;
            return true;
        }
        // It may not know that it has everything at the change: then it never comes to its end. Say it again.
        self.resolved_sent = self.resolved_sent.min(at.before());
        false
    }

    /// Hears how far the dispatcher of a table is that is held at a place. Nothing comes behind that place by which the loss of
    /// the last message would be noticed, so it is said again until the dispatcher is there.
    pub(super) fn repeat_held(&mut self, at: Ts, checkpoint: Ts) {
        if checkpoint < at {
            self.resolved_sent = self.resolved_sent.min(at.before());
        }
    }

    /// Rows up to `until` are nobody's business, and those behind it come later.
    pub(super) fn leave_out(&mut self, until: Ts) {
        self.loaded = None;
        self.position = self.position.max(Position::after(until));
    }

    /// The position to tell when everything at or before `resolved` was queued; `None` when there is nothing new.
    pub(super) fn resolved_to_send(&self, resolved: Ts) -> Option<Ts> {
        let ts = self.at_ddl.map_or(resolved, |at| at.min(resolved));
        let all_sent = !self.queued && !self.failed && self.reading.is_none();
        (self.epoch > 0 && all_sent && self.resolved_sent < ts).then_some(ts)
    }
}

/// One changefeed whose log is read here, and who wants it.
pub(super) struct Feed {
    pub(super) store: Arc<Store>,
    pub(super) streams: BTreeMap<DispatcherId, Stream>,
    pub(super) by_table: FxHashMap<TableId, Vec<DispatcherId>>,
    /// Streams that may have rows to send.
    pub(super) ready: VecDeque<DispatcherId>,
    /// Resolved ts as of the last look at the store: every row at or before it was queued or sent.
    pub(super) resolved: Ts,
    pub(super) resolved_time: WallTime,
    pub(super) resolved_at: Option<Instant>,
    /// Where tables are held, as of the same look.
    pub(super) held: HeldTables,
    pub(super) metrics: FeedMetrics,
}

impl Feed {
    pub(super) fn new(store: Arc<Store>) -> Self {
        Self {
            metrics: FeedMetrics::new(store.changefeed()),
            store,
            streams: BTreeMap::new(),
            by_table: FxHashMap::default(),
            ready: VecDeque::new(),
            resolved: Ts::ZERO,
            resolved_time: WallTime::default(),
            resolved_at: None,
            held: HeldTables::default(),
        }
    }

    /// The resolved ts of a table: of one that is held, no later than its hold.
    pub(super) fn resolved_of(&self, table: TableId) -> Ts {
        self.held.at(table).map_or(self.resolved, |at| self.resolved.min(at))
    }

    /// Hears how far a reader of a table is.
    pub(super) fn on_progress(&self, table: TableId, here: &NodeId) {
        if self.held.at(table).is_some()
            && let Some((checkpoint, _)) = self.slowest(table)
        {
            self.store.on_held_checkpoint(table, checkpoint);
        }
        self.trim(table, here);
    }

    pub(super) fn add(&mut self, id: DispatcherId, stream: Stream) {
        self.store.owners().add(id, &stream.span, &stream.node);
        self.by_table.entry(stream.span.table).or_default().push(id);
        self.streams.insert(id, stream);
    }

    pub(super) fn remove(&mut self, id: DispatcherId) {
        let Some(stream) = self.streams.remove(&id) else { return };
        self.store.owners().remove(stream.span.table, id);
        if let Some(ids) = self.by_table.get_mut(&stream.span.table) {
            ids.retain(|other| *other != id);
            if ids.is_empty() {
                self.by_table.remove(&stream.span.table);
            }
        }
    }

    /// Checkpoint and durable position of the slowest reader of a table; `None` as long as one has told nothing, or
    /// a part of the table has no reader: whoever comes for it begins at its own checkpoint.
    pub(super) fn slowest(&self, table: TableId) -> Option<(Ts, Position)> {
        let ids = self.by_table.get(&table)?;
        let readers = || ids.iter().filter_map(|id| self.streams.get(id));
        if !cover(readers().map(|stream| &stream.span)) {
            return None;
        }
        let told = readers().map(|stream| stream.progress);
        told.reduce(|one, other| one.zip(other).map(|(a, b)| (a.0.min(b.0), a.1.min(b.1)))).flatten()
    }

    /// Drops the rows of a table that nobody needs again.
    ///
    /// Before the maintainer has taken over that is nobody's: it may yet let any of its readers, also those of its own node,
    /// begin anew, where it began itself. Afterwards a reader on another node may be lost together with what it has told
    /// us: the maintainer knows less, and its successor begins anywhere from the floor on. One on this node is lost
    /// together with the store. What a running copy has passed is dropped: a copy that is disturbed begins again as a
    /// whole.
    pub(super) fn trim(&self, table: TableId, here: &NodeId) {
        let Some(floor) = self.store.floor() else { return };
        let Some((checkpoint, durable)) = self.slowest(table) else { return };
        let mut readers =
            self.by_table.get(&table).into_iter().flatten().filter_map(|id| self.streams.get(id));
        if readers.all(|stream| stream.node == *here) {
            return self.store.trim(table, checkpoint, Some(durable));
        }
        let copied = Some(durable).filter(|durable| *durable > Position::after(checkpoint));
        self.store.trim(table, checkpoint.min(floor), copied);
    }

    pub(super) fn queue(&mut self, id: DispatcherId) {
        if let Some(stream) = self.streams.get_mut(&id).filter(|stream| !stream.queued) {
            stream.queued = true;
            self.ready.push_back(id);
        }
    }
}
