//! The embedded store: an image in memory in front of a journal that makes every change durable first.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use heartbeatpb::Gid;
use parking_lot::{Mutex, RwLock};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::image::{Change, Image};
use super::{
    Compare, Confirmations, KeyValue, Leadership, LeaseId, Op, Revision, Session, Snapshot, Store,
    StoreError, Txn, TxnOutcome, Watch, WatchEvent, candidate_key,
};

/// Where changes become durable.
pub(super) trait Journal: Send + 'static {
    /// Makes a change durable; it is not visible to anyone before this returns.
    fn append(&mut self, change: &Change) -> Result<(), String>;

    /// Whether [`Journal::append`] waits for a disk.
    fn blocks(&self) -> bool;
}

/// A store inside this process; see [`super::redb::open`] and [`super::memory`].
///
/// One process owns the store, so leases last as long as the process and an election is won at once unless
/// somebody in the same process is leading. When the journal fails, the store is broken for good: every
/// session's `done` is raised, because nobody can say any more what a successor would read.
#[derive(Clone)]
pub struct LocalStore {
    shared: Arc<Shared>,
}

struct Shared {
    image: RwLock<Image>,
    journal: Mutex<Box<dyn Journal>>,
    blocks: bool,
    /// Wakes watches and candidates, in the order in which they began to wait: the same history is the same every time.
    committed: Notify,
    broken: CancellationToken,
    /// What ends with a lease.
    sessions: Mutex<BTreeMap<LeaseId, CancellationToken>>,
    identity: u64,
}

impl std::fmt::Debug for LocalStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LocalStore")
            .field("revision", &self.shared.image.read().revision)
            .finish_non_exhaustive()
    }
}

impl LocalStore {
    /// Takes over stored content. Keys that were attached to leases of an earlier process are deleted before
    /// anyone can see them.
    pub(super) fn start(image: Image, identity: u64, journal: Box<dyn Journal>) -> Result<Self, StoreError> {
        let blocks = journal.blocks();
        let shared = Shared {
            image: RwLock::new(image),
            journal: Mutex::new(journal),
            blocks,
            committed: Notify::new(),
            broken: CancellationToken::new(),
            sessions: Mutex::default(),
            identity,
        };
        shared.commit(|image| image.expire(|_| true))?;
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Runs a change to its end even if the caller goes away: a change that is durable but not visible
    /// would contradict the next one.
    async fn write<T: Send + 'static>(
        &self,
        job: impl FnOnce(&Shared) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        if !self.shared.blocks {
            return job(&self.shared);
        }
        let shared = Arc::clone(&self.shared);
        tokio::task::spawn_blocking(move || job(&shared))
            .await
            .map_err(|_| StoreError::Broken("a write did not finish".to_owned()))?
    }

    fn usable(&self) -> Result<(), StoreError> {
        self.shared.usable()
    }
}

impl Shared {
    fn usable(&self) -> Result<(), StoreError> {
        if self.broken.is_cancelled() {
            return Err(StoreError::Broken("an earlier write failed".to_owned()));
        }
        Ok(())
    }

    /// Decides on the current image, makes the decision durable, then visible.
    fn commit(&self, decide: impl FnOnce(&Image) -> Option<Change>) -> Result<Revision, StoreError> {
        let mut journal = self.journal.lock();
        self.usable()?;
        // Nobody else writes while the journal is held, so the image cannot move under the decision.
        let Some(change) = decide(&self.image.read()) else { return Ok(self.image.read().revision) };
        if let Err(what) = journal.append(&change) {
            self.broken.cancel();
            return Err(StoreError::Broken(what));
        }
        let revision = change.revision;
        self.image.write().apply(change);
        self.committed.notify_waiters();
        Ok(revision)
    }
}

#[async_trait]
impl Store for LocalStore {
    async fn get(&self, key: &str) -> Result<Snapshot<Option<KeyValue>>, StoreError> {
        self.usable()?;
        let image = self.shared.image.read();
        Ok(Snapshot { found: image.get(key).cloned(), revision: image.revision })
    }

    async fn scan(&self, prefix: &str) -> Result<Snapshot<Vec<KeyValue>>, StoreError> {
        self.usable()?;
        let image = self.shared.image.read();
        Ok(Snapshot { found: image.scan(prefix).cloned().collect(), revision: image.revision })
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        txn.check()?;
        self.write(move |shared| {
            let mut succeeded = false;
            let mut lease_gone = false;
            let revision = shared.commit(|image| {
                let (holds, change) = image.evaluate(&txn);
                succeeded = holds;
                let put = change.as_ref().map_or(&[][..], |change| &change.puts);
                lease_gone = put.iter().filter_map(|kv| kv.lease).any(|lease| !image.has_lease(lease));
                if lease_gone { None } else { change }
            })?;
            if lease_gone { Err(StoreError::LeaseGone) } else { Ok(TxnOutcome { succeeded, revision }) }
        })
        .await
    }

    async fn grant(&self, _ttl: Duration) -> Result<LeaseId, StoreError> {
        self.usable()?;
        // Random, so that a lease of this process is never mistaken for one of an earlier process.
        let lease = LeaseId((Gid::random().high >> 1).max(1));
        self.shared.image.write().add_lease(lease);
        Ok(lease)
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.usable()?;
        if self.shared.image.read().has_lease(lease) { Ok(()) } else { Err(StoreError::LeaseGone) }
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.write(move |shared| {
            shared.commit(|image| image.expire(|held| held == lease))?;
            shared.image.write().drop_lease(lease);
            if let Some(done) = shared.sessions.lock().remove(&lease) {
                done.cancel();
            }
            Ok(())
        })
        .await
    }

    async fn time_to_live(&self, lease: LeaseId) -> Result<Option<Duration>, StoreError> {
        self.usable()?;
        Ok(self.shared.image.read().has_lease(lease).then_some(Duration::MAX))
    }

    async fn session(&self, ttl: Duration) -> Result<Session, StoreError> {
        let lease = self.grant(ttl).await?;
        let done = self.shared.broken.child_token();
        self.shared.sessions.lock().insert(lease, done.clone());
        Ok(Session { lease, done, confirmed: Confirmations::always() })
    }

    async fn campaign(&self, prefix: &str, lease: LeaseId, value: &str) -> Result<Leadership, StoreError> {
        let key = candidate_key(prefix, lease);
        self.txn(Txn {
            when: vec![Compare::Absent { key: key.clone() }],
            then: vec![Op::Put { key: key.clone(), value: value.as_bytes().to_vec(), lease: Some(lease) }],
            or_else: Vec::new(),
        })
        .await?;
        loop {
            let mut committed = pin!(self.shared.committed.notified());
            committed.as_mut().enable();
            let own = self.get(&key).await?.found.ok_or(StoreError::LeaseGone)?;
            if self.leader(prefix).await?.is_some_and(|leader| leader.key == key) {
                return Ok(Leadership { key, revision: own.mod_revision });
            }
            tokio::select! {
                biased;
                () = committed => {}
                () = self.shared.broken.cancelled() => return Err(StoreError::Broken("a write failed".to_owned())),
            }
        }
    }

    async fn resign(&self, prefix: &str, lease: LeaseId) -> Result<(), StoreError> {
        let key = candidate_key(prefix, lease);
        self.txn(Txn { then: vec![Op::delete(key)], ..Txn::default() }).await.map(|_| ())
    }

    async fn leader(&self, prefix: &str) -> Result<Option<KeyValue>, StoreError> {
        let candidates = self.scan(&format!("{prefix}/")).await?.found;
        Ok(candidates.into_iter().min_by_key(|kv| kv.create_revision))
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<Box<dyn Watch>, StoreError> {
        self.usable()?;
        Ok(Box::new(LocalWatch {
            shared: Arc::clone(&self.shared),
            prefix: prefix.to_owned(),
            seen: from.saturating_sub(1),
        }))
    }

    async fn identity(&self) -> Result<u64, StoreError> {
        Ok(self.shared.identity)
    }
}

/// Reads the image's history behind a cursor, so a slow reader costs no memory.
struct LocalWatch {
    shared: Arc<Shared>,
    prefix: String,
    seen: Revision,
}

#[async_trait]
impl Watch for LocalWatch {
    async fn next(&mut self) -> Result<Vec<WatchEvent>, StoreError> {
        loop {
            let mut committed = pin!(self.shared.committed.notified());
            committed.as_mut().enable();
            self.shared.usable()?;
            {
                let image = self.shared.image.read();
                let events = image.changes_after(&self.prefix, self.seen).ok_or(StoreError::Compacted)?;
                // A watch that starts in the future must not see the changes before its start.
                self.seen = self.seen.max(image.revision);
                if !events.is_empty() {
                    return Ok(events);
                }
            }
            tokio::select! {
                biased;
                () = committed => {}
                () = self.shared.broken.cancelled() => {}
            }
        }
    }

    fn progress(&self) -> Revision {
        self.seen
    }
}
