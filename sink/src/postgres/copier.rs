//! Copies of existing rows, past the stream: `COPY` in, part by part, over connections of their own.
//!
//! Each part is one transaction, which holds to a registration of its own as every transaction of a sink does: the copier
//! counts as a node beside its node, so that it does not end the node's sink, and a maintainer that fences all but the
//! nodes that it knows ends it. What a copy of an earlier version left in a table is removed before the first part.

use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use bytes::Bytes;
use event::{
    CopiedPart, CopiedTable, CopyError, CopyFormat, CopyIndex, CopyPart, CopySession, CopyTarget, PartWriter,
    Resync, ResyncChange, TableInfo,
};
use futures_util::SinkExt;
use heartbeatpb::{NodeId, TableId, Ts, WallTime, WritePermit};
use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use tokio_postgres::CopyInSink;

use super::apply;
use super::config::{OnExistingRows, PgConfig};
use super::connection::Connection;
use super::created::Notes;
use super::failure::{Failure, classify, classify_values};
use super::pieces::Range;
use super::registration::{self, Registration};
use super::resync::{self, Before};
use super::sql::quote;
use super::target::{self, Target};
use super::{copied, created, ddl, progress};
use crate::metrics::{RowType, SinkMetrics, TxnMetrics};
use crate::{Error, SinkOptions};

impl From<Error> for CopyError {
    fn from(error: Error) -> Self {
        CopyError { code: error.code(), message: error.to_string(), retryable: error.is_retryable() }
    }
}

impl From<Failure> for CopyError {
    fn from(failure: Failure) -> Self {
        // Whoever tries again looks first at what is there.
        let again = matches!(failure, Failure::Again(_) | Failure::Lost(_));
        let error = CopyError::from(failure.into_error());
        CopyError { retryable: again || error.retryable, ..error }
    }
}

/// Built-in types whose binary form is the same in all supported versions and on all machines, by oid; and arrays of them.
const BINARY_TYPES: &[u32] = &[
    16, 17, 18, 19, 20, 21, 23, 25, 26, 114, 600, 601, 602, 603, 604, 628, 650, 700, 701, 718, 774, 829, 869,
    1042, 1043, 1082, 1083, 1114, 1184, 1186, 1266, 1560, 1562, 1700, 2950, 3802, // arrays:
    199, 651, 1000, 1001, 1005, 1007, 1009, 1014, 1015, 1016, 1021, 1022, 1028, 1041, 1115, 1182, 1183, 1185,
    1187, 1231, 1270, 2951, 3807,
];

/// A table that a session has opened.
struct Opened {
    target: Target,
    /// Quoted names of the columns that travel, in their order.
    columns: Vec<String>,
}

/// Copies into the database of a `postgres://` URI.
pub(crate) struct PostgresCopies {
    config: PgConfig,
    options: SinkOptions,
}

impl PostgresCopies {
    pub(crate) fn new(uri: &str, options: &SinkOptions) -> Result<Self, Error> {
        Ok(Self { config: PgConfig::parse(uri)?, options: options.clone() })
    }
}

#[async_trait]
impl CopyTarget for PostgresCopies {
    async fn begin(&self) -> Result<Option<Arc<dyn CopySession>>, CopyError> {
        // Rows that were there before are met one by one, as the stream does.
        if self.config.on_existing_rows == OnExistingRows::Append {
            return Ok(None);
        }
        self.options.permit.granted().await;
        Ok(Some(Arc::new(Session::begin(&self.config, &self.options).await?)))
    }

    async fn resyncs(&self) -> Result<Option<Vec<Resync>>, CopyError> {
        if self.config.on_existing_rows == OnExistingRows::Append {
            return Ok(None);
        }
        let connection = Connection::open(&self.config).await?;
        let gid = self.options.changefeed.gid.to_string();
        Ok(Some(resync::list(connection.client(), &self.config.own_schema, &gid).await?))
    }

    async fn change_resync(&self, table: TableId, change: &ResyncChange) -> Result<bool, CopyError> {
        self.options.permit.granted().await;
        let connection = Connection::open(&self.config).await?;
        if matches!(change, ResyncChange::Ask { .. }) {
            progress::prepare(connection.client(), &self.config).await?;
            resync::prepare(connection.client(), &self.config).await?;
        }
        let gid = self.options.changefeed.gid.to_string();
        let owner = (gid.as_str(), table);
        Ok(resync::change(connection.client(), &self.config, owner, change, WallTime::now()).await?)
    }
}

/// Series of the sink, to which a part is a batch.
struct Metrics {
    sink: SinkMetrics,
    txn: TxnMetrics,
}

struct Session {
    config: PgConfig,
    gid: String,
    registration: Arc<Registration>,
    permit: WritePermit,
    metrics: Arc<Metrics>,
    control: tokio::sync::Mutex<Connection>,
    /// Connections between two parts.
    idle: Arc<Mutex<Vec<Connection>>>,
    tables: Mutex<FxHashMap<TableId, Arc<Opened>>>,
}

impl Session {
    async fn begin(config: &PgConfig, options: &SinkOptions) -> Result<Self, Failure> {
        let connection = Connection::open(config).await?;
        let client = connection.client();
        progress::prepare(client, config).await?;
        ddl::prepare(client, config).await?;
        registration::prepare(client, config).await?;
        copied::prepare(client, config).await?;
        created::prepare(client, config).await?;
        resync::prepare(client, config).await?;
        let gid = options.changefeed.gid.to_string();
        let beside = NodeId::from(format!("{}/copy", options.node));
        let registration = registration::register(client, config, &gid, &beside, options.epoch).await?;
        Ok(Self {
            config: config.clone(),
            gid,
            registration: Arc::new(registration),
            permit: options.permit.clone(),
            metrics: Arc::new(Metrics {
                sink: SinkMetrics::new(&options.changefeed, "TxnSink"),
                txn: TxnMetrics::new(&options.changefeed),
            }),
            control: tokio::sync::Mutex::new(connection),
            idle: Arc::default(),
            tables: Mutex::default(),
        })
    }

    /// The connection for everything but parts, once the node may write.
    async fn control(&self) -> tokio::sync::MutexGuard<'_, Connection> {
        let connection = self.control.lock().await;
        self.permit.granted().await;
        connection
    }

    fn notes(&self) -> Notes<'_> {
        Notes { own: &self.config.own_schema, changefeed: &self.gid, registration: &self.registration }
    }

    /// A connection for a transaction of its own.
    async fn take(&self) -> Result<Connection, Failure> {
        self.permit.granted().await;
        let idle = self.idle.lock().pop();
        match idle.filter(|connection| !connection.is_closed()) {
            Some(connection) => Ok(connection),
            None => Connection::open(&self.config).await,
        }
    }

    fn opened(&self, table: TableId) -> Result<Arc<Opened>, Failure> {
        let found = self.tables.lock().get(&table).cloned();
        found.ok_or(Failure::Fatal(Error::Rejected {
            code: "CDC:ErrSinkInternal",
            what: "a table is copied that was not opened".into(),
        }))
    }

    async fn prepare(&self, info: &Arc<TableInfo>) -> Result<CopiedTable, Failure> {
        let connection = self.control().await;
        let client = connection.client();
        if self.config.create_tables {
            self.notes().create(client, info).await?;
        }
        let target = target::open(client, info, false).await?;
        let created = self.notes().has_created(client, info).await?;
        let own = &self.config.own_schema;
        let (parts, finished) = copied::load(client, own, &self.gid, info.id).await?;
        if parts.is_empty() {
            self.begin_table(&connection, &target).await?;
        }
        let format = self.remember(&connection, target).await?;
        Ok(CopiedTable { parts, finished, binary: format == CopyFormat::Binary, created })
    }

    /// The table is opened. Answers the best format in which its rows can travel.
    async fn remember(&self, connection: &Connection, target: Target) -> Result<CopyFormat, Failure> {
        let info = Arc::clone(&target.info);
        let names = info.columns.iter().filter(|column| column.generated.is_none());
        let columns: Vec<String> = names.map(|column| quote(&column.name)).collect();
        let binary = !columns.is_empty() && same_types(connection, &target).await?;
        self.tables.lock().insert(info.id, Arc::new(Opened { target, columns }));
        Ok(if binary { CopyFormat::Binary } else { CopyFormat::Text })
    }

    /// Begins to replace the rows of a table, to which the stream is applied.
    async fn begin_replacement(
        &self,
        info: &Arc<TableInfo>,
        snapshot: (Ts, WallTime),
    ) -> Result<(Part, CopyFormat), Failure> {
        let format = {
            let connection = self.control().await;
            let target = target::open(connection.client(), info, false).await?;
            self.remember(&connection, target).await?
        };
        let mut part = self.begin_part(info.id, &CopyPart::default(), snapshot).await?;
        let client = &part.connection.client();
        let before = resync::look(client, &self.config.own_schema, &self.gid, info.id).await?;
        if before.furthest() > snapshot.0 {
            return Err(resync::again("it has newer changes than those that a copy of it would hold"));
        }
        let own = &self.config.own_schema;
        if self.config.on_existing_rows == OnExistingRows::Error
            && before.is_nothing()
            && resync::is_entering(client, own, &self.gid, info.id).await?
        {
            // As for an initial copy: rows of somebody else are not ours to remove.
            apply::require_empty(&part.connection, &part.opened.target, &Range::default()).await?;
        }
        // Whoever reads the table sees it as it was until all is there.
        let Target { name, partitioned, .. } = &part.opened.target;
        let sql = format!("DELETE FROM {}{name}", if *partitioned { "" } else { "ONLY " });
        client.batch_execute(&sql).await.map_err(|e| classify(e, &part.doing))?;
        part.replaces = Some(before);
        part.start(format).await?;
        Ok((part, format))
    }

    /// Nothing of the copy is in the table yet: what is, is somebody else's, or of an earlier version of this program,
    /// which noted that it had begun.
    async fn begin_table(&self, connection: &Connection, target: &Target) -> Result<(), Failure> {
        let (client, own, id) = (connection.client(), &self.config.own_schema, target.info.id);
        let all = Range::default();
        in_transaction(client, async {
            self.registration.begin_checked(client).await?;
            let marker = progress::copy_marker(client, own, &self.gid, id, &all, Ts::MAX).await?;
            if marker != progress::Copied::No || self.config.on_existing_rows == OnExistingRows::Truncate {
                apply::clear(connection, target, &all).await?;
                return progress::forget_copy_markers(client, own, &self.gid, id).await;
            }
            apply::require_empty(connection, target, &all).await
        })
        .await
    }

    async fn clear_table(&self, table: TableId) -> Result<(), Failure> {
        let opened = self.opened(table)?;
        let connection = self.control().await;
        let client = connection.client();
        in_transaction(client, async {
            self.registration.begin_checked(client).await?;
            apply::clear(&connection, &opened.target, &Range::default()).await?;
            copied::remove(client, &self.config.own_schema, &self.gid, table).await
        })
        .await
    }

    async fn finish_table(&self, table: TableId) -> Result<(), Failure> {
        let opened = self.opened(table)?;
        let connection = self.control().await;
        let (client, own) = (connection.client(), &self.config.own_schema);
        in_transaction(client, async {
            self.registration.begin_checked(client).await?;
            let (parts, finished) = copied::load(client, own, &self.gid, table).await?;
            if finished {
                return Ok(());
            }
            let incomplete = || copied::incomplete(&opened.target.name);
            let pieces = copied::pieces(&parts).ok_or_else(incomplete)?;
            let summary = copied::summary(&parts).ok_or_else(incomplete)?;
            copied::set_progress(client, own, &self.gid, table, &pieces).await?;
            copied::begin_stream(client, own, &self.gid, &opened.target.info, summary.at).await?;
            copied::remove(client, own, &self.gid, table).await?;
            let owner = (self.gid.as_str(), table);
            match copied::add(client, own, owner, &summary, (self.registration.condition(), true)).await? {
                true => Ok(()),
                false => Err(Failure::Fatal(registration::fenced())),
            }
        })
        .await
    }

    async fn note_shapes(&self, shapes: u32) -> Result<(), Failure> {
        let connection = self.control().await;
        let (client, own) = (connection.client(), &self.config.own_schema);
        in_transaction(client, async {
            self.registration.begin_checked(client).await?;
            copied::remove(client, own, &self.gid, TableId::DDL).await?;
            let (part, time) = (CopyPart::default(), WallTime::default());
            let note = CopiedPart { part, at: Ts(u64::from(shapes)), time, rows: 0, bytes: 0 };
            let owner = (self.gid.as_str(), TableId::DDL);
            match copied::add(client, own, owner, &note, (self.registration.condition(), false)).await? {
                true => Ok(()),
                false => Err(Failure::Fatal(registration::fenced())),
            }
        })
        .await
    }

    /// A part's transaction, in which nothing is written yet.
    async fn begin_part(
        &self,
        table: TableId,
        part: &CopyPart,
        (at, time): (Ts, WallTime),
    ) -> Result<Part, Failure> {
        let opened = self.opened(table)?;
        let connection = self.take().await?;
        self.registration.begin_checked(connection.client()).await?;
        if opened.target.deferrable {
            let defer = connection.client().batch_execute("SET CONSTRAINTS ALL DEFERRED").await;
            defer.map_err(|e| classify(e, "beginning a transaction"))?;
        }
        let doing = format!("copying into table {}", opened.target.name);
        let part = CopiedPart { part: part.clone(), at, time, rows: 0, bytes: 0 };
        Ok(Part {
            connection,
            input: None,
            replaces: None,
            part,
            table,
            opened,
            doing,
            own: self.config.own_schema.clone(),
            gid: self.gid.clone(),
            registration: Arc::clone(&self.registration),
            permit: self.permit.clone(),
            metrics: Arc::clone(&self.metrics),
            idle: Arc::clone(&self.idle),
        })
    }
}

/// Commits what `work` has begun and done, or rolls it back.
async fn in_transaction(
    client: &tokio_postgres::Client,
    work: impl Future<Output = Result<(), Failure>>,
) -> Result<(), Failure> {
    let result = work.await;
    let ended = progress::end(client, result.is_ok()).await;
    result.and(ended)
}

/// Whether every column that travels has the same built-in type at both ends.
async fn same_types(connection: &Connection, target: &Target) -> Result<bool, Failure> {
    let sql = "SELECT attname::text, atttypid FROM pg_catalog.pg_attribute \
               WHERE attrelid = $1::text::regclass AND attnum > 0 AND NOT attisdropped";
    let rows = connection.client().query(sql, &[&target.name]).await;
    let rows = rows.map_err(|e| classify(e, "reading the shape of a target table"))?;
    let types: FxHashMap<&str, u32> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    Ok(target.columns.iter().all(|column| {
        let column = &target.info.columns[column.source];
        BINARY_TYPES.contains(&column.ty.oid) && types.get(column.name.as_str()) == Some(&column.ty.oid)
    }))
}

#[async_trait]
impl CopySession for Session {
    async fn shapes(&self) -> Result<Option<u32>, CopyError> {
        let connection = self.control().await;
        Ok(copied::shapes(connection.client(), &self.config.own_schema, &self.gid).await?)
    }

    async fn set_shapes(&self, shapes: u32) -> Result<(), CopyError> {
        Ok(self.note_shapes(shapes).await?)
    }

    async fn retain(&self, tables: &[Arc<TableInfo>]) -> Result<(), CopyError> {
        let connection = self.control().await;
        Ok(self.notes().retain(connection.client(), tables).await?)
    }

    async fn finished(&self) -> Result<Vec<(TableId, CopiedPart)>, CopyError> {
        let connection = self.control.lock().await;
        Ok(copied::finished(connection.client(), &self.config.own_schema, &self.gid).await?)
    }

    async fn open(&self, table: &Arc<TableInfo>) -> Result<CopiedTable, CopyError> {
        Ok(self.prepare(table).await?)
    }

    async fn clear(&self, table: TableId) -> Result<(), CopyError> {
        Ok(self.clear_table(table).await?)
    }

    async fn write(
        &self,
        table: TableId,
        part: &CopyPart,
        format: CopyFormat,
        snapshot: (Ts, WallTime),
    ) -> Result<Box<dyn PartWriter>, CopyError> {
        let mut part = self.begin_part(table, part, snapshot).await?;
        part.start(format).await?;
        Ok(Box::new(part))
    }

    async fn replace(
        &self,
        table: &Arc<TableInfo>,
        snapshot: (Ts, WallTime),
    ) -> Result<(Box<dyn PartWriter>, CopyFormat), CopyError> {
        let (part, format) = self.begin_replacement(table, snapshot).await?;
        Ok((Box::new(part), format))
    }

    async fn index(&self, table: TableId, index: &CopyIndex) -> Result<(), CopyError> {
        let opened = self.opened(table)?;
        let connection = self.take().await?;
        self.notes().index(connection.client(), &opened.target.info, index).await?;
        self.idle.lock().push(connection);
        Ok(())
    }

    async fn finish(&self, table: TableId) -> Result<(), CopyError> {
        Ok(self.finish_table(table).await?)
    }

    async fn end(&self) {
        self.idle.lock().clear();
        registration::retire(&self.config, &self.registration).await;
    }
}

/// A part on its way. Dropping it closes the connection, and the server rolls back.
struct Part {
    connection: Connection,
    /// `None`: rows without columns, of which there is nothing but their number.
    input: Option<std::pin::Pin<Box<CopyInSink<Bytes>>>>,
    /// It takes the place of all rows of a table that was so far.
    replaces: Option<Before>,
    part: CopiedPart,
    table: TableId,
    opened: Arc<Opened>,
    doing: String,
    own: String,
    gid: String,
    registration: Arc<Registration>,
    permit: WritePermit,
    metrics: Arc<Metrics>,
    idle: Arc<Mutex<Vec<Connection>>>,
}

impl Part {
    /// Rows follow.
    async fn start(&mut self, format: CopyFormat) -> Result<(), Failure> {
        let opened = &self.opened;
        if opened.columns.is_empty() {
            return Ok(());
        }
        let format = match format {
            CopyFormat::Text => "",
            CopyFormat::Binary => " (FORMAT binary)",
        };
        let columns = opened.columns.join(", ");
        let sql = format!("COPY {} ({columns}) FROM STDIN{format}", opened.target.name);
        let input = self.connection.client().copy_in(&sql).await.map_err(|e| classify(e, &self.doing))?;
        self.input = Some(Box::pin(input));
        Ok(())
    }

    async fn done(mut self, rows: u64) -> Result<(), Failure> {
        let failed = |e| classify_values(e, &self.doing, &self.opened.target.info);
        let client = &self.connection.client();
        let written = match &mut self.input {
            Some(input) => input.as_mut().finish().await.map_err(failed)?,
            None => {
                let count = i64::try_from(rows).unwrap_or(i64::MAX);
                let sql = format!(
                    "INSERT INTO {} SELECT FROM pg_catalog.generate_series(1, $1::bigint)",
                    self.opened.target.name
                );
                client.execute(&sql, &[&count]).await.map_err(failed)?
            }
        };
        if written != rows {
            return Err(Failure::Fatal(Error::Rejected {
                code: "CDC:ErrSinkData",
                what: format!(
                    "{}: {rows} rows were read and {written} written; does a rule or a trigger of the target leave some out?",
                    self.doing
                ),
            }));
        }
        self.part.rows = rows;
        let owner = (self.gid.as_str(), self.table);
        let condition = self.registration.condition();
        match &self.replaces {
            Some(before) => {
                resync::conclude(client, &self.own, owner, before, &self.part, condition).await?;
            }
            None => {
                if !copied::add(client, &self.own, owner, &self.part, (condition, false)).await? {
                    return Err(Failure::Fatal(registration::fenced()));
                }
            }
        }
        self.permit.granted().await;
        let commit = Instant::now();
        client.batch_execute("COMMIT").await.map_err(|e| classify(e, "committing"))?;
        self.metrics.txn.commit.record(commit.elapsed().as_secs_f64());
        self.metrics.txn.affected(RowType::Insert, rows, rows);
        self.metrics.sink.flushed(rows, usize::try_from(self.part.bytes).unwrap_or(usize::MAX));
        self.idle.lock().push(self.connection);
        Ok(())
    }
}

#[async_trait]
impl PartWriter for Part {
    async fn write(&mut self, data: Bytes) -> Result<(), CopyError> {
        self.part.bytes += data.len() as u64;
        let Some(input) = &mut self.input else { return Ok(()) };
        let failed = |e| classify_values(e, &self.doing, &self.opened.target.info);
        Ok(input.send(data).await.map_err(failed)?)
    }

    async fn commit(self: Box<Self>, rows: u64) -> Result<(), CopyError> {
        Ok(self.done(rows).await?)
    }
}
