//! What a maintainer needs from an upstream; the node plugs the log side in.

use async_trait::async_trait;
use heartbeatpb::config::ChangefeedInfo;
use heartbeatpb::{ChangefeedId, MaintainerEpoch, RunningError, SchemaId, TableId, TableSpan, Ts, WallTime};

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

/// Bytes in one unit of the size estimate: what `region-threshold` counts.
const UNIT_BYTES: u64 = 96 << 20;
/// Rows in one unit, where only rows are known or rows are small.
const UNIT_ROWS: u64 = 960_000;

/// Where a span can be divided, and how large it is, as far as an upstream knows.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct SplitPoints {
    /// Keys strictly inside the span, strictly increasing: the parts are what lies between. There may be fewer than
    /// asked for, and none for a table that cannot be divided.
    pub keys: Vec<Vec<u8>>,
    /// About how many rows the span has.
    pub rows: Option<u64>,
    /// About how many bytes the span has.
    pub bytes: Option<u64>,
}

impl SplitPoints {
    /// The size as settings count it: units of 96 MiB or 960 000 rows, whichever are more; `None` when nothing is
    /// known.
    #[must_use]
    pub fn units(&self) -> Option<u64> {
        let bytes = self.bytes.map(|bytes| bytes.div_ceil(UNIT_BYTES));
        let rows = self.rows.map(|rows| rows.div_ceil(UNIT_ROWS));
        bytes.max(rows)
    }
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

    /// The maintainer of `epoch` has taken over, and lets no dispatcher begin below `floor`, not even in the place of one
    /// that is further: what is kept here of the log behind it may go. Said when it has taken over and whenever its
    /// checkpoint moves; before, nothing may go. Does nothing to the log of another epoch.
    fn raise_floor(&self, _changefeed: &ChangefeedId, _epoch: Option<MaintainerEpoch>, _floor: Ts) {}

    /// Stops the reader that `epoch` started; does nothing to one of another epoch.
    async fn stop(&self, changefeed: &ChangefeedId, epoch: Option<MaintainerEpoch>);

    /// The error that ended the reader, if one did.
    fn error(&self, changefeed: &ChangefeedId, epoch: Option<MaintainerEpoch>) -> Option<RunningError>;

    /// What has kept the reader from its upstream for so long that people should know. It goes on trying by itself.
    fn trouble(&self, _changefeed: &ChangefeedId, _epoch: Option<MaintainerEpoch>) -> Option<RunningError> {
        None
    }

    /// Keys that divide a span into at most `pieces` parts of about the same size, with an estimate of the whole.
    /// The cost is bounded; a caller that has waited long enough drops the future. An upstream that knows nothing
    /// leaves every table whole.
    ///
    /// # Errors
    /// When the upstream could not be asked: the span is not divided now.
    async fn split_points(
        &self,
        _changefeed: &ChangefeedId,
        _epoch: Option<MaintainerEpoch>,
        _span: &TableSpan,
        _pieces: usize,
    ) -> Result<SplitPoints, RunningError> {
        Ok(SplitPoints::default())
    }

    /// When a position was committed upstream; `None` when that is not known.
    fn time_of(&self, _changefeed: &ChangefeedId, _ts: Ts) -> Option<WallTime> {
        None
    }

    /// Seconds between a position and now; `None` when its time is not known.
    fn lag_seconds(&self, changefeed: &ChangefeedId, ts: Ts) -> Option<f64>;
}
