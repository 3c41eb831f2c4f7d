//! Between the wire and the domain: the only file that sees both.
//!
//! Towards the wire every value has a form (`From`). From the wire a message may be unusable (`TryFrom`).
//! Where the sender leaves a choice, the receiver is tolerant: an unknown component state reads as
//! working, an unknown liveness as alive, an unknown stage as none (spec/messaging.md §9.1, §12). An unknown
//! *action* is refused, because acting on a guess could lose rows.

use std::sync::Arc;

use crate::wire::heartbeatpb as pb;
use crate::{
    AddMaintainerRequest, AddedTable, BarrierKey, BlockAction, BlockStage, BlockState, BlockStatusRequest,
    BootstrapTableSpan, ChangefeedId, CheckpointTsMessage, ComponentState, ConfigBytes,
    CoordinatorBootstrapRequest, CoordinatorBootstrapResponse, DecodeError, DispatcherConfig, DispatcherId,
    DispatcherStatus, DrainProgress, Gid, HeartBeatRequest, HeartBeatResponse, InfluencedDispatchers,
    InfluencedTables, MaintainerBootstrapRequest, MaintainerBootstrapResponse, MaintainerCloseRequest,
    MaintainerCloseResponse, MaintainerEpoch, MaintainerPostBootstrapRequest,
    MaintainerPostBootstrapResponse, MaintainerStatus, MergeDispatcherRequest, Mode, NodeHeartbeat, NodeId,
    NodeLiveness, OperatorType, RemoveMaintainerRequest, RouteAdmission, RunningError, ScheduleAction,
    ScheduleDispatcherRequest, SchemaChange, SchemaId, SchemaTables, SetDispatcherDrainTargetRequest,
    SetNodeLivenessRequest, SetNodeLivenessResponse, TableId, TableName, TableSpan, TableSpanBlockStatus,
    TableSpanStatus, Ts, Watermark,
};

type Result<T> = std::result::Result<T, DecodeError>;

/// The value of a field that must be there.
fn need<T>(value: Option<T>, message: &'static str, field: &'static str) -> Result<T> {
    value.ok_or(DecodeError::Missing { message, field })
}

fn list<W, D: TryFrom<W, Error = DecodeError>>(items: Vec<W>) -> Result<Vec<D>> {
    items.into_iter().map(D::try_from).collect()
}

fn wire_list<D, W: From<D>>(items: Vec<D>) -> Vec<W> {
    items.into_iter().map(W::from).collect()
}

fn epoch(value: u64) -> Option<MaintainerEpoch> {
    MaintainerEpoch::from_wire(value)
}

fn wire_epoch(value: Option<MaintainerEpoch>) -> u64 {
    MaintainerEpoch::to_wire(value)
}

fn node(text: String) -> Option<NodeId> {
    (!text.is_empty()).then(|| NodeId::from(text))
}

fn wire_node(node: Option<NodeId>) -> String {
    node.map_or_else(String::new, |node| node.as_str().to_owned())
}

fn mode(value: i64) -> Mode {
    if value == 1 { Mode::Redo } else { Mode::Default }
}

fn wire_mode(mode: Mode) -> i64 {
    match mode {
        Mode::Default => 0,
        Mode::Redo => 1,
    }
}

// Ids.

impl From<DispatcherId> for pb::DispatcherId {
    fn from(id: DispatcherId) -> Self {
        Self { high: id.high, low: id.low }
    }
}

impl TryFrom<pb::DispatcherId> for DispatcherId {
    type Error = DecodeError;
    fn try_from(id: pb::DispatcherId) -> Result<Self> {
        let id = DispatcherId::new(id.high, id.low);
        if id.is_zero() {
            return Err(DecodeError::Unusable { message: "DispatcherID", field: "value" });
        }
        Ok(id)
    }
}

impl From<ChangefeedId> for pb::ChangefeedId {
    fn from(id: ChangefeedId) -> Self {
        Self {
            high: id.gid.high,
            low: id.gid.low,
            name: id.name.as_ref().to_owned(),
            keyspace: id.keyspace.as_ref().to_owned(),
        }
    }
}

impl From<pb::ChangefeedId> for ChangefeedId {
    fn from(id: pb::ChangefeedId) -> Self {
        Self { gid: Gid::new(id.high, id.low), name: id.name.into(), keyspace: id.keyspace.into() }
    }
}

fn changefeed(id: Option<pb::ChangefeedId>, message: &'static str) -> Result<ChangefeedId> {
    need(id, message, "changefeedID").map(ChangefeedId::from)
}

fn dispatcher(
    id: Option<pb::DispatcherId>,
    message: &'static str,
    field: &'static str,
) -> Result<DispatcherId> {
    DispatcherId::try_from(need(id, message, field)?)
}

impl From<TableSpan> for pb::TableSpan {
    fn from(span: TableSpan) -> Self {
        Self {
            table_id: span.table.0,
            start_key: span.start,
            end_key: span.end,
            keyspace_id: span.keyspace_id,
        }
    }
}

impl From<pb::TableSpan> for TableSpan {
    fn from(span: pb::TableSpan) -> Self {
        Self {
            keyspace_id: span.keyspace_id,
            table: TableId(span.table_id),
            start: span.start_key,
            end: span.end_key,
        }
    }
}

// Progress.

impl From<Watermark> for pb::Watermark {
    fn from(mark: Watermark) -> Self {
        Self {
            checkpoint_ts: mark.checkpoint.0,
            resolved_ts: mark.resolved.0,
            seq: mark.seq,
            last_synced_ts: mark.last_synced.0,
        }
    }
}

impl From<pb::Watermark> for Watermark {
    fn from(mark: pb::Watermark) -> Self {
        Self {
            checkpoint: Ts(mark.checkpoint_ts),
            resolved: Ts(mark.resolved_ts),
            seq: mark.seq,
            last_synced: Ts(mark.last_synced_ts),
        }
    }
}

impl From<RunningError> for pb::RunningError {
    fn from(error: RunningError) -> Self {
        Self { time: error.time, node: error.node, code: error.code, message: error.message }
    }
}

impl From<pb::RunningError> for RunningError {
    fn from(error: pb::RunningError) -> Self {
        Self { time: error.time, node: error.node, code: error.code, message: error.message }
    }
}

fn component(value: i32) -> ComponentState {
    match pb::ComponentState::try_from(value) {
        Ok(pb::ComponentState::Working) | Err(_) => ComponentState::Working,
        Ok(pb::ComponentState::Stopped) => ComponentState::Stopped,
        Ok(pb::ComponentState::Removed) => ComponentState::Removed,
        Ok(pb::ComponentState::Initializing) => ComponentState::Initializing,
        Ok(pb::ComponentState::Preparing) => ComponentState::Preparing,
        Ok(pb::ComponentState::MergeReady) => ComponentState::MergeReady,
        Ok(pb::ComponentState::WaitingMerge) => ComponentState::WaitingMerge,
    }
}

fn wire_component(state: ComponentState) -> i32 {
    match state {
        ComponentState::Working => pb::ComponentState::Working,
        ComponentState::Stopped => pb::ComponentState::Stopped,
        ComponentState::Removed => pb::ComponentState::Removed,
        ComponentState::Initializing => pb::ComponentState::Initializing,
        ComponentState::Preparing => pb::ComponentState::Preparing,
        ComponentState::MergeReady => pb::ComponentState::MergeReady,
        ComponentState::WaitingMerge => pb::ComponentState::WaitingMerge,
    }
    .into()
}

fn liveness(value: i32) -> NodeLiveness {
    match pb::NodeLiveness::try_from(value) {
        Ok(pb::NodeLiveness::Alive) | Err(_) => NodeLiveness::Alive,
        Ok(pb::NodeLiveness::Draining) => NodeLiveness::Draining,
        Ok(pb::NodeLiveness::Stopping) => NodeLiveness::Stopping,
    }
}

fn wire_liveness(value: NodeLiveness) -> i32 {
    match value {
        NodeLiveness::Alive => pb::NodeLiveness::Alive,
        NodeLiveness::Draining => pb::NodeLiveness::Draining,
        NodeLiveness::Stopping => pb::NodeLiveness::Stopping,
    }
    .into()
}

impl From<TableSpanStatus> for pb::TableSpanStatus {
    fn from(status: TableSpanStatus) -> Self {
        Self {
            id: Some(status.id.into()),
            component_status: wire_component(status.state),
            checkpoint_ts: status.checkpoint.0,
            event_size_per_second: status.event_size_per_second,
            mode: wire_mode(status.mode),
        }
    }
}

impl TryFrom<pb::TableSpanStatus> for TableSpanStatus {
    type Error = DecodeError;
    fn try_from(status: pb::TableSpanStatus) -> Result<Self> {
        Ok(Self {
            id: dispatcher(status.id, "TableSpanStatus", "ID")?,
            state: component(status.component_status),
            checkpoint: Ts(status.checkpoint_ts),
            event_size_per_second: status.event_size_per_second,
            mode: mode(status.mode),
        })
    }
}

impl From<HeartBeatRequest> for pb::HeartBeatRequest {
    fn from(request: HeartBeatRequest) -> Self {
        Self {
            changefeed_id: Some(request.changefeed.into()),
            watermark: request.watermark.map(Into::into),
            redo_watermark: request.redo_watermark.map(Into::into),
            statuses: wire_list(request.statuses),
            compelete_status: request.complete,
            err: request.error.map(Into::into),
        }
    }
}

impl TryFrom<pb::HeartBeatRequest> for HeartBeatRequest {
    type Error = DecodeError;
    fn try_from(request: pb::HeartBeatRequest) -> Result<Self> {
        Ok(Self {
            changefeed: changefeed(request.changefeed_id, "HeartBeatRequest")?,
            watermark: request.watermark.map(Into::into),
            redo_watermark: request.redo_watermark.map(Into::into),
            statuses: list(request.statuses)?,
            complete: request.compelete_status,
            error: request.err.map(Into::into),
        })
    }
}

impl From<DrainProgress> for pb::DrainProgress {
    fn from(progress: DrainProgress) -> Self {
        Self {
            target_node_id: progress.target.as_str().to_owned(),
            target_epoch: progress.epoch,
            target_dispatcher_count: progress.dispatchers,
            target_inflight_drain_move_count: progress.inflight_moves,
        }
    }
}

impl From<pb::DrainProgress> for DrainProgress {
    fn from(progress: pb::DrainProgress) -> Self {
        Self {
            target: progress.target_node_id.into(),
            epoch: progress.target_epoch,
            dispatchers: progress.target_dispatcher_count,
            inflight_moves: progress.target_inflight_drain_move_count,
        }
    }
}

impl From<MaintainerStatus> for pb::MaintainerStatus {
    fn from(status: MaintainerStatus) -> Self {
        Self {
            changefeed_id: Some(status.changefeed.into()),
            feed_state: status.feed_state,
            state: wire_component(status.state),
            checkpoint_ts: status.checkpoint.0,
            err: wire_list(status.errors),
            bootstrap_done: status.bootstrap_done,
            last_synced_ts: status.last_synced.0,
            drain_progress: status.drain.map(Into::into),
            maintainer_epoch: wire_epoch(status.epoch),
        }
    }
}

impl TryFrom<pb::MaintainerStatus> for MaintainerStatus {
    type Error = DecodeError;
    fn try_from(status: pb::MaintainerStatus) -> Result<Self> {
        Ok(Self {
            changefeed: changefeed(status.changefeed_id, "MaintainerStatus")?,
            feed_state: status.feed_state,
            state: component(status.state),
            checkpoint: Ts(status.checkpoint_ts),
            errors: status.err.into_iter().map(Into::into).collect(),
            bootstrap_done: status.bootstrap_done,
            last_synced: Ts(status.last_synced_ts),
            drain: status.drain_progress.map(Into::into),
            epoch: epoch(status.maintainer_epoch),
        })
    }
}

impl From<Vec<MaintainerStatus>> for pb::MaintainerHeartbeat {
    fn from(statuses: Vec<MaintainerStatus>) -> Self {
        Self { statuses: wire_list(statuses) }
    }
}

impl TryFrom<pb::MaintainerHeartbeat> for Vec<MaintainerStatus> {
    type Error = DecodeError;
    fn try_from(heartbeat: pb::MaintainerHeartbeat) -> Result<Self> {
        list(heartbeat.statuses)
    }
}

impl From<NodeHeartbeat> for pb::NodeHeartbeat {
    fn from(heartbeat: NodeHeartbeat) -> Self {
        Self {
            liveness: wire_liveness(heartbeat.liveness),
            node_epoch: heartbeat.node_epoch,
            dispatcher_drain_target_node_id: wire_node(heartbeat.drain_target),
            dispatcher_drain_target_epoch: heartbeat.drain_epoch,
        }
    }
}

impl From<pb::NodeHeartbeat> for NodeHeartbeat {
    fn from(heartbeat: pb::NodeHeartbeat) -> Self {
        Self {
            liveness: liveness(heartbeat.liveness),
            node_epoch: heartbeat.node_epoch,
            drain_target: node(heartbeat.dispatcher_drain_target_node_id),
            drain_epoch: heartbeat.dispatcher_drain_target_epoch,
        }
    }
}

// Barriers.

impl From<InfluencedTables> for pb::InfluencedTables {
    fn from(tables: InfluencedTables) -> Self {
        let (influence_type, table_ids, schema_id) = match tables {
            InfluencedTables::All => (pb::InfluenceType::All, Vec::new(), 0),
            InfluencedTables::Schema(schema) => (pb::InfluenceType::Db, Vec::new(), schema.0),
            InfluencedTables::Normal(tables) => {
                (pb::InfluenceType::Normal, tables.into_iter().map(|table| table.0).collect(), 0)
            }
        };
        Self { influence_type: influence_type.into(), table_i_ds: table_ids, schema_id }
    }
}

impl From<pb::InfluencedTables> for InfluencedTables {
    fn from(tables: pb::InfluencedTables) -> Self {
        match pb::InfluenceType::try_from(tables.influence_type) {
            // An unknown type blocks everything: the safe reading.
            Ok(pb::InfluenceType::All) | Err(_) => InfluencedTables::All,
            Ok(pb::InfluenceType::Db) => InfluencedTables::Schema(SchemaId(tables.schema_id)),
            Ok(pb::InfluenceType::Normal) => {
                InfluencedTables::Normal(tables.table_i_ds.into_iter().map(TableId).collect())
            }
        }
    }
}

impl From<RouteAdmission> for pb::RouteTableAdmission {
    fn from(route: RouteAdmission) -> Self {
        let mut wire = Self::default();
        match route {
            RouteAdmission::Admit { source, target } => {
                wire.set_action(pb::RouteTableAdmissionAction::Admit);
                (wire.source_schema_name, wire.source_table_name) = source;
                (wire.target_schema_name, wire.target_table_name) = target;
            }
            RouteAdmission::Release { source } => {
                wire.set_action(pb::RouteTableAdmissionAction::Release);
                (wire.source_schema_name, wire.source_table_name) = source;
            }
            RouteAdmission::ReleaseSchema { schema } => {
                wire.set_action(pb::RouteTableAdmissionAction::ReleaseSchema);
                wire.source_schema_name = schema;
            }
        }
        wire
    }
}

impl TryFrom<pb::RouteTableAdmission> for RouteAdmission {
    type Error = DecodeError;
    fn try_from(wire: pb::RouteTableAdmission) -> Result<Self> {
        let action = pb::RouteTableAdmissionAction::try_from(wire.action)
            .map_err(|_| DecodeError::Unusable { message: "RouteTableAdmission", field: "Action" })?;
        let source = (wire.source_schema_name, wire.source_table_name);
        Ok(match action {
            pb::RouteTableAdmissionAction::Admit => {
                Self::Admit { source, target: (wire.target_schema_name, wire.target_table_name) }
            }
            pb::RouteTableAdmissionAction::Release => Self::Release { source },
            pb::RouteTableAdmissionAction::ReleaseSchema => Self::ReleaseSchema { schema: source.0 },
        })
    }
}

impl From<BlockState> for pb::State {
    fn from(state: BlockState) -> Self {
        let stage = match state.stage {
            BlockStage::None => pb::BlockStage::None,
            BlockStage::Waiting => pb::BlockStage::Waiting,
            BlockStage::Writing => pb::BlockStage::Writing,
            BlockStage::Done => pb::BlockStage::Done,
        };
        Self {
            is_blocked: state.is_blocked,
            block_ts: state.key.commit_ts.0,
            block_tables: state.blocked.map(Into::into),
            need_dropped_tables: state.dropped.map(Into::into),
            need_added_tables: wire_list(state.added),
            updated_schemas: wire_list(state.schema_changes),
            is_sync_point: state.key.is_sync_point,
            stage: stage.into(),
            route_table_admissions: wire_list(state.routes),
        }
    }
}

impl TryFrom<pb::State> for BlockState {
    type Error = DecodeError;
    fn try_from(state: pb::State) -> Result<Self> {
        let stage = match pb::BlockStage::try_from(state.stage) {
            Ok(pb::BlockStage::None) | Err(_) => BlockStage::None,
            Ok(pb::BlockStage::Waiting) => BlockStage::Waiting,
            Ok(pb::BlockStage::Writing) => BlockStage::Writing,
            Ok(pb::BlockStage::Done) => BlockStage::Done,
        };
        Ok(Self {
            is_blocked: state.is_blocked,
            key: BarrierKey { commit_ts: Ts(state.block_ts), is_sync_point: state.is_sync_point },
            blocked: state.block_tables.map(Into::into),
            dropped: state.need_dropped_tables.map(Into::into),
            added: state.need_added_tables.into_iter().map(Into::into).collect(),
            schema_changes: state.updated_schemas.into_iter().map(Into::into).collect(),
            stage,
            routes: list(state.route_table_admissions)?,
        })
    }
}

impl From<AddedTable> for pb::Table {
    fn from(table: AddedTable) -> Self {
        Self { table_id: table.table.0, schema_id: table.schema.0, splitable: table.splittable }
    }
}

impl From<pb::Table> for AddedTable {
    fn from(table: pb::Table) -> Self {
        Self {
            table: TableId(table.table_id),
            schema: SchemaId(table.schema_id),
            splittable: table.splitable,
        }
    }
}

impl From<SchemaChange> for pb::SchemaIdChange {
    fn from(change: SchemaChange) -> Self {
        Self { table_id: change.table.0, old_schema_id: change.old.0, new_schema_id: change.new.0 }
    }
}

impl From<pb::SchemaIdChange> for SchemaChange {
    fn from(change: pb::SchemaIdChange) -> Self {
        Self {
            table: TableId(change.table_id),
            old: SchemaId(change.old_schema_id),
            new: SchemaId(change.new_schema_id),
        }
    }
}

impl From<TableSpanBlockStatus> for pb::TableSpanBlockStatus {
    fn from(status: TableSpanBlockStatus) -> Self {
        Self { id: Some(status.id.into()), state: Some(status.state.into()), mode: wire_mode(status.mode) }
    }
}

impl TryFrom<pb::TableSpanBlockStatus> for TableSpanBlockStatus {
    type Error = DecodeError;
    fn try_from(status: pb::TableSpanBlockStatus) -> Result<Self> {
        Ok(Self {
            id: dispatcher(status.id, "TableSpanBlockStatus", "ID")?,
            mode: mode(status.mode),
            state: need(status.state, "TableSpanBlockStatus", "state")?.try_into()?,
        })
    }
}

impl From<BlockStatusRequest> for pb::BlockStatusRequest {
    fn from(request: BlockStatusRequest) -> Self {
        Self {
            changefeed_id: Some(request.changefeed.into()),
            block_statuses: wire_list(request.statuses),
            mode: wire_mode(request.mode),
        }
    }
}

impl TryFrom<pb::BlockStatusRequest> for BlockStatusRequest {
    type Error = DecodeError;
    fn try_from(request: pb::BlockStatusRequest) -> Result<Self> {
        Ok(Self {
            changefeed: changefeed(request.changefeed_id, "BlockStatusRequest")?,
            mode: mode(request.mode),
            statuses: list(request.block_statuses)?,
        })
    }
}

impl From<InfluencedDispatchers> for pb::InfluencedDispatchers {
    fn from(influenced: InfluencedDispatchers) -> Self {
        let mut wire = Self::default();
        match influenced {
            InfluencedDispatchers::All { except } => {
                wire.set_influence_type(pb::InfluenceType::All);
                wire.exclude_dispatcher_id = except.map(Into::into);
            }
            InfluencedDispatchers::Schema { schema, except } => {
                wire.set_influence_type(pb::InfluenceType::Db);
                wire.schema_id = schema.0;
                wire.exclude_dispatcher_id = except.map(Into::into);
            }
            InfluencedDispatchers::Normal(ids) => {
                wire.set_influence_type(pb::InfluenceType::Normal);
                wire.dispatcher_i_ds = wire_list(ids);
            }
        }
        wire
    }
}

impl TryFrom<pb::InfluencedDispatchers> for InfluencedDispatchers {
    type Error = DecodeError;
    fn try_from(wire: pb::InfluencedDispatchers) -> Result<Self> {
        let except = wire.exclude_dispatcher_id.and_then(|id| DispatcherId::try_from(id).ok());
        match pb::InfluenceType::try_from(wire.influence_type) {
            Ok(pb::InfluenceType::All) => Ok(Self::All { except }),
            Ok(pb::InfluenceType::Db) => Ok(Self::Schema { schema: SchemaId(wire.schema_id), except }),
            Ok(pb::InfluenceType::Normal) => Ok(Self::Normal(list(wire.dispatcher_i_ds)?)),
            Err(_) => Err(DecodeError::Unusable { message: "InfluencedDispatchers", field: "InfluenceType" }),
        }
    }
}

impl From<DispatcherStatus> for pb::DispatcherStatus {
    fn from(status: DispatcherStatus) -> Self {
        Self {
            influenced_dispatchers: status.influenced.map(Into::into),
            action: status.action.map(|(action, key)| pb::DispatcherAction {
                action: match action {
                    BlockAction::Write => pb::Action::Write,
                    BlockAction::Pass => pb::Action::Pass,
                }
                .into(),
                commit_ts: key.commit_ts.0,
                is_sync_point: key.is_sync_point,
            }),
            ack: status
                .ack
                .map(|key| pb::Ack { commit_ts: key.commit_ts.0, is_sync_point: key.is_sync_point }),
            ignored_block_status: status.ignored.map(|key| pb::IgnoredBlockStatus {
                commit_ts: key.commit_ts.0,
                is_sync_point: key.is_sync_point,
            }),
        }
    }
}

impl TryFrom<pb::DispatcherStatus> for DispatcherStatus {
    type Error = DecodeError;
    fn try_from(status: pb::DispatcherStatus) -> Result<Self> {
        let key = |commit_ts, is_sync_point| BarrierKey { commit_ts: Ts(commit_ts), is_sync_point };
        let action = match status.action {
            None => None,
            Some(action) => {
                let kind = match pb::Action::try_from(action.action) {
                    Ok(pb::Action::Write) => BlockAction::Write,
                    Ok(pb::Action::Pass) => BlockAction::Pass,
                    Err(_) => {
                        return Err(DecodeError::Unusable { message: "DispatcherAction", field: "action" });
                    }
                };
                Some((kind, key(action.commit_ts, action.is_sync_point)))
            }
        };
        Ok(Self {
            influenced: status.influenced_dispatchers.map(TryInto::try_into).transpose()?,
            ack: status.ack.map(|ack| key(ack.commit_ts, ack.is_sync_point)),
            ignored: status.ignored_block_status.map(|ignored| key(ignored.commit_ts, ignored.is_sync_point)),
            action,
        })
    }
}

impl From<HeartBeatResponse> for pb::HeartBeatResponse {
    fn from(response: HeartBeatResponse) -> Self {
        Self {
            changefeed_id: Some(response.changefeed.into()),
            dispatcher_statuses: wire_list(response.statuses),
            mode: wire_mode(response.mode),
            maintainer_epoch: wire_epoch(response.epoch),
        }
    }
}

impl TryFrom<pb::HeartBeatResponse> for HeartBeatResponse {
    type Error = DecodeError;
    fn try_from(response: pb::HeartBeatResponse) -> Result<Self> {
        Ok(Self {
            changefeed: changefeed(response.changefeed_id, "HeartBeatResponse")?,
            mode: mode(response.mode),
            statuses: list(response.dispatcher_statuses)?,
            epoch: epoch(response.maintainer_epoch),
        })
    }
}

// Scheduling.

impl From<DispatcherConfig> for pb::DispatcherConfig {
    fn from(config: DispatcherConfig) -> Self {
        Self {
            span: Some(config.span.into()),
            start_ts: config.start_ts.0,
            dispatcher_id: Some(config.dispatcher.into()),
            schema_id: config.schema.0,
            mode: wire_mode(config.mode),
            skip_dml_as_start_ts: config.skip_dml_at_start,
        }
    }
}

impl TryFrom<pb::DispatcherConfig> for DispatcherConfig {
    type Error = DecodeError;
    fn try_from(config: pb::DispatcherConfig) -> Result<Self> {
        Ok(Self {
            span: need(config.span, "DispatcherConfig", "span")?.into(),
            start_ts: Ts(config.start_ts),
            dispatcher: dispatcher(config.dispatcher_id, "DispatcherConfig", "dispatcherID")?,
            schema: SchemaId(config.schema_id),
            mode: mode(config.mode),
            skip_dml_at_start: config.skip_dml_as_start_ts,
        })
    }
}

impl From<ScheduleDispatcherRequest> for pb::ScheduleDispatcherRequest {
    fn from(request: ScheduleDispatcherRequest) -> Self {
        Self {
            changefeed_id: Some(request.changefeed.into()),
            config: Some(request.config.into()),
            schedule_action: match request.action {
                ScheduleAction::Create => pb::ScheduleAction::Create,
                ScheduleAction::Remove => pb::ScheduleAction::Remove,
            }
            .into(),
            operator_type: match request.operator {
                OperatorType::Add => pb::OperatorType::OAdd,
                OperatorType::Remove => pb::OperatorType::ORemove,
                OperatorType::Move => pb::OperatorType::OMove,
                OperatorType::Split => pb::OperatorType::OSplit,
                OperatorType::Merge => pb::OperatorType::OMerge,
            }
            .into(),
            maintainer_epoch: wire_epoch(request.epoch),
        }
    }
}

impl TryFrom<pb::ScheduleDispatcherRequest> for ScheduleDispatcherRequest {
    type Error = DecodeError;
    fn try_from(request: pb::ScheduleDispatcherRequest) -> Result<Self> {
        const MESSAGE: &str = "ScheduleDispatcherRequest";
        let action = match pb::ScheduleAction::try_from(request.schedule_action) {
            Ok(pb::ScheduleAction::Create) => ScheduleAction::Create,
            Ok(pb::ScheduleAction::Remove) => ScheduleAction::Remove,
            Err(_) => return Err(DecodeError::Unusable { message: MESSAGE, field: "scheduleAction" }),
        };
        let operator = match pb::OperatorType::try_from(request.operator_type) {
            Ok(pb::OperatorType::OAdd) => OperatorType::Add,
            Ok(pb::OperatorType::ORemove) => OperatorType::Remove,
            Ok(pb::OperatorType::OMove) => OperatorType::Move,
            Ok(pb::OperatorType::OSplit) => OperatorType::Split,
            Ok(pb::OperatorType::OMerge) => OperatorType::Merge,
            Err(_) => return Err(DecodeError::Unusable { message: MESSAGE, field: "operatorType" }),
        };
        Ok(Self {
            changefeed: changefeed(request.changefeed_id, MESSAGE)?,
            config: need(request.config, MESSAGE, "config")?.try_into()?,
            action,
            operator,
            epoch: epoch(request.maintainer_epoch),
        })
    }
}

impl From<MergeDispatcherRequest> for pb::MergeDispatcherRequest {
    fn from(request: MergeDispatcherRequest) -> Self {
        Self {
            changefeed_id: Some(request.changefeed.into()),
            dispatcher_i_ds: wire_list(request.sources),
            merged_dispatcher_id: Some(request.merged.into()),
            mode: wire_mode(request.mode),
            maintainer_epoch: wire_epoch(request.epoch),
        }
    }
}

impl TryFrom<pb::MergeDispatcherRequest> for MergeDispatcherRequest {
    type Error = DecodeError;
    fn try_from(request: pb::MergeDispatcherRequest) -> Result<Self> {
        const MESSAGE: &str = "MergeDispatcherRequest";
        Ok(Self {
            changefeed: changefeed(request.changefeed_id, MESSAGE)?,
            sources: list(request.dispatcher_i_ds)?,
            merged: dispatcher(request.merged_dispatcher_id, MESSAGE, "mergedDispatcherID")?,
            mode: mode(request.mode),
            epoch: epoch(request.maintainer_epoch),
        })
    }
}

impl From<CheckpointTsMessage> for pb::CheckpointTsMessage {
    fn from(message: CheckpointTsMessage) -> Self {
        Self { changefeed_id: Some(message.changefeed.into()), checkpoint_ts: message.checkpoint.0 }
    }
}

impl TryFrom<pb::CheckpointTsMessage> for CheckpointTsMessage {
    type Error = DecodeError;
    fn try_from(message: pb::CheckpointTsMessage) -> Result<Self> {
        Ok(Self {
            changefeed: changefeed(message.changefeed_id, "CheckpointTsMessage")?,
            checkpoint: Ts(message.checkpoint_ts),
        })
    }
}

// Life cycle of dispatcher managers.

impl From<ConfigBytes> for Vec<u8> {
    fn from(config: ConfigBytes) -> Self {
        config.0.to_vec()
    }
}

fn config(bytes: Vec<u8>) -> ConfigBytes {
    ConfigBytes(Arc::from(bytes))
}

impl From<MaintainerBootstrapRequest> for pb::MaintainerBootstrapRequest {
    fn from(request: MaintainerBootstrapRequest) -> Self {
        Self {
            changefeed_id: Some(request.changefeed.into()),
            config: request.config.into(),
            start_ts: request.start_ts.0,
            table_trigger_event_dispatcher_id: request.trigger.map(Into::into),
            is_new_changefeed: request.is_new,
            table_trigger_redo_dispatcher_id: request.redo_trigger.map(Into::into),
            keyspace_id: request.keyspace_id,
            maintainer_epoch: wire_epoch(request.epoch),
        }
    }
}

impl TryFrom<pb::MaintainerBootstrapRequest> for MaintainerBootstrapRequest {
    type Error = DecodeError;
    fn try_from(request: pb::MaintainerBootstrapRequest) -> Result<Self> {
        Ok(Self {
            changefeed: changefeed(request.changefeed_id, "MaintainerBootstrapRequest")?,
            config: config(request.config),
            start_ts: Ts(request.start_ts),
            trigger: request.table_trigger_event_dispatcher_id.map(TryInto::try_into).transpose()?,
            is_new: request.is_new_changefeed,
            redo_trigger: request.table_trigger_redo_dispatcher_id.map(TryInto::try_into).transpose()?,
            keyspace_id: request.keyspace_id,
            epoch: epoch(request.maintainer_epoch),
        })
    }
}

impl From<BootstrapTableSpan> for pb::BootstrapTableSpan {
    fn from(span: BootstrapTableSpan) -> Self {
        Self {
            id: Some(span.id.into()),
            schema_id: span.schema.0,
            span: Some(span.span.into()),
            component_status: wire_component(span.state),
            checkpoint_ts: span.checkpoint.0,
            block_state: span.block.map(Into::into),
            mode: wire_mode(span.mode),
        }
    }
}

impl TryFrom<pb::BootstrapTableSpan> for BootstrapTableSpan {
    type Error = DecodeError;
    fn try_from(span: pb::BootstrapTableSpan) -> Result<Self> {
        const MESSAGE: &str = "BootstrapTableSpan";
        Ok(Self {
            id: dispatcher(span.id, MESSAGE, "ID")?,
            schema: SchemaId(span.schema_id),
            span: need(span.span, MESSAGE, "span")?.into(),
            state: component(span.component_status),
            checkpoint: Ts(span.checkpoint_ts),
            block: span.block_state.map(TryInto::try_into).transpose()?,
            mode: mode(span.mode),
        })
    }
}

impl From<MaintainerBootstrapResponse> for pb::MaintainerBootstrapResponse {
    fn from(response: MaintainerBootstrapResponse) -> Self {
        Self {
            changefeed_id: Some(response.changefeed.into()),
            spans: wire_list(response.spans),
            err: response.error.map(Into::into),
            checkpoint_ts: response.checkpoint.0,
            redo_checkpoint_ts: response.redo_checkpoint.0,
            operators: wire_list(response.operators),
            maintainer_epoch: wire_epoch(response.epoch),
            merge_operators: wire_list(response.merges),
        }
    }
}

impl TryFrom<pb::MaintainerBootstrapResponse> for MaintainerBootstrapResponse {
    type Error = DecodeError;
    fn try_from(response: pb::MaintainerBootstrapResponse) -> Result<Self> {
        Ok(Self {
            changefeed: changefeed(response.changefeed_id, "MaintainerBootstrapResponse")?,
            spans: list(response.spans)?,
            error: response.err.map(Into::into),
            checkpoint: Ts(response.checkpoint_ts),
            redo_checkpoint: Ts(response.redo_checkpoint_ts),
            operators: list(response.operators)?,
            merges: list(response.merge_operators)?,
            epoch: epoch(response.maintainer_epoch),
        })
    }
}

impl From<SchemaTables> for pb::SchemaInfo {
    fn from(schema: SchemaTables) -> Self {
        Self {
            schema_id: schema.id.0,
            schema_name: schema.name,
            tables: schema
                .tables
                .into_iter()
                .map(|table| pb::TableInfo { table_id: table.id.0, table_name: table.name })
                .collect(),
        }
    }
}

impl From<pb::SchemaInfo> for SchemaTables {
    fn from(schema: pb::SchemaInfo) -> Self {
        Self {
            id: SchemaId(schema.schema_id),
            name: schema.schema_name,
            tables: schema
                .tables
                .into_iter()
                .map(|table| TableName { id: TableId(table.table_id), name: table.table_name })
                .collect(),
        }
    }
}

impl From<MaintainerPostBootstrapRequest> for pb::MaintainerPostBootstrapRequest {
    fn from(request: MaintainerPostBootstrapRequest) -> Self {
        Self {
            changefeed_id: Some(request.changefeed.into()),
            table_trigger_event_dispatcher_id: Some(request.trigger.into()),
            schemas: wire_list(request.schemas),
            redo_schemas: wire_list(request.redo_schemas),
            maintainer_epoch: wire_epoch(request.epoch),
        }
    }
}

impl TryFrom<pb::MaintainerPostBootstrapRequest> for MaintainerPostBootstrapRequest {
    type Error = DecodeError;
    fn try_from(request: pb::MaintainerPostBootstrapRequest) -> Result<Self> {
        const MESSAGE: &str = "MaintainerPostBootstrapRequest";
        Ok(Self {
            changefeed: changefeed(request.changefeed_id, MESSAGE)?,
            trigger: dispatcher(
                request.table_trigger_event_dispatcher_id,
                MESSAGE,
                "table_trigger_event_dispatcher_id",
            )?,
            schemas: request.schemas.into_iter().map(Into::into).collect(),
            redo_schemas: request.redo_schemas.into_iter().map(Into::into).collect(),
            epoch: epoch(request.maintainer_epoch),
        })
    }
}

impl From<MaintainerPostBootstrapResponse> for pb::MaintainerPostBootstrapResponse {
    fn from(response: MaintainerPostBootstrapResponse) -> Self {
        Self {
            changefeed_id: Some(response.changefeed.into()),
            table_trigger_event_dispatcher_id: response.trigger.map(Into::into),
            err: response.error.map(Into::into),
            maintainer_epoch: wire_epoch(response.epoch),
        }
    }
}

impl TryFrom<pb::MaintainerPostBootstrapResponse> for MaintainerPostBootstrapResponse {
    type Error = DecodeError;
    fn try_from(response: pb::MaintainerPostBootstrapResponse) -> Result<Self> {
        Ok(Self {
            changefeed: changefeed(response.changefeed_id, "MaintainerPostBootstrapResponse")?,
            trigger: response
                .table_trigger_event_dispatcher_id
                .and_then(|id| DispatcherId::try_from(id).ok()),
            error: response.err.map(Into::into),
            epoch: epoch(response.maintainer_epoch),
        })
    }
}

impl From<MaintainerCloseRequest> for pb::MaintainerCloseRequest {
    fn from(request: MaintainerCloseRequest) -> Self {
        Self {
            changefeed_id: Some(request.changefeed.into()),
            removed: request.removed,
            maintainer_epoch: wire_epoch(request.epoch),
        }
    }
}

impl TryFrom<pb::MaintainerCloseRequest> for MaintainerCloseRequest {
    type Error = DecodeError;
    fn try_from(request: pb::MaintainerCloseRequest) -> Result<Self> {
        Ok(Self {
            changefeed: changefeed(request.changefeed_id, "MaintainerCloseRequest")?,
            removed: request.removed,
            epoch: epoch(request.maintainer_epoch),
        })
    }
}

impl From<MaintainerCloseResponse> for pb::MaintainerCloseResponse {
    fn from(response: MaintainerCloseResponse) -> Self {
        Self {
            changefeed_id: Some(response.changefeed.into()),
            success: response.success,
            maintainer_epoch: wire_epoch(response.epoch),
        }
    }
}

impl TryFrom<pb::MaintainerCloseResponse> for MaintainerCloseResponse {
    type Error = DecodeError;
    fn try_from(response: pb::MaintainerCloseResponse) -> Result<Self> {
        Ok(Self {
            changefeed: changefeed(response.changefeed_id, "MaintainerCloseResponse")?,
            success: response.success,
            epoch: epoch(response.maintainer_epoch),
        })
    }
}

// Coordinator and node.

impl From<AddMaintainerRequest> for pb::AddMaintainerRequest {
    fn from(request: AddMaintainerRequest) -> Self {
        Self {
            id: Some(request.changefeed.into()),
            config: request.config.into(),
            checkpoint_ts: request.checkpoint.0,
            is_new_changefeed: request.is_new,
            keyspace_id: request.keyspace_id,
            maintainer_epoch: wire_epoch(request.epoch),
        }
    }
}

impl TryFrom<pb::AddMaintainerRequest> for AddMaintainerRequest {
    type Error = DecodeError;
    fn try_from(request: pb::AddMaintainerRequest) -> Result<Self> {
        Ok(Self {
            changefeed: changefeed(request.id, "AddMaintainerRequest")?,
            config: config(request.config),
            checkpoint: Ts(request.checkpoint_ts),
            is_new: request.is_new_changefeed,
            keyspace_id: request.keyspace_id,
            epoch: epoch(request.maintainer_epoch),
        })
    }
}

impl From<RemoveMaintainerRequest> for pb::RemoveMaintainerRequest {
    fn from(request: RemoveMaintainerRequest) -> Self {
        Self {
            id: Some(request.changefeed.into()),
            cascade: request.cascade || request.removed,
            removed: request.removed,
            keyspace_id: request.keyspace_id,
            maintainer_epoch: wire_epoch(request.epoch),
        }
    }
}

impl TryFrom<pb::RemoveMaintainerRequest> for RemoveMaintainerRequest {
    type Error = DecodeError;
    fn try_from(request: pb::RemoveMaintainerRequest) -> Result<Self> {
        Ok(Self {
            changefeed: changefeed(request.id, "RemoveMaintainerRequest")?,
            cascade: request.cascade || request.removed,
            removed: request.removed,
            keyspace_id: request.keyspace_id,
            epoch: epoch(request.maintainer_epoch),
        })
    }
}

impl From<CoordinatorBootstrapRequest> for pb::CoordinatorBootstrapRequest {
    fn from(request: CoordinatorBootstrapRequest) -> Self {
        Self { version: request.version }
    }
}

impl From<pb::CoordinatorBootstrapRequest> for CoordinatorBootstrapRequest {
    fn from(request: pb::CoordinatorBootstrapRequest) -> Self {
        Self { version: request.version }
    }
}

impl From<CoordinatorBootstrapResponse> for pb::CoordinatorBootstrapResponse {
    fn from(response: CoordinatorBootstrapResponse) -> Self {
        Self {
            statuses: wire_list(response.statuses),
            drain_protocol_version: response.drain_protocol_version,
            dispatcher_drain_target_node_id: wire_node(response.drain_target),
            dispatcher_drain_target_epoch: response.drain_epoch,
        }
    }
}

impl TryFrom<pb::CoordinatorBootstrapResponse> for CoordinatorBootstrapResponse {
    type Error = DecodeError;
    fn try_from(response: pb::CoordinatorBootstrapResponse) -> Result<Self> {
        Ok(Self {
            statuses: list(response.statuses)?,
            drain_protocol_version: response.drain_protocol_version,
            drain_target: node(response.dispatcher_drain_target_node_id),
            drain_epoch: response.dispatcher_drain_target_epoch,
        })
    }
}

impl From<SetNodeLivenessRequest> for pb::SetNodeLivenessRequest {
    fn from(request: SetNodeLivenessRequest) -> Self {
        Self { target: wire_liveness(request.target), node_epoch: request.node_epoch }
    }
}

impl From<pb::SetNodeLivenessRequest> for SetNodeLivenessRequest {
    fn from(request: pb::SetNodeLivenessRequest) -> Self {
        Self { target: liveness(request.target), node_epoch: request.node_epoch }
    }
}

impl From<SetNodeLivenessResponse> for pb::SetNodeLivenessResponse {
    fn from(response: SetNodeLivenessResponse) -> Self {
        Self { applied: wire_liveness(response.applied), node_epoch: response.node_epoch }
    }
}

impl From<pb::SetNodeLivenessResponse> for SetNodeLivenessResponse {
    fn from(response: pb::SetNodeLivenessResponse) -> Self {
        Self { applied: liveness(response.applied), node_epoch: response.node_epoch }
    }
}

impl From<SetDispatcherDrainTargetRequest> for pb::SetDispatcherDrainTargetRequest {
    fn from(request: SetDispatcherDrainTargetRequest) -> Self {
        Self { target_node_id: wire_node(request.target), target_epoch: request.epoch }
    }
}

impl From<pb::SetDispatcherDrainTargetRequest> for SetDispatcherDrainTargetRequest {
    fn from(request: pb::SetDispatcherDrainTargetRequest) -> Self {
        Self { target: node(request.target_node_id), epoch: request.target_epoch }
    }
}
