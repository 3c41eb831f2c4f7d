//! What a dispatcher manager needs from a downstream.

use async_trait::async_trait;
use event::{BlockEvent, RowBatch, TableInfo};
use heartbeatpb::{DispatcherId, TableSpan, Ts, WallTime};
use tokio_util::sync::CancellationToken;

use crate::Error;

/// Runs when a batch is durable downstream. Dropping it without [`Flushed::done`] tells the dispatcher
/// nothing, so its checkpoint stays: an error path needs no special care.
pub struct Flushed(Option<Box<dyn FnOnce() + Send>>);

impl Flushed {
    /// Calls `f` once the batch is durable.
    pub fn new(f: impl FnOnce() + Send + 'static) -> Self {
        Self(Some(Box::new(f)))
    }

    /// The batch is durable, or was intentionally left out.
    pub fn done(mut self) {
        if let Some(f) = self.0.take() {
            f();
        }
    }
}

impl std::fmt::Debug for Flushed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Flushed")
    }
}

/// How a dispatcher has to start, after the downstream was asked what it already has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TableStart {
    /// Events with a larger commit ts are wanted. Never smaller than what was asked for.
    pub start_ts: Ts,
    /// Skip the rows at `start_ts + 1`: the DDL there is replayed.
    pub skip_dml_at_start: bool,
}

/// A downstream (dataplane §4, dispatcher §22).
///
/// - Every accepted batch is flushed at most once, in the order of its dispatcher wherever rows conflict.
/// - Memory is bounded by the caller: it holds a credit for each batch that it returns on flush, so
///   [`Sink::write_rows`] never blocks and never refuses for want of room.
/// - The first fatal error makes the sink unhealthy and is what [`Sink::run`] returns.
#[async_trait]
pub trait Sink: Send + Sync + 'static {
    /// Drives the sink until `shutdown` (then `Ok`) or its first fatal error. Called once.
    async fn run(&self, shutdown: CancellationToken) -> Result<(), Error>;

    /// Whether no fatal error has happened.
    fn healthy(&self) -> bool;

    /// Why nothing has been written for long although something is to be: the sink tries again by itself, and nobody has to
    /// do anything but the downstream's people. `None`: all is well, or it has not lasted. Asked several times a second.
    fn trouble(&self) -> Option<Error> {
        None
    }

    /// Prepares a span before its first event, for a dispatcher that would start at `start_ts`:
    /// reads what an earlier run left behind. Idempotent.
    ///
    /// A sink that knows which schema changes it has executed lets a table begin just before the last of them,
    /// without rows at it, and never behind it: the table may have to take part in that change's barrier again, and
    /// one that stands behind it proves to a new owner that everybody has passed.
    ///
    /// Spans of one table that are open at the same time may overlap: a table that is put together is opened before
    /// its parts are closed.
    async fn open_dispatcher(
        &self,
        dispatcher: DispatcherId,
        span: &TableSpan,
        start_ts: Ts,
    ) -> Result<TableStart, Error>;

    /// Tells the shape of a dispatcher's table, before its first rows and after each change.
    /// Creates the target table where the sink creates tables. Idempotent.
    async fn open_table(&self, dispatcher: DispatcherId, table: &TableInfo) -> Result<(), Error>;

    /// Takes a batch. Does not block.
    fn write_rows(&self, dispatcher: DispatcherId, batch: RowBatch, flushed: Flushed);

    /// Returns when every earlier batch of the dispatcher is durable.
    async fn flush_before_block(&self, dispatcher: DispatcherId) -> Result<(), Error>;

    /// Executes a DDL or a sync point and returns when it is durable.
    async fn write_block_event(&self, event: &BlockEvent) -> Result<(), Error>;

    /// Tells the persisted checkpoint of the changefeed; the newest one wins. Does not block.
    fn publish_checkpoint(&self, checkpoint: Ts, time: WallTime);

    /// Forgets a dispatcher; its batches in flight may still be flushed.
    fn close_dispatcher(&self, dispatcher: DispatcherId);

    /// Removes what the changefeed keeps downstream for itself (progress rows, markers): the changefeed
    /// was deleted. Never removes user data. Idempotent.
    async fn forget_changefeed(&self) -> Result<(), Error>;

    /// Whether the sink wants [`Sink::publish_checkpoint`].
    fn wants_checkpoints(&self) -> bool;
}
