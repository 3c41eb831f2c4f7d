//! The decisions of one maintainer: events and time in, effects out.

#[cfg(feature = "test-util")]
pub(crate) mod bench;
mod bootstrap;
mod heartbeat;
mod merge;
mod removal;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use heartbeatpb::config::{ChangefeedInfo, DispatcherManagerConfig, PerformanceMode};
use heartbeatpb::{
    BlockStatusRequest, ChangefeedId, ComponentState, ConfigBytes, DispatcherId, DrainProgress,
    MaintainerBootstrapResponse, MaintainerEpoch, MaintainerStatus, NodeId, RunningError, SchemaId,
    TableSpan, Ts, codes,
};
use messaging::{ToHeartbeatCollector, ToOrchestrator};
use operator::Operator;
use operator::span::{AddSpan, MoveSpan};
use replica::{Bootstrapper, SpanReplica, Standing};
use scheduler::{Balance, Basic, Cooldown, Decision, Drain, Draining, Scheduler, View};

use self::bootstrap::PostBootstrap;
use self::removal::Removal;
use crate::barrier::{Barrier, Overdue, response};
use crate::checkpoint::{CheckpointFold, Progress};
use crate::drain::DrainTarget;
use crate::placement::{IdSource, Placement};
use crate::upstream::SourceTable;

/// Operators that may run at once.
const BATCH: usize = 10_000;
/// Moves that balancing may begin at once.
const BALANCE_BATCH: usize = 1_024;
/// How often it is looked whether nodes have their share.
const BALANCE_INTERVAL: Duration = Duration::from_secs(15);
/// An upstream that could not be read is tried again after this time.
const LOAD_RETRY: Duration = Duration::from_secs(10);
/// A failure on this node that lasts is told again after this time.
const LOCAL_ERROR_REPEAT: Duration = Duration::from_secs(5);

/// What the owner of a core has to do.
#[derive(Clone, PartialEq, Debug)]
pub(crate) enum Effect {
    /// Send to a node's orchestrator.
    Orchestrate(NodeId, ToOrchestrator),
    /// Send to a node's dispatchers.
    Dispatch(NodeId, ToHeartbeatCollector),
    /// Start the log reader, list its tables, and tell the result.
    Load,
    /// The upstream may forget what is behind.
    Confirm(Ts),
    /// Every node answered, and its state was taken over.
    Initialized,
    /// The last dispatcher has let go: stop the reader and tell when it has stopped.
    Leave,
    /// An operator started.
    OperatorStarted(operator::Kind),
    /// An operator finished at this age.
    OperatorFinished(operator::Kind, Duration),
    /// A message of another epoch was dropped.
    Stale(&'static str),
}

/// What a core is made from.
pub(crate) struct Birth<'a> {
    pub(crate) me: NodeId,
    pub(crate) info: &'a ChangefeedInfo,
    pub(crate) epoch: Option<MaintainerEpoch>,
    pub(crate) checkpoint: Ts,
    pub(crate) is_new: bool,
    /// It only closes dispatcher managers: nothing is known of the changefeed but its id.
    pub(crate) removal_only: bool,
    pub(crate) ids: IdSource,
    pub(crate) now: Instant,
}

/// One maintainer's state.
pub(crate) struct Core {
    me: NodeId,
    id: ChangefeedId,
    epoch: Option<MaintainerEpoch>,
    config: ConfigBytes,
    /// Whether the sink publishes table names.
    names_wanted: bool,
    low_latency: bool,
    across_nodes: bool,
    check_splittable: bool,
    is_new: bool,
    /// The checkpoint that it was started at.
    start: Ts,
    /// The table trigger's id, also after it was removed.
    trigger: DispatcherId,
    placement: Placement,
    barrier: Barrier,
    fold: CheckpointFold,
    drain: DrainTarget,
    cooldown: Cooldown,
    /// In the order in which they look, each with the time when it wants to.
    schedulers: [(Box<dyn Scheduler>, Instant); 3],
    /// Nodes that live.
    alive: BTreeSet<NodeId>,
    bootstrapper: Bootstrapper<MaintainerBootstrapResponse>,
    tables: Option<Vec<SourceTable>>,
    /// When the upstream is to be read again; `None` while that is under way or done.
    load_at: Option<Instant>,
    initialized: bool,
    /// Not yet answered.
    post: Option<PostBootstrap>,
    removal: Option<Removal>,
    stopped: bool,
    errors: BTreeMap<NodeId, (u64, RunningError)>,
    local_error_at: Option<Instant>,
    /// Number of changes of the status that are worth telling.
    version: u64,
    orphans: BTreeMap<DispatcherId, Instant>,
    missing: BTreeMap<NodeId, BTreeSet<DispatcherId>>,
}

impl Core {
    /// A maintainer that is about to start.
    pub(crate) fn new(birth: Birth<'_>) -> Self {
        let Birth { me, info, epoch, checkpoint, is_new, removal_only, mut ids, now } = birth;
        let mut config = DispatcherManagerConfig::of(info);
        config.epoch = epoch;
        let scheduler = &info.config.scheduler;
        let trigger = ids();
        let mut span = SpanReplica::absent(trigger, SchemaId::DDL, TableSpan::ddl(), checkpoint);
        span.node = Some(me.clone());
        span.state = ComponentState::Working;
        let ceiling = usize::try_from(scheduler.scheduling_task_count_per_node).unwrap_or(1);
        Self {
            id: info.id.clone(),
            epoch,
            config: config.to_bytes(),
            names_wanted: !info.sink_uri.starts_with("mysql") && !info.sink_uri.starts_with("tidb"),
            low_latency: info.config.performance_mode == PerformanceMode::LowLatency,
            across_nodes: scheduler.enable_table_across_nodes,
            check_splittable: scheduler.enable_splittable_check,
            is_new,
            start: checkpoint,
            trigger,
            placement: Placement::new(info.id.clone(), epoch, span, ids),
            barrier: Barrier::new(me.clone(), checkpoint),
            fold: CheckpointFold::new(me.clone(), checkpoint),
            drain: DrainTarget::default(),
            cooldown: Cooldown::default(),
            schedulers: [
                (Box::new(Basic::new(BATCH, ceiling)), now),
                (Box::new(Drain::new(BATCH)), now),
                (Box::new(Balance::new(BALANCE_BATCH, BALANCE_INTERVAL)), now + BALANCE_INTERVAL),
            ],
            alive: BTreeSet::new(),
            bootstrapper: Bootstrapper::default(),
            tables: None,
            load_at: (!removal_only).then_some(now),
            initialized: false,
            post: None,
            removal: None,
            stopped: false,
            errors: BTreeMap::new(),
            local_error_at: None,
            version: 1,
            orphans: BTreeMap::new(),
            missing: BTreeMap::new(),
            me,
        }
    }

    /// How far the changefeed is.
    pub(crate) fn progress(&self) -> Progress {
        self.fold.committed()
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Whether each move of the checkpoint is to be told at once.
    pub(crate) fn is_low_latency(&self) -> bool {
        self.low_latency
    }

    /// Counts changes of the status that are worth telling.
    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    /// Spans and the operators that run, for gauges.
    pub(crate) fn placement(&self) -> &Placement {
        &self.placement
    }

    /// Events that wait, and since when the oldest one does.
    pub(crate) fn barriers(&self) -> (usize, Option<Instant>) {
        (self.barrier.len(), self.barrier.oldest())
    }

    /// What is worth a warning now: the oldest slow operator, and events that take long.
    pub(crate) fn slow(&mut self, now: Instant) -> (Option<operator::Slow>, Vec<Overdue>) {
        (self.placement.operators.slow(now), self.barrier.overdue(now))
    }

    /// Whom the changefeed waits for before anything can be replicated, for people.
    pub(crate) fn waits_for(&self) -> Option<String> {
        if self.initialized || self.removal.is_some() {
            return None;
        }
        let silent: Vec<&str> = self.bootstrapper.silent().map(NodeId::as_str).collect();
        if !silent.is_empty() {
            return Some(format!("bootstrap answers of {}", silent.join(", ")));
        }
        self.tables.is_none().then(|| "the upstream's tables".to_owned())
    }

    /// What the coordinator is told. Reading it changes nothing.
    pub(crate) fn status(&self) -> MaintainerStatus {
        let progress = self.progress();
        let drain = self.drain.active().map(|(target, epoch)| {
            let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
            DrainProgress {
                target: target.clone(),
                epoch,
                dispatchers: count(self.placement.spans.size_by_node(target)),
                inflight_moves: count(self.placement.operators.moves_away_from(target)),
            }
        });
        MaintainerStatus {
            changefeed: self.id.clone(),
            feed_state: String::new(),
            state: if self.stopped { ComponentState::Stopped } else { ComponentState::Working },
            checkpoint: progress.checkpoint,
            errors: self.errors.values().map(|(_, error)| error.clone()).collect(),
            bootstrap_done: self.initialized,
            last_synced: progress.last_synced,
            drain,
            epoch: self.epoch,
        }
    }

    fn changed(&mut self) {
        self.version += 1;
    }

    /// The coordinator knows the status as it was at `version`: errors of then are old.
    pub(crate) fn on_reported(&mut self, version: u64) {
        self.errors.retain(|_, (recorded, _)| *recorded > version);
    }

    fn record_error(&mut self, node: &NodeId, error: RunningError) {
        self.changed();
        self.errors.insert(node.clone(), (self.version, error));
    }

    fn own_error(&mut self, code: &str, message: String) {
        let me = self.me.clone();
        // The time is filled in when it is told.
        let error =
            RunningError { time: String::new(), node: me.to_string(), code: code.to_owned(), message };
        self.record_error(&me, error);
    }

    /// The log reader ended with an error. It is asked for at every tick: told once in a while.
    pub(crate) fn on_local_error(&mut self, error: RunningError, now: Instant) {
        if self.removal.is_some() || self.local_error_at.is_some_and(|at| now < at + LOCAL_ERROR_REPEAT) {
            return;
        }
        self.local_error_at = Some(now);
        let me = self.me.clone();
        self.record_error(&me, error);
    }

    /// Another node is to be emptied, or none.
    pub(crate) fn on_drain(&mut self, target: &DrainTarget, now: Instant) {
        if self.drain.active().is_some() || target.active().is_some() {
            self.cooldown.start(now);
        }
        self.drain = target.clone();
        self.wake_schedulers(now);
        self.changed();
    }

    /// A checkpoint was persisted: the upstream may forget, and the sink may publish it.
    pub(crate) fn on_persisted(&mut self, message: heartbeatpb::CheckpointTsMessage, out: &mut Vec<Effect>) {
        if self.stopped || message.checkpoint > self.progress().checkpoint {
            return;
        }
        out.push(Effect::Confirm(message.checkpoint));
        out.push(Effect::Dispatch(self.me.clone(), ToHeartbeatCollector::CheckpointTs(message)));
    }

    /// Dispatchers of a node stand at events.
    pub(crate) fn on_block_status(
        &mut self,
        from: &NodeId,
        request: &BlockStatusRequest,
        now: Instant,
        out: &mut Vec<Effect>,
    ) {
        let usable = self.initialized
            && self.removal.is_none()
            && request.mode == heartbeatpb::Mode::Default
            && self.bootstrapper.has_answered(from);
        if !usable {
            return;
        }
        let outcome = self.barrier.on_request(from, request, &mut self.placement, now);
        for (node, statuses) in outcome.responses {
            self.tell(node, statuses, out);
        }
        for key in outcome.unusable {
            let message =
                format!("the schema change at {} names no tables that it could be done for", key.commit_ts);
            self.own_error(codes::SCHEMA_CHANGE_UNSUPPORTED, message);
        }
        self.after_change(now, out);
    }

    fn tell(&self, node: NodeId, statuses: Vec<heartbeatpb::DispatcherStatus>, out: &mut Vec<Effect>) {
        let message = response(&self.id, self.epoch, statuses);
        out.push(Effect::Dispatch(node, ToHeartbeatCollector::HeartBeatResponse(message)));
    }

    /// Time passed: says again what was not answered, and places what has no home.
    pub(crate) fn on_tick(&mut self, now: Instant, out: &mut Vec<Effect>) {
        if self.stopped {
            return;
        }
        if self.removal.is_some() {
            self.placement.drive(now, |operators, cx| operators.on_tick(cx));
            self.flush_operators(out);
            self.continue_removal(now, out);
            return;
        }
        if self.load_at.is_some_and(|at| at <= now) {
            self.load_at = None;
            out.push(Effect::Load);
        }
        for node in self.bootstrapper.resend(now) {
            self.ask_bootstrap(node, out);
        }
        self.resend_post_bootstrap(now, out);
        if self.initialized {
            for (node, statuses) in self.barrier.scan(&mut self.placement, now) {
                self.tell(node, statuses, out);
            }
            self.schedule(now);
            self.placement.drive(now, |operators, cx| operators.on_tick(cx));
        }
        self.after_change(now, out);
    }

    /// Placing and emptying are looked at at the next tick; balancing keeps its pace.
    fn wake_schedulers(&mut self, now: Instant) {
        let [basic, drain, _] = &mut self.schedulers;
        basic.1 = basic.1.min(now);
        drain.1 = drain.1.min(now);
    }

    /// Asks the schedulers whose time has come, and begins what they decide.
    fn schedule(&mut self, now: Instant) {
        if self.schedulers.iter().all(|(_, at)| now < *at) {
            return;
        }
        let nodes: BTreeSet<NodeId> =
            self.alive.iter().filter(|node| self.bootstrapper.has_answered(node)).cloned().collect();
        let operators = &self.placement.operators;
        let draining = self.drain.active().map(|(node, epoch)| Draining {
            node,
            epoch,
            in_flight: operators.moves_away_from(node),
            is_own: *node == self.me,
        });
        if draining.is_some() {
            self.cooldown.start(now);
        }
        let view = View {
            spans: &self.placement.spans,
            nodes: &nodes,
            draining,
            is_paused: self.cooldown.is_on(now),
            operators: operators.len(),
            is_occupied: &|span| operators.contains(span),
            now,
        };
        let mut decisions = Vec::new();
        for (scheduler, at) in self.schedulers.iter_mut().filter(|(_, at)| *at <= now) {
            *at = now + scheduler.tick(&view, &mut decisions);
        }
        self.placement.drive(now, |operators, cx| {
            for decision in decisions {
                let operator: Option<Box<dyn Operator>> = match decision {
                    Decision::Add { span, dest } => {
                        Some(Box::new(AddSpan::new(span, dest, heartbeatpb::OperatorType::Add)))
                    }
                    Decision::Move { span, from, dest } => {
                        cx.spans.get(span).map(|span| Box::new(MoveSpan::new(span, from, dest)) as _)
                    }
                    other => {
                        tracing::debug!(?other, "no operator for this decision");
                        None
                    }
                };
                if let Some(operator) = operator {
                    operators.add(operator, cx);
                }
            }
        });
    }

    /// New spans that nobody runs are placed at once, and what operators ask for is passed on.
    fn after_change(&mut self, now: Instant, out: &mut Vec<Effect>) {
        let homeless = self.placement.spans.count(Standing::Absent) > 0;
        if self.initialized && self.removal.is_none() && homeless && self.placement.operators.is_empty() {
            self.wake_schedulers(now);
            self.schedule(now);
        }
        self.flush_operators(out);
    }

    fn flush_operators(&mut self, out: &mut Vec<Effect>) {
        out.extend(self.placement.take_effects().into_iter().filter_map(|effect| match effect {
            operator::Effect::Send(node, request) => {
                Some(Effect::Dispatch(node, ToHeartbeatCollector::Schedule(request)))
            }
            operator::Effect::Merge(node, request) => {
                Some(Effect::Dispatch(node, ToHeartbeatCollector::Merge(request)))
            }
            operator::Effect::Started(kind) => Some(Effect::OperatorStarted(kind)),
            operator::Effect::Finished(kind, age) => Some(Effect::OperatorFinished(kind, age)),
            operator::Effect::Uncovered(_) => None,
        }));
    }

    /// After a batch of events: folds the checkpoint once. All inputs are this task's own, so they are one
    /// snapshot; whoever lets go of a constraint has installed the next one before.
    pub(crate) fn settle(&mut self) -> bool {
        for node in self.placement.spans.take_crossings() {
            let has_spans = self.placement.spans.size_by_node(&node) > 0;
            self.fold.on_spans(&node, has_spans);
        }
        if !self.initialized {
            return false;
        }
        let trigger = self.removal.as_ref().and_then(Removal::trigger_checkpoint);
        let moved = self.fold.advance([self.placement.spans.floor(), self.barrier.floor(), trigger]);
        if moved {
            self.placement.spans.advance_committed(self.fold.committed().checkpoint);
            if self.low_latency {
                self.changed();
            }
        }
        moved
    }
}
