//! Histories of one maintainer.

use heartbeatpb::Watermark;
use heartbeatpb::config::{ReplicaConfig, UpstreamInfo};

use super::*;

const ME: &str = "n1";

struct Rig {
    core: Core,
    now: Instant,
}

fn epoch(n: u64) -> Option<MaintainerEpoch> {
    MaintainerEpoch::from_wire(n)
}

fn tables(count: i64) -> Vec<SourceTable> {
    (1..=count)
        .map(|n| SourceTable {
            id: TableId(n),
            schema_id: SchemaId(1),
            schema: "public".to_owned(),
            name: format!("t{n}"),
            splittable: true,
        })
        .collect()
}

impl Rig {
    fn new() -> Self {
        let info = ChangefeedInfo::new(
            ChangefeedId::fresh("t"),
            UpstreamInfo::default(),
            "blackhole://",
            ReplicaConfig::default(),
            Ts(100),
        );
        let core = Core::new(ME.into(), &info, epoch(5), Ts(100), true);
        Self { core, now: Instant::now() }
    }

    fn bootstrap_answer(&self, spans: Vec<BootstrapTableSpan>, e: u64) -> MaintainerBootstrapResponse {
        MaintainerBootstrapResponse {
            changefeed: self.core.id.clone(),
            spans,
            error: None,
            checkpoint: Ts(100),
            redo_checkpoint: Ts::ZERO,
            operators: vec![],
            merges: vec![],
            epoch: epoch(e),
        }
    }

    /// A maintainer whose `count` tables are being created.
    fn bootstrapped(count: i64) -> (Self, Vec<Effect>) {
        let mut rig = Self::new();
        let mut out = Vec::new();
        rig.core.on_nodes([ME.into()].into(), rig.now, &mut out);
        rig.core.on_tables(tables(count), rig.now, &mut out);
        let answer = rig.bootstrap_answer(vec![], 5);
        out.clear();
        rig.core.on_bootstrap(&ME.into(), answer, rig.now, &mut out);
        (rig, out)
    }

    fn heartbeat(&mut self, statuses: Vec<TableSpanStatus>, checkpoint: u64, seq: u64) -> Vec<Effect> {
        let request = HeartBeatRequest {
            changefeed: self.core.id.clone(),
            watermark: Some(Watermark {
                checkpoint: Ts(checkpoint),
                resolved: Ts(checkpoint),
                seq,
                last_synced: Ts::ZERO,
            }),
            redo_watermark: None,
            statuses,
            complete: false,
            error: None,
        };
        let mut out = Vec::new();
        self.core.on_heartbeat(&ME.into(), request, &mut out);
        out
    }

    fn post_bootstrapped(&mut self) {
        let response = MaintainerPostBootstrapResponse {
            changefeed: self.core.id.clone(),
            trigger: Some(self.core.trigger),
            error: None,
            epoch: epoch(5),
        };
        self.core.on_post_bootstrap(&ME.into(), response, &mut Vec::new());
    }
}

fn status(id: DispatcherId, state: ComponentState, checkpoint: u64) -> TableSpanStatus {
    TableSpanStatus { id, state, checkpoint: Ts(checkpoint), event_size_per_second: 1.0, mode: Mode::Default }
}

fn created(effects: &[Effect]) -> Vec<DispatcherConfig> {
    effects
        .iter()
        .filter_map(|effect| match effect {
            Effect::Dispatch(_, ToHeartbeatCollector::Schedule(request))
                if request.action == ScheduleAction::Create =>
            {
                assert_eq!(request.epoch, epoch(5), "MT-3");
                Some(request.config.clone())
            }
            Effect::Dispatch(..) | Effect::Orchestrate(..) | Effect::Changed | Effect::Closed => None,
        })
        .collect()
}

#[test]
fn a_new_changefeed_asks_its_node_then_creates_a_dispatcher_for_each_table() {
    let (mut rig, out) = Rig::bootstrapped(3);
    let configs = created(&out);
    assert_eq!(configs.len(), 3);
    assert!(configs.iter().all(|config| config.start_ts == Ts(100)));
    assert!(out.iter().any(|e| matches!(e, Effect::Orchestrate(_, ToOrchestrator::PostBootstrap(_)))));
    assert!(!rig.core.status().bootstrap_done);
    rig.post_bootstrapped();
    assert!(rig.core.status().bootstrap_done);
}

#[test]
fn a_response_of_another_epoch_or_without_one_changes_nothing() {
    let mut rig = Rig::new();
    let mut out = Vec::new();
    rig.core.on_nodes([ME.into()].into(), rig.now, &mut out);
    rig.core.on_tables(tables(1), rig.now, &mut out);
    for stale in [0, 4, 6] {
        out.clear();
        let answer = rig.bootstrap_answer(vec![], stale);
        rig.core.on_bootstrap(&ME.into(), answer, rig.now, &mut out);
        assert!(out.is_empty(), "epoch {stale}");
    }
}

#[test]
fn the_checkpoint_waits_for_every_span_to_have_a_home() {
    let (mut rig, out) = Rig::bootstrapped(2);
    rig.post_bootstrapped();
    let ids: Vec<DispatcherId> = created(&out).iter().map(|config| config.dispatcher).collect();
    rig.heartbeat(vec![status(ids[0], ComponentState::Working, 100)], 500, 1);
    assert_eq!(rig.core.checkpoint(), Ts(100), "the second span holds it");
    rig.heartbeat(vec![status(ids[1], ComponentState::Working, 100)], 300, 2);
    assert_eq!(rig.core.checkpoint(), Ts(300));
    rig.heartbeat(vec![], 900, 1);
    assert_eq!(rig.core.checkpoint(), Ts(300), "a watermark of an older membership");
    rig.heartbeat(vec![status(ids[0], ComponentState::Stopped, 310)], 400, 3);
    assert_eq!(rig.core.checkpoint(), Ts(310), "a span that lost its home");
}

#[test]
fn a_lost_span_is_created_again_from_its_checkpoint() {
    let (mut rig, out) = Rig::bootstrapped(1);
    rig.post_bootstrapped();
    let id = created(&out)[0].dispatcher;
    rig.heartbeat(vec![status(id, ComponentState::Working, 100)], 200, 1);
    rig.heartbeat(vec![status(id, ComponentState::Stopped, 250)], 200, 1);
    let mut out = Vec::new();
    rig.core.on_tick(rig.now, &mut out);
    let configs = created(&out);
    assert_eq!((configs.len(), configs[0].start_ts), (1, Ts(250)));
}

#[test]
fn what_runs_already_is_taken_over_and_what_nobody_wants_is_removed() {
    let mut rig = Rig::new();
    let mut out = Vec::new();
    rig.core.on_nodes([ME.into()].into(), rig.now, &mut out);
    rig.core.on_tables(tables(2), rig.now, &mut out);
    let span = |id: u64, table: i64| BootstrapTableSpan {
        id: DispatcherId::new(9, id),
        schema: SchemaId(1),
        span: TableSpan::whole(TableId(table)),
        state: ComponentState::Working,
        checkpoint: Ts(150),
        block: None,
        mode: Mode::Default,
    };
    let answer = rig.bootstrap_answer(vec![span(1, 1), span(2, 77), span(3, 1)], 5);
    out.clear();
    rig.core.on_bootstrap(&ME.into(), answer, rig.now, &mut out);
    let made: Vec<TableId> = created(&out).iter().map(|config| config.span.table).collect();
    assert_eq!(made, [TableId(2)]);
    let removed: Vec<DispatcherId> = out
        .iter()
        .filter_map(|effect| match effect {
            Effect::Dispatch(_, ToHeartbeatCollector::Schedule(request))
                if request.action == ScheduleAction::Remove =>
            {
                Some(request.config.dispatcher)
            }
            Effect::Dispatch(..) | Effect::Orchestrate(..) | Effect::Changed | Effect::Closed => None,
        })
        .collect();
    assert_eq!(removed, [DispatcherId::new(9, 2), DispatcherId::new(9, 3)]);
}

#[test]
fn an_error_report_reaches_the_status() {
    let (mut rig, _) = Rig::bootstrapped(1);
    let request = HeartBeatRequest {
        changefeed: rig.core.id.clone(),
        watermark: None,
        redo_watermark: None,
        statuses: vec![],
        complete: false,
        error: Some(RunningError {
            time: String::new(),
            node: ME.to_owned(),
            code: "CDC:ErrTest".to_owned(),
            message: "m".to_owned(),
        }),
    };
    let mut out = Vec::new();
    rig.core.on_heartbeat(&ME.into(), request, &mut out);
    assert!(out.contains(&Effect::Changed));
    assert_eq!(rig.core.status().errors[0].code, "CDC:ErrTest");
}

#[test]
fn a_removal_closes_every_node_repeats_itself_and_creates_nothing_more() {
    let (mut rig, _) = Rig::bootstrapped(1);
    let mut out = Vec::new();
    rig.core.on_remove(true, false, rig.now, &mut out);
    let closes = |out: &[Effect]| {
        out.iter().filter(|e| matches!(e, Effect::Orchestrate(_, ToOrchestrator::Close(_)))).count()
    };
    assert_eq!(closes(&out), 1);
    out.clear();
    rig.core.on_tick(rig.now + CLOSE_RESEND, &mut out);
    assert_eq!((closes(&out), created(&out).len()), (1, 0), "MT-5");
    out.clear();
    let answer =
        |success| MaintainerCloseResponse { changefeed: rig.core.id.clone(), success, epoch: epoch(5) };
    let (still, done) = (answer(false), answer(true));
    rig.core.on_close(&ME.into(), &still, &mut out);
    assert!(!rig.core.is_stopped());
    rig.core.on_close(&ME.into(), &done, &mut out);
    assert!(rig.core.is_stopped());
    assert!(out.contains(&Effect::Closed));
    assert_eq!(rig.core.status().state, ComponentState::Stopped);
}
