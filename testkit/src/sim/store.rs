//! One node's way to the metadata store: slow, sometimes cut off, sometimes without an answer.

use std::time::Duration;

use async_trait::async_trait;
use coordinator::backend::{
    Confirmations, KeyValue, Leadership, LeaseId, LocalStore, Revision, Session, Snapshot, Store, StoreError,
    Txn, TxnOutcome, Watch,
};
use heartbeatpb::NodeId;
use tokio_util::sync::CancellationToken;

use super::world::Shared;

/// What a node holds of the store.
pub(super) struct NodeStore {
    pub(super) inner: LocalStore,
    pub(super) node: NodeId,
    pub(super) world: Shared,
    /// Raised when the node's lease cannot be relied on.
    pub(super) done: CancellationToken,
    pub(super) lease: LeaseId,
    /// Chance in percent that the answer to a write is lost.
    pub(super) uncertain: u64,
}

impl NodeStore {
    async fn travel(&self) -> Result<(), StoreError> {
        let (latency, reaches) = {
            let mut world = self.world.lock();
            (world.random.between(1, 20), world.store_answers(&self.node))
        };
        tokio::time::sleep(Duration::from_millis(latency)).await;
        if !reaches {
            tokio::time::sleep(Duration::from_millis(300)).await;
            return Err(StoreError::Unavailable("no connection".to_owned()));
        }
        Ok(())
    }
}

#[async_trait]
impl Store for NodeStore {
    async fn get(&self, key: &str) -> Result<Snapshot<Option<KeyValue>>, StoreError> {
        self.travel().await?;
        self.inner.get(key).await
    }

    async fn scan(&self, prefix: &str) -> Result<Snapshot<Vec<KeyValue>>, StoreError> {
        self.travel().await?;
        self.inner.scan(prefix).await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        self.travel().await?;
        let outcome = self.inner.txn(txn).await;
        let lost = self.world.lock().chance(self.uncertain);
        if lost && outcome.is_ok() {
            return Err(StoreError::Uncertain("the answer was lost".to_owned()));
        }
        self.travel().await.map_err(|_| StoreError::Uncertain("the answer was lost".to_owned()))?;
        outcome
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        self.travel().await?;
        self.inner.grant(ttl).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.travel().await?;
        self.inner.keep_alive(lease).await
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.travel().await?;
        self.inner.revoke(lease).await
    }

    async fn time_to_live(&self, lease: LeaseId) -> Result<Option<Duration>, StoreError> {
        self.travel().await?;
        self.inner.time_to_live(lease).await
    }

    async fn session(&self, _ttl: Duration) -> Result<Session, StoreError> {
        Ok(Session { lease: self.lease, done: self.done.clone(), confirmed: Confirmations::always() })
    }

    async fn campaign(&self, prefix: &str, lease: LeaseId, value: &str) -> Result<Leadership, StoreError> {
        self.travel().await?;
        let won = self.inner.campaign(prefix, lease, value).await?;
        self.travel().await?;
        Ok(won)
    }

    async fn resign(&self, prefix: &str, lease: LeaseId) -> Result<(), StoreError> {
        self.travel().await?;
        self.inner.resign(prefix, lease).await
    }

    async fn leader(&self, prefix: &str) -> Result<Option<KeyValue>, StoreError> {
        self.travel().await?;
        self.inner.leader(prefix).await
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<Box<dyn Watch>, StoreError> {
        self.travel().await?;
        self.inner.watch(prefix, from).await
    }

    async fn identity(&self) -> Result<u64, StoreError> {
        self.inner.identity().await
    }
}
