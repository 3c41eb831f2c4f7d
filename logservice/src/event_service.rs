//! The event service: per dispatcher a stream of rows, schema changes and resolved positions, in order.
//!
//! One task per node. It wakes when a store publishes, when a collector asks or frees room, and on a slow
//! timer for repetition; it never polls. What it may send is bounded by the receiver's credit.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use event::DdlEvent;
use heartbeatpb::{ChangefeedId, DispatcherId, Gid, NodeId, TableId, TableSpan, Ts, WallTime};
use messaging::{Inbound, MessageCenter};
use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::event_store::{Position, Scan, Store};
use crate::topic::{
    EventCollectorTopic, EventHead, EventServiceTopic, SharedBatch, ToEventCollector, ToEventService,
};
use crate::{Error, metrics};

/// Waiting requests. Collectors repeat what is lost.
const INBOX: usize = 16_384;
/// A registered dispatcher that was not reset yet is told again that it is ready.
const READY_AGAIN: Duration = Duration::from_secs(1);
/// Shortest time between two resolved positions of a dispatcher that has no rows.
const RESOLVED_INTERVAL: Duration = Duration::from_millis(25);
/// Dispatchers for which one resolved message is paid in full; more of them are told less often.
const RESOLVED_BATCH: usize = 4096;
/// Chunks of one dispatcher sent in a row before the next one has its turn.
const FAIR_CHUNKS: usize = 8;

/// The stores of this node, by changefeed.
#[derive(Default)]
pub(crate) struct Stores {
    pub(crate) by_feed: Mutex<BTreeMap<Gid, Arc<Store>>>,
    /// Something became visible in one of them, or the set changed.
    pub(crate) changed: Arc<Notify>,
}

/// One registered dispatcher.
struct Stream {
    node: NodeId,
    span: TableSpan,
    epoch: u64,
    seq: u64,
    position: Position,
    /// Largest DDL that was sent.
    ddl_sent: Ts,
    resolved_sent: Ts,
    ready_sent: Option<Instant>,
    queued: bool,
    failed: bool,
}

/// What a receiver may be sent.
#[derive(Default)]
struct Credit {
    opening: u64,
    sent: u64,
    freed: u64,
    window: u64,
}

impl Credit {
    fn available(&self) -> bool {
        self.sent.saturating_sub(self.freed) < self.window
    }
}

#[derive(Default)]
struct Feed {
    streams: BTreeMap<DispatcherId, Stream>,
    by_table: FxHashMap<TableId, Vec<DispatcherId>>,
    credits: BTreeMap<NodeId, Credit>,
    /// Streams that may have rows to send.
    ready: VecDeque<DispatcherId>,
    /// Resolved ts as of the last look at the store: every row at or before it was queued or sent.
    resolved: Ts,
    resolved_time: WallTime,
    resolved_at: Option<Instant>,
}

/// The task. See [`crate::LogService`].
pub(crate) struct EventService {
    center: MessageCenter,
    stores: Arc<Stores>,
    feeds: BTreeMap<Gid, Feed>,
    metrics: metrics::ServiceMetrics,
}

impl EventService {
    pub(crate) fn new(center: MessageCenter, stores: Arc<Stores>) -> Self {
        Self { center, stores, feeds: BTreeMap::new(), metrics: metrics::ServiceMetrics::new() }
    }

    /// Serves until `shutdown`.
    pub(crate) async fn run(mut self, shutdown: CancellationToken) {
        let mut inbox = self.center.register::<EventServiceTopic>(INBOX);
        let changed = Arc::clone(&self.stores.changed);
        let mut tick = tokio::time::interval(RESOLVED_INTERVAL);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut resolved_pending = false;
        loop {
            let blocked = tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                request = inbox.recv() => {
                    let Some(request) = request else { return };
                    self.on_request(request);
                    while let Some(request) = inbox.try_recv() {
                        self.on_request(request);
                    }
                    self.send_rows().await
                }
                () = changed.notified() => {
                    self.collect_dirty();
                    resolved_pending = true;
                    self.send_rows().await
                }
                _ = tick.tick(), if resolved_pending || self.anyone_waits() => {
                    resolved_pending = false;
                    self.repeat_ready();
                    self.send_rows().await
                }
            };
            if !blocked {
                resolved_pending |= self.send_resolved();
            }
        }
    }

    fn anyone_waits(&self) -> bool {
        self.feeds.values().any(|feed| feed.streams.values().any(|stream| stream.epoch == 0))
    }

    fn store(&self, feed: Gid) -> Option<Arc<Store>> {
        self.stores.by_feed.lock().get(&feed).cloned()
    }

    fn on_request(&mut self, request: Inbound<ToEventService>) {
        let from = request.from;
        match request.message {
            ToEventService::Register { changefeed, dispatcher, span, start_ts } => {
                self.register(&changefeed, dispatcher, span, start_ts, from);
            }
            ToEventService::Reset { changefeed, dispatcher, epoch, start_ts } => {
                self.reset(&changefeed, dispatcher, epoch, start_ts, &from);
            }
            ToEventService::Remove { changefeed, dispatcher } => self.remove(changefeed.gid, dispatcher),
            ToEventService::Heartbeat { changefeed, progress } => {
                for entry in progress {
                    self.on_progress(changefeed.gid, &entry, &from);
                }
            }
            ToEventService::Credit { changefeed, opening, freed, window } => {
                let credit = self.feeds.entry(changefeed.gid).or_default().credits.entry(from).or_default();
                if opening > credit.opening {
                    *credit = Credit { opening, ..Credit::default() };
                }
                if opening == credit.opening {
                    credit.freed = credit.freed.max(freed);
                    credit.window = window;
                }
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
        if self.store(changefeed.gid).is_none() {
            // The reader has not started yet; the collector asks again.
            return;
        }
        let feed = self.feeds.entry(changefeed.gid).or_default();
        let stream = feed.streams.entry(id).or_insert_with(|| {
            feed.by_table.entry(span.table).or_default().push(id);
            Stream {
                node: node.clone(),
                span,
                epoch: 0,
                seq: 0,
                position: Position::after(start),
                ddl_sent: start,
                resolved_sent: Ts::ZERO,
                ready_sent: None,
                queued: false,
                failed: false,
            }
        });
        stream.node = node;
        stream.ready_sent = Some(Instant::now());
        let ready = ToEventCollector::Ready { changefeed: changefeed.gid, dispatcher: id };
        let _ = self.center.send::<EventCollectorTopic>(&stream.node, ready);
    }

    fn repeat_ready(&mut self) {
        let now = Instant::now();
        for (gid, feed) in &mut self.feeds {
            for (id, stream) in feed.streams.iter_mut().filter(|(_, stream)| stream.epoch == 0) {
                if stream.ready_sent.is_none_or(|at| now.duration_since(at) >= READY_AGAIN) {
                    stream.ready_sent = Some(now);
                    let ready = ToEventCollector::Ready { changefeed: *gid, dispatcher: *id };
                    let _ = self.center.send::<EventCollectorTopic>(&stream.node, ready);
                }
            }
        }
    }

    fn reset(
        &mut self,
        changefeed: &ChangefeedId,
        id: DispatcherId,
        epoch: u64,
        start_ts: Ts,
        from: &NodeId,
    ) {
        let gid = changefeed.gid;
        let store = self.store(gid);
        let feed = self.feeds.entry(gid).or_default();
        let (Some(stream), Some(store)) = (feed.streams.get_mut(&id), store) else {
            let unknown = ToEventCollector::NotRegistered { changefeed: gid, dispatcher: id };
            let _ = self.center.send::<EventCollectorTopic>(from, unknown);
            return;
        };
        if epoch <= stream.epoch {
            return;
        }
        if stream.epoch > 0 {
            self.metrics.resets.increment(1);
        }
        stream.epoch = epoch;
        stream.seq = 1;
        stream.position = Position::after(start_ts);
        stream.ddl_sent = start_ts;
        stream.resolved_sent = Ts::ZERO;
        stream.failed = false;
        let handshake = ToEventCollector::Handshake {
            head: EventHead { changefeed: gid, dispatcher: id, epoch, seq: 1 },
            start_ts,
            table: store.table_at(stream.span.table, start_ts),
        };
        let _ = self.center.send::<EventCollectorTopic>(&stream.node, handshake);
        if !stream.queued {
            stream.queued = true;
            feed.ready.push_back(id);
        }
        self.stores.changed.notify_one();
    }

    fn remove(&mut self, gid: Gid, id: DispatcherId) {
        let Some(feed) = self.feeds.get_mut(&gid) else { return };
        if let Some(stream) = feed.streams.remove(&id)
            && let Some(ids) = feed.by_table.get_mut(&stream.span.table)
        {
            ids.retain(|other| *other != id);
        }
    }

    fn on_progress(&mut self, gid: Gid, entry: &crate::topic::DispatcherProgress, from: &NodeId) {
        let store = self.store(gid);
        let Some(feed) = self.feeds.get(&gid) else { return };
        let Some(stream) = feed.streams.get(&entry.dispatcher) else {
            let unknown = ToEventCollector::NotRegistered { changefeed: gid, dispatcher: entry.dispatcher };
            let _ = self.center.send::<EventCollectorTopic>(from, unknown);
            return;
        };
        if stream.epoch != entry.epoch {
            return;
        }
        // A table that several spans read is trimmed by none of them alone: the smallest would have to be known.
        let table = stream.span.table;
        let alone = feed.by_table.get(&table).is_some_and(|ids| ids.len() == 1);
        if let (true, Some(store)) = (alone, store) {
            store.trim(table, entry.checkpoint, entry.copied);
        }
    }

    /// Queues the streams of tables that have new rows. Drops feeds whose store was closed.
    fn collect_dirty(&mut self) {
        let stores: Vec<(Gid, Arc<Store>)> =
            self.stores.by_feed.lock().iter().map(|(gid, store)| (*gid, Arc::clone(store))).collect();
        self.feeds.retain(|gid, _| stores.binary_search_by_key(gid, |(gid, _)| *gid).is_ok());
        for (gid, store) in stores {
            let (dirty, resolved, time) = store.take_dirty();
            let feed = self.feeds.entry(gid).or_default();
            feed.resolved = resolved;
            feed.resolved_time = time;
            for table in dirty {
                for id in feed.by_table.get(&table).into_iter().flatten() {
                    if let Some(stream) = feed.streams.get_mut(id).filter(|stream| !stream.queued) {
                        stream.queued = true;
                        feed.ready.push_back(*id);
                    }
                }
            }
        }
    }

    /// Sends what there is and what fits; says whether somebody is left waiting for room.
    async fn send_rows(&mut self) -> bool {
        let mut blocked = false;
        let gids: Vec<Gid> = self.feeds.keys().copied().collect();
        for gid in gids {
            let Some(store) = self.store(gid) else { continue };
            let Some(feed) = self.feeds.get_mut(&gid) else { continue };
            let mut waiting = VecDeque::new();
            while let Some(id) = feed.ready.pop_front() {
                let Some(stream) = feed.streams.get_mut(&id) else { continue };
                stream.queued = false;
                if stream.epoch == 0 || stream.failed {
                    continue;
                }
                let credit = feed.credits.entry(stream.node.clone()).or_default();
                match pump(&self.center, &store, gid, id, stream, credit, &self.metrics).await {
                    Ok(Pumped::All) => {}
                    Ok(Pumped::MoreToSend) => {
                        stream.queued = true;
                        feed.ready.push_back(id);
                    }
                    Ok(Pumped::NoRoom) => {
                        stream.queued = true;
                        waiting.push_back(id);
                    }
                    Err(error) => fail(&self.center, gid, id, stream, &error),
                }
            }
            blocked |= !waiting.is_empty();
            feed.ready = waiting;
        }
        blocked
    }

    /// Tells caught-up dispatchers how far they are; says whether some were put off.
    fn send_resolved(&mut self) -> bool {
        let now = Instant::now();
        let mut put_off = false;
        let gids: Vec<Gid> = self.feeds.keys().copied().collect();
        for gid in gids {
            let Some(feed) = self.feeds.get_mut(&gid) else { continue };
            let (resolved, time) = (feed.resolved, feed.resolved_time);
            let share = u32::try_from(feed.streams.len() / RESOLVED_BATCH + 1).unwrap_or(u32::MAX);
            let interval = RESOLVED_INTERVAL * share;
            if feed.resolved_at.is_some_and(|at| now.duration_since(at) < interval) {
                put_off = true;
                continue;
            }
            let mut by_node: BTreeMap<NodeId, Vec<(EventHead, Ts)>> = BTreeMap::new();
            for (id, stream) in &mut feed.streams {
                if stream.epoch == 0 || stream.queued || stream.failed || stream.resolved_sent >= resolved {
                    continue;
                }
                stream.resolved_sent = resolved;
                let head =
                    EventHead { changefeed: gid, dispatcher: *id, epoch: stream.epoch, seq: stream.seq };
                by_node.entry(stream.node.clone()).or_default().push((head, resolved));
            }
            if !by_node.is_empty() {
                feed.resolved_at = Some(now);
            }
            self.tell_resolved(by_node, time);
        }
        put_off
    }

    fn tell_resolved(&self, by_node: BTreeMap<NodeId, Vec<(EventHead, Ts)>>, time: WallTime) {
        for (node, entries) in by_node {
            let message = ToEventCollector::Resolved { entries: entries.into(), time };
            if let Err(error) = self.center.send::<EventCollectorTopic>(&node, message) {
                tracing::debug!(to = %node, %error, "resolved positions were not sent");
            }
        }
    }
}

enum Pumped {
    All,
    MoreToSend,
    NoRoom,
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

/// Sends a few chunks of one stream, schema changes at their place between them.
async fn pump(
    center: &MessageCenter,
    store: &Store,
    gid: Gid,
    id: DispatcherId,
    stream: &mut Stream,
    credit: &mut Credit,
    metrics: &metrics::ServiceMetrics,
) -> Result<Pumped, Error> {
    let mut ddls: VecDeque<Arc<DdlEvent>> = store.ddls(stream.span.table, stream.ddl_sent).into();
    for _ in 0..FAIR_CHUNKS {
        if !credit.available() {
            return Ok(Pumped::NoRoom);
        }
        let found = if stream.span.table == TableId::DDL {
            Scan::End
        } else {
            store.scan(stream.span.table, stream.position)?
        };
        let found = match found {
            Scan::Rows(batch, next) => Some((batch, next)),
            Scan::OnDisk(chunk) => Some(
                tokio::task::spawn_blocking(move || Store::load(&chunk))
                    .await
                    .map_err(|_| Error::Closed { what: "the event store's reader" })??,
            ),
            Scan::End => None,
        };
        let next_rows = found.as_ref().and_then(|(batch, _)| batch.first_commit_ts()).unwrap_or(Ts::MAX);
        // At one commit ts rows come before a schema change.
        if let Some(ddl) = ddls.front().filter(|ddl| ddl.commit_ts < next_rows) {
            let head = next_head(gid, id, stream);
            stream.ddl_sent = ddl.commit_ts;
            let message = ToEventCollector::Ddl { head, ddl: Arc::clone(ddl) };
            ddls.pop_front();
            let _ = center.send::<EventCollectorTopic>(&stream.node, message);
            continue;
        }
        let Some((batch, next)) = found else { return Ok(Pumped::All) };
        let (batch, next) = match ddls.front() {
            Some(ddl) if batch.last_commit_ts() > Some(ddl.commit_ts) => cut_at(&batch, ddl.commit_ts),
            Some(_) | None => (batch, next),
        };
        let bytes = batch.bytes() as u64;
        let rows = batch.row_count();
        let message = ToEventCollector::Rows { head: next_head(gid, id, stream), batch: SharedBatch(batch) };
        stream.position = next;
        match center.send::<EventCollectorTopic>(&stream.node, message) {
            // A lost batch is a gap in the sequence: the receiver resets.
            Ok(()) | Err(_) => credit.sent += bytes,
        }
        metrics.sent(rows, bytes);
    }
    Ok(Pumped::MoreToSend)
}

fn next_head(gid: Gid, id: DispatcherId, stream: &mut Stream) -> EventHead {
    stream.seq += 1;
    EventHead { changefeed: gid, dispatcher: id, epoch: stream.epoch, seq: stream.seq }
}

/// The rows at or before `ts`, and the place after them.
fn cut_at(batch: &event::RowBatch, ts: Ts) -> (event::RowBatch, Position) {
    let marks: Vec<event::TxnMark> =
        batch.txns().iter().take_while(|mark| mark.commit_ts <= ts).copied().collect();
    (batch.first_txns(marks), Position::after(ts))
}
