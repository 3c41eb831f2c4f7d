//! What only etcd can show: who is let in, which members are asked, what is said when nobody answers.

use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use coordinator::backend::etcd::{EtcdConfig, EtcdCredentials, EtcdStore, EtcdTls, connect};
use coordinator::backend::{Op, Store, StoreError, Txn};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use testkit::Etcd;

use super::bindings::{put, until, value};

/// Whether the store asks these members and no others.
fn asks(store: &EtcdStore, endpoints: &[String]) -> bool {
    let shown = format!("{store:?}");
    let count = shown.matches("http://").count();
    count == endpoints.len() && endpoints.iter().all(|endpoint| shown.contains(endpoint))
}

#[tokio::test(flavor = "multi_thread")]
async fn members_are_learnt_from_one_of_them_and_changes_are_followed() {
    let mut etcd = Etcd::builder().members(3).start().await.unwrap();
    let store = connect(EtcdConfig::new([etcd.endpoint(0)])).await.unwrap();
    until(|| async { asks(&store, &etcd.endpoints()) }).await;
    store.txn(put("k", "1")).await.unwrap();
    // The only one that was named is not needed any more.
    etcd.kill(0).unwrap();
    assert_eq!(value(&store, "k").await.unwrap(), "1");
    etcd.resume(0).unwrap();
    etcd.ready().await.unwrap();

    let added = etcd.add_member().await.unwrap();
    until(|| async { asks(&store, &etcd.endpoints()) }).await;
    let mut left = etcd.endpoints();
    etcd.remove_member(added).await.unwrap();
    left.remove(added);
    until(|| async { asks(&store, &left) }).await;
    assert_eq!(value(&store, "k").await.unwrap(), "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn members_of_different_clusters_are_not_one_store() {
    let (one, two) = (Etcd::start().await.unwrap(), Etcd::start().await.unwrap());
    let both = EtcdConfig::new([one.endpoint(0), two.endpoint(0)]);
    let error = connect(both).await.unwrap_err();
    assert!(matches!(error, StoreError::Misconfigured(_)), "{error:?}");
    assert!(error.to_string().contains("another") || error.to_string().contains("not to"), "{error}");
    assert!(error.to_string().contains("correct the list of endpoints"), "{error}");
    let a = connect(EtcdConfig::new(one.endpoints())).await.unwrap().identity().await.unwrap();
    let b = connect(EtcdConfig::new(two.endpoints())).await.unwrap().identity().await.unwrap();
    assert!(a != b && a != 0 && b != 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_to_talk_to_is_an_error_with_the_address_and_what_to_do() {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let started = Instant::now();
    let error = connect(EtcdConfig::new([closed.to_string()])).await.unwrap_err();
    assert!(error.is_retryable() && started.elapsed() < Duration::from_secs(10), "{error:?}");
    let text = error.to_string();
    assert!(text.contains(&format!("http://{closed}")) && text.contains("check that etcd runs"), "{text}");

    // Somebody who accepts connections and never says anything.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap();
    let started = Instant::now();
    let error = connect(EtcdConfig::new([address.to_string()])).await.unwrap_err();
    assert!(error.is_retryable() && started.elapsed() < Duration::from_secs(15), "{error:?}");
    assert!(error.to_string().contains(&format!("http://{address}")), "{error}");
}

fn user(name: &str, password: &str) -> Option<EtcdCredentials> {
    Some(EtcdCredentials { user: name.to_owned(), password: password.to_owned() })
}

#[tokio::test(flavor = "multi_thread")]
async fn users_are_let_in_with_their_password_and_only_to_their_keys() {
    let mut etcd = Etcd::start().await.unwrap();
    for command in [
        "user add root:boss",
        "user grant-role root root",
        "role add cdc",
        "role grant-permission cdc readwrite --prefix=true /mine",
        "user add cdc:s3cret",
        "user grant-role cdc cdc",
        "auth enable",
    ] {
        etcd.ctl(&command.split(' ').collect::<Vec<_>>()).unwrap();
    }
    let config = |credentials| EtcdConfig {
        credentials,
        prefix: "/mine".to_owned(),
        call_limit: Duration::from_secs(5),
        ..EtcdConfig::new(etcd.endpoints())
    };
    let store = connect(config(user("cdc", "s3cret"))).await.unwrap();
    store.txn(put("k", "1")).await.unwrap();
    let session = store.session(Duration::from_secs(10)).await.unwrap();
    store.campaign("owner", session.lease, "n1").await.unwrap();
    let mut watch = store.watch("k", 1).await.unwrap();
    assert_eq!(watch.next().await.unwrap().len(), 1);

    let refused = |error: StoreError, advice: &str| {
        assert!(matches!(error, StoreError::Refused(_)), "{error:?}");
        let text = error.to_string();
        assert!(text.contains("http://127.0.0.1:") && text.contains(advice), "{text}");
        assert!(!text.contains("s3cret") && !text.contains("wrong"), "{text}");
    };
    refused(connect(config(user("cdc", "wrong"))).await.unwrap_err(), "check the user and the password");
    // Without a name etcd lists its members, but gives no key.
    match connect(config(None)).await {
        Ok(nobody) => refused(nobody.get("k").await.unwrap_err(), "check the user and the password"),
        Err(error) => refused(error, "check the user and the password"),
    }
    let elsewhere = EtcdConfig { prefix: "/else".to_owned(), ..config(user("cdc", "s3cret")) };
    let elsewhere = connect(elsewhere).await.unwrap();
    refused(elsewhere.txn(put("k", "1")).await.unwrap_err(), "permission");
    refused(elsewhere.scan("").await.unwrap_err(), "permission");
    refused(elsewhere.watch("k", 1).await.unwrap().next().await.unwrap_err(), "permission");

    // The server forgets everybody's token when it starts anew; we introduce ourselves again.
    etcd.kill(0).unwrap();
    etcd.resume(0).unwrap();
    etcd.ready().await.unwrap();
    until(|| async { store.get("k").await.is_ok() }).await;
    store.txn(put("k", "2")).await.unwrap();
    store.keep_alive(session.lease).await.unwrap();
    assert_eq!(super::faults::collect(&mut *watch, 1).await, ["k=2"]);
    assert!(!session.done.is_cancelled());
}

/// An authority and what it signed.
struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self { issuer: CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap() }
    }

    fn pem(&self) -> String {
        self.issuer.pem()
    }

    /// A certificate for a name, and its key.
    fn sign(&self, name: &str) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let certificate =
            CertificateParams::new(vec![name.to_owned()]).unwrap().signed_by(&key, &self.issuer).unwrap();
        (certificate.pem(), key.serialize_pem())
    }
}

struct Files(tempfile::TempDir);

impl Files {
    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn both_sides_prove_who_they_are_and_certificates_can_be_renewed() {
    let (servers, clients, strangers) = (Authority::new(), Authority::new(), Authority::new());
    let (certificate, key) = servers.sign("127.0.0.1");
    let mut etcd = Etcd::builder().tls(&certificate, &key, Some(&clients.pem())).start().await.unwrap();
    let files = Files(tempfile::tempdir().unwrap());
    let (own, own_key) = clients.sign("node");
    let tls = |ca: &str, own: &str, own_key: &str| EtcdTls {
        ca: files.write(&format!("ca-{}.pem", ca.len()), ca),
        identity: Some((files.write("own.pem", own), files.write("own.key", own_key))),
    };
    let config = |tls| EtcdConfig {
        tls: Some(tls),
        call_limit: Duration::from_secs(5),
        ..EtcdConfig::new(etcd.endpoints())
    };
    let trusted = tls(&servers.pem(), &own, &own_key);
    let ca_file = trusted.ca.clone();
    let store = connect(config(trusted)).await.unwrap();
    store.txn(put("k", "1")).await.unwrap();
    let session = store.session(Duration::from_secs(60)).await.unwrap();

    let other_ca = EtcdTls {
        ca: files.write("stranger.pem", &strangers.pem()),
        identity: Some((files.0.path().join("own.pem"), files.0.path().join("own.key"))),
    };
    let error = connect(config(other_ca)).await.unwrap_err().to_string();
    assert!(error.contains("https://127.0.0.1:") && error.contains("security.ca-path"), "{error}");
    let nobody = EtcdTls { ca: ca_file.clone(), identity: None };
    assert!(connect(config(nobody)).await.is_err(), "the server wants a certificate");
    let missing = EtcdTls { ca: PathBuf::from("/nowhere/ca.pem"), identity: None };
    let error = connect(config(missing)).await.unwrap_err().to_string();
    assert!(error.contains("/nowhere/ca.pem"), "{error}");
    let damaged = EtcdTls { ca: files.write("damaged.pem", "not a certificate"), identity: None };
    assert!(connect(config(damaged)).await.is_err());

    // A new authority for the server: its files and ours are replaced, nothing is configured anew.
    let renewed = Authority::new();
    let (certificate, key) = renewed.sign("127.0.0.1");
    etcd.kill(0).unwrap();
    std::fs::write(etcd.dir().join("server.crt"), certificate).unwrap();
    std::fs::write(etcd.dir().join("server.key"), key).unwrap();
    std::fs::write(&ca_file, renewed.pem()).unwrap();
    etcd.resume(0).unwrap();
    until(|| async { store.get("k").await.is_ok() }).await;
    assert_eq!(value(&store, "k").await.unwrap(), "1");
    assert!(!session.done.is_cancelled());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefix_keeps_two_stores_in_one_etcd_apart() {
    let etcd = Etcd::start().await.unwrap();
    let open =
        |prefix: &str| connect(EtcdConfig { prefix: prefix.to_owned(), ..EtcdConfig::new(etcd.endpoints()) });
    let (one, two) = (open("/one").await.unwrap(), open("/two").await.unwrap());
    let mut watch = two.watch("", 1).await.unwrap();
    one.txn(put("/tidb/cdc/k", "1")).await.unwrap();
    two.txn(put("/tidb/cdc/k", "2")).await.unwrap();
    assert_eq!(value(&one, "/tidb/cdc/k").await.unwrap(), "1");
    assert_eq!(super::faults::collect(&mut *watch, 1).await, ["/tidb/cdc/k=2"]);
    let session = one.session(Duration::from_secs(10)).await.unwrap();
    one.campaign("owner", session.lease, "n").await.unwrap();
    assert!(two.leader("owner").await.unwrap().is_none());
    let raw = etcd.ctl(&["get", "--prefix", "", "--keys-only"]).unwrap();
    let owner = format!("/oneowner/{:x}", session.lease.0);
    for key in ["/one/tidb/cdc/k", "/two/tidb/cdc/k", owner.as_str()] {
        assert!(raw.lines().any(|line| line == key), "{raw}");
    }
    // Keys that are not text belong to somebody else.
    let everything = open("").await.unwrap();
    assert!(everything.scan("").await.unwrap().found.len() >= 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_let_go_of_lets_its_leases_end_and_its_watches_too() {
    let etcd = Etcd::start().await.unwrap();
    let store = Arc::new(connect(EtcdConfig::new(etcd.endpoints())).await.unwrap());
    let session = store.session(Duration::from_secs(2)).await.unwrap();
    let leased = Op::Put { key: "k".to_owned(), value: vec![], lease: Some(session.lease) };
    store.txn(Txn { then: vec![leased], ..Txn::default() }).await.unwrap();
    let mut watch = store.watch("", 1).await.unwrap();
    watch.next().await.unwrap();
    drop(store);
    assert!(watch.next().await.is_err());
    let other = connect(EtcdConfig::new(etcd.endpoints())).await.unwrap();
    until(|| async { value(&other, "k").await.is_none() }).await;
}
