//! Series of the file sink.

use std::time::Duration;

use heartbeatpb::ChangefeedId;
use metrics::{
    Counter, Gauge, Histogram, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge,
    histogram,
};

/// Bytes of one data file. Labels: `namespace`, `changefeed`.
pub const FLUSH_BYTES: &str = "ticdc_sink_cloud_storage_flush_bytes";
/// Seconds of writing one data file. Labels: `namespace`, `changefeed`.
pub const FLUSH_DURATION: &str = "ticdc_sink_cloud_storage_flush_duration_seconds";
/// Data files by why they were closed. Labels: `namespace`, `changefeed`, `reason`.
pub const FLUSH_TOTAL: &str = "ticdc_sink_cloud_storage_flush_total";
/// Seconds of flushing rows before a block event. Labels: `namespace`, `changefeed`.
pub const BLOCK_FLUSH_DURATION: &str = "ticdc_sink_cloud_storage_ddl_flush_dml_duration_seconds";
/// Seconds spent flushing; exported as a counter. Labels: `namespace`, `changefeed`, `id`.
pub const WORKER_BUSY: &str = "ticdc_sink_cloud_storage_worker_busy_ratio";
/// Bytes waiting in memory. Labels: `namespace`, `changefeed`.
pub const MEMORY_BYTES: &str = "ticdc_sink_cloud_storage_spool_memory_bytes";
/// Checkpoints written. Labels: `namespace`, `changefeed`.
pub const CHECKPOINT_COUNT: &str = "ticdc_sink_mq_checkpoint_ts_message_count";
/// Seconds of writing one checkpoint. Labels: `namespace`, `changefeed`.
pub const CHECKPOINT_DURATION: &str = "ticdc_sink_mq_checkpoint_ts_message_duration";

/// Describes the series of the file sink to the recorder.
pub fn describe() {
    describe_histogram!(FLUSH_BYTES, Unit::Bytes, "Bytes of one data file");
    describe_histogram!(FLUSH_DURATION, Unit::Seconds, "Writing of one data file");
    describe_counter!(FLUSH_TOTAL, Unit::Count, "Data files by why they were closed");
    describe_histogram!(BLOCK_FLUSH_DURATION, Unit::Seconds, "Flushing of rows before a block event");
    describe_gauge!(WORKER_BUSY, Unit::Seconds, "Time that a writer spent flushing");
    describe_gauge!(MEMORY_BYTES, Unit::Bytes, "Rows and their text that wait for their file");
    describe_gauge!(CHECKPOINT_COUNT, Unit::Count, "Checkpoints written downstream");
    describe_histogram!(CHECKPOINT_DURATION, Unit::Seconds, "Writing of one checkpoint");
}

/// Why a file was closed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Reason {
    Size,
    Interval,
    Barrier,
    Quota,
}

/// Handles, resolved once per changefeed.
#[derive(Clone, Debug)]
pub(crate) struct FileMetrics {
    flush_bytes: Histogram,
    flush_duration: Histogram,
    flush_total: [Counter; 4],
    pub(crate) block_flush: Histogram,
    pub(crate) memory: Gauge,
    checkpoint_count: Gauge,
    checkpoint_duration: Histogram,
    namespace: String,
    changefeed: String,
}

impl FileMetrics {
    pub(crate) fn new(id: &ChangefeedId) -> Self {
        let namespace = id.keyspace.to_string();
        let changefeed = id.name.to_string();
        let (ns, name) = (|| namespace.clone(), || changefeed.clone());
        let total = |reason: &'static str| counter!(FLUSH_TOTAL, "namespace" => ns(), "changefeed" => name(), "reason" => reason);
        Self {
            flush_bytes: histogram!(FLUSH_BYTES, "namespace" => ns(), "changefeed" => name()),
            flush_duration: histogram!(FLUSH_DURATION, "namespace" => ns(), "changefeed" => name()),
            flush_total: [total("size"), total("interval"), total("barrier"), total("quota")],
            block_flush: histogram!(BLOCK_FLUSH_DURATION, "namespace" => ns(), "changefeed" => name()),
            memory: gauge!(MEMORY_BYTES, "namespace" => ns(), "changefeed" => name()),
            checkpoint_count: gauge!(CHECKPOINT_COUNT, "namespace" => ns(), "changefeed" => name()),
            checkpoint_duration: histogram!(CHECKPOINT_DURATION, "namespace" => ns(), "changefeed" => name()),
            namespace,
            changefeed,
        }
    }

    /// The seconds that writer `id` was busy. A counter has no fractions; this gauge only grows.
    pub(crate) fn busy(&self, id: usize) -> Gauge {
        let (ns, name) = (self.namespace.clone(), self.changefeed.clone());
        gauge!(WORKER_BUSY, "namespace" => ns, "changefeed" => name, "id" => id.to_string())
    }

    #[expect(clippy::cast_precision_loss, reason = "histograms hold floats")]
    pub(crate) fn flushed(&self, bytes: usize, took: Duration, reason: Reason) {
        self.flush_bytes.record(bytes as f64);
        self.flush_duration.record(took.as_secs_f64());
        self.flush_total[reason as usize].increment(1);
    }

    pub(crate) fn checkpoint(&self, took: Duration) {
        self.checkpoint_count.increment(1.0);
        self.checkpoint_duration.record(took.as_secs_f64());
    }
}
