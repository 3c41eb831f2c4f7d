//! A log side, a collector and managers that write down what they get.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use event::{
    BlockEvent, Column, ColumnType, Datum, DdlEvent, DdlKind, IdentityKind, ReplicaIdentity, RowOp,
    TableInfo, TupleWriter, TypeKind, UniqueKey,
};
use heartbeatpb::{
    ChangefeedId, DispatcherId, InfluencedTables, NodeId, SchemaId, TableId, TableSpan, Ts, WallTime,
};
use logservice::event_store::{CopyWriter, Position, StoreStats, StoreWriter};
use logservice::{
    CheckpointSlot, Collector, CollectorHandle, Credit, Delivery, DispatcherEvent, LogConfig, LogService,
    Subscription,
};
use messaging::testing::{Faults, Network};
use messaging::{MessageCenter, MessagingConfig};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

pub(crate) struct LogLimits {
    pub(crate) memory_bytes: usize,
    pub(crate) disk_bytes: u64,
}

/// A row as it is compared: commit ts, row number, value.
pub(crate) type Row = (u64, u64, u64);

/// What a stream showed, without values.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Seen {
    Row(u64),
    Ddl(u64),
}

struct Running {
    shutdown: CancellationToken,
    network: Option<Network>,
    nodes: (NodeId, NodeId),
    dir: tempfile::TempDir,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

pub(crate) struct Rig {
    running: Arc<Running>,
    log: LogService,
    collector: CollectorHandle,
    changefeed: ChangefeedId,
}

impl Rig {
    /// Both sides on one node.
    pub(crate) fn new(limits: LogLimits) -> Self {
        let center = MessageCenter::new(NodeId::from("one"), MessagingConfig::default());
        Self::start(limits, center.clone(), center, None)
    }

    /// The log on one node, the dispatchers on another one.
    pub(crate) fn over_network(limits: LogLimits, seed: u64) -> Self {
        let log = MessageCenter::new(NodeId::from("log"), MessagingConfig::default());
        let dispatchers = MessageCenter::new(NodeId::from("dispatchers"), MessagingConfig::default());
        let network = Network::new(seed);
        network.join(&log);
        network.join(&dispatchers);
        Self::start(limits, log, dispatchers, Some(network))
    }

    fn start(
        limits: LogLimits,
        log_center: MessageCenter,
        center: MessageCenter,
        network: Option<Network>,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let LogLimits { memory_bytes, disk_bytes } = limits;
        let nodes = (log_center.node().clone(), center.node().clone());
        let config = LogConfig { dir: dir.path().to_owned(), memory_bytes, disk_bytes };
        let log = LogService::new(log_center, config);
        let shutdown = CancellationToken::new();
        let (service, stop) = (log.clone(), shutdown.clone());
        tokio::spawn(async move { service.run(stop).await });
        let (task, collector) = Collector::new(center);
        tokio::spawn(task.run(shutdown.clone()));
        let running = Arc::new(Running { shutdown, network, nodes, dir });
        Self { running, log, collector, changefeed: ChangefeedId::fresh("one") }
    }

    /// Another changefeed of the same nodes.
    pub(crate) fn other_changefeed(&self) -> Self {
        Self {
            running: Arc::clone(&self.running),
            log: self.log.clone(),
            collector: self.collector.clone(),
            changefeed: ChangefeedId::fresh("other"),
        }
    }

    /// A further node with dispatchers of the same changefeed.
    pub(crate) fn other_node(&self, name: &str) -> Self {
        let center = MessageCenter::new(NodeId::from(name), MessagingConfig::default());
        self.network().join(&center);
        let (task, collector) = Collector::new(center);
        tokio::spawn(task.run(self.running.shutdown.clone()));
        let running = Arc::clone(&self.running);
        Self { running, log: self.log.clone(), collector, changefeed: self.changefeed.clone() }
    }

    fn network(&self) -> &Network {
        self.running.network.as_ref().unwrap()
    }

    /// Loses everything between the log and the first node with dispatchers, or nothing any more.
    pub(crate) fn cut_off(&self, cut: bool) {
        let (log, dispatchers) = &self.running.nodes;
        for (from, to) in [(log, dispatchers), (dispatchers, log)] {
            let faults = Faults { loss: if cut { 1.0 } else { 0.0 }, ..Faults::NONE };
            self.network().set_link_faults(from, to, faults);
        }
    }

    /// How events travel from the log to the first node with dispatchers.
    pub(crate) fn slow_link(&self, faults: Faults) {
        let (log, dispatchers) = &self.running.nodes;
        self.network().set_link_faults(log, dispatchers, faults);
    }

    /// The files of the stores.
    pub(crate) fn segments(&self) -> Vec<std::path::PathBuf> {
        let (mut found, mut dirs) = (Vec::new(), vec![self.running.dir.path().to_owned()]);
        while let Some(dir) = dirs.pop() {
            for entry in std::fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    dirs.push(path);
                } else if path.extension().is_some_and(|extension| extension == "seg") {
                    found.push(path);
                }
            }
        }
        found
    }

    /// A log whose maintainer has taken over.
    pub(crate) fn open(&self, checkpoint: Ts) -> StoreWriter {
        let writer = self.open_before_the_take_over(checkpoint);
        self.floor(checkpoint);
        writer
    }

    pub(crate) fn open_before_the_take_over(&self, checkpoint: Ts) -> StoreWriter {
        self.log.open(&self.changefeed, checkpoint).unwrap()
    }

    /// The maintainer lets nobody begin below it.
    pub(crate) fn floor(&self, floor: Ts) {
        self.log.raise_floor(&self.changefeed, floor);
    }

    pub(crate) fn close(&self) {
        self.log.close(&self.changefeed);
    }

    pub(crate) fn gate(&self) -> logservice::event_store::Gate {
        self.log.gate(&self.changefeed).unwrap()
    }

    pub(crate) fn stats(&self) -> StoreStats {
        self.log.stats(&self.changefeed).unwrap()
    }

    /// Bytes of the largest message between nodes.
    pub(crate) fn set_largest_message(&self, bytes: usize) {
        self.network().set_largest(bytes);
    }

    pub(crate) fn set_faults(&self, faults: Faults) {
        self.network().set_faults(faults);
    }

    /// Loses every event while `action` runs.
    pub(crate) async fn lose_one_event<F: Future<Output = ()>>(&self, action: impl FnOnce() -> F) {
        let network = self.network();
        let (log, dispatchers) = &self.running.nodes;
        network.set_link_faults(log, dispatchers, Faults { loss: 1.0, ..Faults::NONE });
        action().await;
        network.set_link_faults(log, dispatchers, Faults::NONE);
    }

    pub(crate) fn manager(&self, window: usize) -> Manager {
        Manager {
            deliveries: self.collector.open(self.changefeed.clone(), window),
            collector: self.collector.clone(),
            changefeed: self.changefeed.clone(),
            service: self.running.nodes.0.clone(),
            first_id: 1,
            hold: false,
            wait_at_ddls: false,
            held: Vec::new(),
            streams: BTreeMap::new(),
            begins: 0,
            may_fail: false,
            failed: Vec::new(),
        }
    }
}

struct Stream {
    id: DispatcherId,
    table: i64,
    checkpoint: Arc<CheckpointSlot>,
    /// Rows in the order of their places; a place that comes again must hold the same row.
    rows: BTreeMap<(u64, u64), u64>,
    /// Last place in this epoch.
    last: (u64, u64),
    seen: Vec<Seen>,
    resolved: Ts,
    /// Versions of the shapes of its rows, each once in a row.
    shapes: Vec<Ts>,
    /// Schema change that the dispatcher has not passed.
    at_ddl: Option<Ts>,
}

impl Stream {
    fn assert_nothing_behind_a_ddl(&self, ts: Ts) {
        let at = self.at_ddl.unwrap_or(Ts::MAX);
        assert!(ts <= at, "table {}: {ts} comes before the schema change at {at} is passed", self.table);
    }

    fn pass_ddl(&mut self, at: Ts) {
        self.at_ddl = None;
        self.checkpoint.advance(at);
    }
}

/// Stands for a dispatcher manager.
pub(crate) struct Manager {
    deliveries: mpsc::Receiver<Delivery>,
    collector: CollectorHandle,
    changefeed: ChangefeedId,
    service: NodeId,
    /// First part of its dispatchers' ids.
    pub(crate) first_id: u64,
    /// Whether credits are kept until [`Manager::free_held`].
    pub(crate) hold: bool,
    /// Whether dispatchers wait at a schema change until [`Manager::pass_ddls`], as at a barrier; else they
    /// pass it as soon as their stream says that everything at it has come.
    pub(crate) wait_at_ddls: bool,
    held: Vec<(usize, Credit)>,
    streams: BTreeMap<DispatcherId, Stream>,
    begins: usize,
    /// Whether a stream may fail; else a failure ends the test.
    pub(crate) may_fail: bool,
    /// Codes of failures.
    pub(crate) failed: Vec<String>,
}

impl Manager {
    pub(crate) fn subscribe(&mut self, table: i64, start_ts: Ts) -> DispatcherId {
        self.subscribe_span(TableSpan::whole(TableId(table)), start_ts)
    }

    fn subscribe_span(&mut self, span: TableSpan, start_ts: Ts) -> DispatcherId {
        let table = span.table.0;
        // The same id each time for a table, unless it is in use.
        let mut id = DispatcherId::new(self.first_id, table.cast_unsigned());
        while self.streams.contains_key(&id) {
            id = DispatcherId::new(id.high + 1, id.low);
        }
        let checkpoint = Arc::new(CheckpointSlot::new(start_ts));
        self.collector.subscribe(Subscription {
            changefeed: self.changefeed.clone(),
            dispatcher: id,
            span,
            start_ts,
            event_service: self.service.clone(),
            checkpoint: Arc::clone(&checkpoint),
        });
        let (rows, seen) = (BTreeMap::new(), Vec::new());
        let (last, resolved, at_ddl, shapes) = ((0, 0), Ts::ZERO, None, Vec::new());
        self.streams.insert(id, Stream { id, table, checkpoint, rows, last, seen, resolved, shapes, at_ddl });
        id
    }

    /// Subscribes to the values from `start` (empty: from the first) to before `end` (empty: to the last).
    pub(crate) fn subscribe_range(
        &mut self,
        table: i64,
        [start, end]: [Option<u64>; 2],
        start_ts: Ts,
    ) -> DispatcherId {
        let codec = event::KeyCodec::new(&keyed_table(table)).unwrap();
        let key = |value: u64| codec.encode_values(&[&text(value)]).unwrap();
        let bound = |value: Option<u64>| value.map(key).unwrap_or_default();
        let span = TableSpan { start: bound(start), end: bound(end), ..TableSpan::whole(TableId(table)) };
        self.subscribe_span(span, start_ts)
    }

    pub(crate) fn unsubscribe(&mut self, table: i64) {
        let id = DispatcherId::new(1, table.cast_unsigned());
        self.streams.remove(&id);
        self.collector.unsubscribe(&self.changefeed, id);
    }

    /// Forgets what the streams delivered so far and did not begin with.
    pub(crate) fn forget(&mut self) {
        while self.deliveries.try_recv().is_ok() {}
        for stream in self.streams.values_mut() {
            stream.rows.clear();
            stream.last = (0, 0);
        }
    }

    pub(crate) fn tell_copied(&self, table: i64, commit_ts: Ts, rows: u64) {
        let id = DispatcherId::new(1, table.cast_unsigned());
        self.collector.copied(&self.changefeed, id, Position { commit_ts, rows });
    }

    /// Tells of every stream that what it got of a copy is durable.
    pub(crate) fn tell_all_copied(&self) {
        for (id, stream) in &self.streams {
            let (commit_ts, number) = stream.last;
            let place = Position { commit_ts: Ts(commit_ts), rows: number + 1 };
            self.collector.copied(&self.changefeed, *id, place);
        }
    }

    /// Ends one stream.
    pub(crate) fn remove(&mut self, id: DispatcherId) {
        self.streams.remove(&id);
        self.collector.unsubscribe(&self.changefeed, id);
    }

    pub(crate) fn checkpoint(&self, id: DispatcherId, ts: u64) {
        self.streams[&id].checkpoint.advance(Ts(ts));
    }

    /// Advances every checkpoint to `ts`; answers it.
    pub(crate) fn checkpoint_all(&self, ts: u64) -> Ts {
        for id in self.streams.keys() {
            self.checkpoint(*id, ts);
        }
        Ts(ts)
    }

    pub(crate) async fn next(&mut self, patience: Duration) -> Option<Delivery> {
        tokio::time::timeout(patience, self.deliveries.recv()).await.ok().flatten()
    }

    /// Takes one delivery; says whether one came.
    pub(crate) async fn take(&mut self, patience: Duration) -> bool {
        let Some(Delivery { dispatcher, event, credit }) = self.next(patience).await else { return false };
        if self.hold
            && let DispatcherEvent::Rows(batch) = &event
        {
            self.held.push((batch.bytes(), credit));
        }
        let Some(stream) = self.streams.get_mut(&dispatcher) else { return true };
        match event {
            DispatcherEvent::Begin(_) => {
                self.begins += 1;
                stream.last = (0, 0);
            }
            DispatcherEvent::Rows(batch) => {
                stream.assert_nothing_behind_a_ddl(batch.last_commit_ts().unwrap());
                stream.shapes.push(batch.table.version);
                stream.shapes.dedup();
                for row in batch.iter() {
                    let value = match row.new.and_then(|image| image.get(0)) {
                        Some(Datum::Text(text)) => std::str::from_utf8(text).unwrap().parse().unwrap(),
                        _ => 0,
                    };
                    let place = (row.txn.commit_ts.0, row.row_number);
                    assert!(
                        place > stream.last || stream.last == (0, 0),
                        "{place:?} after {:?}",
                        stream.last
                    );
                    stream.last = place;
                    let before = stream.rows.insert(place, value);
                    assert!(before.is_none_or(|before| before == value), "another row at {place:?}");
                    assert!(
                        before.is_some() || row.txn.commit_ts > stream.resolved,
                        "table {}: {place:?} comes after resolved {}",
                        stream.table,
                        stream.resolved
                    );
                    stream.seen.push(Seen::Row(place.0));
                }
            }
            DispatcherEvent::Resolved { ts, .. } => {
                stream.assert_nothing_behind_a_ddl(ts);
                stream.resolved = stream.resolved.max(ts);
                if let Some(at) = stream.at_ddl.filter(|at| *at <= ts && !self.wait_at_ddls) {
                    stream.pass_ddl(at);
                }
            }
            DispatcherEvent::Block(BlockEvent::Ddl(ddl)) => {
                stream.seen.push(Seen::Ddl(ddl.commit_ts.0));
                stream.at_ddl = Some(ddl.commit_ts);
            }
            DispatcherEvent::Block(BlockEvent::SyncPoint(_)) => {}
            DispatcherEvent::Failed { code, message } => {
                assert!(self.may_fail, "{}: {code} {message}", stream.id);
                self.failed.push(code);
            }
        }
        true
    }

    pub(crate) async fn until_resolved(&mut self, ts: u64, patience: Duration) {
        let deadline = Instant::now() + patience;
        while self.resolved_of_all() < Ts(ts) {
            assert!(Instant::now() < deadline, "stands still at {}", self.resolved_of_all());
            self.take(Duration::from_millis(100)).await;
        }
    }

    pub(crate) fn resolved(&self, id: DispatcherId) -> Ts {
        self.streams[&id].resolved
    }

    pub(crate) fn resolved_of_all(&self) -> Ts {
        self.streams.values().map(|stream| stream.resolved).min().unwrap_or_default()
    }

    /// Whether every dispatcher waits at a schema change.
    pub(crate) fn all_wait_at_ddls(&self) -> bool {
        self.streams.values().all(|stream| stream.at_ddl.is_some())
    }

    /// The barrier is done: every dispatcher passes its schema change.
    pub(crate) fn pass_ddls(&mut self) {
        for stream in self.streams.values_mut() {
            if let Some(at) = stream.at_ddl {
                stream.pass_ddl(at);
            }
        }
    }

    pub(crate) fn held_bytes(&self) -> usize {
        self.held.iter().map(|(bytes, _)| bytes).sum()
    }

    pub(crate) fn free_held(&mut self) {
        self.held.clear();
    }

    pub(crate) fn begins(&self) -> usize {
        self.begins
    }

    pub(crate) fn shapes(&self, id: DispatcherId) -> Vec<Ts> {
        self.streams[&id].shapes.clone()
    }

    pub(crate) fn rows_of(&self, id: DispatcherId) -> Vec<Row> {
        self.streams[&id].rows.iter().map(|((ts, number), value)| (*ts, *number, *value)).collect()
    }

    pub(crate) fn rows(&self, table: i64) -> Vec<Row> {
        let stream = self.streams.values().find(|stream| stream.table == table).unwrap();
        stream.rows.iter().map(|((ts, number), value)| (*ts, *number, *value)).collect()
    }

    pub(crate) fn seen(&self, table: i64) -> Vec<Seen> {
        self.streams.values().find(|stream| stream.table == table).unwrap().seen.clone()
    }
}

/// What was written.
#[derive(Default)]
pub(crate) struct Sent {
    rows: BTreeMap<i64, Vec<Row>>,
    copies: BTreeMap<i64, (u64, u64)>,
    bytes: usize,
}

impl Sent {
    pub(crate) fn rows(&self, table: i64) -> Vec<Row> {
        self.rows.get(&table).cloned().unwrap_or_default()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    async fn write(
        &mut self,
        writer: &mut StoreWriter,
        commit_ts: u64,
        rows: &[(i64, usize)],
        ddl: bool,
        again: bool,
    ) {
        writer.begin(Ts(commit_ts - 1));
        for (table, count) in rows {
            for number in 0..*count as u64 {
                let value = commit_ts * 1_000_000 + number;
                writer.row(TableId(*table), RowOp::Insert, None, Some(&mut image(value))).unwrap();
                self.bytes += 79;
                let row = (commit_ts, number, value);
                let sent = self.rows.entry(*table).or_default();
                if !again || sent.last().is_none_or(|last| *last < row) {
                    sent.push(row);
                }
                if number % 1000 == 999 {
                    writer.room().await.unwrap();
                }
            }
            if ddl {
                writer.ddl(ddl_event(*table, commit_ts));
            }
        }
        writer.commit(Ts(commit_ts), WallTime(1)).await.unwrap();
    }

    pub(crate) async fn transaction(
        &mut self,
        writer: &mut StoreWriter,
        commit_ts: u64,
        rows: &[(i64, usize)],
    ) {
        self.write(writer, commit_ts, rows, false, false).await;
    }

    /// As [`Sent::transaction`], for one that may have been written to an earlier store.
    pub(crate) async fn transaction_again(
        &mut self,
        writer: &mut StoreWriter,
        commit_ts: u64,
        rows: &[(i64, usize)],
    ) {
        self.write(writer, commit_ts, rows, false, true).await;
    }

    /// A schema change that several tables must pass together.
    pub(crate) async fn wide_ddl(&mut self, writer: &mut StoreWriter, commit_ts: u64, tables: &[i64]) {
        writer.begin(Ts(commit_ts - 1));
        let blocked = tables.iter().map(|id| TableId(*id)).collect();
        let ddl = ddl_event(tables[0], commit_ts);
        writer.ddl(DdlEvent { blocked: Some(InfluencedTables::Normal(blocked)), ..ddl });
        writer.commit(Ts(commit_ts), WallTime(1)).await.unwrap();
    }

    pub(crate) async fn transaction_with_ddl(
        &mut self,
        writer: &mut StoreWriter,
        commit_ts: u64,
        rows: &[(i64, usize)],
    ) {
        self.write(writer, commit_ts, rows, true, false).await;
    }

    pub(crate) fn copy_start(&mut self, table: i64, snapshot: u64) {
        self.rows.entry(table).or_default().push((snapshot, 0, 0));
        self.copies.insert(table, (snapshot, 1));
    }

    pub(crate) async fn copy_rows(&mut self, copy: &mut CopyWriter, table: i64, count: u64) {
        let (snapshot, next) = self.copies.get_mut(&table).unwrap();
        for _ in 0..count {
            let value = 500_000_000 + *next;
            copy.row(&mut image(value));
            self.rows.entry(table).or_default().push((*snapshot, *next, value));
            *next += 1;
            if *next % 500 == 0 {
                copy.room().await.unwrap();
            }
        }
    }
}

fn text(value: u64) -> String {
    format!("{value:0>64}")
}

pub(crate) fn image(value: u64) -> impl FnMut(&mut BytesMut) {
    image_of(text(value))
}

/// The image of a row with one text.
pub(crate) fn image_of(text: String) -> impl FnMut(&mut BytesMut) {
    move |out| {
        let mut tuple = TupleWriter::new(out);
        tuple.push(Datum::Text(text.as_bytes()));
        tuple.finish();
    }
}

fn ddl_event(table: i64, commit_ts: u64) -> DdlEvent {
    DdlEvent {
        commit_time: WallTime(1),
        schema_id: SchemaId(1),
        table_id: TableId(table),
        schema: "public".to_owned(),
        table: format!("t{table}"),
        query: "ALTER TABLE".to_owned(),
        ..DdlEvent::new(DdlKind::AlterTable, Ts(commit_ts))
    }
}

pub(crate) fn table(id: i64) -> Arc<TableInfo> {
    Arc::new(TableInfo {
        id: TableId(id),
        schema_id: SchemaId(1),
        schema: "public".to_owned(),
        name: format!("t{id}"),
        version: Ts(1),
        columns: Vec::new(),
        keys: Vec::new(),
        identity: ReplicaIdentity::Full,
    })
}

/// A table whose only column, the value, is its primary key.
pub(crate) fn keyed_table(id: i64) -> TableInfo {
    let column = Column {
        name: "v".to_owned(),
        ty: ColumnType { kind: TypeKind::Text, sql: "text".to_owned(), oid: 25, definitions: Vec::new() },
        nullable: false,
        generated: None,
        identity: IdentityKind::None,
        default: None,
    };
    let key =
        UniqueKey { name: "key".to_owned(), columns: vec![0], primary: true, nulls_not_distinct: false };
    let identity = ReplicaIdentity::Key(vec![0]);
    TableInfo { columns: vec![column], keys: vec![key], identity, ..(*table(id)).clone() }
}

pub(crate) fn register(writer: &mut StoreWriter, id: i64) {
    writer.register_table(table(id));
}

pub(crate) fn publish(writer: &mut StoreWriter, resolved: u64) {
    writer.publish(Ts(resolved), WallTime(1));
}
