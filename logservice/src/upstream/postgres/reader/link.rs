//! The connection of a stream: what is told on it regularly, also while something else is waited for.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Instant;

use heartbeatpb::Ts;
use tokio::sync::watch;
use tokio::time::{Interval, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::super::bounds::Bounds;
use super::super::conn::Connection;
use super::{STATUS_EVERY, Session};
use crate::Error;
use crate::upstream::{ReaderPhase, ReaderProgress};

/// The connection and what must be said on it regularly.
pub(super) struct Link {
    pub(super) conn: Connection,
    pub(super) ticker: Interval,
    pub(super) last_status: Instant,
    /// Newest position seen.
    pub(super) received: u64,
    persisted: watch::Receiver<Ts>,
    pub(super) bounds: Arc<parking_lot::Mutex<Bounds>>,
    progress: Arc<ReaderProgress>,
    /// The connection broke while the store was waited for.
    pub(super) broken: Option<Error>,
}

impl Link {
    pub(super) fn new(conn: Connection, session: &Session) -> Self {
        let mut ticker = tokio::time::interval(STATUS_EVERY);
        ticker.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            conn,
            ticker,
            last_status: Instant::now(),
            received: session.resolved.0,
            persisted: session.persisted.clone(),
            bounds: Arc::clone(&session.bounds),
            progress: Arc::clone(&session.progress),
            broken: None,
        }
    }

    /// Tells the server what has been received, and what is persisted and need not be kept.
    pub(super) async fn send_status(&mut self, ask: bool) -> Result<(), Error> {
        self.last_status = Instant::now();
        let persisted = self.persisted.borrow_and_update().0.min(self.received);
        // Zero: nothing new is said about what need not be kept.
        let confirmed = self.bounds.lock().confirm(persisted).unwrap_or_default();
        self.conn.send_status(self.received, confirmed, ask).await?;
        self.progress.confirmed.fetch_max(confirmed, Ordering::Relaxed);
        self.progress.received.store(self.received, Ordering::Relaxed);
        Ok(())
    }

    /// Waits for the store while keeping the connection alive. `None`: told to stop. If the connection breaks
    /// meanwhile, the work is finished all the same, so that its effect is known; the error is kept for later.
    pub(super) async fn hold<F>(&mut self, work: F, shutdown: &CancellationToken) -> Result<Option<()>, Error>
    where
        F: Future<Output = Result<(), Error>>,
    {
        let mut work = pin!(work);
        let first = std::future::poll_fn(|cx| Poll::Ready(work.as_mut().poll(cx))).await;
        if let Poll::Ready(result) = first {
            return result.map(Some);
        }
        self.progress.set_phase(ReaderPhase::WaitingForRoom);
        let done = self.alive_during(work, shutdown).await;
        if !matches!(done, Ok(None)) {
            self.progress.set_phase(ReaderPhase::Streaming);
        }
        done
    }

    /// As [`Link::hold`], for what is not the store's room.
    pub(super) async fn alive_during<F>(
        &mut self,
        work: F,
        shutdown: &CancellationToken,
    ) -> Result<Option<()>, Error>
    where
        F: Future<Output = Result<(), Error>>,
    {
        let mut work = pin!(work);
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return Ok(None),
                result = work.as_mut() => return result.map(Some),
                _ = self.ticker.tick(), if self.broken.is_none() => {
                    self.broken = self.send_status(false).await.err();
                }
            }
        }
    }
}
