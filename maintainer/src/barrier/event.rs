//! One event that dispatchers wait for each other at.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use heartbeatpb::{
    AddedTable, BarrierKey, BlockState, DispatcherId, InfluencedTables, SchemaChange, TableId, Ts,
};
use replica::{SpanReplica, SpanSet};

use super::cost::step;
use super::coverage::Coverage;

/// How far an event is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stage {
    /// Somebody has yet to arrive.
    Waiting,
    /// Everybody is there; the writer was told to write. `written`: it has, and what the event means for the
    /// tables waits for earlier events.
    Selected { writer: Option<DispatcherId>, written: bool },
    /// Written and applied: everybody may pass.
    Advanced { writer: Option<DispatcherId> },
}

#[derive(Clone, Debug)]
pub(super) struct Event {
    pub(super) key: BarrierKey,
    pub(super) influence: InfluencedTables,
    pub(super) dropped: Option<InfluencedTables>,
    pub(super) added: Vec<AddedTable>,
    pub(super) schema_changes: Vec<SchemaChange>,
    /// False: executed already; it only waits until what it means for the tables may be applied.
    pub(super) blocking: bool,
    pub(super) trigger_related: bool,
    /// Somebody is past it, and it has to wait for its turn among changes of tables.
    pub(super) proven: bool,
    pub(super) stage: Stage,
    /// Who waits. Which tables have to is known from the start, or once the table trigger arrives.
    pub(super) waiting: Option<Coverage>,
    pub(super) arrived: BTreeSet<DispatcherId>,
    /// Who has passed, once selected.
    pub(super) done: Coverage,
    pub(super) passed: BTreeSet<DispatcherId>,
    pub(super) last_resend: Option<Instant>,
    pub(super) last_status: Instant,
    pub(super) pass_sent: bool,
    pub(super) since: Instant,
    pub(super) warned_at: Instant,
}

impl Event {
    /// An event as a dispatcher describes it; `None` when the description cannot be used.
    pub(super) fn of(state: &BlockState, now: Instant) -> Option<Self> {
        let influence = match (&state.blocked, state.is_blocked) {
            (Some(influence), _) => influence.clone(),
            (None, false) => InfluencedTables::Normal(vec![TableId::DDL]),
            (None, true) => return None,
        };
        if matches!(state.dropped, Some(InfluencedTables::All)) {
            return None;
        }
        let waiting = match &influence {
            InfluencedTables::Normal(tables) => Some(Coverage::of(tables.iter().copied())),
            InfluencedTables::Schema(_) | InfluencedTables::All => None,
        };
        Some(Self {
            key: state.key,
            influence,
            dropped: state.dropped.clone(),
            added: state.added.clone(),
            schema_changes: state.schema_changes.clone(),
            blocking: state.is_blocked,
            trigger_related: false,
            proven: false,
            stage: Stage::Waiting,
            waiting,
            arrived: BTreeSet::new(),
            done: Coverage::default(),
            passed: BTreeSet::new(),
            last_resend: None,
            last_status: now,
            pass_sent: false,
            since: now,
            warned_at: now,
        })
    }

    /// Whether it changes which tables exist or where they belong.
    pub(super) fn needs_schedule(&self) -> bool {
        self.dropped.is_some() || !self.added.is_empty() || !self.schema_changes.is_empty()
    }

    /// The commit ts that holds the checkpoint until the new tables do.
    pub(super) fn holds_checkpoint(&self) -> Option<Ts> {
        (!self.added.is_empty()).then_some(self.key.commit_ts)
    }

    /// Whether it concerns a schema or everything, so that the table trigger decides who takes part.
    pub(super) fn is_wide(&self) -> bool {
        match self.influence {
            InfluencedTables::Schema(_) | InfluencedTables::All => true,
            InfluencedTables::Normal(_) => false,
        }
    }

    /// The tables that take part, as the desired state is now.
    pub(super) fn participants(&self, spans: &SpanSet) -> Coverage {
        match &self.influence {
            InfluencedTables::Normal(tables) => Coverage::of(tables.iter().copied()),
            InfluencedTables::Schema(schema) => {
                Coverage::of(spans.by_schema(*schema).map(|span| span.span.table).chain([TableId::DDL]))
            }
            InfluencedTables::All => {
                Coverage::of(spans.all().map(|span| span.span.table).chain([TableId::DDL]))
            }
        }
    }

    /// Notes that a dispatcher waits.
    pub(super) fn arrive(&mut self, span: &SpanReplica, is_trigger: bool, spans: &SpanSet) {
        self.arrived.insert(span.id);
        self.trigger_related |= is_trigger;
        match &mut self.waiting {
            Some(waiting) => waiting.add(&span.span),
            None if is_trigger => self.waiting = Some(self.rebuilt(&self.arrived, spans)),
            None => {}
        }
    }

    /// Notes that a dispatcher has passed.
    pub(super) fn pass(&mut self, span: &SpanReplica) {
        self.passed.insert(span.id);
        self.done.add(&span.span);
    }

    /// Notes that a dispatcher waits that was not there when the writer was chosen: the event is not over before it has
    /// passed, because its report is acknowledged and it will not come again.
    pub(super) fn join(&mut self, span: &SpanReplica, spans: &SpanSet) {
        if self.done.is_open(span.span.table) {
            return;
        }
        if span.span.is_whole() {
            self.done.require(span.span.table);
        } else {
            self.passed.remove(&span.id);
            self.done = self.rebuilt(&self.passed, spans);
            close_gone(&mut self.done, spans);
        }
        self.pass_sent = false;
    }

    /// Whether everybody waits. Dispatchers that are gone, or do not run any more, do not count.
    pub(super) fn is_complete(&mut self, spans: &SpanSet) -> bool {
        if !heartbeatpb::Rule::EverybodyArrives.holds() {
            return self.waiting.is_some();
        }
        if !self.waiting.as_ref().is_some_and(Coverage::is_full) {
            return false;
        }
        if prune(&mut self.arrived, spans) {
            let waiting = self.rebuilt(&self.arrived, spans);
            self.waiting = Some(waiting);
        }
        let trigger_there =
            !self.is_wide() || spans.trigger().is_some_and(|trigger| self.arrived.contains(&trigger.id));
        trigger_there && self.waiting.as_ref().is_some_and(Coverage::is_full)
    }

    /// Whether tables that are gone were all that a schema-wide event, or one over everything, still waited for: who takes
    /// part was known when the table trigger arrived, and may have been removed since.
    pub(super) fn is_complete_without_gone(&mut self, spans: &SpanSet) -> bool {
        let Some(waiting) = self.waiting.as_mut().filter(|waiting| !waiting.is_full()) else { return false };
        if matches!(self.influence, InfluencedTables::Normal(_)) {
            return false;
        }
        close_gone(waiting, spans);
        self.is_complete(spans)
    }

    /// Whether everybody has passed.
    pub(super) fn is_finished(&mut self, spans: &SpanSet) -> bool {
        if self.stage == Stage::Waiting || !self.done.is_full() {
            return false;
        }
        if prune(&mut self.passed, spans) {
            let mut done = self.rebuilt(&self.passed, spans);
            close_gone(&mut done, spans);
            self.done = done;
        }
        self.done.is_full()
    }

    fn rebuilt(&self, ids: &BTreeSet<DispatcherId>, spans: &SpanSet) -> Coverage {
        let mut coverage = self.participants(spans);
        for span in ids.iter().filter_map(|id| spans.get(*id)) {
            coverage.add(&span.span);
        }
        coverage
    }

    /// Everybody is there: `writer` writes, and from here on only those that have passed count.
    pub(super) fn select(&mut self, writer: Option<DispatcherId>, spans: &SpanSet) {
        self.stage = Stage::Selected { writer, written: false };
        self.done = self.participants(spans);
        self.passed.clear();
        self.pass_sent = false;
    }

    /// Everybody may pass, with the next scan.
    pub(super) fn advance(&mut self) {
        let (Stage::Selected { writer, .. } | Stage::Advanced { writer }) = self.stage else { return };
        self.stage = Stage::Advanced { writer };
        self.last_resend = None;
    }

    /// Nobody has to say any more that a table that is gone has passed.
    pub(super) fn close_gone(&mut self, spans: &SpanSet) {
        close_gone(&mut self.done, spans);
    }

    /// Spans that take part, the table trigger included.
    pub(super) fn related<'a>(&self, spans: &'a SpanSet) -> Vec<&'a SpanReplica> {
        match &self.influence {
            InfluencedTables::Normal(tables) => {
                tables.iter().flat_map(|table| spans.by_table(*table)).collect()
            }
            InfluencedTables::Schema(schema) => {
                spans.by_schema(*schema).chain(spans.trigger()).inspect(|_| step()).collect()
            }
            InfluencedTables::All => spans.all().inspect(|_| step()).collect(),
        }
    }

    /// Whether a span proves that the event was passed under an earlier maintainer. A schema change is part of what a
    /// span at its position has behind it; of a sync point that says nothing, because a span may have been created there.
    pub(super) fn was_passed_by(&self, span: &SpanReplica) -> bool {
        let ts = self.key.commit_ts;
        span.checkpoint > ts
            || (span.checkpoint == ts && !self.key.is_sync_point)
            || span.block.as_ref().is_some_and(|block| {
                block.key.commit_ts > ts
                    || (block.key.commit_ts == ts && block.key.is_sync_point && !self.key.is_sync_point)
            })
    }

    /// Tables that end with the event.
    pub(super) fn ending(&self, spans: &SpanSet) -> Vec<TableId> {
        match &self.dropped {
            None | Some(InfluencedTables::All) => Vec::new(),
            Some(InfluencedTables::Normal(tables)) => tables.clone(),
            Some(InfluencedTables::Schema(schema)) => {
                spans.by_schema(*schema).map(|span| span.span.table).collect()
            }
        }
    }

    /// Whether it waits for a table that a later event has dropped. Under an earlier maintainer that table was past this
    /// event, so it was written; and nobody will come.
    pub(super) fn waits_for_ended(&self, ended: &BTreeMap<TableId, Ts>) -> bool {
        let is_past = |table: TableId| ended.get(&table).is_some_and(|ts| *ts > self.key.commit_ts);
        !ended.is_empty() && self.waiting.as_ref().is_some_and(|waiting| waiting.open().any(is_past))
    }

    /// For people: who has yet to say something.
    pub(super) fn waits_for(&self) -> String {
        let tables = |coverage: &Coverage| {
            let mut open: Vec<String> = coverage.open().take(5).map(|table| table.to_string()).collect();
            let more = coverage.open().count().saturating_sub(open.len());
            if more > 0 {
                open.push(format!("and {more} more"));
            }
            open.join(", ")
        };
        match (self.stage, &self.waiting) {
            (Stage::Waiting, None) => "the table trigger".to_owned(),
            (Stage::Waiting, Some(waiting)) => format!("arrival of tables {}", tables(waiting)),
            (Stage::Selected { written: true, .. }, _) => "earlier schema changes".to_owned(),
            (Stage::Selected { writer, .. }, _) => {
                format!("writing by {}", writer.map_or("nobody".to_owned(), |writer| writer.to_string()))
            }
            (Stage::Advanced { .. }, _) => format!("passing of tables {}", tables(&self.done)),
        }
    }
}

fn close_gone(coverage: &mut Coverage, spans: &SpanSet) {
    let gone: Vec<TableId> = coverage
        .open()
        .filter(|table| match *table {
            TableId::DDL => spans.trigger().is_none(),
            table => !spans.has_table(table),
        })
        .collect();
    for table in gone {
        coverage.close(table);
    }
}

/// Drops dispatchers that are gone or do not run; says whether there were any.
fn prune(ids: &mut BTreeSet<DispatcherId>, spans: &SpanSet) -> bool {
    let before = ids.len();
    ids.retain(|id| {
        step();
        spans.is_trigger(*id) || spans.is_replicating(*id)
    });
    ids.len() != before
}
