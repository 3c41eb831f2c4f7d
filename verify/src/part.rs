//! A piece of a table that is compared as one.

/// The texts of a row's key, or the hash of a row without one.
pub(crate) type RowId = Vec<String>;

/// A piece of a table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Part {
    /// The rows with `after < key <= upto`; where a bound is missing, all rows on that side.
    Range {
        /// Exclusive.
        after: Option<RowId>,
        /// Inclusive.
        upto: Option<RowId>,
    },
    /// The rows whose hash falls into some of so many buckets.
    Buckets {
        /// How many there are.
        of: u32,
        /// Which of them.
        which: Vec<u32>,
    },
}

/// Number and checksum of the rows of a part.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Sums {
    pub(crate) rows: u64,
    pub(crate) halves: [String; 2],
}

impl Sums {
    /// Of a part without rows.
    pub(crate) fn empty() -> Self {
        Self { rows: 0, halves: ["0".to_owned(), "0".to_owned()] }
    }
}
