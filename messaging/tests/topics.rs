//! The table of the protocol: each message of each topic has its number and survives the wire.

use std::collections::BTreeSet;

use heartbeatpb::{
    AddMaintainerRequest, BlockStatusRequest, ChangefeedId, CheckpointTsMessage, ComponentState, ConfigBytes,
    CoordinatorBootstrapRequest, CoordinatorBootstrapResponse, DecodeError, DispatcherConfig, DispatcherId,
    Gid, HeartBeatRequest, HeartBeatResponse, MaintainerBootstrapRequest, MaintainerBootstrapResponse,
    MaintainerCloseRequest, MaintainerCloseResponse, MaintainerEpoch, MaintainerPostBootstrapRequest,
    MaintainerPostBootstrapResponse, MaintainerStatus, MergeDispatcherRequest, Mode, NodeHeartbeat,
    NodeLiveness, OperatorType, RemoveMaintainerRequest, ScheduleAction, ScheduleDispatcherRequest, SchemaId,
    SetDispatcherDrainTargetRequest, SetNodeLivenessRequest, SetNodeLivenessResponse, TableId, TableSpan, Ts,
    Watermark,
};
use messaging::{
    CoordinatorTopic, HeartbeatCollectorTopic, MaintainerManagerTopic, MaintainerTopic, OrchestratorTopic,
    StreamClass, ToCoordinator, ToHeartbeatCollector, ToMaintainer, ToMaintainerManager, ToOrchestrator,
    Topic, WireMessage,
};

const ID: DispatcherId = DispatcherId::new(3, 4);

fn feed() -> ChangefeedId {
    ChangefeedId { gid: Gid::new(1, 2), name: "feed".into(), keyspace: "default".into() }
}

fn epoch() -> Option<MaintainerEpoch> {
    MaintainerEpoch::from_wire(7)
}

fn config() -> ConfigBytes {
    ConfigBytes(b"{}".as_slice().into())
}

/// Checks every message of a topic, and that the topic knows no other number.
fn check<T: Topic>(name: &str, messages: &[(i32, T::Message)])
where
    T::Message: PartialEq + std::fmt::Debug,
{
    assert_eq!((T::NAME, T::CLASS), (name, StreamClass::Command));
    let mut numbers = BTreeSet::new();
    for (number, message) in messages {
        assert_eq!(message.io_type(), *number, "{message:?}");
        assert!(numbers.insert(*number), "{number} twice");
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        assert_eq!(&T::Message::decode(*number, &bytes).expect("own bytes"), message);
        assert!(T::Message::decode(*number, b"\xff\xff").is_err(), "{number} accepts garbage");
    }
    for number in (-1..60).filter(|number| !numbers.contains(number)) {
        let refused = T::Message::decode(number, b"").expect_err("not of this topic");
        assert_eq!(refused, DecodeError::UnknownType(number));
    }
}

// behaviour: messaging-16
#[test]
fn messages_to_the_coordinator() {
    let status = MaintainerStatus {
        changefeed: feed(),
        feed_state: "normal".into(),
        state: ComponentState::Working,
        checkpoint: Ts(9),
        errors: vec![],
        bootstrap_done: true,
        last_synced: Ts(8),
        drain: None,
        epoch: epoch(),
        checkpoint_time: None,
        trouble: None,
    };
    let bootstrap = CoordinatorBootstrapResponse {
        statuses: vec![status.clone()],
        drain_protocol_version: 1,
        drain_target: Some("n".into()),
        drain_epoch: 2,
    };
    let heartbeat =
        NodeHeartbeat { liveness: NodeLiveness::Draining, node_epoch: 1, drain_target: None, drain_epoch: 2 };
    let liveness = SetNodeLivenessResponse { applied: NodeLiveness::Stopping, node_epoch: 5 };
    check::<CoordinatorTopic>(
        "coordinator",
        &[
            (25, ToCoordinator::BootstrapResponse(bootstrap)),
            (28, ToCoordinator::MaintainerHeartbeat(vec![status])),
            (42, ToCoordinator::NodeHeartbeat(heartbeat)),
            (44, ToCoordinator::SetNodeLivenessResponse(liveness)),
        ],
    );
}

// behaviour: messaging-16
#[test]
fn messages_to_the_maintainer_manager() {
    let add = AddMaintainerRequest {
        changefeed: feed(),
        config: config(),
        checkpoint: Ts(5),
        is_new: true,
        keyspace_id: 0,
        epoch: epoch(),
    };
    let remove = RemoveMaintainerRequest {
        changefeed: feed(),
        cascade: true,
        removed: true,
        keyspace_id: 0,
        epoch: epoch(),
    };
    let heartbeat = HeartBeatRequest {
        changefeed: feed(),
        watermark: Some(Watermark::NONE),
        redo_watermark: None,
        statuses: vec![],
        complete: true,
        error: None,
        trouble: None,
    };
    let bootstrap = MaintainerBootstrapResponse {
        changefeed: feed(),
        spans: vec![],
        error: None,
        checkpoint: Ts(5),
        redo_checkpoint: Ts(0),
        operators: vec![],
        merges: vec![],
        epoch: epoch(),
    };
    let post = MaintainerPostBootstrapResponse {
        changefeed: feed(),
        trigger: Some(ID),
        error: None,
        epoch: epoch(),
    };
    let block = BlockStatusRequest { changefeed: feed(), mode: Mode::Redo, statuses: vec![] };
    let checkpoint = CheckpointTsMessage { changefeed: feed(), checkpoint: Ts(5) };
    let liveness = SetNodeLivenessRequest { target: NodeLiveness::Draining, node_epoch: 5 };
    let drain = SetDispatcherDrainTargetRequest { target: None, epoch: 3 };
    check::<MaintainerManagerTopic>(
        "maintainer-manager",
        &[
            (13, ToMaintainerManager::HeartBeat(heartbeat)),
            (17, ToMaintainerManager::CheckpointTs(checkpoint)),
            (18, ToMaintainerManager::BlockStatus(block)),
            (24, ToMaintainerManager::CoordinatorBootstrap(CoordinatorBootstrapRequest { version: 4 })),
            (26, ToMaintainerManager::AddMaintainer(add)),
            (27, ToMaintainerManager::RemoveMaintainer(remove)),
            (30, ToMaintainerManager::BootstrapResponse(bootstrap)),
            (32, ToMaintainerManager::PostBootstrapResponse(post)),
            (43, ToMaintainerManager::SetNodeLiveness(liveness)),
            (45, ToMaintainerManager::SetDrainTarget(drain)),
        ],
    );
}

// behaviour: messaging-16
#[test]
fn messages_to_a_maintainer() {
    let close = MaintainerCloseResponse { changefeed: feed(), success: true, epoch: epoch() };
    check::<MaintainerTopic>("maintainer", &[(34, ToMaintainer::CloseResponse(close))]);
}

// behaviour: messaging-16
#[test]
fn messages_to_the_heartbeat_collector() {
    let schedule = ScheduleDispatcherRequest {
        changefeed: feed(),
        config: DispatcherConfig {
            span: TableSpan::whole(TableId(9)),
            start_ts: Ts(5),
            dispatcher: ID,
            schema: SchemaId(2),
            mode: Mode::Default,
            skip_dml_at_start: false,
        },
        action: ScheduleAction::Create,
        operator: OperatorType::Add,
        epoch: epoch(),
    };
    let merge = MergeDispatcherRequest {
        changefeed: feed(),
        sources: vec![ID],
        merged: DispatcherId::new(5, 6),
        mode: Mode::Default,
        epoch: epoch(),
    };
    let response =
        HeartBeatResponse { changefeed: feed(), mode: Mode::Default, statuses: vec![], epoch: epoch() };
    let checkpoint = CheckpointTsMessage { changefeed: feed(), checkpoint: Ts(5) };
    check::<HeartbeatCollectorTopic>(
        "heartbeat-collector",
        &[
            (14, ToHeartbeatCollector::HeartBeatResponse(response)),
            (15, ToHeartbeatCollector::Schedule(schedule)),
            (17, ToHeartbeatCollector::CheckpointTs(checkpoint)),
            (22, ToHeartbeatCollector::Merge(merge)),
        ],
    );
}

// behaviour: messaging-16
#[test]
fn messages_to_the_orchestrator() {
    let bootstrap = MaintainerBootstrapRequest {
        changefeed: feed(),
        config: config(),
        start_ts: Ts(5),
        trigger: Some(ID),
        is_new: true,
        redo_trigger: None,
        keyspace_id: 0,
        epoch: epoch(),
    };
    let post = MaintainerPostBootstrapRequest {
        changefeed: feed(),
        trigger: ID,
        schemas: vec![],
        redo_schemas: vec![],
        epoch: epoch(),
    };
    let close = MaintainerCloseRequest { changefeed: feed(), removed: false, epoch: epoch() };
    check::<OrchestratorTopic>(
        "dispatcher-manager-manager",
        &[
            (29, ToOrchestrator::Bootstrap(bootstrap)),
            (31, ToOrchestrator::PostBootstrap(post)),
            (33, ToOrchestrator::Close(close)),
        ],
    );
}
