//! Batches and tuples: what is refused, what slices contain, what damaged bytes do.

#![expect(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use event::{
    BatchError, Datum, ReplicaIdentity, RowBatch, RowOp, TableInfo, Tuple, TxnMark, encode_tuple, put_row,
};
use heartbeatpb::{SchemaId, TableId, Ts, WallTime};
use proptest::collection::vec;
use proptest::prelude::*;

fn table() -> Arc<TableInfo> {
    Arc::new(TableInfo {
        id: TableId(7),
        schema_id: SchemaId(1),
        schema: "public".to_owned(),
        name: "t".to_owned(),
        version: Ts(1),
        columns: Vec::new(),
        keys: Vec::new(),
        identity: ReplicaIdentity::Full,
    })
}

fn mark(commit_ts: u64, rows: u32, first_row: u64) -> TxnMark {
    TxnMark {
        commit_ts: Ts(commit_ts),
        start_ts: Ts(commit_ts - 1),
        commit_time: WallTime(0),
        rows,
        first_row,
    }
}

fn put(out: &mut BytesMut, op: RowOp, old: Option<u64>, new: Option<u64>) {
    let image = |n: u64| encode_tuple([Datum::Text(n.to_string().as_bytes()), Datum::Null]);
    let (old, new) = (old.map(image), new.map(image));
    let mut put_old = |out: &mut BytesMut| out.extend_from_slice(old.as_ref().unwrap());
    let mut put_new = |out: &mut BytesMut| out.extend_from_slice(new.as_ref().unwrap());
    put_row(
        out,
        op,
        old.is_some().then_some(&mut put_old as &mut dyn FnMut(&mut BytesMut)),
        new.is_some().then_some(&mut put_new as &mut dyn FnMut(&mut BytesMut)),
    );
}

fn inserts(count: u64) -> Bytes {
    let mut rows = BytesMut::new();
    for n in 0..count {
        put(&mut rows, RowOp::Insert, None, Some(n));
    }
    rows.freeze()
}

/// (commit ts, row number, value) of every row.
fn read(batch: &RowBatch) -> Vec<(u64, u64, u64)> {
    batch
        .iter()
        .map(|row| {
            let Some(Datum::Text(text)) = row.new.unwrap().get(0) else { panic!("a value") };
            let value = std::str::from_utf8(text).unwrap().parse().unwrap();
            (row.txn.commit_ts.0, row.row_number, value)
        })
        .collect()
}

#[test]
fn a_batch_reads_its_rows_with_their_transactions_and_numbers() {
    let batch = RowBatch::new(table(), vec![mark(10, 2, 5), mark(12, 1, 0)], inserts(3)).unwrap();
    assert_eq!(read(&batch), [(10, 5, 0), (10, 6, 1), (12, 0, 2)]);
    assert_eq!(
        (batch.row_count(), batch.first_commit_ts(), batch.last_commit_ts()),
        (3, Some(Ts(10)), Some(Ts(12)))
    );
}

#[test]
fn every_operation_keeps_its_images() {
    let mut rows = BytesMut::new();
    put(&mut rows, RowOp::CopyStart, None, None);
    put(&mut rows, RowOp::Insert, None, Some(1));
    put(&mut rows, RowOp::Update, Some(1), Some(2));
    put(&mut rows, RowOp::Delete, Some(2), None);
    put(&mut rows, RowOp::Truncate, None, None);
    let batch = RowBatch::new(table(), vec![mark(10, 5, 0)], rows.freeze()).unwrap();
    let seen: Vec<_> = batch.iter().map(|row| (row.op, row.old.is_some(), row.new.is_some())).collect();
    assert_eq!(
        seen,
        [
            (RowOp::CopyStart, false, false),
            (RowOp::Insert, false, true),
            (RowOp::Update, true, true),
            (RowOp::Delete, true, false),
            (RowOp::Truncate, false, false),
        ]
    );
}

#[test]
fn a_malformed_batch_is_refused() {
    let refused = |txns: Vec<TxnMark>, rows: Bytes| RowBatch::new(table(), txns, rows).unwrap_err();
    assert_eq!(refused(vec![mark(10, 2, 0)], inserts(3)), BatchError("row count differs"));
    assert_eq!(refused(vec![mark(10, 4, 0)], inserts(3)), BatchError("row count differs"));
    assert_eq!(refused(vec![mark(11, 1, 0), mark(10, 1, 0)], inserts(2)), BatchError("commit ts goes back"));
    assert_eq!(refused(vec![mark(10, 1, u64::MAX)], inserts(1)), BatchError("row number is too large"));
    let whole = inserts(1);
    for len in 1..whole.len() {
        assert_eq!(refused(vec![mark(10, 1, 0)], whole.slice(..len)), BatchError("row is cut off"));
    }
    let mut unknown_op = BytesMut::from(&whole[..]);
    unknown_op[0] = 9;
    assert_eq!(refused(vec![mark(10, 1, 0)], unknown_op.freeze()), BatchError("row is cut off"));
    let mut wrong_count = BytesMut::from(&whole[..]);
    wrong_count[10] = 9;
    assert_eq!(refused(vec![mark(10, 1, 0)], wrong_count.freeze()), BatchError("image is cut off"));
}

#[test]
fn slices_share_the_buffer_and_hold_the_rows_that_are_left() {
    let batch = RowBatch::new(table(), vec![mark(10, 2, 0), mark(12, 2, 0)], inserts(4)).unwrap();
    let rest = batch.without_first(1, vec![mark(10, 1, 1), mark(12, 2, 0)]);
    assert_eq!(read(&rest), [(10, 1, 1), (12, 0, 2), (12, 1, 3)]);
    let first = batch.first_txns(vec![mark(10, 2, 0)]);
    assert_eq!(read(&first), [(10, 0, 0), (10, 1, 1)]);
    let buffer = batch.encoded_rows().as_ptr_range();
    assert!(
        buffer.contains(&rest.encoded_rows().as_ptr()) && buffer.contains(&first.encoded_rows().as_ptr())
    );
    assert_eq!(read(&batch.without_first(4, Vec::new())), []);
}

#[test]
fn debug_output_holds_no_value() {
    let secret = encode_tuple([Datum::Text(b"secret"), Datum::Null, Datum::Unchanged]);
    let text = format!("{:?}", Tuple::parse(&secret).unwrap());
    assert_eq!(text, "[<6 bytes>, null, unchanged]");
}

fn datum() -> impl Strategy<Value = Option<Option<Vec<u8>>>> {
    prop_oneof![Just(None), Just(Some(None)), vec(any::<u8>(), 0..20).prop_map(|text| Some(Some(text)))]
}

fn as_datum(value: &Option<Option<Vec<u8>>>) -> Datum<'_> {
    match value {
        None => Datum::Unchanged,
        Some(None) => Datum::Null,
        Some(Some(text)) => Datum::Text(text),
    }
}

proptest! {
    #[test]
    fn a_tuple_reads_back_as_it_was_and_not_when_it_is_cut(values in vec(datum(), 0..12)) {
        let bytes = encode_tuple(values.iter().map(as_datum));
        let tuple = Tuple::parse(&bytes).unwrap();
        prop_assert_eq!(tuple.len(), values.len());
        prop_assert_eq!(tuple.iter().collect::<Vec<_>>(), values.iter().map(as_datum).collect::<Vec<_>>());
        for len in 0..bytes.len() {
            prop_assert!(Tuple::parse(&bytes[..len]).is_none());
        }
    }

    #[test]
    fn random_bytes_never_panic(bytes in vec(any::<u8>(), 0..64), small in vec(0u8..4, 0..64)) {
        for bytes in [bytes, small] {
            if let Some(tuple) = Tuple::parse(&bytes) {
                prop_assert_eq!(tuple.iter().count(), tuple.len());
            }
            let _ = RowBatch::new(table(), vec![mark(10, 1, 0)], bytes.into());
        }
    }

    #[test]
    fn any_slice_is_the_same_part_of_the_rows(counts in vec(1u32..4, 1..5), skip in any::<prop::sample::Index>()) {
        let marks: Vec<TxnMark> = (10..).zip(&counts).map(|(ts, rows)| mark(ts, *rows, 0)).collect();
        let total: u64 = counts.iter().map(|n| u64::from(*n)).sum();
        let batch = RowBatch::new(table(), marks.clone(), inserts(total)).unwrap();
        let whole = read(&batch);
        let keep = skip.index(marks.len() + 1);
        let kept: u64 = counts[..keep].iter().map(|n| u64::from(*n)).sum();
        let (head, tail) = whole.split_at(usize::try_from(kept).unwrap());
        prop_assert_eq!(read(&batch.first_txns(marks[..keep].to_vec())), head);
        prop_assert_eq!(read(&batch.without_first(kept, marks[keep..].to_vec())), tail);
    }
}
