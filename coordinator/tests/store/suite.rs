//! What every binding must do.

use std::sync::Arc;
use std::time::{Duration, Instant};

use coordinator::backend::{
    Compare, LeaseId, MAX_TXN_BYTES, MAX_TXN_OPS, Op, Store, StoreError, Txn, WatchEvent, candidate_key,
};

use super::bindings::{Binding, put, until, value, when};

const TTL: Duration = Duration::from_secs(10);

/// Makes one test of each function for each binding.
macro_rules! suite {
    ($($test:ident),* $(,)?) => {
        suite!(@binding memory: $($test),*);
        suite!(@binding redb: $($test),*);
        suite!(@binding etcd: $($test),*);
    };
    (@binding $binding:ident: $($test:ident),*) => {
        mod $binding {
            use super::super::bindings::Binding;
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
    keys_are_ordered_and_carry_their_revisions,
    several_keys_are_read_at_once,
    a_scan_of_many_keys_is_of_one_revision,
    a_transaction_applies_all_or_the_alternative,
    an_absent_key_has_no_value_and_an_empty_value_is_one,
    oversized_transactions_are_refused_with_their_code,
    the_largest_transactions_are_taken,
    keys_vanish_with_their_lease,
    a_session_ends_when_its_lease_is_revoked,
    the_oldest_candidate_leads_and_the_next_one_follows,
    a_later_leader_has_a_larger_revision_whatever_the_order_of_leaving,
    a_candidate_that_stands_twice_stands_once,
    who_gives_up_waiting_for_the_lead_is_still_a_candidate,
    a_candidate_without_a_lease_is_told_so,
    a_watch_sees_every_change_in_order,
    a_watch_starts_where_it_is_told_to,
    a_dropped_wait_loses_no_change,
    changes_of_one_transaction_are_seen_together,
    concurrent_writers_lose_nothing,
    a_restart_keeps_what_is_durable_and_drops_what_was_leased,
}

async fn keys_are_ordered_and_carry_their_revisions(binding: &Binding) {
    let store = binding.open().await;
    let first = store.txn(put("a/2", "x")).await.unwrap();
    store.txn(put("a/1", "y")).await.unwrap();
    store.txn(put("b/1", "z")).await.unwrap();
    let last = store.txn(put("a/2", "w")).await.unwrap();
    if binding.is_alone() {
        assert_eq!(last.revision, first.revision + 3);
    }
    let scan = store.scan("a/").await.unwrap();
    assert!(scan.revision >= last.revision && last.revision > first.revision);
    let keys: Vec<_> = scan.found.iter().map(|kv| kv.key.as_str()).collect();
    assert_eq!(keys, ["a/1", "a/2"]);
    assert_eq!(scan.found[1].create_revision, first.revision);
    assert_eq!(scan.found[1].mod_revision, last.revision);
    assert_eq!(store.scan("").await.unwrap().found.len(), 3);
    let unchanged = store.txn(Txn { then: vec![Op::delete("absent")], ..Txn::default() }).await.unwrap();
    assert!(unchanged.succeeded && unchanged.revision >= last.revision, "nothing changed");
    if binding.is_alone() {
        assert_eq!(unchanged.revision, last.revision);
    }
}

async fn several_keys_are_read_at_once(binding: &Binding) {
    let store = binding.open().await;
    store.txn(put("a", "1")).await.unwrap();
    store.txn(put("b", "")).await.unwrap();
    let keys = ["b", "absent", "a", "a"].map(str::to_owned);
    let found = store.get_many(&keys).await.unwrap();
    let values: Vec<_> = found.iter().map(|kv| kv.as_ref().map(|kv| (&*kv.key, &*kv.value))).collect();
    assert_eq!(values, [Some(("b", &b""[..])), None, Some(("a", b"1")), Some(("a", b"1"))]);
    assert_eq!(found[2], store.get("a").await.unwrap().found);
    assert!(store.get_many(&[]).await.unwrap().is_empty());
    let most = vec!["a".to_owned(); MAX_TXN_OPS];
    assert_eq!(store.get_many(&most).await.unwrap().len(), MAX_TXN_OPS);
    let more = vec!["a".to_owned(); MAX_TXN_OPS + 1];
    assert!(matches!(store.get_many(&more).await, Err(StoreError::TooManyOps { .. })));
}

async fn a_scan_of_many_keys_is_of_one_revision(binding: &Binding) {
    let store = binding.open().await;
    let all: Vec<Op> = (0..700).map(|n| Op::put(format!("p/{n:04}"), b"0".to_vec())).collect();
    for ops in all.chunks(MAX_TXN_OPS) {
        store.txn(Txn { then: ops.to_vec(), ..Txn::default() }).await.unwrap();
    }
    store.txn(put("q", "behind")).await.unwrap();
    // A writer that changes the first and the last key together while they are read.
    let writer = tokio::spawn({
        let store = Arc::clone(&store);
        async move {
            for n in 1..=40_u32 {
                let value = n.to_string().into_bytes();
                let then = vec![Op::put("p/0000", value.clone()), Op::put("p/0699", value)];
                store.txn(Txn { then, ..Txn::default() }).await.unwrap();
            }
        }
    });
    let mut scans = 0;
    while !writer.is_finished() || scans < 3 {
        let found = store.scan("p/").await.unwrap().found;
        assert_eq!(found.len(), 700);
        assert!(found.windows(2).all(|pair| pair[0].key < pair[1].key));
        assert_eq!(found[0].value, found[699].value, "both are of one moment");
        scans += 1;
    }
    writer.await.unwrap();
}

// behaviour: coordinator-ST-4
async fn a_transaction_applies_all_or_the_alternative(binding: &Binding) {
    let store = binding.open().await;
    let store = &*store;
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
    assert_eq!((value(store, "k").await, value(store, "l").await), (Some("5".into()), Some("6".into())));
    let (k, l) = (store.get("k").await.unwrap().found.unwrap(), store.get("l").await.unwrap().found.unwrap());
    assert_eq!(k.mod_revision, l.mod_revision, "all operations apply at one revision");

    // A deleted key that is written again is another key: its old revision does not match.
    let revision = k.mod_revision;
    store.txn(Txn { then: vec![Op::delete("k")], ..Txn::default() }).await.unwrap();
    store.txn(put("k", "7")).await.unwrap();
    let stale = Compare::ModRevision { key: "k".into(), revision };
    assert!(!store.txn(when(stale, "k", "8")).await.unwrap().succeeded);
}

// behaviour: coordinator-ST-4
async fn an_absent_key_has_no_value_and_an_empty_value_is_one(binding: &Binding) {
    let store = binding.open().await;
    let empty = || Compare::Value { key: "k".into(), value: Vec::new() };
    assert!(!store.txn(when(empty(), "other", "x")).await.unwrap().succeeded, "absent is not empty");
    store.txn(put("k", "")).await.unwrap();
    assert_eq!(value(&*store, "k").await, Some(String::new()));
    assert!(store.txn(when(empty(), "k", "x")).await.unwrap().succeeded);
    let never = Compare::ModRevision { key: "absent".into(), revision: 1 };
    assert!(!store.txn(when(never, "k", "y")).await.unwrap().succeeded);
}

// behaviour: coordinator-ST-5
async fn oversized_transactions_are_refused_with_their_code(binding: &Binding) {
    let store = binding.open().await;
    let many =
        Txn { then: (0..=MAX_TXN_OPS).map(|n| Op::put(format!("k{n}"), vec![])).collect(), ..Txn::default() };
    assert_eq!(store.txn(many).await.unwrap_err().code(), "CDC:ErrEtcdTxnOpsExceed");
    let big = Txn { then: vec![Op::put("k", vec![0; MAX_TXN_BYTES])], ..Txn::default() };
    assert_eq!(store.txn(big).await.unwrap_err().code(), "CDC:ErrEtcdTxnSizeExceed");
    // Both branches and the values that are compared with travel together.
    let half = || vec![0; MAX_TXN_BYTES / 2];
    let halves = Txn {
        when: vec![Compare::Value { key: "k".into(), value: half() }],
        then: vec![Op::put("k", half())],
        or_else: Vec::new(),
    };
    assert_eq!(store.txn(halves).await.unwrap_err().code(), "CDC:ErrEtcdTxnSizeExceed");
    let twice = Txn { then: vec![Op::put("k", vec![]), Op::delete("k")], ..Txn::default() };
    assert!(matches!(store.txn(twice).await, Err(StoreError::Invalid(_))));
    assert_eq!(store.scan("").await.unwrap().found.len(), 0);
}

async fn the_largest_transactions_are_taken(binding: &Binding) {
    let store = binding.open().await;
    let keys: Vec<String> = (0..MAX_TXN_OPS).map(|n| format!("k{n:03}")).collect();
    let most = Txn {
        when: keys.iter().map(|key| Compare::Absent { key: key.clone() }).collect(),
        then: keys.iter().map(|key| Op::put(key, b"x".to_vec())).collect(),
        or_else: keys.iter().map(Op::delete).collect(),
    };
    assert!(store.txn(most).await.unwrap().succeeded);
    assert_eq!(store.scan("k").await.unwrap().found.len(), MAX_TXN_OPS);
    let large = Txn { then: vec![Op::put("large", vec![7; MAX_TXN_BYTES - 5])], ..Txn::default() };
    store.txn(large).await.unwrap();
    assert_eq!(store.get("large").await.unwrap().found.unwrap().value.len(), MAX_TXN_BYTES - 5);
}

fn leased(key: &str, lease: LeaseId) -> Txn {
    Txn { then: vec![Op::Put { key: key.into(), value: vec![1], lease: Some(lease) }], ..Txn::default() }
}

async fn keys_vanish_with_their_lease(binding: &Binding) {
    let store = binding.open().await;
    let lease = store.grant(TTL).await.unwrap();
    store.keep_alive(lease).await.unwrap();
    assert!(store.time_to_live(lease).await.unwrap().is_some());
    store.txn(leased("k", lease)).await.unwrap();
    store.txn(put("stays", "x")).await.unwrap();
    assert_eq!(store.get("k").await.unwrap().found.unwrap().lease, Some(lease));
    assert_eq!(store.get("stays").await.unwrap().found.unwrap().lease, None);
    store.revoke(lease).await.unwrap();
    assert!(value(&*store, "k").await.is_none() && value(&*store, "stays").await.is_some());
    assert_eq!(store.time_to_live(lease).await.unwrap(), None);
    assert!(matches!(store.keep_alive(lease).await, Err(StoreError::LeaseGone)));
    let late = store.txn(leased("k", lease)).await;
    assert!(matches!(late, Err(StoreError::LeaseGone)), "a dead lease holds nothing");
    store.revoke(lease).await.unwrap();
}

async fn a_session_ends_when_its_lease_is_revoked(binding: &Binding) {
    let store = binding.open().await;
    let before = Instant::now();
    let (session, other) = (store.session(TTL).await.unwrap(), store.session(TTL).await.unwrap());
    assert_ne!(session.lease, other.lease);
    let confirmed = session.confirmed.last(Instant::now());
    assert!(before <= confirmed && confirmed <= Instant::now());
    store.txn(leased("k", session.lease)).await.unwrap();
    assert!(!session.done.is_cancelled());
    store.revoke(session.lease).await.unwrap();
    assert!(session.done.is_cancelled() && !other.done.is_cancelled());
    assert!(value(&*store, "k").await.is_none());
}

async fn the_oldest_candidate_leads_and_the_next_one_follows(binding: &Binding) {
    let store = binding.open().await;
    let (one, two) = (store.session(TTL).await.unwrap(), store.session(TTL).await.unwrap());
    assert!(store.leader("owner").await.unwrap().is_none());
    let won = store.campaign("owner", one.lease, "n1").await.unwrap();
    assert_eq!(store.leader("owner").await.unwrap().unwrap().value, b"n1");
    assert_eq!(won.key, format!("owner/{:x}", one.lease.0));
    assert_eq!(won.revision, store.get(&won.key).await.unwrap().found.unwrap().mod_revision);

    let waiting = stand(&store, two.lease, "n2").await;
    assert!(!waiting.is_finished());
    // A prefix that only begins in the same way is another election.
    let third = store.session(TTL).await.unwrap();
    store.campaign("owner-of-else", third.lease, "n3").await.unwrap();
    store.resign("owner", one.lease).await.unwrap();
    store.resign("owner", one.lease).await.unwrap();
    let next = waiting.await.unwrap().unwrap();
    assert!(next.revision > won.revision, "a later winner has a larger generation");
    assert_eq!(store.leader("owner").await.unwrap().unwrap().value, b"n2");
    // A write that compares the key of the earlier leader is refused.
    let fence = Compare::ModRevision { key: won.key, revision: won.revision };
    assert!(!store.txn(when(fence, "k", "late")).await.unwrap().succeeded);
}

/// Begins to stand for election, and returns once the candidacy is there.
async fn stand(
    store: &Arc<dyn Store>,
    lease: LeaseId,
    name: &'static str,
) -> tokio::task::JoinHandle<Result<coordinator::backend::Leadership, StoreError>> {
    let waiting = tokio::spawn({
        let store = Arc::clone(store);
        async move { store.campaign("owner", lease, name).await }
    });
    let key = candidate_key("owner", lease);
    until(|| async { store.get(&key).await.unwrap().found.is_some() }).await;
    waiting
}

async fn a_later_leader_has_a_larger_revision_whatever_the_order_of_leaving(binding: &Binding) {
    let store = binding.open().await;
    let mut leases = Vec::new();
    for _ in 0..4 {
        leases.push(store.session(TTL).await.unwrap().lease);
    }
    let first = store.campaign("owner", leases[0], "a").await.unwrap();
    let second = stand(&store, leases[1], "b").await;
    let third = stand(&store, leases[2], "c").await;
    let fourth = stand(&store, leases[3], "d").await;
    // One in the middle goes before it has led; who is behind it does not lead because of that.
    store.revoke(leases[1]).await.unwrap();
    assert!(matches!(second.await.unwrap(), Err(StoreError::LeaseGone)));
    assert!(!third.is_finished() && !fourth.is_finished());
    store.resign("owner", leases[0]).await.unwrap();
    let third = third.await.unwrap().unwrap();
    // The first comes back and has to wait behind the others.
    let again = stand(&store, leases[0], "a").await;
    store.revoke(leases[2]).await.unwrap();
    let fourth = fourth.await.unwrap().unwrap();
    assert!(!again.is_finished());
    store.resign("owner", leases[3]).await.unwrap();
    let again = again.await.unwrap().unwrap();
    let revisions = [first.revision, third.revision, fourth.revision, again.revision];
    assert!(revisions.windows(2).all(|pair| pair[0] < pair[1]), "{revisions:?}");
}

async fn a_candidate_that_stands_twice_stands_once(binding: &Binding) {
    let store = binding.open().await;
    let session = store.session(TTL).await.unwrap();
    let first = store.campaign("owner", session.lease, "n1").await.unwrap();
    let second = store.campaign("owner", session.lease, "n1").await.unwrap();
    assert_eq!(first, second, "the key is not written again: a fence that compares it still holds");
    assert_eq!(store.scan("owner/").await.unwrap().found.len(), 1);
}

async fn who_gives_up_waiting_for_the_lead_is_still_a_candidate(binding: &Binding) {
    let store = binding.open().await;
    let (one, two) = (store.session(TTL).await.unwrap(), store.session(TTL).await.unwrap());
    store.campaign("owner", one.lease, "n1").await.unwrap();
    let waiting = stand(&store, two.lease, "n2").await;
    waiting.abort();
    store.revoke(one.lease).await.unwrap();
    assert_eq!(store.leader("owner").await.unwrap().unwrap().value, b"n2");
    store.campaign("owner", two.lease, "n2").await.unwrap();
}

async fn a_candidate_without_a_lease_is_told_so(binding: &Binding) {
    let store = binding.open().await;
    let session = store.session(TTL).await.unwrap();
    store.revoke(session.lease).await.unwrap();
    let lost = store.campaign("owner", session.lease, "n1").await;
    assert!(matches!(lost, Err(StoreError::LeaseGone)), "{lost:?}");
    assert!(store.leader("owner").await.unwrap().is_none());
}

fn shown(events: &[WatchEvent]) -> Vec<String> {
    let show = |event: &WatchEvent| match event {
        WatchEvent::Put(kv) => format!("put {}={}", kv.key, String::from_utf8_lossy(&kv.value)),
        WatchEvent::Delete { key, .. } => format!("delete {key}"),
    };
    events.iter().map(show).collect()
}

// behaviour: coordinator-ST-2
async fn a_watch_sees_every_change_in_order(binding: &Binding) {
    let store = binding.open().await;
    let start = store.txn(put("w/a", "1")).await.unwrap().revision;
    let mut watch = store.watch("w/", start).await.unwrap();
    store.txn(put("other", "x")).await.unwrap();
    store.txn(put("w/b", "2")).await.unwrap();
    store.txn(Txn { then: vec![Op::delete("w/a")], ..Txn::default() }).await.unwrap();
    let mut seen = Vec::new();
    while seen.len() < 3 {
        seen.extend(watch.next().await.unwrap());
    }
    assert_eq!(shown(&seen), ["put w/a=1", "put w/b=2", "delete w/a"]);
    assert!(watch.progress() >= seen[2].revision());

    let waiting = tokio::spawn(async move { watch.next().await });
    let revision = store.txn(put("w/c", "3")).await.unwrap().revision;
    let last = waiting.await.unwrap().unwrap();
    assert_eq!((last[0].revision(), last.len()), (revision, 1));
}

async fn a_watch_starts_where_it_is_told_to(binding: &Binding) {
    let store = binding.open().await;
    store.txn(put("w/a", "1")).await.unwrap();
    let second = store.txn(put("w/a", "2")).await.unwrap().revision;
    let snapshot = store.scan("w/").await.unwrap();
    let mut from_second = store.watch("w/", second).await.unwrap();
    let mut from_snapshot = store.watch("w/", snapshot.revision + 1).await.unwrap();
    store.txn(put("w/a", "3")).await.unwrap();
    assert_eq!(shown(&from_snapshot.next().await.unwrap()), ["put w/a=3"]);
    let mut seen = Vec::new();
    while seen.len() < 2 {
        seen.extend(from_second.next().await.unwrap());
    }
    assert_eq!(shown(&seen), ["put w/a=2", "put w/a=3"]);
}

async fn a_dropped_wait_loses_no_change(binding: &Binding) {
    let store = binding.open().await;
    let start = store.txn(put("start", "")).await.unwrap().revision;
    let mut watch = store.watch("w/", start).await.unwrap();
    let writer = tokio::spawn({
        let store = Arc::clone(&store);
        async move {
            for n in 0..100 {
                store.txn(put("w/a", &n.to_string())).await.unwrap();
            }
        }
    });
    let mut seen = Vec::new();
    while seen.len() < 100 {
        // Most of these waits are given up before anything arrives.
        if let Ok(events) = tokio::time::timeout(Duration::from_micros(300), watch.next()).await {
            seen.extend(events.unwrap());
        }
    }
    writer.await.unwrap();
    let expected: Vec<String> = (0..100).map(|n| format!("put w/a={n}")).collect();
    assert_eq!(shown(&seen), expected);
}

async fn changes_of_one_transaction_are_seen_together(binding: &Binding) {
    let store = binding.open().await;
    let mut watch = store.watch("w/", store.get("w").await.unwrap().revision + 1).await.unwrap();
    for n in 0..20 {
        let value = n.to_string().into_bytes();
        let then = (0..50).map(|key| Op::put(format!("w/{key:02}"), value.clone())).collect();
        store.txn(Txn { then, ..Txn::default() }).await.unwrap();
    }
    let mut seen = 0;
    while seen < 1000 {
        let events = watch.next().await.unwrap();
        assert_eq!(events.len() % 50, 0, "a part of a transaction was shown");
        for change in events.chunks(50) {
            assert!(change.iter().all(|event| event.revision() == change[0].revision()));
        }
        seen += events.len();
    }
}

// behaviour: coordinator-ST-3
async fn concurrent_writers_lose_nothing(binding: &Binding) {
    let store = binding.open().await;
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
    assert_eq!(value(&*store, "sum").await.unwrap(), "40");
}

// behaviour: coordinator-ST-21
async fn a_restart_keeps_what_is_durable_and_drops_what_was_leased(binding: &Binding) {
    let store = binding.open().await;
    let identity = store.identity().await.unwrap();
    assert_ne!(identity, 0);
    let session = store.session(Duration::from_secs(2)).await.unwrap();
    store.txn(put("durable", "x")).await.unwrap();
    let won = store.campaign("owner", session.lease, "n1").await.unwrap();
    let before = store.scan("").await.unwrap().revision;
    drop(store);

    let store = binding.open().await;
    assert_eq!(store.identity().await.unwrap(), identity);
    assert_eq!(value(&*store, "durable").await.unwrap(), "x");
    // At once where the lock of the directory says that the earlier process is gone, else when its lease is over.
    if binding.is_alone() {
        assert!(store.leader("owner").await.unwrap().is_none());
    }
    let session = store.session(TTL).await.unwrap();
    let again = store.campaign("owner", session.lease, "n1").await.unwrap();
    assert!(again.revision > won.revision && again.revision > before, "revisions continue");
    assert_eq!(
        store.scan("owner/").await.unwrap().found.len(),
        1,
        "the lease of the earlier process is gone"
    );
}
