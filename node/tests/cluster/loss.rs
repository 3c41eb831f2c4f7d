//! The loss of a node: whatever it had to do is done by the others, and no row is lost or written twice.

use std::time::{Duration, Instant};

use crate::common::{Cluster, copying, eventually};

/// How long the load goes on before and after something happens.
const WHILE: Duration = Duration::from_secs(3);
/// How long rows may wait after the loss of a node. On a machine of its own it is less than six seconds.
const OUTAGE: Duration = Duration::from_secs(15);

/// A cluster with a changefeed under load, one of whose nodes is killed.
async fn survives(seed: u64, victim: impl AsyncFn(&Cluster) -> usize) {
    let mut cluster = Cluster::start(3, "").await;
    cluster.create(1, &copying()).await;
    let load = cluster.load(seed, 200).await;
    cluster.caught_up().await;
    assert!(cluster.dispatchers().await.len() > 1, "tables are on several nodes");
    tokio::time::sleep(WHILE).await;
    let victim = victim(&cluster).await;
    cluster.nodes[victim].kill().unwrap();
    let outage = cluster.outage().await;
    println!("rows waited {outage:?} after a kill");
    assert!(outage < OUTAGE, "rows waited {outage:?}");
    tokio::time::sleep(WHILE).await;
    load.stop().await.unwrap();
    cluster.equal().await;
    for at in 0..3 {
        if at != victim {
            cluster.sees(at, 2).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
// behaviour: coordinator-ST-22
async fn the_node_that_reads_the_log_is_killed() {
    survives(1, async |cluster| cluster.maintainer().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_node_that_leads_is_killed() {
    survives(2, async |cluster| cluster.leader().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_only_writes_is_killed() {
    survives(3, async |cluster| {
        let (leader, maintainer) = (cluster.leader().await, cluster.maintainer().await);
        let mut others =
            cluster.dispatchers().await.into_iter().filter(|at| ![leader, maintainer].contains(at));
        others.next_back().unwrap_or(maintainer)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_node_is_killed_in_turn_and_comes_back() {
    let mut cluster = Cluster::start(3, "").await;
    cluster.create(0, &copying()).await;
    let load = cluster.load(4, 150).await;
    cluster.caught_up().await;
    for at in 0..3 {
        cluster.nodes[at].kill().unwrap();
        let outage = cluster.outage().await;
        println!("rows waited {outage:?} after the kill of node {at}");
        cluster.nodes[at].start().await.unwrap();
        cluster.sees(at, 3).await;
    }
    load.stop().await.unwrap();
    cluster.equal().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_reader_is_killed_while_it_copies_tables() {
    let mut cluster = Cluster::start(3, "").await;
    let big = "CREATE TABLE shop.big (id bigint PRIMARY KEY, v text); \
        INSERT INTO shop.big SELECT i, repeat(md5(i::text), 20) FROM generate_series(1, 60000) i";
    cluster.source.sql("postgres", big).await.unwrap();
    cluster.create(2, &copying()).await;
    let load = cluster.load(5, 50).await;
    let target = cluster.target.client(crate::common::TARGET).await.unwrap();
    eventually("rows arrive", async || {
        target.query_one("SELECT count(*) FROM shop.big", &[]).await.is_ok_and(|row| row.get::<_, i64>(0) > 0)
    })
    .await;
    let reader = cluster.maintainer().await;
    cluster.nodes[reader].kill().unwrap();
    let done: i64 = target.query_one("SELECT count(*) FROM shop.big", &[]).await.unwrap().get(0);
    println!("{done} rows of the largest table were there");
    load.stop().await.unwrap();
    cluster.equal().await;
    cluster.same("shop.big").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_paused_wakes_without_its_lease_and_writes_nothing() {
    let mut cluster = Cluster::start(3, "").await;
    cluster.create(0, &copying()).await;
    let load = cluster.load(6, 150).await;
    cluster.caught_up().await;
    let sleeper = cluster.maintainer().await;
    let began = Instant::now();
    cluster.nodes[sleeper].signal("STOP").unwrap();
    cluster.asleep = Some(sleeper);
    let outage = cluster.outage().await;
    println!("rows waited {outage:?} after a node fell asleep");
    tokio::time::sleep(Duration::from_secs(10).saturating_sub(began.elapsed())).await;
    cluster.nodes[sleeper].signal("CONT").unwrap();
    eventually("the process ends", async || cluster.nodes[sleeper].still_running().is_err()).await;
    let log = std::fs::read_to_string(cluster.nodes[sleeper].log_path()).unwrap();
    assert!(log.contains("CDC:ErrCaptureSuicide"), "{log}");
    load.stop().await.unwrap();
    cluster.equal().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_waits_for_a_leader_which_stands_still_is_answered_when_that_is_out() {
    let mut cluster = Cluster::start(3, "").await;
    let leader = cluster.leader().await;
    let other = (leader + 1) % 3;
    eventually("another node knows who leads", async || {
        cluster.nodes[other].api().get("/api/v2/changefeeds").await.is_ok()
    })
    .await;
    cluster.nodes[leader].signal("STOP").unwrap();
    cluster.asleep = Some(leader);
    let began = Instant::now();
    let refusal = cluster.nodes[other].api().get("/api/v2/changefeeds").await.unwrap_err();
    assert!(format!("{refusal:#}").contains("503"), "{refusal:#}");
    assert!(began.elapsed() < OUTAGE, "{:?}", began.elapsed());
    eventually("another one answers", async || {
        cluster.nodes[other].api().get("/api/v2/changefeeds").await.is_ok()
    })
    .await;
}
