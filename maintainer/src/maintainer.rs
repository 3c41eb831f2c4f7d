//! The task around one maintainer's core.

mod asking;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use heartbeatpb::config::ChangefeedInfo;
use heartbeatpb::{
    ChangefeedId, CheckpointTsMessage, DispatcherId, MaintainerBootstrapResponse, MaintainerCloseResponse,
    MaintainerEpoch, MaintainerPostBootstrapResponse, MaintainerStatus, NodeId, Rule, RunningError, Ts,
    WallTime,
};
use messaging::{HeartbeatCollectorTopic, MessageCenter, OrchestratorTopic};
use replica::Standing;
use snapshot::{Publisher, Versioned, View};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::core::{Birth, Core, Effect};
use crate::drain::DrainTarget;
use crate::fence::{DownstreamFence, FenceOutcome};
use crate::mailbox::{Batch, Mailbox, keys};
use crate::metrics::{MaintainerMetrics, Population};
use crate::placements::{Reply, Wish};
use crate::upstream::{SourceTable, SplitPoints, Upstream};

/// How often time passes for a core (maintainer §4).
const TICK: Duration = Duration::from_millis(100);
/// How often gauges are set.
const METRICS_INTERVAL: Duration = Duration::from_secs(1);
/// How often it is looked what is least far, which visits spans.
const LOOK: Duration = Duration::from_secs(10);
/// A checkpoint that has stood still for so long is shown.
const STALLED: Duration = Duration::from_secs(10);
/// An event that takes longer is logged.
const SLOW_EVENT: Duration = Duration::from_secs(1);

/// What a maintainer hears beside heartbeats and block statuses, in the order in which it was said.
#[derive(Debug)]
pub(crate) enum Control {
    /// The set of live nodes.
    Nodes(BTreeSet<NodeId>),
    /// The node that is to be emptied may have changed.
    Drain,
    /// Leave.
    Remove { epoch: Option<MaintainerEpoch>, cascade: bool, removed: bool },
    /// A dispatcher manager says what it runs.
    Bootstrap(NodeId, Box<MaintainerBootstrapResponse>),
    /// The table trigger was started.
    PostBootstrap(NodeId, MaintainerPostBootstrapResponse),
    /// A dispatcher manager closed, or is closing.
    Closed(NodeId, MaintainerCloseResponse),
    /// A checkpoint was persisted.
    Persisted(CheckpointTsMessage),
    /// Somebody wishes for something.
    Wish(Wish, Reply),
}

/// A maintainer's status as others see it.
#[derive(Clone, Debug)]
pub(crate) struct Published {
    /// Counts publications.
    sequence: u64,
    /// Counts changes that are worth telling.
    pub(crate) changes: u64,
    pub(crate) status: MaintainerStatus,
}

#[cfg(test)]
impl Published {
    /// A status as if a maintainer had published it.
    pub(crate) fn of(changes: u64, status: MaintainerStatus) -> Self {
        Self { sequence: changes, changes, status }
    }
}

impl Versioned for Published {
    type Version = u64;

    fn version(&self) -> u64 {
        self.sequence
    }
}

/// The manager's end of a maintainer.
pub(crate) struct Handle {
    pub(crate) epoch: Option<MaintainerEpoch>,
    pub(crate) mailbox: Arc<Mailbox<Control>>,
    pub(crate) published: View<Published>,
    /// The version of the status that the coordinator was told.
    pub(crate) reported: Arc<AtomicU64>,
}

/// What a maintainer is started with.
pub(crate) struct Setup {
    pub(crate) center: MessageCenter,
    pub(crate) upstream: Arc<dyn Upstream>,
    pub(crate) fence: Arc<dyn DownstreamFence>,
    pub(crate) info: ChangefeedInfo,
    pub(crate) epoch: Option<MaintainerEpoch>,
    pub(crate) checkpoint: Ts,
    pub(crate) is_new: bool,
    /// It only closes dispatcher managers.
    pub(crate) removal_only: bool,
    pub(crate) drain: View<DrainTarget>,
    /// Rung when a status of a low-latency changefeed changed.
    pub(crate) prompt: Arc<Notify>,
}

pub(crate) struct Maintainer {
    center: MessageCenter,
    upstream: Arc<dyn Upstream>,
    fence: Arc<dyn DownstreamFence>,
    info: ChangefeedInfo,
    id: ChangefeedId,
    epoch: Option<MaintainerEpoch>,
    start: Ts,
    removal_only: bool,
    core: Core,
    mailbox: Arc<Mailbox<Control>>,
    publisher: Publisher<Published>,
    reported: Arc<AtomicU64>,
    drain: View<DrainTarget>,
    prompt: Arc<Notify>,
    metrics: MaintainerMetrics,
    born: Instant,
    /// Starting or stopping the log reader.
    reader: Option<JoinHandle<ReaderStep>>,
    /// A question to the upstream.
    points: Option<JoinHandle<Points>>,
    /// Its number, and when it was asked.
    question: (u64, Instant),
    /// When it was looked what is least far.
    looked: Instant,
    /// A fence under way.
    fencing: Option<JoinHandle<Fence>>,
    /// Its number.
    attempt: u64,
    /// Whether the checkpoint has moved since the take-over.
    moves: bool,
    /// Who waits for an answer.
    replies: BTreeMap<u64, Reply>,
    tickets: u64,
}

/// What the upstream said to a question.
type Points = Result<SplitPoints, String>;

/// What the downstream said to a fence.
type Fence = Result<FenceOutcome, RunningError>;

/// The end of something that the log reader was asked for.
enum ReaderStep {
    Loaded(Result<Vec<SourceTable>, RunningError>),
    Stopped,
}

impl Maintainer {
    /// A maintainer and its handle.
    pub(crate) fn new(setup: Setup) -> (Self, Handle) {
        let Setup {
            center,
            upstream,
            fence,
            info,
            epoch,
            checkpoint,
            is_new,
            removal_only,
            mut drain,
            prompt,
        } = setup;
        let born = now();
        let mut core = Core::new(Birth {
            me: center.node().clone(),
            info: &info,
            epoch,
            checkpoint,
            is_new,
            removal_only,
            fences: fence.applies_to(&info),
            ids: Box::new(DispatcherId::random),
            now: born,
        });
        core.on_drain(drain.load(), born);
        let publisher =
            Publisher::new(Published { sequence: 0, changes: core.version(), status: core.status() });
        let mailbox = Arc::default();
        let reported = Arc::default();
        let handle = Handle {
            epoch,
            mailbox: Arc::clone(&mailbox),
            published: publisher.view(),
            reported: Arc::clone(&reported),
        };
        let maintainer = Self {
            id: info.id.clone(),
            metrics: MaintainerMetrics::new(&info.id),
            center,
            upstream,
            fence,
            info,
            epoch,
            start: checkpoint,
            removal_only,
            core,
            mailbox,
            publisher,
            reported,
            drain,
            prompt,
            born,
            reader: None,
            points: None,
            question: (0, born),
            looked: born,
            fencing: None,
            attempt: 0,
            moves: false,
            replies: BTreeMap::new(),
            tickets: 0,
        };
        (maintainer, handle)
    }

    /// Runs until the changefeed has left, or `shutdown`. The log reader never outlives its maintainer.
    pub(crate) async fn run(mut self, shutdown: CancellationToken) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mailbox = Arc::clone(&self.mailbox);
        let mut measured = now();
        while !self.core.is_stopped() {
            let mut out = Vec::new();
            let started;
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                at = tick.tick() => {
                    started = now();
                    self.on_tick(at.into_std(), &mut out);
                    if started.duration_since(measured) >= METRICS_INTERVAL {
                        measured = started;
                        self.measure(started);
                    }
                }
                answer = finished(&mut self.points) => {
                    started = now();
                    self.points = None;
                    let answer = answer.unwrap_or_else(|| Err("asking ended abnormally".to_owned()));
                    self.metrics.split_checked(started.saturating_duration_since(self.question.1));
                    self.core.on_points(self.question.0, answer, started, &mut out);
                }
                fence = finished(&mut self.fencing) => {
                    started = now();
                    self.on_fence(fence, &mut out);
                }
                step = finished(&mut self.reader) => {
                    started = now();
                    self.on_reader(step, &mut out);
                }
                batch = mailbox.take() => {
                    started = now();
                    self.on_batch(batch, &mut out);
                }
            }
            self.core.on_reported(self.reported.load(Ordering::Acquire));
            if self.core.settle() {
                self.on_moved(started);
            }
            for effect in out {
                self.perform(effect);
            }
            self.publish();
            let took = now().saturating_duration_since(started);
            self.metrics.handled(took);
            if took > SLOW_EVENT {
                tracing::warn!(changefeedID = %self.id, took_ms = took.as_millis(), "a maintainer's event took long");
            }
        }
        if let Some(points) = self.points.take() {
            points.abort();
        }
        if let Some(fence) = self.fencing.take() {
            fence.abort();
        }
        if let Some(reader) = self.reader.take() {
            // Only a start can be under way here: what it started is stopped below.
            reader.abort();
        }
        if !self.core.is_stopped() {
            self.upstream.stop(&self.id, self.epoch).await;
        }
        let left = self.core.placement().operators.kinds().collect::<Vec<_>>();
        self.metrics.operators_gone(left);
        tracing::info!(changefeedID = %self.id, epoch = ?self.epoch, checkpointTs = %self.core.progress().checkpoint,
            "maintainer ended");
    }

    /// The checkpoint has moved.
    fn on_moved(&mut self, now: Instant) {
        let checkpoint = self.core.progress().checkpoint;
        self.upstream.raise_floor(&self.id, self.epoch, checkpoint);
        if !std::mem::replace(&mut self.moves, true) {
            tracing::info!(changefeedID = %self.id, epoch = ?self.epoch, checkpointTs = %checkpoint,
                took_ms = now.saturating_duration_since(self.born).as_millis(), "the checkpoint moves");
        }
    }

    fn on_tick(&mut self, now: Instant, out: &mut Vec<Effect>) {
        if let Some(error) = self.upstream.error(&self.id, self.epoch) {
            self.core.on_local_error(error, now);
        }
        self.core.on_reader_trouble(self.upstream.trouble(&self.id, self.epoch));
        self.core.on_tick(now, out);
        let (slow, overdue) = self.core.slow(now);
        if let Some(slow) = slow {
            tracing::warn!(changefeedID = %self.id, dispatcher = %slow.span, kind = slow.kind.name(),
                age_s = slow.age.as_secs(), operators = slow.operators, "an operator takes long");
        }
        if let Some(standstill) = self.core.stalled(now) {
            tracing::warn!(changefeedID = %self.id, checkpointTs = %standstill.checkpoint,
                seconds = standstill.lasts.as_secs(), kind = standstill.holder.kind(),
                held_by = %standstill.holder, "the checkpoint does not move");
        }
        for event in overdue {
            tracing::warn!(changefeedID = %self.id, commit_ts = %event.key.commit_ts,
                sync_point = event.key.is_sync_point, age_s = event.age.as_secs(), waits_for = event.waits_for,
                "dispatchers wait at an event");
        }
    }

    fn on_reader(&mut self, step: Option<ReaderStep>, out: &mut Vec<Effect>) {
        self.reader = None;
        match step {
            Some(ReaderStep::Loaded(tables)) => {
                match &tables {
                    Ok(tables) => {
                        tracing::info!(changefeedID = %self.id, epoch = ?self.epoch, tables = tables.len(), "log reader started");
                    }
                    Err(error) => {
                        tracing::warn!(changefeedID = %self.id, errorCode = error.code, error = error.message, "cannot start the log reader");
                    }
                }
                self.core.on_loaded(tables, now(), out);
            }
            Some(ReaderStep::Stopped) => self.core.on_left(),
            None => {
                let error = RunningError {
                    time: String::new(),
                    node: self.center.node().to_string(),
                    code: "CDC:ErrLogReaderFailed".to_owned(),
                    message: "starting the log reader ended abnormally".to_owned(),
                };
                self.core.on_loaded(Err(error), now(), out);
            }
        }
    }

    fn on_batch(&mut self, batch: Batch<Control>, out: &mut Vec<Effect>) {
        let now = self::now();
        for control in batch.control {
            self.on_control(control, now, out);
        }
        for (from, request) in batch.heartbeats {
            self.core.on_heartbeat(&from, request, now, out);
        }
        for (from, request) in batch.block_statuses {
            self.core.on_block_status(&from, &request, now, out);
            self.mailbox.release(keys(&from, &request));
        }
    }

    fn on_control(&mut self, control: Control, now: Instant, out: &mut Vec<Effect>) {
        match control {
            Control::Nodes(nodes) => self.core.on_nodes(nodes, now, out),
            Control::Drain => self.core.on_drain(self.drain.load(), now),
            Control::Remove { epoch, cascade, removed } => {
                self.core.on_remove(epoch, cascade, removed, now, out);
            }
            Control::Bootstrap(from, response) => self.core.on_bootstrap(&from, *response, now, out),
            Control::PostBootstrap(from, response) => self.core.on_post_bootstrap(&from, response, out),
            Control::Closed(from, response) => self.core.on_close(&from, &response, now, out),
            Control::Persisted(message) => self.core.on_persisted(message, out),
            Control::Wish(wish, reply) => {
                self.tickets += 1;
                self.replies.insert(self.tickets, reply);
                self.core.on_wish(self.tickets, wish, now, out);
            }
        }
    }

    fn perform(&mut self, effect: Effect) {
        let sent = match effect {
            Effect::Orchestrate(node, message) => {
                self.center.send::<OrchestratorTopic>(&node, message).map_err(|error| (node, error))
            }
            Effect::Dispatch(node, message) => {
                self.center.send::<HeartbeatCollectorTopic>(&node, message).map_err(|error| (node, error))
            }
            Effect::Points { question, span, pieces } => {
                self.ask_points(question, span, pieces);
                Ok(())
            }
            Effect::Answer(ticket, answer) => {
                if let Some(reply) = self.replies.remove(&ticket) {
                    // Whoever asked may have gone.
                    let _ = reply.send(answer);
                }
                Ok(())
            }
            Effect::Load => {
                let upstream = Arc::clone(&self.upstream);
                let (info, epoch, start) = (self.info.clone(), self.epoch, self.start);
                self.reader = Some(tokio::spawn(async move {
                    let loaded = upstream.start(&info, epoch, start).await;
                    if !Rule::FloorWaits.holds() {
                        upstream.raise_floor(&info.id, epoch, start);
                    }
                    ReaderStep::Loaded(loaded)
                }));
                Ok(())
            }
            Effect::Leave => {
                if let Some(starting) = self.reader.take() {
                    starting.abort();
                }
                let upstream = Arc::clone(&self.upstream);
                let (id, epoch, nothing) = (self.id.clone(), self.epoch, self.removal_only);
                self.reader = Some(tokio::spawn(async move {
                    if !nothing {
                        upstream.stop(&id, epoch).await;
                    }
                    ReaderStep::Stopped
                }));
                Ok(())
            }
            Effect::Confirm(persisted) => {
                self.upstream.confirm(&self.id, self.epoch, persisted);
                Ok(())
            }
            Effect::Initialized => {
                let took = now().saturating_duration_since(self.born);
                self.metrics.initialized(took);
                self.upstream.raise_floor(&self.id, self.epoch, self.core.progress().checkpoint);
                tracing::info!(changefeedID = %self.id, epoch = ?self.epoch, took_ms = took.as_millis(),
                    spans = self.core.placement().spans.len(), "maintainer initialised");
                Ok(())
            }
            Effect::OperatorStarted(kind) => {
                self.metrics.operator_started(kind);
                Ok(())
            }
            Effect::OperatorFinished(kind, age) => {
                self.metrics.operator_finished(kind, age);
                Ok(())
            }
            Effect::Fence { attempt, newest, whom } => {
                self.begin_fence(attempt, newest, whom);
                Ok(())
            }
            Effect::Stale(what) => {
                self.metrics.stale(what);
                Ok(())
            }
        };
        if let Err((to, error)) = sent {
            // Whatever matters is said again.
            tracing::debug!(changefeedID = %self.id, %to, %error, "a request was not sent");
        }
    }

    /// Shows the status to the manager.
    fn publish(&mut self) {
        let before = self.publisher.current();
        let changes = self.core.version();
        let mut status = self.core.status();
        if changes == before.changes && same(&status, &before.status) {
            return;
        }
        let now = rfc3339();
        let said = status.errors.iter_mut().chain(&mut status.trouble);
        for error in said.filter(|error| error.time.is_empty()) {
            error.time.clone_from(&now);
        }
        self.publisher.publish(Published { sequence: before.sequence + 1, changes, status });
        // Somebody else may begin as soon as it is known that this one has ended.
        if (self.core.is_low_latency() || self.core.is_stopped()) && changes > before.changes {
            self.prompt.notify_one();
        }
    }

    fn measure(&mut self, now: Instant) {
        let progress = self.core.progress();
        let lag = |ts| self.upstream.lag_seconds(&self.id, ts);
        self.core.on_lag(lag(progress.checkpoint));
        self.metrics.set_lag(WallTime::now(), lag(progress.checkpoint), lag(progress.resolved));
        if now.saturating_duration_since(self.looked) >= LOOK {
            self.looked = now;
            self.metrics.set_standstill(self.core.standstill(now).as_ref(), STALLED);
        }
        let (barriers, oldest) = self.core.barriers();
        let placement = self.core.placement();
        let spans = &placement.spans;
        let population = Population {
            spans: spans.len(),
            tables: spans.table_count(),
            absent: spans.count(Standing::Absent),
            scheduling: spans.count(Standing::Scheduling),
            replicating: spans.count(Standing::Replicating),
            barriers,
            barrier_oldest: oldest.map_or(Duration::ZERO, |at| now.saturating_duration_since(at)),
            waiting: self.mailbox.len(),
        };
        self.metrics.set_population(&population);
        let (dropped, suppressed) = self.mailbox.take_counts();
        tracing::debug!(changefeedID = %self.id, spans = population.spans, absent = population.absent,
            scheduling = population.scheduling, operators = placement.operators.len(), barriers, dropped, suppressed,
            waits_for = self.core.waits_for(), "maintainer");
    }
}

/// Waits for the end of something that was begun; forever when nothing is under way. `None`: it panicked.
async fn finished<T>(task: &mut Option<JoinHandle<T>>) -> Option<T> {
    match task {
        Some(task) => task.await.ok(),
        None => std::future::pending().await,
    }
}

/// Whether the coordinator would see no difference.
fn same(a: &MaintainerStatus, b: &MaintainerStatus) -> bool {
    a.checkpoint == b.checkpoint
        && a.last_synced == b.last_synced
        && a.drain == b.drain
        && a.errors.len() == b.errors.len()
}

/// The clock of the runtime, which tests may hold.
pub(crate) fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

pub(crate) fn rfc3339() -> String {
    let now = OffsetDateTime::from_unix_timestamp_nanos(i128::from(WallTime::now().0) * 1_000);
    now.ok().and_then(|now| now.format(&Rfc3339).ok()).unwrap_or_default()
}
