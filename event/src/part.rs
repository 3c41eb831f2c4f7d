//! The part of a batch whose keys lie in a range: picked rows over the shared buffer.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use heartbeatpb::TableSpan;

use crate::batch::{ROW_HEAD, RawRow, check_marks, check_rows, count_rows, split_row};
use crate::{BatchError, KeyCodec, KeyError, RowBatch, RowChange, RowOp, TableInfo, Tuple, TxnMark, put_row};

/// What of a row change counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Half {
    Whole,
    /// Of an update that takes the row out of the range.
    Delete,
    /// Of an update that brings the row into the range.
    Insert,
}

/// A row of a buffer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Picked {
    /// Where it begins.
    at: u32,
    half: Half,
    /// Position among its transaction's rows of the table.
    number: u64,
}

impl Picked {
    fn raw<'a>(&self, buffer: &'a [u8]) -> RawRow<'a> {
        let row = buffer.get(self.at as usize..).and_then(split_row);
        let ((op, old, new), _) = row.expect("checked when the batch was made");
        match self.half {
            Half::Whole => (op, old, new),
            Half::Delete => (RowOp::Delete, old, None),
            Half::Insert => (RowOp::Insert, None, new),
        }
    }

    fn bytes(&self, buffer: &[u8]) -> usize {
        let (_, old, new) = self.raw(buffer);
        ROW_HEAD + old.map_or(0, <[u8]>::len) + new.map_or(0, <[u8]>::len)
    }

    pub(crate) fn change<'a>(&self, txn: &'a TxnMark, buffer: &'a [u8]) -> RowChange<'a> {
        let (op, old, new) = self.raw(buffer);
        let image = |bytes: Option<&'a [u8]>| bytes.map(Tuple::trusted);
        RowChange { txn, row_number: self.number, op, old: image(old), new: image(new) }
    }
}

/// Picks rows by key; keeps its scratch space between batches.
#[derive(Debug, Default)]
pub struct Picker {
    key: Vec<u8>,
    old_key: Vec<u8>,
}

impl Picker {
    /// What of a row belongs to the span.
    fn half(
        &mut self,
        codec: &KeyCodec,
        span: &TableSpan,
        (op, old, new): RawRow<'_>,
    ) -> Result<Option<Half>, KeyError> {
        let (old, new) = (old.map(Tuple::trusted), new.map(Tuple::trusted));
        let whole = |key: &[u8]| span.contains_key(key).then_some(Half::Whole);
        match (op, old, new) {
            (RowOp::Truncate | RowOp::CopyStart, _, _) => Ok(Some(Half::Whole)),
            (RowOp::Insert, _, Some(image)) | (RowOp::Delete, Some(image), _) => {
                codec.encode(image, None, &mut self.key)?;
                Ok(whole(&self.key))
            }
            (RowOp::Update, old, Some(new)) => {
                codec.encode(new, old, &mut self.key)?;
                // Without an old image the key is what it was.
                let Some(old) = old else { return Ok(whole(&self.key)) };
                codec.encode(old, Some(new), &mut self.old_key)?;
                let half = match (span.contains_key(&self.old_key), span.contains_key(&self.key)) {
                    (true, true) => Half::Whole,
                    (false, false) => return Ok(None),
                    // Both ranges refuse: one half alone would lose what the log does not repeat.
                    _ if !codec.is_complete(new) => return Err(KeyError::Incomplete),
                    (true, false) => Half::Delete,
                    (false, true) => Half::Insert,
                };
                Ok(Some(half))
            }
            (RowOp::Insert | RowOp::Update | RowOp::Delete, _, _) => Err(KeyError::Missing),
        }
    }
}

impl RowBatch {
    /// The rows whose keys lie in `span`, in order and with their numbers: an update that moves a row to another
    /// range is a delete in the range that it leaves and an insert in the one that it enters. What concerns the table
    /// as a whole belongs to every range. `None` when nothing does. Shares the buffer.
    ///
    /// `codec` is that of the batch's table.
    ///
    /// # Errors
    /// When a row has no readable key, or moves to another range and the log does not hold all of it.
    ///
    /// # Panics
    /// When the batch is itself a part of one.
    pub fn within(
        &self,
        codec: &KeyCodec,
        span: &TableSpan,
        picker: &mut Picker,
    ) -> Result<Option<Self>, KeyError> {
        assert!(self.picked.is_none(), "parts are taken of whole batches");
        let mut picked: Vec<Picked> = Vec::new();
        let mut marks: Vec<TxnMark> = Vec::new();
        let mut everything = true;
        let mut rest = &self.rows[..];
        for txn in self.txns() {
            let before = picked.len();
            for number in txn.first_row..txn.first_row + u64::from(txn.rows) {
                let at = self.rows.len() - rest.len();
                let (row, tail) = split_row(rest).expect("checked when the batch was made");
                rest = tail;
                match picker.half(codec, span, row)? {
                    Some(half) => {
                        everything &= half == Half::Whole;
                        let at = u32::try_from(at).expect("a batch is far below 4 GiB");
                        picked.push(Picked { at, half, number });
                    }
                    None => everything = false,
                }
            }
            if let Some(last) = picked[before..].last() {
                marks.push(mark_of(txn, picked.len() - before, last.number));
            }
        }
        if everything && !picked.is_empty() {
            return Ok(Some(self.clone()));
        }
        Ok((!picked.is_empty()).then(|| self.of_picked(marks, picked.into())))
    }

    pub(crate) fn of_picked(&self, txns: Vec<TxnMark>, picked: Arc<[Picked]>) -> Self {
        debug_assert_eq!(count_rows(&txns), picked.len() as u64);
        let size = picked.iter().map(|row| row.bytes(&self.rows)).sum();
        let (table, rows) = (Arc::clone(&self.table), self.rows.clone());
        Self { table, txns: txns.into(), rows, picked: Some(picked), size }
    }

    /// The rows alone, one behind the other, and the number of each where numbers have gaps: what a batch is between
    /// processes. Copies only a part of a batch.
    #[must_use]
    pub fn packed(&self) -> (Bytes, Option<Vec<u64>>) {
        let Some(picked) = &self.picked else { return (self.rows.clone(), None) };
        let mut out = BytesMut::with_capacity(self.size);
        for row in picked.iter() {
            let (op, old, new) = row.raw(&self.rows);
            let mut put_old = |out: &mut BytesMut| out.extend_from_slice(old.unwrap_or_default());
            let mut put_new = |out: &mut BytesMut| out.extend_from_slice(new.unwrap_or_default());
            put_row(&mut out, op, Some(&mut put_old), Some(&mut put_new));
        }
        (out.freeze(), Some(picked.iter().map(|row| row.number).collect()))
    }

    /// The inverse of [`RowBatch::packed`]; checks every length, count and number.
    ///
    /// # Errors
    /// When the rows, their marks and their numbers do not belong together.
    pub fn numbered(
        table: Arc<TableInfo>,
        txns: Vec<TxnMark>,
        rows: Bytes,
        numbers: &[u64],
    ) -> Result<Self, BatchError> {
        check_marks(&txns)?;
        let mut numbered = numbers.iter();
        let mut picked = Vec::with_capacity(numbers.len());
        let count = check_rows(&rows, |at| {
            if let (Some(number), Ok(at)) = (numbered.next(), u32::try_from(at)) {
                picked.push(Picked { at, half: Half::Whole, number: *number });
            }
        })?;
        if count != count_rows(&txns) || count != numbers.len() as u64 || count != picked.len() as u64 {
            return Err(BatchError("row count differs"));
        }
        let mut rest = numbers;
        for txn in &txns {
            let (own, others) = rest.split_at(txn.rows as usize);
            let ends =
                own.last().is_none_or(|last| last.checked_add(1) == Some(txn.first_row + own.len() as u64));
            if !ends || own.windows(2).any(|pair| pair[0] >= pair[1]) {
                return Err(BatchError("row numbers are not in order"));
            }
            rest = others;
        }
        let size = rows.len();
        Ok(Self { table, txns: txns.into(), rows, picked: Some(picked.into()), size })
    }

    /// Whether two batches hold the same rows of the same table.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        self.table == other.table && self.txns == other.txns && self.packed() == other.packed()
    }
}

/// The mark of a transaction of which `rows` rows are left, the last of them with this number.
fn mark_of(txn: &TxnMark, rows: usize, last: u64) -> TxnMark {
    let rows = u32::try_from(rows).expect("no more than the transaction had");
    // The numbers of the rows are at least as far apart as there are rows, so this is not below the first one.
    TxnMark { rows, first_row: last + 1 - u64::from(rows), ..*txn }
}

#[cfg(test)]
mod tests;
