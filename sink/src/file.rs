//! The file sink: canal-json, debezium or CSV files in a directory (dataplane §8).
//!
//! Rows go to one of a few writing threads by table; a [`writer::TableWriter`] turns them into text and the
//! text into files. `file/layout.rs` has the paths, `file/schema.rs` says which version directory rows belong
//! to, `file/disk.rs` how a file appears complete or not at all, `file/checkpoint.rs` writes `metadata`, and
//! `file/read.rs` reads all of it back.
//!
//! - A batch is told flushed when its data file, the directory and the index file are durable.
//! - A data file is never overwritten, and a restart continues behind the highest file that is there.
//! - Rows that an earlier run of this changefeed has in its files are not written again
//!   (`file/progress.rs`). Where that cannot be known they are written twice, never left out.
//! - A truncation is a new version directory whose schema file says so; so is an initial copy into a table
//!   that already has files, or that is divided.
//! - A disk that is full, broken or gone is waited for, however long, and told as trouble (`file/trouble.rs`): what
//!   has to be written is kept in memory, and nothing more is taken than fits there. What only a person can change,
//!   such as a permission, ends the sink. The output's directory is made when the sink is opened and never again, so
//!   that nothing is written under a mount point whose file system is gone.
//! - A dispatcher of a part of a table has files of its own, `CDC_<dispatcher>_<index>`. What it wrote is not known to
//!   the one that has these keys after it, which writes it again; an update that takes a row from one part to another
//!   is a delete in one file and an insert in another, of one `(commit ts, row number)`.

mod checkpoint;
mod config;
mod ddl;
mod disk;
mod layout;
pub mod metrics;
pub(crate) mod progress;
mod read;
mod schema;
mod trouble;
mod worker;
mod writer;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

use async_trait::async_trait;
use event::{BlockEvent, RowBatch, TableInfo};
use heartbeatpb::{ChangefeedId, DispatcherId, TableId, TableSpan, Ts, WallTime, WritePermit};
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};
use tokio_util::sync::CancellationToken;

pub use self::config::FileConfig;
pub use self::read::{Replay, ReplayError, ReplayedTable, Rows, replay};

use self::checkpoint::{CheckpointFile, Directory, SharedCheckpoint};
use self::metrics::FileMetrics;
use self::trouble::Troubles;
use self::worker::{Job, Opening, Worker};
use crate::encode::EncodeOptions;
use crate::metrics::SinkMetrics;
use crate::{Error, Flushed, Sink, TableStart};

/// What the threads of a sink share.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) changefeed: ChangefeedId,
    pub(crate) config: FileConfig,
    pub(crate) encode: Arc<EncodeOptions>,
    pub(crate) stop: disk::Stop,
    pub(crate) metrics: FileMetrics,
    pub(crate) sink_metrics: SinkMetrics,
    /// Bytes in memory, of all workers.
    held: AtomicUsize,
    workers: Vec<WorkerSlot>,
    failure: Mutex<Option<Error>>,
    failed: AtomicBool,
    alarm: Notify,
}

/// What others know about a worker.
#[derive(Debug)]
struct WorkerSlot {
    jobs: Sender<Job>,
    held: AtomicUsize,
    /// Asked to write, and has not begun.
    asked: AtomicBool,
}

impl Context {
    /// Remembers the first fatal error.
    pub(crate) fn fail(&self, error: Error) {
        let mut failure = self.failure.lock();
        if failure.is_none() && !matches!(error, Error::Closed) {
            self.sink_metrics.dml_errors.increment(1);
            *failure = Some(error);
            self.failed.store(true, Ordering::Release);
            self.alarm.notify_one();
        }
    }

    fn set_held(&self, worker: usize, before: usize, after: usize) {
        if after >= before {
            self.held.fetch_add(after - before, Ordering::Relaxed);
        } else {
            self.held.fetch_sub(before - after, Ordering::Relaxed);
        }
        self.workers[worker].held.store(after, Ordering::Relaxed);
        #[expect(clippy::cast_precision_loss, reason = "gauges hold floats")]
        self.metrics.memory.set(self.held.load(Ordering::Relaxed) as f64);
    }

    /// The worker that keeps most in memory.
    fn fullest(&self) -> Option<usize> {
        (0..self.workers.len()).max_by_key(|&id| self.workers[id].held.load(Ordering::Relaxed))
    }

    fn ask_relief(&self, worker: usize) {
        if !self.workers[worker].asked.swap(true, Ordering::AcqRel) {
            self.send(worker, Job::Relieve);
        }
    }

    fn relieved(&self, worker: usize) {
        self.workers[worker].asked.store(false, Ordering::Release);
    }

    /// A worker that is gone has reported why; what it would have done is not told to be flushed.
    fn send(&self, worker: usize, job: Job) {
        if self.workers[worker].jobs.send(job).is_err() {
            tracing::debug!(worker, "a writer of the file sink is gone");
        }
    }
}

/// Writes row changes as files below a directory.
#[derive(Debug)]
pub struct FileSink {
    context: Arc<Context>,
    /// Taken by `run`.
    queues: Mutex<Option<Vec<Receiver<Job>>>>,
    dispatchers: Mutex<BTreeMap<DispatcherId, (TableSpan, Ts)>>,
    checkpoint: SharedCheckpoint,
}

/// Runs disk work off the async threads.
async fn blocking<T: Send + 'static>(
    f: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(f).await.unwrap_or(Err(Error::Closed))
}

impl FileSink {
    /// Opens the sink: creates the directory and makes sure that files can be written there.
    ///
    /// # Errors
    /// When the directory cannot be used.
    pub async fn open(config: FileConfig, changefeed: &ChangefeedId) -> Result<Self, Error> {
        Self::open_permitted(config, changefeed, WritePermit::always()).await
    }

    /// As [`FileSink::open`], and no file appears while `permit` does not hold. Nobody else can keep this process from
    /// writing files, so that it is looked at once more between the disk and the file's name.
    ///
    /// # Errors
    /// As [`FileSink::open`].
    pub async fn open_permitted(
        config: FileConfig,
        changefeed: &ChangefeedId,
        permit: WritePermit,
    ) -> Result<Self, Error> {
        let path = config.root.clone();
        let root = blocking(move || {
            probe(&path)?;
            disk::Root::of(&path).map_err(|e| disk::error(&path, e))
        })
        .await?;
        let troubles = Troubles::default();
        let metrics = FileMetrics::new(changefeed);
        let (queues, workers): (Vec<_>, Vec<_>) = (0..config.workers)
            .map(|_| {
                let (jobs, queue) = channel();
                (queue, WorkerSlot { jobs, held: AtomicUsize::new(0), asked: AtomicBool::new(false) })
            })
            .unzip();
        let directory =
            Directory { path: config.root.clone(), root: root.clone(), troubles: troubles.clone() };
        let checkpoint = Arc::new(CheckpointFile::new(directory, permit.clone(), metrics.clone()));
        let context = Arc::new(Context {
            changefeed: changefeed.clone(),
            encode: Arc::new(config.encode.clone()),
            config,
            stop: disk::Stop::new(permit, root, troubles),
            metrics,
            sink_metrics: SinkMetrics::new(changefeed, "cloudstorage"),
            held: AtomicUsize::new(0),
            workers,
            failure: Mutex::new(None),
            failed: AtomicBool::new(false),
            alarm: Notify::new(),
        });
        let dispatchers = Mutex::new(BTreeMap::new());
        Ok(Self { context, queues: Mutex::new(Some(queues)), dispatchers, checkpoint })
    }

    /// Checks that files can be written, before a changefeed is created. Leaves no file behind, and returns
    /// what a person should know.
    ///
    /// # Errors
    /// When the directory cannot be used.
    pub async fn check(config: &FileConfig) -> Result<Vec<String>, Error> {
        let root = config.root.clone();
        let known = blocking(move || {
            probe(&root)?;
            checkpoint::read(&root).map_err(|e| disk::error(&root, e))
        })
        .await?;
        let warn = |checkpoint: Ts| {
            format!(
                "the directory has the output of an earlier changefeed up to {checkpoint}; readers will take both \
                 as one, so choose an empty directory unless the upstream is the same"
            )
        };
        Ok(known.map(warn).into_iter().collect())
    }

    fn worker_of(&self, table: TableId) -> usize {
        let hash = xxhash_rust::xxh3::xxh3_64(&table.0.to_be_bytes());
        usize::try_from(hash % self.context.workers.len() as u64).unwrap_or_default()
    }

    async fn ask(&self, table: TableId, job: impl FnOnce(oneshot::Sender<()>) -> Job) -> Result<(), Error> {
        let (done, answer) = oneshot::channel();
        self.context.send(self.worker_of(table), job(done));
        answer.await.map_err(|_| Error::Closed)
    }

    fn start(&self) -> Result<Vec<std::thread::JoinHandle<()>>, Error> {
        let queues = self.queues.lock().take().ok_or(Error::Closed)?;
        queues
            .into_iter()
            .enumerate()
            .map(|(id, queue)| {
                let worker = Worker::new(Arc::clone(&self.context), id);
                std::thread::Builder::new()
                    .name(format!("file-sink-{id}"))
                    .spawn(move || worker.run(&queue))
                    .map_err(|e| Error::Unavailable {
                        what: "cannot start a thread".into(),
                        source: Some(Box::new(e)),
                    })
            })
            .collect()
    }
}

/// Makes sure that a file can be created in the directory.
fn probe(root: &Path) -> Result<(), Error> {
    let name = format!(".millrace-probe-{}", DispatcherId::random());
    disk::ensure_dir(root)
        .and_then(|()| disk::create(root, &name, b""))
        .and_then(|_| std::fs::remove_file(root.join(&name)))
        .map_err(|e| disk::error(root, e))
}

/// Removes the notes of every version below a directory.
fn forget(dir: &Path, depth: usize) -> std::io::Result<()> {
    progress::forget(dir)?;
    if depth > 0 {
        for name in disk::list(dir)? {
            let path = dir.join(name);
            if path.is_dir() {
                forget(&path, depth - 1)?;
            }
        }
    }
    Ok(())
}

#[async_trait]
impl Sink for FileSink {
    async fn run(&self, shutdown: CancellationToken) -> Result<(), Error> {
        let threads = self.start()?;
        tokio::select! {
            biased;
            () = shutdown.cancelled() => {}
            () = self.context.alarm.notified() => {}
            () = self.checkpoint.run() => {}
        }
        self.context.stop.stop();
        for worker in 0..self.context.workers.len() {
            self.context.send(worker, Job::Stop);
        }
        let joined =
            tokio::task::spawn_blocking(move || threads.into_iter().all(|thread| thread.join().is_ok()))
                .await;
        if let Some(error) = self.context.failure.lock().take() {
            return Err(error);
        }
        if !matches!(joined, Ok(true)) {
            return Err(Error::Closed);
        }
        self.checkpoint.close().await;
        Ok(())
    }

    fn healthy(&self) -> bool {
        !self.context.failed.load(Ordering::Acquire)
    }

    fn trouble(&self) -> Option<Error> {
        self.context.stop.troubles().told()
    }

    async fn open_dispatcher(
        &self,
        dispatcher: DispatcherId,
        span: &TableSpan,
        start_ts: Ts,
    ) -> Result<TableStart, Error> {
        self.dispatchers.lock().insert(dispatcher, (span.clone(), start_ts));
        Ok(TableStart { start_ts, skip_dml_at_start: false })
    }

    async fn open_table(&self, dispatcher: DispatcherId, table: &TableInfo) -> Result<(), Error> {
        let known = self.dispatchers.lock().get(&dispatcher).cloned();
        let divided = known.as_ref().is_some_and(|(span, _)| !span.is_whole());
        let position = known.map_or(table.version.before(), |(_, start_ts)| start_ts);
        let opening = Opening { dispatcher, table: Arc::new(table.clone()), position, divided };
        self.ask(table.id, |done| Job::Open { opening, done }).await
    }

    fn write_rows(&self, dispatcher: DispatcherId, batch: RowBatch, flushed: Flushed) {
        self.context.send(self.worker_of(batch.table.id), Job::Rows { dispatcher, batch, flushed });
    }

    async fn flush_before_block(&self, dispatcher: DispatcherId) -> Result<(), Error> {
        let known = self.dispatchers.lock().get(&dispatcher).map(|(span, _)| span.table);
        let Some(table) = known else { return Ok(()) };
        let started = Instant::now();
        self.ask(table, |done| Job::Flush { dispatcher, done }).await?;
        self.context.metrics.block_flush.record(started.elapsed().as_secs_f64());
        Ok(())
    }

    async fn write_block_event(&self, event: &BlockEvent) -> Result<(), Error> {
        match event {
            BlockEvent::Ddl(ddl) if ddl.not_sync => Ok(()),
            BlockEvent::Ddl(ddl) => {
                let (context, change) = (Arc::clone(&self.context), Arc::clone(ddl));
                let result = blocking(move || ddl::write(&context, &change)).await;
                if result.is_err() {
                    self.context.sink_metrics.ddl_errors.increment(1);
                }
                result
            }
            BlockEvent::SyncPoint(_) => Ok(()),
        }
    }

    fn publish_checkpoint(&self, checkpoint: Ts, _time: WallTime) {
        self.checkpoint.publish(checkpoint);
    }

    fn close_dispatcher(&self, dispatcher: DispatcherId) {
        let known = self.dispatchers.lock().remove(&dispatcher);
        if let Some((span, _)) = known {
            self.context.send(self.worker_of(span.table), Job::Close { dispatcher });
        }
    }

    async fn forget_changefeed(&self) -> Result<(), Error> {
        let (root, context) = (self.context.config.root.clone(), Arc::clone(&self.context));
        blocking(move || {
            context.stop.permitted()?;
            forget(&root, 3).map_err(|e| disk::error(&root, e))
        })
        .await
    }

    fn wants_checkpoints(&self) -> bool {
        true
    }
}
