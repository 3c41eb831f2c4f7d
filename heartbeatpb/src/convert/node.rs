//! What coordinator and nodes say to each other.

use super::manager::config;
use super::{
    Result, changefeed, epoch, liveness, node, reported, wire_epoch, wire_list, wire_liveness, wire_node,
};
use crate::wire::heartbeatpb as pb;
use crate::{
    AddMaintainerRequest, CoordinatorBootstrapRequest, CoordinatorBootstrapResponse, DecodeError,
    RemoveMaintainerRequest, SetDispatcherDrainTargetRequest, SetNodeLivenessRequest,
    SetNodeLivenessResponse, Ts,
};

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

impl From<pb::CoordinatorBootstrapResponse> for CoordinatorBootstrapResponse {
    fn from(response: pb::CoordinatorBootstrapResponse) -> Self {
        Self {
            statuses: reported(response.statuses),
            drain_protocol_version: response.drain_protocol_version,
            drain_target: node(response.dispatcher_drain_target_node_id),
            drain_epoch: response.dispatcher_drain_target_epoch,
        }
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
