//! What happened in a walk, for whoever looks at a seed: `COORDINATOR_TRACE=a` prints what concerns changefeed `a`.

use heartbeatpb::ChangefeedId;
use messaging::{ToCoordinator, ToMaintainerManager};

use super::{Packet, Walk, wire};

impl Walk {
    /// Tells what happens, if somebody wants to know.
    pub(super) fn trace(&self, of: Option<&ChangefeedId>, what: impl FnOnce() -> String) {
        if self.trace.as_ref().is_some_and(|wanted| of.is_none_or(|id| &*id.name == wanted)) {
            eprintln!("{} {}", self.step, what());
        }
    }

    pub(super) fn trace_packet(&self, packet: &Packet) {
        match packet {
            Packet::Down { from, to, message } => {
                let of = match message {
                    ToMaintainerManager::AddMaintainer(add) => Some(&add.changefeed),
                    ToMaintainerManager::RemoveMaintainer(remove) => Some(&remove.changefeed),
                    ToMaintainerManager::CoordinatorBootstrap(_)
                    | ToMaintainerManager::SetNodeLiveness(_)
                    | ToMaintainerManager::SetDrainTarget(_) => None,
                    ToMaintainerManager::CheckpointTs(_)
                    | ToMaintainerManager::HeartBeat(_)
                    | ToMaintainerManager::BlockStatus(_)
                    | ToMaintainerManager::BootstrapResponse(_)
                    | ToMaintainerManager::PostBootstrapResponse(_) => return,
                };
                self.trace(of, || format!("{from} -> {to}: {}", crate::world::show(message)));
            }
            Packet::Up { from, to, message } => {
                let statuses = match message {
                    ToCoordinator::MaintainerHeartbeat(statuses) => statuses,
                    ToCoordinator::BootstrapResponse(answer) => {
                        self.trace(None, || format!("{from} -> {to}: answer"));
                        &answer.statuses
                    }
                    ToCoordinator::NodeHeartbeat(_) | ToCoordinator::SetNodeLivenessResponse(_) => return,
                };
                for status in statuses {
                    let epoch = wire(status.epoch);
                    self.trace(Some(&status.changefeed), || {
                        format!(
                            "{from} -> {to}: {:?} epoch {epoch} done {} at {}",
                            status.state, status.bootstrap_done, status.checkpoint
                        )
                    });
                }
            }
        }
    }
}
