//! Copies past the stream: parts are whole or not at all, and the stream leaves out what each part's snapshot held.

use std::sync::Arc;

use bytes::Bytes;
use event::{Blocks, CopyFormat, CopyPart, CopySession, KeyCodec, TableInfo};
use heartbeatpb::{MaintainerEpoch, NodeId, Ts, WallTime, codes};
use sink::{FenceRequest, SinkOptions, Whom};

use crate::harness::{Rig, Rows, table};

fn items() -> Arc<TableInfo> {
    Arc::new(table(5, "items", &[("id", "integer"), ("name", "text")], &[0], &[]))
}

fn options(rig: &Rig, node: &str, epoch: u64) -> SinkOptions {
    SinkOptions {
        node: node.into(),
        epoch: MaintainerEpoch::from_wire(epoch),
        ..SinkOptions::new(rig.changefeed.clone(), "unused")
    }
}

async fn session(rig: &Rig, params: &str) -> Arc<dyn CopySession> {
    let target = sink::copies(&rig.uri(params), &options(rig, "n", 1)).expect("a URI").expect("a database");
    target.begin().await.expect("begins").expect("takes rows")
}

/// The keys from one number to another, exclusive; `None` is the end of all.
fn keys(table: &TableInfo, from: Option<i32>, to: Option<i32>) -> CopyPart {
    let codec = KeyCodec::new(table).expect("divisible");
    let key = |id: Option<i32>| {
        id.map_or_else(Vec::new, |id| codec.encode_values(&[&id.to_string()]).expect("a key"))
    };
    CopyPart { start: key(from), end: key(to), blocks: None }
}

fn lines(ids: std::ops::Range<i32>, name: &str) -> (Bytes, u64) {
    let text: String = ids.clone().map(|id| format!("{id}\t{name}\n")).collect();
    (text.into(), ids.len() as u64)
}

async fn copy(
    session: &Arc<dyn CopySession>,
    table: &TableInfo,
    part: CopyPart,
    at: u64,
    (data, rows): (Bytes, u64),
) {
    let mut writer = session
        .write(table.id, &part, CopyFormat::Text, (Ts(at), WallTime(at.cast_signed())))
        .await
        .expect("begins");
    // Cut anywhere, also inside of a value.
    let (one, other) = (data.slice(..data.len() / 3), data.slice(data.len() / 3..));
    writer.write(one).await.expect("takes");
    writer.write(other).await.expect("takes");
    writer.commit(rows).await.expect("commits");
}

/// A finished table whose keys below 10 are `a` as of 50, and the others `b` as of 90.
async fn copy_in_two(rig: &Rig, t: &Arc<TableInfo>) {
    let copier = session(rig, "").await;
    copier.open(t).await.expect("opens");
    copy(&copier, t, keys(t, None, Some(10)), 50, lines(0..10, "a")).await;
    copy(&copier, t, keys(t, Some(10), None), 90, lines(10..20, "b")).await;
    copier.finish(t.id).await.expect("complete");
    copier.end().await;
}

#[tokio::test]
async fn a_copy_that_goes_on_in_another_snapshot_meets_the_stream_key_by_key() {
    let rig = Rig::new().await;
    let t = items();
    let first = session(&rig, "").await;
    // The dispatcher was there before the copy, and has read that there is nothing.
    let sink = rig.sink("worker-count=2").await;
    first.open(&t).await.expect("opens");
    sink.table(&t).await.expect("opens");
    copy(&first, &t, keys(&t, None, Some(10)), 50, lines(0..10, "at 50")).await;
    first.end().await;

    let second = session(&rig, "").await;
    let found = second.open(&t).await.expect("opens");
    assert_eq!(found.parts.len(), 1);
    assert_eq!((found.parts[0].rows, found.parts[0].at, found.finished), (10, Ts(50), false));
    let missing = second.finish(t.id).await.expect_err("a part is missing");
    assert_eq!(missing.code, "CDC:ErrSinkProgress");
    // Between the snapshots row 3 moved to 30, row 12 to -7, and row 15 came and went.
    copy(&second, &t, keys(&t, Some(10), None), 90, lines(10..12, "at 90")).await;
    copy_more(&rig, "30\tmoved").await;
    second.finish(t.id).await.expect("complete");
    assert_eq!(
        second.finished().await.expect("asks")[0].1.at,
        Ts(50),
        "the stream begins at the oldest part"
    );
    second.end().await;

    let batch = Rows::of(&t)
        .update(40, &["1", "too old for both"])
        .update(60, &["1", "newer than its part"])
        .update(61, &["11", "older than its part"])
        .insert(62, &["15", "gone again before the second snapshot"])
        .update_from(63, &["3", "\\U"], &["30", "moved"])
        .update_from(64, &["12", "\\U"], &["-7", "came"])
        .delete(65, &["15", "\\U"])
        .delete(66, &["4", "\\U"])
        .update(95, &["10", "newer than both"]);
    sink.write(batch.build());
    sink.flush().await;
    let mut expected: Vec<String> = [0, 2, 5, 6, 7, 8, 9].iter().map(|id| format!("{id}|at 50")).collect();
    let rest = ["-7|came", "1|newer than its part", "10|newer than both", "11|at 90", "30|moved"];
    expected.extend(rest.map(str::to_owned));
    expected.sort();
    assert_eq!(rig.target_rows("items").await, expected);
    sink.stop().await.expect("no error");
}

#[tokio::test]
async fn a_row_that_is_missing_does_not_hold_a_queue_whose_pieces_become_one() {
    let rig = Rig::new().await;
    let t = items();
    copy_in_two(&rig, &t).await;
    // Somebody has been at the target.
    rig.exec("DELETE FROM items WHERE id = 5").await;
    let sink = rig.sink("worker-count=2").await;
    sink.table(&t).await.expect("opens");
    sink.write(Rows::of(&t).update_from(95, &["5", "\\U"], &["6000", "whole"]).build());
    sink.flush().await;
    assert!(rig.target_rows("items").await.contains(&"6000|whole".to_owned()));
    sink.stop().await.expect("no error");
}

// behaviour: dataplane-14
#[tokio::test]
async fn a_row_that_comes_to_an_older_part_without_all_of_its_values_has_the_table_asked_for() {
    let rig = Rig::new().await;
    let t = items();
    copy_in_two(&rig, &t).await;
    let sink = rig.sink("worker-count=2").await;
    sink.table(&t).await.expect("opens");
    // To a newer part the row is there already; what goes needs nothing but its key.
    sink.write(Rows::of(&t).update_from(60, &["3", "\\U"], &["12", "\\U"]).build());
    sink.flush().await;
    assert!(!rig.target_rows("items").await.contains(&"3|a".to_owned()));
    // From the newer part it is gone already, and nobody has its value.
    let batch = Rows::of(&t).update(61, &["4", "before it"]).update_from(62, &["15", "\\U"], &["5", "\\U"]);
    sink.write(batch.build());
    let error = sink.error().await;
    assert_eq!(error.code(), codes::SPLIT_ROW_INCOMPLETE, "{error}");
    assert!(rig.target_rows("items").await.contains(&"5|a".to_owned()), "no half of it was applied");
    let target = sink::copies(&rig.uri(""), &options(&rig, "n", 1)).expect("a URI").expect("a database");
    let asked = target.resyncs().await.expect("asks").expect("a database");
    let asked: Vec<_> =
        asked.iter().map(|one| (one.table, one.name.as_str(), one.entering, one.state)).collect();
    assert_eq!(asked, [(t.id, "public.items", true, event::ResyncState::Waiting)]);
}

/// A row that the second snapshot of the test above holds.
async fn copy_more(rig: &Rig, line: &str) {
    let (id, name) = line.split_once('\t').expect("two values");
    rig.exec(&format!("INSERT INTO items VALUES ({id}, '{name}')")).await;
}

#[tokio::test]
async fn a_part_that_is_not_committed_leaves_nothing_and_one_that_is_survives() {
    let rig = Rig::new().await;
    let t = items();
    let copier = session(&rig, "").await;
    copier.open(&t).await.expect("opens");
    let (data, rows) = lines(0..1000, "x");
    let snapshot = (Ts(50), WallTime(50));
    let mut dropped =
        copier.write(t.id, &CopyPart::default(), CopyFormat::Text, snapshot).await.expect("begins");
    dropped.write(data.clone()).await.expect("takes");
    drop(dropped);
    let mut short =
        copier.write(t.id, &CopyPart::default(), CopyFormat::Text, snapshot).await.expect("begins");
    short.write(data.clone()).await.expect("takes");
    let error = short.commit(rows + 1).await.expect_err("one is missing");
    assert!(error.message.contains("1001 rows were read and 1000 written"), "{error}");
    assert!(rig.target_rows("items").await.is_empty());
    copy(&copier, &t, CopyPart::default(), 50, (data, rows)).await;
    copier.end().await;
    let copier = session(&rig, "").await;
    let found = copier.open(&t).await.expect("opens");
    assert!(found.parts[0].part.is_all());
    assert_eq!(found.parts[0].rows, 1000);
    copier.finish(t.id).await.expect("complete");
    copier.finish(t.id).await.expect("again");
    assert!(copier.open(&t).await.expect("opens").finished);
    assert_eq!(rig.target_rows("items").await.len(), 1000);
}

#[tokio::test]
async fn pages_of_two_snapshots_are_no_table() {
    let rig = Rig::new().await;
    let t = Arc::new(table(6, "loose", &[("id", "integer"), ("name", "text")], &[], &[]));
    let copier = session(&rig, "").await;
    copier.open(&t).await.expect("opens");
    let part = |from, to| CopyPart { blocks: Some(Blocks { from, to }), ..CopyPart::default() };
    copy(&copier, &t, part(0, 10), 50, lines(0..10, "a")).await;
    copy(&copier, &t, part(10, u32::MAX), 60, lines(10..20, "b")).await;
    assert_eq!(copier.finish(t.id).await.expect_err("two snapshots").code, "CDC:ErrSinkProgress");
    copier.clear(t.id).await.expect("clears");
    assert!(rig.target_rows("loose").await.is_empty());
    assert!(copier.open(&t).await.expect("opens").parts.is_empty());
    copy(&copier, &t, part(10, u32::MAX), 70, lines(10..20, "b")).await;
    copy(&copier, &t, part(0, 10), 70, lines(0..10, "a")).await;
    copier.finish(t.id).await.expect("complete");
    assert_eq!(rig.target_rows("loose").await.len(), 20);
}

#[tokio::test]
async fn rows_that_were_there_before_are_treated_as_the_sink_is_told() {
    let rig = Rig::new().await;
    let t = items();
    rig.exec("CREATE TABLE items (id int PRIMARY KEY, name text); INSERT INTO items VALUES (9, 'theirs')")
        .await;
    let refused = session(&rig, "").await.open(&t).await.expect_err("not empty");
    assert_eq!(refused.code, "CDC:ErrTargetNotEmpty");
    assert!(!refused.retryable && refused.message.contains("on-existing-rows"), "{refused}");
    rig.expect("items", &["9|theirs"]).await;
    let append = sink::copies(&rig.uri("on-existing-rows=append"), &options(&rig, "n", 1)).expect("a URI");
    assert!(
        append.expect("a database").begin().await.expect("begins").is_none(),
        "rows are merged in the stream"
    );
    session(&rig, "on-existing-rows=truncate").await.open(&t).await.expect("opens");
    assert!(rig.target_rows("items").await.is_empty());
}

#[tokio::test]
async fn what_an_earlier_version_has_copied_is_removed() {
    let rig = Rig::new().await;
    let t = items();
    let sink = rig.sink("").await;
    sink.table(&t).await.expect("opens");
    sink.write(Rows::of(&t).copy_start(50).insert(50, &["1", "half"]).build());
    sink.flush().await;
    sink.stop().await.expect("no error");
    let copier = session(&rig, "").await;
    assert!(copier.open(&t).await.expect("opens").parts.is_empty());
    assert!(rig.target_rows("items").await.is_empty());
}

#[tokio::test]
async fn a_fenced_copy_commits_nothing_any_more_and_does_not_end_the_sink_of_its_node() {
    let rig = Rig::new().await;
    let t = items();
    let sink = crate::harness::Running::open_with(&rig.uri(""), &options(&rig, "n", 1)).await.expect("opens");
    sink.table(&t).await.expect("opens");
    let copier = session(&rig, "").await;
    copier.open(&t).await.expect("opens");
    let mut writer = copier
        .write(t.id, &CopyPart::default(), CopyFormat::Text, (Ts(50), WallTime(50)))
        .await
        .expect("begins");
    let (data, rows) = lines(0..10, "x");
    writer.write(data).await.expect("takes");
    // A new maintainer fences all but the nodes that it knows.
    let request = FenceRequest {
        changefeed: rig.changefeed.clone(),
        epoch: MaintainerEpoch::from_wire(2),
        newest: MaintainerEpoch::from_wire(2),
        whom: Whom::AllBut([NodeId::from("n")].into()),
    };
    sink::fence(&rig.uri(""), &request).await.expect("the target answers");
    writer.commit(rows).await.expect_err("it is fenced");
    assert_eq!(copier.open(&t).await.expect_err("it is fenced").code, codes::SINK_FENCED);
    assert!(rig.target_rows("items").await.is_empty());
    let late = sink::copies(&rig.uri(""), &options(&rig, "m", 1)).expect("a URI").expect("a database");
    assert_eq!(late.begin().await.err().expect("an old epoch").code, codes::SINK_FENCED);
    // The node's sink goes on.
    sink.write(Rows::of(&t).insert(60, &["1", "streamed"]).build());
    sink.flush().await;
    rig.expect("items", &["1|streamed"]).await;
    sink.stop().await.expect("no error");
}

/// Begins a part as another node does that was given a right.
async fn elsewhere(
    rig: &Rig,
    right: event::CopyRight,
    table: &Arc<TableInfo>,
    part: &CopyPart,
) -> Result<Box<dyn event::PartWriter>, event::CopyError> {
    let target = sink::copies(&rig.uri(""), &options(rig, "m", 1)).expect("a URI").expect("a database");
    target.write_for(right, table, part, CopyFormat::Text, (Ts(50), WallTime(50))).await
}

#[tokio::test]
async fn another_node_writes_parts_until_its_right_is_taken_back() {
    let rig = Rig::new().await;
    let t = items();
    let copier = session(&rig, "").await;
    copier.open(&t).await.expect("opens");
    let right = copier.admit(&"m".into()).await.expect("a right");
    let (first, second) = (keys(&t, None, Some(10)), keys(&t, Some(10), None));
    let mut one = elsewhere(&rig, right, &t, &first).await.expect("begins");
    let mut two = elsewhere(&rig, right, &t, &second).await.expect("begins");
    let (data, rows) = lines(0..10, "theirs");
    one.write(data).await.expect("takes");
    two.write(lines(10..20, "lost").0).await.expect("takes");
    one.commit(rows).await.expect("commits");

    copier.dismiss(right).await.expect("ends what was begun");
    two.commit(10).await.expect_err("its transaction was ended");
    let late = elsewhere(&rig, right, &t, &second).await.map(drop).expect_err("it has no right");
    assert_eq!(late.code, codes::SINK_FENCED);
    copier.dismiss(right).await.expect("it was taken back before");
    let there: Vec<_> =
        copier.parts(t.id).await.expect("parts").into_iter().map(|p| (p.part, p.rows)).collect();
    assert_eq!(there, [(first.clone(), 10)], "what was committed counts, and nothing else");

    copy(&copier, &t, second, 50, lines(10..20, "ours")).await;
    copier.finish(t.id).await.expect("all parts are there");
    assert_eq!(rig.target_rows("items").await.len(), 20);
    let more = copier.admit(&"m".into()).await.expect("another one");
    copier.end().await;
    let late = elsewhere(&rig, more, &t, &first).await.map(drop).expect_err("the copy has ended");
    assert_eq!(late.code, codes::SINK_FENCED);
}

#[tokio::test]
async fn who_begins_a_copy_ends_what_others_write_for_the_one_before() {
    let rig = Rig::new().await;
    let t = items();
    let before = session(&rig, "").await;
    before.open(&t).await.expect("opens");
    let right = before.admit(&"m".into()).await.expect("a right");
    let mut part = elsewhere(&rig, right, &t, &CopyPart::default()).await.expect("begins");
    part.write(lines(0..10, "late").0).await.expect("takes");
    // The first one could not say goodbye.
    let after = session(&rig, "").await;
    part.commit(10).await.expect_err("its transaction was ended");
    assert!(after.open(&t).await.expect("opens").parts.is_empty());
    assert!(rig.target_rows("items").await.is_empty());
    assert_eq!(before.admit(&"m".into()).await.map(drop).err().map(|error| error.code), None);
}

#[tokio::test]
async fn binary_is_offered_only_where_both_ends_have_the_same_types() {
    let rig = Rig::new().await;
    let mut info = (*items()).clone();
    info.columns[0].ty.oid = 23;
    info.columns[1].ty.oid = 25;
    let same = Arc::new(info);
    let copier = session(&rig, "").await;
    assert!(copier.open(&same).await.expect("opens").binary);
    rig.exec("ALTER TABLE items ALTER name TYPE varchar").await;
    assert!(!copier.open(&same).await.expect("opens").binary);
    assert!(!copier.open(&items()).await.expect("opens").binary, "a type that is not known");
}

#[tokio::test]
async fn the_shapes_that_a_copy_began_with_are_remembered() {
    let rig = Rig::new().await;
    let first = session(&rig, "").await;
    assert_eq!(first.shapes().await.expect("asks"), None);
    first.set_shapes(7).await.expect("notes");
    first.end().await;
    let second = session(&rig, "").await;
    assert_eq!(second.shapes().await.expect("asks"), Some(7));
    second.set_shapes(u32::MAX).await.expect("notes");
    assert_eq!(second.shapes().await.expect("asks"), Some(u32::MAX));
    assert!(second.finished().await.expect("asks").is_empty(), "that is no table");
}

#[tokio::test]
async fn rows_without_columns_are_counted() {
    let rig = Rig::new().await;
    let t = Arc::new(table(7, "bare", &[], &[], &[]));
    let copier = session(&rig, "").await;
    assert!(!copier.open(&t).await.expect("opens").binary);
    copy(&copier, &t, CopyPart::default(), 50, ("\n\n\n".into(), 3)).await;
    let row = rig.target.query_one("SELECT count(*) FROM bare", &[]).await.expect("counts");
    assert_eq!(row.get::<_, i64>(0), 3);
}
