//! Tables and schemas that come and go beside the accounts of a bank, and the statements that make them do so.
//!
//! `ddl=create,drop,…` or `ddl=all` names the kinds; one statement comes every `ddl-every` transactions, and each kind
//! has its turn before one comes again. A statement that would find nothing to work on is left out.
//!
//! Rows depend on the number of the transaction and on which tables exist then. Between two statements the
//! transactions go to one table after the other in groups of four: two inserts, an update of the first and a delete of
//! the second.
//!
//! ```text
//! number since the last statement   0        1        2        3        4        5  …
//! row of table A                    insert 0 insert 1 update 0 delete 1
//! row of table B                                                        insert 4 insert 5 …
//! ```

use event::{RowOp, TableInfo};
use heartbeatpb::{SchemaId, Ts};

use super::mix;
use super::workload::{Change, RowText, SchemaStep, Step, bigint, column, keyed_table, text};

/// Most tables at a time.
pub(super) const SLOTS: usize = 12;
/// Most schemas at a time.
const SCHEMAS: u64 = 5;
/// Rows of each table before the first transaction.
pub(super) const FIRST_ROWS: u64 = 5;
/// Transactions of one table in a row.
const GROUP: u64 = 4;
const FIRST_TABLE_ID: i64 = 2001;
const FIRST_SCHEMA_ID: i64 = 11;

/// A kind of statement.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Alter,
    Create,
    Drop,
    Truncate,
    /// To another name of the same schema.
    Rename,
    /// To another schema.
    Move,
    CreateSchema,
    /// With the tables in it.
    DropSchema,
    /// A statement that concerns every table.
    View,
}

/// Kinds as a URI names them.
pub(super) const KINDS: [(&str, Kind); 9] = [
    ("alter", Kind::Alter),
    ("create", Kind::Create),
    ("drop", Kind::Drop),
    ("truncate", Kind::Truncate),
    ("rename", Kind::Rename),
    ("move", Kind::Move),
    ("create-schema", Kind::CreateSchema),
    ("drop-schema", Kind::DropSchema),
    ("view", Kind::View),
];

#[derive(Clone, PartialEq, Eq, Debug)]
struct Item {
    id: i64,
    /// Number of its schema.
    schema: u64,
    /// Number in its name.
    name: u64,
    /// Numbers of earlier names: a database may have named the index of its key after one.
    names: Vec<u64>,
    /// Has the column that comes and goes.
    extra: bool,
}

/// What exists after some statements.
#[derive(Clone, Debug)]
pub(super) struct Catalog {
    seed: u64,
    kinds: Vec<Kind>,
    /// Statements so far.
    done: u64,
    items: Vec<Option<Item>>,
    /// Number and id.
    schemas: Vec<(u64, i64)>,
    next_table: i64,
    next_schema: i64,
}

fn item_name(number: u64) -> String {
    format!("item_{number}")
}

fn schema_name(number: u64) -> String {
    format!("stage_{number}")
}

impl Catalog {
    /// What exists before the first statement. `mask` has a bit for each of [`KINDS`].
    pub(super) fn new(seed: u64, mask: u64) -> Self {
        let chosen = KINDS.iter().enumerate().filter(|(bit, _)| mask >> bit & 1 == 1);
        let mut kinds: Vec<Kind> = chosen.map(|(_, (_, kind))| *kind).collect();
        if kinds.contains(&Kind::Create) && (kinds.contains(&Kind::Drop) || kinds.contains(&Kind::DropSchema))
        {
            // Dropped schemas take several tables along.
            kinds.extend([Kind::Create, Kind::Create]);
        }
        let mut catalog = Self {
            seed,
            kinds,
            done: 0,
            items: vec![None; SLOTS],
            schemas: vec![(1, FIRST_SCHEMA_ID), (2, FIRST_SCHEMA_ID + 1)],
            next_table: FIRST_TABLE_ID,
            next_schema: FIRST_SCHEMA_ID + 2,
        };
        for schema in [1, 1, 2, 2] {
            catalog.put(schema);
        }
        catalog
    }

    /// Goes on to the state after `done` statements; from the beginning if that is earlier.
    pub(super) fn go_to(&mut self, done: u64, fresh: impl FnOnce() -> Self) {
        if done < self.done {
            *self = fresh();
        }
        while self.done < done {
            self.step();
        }
    }

    /// The next statement; `None` when it has nothing to work on.
    pub(super) fn step(&mut self) -> Option<SchemaStep> {
        let number = self.done;
        self.done += 1;
        let kinds = self.kinds.len() as u64;
        let turn = number.checked_div(kinds)?;
        let at = (number + mix(self.seed, turn, 6)) % kinds;
        let kind = *self.kinds.get(usize::try_from(at).ok()?)?;
        let random = mix(self.seed, number, 7);
        match kind {
            Kind::Create => self.create(random),
            Kind::Alter => self.alter(random),
            Kind::Drop => self.drop_table(random),
            Kind::Truncate => self.truncate(random),
            Kind::Rename => self.rename(random, false),
            Kind::Move => self.rename(random, true),
            Kind::CreateSchema => self.create_schema(),
            Kind::DropSchema => self.drop_schema(),
            Kind::View => Some(Self::view(number)),
        }
    }

    /// The smallest number that no table has or had, so that each may move to every schema.
    fn free_name(&self) -> u64 {
        let has = |item: &Item, name: u64| item.name == name || item.names.contains(&name);
        let taken = |name: u64| self.items.iter().flatten().any(|item| has(item, name));
        (1..).find(|name| !taken(*name)).unwrap_or(u64::MAX)
    }

    fn put(&mut self, schema: u64) -> Option<usize> {
        let slot = self.items.iter().position(Option::is_none)?;
        let item =
            Item { id: self.next_table, schema, name: self.free_name(), names: Vec::new(), extra: false };
        self.next_table += 1;
        self.items[slot] = Some(item);
        Some(slot)
    }

    /// One of the tables.
    fn pick(&self, random: u64) -> Option<usize> {
        let used: Vec<usize> = (0..self.items.len()).filter(|&slot| self.items[slot].is_some()).collect();
        let at = random.checked_rem(used.len() as u64)?;
        used.get(usize::try_from(at).ok()?).copied()
    }

    fn quoted(&self, slot: usize) -> String {
        self.items[slot].as_ref().map_or_else(String::new, |item| {
            format!("\"{}\".\"{}\"", schema_name(item.schema), item_name(item.name))
        })
    }

    fn create(&mut self, random: u64) -> Option<SchemaStep> {
        let at = usize::try_from(random % self.schemas.len() as u64).unwrap_or_default();
        let slot = self.put(self.schemas[at].0)?;
        let query = format!(
            "CREATE TABLE {} (\"id\" bigint NOT NULL, \"what\" text, \"n\" bigint, PRIMARY KEY (\"id\"))",
            self.quoted(slot)
        );
        Some(SchemaStep { what: Step::Create { slot }, query })
    }

    fn alter(&mut self, random: u64) -> Option<SchemaStep> {
        let slot = self.pick(random)?;
        let item = self.items[slot].as_mut()?;
        item.extra = !item.extra;
        let added = item.extra;
        let what = if added { "ADD COLUMN \"extra\" bigint" } else { "DROP COLUMN \"extra\"" };
        let query = format!("ALTER TABLE {} {what}", self.quoted(slot));
        Some(SchemaStep { what: Step::Alter { slot, added }, query })
    }

    fn drop_table(&mut self, random: u64) -> Option<SchemaStep> {
        // The last one stays: every other kind needs one.
        if self.items.iter().flatten().count() < 2 {
            return None;
        }
        let slot = self.pick(random)?;
        let query = format!("DROP TABLE {}", self.quoted(slot));
        self.items[slot] = None;
        Some(SchemaStep { what: Step::Drop { slot }, query })
    }

    fn truncate(&mut self, random: u64) -> Option<SchemaStep> {
        let slot = self.pick(random)?;
        let next = self.next_table;
        self.next_table += 1;
        self.items[slot].as_mut()?.id = next;
        Some(SchemaStep {
            what: Step::Truncate { slot },
            query: format!("TRUNCATE TABLE {}", self.quoted(slot)),
        })
    }

    fn rename(&mut self, random: u64, elsewhere: bool) -> Option<SchemaStep> {
        let slot = self.pick(random)?;
        let before = self.items[slot].clone()?;
        let mut after = before.clone();
        let query = if elsewhere {
            let others =
                self.schemas.iter().map(|(number, _)| *number).filter(|number| *number != before.schema);
            let others: Vec<u64> = others.collect();
            let at = mix(self.seed, random, 8).checked_rem(others.len() as u64)?;
            after.schema = *others.get(usize::try_from(at).ok()?)?;
            let schema = after.schema;
            format!("ALTER TABLE {} SET SCHEMA \"{}\"", self.quoted(slot), schema_name(schema))
        } else {
            after.name = self.free_name();
            after.names.push(before.name);
            format!("ALTER TABLE {} RENAME TO \"{}\"", self.quoted(slot), item_name(after.name))
        };
        self.items[slot] = Some(after);
        Some(SchemaStep { what: Step::Rename { slot }, query })
    }

    fn create_schema(&mut self) -> Option<SchemaStep> {
        let number = (1..=SCHEMAS).find(|number| self.schemas.iter().all(|(taken, _)| taken != number))?;
        let (id, name) = (self.next_schema, schema_name(number));
        self.next_schema += 1;
        self.schemas.push((number, id));
        let query = format!("CREATE SCHEMA \"{name}\"");
        Some(SchemaStep { what: Step::CreateSchema { id: SchemaId(id), name }, query })
    }

    fn drop_schema(&mut self) -> Option<SchemaStep> {
        let tables = |number: u64| self.items.iter().flatten().filter(|item| item.schema == number).count();
        // The first one stays, and one with tables is preferred, but with few.
        let candidates = self.schemas.iter().copied().filter(|(number, _)| *number != 1);
        let (number, id) = candidates.min_by_key(|(number, _)| match tables(*number) {
            0 => usize::MAX,
            tables => tables,
        })?;
        let inside = |item: &Option<Item>| item.as_ref().is_some_and(|item| item.schema == number);
        let slots: Vec<usize> = (0..self.items.len()).filter(|&slot| inside(&self.items[slot])).collect();
        for &slot in &slots {
            self.items[slot] = None;
        }
        self.schemas.retain(|(other, _)| *other != number);
        let name = schema_name(number);
        let query = format!("DROP SCHEMA \"{name}\" CASCADE");
        Some(SchemaStep { what: Step::DropSchema { id: SchemaId(id), name, slots }, query })
    }

    fn view(number: u64) -> SchemaStep {
        let query = format!(
            "CREATE OR REPLACE VIEW \"{}\".\"latest\" AS SELECT {number}::bigint AS n",
            schema_name(1)
        );
        SchemaStep {
            what: Step::Everything { schema: SchemaId(FIRST_SCHEMA_ID), name: schema_name(1) },
            query,
        }
    }

    /// Names of the schemas.
    pub(super) fn schemas(&self) -> impl Iterator<Item = String> {
        self.schemas.iter().map(|(number, _)| schema_name(*number))
    }

    /// Shape of the table in a slot.
    pub(super) fn table(&self, slot: usize, version: Ts) -> Option<TableInfo> {
        let item = self.items.get(slot)?.as_ref()?;
        let mut columns =
            vec![column("id", bigint(), false), column("what", text(), true), column("n", bigint(), true)];
        if item.extra {
            columns.push(column("extra", bigint(), true));
        }
        let (_, schema) = self.schemas.iter().find(|(number, _)| *number == item.schema)?;
        let mut info =
            keyed_table(item.id, &schema_name(item.schema), item_name(item.name), version, columns);
        info.schema_id = SchemaId(*schema);
        Some(info)
    }

    /// A row that a table has from the beginning.
    pub(super) fn first_row(number: u64, out: &mut RowText) {
        out.clear().put(format_args!("-{}", number + 1)).put("first").put(number);
    }

    /// What transaction `n` does to the tables; `since` is the number of transactions since the last statement.
    pub(super) fn transaction(&self, n: u64, since: u64, base: usize, emit: &mut dyn FnMut(Change<'_>)) {
        let place = since % GROUP;
        let first = n - place;
        if first == 0 {
            // The first group would begin before the first transaction.
            return;
        }
        let Some(slot) = self.pick(mix(self.seed, first, 5)) else { return };
        let Some(item) = &self.items[slot] else { return };
        let mut row = RowText::default();
        let id = if place < 2 { n } else { n - 2 };
        let table = base + slot;
        if place == 3 {
            row.put(id).unchanged().unchanged();
            if item.extra {
                row.unchanged();
            }
            return emit(Change { table, op: RowOp::Delete, old: Some(&row), new: None });
        }
        row.put(id).put(format_args!("{} of {}", if place == 2 { "changed" } else { "new" }, item.id)).put(n);
        if item.extra {
            row.put(n);
        }
        let op = if place == 2 { RowOp::Update } else { RowOp::Insert };
        emit(Change { table, op, old: None, new: Some(&row) });
    }
}
