//! How a process joins the cluster and leaves it: a lease, and the project's [`Registration`] under it.

use std::sync::Arc;
use std::time::Duration;

use coordinator::Layout;
use coordinator::backend::{LeaseId, Revision, Session, Store, StoreError};
use coordinator::membership::{NodeInfo, Registration};
use heartbeatpb::NodeId;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::store::NodeStore;

/// Between two attempts at a store that does not answer.
const AGAIN: Duration = Duration::from_millis(200);
/// Time to live of a process's lease.
pub(super) const LEASE: Duration = Duration::from_secs(3);
/// A registration that disappeared is waited for so long.
pub(super) const DELAY: Duration = Duration::from_millis(500);
/// A member that is not heard for so many milliseconds is given up: what a node does unless it is configured otherwise.
pub(super) const UNREACHED_AFTER: u64 = 3_000;

/// A process's place in the cluster.
#[derive(Clone)]
pub(super) struct Entry {
    pub(super) store: NodeStore,
    layout: Layout,
    registration: Arc<Mutex<Option<Registration>>>,
}

impl Entry {
    /// A process that has not joined.
    pub(super) fn new(store: NodeStore, layout: Layout) -> Self {
        Self { store, layout, registration: Arc::default() }
    }

    /// Opens a session, tells it to `opened`, and registers the process; returns when the process sees itself.
    ///
    /// # Errors
    /// When the lease was lost meanwhile, or the store did not take the registration for long.
    pub(super) async fn join(
        &self,
        epoch: u64,
        mut known: watch::Receiver<Revision>,
        opened: impl FnOnce(Session),
    ) -> Result<Session, StoreError> {
        let session = loop {
            match self.store.session(LEASE).await {
                Ok(session) => break session,
                Err(_) => tokio::time::sleep(AGAIN).await,
            }
        };
        opened(session.clone());
        let info = NodeInfo::own(&self.store.node, &address(&self.store.node), epoch);
        let (registration, at) = Registration::new(&self.store, &self.layout, info, session.lease).await?;
        *self.registration.lock() = Some(registration);
        drop(known.wait_for(|known| *known >= at).await);
        Ok(session)
    }

    /// Whether the store has the registration under the lease. Before there is one nobody knows the process, and none is
    /// to be there.
    ///
    /// # Errors
    /// When the store does not answer.
    pub(super) async fn is_registered(&self, lease: LeaseId) -> Result<bool, StoreError> {
        let Some(key) = self.registration.lock().as_ref().map(|it| it.key().to_owned()) else {
            return Ok(true);
        };
        Ok(self.store.get(&key).await?.found.is_some_and(|kv| kv.lease == Some(lease)))
    }

    /// Takes the registration back. To be called only when nothing of the process can write any more.
    pub(super) async fn leave(&self) {
        let registration = self.registration.lock().take();
        if let Some(registration) = registration {
            // Whoever does not hear of it waits until the lease has ended.
            drop(registration.take_back(&self.store).await);
        }
    }
}

/// Where others reach a process.
pub(super) fn address(node: &NodeId) -> String {
    format!("{node}:8300")
}
