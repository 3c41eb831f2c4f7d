//! Reads the files of a directory back into tables, by the rules that any consumer has to follow.
//!
//! 1. Only rows at or before the checkpoint in `metadata` count.
//! 2. Versions of a table in order; a version whose schema file says truncated, dropped or created starts empty. One
//!    that says renamed, with columns, starts with what its previous name had; without, its table is there no longer.
//!    A dropped schema takes its tables along.
//! 3. In a version: dates, then file numbers. canal-json and debezium rows carry `(commit ts, row number)`:
//!    sorted by it, and each taken once; a delete and an insert of one number are an update that took the row to
//!    another part of the table. CSV rows carry the commit ts: rows that repeat what an earlier file of the same
//!    writer had are recognised by the commit ts going back; of several writers that have a row at one commit, the one
//!    with most changes of it counts.
//! 4. A value that the upstream did not send keeps what the row had.
//!
//! Everything is kept in memory: this is for verification, not for loading a warehouse.

mod apply;
mod history;
mod parse;
mod several;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use heartbeatpb::Ts;

use self::apply::TableState;
use self::history::History;
use super::schema::SchemaColumn;
use super::{checkpoint, disk, layout, progress};
use crate::encode::value::Class;
use crate::encode::{EncodeOptions, Format};

/// Rows by key, in the upstream's text form; NULL is `None`. A table without key has the whole row and the
/// number of the copy (`0`, `1`, …) as its key.
pub type Rows = BTreeMap<Vec<Option<String>>, Vec<Option<String>>>;

/// A table at the checkpoint.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ReplayedTable {
    /// Names of the columns, in the order of the rows' values.
    pub columns: Vec<String>,
    /// Names of the key columns; empty for a table without key.
    pub key: Vec<String>,
    /// Its rows.
    pub rows: Rows,
    /// Row changes that were applied.
    pub changes: u64,
    /// Row changes that were there twice and applied once.
    pub duplicates: u64,
}

/// What a directory says at its checkpoint.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Replay {
    /// Everything at or before it is applied.
    pub checkpoint: Ts,
    /// Tables by schema and name.
    pub tables: BTreeMap<(String, String), ReplayedTable>,
}

/// Why a directory cannot be read back.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReplayError {
    /// A file or directory cannot be read.
    #[error("cannot read {}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The files have no commit ts, so nobody knows which rows count.
    #[error(
        "rows have no commit ts; write files with include-commit-ts (csv) or enable-tidb-extension (canal-json)"
    )]
    NoCommitTs,
    /// A file holds something else than rows of its table.
    #[error("{} is malformed: {what}", path.display())]
    Malformed {
        /// Which.
        path: PathBuf,
        /// What is wrong; holds no value.
        what: String,
    },
}

/// Replays the files below `dir`, which were written with `options`, up to the checkpoint in `metadata` or
/// `up_to`, whichever is smaller.
///
/// # Errors
/// When a file cannot be read or is not what its name says.
pub fn replay(dir: &Path, options: &EncodeOptions, up_to: Option<Ts>) -> Result<Replay, ReplayError> {
    let without_ts = match options.format {
        Format::CanalJson => !options.canal_extension,
        Format::Csv => !options.csv.include_commit_ts,
        Format::Debezium => false,
    };
    if without_ts {
        return Err(ReplayError::NoCommitTs);
    }
    let known = io(dir, checkpoint::read(dir))?.unwrap_or_default();
    let limit = up_to.map_or(known, |up_to| known.min(up_to));
    Ok(Replay { checkpoint: limit, tables: History::read(dir, options, limit)?.tables()? })
}

fn io<T>(path: &Path, result: std::io::Result<T>) -> Result<T, ReplayError> {
    result.map_err(|source| ReplayError::Io { path: path.to_owned(), source })
}

fn directories(dir: &Path) -> Result<Vec<PathBuf>, ReplayError> {
    let names = io(dir, disk::list(dir))?;
    Ok(names.into_iter().map(|name| dir.join(name)).filter(|path| path.is_dir()).collect())
}

/// A column as its schema file has it.
#[derive(Clone, PartialEq, Eq, Debug)]
struct ReadColumn {
    name: String,
    class: Class,
    in_key: bool,
}

impl ReadColumn {
    fn new(column: &SchemaColumn) -> Self {
        let class = Class::of_schema_file(
            &column.column_type,
            &column.column_source_type,
            column.column_precision.parse().ok(),
            column.column_scale.parse().ok(),
            column.column_elems.clone(),
        );
        Self { name: column.column_name.clone(), class, in_key: column.column_is_pk == "true" }
    }
}

/// Applies the rows of one version.
fn read_version(
    dir: &Path,
    options: &EncodeOptions,
    limit: Ts,
    state: &mut TableState,
) -> Result<(), ReplayError> {
    let mut changes = Vec::new();
    let mut reader = parse::Reader::new(options, state.columns());
    for name in io(dir, progress::data_files(dir, options.format.extension()))? {
        let path = dir.join(&name);
        let bytes = io(&path, std::fs::read(&path))?;
        reader.enter(layout::writer_of(&name, options.format.extension()));
        reader
            .read(&bytes, limit, &mut changes)
            .map_err(|what| ReplayError::Malformed { path: path.clone(), what })?;
    }
    let duplicates = reader.finish(&mut changes);
    state.apply(changes, duplicates).map_err(|what| ReplayError::Malformed { path: dir.to_owned(), what })
}
