//! Where a node's metadata is: opens the store that the configuration names.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use coordinator::backend::{LocalStore, Store, StoreError};

use crate::config::{ServerConfig, StoreKind};

/// How long whoever held the embedded store may take to let go of it.
const RELEASE: Duration = Duration::from_secs(2);
/// Between two attempts to open it.
const AGAIN: Duration = Duration::from_millis(20);

/// Takes the data directory for this process until the file is dropped.
///
/// # Errors
/// When another process has it, or it cannot be written.
pub(super) fn lock(data_dir: &Path) -> anyhow::Result<File> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(data_dir.join("LOCK"))
        .with_context(|| format!("cannot open the lock file in {}", data_dir.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => bail!(StoreError::Locked(data_dir.display().to_string())),
        Err(TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("cannot lock the data directory {}", data_dir.display()))
        }
    }
}

/// Opens the embedded store. A call that a node of this process made before it stopped may still hold it.
async fn open_embedded(dir: PathBuf) -> anyhow::Result<LocalStore> {
    let deadline = Instant::now() + RELEASE;
    loop {
        let dir = dir.clone();
        match tokio::task::spawn_blocking(move || coordinator::backend::redb::open(&dir)).await? {
            Err(StoreError::Locked(_)) if Instant::now() < deadline => tokio::time::sleep(AGAIN).await,
            opened => return Ok(opened?),
        }
    }
}

/// Opens the store.
///
/// # Errors
/// When it cannot be opened or reached.
pub(super) async fn open(config: &ServerConfig, data_dir: &Path) -> anyhow::Result<Arc<dyn Store>> {
    match config.store.kind {
        StoreKind::Embedded => {
            let dir = if config.store.path.as_os_str().is_empty() {
                data_dir.join("meta")
            } else {
                config.store.path.clone()
            };
            Ok(Arc::new(open_embedded(dir).await.context("cannot open the metadata store")?))
        }
        #[cfg(not(feature = "etcd"))]
        StoreKind::Etcd => bail!("this program was built without etcd"),
        #[cfg(feature = "etcd")]
        StoreKind::Etcd => {
            let store = coordinator::backend::etcd::connect(config.store.etcd_config(&config.security))
                .await
                .context("cannot reach the metadata store")?;
            Ok(Arc::new(store))
        }
    }
}
