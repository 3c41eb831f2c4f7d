//! A store to which nothing is written while this process may not write.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use heartbeatpb::WritePermit;

use super::{
    KeyValue, Leadership, LeaseId, Revision, Session, Snapshot, Store, StoreError, Txn, TxnOutcome, Watch,
};

/// How long a transaction waits for the permit. An election of the store's own leader is over by then; whoever wrote
/// tries again.
const PATIENCE: Duration = Duration::from_secs(5);

/// Another store, whose transactions wait for a permit. Reads go on, and so do leases and elections: what is written
/// under a lease that is gone is refused by the store itself.
pub struct PermittedStore {
    inner: Arc<dyn Store>,
    permit: WritePermit,
}

impl std::fmt::Debug for PermittedStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PermittedStore").field("permit", &self.permit).finish_non_exhaustive()
    }
}

impl PermittedStore {
    /// The store, written to only while `permit` holds.
    #[must_use]
    pub fn new(inner: Arc<dyn Store>, permit: WritePermit) -> Self {
        Self { inner, permit }
    }
}

#[async_trait]
impl Store for PermittedStore {
    async fn get(&self, key: &str) -> Result<Snapshot<Option<KeyValue>>, StoreError> {
        self.inner.get(key).await
    }

    async fn get_many(&self, keys: &[String]) -> Result<Vec<Option<KeyValue>>, StoreError> {
        self.inner.get_many(keys).await
    }

    async fn scan(&self, prefix: &str) -> Result<Snapshot<Vec<KeyValue>>, StoreError> {
        self.inner.scan(prefix).await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        if tokio::time::timeout(PATIENCE, self.permit.granted()).await.is_err() {
            let why = "writing is suspended: the store has not confirmed the lease of this node";
            return Err(StoreError::Unavailable(why.to_owned()));
        }
        self.inner.txn(txn).await
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        self.inner.grant(ttl).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.inner.keep_alive(lease).await
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.inner.revoke(lease).await
    }

    async fn time_to_live(&self, lease: LeaseId) -> Result<Option<Duration>, StoreError> {
        self.inner.time_to_live(lease).await
    }

    async fn session(&self, ttl: Duration) -> Result<Session, StoreError> {
        self.inner.session(ttl).await
    }

    async fn campaign(&self, prefix: &str, lease: LeaseId, value: &str) -> Result<Leadership, StoreError> {
        self.inner.campaign(prefix, lease, value).await
    }

    async fn resign(&self, prefix: &str, lease: LeaseId) -> Result<(), StoreError> {
        self.inner.resign(prefix, lease).await
    }

    async fn leader(&self, prefix: &str) -> Result<Option<KeyValue>, StoreError> {
        self.inner.leader(prefix).await
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<Box<dyn Watch>, StoreError> {
        self.inner.watch(prefix, from).await
    }

    async fn identity(&self) -> Result<u64, StoreError> {
        self.inner.identity().await
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::super::Op;
    use super::super::memory::{Disk, open};
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_write_waits_for_the_permit_or_says_that_it_was_not_made() {
        let time = Arc::new(AtomicU64::new(0));
        let clock = Arc::clone(&time);
        let permit = WritePermit::new(move || clock.load(Ordering::SeqCst));
        let inner: Arc<dyn Store> = Arc::new(open(&Disk::new()).unwrap());
        let store = Arc::new(PermittedStore::new(Arc::clone(&inner), permit.clone()));
        let put = |value: &str| Txn { then: vec![Op::put("k", value.into())], ..Txn::default() };
        let error = store.txn(put("1")).await.unwrap_err();
        assert!(error.is_retryable() && !error.may_have_applied(), "{error:?}");
        assert!(error.to_string().contains("writing is suspended"), "{error}");
        assert!(store.get("k").await.unwrap().found.is_none(), "it can still be read");
        let waiting = {
            let (store, txn) = (Arc::clone(&store), put("2"));
            tokio::spawn(async move { store.txn(txn).await })
        };
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(inner.get("k").await.unwrap().found.is_none());
        permit.hold_until(10);
        assert!(waiting.await.unwrap().unwrap().succeeded);
        assert_eq!(inner.get("k").await.unwrap().found.unwrap().value, b"2");
        time.store(10, Ordering::SeqCst);
        assert!(store.txn(put("3")).await.is_err(), "it ended by the clock");
    }
}
