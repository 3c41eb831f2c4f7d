//! What can go wrong, and what is promised when it does.

use std::time::Duration;

/// Longest lag while nodes are drained or restarted one after the other.
const PLANNED_LAG: Duration = Duration::from_secs(3);
/// When the lag is under a second again after a node was killed, at a lease of 3 s.
const KILL_RECOVERY: Duration = Duration::from_secs(6);

/// How long a fault lasts at most in a short run.
const SHORT: Duration = Duration::from_secs(9);

/// Which node is struck.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Role {
    /// The one that runs the coordinator.
    Leader,
    /// The one that looks after the changefeed and reads the upstream.
    Maintainer,
    /// One that only replicates tables.
    Dispatcher,
}

/// What is done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    /// `kill -9`. The kernel closes the connections.
    Kill(Role),
    /// The machine is gone: nobody hears anything, also no end of a connection.
    PowerOff(Role),
    /// `kill -STOP`, and `kill -CONT` after a while.
    Pause(Role),
    /// Nothing passes between two nodes; both reach everything else.
    CutNodes(Role, Role),
    /// Nothing passes from the maintainer's node to another one, but what that one says is heard.
    CutOneWay,
    /// A node does not reach the metadata store, but everything else.
    CutStore(Role),
    /// A node reaches nothing, and runs on.
    CutAll(Role),
    /// The leading member of etcd is killed, and started again after a while.
    StoreLeader,
    /// The downstream is killed, and started again after a while.
    TargetDown,
    /// The downstream answers nothing for a while, and keeps the connections.
    TargetSilent,
    /// The upstream is stopped as for maintenance, and started again.
    SourceRestart,
    /// The upstream is killed, and started again.
    SourceCrash,
    /// The maintainer's node has no room in its data directory for a while.
    DiskFull,
    /// Each node is drained and restarted, the leader included.
    Drain,
    /// Each node is stopped and started, the next one when replication goes on.
    Rolling,
    /// Each node is stopped and started, the next one at once.
    RollingHasty,
}

/// One line of the programme.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    /// What `--only` takes.
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    /// What is done, for people.
    pub(crate) what: &'static str,
    /// Part of `--ci`.
    pub(crate) in_ci: bool,
}

/// What is promised about the lag.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub(crate) struct Limit {
    /// Under a second again after this time.
    pub(crate) recovery: Option<Duration>,
    /// Never above.
    pub(crate) highest: Option<Duration>,
}

const fn fault(name: &'static str, kind: Kind, in_ci: bool, what: &'static str) -> Fault {
    Fault { name, kind, what, in_ci }
}

/// Every fault, in the order in which they are run.
pub(crate) const FAULTS: [Fault; 24] = [
    fault("kill-leader", Kind::Kill(Role::Leader), true, "kill -9 of the leader"),
    fault("kill-maintainer", Kind::Kill(Role::Maintainer), true, "kill -9 of the maintainer's node"),
    fault("kill-dispatcher", Kind::Kill(Role::Dispatcher), true, "kill -9 of a node with tables only"),
    fault("off-leader", Kind::PowerOff(Role::Leader), false, "the leader's machine is gone in silence"),
    fault(
        "off-maintainer",
        Kind::PowerOff(Role::Maintainer),
        false,
        "the maintainer's machine is gone in silence",
    ),
    fault("pause-leader", Kind::Pause(Role::Leader), false, "the leader is stopped for 30 s and wakes up"),
    fault(
        "pause-maintainer",
        Kind::Pause(Role::Maintainer),
        true,
        "the maintainer's node is stopped and wakes up",
    ),
    fault(
        "pause-dispatcher",
        Kind::Pause(Role::Dispatcher),
        false,
        "a node with tables only is stopped and wakes up",
    ),
    fault(
        "cut-nodes",
        Kind::CutNodes(Role::Maintainer, Role::Dispatcher),
        false,
        "the maintainer's node and another do not reach each other",
    ),
    fault(
        "cut-leader",
        Kind::CutNodes(Role::Maintainer, Role::Leader),
        false,
        "the maintainer's node and the leader do not reach each other",
    ),
    fault(
        "cut-aside",
        Kind::CutNodes(Role::Leader, Role::Dispatcher),
        false,
        "the leader and a node with tables only do not reach each other",
    ),
    fault("cut-one-way", Kind::CutOneWay, false, "another node does not hear the maintainer's"),
    fault("cut-store", Kind::CutStore(Role::Maintainer), true, "the maintainer's node does not reach etcd"),
    fault("cut-store-leader", Kind::CutStore(Role::Leader), false, "the leader does not reach etcd"),
    fault(
        "cut-all",
        Kind::CutAll(Role::Maintainer),
        false,
        "the maintainer's node reaches nothing and runs on",
    ),
    fault("store-leader", Kind::StoreLeader, false, "the leading member of etcd is killed"),
    fault("target-down", Kind::TargetDown, false, "the target is down"),
    fault("target-silent", Kind::TargetSilent, false, "the target does not answer"),
    fault("source-restart", Kind::SourceRestart, false, "the source is restarted"),
    fault("source-crash", Kind::SourceCrash, false, "the source crashes"),
    fault("disk-full", Kind::DiskFull, false, "the data directory of the maintainer's node is full"),
    fault("drain", Kind::Drain, false, "each node is drained and restarted, the leader included"),
    fault("rolling-restart", Kind::Rolling, true, "each node is restarted under load"),
    fault(
        "rolling-hasty",
        Kind::RollingHasty,
        false,
        "each node is restarted as soon as the one before is listed",
    ),
];

impl Fault {
    /// Why it cannot be run in a world of this many nodes and members of etcd.
    pub(crate) fn cannot(&self, nodes: usize, stores: usize, root: bool) -> Option<String> {
        let for_two = matches!(self.kind, Kind::CutNodes(..) | Kind::CutOneWay | Kind::Drain);
        if nodes < 2 && (for_two || self.repeats_another_when_alone()) {
            return Some("needs two nodes".to_owned());
        }
        let cuts_store = matches!(self.kind, Kind::CutStore(_));
        if cuts_store && stores == 0 {
            return Some("needs etcd".to_owned());
        }
        if self.kind == Kind::StoreLeader && stores < 3 {
            return Some("needs three members of etcd (--stores 3)".to_owned());
        }
        (self.kind == Kind::DiskFull && !root).then(|| "only root may mount a small file system".to_owned())
    }

    /// With one node every role is on it.
    fn repeats_another_when_alone(&self) -> bool {
        matches!(
            self.kind,
            Kind::Kill(Role::Maintainer | Role::Dispatcher)
                | Kind::PowerOff(Role::Maintainer)
                | Kind::Pause(Role::Leader | Role::Dispatcher)
                | Kind::CutStore(Role::Leader)
        )
    }

    /// How long it lasts, where it is not over at once. In short it is still longer than a lease.
    pub(crate) fn lasts(&self, short: bool) -> Duration {
        if short { self.lasts_long().min(SHORT) } else { self.lasts_long() }
    }

    fn lasts_long(&self) -> Duration {
        let seconds = match self.kind {
            Kind::Pause(_) | Kind::CutNodes(..) | Kind::CutOneWay | Kind::CutStore(_) | Kind::CutAll(_) => 30,
            Kind::TargetDown | Kind::TargetSilent | Kind::DiskFull => 15,
            Kind::StoreLeader => 8,
            Kind::SourceRestart | Kind::SourceCrash => 3,
            Kind::Kill(_) | Kind::PowerOff(_) | Kind::Drain | Kind::Rolling | Kind::RollingHasty => 0,
        };
        Duration::from_secs(seconds)
    }

    /// What is promised in a cluster; a node that is alone can only be started again. A short run, on a machine that does
    /// other things too, allows twice as much: it is to notice what is broken, not what is slow. So does one that changes the
    /// schema, for each change of which tables wait.
    pub(crate) fn limit(&self, nodes: usize, short: bool, schema_changes: bool) -> Limit {
        let factor = [short, schema_changes]
            .iter()
            .fold(1, |factor, doubled| if *doubled { 2 * factor } else { factor });
        let planned = matches!(self.kind, Kind::Drain | Kind::Rolling);
        let killed = matches!(self.kind, Kind::Kill(_));
        Limit {
            recovery: (killed && nodes > 1).then_some(KILL_RECOVERY * factor),
            highest: (planned && nodes > 2).then_some(PLANNED_LAG * factor),
        }
    }

    /// Whether others take over while it lasts, so that it is over for the data before it is over.
    pub(crate) fn is_survived(&self, nodes: usize) -> bool {
        match self.kind {
            Kind::Kill(_) | Kind::PowerOff(_) | Kind::Pause(_) | Kind::CutStore(_) | Kind::CutAll(_) => {
                nodes > 1
            }
            // Of two nodes neither gives up the other.
            Kind::CutNodes(..) | Kind::CutOneWay => nodes > 2,
            Kind::StoreLeader | Kind::Drain | Kind::Rolling | Kind::RollingHasty => true,
            Kind::TargetDown
            | Kind::TargetSilent
            | Kind::SourceRestart
            | Kind::SourceCrash
            | Kind::DiskFull => false,
        }
    }

    /// Whether a node may end by itself, to be started again: one that has lost its lease must.
    pub(crate) fn may_end_nodes(&self) -> bool {
        matches!(self.kind, Kind::Pause(_) | Kind::CutStore(_) | Kind::CutAll(_) | Kind::DiskFull)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fault_has_a_name_of_its_own_and_can_be_run_somewhere() {
        let mut names: Vec<&str> = FAULTS.iter().map(|fault| fault.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), FAULTS.len());
        assert!(FAULTS.iter().all(|fault| fault.cannot(3, 3, true).is_none()));
        assert!(FAULTS.iter().filter(|fault| fault.cannot(1, 0, true).is_none()).count() >= 7);
    }
}
