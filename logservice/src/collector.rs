//! The collector: the receiving end of event streams (dispatcher §19).
//!
//! One task per node checks every event against the epoch and the sequence of its stream and hands it on.
//! A violation is repaired by a reset at the dispatcher's checkpoint. Room is a credit per changefeed: bytes
//! that were delivered and not freed; the event service sends no more than the window.

mod check;
mod feed;
pub mod metrics;
mod pieces;
mod task;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use event::{BlockEvent, RowBatch, TableInfo};
use heartbeatpb::{ChangefeedId, DispatcherId, NodeId, TableSpan, Ts, WallTime};
use tokio::sync::{Notify, mpsc};

use crate::event_store::Position;
pub use task::Collector;
use task::Request;

/// Deliveries that wait for a dispatcher manager. Rows are bounded by credits; this bounds the small events.
const DELIVERIES: usize = 65_536;

/// A dispatcher's checkpoint, advanced by its manager and read by the collector.
#[derive(Debug, Default)]
pub struct CheckpointSlot(AtomicU64);

impl CheckpointSlot {
    /// A slot at `ts`.
    #[must_use]
    pub const fn new(ts: Ts) -> Self {
        Self(AtomicU64::new(ts.0))
    }

    /// Raises the checkpoint; never lowers it.
    pub fn advance(&self, ts: Ts) {
        self.0.fetch_max(ts.0, Ordering::Release);
    }

    /// The checkpoint.
    #[must_use]
    pub fn get(&self) -> Ts {
        Ts(self.0.load(Ordering::Acquire))
    }
}

/// What a dispatcher wants to receive.
#[derive(Clone, Debug)]
pub struct Subscription {
    /// Its changefeed.
    pub changefeed: ChangefeedId,
    /// Its id.
    pub dispatcher: DispatcherId,
    /// Its key range.
    pub span: TableSpan,
    /// Events with a larger commit ts are wanted.
    pub start_ts: Ts,
    /// Node whose event service has the changefeed's log.
    pub event_service: NodeId,
    /// Where its checkpoint is found, for resets and heartbeats.
    pub checkpoint: Arc<CheckpointSlot>,
}

/// An event of a dispatcher.
#[derive(Clone, Debug)]
pub enum DispatcherEvent {
    /// The stream begins (again): shape of the table, if it is known. Rows follow that the dispatcher may
    /// have had before.
    Begin(Option<Arc<TableInfo>>),
    /// Rows.
    Rows(RowBatch),
    /// Everything at or before `ts` was delivered.
    Resolved {
        /// The position.
        ts: Ts,
        /// Its wall time.
        time: WallTime,
    },
    /// A schema change or a sync point.
    Block(BlockEvent),
    /// The event service cannot serve the dispatcher.
    Failed {
        /// Stable code.
        code: String,
        /// Text for people.
        message: String,
    },
}

/// An event on its way to its dispatcher manager. The credit is given back when it is dropped: keep it until
/// the event is flushed.
#[derive(Debug)]
pub struct Delivery {
    /// The dispatcher.
    pub dispatcher: DispatcherId,
    /// The event.
    pub event: DispatcherEvent,
    /// Room that it takes.
    pub credit: Credit,
}

/// Bytes that an opening of a changefeed has taken from one event service, and freed.
#[derive(Debug)]
pub(crate) struct Quota {
    pub(crate) window: u64,
    pub(crate) received: AtomicU64,
    pub(crate) freed: AtomicU64,
    /// Freed bytes that the event service was told.
    pub(crate) told: AtomicU64,
    pub(crate) wake: Arc<Notify>,
}

impl Quota {
    pub(crate) fn new(window: u64, wake: &Arc<Notify>) -> Self {
        let [received, freed, told] = [0, 0, 0].map(AtomicU64::new);
        Self { window, received, freed, told, wake: Arc::clone(wake) }
    }

    /// Whether so much was freed that it is worth a message: a quarter of the window.
    pub(crate) fn is_worth_telling(&self) -> bool {
        let told = self.told.load(Ordering::Acquire);
        self.freed.load(Ordering::Acquire).saturating_sub(told) >= (self.window / 4).max(1)
    }
}

/// Room taken by an event; returned on drop.
#[derive(Debug, Default)]
pub struct Credit(Option<(Arc<Quota>, u64)>);

impl Credit {
    pub(crate) fn take(quota: &Arc<Quota>, bytes: u64) -> Self {
        quota.received.fetch_add(bytes, Ordering::AcqRel);
        Self(Some((Arc::clone(quota), bytes)))
    }

    /// Keeps the room of another one too. One of an account that is closed is given back.
    fn join(&mut self, mut other: Self) {
        match (&mut self.0, &mut other.0) {
            (Some((quota, bytes)), Some((same, more))) if Arc::ptr_eq(quota, same) => {
                *bytes += std::mem::take(more);
            }
            _ => std::mem::swap(self, &mut other),
        }
    }
}

impl Drop for Credit {
    fn drop(&mut self) {
        if let Some((quota, bytes)) = self.0.take() {
            quota.freed.fetch_add(bytes, Ordering::AcqRel);
            if quota.is_worth_telling() {
                quota.wake.notify_one();
            }
        }
    }
}

/// Asks the collector. Cheap to clone.
#[derive(Clone, Debug)]
pub struct CollectorHandle {
    requests: mpsc::UnboundedSender<Request>,
}

impl CollectorHandle {
    /// Receives a changefeed's events from now on; replaces the receiver before. `quota_bytes` bounds the
    /// bytes of rows that were delivered and whose credit was not dropped.
    #[must_use]
    pub fn open(&self, changefeed: ChangefeedId, quota_bytes: usize) -> mpsc::Receiver<Delivery> {
        let (sender, receiver) = mpsc::channel(DELIVERIES);
        self.ask(Request::Open { changefeed, window: quota_bytes as u64, sender });
        receiver
    }

    /// Ends a changefeed's streams.
    pub fn close(&self, changefeed: &ChangefeedId) {
        self.ask(Request::Close { changefeed: changefeed.clone() });
    }

    /// Begins a dispatcher's stream.
    pub fn subscribe(&self, subscription: Subscription) {
        self.ask(Request::Subscribe(subscription));
    }

    /// Ends a dispatcher's stream.
    pub fn unsubscribe(&self, changefeed: &ChangefeedId, dispatcher: DispatcherId) {
        self.ask(Request::Unsubscribe { changefeed: changefeed.clone(), dispatcher });
    }

    /// Rows of a running initial copy up to `copied` are durable: they are not needed again.
    pub fn copied(&self, changefeed: &ChangefeedId, dispatcher: DispatcherId, copied: Position) {
        self.ask(Request::Copied { changefeed: changefeed.clone(), dispatcher, copied });
    }

    fn ask(&self, request: Request) {
        // A collector that has ended has nothing left to do for anyone.
        let _ = self.requests.send(request);
    }
}
