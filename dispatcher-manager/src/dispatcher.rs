//! One dispatcher: takes the events of a span in commit order, hands them to the sink, knows how far it is.
//!
//! Synchronous: arrivals, results of I/O and barrier replies in, [`Effect`]s out. At most one piece of I/O is in
//! flight; while it is, arrivals wait in the inbox, which the credits of the collector bound.

mod block;
mod merge;
mod status;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

#[cfg(test)]
pub(crate) use block::key as key_of;
pub(crate) use merge::Rest;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use event::{BlockEvent, DdlEvent, RowBatch, RowOp, TableInfo};
use heartbeatpb::{
    BarrierKey, BlockStage, BlockState, ComponentState, DispatcherConfig, DispatcherId, Mode, SchemaId,
    TableId, TableSpan, Ts, WallTime,
};

use crate::Fault;
use crate::arrival::{Arrival, Credit};
use crate::progress::{RowEnd, TableProgress, Ticket};

/// Rows of one transaction from which on it is worth telling the log how many of them are durable.
const LARGE_PART: u64 = 4096;

/// What a dispatcher wants done. I/O comes back as an `on_*` call.
#[derive(Debug)]
pub(crate) enum Effect {
    /// Tell the sink the shape of the table.
    OpenTable(Arc<TableInfo>),
    /// Hand rows to the sink.
    Write(RowBatch, Ticket, Credit),
    /// Wait until every earlier batch is durable.
    Flush,
    /// Execute a block event downstream.
    WriteBlock(BlockEvent),
    /// The first event arrived: tell the owner.
    Working,
    /// Tell the owner about a block event, and repeat it until it is acknowledged.
    Report(BlockState),
    /// Tell the owner about a block event once more.
    Repeat(BlockState),
    /// A barrier is done here.
    Done(BarrierKey),
    /// The table belongs to another schema now.
    SchemaMoved {
        /// Schema before.
        old: SchemaId,
        /// Schema after.
        new: SchemaId,
    },
    /// The dispatcher cannot go on.
    Fail(Fault),
}

/// Whether the dispatcher takes the next event, and what it waits for if it does not.
#[derive(Debug)]
enum Phase {
    /// Takes events.
    Ready,
    /// The sink prepares the table.
    OpeningTable(Arc<TableInfo>),
    /// Table trigger: waits until the owner knows every earlier schema change.
    Held(BlockEvent),
    /// Earlier rows are being flushed before an event that needs nobody else.
    FlushingAlone(BlockEvent),
    /// Such an event is being executed.
    WritingAlone(BlockEvent),
    /// Earlier rows are being flushed before a barrier.
    Flushing(BlockEvent),
    /// The owner decides.
    Waiting(BlockEvent),
    /// The owner decided that this dispatcher executes the event.
    Writing(BlockEvent),
    /// Failed; takes nothing any more.
    Failed,
}

/// Whether arrivals are taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Intake {
    /// They are.
    Open,
    /// A merge has stopped the dispatcher: they are dropped.
    Stopped,
    /// It goes on after a merge that was given up: what is on its way follows on what was dropped, so nothing is taken
    /// until its stream has begun again.
    UntilBegin,
}

/// A report that the owner has not acknowledged.
#[derive(Debug)]
struct Report {
    state: BlockState,
    /// Whether it counts in `pending_acks`.
    counted: bool,
}

/// An initial copy that was seen to begin.
#[derive(Clone, Copy, Debug)]
struct InitialCopy {
    /// Commit ts of all of its rows.
    at: Ts,
    /// The checkpoint that it began at.
    floor: Ts,
}

/// One dispatcher.
#[derive(Debug)]
pub(crate) struct Dispatcher {
    pub(crate) id: DispatcherId,
    pub(crate) span: TableSpan,
    pub(crate) schema: SchemaId,
    pub(crate) mode: Mode,
    /// Events with a larger commit ts are wanted.
    pub(crate) start_ts: Ts,
    skip_dml_at_start: bool,
    /// Tables of a split span must stay divisible.
    check_splittable: bool,
    pub(crate) state: ComponentState,
    /// A Remove was accepted.
    pub(crate) try_removing: bool,
    /// It let go; the next heartbeat says so and cleans up.
    pub(crate) removing: bool,
    intake: Intake,
    phase: Phase,
    inbox: VecDeque<Arrival>,
    opened: Option<Arc<TableInfo>>,
    progress: TableProgress,
    copy: Option<InitialCopy>,
    resolved: Ts,
    last_synced: Ts,
    flushed_bytes: u64,
    measured_at: Instant,
    /// Bytes and beginning of the window that was measured last.
    measured: (u64, Instant),
    reports: BTreeMap<BarrierKey, Report>,
    /// Table trigger: commit ts of DDLs that add tables which the owner does not know yet.
    blockers: BTreeSet<Ts>,
    /// Table trigger: reports without an acknowledgement, those in preparation included.
    pending_acks: u32,
    last_done: Option<BarrierKey>,
    /// The last DDL that was done here.
    last_ddl: Option<Arc<DdlEvent>>,
}

impl Dispatcher {
    /// A dispatcher that begins after `config.start_ts`.
    pub(crate) fn new(config: &DispatcherConfig, check_splittable: bool, now: Instant) -> Self {
        Self {
            id: config.dispatcher,
            span: config.span.clone(),
            schema: config.schema,
            mode: config.mode,
            start_ts: config.start_ts,
            skip_dml_at_start: config.skip_dml_at_start,
            check_splittable,
            state: ComponentState::Initializing,
            try_removing: false,
            removing: false,
            intake: Intake::Open,
            phase: Phase::Ready,
            inbox: VecDeque::new(),
            opened: None,
            progress: TableProgress::default(),
            copy: None,
            resolved: config.start_ts,
            last_synced: Ts::ZERO,
            flushed_bytes: 0,
            measured_at: now,
            measured: (0, now),
            reports: BTreeMap::new(),
            blockers: BTreeSet::new(),
            pending_acks: 0,
            last_done: None,
            last_ddl: None,
        }
    }

    /// Whether this is the table trigger.
    pub(crate) fn is_trigger(&self) -> bool {
        self.span.table == TableId::DDL
    }

    /// Everything at or before it is durable downstream.
    pub(crate) fn checkpoint(&self) -> Ts {
        let base = match self.progress.checkpoint() {
            None => self.resolved,
            Some(table) if self.progress.is_empty() => table.max(self.resolved),
            Some(table) => table,
        };
        // A copied row holds what was committed before the snapshot: until all are durable, nothing is.
        let base = match self.copy {
            Some(copy) if base < copy.at => copy.floor,
            Some(_) | None => base,
        };
        match self.blockers.first() {
            Some(blocker) => base.min(blocker.before()),
            None => base,
        }
    }

    /// Everything at or before it has arrived.
    pub(crate) fn resolved(&self) -> Ts {
        self.resolved
    }

    /// Largest commit ts flushed.
    pub(crate) fn last_synced(&self) -> Ts {
        self.last_synced
    }

    /// Bytes flushed per second since the last call; 1 when idle, because 0 means "not measured".
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        reason = "an estimate for balancing"
    )]
    pub(crate) fn take_event_size_per_second(&mut self, now: Instant) -> f32 {
        let seconds = now.saturating_duration_since(self.measured_at).as_secs_f64();
        if seconds <= 0.0 {
            return 1.0;
        }
        let bytes = std::mem::take(&mut self.flushed_bytes);
        self.measured = (bytes, std::mem::replace(&mut self.measured_at, now));
        let rate = bytes as f64 / seconds;
        if rate > 0.0 { rate as f32 } else { 1.0 }
    }

    /// The last rate was never heard: its window goes on.
    pub(crate) fn take_event_size_back(&mut self) {
        let (bytes, since) = std::mem::replace(&mut self.measured, (0, self.measured_at));
        self.flushed_bytes += bytes;
        self.measured_at = since;
    }

    /// An event arrived.
    pub(crate) fn on_arrival(&mut self, arrival: Arrival, out: &mut Vec<Effect>) {
        if self.try_removing || self.removing || matches!(self.phase, Phase::Failed) || !self.admits(&arrival)
        {
            return;
        }
        if matches!(self.phase, Phase::Ready) && self.inbox.is_empty() {
            self.handle(arrival, out);
            return;
        }
        // Resolved events hold no credit; only the newest of a run matters.
        if matches!(arrival, Arrival::Resolved { .. })
            && matches!(self.inbox.back(), Some(Arrival::Resolved { .. }))
        {
            self.inbox.pop_back();
        }
        self.inbox.push_back(arrival);
    }

    /// The sink prepared the table, or could not.
    pub(crate) fn on_table_opened(&mut self, result: Result<(), Fault>, out: &mut Vec<Effect>) {
        if !matches!(self.phase, Phase::OpeningTable(_)) {
            return;
        }
        match (std::mem::replace(&mut self.phase, Phase::Ready), result) {
            (Phase::OpeningTable(table), Ok(())) => {
                self.opened = Some(table);
                self.drain(out);
            }
            (_, Err(fault)) => self.fail(fault, out),
            (_, Ok(())) => {}
        }
    }

    /// A batch is durable; says whether anything changed.
    pub(crate) fn on_flushed(&mut self, ticket: Ticket) -> bool {
        let Some(flush) = self.progress.complete(ticket) else { return false };
        self.last_synced = self.last_synced.max(flush.commit_ts);
        self.flushed_bytes += flush.bytes as u64;
        true
    }

    /// Rows of a large transaction in the middle of which the durable part ends: the log need not keep them,
    /// although the checkpoint cannot pass them.
    pub(crate) fn durable_part(&self) -> Option<RowEnd> {
        self.progress.durable().filter(|end| end.rows >= LARGE_PART && end.commit_ts > self.checkpoint())
    }

    /// Whether it can let go now: nothing of it is on its way downstream or being executed, and the owner knows
    /// every table that it announced. A sink that failed flushes nothing more, so nothing is worth waiting for.
    pub(crate) fn can_close(&self, sink_healthy: bool) -> bool {
        !sink_healthy || (self.progress.is_empty() && !self.is_acting())
    }

    fn is_acting(&self) -> bool {
        match self.phase {
            Phase::OpeningTable(_)
            | Phase::FlushingAlone(_)
            | Phase::WritingAlone(_)
            | Phase::Flushing(_)
            | Phase::Writing(_) => true,
            Phase::Ready | Phase::Held(_) | Phase::Waiting(_) | Phase::Failed => false,
        }
    }

    /// It is to let go as soon as it can. What waits in the inbox was never promised to anybody: whoever takes
    /// the span over reads it again. All later arrivals are dropped too, or a resolved event could pass them.
    pub(crate) fn try_remove(&mut self) {
        self.try_removing = true;
        self.inbox.clear();
    }

    /// It lets go: takes nothing more, repeats nothing more. A held event stays held, and what caps the
    /// checkpoint still does: its last word must be true.
    pub(crate) fn remove(&mut self) {
        self.removing = true;
        self.inbox.clear();
        self.reports.clear();
    }

    /// The report of a barrier that the owner has not acknowledged.
    pub(crate) fn unacknowledged(&self, key: BarrierKey) -> Option<&BlockState> {
        self.reports.get(&key).map(|report| &report.state)
    }

    /// The barrier in flight, for a new owner.
    pub(crate) fn block_state(&self) -> Option<BlockState> {
        match &self.phase {
            Phase::Waiting(event) => Some(block::state(event, true, BlockStage::Waiting)),
            Phase::Writing(event) => Some(block::state(event, true, BlockStage::Writing)),
            Phase::Ready
            | Phase::OpeningTable(_)
            | Phase::Held(_)
            | Phase::FlushingAlone(_)
            | Phase::WritingAlone(_)
            | Phase::Flushing(_)
            | Phase::Failed => None,
        }
    }

    /// What the dispatcher waits for, for people.
    pub(crate) fn waits_for(&self) -> String {
        let at = |event: &BlockEvent| block::key(event).commit_ts;
        match &self.phase {
            _ if self.intake == Intake::Stopped => "the merge of its span".into(),
            Phase::Ready if self.progress.is_empty() => "events from the log".into(),
            Phase::Ready => format!("the downstream to flush {} batches", self.progress.len()),
            Phase::OpeningTable(_) => "the downstream to prepare the table".into(),
            Phase::Held(event) => format!("the owner to know all tables before the event at {}", at(event)),
            Phase::FlushingAlone(event) | Phase::Flushing(event) => {
                format!("the downstream to flush the rows before the event at {}", at(event))
            }
            Phase::WritingAlone(event) | Phase::Writing(event) => {
                format!("the downstream to execute the event at {}", at(event))
            }
            Phase::Waiting(event) => format!("the barrier at {}", at(event)),
            Phase::Failed => "a person: it failed".into(),
        }
    }

    fn drain(&mut self, out: &mut Vec<Effect>) {
        while matches!(self.phase, Phase::Ready) && !self.removing {
            let Some(arrival) = self.inbox.pop_front() else { return };
            self.handle(arrival, out);
        }
    }

    fn handle(&mut self, arrival: Arrival, out: &mut Vec<Effect>) {
        match arrival {
            Arrival::Begin(Some(table)) => self.on_table(table, out),
            Arrival::Begin(None) => {}
            Arrival::Rows(batch, credit) => self.on_rows(batch, credit, out),
            Arrival::Resolved { ts, .. } => {
                if ts >= self.start_ts {
                    self.begin_work(out);
                }
                self.resolved = self.resolved.max(ts);
            }
            Arrival::Block(event) => self.on_block_event(event, out),
            Arrival::Failed(fault) => self.fail(fault, out),
        }
    }

    fn on_table(&mut self, table: Arc<TableInfo>, out: &mut Vec<Effect>) {
        // A stream that began again while a DDL was waiting has the shape from before it, which the downstream does
        // not have any more. The next rows bring the new one.
        let outdated = self.last_ddl.as_ref().is_some_and(|ddl| table.version < ddl.commit_ts);
        if outdated {
            return;
        }
        // The downstream may have been behind a rename that the owner does not know: then it never comes.
        let known = table.version <= self.checkpoint() && !self.is_trigger();
        if known && table.schema_id != self.schema {
            let old = std::mem::replace(&mut self.schema, table.schema_id);
            out.push(Effect::SchemaMoved { old, new: table.schema_id });
        }
        if !self.is_open(&table) {
            self.phase = Phase::OpeningTable(Arc::clone(&table));
            out.push(Effect::OpenTable(table));
        }
    }

    fn on_rows(&mut self, batch: RowBatch, credit: Credit, out: &mut Vec<Effect>) {
        let Some(wanted) = self.wanted(&batch) else { return };
        let (Some(first), Some(last)) = (wanted.first_commit_ts(), wanted.txns().last()) else { return };
        if !self.is_open(&wanted.table) {
            // The shape changed in the stream: the sink is told before the rows.
            let table = Arc::clone(&wanted.table);
            self.phase = Phase::OpeningTable(Arc::clone(&table));
            self.inbox.push_front(Arrival::Rows(wanted, credit));
            out.push(Effect::OpenTable(table));
            return;
        }
        self.begin_work(out);
        if wanted.iter().next().is_some_and(|row| row.op == RowOp::CopyStart) {
            self.copy = Some(InitialCopy { at: first, floor: self.checkpoint() });
        }
        let end = RowEnd { commit_ts: last.commit_ts, rows: last.first_row + u64::from(last.rows) };
        let ticket = self.progress.add(first, end, wanted.bytes());
        out.push(Effect::Write(wanted, ticket, credit));
    }

    /// Whether the sink knows this shape. Streams that begin again bring equal shapes in other allocations.
    fn is_open(&mut self, table: &Arc<TableInfo>) -> bool {
        let Some(opened) = &mut self.opened else { return false };
        if Arc::ptr_eq(opened, table) {
            return true;
        }
        let equal = **opened == **table;
        if equal {
            *opened = Arc::clone(table);
        }
        equal
    }

    /// The part of a batch that was not handled before: a stream that was reset repeats events, and a start in
    /// the middle of a DDL's transaction skips its rows. Rows come before a DDL of the same commit ts and are durable
    /// before it is done, so that all rows up to the last one that is done were handled.
    fn wanted(&self, batch: &RowBatch) -> Option<RowBatch> {
        let skip_at_start = self.skip_dml_at_start.then(|| self.start_ts.after());
        let done = self.last_done.map(|done| done.commit_ts);
        let last_unwanted = skip_at_start.max(done).unwrap_or_default().max(self.resolved);
        let txns = batch.txns();
        let unwanted = txns.partition_point(|txn| txn.commit_ts <= last_unwanted);
        if unwanted == 0 {
            return (!txns.is_empty()).then(|| batch.clone());
        }
        let wanted = &txns[unwanted..];
        if wanted.is_empty() {
            return None;
        }
        let rows = txns[..unwanted].iter().map(|txn| u64::from(txn.rows)).sum();
        Some(batch.without_first(rows, wanted.to_vec()))
    }

    fn begin_work(&mut self, out: &mut Vec<Effect>) {
        if self.state == ComponentState::Initializing {
            self.state = ComponentState::Working;
            out.push(Effect::Working);
        }
    }

    fn fail(&mut self, fault: Fault, out: &mut Vec<Effect>) {
        self.phase = Phase::Failed;
        self.inbox.clear();
        out.push(Effect::Fail(fault));
    }
}

/// Wall time of an arrival that tells one.
pub(crate) fn resolved_time(arrival: &Arrival) -> Option<(Ts, WallTime)> {
    match arrival {
        Arrival::Resolved { ts, time } => Some((*ts, *time)),
        Arrival::Begin(_) | Arrival::Rows(..) | Arrival::Block(_) | Arrival::Failed(_) => None,
    }
}
