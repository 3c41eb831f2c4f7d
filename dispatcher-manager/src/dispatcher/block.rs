//! Block events of one dispatcher: alone, or behind a barrier that the owner directs (dispatcher §15).

use std::sync::Arc;

use event::{BlockEvent, DdlEvent, TableInfo};
use heartbeatpb::{BarrierKey, BlockStage, BlockState, InfluencedTables, codes};

use super::{Dispatcher, Effect, Phase, Report};
use crate::Fault;

/// Identity of an event's barrier.
pub(crate) fn key(event: &BlockEvent) -> BarrierKey {
    match event {
        BlockEvent::Ddl(ddl) => BarrierKey { commit_ts: ddl.commit_ts, is_sync_point: false },
        BlockEvent::SyncPoint(point) => BarrierKey { commit_ts: point.commit_ts, is_sync_point: true },
    }
}

/// What the owner is told about an event.
pub(super) fn state(event: &BlockEvent, is_blocked: bool, stage: BlockStage) -> BlockState {
    let key = key(event);
    match event {
        BlockEvent::Ddl(ddl) => BlockState {
            is_blocked,
            key,
            blocked: ddl.blocked.clone().filter(|_| is_blocked),
            dropped: ddl.dropped.clone(),
            added: ddl.added.clone(),
            schema_changes: if is_blocked { ddl.schema_changes.clone() } else { Vec::new() },
            stage,
            routes: Vec::new(),
        },
        BlockEvent::SyncPoint(_) => BlockState {
            is_blocked,
            key,
            blocked: Some(InfluencedTables::All),
            dropped: None,
            added: Vec::new(),
            schema_changes: Vec::new(),
            stage,
            routes: Vec::new(),
        },
    }
}

fn is_wide(event: &BlockEvent) -> bool {
    match event {
        BlockEvent::SyncPoint(_) => true,
        BlockEvent::Ddl(ddl) => match &ddl.blocked {
            Some(InfluencedTables::All | InfluencedTables::Schema(_)) => true,
            Some(InfluencedTables::Normal(_)) | None => false,
        },
    }
}

/// Whether the owner has to change its tables because of a DDL.
fn changes_schedule(event: &BlockEvent) -> bool {
    let BlockEvent::Ddl(ddl) = event else { return false };
    let drops = match &ddl.dropped {
        Some(InfluencedTables::Normal(tables)) => !tables.is_empty(),
        Some(InfluencedTables::All | InfluencedTables::Schema(_)) => true,
        None => false,
    };
    drops || !ddl.added.is_empty()
}

fn adds_tables(event: &BlockEvent) -> bool {
    matches!(event, BlockEvent::Ddl(ddl) if !ddl.added.is_empty())
}

fn is_executed(event: &BlockEvent) -> bool {
    match event {
        BlockEvent::Ddl(ddl) => !ddl.not_sync,
        BlockEvent::SyncPoint(_) => true,
    }
}

impl Dispatcher {
    pub(super) fn on_block_event(&mut self, event: BlockEvent, out: &mut Vec<Effect>) {
        let key = key(&event);
        // Repeated by a stream that was reset. A sync point may share the ts of a resolved event before it.
        let seen =
            if key.is_sync_point { key.commit_ts < self.resolved } else { key.commit_ts <= self.resolved };
        if seen || self.last_done.is_some_and(|done| key <= done) {
            self.check_repeated(&event, out);
            return;
        }
        if !self.takes_part(&event) {
            return;
        }
        self.begin_work(out);
        if let BlockEvent::Ddl(ddl) = &event
            && let Err(fault) = self.check_ddl(ddl)
        {
            self.fail(fault, out);
            return;
        }
        self.move_schema(&event, out);
        if !self.blocks(&event) {
            self.start_alone(event, out);
        } else if self.is_trigger() && is_wide(&event) && self.pending_acks > 0 {
            // The owner builds the participants of a wide barrier from its tables: it must know all of them.
            self.phase = Phase::Held(event);
        } else {
            self.start_barrier(event, out);
        }
    }

    /// Refuses a second DDL at the commit ts of the one that was done last. One commit ts names one DDL per table: the
    /// barrier, its acknowledgement and the place where a stream goes on know no other name for it, so whoever reads a
    /// log joins several DDLs of one table in one transaction, or gives each a commit ts of its own. Taking the second
    /// for a repetition of the first would lose it without a word.
    fn check_repeated(&mut self, event: &BlockEvent, out: &mut Vec<Effect>) {
        let BlockEvent::Ddl(ddl) = event else { return };
        let Some(last) = self.last_ddl.as_ref().filter(|last| last.commit_ts == ddl.commit_ts) else {
            return;
        };
        if (last.kind, last.table_id, &last.query) != (ddl.kind, ddl.table_id, &ddl.query) {
            let message = format!(
                "two schema changes of {}.{} have the commit ts {}, and one can be replicated",
                ddl.schema, ddl.table, ddl.commit_ts
            );
            let code = codes::SCHEMA_CHANGE_UNSUPPORTED.into();
            self.fail(Fault { code, message, retryable: false }, out);
        }
    }

    /// Whether an event concerns this dispatcher. The log side does not know the schema of every table.
    fn takes_part(&self, event: &BlockEvent) -> bool {
        match event {
            BlockEvent::SyncPoint(_) => true,
            BlockEvent::Ddl(ddl) => match &ddl.blocked {
                Some(InfluencedTables::Schema(schema)) => self.is_trigger() || *schema == self.schema,
                Some(InfluencedTables::Normal(_) | InfluencedTables::All) | None => true,
            },
        }
    }

    fn check_ddl(&self, ddl: &DdlEvent) -> Result<(), Fault> {
        if let Some(error) = &ddl.error {
            return Err(Fault {
                code: codes::SCHEMA_CHANGE_UNSUPPORTED.into(),
                message: error.clone(),
                retryable: false,
            });
        }
        let splittable = ddl.table_info.as_deref().is_none_or(TableInfo::is_divisible);
        if self.check_splittable && !self.span.is_whole() && !splittable {
            return Err(Fault {
                code: codes::TABLE_AFTER_NOT_SPLITABLE.into(),
                message: format!(
                    "table {}.{} is divided into key ranges, but cannot be after the DDL at {}: it needs a primary \
                     key that the log holds and that has an order, and no other unique key; pause the changefeed, \
                     set scheduler.enable-table-across-nodes to false, and resume it",
                    ddl.schema, ddl.table, ddl.commit_ts
                ),
                retryable: false,
            });
        }
        Ok(())
    }

    fn blocks(&self, event: &BlockEvent) -> bool {
        match event {
            BlockEvent::SyncPoint(_) => true,
            BlockEvent::Ddl(ddl) => match &ddl.blocked {
                None => false,
                Some(InfluencedTables::Normal(tables)) => !self.span.is_whole() || tables.len() > 1,
                Some(InfluencedTables::All | InfluencedTables::Schema(_)) => true,
            },
        }
    }

    fn move_schema(&mut self, event: &BlockEvent, out: &mut Vec<Effect>) {
        let BlockEvent::Ddl(ddl) = event else { return };
        if self.is_trigger() {
            return;
        }
        let Some(change) = ddl.schema_changes.iter().find(|change| change.table == self.span.table) else {
            return;
        };
        if change.old != self.schema {
            tracing::debug!(dispatcher = %self.id, expected = %self.schema, got = %change.old, "schema id differs");
        }
        let old = std::mem::replace(&mut self.schema, change.new);
        out.push(Effect::SchemaMoved { old, new: change.new });
    }

    fn start_alone(&mut self, event: BlockEvent, out: &mut Vec<Effect>) {
        if self.is_trigger() && changes_schedule(&event) {
            // Before any I/O: a wide barrier behind this event must see it, and so must the checkpoint.
            self.pending_acks += 1;
            if adds_tables(&event) && heartbeatpb::Rule::NewTableHolds.holds() {
                self.blockers.insert(key(&event).commit_ts);
            }
        }
        self.phase = Phase::FlushingAlone(event);
        out.push(Effect::Flush);
    }

    fn start_barrier(&mut self, event: BlockEvent, out: &mut Vec<Effect>) {
        self.phase = Phase::Flushing(event);
        out.push(Effect::Flush);
    }

    /// Every earlier batch is durable, or the flush failed.
    pub(crate) fn on_flush_finished(&mut self, result: Result<(), Fault>, out: &mut Vec<Effect>) {
        match std::mem::replace(&mut self.phase, Phase::Ready) {
            Phase::FlushingAlone(event) => match result {
                Ok(()) if is_executed(&event) => {
                    out.push(Effect::WriteBlock(event.clone()));
                    self.phase = Phase::WritingAlone(event);
                }
                Ok(()) => self.finish_alone(&event, out),
                Err(fault) => self.undo_alone(&event, fault, out),
            },
            Phase::Flushing(event) => match result {
                Ok(()) => self.wait_for_owner(event, out),
                Err(fault) => self.fail(fault, out),
            },
            other @ (Phase::Ready
            | Phase::OpeningTable(_)
            | Phase::Held(_)
            | Phase::WritingAlone(_)
            | Phase::Waiting(_)
            | Phase::Writing(_)
            | Phase::Failed) => self.phase = other,
        }
    }

    /// The downstream executed the block event, or could not.
    pub(crate) fn on_block_written(&mut self, result: Result<(), Fault>, out: &mut Vec<Effect>) {
        match std::mem::replace(&mut self.phase, Phase::Ready) {
            Phase::WritingAlone(event) => match result {
                Ok(()) => self.finish_alone(&event, out),
                Err(fault) => self.undo_alone(&event, fault, out),
            },
            Phase::Writing(event) => match result {
                Ok(()) => self.finish_barrier(&event, out),
                Err(fault) => self.fail(fault, out),
            },
            other @ (Phase::Ready
            | Phase::OpeningTable(_)
            | Phase::Held(_)
            | Phase::FlushingAlone(_)
            | Phase::Flushing(_)
            | Phase::Waiting(_)
            | Phase::Failed) => self.phase = other,
        }
    }

    fn finish_alone(&mut self, event: &BlockEvent, out: &mut Vec<Effect>) {
        let key = key(event);
        self.executed(event);
        if changes_schedule(event) {
            let state = state(event, false, BlockStage::None);
            self.reports.insert(key, Report { state: state.clone(), counted: self.is_trigger() });
            out.push(Effect::Report(state));
        }
        self.drain(out);
    }

    fn undo_alone(&mut self, event: &BlockEvent, fault: Fault, out: &mut Vec<Effect>) {
        if self.is_trigger() && changes_schedule(event) {
            self.pending_acks = self.pending_acks.saturating_sub(1);
            self.blockers.remove(&key(event).commit_ts);
        }
        self.fail(fault, out);
    }

    fn wait_for_owner(&mut self, event: BlockEvent, out: &mut Vec<Effect>) {
        let counted = self.is_trigger();
        if counted {
            self.pending_acks += 1;
        }
        let state = state(&event, true, BlockStage::Waiting);
        self.reports.insert(key(&event), Report { state: state.clone(), counted });
        self.phase = Phase::Waiting(event);
        out.push(Effect::Report(state));
    }

    /// The barrier is done here. The phase is cleared before the next event is taken, which may block again.
    pub(super) fn finish_barrier(&mut self, event: &BlockEvent, out: &mut Vec<Effect>) {
        let key = key(event);
        self.executed(event);
        self.phase = Phase::Ready;
        out.push(Effect::Done(key));
        self.drain(out);
    }

    fn executed(&mut self, event: &BlockEvent) {
        let key = key(event);
        if let BlockEvent::Ddl(ddl) = event {
            self.last_ddl = Some(Arc::clone(ddl));
        }
        self.progress.pass(key.commit_ts);
        self.last_synced = self.last_synced.max(key.commit_ts);
        self.last_done = Some(key);
    }

    pub(super) fn execute(&mut self, event: BlockEvent, out: &mut Vec<Effect>) {
        if is_executed(&event) {
            out.push(Effect::WriteBlock(event.clone()));
            self.phase = Phase::Writing(event);
        } else {
            self.finish_barrier(&event, out);
        }
    }

    pub(super) fn release_held(&mut self, out: &mut Vec<Effect>) {
        if self.pending_acks > 0 || self.removing {
            return;
        }
        if let Phase::Held(_) = self.phase
            && let Phase::Held(event) = std::mem::replace(&mut self.phase, Phase::Ready)
        {
            self.start_barrier(event, out);
        }
    }
}
