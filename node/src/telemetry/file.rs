//! The log file: appended to, put aside when it is large, and measured.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use metrics::{Gauge, counter, gauge};
use parking_lot::Mutex;
use time::OffsetDateTime;
use time::macros::format_description;

use crate::config::LogFileConfig;
use crate::metrics as names;

/// How often sizes are looked at.
const LOOK: Duration = Duration::from_secs(30);

/// The file that the process writes to, once there is one.
static PATH: OnceLock<PathBuf> = OnceLock::new();

/// A log file that rotates.
pub(super) struct LogFile {
    path: PathBuf,
    file: File,
    size: u64,
    largest: u64,
    keep: LogFileConfig,
}

impl LogFile {
    /// Opens the file or makes it.
    pub(super) fn open(path: &Path, keep: &LogFileConfig) -> io::Result<Self> {
        let _ = PATH.set(path.to_owned());
        let largest = if keep.max_size == 0 { u64::MAX } else { keep.max_size.saturating_mul(1 << 20) };
        let file = Self { keep: keep.clone(), ..Self::with_limit(path, largest)? };
        file.forget_old();
        Ok(file)
    }

    fn with_limit(path: &Path, largest: u64) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        let size = file.metadata()?.len();
        Ok(Self { path: path.to_owned(), file, size, largest, keep: LogFileConfig::default() })
    }

    fn rotate(&mut self) -> io::Result<()> {
        let format =
            format_description!("[year]-[month]-[day]T[hour]-[minute]-[second].[subsecond digits:6]");
        let time = OffsetDateTime::now_utc().format(format).map_err(io::Error::other)?;
        let name =
            |part: Option<&std::ffi::OsStr>| part.map_or(String::new(), |p| p.to_string_lossy().into_owned());
        let (stem, extension) = (name(self.path.file_stem()), name(self.path.extension()));
        let dot = if extension.is_empty() { "" } else { "." };
        std::fs::rename(&self.path, self.path.with_file_name(format!("{stem}-{time}{dot}{extension}")))?;
        self.file = OpenOptions::new().create(true).append(true).open(&self.path)?;
        self.size = 0;
        self.forget_old();
        Ok(())
    }

    /// Removes files that were put aside too long ago, or that are too many. One that cannot be removed stays.
    fn forget_old(&self) {
        let LogFileConfig { max_days, max_backups, .. } = self.keep;
        if max_days == 0 && max_backups == 0 {
            return;
        }
        // Their names have the time in them: the newest is the last.
        let mut aside = put_aside(&self.path);
        aside.sort_unstable();
        let oldest = Duration::from_secs(max_days.saturating_mul(24 * 3600));
        for (newer, path) in aside.iter().rev().enumerate() {
            let age = std::fs::metadata(path)
                .and_then(|file| file.modified())
                .ok()
                .and_then(|at| at.elapsed().ok());
            let stale = max_days > 0 && age.is_some_and(|age| age > oldest);
            if stale || (max_backups > 0 && newer >= max_backups) {
                let _ = std::fs::remove_file(path);
            }
        }
    }
}

impl Write for LogFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.size > 0 && self.size + bytes.len() as u64 > self.largest {
            // A file that cannot be put aside grows on: nothing is lost.
            if let Err(error) = self.rotate() {
                eprintln!("the log file {} cannot be put aside: {error}", self.path.display());
            }
        }
        let written = self.file.write(bytes)?;
        self.size += written as u64;
        counter!(names::LOG_WRITTEN).increment(written as u64);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Sizes of the log file and of where it lies.
struct Sizes {
    file: Gauge,
    total: Gauge,
    disk_total: Gauge,
    disk_used: Gauge,
    looked: Option<Instant>,
}

/// Looks at the log file now and then.
#[expect(clippy::cast_precision_loss, reason = "sizes for people")]
pub(crate) fn measure() {
    static SIZES: OnceLock<Mutex<Sizes>> = OnceLock::new();
    let Some(path) = PATH.get() else { return };
    let sizes = SIZES.get_or_init(|| {
        Mutex::new(Sizes {
            file: gauge!(names::LOG_FILE_SIZE),
            total: gauge!(names::LOG_TOTAL_SIZE),
            disk_total: gauge!(names::LOG_DISK_TOTAL),
            disk_used: gauge!(names::LOG_DISK_USED),
            looked: None,
        })
    });
    let mut sizes = sizes.lock();
    if sizes.looked.is_some_and(|at| at.elapsed() < LOOK) {
        return;
    }
    sizes.looked = Some(Instant::now());
    sizes.file.set(std::fs::metadata(path).map_or(0, |file| file.len()) as f64);
    sizes.total.set(total_size(path) as f64);
    if let Ok(disk) = rustix::fs::statvfs(path) {
        sizes.disk_total.set((disk.f_blocks * disk.f_frsize) as f64);
        sizes.disk_used.set((disk.f_blocks.saturating_sub(disk.f_bfree) * disk.f_frsize) as f64);
    }
}

/// The files that were put aside by [`LogFile`], and no others: `stem-2026-03-01T08-00-00.000000.ext`.
fn put_aside(path: &Path) -> Vec<PathBuf> {
    let name =
        |part: Option<&std::ffi::OsStr>| part.map_or(String::new(), |p| p.to_string_lossy().into_owned());
    let begin = format!("{}-", name(path.file_stem()));
    let end = path.extension().map_or(String::new(), |end| format!(".{}", end.to_string_lossy()));
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let is_time = |text: &str| {
        let form = "0000-00-00T00-00-00.000000";
        text.len() == form.len()
            && text
                .bytes()
                .zip(form.bytes())
                .all(|(is, of)| if of == b'0' { is.is_ascii_digit() } else { is == of })
    };
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let ours = entries.flatten().filter(|entry| {
        let name = entry.file_name();
        let middle = name.to_str().and_then(|name| name.strip_prefix(&begin)?.strip_suffix(&end));
        middle.is_some_and(is_time)
    });
    ours.map(|entry| entry.path()).collect()
}

/// The file and those that were put aside, compressed by somebody or not.
fn total_size(path: &Path) -> u64 {
    let Some(stem) = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()) else { return 0 };
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    let ours = entries.flatten().filter(|entry| {
        let name = entry.file_name();
        let rest = name.to_str().and_then(|name| name.strip_prefix(&stem));
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '-']))
    });
    ours.filter_map(|entry| entry.metadata().ok()).map(|file| file.len()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    // behaviour: metrics-11
    #[test]
    fn a_large_file_is_put_aside_and_nothing_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.log");
        std::fs::write(&path, "before\n").unwrap();
        let mut file = LogFile::with_limit(&path, 20).unwrap();
        for n in 0..6 {
            file.write_all(format!("line {n}\n").as_bytes()).unwrap();
        }
        let mut names: Vec<_> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort_unstable();
        assert_eq!((names.len(), names[3].as_str()), (4, "node.log"), "{names:?}");
        assert!(names[0].starts_with("node-20") && names[0].ends_with(".log"), "{names:?}");
        let all: String =
            names.iter().map(|n| std::fs::read_to_string(dir.path().join(n)).unwrap()).collect();
        assert_eq!(all, "before\nline 0\nline 1\nline 2\nline 3\nline 4\nline 5\n");
        assert_eq!(total_size(&path), all.len() as u64);
    }

    #[test]
    fn files_that_were_put_aside_are_kept_as_long_as_configured_and_others_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.log");
        for other in
            ["node-notes.log", "node-2026-03-01.log", "node-2026-03-01T08-00-00.000000.txt", "other.log"]
        {
            std::fs::write(dir.path().join(other), "x").unwrap();
        }
        let limits = LogFileConfig { max_backups: 2, ..LogFileConfig::default() };
        let mut file = LogFile { largest: 10, ..LogFile::open(&path, &limits).unwrap() };
        for n in 0..6 {
            file.write_all(format!("line {n}..\n").as_bytes()).unwrap();
        }
        let mut kept = put_aside(&path);
        kept.sort_unstable();
        let texts: Vec<String> = kept.iter().map(|path| std::fs::read_to_string(path).unwrap()).collect();
        assert_eq!(texts, ["line 3..\n", "line 4..\n"]);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 4 + 2 + 1);
        // Too old is forgotten when the server starts.
        let old = std::time::SystemTime::now() - Duration::from_secs(3 * 24 * 3600);
        File::open(&kept[0]).unwrap().set_modified(old).unwrap();
        LogFile::open(&path, &LogFileConfig { max_days: 2, ..LogFileConfig::default() }).unwrap();
        assert_eq!(put_aside(&path), kept[1..]);
    }
}
