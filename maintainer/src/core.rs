//! The decisions of one maintainer: events and time in, effects out.

mod admin;
#[cfg(feature = "test-util")]
pub(crate) mod bench;
mod bootstrap;
mod fencing;
mod heartbeat;
mod merge;
mod planning;
mod removal;
mod schedule;
mod stall;
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
use replica::{Bootstrapper, SpanReplica};
use scheduler::Cooldown;

use self::admin::Watched;
use self::bootstrap::PostBootstrap;
use self::planning::Planning;
use self::removal::Removal;
use self::schedule::Schedule;
use crate::barrier::{Barrier, Overdue, response};
use crate::checkpoint::{CheckpointFold, Progress};
use crate::drain::DrainTarget;
use crate::fence::Whom;
use crate::fencing::Fencing;
use crate::placement::{IdSource, Placement};
use crate::placements::{Answer, PlacementError};
use crate::upstream::SourceTable;
pub use stall::{Holder, Place, Standstill};

/// An upstream that could not be read is tried again after this time.
const LOAD_RETRY: Duration = Duration::from_secs(10);
/// Requests about events that are kept during a bootstrap; those beyond it come again.
const MOST_EARLY: usize = 1024;
/// A failure on this node that lasts is told again after this time.
const LOCAL_ERROR_REPEAT: Duration = Duration::from_secs(5);

/// What the owner of a core has to do.
#[derive(Clone, PartialEq, Debug)]
pub(crate) enum Effect {
    /// Send to a node's orchestrator.
    Orchestrate(NodeId, ToOrchestrator),
    /// Send to a node's dispatchers.
    Dispatch(NodeId, ToHeartbeatCollector),
    /// Ask the upstream where a span can be divided into so many pieces, and tell the answer.
    Points { question: u64, span: TableSpan, pieces: usize },
    /// A wish has come true, or cannot.
    Answer(u64, Result<Answer, PlacementError>),
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
    /// Keep these from writing downstream, and tell how that went.
    Fence { attempt: u64, newest: Option<MaintainerEpoch>, whom: Whom },
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
    /// Writers of its downstream can be fenced.
    pub(crate) fences: bool,
    pub(crate) ids: IdSource,
    pub(crate) now: Instant,
}

/// Who waits for something outside and tries again by itself.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Waits {
    /// The log reader.
    Reader,
    /// A fence at the downstream.
    Fence,
    /// The dispatchers of a node.
    Node(NodeId),
}

/// One maintainer's state.
pub(crate) struct Core {
    me: NodeId,
    id: ChangefeedId,
    epoch: Option<MaintainerEpoch>,
    settings: DispatcherManagerConfig,
    /// The same as most nodes are sent it.
    config: ConfigBytes,
    /// Whether the sink publishes table names.
    names_wanted: bool,
    low_latency: bool,
    across_nodes: bool,
    is_new: bool,
    /// The checkpoint that it was started at.
    start: Ts,
    /// Where it stood when it had taken over.
    began: Ts,
    /// The table trigger's id, also after it was removed.
    trigger: DispatcherId,
    placement: Placement,
    barrier: Barrier,
    fold: CheckpointFold,
    drain: DrainTarget,
    cooldown: Cooldown,
    schedule: Schedule,
    planning: Planning,
    wishes: Vec<Watched>,
    watch: stall::Watch,
    /// Nodes that live.
    alive: BTreeSet<NodeId>,
    fencing: Fencing,
    /// Nodes that were let in again and whose answer was heard since the last fold.
    begun: BTreeSet<NodeId>,
    bootstrapper: Bootstrapper<MaintainerBootstrapResponse>,
    tables: Option<Vec<SourceTable>>,
    /// When the upstream is to be read again; `None` while that is under way or done.
    load_at: Option<Instant>,
    initialized: bool,
    /// What nodes have said of events since they answered, until the take-over.
    early: Vec<(NodeId, BlockStatusRequest)>,
    /// Not yet answered.
    post: Option<PostBootstrap>,
    removal: Option<Removal>,
    stopped: bool,
    errors: BTreeMap<NodeId, (u64, RunningError)>,
    /// What is being tried again, by who waits for it.
    troubles: BTreeMap<Waits, RunningError>,
    local_error_at: Option<Instant>,
    /// Number of changes of the status that are worth telling.
    version: u64,
    orphans: BTreeMap<DispatcherId, Instant>,
    missing: BTreeMap<NodeId, BTreeSet<DispatcherId>>,
}

impl Core {
    /// A maintainer that is about to start.
    pub(crate) fn new(birth: Birth<'_>) -> Self {
        let Birth { me, info, epoch, checkpoint, is_new, removal_only, fences, mut ids, now } = birth;
        let mut config = DispatcherManagerConfig::of(info);
        config.epoch = epoch;
        let scheduler = &info.config.scheduler;
        let trigger = ids();
        let mut span = SpanReplica::absent(trigger, SchemaId::DDL, TableSpan::ddl(), checkpoint);
        span.node = Some(me.clone());
        span.state = ComponentState::Working;
        let mut placement = Placement::new(info.id.clone(), epoch, span, ids);
        placement.divides_all = scheduler.enable_table_across_nodes && !scheduler.enable_splittable_check;
        Self {
            id: info.id.clone(),
            epoch,
            config: config.to_bytes(),
            settings: config,
            names_wanted: !info.sink_uri.starts_with("mysql") && !info.sink_uri.starts_with("tidb"),
            low_latency: info.config.performance_mode == PerformanceMode::LowLatency,
            across_nodes: scheduler.enable_table_across_nodes,
            is_new,
            start: checkpoint,
            began: checkpoint,
            trigger,
            placement,
            barrier: Barrier::new(me.clone(), checkpoint),
            fold: CheckpointFold::new(me.clone(), checkpoint),
            drain: DrainTarget::default(),
            cooldown: Cooldown::default(),
            watch: stall::Watch::new(checkpoint, now),
            schedule: Schedule::new(scheduler, now),
            planning: Planning::default(),
            wishes: Vec::new(),
            alive: BTreeSet::new(),
            fencing: Fencing::new(
                fences && !removal_only,
                // Whatever the maintainer before has left under its further numbers is closed too.
                if removal_only { epoch.map(MaintainerEpoch::last) } else { epoch },
            ),
            begun: BTreeSet::new(),
            bootstrapper: Bootstrapper::default(),
            tables: None,
            load_at: (!removal_only).then_some(now),
            initialized: false,
            early: Vec::new(),
            post: None,
            removal: None,
            stopped: false,
            errors: BTreeMap::new(),
            troubles: BTreeMap::new(),
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
        let closing: Vec<&str> = self.must_close().map(NodeId::as_str).collect();
        if !closing.is_empty() {
            return Some(format!("{} to close what an earlier maintainer left there", closing.join(", ")));
        }
        let silent: Vec<&str> = self.bootstrapper.silent().map(NodeId::as_str).collect();
        if !silent.is_empty() {
            return Some(format!("bootstrap answers of {}", silent.join(", ")));
        }
        if self.tables.is_none() {
            return Some("the upstream's tables".to_owned());
        }
        self.fencing.wants_sweep().then(|| "the downstream to refuse nodes that are gone".to_owned())
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
                // Also what is on its way to it, and what is not gone from it yet.
                inflight_moves: count(self.placement.operators.occupying(target)),
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
            // The node that tells it knows the time.
            checkpoint_time: None,
            trouble: self.troubles.values().next().cloned(),
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

    /// What the log reader, a fence or a node waits for and tries again by itself, or that it does not any more.
    pub(super) fn set_trouble(&mut self, who: Waits, trouble: Option<RunningError>) {
        let before = self.troubles.get(&who);
        let same = match (before, &trouble) {
            (None, None) => true,
            (Some(before), Some(now)) => before.code == now.code && before.message == now.message,
            (None, Some(_)) | (Some(_), None) => false,
        };
        if same {
            return;
        }
        match trouble {
            Some(trouble) => drop(self.troubles.insert(who, trouble)),
            None => drop(self.troubles.remove(&who)),
        }
        self.changed();
    }

    /// What has kept the log reader from its upstream for long.
    pub(crate) fn on_reader_trouble(&mut self, trouble: Option<RunningError>) {
        if self.removal.is_none() {
            self.set_trouble(Waits::Reader, trouble);
        }
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
        let usable =
            self.removal.is_none() && request.mode == heartbeatpb::Mode::Default && self.is_heard(from);
        if !usable {
            return;
        }
        if !self.initialized {
            // Whoever came to the event after its node had answered. It would say so again in seconds.
            if self.early.len() < MOST_EARLY {
                self.early.push((from.clone(), request.clone()));
            }
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
        out.push(self.address(node, ToHeartbeatCollector::HeartBeatResponse(message)));
    }

    /// Time passed: says again what was not answered, and places what has no home.
    pub(crate) fn on_tick(&mut self, now: Instant, out: &mut Vec<Effect>) {
        if self.stopped {
            return;
        }
        self.watch_checkpoint(now);
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
        if !self.fencing.is_sweeping() {
            for node in self.bootstrapper.resend(now) {
                self.ask_bootstrap(node, out);
            }
        }
        self.ask_fence(now, out);
        self.let_back(now, out);
        self.resend_post_bootstrap(now, out);
        if self.initialized {
            for (node, statuses) in self.barrier.scan(&mut self.placement, now) {
                self.tell(node, statuses, out);
            }
            self.look_around(now);
            self.placement.drive(now, |operators, cx| operators.on_tick(cx));
            self.watch_wishes(now, out);
        }
        self.after_change(now, out);
        if self.initialized {
            self.ask_points(now, out);
        }
    }

    /// After a batch of events: folds the checkpoint once. All inputs are this task's own, so they are one
    /// snapshot; whoever lets go of a constraint has installed the next one before.
    pub(crate) fn settle(&mut self) -> bool {
        self.begun.clear();
        for node in self.placement.spans.take_crossings() {
            let has_spans = self.placement.spans.size_by_node(&node) > 0;
            self.fold.on_spans(&node, has_spans);
        }
        if !self.initialized {
            return false;
        }
        let trigger = self.removal.as_ref().and_then(Removal::trigger_checkpoint);
        let homeless = self.placement.spans.floor().filter(|_| heartbeatpb::Rule::AbsentHolds.holds());
        let moved = self.fold.advance([homeless, self.barrier.floor(), trigger]);
        if moved {
            self.placement.spans.advance_committed(self.fold.committed().checkpoint);
            if self.low_latency {
                self.changed();
            }
        }
        moved
    }
}
