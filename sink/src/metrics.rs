//! Series of the sinks; names are public API.

use std::time::Duration;

use heartbeatpb::ChangefeedId;
use metrics::{Counter, Histogram, Unit, counter, describe_counter, describe_histogram, histogram};

/// Rows per successful batch. Labels: `namespace`, `changefeed`, `type`.
pub const BATCH_ROW_COUNT: &str = "ticdc_sink_batch_row_count";
/// Bytes per successful batch. Labels: `namespace`, `changefeed`, `type`.
pub const BATCH_WRITE_BYTES: &str = "ticdc_sink_batch_write_bytes";
/// Bytes of successful batches. Labels: `namespace`, `changefeed`, `type`.
pub const WRITE_BYTES_TOTAL: &str = "ticdc_sink_write_bytes_total";
/// Rows of successful batches. Labels: `namespace`, `changefeed`.
pub const DML_EVENT_COUNT: &str = "ticdc_sink_dml_event_count";
/// Failed attempts, retries included. Labels: `namespace`, `changefeed`, `event_type` (`dml`, `ddl`).
pub const EXECUTION_ERROR: &str = "ticdc_sink_execution_error";
/// Seconds of one flush of a worker. Labels: `namespace`, `changefeed`, `id`.
pub const WORKER_FLUSH_DURATION: &str = "ticdc_sink_txn_worker_flush_duration";
/// Seconds of handling one fetched batch. Labels: `namespace`, `changefeed`, `id`.
pub const WORKER_BATCH_FLUSH_DURATION: &str = "ticdc_sink_txn_worker_batch_flush_duration";
/// Seconds of the worker's loop, waiting included. Labels: `namespace`, `changefeed`, `id`.
pub const WORKER_TOTAL_DURATION: &str = "ticdc_sink_txn_worker_total_duration";
/// Rows handled by the worker. Labels: `namespace`, `changefeed`, `id`.
pub const WORKER_HANDLED_ROWS: &str = "ticdc_sink_txn_worker_handled_rows";
/// Rows of one batch that a worker wrote. Labels: `namespace`, `changefeed`, `id`.
pub const EVENT_ROW_COUNT: &str = "ticdc_sink_txn_worker_event_row_count";
/// Rows changed downstream. Labels: `namespace`, `changefeed`, `count_type`, `row_type`.
pub const AFFECTED_ROW_COUNT: &str = "ticdc_sink_dml_event_affected_row_count";
/// Seconds from entering the sink to reaching a queue, per batch. Labels: `namespace`, `changefeed`.
pub const CONFLICT_DETECT_DURATION: &str = "ticdc_sink_txn_conflict_detect_duration";
/// Seconds from entering the sink to being taken by a worker, of one batch of a worker. Labels: `namespace`, `changefeed`.
pub const QUEUE_DURATION: &str = "ticdc_sink_txn_queue_duration";
/// Seconds of the commit of one downstream transaction. Labels: `namespace`, `changefeed`.
pub const DML_BATCH_COMMIT: &str = "ticdc_sink_txn_sink_dml_batch_commit";

/// Describes every series of this crate to the recorder.
pub fn describe() {
    describe_histogram!(BATCH_ROW_COUNT, Unit::Count, "Rows per batch written downstream");
    describe_histogram!(BATCH_WRITE_BYTES, Unit::Bytes, "Bytes per batch written downstream");
    describe_counter!(WRITE_BYTES_TOTAL, Unit::Bytes, "Bytes written downstream");
    describe_counter!(DML_EVENT_COUNT, Unit::Count, "Rows written downstream");
    describe_counter!(EXECUTION_ERROR, Unit::Count, "Failed attempts to write downstream, retries included");
    describe_histogram!(WORKER_FLUSH_DURATION, Unit::Seconds, "One flush of a sink worker");
    describe_histogram!(WORKER_BATCH_FLUSH_DURATION, Unit::Seconds, "Handling of one batch by a sink worker");
    describe_histogram!(WORKER_TOTAL_DURATION, Unit::Seconds, "Loop time of a sink worker, waiting included");
    describe_counter!(WORKER_HANDLED_ROWS, Unit::Count, "Rows handled by a sink worker");
    describe_counter!(
        AFFECTED_ROW_COUNT,
        Unit::Count,
        "Rows that the downstream says it changed, and expected ones"
    );
    describe_histogram!(EVENT_ROW_COUNT, Unit::Count, "Rows of one batch that a worker wrote");
    describe_histogram!(QUEUE_DURATION, Unit::Seconds, "Time from entering the sink to a worker");
    describe_histogram!(CONFLICT_DETECT_DURATION, Unit::Seconds, "Time for conflict detection of one batch");
    describe_histogram!(DML_BATCH_COMMIT, Unit::Seconds, "Commit of one downstream transaction");
    crate::file_metrics::describe();
}

/// Series of every kind of sink, resolved once per changefeed.
#[derive(Clone, Debug)]
pub(crate) struct SinkMetrics {
    batch_rows: Histogram,
    batch_bytes: Histogram,
    bytes: Counter,
    rows: Counter,
    pub(crate) dml_errors: Counter,
    pub(crate) ddl_errors: Counter,
}

impl SinkMetrics {
    /// Creates the series; the error counters begin at 0 so that alerts see the first error.
    pub(crate) fn new(changefeed: &ChangefeedId, kind: &'static str) -> Self {
        let ns = changefeed.keyspace.to_string();
        let name = changefeed.name.to_string();
        let errors = |event_type: &'static str| {
            let errors = counter!(EXECUTION_ERROR, "namespace" => ns.clone(), "changefeed" => name.clone(), "event_type" => event_type);
            errors.increment(0);
            errors
        };
        Self {
            batch_rows: histogram!(BATCH_ROW_COUNT, "namespace" => ns.clone(), "changefeed" => name.clone(), "type" => kind),
            batch_bytes: histogram!(BATCH_WRITE_BYTES, "namespace" => ns.clone(), "changefeed" => name.clone(), "type" => kind),
            bytes: counter!(WRITE_BYTES_TOTAL, "namespace" => ns.clone(), "changefeed" => name.clone(), "type" => kind),
            rows: counter!(DML_EVENT_COUNT, "namespace" => ns.clone(), "changefeed" => name.clone()),
            dml_errors: errors("dml"),
            ddl_errors: errors("ddl"),
        }
    }

    /// A batch is durable.
    #[expect(clippy::cast_precision_loss, reason = "histograms hold floats")]
    pub(crate) fn flushed(&self, rows: u64, bytes: usize) {
        self.batch_rows.record(rows as f64);
        self.batch_bytes.record(bytes as f64);
        self.bytes.increment(bytes as u64);
        self.rows.increment(rows);
    }
}

/// Series of one worker of a transactional sink.
#[derive(Clone, Debug)]
pub(crate) struct WorkerMetrics {
    flush: Histogram,
    batch_flush: Histogram,
    total: Histogram,
    rows: Histogram,
    handled: Counter,
}

impl WorkerMetrics {
    pub(crate) fn new(changefeed: &ChangefeedId, worker: usize) -> Self {
        let ns = changefeed.keyspace.to_string();
        let name = changefeed.name.to_string();
        let id = worker.to_string();
        let of = |metric: &'static str| histogram!(metric, "namespace" => ns.clone(), "changefeed" => name.clone(), "id" => id.clone());
        Self {
            flush: of(WORKER_FLUSH_DURATION),
            batch_flush: of(WORKER_BATCH_FLUSH_DURATION),
            total: of(WORKER_TOTAL_DURATION),
            rows: of(EVENT_ROW_COUNT),
            handled: counter!(WORKER_HANDLED_ROWS, "namespace" => ns.clone(), "changefeed" => name.clone(), "id" => id.clone()),
        }
    }

    /// One attempt to write a batch ended well.
    pub(crate) fn flushed(&self, took: Duration) {
        self.flush.record(took.as_secs_f64());
    }

    /// A batch is done, retries included; `cycle` also holds the wait for it.
    #[expect(clippy::cast_precision_loss, reason = "histograms hold floats")]
    pub(crate) fn batch(&self, rows: usize, took: Duration, cycle: Duration) {
        self.batch_flush.record(took.as_secs_f64());
        self.total.record(cycle.as_secs_f64());
        self.rows.record(rows as f64);
        self.handled.increment(rows as u64);
    }
}

/// Series of a transactional sink as a whole.
#[derive(Clone, Debug)]
pub(crate) struct TxnMetrics {
    pub(crate) conflict_detect: Histogram,
    pub(crate) queue: Histogram,
    pub(crate) commit: Histogram,
    affected: [[Counter; 4]; 2],
}

/// What a row count is about; the index into [`TxnMetrics`]'s counters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum RowType {
    Insert,
    Update,
    Delete,
}

impl TxnMetrics {
    pub(crate) fn new(changefeed: &ChangefeedId) -> Self {
        let ns = changefeed.keyspace.to_string();
        let name = changefeed.name.to_string();
        let seconds = |metric: &'static str| histogram!(metric, "namespace" => ns.clone(), "changefeed" => name.clone());
        let affected = |count_type: &'static str| {
            ["insert", "update", "delete", "total"].map(|row_type| {
                counter!(AFFECTED_ROW_COUNT, "namespace" => ns.clone(), "changefeed" => name.clone(), "count_type" => count_type, "row_type" => row_type)
            })
        };
        Self {
            conflict_detect: seconds(CONFLICT_DETECT_DURATION),
            queue: seconds(QUEUE_DURATION),
            commit: seconds(DML_BATCH_COMMIT),
            affected: [affected("expected"), affected("actual")],
        }
    }

    /// A statement of a committed transaction should have changed `expected` rows and changed `actual`.
    pub(crate) fn affected(&self, row_type: RowType, expected: u64, actual: u64) {
        for (counters, count) in self.affected.iter().zip([expected, actual]) {
            counters[row_type as usize].increment(count);
            counters[3].increment(count);
        }
    }
}
