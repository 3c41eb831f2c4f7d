//! The orchestrator: receives, queues by shard, and works on one request of a changefeed at a time.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use dispatcher_manager::{
    Bootstrapped, Closed, Error, HeartbeatCollector, ManagerContext, ManagerHandle, WritePath, failed_bootstrap,
};
use heartbeatpb::config::DispatcherManagerConfig;
use heartbeatpb::{
    Gid, MaintainerBootstrapRequest, MaintainerCloseRequest, MaintainerCloseResponse,
    MaintainerPostBootstrapRequest, NodeId,
};
use messaging::{
    Inbox, MaintainerManagerTopic, MaintainerTopic, MessageCenter, OrchestratorTopic, ToMaintainer,
    ToMaintainerManager, ToOrchestrator,
};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::pending::Pending;
use crate::tombstones::Tombstones;

/// Requests that wait to be sorted into shards; maintainers repeat what does not fit.
const INBOX: usize = 16_384;
/// Changefeeds of different shards are worked on in parallel (spec/dispatcher.md §1).
const SHARDS: usize = 8;

/// The managers of the node. Never locked across an await.
#[derive(Default)]
struct Registry {
    managers: BTreeMap<Gid, ManagerHandle>,
    /// Being created: not visible yet, but fenceable.
    initializing: BTreeMap<Gid, WritePath>,
    tombstones: Tombstones,
    /// The node may not write any more. Terminal.
    fenced: bool,
}

#[derive(Default)]
struct Shard {
    pending: Mutex<Pending>,
    wake: Notify,
}

/// Closes every write path of the node. Cheap to clone; works while the orchestrator is busy.
#[derive(Clone)]
pub struct FenceHandle(Arc<Mutex<Registry>>);

impl std::fmt::Debug for FenceHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FenceHandle(fenced: {})", self.0.lock().fenced)
    }
}

impl FenceHandle {
    /// The node lost the right to write: no downstream write starts after this returns, and none is allowed
    /// again in this process. Waits for nobody.
    pub fn local_fence(&self) {
        let mut registry = self.0.lock();
        registry.fenced = true;
        registry.initializing.values().for_each(WritePath::fence);
        registry.managers.values().for_each(ManagerHandle::local_fence);
    }
}

/// The endpoint of a node for bootstrap, post-bootstrap and close.
pub struct Orchestrator {
    center: MessageCenter,
    context: ManagerContext,
    inbox: Inbox<OrchestratorTopic>,
    collector: HeartbeatCollector,
    registry: Arc<Mutex<Registry>>,
    shards: Arc<[Shard; SHARDS]>,
}

impl std::fmt::Debug for Orchestrator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Orchestrator").field("managers", &self.registry.lock().managers.len()).finish_non_exhaustive()
    }
}

impl Orchestrator {
    /// An orchestrator without managers, registered at the node's message center.
    #[must_use]
    pub fn new(context: ManagerContext) -> Self {
        let center = context.center.clone();
        Self {
            inbox: center.register::<OrchestratorTopic>(INBOX),
            collector: HeartbeatCollector::new(&center, context.routes.clone()),
            center,
            context,
            registry: Arc::default(),
            shards: Arc::default(),
        }
    }

    /// Fences the node's managers from outside.
    #[must_use]
    pub fn fence_handle(&self) -> FenceHandle {
        FenceHandle(Arc::clone(&self.registry))
    }

    /// Serves maintainers until `shutdown`, then closes every manager in an orderly way.
    pub async fn run(self, shutdown: CancellationToken) {
        let Self { center, context, mut inbox, collector, registry, shards } = self;
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        tasks.spawn(collector.run(stop.clone()));
        for index in 0..SHARDS {
            let worker = Worker {
                center: center.clone(),
                context: context.clone(),
                registry: Arc::clone(&registry),
                shards: Arc::clone(&shards),
                index,
            };
            tasks.spawn(worker.run(shutdown.clone()));
        }
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                inbound = inbox.recv() => match inbound {
                    Some(inbound) => accept(&registry, &shards, inbound.from, inbound.message),
                    None => break,
                },
            }
        }
        drop(inbox);
        let managers: Vec<ManagerHandle> = registry.lock().managers.values().cloned().collect();
        let closing = managers.iter().map(ManagerHandle::shut_down);
        futures_util::future::join_all(closing).await;
        stop.cancel();
        while let Some(ended) = tasks.join_next().await {
            if let Err(error) = ended {
                tracing::error!(%error, "a task of the orchestrator ended abnormally");
            }
        }
    }
}

fn shard_of(gid: Gid) -> usize {
    usize::try_from((gid.low ^ (gid.high << 1)) % SHARDS as u64).unwrap_or(0)
}

fn accept(registry: &Mutex<Registry>, shards: &[Shard; SHARDS], from: NodeId, message: ToOrchestrator) {
    if registry.lock().fenced {
        return;
    }
    let gid = match &message {
        ToOrchestrator::Bootstrap(request) => request.changefeed.gid,
        ToOrchestrator::PostBootstrap(request) => request.changefeed.gid,
        ToOrchestrator::Close(request) => request.changefeed.gid,
    };
    let shard = &shards[shard_of(gid)];
    if shard.pending.lock().push(from, message) {
        shard.wake.notify_one();
    }
}

/// One shard's worker.
struct Worker {
    center: MessageCenter,
    context: ManagerContext,
    registry: Arc<Mutex<Registry>>,
    shards: Arc<[Shard; SHARDS]>,
    index: usize,
}

impl Worker {
    async fn run(self, shutdown: CancellationToken) {
        let shard = &self.shards[self.index];
        loop {
            let next = shard.pending.lock().pop();
            let Some((from, request)) = next else {
                tokio::select! {
                    () = shutdown.cancelled() => return,
                    () = shard.wake.notified() => continue,
                }
            };
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                () = self.handle(from, request) => {}
            }
        }
    }

    async fn handle(&self, from: NodeId, request: ToOrchestrator) {
        if self.registry.lock().fenced {
            return;
        }
        match request {
            ToOrchestrator::Bootstrap(request) => self.bootstrap(from, request).await,
            ToOrchestrator::PostBootstrap(request) => self.post_bootstrap(from, request).await,
            ToOrchestrator::Close(request) => self.close(from, request).await,
        }
    }

    fn tell(&self, to: &NodeId, message: ToMaintainerManager) {
        if self.registry.lock().fenced {
            return;
        }
        if let Err(error) = self.center.send::<MaintainerManagerTopic>(to, message) {
            tracing::debug!(%to, %error, "the maintainer was not answered");
        }
    }

    /// The manager of a changefeed; one that has ended makes room.
    fn find(&self, gid: Gid) -> Option<ManagerHandle> {
        let mut registry = self.registry.lock();
        let manager = registry.managers.get(&gid)?.clone();
        if manager.is_closed() {
            registry.managers.remove(&gid);
            return None;
        }
        Some(manager)
    }

    async fn bootstrap(&self, from: NodeId, request: MaintainerBootstrapRequest) {
        // A manager that ended between the look and the question is replaced by a new one.
        if let Some(manager) = self.find(request.changefeed.gid)
            && !self.bootstrap_at(&manager, &from, &request, false).await
        {
            return;
        }
        if !self.registry.lock().tombstones.admit(request.changefeed.gid, request.epoch) {
            tracing::debug!(changefeedID = %request.changefeed, %from, epoch = ?request.epoch, "late bootstrap of a closed owner");
            return;
        }
        match self.create(&from, &request).await {
            Ok(manager) => {
                self.bootstrap_at(&manager, &from, &request, true).await;
            }
            Err(Error::WritePathClosed) => {}
            Err(error) => {
                let fault = error.fault();
                tracing::warn!(changefeedID = %request.changefeed, errorCode = fault.code, error = fault.message, "cannot create a dispatcher manager");
                let answer = failed_bootstrap(&request.changefeed, request.epoch, self.center.node(), &fault);
                self.tell(&from, ToMaintainerManager::BootstrapResponse(answer));
            }
        }
    }

    /// Passes a bootstrap on and answers; says whether the manager turned out to have ended.
    async fn bootstrap_at(
        &self,
        manager: &ManagerHandle,
        from: &NodeId,
        request: &MaintainerBootstrapRequest,
        created: bool,
    ) -> bool {
        match manager.bootstrap(from.clone(), request.clone(), created).await {
            Bootstrapped::Answer(response) | Bootstrapped::Failed(response) => {
                self.tell(from, ToMaintainerManager::BootstrapResponse(response));
                false
            }
            Bootstrapped::Silent => false,
            Bootstrapped::Closed => {
                self.registry.lock().managers.remove(&request.changefeed.gid);
                true
            }
        }
    }

    async fn create(&self, from: &NodeId, request: &MaintainerBootstrapRequest) -> Result<ManagerHandle, Error> {
        let gid = request.changefeed.gid;
        let mut config = DispatcherManagerConfig::from_bytes(&request.config).map_err(Error::Config)?;
        config.changefeed = request.changefeed.clone();
        let write_path = WritePath::default();
        {
            let mut registry = self.registry.lock();
            if registry.fenced {
                return Err(Error::WritePathClosed);
            }
            registry.initializing.insert(gid, write_path.clone());
        }
        tracing::info!(changefeedID = %request.changefeed, epoch = ?request.epoch, "dispatcher manager starts");
        let created =
            ManagerHandle::create(self.context.clone(), write_path, config, from, request).await;
        let mut registry = self.registry.lock();
        registry.initializing.remove(&gid);
        let manager = created?;
        if registry.fenced {
            manager.local_fence();
            return Err(Error::WritePathClosed);
        }
        registry.tombstones.clear(gid);
        registry.managers.insert(gid, manager.clone());
        Ok(manager)
    }

    async fn post_bootstrap(&self, from: NodeId, request: MaintainerPostBootstrapRequest) {
        let Some(manager) = self.find(request.changefeed.gid) else {
            tracing::debug!(changefeedID = %request.changefeed, %from, "post-bootstrap without a dispatcher manager");
            return;
        };
        if let Some(response) = manager.post_bootstrap(from.clone(), request).await {
            self.tell(&from, ToMaintainerManager::PostBootstrapResponse(response));
        }
    }

    async fn close(&self, from: NodeId, request: MaintainerCloseRequest) {
        let MaintainerCloseRequest { changefeed, removed, epoch } = request;
        let closed = match self.find(changefeed.gid) {
            None => Closed::Done,
            Some(manager) => manager.close(from.clone(), epoch, removed).await,
        };
        if closed == Closed::Done {
            let mut registry = self.registry.lock();
            registry.managers.remove(&changefeed.gid);
            registry.tombstones.record(changefeed.gid, epoch, removed, Instant::now());
        }
        // Somebody else's manager is not closed, but the asker is to stop asking.
        let success = closed != Closed::NotYet;
        let response = MaintainerCloseResponse { changefeed, success, epoch };
        if let Err(error) = self.center.send::<MaintainerTopic>(&from, ToMaintainer::CloseResponse(response)) {
            tracing::debug!(to = %from, %error, "the maintainer was not answered");
        }
    }
}
