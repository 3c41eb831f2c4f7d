//! Numbers that say how a payload is encoded.
//!
//! Wire facts shared with peers that are not ours (messaging §3): append only. Our own start at
//! [`FIRST_OWN`].

macro_rules! numbers {
    ($($(#[$doc:meta])* $constant:ident = $number:literal as $name:literal;)+) => {
        $($(#[$doc])* pub const $constant: i32 = $number;)+

        /// Name of a number, for people and for the label of a metric.
        #[must_use]
        pub const fn name(number: i32) -> &'static str {
            match number {
                $($number => $name,)+
                FIRST_OWN.. => "Own",
                _ => "Unknown",
            }
        }

        /// Every number of the shared protocol with its name.
        pub const ALL: &[(i32, &str)] = &[$(($number, $name),)+];
    };
}

/// First number of messages that only Millrace nodes understand.
pub const FIRST_OWN: i32 = 1000;

numbers! {
    /// Event service to collector. Binary.
    BATCH_DML_EVENT = 1 as "BatchDMLEvent";
    /// Event service to collector. Binary.
    DDL_EVENT = 2 as "DDLEvent";
    /// Event service to collector. Binary.
    BATCH_RESOLVED_TS = 3 as "BatchResolvedTs";
    /// Event service to collector. Binary.
    SYNC_POINT_EVENT = 4 as "SyncPointEvent";
    /// Event service to collector. Binary.
    HANDSHAKE_EVENT = 5 as "HandshakeEvent";
    /// Event service to collector. Binary.
    READY_EVENT = 6 as "ReadyEvent";
    /// Event service to collector. Binary.
    NOT_REUSABLE_EVENT = 7 as "NotReusableEvent";
    /// Log coordinator to all nodes, every 1 s. No content.
    LOG_COORDINATOR_BROADCAST_REQUEST = 8 as "LogCoordinatorBroadcastRequest";
    /// Event store to log coordinator.
    EVENT_STORE_STATE = 9 as "EventStoreState";
    /// Collector to log coordinator.
    REUSABLE_EVENT_SERVICE_REQUEST = 10 as "ReusableEventServiceRequest";
    /// Log coordinator to collector.
    REUSABLE_EVENT_SERVICE_RESPONSE = 11 as "ReusableEventServiceResponse";
    /// Coordinator to all nodes.
    LOG_COORDINATOR_RESOLVED_TS_REQUEST = 12 as "LogCoordinatorResolvedTsRequest";
    /// Dispatcher manager to maintainer.
    HEART_BEAT_REQUEST = 13 as "HeartBeatRequest";
    /// Maintainer to dispatcher managers.
    HEART_BEAT_RESPONSE = 14 as "HeartBeatResponse";
    /// Maintainer to dispatcher manager.
    SCHEDULE_DISPATCHER_REQUEST = 15 as "ScheduleDispatcherRequest";
    /// Collector to event service. Protobuf of `eventpb`.
    DISPATCHER_REQUEST = 16 as "DispatcherRequest";
    /// Coordinator to maintainer's node; maintainer to dispatcher manager of its own node.
    CHECKPOINT_TS_MESSAGE = 17 as "CheckpointTsMessage";
    /// Dispatcher manager to maintainer.
    BLOCK_STATUS_REQUEST = 18 as "BlockStatusRequest";
    /// Collector to event service. Binary.
    DISPATCHER_HEARTBEAT = 19 as "DispatcherHeartbeat";
    /// Event service to collector. Binary.
    DISPATCHER_HEARTBEAT_RESPONSE = 20 as "DispatcherHeartbeatResponse";
    /// Maintainer to redo table-trigger node.
    REDO_META_MESSAGE = 21 as "RedoMetaMessage";
    /// Maintainer to dispatcher manager.
    MERGE_DISPATCHER_REQUEST = 22 as "MergeDispatcherRequest";
    /// Collector to event service. Binary.
    CONGESTION_CONTROL = 23 as "CongestionControl";
    /// Coordinator to all nodes.
    COORDINATOR_BOOTSTRAP_REQUEST = 24 as "CoordinatorBootstrapRequest";
    /// Node to coordinator.
    COORDINATOR_BOOTSTRAP_RESPONSE = 25 as "CoordinatorBootstrapResponse";
    /// Coordinator to node.
    ADD_MAINTAINER_REQUEST = 26 as "AddMaintainerRequest";
    /// Coordinator to node.
    REMOVE_MAINTAINER_REQUEST = 27 as "RemoveMaintainerRequest";
    /// Node to coordinator.
    MAINTAINER_HEARTBEAT_REQUEST = 28 as "MaintainerHeartbeatRequest";
    /// Maintainer to all nodes.
    MAINTAINER_BOOTSTRAP_REQUEST = 29 as "MaintainerBootstrapRequest";
    /// Node to maintainer.
    MAINTAINER_BOOTSTRAP_RESPONSE = 30 as "MaintainerBootstrapResponse";
    /// Maintainer to table-trigger node.
    MAINTAINER_POST_BOOTSTRAP_REQUEST = 31 as "MaintainerPostBootstrapRequest";
    /// Node to maintainer.
    MAINTAINER_POST_BOOTSTRAP_RESPONSE = 32 as "MaintainerPostBootstrapResponse";
    /// Maintainer to nodes.
    MAINTAINER_CLOSE_REQUEST = 33 as "MaintainerCloseRequest";
    /// Node to maintainer.
    MAINTAINER_CLOSE_RESPONSE = 34 as "MaintainerCloseResponse";
    /// Log coordinator to coordinator.
    LOG_COORDINATOR_RESOLVED_TS_RESPONSE = 35 as "LogCoordinatorResolvedTsResponse";
    /// Initiator to responder, the first frame of a stream. JSON.
    MESSAGE_HAND_SHAKE = 36 as "MessageHandShake";
    /// Event service to log coordinator.
    LOG_COORDINATOR_CHANGEFEED_STATES = 37 as "LogCoordinatorChangefeedStates";
    /// Redo table-trigger node to maintainer.
    REDO_RESOLVED_TS_PROGRESS_MESSAGE = 38 as "RedoResolvedTsProgressMessage";
    /// Maintainer to all nodes.
    REDO_RESOLVED_TS_FORWARD_MESSAGE = 39 as "RedoResolvedTsForwardMessage";
    /// Reserved.
    DISPATCHER_SET_CHECKSUM_UPDATE_REQUEST = 40 as "DispatcherSetChecksumUpdateRequest";
    /// Reserved.
    DISPATCHER_SET_CHECKSUM_ACK_RESPONSE = 41 as "DispatcherSetChecksumAckResponse";
    /// Node to coordinator.
    NODE_HEARTBEAT_REQUEST = 42 as "NodeHeartbeatRequest";
    /// Coordinator to node.
    SET_NODE_LIVENESS_REQUEST = 43 as "SetNodeLivenessRequest";
    /// Node to coordinator.
    SET_NODE_LIVENESS_RESPONSE = 44 as "SetNodeLivenessResponse";
    /// Coordinator to all nodes.
    SET_DISPATCHER_DRAIN_TARGET_REQUEST = 45 as "SetDispatcherDrainTargetRequest";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_dense_and_their_names_are_unique() {
        let numbers: Vec<i32> = ALL.iter().map(|(number, _)| *number).collect();
        assert_eq!(numbers, (1..=45).collect::<Vec<_>>());
        let names: std::collections::BTreeSet<_> = ALL.iter().map(|(_, name)| *name).collect();
        assert_eq!(names.len(), ALL.len());
    }

    #[test]
    fn numbers_outside_the_table_have_a_name_too() {
        assert_eq!(name(0), "Unknown");
        assert_eq!(name(46), "Unknown");
        assert_eq!(name(FIRST_OWN), "Own");
        assert_eq!(name(SET_DISPATCHER_DRAIN_TARGET_REQUEST), "SetDispatcherDrainTargetRequest");
    }
}
