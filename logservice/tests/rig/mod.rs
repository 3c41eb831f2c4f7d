//! A private PostgreSQL, a changefeed's reader on it, and the rows that came out, as text.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use event::{Datum, RowBatch, RowOp, TableInfo, Tuple};
use heartbeatpb::{ChangefeedId, MaintainerEpoch, TableId, Ts};
use logservice::event_store::{Position, Scan, Store, StoreConfig, StoreWriter};
use logservice::upstream::{self, FeedSpec, ReaderProgress, ReaderStart, StartPoint, Upstream};
use logservice::{Error, TableFilter};
use tempfile::TempDir;
use testkit::PgServer;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// How long a test waits for something that must happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Polls `probe` until it gives a value.
pub(crate) async fn eventually<T>(what: &str, mut probe: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = probe().await {
            return value;
        }
        assert!(Instant::now() < deadline, "never happened: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A specification for the changefeed `test`, without an initial copy.
pub(crate) fn spec(uri: &str, rules: &[&str]) -> FeedSpec {
    FeedSpec {
        changefeed: ChangefeedId::fresh("test"),
        epoch: MaintainerEpoch::from_wire(1),
        start_ts: Ts::ZERO,
        upstream_uri: uri.to_owned(),
        filter: Arc::new(TableFilter::new(rules, true).expect("rules")),
        publish: Arc::default(),
        force_replicate: false,
        ignore_ineligible: true,
        initial_copy: false,
        copy_parallel: 2,
        copy_part_bytes: 64 << 20,
        streaming: true,
        copy_target: None,
        copy_crew: None,
        entrance: None,
        ddl: heartbeatpb::config::DdlConfig {
            capture: heartbeatpb::config::DdlCapture::Off,
            ..Default::default()
        },
    }
}

/// The same, of which only a part is published: matcher, columns, condition.
pub(crate) fn partial(uri: &str, rules: &[&str], parts: &[(&str, &[&str], &str)]) -> FeedSpec {
    let entry = |(matcher, columns, condition): &(&str, &[&str], &str)| heartbeatpb::config::PublishRule {
        matcher: vec![(*matcher).to_owned()],
        columns: columns.iter().map(|name| (*name).to_owned()).collect(),
        condition: (*condition).to_owned(),
    };
    let entries: Vec<_> = parts.iter().map(entry).collect();
    let publish = Arc::new(logservice::upstream::PublishRules::new(&entries, true).expect("entries"));
    FeedSpec { publish, ..spec(uri, rules) }
}

/// Name of slot and publication of the changefeed `test`.
pub(crate) fn slot(spec: &FeedSpec) -> String {
    format!("millrace_test_{:08x}", spec.changefeed.gid.high >> 32)
}

/// Major version of a server.
pub(crate) async fn version(server: &PgServer) -> u32 {
    let client = server.client("postgres").await.expect("client");
    let row = client.query_one("SELECT current_setting('server_version_num')", &[]).await.expect("version");
    row.get::<_, &str>(0).parse::<u32>().expect("a number") / 10_000
}

/// A server that keeps next to no log for slots.
pub(crate) async fn forgetful_server() -> PgServer {
    let server = PgServer::builder()
        .setting("max_slot_wal_keep_size", "1MB")
        .setting("max_wal_size", "32MB")
        .setting("min_wal_size", "32MB")
        .start()
        .await
        .expect("server");
    server.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY)").await.expect("table");
    server
}

/// Writes log that nobody wants, until a slot of a [`forgetful_server`] is lost.
pub(crate) async fn lose_slot(server: &PgServer) {
    let client = server.client("postgres").await.expect("client");
    eventually("the slot is lost", async || {
        let noise = "CREATE TABLE n AS SELECT repeat('x', 1000) FROM generate_series(1, 20000); DROP TABLE n";
        for sql in [noise, "SELECT pg_switch_wal()", "CHECKPOINT"] {
            server.sql("postgres", sql).await.expect("noise");
        }
        let sql = "SELECT FROM pg_replication_slots WHERE wal_status = 'lost'";
        (!client.query(sql, &[]).await.expect("slots").is_empty()).then_some(())
    })
    .await;
}

/// One row change in a readable form.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Change {
    pub(crate) commit_ts: Ts,
    pub(crate) op: RowOp,
    pub(crate) old: Option<Vec<String>>,
    pub(crate) new: Option<Vec<String>>,
}

impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let image = |image: &Option<Vec<String>>| image.as_ref().map(|values| values.join(","));
        write!(f, "{:?}", self.op)?;
        if let Some(old) = image(&self.old) {
            write!(f, " old {old}")?;
        }
        if let Some(new) = image(&self.new) {
            write!(f, " new {new}")?;
        }
        Ok(())
    }
}

/// Values as text; `<null>` and `<unchanged>` for what has none.
pub(crate) fn texts(tuple: Tuple<'_>) -> Vec<String> {
    tuple
        .iter()
        .map(|datum| match datum {
            Datum::Null => "<null>".to_owned(),
            Datum::Unchanged => "<unchanged>".to_owned(),
            Datum::Text(text) => String::from_utf8_lossy(text).into_owned(),
        })
        .collect()
}

/// A running reader and its store.
pub(crate) struct Running {
    pub(crate) upstream: Arc<dyn Upstream>,
    pub(crate) spec: FeedSpec,
    pub(crate) start: StartPoint,
    pub(crate) tables: BTreeMap<String, Arc<TableInfo>>,
    pub(crate) store: Arc<Store>,
    pub(crate) progress: Arc<ReaderProgress>,
    pub(crate) persisted: watch::Sender<Ts>,
    pub(crate) shutdown: CancellationToken,
    pub(crate) task: JoinHandle<Result<(), Error>>,
    dir: TempDir,
}

/// A store with plenty of room.
pub(crate) fn store(
    changefeed: &ChangefeedId,
    start_ts: Ts,
    memory_bytes: usize,
    disk_bytes: u64,
) -> (TempDir, Arc<Store>, StoreWriter) {
    let dir = TempDir::new().expect("dir");
    let config = StoreConfig { dir: dir.path().join("store"), memory_bytes, disk_bytes };
    let (store, writer) =
        Store::open(changefeed.clone(), config, start_ts, Arc::new(Notify::new())).expect("store");
    (dir, store, writer)
}

impl Running {
    /// Creates the retention and starts a reader at its position.
    pub(crate) async fn start(spec: FeedSpec) -> Self {
        let upstream = upstream::open(&spec.upstream_uri).expect("uri");
        let start = upstream.create_retention(&spec, None).await.expect("retention");
        Self::resume(spec, start, start.start_ts, 256 << 20).await
    }

    /// Starts a reader of an existing retention at a checkpoint.
    pub(crate) async fn resume(
        spec: FeedSpec,
        start: StartPoint,
        checkpoint: Ts,
        memory_bytes: usize,
    ) -> Self {
        Self::resume_with(spec, start, checkpoint, memory_bytes, 0).await
    }

    /// The same with room on disk.
    pub(crate) async fn resume_with(
        spec: FeedSpec,
        start: StartPoint,
        checkpoint: Ts,
        memory_bytes: usize,
        disk_bytes: u64,
    ) -> Self {
        let upstream = upstream::open(&spec.upstream_uri).expect("uri");
        let tables = upstream.tables(&spec).await.expect("tables");
        let tables = tables.into_iter().map(|table| (table.info.name.clone(), table.info)).collect();
        let (dir, store, writer) = store(&spec.changefeed, checkpoint, memory_bytes, disk_bytes);
        let (persisted, receiver) = watch::channel(checkpoint);
        let progress = Arc::new(ReaderProgress::default());
        let shutdown = CancellationToken::new();
        let task = tokio::spawn({
            let (upstream, spec, progress, shutdown) =
                (Arc::clone(&upstream), spec.clone(), Arc::clone(&progress), shutdown.clone());
            let start = ReaderStart { start_ts: start.start_ts, checkpoint };
            async move { upstream.run_reader(spec, start, writer, receiver, progress, shutdown).await }
        });
        Self { upstream, spec, start, tables, store, progress, persisted, shutdown, task, dir }
    }

    /// Waits until everything at or before `ts` is in the store.
    pub(crate) async fn reach(&self, ts: Ts) {
        let what = format!("resolved {ts}, last error {:?}", self.progress.last_error());
        eventually(&what, async || {
            assert!(!self.task.is_finished(), "the reader ended: {:?}", self.progress.last_error());
            (self.store.resolved().0 >= ts).then_some(())
        })
        .await;
    }

    /// Waits until everything that is committed now is in the store.
    pub(crate) async fn catch_up(&self) {
        let position = self.upstream.current_position().await.expect("position");
        self.reach(position.start_ts).await;
    }

    /// Every visible change of a table.
    pub(crate) fn changes(&self, table: &str) -> Vec<Change> {
        let table = self.tables.get(table).expect("known table").id;
        changes(&self.store, table)
    }

    /// Every visible change of a table, one line each.
    pub(crate) fn history(&self, table: &str) -> Vec<String> {
        self.changes(table).iter().map(ToString::to_string).collect()
    }

    /// Ends the reader.
    pub(crate) async fn stop(self) {
        self.shutdown.cancel();
        self.task.await.expect("join").expect("reader");
    }

    /// Waits for the reader's own end.
    pub(crate) async fn failed(self) -> Error {
        tokio::time::timeout(PATIENCE, self.task).await.expect("in time").expect("join").expect_err("failed")
    }
}

/// Every visible change of a table.
pub(crate) fn changes(store: &Store, table: TableId) -> Vec<Change> {
    let mut found = Vec::new();
    take(store, table, &mut Position::default(), &mut found);
    found
}

/// Every visible change of a table after a position.
pub(crate) fn changes_after(store: &Store, table: TableId, after: Ts) -> Vec<Change> {
    let mut found = Vec::new();
    take(store, table, &mut Position::after(after), &mut found);
    found
}

/// Appends every visible change of a table after `at`, and moves `at` behind them.
pub(crate) fn take(store: &Store, table: TableId, at: &mut Position, found: &mut Vec<Change>) {
    loop {
        let (batch, next): (RowBatch, Position) = match store.scan(table, *at).expect("scan") {
            Scan::Rows(batch, next) => (batch, next),
            Scan::OnDisk(chunk) => Store::load(&chunk).expect("load"),
            Scan::End => return,
        };
        found.extend(batch.iter().map(|row| Change {
            commit_ts: row.txn.commit_ts,
            op: row.op,
            old: row.old.map(texts),
            new: row.new.map(texts),
        }));
        *at = next;
    }
}

/// What a table holds after its changes, by the first column. Panics on changes that do not fit.
pub(crate) fn replay(changes: &[Change]) -> BTreeMap<String, Vec<String>> {
    let mut rows: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for change in changes {
        let key = |image: &Option<Vec<String>>| image.as_ref().expect("image")[0].clone();
        match change.op {
            RowOp::Insert => {
                let before = rows.insert(key(&change.new), change.new.clone().expect("image"));
                assert!(before.is_none(), "inserted twice: {change}");
            }
            RowOp::Update => {
                let old = if change.old.is_some() { key(&change.old) } else { key(&change.new) };
                let before = rows.remove(&old).expect("updated row exists");
                let mut new = change.new.clone().expect("image");
                for (value, before) in new.iter_mut().zip(before) {
                    if value == "<unchanged>" {
                        *value = before;
                    }
                }
                rows.insert(key(&change.new), new);
            }
            RowOp::Delete => {
                rows.remove(&key(&change.old)).expect("deleted row exists");
            }
            RowOp::Truncate | RowOp::CopyStart => rows.clear(),
        }
    }
    rows
}

/// What a table holds, by the first column, as the server writes it.
pub(crate) async fn content(
    server: &PgServer,
    database: &str,
    table: &str,
    columns: &[&str],
) -> BTreeMap<String, Vec<String>> {
    let client = server.client(database).await.expect("client");
    let list: Vec<String> =
        columns.iter().map(|column| format!("coalesce({column}::text, '<null>')")).collect();
    let rows =
        client.query(&format!("SELECT ARRAY[{}] FROM {table}", list.join(",")), &[]).await.expect("content");
    rows.iter().map(|row| row.get::<_, Vec<String>>(0)).map(|values| (values[0].clone(), values)).collect()
}
