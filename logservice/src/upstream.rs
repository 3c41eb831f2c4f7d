//! What an upstream offers: prerequisites, retention of its log, tables, and a reader that fills the store.
//!
//! A commit ts names one transaction, and at most one schema change: an upstream whose transactions may hold several
//! joins them or gives each a commit ts of its own (**LS-8**).

mod copying;
pub mod generator;
pub mod metrics;
pub mod postgres;
mod publish;
mod split;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use async_trait::async_trait;
use event::{CopyTarget, PartWriter, TableInfo};
use heartbeatpb::config::DdlConfig;
use heartbeatpb::{ChangefeedId, MaintainerEpoch, TableId, TableSpan, Ts, WallTime, codes};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub use self::copying::{CopyBoard, CopySum, TableCopy, TableCopyState};
pub use self::publish::{PublishRules, TablePart};
pub use self::split::SplitPoints;
use crate::crew::{CopyCrew, CopyOrder};
use crate::event_store::{Gate, StoreWriter};
use crate::{Error, TableFilter};

/// What a changefeed wants from its upstream. `Debug` hides the URI.
#[derive(Clone)]
pub struct FeedSpec {
    /// The changefeed; its gid names the retention.
    pub changefeed: ChangefeedId,
    /// Epoch of the owner that reads; a reader with a smaller one gives way.
    pub epoch: Option<MaintainerEpoch>,
    /// Start of the changefeed: the version of the tables' first shape. Zero before it is known.
    pub start_ts: Ts,
    /// Where the upstream is.
    pub upstream_uri: String,
    /// Which tables are wanted; carries the case sensitivity.
    pub filter: Arc<TableFilter>,
    /// What of the tables is wanted, where that is not all.
    pub publish: Arc<PublishRules>,
    /// Whether tables without a key are wanted too.
    pub force_replicate: bool,
    /// Whether tables that cannot be replicated are skipped instead of refused.
    pub ignore_ineligible: bool,
    /// Whether existing rows are copied first.
    pub initial_copy: bool,
    /// Tables or parts of tables copied at the same time; at least one.
    pub copy_parallel: usize,
    /// About how large a part of a table is. In bytes.
    pub copy_part_bytes: u64,
    /// Whether large transactions are read before they end, where the upstream can send them so.
    pub streaming: bool,
    /// A downstream that may take existing rows itself. Without one they come like changes.
    pub copy_target: Option<Arc<dyn CopyTarget>>,
    /// Other nodes that write parts of an initial copy. Without them this one writes all of it.
    pub copy_crew: Option<CopyCrew>,
    /// Who sees to the rows of tables that come while the log is read. Without one, tables with rows do not come.
    pub entrance: Option<Arc<dyn Entrance>>,
    /// What is done about changes of the schema.
    pub ddl: DdlConfig,
}

impl fmt::Debug for FeedSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FeedSpec")
            .field("changefeed", &self.changefeed)
            .field("epoch", &self.epoch)
            .field("start_ts", &self.start_ts)
            .field("filter", &self.filter)
            .field("publish", &!self.publish.is_empty())
            .field("force_replicate", &self.force_replicate)
            .field("ignore_ineligible", &self.ignore_ineligible)
            .field("initial_copy", &self.initial_copy)
            .field("copy_parallel", &self.copy_parallel)
            .field("copy_part_bytes", &self.copy_part_bytes)
            .field("streaming", &self.streaming)
            .field("copy_target", &self.copy_target.is_some())
            .field("copy_crew", &self.copy_crew.is_some())
            .field("entrance", &self.entrance.is_some())
            .field("ddl", &self.ddl)
            .finish_non_exhaustive()
    }
}

/// Sees to the rows of tables that come to a changefeed while its log is read, and that nobody has copied.
#[async_trait]
pub trait Entrance: Send + Sync {
    /// A table is about to come. When this returns it is noted durably that its rows have to be copied, and no change of it
    /// is applied before that. False: the downstream does not take rows so, and the table cannot come.
    ///
    /// # Errors
    /// When the downstream does not answer or refuses.
    async fn enter(&self, table: TableId, name: &str) -> Result<bool, Error>;
}

/// A table of the upstream.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SourceTable {
    /// Its shape.
    pub info: Arc<TableInfo>,
    /// Whether its rows can be divided into key ranges: [`TableInfo::is_divisible`], and nothing else keeps rows apart.
    pub splittable: bool,
    /// What of it is replicated.
    pub part: TablePart,
}

/// Result of [`Upstream::check`]: the upstream can be read.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct CheckReport {
    /// Wanted tables that can be replicated.
    pub eligible: Vec<SourceTable>,
    /// Wanted tables that cannot, each with the reason and what to do.
    pub ineligible: Vec<(SourceTable, String)>,
    /// What a person should know although it prevents nothing.
    pub warnings: Vec<String>,
}

/// A position and its wall time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StartPoint {
    /// The position.
    pub start_ts: Ts,
    /// Upstream wall time when it was taken.
    pub time: WallTime,
}

/// Which database an upstream is: two URIs with one identity are one database.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UpstreamIdentity {
    /// Identifies the server's data.
    pub system: u64,
    /// Identifies the database in it.
    pub database_oid: u32,
    /// Name of the database.
    pub database: String,
    /// Version in the server's words.
    pub version: String,
}

/// Where a reader begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReaderStart {
    /// Start of the changefeed.
    pub start_ts: Ts,
    /// Its persisted checkpoint; equal to `start_ts` when nothing has been replicated.
    pub checkpoint: Ts,
}

/// What a reader is doing now, as a number that fits an atomic.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum ReaderPhase {
    /// Not connected yet, or waiting before it tries again.
    Connecting = 0,
    /// Copying existing rows.
    Copying = 1,
    /// Following the log.
    Streaming = 2,
    /// Holding still until the store has room.
    WaitingForRoom = 3,
    /// Ended.
    Stopped = 4,
}

/// Counters of a reader, written by it alone and read by anyone.
#[derive(Debug, Default)]
pub struct ReaderProgress {
    /// Tables to copy.
    pub copy_tables_total: AtomicU64,
    /// Tables copied.
    pub copy_tables_done: AtomicU64,
    /// Rows copied.
    pub copy_rows: AtomicU64,
    /// The copy table by table.
    pub copy: CopyBoard,
    /// Row changes read from the log.
    pub log_rows: AtomicU64,
    /// Transactions read from the log.
    pub transactions: AtomicU64,
    /// Bytes received.
    pub bytes: AtomicU64,
    /// Position of the last complete information received.
    pub received: AtomicU64,
    /// Last position confirmed to the upstream.
    pub confirmed: AtomicU64,
    /// Times that the connection was lost.
    pub reconnects: AtomicU64,
    /// Whether the log connection stands.
    pub connected: AtomicBool,
    phase: std::sync::atomic::AtomicU8,
    last_error: parking_lot::Mutex<Option<(&'static str, String)>>,
}

impl ReaderProgress {
    /// What the reader is doing.
    #[must_use]
    pub fn phase(&self) -> ReaderPhase {
        match self.phase.load(Ordering::Relaxed) {
            1 => ReaderPhase::Copying,
            2 => ReaderPhase::Streaming,
            3 => ReaderPhase::WaitingForRoom,
            4 => ReaderPhase::Stopped,
            _ => ReaderPhase::Connecting,
        }
    }

    /// Counts rows of a copy that are on their way.
    pub(crate) fn copied(&self, table: &TableCopy, rows: u64, bytes: u64) {
        table.add(rows, bytes);
        self.copy_rows.fetch_add(rows, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Records what the reader is doing.
    pub fn set_phase(&self, phase: ReaderPhase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    /// The last problem that the reader met and got over, or is trying to.
    #[must_use]
    pub fn last_error(&self) -> Option<String> {
        self.last_error.lock().as_ref().map(|(_, text)| text.clone())
    }

    /// The same with its stable code.
    #[must_use]
    pub fn last_failure(&self) -> Option<(&'static str, String)> {
        self.last_error.lock().clone()
    }

    /// Records what an upstream waits for, or that there is no problem any more.
    pub fn set_last_error(&self, error: Option<String>) {
        *self.last_error.lock() = error.map(|text| (codes::UPSTREAM_UNAVAILABLE, text));
    }

    /// Records a problem.
    pub fn set_failure(&self, error: &Error) {
        *self.last_error.lock() = Some((error.code(), error.chain()));
    }
}

/// The administrative side of an upstream, and the source of its readers.
#[async_trait]
pub trait Upstream: Send + Sync {
    /// Checks every prerequisite and lists the wanted tables. Changes nothing.
    ///
    /// # Errors
    /// A named error for the first prerequisite that does not hold.
    async fn check(&self, spec: &FeedSpec) -> Result<CheckReport, Error>;

    /// Makes the upstream keep its log from now on, or from `at`. Adopts what an earlier call has made.
    ///
    /// # Errors
    /// When the log from `at` on is gone, when something else has the name, or as [`Upstream::check`].
    async fn create_retention(&self, spec: &FeedSpec, at: Option<Ts>) -> Result<StartPoint, Error>;

    /// Lets the upstream forget its log. Idempotent.
    ///
    /// # Errors
    /// When the upstream cannot be asked, or somebody else keeps using it.
    async fn drop_retention(&self, changefeed: &ChangefeedId) -> Result<(), Error>;

    /// The current end of the log.
    ///
    /// # Errors
    /// When the upstream cannot be asked.
    async fn current_position(&self) -> Result<StartPoint, Error>;

    /// Which database this is.
    ///
    /// # Errors
    /// When the upstream cannot be asked.
    async fn identity(&self) -> Result<UpstreamIdentity, Error>;

    /// The tables that a reader of `spec` delivers, in order of their ids.
    ///
    /// # Errors
    /// When the upstream cannot be asked.
    async fn tables(&self, spec: &FeedSpec) -> Result<Vec<SourceTable>, Error>;

    /// Keys that divide a span into at most `pieces` parts with about as many rows each, and an estimate of the span's
    /// size. The cost is bounded: a sample is read. A table that cannot be divided has no such keys.
    ///
    /// # Errors
    /// When the upstream cannot be asked.
    async fn split_points(
        &self,
        spec: &FeedSpec,
        span: &TableSpan,
        pieces: usize,
    ) -> Result<SplitPoints, Error>;

    /// Copies a table again, as of one moment, into a downstream that keeps a request for it, while the log is read and the
    /// other tables go on. Its streams stand still at `gate` meanwhile. `progress` is this copy's own.
    ///
    /// # Errors
    /// When upstream or downstream cannot do that, or either does not answer: then the downstream's table is as it was.
    async fn resync(
        &self,
        _spec: &FeedSpec,
        _table: TableId,
        _gate: &Gate,
        _progress: &Arc<ReaderProgress>,
        _shutdown: &CancellationToken,
    ) -> Result<(), Error> {
        Err(Error::UpstreamPrerequisite { what: "tables of this upstream cannot be copied again".to_owned() })
    }

    /// Reads a part of a table in a snapshot of another node's copy, and writes it. Answers its rows and what they took on
    /// their way, in bytes.
    ///
    /// # Errors
    /// When upstream or downstream cannot do that, or either does not answer.
    async fn copy_part(&self, _order: &CopyOrder, _writer: Box<dyn PartWriter>) -> Result<(u64, u64), Error> {
        Err(Error::UpstreamPrerequisite {
            what: "tables of this upstream are not copied in parts".to_owned(),
        })
    }

    /// Reads the log into the store until shutdown (then `Ok`) or a fatal error. Reconnects by itself.
    /// `persisted` carries the persisted checkpoint: the only position that is confirmed to the upstream.
    ///
    /// # Errors
    /// What only a person can put right; see [`Error::is_retryable`].
    async fn run_reader(
        &self,
        spec: FeedSpec,
        start: ReaderStart,
        writer: StoreWriter,
        persisted: watch::Receiver<Ts>,
        progress: Arc<ReaderProgress>,
        shutdown: CancellationToken,
    ) -> Result<(), Error>;
}

/// The upstream that a URI names; nothing is connected yet.
///
/// # Errors
/// When the URI is wrong or its scheme is not known.
pub fn open(uri: &str) -> Result<Arc<dyn Upstream>, Error> {
    match uri.trim().split_once("://").map(|(scheme, _)| scheme.to_ascii_lowercase()).as_deref() {
        Some("postgres" | "postgresql") => Ok(Arc::new(postgres::Postgres::new(uri)?)),
        Some("generator") => Ok(Arc::new(generator::Generator::new(uri)?)),
        _ => Err(Error::UpstreamUri { reason: "its scheme is none of: postgres, generator".to_owned() }),
    }
}
