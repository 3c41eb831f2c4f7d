//! A store that does not confirm leases for a while: nobody writes meanwhile, and who still has its lease goes on.

use std::time::{Duration, Instant};

use serde_json::Value;
use testkit::Etcd;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::common::{Cluster, TARGET, copying, eventually};

/// Longer than a node writes without a confirmation (two seconds), shorter than what is left of a lease of three seconds
/// that is renewed twice a second.
const HICCUP: Duration = Duration::from_millis(2200);
/// Several times a lease.
const ABSENCE: Duration = Duration::from_secs(10);
/// How long is looked whether something arrives that must not.
const WHILE: Duration = Duration::from_secs(2);

/// Two nodes that replicate, and what they are called.
async fn two(etcd: testkit::EtcdBuilder) -> (Cluster, Vec<Option<u32>>) {
    let cluster = Cluster::start_with(2, "", etcd).await;
    cluster.create(0, &copying()).await;
    let pids = cluster.pids();
    (cluster, pids)
}

impl Cluster {
    /// The same processes as before, and nothing is lost or doubled.
    async fn went_on(&mut self, pids: &[Option<u32>]) {
        self.equal().await;
        for node in &mut self.nodes {
            node.still_running().unwrap();
        }
        assert_eq!(self.pids(), pids, "nobody was started again");
    }

    /// How often any node has said something in its log.
    fn said(&self, words: &str) -> usize {
        let log = |node: &testkit::Millrace| std::fs::read_to_string(node.log_path()).unwrap_or_default();
        self.nodes.iter().map(|node| log(node).matches(words).count()).sum()
    }

    /// What the first node's metrics say of its lease, in seconds.
    async fn lease_left(&self) -> f64 {
        let mut stream = TcpStream::connect(("127.0.0.1", self.nodes[0].api().port())).await.unwrap();
        let request = "GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let line =
            answer.lines().find_map(|line| line.strip_prefix("ticdc_metastore_lease_remaining_seconds "));
        line.unwrap().parse().unwrap()
    }

    /// A row that is written at the source now does not arrive while it is looked for.
    async fn nothing_arrives(&self) {
        let (source, target) =
            tokio::try_join!(self.source.client("postgres"), self.target.client(TARGET)).unwrap();
        source.batch_execute("INSERT INTO shop.marker VALUES (7)").await.unwrap();
        let until = Instant::now() + WHILE;
        while Instant::now() < until {
            let found = target.query_opt("SELECT 1 FROM shop.marker WHERE id = 7", &[]).await.unwrap();
            assert!(found.is_none(), "written without a lease");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_stops_for_a_moment_suspends_writing_and_ends_nobody() {
    let (mut cluster, pids) = two(Etcd::builder()).await;
    let load = cluster.load(21, 150).await;
    cluster.caught_up().await;
    for _ in 0..3 {
        cluster.etcd.pause(0).unwrap();
        tokio::time::sleep(HICCUP).await;
        cluster.etcd.unpause(0).unwrap();
        let outage = cluster.outage().await;
        println!("rows waited {outage:?} after the store went on");
    }
    load.stop().await.unwrap();
    cluster.went_on(&pids).await;
    let (suspended, resumed) = (cluster.said("writing is suspended"), cluster.said("writing goes on"));
    assert!(suspended > 0 && suspended == resumed, "{suspended} times suspended, {resumed} times resumed");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_election_of_the_stores_leader_ends_nobody_however_long_it_takes() {
    let (mut cluster, pids) = two(Etcd::builder().members(3)).await;
    let load = cluster.load(22, 150).await;
    cluster.caught_up().await;
    for _ in 0..3 {
        let leader = cluster.etcd.leader().await.unwrap();
        let began = Instant::now();
        cluster.etcd.kill(leader).unwrap();
        cluster.etcd.leader().await.unwrap();
        println!("the store has another leader after {:?}", began.elapsed());
        cluster.outage().await;
        println!("rows arrive {:?} after the store's leader was killed", began.elapsed());
        cluster.etcd.resume(leader).unwrap();
        cluster.etcd.ready().await.unwrap();
    }
    load.stop().await.unwrap();
    cluster.went_on(&pids).await;
    let (suspended, resumed) = (cluster.said("writing is suspended"), cluster.said("writing goes on"));
    assert_eq!(suspended, resumed);
    println!("writing was suspended {suspended} times");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_away_for_longer_than_a_lease_is_waited_for() {
    let (mut cluster, pids) = two(Etcd::builder()).await;
    let load = cluster.load(23, 100).await;
    cluster.caught_up().await;
    cluster.etcd.kill(0).unwrap();
    let away = Instant::now();
    let suspended =
        |writing: &Value| writing.as_str().is_some_and(|text| text.starts_with("suspended: lease"));
    cluster.writing("a node says that it does not write", suspended).await;
    assert_eq!(cluster.lease_left().await, 0.0);
    cluster.nothing_arrives().await;
    tokio::time::sleep(ABSENCE.saturating_sub(away.elapsed())).await;
    cluster.etcd.resume(0).unwrap();
    cluster.etcd.ready().await.unwrap();
    let back = Instant::now();
    cluster.outage().await;
    println!("rows arrive {:?} after the store was back", back.elapsed());
    cluster.writing("a node says nothing any more", Value::is_null).await;
    assert!(cluster.lease_left().await > 0.0);
    load.stop().await.unwrap();
    cluster.went_on(&pids).await;
    // Coordinated as before, under the same leadership.
    cluster.some().api().post("/api/v2/changefeeds/f/pause", &serde_json::json!({})).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
// behaviour: coordinator-ST-9
async fn a_node_whose_lease_was_given_up_meanwhile_has_written_nothing_and_ends() {
    let (mut cluster, _) = two(Etcd::builder()).await;
    let load = cluster.load(24, 150).await;
    cluster.caught_up().await;
    // Its clock goes on: when it wakes every lease is over.
    cluster.etcd.pause(0).unwrap();
    tokio::time::sleep(HICCUP).await;
    cluster.nothing_arrives().await;
    cluster.etcd.unpause(0).unwrap();
    load.stop().await.unwrap();
    for node in &mut cluster.nodes {
        eventually("the process ends", async || node.still_running().is_err()).await;
        let log = std::fs::read_to_string(node.log_path()).unwrap();
        assert!(log.contains("CDC:ErrCaptureSuicide"), "{log}");
        node.start().await.unwrap();
    }
    cluster.equal().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_was_stopped_for_a_moment_goes_on_with_its_lease() {
    let (mut cluster, pids) = two(Etcd::builder()).await;
    let load = cluster.load(25, 150).await;
    cluster.caught_up().await;
    for at in 0..2 {
        cluster.nodes[at].signal("STOP").unwrap();
        tokio::time::sleep(HICCUP).await;
        cluster.nodes[at].signal("CONT").unwrap();
        cluster.outage().await;
    }
    load.stop().await.unwrap();
    cluster.went_on(&pids).await;
}
