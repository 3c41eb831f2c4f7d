//! Barrier reports and the answers to them.

use super::{
    Result, changefeed, dispatcher, epoch, list, mode, need, reported, wire_epoch, wire_list, wire_mode,
};
use crate::wire::heartbeatpb as pb;
use crate::{
    AddedTable, BarrierKey, BlockAction, BlockStage, BlockState, BlockStatusRequest, DecodeError,
    DispatcherId, DispatcherStatus, HeartBeatResponse, InfluencedDispatchers, InfluencedTables,
    RouteAdmission, SchemaChange, SchemaId, TableId, TableSpanBlockStatus, Ts,
};

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

impl TryFrom<pb::InfluencedTables> for InfluencedTables {
    type Error = DecodeError;
    fn try_from(tables: pb::InfluencedTables) -> Result<Self> {
        match pb::InfluenceType::try_from(tables.influence_type) {
            Ok(pb::InfluenceType::All) => Ok(Self::All),
            Ok(pb::InfluenceType::Db) => Ok(Self::Schema(SchemaId(tables.schema_id))),
            Ok(pb::InfluenceType::Normal) => {
                Ok(Self::Normal(tables.table_i_ds.into_iter().map(TableId).collect()))
            }
            Err(_) => Err(DecodeError::Unusable { message: "InfluencedTables", field: "InfluenceType" }),
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
            Ok(pb::BlockStage::None) => BlockStage::None,
            Ok(pb::BlockStage::Waiting) => BlockStage::Waiting,
            Ok(pb::BlockStage::Writing) => BlockStage::Writing,
            Ok(pb::BlockStage::Done) => BlockStage::Done,
            Err(_) => return Err(DecodeError::Unusable { message: "State", field: "stage" }),
        };
        Ok(Self {
            is_blocked: state.is_blocked,
            key: BarrierKey { commit_ts: Ts(state.block_ts), is_sync_point: state.is_sync_point },
            blocked: state.block_tables.map(TryInto::try_into).transpose()?,
            dropped: state.need_dropped_tables.map(TryInto::try_into).transpose()?,
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
            mode: mode(status.mode, "TableSpanBlockStatus")?,
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
            mode: mode(request.mode, "BlockStatusRequest")?,
            statuses: reported(request.block_statuses),
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
            mode: mode(response.mode, "HeartBeatResponse")?,
            statuses: reported(response.dispatcher_statuses),
            epoch: epoch(response.maintainer_epoch),
        })
    }
}
