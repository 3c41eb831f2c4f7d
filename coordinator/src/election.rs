//! Stands for election, coordinates while leading, and tells the process who to talk to.

use std::sync::Arc;
use std::time::Duration;

use heartbeatpb::NodeLiveness;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::backend::{Session, Store, StoreError};
use crate::config::CoordinatorConfig;
use crate::coordinator::{Coordinator, Neighbours};
use crate::error::Error;
use crate::handle::CoordinatorHandle;
use crate::layout::Layout;
use crate::meta::Meta;
use crate::metrics;

/// Campaigns begin at most this often.
const CAMPAIGN_PERIOD: Duration = Duration::from_secs(1);
/// A resignation that takes longer is tried again.
const RESIGN: Duration = Duration::from_secs(5);

/// The election loop of one node.
pub struct Election {
    store: Arc<dyn Store>,
    layout: Layout,
    neighbours: Neighbours,
    config: CoordinatorConfig,
    liveness: watch::Receiver<NodeLiveness>,
    current: watch::Sender<Option<CoordinatorHandle>>,
}

impl std::fmt::Debug for Election {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Election").field("layout", &self.layout).finish_non_exhaustive()
    }
}

impl Election {
    /// The loop, and a view of the coordinator of this process: `None` while this node does not lead.
    #[must_use]
    pub fn new(
        store: Arc<dyn Store>,
        layout: Layout,
        neighbours: Neighbours,
        config: CoordinatorConfig,
        liveness: watch::Receiver<NodeLiveness>,
    ) -> (Self, watch::Receiver<Option<CoordinatorHandle>>) {
        let (current, view) = watch::channel(None);
        (Self { store, layout, neighbours, config, liveness, current }, view)
    }

    /// Stands for election under `session` until `shutdown`. Leading ends with the session, and when this
    /// node starts to drain.
    ///
    /// # Errors
    /// When the session or the store is lost: the process has to stop writing and start anew.
    pub async fn run(self, session: Session, shutdown: CancellationToken) -> Result<(), Error> {
        let mut liveness = self.liveness.clone();
        let mut pace = tokio::time::interval(CAMPAIGN_PERIOD);
        pace.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut candidate = false;
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return Ok(()),
                () = session.done.cancelled() => return Err(StoreError::LeaseGone.into()),
                _ = pace.tick() => {}
            }
            if *liveness.borrow_and_update() != NodeLiveness::Alive {
                // Liveness never returns within a process: this node does not lead again.
                if candidate {
                    // A campaign that failed may have left a key, and whoever comes later waits behind it.
                    self.resign(&session, &shutdown).await;
                }
                return tokio::select! {
                    biased;
                    () = shutdown.cancelled() => Ok(()),
                    () = session.done.cancelled() => Err(StoreError::LeaseGone.into()),
                };
            }
            candidate = true;
            let led = tokio::select! {
                biased; // without its lease the coordinator must not take another step, not even an orderly one
                () = session.done.cancelled() => None,
                led = self.lead(&session, &mut liveness, &shutdown) => Some(led),
            };
            self.current.send_replace(None);
            let Some(led) = led else { return Err(StoreError::LeaseGone.into()) };
            match led {
                // Somebody else leads now; the key is not ours to give up.
                Err(Error::NotOwner) => tracing::warn!("another node became coordinator"),
                Ok(()) => {
                    self.resign(&session, &shutdown).await;
                    candidate = false;
                }
                Err(Error::Store(error)) if error.is_retryable() => {
                    tracing::warn!(%error, "the election failed; trying again");
                }
                Err(error) => {
                    self.resign(&session, &shutdown).await;
                    return Err(error);
                }
            }
        }
    }

    async fn lead(
        &self,
        session: &Session,
        liveness: &mut watch::Receiver<NodeLiveness>,
        shutdown: &CancellationToken,
    ) -> Result<(), Error> {
        let node = self.neighbours.center.node().as_str();
        let prefix = self.layout.owner_prefix();
        let fence = tokio::select! {
            biased;
            () = shutdown.cancelled() => return Ok(()),
            fence = self.store.campaign(&prefix, session.lease, node) => fence?,
        };
        if *liveness.borrow_and_update() != NodeLiveness::Alive {
            return Ok(());
        }
        tracing::info!(version = fence.revision, "this node is coordinator");
        metrics::count_election();
        let meta = Meta::new(Arc::clone(&self.store), self.layout.clone(), fence);
        let (coordinator, handle) = Coordinator::new(self.neighbours.clone(), meta, self.config.clone());
        self.current.send_replace(Some(handle));
        let stop = shutdown.child_token();
        let run = coordinator.run(stop.clone());
        tokio::pin!(run);
        let result = loop {
            tokio::select! {
                biased;
                result = &mut run => break result,
                changed = liveness.changed() => {
                    // Somebody else can lead without interruption: the sooner the better.
                    if changed.is_err() || *liveness.borrow_and_update() != NodeLiveness::Alive {
                        stop.cancel();
                        break run.await;
                    }
                }
            }
        };
        metrics::count_election();
        result
    }

    /// Gives the role up. A process that lives on keeps its lease, and with it the role: so this is tried until it
    /// succeeds, or the lease or the process ends.
    async fn resign(&self, session: &Session, shutdown: &CancellationToken) {
        let prefix = self.layout.owner_prefix();
        loop {
            let resign = self.store.resign(&prefix, session.lease);
            let result = tokio::select! {
                biased;
                () = session.done.cancelled() => return,
                result = tokio::time::timeout(RESIGN, resign) => result,
            };
            match result {
                Ok(Ok(())) => {
                    tracing::info!("this node is not coordinator any more");
                    return;
                }
                Ok(Err(error)) => tracing::warn!(%error, "the resignation failed"),
                Err(_) => tracing::warn!("the resignation took too long"),
            }
            if shutdown.is_cancelled() || !heartbeatpb::Rule::ResignationRepeated.holds() {
                tracing::warn!("the role ends with the lease");
                return;
            }
            tokio::select! {
                biased;
                () = session.done.cancelled() => return,
                // One more attempt, then the end of the process takes the role away.
                () = shutdown.cancelled() => {}
                () = tokio::time::sleep(CAMPAIGN_PERIOD) => {}
            }
        }
    }
}
