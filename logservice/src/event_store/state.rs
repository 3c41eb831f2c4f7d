//! The index of a store: chunks per table, what is visible, what is where.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use event::{DdlEvent, RowBatch, TableInfo, TxnMark};
use heartbeatpb::{TableId, Ts, WallTime};
use rustc_hash::{FxHashMap, FxHashSet};

use super::{DiskChunk, Position, Scan};
use crate::Error;

/// Commit times remembered for lag: one per publish, about the last hours of a busy feed.
const REMEMBERED_TIMES: usize = 65_536;

/// Where a chunk's bytes are.
#[derive(Clone)]
pub(super) enum ChunkData {
    Memory(Bytes),
    Disk { segment: u64, path: Arc<PathBuf>, offset: u64, len: usize },
}

pub(super) struct Chunk {
    seq: u64,
    table: Arc<TableInfo>,
    marks: Arc<[TxnMark]>,
    data: ChunkData,
}

impl Chunk {
    fn last(&self) -> Position {
        self.marks.last().map_or_else(Position::default, |mark| Position {
            commit_ts: mark.commit_ts,
            rows: mark.first_row + u64::from(mark.rows),
        })
    }
}

#[derive(Default)]
pub(super) struct TableLog {
    versions: Vec<Arc<TableInfo>>,
    chunks: VecDeque<Chunk>,
    ddls: VecDeque<Arc<DdlEvent>>,
    /// Everything up to here may be gone.
    trimmed: Position,
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
    pub(super) resolved: Ts,
    pub(super) resolved_time: WallTime,
    pub(super) memory_bytes: usize,
    pub(super) disk_bytes: u64,
    pub(super) closed: bool,
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
            resolved: start_ts,
            resolved_time: WallTime::default(),
            memory_bytes: 0,
            disk_bytes: 0,
            closed: false,
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
        if let ChunkData::Memory(bytes) = &data {
            self.memory_bytes += bytes.len();
            self.ages.push_back((self.next_seq, id));
        }
        self.dirty.insert(id);
        let chunk = Chunk { seq: self.next_seq, table, marks: marks.into(), data };
        self.tables.entry(id).or_default().chunks.push_back(chunk);
    }

    pub(super) fn add_ddl(&mut self, ddl: &Arc<DdlEvent>) {
        let mut tables = vec![TableId::DDL];
        if ddl.table_id != TableId::DDL {
            tables.push(ddl.table_id);
        }
        if let Some(heartbeatpb::InfluencedTables::Normal(blocked)) = &ddl.blocked {
            tables.extend(blocked.iter().copied());
        }
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

    pub(super) fn first_ddl(&self, table: TableId, after: Ts) -> Option<Arc<DdlEvent>> {
        let ddl = self.tables.get(&table)?.ddls.iter().find(|ddl| ddl.commit_ts > after)?;
        (ddl.commit_ts <= self.resolved).then(|| Arc::clone(ddl))
    }

    pub(super) fn scan(&self, table: TableId, from: Position) -> Result<Scan, Error> {
        let Some(log) = self.tables.get(&table) else { return Ok(Scan::End) };
        if from < log.trimmed {
            return Err(Error::OutOfRange { from: from.commit_ts, to: self.resolved });
        }
        let first = log.chunks.partition_point(|chunk| chunk.last() <= from);
        let Some(chunk) = log.chunks.get(first) else { return Ok(Scan::End) };
        match &chunk.data {
            ChunkData::Memory(rows) => {
                let whole = RowBatch::trusted(Arc::clone(&chunk.table), chunk.marks.to_vec(), rows.clone());
                Ok(slice(&whole, from).map_or(Scan::End, |(batch, next)| Scan::Rows(batch, next)))
            }
            ChunkData::Disk { path, offset, len, .. } => Ok(Scan::OnDisk(DiskChunk {
                path: Arc::clone(path),
                offset: *offset,
                len: *len,
                table: Arc::clone(&chunk.table),
                marks: Arc::clone(&chunk.marks),
                from,
            })),
        }
    }

    pub(super) fn trim(&mut self, table: TableId, checkpoint: Ts, copied: Option<Position>) -> Freed {
        let mut freed = Freed { bytes: 0, files: Vec::new() };
        let Some(log) = self.tables.get_mut(&table) else { return freed };
        let until = copied.unwrap_or_default().max(Position::after(checkpoint));
        let mut dropped = Vec::new();
        while log.chunks.front().is_some_and(|chunk| chunk.last() <= until) {
            if let Some(chunk) = log.chunks.pop_front() {
                log.trimmed = log.trimmed.max(chunk.last());
                dropped.push(chunk.data);
            }
        }
        while log.ddls.front().is_some_and(|ddl| ddl.commit_ts <= checkpoint) {
            log.ddls.pop_front();
        }
        for data in dropped {
            match data {
                ChunkData::Memory(bytes) => {
                    freed.bytes += bytes.len() as u64;
                    self.memory_bytes -= bytes.len();
                }
                ChunkData::Disk { segment, len, .. } => {
                    freed.bytes += len as u64;
                    self.release(segment, &mut freed.files);
                }
            }
        }
        freed
    }

    /// Drops chunks on disk that never became visible.
    pub(super) fn discard(&mut self, chunks: Vec<ChunkData>) -> Vec<Arc<PathBuf>> {
        let mut files = Vec::new();
        for data in chunks {
            if let ChunkData::Disk { segment, .. } = data {
                self.release(segment, &mut files);
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

    /// The oldest chunks in memory, at least `bytes` of them if there are as many.
    pub(super) fn oldest_in_memory(&mut self, bytes: usize) -> Vec<(TableId, u64, Bytes)> {
        let mut found = Vec::new();
        let mut total = 0;
        while total < bytes {
            let Some((seq, table)) = self.ages.pop_front() else { break };
            let Some(log) = self.tables.get(&table) else { continue };
            let at = log.chunks.partition_point(|chunk| chunk.seq < seq);
            let Some(chunk) = log.chunks.get(at).filter(|chunk| chunk.seq == seq) else { continue };
            if let ChunkData::Memory(data) = &chunk.data {
                total += data.len();
                found.push((table, seq, data.clone()));
            }
        }
        found
    }

    pub(super) fn next_segment(&mut self) -> u64 {
        self.next_segment += 1;
        self.next_segment
    }

    /// Points chunks at their new place. Chunks that were trimmed meanwhile are left out; says whether all were.
    pub(super) fn moved_to_disk(
        &mut self,
        segment: u64,
        path: &Arc<PathBuf>,
        chunks: &[(TableId, u64, u64)],
    ) -> bool {
        let mut entry = Segment { path: Arc::clone(path), chunks: 0, bytes: 0 };
        for (table, seq, offset) in chunks {
            let Some(log) = self.tables.get_mut(table) else { continue };
            let at = log.chunks.partition_point(|chunk| chunk.seq < *seq);
            let Some(chunk) = log.chunks.get_mut(at).filter(|chunk| chunk.seq == *seq) else { continue };
            if let ChunkData::Memory(data) = &chunk.data {
                let len = data.len();
                self.memory_bytes -= len;
                entry.chunks += 1;
                entry.bytes += len as u64;
                chunk.data = ChunkData::Disk { segment, path: Arc::clone(path), offset: *offset, len };
            }
        }
        if entry.chunks == 0 {
            return true;
        }
        self.disk_bytes += entry.bytes;
        self.segments.insert(segment, entry);
        false
    }
}

/// The rows of a batch after `from`, and the place after them; `None` when there are none.
pub(super) fn slice(whole: &RowBatch, from: Position) -> Option<(RowBatch, Position)> {
    let last = whole.txns().last()?;
    let next = Position { commit_ts: last.commit_ts, rows: last.first_row + u64::from(last.rows) };
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
