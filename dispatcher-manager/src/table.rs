//! All dispatchers of a manager: by slot, by id, by schema, and their progress in one dense array.
//!
//! A heartbeat folds the array (16 bytes per dispatcher, in order) instead of visiting dispatchers, so the
//! minimum over 100,000 of them costs well under a millisecond.

use std::collections::{BTreeMap, BTreeSet};

use heartbeatpb::{DispatcherId, SchemaId, TableId, TableSpan, Ts};
use rustc_hash::FxHashMap;

use crate::dispatcher::Dispatcher;

/// Place of a dispatcher. A place is used again; the generation tells its occupants apart.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) struct Slot {
    index: u32,
    generation: u32,
}

impl Slot {
    /// Position in dense arrays beside this table.
    pub(crate) fn index(self) -> usize {
        self.index as usize
    }
}

/// Progress of one dispatcher; [`Ts::MAX`] where nobody is, or one that does not count yet.
#[derive(Clone, Copy, Debug)]
struct Row {
    checkpoint: Ts,
    resolved: Ts,
}

const NOBODY: Row = Row { checkpoint: Ts::MAX, resolved: Ts::MAX };

#[derive(Debug)]
struct Place {
    generation: u32,
    dispatcher: Option<Box<Dispatcher>>,
}

/// The dispatchers of one changefeed on one node.
#[derive(Debug, Default)]
pub(crate) struct DispatcherTable {
    places: Vec<Place>,
    rows: Vec<Row>,
    free: Vec<u32>,
    by_id: FxHashMap<DispatcherId, Slot>,
    by_schema: BTreeMap<SchemaId, BTreeSet<Slot>>,
    by_table: FxHashMap<TableId, BTreeSet<Slot>>,
}

impl DispatcherTable {
    pub(crate) fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Takes a dispatcher in. The table trigger belongs to no schema.
    pub(crate) fn insert(&mut self, dispatcher: Dispatcher) -> Slot {
        let index = self.free.pop().unwrap_or_else(|| {
            self.places.push(Place { generation: 0, dispatcher: None });
            self.rows.push(NOBODY);
            u32::try_from(self.places.len() - 1).expect("a node has fewer than 2^32 dispatchers")
        });
        let place = &mut self.places[index as usize];
        let slot = Slot { index, generation: place.generation };
        self.by_id.insert(dispatcher.id, slot);
        if !dispatcher.is_trigger() {
            self.by_schema.entry(dispatcher.schema).or_default().insert(slot);
        }
        self.by_table.entry(dispatcher.span.table).or_default().insert(slot);
        place.dispatcher = Some(Box::new(dispatcher));
        self.refresh(slot);
        slot
    }

    /// Takes a dispatcher out.
    pub(crate) fn remove(&mut self, slot: Slot) -> Option<Dispatcher> {
        let place = self.places.get_mut(slot.index()).filter(|place| place.generation == slot.generation)?;
        let dispatcher = *place.dispatcher.take()?;
        place.generation = place.generation.wrapping_add(1);
        self.rows[slot.index()] = NOBODY;
        self.free.push(slot.index);
        self.by_id.remove(&dispatcher.id);
        self.leave_schema(dispatcher.schema, slot);
        let table = dispatcher.span.table;
        if let Some(slots) = self.by_table.get_mut(&table) {
            slots.remove(&slot);
            if slots.is_empty() {
                self.by_table.remove(&table);
            }
        }
        Some(dispatcher)
    }

    pub(crate) fn slot(&self, id: DispatcherId) -> Option<Slot> {
        self.by_id.get(&id).copied()
    }

    pub(crate) fn get(&self, slot: Slot) -> Option<&Dispatcher> {
        let place = self.places.get(slot.index()).filter(|place| place.generation == slot.generation)?;
        place.dispatcher.as_deref()
    }

    pub(crate) fn get_mut(&mut self, slot: Slot) -> Option<&mut Dispatcher> {
        let place = self.places.get_mut(slot.index()).filter(|place| place.generation == slot.generation)?;
        place.dispatcher.as_deref_mut()
    }

    /// Copies a dispatcher's progress into the array. To be called after everything that may move it.
    pub(crate) fn refresh(&mut self, slot: Slot) {
        let Some(dispatcher) = self.get(slot) else { return };
        let row = match dispatcher.counts() {
            true => Row { checkpoint: dispatcher.checkpoint(), resolved: dispatcher.resolved() },
            false => NOBODY,
        };
        self.rows[slot.index()] = row;
    }

    /// Smallest checkpoint and smallest resolved ts; [`Ts::MAX`] for an empty table.
    pub(crate) fn watermark(&self) -> (Ts, Ts) {
        self.rows.iter().fold((Ts::MAX, Ts::MAX), |(checkpoint, resolved), row| {
            (checkpoint.min(row.checkpoint), resolved.min(row.resolved))
        })
    }

    /// Checkpoints by slot index; [`Ts::MAX`] where nobody is.
    pub(crate) fn checkpoints(&self) -> impl Iterator<Item = Ts> {
        self.rows.iter().map(|row| row.checkpoint)
    }

    /// The dispatcher that holds the checkpoint.
    pub(crate) fn slowest(&self) -> Option<&Dispatcher> {
        let (index, _) = self
            .rows
            .iter()
            .enumerate()
            .filter(|(_, row)| row.checkpoint < Ts::MAX)
            .min_by_key(|(_, row)| row.checkpoint)?;
        self.places[index].dispatcher.as_deref()
    }

    /// All dispatchers, in the order of their places.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Dispatcher> {
        self.places.iter().filter_map(|place| place.dispatcher.as_deref())
    }

    /// All dispatchers, in the order of their places.
    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Dispatcher> {
        self.places.iter_mut().filter_map(|place| place.dispatcher.as_deref_mut())
    }

    /// All slots in use.
    pub(crate) fn slots(&self) -> Vec<Slot> {
        let places = self.places.iter().enumerate();
        places
            .filter(|(_, place)| place.dispatcher.is_some())
            .map(|(index, place)| Slot {
                index: u32::try_from(index).expect("bounded on insertion"),
                generation: place.generation,
            })
            .collect()
    }

    /// Slots of a schema.
    pub(crate) fn of_schema(&self, schema: SchemaId) -> Vec<Slot> {
        self.by_schema.get(&schema).map(|slots| slots.iter().copied().collect()).unwrap_or_default()
    }

    /// Whether somebody has keys of a span.
    pub(crate) fn any_overlaps(&self, span: &TableSpan) -> bool {
        let ends_before = |end: &[u8], start: &[u8]| !end.is_empty() && end <= start;
        let slots = self.by_table.get(&span.table).into_iter().flatten();
        slots.filter_map(|slot| self.get(*slot)).any(|dispatcher| {
            let other = &dispatcher.span;
            !ends_before(&span.end, &other.start) && !ends_before(&other.end, &span.start)
        })
    }

    /// Moves one dispatcher from one schema to another; its neighbours stay.
    pub(crate) fn move_schema(&mut self, slot: Slot, old: SchemaId, new: SchemaId) {
        self.leave_schema(old, slot);
        self.by_schema.entry(new).or_default().insert(slot);
    }

    fn leave_schema(&mut self, schema: SchemaId, slot: Slot) {
        if let Some(slots) = self.by_schema.get_mut(&schema) {
            slots.remove(&slot);
            if slots.is_empty() {
                self.by_schema.remove(&schema);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::dispatcher::testing::{config, id};

    fn add(table: &mut DispatcherTable, n: u64, start: u64) -> Slot {
        table.insert(Dispatcher::new(
            &config(n, i64::try_from(n).expect("small"), start),
            false,
            Instant::now(),
        ))
    }

    #[test]
    fn the_watermark_is_the_minimum_over_those_that_are_there() {
        let mut table = DispatcherTable::default();
        assert_eq!(table.watermark(), (Ts::MAX, Ts::MAX));
        let a = add(&mut table, 1, 30);
        add(&mut table, 2, 40);
        assert_eq!(table.watermark(), (Ts(30), Ts(30)));
        assert_eq!(table.slowest().map(|d| d.id), Some(id(1)));
        table.remove(a);
        assert_eq!(table.watermark(), (Ts(40), Ts(40)));
        assert_eq!(table.len(), 1);
    }

    #[test]
    fn a_slot_of_an_earlier_occupant_finds_nobody() {
        let mut table = DispatcherTable::default();
        let a = add(&mut table, 1, 30);
        table.remove(a);
        let b = add(&mut table, 2, 40);
        assert_eq!(a.index(), b.index());
        assert!(table.get(a).is_none());
        assert!(table.remove(a).is_none());
        assert_eq!(table.slot(id(2)), Some(b));
    }

    #[test]
    fn spans_overlap_when_they_have_a_key_in_common() {
        let part = |table: i64, start: &str, end: &str| TableSpan {
            start: start.into(),
            end: end.into(),
            ..TableSpan::whole(TableId(table))
        };
        let mut table = DispatcherTable::default();
        let mut config = config(1, 1, 30);
        config.span = part(1, "g", "p");
        let slot = table.insert(Dispatcher::new(&config, false, Instant::now()));
        for (start, end, overlaps) in [
            ("", "g", false),
            ("p", "", false),
            ("", "", true),
            ("", "h", true),
            ("h", "i", true),
            ("o", "", true),
            ("g", "p", true),
        ] {
            assert_eq!(table.any_overlaps(&part(1, start, end)), overlaps, "{start}..{end}");
            assert!(!table.any_overlaps(&part(2, start, end)));
        }
        table.remove(slot);
        assert!(!table.any_overlaps(&part(1, "", "")));
    }

    #[test]
    fn a_move_between_schemas_moves_one_dispatcher() {
        let mut table = DispatcherTable::default();
        let a = add(&mut table, 1, 30);
        let b = add(&mut table, 2, 30);
        table.move_schema(a, SchemaId(1), SchemaId(5));
        assert_eq!(table.of_schema(SchemaId(1)), vec![b]);
        assert_eq!(table.of_schema(SchemaId(5)), vec![a]);
    }
}
