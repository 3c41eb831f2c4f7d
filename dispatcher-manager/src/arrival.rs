//! What the event collector brings for one dispatcher.

use std::sync::Arc;

use event::{BlockEvent, RowBatch, TableInfo};
use heartbeatpb::{Ts, WallTime};
use logservice::DispatcherEvent;

use crate::Fault;

/// Room in the changefeed's memory quota; it is given back when this is dropped.
#[derive(Debug, Default)]
pub(crate) enum Credit {
    /// None was taken.
    #[default]
    None,
    /// Room of the event collector.
    Room(#[expect(dead_code, reason = "held to be dropped")] logservice::Credit),
    /// Something that a test watches.
    #[cfg(test)]
    Watched(#[expect(dead_code, reason = "held to be dropped")] std::sync::Arc<()>),
}

/// One event, in the order of its dispatcher.
#[derive(Debug)]
pub(crate) enum Arrival {
    /// The stream begins, perhaps again: the shape of the table, where one is known. Rows follow that may have been
    /// seen before.
    Begin(Option<Arc<TableInfo>>),
    /// Rows.
    Rows(RowBatch, Credit),
    /// Every event up to `ts` has arrived.
    Resolved {
        /// The position.
        ts: Ts,
        /// Its wall time.
        time: WallTime,
    },
    /// A DDL or a sync point.
    Block(BlockEvent),
    /// The log side cannot go on for this dispatcher.
    Failed(Fault),
}

impl Arrival {
    /// The event of a delivery.
    pub(crate) fn of(event: DispatcherEvent, credit: logservice::Credit) -> Self {
        match event {
            DispatcherEvent::Begin(table) => Arrival::Begin(table),
            DispatcherEvent::Rows(batch) => Arrival::Rows(batch, Credit::Room(credit)),
            DispatcherEvent::Resolved { ts, time } => Arrival::Resolved { ts, time },
            DispatcherEvent::Block(event) => Arrival::Block(event),
            DispatcherEvent::Failed { code, message } => {
                Arrival::Failed(Fault { code, message, retryable: false })
            }
        }
    }
}
