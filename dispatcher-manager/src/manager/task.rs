//! The task of a manager: everything that can wake it, in one loop.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use event::BlockEvent;
use heartbeatpb::{ChangefeedId, DispatcherId, MaintainerEpoch, NodeId, Owner, Ts, WallTime};
use logservice::{CheckpointSlot, Delivery, DispatcherEvent};
use messaging::ToHeartbeatCollector;
use sink::{Sink, TableStart};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::{JoinError, JoinHandle, JoinSet};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{Bootstrapped, Closed, Command, ManagerContext, ManagerView, WritePath, failed_bootstrap};
use crate::Fault;
use crate::arrival::Arrival;
use crate::core::{Action, BootstrapStep, CloseStep, Core, Life, PostBootstrapStep};
use crate::metrics::ManagerMetrics;
use crate::progress::Ticket;
use crate::table::Slot;

/// Events taken at once, so that timers and flushes get their turn in between.
const EVENTS_AT_ONCE: usize = 512;
/// Flushes taken at once.
const FLUSHES_AT_ONCE: usize = 4096;
/// Dispatchers and tables that the sink is asked to open at the same time; more would only queue there.
const OPENS_AT_ONCE: usize = 64;
/// How long a sink may take to end before it is abandoned.
const SINK_END: std::time::Duration = std::time::Duration::from_secs(30);

/// Result of a call of the sink.
pub(super) enum Done {
    DispatcherOpened { id: DispatcherId, asked: Ts, result: Result<TableStart, Fault> },
    TableOpened { slot: Slot, result: Result<(), Fault> },
    FlushFinished { slot: Slot, result: Result<(), Fault> },
    BlockWritten { slot: Slot, result: Result<(), Fault> },
    Forgotten { done: bool },
}

/// A bootstrap that waits for its table trigger.
pub(super) struct PendingBootstrap {
    pub(super) epoch: Option<MaintainerEpoch>,
    pub(super) reply: oneshot::Sender<Bootstrapped>,
}

/// A checkpoint that the collector reads, and what was last written there.
pub(super) struct Published {
    pub(super) slot: Arc<CheckpointSlot>,
    pub(super) last: Ts,
}

/// The owner of a core.
pub(super) struct Task {
    pub(super) context: ManagerContext,
    pub(super) id: ChangefeedId,
    pub(super) core: Core,
    pub(super) sink: Arc<dyn Sink>,
    pub(super) write_path: WritePath,
    commands: mpsc::Receiver<Command>,
    /// Our own entrance, to recognise our route.
    pub(super) entrance: mpsc::WeakSender<Command>,
    pub(super) deliveries: mpsc::Receiver<Delivery>,
    pub(super) flushed: mpsc::UnboundedSender<(Slot, Ticket)>,
    flushes: mpsc::UnboundedReceiver<(Slot, Ticket)>,
    pub(super) calls: JoinSet<Done>,
    pub(super) opens: Arc<Semaphore>,
    sink_run: Option<JoinHandle<Result<(), sink::Error>>>,
    /// Ends the sink when the task ends, however it does.
    sink_stop: DropGuard,
    sink_deadline: Option<Instant>,
    pub(super) checkpoints: Vec<Option<Published>>,
    pub(super) bootstrap: Option<PendingBootstrap>,
    pub(super) owners: watch::Sender<Owner>,
    pub(super) metrics: ManagerMetrics,
    /// The error as it was first reported.
    pub(super) reported: Option<heartbeatpb::RunningError>,
    actions: Vec<Action>,
    /// DDLs that dispatchers have not passed: their commit ts, and when they arrived.
    blocks: BTreeMap<DispatcherId, (Ts, Instant)>,
}

/// What woke the task.
enum Event {
    Fenced,
    Tick,
    Done(Result<Done, JoinError>),
    SinkEnded(Result<Result<(), sink::Error>, JoinError>),
    Flushes,
    Command(Option<Command>),
    Deliveries(usize),
    SinkOverdue,
}

impl Task {
    #[expect(clippy::too_many_arguments, reason = "the parts that a manager is assembled from, once")]
    pub(super) fn new(
        context: ManagerContext,
        id: ChangefeedId,
        core: Core,
        sink: Arc<dyn Sink>,
        write_path: WritePath,
        commands: mpsc::Receiver<Command>,
        entrance: mpsc::WeakSender<Command>,
        deliveries: mpsc::Receiver<Delivery>,
        owners: watch::Sender<Owner>,
        metrics: ManagerMetrics,
    ) -> Self {
        // Bounded by the credits that the batches hold.
        let (flushed, flushes) = mpsc::unbounded_channel();
        let stop = CancellationToken::new();
        let running = Arc::clone(&sink);
        let token = stop.clone();
        let sink_run = tokio::spawn(async move { running.run(token).await });
        Self {
            context,
            id,
            core,
            sink,
            write_path,
            commands,
            entrance,
            deliveries,
            flushed,
            flushes,
            calls: JoinSet::new(),
            opens: Arc::new(Semaphore::new(OPENS_AT_ONCE)),
            sink_run: Some(sink_run),
            sink_stop: stop.drop_guard(),
            sink_deadline: None,
            checkpoints: Vec::new(),
            bootstrap: None,
            owners,
            metrics,
            reported: None,
            actions: Vec::new(),
            blocks: BTreeMap::new(),
        }
    }

    /// Works until the manager is closed and nobody can ask anything any more. `closed` is told in between.
    pub(super) async fn run(mut self, closed: watch::Sender<bool>) {
        let mut orphaned = false;
        let mut fed = true;
        let mut flushes = Vec::with_capacity(FLUSHES_AT_ONCE);
        let mut deliveries = Vec::with_capacity(EVENTS_AT_ONCE);
        let timer = tokio::time::sleep_until(tokio::time::Instant::now());
        tokio::pin!(timer);
        loop {
            let open = self.core.life() == Life::Open;
            let wakeup = self.core.next_wakeup();
            if let Some(at) = wakeup
                && timer.deadline().into_std() != at
            {
                timer.as_mut().reset(at.into());
            }
            let overdue = self.sink_deadline.filter(|_| self.sink_run.is_some());
            let event = tokio::select! {
                biased;
                () = self.write_path.closed(), if open => Event::Fenced,
                () = &mut timer, if wakeup.is_some() => Event::Tick,
                Some(done) = self.calls.join_next(), if !self.calls.is_empty() => Event::Done(done),
                ended = ended(&mut self.sink_run), if self.sink_run.is_some() => Event::SinkEnded(ended),
                () = until(overdue), if overdue.is_some() => Event::SinkOverdue,
                _ = self.flushes.recv_many(&mut flushes, FLUSHES_AT_ONCE) => Event::Flushes,
                command = self.commands.recv(), if !orphaned => Event::Command(command),
                n = self.deliveries.recv_many(&mut deliveries, EVENTS_AT_ONCE), if open && fed => Event::Deliveries(n),
            };
            let now = now();
            match event {
                Event::Fenced => self.core.stop(),
                Event::Tick => self.on_tick(now),
                Event::Done(done) => self.on_done(done, now),
                Event::SinkEnded(ended) => self.on_sink_ended(ended, now),
                Event::SinkOverdue => self.abandon_sink(),
                Event::Flushes => {
                    for (slot, ticket) in flushes.drain(..) {
                        self.core.on_flushed(slot, ticket);
                    }
                }
                Event::Command(Some(command)) => self.on_command(command, now),
                Event::Command(None) => {
                    // Nobody can ask any more: end what runs, then end.
                    orphaned = true;
                    self.core.stop();
                }
                Event::Deliveries(0) => {
                    fed = false;
                    self.core.on_error(log_gone(), now);
                }
                Event::Deliveries(_) => self.on_deliveries(&mut deliveries, now),
            }
            self.perform_all(now).await;
            if self.core.life() == Life::Closing && self.calls.is_empty() && self.sink_run.is_none() {
                self.finish(&closed);
                self.perform_all(now).await;
            }
            if orphaned && self.core.life() == Life::Closed && self.calls.is_empty() {
                return;
            }
        }
    }

    /// Performs what the core wants until it wants nothing more.
    async fn perform_all(&mut self, now: Instant) {
        let mut actions = std::mem::take(&mut self.actions);
        loop {
            self.core.take_actions(&mut actions);
            if actions.is_empty() {
                break;
            }
            for (n, action) in actions.drain(..).enumerate() {
                self.perform(action, now);
                if n % EVENTS_AT_ONCE == EVENTS_AT_ONCE - 1 {
                    // A hundred thousand dispatchers may want something at once.
                    tokio::task::yield_now().await;
                }
            }
        }
        self.actions = actions;
    }

    fn on_deliveries(&mut self, deliveries: &mut Vec<Delivery>, now: Instant) {
        let (events, mut bytes) = (deliveries.len(), 0);
        for delivery in deliveries.drain(..) {
            match &delivery.event {
                DispatcherEvent::Rows(batch) => bytes += batch.bytes(),
                DispatcherEvent::Block(BlockEvent::Ddl(ddl)) => {
                    self.blocks.insert(delivery.dispatcher, (ddl.commit_ts, now));
                }
                DispatcherEvent::Block(BlockEvent::SyncPoint(_))
                | DispatcherEvent::Begin(_)
                | DispatcherEvent::Resolved { .. }
                | DispatcherEvent::Failed { .. } => {}
            }
            let arrival = Arrival::of(delivery.event, delivery.credit);
            self.core.on_arrival(delivery.dispatcher, arrival, now);
        }
        self.metrics.batch(events, bytes, self::now().saturating_duration_since(now));
    }

    /// Measures the DDLs that dispatchers have passed. One whose dispatcher is gone was passed with it, or is another
    /// node's by now.
    fn measure_blocks(&mut self, now: Instant) {
        let dispatchers = self.core.dispatchers();
        let metrics = &self.metrics;
        self.blocks.retain(|id, (commit_ts, since)| {
            let dispatcher = dispatchers.slot(*id).and_then(|slot| dispatchers.get(slot));
            let waits = dispatcher.is_some_and(|dispatcher| dispatcher.checkpoint() < *commit_ts);
            if !waits {
                metrics.ddl_passed(now.saturating_duration_since(*since));
            }
            waits
        });
    }

    fn on_tick(&mut self, now: Instant) {
        self.look_for_trouble();
        self.core.on_tick(now);
        self.measure_blocks(now);
        self.publish_checkpoints();
        let triggers = usize::from(self.core.has_trigger());
        let tables = self.core.dispatchers().len().saturating_sub(triggers);
        self.metrics.sizes(triggers, tables, self.core.waiting_block_statuses());
        let core = &self.core;
        self.metrics.watermark(core.latest(), WallTime::now(), |ts| core.time_of(ts));
    }

    /// Asks the sink what it waits for. The time is that of the first look: one trouble is told in one way.
    fn look_for_trouble(&mut self) {
        let trouble = self.sink.trouble().map(|error| Fault::sink(&error));
        let known = self.core.trouble();
        let same = match (&trouble, known) {
            (None, None) => true,
            (Some(fault), Some(known)) => fault.code == known.code && fault.message == known.message,
            (None, Some(_)) | (Some(_), None) => false,
        };
        if same {
            return;
        }
        match &trouble {
            Some(fault) => tracing::warn!(changefeed = %self.id, code = fault.code, error = fault.message,
                "the downstream is waited for"),
            None => tracing::info!(changefeed = %self.id, "the downstream is not waited for any more"),
        }
        let trouble = trouble.map(|fault| self.running(&fault));
        self.core.on_trouble(trouble);
    }

    /// Tells the collector how far each dispatcher is: one pass over dense arrays.
    fn publish_checkpoints(&mut self) {
        for (published, checkpoint) in self.checkpoints.iter_mut().zip(self.core.dispatchers().checkpoints())
        {
            if let Some(published) = published
                && checkpoint != Ts::MAX
                && checkpoint > published.last
            {
                published.last = checkpoint;
                published.slot.advance(checkpoint);
            }
        }
    }

    fn on_done(&mut self, done: Result<Done, JoinError>, now: Instant) {
        match done {
            Ok(Done::DispatcherOpened { id, asked, result }) => {
                self.core.on_dispatcher_opened(id, asked, result, now);
            }
            Ok(Done::TableOpened { slot, result }) => self.core.on_table_opened(slot, result, now),
            Ok(Done::FlushFinished { slot, result }) => self.core.on_flush_finished(slot, result, now),
            Ok(Done::BlockWritten { slot, result }) => self.core.on_block_written(slot, result, now),
            Ok(Done::Forgotten { done }) => self.core.on_forgotten(done),
            Err(error) if error.is_panic() => {
                self.core.on_error(Fault::dispatcher("a call of the downstream panicked"), now);
            }
            Err(_) => {}
        }
    }

    fn on_sink_ended(&mut self, ended: Result<Result<(), sink::Error>, JoinError>, now: Instant) {
        self.sink_run = None;
        if self.core.life() != Life::Open {
            return;
        }
        let fault = match ended {
            Ok(Err(error)) => Fault::sink(&error),
            Ok(Ok(())) => Fault::dispatcher("the sink ended without being asked to"),
            Err(_) => Fault::dispatcher("the sink panicked"),
        };
        self.core.on_sink_failed(fault, now);
    }

    fn abandon_sink(&mut self) {
        if let Some(run) = self.sink_run.take() {
            tracing::warn!(changefeed = %self.id, "the sink did not end in time and was abandoned");
            run.abort();
        }
    }

    fn on_command(&mut self, command: Command, now: Instant) {
        match command {
            Command::Message(from, message) => self.on_message(&from, message, now),
            Command::Bootstrap { from, request, created, reply } => {
                let epoch = request.epoch;
                let step = self.core.on_bootstrap(&from, &request, created);
                self.owners.send_if_modified(|owner| {
                    let changed = owner != self.core.owner();
                    *owner = self.core.owner().clone();
                    changed
                });
                let pending = PendingBootstrap { epoch, reply };
                match step {
                    BootstrapStep::Wait => {
                        // Whoever waited before has been superseded.
                        if let Some(earlier) = self.bootstrap.replace(pending) {
                            let _ = earlier.reply.send(Bootstrapped::Silent);
                        }
                    }
                    step @ (BootstrapStep::Reply(_)
                    | BootstrapStep::Refuse(_)
                    | BootstrapStep::Drop
                    | BootstrapStep::Closing
                    | BootstrapStep::Closed) => self.answer_bootstrap(pending, step),
                }
            }
            Command::PostBootstrap { from, request, reply } => {
                let answer = match self.core.on_post_bootstrap(&from, &request) {
                    PostBootstrapStep::Reply(response) => Some(response),
                    PostBootstrapStep::Refuse(fault) => Some(heartbeatpb::MaintainerPostBootstrapResponse {
                        changefeed: self.id.clone(),
                        trigger: None,
                        error: Some(self.running(&fault)),
                        epoch: request.epoch,
                    }),
                    PostBootstrapStep::Drop => None,
                };
                let _ = reply.send(answer);
            }
            Command::Close { from, epoch, removed, reply } => {
                let answer = match self.core.on_close(&from, epoch, removed) {
                    CloseStep::NotAllowed => Closed::NotAllowed,
                    CloseStep::Closing => Closed::NotYet,
                    CloseStep::Closed => Closed::Done,
                };
                let _ = reply.send(answer);
            }
            Command::ShutDown => {
                self.core.try_close(false);
            }
            Command::Inspect(reply) => {
                let _ = reply.send(self.view());
            }
        }
    }

    fn on_message(&mut self, from: &NodeId, message: ToHeartbeatCollector, now: Instant) {
        match message {
            ToHeartbeatCollector::HeartBeatResponse(response) => {
                self.core.on_heartbeat_response(from, &response, now);
            }
            ToHeartbeatCollector::Schedule(request) => {
                self.metrics.request();
                self.core.on_schedule(from, request, now);
            }
            ToHeartbeatCollector::Merge(request) => self.core.on_merge(from, request, now),
            ToHeartbeatCollector::CheckpointTs(message) => self.core.on_checkpoint(from, &message),
        }
    }

    pub(super) fn answer_bootstrap(&mut self, pending: PendingBootstrap, step: BootstrapStep) {
        let answer = match step {
            BootstrapStep::Reply(response) => Bootstrapped::Answer(response),
            BootstrapStep::Refuse(fault) => Bootstrapped::Failed(failed_bootstrap(
                &self.id,
                pending.epoch,
                self.context.center.node(),
                &fault,
            )),
            BootstrapStep::Drop | BootstrapStep::Wait | BootstrapStep::Closing => Bootstrapped::Silent,
            BootstrapStep::Closed => Bootstrapped::Closed,
        };
        let _ = pending.reply.send(answer);
    }

    fn view(&self) -> ManagerView {
        let slowest = self.core.dispatchers().slowest();
        ManagerView {
            owner: self.core.owner().clone(),
            dispatchers: self.core.dispatchers().len(),
            watermark: self.core.latest(),
            slowest: slowest.map(|d| (d.id, d.checkpoint(), d.waits_for())),
            error: self.core.error().cloned(),
        }
    }

    /// Ends everything that runs beside the task; [`Task::finish`] follows when it has ended.
    pub(super) fn stop(&mut self) {
        self.write_path.fence();
        self.context.routes.deregister(&self.id, &self.entrance);
        self.context.source.close(&self.id);
        self.deliveries.close();
        while self.deliveries.try_recv().is_ok() {}
        self.checkpoints.clear();
        self.calls.abort_all();
        let stop = CancellationToken::new().drop_guard();
        drop(std::mem::replace(&mut self.sink_stop, stop));
        self.sink_deadline = Some(now() + SINK_END);
    }

    /// Everything has ended.
    fn finish(&mut self, closed: &watch::Sender<bool>) {
        self.core.on_stopped();
        closed.send_replace(true);
    }
}

fn log_gone() -> Fault {
    Fault {
        code: "CDC:ErrLogServiceClosed".into(),
        message: "the event collector of the node has ended".into(),
        retryable: true,
    }
}

async fn ended(
    run: &mut Option<JoinHandle<Result<(), sink::Error>>>,
) -> Result<Result<(), sink::Error>, JoinError> {
    match run {
        Some(run) => run.await,
        None => std::future::pending().await,
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

/// The clock of the runtime, which tests may hold.
pub(super) fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
