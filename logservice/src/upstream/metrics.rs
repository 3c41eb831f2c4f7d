//! Metrics of log readers.

use metrics::{Counter, Unit, counter, describe_counter};

/// Entries received from the upstream, by `type`: `event` (rows) and `resolved_ts`.
pub const PULL_EVENT_COUNT: &str = "ticdc_kvclient_pull_event_count";

/// Tells the recorder what the metrics mean.
pub fn describe() {
    describe_counter!(
        PULL_EVENT_COUNT,
        Unit::Count,
        "Rows and resolved timestamps received from the upstream"
    );
}

/// Handles of one reader, resolved once.
pub(crate) struct ReaderMetrics {
    pub(crate) rows: Counter,
    pub(crate) resolved: Counter,
}

impl ReaderMetrics {
    /// The handles; a counter is the node's, whichever changefeed counts.
    pub(crate) fn new() -> Self {
        Self {
            rows: counter!(PULL_EVENT_COUNT, "type" => "event"),
            resolved: counter!(PULL_EVENT_COUNT, "type" => "resolved_ts"),
        }
    }
}
