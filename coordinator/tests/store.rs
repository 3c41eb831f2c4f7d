//! What every binding of the metadata store must do, run against the one in memory and the one on disk.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use coordinator::backend::memory::Disk;
use coordinator::backend::{
    Compare, LocalStore, MAX_TXN_BYTES, MAX_TXN_OPS, Op, Store, StoreError, Txn, WatchEvent, memory, redb,
};

const TTL: Duration = Duration::from_secs(10);

/// A binding, and how a process that starts opens it.
enum Binding {
    Memory(Disk),
    Redb(tempfile::TempDir),
}

impl Binding {
    fn all() -> Vec<Self> {
        vec![Self::Memory(Disk::new()), Self::Redb(tempfile::tempdir().unwrap())]
    }

    fn open(&self) -> LocalStore {
        match self {
            Self::Memory(disk) => memory::open(disk).unwrap(),
            Self::Redb(dir) => redb::open(dir.path()).unwrap(),
        }
    }
}

fn put(key: &str, value: &str) -> Txn {
    Txn { then: vec![Op::put(key, value.as_bytes().to_vec())], ..Txn::default() }
}

fn when(compare: Compare, key: &str, value: &str) -> Txn {
    Txn { when: vec![compare], ..put(key, value) }
}

async fn value(store: &LocalStore, key: &str) -> Option<String> {
    store.get(key).await.unwrap().found.map(|kv| String::from_utf8(kv.value).unwrap())
}

#[tokio::test]
async fn keys_are_ordered_and_carry_their_revisions() {
    for binding in Binding::all() {
        let store = binding.open();
        let first = store.txn(put("a/2", "x")).await.unwrap();
        store.txn(put("a/1", "y")).await.unwrap();
        store.txn(put("b/1", "z")).await.unwrap();
        let last = store.txn(put("a/2", "w")).await.unwrap();
        assert_eq!(last.revision, first.revision + 3);
        let scan = store.scan("a/").await.unwrap();
        assert_eq!(scan.revision, last.revision);
        let keys: Vec<_> = scan.found.iter().map(|kv| kv.key.as_str()).collect();
        assert_eq!(keys, ["a/1", "a/2"]);
        assert_eq!(scan.found[1].create_revision, first.revision);
        assert_eq!(scan.found[1].mod_revision, last.revision);
        let unchanged = store.txn(Txn { then: vec![Op::delete("absent")], ..Txn::default() }).await.unwrap();
        assert_eq!((unchanged.succeeded, unchanged.revision), (true, last.revision), "nothing changed");
    }
}

#[tokio::test]
// behaviour: coordinator-ST-4
async fn a_transaction_applies_all_or_the_alternative() {
    for binding in Binding::all() {
        let store = binding.open();
        assert!(store.txn(when(Compare::Absent { key: "k".into() }, "k", "1")).await.unwrap().succeeded);
        assert!(!store.txn(when(Compare::Absent { key: "k".into() }, "k", "2")).await.unwrap().succeeded);
        let revision = store.get("k").await.unwrap().found.unwrap().mod_revision;
        store.txn(put("k", "3")).await.unwrap();
        let stale = Compare::ModRevision { key: "k".into(), revision };
        assert!(!store.txn(when(stale, "k", "4")).await.unwrap().succeeded);
        let txn = Txn {
            when: vec![Compare::Value { key: "k".into(), value: b"no".to_vec() }],
            then: vec![Op::delete("k")],
            or_else: vec![Op::put("k", b"5".to_vec()), Op::put("l", b"6".to_vec())],
        };
        assert!(!store.txn(txn).await.unwrap().succeeded);
        assert_eq!(
            (value(&store, "k").await, value(&store, "l").await),
            (Some("5".into()), Some("6".into()))
        );
        let (k, l) =
            (store.get("k").await.unwrap().found.unwrap(), store.get("l").await.unwrap().found.unwrap());
        assert_eq!(k.mod_revision, l.mod_revision, "all operations apply at one revision");

        // A deleted key that is written again is another key: its old revision does not match.
        let revision = k.mod_revision;
        store.txn(Txn { then: vec![Op::delete("k")], ..Txn::default() }).await.unwrap();
        store.txn(put("k", "7")).await.unwrap();
        assert!(
            !store
                .txn(when(Compare::ModRevision { key: "k".into(), revision }, "k", "8"))
                .await
                .unwrap()
                .succeeded
        );
    }
}

#[tokio::test]
// behaviour: coordinator-ST-5
async fn oversized_transactions_are_refused_with_their_code() {
    for binding in Binding::all() {
        let store = binding.open();
        let many = Txn {
            then: (0..=MAX_TXN_OPS).map(|n| Op::put(format!("k{n}"), vec![])).collect(),
            ..Txn::default()
        };
        assert_eq!(store.txn(many).await.unwrap_err().code(), "CDC:ErrEtcdTxnOpsExceed");
        let big = Txn { then: vec![Op::put("k", vec![0; MAX_TXN_BYTES])], ..Txn::default() };
        assert_eq!(store.txn(big).await.unwrap_err().code(), "CDC:ErrEtcdTxnSizeExceed");
        let twice = Txn { then: vec![Op::put("k", vec![]), Op::delete("k")], ..Txn::default() };
        assert!(matches!(store.txn(twice).await, Err(StoreError::Invalid(_))));
        assert_eq!(store.scan("").await.unwrap().found.len(), 0);
    }
}

#[tokio::test]
async fn keys_vanish_with_their_lease() {
    for binding in Binding::all() {
        let store = binding.open();
        let session = store.session(TTL).await.unwrap();
        store.keep_alive(session.lease).await.unwrap();
        assert!(store.time_to_live(session.lease).await.unwrap().is_some());
        let leased = Op::Put { key: "k".into(), value: vec![1], lease: Some(session.lease) };
        store.txn(Txn { then: vec![leased.clone()], ..put("stays", "x") }).await.unwrap();
        store.txn(put("stays", "x")).await.unwrap();
        store.revoke(session.lease).await.unwrap();
        assert!(value(&store, "k").await.is_none() && value(&store, "stays").await.is_some());
        assert_eq!(store.time_to_live(session.lease).await.unwrap(), None);
        assert!(matches!(store.keep_alive(session.lease).await, Err(StoreError::LeaseGone)));
        let late = store.txn(Txn { then: vec![leased], ..Txn::default() }).await;
        assert!(matches!(late, Err(StoreError::LeaseGone)), "a dead lease holds nothing");
        assert!(!session.done.is_cancelled());
    }
}

#[tokio::test]
async fn the_oldest_candidate_leads_and_the_next_one_follows() {
    for binding in Binding::all() {
        let store = binding.open();
        let (one, two) = (store.session(TTL).await.unwrap(), store.session(TTL).await.unwrap());
        let won = store.campaign("owner", one.lease, "n1").await.unwrap();
        assert_eq!(store.leader("owner").await.unwrap().unwrap().value, b"n1");
        assert_eq!(won.key, format!("owner/{:x}", one.lease.0));

        let waiting = tokio::spawn({
            let store = store.clone();
            async move { store.campaign("owner", two.lease, "n2").await }
        });
        until(|| async { store.scan("owner/").await.unwrap().found.len() == 2 }).await;
        assert!(!waiting.is_finished());
        store.resign("owner", one.lease).await.unwrap();
        let next = waiting.await.unwrap().unwrap();
        assert!(next.revision > won.revision, "a later winner has a larger generation");
        assert_eq!(store.leader("owner").await.unwrap().unwrap().value, b"n2");
    }
}

#[tokio::test]
// behaviour: coordinator-ST-2
async fn a_watch_sees_every_change_in_order_and_says_when_it_cannot() {
    for binding in Binding::all() {
        let store = binding.open();
        let start = store.txn(put("w/a", "1")).await.unwrap().revision;
        let mut watch = store.watch("w/", start).await.unwrap();
        store.txn(put("other", "x")).await.unwrap();
        store
            .txn(Txn { then: vec![Op::delete("w/a"), Op::put("w/b", b"2".to_vec())], ..Txn::default() })
            .await
            .unwrap();
        let mut seen = Vec::new();
        while seen.len() < 3 {
            seen.extend(watch.next().await.unwrap());
        }
        let shown: Vec<String> = seen
            .iter()
            .map(|event| match event {
                WatchEvent::Put(kv) => format!("put {}", kv.key),
                WatchEvent::Delete { key, .. } => format!("delete {key}"),
            })
            .collect();
        assert_eq!(shown, ["put w/a", "delete w/a", "put w/b"]);
        assert!(watch.progress() >= seen[2].revision());

        let waiting = tokio::spawn(async move { watch.next().await });
        let revision = store.txn(put("w/c", "3")).await.unwrap().revision;
        assert_eq!(waiting.await.unwrap().unwrap()[0].revision(), revision);
    }
    let store = Binding::Memory(Disk::new()).open();
    let mut watch = store.watch("", 1).await.unwrap();
    for n in 0..5000 {
        store.txn(put("k", &n.to_string())).await.unwrap();
    }
    assert!(matches!(watch.next().await, Err(StoreError::Compacted)), "a watch that fell behind loads again");
}

#[tokio::test(flavor = "multi_thread")]
// behaviour: coordinator-ST-3
async fn concurrent_writers_lose_nothing() {
    for binding in Binding::all() {
        let store = Arc::new(binding.open());
        store.txn(put("sum", "0")).await.unwrap();
        let mut writers = tokio::task::JoinSet::new();
        for _ in 0..4 {
            let store = Arc::clone(&store);
            writers.spawn(async move {
                for _ in 0..10 {
                    loop {
                        let kv = store.get("sum").await.unwrap().found.unwrap();
                        let sum: u32 = String::from_utf8(kv.value).unwrap().parse().unwrap();
                        let held = Compare::ModRevision { key: "sum".into(), revision: kv.mod_revision };
                        if store.txn(when(held, "sum", &(sum + 1).to_string())).await.unwrap().succeeded {
                            break;
                        }
                    }
                }
            });
        }
        while let Some(done) = writers.join_next().await {
            done.unwrap();
        }
        assert_eq!(value(&store, "sum").await.unwrap(), "40");
    }
}

#[tokio::test]
// behaviour: coordinator-ST-21
async fn a_restart_keeps_what_is_durable_and_drops_what_was_leased() {
    for binding in Binding::all() {
        let store = binding.open();
        let identity = store.identity().await.unwrap();
        assert_ne!(identity, 0);
        let session = store.session(TTL).await.unwrap();
        store.txn(put("durable", "x")).await.unwrap();
        let won = store.campaign("owner", session.lease, "n1").await.unwrap();
        let before = store.scan("").await.unwrap().revision;
        drop(store);

        let store = binding.open();
        assert_eq!(store.identity().await.unwrap(), identity);
        assert_eq!(value(&store, "durable").await.unwrap(), "x");
        assert!(store.leader("owner").await.unwrap().is_none(), "the lease of the earlier process is gone");
        let session = store.session(TTL).await.unwrap();
        let again = store.campaign("owner", session.lease, "n1").await.unwrap();
        assert!(again.revision > won.revision && again.revision > before, "revisions continue");
    }
}

#[tokio::test]
async fn a_crash_right_after_a_transaction_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = redb::open(dir.path()).unwrap();
    for n in 0..20 {
        store.txn(put(&format!("k{n:02}"), &n.to_string())).await.unwrap();
        // What a machine would find after losing power now: the files as they are, nothing closed.
        let found = tempfile::tempdir().unwrap();
        copy(dir.path(), found.path());
        let after = redb::open(found.path()).unwrap();
        assert_eq!(after.scan("k").await.unwrap().found.len(), n + 1);
    }
}

#[tokio::test]
async fn two_processes_cannot_own_one_directory() {
    let dir = tempfile::tempdir().unwrap();
    let store = redb::open(dir.path()).unwrap();
    let error = redb::open(dir.path()).unwrap_err();
    assert!(matches!(error, StoreError::Locked(_)), "{error}");
    assert!(error.to_string().contains("another process"));
    drop(store);
    redb::open(dir.path()).unwrap();
}

#[tokio::test]
async fn a_broken_disk_ends_every_session() {
    let disk = Disk::new();
    let store = memory::open(&disk).unwrap();
    let session = store.session(TTL).await.unwrap();
    store.txn(put("k", "1")).await.unwrap();
    let mut watch = store.watch("", 1).await.unwrap();
    watch.next().await.unwrap();
    disk.set_failing(true);
    assert!(matches!(store.txn(put("k", "2")).await, Err(StoreError::Broken(_))));
    session.done.cancelled().await;
    assert!(matches!(watch.next().await, Err(StoreError::Broken(_))));
    disk.set_failing(false);
    assert!(matches!(store.txn(put("k", "3")).await, Err(StoreError::Broken(_))), "it stays broken");
    let store = memory::open(&disk).unwrap();
    assert_eq!(value(&store, "k").await.unwrap(), "1", "what failed was never visible");
}

#[test]
fn a_damaged_directory_is_an_error_and_not_a_panic() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("meta.redb"), b"not a database").unwrap();
    assert!(matches!(redb::open(dir.path()), Err(StoreError::Broken(_))));
    assert!(redb::open(Path::new("/proc/nowhere")).is_err());
}

fn copy(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

async fn until<F: Future<Output = bool>>(mut holds: impl FnMut() -> F) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    while !holds().await {
        assert!(tokio::time::Instant::now() < deadline, "the state was not reached in time");
        tokio::task::yield_now().await;
    }
}
