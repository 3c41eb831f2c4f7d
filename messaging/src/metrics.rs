//! Metrics of the message bus.

use metrics::{Counter, Gauge, counter, describe_counter, describe_gauge, gauge};

use crate::StreamClass;

/// Messages accepted for sending, to the own node too. Label: `type`, `event` or `command`.
pub const SENT: &str = "ticdc_messaging_send_message_counter";
/// Messages queued for a receiver of this node. Label: `type`, `event` or `command`.
pub const RECEIVED: &str = "ticdc_messaging_receive_message_counter";
/// Messages dropped on receipt, or with their peer. Labels: `type`, `event` or `command`; `reason`.
pub const DROPPED: &str = "ticdc_messaging_drop_message_counter";
/// Messages that could not be sent. Labels: `type`; `message`, `message_congested` or `error`.
pub const ERRORS: &str = "ticdc_messaging_error_counter";
/// Messages that wait for their receiver. Label: `type`, `event` or `command`.
pub const WAITING: &str = "ticdc_messaging_receive_channel_length";
/// Messages that took more than 100 ms to handle. Label: `type`, the message's name.
pub const SLOW: &str = "ticdc_messaging_slow_handle_counter";

/// Open streams to other nodes. Label: `from`, the other node.
pub const STREAMS: &str = "ticdc_messaging_stream_gauge";

/// Describes every metric of this crate.
pub fn describe() {
    describe_counter!(SENT, "Messages accepted for sending");
    describe_counter!(RECEIVED, "Messages queued for a receiver of this node");
    describe_counter!(DROPPED, "Messages dropped on receipt, or with their peer");
    describe_counter!(ERRORS, "Messages that could not be sent");
    describe_gauge!(WAITING, "Messages that wait for their receiver");
    describe_counter!(SLOW, "Messages that took more than 100 ms to handle");
    describe_gauge!(STREAMS, "Open streams to other nodes");
}

/// Counts a message that was handled slowly; rare, so the handle is looked up.
pub(crate) fn count_slow(name: &'static str) {
    counter!(SLOW, "type" => name).increment(1);
}

/// Why a received message was dropped.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Drop {
    NoReceiver,
    Unknown,
    Unreadable,
    Misaddressed,
    Late,
    #[cfg(feature = "grpc")]
    PeerAway,
}

/// Handles of one stream class.
#[derive(Clone)]
pub(crate) struct ClassMetrics {
    pub(crate) sent: Counter,
    pub(crate) received: Counter,
    pub(crate) congested: Counter,
    pub(crate) waiting: Gauge,
    no_receiver: Counter,
    unknown: Counter,
    unreadable: Counter,
    misaddressed: Counter,
    late: Counter,
    #[cfg(feature = "grpc")]
    peer_away: Counter,
}

impl ClassMetrics {
    fn new(class: StreamClass) -> Self {
        let name = class.as_str();
        let dropped = |reason: &'static str| counter!(DROPPED, "type" => name, "reason" => reason);
        Self {
            sent: counter!(SENT, "type" => name),
            received: counter!(RECEIVED, "type" => name),
            congested: counter!(ERRORS, "type" => name, "message" => "message_congested"),
            waiting: gauge!(WAITING, "type" => name),
            no_receiver: dropped("no-receiver"),
            unknown: dropped("unknown-type"),
            unreadable: dropped("unreadable"),
            misaddressed: dropped("misaddressed"),
            late: dropped("late"),
            #[cfg(feature = "grpc")]
            peer_away: dropped("peer-away"),
        }
    }

    pub(crate) fn dropped(&self, reason: Drop, count: usize) {
        let counter = match reason {
            Drop::NoReceiver => &self.no_receiver,
            Drop::Unknown => &self.unknown,
            Drop::Unreadable => &self.unreadable,
            Drop::Misaddressed => &self.misaddressed,
            Drop::Late => &self.late,
            #[cfg(feature = "grpc")]
            Drop::PeerAway => &self.peer_away,
        };
        counter.increment(count as u64);
    }
}

/// Handles resolved once per center.
#[derive(Clone)]
pub(crate) struct BusMetrics {
    event: ClassMetrics,
    command: ClassMetrics,
    pub(crate) errors: Counter,
}

impl BusMetrics {
    pub(crate) fn new() -> Self {
        Self {
            event: ClassMetrics::new(StreamClass::Event),
            command: ClassMetrics::new(StreamClass::Command),
            errors: counter!(ERRORS, "type" => "message", "message" => "error"),
        }
    }

    pub(crate) fn of(&self, class: StreamClass) -> &ClassMetrics {
        match class {
            StreamClass::Event => &self.event,
            StreamClass::Command => &self.command,
        }
    }
}

/// Handles of one peer of a network.
#[cfg(feature = "grpc")]
pub(crate) struct TransportMetrics {
    streams: Gauge,
    classes: BusMetrics,
}

#[cfg(feature = "grpc")]
impl TransportMetrics {
    pub(crate) fn new(peer: &heartbeatpb::NodeId) -> Self {
        Self { streams: gauge!(STREAMS, "from" => peer.as_str().to_owned()), classes: BusMetrics::new() }
    }

    /// A stream to the peer works.
    pub(crate) fn opened(&self) {
        self.streams.increment(1.0);
    }

    /// A stream to the peer that worked does not any more.
    pub(crate) fn closed(&self) {
        self.streams.decrement(1.0);
    }

    /// Messages for the peer were dropped.
    pub(crate) fn dropped(&self, class: StreamClass, count: usize) {
        self.classes.of(class).dropped(Drop::PeerAway, count);
    }
}
