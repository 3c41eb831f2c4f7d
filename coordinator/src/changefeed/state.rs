//! From a maintainer's report to the state of its changefeed (coordinator §12.1).

use std::time::Instant;

use heartbeatpb::config::ChangefeedState;
use heartbeatpb::{MaintainerStatus, RunningError, Ts};

use super::Reported;
use super::backoff::{Backoff, Verdict, is_fast_fail};

/// What a report asks the coordinator to do.
#[derive(Clone, PartialEq, Debug)]
pub enum StateChange {
    /// Nothing but the checkpoint may have moved.
    CheckpointOnly,
    /// The changefeed is in this state now.
    To {
        /// The state.
        state: ChangefeedState,
        /// The error behind it.
        error: Option<RunningError>,
        /// Whether the maintainer is to be stopped and started again.
        restart: bool,
    },
}

impl From<Verdict> for StateChange {
    fn from(verdict: Verdict) -> Self {
        if verdict.changed {
            Self::To { state: verdict.state, error: verdict.error, restart: verdict.restart }
        } else {
            Self::CheckpointOnly
        }
    }
}

/// The order of the rules is what keeps an error from being lost behind a flip of `bootstrap_done`.
pub(super) fn update_status(
    reported: &mut Reported,
    backoff: &mut Backoff,
    target: Ts,
    status: &MaintainerStatus,
    now: Instant,
) -> StateChange {
    let has_error = !status.errors.is_empty();
    if status.checkpoint < reported.checkpoint && !has_error {
        return StateChange::CheckpointOnly;
    }
    let flipped = status.bootstrap_done && !reported.bootstrap_done;
    reported.advance(status);
    reported.last_synced = reported.last_synced.max(status.last_synced);
    reported.bootstrap_done = status.bootstrap_done;
    reported.errors.clone_from(&status.errors);
    if status.errors.iter().any(is_fast_fail) {
        return backoff.check(reported.checkpoint, &status.errors, now).into();
    }
    if target > Ts::ZERO && reported.checkpoint >= target {
        return StateChange::To { state: ChangefeedState::Finished, error: None, restart: false };
    }
    let verdict = match &status.trouble {
        Some(trouble) if !has_error => backoff.check_waiting(reported.checkpoint, trouble, now),
        Some(_) | None => backoff.check(reported.checkpoint, &status.errors, now),
    };
    if flipped && !has_error && !verdict.changed && verdict.state == ChangefeedState::Normal {
        return StateChange::To { state: ChangefeedState::Normal, error: None, restart: false };
    }
    verdict.into()
}
