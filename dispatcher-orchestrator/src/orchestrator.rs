//! The node's receiver of bootstrap, post-bootstrap and close requests, and the end of all its managers.

use std::sync::Arc;

use dispatcher_manager::{
    EventSource, HeartbeatCollector, ManagerContext, ManagerHandle, ManagerView, Routes, SinkFactory,
};
use heartbeatpb::ChangefeedId;
use messaging::{Inbound, Inbox, MessageCenter, OrchestratorTopic, ToOrchestrator};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::handler::Handler;
use crate::queue::{Request, shard_of};
use crate::registry::Registry;
use crate::shard::Shard;

/// Shards: changefeeds of different shards do not wait for each other's downstream to open.
const SHARDS: usize = 8;
/// Requests that wait for the receiver, which only sorts them: one of each kind for thousands of changefeeds.
const INBOX: usize = 16_384;

#[derive(Debug)]
struct Shared {
    handler: Handler,
    shards: [Shard; SHARDS],
    /// Cancelled by the local fence.
    fenced: CancellationToken,
}

/// Receives what maintainers ask of this node as a whole. `run` it once.
#[derive(Debug)]
pub struct Orchestrator {
    inbox: Inbox<OrchestratorTopic>,
    collector: HeartbeatCollector,
    shared: Arc<Shared>,
}

/// Fences and inspects the node's dispatcher managers. Cheap to clone.
#[derive(Clone, Debug)]
pub struct OrchestratorHandle {
    shared: Arc<Shared>,
}

impl Orchestrator {
    /// Registers at the node's message center. `source` is the node's event collector.
    #[must_use]
    pub fn new(
        center: MessageCenter,
        source: Arc<dyn EventSource>,
        sinks: Arc<dyn SinkFactory>,
    ) -> (Self, OrchestratorHandle) {
        let routes = Routes::default();
        let inbox = center.register::<OrchestratorTopic>(INBOX);
        let collector = HeartbeatCollector::new(&center, routes.clone());
        let context = ManagerContext { center, source, sinks, routes };
        let shared = Arc::new(Shared {
            handler: Handler { context, registry: Registry::default() },
            shards: Default::default(),
            fenced: CancellationToken::new(),
        });
        let handle = OrchestratorHandle { shared: Arc::clone(&shared) };
        (Self { inbox, collector, shared }, handle)
    }

    /// Serves requests until `shutdown`, then closes every manager in an orderly way and returns. After a local
    /// fence nothing is served, and `shutdown` ends the rest.
    pub async fn run(self, shutdown: CancellationToken) {
        let Self { mut inbox, collector, shared } = self;
        let collector_stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        let token = collector_stop.clone();
        tasks.spawn(collector.run(token));
        let mut workers = JoinSet::new();
        for shard in 0..SHARDS {
            workers.spawn(work(Arc::clone(&shared), shard));
        }
        loop {
            let inbound = tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                () = shared.fenced.cancelled() => break,
                inbound = inbox.recv() => inbound,
            };
            match inbound {
                Some(Inbound { from, message }) => shared.enqueue(from, message),
                None => break,
            }
        }
        drop(inbox);
        if !shared.fenced.is_cancelled() && !shutdown.is_cancelled() {
            tracing::warn!("another receiver took the orchestrator's topic over");
        }
        if shared.fenced.is_cancelled() {
            collector_stop.cancel();
            shared.shards.iter().for_each(Shard::close);
            while workers.join_next().await.is_some() {}
            // One may have become visible in between.
            shared.handler.registry.fence();
            shutdown.cancelled().await;
            return;
        }
        shutdown.cancelled().await;
        // What still waits is dropped. No manager becomes visible from now on; those that a worker waits for
        // answer it when they close.
        shared.handler.registry.close();
        shared.shards.iter().for_each(Shard::close);
        let mut closing = JoinSet::new();
        for manager in shared.handler.registry.managers() {
            closing.spawn(async move { manager.shut_down().await });
        }
        while workers.join_next().await.is_some() {}
        while closing.join_next().await.is_some() {}
        collector_stop.cancel();
        while tasks.join_next().await.is_some() {}
    }
}

impl Shared {
    fn enqueue(&self, from: heartbeatpb::NodeId, message: ToOrchestrator) {
        let request = Request { from, message };
        let shard = shard_of(request.changefeed().gid, SHARDS);
        let (kind, epoch) = (request.kind(), request.epoch());
        let changefeed = request.changefeed().clone();
        let pushed = self.shards[shard].push(request);
        tracing::debug!(%changefeed, ?kind, epoch, ?pushed, "request");
    }
}

async fn work(shared: Arc<Shared>, shard: usize) {
    while let Some(request) = shared.shards[shard].next().await {
        shared.handler.handle(request).await;
    }
}

impl OrchestratorHandle {
    /// This node has lost its lease: stops every downstream write now, drains nothing, answers nothing any more.
    /// Does not wait for anything. For good; calling it again fences what became visible since.
    pub fn local_fence(&self) {
        self.shared.handler.registry.fence();
        self.shared.fenced.cancel();
    }

    /// Whether the node was fenced.
    #[must_use]
    pub fn is_fenced(&self) -> bool {
        self.shared.fenced.is_cancelled()
    }

    /// The changefeeds with a manager here.
    #[must_use]
    pub fn changefeeds(&self) -> Vec<ChangefeedId> {
        let managers = self.shared.handler.registry.managers();
        managers.iter().map(ManagerHandle::id).cloned().collect()
    }

    /// What the manager of a changefeed is doing; `None` without one.
    pub async fn inspect(&self, changefeed: &ChangefeedId) -> Option<ManagerView> {
        self.shared.handler.registry.manager(changefeed.gid)?.inspect().await
    }
}
