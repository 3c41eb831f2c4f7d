//! A core with a clock, its world, and what it said.

use expect_test::Expect;
use heartbeatpb::config::{ReplicaConfig, UpstreamInfo};
use heartbeatpb::{
    AddedTable, BarrierKey, BlockStage, BlockState, BootstrapTableSpan, CheckpointTsMessage,
    HeartBeatRequest, InfluencedTables, MaintainerCloseResponse, MaintainerPostBootstrapResponse, Mode,
    OperatorType, ScheduleAction, ScheduleDispatcherRequest, TableId, TableSpanBlockStatus, TableSpanStatus,
    Watermark,
};

use replica::Standing;

use super::super::*;

pub(super) const ME: &str = "n1";

pub(super) struct Rig {
    pub(super) core: Core,
    pub(super) now: Instant,
    pub(super) out: Vec<Effect>,
    /// Questions and answers that were passed over while nodes obeyed.
    pub(super) kept: Vec<Effect>,
    pub(super) trigger_start: u64,
}

pub(super) fn status(id: u64, state: ComponentState, checkpoint: u64) -> TableSpanStatus {
    TableSpanStatus {
        id: DispatcherId::new(0, id),
        state,
        checkpoint: Ts(checkpoint),
        event_size_per_second: 0.0,
        mode: Mode::Default,
    }
}

pub(super) fn span(id: u64, table: i64, range: (&str, &str), state: ComponentState) -> BootstrapTableSpan {
    BootstrapTableSpan {
        id: DispatcherId::new(0, id),
        schema: SchemaId(1),
        span: TableSpan { keyspace_id: 0, table: TableId(table), start: range.0.into(), end: range.1.into() },
        state,
        checkpoint: Ts(120),
        block: None,
        mode: Mode::Default,
    }
}

pub(super) const WHOLE: (&str, &str) = ("", "");

impl Rig {
    /// Tables are `t1`, `t2`, … of schema 1; ids are 1 (the trigger), 2, …; the epoch is 5, the start 100.
    pub(super) fn new() -> Self {
        Self::with(|_| {})
    }

    pub(super) fn with(edit: impl FnOnce(&mut ReplicaConfig)) -> Self {
        Self::at(100, 0, edit)
    }

    /// A maintainer that starts at a checkpoint, whose ids begin after `last_id`.
    pub(super) fn at(start: u64, last_id: u64, edit: impl FnOnce(&mut ReplicaConfig)) -> Self {
        Self::born(start, last_id, false, edit)
    }

    /// A maintainer whose downstream has writers that can be fenced.
    pub(super) fn fencing() -> Self {
        Self::born(100, 0, true, |_| {})
    }

    pub(super) fn born(
        start: u64,
        last_id: u64,
        fences: bool,
        edit: impl FnOnce(&mut ReplicaConfig),
    ) -> Self {
        let mut config = ReplicaConfig::default();
        edit(&mut config);
        let info = ChangefeedInfo::new(
            ChangefeedId::fresh("t"),
            UpstreamInfo::default(),
            "blackhole://",
            config,
            Ts(100),
        );
        let now = Instant::now();
        let mut next = last_id;
        let core = Core::new(Birth {
            me: ME.into(),
            info: &info,
            epoch: MaintainerEpoch::from_wire(5),
            checkpoint: Ts(start),
            is_new: true,
            removal_only: false,
            fences,
            ids: Box::new(move || {
                next += 1;
                DispatcherId::new(0, next)
            }),
            now,
        });
        Self { core, now, out: Vec::new(), kept: Vec::new(), trigger_start: start }
    }

    /// One node, `count` tables, all of them replicated at 100; nothing left to say.
    pub(super) fn working(count: i64) -> Self {
        Self::working_with(count, |_| {})
    }

    pub(super) fn working_with(count: i64, edit: impl FnOnce(&mut ReplicaConfig)) -> Self {
        let mut rig = Self::with(edit);
        rig.nodes(&[ME]);
        rig.load(count);
        rig.answer(ME, vec![]);
        rig.post_answer(ME, 5);
        rig.create_all();
        rig.report(ME, &[], 100, 3);
        rig.core.load_at = None;
        rig.out.clear();
        rig
    }

    #[allow(clippy::unused_self)]
    pub(super) fn id(&self, n: u64) -> DispatcherId {
        DispatcherId::new(0, n)
    }

    fn settle(&mut self) {
        self.core.settle();
    }

    pub(super) fn nodes(&mut self, names: &[&str]) {
        let alive = names.iter().map(|name| NodeId::from(*name)).collect();
        self.core.on_nodes(alive, self.now, &mut self.out);
        self.settle();
    }

    pub(super) fn load(&mut self, count: i64) {
        let table = |n: i64| SourceTable {
            id: TableId(n),
            schema_id: SchemaId(1),
            schema: "public".to_owned(),
            name: format!("t{n}"),
            splittable: true,
        };
        self.core.on_loaded(Ok((1..=count).map(table).collect()), self.now, &mut self.out);
        self.settle();
    }

    pub(super) fn load_fails(&mut self) {
        let result = Err(error("CDC:ErrX"));
        self.core.on_loaded(result, self.now, &mut self.out);
    }

    pub(super) fn answer(&mut self, node: &str, spans: Vec<BootstrapTableSpan>) {
        self.answer_of(node, spans, vec![], 5);
    }

    pub(super) fn answer_of(
        &mut self,
        node: &str,
        spans: Vec<BootstrapTableSpan>,
        operators: Vec<ScheduleDispatcherRequest>,
        epoch: u64,
    ) {
        self.answer_with(node, spans, operators, vec![], epoch);
    }

    /// What a node runs, has in its journal, and is merging: each a target with its sources.
    pub(super) fn answer_with(
        &mut self,
        node: &str,
        spans: Vec<BootstrapTableSpan>,
        operators: Vec<ScheduleDispatcherRequest>,
        merges: Vec<(u64, &[u64])>,
        epoch: u64,
    ) {
        let merge = |(merged, sources): (u64, &[u64])| heartbeatpb::MergeDispatcherRequest {
            changefeed: self.core.id.clone(),
            sources: sources.iter().map(|source| DispatcherId::new(0, *source)).collect(),
            merged: DispatcherId::new(0, merged),
            mode: Mode::Default,
            epoch: MaintainerEpoch::from_wire(4),
        };
        let response = MaintainerBootstrapResponse {
            changefeed: self.core.id.clone(),
            spans,
            error: None,
            checkpoint: Ts(if node == ME { self.trigger_start } else { 0 }),
            redo_checkpoint: Ts::ZERO,
            operators,
            merges: merges.into_iter().map(merge).collect(),
            epoch: MaintainerEpoch::from_wire(epoch),
        };
        self.core.on_bootstrap(&node.into(), response, self.now, &mut self.out);
        self.settle();
    }

    /// A node that is asked by a number cannot answer.
    pub(super) fn refuses(&mut self, node: &str, number: u64, code: &str) {
        let response = MaintainerBootstrapResponse {
            changefeed: self.core.id.clone(),
            spans: vec![],
            error: Some(error(code)),
            checkpoint: Ts::ZERO,
            redo_checkpoint: Ts::ZERO,
            operators: vec![],
            merges: vec![],
            epoch: MaintainerEpoch::from_wire(number),
        };
        self.core.on_bootstrap(&node.into(), response, self.now, &mut self.out);
    }

    /// A request that a node has in its journal.
    pub(super) fn journal(
        &self,
        id: u64,
        table: i64,
        action: ScheduleAction,
        operator: OperatorType,
    ) -> ScheduleDispatcherRequest {
        ScheduleDispatcherRequest {
            changefeed: self.core.id.clone(),
            config: heartbeatpb::DispatcherConfig {
                span: TableSpan::whole(TableId(table)),
                start_ts: Ts(110),
                dispatcher: DispatcherId::new(0, id),
                schema: SchemaId(1),
                mode: Mode::Default,
                skip_dml_at_start: false,
            },
            action,
            operator,
            epoch: MaintainerEpoch::from_wire(4),
        }
    }

    pub(super) fn post_answer(&mut self, node: &str, epoch: u64) {
        let response = MaintainerPostBootstrapResponse {
            changefeed: self.core.id.clone(),
            trigger: None,
            error: None,
            epoch: MaintainerEpoch::from_wire(epoch),
        };
        self.core.on_post_bootstrap(&node.into(), response, &mut self.out);
        self.settle();
    }

    pub(super) fn report(&mut self, node: &str, statuses: &[TableSpanStatus], checkpoint: u64, seq: u64) {
        self.heartbeat(node, statuses, Some((checkpoint, seq)), false);
    }

    pub(super) fn complete(&mut self, node: &str, statuses: &[TableSpanStatus]) {
        self.heartbeat(node, statuses, None, true);
    }

    fn heartbeat(
        &mut self,
        node: &str,
        statuses: &[TableSpanStatus],
        mark: Option<(u64, u64)>,
        complete: bool,
    ) {
        let request = HeartBeatRequest {
            changefeed: self.core.id.clone(),
            watermark: mark.map(|(checkpoint, seq)| Watermark {
                checkpoint: Ts(checkpoint),
                resolved: Ts(checkpoint),
                seq,
                last_synced: Ts::ZERO,
            }),
            redo_watermark: None,
            statuses: statuses.to_vec(),
            complete,
            error: None,
            trouble: None,
        };
        self.core.on_heartbeat(&node.into(), request, self.now, &mut self.out);
        self.settle();
    }

    /// Nodes obey: every dispatcher that is asked for is created, and says so at 100.
    pub(super) fn create_all(&mut self) {
        self.tick(500);
        loop {
            let asked: Vec<(NodeId, DispatcherId)> = self
                .out
                .drain(..)
                .filter_map(|effect| match effect {
                    Effect::Dispatch(node, ToHeartbeatCollector::Schedule(request)) => (request.action
                        == ScheduleAction::Create)
                        .then_some((node, request.config.dispatcher)),
                    Effect::Orchestrate(..)
                    | Effect::Dispatch(..)
                    | Effect::Load
                    | Effect::Points { .. }
                    | Effect::Answer(..)
                    | Effect::Confirm(_)
                    | Effect::Initialized
                    | Effect::Leave
                    | Effect::OperatorStarted(_)
                    | Effect::OperatorFinished(..)
                    | Effect::Fence { .. }
                    | Effect::Stale(_) => None,
                })
                .collect();
            if asked.is_empty() {
                return;
            }
            for (node, id) in asked {
                self.report(node.as_str(), &[status(id.low, ComponentState::Working, 100)], 100, 3);
            }
        }
    }

    fn block_status(&mut self, state: BlockState) {
        let request = BlockStatusRequest {
            changefeed: self.core.id.clone(),
            mode: Mode::Default,
            statuses: vec![TableSpanBlockStatus { id: self.core.trigger, mode: Mode::Default, state }],
        };
        self.core.on_block_status(&ME.into(), &request, self.now, &mut self.out);
        self.settle();
    }

    /// The trigger has executed a DDL alone.
    fn executed(&mut self, ts: u64, dropped: Option<InfluencedTables>, added: Vec<AddedTable>) {
        self.block_status(BlockState {
            is_blocked: false,
            key: BarrierKey { commit_ts: Ts(ts), is_sync_point: false },
            blocked: None,
            dropped,
            added,
            schema_changes: vec![],
            stage: BlockStage::None,
            routes: vec![],
        });
    }

    pub(super) fn add_tables(&mut self, ts: u64, tables: &[i64]) {
        let added = tables
            .iter()
            .map(|table| AddedTable { table: TableId(*table), schema: SchemaId(1), splittable: true })
            .collect();
        self.executed(ts, None, added);
    }

    pub(super) fn drop_tables(&mut self, tables: &[i64]) {
        let tables = tables.iter().map(|table| TableId(*table)).collect();
        self.executed(250, Some(InfluencedTables::Normal(tables)), vec![]);
    }

    pub(super) fn persisted(&mut self, ts: u64) {
        let message = CheckpointTsMessage { changefeed: self.core.id.clone(), checkpoint: Ts(ts) };
        self.core.on_persisted(message, &mut self.out);
    }

    pub(super) fn remove(&mut self, epoch: u64, cascade: bool, removed: bool) {
        let epoch = MaintainerEpoch::from_wire(epoch);
        self.core.on_remove(epoch, cascade, removed, self.now, &mut self.out);
        self.settle();
    }

    pub(super) fn closed(&mut self, node: &str, success: bool, epoch: u64) {
        let response = MaintainerCloseResponse {
            changefeed: self.core.id.clone(),
            success,
            epoch: MaintainerEpoch::from_wire(epoch),
        };
        self.core.on_close(&node.into(), &response, self.now, &mut self.out);
        self.settle();
    }

    pub(super) fn tick(&mut self, millis: u64) {
        self.now += Duration::from_millis(millis);
        self.core.on_tick(self.now, &mut self.out);
        self.settle();
    }

    pub(super) fn checkpoint(&self) -> u64 {
        self.core.progress().checkpoint.0
    }

    /// Spans by node, and how many have none.
    pub(super) fn sizes(&self) -> String {
        let spans = &self.core.placement().spans;
        let mut words: Vec<String> =
            spans.nodes().map(|node| format!("{node}={}", spans.size_by_node(node))).collect();
        let absent = spans.count(Standing::Absent);
        if absent > 0 {
            words.push(format!("absent={absent}"));
        }
        words.join(" ")
    }

    /// The desired state, span by span.
    pub(super) fn desired(&self, expected: &Expect) {
        let placement = self.core.placement();
        let text = |key: &[u8]| String::from_utf8_lossy(key).into_owned();
        let mut words: Vec<(TableId, String)> = placement
            .spans
            .iter()
            .map(|(standing, span)| {
                let range = format!("{}-{}", text(&span.span.start), text(&span.span.end));
                let node = span.node.as_ref().map_or(String::new(), |node| format!(" on {node}"));
                let operator = placement.operators.get(span.id).map_or("", |operator| operator.kind().name());
                let word = format!("{range} {standing:?}{node} @{} {operator}", span.checkpoint);
                (span.span.table, format!("t{} {}", span.span.table, word.trim_end()))
            })
            .collect();
        words.sort();
        let words: Vec<String> = words.into_iter().map(|(_, word)| word).collect();
        expected.assert_eq(&words.join("\n"));
    }

    /// Somebody wishes for something.
    pub(super) fn wish(&mut self, ticket: u64, wish: crate::placements::Wish) {
        self.core.on_wish(ticket, wish, self.now, &mut self.out);
        self.settle();
    }

    /// The upstream answers the question that was asked last.
    pub(super) fn points(&mut self, keys: &[&str]) {
        let question = |effect: &Effect| {
            if let Effect::Points { question, .. } = effect { Some(*question) } else { None }
        };
        let question = self.kept.iter().chain(&self.out).rev().find_map(question);
        let keys = keys.iter().map(|key| key.as_bytes().to_vec()).collect();
        let points = crate::SplitPoints { keys, rows: None, bytes: None };
        self.core.on_points(question.unwrap(), Ok(points), self.now, &mut self.out);
        self.settle();
    }

    /// What wishes came to.
    pub(super) fn answers(&mut self) -> Vec<String> {
        let effects: Vec<Effect> = self.kept.drain(..).chain(self.out.drain(..)).collect();
        effects.iter().filter(|effect| matches!(effect, Effect::Answer(..))).map(text).collect()
    }

    pub(super) fn says(&mut self, expected: &Expect) {
        let words: Vec<String> = self.out.drain(..).map(|effect| text(&effect)).collect();
        expected.assert_eq(&if words.is_empty() { "-".to_owned() } else { words.join(", ") });
    }
}

pub(super) fn error(code: &str) -> RunningError {
    RunningError {
        time: String::new(),
        node: String::new(),
        code: code.to_owned(),
        message: "it failed".to_owned(),
    }
}

pub(super) fn text(effect: &Effect) -> String {
    let epoch = MaintainerEpoch::from_wire(5);
    // A node that was let in again is asked by another number.
    let by = |number: Option<MaintainerEpoch>| {
        if number == epoch { String::new() } else { format!(" by {}", MaintainerEpoch::to_wire(number)) }
    };
    match effect {
        Effect::Orchestrate(node, ToOrchestrator::Bootstrap(request)) => {
            let config = DispatcherManagerConfig::from_bytes(&request.config).unwrap();
            assert_eq!(request.epoch, config.epoch);
            let by = by(request.epoch);
            format!("bootstrap {node}{by}{}", request.trigger.map_or("", |_| " with trigger"))
        }
        Effect::Orchestrate(node, ToOrchestrator::PostBootstrap(request)) => {
            let by = by(request.epoch);
            let schemas: Vec<String> = request
                .schemas
                .iter()
                .map(|schema| {
                    let tables: Vec<String> =
                        schema.tables.iter().map(|table| format!("{}={}", table.id, table.name)).collect();
                    format!("{}={}[{}]", schema.id, schema.name, tables.join(" "))
                })
                .collect();
            format!("post {node}{by}: {}", schemas.join(" "))
        }
        Effect::Orchestrate(node, ToOrchestrator::Close(request)) => {
            let by = by(request.epoch);
            format!("close {node}{by}{}", if request.removed { " for good" } else { "" })
        }
        Effect::Dispatch(node, ToHeartbeatCollector::Schedule(request)) => {
            let by = by(request.epoch);
            let config = &request.config;
            match request.action {
                ScheduleAction::Create => format!(
                    "create d{} t{}@{} on {node}{by}",
                    config.dispatcher.low, config.span.table, config.start_ts
                ),
                ScheduleAction::Remove => format!("remove d{} on {node}{by}", config.dispatcher.low),
            }
        }
        Effect::Dispatch(node, ToHeartbeatCollector::CheckpointTs(message)) => {
            format!("checkpoint {} to {node}", message.checkpoint)
        }
        Effect::Dispatch(node, ToHeartbeatCollector::Merge(request)) => {
            let by = by(request.epoch);
            let sources: Vec<String> = request.sources.iter().map(|id| format!("d{}", id.low)).collect();
            format!("merge {} into d{} on {node}{by}", sources.join("+"), request.merged.low)
        }
        Effect::Dispatch(node, message) => format!("to {node}: {message:?}"),
        Effect::Points { question, span, pieces } => {
            format!("ask {question} t{} for {pieces} pieces", span.table)
        }
        Effect::Answer(ticket, answer) => format!("answer {ticket}: {answer:?}"),
        Effect::Load => "load".to_owned(),
        Effect::Confirm(ts) => format!("confirm {ts}"),
        Effect::Initialized => "initialized".to_owned(),
        Effect::Leave => "leave".to_owned(),
        Effect::OperatorStarted(kind) => format!("+{}", kind.name()),
        Effect::OperatorFinished(kind, _) => format!("-{}", kind.name()),
        Effect::Fence { attempt, newest, whom } => {
            let by = by(*newest);
            let (all_but, nodes) = match whom {
                Whom::AllBut(nodes) => ("all but ", nodes),
                Whom::Nodes(nodes) => ("", nodes),
            };
            let nodes: Vec<&str> = nodes.iter().map(NodeId::as_str).collect();
            format!("fence {attempt}{by}: {all_but}{}", nodes.join(" "))
        }
        Effect::Stale(what) => format!("stale {what}"),
    }
}
