//! How long an erroring changefeed waits before it is started again, and when it is given up.

use std::time::{Duration, Instant};

use heartbeatpb::config::{ChangefeedInfo, ChangefeedState};
use heartbeatpb::{RunningError, Ts};

/// Wait before the first restart.
const FIRST: Duration = Duration::from_secs(10);
/// Longest wait before a restart.
const LONGEST: Duration = Duration::from_secs(600);
/// A wait differs from its plan by at most this many per mille, so that many changefeeds do not return at once.
const JITTER_PER_MILLE: u64 = 100;

/// Codes after which a restart cannot help.
const FAST_FAIL: [&str; 19] = [
    "CDC:ErrGCTTLExceeded",
    "CDC:ErrSnapshotLostByGC",
    "CDC:ErrStartTsBeforeGC",
    "CDC:ErrExpressionColumnNotFound",
    "CDC:ErrInvalidFilterExpression",
    "CDC:ErrSchemaSnapshotNotFound",
    "CDC:ErrSyncRenameTableFailed",
    "CDC:ErrChangefeedUnretryable",
    "CDC:ErrCorruptedDataMutation",
    "CDC:ErrDispatcherFailed",
    "CDC:ErrColumnSelectorFailed",
    "CDC:ErrSinkURIInvalid",
    "CDC:ErrKafkaInvalidConfig",
    "CDC:ErrMySQLInvalidConfig",
    "CDC:ErrStorageSinkInvalidConfig",
    "CDC:ErrInvalidTableRoutingRule",
    "CDC:ErrTableRoutingFailed",
    "CDC:ErrTableRouteConflict",
    "CDC:ErrTableAfterNotSplitable",
];

/// Whether a restart cannot help against this error.
#[must_use]
pub fn is_fast_fail(error: &RunningError) -> bool {
    FAST_FAIL.contains(&error.code.as_str())
}

/// What a report means.
#[derive(Clone, PartialEq, Debug)]
pub struct Verdict {
    /// Whether the state is to be looked at again.
    pub changed: bool,
    /// The state.
    pub state: ChangefeedState,
    /// The error behind it.
    pub error: Option<RunningError>,
    /// Whether the maintainer is to be stopped and started again: once per incident.
    pub restart: bool,
}

impl Verdict {
    fn unchanged(state: ChangefeedState) -> Self {
        Self { changed: false, state, error: None, restart: false }
    }
}

/// The error series of one changefeed.
#[derive(Clone, PartialEq, Debug)]
pub struct Backoff {
    /// Time without progress after which an erroring changefeed fails.
    limit: Duration,
    failed: bool,
    retrying: bool,
    restarting: bool,
    next_retry: Option<Instant>,
    since: Option<Instant>,
    steps: u32,
    /// Progress beyond it ends the series.
    baseline: Ts,
    seed: u64,
}

impl Backoff {
    /// The series of a changefeed that was just loaded at `checkpoint`.
    #[must_use]
    pub fn new(info: &ChangefeedInfo, limit: Duration, checkpoint: Ts) -> Self {
        Self {
            limit,
            failed: info.state == ChangefeedState::Failed,
            // A stored warning becomes normal with the first progress.
            retrying: matches!(info.state, ChangefeedState::Warning | ChangefeedState::Pending),
            restarting: false,
            next_retry: None,
            since: None,
            steps: 0,
            baseline: checkpoint,
            seed: info.id.gid.low,
        }
    }

    /// Judges a report.
    pub fn check(&mut self, checkpoint: Ts, errors: &[RunningError], now: Instant) -> Verdict {
        if self.failed {
            return Verdict::unchanged(ChangefeedState::Failed);
        }
        let advanced = checkpoint > self.baseline;
        if let Some(error) = errors.iter().find(|error| is_fast_fail(error)) {
            self.failed = true;
            self.baseline = self.baseline.max(checkpoint);
            return Verdict {
                changed: true,
                state: ChangefeedState::Failed,
                error: Some(error.clone()),
                restart: false,
            };
        }
        match errors.last() {
            Some(error) if !advanced => self.on_error(error, now),
            Some(_) | None if advanced => {
                self.baseline = checkpoint;
                let changed = std::mem::take(&mut self.retrying);
                self.forget_series();
                Verdict { changed, state: ChangefeedState::Normal, error: None, restart: false }
            }
            Some(_) | None => Verdict::unchanged(ChangefeedState::Normal),
        }
    }

    fn on_error(&mut self, error: &RunningError, now: Instant) -> Verdict {
        if !self.retrying {
            self.forget_series();
            self.retrying = true;
        }
        let since = *self.since.get_or_insert(now);
        if now.duration_since(since) > self.limit {
            self.failed = true;
            return Verdict {
                changed: true,
                state: ChangefeedState::Failed,
                error: Some(error.clone()),
                restart: false,
            };
        }
        // The same incident is reported until the maintainer is gone: it is counted once.
        let restart = !self.restarting;
        if restart {
            self.restarting = true;
            self.next_retry = Some(now + self.interval());
            self.steps = self.steps.saturating_add(1);
        }
        Verdict { changed: true, state: ChangefeedState::Warning, error: Some(error.clone()), restart }
    }

    /// The wait of the current step. The jitter follows from the changefeed and the step, so that one history
    /// always gives one result.
    fn interval(&self) -> Duration {
        let plan = FIRST.saturating_mul(1 << self.steps.min(10)).min(LONGEST);
        let noise = (self.seed ^ u64::from(self.steps)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        let per_mille = 1000 - JITTER_PER_MILLE + noise % (2 * JITTER_PER_MILLE + 1);
        Duration::from_nanos(u64::try_from(plan.as_nanos()).unwrap_or(u64::MAX) / 1000 * per_mille)
    }

    fn forget_series(&mut self) {
        self.next_retry = None;
        self.since = None;
        self.steps = 0;
    }

    /// Whether the changefeed may be started now.
    #[must_use]
    pub fn should_run(&self, now: Instant) -> bool {
        !self.failed && self.next_retry.is_none_or(|at| now >= at)
    }

    /// When it may be started next, if that is in the future.
    #[must_use]
    pub fn waits_until(&self) -> Option<Instant> {
        self.next_retry
    }

    /// Whether a series is under way.
    #[must_use]
    pub fn is_retrying(&self) -> bool {
        self.retrying
    }

    /// The changefeed runs: its next error is a new incident.
    pub fn start_finished(&mut self) {
        self.restarting = false;
    }

    /// A person resumed the changefeed at `checkpoint`.
    pub fn reset(&mut self, checkpoint: Ts) {
        self.failed = false;
        self.retrying = false;
        self.restarting = false;
        self.forget_series();
        self.baseline = checkpoint;
    }

    /// Replaces the time after which an erroring changefeed fails.
    pub fn set_limit(&mut self, limit: Duration) {
        self.limit = limit.max(Duration::from_secs(1800));
    }
}
