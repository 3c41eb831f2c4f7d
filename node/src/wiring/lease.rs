//! The shell around the watchdog: asks whether this process may still write, and closes everything when it may not.
//!
//! A thread of its own looks at the clock, so that neither a busy runtime nor a store that does not answer delays the
//! verdict. Its clock goes on while the machine sleeps: a process that was stopped, or a virtual machine that was
//! saved, finds its lease old when it wakes. Whoever is about to write asks [`Lease::holds`], which is up to date even
//! before the thread has woken too.
//!
//! ```text
//!   store --- renewals, when they were asked for ---> thread --+-- until ---> Lease::holds <--- every write
//!     ^                                                 ^      |
//!     +--- time to live? every second, not for long --> gone   +-- lost, once ---> fence
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use coordinator::backend::{Session, Store};
use coordinator::watchdog::{Lost, PERIOD, Watchdog};
use tokio_util::sync::CancellationToken;

/// Between two looks at the clock: a fraction of the watchdog's margin.
const LOOK: Duration = Duration::from_millis(50);

/// Until when this process may write.
pub(crate) struct Lease {
    clock: Clock,
    /// Microseconds on the clock since its beginning.
    until: AtomicU64,
    /// Somebody was told that it does not hold, and has left something undone: there is no way back from it.
    refused: AtomicBool,
}

impl Lease {
    /// Before there is a session: nothing may be written.
    pub(super) fn new() -> Self {
        Self { clock: Clock::new(), until: AtomicU64::new(0), refused: AtomicBool::new(false) }
    }

    /// Whether nobody else can have taken over yet. Once it was said that it does not hold, the process ends: what was
    /// left out by then is done by others.
    pub(crate) fn holds(&self) -> bool {
        let until = self.until.load(Ordering::Acquire);
        let holds = self.clock.elapsed_micros() < until;
        if !holds && until > 0 {
            self.refused.store(true, Ordering::Release);
        }
        holds
    }

    fn extend(&self, until: Option<Instant>) {
        let micros = until.map_or(u64::MAX, |until| self.clock.micros_of(until));
        self.until.store(micros, Ordering::Release);
    }

    fn end(&self) {
        self.until.store(0, Ordering::Release);
    }
}

/// A clock that does not stop while the machine sleeps, in the terms of one that does.
struct Clock {
    born: Instant,
    uptime: Duration,
}

impl Clock {
    fn new() -> Self {
        Self { born: Instant::now(), uptime: uptime() }
    }

    fn elapsed(&self) -> Duration {
        uptime().saturating_sub(self.uptime)
    }

    fn elapsed_micros(&self) -> u64 {
        micros(self.elapsed())
    }

    /// Now.
    fn now(&self) -> Instant {
        self.born + self.elapsed()
    }

    /// How long the machine has slept so far.
    fn slept(&self) -> Duration {
        self.now().saturating_duration_since(Instant::now())
    }

    fn micros_of(&self, at: Instant) -> u64 {
        micros(at.saturating_duration_since(self.born))
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Time since the machine started, with the time for which it slept.
#[cfg(target_os = "linux")]
fn uptime() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let (seconds, nanos) = (u64::try_from(time.tv_sec), u32::try_from(time.tv_nsec));
    Duration::new(seconds.unwrap_or(0), nanos.unwrap_or(0))
}

/// Time since the first call.
#[cfg(not(target_os = "linux"))]
fn uptime() -> Duration {
    static BORN: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    BORN.get_or_init(Instant::now).elapsed()
}

/// Watches over a session. Dropping it ends the watch without a verdict.
pub(super) struct Guard {
    stop: CancellationToken,
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
        let gone = Arc::new(AtomicBool::new(false));
        let dog = Watchdog::new(ttl, asked);
        // A lease that lasts as long as its process needs no confirmations.
        let later = asked + ttl;
        let lasting = session.confirmed.last(later) == later;
        lease.extend((!lasting).then(|| dog.deadline()));
        tokio::spawn(ask(store, session.clone(), dog.answer_limit(), Arc::clone(&gone), stop.clone()));
        let slept = lease.clock.slept();
        let watch = Watch { dog, session, lasting, gone, stop: stop.clone(), lease, slept };
        std::thread::Builder::new()
            .name("lease".to_owned())
            .spawn(move || watch.run(fence))
            .context("cannot start the thread that watches over the lease")?;
        Ok(Self { stop })
    }
}

/// Asks the store for the lease's time to live, until it says that there is no lease.
async fn ask(
    store: Arc<dyn Store>,
    session: Session,
    limit: Duration,
    gone: Arc<AtomicBool>,
    stop: CancellationToken,
) {
    let mut pace = tokio::time::interval(PERIOD);
    pace.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let asking = async {
        loop {
            pace.tick().await;
            match tokio::time::timeout(limit, store.time_to_live(session.lease)).await {
                Ok(Ok(None)) => return gone.store(true, Ordering::Release),
                Ok(Ok(Some(_))) => {}
                Ok(Err(error)) => tracing::debug!(%error, "the store does not tell how the lease is"),
                Err(_) => tracing::debug!("the store does not answer how the lease is"),
            }
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = asking => {}
    }
}

/// The thread.
struct Watch {
    dog: Watchdog,
    session: Session,
    lasting: bool,
    gone: Arc<AtomicBool>,
    stop: CancellationToken,
    lease: Arc<Lease>,
    /// How long the machine had slept when the lease was last seen confirmed. A confirmation may have been asked for
    /// before a sleep that was noticed only now, so it is dated with the time before.
    slept: Duration,
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
            let pause = if self.lasting { LOOK } else { left.clamp(Duration::from_millis(1), LOOK) };
            std::thread::sleep(pause);
        };
        self.lease.end();
        // A stop that came meanwhile has ended the session itself.
        if !self.stop.is_cancelled() {
            fence(lost);
        }
    }

    fn look(&mut self, last: &mut Option<Instant>) -> Option<Lost> {
        if self.session.done.is_cancelled() {
            return self.dog.on_done();
        }
        if self.gone.load(Ordering::Acquire) {
            return self.dog.on_gone();
        }
        if self.lasting {
            return None;
        }
        if self.lease.refused.load(Ordering::Acquire) {
            return self.dog.on_time(self.dog.deadline());
        }
        let asked = self.session.confirmed.last(Instant::now());
        if *last != Some(asked) {
            *last = Some(asked);
            self.dog.on_confirmed(asked + self.slept);
            self.slept = self.lease.clock.slept();
        }
        let lost = self.dog.on_time(self.lease.clock.now());
        if lost.is_none() {
            self.lease.extend(Some(self.dog.deadline()));
        }
        lost
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use coordinator::backend::memory::{Disk, open};
    use coordinator::backend::{Confirmations, LeaseId};

    use super::*;

    fn guarded(
        ttl: Duration,
        confirmed: Confirmations,
    ) -> (Session, Arc<Lease>, mpsc::Receiver<Lost>, Guard) {
        let store: Arc<dyn Store> = Arc::new(open(&Disk::new()).unwrap());
        let session = Session { lease: LeaseId(1), done: CancellationToken::new(), confirmed };
        let lease = Arc::new(Lease::new());
        let (told, verdict) = mpsc::channel();
        let fence = move |lost| told.send(lost).unwrap();
        let now = Instant::now();
        let guard = Guard::start(store, session.clone(), (ttl, now), Arc::clone(&lease), fence).unwrap();
        (session, lease, verdict, guard)
    }

    #[tokio::test(flavor = "multi_thread")]
    // behaviour: coordinator-ST-20
    async fn a_lease_that_nobody_confirms_ends_a_second_early_by_the_clock() {
        let ttl = Duration::from_secs(3);
        let began = Instant::now();
        let (renewals, confirmed) = Confirmations::since(began);
        // The store says that it is there: only confirmations count.
        let store: Arc<dyn Store> = Arc::new(open(&Disk::new()).unwrap());
        let granted = store.grant(ttl).await.unwrap();
        let session = Session { lease: granted, done: CancellationToken::new(), confirmed };
        let lease = Arc::new(Lease::new());
        assert!(!lease.holds(), "nothing is written without a session");
        let (told, verdict) = mpsc::channel();
        let fence = move |lost| told.send(lost).unwrap();
        let _guard = Guard::start(store, session, (ttl, began), Arc::clone(&lease), fence).unwrap();
        assert!(lease.holds());
        tokio::time::sleep(Duration::from_millis(300)).await;
        let last = Instant::now();
        renewals.send_replace(last);
        let lost = verdict.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!(lost, Lost::Silent);
        let after = last.elapsed();
        assert!(after >= Duration::from_secs(2) && after < Duration::from_secs(3), "{after:?}");
        assert!(!lease.holds());
    }

    #[tokio::test(flavor = "multi_thread")]
    // behaviour: coordinator-ST-9
    async fn the_end_of_the_session_and_the_end_of_the_lease_are_both_heard_of() {
        let (session, lease, verdict, _guard) = guarded(Duration::from_secs(60), Confirmations::always());
        session.done.cancel();
        let first = verdict.recv_timeout(Duration::from_secs(10)).unwrap();
        assert!(!lease.holds());
        // The store knows no lease of this number.
        let (_session, lease, verdict, _other) = guarded(Duration::from_secs(60), Confirmations::always());
        let second = verdict.recv_timeout(Duration::from_secs(10)).unwrap();
        assert!(matches!(first, Lost::Done | Lost::Gone) && second == Lost::Gone && !lease.holds());
        assert!(verdict.recv_timeout(Duration::from_millis(200)).is_err(), "it is told once");
    }

    #[test]
    fn the_clock_goes_forward_and_knows_no_sleep_that_was_none() {
        let clock = Clock::new();
        std::thread::sleep(Duration::from_millis(20));
        assert!(clock.elapsed() >= Duration::from_millis(20));
        assert!(clock.slept() < Duration::from_millis(500), "{:?}", clock.slept());
    }
}
