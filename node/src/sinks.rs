//! The sinks of this node's dispatcher managers: `sink::open`, with a counter of flushed rows and a look at the node's lease.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use dispatcher_manager::SinkFactory;
use event::{BlockEvent, RowBatch, TableInfo};
use heartbeatpb::config::{ChangefeedInfo, DispatcherManagerConfig};
use heartbeatpb::{DispatcherId, MaintainerEpoch, NodeId, RunningError, TableSpan, Ts, WallTime};
use maintainer::{DownstreamFence, FenceOutcome};
use sink::{Error, Flushed, Sink, SinkOptions, TableStart};
use tokio_util::sync::CancellationToken;

use crate::upstream::UpstreamHub;
use crate::wiring::Lease;

/// Opens sinks for dispatcher managers.
pub(crate) struct Sinks {
    pub(crate) data_dir: PathBuf,
    pub(crate) upstreams: Arc<UpstreamHub>,
    pub(crate) lease: Arc<Lease>,
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
        };
        let inner = sink::open(&config.sink_uri, &options).await?;
        let rows = self.upstreams.written(&config.changefeed);
        Ok(Arc::new(Guarded { inner, rows, lease: Arc::clone(&self.lease) }))
    }
}

/// Fences the sinks of nodes that are gone, where a downstream can; its own node reports what fails.
pub(crate) struct Fences(pub(crate) NodeId);

#[async_trait]
impl DownstreamFence for Fences {
    fn applies_to(&self, info: &ChangefeedInfo) -> bool {
        sink::has_fence(&info.sink_uri)
    }

    async fn fence(
        &self,
        info: &ChangefeedInfo,
        epoch: Option<MaintainerEpoch>,
        whom: &maintainer::Whom,
    ) -> Result<FenceOutcome, RunningError> {
        let whom = match whom {
            maintainer::Whom::AllBut(nodes) => sink::Whom::AllBut(nodes.clone()),
            maintainer::Whom::Nodes(nodes) => sink::Whom::Nodes(nodes.clone()),
        };
        let request = sink::FenceRequest { changefeed: info.id.clone(), epoch, whom };
        match sink::fence(&info.sink_uri, &request).await {
            Ok(fenced) => Ok(FenceOutcome { busy: fenced.busy }),
            Err(error) => Err(RunningError {
                time: String::new(),
                node: self.0.to_string(),
                code: error.code().to_owned(),
                message: heartbeatpb::error_chain(&error),
            }),
        }
    }
}

/// A sink that counts the rows that it has flushed, and takes nothing once the node's lease is old: a process that
/// was stopped for a while must not write before it has noticed.
struct Guarded {
    inner: Arc<dyn Sink>,
    rows: Arc<AtomicU64>,
    lease: Arc<Lease>,
}

impl Guarded {
    fn may_write(&self) -> Result<(), Error> {
        if self.lease.holds() { Ok(()) } else { Err(Error::Closed) }
    }
}

#[async_trait]
impl Sink for Guarded {
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
        self.may_write()?;
        self.inner.open_table(dispatcher, table).await
    }

    fn write_rows(&self, dispatcher: DispatcherId, batch: RowBatch, flushed: Flushed) {
        if !self.lease.holds() {
            // What is not flushed is not done: the node is about to end, and another one repeats it.
            return;
        }
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
        self.may_write()?;
        self.inner.write_block_event(event).await
    }

    fn publish_checkpoint(&self, checkpoint: Ts, time: WallTime) {
        if self.lease.holds() {
            self.inner.publish_checkpoint(checkpoint, time);
        }
    }

    fn close_dispatcher(&self, dispatcher: DispatcherId) {
        self.inner.close_dispatcher(dispatcher);
    }

    async fn forget_changefeed(&self) -> Result<(), Error> {
        self.may_write()?;
        self.inner.forget_changefeed().await
    }

    fn wants_checkpoints(&self) -> bool {
        self.inner.wants_checkpoints()
    }
}
