//! Every decision of the coordinator: events and time in, actions out; no clock, no I/O.
//!
//! One write per changefeed is under way at a time; what else is wanted of that changefeed waits behind it.
//! So an intent is durable before anything is sent that depends on it (CO-1), and a decision never races
//! with the write it was based on.

mod bootstrap;
mod command;
mod drain;
mod schedule;
mod silence;
mod status;
mod stop;
mod view;
mod write;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use heartbeatpb::config::ChangefeedInfo;
use heartbeatpb::{ChangefeedId, CoordinatorBootstrapResponse, MaintainerEpoch, NodeId, NodeLiveness, Ts};
use messaging::{ToCoordinator, ToMaintainerManager};
use replica::Bootstrapper;

use crate::changefeed::operator::{MovePhase, NodeLoss, Operator, Slot};
use crate::changefeed::{Changefeed, Group};
use crate::config::CoordinatorConfig;
use crate::drain::{Drain, DrainDoc, NodeRecord};
use crate::error::Error;
use crate::meta::{CheckpointWrite, Stored};
pub use command::{Command, Reply};
pub use drain::DrainView;
pub use view::{ChangefeedView, Counts};
pub use write::Write;

/// A user operation that waits for its answer.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct OpId(pub u64);

/// An effect that the shell performs.
#[derive(Debug)]
pub enum Action {
    /// Send a command.
    Send {
        /// To whom.
        to: NodeId,
        /// What.
        message: ToMaintainerManager,
    },
    /// Make something durable and report with [`Core::on_written`].
    Write {
        /// The changefeed.
        id: ChangefeedId,
        /// What.
        write: Write,
    },
    /// Store checkpoints and report with [`Core::on_checkpoints_saved`].
    SaveCheckpoints(Vec<CheckpointWrite>),
    /// Make durable what is to be known of drains, and report with [`Core::on_drain_written`].
    WriteDrain(DrainDoc),
    /// Answer a user operation.
    Reply {
        /// Which.
        op: OpId,
        /// The answer.
        result: Result<Reply, Error>,
    },
    /// An operator began or ended; for the metrics.
    Count {
        /// Kind of the operator.
        kind: &'static str,
        /// How long it took, when it ended.
        took: Option<Duration>,
    },
}

/// A changefeed and everything under way with it.
#[derive(Debug)]
struct Feed {
    changefeed: Changefeed,
    slot: Option<Slot>,
    /// The write under way.
    writing: Option<Write>,
    /// Writes that wait for it.
    queue: VecDeque<Write>,
    /// After a failed write: when to try again, and how often it failed.
    retry: Option<Retry>,
    /// It is being removed; hidden from people.
    removing: bool,
    /// Pauses that wait for the maintainer to stop.
    pausing: Vec<OpId>,
    /// Removals that wait for the deletion.
    removals: Vec<OpId>,
    /// When its persisted checkpoint was told last.
    told_at: Option<Instant>,
    /// Maintainers that should not exist were told to stop at this time.
    stale_told: BTreeMap<NodeId, Instant>,
    /// The maintainer to be stopped once the one that is being stopped has.
    next_stop: Option<(NodeId, Option<MaintainerEpoch>)>,
    /// When its maintainer was heard of last.
    heard_at: Option<Instant>,
}

impl Feed {
    /// Nothing is under way with it.
    fn is_idle(&self) -> bool {
        self.slot.is_none() && self.writing.is_none() && self.queue.is_empty()
    }

    /// A maintainer is on its way to a node or away from it, or is being stopped.
    fn is_changing(&self) -> bool {
        self.slot.as_ref().is_some_and(|slot| !slot.finishing)
    }

    fn replicates_on(&self, node: &NodeId) -> bool {
        self.changefeed.group() == Group::Replicating && self.changefeed.node() == Some(node)
    }

    /// The node that it is about to be given to, once a larger epoch is durable.
    fn coming(&self) -> Option<&NodeId> {
        match self.writing.as_ref().or(self.queue.front())? {
            Write::BumpForAdd { dest } | Write::BumpForMove { dest, .. } => Some(dest),
            Write::Create { .. }
            | Write::BumpForRestart { .. }
            | Write::State { .. }
            | Write::Pause { .. }
            | Write::Resume { .. }
            | Write::Update { .. }
            | Write::Removing { .. }
            | Write::StopDone { .. }
            | Write::DropRetention { .. }
            | Write::Delete => None,
        }
    }

    /// The node that it is moving away from.
    fn leaving(&self) -> Option<&NodeId> {
        match (&self.slot, self.writing.as_ref().or(self.queue.front())) {
            (Some(slot), _) => slot.operator.moves_from(),
            (None, Some(Write::BumpForMove { origin, .. })) => Some(origin),
            (None, _) => None,
        }
    }

    /// Where it counts as load: its destination, if it has one.
    fn home(&self) -> Option<&NodeId> {
        match self.slot.as_ref().map(|slot| &slot.operator) {
            Some(Operator::Move { dest, .. }) => Some(dest),
            Some(Operator::Add { .. } | Operator::Stop { .. }) | None => {
                self.coming().or_else(|| self.changefeed.node())
            }
        }
    }
}

/// A write that failed and is tried again.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Retry {
    at: Instant,
    failures: u32,
    why: String,
}

/// The decisions of one elected coordinator.
#[derive(Debug)]
pub struct Core {
    me: NodeId,
    version: i64,
    config: CoordinatorConfig,
    members: BTreeSet<NodeId>,
    nodes: BTreeMap<NodeId, NodeRecord>,
    bootstrapper: Bootstrapper<CoordinatorBootstrapResponse>,
    /// Loaded changefeeds, until every node has answered too.
    loaded: Option<Vec<Stored>>,
    initialized: bool,
    feeds: BTreeMap<ChangefeedId, Feed>,
    /// Ids by keyspace and name, those of changefeeds under creation included.
    names: BTreeMap<(Arc<str>, Arc<str>), ChangefeedId>,
    creating: BTreeMap<ChangefeedId, (OpId, Box<ChangefeedInfo>)>,
    /// Maintainers of unknown changefeeds were told to stop at this time.
    unknown_told: BTreeMap<(ChangefeedId, NodeId), Instant>,
    /// Since when each member speaks, and when it did last.
    voices: BTreeMap<NodeId, silence::Voice>,
    saving: bool,
    drain: Drain,
    /// Requests to drain that wait for the session to be durable.
    drain_ops: Vec<OpId>,
    /// Requests to cancel that wait for the end to be durable.
    cancel_ops: Vec<OpId>,
    /// The node that was emptied last, when several are.
    drain_cursor: Option<NodeId>,
    /// When a node was seen leaving last.
    leaving_seen: Option<Instant>,
    /// When nodes are evened out next.
    balance_at: Option<Instant>,
    out: Vec<Action>,
}

/// The persisted checkpoint is repeated after this time, because a message may be lost.
const TELL_CHECKPOINT: Duration = Duration::from_secs(5);
/// A maintainer that should not exist is told so at most this often.
const TELL_STALE: Duration = Duration::from_secs(1);
/// First wait after a failed write.
const FIRST_RETRY: Duration = Duration::from_millis(250);
/// Longest wait after a failed write.
const LONGEST_RETRY: Duration = Duration::from_secs(30);

impl Core {
    /// The coordinator of this generation, on node `me`; nothing is known yet.
    #[must_use]
    pub fn new(me: NodeId, version: u64, config: CoordinatorConfig) -> Self {
        Self {
            me,
            version: i64::try_from(version).unwrap_or(i64::MAX),
            config,
            members: BTreeSet::new(),
            nodes: BTreeMap::new(),
            bootstrapper: Bootstrapper::default(),
            loaded: None,
            initialized: false,
            feeds: BTreeMap::new(),
            names: BTreeMap::new(),
            creating: BTreeMap::new(),
            unknown_told: BTreeMap::new(),
            voices: BTreeMap::new(),
            saving: false,
            drain: Drain { durable: Some(DrainDoc::default()), ..Drain::default() },
            drain_ops: Vec::new(),
            cancel_ops: Vec::new(),
            drain_cursor: None,
            leaving_seen: None,
            balance_at: None,
            out: Vec::new(),
        }
    }

    /// Whether every node was heard and every changefeed loaded.
    #[must_use]
    pub fn is_initialized(&self) -> bool {
        self.initialized
    }

    /// Half a second passed, or so.
    pub fn on_tick(&mut self, now: Instant) -> Vec<Action> {
        for node in self.bootstrapper.resend(now) {
            self.ask(node);
        }
        if self.initialized {
            self.resend_due(now);
            let ids: Vec<ChangefeedId> = self.feeds.keys().cloned().collect();
            for id in &ids {
                self.pump(id, now);
                self.tell_checkpoint(id, now, false);
            }
            self.save_checkpoints();
            self.look_for_silence(now);
            self.drain_tick(now);
            self.schedule(now);
            self.balance(now);
            self.unknown_told.retain(|_, at| now.duration_since(*at) < 10 * TELL_STALE);
        }
        std::mem::take(&mut self.out)
    }

    /// The set of registered nodes is `alive` now.
    pub fn on_nodes(&mut self, alive: BTreeSet<NodeId>, now: Instant) -> Vec<Action> {
        self.on_drain_members(&alive, now);
        let change = self.bootstrapper.on_nodes(&alive, now);
        self.members = alive;
        for node in change.added {
            self.ask(node);
        }
        for gone in &change.removed {
            self.nodes.remove(gone);
            self.voices.remove(gone);
            self.on_node_removed(gone, now);
        }
        if change.completed {
            self.try_finish_bootstrap(now);
        }
        self.schedule(now);
        std::mem::take(&mut self.out)
    }

    /// A message arrived.
    pub fn on_message(&mut self, from: &NodeId, message: ToCoordinator, now: Instant) -> Vec<Action> {
        self.on_voice(from, now);
        match message {
            ToCoordinator::BootstrapResponse(answer) => self.on_bootstrap_response(from, answer, now),
            ToCoordinator::MaintainerHeartbeat(statuses) => {
                if self.initialized && self.bootstrapper.has_answered(from) {
                    for status in &statuses {
                        self.on_status(from, status, now);
                    }
                }
            }
            ToCoordinator::NodeHeartbeat(heartbeat) => {
                if self.on_liveness(from, heartbeat.node_epoch, heartbeat.liveness, now) {
                    self.on_drain_applied(from, heartbeat.drain_target, heartbeat.drain_epoch, now);
                }
            }
            ToCoordinator::SetNodeLivenessResponse(response) => {
                self.on_liveness(from, response.node_epoch, response.applied, now);
            }
        }
        self.schedule(now);
        std::mem::take(&mut self.out)
    }

    /// Only members are remembered, so that a late message of a node that left revives nothing. Within one
    /// process liveness only moves forward.
    fn on_liveness(&mut self, from: &NodeId, epoch: u64, liveness: NodeLiveness, now: Instant) -> bool {
        let news = self.members.contains(from)
            && self.nodes.entry(from.clone()).or_default().observe(epoch, liveness, now);
        if news && liveness == NodeLiveness::Stopping {
            self.on_node_stopping(from, now);
        }
        news
    }

    /// A node that is stopping refuses every start, and nobody is told. Whatever was to start there goes elsewhere
    /// once the node has said that it does not run, for it may have taken the start before.
    fn on_node_stopping(&mut self, node: &NodeId, now: Instant) {
        let starting = |feed: &Feed| match feed.slot.as_ref().map(|slot| &slot.operator)? {
            Operator::Add { dest, epoch } | Operator::Move { dest, epoch, phase: MovePhase::Adding, .. } => {
                (dest == node).then_some(*epoch)
            }
            Operator::Move { phase: MovePhase::Removing, .. } | Operator::Stop { .. } => None,
        };
        let refused: Vec<(ChangefeedId, Option<MaintainerEpoch>)> =
            self.feeds.iter().filter_map(|(id, feed)| Some((id.clone(), starting(feed)?))).collect();
        for (id, epoch) in refused {
            if let Some(feed) = self.feeds.get_mut(&id) {
                feed.changefeed.mark_absent();
            }
            self.stop(&id, Some(node.clone()), false, epoch, now);
        }
    }

    fn ask(&mut self, to: NodeId) {
        let request = heartbeatpb::CoordinatorBootstrapRequest { version: self.version };
        self.out.push(Action::Send { to, message: ToMaintainerManager::CoordinatorBootstrap(request) });
    }

    fn on_node_removed(&mut self, gone: &NodeId, now: Instant) {
        let (mut ended, mut handed_over, mut strays) = (Vec::new(), Vec::new(), Vec::new());
        let mut lost = Vec::new();
        for (id, feed) in &mut self.feeds {
            let stops = feed.slot.as_ref().is_some_and(|slot| matches!(slot.operator, Operator::Stop { .. }));
            if stops && feed.replicates_on(gone) {
                // The stop is that of a stale maintainer elsewhere; the current one is gone.
                feed.changefeed.mark_absent();
            }
            let stray = feed.stale_told.remove(gone).is_some();
            if stray && feed.is_idle() && feed.changefeed.group() == Group::Stopped {
                strays.push((id.clone(), feed.changefeed.info.epoch));
            }
            match feed.slot.as_mut().map(|slot| (slot.operator.on_node_removed(gone), slot)) {
                None if feed.changefeed.node() == Some(gone) => feed.changefeed.mark_absent(),
                None | Some((NodeLoss::Unaffected, _)) => {}
                Some((NodeLoss::StopLost, slot)) if slot.finishing => {}
                Some((NodeLoss::StopLost, _)) => lost.push(id.clone()),
                Some((NodeLoss::OriginGone, _)) => handed_over.push(id.clone()),
                Some((NodeLoss::Cancelled, _)) => {
                    feed.changefeed.mark_absent();
                    ended.push(id.clone());
                }
            }
        }
        for id in ended {
            self.end_slot(&id, now);
        }
        for id in handed_over {
            self.hand_over(&id, now);
        }
        for id in lost {
            self.on_stop_lost(&id, now);
        }
        for (id, epoch) in strays {
            // A maintainer that a late command brought back is gone with its node; what it had elsewhere is not.
            self.stop(&id, None, false, epoch, now);
        }
        self.resend_due(now);
    }

    /// The origin of a move is gone or has stopped: only now the changefeed belongs to the destination (CO-4).
    fn hand_over(&mut self, id: &ChangefeedId, now: Instant) {
        let Some(feed) = self.feeds.get_mut(id) else { return };
        let Some(slot) = &mut feed.slot else { return };
        feed.changefeed.bind(slot.operator.node().clone());
        slot.resend_at = now;
        self.resend(id, now);
    }

    /// Sends the commands that are due, the one that has waited longest first.
    fn resend_due(&mut self, now: Instant) {
        let slot =
            |feed: &Feed| feed.slot.as_ref().filter(|slot| slot.resend_at <= now).map(|slot| slot.resend_at);
        let mut due: Vec<(Instant, ChangefeedId)> =
            self.feeds.iter().filter_map(|(id, feed)| Some((slot(feed)?, id.clone()))).collect();
        due.sort();
        for (_, id) in due {
            self.resend(&id, now);
        }
    }

    /// Sends the command of the changefeed's operator if it is due.
    fn resend(&mut self, id: &ChangefeedId, now: Instant) {
        let Some(feed) = self.feeds.get_mut(id) else { return };
        let Some(slot) = &mut feed.slot else { return };
        if slot.due(now) {
            let (to, message) = (slot.operator.node().clone(), slot.operator.message(&feed.changefeed));
            self.out.push(Action::Send { to, message });
        }
    }

    fn begin(&mut self, id: &ChangefeedId, operator: Operator, now: Instant) {
        let Some(feed) = self.feeds.get_mut(id) else { return };
        self.out.push(Action::Count { kind: operator.kind(), took: None });
        if let Some(old) = feed.slot.replace(Slot::new(operator, now)) {
            let took = Some(now.duration_since(old.since));
            self.out.push(Action::Count { kind: old.operator.kind(), took });
        }
        self.resend(id, now);
    }

    fn end_slot(&mut self, id: &ChangefeedId, now: Instant) {
        let Some(slot) = self.feeds.get_mut(id).and_then(|feed| feed.slot.take()) else { return };
        let took = Some(now.duration_since(slot.since));
        self.out.push(Action::Count { kind: slot.operator.kind(), took });
    }

    /// Tells the maintainer what is durable, when that moved or was not told for a while.
    fn tell_checkpoint(&mut self, id: &ChangefeedId, now: Instant, moved: bool) {
        let Some(feed) = self.feeds.get_mut(id) else { return };
        let Some(node) = feed.changefeed.node() else { return };
        let silent = feed.told_at.is_none_or(|at| now.duration_since(at) >= TELL_CHECKPOINT);
        if feed.changefeed.last_saved == Ts::ZERO || !(moved || silent) || feed.slot.is_some() {
            return;
        }
        let message = heartbeatpb::CheckpointTsMessage {
            changefeed: id.clone(),
            checkpoint: feed.changefeed.last_saved,
        };
        self.out.push(Action::Send { to: node.clone(), message: ToMaintainerManager::CheckpointTs(message) });
        feed.told_at = Some(now);
    }
}

fn key_of(id: &ChangefeedId) -> (Arc<str>, Arc<str>) {
    (Arc::clone(&id.keyspace), Arc::clone(&id.name))
}

fn feed(changefeed: Changefeed) -> Feed {
    Feed {
        changefeed,
        slot: None,
        writing: None,
        queue: VecDeque::new(),
        retry: None,
        removing: false,
        pausing: Vec::new(),
        removals: Vec::new(),
        told_at: None,
        stale_told: BTreeMap::new(),
        next_stop: None,
        heard_at: None,
    }
}
