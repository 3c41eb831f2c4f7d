//! Paths of the file sink, and what a name in a directory says.
//!
//! ```text
//! <root>/metadata
//! <root>/<schema>/meta/schema_<version>_<checksum>.json
//! <root>/<schema>/<table>/meta/schema_<version>_<checksum>.json
//! <root>/<schema>/<table>/<version>[/<date>]/CDC<index>.<ext>
//! <root>/<schema>/<table>/<version>[/<date>]/meta/CDC.index
//! ```
//!
//! With table ids as paths `<tableID>` takes the place of `<schema>/<table>`; with tables that several
//! dispatchers write, `CDC_<dispatcher>_<index>.<ext>` and `CDC_<dispatcher>.index`. A name that is no plain
//! path segment is percent-encoded; the schema file has the name as it is.

use std::path::{Path, PathBuf};

use event::TableInfo;
use heartbeatpb::config::DateSeparator;
use heartbeatpb::{DispatcherId, Ts};

/// The checkpoint of the changefeed.
pub(crate) const METADATA: &str = "metadata";
/// Directory of schema and index files.
pub(crate) const META: &str = "meta";

/// A schema or table name as a path segment: `/`, `\`, `%`, control characters and a leading dot are
/// percent-encoded, and so is a name that the layout uses itself.
pub(crate) fn segment(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    let mut buffer = [0; 4];
    for (at, c) in name.char_indices() {
        let plain =
            !(c.is_control() || matches!(c, '/' | '\\' | '%') || at == 0 && (c == '.' || name == METADATA));
        if plain {
            out.push(c);
        } else {
            for byte in c.encode_utf8(&mut buffer).bytes() {
                out.push_str(&format!("%{byte:02X}"));
            }
        }
    }
    if out.is_empty() { "%".into() } else { out }
}

/// Where a table's files are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct TablePlace {
    dir: PathBuf,
}

impl TablePlace {
    pub(crate) fn new(root: &Path, table: &TableInfo, by_id: bool) -> Self {
        if by_id {
            return Self { dir: root.join(table.id.to_string()) };
        }
        Self::named(root, &table.schema, &table.name)
    }

    pub(crate) fn named(root: &Path, schema: &str, table: &str) -> Self {
        Self { dir: root.join(segment(schema)).join(segment(table)) }
    }

    pub(crate) fn at(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Directory of the schema files.
    pub(crate) fn meta(&self) -> PathBuf {
        self.dir.join(META)
    }

    /// Directory of a version's data.
    pub(crate) fn version(&self, version: Ts) -> PathBuf {
        self.dir.join(version.to_string())
    }
}

/// Directory of the schema files of a schema itself.
pub(crate) fn schema_meta(root: &Path, schema: &str) -> PathBuf {
    root.join(segment(schema)).join(META)
}

/// Name of a schema file.
pub(crate) fn schema_file(version: Ts, checksum: u32) -> String {
    format!("schema_{version}_{checksum:010}.json")
}

/// Version and checksum of a schema file's name.
pub(crate) fn parse_schema_file(name: &str) -> Option<(Ts, u32)> {
    let (version, checksum) = name.strip_prefix("schema_")?.strip_suffix(".json")?.split_once('_')?;
    (checksum.len() == 10).then_some(())?;
    Some((Ts(version.parse().ok()?), checksum.parse().ok()?))
}

/// How data files are named.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct DataNames {
    /// `CDC` or `CDC_<dispatcher>_`.
    prefix: String,
    index_file: String,
    extension: &'static str,
    digits: usize,
}

impl DataNames {
    pub(crate) fn new(dispatcher: Option<DispatcherId>, extension: &'static str, digits: usize) -> Self {
        let (prefix, index_file) = match dispatcher {
            None => ("CDC".to_owned(), "CDC.index".to_owned()),
            Some(id) => (format!("CDC_{id}_"), format!("CDC_{id}.index")),
        };
        Self { prefix, index_file, extension, digits }
    }

    pub(crate) fn data(&self, index: u64) -> String {
        format!("{}{index:0width$}{}", self.prefix, self.extension, width = self.digits)
    }

    pub(crate) fn index_file(&self) -> &str {
        &self.index_file
    }

    /// The index of a data file of this writer; `None` for any other name.
    pub(crate) fn parse(&self, name: &str) -> Option<u64> {
        let digits = name.strip_prefix(&self.prefix)?.strip_suffix(self.extension)?;
        parse_index(digits)
    }
}

fn parse_index(digits: &str) -> Option<u64> {
    (!digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit())).then(|| digits.parse().ok())?
}

/// Writer and index of any data file's name; the writer is empty for plain names.
pub(crate) fn parse_data_file(name: &str, extension: &str) -> Option<(String, u64)> {
    let stem = name.strip_prefix("CDC")?.strip_suffix(extension)?;
    match stem.strip_prefix('_') {
        None => Some((String::new(), parse_index(stem)?)),
        Some(rest) => {
            let (writer, digits) = rest.rsplit_once('_')?;
            Some((writer.to_owned(), parse_index(digits)?))
        }
    }
}

/// The writer of a data file, by its path from the version's directory; empty for plain names.
pub(crate) fn writer_of(path: &str, extension: &str) -> String {
    let name = path.rsplit_once('/').map_or(path, |(_, name)| name);
    parse_data_file(name, extension).map(|(writer, _)| writer).unwrap_or_default()
}

/// The directory of a day, month or year, in UTC; empty without dates.
pub(crate) fn date_dir(separator: DateSeparator, unix_seconds: i64) -> String {
    let date = crate::encode::moment::date_text(unix_seconds.div_euclid(86_400));
    let cut = match separator {
        DateSeparator::None => 0,
        DateSeparator::Year => 4,
        DateSeparator::Month => 7,
        DateSeparator::Day => 10,
    };
    date.get(..cut).unwrap_or_default().to_owned()
}

/// Whether a directory name is one of [`date_dir`]'s.
pub(crate) fn is_date_dir(name: &str) -> bool {
    matches!(name.len(), 4 | 7 | 10)
        && name
            .bytes()
            .enumerate()
            .all(|(at, b)| if matches!(at, 4 | 7) { b == b'-' } else { b.is_ascii_digit() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_leaves_its_directory_or_meets_another() {
        for (name, expected) in [
            ("orders", "orders"),
            ("..", "%2E."),
            (".hidden", "%2Ehidden"),
            ("a/b", "a%2Fb"),
            ("a%2Fb", "a%252Fb"),
            ("a\\b\n", "a%5Cb%0A"),
            ("metadata", "%6Detadata"),
            ("", "%"),
            ("größe", "größe"),
        ] {
            assert_eq!(segment(name), expected);
        }
    }

    #[test]
    fn names_read_back() {
        let plain = DataNames::new(None, ".json", 20);
        assert_eq!(plain.data(7), "CDC00000000000000000007.json");
        assert_eq!(plain.parse("CDC00000000000000000007.json"), Some(7));
        for other in ["CDC.index", "CDC_1_7.json", "CDC7.csv", ".CDC7.json.1.tmp", "CDC+7.json"] {
            assert_eq!(plain.parse(other), None, "{other}");
        }
        let many = DataNames::new(Some(DispatcherId::new(1, 2)), ".csv", 6);
        let name = many.data(12);
        assert_eq!(many.parse(&name), Some(12));
        let writer = DispatcherId::new(1, 2).to_string();
        assert_eq!(parse_data_file(&name, ".csv"), Some((writer, 12)));
        assert_eq!(schema_file(Ts(5), 42), "schema_5_0000000042.json");
        assert_eq!(parse_schema_file("schema_5_0000000042.json"), Some((Ts(5), 42)));
        assert_eq!(parse_schema_file("schema_5_42.json"), None);
    }

    #[test]
    fn a_date_directory_is_in_utc() {
        let noon = 1_709_208_000;
        assert_eq!(date_dir(DateSeparator::Day, noon), "2024-02-29");
        assert_eq!(date_dir(DateSeparator::Month, noon), "2024-02");
        assert_eq!(date_dir(DateSeparator::Year, noon), "2024");
        assert_eq!(date_dir(DateSeparator::None, noon), "");
        assert!(
            is_date_dir("2024-02-29") && is_date_dir("2024") && !is_date_dir("meta") && !is_date_dir("20240")
        );
    }
}
