//! Fencing tokens and the rules for comparing them. On the wire 0 means "none"; here it cannot occur.

use std::fmt;
use std::num::NonZeroU64;

use serde::{Deserialize, Serialize};

use crate::NodeId;

/// Incarnation of a changefeed's maintainer: durable, larger is newer, never zero.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MaintainerEpoch(NonZeroU64);

impl MaintainerEpoch {
    /// How many numbers belong to a maintainer: its epoch and those behind it. Under the further ones it asks nodes that
    /// it had given up and that are let in again, so that they can be told from what they were before. With two for each
    /// time, more than any network mends itself in the life of a maintainer; with epochs from a clock of nanoseconds,
    /// nothing that is missed.
    pub const ROOM: u64 = 1024;

    /// The epoch of a wire value; `None` for 0, which a sender without epochs sends.
    #[must_use]
    pub const fn from_wire(value: u64) -> Option<Self> {
        match NonZeroU64::new(value) {
            Some(value) => Some(Self(value)),
            None => None,
        }
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0.get()
    }

    /// The wire value of an optional epoch.
    #[must_use]
    pub fn to_wire(epoch: Option<Self>) -> u64 {
        epoch.map_or(0, Self::get)
    }

    /// The number of a maintainer under which it asks a node that it lets in again; `None` when it has no more.
    #[must_use]
    pub fn within(self, number: u64) -> Option<Self> {
        let number = Some(number).filter(|number| *number < Self::ROOM)?;
        Self::from_wire(self.get().checked_add(number)?)
    }

    /// The last number of a maintainer: who names it means whatever the maintainer has left behind.
    #[must_use]
    pub const fn last(self) -> Self {
        Self(self.0.saturating_add(Self::ROOM - 1))
    }

    /// The epoch of the maintainer that follows: beyond all numbers of the one before. `None` when they are used up.
    #[must_use]
    pub fn successor(current: Option<Self>, candidate: u64) -> Option<Self> {
        Self::next(current.map(Self::last), candidate)
    }

    /// The epoch that follows `current`: `max(candidate, current + 1)` (messaging §12).
    /// `None` when the numbers are used up; an epoch never wraps.
    #[must_use]
    pub fn next(current: Option<Self>, candidate: u64) -> Option<Self> {
        let least = Self::to_wire(current).checked_add(1)?;
        Self::from_wire(candidate.max(least))
    }
}

impl fmt::Display for MaintainerEpoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Debug for MaintainerEpoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The owner of a dispatcher manager as it knows it: a maintainer's node and epoch.
///
/// The two truth tables of dispatcher §2; both read one snapshot of the pair.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Owner {
    /// Node of the maintainer; empty when unknown.
    pub node: NodeId,
    /// `None` while only senders without epochs were seen (compatibility mode).
    pub epoch: Option<MaintainerEpoch>,
}

impl Owner {
    /// Whether a bootstrap from `(from, epoch)` may take the ownership (§2.1).
    #[must_use]
    pub fn can_update(&self, from: &NodeId, epoch: Option<MaintainerEpoch>) -> bool {
        match (epoch, self.epoch) {
            (None, None) | (Some(_), None) => true,
            (None, Some(_)) => false,
            (Some(new), Some(current)) => {
                new > current || (new == current && (self.node.is_empty() || self.node == *from))
            }
        }
    }

    /// Takes the ownership if [`Self::can_update`] allows it; says whether it did.
    pub fn try_update(&mut self, from: &NodeId, epoch: Option<MaintainerEpoch>) -> bool {
        let accepted = self.can_update(from, epoch);
        if accepted {
            self.node = from.clone();
            self.epoch = epoch;
        }
        accepted
    }

    /// Whether `(from, epoch)` may close what this owner runs. The node does not matter when there are epochs: an
    /// owner whose node died is closed by another node in its place, under the same epoch or a newer one.
    #[must_use]
    pub fn lets_close(&self, from: &NodeId, epoch: Option<MaintainerEpoch>) -> bool {
        match (epoch, self.epoch) {
            (Some(got), Some(current)) if crate::Rule::CloseElsewhere.holds() => got >= current,
            (Some(_), Some(_)) | (None, None | Some(_)) | (Some(_), None) => self.allows(from, epoch),
        }
    }

    /// Whether any other request from `(from, epoch)` may act (§2.2).
    #[must_use]
    pub fn allows(&self, from: &NodeId, epoch: Option<MaintainerEpoch>) -> bool {
        match (epoch, self.epoch) {
            (None, None) => self.node.is_empty() || self.node == *from,
            (None, Some(_)) | (Some(_), None) => false,
            (Some(got), Some(current)) => got == current && self.node == *from,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn epoch(value: u64) -> Option<MaintainerEpoch> {
        MaintainerEpoch::from_wire(value)
    }

    fn owner(value: u64, node: &str) -> Owner {
        Owner { node: node.into(), epoch: epoch(value) }
    }

    // behaviour: messaging-15
    #[test]
    fn who_may_take_the_ownership() {
        // Sender's epoch, current epoch, current node, accepted; the sender is always node `a`.
        let table = [
            (0, 0, "a", true),
            (0, 0, "b", true),
            (0, 0, "", true),
            (0, 1, "a", false),
            (0, 1, "b", false),
            (0, 1, "", false),
            (5, 0, "a", true),
            (5, 0, "b", true),
            (5, 0, "", true),
            (5, 4, "a", true),
            (5, 4, "b", true),
            (5, 4, "", true),
            (5, 5, "", true),
            (5, 5, "a", true),
            (5, 5, "b", false),
            (5, 6, "a", false),
            (5, 6, "b", false),
            (5, 6, "", false),
        ];
        for (sender, current, node, accepted) in table {
            let before = owner(current, node);
            let from = NodeId::from("a");
            assert_eq!(before.can_update(&from, epoch(sender)), accepted, "{sender} {before:?}");
            let mut after = before.clone();
            assert_eq!(after.try_update(&from, epoch(sender)), accepted, "{sender} {before:?}");
            let expected = if accepted { owner(sender, "a") } else { before };
            assert_eq!(after, expected);
        }
    }

    // behaviour: messaging-15
    #[test]
    fn whose_requests_may_act() {
        let table = [
            (0, 0, "", true),
            (0, 0, "a", true),
            (0, 0, "b", false),
            (0, 1, "a", false),
            (0, 1, "", false),
            (5, 5, "a", true),
            (5, 5, "b", false),
            (5, 5, "", false),
            (5, 4, "a", false),
            (5, 6, "a", false),
            (5, 0, "a", false),
            (5, 0, "", false),
        ];
        for (sender, current, node, allowed) in table {
            let owner = owner(current, node);
            assert_eq!(owner.allows(&"a".into(), epoch(sender)), allowed, "{sender} {owner:?}");
        }
    }

    // behaviour: messaging-15
    #[test]
    fn an_owner_whose_node_died_is_closed_by_another_node() {
        let current = owner(5, "n1");
        let may = |from: &str, value| current.lets_close(&from.into(), epoch(value));
        assert_eq!([may("n1", 5), may("n2", 5), may("n2", 6)], [true; 3]);
        assert_eq!([may("n1", 4), may("n2", 4), may("n1", 0)], [false; 3]);
        assert!(
            owner(0, "n1").lets_close(&"n1".into(), None) && !owner(0, "n1").lets_close(&"n2".into(), None)
        );
    }

    // behaviour: scheduling-8
    #[test]
    fn the_next_epoch_is_larger_and_never_wraps() {
        let next =
            |current, candidate| MaintainerEpoch::next(epoch(current), candidate).map(MaintainerEpoch::get);
        assert_eq!(next(0, 0), Some(1));
        assert_eq!(next(0, 7), Some(7), "a larger candidate is taken");
        assert_eq!(next(5, 9), Some(9));
        assert_eq!((next(8, 10), next(12, 10)), (Some(10), Some(13)));
        assert_eq!(next(5, 5), Some(6), "an equal candidate is not newer");
        assert_eq!(next(5, 2), Some(6));
        assert_eq!(next(u64::MAX - 1, 0), Some(u64::MAX));
        assert_eq!(next(u64::MAX, 0), None);
        assert_eq!(next(u64::MAX, u64::MAX), None);
    }

    #[test]
    fn a_successor_is_beyond_every_number_of_the_maintainer_before() {
        let five = epoch(5).unwrap();
        assert_eq!((five.within(0), five.within(2)), (Some(five), epoch(7)));
        assert_eq!((five.last().get(), five.within(MaintainerEpoch::ROOM)), (1028, None));
        let successor = |current, candidate| {
            MaintainerEpoch::successor(epoch(current), candidate).map(MaintainerEpoch::get)
        };
        assert_eq!((successor(0, 0), successor(5, 9), successor(5, 2000)), (Some(1), Some(1029), Some(2000)));
        let end = epoch(u64::MAX - 2).unwrap();
        assert_eq!((end.within(2).is_some(), end.within(3)), (true, None), "a number never wraps");
        assert_eq!((end.last().get(), successor(u64::MAX - 2, 0)), (u64::MAX, None));
    }

    #[test]
    fn zero_on_the_wire_is_no_epoch() {
        assert_eq!(epoch(0), None);
        assert_eq!(MaintainerEpoch::to_wire(None), 0);
        assert_eq!(MaintainerEpoch::to_wire(epoch(u64::MAX)), u64::MAX);
    }
}
