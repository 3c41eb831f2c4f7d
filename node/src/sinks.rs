//! The sinks of this node's dispatcher managers: `sink::open`, with a counter of flushed rows and the node's permit to write.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use dispatcher_manager::SinkFactory;
use event::{BlockEvent, RowBatch, TableInfo};
use heartbeatpb::config::{ChangefeedInfo, DispatcherManagerConfig};
use heartbeatpb::{
    DispatcherId, MaintainerEpoch, NodeId, RunningError, TableSpan, Ts, WallTime, WritePermit,
};
use maintainer::{DownstreamFence, FenceOutcome};
use sink::{Error, Flushed, Sink, SinkOptions, TableStart};
use tokio_util::sync::CancellationToken;

use crate::upstream::UpstreamHub;

/// How long opening a sink waits for the permit; whoever wants the sink asks again.
const PATIENCE: Duration = Duration::from_secs(10);

/// Opens sinks for dispatcher managers.
pub(crate) struct Sinks {
    pub(crate) data_dir: PathBuf,
    pub(crate) upstreams: Arc<UpstreamHub>,
    /// Looked at by the sinks before every effect.
    pub(crate) permit: WritePermit,
}

#[async_trait]
impl SinkFactory for Sinks {
    async fn create(&self, config: &DispatcherManagerConfig) -> Result<Arc<dyn Sink>, Error> {
        let options = SinkOptions {
            changefeed: config.changefeed.clone(),
            node: self.upstreams.node().clone(),
            epoch: config.epoch,
            data_dir: self.data_dir.clone(),
            replica: config.config.clone(),
            permit: self.permit.clone(),
        };
        // A sink registers, and takes the place of the one before.
        if tokio::time::timeout(PATIENCE, self.permit.granted()).await.is_err() {
            let what = "writing is suspended: the lease of this node is not confirmed".to_owned();
            return Err(Error::Unavailable { what, source: None });
        }
        let inner = sink::open(&config.sink_uri, &options).await?;
        let rows = self.upstreams.written(&config.changefeed);
        Ok(Arc::new(Counted { inner, rows }))
    }
}

/// Fences the sinks of nodes that are gone, where a downstream can.
pub(crate) struct Fences {
    /// This node, which reports what fails.
    pub(crate) node: NodeId,
    /// A node whose own lease is in doubt fences nobody.
    pub(crate) permit: WritePermit,
}

#[async_trait]
impl DownstreamFence for Fences {
    fn applies_to(&self, info: &ChangefeedInfo) -> bool {
        sink::has_fence(&info.sink_uri)
    }

    async fn fence(
        &self,
        info: &ChangefeedInfo,
        epoch: Option<MaintainerEpoch>,
        newest: Option<MaintainerEpoch>,
        whom: &maintainer::Whom,
    ) -> Result<FenceOutcome, RunningError> {
        let whom = match whom {
            maintainer::Whom::AllBut(nodes) => sink::Whom::AllBut(nodes.clone()),
            maintainer::Whom::Nodes(nodes) => sink::Whom::Nodes(nodes.clone()),
        };
        self.permit.granted().await;
        let request = sink::FenceRequest { changefeed: info.id.clone(), epoch, newest, whom };
        match sink::fence(&info.sink_uri, &request).await {
            Ok(fenced) => Ok(FenceOutcome { busy: fenced.busy, writers: fenced.writers }),
            Err(error) => Err(RunningError {
                time: String::new(),
                node: self.node.to_string(),
                code: error.code().to_owned(),
                message: heartbeatpb::error_chain(&error),
            }),
        }
    }
}

/// A sink that counts the rows that it has flushed.
struct Counted {
    inner: Arc<dyn Sink>,
    rows: Arc<AtomicU64>,
}

#[async_trait]
impl Sink for Counted {
    async fn run(&self, shutdown: CancellationToken) -> Result<(), Error> {
        self.inner.run(shutdown).await
    }

    fn healthy(&self) -> bool {
        self.inner.healthy()
    }

    fn trouble(&self) -> Option<Error> {
        self.inner.trouble()
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
