//! Schema files: the shape of a table or schema at a version, and which version a dispatcher writes to.
//!
//! Beyond the known keys a column has `ColumnSourceType`, the upstream's own type, and a file has `CommitTs`
//! where the version had to differ from the commit that made it (two truncations in one transaction), and
//! `PreviousSchema` and `PreviousTable` where a rename brought the table there.

use std::io;
use std::path::Path;

use event::{DdlKind, TableInfo};
use heartbeatpb::Ts;
use serde::{Deserialize, Serialize};

use super::{disk, layout};
use crate::encode::value::Class;

/// What a version begins with, in the numbering that consumers know.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Change {
    None,
    CreateSchema,
    DropSchema,
    CreateTable,
    DropTable,
    Truncate,
    Alter,
    Rename,
}

impl Change {
    pub(crate) const fn code(self) -> u8 {
        match self {
            Change::None => 0,
            Change::CreateSchema => 1,
            Change::DropSchema => 2,
            Change::CreateTable => 3,
            Change::DropTable => 4,
            Change::Truncate => 11,
            Change::Alter => 12,
            Change::Rename => 14,
        }
    }

    pub(crate) fn of(kind: DdlKind) -> Self {
        match kind {
            DdlKind::CreateSchema => Change::CreateSchema,
            DdlKind::DropSchema => Change::DropSchema,
            DdlKind::CreateTable => Change::CreateTable,
            DdlKind::DropTable => Change::DropTable,
            DdlKind::RenameTable => Change::Rename,
            DdlKind::AlterTable => Change::Alter,
            DdlKind::TruncateTable => Change::Truncate,
            // Kinds that are added later have no number that consumers know.
            DdlKind::Other | _ => Change::None,
        }
    }

    /// Whether the version of a file with this code starts without the rows of earlier versions.
    pub(crate) const fn empties(code: u8) -> bool {
        matches!(code, 3 | 4 | 11)
    }
}

/// A column of a schema file.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(crate) struct SchemaColumn {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) column_id: String,
    pub(crate) column_name: String,
    pub(crate) column_type: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) column_default: Option<String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) column_precision: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) column_scale: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) column_nullable: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) column_is_pk: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) column_elems: Vec<String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) column_source_type: String,
}

/// A schema file.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct SchemaFile {
    pub(crate) table: String,
    pub(crate) schema: String,
    pub(crate) version: u64,
    pub(crate) table_version: Ts,
    pub(crate) query: String,
    pub(crate) r#type: u8,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) commit_ts: Option<Ts>,
    /// Of a rename: what the table was called.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) previous_schema: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) previous_table: Option<String>,
    pub(crate) table_columns: Vec<SchemaColumn>,
    pub(crate) table_columns_total: usize,
}

/// What the checksum covers.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Covered<'a> {
    table: &'a str,
    schema: &'a str,
    version: u64,
    table_columns: Vec<&'a SchemaColumn>,
    table_columns_total: usize,
}

/// JSON with an indent of four spaces.
fn indented(value: &impl Serialize) -> Vec<u8> {
    let mut out = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    let mut serializer = serde_json::Serializer::with_formatter(&mut out, formatter);
    value.serialize(&mut serializer).expect("strings and numbers always serialize");
    out
}

fn columns(table: &TableInfo, ids: bool) -> Vec<SchemaColumn> {
    let key = table.handle_key().map(|key| key.columns.as_slice()).unwrap_or_default();
    table
        .columns
        .iter()
        .enumerate()
        .filter(|(_, column)| column.generated.is_none())
        .map(|(index, column)| {
            let class = Class::of(&column.ty);
            let (precision, scale) = class.precision();
            let text = |number: Option<String>| number.unwrap_or_default();
            SchemaColumn {
                column_id: if ids { (index + 1).to_string() } else { String::new() },
                column_name: column.name.clone(),
                column_type: class.mysql().name.to_ascii_uppercase(),
                column_default: column.default.clone(),
                column_precision: text(precision.map(|n| n.to_string())),
                column_scale: text(scale.map(|n| n.to_string())),
                column_nullable: if column.nullable { String::new() } else { "false".into() },
                column_is_pk: if key.contains(&index) { "true".into() } else { String::new() },
                column_elems: if let Class::Enum(labels) = &class { labels.clone() } else { Vec::new() },
                column_source_type: column.ty.sql.clone(),
            }
        })
        .collect()
}

impl SchemaFile {
    /// The file of a table's shape.
    pub(crate) fn table(table: &TableInfo, version: Ts, change: Change, query: String, ids: bool) -> Self {
        let columns = columns(table, ids);
        Self {
            table: table.name.clone(),
            schema: table.schema.clone(),
            version: 1,
            table_version: version,
            query,
            r#type: change.code(),
            commit_ts: None,
            previous_schema: None,
            previous_table: None,
            table_columns_total: columns.len(),
            table_columns: columns,
        }
    }

    /// The file of something that has no columns: a schema, or a table that is gone.
    pub(crate) fn bare(schema: &str, table: &str, version: Ts, change: Change, query: String) -> Self {
        Self {
            table: table.into(),
            schema: schema.into(),
            version: 1,
            table_version: version,
            query,
            r#type: change.code(),
            commit_ts: None,
            previous_schema: None,
            previous_table: None,
            table_columns: Vec::new(),
            table_columns_total: 0,
        }
    }

    /// Depends on the shape alone, neither on version nor query.
    pub(crate) fn checksum(&self) -> u32 {
        let mut table_columns: Vec<_> = self.table_columns.iter().collect();
        table_columns.sort_by(|a, b| a.column_name.cmp(&b.column_name));
        crc32fast::hash(&indented(&Covered {
            table: &self.table,
            schema: &self.schema,
            version: 0,
            table_columns,
            table_columns_total: self.table_columns_total,
        }))
    }

    /// The commit at which the version begins.
    pub(crate) fn begins(&self) -> Ts {
        self.commit_ts.unwrap_or(self.table_version)
    }

    /// Writes the file unless it is there.
    pub(crate) fn write(&self, meta: &Path) -> io::Result<()> {
        let name = layout::schema_file(self.table_version, self.checksum());
        if !meta.join(&name).exists() {
            disk::create(meta, &name, &indented(self))?;
        }
        disk::sync_dir(meta)
    }
}

/// A version that is on disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Version {
    pub(crate) version: Ts,
    pub(crate) checksum: u32,
    /// The commit at which it begins.
    pub(crate) begins: Ts,
}

/// Reads every schema file of a directory, by version. A file whose content does not fit its name is an error.
pub(crate) fn read_all(meta: &Path) -> io::Result<Vec<(Version, SchemaFile)>> {
    let mut files = Vec::new();
    let names = disk::list(meta)?;
    disk::remove_old_temporaries(meta, &names);
    for name in names {
        let Some((version, checksum)) = layout::parse_schema_file(&name) else { continue };
        let Some(bytes) = disk::read(&meta.join(&name))? else { continue };
        let file: SchemaFile = serde_json::from_slice(&bytes).map_err(|e| {
            io::Error::new(io::ErrorKind::InvalidData, format!("schema file {name} is not readable: {e}"))
        })?;
        if file.table_version != version || file.checksum() != checksum {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("schema file {name} was changed: its checksum or version does not fit its name"),
            ));
        }
        files.push((Version { version, checksum, begins: file.begins() }, file));
    }
    files.sort_by_key(|(version, _)| (version.version, version.checksum));
    Ok(files)
}

/// Which version a table's rows go to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Choice {
    /// One that is on disk.
    Existing(Version),
    /// A new one, of this number.
    New(Ts),
}

/// Chooses the version of rows behind `position` for a shape with `checksum` that is valid from `valid_from`.
///
/// Versions that begin behind `position` are those of a future that is being replayed: rows before that
/// future go to the version they belonged to, so that a reader, which goes by version, meets them in order.
/// They are never left out.
pub(crate) fn choose(on_disk: &[Version], position: Ts, checksum: u32, valid_from: Ts) -> Choice {
    let current =
        on_disk.iter().filter(|version| version.begins <= position).max_by_key(|version| version.version);
    let newer = |version: &&Version| current.is_none_or(|current| current.version < version.version);
    let exact = on_disk.iter().find(|version| version.version == valid_from && version.checksum == checksum);
    if let Some(exact) = exact.filter(newer) {
        return Choice::Existing(*exact);
    }
    if let Some(current) = current.filter(|current| current.checksum == checksum) {
        return Choice::Existing(*current);
    }
    Choice::New(free(
        on_disk,
        current.map_or(valid_from, |current| valid_from.max(current.version.after())),
        checksum,
    ))
}

/// The first number from `wanted` that no other shape has.
pub(crate) fn free(on_disk: &[Version], mut wanted: Ts, checksum: u32) -> Ts {
    while on_disk.iter().any(|version| version.version == wanted && version.checksum != checksum) {
        wanted = wanted.after();
    }
    wanted
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::table;

    fn version(version: u64, checksum: u32) -> Version {
        Version { version: Ts(version), checksum, begins: Ts(version) }
    }

    #[test]
    fn a_shape_goes_to_the_version_that_was_current_at_its_position() {
        let disk = [version(10, 1), version(50, 1), version(90, 2)];
        for (position, checksum, valid_from, expected) in [
            (20, 1, 10, Choice::Existing(disk[0])),
            (49, 1, 30, Choice::Existing(disk[0])),
            (50, 1, 10, Choice::Existing(disk[1])),
            (60, 2, 90, Choice::Existing(disk[2])),
            (95, 2, 95, Choice::Existing(disk[2])),
            (95, 1, 10, Choice::New(Ts(91))),
            (95, 3, 95, Choice::New(Ts(95))),
            (5, 1, 5, Choice::New(Ts(5))),
        ] {
            assert_eq!(
                choose(&disk, Ts(position), checksum, Ts(valid_from)),
                expected,
                "{position} {checksum}"
            );
        }
        assert_eq!(choose(&[], Ts(5), 1, Ts(7)), Choice::New(Ts(7)));
        assert_eq!(choose(&[version(7, 2)], Ts(5), 1, Ts(7)), Choice::New(Ts(8)));
    }

    #[test]
    fn the_second_truncation_of_a_transaction_is_current_from_its_commit_on() {
        let disk = [version(10, 1), version(50, 1), Version { version: Ts(51), checksum: 1, begins: Ts(50) }];
        assert_eq!(choose(&disk, Ts(50), 1, Ts(10)), Choice::Existing(disk[2]));
        assert_eq!(choose(&disk, Ts(49), 1, Ts(10)), Choice::Existing(disk[0]));
    }

    #[test]
    fn the_checksum_is_that_of_the_shape() {
        let shape = table(7, 2);
        let one = SchemaFile::table(&shape, Ts(1), Change::None, String::new(), false);
        let two = SchemaFile::table(&shape, Ts(9), Change::Truncate, "TRUNCATE TABLE x".into(), false);
        assert_eq!(one.checksum(), two.checksum());
        let other = SchemaFile::table(&table(7, 3), Ts(1), Change::None, String::new(), false);
        assert_ne!(one.checksum(), other.checksum());
    }

    #[test]
    fn a_schema_file_reads_back_and_a_changed_one_is_noticed() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = SchemaFile::table(&table(7, 2), Ts(5), Change::None, String::new(), false);
        file.write(dir.path()).expect("written");
        file.write(dir.path()).expect("there already");
        let read = read_all(dir.path()).expect("read");
        assert_eq!(read.len(), 1);
        assert_eq!(read[0].1, file);
        let path = dir.path().join(layout::schema_file(Ts(5), file.checksum()));
        let text = std::fs::read_to_string(&path).expect("there");
        std::fs::write(&path, text.replace("c1", "c9")).expect("changed");
        assert!(read_all(dir.path()).is_err());
    }
}
