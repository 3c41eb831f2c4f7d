//! What it takes to empty a node before it stops (coordinator §16): one session at a time, made durable before
//! anybody hears of it, and a clear that is repeated until every node has taken it.

mod liveness;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use heartbeatpb::{ChangefeedId, DrainProgress, MaintainerEpoch, NodeId};
use serde::{Deserialize, Serialize};

pub use liveness::{Applied, NodeRecord, NodeState};

/// The target, and its clear, are told again after this time.
pub const REBROADCAST: Duration = Duration::from_secs(5);

/// What is stored about drains, so that the next coordinator goes on where this one ends.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct DrainDoc {
    /// Largest epoch that was ever given to a drain.
    pub epoch: u64,
    /// The node that is being emptied.
    pub target: Option<NodeName>,
    /// When a person asked for it, in seconds since 1970.
    pub requested_at: u64,
    /// The node that was emptied last.
    pub completed: Option<NodeName>,
    /// Members whose drain was taken back. They stay out of placements: liveness never returns to alive within
    /// a process.
    pub cancelled: BTreeSet<NodeName>,
}

/// A node in a stored document.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NodeName(pub String);

impl From<&NodeId> for NodeName {
    fn from(node: &NodeId) -> Self {
        Self(node.to_string())
    }
}

impl From<&NodeName> for NodeId {
    fn from(name: &NodeName) -> Self {
        Self::from(name.0.as_str())
    }
}

/// What a maintainer reported about the node that is being emptied.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Report {
    maintainer: Option<MaintainerEpoch>,
    dispatchers: u64,
    moves: u64,
}

/// A node is being emptied.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Session {
    pub(crate) target: NodeId,
    pub(crate) epoch: u64,
    pub(crate) requested_at: u64,
    /// Nothing was left of it once, and the node has stopped taking work.
    pub(crate) complete: bool,
    pub(crate) told_at: Option<Instant>,
    reports: BTreeMap<ChangefeedId, Report>,
    /// Sums over `reports`, kept so that a report costs the same however many changefeeds there are.
    dispatchers: u64,
    moves: u64,
}

impl Session {
    pub(crate) fn new(target: NodeId, epoch: u64, requested_at: u64) -> Self {
        Self {
            target,
            epoch,
            requested_at,
            complete: false,
            told_at: None,
            reports: BTreeMap::new(),
            dispatchers: 0,
            moves: 0,
        }
    }

    /// A maintainer reported. What concerns another drain is not counted.
    pub(crate) fn on_report(
        &mut self,
        id: &ChangefeedId,
        maintainer: Option<MaintainerEpoch>,
        progress: &DrainProgress,
    ) {
        if progress.target != self.target || progress.epoch != self.epoch {
            return;
        }
        self.forget(id);
        let report = Report {
            maintainer,
            dispatchers: u64::from(progress.dispatchers),
            moves: u64::from(progress.inflight_moves),
        };
        self.dispatchers = self.dispatchers.saturating_add(report.dispatchers);
        self.moves = self.moves.saturating_add(report.moves);
        self.reports.insert(id.clone(), report);
    }

    /// A changefeed is gone, or has another maintainer now, whose report is to come.
    pub(crate) fn forget(&mut self, id: &ChangefeedId) {
        if let Some(old) = self.reports.remove(id) {
            self.dispatchers = self.dispatchers.saturating_sub(old.dispatchers);
            self.moves = self.moves.saturating_sub(old.moves);
        }
    }

    /// Forgets reports that `current` does not confirm.
    pub(crate) fn retain(&mut self, current: impl Fn(&ChangefeedId, Option<MaintainerEpoch>) -> bool) {
        let outdated =
            |(id, report): (&ChangefeedId, &Report)| (!current(id, report.maintainer)).then(|| id.clone());
        let outdated: Vec<ChangefeedId> = self.reports.iter().filter_map(outdated).collect();
        for id in outdated {
            self.forget(&id);
        }
    }

    /// Whether this maintainer has reported to this session.
    pub(crate) fn has_report(&self, id: &ChangefeedId, maintainer: Option<MaintainerEpoch>) -> bool {
        self.reports.get(id).is_some_and(|report| report.maintainer == maintainer)
    }

    /// Dispatchers on the node, and moves away from it, by all reports.
    pub(crate) fn reported(&self) -> (u64, u64) {
        (self.dispatchers, self.moves)
    }
}

/// The end of a drain that nodes have yet to take.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Clear {
    pub(crate) epoch: u64,
    pub(crate) pending: BTreeSet<NodeId>,
    pub(crate) told_at: Option<Instant>,
}

/// A session that is being made durable is not told to anybody.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) enum Phase {
    #[default]
    None,
    Starting(Session),
    Active(Session),
}

/// Everything about drains.
#[derive(Debug, Default)]
pub(crate) struct Drain {
    pub(crate) phase: Phase,
    pub(crate) clear: Option<Clear>,
    /// The node that was emptied last, until it joins again.
    pub(crate) completed: Option<NodeId>,
    pub(crate) cancelled: BTreeSet<NodeId>,
    /// Largest epoch that was given or seen.
    pub(crate) epoch: u64,
    /// Largest epoch that was given to a session.
    pub(crate) given: u64,
    /// What is stored; `None` when that is not known.
    pub(crate) durable: Option<DrainDoc>,
    pub(crate) writing: Option<DrainDoc>,
    pub(crate) retry_at: Option<Instant>,
}

impl Drain {
    /// The session that nodes know of.
    pub(crate) fn active(&self) -> Option<&Session> {
        match &self.phase {
            Phase::Active(session) => Some(session),
            Phase::None | Phase::Starting(_) => None,
        }
    }

    /// The same, to be changed.
    pub(crate) fn active_mut(&mut self) -> Option<&mut Session> {
        match &mut self.phase {
            Phase::Active(session) => Some(session),
            Phase::None | Phase::Starting(_) => None,
        }
    }

    /// The session, whether nodes know of it yet or not.
    pub(crate) fn session(&self) -> Option<&Session> {
        match &self.phase {
            Phase::Active(session) | Phase::Starting(session) => Some(session),
            Phase::None => None,
        }
    }

    /// What is to be stored. Epochs that were only seen are no reason to write.
    pub(crate) fn doc(&self) -> DrainDoc {
        let session = self.session();
        let finished = session.filter(|session| session.complete).map(|session| &session.target);
        DrainDoc {
            epoch: self.given,
            target: session.map(|session| NodeName::from(&session.target)),
            requested_at: session.map_or(0, |session| session.requested_at),
            completed: finished.or(self.completed.as_ref()).map(NodeName::from),
            cancelled: self.cancelled.iter().map(NodeName::from).collect(),
        }
    }

    /// Whether everything that nodes are told now is stored.
    pub(crate) fn is_durable(&self) -> bool {
        self.durable.as_ref() == Some(&self.doc())
    }

    /// The next epoch: larger than every one that was given or seen, and not before `clock`.
    pub(crate) fn next_epoch(&self, clock: u64) -> Option<u64> {
        let clear = self.clear.as_ref().map_or(0, |clear| clear.epoch);
        self.epoch.max(clear).max(self.given).max(clock).checked_add(1)
    }
}

#[cfg(test)]
mod tests {
    use heartbeatpb::Gid;

    use super::*;

    fn id(name: &str) -> ChangefeedId {
        let low = name.bytes().map(u64::from).sum();
        ChangefeedId { gid: Gid::new(0, low), name: name.into(), keyspace: "default".into() }
    }

    fn progress(target: &str, epoch: u64, dispatchers: u32, inflight_moves: u32) -> DrainProgress {
        DrainProgress { target: target.into(), epoch, dispatchers, inflight_moves }
    }

    #[test]
    fn sums_follow_the_reports() {
        let mut session = Session::new("n2".into(), 5, 0);
        let one = MaintainerEpoch::from_wire(1);
        session.on_report(&id("a"), one, &progress("n2", 5, 3, 1));
        session.on_report(&id("b"), one, &progress("n2", 5, 4, 0));
        session.on_report(&id("b"), one, &progress("n2", 4, 90, 90));
        session.on_report(&id("b"), one, &progress("n3", 5, 90, 90));
        assert_eq!(session.reported(), (7, 1));
        session.on_report(&id("a"), one, &progress("n2", 5, 1, 2));
        assert_eq!(session.reported(), (5, 2));
        session.retain(|id, _| &*id.name == "a");
        assert_eq!(session.reported(), (1, 2));
        session.forget(&id("a"));
        session.forget(&id("a"));
        assert_eq!(session.reported(), (0, 0));
    }

    #[test]
    // behaviour: coordinator-DR-7
    fn the_epochs_of_drains_end_and_do_not_wrap() {
        let drain = Drain { epoch: u64::MAX, ..Drain::default() };
        assert_eq!(drain.next_epoch(1), None);
        assert_eq!(Drain { epoch: 7, ..Drain::default() }.next_epoch(3), Some(8));
    }
}
