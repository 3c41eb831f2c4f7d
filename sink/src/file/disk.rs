//! Files that appear complete or not at all, and what to do when the disk refuses.
//!
//! A file is written under a temporary name in its own directory, synced, and only then given its name; the
//! directory is synced after that. Data files get their name with a hard link, which fails where the name is
//! taken, so that nothing is ever overwritten.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use heartbeatpb::WritePermit;
use parking_lot::{Condvar, Mutex};

use super::trouble::Troubles;
use crate::Error;

/// First pause after a refusal.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Longest pause: what a disk that has room again waits for at most. An attempt may write a whole file before it fails.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// Temporary files older than this belong to nobody any more.
const TEMPORARY_AGE: Duration = Duration::from_secs(3600);

/// Between two looks at a permit that does not hold.
const PERMIT_LOOK: Duration = Duration::from_millis(20);

/// The directory of a sink's output, as it was when the sink was opened. It is created then and never again: where it is
/// gone, its file system is, and what were written in its place would be lost to readers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Root {
    path: PathBuf,
    /// It was a file system of its own.
    mounted: bool,
}

impl Root {
    /// Looks at a directory that is there.
    pub(crate) fn of(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), mounted: is_mounted(path)? })
    }

    /// Fails when the directory is gone, or a file system that was mounted there.
    pub(crate) fn is_there(&self) -> io::Result<()> {
        if self.path.as_os_str().is_empty() {
            return Ok(());
        }
        if self.mounted && !is_mounted(&self.path)? {
            return Err(io::Error::new(ErrorKind::NotFound, "nothing is mounted there any more"));
        }
        fs::metadata(&self.path).map(|_| ())
    }
}

/// Whether a directory is on another file system than the one that it is in.
fn is_mounted(path: &Path) -> io::Result<bool> {
    Ok(fs::metadata(path)?.dev() != fs::metadata(path.join(".."))?.dev())
}

/// Stops waits of blocking threads, and lets them write only while the process may.
#[derive(Debug, Default)]
pub(crate) struct Stop {
    stopped: Mutex<bool>,
    changed: Condvar,
    permit: WritePermit,
    root: Root,
    troubles: Troubles,
}

impl Stop {
    pub(crate) fn new(permit: WritePermit, root: Root, troubles: Troubles) -> Self {
        Self { permit, root, troubles, ..Self::default() }
    }

    /// Where everything is.
    pub(crate) fn root(&self) -> &Root {
        &self.root
    }

    /// What its threads wait for.
    pub(crate) fn troubles(&self) -> &Troubles {
        &self.troubles
    }

    /// Waits until this process may write.
    ///
    /// # Errors
    /// When it is stopped first.
    pub(crate) fn permitted(&self) -> Result<(), Error> {
        while !self.permit.holds() {
            if self.pause(PERMIT_LOOK) {
                return Err(Error::Closed);
            }
        }
        Ok(())
    }

    /// Whether this process may write.
    pub(crate) fn is_permitted(&self) -> bool {
        self.permit.holds()
    }

    pub(crate) fn stop(&self) {
        *self.stopped.lock() = true;
        self.changed.notify_all();
    }

    /// Waits; `true` when stopped.
    fn pause(&self, time: Duration) -> bool {
        let mut stopped = self.stopped.lock();
        if !*stopped {
            self.changed.wait_for(&mut stopped, time);
        }
        *stopped
    }
}

/// What to do about a refusal.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Verdict {
    /// Space or the file system may come back.
    Transient { code: &'static str, what: &'static str },
    /// A person must act.
    Fatal { code: &'static str, what: &'static str },
}

const EIO: i32 = 5;
const ENFILE: i32 = 23;
const EMFILE: i32 = 24;

#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "the standard library's kinds are open, and most need no word of ours"
)]
fn verdict(error: &io::Error) -> Verdict {
    let transient = |what| Verdict::Transient { code: "CDC:ErrSinkUnavailable", what };
    let fatal = |code, what| Verdict::Fatal { code, what };
    match error.kind() {
        ErrorKind::StorageFull => transient("the disk is full; free some space"),
        ErrorKind::QuotaExceeded => transient("the disk quota is used up; raise it or free some space"),
        ErrorKind::NotFound | ErrorKind::StaleNetworkFileHandle => {
            transient("a directory is gone; see that its file system is mounted")
        }
        ErrorKind::PermissionDenied => {
            fatal("CDC:ErrStorageSinkPermission", "permission is denied; let the server's user write there")
        }
        ErrorKind::ReadOnlyFilesystem => {
            fatal("CDC:ErrStorageSinkPermission", "the file system is read-only")
        }
        ErrorKind::NotADirectory => {
            fatal("CDC:ErrStorageSinkLayout", "a file is where a directory should be")
        }
        ErrorKind::IsADirectory => fatal("CDC:ErrStorageSinkLayout", "a directory is where a file should be"),
        ErrorKind::InvalidFilename => fatal("CDC:ErrStorageSinkLayout", "the file system refuses the name"),
        ErrorKind::FileTooLarge => {
            fatal("CDC:ErrStorageSinkLayout", "the file system refuses files of this size")
        }
        _ => match error.raw_os_error() {
            Some(EIO) => transient("the disk reports an input/output error"),
            Some(ENFILE | EMFILE) => transient("too many files are open; raise the limit"),
            _ => transient("the file system refuses"),
        },
    }
}

/// The error of a refusal that is not retried any further.
pub(crate) fn error(path: &Path, source: io::Error) -> Error {
    match verdict(&source) {
        Verdict::Transient { what, .. } => Error::Unavailable {
            what: format!("cannot write {}: {what} ({source})", path.display()),
            source: Some(Box::new(source)),
        },
        Verdict::Fatal { code, what } => {
            Error::Rejected { code, what: format!("cannot write {}: {what} ({source})", path.display()) }
        }
    }
}

/// Makes an `attempt` when this process may write, and repeats it while the disk's refusal is transient, until it succeeds
/// or `stop`. What lasts is told as the sink's trouble.
pub(crate) fn persist<T>(
    stop: &Stop,
    path: &Path,
    mut attempt: impl FnMut() -> io::Result<T>,
) -> Result<T, Error> {
    let mut pause = FIRST_PAUSE;
    let mut waiting = stop.troubles.waiting();
    loop {
        stop.permitted()?;
        let refusal = match stop.root.is_there().and_then(|()| attempt()) {
            Ok(value) => return Ok(value),
            Err(refusal) if refusal.kind() == ErrorKind::Interrupted => continue,
            Err(refusal) => error(path, refusal),
        };
        if !refusal.is_retryable() {
            return Err(refusal);
        }
        if waiting.failed(&refusal) {
            tracing::warn!(path = %path.display(), error = %refusal, "the disk refuses; trying again");
        }
        if stop.pause(pause) {
            return Err(Error::Closed);
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Makes a directory and its parents durable. Syncs every parent that got a new entry.
pub(crate) fn ensure_dir(dir: &Path) -> io::Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    if let Some(parent) = dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        ensure_dir(parent)?;
        match fs::create_dir(dir) {
            Err(e) if e.kind() == ErrorKind::AlreadyExists && dir.is_dir() => {}
            Err(e) if e.kind() == ErrorKind::AlreadyExists => return Err(ErrorKind::NotADirectory.into()),
            other => other?,
        }
        return sync_dir(parent);
    }
    fs::create_dir(dir)
}

/// Makes the entries of a directory durable.
pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Names of the entries of a directory; none when it does not exist.
pub(crate) fn list(dir: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut names = Vec::new();
    for entry in entries {
        if let Ok(name) = entry?.file_name().into_string() {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Reads a small file; `None` when it does not exist.
pub(crate) fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

fn temporary(dir: &Path, name: &str) -> PathBuf {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let count = COUNTER.fetch_add(1, Ordering::Relaxed);
    dir.join(format!(".{name}.{}-{count}.tmp", std::process::id()))
}

/// Writes and syncs a temporary file; removes it again on failure.
fn write_temporary(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let result = (|| {
        let mut file = OpenOptions::new().write(true).create_new(true).open(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    })();
    if result.is_err() {
        remove_quietly(path);
    }
    result
}

/// What stays behind is removed by [`remove_old_temporaries`]; readers never look at it.
fn remove_quietly(path: &Path) {
    if let Err(e) = fs::remove_file(path) {
        tracing::debug!(path = %path.display(), error = %e, "temporary file stays");
    }
}

/// As [`create`], and looks once more before the file appears: bringing it to the disk may have taken long. When this
/// process may not write any more, the attempt counts as interrupted.
pub(crate) fn create_permitted(stop: &Stop, dir: &Path, name: &str, bytes: &[u8]) -> io::Result<bool> {
    create_if(dir, name, bytes, || stop.is_permitted())
}

/// Creates `dir/name` with `bytes`, which appears complete or not at all. `false` when the name is taken.
/// Durable once [`sync_dir`] succeeded as well.
pub(crate) fn create(dir: &Path, name: &str, bytes: &[u8]) -> io::Result<bool> {
    create_if(dir, name, bytes, || true)
}

fn create_if(dir: &Path, name: &str, bytes: &[u8], permitted: impl FnOnce() -> bool) -> io::Result<bool> {
    ensure_dir(dir)?;
    let temporary = temporary(dir, name);
    let path = dir.join(name);
    write_temporary(&temporary, bytes)?;
    if !permitted() {
        remove_quietly(&temporary);
        return Err(ErrorKind::Interrupted.into());
    }
    let linked = match fs::hard_link(&temporary, &path) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(false),
        // Some file systems have no hard links. One dispatcher writes a directory, so that looking first is
        // enough where no fence was broken.
        Err(_) if path.exists() => Ok(false),
        Err(e) if matches!(e.kind(), ErrorKind::Unsupported | ErrorKind::PermissionDenied) => {
            return fs::rename(&temporary, &path).map(|()| true).inspect_err(|_| remove_quietly(&temporary));
        }
        Err(e) => Err(e),
    };
    remove_quietly(&temporary);
    linked
}

/// Replaces `dir/name` by `bytes`; a reader sees the old or the new content.
pub(crate) fn replace(dir: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    ensure_dir(dir)?;
    let temporary = temporary(dir, name);
    write_temporary(&temporary, bytes)?;
    fs::rename(&temporary, dir.join(name)).inspect_err(|_| remove_quietly(&temporary))?;
    sync_dir(dir)
}

/// As [`replace`], but a power failure may bring the old content back or spoil the file: for what can be lost.
pub(crate) fn replace_lazily(dir: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    ensure_dir(dir)?;
    let temporary = temporary(dir, name);
    fs::write(&temporary, bytes)
        .and_then(|()| fs::rename(&temporary, dir.join(name)))
        .inspect_err(|_| remove_quietly(&temporary))
}

/// Removes temporary files that a killed process left behind.
pub(crate) fn remove_old_temporaries(dir: &Path, names: &[String]) {
    for name in names.iter().filter(|name| name.starts_with('.') && name.ends_with(".tmp")) {
        let path = dir.join(name);
        let age = fs::metadata(&path).and_then(|meta| meta.modified()).ok().and_then(|at| at.elapsed().ok());
        if age.is_some_and(|age| age > TEMPORARY_AGE) {
            remove_quietly(&path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_never_overwritten_and_leaves_no_temporary() {
        let dir = tempfile::tempdir().expect("a directory");
        let deep = dir.path().join("a/b");
        assert!(create(&deep, "f", b"one").expect("created"));
        assert!(!create(&deep, "f", b"two").expect("taken"));
        assert_eq!(fs::read(deep.join("f")).expect("there"), b"one");
        replace(&deep, "g", b"1").expect("written");
        replace(&deep, "g", b"2").expect("replaced");
        assert_eq!(fs::read(deep.join("g")).expect("there"), b"2");
        assert_eq!(list(&deep).expect("listed"), ["f", "g"]);
    }

    #[test]
    fn a_full_disk_is_tried_again_until_there_is_room_and_told_meanwhile() {
        let stop = Stop::default();
        let mut told = Vec::new();
        let mut attempts = 0;
        let attempt = || {
            attempts += 1;
            stop.troubles.age(Duration::from_secs(60));
            told.push(stop.troubles.told().map(|error| error.to_string()).unwrap_or_default());
            if attempts < 3 { Err(ErrorKind::StorageFull.into()) } else { Ok(7) }
        };
        assert_eq!(persist(&stop, Path::new("x"), attempt).expect("the third attempt"), 7);
        assert!(told[0].is_empty() && told[1] == told[2], "{told:?}");
        assert!(
            told[1].contains("cannot write x: the disk is full") && told[1].contains("again"),
            "{told:?}"
        );
        assert!(stop.troubles.told().is_none(), "it is over");
    }

    #[test]
    fn a_directory_that_is_gone_is_waited_for_and_not_made_anew() {
        let dir = tempfile::tempdir().expect("a directory");
        let (root, away) = (dir.path().join("out"), dir.path().join("away"));
        fs::create_dir(&root).expect("created");
        let stop = Stop::new(WritePermit::always(), Root::of(&root).expect("there"), Troubles::default());
        fs::rename(&root, &away).expect("moved");
        let path = root.join("t/f");
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| persist(&stop, &path, || create(&root.join("t"), "f", b"one")));
            while stop.troubles.told().is_none() {
                stop.troubles.age(Duration::from_secs(60));
                std::thread::sleep(Duration::from_millis(1));
            }
            let told = stop.troubles.told().expect("told").to_string();
            assert!(told.contains("see that its file system is mounted"), "{told}");
            assert!(!root.exists());
            fs::rename(&away, &root).expect("moved back");
            assert!(writer.join().expect("ends").expect("written"));
        });
        assert!(path.exists() && stop.troubles.told().is_none());
    }

    #[test]
    fn a_denied_permission_is_fatal_at_once() {
        let mut attempts = 0;
        let denied = || -> io::Result<()> {
            attempts += 1;
            Err(ErrorKind::PermissionDenied.into())
        };
        let refused = persist(&Stop::default(), Path::new("x"), denied).expect_err("denied");
        assert_eq!(
            (refused.code(), refused.is_retryable(), attempts),
            ("CDC:ErrStorageSinkPermission", false, 1)
        );
    }

    #[test]
    fn nothing_appears_while_the_process_may_not_write_and_everything_afterwards() {
        let dir = tempfile::tempdir().expect("a directory");
        let time = std::sync::Arc::new(AtomicU64::new(0));
        let clock = std::sync::Arc::clone(&time);
        let permit = WritePermit::new(move || clock.load(Ordering::SeqCst));
        permit.hold_until(10);
        let stop = Stop::new(permit.clone(), Root::default(), Troubles::default());
        // It ends while the bytes are on their way to the disk.
        let late = || {
            create_if(dir.path(), "f", b"one", || {
                time.store(10, Ordering::SeqCst);
                stop.is_permitted()
            })
        };
        assert_eq!(late().expect_err("not permitted").kind(), ErrorKind::Interrupted);
        assert_eq!(list(dir.path()).expect("listed"), Vec::<String>::new());
        let mut attempts = 0;
        let path = dir.path().join("f");
        let written = std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                persist(&stop, &path, || {
                    attempts += 1;
                    create_permitted(&stop, dir.path(), "f", b"one")
                })
            });
            std::thread::sleep(3 * PERMIT_LOOK);
            assert!(!path.exists());
            permit.hold_until(20);
            writer.join().expect("ends")
        });
        assert!(written.expect("written") && path.exists() && attempts == 1);
        permit.hold_until(0);
        stop.stop();
        assert!(matches!(stop.permitted(), Err(Error::Closed)), "who stops does not wait for it");
    }

    #[test]
    fn a_stop_ends_the_retries() {
        let stop = Stop::default();
        stop.stop();
        let full = || -> io::Result<()> { Err(ErrorKind::StorageFull.into()) };
        assert!(matches!(persist(&stop, Path::new("x"), full), Err(Error::Closed)));
    }
}
