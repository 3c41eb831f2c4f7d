//! Parts of batches: what belongs to which range, and that nothing is lost or doubled.

use std::collections::BTreeMap;

use heartbeatpb::{TableId, Ts};
use proptest::prelude::*;

use super::*;
use crate::testing::{BatchBuilder, table_of};
use crate::{ReplicaIdentity, TypeKind};

fn table() -> Arc<TableInfo> {
    Arc::new(table_of(&[TypeKind::Int32]))
}

fn span(codec: &KeyCodec, start: Option<i32>, end: Option<i32>) -> TableSpan {
    let key = |bound: Option<i32>| {
        bound.and_then(|bound| codec.encode_values(&[&bound.to_string()])).unwrap_or_default()
    };
    TableSpan { start: key(start), end: key(end), ..TableSpan::whole(TableId(1)) }
}

/// What a batch holds, one text a row.
fn told(batch: Option<&RowBatch>) -> Vec<String> {
    let text = |image: Option<Tuple<'_>>| image.map_or(String::new(), crate::testing::text);
    let row = |row: RowChange<'_>| {
        format!("{}.{} {:?} {}>{}", row.txn.commit_ts, row.row_number, row.op, text(row.old), text(row.new))
    };
    batch.into_iter().flat_map(RowBatch::iter).map(row).collect()
}

fn part(batch: &RowBatch, codec: &KeyCodec, span: &TableSpan) -> Option<RowBatch> {
    batch.within(codec, span, &mut Picker::default()).expect("keys are there")
}

#[test]
fn a_range_gets_its_rows_under_their_numbers_and_a_moving_row_is_taken_apart() {
    let table = table();
    let codec = KeyCodec::new(&table).expect("divisible");
    let batch = BatchBuilder::new(&table)
        .op(10, RowOp::Insert, None, Some(&["1", "a"]))
        .op(10, RowOp::Insert, None, Some(&["7", "b"]))
        .op(10, RowOp::Update, Some(&["1", "\\U"]), Some(&["8", "c"]))
        .op(11, RowOp::Update, None, Some(&["7", "\\U"]))
        .op(12, RowOp::Delete, Some(&["3", "\\U"]), None)
        .op(12, RowOp::Truncate, None, None)
        .build();
    let (low, high) = (span(&codec, None, Some(5)), span(&codec, Some(5), None));
    let (low, high) = (part(&batch, &codec, &low), part(&batch, &codec, &high));
    assert_eq!(
        told(low.as_ref()),
        ["10.0 Insert >1,a", "10.2 Delete 1,\\U>", "12.0 Delete 3,\\U>", "12.1 Truncate >"]
    );
    assert_eq!(
        told(high.as_ref()),
        ["10.1 Insert >7,b", "10.2 Insert >8,c", "11.0 Update >7,\\U", "12.1 Truncate >"]
    );
    let marks: Vec<_> = high.expect("rows").txns().iter().map(|txn| (txn.rows, txn.first_row)).collect();
    assert_eq!(marks, [(2, 1), (1, 0), (1, 1)], "the number behind the last row can be told");
    assert!(part(&batch, &codec, &span(&codec, Some(100), None)).is_some(), "a truncation reaches everybody");
}

#[test]
fn a_whole_table_and_a_range_that_has_every_row_share_the_batch() {
    let table = table();
    let codec = KeyCodec::new(&table).expect("divisible");
    let batch = BatchBuilder::new(&table).op(10, RowOp::Insert, None, Some(&["1", "a"])).build();
    let mine = part(&batch, &codec, &span(&codec, Some(1), Some(2))).expect("its row");
    assert!(mine.picked.is_none());
    assert!(part(&batch, &codec, &span(&codec, Some(2), None)).is_none());
}

#[test]
fn both_ranges_refuse_a_moving_row_of_which_the_log_lacks_a_value() {
    let table = table();
    let codec = KeyCodec::new(&table).expect("divisible");
    let moved = |new: &[&str]| {
        BatchBuilder::new(&table).op(10, RowOp::Update, Some(&["1", "\\U"]), Some(new)).build()
    };
    let mut picker = Picker::default();
    for span in [span(&codec, None, Some(5)), span(&codec, Some(5), None)] {
        let result = moved(&["7", "\\U"]).within(&codec, &span, &mut picker);
        assert_eq!(result.map(|_| ()), Err(KeyError::Incomplete));
        assert!(moved(&["7", "\\N"]).within(&codec, &span, &mut picker).is_ok(), "NULL is a value");
    }
    let elsewhere = moved(&["2", "\\U"]).within(&codec, &span(&codec, Some(5), None), &mut picker);
    assert!(elsewhere.expect("not concerned").is_none());
}

#[test]
fn a_key_that_was_not_sent_with_the_new_row_is_that_of_the_old_one() {
    let table = table();
    let codec = KeyCodec::new(&table).expect("divisible");
    let batch =
        BatchBuilder::new(&table).op(10, RowOp::Update, Some(&["1", "\\U"]), Some(&["\\U", "c"])).build();
    assert!(part(&batch, &codec, &span(&codec, None, Some(5))).is_some());
    let nowhere = BatchBuilder::new(&table).op(10, RowOp::Update, None, Some(&["\\U", "c"])).build();
    let result = nowhere.within(&codec, &span(&codec, None, Some(5)), &mut Picker::default());
    assert_eq!(result.map(|_| ()), Err(KeyError::Missing));
}

#[test]
fn a_part_is_cut_and_sent_like_a_batch() {
    let table = table();
    let codec = KeyCodec::new(&table).expect("divisible");
    let mut builder = BatchBuilder::new(&table);
    for ts in 10..14 {
        builder = builder.op(ts, RowOp::Insert, None, Some(&[&(ts % 2 * 10).to_string(), "a"])).op(
            ts,
            RowOp::Insert,
            None,
            Some(&["6", "b"]),
        );
    }
    let batch = part(&builder.build(), &codec, &span(&codec, Some(5), None)).expect("rows");
    let all = told(Some(&batch));
    assert_eq!(all.len(), 6);
    let marks = batch.txns().to_vec();
    assert_eq!(told(Some(&batch.first_txns(marks[..2].to_vec()))), all[..3]);
    let rest = batch.without_first(3, marks[2..].to_vec());
    assert_eq!(told(Some(&rest)), all[3..]);
    assert!(rest.bytes() > 0 && rest.bytes() < batch.bytes());
    let (rows, numbers) = rest.packed();
    let numbers = numbers.expect("gaps");
    assert_eq!(rows.len(), rest.bytes());
    let again = RowBatch::numbered(Arc::clone(&table), marks[2..].to_vec(), rows.clone(), &numbers);
    let again = again.expect("well formed");
    assert!(again.is_same(&rest));
    assert_eq!(told(Some(&again)), all[3..]);
    for wrong in [&numbers[1..], &[numbers[0] + 1, numbers[1], numbers[2]][..]] {
        assert!(RowBatch::numbered(Arc::clone(&table), marks[2..].to_vec(), rows.clone(), wrong).is_err());
    }
}

#[derive(Clone, Debug)]
enum Step {
    Put(i32, u8),
    Remove(i32),
    Move(i32, i32, u8),
    Clear,
    Commit,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let key = || -8i32..8;
    let step = prop_oneof![
        4 => (key(), any::<u8>()).prop_map(|(k, v)| Step::Put(k, v)),
        2 => key().prop_map(Step::Remove),
        3 => (key(), key(), any::<u8>()).prop_map(|(k, to, v)| Step::Move(k, to, v)),
        1 => Just(Step::Clear),
        3 => Just(Step::Commit),
    ];
    prop::collection::vec(step, 1..60)
}

/// A batch that a database could have written, and its table afterwards.
fn history(steps: &[Step], full: bool) -> (RowBatch, BTreeMap<i32, u8>) {
    let mut info = table_of(&[TypeKind::Int32]);
    if full {
        info.identity = ReplicaIdentity::Full;
    }
    let mut builder = BatchBuilder::new(&Arc::new(info));
    let mut rows: BTreeMap<i32, u8> = BTreeMap::new();
    let mut ts = 10;
    for step in steps {
        let text = |key: i32, value: Option<u8>| {
            [key.to_string(), value.filter(|_| full).map_or("\\U".to_owned(), |value| value.to_string())]
        };
        let image = |key: i32, value: u8| [key.to_string(), value.to_string()];
        let [mut old, mut new] = [None, None];
        let op = match *step {
            Step::Put(key, value) => {
                let before = rows.insert(key, value);
                old = before.filter(|_| full).map(|before| text(key, Some(before)));
                new = Some(image(key, value));
                if before.is_some() { RowOp::Update } else { RowOp::Insert }
            }
            Step::Remove(key) => {
                let Some(before) = rows.remove(&key) else { continue };
                old = Some(text(key, Some(before)));
                RowOp::Delete
            }
            Step::Move(key, to, value) => {
                if !rows.contains_key(&key) || rows.contains_key(&to) {
                    continue;
                }
                old = Some(text(key, rows.remove(&key)));
                rows.insert(to, value);
                new = Some(image(to, value));
                RowOp::Update
            }
            Step::Clear => {
                rows.clear();
                RowOp::Truncate
            }
            Step::Commit => {
                ts += 1;
                continue;
            }
        };
        let old: Option<Vec<&str>> = old.as_ref().map(|image| image.iter().map(String::as_str).collect());
        let new: Option<Vec<&str>> = new.as_ref().map(|image| image.iter().map(String::as_str).collect());
        builder = builder.op(ts, op, old.as_deref(), new.as_deref());
    }
    (builder.build(), rows)
}

fn apply(batch: Option<&RowBatch>, span: &TableSpan, codec: &KeyCodec) -> BTreeMap<i32, u8> {
    let mut rows: BTreeMap<i32, u8> = BTreeMap::new();
    let mut last = None;
    for row in batch.into_iter().flat_map(RowBatch::iter) {
        let at = (row.txn.commit_ts, row.row_number);
        assert!(last < Some(at), "rows are in order");
        last = Some(at);
        let number = |image: Tuple<'_>, column: usize| match image.get(column) {
            Some(crate::Datum::Text(text)) => {
                std::str::from_utf8(text).ok().and_then(|text| text.parse::<i32>().ok())
            }
            _ => None,
        };
        if row.op == RowOp::Truncate {
            rows.clear();
            continue;
        }
        if let Some(old) = row.old.or(row.new.filter(|_| row.op == RowOp::Update)) {
            let key = number(old, 0).expect("a key");
            assert!(span.contains_key(&codec.encode_values(&[&key.to_string()]).expect("a key")));
            assert!(rows.remove(&key).is_some(), "it was there");
        }
        if let Some(new) = row.new {
            let key = number(new, 0).expect("a key");
            assert!(span.contains_key(&codec.encode_values(&[&key.to_string()]).expect("a key")));
            let before = rows.insert(key, u8::try_from(number(new, 1).expect("a value")).expect("small"));
            assert!(before.is_none(), "nobody was there");
        }
    }
    rows
}

proptest! {
    #[test]
    fn the_ranges_of_a_table_hold_together_what_the_table_holds(
        steps in steps(),
        full in any::<bool>(),
        mut bounds in prop::collection::vec(-8i32..8, 0..4),
    ) {
        let (batch, expected) = history(&steps, full);
        let codec = KeyCodec::new(&batch.table).expect("divisible");
        bounds.sort_unstable();
        bounds.dedup();
        let edges: Vec<Option<i32>> =
            std::iter::once(None).chain(bounds.into_iter().map(Some)).chain([None]).collect();
        let mut found = BTreeMap::new();
        for pair in edges.windows(2) {
            let span = span(&codec, pair[0], pair[1]);
            let part = part(&batch, &codec, &span);
            if let Some(part) = &part {
                let (rows, numbers) = part.packed();
                if let Some(numbers) = numbers {
                    let sent =
                        RowBatch::numbered(Arc::clone(&part.table), part.txns().to_vec(), rows, &numbers);
                    prop_assert!(sent.expect("well formed").is_same(part));
                }
                let last = part.iter().last().expect("no part is empty");
                let mark = part.txns().last().expect("no part is empty");
                prop_assert_eq!(mark.first_row + u64::from(mark.rows), last.row_number + 1);
                prop_assert_eq!(part.last_commit_ts(), Some(Ts(last.txn.commit_ts.0)));
            }
            found.extend(apply(part.as_ref(), &span, &codec));
        }
        prop_assert_eq!(found, expected);
    }
}
