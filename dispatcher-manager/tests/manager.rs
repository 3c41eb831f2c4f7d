//! A whole manager between a message center, a source of events filled by hand and a recording sink.

use std::sync::Arc;
use std::time::Duration;

use dispatcher_manager::testing::{FakeSinks, FakeSource, RecordingSink, batch, table};
use dispatcher_manager::{
    Bootstrapped, Closed, Error, HeartbeatCollector, ManagerContext, ManagerHandle, Routes, WritePath,
};
use event::{BlockEvent, DdlEvent, DdlKind};
use heartbeatpb::config::{DispatcherManagerConfig, ReplicaConfig};
use heartbeatpb::{
    BarrierKey, BlockAction, BlockStage, ChangefeedId, CheckpointTsMessage, ComponentState, DispatcherConfig,
    DispatcherId, DispatcherStatus, HeartBeatRequest, HeartBeatResponse, InfluencedDispatchers,
    InfluencedTables, MaintainerBootstrapRequest, MaintainerEpoch, MaintainerPostBootstrapRequest, Mode,
    NodeId, OperatorType, ScheduleAction, ScheduleDispatcherRequest, SchemaId, TableId, TableSpan, Ts,
    WallTime,
};
use logservice::DispatcherEvent;
use messaging::{
    HeartbeatCollectorTopic, Inbox, MaintainerManagerTopic, MessageCenter, MessagingConfig,
    ToHeartbeatCollector, ToMaintainerManager,
};
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, DropGuard};

/// Longest wait for anything; the clock of these tests runs as fast as nothing happens.
const DEADLINE: Duration = Duration::from_secs(120);

struct Bench {
    center: MessageCenter,
    context: ManagerContext,
    source: FakeSource,
    sinks: Arc<FakeSinks>,
    maintainer: Inbox<MaintainerManagerTopic>,
    feed: ChangefeedId,
    write_path: WritePath,
    _collector: DropGuard,
}

fn id(n: u64) -> DispatcherId {
    DispatcherId::new(7, n)
}

fn epoch(n: u64) -> Option<MaintainerEpoch> {
    MaintainerEpoch::from_wire(n)
}

fn config(n: u64, table: i64) -> DispatcherConfig {
    DispatcherConfig {
        span: TableSpan::whole(TableId(table)),
        start_ts: Ts(60),
        dispatcher: id(n),
        schema: SchemaId(1),
        mode: Mode::Default,
        skip_dml_at_start: false,
    }
}

fn ddl(commit: u64) -> DdlEvent {
    DdlEvent {
        schema_id: SchemaId(1),
        table_id: TableId(1),
        schema: "public".into(),
        table: "t1".into(),
        query: "DROP EXTENSION x".into(),
        blocked: Some(InfluencedTables::All),
        ..DdlEvent::new(DdlKind::Other, Ts(commit))
    }
}

impl Bench {
    fn new() -> Self {
        let center = MessageCenter::new(NodeId::from("n1"), MessagingConfig::default());
        let source = FakeSource::default();
        let sinks = Arc::new(FakeSinks::default());
        let routes = Routes::default();
        let collector = HeartbeatCollector::new(&center, routes.clone());
        let stop = CancellationToken::new();
        tokio::spawn(collector.run(stop.clone()));
        let maintainer = center.register::<MaintainerManagerTopic>(65_536);
        let context = ManagerContext {
            center: center.clone(),
            source: Arc::new(source.clone()),
            sinks: Arc::clone(&sinks) as Arc<dyn dispatcher_manager::SinkFactory>,
            routes,
        };
        Self {
            center,
            context,
            source,
            sinks,
            maintainer,
            feed: ChangefeedId::fresh("test"),
            write_path: WritePath::default(),
            _collector: stop.drop_guard(),
        }
    }

    fn sink(&self) -> &RecordingSink {
        &self.sinks.sink
    }

    fn node(&self) -> NodeId {
        self.center.node().clone()
    }

    fn config(&self) -> DispatcherManagerConfig {
        DispatcherManagerConfig {
            changefeed: self.feed.clone(),
            sink_uri: "blackhole://".into(),
            config: ReplicaConfig::default(),
            start_ts: Ts(50),
            target_ts: Ts::ZERO,
            epoch: epoch(1),
        }
    }

    fn request(&self, e: u64) -> MaintainerBootstrapRequest {
        MaintainerBootstrapRequest {
            changefeed: self.feed.clone(),
            config: self.config().to_bytes(),
            start_ts: Ts(50),
            trigger: Some(id(1)),
            is_new: false,
            redo_trigger: None,
            keyspace_id: 0,
            epoch: epoch(e),
        }
    }

    async fn create(&self) -> Result<ManagerHandle, Error> {
        let request = self.request(1);
        let (context, write_path) = (self.context.clone(), self.write_path.clone());
        ManagerHandle::create(context, write_path, self.config(), &self.node(), &request).await
    }

    /// A manager with a started table trigger.
    async fn started(&self) -> ManagerHandle {
        let manager = self.create().await.expect("the sink opens");
        let Bootstrapped::Answer(answer) = manager.bootstrap(self.node(), self.request(1), true).await else {
            panic!("the trigger is created");
        };
        assert_eq!((answer.checkpoint, answer.epoch), (Ts(50), epoch(1)));
        let request = MaintainerPostBootstrapRequest {
            changefeed: self.feed.clone(),
            trigger: id(1),
            schemas: Vec::new(),
            redo_schemas: Vec::new(),
            epoch: epoch(1),
        };
        let answer = manager.post_bootstrap(self.node(), request).await.expect("allowed");
        assert_eq!((answer.trigger, answer.error, answer.epoch), (Some(id(1)), None, epoch(1)));
        manager
    }

    fn tell(&self, message: ToHeartbeatCollector) {
        self.center.send::<HeartbeatCollectorTopic>(&self.node(), message).expect("the own node is known");
    }

    fn schedule(&self, action: ScheduleAction, n: u64, e: u64) {
        self.tell(ToHeartbeatCollector::Schedule(ScheduleDispatcherRequest {
            changefeed: self.feed.clone(),
            config: config(n, 1),
            action,
            operator: OperatorType::Add,
            epoch: epoch(e),
        }));
    }

    fn respond(&self, status: DispatcherStatus) {
        self.tell(ToHeartbeatCollector::HeartBeatResponse(HeartBeatResponse {
            changefeed: self.feed.clone(),
            mode: Mode::Default,
            statuses: vec![status],
            epoch: epoch(1),
        }));
    }

    /// The first message to the maintainer that `pick` recognises.
    async fn hear<T>(&mut self, pick: impl Fn(ToMaintainerManager) -> Option<T>) -> T {
        timeout(DEADLINE, async {
            loop {
                let inbound = self.maintainer.recv().await.expect("the inbox is ours");
                if let Some(found) = pick(inbound.message) {
                    return found;
                }
            }
        })
        .await
        .expect("the maintainer hears it in time")
    }

    async fn hear_state(&mut self, n: u64, state: ComponentState) -> Ts {
        self.hear(|message| {
            let beat = heartbeat(message)?;
            beat.statuses.iter().find(|s| s.id == id(n) && s.state == state).map(|s| s.checkpoint)
        })
        .await
    }

    async fn hear_checkpoint(&mut self, checkpoint: u64) {
        self.hear(|message| {
            heartbeat(message)?
                .watermark
                .filter(|watermark| watermark.checkpoint == Ts(checkpoint))
                .map(|_| ())
        })
        .await;
    }

    async fn hear_block(&mut self, n: u64, stage: BlockStage) -> BarrierKey {
        self.hear(|message| {
            let ToMaintainerManager::BlockStatus(request) = message else { return None };
            let found = request.statuses.iter().find(|s| s.id == id(n) && s.state.stage == stage);
            found.map(|status| status.state.key)
        })
        .await
    }

    async fn subscribed(&self, n: u64) {
        timeout(DEADLINE, async {
            while self.source.subscription(id(n)).is_none() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await
        .expect("it subscribes");
    }

    fn deliver(&self, n: u64, event: DispatcherEvent) {
        assert!(self.source.deliver(&self.feed, id(n), event));
    }

    async fn saw(&self, entry: &str) {
        let saw = timeout(DEADLINE, self.sink().saw(entry)).await;
        assert!(saw.is_ok(), "the sink is not asked to {entry:?}, only {:?}", self.sink().history());
    }

    /// A dispatcher that has seen its first event.
    async fn working(&mut self, n: u64) {
        self.schedule(ScheduleAction::Create, n, 1);
        self.subscribed(n).await;
        self.deliver(n, DispatcherEvent::Begin(Some(table(1, 1))));
        self.deliver(n, resolved(60));
        self.hear_state(n, ComponentState::Working).await;
    }
}

fn heartbeat(message: ToMaintainerManager) -> Option<HeartBeatRequest> {
    if let ToMaintainerManager::HeartBeat(beat) = message { Some(beat) } else { None }
}

fn resolved(ts: u64) -> DispatcherEvent {
    DispatcherEvent::Resolved { ts: Ts(ts), time: WallTime(0) }
}

async fn closed(manager: &ManagerHandle, from: &NodeId) {
    let done = timeout(DEADLINE, async {
        while manager.close(from.clone(), epoch(1), false).await != Closed::Done {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    assert!(done.await.is_ok(), "it closes");
}

#[tokio::test(start_paused = true)]
async fn rows_reach_the_sink_and_the_checkpoint_reaches_the_owner() {
    let mut x = Bench::new();
    let manager = x.started().await;
    x.working(2).await;
    x.deliver(1, resolved(200));
    x.sink().hold_flushes();
    x.deliver(2, DispatcherEvent::Rows(batch(&[100, 101])));
    x.deliver(2, resolved(150));
    x.saw("write 2 2 rows until 101").await;
    x.hear_checkpoint(99).await;
    let view = manager.inspect().await.expect("alive");
    assert_eq!(view.dispatchers, 2);
    assert_eq!(view.slowest, Some((id(2), Ts(99), "the downstream to flush 1 batches".into())));
    x.sink().release_flushes();
    x.hear_checkpoint(150).await;
    let slot = x.source.subscription(id(2)).expect("subscribed").checkpoint;
    assert_eq!(slot.get(), Ts(150));
    assert_eq!(x.sink().history()[..3], ["open 1@50", "open 2@60", "table 2 t1"]);
}

#[tokio::test(start_paused = true)]
async fn a_barrier_goes_from_waiting_to_done() {
    let mut x = Bench::new();
    let _manager = x.started().await;
    x.working(2).await;
    x.deliver(2, DispatcherEvent::Rows(batch(&[100])));
    x.deliver(2, DispatcherEvent::Block(BlockEvent::Ddl(Arc::new(ddl(110)))));
    x.deliver(2, DispatcherEvent::Rows(batch(&[120])));
    let key = x.hear_block(2, BlockStage::Waiting).await;
    assert_eq!(key, BarrierKey { commit_ts: Ts(110), is_sync_point: false });
    assert_eq!(x.hear_block(2, BlockStage::Waiting).await, key, "repeated until it is acknowledged");
    let influenced = Some(InfluencedDispatchers::Normal(vec![id(2)]));
    let ack = DispatcherStatus { influenced, ack: Some(key), ignored: None, action: None };
    x.respond(DispatcherStatus { action: Some((BlockAction::Write, key)), ..ack });
    assert_eq!(x.hear_block(2, BlockStage::Done).await, key);
    x.saw("write 2 1 rows until 120").await;
    let history = x.sink().history();
    let at = |entry: &str| history.iter().position(|e| e == entry).expect("it happened");
    assert!(at("write 2 1 rows until 100") < at("flush 2"));
    assert!(at("flush 2") < at("execute 110"));
    assert!(at("executed 110") < at("write 2 1 rows until 120"));
    assert_eq!(history.iter().filter(|e| *e == "flush 2").count(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_removed_dispatcher_says_its_last_word_when_its_rows_are_flushed() {
    let mut x = Bench::new();
    let _manager = x.started().await;
    x.working(2).await;
    x.sink().hold_flushes();
    x.deliver(2, DispatcherEvent::Rows(batch(&[100])));
    x.saw("write 2 1 rows until 100").await;
    x.schedule(ScheduleAction::Remove, 2, 1);
    x.hear_checkpoint(50).await;
    assert!(x.source.subscription(id(2)).is_none());
    x.sink().release_flushes();
    assert_eq!(x.hear_state(2, ComponentState::Stopped).await, Ts(99));
    x.saw("close 2").await;
    x.schedule(ScheduleAction::Remove, 2, 1);
    assert_eq!(x.hear_state(2, ComponentState::Stopped).await, Ts::ZERO);
}

// behaviour: dispatcher-50
#[tokio::test(start_paused = true)]
async fn a_request_of_another_epoch_does_nothing() {
    let mut x = Bench::new();
    let manager = x.started().await;
    x.schedule(ScheduleAction::Create, 2, 9);
    x.schedule(ScheduleAction::Create, 3, 0);
    x.working(4).await;
    assert_eq!(manager.inspect().await.expect("alive").dispatchers, 2);
    assert!(!x.sink().history().iter().any(|entry| entry.starts_with("open 2")));
}

#[tokio::test(start_paused = true)]
async fn persisted_checkpoints_reach_the_sink() {
    let x = Bench::new();
    let _manager = x.started().await;
    let message = CheckpointTsMessage { changefeed: x.feed.clone(), checkpoint: Ts(55) };
    x.tell(ToHeartbeatCollector::CheckpointTs(message));
    x.saw("checkpoint 55").await;
}

#[tokio::test(start_paused = true)]
async fn an_error_of_the_sink_is_repeated_to_the_owner_who_decides() {
    let mut x = Bench::new();
    let manager = x.started().await;
    x.sink().break_down();
    for _ in 0..3 {
        let error = x
            .hear(|message| {
                let beat = heartbeat(message)?;
                beat.error.map(|error| (error, beat.watermark))
            })
            .await;
        assert_eq!(error.0.code, "CDC:ErrSinkUnavailable");
        assert_eq!((error.0.node.as_str(), error.1), ("n1", None));
    }
    assert!(!manager.is_closed());
    closed(&manager, &x.node()).await;
}

// behaviour: dispatcher-40
#[tokio::test(start_paused = true)]
async fn a_close_ends_everything_and_a_removal_forgets_the_changefeed() {
    let x = Bench::new();
    let manager = x.started().await;
    assert_eq!(manager.close(x.node(), None, true).await, Closed::NotAllowed);
    assert!(x.sink().is_running());
    closed(&manager, &x.node()).await;
    assert!(manager.is_closed() && !x.sink().is_running() && !x.source.is_open(&x.feed));
    assert!(!x.sink().history().contains(&"forget".to_owned()));
    assert_eq!(manager.close(x.node(), epoch(1), true).await, Closed::Done);
    x.saw("forget").await;
    let after = manager.bootstrap(x.node(), x.request(2), false).await;
    assert!(matches!(after, Bootstrapped::Closed));
}

#[tokio::test(start_paused = true)]
async fn forgetting_is_tried_again() {
    let x = Bench::new();
    let manager = x.started().await;
    x.sink().fail_forget(true);
    assert_eq!(manager.close(x.node(), epoch(1), true).await, Closed::NotYet);
    drop(manager);
    let tries = || x.sink().history().iter().filter(|entry| *entry == "forget").count();
    let tried = timeout(DEADLINE, async {
        while tries() < 3 {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    assert!(tried.await.is_ok(), "the task works on although nobody holds it");
}

// behaviour: dispatcher-41
#[tokio::test(start_paused = true)]
async fn a_fence_does_not_wait_for_a_slow_sink() {
    let x = Bench::new();
    let manager = x.started().await;
    x.sink().end_when_asked(false);
    manager.local_fence();
    assert_eq!(manager.close(x.node(), epoch(1), false).await, Closed::NotYet);
    assert!(matches!(manager.bootstrap(x.node(), x.request(2), false).await, Bootstrapped::Silent));
    closed(&manager, &x.node()).await;
}

// behaviour: dispatcher-42
#[tokio::test(start_paused = true)]
async fn a_fence_does_not_wait_for_a_blocked_write() {
    let mut x = Bench::new();
    let manager = x.started().await;
    x.working(2).await;
    x.sink().execute_block_events(false);
    let alone = DdlEvent { blocked: None, ..ddl(110) };
    x.deliver(2, DispatcherEvent::Block(BlockEvent::Ddl(Arc::new(alone))));
    x.saw("execute 110").await;
    manager.local_fence();
    closed(&manager, &x.node()).await;
    x.sink().execute_block_events(true);
    assert!(!x.sink().history().contains(&"executed 110".to_owned()));
}

// behaviour: dispatcher-44
#[tokio::test(start_paused = true)]
async fn nothing_is_written_after_a_fence() {
    let mut x = Bench::new();
    let manager = x.started().await;
    x.working(2).await;
    x.deliver(2, DispatcherEvent::Rows(batch(&[100])));
    let message = CheckpointTsMessage { changefeed: x.feed.clone(), checkpoint: Ts(55) };
    x.tell(ToHeartbeatCollector::CheckpointTs(message));
    manager.local_fence();
    closed(&manager, &x.node()).await;
    let history = x.sink().history();
    assert!(!history.iter().any(|entry| entry.starts_with("write") || entry.starts_with("checkpoint")));
}

// behaviour: dispatcher-43
#[tokio::test(start_paused = true)]
async fn a_fence_during_creation_leaves_nothing() {
    let x = Bench::new();
    x.sinks.create(false);
    let creation = x.create();
    tokio::pin!(creation);
    tokio::select! {
        _ = &mut creation => panic!("the sink is not there yet"),
        () = x.sinks.asked(1) => {}
    }
    x.write_path.fence();
    assert!(matches!(creation.await, Err(Error::WritePathClosed)));
    assert!(!x.source.is_open(&x.feed));
}

// behaviour: dispatcher-21
#[tokio::test(start_paused = true)]
async fn a_post_bootstrap_after_a_fence_is_not_answered_and_blocks_nobody() {
    let x = Bench::new();
    let manager = x.started().await;
    manager.local_fence();
    let request = MaintainerPostBootstrapRequest {
        changefeed: x.feed.clone(),
        trigger: id(1),
        schemas: Vec::new(),
        redo_schemas: Vec::new(),
        epoch: epoch(1),
    };
    assert!(manager.post_bootstrap(x.node(), request.clone()).await.is_none());
    assert!(manager.post_bootstrap(x.node(), request).await.is_none());
}

#[tokio::test(start_paused = true)]
async fn a_sink_that_cannot_be_asked_fails_the_creation_of_a_dispatcher_only() {
    let mut x = Bench::new();
    let _manager = x.started().await;
    x.sink().fail_open(true);
    x.schedule(ScheduleAction::Create, 2, 1);
    let code = x.hear(|message| heartbeat(message)?.error.map(|error| error.code)).await;
    assert_eq!(code, "CDC:ErrSinkUnavailable");
    x.sink().fail_open(false);
    x.working(2).await;
}

#[tokio::test(start_paused = true)]
async fn a_manager_that_panics_fails_its_changefeed_and_nothing_else() {
    let mut x = Bench::new();
    let manager = x.started().await;
    x.working(2).await;
    x.sink().panic_on_write();
    x.deliver(2, DispatcherEvent::Rows(batch(&[100])));
    for _ in 0..2 {
        let code = x.hear(|message| heartbeat(message)?.error.map(|error| error.code)).await;
        assert_eq!(code, "CDC:ErrDispatcherFailed");
    }
    assert!(manager.is_closed() && !x.source.is_open(&x.feed));
    x.saw("ended").await;
    assert!(matches!(manager.bootstrap(x.node(), x.request(2), false).await, Bootstrapped::Closed));
    assert_eq!(manager.close(x.node(), epoch(1), true).await, Closed::Done);
}

#[tokio::test(start_paused = true)]
async fn what_the_sink_waits_for_is_told_with_every_heartbeat_until_it_is_over_and_ends_nothing() {
    let mut bench = Bench::new();
    let manager = bench.started().await;
    bench.working(2).await;
    bench.sink().hold_flushes();
    bench.deliver(2, DispatcherEvent::Rows(batch(&[70])));
    bench.sink().set_trouble(Some("nothing answers at the target"));
    let told = bench.hear(|message| heartbeat(message)?.trouble).await;
    assert_eq!((told.code.as_str(), told.node.as_str()), ("CDC:ErrSinkUnavailable", "n1"));
    assert!(told.message.contains("nothing answers"), "{}", told.message);
    for _ in 0..20 {
        let beat = bench.hear(|message| heartbeat(message).filter(|beat| beat.watermark.is_some())).await;
        assert_eq!(beat.trouble.as_ref(), Some(&told), "one trouble is told in one way");
        assert_eq!(beat.error, None);
    }
    bench.sink().set_trouble(None);
    bench.sink().release_flushes();
    bench.deliver(2, resolved(80));
    bench.hear(|message| heartbeat(message).filter(|beat| beat.trouble.is_none())).await;
    bench
        .hear(|message| {
            let mark = heartbeat(message)?.watermark?;
            (mark.last_synced == Ts(70)).then_some(())
        })
        .await;
    assert!(manager.inspect().await.is_some_and(|view| view.error.is_none()));
}
