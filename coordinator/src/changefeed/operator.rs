//! Changes of placement of one changefeed: at most one at a time, repeated until their effect is seen.

use std::time::{Duration, Instant};

use heartbeatpb::{ComponentState, MaintainerEpoch, MaintainerStatus, NodeId};
use messaging::ToMaintainerManager;

use super::{Changefeed, epoch_matches, remove_request};

/// Between two sends of the same command.
pub const RESEND: Duration = Duration::from_millis(500);

/// A change of placement.
#[derive(Clone, PartialEq, Debug)]
pub enum Operator {
    /// Starts the maintainer on a node.
    Add {
        /// The node.
        dest: NodeId,
        /// Epoch of the new maintainer.
        epoch: Option<MaintainerEpoch>,
    },
    /// Hands the maintainer from one node to another; its dispatchers stay where they are.
    Move {
        /// Where it was.
        origin: NodeId,
        /// Epoch of the maintainer there.
        origin_epoch: Option<MaintainerEpoch>,
        /// Where it goes to. The origin itself when the first choice left before the origin had stopped.
        dest: NodeId,
        /// Epoch of the new maintainer; durable before the operator begins.
        epoch: Option<MaintainerEpoch>,
        /// How far it is.
        phase: MovePhase,
    },
    /// Stops the maintainer and its dispatchers.
    Stop {
        /// Who is told: the maintainer's node, or the coordinator's own when there is none.
        node: NodeId,
        /// The changefeed is deleted.
        removed: bool,
        /// Epoch of the maintainer that is to stop.
        epoch: Option<MaintainerEpoch>,
    },
}

/// How far a move is. The end of the first phase and the begin of the second are one step, so there is no time
/// at which nobody is told anything.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MovePhase {
    /// The origin is told to stop.
    Removing,
    /// The origin is known to have stopped, and the destination is told to start.
    Adding,
}

/// What a report means for an operator.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Seen {
    /// Nothing.
    Nothing,
    /// A move's origin has stopped: the changefeed belongs to the destination now.
    OriginStopped,
    /// It is done.
    Done,
}

/// What the loss of a node does to an operator.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NodeLoss {
    /// Nothing.
    Unaffected,
    /// A stop's node is gone, and its maintainer with it; what that has elsewhere is not.
    StopLost,
    /// A move's origin is gone and need not be waited for: the changefeed belongs to the destination now.
    OriginGone,
    /// It ends; the changefeed needs a new place.
    Cancelled,
}

impl Operator {
    /// Value of the label `type`.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Add { .. } => "add",
            Self::Move { .. } => "move",
            Self::Stop { .. } => "stop",
        }
    }

    /// The node that has to act.
    #[must_use]
    pub const fn node(&self) -> &NodeId {
        match self {
            Self::Add { dest, .. } | Self::Move { dest, phase: MovePhase::Adding, .. } => dest,
            Self::Move { origin, phase: MovePhase::Removing, .. } => origin,
            Self::Stop { node, .. } => node,
        }
    }

    /// Whether it concerns a node.
    #[must_use]
    pub fn involves(&self, of: &NodeId) -> bool {
        match self {
            Self::Add { dest, .. } => dest == of,
            Self::Move { origin, dest, .. } => origin == of || dest == of,
            Self::Stop { node, .. } => node == of,
        }
    }

    /// The node that it moves away from.
    #[must_use]
    pub fn moves_from(&self) -> Option<&NodeId> {
        match self {
            Self::Move { origin, .. } => Some(origin),
            Self::Add { .. } | Self::Stop { .. } => None,
        }
    }

    /// Whether it tells this very maintainer to stop.
    #[must_use]
    pub fn stops(&self, on: &NodeId, of: Option<MaintainerEpoch>) -> bool {
        match self {
            Self::Move { origin: node, origin_epoch: epoch, phase: MovePhase::Removing, .. }
            | Self::Stop { node, epoch, .. } => node == on && *epoch == of,
            Self::Move { phase: MovePhase::Adding, .. } | Self::Add { .. } => false,
        }
    }

    /// The maintainer that still runs although a larger epoch is stored already.
    #[must_use]
    pub fn outgoing(&self) -> Option<(&NodeId, Option<MaintainerEpoch>)> {
        match self {
            Self::Move { origin, origin_epoch, phase: MovePhase::Removing, .. } => {
                Some((origin, *origin_epoch))
            }
            Self::Move { phase: MovePhase::Adding, .. } | Self::Add { .. } | Self::Stop { .. } => None,
        }
    }

    /// The command.
    #[must_use]
    pub fn message(&self, changefeed: &Changefeed) -> ToMaintainerManager {
        match self {
            Self::Add { .. } | Self::Move { phase: MovePhase::Adding, .. } => {
                ToMaintainerManager::AddMaintainer(changefeed.add_request())
            }
            Self::Move { origin_epoch, phase: MovePhase::Removing, .. } => {
                ToMaintainerManager::RemoveMaintainer(remove_request(
                    changefeed.id(),
                    false,
                    false,
                    changefeed.info.keyspace_id,
                    *origin_epoch,
                ))
            }
            Self::Stop { removed, epoch, .. } => ToMaintainerManager::RemoveMaintainer(remove_request(
                changefeed.id(),
                true,
                *removed,
                changefeed.info.keyspace_id,
                *epoch,
            )),
        }
    }

    /// Takes a report. A remove-only maintainer never reports a finished bootstrap, so it is not mistaken for
    /// a started one.
    pub fn on_status(&mut self, from: &NodeId, status: &MaintainerStatus, tolerate_none: bool) -> Seen {
        let working = status.state == ComponentState::Working;
        let of = |epoch| epoch_matches(status.epoch, epoch, tolerate_none);
        let started = |dest: &NodeId, epoch| from == dest && working && status.bootstrap_done && of(epoch);
        let done = match self {
            Self::Move { origin, origin_epoch, phase: phase @ MovePhase::Removing, .. } => {
                if from == origin && !working && of(*origin_epoch) {
                    *phase = MovePhase::Adding;
                    return Seen::OriginStopped;
                }
                false
            }
            Self::Add { dest, epoch } | Self::Move { dest, epoch, phase: MovePhase::Adding, .. } => {
                started(dest, *epoch)
            }
            Self::Stop { node, epoch, .. } => from == node && !working && of(*epoch),
        };
        if done { Seen::Done } else { Seen::Nothing }
    }

    /// A node left.
    ///
    /// A move whose destination may have been told to start ends when that leaves: starting the origin again
    /// could make two maintainers of one epoch.
    pub fn on_node_removed(&mut self, gone: &NodeId) -> NodeLoss {
        match self {
            Self::Add { dest, .. } | Self::Move { dest, phase: MovePhase::Adding, .. } if dest == gone => {
                NodeLoss::Cancelled
            }
            Self::Move { origin, dest, phase: phase @ MovePhase::Removing, .. } => {
                match (origin == gone, dest == gone) {
                    (true, true) => NodeLoss::Cancelled,
                    (true, false) => {
                        *phase = MovePhase::Adding;
                        NodeLoss::OriginGone
                    }
                    (false, true) => {
                        *dest = origin.clone();
                        NodeLoss::Unaffected
                    }
                    (false, false) => NodeLoss::Unaffected,
                }
            }
            Self::Stop { node, .. } if node == gone => NodeLoss::StopLost,
            Self::Add { .. } | Self::Move { .. } | Self::Stop { .. } => NodeLoss::Unaffected,
        }
    }
}

/// An operator at work.
#[derive(Clone, PartialEq, Debug)]
pub struct Slot {
    /// The operator.
    pub operator: Operator,
    /// When it began.
    pub since: Instant,
    /// When its command is sent again.
    pub resend_at: Instant,
    /// Its effect was seen; its end is being made durable, and until then the place stays taken.
    pub finishing: bool,
}

impl Slot {
    /// An operator that begins now; its command has yet to be sent.
    #[must_use]
    pub fn new(operator: Operator, now: Instant) -> Self {
        Self { operator, since: now, resend_at: now, finishing: false }
    }

    /// Whether its command is to be sent now; if so, it is not due again for a while.
    pub fn due(&mut self, now: Instant) -> bool {
        let due = !self.finishing && now >= self.resend_at;
        if due {
            self.resend_at = now + RESEND;
        }
        due
    }
}
