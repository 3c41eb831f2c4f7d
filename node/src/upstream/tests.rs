//! The hub over a real source.

use std::time::{Duration, Instant};

use heartbeatpb::config::{ReplicaConfig, UpstreamInfo};
use logservice::LogConfig;
use maintainer::Upstream as _;
use messaging::{MessageCenter, MessagingConfig};
use testkit::PgServer;

use super::*;

/// Longer than any step takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A hub, and a changefeed with its place in the source's log.
async fn hub(server: &PgServer, dir: &std::path::Path) -> (UpstreamHub, ChangefeedInfo) {
    let node = heartbeatpb::NodeId::from("n1");
    let center = MessageCenter::new(node.clone(), MessagingConfig::default());
    let config = LogConfig { dir: dir.to_owned(), memory_bytes: 1 << 20, disk_bytes: 1 << 30 };
    let hub = UpstreamHub::new(node, LogService::new(center, config));
    let mut replica = ReplicaConfig::default();
    replica.initial_copy.enabled = false;
    let upstream = UpstreamInfo { uri: server.uri("postgres"), ..UpstreamInfo::default() };
    let id = ChangefeedId::fresh("f");
    let mut info = ChangefeedInfo::new(id, upstream, "blackhole://", replica, Ts(1));
    let spec = feed_spec(&info, None).unwrap();
    let start = hub.open(&spec.upstream_uri).unwrap().create_retention(&spec, None).await.unwrap();
    info.start_ts = start.start_ts;
    (hub, info)
}

async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds().await {
        assert!(Instant::now() < deadline, "in vain: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_that_is_not_known_to_be_stored_is_not_confirmed_to_the_source() {
    let server = PgServer::start().await.unwrap();
    server.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY)").await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (hub, info) = hub(&server, dir.path()).await;
    // Far enough apart that the end of each is remembered.
    let many = |n: u32| format!("INSERT INTO t SELECT generate_series({0}, {0} + 4999)", n * 10_000);
    for n in 0..5 {
        server.sql("postgres", &many(n)).await.unwrap();
    }
    let admin = server.client("postgres").await.unwrap();
    let lsn = async |sql: &str| {
        let row = admin.query_one(&format!("SELECT ({sql} - '0/0')::bigint"), &[]).await.unwrap();
        Ts(u64::try_from(row.get::<_, Option<i64>>(0).unwrap_or_default()).unwrap())
    };
    let slot = "(SELECT confirmed_flush_lsn FROM pg_replication_slots LIMIT 1)";
    let (begins, accepted) = (lsn(slot).await, lsn("pg_current_wal_lsn()").await);
    server.sql("postgres", &many(9)).await.unwrap();
    let end = lsn("pg_current_wal_lsn()").await;

    let epoch = MaintainerEpoch::from_wire(7);
    let tables = hub.start(&info, epoch, accepted).await.unwrap();
    assert_eq!(tables.len(), 1);
    until("the source was told how far the log was received", async || {
        lsn("(SELECT max(write_lsn) FROM pg_stat_replication)").await >= end
    })
    .await;
    assert_eq!(lsn(slot).await, begins, "somebody may have to begin there again");
    hub.confirm(&info.id, MaintainerEpoch::from_wire(6), accepted);
    hub.confirm(&info.id, epoch, begins);
    hub.confirm(&info.id, epoch, accepted);
    until("what is stored is confirmed", async || lsn(slot).await > begins).await;
    assert!(lsn(slot).await <= accepted);
    hub.stop(&info.id, epoch).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_is_starting_is_waited_for_and_a_reader_of_an_older_epoch_does_not_begin() {
    let server = PgServer::start().await.unwrap();
    server.sql("postgres", "CREATE TABLE t (id int PRIMARY KEY)").await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (hub, info) = hub(&server, dir.path()).await;
    server.stop(testkit::StopMode::Fast).await.unwrap();
    let epoch = MaintainerEpoch::from_wire(7);
    let (started, resumed) = tokio::join!(hub.start(&info, epoch, info.start_ts), async {
        // The first attempts are in vain.
        tokio::time::sleep(Duration::from_millis(300)).await;
        server.resume().await
    });
    resumed.unwrap();
    assert_eq!(started.unwrap().len(), 1);
    let late = hub.start(&info, MaintainerEpoch::from_wire(6), info.start_ts).await;
    assert_eq!(late.unwrap_err().code, heartbeatpb::codes::READER_SUPERSEDED);
    assert!(hub.error(&info.id, epoch).is_none());
    hub.stop(&info.id, epoch).await;
}
