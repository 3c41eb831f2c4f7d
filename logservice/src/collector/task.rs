//! The collector's task.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use event::{BlockEvent, DdlEvent, RowBatch, TableInfo};
use heartbeatpb::{ChangefeedId, DispatcherId, Gid, NodeId, Ts, WallTime};
use messaging::MessageCenter;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::check::{StreamCheck, Verdict};
use super::feed::{Feed, REGISTER_AGAIN, Stream};
use super::metrics::{CollectorMetrics, FeedMetrics};
use super::pieces::{Added, Piece};
use super::{CollectorHandle, Credit, Delivery, DispatcherEvent, Subscription};
use crate::event_store::Position;
use crate::topic::{
    DispatcherProgress, EventCollectorTopic, EventHead, EventServiceTopic, SharedBatch, ToEventCollector,
    ToEventService,
};
use crate::wire;

/// Messages waiting for the collector; rows among them are bounded by credits.
const INBOX: usize = 65_536;
/// How often progress is told.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// How often it is looked for requests without an answer, as long as there are some.
const LOOK_AGAIN: Duration = Duration::from_millis(250);
/// The longest time between two repetitions of a registration.
const REGISTER_AGAIN_MAX: Duration = Duration::from_secs(4);
/// How often resolved positions that found no room are tried again.
const LATE: Duration = Duration::from_millis(25);
/// How often it is looked whether a dispatcher has passed its schema change: its stream stands still until told.
const DDL_PASSED: Duration = Duration::from_millis(10);
/// Dispatchers at schema changes that are looked at each time.
const DDL_LOOKS: usize = 4096;
/// How long a stream that was reset may stay silent before the same reset is asked for again. A new epoch would make
/// what is on its way worthless, and on a slow link nothing would ever begin.
const RESET_AGAIN: Duration = Duration::from_millis(500);

pub(super) enum Request {
    Open { changefeed: ChangefeedId, window: u64, sender: mpsc::Sender<Delivery> },
    Close { changefeed: ChangefeedId },
    Subscribe(Subscription),
    Unsubscribe { changefeed: ChangefeedId, dispatcher: DispatcherId },
    Copied { changefeed: ChangefeedId, dispatcher: DispatcherId, copied: Position },
}

/// The task behind [`CollectorHandle`].
pub struct Collector {
    center: MessageCenter,
    requests: mpsc::UnboundedReceiver<Request>,
    feeds: BTreeMap<Gid, Feed>,
    /// Credits came back.
    wake: Arc<Notify>,
    /// Number of the newest opening, and base of the newest stream's epochs. Begins at the process's start in
    /// microseconds: what an earlier process counted, and what is still on its way to it, is older.
    count: u64,
    /// Whether resolved positions wait for room.
    late: bool,
    /// Whether requests may be without an answer.
    unanswered: bool,
    /// Streams that stand at a schema change. Some may have begun again meanwhile.
    at_ddl: VecDeque<(Gid, DispatcherId)>,
    metrics: CollectorMetrics,
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
        let count = u64::try_from(since.as_micros()).unwrap_or(0);
        let collector = Self {
            center,
            requests,
            feeds: BTreeMap::new(),
            wake: Arc::default(),
            count,
            late: false,
            unanswered: false,
            at_ddl: VecDeque::new(),
            metrics: CollectorMetrics::new(),
        };
        (collector, CollectorHandle { requests: sender })
    }

    /// Collects until `shutdown`.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut inbox = self.center.register::<EventCollectorTopic>(INBOX);
        let [mut tick, mut again_tick, mut late_tick, mut ddl_tick] =
            [HEARTBEAT, LOOK_AGAIN, LATE, DDL_PASSED].map(|period| {
                let mut timer = tokio::time::interval(period);
                timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
                timer
            });
        let wake = Arc::clone(&self.wake);
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                _ = tick.tick() => {
                    self.metrics.waiting(inbox.waiting());
                    self.on_tick();
                }
                _ = again_tick.tick(), if self.unanswered => self.ask_again(),
                _ = late_tick.tick(), if self.late => self.late = self.hand_on_late(),
                _ = ddl_tick.tick(), if !self.at_ddl.is_empty() => self.tell_passed_ddls(),
                () = wake.notified() => self.on_freed(),
                request = self.requests.recv() => match request {
                    Some(request) => self.on_request(request),
                    None => return,
                },
                event = inbox.recv() => match event {
                    Some(inbound) => {
                        let begun = Instant::now();
                        self.on_event(&inbound.from, inbound.message);
                        self.metrics.handled(begun.elapsed());
                    }
                    None => return,
                },
            }
        }
    }

    /// A number larger than every one before.
    fn next_count(&mut self) -> u64 {
        // Epochs of a stream count on from their base; the steps keep them below the next one.
        self.count += 1 << 16;
        self.count
    }

    fn on_request(&mut self, request: Request) {
        match request {
            Request::Open { changefeed, window, sender } => {
                let gid = changefeed.gid;
                let opening = self.next_count();
                let (quotas, streams) = (BTreeMap::new(), BTreeMap::new());
                let metrics = FeedMetrics::new(&changefeed);
                let feed = Feed { id: changefeed, opening, window, quotas, sender, streams, metrics };
                if let Some(before) = self.feeds.insert(gid, feed) {
                    self.tell_all_removed(&before);
                }
            }
            Request::Close { changefeed } => {
                if let Some(feed) = self.feeds.remove(&changefeed.gid) {
                    self.tell_all_removed(&feed);
                }
            }
            Request::Subscribe(subscription) => {
                let base = self.next_count();
                let Some(feed) = self.feeds.get_mut(&subscription.changefeed.gid) else { return };
                feed.quota(&subscription.event_service, &self.wake);
                feed.tell_credit(&self.center);
                register(&self.center, &subscription);
                feed.streams.insert(subscription.dispatcher, Stream::new(subscription, base));
                self.unanswered = true;
            }
            Request::Unsubscribe { changefeed, dispatcher } => {
                let removed =
                    self.feeds.get_mut(&changefeed.gid).and_then(|feed| feed.streams.remove(&dispatcher));
                if let Some(stream) = removed {
                    let service = &stream.subscription.event_service;
                    tell_removed(&self.center, service, stream.subscription.changefeed.clone(), dispatcher);
                    self.forget_room(changefeed.gid);
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

    /// Without a stream nothing is on its way; room that somebody still holds is not the next stream's.
    fn forget_room(&mut self, gid: Gid) {
        let opening = self.next_count();
        if let Some(feed) = self.feeds.get_mut(&gid).filter(|feed| feed.streams.is_empty()) {
            feed.quotas.clear();
            feed.opening = opening;
        }
    }

    fn tell_all_removed(&self, feed: &Feed) {
        for (id, stream) in &feed.streams {
            tell_removed(&self.center, &stream.subscription.event_service, feed.id.clone(), *id);
        }
    }

    fn on_event(&mut self, from: &NodeId, event: ToEventCollector) {
        match event {
            ToEventCollector::Ready { changefeed, dispatcher } => {
                if let Some(stream) =
                    stream_of(&mut self.feeds, from, changefeed, dispatcher).filter(|stream| !stream.ready)
                {
                    stream.ready = true;
                    stream.patience = REGISTER_AGAIN;
                    reset(&self.center, stream);
                    self.unanswered = true;
                }
            }
            ToEventCollector::NotRegistered { changefeed, dispatcher } => {
                if let Some(stream) = stream_of(&mut self.feeds, from, changefeed, dispatcher) {
                    stream.ready = false;
                    stream.begin_again();
                    register(&self.center, &stream.subscription);
                    self.unanswered = true;
                }
            }
            ToEventCollector::Handshake { head, start_ts: _, table } => {
                self.deliver(from, head, Arrival::Handshake(table), None);
            }
            ToEventCollector::Rows { head, batch: SharedBatch(batch) } => {
                self.on_rows(from, head, batch, None)
            }
            ToEventCollector::Piece { head, total, offset, bytes } => {
                self.on_piece(from, &Piece { head, total, offset, bytes });
            }
            ToEventCollector::Ddl { head, ddl } => self.deliver(from, head, Arrival::Ddl(ddl), None),
            ToEventCollector::Resolved { entries, time } => {
                self.metrics.resolved.increment(entries.len() as u64);
                self.metrics.arrived(time);
                for (head, ts) in entries.iter() {
                    self.deliver(from, *head, Arrival::Resolved(*ts, time), None);
                }
            }
            ToEventCollector::Failed { changefeed, dispatcher, code, message } => {
                let Some(feed) = self.feeds.get_mut(&changefeed) else { return };
                let sender = feed.sender.clone();
                if let Some(stream) = feed.stream(from, dispatcher) {
                    let event = DispatcherEvent::Failed { code, message };
                    let delivery = Delivery { dispatcher, event, credit: Credit::default() };
                    // Without room it is asked for again.
                    stream.overflowed |= sender.try_send(delivery).is_err();
                }
            }
        }
    }

    /// Rows, and the room that they have taken already if they came in pieces.
    fn on_rows(&mut self, from: &NodeId, head: EventHead, batch: RowBatch, credit: Option<Credit>) {
        self.metrics.rows.increment(batch.row_count());
        if let Some(last) = batch.txns().last() {
            self.metrics.arrived(last.commit_time);
        }
        self.deliver(from, head, Arrival::Rows(batch), credit);
    }

    fn on_piece(&mut self, from: &NodeId, piece: &Piece) {
        let head = piece.head;
        let Some(feed) = self.feeds.get_mut(&head.changefeed) else { return };
        let credit = Credit::take(&feed.quota(from, &self.wake), piece.bytes.len() as u64);
        let Some(stream) = feed.stream(from, head.dispatcher) else {
            return tell_removed(&self.center, from, feed.id.clone(), head.dispatcher);
        };
        let added = match stream.check.on_piece(head.epoch, head.seq) {
            Verdict::Deliver => stream.assembly.add(piece, credit),
            Verdict::Ignore => return,
            Verdict::Reset => Added::Gap,
        };
        let rows = match added {
            Added::Waits => return,
            Added::Whole(bytes, credit) => wire::get_rows(&bytes).map(|(head, batch)| (head, batch, credit)),
            Added::Gap => None,
        };
        match rows {
            Some((head, batch, credit)) => self.on_rows(from, head, batch, Some(credit)),
            None if stream.overflowed || !stream.ready => {}
            None => {
                tracing::debug!(dispatcherID = %head.dispatcher, seq = head.seq, "gap in the pieces of an event");
                self.metrics.dropped.increment(1);
                reset(&self.center, stream);
                self.unanswered = true;
            }
        }
    }

    /// Checks an event and hands it on, or starts its stream again. `credit` is the room that it has taken already.
    fn deliver(&mut self, from: &NodeId, head: EventHead, event: Arrival, credit: Option<Credit>) {
        let Some(feed) = self.feeds.get_mut(&head.changefeed) else { return };
        // Whatever becomes of it, the event service counts its bytes until they are freed.
        let credit = credit.unwrap_or_else(|| match &event {
            Arrival::Rows(batch) => Credit::take(&feed.quota(from, &self.wake), batch.bytes() as u64),
            Arrival::Handshake(_) | Arrival::Ddl(_) | Arrival::Resolved(..) => Credit::default(),
        });
        let Some(stream) =
            feed.streams.get_mut(&head.dispatcher).filter(|s| s.subscription.event_service == *from)
        else {
            return tell_removed(&self.center, from, feed.id.clone(), head.dispatcher);
        };
        let before = stream.check;
        let verdict = event.check(&mut stream.check, head);
        if let Arrival::Ddl(ddl) = &event
            && verdict != Verdict::Reset
            && head.epoch == stream.check.epoch()
            && stream.at_ddl.replace(ddl.commit_ts).is_none()
        {
            self.at_ddl.push_back((head.changefeed, head.dispatcher));
        }
        match verdict {
            Verdict::Deliver => {
                stream.begun = true;
                stream.asked = Instant::now();
                let (event, late) = event.into_event();
                match feed.sender.try_send(Delivery { dispatcher: head.dispatcher, event, credit }) {
                    Ok(()) => stream.late = stream.late.filter(|_| late.is_none()),
                    Err(TrySendError::Full(_)) if late.is_some() => {
                        stream.late = late;
                        self.late = true;
                    }
                    Err(TrySendError::Full(_)) => {
                        // It was not delivered: when it comes again, it is not old.
                        self.metrics.dropped.increment(1);
                        stream.check = before;
                        stream.begin_again();
                        stream.overflowed = true;
                    }
                    // Its manager is gone and says so soon.
                    Err(TrySendError::Closed(_)) => {}
                }
            }
            Verdict::Ignore => {}
            Verdict::Reset if stream.overflowed || !stream.ready => {}
            Verdict::Reset => {
                tracing::debug!(dispatcherID = %head.dispatcher, seq = head.seq, "gap in the event stream");
                self.metrics.dropped.increment(1);
                reset(&self.center, stream);
                self.unanswered = true;
            }
        }
    }

    /// Repeats requests that were not answered for long enough.
    fn ask_again(&mut self) {
        let now = Instant::now();
        let mut unanswered = false;
        for stream in self.feeds.values_mut().flat_map(|feed| feed.streams.values_mut()) {
            let silent = now.duration_since(stream.asked);
            unanswered |= !stream.ready || !stream.begun;
            if !stream.ready && silent >= stream.patience {
                stream.asked = now;
                stream.patience = (stream.patience * 2).min(REGISTER_AGAIN_MAX);
                register(&self.center, &stream.subscription);
            } else if stream.ready && !stream.begun && !stream.overflowed && silent >= RESET_AGAIN {
                stream.asked = now;
                ask_reset(&self.center, stream);
            }
        }
        self.unanswered = unanswered;
    }

    fn on_tick(&mut self) {
        for feed in self.feeds.values_mut() {
            let mut progress: BTreeMap<NodeId, Vec<DispatcherProgress>> = BTreeMap::new();
            for (id, stream) in &mut feed.streams {
                if stream.ready && stream.overflowed {
                    reset(&self.center, stream);
                    self.unanswered = true;
                } else if stream.begun {
                    let service = stream.subscription.event_service.clone();
                    progress.entry(service).or_default().push(stream.progress(*id));
                }
            }
            tell_progress(&self.center, &feed.id, progress);
            feed.tell_credit(&self.center);
            feed.measure();
        }
        let streams = self.feeds.values().map(|feed| feed.streams.len()).sum();
        let pending =
            self.feeds.values().map(|feed| feed.sender.max_capacity() - feed.sender.capacity()).sum();
        self.metrics.sizes(streams, pending);
    }

    /// Tells event services at once which dispatchers have passed their schema change.
    fn tell_passed_ddls(&mut self) {
        let mut passed: BTreeMap<Gid, BTreeMap<NodeId, Vec<DispatcherProgress>>> = BTreeMap::new();
        for _ in 0..self.at_ddl.len().min(DDL_LOOKS) {
            let Some((gid, id)) = self.at_ddl.pop_front() else { break };
            let stream = self.feeds.get_mut(&gid).and_then(|feed| feed.streams.get_mut(&id));
            let Some((stream, at)) = stream.and_then(|stream| stream.at_ddl.map(|at| (stream, at))) else {
                continue;
            };
            if stream.subscription.checkpoint.get() < at {
                self.at_ddl.push_back((gid, id));
                continue;
            }
            stream.at_ddl = None;
            let service = stream.subscription.event_service.clone();
            passed.entry(gid).or_default().entry(service).or_default().push(stream.progress(id));
        }
        for (gid, progress) in passed {
            if let Some(feed) = self.feeds.get(&gid) {
                tell_progress(&self.center, &feed.id, progress);
            }
        }
    }

    /// Hands on the resolved positions that found no room; says whether some still wait.
    fn hand_on_late(&mut self) -> bool {
        let mut left = false;
        for feed in self.feeds.values_mut() {
            for (id, stream) in &mut feed.streams {
                let Some((ts, time)) = stream.late else { continue };
                let event = DispatcherEvent::Resolved { ts, time };
                let delivery = Delivery { dispatcher: *id, event, credit: Credit::default() };
                if matches!(feed.sender.try_send(delivery), Err(TrySendError::Full(_))) {
                    left = true;
                    break;
                }
                stream.late = None;
            }
        }
        left
    }

    fn on_freed(&self) {
        for feed in self.feeds.values() {
            if feed.quotas.values().any(|quota| quota.is_worth_telling()) {
                feed.tell_credit(&self.center);
            }
        }
    }
}

/// An event of a stream that is not checked yet.
enum Arrival {
    Handshake(Option<Arc<TableInfo>>),
    Rows(RowBatch),
    Ddl(Arc<DdlEvent>),
    Resolved(Ts, WallTime),
}

impl Arrival {
    fn check(&self, check: &mut StreamCheck, head: EventHead) -> Verdict {
        match self {
            Arrival::Handshake(_) => check.on_handshake(head.epoch, head.seq),
            Arrival::Rows(batch) => {
                check.on_rows(head.epoch, head.seq, batch.last_commit_ts().unwrap_or(Ts::ZERO))
            }
            Arrival::Ddl(ddl) => check.on_ddl(head.epoch, head.seq, ddl.commit_ts),
            Arrival::Resolved(ts, _) => check.on_resolved(head.epoch, head.seq, *ts),
        }
    }

    /// The event, and the position that may be handed on later if there is no room now.
    fn into_event(self) -> (DispatcherEvent, Option<(Ts, WallTime)>) {
        match self {
            Arrival::Handshake(table) => (DispatcherEvent::Begin(table), None),
            Arrival::Rows(batch) => (DispatcherEvent::Rows(batch), None),
            Arrival::Ddl(ddl) => (DispatcherEvent::Block(BlockEvent::Ddl(ddl)), None),
            Arrival::Resolved(ts, time) => (DispatcherEvent::Resolved { ts, time }, Some((ts, time))),
        }
    }
}

fn tell_progress(
    center: &MessageCenter,
    changefeed: &ChangefeedId,
    progress: BTreeMap<NodeId, Vec<DispatcherProgress>>,
) {
    for (node, progress) in progress {
        let message = ToEventService::Heartbeat { changefeed: changefeed.clone(), progress };
        let _ = center.send::<EventServiceTopic>(&node, message);
    }
}

fn stream_of<'a>(
    feeds: &'a mut BTreeMap<Gid, Feed>,
    from: &NodeId,
    changefeed: Gid,
    id: DispatcherId,
) -> Option<&'a mut Stream> {
    feeds.get_mut(&changefeed)?.stream(from, id)
}

fn tell_removed(
    center: &MessageCenter,
    service: &NodeId,
    changefeed: ChangefeedId,
    dispatcher: DispatcherId,
) {
    let _ = center.send::<EventServiceTopic>(service, ToEventService::Remove { changefeed, dispatcher });
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

/// Begins a new epoch and asks for it.
fn reset(center: &MessageCenter, stream: &mut Stream) {
    stream.begin_again();
    stream.overflowed = false;
    ask_reset(center, stream);
}

/// Asks for the current epoch.
fn ask_reset(center: &MessageCenter, stream: &Stream) {
    let message = ToEventService::Reset {
        changefeed: stream.subscription.changefeed.clone(),
        dispatcher: stream.subscription.dispatcher,
        epoch: stream.check.epoch(),
        start_ts: stream.start_ts,
        copied: stream.copied,
    };
    let _ = center.send::<EventServiceTopic>(&stream.subscription.event_service, message);
}
