//! Where a row change belongs: its queue, the unique values it touches, and where its images lie.
//!
//! The place of a row is a pure function of the table's shape and of the values of its key, because the
//! progress of each queue outlives the process. Two values that the database may call equal although their
//! texts differ must never be told apart here; columns for which that cannot be decided are left out of the
//! hash, which only costs parallelism.

use std::sync::Arc;

use event::{
    Datum, KeyCodec, KeyError, ReplicaIdentity, RowBatch, RowChange, RowOp, TableInfo, Tuple, TypeKind,
    UniqueKey,
};
use heartbeatpb::Ts;
use xxhash_rust::xxh3::xxh3_64;

use crate::causality::{Access, Shard};

/// Weight of a row of an initial copy; see [`ROW_WEIGHT`].
pub(crate) const COPY_WEIGHT: u32 = 1;
/// Weight of any other change: a transaction may hold this many times more copied rows, which cost less.
pub(crate) const ROW_WEIGHT: u32 = 8;

/// Identifies a row change of a table across replays.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Position {
    pub(crate) commit_ts: Ts,
    /// -1 is before the first row.
    pub(crate) row_number: i64,
}

impl Position {
    /// Before every row.
    pub(crate) const START: Self = Self { commit_ts: Ts::ZERO, row_number: -1 };
}

/// How a row is found in the target.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Locate {
    /// By a unique key: positions of its columns.
    Key(Vec<usize>),
    /// By all its values.
    FullRow,
}

/// How a value of a key column is brought to the form in which equal values have equal bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Canonical {
    Exact,
    TrimBlanks,
    Decimal,
    Float,
}

fn canonical(kind: &TypeKind) -> Option<Canonical> {
    match kind {
        TypeKind::Bool
        | TypeKind::Int16
        | TypeKind::Int32
        | TypeKind::Int64
        | TypeKind::Varchar(_)
        | TypeKind::Text
        | TypeKind::Bytes
        | TypeKind::Date
        | TypeKind::Time
        | TypeKind::Timestamp
        | TypeKind::TimestampTz
        | TypeKind::Uuid
        | TypeKind::Bit(_)
        | TypeKind::Enum(_) => Some(Canonical::Exact),
        TypeKind::Char(_) => Some(Canonical::TrimBlanks),
        TypeKind::Numeric { .. } => Some(Canonical::Decimal),
        TypeKind::Float32 | TypeKind::Float64 => Some(Canonical::Float),
        TypeKind::Domain(inner) => canonical(inner),
        // Collations and extensions compare as they like, months equal 30 days, 1 equals 1.0 inside a document.
        TypeKind::Nondeterministic(_)
        | TypeKind::TimeTz
        | TypeKind::Interval
        | TypeKind::Json
        | TypeKind::Jsonb
        | TypeKind::Xml
        | TypeKind::Array(_)
        | TypeKind::Other
        | _ => None,
    }
}

impl Canonical {
    fn apply(self, text: &[u8]) -> &[u8] {
        match self {
            Canonical::Exact => text,
            Canonical::TrimBlanks => text.trim_ascii_end(),
            Canonical::Decimal if text.contains(&b'.') => {
                let end = text.iter().rposition(|b| *b != b'0').map_or(0, |at| at + 1);
                text[..end].strip_suffix(b".").unwrap_or(&text[..end])
            }
            Canonical::Decimal => text,
            Canonical::Float if text == b"-0" => b"0",
            Canonical::Float => text,
        }
    }
}

#[derive(Clone, Debug)]
struct KeyHash {
    /// Tells the keys of a table apart; part of the hash.
    index: u8,
    columns: Vec<(usize, Canonical)>,
    nullable: Vec<usize>,
    all: Vec<usize>,
}

impl KeyHash {
    fn new(table: &TableInfo, index: usize, columns: &[usize], nulls_collide: bool) -> Self {
        let hashed = columns.iter().filter_map(|&c| canonical(&table.columns[c].ty.kind).map(|how| (c, how)));
        let nullable = |&&c: &&usize| table.columns[c].nullable && !nulls_collide;
        Self {
            index: u8::try_from(index).unwrap_or(u8::MAX),
            columns: hashed.collect(),
            nullable: columns.iter().filter(nullable).copied().collect(),
            all: columns.to_vec(),
        }
    }
}

/// One image of a row, with the values of another standing in for those it does not hold.
#[derive(Clone, Copy)]
pub(crate) struct Image<'a> {
    pub(crate) main: Tuple<'a>,
    pub(crate) fallback: Option<Tuple<'a>>,
}

impl<'a> Image<'a> {
    pub(crate) fn get(&self, column: usize) -> Datum<'a> {
        match self.main.get(column) {
            Some(Datum::Unchanged) | None => {
                self.fallback.and_then(|tuple| tuple.get(column)).unwrap_or(Datum::Unchanged)
            }
            Some(datum) => datum,
        }
    }
}

/// What the values of a key in one image are.
enum KeyValue {
    Hash(u64),
    /// NULL in it: collides with nothing.
    Free,
    /// The image does not hold them.
    Unknown,
}

/// Where the images of a change lie in the encoded rows of its batch: the new one directly behind the old one. An image
/// that there is has a length, since it says how many values it has.
#[derive(Clone, Copy, Debug)]
struct Place {
    start: usize,
    old: u32,
    new: u32,
}

impl Place {
    fn of(batch: &RowBatch, row: &RowChange<'_>) -> Self {
        let bytes = |tuple: Option<Tuple<'_>>| tuple.map_or(0, |tuple| tuple.as_bytes().len());
        let Some(first) = row.old.or(row.new) else { return Self { start: 0, old: 0, new: 0 } };
        let start = first.as_bytes().as_ptr() as usize - batch.encoded_rows().as_ptr() as usize;
        // `put_row` writes lengths in as many bits.
        let length = |tuple| u32::try_from(bytes(tuple)).unwrap_or(u32::MAX);
        let place = Self { start, old: length(row.old), new: length(row.new) };
        debug_assert_eq!(place.after(batch).map(|new| new.as_bytes()), row.new.map(|new| new.as_bytes()));
        place
    }

    fn before(self, batch: &RowBatch) -> Option<Tuple<'_>> {
        batch.image(self.start, self.old as usize)
    }

    fn after(self, batch: &RowBatch) -> Option<Tuple<'_>> {
        batch.image(self.start + self.old as usize, self.new as usize)
    }

    const fn bytes(self) -> usize {
        self.old as usize + self.new as usize
    }

    /// One of them alone.
    const fn half(self, new: bool) -> Self {
        if new {
            Self { start: self.start + self.old as usize, old: 0, new: self.new }
        } else {
            Self { start: self.start, old: self.old, new: 0 }
        }
    }
}

/// A row change as the queues hold it: a reference into its batch.
#[derive(Debug)]
pub(crate) struct Change<B> {
    pub(crate) batch: Arc<B>,
    pub(crate) op: RowOp,
    pub(crate) at: Position,
    /// A row of an initial copy.
    pub(crate) copied: bool,
    /// Hash of the row's key.
    pub(crate) row: u64,
    /// Hash of the key that the change gives to the row.
    pub(crate) moves_to: Option<u64>,
    place: Place,
}

/// Something that holds a batch.
pub(crate) trait Holds {
    fn batch(&self) -> &RowBatch;
}

impl<B: Holds> Change<B> {
    pub(crate) fn old_image(&self) -> Option<Tuple<'_>> {
        self.place.before(self.batch.batch())
    }

    pub(crate) fn new_image(&self) -> Option<Tuple<'_>> {
        self.place.after(self.batch.batch())
    }

    /// Bytes of its images.
    pub(crate) const fn bytes(&self) -> usize {
        self.place.bytes()
    }

    /// Whether it concerns the table as a whole and not a row.
    pub(crate) fn is_for_table(&self) -> bool {
        matches!(self.op, RowOp::Truncate | RowOp::CopyStart)
    }

    pub(crate) fn table(&self) -> &Arc<TableInfo> {
        &self.batch.batch().table
    }

    /// Replaces `out` by the key of the row before the change, or after it.
    pub(crate) fn key(&self, codec: &KeyCodec, after: bool, out: &mut Vec<u8>) -> Result<(), KeyError> {
        let (old, new) = (self.old_image(), self.new_image());
        let (main, other) = if after { (new.or(old), old) } else { (old.or(new), new) };
        codec.encode(main.ok_or(KeyError::Missing)?, other, out)
    }

    /// Whether the row after the change is known as a whole: the log leaves out-of-line values out that stay as they are.
    pub(crate) fn brings_all(&self) -> bool {
        let Some(main) = self.new_image() else { return false };
        let image = Image { main, fallback: self.old_image() };
        let mut columns = self.table().columns.iter().enumerate();
        columns.all(|(at, column)| column.generated.is_some() || image.get(at) != Datum::Unchanged)
    }

    /// Half of a change of the key: the row goes, or it comes under its new key.
    pub(crate) fn half(&self, comes: bool) -> Self {
        let row = if comes { self.moves_to.unwrap_or(self.row) } else { self.row };
        Self {
            batch: Arc::clone(&self.batch),
            op: if comes { RowOp::Insert } else { RowOp::Delete },
            at: self.at,
            copied: false,
            row,
            moves_to: None,
            place: self.place.half(comes),
        }
    }
}

/// The rules of one table shape.
#[derive(Clone, Debug)]
pub(crate) struct Routing {
    pub(crate) table: Arc<TableInfo>,
    pub(crate) locate: Locate,
    /// Everything in one queue: no key, or a key whose values are not in the log.
    single: bool,
    row_key: KeyHash,
    other_keys: Vec<KeyHash>,
    /// Key ranges of the table, if it can be divided.
    pub(crate) codec: Option<KeyCodec>,
}

/// The key by which rows are found: the replica identity, since it is what old images hold, or for a full
/// identity the handle key.
pub(crate) fn locate(table: &TableInfo) -> Locate {
    let in_log = |columns: &[usize]| columns.iter().all(|&c| table.columns[c].generated.is_none());
    let handle = || table.handle_key().map(|key| key.columns.clone());
    let columns = match &table.identity {
        ReplicaIdentity::Key(columns) => Some(columns.clone()),
        ReplicaIdentity::Full | ReplicaIdentity::Nothing => handle(),
    };
    columns.filter(|columns| !columns.is_empty() && in_log(columns)).map_or(Locate::FullRow, Locate::Key)
}

impl Routing {
    pub(crate) fn new(table: &Arc<TableInfo>) -> Self {
        let locate = locate(table);
        let in_log = |key: &UniqueKey| key.columns.iter().all(|&c| table.columns[c].generated.is_none());
        let single = locate == Locate::FullRow || !table.keys.iter().all(in_log);
        let columns = match &locate {
            Locate::Key(columns) if !single => columns.as_slice(),
            Locate::Key(_) | Locate::FullRow => &[],
        };
        let same = |key: &UniqueKey| {
            key.columns.len() == columns.len() && key.columns.iter().all(|c| columns.contains(c))
        };
        let others = table.keys.iter().enumerate().filter(|(_, key)| !single && !same(key));
        Self {
            table: Arc::clone(table),
            single,
            row_key: KeyHash::new(table, 0, columns, true),
            other_keys: others
                .map(|(i, key)| KeyHash::new(table, i + 1, &key.columns, key.nulls_not_distinct))
                .collect(),
            codec: KeyCodec::new(table),
            locate,
        }
    }

    /// Whether the table has unique keys besides the one that finds rows.
    pub(crate) fn has_other_keys(&self) -> bool {
        self.single || !self.other_keys.is_empty()
    }

    fn hash(&self, key: &KeyHash, image: &Image<'_>, scratch: &mut Vec<u8>) -> KeyValue {
        scratch.clear();
        scratch.extend_from_slice(&self.table.id.0.to_be_bytes());
        scratch.push(key.index);
        if key.nullable.iter().any(|&c| image.get(c) == Datum::Null) {
            return KeyValue::Free;
        }
        if key.all.iter().any(|&c| image.get(c) == Datum::Unchanged) {
            return KeyValue::Unknown;
        }
        for &(column, how) in &key.columns {
            if let Datum::Text(text) = image.get(column) {
                let text = how.apply(text);
                scratch.push(1);
                scratch.extend_from_slice(&(text.len() as u64).to_be_bytes());
                scratch.extend_from_slice(text);
            } else {
                scratch.push(0);
            }
        }
        KeyValue::Hash(xxh3_64(scratch))
    }

    /// The queue of the table as a whole.
    fn home(&self) -> u64 {
        xxh3_64(&self.table.id.0.to_be_bytes())
    }

    /// What a change touches, and the change itself.
    pub(crate) fn route<B: Holds>(
        &self,
        batch: &Arc<B>,
        row: &RowChange<'_>,
        copied: bool,
        scratch: &mut Vec<u8>,
    ) -> (Access, Change<B>) {
        let place = Place::of(batch.batch(), row);
        let mut access = Access {
            table: self.table.id,
            shard: Shard::of(0),
            row: 0,
            moves_to: None,
            keys: Vec::new(),
            barrier: matches!(row.op, RowOp::Truncate | RowOp::CopyStart),
            bytes: 32 + place.bytes(),
            weight: if copied { COPY_WEIGHT } else { ROW_WEIGHT },
        };
        self.touch(&mut access, row, scratch);
        access.shard = Shard::of(access.row);
        let at = Position {
            commit_ts: row.txn.commit_ts,
            row_number: i64::try_from(row.row_number).unwrap_or(i64::MAX),
        };
        let change = Change {
            batch: Arc::clone(batch),
            op: row.op,
            at,
            copied,
            row: access.row,
            moves_to: access.moves_to.map(|(_, to)| to),
            place,
        };
        (access, change)
    }

    fn touch(&self, access: &mut Access, row: &RowChange<'_>, scratch: &mut Vec<u8>) {
        access.row = self.home();
        if self.single || access.barrier {
            return;
        }
        let before = row.old.map(|main| Image { main, fallback: row.new });
        let after = row.new.map(|main| Image { main, fallback: row.old });
        let Some(found_by) = before.or(after) else { return };
        match self.hash(&self.row_key, &found_by, scratch) {
            KeyValue::Hash(hash) => access.row = hash,
            // Not possible for a key that is the replica identity; as a whole it is still in order.
            KeyValue::Free | KeyValue::Unknown => access.barrier = true,
        }
        if let (Some(_), Some(after)) = (&before, &after)
            && let KeyValue::Hash(to) = self.hash(&self.row_key, after, scratch)
            && to != access.row
        {
            access.moves_to = Some((Shard::of(to), to));
        }
        if self.other_keys.is_empty() {
            return;
        }
        let mut keys = Vec::with_capacity(self.other_keys.len() * 2);
        for key in &self.other_keys {
            for (image, is_new) in [(&before, false), (&after, true)] {
                match image.as_ref().map(|image| self.hash(key, image, scratch)) {
                    Some(KeyValue::Hash(hash)) if !keys.contains(&hash) => keys.push(hash),
                    // A new value in part of a key whose other part was not sent: order it by hand.
                    Some(KeyValue::Unknown) if is_new && key.all.len() > 1 => access.barrier = true,
                    Some(KeyValue::Hash(_) | KeyValue::Free | KeyValue::Unknown) | None => {}
                }
            }
        }
        access.keys = keys;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{BatchBuilder, column, key, table};
    use event::Column;

    struct Held(RowBatch);
    impl Holds for Held {
        fn batch(&self) -> &RowBatch {
            &self.0
        }
    }

    fn routed(table: &Arc<TableInfo>, batch: BatchBuilder) -> Vec<(Access, Change<Held>)> {
        let routing = Routing::new(table);
        let held = Arc::new(Held(batch.build()));
        held.0.iter().map(|row| routing.route(&held, &row, false, &mut Vec::new())).collect()
    }

    fn with(table: &Arc<TableInfo>, change: impl FnOnce(&mut TableInfo)) -> Arc<TableInfo> {
        let mut info = (**table).clone();
        change(&mut info);
        Arc::new(info)
    }

    #[test]
    fn a_row_stays_in_its_queue_until_its_key_changes() {
        let t = table(1, 2);
        let rows = routed(
            &t,
            BatchBuilder::new(&t)
                .insert(10, &["1", "a"])
                .op(11, RowOp::Update, None, Some(&["1", "b"]))
                .op(12, RowOp::Update, Some(&["1", "\\U"]), Some(&["2", "b"]))
                .op(13, RowOp::Delete, Some(&["2", "\\U"]), None),
        );
        assert_eq!(rows[0].0.row, rows[1].0.row);
        assert_eq!(rows[1].0.row, rows[2].0.row, "an update belongs to the old key");
        assert_eq!(rows[2].0.moves_to, Some((rows[3].0.shard, rows[3].0.row)));
        assert!(rows[0].0.moves_to.is_none() && rows[0].0.keys.is_empty());
        assert_eq!(rows[3].1.old_image().and_then(|old| old.get(0)), Some(Datum::Text(b"2")));
        assert!(rows[3].1.new_image().is_none());
    }

    // behaviour: dataplane-4
    #[test]
    fn old_and_new_values_of_every_unique_key_count_and_null_collides_with_nothing() {
        let t = with(&table(1, 3), |t| {
            t.keys.push(key(&[1], false));
            t.keys.push(key(&[1, 2], false));
            t.identity = ReplicaIdentity::Full;
        });
        let rows = routed(
            &t,
            BatchBuilder::new(&t)
                .op(10, RowOp::Update, Some(&["1", "a", "x"]), Some(&["1", "b", "x"]))
                .insert(11, &["2", "a", "\\N"])
                .insert(12, &["3", "\\N", "x"]),
        );
        assert_eq!(rows[0].0.keys.len(), 4);
        assert_eq!(rows[1].0.keys.len(), 1, "(a, NULL) is free");
        assert!(rows[0].0.keys.contains(&rows[1].0.keys[0]));
        assert!(rows[2].0.keys.is_empty());
    }

    #[test]
    fn nulls_that_do_collide_are_ordered() {
        let t = with(&table(1, 2), |t| {
            t.keys.push(UniqueKey { nulls_not_distinct: true, ..key(&[1], false) });
        });
        let rows = routed(&t, BatchBuilder::new(&t).insert(10, &["1", "\\N"]).insert(11, &["2", "\\N"]));
        assert_eq!(rows[0].0.keys, rows[1].0.keys);
        assert_eq!(rows[0].0.keys.len(), 1);
    }

    #[test]
    fn values_that_the_database_calls_equal_share_a_queue() {
        for (kind, a, b, c) in [
            (TypeKind::Numeric { precision: None, scale: 0 }, "1.50", "1.5", "15"),
            (TypeKind::Numeric { precision: None, scale: 0 }, "100", "100.0", "10"),
            (TypeKind::Float64, "0", "-0", "1"),
            (TypeKind::Char(Some(4)), "a   ", "a", " a"),
            (TypeKind::Domain(Box::new(TypeKind::Char(None))), "a ", "a", "b"),
        ] {
            let t = with(&table(1, 1), |t| t.columns[0] = column("k", kind.clone(), "any"));
            let rows = routed(&t, BatchBuilder::new(&t).insert(1, &[a]).insert(2, &[b]).insert(3, &[c]));
            assert_eq!(rows[0].0.row, rows[1].0.row, "{kind:?}");
            assert_ne!(rows[0].0.row, rows[2].0.row, "{kind:?}");
        }
        let t = with(&table(1, 1), |t| t.columns[0] = column("k", TypeKind::Interval, "interval"));
        let rows = routed(&t, BatchBuilder::new(&t).insert(1, &["1 mon"]).insert(2, &["30 days"]));
        assert_eq!(rows[0].0.row, rows[1].0.row, "equal although the texts differ");
    }

    #[test]
    fn a_table_without_a_usable_key_has_one_queue() {
        let keyless = with(&table(1, 2), |t| {
            t.keys.clear();
            t.identity = ReplicaIdentity::Full;
        });
        let computed = with(&table(1, 3), |t| {
            t.columns[2] = Column { generated: Some("c1".into()), ..t.columns[2].clone() };
            t.keys.push(key(&[2], false));
        });
        for t in [keyless, computed] {
            let width = t.columns.len();
            let rows = routed(
                &t,
                BatchBuilder::new(&t)
                    .insert(1, &["1", "a", "\\U"][..width])
                    .insert(2, &["2", "b", "\\U"][..width]),
            );
            assert_eq!(rows[0].0.shard, rows[1].0.shard);
            assert!(Routing::new(&t).has_other_keys());
        }
    }

    #[test]
    fn the_replica_identity_finds_rows_even_when_it_is_not_the_primary_key() {
        let t = with(&table(1, 2), |t| {
            t.columns[1].nullable = false;
            t.keys.push(key(&[1], false));
            t.identity = ReplicaIdentity::Key(vec![1]);
        });
        assert_eq!(locate(&t), Locate::Key(vec![1]));
        let rows = routed(
            &t,
            BatchBuilder::new(&t).insert(1, &["1", "a"]).op(2, RowOp::Delete, Some(&["\\U", "a"]), None),
        );
        assert_eq!(rows[0].0.row, rows[1].0.row);
    }

    #[test]
    fn a_half_known_new_key_is_a_barrier() {
        let t = with(&table(1, 3), |t| t.keys.push(key(&[1, 2], false)));
        let rows = routed(&t, BatchBuilder::new(&t).op(1, RowOp::Update, None, Some(&["1", "\\U", "new"])));
        assert!(rows[0].0.barrier);
    }

    #[test]
    fn truncate_is_a_barrier_in_the_queue_of_the_table() {
        let t = table(1, 1);
        let rows = routed(
            &t,
            BatchBuilder::new(&t).op(1, RowOp::Truncate, None, None).op(2, RowOp::CopyStart, None, None),
        );
        assert!(rows[0].0.barrier && rows[1].0.barrier);
        assert_eq!(rows[0].0.shard, rows[1].0.shard);
    }
}
