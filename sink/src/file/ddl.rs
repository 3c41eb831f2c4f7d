//! The schema files of a DDL. Each is written once: its name is that of its position and its content.
//!
//! | statement | files |
//! |---|---|
//! | creates, alters, truncates a table | one in the table's directory, with its columns |
//! | drops a table | one without columns in its directory |
//! | renames a table | one in the new directory, which names the old one, and one without columns in the old |
//! | creates or drops a schema, concerns everything | one in the directory of the schema |

use event::{DdlEvent, DdlKind, TableInfo};
use heartbeatpb::{InfluencedTables, TableId};

use super::layout::{self, TablePlace};
use super::schema::{Change, SchemaFile};
use super::{Context, disk};
use crate::Error;

/// Writes the schema files of a DDL.
pub(super) fn write(context: &Context, ddl: &DdlEvent) -> Result<(), Error> {
    if let Some(text) = &ddl.error {
        return Err(Error::Rejected { code: "CDC:ErrDDLUnsupported", what: text.clone() });
    }
    match &ddl.table_info {
        Some(table) if ddl.kind == DdlKind::RenameTable => write_rename(context, ddl, table),
        Some(table) => write_shape(context, ddl, table, None),
        None if ddl.table.is_empty() => write_schema(context, ddl),
        None => write_end(context, ddl, ddl.query.clone()),
    }
}

/// The shape that a table has from here on.
fn write_shape(
    context: &Context,
    ddl: &DdlEvent,
    table: &TableInfo,
    previous: Option<(String, String)>,
) -> Result<(), Error> {
    let config = &context.config;
    let version = table.version.max(ddl.commit_ts);
    let meta = TablePlace::new(&config.root, table, config.use_table_id_as_path).meta();
    let change = Change::of(ddl.kind);
    let mut file = SchemaFile::table(table, version, change, ddl.query.clone(), config.output_column_id);
    (file.previous_schema, file.previous_table) = previous.unzip();
    disk::persist(&context.stop, &meta, || file.write(&meta))
}

fn write_rename(context: &Context, ddl: &DdlEvent, table: &TableInfo) -> Result<(), Error> {
    let ends = match &ddl.dropped {
        Some(InfluencedTables::Normal(tables)) => tables.iter().any(|id| *id != TableId::DDL),
        Some(InfluencedTables::Schema(_) | InfluencedTables::All) => true,
        None => false,
    };
    if ends {
        // Under its new name nobody wants it.
        return write_end(context, ddl, ddl.query.clone());
    }
    let moves = (&table.schema, &table.name) != (&ddl.schema, &ddl.table);
    if context.config.use_table_id_as_path || !moves {
        return write_shape(context, ddl, table, None);
    }
    write_shape(context, ddl, table, Some((ddl.schema.clone(), ddl.table.clone())))?;
    // The statement is in the other file: whoever executes what files say must not execute it twice.
    write_end(context, ddl, String::new())
}

/// A table is no longer here.
fn write_end(context: &Context, ddl: &DdlEvent, query: String) -> Result<(), Error> {
    let config = &context.config;
    let place = if config.use_table_id_as_path {
        TablePlace::at(config.root.join(ddl.table_id.to_string()))
    } else {
        TablePlace::named(&config.root, &ddl.schema, &ddl.table)
    };
    let file = SchemaFile::bare(&ddl.schema, &ddl.table, ddl.commit_ts, Change::of(ddl.kind), query);
    let meta = place.meta();
    disk::persist(&context.stop, &meta, || file.write(&meta))
}

/// Something that has no table. There is no place for it among directories by table id.
fn write_schema(context: &Context, ddl: &DdlEvent) -> Result<(), Error> {
    let config = &context.config;
    if config.use_table_id_as_path || ddl.schema.is_empty() {
        return Ok(());
    }
    let file = SchemaFile::bare(&ddl.schema, "", ddl.commit_ts, Change::of(ddl.kind), ddl.query.clone());
    let meta = layout::schema_meta(&config.root, &ddl.schema);
    disk::persist(&context.stop, &meta, || file.write(&meta))
}
