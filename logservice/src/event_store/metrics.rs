//! Metrics of event stores. They are the node's: all of its stores count together, as shard `1`.

use std::time::Duration;

use event::RowOp;
use metrics::{Counter, Histogram, counter, describe_counter, describe_histogram, histogram};

/// Entries written and positions resolved. Label: `type` (`kv`, `resolved`).
pub const INPUT_EVENTS: &str = "ticdc_event_store_input_event_count";
/// Rows written. Label: `type` (`insert`, `update`, `delete`).
pub const KV_ENTRIES: &str = "ticdc_event_store_kv_entry_count";
/// Values compressed on write: none are.
pub const COMPRESSED_ROWS: &str = "ticdc_event_store_compressed_rows_count";
/// Batches that became visible.
pub const WRITE_REQUESTS: &str = "ticdc_event_store_write_requests_count";
/// Bytes of the batches that became visible.
pub const WRITE_BYTES: &str = "ticdc_event_store_write_bytes";
/// Rows of one batch.
pub const WRITE_BATCH_EVENTS: &str = "ticdc_event_store_write_batch_events_count";
/// Bytes of one batch.
pub const WRITE_BATCH_SIZE: &str = "ticdc_event_store_write_batch_size";
/// Seconds to make one batch visible.
pub const WRITE_DURATION: &str = "ticdc_event_store_write_duration";
/// Seconds from a batch's first commit until it became visible.
pub const WRITE_QUEUE_DURATION: &str = "ticdc_event_store_write_queue_duration";
/// Seconds to make chunks of one batch.
pub const WRITE_PREPARE_DURATION: &str = "ticdc_event_store_write_prepare_duration";
/// Seconds that a writer worked on one batch or on one segment file. Labels: `db`, `worker`.
pub const WORKER_IO_DURATION: &str = "ticdc_event_store_write_worker_io_duration";
/// Seconds from one batch of a writer to the next. Labels: `db`, `worker`.
pub const WORKER_TOTAL_DURATION: &str = "ticdc_event_store_write_worker_total_duration";
/// Seconds of one look for rows. Label: `type` (`first`: the index; `next`: the disk).
pub const READ_DURATION: &str = "ticdc_event_store_read_duration";
/// Times that rows were passed by a checkpoint and dropped.
pub const TRIMS: &str = "ticdc_event_store_delete_range_fetched_count";
/// Segment files removed.
pub const FILES_REMOVED: &str = "ticdc_event_store_delete_range_count";

/// Transactions of this size are counted as large.
const BIG_TXN: u64 = 1 << 20;

pub(crate) fn describe() {
    for (name, words) in [
        (INPUT_EVENTS, "Entries written and positions resolved"),
        (KV_ENTRIES, "Rows written"),
        (COMPRESSED_ROWS, "Values compressed on write: none are"),
        (WRITE_REQUESTS, "Batches that became visible"),
        (WRITE_BYTES, "Bytes of the batches that became visible"),
        (TRIMS, "Times that rows were passed by a checkpoint and dropped"),
        (FILES_REMOVED, "Segment files removed"),
    ] {
        describe_counter!(name, words);
    }
    for (name, words) in [
        (WRITE_BATCH_EVENTS, "Rows of one batch"),
        (WRITE_BATCH_SIZE, "Bytes of one batch"),
        (WRITE_DURATION, "Seconds to make one batch visible"),
        (WRITE_QUEUE_DURATION, "Seconds from a batch's first commit until it became visible"),
        (WRITE_PREPARE_DURATION, "Seconds to make chunks of one batch"),
        (WORKER_IO_DURATION, "Seconds that a writer worked on one batch or on one segment file"),
        (WORKER_TOTAL_DURATION, "Seconds from one batch of a writer to the next"),
        (READ_DURATION, "Seconds of one look for rows"),
    ] {
        describe_histogram!(name, words);
    }
    counter!(COMPRESSED_ROWS).increment(0);
}

/// What a writer has done since it last made something visible.
#[derive(Clone, Copy, Default)]
pub(super) struct Tally {
    pub(super) bytes: u64,
    inserts: u64,
    updates: u64,
    deletes: u64,
}

impl Tally {
    pub(super) fn row(&mut self, op: RowOp) {
        match op {
            RowOp::Insert => self.inserts += 1,
            RowOp::Update => self.updates += 1,
            RowOp::Delete => self.deletes += 1,
            RowOp::Truncate | RowOp::CopyStart => {}
        }
    }

    pub(super) fn inserts(rows: u64, bytes: u64) -> Self {
        Self { bytes, inserts: rows, updates: 0, deletes: 0 }
    }

    pub(super) fn add(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.inserts += other.inserts;
        self.updates += other.updates;
        self.deletes += other.deletes;
    }
}

/// Handles of one store, resolved once.
pub(super) struct StoreMetrics {
    rows: Counter,
    resolved: Counter,
    kinds: [Counter; 3],
    requests: Counter,
    bytes: Counter,
    batch_rows: Histogram,
    batch_bytes: Histogram,
    write: Histogram,
    queue: Histogram,
    prepare: Histogram,
    io: Histogram,
    total: Histogram,
    trims: Counter,
    files: Counter,
    big: Counter,
    big_size: Histogram,
}

impl StoreMetrics {
    pub(super) fn new() -> Self {
        let worker = |name: &'static str| histogram!(name, "db" => "1", "worker" => "1");
        Self {
            rows: counter!(INPUT_EVENTS, "type" => "kv"),
            resolved: counter!(INPUT_EVENTS, "type" => "resolved"),
            kinds: ["insert", "update", "delete"].map(|kind| counter!(KV_ENTRIES, "type" => kind)),
            requests: counter!(WRITE_REQUESTS),
            bytes: counter!(WRITE_BYTES),
            batch_rows: histogram!(WRITE_BATCH_EVENTS),
            batch_bytes: histogram!(WRITE_BATCH_SIZE),
            write: histogram!(WRITE_DURATION),
            queue: histogram!(WRITE_QUEUE_DURATION),
            prepare: histogram!(WRITE_PREPARE_DURATION),
            io: worker(WORKER_IO_DURATION),
            total: worker(WORKER_TOTAL_DURATION),
            trims: counter!(TRIMS),
            files: counter!(FILES_REMOVED),
            big: counter!(crate::metrics::BIG_TXNS),
            big_size: histogram!(crate::metrics::BIG_TXN_SIZE),
        }
    }

    /// Rows became visible.
    #[expect(clippy::cast_precision_loss, reason = "histograms hold floats")]
    pub(super) fn visible(&self, tally: &Tally) {
        let rows = tally.inserts + tally.updates + tally.deletes;
        self.rows.increment(rows);
        for (counter, count) in self.kinds.iter().zip([tally.inserts, tally.updates, tally.deletes]) {
            counter.increment(count);
        }
        self.requests.increment(1);
        self.bytes.increment(tally.bytes);
        self.batch_rows.record(rows as f64);
        self.batch_bytes.record(tally.bytes as f64);
    }

    /// A batch became visible after `queue`; chunks were made in `prepare` and shown in `write`.
    pub(super) fn published(
        &self,
        queue: Duration,
        prepare: Duration,
        write: Duration,
        since_last: Duration,
    ) {
        self.queue.record(queue);
        self.prepare.record(prepare);
        self.write.record(write);
        self.io.record(prepare + write);
        self.total.record(since_last);
    }

    pub(super) fn resolved(&self) {
        self.resolved.increment(1);
    }

    /// A transaction was committed.
    #[expect(clippy::cast_precision_loss, reason = "histograms hold floats")]
    pub(super) fn committed(&self, bytes: u64) {
        if bytes >= BIG_TXN {
            self.big.increment(1);
            self.big_size.record(bytes as f64);
        }
    }

    /// A segment file was written.
    pub(super) fn spilled(&self, took: Duration) {
        self.io.record(took);
    }

    /// Rows were dropped, and files with them.
    pub(super) fn trimmed(&self, files: usize) {
        self.trims.increment(1);
        self.files.increment(files as u64);
    }
}
