//! Reads from disk beside the event service's task: a slow disk holds up only the streams that need it.

use std::collections::BTreeMap;
use std::sync::Arc;

use event::RowBatch;
use heartbeatpb::{DispatcherId, Gid, NodeId};
use metrics::Histogram;
use rustc_hash::FxHashMap;
use tokio::task::{Id, JoinError, JoinSet};

use crate::Error;
use crate::event_store::{DiskChunk, Position, Store};

/// Reads at a time: as many as a disk does well, each of one chunk.
const READS: usize = 16;
/// Reads at a time for one changefeed, so that others find some left.
const READS_OF_FEED: usize = 4;

/// Rows that were read, and the place after them.
pub(super) type Loaded = (RowBatch, Position);

/// For whom a read is.
pub(super) struct Ticket {
    pub(super) changefeed: Gid,
    pub(super) dispatcher: DispatcherId,
    pub(super) node: NodeId,
    pub(super) store: Arc<Store>,
    /// Room at the receiver that is kept for the rows.
    pub(super) bytes: u64,
}

/// Reads that run.
#[derive(Default)]
pub(super) struct Reads {
    tasks: JoinSet<Result<Loaded, Error>>,
    tickets: FxHashMap<Id, (Ticket, u64)>,
    of_feed: BTreeMap<Gid, usize>,
    last: u64,
}

impl Reads {
    /// Begins a read, whose time goes to `metrics`; answers its number. `None`: too many run already, try again when one has ended.
    pub(super) fn begin(&mut self, ticket: Ticket, chunk: DiskChunk, metrics: &Histogram) -> Option<u64> {
        let of_feed = self.of_feed.entry(ticket.changefeed).or_default();
        if self.tickets.len() >= READS || *of_feed >= READS_OF_FEED {
            return None;
        }
        *of_feed += 1;
        self.last += 1;
        let took = metrics.clone();
        let task = self.tasks.spawn_blocking(move || {
            let begun = std::time::Instant::now();
            let loaded = Store::load(&chunk);
            took.record(begun.elapsed());
            loaded
        });
        self.tickets.insert(task.id(), (ticket, self.last));
        Some(self.last)
    }

    /// Whether some run.
    pub(super) fn any(&self) -> bool {
        !self.tasks.is_empty()
    }

    /// The next read that ends: for whom, its number, what it found.
    pub(super) async fn next(&mut self) -> Option<(Ticket, u64, Result<Loaded, Error>)> {
        let (id, result) = match self.tasks.join_next_with_id().await? {
            Ok((id, result)) => (id, result),
            Err(error) => (JoinError::id(&error), Err(Error::Closed { what: "the event store's reader" })),
        };
        let (ticket, number) = self.tickets.remove(&id)?;
        if let Some(count) = self.of_feed.get_mut(&ticket.changefeed) {
            *count -= 1;
            if *count == 0 {
                self.of_feed.remove(&ticket.changefeed);
            }
        }
        Some((ticket, number, result))
    }
}
