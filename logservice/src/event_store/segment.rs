//! Segment files: chunks one after the other; the index in memory knows where each begins, and its checksum.

use std::fs::{File, TryLockError};
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use event::TxnMark;
use heartbeatpb::{Ts, WallTime};

use crate::Error;

/// Bytes of a stored mark.
const MARK: usize = 36;

fn failed(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.display().to_string();
    move |source| Error::StoreIo { action, path, source }
}

/// File in a store's directory that is locked as long as the store lives.
const LIVE: &str = "live";
/// File beside the directories of stores; whoever makes or removes one holds its lock.
const TURN: &str = "turn";

/// A store's own directory.
pub(super) struct StoreDir {
    pub(super) path: PathBuf,
    /// Its lock tells others that the directory is in use.
    _live: File,
}

impl Drop for StoreDir {
    /// What cannot be removed now is removed when a store opens beside it.
    fn drop(&mut self) {
        self.discard();
    }
}

impl StoreDir {
    /// Makes a new directory below `parent`, and removes what earlier stores left there. A name is never used twice
    /// in a process: what a closed store still writes or removes is not taken for another one's.
    pub(super) fn open(parent: &Path) -> Result<Self, Error> {
        static OPENED: AtomicU64 = AtomicU64::new(0);
        std::fs::create_dir_all(parent).map_err(failed("create", parent))?;
        let turn_path = parent.join(TURN);
        let turn = File::create(&turn_path).map_err(failed("create", &turn_path))?;
        turn.lock().map_err(failed("lock", &turn_path))?;
        remove_unused(parent).map_err(failed("empty", parent))?;
        loop {
            let number = OPENED.fetch_add(1, Ordering::Relaxed);
            let path = parent.join(format!("{}-{number}", std::process::id()));
            match std::fs::create_dir(&path) {
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => continue,
                made => made.map_err(failed("create", &path))?,
            }
            let live_path = path.join(LIVE);
            let live = File::create_new(&live_path).map_err(failed("create", &live_path))?;
            live.lock().map_err(failed("lock", &live_path))?;
            return Ok(Self { path, _live: live });
        }
    }

    /// Removes the files.
    pub(super) fn discard(&self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

/// Removes below `dir` what belongs to no live store; says whether nothing is left but the lock.
fn remove_unused(dir: &Path) -> std::io::Result<bool> {
    let mut empty = true;
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            match is_live(&path) {
                true => empty = false,
                false => std::fs::remove_dir_all(&path)?,
            }
        } else if path.file_name().is_some_and(|name| name != TURN) {
            std::fs::remove_file(&path)?;
        }
    }
    Ok(empty)
}

fn is_live(dir: &Path) -> bool {
    let Ok(file) = File::open(dir.join(LIVE)) else { return false };
    matches!(file.try_lock(), Err(TryLockError::WouldBlock))
}

/// Removes what stores of any changefeed left below `root`: no store of this process is open yet.
pub(crate) fn remove_left_overs(root: &Path) {
    let Ok(entries) = std::fs::read_dir(root) else { return };
    for dir in entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()) {
        let removed = remove_unused(&dir).and_then(|empty| match empty {
            true => std::fs::remove_dir_all(&dir),
            false => Ok(()),
        });
        if let Err(error) = removed {
            tracing::warn!(path = %dir.display(), %error, "cannot remove what an event store left");
        }
    }
}

/// What becomes one chunk of a file: pieces in their order.
#[derive(Default)]
pub(super) struct Pieces {
    /// Transactions of the rows; empty when the index keeps them.
    pub(super) marks: Vec<Arc<[TxnMark]>>,
    pub(super) rows: Vec<Bytes>,
}

/// Where a chunk lies in its file.
#[derive(Clone, Copy)]
pub(super) struct Extent {
    pub(super) offset: u64,
    pub(super) len: usize,
    checksum: u32,
}

/// Writes chunks to a new file: for each the number of marks, the marks, the rows. Not synced: the store is disposable.
pub(super) fn write(path: &Path, chunks: &[Pieces]) -> Result<Vec<Extent>, Error> {
    let file = File::create_new(path).map_err(failed("create", path))?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    let mut extents = Vec::with_capacity(chunks.len());
    let mut offset = 0u64;
    for chunk in chunks {
        let head = put_marks(&chunk.marks);
        let mut checksum = crc32fast::Hasher::new();
        let mut len = 0;
        for bytes in std::iter::once(&head).chain(&chunk.rows) {
            checksum.update(bytes);
            out.write_all(bytes).map_err(failed("write", path))?;
            len += bytes.len();
        }
        extents.push(Extent { offset, len, checksum: checksum.finalize() });
        offset += len as u64;
    }
    out.flush().map_err(failed("write", path))?;
    Ok(extents)
}

/// Reads a chunk's marks and rows.
pub(super) fn read(path: &Path, extent: Extent) -> Result<(Vec<TxnMark>, Bytes), Error> {
    let mut file = File::open(path).map_err(failed("open", path))?;
    file.seek(SeekFrom::Start(extent.offset)).map_err(failed("read", path))?;
    let mut bytes = vec![0; extent.len];
    match file.read_exact(&mut bytes) {
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {}
        done => done.map_err(failed("read", path))?,
    }
    let mut bytes = Bytes::from(bytes);
    let intact = crc32fast::hash(&bytes) == extent.checksum;
    let marks = intact.then(|| take_marks(&mut bytes)).flatten();
    let marks = marks.ok_or_else(|| Error::StoreDamaged { path: path.display().to_string() })?;
    Ok((marks, bytes))
}

fn put_marks(marks: &[Arc<[TxnMark]>]) -> Bytes {
    let count: usize = marks.iter().map(|marks| marks.len()).sum();
    let mut out = BytesMut::with_capacity(8 + count * MARK);
    out.put_u64(count as u64);
    for mark in marks.iter().flat_map(|marks| marks.iter()) {
        out.put_u64(mark.commit_ts.0);
        out.put_u64(mark.start_ts.0);
        out.put_i64(mark.commit_time.0);
        out.put_u32(mark.rows);
        out.put_u64(mark.first_row);
    }
    out.freeze()
}

fn take_marks(bytes: &mut Bytes) -> Option<Vec<TxnMark>> {
    let count = usize::try_from(bytes.try_get_u64().ok()?).ok()?;
    if count.checked_mul(MARK)? > bytes.len() {
        return None;
    }
    let mark = |bytes: &mut Bytes| TxnMark {
        commit_ts: Ts(bytes.get_u64()),
        start_ts: Ts(bytes.get_u64()),
        commit_time: WallTime(bytes.get_i64()),
        rows: bytes.get_u32(),
        first_row: bytes.get_u64(),
    };
    Some((0..count).map(|_| mark(bytes)).collect())
}

/// Removes files that nobody needs.
pub(super) fn remove(files: &[Arc<PathBuf>]) {
    for file in files {
        if let Err(error) = std::fs::remove_file(file.as_path()) {
            tracing::warn!(path = %file.display(), %error, "cannot remove a segment file");
        }
    }
}
