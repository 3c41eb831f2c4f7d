//! Fakes of what a dispatcher manager uses: a source of events that is filled by hand, and a sink that writes down
//! what it is told and fails or waits on demand.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use bytes::BytesMut;
use event::{
    BlockEvent, Column, ColumnType, Datum, IdentityKind, ReplicaIdentity, RowBatch, RowOp, TableInfo,
    TupleWriter, TxnMark, TypeKind, UniqueKey, put_row,
};
use heartbeatpb::config::DispatcherManagerConfig;
use heartbeatpb::{ChangefeedId, DispatcherId, Gid, SchemaId, TableId, TableSpan, Ts, WallTime};
use logservice::event_store::Position;
use logservice::{Credit, Delivery, DispatcherEvent, Subscription};
use parking_lot::Mutex;
use sink::{Flushed, Sink, TableStart};
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::{EventSource, SinkFactory};

/// Room of a fake queue: more than any test delivers at once.
const QUEUE: usize = 65_536;

#[derive(Default)]
struct SourceState {
    queues: BTreeMap<Gid, mpsc::Sender<Delivery>>,
    subscriptions: BTreeMap<DispatcherId, Subscription>,
    history: Vec<String>,
}

/// A source of events that delivers what a test hands it. Clones are one source.
#[derive(Clone, Default)]
pub struct FakeSource {
    state: Arc<Mutex<SourceState>>,
}

impl std::fmt::Debug for FakeSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FakeSource")
    }
}

impl FakeSource {
    /// Delivers an event to whoever opened the changefeed's queue; says whether it could.
    pub fn deliver(
        &self,
        changefeed: &ChangefeedId,
        dispatcher: DispatcherId,
        event: DispatcherEvent,
    ) -> bool {
        let queue = self.state.lock().queues.get(&changefeed.gid).cloned();
        let delivery = Delivery { dispatcher, event, credit: Credit::default() };
        queue.is_some_and(|queue| queue.try_send(delivery).is_ok())
    }

    /// What a dispatcher asked for, while it does.
    #[must_use]
    pub fn subscription(&self, dispatcher: DispatcherId) -> Option<Subscription> {
        self.state.lock().subscriptions.get(&dispatcher).cloned()
    }

    /// Whether the changefeed's queue is open.
    #[must_use]
    pub fn is_open(&self, changefeed: &ChangefeedId) -> bool {
        self.state.lock().queues.contains_key(&changefeed.gid)
    }

    /// Everything that was asked, in order.
    #[must_use]
    pub fn history(&self) -> Vec<String> {
        self.state.lock().history.clone()
    }
}

impl EventSource for FakeSource {
    fn open(&self, changefeed: &ChangefeedId, quota_bytes: usize) -> mpsc::Receiver<Delivery> {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let mut state = self.state.lock();
        state.queues.insert(changefeed.gid, sender);
        state.history.push(format!("open {quota_bytes}"));
        receiver
    }

    fn close(&self, changefeed: &ChangefeedId) {
        let mut state = self.state.lock();
        state.queues.remove(&changefeed.gid);
        state.subscriptions.retain(|_, subscription| subscription.changefeed != *changefeed);
        state.history.push("close".into());
    }

    fn subscribe(&self, subscription: Subscription) {
        let mut state = self.state.lock();
        let id = subscription.dispatcher;
        state.history.push(format!("subscribe {}@{}", id.low, subscription.start_ts));
        state.subscriptions.insert(id, subscription);
    }

    fn unsubscribe(&self, _changefeed: &ChangefeedId, dispatcher: DispatcherId) {
        let mut state = self.state.lock();
        state.history.push(format!("unsubscribe {}", dispatcher.low));
        state.subscriptions.remove(&dispatcher);
    }

    fn copied(&self, _changefeed: &ChangefeedId, dispatcher: DispatcherId, position: Position) {
        let shown = format!("copied {} {}+{}", dispatcher.low, position.commit_ts, position.rows);
        self.state.lock().history.push(shown);
    }
}

/// A sink that writes down what it is told. Flushes, executes and closes at once unless told otherwise.
pub struct RecordingSink {
    history: Mutex<Vec<String>>,
    held: Mutex<Option<Vec<Flushed>>>,
    healthy: AtomicBool,
    broken: watch::Sender<bool>,
    /// Block events are executed while this is true.
    executing: watch::Sender<bool>,
    /// `run` ends when asked while this is true.
    ends: watch::Sender<bool>,
    fail_open: AtomicBool,
    fail_forget: AtomicBool,
    panic_on_write: AtomicBool,
    running: AtomicBool,
    trouble: Mutex<Option<String>>,
    /// Told after every entry of the history.
    changed: Notify,
}

impl std::fmt::Debug for RecordingSink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RecordingSink")
    }
}

impl Default for RecordingSink {
    fn default() -> Self {
        Self {
            history: Mutex::default(),
            held: Mutex::default(),
            healthy: AtomicBool::new(true),
            broken: watch::channel(false).0,
            executing: watch::channel(true).0,
            ends: watch::channel(true).0,
            fail_open: AtomicBool::default(),
            fail_forget: AtomicBool::default(),
            panic_on_write: AtomicBool::default(),
            running: AtomicBool::default(),
            trouble: Mutex::default(),
            changed: Notify::new(),
        }
    }
}

impl RecordingSink {
    /// Everything that was asked, in order.
    #[must_use]
    pub fn history(&self) -> Vec<String> {
        self.history.lock().clone()
    }

    /// Waits until an entry of the history is `wanted`.
    pub async fn saw(&self, wanted: &str) {
        loop {
            let changed = self.changed.notified();
            if self.history.lock().iter().any(|entry| entry == wanted) {
                return;
            }
            changed.await;
        }
    }

    /// Keeps batches unflushed from now on.
    pub fn hold_flushes(&self) {
        self.held.lock().get_or_insert_default();
    }

    /// Flushes what was held, and everything at once from now on.
    pub fn release_flushes(&self) {
        let held = self.held.lock().take().unwrap_or_default();
        held.into_iter().for_each(Flushed::done);
    }

    /// Ends `run` with an error.
    pub fn break_down(&self) {
        self.healthy.store(false, Ordering::Release);
        self.broken.send_replace(true);
    }

    /// Whether block events are executed or wait.
    pub fn execute_block_events(&self, execute: bool) {
        self.executing.send_replace(execute);
    }

    /// Whether `run` ends when it is asked to.
    pub fn end_when_asked(&self, ends: bool) {
        self.ends.send_replace(ends);
    }

    /// Whether opening a dispatcher fails.
    pub fn fail_open(&self, fail: bool) {
        self.fail_open.store(fail, Ordering::Release);
    }

    /// Whether forgetting the changefeed fails.
    pub fn fail_forget(&self, fail: bool) {
        self.fail_forget.store(fail, Ordering::Release);
    }

    /// Panics when it is handed rows from now on.
    pub fn panic_on_write(&self) {
        self.panic_on_write.store(true, Ordering::Release);
    }

    /// What the sink waits for and tries again by itself.
    pub fn set_trouble(&self, trouble: Option<&str>) {
        *self.trouble.lock() = trouble.map(ToOwned::to_owned);
    }

    /// Whether `run` runs.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.running.load(Ordering::Acquire)
    }

    fn note(&self, entry: String) {
        self.history.lock().push(entry);
        self.changed.notify_waiters();
    }
}

fn gone() -> sink::Error {
    sink::Error::Unavailable { what: "the downstream is gone".into(), source: None }
}

#[async_trait]
impl Sink for RecordingSink {
    async fn run(&self, shutdown: CancellationToken) -> Result<(), sink::Error> {
        self.running.store(true, Ordering::Release);
        let mut broken = self.broken.subscribe();
        let mut ends = self.ends.subscribe();
        let result = tokio::select! {
            _ = broken.wait_for(|broken| *broken) => Err(gone()),
            () = async {
                shutdown.cancelled().await;
                let _ = ends.wait_for(|ends| *ends).await;
            } => Ok(()),
        };
        self.running.store(false, Ordering::Release);
        self.note("ended".into());
        result
    }

    fn healthy(&self) -> bool {
        self.healthy.load(Ordering::Acquire)
    }

    fn trouble(&self) -> Option<sink::Error> {
        self.trouble.lock().clone().map(|what| sink::Error::Unavailable { what, source: None })
    }

    async fn open_dispatcher(
        &self,
        dispatcher: DispatcherId,
        _span: &TableSpan,
        start_ts: Ts,
    ) -> Result<TableStart, sink::Error> {
        if self.fail_open.load(Ordering::Acquire) {
            return Err(gone());
        }
        self.note(format!("open {}@{start_ts}", dispatcher.low));
        Ok(TableStart { start_ts, skip_dml_at_start: false })
    }

    async fn open_table(&self, dispatcher: DispatcherId, table: &TableInfo) -> Result<(), sink::Error> {
        self.note(format!("table {} {}", dispatcher.low, table.name));
        Ok(())
    }

    fn write_rows(&self, dispatcher: DispatcherId, batch: RowBatch, flushed: Flushed) {
        assert!(!self.panic_on_write.load(Ordering::Acquire), "a test asked for it");
        let last = batch.last_commit_ts().unwrap_or_default();
        let now = match &mut *self.held.lock() {
            Some(held) => {
                held.push(flushed);
                None
            }
            None => Some(flushed),
        };
        self.note(format!("write {} {} rows until {last}", dispatcher.low, batch.row_count()));
        if let Some(flushed) = now {
            flushed.done();
        }
    }

    async fn flush_before_block(&self, dispatcher: DispatcherId) -> Result<(), sink::Error> {
        self.note(format!("flush {}", dispatcher.low));
        Ok(())
    }

    async fn write_block_event(&self, event: &BlockEvent) -> Result<(), sink::Error> {
        let commit_ts = match event {
            BlockEvent::Ddl(ddl) => ddl.commit_ts,
            BlockEvent::SyncPoint(point) => point.commit_ts,
        };
        self.note(format!("execute {commit_ts}"));
        let _ = self.executing.subscribe().wait_for(|executing| *executing).await;
        self.note(format!("executed {commit_ts}"));
        Ok(())
    }

    fn publish_checkpoint(&self, checkpoint: Ts, _time: WallTime) {
        self.note(format!("checkpoint {checkpoint}"));
    }

    fn close_dispatcher(&self, dispatcher: DispatcherId) {
        self.note(format!("close {}", dispatcher.low));
    }

    async fn forget_changefeed(&self) -> Result<(), sink::Error> {
        self.note("forget".into());
        if self.fail_forget.load(Ordering::Acquire) { Err(gone()) } else { Ok(()) }
    }

    fn wants_checkpoints(&self) -> bool {
        true
    }
}

/// Gives every changefeed the same recording sink, when it is allowed to.
#[derive(Debug)]
pub struct FakeSinks {
    /// The sink.
    pub sink: Arc<RecordingSink>,
    open: watch::Sender<bool>,
    fail: AtomicBool,
    asked: watch::Sender<u32>,
}

impl Default for FakeSinks {
    fn default() -> Self {
        Self {
            sink: Arc::default(),
            open: watch::channel(true).0,
            fail: AtomicBool::default(),
            asked: watch::channel(0).0,
        }
    }
}

impl FakeSinks {
    /// Whether sinks are created or wait.
    pub fn create(&self, create: bool) {
        self.open.send_replace(create);
    }

    /// Whether creation fails.
    pub fn fail(&self, fail: bool) {
        self.fail.store(fail, Ordering::Release);
    }

    /// Waits until `n` sinks were asked for.
    pub async fn asked(&self, n: u32) {
        let _ = self.asked.subscribe().wait_for(|asked| *asked >= n).await;
    }

    /// How many sinks were asked for.
    #[must_use]
    pub fn count(&self) -> u32 {
        *self.asked.borrow()
    }
}

#[async_trait]
impl SinkFactory for FakeSinks {
    async fn create(&self, _config: &DispatcherManagerConfig) -> Result<Arc<dyn Sink>, sink::Error> {
        self.asked.send_modify(|asked| *asked += 1);
        let _ = self.open.subscribe().wait_for(|open| *open).await;
        if self.fail.load(Ordering::Acquire) {
            return Err(gone());
        }
        let sink = Arc::clone(&self.sink);
        Ok(sink)
    }
}

/// A table with one key column.
#[must_use]
pub fn table(id: i64, version: u64) -> Arc<TableInfo> {
    let column = Column {
        name: "id".into(),
        ty: ColumnType { kind: TypeKind::Text, sql: "text".into(), oid: 25, definitions: Vec::new() },
        nullable: false,
        generated: None,
        identity: IdentityKind::None,
        default: None,
    };
    Arc::new(TableInfo {
        id: TableId(id),
        schema_id: SchemaId(1),
        schema: "public".into(),
        name: format!("t{id}"),
        version: Ts(version),
        columns: vec![column],
        keys: vec![UniqueKey {
            name: "pk".into(),
            columns: vec![0],
            primary: true,
            nulls_not_distinct: false,
        }],
        identity: ReplicaIdentity::Key(vec![0]),
    })
}

/// Writes the image of a row of [`table`].
pub fn image(out: &mut BytesMut, value: &str) {
    let mut writer = TupleWriter::new(out);
    writer.push(Datum::Text(value.as_bytes()));
    writer.finish();
}

/// One inserted row of table 1 per commit ts.
///
/// # Panics
/// When the commit ts go back.
#[must_use]
pub fn batch(commits: &[u64]) -> RowBatch {
    let mut rows = BytesMut::new();
    let mut txns: Vec<TxnMark> = Vec::new();
    for commit in commits {
        let mut image = |out: &mut BytesMut| image(out, &commit.to_string());
        put_row(&mut rows, RowOp::Insert, None, Some(&mut image));
        match txns.last_mut() {
            Some(txn) if txn.commit_ts == Ts(*commit) => txn.rows += 1,
            _ => txns.push(TxnMark {
                commit_ts: Ts(*commit),
                start_ts: Ts(commit - 1),
                commit_time: WallTime(0),
                rows: 1,
                first_row: 0,
            }),
        }
    }
    RowBatch::new(table(1, 1), txns, rows.freeze()).expect("well formed")
}

/// The beginning of an initial copy of table 1, before any row.
///
/// # Panics
/// Never: the batch is well formed.
#[must_use]
pub fn copy_start(commit: u64) -> RowBatch {
    let mut rows = BytesMut::new();
    put_row(&mut rows, RowOp::CopyStart, None, None);
    let txn = TxnMark {
        commit_ts: Ts(commit),
        start_ts: Ts(commit - 1),
        commit_time: WallTime(0),
        rows: 1,
        first_row: 0,
    };
    RowBatch::new(table(1, 1), vec![txn], rows.freeze()).expect("well formed")
}
