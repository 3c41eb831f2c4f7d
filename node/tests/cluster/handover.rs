//! What is waited for without starting anything again, and what whoever leads knows of a changefeed that is elsewhere.

use std::time::{Duration, Instant};

use serde_json::json;
use testkit::StopMode;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::common::{Cluster, copying, eventually, until};

/// Longer than the first two pauses of a changefeed that is started again.
const AWAY: Duration = Duration::from_secs(25);
/// A target that is back is written within this time, the backlog included.
const BACK: Duration = Duration::from_secs(14);
/// More than any lag of a cluster that gets on, less than that of one whose lag grows with the time.
const FRESH: f64 = 6.0;

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_was_away_for_long_is_written_soon_after_it_is_back_without_a_new_start() {
    let cluster = Cluster::start(2, "").await;
    cluster.create(0, &copying()).await;
    let load = cluster.load(21, 30).await;
    cluster.caught_up().await;
    let maintainer = cluster.maintainer().await;
    cluster.target.stop(StopMode::Immediate).await.unwrap();
    let began = Instant::now();
    let warned = until("the changefeed warns", async || {
        cluster.feed().await.filter(|feed| feed["state"] == "warning")
    })
    .await;
    assert_eq!(warned["error"]["code"], "CDC:ErrSinkUnavailable", "{}", warned["error"]);
    tokio::time::sleep_until((began + AWAY).into()).await;
    cluster.target.resume().await.unwrap();
    let outage = cluster.outage().await;
    println!("a row waited {outage:?} after the target was back");
    assert!(outage < BACK, "a row waited {outage:?} after the target was back");
    eventually("the changefeed is well", async || {
        cluster.feed().await.is_some_and(|feed| feed["state"] == "normal")
    })
    .await;
    assert_eq!(cluster.maintainer().await, maintainer, "nothing was started again");
    load.stop().await.unwrap();
    cluster.equal().await;
}

/// The value of a changefeed's series that a node shows.
async fn shown(cluster: &Cluster, at: usize, name: &str) -> Option<f64> {
    let mut stream = TcpStream::connect(("127.0.0.1", cluster.nodes[at].api().port())).await.ok()?;
    stream.write_all(b"GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n").await.ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await.ok()?;
    let mine = |line: &&str| {
        line.strip_prefix(name).is_some_and(|rest| rest.starts_with('{')) && line.contains("changefeed=\"f\"")
    };
    text.lines().find(mine)?.rsplit(' ').next()?.trim().parse().ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_leads_shows_the_lag_of_a_changefeed_that_is_maintained_elsewhere() {
    let cluster = Cluster::start(2, "").await;
    cluster.create(0, &copying()).await;
    let load = cluster.load(22, 50).await;
    cluster.caught_up().await;
    let maintainer = cluster.maintainer().await;
    eventually("another node leads", async || {
        let leader = cluster.leader().await;
        if leader == maintainer {
            // Refused while there is no other candidate.
            let _ = cluster.nodes[leader].api().post("/api/v2/owner/resign", &json!({})).await;
        }
        leader != maintainer
    })
    .await;
    let leader = 1 - maintainer;
    assert_eq!(cluster.maintainer().await, maintainer);
    let (mut seen, mut last) = (0, 0.0);
    eventually("the lag is that of the changefeed, and its position moves", async || {
        let lag = shown(&cluster, leader, "ticdc_owner_checkpoint_ts_lag").await;
        let position = shown(&cluster, leader, "ticdc_owner_checkpoint_ts").await;
        if let (Some(lag), Some(position)) = (lag, position)
            && lag < FRESH
            && position > last
        {
            (seen, last) = (seen + 1, position);
        }
        seen >= 3
    })
    .await;
    load.stop().await.unwrap();
}
