//! Drives one dispatcher manager by hand and measures it: rows through a sink that forgets them, and heartbeats
//! over many dispatchers.
//!
//! `cargo run --release -p dispatcher-manager --example throughput -- [dispatchers] [rows]`

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use dispatcher_manager::testing::{FakeSource, batch, table};
use dispatcher_manager::{
    Bootstrapped, EventSource, HeartbeatCollector, ManagerContext, ManagerHandle, Routes, SinkFactory,
    WritePath,
};
use heartbeatpb::config::{DispatcherManagerConfig, ReplicaConfig};
use heartbeatpb::{
    ChangefeedId, DispatcherConfig, DispatcherId, MaintainerBootstrapRequest, MaintainerEpoch, Mode, NodeId,
    OperatorType, ScheduleAction, ScheduleDispatcherRequest, SchemaId, TableId, TableSpan, Ts, WallTime,
};
use logservice::DispatcherEvent;
use messaging::{
    HeartbeatCollectorTopic, Inbox, MaintainerManagerTopic, MessageCenter, MessagingConfig,
    ToHeartbeatCollector, ToMaintainerManager,
};
use sink::{Sink, SinkOptions};
use tokio_util::sync::CancellationToken;

/// Rows in one batch: what the log typically delivers for one table under load.
const BATCH: u64 = 100;
/// Rows before the first one measured.
const START: u64 = 60;

struct Blackholes;

#[async_trait]
impl SinkFactory for Blackholes {
    async fn create(&self, config: &DispatcherManagerConfig) -> Result<Arc<dyn Sink>, sink::Error> {
        sink::open(&config.sink_uri, &SinkOptions::new(config.changefeed.clone(), "unused")).await
    }
}

fn id(n: u64) -> DispatcherId {
    DispatcherId::new(1, n)
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let dispatchers: u64 = arguments.next().map_or(Ok(10_000), |text| text.parse())?;
    let rows: u64 = arguments.next().map_or(Ok(2_000_000), |text| text.parse())?;

    let center = MessageCenter::new(NodeId::from("example"), MessagingConfig::default());
    let node = center.node().clone();
    let mut maintainer = center.register::<MaintainerManagerTopic>(65_536);
    let source = FakeSource::default();
    let routes = Routes::default();
    tokio::spawn(HeartbeatCollector::new(&center, routes.clone()).run(CancellationToken::new()));
    let context = ManagerContext {
        center: center.clone(),
        source: Arc::new(source.clone()) as Arc<dyn EventSource>,
        sinks: Arc::new(Blackholes),
        routes,
    };

    let feed = ChangefeedId::fresh("example");
    let epoch = MaintainerEpoch::from_wire(1);
    let config = DispatcherManagerConfig {
        changefeed: feed.clone(),
        sink_uri: "blackhole://".into(),
        config: ReplicaConfig::default(),
        start_ts: Ts(START),
        target_ts: Ts::ZERO,
        epoch,
    };
    let request = MaintainerBootstrapRequest {
        changefeed: feed.clone(),
        config: config.to_bytes(),
        start_ts: Ts(START),
        trigger: None,
        is_new: true,
        redo_trigger: None,
        keyspace_id: 0,
        epoch,
    };
    let manager = ManagerHandle::create(context, WritePath::default(), config, &node, &request).await?;
    if !matches!(manager.bootstrap(node.clone(), request, true).await, Bootstrapped::Answer(_)) {
        return Err("the manager did not answer".into());
    }

    let begun = Instant::now();
    for n in 1..=dispatchers {
        let request = ToHeartbeatCollector::Schedule(ScheduleDispatcherRequest {
            changefeed: feed.clone(),
            config: DispatcherConfig {
                span: TableSpan::whole(TableId(i64::try_from(n)?)),
                start_ts: Ts(START),
                dispatcher: id(n),
                schema: SchemaId(1),
                mode: Mode::Default,
                skip_dml_at_start: false,
            },
            action: ScheduleAction::Create,
            operator: OperatorType::Add,
            epoch,
        });
        while center.send::<HeartbeatCollectorTopic>(&node, request.clone()).is_err() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        if n % 1000 == 0 {
            while source.subscription(id(n)).is_none() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
    }
    for n in 1..=dispatchers {
        while source.subscription(id(n)).is_none() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        deliver(&source, &feed, n, DispatcherEvent::Begin(Some(table(1, 1)))).await;
        deliver(&source, &feed, n, resolved(START)).await;
    }
    println!("{dispatchers} dispatchers created in {:?}", begun.elapsed());

    let batches: Vec<_> = (0..rows.div_ceil(BATCH))
        .map(|n| batch(&(1..=BATCH).map(|row| START + n * BATCH + row).collect::<Vec<_>>()))
        .collect();
    let begun = Instant::now();
    let mut last = START;
    for (n, batch) in (0u64..).zip(batches) {
        last = batch.last_commit_ts().map_or(last, |ts| ts.0);
        deliver(&source, &feed, 1 + n % dispatchers, DispatcherEvent::Rows(batch)).await;
    }
    for n in 1..=dispatchers {
        deliver(&source, &feed, n, resolved(last)).await;
    }
    until_checkpoint(&mut maintainer, Ts(last)).await?;
    let millis = u64::try_from(begun.elapsed().as_millis())?.max(1);
    println!("{rows} rows until their checkpoint was reported: {millis} ms, {} rows/s", rows * 1000 / millis);
    println!("{:?}", manager.inspect().await);
    manager.shut_down().await;
    Ok(())
}

fn resolved(ts: u64) -> DispatcherEvent {
    DispatcherEvent::Resolved { ts: Ts(ts), time: WallTime(0) }
}

async fn deliver(source: &FakeSource, feed: &ChangefeedId, n: u64, event: DispatcherEvent) {
    while !source.deliver(feed, id(n), event.clone()) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

async fn until_checkpoint(
    maintainer: &mut Inbox<MaintainerManagerTopic>,
    wanted: Ts,
) -> Result<(), Box<dyn Error>> {
    loop {
        let inbound = maintainer.recv().await.ok_or("the message center is gone")?;
        let ToMaintainerManager::HeartBeat(beat) = inbound.message else { continue };
        if let Some(error) = beat.error {
            return Err(format!("{}: {}", error.code, error.message).into());
        }
        if beat.watermark.is_some_and(|watermark| watermark.checkpoint >= wanted) {
            return Ok(());
        }
    }
}
