//! One writing thread: owns the dispatchers whose tables hash to it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use event::{RowBatch, TableInfo};
use heartbeatpb::{DispatcherId, Ts};
use tokio::sync::oneshot;

use super::Context;
use super::metrics::Reason;
use super::writer::TableWriter;
use crate::{Error, Flushed};

/// Longest sleep of an idle thread.
const IDLE: Duration = Duration::from_secs(60);

/// What a worker is asked to do.
#[derive(Debug)]
pub(super) enum Job {
    Open {
        opening: Opening,
        done: oneshot::Sender<()>,
    },
    Rows {
        dispatcher: DispatcherId,
        batch: RowBatch,
        flushed: Flushed,
    },
    Flush {
        dispatcher: DispatcherId,
        done: oneshot::Sender<()>,
    },
    Close {
        dispatcher: DispatcherId,
    },
    /// Too much waits in memory: write half of what this worker has.
    Relieve,
    Stop,
}

/// A dispatcher that is about to write, or to write another shape.
#[derive(Debug)]
pub(super) struct Opening {
    pub(super) dispatcher: DispatcherId,
    pub(super) table: Arc<TableInfo>,
    /// Rows behind it follow.
    pub(super) position: Ts,
    /// It has a part of the table.
    pub(super) divided: bool,
}

/// A writing thread.
#[derive(Debug)]
pub(super) struct Worker {
    context: Arc<Context>,
    id: usize,
    writers: BTreeMap<DispatcherId, TableWriter>,
    /// When the buffers have to become files.
    due: BTreeSet<(Instant, DispatcherId)>,
    /// Bytes that this worker's dispatchers keep in memory.
    held: usize,
    busy: Duration,
}

/// Tells the sink when its thread panics.
struct Alarm(Arc<Context>);

impl Drop for Alarm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let what = "a writer of the file sink panicked; see the log".to_owned();
            self.0.fail(Error::Rejected { code: "CDC:ErrSinkInternal", what });
        }
    }
}

impl Worker {
    pub(super) fn new(context: Arc<Context>, id: usize) -> Self {
        Self { context, id, writers: BTreeMap::new(), due: BTreeSet::new(), held: 0, busy: Duration::ZERO }
    }

    /// Works until it is told to stop or the disk refuses for good.
    pub(super) fn run(mut self, jobs: &Receiver<Job>) {
        let alarm = Alarm(Arc::clone(&self.context));
        let busy = self.context.metrics.busy(self.id);
        loop {
            let now = Instant::now();
            let wait = self.due.first().map_or(IDLE, |(due, _)| due.saturating_duration_since(now));
            let job = match jobs.recv_timeout(wait) {
                Ok(Job::Stop) | Err(RecvTimeoutError::Disconnected) => break,
                Ok(job) => Some(job),
                Err(RecvTimeoutError::Timeout) => None,
            };
            let result = job.map_or(Ok(()), |job| self.perform(job)).and_then(|()| self.flush_due());
            busy.increment(std::mem::take(&mut self.busy).as_secs_f64());
            if let Err(e) = result {
                self.context.fail(e);
                break;
            }
        }
        drop(alarm);
        self.context.set_held(self.id, self.held, 0);
    }

    fn perform(&mut self, job: Job) -> Result<(), Error> {
        match job {
            Job::Open { opening, done } => {
                self.open(opening)?;
                // A caller that has gone away needs no answer; the same holds below.
                let _gone = done.send(());
                Ok(())
            }
            Job::Rows { dispatcher, batch, flushed } => {
                self.with(dispatcher, |writer| writer.write(&batch, flushed))?;
                self.relieve()
            }
            Job::Flush { dispatcher, done } => {
                self.with(dispatcher, |writer| writer.flush(Reason::Barrier))?;
                let _gone = done.send(());
                Ok(())
            }
            Job::Close { dispatcher } => {
                // What is buffered is not told to be flushed, so that the next owner writes it.
                if let Some(writer) = self.writers.remove(&dispatcher) {
                    if let Some(due) = writer.due {
                        self.due.remove(&(due, dispatcher));
                    }
                    self.account(writer.held(), 0);
                }
                Ok(())
            }
            Job::Relieve => {
                self.context.relieved(self.id);
                self.flush_to(self.held / 2)
            }
            Job::Stop => Ok(()),
        }
    }

    fn open(&mut self, opening: Opening) -> Result<(), Error> {
        let Opening { dispatcher, table, position, .. } = &opening;
        let (dispatcher, position) = (*dispatcher, *position);
        if self.writers.contains_key(&dispatcher) {
            let table = Arc::clone(table);
            return self.with(dispatcher, |writer| writer.reshape(table, position));
        }
        let writer = TableWriter::open(&self.context, opening)?;
        self.writers.insert(dispatcher, writer);
        Ok(())
    }

    /// Lets a writer do something and keeps the books of memory and deadlines.
    fn with(
        &mut self,
        dispatcher: DispatcherId,
        f: impl FnOnce(&mut TableWriter) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let Some(writer) = self.writers.get_mut(&dispatcher) else {
            tracing::debug!(%dispatcher, "event of a dispatcher that is not open");
            return Ok(());
        };
        let before = writer.held();
        let started = Instant::now();
        let result = f(writer);
        self.busy += started.elapsed();
        let after = writer.held();
        match (writer.due, writer.is_dirty()) {
            (None, true) => {
                let due = Instant::now() + self.context.config.flush_interval;
                writer.due = Some(due);
                self.due.insert((due, dispatcher));
            }
            (Some(due), false) => {
                writer.due = None;
                self.due.remove(&(due, dispatcher));
            }
            (None, false) | (Some(_), true) => {}
        }
        self.account(before, after);
        result
    }

    fn account(&mut self, before: usize, after: usize) {
        let held = (self.held + after).saturating_sub(before);
        self.context.set_held(self.id, self.held, held);
        self.held = held;
    }

    fn flush_due(&mut self) -> Result<(), Error> {
        let now = Instant::now();
        while let Some(&(due, dispatcher)) = self.due.first() {
            if due > now {
                break;
            }
            self.with(dispatcher, |writer| writer.flush(Reason::Interval))?;
            // A writer that is gone leaves no deadline behind; this is for the loop's own sake.
            self.due.remove(&(due, dispatcher));
        }
        Ok(())
    }

    /// Asks for files when the whole sink keeps too much in memory: the fullest worker has to write.
    fn relieve(&mut self) -> Result<(), Error> {
        if self.context.held.load(Ordering::Relaxed) <= self.context.config.buffer_bytes {
            return Ok(());
        }
        match self.context.fullest() {
            Some(id) if id != self.id => {
                self.context.ask_relief(id);
                Ok(())
            }
            Some(_) | None => self.flush_to(self.held / 2),
        }
    }

    /// Writes the fullest buffers until this worker keeps at most `target` bytes.
    fn flush_to(&mut self, target: usize) -> Result<(), Error> {
        let mut dirty: Vec<(usize, DispatcherId)> = self
            .due
            .iter()
            .filter_map(|(_, dispatcher)| Some((self.writers.get(dispatcher)?.held(), *dispatcher)))
            .collect();
        dirty.sort();
        while let Some((_, dispatcher)) = dirty.pop().filter(|_| self.held > target) {
            self.with(dispatcher, |writer| writer.flush(Reason::Quota))?;
        }
        Ok(())
    }
}
