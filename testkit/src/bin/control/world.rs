//! Maintainers with many spans, and nodes that answer them as dispatcher managers do.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use heartbeatpb::config::{ChangefeedInfo, ReplicaConfig, UpstreamInfo};
use heartbeatpb::{
    BootstrapTableSpan, ChangefeedId, ComponentState, DispatcherId, HeartBeatRequest,
    MaintainerBootstrapResponse, MaintainerEpoch, MaintainerPostBootstrapResponse, Mode, NodeId,
    ScheduleAction, SchemaId, TableId, TableSpan, TableSpanStatus, Ts, Watermark,
};
use maintainer::SourceTable;
use maintainer::testing::{Request, Rig};
use messaging::codec::{envelope, open};
use messaging::{MaintainerManagerTopic, ToHeartbeatCollector, ToMaintainerManager, ToOrchestrator, Topic};

use crate::clock::{Spent, spent};

/// Where every changefeed starts.
pub(crate) const START: Ts = Ts(1_000);
/// Tables of one schema.
const TABLES: u64 = 1_000;
/// Time between two ticks of a maintainer.
pub(crate) const TICK: Duration = Duration::from_millis(100);

/// Epoch of every maintainer here.
pub(crate) fn epoch() -> Option<MaintainerEpoch> {
    MaintainerEpoch::from_wire(7)
}

/// The `n`th number of a sequence without order: ids are random.
fn scatter(n: u64) -> u64 {
    let z = n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Id of the `n`th dispatcher.
pub(crate) fn dispatcher(n: u64) -> DispatcherId {
    DispatcherId::new(scatter(n), scatter(!n))
}

/// A description of a changefeed.
pub(crate) fn info(name: &str) -> ChangefeedInfo {
    described(name, false)
}

fn described(name: &str, divides: bool) -> ChangefeedInfo {
    let mut config = ReplicaConfig::default();
    config.scheduler.enable_table_across_nodes = divides;
    ChangefeedInfo::new(ChangefeedId::fresh(name), UpstreamInfo::default(), "blackhole://", config, START)
}

/// Names of nodes, in the form of real ones.
pub(crate) fn nodes(count: u64) -> Vec<NodeId> {
    (0..count).map(|n| NodeId::from(format!("{n:08x}-0a53-4f2e-9b63-5d1f6a7e8c90"))).collect()
}

/// The upstream's tables.
pub(crate) fn tables(count: u64) -> Vec<SourceTable> {
    let table = |n: u64| SourceTable {
        id: table_id(n),
        schema_id: schema_id(n),
        schema: format!("schema_{}", n / TABLES),
        name: format!("table_{n:07}"),
        splittable: true,
    };
    (0..count).map(table).collect()
}

fn table_id(n: u64) -> TableId {
    TableId(n.cast_signed() + 1)
}

fn schema_id(n: u64) -> SchemaId {
    SchemaId((n / TABLES).cast_signed() + 1)
}

/// A report of one dispatcher.
pub(crate) fn status(id: DispatcherId, state: ComponentState, checkpoint: Ts) -> TableSpanStatus {
    TableSpanStatus { id, state, checkpoint, event_size_per_second: 1.0, mode: Mode::Default }
}

/// How a changefeed's tables are laid out at the start.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Layout {
    /// Spans.
    pub(crate) spans: u64,
    /// Spans that one table is divided into.
    pub(crate) parts: u64,
    /// Nodes that run them, each as many.
    pub(crate) nodes: u64,
    /// Whether loads are watched and tables divided.
    pub(crate) divides: bool,
}

impl Layout {
    /// Whole tables on three nodes.
    pub(crate) const fn whole(spans: u64) -> Self {
        Self { spans, parts: 1, nodes: 3, divides: false }
    }

    fn span(self, n: u64) -> BootstrapTableSpan {
        let (table, part) = (n / self.parts, n % self.parts);
        let key = |part: u64| part.to_be_bytes().to_vec();
        let mut span = TableSpan::whole(table_id(table));
        if part > 0 {
            span.start = key(part);
        }
        if part + 1 < self.parts {
            span.end = key(part + 1);
        }
        BootstrapTableSpan {
            id: dispatcher(n),
            schema: schema_id(table),
            span,
            state: ComponentState::Working,
            checkpoint: START,
            block: None,
            mode: Mode::Default,
        }
    }

    /// What the `k`th node runs.
    pub(crate) fn on_node(self, k: u64) -> impl Iterator<Item = u64> {
        let nodes = usize::try_from(self.nodes).unwrap_or(1);
        (k..self.spans).step_by(nodes)
    }
}

/// A maintainer and the nodes that it talks to. Its own node is the first one.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) rig: Rig,
    pub(crate) nodes: Vec<NodeId>,
    changefeed: ChangefeedId,
    position: u64,
}

impl World {
    /// A maintainer that knows nothing yet.
    pub(crate) fn new(layout: Layout) -> Self {
        let nodes = self::nodes(layout.nodes);
        let info = described("bench", layout.divides);
        let mut next = u64::MAX / 2;
        let ids = Box::new(move || {
            next += 1;
            dispatcher(next)
        });
        let me = nodes.first().cloned().unwrap_or_else(NodeId::random);
        let rig = Rig::new(me, &info, epoch(), START, ids);
        Self { rig, nodes, changefeed: info.id, position: START.0 }
    }

    /// A maintainer that has taken over running dispatchers, and to whom every node has reported.
    pub(crate) fn settled(layout: Layout) -> Result<Self> {
        let mut world = Self::new(layout);
        world.take_over(layout)?;
        world.advance();
        ensure!(world.rig.progress().checkpoint.0 == world.position, "the checkpoint does not move");
        Ok(world)
    }

    /// From the first request to the end of the bootstrap, with the answers through the codec of the wire. The time
    /// is the maintainer's and the codec's.
    pub(crate) fn take_over(&mut self, layout: Layout) -> Result<Spent> {
        let mut total = Spent::default();
        let tables = tables(layout.spans / layout.parts);
        let alive: BTreeSet<NodeId> = self.nodes.iter().cloned().collect();
        let (time, asked) = spent(|| {
            self.rig.nodes(alive);
            self.rig.pass(Duration::ZERO);
            self.rig.take_requests()
        });
        total += time;
        let asked = asked
            .iter()
            .filter(|request| matches!(request, Request::Orchestrate(_, ToOrchestrator::Bootstrap(_))));
        ensure!(asked.count() == self.nodes.len(), "not every node was asked");
        for (k, node) in (0..).zip(self.nodes.clone()) {
            let answer = MaintainerBootstrapResponse {
                changefeed: self.changefeed.clone(),
                spans: layout.on_node(k).map(|n| layout.span(n)).collect(),
                error: None,
                checkpoint: if k == 0 { START } else { Ts::ZERO },
                redo_checkpoint: Ts::ZERO,
                operators: Vec::new(),
                merges: Vec::new(),
                epoch: epoch(),
            };
            let answer = ToMaintainerManager::BootstrapResponse(answer);
            let (time, answer) = spent(|| self.carry(&node, answer));
            total += time;
            let answer = answer?;
            let (time, ()) = spent(|| self.rig.hear(&node, answer));
            total += time;
        }
        total += spent(|| self.rig.load(tables)).0;
        ensure!(self.rig.status().bootstrap_done, "the bootstrap is not done");
        let spans = u64::try_from(self.rig.spans().len())?;
        ensure!(spans == layout.spans, "{spans} spans were taken over");
        self.answer();
        Ok(total)
    }

    /// A message as it comes out of the wire.
    fn carry(&self, from: &NodeId, message: ToMaintainerManager) -> Result<ToMaintainerManager> {
        let to = self.nodes.first().context("no node")?;
        let envelope = envelope(from, to, MaintainerManagerTopic::NAME, &message);
        drop(message);
        open::<ToMaintainerManager>(&envelope).messages.pop().context("an answer is lost on the wire")
    }

    /// A heartbeat of a node.
    pub(crate) fn heartbeat(&self, statuses: Vec<TableSpanStatus>, complete: bool) -> ToMaintainerManager {
        let at = Ts(self.position);
        ToMaintainerManager::HeartBeat(HeartBeatRequest {
            changefeed: self.changefeed.clone(),
            watermark: Some(Watermark { checkpoint: at, resolved: at, seq: 1, last_synced: at }),
            redo_watermark: None,
            statuses,
            complete,
            error: None,
            trouble: None,
        })
    }

    /// The next position of the upstream.
    pub(crate) fn step(&mut self) -> Ts {
        self.position += 1;
        Ts(self.position)
    }

    /// Every node has flushed one position more.
    pub(crate) fn advance(&mut self) {
        self.step();
        for node in self.nodes.clone() {
            let heartbeat = self.heartbeat(Vec::new(), false);
            self.rig.hear(&node, heartbeat);
        }
    }

    /// The nodes do what they were asked for, and say so. The time is the maintainer's. Says how many dispatchers
    /// were created.
    pub(crate) fn answer(&mut self) -> (Spent, usize) {
        let (mut total, requests) = spent(|| self.rig.take_requests());
        let mut created: BTreeMap<NodeId, Vec<TableSpanStatus>> = BTreeMap::new();
        let mut started = false;
        let at = Ts(self.position);
        for request in requests {
            match request {
                Request::Dispatch(node, ToHeartbeatCollector::Schedule(request)) => {
                    let state = match request.action {
                        ScheduleAction::Create => ComponentState::Working,
                        ScheduleAction::Remove => ComponentState::Stopped,
                    };
                    created.entry(node).or_default().push(status(request.config.dispatcher, state, at));
                }
                Request::Orchestrate(_, ToOrchestrator::PostBootstrap(_)) => started = true,
                Request::Dispatch(..) | Request::Orchestrate(..) => {}
            }
        }
        if started && let Some(me) = self.nodes.first().cloned() {
            let answer = ToMaintainerManager::PostBootstrapResponse(MaintainerPostBootstrapResponse {
                changefeed: self.changefeed.clone(),
                trigger: None,
                error: None,
                epoch: epoch(),
            });
            total += spent(|| self.rig.hear(&me, answer)).0;
        }
        let count = created.values().map(Vec::len).sum();
        for (node, statuses) in created {
            let heartbeat = self.heartbeat(statuses, false);
            total += spent(|| self.rig.hear(&node, heartbeat)).0;
        }
        (total, count)
    }
}
