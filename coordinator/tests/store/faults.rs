//! A real etcd that is killed, frozen, compacted, wiped, or without a majority.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use coordinator::Layout;
use coordinator::backend::etcd::{EtcdConfig, EtcdStore, connect};
use coordinator::backend::{Compare, Op, Session, Store, StoreError, Txn, Watch, WatchEvent};
use coordinator::meta::{Meta, Stored};
use coordinator::watchdog::{Verdict, Watchdog};
use heartbeatpb::config::{ChangefeedInfo, ChangefeedStatusDoc, ReplicaConfig, UpstreamInfo};
use heartbeatpb::{ChangefeedId, Ts};
use parking_lot::Mutex;
use testkit::Etcd;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};

use super::bindings::{put, until, value, when};

const TTL: Duration = Duration::from_secs(10);

async fn open(etcd: &Etcd) -> EtcdStore {
    connect(EtcdConfig::new(etcd.endpoints())).await.unwrap()
}

/// The next `count` writes that a watch sees; fails when it does not see them within a minute.
pub(crate) async fn collect(watch: &mut dyn Watch, count: usize) -> Vec<String> {
    let mut seen = Vec::new();
    while seen.len() < count {
        let events = tokio::time::timeout(Duration::from_secs(60), watch.next()).await.unwrap().unwrap();
        for event in events {
            match event {
                WatchEvent::Put(kv) => {
                    seen.push(format!("{}={}", kv.key, String::from_utf8_lossy(&kv.value)))
                }
                WatchEvent::Delete { key, .. } => seen.push(format!("{key} deleted")),
            }
        }
    }
    seen
}

/// Adds one to a number again and again until `last`, as a coordinator does: what is uncertain is read again.
/// Gives the longest time between two successes.
async fn count_up(store: Arc<EtcdStore>, last: u32) -> Duration {
    let (mut longest, mut success) = (Duration::ZERO, Instant::now());
    loop {
        let Ok(read) = store.get("sum").await else { continue };
        let (sum, revision) = read
            .found
            .map_or((0, 0), |kv| (String::from_utf8(kv.value).unwrap().parse().unwrap(), kv.mod_revision));
        longest = longest.max(success.elapsed());
        success = Instant::now();
        if sum >= last {
            return longest;
        }
        let held = if revision == 0 {
            Compare::Absent { key: "sum".to_owned() }
        } else {
            Compare::ModRevision { key: "sum".to_owned(), revision }
        };
        match store.txn(when(held, "sum", &(sum + 1).to_string())).await {
            Ok(outcome) => {
                assert!(outcome.succeeded || sum == 0, "nobody else writes, unless an attempt came late")
            }
            Err(error) => assert!(error.is_retryable(), "{error}"),
        }
    }
}

fn numbers(upto: u32) -> Vec<String> {
    (1..=upto).map(|n| format!("sum={n}")).collect()
}

#[tokio::test(flavor = "multi_thread")]
// behaviour: coordinator-ST-2
async fn a_server_that_is_killed_and_started_again_costs_time_and_nothing_else() {
    let mut etcd = Etcd::start().await.unwrap();
    let store = Arc::new(open(&etcd).await);
    let session = store.session(TTL).await.unwrap();
    let mut watch = store.watch("sum", 1).await.unwrap();
    let counting = tokio::spawn(count_up(Arc::clone(&store), 400));
    for _ in 0..3 {
        let before = value(&*store, "sum").await.map_or(0, |sum| sum.parse::<u32>().unwrap());
        until(|| async {
            value(&*store, "sum").await.is_some_and(|sum| sum.parse::<u32>().unwrap() > before + 20)
        })
        .await;
        etcd.kill(0).unwrap();
        etcd.resume(0).unwrap();
        etcd.ready().await.unwrap();
    }
    counting.await.unwrap();
    assert_eq!(collect(&mut *watch, 400).await, numbers(400), "no change is missing or there twice");
    assert!(!session.done.is_cancelled());
    store.keep_alive(session.lease).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
// behaviour: coordinator-ST-20
async fn a_frozen_store_suspends_writing_by_the_clock_and_ends_the_session_when_it_says_so() {
    let ttl = Duration::from_secs(3);
    let etcd = Etcd::start().await.unwrap();
    let store = open(&etcd).await;
    let session = store.session(ttl).await.unwrap();
    let leased = Op::Put { key: "k".to_owned(), value: vec![], lease: Some(session.lease) };
    store.txn(Txn { then: vec![leased], ..Txn::default() }).await.unwrap();
    let mut confirmed = session.confirmed.clone();
    let first = confirmed.last(Instant::now());
    // Longer than the lease, and it lives because it is renewed.
    let alive = Instant::now();
    while alive.elapsed() < ttl + Duration::from_secs(1) {
        tokio::time::timeout(ttl, confirmed.changed()).await.unwrap();
    }
    assert!(confirmed.last(Instant::now()) > first + ttl);
    assert!(value(&store, "k").await.is_some());

    let mut dog = Watchdog::new(ttl, confirmed.last(Instant::now()));
    etcd.pause(0).unwrap();
    let frozen = Instant::now();
    let mut suspended = None;
    while frozen.elapsed() < ttl + Duration::from_secs(1) {
        let now = Instant::now();
        dog.on_confirmed(session.confirmed.last(now));
        if dog.on_time(now) == Some(Verdict::Suspended) {
            suspended = Some(now);
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let suspended = suspended.expect("writing is suspended while the lease lives");
    assert!(suspended < session.confirmed.last(suspended) + ttl - Duration::from_millis(500));
    assert!(!session.done.is_cancelled(), "a store that is silent has not given the lease up");
    etcd.unpause(0).unwrap();
    until(|| async { value(&store, "k").await.is_none() }).await;
    tokio::time::timeout(ttl, session.done.cancelled()).await.expect("it says so when it can");
    assert!(matches!(store.keep_alive(session.lease).await, Err(StoreError::LeaseGone)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_outlives_a_store_that_is_away_for_longer_and_keeps_its_keys() {
    let ttl = Duration::from_secs(3);
    let mut etcd = Etcd::start().await.unwrap();
    let store = open(&etcd).await;
    let session = store.session(ttl).await.unwrap();
    let leased = Op::Put { key: "k".to_owned(), value: vec![7], lease: Some(session.lease) };
    store.txn(Txn { then: vec![leased], ..Txn::default() }).await.unwrap();
    etcd.kill(0).unwrap();
    let away = Instant::now();
    tokio::time::sleep(2 * ttl).await;
    assert!(!session.done.is_cancelled());
    etcd.resume(0).unwrap();
    etcd.ready().await.unwrap();
    until(|| async { session.confirmed.last(away) > away + 2 * ttl }).await;
    assert!(!session.done.is_cancelled());
    let kept = store.get("k").await.unwrap().found.expect("its keys are there");
    assert_eq!((kept.lease, kept.mod_revision), (Some(session.lease), kept.create_revision));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_etcd_gave_up_ends_its_session() {
    let etcd = Etcd::start().await.unwrap();
    let store = open(&etcd).await;
    let session = store.session(TTL).await.unwrap();
    etcd.ctl(&["lease", "revoke", &format!("{:x}", session.lease.0)]).unwrap();
    tokio::time::timeout(TTL / 2, session.done.cancelled()).await.unwrap();
    assert_eq!(store.time_to_live(session.lease).await.unwrap(), None);
}

/// Stands between a store and its server, passes requests on, and keeps answers to itself when it is told to.
struct Middleman {
    address: String,
    deaf: Arc<AtomicBool>,
    /// Becomes deaf with the request that holds this.
    word: Arc<Mutex<Option<&'static [u8]>>>,
}

impl Middleman {
    async fn new(endpoint: &str) -> Self {
        let server = endpoint.strip_prefix("http://").unwrap().to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let own = Self {
            address: format!("http://{}", listener.local_addr().unwrap()),
            deaf: Arc::default(),
            word: Arc::default(),
        };
        let (deaf, word) = (Arc::clone(&own.deaf), Arc::clone(&own.word));
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let Ok(server) = TcpStream::connect(&server).await else { continue };
                let (from_client, to_client) = client.into_split();
                let (from_server, to_server) = server.into_split();
                let (heard, held) = (Arc::clone(&deaf), Arc::clone(&word));
                tokio::spawn(pass(from_client, to_server, move |bytes| {
                    let holds = |word: &[u8]| bytes.windows(word.len()).any(|part| part == word);
                    if held.lock().is_some_and(holds) {
                        heard.store(true, Ordering::Relaxed);
                    }
                    true
                }));
                let deaf = Arc::clone(&deaf);
                tokio::spawn(pass(from_server, to_client, move |_| !deaf.load(Ordering::Relaxed)));
            }
        });
        own
    }
}

async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, passes: impl Fn(&[u8]) -> bool) {
    let mut bytes = [0; 16384];
    while let Ok(count @ 1..) = from.read(&mut bytes).await {
        if passes(&bytes[..count]) && to.write_all(&bytes[..count]).await.is_err() {
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
// behaviour: coordinator-BE-14
async fn a_change_whose_answer_is_lost_is_uncertain_and_found_when_it_is_read() {
    let etcd = Etcd::start().await.unwrap();
    let middleman = Middleman::new(&etcd.endpoint(0)).await;
    let store = connect(EtcdConfig::new([middleman.address.clone()])).await.unwrap();
    store.txn(put("k", "1")).await.unwrap();
    let layout = Layout::new("default").unwrap();
    let session = store.session(Duration::from_secs(60)).await.unwrap();
    let fence = store.campaign(&layout.owner_prefix(), session.lease, "n").await.unwrap();
    let meta = Meta::new(Arc::new(store.clone()), layout.clone(), fence.clone());
    let id = ChangefeedId::fresh("feed");
    let info = ChangefeedInfo::new(
        id.clone(),
        UpstreamInfo::default(),
        "blackhole://",
        ReplicaConfig::default(),
        Ts(1),
    );
    let status = ChangefeedStatusDoc::at(Ts(1), None);
    meta.create(&Stored { info, status }).await.unwrap();
    // The member's own address is learnt, so somebody answers when the middleman does not.
    until(|| async { format!("{store:?}").contains(&etcd.endpoint(0)) }).await;

    middleman.deaf.store(true, Ordering::Relaxed);
    let started = Instant::now();
    let lost = store.txn(put("k", "2")).await.unwrap_err();
    assert!(lost.may_have_applied() && started.elapsed() < Duration::from_secs(8), "{lost:?}");
    assert_eq!(value(&store, "k").await.unwrap(), "2", "it was applied");
    middleman.deaf.store(false, Ordering::Relaxed);

    // The same below the change of an epoch. Done twice it would be one larger.
    let fresh = connect(EtcdConfig::new([middleman.address.clone()])).await.unwrap();
    until(|| async { format!("{fresh:?}").contains(&etcd.endpoint(0)) }).await;
    let meta = Meta::new(Arc::new(fresh), layout, fence);
    *middleman.word.lock() = Some(b"sink-uri");
    let bumped = meta.bump_epoch(&id, 77, |_| Ok(())).await.unwrap();
    assert_eq!(bumped.info.epoch.unwrap().get(), 77);
    assert!(middleman.deaf.load(Ordering::Relaxed), "the answer was lost");
    assert_eq!(meta.get("default", "feed").await.unwrap(), bumped);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_gone_has_certainly_not_changed_anything() {
    let mut etcd = Etcd::start().await.unwrap();
    let quick = EtcdConfig { call_limit: Duration::from_secs(2), ..EtcdConfig::new(etcd.endpoints()) };
    let store = connect(quick).await.unwrap();
    etcd.kill(0).unwrap();
    let started = Instant::now();
    let mut errors = vec![store.txn(put("k", "3")).await.unwrap_err()];
    while errors.last().is_some_and(StoreError::may_have_applied) {
        // The first attempt may meet a connection that just broke.
        errors.push(store.txn(put("k", "3")).await.unwrap_err());
        assert!(errors.len() < 5, "{errors:?}");
    }
    assert!(started.elapsed() < Duration::from_secs(10), "{errors:?}");
    let text = errors.pop().unwrap().to_string();
    assert!(text.contains(&etcd.endpoint(0)) && text.contains("check that etcd runs"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
// behaviour: coordinator-ST-2
async fn a_watch_of_a_compacted_past_says_so_and_one_of_the_present_goes_on() {
    let etcd = Etcd::start().await.unwrap();
    let store = open(&etcd).await;
    let first = store.txn(put("w", "1")).await.unwrap().revision;
    let mut present = store.watch("w", first).await.unwrap();
    assert_eq!(collect(&mut *present, 1).await, ["w=1"]);
    store.txn(put("w", "2")).await.unwrap();
    let last = store.txn(put("w", "3")).await.unwrap().revision;
    etcd.ctl(&["compact", &last.to_string()]).unwrap();
    let mut past = store.watch("w", first).await.unwrap();
    assert!(matches!(past.next().await, Err(StoreError::Compacted)));
    assert_eq!(collect(&mut *present, 2).await, ["w=2", "w=3"]);
    store.txn(put("w", "4")).await.unwrap();
    assert_eq!(collect(&mut *present, 1).await, ["w=4"]);
    // What is asked for after "compacted": everything, and then the changes behind it.
    let loaded = store.scan("w").await.unwrap();
    let mut again = store.watch("w", loaded.revision + 1).await.unwrap();
    store.txn(put("w", "5")).await.unwrap();
    assert_eq!(collect(&mut *again, 1).await, ["w=5"]);
}

#[tokio::test(flavor = "multi_thread")]
// behaviour: coordinator-ST-2
async fn a_reader_that_is_slow_loses_no_change() {
    let etcd = Etcd::start().await.unwrap();
    let store = open(&etcd).await;
    let mut watch = store.watch("w", 1).await.unwrap();
    let value = "x".repeat(20_000);
    for n in 0..500 {
        store.txn(put("w", &format!("{n}{value}"))).await.unwrap();
    }
    // Longer than the silence after which a stream is taken for dead.
    tokio::time::sleep(Duration::from_secs(12)).await;
    let seen = collect(&mut *watch, 500).await;
    for (n, change) in seen.iter().enumerate() {
        assert!(change.starts_with(&format!("w={n}x")), "{n}: {}", &change[..20]);
    }
    assert_eq!(seen.len(), 500);
}

/// How old the newest confirmation of a lease has been at most.
fn oldest_confirmation(session: &Session) -> Arc<Mutex<Duration>> {
    let (oldest, session) = (Arc::new(Mutex::new(Duration::ZERO)), session.clone());
    tokio::spawn({
        let oldest = Arc::clone(&oldest);
        async move {
            loop {
                let now = Instant::now();
                let age = now.saturating_duration_since(session.confirmed.last(now));
                let most = age.max(*oldest.lock());
                *oldest.lock() = most;
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    });
    oldest
}

#[tokio::test(flavor = "multi_thread")]
async fn the_death_of_the_leading_member_costs_one_election_of_etcd() {
    let mut etcd = Etcd::builder().members(3).start().await.unwrap();
    let store = Arc::new(open(&etcd).await);
    let session = store.session(TTL).await.unwrap();
    let won = store.campaign("owner", session.lease, "n1").await.unwrap();
    let mut watch = store.watch("sum", 1).await.unwrap();
    let oldest = oldest_confirmation(&session);
    let counting = tokio::spawn(count_up(Arc::clone(&store), 600));
    for _ in 0..2 {
        let leader = etcd.leader().await.unwrap();
        etcd.kill(leader).unwrap();
        let next = etcd.leader().await.unwrap();
        assert_ne!(leader, next);
        store.get("sum").await.unwrap();
        etcd.resume(leader).unwrap();
        etcd.ready().await.unwrap();
    }
    let longest = counting.await.unwrap();
    println!("longest time without a success: {longest:?}, oldest confirmation: {:?}", *oldest.lock());
    assert!(longest < Duration::from_secs(15), "{longest:?}");
    assert_eq!(collect(&mut *watch, 600).await, numbers(600), "no change is missing or there twice");
    assert!(!session.done.is_cancelled());
    assert_eq!(store.leader("owner").await.unwrap().unwrap().mod_revision, won.revision);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_member_is_left_within_a_second() {
    let etcd = Etcd::builder().members(3).start().await.unwrap();
    let leader = etcd.leader().await.unwrap();
    let follower = (leader + 1) % 3;
    // The follower is asked first: it is the only one that is named.
    let store = Arc::new(connect(EtcdConfig::new([etcd.endpoint(follower)])).await.unwrap());
    until(|| async { format!("{store:?}").matches("http://").count() == 3 }).await;
    let ttl = Duration::from_secs(3);
    let session = store.session(ttl).await.unwrap();
    let mut watch = store.watch("w", 1).await.unwrap();
    store.txn(put("w", "1")).await.unwrap();
    assert_eq!(collect(&mut *watch, 1).await, ["w=1"]);

    etcd.pause(follower).unwrap();
    let frozen = Instant::now();
    assert_eq!(value(&*store, "w").await.unwrap(), "1");
    let read = frozen.elapsed();
    store.txn(put("w", "2")).await.unwrap();
    assert_eq!(collect(&mut *watch, 1).await, ["w=2"]);
    let seen = frozen.elapsed();
    println!("read after {read:?}, change seen after {seen:?}");
    assert!(read < Duration::from_secs(3) && seen < Duration::from_secs(6), "{read:?} {seen:?}");
    // The lease lives on, renewed by another member.
    let confirmed = session.confirmed.last(Instant::now());
    until(|| async { session.confirmed.last(Instant::now()) > confirmed + ttl }).await;
    assert!(!session.done.is_cancelled());
    etcd.unpause(follower).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
// behaviour: coordinator-ST-2
async fn a_stream_on_which_nothing_arrives_is_opened_at_another_member() {
    let etcd = Etcd::builder().members(3).start().await.unwrap();
    let follower = (etcd.leader().await.unwrap() + 1) % 3;
    // No session: nobody else notices that the member is frozen.
    let store = connect(EtcdConfig::new([etcd.endpoint(follower)])).await.unwrap();
    until(|| async { format!("{store:?}").matches("http://").count() == 3 }).await;
    let mut watch = store.watch("w", 1).await.unwrap();
    store.txn(put("w", "1")).await.unwrap();
    assert_eq!(collect(&mut *watch, 1).await, ["w=1"]);
    etcd.pause(follower).unwrap();
    let other = connect(EtcdConfig::new([etcd.endpoint((follower + 1) % 3)])).await.unwrap();
    other.txn(put("w", "2")).await.unwrap();
    let frozen = Instant::now();
    assert_eq!(collect(&mut *watch, 1).await, ["w=2"]);
    assert!(frozen.elapsed() < Duration::from_secs(25), "{:?}", frozen.elapsed());
    etcd.unpause(follower).unwrap();
    other.txn(put("w", "3")).await.unwrap();
    assert_eq!(collect(&mut *watch, 1).await, ["w=3"], "once, and only once");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_freeze_of_the_leading_member_is_survived_by_leases_and_watches() {
    let etcd = Etcd::builder().members(3).start().await.unwrap();
    let store = Arc::new(open(&etcd).await);
    let session = store.session(TTL).await.unwrap();
    let mut watch = store.watch("sum", 1).await.unwrap();
    let counting = tokio::spawn(count_up(Arc::clone(&store), 400));
    until(|| async { value(&*store, "sum").await.is_some_and(|sum| sum.parse::<u32>().unwrap() > 50) }).await;
    let leader = etcd.leader().await.unwrap();
    let oldest = oldest_confirmation(&session);
    etcd.pause(leader).unwrap();
    let longest = counting.await.unwrap();
    println!("longest time without a success: {longest:?}, oldest confirmation: {:?}", *oldest.lock());
    assert!(longest < Duration::from_secs(20), "{longest:?}");
    assert_eq!(collect(&mut *watch, 400).await, numbers(400), "no change is missing or there twice");
    assert!(!session.done.is_cancelled());
    store.keep_alive(session.lease).await.unwrap();
    etcd.unpause(leader).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
// behaviour: coordinator-ST-1
async fn without_a_majority_every_call_fails_in_time_and_works_again_later() {
    let limit = Duration::from_secs(4);
    let mut etcd = Etcd::builder().members(3).start().await.unwrap();
    let store = connect(EtcdConfig { call_limit: limit, ..EtcdConfig::new(etcd.endpoints()) }).await.unwrap();
    store.txn(put("k", "1")).await.unwrap();
    let session = store.session(Duration::from_secs(5)).await.unwrap();
    let mut watch = store.watch("k", 1).await.unwrap();
    assert_eq!(collect(&mut *watch, 1).await, ["k=1"]);
    etcd.kill(0).unwrap();
    etcd.kill(1).unwrap();

    let most = limit + Duration::from_secs(2);
    let mut texts = Vec::new();
    let mut check = |what: &str, started: Instant, error: StoreError| {
        assert!(started.elapsed() < most, "{what}: {:?}", started.elapsed());
        assert!(error.is_retryable(), "{what}: {error:?}");
        texts.push(error.to_string());
    };
    let now = Instant::now;
    let started = now();
    check("get", started, store.get("k").await.unwrap_err());
    let started = now();
    check("scan", started, store.scan("").await.unwrap_err());
    let started = now();
    check("grant", started, store.grant(TTL).await.unwrap_err());
    let started = now();
    check("leader", started, store.leader("owner").await.unwrap_err());
    let started = now();
    check("campaign", started, store.campaign("owner", session.lease, "n").await.unwrap_err());
    let started = now();
    let txn = store.txn(put("k", "2")).await.unwrap_err();
    check("txn", started, txn);
    assert!(texts.iter().all(|text| text.contains("http://127.0.0.1:")), "{texts:#?}");
    assert!(texts.iter().any(|text| text.contains("members of etcd have to be running")), "{texts:#?}");
    assert!(!session.done.is_cancelled(), "silence ends nothing");

    etcd.resume(0).unwrap();
    etcd.ready().await.unwrap();
    until(|| async { store.get("k").await.is_ok() }).await;
    until(|| async { store.txn(put("k", "3")).await.is_ok() }).await;
    let mut last = String::new();
    while last != "k=3" {
        last = collect(&mut *watch, 1).await.pop().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_lost_its_past_is_not_believed_any_more() {
    let mut etcd = Etcd::start().await.unwrap();
    let store = open(&etcd).await;
    let session = store.session(Duration::from_secs(30)).await.unwrap();
    for n in 0..10 {
        store.txn(put("k", &n.to_string())).await.unwrap();
    }
    let mut watch = store.watch("k", store.get("k").await.unwrap().revision + 1).await.unwrap();
    etcd.kill(0).unwrap();
    etcd.wipe(0).unwrap();
    etcd.resume(0).unwrap();
    etcd.ready().await.unwrap();
    let mut error = store.get("k").await;
    while error.as_ref().is_err_and(StoreError::is_retryable) {
        error = store.get("k").await;
    }
    let error = error.unwrap_err();
    assert!(matches!(error, StoreError::Broken(_)), "{error:?}");
    assert!(error.to_string().contains("went back from revision"), "{error}");
    tokio::time::timeout(Duration::from_secs(5), session.done.cancelled()).await.unwrap();
    assert!(matches!(store.txn(put("k", "late")).await, Err(StoreError::Broken(_))));
    let ended = tokio::time::timeout(Duration::from_secs(20), watch.next()).await.unwrap();
    assert!(ended.is_err());
    // A process that starts anew takes the store as it is.
    let store = open(&etcd).await;
    assert!(value(&store, "k").await.is_none());
}
