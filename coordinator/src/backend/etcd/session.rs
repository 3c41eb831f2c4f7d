//! Keeps leases alive.
//!
//! ```text
//!   granted --> renewed every sixth of the time to live, at the current endpoint
//!                 |   no answer within 0.2 s: another endpoint is asked as well, and the first answer counts
//!                 v
//!               done: the cluster does not know the lease any more, it was revoked, or the store is broken
//! ```
//!
//! A cluster that does not answer has not given the lease up, and a new leader of it begins every lease anew: so it is
//! asked for as long as it takes. Who must not write meanwhile is told by the times of the confirmations
//! ([`crate::watchdog`]).
//!
//! A renewal is a call of its own and not a message on a stream: streams hang with the member that serves them. It
//! does not go through etcd's log, so it costs little.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::failure::{self, Failure};
use super::pool::{Endpoint, Pool};
use crate::backend::{LeaseId, StoreError};

/// Another endpoint is asked when the first one has not answered for this time.
const HEDGE: Duration = Duration::from_millis(200);
/// All are asked anew when none has answered for this time: a member passes a renewal on to the leader, and the one
/// that was asked while the leader died goes on waiting for the dead one.
const ROUND: Duration = Duration::from_millis(600);
/// Between failed renewals.
const RETRY: Duration = Duration::from_millis(100);
/// Renewals come at least this often: it is also how a frozen member is noticed.
const LONGEST_PERIOD: Duration = Duration::from_secs(2);

/// What the cluster says about a lease.
enum Renewal {
    /// It lives; the question was sent at this time.
    Lives {
        asked: Instant,
    },
    Gone,
}

/// Keeps a lease alive until `done`, which this raises when the lease can no longer be relied on.
pub(super) async fn keep(
    pool: Arc<Pool>,
    lease: LeaseId,
    ttl: Duration,
    confirmed: watch::Sender<Instant>,
    done: CancellationToken,
    closed: CancellationToken,
) {
    let period = (ttl / 6).min(LONGEST_PERIOD);
    let mut next = *confirmed.borrow() + period;
    let mut failing = false;
    loop {
        let renewal = tokio::select! {
            biased;
            // Revoked here, or nobody holds the store any more.
            () = done.cancelled() => return,
            () = closed.cancelled() => return,
            () = pool.broken.cancelled() => {
                done.cancel();
                return;
            }
            renewal = async {
                tokio::time::sleep_until(next.into()).await;
                renew(&pool, lease, ROUND).await
            } => renewal,
        };
        match renewal {
            Ok(Renewal::Lives { asked }) => {
                if std::mem::take(&mut failing) {
                    tracing::info!(lease = lease.0, "the lease is renewed again");
                }
                confirmed.send_if_modified(|last| {
                    let newer = asked > *last;
                    *last = asked.max(*last);
                    newer
                });
                next = asked + period;
            }
            Ok(Renewal::Gone) => {
                tracing::error!(lease = lease.0, "the metadata store gave up the lease");
                done.cancel();
                return;
            }
            Err(error) => {
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(lease = lease.0, %error, "the lease could not be renewed; trying again");
                }
                next = Instant::now() + RETRY;
            }
        }
    }
}

/// Renews a lease once.
///
/// # Errors
/// [`StoreError::LeaseGone`], or when nobody answers within the time.
pub(super) async fn keep_alive(pool: &Arc<Pool>, lease: LeaseId) -> Result<(), StoreError> {
    let deadline = Instant::now() + pool.config.call_limit;
    loop {
        match renew(pool, lease, ROUND).await {
            Ok(Renewal::Lives { .. }) => return Ok(()),
            Ok(Renewal::Gone) => return Err(StoreError::LeaseGone),
            Err(error) if error.is_retryable() && Instant::now() < deadline => {
                tokio::time::sleep(RETRY).await
            }
            Err(error) => return Err(error),
        }
    }
}

/// Asks one endpoint after the other, without waiting long for any of them, and takes the first answer.
async fn renew(pool: &Arc<Pool>, lease: LeaseId, limit: Duration) -> Result<Renewal, StoreError> {
    let deadline = tokio::time::Instant::now() + limit;
    let mut waiting = pool.rotation().into_iter();
    let mut asked: Vec<Arc<Endpoint>> = Vec::new();
    let mut attempts = JoinSet::new();
    let mut last = None;
    let mut ask_next = true;
    loop {
        if std::mem::take(&mut ask_next)
            && let Some(endpoint) = waiting.next()
        {
            asked.push(Arc::clone(&endpoint));
            let pool = Arc::clone(pool);
            attempts.spawn(async move {
                let renewal = renew_at(&pool, &endpoint, lease).await;
                (endpoint, renewal)
            });
        }
        tokio::select! {
            biased;
            answer = attempts.join_next() => match answer {
                Some(Ok((endpoint, Ok(renewal)))) => {
                    for slower in asked.iter().take_while(|slower| !Arc::ptr_eq(slower, &endpoint)) {
                        slower.found_silent();
                    }
                    pool.prefer(&endpoint);
                    return Ok(renewal);
                }
                Some(Ok((endpoint, Err(failure)))) => {
                    if let Failure::Stranger(_) = &failure {
                        endpoint.forget_token().await;
                    }
                    last = Some(failure);
                    ask_next = true;
                    if attempts.is_empty() && waiting.len() == 0 {
                        break;
                    }
                }
                Some(Err(_)) => ask_next = true,
                None => break,
            },
            () = tokio::time::sleep(HEDGE), if waiting.len() > 0 => ask_next = true,
            () = tokio::time::sleep_until(deadline) => break,
        }
    }
    let last = last.unwrap_or_else(|| failure::silent(&pool.current().url, limit));
    Err(last.of_question())
}

async fn renew_at(pool: &Pool, endpoint: &Endpoint, lease: LeaseId) -> Result<Renewal, Failure> {
    let id = i64::try_from(lease.0).map_err(|_| Failure::Final(StoreError::LeaseGone))?;
    let client = endpoint.client(pool).await?;
    let asked = Instant::now();
    let answer = client.keep_alive(id).await.map_err(|status| Failure::of(&endpoint.url, &status))?;
    // "Not found" is believed only of our own cluster.
    pool.check(endpoint, answer.header, None)?;
    if answer.ttl > 0 { Ok(Renewal::Lives { asked }) } else { Ok(Renewal::Gone) }
}
