//! Segment files: the bytes of chunks, one after the other; the index in memory knows where each begins.

use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use crate::Error;

fn failed(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.display().to_string();
    move |source| Error::StoreIo { action, path, source }
}

/// Makes an empty directory.
pub(super) fn prepare(dir: &Path) -> Result<(), Error> {
    match std::fs::remove_dir_all(dir) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed("empty", dir)(error)),
    }
    std::fs::create_dir_all(dir).map_err(failed("create", dir))
}

/// Removes the directory; what cannot be removed now is removed when the store opens again.
pub(super) fn discard(dir: &Path) {
    let _ = std::fs::remove_dir_all(dir);
}

/// Writes chunks to a new file; answers the offset of each one's bytes. Not synced: the store is disposable.
pub(super) fn write<'a>(path: &Path, chunks: impl Iterator<Item = &'a Bytes>) -> Result<Vec<u64>, Error> {
    let file = File::create_new(path).map_err(failed("create", path))?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    let mut offsets = Vec::new();
    let mut at = 0u64;
    for bytes in chunks {
        offsets.push(at);
        out.write_all(bytes).map_err(failed("write", path))?;
        at += bytes.len() as u64;
    }
    out.flush().map_err(failed("write", path))?;
    Ok(offsets)
}

/// Reads a chunk's bytes.
pub(super) fn read(path: &Path, offset: u64, len: usize) -> Result<Bytes, Error> {
    let mut file = File::open(path).map_err(failed("open", path))?;
    file.seek(SeekFrom::Start(offset)).map_err(failed("read", path))?;
    let mut bytes = vec![0; len];
    file.read_exact(&mut bytes).map_err(failed("read", path))?;
    Ok(bytes.into())
}

/// Removes files that nobody needs.
pub(super) fn remove(files: &[Arc<PathBuf>]) {
    for file in files {
        if let Err(error) = std::fs::remove_file(file.as_path()) {
            tracing::warn!(path = %file.display(), %error, "cannot remove a segment file");
        }
    }
}
