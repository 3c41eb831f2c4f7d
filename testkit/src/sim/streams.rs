//! The event streams of one node: what its dispatcher managers subscribed to, served out of the feeds' logs.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::BytesMut;
use dispatcher_manager::EventSource;
use event::{
    BlockEvent, Column, ColumnType, Datum, IdentityKind, ReplicaIdentity, RowBatch, RowOp, TableInfo,
    TupleWriter, TxnMark, TypeKind, UniqueKey, put_row,
};
use heartbeatpb::{
    ChangefeedId, DispatcherId, Gid, NodeId, SchemaId, TableId, TableSpan, Ts, WallTime, codes,
};
use logservice::event_store::Position;
use logservice::{Credit, Delivery, DispatcherEvent, Subscription};
use tokio::sync::mpsc;

use super::feed::{Change, Feed, Item};
use super::world::{Shared, World};

/// Room of a changefeed's queue: more than a step delivers.
const QUEUE: usize = 4_096;
/// Whoever says nothing for so long, in milliseconds, is not waited for where the log is read.
const SILENCE: u64 = 60_000;
/// Events that a stream gets in one step.
const BURST: usize = 12;

/// One subscription and how far it was served.
pub(super) struct Stream {
    pub(super) subscription: Subscription,
    begun: bool,
    position: u64,
    resolved: u64,
    /// It stands still until its dispatcher has passed this schema change.
    at_ddl: Option<u64>,
    /// What is next for it is gone.
    failed: bool,
    /// How far its dispatcher said last that it is, where the log is read, and when.
    told: Option<(u64, u64)>,
}

impl Stream {
    fn new(subscription: Subscription, position: u64) -> Self {
        Self { subscription, begun: false, position, resolved: 0, at_ddl: None, failed: false, told: None }
    }
}

/// The subscriptions of one node.
#[derive(Default)]
pub(super) struct Streams {
    queues: BTreeMap<Gid, mpsc::Sender<Delivery>>,
    pub(super) streams: BTreeMap<(Gid, DispatcherId), Stream>,
}

/// A node's way to its streams.
pub(super) struct Source {
    pub(super) node: NodeId,
    pub(super) world: Shared,
}

impl Source {
    fn with(&self, f: impl FnOnce(&mut Streams)) {
        if let Some(process) = self.world.lock().processes.get_mut(&self.node) {
            f(&mut process.streams);
        }
    }
}

impl EventSource for Source {
    fn open(&self, changefeed: &ChangefeedId, _quota_bytes: usize) -> mpsc::Receiver<Delivery> {
        let (sender, receiver) = mpsc::channel(QUEUE);
        self.with(|streams| drop(streams.queues.insert(changefeed.gid, sender)));
        receiver
    }

    fn close(&self, changefeed: &ChangefeedId) {
        self.with(|streams| {
            streams.queues.remove(&changefeed.gid);
            streams.streams.retain(|(gid, _), _| *gid != changefeed.gid);
        });
    }

    fn subscribe(&self, subscription: Subscription) {
        let mut world = self.world.lock();
        let gid = subscription.changefeed.gid;
        let start = subscription.start_ts.0;
        let retained = world.feeds.get(&gid).map_or(0, |feed| feed.retained);
        let text = format!(
            "{}: stream of {:?} ({:?}) from {start}, read at {}",
            self.node, subscription.span, subscription.dispatcher, subscription.event_service
        );
        world.note(text);
        let takes = world.feeds.get(&gid).is_some_and(|feed| feed.takes_from(&self.node));
        if start < retained && takes && world.is_trusted(&self.node) {
            let text =
                format!("{:?} wants the log from {start}, which ends at {retained}", subscription.span);
            world.violated("RETENTION", &text);
        }
        // What the target refuses anyway replicates nothing: it goes when its node hears that it was given up.
        if takes && world.emptied.contains(&self.node) {
            let text = format!(
                "{:?} begins on {}, of which a drain said that it is empty",
                subscription.span, self.node
            );
            world.violated("DRAIN-ZERO", &text);
        }
        let key = (gid, subscription.dispatcher);
        let stream = Stream::new(subscription, start);
        if let Some(process) = world.processes.get_mut(&self.node) {
            process.streams.streams.insert(key, stream);
        }
    }

    fn unsubscribe(&self, changefeed: &ChangefeedId, dispatcher: DispatcherId) {
        self.with(|streams| drop(streams.streams.remove(&(changefeed.gid, dispatcher))));
    }

    fn copied(&self, _changefeed: &ChangefeedId, _dispatcher: DispatcherId, _position: Position) {}
}

/// Serves every stream that can be served; `percent` of them in a step. Streams in `restart` percent of the cases
/// begin again at their dispatcher's checkpoint, as after a gap.
pub(super) fn serve(world: &mut World, percent: u64, restart: u64) {
    let nodes: Vec<NodeId> = world.processes.keys().cloned().collect();
    let mut refused = Vec::new();
    for node in nodes {
        let Some(process) = world.processes.get_mut(&node) else { continue };
        if process.paused {
            continue;
        }
        let mut streams = std::mem::take(&mut process.streams);
        for (key, stream) in &mut streams.streams {
            if !world.chance(percent) {
                continue;
            }
            let begin_again = world.chance(restart);
            let Some(feed) = world.feeds.get(&key.0) else { continue };
            let service = &stream.subscription.event_service;
            let read_there = feed.reader.as_ref().is_some_and(|reader| reader.node == *service);
            let awake = world.processes.get(service).is_some_and(|process| !process.paused);
            if !read_there || !(awake || *service == node) || !world.linked(&node, service) {
                continue;
            }
            if begin_again && stream.begun {
                let position = stream.subscription.checkpoint.get().0.max(stream.subscription.start_ts.0);
                *stream = Stream::new(stream.subscription.clone(), position);
            }
            if let Some(queue) = streams.queues.get(&key.0) {
                serve_one(feed, queue, stream);
            }
            if stream.begun {
                stream.told = Some((stream.subscription.checkpoint.get().0, world.now));
            }
            if stream.failed && feed.takes_from(&node) && world.is_trusted(&node) {
                let text = format!(
                    "{:?} on {node} wants the log from {}, and it is kept from {}",
                    stream.subscription.span,
                    stream.position,
                    feed.kept.starts_at(stream.subscription.span.table.0)
                );
                refused.push(text);
            }
        }
        if let Some(process) = world.processes.get_mut(&node) {
            process.streams = streams;
        }
    }
    refused.iter().for_each(|text| world.violated("FLOOR", text));
}

/// Those who read a table of a log, as it is known where that is read.
struct Readers<'w> {
    spans: Vec<&'w TableSpan>,
    /// How far each is, unless it has not said so yet.
    told: Vec<Option<u64>>,
    /// They run on the node where the log is read.
    all_here: bool,
}

impl Readers<'_> {
    /// How far the slowest is; `None` as long as one has told nothing, or a part of the table has no reader.
    fn slowest(&self) -> Option<u64> {
        let told = self.told.iter().copied().reduce(|one, other| Some(one?.min(other?))).flatten();
        told.filter(|_| is_covered(self.spans.clone()))
    }
}

/// Drops of the logs, where they are read, what nobody needs again.
pub(super) fn trim(world: &mut World) {
    let World { feeds, processes, now, .. } = world;
    for (gid, feed) in feeds {
        let Some(here) = feed.reader.as_ref().map(|reader| &reader.node) else { continue };
        if processes.get(here).is_none_or(|process| process.paused) {
            continue;
        }
        let mut tables: BTreeMap<i64, Readers<'_>> = BTreeMap::new();
        for (node, process) in &*processes {
            let of_feed = process.streams.streams.range((*gid, DispatcherId::new(0, 0))..);
            let reads_here = |stream: &&Stream| stream.subscription.event_service == *here;
            let is_heard = |stream: &&Stream| stream.told.is_none_or(|(_, heard)| heard + SILENCE > *now);
            let of_feed = of_feed.take_while(|((of, _), _)| of == gid).map(|(_, stream)| stream);
            for stream in of_feed.filter(reads_here).filter(is_heard) {
                let span = &stream.subscription.span;
                let readers = tables.entry(span.table.0).or_insert_with(|| Readers {
                    spans: Vec::new(),
                    told: Vec::new(),
                    all_here: true,
                });
                readers.spans.push(span);
                readers.told.push(stream.told.map(|(ts, _)| ts));
                readers.all_here &= node == here;
            }
        }
        // Of the schema changes that the table trigger reads the last ones are always kept.
        tables.remove(&TableId::DDL.0);
        for (table, readers) in tables {
            if let Some(slowest) = readers.slowest() {
                feed.kept.trim(table, slowest, readers.all_here);
            }
        }
    }
}

/// Whether spans of a table cover all of it.
fn is_covered(mut spans: Vec<&TableSpan>) -> bool {
    spans.sort_unstable_by(|one, other| one.start.cmp(&other.start));
    let mut end: Option<&[u8]> = Some(&[]);
    for span in spans {
        match end {
            Some(reached) if span.start.as_slice() <= reached => {
                end = (!span.end.is_empty()).then(|| reached.max(&span.end));
            }
            Some(_) => return false,
            None => return true,
        }
    }
    end.is_none()
}

fn serve_one(feed: &Feed, queue: &mpsc::Sender<Delivery>, stream: &mut Stream) {
    let dispatcher = stream.subscription.dispatcher;
    // A full queue is left for the next step; a stream never loses its place.
    let send = |event| queue.try_send(Delivery { dispatcher, event, credit: Credit::default() }).is_ok();
    if queue.capacity() < BURST + 4 {
        return;
    }
    let table = stream.subscription.span.table.0;
    if stream.failed {
        return;
    }
    if !stream.begun && feed.kept.refuses(table, stream.position) {
        let (code, message) =
            (codes::EVENT_STORE_OUT_OF_RANGE.to_owned(), "the log is not kept from there".to_owned());
        stream.failed = send(DispatcherEvent::Failed { code, message });
        return;
    }
    if !stream.begun {
        // What the reader has not read nobody gets.
        stream.position = stream.position.max(feed.kept.starts_at(table));
        let info = feed
            .tables
            .get(&table)
            .map(|known| shape(table, stream.position, known.schema_at(stream.position)));
        stream.begun = send(DispatcherEvent::Begin(info));
    }
    if let Some(ts) = stream.at_ddl {
        if stream.subscription.checkpoint.get().0 < ts {
            return;
        }
        stream.at_ddl = None;
    }
    let (next, reached, complete) = next_items(feed, table, stream);
    let mut rows: Vec<Change> = Vec::new();
    for item in next {
        match item {
            Item::Row(change) => rows.push(change),
            Item::Ddl(ddl) => {
                let ts = ddl.commit_ts.0;
                send_rows(&send, table, &mut rows);
                send(DispatcherEvent::Block(BlockEvent::Ddl(Arc::clone(&ddl))));
                send(DispatcherEvent::Resolved { ts: Ts(ts), time: WallTime(0) });
                (stream.position, stream.resolved, stream.at_ddl) = (ts, ts, Some(ts));
                return;
            }
        }
    }
    send_rows(&send, table, &mut rows);
    stream.position = reached;
    if complete && feed.head > stream.resolved {
        stream.resolved = feed.head;
        send(DispatcherEvent::Resolved { ts: Ts(feed.head), time: WallTime(0) });
    }
}

/// The next events of a stream, at most a burst; until which commit ts they go, and whether that is all there is.
/// A transaction is never divided.
fn next_items(feed: &Feed, table: i64, stream: &Stream) -> (Vec<Item>, u64, bool) {
    if table == 0 {
        let from = feed.ddls.partition_point(|ddl| ddl.commit_ts.0 <= stream.position);
        let ddl = feed.ddls[from..].iter().find(|ddl| Feed::concerns_trigger(ddl));
        let next: Vec<Item> = ddl.map(|ddl| Item::Ddl(Arc::clone(ddl))).into_iter().collect();
        return (next, feed.head, true);
    }
    let Some(table) = feed.tables.get(&table) else { return (Vec::new(), stream.position, true) };
    let from = table.items.partition_point(|item| item.ts() <= stream.position);
    let mut until = (from + BURST).min(table.items.len());
    while until > from && until < table.items.len() && table.items[until].ts() == table.items[until - 1].ts()
    {
        until += 1;
    }
    let span = &stream.subscription.span;
    let wanted = |item: &&Item| match item {
        Item::Row(change) => span.contains_key(&change.key.to_be_bytes()),
        Item::Ddl(_) => true,
    };
    let next = table.items[from..until].iter().filter(wanted).cloned().collect();
    let complete = until == table.items.len();
    let reached = if complete { feed.head } else { table.items[until - 1].ts() };
    (next, reached, complete)
}

fn send_rows(send: &impl Fn(DispatcherEvent) -> bool, table: i64, rows: &mut Vec<Change>) {
    if rows.is_empty() {
        return;
    }
    let mut bytes = BytesMut::new();
    let mut txns: Vec<TxnMark> = Vec::new();
    for change in rows.drain(..) {
        let mut image = |out: &mut BytesMut| {
            let mut writer = TupleWriter::new(out);
            writer.push(Datum::Text(change.key.to_string().as_bytes()));
            writer.push(Datum::Text(change.ts.to_string().as_bytes()));
            writer.finish();
        };
        if change.deleted {
            put_row(&mut bytes, RowOp::Delete, Some(&mut image), None);
        } else {
            put_row(&mut bytes, RowOp::Update, None, Some(&mut image));
        }
        match txns.last_mut() {
            Some(txn) if txn.commit_ts == Ts(change.ts) => txn.rows += 1,
            Some(_) | None => txns.push(TxnMark {
                commit_ts: Ts(change.ts),
                start_ts: Ts(change.ts - 1),
                commit_time: WallTime(0),
                rows: 1,
                first_row: 0,
            }),
        }
    }
    send(DispatcherEvent::Rows(RowBatch::trusted(shape(table, 1, 1), txns, bytes.freeze())));
}

/// Two columns: the key and the commit ts of the last change.
fn shape(id: i64, version: u64, schema: i64) -> Arc<TableInfo> {
    let column = |name: &str| Column {
        name: name.to_owned(),
        ty: ColumnType { kind: TypeKind::Int64, sql: "bigint".to_owned(), oid: 20, definitions: Vec::new() },
        nullable: false,
        generated: None,
        identity: IdentityKind::None,
        default: None,
    };
    Arc::new(TableInfo {
        id: TableId(id),
        schema_id: SchemaId(schema),
        schema: "s".to_owned(),
        name: format!("t{id}"),
        version: Ts(version),
        columns: vec![column("k"), column("v")],
        keys: vec![UniqueKey {
            name: "pk".to_owned(),
            columns: vec![0],
            primary: true,
            nulls_not_distinct: false,
        }],
        identity: ReplicaIdentity::Key(vec![0]),
    })
}
