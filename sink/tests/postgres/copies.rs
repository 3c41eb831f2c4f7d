//! The beginning of an initial copy, and what it finds.

use std::sync::Arc;

use event::TableInfo;

use crate::harness::{Rig, Rows, table};

fn items() -> Arc<TableInfo> {
    Arc::new(table(5, "items", &[("id", "integer"), ("name", "text")], &[0], &[]))
}

fn copied(t: &Arc<TableInfo>, ts: u64, ids: std::ops::Range<i32>, name: &str) -> Rows {
    let mut batch = Rows::of(t).copy_start(ts);
    for id in ids {
        batch = batch.insert(ts, &[&id.to_string(), name]);
    }
    batch
}

#[tokio::test]
async fn a_copy_fills_an_empty_table_and_the_stream_goes_on_behind_it() {
    let rig = Rig::new().await;
    let sink = rig.sink("worker-count=4&max-txn-row=100").await;
    let t = items();
    sink.table(&t).await.expect("opens");
    let tricky = "tab\there\nline \\N \\. \"q\" ü";
    sink.write(copied(&t, 50, 0..5000, tricky).build());
    sink.write(Rows::of(&t).continuing(5001).insert(50, &["5000", "\\N"]).build());
    sink.write(Rows::of(&t).update(60, &["1", "new"]).delete(61, &["2", "\\U"]).build());
    sink.flush().await;
    let counts = rig
        .target
        .query_one(
            "SELECT count(*), count(*) FILTER (WHERE name = $1), max(name) FILTER (WHERE id = 1) FROM items",
            &[&tricky],
        )
        .await
        .expect("counts");
    assert_eq!((counts.get::<_, i64>(0), counts.get::<_, i64>(1)), (5000, 4998));
    assert_eq!(counts.get::<_, &str>(2), "new");
}

#[tokio::test]
async fn a_copy_into_a_table_with_rows_is_refused_until_told_what_to_do() {
    let rig = Rig::new().await;
    rig.exec("CREATE TABLE items (id int PRIMARY KEY, name text); INSERT INTO items VALUES (1, 'theirs'), (9, 'theirs')")
        .await;
    let t = items();
    let sink = rig.sink("").await;
    sink.table(&t).await.expect("opens");
    sink.write(copied(&t, 50, 0..3, "ours").build());
    let error = sink.error().await;
    assert_eq!(error.code(), "CDC:ErrTargetNotEmpty");
    assert!(error.to_string().contains("on-existing-rows"));
    rig.expect("items", &["1|theirs", "9|theirs"]).await;

    let sink = rig.sink("on-existing-rows=append").await;
    sink.table(&t).await.expect("opens");
    sink.write(copied(&t, 50, 0..3, "ours").build());
    sink.flush().await;
    rig.expect("items", &["0|ours", "1|ours", "2|ours", "9|theirs"]).await;
    sink.stop().await.expect("no error");
}

#[tokio::test]
async fn rows_found_are_removed_when_the_user_says_so() {
    let rig = Rig::new().await;
    rig.exec("CREATE TABLE items (id int PRIMARY KEY, name text); INSERT INTO items VALUES (9, 'theirs')")
        .await;
    let t = items();
    let sink = rig.sink("on-existing-rows=truncate").await;
    sink.table(&t).await.expect("opens");
    sink.write(copied(&t, 50, 0..2, "ours").build());
    sink.flush().await;
    rig.expect("items", &["0|ours", "1|ours"]).await;
}

#[tokio::test]
async fn an_interrupted_copy_starts_over_from_another_snapshot() {
    let rig = Rig::new().await;
    for keyless in [false, true] {
        let mut info = (*items()).clone();
        if keyless {
            info = table(6, "loose", &[("id", "integer"), ("name", "text")], &[], &[]);
        }
        let t = Arc::new(info);
        let first = rig.sink("worker-count=2").await;
        first.table(&t).await.expect("opens");
        first.write(copied(&t, 50, 0..100, "first").build());
        first.flush().await;
        first.stop().await.expect("no error");

        let second = rig.sink("worker-count=2").await;
        second.table(&t).await.expect("opens");
        second.write(copied(&t, 70, 50..60, "second").build());
        second.write(Rows::of(&t).insert(80, &["1000", "streamed"]).build());
        second.flush().await;
        let rows = rig.target_rows(&t.name).await;
        assert_eq!(rows.len(), 11);
        assert!(!rows.iter().any(|row| row.contains("first")));
        second.stop().await.expect("no error");
    }
}

#[tokio::test]
async fn a_copy_that_is_replayed_from_the_same_snapshot_goes_on_where_it_was() {
    let rig = Rig::new().await;
    let t = Arc::new(table(6, "loose", &[("id", "integer"), ("name", "text")], &[], &[]));
    let first = rig.sink("").await;
    first.table(&t).await.expect("opens");
    first.write(copied(&t, 50, 0..100, "a").build());
    first.flush().await;
    first.stop().await.expect("no error");
    let second = rig.sink("").await;
    second.table(&t).await.expect("opens");
    second.write(copied(&t, 50, 0..150, "a").build());
    second.flush().await;
    assert_eq!(rig.target_rows("loose").await.len(), 150);
}
