//! Spans side by side in memory, found by their ids.
//!
//! A span has a slot for as long as it is in the store. Indexes name spans by slots: four bytes in place of sixteen,
//! and neighbours in an index are neighbours in memory.

use std::collections::HashMap;

use heartbeatpb::DispatcherId;
use rustc_hash::FxBuildHasher;

use crate::set::Entry;

/// Where a span is kept.
pub(crate) type Slot = u32;

/// Spans that are allocated together: a changefeed of a few tables takes little, and a large one is never copied.
const CHUNK: usize = 32;

/// Spans by slot and by id. Both are O(1); the order of slots depends on what came and went, and on nothing else.
#[derive(Clone, Debug, Default)]
pub(crate) struct Store {
    // Ids are random already.
    slots: HashMap<DispatcherId, Slot, FxBuildHasher>,
    chunks: Vec<Vec<Option<Entry>>>,
    /// Slots that were given back; the last one is used first.
    free: Vec<Slot>,
}

impl Store {
    pub(crate) fn len(&self) -> usize {
        self.slots.len()
    }

    pub(crate) fn contains(&self, id: DispatcherId) -> bool {
        self.slots.contains_key(&id)
    }

    pub(crate) fn slot(&self, id: DispatcherId) -> Option<Slot> {
        self.slots.get(&id).copied()
    }

    pub(crate) fn get(&self, id: DispatcherId) -> Option<&Entry> {
        self.at(self.slot(id)?)
    }

    /// The span in a slot.
    pub(crate) fn at(&self, slot: Slot) -> Option<&Entry> {
        let (chunk, offset) = place(slot);
        self.chunks.get(chunk)?.get(offset)?.as_ref()
    }

    /// The span in a slot, to be changed. Its id must stay.
    pub(crate) fn at_mut(&mut self, slot: Slot) -> Option<&mut Entry> {
        let (chunk, offset) = place(slot);
        self.chunks.get_mut(chunk)?.get_mut(offset)?.as_mut()
    }

    /// All spans, in the order of their slots.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.chunks.iter().flatten().flatten()
    }

    /// Keeps a span whose id is not in the store, and says where; `None` when there is no slot left.
    pub(crate) fn insert(&mut self, entry: Entry) -> Option<Slot> {
        let id = entry.span.id;
        let slot = match self.free.pop() {
            Some(slot) => {
                let (chunk, offset) = place(slot);
                *self.chunks.get_mut(chunk)?.get_mut(offset)? = Some(entry);
                slot
            }
            None => self.append(entry)?,
        };
        self.slots.insert(id, slot);
        Some(slot)
    }

    fn append(&mut self, entry: Entry) -> Option<Slot> {
        if self.chunks.last().is_none_or(|chunk| chunk.len() == CHUNK) {
            self.chunks.push(Vec::with_capacity(CHUNK));
        }
        let before = (self.chunks.len() - 1) * CHUNK;
        let chunk = self.chunks.last_mut()?;
        let slot = Slot::try_from(before + chunk.len()).ok()?;
        chunk.push(Some(entry));
        Some(slot)
    }

    /// Takes a span out, with the slot that it had.
    pub(crate) fn remove(&mut self, id: DispatcherId) -> Option<(Slot, Entry)> {
        let slot = self.slots.remove(&id)?;
        let (chunk, offset) = place(slot);
        let entry = self.chunks.get_mut(chunk)?.get_mut(offset)?.take()?;
        if self.slots.is_empty() {
            *self = Self::default();
        } else {
            self.free.push(slot);
        }
        Some((slot, entry))
    }
}

fn place(slot: Slot) -> (usize, usize) {
    let slot = slot as usize;
    (slot / CHUNK, slot % CHUNK)
}

#[cfg(test)]
mod tests {
    use heartbeatpb::{SchemaId, TableId, TableSpan, Ts};

    use super::*;
    use crate::{SpanReplica, Standing};

    fn entry(n: u64) -> Entry {
        let span = TableSpan::whole(TableId(1));
        let span = SpanReplica::absent(DispatcherId::new(7, n), SchemaId(1), span, Ts(n));
        Entry::new(Standing::Absent, span)
    }

    #[test]
    fn a_span_keeps_its_slot_and_a_free_slot_is_used_again() {
        let mut store = Store::default();
        let slots: Vec<Option<Slot>> = (1..=100).map(|n| store.insert(entry(n))).collect();
        assert!(slots.iter().copied().eq((0..100).map(Some)));
        let (slot, gone) = store.remove(DispatcherId::new(7, 40)).unwrap();
        assert_eq!((slot, gone.span.id.low), (39, 40));
        assert!(store.at(39).is_none() && store.remove(DispatcherId::new(7, 40)).is_none());
        assert_eq!(store.slot(DispatcherId::new(7, 99)), Some(98));
        assert_eq!(store.insert(entry(200)), Some(39));
        assert_eq!(store.get(DispatcherId::new(7, 200)).map(|entry| entry.span.checkpoint), Some(Ts(200)));
        assert_eq!((store.len(), store.iter().count()), (100, 100));
    }

    #[test]
    fn an_empty_store_gives_its_memory_back() {
        let mut store = Store::default();
        assert!((1..=100).all(|n| store.insert(entry(n)).is_some()));
        assert!((1..=100).all(|n| store.remove(DispatcherId::new(7, n)).is_some()));
        assert_eq!((store.len(), store.chunks.capacity(), store.slots.capacity()), (0, 0, 0));
        assert_eq!(store.insert(entry(1)), Some(0));
    }

    #[test]
    fn an_entry_is_not_larger_than_it_has_to_be() {
        assert!(size_of::<Option<Entry>>() <= 136, "{} bytes", size_of::<Option<Entry>>());
    }
}
