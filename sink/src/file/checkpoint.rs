//! `metadata`: the checkpoint up to which readers may apply the files. The newest one wins, it never goes
//! back, and a disk that refuses delays it but never loses it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use heartbeatpb::{Ts, WritePermit};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use super::disk::Root;
use super::metrics::FileMetrics;
use super::trouble::Troubles;
use super::{disk, layout};

/// Least time between two writes.
const INTERVAL: Duration = Duration::from_secs(2);
/// Longest pause after a refusal.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Metadata {
    checkpoint_ts: Ts,
}

/// Reads the checkpoint of an output directory; `None` when it has none yet.
///
/// # Errors
/// When the file cannot be read or holds no checkpoint.
pub(crate) fn read(root: &Path) -> std::io::Result<Option<Ts>> {
    let Some(bytes) = disk::read(&root.join(layout::METADATA))? else { return Ok(None) };
    let metadata: Metadata = serde_json::from_slice(&bytes).map_err(|e| {
        std::io::Error::new(std::io::ErrorKind::InvalidData, format!("metadata is not readable: {e}"))
    })?;
    Ok(Some(metadata.checkpoint_ts))
}

/// Writes a checkpoint unless the file has a newer one: another node may have published it meanwhile.
fn write(root: &Path, checkpoint_ts: Ts) -> std::io::Result<()> {
    if read(root).is_ok_and(|known| known > Some(checkpoint_ts)) {
        return Ok(());
    }
    let text = serde_json::to_vec(&Metadata { checkpoint_ts }).map_err(std::io::Error::other)?;
    disk::replace(root, layout::METADATA, &text)
}

/// Where the file is.
#[derive(Clone, Debug)]
pub(super) struct Directory {
    pub(super) path: PathBuf,
    pub(super) root: Root,
    pub(super) troubles: Troubles,
}

/// The slot that holds the newest checkpoint until it is written.
#[derive(Debug)]
pub(super) struct CheckpointFile {
    directory: Directory,
    newest: AtomicU64,
    changed: Notify,
    permit: WritePermit,
    metrics: FileMetrics,
}

impl CheckpointFile {
    pub(super) fn new(directory: Directory, permit: WritePermit, metrics: FileMetrics) -> Self {
        Self { directory, newest: AtomicU64::new(0), changed: Notify::new(), permit, metrics }
    }

    /// Takes a checkpoint; one that is not newer changes nothing.
    pub(super) fn publish(&self, checkpoint: Ts) {
        if self.newest.fetch_max(checkpoint.0, Ordering::AcqRel) < checkpoint.0 {
            self.changed.notify_one();
        }
    }

    /// Writes what is published, for ever.
    pub(super) async fn run(&self) {
        let mut written = self.known().await;
        let mut pause = INTERVAL;
        let mut waiting = self.directory.troubles.waiting();
        loop {
            self.permit.granted().await;
            let newest = Ts(self.newest.load(Ordering::Acquire));
            if newest <= written {
                self.changed.notified().await;
                continue;
            }
            match self.store(newest).await {
                Ok(()) => {
                    written = newest;
                    pause = INTERVAL;
                    waiting.succeeded();
                }
                Err(e) => {
                    let error = disk::error(&self.directory.path.join(layout::METADATA), e);
                    if waiting.failed(&error) {
                        tracing::warn!(%error, checkpoint_ts = newest.0, "checkpoint is not written; trying again");
                    }
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// One last attempt, when the sink stops.
    pub(super) async fn close(&self) {
        let newest = Ts(self.newest.load(Ordering::Acquire));
        if self.permit.holds()
            && newest > self.known().await
            && let Err(e) = self.store(newest).await
        {
            tracing::warn!(error = %e, "the last checkpoint is not written");
        }
    }

    /// What the directory says. A file that cannot be read is replaced by the next checkpoint.
    async fn known(&self) -> Ts {
        let root = self.directory.path.clone();
        match tokio::task::spawn_blocking(move || read(&root)).await {
            Ok(Ok(known)) => known.unwrap_or_default(),
            Ok(Err(e)) => {
                tracing::warn!(error = %e, "the checkpoint of the output directory is not readable");
                Ts::ZERO
            }
            Err(_) => Ts::ZERO,
        }
    }

    async fn store(&self, checkpoint: Ts) -> std::io::Result<()> {
        let Directory { path, root, .. } = self.directory.clone();
        let started = Instant::now();
        tokio::task::spawn_blocking(move || root.is_there().and_then(|()| write(&path, checkpoint)))
            .await
            .map_err(std::io::Error::other)??;
        self.metrics.checkpoint(started.elapsed());
        Ok(())
    }
}

/// The slot of a sink, to be shared with its tasks.
pub(super) type SharedCheckpoint = Arc<CheckpointFile>;

#[cfg(test)]
mod tests {
    use heartbeatpb::ChangefeedId;

    use super::*;

    fn directory(path: &Path) -> Directory {
        Directory { path: path.to_owned(), root: Root::default(), troubles: Troubles::default() }
    }

    #[tokio::test]
    async fn the_newest_checkpoint_wins_and_never_goes_back() {
        let dir = tempfile::tempdir().expect("a directory");
        write(dir.path(), Ts(50)).expect("written");
        let metrics = FileMetrics::new(&ChangefeedId::fresh("test"));
        let file = CheckpointFile::new(directory(dir.path()), WritePermit::always(), metrics);
        file.publish(Ts(40));
        file.close().await;
        file.store(Ts(45)).await.expect("nothing to do");
        assert_eq!(read(dir.path()).expect("read"), Some(Ts(50)));
        file.publish(Ts(60));
        file.publish(Ts(55));
        file.close().await;
        assert_eq!(read(dir.path()).expect("read"), Some(Ts(60)));
        assert_eq!(std::fs::read(dir.path().join("metadata")).expect("there"), b"{\"checkpoint-ts\":60}");
    }

    #[tokio::test]
    async fn a_disk_that_refuses_does_not_end_the_publication() {
        let dir = tempfile::tempdir().expect("a directory");
        let root = dir.path().join("out");
        std::fs::write(&root, b"in the way").expect("a file where the directory should be");
        let metrics = FileMetrics::new(&ChangefeedId::fresh("test"));
        let file = CheckpointFile::new(directory(&root), WritePermit::always(), metrics);
        file.publish(Ts(7));
        file.close().await;
        std::fs::remove_file(&root).expect("removed");
        file.close().await;
        assert_eq!(read(&root).expect("read"), Some(Ts(7)), "the checkpoint was kept");
    }
}
