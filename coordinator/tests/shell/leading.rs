//! Beginning and ending to lead: stores that fail, messages that never cease, settings, giving up the role.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use coordinator::backend::{
    KeyValue, Leadership, LeaseId, Revision, Session, Snapshot, Store, StoreError, Txn, TxnOutcome, Watch,
    memory,
};
use coordinator::{CoordinatorConfig, Error, Layout};
use heartbeatpb::{ComponentState, NodeHeartbeat, NodeLiveness, Ts};
use messaging::{CoordinatorTopic, ToCoordinator};
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::node::{Node, info, replicating, until, within};

fn config() -> CoordinatorConfig {
    CoordinatorConfig { tick: Duration::from_millis(20), ..CoordinatorConfig::default() }
}

/// A store whose reads of everything fail as often as it is told to.
struct Flaky {
    inner: Box<dyn Store>,
    failures: AtomicUsize,
    broken: AtomicBool,
    scans: Mutex<Vec<Instant>>,
    /// Answers to candidates are lost.
    mute: AtomicBool,
}

impl Flaky {
    fn new(failures: usize, broken: bool) -> Arc<Self> {
        Arc::new(Self {
            inner: Box::new(memory::open(&memory::Disk::new()).unwrap()),
            failures: AtomicUsize::new(failures),
            broken: AtomicBool::new(broken),
            scans: Mutex::default(),
            mute: AtomicBool::new(false),
        })
    }
}

#[async_trait]
impl Store for Flaky {
    async fn get(&self, key: &str) -> Result<Snapshot<Option<KeyValue>>, StoreError> {
        self.inner.get(key).await
    }

    async fn scan(&self, prefix: &str) -> Result<Snapshot<Vec<KeyValue>>, StoreError> {
        self.scans.lock().push(Instant::now());
        let left = |left: usize| left.checked_sub(1);
        if self.failures.fetch_update(Ordering::Relaxed, Ordering::Relaxed, left).is_ok() {
            return Err(if self.broken.load(Ordering::Relaxed) {
                StoreError::Broken("the disk is gone".to_owned())
            } else {
                StoreError::Unavailable("no answer".to_owned())
            });
        }
        self.inner.scan(prefix).await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        self.inner.txn(txn).await
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        self.inner.grant(ttl).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.inner.keep_alive(lease).await
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.inner.revoke(lease).await
    }

    async fn time_to_live(&self, lease: LeaseId) -> Result<Option<Duration>, StoreError> {
        self.inner.time_to_live(lease).await
    }

    async fn session(&self, ttl: Duration) -> Result<Session, StoreError> {
        self.inner.session(ttl).await
    }

    async fn campaign(&self, prefix: &str, lease: LeaseId, value: &str) -> Result<Leadership, StoreError> {
        let leadership = self.inner.campaign(prefix, lease, value).await?;
        if self.mute.load(Ordering::Relaxed) {
            return Err(StoreError::Uncertain("no answer".to_owned()));
        }
        Ok(leadership)
    }

    async fn resign(&self, prefix: &str, lease: LeaseId) -> Result<(), StoreError> {
        self.inner.resign(prefix, lease).await
    }

    async fn leader(&self, prefix: &str) -> Result<Option<KeyValue>, StoreError> {
        self.inner.leader(prefix).await
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<Box<dyn Watch>, StoreError> {
        self.inner.watch(prefix, from).await
    }

    async fn identity(&self) -> Result<u64, StoreError> {
        self.inner.identity().await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
// behaviour: coordinator-ST-1
async fn a_store_that_may_come_back_is_asked_again_with_growing_waits_and_a_broken_one_once() {
    let flaky = Flaky::new(3, false);
    let mut node = Node::start_with(Arc::clone(&flaky) as Arc<dyn Store>, config());
    node.coordinator().await;
    let scans = flaky.scans.lock().clone();
    let waits: Vec<Duration> = scans.windows(2).take(3).map(|pair| pair[1] - pair[0]).collect();
    for (wait, least) in waits.iter().zip([100, 200, 400]) {
        assert!(*wait >= Duration::from_millis(least), "{waits:?}");
    }
    assert_eq!(waits.len(), 3);
    node.stop().await;

    let broken = Flaky::new(1, true);
    let node = Node::start_with(Arc::clone(&broken) as Arc<dyn Store>, config());
    assert!(matches!(node.failure().await, Error::Store(StoreError::Broken(_))));
    assert_eq!(broken.scans.lock().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_drains_takes_a_candidacy_back_of_which_it_heard_nothing() {
    let store = Flaky::new(0, false);
    store.mute.store(true, Ordering::Relaxed);
    let node = Node::start_with(Arc::clone(&store) as Arc<dyn Store>, config());
    let prefix = coordinator::Layout::new("default").unwrap().owner_prefix();
    let leads = async || store.leader(&prefix).await.unwrap().is_some();
    within("its key is there, and it does not know", leads).await;
    node.liveness.send_replace(NodeLiveness::Draining);
    within("its key is gone", async || !leads().await).await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
// behaviour: coordinator-CO-4
async fn messages_that_arrive_while_the_coordinator_stops_do_no_harm() {
    for _ in 0..10 {
        let dir = tempfile::tempdir().unwrap();
        let mut node = Node::start(dir.path());
        let coordinator = node.coordinator().await;
        let center = node.center.clone();
        let senders: Vec<_> = (0..4)
            .map(|_| {
                let (center, coordinator) = (center.clone(), coordinator.clone());
                tokio::spawn(async move {
                    let heartbeat = NodeHeartbeat {
                        liveness: NodeLiveness::Alive,
                        node_epoch: 1,
                        drain_target: None,
                        drain_epoch: 0,
                    };
                    let mut refused = 0;
                    while refused < 100 {
                        let message = ToCoordinator::NodeHeartbeat(heartbeat.clone());
                        let gone = coordinator.list(None).await.is_err();
                        refused +=
                            usize::from(center.send::<CoordinatorTopic>(center.node(), message).is_err());
                        refused += usize::from(gone);
                    }
                })
            })
            .collect();
        // Orderly, and everybody hears that it is over.
        node.stop().await;
        for sender in senders {
            sender.await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
// behaviour: coordinator-ST-11
async fn every_coordinator_of_a_process_has_the_settings_of_its_start() {
    let store: Arc<dyn Store> = Arc::new(memory::open(&memory::Disk::new()).unwrap());
    let mut node = Node::start_with(store, CoordinatorConfig { batch: 1, ..config() });
    let mut coordinator = node.coordinator().await;
    node.maintainers.lock().deaf = true;
    for name in ["a", "b", "c"] {
        coordinator.create(info(name)).await.unwrap();
    }
    for _ in 0..3 {
        let before = coordinator.version();
        within("one changefeed is placed", async || !node.maintainers.lock().asked.is_empty()).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(node.maintainers.lock().asked.len(), 1, "one at a time, as it was set");
        coordinator.resign().await;
        node.maintainers.lock().asked.clear();
        within("another coordinator leads", async || {
            node.view.borrow().as_ref().is_some_and(|handle| handle.version() > before)
        })
        .await;
        coordinator = node.coordinator().await;
    }
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_coordinator_that_gives_up_its_role_has_stored_everything() {
    let dir = tempfile::tempdir().unwrap();
    let mut node = Node::start(dir.path());
    let coordinator = node.coordinator().await;
    coordinator.create(info("orders")).await.unwrap();
    until(&coordinator, "orders", "it replicates", replicating).await;
    node.report("orders", |status| status.checkpoint = heartbeatpb::Ts(300));
    until(&coordinator, "orders", "the checkpoint is known", |view| view.checkpoint.0 == 300).await;
    coordinator.resign().await;
    let stored = coordinator.get_persisted("default", "orders").await.unwrap();
    assert_eq!(stored.status.checkpoint_ts.0, 300);
    assert!(matches!(coordinator.list(None).await, Err(Error::Stopped)));
    within("another coordinator leads", async || {
        node.view.borrow().as_ref().is_some_and(|handle| handle.version() > coordinator.version())
    })
    .await;
    let coordinator = node.coordinator().await;
    until(&coordinator, "orders", "the maintainer was adopted", replicating).await;
    assert_eq!(node.maintainers.lock().epochs.len(), 1);
    node.report("orders", |status| assert_eq!(status.state, ComponentState::Working));
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_coordinator_that_stops_stores_what_the_maintainers_of_its_node_have_not_reported_yet() {
    let dir = tempfile::tempdir().unwrap();
    let mut node = Node::start(dir.path());
    let coordinator = node.coordinator().await;
    coordinator.create(info("orders")).await.unwrap();
    until(&coordinator, "orders", "it replicates", replicating).await;
    node.maintainers.lock().silent = true;
    node.report("orders", |status| status.checkpoint = Ts(640));
    let store = Arc::clone(&node.store);
    node.stop().await;
    let key = Layout::new("default").unwrap().status("default", "orders");
    let status = store.get(&key).await.unwrap().found.unwrap();
    let status = String::from_utf8(status.value).unwrap();
    assert!(status.contains("\"checkpoint-ts\":640"), "{status}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_answers_with_the_checkpoint_that_its_maintainer_has_left_behind() {
    let dir = tempfile::tempdir().unwrap();
    let mut node = Node::start(dir.path());
    let coordinator = node.coordinator().await;
    coordinator.create(info("orders")).await.unwrap();
    until(&coordinator, "orders", "it replicates", replicating).await;
    node.maintainers.lock().silent = true;
    node.report("orders", |status| status.checkpoint = Ts(640));
    assert_eq!(coordinator.pause("default", "orders").await.unwrap(), Ts(640));
    let stored = coordinator.get_persisted("default", "orders").await.unwrap();
    assert_eq!(stored.status.checkpoint_ts, Ts(640));
    node.stop().await;
}
