//! A node with a real manager, and stand-ins for its coordinator, its dispatchers and its upstream.

#![allow(
    clippy::unwrap_used,
    dead_code,
    reason = "shared by several test programs; one that cannot go on has failed"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use heartbeatpb::config::{ChangefeedInfo, ReplicaConfig, UpstreamInfo};
use heartbeatpb::{
    AddMaintainerRequest, BootstrapTableSpan, ChangefeedId, ComponentState, ConfigBytes,
    CoordinatorBootstrapRequest, CoordinatorBootstrapResponse, DispatcherId, HeartBeatRequest,
    MaintainerBootstrapResponse, MaintainerCloseResponse, MaintainerEpoch, MaintainerPostBootstrapResponse,
    MaintainerStatus, Mode, NodeHeartbeat, NodeId, RemoveMaintainerRequest, RunningError, ScheduleAction,
    SchemaId, SetNodeLivenessResponse, TableId, TableSpan, TableSpanStatus, Ts, WallTime, Watermark,
};
use maintainer::{
    DownstreamFence, FenceOutcome, LivenessCell, MaintainerManager, ManagerConfig, NothingToFence,
    PlacementHandle, SourceTable, SplitPoints, Upstream, Whom,
};
use messaging::{
    CoordinatorTopic, HeartbeatCollectorTopic, Inbox, MaintainerManagerTopic, MaintainerTopic, MessageCenter,
    MessagingConfig, OrchestratorTopic, ToCoordinator, ToHeartbeatCollector, ToMaintainer,
    ToMaintainerManager, ToOrchestrator,
};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub(crate) const NODE_EPOCH: u64 = 77;

/// Waits until something holds, without hoping for a time.
pub(crate) async fn within(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(tokio::time::Instant::now() < deadline, "in vain: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// An upstream with so many tables.
#[derive(Default)]
pub(crate) struct FakeUpstream {
    pub(crate) tables: Mutex<Vec<SourceTable>>,
    pub(crate) started: Mutex<Vec<(Option<u64>, Ts)>>,
    pub(crate) stopped: Mutex<Vec<Option<u64>>>,
    pub(crate) confirmed: AtomicU64,
    /// Below which it was told that nobody begins, under which epoch.
    pub(crate) floors: Mutex<Vec<(Option<u64>, Ts)>>,
    pub(crate) fails: Mutex<Option<RunningError>>,
    /// How long a reader takes to stop.
    pub(crate) slow_stop: Mutex<Duration>,
    /// What keeps the reader from its upstream.
    pub(crate) trouble: Mutex<Option<RunningError>>,
}

fn number(epoch: Option<MaintainerEpoch>) -> Option<u64> {
    epoch.map(MaintainerEpoch::get)
}

#[async_trait]
impl Upstream for FakeUpstream {
    async fn start(
        &self,
        _: &ChangefeedInfo,
        epoch: Option<MaintainerEpoch>,
        checkpoint: Ts,
    ) -> Result<Vec<SourceTable>, RunningError> {
        self.started.lock().push((number(epoch), checkpoint));
        match self.fails.lock().clone() {
            Some(error) => Err(error),
            None => Ok(self.tables.lock().clone()),
        }
    }

    fn confirm(&self, _: &ChangefeedId, _: Option<MaintainerEpoch>, persisted: Ts) {
        self.confirmed.fetch_max(persisted.0, Ordering::Relaxed);
    }

    fn raise_floor(&self, _: &ChangefeedId, epoch: Option<MaintainerEpoch>, floor: Ts) {
        self.floors.lock().push((number(epoch), floor));
    }

    async fn stop(&self, _: &ChangefeedId, epoch: Option<MaintainerEpoch>) {
        let pause = *self.slow_stop.lock();
        tokio::time::sleep(pause).await;
        self.stopped.lock().push(number(epoch));
    }

    fn error(&self, _: &ChangefeedId, _: Option<MaintainerEpoch>) -> Option<RunningError> {
        None
    }

    fn trouble(&self, _: &ChangefeedId, _: Option<MaintainerEpoch>) -> Option<RunningError> {
        self.trouble.lock().clone()
    }

    fn time_of(&self, _: &ChangefeedId, ts: Ts) -> Option<WallTime> {
        Some(WallTime(1_000 + ts.0.cast_signed()))
    }

    async fn split_points(
        &self,
        _: &ChangefeedId,
        _: Option<MaintainerEpoch>,
        span: &TableSpan,
        pieces: usize,
    ) -> Result<SplitPoints, RunningError> {
        assert!(pieces > 0 && (span.is_whole() || pieces == 1), "{span:?} {pieces}");
        let keys = (1..pieces).map(|n| vec![u8::try_from(n).unwrap()]).collect();
        Ok(SplitPoints { keys, rows: None, bytes: None })
    }

    fn lag_seconds(&self, _: &ChangefeedId, _: Ts) -> Option<f64> {
        Some(1.0)
    }
}

/// What a downstream does with a fence.
pub(crate) enum Does {
    Refuse,
    Fail,
    Panic,
    Nothing,
}

/// A downstream that does one thing after the other, and refuses whomever it is asked to in the end.
#[derive(Default)]
pub(crate) struct FakeFence {
    pub(crate) does: Mutex<std::collections::VecDeque<Does>>,
    pub(crate) asked: Mutex<Vec<(Option<u64>, Whom)>>,
}

#[async_trait]
impl DownstreamFence for FakeFence {
    fn applies_to(&self, info: &ChangefeedInfo) -> bool {
        info.sink_uri.starts_with("blackhole")
    }

    async fn fence(
        &self,
        _: &ChangefeedInfo,
        epoch: Option<MaintainerEpoch>,
        _newest: Option<MaintainerEpoch>,
        whom: &Whom,
    ) -> Result<FenceOutcome, RunningError> {
        self.asked.lock().push((number(epoch), whom.clone()));
        let does = self.does.lock().pop_front();
        match does.unwrap_or(Does::Refuse) {
            Does::Refuse => Ok(FenceOutcome::default()),
            Does::Fail => Err(RunningError {
                time: String::new(),
                node: "n1".to_owned(),
                code: "CDC:ErrSinkUnavailable".to_owned(),
                message: "nothing answers".to_owned(),
            }),
            Does::Panic => panic!("the test wants it"),
            Does::Nothing => std::future::pending().await,
        }
    }
}

/// The dispatcher managers of a node, all changefeeds together.
#[derive(Default)]
pub(crate) struct Dispatchers {
    pub(crate) running: BTreeMap<DispatcherId, (SchemaId, TableSpan, Ts)>,
    pub(crate) trigger: Option<DispatcherId>,
    pub(crate) started: bool,
    pub(crate) seq: u64,
    pub(crate) persisted: Ts,
    pub(crate) closes: usize,
    /// Answers to close requests: still closing so many times.
    pub(crate) slow_closes: usize,
    /// Bootstraps that carried the changefeed's newness.
    pub(crate) newness: Vec<bool>,
}

impl Dispatchers {
    fn watermark(&self) -> Watermark {
        let checkpoint = self.running.values().map(|(_, _, ts)| *ts).min().unwrap_or(Ts::MAX);
        Watermark { checkpoint, resolved: checkpoint, seq: self.seq, last_synced: Ts(7) }
    }

    /// Everybody has flushed everything up to `ts`.
    pub(crate) fn advance(&mut self, ts: u64) {
        for (_, _, checkpoint) in self.running.values_mut() {
            *checkpoint = Ts(ts);
        }
    }
}

/// What the coordinator heard.
#[derive(Default)]
pub(crate) struct Heard {
    pub(crate) bootstraps: Vec<CoordinatorBootstrapResponse>,
    pub(crate) statuses: Vec<MaintainerStatus>,
    pub(crate) heartbeats: Vec<NodeHeartbeat>,
    pub(crate) liveness: Vec<SetNodeLivenessResponse>,
}

impl Heard {
    /// The last status of a changefeed.
    pub(crate) fn last(&self, id: &ChangefeedId) -> Option<&MaintainerStatus> {
        self.statuses.iter().rfind(|status| status.changefeed == *id)
    }
}

/// One node and everybody around its manager.
pub(crate) struct World {
    pub(crate) center: MessageCenter,
    pub(crate) upstream: Arc<FakeUpstream>,
    pub(crate) dispatchers: Arc<Mutex<Dispatchers>>,
    pub(crate) heard: Arc<Mutex<Heard>>,
    pub(crate) liveness: Arc<LivenessCell>,
    pub(crate) placements: PlacementHandle,
    pub(crate) nodes: watch::Sender<BTreeSet<NodeId>>,
    /// Those of them that are not reached.
    pub(crate) unreached: watch::Sender<BTreeSet<NodeId>>,
    pub(crate) shutdown: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
    manager: Option<JoinHandle<()>>,
}

impl World {
    /// A node whose upstream has `tables` tables. Its coordinator is on the same node, and not known yet.
    pub(crate) fn new(tables: i64) -> Self {
        Self::with_fence(tables, Arc::new(NothingToFence))
    }

    /// One whose downstream has writers that can be fenced, or says that it has not.
    pub(crate) fn with_fence(tables: i64, fence: Arc<dyn DownstreamFence>) -> Self {
        let center = MessageCenter::new("n1".into(), MessagingConfig::default());
        let upstream = Arc::new(FakeUpstream::default());
        *upstream.tables.lock() = (1..=tables)
            .map(|n| SourceTable {
                id: TableId(n),
                schema_id: SchemaId(1),
                schema: "public".to_owned(),
                name: format!("t{n}"),
                splittable: true,
            })
            .collect();
        let shutdown = CancellationToken::new();
        let (nodes, nodes_view) = watch::channel(BTreeSet::from([NodeId::from("n1")]));
        let liveness = Arc::<LivenessCell>::default();
        let config =
            ManagerConfig { node_epoch: NODE_EPOCH, liveness: Arc::clone(&liveness), nodes: nodes_view };
        let plug: Arc<dyn Upstream> = Arc::clone(&upstream) as Arc<dyn Upstream>;
        let unreached = watch::Sender::new(BTreeSet::new());
        let manager = MaintainerManager::new(center.clone(), plug, config)
            .with_fence(fence)
            .with_unreached(unreached.subscribe());
        let placements = manager.placements();
        let dispatchers = Arc::<Mutex<Dispatchers>>::default();
        let heard = Arc::<Mutex<Heard>>::default();
        let tasks = vec![
            tokio::spawn(orchestrate(
                center.clone(),
                center.register::<OrchestratorTopic>(100_000),
                Arc::clone(&dispatchers),
            )),
            tokio::spawn(dispatch(
                center.clone(),
                center.register::<HeartbeatCollectorTopic>(100_000),
                Arc::clone(&dispatchers),
            )),
            tokio::spawn(coordinate(center.register::<CoordinatorTopic>(100_000), Arc::clone(&heard))),
        ];
        let manager = Some(tokio::spawn(manager.run(shutdown.clone())));
        Self {
            center,
            upstream,
            dispatchers,
            heard,
            liveness,
            placements,
            nodes,
            unreached,
            shutdown,
            tasks,
            manager,
        }
    }

    /// A node that knows its coordinator.
    pub(crate) async fn with_coordinator(tables: i64) -> Self {
        let world = Self::new(tables);
        world.bootstrap(1);
        within("the coordinator is known", || !world.heard.lock().bootstraps.is_empty()).await;
        world
    }

    pub(crate) fn send(&self, message: ToMaintainerManager) {
        self.center.send::<MaintainerManagerTopic>(&"n1".into(), message).unwrap();
    }

    pub(crate) fn bootstrap(&self, version: i64) {
        self.send(ToMaintainerManager::CoordinatorBootstrap(CoordinatorBootstrapRequest { version }));
    }

    pub(crate) fn add_request(id: &ChangefeedId, epoch: u64, checkpoint: u64) -> AddMaintainerRequest {
        let info = ChangefeedInfo::new(
            id.clone(),
            UpstreamInfo::default(),
            "blackhole://",
            ReplicaConfig::default(),
            Ts(100),
        );
        AddMaintainerRequest {
            changefeed: id.clone(),
            config: info.to_bytes(),
            checkpoint: Ts(checkpoint),
            is_new: true,
            keyspace_id: 0,
            epoch: MaintainerEpoch::from_wire(epoch),
        }
    }

    /// A changefeed that may divide tables.
    pub(crate) fn add_across_nodes(&self, id: &ChangefeedId, epoch: u64) {
        let mut config = ReplicaConfig::default();
        config.scheduler.enable_table_across_nodes = true;
        let info = ChangefeedInfo::new(id.clone(), UpstreamInfo::default(), "blackhole://", config, Ts(100));
        let request = AddMaintainerRequest { config: info.to_bytes(), ..Self::add_request(id, epoch, 100) };
        self.send(ToMaintainerManager::AddMaintainer(request));
    }

    pub(crate) fn add(&self, id: &ChangefeedId, epoch: u64) {
        self.send(ToMaintainerManager::AddMaintainer(Self::add_request(id, epoch, 100)));
    }

    pub(crate) fn add_with(&self, id: &ChangefeedId, epoch: u64, config: &[u8], checkpoint: u64) {
        let config = ConfigBytes(config.into());
        let request = AddMaintainerRequest { config, ..Self::add_request(id, epoch, checkpoint) };
        self.send(ToMaintainerManager::AddMaintainer(request));
    }

    pub(crate) fn remove(&self, id: &ChangefeedId, epoch: u64, cascade: bool, removed: bool) {
        self.send(ToMaintainerManager::RemoveMaintainer(RemoveMaintainerRequest {
            changefeed: id.clone(),
            cascade,
            removed,
            keyspace_id: 0,
            epoch: MaintainerEpoch::from_wire(epoch),
        }));
    }

    /// The last status of a changefeed.
    pub(crate) fn status(&self, id: &ChangefeedId) -> Option<MaintainerStatus> {
        self.heard.lock().last(id).cloned()
    }

    pub(crate) fn is_stopped(&self, id: &ChangefeedId) -> bool {
        self.status(id).is_some_and(|status| status.state == ComponentState::Stopped)
    }

    /// Node heartbeats, and liveness answers: what was heard so far.
    pub(crate) fn node_heartbeats(&self) -> usize {
        self.heard.lock().heartbeats.len()
    }

    pub(crate) fn heartbeat(&self, id: &ChangefeedId, statuses: Vec<TableSpanStatus>, complete: bool) {
        let watermark = self.dispatchers.lock().watermark();
        self.send(heartbeat(id, statuses, watermark, complete));
    }

    pub(crate) async fn stop(mut self) {
        self.shutdown.cancel();
        if let Some(manager) = self.manager.take() {
            manager.await.unwrap();
        }
        for task in &self.tasks {
            task.abort();
        }
    }
}

fn heartbeat(
    id: &ChangefeedId,
    statuses: Vec<TableSpanStatus>,
    watermark: Watermark,
    complete: bool,
) -> ToMaintainerManager {
    ToMaintainerManager::HeartBeat(HeartBeatRequest {
        changefeed: id.clone(),
        watermark: Some(watermark),
        redo_watermark: None,
        statuses,
        complete,
        error: None,
        trouble: None,
    })
}

async fn coordinate(mut inbox: Inbox<CoordinatorTopic>, heard: Arc<Mutex<Heard>>) {
    while let Some(inbound) = inbox.recv().await {
        let mut heard = heard.lock();
        match inbound.message {
            ToCoordinator::BootstrapResponse(response) => heard.bootstraps.push(response),
            ToCoordinator::MaintainerHeartbeat(statuses) => heard.statuses.extend(statuses),
            ToCoordinator::NodeHeartbeat(heartbeat) => heard.heartbeats.push(heartbeat),
            ToCoordinator::SetNodeLivenessResponse(response) => heard.liveness.push(response),
        }
    }
}

async fn orchestrate(
    center: MessageCenter,
    mut inbox: Inbox<OrchestratorTopic>,
    dispatchers: Arc<Mutex<Dispatchers>>,
) {
    while let Some(inbound) = inbox.recv().await {
        let to = inbound.from;
        let mut dispatchers = dispatchers.lock();
        match inbound.message {
            ToOrchestrator::Bootstrap(request) => {
                dispatchers.newness.push(request.is_new);
                if dispatchers.trigger.is_none()
                    && let Some(trigger) = request.trigger
                {
                    dispatchers.trigger = Some(trigger);
                    dispatchers.seq += 1;
                    dispatchers.running.insert(trigger, (SchemaId::DDL, TableSpan::ddl(), request.start_ts));
                }
                let trigger = dispatchers.trigger;
                let spans = dispatchers
                    .running
                    .iter()
                    .map(|(id, (schema, span, checkpoint))| BootstrapTableSpan {
                        id: *id,
                        schema: *schema,
                        span: span.clone(),
                        state: ComponentState::Working,
                        checkpoint: *checkpoint,
                        block: None,
                        mode: Mode::Default,
                    })
                    .collect();
                let response = MaintainerBootstrapResponse {
                    changefeed: request.changefeed,
                    spans,
                    error: None,
                    checkpoint: trigger.map_or(Ts::ZERO, |_| request.start_ts),
                    redo_checkpoint: Ts::ZERO,
                    operators: vec![],
                    merges: vec![],
                    epoch: request.epoch,
                };
                let message = ToMaintainerManager::BootstrapResponse(response);
                center.send::<MaintainerManagerTopic>(&to, message).unwrap();
            }
            ToOrchestrator::PostBootstrap(request) => {
                dispatchers.started = true;
                let response = MaintainerPostBootstrapResponse {
                    changefeed: request.changefeed,
                    trigger: Some(request.trigger),
                    error: None,
                    epoch: request.epoch,
                };
                let message = ToMaintainerManager::PostBootstrapResponse(response);
                center.send::<MaintainerManagerTopic>(&to, message).unwrap();
            }
            ToOrchestrator::Close(request) => {
                dispatchers.closes += 1;
                let success = dispatchers.closes > dispatchers.slow_closes;
                if success {
                    dispatchers.running.clear();
                    dispatchers.trigger = None;
                }
                let response =
                    MaintainerCloseResponse { changefeed: request.changefeed, success, epoch: request.epoch };
                center.send::<MaintainerTopic>(&to, ToMaintainer::CloseResponse(response)).unwrap();
            }
        }
    }
}

async fn dispatch(
    center: MessageCenter,
    mut inbox: Inbox<HeartbeatCollectorTopic>,
    dispatchers: Arc<Mutex<Dispatchers>>,
) {
    while let Some(inbound) = inbox.recv().await {
        let to = inbound.from;
        let mut dispatchers = dispatchers.lock();
        match inbound.message {
            ToHeartbeatCollector::Schedule(request) => {
                let config = request.config;
                let id = config.dispatcher;
                let (state, checkpoint) = match request.action {
                    ScheduleAction::Create => {
                        dispatchers.seq += 1;
                        let started = (config.schema, config.span, config.start_ts);
                        dispatchers.running.entry(id).or_insert(started);
                        (ComponentState::Working, config.start_ts)
                    }
                    ScheduleAction::Remove => {
                        let known = dispatchers.running.remove(&id);
                        if dispatchers.trigger == Some(id) {
                            dispatchers.trigger = None;
                        }
                        (ComponentState::Stopped, known.map_or(Ts::ZERO, |(_, _, ts)| ts))
                    }
                };
                let status = TableSpanStatus {
                    id,
                    state,
                    checkpoint,
                    event_size_per_second: 0.0,
                    mode: Mode::Default,
                };
                let message = heartbeat(&request.changefeed, vec![status], dispatchers.watermark(), false);
                // Lost when the maintainers' inbox is full; the request is repeated then.
                let _ = center.send::<MaintainerManagerTopic>(&to, message);
            }
            ToHeartbeatCollector::CheckpointTs(message) => dispatchers.persisted = message.checkpoint,
            ToHeartbeatCollector::HeartBeatResponse(_) | ToHeartbeatCollector::Merge(_) => {}
        }
    }
}
