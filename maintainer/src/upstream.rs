//! What a maintainer needs from an upstream; the node plugs the log side in.

use async_trait::async_trait;
use heartbeatpb::config::ChangefeedInfo;
use heartbeatpb::{ChangefeedId, MaintainerEpoch, RunningError, SchemaId, TableId, Ts};

/// A table that a changefeed replicates.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SourceTable {
    /// Physical id.
    pub id: TableId,
    /// Id of its schema.
    pub schema_id: SchemaId,
    /// Name of its schema.
    pub schema: String,
    /// Its name.
    pub name: String,
    /// Whether it can be divided into key ranges.
    pub splittable: bool,
}

/// The log side, as a maintainer sees it.
#[async_trait]
pub trait Upstream: Send + Sync + 'static {
    /// Starts the changefeed's log reader under `epoch` at `checkpoint`, and answers the tables that it delivers.
    /// A reader of a smaller epoch is stopped first; one of a larger epoch refuses this one. Idempotent.
    ///
    /// # Errors
    /// When the upstream cannot be read; the error says whether a person is needed by its code.
    async fn start(
        &self,
        info: &ChangefeedInfo,
        epoch: Option<MaintainerEpoch>,
        checkpoint: Ts,
    ) -> Result<Vec<SourceTable>, RunningError>;

    /// The changefeed's checkpoint was persisted: the upstream may forget what is behind it.
    fn confirm(&self, changefeed: &ChangefeedId, epoch: Option<MaintainerEpoch>, persisted: Ts);

    /// Stops the reader that `epoch` started; does nothing to one of another epoch.
    async fn stop(&self, changefeed: &ChangefeedId, epoch: Option<MaintainerEpoch>);

    /// The error that ended the reader, if one did.
    fn error(&self, changefeed: &ChangefeedId, epoch: Option<MaintainerEpoch>) -> Option<RunningError>;

    /// Seconds between a position and now; `None` when its time is not known.
    fn lag_seconds(&self, changefeed: &ChangefeedId, ts: Ts) -> Option<f64>;
}
