//! Series of dispatcher managers; names are public API.

use std::time::Duration;

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
/// Seconds to create one dispatcher. Labels: `namespace`, `changefeed`, `event_type`.
pub const CREATE_DISPATCHER_DURATION: &str = "ticdc_sink_create_dispatcher_duration";
/// Schedule requests received. Labels: `namespace`, `changefeed`, `type`.
pub const HANDLE_DISPATCHER_REQUEST: &str = "ticdc_sink_handle_dispatcher_request";
/// Seconds of one successful DDL downstream. Labels: `namespace`, `changefeed`.
pub const DDL_EXEC_DURATION: &str = "ticdc_ddl_exec_duration";
/// DDLs being executed. Labels: `namespace`, `changefeed`.
pub const DDL_EXEC_RUNNING: &str = "ticdc_ddl_exec_running";

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
    describe_histogram!(CREATE_DISPATCHER_DURATION, Unit::Seconds, "Creation of one dispatcher");
    describe_counter!(HANDLE_DISPATCHER_REQUEST, "Schedule requests received");
    describe_histogram!(DDL_EXEC_DURATION, Unit::Seconds, "Execution of one DDL downstream");
    describe_gauge!(DDL_EXEC_RUNNING, "DDLs being executed downstream");
}

/// Handles resolved once per manager.
#[derive(Clone)]
pub(crate) struct ManagerMetrics {
    managers: Gauge,
    triggers: Gauge,
    dispatchers: Gauge,
    resolved_ts: Gauge,
    resolved_lag: Gauge,
    checkpoint_ts: Gauge,
    checkpoint_lag: Gauge,
    block_statuses: Gauge,
    create_duration: Histogram,
    requests: Counter,
    ddl_duration: Histogram,
    ddl_running: Gauge,
}

impl ManagerMetrics {
    /// Resolves the series of a changefeed and counts its manager.
    pub(crate) fn new(changefeed: &ChangefeedId) -> Self {
        let ns = changefeed.keyspace.to_string();
        let name = changefeed.name.to_string();
        let of_feed =
            |series: &'static str| gauge!(series, "namespace" => ns.clone(), "changefeed" => name.clone());
        let of_events = |series: &'static str| gauge!(series, "namespace" => ns.clone(), "changefeed" => name.clone(), "event_type" => "eventDispatcher");
        let metrics = Self {
            managers: of_feed(MANAGER_COUNT),
            triggers: of_events(TRIGGER_COUNT),
            dispatchers: of_events(DISPATCHER_COUNT),
            resolved_ts: of_feed(RESOLVED_TS),
            resolved_lag: of_feed(RESOLVED_TS_LAG),
            checkpoint_ts: of_feed(CHECKPOINT_TS),
            checkpoint_lag: of_feed(CHECKPOINT_TS_LAG),
            block_statuses: of_feed(BLOCK_STATUSES),
            create_duration: histogram!(CREATE_DISPATCHER_DURATION, "namespace" => ns.clone(), "changefeed" => name.clone(), "event_type" => "eventDispatcher"),
            requests: counter!(HANDLE_DISPATCHER_REQUEST, "namespace" => ns.clone(), "changefeed" => name.clone(), "type" => "receive"),
            ddl_duration: histogram!(DDL_EXEC_DURATION, "namespace" => ns.clone(), "changefeed" => name.clone()),
            ddl_running: of_feed(DDL_EXEC_RUNNING),
        };
        metrics.managers.increment(1);
        metrics
    }

    /// A schedule request came in.
    pub(crate) fn request(&self) {
        self.requests.increment(1);
    }

    /// A dispatcher was opened downstream.
    pub(crate) fn created(&self, took: Duration) {
        self.create_duration.record(took.as_secs_f64());
    }

    /// A DDL begins.
    pub(crate) fn ddl_started(&self) {
        self.ddl_running.increment(1);
    }

    /// A DDL ended.
    pub(crate) fn ddl_ended(&self, took: Duration, ok: bool) {
        self.ddl_running.decrement(1);
        if ok {
            self.ddl_duration.record(took.as_secs_f64());
        }
    }

    /// How many dispatchers there are, and what waits.
    pub(crate) fn sizes(&self, triggers: usize, tables: usize, block_statuses: usize) {
        self.triggers.set(count(triggers));
        self.dispatchers.set(count(tables));
        self.block_statuses.set(count(block_statuses));
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
        self.checkpoint_ts.set(watermark.checkpoint.0 as f64);
        self.resolved_ts.set(watermark.resolved.0 as f64);
        if let Some(time) = time_of(watermark.checkpoint) {
            self.checkpoint_lag.set(time.seconds_until(now).max(0.0));
        }
        if let Some(time) = time_of(watermark.resolved) {
            self.resolved_lag.set(time.seconds_until(now).max(0.0));
        }
    }

    /// The manager ends.
    pub(crate) fn closed(&self) {
        self.managers.decrement(1);
        self.sizes(0, 0, 0);
        self.ddl_running.set(0.0);
    }
}

#[expect(clippy::cast_precision_loss, reason = "gauges are floats")]
fn count(n: usize) -> f64 {
    n as f64
}
