//! Every decision of a dispatcher manager: messages, events and time in, [`Action`]s out.
//!
//! The one task that owns this is the only one that changes it, so the check of an owner and the effect of its
//! request cannot be separated: the fence needs no lock. Read `ownership.rs`, `schedule.rs`, `merge.rs`, `barrier.rs`,
//! then `report.rs`.

mod barrier;
mod merge;
mod ownership;
mod report;
mod schedule;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use event::{BlockEvent, RowBatch, TableInfo};
use heartbeatpb::config::{PerformanceMode, ReplicaConfig};
use heartbeatpb::{
    BarrierKey, BlockStatusRequest, ChangefeedId, DispatcherConfig, DispatcherId, HeartBeatRequest, NodeId,
    Owner, RunningError, TableSpan, TableSpanBlockStatus, Ts, WallTime, Watermark,
};
use sink::TableStart;

use merge::Merges;
pub(crate) use ownership::{BootstrapStep, CloseStep, PostBootstrapStep};

use crate::Fault;
use crate::arrival::{Arrival, Credit};
use crate::block_status::{self, BlockStatuses};
use crate::dispatcher::{Effect, resolved_time};
use crate::heartbeat::ChangedStatuses;
use crate::journal::Journal;
use crate::progress::{RowEnd, Ticket};
use crate::table::{DispatcherTable, Slot};
use crate::timeline::Timeline;

/// How often an unacknowledged report is repeated.
const RESEND: Duration = Duration::from_secs(5);
/// How often an error is repeated until the manager is closed.
const ERROR_RESEND: Duration = Duration::from_secs(5);
/// How often a heartbeat lists every dispatcher.
const COMPLETE_EVERY: Duration = Duration::from_secs(10);

/// What a core has to know about its changefeed.
#[derive(Clone, Debug)]
pub(crate) struct CoreOptions {
    /// Time between heartbeats.
    pub(crate) heartbeat_interval: Duration,
    /// Time from the first dispatcher to the first heartbeat.
    pub(crate) first_heartbeat: Duration,
    /// Refuse DDLs after which a divided table could not be divided.
    pub(crate) check_splittable: bool,
    /// Whether the sink wants persisted checkpoints.
    pub(crate) wants_checkpoints: bool,
}

impl CoreOptions {
    /// The options that a configuration implies.
    pub(crate) fn of(config: &ReplicaConfig, wants_checkpoints: bool) -> Self {
        let (heartbeat_interval, first_heartbeat) = match config.performance_mode {
            PerformanceMode::Throughput => (Duration::from_millis(200), Duration::from_secs(1)),
            PerformanceMode::LowLatency => (Duration::from_millis(50), Duration::ZERO),
        };
        Self {
            heartbeat_interval,
            first_heartbeat,
            check_splittable: config.scheduler.enable_splittable_check,
            wants_checkpoints,
        }
    }
}

/// An effect that the shell performs, in order.
#[derive(Debug)]
pub(crate) enum Action {
    /// Ask the sink how a dispatcher starts; answer with [`Core::on_dispatcher_opened`].
    OpenDispatcher { id: DispatcherId, span: TableSpan, start_ts: Ts },
    /// Have the sink prepare a table; answer with [`Core::on_table_opened`].
    OpenTable { slot: Slot, id: DispatcherId, table: Arc<TableInfo> },
    /// Hand rows to the sink; answer with [`Core::on_flushed`].
    Write { slot: Slot, id: DispatcherId, batch: RowBatch, ticket: Ticket, credit: Credit },
    /// Wait for earlier rows; answer with [`Core::on_flush_finished`].
    Flush { slot: Slot, id: DispatcherId },
    /// Execute a block event; answer with [`Core::on_block_written`].
    WriteBlock { slot: Slot, event: BlockEvent },
    /// Have the sink forget a dispatcher.
    CloseDispatcher { id: DispatcherId },
    /// Ask the event collector for events.
    Subscribe {
        slot: Slot,
        id: DispatcherId,
        span: TableSpan,
        start_ts: Ts,
        /// Node of the changefeed's log: the owner's.
        event_service: NodeId,
    },
    /// No more events.
    Unsubscribe { slot: Slot, id: DispatcherId },
    /// Rows of an open transaction are durable up to here.
    Copied { id: DispatcherId, end: RowEnd },
    /// Tell the sink the persisted checkpoint.
    PublishCheckpoint { checkpoint: Ts, time: WallTime },
    /// To the owner; what could not leave comes back with [`Core::on_heartbeat_unsent`].
    HeartBeat(HeartBeatRequest),
    /// To the owner; answer with [`Core::on_block_statuses_sent`] or [`Core::on_block_statuses_unsent`].
    BlockStatus(BlockStatusRequest),
    /// An error to the owner.
    ReportError(Fault),
    /// The bootstrap that waited can be answered.
    Bootstrapped(BootstrapStep),
    /// Close everything; answer with [`Core::on_stopped`].
    Stop,
    /// Have the sink remove what it keeps downstream for itself; answer with [`Core::on_forgotten`].
    Forget,
}

/// Whether the manager works.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Life {
    /// It works.
    Open,
    /// The write path is closed; background work is ending.
    Closing,
    /// Everything has ended.
    Closed,
}

/// Removal of what the sink keeps downstream for a deleted changefeed. Best effort.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Cleanup {
    NotWanted,
    Wanted,
    Running,
    Done,
}

/// A dispatcher whose start the sink is being asked for.
#[derive(Clone, Debug)]
struct Opening {
    config: DispatcherConfig,
    purpose: Purpose,
}

/// Why the sink is asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Purpose {
    /// A bootstrap wants the table trigger.
    Trigger {
        /// Ignore what the downstream knows.
        is_new: bool,
    },
    /// The owner wants a dispatcher.
    Create,
    /// The sources of a merge have let go.
    Merge,
}

/// The local table trigger.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Trigger {
    id: DispatcherId,
    /// Whether the event collector feeds it and checkpoints are forwarded to the sink.
    registered: bool,
}

/// The dispatchers of one changefeed on one node, and who may command them.
#[derive(Debug)]
pub(crate) struct Core {
    id: ChangefeedId,
    options: CoreOptions,
    owner: Owner,
    /// Everything at or before was durable downstream when the owner took over: the log need not go further back.
    durable: Ts,
    life: Life,
    cleanup: Cleanup,
    sink_healthy: bool,
    dispatchers: DispatcherTable,
    /// Dispatchers with an accepted Remove.
    leaving: BTreeSet<Slot>,
    /// Dispatchers in the middle of a large transaction whose durable part has grown.
    copying: BTreeSet<Slot>,
    opening: BTreeMap<DispatcherId, Opening>,
    trigger: Option<Trigger>,
    journal: Journal,
    merges: Merges,
    /// Membership generation: grows with every dispatcher.
    seq: u64,
    latest: Watermark,
    last_synced: Ts,
    changed: ChangedStatuses,
    blocks: BlockStatuses,
    resends: BTreeSet<(Instant, Slot, BarrierKey)>,
    /// The first error, when to repeat it, and how many came later.
    error: Option<(Fault, Instant)>,
    later_errors: u64,
    /// What the sink waits for and tries again by itself; travels with every heartbeat.
    trouble: Option<RunningError>,
    next_heartbeat: Option<Instant>,
    next_complete: Option<Instant>,
    times: Timeline,
    /// Newest checkpoint given to the sink.
    published: Ts,
    effects: Vec<Effect>,
    actions: Vec<Action>,
}

impl Core {
    /// A manager without dispatchers whose owner is the sender of the request that creates it.
    pub(crate) fn new(id: ChangefeedId, owner: Owner, start_ts: Ts, options: CoreOptions) -> Self {
        Self {
            id,
            options,
            owner,
            durable: start_ts,
            life: Life::Open,
            cleanup: Cleanup::NotWanted,
            sink_healthy: true,
            dispatchers: DispatcherTable::default(),
            leaving: BTreeSet::new(),
            copying: BTreeSet::new(),
            opening: BTreeMap::new(),
            trigger: None,
            journal: Journal::default(),
            merges: Merges::default(),
            seq: 0,
            latest: Watermark { checkpoint: start_ts, resolved: start_ts, seq: 0, last_synced: Ts::ZERO },
            last_synced: Ts::ZERO,
            changed: ChangedStatuses::default(),
            blocks: BlockStatuses::default(),
            resends: BTreeSet::new(),
            error: None,
            later_errors: 0,
            trouble: None,
            next_heartbeat: None,
            next_complete: None,
            times: Timeline::default(),
            published: Ts::ZERO,
            effects: Vec::new(),
            actions: Vec::new(),
        }
    }

    /// What is to be done now, in order.
    pub(crate) fn take_actions(&mut self, into: &mut Vec<Action>) {
        into.append(&mut self.actions);
    }

    pub(crate) fn owner(&self) -> &Owner {
        &self.owner
    }

    pub(crate) fn life(&self) -> Life {
        self.life
    }

    pub(crate) fn latest(&self) -> Watermark {
        self.latest
    }

    pub(crate) fn dispatchers(&self) -> &DispatcherTable {
        &self.dispatchers
    }

    pub(crate) fn has_trigger(&self) -> bool {
        self.trigger.is_some()
    }

    pub(crate) fn error(&self) -> Option<&Fault> {
        self.error.as_ref().map(|(fault, _)| fault)
    }

    /// Statuses of block events that wait to be sent.
    pub(crate) fn waiting_block_statuses(&self) -> usize {
        self.blocks.len()
    }

    /// Wall time of a position.
    pub(crate) fn time_of(&self, ts: Ts) -> Option<WallTime> {
        self.times.time_of(ts)
    }

    /// An event for a dispatcher. One for nobody is dropped: its dispatcher has gone.
    pub(crate) fn on_arrival(&mut self, id: DispatcherId, arrival: Arrival, now: Instant) {
        let Some(slot) = self.dispatchers.slot(id) else { return };
        if let Some((ts, time)) = resolved_time(&arrival) {
            self.times.note(ts, time);
        }
        self.with(slot, now, |dispatcher, effects| dispatcher.on_arrival(arrival, effects));
    }

    /// The sink flushed a batch.
    pub(crate) fn on_flushed(&mut self, slot: Slot, ticket: Ticket) {
        let Some(dispatcher) = self.dispatchers.get_mut(slot) else { return };
        if dispatcher.on_flushed(ticket) {
            self.last_synced = self.last_synced.max(dispatcher.last_synced());
            if dispatcher.durable_part().is_some() {
                self.copying.insert(slot);
            }
            self.settle(slot);
        }
    }

    /// The sink prepared a table, or could not.
    pub(crate) fn on_table_opened(&mut self, slot: Slot, result: Result<(), Fault>, now: Instant) {
        self.with(slot, now, |dispatcher, effects| dispatcher.on_table_opened(result, effects));
    }

    /// Earlier rows are durable, or the flush failed.
    pub(crate) fn on_flush_finished(&mut self, slot: Slot, result: Result<(), Fault>, now: Instant) {
        self.with(slot, now, |dispatcher, effects| dispatcher.on_flush_finished(result, effects));
    }

    /// The downstream executed a block event, or could not.
    pub(crate) fn on_block_written(&mut self, slot: Slot, result: Result<(), Fault>, now: Instant) {
        self.with(slot, now, |dispatcher, effects| dispatcher.on_block_written(result, effects));
        if let Some(dispatcher) = self.dispatchers.get(slot) {
            self.last_synced = self.last_synced.max(dispatcher.last_synced());
        }
    }

    /// The sink ended with an error: nothing will be flushed any more, and nothing is worth waiting for.
    pub(crate) fn on_sink_failed(&mut self, fault: Fault, now: Instant) {
        self.sink_healthy = false;
        self.on_error(fault, now);
        for slot in self.leaving.clone() {
            self.settle(slot);
        }
    }

    /// The sink told how a dispatcher starts.
    pub(crate) fn on_dispatcher_opened(
        &mut self,
        id: DispatcherId,
        asked: Ts,
        result: Result<TableStart, Fault>,
        now: Instant,
    ) {
        let Some(opening) = self.opening.remove(&id) else { return };
        if self.life != Life::Open {
            return;
        }
        if opening.config.start_ts != asked {
            // Removed and created again with another start meanwhile: the answer is to another question.
            self.ask_sink(opening);
            return;
        }
        match opening.purpose {
            Purpose::Trigger { is_new } => self.on_trigger_opened(opening.config, is_new, result, now),
            Purpose::Create => self.on_scheduled_opened(opening.config, result, now),
            Purpose::Merge => self.on_merge_opened(&opening.config, result, now),
        }
    }

    /// Asks the sink how a dispatcher starts, unless it is being asked already: then its answer is looked at again.
    fn ask_sink(&mut self, opening: Opening) {
        let DispatcherConfig { dispatcher: id, ref span, start_ts, .. } = opening.config;
        let action = Action::OpenDispatcher { id, span: span.clone(), start_ts };
        if self.opening.insert(id, opening).is_none() {
            self.actions.push(action);
        }
    }

    /// What the sink waits for and tries again by itself.
    pub(crate) fn trouble(&self) -> Option<&RunningError> {
        self.trouble.as_ref()
    }

    /// The sink waits for something and tries again by itself, or does not any more.
    pub(crate) fn on_trouble(&mut self, trouble: Option<RunningError>) {
        self.trouble = trouble;
    }

    /// Does what is due.
    pub(crate) fn on_tick(&mut self, now: Instant) {
        if self.life != Life::Open {
            return;
        }
        if self.next_heartbeat.is_some_and(|at| at <= now) {
            self.aggregate(now);
            self.next_heartbeat = Some(now + self.options.heartbeat_interval);
        }
        self.give_up_late_merges(now);
        if let Some((statuses, watermark)) = self.changed.take(self.latest, now) {
            self.send_heartbeat(statuses, watermark, false);
        }
        self.resend(now);
        self.actions.extend(self.blocks.take(&self.id, now).into_iter().map(Action::BlockStatus));
        self.repeat_error(now);
    }

    /// When [`Core::on_tick`] has something to do next.
    pub(crate) fn next_wakeup(&self) -> Option<Instant> {
        if self.life != Life::Open {
            return None;
        }
        let resend = self.resends.first().map(|(at, ..)| *at);
        let error = self.error.as_ref().map(|(_, at)| *at);
        let merge = self.merges.deadline();
        [self.next_heartbeat, self.changed.deadline(), self.blocks.deadline(), resend, error, merge]
            .into_iter()
            .flatten()
            .min()
    }

    /// Lets a dispatcher handle something and does what it wants.
    fn with(
        &mut self,
        slot: Slot,
        now: Instant,
        step: impl FnOnce(&mut crate::dispatcher::Dispatcher, &mut Vec<Effect>),
    ) {
        let mut effects = std::mem::take(&mut self.effects);
        if let Some(dispatcher) = self.dispatchers.get_mut(slot) {
            step(dispatcher, &mut effects);
            for effect in effects.drain(..) {
                self.perform(slot, effect, now);
            }
            self.settle(slot);
        }
        self.effects = effects;
    }

    fn perform(&mut self, slot: Slot, effect: Effect, now: Instant) {
        let Some(dispatcher) = self.dispatchers.get(slot) else { return };
        let (id, mode) = (dispatcher.id, dispatcher.mode);
        match effect {
            Effect::OpenTable(table) => self.actions.push(Action::OpenTable { slot, id, table }),
            Effect::Write(batch, ticket, credit) => {
                self.actions.push(Action::Write { slot, id, batch, ticket, credit });
            }
            Effect::Flush => self.actions.push(Action::Flush { slot, id }),
            Effect::WriteBlock(event) => self.actions.push(Action::WriteBlock { slot, event }),
            Effect::Working => {
                let status = report::status_of(dispatcher, dispatcher.state);
                self.changed.push(status, now);
            }
            Effect::Report(state) => {
                self.resends.insert((now + RESEND, slot, state.key));
                self.blocks.push(TableSpanBlockStatus { id, mode, state }, now);
            }
            Effect::Repeat(state) => {
                self.blocks.push(TableSpanBlockStatus { id, mode, state }, now);
            }
            Effect::Done(key) => {
                self.blocks.push(block_status::done(id, mode, key), now);
            }
            Effect::SchemaMoved { old, new } => self.dispatchers.move_schema(slot, old, new),
            Effect::Fail(fault) => self.on_error(fault, now),
        }
    }

    /// Copies a dispatcher's progress out, and lets it go if it is to go and can.
    fn settle(&mut self, slot: Slot) {
        self.dispatchers.refresh(slot);
        self.advance_merge_of(slot);
        if !self.leaving.contains(&slot) {
            return;
        }
        let healthy = self.sink_healthy;
        if let Some(dispatcher) = self.dispatchers.get_mut(slot)
            && !dispatcher.removing
            && dispatcher.can_close(healthy)
        {
            dispatcher.remove();
        }
    }

    fn resend(&mut self, now: Instant) {
        while let Some(&(at, slot, key)) = self.resends.first()
            && at <= now
        {
            self.resends.pop_first();
            let Some(dispatcher) = self.dispatchers.get(slot) else { continue };
            let Some(state) = dispatcher.unacknowledged(key).cloned() else { continue };
            let (id, mode) = (dispatcher.id, dispatcher.mode);
            self.resends.insert((now + RESEND, slot, key));
            if heartbeatpb::Rule::BlockResend.holds() {
                self.blocks.push(TableSpanBlockStatus { id, mode, state }, now);
            }
        }
    }

    /// Whether a request of `(from, epoch)` may act, with the line for people when it may not.
    fn is_allowed(&self, what: &str, from: &NodeId, epoch: Option<heartbeatpb::MaintainerEpoch>) -> bool {
        let allowed = self.life == Life::Open
            && (self.owner.allows(from, epoch) || !heartbeatpb::Rule::OwnerFence.holds());
        if !allowed {
            tracing::debug!(
                changefeed = %self.id, %from, ?epoch, owner = ?self.owner, life = ?self.life,
                "dropped a {what} that is not the owner's"
            );
        }
        allowed
    }
}
