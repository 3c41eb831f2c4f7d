//! A manager behind the real event store, event service and collector of one node.

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use dispatcher_manager::testing::{FakeSinks, image, table};
use dispatcher_manager::{
    Bootstrapped, EventSource, HeartbeatCollector, ManagerContext, ManagerHandle, Routes, SinkFactory,
    WritePath,
};
use event::RowOp;
use heartbeatpb::config::{DispatcherManagerConfig, ReplicaConfig};
use heartbeatpb::{
    ChangefeedId, DispatcherConfig, DispatcherId, MaintainerBootstrapRequest, MaintainerEpoch,
    MaintainerPostBootstrapRequest, Mode, NodeId, OperatorType, ScheduleAction, ScheduleDispatcherRequest,
    SchemaId, TableId, TableSpan, Ts, WallTime,
};
use logservice::event_store::StoreWriter;
use logservice::{Collector, LogConfig, LogService};
use messaging::{
    HeartbeatCollectorTopic, Inbox, MaintainerManagerTopic, MessageCenter, MessagingConfig,
    ToHeartbeatCollector, ToMaintainerManager,
};
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, DropGuard};

const DEADLINE: Duration = Duration::from_secs(60);
const TABLE: TableId = TableId(1);

struct Bench {
    center: MessageCenter,
    logs: LogService,
    sinks: Arc<FakeSinks>,
    maintainer: Inbox<MaintainerManagerTopic>,
    feed: ChangefeedId,
    manager: ManagerHandle,
    _dir: tempfile::TempDir,
    _stop: DropGuard,
}

fn id(n: u64) -> DispatcherId {
    DispatcherId::new(3, n)
}

impl Bench {
    /// A node with a manager whose trigger and one dispatcher start after 100.
    async fn start() -> (Self, StoreWriter) {
        let center = MessageCenter::new(NodeId::from("n1"), MessagingConfig::default());
        let node = center.node().clone();
        let maintainer = center.register::<MaintainerManagerTopic>(65_536);
        let dir = tempfile::tempdir().expect("a directory");
        let config = LogConfig { dir: dir.path().into(), memory_bytes: 8 << 20, disk_bytes: 1 << 30 };
        let logs = LogService::new(center.clone(), config);
        let stop = CancellationToken::new();
        let (service, token) = (logs.clone(), stop.clone());
        tokio::spawn(async move { service.run(token).await });
        let (collector, events) = Collector::new(center.clone());
        tokio::spawn(collector.run(stop.clone()));
        let routes = Routes::default();
        tokio::spawn(HeartbeatCollector::new(&center, routes.clone()).run(stop.clone()));

        let feed = ChangefeedId::fresh("test");
        let mut writer = logs.open(&feed, Ts(100)).expect("the store opens");
        writer.register_table(table(1, 1));
        let sinks = Arc::new(FakeSinks::default());
        let context = ManagerContext {
            center: center.clone(),
            source: Arc::new(events) as Arc<dyn EventSource>,
            sinks: Arc::clone(&sinks) as Arc<dyn SinkFactory>,
            routes,
        };
        let epoch = MaintainerEpoch::from_wire(1);
        let config = DispatcherManagerConfig {
            changefeed: feed.clone(),
            sink_uri: "blackhole://".into(),
            config: ReplicaConfig::default(),
            start_ts: Ts(100),
            target_ts: Ts::ZERO,
            epoch,
        };
        let request = MaintainerBootstrapRequest {
            changefeed: feed.clone(),
            config: config.to_bytes(),
            start_ts: Ts(100),
            trigger: Some(id(1)),
            is_new: true,
            redo_trigger: None,
            keyspace_id: 0,
            epoch,
        };
        let manager = ManagerHandle::create(context, WritePath::default(), config, &node, &request)
            .await
            .expect("the sink opens");
        let answer = manager.bootstrap(node.clone(), request, true).await;
        assert!(matches!(answer, Bootstrapped::Answer(_)));
        let request = MaintainerPostBootstrapRequest {
            changefeed: feed.clone(),
            trigger: id(1),
            schemas: Vec::new(),
            redo_schemas: Vec::new(),
            epoch,
        };
        manager.post_bootstrap(node.clone(), request).await.expect("allowed");
        let bench =
            Self { center, logs, sinks, maintainer, feed, manager, _dir: dir, _stop: stop.drop_guard() };
        bench.create(2);
        (bench, writer)
    }

    fn create(&self, n: u64) {
        let request = ScheduleDispatcherRequest {
            changefeed: self.feed.clone(),
            config: DispatcherConfig {
                span: TableSpan::whole(TABLE),
                start_ts: Ts(100),
                dispatcher: id(n),
                schema: SchemaId(1),
                mode: Mode::Default,
                skip_dml_at_start: false,
            },
            action: ScheduleAction::Create,
            operator: OperatorType::Add,
            epoch: MaintainerEpoch::from_wire(1),
        };
        let node = self.center.node().clone();
        self.center
            .send::<HeartbeatCollectorTopic>(&node, ToHeartbeatCollector::Schedule(request))
            .expect("the own node is known");
    }

    async fn until_checkpoint(&mut self, wanted: u64) {
        let heard = timeout(DEADLINE, async {
            loop {
                let inbound = self.maintainer.recv().await.expect("the inbox is ours");
                let ToMaintainerManager::HeartBeat(beat) = inbound.message else { continue };
                assert_eq!(beat.error, None);
                if beat.watermark.is_some_and(|w| w.checkpoint >= Ts(wanted) && w.checkpoint < Ts::MAX) {
                    return;
                }
            }
        });
        if heard.await.is_err() {
            panic!("no checkpoint {wanted}: {:?}", self.manager.inspect().await);
        }
    }

    fn rows_written(&self) -> u64 {
        let history = self.sinks.sink.history();
        let counts = history.iter().filter_map(|entry| entry.strip_prefix("write 2 ")?.split(' ').next());
        counts.map(|count| count.parse::<u64>().expect("a number")).sum()
    }
}

async fn transaction(writer: &mut StoreWriter, commit: u64, rows: u64) {
    writer.begin(Ts(commit - 1));
    for row in 0..rows {
        let mut new = |out: &mut BytesMut| image(out, &format!("{commit}-{row}"));
        writer.row(TABLE, RowOp::Insert, None, Some(&mut new)).expect("registered");
    }
    writer.commit(Ts(commit), WallTime(0)).await.expect("there is room");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_row_of_the_log_reaches_the_sink_once_and_the_checkpoint_follows() {
    let (mut x, mut writer) = Bench::start().await;
    for n in 0..200 {
        transaction(&mut writer, 110 + n * 2, 50).await;
        writer.publish(Ts(110 + n * 2), WallTime(0));
    }
    x.until_checkpoint(508).await;
    assert_eq!(x.rows_written(), 200 * 50);
    assert!(x.logs.resolved(&x.feed).is_some_and(|(ts, _)| ts == Ts(508)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sink_that_stands_still_holds_the_checkpoint_and_loses_nothing() {
    let (mut x, mut writer) = Bench::start().await;
    x.sinks.sink.hold_flushes();
    transaction(&mut writer, 110, 10).await;
    transaction(&mut writer, 120, 10).await;
    writer.publish(Ts(130), WallTime(0));
    x.until_checkpoint(109).await;
    assert!(x.manager.inspect().await.expect("alive").watermark.checkpoint < Ts(110));
    x.sinks.sink.release_flushes();
    x.until_checkpoint(130).await;
    assert_eq!(x.rows_written(), 20);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_is_opened_again_goes_on_at_the_checkpoint() {
    let (mut x, mut writer) = Bench::start().await;
    transaction(&mut writer, 110, 10).await;
    writer.publish(Ts(120), WallTime(0));
    x.until_checkpoint(120).await;
    drop(writer);
    let mut writer = x.logs.open(&x.feed, Ts(105)).expect("the store opens again");
    writer.register_table(table(1, 1));
    transaction(&mut writer, 110, 10).await;
    transaction(&mut writer, 130, 10).await;
    writer.publish(Ts(140), WallTime(0));
    x.until_checkpoint(140).await;
    assert_eq!(x.rows_written(), 20, "what was resolved before is not written again");
}
