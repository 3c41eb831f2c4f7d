//! What nodes report: progress, component states, liveness, errors.

use serde::{Deserialize, Serialize};

use crate::{ChangefeedId, DispatcherId, MaintainerEpoch, NodeId, Ts, WallTime};

/// The pipeline of a dispatcher.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub enum Mode {
    /// Events go to the changefeed's sink (wire value 0).
    #[default]
    Default,
    /// Events go to the redo log (wire value 1).
    Redo,
}

/// Life-cycle state of a dispatcher or a maintainer (wire numbers in messaging §9.1).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum ComponentState {
    /// Running.
    Working,
    /// Ended; terminal.
    Stopped,
    /// Reserved.
    Removed,
    /// Created, waiting for its first event.
    Initializing,
    /// Target of a merge that is being prepared.
    Preparing,
    /// Target of a merge whose data source is ready.
    MergeReady,
    /// Source of a merge.
    WaitingMerge,
}

/// Liveness of a node; only forward transitions happen.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
pub enum NodeLiveness {
    /// Takes new work.
    #[default]
    Alive,
    /// Finishes what it has, takes nothing new.
    Draining,
    /// About to exit.
    Stopping,
}

/// Aggregated progress of the dispatchers of one node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Watermark {
    /// Everything at or before it is durable downstream; [`Ts::MAX`] when there is no dispatcher.
    pub checkpoint: Ts,
    /// Smallest received resolved ts.
    pub resolved: Ts,
    /// Membership generation; a receiver drops smaller ones.
    pub seq: u64,
    /// Largest commit ts flushed.
    pub last_synced: Ts,
}

impl Watermark {
    /// The watermark of a node without dispatchers.
    pub const NONE: Self = Self { checkpoint: Ts::MAX, resolved: Ts::MAX, seq: 0, last_synced: Ts::ZERO };
}

/// Reported state of one dispatcher.
#[derive(Clone, PartialEq, Debug)]
pub struct TableSpanStatus {
    /// The dispatcher.
    pub id: DispatcherId,
    /// Its state.
    pub state: ComponentState,
    /// Its checkpoint.
    pub checkpoint: Ts,
    /// Bytes flushed per second; 0 means not measured, idle is 1.
    pub event_size_per_second: f32,
    /// Its pipeline.
    pub mode: Mode,
}

/// An error that a component reports to its owner and, in the end, to a person.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RunningError {
    /// RFC 3339 time.
    pub time: String,
    /// Address or id of the node.
    #[serde(rename = "addr")]
    pub node: String,
    /// Stable code such as `CDC:ErrSinkURIInvalid`.
    pub code: String,
    /// Text for people; holds no row values and no secrets.
    pub message: String,
}

/// Node to maintainer: progress of one changefeed's dispatchers on one node (IOType 13).
#[derive(Clone, PartialEq, Debug)]
pub struct HeartBeatRequest {
    /// The changefeed.
    pub changefeed: ChangefeedId,
    /// Absent in error reports.
    pub watermark: Option<Watermark>,
    /// Redo pipeline; absent when redo is off.
    pub redo_watermark: Option<Watermark>,
    /// Changed, stopped or (when complete) all dispatchers.
    pub statuses: Vec<TableSpanStatus>,
    /// Whether `statuses` covers every non-initializing dispatcher of the node.
    pub complete: bool,
    /// A fatal error of this changefeed on the node.
    pub error: Option<RunningError>,
    /// What keeps the node from going on for now, beside a watermark: it goes on trying by itself, and nothing has to be
    /// started again. Gone when it is over. Our own field.
    pub trouble: Option<Box<RunningError>>,
}

/// How far a drain got inside one changefeed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DrainProgress {
    /// The draining node.
    pub target: NodeId,
    /// Epoch of the drain target.
    pub epoch: u64,
    /// Dispatchers still on it.
    pub dispatchers: u32,
    /// Moves away from it that are in flight.
    pub inflight_moves: u32,
}

/// Maintainer to coordinator: state of one changefeed (inside IOType 28).
#[derive(Clone, PartialEq, Debug)]
pub struct MaintainerStatus {
    /// The changefeed.
    pub changefeed: ChangefeedId,
    /// State name; informative.
    pub feed_state: String,
    /// State of the maintainer.
    pub state: ComponentState,
    /// Checkpoint of the changefeed.
    pub checkpoint: Ts,
    /// Errors since the last report.
    pub errors: Vec<RunningError>,
    /// Whether every node answered the bootstrap and the table trigger runs.
    pub bootstrap_done: bool,
    /// Largest commit ts flushed.
    pub last_synced: Ts,
    /// Present while a drain target is active.
    pub drain: Option<DrainProgress>,
    /// Epoch of the maintainer.
    pub epoch: Option<MaintainerEpoch>,
    /// When the checkpoint was committed upstream; only the maintainer's node knows. Our own field.
    pub checkpoint_time: Option<WallTime>,
    /// What keeps the changefeed from going on for now and is being tried again where it is, without a new start. Gone when
    /// it is over. Our own field.
    pub trouble: Option<RunningError>,
}

/// Node to coordinator: liveness and the acknowledged drain target (IOType 42).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodeHeartbeat {
    /// Liveness of the node.
    pub liveness: NodeLiveness,
    /// Epoch of the process; never 0.
    pub node_epoch: u64,
    /// Applied drain target; `None` when cleared.
    pub drain_target: Option<NodeId>,
    /// Epoch of the applied drain target.
    pub drain_epoch: u64,
}
