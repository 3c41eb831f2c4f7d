//! The task around the core: it carries messages, writes and requests, and decides nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use heartbeatpb::config::{ChangefeedInfo, ChangefeedState};
use heartbeatpb::{ChangefeedId, NodeId, RunningError, Ts, WallTime};
use messaging::{
    CoordinatorTopic, Inbox, MaintainerManagerTopic, MessageCenter, ToCoordinator, ToMaintainerManager,
};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::backend::StoreError;
use crate::config::CoordinatorConfig;
use crate::core::{Action, ChangefeedView, Core, OpId, Reply, Write};
use crate::drain::DrainDoc;
use crate::error::Error;
use crate::handle::{CoordinatorHandle, Request, epoch_candidate};
use crate::meta::{CheckpointWrite, Meta, Stored};
use crate::metrics::{self, CoordinatorMetrics};
use crate::operations::OperationDoc;

/// Members of the cluster with their advertised addresses.
pub type Members = Arc<BTreeMap<NodeId, String>>;

/// Requests of people that wait for the task; each of them waits for its answer anyway.
const REQUEST_QUEUE: usize = 64;
/// Messages that wait for the task. Every sender repeats, so more would only be older.
const INBOX: usize = 1024;
/// Writes to the store at the same time.
const CONCURRENT_WRITES: usize = 16;
/// An event that takes longer is logged.
const SLOW_EVENT: std::time::Duration = std::time::Duration::from_secs(1);
/// Time for the last checkpoints to become durable when the coordinator stops in order.
const LAST_SAVE: std::time::Duration = std::time::Duration::from_secs(2);
/// Time for the maintainers of this node to say where they are before that: their manager answers at once.
const LAST_WORDS: std::time::Duration = std::time::Duration::from_millis(300);
/// Longest wait between two attempts to load the changefeeds.
const LONGEST_LOAD_RETRY: std::time::Duration = std::time::Duration::from_secs(10);

/// What releases the log that an upstream keeps for a changefeed.
#[async_trait]
pub trait RetentionHook: Send + Sync + 'static {
    /// Releases it; called again until it succeeds, also after a restart, so it is idempotent. The error is
    /// a sentence for people without secrets.
    async fn drop_retention(&self, info: &ChangefeedInfo) -> Result<(), String>;
}

/// When positions were committed upstream.
pub trait UpstreamClock: Send + Sync + 'static {
    /// The wall time of a position of a changefeed's upstream, if known.
    fn time_of(&self, changefeed: &ChangefeedId, ts: Ts) -> Option<WallTime>;
}

/// What a coordinator needs from its process.
#[derive(Clone)]
pub struct Neighbours {
    /// The bus.
    pub center: MessageCenter,
    /// Who is in the cluster.
    pub members: watch::Receiver<Members>,
    /// Releases retained logs.
    pub retention: Arc<dyn RetentionHook>,
    /// Times of positions.
    pub clock: Arc<dyn UpstreamClock>,
}

impl std::fmt::Debug for Neighbours {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Neighbours").field("node", self.center.node()).finish_non_exhaustive()
    }
}

/// Everything that is stored: changefeeds, the names of those that cannot be read, and drains.
type Loaded = (Vec<Stored>, Vec<String>, Option<DrainDoc>);

/// What a job of the task reports.
enum Done {
    Loaded(Result<Loaded, Error>),
    DrainWritten(Result<(), Error>),
    Written(ChangefeedId, Box<Result<Option<Stored>, Error>>),
    Saved(Result<Vec<CheckpointWrite>, Error>),
}

/// Somebody who waits for an answer.
struct Waiting {
    reply: oneshot::Sender<Result<Reply, Error>>,
    /// The operation that is carried out for her.
    mark: Option<Arc<OperationDoc>>,
}

/// An elected coordinator.
pub struct Coordinator {
    core: Core,
    meta: Arc<Meta>,
    neighbours: Neighbours,
    inbox: Inbox<CoordinatorTopic>,
    requests: mpsc::Receiver<Request>,
    resign: CancellationToken,
    jobs: JoinSet<Done>,
    writes: Arc<tokio::sync::Semaphore>,
    waiting: BTreeMap<OpId, Waiting>,
    next_op: u64,
    tick: std::time::Duration,
    metrics: CoordinatorMetrics,
}

impl std::fmt::Debug for Coordinator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Coordinator").field("meta", &self.meta).finish_non_exhaustive()
    }
}

impl Coordinator {
    /// A coordinator of the generation that `meta` writes in the name of, and its handle.
    #[must_use]
    pub fn new(neighbours: Neighbours, meta: Meta, config: CoordinatorConfig) -> (Self, CoordinatorHandle) {
        let meta = Arc::new(meta);
        let (sender, requests) = mpsc::channel(REQUEST_QUEUE);
        let resign = CancellationToken::new();
        let handle = CoordinatorHandle {
            requests: sender,
            meta: Arc::clone(&meta),
            resign: resign.clone(),
            mark: None,
        };
        let tick = config.tick;
        let coordinator = Self {
            core: Core::new(neighbours.center.node().clone(), meta.version(), config),
            inbox: neighbours.center.register::<CoordinatorTopic>(INBOX),
            meta,
            neighbours,
            requests,
            resign,
            jobs: JoinSet::new(),
            writes: Arc::new(tokio::sync::Semaphore::new(CONCURRENT_WRITES)),
            waiting: BTreeMap::new(),
            next_op: 0,
            tick,
            metrics: CoordinatorMetrics::default(),
        };
        (coordinator, handle)
    }

    /// Coordinates until `shutdown`, until somebody asks for another coordinator, or until another coordinator was elected or the store is lost.
    ///
    /// # Errors
    /// [`Error::NotOwner`] or [`Error::Store`].
    pub async fn run(mut self, shutdown: CancellationToken) -> Result<(), Error> {
        self.spawn_load();
        let mut members = self.neighbours.members.clone();
        members.mark_changed();
        let mut tick = tokio::time::interval(self.tick);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut publish = tokio::time::interval(metrics::PERIOD);
        publish.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        publish.tick().await;
        let mut open = true;
        let result = loop {
            let actions = tokio::select! {
                biased; // shutdown first; timers before queues, or a busy inbox starves repetition
                () = shutdown.cancelled() => break Ok(()),
                () = self.resign.cancelled() => break Ok(()),
                _ = tick.tick() => self.core.on_tick(now()),
                _ = publish.tick() => { self.publish(); continue; }
                changed = members.changed(), if open => {
                    // When nobody maintains the set any more it stays as it was.
                    open = changed.is_ok();
                    let alive: BTreeSet<NodeId> = members.borrow_and_update().keys().cloned().collect();
                    self.core.on_nodes(alive, now())
                }
                Some(done) = self.jobs.join_next() => match done {
                    Ok(done) => match self.on_done(done) {
                        Ok(actions) => actions,
                        Err(error) => break Err(error),
                    },
                    Err(error) => break Err(StoreError::Broken(format!("a write did not finish: {error}")).into()),
                },
                Some(request) = self.requests.recv() => {
                    self.next_op += 1;
                    let op = OpId(self.next_op);
                    self.waiting.insert(op, Waiting { reply: request.reply, mark: request.mark });
                    self.core.on_command(op, request.command, now())
                }
                inbound = self.inbox.recv() => match inbound {
                    Some(inbound) => self.core.on_message(&inbound.from, inbound.message, now()),
                    // Another coordinator of this process took the topic over.
                    None => break Err(Error::NotOwner),
                },
            };
            let started = now();
            for action in actions {
                self.perform(action);
            }
            if now().saturating_duration_since(started) > SLOW_EVENT {
                tracing::warn!(
                    seconds = now().saturating_duration_since(started).as_secs_f64(),
                    "a coordinator event took long"
                );
            }
        };
        if result.is_ok() {
            self.save_last().await;
        }
        result
    }

    /// What was reported before an orderly stop is not reported again to this process: store it now.
    async fn save_last(mut self) {
        if tokio::time::timeout(LAST_WORDS, self.hear_last()).await.is_err() {
            tracing::debug!("the maintainers of this node were not heard once more");
        }
        let now = self::now();
        // The writes under way first: the tick below leaves out checkpoints while others are being stored.
        let drain = async {
            while let Some(Ok(done)) = self.jobs.join_next().await {
                if let Done::Saved(Ok(durable)) = done {
                    self.core.on_checkpoints_saved(&durable, now);
                }
            }
            for action in self.core.on_tick(now) {
                if let Action::SaveCheckpoints(writes) = action
                    && let Err(error) = self.meta.update_checkpoints(&writes).await
                {
                    tracing::warn!(%error, "the last checkpoints could not be stored; replication will repeat a little");
                }
            }
        };
        if tokio::time::timeout(LAST_SAVE, drain).await.is_err() {
            tracing::warn!("storing the last checkpoints took too long; replication will repeat a little");
        }
    }

    /// Asks this node's maintainers where they are: they may end with this coordinator, and report once in a second. What
    /// follows from what is heard is left to the next coordinator.
    async fn hear_last(&mut self) {
        let me = self.neighbours.center.node().clone();
        let version = i64::try_from(self.meta.version()).unwrap_or(i64::MAX);
        let question = heartbeatpb::CoordinatorBootstrapRequest { version };
        let question = ToMaintainerManager::CoordinatorBootstrap(question);
        if self.neighbours.center.send::<MaintainerManagerTopic>(&me, question).is_err() {
            return;
        }
        while let Some(inbound) = self.inbox.recv().await {
            let answered =
                inbound.from == me && matches!(inbound.message, ToCoordinator::BootstrapResponse(_));
            self.core.on_message(&inbound.from, inbound.message, now());
            if answered {
                return;
            }
        }
    }

    fn on_done(&mut self, done: Done) -> Result<Vec<Action>, Error> {
        let now = self::now();
        match done {
            Done::Loaded(Ok((all, unreadable, drain))) => {
                if !unreadable.is_empty() {
                    tracing::error!(changefeeds = ?unreadable, "changefeeds with unreadable metadata are left out");
                }
                self.core.on_drain_loaded(drain);
                Ok(self.core.on_loaded(all, now))
            }
            Done::Loaded(Err(error)) => Err(error),
            Done::Written(id, result) => match *result {
                Err(error) if is_fatal(&error) => Err(error),
                result => {
                    if let Err(error) = &result {
                        tracing::warn!(changefeed = %id, %error, "a change of a changefeed was not stored");
                    }
                    Ok(self.core.on_written(&id, result, now))
                }
            },
            Done::DrainWritten(Err(error)) if is_fatal(&error) => Err(error),
            Done::DrainWritten(result) => {
                if let Err(error) = &result {
                    tracing::warn!(%error, "the state of drains was not stored; trying again");
                }
                Ok(self.core.on_drain_written(result, now))
            }
            Done::Saved(Err(error)) if is_fatal(&error) => Err(error),
            Done::Saved(Ok(durable)) => Ok(self.core.on_checkpoints_saved(&durable, now)),
            Done::Saved(Err(error)) => {
                tracing::warn!(%error, "checkpoints were not stored; trying again");
                Ok(self.core.on_checkpoints_saved(&[], now))
            }
        }
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::Send { to, message } => {
                if let Err(error) = self.neighbours.center.send::<MaintainerManagerTopic>(&to, message) {
                    // Everything is repeated until its effect is seen.
                    tracing::debug!(node = %to, %error, "a command was not sent");
                }
            }
            Action::Write { id, write } => self.spawn_write(id, write),
            Action::SaveCheckpoints(writes) => {
                let meta = Arc::clone(&self.meta);
                self.jobs.spawn(async move {
                    let started = now();
                    let result = meta.update_checkpoints(&writes).await;
                    metrics::count_store(
                        "checkpoints",
                        result.is_ok(),
                        now().saturating_duration_since(started),
                    );
                    Done::Saved(result)
                });
            }
            Action::WriteDrain(doc) => {
                let meta = Arc::clone(&self.meta);
                self.jobs.spawn(async move {
                    let started = now();
                    let result = meta.put_drain(&doc).await;
                    metrics::count_store("drain", result.is_ok(), now().saturating_duration_since(started));
                    Done::DrainWritten(result)
                });
            }
            Action::Reply { op, result } => {
                // A caller that went away does not want the answer.
                if let Some(waiting) = self.waiting.remove(&op) {
                    let _ = waiting.reply.send(result);
                }
            }
            Action::Count { kind, took } => self.metrics.operator(kind, took),
        }
    }

    /// Loads the changefeeds, however long the store needs to come back.
    fn spawn_load(&mut self) {
        let meta = Arc::clone(&self.meta);
        self.jobs.spawn(async move {
            let mut wait = std::time::Duration::from_millis(100);
            loop {
                let started = now();
                let result = load(&meta).await;
                metrics::count_store("load", result.is_ok(), now().saturating_duration_since(started));
                match result {
                    Err(error) if error.is_retryable() && !is_fatal(&error) => {
                        tracing::warn!(%error, "changefeeds cannot be loaded yet");
                        tokio::time::sleep(wait).await;
                        wait = (wait * 2).min(LONGEST_LOAD_RETRY);
                    }
                    done => return Done::Loaded(done),
                }
            }
        });
    }

    fn spawn_write(&mut self, id: ChangefeedId, write: Write) {
        let asker = self.core.asked_by(&id, &write).and_then(|op| self.waiting.get(&op));
        let meta = self.meta.marking(asker.and_then(|asker| asker.mark.clone()));
        let retention = Arc::clone(&self.neighbours.retention);
        let writes = Arc::clone(&self.writes);
        self.jobs.spawn(async move {
            // A release at an upstream may take long and must not keep others from the store.
            let _permit = match &write {
                Write::DropRetention { .. } => None,
                Write::Create { .. }
                | Write::BumpForAdd { .. }
                | Write::BumpForMove { .. }
                | Write::BumpForRestart { .. }
                | Write::State { .. }
                | Write::Pause { .. }
                | Write::Resume { .. }
                | Write::Update { .. }
                | Write::Removing { .. }
                | Write::StopDone { .. }
                | Write::Delete => writes.acquire_owned().await.ok(),
            };
            let started = now();
            let (op, result) = perform_write(&meta, retention.as_ref(), &id, write).await;
            metrics::count_store(op, result.is_ok(), now().saturating_duration_since(started));
            Done::Written(id, Box::new(result))
        });
    }

    fn publish(&mut self) {
        metrics::count_ownership(metrics::PERIOD.as_secs());
        self.metrics.set_counts(self.core.counts());
        self.metrics.set_drain(self.core.drain_view(now()).as_ref());
        let clock = &self.neighbours.clock;
        // Its maintainer tells; one that does not may be read here.
        let time = |view: &ChangefeedView| {
            view.saved_time.or_else(|| clock.time_of(&view.info.id, view.saved_checkpoint))
        };
        self.metrics.set_changefeeds(&self.core.views(None, now()), time, WallTime::now());
    }
}

/// After which the coordinator cannot go on.
fn is_fatal(error: &Error) -> bool {
    match error {
        Error::NotOwner => true,
        Error::Store(error) => !error.is_retryable(),
        Error::NotExists(_)
        | Error::NodeNotExists(_)
        | Error::Drain(_)
        | Error::AlreadyExists(_)
        | Error::CreationUnfinished(_)
        | Error::DeletionUnfinished(_)
        | Error::UpdateRefused { .. }
        | Error::InvalidName(_)
        | Error::InvalidClusterId(_)
        | Error::Config(_)
        | Error::NotInitialized
        | Error::Stopped
        | Error::EpochOverflow(_)
        | Error::Conflict(_)
        | Error::Retention(_) => false,
    }
}

async fn load(meta: &Meta) -> Result<Loaded, Error> {
    let drain = meta.get_drain().await?;
    let (all, unreadable) = meta.get_all().await?;
    Ok((all, unreadable, drain))
}

async fn perform_write(
    meta: &Meta,
    retention: &dyn RetentionHook,
    id: &ChangefeedId,
    write: Write,
) -> (&'static str, Result<Option<Stored>, Error>) {
    use heartbeatpb::config::{ChangefeedStatusDoc, Progress};
    match write {
        Write::Create { info } => {
            let status = ChangefeedStatusDoc::at(info.start_ts, info.epoch);
            let stored = Stored { info: *info, status };
            ("create", meta.create(&stored).await.map(|()| Some(stored)))
        }
        Write::BumpForAdd { .. } | Write::BumpForMove { .. } => {
            ("bump_epoch", meta.bump_epoch(id, epoch_candidate(), |_| Ok(())).await.map(Some))
        }
        Write::BumpForRestart { error } => {
            let warn = |stored: &mut Stored| {
                stored.info.state = ChangefeedState::Warning;
                stored.info.error = Some(error.clone());
                Ok(())
            };
            let written = meta.bump_epoch(id, epoch_candidate(), warn).await;
            let told = written.inspect(|_| tell_state(id, ChangefeedState::Warning, Some(&error)));
            ("bump_epoch", told.map(Some))
        }
        Write::State { state, error } => {
            let progress = if state.should_run() { Progress::None } else { Progress::Stopping };
            let written = meta.set_state(id, state, error.as_ref(), progress).await;
            ("set_state", written.inspect(|_| tell_state(id, state, error.as_ref())).map(Some))
        }
        Write::Pause { .. } => ("pause", meta.pause(id).await.map(Some)),
        Write::Resume { overwrite, known, .. } => {
            ("resume", meta.resume(id, epoch_candidate(), known, overwrite).await.map(Some))
        }
        Write::Update { info, .. } => ("update", meta.update(&info).await.map(Some)),
        Write::Removing { .. } => ("set_progress", meta.set_progress(id, Progress::Removing).await.map(Some)),
        Write::StopDone { last } => ("set_progress", stop_done(meta, id, last).await.map(Some)),
        Write::DropRetention { info } => {
            ("drop_retention", retention.drop_retention(&info).await.map(|()| None).map_err(Error::Retention))
        }
        Write::Delete => ("delete", meta.delete(id).await.map(|()| None)),
    }
}

/// For whoever reads later why a changefeed stood still.
fn tell_state(id: &ChangefeedId, state: ChangefeedState, error: Option<&RunningError>) {
    let state = state.name();
    match error {
        Some(RunningError { node, code, message, .. }) => {
            tracing::warn!(changefeed = %id, state, node, errorCode = code, error = message, "a changefeed has a new state");
        }
        None => tracing::info!(changefeed = %id, state, "a changefeed has a new state"),
    }
}

/// A maintainer has stopped: where it has left off first, then that it has.
async fn stop_done(meta: &Meta, id: &ChangefeedId, last: Option<CheckpointWrite>) -> Result<Stored, Error> {
    if let Some(last) = last {
        meta.update_checkpoints(&[last]).await?;
    }
    meta.set_progress(id, heartbeatpb::config::Progress::None).await
}

/// The clock of the runtime, which tests may hold.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
