//! Where a node's metadata is: opens the store that the configuration names.

use std::fs::{File, TryLockError};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use coordinator::backend::{Store, StoreError};

use crate::config::{ServerConfig, StoreKind};

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
            let store = tokio::task::spawn_blocking(move || coordinator::backend::redb::open(&dir))
                .await?
                .context("cannot open the metadata store")?;
            Ok(Arc::new(store))
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
