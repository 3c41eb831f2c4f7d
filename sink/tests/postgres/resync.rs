//! Tables that are copied again while the stream goes on: all of it or nothing, and nothing of the stream twice or never.

use std::sync::Arc;

use bytes::Bytes;
use event::{CopyFormat, CopySession, CopyTarget, PartWriter, ResyncChange, ResyncState, TableInfo};
use heartbeatpb::{TableId, Ts, WallTime};
use sink::SinkOptions;

use crate::harness::{Rig, Rows, Running, table};

fn items() -> Arc<TableInfo> {
    Arc::new(table(5, "items", &[("id", "integer"), ("name", "text")], &[0], &[]))
}

/// Without a key: what is applied twice is seen.
fn loose() -> Arc<TableInfo> {
    Arc::new(table(6, "loose", &[("id", "integer"), ("name", "text")], &[], &[]))
}

fn target(rig: &Rig, params: &str) -> Arc<dyn CopyTarget> {
    let options = SinkOptions::new(rig.changefeed.clone(), "unused");
    sink::copies(&rig.uri(params), &options).expect("a URI").expect("a database")
}

fn ask() -> ResyncChange {
    ResyncChange::Ask { name: "public.items".into(), entering: false }
}

async fn states(target: &Arc<dyn CopyTarget>) -> Vec<(i64, ResyncState)> {
    let all = target.resyncs().await.expect("asks").expect("can");
    all.iter().map(|one| (one.table.0, one.state)).collect()
}

/// Begins to replace the table by these rows, as of `at`.
async fn replacing(
    session: &Arc<dyn CopySession>,
    table: &Arc<TableInfo>,
    at: u64,
    rows: &'static str,
) -> Box<dyn PartWriter> {
    let snapshot = (Ts(at), WallTime(at.cast_signed()));
    let (mut writer, format) = session.replace(table, snapshot).await.expect("begins");
    assert_eq!(format, CopyFormat::Text, "the types of these columns are not known");
    writer.write(Bytes::from_static(rows.as_bytes())).await.expect("takes");
    writer
}

/// A table with rows of the stream up to 20, and a sink that knows them.
async fn streamed(rig: &Rig, t: &Arc<TableInfo>) -> Running {
    let sink = rig.sink("worker-count=2").await;
    sink.table(t).await.expect("opens");
    sink.write(Rows::of(t).insert(10, &["1", "a"]).insert(20, &["2", "b"]).build());
    sink.flush().await;
    sink
}

#[tokio::test]
async fn the_stream_leaves_out_what_the_new_rows_hold_and_goes_on_behind_them() {
    let rig = Rig::new().await;
    for t in [items(), loose()] {
        let sink = streamed(&rig, &t).await;
        rig.exec(&format!("UPDATE {} SET name = 'damaged'", t.name)).await;
        let target = target(&rig, "");
        assert!(target.change_resync(t.id, &ask()).await.expect("asks"));
        let session = target.begin().await.expect("begins").expect("takes rows");
        let writer = replacing(&session, &t, 50, "1\ta\n2\tb\n3\tc\n").await;
        rig.expect(&t.name, &["1|damaged", "2|damaged"]).await;
        writer.commit(3).await.expect("commits");
        session.end().await;
        let all = target.resyncs().await.expect("asks").expect("can");
        let one = all.iter().find(|one| one.table == t.id).expect("is kept");
        assert_eq!((one.state, one.rows, one.ended.is_some()), (ResyncState::Done, 3, true));
        // What the sink remembers is of before.
        sink.write(Rows::of(&t).insert(40, &["3", "c"]).insert(60, &["4", "d"]).build());
        sink.flush().await;
        rig.expect(&t.name, &["1|a", "2|b", "3|c", "4|d"]).await;
        sink.stop().await.expect("no error");
    }
}

#[tokio::test]
async fn nothing_is_replaced_when_the_stream_did_not_stand_still() {
    let rig = Rig::new().await;
    let t = loose();
    let sink = streamed(&rig, &t).await;
    let target = target(&rig, "");
    assert!(target.change_resync(t.id, &ask()).await.expect("asks"));
    let session = target.begin().await.expect("begins").expect("takes rows");
    let late = session.replace(&t, (Ts(15), WallTime(15))).await.err().expect("20 is applied");
    assert!(late.retryable && late.message.contains("newer"), "{late}");
    let writer = replacing(&session, &t, 50, "1\ta\n2\tb\n3\tc\n").await;
    sink.write(Rows::of(&t).insert(40, &["3", "c"]).build());
    sink.flush().await;
    let overtaken = writer.commit(3).await.expect_err("40 came in between");
    assert!(overtaken.retryable, "{overtaken}");
    rig.expect("loose", &["1|a", "2|b", "3|c"]).await;
    assert_eq!(states(&target).await, [(6, ResyncState::Waiting)]);
    // As it is asked for again.
    let writer = replacing(&session, &t, 50, "1\ta\n2\tb\n3\tc\n").await;
    writer.commit(3).await.expect("nothing came in between");
    rig.expect("loose", &["1|a", "2|b", "3|c"]).await;
    sink.stop().await.expect("no error");
}

#[tokio::test]
async fn a_copy_that_is_cut_off_short_or_not_wanted_any_more_changes_nothing() {
    let rig = Rig::new().await;
    let t = items();
    let sink = streamed(&rig, &t).await;
    let target = target(&rig, "");
    let session = target.begin().await.expect("begins").expect("takes rows");
    drop(replacing(&session, &t, 50, "9\tz\n").await);
    let short = replacing(&session, &t, 50, "9\tz\n").await.commit(2).await.expect_err("one is missing");
    assert!(short.message.contains("2 rows were read and 1 written"), "{short}");
    let unasked = replacing(&session, &t, 50, "9\tz\n").await.commit(1).await.expect_err("nobody has asked");
    assert!(unasked.retryable, "{unasked}");
    assert!(target.change_resync(t.id, &ask()).await.expect("asks"));
    let writer = replacing(&session, &t, 50, "9\tz\n").await;
    assert!(target.change_resync(t.id, &ResyncChange::Pause).await.expect("pauses"));
    writer.commit(1).await.expect_err("it is paused");
    rig.expect("items", &["1|a", "2|b"]).await;
    sink.write(Rows::of(&t).insert(40, &["3", "c"]).build());
    sink.flush().await;
    rig.expect("items", &["1|a", "2|b", "3|c"]).await;
    sink.stop().await.expect("no error");
}

#[tokio::test]
async fn a_newer_copy_ends_the_one_of_a_predecessor() {
    let rig = Rig::new().await;
    let t = items();
    let sink = streamed(&rig, &t).await;
    let target = target(&rig, "");
    assert!(target.change_resync(t.id, &ask()).await.expect("asks"));
    let former = target.begin().await.expect("begins").expect("takes rows");
    let stuck = replacing(&former, &t, 50, "8\told\n").await;
    let latter = target.begin().await.expect("begins").expect("takes rows");
    replacing(&latter, &t, 60, "9\tnew\n").await.commit(1).await.expect("nobody is in its way");
    stuck.commit(1).await.expect_err("it was ended");
    rig.expect("items", &["9|new"]).await;
    sink.stop().await.expect("no error");
}

#[tokio::test]
async fn requests_change_only_where_that_has_a_meaning_and_are_forgotten_with_the_changefeed() {
    let rig = Rig::new().await;
    let target = target(&rig, "");
    let (one, other) = (TableId(7), TableId(8));
    let change = async |table: TableId, change: ResyncChange| {
        target.change_resync(table, &change).await.expect("asks")
    };
    assert_eq!(states(&target).await, [], "nobody has ever asked");
    for nothing in [ResyncChange::Pause, ResyncChange::Resume, ResyncChange::Cancel] {
        assert!(!change(one, nothing).await);
    }
    assert!(change(one, ask()).await && change(other, ask()).await);
    assert!(!change(one, ask()).await, "it is waiting");
    assert!(!change(one, ResyncChange::Resume).await);
    assert!(change(one, ResyncChange::Pause).await && !change(one, ResyncChange::Pause).await);
    assert!(!change(one, ask()).await, "it is paused");
    let fail = || ResyncChange::Fail { code: "CDC:ErrSinkData".into(), message: "é".repeat(10_000) };
    assert!(!change(one, fail()).await, "it is paused");
    assert!(change(one, ResyncChange::Resume).await && change(one, fail()).await);
    assert_eq!(states(&target).await, [(7, ResyncState::Failed), (8, ResyncState::Waiting)]);
    let all = target.resyncs().await.expect("asks").expect("can");
    let (code, message) = all[0].error.clone().expect("is told");
    assert!(code == "CDC:ErrSinkData" && message.len() > 4000 && message.len() <= 4096, "{}", message.len());
    assert!(change(one, ask()).await, "again");
    assert!(change(other, ResyncChange::Cancel).await);
    assert_eq!(states(&target).await, [(7, ResyncState::Waiting)]);
    let sink = rig.sink("").await;
    sink.sink.forget_changefeed().await.expect("forgets");
    assert_eq!(states(&target).await, []);
    assert!(self::target(&rig, "on-existing-rows=append").resyncs().await.expect("asks").is_none());
    sink.stop().await.ok();
}

#[tokio::test]
async fn of_a_table_that_came_a_copy_must_hold_what_was_left_out_and_rows_of_others_stay() {
    let rig = Rig::new().await;
    let t = items();
    rig.exec("CREATE TABLE items (id int PRIMARY KEY, name text)").await;
    let target = target(&rig, "");
    let entering = || ResyncChange::Ask { name: "public.items".into(), entering: true };
    let leave_out = |until| ResyncChange::LeaveOut { until: Ts(until) };
    assert!(!target.change_resync(t.id, &leave_out(40)).await.expect("asks"), "nobody has asked");
    assert!(target.change_resync(t.id, &ask()).await.expect("asks"));
    assert!(!target.change_resync(t.id, &leave_out(40)).await.expect("asks"), "its rows were copied once");
    assert!(target.change_resync(t.id, &entering()).await.expect("asks"), "it comes while it waits");
    assert!(!target.change_resync(t.id, &entering()).await.expect("asks"), "once");
    assert!(target.resyncs().await.expect("asks").expect("can")[0].entering);

    let session = target.begin().await.expect("begins").expect("takes rows");
    let early = replacing(&session, &t, 50, "1\ta\n").await;
    assert!(target.change_resync(t.id, &leave_out(51)).await.expect("asks"));
    assert!(target.change_resync(t.id, &leave_out(40)).await.expect("asks"), "which was said before");
    let late = early.commit(1).await.expect_err("51 is left out");
    assert!(late.retryable, "{late}");
    rig.exec("INSERT INTO items VALUES (7, 'theirs')").await;
    let theirs = session.replace(&t, (Ts(51), WallTime(51))).await.err().expect("there are rows");
    assert_eq!(theirs.code, "CDC:ErrTargetNotEmpty");
    rig.expect("items", &["7|theirs"]).await;
    rig.exec("DELETE FROM items").await;
    replacing(&session, &t, 51, "1\ta\n").await.commit(1).await.expect("51 is in it");
    rig.expect("items", &["1|a"]).await;
    let all = target.resyncs().await.expect("asks").expect("can");
    assert_eq!((all[0].state, all[0].entering), (ResyncState::Done, false));
    assert!(!target.change_resync(t.id, &leave_out(60)).await.expect("asks"), "it has come");
}

#[tokio::test]
async fn requests_that_an_earlier_version_kept_are_read_and_changed() {
    let rig = Rig::new().await;
    let target = target(&rig, "");
    assert!(target.change_resync(TableId(7), &ask()).await.expect("asks"));
    rig.exec("ALTER TABLE millrace.resyncs DROP COLUMN entering, DROP COLUMN left_out").await;
    assert_eq!(states(&target).await, [(7, ResyncState::Waiting)]);
    let entering = ResyncChange::Ask { name: "public.items".into(), entering: true };
    assert!(target.change_resync(TableId(7), &entering).await.expect("asks"));
    assert!(target.resyncs().await.expect("asks").expect("can")[0].entering);
}
