//! The images of one change, looked up once, and what a plan asks about them; nothing is allocated.

use event::{Datum, Tuple};

use super::super::route::{Change, Holds, Image};
use super::super::target::Target;

/// The images before and after a change.
#[derive(Clone, Copy)]
pub(super) struct Images<'a> {
    pub(super) old: Option<Tuple<'a>>,
    pub(super) new: Option<Tuple<'a>>,
}

impl<'a> Images<'a> {
    pub(super) fn of<B: Holds>(change: &'a Change<B>) -> Self {
        Self { old: change.old_image(), new: change.new_image() }
    }

    /// The image in which the change finds its row.
    pub(super) fn found_by(self) -> Option<Image<'a>> {
        Some(Image { main: self.old.or(self.new)?, fallback: self.old.and(self.new) })
    }

    /// The new image, with the old one standing in for what was not sent.
    pub(super) fn after(self) -> Option<Image<'a>> {
        Some(Image { main: self.new?, fallback: self.old })
    }

    /// The values by which the change finds its row.
    pub(super) fn key(self, target: &Target) -> impl Iterator<Item = Datum<'a>> {
        let image = self.found_by();
        let value =
            move |&at: &usize| image.map_or(Datum::Unchanged, |image| image.get(target.columns[at].source));
        target.key.iter().map(value)
    }

    /// Whether the old image holds a value of the column that the new one replaces.
    pub(super) fn value_changes(self, source: usize) -> bool {
        let (Some(old), Some(after)) = (self.old, self.after()) else { return false };
        old.get(source).is_some_and(|old| old != Datum::Unchanged && old != after.get(source))
    }

    /// Whether the row is found by another key after the change than before.
    pub(super) fn key_changes(self, target: &Target) -> bool {
        // Most changes come without an old image, since it has the same key.
        self.old.is_some() && target.key.iter().any(|&at| self.value_changes(target.columns[at].source))
    }

    /// Whether every column that the sink writes has a value in the new image.
    pub(super) fn is_complete(self, target: &Target) -> bool {
        let Some(after) = self.after() else { return false };
        // One walk says it of most rows; only where something is missing it matters what.
        if after.main.len() >= target.info.columns.len()
            && !after.main.iter().any(|value| matches!(value, Datum::Unchanged))
        {
            return true;
        }
        target.columns.iter().all(|column| after.get(column.source) != Datum::Unchanged)
    }

    /// Whether the image that finds the row is also the one after the change.
    pub(super) fn is_one(self) -> bool {
        self.old.is_none()
    }
}
