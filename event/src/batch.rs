//! Rows of one table in commit order, in one shared buffer.

use std::sync::Arc;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use heartbeatpb::{Ts, WallTime};

use crate::part::Picked;
use crate::{TableInfo, Tuple};

/// What happened to a row.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum RowOp {
    /// New image only.
    Insert,
    /// New image; old image if the upstream sent one (the key changed, or the identity is full).
    Update,
    /// Old image only.
    Delete,
    /// No image: every earlier row of the table is gone. In order with the rows of its transaction.
    Truncate,
    /// No image: an initial copy of the table begins. Whatever an earlier copy that did not finish
    /// left downstream must be cleared. The rows of the copy follow with the same commit ts, as inserts.
    CopyStart,
}

impl RowOp {
    const fn code(self) -> u8 {
        match self {
            RowOp::Delete => 0,
            RowOp::Insert => 1,
            RowOp::Update => 2,
            RowOp::Truncate => 3,
            RowOp::CopyStart => 4,
        }
    }

    const fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            0 => RowOp::Delete,
            1 => RowOp::Insert,
            2 => RowOp::Update,
            3 => RowOp::Truncate,
            4 => RowOp::CopyStart,
            _ => return None,
        })
    }
}

/// A transaction's share of a batch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TxnMark {
    /// Commit ts.
    pub commit_ts: Ts,
    /// Identifies the transaction; smaller than `commit_ts` and stable across replays.
    pub start_ts: Ts,
    /// Upstream wall time of the commit.
    pub commit_time: WallTime,
    /// Number of its rows in this batch.
    pub rows: u32,
    /// Position of the first of them among the transaction's rows of this table, from 0.
    /// `(commit_ts, row number)` identifies a row change of a table across replays.
    /// The numbers of a part of a batch have gaps; there `first_row + rows` is the place behind the last of them.
    pub first_row: u64,
}

/// Rows of one version of one table, in commit order: all that the buffer holds, or those that were picked from it
/// ([`RowBatch::within`]). Cheap to clone.
#[derive(Clone)]
pub struct RowBatch {
    /// Shape of the table at these commits.
    pub table: Arc<TableInfo>,
    pub(crate) txns: Arc<[TxnMark]>,
    pub(crate) rows: Bytes,
    /// Which rows of the buffer; `None`: all.
    pub(crate) picked: Option<Arc<[Picked]>>,
    /// Bytes of the rows.
    pub(crate) size: usize,
}

impl std::fmt::Debug for RowBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RowBatch")
            .field("table", &self.table.id)
            .field("txns", &self.txns)
            .field("bytes", &self.size)
            .finish()
    }
}

/// One row change.
#[derive(Clone, Copy, Debug)]
pub struct RowChange<'a> {
    /// Its transaction.
    pub txn: &'a TxnMark,
    /// Position among the transaction's rows of this table, from 0.
    pub row_number: u64,
    /// What happened.
    pub op: RowOp,
    /// Image before, directly in front of the one after; for a key identity the other columns are [`crate::Datum::Unchanged`].
    pub old: Option<Tuple<'a>>,
    /// Image after.
    pub new: Option<Tuple<'a>>,
}

/// Malformed bytes where a batch was expected.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("row batch is malformed: {0}")]
pub struct BatchError(pub &'static str);

/// Length of a row's head: op, length of the old image, length of the new image.
pub(crate) const ROW_HEAD: usize = 9;

/// Appends one row to a buffer: op u8, old length u32, new length u32, old tuple, new tuple.
/// `old` and `new` write their image with a [`crate::TupleWriter`].
pub fn put_row(
    out: &mut BytesMut,
    op: RowOp,
    old: Option<&mut dyn FnMut(&mut BytesMut)>,
    new: Option<&mut dyn FnMut(&mut BytesMut)>,
) {
    let head = out.len();
    out.put_u8(op.code());
    out.put_u64(0);
    let images = out.len();
    if let Some(old) = old {
        old(out);
    }
    let middle = out.len();
    if let Some(new) = new {
        new(out);
    }
    let old_len = u32::try_from(middle - images).expect("an image is at most 4 GiB");
    let new_len = u32::try_from(out.len() - middle).expect("an image is at most 4 GiB");
    out[head + 1..head + 5].copy_from_slice(&old_len.to_be_bytes());
    out[head + 5..head + 9].copy_from_slice(&new_len.to_be_bytes());
}

impl RowBatch {
    /// A batch over rows written by [`put_row`]; checks every length and count.
    ///
    /// # Errors
    /// When `rows` is not exactly the rows that `txns` counts, or the commit ts go back.
    pub fn new(table: Arc<TableInfo>, txns: Vec<TxnMark>, rows: Bytes) -> Result<Self, BatchError> {
        check_marks(&txns)?;
        let count = check_rows(&rows, |_| {})?;
        if count != count_rows(&txns) {
            return Err(BatchError("row count differs"));
        }
        Ok(Self::all(table, txns, rows))
    }

    /// As [`RowBatch::new`], for bytes that this process has just written; checks in debug builds only.
    #[must_use]
    pub fn trusted(table: Arc<TableInfo>, txns: Vec<TxnMark>, rows: Bytes) -> Self {
        debug_assert!(Self::new(Arc::clone(&table), txns.clone(), rows.clone()).is_ok());
        Self::all(table, txns, rows)
    }

    fn all(table: Arc<TableInfo>, txns: Vec<TxnMark>, rows: Bytes) -> Self {
        let size = rows.len();
        Self { table, txns: txns.into(), rows, picked: None, size }
    }

    /// The batch without its first `rows` rows; `txns` describes what is left. Shares the buffer.
    #[must_use]
    pub fn without_first(&self, rows: u64, txns: Vec<TxnMark>) -> Self {
        if let Some(picked) = &self.picked {
            let left = usize::try_from(rows).ok().and_then(|rows| picked.get(rows..));
            return self.of_picked(txns, left.unwrap_or_default().into());
        }
        let mut rest = &self.rows[..];
        for _ in 0..rows {
            rest = split_row(rest).expect("the caller skips no more rows than there are").1;
        }
        let rows = self.rows.slice(self.rows.len() - rest.len()..);
        Self::trusted(Arc::clone(&self.table), txns, rows)
    }

    /// The batch with its first transactions only, which `txns` repeats. Shares the buffer.
    #[must_use]
    pub fn first_txns(&self, txns: Vec<TxnMark>) -> Self {
        let keep = count_rows(&txns);
        if let Some(picked) = &self.picked {
            let kept = usize::try_from(keep).ok().and_then(|keep| picked.get(..keep));
            return self.of_picked(txns, kept.unwrap_or(picked).into());
        }
        let mut rest = &self.rows[..];
        for _ in 0..keep {
            rest = split_row(rest).expect("the caller keeps no more rows than there are").1;
        }
        let rows = self.rows.slice(..self.rows.len() - rest.len());
        Self::trusted(Arc::clone(&self.table), txns, rows)
    }

    /// The transactions, in commit order.
    #[must_use]
    pub fn txns(&self) -> &[TxnMark] {
        &self.txns
    }

    /// Number of rows.
    #[must_use]
    pub fn row_count(&self) -> u64 {
        count_rows(&self.txns)
    }

    /// Size of the rows in bytes: the unit of quotas.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.size
    }

    /// The buffer in which the images lie. It may hold rows that do not belong to the batch.
    #[must_use]
    pub fn encoded_rows(&self) -> &Bytes {
        &self.rows
    }

    /// An image of one of the rows, by the place and the length that its bytes have in [`RowBatch::encoded_rows`]; `None`
    /// when there are no such bytes, or none at all. Only for what [`RowBatch::iter`] has shown: what the bytes say is
    /// not checked again.
    #[must_use]
    pub fn image(&self, start: usize, len: usize) -> Option<Tuple<'_>> {
        let bytes = self.rows.get(start..start.checked_add(len)?)?;
        (!bytes.is_empty()).then(|| Tuple::trusted(bytes))
    }

    /// Smallest commit ts.
    #[must_use]
    pub fn first_commit_ts(&self) -> Option<Ts> {
        self.txns.first().map(|txn| txn.commit_ts)
    }

    /// Largest commit ts.
    #[must_use]
    pub fn last_commit_ts(&self) -> Option<Ts> {
        self.txns.last().map(|txn| txn.commit_ts)
    }

    /// The rows in order.
    #[must_use]
    pub fn iter(&self) -> RowChanges<'_> {
        let left = self.txns.first().map_or(0, |txn| txn.rows);
        RowChanges { batch: self, txn: 0, left, rest: &self.rows, next: 0 }
    }
}

pub(crate) fn count_rows(txns: &[TxnMark]) -> u64 {
    txns.iter().map(|txn| u64::from(txn.rows)).sum()
}

pub(crate) fn check_marks(txns: &[TxnMark]) -> Result<(), BatchError> {
    if txns.windows(2).any(|pair| pair[0].commit_ts > pair[1].commit_ts) {
        return Err(BatchError("commit ts goes back"));
    }
    if txns.iter().any(|txn| txn.first_row.checked_add(u64::from(txn.rows)).is_none()) {
        return Err(BatchError("row number is too large"));
    }
    Ok(())
}

/// Checks every row of a buffer, tells where each begins, and counts them.
pub(crate) fn check_rows(rows: &[u8], mut begin: impl FnMut(usize)) -> Result<u64, BatchError> {
    let mut rest = rows;
    let mut count = 0u64;
    while !rest.is_empty() {
        begin(rows.len() - rest.len());
        let (row, tail) = split_row(rest).ok_or(BatchError("row is cut off"))?;
        for image in [row.1, row.2].into_iter().flatten() {
            Tuple::parse(image).ok_or(BatchError("image is cut off"))?;
        }
        rest = tail;
        count += 1;
    }
    Ok(count)
}

/// Iterator over the rows of a [`RowBatch`].
#[derive(Clone, Debug)]
pub struct RowChanges<'a> {
    batch: &'a RowBatch,
    /// The transaction of the next row, and how many of its rows are left.
    txn: usize,
    left: u32,
    /// The buffer from the next row on, when all of it counts.
    rest: &'a [u8],
    /// The next of the picked rows.
    next: usize,
}

impl<'a> Iterator for RowChanges<'a> {
    type Item = RowChange<'a>;

    fn next(&mut self) -> Option<RowChange<'a>> {
        while self.left == 0 {
            self.txn += 1;
            self.left = self.batch.txns.get(self.txn)?.rows;
        }
        let txn = self.batch.txns.get(self.txn)?;
        self.left -= 1;
        if let Some(picked) = &self.batch.picked {
            let row = picked.get(self.next)?;
            self.next += 1;
            return Some(row.change(txn, &self.batch.rows));
        }
        let ((op, old, new), tail) = split_row(self.rest).expect("checked when the batch was made");
        self.rest = tail;
        let row_number = txn.first_row + u64::from(txn.rows - self.left - 1);
        Some(RowChange { txn, row_number, op, old: old.map(Tuple::trusted), new: new.map(Tuple::trusted) })
    }
}

pub(crate) type RawRow<'a> = (RowOp, Option<&'a [u8]>, Option<&'a [u8]>);

/// Splits the first row off; `None` when it is cut off or has an unknown op.
pub(crate) fn split_row(bytes: &[u8]) -> Option<(RawRow<'_>, &[u8])> {
    if bytes.len() < ROW_HEAD {
        return None;
    }
    let mut head = bytes;
    let op = RowOp::from_code(head.get_u8())?;
    let old_len = head.get_u32() as usize;
    let new_len = head.get_u32() as usize;
    if head.len() < old_len.checked_add(new_len)? {
        return None;
    }
    let (old, rest) = head.split_at(old_len);
    let (new, rest) = rest.split_at(new_len);
    let image = |bytes: &'_ [u8]| -> Option<()> { (!bytes.is_empty()).then_some(()) };
    Some(((op, image(old).map(|()| old), image(new).map(|()| new)), rest))
}
