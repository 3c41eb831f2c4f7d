//! What is known of one node: its liveness, which only moves forward within a process, and what it has applied.

use std::time::{Duration, Instant};

use heartbeatpb::{NodeId, NodeLiveness};

/// A node that was silent for so long is not known to live.
const SILENT: Duration = Duration::from_secs(30);
/// The same command is not sent again before.
const RESEND: Duration = Duration::from_secs(1);

/// What a node is believed to be.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum NodeState {
    /// It takes work.
    Alive,
    /// It takes no new work.
    Draining,
    /// It has no work and may be stopped.
    Stopping,
    /// It was not heard of for a while.
    Unknown,
}

/// The drain target that a node has applied.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Applied {
    /// The node; `None` when cleared.
    pub target: Option<NodeId>,
    /// Epoch of the target.
    pub epoch: u64,
}

/// What is known of one node.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct NodeRecord {
    /// Version of the drain protocol that it speaks; `None` until it said so, 0 for one that cannot.
    pub protocol: Option<u32>,
    /// What it has applied, as far as it told.
    pub applied: Option<Applied>,
    /// It is to be emptied.
    pub drain_requested: bool,
    observed: Option<Observed>,
    told_draining: Option<Instant>,
    told_stopping: Option<Instant>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Observed {
    epoch: u64,
    liveness: NodeLiveness,
    draining: bool,
    stopping: bool,
    at: Instant,
}

impl NodeRecord {
    /// The node said what it is. Returns whether that was news or a confirmation, and not late. A process that
    /// is newer starts over: only the wish to empty the node stays.
    pub fn observe(&mut self, epoch: u64, liveness: NodeLiveness, now: Instant) -> bool {
        if let Some(known) = &mut self.observed {
            if epoch < known.epoch || (epoch == known.epoch && rank(liveness) < rank(known.liveness)) {
                return false;
            }
            if epoch == known.epoch {
                known.liveness = liveness;
                known.draining |= liveness == NodeLiveness::Draining;
                known.stopping |= liveness == NodeLiveness::Stopping;
                known.at = now;
                return true;
            }
            *self = Self { drain_requested: self.drain_requested, ..Self::default() };
        }
        self.observed = Some(Observed {
            epoch,
            liveness,
            draining: liveness == NodeLiveness::Draining,
            stopping: liveness == NodeLiveness::Stopping,
            at: now,
        });
        true
    }

    /// The node applied a drain target; an older one that arrives late is ignored.
    pub fn on_applied(&mut self, target: Option<NodeId>, epoch: u64) {
        let version = |applied: &Applied| (applied.epoch, applied.target.is_none());
        let new = Applied { target, epoch };
        if self.applied.as_ref().is_none_or(|old| version(old) <= version(&new)) {
            self.applied = Some(new);
        }
    }

    /// Whether the node has applied exactly this target.
    #[must_use]
    pub fn has_applied(&self, target: &NodeId, epoch: u64) -> bool {
        self.applied
            .as_ref()
            .is_some_and(|applied| applied.epoch == epoch && applied.target.as_ref() == Some(target))
    }

    /// What the node is now. One that never spoke is alive: it has registered.
    #[must_use]
    pub fn state(&self, now: Instant) -> NodeState {
        match self.observed {
            None => NodeState::Alive,
            Some(seen) if now.saturating_duration_since(seen.at) > SILENT => NodeState::Unknown,
            Some(seen) => match seen.liveness {
                NodeLiveness::Alive => NodeState::Alive,
                NodeLiveness::Draining => NodeState::Draining,
                NodeLiveness::Stopping => NodeState::Stopping,
            },
        }
    }

    /// Whether it said that it takes no new work, however long ago.
    #[must_use]
    pub fn is_leaving(&self) -> bool {
        self.observed.is_some_and(|seen| seen.liveness != NodeLiveness::Alive)
    }

    /// Whether this process said that it is stopping. It got there by draining.
    #[must_use]
    pub fn stopping_observed(&self) -> bool {
        self.observed.is_some_and(|seen| seen.stopping)
    }

    /// The process to be told to drain now: its epoch, or 0 when it is not known; it answers with its own.
    pub fn try_draining(&mut self, now: Instant) -> Option<u64> {
        let observed = self.observed.is_some_and(|seen| seen.draining || seen.stopping);
        (!observed && due(&mut self.told_draining, now)).then(|| self.observed.map_or(0, |seen| seen.epoch))
    }

    /// The process to be told to stop now: only one that was seen draining.
    pub fn try_stopping(&mut self, now: Instant) -> Option<u64> {
        let seen = self.observed.filter(|seen| seen.draining && !seen.stopping)?;
        (self.state(now) != NodeState::Unknown && due(&mut self.told_stopping, now)).then_some(seen.epoch)
    }
}

fn due(told: &mut Option<Instant>, now: Instant) -> bool {
    let due = told.is_none_or(|at| now.saturating_duration_since(at) >= RESEND);
    if due {
        *told = Some(now);
    }
    due
}

fn rank(liveness: NodeLiveness) -> u8 {
    match liveness {
        NodeLiveness::Alive => 0,
        NodeLiveness::Draining => 1,
        NodeLiveness::Stopping => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    // behaviour: coordinator-DR-22
    fn commands_are_held_back_for_a_second_and_stopping_follows_draining() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let mut node = NodeRecord::default();
        assert_eq!(node.try_stopping(start), None, "it was not seen");
        assert_eq!(node.try_draining(start), Some(0));
        assert_eq!(node.try_draining(at(999)), None);
        assert!(node.observe(8, NodeLiveness::Alive, at(999)));
        assert_eq!(node.try_draining(at(1000)), Some(8));
        assert_eq!(node.try_stopping(at(1000)), None, "it was not seen draining");
        assert!(node.observe(8, NodeLiveness::Draining, at(1100)));
        assert_eq!(node.try_draining(at(9000)), None, "it drains");
        assert_eq!(node.try_stopping(at(9000)), Some(8));
        assert_eq!(node.try_stopping(at(9999)), None);
        assert_eq!(node.try_stopping(at(10_000)), Some(8));
        assert!(node.observe(8, NodeLiveness::Stopping, at(10_100)));
        assert_eq!(node.try_stopping(at(20_000)), None, "it stops");
    }

    #[test]
    // behaviour: coordinator-DR-23
    fn a_newer_process_starts_over_and_older_news_change_nothing() {
        let now = Instant::now();
        let mut node = NodeRecord { protocol: Some(1), drain_requested: true, ..NodeRecord::default() };
        assert!(node.observe(8, NodeLiveness::Draining, now));
        node.on_applied(Some("n2".into()), 5);
        assert!(!node.observe(8, NodeLiveness::Alive, now), "liveness does not return");
        assert!(!node.observe(7, NodeLiveness::Stopping, now), "another process");
        assert_eq!(node.state(now), NodeState::Draining);
        assert!(node.has_applied(&"n2".into(), 5));
        node.on_applied(None, 4);
        assert!(node.has_applied(&"n2".into(), 5), "late");
        assert!(node.observe(9, NodeLiveness::Alive, now));
        assert!(!node.has_applied(&"n2".into(), 5) && node.drain_requested && node.protocol.is_none());
        assert_eq!((node.state(now), node.try_stopping(now)), (NodeState::Alive, None));
        assert_eq!(node.state(now + SILENT + RESEND), NodeState::Unknown);
    }
}
