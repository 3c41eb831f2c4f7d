//! Hand-made events and a printed form of effects, for histories.

use std::sync::Arc;
use std::time::Instant;

use event::{BlockEvent, DdlEvent, DdlKind, SyncPointEvent};
use heartbeatpb::{
    AddedTable, BarrierKey, BlockAction, BlockStage, BlockState, DispatcherConfig, DispatcherId,
    DispatcherStatus, InfluencedDispatchers, InfluencedTables, Mode, SchemaId, TableId, TableSpan, Ts,
    WallTime,
};

use super::{Dispatcher, Effect};
use crate::Fault;
use crate::arrival::{Arrival, Credit};
use crate::progress::Ticket;
pub(crate) use crate::testing::{batch, copy_start, table};

/// Id of a dispatcher in tests.
pub(crate) fn id(n: u64) -> DispatcherId {
    DispatcherId::new(7, n)
}

/// A dispatcher of a whole table.
pub(crate) fn config(n: u64, table: i64, start: u64) -> DispatcherConfig {
    DispatcherConfig {
        span: TableSpan::whole(TableId(table)),
        start_ts: Ts(start),
        dispatcher: id(n),
        schema: SchemaId(if table == 0 { 0 } else { 1 }),
        mode: Mode::Default,
        skip_dml_at_start: false,
    }
}

/// Rows without a credit.
pub(crate) fn rows(commits: &[u64]) -> Arrival {
    Arrival::Rows(batch(commits), Credit::default())
}

/// A resolved event.
pub(crate) fn resolved(ts: u64) -> Arrival {
    Arrival::Resolved { ts: Ts(ts), time: WallTime(0) }
}

/// A DDL that touches nothing but its table.
pub(crate) fn ddl(commit: u64) -> DdlEvent {
    DdlEvent {
        schema_id: SchemaId(1),
        table_id: TableId(1),
        schema: "public".into(),
        table: "t1".into(),
        query: "ALTER TABLE t1 ADD COLUMN c text".into(),
        table_info: Some(table(1, commit)),
        blocked: Some(InfluencedTables::Normal(vec![TableId(1)])),
        ..DdlEvent::new(DdlKind::AlterTable, Ts(commit))
    }
}

/// A DDL that adds a table.
pub(crate) fn adding(commit: u64, tables: &[i64]) -> DdlEvent {
    let added = tables
        .iter()
        .map(|t| AddedTable { table: TableId(*t), schema: SchemaId(1), splittable: false })
        .collect();
    DdlEvent { kind: DdlKind::CreateTable, blocked: None, added, ..ddl(commit) }
}

/// A DDL behind a barrier of every table.
pub(crate) fn wide(commit: u64) -> DdlEvent {
    DdlEvent { kind: DdlKind::Other, blocked: Some(InfluencedTables::All), ..ddl(commit) }
}

/// A DDL as an arrival.
pub(crate) fn block(ddl: DdlEvent) -> Arrival {
    Arrival::Block(BlockEvent::Ddl(Arc::new(ddl)))
}

/// A sync point as an arrival.
pub(crate) fn sync_point(commit: u64) -> Arrival {
    Arrival::Block(BlockEvent::SyncPoint(SyncPointEvent { commit_ts: Ts(commit) }))
}

/// Key of a DDL.
pub(crate) fn key(commit: u64) -> BarrierKey {
    BarrierKey { commit_ts: Ts(commit), is_sync_point: false }
}

/// An instruction to everybody that says nothing yet.
pub(crate) fn status() -> DispatcherStatus {
    DispatcherStatus {
        influenced: Some(InfluencedDispatchers::All { except: None }),
        ack: None,
        ignored: None,
        action: None,
    }
}

/// An acknowledgement.
pub(crate) fn ack(commit: u64) -> DispatcherStatus {
    DispatcherStatus { ack: Some(key(commit)), ..status() }
}

/// An action.
pub(crate) fn act(action: BlockAction, commit: u64) -> DispatcherStatus {
    DispatcherStatus { action: Some((action, key(commit))), ..status() }
}

/// A failure of the downstream.
pub(crate) fn fault() -> Fault {
    Fault { code: "CDC:ErrSinkUnavailable".into(), message: "gone".into(), retryable: true }
}

/// A block state in short.
pub(crate) fn show_state(state: &BlockState) -> String {
    let stage = match state.stage {
        BlockStage::None => "NONE",
        BlockStage::Waiting => "WAITING",
        BlockStage::Writing => "WRITING",
        BlockStage::Done => "DONE",
    };
    let mut text = format!("{stage} {}", show_key(state.key));
    for added in &state.added {
        text.push_str(&format!(" +{}", added.table));
    }
    if let Some(InfluencedTables::Normal(tables)) = &state.dropped {
        tables.iter().for_each(|table| text.push_str(&format!(" -{table}")));
    }
    text
}

/// A key in short.
pub(crate) fn show_key(key: BarrierKey) -> String {
    format!("{}{}", key.commit_ts, if key.is_sync_point { "s" } else { "" })
}

/// Drives one dispatcher and prints what it wants.
pub(crate) struct Bench {
    pub(crate) dispatcher: Dispatcher,
    /// Tickets of the batches handed over, in order.
    pub(crate) tickets: Vec<Ticket>,
    /// Credits of those batches.
    pub(crate) credits: Vec<Credit>,
}

impl Bench {
    /// A dispatcher of table 1 that starts at `start`.
    pub(crate) fn table(start: u64) -> Self {
        Self::of(&config(1, 1, start), false)
    }

    /// A table trigger that starts at `start`.
    pub(crate) fn trigger(start: u64) -> Self {
        Self::of(&config(1, 0, start), false)
    }

    /// A dispatcher of a configuration whose table the sink knows.
    pub(crate) fn of(config: &DispatcherConfig, check_splittable: bool) -> Self {
        let mut bench = Self::fresh(config, check_splittable);
        bench.arrive(Arrival::Begin(Some(table(1, 1))));
        bench.opened();
        bench
    }

    /// A dispatcher that has seen nothing.
    pub(crate) fn fresh(config: &DispatcherConfig, check_splittable: bool) -> Self {
        let dispatcher = Dispatcher::new(config, check_splittable, Instant::now());
        Self { dispatcher, tickets: Vec::new(), credits: Vec::new() }
    }

    fn run(&mut self, step: impl FnOnce(&mut Dispatcher, &mut Vec<Effect>)) -> String {
        let mut out = Vec::new();
        step(&mut self.dispatcher, &mut out);
        let shown: Vec<String> = out.into_iter().map(|effect| self.show(effect)).collect();
        shown.join("; ")
    }

    fn show(&mut self, effect: Effect) -> String {
        match effect {
            Effect::OpenTable(table) => format!("open v{}", table.version),
            Effect::Write(batch, ticket, credit) => {
                self.tickets.push(ticket);
                self.credits.push(credit);
                let commits: Vec<String> = batch.txns().iter().map(|txn| txn.commit_ts.to_string()).collect();
                format!("write {}", commits.join(","))
            }
            Effect::Flush => "flush".into(),
            Effect::WriteBlock(event) => format!("execute {}", show_key(super::block::key(&event))),
            Effect::Working => "working".into(),
            Effect::Report(state) => show_state(&state),
            Effect::Repeat(state) => format!("again {}", show_state(&state)),
            Effect::Done(key) => format!("DONE {}", show_key(key)),
            Effect::SchemaMoved { old, new } => format!("schema {old}>{new}"),
            Effect::Fail(fault) => format!("fail {}", fault.code),
        }
    }

    pub(crate) fn arrive(&mut self, arrival: Arrival) -> String {
        self.run(|dispatcher, out| dispatcher.on_arrival(arrival, out))
    }

    pub(crate) fn status(&mut self, status: &DispatcherStatus) -> String {
        self.run(|dispatcher, out| dispatcher.on_status(status, out))
    }

    pub(crate) fn opened(&mut self) -> String {
        self.run(|dispatcher, out| dispatcher.on_table_opened(Ok(()), out))
    }

    pub(crate) fn flush_ok(&mut self) -> String {
        self.run(|dispatcher, out| dispatcher.on_flush_finished(Ok(()), out))
    }

    pub(crate) fn flush_failed(&mut self) -> String {
        self.run(|dispatcher, out| dispatcher.on_flush_finished(Err(fault()), out))
    }

    pub(crate) fn written(&mut self) -> String {
        self.run(|dispatcher, out| dispatcher.on_block_written(Ok(()), out))
    }

    pub(crate) fn write_failed(&mut self) -> String {
        self.run(|dispatcher, out| dispatcher.on_block_written(Err(fault()), out))
    }

    /// The sink flushed the n-th batch.
    pub(crate) fn flushed(&mut self, n: usize) -> bool {
        let ticket = self.tickets[n];
        self.dispatcher.on_flushed(ticket)
    }

    pub(crate) fn checkpoint(&self) -> u64 {
        self.dispatcher.checkpoint().0
    }
}
