//! The log side of a node: its stores and the event service that reads them.

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use heartbeatpb::{ChangefeedId, Ts, WallTime};
use messaging::MessageCenter;
use tokio_util::sync::CancellationToken;

use crate::Error;
use crate::crew::{self, CopyCrew, CopyEnds, Waiting};
use crate::event_service::{EventService, Stores};
use crate::event_store::{Gate, Store, StoreConfig, StoreStats, StoreWriter, remove_left_overs};

/// Limits of the log side.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LogConfig {
    /// Directory of the event stores; one folder a changefeed, disposable.
    pub dir: PathBuf,
    /// Bytes of recent changes kept in memory per changefeed.
    pub memory_bytes: usize,
    /// Bytes on disk per changefeed; when they are used up, the upstream is not read.
    pub disk_bytes: u64,
}

/// The stores of a node. Cheap to clone; all clones are one.
#[derive(Clone)]
pub struct LogService {
    config: LogConfig,
    center: MessageCenter,
    stores: Arc<Stores>,
    /// Orders to other nodes.
    waiting: Waiting,
}

impl std::fmt::Debug for LogService {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LogService").field("config", &self.config).finish_non_exhaustive()
    }
}

impl LogService {
    /// A log side without stores. What stores of an earlier process left in its directory is removed.
    #[must_use]
    pub fn new(center: MessageCenter, config: LogConfig) -> Self {
        remove_left_overs(&config.dir);
        Self { config, center, stores: Arc::default(), waiting: Waiting::default() }
    }

    /// Serves dispatchers until `shutdown`. Run once.
    pub async fn run(&self, shutdown: CancellationToken) {
        EventService::new(self.center.clone(), Arc::clone(&self.stores)).run(shutdown).await;
    }

    /// Writes parts of initial copies that other nodes make, with ends that `ends` opens, until `shutdown`. Run once: it also
    /// hears what others say about the parts that they write for copies of this node.
    pub async fn copy_for_others(&self, ends: Arc<dyn CopyEnds>, shutdown: CancellationToken) {
        crew::work(self.center.clone(), ends, self.waiting.clone(), shutdown).await;
    }

    /// The nodes that may write parts of the initial copy of a changefeed, as long as its store stays open. `feed` describes its
    /// ends to their [`CopyEnds`]. `None`: its log is not read here.
    #[must_use]
    pub fn crew(&self, changefeed: &ChangefeedId, feed: Bytes) -> Option<CopyCrew> {
        let store = self.store(changefeed)?;
        Some(CopyCrew::new(self.center.clone(), store, feed, self.waiting.clone()))
    }

    /// Opens the store of a changefeed at `checkpoint`, replacing one that was open.
    ///
    /// # Errors
    /// When its directory cannot be prepared.
    pub fn open(&self, changefeed: &ChangefeedId, checkpoint: Ts) -> Result<StoreWriter, Error> {
        self.close(changefeed);
        let config = StoreConfig {
            dir: self.config.dir.join(changefeed.gid.to_string()),
            memory_bytes: self.config.memory_bytes,
            disk_bytes: self.config.disk_bytes,
        };
        let changed = Arc::clone(&self.stores.changed);
        let (store, writer) = Store::open(changefeed.clone(), config, checkpoint, changed)?;
        self.stores.by_feed.lock().insert(changefeed.gid, store);
        self.stores.changed.notify_one();
        Ok(writer)
    }

    /// The maintainer of a changefeed has taken over, and lets nobody begin below `floor`: rows behind it are not needed
    /// again, on whichever node. Before this is said once, nothing is dropped.
    pub fn raise_floor(&self, changefeed: &ChangefeedId, floor: Ts) {
        if let Some(store) = self.store(changefeed) {
            store.raise_floor(floor);
        }
    }

    /// Closes the store of a changefeed and removes its files. Idempotent.
    pub fn close(&self, changefeed: &ChangefeedId) {
        let store = self.stores.by_feed.lock().remove(&changefeed.gid);
        if let Some(store) = store {
            store.close();
            self.stores.changed.notify_one();
        }
    }

    fn store(&self, changefeed: &ChangefeedId) -> Option<Arc<Store>> {
        self.stores.by_feed.lock().get(&changefeed.gid).cloned()
    }

    /// A way to make the streams of single tables of a changefeed stand still, as long as its store stays open. `None`: its
    /// log is not read here.
    #[must_use]
    pub fn gate(&self, changefeed: &ChangefeedId) -> Option<Gate> {
        self.store(changefeed).map(Gate::new)
    }

    /// Newest resolved ts of a changefeed that is read here, with its wall time.
    #[must_use]
    pub fn resolved(&self, changefeed: &ChangefeedId) -> Option<(Ts, WallTime)> {
        self.store(changefeed).map(|store| store.resolved())
    }

    /// Wall time of a position of a changefeed that is read here.
    #[must_use]
    pub fn time_of(&self, changefeed: &ChangefeedId, ts: Ts) -> Option<WallTime> {
        self.store(changefeed).and_then(|store| store.time_of(ts))
    }

    /// Sizes of a changefeed's store.
    #[must_use]
    pub fn stats(&self, changefeed: &ChangefeedId) -> Option<StoreStats> {
        self.store(changefeed).map(|store| store.stats())
    }
}
