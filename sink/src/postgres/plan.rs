//! From the row changes of one table to few statements with many rows each: pure.
//!
//! Changes of different rows may be written in any order as long as no other unique key is involved; then
//! each change joins the earliest statement of its kind behind the last one that touches its row, and a
//! change that makes an earlier one of its row superfluous replaces it. Where other unique keys exist, or
//! rows are found by all their values, the order is kept and only neighbours share a statement.

mod images;
mod statement;

use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use event::{Datum, RowOp, TableInfo};
use rustc_hash::{FxHashMap, FxHashSet};

use self::images::Images;
use self::statement::set_columns;
pub(crate) use self::statement::{Source, Texts, sql, text};
use super::route::{Change, Holds, Image, Locate};
use super::sql::{TextArray, copy_value};
use super::stage::STAGED_BYTES;
use super::target::Target;
use crate::Error;

/// What a statement does with its rows.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Kind {
    /// `COPY … FROM STDIN`: rows of an initial copy into a table that holds nothing else.
    Copy,
    /// `INSERT`: rows without a key.
    Insert,
    /// `INSERT … ON CONFLICT DO UPDATE`: complete rows whose key stays, which may or may not be there.
    Upsert,
    /// `UPDATE` of columns of rows that are there: true for each column of the target that is set.
    Update(Arc<[bool]>),
    /// `DELETE`.
    Delete,
}

/// One statement and its rows, in order.
pub(crate) struct Group<'a, B> {
    pub(crate) kind: Kind,
    changes: Vec<Option<&'a Change<B>>>,
    /// How many of them there still are.
    rows: u64,
    /// Bytes of their images.
    bytes: usize,
}

impl<'a, B: Holds> Group<'a, B> {
    const fn new(kind: Kind) -> Self {
        Self { kind, changes: Vec::new(), rows: 0, bytes: 0 }
    }

    /// Adds a change and answers its place.
    fn push(&mut self, change: &'a Change<B>) -> usize {
        self.changes.push(Some(change));
        self.rows += 1;
        self.bytes += change.bytes();
        self.changes.len() - 1
    }

    fn remove(&mut self, place: usize) {
        if let Some(change) = self.changes[place].take() {
            self.rows -= 1;
            self.bytes -= change.bytes();
        }
    }

    pub(crate) fn changes(&self) -> impl Iterator<Item = &'a Change<B>> + '_ {
        self.changes.iter().copied().flatten()
    }

    /// The same rows under another statement.
    pub(crate) fn with_kind(&self, kind: Kind) -> Self {
        Self { kind, changes: self.changes.clone(), rows: self.rows, bytes: self.bytes }
    }

    pub(crate) const fn rows(&self) -> u64 {
        self.rows
    }

    /// Bytes of the images of its rows.
    pub(crate) const fn bytes(&self) -> usize {
        self.bytes
    }
}

/// What a plan may do beside what its changes say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Leave {
    /// Rows of an initial copy go by `COPY`.
    pub(crate) copy: bool,
    /// Rows that are updated as a whole are there: `UPDATE` finds them, which costs less than an insertion that fails.
    pub(crate) update: bool,
}

/// How eagerly changes share statements.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mode {
    /// As described above.
    Batched,
    /// One statement per change, in order.
    Singles,
}

fn unusable(table: &TableInfo, what: &str) -> Error {
    Error::Rejected {
        code: "CDC:ErrSinkRowIncomplete",
        what: format!("table {}.{}: {what}", table.schema, table.name),
    }
}

/// Whether every column that the sink writes has a value in the new image.
pub(crate) fn is_complete<B: Holds>(target: &Target, change: &Change<B>) -> bool {
    Images::of(change).is_complete(target)
}

/// The statements of a change in order: almost always one.
type Kinds = [Option<Kind>; 2];

const fn one(kind: Kind) -> Kinds {
    [Some(kind), None]
}

/// The statements of a change. Where whole rows may be updated, `whole` are the columns that such an `UPDATE` sets.
fn kinds(
    target: &Target,
    op: RowOp,
    copied: bool,
    images: Images<'_>,
    whole: Option<&Arc<[bool]>>,
) -> Result<Kinds, Error> {
    let by_key = target.routing.locate != Locate::FullRow;
    let complete = images.is_complete(target);
    // What is complete has a key too.
    let keyed = || (complete && images.is_one()) || images.key(target).all(|value| value != Datum::Unchanged);
    if by_key && !keyed() {
        return Err(unusable(
            &target.info,
            "a change came without the key of its row; set its REPLICA IDENTITY",
        ));
    }
    match op {
        RowOp::Insert if !complete => Err(unusable(&target.info, "an inserted row is incomplete")),
        RowOp::Insert if copied => Ok(one(Kind::Copy)),
        RowOp::Insert => Ok(one(if by_key { Kind::Upsert } else { Kind::Insert })),
        RowOp::Update => update_kinds(target, images, (by_key, complete), whole),
        RowOp::Delete if images.old.is_none() => {
            Err(unusable(&target.info, "a delete came without the old row; set its REPLICA IDENTITY"))
        }
        RowOp::Delete => Ok(one(Kind::Delete)),
        RowOp::Truncate | RowOp::CopyStart => Err(unusable(&target.info, "a barrier is not a row")),
    }
}

/// The columns that an `UPDATE` sets of whole rows whose key stays.
fn whole_row(target: &Target) -> impl Iterator<Item = bool> {
    let set = |at: usize| !target.key.contains(&at) && !target.columns[at].identity_always;
    (0..target.columns.len()).map(set)
}

/// Whether an `UPDATE` is one of whole rows whose key stays.
pub(crate) fn is_whole_row(target: &Target, set: &[bool]) -> bool {
    !target.key.is_empty() && whole_row(target).eq(set.iter().copied())
}

fn update_kinds(
    target: &Target,
    images: Images<'_>,
    (by_key, complete): (bool, bool),
    whole: Option<&Arc<[bool]>>,
) -> Result<Kinds, Error> {
    let Some(image) = images.after() else {
        return Err(unusable(&target.info, "an update came without the new row"));
    };
    if !by_key && images.old.is_none() {
        return Err(unusable(
            &target.info,
            "an update came without the old row; set its REPLICA IDENTITY to FULL",
        ));
    }
    let key_changed = images.key_changes(target);
    if by_key && !key_changed && complete {
        return Ok(one(whole.map_or(Kind::Upsert, |set| Kind::Update(Arc::clone(set)))));
    }
    // PostgreSQL lets nobody update such a column, so the row is replaced.
    if target.columns.iter().any(|column| column.identity_always && images.value_changes(column.source)) {
        if !by_key || !complete {
            return Err(unusable(&target.info, "an update changes a GENERATED ALWAYS AS IDENTITY column"));
        }
        return Ok([Some(Kind::Delete), Some(Kind::Upsert)]);
    }
    let set = target.columns.iter().enumerate().map(|(at, column)| {
        let wanted = if key_changed || !target.key.contains(&at) {
            image.get(column.source)
        } else {
            Datum::Unchanged
        };
        wanted != Datum::Unchanged && !column.identity_always
    });
    let set: Arc<[bool]> = set.collect();
    // Otherwise nothing that the target keeps has changed.
    Ok([set.contains(&true).then_some(Kind::Update(set)), None])
}

/// Groups the changes of one table.
pub(crate) fn plan<'a, B: Holds>(
    target: &Target,
    changes: impl IntoIterator<Item = &'a Change<B>>,
    mode: Mode,
    leave: Leave,
) -> Result<Vec<Group<'a, B>>, Error> {
    // Where the order is kept, or each change is alone, one kind of statement for all whole rows is the better one.
    let update = leave.update && mode == Mode::Batched && !target.routing.has_other_keys();
    let whole: Option<Arc<[bool]>> = update.then(|| whole_row(target).collect());
    let whole = whole.filter(|set| set.contains(&true));
    let changes = changes.into_iter();
    let mut planner = Planner {
        target,
        groups: Vec::new(),
        last: FxHashMap::with_capacity_and_hasher(changes.size_hint().0, Default::default()),
        in_last_group: FxHashSet::default(),
        mode,
    };
    for change in changes {
        let images = Images::of(change);
        let kinds = kinds(target, change.op, change.copied, images, whole.as_ref())?;
        for kind in kinds.into_iter().flatten() {
            let kind = match kind {
                Kind::Copy if leave.copy && mode == Mode::Batched && change.bytes() < STAGED_BYTES => {
                    Kind::Copy
                }
                Kind::Copy if target.key.is_empty() => Kind::Insert,
                Kind::Copy => Kind::Upsert,
                other @ (Kind::Insert | Kind::Upsert | Kind::Update(_) | Kind::Delete) => other,
            };
            planner.place(change, images, kind);
        }
    }
    planner.groups.retain(|group| group.rows() > 0);
    Ok(planner.groups)
}

struct Planner<'t, 'a, B> {
    target: &'t Target,
    groups: Vec<Group<'a, B>>,
    /// The last statement, and the place in it, that touches a row.
    last: FxHashMap<u64, (usize, usize)>,
    /// Rows of the last group, where order is kept.
    in_last_group: FxHashSet<u64>,
    mode: Mode,
}

impl<'a, B: Holds> Planner<'_, 'a, B> {
    fn place(&mut self, change: &'a Change<B>, images: Images<'a>, kind: Kind) {
        if self.mode == Mode::Singles {
            self.add(change, kind);
        } else if self.target.routing.has_other_keys() {
            self.place_in_order(change, kind);
        } else {
            self.place_by_row(change, images, kind);
        }
    }

    /// Adds a statement of one change.
    fn add(&mut self, change: &'a Change<B>, kind: Kind) {
        let mut group = Group::new(kind);
        group.push(change);
        self.groups.push(group);
    }

    fn place_in_order(&mut self, change: &'a Change<B>, kind: Kind) {
        let by_key = !self.target.key.is_empty();
        let rows_share = match &kind {
            Kind::Copy | Kind::Insert => true,
            // Found by all its values: one row at a time, since equal rows may be many.
            Kind::Upsert | Kind::Update(_) | Kind::Delete => {
                by_key
                    && !self.in_last_group.contains(&change.row)
                    && change.moves_to.is_none_or(|to| !self.in_last_group.contains(&to))
            }
        };
        match self.groups.last_mut() {
            Some(group) if group.kind == kind && rows_share => drop(group.push(change)),
            Some(_) | None => {
                self.add(change, kind);
                self.in_last_group.clear();
            }
        }
        self.in_last_group.insert(change.row);
        self.in_last_group.extend(change.moves_to);
    }

    fn place_by_row(&mut self, change: &'a Change<B>, images: Images<'a>, kind: Kind) {
        let before = self.last.get(&change.row).copied();
        let completes = before.is_some_and(|at| self.completes_insertion(at, images, &kind));
        let kind = if completes { Kind::Upsert } else { kind };
        let there = change.moves_to.and_then(|to| self.last.get(&to).copied());
        let mut from = 0;
        for (group, place) in before.into_iter().chain(there) {
            let replaced = self.replaces((group, place), images, &kind);
            if replaced {
                self.groups[group].remove(place);
            }
            from = from.max(if replaced { group } else { group + 1 });
        }
        let found = self.groups[from.min(self.groups.len())..].iter().position(|group| group.kind == kind);
        let group = found.map_or(self.groups.len(), |at| at + from);
        if found.is_none() {
            self.groups.push(Group::new(kind));
        }
        let place = self.groups[group].push(change);
        for hash in std::iter::once(change.row).chain(change.moves_to) {
            self.last.insert(hash, (group, place));
        }
    }

    /// Whether a whole row is updated that this transaction inserts: it is inserted as it becomes.
    fn completes_insertion(&self, (group, place): (usize, usize), images: Images<'_>, kind: &Kind) -> bool {
        let Kind::Update(set) = kind else { return false };
        self.groups[group].kind == Kind::Upsert
            && is_whole_row(self.target, set)
            && self.replaces((group, place), images, &Kind::Upsert)
    }

    /// Whether the new change leaves the row as if the earlier one had never been.
    fn replaces(&self, (group, place): (usize, usize), images: Images<'_>, kind: &Kind) -> bool {
        let Some(earlier) = self.groups[group].changes.get(place).copied().flatten() else { return false };
        let supersedes = match (&self.groups[group].kind, kind) {
            (Kind::Upsert | Kind::Update(_) | Kind::Delete, Kind::Upsert)
            | (Kind::Upsert | Kind::Update(_), Kind::Delete) => true,
            (Kind::Update(before), Kind::Update(after)) => {
                before.iter().zip(after.iter()).all(|(before, after)| *after || !*before)
            }
            (Kind::Copy | Kind::Insert | Kind::Upsert | Kind::Update(_) | Kind::Delete, _) => false,
        };
        if !supersedes {
            return false;
        }
        let earlier = Images::of(earlier);
        // A change of the key touches two rows, and its two hashes may be one.
        !earlier.key_changes(self.target)
            && !images.key_changes(self.target)
            && earlier.key(self.target).eq(images.key(self.target))
    }
}

/// What a statement of a kind wants of each row: columns of the image that finds it, then columns of the new image.
fn wanted(target: &Target, kind: &Kind) -> (Vec<usize>, Vec<usize>) {
    let all: Vec<usize> = (0..target.columns.len()).collect();
    match kind {
        Kind::Copy | Kind::Insert | Kind::Upsert => (Vec::new(), all),
        Kind::Delete if target.key.is_empty() => (all, Vec::new()),
        Kind::Delete => (target.key.clone(), Vec::new()),
        Kind::Update(set) if target.key.is_empty() => (all, set_columns(set)),
        Kind::Update(set) => (target.key.clone(), set_columns(set)),
    }
}

/// The values of each row of a group's statement, in the order of its parameters.
pub(crate) fn values<'a, B: Holds>(
    target: &Target,
    group: &Group<'a, B>,
) -> impl Iterator<Item = Vec<Datum<'a>>> {
    let (found, new) = wanted(target, &group.kind);
    let mut values = Vec::new();
    group.changes().map(move |change| {
        let mut row = Vec::with_capacity(found.len() + new.len());
        let images = Images::of(change);
        for (image, columns) in [(images.found_by(), &found), (images.after(), &new)] {
            fill(image, &mut values);
            let value = |&at: &usize| values.get(target.columns[at].source).copied().unwrap_or(Datum::Null);
            row.extend(columns.iter().map(value));
        }
        row
    })
}

/// The parameters of a group's statement.
pub(crate) fn params<B: Holds>(target: &Target, group: &Group<'_, B>) -> Vec<TextArray> {
    let (found, new) = wanted(target, &group.kind);
    let mut arrays: Vec<TextArray> = Vec::with_capacity(found.len() + new.len());
    let mut values = Vec::with_capacity(target.info.columns.len());
    for change in group.changes() {
        let images = Images::of(change);
        let mut at = 0;
        let mut put = |columns: &[usize], values: &[Datum<'_>]| {
            for &column in columns {
                let value = values.get(target.columns[column].source).copied().unwrap_or(Datum::Null);
                if arrays.len() == at {
                    arrays.push(array_for(group, value));
                }
                arrays[at].push(value);
                at += 1;
            }
        };
        if !found.is_empty() {
            fill(images.found_by(), &mut values);
            put(&found, &values);
        }
        if !new.is_empty() {
            if found.is_empty() || !images.is_one() {
                fill(images.after(), &mut values);
            }
            put(&new, &values);
        }
    }
    arrays
}

/// An array for a column of a group whose first value is this one: the others are often as long.
fn array_for<B: Holds>(group: &Group<'_, B>, first: Datum<'_>) -> TextArray {
    let len = if let Datum::Text(text) = first { text.len() } else { 0 };
    let rows = usize::try_from(group.rows()).unwrap_or_default();
    // All of them together are no longer than their images.
    TextArray::for_values(rows, len.saturating_mul(rows).min(group.bytes()))
}

/// The values of an image in one walk.
fn fill<'a>(image: Option<Image<'a>>, values: &mut Vec<Datum<'a>>) {
    values.clear();
    let Some(image) = image else { return };
    values.extend(image.main.iter());
    if let Some(fallback) = image.fallback {
        for (value, other) in values.iter_mut().zip(fallback.iter()) {
            if *value == Datum::Unchanged {
                *value = other;
            }
        }
    }
}

/// The rows of a group as `COPY` text.
pub(crate) fn copy_text<B: Holds>(target: &Target, group: &Group<'_, B>) -> Bytes {
    let mut out = BytesMut::new();
    let mut values = Vec::with_capacity(target.info.columns.len());
    for change in group.changes() {
        fill(Images::of(change).after(), &mut values);
        for (at, column) in target.columns.iter().enumerate() {
            if at > 0 {
                out.put_u8(b'\t');
            }
            copy_value(&mut out, values.get(column.source).copied().unwrap_or(Datum::Null));
        }
        out.put_u8(b'\n');
    }
    out.freeze()
}

#[cfg(test)]
mod tests;
