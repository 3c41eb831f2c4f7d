//! Sends one stream's next events.

use std::sync::Arc;

use event::{RowBatch, TxnMark};
use heartbeatpb::{DispatcherId, Gid, Ts};
use messaging::MessageCenter;

use super::Stream;
use super::credit::Credit;
use crate::event_store::{Position, Scan, Store};
use crate::topic::{EventCollectorTopic, EventHead, SharedBatch, ToEventCollector};
use crate::{Error, metrics};

/// Chunks of one dispatcher sent in a row before the next one has its turn.
const FAIR_CHUNKS: usize = 8;

pub(super) enum Pumped {
    /// Everything that is visible was sent.
    All,
    /// A schema change was sent: its dispatcher must pass it first.
    AtDdl,
    /// There is more, and it is another stream's turn.
    MoreToSend,
    /// The receiver has no room: it will tell when it has.
    NoRoom,
    /// The message center took no more: try again soon.
    Congested,
}

/// Sends a few chunks of one stream, schema changes at their place between them.
pub(super) async fn pump(
    center: &MessageCenter,
    store: &Store,
    (gid, id): (Gid, DispatcherId),
    stream: &mut Stream,
    credit: &mut Credit,
    metrics: &metrics::ServiceMetrics,
) -> Result<Pumped, Error> {
    for _ in 0..FAIR_CHUNKS {
        if stream.at_ddl.is_some() {
            return Ok(Pumped::AtDdl);
        }
        if !credit.available() {
            return Ok(Pumped::NoRoom);
        }
        let (found, ddl) = store.next(stream.span.table, stream.position, stream.ddl_sent)?;
        let found = match found {
            Scan::Rows(batch, next) => Some((batch, next)),
            Scan::OnDisk(chunk) => Some(
                tokio::task::spawn_blocking(move || Store::load(&chunk))
                    .await
                    .map_err(|_| Error::Closed { what: "the event store's reader" })??,
            ),
            Scan::End => None,
        };
        let head = EventHead { changefeed: gid, dispatcher: id, epoch: stream.epoch, seq: stream.seq + 1 };
        let next_rows = found.as_ref().and_then(|(batch, _)| batch.first_commit_ts()).unwrap_or(Ts::MAX);
        // At one commit ts rows come before a schema change.
        if let Some(ddl) = ddl.as_ref().filter(|ddl| ddl.commit_ts < next_rows) {
            let message = ToEventCollector::Ddl { head, ddl: Arc::clone(ddl) };
            if center.send::<EventCollectorTopic>(&stream.node, message).is_err() {
                return Ok(Pumped::Congested);
            }
            stream.seq = head.seq;
            stream.ddl_sent = ddl.commit_ts;
            stream.at_ddl = Some(ddl.commit_ts);
            // Its rows came before, so that the dispatcher has everything at its commit ts. When this is lost, it
            // is told again with the next report of progress.
            let entries = [(head, ddl.commit_ts)].into();
            let message = ToEventCollector::Resolved { entries, time: ddl.commit_time };
            if center.send::<EventCollectorTopic>(&stream.node, message).is_ok() {
                stream.resolved_sent = ddl.commit_ts;
            }
            return Ok(Pumped::AtDdl);
        }
        let Some((batch, next)) = found else { return Ok(Pumped::All) };
        let (batch, next) = match ddl {
            Some(ddl) if batch.last_commit_ts() > Some(ddl.commit_ts) => cut_at(&batch, ddl.commit_ts),
            Some(_) | None => (batch, next),
        };
        let (rows, bytes) = (batch.row_count(), batch.bytes() as u64);
        let message = ToEventCollector::Rows { head, batch: SharedBatch(batch) };
        if center.send::<EventCollectorTopic>(&stream.node, message).is_err() {
            return Ok(Pumped::Congested);
        }
        stream.seq = head.seq;
        stream.position = next;
        credit.take(bytes);
        metrics.sent(rows, bytes);
    }
    Ok(Pumped::MoreToSend)
}

/// The rows at or before `ts`, and the place after them.
fn cut_at(batch: &RowBatch, ts: Ts) -> (RowBatch, Position) {
    let marks: Vec<TxnMark> = batch.txns().iter().take_while(|mark| mark.commit_ts <= ts).copied().collect();
    (batch.first_txns(marks), Position::after(ts))
}
