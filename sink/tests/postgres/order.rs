//! What depends on order: keys that change hands, truncation, rows without a key.

use std::sync::Arc;

use event::{ReplicaIdentity, RowOp, TableInfo};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use crate::harness::{Rig, Rows, rows, table, values};

fn people(unique: bool) -> Arc<TableInfo> {
    let keys: &[&[usize]] = if unique { &[&[1]] } else { &[] };
    Arc::new(table(100, "people", &[("id", "integer"), ("name", "text"), ("note", "text")], &[0], keys))
}

#[tokio::test]
async fn inserts_updates_and_deletes_of_many_rows_arrive() {
    let rig = Rig::new().await;
    let sink = rig.sink("worker-count=3&max-txn-row=64").await;
    let t = people(false);
    sink.table(&t).await.expect("opens");
    let mut batch = Rows::of(&t);
    for id in 0..500 {
        batch = batch.insert(10, &[&id.to_string(), "a", "\\N"]);
    }
    for id in 0..500 {
        batch = batch.update(11, &[&id.to_string(), "b", "x"]);
    }
    for id in (0..500).filter(|id| id % 5 != 0) {
        batch = batch.delete(12, &[&id.to_string(), "\\U", "\\U"]);
    }
    sink.write(batch.build());
    sink.flush().await;
    let expected: Vec<String> = (0..500).step_by(5).map(|id| format!("{id}|b|x")).collect();
    rig.expect("people", &expected.iter().map(String::as_str).collect::<Vec<_>>()).await;
    sink.stop().await.expect("no error");
}

// behaviour: dataplane-4
#[tokio::test]
async fn unique_values_are_swapped_inside_one_transaction_and_across_transactions() {
    for full in [false, true] {
        let rig = Rig::new().await;
        let sink = rig.sink("worker-count=8").await;
        let mut info = (*people(true)).clone();
        if full {
            info.identity = ReplicaIdentity::Full;
        }
        let t = Arc::new(info);
        sink.table(&t).await.expect("opens");
        let mut batch = Rows::of(&t);
        for id in 0..40 {
            batch = batch.insert(10, &[&id.to_string(), &format!("n{id}"), "x"]);
        }
        let update = |batch: Rows, ts: u64, id: i32, from: &str, to: &str| {
            let id = id.to_string();
            let (old, new) = ([id.as_str(), from, "x"], [id.as_str(), to, "x"]);
            if full { batch.update_from(ts, &old, &new) } else { batch.update(ts, &new) }
        };
        for pair in 0..20 {
            // Half of the swaps in one transaction, half in three.
            let (a, b) = (pair * 2, pair * 2 + 1);
            let ts = |step| 20 + if pair % 2 == 0 { 100 + u64::try_from(pair).unwrap() } else { step };
            if pair % 2 == 0 {
                continue;
            }
            batch = update(batch, ts(0), a, &format!("n{a}"), &format!("tmp{a}"));
            batch = update(batch, ts(0), b, &format!("n{b}"), &format!("n{a}"));
            batch = update(batch, ts(0), a, &format!("tmp{a}"), &format!("n{b}"));
        }
        for pair in (0..20).step_by(2) {
            let (a, b) = (pair * 2, pair * 2 + 1);
            let ts = 200 + 3 * u64::try_from(pair).unwrap();
            batch = update(batch, ts, a, &format!("n{a}"), &format!("tmp{a}"));
            batch = update(batch, ts + 1, b, &format!("n{b}"), &format!("n{a}"));
            batch = update(batch, ts + 2, a, &format!("tmp{a}"), &format!("n{b}"));
        }
        sink.write(batch.build());
        sink.flush().await;
        let expected: Vec<String> = (0..40).map(|id: i32| format!("{id}|n{}|x", id ^ 1)).collect();
        rig.expect("people", &expected.iter().map(String::as_str).collect::<Vec<_>>()).await;
        sink.stop().await.expect("no error");
    }
}

// behaviour: dataplane-4
/// Transactions that have written something, those that were rolled back included.
async fn transactions(rig: &Rig) -> i64 {
    let text = "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint";
    rig.target.query_one(text, &[]).await.expect("a snapshot").get(0)
}

// behaviour: dataplane-16
#[tokio::test]
async fn unique_values_that_change_hands_unseen_do_not_cost_a_transaction_each() {
    let table = people(true);
    for deferrable in ["", "DEFERRABLE INITIALLY DEFERRED"] {
        let rig = Rig::new().await;
        let create =
            format!("CREATE TABLE people (id int PRIMARY KEY, name text UNIQUE {deferrable}, note text)");
        rig.exec(&create).await;
        let sink = rig.sink("worker-count=4&max-txn-row=256").await;
        sink.table(&table).await.expect("opens");
        let mut names: Vec<String> = (0..60).map(|id| format!("first {id}")).collect();
        let mut batch = Rows::of(&table);
        for (id, name) in names.iter().enumerate() {
            batch = batch.insert(10, &[&id.to_string(), name, "x"]);
        }
        sink.write(batch.build());
        sink.flush().await;
        let before = transactions(&rig).await;
        let mut random = StdRng::seed_from_u64(1);
        let mut batch = Rows::of(&table);
        for ts in 11..1011 {
            let (from, to) = (random.random_range(0..60), random.random_range(0..60));
            let freed = std::mem::replace(&mut names[from], format!("later {ts}"));
            batch = batch.update(ts, &[&from.to_string(), &names[from], "gave"]);
            names[to] = freed;
            batch = batch.update(ts, &[&to.to_string(), &names[to], "took"]);
        }
        sink.write(batch.build());
        sink.flush().await;
        let took = transactions(&rig).await - before;
        assert!(took < 200, "{deferrable}: {took} transactions for 2000 changes");
        let mut at_end: Vec<_> =
            values(&rig.target, "people").await.into_iter().filter_map(|row| row[1].clone()).collect();
        at_end.sort();
        names.sort();
        assert_eq!(at_end, names);
        sink.stop().await.expect("no error");
    }
}

#[tokio::test]
async fn a_value_freed_by_a_delete_is_taken_by_another_row() {
    let rig = Rig::new().await;
    let sink = rig.sink("worker-count=8").await;
    let t = people(true);
    sink.table(&t).await.expect("opens");
    let mut batch = Rows::of(&t).insert(10, &["0", "the one", "x"]);
    for id in 1..100 {
        batch = batch.delete(10 + id, &[&(id - 1).to_string(), "\\U", "\\U"]);
        batch = batch.insert(10 + id, &[&id.to_string(), "the one", "x"]);
    }
    sink.write(batch.build());
    sink.flush().await;
    rig.expect("people", &["99|the one|x"]).await;
}

#[tokio::test]
async fn rows_whose_key_changes_keep_their_order_in_both_places() {
    let rig = Rig::new().await;
    let sink = rig.sink("worker-count=8").await;
    let t = people(false);
    sink.table(&t).await.expect("opens");
    let mut batch = Rows::of(&t).insert(10, &["0", "walker", "kept"]).insert(10, &["-1", "other", "x"]);
    for id in 1..200 {
        let (from, to) = ((id - 1).to_string(), id.to_string());
        // The note is stored out of line and not sent.
        batch = batch.update_from(10 + id, &[&from, "\\U", "\\U"], &[&to, "walker", "\\U"]);
        // The key that became free is taken and freed again.
        batch = batch.insert(10 + id, &[&from, "visitor", "y"]).delete(10 + id, &[&from, "\\U", "\\U"]);
    }
    sink.write(batch.build());
    sink.flush().await;
    rig.expect("people", &["-1|other|x", "199|walker|kept"]).await;
}

#[tokio::test]
async fn values_that_were_not_sent_stay_as_they_are() {
    let rig = Rig::new().await;
    let sink = rig.sink("").await;
    let t = people(false);
    sink.table(&t).await.expect("opens");
    sink.write(Rows::of(&t).insert(10, &["1", "a", "large"]).insert(10, &["2", "b", "huge"]).build());
    sink.flush().await;
    sink.write(
        Rows::of(&t)
            .update(11, &["1", "c", "\\U"])
            .update(12, &["1", "d", "\\U"])
            .update(13, &["2", "\\U", "\\N"])
            .update(14, &["2", "e", "small"])
            .update(15, &["2", "f", "\\U"])
            .build(),
    );
    sink.flush().await;
    rig.expect("people", &["1|d|large", "2|f|small"]).await;
}

#[tokio::test]
async fn truncation_stands_between_earlier_and_later_rows() {
    let rig = Rig::new().await;
    let sink = rig.sink("worker-count=8").await;
    let t = people(false);
    sink.table(&t).await.expect("opens");
    let mut batch = Rows::of(&t);
    for round in 0..5u64 {
        for id in 0..50 {
            batch = batch.insert(10 + round, &[&id.to_string(), &round.to_string(), "x"]);
        }
        batch = batch.truncate(10 + round).insert(10 + round, &["7", &format!("after {round}"), "x"]);
        batch = batch.delete(10 + round, &["7", "\\U", "\\U"]);
    }
    batch = batch.insert(20, &["1", "last", "x"]);
    sink.write(batch.build());
    sink.flush().await;
    rig.expect("people", &["1|last|x"]).await;
}

#[tokio::test]
async fn a_referenced_table_is_emptied_although_it_cannot_be_truncated() {
    let rig = Rig::new().await;
    rig.exec(
        "CREATE TABLE people (id int PRIMARY KEY, name text, note text); INSERT INTO people VALUES (1);
              CREATE TABLE child (p int REFERENCES people)",
    )
    .await;
    let sink = rig.sink("").await;
    let t = people(false);
    sink.table(&t).await.expect("opens");
    sink.write(Rows::of(&t).truncate(10).insert(11, &["2", "b", "x"]).build());
    sink.flush().await;
    rig.expect("people", &["2|b|x"]).await;
}

#[tokio::test]
async fn equal_rows_without_a_key_are_changed_one_at_a_time() {
    let rig = Rig::new().await;
    let sink = rig.sink("worker-count=4").await;
    let t = Arc::new(table(7, "log", &[("n", "numeric"), ("doc", "json"), ("at", "point")], &[], &[]));
    sink.table(&t).await.expect("opens");
    let row = ["1.0", "{\"a\": 1}", "(1,2)"];
    let same_number = ["1.00", "{\"a\": 1}", "(1,2)"];
    let empty = ["\\N", "\\N", "\\N"];
    sink.write(
        Rows::of(&t)
            .insert(10, &row)
            .insert(10, &row)
            .insert(10, &row)
            .insert(10, &same_number)
            .insert(10, &empty)
            .insert(10, &empty)
            .delete(11, &same_number)
            .delete(11, &row)
            .update_from(12, &row, &["2", "\\U", "\\N"])
            .update_from(13, &empty, &["3", "null", "(0,0)"])
            .delete(14, &empty)
            .build(),
    );
    sink.flush().await;
    rig.expect("log", &["1.0|{\"a\": 1}|(1,2)", "2|{\"a\": 1}|\\N", "3|null|(0,0)"]).await;
}

// behaviour: dataplane-17
#[tokio::test]
async fn rows_without_a_key_are_told_apart_by_values_that_the_database_calls_equal() {
    let rig = Rig::new().await;
    rig.exec(
        "CREATE COLLATION nocase (provider = icu, locale = 'und-u-ks-level2', deterministic = false); \
         CREATE TABLE words (word text COLLATE nocase, n int NOT NULL, at date, x float8); CREATE INDEX ON words (n)",
    )
    .await;
    let sink = rig.sink("").await;
    let columns = [("word", "text"), ("n", "integer"), ("at", "date"), ("x", "double precision")];
    let t = Arc::new(table(7, "words", &columns, &[], &[]));
    sink.table(&t).await.expect("opens");
    sink.write(
        Rows::of(&t)
            .insert(10, &["a", "1", "\\N", "0"])
            .insert(10, &["A", "1", "\\N", "0"])
            .insert(10, &["A", "1", "\\N", "-0"])
            .insert(10, &["A", "1", "2026-01-02", "0"])
            .delete(11, &["A", "1", "\\N", "-0"])
            .update_from(12, &["A", "1", "\\N", "0"], &["b", "1", "\\N", "1"])
            .delete(13, &["A", "1", "2026-01-02", "0"])
            .build(),
    );
    sink.flush().await;
    rig.expect("words", &["a|1|\\N|0", "b|1|\\N|1"]).await;
}

#[tokio::test]
async fn the_same_row_is_changed_many_times_in_one_transaction() {
    let rig = Rig::new().await;
    let sink = rig.sink("").await;
    let t = people(false);
    sink.table(&t).await.expect("opens");
    let mut batch = Rows::of(&t);
    for n in 0..300 {
        let text = n.to_string();
        batch = match n % 4 {
            0 => batch.insert(10, &["1", &text, "note"]),
            1 => batch.update(10, &["1", &text, "\\U"]),
            2 => batch.update(10, &["1", "\\U", &text]),
            _ => batch.delete(10, &["1", "\\U", "\\U"]),
        };
    }
    batch = batch.insert(11, &["1", "end", "a"]).update(11, &["1", "\\U", "b"]);
    sink.write(batch.build());
    sink.flush().await;
    rig.expect("people", &["1|end|b"]).await;
}

/// A random history of a table, executed at the source and replicated, ends in the same rows.
#[tokio::test]
async fn random_histories_end_as_they_did_upstream() {
    for (seed, unique, full) in [(1, false, false), (2, true, false), (3, true, true)] {
        let rig = Rig::new().await;
        let constraint = if unique { "UNIQUE" } else { "" };
        let create = format!("CREATE TABLE people (id int PRIMARY KEY, name text {constraint}, note text)");
        rig.source.batch_execute(&create).await.expect("source table");
        let sink = rig.sink("worker-count=6&max-txn-row=20").await;
        let mut info = (*people(unique)).clone();
        if full {
            info.identity = ReplicaIdentity::Full;
        }
        let t = Arc::new(info);
        sink.table(&t).await.expect("opens");
        let mut random = StdRng::seed_from_u64(seed);
        let mut batch = Rows::of(&t);
        let mut in_batch = 0;
        for ts in 10..1200u64 {
            let (id, to) = (random.random_range(0..30).to_string(), random.random_range(0..30).to_string());
            let name = format!("n{}", random.random_range(0..60));
            let note = ["x", "y", "z"].choose(&mut random).copied().unwrap_or_default();
            let before = current(&rig, &id).await;
            let statement = match (before.is_some(), random.random_range(0..10)) {
                (false, _) => format!("INSERT INTO people VALUES ({id}, '{name}', '{note}')"),
                (true, 0..5) => format!("UPDATE people SET name = '{name}', note = '{note}' WHERE id = {id}"),
                (true, 5..8) => format!("UPDATE people SET id = {to} WHERE id = {id}"),
                (true, _) => format!("DELETE FROM people WHERE id = {id}"),
            };
            // What the source refuses did not happen.
            if rig.source.batch_execute(&statement).await.is_err() {
                continue;
            }
            let key = [id.as_str(), "\\U", "\\U"];
            let whole: Vec<&str> = before.iter().flatten().map(String::as_str).collect();
            let old: &[&str] = if full { &whole } else { &key };
            let moved = current(&rig, &to).await;
            let new = current(&rig, &id).await;
            batch = match (&before, &new) {
                (None, _) => batch.insert(ts, &[&id, &name, note]),
                (Some(_), Some(new)) => {
                    let new: Vec<&str> = new.iter().map(String::as_str).collect();
                    batch.op(ts, RowOp::Update, full.then_some(old), Some(&new))
                }
                (Some(_), None) if statement.starts_with("DELETE") => batch.delete(ts, old),
                (Some(_), None) => {
                    let new = moved.expect("moved there");
                    batch.update_from(ts, old, &new.iter().map(String::as_str).collect::<Vec<_>>())
                }
            };
            in_batch += 1;
            if in_batch == 37 {
                sink.write(std::mem::replace(&mut batch, Rows::of(&t)).build());
                in_batch = 0;
            }
        }
        sink.write(batch.build());
        sink.flush().await;
        assert_eq!(rig.target_rows("people").await, rows(&rig.source, "people").await, "seed {seed}");
        sink.stop().await.expect("no error");
    }
}

async fn current(rig: &Rig, id: &str) -> Option<Vec<String>> {
    let id: i32 = id.parse().expect("a number");
    let row = rig.source.query_opt("SELECT id::text, name, note FROM people WHERE id = $1", &[&id]).await;
    row.expect("select").map(|row| (0..3).map(|i| row.get(i)).collect())
}
