//! The shell around the watchdog: asks whether this process may write, holds everything back while that is not certain,
//! and closes everything when it is over.
//!
//! A thread of its own looks at the clock, so that neither a busy runtime nor a store that does not answer delays the
//! verdict. Its clock goes on while the machine sleeps: a process that was stopped, or a virtual machine that was
//! saved, finds its lease old when it wakes. Whoever is about to write looks at [`Lease::permit`], which is up to date
//! even before the thread has woken too.
//!
//! ```text
//!   store --- renewals, when they were asked for ---> thread --+-- until ---> permit <--- every write
//!     ^                                                 ^      +-- suspended, resumed: log, status
//!     |                                                 |      +-- lost, once ---> fence
//!     +--- time to live? every second, not for long ----+
//!     +--- registered? while suspended -----------------+
//! ```

mod clock;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use coordinator::backend::{LeaseId, Session, Store};
use coordinator::watchdog::{Lost, PERIOD, SleepLog, Verdict, Watchdog};
use heartbeatpb::WritePermit;
use metrics::{Gauge, gauge};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use self::clock::Clock;

/// Between two looks at the clock: a fraction of the watchdog's margin.
const LOOK: Duration = Duration::from_millis(50);
/// Between two questions for the registration while writing is suspended.
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// Until when this process may write, as the rest of it sees it.
pub(crate) struct Lease {
    clock: Clock,
    permit: WritePermit,
    /// While writing is suspended: when the lease was confirmed last, in microseconds of the clock. [`NOT_SUSPENDED`]
    /// otherwise.
    suspended: AtomicU64,
}

const NOT_SUSPENDED: u64 = u64::MAX;

impl Lease {
    /// Before there is a session: nothing may be written.
    pub(crate) fn new() -> Self {
        let clock = Clock::new();
        let permit = WritePermit::new(move || clock.micros());
        Self { clock, permit, suspended: AtomicU64::new(NOT_SUSPENDED) }
    }

    /// What everything that writes looks at before it does.
    pub(crate) fn permit(&self) -> &WritePermit {
        &self.permit
    }

    /// While writing is suspended: for how long the lease has not been confirmed.
    pub(crate) fn suspended(&self) -> Option<Duration> {
        let since = self.suspended.load(Ordering::Acquire);
        (since != NOT_SUSPENDED).then(|| Duration::from_micros(self.clock.micros().saturating_sub(since)))
    }

    /// The same in words, for people.
    pub(crate) fn trouble(&self) -> Option<String> {
        let time = self.suspended()?;
        Some(format!("suspended: lease not confirmed for {:.1} s", time.as_secs_f64()))
    }

    /// It holds until then; for ever without a limit.
    fn hold_until(&self, until: Option<Instant>) {
        self.permit.hold_until(until.map_or(u64::MAX, |until| self.clock.micros_of(until)));
    }

    fn end(&self) {
        self.permit.hold_until(0);
    }

    /// The permit has ended by the clock. After a stop that was slept through it would hold again by the renewal that
    /// came first.
    fn suspend(&self) {
        self.end();
        tracing::warn!("the metadata store does not confirm the lease of this node; writing is suspended");
    }

    fn resume(&self, after: Duration) {
        self.suspended.store(NOT_SUSPENDED, Ordering::Release);
        tracing::warn!(seconds = after.as_secs_f64(), "the lease of this node is confirmed; writing goes on");
    }
}

/// What is asked of the store beside renewals, and what it said.
#[derive(Default)]
struct Questions {
    /// The key of this node's registration, once it was written.
    key: Mutex<Option<String>>,
    /// Rung when the registration is wanted.
    wanted: Notify,
    answers: Mutex<Answers>,
}

/// What the store said and the thread has not looked at.
#[derive(Default)]
struct Answers {
    gone: bool,
    /// When it was asked, and whether the registration is there.
    registered: Option<(Instant, bool)>,
}

/// Watches over a session. Dropping it ends the watch without a verdict.
pub(super) struct Guard {
    stop: CancellationToken,
    questions: Arc<Questions>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Guard {
    /// Watches over a session of `ttl` that was asked for at `asked`, and calls `fence` from another thread when it is
    /// lost.
    ///
    /// # Errors
    /// When there can be no further thread.
    pub(super) fn start(
        store: Arc<dyn Store>,
        session: Session,
        (ttl, asked): (Duration, Instant),
        lease: Arc<Lease>,
        fence: impl FnOnce(Lost) + Send + 'static,
    ) -> anyhow::Result<Self> {
        let stop = CancellationToken::new();
        let questions = Arc::new(Questions::default());
        let slept = lease.clock.slept();
        let dog = Watchdog::new(ttl, asked + slept);
        // A lease that lasts as long as its process needs no confirmations.
        let later = asked + ttl;
        let lasting = session.confirmed.last(later) == later;
        lease.hold_until((!lasting).then(|| dog.deadline()));
        let limit = dog.answer_limit();
        let asks = Asks {
            store,
            lease: session.lease,
            limit,
            clock: lease.clock,
            questions: Arc::clone(&questions),
        };
        let stopped = stop.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = stopped.cancelled() => {}
                () = asks.until_gone() => {}
                () = asks.registration() => {}
            }
        });
        let watch = Watch {
            dog,
            session,
            lasting,
            questions: Arc::clone(&questions),
            stop: stop.clone(),
            remaining: (!lasting).then(|| gauge!(crate::metrics::LEASE_REMAINING)),
            sleeps: SleepLog::new(slept, Instant::now()),
            lease,
        };
        std::thread::Builder::new()
            .name("lease".to_owned())
            .spawn(move || watch.run(fence))
            .context("cannot start the thread that watches over the lease")?;
        Ok(Self { stop, questions })
    }

    /// This node is registered under this key: from now on it has to be there, for writing to go on after a suspension.
    pub(super) fn on_registered(&self, key: &str) {
        *self.questions.key.lock() = Some(key.to_owned());
    }
}

/// Asks the store what renewals do not tell.
struct Asks {
    store: Arc<dyn Store>,
    lease: LeaseId,
    /// Of one answer.
    limit: Duration,
    clock: Clock,
    questions: Arc<Questions>,
}

impl Asks {
    /// Asks for the lease's time to live until the store says that there is no lease.
    async fn until_gone(&self) {
        let mut pace = tokio::time::interval(PERIOD);
        pace.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            pace.tick().await;
            match tokio::time::timeout(self.limit, self.store.time_to_live(self.lease)).await {
                Ok(Ok(None)) => break,
                Ok(Ok(Some(_))) => {}
                Ok(Err(error)) => tracing::debug!(%error, "the store does not tell how the lease is"),
                Err(_) => tracing::debug!("the store does not answer how the lease is"),
            }
        }
        self.questions.answers.lock().gone = true;
    }

    /// Asks for the registration whenever it is wanted, for ever.
    async fn registration(&self) {
        loop {
            self.questions.wanted.notified().await;
            let key = self.questions.key.lock().clone();
            let asked = self.clock.now();
            // Before there is a registration nobody knows this node, and none is to be there.
            let Some(key) = key else {
                self.questions.answers.lock().registered = Some((asked, true));
                continue;
            };
            match tokio::time::timeout(self.limit, self.store.get(&key)).await {
                Ok(Ok(found)) => {
                    let ours = found.found.is_some_and(|kv| kv.lease == Some(self.lease));
                    self.questions.answers.lock().registered = Some((asked, ours));
                }
                Ok(Err(error)) => {
                    tracing::debug!(%error, "the store does not tell whether this node is registered")
                }
                Err(_) => tracing::debug!("the store does not answer whether this node is registered"),
            }
            tokio::time::sleep(ASK_AGAIN).await;
        }
    }
}

/// The thread.
struct Watch {
    dog: Watchdog,
    session: Session,
    lasting: bool,
    questions: Arc<Questions>,
    stop: CancellationToken,
    lease: Arc<Lease>,
    /// None where the lease lasts.
    remaining: Option<Gauge>,
    sleeps: SleepLog,
}

impl Watch {
    fn run(mut self, fence: impl FnOnce(Lost)) {
        let mut last = None;
        let lost = loop {
            if self.stop.is_cancelled() {
                return;
            }
            if let Some(lost) = self.look(&mut last) {
                break lost;
            }
            let left = self.dog.deadline().saturating_duration_since(self.lease.clock.now());
            if let Some(gauge) = &self.remaining {
                gauge.set(left.as_secs_f64());
            }
            let sooner = !self.lasting && self.dog.suspended_since().is_none();
            std::thread::sleep(if sooner { left.clamp(Duration::from_millis(1), LOOK) } else { LOOK });
        };
        self.lease.end();
        if let Some(gauge) = &self.remaining {
            gauge.set(0.0);
        }
        // A stop that came meanwhile has ended the session itself.
        if !self.stop.is_cancelled() {
            fence(lost);
        }
    }

    /// One look at everything. Answers why it is over, when it is.
    fn look(&mut self, last: &mut Option<Instant>) -> Option<Lost> {
        let answers = std::mem::take(&mut *self.questions.answers.lock());
        let mut lost = None;
        let mut hear = |verdict: Option<Verdict>, lease: &Lease| match verdict {
            None => {}
            Some(Verdict::Suspended) => lease.suspend(),
            Some(Verdict::Resumed { after }) => lease.resume(after),
            Some(Verdict::Lost(why)) => lost = Some(why),
        };
        if self.session.done.is_cancelled() {
            hear(self.dog.on_done(), &self.lease);
        }
        if answers.gone {
            hear(self.dog.on_gone(), &self.lease);
        }
        if !self.lasting {
            self.sleeps.on_look(self.lease.clock.slept(), Instant::now());
            let asked = self.session.confirmed.last(Instant::now());
            if *last != Some(asked) {
                *last = Some(asked);
                let asked = self.sleeps.date(asked);
                hear(self.dog.on_confirmed(asked), &self.lease);
            }
            if let Some((asked, found)) = answers.registered {
                hear(self.dog.on_registration(asked, found), &self.lease);
            }
            hear(self.dog.on_time(self.lease.clock.now()), &self.lease);
            if self.dog.wants_registration() {
                self.questions.wanted.notify_one();
            }
            if self.dog.suspended_since().is_some() {
                let confirmed = self.lease.clock.micros_of(self.dog.confirmed());
                self.lease.suspended.store(confirmed, Ordering::Release);
            }
            if self.dog.may_write(self.lease.clock.now()) {
                self.lease.hold_until(Some(self.dog.deadline()));
            }
        }
        lost
    }
}

#[cfg(test)]
mod tests;
