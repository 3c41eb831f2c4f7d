//! Key ranges of tables.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::TableId;

/// The key range `[start, end)` of one table, in the order-preserving encoding of its primary key.
///
/// An empty `start` is before every key, an empty `end` is after every key; a whole table has both empty.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TableSpan {
    /// Tenant; 0 is the default one.
    pub keyspace_id: u32,
    /// The table; [`TableId::DDL`] for the table trigger's span.
    pub table: TableId,
    /// First key, inclusive.
    pub start: Vec<u8>,
    /// End key, exclusive.
    pub end: Vec<u8>,
}

impl TableSpan {
    /// The span of a whole table.
    #[must_use]
    pub fn whole(table: TableId) -> Self {
        Self { keyspace_id: 0, table, start: Vec::new(), end: Vec::new() }
    }

    /// The span of the table trigger dispatcher.
    #[must_use]
    pub fn ddl() -> Self {
        Self::whole(TableId::DDL)
    }

    /// Whether the span covers its whole table.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.start.is_empty() && self.end.is_empty()
    }

    /// Whether `key` lies in the range.
    #[must_use]
    pub fn contains_key(&self, key: &[u8]) -> bool {
        key >= self.start.as_slice() && (self.end.is_empty() || key < self.end.as_slice())
    }

    /// Whether `next` begins where this span ends, in the same table.
    #[must_use]
    pub fn is_followed_by(&self, next: &Self) -> bool {
        self.keyspace_id == next.keyspace_id
            && self.table == next.table
            && !self.end.is_empty()
            && self.end == next.start
    }
}

impl fmt::Debug for TableSpan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_whole() {
            write!(f, "t{}", self.table)
        } else {
            write!(f, "t{}[", self.table)?;
            self.start.iter().try_for_each(|b| write!(f, "{b:02x}"))?;
            write!(f, "..")?;
            self.end.iter().try_for_each(|b| write!(f, "{b:02x}"))?;
            write!(f, ")")
        }
    }
}
