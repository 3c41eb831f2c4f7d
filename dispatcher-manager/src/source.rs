//! Where events come from: the event collector of the node, as a dispatcher manager sees it.

use heartbeatpb::{ChangefeedId, DispatcherId};
use logservice::event_store::Position;
use logservice::{CollectorHandle, Delivery, Subscription};
use tokio::sync::mpsc;

/// What a dispatcher manager needs from the event collector. Nothing here blocks.
pub trait EventSource: Send + Sync + 'static {
    /// Opens the one queue of a changefeed on this node. Everything that it holds or that was handed out
    /// through it counts against `quota_bytes` until its credit is dropped.
    fn open(&self, changefeed: &ChangefeedId, quota_bytes: usize) -> mpsc::Receiver<Delivery>;
    /// Closes the queue and every subscription behind it.
    fn close(&self, changefeed: &ChangefeedId);
    /// Asks for the events of a dispatcher.
    fn subscribe(&self, subscription: Subscription);
    /// No more events of a dispatcher; what is on its way may still arrive.
    fn unsubscribe(&self, changefeed: &ChangefeedId, dispatcher: DispatcherId);
    /// Rows of an open transaction up to `position` are durable downstream and not needed again.
    fn copied(&self, changefeed: &ChangefeedId, dispatcher: DispatcherId, position: Position);
}

impl EventSource for CollectorHandle {
    fn open(&self, changefeed: &ChangefeedId, quota_bytes: usize) -> mpsc::Receiver<Delivery> {
        CollectorHandle::open(self, changefeed.clone(), quota_bytes)
    }

    fn close(&self, changefeed: &ChangefeedId) {
        CollectorHandle::close(self, changefeed);
    }

    fn subscribe(&self, subscription: Subscription) {
        CollectorHandle::subscribe(self, subscription);
    }

    fn unsubscribe(&self, changefeed: &ChangefeedId, dispatcher: DispatcherId) {
        CollectorHandle::unsubscribe(self, changefeed, dispatcher);
    }

    fn copied(&self, changefeed: &ChangefeedId, dispatcher: DispatcherId, position: Position) {
        CollectorHandle::copied(self, changefeed, dispatcher, position);
    }
}
