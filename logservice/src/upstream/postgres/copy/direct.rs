//! The way past the event store: parts of tables, each from one statement upstream into one transaction downstream.
//!
//! The workers share three queues. A worker that finds a part copies it; one that finds none takes the next table, asks the
//! downstream what it has of it, divides the rest in its snapshot, and puts the parts into the first queue. Nothing is
//! decoded on the way: bytes go from one socket to the other through a buffer of bounded size, values of any size included.
//! Whoever writes the last part of a table that the copy has created queues its indexes. They are made when everything is
//! read, several at once, so that the upstream's snapshot ends as early as it can. A part of a table that has several goes to
//! the node that owns its span, while the worker waits (`away.rs`).
//!
//! ```text
//!   waiting ──► asked, divided ──► parts, by any worker ──► indexes, by any worker ──► finished: the stream may come
//!                  │  cut off before: what is there stays, if its parts last          ▲
//!                  └── nothing is missing ────────────────────────────────────────────┘
//! ```

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::BytesMut;
use event::{CopiedPart, CopyFormat, CopyIndex, CopyPart, CopySession, KeyCodec, PartWriter, TableInfo};
use heartbeatpb::{TableId, TableSpan, Ts, WallTime};
use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use tokio::sync::Notify;
use tokio::task::JoinSet;

use super::super::catalog::CatalogTable;
use super::super::conn::{Connection, CopyData, CopyStep};
use super::super::server_error::ServerError;
use super::super::shape::Shape;
use super::super::split;
use super::super::sql::literal;
use super::away::{Away, Seat, Wanted};
use super::indexes;
use super::parts::{self, Division, Facts};
use super::{Copied, CopyPlan, SILENCE, Snapshot, silent};
use crate::Error;
use crate::upstream::{ReaderProgress, TableCopy};

/// Bytes that are handed on together.
const CHUNK: usize = 128 * 1024;

/// A table that is to be copied, or the rest of one.
struct Table {
    catalog: CatalogTable,
    shape: Arc<Shape>,
    copy: Arc<TableCopy>,
    /// Parts that are still to come, and afterwards indexes; counted when they are known.
    left: AtomicU64,
    /// What is made when all parts are there.
    indexes: Mutex<Vec<CopyIndex>>,
}

/// A part in the queue.
struct Job {
    table: Arc<Table>,
    part: CopyPart,
    format: CopyFormat,
    /// Its table has others: worth a way to another node.
    is_one_of_many: bool,
}

/// What is read next.
enum Work {
    Part(Job),
    Table(Arc<Table>),
    /// Another worker is finding out about a table.
    Wait,
    Nothing,
}

/// An index in the queue.
struct Build {
    table: Arc<Table>,
    index: CopyIndex,
}

#[derive(Default)]
struct Queue {
    tables: VecDeque<Arc<Table>>,
    parts: VecDeque<Job>,
    indexes: VecDeque<Build>,
    /// Tables about which a worker is finding out.
    asking: usize,
    /// Parts on their way, and tables that are asked about: indexes may come of them.
    reading: usize,
}

/// What the workers share.
struct Run {
    session: Arc<dyn CopySession>,
    queue: Mutex<Queue>,
    /// Something came into the queue, or nothing more will.
    changed: Notify,
    snapshot: (Ts, WallTime),
    part_bytes: u64,
    /// Other nodes that may write parts.
    away: Option<Away>,
    progress: Arc<ReaderProgress>,
    /// Oldest position of the parts.
    oldest: Mutex<(Ts, WallTime)>,
}

/// Copies what the downstream does not have. `None`: told to stop before the end.
pub(super) async fn run(
    plan: &CopyPlan<'_>,
    session: &Arc<dyn CopySession>,
) -> Result<Option<Copied>, Error> {
    begin(plan, session).await?;
    let finished: FxHashMap<TableId, CopiedPart> = session.finished().await?.into_iter().collect();
    let board = super::begin_board(plan);
    let mut oldest: Option<(Ts, WallTime)> = None;
    let mut tables = Vec::new();
    for ((catalog, shape), copy) in plan.tables.iter().zip(board) {
        match finished.get(&catalog.info.id) {
            Some(all) => {
                copy.begin(Some(all.rows), 1, (1, all.rows, all.bytes));
                copy.finish();
                plan.progress.copy_tables_done.fetch_add(1, Ordering::Relaxed);
                plan.progress.copy_rows.fetch_add(all.rows, Ordering::Relaxed);
                oldest = oldest.into_iter().chain([(all.at, all.time)]).min_by_key(|(at, _)| *at);
            }
            None => tables.push(Arc::new(Table {
                catalog: catalog.clone(),
                shape: Arc::clone(shape),
                copy,
                left: AtomicU64::new(0),
                indexes: Mutex::default(),
            })),
        }
    }
    if let (Some(oldest), true) = (oldest, tables.is_empty()) {
        // Shapes that are as they were noted have not changed meanwhile.
        let (from, time) = oldest;
        return Ok(Some(Copied { from, time, until: from }));
    }
    // Largest first, so that no worker ends long after the others.
    tables.sort_by_key(|table| std::cmp::Reverse(table.catalog.pages));
    let pages: u64 = tables.iter().map(|table| table.catalog.pages).sum();
    let of_use = tables.len() as u64 + pages.saturating_mul(split::PAGE) / plan.part_bytes.max(1);
    let Some(Snapshot { position, time, mut connections }) =
        super::snapshot(plan, usize::try_from(of_use).unwrap_or(usize::MAX)).await?
    else {
        return Ok(None);
    };
    if let Some(conn) = connections.first_mut() {
        estimate(conn, &tables).await?;
    }
    let run = Arc::new(Run {
        session: Arc::clone(session),
        queue: Mutex::new(Queue { tables: tables.into(), ..Queue::default() }),
        changed: Notify::new(),
        snapshot: (position, time),
        part_bytes: plan.part_bytes,
        away: plan
            .crew
            .map(|crew| Away::new(crew.clone(), Arc::clone(session), plan.application, (position, time))),
        progress: Arc::clone(plan.progress),
        oldest: Mutex::new(oldest.map_or((position, time), |oldest| oldest)),
    });
    let mut workers = JoinSet::new();
    for conn in connections {
        workers.spawn(work(conn, Arc::clone(&run)));
    }
    let ended = super::join(plan, workers).await?;
    let (from, time) = *run.oldest.lock();
    Ok(ended.then_some(Copied { from, time, until: position }))
}

/// Makes sure that what is there was copied from tables of the same shapes. The stream would bring a schema change from
/// between two snapshots to tables that have it already.
async fn begin(plan: &CopyPlan<'_>, session: &Arc<dyn CopySession>) -> Result<(), Error> {
    let shapes = shapes(plan.tables.iter().map(|(table, _)| &*table.info));
    let infos: Vec<Arc<TableInfo>> = plan.tables.iter().map(|(table, _)| Arc::clone(&table.info)).collect();
    session.retain(&infos).await?;
    match session.shapes().await? {
        Some(before) if before == shapes => return Ok(()),
        Some(_) => {
            tracing::info!(changefeed = %plan.changefeed,
                "tables have changed their shape since the initial copy began; it begins again");
            for (table, _) in plan.tables {
                let found = session.open(&table.info).await?;
                if !found.parts.is_empty() {
                    session.clear(table.info.id).await?;
                }
            }
        }
        None => {}
    }
    Ok(session.set_shapes(shapes).await?)
}

/// A number that tells tables and their shapes from others.
fn shapes<'a>(tables: impl Iterator<Item = &'a TableInfo>) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    for table in tables {
        let shape = TableInfo { version: Ts::ZERO, ..table.clone() };
        // Plain data: it can always be written.
        hasher.update(&serde_json::to_vec(&shape).unwrap_or_default());
    }
    hasher.finalize()
}

/// Tells about how many rows tables have whose turn has not come, so that the time that is left can be told.
async fn estimate(conn: &mut Connection, tables: &[Arc<Table>]) -> Result<(), Error> {
    let ids: Vec<String> = tables.iter().map(|table| table.catalog.info.id.0.to_string()).collect();
    let sql = format!(
        "SELECT c.oid, COALESCE((SELECT sum(greatest(p.reltuples, 0)) FROM pg_catalog.pg_partition_tree(c.oid) t \
           JOIN pg_catalog.pg_class p ON p.oid = t.relid WHERE t.isleaf), greatest(c.reltuples, 0))::bigint \
         FROM pg_catalog.pg_class c WHERE c.oid = ANY ('{{{}}}'::oid[])",
        ids.join(",")
    );
    let mut rows = FxHashMap::default();
    for row in conn.query("ask for the sizes of tables", &sql).await? {
        rows.insert(TableId(row.number(0)?), row.number(1)?);
    }
    for table in tables {
        let rows = match table.catalog.part.condition {
            Some(_) => split::expected(conn, &table.catalog).await?,
            None => rows.get(&table.catalog.info.id).copied().unwrap_or(0),
        };
        table.copy.expect(rows);
    }
    Ok(())
}

async fn work(conn: Connection, run: Arc<Run>) -> Result<(), Error> {
    let mut seat = Seat::new(conn);
    run.read(&mut seat).await?;
    seat.conn.close().await;
    run.build().await
}

impl Queue {
    /// A worker has found out about a table.
    fn divided(&mut self, jobs: Vec<Job>, builds: Vec<Build>) {
        self.parts.extend(jobs);
        self.asking -= 1;
        self.read(builds);
    }

    /// A worker has done with what it took.
    fn read(&mut self, builds: Vec<Build>) {
        self.indexes.extend(builds);
        self.reading -= 1;
    }

    /// What to read next.
    fn take(&mut self) -> Work {
        if let Some(job) = self.parts.pop_front() {
            self.reading += 1;
            return Work::Part(job);
        }
        if let Some(table) = self.tables.pop_front() {
            self.asking += 1;
            self.reading += 1;
            return Work::Table(table);
        }
        if self.asking > 0 { Work::Wait } else { Work::Nothing }
    }
}

impl Run {
    /// Reads until there is nothing that nobody reads.
    async fn read(self: &Arc<Self>, seat: &mut Seat) -> Result<(), Error> {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let work = self.queue.lock().take();
            match work {
                Work::Part(job) => {
                    let builds = self.copy(seat, job).await?;
                    self.queue.lock().read(builds);
                }
                Work::Table(table) => {
                    let jobs = self.divide(&mut seat.conn, &table).await?;
                    let builds = if jobs.is_empty() { self.all_there(&table).await? } else { Vec::new() };
                    self.queue.lock().divided(jobs, builds);
                }
                Work::Wait => {
                    changed.await;
                    continue;
                }
                Work::Nothing => return Ok(()),
            }
            self.changed.notify_waiters();
        }
    }

    /// Makes indexes until there is none left, and nobody reads who might bring more.
    async fn build(&self) -> Result<(), Error> {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let (build, more) = {
                let mut queue = self.queue.lock();
                (queue.indexes.pop_front(), queue.reading > 0)
            };
            match build {
                Some(Build { table, index }) => {
                    self.session.index(table.catalog.info.id, &index).await?;
                    if table.left.fetch_sub(1, Ordering::AcqRel) == 1 {
                        self.finish(&table).await?;
                    }
                }
                None if more => changed.await,
                None => return Ok(()),
            }
        }
    }

    /// All rows of a table are there: its indexes are next, if any are missing.
    async fn all_there(&self, table: &Arc<Table>) -> Result<Vec<Build>, Error> {
        let indexes = std::mem::take(&mut *table.indexes.lock());
        if indexes.is_empty() {
            self.finish(table).await?;
            return Ok(Vec::new());
        }
        table.copy.index();
        table.left.store(indexes.len() as u64, Ordering::Release);
        Ok(indexes.into_iter().map(|index| Build { table: Arc::clone(table), index }).collect())
    }

    /// Finds out what the downstream has of a table, and divides the rest.
    async fn divide(&self, conn: &mut Connection, table: &Arc<Table>) -> Result<Vec<Job>, Error> {
        let catalog = &table.catalog;
        let info = &catalog.info;
        let mut found = self.session.open(info).await?;
        let sample = split::size(conn, catalog).await?;
        let codec = KeyCodec::new(info).filter(|_| catalog.source().splittable);
        let facts = facts(conn, catalog, codec.as_ref(), &sample).await?;
        let by_key = codec.is_some();
        let is_there = found.finished || parts::is_whole(&found.parts);
        if !is_there && !found.parts.iter().all(|part| lasts(&part.part, by_key)) {
            tracing::info!(table = %table.name(), "a table that was not copied to its end is copied again");
            self.session.clear(info.id).await?;
            found.parts.clear();
        }
        let missing = if is_there {
            Vec::new()
        } else {
            self.missing(conn, catalog, codec.as_ref(), (&found.parts, &facts)).await?
        };
        if found.created && !found.finished {
            *table.indexes.lock() = indexes::of(conn, catalog).await?;
        }
        let kept = found
            .parts
            .iter()
            .fold((0, 0, 0), |(parts, rows, bytes), part| (parts + 1, rows + part.rows, bytes + part.bytes));
        for part in &found.parts {
            self.note(part.at, part.time);
        }
        table.copy.begin(sample.rows, kept.0 + missing.len() as u64, kept);
        self.progress.copy_rows.fetch_add(kept.1, Ordering::Relaxed);
        table.left.store(missing.len() as u64, Ordering::Relaxed);
        let format = if found.binary { CopyFormat::Binary } else { CopyFormat::Text };
        let is_one_of_many = found.parts.len() + missing.len() > 1;
        let job = |part| Job { table: Arc::clone(table), part, format, is_one_of_many };
        Ok(missing.into_iter().map(job).collect())
    }

    async fn missing(
        &self,
        conn: &mut Connection,
        catalog: &CatalogTable,
        codec: Option<&KeyCodec>,
        (parts, facts): (&[CopiedPart], &Facts),
    ) -> Result<Vec<CopyPart>, Error> {
        let there: Vec<CopyPart> = parts.iter().map(|part| part.part.clone()).collect();
        let mut division = parts::division(codec, facts, self.part_bytes);
        if let (Division::Pages(pages), false) = (division, there.is_empty()) {
            // It was divided by key before, and goes on so.
            division = Division::Keys(usize::try_from(pages).unwrap_or(1));
        }
        let pieces = match (division, codec) {
            (Division::Pages(count), _) => return Ok(parts::pages(facts.pages, count)),
            (Division::Keys(pieces), Some(codec)) => Some((pieces, codec)),
            (Division::Keys(_), None) | (Division::Whole, _) => None,
        };
        let keys = match pieces {
            Some((pieces, codec)) => {
                let pages = facts.bytes / split::PAGE;
                let sample = split::sample(conn, catalog, codec, pages, "").await?;
                sample.divide(&TableSpan::whole(catalog.info.id), pieces).keys
            }
            None => Vec::new(),
        };
        Ok(parts::cut(&parts::gaps(&there), &keys))
    }

    fn note(&self, at: Ts, time: WallTime) {
        let mut oldest = self.oldest.lock();
        if at < oldest.0 {
            *oldest = (at, time);
        }
    }

    /// Copies one part. Answers the indexes that are next, if it was the last one of its table.
    async fn copy(&self, seat: &mut Seat, job: Job) -> Result<Vec<Build>, Error> {
        let Job { table, part, format, is_one_of_many } = job;
        let action = format!("copy table {}", table.name());
        let sql = parts::statement(&table.catalog, &table.shape, &part, format)
            .ok_or_else(|| Error::protocol("the bounds of a part are no keys of its table"))?;
        let wanted = Wanted { table: &table.catalog.info, part: &part, format, statement: &sql };
        let elsewhere = match self.away.as_ref().filter(|_| is_one_of_many) {
            Some(away) => away.copy(seat, &wanted).await?,
            None => None,
        };
        if let Some((rows, bytes)) = elsewhere {
            self.progress.copied(&table.copy, rows, bytes);
        } else {
            let mut writer = self.session.write(table.catalog.info.id, &part, format, self.snapshot).await?;
            let mut count = |rows, bytes| self.progress.copied(&table.copy, rows, bytes);
            let rows = relay(&mut seat.conn, (&action, &sql), format, &mut *writer, &mut count).await?;
            writer.commit(rows).await?;
        }
        self.note(self.snapshot.0, self.snapshot.1);
        table.copy.part_done();
        if table.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            return self.all_there(&table).await;
        }
        Ok(Vec::new())
    }

    async fn finish(&self, table: &Table) -> Result<(), Error> {
        self.session.finish(table.catalog.info.id).await?;
        table.copy.finish();
        self.progress.copy_tables_done.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

impl Table {
    fn name(&self) -> String {
        self.catalog.sql_name()
    }
}

/// Passes rows on as they come, and answers how many they were. `count` hears of them, and of their bytes.
pub(super) async fn relay(
    conn: &mut Connection,
    (action, sql): (&str, &str),
    format: CopyFormat,
    writer: &mut dyn PartWriter,
    count: &mut (dyn FnMut(u64, u64) + Send),
) -> Result<u64, Error> {
    conn.start_copy(action, sql).await?;
    let (mut data, mut out, mut failure, mut counted) = (CopyData::default(), BytesMut::new(), None, 0);
    loop {
        match conn.take_copy(&mut data, &mut out, CHUNK)? {
            CopyStep::Wait => {
                let inside = data.is_inside();
                let more = async { if inside { conn.fill_on().await } else { conn.fill().await } };
                match tokio::time::timeout(SILENCE, more).await {
                    Ok(filled) => filled?,
                    Err(_) => return Err(silent(conn)),
                }
            }
            CopyStep::Enough => {
                let new = data.messages - std::mem::replace(&mut counted, data.messages);
                count(new, out.len() as u64);
                writer.write(out.split().freeze()).await?;
            }
            CopyStep::Other(tag, total) => {
                match tag {
                    b'E' => failure = Some(ServerError::parse(conn.body(total)).into_error(action)),
                    b'c' | b'C' | b'N' | b'S' | b'Z' => {}
                    _ => {
                        return Err(Error::protocol(format_args!("message {:?} in a copy", char::from(tag))));
                    }
                }
                conn.advance(total);
                if tag == b'Z' {
                    break;
                }
            }
        }
    }
    if let Some(failure) = failure {
        return Err(failure);
    }
    // The binary format ends with a message of its own, which came before the end.
    let rows = data.messages.saturating_sub(u64::from(format == CopyFormat::Binary));
    count(rows.saturating_sub(counted), out.len() as u64);
    if !out.is_empty() {
        writer.write(out.freeze()).await?;
    }
    Ok(rows)
}

/// Whether a part of an earlier run can be kept: parts by page belong to one snapshot, and parts by key to a table that
/// is divided by key.
fn lasts(part: &CopyPart, by_key: bool) -> bool {
    part.is_all() || (part.blocks.is_none() && by_key)
}

/// What decides how a table is divided.
async fn facts(
    conn: &mut Connection,
    table: &CatalogTable,
    codec: Option<&KeyCodec>,
    sample: &crate::upstream::split::Sample,
) -> Result<Facts, Error> {
    let first = codec.and_then(|codec| codec.parts().first());
    let column = first.map_or("", |(column, _)| table.info.columns[*column].name.as_str());
    let sql = format!(
        "SELECT (SELECT max(pg_relation_size(c.oid)) / current_setting('block_size')::bigint \
                 FROM pg_catalog.pg_class c WHERE c.relkind = 'r' AND (c.oid = {oid} OR c.oid IN \
                   (SELECT relid FROM pg_catalog.pg_partition_tree({oid}::regclass) WHERE isleaf))), \
           (SELECT correlation FROM pg_catalog.pg_stats WHERE schemaname = {schema} AND tablename = {name} \
              AND attname = {column} AND NOT inherited)",
        oid = table.info.id.0,
        schema = literal(&table.info.schema),
        name = literal(&table.info.name),
        column = literal(column),
    );
    let rows = conn.query("ask for the size of a table", &sql).await?;
    let Some(row) = rows.first() else { return Ok(Facts::default()) };
    Ok(Facts {
        bytes: sample.bytes.unwrap_or(0),
        pages: row.opt(0).and_then(|text| text.parse().ok()).unwrap_or(0),
        correlation: row.opt(1).and_then(|text| text.parse().ok()),
    })
}
