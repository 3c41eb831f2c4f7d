//! Series of dispatcher managers; names are public API. They go with the last copy of `ManagerMetrics`.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use event::{BlockEvent, DdlKind};
use heartbeatpb::{ChangefeedId, Ts, WallTime, Watermark};
use metrics::{
    Counter, Gauge, Histogram, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge,
    histogram,
};

/// Dispatcher managers of this node. Labels: `namespace`, `changefeed`.
pub const MANAGER_COUNT: &str = "ticdc_dispatchermanagermanager_event_dispatcher_manager_count";
/// Table triggers. Labels: `namespace`, `changefeed`, `event_type`.
pub const TRIGGER_COUNT: &str = "ticdc_dispatchermanager_table_trigger_dispatcher_count";
/// Dispatchers of tables. Labels: `namespace`, `changefeed`, `event_type`.
pub const DISPATCHER_COUNT: &str = "ticdc_dispatchermanager_table_dispatcher_count";
/// Smallest resolved ts of the node's dispatchers. Labels: `namespace`, `changefeed`.
pub const RESOLVED_TS: &str = "ticdc_dispatchermanager_resolved_ts";
/// Seconds since it. Labels: `namespace`, `changefeed`.
pub const RESOLVED_TS_LAG: &str = "ticdc_dispatchermanager_resolved_ts_lag";
/// Smallest checkpoint of the node's dispatchers. Labels: `namespace`, `changefeed`.
pub const CHECKPOINT_TS: &str = "ticdc_dispatchermanager_checkpoint_ts";
/// Seconds since it. Labels: `namespace`, `changefeed`.
pub const CHECKPOINT_TS_LAG: &str = "ticdc_dispatchermanager_checkpoint_ts_lag";
/// Block statuses that wait to be sent. Labels: `namespace`, `changefeed`.
pub const BLOCK_STATUSES: &str = "ticdc_dispatchermanager_block_statuses_chan_len";
/// Block statuses of the whole node that wait to be sent.
pub const BLOCK_STATUS_QUEUE: &str = "ticdc_heartbeat_collector_block_status_request_queue_len";
/// Seconds to create one dispatcher. Labels: `namespace`, `changefeed`, `event_type`.
pub const CREATE_DISPATCHER_DURATION: &str = "ticdc_sink_create_dispatcher_duration";
/// Schedule requests received. Labels: `namespace`, `changefeed`, `type`.
pub const HANDLE_DISPATCHER_REQUEST: &str = "ticdc_sink_handle_dispatcher_request";
/// Seconds of one successful DDL downstream. Labels: `namespace`, `changefeed`.
pub const DDL_EXEC_DURATION: &str = "ticdc_ddl_exec_duration";
/// DDLs being executed. Labels: `namespace`, `changefeed`.
pub const DDL_EXEC_RUNNING: &str = "ticdc_ddl_exec_running";
/// DDLs that were executed. Labels: `namespace`, `changefeed`, `ddl_type`.
pub const DDL_EXECUTION: &str = "ticdc_ddl_execution";
/// Seconds from the arrival of a DDL at a dispatcher until the dispatcher has passed it, to within a heartbeat. Labels: `namespace`, `changefeed`.
pub const DDL_HANDLE_DURATION: &str = "ticdc_ddl_handle_duration";
/// Events taken at once. Labels: `module`, `area` (keyspace and name of the changefeed).
pub const BATCH_COUNT: &str = "ticdc_dynamic_stream_batch_count";
/// Bytes of rows taken at once. Labels: `module`, `area`.
pub const BATCH_BYTES: &str = "ticdc_dynamic_stream_batch_bytes";
/// Seconds to hand the events taken at once to their dispatchers. Labels: `module`, `area`.
pub const BATCH_DURATION: &str = "ticdc_dynamic_stream_batch_duration";

/// What a DDL is called in a label, by its kind.
const DDL_TYPES: [&str; 8] = [
    "create schema",
    "drop schema",
    "create table",
    "drop table",
    "rename table",
    "alter table",
    "truncate table",
    "other",
];

/// Describes every series of this crate to the recorder.
pub fn describe() {
    describe_gauge!(MANAGER_COUNT, "Dispatcher managers of this node");
    describe_gauge!(TRIGGER_COUNT, "Table triggers of this node");
    describe_gauge!(DISPATCHER_COUNT, "Dispatchers of tables on this node");
    describe_gauge!(RESOLVED_TS, "Smallest resolved ts of the node's dispatchers");
    describe_gauge!(RESOLVED_TS_LAG, Unit::Seconds, "Time since the smallest resolved ts");
    describe_gauge!(CHECKPOINT_TS, "Smallest checkpoint of the node's dispatchers");
    describe_gauge!(CHECKPOINT_TS_LAG, Unit::Seconds, "Time since the smallest checkpoint");
    describe_gauge!(BLOCK_STATUSES, "Block statuses that wait to be sent");
    describe_gauge!(BLOCK_STATUS_QUEUE, "Block statuses of the whole node that wait to be sent");
    describe_histogram!(CREATE_DISPATCHER_DURATION, Unit::Seconds, "Creation of one dispatcher");
    describe_counter!(HANDLE_DISPATCHER_REQUEST, "Schedule requests received");
    describe_histogram!(DDL_EXEC_DURATION, Unit::Seconds, "Execution of one DDL downstream");
    describe_gauge!(DDL_EXEC_RUNNING, "DDLs being executed downstream");
    describe_counter!(DDL_EXECUTION, "DDLs that were executed downstream");
    describe_histogram!(DDL_HANDLE_DURATION, Unit::Seconds, "A DDL from its arrival until it was passed");
    describe_histogram!(BATCH_COUNT, "Events taken at once");
    describe_histogram!(BATCH_BYTES, Unit::Bytes, "Bytes of rows taken at once");
    describe_histogram!(
        BATCH_DURATION,
        Unit::Seconds,
        "Handing the events taken at once to their dispatchers"
    );
}

/// Handles resolved once per manager; the copies are one.
#[derive(Clone)]
pub(crate) struct ManagerMetrics(Arc<Handles>);

struct Handles {
    managers: Gauge,
    triggers: Gauge,
    dispatchers: Gauge,
    resolved_ts: Gauge,
    resolved_lag: Gauge,
    checkpoint_ts: Gauge,
    checkpoint_lag: Gauge,
    block_statuses: Gauge,
    /// The node's, of which `waiting` are this manager's.
    block_queue: Gauge,
    waiting: AtomicUsize,
    create_duration: Histogram,
    requests: Counter,
    ddl_duration: Histogram,
    ddl_running: Gauge,
    ddl_handle: Histogram,
    ddls: [Counter; 8],
    batch_count: Histogram,
    batch_bytes: Histogram,
    batch_duration: Histogram,
}

impl Drop for Handles {
    fn drop(&mut self) {
        self.managers.decrement(1);
        self.block_queue.decrement(count(self.waiting.load(Ordering::Relaxed)));
    }
}

impl ManagerMetrics {
    /// Resolves the series of a changefeed and counts its manager.
    pub(crate) fn new(changefeed: &ChangefeedId) -> Self {
        let labels =
            [("namespace", changefeed.keyspace.to_string()), ("changefeed", changefeed.name.to_string())];
        let with = |name: &'static str, value: &'static str| {
            let [ns, feed] = labels.clone();
            [ns, feed, (name, value.to_owned())]
        };
        let of_events = with("event_type", "eventDispatcher");
        let area = [("module", "event-collector".to_owned()), ("area", changefeed.to_string())];
        let handles = Handles {
            managers: gauge!(MANAGER_COUNT, &labels),
            triggers: gauge!(TRIGGER_COUNT, &of_events),
            dispatchers: gauge!(DISPATCHER_COUNT, &of_events),
            resolved_ts: gauge!(RESOLVED_TS, &labels),
            resolved_lag: gauge!(RESOLVED_TS_LAG, &labels),
            checkpoint_ts: gauge!(CHECKPOINT_TS, &labels),
            checkpoint_lag: gauge!(CHECKPOINT_TS_LAG, &labels),
            block_statuses: gauge!(BLOCK_STATUSES, &labels),
            block_queue: gauge!(BLOCK_STATUS_QUEUE),
            waiting: AtomicUsize::new(0),
            create_duration: histogram!(CREATE_DISPATCHER_DURATION, &of_events),
            requests: counter!(HANDLE_DISPATCHER_REQUEST, &with("type", "receive")),
            ddl_duration: histogram!(DDL_EXEC_DURATION, &labels),
            ddl_running: gauge!(DDL_EXEC_RUNNING, &labels),
            ddl_handle: histogram!(DDL_HANDLE_DURATION, &labels),
            ddls: DDL_TYPES.map(|kind| counter!(DDL_EXECUTION, &with("ddl_type", kind))),
            batch_count: histogram!(BATCH_COUNT, &area),
            batch_bytes: histogram!(BATCH_BYTES, &area),
            batch_duration: histogram!(BATCH_DURATION, &area),
        };
        handles.managers.increment(1);
        Self(Arc::new(handles))
    }

    /// A schedule request came in.
    pub(crate) fn request(&self) {
        self.0.requests.increment(1);
    }

    /// A dispatcher was opened downstream.
    pub(crate) fn created(&self, took: Duration) {
        self.0.create_duration.record(took.as_secs_f64());
    }

    /// A block event begins downstream.
    pub(crate) fn ddl_started(&self) {
        self.0.ddl_running.increment(1);
    }

    /// A block event ended downstream.
    pub(crate) fn ddl_ended(&self, event: &BlockEvent, took: Duration, ok: bool) {
        self.0.ddl_running.decrement(1);
        if let (BlockEvent::Ddl(ddl), true) = (event, ok) {
            self.0.ddl_duration.record(took.as_secs_f64());
            self.0.ddls[ddl_type(ddl.kind)].increment(1);
        }
    }

    /// A dispatcher has passed a DDL.
    pub(crate) fn ddl_passed(&self, took: Duration) {
        self.0.ddl_handle.record(took.as_secs_f64());
    }

    /// Events were taken at once and handed to their dispatchers.
    #[expect(clippy::cast_precision_loss, reason = "histograms hold floats")]
    pub(crate) fn batch(&self, events: usize, bytes: usize, took: Duration) {
        self.0.batch_count.record(events as f64);
        self.0.batch_bytes.record(bytes as f64);
        self.0.batch_duration.record(took.as_secs_f64());
    }

    /// How many dispatchers there are, and what waits.
    pub(crate) fn sizes(&self, triggers: usize, tables: usize, block_statuses: usize) {
        self.0.triggers.set(count(triggers));
        self.0.dispatchers.set(count(tables));
        self.0.block_statuses.set(count(block_statuses));
        let before = self.0.waiting.swap(block_statuses, Ordering::Relaxed);
        self.0.block_queue.increment(count(block_statuses) - count(before));
    }

    /// The watermark of a heartbeat; a lag whose wall time is not known stays as it was.
    #[expect(clippy::cast_precision_loss, reason = "gauges are floats")]
    pub(crate) fn watermark(
        &self,
        watermark: Watermark,
        now: WallTime,
        time_of: impl Fn(Ts) -> Option<WallTime>,
    ) {
        if watermark.checkpoint == Ts::MAX {
            return;
        }
        self.0.checkpoint_ts.set(watermark.checkpoint.0 as f64);
        self.0.resolved_ts.set(watermark.resolved.0 as f64);
        if let Some(time) = time_of(watermark.checkpoint) {
            self.0.checkpoint_lag.set(time.seconds_until(now).max(0.0));
        }
        if let Some(time) = time_of(watermark.resolved) {
            self.0.resolved_lag.set(time.seconds_until(now).max(0.0));
        }
    }
}

/// Place of a kind in [`DDL_TYPES`].
fn ddl_type(kind: DdlKind) -> usize {
    // A kind that is not known here is another one.
    match kind {
        DdlKind::CreateSchema => 0,
        DdlKind::DropSchema => 1,
        DdlKind::CreateTable => 2,
        DdlKind::DropTable => 3,
        DdlKind::RenameTable => 4,
        DdlKind::AlterTable => 5,
        DdlKind::TruncateTable => 6,
        DdlKind::Other | _ => 7,
    }
}

#[expect(clippy::cast_precision_loss, reason = "gauges are floats")]
fn count(n: usize) -> f64 {
    n as f64
}
