//! Barrier words: what a DDL or a sync point touches, and how its participants are told.

use crate::{ChangefeedId, DispatcherId, MaintainerEpoch, Mode, SchemaId, TableId, Ts};

/// Which tables an event touches.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum InfluencedTables {
    /// Every table of the changefeed.
    All,
    /// Every table of a schema.
    Schema(SchemaId),
    /// The listed tables; [`TableId::DDL`] when the table trigger takes part.
    Normal(Vec<TableId>),
}

/// A table that a DDL creates.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AddedTable {
    /// The table.
    pub table: TableId,
    /// Its schema.
    pub schema: SchemaId,
    /// Whether it can be divided into key ranges.
    pub splittable: bool,
}

/// A table that moves to another schema.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SchemaChange {
    /// The table.
    pub table: TableId,
    /// Schema before.
    pub old: SchemaId,
    /// Schema after.
    pub new: SchemaId,
}

/// Stage of a block event at a dispatcher.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum BlockStage {
    /// A report that needs no action.
    None,
    /// Waiting for an action.
    Waiting,
    /// Executing the action.
    Writing,
    /// Executed.
    Done,
}

/// What happens to a routed name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RouteAdmission {
    /// A source table is routed to a target table.
    Admit {
        /// Source schema and table.
        source: (String, String),
        /// Target schema and table.
        target: (String, String),
    },
    /// A source table is gone.
    Release {
        /// Source schema and table.
        source: (String, String),
    },
    /// A whole source schema is gone.
    ReleaseSchema {
        /// Source schema.
        schema: String,
    },
}

/// Identity of a barrier: a DDL and a sync point may have the same commit ts.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct BarrierKey {
    /// Commit ts of the event.
    pub commit_ts: Ts,
    /// Whether it is a sync point; orders after a DDL of the same ts.
    pub is_sync_point: bool,
}

/// State of a block event as a dispatcher reports it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BlockState {
    /// True: waits for an action; false: only reports what it changes.
    pub is_blocked: bool,
    /// Identity.
    pub key: BarrierKey,
    /// Participants.
    pub blocked: Option<InfluencedTables>,
    /// Tables to remove afterwards.
    pub dropped: Option<InfluencedTables>,
    /// Tables to create afterwards.
    pub added: Vec<AddedTable>,
    /// Schema moves.
    pub schema_changes: Vec<SchemaChange>,
    /// Stage.
    pub stage: BlockStage,
    /// Route changes.
    pub routes: Vec<RouteAdmission>,
}

/// One dispatcher's report about a block event.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TableSpanBlockStatus {
    /// The dispatcher.
    pub id: DispatcherId,
    /// Its pipeline.
    pub mode: Mode,
    /// The report.
    pub state: BlockState,
}

/// Node to maintainer: block statuses (IOType 18); all of one mode.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BlockStatusRequest {
    /// The changefeed.
    pub changefeed: ChangefeedId,
    /// Pipeline of every entry.
    pub mode: Mode,
    /// The reports.
    pub statuses: Vec<TableSpanBlockStatus>,
}

/// Who a barrier reply is for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum InfluencedDispatchers {
    /// Every dispatcher of the changefeed, except one.
    All {
        /// Usually the writer.
        except: Option<DispatcherId>,
    },
    /// Every dispatcher of a schema and the table trigger, except one.
    Schema {
        /// The schema.
        schema: SchemaId,
        /// Usually the writer.
        except: Option<DispatcherId>,
    },
    /// The listed ones.
    Normal(Vec<DispatcherId>),
}

/// What participants of a barrier are to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BlockAction {
    /// Execute the event downstream, then report done.
    Write,
    /// Skip it, then report done.
    Pass,
}

/// One instruction to a set of dispatchers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DispatcherStatus {
    /// Recipients; a status without recipients is ignored.
    pub influenced: Option<InfluencedDispatchers>,
    /// Stops resending.
    pub ack: Option<BarrierKey>,
    /// The owner could not use the report yet: send it again soon.
    pub ignored: Option<BarrierKey>,
    /// Write or pass.
    pub action: Option<(BlockAction, BarrierKey)>,
}

/// Maintainer to node: answers to block statuses (IOType 14).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HeartBeatResponse {
    /// The changefeed.
    pub changefeed: ChangefeedId,
    /// Pipeline.
    pub mode: Mode,
    /// The instructions.
    pub statuses: Vec<DispatcherStatus>,
    /// Epoch of the maintainer.
    pub epoch: Option<MaintainerEpoch>,
}
