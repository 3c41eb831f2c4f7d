//! A target that does not answer: who looks for it, who is woken when it is back, and what people are told.
//!
//! ```text
//!   an attempt fails ──► one task is the scout: it tries again after a second at most
//!                        the others wait for it, or for a pause that grows
//!   an attempt succeeds ──► everybody is woken, nothing is told any more
//!   ten seconds without one ──► told as the sink's trouble until then; the sink goes on trying
//! ```

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::connection::Backoff;
use crate::Error;

/// A target that does not answer for so long is told. A restart of the server is over by then.
const TOLD_AFTER: Duration = Duration::from_secs(10);
/// The longest pause of the scout: what a target that comes back waits for at most. One attempt a second of one connection is
/// nothing to a server that starts.
const SCOUT_PAUSE: Duration = Duration::from_secs(1);

/// The failures since the last success.
#[derive(Debug)]
struct Series {
    since: Instant,
    /// What is told: the failure that made the series long enough, so that one absence is told in one way.
    told: Option<String>,
}

/// Whether the target answers, as all tasks of a sink have seen it.
#[derive(Debug, Default)]
pub(crate) struct Absence {
    /// Whether there is a series: what every success looks at.
    failing: AtomicBool,
    series: Mutex<Option<Series>>,
    /// An attempt has succeeded.
    back: Notify,
    /// Held by the scout while it waits.
    scout: tokio::sync::Mutex<()>,
}

impl Absence {
    /// An attempt failed because the target did not answer, or has no room for us now. Says whether it is the first.
    pub(crate) fn failed(&self, error: &Error) -> bool {
        let mut series = self.series.lock();
        let first = series.is_none();
        let series = series.get_or_insert_with(|| Series { since: Instant::now(), told: None });
        self.failing.store(true, Ordering::Release);
        if series.told.is_none() && series.since.elapsed() >= TOLD_AFTER {
            series.told = Some(format!("{error}; it is tried again until it succeeds"));
        }
        first
    }

    /// An attempt succeeded.
    pub(crate) fn answered(&self) {
        if self.failing.load(Ordering::Acquire) {
            let mut series = self.series.lock();
            self.failing.store(false, Ordering::Release);
            *series = None;
            self.back.notify_waiters();
        }
    }

    /// What people are told.
    pub(crate) fn trouble(&self) -> Option<Error> {
        if !self.failing.load(Ordering::Acquire) {
            return None;
        }
        let what = self.series.lock().as_ref()?.told.clone()?;
        Some(Error::Unavailable { what, source: None })
    }

    /// Waits before the next attempt; `Err` when `closing` happens first.
    pub(crate) async fn pause(
        &self,
        backoff: &mut Backoff,
        closing: &CancellationToken,
    ) -> Result<(), Error> {
        let pause = backoff.advance();
        let back = self.back.notified();
        tokio::pin!(back);
        back.as_mut().enable();
        let scout = self.scout.try_lock();
        // Somebody may have succeeded since this attempt failed: nobody will say so again.
        let missed = !self.failing.load(Ordering::Acquire);
        let pause = if scout.is_ok() || missed { pause.min(SCOUT_PAUSE) } else { pause };
        tokio::select! {
            biased;
            () = closing.cancelled() => Err(Error::Closed),
            () = back => Ok(()),
            () = tokio::time::sleep(pause) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn refused() -> Error {
        Error::Unavailable { what: "connection refused".into(), source: None }
    }

    #[tokio::test(start_paused = true)]
    async fn a_success_between_a_failure_and_its_pause_is_not_missed() {
        let (absence, closing) = (Absence::default(), CancellationToken::new());
        let mut backoff = Backoff::new();
        (0..20).for_each(|_| {
            backoff.advance();
        });
        absence.failed(&refused());
        absence.answered();
        // Another one looks for the target meanwhile, and will have nothing to tell.
        let _scout = absence.scout.lock().await;
        let begun = tokio::time::Instant::now();
        absence.pause(&mut backoff, &closing).await.expect("it goes on");
        assert!(begun.elapsed() <= SCOUT_PAUSE, "{:?}", begun.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn one_looks_every_second_and_the_others_are_woken_when_it_has_succeeded() {
        let (absence, closing) = (Arc::new(Absence::default()), CancellationToken::new());
        let patient = || {
            let mut backoff = Backoff::new();
            // As after many failures.
            (0..20).for_each(|_| {
                backoff.advance();
            });
            backoff
        };
        assert!(absence.failed(&refused()));
        let begun = tokio::time::Instant::now();
        let other = {
            let (absence, closing) = (Arc::clone(&absence), closing.clone());
            let mut backoff = patient();
            async move {
                // Second to come.
                tokio::task::yield_now().await;
                absence.pause(&mut backoff, &closing).await.map(|()| tokio::time::Instant::now())
            }
        };
        let other = tokio::spawn(other);
        let mut backoff = patient();
        for _ in 0..3 {
            let before = tokio::time::Instant::now();
            assert!(absence.pause(&mut backoff, &closing).await.is_ok());
            assert!(before.elapsed() <= SCOUT_PAUSE + Duration::from_millis(5));
            assert!(!absence.failed(&refused()), "told once");
        }
        assert!(!other.is_finished(), "it leaves looking to the scout");
        absence.answered();
        let woken = other.await.expect("it does not panic").expect("it was not closed");
        assert!(woken - begun < Duration::from_secs(4), "{:?}", woken - begun);
    }

    #[tokio::test(start_paused = true)]
    async fn a_closing_sink_waits_for_nobody() {
        let (absence, closing) = (Absence::default(), CancellationToken::new());
        closing.cancel();
        let result = absence.pause(&mut Backoff::new(), &closing).await;
        assert!(matches!(result, Err(Error::Closed)));
    }

    #[test]
    fn an_absence_is_told_when_it_has_lasted_and_in_one_way() {
        let absence = Absence::default();
        absence.failed(&refused());
        assert!(absence.trouble().is_none(), "a restart is over soon");
        let long_ago = Instant::now().checked_sub(TOLD_AFTER);
        if let (Some(series), Some(since)) = (absence.series.lock().as_mut(), long_ago) {
            series.since = since;
        }
        absence.failed(&refused());
        absence.failed(&Error::Unavailable { what: "starting up".into(), source: None });
        let told = absence.trouble().map(|error| error.to_string()).unwrap_or_default();
        assert!(told.contains("connection refused") && told.contains("again"), "{told}");
        absence.answered();
        assert!(absence.trouble().is_none());
        absence.failed(&refused());
        assert!(absence.trouble().is_none(), "a new one");
    }
}
