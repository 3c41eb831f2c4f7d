//! Epochs at which managers were closed: a delayed bootstrap of a finished owner must not bring one back.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use heartbeatpb::{Gid, MaintainerEpoch};

/// How long a tombstone is kept: far longer than any message can be delayed.
const KEPT: Duration = Duration::from_secs(24 * 3600);

/// Closed changefeeds. Presence matters by itself: epoch 0 is a legal value.
#[derive(Debug, Default)]
pub(crate) struct Tombstones {
    closed: BTreeMap<Gid, (u64, Instant)>,
}

impl Tombstones {
    /// A manager was closed. A pause or resume by an owner without epochs leaves nothing: it must be able to
    /// come back.
    pub(crate) fn record(&mut self, gid: Gid, epoch: Option<MaintainerEpoch>, removed: bool, now: Instant) {
        self.closed.retain(|_, (_, since)| now.saturating_duration_since(*since) < KEPT);
        let epoch = MaintainerEpoch::to_wire(epoch);
        if epoch == 0 && !removed {
            return;
        }
        let entry = self.closed.entry(gid).or_insert((epoch, now));
        *entry = (entry.0.max(epoch), now);
    }

    /// Whether a bootstrap may not create a manager.
    pub(crate) fn blocks(&self, gid: Gid, epoch: Option<MaintainerEpoch>, now: Instant) -> bool {
        let epoch = MaintainerEpoch::to_wire(epoch);
        self.closed.get(&gid).is_some_and(|(closed, since)| {
            now.saturating_duration_since(*since) < KEPT && (epoch == 0 || epoch <= *closed)
        })
    }

    /// A manager of a newer owner exists.
    pub(crate) fn clear(&mut self, gid: Gid) {
        self.closed.remove(&gid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GID: Gid = Gid::new(0, 1);

    fn e(n: u64) -> Option<MaintainerEpoch> {
        MaintainerEpoch::from_wire(n)
    }

    // behaviour: dispatcher-25
    #[test]
    fn a_finished_owner_cannot_come_back_and_a_newer_one_can() {
        let now = Instant::now();
        let mut stones = Tombstones::default();
        stones.record(GID, e(5), false, now);
        stones.record(GID, e(3), true, now);
        assert!(stones.blocks(GID, e(4), now));
        assert!(stones.blocks(GID, e(5), now));
        assert!(stones.blocks(GID, None, now));
        assert!(!stones.blocks(GID, e(6), now));
        stones.clear(GID);
        assert!(!stones.blocks(GID, e(5), now));
    }

    // behaviour: dispatcher-26, dispatcher-27
    #[test]
    fn without_epochs_only_a_removal_leaves_a_trace() {
        let now = Instant::now();
        let mut stones = Tombstones::default();
        stones.record(GID, None, false, now);
        assert!(!stones.blocks(GID, None, now));
        stones.record(GID, None, true, now);
        assert!(stones.blocks(GID, None, now));
        assert!(!stones.blocks(GID, e(1), now));
    }

    #[test]
    fn tombstones_are_collected() {
        let now = Instant::now();
        let mut stones = Tombstones::default();
        stones.record(GID, e(5), true, now);
        let later = now + KEPT;
        assert!(!stones.blocks(GID, e(5), later));
        stones.record(Gid::new(0, 2), e(1), true, later);
        assert_eq!(stones.closed.len(), 1);
    }
}
