//! How long an erroring changefeed waits before it is started again, and when it is given up.

use std::time::{Duration, Instant};

use heartbeatpb::config::{ChangefeedInfo, ChangefeedState};
use heartbeatpb::{RunningError, Ts, codes};

/// Wait before the first restart.
const FIRST: Duration = Duration::from_secs(10);
/// Longest wait before a restart.
const LONGEST: Duration = Duration::from_secs(600);
/// A wait differs from its plan by at most this many per mille, so that many changefeeds do not return at once.
const JITTER_PER_MILLE: u64 = 100;

/// Whether a restart cannot help against this error.
#[must_use]
pub fn is_fast_fail(error: &RunningError) -> bool {
    codes::needs_person(&error.code)
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

    /// Judges a report without an error of a maintainer that waits for something outside and tries again by itself:
    /// people are told, and nothing is started again. What outlasts the limit fails all the same.
    pub fn check_waiting(&mut self, checkpoint: Ts, trouble: &RunningError, now: Instant) -> Verdict {
        if self.failed || checkpoint > self.baseline {
            return self.check(checkpoint, &[], now);
        }
        if let Some(failed) = self.outlasted(trouble, now) {
            return failed;
        }
        Verdict {
            changed: true,
            state: ChangefeedState::Warning,
            error: Some(trouble.clone()),
            restart: false,
        }
    }

    /// Begins or goes on with a series; the verdict when it has taken too long.
    fn outlasted(&mut self, error: &RunningError, now: Instant) -> Option<Verdict> {
        if !self.retrying {
            self.forget_series();
            self.retrying = true;
        }
        let since = *self.since.get_or_insert(now);
        if now.duration_since(since) <= self.limit {
            return None;
        }
        self.failed = true;
        Some(Verdict {
            changed: true,
            state: ChangefeedState::Failed,
            error: Some(error.clone()),
            restart: false,
        })
    }

    fn on_error(&mut self, error: &RunningError, now: Instant) -> Verdict {
        if let Some(failed) = self.outlasted(error, now) {
            return failed;
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

    /// Whether an error is being answered by stopping and starting the maintainer.
    #[must_use]
    pub fn is_restarting(&self) -> bool {
        self.restarting
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

#[cfg(test)]
mod tests {
    use super::*;
    use heartbeatpb::ChangefeedId;
    use heartbeatpb::config::{ReplicaConfig, UpstreamInfo};

    const LIMIT: Duration = Duration::from_secs(1800);

    fn backoff(state: ChangefeedState, baseline: u64) -> (Backoff, Instant) {
        let id = ChangefeedId::fresh("a");
        let mut info =
            ChangefeedInfo::new(id, UpstreamInfo::default(), "blackhole://", ReplicaConfig::default(), Ts(1));
        info.state = state;
        (Backoff::new(&info, LIMIT, Ts(baseline)), Instant::now())
    }

    fn error(code: &str) -> RunningError {
        RunningError {
            time: String::new(),
            node: "n".to_owned(),
            code: code.to_owned(),
            message: String::new(),
        }
    }

    /// `changed state restart`, shortly.
    fn said(verdict: &Verdict) -> String {
        let changed = if verdict.changed { "changed" } else { "same" };
        let restart = if verdict.restart { " restart" } else { "" };
        format!("{changed} {}{restart}", verdict.state)
    }

    #[test]
    // behaviour: coordinator-BO-1
    // behaviour: coordinator-BO-2
    // behaviour: coordinator-BO-10
    fn an_error_waits_and_progress_ends_the_wait() {
        let (mut b, t) = backoff(ChangefeedState::Normal, 1);
        assert_eq!(said(&b.check(Ts(1), &[error("CDC:ErrX")], t)), "changed warning restart");
        assert!(!b.should_run(t) && b.is_retrying());
        assert!(b.should_run(t + Duration::from_secs(11)), "the first wait is ten seconds and a little");
        assert_eq!(said(&b.check(Ts(2), &[], t)), "changed normal");
        assert!(b.should_run(t));
        let (mut fresh, t) = backoff(ChangefeedState::Normal, 1);
        assert_eq!(said(&fresh.check(Ts(2), &[], t)), "same normal");
    }

    #[test]
    // behaviour: coordinator-BO-3
    // behaviour: coordinator-BO-4
    // behaviour: coordinator-BO-5
    // behaviour: coordinator-BO-9
    fn a_fatal_error_sticks_until_a_person_resumes() {
        let (mut b, t) = backoff(ChangefeedState::Normal, 1);
        let verdict = b.check(Ts(2), &[error("CDC:ErrX"), error(codes::SNAPSHOT_LOST_BY_GC)], t);
        assert_eq!(said(&verdict), "changed failed");
        assert_eq!(verdict.error.unwrap().code, codes::SNAPSHOT_LOST_BY_GC);
        assert!(!b.is_retrying());
        assert_eq!(b.baseline, Ts(2));
        assert_eq!(said(&b.check(Ts(3), &[], t)), "same failed");
        assert_eq!(b.baseline, Ts(2), "a later checkpoint does not move it");
        assert!(!b.should_run(t));
        b.reset(Ts(2));
        assert!(b.should_run(t));
        assert_eq!(said(&b.check(Ts(2), &[], t)), "same normal");
    }

    #[test]
    // behaviour: coordinator-BO-6
    fn one_incident_takes_one_step_however_often_it_is_reported() {
        let (mut b, t) = backoff(ChangefeedState::Normal, 1);
        b.check(Ts(1), &[error("CDC:ErrX")], t);
        let wait = b.next_retry;
        for second in 1..100 {
            let now = t + Duration::from_secs(second);
            assert_eq!(said(&b.check(Ts(1), &[error("CDC:ErrX")], now)), "changed warning");
        }
        assert_eq!(b.next_retry, wait, "repeated reports do not push the restart away");
        b.start_finished();
        let now = t + Duration::from_secs(100);
        assert_eq!(said(&b.check(Ts(1), &[error("CDC:ErrX")], now)), "changed warning restart");
        let second = b.next_retry.unwrap() - now;
        assert!((18..=22).contains(&second.as_secs()), "the second wait is twice the first: {second:?}");
    }

    #[test]
    fn waits_grow_to_ten_minutes_and_one_history_gives_one_result() {
        let waits = || {
            let (mut b, t) = backoff(ChangefeedState::Normal, 1);
            b.limit = Duration::from_secs(1 << 40);
            b.seed = 7;
            (0..12)
                .map(|_| {
                    b.start_finished();
                    b.check(Ts(1), &[error("CDC:ErrX")], t);
                    b.next_retry.unwrap() - t
                })
                .collect::<Vec<_>>()
        };
        let all = waits();
        assert_eq!(all, waits());
        for (step, wait) in all.iter().enumerate() {
            let plan = (10.0 * 2f64.powi(i32::try_from(step).unwrap())).min(600.0);
            assert!((wait.as_secs_f64() / plan - 1.0).abs() <= 0.1, "step {step}: {wait:?}");
        }
    }

    #[test]
    fn what_is_tried_again_in_its_place_is_told_and_costs_no_restart_and_no_pause() {
        let (mut b, t) = backoff(ChangefeedState::Normal, 1);
        let away = error(codes::SINK_UNAVAILABLE);
        let at = |seconds| t + Duration::from_secs(seconds);
        for second in 0..100 {
            assert_eq!(said(&b.check_waiting(Ts(1), &away, at(second))), "changed warning");
            assert!(b.should_run(at(second)) && !b.is_restarting());
        }
        assert_eq!(said(&b.check(Ts(2), &[], at(101))), "changed normal", "it is over");
        assert_eq!(said(&b.check_waiting(Ts(3), &away, at(102))), "same normal", "it gets on all the same");
        assert_eq!(said(&b.check_waiting(Ts(3), &away, at(103))), "changed warning");
        let verdict = b.check_waiting(Ts(3), &away, at(104) + LIMIT);
        assert_eq!(said(&verdict), "changed failed", "not for ever");
        assert_eq!(said(&b.check_waiting(Ts(4), &away, at(105) + LIMIT)), "same failed");
    }

    #[test]
    // behaviour: coordinator-BO-7
    fn an_error_that_outlasts_the_limit_fails() {
        let (mut b, t) = backoff(ChangefeedState::Normal, 1);
        b.check(Ts(1), &[error("CDC:ErrX")], t);
        let verdict = b.check(Ts(1), &[error("CDC:ErrX")], t + LIMIT + Duration::from_secs(1));
        assert_eq!(said(&verdict), "changed failed");
        assert!(b.restarting, "only a start that succeeded clears it");
        b.start_finished();
        assert!(!b.restarting);
    }

    #[test]
    // behaviour: coordinator-BO-8
    fn every_code_against_which_a_restart_cannot_help_fails_at_once() {
        for code in codes::NEEDS_PERSON {
            let (mut b, t) = backoff(ChangefeedState::Normal, 1);
            assert_eq!(said(&b.check(Ts(1), &[error(code)], t)), "changed failed", "{code}");
        }
        let (mut b, t) = backoff(ChangefeedState::Normal, 1);
        let verdict = b.check(Ts(1), &[error(codes::SINK_UNAVAILABLE)], t);
        assert_eq!(said(&verdict), "changed warning restart", "what mends itself is tried again");
    }

    #[test]
    fn a_loaded_warning_becomes_normal_with_the_first_progress() {
        let (mut b, t) = backoff(ChangefeedState::Warning, 5);
        assert!(b.should_run(t));
        assert_eq!(said(&b.check(Ts(5), &[], t)), "same normal");
        assert_eq!(said(&b.check(Ts(6), &[], t)), "changed normal");
        let (mut b, t) = backoff(ChangefeedState::Normal, 5);
        assert_eq!(
            said(&b.check(Ts(6), &[error("CDC:ErrX")], t)),
            "same normal",
            "progress excuses an error"
        );
    }
}
