//! Many changefeeds are created at once: the coordinator's core, and a maintainer's for each.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use coordinator::CoordinatorConfig;
use coordinator::core::{Action, Command, Core, OpId, Write};
use coordinator::meta::Stored;
use heartbeatpb::config::{ChangefeedInfo, ChangefeedStatusDoc};
use heartbeatpb::{
    ChangefeedId, CoordinatorBootstrapResponse, MaintainerBootstrapResponse, MaintainerEpoch,
    MaintainerStatus, NodeId, Ts,
};
use maintainer::testing::{Request, Rig};
use messaging::{ToCoordinator, ToMaintainerManager, ToOrchestrator};

use crate::Extent;
use crate::clock::{float, nanoseconds, spent};
use crate::report::{Cost, Growth, Point, Report, Unit, number};
use crate::world::{START, dispatcher, info, nodes, tables};

/// Tables of each changefeed.
const TABLES: u64 = 10;
/// Most memory during the creation, beside what is held afterwards.
const MOST_PEAK: f64 = 1.3;
/// Rounds of messages until every changefeed must be there.
const ROUNDS: usize = 10_000;

/// Measures the creation.
pub(crate) fn measure(extent: &Extent, report: &mut Report) -> Result<()> {
    let mut times = Vec::new();
    let mut bytes = Vec::new();
    for count in [extent.changefeeds / 10, extent.changefeeds / 3, extent.changefeeds] {
        let mut made = None;
        let counted = allocation_counter::measure(|| {
            made = Some(Cluster::new().and_then(|mut cluster| {
                let (time, result) = spent(|| cluster.create(count));
                result.map(|()| (time, cluster))
            }));
        });
        let (time, cluster) = made.context("nothing was made")??;
        #[expect(clippy::cast_precision_loss, reason = "bytes of a process")]
        let held = counted.bytes_current as f64;
        times.push(Point { at: count, ours: nanoseconds(time.cpu), naive: None });
        bytes.push(Point { at: count, ours: held / float(count), naive: None });
        if count == extent.changefeeds {
            let name =
                format!("most memory during the creation of {count} changefeeds, to what is held afterwards");
            report.limit(name, float(counted.bytes_max) / held, MOST_PEAK, number);
        }
        drop(cluster);
    }
    let cost = |name, unit, points, growth| Cost { name, unit, of: "changefeeds", naive: "", points, growth };
    let time = "creation of changefeeds with 10 tables each";
    report.cost(cost(time, Unit::Nanoseconds, times, Growth::Linear(3.0)));
    report.cost(cost("memory of each of them", Unit::Bytes, bytes, Growth::Flat(1.5)));
    Ok(())
}

/// A coordinator with its store, and the nodes' maintainers.
struct Cluster {
    core: Core,
    now: Instant,
    nodes: Vec<NodeId>,
    disk: BTreeMap<ChangefeedId, Stored>,
    maintainers: BTreeMap<ChangefeedId, (NodeId, Rig)>,
    actions: VecDeque<Action>,
    refused: usize,
}

impl Cluster {
    fn new() -> Result<Self> {
        let nodes = nodes(3);
        let me = nodes.first().cloned().context("no node")?;
        let mut cluster = Self {
            core: Core::new(me, 1, CoordinatorConfig::default()),
            now: Instant::now(),
            nodes,
            disk: BTreeMap::new(),
            maintainers: BTreeMap::new(),
            actions: VecDeque::new(),
            refused: 0,
        };
        let alive = cluster.nodes.iter().cloned().collect();
        let actions = cluster.core.on_nodes(alive, cluster.now);
        cluster.actions.extend(actions);
        let actions = cluster.core.on_loaded(Vec::new(), cluster.now);
        cluster.actions.extend(actions);
        for node in cluster.nodes.clone() {
            let answer = CoordinatorBootstrapResponse {
                statuses: Vec::new(),
                drain_protocol_version: 1,
                drain_target: None,
                drain_epoch: 0,
            };
            let actions =
                cluster.core.on_message(&node, ToCoordinator::BootstrapResponse(answer), cluster.now);
            cluster.actions.extend(actions);
        }
        cluster.perform()?;
        ensure!(cluster.core.is_initialized(), "the coordinator does not start");
        Ok(cluster)
    }

    /// Asks for all of them at once, and lets everybody work until all run.
    fn create(&mut self, count: u64) -> Result<()> {
        for n in 0..count {
            let info = Box::new(info(&format!("feed-{n}")));
            let actions = self.core.on_command(OpId(n), Command::Create { info, candidate: n + 1 }, self.now);
            self.actions.extend(actions);
        }
        for _ in 0..ROUNDS {
            self.perform()?;
            let report = self.reports();
            for (node, statuses) in report {
                let message = ToCoordinator::MaintainerHeartbeat(statuses);
                let actions = self.core.on_message(&node, message, self.now);
                self.actions.extend(actions);
            }
            self.now += Duration::from_millis(500);
            let actions = self.core.on_tick(self.now);
            self.actions.extend(actions);
            let working = |(_, rig): &(NodeId, Rig)| rig.status().bootstrap_done;
            if u64::try_from(self.maintainers.values().filter(|one| working(one)).count())? == count {
                ensure!(self.refused == 0, "{} changefeeds were refused", self.refused);
                return Ok(());
            }
        }
        anyhow::bail!("only {} maintainers were started", self.maintainers.len());
    }

    fn reports(&self) -> BTreeMap<NodeId, Vec<MaintainerStatus>> {
        let mut reports: BTreeMap<NodeId, Vec<MaintainerStatus>> = BTreeMap::new();
        for (node, rig) in self.maintainers.values() {
            reports.entry(node.clone()).or_default().push(rig.status());
        }
        reports
    }

    fn perform(&mut self) -> Result<()> {
        while let Some(action) = self.actions.pop_front() {
            match action {
                Action::Send { to, message: ToMaintainerManager::AddMaintainer(request) } => {
                    let id = &request.changefeed;
                    let (info, _) = ChangefeedInfo::from_json(&request.config.0, &id.keyspace, &id.name)?;
                    self.start(to, &info, request.epoch, request.checkpoint)?;
                }
                Action::Write { id, write } => {
                    let stored = self.write(&id, write)?;
                    let actions = self.core.on_written(&id, Ok(stored), self.now);
                    self.actions.extend(actions);
                }
                Action::SaveCheckpoints(writes) => {
                    let actions = self.core.on_checkpoints_saved(&writes, self.now);
                    self.actions.extend(actions);
                }
                Action::Reply { result, .. } => self.refused += usize::from(result.is_err()),
                Action::Send { .. } | Action::WriteDrain(_) | Action::Count { .. } => {}
            }
        }
        Ok(())
    }

    fn write(&mut self, id: &ChangefeedId, write: Write) -> Result<Option<Stored>> {
        if let Write::Create { info } = &write {
            let status = ChangefeedStatusDoc::at(info.start_ts, info.epoch);
            self.disk.insert(id.clone(), Stored { info: (**info).clone(), status });
        }
        let stored = self.disk.get_mut(id).context("a write to an unknown changefeed")?;
        if let Write::BumpForAdd { .. } = write {
            stored.info.epoch = MaintainerEpoch::next(stored.info.epoch, 0);
        }
        Ok(Some(stored.clone()))
    }

    /// A maintainer takes over on new nodes, which run nothing yet.
    fn start(
        &mut self,
        me: NodeId,
        info: &ChangefeedInfo,
        epoch: Option<MaintainerEpoch>,
        at: Ts,
    ) -> Result<()> {
        if self.maintainers.contains_key(&info.id) {
            return Ok(());
        }
        let mut next = 1_000 * u64::try_from(self.maintainers.len())?;
        let ids = Box::new(move || {
            next += 1;
            dispatcher(next)
        });
        let mut rig = Rig::new(me.clone(), info, epoch, at, ids);
        let alive: BTreeSet<NodeId> = self.nodes.iter().cloned().collect();
        rig.nodes(alive);
        rig.load(tables(TABLES));
        for request in rig.take_requests() {
            if let Request::Orchestrate(node, ToOrchestrator::Bootstrap(request)) = request {
                let answer = MaintainerBootstrapResponse {
                    changefeed: request.changefeed,
                    spans: Vec::new(),
                    error: None,
                    checkpoint: if node == me { START } else { Ts::ZERO },
                    redo_checkpoint: Ts::ZERO,
                    operators: Vec::new(),
                    merges: Vec::new(),
                    epoch,
                };
                rig.hear(&node, ToMaintainerManager::BootstrapResponse(answer));
            }
        }
        self.maintainers.insert(info.id.clone(), (me, rig));
        Ok(())
    }
}
