//! A store whose disk is a value in memory: for tests and simulations, restarts included.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use super::image::{Change, Image};
use super::local::Journal;
use super::{KeyValue, LocalStore, Revision, StoreError};

/// What survives when every store opened on it is gone.
#[derive(Clone, Default)]
pub struct Disk {
    content: Arc<Mutex<Content>>,
    fails: Arc<AtomicBool>,
}

#[derive(Default)]
struct Content {
    revision: Revision,
    entries: BTreeMap<String, KeyValue>,
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Disk").field("revision", &self.content.lock().revision).finish_non_exhaustive()
    }
}

impl Disk {
    /// An empty disk.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// From now on every write fails, or works again.
    pub fn set_failing(&self, fails: bool) {
        self.fails.store(fails, Ordering::Relaxed);
    }
}

/// Opens the store on a disk, as a process does that starts.
///
/// # Errors
/// When the disk fails.
pub fn open(disk: &Disk) -> Result<LocalStore, StoreError> {
    let image = {
        let content = disk.content.lock();
        Image::new(content.revision, content.entries.values().cloned().collect())
    };
    LocalStore::start(image, 1, Box::new(disk.clone()))
}

impl Journal for Disk {
    fn append(&mut self, change: &Change) -> Result<(), String> {
        if self.fails.load(Ordering::Relaxed) {
            return Err("the disk fails".to_owned());
        }
        let mut content = self.content.lock();
        content.revision = change.revision;
        for key in &change.deletes {
            content.entries.remove(key);
        }
        for kv in &change.puts {
            content.entries.insert(kv.key.clone(), kv.clone());
        }
        Ok(())
    }

    fn blocks(&self) -> bool {
        false
    }
}
