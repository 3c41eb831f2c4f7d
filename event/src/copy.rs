//! Existing rows on a way of their own, past the stream: what a reader and a downstream that takes them agree on.
//!
//! A table is copied in parts. Each part is read in one snapshot and written in one downstream transaction, which also
//! notes the part and the position of its snapshot; so a part is there as a whole, or not at all. A copy that is cut off
//! keeps its parts, and goes on in another snapshot:
//!
//! ```text
//!   position ──▶        S1              S2
//!   keys  [   , g)      ████ copied     ·
//!         [g  , m)      ████ copied     ·                    killed between S1 and S2
//!         [m  ,  )      ░░░░ cut off    ████ copied
//!   stream              ├── from S1 on ─────────────▶        changes of [m, ) up to S2 are in the rows already
//! ```
//!
//! The stream begins at the oldest position of any part, and what a part's snapshot held already is left out for its keys:
//! a change is applied exactly if it was committed after the snapshot of the part that its key lies in. A change that
//! takes a row from one part to another is two halves, each decided by its own key. Where the row only comes, and the log
//! leaves out a value that stayed as it was, nobody has that value: then the table is copied again ([`Resync::entering`]).
//!
//! All of it holds for tables that keep their shape: a schema change between two snapshots would come in the stream to
//! tables that have it already. So the shapes that a copy began with are noted too, and with others it begins again: tables
//! that the copy has created in another shape are dropped and created anew.
//!
//! A table that the copy creates has only the keys by which its rows are found until all of its rows are there. Its other
//! indexes are made then, each in a transaction of its own, which also notes that it was made.
//!
//! Other nodes may write parts beside the one that has begun the copy, each with a right of its own
//! ([`CopySession::admit`], [`CopyTarget::write_for`]). A part is there once whoever writes it, and once a right was taken back
//! nothing of its node is under way, so that a part of which nobody knows is looked for and made by somebody else.
//!
//! - **CP-1** Parts of one table by key may have different positions; parts by block must have one, because a row may move
//!   between blocks without a change of its key.
//! - **CP-2** A part is given to another node only after the right of the one before was taken back.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use heartbeatpb::{NodeId, TableId, Ts, WallTime};

use crate::{Resync, ResyncChange, TableInfo};

/// How rows travel: a format of PostgreSQL's `COPY`, whole, with header and trailer where it has them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CopyFormat {
    /// `FORMAT text`.
    Text,
    /// `FORMAT binary`.
    Binary,
}

/// Pages of a table's file, or of each of its partitions' files.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Blocks {
    /// First page.
    pub from: u32,
    /// End page, exclusive; `u32::MAX`: none.
    pub to: u32,
}

/// Which rows of a table. Its bounds are row values: no `Debug` output shows them.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct CopyPart {
    /// First key, in the encoding of [`crate::KeyCodec`]; empty: from the beginning.
    pub start: Vec<u8>,
    /// End key, exclusive; empty: to the end.
    pub end: Vec<u8>,
    /// Only these pages; then all keys are meant.
    pub blocks: Option<Blocks>,
}

impl std::fmt::Debug for CopyPart {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.blocks {
            Some(blocks) => write!(f, "pages {}..{}", blocks.from, blocks.to),
            None if self.is_all() => f.write_str("all"),
            None => f.write_str("keys"),
        }
    }
}

impl CopyPart {
    /// Whether it is all of a table.
    #[must_use]
    pub fn is_all(&self) -> bool {
        self.start.is_empty() && self.end.is_empty() && self.blocks.is_none()
    }
}

/// A part that is downstream.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CopiedPart {
    /// Which.
    pub part: CopyPart,
    /// Position of its snapshot: what was committed up to it is in its rows.
    pub at: Ts,
    /// When the snapshot was taken.
    pub time: WallTime,
    /// Its rows.
    pub rows: u64,
    /// What they took on their way. In bytes.
    pub bytes: u64,
}

/// What a downstream has of a table.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct CopiedTable {
    /// Its parts.
    pub parts: Vec<CopiedPart>,
    /// The copy is complete, and the stream may be applied to it.
    pub finished: bool,
    /// The downstream's columns have the source's types, and their binary form means the same there.
    pub binary: bool,
    /// A copy has created it: it lacks the indexes that [`CopySession::index`] makes.
    pub created: bool,
}

/// An index of a table, in the upstream's dialect.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CopyIndex {
    /// Name, unquoted. The downstream may have to choose another.
    pub name: String,
    /// No two rows have the same key.
    pub unique: bool,
    /// Names of its columns, unquoted, if it is a unique key of all rows over nothing but columns.
    pub columns: Vec<String>,
    /// It belongs to a constraint.
    pub constraint: bool,
    /// The constraint, such as `UNIQUE (a, b)`; of another index what follows `USING`, such as `btree (a) WHERE b`.
    pub definition: String,
}

/// Why a downstream did not take a copy. The text is for people and holds no row values and no credentials.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct CopyError {
    /// Stable code.
    pub code: &'static str,
    /// What happened and what to do.
    pub message: String,
    /// Whether trying again, with a new connection, can succeed without a person's help.
    pub retryable: bool,
}

/// What another node may write parts of a copy with. Whoever has begun the copy gives it and takes it back.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct CopyRight(pub i64);

/// A downstream that takes existing rows past the stream.
#[async_trait]
pub trait CopyTarget: Send + Sync {
    /// Begins a copy: whatever wrote one before for this changefeed writes nothing any more. `None`: this downstream wants
    /// existing rows in the stream.
    ///
    /// # Errors
    /// When the downstream does not answer or refuses.
    async fn begin(&self) -> Result<Option<Arc<dyn CopySession>>, CopyError>;

    /// Begins a part of a copy that another node has begun, of a table that it has opened, with a right that it has
    /// [given](CopySession::admit). `at` and `time` are those of the snapshot.
    ///
    /// # Errors
    /// When the right was taken back, or as [`CopySession::write`].
    async fn write_for(
        &self,
        right: CopyRight,
        table: &Arc<TableInfo>,
        part: &CopyPart,
        format: CopyFormat,
        snapshot: (Ts, WallTime),
    ) -> Result<Box<dyn PartWriter>, CopyError>;

    /// What was asked for of tables that are to be copied again, oldest first. `None`: this downstream cannot do that.
    ///
    /// # Errors
    /// When the downstream does not answer or refuses.
    async fn resyncs(&self) -> Result<Option<Vec<Resync>>, CopyError>;

    /// Changes the request of a table, durably. False: there is none in a state that allows it.
    ///
    /// # Errors
    /// As [`CopyTarget::resyncs`].
    async fn change_resync(&self, table: TableId, change: &ResyncChange) -> Result<bool, CopyError>;
}

/// One run of a copy, used by several tasks.
#[async_trait]
pub trait CopySession: Send + Sync {
    /// The shapes with which the copy began, as whoever reads has told by a number; `None` before that.
    ///
    /// # Errors
    /// When the downstream does not answer or refuses.
    async fn shapes(&self) -> Result<Option<u32>, CopyError>;

    /// Notes the shapes with which the copy begins.
    ///
    /// # Errors
    /// As [`CopySession::shapes`].
    async fn set_shapes(&self, shapes: u32) -> Result<(), CopyError>;

    /// Drops tables that a copy of this changefeed has created and that are not among these, or not in this shape, and
    /// forgets what was copied into them. One that holds rows of somebody else stays, and so does one that was there before.
    ///
    /// # Errors
    /// When something depends on such a table, or as [`CopySession::shapes`].
    async fn retain(&self, tables: &[Arc<TableInfo>]) -> Result<(), CopyError>;

    /// The tables whose copy is complete, each with its oldest part's position and time, and its rows.
    ///
    /// # Errors
    /// As [`CopySession::shapes`].
    async fn finished(&self) -> Result<Vec<(TableId, CopiedPart)>, CopyError>;

    /// Prepares a table, which may be created, and answers what is there of it. A table in which nothing of the copy is
    /// yet must be empty, or is made so, as the downstream was told.
    ///
    /// # Errors
    /// When the table is not what is needed, or as [`CopySession::shapes`].
    async fn open(&self, table: &Arc<TableInfo>) -> Result<CopiedTable, CopyError>;

    /// Removes all parts of a table that was opened: they cannot be continued.
    ///
    /// # Errors
    /// As [`CopySession::shapes`].
    async fn clear(&self, table: TableId) -> Result<(), CopyError>;

    /// Begins a part of a table that was opened. `at` and `time` are those of the snapshot.
    ///
    /// # Errors
    /// As [`CopySession::shapes`].
    async fn write(
        &self,
        table: TableId,
        part: &CopyPart,
        format: CopyFormat,
        snapshot: (Ts, WallTime),
    ) -> Result<Box<dyn PartWriter>, CopyError>;

    /// The parts of a table that are durable now.
    ///
    /// # Errors
    /// As [`CopySession::shapes`].
    async fn parts(&self, table: TableId) -> Result<Vec<CopiedPart>, CopyError>;

    /// Lets another node write parts of tables that were opened here, until the right is taken back or the copy ends.
    ///
    /// # Errors
    /// As [`CopySession::shapes`].
    async fn admit(&self, node: &NodeId) -> Result<CopyRight, CopyError>;

    /// Takes a right back: when this returns nothing that was begun with it is under way or can be made durable. Nothing
    /// happens to one that was taken back before.
    ///
    /// # Errors
    /// When something that was begun with it does not end, or as [`CopySession::shapes`].
    async fn dismiss(&self, right: CopyRight) -> Result<(), CopyError>;

    /// Makes an index of a table that was opened and whose parts are all there, if a copy has created the table and has not
    /// made the index yet. One that the downstream cannot have and that keeps no rows apart is left out, with a warning.
    ///
    /// # Errors
    /// When rows violate it, or as [`CopySession::shapes`].
    async fn index(&self, table: TableId, index: &CopyIndex) -> Result<(), CopyError>;

    /// Begins to replace all rows of a table to which the stream is being applied, as a waiting [`Resync`] demands, and
    /// answers the format in which rows are wanted. All of it is one transaction: until it commits the table is as it was,
    /// then the request is done and the stream leaves out what the snapshot held. Whoever calls sees to it that
    /// everything before the snapshot that was under way is applied, and that nothing else is applied meanwhile; where
    /// that was not so, nothing is committed.
    ///
    /// # Errors
    /// When something newer has been applied, the request is not waiting any more, or as [`CopySession::shapes`].
    async fn replace(
        &self,
        table: &Arc<TableInfo>,
        snapshot: (Ts, WallTime),
    ) -> Result<(Box<dyn PartWriter>, CopyFormat), CopyError>;

    /// All parts of a table are there: the stream may be applied from now on.
    ///
    /// # Errors
    /// When a part is missing, or as [`CopySession::shapes`].
    async fn finish(&self, table: TableId) -> Result<(), CopyError>;

    /// The copy ends here, complete or not. Parts that are open are rolled back, and rights are taken back.
    async fn end(&self);
}

/// Writes one part. Dropping it without [`PartWriter::commit`] leaves nothing of the part.
#[async_trait]
pub trait PartWriter: Send {
    /// Takes the next bytes of the rows, cut anywhere. Waits while the downstream is behind.
    ///
    /// # Errors
    /// When the downstream does not answer or refuses the data.
    async fn write(&mut self, data: Bytes) -> Result<(), CopyError>;

    /// Makes the part durable, if it has as many rows as were read.
    ///
    /// # Errors
    /// As [`PartWriter::write`]. When the connection broke, the part may be durable all the same: whoever opens the table
    /// again finds out.
    async fn commit(self: Box<Self>, rows: u64) -> Result<(), CopyError>;
}
