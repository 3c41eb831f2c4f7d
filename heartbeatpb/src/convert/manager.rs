//! Bootstrap and close of dispatcher managers.

use std::sync::Arc;

use super::{
    Result, changefeed, component, dispatcher, epoch, mode, need, reported, wire_component, wire_epoch,
    wire_list, wire_mode,
};
use crate::wire::heartbeatpb as pb;
use crate::{
    BootstrapTableSpan, ConfigBytes, DecodeError, DispatcherId, MaintainerBootstrapRequest,
    MaintainerBootstrapResponse, MaintainerCloseRequest, MaintainerCloseResponse,
    MaintainerPostBootstrapRequest, MaintainerPostBootstrapResponse, SchemaId, SchemaTables, TableId,
    TableName, Ts,
};

impl From<ConfigBytes> for Vec<u8> {
    fn from(config: ConfigBytes) -> Self {
        config.0.to_vec()
    }
}

pub(super) fn config(bytes: Vec<u8>) -> ConfigBytes {
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
            state: component(span.component_status, MESSAGE)?,
            checkpoint: Ts(span.checkpoint_ts),
            block: span.block_state.map(TryInto::try_into).transpose()?,
            mode: mode(span.mode, MESSAGE)?,
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
            spans: reported(response.spans),
            error: response.err.map(Into::into),
            checkpoint: Ts(response.checkpoint_ts),
            redo_checkpoint: Ts(response.redo_checkpoint_ts),
            operators: reported(response.operators),
            merges: reported(response.merge_operators),
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
