//! Writes row changes to a PostgreSQL database: in parallel, in order where it matters, exactly once.
//!
//! `write_rows` hands a batch to the router, which spreads its rows over the queues of [`crate::Causality`]
//! (`route.rs`). Workers take batches of several queues (`share.rs`), turn them into few statements (`plan.rs`) and run
//! them in one transaction together with the queues' progress (`apply.rs`, `progress.rs`). Statements that belong together
//! are sent and answered together (`pipeline.rs`), on the stream of the driver that does everything else (`wire.rs`). What
//! a failure means is decided in `failure.rs`; what the target tables must look like in `target.rs`; how they change in
//! `ddl.rs`. Every transaction that writes holds to the sink's `registration.rs`, by which `fence.rs` can end it. Before
//! a transaction begins, and before it commits, the process looks whether it may write at all
//! ([`crate::SinkOptions::permit`]); if not, the transaction is rolled back and made again when it may.
//!
//! Several dispatchers may write one table, each a key range of it, on one node or on many. Progress is kept by key
//! range (`pieces.rs`), so that a row change is applied once however often and at whatever checkpoints the table is
//! divided and put together; a truncation, and the beginning of an initial copy, clear the range of their dispatcher
//! (`keys.rs`).
//!
//! Existing rows may come past the stream (`copier.rs`): each part of a table in one `COPY`, with a note of the snapshot that
//! it was read in (`copied.rs`), which becomes the progress of its keys. Tables that it creates get their other indexes
//! afterwards (`created.rs`).
//!
//! Limits: two values that differ as text but are equal under a nondeterministic collation or in a type with
//! an equality of its own (such as `citext`) are ordered by the database's own constraint alone: a violation
//! makes the batch go again in upstream order. A unique constraint that is deferred upstream but immediate in
//! the target may be violated by a transaction that is legal upstream; that is an error.

mod absence;
mod apply;
mod config;
mod connection;
mod copied;
mod copier;
mod created;
mod ddl;
mod dial;
mod failure;
mod fence;
mod keys;
mod part;
mod pieces;
mod pipeline;
mod plain;
mod plan;
mod progress;
mod queues;
mod registration;
mod resync;
mod route;
mod share;
mod shared;
mod sql;
mod stage;
mod target;
mod wire;
mod worker;

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use event::{BlockEvent, DdlEvent, RowBatch, TableInfo};
use heartbeatpb::{DispatcherId, InfluencedTables, TableId, TableSpan, Ts, WallTime};
use parking_lot::Mutex;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

pub(crate) use copier::PostgresCopies;
pub(crate) use fence::fence;
pub use plain::connect_postgres;

use config::PgConfig;
use connection::{Backoff, Connection};
use failure::{Failure, classify};
use pieces::Range;
use shared::Shared;
use worker::{Incoming, Worker};

use crate::metrics::WorkerMetrics;
use crate::{DownstreamIdentity, Error, Flushed, Sink, SinkCheck, SinkOptions, TableStart};

/// Transactions in flight get this long to end when the sink closes; afterwards they are rolled back.
const GRACE: Duration = Duration::from_secs(2);

/// A sink for `postgres://` URIs.
pub struct PostgresSink {
    shared: Arc<Shared>,
    incoming: UnboundedSender<Incoming>,
    /// Taken by the first `run`. Unbounded: what it holds is bounded by the credits of the caller.
    to_route: Mutex<Option<UnboundedReceiver<Incoming>>>,
    /// For everything that is not a row: opening, DDL, cleaning up.
    control: tokio::sync::Mutex<Option<Connection>>,
}

impl std::fmt::Debug for PostgresSink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PostgresSink").field("changefeed", &self.shared.changefeed).finish_non_exhaustive()
    }
}

/// Runs an operation on the control connection, again after a lost connection, until the sink closes.
macro_rules! with_control {
    ($self:ident, $connection:ident => $body:expr) => {{
        let mut guard = $self.control.lock().await;
        let mut backoff = Backoff::new();
        loop {
            $self.shared.permitted().await?;
            let attempt = async {
                if guard.as_ref().is_none_or(Connection::is_closed) {
                    *guard = Some(Connection::open(&$self.shared.config).await?);
                }
                match guard.as_mut() {
                    Some($connection) => $body,
                    None => Err(Failure::Fatal(Error::Closed)),
                }
            };
            match attempt.await {
                Ok(value) => {
                    $self.shared.absence.answered();
                    break Ok(value);
                }
                // A transaction that is open ends with its connection.
                Err(Failure::Suspended) => *guard = None,
                Err(Failure::Lost(error)) => {
                    *guard = None;
                    $self.shared.lost(&error);
                    $self.shared.absence.pause(&mut backoff, &$self.shared.closing).await?;
                }
                Err(Failure::Again(error)) => {
                    tracing::warn!(%error, "the downstream database asked to repeat a transaction");
                    *guard = None;
                    backoff.pause(&$self.shared.closing).await?;
                }
                Err(failure) => {
                    // Whatever the transaction was, it is over.
                    *guard = None;
                    let error = failure.into_error();
                    if matches!(error, Error::Fenced { .. }) {
                        // Nothing else can be written either.
                        $self.shared.fail(registration::fenced());
                    }
                    break Err(error);
                }
            }
        }
    }};
}

impl PostgresSink {
    /// Connects, prepares the sink's own tables, and registers: earlier sinks of the node write no more.
    ///
    /// # Errors
    /// See [`crate::open`].
    pub async fn open(uri: &str, options: &SinkOptions) -> Result<Self, Error> {
        let config = PgConfig::parse(uri)?;
        let connection = Connection::open(&config).await.map_err(Failure::into_error)?;
        progress::prepare(connection.client(), &config).await.map_err(Failure::into_error)?;
        ddl::prepare(connection.client(), &config).await.map_err(Failure::into_error)?;
        registration::prepare(connection.client(), &config).await.map_err(Failure::into_error)?;
        let gid = options.changefeed.gid.to_string();
        let registration =
            registration::register(connection.client(), &config, &gid, &options.node, options.epoch)
                .await
                .map_err(Failure::into_error)?;
        let (incoming, to_route) = unbounded_channel();
        Ok(Self {
            shared: Arc::new(Shared::new(
                config,
                options.changefeed.clone(),
                registration,
                options.permit.clone(),
            )),
            incoming,
            to_route: Mutex::new(Some(to_route)),
            control: tokio::sync::Mutex::new(Some(connection)),
        })
    }

    async fn execute_ddl(&self, ddl: &DdlEvent) -> Result<(), Error> {
        if let Some(text) = &ddl.error {
            return Err(Error::Rejected { code: "CDC:ErrDDLUnsupported", what: text.clone() });
        }
        if !ddl.not_sync {
            let shared = &self.shared;
            let result = with_control!(self, connection => ddl::execute(connection, shared, ddl).await);
            if let Err(error) = result {
                shared.metrics.ddl_errors.increment(1);
                return Err(error);
            }
        }
        let mut targets = self.shared.targets.lock();
        match &ddl.blocked {
            Some(InfluencedTables::Normal(tables)) => tables.iter().for_each(|id| drop(targets.remove(id))),
            Some(InfluencedTables::Schema(_) | InfluencedTables::All) => targets.clear(),
            None => drop(targets.remove(&ddl.table_id)),
        }
        Ok(())
    }
}

#[async_trait]
impl Sink for PostgresSink {
    async fn run(&self, shutdown: CancellationToken) -> Result<(), Error> {
        let Some(to_route) = self.to_route.lock().take() else { return Err(Error::Closed) };
        let shared = &self.shared;
        let mut tasks = JoinSet::new();
        tasks.spawn(worker::route(Arc::clone(shared), to_route));
        for id in 0..shared.config.workers {
            let metrics = WorkerMetrics::new(&shared.changefeed, id);
            tasks.spawn(Worker::new(Arc::clone(shared), metrics).run());
        }
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                () = shared.closing.cancelled() => break,
                ended = tasks.join_next() => match ended {
                    Some(Ok(())) => {}
                    Some(Err(error)) => shared.fail(Error::Rejected {
                        code: "CDC:ErrSinkInternal",
                        what: format!("a task of the sink ended unexpectedly: {error}"),
                    }),
                    None => break,
                },
            }
        }
        shared.closing.cancel();
        let ended = tokio::time::timeout(GRACE, async { while tasks.join_next().await.is_some() {} }).await;
        if ended.is_err() {
            tasks.shutdown().await;
        }
        if shared.healthy() {
            registration::retire(&shared.config, &shared.registration).await;
        }
        shared.take_failure().map_or(Ok(()), Err)
    }

    fn healthy(&self) -> bool {
        self.shared.healthy()
    }

    fn trouble(&self) -> Option<Error> {
        self.shared.absence.trouble()
    }

    async fn open_dispatcher(
        &self,
        dispatcher: DispatcherId,
        span: &TableSpan,
        start_ts: Ts,
    ) -> Result<TableStart, Error> {
        let table = span.table;
        if table == TableId::DDL {
            let shared = &self.shared;
            with_control!(self, connection => {
                shared.registration.check(connection.client()).await?;
                ddl::forget_gone(connection.client(), &shared.config.own_schema, &shared.gid, start_ts).await
            })?;
            return Ok(TableStart { start_ts, skip_dml_at_start: false });
        }
        let shared = &self.shared;
        shared.open(dispatcher, span);
        let range = Range::of(span);
        let read = with_control!(self, connection => {
            shared.registration.check(connection.client()).await?;
            let past = ddl::past(connection.client(), &shared.config.own_schema, &shared.gid, table).await;
            match past {
                // Nobody writes it any more, so there is no progress to keep.
                Ok(past) if past.gone => Ok((None, past.last)),
                Ok(past) => {
                    let read = progress::load(connection.client(), shared, table, &range).await;
                    read.map(|read| (Some(read), past.last))
                }
                Err(failure) => Err(failure),
            }
        });
        match read {
            Ok((read, last_ddl)) => {
                if let Some(read) = read {
                    shared.learn(dispatcher, table, read);
                }
                // Every row before the table's last DDL was flushed before it ran, and had a shape that the target
                // does not have any more. The DDL itself is seen again: its barrier may have to be passed once more,
                // and a dispatcher that begins behind it would prove to a new owner that everybody has passed it.
                Ok(match last_ddl.filter(|last| *last > start_ts) {
                    Some(last) => TableStart { start_ts: last.before(), skip_dml_at_start: true },
                    None => TableStart { start_ts, skip_dml_at_start: false },
                })
            }
            Err(error) => {
                self.close_dispatcher(dispatcher);
                Err(error)
            }
        }
    }

    async fn open_table(&self, dispatcher: DispatcherId, table: &TableInfo) -> Result<(), Error> {
        let shared = &self.shared;
        let span = shared.span(dispatcher);
        if span.is_some_and(|span| !span.is_whole()) && !table.is_divisible() {
            return Err(Error::Rejected {
                code: "CDC:ErrTableSplitUnsupported",
                what: format!("table {}.{} cannot be divided into key ranges", table.schema, table.name),
            });
        }
        let info = Arc::new(table.clone());
        if shared.known_target(&info).is_some() {
            return Ok(());
        }
        let target = with_control!(self, connection => {
            ddl::open(connection.client(), shared, &info).await
        })?;
        if let Some(target) = target {
            shared.targets.lock().insert(info.id, Arc::new(target));
        }
        Ok(())
    }

    fn write_rows(&self, dispatcher: DispatcherId, batch: RowBatch, flushed: Flushed) {
        if self.shared.closing.is_cancelled() {
            return;
        }
        if batch.row_count() == 0 {
            flushed.done();
            return;
        }
        let span = self.shared.accept(dispatcher, batch.table.id);
        // Refused only by a sink that has ended; then nothing is flushed any more.
        let _ = self.incoming.send(Incoming { dispatcher, span, batch, flushed, entered: Instant::now() });
    }

    async fn flush_before_block(&self, dispatcher: DispatcherId) -> Result<(), Error> {
        self.shared.drained(dispatcher).await
    }

    async fn write_block_event(&self, event: &BlockEvent) -> Result<(), Error> {
        match event {
            BlockEvent::Ddl(ddl) => self.execute_ddl(ddl).await,
            BlockEvent::SyncPoint(_) => Err(Error::Rejected {
                code: "CDC:ErrSyncPointUnsupported",
                what: "a PostgreSQL sink has no sync points".into(),
            }),
        }
    }

    fn publish_checkpoint(&self, _checkpoint: Ts, _time: WallTime) {}

    fn close_dispatcher(&self, dispatcher: DispatcherId) {
        self.shared.close(dispatcher);
    }

    async fn forget_changefeed(&self) -> Result<(), Error> {
        let shared = &self.shared;
        with_control!(self, connection => {
            progress::forget(connection.client(), &shared.config, &shared.gid).await?;
            ddl::forget(connection.client(), &shared.config, &shared.gid).await?;
            registration::forget_all(connection.client(), &shared.config, &shared.gid).await
        })?;
        shared.progress.lock().clear();
        Ok(())
    }

    fn wants_checkpoints(&self) -> bool {
        false
    }
}

/// Checks a target: reachable, writable, permitted, and which database it is. Leaves nothing behind.
pub(crate) async fn check(uri: &str) -> Result<SinkCheck, Error> {
    let config = PgConfig::parse(uri)?;
    let connection = Connection::open(&config).await.map_err(Failure::into_error)?;
    check_connected(&connection, &config).await.map_err(Failure::into_error)
}

async fn check_connected(connection: &Connection, config: &PgConfig) -> Result<SinkCheck, Failure> {
    let row = connection
        .client()
        .query_one(
            "SELECT (SELECT system_identifier::text FROM pg_catalog.pg_control_system()), \
                pg_catalog.current_database()::text, pg_catalog.pg_is_in_recovery(), \
                pg_catalog.has_database_privilege(pg_catalog.current_database(), 'CREATE'), \
                (SELECT pg_catalog.has_schema_privilege(oid, 'CREATE') AND pg_catalog.has_schema_privilege(oid, 'USAGE') \
                    FROM pg_catalog.pg_namespace WHERE nspname = $1), \
                pg_catalog.current_setting('server_version_num')::integer, \
                pg_catalog.current_setting('server_encoding')",
            &[&config.own_schema_name],
        )
        .await
        .map_err(|e| classify(e, "checking the target database"))?;
    let rejected = |code, what| Err(Failure::Fatal(Error::Rejected { code, what }));
    if row.get::<_, bool>(2) {
        return rejected("CDC:ErrSinkReadOnly", "the target database is a read-only standby".into());
    }
    let version: i32 = row.get(5);
    if version < 120_000 {
        return rejected(
            "CDC:ErrSinkVersion",
            format!("the target is PostgreSQL {}; 12 or later is needed", version / 10_000),
        );
    }
    let user = sql::quote(config.driver.get_user().unwrap_or_default());
    let may_create: bool = row.get(3);
    match row.get::<_, Option<bool>>(4) {
        Some(true) => {}
        Some(false) => {
            let schema = &config.own_schema;
            let what = format!(
                "the sink's own schema is closed to its user; run `GRANT ALL ON SCHEMA {schema} TO {user}`"
            );
            return rejected("CDC:ErrSinkPermission", what);
        }
        None if may_create => {}
        None => {
            let schema = &config.own_schema;
            let what = format!(
                "the user may not create the sink's own schema; run `CREATE SCHEMA {schema} AUTHORIZATION {user}`"
            );
            return rejected("CDC:ErrSinkPermission", what);
        }
    }
    let mut warnings = Vec::new();
    if config.create_tables && !may_create {
        warnings.push(
            "the user may not create schemas in the target; those of replicated tables must exist".into(),
        );
    }
    let encoding: String = row.get(6);
    if encoding != "UTF8" {
        warnings.push(format!(
            "the target database has encoding {encoding}; characters outside of it are refused"
        ));
    }
    Ok(SinkCheck {
        identity: Some(DownstreamIdentity { system_identifier: row.get(0), database: row.get(1) }),
        warnings,
    })
}
