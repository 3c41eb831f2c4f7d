//! Runs the maintainers of one node against an upstream of three tables and a node that obeys, and prints what they
//! say to each other: from the start of a changefeed to its end.
//!
//! `cargo run -p maintainer --example follow`

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::sync::Arc;

use async_trait::async_trait;
use heartbeatpb::config::{ChangefeedInfo, ReplicaConfig, UpstreamInfo};
use heartbeatpb::{
    AddMaintainerRequest, ChangefeedId, ComponentState, CoordinatorBootstrapRequest, DispatcherId,
    HeartBeatRequest, MaintainerBootstrapResponse, MaintainerCloseResponse, MaintainerEpoch,
    MaintainerPostBootstrapResponse, Mode, NodeId, RemoveMaintainerRequest, RunningError, ScheduleAction,
    SchemaId, TableId, TableSpanStatus, Ts, Watermark,
};
use maintainer::{LivenessCell, MaintainerManager, ManagerConfig, SourceTable, Upstream};
use messaging::{
    CoordinatorTopic, HeartbeatCollectorTopic, Inbox, MaintainerManagerTopic, MaintainerTopic, MessageCenter,
    MessagingConfig, OrchestratorTopic, ToCoordinator, ToHeartbeatCollector, ToMaintainer,
    ToMaintainerManager, ToOrchestrator,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// An upstream that has three tables and nothing to read.
struct Tables;

#[async_trait]
impl Upstream for Tables {
    async fn start(
        &self,
        info: &ChangefeedInfo,
        _: Option<MaintainerEpoch>,
        checkpoint: Ts,
    ) -> Result<Vec<SourceTable>, RunningError> {
        println!("upstream:    the reader of {} starts at {checkpoint}", info.id.name);
        let table = |n: i64| SourceTable {
            id: TableId(n),
            schema_id: SchemaId(1),
            schema: "shop".to_owned(),
            name: format!("t{n}"),
            splittable: true,
        };
        Ok((1..=3).map(table).collect())
    }

    fn confirm(&self, _: &ChangefeedId, _: Option<MaintainerEpoch>, _: Ts) {}

    async fn stop(&self, changefeed: &ChangefeedId, _: Option<MaintainerEpoch>) {
        println!("upstream:    the reader of {} stops", changefeed.name);
    }

    fn error(&self, _: &ChangefeedId, _: Option<MaintainerEpoch>) -> Option<RunningError> {
        None
    }

    fn lag_seconds(&self, _: &ChangefeedId, _: Ts) -> Option<f64> {
        None
    }
}

/// A node whose dispatchers work at once and are 100 further on with every report.
struct Dispatchers {
    center: MessageCenter,
    running: BTreeMap<DispatcherId, Ts>,
    seq: u64,
}

impl Dispatchers {
    fn tell(&self, message: ToMaintainerManager) {
        // A full inbox is a lost message; whoever waits for it asks again.
        let _ = self.center.send::<MaintainerManagerTopic>(self.center.node(), message);
    }

    fn report(&self, changefeed: &ChangefeedId) {
        let checkpoint = self.running.values().copied().min().unwrap_or(Ts::MAX);
        let status = |(id, checkpoint): (&DispatcherId, &Ts)| TableSpanStatus {
            id: *id,
            state: ComponentState::Working,
            checkpoint: *checkpoint,
            event_size_per_second: 0.0,
            mode: Mode::Default,
        };
        self.tell(ToMaintainerManager::HeartBeat(HeartBeatRequest {
            changefeed: changefeed.clone(),
            watermark: Some(Watermark {
                checkpoint,
                resolved: checkpoint,
                seq: self.seq,
                last_synced: checkpoint,
            }),
            redo_watermark: None,
            statuses: self.running.iter().map(status).collect(),
            complete: false,
            error: None,
            trouble: None,
        }));
    }

    fn advance(&mut self) {
        self.running.values_mut().for_each(|ts| ts.0 += 100);
    }

    fn on_orchestrator(&mut self, message: ToOrchestrator) {
        match message {
            ToOrchestrator::Bootstrap(request) => {
                println!("node:        asked what runs: nothing, and the table trigger from now on");
                self.running.extend(request.trigger.map(|trigger| (trigger, request.start_ts)));
                self.tell(ToMaintainerManager::BootstrapResponse(MaintainerBootstrapResponse {
                    changefeed: request.changefeed,
                    spans: Vec::new(),
                    error: None,
                    checkpoint: request.start_ts,
                    redo_checkpoint: Ts::ZERO,
                    operators: Vec::new(),
                    merges: Vec::new(),
                    epoch: request.epoch,
                }));
            }
            ToOrchestrator::PostBootstrap(request) => {
                self.tell(ToMaintainerManager::PostBootstrapResponse(MaintainerPostBootstrapResponse {
                    changefeed: request.changefeed,
                    trigger: Some(request.trigger),
                    error: None,
                    epoch: request.epoch,
                }));
            }
            ToOrchestrator::Close(request) => {
                println!("node:        closes its dispatchers");
                self.running.clear();
                let (changefeed, epoch) = (request.changefeed, request.epoch);
                let response = MaintainerCloseResponse { changefeed, success: true, epoch };
                let message = ToMaintainer::CloseResponse(response);
                let _ = self.center.send::<MaintainerTopic>(self.center.node(), message);
            }
        }
    }

    fn on_collector(&mut self, message: ToHeartbeatCollector) {
        let ToHeartbeatCollector::Schedule(request) = message else { return };
        let (id, start) = (request.config.dispatcher, request.config.start_ts);
        match request.action {
            ScheduleAction::Create => {
                println!(
                    "node:        creates a dispatcher for table {} at {start}",
                    request.config.span.table
                );
                self.seq += 1;
                self.running.entry(id).or_insert(start);
            }
            ScheduleAction::Remove => drop(self.running.remove(&id)),
        }
        self.report(&request.changefeed);
    }
}

async fn obey(
    mut node: Dispatchers,
    changefeed: ChangefeedId,
    mut orchestrator: Inbox<OrchestratorTopic>,
    mut collector: Inbox<HeartbeatCollectorTopic>,
) {
    let mut tick = tokio::time::interval(std::time::Duration::from_millis(100));
    loop {
        tokio::select! {
            Some(inbound) = orchestrator.recv() => node.on_orchestrator(inbound.message),
            Some(inbound) = collector.recv() => node.on_collector(inbound.message),
            _ = tick.tick() => {
                // The table trigger and three tables.
                if node.running.len() == 4 {
                    node.advance();
                    node.report(&changefeed);
                }
            }
            else => return,
        }
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let center = MessageCenter::new(NodeId::from("n1"), MessagingConfig::default());
    let me = center.node().clone();
    let mut coordinator = center.register::<CoordinatorTopic>(1024);
    let (orchestrator, collector) = (center.register(1024), center.register(1024));
    let (_nodes, nodes) = watch::channel(BTreeSet::from([me.clone()]));
    let config = ManagerConfig { node_epoch: 1, liveness: Arc::new(LivenessCell::default()), nodes };
    let manager = MaintainerManager::new(center.clone(), Arc::new(Tables) as Arc<dyn Upstream>, config);
    let shutdown = CancellationToken::new();
    let running = tokio::spawn(manager.run(shutdown.clone()));

    let id = ChangefeedId::fresh("orders");
    let node = Dispatchers { center: center.clone(), running: BTreeMap::new(), seq: 0 };
    tokio::spawn(obey(node, id.clone(), orchestrator, collector));
    let command = |message| center.send::<MaintainerManagerTopic>(&me, message);
    command(ToMaintainerManager::CoordinatorBootstrap(CoordinatorBootstrapRequest { version: 1 }))?;
    let (upstream, config) = (UpstreamInfo::default(), ReplicaConfig::default());
    let info = ChangefeedInfo::new(id.clone(), upstream, "blackhole://", config, Ts(100));
    let epoch = MaintainerEpoch::from_wire(1);
    command(ToMaintainerManager::AddMaintainer(AddMaintainerRequest {
        changefeed: id.clone(),
        config: info.to_bytes(),
        checkpoint: Ts(100),
        is_new: true,
        keyspace_id: 0,
        epoch,
    }))?;

    let (mut shown, mut removing) = (Ts::ZERO, false);
    while let Some(inbound) = coordinator.recv().await {
        let ToCoordinator::MaintainerHeartbeat(statuses) = inbound.message else { continue };
        for status in statuses {
            if status.checkpoint > shown {
                shown = status.checkpoint;
                println!("coordinator: hears {:?}, checkpoint {shown}", status.state);
            }
            if status.state == ComponentState::Stopped {
                println!("coordinator: hears that it has stopped");
                shutdown.cancel();
                return Ok(running.await?);
            }
        }
        if shown > Ts(300) && !removing {
            removing = true;
            println!("coordinator: removes the changefeed");
            command(ToMaintainerManager::RemoveMaintainer(RemoveMaintainerRequest {
                changefeed: id.clone(),
                cascade: true,
                removed: true,
                keyspace_id: 0,
                epoch,
            }))?;
        }
    }
    Err("the message center has closed".into())
}
