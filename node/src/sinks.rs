//! The sinks of this node's dispatcher managers: `sink::open`, with a counter of flushed rows.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use dispatcher_manager::SinkFactory;
use event::{BlockEvent, RowBatch, TableInfo};
use heartbeatpb::config::DispatcherManagerConfig;
use heartbeatpb::{DispatcherId, TableSpan, Ts, WallTime};
use sink::{Error, Flushed, Sink, SinkOptions, TableStart};
use tokio_util::sync::CancellationToken;

use crate::upstream::UpstreamHub;

/// Opens sinks for dispatcher managers.
pub(crate) struct Sinks {
    pub(crate) data_dir: PathBuf,
    pub(crate) upstreams: Arc<UpstreamHub>,
}

#[async_trait]
impl SinkFactory for Sinks {
    async fn create(&self, config: &DispatcherManagerConfig) -> Result<Arc<dyn Sink>, Error> {
        let options = SinkOptions {
            changefeed: config.changefeed.clone(),
            data_dir: self.data_dir.clone(),
            replica: config.config.clone(),
        };
        let inner = sink::open(&config.sink_uri, &options).await?;
        Ok(Arc::new(Counting { inner, rows: self.upstreams.written(&config.changefeed) }))
    }
}

/// A sink that counts the rows that it has flushed.
struct Counting {
    inner: Arc<dyn Sink>,
    rows: Arc<AtomicU64>,
}

#[async_trait]
impl Sink for Counting {
    async fn run(&self, shutdown: CancellationToken) -> Result<(), Error> {
        self.inner.run(shutdown).await
    }

    fn healthy(&self) -> bool {
        self.inner.healthy()
    }

    async fn open_dispatcher(
        &self,
        dispatcher: DispatcherId,
        span: &TableSpan,
        start_ts: Ts,
    ) -> Result<TableStart, Error> {
        self.inner.open_dispatcher(dispatcher, span, start_ts).await
    }

    async fn open_table(&self, dispatcher: DispatcherId, table: &TableInfo) -> Result<(), Error> {
        self.inner.open_table(dispatcher, table).await
    }

    fn write_rows(&self, dispatcher: DispatcherId, batch: RowBatch, flushed: Flushed) {
        let rows = batch.row_count();
        let total = Arc::clone(&self.rows);
        let counted = Flushed::new(move || {
            total.fetch_add(rows, Ordering::Relaxed);
            flushed.done();
        });
        self.inner.write_rows(dispatcher, batch, counted);
    }

    async fn flush_before_block(&self, dispatcher: DispatcherId) -> Result<(), Error> {
        self.inner.flush_before_block(dispatcher).await
    }

    async fn write_block_event(&self, event: &BlockEvent) -> Result<(), Error> {
        self.inner.write_block_event(event).await
    }

    fn publish_checkpoint(&self, checkpoint: Ts, time: WallTime) {
        self.inner.publish_checkpoint(checkpoint, time);
    }

    fn close_dispatcher(&self, dispatcher: DispatcherId) {
        self.inner.close_dispatcher(dispatcher);
    }

    async fn forget_changefeed(&self) -> Result<(), Error> {
        self.inner.forget_changefeed().await
    }

    fn wants_checkpoints(&self) -> bool {
        self.inner.wants_checkpoints()
    }
}
