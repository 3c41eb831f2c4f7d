//! The bindings under test, and how a process opens them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use coordinator::backend::etcd::{EtcdConfig, connect};
use coordinator::backend::memory::Disk;
use coordinator::backend::{Compare, Op, Store, Txn, memory, redb};
use testkit::Etcd;
use tokio::sync::OnceCell;

/// A binding with its content, which outlives the processes that open it.
pub(crate) enum Binding {
    Memory(Disk),
    Redb(tempfile::TempDir),
    Etcd(EtcdConfig),
}

/// One etcd for all tests of the suite: it costs a second to start. Each test has a prefix of its own.
static SHARED: OnceCell<Etcd> = OnceCell::const_new();
static PREFIXES: AtomicUsize = AtomicUsize::new(0);

impl Binding {
    pub(crate) async fn memory() -> Self {
        Self::Memory(Disk::new())
    }

    pub(crate) async fn redb() -> Self {
        Self::Redb(tempfile::tempdir().unwrap())
    }

    pub(crate) async fn etcd() -> Self {
        let etcd = SHARED.get_or_init(|| async { Etcd::start().await.unwrap() }).await;
        let prefix = format!("/test-{}", PREFIXES.fetch_add(1, Ordering::Relaxed));
        Self::Etcd(EtcdConfig { prefix, ..EtcdConfig::new(etcd.endpoints()) })
    }

    /// Opens it as a process does that starts.
    pub(crate) async fn open(&self) -> Arc<dyn Store> {
        match self {
            Self::Memory(disk) => Arc::new(memory::open(disk).unwrap()),
            Self::Redb(dir) => Arc::new(redb::open(dir.path()).unwrap()),
            Self::Etcd(config) => Arc::new(connect(config.clone()).await.unwrap()),
        }
    }

    /// Whether nobody else writes to it, so that revisions can be counted.
    pub(crate) fn is_alone(&self) -> bool {
        match self {
            Self::Memory(_) | Self::Redb(_) => true,
            Self::Etcd(_) => false,
        }
    }
}

pub(crate) fn put(key: &str, value: &str) -> Txn {
    Txn { then: vec![Op::put(key, value.as_bytes().to_vec())], ..Txn::default() }
}

pub(crate) fn when(compare: Compare, key: &str, value: &str) -> Txn {
    Txn { when: vec![compare], ..put(key, value) }
}

pub(crate) async fn value(store: &dyn Store, key: &str) -> Option<String> {
    store.get(key).await.unwrap().found.map(|kv| String::from_utf8(kv.value).unwrap())
}

/// Waits for a state.
pub(crate) async fn until<F: Future<Output = bool>>(mut holds: impl FnMut() -> F) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    while !holds().await {
        assert!(tokio::time::Instant::now() < deadline, "the state was not reached in time");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
