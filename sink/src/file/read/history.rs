//! The life of each table by its schema files: where it began, what it was called before, when it ended.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use heartbeatpb::Ts;

use super::apply::TableState;
use super::{ReadColumn, ReplayError, ReplayedTable, directories, io, read_version};
use crate::encode::EncodeOptions;
use crate::file::layout;
use crate::file::schema::{self, Change, SchemaFile, Version};

type Files = Vec<(Version, SchemaFile)>;

/// The schema files of a directory tree.
pub(super) struct History<'a> {
    options: &'a EncodeOptions,
    limit: Ts,
    /// Directories of tables with their schema files by version.
    tables: Vec<(PathBuf, Files)>,
    /// When schemas were dropped.
    drops: BTreeMap<String, Vec<Ts>>,
}

/// Rows that count, and statements that count.
#[derive(Clone, Copy)]
struct Until {
    /// At or before it.
    rows: Ts,
    /// Before it.
    statements: Ts,
}

/// Whether a table is not in its directory any more from this file on.
fn ends(file: &SchemaFile) -> bool {
    let code = file.r#type;
    file.table_columns.is_empty() && (code == Change::DropTable.code() || code == Change::Rename.code())
}

impl<'a> History<'a> {
    /// Reads the schema files below `root`; rows and statements up to `limit` count.
    pub(super) fn read(root: &Path, options: &'a EncodeOptions, limit: Ts) -> Result<Self, ReplayError> {
        let mut history = Self { options, limit, tables: Vec::new(), drops: BTreeMap::new() };
        for outer in directories(root)? {
            for inner in directories(&outer)? {
                history.add(inner)?;
            }
            history.add(outer)?;
        }
        history.tables.sort_by_key(|(_, files)| files[0].0.version);
        Ok(history)
    }

    fn add(&mut self, dir: PathBuf) -> Result<(), ReplayError> {
        let meta = dir.join(layout::META);
        let (schemas, files): (Files, Files) =
            io(&meta, schema::read_all(&meta))?.into_iter().partition(|(_, file)| file.table.is_empty());
        for (version, file) in schemas {
            if file.r#type == Change::DropSchema.code() {
                self.drops.entry(file.schema).or_default().push(version.begins);
            }
        }
        if !files.is_empty() {
            self.tables.push((dir, files));
        }
        Ok(())
    }

    /// Tables that are there in the end, by schema and name.
    pub(super) fn tables(&self) -> Result<BTreeMap<(String, String), ReplayedTable>, ReplayError> {
        let until = Until { rows: self.limit, statements: self.limit.after() };
        let mut found = BTreeMap::new();
        for (dir, files) in &self.tables {
            let counts = |(version, _): &&(Version, SchemaFile)| version.begins < until.statements;
            let Some((_, named)) = files.iter().rfind(counts).or(files.first()) else { continue };
            if let Some(state) = self.state(dir, files, until)? {
                found.insert((named.schema.clone(), named.table.clone()), state.finish());
            }
        }
        Ok(found)
    }

    /// A table's rows; `None` when it is not there.
    fn state(&self, dir: &Path, files: &Files, until: Until) -> Result<Option<TableState>, ReplayError> {
        let mut state: Option<TableState> = None;
        let mut from = Ts::ZERO;
        for (version, file) in files {
            if self.was_dropped(&file.schema, from, version.begins.min(until.statements)) {
                state = None;
            }
            from = from.max(version.begins);
            let is_late = version.begins >= until.statements;
            let moves_in = file.previous_table.is_some();
            if is_late && (Change::empties(file.r#type) || moves_in || ends(file)) {
                continue;
            }
            if ends(file) {
                state = None;
                continue;
            }
            if moves_in {
                state = self.before_rename(file, version.begins)?;
            }
            let state = state.get_or_insert_default();
            if Change::empties(file.r#type) {
                state.clear();
            }
            state.reshape(file.table_columns.iter().map(ReadColumn::new).collect());
            read_version(&dir.join(version.version.to_string()), self.options, until.rows, state)?;
        }
        if self.was_dropped(files.last().map_or("", |(_, file)| &file.schema), from, until.statements) {
            state = None;
        }
        Ok(state)
    }

    /// What a table had under the name that it gave up at `at`.
    fn before_rename(&self, file: &SchemaFile, at: Ts) -> Result<Option<TableState>, ReplayError> {
        let is_it = |other: &SchemaFile| {
            Some(&other.schema) == file.previous_schema.as_ref()
                && Some(&other.table) == file.previous_table.as_ref()
        };
        let previous = self.tables.iter().find(|(_, files)| files.iter().any(|(_, other)| is_it(other)));
        match previous {
            Some((dir, files)) => self.state(dir, files, Until { rows: self.limit.min(at), statements: at }),
            None => Ok(None),
        }
    }

    /// Whether a schema was dropped behind `from` and before `until`.
    fn was_dropped(&self, schema: &str, from: Ts, until: Ts) -> bool {
        self.drops.get(schema).is_some_and(|drops| drops.iter().any(|at| *at > from && *at < until))
    }
}
