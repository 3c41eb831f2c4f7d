//! Metrics of the log side.

use metrics::{Counter, Histogram, counter, describe_counter, describe_histogram, histogram};

/// Events sent to collectors. Labels: `type` (`kv`), `mode`.
pub const SENT: &str = "ticdc_event_service_send_event_count";
/// Bytes of one batch sent to a collector.
pub const BATCH_BYTES: &str = "ticdc_event_service_scanned_dml_size";
/// Resets of streams that had begun: a gap was detected.
pub const RESETS: &str = "ticdc_event_service_reset_dispatcher_count";

/// Describes every metric of this crate.
pub fn describe() {
    describe_counter!(SENT, "Events sent to collectors");
    describe_histogram!(BATCH_BYTES, "Bytes of one batch sent to a collector");
    describe_counter!(RESETS, "Resets of streams that had begun");
}

pub(crate) struct ServiceMetrics {
    rows: Counter,
    bytes: Histogram,
    pub(crate) resets: Counter,
}

impl ServiceMetrics {
    pub(crate) fn new() -> Self {
        Self {
            rows: counter!(SENT, "type" => "kv", "mode" => "default"),
            bytes: histogram!(BATCH_BYTES),
            resets: counter!(RESETS),
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "a batch is a few hundred KiB")]
    pub(crate) fn sent(&self, rows: u64, bytes: u64) {
        self.rows.increment(rows);
        self.bytes.record(bytes as f64);
    }
}
