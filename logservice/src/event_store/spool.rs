//! Bytes of a transaction that has not ended: kept in their order, and given back once when it is committed.
//!
//! ```text
//!   push ──▶ tail ──full──▶ pieces in memory ──write_out──▶ pieces on disk
//!               ◀── truncate, from the end ──┘
//!   next ◀── from the beginning; what was given back is gone
//! ```
//!
//! What is on disk counts among the store's segment files.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};

use super::state::ChunkData;
use super::{CHUNK_BYTES, Store, segment};
use crate::Error;

/// Bytes in front of a record: its length.
const HEAD: usize = 4;

/// Records that follow each other.
struct Piece {
    /// Place of its beginning in the spool.
    at: u64,
    /// Bytes that count; what is behind them was cut off.
    len: usize,
    data: ChunkData,
}

/// See the module. What it has kept is discarded when it is dropped.
pub(crate) struct Spool {
    store: Arc<Store>,
    pieces: VecDeque<Piece>,
    tail: BytesMut,
    /// Place of the beginning of `tail`.
    tail_at: u64,
    /// Bytes in memory, those of `tail` among them.
    memory: usize,
}

impl std::fmt::Debug for Spool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Spool").field("end", &self.end()).finish_non_exhaustive()
    }
}

impl Spool {
    pub(super) fn new(store: Arc<Store>) -> Self {
        let (pieces, tail) = (VecDeque::new(), BytesMut::new());
        Self { store, pieces, tail, tail_at: 0, memory: 0 }
    }

    /// The place behind the last record.
    pub(crate) fn end(&self) -> u64 {
        self.tail_at + self.tail.len() as u64
    }

    /// Bytes that it has in memory.
    pub(crate) fn memory(&self) -> usize {
        self.memory
    }

    /// Appends a record, of two parts that follow each other.
    ///
    /// # Errors
    /// When it is longer than a message of a server can be.
    pub(crate) fn push(&mut self, parts: [&[u8]; 2]) -> Result<(), Error> {
        let len = parts[0].len() + parts[1].len();
        let head =
            u32::try_from(len).map_err(|_| Error::protocol(format_args!("a record of {len} bytes")))?;
        if self.tail.capacity() == 0 && self.tail_at > 0 {
            // Behind the first one follows a whole piece, most likely.
            self.tail.reserve(CHUNK_BYTES + HEAD + len);
        }
        self.tail.put_u32(head);
        parts.iter().for_each(|part| self.tail.put_slice(part));
        self.memory += HEAD + len;
        if self.tail.len() >= CHUNK_BYTES {
            self.seal();
        }
        Ok(())
    }

    /// Makes a piece of the tail.
    fn seal(&mut self) {
        if self.tail.is_empty() {
            return;
        }
        let rows = std::mem::take(&mut self.tail).freeze();
        let (at, len) = (self.tail_at, rows.len());
        self.tail_at += len as u64;
        self.pieces.push_back(Piece { at, len, data: ChunkData::Memory(rows) });
    }

    /// Forgets everything from a place on at which a record begins.
    pub(crate) fn truncate(&mut self, at: u64) {
        if at >= self.tail_at {
            let keep = usize::try_from(at - self.tail_at).unwrap_or(usize::MAX).min(self.tail.len());
            self.memory -= self.tail.len() - keep;
            self.tail.truncate(keep);
            return;
        }
        self.memory -= self.tail.len();
        self.tail.clear();
        while let Some(last) = self.pieces.back_mut() {
            let keep = usize::try_from(at.saturating_sub(last.at)).unwrap_or(usize::MAX).min(last.len);
            if keep > 0 {
                if let ChunkData::Memory(_) = last.data {
                    self.memory -= last.len - keep;
                }
                last.len = keep;
                break;
            }
            if let Some(gone) = self.pieces.pop_back() {
                self.release(gone);
            }
        }
        self.tail_at = at;
    }

    /// Forgets a piece.
    fn release(&mut self, piece: Piece) {
        match &piece.data {
            ChunkData::Memory(_) => self.memory -= piece.len,
            ChunkData::Disk(place) => {
                self.store.state.lock().spooled_bytes -= place.extent.len as u64;
                self.store.discard_chunks(vec![piece.data]);
            }
        }
    }

    /// Moves what is in memory to disk. Waits until there is room. False: there is none, and others that have not ended
    /// may have it.
    ///
    /// # Errors
    /// When the store was closed or cannot write.
    pub(crate) async fn write_out(&mut self) -> Result<bool, Error> {
        self.seal();
        let in_memory = |piece: &Piece| match &piece.data {
            ChunkData::Memory(rows) => Some(rows.slice(..piece.len)),
            ChunkData::Disk(_) => None,
        };
        let chunks: Vec<Bytes> = self.pieces.iter().filter_map(in_memory).collect();
        if !self.store.wait_for_spool(self.memory as u64).await? {
            return Ok(false);
        }
        let mut places = self.store.write_segment(chunks).await?.into_iter();
        let mut written = 0;
        for piece in &mut self.pieces {
            if let ChunkData::Memory(_) = piece.data
                && let Some(place) = places.next()
            {
                if let ChunkData::Disk(place) = &place {
                    written += place.extent.len as u64;
                }
                piece.data = place;
            }
        }
        self.memory = 0;
        self.store.state.lock().spooled_bytes += written;
        Ok(true)
    }

    /// The next records, which are gone then. `None`: there are no more.
    ///
    /// # Errors
    /// When they cannot be read, or are not what was written.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        if self.pieces.is_empty() {
            self.seal();
        }
        let Some(piece) = self.pieces.pop_front() else { return Ok(None) };
        let rows = match &piece.data {
            ChunkData::Memory(rows) => Ok(rows.clone()),
            ChunkData::Disk(place) => {
                let (path, extent) = (Arc::clone(&place.path), place.extent);
                let read = tokio::task::spawn_blocking(move || segment::read(&path, extent)).await;
                read.map_err(|_| Error::Closed { what: "the event store's reader" })
                    .flatten()
                    .map(|(_, rows)| rows)
            }
        };
        let len = piece.len;
        self.release(piece);
        Ok(Some(rows?.slice(..len)))
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        for piece in std::mem::take(&mut self.pieces) {
            self.release(piece);
        }
    }
}

/// The records of what [`Spool::next`] has given back, in their order.
pub(crate) fn records(mut rows: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let (len, rest) = rows.split_first_chunk::<HEAD>()?;
        let (record, rest) = rest.split_at_checked(u32::from_be_bytes(*len) as usize)?;
        rows = rest;
        Some(record)
    })
}

#[cfg(test)]
mod tests {
    use heartbeatpb::{ChangefeedId, Ts};
    use proptest::prelude::*;

    use super::super::{StoreConfig, StoreWriter};
    use super::*;

    fn open(disk_bytes: u64) -> (tempfile::TempDir, Arc<Store>, StoreWriter) {
        let dir = tempfile::tempdir().unwrap();
        let config = StoreConfig { dir: dir.path().join("store"), memory_bytes: 1 << 20, disk_bytes };
        let (store, writer) = Store::open(ChangefeedId::fresh("t"), config, Ts(1), Arc::default()).unwrap();
        (dir, store, writer)
    }

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
    }

    async fn rest(spool: &mut Spool) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        while let Some(rows) = spool.next().await.unwrap() {
            all.extend(records(&rows).map(<[u8]>::to_vec));
        }
        all
    }

    #[derive(Clone, Debug)]
    enum Act {
        Push(usize),
        Truncate(prop::sample::Index),
        WriteOut,
        Next,
    }

    fn act() -> impl Strategy<Value = Act> {
        prop_oneof![
            8 => (0..CHUNK_BYTES / 2).prop_map(Act::Push),
            4 => (0..100_usize).prop_map(Act::Push),
            2 => any::<prop::sample::Index>().prop_map(Act::Truncate),
            2 => Just(Act::WriteOut),
            1 => Just(Act::Next),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn what_was_pushed_and_not_cut_off_comes_back_in_order(acts in prop::collection::vec(act(), 1..40)) {
            let (_dir, store, writer) = open(1 << 30);
            let mut spool = writer.spool();
            let mut kept: Vec<(u64, Vec<u8>)> = Vec::new();
            block_on(async {
                for (turn, act) in acts.into_iter().enumerate() {
                    match act {
                        Act::Push(len) => {
                            let record = vec![u8::try_from(turn).unwrap(); len];
                            kept.push((spool.end(), record.clone()));
                            let middle = len / 2;
                            spool.push([&record[..middle], &record[middle..]]).unwrap();
                        }
                        Act::Truncate(index) if !kept.is_empty() => {
                            let at = index.index(kept.len());
                            spool.truncate(kept[at].0);
                            prop_assert_eq!(spool.end(), kept[at].0);
                            kept.truncate(at);
                        }
                        Act::Truncate(_) => {}
                        Act::WriteOut => {
                            prop_assert!(spool.write_out().await.unwrap());
                            prop_assert_eq!(spool.memory(), 0);
                        }
                        Act::Next => {
                            if let Some(rows) = spool.next().await.unwrap() {
                                for record in records(&rows) {
                                    prop_assert_eq!(record, &kept.remove(0).1);
                                }
                            }
                        }
                    }
                }
                let left: Vec<Vec<u8>> = kept.into_iter().map(|(_, record)| record).collect();
                prop_assert!(rest(&mut spool).await == left);
                prop_assert_eq!(spool.memory(), 0);
                Ok(())
            })?;
            let stats = store.stats();
            prop_assert_eq!((stats.disk_bytes, stats.unfinished_bytes), (0, 0));
        }
    }

    #[test]
    fn they_have_half_of_the_disk_and_give_it_back() {
        let (_dir, store, writer) = open(1 << 20);
        let record = vec![7; 300 << 10];
        block_on(async {
            let (mut one, mut other) = (writer.spool(), writer.spool());
            one.push([&record, b""]).unwrap();
            assert!(one.write_out().await.unwrap());
            other.push([b"", &record]).unwrap();
            assert!(!other.write_out().await.unwrap(), "two of them are more than half");
            assert_eq!(other.memory(), record.len() + HEAD, "it has what it had");
            assert!(store.stats().unfinished_bytes >= record.len() as u64);
            drop(one);
            assert_eq!((store.stats().disk_bytes, store.stats().unfinished_bytes), (0, 0));
            assert!(other.write_out().await.unwrap());
            assert_eq!(rest(&mut other).await, std::slice::from_ref(&record));
        });
    }

    #[test]
    fn a_file_that_is_not_what_was_written_is_told() {
        let (dir, _store, writer) = open(1 << 20);
        block_on(async {
            let mut spool = writer.spool();
            spool.push([b"record", b""]).unwrap();
            assert!(spool.write_out().await.unwrap());
            let folder = std::fs::read_dir(dir.path().join("store")).unwrap();
            let folder = folder.flatten().map(|entry| entry.path()).find(|path| path.is_dir()).unwrap();
            let files = std::fs::read_dir(folder).unwrap().flatten().map(|entry| entry.path());
            let file = files.into_iter().find(|path| path.extension().is_some()).unwrap();
            let mut bytes = std::fs::read(&file).unwrap();
            *bytes.last_mut().unwrap() ^= 1;
            std::fs::write(&file, bytes).unwrap();
            assert!(matches!(spool.next().await, Err(Error::StoreDamaged { .. })));
        });
    }
}
