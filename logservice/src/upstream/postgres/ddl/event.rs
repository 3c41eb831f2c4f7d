//! What a change means for a changefeed: who takes part, what becomes of the table, which statement the target executes
//! (dataplane §2.3).

use std::sync::Arc;

use event::{DdlEvent, DdlKind, TableInfo};
use heartbeatpb::config::{DdlConfig, DdlPolicy};
use heartbeatpb::{AddedTable, InfluencedTables, SchemaChange, SchemaId, TableId, Ts, WallTime};

use super::message::{Change, Notice, ObjectKind, ObjectShape, TableShape};
use super::sequences::{self, SequenceValue};
use super::statement::{self, Obstacle};
use super::{alter, install, object, partition, table};
use crate::upstream::postgres::catalog::CatalogTable;
use crate::upstream::postgres::sql::{ident, qualified};
use crate::{Error, TableFilter};

/// What a changefeed knows when a change comes.
pub(crate) struct Feed<'a> {
    /// Its slot.
    pub(crate) slot: &'a str,
    /// Which tables it wants.
    pub(crate) filter: &'a TableFilter,
    /// What it does about each kind of change.
    pub(crate) policy: &'a DdlConfig,
    /// Whether the change was made before the place where the changefeed is.
    pub(crate) passed: bool,
    /// Whether tables that cannot be replicated are left out.
    pub(crate) ignore_ineligible: bool,
    /// Shape of a table that it follows.
    pub(crate) known: &'a dyn Fn(u32) -> Option<Arc<TableInfo>>,
}

/// Where a change is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Place {
    /// Its commit ts.
    pub(crate) at: Ts,
    /// Wall time of the commit.
    pub(crate) time: WallTime,
}

/// What becomes of a followed table.
#[derive(Debug)]
pub(crate) enum Becomes {
    /// What it was; or nobody follows it.
    Same,
    /// It has this shape from the change on.
    Table(Box<CatalogTable>),
    /// Nobody follows it any more.
    Gone,
}

/// What a change means.
#[derive(Debug)]
pub(crate) struct Meaning {
    /// For the dispatchers; `None` when nobody needs to do anything.
    pub(crate) event: Option<DdlEvent>,
    /// For the reader.
    pub(crate) table: Becomes,
}

/// An answer, or what has to be looked up first.
#[derive(Debug)]
pub(crate) enum Answer {
    /// What the change means.
    Known(Box<Meaning>),
    /// A wanted table that nobody follows: unless that changes soon, or it goes, this is the changefeed's end.
    Unfollowed(Error),
}

const NOTHING: Meaning = Meaning { event: None, table: Becomes::Same };

fn known(meaning: Meaning) -> Result<Answer, Error> {
    Ok(Answer::Known(Box::new(meaning)))
}

fn unsupported(table: String, change: impl Into<String>) -> Error {
    Error::SchemaChange { table, change: change.into() }
}

/// What the catalog has for a change.
#[derive(Default, Debug)]
pub(crate) struct Found {
    /// The table afterwards, where there is one.
    pub(crate) table: Option<CatalogTable>,
    /// The types of a composite type's fields.
    pub(crate) types: Vec<event::TypeDefinition>,
}

/// Says what a change means.
///
/// # Errors
/// When it cannot be followed, or the changefeed's policy says that it must not.
pub(crate) fn meaning(
    notice: &Notice,
    change: &Change,
    found: Found,
    place: Place,
    feed: &Feed<'_>,
) -> Result<Answer, Error> {
    let Meaning { event, table } = match change {
        Change::Untold { what } => {
            return Err(unsupported(format!("after {}", notice.tag), what.clone()));
        }
        // Its reader sees to that.
        Change::Publication { .. } => return known(NOTHING),
        Change::Schema { before, after } => {
            of_schema(notice, before.as_deref(), after.as_deref(), place, feed)
        }
        Change::Object { before, after } => {
            of_object(before.as_deref(), after.as_deref(), &found.types, notice, place, feed)?
        }
        // Its own key says whether they are carried.
        Change::Sequences { values, .. } => return known(of_sequences(values, place)),
        Change::Truncate { table } => of_truncate(table, place, feed),
        Change::Table { before, after: shape } => {
            match of_table(notice, before.as_deref(), shape.as_deref(), found.table, place, feed)? {
                Answer::Known(meaning) => *meaning,
                unfollowed @ Answer::Unfollowed(_) => return Ok(unfollowed),
            }
        }
    };
    let event = event.map(|event| judged(event, change, feed.policy)).transpose()?;
    known(Meaning { event, table })
}

/// The event as the changefeed's policy wants it.
fn judged(event: DdlEvent, change: &Change, policy: &DdlConfig) -> Result<DdlEvent, Error> {
    let (policy, key) = match event.kind {
        _ if matches!(change, Change::Truncate { .. }) => (policy.truncate_table, "truncate-table"),
        DdlKind::CreateSchema => (policy.create_schema, "create-schema"),
        DdlKind::DropSchema => (policy.drop_schema, "drop-schema"),
        DdlKind::CreateTable => (policy.create_table, "create-table"),
        DdlKind::DropTable => (policy.drop_table, "drop-table"),
        DdlKind::RenameTable => (policy.rename_table, "rename-table"),
        DdlKind::AlterTable => (policy.alter_table, "alter-table"),
        DdlKind::TruncateTable => (policy.truncate_table, "truncate-table"),
        DdlKind::Other | _ => (policy.other, "other"),
    };
    match policy {
        DdlPolicy::Apply => Ok(event),
        DdlPolicy::Ignore => Ok(DdlEvent { not_sync: true, ..event }),
        DdlPolicy::Fail => {
            let name = match event.table.is_empty() {
                true => event.schema.clone(),
                false => format!("{}.{}", event.schema, event.table),
            };
            Err(refused(name, key))
        }
    }
}

/// The error of a change in front of which the policy stops the changefeed.
pub(crate) fn refused(name: String, key: &str) -> Error {
    unsupported(name, format!("ddl.{key} is \"fail\"; set it to \"apply\" or \"ignore\" and resume"))
}

fn normal(tables: impl IntoIterator<Item = TableId>) -> Option<InfluencedTables> {
    let mut tables: Vec<TableId> = tables.into_iter().collect();
    // Every change passes the table trigger, which keeps them in order among each other.
    tables.push(TableId::DDL);
    tables.sort_unstable();
    tables.dedup();
    Some(InfluencedTables::Normal(tables))
}

fn blank(kind: DdlKind, place: Place, schema_id: SchemaId, schema: &str) -> DdlEvent {
    DdlEvent {
        commit_time: place.time,
        schema_id,
        schema: schema.to_owned(),
        blocked: normal([]),
        ..DdlEvent::new(kind, place.at)
    }
}

fn of_schema(
    notice: &Notice,
    before: Option<&str>,
    after: Option<&str>,
    place: Place,
    feed: &Feed<'_>,
) -> Meaning {
    let id = SchemaId(i64::from(notice.object));
    let wanted = |name: &str| feed.filter.matches_schema(name);
    let event = match (before, after) {
        (None, Some(name)) if wanted(name) => Some(DdlEvent {
            query: format!("CREATE SCHEMA IF NOT EXISTS {}", ident(name)),
            ..blank(DdlKind::CreateSchema, place, id, name)
        }),
        // Its tables went one by one, each with an event of its own.
        (Some(name), None) if wanted(name) => Some(DdlEvent {
            query: format!(
                "DROP SCHEMA IF EXISTS {}{}",
                ident(name),
                if notice.wide { " CASCADE" } else { "" }
            ),
            ..blank(DdlKind::DropSchema, place, id, name)
        }),
        (Some(old), Some(new)) if old != new && (wanted(old) || wanted(new)) => Some(DdlEvent {
            query: format!("ALTER SCHEMA {} RENAME TO {}", ident(old), ident(new)),
            blocked: Some(InfluencedTables::Schema(id)),
            ..blank(DdlKind::Other, place, id, old)
        }),
        _ => None,
    };
    Meaning { event, table: Becomes::Same }
}

/// Nobody waits for sequences: the table trigger sets them alone.
fn of_sequences(values: &[SequenceValue], place: Place) -> Meaning {
    let Some(first) = values.first() else { return NOTHING };
    let event = DdlEvent {
        table: first.name.clone(),
        query: sequences::set(values),
        ..blank(DdlKind::Other, place, SchemaId::DDL, &first.schema)
    };
    Meaning { event: Some(event), table: Becomes::Same }
}

/// A partition lost its rows, which are those of the table at the top.
fn of_truncate(table: &TableShape, place: Place, feed: &Feed<'_>) -> Meaning {
    let Some(root) = table.root.and_then(|root| (feed.known)(root)) else { return NOTHING };
    let event = DdlEvent {
        table_id: root.id,
        table: table.name.clone(),
        query: partition::truncate(table, &qualified(&root.schema, &root.name)),
        blocked: normal([root.id]),
        ..blank(DdlKind::Other, place, root.schema_id, &root.schema)
    };
    Meaning { event: Some(event), table: Becomes::Same }
}

/// A view, a sequence or a type: any table may be behind it.
fn of_object(
    before: Option<&ObjectShape>,
    after: Option<&ObjectShape>,
    types: &[event::TypeDefinition],
    notice: &Notice,
    place: Place,
    feed: &Feed<'_>,
) -> Result<Meaning, Error> {
    // A table brings its types along, wherever they are.
    let used = notice.users.iter().any(|table| (feed.known)(*table).is_some());
    let wanted = |shape: &ObjectShape| match shape.kind {
        ObjectKind::View | ObjectKind::Sequence => feed.filter.matches(&shape.schema, &shape.name),
        ObjectKind::Enum | ObjectKind::Domain | ObjectKind::Composite | ObjectKind::Range => {
            used || feed.filter.matches_schema(&shape.schema)
        }
    };
    let (before, after) = (before.filter(|shape| wanted(shape)), after.filter(|shape| wanted(shape)));
    let Some(shape) = before.or(after) else { return Ok(NOTHING) };
    let query = match object::change(before, after, types, notice.wide) {
        Ok(query) => query,
        Err(Obstacle(why)) if feed.policy.other == DdlPolicy::Apply => {
            return Err(unsupported(format!("{}.{}", shape.schema, shape.name), why));
        }
        Err(Obstacle(_)) => String::new(),
    };
    let event = DdlEvent {
        table: shape.name.clone(),
        query,
        blocked: Some(InfluencedTables::All),
        ..blank(DdlKind::Other, place, SchemaId::DDL, &shape.schema)
    };
    Ok(Meaning { event: Some(event).filter(|event| !event.query.is_empty()), table: Becomes::Same })
}

fn of_table(
    notice: &Notice,
    before: Option<&TableShape>,
    shape: Option<&TableShape>,
    after: Option<CatalogTable>,
    place: Place,
    feed: &Feed<'_>,
) -> Result<Answer, Error> {
    let id = TableId(i64::from(notice.object));
    let known_now = (feed.known)(notice.object);
    if let Some(meaning) =
        of_partition(notice, before, shape, after.as_ref(), known_now.as_ref(), place, feed)?
    {
        return known(meaning);
    }
    match (known_now, shape.zip(after)) {
        (None, None) => known(NOTHING),
        (None, Some((shape, after))) if is_ours(shape, feed) => {
            let follows = |id: u32| id == notice.object || (feed.known)(id).is_some();
            let event = DdlEvent {
                table_id: id,
                table: shape.name.clone(),
                query: statement::create(shape, &table::definitions(&after), &follows),
                table_info: Some(Arc::clone(&after.info)),
                blocked: normal(referred(shape, feed)),
                added: vec![added(&after)],
                ..blank(DdlKind::CreateTable, place, after.info.schema_id, &shape.schema)
            };
            known(Meaning { event: Some(event), table: Becomes::Table(Box::new(after)) })
        }
        (None, Some((shape, after))) => unfollowed(shape, after, feed),
        (Some(info), None) => {
            let query = before.map(|before| statement::drop(before, notice.wide)).unwrap_or_default();
            let event = DdlEvent {
                table_id: id,
                table: info.name.clone(),
                query,
                blocked: normal([id]),
                dropped: Some(InfluencedTables::Normal(vec![id])),
                ..blank(DdlKind::DropTable, place, info.schema_id, &info.schema)
            };
            known(Meaning { event: Some(event), table: Becomes::Gone })
        }
        (Some(info), Some((shape, after))) => altered(notice, &info, before, shape, after, place, feed),
    }
}

/// Whether the changefeed's publication has the table.
fn is_ours(shape: &TableShape, feed: &Feed<'_>) -> bool {
    shape.published.iter().any(|slot| slot == feed.slot) && feed.filter.matches(&shape.schema, &shape.name)
}

fn added(table: &CatalogTable) -> AddedTable {
    let source = table.source();
    AddedTable { table: source.info.id, schema: source.info.schema_id, splittable: source.splittable }
}

/// Followed tables that foreign keys of a table refer to: the target checks them, so their rows come first.
fn referred(shape: &TableShape, feed: &Feed<'_>) -> Vec<TableId> {
    let refers = shape.constraints.iter().map(|constraint| constraint.refers);
    refers.filter(|id| (feed.known)(*id).is_some()).map(|id| TableId(i64::from(id))).collect()
}

/// A table that the changefeed does not follow, although it may be wanted.
fn unfollowed(shape: &TableShape, after: CatalogTable, feed: &Feed<'_>) -> Result<Answer, Error> {
    let wanted = feed.filter.matches(&shape.schema, &shape.name);
    // What is unlogged is not in the log and never will be.
    if !wanted || feed.passed || shape.persistence != 'p' {
        return known(NOTHING);
    }
    // One that only has rows may come all the same.
    if feed.ignore_ineligible && (after.obstacle.is_some() || shape.parent.is_some()) {
        return known(NOTHING);
    }
    let reason = after.obstacle.unwrap_or_else(|| {
        "it had rows already when it came to be one that can be replicated, and those would be missing"
            .to_owned()
    });
    let reason = format!(
        "{reason}; it was created while the changefeed runs: mend it while it is empty and resume, drop it, filter it \
         out, or set ignore-ineligible-table"
    );
    Ok(Answer::Unfollowed(Error::TableIneligible { table: shape.full_name(), reason }))
}

fn altered(
    notice: &Notice,
    info: &Arc<TableInfo>,
    before: Option<&TableShape>,
    shape: &TableShape,
    after: CatalogTable,
    place: Place,
    feed: &Feed<'_>,
) -> Result<Answer, Error> {
    let named = || format!("{}.{}", info.schema, info.name);
    let Some(before) = before else {
        return Err(unsupported(named(), "what it was before is not known"));
    };
    if shape.parent.is_some() {
        return Err(unsupported(
            named(),
            "it became a partition of a table that is not replicated; detach it, or filter both out",
        ));
    }
    let id = info.id;
    let follows = |id: u32| id == notice.object || (feed.known)(id).is_some();
    let definitions = table::definitions(&after);
    let query = match alter::alter(before, shape, notice, &definitions, &follows) {
        Ok(query) => query,
        Err(Obstacle(why)) if feed.policy.alter_table == DdlPolicy::Apply => {
            return Err(unsupported(named(), why));
        }
        Err(Obstacle(_)) => String::new(),
    };
    let moved = (before.schema_oid, &before.name) != (shape.schema_oid, &shape.name);
    let stays = is_ours(shape, feed);
    // It was not wanted for a while, and comes anew.
    let was_taken_out = notice.tag == install::TAKE_OUT;
    let leaves = !stays && (was_taken_out || !feed.filter.matches(&shape.schema, &shape.name));
    if !stays && !leaves {
        return Err(unsupported(
            named(),
            format!(
                "it is not in publication {:?} any more; remove the changefeed and create it again",
                feed.slot
            ),
        ));
    }
    let (old, new) = (SchemaId(before.schema_oid), after.info.schema_id);
    let kind = if moved { DdlKind::RenameTable } else { DdlKind::AlterTable };
    let mut concerned = referred(shape, feed);
    concerned.push(id);
    let event = DdlEvent {
        table_id: id,
        table: before.name.clone(),
        table_info: Some(Arc::clone(&after.info)),
        blocked: normal(concerned),
        dropped: leaves.then(|| InfluencedTables::Normal(vec![id])),
        schema_changes: if old == new || leaves {
            Vec::new()
        } else {
            vec![SchemaChange { table: id, old, new }]
        },
        // A schema that was renamed has its own event; this one only tells the table's name.
        schema: if old == new { shape.schema.clone() } else { before.schema.clone() },
        not_sync: query.is_empty(),
        query,
        ..blank(kind, place, old, &before.schema)
    };
    let changes = leaves || !event.not_sync || !event.schema_changes.is_empty();
    let event = Some(event).filter(|_| changes);
    let table = if leaves { Becomes::Gone } else { Becomes::Table(Box::new(after)) };
    known(Meaning { event, table })
}

/// A partition of a table that is followed as a whole: its rows come under the root's name. `None`: it is no business of
/// the changefeed, or no partition before and afterwards.
fn of_partition(
    notice: &Notice,
    before: Option<&TableShape>,
    shape: Option<&TableShape>,
    after: Option<&CatalogTable>,
    itself: Option<&Arc<TableInfo>>,
    place: Place,
    feed: &Feed<'_>,
) -> Result<Option<Meaning>, Error> {
    let root_of =
        |shape: Option<&TableShape>| shape.and_then(|shape| shape.root).and_then(|root| (feed.known)(root));
    let (old, new) = (root_of(before), root_of(shape));
    let event = |kind: DdlKind, info: &TableInfo, name: &str, query: String| DdlEvent {
        table_id: info.id,
        table: name.to_owned(),
        query,
        blocked: normal([info.id]),
        ..blank(kind, place, info.schema_id, &info.schema)
    };
    let meaning = |event: DdlEvent, table: Becomes| Ok(Some(Meaning { event: Some(event), table }));
    match ((before, old), (shape, new)) {
        ((Some(was), Some(root)), (is, None)) => {
            let sql = qualified(&root.schema, &root.name);
            let alone = is.zip(after).filter(|(is, _)| is_ours(is, feed));
            if let Some(is) = is.filter(|_| alone.is_none()) {
                tracing::warn!(
                    table = is.full_name(),
                    "a partition was detached, and as a table of its own it is not replicated"
                );
            }
            let follows = |id: u32| id == notice.object || (feed.known)(id).is_some();
            let create = is.map(|is| {
                let types = after.map(table::definitions).unwrap_or_default();
                statement::create(is, &types, &follows)
            });
            let query = partition::remove(was, &sql, is.zip(create.as_deref()), notice.wide);
            let event = event(DdlKind::Other, &root, &was.name, query);
            match alone.map(|(_, after)| after) {
                // Its rows are at the target already, so it is followed as a table of its own from here on.
                Some(after) => {
                    let event = DdlEvent { added: vec![added(after)], ..event };
                    meaning(event, Becomes::Table(Box::new(after.clone())))
                }
                None => meaning(event, Becomes::Same),
            }
        }
        ((None, _), (Some(is), Some(root))) => {
            meaning(event(DdlKind::Other, &root, &is.name, partition::create(is)), Becomes::Same)
        }
        ((Some(_), None), (Some(is), Some(root))) => match itself {
            Some(itself) => {
                let ids = [itself.id, root.id];
                let event = DdlEvent {
                    blocked: normal(ids),
                    dropped: Some(InfluencedTables::Normal(vec![itself.id])),
                    ..event(
                        DdlKind::Other,
                        &root,
                        &is.name,
                        partition::attach(is, &qualified(&root.schema, &root.name), notice.rows),
                    )
                };
                meaning(event, Becomes::Gone)
            }
            None if notice.rows && feed.policy.other != DdlPolicy::Ignore => Err(unsupported(
                format!("{}.{}", root.schema, root.name),
                format!(
                    "table {} became a partition of it, with rows that were not replicated; remove the changefeed and \
                     create it again",
                    is.full_name()
                ),
            )),
            None => meaning(event(DdlKind::Other, &root, &is.name, partition::create(is)), Becomes::Same),
        },
        // What the partitions share is changed with the root.
        ((_, Some(_)), (_, Some(_))) => Ok(Some(NOTHING)),
        ((_, None), (_, None)) => {
            let is_part = shape.or(before).is_some_and(|shape| shape.root.is_some());
            Ok(Some(NOTHING).filter(|_| is_part && itself.is_none()))
        }
        ((None, Some(_)), _) | (_, (None, Some(_))) => Ok(None),
    }
}
