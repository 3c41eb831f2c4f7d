//! Metrics of the event service, and the descriptions of everything on the log side.

use std::time::Duration;

use heartbeatpb::{ChangefeedId, WallTime};
use metrics::{
    Counter, Gauge, Histogram, counter, describe_counter, describe_gauge, describe_histogram, gauge,
    histogram,
};

/// Events sent to collectors. Labels: `type` (`kv`: rows; `resolved_ts`, `ddl`, `command`), `mode`.
pub const SENT: &str = "ticdc_event_service_send_event_count";
/// Seconds to hand one message with rows to the message center. Label: `type` (`txn`).
pub const SEND_DURATION: &str = "ticdc_event_service_send_event_duration";
/// Bytes that one turn of a stream found.
pub const SCANNED_BYTES: &str = "ticdc_event_service_scanned_dml_size";
/// Rows that one turn of a stream found.
pub const SCANNED: &str = "ticdc_event_service_scanned_count";
/// Transactions that one turn of a stream found.
pub const SCANNED_TXNS: &str = "ticdc_event_service_scanned_txn_count";
/// Seconds of one turn of a stream that found something.
pub const SCAN_DURATION: &str = "ticdc_event_service_scan_duration";
/// Turns of streams that found something.
pub const SCANS: &str = "ticdc_event_service_scan_task_count";
/// Streams that wait for their turn.
pub const PENDING_SCANS: &str = "ticdc_event_service_pending_scan_task_count";
/// Turns that were put off since as much was read from disk as may be.
pub const DROPPED_SCANS: &str = "ticdc_event_service_dropped_scan_task_count";
/// Turns that were put off for lack of room. Label: `reason` (`changefeed_quota`).
pub const SKIPPED_SCANS: &str = "ticdc_event_service_skip_scan_count";
/// Turns that ended before everything was sent.
pub const INTERRUPTED_SCANS: &str = "ticdc_event_service_interrupt_scan_count";
/// Turns that found nothing. Label: `mode`.
pub const EMPTY_SCANS: &str = "ticdc_event_service_skip_resolved_ts_count";
/// Resets of streams that had begun: a gap was detected.
pub const RESETS: &str = "ticdc_event_service_reset_dispatcher_count";
/// Transactions of a mebibyte or more that were read from an upstream.
pub const BIG_TXNS: &str = "ticdc_event_service_big_txn_count";
/// Bytes of those.
pub const BIG_TXN_SIZE: &str = "ticdc_event_service_big_txn_size";
/// Requests that wait for the event service. Label: `type` (`dispatcherInfo`).
pub const CHANNEL: &str = "ticdc_event_service_channel_size";
/// Seconds since the smallest position `received` from the upstream or `sent` to a dispatcher. Label: `type`.
pub const RESOLVED_LAG: &str = "ticdc_event_service_resolved_ts_lag";
/// Dispatchers that are served here. Label: `cluster`.
pub const DISPATCHERS: &str = "ticdc_event_service_dispatcher_count";
/// Dispatchers that are served here. Label: `status` (`total`).
pub const DISPATCHER_STATUS: &str = "ticdc_event_service_dispatcher_status_count";
/// Seconds between the position that was received and the one that a dispatcher was sent, of each every ten seconds.
pub const RESOLVED_DIFF: &str = "ticdc_event_service_dispatcher_update_resolved_ts_diff";
/// Bytes that may still be sent to the changefeed's dispatchers. Labels: `namespace`, `changefeed`.
pub const AVAILABLE: &str = "ticdc_event_service_available_memory_quota";
/// Smallest position that was sent to the changefeed's dispatchers. Labels: `namespace`, `changefeed`.
pub const BASE_TS: &str = "ticdc_event_service_scan_window_base_ts";
/// Events taken from event stores. Labels: `type` (`kv`, `resolved`), `mode`.
pub const OUTPUT_EVENTS: &str = "ticdc_event_store_output_event_count";
/// Looks for rows that found some.
pub const SCAN_REQUESTS: &str = "ticdc_event_store_scan_requests_count";
/// Bytes of rows that were found, and those of rows that were not wanted. Label: `type` (`scanned`, `skipped`).
pub const SCAN_BYTES: &str = "ticdc_event_store_scan_bytes";
/// Positions told to dispatchers.
pub const NOTIFIED: &str = "ticdc_event_store_notify_dispatcher_count";
/// Seconds to tell all dispatchers of the node how far they are.
pub const NOTIFY_DURATION: &str = "ticdc_event_store_notify_dispatcher_duration";
/// Seconds since the position at which a dispatcher asked to begin.
pub const REGISTER_LAG: &str = "ticdc_event_store_register_dispatcher_start_ts_lag";
/// Seconds since the newest position of the dispatcher's log, of each every ten seconds.
pub const SUBSCRIPTION_LAG: &str = "ticdc_event_store_subscription_resolved_ts_lag";
/// Seconds since the checkpoint of the dispatcher, behind which rows are dropped, of each every ten seconds.
pub const SUBSCRIPTION_GC_LAG: &str = "ticdc_event_store_subscription_data_gc_lag";
/// Tables whose rows are kept here.
pub const SUBSCRIPTIONS: &str = "ticdc_event_store_subscription_num";
/// Seconds since the smallest resolved position of the node's stores; 0 without any.
pub const STORE_LAG: &str = "ticdc_event_store_resolved_ts_lag";
/// Bytes of event stores on disk. Label: `id`.
pub const DISK_SIZE: &str = "ticdc_event_store_on_disk_data_size";
/// Bytes of event stores on disk that belong to transactions which the upstream has sent and not ended. Label: `id`.
pub const UNFINISHED_SIZE: &str = "ticdc_event_store_unfinished_txn_data_size";
/// Bytes of event stores in memory. Label: `id`.
pub const MEMORY_SIZE: &str = "ticdc_event_store_in_memory_data_size";
/// Share of its disk that a changefeed's event store has used; at 1 the upstream is not read. Labels: `namespace`, `changefeed`.
pub const DISK_RATIO: &str = "ticdc_event_store_disk_usage_ratio";
/// Seconds since the smallest resolved position of the node's log readers; 0 without any.
pub const PULLER_LAG: &str = "ticdc_log_puller_resolved_ts_lag";
/// Seconds since the smallest position up to which schemas are known; 0 without a changefeed.
pub const SCHEMA_LAG: &str = "ticdc_schema_store_resolved_ts_lag";
/// Tables whose shape is known.
pub const SCHEMA_TABLES: &str = "ticdc_schema_store_register_table_num";
/// Questions for a table's shape.
pub const TABLE_INFOS: &str = "ticdc_schema_store_get_table_info_count";
/// Seconds to answer one.
pub const TABLE_INFO_DURATION: &str = "ticdc_schema_store_get_table_info_duration";

/// Parts of initial copies that were written here for the node that makes the copy.
pub const COPIED_PARTS: &str = "ticdc_event_service_copied_part_count";

/// Describes every metric of this crate.
pub fn describe() {
    for (name, words) in [
        (SENT, "Events sent to collectors"),
        (SCANS, "Turns of streams that found something"),
        (DROPPED_SCANS, "Turns put off since as much was read from disk as may be"),
        (SKIPPED_SCANS, "Turns put off for lack of room"),
        (INTERRUPTED_SCANS, "Turns that ended before everything was sent"),
        (EMPTY_SCANS, "Turns that found nothing"),
        (RESETS, "Resets of streams that had begun"),
        (BIG_TXNS, "Transactions of a mebibyte or more"),
        (OUTPUT_EVENTS, "Events taken from event stores"),
        (SCAN_REQUESTS, "Looks for rows that found some"),
        (SCAN_BYTES, "Bytes of rows that were found, and of those that were not wanted"),
        (NOTIFIED, "Positions told to dispatchers"),
        (TABLE_INFOS, "Questions for a table's shape"),
        (COPIED_PARTS, "Parts of initial copies written for another node"),
    ] {
        describe_counter!(name, words);
    }
    for (name, words) in [
        (SEND_DURATION, "Seconds to hand one message with rows to the message center"),
        (SCANNED_BYTES, "Bytes that one turn of a stream found"),
        (SCANNED, "Rows that one turn of a stream found"),
        (SCANNED_TXNS, "Transactions that one turn of a stream found"),
        (SCAN_DURATION, "Seconds of one turn of a stream"),
        (BIG_TXN_SIZE, "Bytes of transactions of a mebibyte or more"),
        (RESOLVED_DIFF, "Seconds between the position received and the one that a dispatcher was sent"),
        (NOTIFY_DURATION, "Seconds to tell all dispatchers how far they are"),
        (REGISTER_LAG, "Seconds since the position at which a dispatcher asked to begin"),
        (SUBSCRIPTION_LAG, "Seconds since the newest position of the dispatcher's log"),
        (SUBSCRIPTION_GC_LAG, "Seconds since the checkpoint of the dispatcher"),
        (TABLE_INFO_DURATION, "Seconds to answer a question for a table's shape"),
    ] {
        describe_histogram!(name, words);
    }
    for (name, words) in [
        (PENDING_SCANS, "Streams that wait for their turn"),
        (CHANNEL, "Requests that wait for the event service"),
        (RESOLVED_LAG, "Seconds since the smallest position received or sent"),
        (DISPATCHERS, "Dispatchers that are served here"),
        (DISPATCHER_STATUS, "Dispatchers that are served here"),
        (AVAILABLE, "Bytes that may still be sent to the changefeed's dispatchers"),
        (BASE_TS, "Smallest position that was sent to the changefeed's dispatchers"),
        (SUBSCRIPTIONS, "Tables whose rows are kept here"),
        (STORE_LAG, "Seconds since the smallest resolved position of the node's stores"),
        (DISK_SIZE, "Bytes of event stores on disk"),
        (UNFINISHED_SIZE, "Bytes on disk of transactions that the upstream has sent and not ended"),
        (MEMORY_SIZE, "Bytes of event stores in memory"),
        (DISK_RATIO, "Share of its disk that a changefeed's event store has used"),
        (PULLER_LAG, "Seconds since the smallest resolved position of the node's log readers"),
        (SCHEMA_LAG, "Seconds since the smallest position up to which schemas are known"),
        (SCHEMA_TABLES, "Tables whose shape is known"),
    ] {
        describe_gauge!(name, words);
    }
    crate::event_store::metrics::describe();
    crate::collector_metrics::describe();
}

/// What one turn of a stream found.
#[derive(Clone, Copy, Default)]
pub(crate) struct Turn {
    pub(crate) chunks: u64,
    pub(crate) rows: u64,
    pub(crate) txns: u64,
    pub(crate) bytes: u64,
    /// Of rows that were not the stream's.
    pub(crate) skipped: u64,
}

/// How a turn ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum TurnEnd {
    Done,
    Interrupted,
    NoRoom,
    DiskBusy,
}

/// Handles of the event service, resolved once.
pub(crate) struct ServiceMetrics {
    rows: Counter,
    resolved: Counter,
    pub(crate) ddls: Counter,
    commands: Counter,
    send: Histogram,
    found: [Histogram; 4],
    scans: Counter,
    pending: Gauge,
    dropped: Counter,
    skipped: Counter,
    interrupted: Counter,
    empty: Counter,
    resets: Counter,
    waiting: Gauge,
    received_lag: Gauge,
    sent_lag: Gauge,
    dispatchers: [Gauge; 2],
    diff: Histogram,
    output: [Counter; 2],
    requests: Counter,
    scanned_bytes: [Counter; 2],
    notified: Counter,
    notify: Histogram,
    register_lag: Histogram,
    subscription_lag: Histogram,
    gc_lag: Histogram,
    subscriptions: Gauge,
    /// The store's, the reader's and that of the schemas: one log has them all.
    lags: [Gauge; 3],
    disk: Gauge,
    unfinished: Gauge,
    memory: Gauge,
    tables: Gauge,
    table_infos: Counter,
    table_info: Histogram,
    pub(crate) read_index: Histogram,
    pub(crate) read_disk: Histogram,
}

impl ServiceMetrics {
    pub(crate) fn new() -> Self {
        use crate::event_store::metrics::READ_DURATION;
        let sent = |kind| counter!(SENT, "type" => kind, "mode" => "default");
        let output = |kind| counter!(OUTPUT_EVENTS, "type" => kind, "mode" => "default");
        let [rows, resolved, ddls, commands] = ["kv", "resolved_ts", "ddl", "command"].map(sent);
        let metrics = Self {
            rows,
            resolved,
            ddls,
            commands,
            send: histogram!(SEND_DURATION, "type" => "txn"),
            found: [SCANNED, SCANNED_TXNS, SCANNED_BYTES, SCAN_DURATION].map(|name| histogram!(name)),
            scans: counter!(SCANS),
            pending: gauge!(PENDING_SCANS),
            dropped: counter!(DROPPED_SCANS),
            skipped: counter!(SKIPPED_SCANS, "reason" => "changefeed_quota"),
            interrupted: counter!(INTERRUPTED_SCANS),
            empty: counter!(EMPTY_SCANS, "mode" => "default"),
            resets: counter!(RESETS),
            waiting: gauge!(CHANNEL, "type" => "dispatcherInfo"),
            received_lag: gauge!(RESOLVED_LAG, "type" => "received"),
            sent_lag: gauge!(RESOLVED_LAG, "type" => "sent"),
            dispatchers: [
                gauge!(DISPATCHERS, "cluster" => "default"),
                gauge!(DISPATCHER_STATUS, "status" => "total"),
            ],
            diff: histogram!(RESOLVED_DIFF),
            output: ["kv", "resolved"].map(output),
            requests: counter!(SCAN_REQUESTS),
            scanned_bytes: ["scanned", "skipped"].map(|kind| counter!(SCAN_BYTES, "type" => kind)),
            notified: counter!(NOTIFIED),
            notify: histogram!(NOTIFY_DURATION),
            register_lag: histogram!(REGISTER_LAG),
            subscription_lag: histogram!(SUBSCRIPTION_LAG),
            gc_lag: histogram!(SUBSCRIPTION_GC_LAG),
            subscriptions: gauge!(SUBSCRIPTIONS),
            lags: [STORE_LAG, PULLER_LAG, SCHEMA_LAG].map(|name| gauge!(name)),
            disk: gauge!(DISK_SIZE, "id" => "1"),
            unfinished: gauge!(UNFINISHED_SIZE, "id" => "1"),
            memory: gauge!(MEMORY_SIZE, "id" => "1"),
            tables: gauge!(SCHEMA_TABLES),
            table_infos: counter!(TABLE_INFOS),
            table_info: histogram!(TABLE_INFO_DURATION),
            read_index: histogram!(READ_DURATION, "type" => "first"),
            read_disk: histogram!(READ_DURATION, "type" => "next"),
        };
        // Only large transactions are counted: what never happens is seen to be 0.
        counter!(BIG_TXNS).increment(0);
        metrics
    }

    /// Rows left in one message.
    pub(crate) fn sent(&self, rows: u64, took: Duration) {
        self.rows.increment(rows);
        self.output[0].increment(rows);
        self.send.record(took);
    }

    /// A stream had its turn.
    #[expect(clippy::cast_precision_loss, reason = "histograms hold floats")]
    pub(crate) fn turn(&self, turn: &Turn, end: TurnEnd, took: Duration) {
        match end {
            TurnEnd::Done if turn.chunks == 0 => self.empty.increment(1),
            TurnEnd::Done => {}
            TurnEnd::Interrupted => self.interrupted.increment(1),
            TurnEnd::NoRoom => self.skipped.increment(1),
            TurnEnd::DiskBusy => self.dropped.increment(1),
        }
        if turn.chunks > 0 {
            self.scans.increment(1);
            self.requests.increment(turn.chunks);
            self.scanned_bytes[0].increment(turn.bytes);
            self.scanned_bytes[1].increment(turn.skipped);
            let found = [turn.rows as f64, turn.txns as f64, turn.bytes as f64, took.as_secs_f64()];
            for (histogram, value) in self.found.iter().zip(found) {
                histogram.record(value);
            }
        }
    }

    /// Dispatchers were told how far they are.
    pub(crate) fn notified(&self, dispatchers: usize, took: Duration) {
        if dispatchers > 0 {
            self.resolved.increment(dispatchers as u64);
            self.output[1].increment(dispatchers as u64);
            self.notified.increment(dispatchers as u64);
            self.notify.record(took);
        }
    }

    /// A dispatcher registered to begin at a position of that time, if it is known.
    pub(crate) fn registered(&self, start: Option<WallTime>) {
        self.commands.increment(1);
        if let Some(start) = start {
            self.register_lag.record(start.seconds_until(WallTime::now()).max(0.0));
        }
    }

    /// A stream begins, perhaps again; its table's shape was found in `took`.
    pub(crate) fn began(&self, took: Duration, again: bool) {
        self.commands.increment(1);
        self.table_infos.increment(1);
        self.table_info.record(took);
        if again {
            self.resets.increment(1);
        }
    }

    /// How far one dispatcher is: seconds since the newest position of its log, since what it was sent, and since its
    /// checkpoint.
    pub(crate) fn dispatcher(&self, received: f64, sent: Option<f64>, checkpoint: Option<f64>) {
        self.subscription_lag.record(received);
        if let Some(sent) = sent {
            self.diff.record((sent - received).max(0.0));
        }
        if let Some(checkpoint) = checkpoint {
            self.gc_lag.record(checkpoint);
        }
    }

    /// What there is.
    #[expect(clippy::cast_precision_loss, reason = "counts for people")]
    pub(crate) fn sizes(&self, sizes: &Sizes) {
        self.waiting.set(sizes.waiting as f64);
        self.pending.set(sizes.pending as f64);
        self.dispatchers.iter().for_each(|gauge| gauge.set(sizes.dispatchers as f64));
        self.subscriptions.set(sizes.tables as f64);
        self.tables.set(sizes.tables as f64);
        self.disk.set(sizes.disk as f64);
        self.unfinished.set(sizes.unfinished as f64);
        self.memory.set(sizes.memory as f64);
        self.lags.iter().for_each(|gauge| gauge.set(sizes.received_lag));
        self.received_lag.set(sizes.received_lag);
        self.sent_lag.set(sizes.sent_lag.max(sizes.received_lag));
    }
}

/// Totals of a node.
#[derive(Clone, Copy, Default)]
pub(crate) struct Sizes {
    pub(crate) waiting: usize,
    pub(crate) pending: usize,
    pub(crate) dispatchers: usize,
    pub(crate) tables: usize,
    pub(crate) disk: u64,
    pub(crate) unfinished: u64,
    pub(crate) memory: usize,
    /// Largest of the changefeeds, in seconds.
    pub(crate) received_lag: f64,
    /// Largest of the dispatchers, in seconds.
    pub(crate) sent_lag: f64,
}

/// Handles of one changefeed.
pub(crate) struct FeedMetrics {
    available: Gauge,
    base: Gauge,
    disk: Gauge,
}

impl FeedMetrics {
    pub(crate) fn new(changefeed: &ChangefeedId) -> Self {
        let of = |name: &'static str| gauge!(name, "namespace" => changefeed.keyspace.to_string(), "changefeed" => changefeed.name.to_string());
        Self { available: of(AVAILABLE), base: of(BASE_TS), disk: of(DISK_RATIO) }
    }

    /// Room at the receivers, the smallest position that was sent, and the share of the disk in use.
    #[expect(clippy::cast_precision_loss, reason = "numbers for people")]
    pub(crate) fn set(&self, available: u64, base: Option<u64>, disk: f64) {
        self.available.set(available as f64);
        if let Some(base) = base {
            self.base.set(base as f64);
        }
        self.disk.set(disk);
    }
}
