//! Which maintainers a node has, and who may take a place.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use heartbeatpb::{ChangefeedId, ComponentState, MaintainerEpoch, MaintainerStatus, RunningError};
use tokio::task::Id as TaskId;

use crate::maintainer::Handle;

/// A maintainer is reported at least this often.
pub(crate) const MAX_SILENCE: Duration = Duration::from_secs(1);
/// A stopped maintainer goes after this time even when the coordinator could not be told.
pub(crate) const STOPPED_PATIENCE: Duration = Duration::from_secs(10);
/// Changefeeds whose last stopped epoch is remembered.
const REMEMBERED: usize = 10_000;

/// What becomes of a request for a place (maintainer §5.5).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Admission {
    /// The place is free, or its holder has fully stopped and the request is newer.
    Accepted,
    /// An ordinary repetition of a request.
    Repeated,
    /// A newer maintainer is wanted while the holder has not stopped.
    Occupied,
    /// A maintainer of this epoch or a newer one was stopped here.
    Stopped,
}

/// Decides about a request with epoch `wanted` for a place whose holder is `(epoch, fully stopped)`, where the
/// highest epoch that ended here is `ended`.
pub(crate) fn admit(
    holder: Option<(Option<MaintainerEpoch>, bool)>,
    ended: Option<MaintainerEpoch>,
    wanted: Option<MaintainerEpoch>,
) -> Admission {
    match (holder, wanted) {
        (None, Some(wanted)) if ended.is_some_and(|ended| wanted <= ended) => Admission::Stopped,
        (None, _) => Admission::Accepted,
        (Some((current, false)), wanted) if wanted > current => Admission::Occupied,
        (Some((_, false)), _) => Admission::Repeated,
        (Some((current, true)), Some(wanted)) if Some(wanted) > current.max(ended) => Admission::Accepted,
        (Some((_, true)), _) => Admission::Stopped,
    }
}

/// A registered maintainer.
pub(crate) struct Slot {
    pub(crate) handle: Handle,
    /// Its task: an older one that ends late is not mistaken for this one.
    pub(crate) task: TaskId,
    /// Writers of its downstream can be fenced: members that are not reached may be given up.
    pub(crate) fences: bool,
    reported_version: u64,
    reported_at: Option<Instant>,
    /// It ended without a word.
    failed: Option<RunningError>,
    stopped_since: Option<Instant>,
    told_stopped: bool,
}

impl Slot {
    pub(crate) fn new(handle: Handle, task: TaskId) -> Self {
        Self {
            handle,
            task,
            fences: false,
            reported_version: 0,
            reported_at: None,
            failed: None,
            stopped_since: None,
            told_stopped: false,
        }
    }

    /// The task ended. After a stop that was to be expected.
    pub(crate) fn on_ended(&mut self, failure: Option<RunningError>) {
        if self.status().1.state != ComponentState::Stopped {
            self.failed = failure;
        }
    }

    pub(crate) fn is_stopped(&mut self) -> bool {
        self.failed.is_some() || self.handle.published.load().status.state == ComponentState::Stopped
    }

    /// The status as it is now, with its version. Errors that were told before are left out. Reading changes
    /// nothing: only what was handed over counts as told.
    pub(crate) fn status(&mut self) -> (u64, MaintainerStatus) {
        let published = self.handle.published.load();
        let mut status = published.status.clone();
        if published.changes <= self.reported_version {
            status.errors.clear();
        }
        let version = published.changes;
        if let Some(error) = &self.failed {
            status.state = ComponentState::Stopped;
            status.errors = vec![error.clone()];
        }
        (version, status)
    }

    /// Whether the status is worth telling now.
    pub(crate) fn is_due(&mut self, now: Instant) -> bool {
        let changed = self.handle.published.load().changes > self.reported_version;
        changed || self.reported_at.is_none_or(|at| now.saturating_duration_since(at) >= MAX_SILENCE)
    }

    /// The status with this version was handed over.
    pub(crate) fn on_told(&mut self, version: u64, stopped: bool, now: Instant) {
        self.reported_version = self.reported_version.max(version);
        self.reported_at = Some(now);
        self.told_stopped |= stopped;
        self.handle.reported.store(self.reported_version, Ordering::Release);
    }

    /// Whether it can go: it has stopped, and the coordinator knows, or cannot be told.
    fn is_over(&mut self, now: Instant) -> bool {
        if !self.is_stopped() {
            return false;
        }
        let since = *self.stopped_since.get_or_insert(now);
        self.told_stopped || now.saturating_duration_since(since) >= STOPPED_PATIENCE
    }
}

/// The maintainers of a node, at most one per changefeed.
#[derive(Default)]
pub(crate) struct Registry {
    slots: BTreeMap<ChangefeedId, Slot>,
    /// The highest epoch that ended here; the oldest entries are forgotten first.
    ended: BTreeMap<ChangefeedId, MaintainerEpoch>,
    ended_order: VecDeque<ChangefeedId>,
}

impl Registry {
    pub(crate) fn len(&self) -> usize {
        self.slots.len()
    }

    pub(crate) fn get(&self, id: &ChangefeedId) -> Option<&Slot> {
        self.slots.get(id)
    }

    pub(crate) fn get_mut(&mut self, id: &ChangefeedId) -> Option<&mut Slot> {
        self.slots.get_mut(id)
    }

    pub(crate) fn slots(&self) -> impl Iterator<Item = &Slot> {
        self.slots.values()
    }

    pub(crate) fn slots_mut(&mut self) -> impl Iterator<Item = (&ChangefeedId, &mut Slot)> {
        self.slots.iter_mut()
    }

    /// Whether a maintainer with `epoch` may be made.
    pub(crate) fn admit(&mut self, id: &ChangefeedId, epoch: Option<MaintainerEpoch>) -> Admission {
        let ended = self.ended.get(id).copied().filter(|_| heartbeatpb::Rule::StoppedEpochs.holds());
        let holder = self.slots.get_mut(id).map(|slot| (slot.handle.epoch, slot.is_stopped()));
        admit(holder, ended, epoch)
    }

    /// Gives a place to a maintainer that was admitted. Whoever had it has fully stopped.
    pub(crate) fn insert(&mut self, id: ChangefeedId, slot: Slot) {
        if let Some(before) = self.slots.insert(id.clone(), slot) {
            self.remember(id, before.handle.epoch);
        }
    }

    /// A maintainer with `epoch` ended here, or is known never to begin: none of this epoch or an older one begins
    /// any more.
    pub(crate) fn remember(&mut self, id: ChangefeedId, epoch: Option<MaintainerEpoch>) {
        let Some(epoch) = epoch else { return };
        match self.ended.get_mut(&id) {
            Some(known) => *known = (*known).max(epoch),
            None => {
                self.ended.insert(id.clone(), epoch);
                self.ended_order.push_back(id);
            }
        }
        if self.ended.len() > REMEMBERED
            && let Some(oldest) = self.ended_order.pop_front()
        {
            self.ended.remove(&oldest);
        }
    }

    /// Lets go of maintainers that are over.
    pub(crate) fn clean_up(&mut self, now: Instant) -> usize {
        let over: Vec<ChangefeedId> =
            self.slots.iter_mut().filter_map(|(id, slot)| slot.is_over(now).then(|| id.clone())).collect();
        for id in &over {
            if let Some(slot) = self.slots.remove(id) {
                self.remember(id.clone(), slot.handle.epoch);
            }
        }
        over.len()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use heartbeatpb::Ts;
    use snapshot::Publisher;

    use super::*;
    use crate::maintainer::Published;

    fn status(id: &ChangefeedId, state: ComponentState) -> MaintainerStatus {
        MaintainerStatus {
            changefeed: id.clone(),
            feed_state: String::new(),
            state,
            checkpoint: Ts(7),
            errors: vec![],
            bootstrap_done: true,
            last_synced: Ts(7),
            drain: None,
            epoch: MaintainerEpoch::from_wire(5),
            checkpoint_time: None,
            trouble: None,
        }
    }

    // behaviour: maintainer-22
    #[tokio::test]
    async fn a_maintainer_that_stopped_stays_until_that_was_told_or_nobody_listens_for_long() {
        let id = ChangefeedId::fresh("t");
        let task = tokio::spawn(async {});
        let mut publisher = Publisher::new(Published::of(1, status(&id, ComponentState::Working)));
        let handle = Handle {
            epoch: MaintainerEpoch::from_wire(5),
            mailbox: Arc::default(),
            published: publisher.view(),
            reported: Arc::default(),
        };
        let mut registry = Registry::default();
        registry.insert(id.clone(), Slot::new(handle, task.id()));
        let now = Instant::now();
        registry.get_mut(&id).unwrap().on_told(1, false, now);
        assert_eq!(registry.clean_up(now + Duration::from_secs(3600)), 0, "it works");
        publisher.publish(Published::of(2, status(&id, ComponentState::Stopped)));
        assert!(registry.get_mut(&id).unwrap().is_due(now), "the coordinator is to hear it");
        // It was not reached: nothing was told, so the next look finds the same.
        assert_eq!(registry.clean_up(now), 0);
        let (version, stopped) = registry.get_mut(&id).unwrap().status();
        assert_eq!((version, stopped.state), (2, ComponentState::Stopped));
        registry.get_mut(&id).unwrap().on_told(version, true, now);
        assert_eq!(registry.clean_up(now), 1);
        assert_eq!(registry.admit(&id, MaintainerEpoch::from_wire(5)), Admission::Stopped);
        let (handle, task) = (publisher.view(), tokio::spawn(async {}));
        let handle =
            Handle { epoch: None, mailbox: Arc::default(), published: handle, reported: Arc::default() };
        registry.insert(id.clone(), Slot::new(handle, task.id()));
        assert_eq!(registry.clean_up(now), 0, "nobody was told");
        assert_eq!(registry.clean_up(now + STOPPED_PATIENCE), 1, "and nobody will be");
    }

    // behaviour: maintainer-13, maintainer-14, maintainer-15, maintainer-16, maintainer-17, maintainer-21a
    // behaviour: coordinator-ND-6, coordinator-ND-7, coordinator-ND-8
    #[test]
    fn who_may_take_a_place() {
        use Admission::{Accepted, Occupied, Repeated, Stopped};
        let epoch = MaintainerEpoch::from_wire;
        let live = |e| Some((epoch(e), false));
        let stopped = |e| Some((epoch(e), true));
        let table = [
            (None, 0, 0, Accepted),
            (None, 0, 3, Accepted),
            (None, 7, 5, Stopped),
            (None, 7, 7, Stopped),
            (None, 7, 8, Accepted),
            (None, 7, 0, Accepted),
            (live(1), 0, 2, Occupied),
            (live(2), 0, 2, Repeated),
            (live(2), 0, 1, Repeated),
            (live(2), 0, 0, Repeated),
            (live(0), 0, 0, Repeated),
            (live(0), 0, 3, Occupied),
            (stopped(2), 0, 0, Stopped),
            (stopped(0), 0, 0, Stopped),
            (stopped(0), 0, 1, Accepted),
            (stopped(2), 0, 3, Accepted),
            (stopped(2), 0, 2, Stopped),
            (stopped(2), 0, 1, Stopped),
            (stopped(2), 9, 8, Stopped),
        ];
        for (holder, ended, wanted, expected) in table {
            assert_eq!(admit(holder, epoch(ended), epoch(wanted)), expected, "{holder:?} {ended} {wanted}");
        }
    }
}
