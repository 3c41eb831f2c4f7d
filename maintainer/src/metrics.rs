//! Metrics of maintainers. Labels: `namespace` (the keyspace) and `changefeed` (the bare name).

use heartbeatpb::{ChangefeedId, WallTime};
use metrics::{Gauge, describe_gauge, gauge};

/// Checkpoint, milliseconds since the epoch.
pub const CHECKPOINT_TS: &str = "ticdc_maintainer_checkpoint_ts";
/// Seconds between the checkpoint and now.
pub const CHECKPOINT_LAG: &str = "ticdc_maintainer_checkpoint_ts_lag";
/// Seconds between the resolved ts and now.
pub const RESOLVED_LAG: &str = "ticdc_maintainer_resolved_ts_lag";
/// Maintainers of the changefeed on this node.
pub const MAINTAINERS: &str = "ticdc_changefeed_maintainer_counter";

/// Describes every metric of this crate.
pub fn describe() {
    describe_gauge!(CHECKPOINT_TS, "Checkpoint of the changefeed in milliseconds");
    describe_gauge!(CHECKPOINT_LAG, "Seconds between the checkpoint and now");
    describe_gauge!(RESOLVED_LAG, "Seconds between the resolved ts and now");
    describe_gauge!(MAINTAINERS, "Maintainers of the changefeed on this node");
}

/// Handles of one changefeed, resolved once. The exporter keeps a series until the process ends; its gauges
/// go to zero with the maintainer.
pub(crate) struct MaintainerMetrics {
    checkpoint_ts: Gauge,
    checkpoint_lag: Gauge,
    resolved_lag: Gauge,
    count: Gauge,
}

impl MaintainerMetrics {
    pub(crate) fn new(id: &ChangefeedId) -> Self {
        let of = |name: &'static str| gauge!(name, "namespace" => id.keyspace.to_string(), "changefeed" => id.name.to_string());
        let count = of(MAINTAINERS);
        count.increment(1.0);
        Self {
            checkpoint_ts: of(CHECKPOINT_TS),
            checkpoint_lag: of(CHECKPOINT_LAG),
            resolved_lag: of(RESOLVED_LAG),
            count,
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "milliseconds fit a float until the year 287396")]
    pub(crate) fn set(&self, now: WallTime, checkpoint_lag: Option<f64>, resolved_lag: Option<f64>) {
        if let Some(lag) = checkpoint_lag {
            self.checkpoint_lag.set(lag.max(0.0));
            self.checkpoint_ts.set(now.millis() as f64 - lag * 1000.0);
        }
        if let Some(lag) = resolved_lag {
            self.resolved_lag.set(lag.max(0.0));
        }
    }
}

impl Drop for MaintainerMetrics {
    fn drop(&mut self) {
        self.checkpoint_lag.set(0.0);
        self.resolved_lag.set(0.0);
        self.count.decrement(1.0);
    }
}
