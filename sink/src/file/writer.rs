//! The files of one dispatcher: rows become text in a buffer, and the buffer becomes a file.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use event::{RowBatch, RowChange, RowOp, TableInfo};
use heartbeatpb::{Ts, WallTime};

use super::layout::{self, DataNames, TablePlace};
use super::metrics::Reason;
use super::progress::{self, Position, Written};
use super::schema::{self, Change, Choice, SchemaFile, Version};
use super::worker::Opening;
use super::{Context, disk};
use crate::encode::TableEncoder;
use crate::{Error, Flushed};

/// A buffer up to this size is kept for the next file.
const KEEP_BUFFER: usize = 256 << 10;

/// Wall time, for `ts` of the encodings and for date directories.
pub(crate) fn wall_time() -> WallTime {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    WallTime(i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
}

/// Writes the rows of one dispatcher.
#[derive(Debug)]
pub(crate) struct TableWriter {
    context: Arc<Context>,
    table: Arc<TableInfo>,
    place: TablePlace,
    names: DataNames,
    /// Nobody else writes files of the table.
    alone: bool,
    /// It has a part of the table.
    divided: bool,
    encoder: TableEncoder,
    /// Every version on disk.
    versions: Vec<Version>,
    version: Version,
    /// Directory of the next file, once known.
    directory: Option<Directory>,
    /// Text of the next file.
    buffer: Vec<u8>,
    /// Rows in the buffer.
    rows: u64,
    /// Bytes of the batches whose callbacks wait.
    batch_bytes: usize,
    waiting: Vec<Flushed>,
    /// The last row that was taken, here or by an earlier writer whose files are there.
    last: Option<Position>,
    /// The last file of the version.
    written: Option<Written>,
    /// When the buffer has to become a file.
    pub(crate) due: Option<Instant>,
}

/// Where the next file goes.
#[derive(Debug)]
struct Directory {
    date: String,
    path: PathBuf,
    next: u64,
}

impl TableWriter {
    /// A writer for rows behind `position`: finds the version that is current there, or makes one.
    pub(crate) fn open(
        context: &Arc<Context>,
        Opening { dispatcher, table, position, divided }: Opening,
    ) -> Result<Self, Error> {
        let config = &context.config;
        let place = TablePlace::new(&config.root, &table, config.use_table_id_as_path);
        let owner = (config.across_nodes || divided).then_some(dispatcher);
        let names = DataNames::new(owner, config.encode.format.extension(), config.file_index_digits);
        let (versions, version) = choose_version(context, &place, &table, position)?;
        let mut writer = Self {
            encoder: TableEncoder::new(&context.encode, &table),
            context: Arc::clone(context),
            table,
            place,
            names,
            alone: owner.is_none(),
            divided,
            versions,
            version,
            directory: None,
            buffer: Vec::new(),
            rows: 0,
            batch_bytes: 0,
            waiting: Vec::new(),
            last: None,
            written: None,
            due: None,
        };
        writer.recover_progress()?;
        Ok(writer)
    }

    /// Changes to another shape; what is buffered of the old one is written first.
    pub(crate) fn reshape(&mut self, table: Arc<TableInfo>, position: Ts) -> Result<(), Error> {
        if *self.table == *table {
            return Ok(());
        }
        self.flush(Reason::Barrier)?;
        let position = position.max(self.last.map_or(Ts::ZERO, |last| last.commit_ts));
        self.place =
            TablePlace::new(&self.context.config.root, &table, self.context.config.use_table_id_as_path);
        let (versions, version) = choose_version(&self.context, &self.place, &table, position)?;
        self.encoder = TableEncoder::new(&self.context.encode, &table);
        self.table = table;
        self.versions = versions;
        self.enter(version)
    }

    /// Bytes that this writer keeps in memory, directly and as unreturned credit.
    pub(crate) fn held(&self) -> usize {
        self.buffer.len() + self.batch_bytes
    }

    /// Whether something waits for a file.
    pub(crate) fn is_dirty(&self) -> bool {
        !self.buffer.is_empty() || !self.waiting.is_empty()
    }

    /// Takes a batch; `flushed` runs when all of it is durable.
    pub(crate) fn write(&mut self, batch: &RowBatch, flushed: Flushed) -> Result<(), Error> {
        if batch.table.version != self.table.version {
            let before = batch.first_commit_ts().unwrap_or_default().before();
            self.reshape(Arc::clone(&batch.table), before)?;
        }
        self.batch_bytes += batch.bytes();
        let built = wall_time();
        for row in batch.iter() {
            let position = Position { commit_ts: row.txn.commit_ts, row: row.row_number };
            // A row that was taken before comes again after a restart; a file that has it is there.
            if self.last.is_some_and(|last| position <= last) {
                continue;
            }
            match row.op {
                RowOp::Insert | RowOp::Update | RowOp::Delete => self.row(&row, built)?,
                RowOp::Truncate => self.start_empty(position.commit_ts)?,
                RowOp::CopyStart => {
                    // Others may have begun with their parts of the same copy: all of it is in a version of its own.
                    if self.divided || self.has_data()? {
                        self.start_empty(position.commit_ts)?;
                    }
                }
            }
            self.last = self.last.max(Some(position));
        }
        self.waiting.push(flushed);
        if self.buffer.is_empty() {
            self.complete();
        }
        Ok(())
    }

    fn row(&mut self, row: &RowChange<'_>, built: WallTime) -> Result<(), Error> {
        if self.buffer.is_empty() {
            self.encoder.header(&mut self.buffer);
        }
        self.encoder
            .encode(row, built, &mut self.buffer)
            .map_err(|e| Error::Rejected { code: "CDC:ErrEncodeFailed", what: e.to_string() })?;
        self.rows += 1;
        if self.buffer.len() >= self.context.config.file_size {
            self.last = Some(Position { commit_ts: row.txn.commit_ts, row: row.row_number });
            self.write_file(Reason::Size)?;
        }
        Ok(())
    }

    /// Makes everything taken durable and says so.
    pub(crate) fn flush(&mut self, reason: Reason) -> Result<(), Error> {
        if !self.buffer.is_empty() {
            self.write_file(reason)?;
        }
        self.complete();
        Ok(())
    }

    /// Tells the batches whose rows are all durable.
    fn complete(&mut self) {
        self.batch_bytes = 0;
        self.waiting.drain(..).for_each(Flushed::done);
    }

    /// Turns the buffer into the next file, then names it in the index file.
    fn write_file(&mut self, reason: Reason) -> Result<(), Error> {
        self.context.stop.permitted()?;
        let started = Instant::now();
        let mut directory = self.enter_directory()?;
        let stop = &self.context.stop;
        let checksum = crc32fast::hash(&self.buffer);
        loop {
            let name = self.names.data(directory.next);
            let written = Written {
                changefeed: self.context.changefeed.gid,
                file: progress::relative(&directory.date, &name),
                bytes: self.buffer.len() as u64,
                crc32: checksum,
                last: self.last.unwrap_or_default(),
            };
            self.write_progress(&written);
            let taken = disk::persist(stop, &directory.path.join(&name), || {
                disk::create_permitted(stop, &directory.path, &name, &self.buffer)
            })?;
            if taken {
                self.written = Some(written);
                break;
            }
            // Somebody else has the name: a predecessor that was not quite gone. Its file stays.
            tracing::warn!(file = %directory.path.join(&name).display(), "the name of a data file is taken");
            directory.next = disk::persist(stop, &directory.path, || self.next_index(&directory.path))?;
        }
        disk::persist(stop, &directory.path, || disk::sync_dir(&directory.path))?;
        let index = format!("{}\n", self.names.data(directory.next));
        let meta = directory.path.join(layout::META);
        disk::persist(stop, &meta, || disk::replace(&meta, self.names.index_file(), index.as_bytes()))?;
        directory.next += 1;
        self.directory = Some(directory);
        self.context.metrics.flushed(self.buffer.len(), started.elapsed(), reason);
        self.context.sink_metrics.flushed(self.rows, self.buffer.len());
        self.rows = 0;
        self.buffer.clear();
        if self.buffer.capacity() > KEEP_BUFFER {
            self.buffer = Vec::new();
        }
        Ok(())
    }

    /// The directory of the current version and date. Dates never go back, not even with the clock.
    fn enter_directory(&mut self) -> Result<Directory, Error> {
        let today = layout::date_dir(self.context.config.date_separator, wall_time().0.div_euclid(1_000_000));
        if let Some(directory) = self.directory.take().filter(|directory| today <= directory.date) {
            return Ok(directory);
        }
        let version = self.place.version(self.version.version);
        let stop = &self.context.stop;
        let date = if today.is_empty() {
            today
        } else {
            let dates = disk::persist(stop, &version, || disk::list(&version))?;
            let alike = |name: &String| layout::is_date_dir(name) && name.len() == today.len();
            dates.into_iter().filter(alike).max().map_or(today.clone(), |newest| newest.max(today))
        };
        let path = if date.is_empty() { version } else { version.join(&date) };
        let next = disk::persist(stop, &path, || self.next_index(&path))?;
        Ok(Directory { date, path, next })
    }

    /// One behind the highest file that is there or that the index file names: a file may be there that the
    /// index does not know (a crash between both), and a consumer may have taken files away.
    fn next_index(&self, directory: &std::path::Path) -> std::io::Result<u64> {
        let names = disk::list(directory)?;
        disk::remove_old_temporaries(directory, &names);
        let named = disk::read(&directory.join(layout::META).join(self.names.index_file()))?
            .and_then(|bytes| String::from_utf8(bytes).ok())
            .and_then(|text| self.names.parse(text.trim_end()));
        let highest = names.iter().filter_map(|name| self.names.parse(name)).chain(named).max();
        Ok(highest.map_or(1, |index| index.saturating_add(1)))
    }

    /// Begins a version without the rows before `commit_ts`.
    fn start_empty(&mut self, commit_ts: Ts) -> Result<(), Error> {
        self.flush(Reason::Barrier)?;
        let query = format!("TRUNCATE TABLE {}.{}", quoted(&self.table.schema), quoted(&self.table.name));
        let wanted = commit_ts.max(self.version.version.after());
        let version = schema::free(&self.versions, wanted, self.version.checksum);
        let ids = self.context.config.output_column_id;
        let mut file = SchemaFile::table(&self.table, version, Change::Truncate, query, ids);
        file.commit_ts = (version != commit_ts).then_some(commit_ts);
        let meta = self.place.meta();
        disk::persist(&self.context.stop, &meta, || file.write(&meta))?;
        let version = Version { version, checksum: file.checksum(), begins: commit_ts };
        if !self.versions.contains(&version) {
            self.versions.push(version);
        }
        self.enter(version)
    }

    fn enter(&mut self, version: Version) -> Result<(), Error> {
        self.version = version;
        self.directory = None;
        self.recover_progress()
    }

    /// Whether the table has rows, buffered or in any version's files.
    fn has_data(&self) -> Result<bool, Error> {
        if !self.buffer.is_empty() {
            return Ok(true);
        }
        for version in &self.versions {
            let dir = self.place.version(version.version);
            let extension = self.context.config.encode.format.extension();
            let found = disk::persist(&self.context.stop, &dir, || progress::data_files(&dir, extension))?;
            if !found.is_empty() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Learns from the version's directory which rows are there already.
    fn recover_progress(&mut self) -> Result<(), Error> {
        self.written = None;
        if !self.alone {
            return Ok(());
        }
        let dir = self.place.version(self.version.version);
        let extension = self.context.config.encode.format.extension();
        let feed = self.context.changefeed.gid;
        self.written = disk::persist(&self.context.stop, &dir, || progress::recover(&dir, extension, feed))?;
        if let Some(written) = &self.written {
            self.last = self.last.max(Some(written.last));
        }
        Ok(())
    }

    /// Notes what the next file will hold. Losing the note costs repeated rows, never rows.
    fn write_progress(&self, next: &Written) {
        // Where the output's directory is gone, the note must not make it anew.
        if !self.alone || self.context.stop.root().is_there().is_err() {
            return;
        }
        let dir = self.place.version(self.version.version);
        if let Err(e) = progress::write(&dir, next, self.written.as_ref()) {
            tracing::debug!(error = %e, "progress of a table is not noted");
        }
    }
}

/// An SQL identifier.
fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Finds the version of a shape at a position, writing its schema file if there is none.
fn choose_version(
    context: &Context,
    place: &TablePlace,
    table: &TableInfo,
    position: Ts,
) -> Result<(Vec<Version>, Version), Error> {
    let meta = place.meta();
    let files = disk::persist(&context.stop, &meta, || match schema::read_all(&meta) {
        Err(e) if e.kind() == std::io::ErrorKind::InvalidData => Ok(Err(e)),
        other => other.map(Ok),
    })?;
    let files = files.map_err(|e| Error::Rejected {
        code: "CDC:ErrStorageSinkSchemaFile",
        what: format!("{}: {e}; restore the file or choose an empty directory", meta.display()),
    })?;
    let mut versions: Vec<Version> = files.iter().map(|(version, _)| *version).collect();
    let ids = context.config.output_column_id;
    let mut file = SchemaFile::table(table, table.version, Change::None, String::new(), ids);
    let version = match schema::choose(&versions, position, file.checksum(), table.version) {
        Choice::Existing(version) => version,
        Choice::New(number) => {
            file.table_version = number;
            disk::persist(&context.stop, &meta, || file.write(&meta))?;
            let version = Version { version: number, checksum: file.checksum(), begins: number };
            versions.push(version);
            version
        }
    };
    Ok((versions, version))
}
