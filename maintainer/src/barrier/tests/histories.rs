//! Events from the first report to the last, with reports and requests that are lost, repeated or late.

use expect_test::{Expect, expect};

use super::*;

#[track_caller]
fn says(said: String, expected: &Expect) {
    expected.assert_eq(&said);
}

// behaviour: maintainer-73
#[test]
fn the_last_to_come_writes_and_the_event_ends_when_all_have_passed() {
    let mut b = Bench::new(&[(1, 1, "n1"), (2, 1, "n1"), (3, 1, "n2")]);
    let wait = waiting(110, normal(&[1, 2, 3]));
    says(b.report("n1", &[(101, wait.clone()), (102, wait.clone())]), &expect!["n1: ack 110 to 101+102"]);
    says(b.report("n2", &[(103, wait.clone())]), &expect!["n2: ack 110 to 103, write 110 to 103"]);
    // Repeated reports change nothing and are answered again: the first answers may be lost.
    says(b.report("n1", &[(101, wait.clone())]), &expect!["n1: ack 110 to 101"]);
    says(b.report("n2", &[(103, wait)]), &expect!["n2: ack 110 to 103"]);
    says(b.report("n2", &[(103, done(110))]), &expect!["n2: ack 110 to 103"]);
    says(b.after(100), &expect!["n1: pass 110 to 101+102; n2: pass 110 to 103"]);
    says(b.report("n1", &[(101, done(110))]), &expect!["n1: ack 110 to 101"]);
    assert_eq!(b.barrier.len(), 1, "one has not passed yet");
    says(b.report("n1", &[(102, done(110))]), &expect!["n1: ack 110 to 102"]);
    assert_eq!(b.barrier.len(), 0);
    // Late and repeated: nobody waits for an answer.
    says(b.report("n1", &[(102, done(110))]), &expect!["-"]);
    says(b.after(5000), &expect!["-"]);
}

// behaviour: maintainer-74, maintainer-84
#[test]
fn a_dropped_table_is_not_waited_for_and_its_successor_is_placed_before_anybody_passes() {
    let mut b = Bench::new(&[(1, 1, "n2"), (2, 1, "n1")]);
    let mut truncate = waiting(110, normal(&[1, 0]));
    truncate.dropped = Some(normal(&[1]));
    truncate.added = tables(&[11]);
    says(b.report("n2", &[(101, truncate.clone())]), &expect!["n2: ack 110 to 101"]);
    assert_eq!(b.barrier.floor(), Some(Ts(110)), "the checkpoint may not pass a table that is to come");
    says(b.report("n1", &[(TRIGGER, truncate)]), &expect!["n1: ack 110 to 1, write 110 to 1"]);
    assert_eq!(b.count(Standing::Absent), 0, "not before it is written");
    says(b.report("n1", &[(TRIGGER, done(110))]), &expect!["n1: ack 110 to 1"]);
    assert!(!b.placement.spans.has_table(TableId(1)));
    assert_eq!(b.count(Standing::Absent), 1);
    assert_eq!(b.placement.spans.floor(), Some(Ts(110)), "it holds the checkpoint from now on");
    says(b.after(100), &expect!["-"]);
    says(b.report("n1", &[(TRIGGER, done(110))]), &expect!["-"]);
    says(b.after(1000), &expect!["-"]);
    assert_eq!((b.barrier.len(), b.barrier.floor()), (0, None));
}

// behaviour: maintainer-75, maintainer-84
#[test]
fn a_dropped_schema_takes_its_tables_along() {
    let mut b = Bench::new(&[(1, 1, "n1"), (2, 1, "n2"), (3, 2, "n2")]);
    let mut drop_schema = waiting(110, InfluencedTables::Schema(SchemaId(1)));
    drop_schema.dropped = Some(InfluencedTables::Schema(SchemaId(1)));
    says(b.report("n2", &[(102, drop_schema.clone())]), &expect!["n2: ack 110 to 102"]);
    says(
        b.report("n1", &[(101, drop_schema.clone()), (TRIGGER, drop_schema)]),
        &expect!["n1: ack 110 to 101+1, write 110 to 1"],
    );
    says(b.report("n1", &[(TRIGGER, done(110))]), &expect!["n1: ack 110 to 1"]);
    assert_eq!(b.placement.spans.len(), 1, "the other schema's");
    says(b.after(100), &expect!["-"]);
    assert_eq!(b.barrier.len(), 0);
}

// behaviour: maintainer-77, maintainer-95c
#[test]
fn a_new_table_is_placed_once_however_often_it_is_reported() {
    let mut b = Bench::new(&[(1, 1, "n1")]);
    says(b.report("n1", &[(TRIGGER, executed(110, &[11]))]), &expect!["n1: ack 110 to 1"]);
    assert_eq!((b.count(Standing::Absent), b.barrier.len()), (1, 0));
    // The answer is lost, the table is dropped, and the report comes again.
    let mut dropped = waiting(120, normal(&[11, 0]));
    dropped.dropped = Some(normal(&[11]));
    let new = b.placement.spans.by_table(TableId(11)).next().map(|span| span.id).unwrap();
    b.placement.spans.bind(new, "n1".into());
    b.placement.spans.mark_replicating(new);
    says(
        b.report("n1", &[(new.low, dropped.clone()), (TRIGGER, dropped)]),
        &expect!["n1: ack 120 to 901+1, write 120 to 1"],
    );
    says(b.report("n1", &[(TRIGGER, done(120))]), &expect!["n1: ack 120 to 1"]);
    assert!(!b.placement.spans.has_table(TableId(11)));
    says(b.report("n1", &[(TRIGGER, executed(110, &[11]))]), &expect!["n1: ack 110 to 1"]);
    assert!(!b.placement.spans.has_table(TableId(11)), "a dropped table came back");
}

// behaviour: maintainer-95c
#[test]
fn a_report_that_was_lost_is_carried_out_once_though_a_later_change_came_first() {
    let mut b = Bench::new(&[(1, 1, "n1")]);
    says(b.report("n1", &[(TRIGGER, executed(120, &[12]))]), &expect!["n1: ack 120 to 1"]);
    says(b.report("n1", &[(TRIGGER, executed(110, &[11]))]), &expect!["n1: ack 110 to 1"]);
    says(b.report("n1", &[(TRIGGER, executed(110, &[11]))]), &expect!["n1: ack 110 to 1"]);
    assert_eq!(b.count(Standing::Absent), 2);
}

// behaviour: maintainer-80
#[test]
fn spans_that_were_replaced_do_not_count() {
    let mut b = Bench::new(&[]);
    let part = |start: &str, end: &str| TableSpan {
        keyspace_id: 0,
        table: TableId(1),
        start: start.into(),
        end: end.into(),
    };
    b.add(201, 1, part("", "m"), "n1");
    b.add(202, 1, part("m", ""), "n1");
    let wait = waiting(110, normal(&[1]));
    says(b.report("n1", &[(201, wait.clone())]), &expect!["n1: ack 110 to 201"]);
    b.placement.spans.remove(DispatcherId::new(0, 201));
    b.placement.spans.remove(DispatcherId::new(0, 202));
    b.add(203, 1, part("", "c"), "n2");
    b.add(204, 1, part("c", ""), "n1");
    says(b.report("n1", &[(204, wait.clone())]), &expect!["n1: ack 110 to 204"]);
    says(b.report("n2", &[(203, wait)]), &expect!["n2: ack 110 to 203, write 110 to 203"]);
}

// behaviour: maintainer-81, maintainer-83
#[test]
fn a_span_that_is_being_placed_anew_has_to_report_again() {
    let mut b = Bench::new(&[(1, 1, "n2")]);
    let wait = waiting(110, normal(&[1, 0]));
    says(b.report("n2", &[(101, wait.clone())]), &expect!["n2: ack 110 to 101"]);
    b.placement.spans.mark_scheduling(DispatcherId::new(0, 101));
    says(b.report("n1", &[(TRIGGER, wait.clone())]), &expect!["n1: ack 110 to 1"]);
    says(b.report("n2", &[(101, wait.clone())]), &expect!["n2: ignored 110 to 101"]);
    b.placement.spans.mark_replicating(DispatcherId::new(0, 101));
    says(b.report("n2", &[(101, wait)]), &expect!["n2: ack 110 to 101; n1: write 110 to 1"]);
}

// behaviour: maintainer-85
#[test]
fn what_is_lost_is_said_again_after_a_second() {
    let mut b = Bench::new(&[(1, 1, "n2")]);
    let wait = waiting(110, normal(&[1, 0]));
    says(b.report("n2", &[(101, wait.clone())]), &expect!["n2: ack 110 to 101"]);
    says(b.after(1500), &expect!["-"]);
    says(b.report("n1", &[(TRIGGER, wait)]), &expect!["n1: ack 110 to 1, write 110 to 1"]);
    says(b.after(900), &expect!["-"]);
    says(b.after(200), &expect!["n1: write 110 to 1"]);
    says(b.report("n1", &[(TRIGGER, done(110))]), &expect!["n1: ack 110 to 1"]);
    says(b.after(100), &expect!["n1: pass 110 to 1; n2: pass 110 to 101"]);
    says(b.after(900), &expect!["-"]);
    says(b.after(200), &expect!["n1: pass 110 to 1; n2: pass 110 to 101"]);
}

// behaviour: maintainer-86, maintainer-87
#[test]
fn everybody_of_a_schema_is_told_again_only_when_no_answers_come_any_more() {
    let mut b = Bench::new(&[(1, 1, "n2"), (2, 1, "n2")]);
    let wait = waiting(110, InfluencedTables::Schema(SchemaId(1)));
    b.report("n2", &[(101, wait.clone()), (102, wait.clone())]);
    says(b.report("n1", &[(TRIGGER, wait)]), &expect!["n1: ack 110 to 1, write 110 to 1"]);
    b.report("n1", &[(TRIGGER, done(110))]);
    says(b.after(100), &expect!["n1: pass 110 to schema 1; n2: pass 110 to schema 1"]);
    b.now += Duration::from_millis(700);
    b.report("n2", &[(101, done(110))]);
    says(b.after(400), &expect!["-"]);
    says(b.after(1100), &expect!["n1: pass 110 to schema 1; n2: pass 110 to schema 1"]);
    says(b.report("n2", &[(102, done(110))]), &expect!["n2: ack 110 to 102"]);
    assert_eq!(b.barrier.len(), 0);
}

// behaviour: maintainer-88
#[test]
fn a_table_that_moves_to_another_schema_is_found_there() {
    let mut b = Bench::new(&[(1, 1, "n1")]);
    let mut rename = waiting(110, normal(&[1, 0]));
    rename.schema_changes = vec![SchemaChange { table: TableId(1), old: SchemaId(1), new: SchemaId(2) }];
    b.report("n1", &[(101, rename.clone()), (TRIGGER, rename)]);
    says(b.report("n1", &[(TRIGGER, done(110))]), &expect!["n1: ack 110 to 1"]);
    assert_eq!(b.placement.spans.by_schema(SchemaId(1)).count(), 0);
    assert_eq!(b.placement.spans.by_schema(SchemaId(2)).count(), 1);
    b.report("n1", &[(101, done(110))]);
    assert_eq!(b.barrier.len(), 0);
}

// behaviour: maintainer-82, maintainer-89
#[test]
fn an_event_over_everything_waits_for_earlier_changes_of_tables() {
    let mut b = Bench::new(&[(1, 1, "n1")]);
    let mut truncate = waiting(110, normal(&[1, 0]));
    (truncate.dropped, truncate.added) = (Some(normal(&[1])), tables(&[11]));
    b.report("n1", &[(101, truncate.clone()), (TRIGGER, truncate)]);
    let everything = waiting(120, InfluencedTables::All);
    says(b.report("n1", &[(TRIGGER, everything.clone())]), &expect!["-"]);
    b.report("n1", &[(TRIGGER, done(110))]);
    says(b.report("n1", &[(TRIGGER, everything.clone())]), &expect!["n1: ack 120 to 1"]);
    let new = b.placement.spans.by_table(TableId(11)).next().map(|span| span.id).unwrap();
    b.placement.spans.bind(new, "n2".into());
    b.placement.spans.mark_replicating(new);
    says(b.report("n2", &[(new.low, everything)]), &expect!["n2: ack 120 to 901; n1: write 120 to 1"]);
}

// behaviour: maintainer-95b
#[test]
fn when_the_writers_node_is_lost_another_one_writes_and_without_one_the_event_waits() {
    let mut b = Bench::new(&[(1, 1, "n1"), (2, 1, "n2")]);
    let wait = waiting(110, normal(&[1, 2]));
    b.report("n1", &[(101, wait.clone())]);
    says(b.report("n2", &[(102, wait.clone())]), &expect!["n2: ack 110 to 102, write 110 to 102"]);
    // It dies before it writes; its span is created again elsewhere.
    b.placement.spans.mark_absent(DispatcherId::new(0, 102));
    says(b.after(1100), &expect!["n1: write 110 to 101"]);
    b.placement.spans.mark_absent(DispatcherId::new(0, 101));
    says(b.after(1100), &expect!["-"]);
    for id in [101, 102] {
        b.placement.spans.bind(DispatcherId::new(0, id), "n1".into());
        b.placement.spans.mark_replicating(DispatcherId::new(0, id));
    }
    says(b.report("n1", &[(101, wait.clone()), (102, wait)]), &expect!["n1: ack 110 to 101+102"]);
    says(b.after(1100), &expect!["n1: write 110 to 101"]);
    // The node that was lost comes back with an old report: the span is not its any more.
    says(b.report("n2", &[(102, done(110))]), &expect!["-"]);
    b.report("n1", &[(101, done(110))]);
    says(b.after(100), &expect!["n1: pass 110 to 101+102"]);
    b.report("n1", &[(102, done(110))]);
    assert_eq!(b.barrier.len(), 0);
}

#[test]
fn a_writer_that_moved_is_asked_on_its_new_node() {
    let mut b = Bench::new(&[(1, 1, "n1"), (2, 1, "n2")]);
    let wait = waiting(110, normal(&[1, 2]));
    b.report("n1", &[(101, wait.clone())]);
    says(b.report("n2", &[(102, wait.clone())]), &expect!["n2: ack 110 to 102, write 110 to 102"]);
    b.placement.spans.bind(DispatcherId::new(0, 102), "n1".into());
    b.placement.spans.mark_replicating(DispatcherId::new(0, 102));
    says(b.after(1100), &expect!["n1: write 110 to 102"]);
    b.report("n1", &[(102, done(110))]);
    says(b.after(100), &expect!["n1: pass 110 to 101+102"]);
}

// behaviour: maintainer-94
#[test]
fn what_nobody_can_use_is_answered_with_nothing() {
    let mut b = Bench::new(&[(1, 1, "n1")]);
    says(b.report("n1", &[(999, waiting(110, normal(&[1])))]), &expect!["-"]);
    says(b.report("n1", &[(101, done(110))]), &expect!["-"]);
    let mut everything = waiting(110, InfluencedTables::All);
    everything.dropped = Some(InfluencedTables::All);
    says(b.report("n1", &[(TRIGGER, everything)]), &expect!["- unusable 110"]);
    assert_eq!(b.barrier.len(), 0);
}

// behaviour: maintainer-95a
#[test]
fn who_is_past_an_event_lets_the_others_pass_without_a_second_write() {
    let mut b = Bench::new(&[(1, 1, "n1")]);
    b.placement.spans.raise(DispatcherId::new(0, 101), Ts(150));
    let mut partition = waiting(110, normal(&[1, 0]));
    partition.added = tables(&[11]);
    says(b.report("n1", &[(TRIGGER, partition.clone())]), &expect!["n1: ack 110 to 1"]);
    says(b.after(100), &expect!["-"]);
    assert_eq!(b.count(Standing::Absent), 1, "the snapshot is older: its table is missing");
    says(b.after(1000), &expect!["n1: pass 110 to 101+1"]);
    b.report("n1", &[(TRIGGER, partition), (TRIGGER, done(110)), (101, done(110))]);
    assert_eq!((b.barrier.len(), b.count(Standing::Absent)), (0, 1));
}

#[test]
fn who_stands_exactly_behind_a_schema_change_has_passed_it_but_perhaps_not_the_sync_point_there() {
    let mut b = Bench::new(&[(1, 1, "n1")]);
    b.placement.spans.raise(DispatcherId::new(0, 101), Ts(110));
    let everything = waiting(110, InfluencedTables::All);
    let point = BarrierKey { commit_ts: Ts(110), is_sync_point: true };
    let sync_point = BlockState { key: point, ..everything.clone() };
    b.report("n1", &[(TRIGGER, everything)]);
    says(b.after(1000), &expect!["-"]);
    says(b.after(100), &expect!["n1: pass 110 to all; n2: pass 110 to all"]);
    b.report("n1", &[(101, done(110)), (TRIGGER, done(110))]);
    assert_eq!(b.barrier.len(), 0);
    b.report("n1", &[(TRIGGER, sync_point)]);
    says(b.after(5000), &expect!["-"]);
    says(b.after(5000), &expect!["-"]);
}

// behaviour: maintainer-72
#[test]
fn an_event_over_everything_is_written_by_the_trigger_and_forgotten_when_all_have_passed() {
    let mut b = Bench::new(&[(1, 1, "n1")]);
    let everything = waiting(110, InfluencedTables::All);
    says(
        b.report("n1", &[(101, everything.clone()), (TRIGGER, everything)]),
        &expect!["n1: ack 110 to 101+1, write 110 to 1"],
    );
    says(b.after(2000), &expect!["n1: write 110 to 1"]);
    says(b.report("n1", &[(TRIGGER, done(110))]), &expect!["n1: ack 110 to 1"]);
    says(b.report("n1", &[(101, done(110))]), &expect!["n1: ack 110 to 101"]);
    assert_eq!(b.barrier.len(), 0);
    says(b.report("n1", &[(101, done(110)), (TRIGGER, done(110))]), &expect!["-"]);
}

// behaviour: maintainer-76
#[test]
fn an_event_over_everything_lets_every_node_pass_when_it_is_written() {
    let mut b = Bench::new(&[(1, 1, "n1"), (2, 1, "n2")]);
    let everything = waiting(110, InfluencedTables::All);
    says(
        b.report("n1", &[(101, everything.clone()), (TRIGGER, everything.clone())]),
        &expect!["n1: ack 110 to 101+1"],
    );
    says(b.report("n2", &[(102, everything)]), &expect!["n2: ack 110 to 102; n1: write 110 to 1"]);
    says(b.report("n1", &[(TRIGGER, done(110))]), &expect!["n1: ack 110 to 1"]);
    says(b.after(100), &expect!["n1: pass 110 to all; n2: pass 110 to all"]);
    b.report("n1", &[(101, done(110))]);
    assert_eq!(b.barrier.len(), 1);
    b.report("n2", &[(102, done(110))]);
    assert_eq!(b.barrier.len(), 0);
}

#[test]
fn an_event_over_everything_does_not_wait_for_a_table_that_is_gone_since() {
    let mut b = Bench::new(&[(1, 1, "n1"), (2, 1, "n2")]);
    let everything = waiting(110, InfluencedTables::All);
    b.report("n1", &[(TRIGGER, everything.clone()), (101, everything)]);
    says(b.after(1000), &expect!["-"]);
    b.placement.spans.remove(DispatcherId::new(0, 102));
    says(b.after(1000), &expect!["n1: write 110 to 1"]);
    b.report("n1", &[(TRIGGER, done(110)), (101, done(110))]);
    assert_eq!(b.barrier.len(), 0);
}

#[test]
fn whoever_comes_to_an_event_that_others_are_passing_is_waited_for() {
    let mut b = Bench::new(&[(1, 1, "n1"), (2, 1, "n2")]);
    let everything = waiting(110, InfluencedTables::All);
    b.report("n2", &[(102, everything.clone())]);
    b.placement.spans.raise(DispatcherId::new(0, 101), Ts(120));
    says(b.after(1000), &expect!["-"]);
    says(b.after(100), &expect!["n1: pass 110 to all; n2: pass 110 to all"]);
    // A table that was created since begins in front of the event, and says so once.
    b.add(103, 1, TableSpan::whole(TableId(3)), "n2");
    says(b.report("n2", &[(103, everything)]), &expect!["n2: ack 110 to 103"]);
    b.report("n2", &[(102, done(110))]);
    b.report("n1", &[(101, done(110)), (TRIGGER, done(110))]);
    says(b.after(1000), &expect!["n1: pass 110 to all; n2: pass 110 to all"]);
    assert_eq!(b.barrier.len(), 1);
    b.report("n2", &[(103, done(110))]);
    assert_eq!(b.barrier.len(), 0);
}

// behaviour: maintainer-78
#[test]
fn a_trigger_that_stands_at_an_event_begins_again_just_before_it() {
    let mut b = Bench::new(&[(1, 1, "n1")]);
    let alone = waiting(110, normal(&[0]));
    says(b.report("n1", &[(TRIGGER, alone)]), &expect!["n1: ack 110 to 1, write 110 to 1"]);
    let config = b.placement.spans.trigger().unwrap().create_config(Ts(100), Mode::Default);
    assert_eq!((config.start_ts, config.skip_dml_at_start), (Ts(109), true));
    b.report("n1", &[(TRIGGER, done(110))]);
    let config = b.placement.spans.trigger().unwrap().create_config(Ts(100), Mode::Default);
    assert!(!config.skip_dml_at_start, "it is behind the event");
}

// behaviour: maintainer-95
#[test]
fn a_schema_change_and_a_sync_point_at_one_position_are_two_events_the_change_first() {
    let mut b = Bench::new(&[(1, 1, "n1")]);
    let change = waiting(110, normal(&[1, 0]));
    let point = BarrierKey { commit_ts: Ts(110), is_sync_point: true };
    let mut everything = waiting(110, InfluencedTables::All);
    everything.key = point;
    b.report("n1", &[(101, change.clone())]);
    b.report("n1", &[(TRIGGER, change)]);
    b.report("n1", &[(101, everything.clone()), (TRIGGER, everything)]);
    assert_eq!(b.barrier.events.keys().copied().collect::<Vec<_>>(), [key(110), point]);
    // Who stands at the sync point has passed the change of the same position, and not the other way round.
    let span = b.placement.spans.get(DispatcherId::new(0, 101)).unwrap();
    assert!(b.barrier.events[&key(110)].was_passed_by(span));
    assert!(!b.barrier.events[&point].was_passed_by(span));
}

/// Steps that an event over `tables` tables takes from the first report to the last.
fn steps(tables: i64) -> u64 {
    let spans: Vec<(i64, i64, &str)> = (1..=tables).map(|table| (table, 1, "n1")).collect();
    let mut b = Bench::new(&spans);
    let before = crate::barrier::cost::taken();
    let everything = waiting(110, InfluencedTables::All);
    b.report("n1", &[(TRIGGER, everything.clone())]);
    for table in 1..=tables.cast_unsigned() {
        b.report("n1", &[(100 + table, everything.clone())]);
    }
    b.report("n1", &[(TRIGGER, done(110))]);
    b.after(100);
    for table in 1..=tables.cast_unsigned() {
        b.report("n1", &[(100 + table, done(110))]);
    }
    assert_eq!(b.barrier.len(), 0);
    crate::barrier::cost::taken() - before
}

// behaviour: maintainer-91
#[test]
fn ten_times_the_tables_cost_ten_times_the_steps() {
    let (small, large) = (steps(1_000), steps(10_000));
    assert!(small >= 2_000, "{small} steps were counted");
    assert!(large <= 11 * small, "{small} and {large}");
}

/// A target that remembers what it has executed lets tables begin behind their end, while the table trigger comes from
/// the checkpoint and meets everything again.
#[test]
fn an_event_of_a_table_that_a_later_one_has_dropped_is_passed() {
    let mut b = Bench::new(&[(1, 1, "n1"), (2, 1, "n2")]);
    b.placement.spans.raise(DispatcherId::new(0, 101), Ts(150));
    let mut dropped = waiting(120, normal(&[1, 0]));
    dropped.dropped = Some(normal(&[1]));
    b.report("n1", &[(TRIGGER, dropped)]);
    b.after(1100);
    assert!(!b.placement.spans.has_table(TableId(1)), "it was passed, so the table is gone");
    says(b.report("n2", &[(102, waiting(110, normal(&[1, 2])))]), &expect!["n2: ack 110 to 102"]);
    b.after(1100);
    says(b.after(1100), &expect!["n1: pass 120 to 1; n2: pass 110 to 102"]);
    b.report("n1", &[(TRIGGER, done(120))]);
    b.report("n2", &[(102, done(110))]);
    b.after(1100);
    assert_eq!(b.barrier.len(), 0);
    // A table that is yet to come has not ended.
    b.report("n1", &[(TRIGGER, waiting(130, normal(&[7, 0])))]);
    b.after(1100);
    assert_eq!(b.barrier.len(), 1);
}

#[test]
fn what_was_passed_changes_tables_only_when_the_trigger_is_there() {
    let mut b = Bench::new(&[(1, 1, "n1"), (2, 1, "n2")]);
    // Table 1 has left schema 1 at 110, and is far behind both changes.
    b.placement.spans.raise(DispatcherId::new(0, 101), Ts(150));
    let mut moved = waiting(110, normal(&[1, 0]));
    moved.schema_changes = vec![SchemaChange { table: TableId(1), old: SchemaId(1), new: SchemaId(2) }];
    let mut drop_schema = waiting(120, InfluencedTables::Schema(SchemaId(1)));
    drop_schema.dropped = Some(InfluencedTables::Schema(SchemaId(1)));
    b.report("n2", &[(102, drop_schema.clone())]);
    b.after(1100);
    b.report("n2", &[(102, done(120))]);
    b.after(1100);
    assert!(b.placement.spans.has_table(TableId(1)) && b.placement.spans.has_table(TableId(2)));
    b.report("n1", &[(TRIGGER, moved)]);
    b.after(1100);
    b.report("n1", &[(TRIGGER, done(110)), (101, done(110))]);
    b.report("n1", &[(TRIGGER, drop_schema)]);
    b.report("n1", &[(TRIGGER, done(120))]);
    b.after(1100);
    assert!(b.placement.spans.has_table(TableId(1)), "it is in another schema");
    assert!(!b.placement.spans.has_table(TableId(2)));
    assert_eq!(b.barrier.len(), 0);
}
