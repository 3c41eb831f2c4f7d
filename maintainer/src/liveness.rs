//! The liveness of this node: one cell, forward steps only.

use std::sync::atomic::{AtomicU8, Ordering};

use heartbeatpb::NodeLiveness;

/// ALIVE, then DRAINING, then STOPPING; shared by everything that looks at it.
#[derive(Debug, Default)]
pub struct LivenessCell(AtomicU8);

const fn code(liveness: NodeLiveness) -> u8 {
    match liveness {
        NodeLiveness::Alive => 0,
        NodeLiveness::Draining => 1,
        NodeLiveness::Stopping => 2,
    }
}

impl LivenessCell {
    /// The liveness now.
    #[must_use]
    pub fn get(&self) -> NodeLiveness {
        match self.0.load(Ordering::Acquire) {
            0 => NodeLiveness::Alive,
            1 => NodeLiveness::Draining,
            _ => NodeLiveness::Stopping,
        }
    }

    /// One step forward. Staying, going back and leaving a step out are refused (`false`).
    pub fn advance(&self, target: NodeLiveness) -> bool {
        let Some(before) = code(target).checked_sub(1) else { return false };
        self.0.compare_exchange(before, code(target), Ordering::AcqRel, Ordering::Acquire).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // behaviour: maintainer-3, coordinator-ND-2
    #[test]
    fn liveness_moves_one_step_forward_at_a_time() {
        let cell = LivenessCell::default();
        assert!(!cell.advance(NodeLiveness::Stopping), "no step is left out");
        assert!(!cell.advance(NodeLiveness::Alive), "staying is no step");
        assert!(cell.advance(NodeLiveness::Draining));
        assert!(!cell.advance(NodeLiveness::Draining));
        assert!(cell.advance(NodeLiveness::Stopping));
        assert!(!cell.advance(NodeLiveness::Draining), "no way back");
        assert_eq!(cell.get(), NodeLiveness::Stopping);
    }
}
