//! The smallest of many values that come, change and go.

use std::collections::BTreeMap;

/// Values counted by how many hold them: the smallest is read in O(1) amortised, changed in O(log n).
#[derive(Clone, Debug, Default)]
pub struct MinSet<T: Ord> {
    counts: BTreeMap<T, usize>,
}

impl<T: Ord + Copy> MinSet<T> {
    /// An empty set.
    #[must_use]
    pub fn new() -> Self {
        Self { counts: BTreeMap::new() }
    }

    /// Adds one holder of `value`.
    pub fn insert(&mut self, value: T) {
        *self.counts.entry(value).or_insert(0) += 1;
    }

    /// Removes one holder of `value`.
    ///
    /// # Panics
    /// When nobody holds it: the owner lost count.
    pub fn remove(&mut self, value: T) {
        let count = self.counts.get_mut(&value).expect("only held values are removed");
        *count -= 1;
        if *count == 0 {
            self.counts.remove(&value);
        }
    }

    /// The smallest value that is held.
    #[must_use]
    pub fn min(&self) -> Option<T> {
        self.counts.first_key_value().map(|(value, _)| *value)
    }

    /// Whether nothing is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.counts.is_empty()
    }
}
