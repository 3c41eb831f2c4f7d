//! Sends one stream's next events.

use std::sync::Arc;
use std::time::{Duration, Instant};

use event::{RowBatch, TxnMark};
use heartbeatpb::{DispatcherId, Gid, Ts};
use messaging::MessageCenter;

use super::credit::Credit;
use super::feed::Stream;
use super::pieces::{PIECE_BYTES, Pieces};
use super::reads::{Reads, Ticket};
use crate::Error;
use crate::event_store::{Next, Position, Scan, Store};
use crate::metrics::{ServiceMetrics, Turn, TurnEnd};
use crate::topic::{EventCollectorTopic, EventHead, SharedBatch, ToEventCollector};

/// Chunks of one dispatcher sent in a row before the next one has its turn.
const FAIR_CHUNKS: usize = 8;

pub(super) enum Pumped {
    /// Everything that is visible was sent.
    All,
    /// A schema change was sent: its dispatcher must pass it first.
    AtDdl,
    /// There is more, and it is another stream's turn.
    MoreToSend,
    /// The next rows are being read from disk.
    Reading,
    /// The next rows are on disk, and as much as may be is being read.
    DiskBusy,
    /// The receiver has no room: it will tell when it has.
    NoRoom,
    /// The message center took no more: try again soon.
    Congested,
}

impl Pumped {
    /// For those who count turns.
    fn end(&self) -> TurnEnd {
        match self {
            Self::All | Self::AtDdl | Self::Reading => TurnEnd::Done,
            Self::MoreToSend | Self::Congested => TurnEnd::Interrupted,
            Self::DiskBusy => TurnEnd::DiskBusy,
            Self::NoRoom => TurnEnd::NoRoom,
        }
    }
}

/// What streams share.
pub(super) struct Pump<'a> {
    pub(super) center: &'a MessageCenter,
    pub(super) reads: &'a mut Reads,
    pub(super) metrics: &'a ServiceMetrics,
}

impl Pump<'_> {
    /// Sends a few chunks of one stream, schema changes at their place between them. Only rows need room: a stream
    /// that has none to send is not held up by those that do.
    pub(super) fn run(
        &mut self,
        store: &Arc<Store>,
        (gid, id): (Gid, DispatcherId),
        stream: &mut Stream,
        credit: &mut Credit,
    ) -> Result<Pumped, Error> {
        let begun = Instant::now();
        let mut turn = Turn::default();
        let pumped = self.chunks(store, (gid, id), stream, credit, &mut turn)?;
        self.metrics.turn(&turn, pumped.end(), begun.elapsed());
        Ok(pumped)
    }

    fn chunks(
        &mut self,
        store: &Arc<Store>,
        (gid, id): (Gid, DispatcherId),
        stream: &mut Stream,
        credit: &mut Credit,
        turn: &mut Turn,
    ) -> Result<Pumped, Error> {
        for _ in 0..FAIR_CHUNKS {
            if stream.at_ddl.is_some() {
                return Ok(Pumped::AtDdl);
            }
            if stream.reading.is_some() {
                return Ok(Pumped::Reading);
            }
            if let Some(pieces) = &mut stream.pieces {
                if !pieces.send(self.center, &stream.node, credit) {
                    return Ok(Pumped::Congested);
                }
                (stream.seq, stream.sent, stream.position) = (pieces.head.seq, pieces.end, pieces.next);
                stream.pieces = None;
            }
            if stream.wants_room && !credit.available() {
                return Ok(Pumped::NoRoom);
            }
            let looked = Instant::now();
            let Next { rows: found, ddl, until, left_out } =
                store.next(stream.span.table, stream.position, stream.ddl_sent)?;
            if let Some(left_out) = left_out {
                stream.leave_out(left_out);
            }
            if !matches!(found, Scan::End) {
                self.metrics.read_index.record(looked.elapsed());
            }
            // Whether rows of a part of the table are the stream's is not known yet.
            stream.wants_room = !matches!(found, Scan::End) && stream.filter.is_none();
            let found = match (stream.loaded.take(), found) {
                (Some(loaded), _) => Some(loaded),
                (None, Scan::Rows(batch, next)) => Some((batch, next)),
                (None, Scan::OnDisk(_)) if !credit.available() => return Ok(Pumped::NoRoom),
                (None, Scan::OnDisk(chunk)) => {
                    let bytes = chunk.bytes() as u64;
                    let (node, store) = (stream.node.clone(), Arc::clone(store));
                    let ticket = Ticket { changefeed: gid, dispatcher: id, node, store, bytes };
                    stream.reading = self.reads.begin(ticket, chunk, &self.metrics.read_disk);
                    if stream.reading.is_none() {
                        return Ok(Pumped::DiskBusy);
                    }
                    credit.reserve(bytes);
                    return Ok(Pumped::Reading);
                }
                (None, Scan::End) => None,
            };
            let head =
                EventHead { changefeed: gid, dispatcher: id, epoch: stream.epoch, seq: stream.seq + 1 };
            let next_rows = found.as_ref().and_then(|(batch, _)| batch.first_commit_ts()).unwrap_or(Ts::MAX);
            // At one commit ts rows come before a schema change.
            if let Some(ddl) = ddl.as_ref().filter(|ddl| ddl.commit_ts < next_rows) {
                return Ok(self.send_ddl(head, stream, ddl));
            }
            let Some((batch, next)) = found else { return Ok(Pumped::All) };
            if until.is_some_and(|until| batch.first_commit_ts() > Some(until)) {
                // It came from disk: it is not read again for each look at a table that is held.
                stream.loaded = Some((batch, next));
                stream.wants_room = false;
                return Ok(Pumped::All);
            }
            let (batch, next) = match until {
                Some(until) if batch.last_commit_ts() > Some(until) => cut_at(&batch, until),
                Some(_) | None => (batch, next),
            };
            let (batch, next) = match ddl {
                Some(ddl) if batch.last_commit_ts() > Some(ddl.commit_ts) => cut_at(&batch, ddl.commit_ts),
                Some(_) | None => (batch, next),
            };
            let (read, txns) = (batch.bytes() as u64, batch.txns().len() as u64);
            // What is picked from is kept if it cannot be sent now: it may have come from disk.
            let (own, all) = match &mut stream.filter {
                None => (Some(batch), None),
                Some(filter) => (filter.pick(&stream.span, &batch)?, Some((batch, next))),
            };
            let wanted = own.as_ref().map_or((0, 0), |own| (own.row_count(), own.bytes() as u64));
            if let Some(own) = own {
                if !credit.available() {
                    (stream.wants_room, stream.loaded) = (true, all);
                    return Ok(Pumped::NoRoom);
                }
                if own.bytes() > PIECE_BYTES && stream.node != *self.center.node() {
                    // The next turn of the loop sends it.
                    stream.pieces = Some(Pieces::new(head, &own, next));
                    self.metrics.sent(own.row_count(), Duration::ZERO);
                } else if !self.send_rows(head, stream, own, credit) {
                    stream.loaded = all;
                    return Ok(Pumped::Congested);
                }
            }
            if stream.pieces.is_none() {
                stream.position = next;
            }
            turn.chunks += 1;
            turn.rows += wanted.0;
            turn.txns += txns;
            turn.bytes += read;
            turn.skipped += read.saturating_sub(wanted.1);
        }
        Ok(Pumped::MoreToSend)
    }

    fn send_rows(&self, head: EventHead, stream: &mut Stream, batch: RowBatch, credit: &mut Credit) -> bool {
        let (rows, bytes) = (batch.row_count(), batch.bytes() as u64);
        let end = batch.txns().last().map_or(stream.sent, Position::behind);
        let message = ToEventCollector::Rows { head, batch: SharedBatch(batch) };
        let begun = Instant::now();
        if self.center.send::<EventCollectorTopic>(&stream.node, message).is_err() {
            return false;
        }
        stream.seq = head.seq;
        stream.sent = end;
        credit.take(bytes);
        self.metrics.sent(rows, begun.elapsed());
        true
    }

    fn send_ddl(&self, head: EventHead, stream: &mut Stream, ddl: &Arc<event::DdlEvent>) -> Pumped {
        let message = ToEventCollector::Ddl { head, ddl: Arc::clone(ddl) };
        if self.center.send::<EventCollectorTopic>(&stream.node, message).is_err() {
            return Pumped::Congested;
        }
        stream.seq = head.seq;
        self.metrics.ddls.increment(1);
        stream.ddl_sent = ddl.commit_ts;
        stream.at_ddl = Some(ddl.commit_ts);
        // Its rows came before, so that the dispatcher has everything at its commit ts. When this is lost, it
        // is told again with the next report of progress.
        let entries = [(head, ddl.commit_ts)].into();
        let message = ToEventCollector::Resolved { entries, time: ddl.commit_time };
        if self.center.send::<EventCollectorTopic>(&stream.node, message).is_ok() {
            stream.resolved_sent = ddl.commit_ts;
        }
        Pumped::AtDdl
    }
}

/// The rows at or before `ts`, and the place after them.
fn cut_at(batch: &RowBatch, ts: Ts) -> (RowBatch, Position) {
    let marks: Vec<TxnMark> = batch.txns().iter().take_while(|mark| mark.commit_ts <= ts).copied().collect();
    (batch.first_txns(marks), Position::after(ts))
}
