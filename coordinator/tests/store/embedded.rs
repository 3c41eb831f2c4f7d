//! What only the embedded store can show: its disk, its lock, and a history that is kept in memory.

use std::path::Path;
use std::time::Duration;

use coordinator::backend::memory::Disk;
use coordinator::backend::{Store, StoreError, memory, redb};

use super::bindings::{put, value};

const TTL: Duration = Duration::from_secs(10);

#[tokio::test]
// behaviour: coordinator-ST-2
async fn a_watch_that_falls_behind_is_told_to_load_again() {
    let store = memory::open(&Disk::new()).unwrap();
    let mut watch = store.watch("", 1).await.unwrap();
    for n in 0..5000 {
        store.txn(put("k", &n.to_string())).await.unwrap();
    }
    assert!(matches!(watch.next().await, Err(StoreError::Compacted)));
}

#[tokio::test]
async fn a_session_of_an_embedded_store_needs_no_confirmation() {
    let store = memory::open(&Disk::new()).unwrap();
    let session = store.session(TTL).await.unwrap();
    let later = std::time::Instant::now() + 10 * TTL;
    assert_eq!(session.confirmed.last(later), later);
    assert!(!session.done.is_cancelled());
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
