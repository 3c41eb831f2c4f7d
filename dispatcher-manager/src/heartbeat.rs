//! Changed states on their way to the owner, and the watermark that travels with them (dispatcher §12.3).

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use heartbeatpb::{DispatcherId, TableSpanStatus, Ts, Watermark};

/// States that change this long after the first travel with it.
pub(crate) const WINDOW: Duration = Duration::from_millis(10);

/// The newest changed state of each dispatcher. Nothing is dropped until it has left.
#[derive(Debug, Default)]
pub(crate) struct ChangedStatuses {
    waiting: BTreeMap<DispatcherId, TableSpanStatus>,
    since: Option<Instant>,
}

impl ChangedStatuses {
    /// A dispatcher changed its state.
    pub(crate) fn push(&mut self, status: TableSpanStatus, now: Instant) {
        self.waiting.insert(status.id, status);
        self.since.get_or_insert(now);
    }

    /// A status could not leave: it waits again, unless a newer one does.
    pub(crate) fn unsent(&mut self, statuses: Vec<TableSpanStatus>, now: Instant) {
        for status in statuses {
            self.waiting.entry(status.id).or_insert(status);
        }
        if !self.waiting.is_empty() {
            self.since.get_or_insert(now);
        }
    }

    /// When the waiting statuses are to go.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.since.map(|since| since + WINDOW)
    }

    /// The statuses and the watermark beside them, if it is time. `latest` counts every dispatcher that there is; the
    /// watermark is not ahead of a last word that travels with it either.
    pub(crate) fn take(
        &mut self,
        latest: Watermark,
        now: Instant,
    ) -> Option<(Vec<TableSpanStatus>, Watermark)> {
        self.deadline().filter(|deadline| *deadline <= now)?;
        self.since = None;
        let mut watermark = latest;
        let mut statuses = Vec::with_capacity(self.waiting.len());
        for status in std::mem::take(&mut self.waiting).into_values() {
            if status.checkpoint > Ts::ZERO {
                watermark.checkpoint = watermark.checkpoint.min(status.checkpoint);
            }
            statuses.push(status);
        }
        Some((statuses, watermark))
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use heartbeatpb::{ComponentState, Mode};

    use super::*;
    use crate::dispatcher::testing::id;

    fn status(n: u64, state: ComponentState, checkpoint: u64) -> TableSpanStatus {
        let checkpoint = Ts(checkpoint);
        TableSpanStatus { id: id(n), state, checkpoint, event_size_per_second: 0.0, mode: Mode::Default }
    }

    // behaviour: dispatcher-28
    #[test]
    fn a_status_never_lowers_the_generation_and_may_lower_the_checkpoint() {
        let now = Instant::now();
        let latest = Watermark { checkpoint: Ts(500), resolved: Ts(600), seq: 200, last_synced: Ts::ZERO };
        let mut changed = ChangedStatuses::default();
        changed.push(status(1, ComponentState::Working, 450), now);
        changed.push(status(2, ComponentState::Stopped, 0), now);
        assert!(changed.take(latest, now).is_none());
        let (statuses, watermark) = changed.take(latest, now + WINDOW).expect("it is time");
        assert_eq!(statuses.len(), 2);
        assert_eq!((watermark.seq, watermark.checkpoint, watermark.resolved), (200, Ts(450), Ts(600)));
        changed.push(status(3, ComponentState::Working, 900), now);
        let (_, watermark) = changed.take(latest, now + WINDOW).expect("it is time");
        assert_eq!((watermark.seq, watermark.checkpoint), (200, Ts(500)));
    }

    #[test]
    fn a_status_that_could_not_leave_gives_way_to_a_newer_one() {
        let now = Instant::now();
        let mut changed = ChangedStatuses::default();
        changed.push(status(1, ComponentState::Stopped, 7), now);
        changed
            .unsent(vec![status(1, ComponentState::Working, 5), status(2, ComponentState::Working, 5)], now);
        let (statuses, _) = changed.take(Watermark::NONE, now + WINDOW).expect("it is time");
        assert_eq!(statuses[0].state, ComponentState::Stopped);
        assert_eq!(statuses.len(), 2);
    }
}
