//! The node that is to be emptied, as this node knows it.

use heartbeatpb::NodeId;
use snapshot::Versioned;

/// `(target, epoch)`: one value, replaced as one. Which of two values is newer is the whole update rule
/// (maintainer §5.4): a larger epoch wins; within an epoch a target can only be cleared, once, and never
/// activated again; epoch 0 activates nothing.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DrainTarget {
    /// The node; `None` when there is none.
    pub node: Option<NodeId>,
    /// Higher wins.
    pub epoch: u64,
}

impl DrainTarget {
    /// The node that is to be emptied, with the epoch of the request.
    #[must_use]
    pub fn active(&self) -> Option<(&NodeId, u64)> {
        self.node.as_ref().filter(|_| self.epoch > 0).map(|node| (node, self.epoch))
    }
}

impl Versioned for DrainTarget {
    type Version = (u64, bool);

    fn version(&self) -> (u64, bool) {
        (self.epoch, self.node.is_none() && heartbeatpb::Rule::ClearOnce.holds())
    }
}

#[cfg(test)]
mod tests {
    use snapshot::Publisher;

    use super::*;

    fn target(node: &str, epoch: u64) -> DrainTarget {
        DrainTarget { node: (!node.is_empty()).then(|| node.into()), epoch }
    }

    // behaviour: maintainer-4, maintainer-5, scheduling-113, coordinator-ND-3
    #[test]
    fn a_higher_epoch_wins_and_a_target_is_cleared_once() {
        let mut cell = Publisher::new(DrainTarget::default());
        assert!(!cell.publish(target("n2", 0)), "epoch 0 activates nothing");
        assert!(cell.publish(target("n2", 1)));
        assert!(!cell.publish(target("n2", 1)), "duplicate");
        assert!(!cell.publish(target("n3", 1)), "another node at the same epoch");
        assert_eq!(cell.current().active(), Some((&"n2".into(), 1)));
        assert!(cell.publish(target("", 1)), "cleared");
        assert!(!cell.publish(target("", 1)) && !cell.publish(target("n2", 1)), "once, and for good");
        assert!(!cell.publish(target("n3", 0)), "older");
        assert_eq!(cell.current().active(), None);
        assert!(cell.publish(target("n4", 2)));
        assert!(cell.publish(target("", 3)), "a newer epoch may clear at once");
    }
}
