//! Histories of merges.

use heartbeatpb::{MergeDispatcherRequest, TableId, TableSpan};

use super::*;

/// Table 1 in as many parts as there are bounds and one more.
fn parts(bounds: &[&str]) -> Vec<TableSpan> {
    let starts = std::iter::once("").chain(bounds.iter().copied());
    let ends = bounds.iter().copied().chain(std::iter::once(""));
    starts
        .zip(ends)
        .map(|(start, end)| TableSpan {
            start: start.into(),
            end: end.into(),
            ..TableSpan::whole(TableId(1))
        })
        .collect()
}

impl Bench {
    /// Dispatchers 1, 2, … of parts of table 1 that have seen their first event.
    fn divided(bounds: &[&str]) -> Self {
        let mut x = Bench::new();
        for (n, span) in (1..).zip(parts(bounds)) {
            let mut request = x.request(ScheduleAction::Create, n, 1);
            request.config.span = span;
            x.core.on_schedule(&a(), request, x.now);
            x.opened(n, 60);
            x.arrive(n, Arrival::Begin(Some(table(1, 1))));
            x.core.on_table_opened(x.slot(n), Ok(()), x.now);
            x.arrive(n, resolved(60));
        }
        x.wait(11);
        x.beat();
        x.core.next_heartbeat = None;
        x
    }

    fn merge_by(&mut self, from: &NodeId, e: u64, sources: &[u64], merged: u64) -> String {
        let request = MergeDispatcherRequest {
            changefeed: self.feed.clone(),
            sources: sources.iter().map(|n| id(*n)).collect(),
            merged: id(merged),
            mode: Mode::Default,
            epoch: epoch(e),
        };
        self.core.on_merge(from, request, self.now);
        self.take()
    }

    fn merge(&mut self, sources: &[u64], merged: u64) -> String {
        self.merge_by(&a(), 1, sources, merged)
    }

    fn flush(&mut self, n: u64, ticket: Ticket) -> String {
        self.core.on_flushed(self.slot(n), ticket);
        self.take()
    }

    fn state(&self, n: u64) -> Option<ComponentState> {
        let slot = self.core.dispatchers.slot(id(n))?;
        self.core.dispatchers.get(slot).map(|dispatcher| dispatcher.state)
    }

    fn states(&self, ids: &[u64]) -> String {
        let shown: Vec<String> =
            ids.iter().map(|n| self.state(*n).map_or("-".into(), |state| format!("{state:?}"))).collect();
        shown.join(" ")
    }

    fn span(&self, n: u64) -> TableSpan {
        self.core.dispatchers.get(self.slot(n)).expect("present").span.clone()
    }

    /// Both dispatchers of a divided table stand in front of the barrier at 100.
    fn at_barrier(&mut self, ids: &[u64]) {
        for n in ids {
            self.arrive(*n, block(ddl(100)));
            self.core.on_flush_finished(self.slot(*n), Ok(()), self.now);
        }
        self.wait(10);
    }
}

// behaviour: dispatcher-31, dispatcher-33
#[test]
fn the_joined_dispatcher_starts_where_the_slowest_source_stopped() {
    let mut x = Bench::divided(&["m"]);
    x.arrive(1, resolved(300));
    assert_eq!(x.arrive(2, rows(&[201])), "write 2");
    let ticket = x.last_ticket();
    x.arrive(2, resolved(400));
    assert_eq!(x.merge(&[1, 2], 9), "", "what is with the sink is waited for");
    assert_eq!(x.states(&[1, 2, 9]), "WaitingMerge WaitingMerge MergeReady");
    assert!(x.span(9).is_whole());
    assert_eq!(x.arrive(1, rows(&[310])), "", "a source takes nothing more");
    assert_eq!(x.beat(), "beat 200/300 seq 3", "the sources count, the joined one does not");
    assert_eq!(x.flush(2, ticket), "open 9@300");
    assert_eq!(x.opened(9, 300), "subscribe 9@300 at a; unsubscribe 1; unsubscribe 2");
    assert_eq!(x.states(&[1, 2, 9]), "WaitingMerge WaitingMerge Initializing");
    assert_eq!(
        x.beat(),
        "close 1; close 2; beat 300/300 seq 4 1:Stopped@300 2:Stopped@400",
        "those that go count once more"
    );
    x.arrive(9, Arrival::Begin(Some(table(1, 1))));
    x.core.on_table_opened(x.slot(9), Ok(()), x.now);
    x.core.next_heartbeat = None;
    assert_eq!(x.arrive(9, rows(&[310])), "write 9");
    assert_eq!(x.wait(10), "beat 300/300 seq 4 9:Working@309");
}

// behaviour: dispatcher-31, dispatcher-33
#[test]
fn three_sources_are_joined_at_the_smallest_checkpoint() {
    let mut x = Bench::divided(&["g", "p"]);
    x.arrive(1, resolved(300));
    x.arrive(2, resolved(100));
    x.arrive(3, resolved(200));
    assert_eq!(x.merge(&[1, 2, 3], 9), "open 9@100");
    assert!(x.span(9).is_whole());
    assert_eq!(x.opened(9, 100), "subscribe 9@100 at a; unsubscribe 1; unsubscribe 2; unsubscribe 3");
}

#[test]
fn neighbours_in_the_middle_are_joined_and_touch_the_rest() {
    let mut x = Bench::divided(&["g", "p"]);
    x.merge(&[2, 3], 9);
    x.opened(9, 60);
    assert_eq!((x.span(9).start, x.span(9).end), (b"g".to_vec(), Vec::new()));
    assert!(x.span(1).is_followed_by(&x.span(9)));
}

// behaviour: dispatcher-32
#[test]
fn a_merge_that_is_not_possible_changes_nothing_and_says_so_where_it_never_will_be() {
    let mut x = Bench::divided(&["g", "p"]);
    x.working(5);
    x.beat();
    x.core.next_heartbeat = None;
    for sources in
        [vec![], vec![1], vec![1, 3], vec![2, 1], vec![1, 1], vec![1, 77], vec![1, 5], vec![1, 2, 2]]
    {
        assert_eq!(x.merge(&sources, 9), "", "{sources:?}");
        assert_eq!(x.wait(10), "beat 60/60 seq 4 9:Stopped@0", "{sources:?}");
        assert_eq!(x.states(&[1, 2, 3, 9]), "Working Working Working -");
    }
    assert_eq!(x.merge(&[1, 2], 5), "");
    assert_eq!(x.wait(10), "beat 60/60 seq 4 5:Working@60", "the id is that of a dispatcher that works");
    x.schedule(&a(), ScheduleAction::Create, 6, 1);
    x.opened(6, 60);
    assert_eq!(x.merge(&[1, 2], 6), "", "one that has seen nothing yet");
    assert_eq!(x.wait(10), "");
    assert_eq!(x.core.merges.len(), 0);
}

// behaviour: dispatcher-32
#[test]
fn a_merge_waits_for_the_first_event_of_its_sources() {
    let mut x = Bench::divided(&["m"]);
    x.core.dispatchers.get_mut(x.slot(2)).expect("present").state = ComponentState::Initializing;
    assert_eq!(x.merge(&[1, 2], 9), "");
    assert_eq!(x.wait(10), "", "the owner asks again");
    assert_eq!(x.states(&[1, 2, 9]), "Working Initializing -");
    x.arrive(2, resolved(61));
    assert_eq!(x.merge(&[1, 2], 9), "open 9@60");
}

#[test]
fn a_repeated_request_starts_nothing_and_repeats_the_success_when_it_is_done() {
    let mut x = Bench::divided(&["m"]);
    assert_eq!(x.merge(&[1, 2], 9), "open 9@60");
    assert_eq!(x.merge(&[1, 2], 9), "");
    x.opened(9, 60);
    assert_eq!(x.merge(&[1, 2], 9), "");
    assert_eq!(x.wait(10), "", "it has not begun to work");
    x.arrive(9, resolved(70));
    assert_eq!(x.wait(10), "beat 60/60 seq 4 9:Working@70");
    assert_eq!(x.merge(&[1, 2], 9), "");
    assert_eq!(x.wait(10), "beat 60/60 seq 4 9:Working@70", "also before its sources are cleaned up");
    x.beat();
    assert_eq!(x.merge(&[1, 2], 9), "");
    x.core.next_heartbeat = None;
    assert_eq!(x.wait(10), "beat 60/60 seq 4 9:Working@70", "also after");
}

#[test]
fn a_source_belongs_to_one_merge() {
    let mut x = Bench::divided(&["g", "p"]);
    x.arrive(1, rows(&[70]));
    x.merge(&[1, 2], 9);
    assert_eq!(x.merge(&[2, 3], 10), "");
    assert_eq!(x.states(&[1, 2, 3, 9, 10]), "WaitingMerge WaitingMerge Working MergeReady -");
}

// behaviour: dispatcher-34
#[test]
fn a_merge_is_remembered_until_its_sources_are_gone_and_its_result_works() {
    let mut x = Bench::divided(&["m"]);
    x.merge(&[1, 2], 9);
    x.opened(9, 60);
    x.arrive(9, resolved(70));
    assert_eq!(x.core.merges.len(), 1);
    x.beat();
    assert_eq!(x.core.merges.len(), 0);
    let mut x = Bench::divided(&["m"]);
    x.merge(&[1, 2], 9);
    x.opened(9, 60);
    x.beat();
    assert_eq!((x.core.merges.len(), x.states(&[1, 2, 9])), (1, "- - Initializing".into()));
    x.arrive(9, resolved(70));
    x.beat();
    assert_eq!(x.core.merges.len(), 0);
    let mut x = Bench::divided(&["m"]);
    x.merge(&[1, 2], 9);
    x.opened(9, 60);
    assert_eq!(x.schedule(&a(), ScheduleAction::Remove, 9, 1), "unsubscribe 9");
    x.beat();
    assert_eq!(
        (x.core.merges.len(), x.states(&[1, 2, 9])),
        (0, "- - -".into()),
        "gone is as good as working"
    );
}

// behaviour: dispatcher-35
#[test]
fn a_merge_request_of_an_earlier_owner_is_not_written_down() {
    let mut x = Bench::divided(&["m"]);
    x.bootstrap(&b(), None, 2);
    x.take();
    assert_eq!(x.merge_by(&a(), 1, &[1, 2], 9), "");
    assert_eq!(x.merge_by(&a(), 2, &[1, 2], 9), "");
    assert_eq!(x.wait(10), "");
    assert_eq!((x.core.merges.len(), x.states(&[1, 2, 9])), (0, "Working Working -".into()));
}

// behaviour: dispatcher-37
#[test]
fn a_merge_into_the_zero_id_is_not_written_down() {
    let mut x = Bench::divided(&["m"]);
    let request = MergeDispatcherRequest {
        changefeed: x.feed.clone(),
        sources: vec![id(1), id(2)],
        merged: DispatcherId::new(0, 0),
        mode: Mode::Default,
        epoch: epoch(1),
    };
    let redo = MergeDispatcherRequest { merged: id(9), mode: Mode::Redo, ..request.clone() };
    for request in [request, redo] {
        x.core.on_merge(&a(), request, x.now);
        assert_eq!(x.take(), "");
        assert_eq!(x.wait(10), "");
    }
    assert_eq!((x.core.merges.len(), x.states(&[1, 2])), (0, "Working Working".into()));
}

// behaviour: dispatcher-38, dispatcher-39
#[test]
fn a_source_that_is_removed_ends_the_merge_and_the_others_go_on_where_they_stopped() {
    let mut x = Bench::divided(&["m"]);
    x.arrive(1, resolved(80));
    assert_eq!(x.merge(&[1, 2], 9), "open 9@60");
    assert_eq!(x.schedule(&a(), ScheduleAction::Remove, 2, 1), "subscribe 1@80 at a; unsubscribe 2");
    assert_eq!(x.states(&[1, 2, 9]), "Working Working -");
    assert_eq!(x.opened(9, 60), "close 9", "the answer of the sink comes too late");
    assert_eq!(x.wait(10), "beat 60/60 seq 3 9:Stopped@0");
    assert_eq!(x.beat(), "close 2; beat 60/60 seq 3 2:Stopped@60");
    assert_eq!(x.arrive(1, rows(&[90])), "", "what was on its way follows on what was dropped");
    assert_eq!(x.arrive(1, resolved(95)), "");
    x.arrive(1, Arrival::Begin(Some(table(1, 1))));
    assert_eq!(x.arrive(1, rows(&[85, 90])), "write 1");
    assert_eq!(x.beat(), "beat 84/80 seq 3");
}

// behaviour: dispatcher-38, dispatcher-39
#[test]
fn a_result_that_is_removed_before_it_took_over_leaves_its_sources_as_they_were() {
    let mut x = Bench::divided(&["m"]);
    x.arrive(1, rows(&[70]));
    let ticket = x.last_ticket();
    assert_eq!(x.merge(&[1, 2], 9), "");
    assert_eq!(x.schedule(&a(), ScheduleAction::Remove, 9, 1), "subscribe 1@69 at a; subscribe 2@60 at a");
    assert_eq!(x.states(&[1, 2, 9]), "Working Working -");
    assert_eq!(x.wait(10), "beat 60/60 seq 3 9:Stopped@0");
    assert_eq!(x.core.journal.len(), 0);
    assert_eq!(x.flush(1, ticket), "");
    assert_eq!(x.merge(&[1, 2], 10), "open 10@60", "and may be joined again");
}

// The owner may hear that a merge is given up after it has repeated its request.
#[test]
fn a_merge_that_was_given_up_never_begins_again() {
    let mut x = Bench::divided(&["m"]);
    x.merge(&[1, 2], 9);
    x.core.on_dispatcher_opened(id(9), Ts(60), Err(fault()), x.now);
    x.take();
    assert_eq!(x.merge(&[1, 2], 9), "");
    assert_eq!(x.states(&[1, 2, 9]), "Working Working -");
    x.wait(10);
    assert_eq!(x.merge(&[1, 2], 9), "");
    assert_eq!(x.wait(10), "beat 60/60 seq 3 9:Stopped@0", "said again, should it have been lost");
}

// An owner that directs no barrier of spans that it is joining would wait for the merge, and the merge for it.
#[test]
fn a_merge_whose_sources_find_no_common_place_is_given_up_in_the_end() {
    let mut x = Bench::divided(&["m"]);
    x.at_barrier(&[1, 2]);
    x.respond(&a(), 1, to_one(1, act(BlockAction::Pass, 100)));
    x.merge(&[1, 2], 9);
    assert_eq!(x.states(&[1, 2, 9]), "WaitingMerge WaitingMerge Preparing");
    assert!(x.core.next_wakeup().is_some_and(|at| at <= x.now + Duration::from_secs(2)));
    x.wait(1_999);
    assert_eq!(x.states(&[1, 2, 9]), "WaitingMerge WaitingMerge Preparing");
    x.wait(1);
    assert_eq!(x.states(&[1, 2, 9]), "Working Working -");
    assert_eq!(x.merge(&[1, 2], 9), "", "the owner begins another one when it has heard of the end");
    let mut x = Bench::divided(&["m"]);
    assert_eq!(x.merge(&[1, 2], 9), "open 9@60");
    x.wait(29_999);
    assert_eq!(x.states(&[1, 2, 9]), "WaitingMerge WaitingMerge MergeReady");
    assert_eq!(x.wait(1), "subscribe 1@60 at a; subscribe 2@60 at a", "the sink does not answer");
    assert_eq!(x.opened(9, 60), "close 9");
}

#[test]
fn keys_that_have_a_dispatcher_get_no_second_one() {
    let mut x = Bench::divided(&["m"]);
    let mut request = x.request(ScheduleAction::Create, 5, 1);
    request.config.span = parts(&["k"]).remove(0);
    let create = |x: &mut Bench| {
        x.core.on_schedule(&a(), request.clone(), x.now);
        x.take()
    };
    assert_eq!(create(&mut x), "");
    assert_eq!(x.core.journal.len(), 0, "nothing is kept that would swallow the next request");
    x.schedule(&a(), ScheduleAction::Remove, 1, 1);
    assert_eq!(create(&mut x), "", "before the one before has said its last word");
    x.beat();
    assert_eq!(create(&mut x), "open 5@60");
    let mut rival = request.clone();
    rival.config.dispatcher = id(6);
    x.core.on_schedule(&a(), rival, x.now);
    assert_eq!(x.take(), "open 6@60");
    assert_eq!(x.opened(5, 60), "subscribe 5@60 at a");
    assert_eq!(x.opened(6, 60), "close 6");
    assert_eq!(x.core.journal.len(), 0);
}

#[test]
fn sources_that_had_not_stopped_are_not_disturbed_by_the_end_of_their_merge() {
    let mut x = Bench::divided(&["m"]);
    x.at_barrier(&[1]);
    assert_eq!(x.merge(&[1, 2], 9), "");
    assert_eq!(x.schedule(&a(), ScheduleAction::Remove, 9, 1), "");
    assert_eq!(x.states(&[1, 2, 9]), "Working Working -");
    assert_eq!(x.arrive(2, rows(&[90])), "write 2");
}

#[test]
fn a_sink_that_cannot_be_asked_ends_the_merge_and_is_reported() {
    let mut x = Bench::divided(&["m"]);
    x.merge(&[1, 2], 9);
    x.core.on_dispatcher_opened(id(9), Ts(60), Err(fault()), x.now);
    assert_eq!(x.take(), "subscribe 1@60 at a; subscribe 2@60 at a");
    assert_eq!(x.wait(10), "beat 60/60 seq 3 9:Stopped@0; error CDC:ErrSinkUnavailable");
    assert_eq!(x.states(&[1, 2, 9]), "Working Working -");
}

#[test]
fn what_the_downstream_knows_may_be_newer_than_the_place_of_the_sources() {
    let mut x = Bench::divided(&["m"]);
    x.merge(&[1, 2], 9);
    assert_eq!(x.opened(9, 65), "subscribe 9@65 at a; unsubscribe 1; unsubscribe 2");
    let mut x = Bench::divided(&["m"]);
    x.merge(&[1, 2], 9);
    assert_eq!(x.opened(9, 40), "subscribe 9@60 at a; unsubscribe 1; unsubscribe 2", "never older");
}

#[test]
fn sources_in_front_of_one_barrier_are_joined_in_front_of_it() {
    let mut x = Bench::divided(&["m"]);
    x.arrive(1, rows(&[90]));
    let ticket = x.last_ticket();
    x.flush(1, ticket);
    x.at_barrier(&[1]);
    assert_eq!(x.merge(&[1, 2], 9), "", "one is in front of it, the other is not");
    assert_eq!(x.states(&[1, 2, 9]), "WaitingMerge WaitingMerge Preparing");
    assert_eq!(x.arrive(2, rows(&[95])), "write 2", "the sources go on");
    let ticket = x.last_ticket();
    x.flush(2, ticket);
    assert_eq!(x.arrive(2, block(ddl(100))), "flush 2");
    x.core.on_flush_finished(x.slot(2), Ok(()), x.now);
    assert_eq!(x.take(), "open 9@99");
    assert_eq!(x.respond(&a(), 1, act(BlockAction::Write, 100)), "", "nobody decides for them any more");
    assert_eq!(x.opened(9, 99), "subscribe 9@99 at a; unsubscribe 1; unsubscribe 2");
    x.wait(10);
    x.arrive(9, Arrival::Begin(Some(table(1, 1))));
    x.core.on_table_opened(x.slot(9), Ok(()), x.now);
    assert_eq!(x.arrive(9, rows(&[100])), "", "rows of the transaction of the DDL are durable");
    assert_eq!(x.arrive(9, block(ddl(100))), "flush 9");
    x.core.on_flush_finished(x.slot(9), Ok(()), x.now);
    assert_eq!(x.take(), "execute 100", "a whole table waits for nobody");
}

#[test]
fn a_barrier_that_is_being_executed_is_not_cut_in_two() {
    let mut x = Bench::divided(&["m"]);
    x.at_barrier(&[1, 2]);
    assert_eq!(x.respond(&a(), 1, to_one(1, act(BlockAction::Write, 100))), "execute 100");
    assert_eq!(x.merge(&[1, 2], 9), "");
    x.core.on_block_written(x.slot(1), Ok(()), x.now);
    x.respond(&a(), 1, to_one(2, act(BlockAction::Pass, 100)));
    x.respond(&a(), 1, ack(100));
    assert_eq!(x.states(&[1, 2, 9]), "WaitingMerge WaitingMerge Preparing");
    assert_eq!(x.arrive(1, resolved(100)), "", "before its checkpoint contains the DDL it would come again");
    assert_eq!(x.arrive(2, resolved(100)), "open 9@100");
}

fn to_one(n: u64, status: DispatcherStatus) -> DispatcherStatus {
    DispatcherStatus { influenced: Some(InfluencedDispatchers::Normal(vec![id(n)])), ..status }
}

#[test]
fn sources_that_stopped_in_front_of_a_barrier_go_on_behind_it_when_the_merge_is_given_up() {
    let mut x = Bench::divided(&["m"]);
    x.arrive(1, rows(&[100]));
    let ticket = x.last_ticket();
    x.flush(1, ticket);
    x.at_barrier(&[1, 2]);
    assert_eq!(x.merge(&[1, 2], 9), "open 9@99");
    assert_eq!(x.schedule(&a(), ScheduleAction::Remove, 9, 1), "subscribe 1@99 at a; subscribe 2@60 at a");
    x.wait(10);
    assert_eq!(x.respond(&a(), 1, to_one(1, act(BlockAction::Write, 100))), "execute 100");
    x.arrive(1, Arrival::Begin(Some(table(1, 1))));
    x.arrive(1, rows(&[100]));
    x.arrive(1, block(ddl(100)));
    x.core.on_block_written(x.slot(1), Ok(()), x.now);
    assert_eq!(x.take(), "", "neither the rows nor the DDL come a second time");
    assert_eq!(x.arrive(1, resolved(110)), "");
    assert_eq!(x.core.dispatchers.get(x.slot(1)).expect("present").checkpoint(), Ts(110));
}

#[test]
fn a_new_owner_is_told_of_the_merge_and_it_goes_on() {
    let mut x = Bench::divided(&["m"]);
    x.arrive(1, rows(&[70]));
    let ticket = x.last_ticket();
    x.merge(&[1, 2], 9);
    let BootstrapStep::Reply(response) = x.core.on_bootstrap(&b(), &x.bootstrap_request(None, 2), false)
    else {
        panic!("allowed");
    };
    assert_eq!(response.merges.len(), 1);
    assert_eq!((response.merges[0].merged, &response.merges[0].sources[..]), (id(9), &[id(1), id(2)][..]));
    let listed: Vec<_> = response.spans.iter().map(|span| (span.id.low, span.state)).collect();
    let expected = [
        (1, ComponentState::WaitingMerge),
        (2, ComponentState::WaitingMerge),
        (9, ComponentState::MergeReady),
    ];
    assert_eq!(listed, expected);
    assert_eq!(
        x.take(),
        "unsubscribe 1; subscribe 1@69 at b; unsubscribe 2; subscribe 2@60 at b",
        "the sources read the log of the new owner, the result does not read yet"
    );
    assert_eq!(x.merge_by(&b(), 2, &[1, 2], 9), "", "the owner's repetition starts nothing");
    assert_eq!(x.flush(1, ticket), "open 9@60");
    assert_eq!(x.opened(9, 60), "subscribe 9@60 at b; unsubscribe 1; unsubscribe 2");
}

#[test]
fn a_manager_that_closes_in_the_middle_of_a_merge_forgets_it() {
    let mut x = Bench::divided(&["m"]);
    x.merge(&[1, 2], 9);
    x.core.stop();
    assert_eq!(x.take(), "unsubscribe 1; close 1; unsubscribe 2; close 2; unsubscribe 9; close 9; stop");
    assert_eq!(x.opened(9, 60), "");
    assert_eq!((x.core.merges.len(), x.core.dispatchers.len()), (0, 0));
}

#[test]
fn a_source_in_the_middle_of_its_initial_copy_copies_to_the_end() {
    let mut x = Bench::divided(&["m"]);
    assert_eq!(x.arrive(1, Arrival::Rows(copy_start(100), Default::default())), "write 1");
    let ticket = x.last_ticket();
    assert_eq!(x.merge(&[1, 2], 9), "");
    x.flush(1, ticket);
    assert_eq!(x.states(&[1, 2, 9]), "WaitingMerge WaitingMerge Preparing");
    assert_eq!(x.arrive(1, resolved(100)), "open 9@60");
}

#[test]
fn complete_lists_name_sources_and_not_what_is_being_prepared() {
    let mut x = Bench::divided(&["m"]);
    x.arrive(1, rows(&[70]));
    x.merge(&[1, 2], 9);
    x.core.next_complete = None;
    x.core.next_heartbeat = Some(x.now);
    assert_eq!(x.wait(0), "beat 60/60 seq 3 1:WaitingMerge@69 2:WaitingMerge@60 complete");
}
