//! Whether the spans of a table cover its whole key range, once.

use heartbeatpb::{TableId, TableSpan};

/// What is wrong with the spans of a table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Coverage {
    /// Every key belongs to exactly one span.
    Complete,
    /// Some keys belong to none.
    Hole,
    /// Some keys belong to several.
    Overlap,
}

/// Checks the spans of one table.
#[must_use]
pub fn check_coverage(table: TableId, spans: &[TableSpan]) -> Coverage {
    let mut sorted: Vec<&TableSpan> = spans.iter().filter(|span| span.table == table).collect();
    sorted.sort_unstable_by(|a, b| a.start.cmp(&b.start));
    let Some(first) = sorted.first() else { return Coverage::Hole };
    if !first.start.is_empty() {
        return Coverage::Hole;
    }
    for pair in sorted.windows(2) {
        let (left, right) = (pair[0], pair[1]);
        if left.end.is_empty() || left.end > right.start {
            return Coverage::Overlap;
        }
        if left.end < right.start {
            return Coverage::Hole;
        }
    }
    if sorted.last().is_some_and(|last| last.end.is_empty()) { Coverage::Complete } else { Coverage::Hole }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(start: &[u8], end: &[u8]) -> TableSpan {
        TableSpan { keyspace_id: 0, table: TableId(1), start: start.to_vec(), end: end.to_vec() }
    }

    #[test]
    fn holes_and_overlaps_are_found() {
        let check = |spans: &[TableSpan]| check_coverage(TableId(1), spans);
        assert_eq!(check(&[TableSpan::whole(TableId(1))]), Coverage::Complete);
        assert_eq!(check(&[span(b"m", b""), span(b"", b"m")]), Coverage::Complete);
        assert_eq!(check(&[]), Coverage::Hole);
        assert_eq!(check(&[span(b"", b"m")]), Coverage::Hole);
        assert_eq!(check(&[span(b"", b"k"), span(b"m", b"")]), Coverage::Hole);
        assert_eq!(check(&[span(b"", b"n"), span(b"m", b"")]), Coverage::Overlap);
        assert_eq!(check(&[span(b"", b""), span(b"m", b"")]), Coverage::Overlap);
    }
}
