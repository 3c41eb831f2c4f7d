//! Schema changes that a dispatcher executes without asking, and what the table trigger reports.

use event::DdlEvent;
use heartbeatpb::{InfluencedTables, SchemaChange, SchemaId, TableId, Ts};

use crate::dispatcher::testing::*;

// behaviour: dispatcher-65
#[test]
fn a_ddl_of_one_table_is_written_without_telling_anybody() {
    let mut d = Bench::table(50);
    assert_eq!(d.arrive(rows(&[60])), "working; write 60");
    assert_eq!(d.arrive(block(ddl(100))), "flush");
    assert_eq!(d.arrive(rows(&[110])), "", "nothing behind it is sent before it is done");
    d.flushed(0);
    assert_eq!(d.flush_ok(), "execute 100");
    assert_eq!(d.checkpoint(), 59);
    assert_eq!(d.written(), "write 110");
    assert_eq!(d.checkpoint(), 109);
}

// behaviour: dispatcher-65
#[test]
fn a_ddl_that_is_not_synced_is_passed() {
    let mut d = Bench::table(50);
    d.arrive(block(DdlEvent { not_sync: true, ..ddl(100) }));
    assert_eq!(d.flush_ok(), "");
    assert_eq!(d.checkpoint(), 99);
    assert_eq!(d.arrive(resolved(100)), "");
    assert_eq!(d.checkpoint(), 100);
}

// behaviour: dispatcher-66
#[test]
fn a_drop_is_reported_until_it_is_acknowledged() {
    let mut d = Bench::table(50);
    d.arrive(block(DdlEvent { dropped: Some(InfluencedTables::Normal(vec![TableId(1)])), ..ddl(100) }));
    d.flush_ok();
    assert_eq!(d.written(), "NONE 100 -1");
    assert!(d.dispatcher.unacknowledged(key(100)).is_some());
    assert_eq!(d.status(&ack(99)), "");
    assert!(d.dispatcher.unacknowledged(key(100)).is_some());
    assert_eq!(d.status(&ack(100)), "");
    assert!(d.dispatcher.unacknowledged(key(100)).is_none());
}

// behaviour: dispatcher-67
#[test]
fn an_added_table_caps_the_triggers_checkpoint_until_acknowledged() {
    let mut d = Bench::trigger(50);
    assert_eq!(d.arrive(block(adding(100, &[5]))), "working; flush");
    assert_eq!(d.flush_ok(), "execute 100");
    assert_eq!(d.written(), "NONE 100 +5");
    d.arrive(resolved(200));
    assert_eq!(d.checkpoint(), 99);
    d.status(&ack(101));
    assert_eq!(d.checkpoint(), 99);
    d.status(&ack(100));
    assert_eq!(d.checkpoint(), 200);
}

// behaviour: dispatcher-68
#[test]
fn the_cap_follows_the_smallest_pending_addition() {
    let mut d = Bench::trigger(50);
    for commit in [100, 140, 200] {
        d.arrive(block(adding(commit, &[5])));
        d.flush_ok();
        d.written();
    }
    d.arrive(resolved(300));
    d.status(&ack(140));
    assert_eq!(d.checkpoint(), 99);
    d.status(&ack(100));
    assert_eq!(d.checkpoint(), 199);
    d.status(&ack(200));
    assert_eq!(d.checkpoint(), 300);
    let mut d = Bench::trigger(50);
    for commit in [100, 140] {
        d.arrive(block(adding(commit, &[5])));
        d.flush_ok();
        d.written();
    }
    d.arrive(resolved(300));
    d.status(&ack(100));
    assert_eq!(d.checkpoint(), 139);
}

// behaviour: dispatcher-69
#[test]
fn a_premature_acknowledgement_lifts_no_cap() {
    let mut d = Bench::trigger(50);
    d.arrive(block(adding(100, &[5])));
    assert!(!d.dispatcher.can_close(true));
    assert_eq!(d.status(&ack(100)), "");
    d.flush_ok();
    d.status(&ack(100));
    d.written();
    d.arrive(resolved(200));
    assert_eq!(d.checkpoint(), 99);
}

// behaviour: dispatcher-70
#[test]
fn a_failed_write_undoes_cap_and_counter() {
    let mut d = Bench::trigger(50);
    d.arrive(block(adding(100, &[5])));
    assert_eq!(d.flush_failed(), "fail CDC:ErrSinkUnavailable");
    assert_eq!(d.dispatcher.pending_acks, 0);
    assert!(d.dispatcher.can_close(true));
    assert_eq!(d.checkpoint(), 50);
    let mut d = Bench::trigger(50);
    d.arrive(block(adding(100, &[5])));
    d.flush_ok();
    assert_eq!(d.write_failed(), "fail CDC:ErrSinkUnavailable");
    assert_eq!(d.dispatcher.pending_acks, 0);
    assert_eq!(d.checkpoint(), 50);
}

// behaviour: dispatcher-71
#[test]
fn empty_lists_of_tables_are_not_reported() {
    let mut d = Bench::trigger(50);
    d.arrive(block(DdlEvent { dropped: Some(InfluencedTables::Normal(Vec::new())), ..adding(100, &[]) }));
    d.flush_ok();
    assert_eq!(d.written(), "");
    assert_eq!(d.dispatcher.pending_acks, 0);
}

// behaviour: dispatcher-72
#[test]
fn a_trigger_with_an_unknown_table_closes_in_front_of_it() {
    let mut d = Bench::trigger(50);
    d.arrive(block(adding(100, &[5])));
    d.flush_ok();
    d.written();
    // An owner that leaves acknowledges nothing any more; its successor starts in front of the change.
    assert!(d.dispatcher.can_close(true));
    d.dispatcher.remove();
    assert_eq!(d.dispatcher.checkpoint(), Ts(99));
}

#[test]
fn a_ddl_that_cannot_be_followed_fails_with_its_text() {
    let mut d = Bench::table(50);
    let broken = DdlEvent { error: Some("column type changed".into()), ..ddl(100) };
    assert_eq!(d.arrive(block(broken)), "working; fail CDC:ErrSchemaChangeUnsupported");
    assert_eq!(d.checkpoint(), 50);
}

#[test]
fn a_rename_moves_this_dispatcher_only_and_at_once() {
    let change = SchemaChange { table: TableId(1), old: SchemaId(1), new: SchemaId(2) };
    let other = SchemaChange { table: TableId(9), old: SchemaId(1), new: SchemaId(3) };
    let mut d = Bench::table(50);
    let rename = DdlEvent { schema_changes: vec![other, change], ..wide(100) };
    assert_eq!(d.arrive(block(rename.clone())), "working; schema 1>2; flush");
    assert_eq!(d.dispatcher.schema, SchemaId(2));
    let mut trigger = Bench::trigger(50);
    assert_eq!(trigger.arrive(block(rename)), "working; flush");
}

// One commit ts names one DDL per table: readers of a log join several of one transaction.
#[test]
fn a_second_ddl_of_one_commit_ts_is_refused_and_not_lost() {
    let mut d = Bench::table(50);
    d.arrive(block(ddl(100)));
    d.flush_ok();
    assert_eq!(d.written(), "");
    assert_eq!(d.arrive(block(ddl(100))), "", "a repetition");
    d.arrive(resolved(100));
    let second = DdlEvent { query: "ALTER TABLE t1 ADD COLUMN d text".into(), ..ddl(100) };
    assert_eq!(d.arrive(block(second)), "fail CDC:ErrSchemaChangeUnsupported");
}

// The log side does not know the schema of a table of which nothing was told yet.
#[test]
fn a_change_of_another_schema_is_no_barrier() {
    let of_schema = |schema: i64| {
        block(DdlEvent { blocked: Some(InfluencedTables::Schema(SchemaId(schema))), ..wide(100) })
    };
    let mut d = Bench::table(50);
    assert_eq!(d.arrive(of_schema(2)), "");
    d.arrive(resolved(100));
    assert_eq!(d.checkpoint(), 100);
    let mut d = Bench::table(50);
    assert_eq!(d.arrive(of_schema(1)), "working; flush");
    let mut d = Bench::trigger(50);
    assert_eq!(d.arrive(of_schema(2)), "working; flush");
}
