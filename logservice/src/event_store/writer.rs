//! The one writer of a store.

use std::sync::Arc;
use std::time::Instant;

use bytes::BytesMut;
use event::{DdlEvent, RowOp, TableInfo, TxnMark, put_row};
use heartbeatpb::{TableId, Ts, WallTime};
use rustc_hash::FxHashMap;

use super::metrics::Tally;
use super::state::ChunkData;
use super::{CHUNK_BYTES, CopyWriter, Spool, Store};
use crate::Error;

/// Smaller buffers of an open transaction are made to chunks only when there is no other way: each chunk takes its
/// place in the index.
const WORTH_CUTTING: usize = 16 << 10;

/// A chunk of more bytes, which has a large row, shares its memory with nothing: what is left of the buffer is copied.
const LARGE_CHUNK: usize = 4 * CHUNK_BYTES;

/// Writes one image of a row.
pub(crate) type PutImage<'a> = &'a mut dyn FnMut(&mut BytesMut);

/// Rows of the open transaction that left the buffer: the chunk is full, or the table changed its shape.
struct Cut {
    info: Arc<TableInfo>,
    data: ChunkData,
    rows: u32,
    first_row: u64,
}

/// Rows of a table that are not published yet.
struct OpenTable {
    info: Arc<TableInfo>,
    rows: BytesMut,
    /// Committed transactions in `rows`.
    marks: Vec<TxnMark>,
    /// Where the open transaction's rows begin in `rows`.
    txn_offset: usize,
    /// Rows of the open transaction in `rows`.
    txn_rows: u32,
    /// Rows of the open transaction that were cut off into `cut`.
    txn_cut_rows: u64,
    /// Chunks of the open transaction.
    cut: Vec<Cut>,
    /// Finished chunks that wait for the next publish.
    ready: Vec<(Arc<TableInfo>, Vec<TxnMark>, ChunkData)>,
    touched: bool,
    dirty: bool,
}

struct OpenTxn {
    start_ts: Ts,
    ddls: Vec<DdlEvent>,
}

/// Appends transactions. `Send`, and deliberately not `Clone`.
pub struct StoreWriter {
    store: Arc<Store>,
    tables: FxHashMap<TableId, OpenTable>,
    txn: Option<OpenTxn>,
    /// Tables with rows of the open transaction.
    touched: Vec<TableId>,
    /// Tables with committed rows that are not published.
    dirty: Vec<TableId>,
    ddls: Vec<Arc<DdlEvent>>,
    /// Commit ts of the last schema change.
    last_ddl: Ts,
    unpublished_bytes: usize,
    /// Bytes of the open transaction in memory.
    open_bytes: usize,
    /// Bytes of committed transactions that are not published.
    committed_bytes: usize,
    /// Chunks of the open transaction.
    cuts: usize,
    /// Bytes of the open transaction on disk.
    spilled_bytes: u64,
    /// Rows of the open transaction.
    open: Tally,
    /// What was committed and is not published.
    committed: Tally,
    /// When the first of it was committed.
    waits_since: Option<Instant>,
    published: Instant,
}

impl std::fmt::Debug for StoreWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StoreWriter").field("store", &self.store).finish_non_exhaustive()
    }
}

impl StoreWriter {
    pub(super) fn new(store: Arc<Store>) -> Self {
        Self {
            store,
            tables: FxHashMap::default(),
            txn: None,
            touched: Vec::new(),
            dirty: Vec::new(),
            ddls: Vec::new(),
            last_ddl: Ts::ZERO,
            unpublished_bytes: 0,
            open_bytes: 0,
            committed_bytes: 0,
            cuts: 0,
            spilled_bytes: 0,
            open: Tally::default(),
            committed: Tally::default(),
            waits_since: None,
            published: Instant::now(),
        }
    }

    /// The store that is written.
    #[must_use]
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Tells a table's shape, before its first row and after each change.
    pub fn register_table(&mut self, info: Arc<TableInfo>) {
        self.store.state.lock().add_version(Arc::clone(&info));
        match self.tables.get_mut(&info.id) {
            Some(table) if *table.info == *info => {}
            Some(table) => {
                if table.txn_rows > 0 {
                    // The open transaction changed the table: what it wrote before keeps the old shape.
                    self.cuts += 1;
                    table.cut();
                }
                table.seal();
                table.info = info;
            }
            None => {
                self.tables.insert(info.id, OpenTable::new(info));
            }
        }
    }

    /// Begins a transaction; rows and DDLs belong to it until [`StoreWriter::commit`].
    pub fn begin(&mut self, start_ts: Ts) {
        self.abort();
        self.txn = Some(OpenTxn { start_ts, ddls: Vec::new() });
    }

    /// Appends a row to the open transaction.
    ///
    /// # Errors
    /// When nobody registered the table.
    pub fn row(
        &mut self,
        table: TableId,
        op: RowOp,
        old: Option<PutImage<'_>>,
        new: Option<PutImage<'_>>,
    ) -> Result<(), Error> {
        let open = self.tables.get_mut(&table).ok_or(Error::UnknownTable { table })?;
        if !open.touched {
            open.touched = true;
            self.touched.push(table);
        }
        let before = open.rows.len();
        put_row(&mut open.rows, op, old, new);
        self.open.row(op);
        open.txn_rows += 1;
        self.unpublished_bytes += open.rows.len() - before;
        self.open_bytes += open.rows.len() - before;
        if open.rows.len() - open.txn_offset >= CHUNK_BYTES {
            self.cuts += 1;
            open.cut();
        }
        Ok(())
    }

    /// Adds a schema change to the open transaction.
    pub fn ddl(&mut self, ddl: DdlEvent) {
        if let Some(txn) = &mut self.txn {
            txn.ddls.push(ddl);
        }
    }

    /// Ends the open transaction. It becomes visible with the next [`StoreWriter::publish`].
    /// Waits while the store is full.
    ///
    /// # Errors
    /// When the store was closed or cannot write, and when the transaction has a second schema change at its commit ts
    /// (**LS-8**): whoever reads a log joins them, or gives each a commit ts of its own.
    pub async fn commit(&mut self, commit_ts: Ts, commit_time: WallTime) -> Result<(), Error> {
        if let Some(txn) = &self.txn
            && let Some(last) = txn.ddls.last()
        {
            if txn.ddls.len() > 1 || last.commit_ts != commit_ts || self.last_ddl >= commit_ts {
                self.abort();
                return Err(Error::SchemaChangesCollide { commit_ts });
            }
            self.last_ddl = commit_ts;
        }
        let Some(txn) = self.txn.take() else { return Ok(()) };
        let start_ts = txn.start_ts;
        let mut done = std::mem::take(&mut self.open);
        done.bytes = self.open_bytes as u64 + self.spilled_bytes;
        self.store.metrics.committed(done.bytes);
        self.committed.add(done);
        self.committed_bytes += std::mem::take(&mut self.open_bytes);
        self.cuts = 0;
        self.spilled_bytes = 0;
        if !self.touched.is_empty() && self.waits_since.is_none() {
            self.waits_since = Some(Instant::now());
        }
        for id in self.touched.drain(..) {
            let Some(table) = self.tables.get_mut(&id) else { continue };
            table.commit(TxnMark { commit_ts, start_ts, commit_time, rows: 0, first_row: 0 });
            if !table.dirty {
                table.dirty = true;
                self.dirty.push(id);
            }
        }
        self.ddls.extend(txn.ddls.into_iter().map(Arc::new));
        // Many small published transactions fill the store as one large one does.
        match self.tell_held() {
            true => Ok(()),
            false => self.store.wait_for_room().await,
        }
    }

    /// Forgets the open transaction, if any: the connection broke and it will come again.
    pub fn abort(&mut self) {
        self.txn = None;
        let held = self.open_bytes > 0 || self.cuts > 0;
        self.open_bytes = 0;
        self.cuts = 0;
        self.spilled_bytes = 0;
        self.open = Tally::default();
        let mut on_disk = Vec::new();
        for id in self.touched.drain(..) {
            if let Some(table) = self.tables.get_mut(&id) {
                on_disk.extend(table.cut.drain(..).map(|cut| cut.data));
                table.rows.truncate(table.txn_offset);
                table.forget_txn();
            }
        }
        if held {
            self.tell_held();
        }
        self.store.discard_chunks(on_disk);
    }

    /// Bytes in memory that the store does not see yet.
    fn held(&self) -> usize {
        self.open_bytes + self.committed_bytes + self.cuts * size_of::<Cut>()
    }

    /// Answers whether the store is open and has room for more.
    fn tell_held(&self) -> bool {
        let mut state = self.store.state.lock();
        state.held_bytes = self.held();
        !state.closed && self.store.has_room(&state)
    }

    /// Bytes that were written since the last publish.
    #[must_use]
    pub fn unpublished_bytes(&self) -> usize {
        self.unpublished_bytes
    }

    /// Makes every committed transaction visible: everything at or before `resolved` is complete. `resolved`
    /// must not be smaller than the last commit. Cheap; called when the upstream has nothing more to say for
    /// the moment, and every few milliseconds.
    pub fn publish(&mut self, resolved: Ts, time: WallTime) {
        self.committed_bytes = 0;
        let begun = Instant::now();
        for id in &self.dirty {
            if let Some(table) = self.tables.get_mut(id) {
                table.seal();
                table.dirty = false;
            }
        }
        let sealed = Instant::now();
        {
            let mut state = self.store.state.lock();
            state.held_bytes = self.held();
            for id in self.dirty.drain(..) {
                let Some(table) = self.tables.get_mut(&id) else { continue };
                for (info, marks, rows) in table.ready.drain(..) {
                    state.add_chunk(info, marks, rows);
                }
            }
            for ddl in self.ddls.drain(..) {
                state.add_ddl(&ddl);
            }
            state.resolve(resolved, time);
        }
        self.measure(begun, sealed);
        if self.txn.is_none() {
            self.unpublished_bytes = 0;
        }
        self.store.changed.notify_one();
    }

    /// Counts what became visible between `begun` and now.
    fn measure(&mut self, begun: Instant, sealed: Instant) {
        let metrics = &self.store.metrics;
        metrics.resolved();
        let Some(since) = self.waits_since.take() else { return };
        let now = Instant::now();
        let since_last = now.duration_since(std::mem::replace(&mut self.published, now));
        metrics.visible(&std::mem::take(&mut self.committed));
        metrics.published(now.duration_since(since), sealed - begun, now - sealed, since_last);
    }

    #[cfg(test)]
    pub(super) fn open_bytes_for_test(&self) -> usize {
        self.open_bytes
    }

    /// Waits while the store is full. For use inside a large transaction.
    ///
    /// # Errors
    /// When the store was closed or cannot write, or when the open transaction alone is larger than the quotas.
    pub async fn room(&mut self) -> Result<(), Error> {
        self.tell_held();
        if self.open_bytes > self.store.config.memory_bytes / 4 {
            self.cut_large();
            self.spill_cut().await?;
            self.tell_held();
        }
        self.store.wait_for_room().await
    }

    /// Makes chunks of the open transaction's rows: of large buffers, and of all when it is many small ones that
    /// take the memory.
    fn cut_large(&mut self) {
        let buffered = |table: &OpenTable| table.rows.len() - table.txn_offset;
        let tables = self.touched.iter().filter_map(|id| self.tables.get(id));
        let (mut all, mut large) = (0, 0);
        for bytes in tables.map(buffered) {
            all += bytes;
            large += if bytes >= WORTH_CUTTING { bytes } else { 0 };
        }
        let least = if all - large > self.store.config.memory_bytes / 8 { 1 } else { WORTH_CUTTING };
        for id in &self.touched {
            if let Some(table) = self.tables.get_mut(id).filter(|table| buffered(table) >= least) {
                self.cuts += 1;
                table.cut();
            }
        }
    }

    /// Moves the open transaction's chunks to disk: its commit ts is not known yet, so nobody can read them.
    async fn spill_cut(&mut self) -> Result<(), Error> {
        let mut chunks = Vec::new();
        for id in &self.touched {
            let Some(table) = self.tables.get(id) else { continue };
            chunks.extend(table.cut.iter().filter_map(|cut| match &cut.data {
                ChunkData::Memory(bytes) => Some(bytes.clone()),
                ChunkData::Disk(_) => None,
            }));
        }
        let bytes: usize = chunks.iter().map(bytes::Bytes::len).sum();
        let limits = &self.store.config;
        let fits = self.store.wait_for_disk(self.spilled_bytes, bytes as u64).await?;
        if !fits || self.cuts * size_of::<Cut>() > limits.memory_bytes {
            // As long as it fits the memory, it is no matter that the disk is too small.
            let own = self.open_bytes + self.cuts * size_of::<Cut>();
            return match own > limits.memory_bytes {
                true => Err(Error::TransactionTooLarge {
                    bytes: self.spilled_bytes + self.open_bytes as u64,
                    quota: limits.disk_bytes,
                }),
                false => Ok(()),
            };
        }
        let mut places = self.store.write_segment(chunks).await?.into_iter();
        self.spilled_bytes += bytes as u64;
        self.open_bytes -= bytes;
        for id in &self.touched {
            let Some(table) = self.tables.get_mut(id) else { continue };
            for cut in &mut table.cut {
                if let ChunkData::Memory(_) = cut.data
                    && let Some(place) = places.next()
                {
                    cut.data = place;
                }
            }
        }
        Ok(())
    }

    /// A place for what is known of a transaction that has not ended.
    pub(crate) fn spool(&self) -> Spool {
        Spool::new(Arc::clone(&self.store))
    }

    /// Bytes that such places may have in memory together.
    pub(crate) fn spool_memory(&self) -> usize {
        self.store.config.memory_bytes / 8
    }

    /// A writer for the rows that a table already has, as of `snapshot_ts`. Runs beside this writer and others.
    #[must_use]
    pub fn copy_writer(
        &self,
        table: Arc<TableInfo>,
        snapshot_ts: Ts,
        start_ts: Ts,
        time: WallTime,
    ) -> CopyWriter {
        CopyWriter::new(
            Arc::clone(&self.store),
            table,
            TxnMark { commit_ts: snapshot_ts, start_ts, commit_time: time, rows: 0, first_row: 0 },
        )
    }
}

impl OpenTable {
    fn new(info: Arc<TableInfo>) -> Self {
        Self {
            info,
            rows: BytesMut::new(),
            marks: Vec::new(),
            txn_offset: 0,
            txn_rows: 0,
            txn_cut_rows: 0,
            cut: Vec::new(),
            ready: Vec::new(),
            touched: false,
            dirty: false,
        }
    }

    /// Takes the open transaction's rows out of the buffer as a chunk without a commit ts.
    fn cut(&mut self) {
        let bytes = self.rows.split_off(self.txn_offset).freeze();
        if bytes.len() > LARGE_CHUNK {
            // The memory of a chunk is given back when nothing else lies in it.
            self.rows = BytesMut::from(&self.rows[..]);
        }
        self.cut.push(Cut {
            info: Arc::clone(&self.info),
            data: ChunkData::Memory(bytes),
            rows: self.txn_rows,
            first_row: self.txn_cut_rows,
        });
        self.txn_cut_rows += u64::from(self.txn_rows);
        self.txn_rows = 0;
    }

    /// Gives the open transaction its commit ts.
    fn commit(&mut self, mark: TxnMark) {
        if !self.cut.is_empty() {
            // What earlier transactions left in the buffer comes first.
            let tail = self.rows.split_off(self.txn_offset);
            self.seal_committed();
            self.rows = tail;
            for Cut { info, data, rows, first_row } in self.cut.drain(..) {
                self.ready.push((info, vec![TxnMark { rows, first_row, ..mark }], data));
            }
        }
        if self.txn_rows > 0 {
            self.marks.push(TxnMark { rows: self.txn_rows, first_row: self.txn_cut_rows, ..mark });
        }
        self.forget_txn();
        if self.rows.len() >= CHUNK_BYTES {
            self.seal();
        }
    }

    fn forget_txn(&mut self) {
        self.txn_offset = self.rows.len();
        self.txn_rows = 0;
        self.txn_cut_rows = 0;
        self.cut.clear();
        self.touched = false;
    }

    /// Turns the committed rows into a chunk.
    fn seal(&mut self) {
        let open = self.rows.split_off(self.txn_offset);
        self.seal_committed();
        self.rows = open;
        self.txn_offset = 0;
    }

    /// As [`OpenTable::seal`], when the buffer holds committed rows only.
    fn seal_committed(&mut self) {
        if self.marks.is_empty() {
            return;
        }
        let rows = std::mem::take(&mut self.rows).freeze();
        let marks = std::mem::take(&mut self.marks);
        self.ready.push((Arc::clone(&self.info), marks, ChunkData::Memory(rows)));
        self.txn_offset = 0;
    }
}
