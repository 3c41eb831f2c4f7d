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
            // Bounds are keys of rows, which belong into no log: a hash tells them apart.
            write!(f, "t{}[{}..{})", self.table, mark(&self.start), mark(&self.end))
        }
    }
}

/// Something to recognise a bound by; nothing for an open end.
fn mark(bound: &[u8]) -> String {
    if bound.is_empty() {
        return String::new();
    }
    // FNV-1a, 32 bits.
    let hash =
        bound.iter().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193));
    format!("#{hash:08x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(keyspace_id: u32, table: i64, start: &[u8], end: &[u8]) -> TableSpan {
        TableSpan { keyspace_id, table: TableId(table), start: start.to_vec(), end: end.to_vec() }
    }

    // behaviour: messaging-14
    #[test]
    fn spans_order_by_keyspace_table_start_and_end() {
        let ordered = [
            span(0, 1, b"", b"a"),
            span(0, 1, b"a", b"b"),
            span(0, 1, b"a", b"c"),
            span(0, 1, b"ab", b"c"),
            span(0, 2, b"", b"a"),
            span(1, 1, b"", b"a"),
        ];
        assert!(ordered.is_sorted());
        assert!(ordered.windows(2).all(|pair| pair[0] < pair[1]));
    }

    #[test]
    fn a_span_is_followed_by_the_one_that_starts_at_its_end() {
        let first = span(0, 1, b"", b"m");
        assert!(first.is_followed_by(&span(0, 1, b"m", b"")));
        assert!(!first.is_followed_by(&span(0, 1, b"n", b"")), "a hole");
        assert!(!first.is_followed_by(&span(0, 2, b"m", b"")), "another table");
        assert!(!first.is_followed_by(&span(1, 1, b"m", b"")), "another tenant");
        assert!(!span(0, 1, b"m", b"").is_followed_by(&first), "nothing follows the last span");
    }

    #[test]
    fn a_shown_span_tells_its_bounds_apart_and_does_not_tell_them() {
        let shown = format!("{:?}", span(0, 1, b"secret", b""));
        assert!(shown.starts_with("t1[#") && shown.ends_with("..)") && !shown.contains("736563"), "{shown}");
        assert_ne!(shown, format!("{:?}", span(0, 1, b"secreu", b"")));
        assert_eq!(format!("{:?}", TableSpan::whole(TableId(7))), "t7");
    }

    #[test]
    fn the_start_is_in_a_span_and_the_end_is_not() {
        let middle = span(0, 1, b"b", b"d");
        assert!(middle.contains_key(b"b") && middle.contains_key(b"c\xff"));
        assert!(!middle.contains_key(b"a") && !middle.contains_key(b"d"));
        assert!(TableSpan::whole(TableId(1)).contains_key(b""));
    }
}
