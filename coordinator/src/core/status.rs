//! Reports of maintainers: who may report what, and what follows (coordinator §7.1, §12.3).

use std::time::Instant;

use heartbeatpb::config::ChangefeedState;
use heartbeatpb::{ChangefeedId, ComponentState, MaintainerEpoch, MaintainerStatus, NodeId, RunningError};
use messaging::ToMaintainerManager;

use super::{Action, Core, TELL_STALE, Write};
use crate::changefeed::operator::{Operator, Seen};
use crate::changefeed::{StateChange, epoch_matches, remove_request};

impl Core {
    pub(super) fn on_status(&mut self, from: &NodeId, status: &MaintainerStatus, now: Instant) {
        let id = &status.changefeed;
        self.check_operator(from, status, now);
        let tolerate = self.config.tolerate_epochless;
        let Some(feed) = self.feeds.get_mut(id) else {
            if status.state == ComponentState::Working && !self.creating.contains_key(id) {
                self.refuse_unknown(from, status, now);
            }
            return;
        };
        let bound = feed.changefeed.node() == Some(from);
        if !bound || !epoch_matches(status.epoch, feed.changefeed.info.epoch, tolerate) {
            // The operator tells the maintainer that it stops. Any other is in its way: a node that runs one takes
            // neither a start nor the stop of another.
            let told = feed.slot.as_ref().is_some_and(|slot| slot.operator.stops(from, status.epoch));
            if !told && status.state == ComponentState::Working {
                self.refuse_stale(from, id, status.epoch, now);
            } else {
                tracing::debug!(changefeed = %id, node = %from, epoch = ?status.epoch, "report of another maintainer dropped");
            }
            return;
        }
        feed.heard_at = Some(now);
        let change = feed.changefeed.on_status(status, now);
        // Before its bootstrap a maintainer does not know its dispatchers: what it counts is no proof.
        if let (Some(progress), Some(session), true) =
            (&status.drain, self.drain.active_mut(), status.bootstrap_done)
        {
            session.on_report(id, status.epoch, progress);
        }
        let gone = matches!(status.state, ComponentState::Stopped | ComponentState::Removed);
        if gone && status.errors.is_empty() && feed.slot.is_none() && feed.writing.is_none() {
            // The current maintainer ended by itself: it needs a new place and a new epoch.
            feed.changefeed.mark_absent();
        }
        self.on_state_change(id, change, now);
    }

    /// The operator sees every report first, even one that is dropped afterwards.
    fn check_operator(&mut self, from: &NodeId, status: &MaintainerStatus, now: Instant) {
        let id = &status.changefeed;
        let Some(feed) = self.feeds.get_mut(id) else { return };
        let Some(slot) = &mut feed.slot else { return };
        if slot.finishing {
            return;
        }
        if slot.operator.stops(from, status.epoch) && status.state != ComponentState::Working {
            feed.changefeed.on_last_word(status);
        }
        match slot.operator.on_status(from, status, self.config.tolerate_epochless) {
            Seen::Nothing => {}
            Seen::OriginStopped => self.hand_over(id, now),
            Seen::Done => match slot.operator {
                Operator::Add { .. } | Operator::Move { .. } => {
                    feed.changefeed.mark_replicating();
                    feed.changefeed.is_new = false;
                    feed.told_at = None;
                    self.end_slot(id, now);
                    self.tell_checkpoint(id, now, false);
                }
                Operator::Stop { .. } => self.on_stopped(id, now),
            },
        }
    }

    pub(super) fn on_state_change(&mut self, id: &ChangefeedId, change: StateChange, now: Instant) {
        let StateChange::To { state, error, restart } = change else { return };
        let Some(feed) = self.feeds.get(id) else { return };
        let info = &feed.changefeed.info;
        let same = info.state == state && same_error(info.error.as_ref(), error.as_ref());
        let write = match (state, error) {
            // An unchanged warning is not written for its own sake, but the maintainer is restarted all the same.
            (ChangefeedState::Warning, Some(error)) if restart => Write::BumpForRestart { error },
            // What is being tried again where it is. While the maintainer is stopped for an error, that is what counts.
            (ChangefeedState::Warning, Some(error)) if !same && !feed.changefeed.backoff.is_restarting() => {
                Write::State { state: ChangefeedState::Warning, error: Some(error) }
            }
            (ChangefeedState::Warning, _) => return,
            (
                ChangefeedState::Normal
                | ChangefeedState::Pending
                | ChangefeedState::Failed
                | ChangefeedState::Stopped
                | ChangefeedState::Finished
                | ChangefeedState::Removed
                | ChangefeedState::Uninitialized,
                _,
            ) if same => return,
            (
                state @ (ChangefeedState::Normal
                | ChangefeedState::Pending
                | ChangefeedState::Failed
                | ChangefeedState::Stopped
                | ChangefeedState::Finished
                | ChangefeedState::Removed
                | ChangefeedState::Uninitialized),
                error,
            ) => Write::State { state, error },
        };
        self.want_state(id, write, now);
    }

    /// A maintainer of a changefeed that nobody knows: its metadata is gone.
    pub(super) fn refuse_unknown(&mut self, from: &NodeId, status: &MaintainerStatus, now: Instant) {
        let key = (status.changefeed.clone(), from.clone());
        if self.unknown_told.get(&key).is_some_and(|at| now.duration_since(*at) < TELL_STALE) {
            return;
        }
        self.unknown_told.insert(key, now);
        let request = remove_request(&status.changefeed, true, true, 0, status.epoch);
        self.out
            .push(Action::Send { to: from.clone(), message: ToMaintainerManager::RemoveMaintainer(request) });
    }

    /// A maintainer that is not the current one of its changefeed is told to stop, again while it reports,
    /// with the epoch that it reported: that names it and nobody else.
    pub(super) fn refuse_stale(
        &mut self,
        from: &NodeId,
        id: &ChangefeedId,
        epoch: Option<MaintainerEpoch>,
        now: Instant,
    ) {
        let Some(feed) = self.feeds.get_mut(id) else { return };
        if feed.stale_told.get(from).is_some_and(|at| now.duration_since(*at) < TELL_STALE) {
            return;
        }
        feed.stale_told.insert(from.clone(), now);
        let request = remove_request(id, true, feed.removing, feed.changefeed.info.keyspace_id, epoch);
        self.out
            .push(Action::Send { to: from.clone(), message: ToMaintainerManager::RemoveMaintainer(request) });
    }
}

/// Whether two errors are the same incident; the time does not count. Stored messages may have been cut.
fn same_error(stored: Option<&RunningError>, new: Option<&RunningError>) -> bool {
    match (stored, new) {
        (None, None) => true,
        (Some(stored), Some(new)) => {
            let cut = stored.message.strip_suffix("...").filter(|start| new.message.starts_with(start));
            stored.node == new.node
                && stored.code == new.code
                && (stored.message == new.message || cut.is_some())
        }
        (None, Some(_)) | (Some(_), None) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    // behaviour: coordinator-CO-5
    fn the_time_of_an_error_does_not_make_it_another_one() {
        let error = |time: &str, node: &str, code: &str, message: &str| RunningError {
            time: time.to_owned(),
            node: node.to_owned(),
            code: code.to_owned(),
            message: message.to_owned(),
        };
        let one = error("1", "n", "c", "m");
        assert!(same_error(Some(&one), Some(&error("2", "n", "c", "m"))));
        for other in [error("1", "x", "c", "m"), error("1", "n", "x", "m"), error("1", "n", "c", "x")] {
            assert!(!same_error(Some(&one), Some(&other)));
        }
        assert!(!same_error(Some(&one), None));
        let long = "m".repeat(130);
        let cut = error("1", "n", "c", &format!("{}...", &long[..100]));
        assert!(same_error(Some(&cut), Some(&error("1", "n", "c", &long))));
    }
}
