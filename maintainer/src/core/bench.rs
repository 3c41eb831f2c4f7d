//! A bench rig: one maintainer's decisions without the task around them, for measuring.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use heartbeatpb::config::ChangefeedInfo;
use heartbeatpb::{DispatcherId, MaintainerEpoch, MaintainerStatus, NodeId, Ts};
use messaging::{ToHeartbeatCollector, ToMaintainerManager, ToOrchestrator};
use operator::Controller;
use replica::SpanSet;
use scheduler::{Basic, Scheduler};

use super::{Birth, Core, Effect};
use crate::checkpoint::Progress;
use crate::upstream::SourceTable;

/// What the maintainer of a [`Rig`] wants sent.
#[derive(Clone, PartialEq, Debug)]
pub enum Request {
    /// To a node's orchestrator.
    Orchestrate(NodeId, ToOrchestrator),
    /// To a node's dispatchers.
    Dispatch(NodeId, ToHeartbeatCollector),
}

/// One maintainer as its task drives it, event by event: what it hears goes straight into its core, and after each
/// event the checkpoint is folded, as its task does. Time passes only by [`Rig::pass`].
pub struct Rig {
    core: Core,
    now: Instant,
    out: Vec<Effect>,
}

impl std::fmt::Debug for Rig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rig").field("spans", &self.spans().len()).finish_non_exhaustive()
    }
}

impl Rig {
    /// A maintainer on `me` that is about to start at `checkpoint`, as one of a changefeed that ran before.
    #[must_use]
    pub fn new(
        me: NodeId,
        info: &ChangefeedInfo,
        epoch: Option<MaintainerEpoch>,
        checkpoint: Ts,
        ids: Box<dyn FnMut() -> DispatcherId + Send>,
    ) -> Self {
        let now = Instant::now();
        let birth = Birth {
            me,
            info,
            epoch,
            checkpoint,
            is_new: false,
            removal_only: false,
            fences: false,
            ids,
            now,
        };
        Self { core: Core::new(birth), now, out: Vec::new() }
    }

    /// Lets at most `batch` operators run at once; a new maintainer has the product's limit.
    pub fn limit_operators(&mut self, batch: usize) {
        let basic: Box<dyn Scheduler> = Box::new(Basic::new(batch, batch));
        if let Some((scheduler, _)) =
            self.core.schedule.schedulers.iter_mut().find(|(scheduler, _)| scheduler.name() == basic.name())
        {
            *scheduler = basic;
        }
    }

    /// The live nodes are `alive`.
    pub fn nodes(&mut self, alive: BTreeSet<NodeId>) {
        self.core.on_nodes(alive, self.now, &mut self.out);
        self.core.settle();
    }

    /// The log reader runs and delivers these tables.
    pub fn load(&mut self, tables: Vec<SourceTable>) {
        self.core.on_loaded(Ok(tables), self.now, &mut self.out);
        self.core.settle();
    }

    /// A node says something. Only what dispatcher managers say is heard: heartbeats, block statuses, and the
    /// answers to bootstraps.
    pub fn hear(&mut self, from: &NodeId, message: ToMaintainerManager) {
        let (now, out) = (self.now, &mut self.out);
        match message {
            ToMaintainerManager::HeartBeat(request) => self.core.on_heartbeat(from, request, now, out),
            ToMaintainerManager::BlockStatus(request) => self.core.on_block_status(from, &request, now, out),
            ToMaintainerManager::BootstrapResponse(response) => {
                self.core.on_bootstrap(from, response, now, out);
            }
            ToMaintainerManager::PostBootstrapResponse(response) => {
                self.core.on_post_bootstrap(from, response, out);
            }
            ToMaintainerManager::CoordinatorBootstrap(_)
            | ToMaintainerManager::AddMaintainer(_)
            | ToMaintainerManager::RemoveMaintainer(_)
            | ToMaintainerManager::SetNodeLiveness(_)
            | ToMaintainerManager::SetDrainTarget(_)
            | ToMaintainerManager::CheckpointTs(_) => {}
        }
        self.core.settle();
    }

    /// Time passes, and the maintainer looks at what is due.
    pub fn pass(&mut self, time: Duration) {
        self.now += time;
        self.core.on_tick(self.now, &mut self.out);
        self.core.settle();
    }

    /// What it wants sent since the last call, in order.
    pub fn take_requests(&mut self) -> Vec<Request> {
        let request = |effect| match effect {
            Effect::Orchestrate(node, message) => Some(Request::Orchestrate(node, message)),
            Effect::Dispatch(node, message) => Some(Request::Dispatch(node, message)),
            Effect::Load
            | Effect::Points { .. }
            | Effect::Answer(..)
            | Effect::Confirm(_)
            | Effect::Initialized
            | Effect::Leave
            | Effect::OperatorStarted(_)
            | Effect::OperatorFinished(..)
            | Effect::Fence { .. }
            | Effect::Stale(_) => None,
        };
        std::mem::take(&mut self.out).into_iter().filter_map(request).collect()
    }

    /// How far the changefeed is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        self.core.progress()
    }

    /// What the coordinator is told.
    #[must_use]
    pub fn status(&self) -> MaintainerStatus {
        self.core.status()
    }

    /// Its spans.
    #[must_use]
    pub fn spans(&self) -> &SpanSet {
        &self.core.placement.spans
    }

    /// Its operators.
    #[must_use]
    pub fn operators(&self) -> &Controller {
        &self.core.placement.operators
    }
}
