//! Which epochs were closed here: a late bootstrap must not bring a manager back (spec/dispatcher.md §5).

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use heartbeatpb::{Gid, MaintainerEpoch};

/// No message is late by more than this.
const KEEP: Duration = Duration::from_secs(24 * 3600);

/// Closed epochs by changefeed.
#[derive(Debug, Default)]
pub(crate) struct Tombstones(BTreeMap<Gid, (Option<MaintainerEpoch>, Instant)>);

impl Tombstones {
    /// Remembers a completed close. One without an epoch that was no removal leaves no trace: a changefeed of
    /// senders without epochs must be able to come back.
    pub(crate) fn record(&mut self, gid: Gid, epoch: Option<MaintainerEpoch>, removed: bool, now: Instant) {
        self.0.retain(|_, (_, at)| now.duration_since(*at) < KEEP);
        if epoch.is_none() && !removed {
            return;
        }
        let entry = self.0.entry(gid).or_insert((epoch, now));
        *entry = (entry.0.max(epoch), now);
    }

    /// Whether a manager may be created for a bootstrap with `epoch`.
    pub(crate) fn admit(&self, gid: Gid, epoch: Option<MaintainerEpoch>) -> bool {
        match (self.0.get(&gid), epoch) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some((closed, _)), Some(epoch)) => Some(epoch) > *closed,
        }
    }

    /// A manager of a newer epoch was created.
    pub(crate) fn clear(&mut self, gid: Gid) {
        self.0.remove(&gid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FEED: Gid = Gid::new(0, 1);

    fn e(n: u64) -> Option<MaintainerEpoch> {
        MaintainerEpoch::from_wire(n)
    }

    // behaviour: dispatcher-25
    #[test]
    fn a_closed_epoch_and_older_ones_do_not_come_back_but_a_newer_one_does() {
        let mut tombstones = Tombstones::default();
        assert!(tombstones.admit(FEED, e(4)));
        tombstones.record(FEED, e(5), false, Instant::now());
        tombstones.record(FEED, e(3), false, Instant::now());
        assert_eq!([0, 4, 5, 6].map(|n| tombstones.admit(FEED, e(n))), [false, false, false, true]);
        tombstones.clear(FEED);
        assert!(tombstones.admit(FEED, e(1)));
    }

    // behaviour: dispatcher-26, dispatcher-27
    #[test]
    fn a_pause_without_an_epoch_leaves_no_trace_and_a_removal_does() {
        let mut tombstones = Tombstones::default();
        tombstones.record(FEED, None, false, Instant::now());
        assert!(tombstones.admit(FEED, None));
        tombstones.record(FEED, None, true, Instant::now());
        assert!(!tombstones.admit(FEED, None));
        assert!(tombstones.admit(FEED, e(1)));
    }

    #[test]
    fn tombstones_do_not_stay_for_ever() {
        let mut tombstones = Tombstones::default();
        let then = Instant::now();
        tombstones.record(FEED, e(5), true, then);
        tombstones.record(Gid::new(0, 2), e(5), true, then + KEEP);
        assert!(tombstones.admit(FEED, e(5)));
    }
}
