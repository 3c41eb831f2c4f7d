//! The initial copy: existing rows of every table, as of one snapshot, over parallel connections.
//!
//! The snapshot is exported by a temporary slot, so its position S in the log is exact: the copy holds what was
//! committed before S, and streaming from S on continues it without a gap or an overlap.
//!
//! Where the downstream takes existing rows itself ([`event::CopyTarget`]), they go to it directly, part by part
//! (`direct.rs`, `parts.rs`), those of large tables by the nodes that own their spans (`away.rs`), and a copy that is cut off goes
//! on with the parts that are missing. Otherwise they come
//! through the event store like changes (`store.rs`), and a copy that is cut off begins again.
//!
//! ```text
//!   tables are listed ──► copied directly: tables in other shapes than before are begun anew
//!        ▲                   │ snapshot; parts, several at once; indexes of tables that the copy has created
//!        │                   │ or through the store
//!        │                   ▼
//!        └── outdated ◄── a table is not what it was when it was listed
//!                            │ otherwise
//!                            ▼
//!                      the store knows the tables; the stream begins at the oldest snapshot
//! ```

pub(super) mod again;
pub(super) mod away;
mod direct;
mod indexes;
mod lines;
mod parts;
mod store;

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use event::CopyTarget;
use heartbeatpb::{ChangefeedId, Ts, WallTime};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::catalog::CatalogTable;
use super::conn::{Connection, Purpose};
use super::names::Names;
use super::options::ConnectOptions;
use super::shape::Shape;
use super::sql::{ident, literal, parse_lsn};
use crate::Error;
use crate::crew::CopyCrew;
use crate::event_store::StoreWriter;
use crate::upstream::{ReaderProgress, TableCopy};

/// A table that sends nothing for so long is stuck behind a dead connection.
const SILENCE: Duration = Duration::from_secs(300);
/// A snapshot normally takes milliseconds; after this a person should know why it takes longer.
const SNAPSHOT_PATIENCE: Duration = Duration::from_secs(5);
/// How often the log tells how far a copy is.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// What a copy needs.
pub(crate) struct CopyPlan<'a> {
    pub(crate) changefeed: &'a ChangefeedId,
    pub(crate) options: &'a ConnectOptions,
    pub(crate) names: &'a Names,
    pub(crate) application: &'a str,
    pub(crate) tables: &'a [(CatalogTable, Arc<Shape>)],
    /// Connections that read at the same time.
    pub(crate) parallel: usize,
    /// About how large a part of a table is. In bytes.
    pub(crate) part_bytes: u64,
    /// A downstream that may take the rows itself.
    pub(crate) target: Option<&'a Arc<dyn CopyTarget>>,
    /// Nodes that may write parts.
    pub(crate) crew: Option<&'a CopyCrew>,
    pub(crate) progress: &'a Arc<ReaderProgress>,
    pub(crate) shutdown: &'a CancellationToken,
}

/// What a copy has come to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Copied {
    /// The stream is wanted from here on: the oldest snapshot.
    pub(crate) from: Ts,
    /// When that was.
    pub(crate) time: WallTime,
    /// The newest snapshot: tables must not have changed their shape before it.
    pub(crate) until: Ts,
}

/// Copies every table. `None`: told to stop before the end.
pub(crate) async fn run(plan: &CopyPlan<'_>, writer: &StoreWriter) -> Result<Option<Copied>, Error> {
    plan.progress.copy_tables_total.store(plan.tables.len() as u64, Ordering::Relaxed);
    plan.progress.copy_tables_done.store(0, Ordering::Relaxed);
    plan.progress.copy_rows.store(0, Ordering::Relaxed);
    let session = match plan.target {
        None => None,
        Some(target) => tokio::select! {
            begun = target.begin() => begun?,
            () = plan.shutdown.cancelled() => return Ok(None),
        },
    };
    let copied = match &session {
        None => store::run(plan, writer).await,
        Some(session) => {
            let copied = direct::run(plan, session).await;
            session.end().await;
            copied
        }
    };
    if let Ok(Some(Copied { from: position, .. })) = &copied {
        plan.progress.copy.end();
        let sum = plan.progress.copy.sum();
        tracing::info!(changefeed = %plan.changefeed, %position, rows = sum.rows, bytes = sum.bytes,
            rows_per_second = sum.rows_per_second, "every table is copied");
    }
    copied
}

/// Makes the tables known to whoever looks at the progress.
fn begin_board(plan: &CopyPlan<'_>) -> Vec<Arc<TableCopy>> {
    let tables: Vec<Arc<TableCopy>> = plan
        .tables
        .iter()
        .map(|(table, _)| Arc::new(TableCopy::new(&table.info.schema, &table.info.name)))
        .collect();
    plan.progress.copy.begin(tables.clone());
    tables
}

/// Waits for the workers. False: told to stop before their end.
async fn join(plan: &CopyPlan<'_>, mut workers: JoinSet<Result<(), Error>>) -> Result<bool, Error> {
    let mut tell = tokio::time::interval(TELL_EVERY);
    tell.reset();
    let outcome = loop {
        let joined = tokio::select! {
            biased;
            () = plan.shutdown.cancelled() => break Ok(false),
            _ = tell.tick() => {
                tell_progress(plan);
                continue;
            }
            joined = workers.join_next() => joined,
        };
        match joined {
            None => break Ok(true),
            Some(Ok(Ok(()))) => {}
            Some(Ok(Err(error))) => break Err(error),
            Some(Err(_)) => break Err(Error::Closed { what: "a copy worker" }),
        }
    };
    // Nobody may go on writing rows of this snapshot after we return.
    workers.shutdown().await;
    outcome
}

fn tell_progress(plan: &CopyPlan<'_>) {
    let (progress, sum) = (plan.progress, plan.progress.copy.sum());
    tracing::info!(
        changefeed = %plan.changefeed,
        tables = plan.tables.len(),
        tables_done = progress.copy_tables_done.load(Ordering::Relaxed),
        rows = sum.rows,
        rows_per_second = sum.rows_per_second,
        bytes_per_second = sum.bytes_per_second,
        remaining_seconds = sum.remaining_seconds,
        "initial copy goes on"
    );
}

/// A moment of the upstream, and connections that see it.
struct Snapshot {
    position: Ts,
    time: WallTime,
    connections: Vec<Connection>,
}

/// Opens a snapshot for as many connections as are allowed and of use. `None`: told to stop.
async fn snapshot(plan: &CopyPlan<'_>, of_use: usize) -> Result<Option<Snapshot>, Error> {
    let mut exporter = Connection::connect(plan.options, Purpose::Replication, plan.application).await?;
    let Some(exported) = export(plan, &mut exporter).await? else { return Ok(None) };
    tracing::info!(changefeed = %plan.changefeed, position = %exported.position, tables = plan.tables.len(),
        "a copy begins");
    let mut connections = Vec::new();
    for _ in 0..plan.parallel.clamp(1, of_use.max(1)) {
        connections.push(import(plan, &exported.name).await?);
    }
    // The snapshot lives on in the workers' transactions; the temporary slot need not hold the log any longer.
    exporter.close().await;
    Ok(Some(Snapshot { position: exported.position, time: exported.time, connections }))
}

struct Exported {
    name: String,
    position: Ts,
    time: WallTime,
}

async fn export(plan: &CopyPlan<'_>, exporter: &mut Connection) -> Result<Option<Exported>, Error> {
    // The time comes first: another statement after the export would end the snapshot.
    let sql = "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint";
    let rows = exporter.query("tell the time", sql).await?;
    let time = WallTime(rows.first().ok_or_else(|| Error::protocol("no time"))?.number(0)?);
    let cancel = exporter.cancel_token();
    let sql = format!(
        "CREATE_REPLICATION_SLOT {} TEMPORARY LOGICAL pgoutput EXPORT_SNAPSHOT",
        ident(&plan.names.copy_slot(rand::random()))
    );
    let mut create = pin!(exporter.query("create a temporary slot", &sql));
    let rows = loop {
        tokio::select! {
            rows = &mut create => break rows?,
            () = plan.shutdown.cancelled() => {
                cancel.cancel(plan.options).await;
                return Ok(None);
            }
            () = tokio::time::sleep(SNAPSHOT_PATIENCE) => {
                let wait = "a copy waits for the transactions that are running on the upstream to end";
                plan.progress.set_last_error(Some(wait.to_owned()));
                tracing::warn!("{wait}");
            }
        }
    };
    plan.progress.set_last_error(None);
    let row = rows.first().ok_or_else(|| Error::protocol("no slot was described"))?;
    let position = parse_lsn(row.text(1)).ok_or_else(|| Error::protocol("a slot has no position"))?;
    Ok(Some(Exported { name: row.text(2).to_owned(), position: Ts(position), time }))
}

async fn import(plan: &CopyPlan<'_>, snapshot: &str) -> Result<Connection, Error> {
    let mut conn = Connection::connect(plan.options, Purpose::Copy, plan.application).await?;
    join_snapshot(&mut conn, snapshot).await?;
    Ok(conn)
}

/// From now on the connection sees what a snapshot sees, which somebody has exported and still has.
async fn join_snapshot(conn: &mut Connection, name: &str) -> Result<(), Error> {
    let begin = "BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY; SET TRANSACTION SNAPSHOT";
    let sql = format!("{begin} {}", literal(name));
    conn.query("import a snapshot", &sql).await.map(drop)
}

fn silent(conn: &Connection) -> Error {
    Error::UpstreamUnreachable {
        address: conn.address().to_owned(),
        source: Box::new(std::io::Error::new(
            std::io::ErrorKind::TimedOut,
            format!("nothing came for {} seconds", SILENCE.as_secs()),
        )),
    }
}
