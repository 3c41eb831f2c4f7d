//! A watched lease against a real store and the real clock.

use std::sync::mpsc;

use coordinator::backend::memory::{Disk, open};
use coordinator::backend::{Confirmations, Op, Txn};
use tokio::sync::watch;

use super::*;

const TTL: Duration = Duration::from_secs(3);
const PATIENCE: Duration = Duration::from_secs(10);

/// A session whose renewals a test sends.
struct Rig {
    store: Arc<dyn Store>,
    session: Session,
    lease: Arc<Lease>,
    renewals: watch::Sender<Instant>,
    verdict: mpsc::Receiver<Lost>,
    guard: Guard,
}

impl Rig {
    /// A registered node.
    async fn new() -> Self {
        let began = Instant::now();
        let (renewals, confirmed) = Confirmations::since(began);
        // The store says that the lease is there: only renewals count.
        let store: Arc<dyn Store> = Arc::new(open(&Disk::new()).unwrap());
        let granted = store.grant(Duration::from_secs(3600)).await.unwrap();
        let put = Op::Put { key: "me".to_owned(), value: Vec::new(), lease: Some(granted) };
        store.txn(Txn { then: vec![put], ..Txn::default() }).await.unwrap();
        let session = Session { lease: granted, done: CancellationToken::new(), confirmed };
        let lease = Arc::new(Lease::new());
        assert!(!lease.permit().holds(), "nothing is written without a session");
        let (told, verdict) = mpsc::channel();
        let fence = move |lost| told.send(lost).unwrap();
        let guard =
            Guard::start(Arc::clone(&store), session.clone(), (TTL, began), Arc::clone(&lease), fence)
                .unwrap();
        guard.on_registered("me");
        Self { store, session, lease, renewals, verdict, guard }
    }

    /// Waits until writing is suspended, and says when.
    async fn suspended(&self) -> Instant {
        let deadline = Instant::now() + PATIENCE;
        while self.lease.suspended().is_none() {
            assert!(Instant::now() < deadline, "writing is not suspended");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Instant::now()
    }
}

#[tokio::test(flavor = "multi_thread")]
// behaviour: coordinator-ST-20
async fn a_lease_that_nobody_confirms_suspends_writing_a_second_early_and_its_confirmation_resumes_it() {
    let rig = Rig::new().await;
    assert!(rig.lease.permit().holds() && rig.lease.trouble().is_none());
    let last = Instant::now();
    rig.renewals.send_replace(last);
    let after = rig.suspended().await - last;
    assert!(after >= Duration::from_secs(2) && after < Duration::from_secs(3), "{after:?}");
    assert!(!rig.lease.permit().holds());
    let words = rig.lease.trouble().unwrap();
    assert!(words.starts_with("suspended: lease not confirmed for "), "{words}");
    // The store answers again, long after the lease's time: it had no leader meanwhile.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert!(rig.verdict.try_recv().is_err(), "silence ends nothing");
    rig.renewals.send_replace(Instant::now());
    tokio::time::timeout(PATIENCE, rig.lease.permit().granted()).await.unwrap();
    assert!(rig.lease.trouble().is_none());
    rig.suspended().await;
    rig.session.done.cancel();
    assert_eq!(rig.verdict.recv_timeout(PATIENCE).unwrap(), Lost::Done);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_without_its_registration_is_lost_when_writing_is_suspended() {
    let rig = Rig::new().await;
    let delete = Txn { then: vec![Op::delete("me")], ..Txn::default() };
    rig.store.txn(delete).await.unwrap();
    let other = Op::Put { key: "me".to_owned(), value: Vec::new(), lease: None };
    rig.store.txn(Txn { then: vec![other], ..Txn::default() }).await.unwrap();
    assert_eq!(rig.verdict.recv_timeout(PATIENCE).unwrap(), Lost::Unregistered, "it is another's");
    rig.renewals.send_replace(Instant::now());
    assert!(!rig.lease.permit().holds());
    assert!(rig.verdict.recv_timeout(Duration::from_millis(200)).is_err(), "it is told once");
    drop(rig.guard);
}

#[tokio::test(flavor = "multi_thread")]
// behaviour: coordinator-ST-9
async fn the_end_of_the_session_and_the_end_of_the_lease_are_both_heard_of() {
    let rig = Rig::new().await;
    rig.session.done.cancel();
    assert_eq!(rig.verdict.recv_timeout(PATIENCE).unwrap(), Lost::Done);
    assert!(!rig.lease.permit().holds());
    let rig = Rig::new().await;
    rig.store.revoke(rig.session.lease).await.unwrap();
    assert_eq!(rig.verdict.recv_timeout(PATIENCE).unwrap(), Lost::Gone);
    assert!(!rig.lease.permit().holds());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_lasts_as_long_as_its_process_is_never_in_doubt() {
    let store: Arc<dyn Store> = Arc::new(open(&Disk::new()).unwrap());
    let session = store.session(Duration::from_secs(1)).await.unwrap();
    let lease = Arc::new(Lease::new());
    let asked = (Duration::from_secs(1), Instant::now());
    let guard = Guard::start(store, session, asked, Arc::clone(&lease), |_| {}).unwrap();
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert!(lease.permit().holds() && lease.suspended().is_none());
    drop(guard);
}
