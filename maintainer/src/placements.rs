//! The way in for people: where tables are, and wishes for where they should be.

use std::collections::BTreeMap;

use heartbeatpb::{ChangefeedId, NodeId, TableId};
use tokio::sync::{mpsc, oneshot};

use crate::core::Standstill;

/// Questions that may wait for the manager: each of them is somebody who waits.
pub(crate) const QUESTIONS: usize = 256;

/// Why a wish cannot be fulfilled.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlacementError {
    /// Its maintainer is elsewhere, or nowhere.
    #[error("the changefeed has no maintainer on this node")]
    NoSuchChangefeed,
    /// The maintainer does not know yet what runs where, or the table is not replicated at the moment.
    #[error("the changefeed is not ready for that yet")]
    NotReady,
    /// The maintainer is being removed.
    #[error("the maintainer is leaving")]
    Leaving,
    /// The changefeed has no such table.
    #[error("the changefeed does not replicate a table {0}")]
    UnknownTable(TableId),
    /// The table trigger stays with its maintainer.
    #[error("the table trigger cannot be moved, divided or joined")]
    NotMovable,
    /// The node does not live, has not answered the maintainer yet, or is being emptied.
    #[error("node {0} takes no tables now")]
    NodeNotReady(NodeId),
    /// The table is in parts.
    #[error("table {table} is in {spans} parts")]
    Divided {
        /// The table.
        table: TableId,
        /// How many parts it has.
        spans: usize,
    },
    /// Something else is under way with the table.
    #[error("table {table} is occupied by another operation ({kind})")]
    Occupied {
        /// The table.
        table: TableId,
        /// The kind of the operator that has it.
        kind: &'static str,
    },
    /// The changefeed's configuration keeps tables whole.
    #[error("the changefeed does not divide tables: scheduler.enable-table-across-nodes is off")]
    WholeOnly,
    /// The table has no key to divide it by, or nothing is known of its keys.
    #[error("table {0} cannot be divided")]
    NotDivisible(TableId),
    /// The upstream could not be asked.
    #[error("the upstream was asked in vain where to divide the table: {0}")]
    Upstream(String),
    /// It began, and something else came between: a node was lost, or the table was dropped.
    #[error("it began, but something else came between")]
    Interrupted,
    /// It goes on, but takes too long to wait for.
    #[error("it has begun and takes longer than expected")]
    Timeout,
    /// Too many wishes at once.
    #[error("too much is being asked at once")]
    Busy,
    /// The node is stopping, or the maintainer ended before it answered.
    #[error("the maintainer ended before it answered")]
    Ended,
}

impl PlacementError {
    /// Whether the same wish can succeed later.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::NoSuchChangefeed
            | Self::NotReady
            | Self::Leaving
            | Self::NodeNotReady(_)
            | Self::Occupied { .. }
            | Self::Upstream(_)
            | Self::Interrupted
            | Self::Timeout
            | Self::Busy
            | Self::Ended => true,
            Self::UnknownTable(_)
            | Self::NotMovable
            | Self::Divided { .. }
            | Self::WholeOnly
            | Self::NotDivisible(_) => false,
        }
    }
}

/// What is wished for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Wish {
    Move { table: TableId, to: NodeId, wait: bool },
    MoveParts { table: TableId, to: NodeId, wait: bool },
    Split { table: TableId, pieces: Option<usize> },
    Merge { table: TableId },
    Count,
    Tables,
    Standstill,
}

impl Wish {
    /// The table that it is about.
    pub(crate) fn table(&self) -> TableId {
        match self {
            Self::Move { table, .. }
            | Self::MoveParts { table, .. }
            | Self::Split { table, .. }
            | Self::Merge { table } => *table,
            Self::Count | Self::Tables | Self::Standstill => TableId::DDL,
        }
    }
}

/// What comes of a wish.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Answer {
    Done,
    Count(usize),
    Tables(BTreeMap<NodeId, Vec<TableId>>),
    Standstill(Option<Box<Standstill>>),
}

/// Where an answer goes; whoever waits may have gone.
pub(crate) type Reply = oneshot::Sender<Result<Answer, PlacementError>>;

/// A wish on its way to a maintainer.
#[derive(Debug)]
pub(crate) struct Question {
    pub(crate) changefeed: ChangefeedId,
    pub(crate) wish: Wish,
    pub(crate) reply: Reply,
}

/// Asks the maintainers of one node, for people. Cheap to clone. What is begun goes on when nobody waits any more.
#[derive(Clone, Debug)]
pub struct PlacementHandle {
    questions: mpsc::Sender<Question>,
}

impl PlacementHandle {
    pub(crate) fn new(questions: mpsc::Sender<Question>) -> Self {
        Self { questions }
    }

    async fn ask(&self, changefeed: &ChangefeedId, wish: Wish) -> Result<Answer, PlacementError> {
        let (reply, answer) = oneshot::channel();
        let question = Question { changefeed: changefeed.clone(), wish, reply };
        self.questions.try_send(question).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => PlacementError::Busy,
            mpsc::error::TrySendError::Closed(_) => PlacementError::Ended,
        })?;
        answer.await.unwrap_or(Err(PlacementError::Ended))
    }

    /// Moves a table that is one span to `node`. With `wait`, until it runs there; otherwise until that has begun.
    /// A table that is there already is moved; one that is on its way there is waited for.
    ///
    /// # Errors
    /// See [`PlacementError`]; among others when the table is divided, occupied or unknown, or the node takes none.
    pub async fn move_table(
        &self,
        changefeed: &ChangefeedId,
        table: TableId,
        node: NodeId,
        wait: bool,
    ) -> Result<(), PlacementError> {
        self.ask(changefeed, Wish::Move { table, to: node, wait }).await.map(drop)
    }

    /// Moves all parts of a table to `node`: all begin, or none does.
    ///
    /// # Errors
    /// See [`PlacementError`]; among others when a part is occupied, or the node takes none.
    pub async fn move_split_table(
        &self,
        changefeed: &ChangefeedId,
        table: TableId,
        node: NodeId,
        wait: bool,
    ) -> Result<(), PlacementError> {
        self.ask(changefeed, Wish::MoveParts { table, to: node, wait }).await.map(drop)
    }

    /// Divides a table into about so many `pieces` (`None`: one for each node, at least two), and waits until all
    /// parts run. A table in parts is divided.
    ///
    /// # Errors
    /// See [`PlacementError`]; among others when the changefeed or the table does not allow it.
    pub async fn split_table(
        &self,
        changefeed: &ChangefeedId,
        table: TableId,
        pieces: Option<usize>,
    ) -> Result<(), PlacementError> {
        self.ask(changefeed, Wish::Split { table, pieces }).await.map(drop)
    }

    /// Joins two neighbouring parts of a table, bringing them to one node first if need be, and waits for it. There
    /// is nothing to do for a table that is one span.
    ///
    /// # Errors
    /// See [`PlacementError`]; among others when others keep the parts occupied for too long.
    pub async fn merge_table(&self, changefeed: &ChangefeedId, table: TableId) -> Result<(), PlacementError> {
        self.ask(changefeed, Wish::Merge { table }).await.map(drop)
    }

    /// Number of dispatchers, the table trigger included.
    ///
    /// # Errors
    /// When the changefeed is not here or not ready.
    pub async fn dispatcher_count(&self, changefeed: &ChangefeedId) -> Result<usize, PlacementError> {
        match self.ask(changefeed, Wish::Count).await? {
            Answer::Count(count) => Ok(count),
            Answer::Done | Answer::Tables(_) | Answer::Standstill(_) => Err(PlacementError::Ended),
        }
    }

    /// The tables that each node has, each of them once, in order; 0 is the table trigger. Tables that nobody runs
    /// are not listed.
    ///
    /// # Errors
    /// When the changefeed is not here or not ready.
    pub async fn tables(
        &self,
        changefeed: &ChangefeedId,
    ) -> Result<BTreeMap<NodeId, Vec<TableId>>, PlacementError> {
        match self.ask(changefeed, Wish::Tables).await? {
            Answer::Tables(tables) => Ok(tables),
            Answer::Done | Answer::Count(_) | Answer::Standstill(_) => Err(PlacementError::Ended),
        }
    }

    /// What the changefeed's checkpoint stands at, and for how long. Visits all spans of one node at least: for people,
    /// not for a dashboard. `None` from a maintainer that has stopped.
    ///
    /// # Errors
    /// When the changefeed is not here.
    pub async fn standstill(&self, changefeed: &ChangefeedId) -> Result<Option<Standstill>, PlacementError> {
        match self.ask(changefeed, Wish::Standstill).await? {
            Answer::Standstill(standstill) => Ok(standstill.map(|standstill| *standstill)),
            Answer::Done | Answer::Count(_) | Answer::Tables(_) => Err(PlacementError::Ended),
        }
    }
}
