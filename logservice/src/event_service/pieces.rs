//! Rows that are too large for one message to another node: sent piece by piece, as the way there takes them.

use bytes::Bytes;
use event::RowBatch;
use heartbeatpb::NodeId;
use messaging::MessageCenter;

use super::credit::Credit;
use crate::event_store::Position;
use crate::topic::{EventCollectorTopic, EventHead, ToEventCollector};
use crate::wire;

/// Bytes of a piece, and of rows that travel in one message: few enough to pass between other messages.
pub(super) const PIECE_BYTES: usize = 4 << 20;

/// One event on its way.
pub(super) struct Pieces {
    pub(super) head: EventHead,
    /// Place behind its rows.
    pub(super) end: Position,
    /// Where the stream goes on behind it.
    pub(super) next: Position,
    /// The byte form: what comes before the rows, and the rows, shared with the store.
    parts: [Bytes; 2],
    sent: usize,
}

impl Pieces {
    pub(super) fn new(head: EventHead, batch: &RowBatch, next: Position) -> Self {
        let mut before = Vec::new();
        let rows = wire::put_rows(&head, batch, &mut before);
        let end = batch.txns().last().map_or(next, Position::behind);
        Self { head, end, next, parts: [before.into(), rows], sent: 0 }
    }

    fn total(&self) -> usize {
        self.parts.iter().map(Bytes::len).sum()
    }

    /// The next piece; empty behind the last one.
    fn piece(&self) -> Bytes {
        let [before, rows] = &self.parts;
        match self.sent.checked_sub(before.len()) {
            None => before.slice(self.sent..before.len().min(self.sent + PIECE_BYTES)),
            Some(at) => rows.slice(at..rows.len().min(at + PIECE_BYTES)),
        }
    }

    /// Sends what the way takes; says whether that was the last of it.
    pub(super) fn send(&mut self, center: &MessageCenter, to: &NodeId, credit: &mut Credit) -> bool {
        let total = self.total() as u64;
        loop {
            let bytes = self.piece();
            let len = bytes.len();
            if len == 0 {
                return true;
            }
            let piece = ToEventCollector::Piece { head: self.head, total, offset: self.sent as u64, bytes };
            if center.send::<EventCollectorTopic>(to, piece).is_err() {
                return false;
            }
            credit.take(len as u64);
            self.sent += len;
        }
    }
}
