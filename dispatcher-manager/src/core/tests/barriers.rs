//! Block events: reports, replies, and whom they reach; events and checkpoints that come.

use super::*;

#[test]
fn a_waiting_report_is_repeated_until_it_is_acknowledged() {
    let mut x = Bench::new();
    x.working(1);
    x.beat();
    x.core.next_heartbeat = None;
    assert_eq!(x.arrive(1, block(wide(100))), "flush 1");
    x.core.on_flush_finished(x.slot(1), Ok(()), x.now);
    assert_eq!(x.wait(10), "block [1 WAITING 100]");
    assert_eq!(x.wait(4_000), "");
    assert_eq!(x.wait(990), "", "suppressed while the first one has not left");
    let sent =
        x.last(|action| if let Action::BlockStatus(request) = action { Some(request.clone()) } else { None });
    x.core.on_block_statuses_sent(&sent);
    assert_eq!(x.wait(5_000), "");
    assert_eq!(x.wait(10), "block [1 WAITING 100]");
    assert_eq!(x.respond(&a(), 1, ack(100)), "");
    assert_eq!(x.wait(20_000), "");
}

// behaviour: dispatcher-53
#[test]
fn a_barrier_reply_of_an_earlier_owner_reaches_nobody() {
    let mut x = Bench::new();
    x.working(1);
    x.arrive(1, block(wide(100)));
    x.core.on_flush_finished(x.slot(1), Ok(()), x.now);
    x.wait(10);
    x.bootstrap(&b(), None, 2);
    x.take();
    assert_eq!(x.respond(&a(), 1, act(BlockAction::Write, 100)), "");
    assert_eq!(x.respond(&b(), 1, act(BlockAction::Write, 100)), "");
    assert_eq!(x.respond(&b(), 2, act(BlockAction::Write, 100)), "execute 100");
}

fn to(influenced: Option<InfluencedDispatchers>) -> DispatcherStatus {
    DispatcherStatus { influenced, ..act(BlockAction::Pass, 100) }
}

#[test]
fn a_barrier_reply_reaches_exactly_those_it_is_for() {
    let mut x = Bench::new();
    x.trigger(9);
    for n in 1..=3 {
        x.working(n);
    }
    for n in [1, 2, 3, 9] {
        x.arrive(n, block(wide(100)));
        x.core.on_flush_finished(x.slot(n), Ok(()), x.now);
    }
    x.core.next_heartbeat = None;
    x.wait(10);
    let done = |x: &mut Bench, status: DispatcherStatus| {
        x.respond(&a(), 1, status);
        let actions = x.wait(10);
        [1u64, 2, 3, 9].into_iter().filter(|n| actions.contains(&format!("{n} DONE"))).collect::<Vec<_>>()
    };
    assert_eq!(done(&mut x, to(None)), Vec::<u64>::new());
    assert_eq!(done(&mut x, to(Some(InfluencedDispatchers::Normal(vec![id(2), id(77)])))), vec![2]);
    let schema = InfluencedDispatchers::Schema { schema: SchemaId(1), except: Some(id(1)) };
    x.core.blocks.clear();
    let reached = done(&mut x, to(Some(schema)));
    assert_eq!(
        reached,
        vec![2, 3, 9],
        "those that are done say so again; the trigger belongs to every schema"
    );
    x.core.blocks.clear();
    assert_eq!(done(&mut x, to(Some(InfluencedDispatchers::All { except: Some(id(3)) }))), vec![1, 2, 9]);
}

#[test]
fn a_dispatcher_hears_replies_only_between_its_first_event_and_its_end() {
    let mut x = Bench::new();
    x.schedule(&a(), ScheduleAction::Create, 1, 1);
    x.opened(1, 60);
    let all = DispatcherStatus {
        influenced: Some(InfluencedDispatchers::All { except: None }),
        ..act(BlockAction::Pass, 50)
    };
    x.respond(&a(), 1, all.clone());
    assert_eq!(x.core.waiting_block_statuses(), 0);
    x.arrive(1, resolved(60));
    x.respond(&a(), 1, all.clone());
    assert_eq!(x.core.waiting_block_statuses(), 1);
    x.core.blocks.clear();
    x.schedule(&a(), ScheduleAction::Remove, 1, 1);
    x.respond(&a(), 1, all);
    assert_eq!(x.core.waiting_block_statuses(), 0);
}

#[test]
fn a_rename_changes_who_hears_a_schema_barrier() {
    let mut x = Bench::new();
    x.working(1);
    x.working(2);
    let change =
        heartbeatpb::SchemaChange { table: heartbeatpb::TableId(1), old: SchemaId(1), new: SchemaId(2) };
    x.arrive(1, block(event::DdlEvent { schema_changes: vec![change], ..ddl(100) }));
    assert_eq!(x.core.dispatchers.of_schema(SchemaId(1)), vec![x.slot(2)]);
    assert_eq!(x.core.dispatchers.of_schema(SchemaId(2)), vec![x.slot(1)]);
}

// behaviour: dispatcher-78
#[test]
fn a_slow_ddl_of_one_dispatcher_delays_no_other() {
    let mut x = Bench::new();
    x.working(1);
    x.working(2);
    assert_eq!(x.arrive(1, block(ddl(100))), "flush 1");
    x.core.on_flush_finished(x.slot(1), Ok(()), x.now);
    assert_eq!(x.take(), "execute 100");
    assert_eq!(x.arrive(2, block(ddl(101))), "flush 2");
    x.core.on_flush_finished(x.slot(2), Ok(()), x.now);
    assert_eq!(x.take(), "execute 101");
    x.core.on_block_written(x.slot(2), Ok(()), x.now);
    assert_eq!(x.arrive(2, rows(&[110])), "write 2");
    assert_eq!(x.arrive(1, rows(&[110])), "");
}

// behaviour: dispatcher-77
#[test]
fn the_trigger_holds_a_wide_barrier_until_the_owner_knows_its_tables() {
    let mut x = Bench::new();
    x.trigger(9);
    x.core.next_heartbeat = None;
    x.arrive(9, Arrival::Block(BlockEvent::Ddl(std::sync::Arc::new(adding(100, &[5])))));
    x.core.on_flush_finished(x.slot(9), Ok(()), x.now);
    assert_eq!(x.take(), "execute 100");
    x.core.on_block_written(x.slot(9), Ok(()), x.now);
    assert_eq!(x.arrive(9, block(wide(110))), "");
    assert_eq!(x.wait(10), "block [9 NONE 100 +5]");
    assert_eq!(x.respond(&a(), 1, ack(100)), "flush 9");
    x.core.on_flush_finished(x.slot(9), Ok(()), x.now);
    assert_eq!(x.wait(10), "block [9 WAITING 110]");
}

#[test]
fn a_barrier_in_flight_is_told_to_a_new_owner() {
    let mut x = Bench::new();
    x.working(1);
    x.arrive(1, block(wide(100)));
    x.core.on_flush_finished(x.slot(1), Ok(()), x.now);
    let BootstrapStep::Reply(response) = x.core.on_bootstrap(&b(), &x.bootstrap_request(None, 2), false)
    else {
        panic!("allowed");
    };
    let span = &response.spans[0];
    assert_eq!((span.id, span.state, span.checkpoint), (id(1), ComponentState::Working, Ts(60)));
    assert_eq!(span.block.as_ref().map(|block| block.stage), Some(BlockStage::Waiting));
    assert_eq!(response.epoch, epoch(2));
}

// behaviour: dispatcher-44
#[test]
fn checkpoints_reach_the_sink_from_the_owner_only_and_never_go_back() {
    let mut x = Bench::new();
    let request = x.bootstrap_request(Some(1), 1);
    x.core.on_bootstrap(&a(), &request, true);
    x.opened(1, 50);
    assert_eq!(x.checkpoint_message(&a(), 70), "", "dropped before the trigger is registered");
    assert!(matches!(x.post_bootstrap(&a(), 1, 1), PostBootstrapStep::Reply(_)));
    x.take();
    assert_eq!(x.checkpoint_message(&b(), 70), "");
    assert_eq!(x.checkpoint_message(&a(), 70), "publish 70");
    assert_eq!(x.checkpoint_message(&a(), 60), "");
    assert_eq!(x.checkpoint_message(&a(), 70), "");
    assert_eq!(x.checkpoint_message(&a(), 80), "publish 80");
    x.core.stop();
    x.take();
    assert_eq!(x.checkpoint_message(&a(), 90), "");
}

#[test]
fn large_transactions_tell_the_log_how_far_they_are_durable() {
    let mut x = Bench::new();
    x.working(1);
    x.arrive(1, rows(&[100; 5000]));
    x.core.on_flushed(x.slot(1), x.last_ticket());
    assert_eq!(x.beat(), "copied 1 100+5000; beat 99/60 seq 1");
    assert_eq!(x.beat(), "beat 99/60 seq 1");
}

#[test]
fn an_event_for_nobody_is_dropped() {
    let mut x = Bench::new();
    assert_eq!(x.arrive(5, rows(&[100])), "");
}
