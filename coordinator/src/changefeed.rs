//! One changefeed as the coordinator knows it: what is stored, where it is, and what was reported last.

pub mod backoff;
pub mod operator;
mod state;

use std::sync::Arc;
use std::time::{Duration, Instant};

use heartbeatpb::config::{ChangefeedInfo, SinkKind};
use heartbeatpb::{
    AddMaintainerRequest, ChangefeedId, MaintainerEpoch, MaintainerStatus, NodeId, RemoveMaintainerRequest,
    RunningError, Ts, WallTime,
};

use crate::meta::{CheckpointWrite, Stored};
use backoff::Backoff;
pub use state::StateChange;

/// Where a changefeed is in its life on the nodes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Group {
    /// Not meant to run.
    Stopped,
    /// Meant to run, on no node.
    Absent,
    /// On its way to a node or away from it.
    Scheduling,
    /// Running on a node.
    Replicating,
}

/// What the maintainer reported last.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Reported {
    /// Largest checkpoint that was accepted.
    pub checkpoint: Ts,
    /// When it was committed upstream, if the maintainer knows.
    pub time: Option<WallTime>,
    /// Epoch under which it was accepted.
    pub epoch: Option<MaintainerEpoch>,
    /// Largest commit ts flushed.
    pub last_synced: Ts,
    /// Whether every node answered the maintainer's bootstrap.
    pub bootstrap_done: bool,
    /// Errors of the last report.
    pub errors: Vec<RunningError>,
}

impl Reported {
    /// Takes the checkpoint of a report, unless it would go back.
    fn advance(&mut self, status: &MaintainerStatus) {
        if status.checkpoint > self.checkpoint {
            (self.checkpoint, self.time) = (status.checkpoint, status.checkpoint_time);
        } else if status.checkpoint == self.checkpoint {
            self.time = status.checkpoint_time.or(self.time);
        }
    }
}

/// One changefeed.
#[derive(Debug)]
pub struct Changefeed {
    /// The stored description; replaced as a whole.
    pub info: Arc<ChangefeedInfo>,
    /// What the maintainer reported last.
    pub reported: Reported,
    /// The stored checkpoint.
    pub last_saved: Ts,
    /// When it was committed upstream, as far as that was told.
    pub saved_time: Option<WallTime>,
    /// The checkpoint that is being stored, and when it was committed upstream.
    saving: Option<(Ts, Option<WallTime>)>,
    /// The maintainer starts without looking for what an earlier one left behind downstream.
    pub is_new: bool,
    /// Family of the sink; `None` when its URI is unusable, and then it cannot run.
    pub sink: Option<SinkKind>,
    /// When it may be started again.
    pub backoff: Backoff,
    group: Group,
    node: Option<NodeId>,
}

impl Changefeed {
    /// A changefeed as it was stored, not on any node. One whose sink URI is unusable is failed with the
    /// reason, in memory, so that a person sees it and can update it.
    #[must_use]
    pub fn load(stored: Stored) -> Self {
        let Stored { mut info, status } = stored;
        let sink = match SinkKind::of(&info.sink_uri) {
            Ok(kind) => Some(kind),
            Err(error) => {
                info.state = heartbeatpb::config::ChangefeedState::Failed;
                info.error = Some(RunningError {
                    time: info.create_time.clone(),
                    node: String::new(),
                    code: error.code().to_owned(),
                    message: error.to_string(),
                });
                None
            }
        };
        let group = if info.state.should_run() { Group::Absent } else { Group::Stopped };
        let stuck = info.config.changefeed_error_stuck_duration.0.max(Duration::from_secs(1800));
        let backoff = Backoff::new(&info, stuck, status.checkpoint_ts);
        Self {
            reported: Reported {
                checkpoint: status.checkpoint_ts,
                epoch: status.epoch,
                ..Reported::default()
            },
            last_saved: status.checkpoint_ts,
            saved_time: None,
            saving: None,
            is_new: false,
            info: Arc::new(info),
            sink,
            backoff,
            group,
            node: None,
        }
    }

    /// Its identity.
    #[must_use]
    pub fn id(&self) -> &ChangefeedId {
        &self.info.id
    }

    /// Where it is in its life.
    #[must_use]
    pub fn group(&self) -> Group {
        self.group
    }

    /// The node it is bound to.
    #[must_use]
    pub fn node(&self) -> Option<&NodeId> {
        self.node.as_ref()
    }

    /// Whether it may be given to a node now.
    #[must_use]
    pub fn is_runnable(&self, now: Instant) -> bool {
        self.group == Group::Absent
            && self.info.state.should_run()
            && self.sink.is_some()
            && self.backoff.should_run(now)
    }

    /// It is on its way to `node`.
    pub fn bind(&mut self, node: NodeId) {
        self.node = Some(node);
        self.group = Group::Scheduling;
    }

    /// It is about to leave its node.
    pub fn mark_scheduling(&mut self) {
        self.group = Group::Scheduling;
    }

    /// It runs on its node.
    pub fn mark_replicating(&mut self) {
        self.group = Group::Replicating;
        self.backoff.start_finished();
    }

    /// It runs on `node`, where it was found.
    pub fn adopt(&mut self, node: NodeId) {
        self.node = Some(node);
        self.mark_replicating();
    }

    /// It is on no node and wants one.
    pub fn mark_absent(&mut self) {
        self.node = None;
        self.group = Group::Absent;
    }

    /// It is not meant to run. Returns where it was.
    pub fn stop(&mut self) -> Option<NodeId> {
        self.group = Group::Stopped;
        self.node.take()
    }

    /// It is meant to run again from `checkpoint`, with nothing held against it. Refused unless stopped.
    pub fn restart_at(&mut self, checkpoint: Ts, overwrite: bool) -> bool {
        if self.group != Group::Stopped {
            return false;
        }
        self.reported = Reported { checkpoint, epoch: self.info.epoch, ..Reported::default() };
        if overwrite {
            self.last_saved = checkpoint;
            self.saved_time = None;
        }
        self.is_new = overwrite;
        self.backoff.reset(checkpoint);
        self.mark_absent();
        true
    }

    /// Replaces the description by what is stored now.
    pub fn install(&mut self, info: ChangefeedInfo) {
        self.sink = SinkKind::of(&info.sink_uri).ok();
        self.backoff.set_limit(info.config.changefeed_error_stuck_duration.0);
        self.info = Arc::new(info);
    }

    /// Takes a report from the bound node under the current epoch.
    pub fn on_status(&mut self, status: &MaintainerStatus, now: Instant) -> StateChange {
        let target = self.info.target_ts;
        let change = state::update_status(&mut self.reported, &mut self.backoff, target, status, now);
        if status.epoch.is_some() {
            self.reported.epoch = status.epoch;
        }
        change
    }

    /// Takes the last word of a maintainer that was told to stop: whoever follows begins there. Nothing of a generation
    /// before the accepted one, whose checkpoint a person may have set back.
    pub fn on_last_word(&mut self, status: &MaintainerStatus) {
        if status.epoch >= self.reported.epoch && status.checkpoint > self.reported.checkpoint {
            self.reported.advance(status);
            self.reported.last_synced = self.reported.last_synced.max(status.last_synced);
            self.reported.epoch = status.epoch;
        }
    }

    /// The reported checkpoint, if it is not stored yet; it is taken to be on its way to the store.
    pub fn take_unsaved(&mut self) -> Option<CheckpointWrite> {
        let Reported { checkpoint, time, epoch, .. } = self.reported;
        (checkpoint > self.last_saved).then(|| {
            self.saving = Some((checkpoint, time));
            CheckpointWrite { id: self.info.id.clone(), checkpoint, epoch }
        })
    }

    /// A checkpoint is stored; says whether it is news.
    pub fn on_saved(&mut self, checkpoint: Ts) -> bool {
        let news = checkpoint > self.last_saved;
        if news {
            self.last_saved = checkpoint;
            self.saved_time = self.saving.take_if(|(of, _)| *of == checkpoint).and_then(|(_, time)| time);
        }
        news
    }

    /// The command that starts its maintainer.
    #[must_use]
    pub fn add_request(&self) -> AddMaintainerRequest {
        AddMaintainerRequest {
            changefeed: self.info.id.clone(),
            config: self.info.to_bytes(),
            checkpoint: self.reported.checkpoint,
            is_new: self.is_new,
            keyspace_id: self.info.keyspace_id,
            epoch: self.info.epoch,
        }
    }
}

/// The command that stops a maintainer.
#[must_use]
pub fn remove_request(
    changefeed: &ChangefeedId,
    cascade: bool,
    removed: bool,
    keyspace_id: u32,
    epoch: Option<MaintainerEpoch>,
) -> RemoveMaintainerRequest {
    RemoveMaintainerRequest {
        changefeed: changefeed.clone(),
        cascade: cascade || removed,
        removed,
        keyspace_id,
        epoch,
    }
}

/// Whether an epoch that a maintainer reported is the current one. A maintainer that does not know epochs
/// is accepted only while such peers are tolerated.
#[must_use]
pub fn epoch_matches(
    reported: Option<MaintainerEpoch>,
    current: Option<MaintainerEpoch>,
    tolerate_none: bool,
) -> bool {
    match (reported, current) {
        (Some(reported), Some(current)) => reported == current,
        (None, None) => true,
        (None, Some(_)) | (Some(_), None) => tolerate_none,
    }
}

#[cfg(test)]
mod tests;
