//! A lease that is kept alive, and the times at which the store confirmed it.

use std::time::Instant;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::LeaseId;

/// A lease that is kept alive until it is revoked, until the store is let go of, or until `done` is raised.
#[derive(Clone, Debug)]
pub struct Session {
    /// The lease.
    pub lease: LeaseId,
    /// Raised when the lease is gone for good: it was revoked, the store gave it up, or the store is broken. Who holds a
    /// role under it must stop. A store that is silent raises nothing: who writes looks at `confirmed`.
    pub done: CancellationToken,
    /// When the store confirmed it last: what a [`crate::watchdog::Watchdog`] is fed with.
    pub confirmed: Confirmations,
}

/// When a lease was confirmed last.
///
/// A confirmation counts from the moment at which its question was *sent*: the store renewed the lease at that moment
/// or later, so the lease lives at least for its time to live after it.
#[derive(Clone, Debug)]
pub struct Confirmations {
    told: Option<watch::Receiver<Instant>>,
}

impl Confirmations {
    /// Of a lease that lasts as long as this process holds its store: it is confirmed at any time.
    #[must_use]
    pub fn always() -> Self {
        Self { told: None }
    }

    /// Of a lease that was asked for at `asked` and that has to be confirmed again and again through the sender.
    #[must_use]
    pub fn since(asked: Instant) -> (watch::Sender<Instant>, Self) {
        let (sender, told) = watch::channel(asked);
        (sender, Self { told: Some(told) })
    }

    /// When the question was sent that the store answered last; `now` for a lease that needs no answers.
    #[must_use]
    pub fn last(&self, now: Instant) -> Instant {
        self.told.as_ref().map_or(now, |told| *told.borrow())
    }

    /// Waits until [`Confirmations::last`] has moved since it was looked at here; forever when that will not happen.
    pub async fn changed(&mut self) {
        if let Some(told) = &mut self.told
            && told.changed().await.is_ok()
        {
            return;
        }
        std::future::pending().await
    }
}
