//! A changefeed's streams on one node, and the room that their events take.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use heartbeatpb::{ChangefeedId, DispatcherId, NodeId, Ts, WallTime};
use messaging::MessageCenter;
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;

use super::check::StreamCheck;
use super::metrics::FeedMetrics;
use super::pieces::Assembly;
use super::{Delivery, Quota, Subscription};
use crate::event_store::Position;
use crate::topic::{DispatcherProgress, EventServiceTopic, ToEventService};

/// A registration without an answer is repeated after this time, then after twice that, and so on: it was lost, or the log
/// is not there yet and nobody has remembered it.
pub(super) const REGISTER_AGAIN: Duration = Duration::from_millis(500);

/// A dispatcher's stream.
pub(super) struct Stream {
    pub(super) subscription: Subscription,
    pub(super) check: StreamCheck,
    /// Where the current epoch begins.
    pub(super) start_ts: Ts,
    pub(super) copied: Option<Position>,
    /// Whether the event service has answered.
    pub(super) ready: bool,
    /// Whether the handshake of the current epoch has come.
    pub(super) begun: bool,
    /// An event found no room at the manager: what came after it is dropped, and the next tick resets.
    pub(super) overflowed: bool,
    /// A resolved position that found no room; only the newest matters.
    pub(super) late: Option<(Ts, WallTime)>,
    pub(super) asked: Instant,
    /// Without an answer the registration is repeated after this time.
    pub(super) patience: Duration,
    /// Schema change whose passing the event service waits for.
    pub(super) at_ddl: Option<Ts>,
    /// The event of which pieces have come.
    pub(super) assembly: Assembly,
}

impl Stream {
    pub(super) fn new(subscription: Subscription, base: u64) -> Self {
        Self {
            subscription,
            check: StreamCheck::new(base),
            start_ts: Ts::ZERO,
            copied: None,
            ready: false,
            begun: false,
            overflowed: false,
            late: None,
            asked: Instant::now(),
            patience: REGISTER_AGAIN,
            at_ddl: None,
            assembly: Assembly::default(),
        }
    }

    pub(super) fn progress(&self, dispatcher: DispatcherId) -> DispatcherProgress {
        DispatcherProgress {
            dispatcher,
            epoch: self.check.epoch(),
            checkpoint: self.subscription.checkpoint.get().min(self.check.max_event_ts),
            copied: self.copied,
        }
    }

    /// Begins a new epoch: what is on its way of the one before is ignored.
    pub(super) fn begin_again(&mut self) {
        self.start_ts = self.subscription.checkpoint.get().max(self.subscription.start_ts);
        self.begun = false;
        self.late = None;
        self.at_ddl = None;
        self.assembly = Assembly::default();
        self.asked = Instant::now();
        self.check.reset(self.start_ts);
    }
}

/// A changefeed that is open here.
pub(super) struct Feed {
    pub(super) id: ChangefeedId,
    pub(super) opening: u64,
    pub(super) window: u64,
    /// One account per event service.
    pub(super) quotas: BTreeMap<NodeId, Arc<Quota>>,
    pub(super) sender: mpsc::Sender<Delivery>,
    pub(super) streams: BTreeMap<DispatcherId, Stream>,
    pub(super) metrics: FeedMetrics,
}

impl Feed {
    pub(super) fn quota(&mut self, service: &NodeId, wake: &Arc<Notify>) -> Arc<Quota> {
        if let Some(quota) = self.quotas.get(service) {
            return Arc::clone(quota);
        }
        let quota = Arc::new(Quota::new(self.window, wake));
        self.quotas.insert(service.clone(), Arc::clone(&quota));
        quota
    }

    pub(super) fn stream(&mut self, from: &NodeId, id: DispatcherId) -> Option<&mut Stream> {
        self.streams.get_mut(&id).filter(|stream| stream.subscription.event_service == *from)
    }

    /// Shows how much of its room is taken.
    pub(super) fn measure(&self) {
        let held = |quota: &Arc<Quota>| {
            let freed = quota.freed.load(Ordering::Acquire);
            quota.received.load(Ordering::Acquire).saturating_sub(freed)
        };
        let services = self.quotas.len().max(1) as u64;
        self.metrics.memory(self.window * services, self.quotas.values().map(held).sum());
    }

    pub(super) fn tell_credit(&self, center: &MessageCenter) {
        for (node, quota) in &self.quotas {
            // `freed` first: it is never larger than what is read as received.
            let freed = quota.freed.load(Ordering::Acquire);
            let message = ToEventService::Credit {
                changefeed: self.id.clone(),
                opening: self.opening,
                received: quota.received.load(Ordering::Acquire),
                freed,
                window: self.window,
            };
            if center.send::<EventServiceTopic>(node, message).is_ok() {
                quota.told.store(freed, Ordering::Release);
            }
        }
    }
}
