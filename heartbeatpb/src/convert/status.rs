//! Progress, component states and liveness.

use super::{
    Result, changefeed, component, dispatcher, epoch, liveness, mode, node, reported, wire_component,
    wire_epoch, wire_list, wire_liveness, wire_mode, wire_node,
};
use crate::wire::heartbeatpb as pb;
use crate::{
    DecodeError, DrainProgress, HeartBeatRequest, MaintainerStatus, NodeHeartbeat, RunningError,
    TableSpanStatus, Ts, WallTime, Watermark,
};

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
            state: component(status.component_status, "TableSpanStatus")?,
            checkpoint: Ts(status.checkpoint_ts),
            event_size_per_second: status.event_size_per_second,
            mode: mode(status.mode, "TableSpanStatus")?,
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
            trouble: request.trouble.map(|trouble| (*trouble).into()),
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
            statuses: reported(request.statuses),
            complete: request.compelete_status,
            error: request.err.map(Into::into),
            trouble: request.trouble.map(|trouble| Box::new(trouble.into())),
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
            checkpoint_time_us: status.checkpoint_time.map_or(0, |time| time.0),
            trouble: status.trouble.map(Into::into),
        }
    }
}

impl TryFrom<pb::MaintainerStatus> for MaintainerStatus {
    type Error = DecodeError;
    fn try_from(status: pb::MaintainerStatus) -> Result<Self> {
        Ok(Self {
            changefeed: changefeed(status.changefeed_id, "MaintainerStatus")?,
            feed_state: status.feed_state,
            state: component(status.state, "MaintainerStatus")?,
            checkpoint: Ts(status.checkpoint_ts),
            errors: status.err.into_iter().map(Into::into).collect(),
            bootstrap_done: status.bootstrap_done,
            last_synced: Ts(status.last_synced_ts),
            drain: status.drain_progress.map(Into::into),
            epoch: epoch(status.maintainer_epoch),
            checkpoint_time: (status.checkpoint_time_us != 0).then_some(WallTime(status.checkpoint_time_us)),
            trouble: status.trouble.map(Into::into),
        })
    }
}

impl From<Vec<MaintainerStatus>> for pb::MaintainerHeartbeat {
    fn from(statuses: Vec<MaintainerStatus>) -> Self {
        Self { statuses: wire_list(statuses) }
    }
}

impl From<pb::MaintainerHeartbeat> for Vec<MaintainerStatus> {
    fn from(heartbeat: pb::MaintainerHeartbeat) -> Self {
        reported(heartbeat.statuses)
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
