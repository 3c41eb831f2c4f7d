//! The event service: per dispatcher a stream of rows, schema changes and resolved positions, in order.
//!
//! One task per node. It wakes when a store publishes, when a collector asks or frees room, when a read from disk
//! ends, and on a slow timer for repetition; it never polls and never waits for a disk. The rows that it may send are
//! bounded by the receiver's credit.

mod credit;
mod early;
mod feed;
mod measure;
mod pieces;
mod pump;
mod range;
mod reads;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use heartbeatpb::{ChangefeedId, DispatcherId, Gid, NodeId, TableSpan, Ts, WallTime};
use messaging::{Inbound, MessageCenter};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::event_store::{Position, Store};
use crate::topic::{
    DispatcherProgress, EventCollectorTopic, EventHead, EventServiceTopic, ToEventCollector, ToEventService,
};
use crate::{Error, metrics};
use credit::{Credit, Report};
use early::{Candidate, Early};
use feed::{Feed, Stream};
use pump::{Pump, Pumped};
use reads::{Loaded, Reads, Ticket};

/// Waiting requests. Collectors repeat what is lost.
const INBOX: usize = 16_384;
/// A registered dispatcher that was not reset yet is told again that it is ready.
const READY_AGAIN: Duration = Duration::from_secs(1);
/// A dispatcher whose collector says nothing for so long is forgotten: its node is gone, or it lives elsewhere. What
/// only it had not read may be dropped then, so that it does not fill the store; if it comes back, it registers
/// again. Collectors report every second.
const SILENT: Duration = Duration::from_secs(60);
/// Shortest time between two resolved positions of a dispatcher that has no rows.
const RESOLVED_INTERVAL: Duration = Duration::from_millis(25);
/// Dispatchers for which one resolved message is paid in full; more of them are told less often.
const RESOLVED_BATCH: usize = 4096;

/// The stores of this node, by changefeed.
#[derive(Default)]
pub(crate) struct Stores {
    pub(crate) by_feed: Mutex<BTreeMap<Gid, Arc<Store>>>,
    /// Something became visible in one of them, or the set changed.
    pub(crate) changed: Arc<Notify>,
}

/// The task. See [`crate::LogService`].
pub(crate) struct EventService {
    center: MessageCenter,
    stores: Arc<Stores>,
    feeds: BTreeMap<Gid, Feed>,
    /// Who registered before the log was there.
    early: Early,
    /// By changefeed and receiving node. They outlive a feed: the receiver counts on.
    credits: BTreeMap<(Gid, NodeId), Credit>,
    reads: Reads,
    /// When silent dispatchers were looked for last.
    looked: Instant,
    /// Counts looks at what there is.
    looks: u64,
    metrics: metrics::ServiceMetrics,
}

impl EventService {
    pub(crate) fn new(center: MessageCenter, stores: Arc<Stores>) -> Self {
        Self {
            center,
            stores,
            feeds: BTreeMap::new(),
            early: Early::default(),
            credits: BTreeMap::new(),
            reads: Reads::default(),
            looked: Instant::now(),
            looks: 0,
            metrics: metrics::ServiceMetrics::new(),
        }
    }

    /// Serves until `shutdown`.
    pub(crate) async fn run(mut self, shutdown: CancellationToken) {
        let mut inbox = self.center.register::<EventServiceTopic>(INBOX);
        let changed = Arc::clone(&self.stores.changed);
        let mut tick = tokio::time::interval(RESOLVED_INTERVAL);
        let mut again = tokio::time::interval(READY_AGAIN);
        let mut look = tokio::time::interval(measure::LOOK);
        for timer in [&mut tick, &mut again, &mut look] {
            timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        }
        let mut pending = false;
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                request = inbox.recv() => {
                    let Some(request) = request else { return };
                    self.on_request(request);
                    while let Some(request) = inbox.try_recv() {
                        self.on_request(request);
                    }
                }
                () = changed.notified() => self.collect_dirty(),
                Some((ticket, number, result)) = self.reads.next(), if self.reads.any() => {
                    self.on_read(&ticket, number, result);
                }
                _ = again.tick() => {
                    self.repeat_ready();
                    self.forget_silent();
                }
                _ = look.tick() => self.measure(inbox.waiting()),
                _ = tick.tick(), if pending => {}
            }
            let unsent = self.send_rows();
            let put_off = self.send_resolved();
            pending = unsent || put_off;
        }
    }

    /// The feed over the store that is open now. Streams over a store before it end here: their receivers
    /// are told to register again.
    fn feed(&mut self, gid: Gid) -> Option<&mut Feed> {
        let store = self.stores.by_feed.lock().get(&gid).cloned();
        let current = self.feeds.get(&gid).zip(store.as_ref());
        if current.is_none_or(|(feed, store)| !Arc::ptr_eq(&feed.store, store)) {
            for (id, stream) in self.feeds.remove(&gid).into_iter().flat_map(|feed| feed.streams) {
                self.tell_unknown(&stream.node, gid, id);
            }
            // Its rows may have been visible before anyone asked.
            self.stores.changed.notify_one();
        }
        let store = store?;
        if let Entry::Vacant(place) = self.feeds.entry(gid) {
            place.insert(Feed::new(store));
            self.admit_early(gid);
        }
        self.feeds.get_mut(&gid)
    }

    /// The log of a changefeed is here: whoever came before it is served.
    fn admit_early(&mut self, gid: Gid) {
        let early = self.early.take(gid);
        if !early.is_empty() {
            tracing::info!(changefeed = %gid, dispatchers = early.len(), "dispatchers waited for this log");
        }
        for (id, (candidate, _)) in early {
            self.enroll(gid, id, candidate);
        }
    }

    fn tell_unknown(&self, node: &NodeId, changefeed: Gid, dispatcher: DispatcherId) {
        let unknown = ToEventCollector::NotRegistered { changefeed, dispatcher };
        let _ = self.center.send::<EventCollectorTopic>(node, unknown);
    }

    fn on_request(&mut self, request: Inbound<ToEventService>) {
        let from = request.from;
        match request.message {
            ToEventService::Register { changefeed, dispatcher, span, start_ts } => {
                self.register(&changefeed, dispatcher, span, start_ts, from);
            }
            ToEventService::Reset { changefeed, dispatcher, epoch, start_ts, copied } => {
                let from_position = Position::after(start_ts).max(copied.unwrap_or_default());
                self.reset(changefeed.gid, dispatcher, epoch, (start_ts, from_position), &from);
            }
            ToEventService::Remove { changefeed, dispatcher } => {
                self.remove(changefeed.gid, dispatcher, &from);
            }
            ToEventService::Heartbeat { changefeed, progress } => {
                for entry in progress {
                    self.on_progress(changefeed.gid, &entry, &from);
                }
            }
            ToEventService::Credit { changefeed, opening, received, freed, window } => {
                let report = Report { opening, received, freed, window };
                self.credits.entry((changefeed.gid, from)).or_default().on_report(report, Instant::now());
            }
        }
    }

    fn register(
        &mut self,
        changefeed: &ChangefeedId,
        id: DispatcherId,
        span: TableSpan,
        start: Ts,
        node: NodeId,
    ) {
        let candidate = Candidate { node, span, start };
        if self.feed(changefeed.gid).is_some() {
            self.enroll(changefeed.gid, id, candidate);
        } else {
            // The reader has not started yet: it is served as soon as there is a log.
            self.early.put(changefeed.gid, id, candidate, Instant::now());
        }
    }

    fn enroll(&mut self, gid: Gid, id: DispatcherId, candidate: Candidate) {
        let Candidate { node, span, start } = candidate;
        let Some(feed) = self.feeds.get_mut(&gid) else { return };
        // Whoever registers knows nothing of a stream before: its epochs begin anew.
        feed.remove(id);
        feed.add(id, Stream::new(node.clone(), span, start));
        let time = feed.store.time_of(start);
        let ready = ToEventCollector::Ready { changefeed: gid, dispatcher: id };
        let _ = self.center.send::<EventCollectorTopic>(&node, ready);
        self.metrics.registered(time);
    }

    fn repeat_ready(&mut self) {
        let now = Instant::now();
        for (gid, feed) in &mut self.feeds {
            for (id, stream) in feed.streams.iter_mut().filter(|(_, stream)| stream.epoch == 0) {
                if now.duration_since(stream.ready_sent) >= READY_AGAIN {
                    stream.ready_sent = now;
                    let ready = ToEventCollector::Ready { changefeed: *gid, dispatcher: *id };
                    let _ = self.center.send::<EventCollectorTopic>(&stream.node, ready);
                }
            }
        }
    }

    /// Forgets dispatchers and receivers that say nothing any more.
    fn forget_silent(&mut self) {
        let now = Instant::now();
        self.early.forget(now);
        let pause = now.duration_since(std::mem::replace(&mut self.looked, now));
        if pause > SILENT / 6 {
            // It is this process that stood still; what the others said meanwhile is waiting to be read.
            let streams = self.feeds.values_mut().flat_map(|feed| feed.streams.values_mut());
            streams.for_each(|stream| stream.heard = now);
            return;
        }
        let Some(since) = now.checked_sub(SILENT) else { return };
        for (gid, feed) in &mut self.feeds {
            let silent = feed.streams.iter().filter(|(_, stream)| stream.heard <= since);
            for id in silent.map(|(id, _)| *id).collect::<Vec<_>>() {
                tracing::info!(changefeed = %gid, dispatcherID = %id, "a silent dispatcher is forgotten");
                feed.remove(id);
            }
        }
        self.credits.retain(|_, credit| credit.heard_after(since));
    }

    fn reset(
        &mut self,
        gid: Gid,
        id: DispatcherId,
        epoch: u64,
        (start_ts, position): (Ts, Position),
        from: &NodeId,
    ) {
        let Some(feed) = self.feed(gid).filter(|feed| feed.streams.contains_key(&id)) else {
            return self.tell_unknown(from, gid, id);
        };
        let Some(stream) = feed.streams.get_mut(&id) else { return };
        if epoch < stream.epoch || stream.node != *from {
            return;
        }
        stream.heard = Instant::now();
        if epoch == stream.epoch {
            // Its receiver has heard nothing of this epoch.
            let answer = begun(gid, id, stream, &feed.store);
            let _ = self.center.send::<EventCollectorTopic>(from, answer);
            return;
        }
        let again = stream.epoch > 0;
        stream.begin(epoch, start_ts, position);
        let looked = Instant::now();
        let handshake = begun(gid, id, stream, &feed.store);
        let took = looked.elapsed();
        feed.queue(id);
        let _ = self.center.send::<EventCollectorTopic>(from, handshake);
        self.metrics.began(took, again);
    }

    fn remove(&mut self, gid: Gid, id: DispatcherId, from: &NodeId) {
        self.early.remove(gid, id, from);
        let Some(feed) = self.feeds.get_mut(&gid) else { return };
        // The dispatcher may live on another node by now.
        if feed.streams.get(&id).is_some_and(|stream| stream.node == *from) {
            feed.remove(id);
            if !feed.streams.values().any(|stream| stream.node == *from) {
                self.credits.remove(&(gid, from.clone()));
            }
        }
    }

    fn on_progress(&mut self, gid: Gid, entry: &DispatcherProgress, from: &NodeId) {
        let here = self.center.node().clone();
        let Some(feed) = self.feed(gid).filter(|feed| feed.streams.contains_key(&entry.dispatcher)) else {
            return self.tell_unknown(from, gid, entry.dispatcher);
        };
        let Feed { streams, held, .. } = feed;
        let Some(stream) = streams.get_mut(&entry.dispatcher) else { return };
        if stream.epoch != entry.epoch || stream.node != *from {
            return;
        }
        stream.heard = Instant::now();
        let table = stream.span.table;
        if let Some(at) = held.at(table) {
            stream.repeat_held(at, entry.checkpoint);
        }
        let durable = Position::after(entry.checkpoint).max(entry.copied.unwrap_or_default());
        stream.progress = Some((entry.checkpoint, stream.passed(durable)));
        if stream.pass_ddl(entry.checkpoint) {
            feed.queue(entry.dispatcher);
        }
        feed.on_progress(table, &here);
    }

    /// Queues the streams of tables that have new rows. Drops feeds whose store was closed.
    fn collect_dirty(&mut self) {
        let mut gids: Vec<Gid> = self.stores.by_feed.lock().keys().copied().collect();
        gids.extend(self.feeds.keys().copied());
        gids.sort_unstable();
        gids.dedup();
        for gid in gids {
            let Some(feed) = self.feed(gid) else { continue };
            let (dirty, resolved, time, held) = feed.store.take_news();
            feed.resolved = resolved;
            feed.resolved_time = time;
            feed.held = held;
            for table in dirty {
                for id in feed.by_table.get(&table).cloned().unwrap_or_default() {
                    feed.queue(id);
                }
            }
        }
    }

    /// Takes what was read from disk. Whoever began again meanwhile does not want it any more.
    fn on_read(&mut self, ticket: &Ticket, number: u64, result: Result<Loaded, Error>) {
        let (gid, id) = (ticket.changefeed, ticket.dispatcher);
        if let Some(credit) = self.credits.get_mut(&(gid, ticket.node.clone())) {
            credit.release(ticket.bytes);
        }
        let feed = self.feeds.get_mut(&gid).filter(|feed| Arc::ptr_eq(&feed.store, &ticket.store));
        let Some(feed) = feed else { return };
        let stream = feed.streams.get_mut(&id).filter(|stream| stream.reading == Some(number));
        let Some(stream) = stream else { return };
        match result {
            Ok(loaded) => {
                stream.reading = None;
                stream.loaded = Some(loaded);
                feed.queue(id);
            }
            // A closed store lost its files; its streams end with the feed. Until then the read stays open, so
            // that no resolved position passes what could not be read.
            Err(_) if feed.store.is_closed() => {}
            Err(error) => {
                stream.reading = None;
                fail(&self.center, gid, id, stream, &error);
            }
        }
    }

    /// Sends what there is and what fits; says whether somebody must try again without being asked.
    fn send_rows(&mut self) -> bool {
        let mut congested = false;
        let mut pump = Pump { center: &self.center, reads: &mut self.reads, metrics: &self.metrics };
        for (gid, feed) in &mut self.feeds {
            let mut waiting = VecDeque::new();
            while let Some(id) = feed.ready.pop_front() {
                let Some(stream) = feed.streams.get_mut(&id) else { continue };
                stream.queued = false;
                if stream.epoch == 0 || stream.failed {
                    continue;
                }
                let credit = self.credits.entry((*gid, stream.node.clone())).or_default();
                match pump.run(&feed.store, (*gid, id), stream, credit) {
                    Ok(Pumped::All | Pumped::AtDdl | Pumped::Reading) => {}
                    Ok(Pumped::MoreToSend) => {
                        stream.queued = true;
                        feed.ready.push_back(id);
                    }
                    Ok(pumped @ (Pumped::NoRoom | Pumped::DiskBusy | Pumped::Congested)) => {
                        congested |= matches!(pumped, Pumped::Congested);
                        stream.queued = true;
                        waiting.push_back(id);
                    }
                    Err(error) => fail(&self.center, *gid, id, stream, &error),
                }
            }
            feed.ready = waiting;
        }
        congested
    }

    /// Tells caught-up dispatchers how far they are; says whether some were put off.
    fn send_resolved(&mut self) -> bool {
        let now = Instant::now();
        let mut told = 0;
        let mut put_off = false;
        for (gid, feed) in &mut self.feeds {
            let time = feed.resolved_time;
            let share = u32::try_from(feed.streams.len() / RESOLVED_BATCH + 1).unwrap_or(u32::MAX);
            let interval = RESOLVED_INTERVAL * share;
            if feed.resolved_at.is_some_and(|at| now.duration_since(at) < interval) {
                put_off = true;
                continue;
            }
            let mut by_node: BTreeMap<NodeId, Vec<(EventHead, Ts)>> = BTreeMap::new();
            for (id, stream) in &feed.streams {
                let resolved = feed.resolved_of(stream.span.table);
                let Some(ts) = stream.resolved_to_send(resolved) else { continue };
                let head =
                    EventHead { changefeed: *gid, dispatcher: *id, epoch: stream.epoch, seq: stream.seq };
                by_node.entry(stream.node.clone()).or_default().push((head, ts));
            }
            if !by_node.is_empty() {
                feed.resolved_at = Some(now);
            }
            for (node, entries) in by_node {
                let entries: Arc<[(EventHead, Ts)]> = entries.into();
                let message = ToEventCollector::Resolved { entries: Arc::clone(&entries), time };
                if let Err(error) = self.center.send::<EventCollectorTopic>(&node, message) {
                    tracing::debug!(to = %node, %error, "resolved positions were not sent");
                    put_off = true;
                    continue;
                }
                told += entries.len();
                for (head, ts) in entries.iter() {
                    if let Some(stream) = feed.streams.get_mut(&head.dispatcher) {
                        stream.resolved_sent = *ts;
                    }
                }
            }
        }
        self.metrics.notified(told, now.elapsed());
        put_off
    }
}

/// The first event of a stream. When more was sent, the position where it began with the number of the last event:
/// a receiver that has not got that far sees that something is missing.
fn begun(gid: Gid, id: DispatcherId, stream: &Stream, store: &Store) -> ToEventCollector {
    let head = EventHead { changefeed: gid, dispatcher: id, epoch: stream.epoch, seq: stream.seq };
    if stream.seq > 1 {
        let entries = [(head, stream.start_ts)].into();
        return ToEventCollector::Resolved { entries, time: WallTime::default() };
    }
    // A dispatcher may start further than the log was read: the downstream has executed schema changes that are yet to
    // come again, and a shape from before them would be the wrong one. Its first rows bring the right one.
    let known = stream.start_ts <= store.resolved().0;
    let table = store.table_at(stream.span.table, stream.start_ts).filter(|_| known);
    ToEventCollector::Handshake { head, start_ts: stream.start_ts, table }
}

fn fail(center: &MessageCenter, gid: Gid, id: DispatcherId, stream: &mut Stream, error: &Error) {
    stream.failed = true;
    tracing::warn!(dispatcherID = %id, tableID = %stream.span.table, error = %error.chain(), "cannot serve dispatcher");
    let message = ToEventCollector::Failed {
        changefeed: gid,
        dispatcher: id,
        code: error.code().to_owned(),
        message: error.chain(),
    };
    let _ = center.send::<EventCollectorTopic>(&stream.node, message);
}
