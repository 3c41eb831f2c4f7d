//! What a workload is: shapes, first rows, and the n-th transaction as a function of its number alone.

use std::fmt;
use std::sync::Arc;

use bytes::BytesMut;
use event::{
    Column, ColumnType, Datum, IdentityKind, ReplicaIdentity, RowOp, TableInfo, TupleWriter, TypeDefinition,
    TypeKind, UniqueKey,
};
use heartbeatpb::{SchemaId, TableId, Ts};

/// A source of transactions. The n-th one, counted from 1, depends on nothing but the parameters and n.
pub(super) trait Workload: Send + Sync {
    /// Number of places for tables; a table keeps its place for its life.
    fn tables(&self) -> usize;

    /// Shape of the table at a place when `ddls` schema changes have happened; `None` when there is none then.
    fn table(&self, table: usize, ddls: u64, version: Ts) -> Option<TableInfo>;

    /// Names of schemas that come and go, when `ddls` schema changes have happened.
    fn schemas(&self, _ddls: u64) -> Vec<String> {
        Vec::new()
    }

    /// Number of rows that a table has before the first transaction.
    fn first_rows(&self, table: usize) -> u64;

    /// One of those rows, counted from 0.
    fn first_row(&self, table: usize, number: u64, out: &mut RowText);

    /// The rows of transaction `n`.
    fn transaction(&self, n: u64, emit: &mut dyn FnMut(Change<'_>));

    /// Transactions between two schema changes; a schema change comes just before transactions of this
    /// multiple. 0 is never.
    fn ddl_every(&self) -> u64 {
        0
    }

    /// What schema change number `ddl`, from 1, does.
    fn ddl(&self, _ddl: u64) -> Option<SchemaStep> {
        None
    }
}

/// A schema change of a workload.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct SchemaStep {
    pub(super) what: Step,
    pub(super) query: String,
}

/// What a schema change does; tables by their places.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Step {
    /// A last column comes, or goes.
    Alter {
        slot: usize,
        added: bool,
    },
    Create {
        slot: usize,
    },
    Drop {
        slot: usize,
    },
    /// The table goes on under another id.
    Truncate {
        slot: usize,
    },
    /// To another name, of the same or another schema.
    Rename {
        slot: usize,
    },
    CreateSchema {
        id: SchemaId,
        name: String,
    },
    /// With the tables in it.
    DropSchema {
        id: SchemaId,
        name: String,
        slots: Vec<usize>,
    },
    /// Concerns every table.
    Everything {
        schema: SchemaId,
        name: String,
    },
}

impl Step {
    /// The same with places counted from `base`.
    pub(super) fn behind(self, base: usize) -> Self {
        match self {
            Step::Alter { slot, added } => Step::Alter { slot: base + slot, added },
            Step::Create { slot } => Step::Create { slot: base + slot },
            Step::Drop { slot } => Step::Drop { slot: base + slot },
            Step::Truncate { slot } => Step::Truncate { slot: base + slot },
            Step::Rename { slot } => Step::Rename { slot: base + slot },
            Step::DropSchema { id, name, slots } => {
                Step::DropSchema { id, name, slots: slots.into_iter().map(|slot| base + slot).collect() }
            }
            other @ (Step::CreateSchema { .. } | Step::Everything { .. }) => other,
        }
    }
}

/// A row change of a workload.
pub(super) struct Change<'a> {
    pub(super) table: usize,
    pub(super) op: RowOp,
    pub(super) old: Option<&'a RowText>,
    pub(super) new: Option<&'a RowText>,
}

#[derive(Clone, Copy)]
enum Cell {
    Null,
    Unchanged,
    /// Ends here in the text.
    Text(usize),
}

/// A row image under construction; reused, so that it costs no allocation.
#[derive(Default)]
pub(super) struct RowText {
    text: String,
    cells: Vec<Cell>,
}

impl RowText {
    pub(super) fn clear(&mut self) -> &mut Self {
        self.text.clear();
        self.cells.clear();
        self
    }

    pub(super) fn null(&mut self) -> &mut Self {
        self.cells.push(Cell::Null);
        self
    }

    /// Leaves the value as it was, as an upstream does with a large value that an update does not touch.
    pub(super) fn unchanged(&mut self) -> &mut Self {
        self.cells.push(Cell::Unchanged);
        self
    }

    pub(super) fn put(&mut self, value: impl fmt::Display) -> &mut Self {
        use fmt::Write as _;
        write!(self.text, "{value}").expect("a string takes everything");
        self.cells.push(Cell::Text(self.text.len()));
        self
    }

    /// The values in column order.
    pub(super) fn values(&self) -> impl Iterator<Item = Datum<'_>> {
        let mut from = 0;
        self.cells.iter().map(move |cell| match *cell {
            Cell::Null => Datum::Null,
            Cell::Unchanged => Datum::Unchanged,
            Cell::Text(end) => {
                let text = &self.text.as_bytes()[from..end];
                from = end;
                Datum::Text(text)
            }
        })
    }

    /// Appends the image as a tuple.
    pub(super) fn write(&self, out: &mut BytesMut) {
        let mut writer = TupleWriter::new(out);
        self.values().for_each(|value| writer.push(value));
        writer.finish();
    }
}

/// A built-in type.
pub(super) struct Type(pub(super) TypeKind, pub(super) &'static str, pub(super) u32);

pub(super) fn column(name: &str, ty: Type, nullable: bool) -> Column {
    let Type(kind, sql, oid) = ty;
    Column {
        name: name.into(),
        ty: ColumnType { kind, sql: sql.into(), oid, definitions: Vec::new() },
        nullable,
        generated: None,
        identity: IdentityKind::None,
        default: None,
    }
}

/// A column of an enum type that the target may have to create.
pub(super) fn enum_column(name: &str, schema: &str, ty: &str, labels: &[&str]) -> Column {
    let list: Vec<String> = labels.iter().map(|label| format!("'{label}'")).collect();
    let sql = format!("\"{schema}\".\"{ty}\"");
    let create_sql = format!("CREATE TYPE {sql} AS ENUM ({})", list.join(", "));
    let definitions = vec![TypeDefinition { schema: schema.into(), name: ty.into(), create_sql }];
    let kind = TypeKind::Enum(labels.iter().map(|&label| label.to_owned()).collect());
    let mut column = column(name, Type(kind, "", 0), true);
    column.ty.sql = sql;
    column.ty.definitions = definitions;
    column
}

pub(super) fn bigint() -> Type {
    Type(TypeKind::Int64, "bigint", 20)
}

pub(super) fn text() -> Type {
    Type(TypeKind::Text, "text", 25)
}

/// A table whose first column is its primary key.
pub(super) fn keyed_table(
    id: i64,
    schema: &str,
    name: String,
    version: Ts,
    columns: Vec<Column>,
) -> TableInfo {
    let key = UniqueKey {
        name: format!("{name}_pkey"),
        columns: vec![0],
        primary: true,
        nulls_not_distinct: false,
    };
    TableInfo {
        id: TableId(id),
        schema_id: SchemaId(1),
        schema: schema.into(),
        name,
        version,
        columns,
        keys: vec![key],
        identity: ReplicaIdentity::Key(vec![0]),
    }
}

/// `2024-01-01 00:00:00` and `millis` milliseconds later, as PostgreSQL writes it.
pub(super) struct Moment(pub(super) u64);

impl Moment {
    fn date(&self) -> (u64, u64, u64) {
        // Days since 0000-03-01.
        let days = self.0 / 86_400_000 + 739_191;
        let (era, of_era) = (days / 146_097, days % 146_097);
        let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let index = (5 * of_year + 2) / 153;
        let month = if index < 10 { index + 3 } else { index - 9 };
        (era * 400 + year_of_era + u64::from(month <= 2), month, of_year - (153 * index + 2) / 5 + 1)
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (year, month, day) = self.date();
        write!(f, "{year:04}-{month:02}-{day:02} {}", Clock(self.0))
    }
}

/// The date of a [`Moment`].
pub(super) struct Day(pub(super) u64);

impl fmt::Display for Day {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (year, month, day) = Moment(self.0).date();
        write!(f, "{year:04}-{month:02}-{day:02}")
    }
}

/// The time of day of a [`Moment`].
pub(super) struct Clock(pub(super) u64);

impl fmt::Display for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seconds, millis) = (self.0 / 1000 % 86_400, self.0 % 1000);
        write!(f, "{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)?;
        if millis == 0 {
            return Ok(());
        }
        let digits = format!("{millis:03}");
        write!(f, ".{}", digits.trim_end_matches('0'))
    }
}

/// `bytes` letters and digits that depend on `hash`.
pub(super) struct Filler {
    pub(super) hash: u64,
    pub(super) bytes: u64,
}

impl fmt::Display for Filler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut left = self.bytes;
        let mut part = 0;
        while left > 0 {
            part += 1;
            let word = format!("{:016x}", super::mix(self.hash, part, 77));
            let take = usize::try_from(left.min(16)).unwrap_or(16);
            f.write_str(&word[..take])?;
            left -= take as u64;
        }
        Ok(())
    }
}

/// Shares the shapes of a workload at a position, by place.
pub(super) fn shapes(workload: &dyn Workload, ddls: u64, version: Ts) -> Vec<Option<Arc<TableInfo>>> {
    (0..workload.tables()).map(|table| workload.table(table, ddls, version).map(Arc::new)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_written_as_postgresql_does() {
        assert_eq!(Moment(0).to_string(), "2024-01-01 00:00:00");
        assert_eq!(Moment(59 * 86_400_000 + 3_723_450).to_string(), "2024-02-29 01:02:03.45");
        assert_eq!(Day(366 * 86_400_000).to_string(), "2025-01-01");
        assert_eq!(Clock(1).to_string(), "00:00:00.001");
        assert_eq!(Filler { hash: 1, bytes: 37 }.to_string().len(), 37);
    }
}
