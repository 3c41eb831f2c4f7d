//! What the last file of a version holds, so that a restart does not write its rows again.
//!
//! Before a data file appears, `meta/CDC.progress` of its version notes the file's name, length and checksum
//! and the last row in it, and the same of the file before. After a crash the newest data file decides which
//! of the two notes is true. A note that does not fit the file is ignored, and rows are then written twice,
//! which a consumer can see from `(commit ts, row number)`.

use std::io;
use std::path::Path;

use heartbeatpb::{Gid, Ts};
use serde::{Deserialize, Serialize};

use super::{disk, layout};

const FILE: &str = "CDC.progress";

/// A row change of a table.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Position {
    pub(crate) commit_ts: Ts,
    pub(crate) row: u64,
}

/// A data file and how far it goes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Written {
    /// The changefeed that wrote it; positions of another one mean nothing here.
    pub(crate) changefeed: Gid,
    /// Path from the version's directory.
    pub(crate) file: String,
    pub(crate) bytes: u64,
    pub(crate) crc32: u32,
    /// Every row of the version up to here is in this file or an earlier one.
    pub(crate) last: Position,
}

/// Path of a data file from its version's directory.
pub(crate) fn relative(date: &str, name: &str) -> String {
    if date.is_empty() { name.to_owned() } else { format!("{date}/{name}") }
}

/// Notes the file that is about to appear, and the one before.
pub(crate) fn write(version: &Path, next: &Written, before: Option<&Written>) -> io::Result<()> {
    let notes: Vec<&Written> = std::iter::once(next).chain(before).collect();
    let text = serde_json::to_vec(&notes).map_err(io::Error::other)?;
    disk::replace_lazily(&version.join(layout::META), FILE, &text)
}

/// Data files of a version in reading order: date, writer, index; as paths from its directory.
pub(crate) fn data_files(version: &Path, extension: &str) -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    let names = disk::list(version)?;
    let dates = names.iter().filter(|name| layout::is_date_dir(name)).map(String::as_str);
    for date in std::iter::once("").chain(dates) {
        let mut files: Vec<((String, u64), String)> = disk::list(&version.join(date))?
            .into_iter()
            .filter_map(|name| Some((layout::parse_data_file(&name, extension)?, name)))
            .collect();
        files.sort();
        found.extend(files.into_iter().map(|(_, name)| relative(date, &name)));
    }
    Ok(found)
}

/// The last file of a version with its last row; `None` when there is no file or the note does not fit it.
pub(crate) fn recover(version: &Path, extension: &str, changefeed: Gid) -> io::Result<Option<Written>> {
    let Some(note) = disk::read(&version.join(layout::META).join(FILE))? else { return Ok(None) };
    let Ok(notes) = serde_json::from_slice::<Vec<Written>>(&note) else { return Ok(None) };
    let Some(newest) = data_files(version, extension)?.pop() else { return Ok(None) };
    let ours = |written: &Written| written.file == newest && written.changefeed == changefeed;
    let Some(written) = notes.into_iter().find(ours) else { return Ok(None) };
    let Some(bytes) = disk::read(&version.join(&newest))? else { return Ok(None) };
    let fits = bytes.len() as u64 == written.bytes && crc32fast::hash(&bytes) == written.crc32;
    Ok(fits.then_some(written))
}

/// Removes the note of a version.
pub(crate) fn forget(version: &Path) -> io::Result<()> {
    match std::fs::remove_file(version.join(layout::META).join(FILE)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FEED: Gid = Gid::new(1, 2);

    fn written(file: &str, bytes: &[u8], row: u64) -> Written {
        let last = Position { commit_ts: Ts(10), row };
        Written {
            changefeed: FEED,
            file: file.into(),
            bytes: bytes.len() as u64,
            crc32: crc32fast::hash(bytes),
            last,
        }
    }

    #[test]
    // behaviour: dataplane-8
    fn the_newest_file_decides_which_note_is_true() {
        let dir = tempfile::tempdir().expect("a directory");
        let recover = || recover(dir.path(), ".json", FEED).expect("read");
        assert_eq!(recover(), None);
        let (one, two) =
            (written("2024-01-01/CDC1.json", b"one", 1), written("2024-01-02/CDC1.json", b"two", 2));
        disk::create(&dir.path().join("2024-01-01"), "CDC1.json", b"one").expect("created");
        write(dir.path(), &two, Some(&one)).expect("noted");
        assert_eq!(recover(), Some(one), "the second file did not appear");
        disk::create(&dir.path().join("2024-01-02"), "CDC1.json", b"two").expect("created");
        assert_eq!(recover(), Some(two));
        disk::create(&dir.path().join("2024-01-02"), "CDC2.json", b"three").expect("created");
        assert_eq!(recover(), None, "nobody noted the third file");
    }

    #[test]
    fn a_note_that_does_not_fit_its_file_is_ignored() {
        let dir = tempfile::tempdir().expect("a directory");
        disk::create(dir.path(), "CDC1.csv", b"one").expect("created");
        write(dir.path(), &written("CDC1.csv", b"two", 9), None).expect("noted");
        assert_eq!(recover(dir.path(), ".csv", FEED).expect("read"), None);
    }

    #[test]
    fn the_note_of_another_changefeed_is_ignored() {
        let dir = tempfile::tempdir().expect("a directory");
        disk::create(dir.path(), "CDC1.csv", b"one").expect("created");
        write(dir.path(), &written("CDC1.csv", b"one", 9), None).expect("noted");
        assert!(recover(dir.path(), ".csv", FEED).expect("read").is_some());
        assert_eq!(recover(dir.path(), ".csv", Gid::new(3, 4)).expect("read"), None);
    }
}
