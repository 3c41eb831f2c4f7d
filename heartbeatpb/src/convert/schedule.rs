//! Placement of dispatchers, and persisted checkpoints.

use super::{Result, changefeed, dispatcher, epoch, list, mode, need, wire_epoch, wire_list, wire_mode};
use crate::wire::heartbeatpb as pb;
use crate::{
    CheckpointTsMessage, DecodeError, DispatcherConfig, MergeDispatcherRequest, OperatorType, ScheduleAction,
    ScheduleDispatcherRequest, SchemaId, Ts,
};

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
            mode: mode(config.mode, "DispatcherConfig")?,
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
            mode: mode(request.mode, MESSAGE)?,
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
