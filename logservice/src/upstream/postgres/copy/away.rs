//! Parts that another node reads and writes, because a dispatcher of its has their key range; see [`crate::crew`].
//!
//! Each worker here lends its snapshot out while it waits, so as many parts are on their way as ever, and as long as one of
//! them is, its snapshot is there to be joined.

use std::sync::Arc;

use event::{CopyFormat, CopyPart, CopyRight, CopySession, PartWriter, TableInfo};
use heartbeatpb::{NodeId, Ts, WallTime};
use rustc_hash::FxHashMap;
use tokio::sync::Mutex;

use super::super::conn::{Connection, Purpose};
use super::super::options::ConnectOptions;
use super::super::sql::qualified;
use super::{direct, join_snapshot};
use crate::Error;
use crate::crew::{CopyCrew, CopyOrder};

/// A connection that sees the snapshot of a copy.
pub(super) struct Seat {
    pub(super) conn: Connection,
    /// The name under which others may join it.
    exported: Option<String>,
}

impl Seat {
    pub(super) fn new(conn: Connection) -> Self {
        Self { conn, exported: None }
    }

    async fn export(&mut self) -> Result<&str, Error> {
        if self.exported.is_none() {
            let rows = self.conn.query("export a snapshot", "SELECT pg_export_snapshot()").await?;
            let row = rows.first().ok_or_else(|| Error::protocol("a snapshot has no name"))?;
            self.exported = Some(row.text(0).to_owned());
        }
        Ok(self.exported.as_deref().unwrap_or_default())
    }
}

/// A part that may be written elsewhere.
pub(super) struct Wanted<'a> {
    pub(super) table: &'a Arc<TableInfo>,
    pub(super) part: &'a CopyPart,
    pub(super) format: CopyFormat,
    pub(super) statement: &'a str,
}

/// The other nodes of a run.
pub(super) struct Away {
    crew: CopyCrew,
    session: Arc<dyn CopySession>,
    application: String,
    snapshot: (Ts, WallTime),
    /// What each may write with; `None`: it gets no more orders.
    rights: Mutex<FxHashMap<NodeId, Option<CopyRight>>>,
}

impl Away {
    pub(super) fn new(
        crew: CopyCrew,
        session: Arc<dyn CopySession>,
        application: &str,
        snapshot: (Ts, WallTime),
    ) -> Self {
        Self { crew, session, application: application.to_owned(), snapshot, rights: Mutex::default() }
    }

    /// Has a part written by the node that owns its first key. Answers its rows and bytes; `None`: it is to be written here.
    pub(super) async fn copy(
        &self,
        seat: &mut Seat,
        wanted: &Wanted<'_>,
    ) -> Result<Option<(u64, u64)>, Error> {
        let Some(node) = self.crew.owner(wanted.table.id, &wanted.part.start) else { return Ok(None) };
        let Some(right) = self.right(&node).await? else { return Ok(None) };
        let order = CopyOrder {
            changefeed: self.crew.changefeed().clone(),
            id: self.crew.next(),
            feed: self.crew.feed(),
            right,
            table: Arc::clone(wanted.table),
            part: wanted.part.clone(),
            format: wanted.format,
            snapshot: seat.export().await?.to_owned(),
            at: self.snapshot.0,
            time: self.snapshot.1,
            application: self.application.clone(),
            statement: wanted.statement.to_owned(),
        };
        let why = match self.crew.order(&node, order).await {
            Ok(written) => return Ok(Some(written)),
            Err(why) => why,
        };
        tracing::warn!(changefeed = %self.crew.changefeed(), table = %wanted.table.name, nodeID = %node, why,
            "a node did not copy its part of a table; it gets no more of them, and this node copies it");
        // Under the lock, so that nobody begins with the right any more.
        self.rights.lock().await.insert(node, None);
        self.session.dismiss(right).await?;
        let parts = self.session.parts(wanted.table.id).await?;
        let written = parts.iter().find(|found| found.part == *wanted.part);
        Ok(written.map(|found| (found.rows, found.bytes)))
    }

    async fn right(&self, node: &NodeId) -> Result<Option<CopyRight>, Error> {
        let mut rights = self.rights.lock().await;
        if let Some(right) = rights.get(node) {
            return Ok(*right);
        }
        let right = self.session.admit(node).await?;
        rights.insert(node.clone(), Some(right));
        Ok(Some(right))
    }
}

/// Reads a part in the snapshot of another node's copy, and writes it. Answers its rows and bytes.
pub(in super::super) async fn carry_out(
    options: &ConnectOptions,
    order: &CopyOrder,
    mut writer: Box<dyn PartWriter>,
) -> Result<(u64, u64), Error> {
    let mut conn = Connection::connect(options, Purpose::Copy, &order.application).await?;
    join_snapshot(&mut conn, &order.snapshot).await?;
    let action = format!("copy a part of table {}", qualified(&order.table.schema, &order.table.name));
    let mut sum = 0;
    let mut count = |_, bytes| sum += bytes;
    let statement = (action.as_str(), order.statement.as_str());
    let rows = direct::relay(&mut conn, statement, order.format, &mut *writer, &mut count).await?;
    writer.commit(rows).await?;
    conn.close().await;
    Ok((rows, sum))
}
