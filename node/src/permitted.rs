//! What this node says to upstreams, as long as it may: a node whose lease is in doubt confirms nothing, takes no log over
//! and releases none.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use heartbeatpb::config::ChangefeedInfo;
use heartbeatpb::{ChangefeedId, MaintainerEpoch, RunningError, TableSpan, Ts, WallTime, WritePermit, codes};
use maintainer::{SourceTable, SplitPoints, Upstream};

/// How long whoever wants something waits for the permit; it is asked for again.
const PATIENCE: Duration = Duration::from_secs(10);

const SUSPENDED: &str = "writing is suspended: the lease of this node is not confirmed";

/// A maintainer's way to upstreams.
pub(crate) struct PermittedUpstream {
    pub(crate) inner: Arc<dyn Upstream>,
    pub(crate) permit: WritePermit,
}

#[async_trait]
impl Upstream for PermittedUpstream {
    /// A reader ends the one that has the log: it must not be its successor.
    async fn start(
        &self,
        info: &ChangefeedInfo,
        epoch: Option<MaintainerEpoch>,
        checkpoint: Ts,
    ) -> Result<Vec<SourceTable>, RunningError> {
        if tokio::time::timeout(PATIENCE, self.permit.granted()).await.is_err() {
            return Err(RunningError {
                time: crate::wiring::rfc3339_now(),
                node: String::new(),
                code: codes::UPSTREAM_UNAVAILABLE.to_owned(),
                message: SUSPENDED.to_owned(),
            });
        }
        self.inner.start(info, epoch, checkpoint).await
    }

    /// What is not said now is said with the next checkpoint, or again after a while.
    fn confirm(&self, changefeed: &ChangefeedId, epoch: Option<MaintainerEpoch>, persisted: Ts) {
        if self.permit.holds() {
            self.inner.confirm(changefeed, epoch, persisted);
        }
    }

    /// What is kept here is nobody else's.
    fn raise_floor(&self, changefeed: &ChangefeedId, epoch: Option<MaintainerEpoch>, floor: Ts) {
        self.inner.raise_floor(changefeed, epoch, floor);
    }

    async fn stop(&self, changefeed: &ChangefeedId, epoch: Option<MaintainerEpoch>) {
        self.inner.stop(changefeed, epoch).await;
    }

    fn error(&self, changefeed: &ChangefeedId, epoch: Option<MaintainerEpoch>) -> Option<RunningError> {
        self.inner.error(changefeed, epoch)
    }

    fn trouble(&self, changefeed: &ChangefeedId, epoch: Option<MaintainerEpoch>) -> Option<RunningError> {
        self.inner.trouble(changefeed, epoch)
    }

    fn time_of(&self, changefeed: &ChangefeedId, ts: Ts) -> Option<WallTime> {
        self.inner.time_of(changefeed, ts)
    }

    async fn split_points(
        &self,
        changefeed: &ChangefeedId,
        epoch: Option<MaintainerEpoch>,
        span: &TableSpan,
        pieces: usize,
    ) -> Result<SplitPoints, RunningError> {
        self.inner.split_points(changefeed, epoch, span, pieces).await
    }

    fn lag_seconds(&self, changefeed: &ChangefeedId, ts: Ts) -> Option<f64> {
        self.inner.lag_seconds(changefeed, ts)
    }
}

/// The coordinator's way to the logs that upstreams keep.
pub(crate) struct PermittedRetention {
    pub(crate) inner: Arc<dyn coordinator::RetentionHook>,
    pub(crate) permit: WritePermit,
}

#[async_trait]
impl coordinator::RetentionHook for PermittedRetention {
    async fn drop_retention(&self, info: &ChangefeedInfo) -> Result<(), String> {
        if tokio::time::timeout(PATIENCE, self.permit.granted()).await.is_err() {
            return Err(SUSPENDED.to_owned());
        }
        self.inner.drop_retention(info).await
    }
}
