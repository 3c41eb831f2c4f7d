//! The index of a store: chunks per table, what is visible, what is where.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use event::{DdlEvent, RowBatch, TableInfo, TxnMark};
use heartbeatpb::{InfluencedTables, TableId, Ts, WallTime};
use rustc_hash::{FxHashMap, FxHashSet};

use super::hold::Hold;
use super::segment::{Extent, Pieces};
use super::{CHUNK_BYTES, DiskChunk, Position, Scan};
use crate::Error;

/// Commit times remembered for lag: one per publish, about the last hours of a busy feed.
const REMEMBERED_TIMES: usize = 65_536;

/// What the index itself takes for a chunk: the entry, its place among the ages, a share of spare capacity.
const ENTRY: usize = 224;

/// Where a chunk on disk is.
#[derive(Clone)]
pub(super) struct Place {
    pub(super) segment: u64,
    pub(super) path: Arc<PathBuf>,
    pub(super) extent: Extent,
}

/// Where a chunk's rows are.
#[derive(Clone)]
pub(super) enum ChunkData {
    Memory(Bytes),
    Disk(Place),
}

pub(super) struct Chunk {
    seq: u64,
    table: Arc<TableInfo>,
    last: Position,
    /// `None`: they are stored with the rows.
    marks: Option<Arc<[TxnMark]>>,
    data: ChunkData,
}

impl Chunk {
    /// Bytes of memory that it takes.
    fn cost(&self) -> usize {
        let marks = self.marks.as_ref().map_or(0, |marks| size_of_val(&**marks));
        let rows = match &self.data {
            ChunkData::Memory(rows) => rows.len(),
            ChunkData::Disk(_) => 0,
        };
        ENTRY + marks + rows
    }
}

/// Chunks in memory that follow each other in one table; they become one chunk on disk.
pub(super) struct Group {
    pub(super) table: TableId,
    info: Arc<TableInfo>,
    /// Sequence numbers of the first and the last.
    range: (u64, u64),
    /// Place of the last in the table's log.
    at: usize,
    bytes: usize,
    pub(super) pieces: Pieces,
}

#[derive(Default)]
pub(super) struct TableLog {
    versions: Vec<Arc<TableInfo>>,
    chunks: VecDeque<Chunk>,
    /// Schema changes that name the table.
    ddls: VecDeque<Arc<DdlEvent>>,
    /// Everything up to here may be gone.
    trimmed: Position,
    /// Commit ts of the last schema change that is gone.
    ddls_trimmed: Ts,
}

struct Segment {
    path: Arc<PathBuf>,
    chunks: usize,
    bytes: u64,
}

pub(super) struct Freed {
    pub(super) bytes: u64,
    pub(super) files: Vec<Arc<PathBuf>>,
}

pub(super) struct State {
    pub(super) tables: FxHashMap<TableId, TableLog>,
    /// Schema changes that concern a schema or everything.
    wide: VecDeque<Arc<DdlEvent>>,
    pub(super) resolved: Ts,
    pub(super) resolved_time: WallTime,
    /// Chunks in memory.
    pub(super) memory_bytes: usize,
    /// What the writer has in memory and has not published.
    pub(super) held_bytes: usize,
    /// What is kept in memory about chunks on disk.
    pub(super) index_bytes: usize,
    pub(super) disk_bytes: u64,
    /// Those of them that belong to transactions that have not ended.
    pub(super) spooled_bytes: u64,
    pub(super) closed: bool,
    /// Tables whose streams stand still.
    pub(super) held: BTreeMap<TableId, Hold>,
    /// Where those of all tables do, until it is known which have to.
    pub(super) all_held: Option<Ts>,
    dirty: FxHashSet<TableId>,
    /// Chunks in memory by age: (sequence, table). Entries of dropped chunks are skipped.
    ages: VecDeque<(u64, TableId)>,
    segments: BTreeMap<u64, Segment>,
    times: VecDeque<(Ts, WallTime)>,
    next_seq: u64,
    next_segment: u64,
}

impl State {
    pub(super) fn new(start_ts: Ts) -> Self {
        Self {
            tables: FxHashMap::default(),
            wide: VecDeque::new(),
            resolved: start_ts,
            resolved_time: WallTime::default(),
            memory_bytes: 0,
            held_bytes: 0,
            index_bytes: 0,
            disk_bytes: 0,
            spooled_bytes: 0,
            closed: false,
            held: BTreeMap::new(),
            all_held: None,
            dirty: FxHashSet::default(),
            ages: VecDeque::new(),
            segments: BTreeMap::new(),
            times: VecDeque::new(),
            next_seq: 0,
            next_segment: 0,
        }
    }

    pub(super) fn add_version(&mut self, info: Arc<TableInfo>) {
        let log = self.tables.entry(info.id).or_default();
        if log.versions.last().is_none_or(|last| **last != *info) {
            log.versions.push(info);
        }
    }

    pub(super) fn table_at(&self, table: TableId, ts: Ts) -> Option<Arc<TableInfo>> {
        let versions = &self.tables.get(&table)?.versions;
        versions.iter().rev().find(|info| info.version <= ts).or_else(|| versions.first()).cloned()
    }

    pub(super) fn add_chunk(&mut self, table: Arc<TableInfo>, marks: Vec<TxnMark>, data: ChunkData) {
        let id = table.id;
        self.next_seq += 1;
        let last = marks.last().map_or_else(Position::default, Position::behind);
        let chunk = Chunk { seq: self.next_seq, table, last, marks: Some(marks.into()), data };
        match chunk.data {
            ChunkData::Memory(_) => {
                self.memory_bytes += chunk.cost();
                self.ages.push_back((self.next_seq, id));
            }
            ChunkData::Disk(_) => self.index_bytes += chunk.cost(),
        }
        self.dirty.insert(id);
        self.tables.entry(id).or_default().chunks.push_back(chunk);
    }

    /// A schema change goes to those who take part in it and to nobody else: whoever gets it executes it or
    /// waits for the others.
    pub(super) fn add_ddl(&mut self, ddl: &Arc<DdlEvent>) {
        let mut tables = match &ddl.blocked {
            Some(InfluencedTables::Normal(tables)) => tables.clone(),
            Some(InfluencedTables::Schema(_) | InfluencedTables::All) => {
                self.wide.push_back(Arc::clone(ddl));
                self.dirty.extend(self.tables.keys());
                vec![TableId::DDL]
            }
            None if ddl.added.is_empty() => vec![ddl.table_id],
            // A new table has nobody yet.
            None => vec![TableId::DDL],
        };
        tables.sort_unstable();
        tables.dedup();
        for table in tables {
            self.tables.entry(table).or_default().ddls.push_back(Arc::clone(ddl));
            self.dirty.insert(table);
        }
    }

    pub(super) fn resolve(&mut self, resolved: Ts, time: WallTime) {
        if resolved <= self.resolved {
            self.resolved_time = self.resolved_time.max(time);
            return;
        }
        self.resolved = resolved;
        self.resolved_time = time;
        if self.times.len() == REMEMBERED_TIMES {
            // Every second entry is precise enough for what is old.
            let mut keep = false;
            self.times.retain(|_| {
                keep = !keep;
                keep
            });
        }
        self.times.push_back((resolved, time));
    }

    pub(super) fn time_of(&self, ts: Ts) -> Option<WallTime> {
        if ts >= self.resolved {
            return (self.resolved_time != WallTime::default()).then_some(self.resolved_time);
        }
        let after = self.times.partition_point(|(at, _)| *at <= ts);
        after
            .checked_sub(1)
            .and_then(|i| self.times.get(i))
            .or_else(|| self.times.front())
            .map(|(_, time)| *time)
    }

    /// Its readers look again.
    pub(super) fn mark_dirty(&mut self, table: TableId) {
        self.dirty.insert(table);
    }

    pub(super) fn take_dirty(&mut self) -> Vec<TableId> {
        let mut tables: Vec<TableId> = self.dirty.drain().collect();
        tables.sort_unstable();
        tables
    }

    pub(super) fn ddls(&self, table: TableId, after: Ts) -> Vec<Arc<DdlEvent>> {
        self.tables.get(&table).map_or_else(Vec::new, |log| {
            log.ddls
                .iter()
                .filter(|ddl| ddl.commit_ts > after && ddl.commit_ts <= self.resolved)
                .cloned()
                .collect()
        })
    }

    /// The first schema change after `after` that concerns a table: one that names it, or its schema, or all.
    pub(super) fn first_ddl(&self, table: TableId, after: Ts) -> Option<Arc<DdlEvent>> {
        let is_later = |ddl: &&Arc<DdlEvent>| ddl.commit_ts > after;
        let named = self.tables.get(&table).and_then(|log| log.ddls.iter().find(is_later));
        // The table trigger finds them among those that name it.
        let is_wide = |ddl: &&Arc<DdlEvent>| table != TableId::DDL && self.reaches(ddl, table);
        let wide = self.wide.iter().filter(is_later).find(is_wide);
        let first = named.into_iter().chain(wide).min_by_key(|ddl| ddl.commit_ts)?;
        (first.commit_ts <= self.resolved).then(|| Arc::clone(first))
    }

    /// Where the last schema change behind `after` is that concerns a table.
    pub(super) fn last_ddl(&self, table: TableId, after: Ts) -> Option<Ts> {
        let mut last = None;
        while let Some(ddl) = self.first_ddl(table, last.unwrap_or(after)) {
            last = Some(ddl.commit_ts);
        }
        last
    }

    /// Whether a wide schema change concerns a table. One whose shape nobody has told may be in any schema: its
    /// dispatcher knows.
    fn reaches(&self, ddl: &DdlEvent, table: TableId) -> bool {
        match &ddl.blocked {
            Some(InfluencedTables::All) => true,
            Some(InfluencedTables::Schema(schema)) => {
                self.table_at(table, ddl.commit_ts).is_none_or(|info| info.schema_id == *schema)
            }
            Some(InfluencedTables::Normal(_)) | None => false,
        }
    }

    /// Somebody reads a table, of which nothing may have been told yet: wide schema changes concern it too.
    pub(super) fn want(&mut self, table: TableId) {
        self.tables.entry(table).or_default();
    }

    /// Forgets wide schema changes that everybody has passed. The table trigger arrives at one only when all who
    /// take part have passed the one before; so the last of each kind at or before its checkpoint is kept.
    fn trim_wide(&mut self, checkpoint: Ts) {
        let mut later: Vec<Option<InfluencedTables>> = Vec::new();
        let mut keep = VecDeque::new();
        for ddl in self.wide.drain(..).rev() {
            let everything = Some(InfluencedTables::All);
            if later.contains(&ddl.blocked) || later.contains(&everything) {
                continue;
            }
            if ddl.commit_ts <= checkpoint {
                later.push(ddl.blocked.clone());
            }
            keep.push_front(ddl);
        }
        self.wide = keep;
    }

    /// Whether no schema change of a table after `after` is gone.
    ///
    /// # Errors
    /// When one is: whoever comes back so late must not skip it.
    pub(super) fn check_ddls(&self, table: TableId, after: Ts) -> Result<(), Error> {
        match self.tables.get(&table) {
            Some(log) if after < log.ddls_trimmed => {
                Err(Error::OutOfRange { from: after, to: self.resolved })
            }
            Some(_) | None => Ok(()),
        }
    }

    pub(super) fn scan(&self, table: TableId, from: Position) -> Result<Scan, Error> {
        let Some(log) = self.tables.get(&table) else { return Ok(Scan::End) };
        if from < log.trimmed {
            return Err(Error::OutOfRange { from: from.commit_ts, to: self.resolved });
        }
        let first = log.chunks.partition_point(|chunk| chunk.last <= from);
        let Some(chunk) = log.chunks.get(first) else { return Ok(Scan::End) };
        match (&chunk.data, &chunk.marks) {
            (ChunkData::Memory(rows), marks) => {
                let marks = marks.as_deref().unwrap_or_default().to_vec();
                let whole = RowBatch::trusted(Arc::clone(&chunk.table), marks, rows.clone());
                Ok(slice(&whole, from).map_or(Scan::End, |(batch, next)| Scan::Rows(batch, next)))
            }
            (ChunkData::Disk(place), marks) => Ok(Scan::OnDisk(DiskChunk {
                path: Arc::clone(&place.path),
                extent: place.extent,
                table: Arc::clone(&chunk.table),
                marks: marks.clone(),
                from,
            })),
        }
    }

    pub(super) fn trim(&mut self, table: TableId, checkpoint: Ts, copied: Option<Position>) -> Freed {
        let mut freed = Freed { bytes: 0, files: Vec::new() };
        if table == TableId::DDL {
            self.trim_wide(checkpoint);
        }
        let Some(log) = self.tables.get_mut(&table) else { return freed };
        let until = copied.unwrap_or_default().max(Position::after(checkpoint));
        let mut dropped = Vec::new();
        while log.chunks.front().is_some_and(|chunk| chunk.last <= until) {
            if let Some(chunk) = log.chunks.pop_front() {
                log.trimmed = log.trimmed.max(chunk.last);
                dropped.push((chunk.cost(), chunk.data));
            }
        }
        while let Some(ddl) = log.ddls.pop_front_if(|ddl| ddl.commit_ts <= checkpoint) {
            log.ddls_trimmed = ddl.commit_ts;
        }
        for (cost, data) in dropped {
            freed.bytes += cost as u64;
            match data {
                ChunkData::Memory(_) => self.memory_bytes -= cost,
                ChunkData::Disk(place) => {
                    freed.bytes += place.extent.len as u64;
                    self.index_bytes -= cost;
                    self.release(place.segment, &mut freed.files);
                }
            }
        }
        freed
    }

    /// Drops chunks on disk that never became visible.
    pub(super) fn discard(&mut self, chunks: Vec<ChunkData>) -> Vec<Arc<PathBuf>> {
        let mut files = Vec::new();
        for data in chunks {
            if let ChunkData::Disk(place) = data {
                self.release(place.segment, &mut files);
            }
        }
        files
    }

    /// Counts a new segment file whose chunks are not visible yet.
    pub(super) fn add_segment(&mut self, id: u64, path: &Arc<PathBuf>, chunks: usize, bytes: u64) {
        self.disk_bytes += bytes;
        self.segments.insert(id, Segment { path: Arc::clone(path), chunks, bytes });
    }

    fn release(&mut self, segment: u64, files: &mut Vec<Arc<PathBuf>>) {
        let Some(entry) = self.segments.get_mut(&segment) else { return };
        entry.chunks -= 1;
        if entry.chunks == 0 {
            self.disk_bytes -= entry.bytes;
            files.push(Arc::clone(&entry.path));
            self.segments.remove(&segment);
        }
    }

    /// The oldest chunks in memory, at least `bytes` of them if there are as many. Small ones that follow each
    /// other are put together: many small transactions must not leave many small chunks in the index.
    pub(super) fn oldest_in_memory(&mut self, bytes: usize) -> Vec<Group> {
        let mut groups: Vec<Group> = Vec::new();
        let mut open: FxHashMap<TableId, usize> = FxHashMap::default();
        let mut total = 0;
        while total < bytes {
            let Some((seq, table)) = self.ages.pop_front() else { break };
            let Some(log) = self.tables.get(&table) else { continue };
            let at = log.chunks.partition_point(|chunk| chunk.seq < seq);
            let Some(chunk) = log.chunks.get(at).filter(|chunk| chunk.seq == seq) else { continue };
            let ChunkData::Memory(rows) = &chunk.data else { continue };
            total += chunk.cost();
            let last = open.get(&table).and_then(|index| groups.get_mut(*index));
            let fits = |group: &&mut Group| {
                group.at + 1 == at
                    && group.bytes + rows.len() <= CHUNK_BYTES
                    && (Arc::ptr_eq(&group.info, &chunk.table) || group.info == chunk.table)
            };
            let group = match last.filter(fits) {
                Some(group) => group,
                None => {
                    open.insert(table, groups.len());
                    groups.push(Group {
                        table,
                        info: Arc::clone(&chunk.table),
                        range: (seq, seq),
                        at,
                        bytes: 0,
                        pieces: Pieces::default(),
                    });
                    let Some(group) = groups.last_mut() else { continue };
                    group
                }
            };
            group.range.1 = seq;
            group.at = at;
            group.bytes += rows.len();
            group.pieces.marks.extend(chunk.marks.clone());
            group.pieces.rows.push(rows.clone());
        }
        groups
    }

    pub(super) fn next_segment(&mut self) -> u64 {
        self.next_segment += 1;
        self.next_segment
    }

    /// Points chunks at their new place. Those that were trimmed meanwhile are left out; says whether all were.
    pub(super) fn moved_to_disk(
        &mut self,
        segment: u64,
        path: &Arc<PathBuf>,
        moved: &[(TableId, (u64, u64), Extent)],
    ) -> bool {
        let mut entry = Segment { path: Arc::clone(path), chunks: 0, bytes: 0 };
        for (table, (first, last), extent) in moved {
            let Some(log) = self.tables.get_mut(table) else { continue };
            let begin = log.chunks.partition_point(|chunk| chunk.seq < *first);
            let end = log.chunks.partition_point(|chunk| chunk.seq <= *last);
            let mut gone = log.chunks.drain(begin..end);
            let Some(mut chunk) = gone.next_back() else { continue };
            self.memory_bytes -= chunk.cost() + gone.map(|chunk| chunk.cost()).sum::<usize>();
            // Of a group whose beginning was trimmed, scans skip what lies before their place.
            chunk.marks = None;
            chunk.data = ChunkData::Disk(Place { segment, path: Arc::clone(path), extent: *extent });
            self.index_bytes += chunk.cost();
            entry.chunks += 1;
            entry.bytes += extent.len as u64;
            log.chunks.insert(begin, chunk);
        }
        if entry.chunks == 0 {
            return true;
        }
        self.disk_bytes += entry.bytes;
        self.segments.insert(segment, entry);
        false
    }
}

impl Group {
    /// What [`State::moved_to_disk`] wants to know of it.
    pub(super) fn key(&self) -> (TableId, (u64, u64)) {
        (self.table, self.range)
    }
}

/// The rows of a batch after `from`, and the place after them; `None` when there are none.
pub(super) fn slice(whole: &RowBatch, from: Position) -> Option<(RowBatch, Position)> {
    let last = whole.txns().last()?;
    let next = Position::behind(last);
    let sent = |mark: &TxnMark| -> u32 {
        if mark.commit_ts < from.commit_ts {
            mark.rows
        } else if mark.commit_ts > from.commit_ts {
            0
        } else {
            let done = from.rows.saturating_sub(mark.first_row).min(u64::from(mark.rows));
            u32::try_from(done).unwrap_or(mark.rows)
        }
    };
    let skip: u64 = whole.txns().iter().map(|mark| u64::from(sent(mark))).sum();
    if skip == 0 {
        return Some((whole.clone(), next));
    }
    if skip == whole.row_count() {
        return None;
    }
    let marks = whole
        .txns()
        .iter()
        .filter_map(|mark| {
            let done = sent(mark);
            (done < mark.rows).then(|| TxnMark {
                rows: mark.rows - done,
                first_row: mark.first_row + u64::from(done),
                ..*mark
            })
        })
        .collect();
    Some((whole.without_first(skip, marks), next))
}
