//! Nodes that do not reach each other and all reach the store: what one of them had to do is done by others, and nothing is
//! lost or written twice.

use std::time::{Duration, Instant};

use serde_json::json;
use testkit::wire::Place;

use crate::common::{Cluster, copying, eventually, until};

/// How long rows may wait behind a cut. On a machine of its own it is some seconds.
const OUTAGE: Duration = Duration::from_secs(25);

impl Cluster {
    fn cut(&self, one: usize, other: usize) {
        self.wires.as_ref().unwrap().cut(Place::Node(one), Place::Node(other));
    }

    fn mend(&self) {
        self.wires.as_ref().unwrap().mend();
    }

    /// Lets nodes lead until one does that is none of these.
    async fn another_leads(&self, than: &[usize]) -> usize {
        let mut leader = self.leader().await;
        for _ in 0..20 {
            if !than.contains(&leader) {
                break;
            }
            self.nodes[leader].api().post("/api/v2/owner/resign", &json!({})).await.unwrap();
            tokio::time::sleep(Duration::from_secs(2)).await;
            leader = self.leader().await;
        }
        assert!(!than.contains(&leader), "node {leader} leads");
        leader
    }

    /// Three nodes under load, all of them with tables.
    async fn three() -> (Self, testkit::Load) {
        Self::three_with("", 150).await
    }

    /// The same with a configuration and so many changes a second.
    async fn three_with(config: &str, rate: u64) -> (Self, testkit::Load) {
        let cluster = Self::start_wired(3, config).await;
        cluster.create(0, &copying()).await;
        let load = cluster.load(31, rate).await;
        cluster.caught_up().await;
        eventually("every node has tables", async || cluster.dispatchers().await.len() == 3).await;
        (cluster, load)
    }

    /// Whether a node has tables, by what the others say.
    async fn tables_of(&self, at: usize) -> bool {
        let id = self.id(at).await;
        until("tables are on nodes", async || {
            let tables = self.some().api().get("/api/v2/changefeeds/f/tables").await.ok()?;
            Some(tables.to_string().contains(&id))
        })
        .await
    }

    /// Everything arrives although something is cut.
    async fn gets_on(&self, what: &str) {
        let began = Instant::now();
        tokio::time::timeout(OUTAGE, self.caught_up())
            .await
            .unwrap_or_else(|_| panic!("stands still: {what}"));
        println!("{what}: everything had arrived after {:?}", began.elapsed());
    }

    /// Nothing is lost or doubled, and nobody had to be started again.
    async fn is_whole(&mut self, load: testkit::Load) {
        load.stop().await.unwrap();
        self.equal().await;
        for node in &mut self.nodes {
            node.still_running().unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_of_a_node_that_its_maintainer_does_not_reach_go_on_elsewhere() {
    let (mut cluster, load) = Cluster::three().await;
    let maintainer = cluster.maintainer().await;
    let other = (maintainer + 1) % 3;
    let leader = cluster.another_leads(&[maintainer, other]).await;
    assert_eq!(cluster.maintainer().await, maintainer);
    cluster.cut(maintainer, other);
    // The others are asked: their ways are open.
    cluster.asleep = Some(other);
    cluster.gets_on("a node is cut off from the maintainer's").await;
    let log = std::fs::read_to_string(cluster.nodes[maintainer].log_path()).unwrap();
    assert!(log.contains("a member is not reached"), "{log}");
    let log = std::fs::read_to_string(cluster.nodes[leader].log_path()).unwrap();
    assert!(!log.contains("a member is not reached"), "the third hears both\n{log}");
    cluster.mend();
    cluster.asleep = None;
    cluster.is_whole(load).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_was_given_up_gets_tables_again_and_the_changefeed_does_not_start_anew_for_it() {
    // It is trusted after twenty times this.
    let (mut cluster, load) = Cluster::three_with("unreached-after = \"2s\"\n", 30).await;
    let maintainer = cluster.maintainer().await;
    let other = (maintainer + 1) % 3;
    cluster.another_leads(&[maintainer, other]).await;
    let log = cluster.nodes[maintainer].log_path();
    let starts = |log: &str| log.matches("maintainer initialised").count();
    let before = starts(&std::fs::read_to_string(&log).unwrap());
    cluster.cut(maintainer, other);
    cluster.asleep = Some(other);
    eventually("its tables are elsewhere", async || !cluster.tables_of(other).await).await;
    cluster.mend();
    cluster.asleep = None;
    eventually("it is let in again", async || {
        std::fs::read_to_string(&log).unwrap().contains("a node that was fenced is let in again")
    })
    .await;
    eventually("it has tables", async || cluster.dispatchers().await.contains(&other)).await;
    cluster.caught_up().await;
    assert_eq!(cluster.maintainer().await, maintainer);
    assert_eq!(starts(&std::fs::read_to_string(&log).unwrap()), before, "nothing was started again");
    cluster.is_whole(load).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_maintainer_that_the_leader_does_not_reach_is_taken_to_another_node() {
    let (mut cluster, load) = Cluster::three().await;
    let maintainer = cluster.maintainer().await;
    let leader = cluster.another_leads(&[maintainer]).await;
    cluster.cut(maintainer, leader);
    cluster.asleep = Some(maintainer);
    eventually("the maintainer is elsewhere", async || cluster.maintainer().await != maintainer).await;
    cluster.gets_on("the maintainer's node is cut off from the leader").await;
    cluster.mend();
    cluster.asleep = None;
    cluster.is_whole(load).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_reaches_nobody_gives_up_nobody_and_its_work_goes_on_elsewhere() {
    let (mut cluster, load) = Cluster::three().await;
    let maintainer = cluster.maintainer().await;
    cluster.another_leads(&[maintainer]).await;
    for other in (0..3).filter(|other| *other != maintainer) {
        cluster.cut(maintainer, other);
    }
    cluster.asleep = Some(maintainer);
    eventually("the maintainer is elsewhere", async || cluster.maintainer().await != maintainer).await;
    cluster.gets_on("the maintainer's node is cut off from all others").await;
    let log = std::fs::read_to_string(cluster.nodes[maintainer].log_path()).unwrap();
    assert!(!log.contains("a member is not reached"), "it is the one that is cut off\n{log}");
    cluster.mend();
    cluster.asleep = None;
    cluster.is_whole(load).await;
}
