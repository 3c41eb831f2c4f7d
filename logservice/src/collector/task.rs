//! The collector's task.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use event::BlockEvent;
use heartbeatpb::{ChangefeedId, DispatcherId, Gid, NodeId, Ts};
use messaging::MessageCenter;
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;

use super::check::{StreamCheck, Verdict};
use super::{CollectorHandle, Credit, Delivery, DispatcherEvent, Quota, Subscription};
use crate::event_store::Position;
use crate::topic::{
    DispatcherProgress, EventCollectorTopic, EventHead, EventServiceTopic, SharedBatch, ToEventCollector,
    ToEventService,
};

/// Messages waiting for the collector; rows among them are bounded by credits.
const INBOX: usize = 65_536;
/// How often progress is told, and requests without an answer are repeated.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// How long a stream that was reset may stay silent before it is reset again.
const SILENCE: Duration = Duration::from_secs(10);

pub(super) enum Request {
    Open { changefeed: ChangefeedId, window: u64, sender: mpsc::Sender<Delivery> },
    Close { changefeed: ChangefeedId },
    Subscribe(Subscription),
    Unsubscribe { changefeed: ChangefeedId, dispatcher: DispatcherId },
    Copied { changefeed: ChangefeedId, dispatcher: DispatcherId, copied: Position },
}

struct Stream {
    subscription: Subscription,
    check: StreamCheck,
    copied: Option<Position>,
    /// Whether the event service has answered.
    ready: bool,
    /// Whether the handshake of the current epoch has come.
    begun: bool,
    asked: Instant,
}

struct Feed {
    id: ChangefeedId,
    opening: u64,
    quota: Arc<Quota>,
    sender: mpsc::Sender<Delivery>,
    streams: BTreeMap<DispatcherId, Stream>,
}

/// The task behind [`CollectorHandle`].
pub struct Collector {
    center: MessageCenter,
    requests: mpsc::UnboundedReceiver<Request>,
    feeds: BTreeMap<Gid, Feed>,
    /// Credits came back.
    wake: Arc<Notify>,
    openings: u64,
}

impl std::fmt::Debug for Collector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Collector").field("center", &self.center).finish_non_exhaustive()
    }
}

impl Collector {
    /// A collector and the handle to ask it.
    #[must_use]
    pub fn new(center: MessageCenter) -> (Self, CollectorHandle) {
        let (sender, requests) = mpsc::unbounded_channel();
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        // Openings of a later process are newer than those of an earlier one.
        let openings = u64::try_from(since.as_micros()).unwrap_or(0);
        let collector = Self { center, requests, feeds: BTreeMap::new(), wake: Arc::default(), openings };
        (collector, CollectorHandle { requests: sender })
    }

    /// Collects until `shutdown`.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut inbox = self.center.register::<EventCollectorTopic>(INBOX);
        let mut tick = tokio::time::interval(HEARTBEAT);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let wake = Arc::clone(&self.wake);
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                _ = tick.tick() => self.on_tick(),
                () = wake.notified() => self.tell_credit(false),
                request = self.requests.recv() => match request {
                    Some(request) => self.on_request(request),
                    None => return,
                },
                event = inbox.recv() => match event {
                    Some(inbound) => self.on_event(&inbound.from, inbound.message),
                    None => return,
                },
            }
        }
    }

    fn on_request(&mut self, request: Request) {
        match request {
            Request::Open { changefeed, window, sender } => {
                self.openings += 1;
                let quota = Arc::new(Quota {
                    window,
                    freed: AtomicU64::new(0),
                    told: AtomicU64::new(0),
                    wake: Arc::clone(&self.wake),
                });
                let feed =
                    Feed { id: changefeed, opening: self.openings, quota, sender, streams: BTreeMap::new() };
                self.feeds.insert(feed.id.gid, feed);
            }
            Request::Close { changefeed } => {
                if let Some(feed) = self.feeds.remove(&changefeed.gid) {
                    for stream in feed.streams.values() {
                        self.tell_removed(&stream.subscription);
                    }
                }
            }
            Request::Subscribe(subscription) => {
                let Some(feed) = self.feeds.get_mut(&subscription.changefeed.gid) else { return };
                tell_credit(&self.center, feed, &subscription.event_service);
                register(&self.center, &subscription);
                let stream = Stream {
                    check: StreamCheck::new(),
                    copied: None,
                    ready: false,
                    begun: false,
                    asked: Instant::now(),
                    subscription,
                };
                feed.streams.insert(stream.subscription.dispatcher, stream);
            }
            Request::Unsubscribe { changefeed, dispatcher } => {
                let removed =
                    self.feeds.get_mut(&changefeed.gid).and_then(|feed| feed.streams.remove(&dispatcher));
                if let Some(stream) = removed {
                    self.tell_removed(&stream.subscription);
                }
            }
            Request::Copied { changefeed, dispatcher, copied } => {
                let stream =
                    self.feeds.get_mut(&changefeed.gid).and_then(|feed| feed.streams.get_mut(&dispatcher));
                if let Some(stream) = stream {
                    stream.copied = stream.copied.max(Some(copied));
                }
            }
        }
    }

    fn tell_removed(&self, subscription: &Subscription) {
        let message = ToEventService::Remove {
            changefeed: subscription.changefeed.clone(),
            dispatcher: subscription.dispatcher,
        };
        let _ = self.center.send::<EventServiceTopic>(&subscription.event_service, message);
    }

    fn on_event(&mut self, from: &NodeId, event: ToEventCollector) {
        match event {
            ToEventCollector::Ready { changefeed, dispatcher } => self.on_ready(from, changefeed, dispatcher),
            ToEventCollector::NotRegistered { changefeed, dispatcher } => {
                if let Some((_, stream)) = find(&mut self.feeds, from, changefeed, dispatcher) {
                    stream.ready = false;
                    stream.asked = Instant::now();
                    register(&self.center, &stream.subscription);
                }
            }
            ToEventCollector::Handshake { head, start_ts: _, table } => {
                self.deliver(
                    from,
                    head,
                    0,
                    |check| check.on_handshake(head.epoch, head.seq),
                    || DispatcherEvent::Begin(table),
                );
            }
            ToEventCollector::Rows { head, batch: SharedBatch(batch) } => {
                let last = batch.last_commit_ts().unwrap_or(Ts::ZERO);
                let bytes = batch.bytes() as u64;
                self.deliver(
                    from,
                    head,
                    bytes,
                    |check| check.on_rows(head.epoch, head.seq, last),
                    || DispatcherEvent::Rows(batch),
                );
            }
            ToEventCollector::Ddl { head, ddl } => {
                let ts = ddl.commit_ts;
                self.deliver(
                    from,
                    head,
                    0,
                    |check| check.on_ddl(head.epoch, head.seq, ts),
                    || DispatcherEvent::Block(BlockEvent::Ddl(ddl)),
                );
            }
            ToEventCollector::Resolved { entries, time } => {
                for (head, ts) in entries.iter() {
                    self.deliver(
                        from,
                        *head,
                        0,
                        |check| check.on_resolved(head.epoch, head.seq, *ts),
                        || DispatcherEvent::Resolved { ts: *ts, time },
                    );
                }
            }
            ToEventCollector::Failed { changefeed, dispatcher, code, message } => {
                if let Some((feed, _)) = find(&mut self.feeds, from, changefeed, dispatcher) {
                    let event = DispatcherEvent::Failed { code, message };
                    let _ = feed.try_send(Delivery { dispatcher, event, credit: Credit::default() });
                }
            }
        }
    }

    fn on_ready(&mut self, from: &NodeId, changefeed: Gid, dispatcher: DispatcherId) {
        if let Some((_, stream)) = find(&mut self.feeds, from, changefeed, dispatcher)
            && !stream.ready
        {
            stream.ready = true;
            reset(&self.center, stream);
        }
    }

    /// Checks an event and hands it on, or starts its stream again.
    fn deliver(
        &mut self,
        from: &NodeId,
        head: EventHead,
        bytes: u64,
        check: impl FnOnce(&mut StreamCheck) -> Verdict,
        event: impl FnOnce() -> DispatcherEvent,
    ) {
        let Some((sender, stream)) = find(&mut self.feeds, from, head.changefeed, head.dispatcher) else {
            return;
        };
        // Whatever becomes of it, the event service counts its bytes until they are freed.
        let credit = if bytes > 0 { Credit::take(&sender.quota, bytes) } else { Credit::default() };
        match check(&mut stream.check) {
            Verdict::Deliver => {
                stream.begun = true;
                stream.asked = Instant::now();
                let event = event();
                let needed = !matches!(event, DispatcherEvent::Resolved { .. });
                let full = sender.try_send(Delivery { dispatcher: head.dispatcher, event, credit }).is_err();
                // A resolved position comes again; anything else would be a gap.
                if full && needed {
                    reset(&self.center, stream);
                }
            }
            Verdict::Ignore => {}
            Verdict::Reset => {
                tracing::debug!(dispatcherID = %head.dispatcher, seq = head.seq, "gap in the event stream");
                reset(&self.center, stream);
            }
        }
    }

    fn on_tick(&mut self) {
        let now = Instant::now();
        for feed in self.feeds.values_mut() {
            let mut progress: BTreeMap<NodeId, Vec<DispatcherProgress>> = BTreeMap::new();
            for (id, stream) in &mut feed.streams {
                if !stream.ready && now.duration_since(stream.asked) >= HEARTBEAT {
                    stream.asked = now;
                    register(&self.center, &stream.subscription);
                } else if stream.ready && !stream.begun && now.duration_since(stream.asked) >= SILENCE {
                    reset(&self.center, stream);
                } else if stream.begun {
                    let checkpoint = stream.subscription.checkpoint.get().min(stream.check.max_event_ts);
                    let entry = DispatcherProgress {
                        dispatcher: *id,
                        epoch: stream.check.epoch(),
                        checkpoint,
                        copied: stream.copied,
                    };
                    progress.entry(stream.subscription.event_service.clone()).or_default().push(entry);
                }
            }
            for (node, progress) in progress {
                let message = ToEventService::Heartbeat { changefeed: feed.id.clone(), progress };
                let _ = self.center.send::<EventServiceTopic>(&node, message);
            }
        }
        self.tell_credit(true);
    }

    fn tell_credit(&mut self, all: bool) {
        for feed in self.feeds.values() {
            let freed = feed.quota.freed.load(Ordering::Acquire);
            let untold = freed - feed.quota.told.load(Ordering::Acquire);
            if !all && untold < feed.quota.window / 4 {
                continue;
            }
            let mut nodes: Vec<&NodeId> =
                feed.streams.values().map(|stream| &stream.subscription.event_service).collect();
            nodes.sort_unstable();
            nodes.dedup();
            for node in nodes {
                tell_credit(&self.center, feed, node);
            }
        }
    }
}

/// Where a feed's deliveries go.
struct Outlet {
    quota: Arc<Quota>,
    sender: mpsc::Sender<Delivery>,
}

impl Outlet {
    fn try_send(&self, delivery: Delivery) -> Result<(), ()> {
        self.sender.try_send(delivery).map_err(|_| ())
    }
}

fn find<'a>(
    feeds: &'a mut BTreeMap<Gid, Feed>,
    from: &NodeId,
    feed: Gid,
    id: DispatcherId,
) -> Option<(Outlet, &'a mut Stream)> {
    let feed = feeds.get_mut(&feed)?;
    let stream = feed.streams.get_mut(&id).filter(|stream| stream.subscription.event_service == *from)?;
    Some((Outlet { quota: Arc::clone(&feed.quota), sender: feed.sender.clone() }, stream))
}

fn register(center: &MessageCenter, subscription: &Subscription) {
    let message = ToEventService::Register {
        changefeed: subscription.changefeed.clone(),
        dispatcher: subscription.dispatcher,
        span: subscription.span.clone(),
        start_ts: subscription.start_ts,
    };
    let _ = center.send::<EventServiceTopic>(&subscription.event_service, message);
}

fn reset(center: &MessageCenter, stream: &mut Stream) {
    let start_ts = stream.subscription.checkpoint.get().max(stream.subscription.start_ts);
    let epoch = stream.check.reset(start_ts);
    stream.begun = false;
    stream.asked = Instant::now();
    let message = ToEventService::Reset {
        changefeed: stream.subscription.changefeed.clone(),
        dispatcher: stream.subscription.dispatcher,
        epoch,
        start_ts,
    };
    let _ = center.send::<EventServiceTopic>(&stream.subscription.event_service, message);
}

fn tell_credit(center: &MessageCenter, feed: &Feed, node: &NodeId) {
    let freed = feed.quota.freed.load(Ordering::Acquire);
    let message = ToEventService::Credit {
        changefeed: feed.id.clone(),
        opening: feed.opening,
        freed,
        window: feed.quota.window,
    };
    if center.send::<EventServiceTopic>(node, message).is_ok() {
        feed.quota.told.store(freed, Ordering::Release);
    }
}
