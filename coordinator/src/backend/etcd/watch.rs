//! Follows the changes under a prefix over the deaths of connections and members, without gaps or repetitions.
//!
//! A task of its own reads, so that [`Watch::next`] may be dropped at any time; it waits while its reader is behind.
//!
//! ```text
//!   opening --- created ---> following --- silent for 10 s, stream ended, member found silent ---> opening
//!      |                        |                                   (from the revision after the last one seen)
//!      +--- compacted, refused -+---> told to the reader, over
//! ```
//!
//! Notices of progress that we ask for count as a sign of life only: etcd before 3.4.25 and 3.5.8 may send one with a
//! revision whose changes are still on their way, and who resumes behind it has lost them. The rare ones that the
//! server sends by itself are in order, and move the place to resume from.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;

use super::Keys;
use super::failure::Failure;
use super::pool::{Endpoint, Pool};
use super::wire::{
    Event, OneWatchRequest, WatchCreateRequest, WatchProgressRequest, WatchRequest, WatchResponse, range_of,
};
use crate::backend::{Revision, StoreError, Watch, WatchEvent};

/// A notice of progress is asked for this often.
const PROGRESS_PERIOD: Duration = Duration::from_secs(1);
/// A stream on which nothing arrives for this long is opened anew.
const SILENCE: Duration = Duration::from_secs(10);
/// Between attempts to open a stream when all endpoints failed.
const REOPEN: Duration = Duration::from_millis(500);
/// Longest that opening a stream at one endpoint may take.
const OPEN_LIMIT: Duration = Duration::from_secs(3);
/// Batches that wait for a slow reader; beyond them etcd keeps the changes.
const BATCHES: usize = 16;

/// Changes up to and including a revision.
struct Batch {
    events: Vec<WatchEvent>,
    upto: Revision,
}

pub(super) struct EtcdWatch {
    batches: mpsc::Receiver<Result<Batch, StoreError>>,
    seen: Revision,
}

#[async_trait]
impl Watch for EtcdWatch {
    async fn next(&mut self) -> Result<Vec<WatchEvent>, StoreError> {
        while let Some(batch) = self.batches.recv().await {
            let batch = batch?;
            self.seen = self.seen.max(batch.upto);
            if !batch.events.is_empty() {
                return Ok(batch.events);
            }
        }
        Err(StoreError::Invalid("the watch has ended"))
    }

    fn progress(&self) -> Revision {
        self.seen
    }
}

/// Follows changes under `prefix` at `from` or later.
pub(super) fn follow(
    pool: Arc<Pool>,
    keys: Keys,
    prefix: String,
    from: Revision,
    closed: CancellationToken,
) -> EtcdWatch {
    let (sender, batches) = mpsc::channel(BATCHES);
    // Revisions begin at one; zero would mean "from now on".
    let seen = from.saturating_sub(1);
    let follower = Follower { pool, keys, prefix, seen, out: sender.clone() };
    let broken = Arc::clone(&follower.pool);
    tokio::spawn(async move {
        let end = tokio::select! {
            biased;
            () = closed.cancelled() => StoreError::Unavailable("the store was closed".to_owned()),
            () = sender.closed() => return,
            () = broken.broken.cancelled() => StoreError::Broken("an earlier call found out why".to_owned()),
            error = follower.run() => error,
        };
        // The reader may be gone by now.
        let _ = sender.send(Err(end)).await;
    });
    EtcdWatch { batches, seen }
}

struct Follower {
    pool: Arc<Pool>,
    keys: Keys,
    prefix: String,
    seen: Revision,
    out: mpsc::Sender<Result<Batch, StoreError>>,
}

impl Follower {
    /// Follows until something happens that only the reader can deal with.
    async fn run(mut self) -> StoreError {
        let mut failures = 0_usize;
        loop {
            if let Err(error) = self.pool.usable() {
                return error;
            }
            let endpoint = self.pool.current();
            let before = self.seen;
            let failure = match self.follow_at(&endpoint).await {
                Failure::Final(error) => return error,
                Failure::Stranger(what) => {
                    endpoint.forget_token().await;
                    what
                }
                Failure::NotTaken(what) | Failure::Lost(what) => what,
            };
            tracing::debug!(endpoint = endpoint.url, failure, "a watch is opened anew");
            self.pool.leave(&endpoint);
            failures = if self.seen > before { 1 } else { failures + 1 };
            if failures.is_multiple_of(self.pool.endpoints().len().max(1)) {
                tokio::time::sleep(REOPEN).await;
            }
        }
    }

    /// Opens a stream at an endpoint and passes on what arrives, until it ends.
    async fn follow_at(&mut self, endpoint: &Arc<Endpoint>) -> Failure {
        let lost = |what: &str| Failure::Lost(format!("{}: {what}", endpoint.url));
        let mut silence = endpoint.silence();
        let opened = tokio::time::timeout(OPEN_LIMIT, Box::pin(self.open(endpoint))).await;
        let (requests, mut stream) = match opened {
            Ok(Ok(stream)) => stream,
            Ok(Err(failure)) => return failure,
            Err(_) => return lost("the watch could not be opened in time"),
        };
        let mut heard = Instant::now();
        let mut pace = tokio::time::interval(PROGRESS_PERIOD);
        pace.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let message = tokio::select! {
                biased;
                message = stream.message() => message,
                _ = silence.changed() => return lost("the member does not answer"),
                _ = pace.tick() => {
                    if heard.elapsed() >= SILENCE {
                        return lost("nothing was heard for 10 s");
                    }
                    let progress = OneWatchRequest::Progress(WatchProgressRequest {});
                    // Full: the member does not read any more, which the silence will tell.
                    let _ = requests.try_send(WatchRequest { request: Some(progress) });
                    continue;
                }
            };
            let response = match message {
                Ok(Some(response)) => response,
                Ok(None) => return lost("the stream ended"),
                Err(status) => return Failure::of(&endpoint.url, &status),
            };
            if let Err(failure) = self.on_response(endpoint, &response).await {
                return failure;
            }
            // A reader that was slow is no sign of a dead stream.
            heard = Instant::now();
        }
    }

    async fn open(
        &self,
        endpoint: &Arc<Endpoint>,
    ) -> Result<(mpsc::Sender<WatchRequest>, Streaming<WatchResponse>), Failure> {
        let client = endpoint.client(&self.pool).await?;
        let (key, range_end) = range_of(&self.keys.full(&self.prefix));
        let start_revision = i64::try_from(self.seen.saturating_add(1)).unwrap_or(i64::MAX);
        let create = WatchCreateRequest { key, range_end, start_revision, progress_notify: true };
        client.watch(create).await.map_err(|status| Failure::of(&endpoint.url, &status))
    }

    async fn on_response(&mut self, endpoint: &Endpoint, response: &WatchResponse) -> Result<(), Failure> {
        self.pool.check(endpoint, response.header, None)?;
        if response.compact_revision > 0 {
            return Err(Failure::Final(StoreError::Compacted));
        }
        if response.canceled {
            let reason = &response.cancel_reason;
            return Err(if reason.contains("permission denied") {
                Failure::Final(StoreError::Refused(format!(
                    "{}: {reason}; give the user read permission on the store's prefix",
                    endpoint.url
                )))
            } else if reason.contains("has been compacted") {
                Failure::Final(StoreError::Compacted)
            } else {
                Failure::Lost(format!("{}: the watch was ended: {reason}", endpoint.url))
            });
        }
        let events: Vec<WatchEvent> = response
            .events
            .iter()
            .filter_map(|event| self.event(event))
            .filter(|event| event.revision() > self.seen)
            .collect();
        if let Some(last) = events.last() {
            self.seen = last.revision();
            return self.pass_on(Batch { upto: self.seen, events }).await;
        }
        // Only what the server says of this very watch is in order with its changes.
        let of_this_watch = !response.created && response.watch_id >= 0;
        let upto = response.header.and_then(|head| u64::try_from(head.revision).ok()).unwrap_or_default();
        if of_this_watch && response.events.is_empty() && upto > self.seen {
            self.seen = upto;
            return self.pass_on(Batch { events, upto }).await;
        }
        Ok(())
    }

    async fn pass_on(&self, batch: Batch) -> Result<(), Failure> {
        let gone = || Failure::Final(StoreError::Invalid("nobody reads the watch"));
        let room = tokio::time::timeout(SILENCE, self.out.reserve()).await;
        let room = match room {
            Ok(room) => room,
            Err(_) => {
                tracing::warn!(
                    prefix = self.prefix,
                    "whoever reads a watch of the metadata store is far behind"
                );
                self.out.reserve().await
            }
        };
        room.map_err(|_| gone())?.send(Ok(batch));
        Ok(())
    }

    fn event(&self, event: &Event) -> Option<WatchEvent> {
        let kv = self.keys.read(event.kv.as_ref()?)?;
        match event.kind {
            0 => Some(WatchEvent::Put(kv)),
            1 => Some(WatchEvent::Delete { key: kv.key, revision: kv.mod_revision }),
            _ => None,
        }
    }
}
