//! Every message survives the wire; unusable ones are refused.

use proptest::prelude::*;
use prost::Message as _;

use super::*;
use crate::*;

fn id() -> impl Strategy<Value = DispatcherId> {
    (1..u64::MAX, any::<u64>()).prop_map(|(high, low)| DispatcherId::new(high, low))
}

fn feed() -> impl Strategy<Value = ChangefeedId> {
    (any::<u64>(), any::<u64>(), "[a-z]{0,8}", "[a-z]{0,8}").prop_map(|(high, low, name, keyspace)| {
        ChangefeedId { gid: Gid::new(high, low), name: name.into(), keyspace: keyspace.into() }
    })
}

fn ts() -> impl Strategy<Value = Ts> {
    prop_oneof![Just(Ts::ZERO), Just(Ts::MAX), any::<u64>().prop_map(Ts)]
}

fn any_mode() -> impl Strategy<Value = Mode> {
    prop_oneof![Just(Mode::Default), Just(Mode::Redo)]
}

fn any_epoch() -> impl Strategy<Value = Option<MaintainerEpoch>> {
    prop_oneof![Just(0), Just(u64::MAX), any::<u64>()].prop_map(MaintainerEpoch::from_wire)
}

fn node_id() -> impl Strategy<Value = NodeId> {
    "[a-z0-9-]{1,12}".prop_map(NodeId::from)
}

fn span() -> impl Strategy<Value = TableSpan> {
    let key = || proptest::collection::vec(any::<u8>(), 0..6);
    (any::<u32>(), any::<i64>(), key(), key()).prop_map(|(keyspace_id, table, start, end)| TableSpan {
        keyspace_id,
        table: TableId(table),
        start,
        end,
    })
}

fn component_state() -> impl Strategy<Value = ComponentState> {
    prop_oneof![
        Just(ComponentState::Working),
        Just(ComponentState::Stopped),
        Just(ComponentState::Removed),
        Just(ComponentState::Initializing),
        Just(ComponentState::Preparing),
        Just(ComponentState::MergeReady),
        Just(ComponentState::WaitingMerge),
    ]
}

fn node_liveness() -> impl Strategy<Value = NodeLiveness> {
    prop_oneof![Just(NodeLiveness::Alive), Just(NodeLiveness::Draining), Just(NodeLiveness::Stopping)]
}

fn running_error() -> impl Strategy<Value = RunningError> {
    (".{0,6}", ".{0,6}", ".{0,6}", ".{0,6}").prop_map(|(time, node, code, message)| RunningError {
        time,
        node,
        code,
        message,
    })
}

fn watermark() -> impl Strategy<Value = Watermark> {
    (ts(), ts(), any::<u64>(), ts()).prop_map(|(checkpoint, resolved, seq, last_synced)| Watermark {
        checkpoint,
        resolved,
        seq,
        last_synced,
    })
}

fn many<T: std::fmt::Debug>(of: impl Strategy<Value = T>) -> impl Strategy<Value = Vec<T>> {
    proptest::collection::vec(of, 0..4)
}

fn maybe<T: std::fmt::Debug>(of: impl Strategy<Value = T>) -> impl Strategy<Value = Option<T>> {
    proptest::option::of(of)
}

fn span_status() -> impl Strategy<Value = TableSpanStatus> {
    (id(), component_state(), ts(), 0f32..1e9, any_mode()).prop_map(
        |(id, state, checkpoint, event_size_per_second, mode)| TableSpanStatus {
            id,
            state,
            checkpoint,
            event_size_per_second,
            mode,
        },
    )
}

fn heartbeat() -> impl Strategy<Value = HeartBeatRequest> {
    (
        feed(),
        maybe(watermark()),
        maybe(watermark()),
        many(span_status()),
        any::<bool>(),
        maybe(running_error()),
        maybe(running_error()),
    )
        .prop_map(|(changefeed, watermark, redo_watermark, statuses, complete, error, trouble)| {
            let trouble = trouble.map(Box::new);
            HeartBeatRequest { changefeed, watermark, redo_watermark, statuses, complete, error, trouble }
        })
}

fn drain() -> impl Strategy<Value = DrainProgress> {
    (node_id(), any::<u64>(), any::<u32>(), any::<u32>()).prop_map(
        |(target, epoch, dispatchers, inflight_moves)| DrainProgress {
            target,
            epoch,
            dispatchers,
            inflight_moves,
        },
    )
}

fn maintainer_status() -> impl Strategy<Value = MaintainerStatus> {
    (
        (feed(), "[a-z]{0,8}", component_state(), ts(), many(running_error())),
        (any::<bool>(), ts(), maybe(drain()), any_epoch(), maybe(1..i64::MAX), maybe(running_error())),
    )
        .prop_map(
            |(
                (changefeed, feed_state, state, checkpoint, errors),
                (bootstrap_done, last_synced, drain, epoch, checkpoint_time, trouble),
            )| {
                MaintainerStatus {
                    changefeed,
                    feed_state,
                    state,
                    checkpoint,
                    errors,
                    bootstrap_done,
                    last_synced,
                    drain,
                    epoch,
                    checkpoint_time: checkpoint_time.map(WallTime),
                    trouble,
                }
            },
        )
}

fn influenced_tables() -> impl Strategy<Value = InfluencedTables> {
    prop_oneof![
        Just(InfluencedTables::All),
        any::<i64>().prop_map(|schema| InfluencedTables::Schema(SchemaId(schema))),
        many(any::<i64>().prop_map(TableId)).prop_map(InfluencedTables::Normal),
    ]
}

fn route() -> impl Strategy<Value = RouteAdmission> {
    let name = || ("[a-z]{0,5}", "[a-z]{0,5}");
    prop_oneof![
        (name(), name()).prop_map(|(source, target)| RouteAdmission::Admit { source, target }),
        name().prop_map(|source| RouteAdmission::Release { source }),
        "[a-z]{0,5}".prop_map(|schema| RouteAdmission::ReleaseSchema { schema }),
    ]
}

fn barrier() -> impl Strategy<Value = BarrierKey> {
    (ts(), any::<bool>()).prop_map(|(commit_ts, is_sync_point)| BarrierKey { commit_ts, is_sync_point })
}

fn block_state() -> impl Strategy<Value = BlockState> {
    let added = (any::<i64>(), any::<i64>(), any::<bool>()).prop_map(|(table, schema, splittable)| {
        AddedTable { table: TableId(table), schema: SchemaId(schema), splittable }
    });
    let change = (any::<i64>(), any::<i64>(), any::<i64>()).prop_map(|(table, old, new)| SchemaChange {
        table: TableId(table),
        old: SchemaId(old),
        new: SchemaId(new),
    });
    let stage = prop_oneof![
        Just(BlockStage::None),
        Just(BlockStage::Waiting),
        Just(BlockStage::Writing),
        Just(BlockStage::Done)
    ];
    (
        any::<bool>(),
        barrier(),
        maybe(influenced_tables()),
        maybe(influenced_tables()),
        many(added),
        many(change),
        stage,
        many(route()),
    )
        .prop_map(|(is_blocked, key, blocked, dropped, added, schema_changes, stage, routes)| {
            BlockState { is_blocked, key, blocked, dropped, added, schema_changes, stage, routes }
        })
}

fn block_status() -> impl Strategy<Value = BlockStatusRequest> {
    let status = (id(), any_mode(), block_state()).prop_map(|(id, mode, state)| TableSpanBlockStatus {
        id,
        mode,
        state,
    });
    (feed(), any_mode(), many(status)).prop_map(|(changefeed, mode, statuses)| BlockStatusRequest {
        changefeed,
        mode,
        statuses,
    })
}

fn heartbeat_response() -> impl Strategy<Value = HeartBeatResponse> {
    let influenced = prop_oneof![
        maybe(id()).prop_map(|except| InfluencedDispatchers::All { except }),
        (any::<i64>(), maybe(id()))
            .prop_map(|(schema, except)| InfluencedDispatchers::Schema { schema: SchemaId(schema), except }),
        many(id()).prop_map(InfluencedDispatchers::Normal),
    ];
    let action = (prop_oneof![Just(BlockAction::Write), Just(BlockAction::Pass)], barrier());
    let status = (maybe(influenced), maybe(barrier()), maybe(barrier()), maybe(action))
        .prop_map(|(influenced, ack, ignored, action)| DispatcherStatus { influenced, ack, ignored, action });
    (feed(), any_mode(), many(status), any_epoch()).prop_map(|(changefeed, mode, statuses, epoch)| {
        HeartBeatResponse { changefeed, mode, statuses, epoch }
    })
}

fn schedule() -> impl Strategy<Value = ScheduleDispatcherRequest> {
    let config = (span(), ts(), id(), any::<i64>(), any_mode(), any::<bool>()).prop_map(
        |(span, start_ts, dispatcher, schema, mode, skip_dml_at_start)| DispatcherConfig {
            span,
            start_ts,
            dispatcher,
            schema: SchemaId(schema),
            mode,
            skip_dml_at_start,
        },
    );
    let action = prop_oneof![Just(ScheduleAction::Create), Just(ScheduleAction::Remove)];
    let operator = prop_oneof![
        Just(OperatorType::Add),
        Just(OperatorType::Remove),
        Just(OperatorType::Move),
        Just(OperatorType::Split),
        Just(OperatorType::Merge)
    ];
    (feed(), config, action, operator, any_epoch()).prop_map(
        |(changefeed, config, action, operator, epoch)| ScheduleDispatcherRequest {
            changefeed,
            config,
            action,
            operator,
            epoch,
        },
    )
}

fn merge() -> impl Strategy<Value = MergeDispatcherRequest> {
    (feed(), many(id()), id(), any_mode(), any_epoch()).prop_map(
        |(changefeed, sources, merged, mode, epoch)| MergeDispatcherRequest {
            changefeed,
            sources,
            merged,
            mode,
            epoch,
        },
    )
}

fn config_bytes() -> impl Strategy<Value = ConfigBytes> {
    proptest::collection::vec(any::<u8>(), 0..16).prop_map(|bytes| ConfigBytes(bytes.into()))
}

fn bootstrap() -> impl Strategy<Value = MaintainerBootstrapRequest> {
    (feed(), config_bytes(), ts(), maybe(id()), any::<bool>(), maybe(id()), any::<u32>(), any_epoch())
        .prop_map(|(changefeed, config, start_ts, trigger, is_new, redo_trigger, keyspace_id, epoch)| {
            MaintainerBootstrapRequest {
                changefeed,
                config,
                start_ts,
                trigger,
                is_new,
                redo_trigger,
                keyspace_id,
                epoch,
            }
        })
}

fn bootstrap_response() -> impl Strategy<Value = MaintainerBootstrapResponse> {
    let reported_span =
        (id(), any::<i64>(), span(), component_state(), ts(), maybe(block_state()), any_mode()).prop_map(
            |(id, schema, span, state, checkpoint, block, mode)| BootstrapTableSpan {
                id,
                schema: SchemaId(schema),
                span,
                state,
                checkpoint,
                block,
                mode,
            },
        );
    (
        feed(),
        many(reported_span),
        maybe(running_error()),
        ts(),
        ts(),
        many(schedule()),
        many(merge()),
        any_epoch(),
    )
        .prop_map(|(changefeed, spans, error, checkpoint, redo_checkpoint, operators, merges, epoch)| {
            MaintainerBootstrapResponse {
                changefeed,
                spans,
                error,
                checkpoint,
                redo_checkpoint,
                operators,
                merges,
                epoch,
            }
        })
}

fn post_bootstrap() -> impl Strategy<Value = MaintainerPostBootstrapRequest> {
    let schemas = || {
        let table = (any::<i64>(), "[a-z]{0,5}").prop_map(|(id, name)| TableName { id: TableId(id), name });
        many((any::<i64>(), "[a-z]{0,5}", many(table)).prop_map(|(id, name, tables)| SchemaTables {
            id: SchemaId(id),
            name,
            tables,
        }))
    };
    (feed(), id(), schemas(), schemas(), any_epoch()).prop_map(
        |(changefeed, trigger, schemas, redo_schemas, epoch)| MaintainerPostBootstrapRequest {
            changefeed,
            trigger,
            schemas,
            redo_schemas,
            epoch,
        },
    )
}

/// A value, through its wire type and its bytes, and back.
fn over_the_wire<D, W>(value: &D) -> D
where
    D: Clone + TryFrom<W>,
    D::Error: std::fmt::Debug,
    W: prost::Message + Default + From<D>,
{
    let bytes = W::from(value.clone()).encode_to_vec();
    D::try_from(W::decode(bytes.as_slice()).expect("own bytes")).expect("own message")
}

/// Equality that also looks at the display names of ids.
macro_rules! assert_survives {
    ($value:expr, $wire:ident) => {{
        let value = $value;
        let back = over_the_wire::<_, pb::$wire>(&value);
        prop_assert_eq!(&back, &value);
        prop_assert_eq!(format!("{back:?}"), format!("{value:?}"));
    }};
}

// behaviour: messaging-16
proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn progress_survives_the_wire(
        heartbeat in heartbeat(), statuses in many(maintainer_status()), live in node_liveness(),
        epochs in (any::<u64>(), any::<u64>()), target in maybe(node_id()),
    ) {
        assert_survives!(heartbeat, HeartBeatRequest);
        assert_survives!(statuses, MaintainerHeartbeat);
        assert_survives!(
            NodeHeartbeat { liveness: live, node_epoch: epochs.0, drain_target: target, drain_epoch: epochs.1 },
            NodeHeartbeat
        );
    }

    #[test]
    fn barriers_survive_the_wire(request in block_status(), response in heartbeat_response()) {
        assert_survives!(request, BlockStatusRequest);
        assert_survives!(response, HeartBeatResponse);
    }

    #[test]
    fn placement_survives_the_wire(schedule in schedule(), merge in merge(), changefeed in feed(), checkpoint in ts()) {
        assert_survives!(schedule, ScheduleDispatcherRequest);
        assert_survives!(merge, MergeDispatcherRequest);
        assert_survives!(CheckpointTsMessage { changefeed, checkpoint }, CheckpointTsMessage);
    }

    #[test]
    fn the_life_of_a_manager_survives_the_wire(
        request in bootstrap(), response in bootstrap_response(), post in post_bootstrap(), changefeed in feed(),
        trigger in maybe(id()), error in maybe(running_error()), flag in any::<bool>(), epoch in any_epoch(),
    ) {
        assert_survives!(request, MaintainerBootstrapRequest);
        assert_survives!(response, MaintainerBootstrapResponse);
        assert_survives!(post, MaintainerPostBootstrapRequest);
        let changefeed = || changefeed.clone();
        assert_survives!(
            MaintainerPostBootstrapResponse { changefeed: changefeed(), trigger, error, epoch },
            MaintainerPostBootstrapResponse
        );
        assert_survives!(
            MaintainerCloseRequest { changefeed: changefeed(), removed: flag, epoch },
            MaintainerCloseRequest
        );
        assert_survives!(
            MaintainerCloseResponse { changefeed: changefeed(), success: flag, epoch },
            MaintainerCloseResponse
        );
    }

    #[test]
    fn what_coordinator_and_nodes_say_survives_the_wire(
        changefeed in feed(), config in config_bytes(), checkpoint in ts(), is_new in any::<bool>(),
        removed in any::<bool>(), keyspace_id in any::<u32>(), epoch in any_epoch(), version in any::<i64>(),
        statuses in many(maintainer_status()), live in node_liveness(), number in any::<u64>(),
        target in maybe(node_id()),
    ) {
        let add =
            AddMaintainerRequest { changefeed: changefeed.clone(), config, checkpoint, is_new, keyspace_id, epoch };
        assert_survives!(add, AddMaintainerRequest);
        let remove = RemoveMaintainerRequest { changefeed, cascade: removed || is_new, removed, keyspace_id, epoch };
        assert_survives!(remove, RemoveMaintainerRequest);
        assert_survives!(CoordinatorBootstrapRequest { version }, CoordinatorBootstrapRequest);
        let answer = CoordinatorBootstrapResponse {
            statuses,
            drain_protocol_version: keyspace_id,
            drain_target: target.clone(),
            drain_epoch: number,
        };
        assert_survives!(answer, CoordinatorBootstrapResponse);
        assert_survives!(SetNodeLivenessRequest { target: live, node_epoch: number }, SetNodeLivenessRequest);
        assert_survives!(SetNodeLivenessResponse { applied: live, node_epoch: number }, SetNodeLivenessResponse);
        assert_survives!(SetDispatcherDrainTargetRequest { target, epoch: number }, SetDispatcherDrainTargetRequest);
    }

    #[test]
    fn bytes_of_a_stranger_never_crash_the_conversion(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
        if let Ok(wire) = pb::HeartBeatRequest::decode(bytes.as_slice()) {
            let _ = HeartBeatRequest::try_from(wire);
        }
        if let Ok(wire) = pb::MaintainerBootstrapResponse::decode(bytes.as_slice()) {
            let _ = MaintainerBootstrapResponse::try_from(wire);
        }
        if let Ok(wire) = pb::HeartBeatResponse::decode(bytes.as_slice()) {
            let _ = HeartBeatResponse::try_from(wire);
        }
        if let Ok(wire) = pb::BlockStatusRequest::decode(bytes.as_slice()) {
            let _ = BlockStatusRequest::try_from(wire);
        }
    }
}

const ID: pb::DispatcherId = pb::DispatcherId { high: 1, low: 2 };

fn wire_feed() -> Option<pb::ChangefeedId> {
    Some(pb::ChangefeedId { high: 1, low: 2, name: "f".into(), keyspace: "default".into() })
}

#[test]
fn a_zero_or_absent_dispatcher_id_is_refused() {
    let zero = pb::DispatcherId { high: 0, low: 0 };
    assert_eq!(
        DispatcherId::try_from(zero),
        Err(DecodeError::Unusable { message: "DispatcherID", field: "value" })
    );
    let absent = pb::TableSpanStatus { id: None, ..Default::default() };
    let error = TableSpanStatus::try_from(absent).expect_err("no id");
    assert_eq!(error.to_string(), "TableSpanStatus has no ID");
}

#[test]
fn a_message_without_its_changefeed_is_refused() {
    let error = HeartBeatRequest::try_from(pb::HeartBeatRequest::default()).expect_err("no changefeed");
    assert_eq!(error, DecodeError::Missing { message: "HeartBeatRequest", field: "changefeedID" });
}

#[test]
fn an_unknown_state_or_mode_hides_only_its_own_report() {
    let good = pb::TableSpanStatus { id: Some(ID), ..Default::default() };
    let request = pb::HeartBeatRequest {
        changefeed_id: wire_feed(),
        statuses: vec![
            pb::TableSpanStatus { component_status: 99, ..good },
            good,
            pb::TableSpanStatus { mode: 7, ..good },
            pb::TableSpanStatus { id: None, ..good },
        ],
        ..Default::default()
    };
    let request = HeartBeatRequest::try_from(request).expect("usable");
    assert_eq!(request.statuses.len(), 1);
    assert_eq!(request.statuses[0].state, ComponentState::Working, "zero is not transmitted");
}

#[test]
fn an_unknown_action_is_refused_and_not_guessed() {
    let mut request = pb::ScheduleDispatcherRequest {
        changefeed_id: wire_feed(),
        config: Some(pb::DispatcherConfig {
            span: Some(pb::TableSpan::default()),
            dispatcher_id: Some(ID),
            ..Default::default()
        }),
        ..Default::default()
    };
    assert!(ScheduleDispatcherRequest::try_from(request.clone()).is_ok());
    request.schedule_action = 2;
    assert!(ScheduleDispatcherRequest::try_from(request).is_err());

    let status = |action| pb::DispatcherStatus {
        action: Some(pb::DispatcherAction { action, commit_ts: 5, is_sync_point: false }),
        ..Default::default()
    };
    let response = pb::HeartBeatResponse {
        changefeed_id: wire_feed(),
        dispatcher_statuses: vec![status(1), status(2)],
        ..Default::default()
    };
    let response = HeartBeatResponse::try_from(response).expect("usable");
    let key = BarrierKey { commit_ts: Ts(5), is_sync_point: false };
    assert_eq!(response.statuses.len(), 1);
    assert_eq!(response.statuses[0].action, Some((BlockAction::Pass, key)));
}

#[test]
fn an_unknown_scope_never_drops_every_table() {
    let state = pb::State {
        need_dropped_tables: Some(pb::InfluencedTables { influence_type: 9, ..Default::default() }),
        ..Default::default()
    };
    assert!(BlockState::try_from(state).is_err());
}

#[test]
fn an_unknown_liveness_reads_as_alive() {
    let heartbeat = NodeHeartbeat::from(pb::NodeHeartbeat { liveness: 3, ..Default::default() });
    assert_eq!(heartbeat.liveness, NodeLiveness::Alive);
}

#[test]
fn an_empty_drain_target_means_none() {
    let request = SetDispatcherDrainTargetRequest::from(pb::SetDispatcherDrainTargetRequest {
        target_node_id: String::new(),
        target_epoch: 4,
    });
    assert_eq!(request, SetDispatcherDrainTargetRequest { target: None, epoch: 4 });
}

#[test]
fn removing_a_changefeed_implies_closing_its_managers() {
    let request = pb::RemoveMaintainerRequest { id: wire_feed(), removed: true, ..Default::default() };
    assert!(RemoveMaintainerRequest::try_from(request).expect("usable").cascade);
}

#[test]
fn neither_form_of_a_configuration_shows_its_content() {
    let secret = b"postgres://user:hunter2@host".to_vec();
    let wire = pb::AddMaintainerRequest { id: wire_feed(), config: secret.clone(), ..Default::default() };
    let bootstrap =
        pb::MaintainerBootstrapRequest { changefeed_id: wire_feed(), config: secret, ..Default::default() };
    let domain = AddMaintainerRequest::try_from(wire.clone()).expect("usable");
    for text in [format!("{wire:?}"), format!("{domain:?}"), format!("{bootstrap:?}")] {
        assert!(text.contains("28 bytes"), "{text}");
        assert!(!text.contains("104"), "{text}");
    }
}
