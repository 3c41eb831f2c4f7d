//! Rows that a table had before the stream: visible as they come, all at one commit ts.

use std::sync::Arc;

use bytes::BytesMut;
use event::{RowOp, TableInfo, TxnMark, put_row};

use super::metrics::Tally;
use super::state::ChunkData;
use super::writer::PutImage;
use super::{CHUNK_BYTES, Store};
use crate::Error;

/// Appends the existing rows of one table. The first row that it emits is [`RowOp::CopyStart`].
pub struct CopyWriter {
    store: Arc<Store>,
    table: Arc<TableInfo>,
    mark: TxnMark,
    rows: BytesMut,
}

impl std::fmt::Debug for CopyWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CopyWriter").field("table", &self.table.id).finish_non_exhaustive()
    }
}

impl CopyWriter {
    pub(super) fn new(store: Arc<Store>, table: Arc<TableInfo>, mark: TxnMark) -> Self {
        store.state.lock().add_version(Arc::clone(&table));
        let mut writer = Self { store, table, mark, rows: BytesMut::new() };
        writer.push(RowOp::CopyStart, None);
        writer
    }

    fn push(&mut self, op: RowOp, new: Option<PutImage<'_>>) {
        put_row(&mut self.rows, op, None, new);
        self.mark.rows += 1;
    }

    /// Appends a row.
    pub fn row(&mut self, new: PutImage<'_>) {
        self.push(RowOp::Insert, Some(new));
        if self.rows.len() >= CHUNK_BYTES {
            self.flush();
        }
    }

    /// Waits while the store is full.
    ///
    /// # Errors
    /// When the store was closed or cannot write.
    pub async fn room(&mut self) -> Result<(), Error> {
        self.store.wait_for_room().await
    }

    /// Makes the last rows visible. The copy is complete when the stream's writer publishes its commit ts.
    pub fn finish(mut self) {
        self.flush();
    }

    fn flush(&mut self) {
        if self.mark.rows == 0 {
            return;
        }
        let rows = self.rows.split().freeze();
        let rows_here = u64::from(self.mark.rows);
        self.store.metrics.visible(&Tally::inserts(rows_here, rows.len() as u64));
        self.store.state.lock().add_chunk(Arc::clone(&self.table), vec![self.mark], ChunkData::Memory(rows));
        self.mark.first_row += u64::from(self.mark.rows);
        self.mark.rows = 0;
        self.store.changed.notify_one();
    }
}
