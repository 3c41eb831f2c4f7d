//! What people and metrics see of the table: copies, never the objects themselves.

use std::sync::Arc;
use std::time::Instant;

use heartbeatpb::config::ChangefeedInfo;
use heartbeatpb::{ChangefeedId, NodeId, RunningError, Ts, WallTime};

use super::{Core, Feed};
use crate::changefeed::Group;
use crate::changefeed::operator::{MovePhase, Operator};

/// One changefeed, at one moment.
#[derive(Clone, Debug)]
pub struct ChangefeedView {
    /// The description.
    pub info: Arc<ChangefeedInfo>,
    /// Largest checkpoint that was reported.
    pub checkpoint: Ts,
    /// The stored checkpoint.
    pub saved_checkpoint: Ts,
    /// When it was committed upstream, as far as its maintainer told.
    pub saved_time: Option<WallTime>,
    /// Largest commit ts flushed.
    pub last_synced: Ts,
    /// Where it is in its life.
    pub group: Group,
    /// Node of its maintainer.
    pub node: Option<NodeId>,
    /// Whether its maintainer has heard from every node.
    pub bootstrap_done: bool,
    /// Errors that its maintainer reported last.
    pub errors: Vec<RunningError>,
    /// Whether it is being removed.
    pub removing: bool,
    /// What the coordinator is waiting for before it can go on with it, as a sentence.
    pub waiting_for: Option<String>,
}

/// How many changefeeds are where.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// All.
    pub total: usize,
    /// Running on a node.
    pub working: usize,
    /// Operators at work.
    pub scheduling: usize,
    /// Meant to run, on no node.
    pub absent: usize,
    /// Not meant to run.
    pub stopped: usize,
    /// Members of the cluster.
    pub nodes: usize,
}

impl Core {
    pub(super) fn view(&self, id: &ChangefeedId, now: Instant) -> Option<ChangefeedView> {
        self.feeds.get(id).map(|feed| self.view_of(feed, now))
    }

    /// The changefeeds that people may see, by keyspace and name.
    #[must_use]
    pub fn views(&self, keyspace: Option<&str>, now: Instant) -> Vec<ChangefeedView> {
        self.names
            .iter()
            .filter(|((space, _), _)| keyspace.is_none_or(|wanted| wanted == &**space))
            .filter_map(|(_, id)| self.feeds.get(id))
            .filter(|feed| !feed.removing)
            .map(|feed| self.view_of(feed, now))
            .collect()
    }

    /// How many changefeeds are where.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let mut counts = Counts { total: self.feeds.len(), nodes: self.members.len(), ..Counts::default() };
        for feed in self.feeds.values() {
            counts.scheduling += usize::from(feed.slot.is_some());
            match feed.changefeed.group() {
                Group::Stopped => counts.stopped += 1,
                Group::Absent => counts.absent += 1,
                Group::Replicating => counts.working += 1,
                Group::Scheduling => {}
            }
        }
        counts
    }

    fn view_of(&self, feed: &Feed, now: Instant) -> ChangefeedView {
        let changefeed = &feed.changefeed;
        ChangefeedView {
            info: Arc::clone(&changefeed.info),
            checkpoint: changefeed.reported.checkpoint,
            saved_checkpoint: changefeed.last_saved,
            saved_time: changefeed.saved_time,
            last_synced: changefeed.reported.last_synced,
            group: changefeed.group(),
            node: changefeed.node().cloned(),
            bootstrap_done: changefeed.reported.bootstrap_done,
            errors: changefeed.reported.errors.clone(),
            removing: feed.removing,
            waiting_for: self.waiting_for(feed, now),
        }
    }

    /// Why a changefeed is not where it should be.
    fn waiting_for(&self, feed: &Feed, now: Instant) -> Option<String> {
        if let (Some(retry), Some(write)) = (&feed.retry, feed.writing.as_ref().or(feed.queue.front())) {
            return Some(format!("{} failed {} times: {}", write.what(), retry.failures, retry.why));
        }
        if let Some(slot) = feed.slot.as_ref().filter(|slot| !slot.finishing) {
            let seconds = now.duration_since(slot.since).as_secs();
            let node = slot.operator.node();
            return Some(match &slot.operator {
                Operator::Add { .. } | Operator::Move { phase: MovePhase::Adding, .. } => {
                    format!("node {node} to start the maintainer, for {seconds} s")
                }
                Operator::Move { dest, phase: MovePhase::Removing, .. } => {
                    format!("node {node} to stop the maintainer, which moves to {dest}, for {seconds} s")
                }
                Operator::Stop { .. } => format!("node {node} to stop the maintainer, for {seconds} s"),
            });
        }
        if let Some(write) = &feed.writing {
            return Some(write.what().to_owned());
        }
        if feed.changefeed.group() == Group::Absent {
            if let Some(at) = feed.changefeed.backoff.waits_until().filter(|at| *at > now) {
                return Some(format!("the next attempt after an error, in {} s", (at - now).as_secs() + 1));
            }
            if !self.members.iter().any(|node| self.takes_work(node, now)) {
                return Some("a node that takes work".to_owned());
            }
        }
        None
    }
}
