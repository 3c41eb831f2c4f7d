//! The tasks behind the sink: one routes row changes to queues, the others write them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use event::{ResyncChange, RowBatch, RowOp, TableInfo};
use heartbeatpb::{DispatcherId, TableId, TableSpan, Ts, WallTime};
use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use tokio::sync::mpsc::UnboundedReceiver;

use super::apply::{TableChanges, Writer};
use super::config::OnExistingRows;
use super::connection::{Backoff, Connection};
use super::failure::Failure;
use super::plan::Mode;
use super::queues::{Queues, Table, Tables};
use super::route::{Change, Holds, ROW_WEIGHT, Routing};
use super::share::{self, Found};
use super::shared::Shared;
use super::target::Target;
use super::{progress, resync};
use crate::causality::{Access, Batch, Shard};
use crate::metrics::WorkerMetrics;
use crate::{Error, Flushed};

/// Rows routed before the queues are locked once for all of them.
const ROUTE_CHUNK: usize = 256;
/// Weight of the row changes in the queues that nobody writes. It keeps all workers busy; beyond it batches wait as they
/// came, since an entry for each row takes more memory, and what was routed long ago is in no cache any more.
const MAX_WAITING: u64 = 32_768 * ROW_WEIGHT as u64;
/// A batch that the sink has accepted, shared by its row changes.
pub(crate) struct Held {
    batch: RowBatch,
    pub(crate) dispatcher: DispatcherId,
    pub(crate) span: Arc<TableSpan>,
    entered: Instant,
    remaining: AtomicU64,
    flushed: Mutex<Option<Flushed>>,
}

impl Holds for Held {
    fn batch(&self) -> &RowBatch {
        &self.batch
    }
}

/// A row change in the queues.
pub(crate) type QueuedChange = Change<Held>;

/// A batch on its way from `write_rows` to the queues.
pub(crate) struct Incoming {
    pub(crate) dispatcher: DispatcherId,
    pub(crate) span: Arc<TableSpan>,
    pub(crate) batch: RowBatch,
    pub(crate) flushed: Flushed,
    pub(crate) entered: Instant,
}

/// Routes batches until the sink closes.
pub(crate) async fn route(shared: Arc<Shared>, mut incoming: UnboundedReceiver<Incoming>) {
    let mut router = Router {
        routings: FxHashMap::default(),
        copies: FxHashMap::default(),
        chunk: Vec::with_capacity(ROUTE_CHUNK),
        scratch: Vec::new(),
    };
    loop {
        let next = tokio::select! {
            biased;
            () = shared.closing.cancelled() => return,
            next = incoming.recv() => next,
        };
        let Some(Incoming { dispatcher, span, batch, flushed, entered }) = next else { return };
        let held = Arc::new(Held {
            remaining: AtomicU64::new(batch.row_count()),
            batch,
            dispatcher,
            span,
            entered,
            flushed: Mutex::new(Some(flushed)),
        });
        if router.push(&shared, &held).await.is_err() {
            return;
        }
        shared.txn_metrics.conflict_detect.record(entered.elapsed().as_secs_f64());
        // Routing holds the processor; others get their turn between batches.
        tokio::task::yield_now().await;
    }
}

struct Router {
    routings: FxHashMap<TableId, Routing>,
    /// Dispatchers whose initial copy is passing, by the position of its snapshot.
    copies: FxHashMap<DispatcherId, Ts>,
    /// Routed rows that are not in their queues yet; empty between batches.
    chunk: Vec<(Access, QueuedChange)>,
    scratch: Vec<u8>,
}

impl Router {
    async fn push(&mut self, shared: &Shared, held: &Arc<Held>) -> Result<(), Error> {
        let table = &held.batch.table;
        let routing = match self.routings.get(&table.id) {
            Some(routing) if Arc::ptr_eq(&routing.table, table) || *routing.table == **table => routing,
            Some(_) | None => {
                self.routings.insert(table.id, Routing::new(table));
                &self.routings[&table.id]
            }
        };
        for row in held.batch.iter() {
            let copying = self.copies.get(&held.dispatcher).copied();
            let copied = match (row.op, copying) {
                (RowOp::CopyStart, _) => {
                    self.copies.insert(held.dispatcher, row.txn.commit_ts);
                    false
                }
                (RowOp::Insert, Some(ts)) if ts == row.txn.commit_ts => {
                    shared.config.on_existing_rows != OnExistingRows::Append
                }
                (_, Some(_)) => {
                    self.copies.remove(&held.dispatcher);
                    false
                }
                (_, None) => false,
            };
            self.chunk.push(routing.route(held, &row, copied, &mut self.scratch));
            if self.chunk.len() == ROUTE_CHUNK {
                shared.enqueue(&mut self.chunk).await?;
            }
        }
        shared.enqueue(&mut self.chunk).await
    }
}

/// How an attempt to write a batch goes on.
enum Next {
    Again(Mode),
    /// Each change by itself.
    Serially,
    /// The changes of a table in their order; with this if they had it already.
    InOrder(TableId, Mode),
}

/// A connection that writes batches of any queue.
pub(crate) struct Worker {
    pub(crate) shared: Arc<Shared>,
    pub(crate) metrics: WorkerMetrics,
    connection: Option<Connection>,
    backoff: Backoff,
    /// What the server has committed may differ from what is known: read before writing.
    stale: bool,
}

impl Worker {
    pub(crate) fn new(shared: Arc<Shared>, metrics: WorkerMetrics) -> Self {
        Self { shared, metrics, connection: None, backoff: Backoff::new(), stale: false }
    }

    /// Writes until the sink closes; a fatal error closes the sink.
    pub(crate) async fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        let mut since = Instant::now();
        // Until when changes wait for more of them.
        let mut patience: Option<tokio::time::Instant> = None;
        loop {
            let woken = shared.work.notified();
            tokio::pin!(woken);
            woken.as_mut().enable();
            if shared.closing.is_cancelled() {
                return;
            }
            let impatient = patience.is_some_and(|until| tokio::time::Instant::now() >= until);
            let batches = match shared.take(impatient) {
                Found::Take(batches) => batches,
                found @ (Found::Wait | Found::Nothing) => {
                    let waits = matches!(found, Found::Wait);
                    let until = || tokio::time::Instant::now() + share::LINGER;
                    patience = waits.then(|| patience.unwrap_or_else(until));
                    tokio::select! {
                        biased;
                        () = shared.closing.cancelled() => return,
                        () = woken => {}
                        () = tokio::time::sleep_until(patience.unwrap_or_else(until)), if waits => {}
                    }
                    continue;
                }
            };
            patience = None;
            let begun = Instant::now();
            let rows = batches.iter().map(|batch| batch.entries.len()).sum();
            if let Some(first) = batches.first().and_then(|batch| batch.entries.first()) {
                shared.txn_metrics.queue.record(first.payload.batch.entered.elapsed());
            }
            if let Err(error) = self.finish(batches).await {
                shared.fail(error);
                return;
            }
            self.metrics.batch(rows, begun.elapsed(), since.elapsed());
            since = Instant::now();
        }
    }

    /// Writes batches in one transaction, however often it takes.
    async fn finish(&mut self, mut batches: Vec<Batch<QueuedChange>>) -> Result<(), Error> {
        // One that goes change by change is alone.
        let serial = batches.iter().any(|batch| batch.serial);
        let mut mode = if serial { Mode::Singles } else { Mode::Batched };
        loop {
            self.shared.permitted().await?;
            let begun = Instant::now();
            let failure = match self.attempt(&batches, mode).await {
                Ok(()) => {
                    self.backoff = Backoff::new();
                    self.shared.absence.answered();
                    self.metrics.flushed(begun.elapsed());
                    self.shared.complete(batches);
                    return Ok(());
                }
                Err(failure) => failure,
            };
            if !matches!(failure, Failure::Suspended) {
                self.shared.metrics.dml_errors.increment(1);
            }
            match self.recover(failure, mode, serial).await? {
                Next::Again(next) => mode = next,
                Next::Serially => {
                    self.shared.retry_serially(batches);
                    return Ok(());
                }
                Next::InOrder(table, next) => match self.shared.again_in_order(batches, table) {
                    Ok(()) => return Ok(()),
                    Err(again) if next == mode => {
                        self.shared.retry_serially(again);
                        return Ok(());
                    }
                    Err(again) => (batches, mode) = (again, next),
                },
            }
        }
    }

    async fn recover(&mut self, failure: Failure, mode: Mode, serial: bool) -> Result<Next, Error> {
        match failure {
            Failure::Lost(error) => {
                self.connection = None;
                self.stale = true;
                self.shared.lost(&error);
                self.shared.absence.pause(&mut self.backoff, &self.shared.closing).await?;
                Ok(Next::Again(mode))
            }
            Failure::Again(error) => {
                tracing::debug!(%error, "the downstream database asked to repeat a transaction");
                self.rollback().await;
                self.backoff.pause(&self.shared.closing).await?;
                Ok(Next::Again(mode))
            }
            Failure::Overtaken => {
                // As by a copy of the table that has ended; no reason to wait unless it goes on.
                tracing::debug!("progress was moved by another connection, reading it again");
                self.rollback().await;
                self.stale = true;
                self.backoff.pause_unless_first(&self.shared.closing).await?;
                Ok(Next::Again(mode))
            }
            Failure::Missing => {
                self.rollback().await;
                Ok(Next::Again(Mode::Singles))
            }
            Failure::Absent(table) => {
                self.rollback().await;
                // Now whole rows are inserted or updated. Whatever else was missing is looked at one by one.
                let news = self.shared.lacking.lock().insert(table);
                Ok(Next::Again(if news { mode } else { Mode::Singles }))
            }
            Failure::Incomplete(table) => {
                self.rollback().await;
                match self.ask_for(&table).await {
                    Ok(()) => Err(Failure::Incomplete(table).into_error()),
                    Err(failure) => {
                        let error = failure.into_error();
                        tracing::warn!(%error, "a table cannot be asked for again");
                        self.connection = None;
                        self.stale = true;
                        self.backoff.pause(&self.shared.closing).await?;
                        Ok(Next::Again(mode))
                    }
                }
            }
            Failure::Suspended => {
                // Nobody is to wait for its locks.
                self.rollback().await;
                Ok(Next::Again(mode))
            }
            Failure::Conflict(error, _) if serial => {
                self.rollback().await;
                Err(error)
            }
            Failure::Conflict(error, table) => {
                tracing::debug!(%error, "changes go again in another order");
                self.rollback().await;
                // A statement of many rows may take them in any order.
                Ok(match table {
                    Some(table) => Next::InOrder(table, Mode::Singles),
                    None if mode == Mode::Batched => Next::Again(Mode::Singles),
                    None => Next::Serially,
                })
            }
            Failure::Fatal(error) => {
                self.rollback().await;
                Err(error)
            }
        }
    }

    /// Notes that a table has to be copied again before anything more is applied to it: whoever reads the log next sees to it.
    async fn ask_for(&self, table: &TableInfo) -> Result<(), Failure> {
        let (shared, Some(connection)) = (&self.shared, &self.connection) else {
            return Err(Failure::Overtaken);
        };
        let (client, owner) = (connection.client(), (shared.gid.as_str(), table.id));
        resync::prepare(client, &shared.config).await?;
        shared.registration.begin_checked(client).await?;
        let name = format!("{}.{}", table.schema, table.name);
        let ask = ResyncChange::Ask { name, entering: true };
        let asked = resync::change(client, &shared.config, owner, &ask, WallTime::now()).await;
        progress::end(client, asked.is_ok()).await?;
        asked.map(drop)
    }

    /// Ends a failed transaction; a connection on which that fails is given up.
    async fn rollback(&mut self) {
        if let Some(connection) = &self.connection
            && (connection.is_closed() || connection.client().batch_execute("ROLLBACK").await.is_err())
        {
            self.connection = None;
            self.stale = true;
        }
    }

    async fn attempt(&mut self, batches: &[Batch<QueuedChange>], mode: Mode) -> Result<(), Failure> {
        let shared = Arc::clone(&self.shared);
        if self.connection.as_ref().is_none_or(Connection::is_closed) {
            self.connection = Some(Connection::open(&shared.config).await?);
        }
        let Some(connection) = &mut self.connection else { return Ok(()) };
        if self.stale {
            shared.registration.check(connection.client()).await?;
        }
        let mut queues = Queues::default();
        let mut todo = Vec::with_capacity(batches.iter().map(|batch| batch.entries.len()).sum());
        for batch in batches {
            for entry in &batch.entries {
                let held = &entry.payload.batch;
                let own = queues.find(&shared, connection, self.stale, held, batch.shard).await?;
                if let Some(to) = entry.payload.moves_to {
                    queues.find(&shared, connection, self.stale, held, Shard::of(to)).await?;
                }
                todo.push((entry.seq, own, &entry.payload));
            }
        }
        // Those of several queues may depend on each other.
        todo.sort_by_key(|(seq, ..)| *seq);
        let mut halves: Vec<QueuedChange> = Vec::new();
        let mut tables = Tables::new(queues.divided());
        for (_, own, change) in todo {
            let table = tables.of(change.table());
            let wanted = queues.wanted(own, change, table.codec.as_ref(), &mut halves)?;
            table.wanted.extend(wanted);
        }
        let mut work = Vec::with_capacity(tables.found.len());
        for Table { info, wanted, .. } in tables.found {
            if wanted.is_empty() {
                continue;
            }
            let target = shared.target(connection, info).await?;
            let (changes, clear): (_, Vec<_>) = wanted.into_iter().map(|change| change.of(&halves)).unzip();
            let clear = clear.into_iter().flatten().collect();
            let lacking = shared.lacking.lock().contains(&info.id);
            work.push(TableChanges { target, changes, clear, lacking });
        }
        self.stale = false;
        if work.is_empty() {
            return Ok(());
        }
        let (steps, joins) = queues.steps();
        let writer = Writer {
            own_schema: &shared.config.own_schema,
            changefeed: &shared.gid,
            registration: &shared.registration,
            advance: &shared.advance,
            permit: &shared.permit,
            on_existing_rows: shared.config.on_existing_rows,
            metrics: &shared.txn_metrics,
        };
        writer.write(connection, (&steps, &joins), &work, mode).await?;
        // After a barrier all queues of the span have moved.
        let passed = work.iter().flat_map(|table| &table.changes).any(|change| change.is_for_table());
        queues.learn(&shared, passed);
        Ok(())
    }
}

impl Shared {
    /// Puts routed changes into their queues and wakes the workers; waits for room first.
    async fn enqueue(&self, chunk: &mut Vec<(Access, QueuedChange)>) -> Result<(), Error> {
        loop {
            let moved = self.work.notified();
            tokio::pin!(moved);
            moved.as_mut().enable();
            if self.queues.lock().waiting() < MAX_WAITING {
                break;
            }
            tokio::select! {
                biased;
                () = self.closing.cancelled() => return Err(Error::Closed),
                () = moved => {}
            }
        }
        if !chunk.is_empty() {
            let mut queues = self.queues.lock();
            for (access, change) in chunk.drain(..) {
                queues.push(access, change);
            }
            drop(queues);
            self.work.notify_waiters();
        }
        Ok(())
    }

    /// Batches of queues are durable: tells the batches of dispatchers that are now whole.
    fn complete(&self, batches: Vec<Batch<QueuedChange>>) {
        let mut queues = self.queues.lock();
        for batch in &batches {
            queues.complete(batch);
        }
        self.busy.fetch_sub(1, Ordering::Relaxed);
        drop(queues);
        self.work.notify_waiters();
        let mut entries = batches.into_iter().flat_map(|batch| batch.entries).peekable();
        while let Some(entry) = entries.next() {
            let held = entry.payload.batch;
            let mut rows = 1;
            while entries.next_if(|next| Arc::ptr_eq(&next.payload.batch, &held)).is_some() {
                rows += 1;
            }
            if held.remaining.fetch_sub(rows, Ordering::AcqRel) == rows {
                let flushed = held.flushed.lock().take();
                self.metrics.flushed(held.batch.row_count(), held.batch.bytes());
                if let Some(flushed) = flushed {
                    flushed.done();
                }
                self.settle(held.dispatcher);
            }
        }
    }

    fn again_in_order(
        &self,
        batches: Vec<Batch<QueuedChange>>,
        table: TableId,
    ) -> Result<(), Vec<Batch<QueuedChange>>> {
        let mut queues = self.queues.lock();
        queues.again_in_order(batches, table)?;
        self.busy.fetch_sub(1, Ordering::Relaxed);
        drop(queues);
        self.work.notify_waiters();
        Ok(())
    }

    fn retry_serially(&self, batches: Vec<Batch<QueuedChange>>) {
        let mut queues = self.queues.lock();
        for batch in batches {
            queues.retry_serially(batch);
        }
        self.busy.fetch_sub(1, Ordering::Relaxed);
        drop(queues);
        self.work.notify_waiters();
    }

    /// The description of a table's target for one shape.
    async fn target(&self, connection: &Connection, info: &Arc<TableInfo>) -> Result<Arc<Target>, Failure> {
        if let Some(target) = self.known_target(info) {
            return Ok(target);
        }
        let client = connection.client();
        // It may be created.
        self.registration.share_checked(client).await?;
        let opened = super::target::open(client, info, self.config.create_tables).await;
        self.registration.unshare(client).await?;
        let target = Arc::new(opened?);
        self.targets.lock().insert(info.id, Arc::clone(&target));
        Ok(target)
    }
}
