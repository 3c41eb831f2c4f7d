//! A server with a source and a target database, a sink between them, and hand-made batches.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use event::testing::BatchBuilder;
use event::{
    Column, ColumnType, IdentityKind, ReplicaIdentity, RowBatch, RowOp, TableInfo, TypeKind, UniqueKey,
};
use heartbeatpb::{ChangefeedId, DispatcherId, SchemaId, TableId, Ts};
use sink::{Error, Flushed, Sink, SinkOptions};
use testkit::PgServer;
use tokio::task::JoinHandle;
use tokio_postgres::{Client, SimpleQueryMessage};
use tokio_util::sync::CancellationToken;

const PATIENCE: Duration = Duration::from_secs(60);

/// A running sink.
pub(crate) struct Running {
    pub(crate) sink: Arc<dyn Sink>,
    pub(crate) dispatcher: DispatcherId,
    shutdown: CancellationToken,
    ended: JoinHandle<Result<(), Error>>,
    flushed: Arc<AtomicU64>,
    sent: AtomicU64,
}

impl Running {
    pub(crate) async fn open(uri: &str, changefeed: &ChangefeedId) -> Result<Self, Error> {
        Self::open_with(uri, &SinkOptions::new(changefeed.clone(), "unused")).await
    }

    pub(crate) async fn open_with(uri: &str, options: &SinkOptions) -> Result<Self, Error> {
        let sink = sink::open(uri, options).await?;
        let shutdown = CancellationToken::new();
        let (runs, token) = (Arc::clone(&sink), shutdown.clone());
        Ok(Self {
            sink,
            dispatcher: DispatcherId::random(),
            ended: tokio::spawn(async move { runs.run(token).await }),
            shutdown,
            flushed: Arc::default(),
            sent: AtomicU64::new(0),
        })
    }

    /// Opens a table as a dispatcher does.
    pub(crate) async fn table(&self, table: &Arc<TableInfo>) -> Result<(), Error> {
        self.sink.open_dispatcher(self.dispatcher, &heartbeatpb::TableSpan::whole(table.id), Ts(1)).await?;
        self.sink.open_table(self.dispatcher, table).await
    }

    pub(crate) fn write(&self, batch: RowBatch) {
        self.write_as(self.dispatcher, batch);
    }

    pub(crate) fn write_as(&self, dispatcher: DispatcherId, batch: RowBatch) {
        self.sent.fetch_add(1, Ordering::Relaxed);
        let flushed = Arc::clone(&self.flushed);
        let done = move || {
            flushed.fetch_add(1, Ordering::AcqRel);
        };
        self.sink.write_rows(dispatcher, batch, Flushed::new(done));
    }

    /// Waits until everything is durable.
    pub(crate) async fn flush(&self) {
        let flushed = tokio::time::timeout(PATIENCE, self.sink.flush_before_block(self.dispatcher)).await;
        flushed.expect("in time").expect("the sink is healthy");
        assert_eq!(self.flushed.load(Ordering::Acquire), self.sent.load(Ordering::Relaxed));
    }

    pub(crate) fn flushed(&self) -> u64 {
        self.flushed.load(Ordering::Acquire)
    }

    /// Stops the sink and returns what `run` returned.
    pub(crate) async fn stop(self) -> Result<(), Error> {
        self.shutdown.cancel();
        self.ended.await.expect("no panic")
    }

    /// Waits for the fatal error.
    pub(crate) async fn error(self) -> Error {
        let ended = tokio::time::timeout(PATIENCE, self.ended).await.expect("in time").expect("no panic");
        assert!(!self.sink.healthy());
        ended.expect_err("a fatal error")
    }
}

/// A server with databases `src` and `dst`.
pub(crate) struct Rig {
    pub(crate) server: PgServer,
    pub(crate) source: Client,
    pub(crate) target: Client,
    pub(crate) changefeed: ChangefeedId,
}

impl Rig {
    pub(crate) async fn new() -> Self {
        let server = PgServer::start().await.expect("a server");
        server.sql("postgres", "CREATE DATABASE src").await.expect("src");
        server.sql("postgres", "CREATE DATABASE dst").await.expect("dst");
        let source = server.client("src").await.expect("a client");
        let target = server.client("dst").await.expect("a client");
        for client in [&source, &target] {
            client.batch_execute("SET timezone = 'UTC'").await.expect("session");
        }
        Self { server, source, target, changefeed: ChangefeedId::fresh("test") }
    }

    pub(crate) fn uri(&self, params: &str) -> String {
        format!("{}?sslmode=disable&{params}", self.server.uri("dst"))
    }

    pub(crate) async fn sink(&self, params: &str) -> Running {
        Running::open(&self.uri(params), &self.changefeed).await.expect("the sink opens")
    }

    /// Rows of a table in the target as text, sorted.
    pub(crate) async fn target_rows(&self, table: &str) -> Vec<String> {
        rows(&self.target, table).await
    }

    /// Checks that a table has these rows, in any order; values joined by `|`.
    pub(crate) async fn expect(&self, table: &str, expected: &[&str]) {
        let mut expected: Vec<String> = expected.iter().map(ToString::to_string).collect();
        expected.sort();
        assert_eq!(self.target_rows(table).await, expected);
    }

    pub(crate) async fn exec(&self, sql: &str) {
        self.target.batch_execute(sql).await.expect("target statement");
    }
}

/// Rows as text, sorted.
pub(crate) async fn rows(client: &Client, table: &str) -> Vec<String> {
    let mut rows: Vec<String> = values(client, table)
        .await
        .into_iter()
        .map(|row| row.into_iter().map(|v| v.unwrap_or_else(|| "\\N".into())).collect::<Vec<_>>().join("|"))
        .collect();
    rows.sort();
    rows
}

/// Rows as the output functions write them.
pub(crate) async fn values(client: &Client, table: &str) -> Vec<Vec<Option<String>>> {
    let messages = client.simple_query(&format!("SELECT * FROM {table}")).await.expect("select");
    let mut rows = Vec::new();
    for message in messages {
        if let SimpleQueryMessage::Row(row) = message {
            rows.push((0..row.len()).map(|i| row.get(i).map(str::to_owned)).collect());
        }
    }
    rows
}

pub(crate) fn column(name: &str, sql: &str) -> Column {
    let kind = match sql {
        "integer" => TypeKind::Int32,
        "bigint" => TypeKind::Int64,
        "numeric" => TypeKind::Numeric { precision: None, scale: 0 },
        "text" => TypeKind::Text,
        "json" => TypeKind::Json,
        _ => TypeKind::Other,
    };
    Column {
        name: name.into(),
        ty: ColumnType { kind, sql: sql.into(), oid: 0, definitions: Vec::new() },
        nullable: true,
        generated: None,
        identity: IdentityKind::None,
        default: None,
    }
}

/// A table in schema `public`; the key of the first columns is the primary key, if there is one.
pub(crate) fn table(
    id: i64,
    name: &str,
    columns: &[(&str, &str)],
    primary: &[usize],
    unique: &[&[usize]],
) -> TableInfo {
    let mut columns: Vec<Column> = columns.iter().map(|(name, sql)| column(name, sql)).collect();
    for &c in primary {
        columns[c].nullable = false;
    }
    let key = |columns: &[usize], primary| UniqueKey {
        name: format!("{name}_{columns:?}"),
        columns: columns.to_vec(),
        primary,
        nulls_not_distinct: false,
    };
    let mut keys: Vec<UniqueKey> = (!primary.is_empty()).then(|| key(primary, true)).into_iter().collect();
    keys.extend(unique.iter().map(|columns| key(columns, false)));
    let identity =
        if primary.is_empty() { ReplicaIdentity::Full } else { ReplicaIdentity::Key(primary.to_vec()) };
    TableInfo {
        id: TableId(id),
        schema_id: SchemaId(1),
        schema: "public".into(),
        name: name.into(),
        version: Ts(1),
        columns,
        keys,
        identity,
    }
}

/// Builds batches; `\N` is NULL and `\U` unchanged.
pub(crate) struct Rows(BatchBuilder);

impl Rows {
    pub(crate) fn of(table: &Arc<TableInfo>) -> Self {
        Self(BatchBuilder::new(table))
    }

    /// The first transaction continues one whose earlier rows are in another batch.
    pub(crate) fn continuing(self, first_row: u64) -> Self {
        Self(self.0.continuing(first_row))
    }

    pub(crate) fn op(self, ts: u64, op: RowOp, old: Option<&[&str]>, new: Option<&[&str]>) -> Self {
        Self(self.0.op(ts, op, old, new))
    }

    pub(crate) fn insert(self, ts: u64, new: &[&str]) -> Self {
        self.op(ts, RowOp::Insert, None, Some(new))
    }

    pub(crate) fn update(self, ts: u64, new: &[&str]) -> Self {
        self.op(ts, RowOp::Update, None, Some(new))
    }

    pub(crate) fn update_from(self, ts: u64, old: &[&str], new: &[&str]) -> Self {
        self.op(ts, RowOp::Update, Some(old), Some(new))
    }

    pub(crate) fn delete(self, ts: u64, old: &[&str]) -> Self {
        self.op(ts, RowOp::Delete, Some(old), None)
    }

    pub(crate) fn truncate(self, ts: u64) -> Self {
        self.op(ts, RowOp::Truncate, None, None)
    }

    pub(crate) fn copy_start(self, ts: u64) -> Self {
        self.op(ts, RowOp::CopyStart, None, None)
    }

    pub(crate) fn build(self) -> RowBatch {
        self.0.build()
    }
}

/// Polls until `state` holds.
pub(crate) async fn until<F: Future<Output = bool>>(what: &str, mut state: impl FnMut() -> F) {
    let deadline = Instant::now() + PATIENCE;
    while !state().await {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
