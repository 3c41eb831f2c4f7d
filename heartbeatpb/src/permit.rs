//! Whether this process may write now: a deadline that moves, and that whoever is about to write looks at.
//!
//! ```text
//!   who watches over the lease ── holds until t ──► WritePermit ◄── holds? ── a sink, before it begins and commits
//!                                                     │   ▲
//!                                       granted again │   └── now: a clock that goes on while the machine sleeps
//!                                                     ▼
//!                                              whoever waits goes on
//! ```
//!
//! It ends by the clock and by nobody's word: a process that was stopped finds it ended when it wakes, before anything
//! else of it has run. What follows a look takes time: whoever gives the permit ends it early enough for a write that
//! was allowed to arrive. A copy is the same permit.

use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

/// Time since some beginning, in microseconds, also of times at which the machine sleeps.
type Clock = Box<dyn Fn() -> u64 + Send + Sync>;

/// The right of a process to write in the name of the cluster. Cloned, it is the same right.
#[derive(Clone)]
pub struct WritePermit(Option<Arc<Shared>>);

struct Shared {
    clock: Clock,
    /// By the clock; 0 when it does not hold.
    until: AtomicU64,
    waiting: Mutex<Vec<Waker>>,
}

impl std::fmt::Debug for WritePermit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WritePermit").field("holds", &self.holds()).finish()
    }
}

impl Default for WritePermit {
    /// See [`WritePermit::always`].
    fn default() -> Self {
        Self::always()
    }
}

impl WritePermit {
    /// Of a process that shares its right with nobody.
    #[must_use]
    pub const fn always() -> Self {
        Self(None)
    }

    /// A right that does not hold yet, by a clock in microseconds that never goes back.
    #[must_use]
    pub fn new(clock: impl Fn() -> u64 + Send + Sync + 'static) -> Self {
        let shared = Shared { clock: Box::new(clock), until: AtomicU64::new(0), waiting: Mutex::default() };
        Self(Some(Arc::new(shared)))
    }

    /// Whether a write may begin, or be completed, now. Cheap: a look at the clock.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.0.as_ref().is_none_or(|shared| shared.holds())
    }

    /// From now on it holds until this moment of the clock, be it later or earlier than before.
    pub fn hold_until(&self, micros: u64) {
        let Some(shared) = &self.0 else { return };
        shared.until.store(micros, Ordering::Release);
        if shared.holds() {
            let waiting = std::mem::take(&mut *shared.waiting());
            waiting.into_iter().for_each(Waker::wake);
        }
    }

    /// Waits until it holds. It may have ended again when whoever waited runs: look before the effect.
    #[must_use]
    pub fn granted(&self) -> Granted<'_> {
        Granted(self)
    }
}

impl Shared {
    fn holds(&self) -> bool {
        (self.clock)() < self.until.load(Ordering::Acquire)
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, Vec<Waker>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends when a permit holds.
#[derive(Debug)]
pub struct Granted<'p>(&'p WritePermit);

impl Future for Granted<'_> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Some(shared) = &self.0.0 else { return Poll::Ready(()) };
        if shared.holds() {
            return Poll::Ready(());
        }
        {
            // One entry for each task: who is asked again and again is not remembered twice.
            let mut waiting = shared.waiting();
            if !waiting.iter().any(|known| known.will_wake(cx.waker())) {
                waiting.push(cx.waker().clone());
            }
        }
        // It may have been granted between the look and the entry.
        if shared.holds() { Poll::Ready(()) } else { Poll::Pending }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::task::Wake;

    use super::*;

    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn permit() -> (Arc<AtomicU64>, WritePermit) {
        let time = Arc::new(AtomicU64::new(0));
        let clock = Arc::clone(&time);
        (time, WritePermit::new(move || clock.load(Ordering::SeqCst)))
    }

    #[test]
    fn it_ends_by_the_clock_without_anybody_saying_so() {
        let (time, permit) = permit();
        assert!(!permit.holds(), "nobody has given it yet");
        let copy = permit.clone();
        permit.hold_until(100);
        assert!(copy.holds());
        time.store(99, Ordering::SeqCst);
        assert!(copy.holds());
        time.store(100, Ordering::SeqCst);
        assert!(!copy.holds());
        permit.hold_until(200);
        assert!(copy.holds());
        permit.hold_until(0);
        assert!(!copy.holds(), "it can be taken back");
        assert!(WritePermit::always().holds());
    }

    #[test]
    fn who_waits_is_woken_once_it_is_granted_and_not_before() {
        let (time, permit) = permit();
        time.store(50, Ordering::SeqCst);
        let count = Arc::new(Count(AtomicUsize::new(0)));
        let waker = Waker::from(Arc::clone(&count));
        let mut cx = Context::from_waker(&waker);
        let mut granted = permit.granted();
        for _ in 0..3 {
            assert!(Pin::new(&mut granted).poll(&mut cx).is_pending());
        }
        permit.hold_until(40);
        assert_eq!(count.0.load(Ordering::SeqCst), 0, "that is over already");
        permit.hold_until(60);
        assert_eq!(count.0.load(Ordering::SeqCst), 1, "one task, one call");
        assert!(Pin::new(&mut granted).poll(&mut cx).is_ready());
        permit.hold_until(70);
        assert_eq!(count.0.load(Ordering::SeqCst), 1);
        time.store(90, Ordering::SeqCst);
        assert!(Pin::new(&mut permit.granted()).poll(&mut cx).is_pending(), "it ended again");
    }
}
