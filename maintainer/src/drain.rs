//! The node that is to be emptied, as this node knows it.

use heartbeatpb::NodeId;

/// `(target, epoch)`: one value, replaced as one (spec/maintainer.md §5.4).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DrainTarget {
    /// The node; `None` when there is none.
    pub node: Option<NodeId>,
    /// Higher wins.
    pub epoch: u64,
}

impl DrainTarget {
    /// Takes a target if it is newer, or clears the current one once; says whether anything changed.
    pub fn update(&mut self, node: Option<NodeId>, epoch: u64) -> bool {
        let newer = epoch > self.epoch;
        let clears = epoch == self.epoch && node.is_none() && self.node.is_some();
        if newer || clears {
            *self = Self { node, epoch };
        }
        newer || clears
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_higher_epoch_wins_and_a_target_is_cleared_once() {
        let mut target = DrainTarget::default();
        assert!(!target.update(Some("a".into()), 0), "epoch 0 activates nothing");
        assert!(target.update(Some("a".into()), 2));
        assert!(!target.update(Some("a".into()), 2), "duplicate");
        assert!(!target.update(Some("b".into()), 2), "another node at the same epoch");
        assert!(!target.update(Some("b".into()), 1), "older");
        assert!(target.update(None, 2));
        assert!(!target.update(Some("a".into()), 2), "no second activation");
        assert!(target.update(Some("b".into()), 3));
    }
}
