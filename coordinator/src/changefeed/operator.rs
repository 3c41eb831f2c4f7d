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

/// What the loss of a node does to an operator.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NodeLoss {
    /// Nothing.
    Unaffected,
    /// It goes on with another node and is sent anew.
    Redirected,
    /// It ends; the changefeed needs a new place.
    Cancelled,
}

impl Operator {
    /// Value of the label `type`.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Add { .. } => "add",
            Self::Stop { .. } => "stop",
        }
    }

    /// The node that has to act.
    #[must_use]
    pub const fn node(&self) -> &NodeId {
        match self {
            Self::Add { dest, .. } => dest,
            Self::Stop { node, .. } => node,
        }
    }

    /// The command.
    #[must_use]
    pub fn message(&self, changefeed: &Changefeed) -> ToMaintainerManager {
        match self {
            Self::Add { .. } => ToMaintainerManager::AddMaintainer(changefeed.add_request()),
            Self::Stop { removed, epoch, .. } => ToMaintainerManager::RemoveMaintainer(remove_request(
                changefeed.id(),
                true,
                *removed,
                changefeed.info.keyspace_id,
                *epoch,
            )),
        }
    }

    /// Whether a report shows that it is done. A remove-only maintainer never reports a finished bootstrap,
    /// so it is not mistaken for a started one.
    #[must_use]
    pub fn is_done(&self, from: &NodeId, status: &MaintainerStatus, tolerate_none: bool) -> bool {
        let working = status.state == ComponentState::Working;
        match self {
            Self::Add { dest, epoch } => {
                from == dest
                    && working
                    && status.bootstrap_done
                    && epoch_matches(status.epoch, *epoch, tolerate_none)
            }
            Self::Stop { node, epoch, .. } => {
                from == node && !working && epoch_matches(status.epoch, *epoch, tolerate_none)
            }
        }
    }

    /// A node left. A stop goes on at the coordinator's own node, which closes the dispatchers everywhere.
    pub fn on_node_removed(&mut self, gone: &NodeId, me: &NodeId) -> NodeLoss {
        match self {
            Self::Add { dest, .. } if dest == gone => NodeLoss::Cancelled,
            Self::Stop { node, .. } if node == gone => {
                *node = me.clone();
                NodeLoss::Redirected
            }
            Self::Add { .. } | Self::Stop { .. } => NodeLoss::Unaffected,
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
