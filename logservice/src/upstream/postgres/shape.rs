//! How rows on the wire become tuples of a table, and whether the wire still describes the known shape.

use std::sync::Arc;

use bytes::BytesMut;
use event::{Datum, ReplicaIdentity, TableInfo, TupleWriter};

use super::catalog::CatalogTable;
use super::pgoutput::{OldImage, Relation, TupleData};
use crate::Error;

/// A known table as a reader uses it.
#[derive(Debug)]
pub(crate) struct Shape {
    /// Its description.
    pub(crate) info: Arc<TableInfo>,
    type_mods: Vec<i32>,
    /// Number of columns on the wire: generated ones are missing there.
    wire_columns: usize,
    /// Only rows that fulfil a condition come.
    conditional: bool,
    /// For every column of the table: whether it is generated, whether it belongs to the identity.
    columns: Vec<(bool, bool)>,
}

impl Shape {
    /// The shape of a table of the catalog.
    pub(crate) fn new(table: &CatalogTable) -> Self {
        let info = Arc::clone(&table.info);
        let columns: Vec<(bool, bool)> = info
            .columns
            .iter()
            .enumerate()
            .map(|(i, column)| (column.generated.is_some(), in_identity(&info, i)))
            .collect();
        let wire_columns = columns.iter().filter(|(generated, _)| !generated).count();
        let conditional = table.part.condition.is_some();
        Self { info, type_mods: table.type_mods.clone(), wire_columns, conditional, columns }
    }

    /// Columns that the wire and a copy carry, by name.
    pub(crate) fn wire_names(&self) -> impl Iterator<Item = &str> {
        self.info
            .columns
            .iter()
            .filter(|column| column.generated.is_none())
            .map(|column| column.name.as_str())
    }

    /// Number of columns on the wire.
    pub(crate) fn wire_columns(&self) -> usize {
        self.wire_columns
    }

    /// Compares what the wire says with what is known. Where schema changes come in the log (`captured`), the table may be
    /// announced in the schema that it had when the transaction wrote into it: nothing keeps a schema from getting another name
    /// while transactions are open.
    pub(crate) fn verify(&self, relation: &Relation, captured: bool) -> Result<(), Error> {
        match self.difference(relation, captured) {
            None => Ok(()),
            Some(change) => Err(Error::SchemaChange {
                table: format!("{}.{}", self.info.schema, self.info.name),
                change: format!("{change}; remove the changefeed and create it again"),
            }),
        }
    }

    fn difference(&self, relation: &Relation, captured: bool) -> Option<String> {
        let info = &self.info;
        if relation.name != info.name || (relation.schema != info.schema && !captured) {
            return Some(format!("its name is now {}.{}", relation.schema, relation.name));
        }
        let full = info.identity == ReplicaIdentity::Full;
        if full != (relation.identity == b'f') {
            return Some(format!("its replica identity is now {:?}", char::from(relation.identity)));
        }
        let known = info.columns.iter().zip(&self.type_mods).enumerate();
        let mut known = known.filter(|(_, (column, _))| column.generated.is_none());
        for wire in &relation.columns {
            let Some((position, (column, type_mod))) = known.next() else {
                return Some(format!("column {:?} is new", wire.name));
            };
            if wire.name != column.name {
                return Some(format!("column {:?} is where {:?} was", wire.name, column.name));
            }
            if wire.type_oid != column.ty.oid || wire.type_mod != *type_mod {
                return Some(format!(
                    "the type of column {:?} is not {} any more",
                    column.name, column.ty.sql
                ));
            }
            if wire.key != self.columns[position].1 {
                return Some(format!("column {:?} entered or left the replica identity", column.name));
            }
        }
        known.next().map(|(_, (column, _))| format!("column {:?} is gone", column.name))
    }

    /// Refuses rows that do not have the announced number of columns.
    #[inline]
    pub(crate) fn expect(&self, tuple: TupleData<'_>) -> Result<(), Error> {
        if tuple.columns() == self.wire_columns {
            return Ok(());
        }
        Err(Error::protocol(format_args!(
            "row of {} columns where {} were announced",
            tuple.columns(),
            self.wire_columns
        )))
    }

    /// Refuses a row that comes by an update, since it fulfils a condition now, and of which the log has not everything.
    pub(crate) fn expect_whole(&self, new: TupleData<'_>) -> Result<(), Error> {
        if !self.conditional || new.iter().all(|value| value != Datum::Unchanged) {
            return Ok(());
        }
        let what = format!(
            "table {}.{}: an update made the condition true for a row, but left alone an out-of-line value, which is not in \
             the log; run: ALTER TABLE … REPLICA IDENTITY FULL (without a list of columns), or change that value in the same \
             statement; remove the changefeed and create it again",
            self.info.schema, self.info.name
        );
        Err(Error::PublishRule { what })
    }

    /// Writes a new image. Where a statement left an out-of-line value alone, the old image may still have it.
    #[inline]
    pub(crate) fn put_new(&self, new: TupleData<'_>, old: Option<TupleData<'_>>, out: &mut BytesMut) {
        let mut tuple = TupleWriter::new(out);
        match old {
            None if self.wire_columns == self.columns.len() => new.write(&mut tuple),
            None => self.put_values(new.iter(), &mut tuple),
            Some(old) => {
                let values = new.iter().zip(old.iter());
                self.put_values(
                    values.map(|(new, old)| if new == Datum::Unchanged { old } else { new }),
                    &mut tuple,
                );
            }
        }
        tuple.finish();
    }

    /// Writes an old image. What a key image does not contain is unchanged, not NULL.
    pub(crate) fn put_old(&self, old: OldImage<'_>, out: &mut BytesMut) {
        let mut tuple = TupleWriter::new(out);
        match old {
            OldImage::Full(old) => self.put_values(old.iter(), &mut tuple),
            OldImage::Key(old) => {
                let mut values = old.iter();
                for (generated, key) in &self.columns {
                    let value = if *generated { None } else { values.next() };
                    tuple.push(value.filter(|_| *key).unwrap_or(Datum::Unchanged));
                }
            }
        }
        tuple.finish();
    }

    /// Writes the values of the wire's columns, with a mark in the place of generated ones.
    pub(crate) fn put_values<'v>(
        &self,
        mut values: impl Iterator<Item = Datum<'v>>,
        tuple: &mut TupleWriter<'_>,
    ) {
        for (generated, _) in &self.columns {
            let value = if *generated { None } else { values.next() };
            tuple.push(value.unwrap_or(Datum::Unchanged));
        }
    }
}

fn in_identity(info: &TableInfo, position: usize) -> bool {
    match &info.identity {
        ReplicaIdentity::Full => true,
        ReplicaIdentity::Key(columns) => columns.contains(&position),
        ReplicaIdentity::Nothing => false,
    }
}
