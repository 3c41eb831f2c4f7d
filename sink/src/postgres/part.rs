//! One part of a copy on its way into the target, and what all parts of a copy have in common.

use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use bytes::Bytes;
use event::{CopiedPart, CopyError, CopyFormat, CopyPart, PartWriter};
use futures_util::SinkExt;
use heartbeatpb::{Ts, WallTime, WritePermit};
use parking_lot::Mutex;
use tokio_postgres::CopyInSink;

use super::config::PgConfig;
use super::connection::Connection;
use super::copied;
use super::failure::{Failure, classify, classify_values};
use super::registration::{self, Registration};
use super::resync::{self, Before};
use super::sql::quote;
use super::target::Target;
use crate::metrics::{RowType, SinkMetrics, TxnMetrics};
use crate::{Error, SinkOptions};

/// A table that a session has opened.
pub(super) struct Opened {
    pub(super) target: Target,
    /// Quoted names of the columns that travel, in their order.
    pub(super) columns: Vec<String>,
}

impl Opened {
    pub(super) fn new(target: Target) -> Self {
        let travels = target.info.columns.iter().filter(|column| column.generated.is_none());
        let columns = travels.map(|column| quote(&column.name)).collect();
        Self { target, columns }
    }
}

/// Series of the sink, to which a part is a batch.
struct Metrics {
    sink: SinkMetrics,
    txn: TxnMetrics,
}

/// Who writes parts of a copy.
pub(super) struct Copier {
    pub(super) config: PgConfig,
    pub(super) gid: String,
    pub(super) registration: Registration,
    pub(super) permit: WritePermit,
    metrics: Metrics,
    /// Connections between two parts.
    idle: Mutex<Vec<Connection>>,
}

impl Copier {
    pub(super) fn new(config: &PgConfig, options: &SinkOptions, registration: Registration) -> Self {
        Self {
            config: config.clone(),
            gid: options.changefeed.gid.to_string(),
            registration,
            permit: options.permit.clone(),
            metrics: Metrics {
                sink: SinkMetrics::new(&options.changefeed, "TxnSink"),
                txn: TxnMetrics::new(&options.changefeed),
            },
            idle: Mutex::default(),
        }
    }

    /// A connection for a transaction of its own.
    pub(super) async fn take(&self) -> Result<Connection, Failure> {
        self.permit.granted().await;
        let idle = self.idle.lock().pop();
        match idle.filter(|connection| !connection.is_closed()) {
            Some(connection) => Ok(connection),
            None => Connection::open(&self.config).await,
        }
    }

    pub(super) fn give_back(&self, connection: Connection) {
        self.idle.lock().push(connection);
    }

    pub(super) fn close_idle(&self) {
        self.idle.lock().clear();
    }

    /// A part's transaction, in which nothing is written yet.
    pub(super) async fn begin(
        self: &Arc<Self>,
        opened: Arc<Opened>,
        part: &CopyPart,
        (at, time): (Ts, WallTime),
    ) -> Result<Part, Failure> {
        let connection = self.take().await?;
        self.registration.begin_checked(connection.client()).await?;
        if opened.target.deferrable {
            let defer = connection.client().batch_execute("SET CONSTRAINTS ALL DEFERRED").await;
            defer.map_err(|e| classify(e, "beginning a transaction"))?;
        }
        let doing = format!("copying into table {}", opened.target.name);
        let part = CopiedPart { part: part.clone(), at, time, rows: 0, bytes: 0 };
        Ok(Part { connection, input: None, replaces: None, part, opened, doing, copier: Arc::clone(self) })
    }
}

/// A part on its way. Dropping it closes the connection, and the server rolls back.
pub(super) struct Part {
    pub(super) connection: Connection,
    /// `None`: rows without columns, of which there is nothing but their number.
    input: Option<std::pin::Pin<Box<CopyInSink<Bytes>>>>,
    /// It takes the place of all rows of a table that was so far.
    pub(super) replaces: Option<Before>,
    part: CopiedPart,
    pub(super) opened: Arc<Opened>,
    pub(super) doing: String,
    copier: Arc<Copier>,
}

impl Part {
    /// Rows follow.
    pub(super) async fn start(&mut self, format: CopyFormat) -> Result<(), Failure> {
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
        let (copier, client) = (Arc::clone(&self.copier), &self.connection.client());
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
        let (own, owner) = (&copier.config.own_schema, (copier.gid.as_str(), self.opened.target.info.id));
        let condition = copier.registration.condition();
        match &self.replaces {
            Some(before) => {
                resync::conclude(client, own, owner, before, &self.part, condition).await?;
            }
            None => {
                if !copied::add(client, own, owner, &self.part, (condition, false)).await? {
                    return Err(Failure::Fatal(registration::fenced()));
                }
            }
        }
        copier.permit.granted().await;
        let commit = Instant::now();
        client.batch_execute("COMMIT").await.map_err(|e| classify(e, "committing"))?;
        copier.metrics.txn.commit.record(commit.elapsed().as_secs_f64());
        copier.metrics.txn.affected(RowType::Insert, rows, rows);
        copier.metrics.sink.flushed(rows, usize::try_from(self.part.bytes).unwrap_or(usize::MAX));
        copier.give_back(self.connection);
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
