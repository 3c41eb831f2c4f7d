//! What a statement of the generator is as an event: who takes part, and what becomes of the tables (dataplane §2.3).

use std::sync::Arc;

use event::{DdlEvent, DdlKind, TableInfo};
use heartbeatpb::{AddedTable, InfluencedTables, SchemaChange, SchemaId, TableId, Ts, WallTime};

use super::Feed;
use super::workload::{SchemaStep, Step};
use crate::TableFilter;

/// What a statement does to the tables that somebody wants.
pub(super) struct Described {
    /// `None`: nobody wants to know.
    pub(super) event: Option<DdlEvent>,
    /// The wanted tables of these slots afterwards.
    pub(super) slots: Vec<(usize, Option<Arc<TableInfo>>)>,
}

/// Shapes before and after a statement.
pub(super) struct Shapes<'a> {
    pub(super) before: &'a dyn Fn(usize) -> Option<TableInfo>,
    pub(super) after: &'a dyn Fn(usize) -> Option<TableInfo>,
    pub(super) filter: &'a TableFilter,
}

impl Shapes<'_> {
    fn wants(&self, table: &TableInfo) -> bool {
        self.filter.matches(&table.schema, &table.name)
    }
}

fn normal(tables: &[TableId]) -> Option<InfluencedTables> {
    Some(InfluencedTables::Normal(tables.to_vec()))
}

fn added(table: &TableInfo) -> Vec<AddedTable> {
    vec![AddedTable { table: table.id, schema: table.schema_id, splittable: true }]
}

/// Describes a statement at `commit_ts`.
pub(super) fn describe(step: SchemaStep, commit_ts: Ts, time: WallTime, shapes: &Shapes<'_>) -> Described {
    let blank = |kind: DdlKind, schema_id: SchemaId, schema: &str| DdlEvent {
        start_ts: Feed::start_ts(commit_ts),
        commit_time: time,
        schema_id,
        schema: schema.to_owned(),
        query: step.query.clone(),
        ..DdlEvent::new(kind, commit_ts)
    };
    let of_table = |kind: DdlKind, table: &TableInfo| DdlEvent {
        table_id: table.id,
        table: table.name.clone(),
        ..blank(kind, table.schema_id, &table.schema)
    };
    match &step.what {
        Step::Alter { slot, .. } => one(*slot, shapes, |_, after| {
            let blocked = normal(&[after.id]);
            let table_info = Some(Arc::clone(after));
            Some(DdlEvent { blocked, table_info, ..of_table(DdlKind::AlterTable, after) })
        }),
        Step::Create { slot } => one(*slot, shapes, |_, after| {
            let (blocked, table_info) = (normal(&[TableId::DDL]), Some(Arc::clone(after)));
            Some(DdlEvent {
                blocked,
                added: added(after),
                table_info,
                ..of_table(DdlKind::CreateTable, after)
            })
        }),
        Step::Truncate { slot } => one(*slot, shapes, |before, after| {
            let before = before?;
            Some(DdlEvent {
                blocked: normal(&[before.id, TableId::DDL]),
                dropped: normal(&[before.id]),
                added: added(after),
                table_info: Some(Arc::clone(after)),
                ..of_table(DdlKind::TruncateTable, before)
            })
        }),
        Step::Drop { slot } => {
            let before = (shapes.before)(*slot).filter(|table| shapes.wants(table));
            let event = before.map(|table| DdlEvent {
                blocked: normal(&[table.id, TableId::DDL]),
                dropped: normal(&[table.id]),
                ..of_table(DdlKind::DropTable, &table)
            });
            Described { event, slots: vec![(*slot, None)] }
        }
        Step::Rename { slot } => rename(*slot, shapes, &of_table),
        Step::CreateSchema { id, name } => {
            let event =
                DdlEvent { blocked: normal(&[TableId::DDL]), ..blank(DdlKind::CreateSchema, *id, name) };
            let event = Some(event).filter(|_| shapes.filter.matches_schema(name));
            Described { event, slots: Vec::new() }
        }
        Step::DropSchema { id, name, slots } => {
            let whole = Some(InfluencedTables::Schema(*id));
            let event =
                DdlEvent { blocked: whole.clone(), dropped: whole, ..blank(DdlKind::DropSchema, *id, name) };
            let event = Some(event).filter(|_| shapes.filter.matches_schema(name));
            Described { event, slots: slots.iter().map(|slot| (*slot, None)).collect() }
        }
        Step::Everything { schema, name } => {
            let event = blank(DdlKind::Other, *schema, name);
            let event = DdlEvent { blocked: Some(InfluencedTables::All), ..event };
            let event = Some(event).filter(|_| shapes.filter.matches_schema(name));
            Described { event, slots: Vec::new() }
        }
    }
}

/// A statement on one table that is there afterwards.
fn one(
    slot: usize,
    shapes: &Shapes<'_>,
    event: impl FnOnce(Option<&TableInfo>, &Arc<TableInfo>) -> Option<DdlEvent>,
) -> Described {
    let after = (shapes.after)(slot).filter(|table| shapes.wants(table)).map(Arc::new);
    let before = (shapes.before)(slot);
    let event = after.as_ref().and_then(|after| event(before.as_ref(), after));
    Described { event, slots: vec![(slot, after)] }
}

/// A rename. Its event has the old name, and the new one in its shape.
fn rename(slot: usize, shapes: &Shapes<'_>, of_table: &dyn Fn(DdlKind, &TableInfo) -> DdlEvent) -> Described {
    let (Some(before), Some(after)) = ((shapes.before)(slot), (shapes.after)(slot)) else {
        return Described { event: None, slots: Vec::new() };
    };
    let after = Arc::new(after);
    let event = DdlEvent {
        blocked: normal(&[before.id, TableId::DDL]),
        table_info: Some(Arc::clone(&after)),
        ..of_table(DdlKind::RenameTable, &before)
    };
    let event = match (shapes.wants(&before), shapes.wants(&after)) {
        (false, false) => None,
        (true, true) => {
            let (old, new) = (before.schema_id, after.schema_id);
            let change = (old != new).then_some(SchemaChange { table: after.id, old, new });
            Some(DdlEvent { schema_changes: change.into_iter().collect(), ..event })
        }
        // It goes on under a name that nobody wants.
        (true, false) => Some(DdlEvent { dropped: normal(&[before.id]), ..event }),
        (false, true) => {
            let error = format!(
                "table {}.{} was renamed to {}.{}, which the filter lets through, but its rows were not replicated so \
                 far; let the filter through the old name too, or create the changefeed anew",
                before.schema, before.name, after.schema, after.name
            );
            Some(DdlEvent { blocked: normal(&[TableId::DDL]), error: Some(error), ..event })
        }
    };
    let wanted = shapes.wants(&before) && shapes.wants(&after);
    Described { event, slots: vec![(slot, Some(after).filter(|_| wanted))] }
}
