//! Metrics of the event collector.

use std::time::Duration;

use heartbeatpb::{ChangefeedId, WallTime};
use metrics::{
    Counter, Gauge, Histogram, counter, describe_counter, describe_gauge, describe_histogram, gauge,
    histogram,
};

/// Events handed to dispatchers. Labels: `type` (`KVEvent`: rows; `ResolvedTs`), `event_type`.
pub const RECEIVED: &str = "ticdc_dispatcher_received_event_count";
/// Dispatchers whose streams are received here.
pub const REGISTERED: &str = "ticdc_dispatcher_event_collector_registered_dispatcher_count";
/// Seconds from the commit upstream until its rows or its position arrived here. Label: `type` (`Msg`).
pub const RECEIVED_LAG: &str = "ticdc_dispatcher_received_event_lag_duration";
/// Seconds to hand on one message.
pub const HANDLE_DURATION: &str = "ticdc_event_collector_handle_event_duration";
/// Events that were lost or found no room: each begins a stream again.
pub const DROPPED: &str = "ticdc_event_collector_dropped_event_count";
/// Bytes of rows that were received and not flushed, and how many there may be. Labels: `module`, `type` (`max`, `used`), `namespace`, `area` (the changefeed's name).
pub const MEMORY_USAGE: &str = "ticdc_dynamic_stream_memory_usage";
/// Messages that wait for a module. Label: `module`.
pub const CHANNEL: &str = "ticdc_dynamic_stream_event_chan_size";
/// Events that wait for dispatcher managers. Label: `module`.
pub const PENDING: &str = "ticdc_dynamic_stream_pending_queue_len";

const MODULE: &str = "event-collector";

pub(crate) fn describe() {
    describe_counter!(RECEIVED, "Events handed to dispatchers");
    describe_gauge!(REGISTERED, "Dispatchers whose streams are received here");
    describe_histogram!(RECEIVED_LAG, "Seconds from the commit upstream until it arrived here");
    describe_histogram!(HANDLE_DURATION, "Seconds to hand on one message");
    describe_counter!(DROPPED, "Events that were lost or found no room");
    describe_gauge!(
        MEMORY_USAGE,
        "Bytes of rows that were received and not flushed, and how many there may be"
    );
    describe_gauge!(CHANNEL, "Messages that wait");
    describe_gauge!(PENDING, "Events that wait for dispatcher managers");
}

/// Handles of the collector, resolved once.
pub(super) struct CollectorMetrics {
    pub(super) rows: Counter,
    pub(super) resolved: Counter,
    pub(super) dropped: Counter,
    registered: Gauge,
    waiting: Gauge,
    pending: Gauge,
    lag: Histogram,
    handle: Histogram,
}

impl CollectorMetrics {
    pub(super) fn new() -> Self {
        let received = |kind| counter!(RECEIVED, "type" => kind, "event_type" => "eventDispatcher");
        Self {
            rows: received("KVEvent"),
            resolved: received("ResolvedTs"),
            dropped: counter!(DROPPED),
            registered: gauge!(REGISTERED),
            waiting: gauge!(CHANNEL, "module" => MODULE),
            pending: gauge!(PENDING, "module" => MODULE),
            lag: histogram!(RECEIVED_LAG, "type" => "Msg"),
            handle: histogram!(HANDLE_DURATION),
        }
    }

    pub(super) fn handled(&self, took: Duration) {
        self.handle.record(took);
    }

    /// Something arrived that was committed upstream at `time`.
    pub(super) fn arrived(&self, time: WallTime) {
        if time != WallTime::default() {
            self.lag.record(time.seconds_until(WallTime::now()).max(0.0));
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "counts for people")]
    pub(super) fn waiting(&self, messages: usize) {
        self.waiting.set(messages as f64);
    }

    #[expect(clippy::cast_precision_loss, reason = "counts for people")]
    pub(super) fn sizes(&self, streams: usize, pending: usize) {
        self.registered.set(streams as f64);
        self.pending.set(pending as f64);
    }
}

/// Handles of one changefeed.
pub(super) struct FeedMetrics {
    max: Gauge,
    used: Gauge,
}

impl FeedMetrics {
    pub(super) fn new(changefeed: &ChangefeedId) -> Self {
        let of = |kind: &'static str| {
            gauge!(MEMORY_USAGE, "module" => MODULE, "type" => kind,
                "namespace" => changefeed.keyspace.to_string(), "area" => changefeed.name.to_string())
        };
        Self { max: of("max"), used: of("used") }
    }

    #[expect(clippy::cast_precision_loss, reason = "bytes for people")]
    pub(super) fn memory(&self, max: u64, used: u64) {
        self.max.set(max as f64);
        self.used.set(used as f64);
    }
}
