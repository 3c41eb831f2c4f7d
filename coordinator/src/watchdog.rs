//! Whether this process may write now: by what the store says about the lease of its session, and by the clock.
//!
//! A core: signs and time in, verdicts out. The loop around it asks the store, waits for the session's end at the same
//! time, and acts: what writes is held back, let go on, or closed for good.
//!
//! ```text
//!               confirmed (at the time the question was sent)
//!                 +-----+
//!                 v     |          not confirmed for ttl - margin, by the clock
//!   granted --> trusted-+------------------------------------------------------> suspended
//!                 |  ^                                                             |   |
//!                 |  |  the same lease is confirmed, and the registration is there |   |
//!                 |  +-------------------------------------------------------------+   |
//!                 |                                                                    |
//!                 +-- the session is done, the lease is gone, or the registration is --+
//!                                               v
//!                                        lost: fence, once
//! ```
//!
//! Silence alone ends nothing. A store that has no leader gives no lease up, and when it has one again every lease begins
//! anew (etcd: `lessor.Promote`); and a lease that is confirmed now was never given up in between, for its number is
//! random and an ended lease is not revived. So whoever waits in suspense for the same lease has lost nothing to anybody,
//! and whoever finds it gone has written nothing since another node may have taken over.

use std::time::{Duration, Instant};

/// Between two questions to the store.
pub const PERIOD: Duration = Duration::from_secs(1);
/// The least time between the end of writing by the clock and the earliest moment at which the store may give the lease
/// up: for what was allowed a moment before, and is still on its way.
const LEAST_MARGIN: Duration = Duration::from_secs(1);

/// Why a process may not write any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Lost {
    /// The session said so.
    #[error("the session of the metadata store ended")]
    Done,
    /// The store said so.
    #[error("the lease is gone from the metadata store")]
    Gone,
    /// The lease lives, but not what says who has it.
    #[error("the registration of this node is gone from the metadata store")]
    Unregistered,
}

impl Lost {
    /// Stable code with which the process ends.
    #[must_use]
    pub const fn code(self) -> &'static str {
        heartbeatpb::codes::CAPTURE_SUICIDE
    }
}

/// What changes for whoever writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Nothing may be written until further notice: by the clock another node could take over soon.
    Suspended,
    /// Writing may go on: nobody has taken over.
    Resumed {
        /// For how long it was suspended.
        after: Duration,
    },
    /// Nothing may be written ever again.
    Lost(Lost),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Trusted,
    Suspended {
        since: Instant,
        /// The registration was seen since then.
        registered: bool,
    },
    Lost(Lost),
}

/// The verdict on one session.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Watchdog {
    ttl: Duration,
    /// The lease lives at least until its time to live after this.
    confirmed: Instant,
    state: State,
}

impl Watchdog {
    /// A session whose lease of `ttl` was asked for at `asked`.
    #[must_use]
    pub fn new(ttl: Duration, asked: Instant) -> Self {
        Self { ttl, confirmed: asked, state: State::Trusted }
    }

    /// Longest time to wait for an answer about the lease.
    #[must_use]
    pub fn answer_limit(&self) -> Duration {
        PERIOD.min(self.ttl / 3)
    }

    /// When writing ends unless the lease is confirmed again, and [`Watchdog::on_time`] has to be called at the latest.
    #[must_use]
    pub fn deadline(&self) -> Instant {
        let margin = LEAST_MARGIN.max(self.ttl / 5);
        self.confirmed + self.ttl.saturating_sub(margin)
    }

    /// The moment at which the newest question was asked by whose answer the lease lives.
    #[must_use]
    pub fn confirmed(&self) -> Instant {
        self.confirmed
    }

    /// Whether something may be written now.
    #[must_use]
    pub fn may_write(&self, now: Instant) -> bool {
        self.state == State::Trusted && now < self.deadline()
    }

    /// Since when nothing may be written although nothing is lost.
    #[must_use]
    pub fn suspended_since(&self) -> Option<Instant> {
        match self.state {
            State::Suspended { since, .. } => Some(since),
            State::Trusted | State::Lost(_) => None,
        }
    }

    /// Whether the store is to be asked for the registration of this process.
    #[must_use]
    pub fn wants_registration(&self) -> bool {
        matches!(self.state, State::Suspended { registered: false, .. })
    }

    /// The store renewed the lease in answer to a question sent at `asked`. Whoever learns only now that the one before
    /// was too long ago is suspended now: a process that was stopped hears of its renewal before it looks at the clock.
    pub fn on_confirmed(&mut self, asked: Instant) -> Option<Verdict> {
        let lapsed = self.deadline();
        self.confirmed = self.confirmed.max(asked);
        if self.state == State::Trusted && asked >= lapsed { self.suspend(lapsed) } else { None }
    }

    /// The store was asked at `asked` for the registration of this process, and has it under the lease or not.
    pub fn on_registration(&mut self, asked: Instant, found: bool) -> Option<Verdict> {
        if !found {
            return self.lose(Lost::Unregistered);
        }
        if let State::Suspended { since, registered } = &mut self.state {
            *registered |= asked >= *since;
        }
        None
    }

    /// The store said that the lease is gone. Returns the verdict the first time there is one.
    pub fn on_gone(&mut self) -> Option<Verdict> {
        self.lose(Lost::Gone)
    }

    /// The session ended.
    pub fn on_done(&mut self) -> Option<Verdict> {
        self.lose(Lost::Done)
    }

    /// Time passes, whether the store answers or not.
    pub fn on_time(&mut self, now: Instant) -> Option<Verdict> {
        let deadline = self.deadline();
        match self.state {
            State::Trusted if now >= deadline => self.suspend(deadline),
            State::Suspended { since, registered: true } if now < deadline => {
                self.state = State::Trusted;
                Some(Verdict::Resumed { after: now.saturating_duration_since(since) })
            }
            State::Trusted | State::Suspended { .. } | State::Lost(_) => None,
        }
    }

    /// Why nothing may be written ever again, if so.
    #[must_use]
    pub fn lost(&self) -> Option<Lost> {
        match self.state {
            State::Lost(why) => Some(why),
            State::Trusted | State::Suspended { .. } => None,
        }
    }

    fn suspend(&mut self, since: Instant) -> Option<Verdict> {
        self.state = State::Suspended { since, registered: false };
        Some(Verdict::Suspended)
    }

    fn lose(&mut self, why: Lost) -> Option<Verdict> {
        if matches!(self.state, State::Lost(_)) {
            return None;
        }
        self.state = State::Lost(why);
        Some(Verdict::Lost(why))
    }
}

/// When something happened by a clock that goes on while the machine sleeps, of what is known by one that stops.
///
/// An answer that comes after a sleep may be to a question from before it. A question is dated as if it had been asked
/// before the last sleep, unless it was asked after somebody has noticed that sleep: too early at worst, never too late.
#[derive(Clone, Debug)]
pub struct SleepLog {
    /// How long the machine had slept when the questions were asked that are dated now.
    slept: Duration,
    /// How long it has slept by now.
    total: Duration,
    /// By the clock that stops: when the last sleep was noticed.
    noticed: Instant,
}

/// Two clocks that are read one after the other differ by this without a sleep.
const JITTER: Duration = Duration::from_millis(1);

impl SleepLog {
    /// The machine has slept for `slept` by now.
    #[must_use]
    pub fn new(slept: Duration, now: Instant) -> Self {
        Self { slept, total: slept, noticed: now }
    }

    /// The machine has slept for `slept` by now, by the clock that stops.
    pub fn on_look(&mut self, slept: Duration, now: Instant) {
        if slept > self.total + JITTER {
            (self.total, self.noticed) = (slept, now);
        }
    }

    /// By the clock that goes on, when a question was asked at the latest possible moment that is safe to assume.
    pub fn date(&mut self, asked: Instant) -> Instant {
        if asked >= self.noticed {
            self.slept = self.total;
        }
        asked + self.slept
    }
}

#[cfg(test)]
mod tests;
