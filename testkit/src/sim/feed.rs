//! One changefeed's databases: what the upstream committed, what the downstream has, and what may not happen there.
//!
//! A commit ts is a number that grows with every transaction; a row is a key with the commit ts of its last change
//! as its value. The downstream (`target.rs`) works as a transactional database does: rows are written idempotently, a
//! schema change is executed once, and who is fenced (`writers.rs`) writes nothing.

mod kept;
mod target;
mod writers;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use event::{DdlEvent, DdlKind};
use heartbeatpb::{
    AddedTable, ChangefeedId, DispatcherId, InfluencedTables, MaintainerEpoch, NodeId, SchemaChange,
    SchemaId, TableId, Ts,
};

pub(super) use self::kept::Kept;
use self::target::Session;
pub(super) use self::target::Wrong;
use self::writers::Writers;

/// Keys of a table are the numbers below this one.
pub(super) const KEYS: u64 = 24;

/// A change of a row.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Change {
    pub(super) ts: u64,
    pub(super) key: u64,
    pub(super) deleted: bool,
}

/// What a table's log holds.
#[derive(Clone, Debug)]
pub(super) enum Item {
    Row(Change),
    Ddl(Arc<DdlEvent>),
}

impl Item {
    pub(super) fn ts(&self) -> u64 {
        match self {
            Item::Row(change) => change.ts,
            Item::Ddl(ddl) => ddl.commit_ts.0,
        }
    }
}

/// A table at both ends.
pub(super) struct Table {
    pub(super) id: i64,
    /// Schemas that it was in, each with the commit ts from which on.
    schemas: Vec<(u64, i64)>,
    pub(super) born: u64,
    pub(super) died: Option<u64>,
    pub(super) items: Vec<Item>,
    /// Last change of each key upstream.
    newest: BTreeMap<u64, u64>,
    /// Whether it exists downstream.
    exists: bool,
    /// Last change of each key downstream.
    applied: BTreeMap<u64, u64>,
    /// Commit ts of the last schema change that was executed under its name.
    executed: u64,
    /// The session that wrote a key last, and those that wrote it before that one began.
    writers: BTreeMap<u64, (u64, BTreeSet<u64>)>,
}

impl Table {
    fn new(id: i64, schema: i64, born: u64, exists: bool) -> Self {
        Self {
            id,
            schemas: vec![(born, schema)],
            born,
            died: None,
            items: Vec::new(),
            newest: BTreeMap::new(),
            exists,
            applied: BTreeMap::new(),
            executed: 0,
            writers: BTreeMap::new(),
        }
    }

    fn schema(&self) -> i64 {
        self.schemas.last().map_or(0, |(_, schema)| *schema)
    }

    pub(super) fn schema_at(&self, ts: u64) -> i64 {
        self.schemas.iter().rev().find(|(from, _)| *from <= ts).map_or(0, |(_, schema)| *schema)
    }

    pub(super) fn lives_at(&self, ts: u64) -> bool {
        self.born <= ts && self.died.is_none_or(|died| died > ts)
    }
}

/// Who reads the log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Reader {
    pub(super) node: NodeId,
    pub(super) epoch: Option<MaintainerEpoch>,
}

/// What kind of schema change to make.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DdlChoice {
    /// `CREATE TABLE`
    Create,
    /// `DROP TABLE`
    Drop,
    /// `TRUNCATE`: the table gets another id.
    Truncate,
    /// `ALTER TABLE`
    Alter,
    /// Into another schema.
    Rename,
    /// `DROP SCHEMA`
    DropSchema,
    /// Something that concerns everybody.
    All,
}

/// One changefeed's databases.
pub(super) struct Feed {
    pub(super) id: ChangefeedId,
    /// Everything at or before was committed.
    pub(super) head: u64,
    pub(super) tables: BTreeMap<i64, Table>,
    pub(super) ddls: Vec<Arc<DdlEvent>>,
    next_table: i64,
    pub(super) reader: Option<Reader>,
    /// What is kept of the log where it is read.
    pub(super) kept: Kept,
    /// The upstream has forgotten what is at or before.
    pub(super) retained: u64,
    /// The largest checkpoint that was stored.
    pub(super) persisted: u64,
    /// Changes that are not downstream yet: commit ts, table (0: a schema change), key.
    outstanding: BTreeSet<(u64, i64, u64)>,
    executed: BTreeSet<u64>,
    pub(super) sessions: BTreeMap<u64, Session>,
    /// Sessions by who holds them.
    by_holder: BTreeMap<(NodeId, u64, DispatcherId), u64>,
    pub(super) rows_written: u64,
    writers: Writers,
}

impl Feed {
    /// A database with `tables` tables in two schemas.
    pub(super) fn new(id: ChangefeedId, start: u64, tables: i64) -> Self {
        let of = |n: i64| (100 + n, Table::new(100 + n, 1 + n % 2, start, true));
        Self {
            id,
            head: start,
            tables: (1..=tables).map(of).collect(),
            ddls: Vec::new(),
            next_table: 101 + tables,
            reader: None,
            kept: Kept::default(),
            retained: start,
            persisted: start,
            outstanding: BTreeSet::new(),
            executed: BTreeSet::new(),
            sessions: BTreeMap::new(),
            by_holder: BTreeMap::new(),
            rows_written: 0,
            writers: Writers::default(),
        }
    }

    pub(super) fn live_tables(&self) -> Vec<i64> {
        self.tables.values().filter(|table| table.died.is_none()).map(|table| table.id).collect()
    }

    /// The first change that is not downstream: commit ts, table (0: a schema change), key.
    pub(super) fn first_outstanding(&self) -> Option<(u64, i64, u64)> {
        self.outstanding.first().copied()
    }

    /// Commits a transaction of a few rows.
    pub(super) fn commit_rows(&mut self, random: &mut crate::Random) {
        let live = self.live_tables();
        if live.is_empty() {
            return;
        }
        self.head += random.between(1, 3);
        let ts = self.head;
        for _ in 0..random.between(1, 4) {
            let at = usize::try_from(random.between(0, live.len() as u64 - 1)).unwrap_or(0);
            let key = random.between(0, KEYS - 1);
            let deleted = random.between(0, 9) == 0;
            let Some(table) = self.tables.get_mut(&live[at]) else { continue };
            if table.newest.insert(key, ts) == Some(ts) {
                continue;
            }
            table.items.push(Item::Row(Change { ts, key, deleted }));
            self.outstanding.insert((ts, table.id, key));
        }
    }

    /// Commits a schema change, if there is something that it can change. Says what it did.
    pub(super) fn commit_ddl(&mut self, choice: DdlChoice, random: &mut crate::Random) -> Option<String> {
        let live = self.live_tables();
        let pick = |random: &mut crate::Random| {
            let last = (live.len() as u64).checked_sub(1)?;
            live.get(usize::try_from(random.between(0, last)).ok()?).copied()
        };
        let ts = self.head + 1;
        let mut ddl = blank(ts, choice);
        let trigger = |tables: &[i64]| {
            let ids = tables.iter().copied().chain([0]).map(TableId).collect();
            Some(InfluencedTables::Normal(ids))
        };
        match choice {
            DdlChoice::Create => {
                let schema = 1 + i64::try_from(random.between(0, 1)).unwrap_or(0);
                let id = self.add_table(schema, ts);
                (ddl.table_id, ddl.schema_id) = (TableId(id), SchemaId(schema));
                ddl.blocked = trigger(&[]);
                ddl.added = vec![added(id, schema)];
            }
            DdlChoice::Drop => {
                let id = pick(random).filter(|_| live.len() > 1)?;
                ddl.table_id = TableId(id);
                ddl.blocked = trigger(&[id]);
                ddl.dropped = Some(InfluencedTables::Normal(vec![TableId(id)]));
                self.end_table(id, ts);
            }
            DdlChoice::Truncate => {
                let id = pick(random)?;
                let schema = self.tables.get(&id)?.schema();
                ddl.table_id = TableId(id);
                ddl.blocked = trigger(&[id]);
                ddl.dropped = Some(InfluencedTables::Normal(vec![TableId(id)]));
                self.end_table(id, ts);
                let new = self.add_table(schema, ts);
                ddl.added = vec![added(new, schema)];
            }
            DdlChoice::Alter => {
                let id = pick(random)?;
                ddl.table_id = TableId(id);
                ddl.blocked = Some(InfluencedTables::Normal(vec![TableId(id)]));
            }
            DdlChoice::Rename => {
                let id = pick(random)?;
                let table = self.tables.get_mut(&id)?;
                let (old, new) = (table.schema(), 3 - table.schema().min(2));
                ddl.table_id = TableId(id);
                ddl.blocked = trigger(&[id]);
                if old != new {
                    table.schemas.push((ts, new));
                    ddl.schema_changes =
                        vec![SchemaChange { table: TableId(id), old: SchemaId(old), new: SchemaId(new) }];
                }
            }
            DdlChoice::DropSchema => {
                // Of its own, so that there is something left afterwards.
                let schema = self.tables.get(&pick(random)?)?.schema();
                let of_schema: Vec<i64> = live
                    .iter()
                    .copied()
                    .filter(|id| self.tables.get(id).is_some_and(|table| table.schema() == schema))
                    .collect();
                if of_schema.len() == live.len() {
                    return None;
                }
                (ddl.table_id, ddl.schema_id) = (TableId(0), SchemaId(schema));
                ddl.blocked = Some(InfluencedTables::Schema(SchemaId(schema)));
                ddl.dropped = Some(InfluencedTables::Schema(SchemaId(schema)));
                for id in of_schema {
                    self.end_table(id, ts);
                }
            }
            DdlChoice::All => {
                ddl.table_id = TableId(0);
                ddl.blocked = Some(InfluencedTables::All);
            }
        }
        self.head = ts;
        let ddl = Arc::new(ddl);
        let told: BTreeSet<i64> = self.influenced(&ddl, &live).into_iter().collect();
        for table in self.tables.values_mut().filter(|table| told.contains(&table.id)) {
            table.items.push(Item::Ddl(Arc::clone(&ddl)));
        }
        let text = format!(
            "DDL {choice:?} at {ts}: tables {told:?}, new {:?}",
            ddl.added.iter().map(|t| t.table.0).collect::<Vec<_>>()
        );
        self.ddls.push(ddl);
        self.outstanding.insert((ts, 0, 0));
        Some(text)
    }

    fn add_table(&mut self, schema: i64, ts: u64) -> i64 {
        let id = self.next_table;
        self.next_table += 1;
        self.tables.insert(id, Table::new(id, schema, ts, false));
        id
    }

    fn end_table(&mut self, id: i64, ts: u64) {
        if let Some(table) = self.tables.get_mut(&id) {
            table.died = Some(ts);
        }
    }

    /// The tables, of those that lived before it, whose dispatchers a schema change is told to.
    fn influenced(&self, ddl: &DdlEvent, live: &[i64]) -> Vec<i64> {
        let before = ddl.commit_ts.0 - 1;
        match &ddl.blocked {
            None => Vec::new(),
            Some(InfluencedTables::All) => live.to_vec(),
            Some(InfluencedTables::Schema(schema)) => live
                .iter()
                .copied()
                .filter(|id| self.tables.get(id).is_some_and(|t| t.schema_at(before) == schema.0))
                .collect(),
            Some(InfluencedTables::Normal(tables)) => {
                tables.iter().map(|table| table.0).filter(|id| *id != 0).collect()
            }
        }
    }

    /// Whether the table trigger is told about a schema change.
    pub(super) fn concerns_trigger(ddl: &DdlEvent) -> bool {
        match &ddl.blocked {
            None => false,
            Some(InfluencedTables::All | InfluencedTables::Schema(_)) => true,
            Some(InfluencedTables::Normal(tables)) => tables.contains(&TableId::DDL),
        }
    }
}

fn added(id: i64, schema: i64) -> AddedTable {
    AddedTable { table: TableId(id), schema: SchemaId(schema), splittable: true }
}

fn blank(ts: u64, choice: DdlChoice) -> DdlEvent {
    let kind = match choice {
        DdlChoice::Create => DdlKind::CreateTable,
        DdlChoice::Drop => DdlKind::DropTable,
        DdlChoice::Alter => DdlKind::AlterTable,
        DdlChoice::Rename => DdlKind::RenameTable,
        DdlChoice::DropSchema => DdlKind::DropSchema,
        DdlChoice::Truncate | DdlChoice::All => DdlKind::Other,
    };
    DdlEvent {
        schema_id: SchemaId(1),
        schema: "s".to_owned(),
        table: "t".to_owned(),
        query: format!("{choice:?}"),
        ..DdlEvent::new(kind, Ts(ts))
    }
}
