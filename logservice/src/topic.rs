//! Topics of the data plane: registration and progress one way, events the other (dataplane §3.1).
//!
//! The messages are Millrace's own (type numbers from 1000): rows travel in our own form. On one node they
//! pass by reference; between nodes they are encoded by `wire.rs`.

use std::sync::Arc;

use bytes::Bytes;
use event::{DdlEvent, RowBatch, TableInfo};
use heartbeatpb::{ChangefeedId, DecodeError, DispatcherId, Gid, TableSpan, Ts, WallTime};
use messaging::{StreamClass, Topic, WireMessage};

use crate::event_store::Position;
use crate::wire;

/// Requests of collectors to the event service of a node.
#[derive(Debug)]
pub enum EventServiceTopic {}

impl Topic for EventServiceTopic {
    const NAME: &'static str = "EventServiceTopic";
    const CLASS: StreamClass = StreamClass::Command;
    type Message = ToEventService;
}

/// Events for the collector of a node.
#[derive(Debug)]
pub enum EventCollectorTopic {}

impl Topic for EventCollectorTopic {
    const NAME: &'static str = "event-collector";
    const CLASS: StreamClass = StreamClass::Event;
    type Message = ToEventCollector;
}

/// Progress of one dispatcher, as the event service may forget what is behind it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DispatcherProgress {
    /// The dispatcher.
    pub dispatcher: DispatcherId,
    /// Epoch of its stream.
    pub epoch: u64,
    /// Everything at or before it is durable, and was delivered in this epoch.
    pub checkpoint: Ts,
    /// Inside an initial copy: rows at or before it are durable.
    pub copied: Option<Position>,
}

/// Message of [`EventServiceTopic`].
#[derive(Clone, PartialEq, Debug)]
pub enum ToEventService {
    /// A dispatcher wants events. Repeated until answered by `Ready` or `NotRegistered`.
    Register {
        /// Its changefeed.
        changefeed: ChangefeedId,
        /// Its id.
        dispatcher: DispatcherId,
        /// What it wants.
        span: TableSpan,
        /// Events with a larger commit ts are wanted.
        start_ts: Ts,
    },
    /// Start (again) after `start_ts`, as a new stream.
    Reset {
        /// Its changefeed.
        changefeed: ChangefeedId,
        /// Its id.
        dispatcher: DispatcherId,
        /// Number of the stream; larger than every one before.
        epoch: u64,
        /// Events with a larger commit ts are wanted.
        start_ts: Ts,
        /// Inside an initial copy: rows at or before it are durable and not wanted again.
        copied: Option<Position>,
    },
    /// The dispatcher is gone.
    Remove {
        /// Its changefeed.
        changefeed: ChangefeedId,
        /// Its id.
        dispatcher: DispatcherId,
    },
    /// Progress of dispatchers.
    Heartbeat {
        /// Their changefeed.
        changefeed: ChangefeedId,
        /// One entry each.
        progress: Vec<DispatcherProgress>,
    },
    /// Room at the receiver: what it took from this service and freed since it opened, and what it holds at most.
    Credit {
        /// The changefeed.
        changefeed: ChangefeedId,
        /// Which opening of the changefeed counts; larger is newer.
        opening: u64,
        /// Bytes that arrived from this service since then.
        received: u64,
        /// Bytes of them that were freed.
        freed: u64,
        /// Most bytes that may be on their way or held.
        window: u64,
    },
}

/// Message of [`EventCollectorTopic`].
#[derive(Clone, PartialEq, Debug)]
pub enum ToEventCollector {
    /// The dispatcher is registered: reset it.
    Ready {
        /// Its changefeed.
        changefeed: Gid,
        /// Its id.
        dispatcher: DispatcherId,
    },
    /// The node does not know the dispatcher: register it again.
    NotRegistered {
        /// Its changefeed.
        changefeed: Gid,
        /// Its id.
        dispatcher: DispatcherId,
    },
    /// First event of a stream.
    Handshake {
        /// Head of the event.
        head: EventHead,
        /// The stream begins after it.
        start_ts: Ts,
        /// Shape of the table there; `None` for the table trigger, and for a table without rows so far.
        table: Option<Arc<TableInfo>>,
    },
    /// Rows.
    Rows {
        /// Head of the event.
        head: EventHead,
        /// The rows, by reference.
        batch: SharedBatch,
    },
    /// A piece of [`ToEventCollector::Rows`] that are too large for one message between nodes: of their byte form. The
    /// pieces of an event follow each other.
    Piece {
        /// Head of the event.
        head: EventHead,
        /// Bytes of the whole.
        total: u64,
        /// Where this piece begins.
        offset: u64,
        /// The piece.
        bytes: Bytes,
    },
    /// A schema change.
    Ddl {
        /// Head of the event.
        head: EventHead,
        /// The change.
        ddl: Arc<DdlEvent>,
    },
    /// Positions up to which dispatchers have everything. `head.seq` repeats the last event's.
    Resolved {
        /// One entry a dispatcher.
        entries: Arc<[(EventHead, Ts)]>,
        /// Wall time of the newest.
        time: WallTime,
    },
    /// The dispatcher cannot be served any more.
    Failed {
        /// Its changefeed.
        changefeed: Gid,
        /// Its id.
        dispatcher: DispatcherId,
        /// Stable code.
        code: String,
        /// Text for people.
        message: String,
    },
}

/// Which event of which stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EventHead {
    /// The changefeed.
    pub changefeed: Gid,
    /// The dispatcher.
    pub dispatcher: DispatcherId,
    /// Number of the stream.
    pub epoch: u64,
    /// Number of the event in the stream, from 1.
    pub seq: u64,
}

/// A batch, of a table or of a part of it. Equality is that of the content; rows compare by their bytes.
#[derive(Clone, Debug)]
pub struct SharedBatch(pub RowBatch);

impl PartialEq for SharedBatch {
    fn eq(&self, other: &Self) -> bool {
        self.0.is_same(&other.0)
    }
}

impl WireMessage for ToEventService {
    fn io_type(&self) -> i32 {
        wire::TO_EVENT_SERVICE
    }

    fn encode(&self, out: &mut Vec<u8>) {
        wire::put_to_event_service(self, out);
    }

    fn decode(io_type: i32, bytes: &[u8]) -> Result<Self, DecodeError> {
        if io_type != wire::TO_EVENT_SERVICE {
            return Err(DecodeError::UnknownType(io_type));
        }
        wire::get_to_event_service(bytes).ok_or(DecodeError::Malformed { message: "ToEventService" })
    }
}

impl WireMessage for ToEventCollector {
    fn io_type(&self) -> i32 {
        wire::TO_EVENT_COLLECTOR
    }

    fn encode(&self, out: &mut Vec<u8>) {
        wire::put_to_event_collector(self, out);
    }

    fn decode(io_type: i32, bytes: &[u8]) -> Result<Self, DecodeError> {
        if io_type != wire::TO_EVENT_COLLECTOR {
            return Err(DecodeError::UnknownType(io_type));
        }
        wire::get_to_event_collector(bytes).ok_or(DecodeError::Malformed { message: "ToEventCollector" })
    }
}
