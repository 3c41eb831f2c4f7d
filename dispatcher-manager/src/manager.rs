//! A dispatcher manager as the rest of the node sees it: how one is created, asked, fenced and closed.
//!
//! One task per manager owns a core and performs its actions; it is the only one that touches the dispatchers of
//! the changefeed on this node. Slow calls of the sink run beside it and report back.

mod perform;
mod supervise;
mod task;

use std::sync::Arc;

use heartbeatpb::config::DispatcherManagerConfig;
use heartbeatpb::{
    ChangefeedId, DispatcherId, MaintainerBootstrapRequest, MaintainerBootstrapResponse, MaintainerEpoch,
    MaintainerPostBootstrapRequest, MaintainerPostBootstrapResponse, NodeId, Owner, Ts, WallTime, Watermark,
};
use messaging::{MessageCenter, ToHeartbeatCollector};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::collector::Routes;
use crate::core::{Core, CoreOptions};
use crate::metrics::ManagerMetrics;
use crate::sinks::SinkFactory;
use crate::source::EventSource;
use crate::{Error, Fault};
use task::Task;

/// Messages that wait for a manager: a burst of schedule requests, which the maintainer throttles per node.
const COMMANDS: usize = 16_384;

/// What a node lends to its dispatcher managers. Cheap to clone.
#[derive(Clone)]
pub struct ManagerContext {
    /// The node's end of the message bus.
    pub center: MessageCenter,
    /// Where events come from.
    pub source: Arc<dyn EventSource>,
    /// Where sinks come from.
    pub sinks: Arc<dyn SinkFactory>,
    /// Where managers register for barrier replies and schedule requests.
    pub routes: Routes,
}

impl std::fmt::Debug for ManagerContext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ManagerContext").field("center", &self.center).finish_non_exhaustive()
    }
}

/// The write path of one manager: open until it is closed for good. It exists before the manager does, so that a
/// manager that is still being created can be fenced too.
#[derive(Clone, Debug, Default)]
pub struct WritePath {
    closed: CancellationToken,
}

impl WritePath {
    /// Closes it at once and without waiting: no downstream write starts after this returns.
    pub fn fence(&self) {
        self.closed.cancel();
    }

    /// Whether it is closed.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.closed.is_cancelled()
    }

    pub(crate) async fn closed(&self) {
        self.closed.cancelled().await;
    }
}

/// How a bootstrap ended.
#[derive(Debug)]
pub enum Bootstrapped {
    /// Send this to the maintainer.
    Answer(MaintainerBootstrapResponse),
    /// The manager cannot serve; send this to the maintainer. The owner may be the one before.
    Failed(MaintainerBootstrapResponse),
    /// Say nothing: the request is stale, or the manager is closing.
    Silent,
    /// The manager is closed: another one may take its place.
    Closed,
}

/// How a close ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Closed {
    /// The asker does not own the manager; nothing happens.
    NotAllowed,
    /// Closing in the background; ask again.
    NotYet,
    /// Closed.
    Done,
}

/// What a manager is doing, for people.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ManagerView {
    /// Who commands it.
    pub owner: Owner,
    /// Number of dispatchers, the table trigger included.
    pub dispatchers: usize,
    /// Newest aggregated progress.
    pub watermark: Watermark,
    /// The dispatcher that holds the checkpoint, its checkpoint, and what it waits for.
    pub slowest: Option<(DispatcherId, Ts, String)>,
    /// The error that is being reported.
    pub error: Option<Fault>,
}

/// What a manager's task is asked.
#[derive(Debug)]
pub(crate) enum Command {
    Message(NodeId, ToHeartbeatCollector),
    Bootstrap {
        from: NodeId,
        request: MaintainerBootstrapRequest,
        created: bool,
        reply: oneshot::Sender<Bootstrapped>,
    },
    PostBootstrap {
        from: NodeId,
        request: MaintainerPostBootstrapRequest,
        reply: oneshot::Sender<Option<MaintainerPostBootstrapResponse>>,
    },
    Close {
        from: NodeId,
        epoch: Option<MaintainerEpoch>,
        removed: bool,
        reply: oneshot::Sender<Closed>,
    },
    ShutDown,
    Inspect(oneshot::Sender<ManagerView>),
}

/// A handle of one dispatcher manager. Cheap to clone; the manager's task ends after it was closed and the last
/// handle is gone.
#[derive(Clone, Debug)]
pub struct ManagerHandle {
    id: ChangefeedId,
    commands: mpsc::Sender<Command>,
    write_path: WritePath,
    closed: watch::Receiver<bool>,
}

impl ManagerHandle {
    /// Creates a manager without dispatchers: opens its sink and its queue of events, and starts its task.
    /// Its owner is the sender of the request that creates it.
    ///
    /// # Errors
    /// [`Error::WritePathClosed`] when `write_path` is closed before the manager exists, else as the sink says.
    /// Nothing of the manager is left then.
    pub async fn create(
        context: ManagerContext,
        write_path: WritePath,
        config: DispatcherManagerConfig,
        from: &NodeId,
        request: &MaintainerBootstrapRequest,
    ) -> Result<Self, Error> {
        let sink = tokio::select! {
            biased;
            () = write_path.closed() => return Err(Error::WritePathClosed),
            sink = context.sinks.create(&config) => sink.map_err(Error::Sink)?,
        };
        if write_path.is_closed() {
            return Err(Error::WritePathClosed);
        }
        let id = request.changefeed.clone();
        let options = CoreOptions::of(&config.config, sink.wants_checkpoints());
        let owner = Owner { node: from.clone(), epoch: request.epoch };
        let (owners, owner_seen) = watch::channel(owner.clone());
        let core = Core::new(id.clone(), owner, request.start_ts, options);
        let (sender, commands) = mpsc::channel(COMMANDS);
        let (closed_sender, closed) = watch::channel(false);
        let deliveries = context.source.open(&id, window(&config));
        context.routes.register(&id, sender.clone());
        let task = Task::new(
            context.clone(),
            id.clone(),
            core,
            sink,
            write_path.clone(),
            commands,
            sender.downgrade(),
            deliveries,
            owners,
            ManagerMetrics::new(&id),
        );
        tokio::spawn(supervise::run(task, context, write_path.clone(), owner_seen, closed_sender));
        Ok(Self { id, commands: sender, write_path, closed })
    }

    /// The changefeed.
    #[must_use]
    pub fn id(&self) -> &ChangefeedId {
        &self.id
    }

    /// A maintainer wants the manager; `created`: it was created for this request.
    pub async fn bootstrap(
        &self,
        from: NodeId,
        request: MaintainerBootstrapRequest,
        created: bool,
    ) -> Bootstrapped {
        let asked = self.ask(|reply| Command::Bootstrap { from, request, created, reply }).await;
        asked.unwrap_or(Bootstrapped::Closed)
    }

    /// The maintainer knows all tables. `None`: say nothing.
    pub async fn post_bootstrap(
        &self,
        from: NodeId,
        request: MaintainerPostBootstrapRequest,
    ) -> Option<MaintainerPostBootstrapResponse> {
        self.ask(|reply| Command::PostBootstrap { from, request, reply }).await.flatten()
    }

    /// The maintainer wants the manager closed; `removed`: the changefeed was deleted.
    pub async fn close(&self, from: NodeId, epoch: Option<MaintainerEpoch>, removed: bool) -> Closed {
        let asked = self.ask(|reply| Command::Close { from, epoch, removed, reply }).await;
        asked.unwrap_or(Closed::Done)
    }

    /// The node stops: close in an orderly way, whoever owns the manager.
    pub async fn shut_down(&self) {
        let _ = self.commands.send(Command::ShutDown).await;
        let mut closed = self.closed.clone();
        let _ = closed.wait_for(|closed| *closed).await;
    }

    /// The node may not write any more: stop at once, drain nothing. Does not wait.
    pub fn local_fence(&self) {
        self.write_path.fence();
    }

    /// Whether everything has ended.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        *self.closed.borrow() || self.commands.is_closed()
    }

    /// What the manager is doing; `None` after it ended.
    pub async fn inspect(&self) -> Option<ManagerView> {
        self.ask(Command::Inspect).await
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.ok()?;
        answer.await.ok()
    }
}

/// Of the memory quota, the part that rows on their way to the sink may take: `1 / WINDOW_SHARE`. A sink holds a row
/// several times over (as received, as text of a statement, as what waits for an answer), and a window of a
/// sixteenth of the default quota, 64 MiB, is already many batches deep.
const WINDOW_SHARE: u64 = 16;
/// A smaller window would not hold one batch of wide rows.
const MIN_WINDOW: u64 = 1 << 20;

/// Bytes of events that may be delivered and not yet flushed.
fn window(config: &DispatcherManagerConfig) -> usize {
    let quota = match config.config.memory_quota {
        0 => heartbeatpb::config::ReplicaConfig::DEFAULT_MEMORY_QUOTA,
        bytes => bytes,
    };
    usize::try_from((quota / WINDOW_SHARE).max(MIN_WINDOW)).unwrap_or(usize::MAX)
}

/// The answer to a bootstrap that failed.
#[must_use]
pub fn failed_bootstrap(
    changefeed: &ChangefeedId,
    epoch: Option<MaintainerEpoch>,
    node: &NodeId,
    fault: &Fault,
) -> MaintainerBootstrapResponse {
    MaintainerBootstrapResponse {
        changefeed: changefeed.clone(),
        spans: Vec::new(),
        error: Some(fault.running(node, WallTime::now())),
        checkpoint: Ts::ZERO,
        redo_checkpoint: Ts::ZERO,
        operators: Vec::new(),
        merges: Vec::new(),
        epoch,
    }
}
