//! The way of existing rows past the stream, for the log readers of this node: `sink::copies`, with a counter of the rows
//! that are durable and the node's permit to write.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use event::{
    CopiedPart, CopiedTable, CopyError, CopyFormat, CopyIndex, CopyPart, CopyRight, CopySession, CopyTarget,
    PartWriter, Resync, ResyncChange, TableInfo,
};
use heartbeatpb::config::ChangefeedInfo;
use heartbeatpb::{MaintainerEpoch, NodeId, TableId, Ts, WallTime, WritePermit};
use sink::SinkOptions;

/// Knows the ways past the stream.
pub(crate) struct Copies {
    pub(crate) node: NodeId,
    pub(crate) data_dir: PathBuf,
    /// Looked at before every effect.
    pub(crate) permit: WritePermit,
}

impl Copies {
    /// That of a changefeed's downstream; `None` where existing rows come in the stream. `rows` counts what is durable.
    pub(crate) fn of(
        &self,
        info: &ChangefeedInfo,
        epoch: Option<MaintainerEpoch>,
        rows: Arc<AtomicU64>,
    ) -> Result<Option<Arc<dyn CopyTarget>>, CopyError> {
        let options = SinkOptions {
            changefeed: info.id.clone(),
            node: self.node.clone(),
            epoch,
            data_dir: self.data_dir.clone(),
            replica: info.config.clone(),
            permit: self.permit.clone(),
        };
        let inner = sink::copies(&info.sink_uri, &options)?;
        Ok(inner.map(|inner| Arc::new(Counted { inner, rows }) as Arc<dyn CopyTarget>))
    }
}

/// Counts rows that are durable.
struct Counted<T: ?Sized> {
    inner: Arc<T>,
    rows: Arc<AtomicU64>,
}

#[async_trait]
impl CopyTarget for Counted<dyn CopyTarget> {
    async fn begin(&self) -> Result<Option<Arc<dyn CopySession>>, CopyError> {
        let session = self.inner.begin().await?;
        let counted = |inner: Arc<dyn CopySession>| {
            Arc::new(Counted { inner, rows: Arc::clone(&self.rows) }) as Arc<dyn CopySession>
        };
        Ok(session.map(counted))
    }

    async fn write_for(
        &self,
        right: CopyRight,
        table: &Arc<TableInfo>,
        part: &CopyPart,
        format: CopyFormat,
        snapshot: (Ts, WallTime),
    ) -> Result<Box<dyn PartWriter>, CopyError> {
        let inner = self.inner.write_for(right, table, part, format, snapshot).await?;
        Ok(Box::new(CountedPart { inner, rows: Arc::clone(&self.rows) }))
    }

    async fn resyncs(&self) -> Result<Option<Vec<Resync>>, CopyError> {
        self.inner.resyncs().await
    }

    async fn change_resync(&self, table: TableId, change: &ResyncChange) -> Result<bool, CopyError> {
        self.inner.change_resync(table, change).await
    }
}

#[async_trait]
impl CopySession for Counted<dyn CopySession> {
    async fn shapes(&self) -> Result<Option<u32>, CopyError> {
        self.inner.shapes().await
    }

    async fn set_shapes(&self, shapes: u32) -> Result<(), CopyError> {
        self.inner.set_shapes(shapes).await
    }

    async fn retain(&self, tables: &[Arc<TableInfo>]) -> Result<(), CopyError> {
        self.inner.retain(tables).await
    }

    async fn finished(&self) -> Result<Vec<(TableId, CopiedPart)>, CopyError> {
        self.inner.finished().await
    }

    async fn open(&self, table: &Arc<TableInfo>) -> Result<CopiedTable, CopyError> {
        self.inner.open(table).await
    }

    async fn clear(&self, table: TableId) -> Result<(), CopyError> {
        self.inner.clear(table).await
    }

    async fn write(
        &self,
        table: TableId,
        part: &CopyPart,
        format: CopyFormat,
        snapshot: (Ts, WallTime),
    ) -> Result<Box<dyn PartWriter>, CopyError> {
        let inner = self.inner.write(table, part, format, snapshot).await?;
        Ok(Box::new(CountedPart { inner, rows: Arc::clone(&self.rows) }))
    }

    async fn parts(&self, table: TableId) -> Result<Vec<CopiedPart>, CopyError> {
        self.inner.parts(table).await
    }

    async fn admit(&self, node: &NodeId) -> Result<CopyRight, CopyError> {
        self.inner.admit(node).await
    }

    async fn dismiss(&self, right: CopyRight) -> Result<(), CopyError> {
        self.inner.dismiss(right).await
    }

    async fn index(&self, table: TableId, index: &CopyIndex) -> Result<(), CopyError> {
        self.inner.index(table, index).await
    }

    async fn replace(
        &self,
        table: &Arc<TableInfo>,
        snapshot: (Ts, WallTime),
    ) -> Result<(Box<dyn PartWriter>, CopyFormat), CopyError> {
        let (inner, format) = self.inner.replace(table, snapshot).await?;
        Ok((Box::new(CountedPart { inner, rows: Arc::clone(&self.rows) }), format))
    }

    async fn finish(&self, table: TableId) -> Result<(), CopyError> {
        self.inner.finish(table).await
    }

    async fn end(&self) {
        self.inner.end().await;
    }
}

struct CountedPart {
    inner: Box<dyn PartWriter>,
    rows: Arc<AtomicU64>,
}

#[async_trait]
impl PartWriter for CountedPart {
    async fn write(&mut self, data: Bytes) -> Result<(), CopyError> {
        self.inner.write(data).await
    }

    async fn commit(self: Box<Self>, rows: u64) -> Result<(), CopyError> {
        self.inner.commit(rows).await?;
        self.rows.fetch_add(rows, Ordering::Relaxed);
        Ok(())
    }
}
