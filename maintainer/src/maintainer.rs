//! The task around one maintainer's core.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use heartbeatpb::config::ChangefeedInfo;
use heartbeatpb::{
    ChangefeedId, CheckpointTsMessage, MaintainerCloseResponse, MaintainerEpoch, MaintainerStatus, NodeId,
    RunningError, Ts, WallTime,
};
use messaging::{
    HeartbeatCollectorTopic, MessageCenter, OrchestratorTopic, ToHeartbeatCollector, ToMaintainerManager,
};
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc};

use crate::core::{Core, Effect};
use crate::metrics::MaintainerMetrics;
use crate::upstream::{SourceTable, Upstream};

/// Messages that wait for one maintainer; senders repeat what is dropped.
const MAILBOX: usize = 16_384;
/// How often time passes for a core (spec/maintainer.md §4).
const TICK: Duration = Duration::from_millis(100);
/// How often gauges are set.
const METRICS_INTERVAL: Duration = Duration::from_secs(1);

/// What a maintainer hears.
pub(crate) enum Event {
    /// From dispatcher managers, or the coordinator's checkpoint.
    Message(NodeId, Box<ToMaintainerManager>),
    /// A dispatcher manager closed, or is closing.
    Closed(NodeId, MaintainerCloseResponse),
    /// The set of live nodes.
    Nodes(BTreeSet<NodeId>),
    /// Leave: with `cascade` close the dispatcher managers, with `removed` for good.
    Remove { cascade: bool, removed: bool },
}

/// What others see of a maintainer.
pub(crate) struct Shared {
    status: Mutex<MaintainerStatus>,
    dirty: AtomicBool,
    /// Tells the manager that a status is worth sending.
    prompt: Arc<Notify>,
}

impl Shared {
    pub(crate) fn status(&self) -> MaintainerStatus {
        self.status.lock().clone()
    }

    /// Whether the status changed since the last call.
    pub(crate) fn take_dirty(&self) -> bool {
        self.dirty.swap(false, Ordering::AcqRel)
    }
}

/// The manager's end of a maintainer. Dropping it ends the task at its next event.
pub(crate) struct Handle {
    pub(crate) id: ChangefeedId,
    pub(crate) epoch: Option<MaintainerEpoch>,
    pub(crate) shared: Arc<Shared>,
    events: mpsc::Sender<Event>,
}

impl Handle {
    /// Queues an event; one that does not fit is lost like any message.
    pub(crate) fn tell(&self, event: Event) {
        if self.events.try_send(event).is_err() {
            tracing::debug!(changefeedID = %self.id, "maintainer mailbox is full or closed");
        }
    }
}

pub(crate) struct Maintainer {
    center: MessageCenter,
    upstream: Arc<dyn Upstream>,
    info: Option<ChangefeedInfo>,
    id: ChangefeedId,
    epoch: Option<MaintainerEpoch>,
    start: Ts,
    core: Core,
    shared: Arc<Shared>,
    events: mpsc::Receiver<Event>,
    metrics: MaintainerMetrics,
}

impl Maintainer {
    /// A maintainer and its handle. Without `start` it only removes: it closes dispatcher managers and ends.
    pub(crate) fn new(
        center: MessageCenter,
        upstream: Arc<dyn Upstream>,
        info: ChangefeedInfo,
        epoch: Option<MaintainerEpoch>,
        start: Option<(Ts, bool)>,
        prompt: Arc<Notify>,
    ) -> (Self, Handle) {
        let (sender, events) = mpsc::channel(MAILBOX);
        let id = info.id.clone();
        // A removal-only maintainer reports 1: a checkpoint that passes nothing (spec/maintainer.md §4).
        let (checkpoint, is_new) = start.unwrap_or((Ts(1), false));
        let core = Core::new(center.node().clone(), &info, epoch, checkpoint, is_new);
        let shared =
            Arc::new(Shared { status: Mutex::new(core.status()), dirty: AtomicBool::new(true), prompt });
        let handle = Handle { id: id.clone(), epoch, shared: Arc::clone(&shared), events: sender };
        let metrics = MaintainerMetrics::new(&id);
        let info = start.is_some().then_some(info);
        (Self { center, upstream, info, id, epoch, start: checkpoint, core, shared, events, metrics }, handle)
    }

    /// Runs until the changefeed has left and the manager has let go.
    pub(crate) async fn run(mut self) {
        let (loaded_sender, mut loaded) = mpsc::channel(1);
        let mut loading = self.info.take().map(|info| {
            let upstream = Arc::clone(&self.upstream);
            let (epoch, start) = (self.epoch, self.start);
            tokio::spawn(async move {
                let tables = upstream.start(&info, epoch, start).await;
                let _ = loaded_sender.send(tables).await;
            })
        });
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut measured = Instant::now();
        loop {
            let mut out = Vec::new();
            tokio::select! {
                biased;
                now = tick.tick() => {
                    let now = now.into_std();
                    if let Some(error) = self.upstream.error(&self.id, self.epoch) {
                        self.core.on_local_error(error, &mut out);
                    }
                    self.core.on_tick(now, &mut out);
                    if now.duration_since(measured) >= METRICS_INTERVAL {
                        measured = now;
                        self.measure();
                    }
                }
                Some(tables) = loaded.recv() => self.on_loaded(tables, &mut out),
                event = self.events.recv() => match event {
                    Some(event) => {
                        self.on_event(event, &mut out);
                        while let Ok(event) = self.events.try_recv() {
                            self.on_event(event, &mut out);
                        }
                    }
                    None => break,
                },
            }
            self.perform(out, &mut loading).await;
        }
        if let Some(loading) = loading {
            loading.abort();
        }
        if !self.core.is_stopped() {
            // The manager dropped it: the process stops. The reader must not outlive its maintainer.
            self.upstream.stop(&self.id, self.epoch).await;
        }
    }

    fn on_loaded(&mut self, tables: Result<Vec<SourceTable>, RunningError>, out: &mut Vec<Effect>) {
        match tables {
            Ok(tables) => {
                tracing::info!(changefeedID = %self.id, epoch = ?self.epoch, tables = tables.len(), "log reader started");
                self.core.on_tables(tables, Instant::now(), out);
            }
            Err(error) => {
                tracing::warn!(changefeedID = %self.id, errorCode = error.code, error = error.message, "cannot start the log reader");
                self.core.on_local_error(error, out);
            }
        }
    }

    fn on_event(&mut self, event: Event, out: &mut Vec<Effect>) {
        let now = Instant::now();
        match event {
            Event::Nodes(nodes) => self.core.on_nodes(nodes, now, out),
            Event::Remove { cascade, removed } => {
                if !self.core.is_closing() {
                    tracing::info!(changefeedID = %self.id, epoch = ?self.epoch, cascade, removed, "maintainer is leaving");
                }
                self.core.on_remove(cascade, removed, now, out);
            }
            Event::Closed(from, response) => self.core.on_close(&from, &response, out),
            Event::Message(from, message) => self.on_message(&from, *message, now, out),
        }
    }

    fn on_message(
        &mut self,
        from: &NodeId,
        message: ToMaintainerManager,
        now: Instant,
        out: &mut Vec<Effect>,
    ) {
        match message {
            ToMaintainerManager::HeartBeat(request) => self.core.on_heartbeat(from, request, out),
            ToMaintainerManager::BlockStatus(request) => self.core.on_block_status(from, request, now, out),
            ToMaintainerManager::BootstrapResponse(response) => {
                self.core.on_bootstrap(from, response, now, out)
            }
            ToMaintainerManager::PostBootstrapResponse(response) => {
                self.core.on_post_bootstrap(from, response, out);
            }
            ToMaintainerManager::CheckpointTs(message) => self.on_persisted(message),
            ToMaintainerManager::CoordinatorBootstrap(_)
            | ToMaintainerManager::AddMaintainer(_)
            | ToMaintainerManager::RemoveMaintainer(_)
            | ToMaintainerManager::SetNodeLiveness(_)
            | ToMaintainerManager::SetDrainTarget(_) => {}
        }
    }

    /// Persisted: the upstream may forget, and the sink may publish it.
    fn on_persisted(&self, message: CheckpointTsMessage) {
        if self.core.is_closing() || message.checkpoint > self.core.checkpoint() {
            return;
        }
        self.upstream.confirm(&self.id, self.epoch, message.checkpoint);
        let own = self.center.node();
        let _ = self.center.send::<HeartbeatCollectorTopic>(own, ToHeartbeatCollector::CheckpointTs(message));
    }

    async fn perform(&mut self, effects: Vec<Effect>, loading: &mut Option<tokio::task::JoinHandle<()>>) {
        let mut changed = false;
        for effect in effects {
            match effect {
                Effect::Orchestrate(node, message) => {
                    if let Err(error) = self.center.send::<OrchestratorTopic>(&node, message) {
                        tracing::debug!(changefeedID = %self.id, to = %node, %error, "request was not sent");
                    }
                }
                Effect::Dispatch(node, message) => {
                    if let Err(error) = self.center.send::<HeartbeatCollectorTopic>(&node, message) {
                        tracing::debug!(changefeedID = %self.id, to = %node, %error, "request was not sent");
                    }
                }
                Effect::Changed => changed = true,
                Effect::Closed => {
                    if let Some(loading) = loading.take() {
                        loading.abort();
                    }
                    self.upstream.stop(&self.id, self.epoch).await;
                    tracing::info!(changefeedID = %self.id, epoch = ?self.epoch, "maintainer has left");
                }
            }
        }
        if changed {
            *self.shared.status.lock() = self.core.status();
            self.shared.dirty.store(true, Ordering::Release);
            self.shared.prompt.notify_one();
        }
    }

    fn measure(&self) {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let now = WallTime(i64::try_from(since.as_micros()).unwrap_or(i64::MAX));
        let lag = |ts| self.upstream.lag_seconds(&self.id, ts);
        self.metrics.set(now, lag(self.core.checkpoint()), lag(self.core.resolved()));
        let [(_, absent), (_, scheduling), (_, replicating)] = self.core.span_counts();
        tracing::debug!(changefeedID = %self.id, absent, scheduling, replicating, "spans");
    }
}
