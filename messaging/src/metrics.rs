//! Metrics of the message bus.

use metrics::{Counter, counter, describe_counter};

/// Messages that could not be sent. Label: `type`, the error's name.
pub const ERRORS: &str = "ticdc_messaging_error_counter";
/// Messages dropped on receipt: no receiver, wrong type, unreadable. Label: `reason`.
pub const DROPPED: &str = "ticdc_messaging_drop_message_counter";

/// Describes every metric of this crate.
pub fn describe() {
    describe_counter!(ERRORS, "Messages that could not be sent");
    describe_counter!(DROPPED, "Messages dropped on receipt");
}

/// Handles resolved once per center.
#[derive(Clone)]
pub(crate) struct BusMetrics {
    pub(crate) congested: Counter,
    pub(crate) no_target: Counter,
    pub(crate) no_receiver: Counter,
    pub(crate) unreadable: Counter,
}

impl BusMetrics {
    pub(crate) fn new() -> Self {
        Self {
            congested: counter!(ERRORS, "type" => "MessageCongested"),
            no_target: counter!(ERRORS, "type" => "TargetNotFound"),
            no_receiver: counter!(DROPPED, "reason" => "no-receiver"),
            unreadable: counter!(DROPPED, "reason" => "unreadable"),
        }
    }
}
