//! The stored documents under conflicts, lost answers, and a coordinator that was replaced.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "store/bindings.rs"]
#[expect(dead_code, reason = "other suites use more of it")]
mod bindings;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use coordinator::backend::{
    Compare, KeyValue, Leadership, LeaseId, Op, Session, Snapshot, Store, StoreError, Txn, TxnOutcome, Watch,
};
use coordinator::drain::{DrainDoc, NodeName};
use coordinator::meta::{CheckpointWrite, Meta, Stored};
use coordinator::{Error, Layout};
use heartbeatpb::config::{
    ChangefeedInfo, ChangefeedState, ChangefeedStatusDoc, Progress, ReplicaConfig, UpstreamInfo,
};
use heartbeatpb::{ChangefeedId, MaintainerEpoch, RunningError, Ts};

use self::bindings::Binding;

/// Longer than any test: nobody renews it.
const TTL: Duration = Duration::from_secs(300);

/// A store that loses answers, reports conflicts, and counts what it was sent.
#[derive(Clone)]
struct Flaky {
    inner: Arc<dyn Store>,
    lose_answers: Arc<AtomicUsize>,
    conflicts: Arc<AtomicUsize>,
    writes: Arc<AtomicUsize>,
    largest: Arc<AtomicUsize>,
}

fn take_one(counter: &AtomicUsize) -> bool {
    counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
}

#[async_trait]
impl Store for Flaky {
    async fn get(&self, key: &str) -> Result<Snapshot<Option<KeyValue>>, StoreError> {
        self.inner.get(key).await
    }
    async fn scan(&self, prefix: &str) -> Result<Snapshot<Vec<KeyValue>>, StoreError> {
        self.inner.scan(prefix).await
    }
    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        if take_one(&self.conflicts) {
            // Somebody else is faster: every document that is compared changes first.
            for compare in &txn.when {
                if let Compare::ModRevision { key, .. } = compare
                    && key.contains("/changefeed/")
                    && let Some(kv) = self.inner.get(key).await?.found
                {
                    self.inner
                        .txn(Txn { then: vec![Op::put(key.clone(), kv.value)], ..Txn::default() })
                        .await?;
                }
            }
        }
        self.largest.fetch_max(txn.then.len(), Ordering::Relaxed);
        let outcome = self.inner.txn(txn).await?;
        if outcome.succeeded {
            self.writes.fetch_add(1, Ordering::Relaxed);
        }
        if take_one(&self.lose_answers) {
            return Err(StoreError::Uncertain("the connection broke".to_owned()));
        }
        Ok(outcome)
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
        self.inner.campaign(prefix, lease, value).await
    }
    async fn resign(&self, prefix: &str, lease: LeaseId) -> Result<(), StoreError> {
        self.inner.resign(prefix, lease).await
    }
    async fn leader(&self, prefix: &str) -> Result<Option<KeyValue>, StoreError> {
        self.inner.leader(prefix).await
    }
    async fn watch(&self, prefix: &str, from: u64) -> Result<Box<dyn Watch>, StoreError> {
        self.inner.watch(prefix, from).await
    }
    async fn identity(&self) -> Result<u64, StoreError> {
        self.inner.identity().await
    }
}

struct World {
    store: Flaky,
    meta: Meta,
    layout: Layout,
    lease: LeaseId,
}

impl World {
    async fn new(binding: &Binding) -> Self {
        let store = Flaky {
            inner: binding.open().await,
            lose_answers: Arc::default(),
            conflicts: Arc::default(),
            writes: Arc::default(),
            largest: Arc::default(),
        };
        let layout = Layout::new("default").unwrap();
        let lease = store.grant(TTL).await.unwrap();
        let fence = store.campaign(&layout.owner_prefix(), lease, "n").await.unwrap();
        let meta = Meta::new(Arc::new(store.clone()), layout.clone(), fence);
        Self { store, meta, layout, lease }
    }

    async fn with(binding: &Binding, name: &str, epoch: u64) -> (Self, ChangefeedId) {
        let world = Self::new(binding).await;
        let stored = stored(name, epoch);
        world.meta.create(&stored).await.unwrap();
        world.store.writes.store(0, Ordering::Relaxed);
        (world, stored.info.id)
    }

    fn writes(&self) -> usize {
        self.store.writes.load(Ordering::Relaxed)
    }

    async fn raw(&self, key: String, value: &[u8]) {
        self.store
            .inner
            .txn(Txn { then: vec![Op::put(key, value.to_vec())], ..Txn::default() })
            .await
            .unwrap();
    }
}

fn stored(name: &str, epoch: u64) -> Stored {
    let id = ChangefeedId::fresh(name);
    let mut info =
        ChangefeedInfo::new(id, UpstreamInfo::default(), "blackhole://", ReplicaConfig::default(), Ts(10));
    info.epoch = MaintainerEpoch::from_wire(epoch);
    let status = ChangefeedStatusDoc::at(Ts(10), info.epoch);
    Stored { info, status }
}

/// Numbers that belong to each maintainer.
const ROOM: u64 = MaintainerEpoch::ROOM;

fn epoch(stored: &Stored) -> u64 {
    MaintainerEpoch::to_wire(stored.info.epoch)
}

fn checkpoint(id: &ChangefeedId, checkpoint: u64, epoch: u64) -> CheckpointWrite {
    CheckpointWrite { id: id.clone(), checkpoint: Ts(checkpoint), epoch: MaintainerEpoch::from_wire(epoch) }
}

#[test]
fn documents_of_other_programs_read_back_and_keep_their_words() {
    // As operators' tools and servers of the first architecture write them.
    let info = r#"{"id":{"id":{"low":1234567890123,"high":9876543210987},
        "display":{"name":"orders-to-kafka","keyspace":"default","namespace":"default"}},
        "upstream-id":7311822338,"sink-uri":"kafka://10.1.0.9:9092/orders?protocol=canal-json",
        "create-time":"2026-03-01T08:00:12.481Z","start-ts":455678901234565121,"target-ts":0,"admin-job-type":0,
        "sort-engine":"unified","sort-dir":"","upstream-info":null,
        "config":{"memory-quota":536870912,"filter":{"rules":["shop.*"]}},"state":"warning",
        "error":{"time":"2026-03-01T08:09:00Z","addr":"10.0.0.5:8300","code":"CDC:ErrSinkUnavailable","message":"broker timed out"},
        "warning":null,"creator-version":"v1.2.0","epoch":455679012345600001,"keyspace-id":0}"#;
    let (read, assigned) = ChangefeedInfo::from_json(info.as_bytes(), "k", "n").unwrap();
    assert!(!assigned);
    assert_eq!(
        (&*read.id.name, &*read.id.keyspace, read.start_ts),
        ("orders-to-kafka", "default", Ts(455678901234565121))
    );
    assert_eq!(
        (read.state, MaintainerEpoch::to_wire(read.epoch)),
        (ChangefeedState::Warning, 455679012345600001)
    );
    assert_eq!(read.error.as_ref().unwrap().node, "10.0.0.5:8300");
    let written: serde_json::Value = serde_json::from_slice(&read.to_json()).unwrap();
    let original: serde_json::Value = serde_json::from_str(info).unwrap();
    for (key, value) in original.as_object().unwrap() {
        // Missing sections of the configuration are completed.
        if key != "config" {
            assert_eq!(&written[key], value, "{key}");
        }
    }
    assert_eq!(written.as_object().unwrap().len(), original.as_object().unwrap().len(), "{written:#}");
    assert_eq!(written["config"]["filter"]["rules"], original["config"]["filter"]["rules"]);
    assert_eq!(written["config"]["memory-quota"], original["config"]["memory-quota"]);

    let status = r#"{"checkpoint-ts":455679001234565121,"progress":1,"min-table-barrier-ts":0,"admin-job-type":0,"epoch":455679012345600001}"#;
    let read = ChangefeedStatusDoc::from_json(status.as_bytes()).unwrap();
    assert_eq!((read.progress, read.checkpoint_ts), (Progress::None, Ts(455679001234565121)));
    let written: serde_json::Value = serde_json::from_slice(&read.to_json()).unwrap();
    assert_eq!(written, serde_json::from_str::<serde_json::Value>(status).unwrap());
    for (word, progress) in [(0, Progress::None), (2, Progress::Removing), (3, Progress::Stopping)] {
        let old = format!(r#"{{"checkpoint-ts":5,"progress":{word}}}"#);
        assert_eq!(ChangefeedStatusDoc::from_json(old.as_bytes()).unwrap().progress, progress);
    }
}

/// Makes one test of each function for each binding.
macro_rules! suite {
    ($($test:ident),* $(,)?) => {
        suite!(@binding memory: $($test),*);
        suite!(@binding etcd: $($test),*);
    };
    (@binding $binding:ident: $($test:ident),*) => {
        mod $binding {
            use super::bindings::Binding;
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $test() {
                    super::$test(&Binding::$binding().await).await;
                }
            )*
        }
    };
}

suite! {
    loading_repairs_what_is_incomplete_and_skips_what_is_unreadable,
    a_name_is_created_once_and_both_documents_together,
    an_epoch_is_larger_than_the_stored_one_and_than_the_candidate,
    a_conflict_is_read_again_and_a_lost_answer_is_recognised,
    pause_and_resume_change_both_documents_at_one_revision,
    a_resume_whose_answer_was_lost_can_be_repeated,
    an_intent_to_remove_survives_checkpoints_and_finished_stops,
    many_checkpoints_are_split_into_transactions,
    a_replaced_coordinator_writes_nothing,
    an_update_keeps_identity_state_and_epoch,
    the_state_of_drains_reads_back_and_what_cannot_be_read_counts_as_nothing,
}

// behaviour: coordinator-BE-1
async fn loading_repairs_what_is_incomplete_and_skips_what_is_unreadable(binding: &Binding) {
    let (world, good) = World::with(binding, "good", 5).await;
    let layout = &world.layout;
    world.raw(layout.info("default", "bad"), b"{").await;
    world.raw(layout.info("default", "legacy"), br#"{"sink-uri":"blackhole://","start-ts":7}"#).await;
    let lost = stored("lost", 3);
    world.raw(layout.info("default", "lost"), &lost.info.to_json()).await;
    world.raw(layout.status("default", "lost"), b"garbage").await;

    let (all, unreadable) = world.meta.get_all().await.unwrap();
    assert_eq!(unreadable, ["default/bad"]);
    let names: Vec<&str> = all.iter().map(|stored| &*stored.info.id.name).collect();
    assert_eq!(names, ["good", "legacy", "lost"]);
    assert_eq!(all[0].info.id, good);
    assert_eq!((all[1].status.checkpoint_ts, all[1].status.progress), (Ts(7), Progress::None));
    assert_eq!(all[2].status.checkpoint_ts, Ts(10));

    let (again, _) = world.meta.get_all().await.unwrap();
    assert_eq!(again, all, "the assigned identity and the statuses were written back");
}

// behaviour: coordinator-BE-2
// behaviour: coordinator-BE-7
async fn a_name_is_created_once_and_both_documents_together(binding: &Binding) {
    let (world, id) = World::with(binding, "a", 5).await;
    assert_eq!(world.meta.get("default", "a").await.unwrap().info.id, id);
    let other = stored("a", 9);
    assert!(matches!(world.meta.create(&other).await, Err(Error::AlreadyExists(_))));
    assert!(matches!(world.meta.get("default", "b").await, Err(Error::NotExists(_))));
    assert!(matches!(world.meta.bump_epoch(&other.info.id, 1, |_| Ok(())).await, Err(Error::NotExists(_))));

    world.store.lose_answers.store(1, Ordering::Relaxed);
    world.meta.create(&stored("c", 1)).await.expect("it was stored although the answer was lost");
}

// behaviour: coordinator-BE-3
// behaviour: coordinator-BE-4
async fn an_epoch_is_larger_than_the_stored_one_and_than_the_candidate(binding: &Binding) {
    let (world, id) = World::with(binding, "a", 5).await;
    assert_eq!(epoch(&world.meta.bump_epoch(&id, 3, |_| Ok(())).await.unwrap()), 5 + ROOM);
    let bumped = world.meta.bump_epoch(&id, 9_000, |_| Ok(())).await.unwrap();
    assert_eq!(epoch(&bumped), 9_000);
    assert_eq!(world.meta.get("default", "a").await.unwrap(), bumped);
    assert_eq!((bumped.info.start_ts, bumped.info.state), (Ts(10), ChangefeedState::Normal));

    world.meta.bump_epoch(&id, u64::MAX, |_| Ok(())).await.unwrap();
    let writes = world.writes();
    assert!(matches!(world.meta.bump_epoch(&id, 3, |_| Ok(())).await, Err(Error::EpochOverflow(_))));
    assert_eq!(world.writes(), writes, "nothing was written");
}

// behaviour: coordinator-BE-6
// behaviour: coordinator-BE-14
async fn a_conflict_is_read_again_and_a_lost_answer_is_recognised(binding: &Binding) {
    let (world, id) = World::with(binding, "a", 5).await;
    world.store.conflicts.store(1, Ordering::Relaxed);
    assert_eq!(epoch(&world.meta.bump_epoch(&id, 1, |_| Ok(())).await.unwrap()), 5 + ROOM);
    world.store.conflicts.store(1, Ordering::Relaxed);
    world.meta.set_progress(&id, Progress::Stopping).await.unwrap();
    world.store.conflicts.store(10, Ordering::Relaxed);
    assert!(matches!(world.meta.set_progress(&id, Progress::None).await, Err(Error::Conflict(_))));

    world.store.lose_answers.store(1, Ordering::Relaxed);
    let bumped = world.meta.bump_epoch(&id, 1, |_| Ok(())).await.unwrap();
    assert_eq!(epoch(&bumped), 5 + 2 * ROOM, "the bump that was applied is not repeated");
    world.store.lose_answers.store(1, Ordering::Relaxed);
    let durable = world.meta.update_checkpoints(&[checkpoint(&id, 50, 7)]).await.unwrap();
    assert_eq!(durable.len(), 1);
    world.store.lose_answers.store(1, Ordering::Relaxed);
    world.meta.delete(&id).await.unwrap();
    assert!(matches!(world.meta.get("default", "a").await, Err(Error::NotExists(_))));
}

// behaviour: coordinator-BE-5
// behaviour: coordinator-BE-8
// behaviour: coordinator-BE-9
async fn pause_and_resume_change_both_documents_at_one_revision(binding: &Binding) {
    let (world, id) = World::with(binding, "a", 5).await;
    let error = RunningError {
        time: "t".to_owned(),
        node: "n".to_owned(),
        code: "CDC:ErrX".to_owned(),
        message: "m".repeat(1030),
    };
    let failed =
        world.meta.set_state(&id, ChangefeedState::Failed, Some(&error), Progress::Stopping).await.unwrap();
    let message = failed.info.error.unwrap().message;
    assert_eq!(message, format!("{}...", "m".repeat(1000)), "a stored message is cut");
    let paused = world.meta.pause(&id).await.unwrap();
    assert_eq!((paused.info.state, paused.status.progress), (ChangefeedState::Stopped, Progress::Stopping));
    assert_eq!(paused.info.error.unwrap().message, message, "cut once");

    let (writes, before) = (world.writes(), paused.info.epoch);
    let resumed = world.meta.resume(&id, 1, before, Some(Ts(3))).await.unwrap();
    assert_eq!(world.writes(), writes + 1);
    assert_eq!((resumed.info.state, resumed.info.error.is_none()), (ChangefeedState::Normal, true));
    assert_eq!((resumed.status.checkpoint_ts, resumed.status.progress), (Ts(3), Progress::None));
    assert_eq!(epoch(&resumed), 5 + ROOM);
    let kv = |key| world.store.get(key);
    let (info, status) = (world.layout.info("default", "a"), world.layout.status("default", "a"));
    let (info, status) = (kv(&info).await.unwrap().found.unwrap(), kv(&status).await.unwrap().found.unwrap());
    assert_eq!(info.mod_revision, status.mod_revision);
    let again = world.meta.resume(&id, 1, resumed.info.epoch, None).await;
    assert!(matches!(again, Err(Error::UpdateRefused { .. })), "it runs");

    let late = world.meta.update_checkpoints(&[checkpoint(&id, 99, 5)]).await.unwrap();
    assert!(late.is_empty(), "a report from before the resume does not overwrite its checkpoint");
    assert_eq!(world.meta.get("default", "a").await.unwrap().status.checkpoint_ts, Ts(3));
}

async fn a_resume_whose_answer_was_lost_can_be_repeated(binding: &Binding) {
    let (world, id) = World::with(binding, "a", 5).await;
    let before = world.meta.pause(&id).await.unwrap().info.epoch;
    world.meta.resume(&id, 1, before, Some(Ts(3))).await.unwrap();
    let again = world.meta.resume(&id, 1, before, Some(Ts(4))).await.unwrap();
    assert_eq!((again.info.state, again.status.checkpoint_ts), (ChangefeedState::Normal, Ts(4)));
    assert_eq!(epoch(&again), 5 + 2 * ROOM);
}

// behaviour: coordinator-BE-10
// behaviour: coordinator-BE-12
// behaviour: coordinator-OP-21
async fn an_intent_to_remove_survives_checkpoints_and_finished_stops(binding: &Binding) {
    let (world, id) = World::with(binding, "a", 5).await;
    world.meta.set_progress(&id, Progress::None).await.unwrap();
    assert_eq!(world.writes(), 0, "an equal progress is not written");
    world.meta.set_progress(&id, Progress::Removing).await.unwrap();
    world.meta.update_checkpoints(&[checkpoint(&id, 20, 5)]).await.unwrap();
    world.meta.set_progress(&id, Progress::None).await.unwrap();
    let stored = world.meta.pause(&id).await.unwrap();
    assert_eq!((stored.status.progress, stored.status.checkpoint_ts), (Progress::Removing, Ts(20)));
}

// behaviour: coordinator-BE-11
async fn many_checkpoints_are_split_into_transactions(binding: &Binding) {
    let world = World::new(binding).await;
    let mut writes = Vec::new();
    for n in 0..300 {
        let stored = stored(&format!("f{n}"), 1);
        world.meta.create(&stored).await.unwrap();
        writes.push(checkpoint(&stored.info.id, 20, 1));
    }
    world.store.writes.store(0, Ordering::Relaxed);
    assert_eq!(world.meta.update_checkpoints(&writes).await.unwrap().len(), 300);
    assert_eq!(world.writes(), 3);
    assert!(world.store.largest.load(Ordering::Relaxed) <= 128);
    let back: Vec<_> =
        writes.iter().map(|write| CheckpointWrite { checkpoint: Ts(15), ..write.clone() }).collect();
    world.meta.update_checkpoints(&back).await.unwrap();
    let (all, _) = world.meta.get_all().await.unwrap();
    assert!(all.iter().all(|stored| stored.status.checkpoint_ts == Ts(20)), "no checkpoint moves back");
}

// behaviour: coordinator-BE-13
async fn a_replaced_coordinator_writes_nothing(binding: &Binding) {
    let (world, id) = World::with(binding, "a", 5).await;
    world.store.resign(&world.layout.owner_prefix(), world.lease).await.unwrap();
    let lease = world.store.grant(TTL).await.unwrap();
    world.store.campaign(&world.layout.owner_prefix(), lease, "n2").await.unwrap();
    let before = world.store.scan("").await.unwrap().found;
    let meta = &world.meta;
    assert!(matches!(meta.create(&stored("b", 1)).await, Err(Error::NotOwner)));
    assert!(matches!(meta.bump_epoch(&id, 1, |_| Ok(())).await, Err(Error::NotOwner)));
    assert!(matches!(meta.pause(&id).await, Err(Error::NotOwner)));
    assert!(matches!(meta.set_progress(&id, Progress::Removing).await, Err(Error::NotOwner)));
    assert!(matches!(meta.update_checkpoints(&[checkpoint(&id, 20, 5)]).await, Err(Error::NotOwner)));
    assert!(matches!(meta.delete(&id).await, Err(Error::NotOwner)));
    assert!(matches!(meta.put_drain(&DrainDoc::default()).await, Err(Error::NotOwner)));
    assert_eq!(world.store.scan("").await.unwrap().found, before);
}

async fn an_update_keeps_identity_state_and_epoch(binding: &Binding) {
    let (world, id) = World::with(binding, "a", 5).await;
    let mut info = world.meta.get("default", "a").await.unwrap().info;
    info.sink_uri = "file:///tmp/x".to_owned();
    assert!(matches!(world.meta.update(&info).await, Err(Error::UpdateRefused { .. })));
    world.meta.pause(&id).await.unwrap();
    info.epoch = MaintainerEpoch::from_wire(1);
    info.start_ts = Ts(99);
    let stored = world.meta.update(&info).await.unwrap();
    assert_eq!(stored.info.sink_uri, "file:///tmp/x");
    assert_eq!(
        (epoch(&stored), stored.info.start_ts, stored.info.state),
        (5, Ts(10), ChangefeedState::Stopped)
    );

    let other = ChangefeedId::fresh("a");
    world.meta.delete(&other).await.unwrap();
    assert!(world.meta.get("default", "a").await.is_ok(), "another incarnation of the name is not deleted");
}

async fn the_state_of_drains_reads_back_and_what_cannot_be_read_counts_as_nothing(binding: &Binding) {
    let (world, _) = World::with(binding, "a", 5).await;
    assert_eq!(world.meta.get_drain().await.unwrap(), None);
    let doc = DrainDoc { epoch: 7, target: Some(NodeName("n2".to_owned())), ..DrainDoc::default() };
    world.meta.put_drain(&doc).await.unwrap();
    assert_eq!(world.meta.get_drain().await.unwrap(), Some(doc));
    assert_eq!(world.meta.get_all().await.unwrap().0.len(), 1, "it is no changefeed");
    world.raw(world.layout.drain(), b"{").await;
    assert_eq!(world.meta.get_drain().await.unwrap(), None);
}
