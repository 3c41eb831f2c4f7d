//! The table of the whole control protocol: every topic and what it carries.
//!
//! Topics of row events live in `logservice`, next to the events that they carry.

use heartbeatpb::wire::heartbeatpb as pb;
use heartbeatpb::{
    AddMaintainerRequest, BlockStatusRequest, CheckpointTsMessage, CoordinatorBootstrapRequest,
    CoordinatorBootstrapResponse, DecodeError, HeartBeatRequest, HeartBeatResponse,
    MaintainerBootstrapRequest, MaintainerBootstrapResponse, MaintainerCloseRequest, MaintainerCloseResponse,
    MaintainerPostBootstrapRequest, MaintainerPostBootstrapResponse, MaintainerStatus,
    MergeDispatcherRequest, NodeHeartbeat, RemoveMaintainerRequest, ScheduleDispatcherRequest,
    SetDispatcherDrainTargetRequest, SetNodeLivenessRequest, SetNodeLivenessResponse,
};
use prost::Message as _;

use crate::codec::{WireMessage, io_type};

/// Which of the two streams between a pair of nodes carries a topic. They are not ordered relative to each
/// other, and heavy data never delays control.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum StreamClass {
    /// Row events.
    Event,
    /// Control.
    Command,
}

impl StreamClass {
    /// Name on the wire and in metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            StreamClass::Event => "event",
            StreamClass::Command => "command",
        }
    }
}

/// An address at a node, and the type of what arrives there.
pub trait Topic: 'static {
    /// Name on the wire.
    const NAME: &'static str;
    /// Stream that carries it.
    const CLASS: StreamClass;
    /// What it carries.
    type Message: WireMessage;
}

macro_rules! topic {
    (
        $(#[$doc:meta])* $topic:ident = $name:literal carries
        $(#[$mdoc:meta])* $message:ident {
            $($(#[$vdoc:meta])* $variant:ident($domain:ty) = $number:ident as $wire:ident,)+
        }
    ) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub enum $topic {}

        impl Topic for $topic {
            const NAME: &'static str = $name;
            const CLASS: StreamClass = StreamClass::Command;
            type Message = $message;
        }

        $(#[$mdoc])*
        #[derive(Clone, PartialEq, Debug)]
        pub enum $message {
            $($(#[$vdoc])* $variant($domain),)+
        }

        impl WireMessage for $message {
            fn io_type(&self) -> i32 {
                match self {
                    $(Self::$variant(_) => io_type::$number,)+
                }
            }

            fn encode(&self, out: &mut Vec<u8>) {
                let encoded = match self {
                    $(Self::$variant(message) => pb::$wire::from(message.clone()).encode_to_vec(),)+
                };
                out.extend_from_slice(&encoded);
            }

            fn decode(number: i32, bytes: &[u8]) -> Result<Self, DecodeError> {
                match number {
                    $(io_type::$number => {
                        let wire = pb::$wire::decode(bytes)
                            .map_err(|_| DecodeError::Malformed { message: stringify!($wire) })?;
                        Ok(Self::$variant(<$domain>::try_from(wire)?))
                    })+
                    other => Err(DecodeError::UnknownType(other)),
                }
            }
        }
    };
}

topic! {
    /// What nodes tell the coordinator.
    CoordinatorTopic = "coordinator" carries
    /// Message of [`CoordinatorTopic`].
    ToCoordinator {
        /// A node knows its coordinator and lists its maintainers.
        BootstrapResponse(CoordinatorBootstrapResponse) = COORDINATOR_BOOTSTRAP_RESPONSE as CoordinatorBootstrapResponse,
        /// State of maintainers.
        MaintainerHeartbeat(Vec<MaintainerStatus>) = MAINTAINER_HEARTBEAT_REQUEST as MaintainerHeartbeat,
        /// Liveness and drain target of a node.
        NodeHeartbeat(NodeHeartbeat) = NODE_HEARTBEAT_REQUEST as NodeHeartbeat,
        /// Answer to a liveness request.
        SetNodeLivenessResponse(SetNodeLivenessResponse) = SET_NODE_LIVENESS_RESPONSE as SetNodeLivenessResponse,
    }
}

topic! {
    /// What coordinator and dispatcher managers tell the maintainer manager of a node.
    MaintainerManagerTopic = "maintainer-manager" carries
    /// Message of [`MaintainerManagerTopic`].
    ToMaintainerManager {
        /// Who is coordinator.
        CoordinatorBootstrap(CoordinatorBootstrapRequest) = COORDINATOR_BOOTSTRAP_REQUEST as CoordinatorBootstrapRequest,
        /// Start a maintainer.
        AddMaintainer(AddMaintainerRequest) = ADD_MAINTAINER_REQUEST as AddMaintainerRequest,
        /// Stop a maintainer.
        RemoveMaintainer(RemoveMaintainerRequest) = REMOVE_MAINTAINER_REQUEST as RemoveMaintainerRequest,
        /// Change the node's liveness.
        SetNodeLiveness(SetNodeLivenessRequest) = SET_NODE_LIVENESS_REQUEST as SetNodeLivenessRequest,
        /// Change the node that is to be emptied.
        SetDrainTarget(SetDispatcherDrainTargetRequest) = SET_DISPATCHER_DRAIN_TARGET_REQUEST as SetDispatcherDrainTargetRequest,
        /// A checkpoint was persisted.
        CheckpointTs(CheckpointTsMessage) = CHECKPOINT_TS_MESSAGE as CheckpointTsMessage,
        /// Progress of dispatchers.
        HeartBeat(HeartBeatRequest) = HEART_BEAT_REQUEST as HeartBeatRequest,
        /// Block events of dispatchers.
        BlockStatus(BlockStatusRequest) = BLOCK_STATUS_REQUEST as BlockStatusRequest,
        /// Answer to a bootstrap.
        BootstrapResponse(MaintainerBootstrapResponse) = MAINTAINER_BOOTSTRAP_RESPONSE as MaintainerBootstrapResponse,
        /// Answer to a post-bootstrap.
        PostBootstrapResponse(MaintainerPostBootstrapResponse) = MAINTAINER_POST_BOOTSTRAP_RESPONSE as MaintainerPostBootstrapResponse,
    }
}

topic! {
    /// Answers to close requests; a topic of its own.
    MaintainerTopic = "maintainer" carries
    /// Message of [`MaintainerTopic`].
    ToMaintainer {
        /// Answer to a close.
        CloseResponse(MaintainerCloseResponse) = MAINTAINER_CLOSE_RESPONSE as MaintainerCloseResponse,
    }
}

topic! {
    /// What maintainers tell the dispatcher managers of a node.
    HeartbeatCollectorTopic = "heartbeat-collector" carries
    /// Message of [`HeartbeatCollectorTopic`].
    ToHeartbeatCollector {
        /// Answers to block statuses.
        HeartBeatResponse(HeartBeatResponse) = HEART_BEAT_RESPONSE as HeartBeatResponse,
        /// Create or remove a dispatcher.
        Schedule(ScheduleDispatcherRequest) = SCHEDULE_DISPATCHER_REQUEST as ScheduleDispatcherRequest,
        /// Join dispatchers.
        Merge(MergeDispatcherRequest) = MERGE_DISPATCHER_REQUEST as MergeDispatcherRequest,
        /// A checkpoint was persisted.
        CheckpointTs(CheckpointTsMessage) = CHECKPOINT_TS_MESSAGE as CheckpointTsMessage,
    }
}

topic! {
    /// What maintainers tell the dispatcher orchestrator of a node.
    OrchestratorTopic = "dispatcher-manager-manager" carries
    /// Message of [`OrchestratorTopic`].
    ToOrchestrator {
        /// Create or adopt a dispatcher manager.
        Bootstrap(MaintainerBootstrapRequest) = MAINTAINER_BOOTSTRAP_REQUEST as MaintainerBootstrapRequest,
        /// Start the table trigger.
        PostBootstrap(MaintainerPostBootstrapRequest) = MAINTAINER_POST_BOOTSTRAP_REQUEST as MaintainerPostBootstrapRequest,
        /// Close a dispatcher manager.
        Close(MaintainerCloseRequest) = MAINTAINER_CLOSE_REQUEST as MaintainerCloseRequest,
    }
}
