//! One node's way to the metadata store: slow, sometimes cut off, sometimes without an answer. Its lease is kept alive
//! over the same way.

use std::time::{Duration, Instant};

use async_trait::async_trait;
use coordinator::backend::{
    Confirmations, KeyValue, Leadership, LeaseId, LocalStore, Revision, Session, Snapshot, Store, StoreError,
    Txn, TxnOutcome, Watch, WatchEvent,
};
use heartbeatpb::NodeId;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::world::Shared;

/// A lease that could not be renewed is tried again after this time.
const AGAIN: Duration = Duration::from_millis(100);

/// What a node holds of the store.
#[derive(Clone)]
pub(super) struct NodeStore {
    pub(super) inner: LocalStore,
    pub(super) node: NodeId,
    pub(super) world: Shared,
    /// Chance in percent that the answer to a write is lost.
    pub(super) uncertain: u64,
}

impl NodeStore {
    async fn travel(&self) -> Result<(), StoreError> {
        self.cross(false).await
    }

    /// One way. The connection that renews leases is another one: it breaks with the network, not with requests.
    async fn cross(&self, renewal: bool) -> Result<(), StoreError> {
        let (latency, reaches) = {
            let mut world = self.world.lock();
            let latency = world.random.between(1, 20);
            let reaches =
                if renewal { world.reaches_store(&self.node) } else { world.store_answers(&self.node) };
            (latency, reaches)
        };
        tokio::time::sleep(Duration::from_millis(latency)).await;
        if !reaches {
            tokio::time::sleep(Duration::from_millis(300)).await;
            return Err(StoreError::Unavailable("no connection".to_owned()));
        }
        Ok(())
    }

    /// Keeps a lease alive until the store says that it is gone.
    async fn keep(
        self,
        lease: LeaseId,
        ttl: Duration,
        confirmed: watch::Sender<Instant>,
        done: CancellationToken,
    ) {
        loop {
            tokio::time::sleep(ttl / 6).await;
            let asked = self.world.lock().clock();
            match self.keep_alive(lease).await {
                Ok(()) => drop(confirmed.send_replace(asked)),
                Err(StoreError::LeaseGone) => return done.cancel(),
                Err(_) => tokio::time::sleep(AGAIN).await,
            }
        }
    }
}

/// Changes, as they reach a node.
struct NodeWatch {
    inner: Box<dyn Watch>,
    store: NodeStore,
}

#[async_trait]
impl Watch for NodeWatch {
    async fn next(&mut self) -> Result<Vec<WatchEvent>, StoreError> {
        let events = self.inner.next().await?;
        self.store.travel().await?;
        Ok(events)
    }

    fn progress(&self) -> Revision {
        self.inner.progress()
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
        let lease = self.inner.grant(ttl).await?;
        self.world.lock().renew(lease, true);
        self.travel().await?;
        Ok(lease)
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.cross(true).await?;
        self.inner.keep_alive(lease).await?;
        self.world.lock().renew(lease, false);
        self.cross(true).await
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.travel().await?;
        self.inner.revoke(lease).await?;
        self.world.lock().leases.remove(&lease);
        self.travel().await
    }

    async fn time_to_live(&self, lease: LeaseId) -> Result<Option<Duration>, StoreError> {
        self.travel().await?;
        self.inner.time_to_live(lease).await
    }

    async fn session(&self, ttl: Duration) -> Result<Session, StoreError> {
        let asked = self.world.lock().clock();
        let lease = self.grant(ttl).await?;
        let done = CancellationToken::new();
        let (sender, confirmed) = Confirmations::since(asked);
        tokio::spawn(self.clone().keep(lease, ttl, sender, done.clone()));
        Ok(Session { lease, done, confirmed })
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
        let inner = self.inner.watch(prefix, from).await?;
        Ok(Box::new(NodeWatch { inner, store: self.clone() }))
    }

    async fn identity(&self) -> Result<u64, StoreError> {
        self.inner.identity().await
    }
}
