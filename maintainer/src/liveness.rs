//! The liveness of this node: one cell, forward steps only.

use heartbeatpb::NodeLiveness;
use tokio::sync::watch;

/// ALIVE, then DRAINING, then STOPPING; shared by everything that looks at it, and told to whoever watches.
#[derive(Debug)]
pub struct LivenessCell(watch::Sender<NodeLiveness>);

impl Default for LivenessCell {
    fn default() -> Self {
        Self(watch::Sender::new(NodeLiveness::Alive))
    }
}

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
        *self.0.borrow()
    }

    /// Sees every later step, whoever takes it: a node that a coordinator drains must not go on leading.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<NodeLiveness> {
        self.0.subscribe()
    }

    /// One step forward. Staying, going back and leaving a step out are refused (`false`).
    pub fn advance(&self, target: NodeLiveness) -> bool {
        self.0.send_if_modified(|liveness| {
            let step = code(target) == code(*liveness) + 1;
            if step {
                *liveness = target;
            }
            step
        })
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

    #[test]
    fn whoever_watches_hears_of_a_step() {
        let cell = LivenessCell::default();
        let mut seen = cell.watch();
        cell.advance(NodeLiveness::Stopping);
        assert!(!seen.has_changed().expect("the cell is there"));
        cell.advance(NodeLiveness::Draining);
        assert_eq!(*seen.borrow_and_update(), NodeLiveness::Draining);
    }
}
