//! The decisions of one maintainer: events and time in, effects out.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use heartbeatpb::config::{ChangefeedInfo, DispatcherManagerConfig};
use heartbeatpb::{
    BlockStatusRequest, BootstrapTableSpan, ChangefeedId, ComponentState, ConfigBytes, DispatcherConfig,
    DispatcherId, DispatcherStatus, HeartBeatRequest, HeartBeatResponse, InfluencedDispatchers,
    InfluencedTables, MaintainerBootstrapRequest, MaintainerBootstrapResponse, MaintainerCloseRequest,
    MaintainerCloseResponse, MaintainerEpoch, MaintainerPostBootstrapRequest,
    MaintainerPostBootstrapResponse, MaintainerStatus, Mode, NodeId, OperatorType, RunningError,
    ScheduleAction, ScheduleDispatcherRequest, SchemaId, SchemaTables, TableId, TableName, TableSpan,
    TableSpanStatus, Ts,
};
use messaging::{ToHeartbeatCollector, ToOrchestrator};
use operator::span::{AddSpan, RemoveSpan};
use operator::{Action, Controller};
use replica::{Bootstrapper, Group, Heard, SpanReplica, SpanSet};
use scheduler::{Loads, basic};

use crate::checkpoint::CheckpointFold;
use crate::upstream::SourceTable;

/// Spans that may be on their way at once: enough to keep every node busy, few enough to stay fair.
const ADD_BUDGET: usize = 10_000;
/// A post-bootstrap request is repeated no more often; it may carry a million tables.
const POST_BOOTSTRAP_RESEND: Duration = Duration::from_secs(1);
/// A close request is repeated after this time.
const CLOSE_RESEND: Duration = Duration::from_millis(500);

/// What the owner of a core has to do.
#[derive(Clone, PartialEq, Debug)]
pub(crate) enum Effect {
    /// Send to a node's orchestrator.
    Orchestrate(NodeId, ToOrchestrator),
    /// Send to a node's dispatchers.
    Dispatch(NodeId, ToHeartbeatCollector),
    /// The status changed: tell the coordinator soon.
    Changed,
    /// Everything is closed: stop the reader, then the maintainer.
    Closed,
}

enum Phase {
    /// The reader is being started and the tables listed.
    Loading,
    /// Nodes are being asked what they run.
    Bootstrapping,
    /// The table trigger is being started; spans are scheduled already.
    PostBootstrapping { sent: Option<Instant> },
    /// Everything runs.
    Working,
    /// Dispatcher managers are being closed.
    Closing { removed: bool, waiting: BTreeMap<NodeId, Option<Instant>> },
    /// The end.
    Stopped,
}

/// One maintainer's state.
pub(crate) struct Core {
    me: NodeId,
    id: ChangefeedId,
    epoch: Option<MaintainerEpoch>,
    config: ConfigBytes,
    names_wanted: bool,
    is_new: bool,
    phase: Phase,
    trigger: DispatcherId,
    spans: SpanSet,
    controller: Controller,
    fold: CheckpointFold,
    nodes: BTreeSet<NodeId>,
    bootstrapper: Bootstrapper<MaintainerBootstrapResponse>,
    tables: Arc<[SourceTable]>,
    errors: BTreeMap<NodeId, RunningError>,
    start: Ts,
}

impl Core {
    /// A maintainer that is about to start at `checkpoint`.
    pub(crate) fn new(
        me: NodeId,
        info: &ChangefeedInfo,
        epoch: Option<MaintainerEpoch>,
        checkpoint: Ts,
        is_new: bool,
    ) -> Self {
        let mut config = DispatcherManagerConfig::of(info);
        config.epoch = epoch;
        let names_wanted = !info.sink_uri.starts_with("mysql") && !info.sink_uri.starts_with("tidb");
        Self {
            me,
            id: info.id.clone(),
            epoch,
            config: config.to_bytes(),
            names_wanted,
            is_new,
            phase: Phase::Loading,
            trigger: DispatcherId::random(),
            spans: SpanSet::new(),
            controller: Controller::new(),
            fold: CheckpointFold::new(checkpoint),
            nodes: BTreeSet::new(),
            bootstrapper: Bootstrapper::default(),
            tables: Arc::new([]),
            errors: BTreeMap::new(),
            start: checkpoint,
        }
    }

    pub(crate) fn checkpoint(&self) -> Ts {
        self.fold.committed().checkpoint
    }

    pub(crate) fn resolved(&self) -> Ts {
        self.fold.committed().resolved
    }

    pub(crate) fn is_stopped(&self) -> bool {
        matches!(self.phase, Phase::Stopped)
    }

    pub(crate) fn is_closing(&self) -> bool {
        matches!(self.phase, Phase::Closing { .. } | Phase::Stopped)
    }

    pub(crate) fn span_counts(&self) -> [(Group, usize); 3] {
        [Group::Absent, Group::Scheduling, Group::Replicating].map(|group| (group, self.spans.count(group)))
    }

    /// What the coordinator is told.
    pub(crate) fn status(&self) -> MaintainerStatus {
        MaintainerStatus {
            changefeed: self.id.clone(),
            feed_state: String::new(),
            state: if self.is_stopped() { ComponentState::Stopped } else { ComponentState::Working },
            checkpoint: self.checkpoint(),
            errors: self.errors.values().cloned().collect(),
            bootstrap_done: matches!(self.phase, Phase::Working),
            last_synced: self.fold.last_synced,
            drain: None,
            epoch: self.epoch,
        }
    }

    /// Something on this node failed: the reader, or its start.
    pub(crate) fn on_local_error(&mut self, error: RunningError, out: &mut Vec<Effect>) {
        self.errors.insert(self.me.clone(), error);
        out.push(Effect::Changed);
    }

    /// The reader runs and delivers `tables`.
    pub(crate) fn on_tables(&mut self, tables: Vec<SourceTable>, now: Instant, out: &mut Vec<Effect>) {
        if !matches!(self.phase, Phase::Loading) {
            return;
        }
        self.tables = tables.into();
        self.phase = Phase::Bootstrapping;
        let nodes = std::mem::take(&mut self.nodes);
        self.on_nodes(nodes, now, out);
    }

    /// The set of live nodes is `alive`.
    pub(crate) fn on_nodes(&mut self, alive: BTreeSet<NodeId>, now: Instant, out: &mut Vec<Effect>) {
        self.nodes = alive;
        match &mut self.phase {
            Phase::Loading | Phase::Stopped => return,
            Phase::Closing { waiting, .. } => {
                waiting.retain(|node, _| self.nodes.contains(node));
                return self.finish_closing(out);
            }
            Phase::Bootstrapping | Phase::PostBootstrapping { .. } | Phase::Working => {}
        }
        let change = self.bootstrapper.on_nodes(&self.nodes, now);
        for node in &change.removed {
            self.on_node_removed(node, out);
        }
        for node in change.added {
            self.ask_bootstrap(node, out);
        }
        if let Some(answers) = change.complete {
            self.merge(answers, now, out);
        }
    }

    fn on_node_removed(&mut self, node: &NodeId, out: &mut Vec<Effect>) {
        let mut actions = Vec::new();
        self.controller.on_node_removed(node, &mut actions);
        self.perform(actions, out);
        // Absent first, then forget what the node said: something accounts for each span at every moment.
        for span in self.spans.ids_by_node(node) {
            self.spans.mark_absent(span);
        }
        self.fold.on_node_removed(node);
        self.errors.remove(node);
    }

    fn ask_bootstrap(&self, node: NodeId, out: &mut Vec<Effect>) {
        let own = node == self.me;
        let request = MaintainerBootstrapRequest {
            changefeed: self.id.clone(),
            config: self.config.clone(),
            start_ts: self.start,
            trigger: own.then_some(self.trigger),
            is_new: own && self.is_new,
            redo_trigger: None,
            keyspace_id: 0,
            epoch: self.epoch,
        };
        out.push(Effect::Orchestrate(node, ToOrchestrator::Bootstrap(request)));
    }

    /// Whether a response belongs to this maintainer: a strict one takes its own epoch only.
    fn is_mine(&self, reported: Option<MaintainerEpoch>) -> bool {
        self.epoch.is_none() || reported == self.epoch
    }

    pub(crate) fn on_bootstrap(
        &mut self,
        from: &NodeId,
        response: MaintainerBootstrapResponse,
        now: Instant,
        out: &mut Vec<Effect>,
    ) {
        if !self.is_mine(response.epoch) || self.is_closing() {
            return;
        }
        if let Some(error) = response.error {
            self.errors.insert(from.clone(), error);
            out.push(Effect::Changed);
            return;
        }
        if *from == self.me {
            self.is_new = false;
        }
        match self.bootstrapper.on_answer(from, response) {
            Heard::Unknown | Heard::Waiting | Heard::Late(_) => {}
            Heard::Complete(answers) => self.merge(answers, now, out),
        }
    }

    /// Takes over what runs, creates what is missing, removes what should not be there: a plan first, then its
    /// effects, so that nothing is half applied (spec/maintainer.md §8).
    fn merge(
        &mut self,
        answers: BTreeMap<NodeId, MaintainerBootstrapResponse>,
        now: Instant,
        out: &mut Vec<Effect>,
    ) {
        let mut adopted: BTreeMap<TableId, (NodeId, BootstrapTableSpan)> = BTreeMap::new();
        let mut orphans: Vec<(NodeId, BootstrapTableSpan)> = Vec::new();
        let wanted: BTreeMap<TableId, &SourceTable> =
            self.tables.iter().map(|table| (table.id, table)).collect();
        for (node, answer) in answers {
            if node == self.me && answer.checkpoint > Ts::ZERO {
                self.start = self.start.max(answer.checkpoint);
            }
            for span in answer.spans {
                if span.id == self.trigger {
                    continue;
                }
                let usable = span.mode == Mode::Default
                    && span.span.is_whole()
                    && wanted.contains_key(&span.span.table)
                    && !matches!(span.state, ComponentState::Stopped | ComponentState::Removed)
                    && !adopted.contains_key(&span.span.table);
                if usable {
                    adopted.insert(span.span.table, (node.clone(), span));
                } else {
                    orphans.push((node.clone(), span));
                }
            }
        }
        for table in wanted.values() {
            match adopted.remove(&table.id) {
                Some((node, span)) => {
                    let mut replica =
                        SpanReplica::absent(span.id, table.schema_id, span.span, span.checkpoint);
                    replica.block = span.block;
                    replica.state = span.state;
                    self.spans.add_replicating(replica, node);
                }
                None => self.spans.add_absent(SpanReplica::absent(
                    DispatcherId::random(),
                    table.schema_id,
                    TableSpan::whole(table.id),
                    self.start,
                )),
            }
        }
        for (node, span) in orphans {
            self.remove_orphan(&node, span.id, span.schema, span.span, out);
        }
        self.phase = Phase::PostBootstrapping { sent: None };
        self.on_tick(now, out);
        out.push(Effect::Changed);
    }

    fn remove_orphan(
        &self,
        node: &NodeId,
        id: DispatcherId,
        schema: SchemaId,
        span: TableSpan,
        out: &mut Vec<Effect>,
    ) {
        let config = DispatcherConfig {
            span,
            start_ts: Ts::ZERO,
            dispatcher: id,
            schema,
            mode: Mode::Default,
            skip_dml_at_start: false,
        };
        self.schedule(node.clone(), config, ScheduleAction::Remove, OperatorType::Remove, out);
    }

    fn schedule(
        &self,
        node: NodeId,
        config: DispatcherConfig,
        action: ScheduleAction,
        operator: OperatorType,
        out: &mut Vec<Effect>,
    ) {
        let request = ScheduleDispatcherRequest {
            changefeed: self.id.clone(),
            config,
            action,
            operator,
            epoch: self.epoch,
        };
        out.push(Effect::Dispatch(node, ToHeartbeatCollector::Schedule(request)));
    }

    fn post_bootstrap(&self) -> MaintainerPostBootstrapRequest {
        let mut schemas: BTreeMap<SchemaId, SchemaTables> = BTreeMap::new();
        let name = |name: &str| if self.names_wanted { name.to_owned() } else { String::new() };
        for table in self.tables.iter() {
            let schema = schemas.entry(table.schema_id).or_insert_with(|| SchemaTables {
                id: table.schema_id,
                name: name(&table.schema),
                tables: Vec::new(),
            });
            schema.tables.push(TableName { id: table.id, name: name(&table.name) });
        }
        MaintainerPostBootstrapRequest {
            changefeed: self.id.clone(),
            trigger: self.trigger,
            schemas: schemas.into_values().collect(),
            redo_schemas: Vec::new(),
            epoch: self.epoch,
        }
    }

    pub(crate) fn on_post_bootstrap(
        &mut self,
        from: &NodeId,
        response: MaintainerPostBootstrapResponse,
        out: &mut Vec<Effect>,
    ) {
        let expected = matches!(self.phase, Phase::PostBootstrapping { .. });
        if !expected || *from != self.me || !self.is_mine(response.epoch) {
            return;
        }
        match response.error {
            Some(error) => {
                self.errors.insert(from.clone(), error);
            }
            None => self.phase = Phase::Working,
        }
        out.push(Effect::Changed);
    }

    /// Time passed: repeat what was not answered, place what has no home, fold the checkpoint.
    pub(crate) fn on_tick(&mut self, now: Instant, out: &mut Vec<Effect>) {
        for node in self.bootstrapper.resend(now) {
            self.ask_bootstrap(node, out);
        }
        match &mut self.phase {
            Phase::Loading | Phase::Bootstrapping | Phase::Stopped => return,
            Phase::Closing { .. } => return self.resend_close(now, out),
            Phase::PostBootstrapping { sent } => {
                if sent.is_none_or(|at| now.duration_since(at) >= POST_BOOTSTRAP_RESEND) {
                    *sent = Some(now);
                    let request = ToOrchestrator::PostBootstrap(self.post_bootstrap());
                    out.push(Effect::Orchestrate(self.me.clone(), request));
                }
            }
            Phase::Working => {}
        }
        let mut actions = Vec::new();
        self.controller.on_tick(now, &mut actions);
        self.perform(actions, out);
        self.place(now, out);
        self.fold_checkpoint(out);
    }

    fn place(&mut self, now: Instant, out: &mut Vec<Effect>) {
        let budget = ADD_BUDGET.saturating_sub(self.controller.len());
        if budget == 0 || self.spans.count(Group::Absent) == 0 {
            return;
        }
        let loads = Loads::new(
            self.nodes
                .iter()
                .filter(|node| self.bootstrapper.has_answered(node))
                .map(|node| (node.clone(), self.spans.size_by_node(node))),
        );
        let free = self.spans.absent().filter(|id| !self.controller.contains(*id));
        let decisions = basic(free, loads, budget);
        let mut actions = Vec::new();
        for decision in decisions {
            self.controller.add(Box::new(AddSpan::new(decision.span, decision.dest)), now, &mut actions);
        }
        self.perform(actions, out);
    }

    fn perform(&mut self, actions: Vec<Action>, out: &mut Vec<Effect>) {
        for action in actions {
            match action {
                Action::Bind { span, to } => self.spans.bind(span, to),
                Action::Replicating { span } => self.spans.mark_replicating(span),
                Action::Release { span } => self.spans.mark_absent(span),
                Action::Create { span, on, operator } => {
                    let Some(replica) = self.spans.get(span) else { continue };
                    let config = replica.create_config(self.checkpoint(), Mode::Default);
                    self.schedule(on, config, ScheduleAction::Create, operator, out);
                }
                Action::Remove { span, on, operator } => {
                    let known = self.spans.get(span);
                    let (schema, range) = known.map_or((SchemaId::DDL, TableSpan::ddl()), |replica| {
                        (replica.schema, replica.span.clone())
                    });
                    let config = DispatcherConfig {
                        span: range,
                        start_ts: Ts::ZERO,
                        dispatcher: span,
                        schema,
                        mode: Mode::Default,
                        skip_dml_at_start: false,
                    };
                    self.schedule(on, config, ScheduleAction::Remove, operator, out);
                }
            }
        }
    }

    fn fold_checkpoint(&mut self, out: &mut Vec<Effect>) {
        let relevant: Vec<&NodeId> =
            self.nodes.iter().filter(|node| **node == self.me || self.spans.size_by_node(node) > 0).collect();
        // Operators that hold the checkpoint run on spans that nobody replicates yet: those are in the minimum.
        if self.fold.advance(relevant.into_iter(), &[self.spans.min_waiting()]) {
            out.push(Effect::Changed);
        }
    }

    pub(crate) fn on_heartbeat(&mut self, from: &NodeId, request: HeartBeatRequest, out: &mut Vec<Effect>) {
        if let Some(error) = request.error {
            self.errors.insert(from.clone(), error);
            out.push(Effect::Changed);
        }
        if self.is_closing() || matches!(self.phase, Phase::Loading | Phase::Bootstrapping) {
            return;
        }
        let mut actions = Vec::new();
        for status in &request.statuses {
            self.on_span_status(from, status, &mut actions, out);
        }
        self.perform(actions, out);
        if request.complete {
            self.release_missing(from, &request.statuses);
        }
        if let Some(mark) = request.watermark
            && self.nodes.contains(from)
            && self.fold.on_watermark(from, mark)
        {
            self.fold_checkpoint(out);
        }
    }

    fn on_span_status(
        &mut self,
        from: &NodeId,
        status: &TableSpanStatus,
        actions: &mut Vec<Action>,
        out: &mut Vec<Effect>,
    ) {
        if status.mode != Mode::Default || status.id == self.trigger {
            return;
        }
        let ended = matches!(status.state, ComponentState::Stopped | ComponentState::Removed);
        let had_operator = self.controller.contains(status.id);
        self.controller.on_status(from, status, actions);
        let Some(replica) = self.spans.get(status.id) else {
            // Nobody wants it here: an earlier owner's, or one that a table's removal left behind.
            if !ended && !had_operator {
                self.remove_orphan(from, status.id, SchemaId::DDL, TableSpan::ddl(), out);
            }
            return;
        };
        if replica.node.as_ref() != Some(from) {
            return;
        }
        self.spans.observe(status);
        if ended && !had_operator {
            self.spans.mark_absent(status.id);
        }
    }

    /// A complete report leaves out a span that the node should run: it is not there any more.
    fn release_missing(&mut self, from: &NodeId, statuses: &[TableSpanStatus]) {
        let reported: BTreeSet<DispatcherId> = statuses.iter().map(|status| status.id).collect();
        for span in self.spans.ids_by_node(from) {
            let lost = self.spans.group(span) == Some(Group::Replicating)
                && !self.controller.contains(span)
                && !reported.contains(&span);
            if lost {
                self.spans.mark_absent(span);
            }
        }
    }

    /// Reports that need no action downstream are acknowledged, and their tables added or removed.
    pub(crate) fn on_block_status(
        &mut self,
        from: &NodeId,
        request: BlockStatusRequest,
        now: Instant,
        out: &mut Vec<Effect>,
    ) {
        if self.is_closing() {
            return;
        }
        let mut statuses = Vec::new();
        for status in request.statuses {
            if status.state.is_blocked {
                self.errors.insert(from.clone(), RunningError {
                    time: String::new(),
                    node: from.to_string(),
                    code: "CDC:ErrDDLBarrierUnsupported".to_owned(),
                    message: format!(
                        "a schema change at {} needs several tables to stop at it, which is not supported yet",
                        status.state.key.commit_ts
                    ),
                });
                out.push(Effect::Changed);
                continue;
            }
            self.apply_ddl(&status.state, now, out);
            statuses.push(DispatcherStatus {
                influenced: Some(InfluencedDispatchers::Normal(vec![status.id])),
                ack: Some(status.state.key),
                ignored: None,
                action: None,
            });
        }
        if !statuses.is_empty() {
            let response = HeartBeatResponse {
                changefeed: self.id.clone(),
                mode: request.mode,
                statuses,
                epoch: self.epoch,
            };
            out.push(Effect::Dispatch(from.clone(), ToHeartbeatCollector::HeartBeatResponse(response)));
        }
    }

    fn apply_ddl(&mut self, state: &heartbeatpb::BlockState, now: Instant, out: &mut Vec<Effect>) {
        for table in &state.added {
            if self.spans.by_table(table.table).next().is_none() {
                self.spans.add_absent(SpanReplica::absent(
                    DispatcherId::random(),
                    table.schema,
                    TableSpan::whole(table.table),
                    state.key.commit_ts,
                ));
            }
        }
        let dropped: Vec<(DispatcherId, Option<NodeId>)> = match &state.dropped {
            None => Vec::new(),
            Some(InfluencedTables::All) => self.spans.iter().map(|(_, s)| (s.id, s.node.clone())).collect(),
            Some(InfluencedTables::Schema(schema)) => {
                self.spans.by_schema(*schema).map(|s| (s.id, s.node.clone())).collect()
            }
            Some(InfluencedTables::Normal(tables)) => tables
                .iter()
                .flat_map(|table| self.spans.by_table(*table))
                .map(|s| (s.id, s.node.clone()))
                .collect(),
        };
        let mut actions = Vec::new();
        for (id, node) in dropped {
            if let Some(node) = node {
                self.controller.replace(Box::new(RemoveSpan::new(id, node)), now, &mut actions);
            }
            self.perform(std::mem::take(&mut actions), out);
            self.spans.remove(id);
        }
    }

    /// The changefeed leaves this maintainer. With `cascade` its dispatcher managers are closed first.
    pub(crate) fn on_remove(&mut self, cascade: bool, removed: bool, now: Instant, out: &mut Vec<Effect>) {
        match &mut self.phase {
            Phase::Stopped => return,
            // A deletion wins over a pause that is under way.
            Phase::Closing { removed: deleting, waiting } => {
                if removed && !*deleting {
                    *deleting = true;
                    waiting.values_mut().for_each(|sent| *sent = None);
                }
            }
            Phase::Loading | Phase::Bootstrapping | Phase::PostBootstrapping { .. } | Phase::Working => {
                self.controller.quiesce();
                let waiting = if cascade {
                    self.nodes.iter().map(|n| (n.clone(), None)).collect()
                } else {
                    BTreeMap::new()
                };
                self.phase = Phase::Closing { removed, waiting };
            }
        }
        self.resend_close(now, out);
        self.finish_closing(out);
    }

    fn resend_close(&mut self, now: Instant, out: &mut Vec<Effect>) {
        let Phase::Closing { removed, waiting } = &mut self.phase else { return };
        for (node, sent) in waiting {
            if sent.is_none_or(|at| now.duration_since(at) >= CLOSE_RESEND) {
                *sent = Some(now);
                let request = MaintainerCloseRequest {
                    changefeed: self.id.clone(),
                    removed: *removed,
                    epoch: self.epoch,
                };
                out.push(Effect::Orchestrate(node.clone(), ToOrchestrator::Close(request)));
            }
        }
    }

    pub(crate) fn on_close(
        &mut self,
        from: &NodeId,
        response: &MaintainerCloseResponse,
        out: &mut Vec<Effect>,
    ) {
        if !self.is_mine(response.epoch) || !response.success {
            return;
        }
        if let Phase::Closing { waiting, .. } = &mut self.phase {
            waiting.remove(from);
        }
        self.finish_closing(out);
    }

    fn finish_closing(&mut self, out: &mut Vec<Effect>) {
        if matches!(&self.phase, Phase::Closing { waiting, .. } if waiting.is_empty()) {
            self.phase = Phase::Stopped;
            out.push(Effect::Closed);
            out.push(Effect::Changed);
        }
    }
}

#[cfg(test)]
mod tests;
