//! The desired state of a changefeed with the operators that bring it about, as core and barrier use it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use heartbeatpb::{
    AddedTable, ChangefeedId, DispatcherId, InfluencedTables, MaintainerEpoch, Mode, SchemaChange, TableId,
    Ts,
};
use operator::{Context, Controller, Effect};
use replica::{SpanReplica, SpanSet, holes};

/// Where ids of new dispatchers come from: randomness is not the core's.
pub(crate) type IdSource = Box<dyn FnMut() -> DispatcherId + Send>;

/// Spans and operators of one mode. They only change together.
pub(crate) struct Placement {
    pub(crate) spans: SpanSet,
    pub(crate) operators: Controller,
    /// Nodes that live.
    pub(crate) alive: BTreeSet<heartbeatpb::NodeId>,
    pub(crate) ids: IdSource,
    /// Whether every table may be divided, whatever is said of it: where, and whether at all, the upstream says.
    pub(crate) divides_all: bool,
    /// Where spans start that are created because nobody covers their keys.
    start: Ts,
    /// Tables that the upstream did not have at the start, although dispatchers of them are still being removed; with
    /// the schema change that created one since, and its commit ts.
    pub(crate) strangers: BTreeMap<TableId, Option<(AddedTable, Ts)>>,
    out: Vec<Effect>,
}

impl Placement {
    /// Nothing but the table trigger.
    pub(crate) fn new(
        changefeed: ChangefeedId,
        epoch: Option<MaintainerEpoch>,
        trigger: SpanReplica,
        ids: IdSource,
    ) -> Self {
        Self {
            start: trigger.checkpoint,
            strangers: BTreeMap::new(),
            spans: SpanSet::new(trigger),
            operators: Controller::new(changefeed, Mode::Default, epoch),
            alive: BTreeSet::new(),
            ids,
            divides_all: false,
            out: Vec::new(),
        }
    }

    /// Lets the operators do something, and repairs what they uncover.
    pub(crate) fn drive<R>(
        &mut self,
        now: Instant,
        f: impl FnOnce(&mut Controller, &mut Context<'_>) -> R,
    ) -> R {
        let before = self.out.len();
        let mut cx = Context { spans: &mut self.spans, alive: &self.alive, now, out: &mut self.out };
        let result = f(&mut self.operators, &mut cx);
        let uncovered: Vec<SpanReplica> = self.out[before..]
            .iter()
            .filter_map(|effect| match effect {
                Effect::Uncovered(span) => Some(span.clone()),
                Effect::Send(..) | Effect::Merge(..) | Effect::Started(_) | Effect::Finished(..) => None,
            })
            .collect();
        for span in uncovered {
            self.cover(&span);
        }
        result
    }

    /// What the operators want done since the last call.
    pub(crate) fn take_effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.out)
    }

    /// Adds spans for the keys of a table that nobody covers.
    fn cover(&mut self, like: &SpanReplica) {
        let table = like.span.table;
        let (schema, splittable, start) = match self.strangers.get(&table) {
            None => (like.schema, like.splittable, self.start),
            Some(Some((added, commit_ts))) => (added.schema, added.splittable, *commit_ts),
            Some(None) => return,
        };
        let missing = holes(table, self.spans.by_table(table).map(|span| &span.span));
        for range in missing {
            let id = (self.ids)();
            let mut span = SpanReplica::absent(id, schema, range, start);
            span.splittable = splittable;
            self.spans.add_absent(span);
        }
    }

    /// Adds spans for the keys of a table that nobody covers, like those that it has.
    pub(crate) fn repair(&mut self, table: TableId) {
        let like = self.spans.by_table(table).next().cloned();
        if let Some(span) = like {
            self.cover(&span);
        }
    }

    /// Carries out what a DDL means for the tables: removals, then additions, then moves to other schemas.
    pub(crate) fn apply(
        &mut self,
        dropped: Option<&InfluencedTables>,
        added: &[AddedTable],
        moved: &[SchemaChange],
        commit_ts: Ts,
        now: Instant,
    ) {
        match dropped {
            // Dropping everything is refused when the event is admitted.
            None | Some(InfluencedTables::All) => {}
            Some(InfluencedTables::Schema(schema)) => {
                self.drive(now, |operators, cx| operators.remove_schema(*schema, cx));
            }
            Some(InfluencedTables::Normal(tables)) => {
                let tables: Vec<TableId> =
                    tables.iter().copied().filter(|table| *table != TableId::DDL).collect();
                self.drive(now, |operators, cx| operators.remove_tables(&tables, cx));
            }
        }
        for table in added {
            // What is left of an earlier owner's dispatchers goes first; then the keys are nobody's.
            if let Some(created) = self.strangers.get_mut(&table.table) {
                *created = Some((*table, commit_ts));
            }
            if !self.spans.has_table(table.table) {
                let id = (self.ids)();
                let splittable = table.splittable || self.divides_all;
                self.spans.add_table(id, table.schema, table.table, splittable, commit_ts);
            }
        }
        for change in moved {
            self.spans.change_schema(change.table, change.new);
            if let Some(Some((table, _))) = self.strangers.get_mut(&change.table) {
                table.schema = change.new;
            }
        }
    }
}
