//! Requests between coordinator, maintainers and dispatcher managers, and their answers.

use crate::{
    BlockState, ChangefeedId, ComponentState, DispatcherId, MaintainerEpoch, MaintainerStatus, Mode, NodeId,
    NodeLiveness, RunningError, SchemaId, TableId, TableSpan, Ts,
};

/// A configuration in its JSON form. It holds credentials: `Debug` shows its size only.
#[derive(Clone, PartialEq, Eq)]
pub struct ConfigBytes(pub std::sync::Arc<[u8]>);

impl std::fmt::Debug for ConfigBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "<{} bytes>", self.0.len())
    }
}

/// Everything a node needs to run one dispatcher.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DispatcherConfig {
    /// Key range.
    pub span: TableSpan,
    /// Events with a larger commit ts are wanted.
    pub start_ts: Ts,
    /// Id of this placement.
    pub dispatcher: DispatcherId,
    /// Schema of the table.
    pub schema: SchemaId,
    /// Pipeline.
    pub mode: Mode,
    /// Skip the rows at `start_ts + 1`: a DDL there is replayed.
    pub skip_dml_at_start: bool,
}

/// What a schedule request asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ScheduleAction {
    /// Create the dispatcher.
    Create,
    /// Remove it.
    Remove,
}

/// The operator behind a schedule request.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum OperatorType {
    /// A new span.
    Add,
    /// A span that goes away.
    Remove,
    /// A span that changes its node.
    Move,
    /// A span that becomes several.
    Split,
    /// Several spans that become one.
    Merge,
}

/// Maintainer to node (IOType 15).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ScheduleDispatcherRequest {
    /// The changefeed.
    pub changefeed: ChangefeedId,
    /// The dispatcher.
    pub config: DispatcherConfig,
    /// Create or remove.
    pub action: ScheduleAction,
    /// The operator behind it.
    pub operator: OperatorType,
    /// Epoch of the maintainer.
    pub epoch: Option<MaintainerEpoch>,
}

/// Maintainer to node: join adjacent spans (IOType 22).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MergeDispatcherRequest {
    /// The changefeed.
    pub changefeed: ChangefeedId,
    /// Sources in span order.
    pub sources: Vec<DispatcherId>,
    /// Id of the result.
    pub merged: DispatcherId,
    /// Pipeline.
    pub mode: Mode,
    /// Epoch of the maintainer.
    pub epoch: Option<MaintainerEpoch>,
}

/// Persisted checkpoint: coordinator to maintainer, maintainer to the manager of its own node (IOType 17).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CheckpointTsMessage {
    /// The changefeed.
    pub changefeed: ChangefeedId,
    /// The persisted checkpoint.
    pub checkpoint: Ts,
}

/// Maintainer to node: create or adopt the changefeed's dispatcher manager (IOType 29).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MaintainerBootstrapRequest {
    /// The changefeed.
    pub changefeed: ChangefeedId,
    /// The part of the configuration that a dispatcher manager needs; holds credentials.
    pub config: ConfigBytes,
    /// Checkpoint to start from.
    pub start_ts: Ts,
    /// Only to the node that hosts the table trigger.
    pub trigger: Option<DispatcherId>,
    /// Ignore downstream recovery data: new, or resumed with an overwritten checkpoint.
    pub is_new: bool,
    /// Redo pipeline's table trigger.
    pub redo_trigger: Option<DispatcherId>,
    /// Tenant.
    pub keyspace_id: u32,
    /// Epoch of the maintainer.
    pub epoch: Option<MaintainerEpoch>,
}

/// One dispatcher in a bootstrap answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BootstrapTableSpan {
    /// The dispatcher.
    pub id: DispatcherId,
    /// Its schema.
    pub schema: SchemaId,
    /// Its key range.
    pub span: TableSpan,
    /// Its state.
    pub state: ComponentState,
    /// Its checkpoint.
    pub checkpoint: Ts,
    /// Its blocking event, if any.
    pub block: Option<BlockState>,
    /// Its pipeline.
    pub mode: Mode,
}

/// Node to maintainer (IOType 30).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MaintainerBootstrapResponse {
    /// The changefeed.
    pub changefeed: ChangefeedId,
    /// Every dispatcher of the node.
    pub spans: Vec<BootstrapTableSpan>,
    /// Why the bootstrap failed.
    pub error: Option<RunningError>,
    /// Start ts of the local table trigger after recovery; zero when it is not here.
    pub checkpoint: Ts,
    /// The same for the redo pipeline.
    pub redo_checkpoint: Ts,
    /// Schedule requests in flight.
    pub operators: Vec<ScheduleDispatcherRequest>,
    /// Merges in flight.
    pub merges: Vec<MergeDispatcherRequest>,
    /// Epoch of the manager's owner.
    pub epoch: Option<MaintainerEpoch>,
}

/// A table in a post-bootstrap request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TableName {
    /// The table.
    pub id: TableId,
    /// Its name; empty when the sink does not need names.
    pub name: String,
}

/// A schema and its tables in a post-bootstrap request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SchemaTables {
    /// The schema.
    pub id: SchemaId,
    /// Its name.
    pub name: String,
    /// Its tables.
    pub tables: Vec<TableName>,
}

/// Maintainer to the table trigger's node: start the trigger (IOType 31).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MaintainerPostBootstrapRequest {
    /// The changefeed.
    pub changefeed: ChangefeedId,
    /// The table trigger.
    pub trigger: DispatcherId,
    /// Tables at the start ts.
    pub schemas: Vec<SchemaTables>,
    /// The same for the redo pipeline.
    pub redo_schemas: Vec<SchemaTables>,
    /// Epoch of the maintainer.
    pub epoch: Option<MaintainerEpoch>,
}

/// Node to maintainer (IOType 32).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MaintainerPostBootstrapResponse {
    /// The changefeed.
    pub changefeed: ChangefeedId,
    /// The table trigger; `None` when the request could not be served.
    pub trigger: Option<DispatcherId>,
    /// Why it failed.
    pub error: Option<RunningError>,
    /// Epoch of the manager's owner.
    pub epoch: Option<MaintainerEpoch>,
}

/// Maintainer to node: close the changefeed's dispatcher manager (IOType 33).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MaintainerCloseRequest {
    /// The changefeed.
    pub changefeed: ChangefeedId,
    /// Whether the changefeed is deleted (and not paused or moved).
    pub removed: bool,
    /// Epoch of the maintainer.
    pub epoch: Option<MaintainerEpoch>,
}

/// Node to maintainer (IOType 34).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MaintainerCloseResponse {
    /// The changefeed.
    pub changefeed: ChangefeedId,
    /// Closed, absent, or not the asker's to close; false: still closing, ask again.
    pub success: bool,
    /// Epoch of the request.
    pub epoch: Option<MaintainerEpoch>,
}

/// Coordinator to node (IOType 26).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AddMaintainerRequest {
    /// The changefeed.
    pub changefeed: ChangefeedId,
    /// Changefeed info document; holds credentials.
    pub config: ConfigBytes,
    /// Checkpoint to start from; zero is refused.
    pub checkpoint: Ts,
    /// New, or resumed with an overwritten checkpoint.
    pub is_new: bool,
    /// Tenant.
    pub keyspace_id: u32,
    /// Epoch given to the maintainer.
    pub epoch: Option<MaintainerEpoch>,
}

/// Coordinator to node (IOType 27).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RemoveMaintainerRequest {
    /// The changefeed.
    pub changefeed: ChangefeedId,
    /// Also close the dispatcher managers.
    pub cascade: bool,
    /// The changefeed is deleted; implies `cascade`.
    pub removed: bool,
    /// Tenant.
    pub keyspace_id: u32,
    /// Epoch of the maintainer that is to stop.
    pub epoch: Option<MaintainerEpoch>,
}

/// Coordinator to node: who is coordinator (IOType 24).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CoordinatorBootstrapRequest {
    /// Coordinator generation; a node remembers the largest and ignores smaller ones.
    pub version: i64,
}

/// Node to coordinator (IOType 25).
#[derive(Clone, PartialEq, Debug)]
pub struct CoordinatorBootstrapResponse {
    /// Every maintainer of the node.
    pub statuses: Vec<MaintainerStatus>,
    /// 0 legacy, otherwise supports a drain driven by the coordinator.
    pub drain_protocol_version: u32,
    /// Applied drain target.
    pub drain_target: Option<NodeId>,
    /// Its epoch.
    pub drain_epoch: u64,
}

/// Coordinator to node (IOType 43).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SetNodeLivenessRequest {
    /// Wanted liveness.
    pub target: NodeLiveness,
    /// Epoch of the process it is meant for.
    pub node_epoch: u64,
}

/// Node to coordinator (IOType 44).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SetNodeLivenessResponse {
    /// Liveness now.
    pub applied: NodeLiveness,
    /// Epoch of the process.
    pub node_epoch: u64,
}

/// Coordinator to node (IOType 45). Always answered by a node heartbeat.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SetDispatcherDrainTargetRequest {
    /// Node to empty; `None` clears.
    pub target: Option<NodeId>,
    /// Higher wins.
    pub epoch: u64,
}
