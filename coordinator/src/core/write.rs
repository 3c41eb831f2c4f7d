//! What is made durable for a changefeed, in which order, and what follows once it is.

use std::time::Instant;

use heartbeatpb::config::{ChangefeedInfo, ChangefeedState, Progress};
use heartbeatpb::{ChangefeedId, MaintainerEpoch, NodeId, RunningError, Ts};

use super::command::{NOT_RESUMABLE, refused};
use super::{Action, Core, FIRST_RETRY, LONGEST_RETRY, OpId, Reply, Retry};
use crate::changefeed::Group;
use crate::changefeed::operator::{MovePhase, Operator};
use crate::error::Error;
use crate::meta::{CheckpointWrite, Stored};

/// Something that has to be durable before what depends on it happens.
#[derive(Clone, PartialEq, Debug)]
pub enum Write {
    /// A new changefeed.
    Create {
        /// Its description, with its first epoch.
        info: Box<ChangefeedInfo>,
    },
    /// A larger epoch, for a maintainer on a node.
    BumpForAdd {
        /// The node.
        dest: NodeId,
    },
    /// A larger epoch, for a maintainer that goes from one node to another.
    BumpForMove {
        /// Where it is.
        origin: NodeId,
        /// Where it goes to.
        dest: NodeId,
    },
    /// A larger epoch with a warning, because the maintainer is started again.
    BumpForRestart {
        /// The error.
        error: RunningError,
    },
    /// A state that the maintainer's reports led to.
    State {
        /// The state.
        state: ChangefeedState,
        /// The error behind it.
        error: Option<RunningError>,
    },
    /// A pause by a person.
    Pause {
        /// Who waits.
        op: OpId,
    },
    /// A resume by a person.
    Resume {
        /// Who waits.
        op: OpId,
        /// A new checkpoint.
        overwrite: Option<Ts>,
        /// The epoch that is stored, as far as the coordinator knows. A larger one says that an earlier attempt
        /// was applied although its answer was lost.
        known: Option<MaintainerEpoch>,
    },
    /// A new description by a person.
    Update {
        /// Who waits.
        op: OpId,
        /// The description.
        info: Box<ChangefeedInfo>,
    },
    /// The intent to remove, by a person.
    Removing {
        /// Who waits.
        op: OpId,
    },
    /// The maintainer stopped.
    StopDone {
        /// The checkpoint that it left behind, if it is not stored yet.
        last: Option<CheckpointWrite>,
    },
    /// The upstream need not keep anything for the changefeed any more.
    DropRetention {
        /// Its description.
        info: Box<ChangefeedInfo>,
    },
    /// The changefeed is gone.
    Delete,
}

impl Write {
    /// Who waits for it and gets its error.
    fn op(&self) -> Option<OpId> {
        match self {
            Self::Pause { op }
            | Self::Resume { op, .. }
            | Self::Update { op, .. }
            | Self::Removing { op } => Some(*op),
            Self::Create { .. }
            | Self::BumpForAdd { .. }
            | Self::BumpForMove { .. }
            | Self::BumpForRestart { .. }
            | Self::State { .. }
            | Self::StopDone { .. }
            | Self::DropRetention { .. }
            | Self::Delete => None,
        }
    }

    /// Short name for people.
    pub(super) fn what(&self) -> &'static str {
        match self {
            Self::Create { .. } => "storing the new changefeed",
            Self::BumpForAdd { .. } | Self::BumpForMove { .. } | Self::BumpForRestart { .. } => {
                "storing a new maintainer epoch"
            }
            Self::State { .. } => "storing the state",
            Self::Pause { .. } => "storing the pause",
            Self::Resume { .. } => "storing the resume",
            Self::Update { .. } => "storing the new configuration",
            Self::Removing { .. } => "storing the removal",
            Self::StopDone { .. } => "storing that the maintainer stopped",
            Self::DropRetention { .. } => "releasing the log at the upstream",
            Self::Delete => "deleting the changefeed's metadata",
        }
    }
}

impl Core {
    /// Who asked for a write that is to be done, if a person did.
    #[must_use]
    pub fn asked_by(&self, id: &ChangefeedId, write: &Write) -> Option<OpId> {
        let creates = matches!(write, Write::Create { .. });
        let creator = self.creating.get(id).filter(|_| creates).map(|(op, _)| *op);
        creator.or_else(|| write.op())
    }

    /// Puts a write behind those that wait.
    pub(super) fn want(&mut self, id: &ChangefeedId, write: Write, now: Instant) {
        if let Some(feed) = self.feeds.get_mut(id) {
            feed.queue.push_back(write);
        }
        self.pump(id, now);
    }

    /// Puts a consequence of a report behind those that wait. A newer one replaces an older one; what a
    /// person has to look at is not replaced by good news.
    pub(super) fn want_state(&mut self, id: &ChangefeedId, write: Write, now: Instant) {
        let Some(feed) = self.feeds.get_mut(id) else { return };
        let terminal = |write: &Write| {
            matches!(write, Write::State { state: ChangefeedState::Failed | ChangefeedState::Finished, .. })
        };
        if feed.queue.iter().any(terminal) {
            return;
        }
        feed.queue.retain(|waiting| !matches!(waiting, Write::State { .. } | Write::BumpForRestart { .. }));
        feed.queue.push_back(write);
        self.pump(id, now);
    }

    /// Starts the next write if none is under way.
    pub(super) fn pump(&mut self, id: &ChangefeedId, now: Instant) {
        let Some(feed) = self.feeds.get_mut(id) else { return };
        if feed.writing.is_some() || feed.retry.as_ref().is_some_and(|retry| now < retry.at) {
            return;
        }
        while let Some(write) = feed.queue.pop_front() {
            if let Write::Resume { op, .. } = write
                && !feed.changefeed.info.state.is_resumable()
            {
                // Another resume was before it.
                let result = Err(refused(&feed.changefeed.info, NOT_RESUMABLE));
                self.out.push(Action::Reply { op, result });
                continue;
            }
            let runs = feed.changefeed.info.state.should_run() && !feed.removing;
            let relevant = match &write {
                // A person stopped it meanwhile, or it ended: the report is about the past.
                Write::State { .. } | Write::BumpForRestart { .. } | Write::BumpForAdd { .. } => runs,
                Write::BumpForMove { origin, .. } => runs && feed.replicates_on(origin),
                Write::Create { .. }
                | Write::Pause { .. }
                | Write::Resume { .. }
                | Write::Update { .. }
                | Write::Removing { .. }
                | Write::StopDone { .. }
                | Write::DropRetention { .. }
                | Write::Delete => true,
            };
            if relevant {
                feed.writing = Some(write.clone());
                self.out.push(Action::Write { id: id.clone(), write });
                return;
            }
        }
    }

    /// A write ended. `stored` is what the store holds now; it wins over what was in memory.
    pub fn on_written(
        &mut self,
        id: &ChangefeedId,
        result: Result<Option<Stored>, Error>,
        now: Instant,
    ) -> Vec<Action> {
        if let Some((op, info)) = self.creating.remove(id) {
            self.on_created(id, op, *info, result.map(|_| ()), now);
        } else if let Some(write) = self.feeds.get_mut(id).and_then(|feed| feed.writing.take()) {
            match result {
                Ok(stored) => {
                    if let Some(feed) = self.feeds.get_mut(id) {
                        feed.retry = None;
                    }
                    self.on_durable(id, write, stored, now);
                }
                Err(error) => self.on_write_failed(id, write, error, now),
            }
            self.pump(id, now);
        }
        self.schedule(now);
        std::mem::take(&mut self.out)
    }

    fn on_write_failed(&mut self, id: &ChangefeedId, write: Write, error: Error, now: Instant) {
        let Some(feed) = self.feeds.get_mut(id) else { return };
        let retried = error.is_retryable() || matches!(write, Write::DropRetention { .. });
        if retried {
            let failures = feed.retry.as_ref().map_or(0, |retry| retry.failures) + 1;
            let wait = FIRST_RETRY.saturating_mul(1 << failures.min(10)).min(LONGEST_RETRY);
            feed.retry = Some(Retry { at: now + wait, failures, why: error.to_string() });
            feed.queue.push_front(write);
            return;
        }
        feed.retry = None;
        if matches!(error, Error::NotExists(_)) && !matches!(write, Write::Delete) {
            // Somebody deleted the metadata: there is nothing left to coordinate.
            self.forget(id, now);
        } else if let (
            Write::BumpForAdd { .. } | Write::BumpForMove { .. } | Write::BumpForRestart { .. },
            Error::EpochOverflow(_),
        ) = (&write, &error)
        {
            let failed = RunningError {
                time: String::new(),
                node: self.me.to_string(),
                code: error.code().to_owned(),
                message: error.to_string(),
            };
            feed.queue.push_back(Write::State { state: ChangefeedState::Failed, error: Some(failed) });
        }
        if let Some(op) = write.op() {
            self.out.push(Action::Reply { op, result: Err(error) });
        }
    }

    fn on_created(
        &mut self,
        id: &ChangefeedId,
        op: OpId,
        info: ChangefeedInfo,
        result: Result<(), Error>,
        now: Instant,
    ) {
        match result {
            Ok(()) => {
                let status = heartbeatpb::config::ChangefeedStatusDoc::at(info.start_ts, info.epoch);
                let mut changefeed =
                    crate::changefeed::Changefeed::load(Stored { info: info.clone(), status });
                changefeed.is_new = true;
                self.feeds.insert(id.clone(), super::feed(changefeed));
                self.out.push(Action::Reply { op, result: Ok(Reply::Info(Box::new(info))) });
                self.schedule(now);
            }
            Err(error) => {
                self.names.remove(&super::key_of(id));
                self.out.push(Action::Reply { op, result: Err(error) });
            }
        }
    }

    fn on_durable(&mut self, id: &ChangefeedId, write: Write, stored: Option<Stored>, now: Instant) {
        let Some(feed) = self.feeds.get_mut(id) else { return };
        let before = feed.changefeed.info.epoch;
        let checkpoint = stored.as_ref().map(|stored| stored.status.checkpoint_ts);
        if let Some(stored) = stored {
            feed.changefeed.install(stored.info);
        }
        match write {
            Write::Create { .. } => {}
            Write::BumpForAdd { dest } => self.begin_add(id, dest, now),
            Write::BumpForMove { origin, dest } => self.begin_move(id, origin, dest, before, now),
            Write::BumpForRestart { .. } => {
                let node = feed.changefeed.node().cloned();
                feed.changefeed.mark_absent();
                self.stop(id, node, false, before, now);
            }
            Write::State { state, .. } => {
                if !state.should_run() {
                    let node = feed.changefeed.stop();
                    self.stop(id, node, false, before, now);
                }
            }
            Write::Pause { op } => {
                let node = feed.changefeed.stop();
                feed.pausing.push(op);
                self.stop(id, node, false, before, now);
            }
            Write::Removing { op } => {
                let node = feed.changefeed.stop();
                feed.removing = true;
                feed.removals.push(op);
                self.stop(id, node, true, before, now);
            }
            Write::Resume { op, overwrite, .. } => {
                let checkpoint = checkpoint.unwrap_or(feed.changefeed.last_saved);
                feed.changefeed.restart_at(checkpoint, overwrite.is_some());
                self.out.push(Action::Reply { op, result: Ok(Reply::Checkpoint(checkpoint)) });
            }
            Write::Update { op, .. } => {
                let info = Box::new((*feed.changefeed.info).clone());
                self.out.push(Action::Reply { op, result: Ok(Reply::Info(info)) });
            }
            Write::StopDone { .. } => {
                // As it is stored: it may have been set back meanwhile.
                feed.changefeed.on_saved(checkpoint.unwrap_or_default());
                let checkpoint = feed.changefeed.last_saved;
                for op in std::mem::take(&mut feed.pausing) {
                    self.out.push(Action::Reply { op, result: Ok(Reply::Checkpoint(checkpoint)) });
                }
                self.end_slot(id, now);
            }
            Write::DropRetention { .. } => feed.queue.push_front(Write::Delete),
            Write::Delete => self.forget(id, now),
        }
    }

    /// The larger epoch of a start is durable. If the place is taken or the node takes no work any more, another
    /// start follows, under a larger one.
    fn begin_add(&mut self, id: &ChangefeedId, dest: NodeId, now: Instant) {
        let admitted = self.takes_work(&dest, now);
        let Some(feed) = self.feeds.get_mut(id) else { return };
        let free = feed.slot.is_none() && feed.queue.is_empty();
        if admitted && free && feed.changefeed.is_runnable(now) {
            feed.changefeed.bind(dest.clone());
            let epoch = feed.changefeed.info.epoch;
            self.begin(id, Operator::Add { dest, epoch }, now);
        }
    }

    /// The larger epoch of a move is durable. The maintainer that runs is behind it from now on and has to be
    /// replaced, even if the destination left meanwhile or something else waits for the place.
    fn begin_move(
        &mut self,
        id: &ChangefeedId,
        origin: NodeId,
        dest: NodeId,
        origin_epoch: Option<MaintainerEpoch>,
        now: Instant,
    ) {
        let Some(feed) = self.feeds.get(id).filter(|feed| feed.slot.is_none() && feed.replicates_on(&origin))
        else {
            return;
        };
        let epoch = feed.changefeed.info.epoch;
        let dest = if self.takes_work(&dest, now) {
            dest
        } else {
            let mut load = self.load(now);
            load.remove(&origin);
            super::schedule::least(&load).unwrap_or_else(|| origin.clone())
        };
        if let Some(feed) = self.feeds.get_mut(id) {
            feed.changefeed.mark_scheduling();
        }
        let phase = MovePhase::Removing;
        self.begin(id, Operator::Move { origin, origin_epoch, dest, epoch, phase }, now);
    }

    /// Forgets a changefeed whose metadata is gone, and answers everyone who waits.
    fn forget(&mut self, id: &ChangefeedId, now: Instant) {
        self.end_slot(id, now);
        let Some(feed) = self.feeds.remove(id) else { return };
        self.names.remove(&super::key_of(id));
        let checkpoint = feed.changefeed.last_saved;
        for op in feed.removals {
            self.out.push(Action::Reply { op, result: Ok(Reply::Checkpoint(checkpoint)) });
        }
        let waiting = feed.queue.iter().filter_map(Write::op).chain(feed.pausing);
        for op in waiting {
            self.out.push(Action::Reply { op, result: Err(Error::NotExists(id.to_string())) });
        }
    }

    /// Stores what moved since the last time, all at once.
    pub(super) fn save_checkpoints(&mut self) {
        if self.saving {
            return;
        }
        let writes: Vec<CheckpointWrite> = self
            .feeds
            .values_mut()
            .filter(|feed| !feed.removing)
            .filter_map(|feed| feed.changefeed.take_unsaved())
            .collect();
        if !writes.is_empty() {
            self.saving = true;
            self.out.push(Action::SaveCheckpoints(writes));
        }
    }

    /// Checkpoints are durable; only now the maintainers may rely on them. After an error the next tick
    /// tries again with what is newest then.
    pub fn on_checkpoints_saved(&mut self, durable: &[CheckpointWrite], now: Instant) -> Vec<Action> {
        self.saving = false;
        for write in durable {
            let Some(feed) = self.feeds.get_mut(&write.id) else { continue };
            // A resume may have set another checkpoint meanwhile, under a newer epoch.
            let current = write.epoch == feed.changefeed.reported.epoch;
            if current
                && feed.changefeed.on_saved(write.checkpoint)
                && feed.changefeed.group() == Group::Replicating
            {
                self.tell_checkpoint(&write.id, now, true);
            }
        }
        std::mem::take(&mut self.out)
    }

    /// The write that a stored intent still needs after a restart.
    pub(super) fn intent_of(progress: Progress) -> Option<bool> {
        match progress {
            Progress::None => None,
            Progress::Stopping => Some(false),
            Progress::Removing => Some(true),
        }
    }
}
