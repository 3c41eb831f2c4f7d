//! The event store of one changefeed: rows in commit order per table, disposable, bounded.
//!
//! One [`StoreWriter`] appends; scans read slices of what was published. Rows of a table are written into the
//! table's open buffer, which spans many small transactions, and become an immutable chunk when they are
//! published; a chunk is what a scan returns, without copying. The newest chunks stay in memory; beyond the
//! memory budget the oldest ones move to segment files. A file goes as a whole when everything in it is
//! behind the checkpoints. When the disk quota is used up too, the writer waits: nothing is dropped.
//!
//! - **ES-1** Everything at or before the resolved ts is visible; of a later transaction nothing is, an initial
//!   copy apart, whose rows are visible as they come.
//! - **ES-2** Rows of a table are visible in commit order, and `(commit ts, row number)` is the same in a replay.
//! - **ES-3** A scan below what was trimmed is an error, never a gap.

mod copy;
mod hold;
pub mod metrics;
mod owners;
mod segment;
mod spool;
mod state;
mod writer;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use event::{RowBatch, TableInfo};
use heartbeatpb::{ChangefeedId, TableId, Ts, WallTime};
use parking_lot::Mutex;
use tokio::sync::Notify;

pub use copy::CopyWriter;
pub use hold::{Gate, Held};
pub(crate) use hold::{HeldTables, Next};
pub use writer::StoreWriter;

use crate::Error;
use owners::Owners;
pub(crate) use segment::remove_left_overs;
use segment::{Extent, Pieces, StoreDir};
pub(crate) use spool::{Spool, records};
use state::{ChunkData, Group, Place, State};

/// Largest chunk: what one scan returns and one message carries.
pub(crate) const CHUNK_BYTES: usize = 256 << 10;

/// Memory that the index of chunks on disk may always take; beyond it, as much as the chunks in memory.
const MIN_INDEX: usize = 1 << 20;

/// Limits of one changefeed's store.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StoreConfig {
    /// Directory below which the store makes one of its own for its files. What earlier stores left there is removed
    /// when it opens; one that is still open keeps its files.
    pub dir: PathBuf,
    /// Bytes of chunks kept in memory. What must be known about chunks on disk may take as much again.
    pub memory_bytes: usize,
    /// Bytes of segment files.
    pub disk_bytes: u64,
}

/// A place in a table's rows: everything before it was sent.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Position {
    /// Transactions with a smaller commit ts were sent completely.
    pub commit_ts: Ts,
    /// Rows of the transaction at `commit_ts` that were sent; `u64::MAX` when all were.
    pub rows: u64,
}

impl Position {
    /// Everything at or before `ts` was sent.
    #[must_use]
    pub const fn after(ts: Ts) -> Self {
        Self { commit_ts: ts, rows: u64::MAX }
    }

    /// The place behind a transaction's share of a batch.
    pub(crate) const fn behind(mark: &event::TxnMark) -> Self {
        Self { commit_ts: mark.commit_ts, rows: mark.first_row + mark.rows as u64 }
    }
}

/// What a scan found.
#[derive(Debug)]
pub enum Scan {
    /// Rows, and the place after them.
    Rows(RowBatch, Position),
    /// The next rows are on disk: read them with [`Store::load`], without holding up other work.
    OnDisk(DiskChunk),
    /// Nothing more is visible.
    End,
}

/// A chunk in a segment file.
#[derive(Clone)]
pub struct DiskChunk {
    path: Arc<PathBuf>,
    extent: Extent,
    table: Arc<TableInfo>,
    /// `None`: they are stored with the rows.
    marks: Option<Arc<[event::TxnMark]>>,
    from: Position,
}

impl DiskChunk {
    /// Bytes that it takes on disk.
    pub(crate) fn bytes(&self) -> usize {
        self.extent.len
    }
}

impl std::fmt::Debug for DiskChunk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DiskChunk")
            .field("path", &self.path)
            .field("from", &self.from)
            .finish_non_exhaustive()
    }
}

/// Sizes, for metrics and diagnosis.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct StoreStats {
    /// Bytes in memory, those of the open transaction among them.
    pub memory_bytes: usize,
    /// Bytes in segment files.
    pub disk_bytes: u64,
    /// Those of them that belong to transactions that the upstream has sent and not ended.
    pub unfinished_bytes: u64,
    /// Tables known.
    pub tables: usize,
    /// Newest resolved ts.
    pub resolved: Ts,
}

/// The readable side of a store. Shared.
pub struct Store {
    changefeed: ChangefeedId,
    config: StoreConfig,
    dir: StoreDir,
    metrics: metrics::StoreMetrics,
    state: Mutex<State>,
    /// Room came back: for the writer.
    room: Notify,
    /// Something became visible: for the event service.
    changed: Arc<Notify>,
    /// Everything of a held table is durable, or the store was closed.
    told: Notify,
    /// See [`Store::floor`]; 0 before anything was said.
    floor: AtomicU64,
    owners: Owners,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("changefeed", &self.changefeed).finish_non_exhaustive()
    }
}

impl Store {
    /// Opens an empty store at `start_ts`. `changed` is notified whenever
    /// something becomes visible.
    ///
    /// # Errors
    /// When the directory cannot be emptied or made.
    pub fn open(
        changefeed: ChangefeedId,
        config: StoreConfig,
        start_ts: Ts,
        changed: Arc<Notify>,
    ) -> Result<(Arc<Self>, StoreWriter), Error> {
        let dir = StoreDir::open(&config.dir)?;
        let state = Mutex::new(State::new(start_ts));
        let metrics = metrics::StoreMetrics::new();
        let (room, told, floor) = (Notify::new(), Notify::new(), AtomicU64::new(Ts::ZERO.0));
        let owners = Owners::default();
        let store =
            Arc::new(Self { changefeed, config, dir, metrics, state, room, changed, told, floor, owners });
        let writer = StoreWriter::new(Arc::clone(&store));
        Ok((store, writer))
    }

    /// The changefeed.
    #[must_use]
    pub fn changefeed(&self) -> &ChangefeedId {
        &self.changefeed
    }

    /// Who has which span of its tables.
    pub(crate) fn owners(&self) -> &Owners {
        &self.owners
    }

    /// The changefeed's maintainer has taken over, and lets nobody begin below `floor`.
    pub fn raise_floor(&self, floor: Ts) {
        self.floor.fetch_max(floor.0, Ordering::Relaxed);
    }

    /// Below it nobody begins to read any more. `None` before the changefeed's maintainer has taken over: those who read
    /// then may be told to begin anew where the store begins.
    #[must_use]
    pub fn floor(&self) -> Option<Ts> {
        Some(Ts(self.floor.load(Ordering::Relaxed))).filter(|floor| *floor > Ts::ZERO)
    }

    /// Newest resolved ts and its wall time.
    #[must_use]
    pub fn resolved(&self) -> (Ts, WallTime) {
        let state = self.state.lock();
        (state.resolved, state.resolved_time)
    }

    /// Wall time of the last commit at or before `ts`, as far as the store remembers.
    #[must_use]
    pub fn time_of(&self, ts: Ts) -> Option<WallTime> {
        self.state.lock().time_of(ts)
    }

    /// Shape of a table at `ts`: the newest one that is valid there. `None` where nobody knows: the table was not
    /// told yet, or the log has not come to `ts`, so that a schema change may be missing.
    #[must_use]
    pub fn table_at(&self, table: TableId, ts: Ts) -> Option<Arc<TableInfo>> {
        let state = self.state.lock();
        if ts > state.resolved { None } else { state.table_at(table, ts) }
    }

    /// Tables with newly visible rows since the last call, and the resolved ts at the same moment.
    #[must_use]
    pub fn take_dirty(&self) -> (Vec<TableId>, Ts, WallTime) {
        let (dirty, resolved, time, _) = self.take_news();
        (dirty, resolved, time)
    }

    /// The same, and where tables are held at that moment: one that is held no more is among the others of the same call.
    pub(crate) fn take_news(&self) -> (Vec<TableId>, Ts, WallTime, HeldTables) {
        let mut state = self.state.lock();
        (state.take_dirty(), state.resolved, state.resolved_time, state.held_tables())
    }

    /// DDL events for a table (or the table trigger) in `(after, resolved]`, in order.
    #[must_use]
    pub fn ddls(&self, table: TableId, after: Ts) -> Vec<Arc<event::DdlEvent>> {
        self.state.lock().ddls(table, after)
    }

    /// The next visible rows of `table` after `from`.
    ///
    /// # Errors
    /// When rows after `from` were trimmed already.
    pub fn scan(&self, table: TableId, from: Position) -> Result<Scan, Error> {
        self.state.lock().scan(table, from)
    }

    /// The next visible rows of `table` after `from` and the first schema change after `ddls_after`, as of one
    /// moment: whatever is published later comes after both. Of a held table nothing behind its hold, rows on disk apart.
    pub(crate) fn next(&self, table: TableId, from: Position, ddls_after: Ts) -> Result<Next, Error> {
        let mut state = self.state.lock();
        state.want(table);
        state.check_ddls(table, ddls_after)?;
        let ddl = state.first_ddl(table, ddls_after);
        let rows = if table == TableId::DDL { Scan::End } else { state.scan(table, from)? };
        Ok(state.restrict(table, rows, ddl))
    }

    /// Whether the store was closed: its files are gone.
    pub(crate) fn is_closed(&self) -> bool {
        self.state.lock().closed
    }

    /// Reads a chunk from its file. Blocks on the disk: call it where that is allowed.
    ///
    /// # Errors
    /// When the file cannot be read or does not hold what was written: then the changefeed starts again from its
    /// checkpoint with an empty store.
    pub fn load(chunk: &DiskChunk) -> Result<(RowBatch, Position), Error> {
        let (stored, rows) = segment::read(&chunk.path, chunk.extent)?;
        let marks = chunk.marks.as_ref().map_or(stored, |marks| marks.to_vec());
        let whole = RowBatch::new(Arc::clone(&chunk.table), marks, rows)?;
        state::slice(&whole, chunk.from).ok_or(Error::OutOfRange { from: chunk.from.commit_ts, to: Ts::MAX })
    }

    /// Drops what a table's only reader does not need any more: everything at or before `checkpoint`, and of a
    /// running copy the rows before `copied`.
    pub fn trim(&self, table: TableId, checkpoint: Ts, copied: Option<Position>) {
        let freed = self.state.lock().trim(table, checkpoint, copied);
        if freed.bytes > 0 {
            self.metrics.trimmed(freed.files.len());
            segment::remove(&freed.files);
            self.room.notify_waiters();
        }
    }

    /// Sizes.
    #[must_use]
    pub fn stats(&self) -> StoreStats {
        let state = self.state.lock();
        StoreStats {
            memory_bytes: state.memory_bytes + state.held_bytes,
            disk_bytes: state.disk_bytes,
            unfinished_bytes: state.spooled_bytes,
            tables: state.tables.len(),
            resolved: state.resolved,
        }
    }

    /// Share of the disk that is used: at 1 the writer waits.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a share for people")]
    pub fn disk_ratio(&self) -> f64 {
        self.state.lock().disk_bytes as f64 / self.config.disk_bytes.max(1) as f64
    }

    /// Makes waiting writers fail: the changefeed stops.
    pub fn close(&self) {
        self.state.lock().closed = true;
        self.room.notify_waiters();
        self.told.notify_waiters();
        self.dir.discard();
    }

    /// Whether memory and index are within their limits.
    fn has_room(&self, state: &State) -> bool {
        // What the writer itself holds cannot be waited for; it takes up to half of the memory from the chunks.
        let limit = self.config.memory_bytes;
        let limit = limit - state.held_bytes.min(limit / 2);
        state.memory_bytes <= limit && state.index_bytes <= self.index_limit()
    }

    fn index_limit(&self) -> usize {
        self.config.memory_bytes.max(MIN_INDEX)
    }

    /// Waits until memory and disk are within their limits, moving the oldest chunks to disk.
    async fn wait_for_room(&self) -> Result<(), Error> {
        loop {
            let waiting = self.room.notified();
            tokio::pin!(waiting);
            waiting.as_mut().enable();
            let candidates = {
                let mut state = self.state.lock();
                if state.closed {
                    return Err(Error::Closed { what: "the event store" });
                }
                if self.has_room(&state) {
                    return Ok(());
                }
                if state.disk_bytes < self.config.disk_bytes && state.index_bytes <= self.index_limit() {
                    state.oldest_in_memory(self.config.memory_bytes / 2)
                } else {
                    Vec::new()
                }
            };
            if candidates.is_empty() {
                waiting.await;
            } else {
                self.spill(candidates).await?;
            }
        }
    }

    async fn spill(&self, groups: Vec<Group>) -> Result<(), Error> {
        let (keys, chunks): (Vec<_>, Vec<_>) =
            groups.into_iter().map(|group| (group.key(), group.pieces)).unzip();
        let (id, path, extents) = self.write_file(chunks).await?;
        let moved: Vec<_> =
            keys.into_iter().zip(extents).map(|((table, range), extent)| (table, range, extent)).collect();
        let unused = self.state.lock().moved_to_disk(id, &path, &moved);
        if unused {
            segment::remove(&[path]);
        }
        // Another writer may wait for the memory that these chunks gave back.
        self.room.notify_waiters();
        Ok(())
    }

    /// Writes chunks that are not visible yet to a new segment file; answers their places, in order.
    async fn write_segment(&self, chunks: Vec<Bytes>) -> Result<Vec<ChunkData>, Error> {
        if chunks.is_empty() {
            return Ok(Vec::new());
        }
        let pieces = chunks.into_iter().map(|rows| Pieces { marks: Vec::new(), rows: vec![rows] }).collect();
        let (segment, path, extents) = self.write_file(pieces).await?;
        let bytes = extents.iter().map(|extent| extent.len as u64).sum();
        self.state.lock().add_segment(segment, &path, extents.len(), bytes);
        let places = extents.into_iter().map(|extent| Place { segment, path: Arc::clone(&path), extent });
        Ok(places.map(ChunkData::Disk).collect())
    }

    async fn write_file(&self, chunks: Vec<Pieces>) -> Result<(u64, Arc<PathBuf>, Vec<Extent>), Error> {
        let id = self.state.lock().next_segment();
        let path = Arc::new(self.dir.path.join(format!("{id:012}.seg")));
        let target = Arc::clone(&path);
        let begun = std::time::Instant::now();
        let extents = tokio::task::spawn_blocking(move || segment::write(&target, &chunks))
            .await
            .map_err(|_| Error::Closed { what: "the event store's writer" })?;
        self.metrics.spilled(begun.elapsed());
        match extents {
            Ok(extents) => Ok((id, path, extents)),
            // Closing removed the directory meanwhile.
            Err(_) if self.is_closed() => Err(Error::Closed { what: "the event store" }),
            Err(error) => Err(error),
        }
    }

    /// Waits until the disk has room for `more` bytes of an open transaction that has `own` bytes there. False: it
    /// never will.
    async fn wait_for_disk(&self, own: u64, more: u64) -> Result<bool, Error> {
        let quota = self.config.disk_bytes;
        self.wait_until_fits(more, |state| own + more + state.spooled_bytes > quota).await
    }

    /// Waits until the disk has room for `more` bytes of transactions that have not ended. They may have half of it, because
    /// they go when they end and not when room is needed. False: they have it.
    async fn wait_for_spool(&self, more: u64) -> Result<bool, Error> {
        let most = self.config.disk_bytes / 2;
        self.wait_until_fits(more, |state| state.spooled_bytes + more > most).await
    }

    async fn wait_until_fits(&self, more: u64, never: impl Fn(&State) -> bool) -> Result<bool, Error> {
        loop {
            let waiting = self.room.notified();
            tokio::pin!(waiting);
            waiting.as_mut().enable();
            {
                let state = self.state.lock();
                if state.closed {
                    return Err(Error::Closed { what: "the event store" });
                }
                if never(&state) {
                    return Ok(false);
                }
                if state.disk_bytes + more <= self.config.disk_bytes {
                    return Ok(true);
                }
            }
            waiting.await;
        }
    }

    fn discard_chunks(&self, chunks: Vec<ChunkData>) {
        if !chunks.is_empty() {
            let files = self.state.lock().discard(chunks);
            segment::remove(&files);
        }
    }
}

#[cfg(test)]
mod tests;
