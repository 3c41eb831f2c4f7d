//! A manager behind the real event store, event service and collector of one node.

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use dispatcher_manager::testing::{FakeSinks, image, table};
use dispatcher_manager::{
    Bootstrapped, EventSource, HeartbeatCollector, ManagerContext, ManagerHandle, Routes, SinkFactory,
    WritePath,
};
use event::{KeyCodec, RowOp};
use heartbeatpb::config::{DispatcherManagerConfig, ReplicaConfig};
use heartbeatpb::{
    ChangefeedId, ComponentState, DispatcherConfig, DispatcherId, MaintainerBootstrapRequest,
    MaintainerEpoch, MaintainerPostBootstrapRequest, MergeDispatcherRequest, Mode, NodeId, OperatorType,
    ScheduleAction, ScheduleDispatcherRequest, SchemaId, TableId, TableSpan, Ts, WallTime,
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
        let (bench, writer) = Self::without_dispatchers().await;
        bench.create(2, TableSpan::whole(TABLE));
        (bench, writer)
    }

    /// The same with a table in two parts, of dispatchers 2 and 3.
    async fn divided() -> (Self, StoreWriter) {
        let (bench, writer) = Self::without_dispatchers().await;
        let middle = KeyCodec::new(&table(1, 1)).and_then(|keys| keys.encode_values(&["m"])).expect("a key");
        bench.create(2, TableSpan { end: middle.clone(), ..TableSpan::whole(TABLE) });
        bench.create(3, TableSpan { start: middle, ..TableSpan::whole(TABLE) });
        (bench, writer)
    }

    async fn without_dispatchers() -> (Self, StoreWriter) {
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
        (bench, writer)
    }

    fn create(&self, n: u64, span: TableSpan) {
        let request = ScheduleDispatcherRequest {
            changefeed: self.feed.clone(),
            config: DispatcherConfig {
                span,
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
        self.tell(ToHeartbeatCollector::Schedule(request));
    }

    fn merge(&self, sources: &[u64], merged: u64) {
        self.tell(ToHeartbeatCollector::Merge(MergeDispatcherRequest {
            changefeed: self.feed.clone(),
            sources: sources.iter().map(|n| id(*n)).collect(),
            merged: id(merged),
            mode: Mode::Default,
            epoch: MaintainerEpoch::from_wire(1),
        }));
    }

    fn tell(&self, message: ToHeartbeatCollector) {
        let node = self.center.node().clone();
        self.center.send::<HeartbeatCollectorTopic>(&node, message).expect("the own node is known");
    }

    /// Waits until the owner was told a state.
    async fn until_state(&mut self, n: u64, state: ComponentState) -> Ts {
        let heard = timeout(DEADLINE, async {
            loop {
                let inbound = self.maintainer.recv().await.expect("the inbox is ours");
                let ToMaintainerManager::HeartBeat(beat) = inbound.message else { continue };
                if let Some(found) = beat.statuses.iter().find(|s| s.id == id(n) && s.state == state) {
                    return found.checkpoint;
                }
            }
        });
        heard.await.expect("the owner hears it in time")
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
        self.rows_written_by(2)
    }

    fn rows_written_by(&self, n: u64) -> u64 {
        let history = self.sinks.sink.history();
        let prefix = format!("write {n} ");
        let counts = history.iter().filter_map(|entry| entry.strip_prefix(&prefix)?.split(' ').next());
        counts.map(|count| count.parse::<u64>().expect("a number")).sum()
    }
}

/// One row for each part of the table.
async fn pair(writer: &mut StoreWriter, commit: u64) {
    writer.begin(Ts(commit - 1));
    for half in ["a", "z"] {
        let mut new = |out: &mut BytesMut| image(out, &format!("{half}-{commit}"));
        writer.row(TABLE, RowOp::Insert, None, Some(&mut new)).expect("registered");
    }
    writer.commit(Ts(commit), WallTime(0)).await.expect("there is room");
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

// behaviour: dispatcher-31, dispatcher-33
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parts_of_a_table_are_joined_while_rows_come_and_none_is_missing() {
    let (mut x, mut writer) = Bench::divided().await;
    pair(&mut writer, 110).await;
    writer.publish(Ts(110), WallTime(0));
    x.until_state(2, ComponentState::Working).await;
    x.until_state(3, ComponentState::Working).await;
    x.until_checkpoint(110).await;
    x.sinks.sink.hold_flushes();
    for n in 111..400 {
        pair(&mut writer, n).await;
        writer.publish(Ts(n), WallTime(0));
        if n == 200 {
            x.until_checkpoint(110).await;
            x.merge(&[2, 3], 9);
        }
        if n == 300 {
            x.sinks.sink.release_flushes();
        }
    }
    x.until_state(9, ComponentState::Working).await;
    for n in 400..500 {
        pair(&mut writer, n).await;
        writer.publish(Ts(n), WallTime(0));
    }
    x.until_checkpoint(499).await;
    let (left, right, joined) = (x.rows_written_by(2), x.rows_written_by(3), x.rows_written_by(9));
    let history = x.sinks.sink.history();
    let start = history.iter().find_map(|entry| entry.strip_prefix("open 9@")).expect("it was opened");
    let start: u64 = start.parse().expect("a number");
    assert_eq!(joined, 2 * (499 - start), "from {start} on the joined dispatcher has both halves");
    assert!(left.min(right) >= start - 109, "{left} and {right} rows until {start}");
    assert!(left.max(right) < 390, "the parts went on");
    assert!(["close 2", "close 3"].iter().all(|entry| history.iter().any(|seen| seen == entry)));
    let view = x.manager.inspect().await.expect("alive");
    assert_eq!((view.dispatchers, view.error), (2, None), "the trigger and the joined one");
}
