//! Whether key ranges cover a table, and which keys nobody covers.

use std::collections::BTreeMap;

use heartbeatpb::{TableId, TableSpan};

/// An end key that orders after every other: the end of the table is written as an empty key.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum End {
    Before(Vec<u8>),
    OfTable,
}

impl End {
    fn of(key: &[u8]) -> Self {
        if key.is_empty() { Self::OfTable } else { Self::Before(key.to_vec()) }
    }
}

/// The parts of a table that ranges were added for. Any order, duplicates and overlaps are fine; ranges that
/// touch join, so the cost of adding is that of a look-up plus what it swallows.
#[derive(Clone, Debug, Default)]
pub struct RangeCover {
    ranges: BTreeMap<Vec<u8>, End>,
}

impl RangeCover {
    /// Adds a range; an empty `end` is the end of the table. A range that ends before it starts adds nothing.
    pub fn add(&mut self, start: &[u8], end: &[u8]) {
        let mut end = End::of(end);
        if let End::Before(key) = &end
            && key.as_slice() <= start
        {
            return;
        }
        let mut first = start.to_vec();
        if let Some((before, reach)) = self.ranges.range(..=first.clone()).next_back()
            && reaches(reach, &first)
        {
            end = end.max(reach.clone());
            first.clone_from(before);
        }
        loop {
            let next = self.ranges.range(first.clone()..).next();
            let Some((swallowed, reach)) = next.filter(|(start, _)| reaches(&end, start)) else { break };
            end = end.max(reach.clone());
            let swallowed = swallowed.clone();
            self.ranges.remove(&swallowed);
        }
        self.ranges.insert(first, end);
    }

    /// Whether the whole table is covered.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.ranges.first_key_value().is_some_and(|(start, end)| start.is_empty() && *end == End::OfTable)
    }
}

/// Whether something that ends at `end` touches what starts at `start`.
fn reaches(end: &End, start: &[u8]) -> bool {
    match end {
        End::OfTable => true,
        End::Before(key) => key.as_slice() >= start,
    }
}

/// The ranges of a table that none of the spans covers, in order. Overlaps make no hole; spans of other tables
/// do not count.
#[must_use]
pub fn holes<'a>(table: TableId, spans: impl IntoIterator<Item = &'a TableSpan>) -> Vec<TableSpan> {
    let mut cover = RangeCover::default();
    for span in spans.into_iter().filter(|span| span.table == table) {
        cover.add(&span.start, &span.end);
    }
    let hole = |start: Vec<u8>, end: Vec<u8>| TableSpan { keyspace_id: 0, table, start, end };
    let mut holes = Vec::new();
    let mut covered = Some(Vec::new());
    for (start, end) in cover.ranges {
        // Joined ranges do not touch, so each one but the first leaves a hole before it.
        if let Some(covered) = covered.take()
            && covered != start
        {
            holes.push(hole(covered, start));
        }
        covered = match end {
            End::Before(key) => Some(key),
            End::OfTable => None,
        };
    }
    if let Some(covered) = covered {
        holes.push(hole(covered, Vec::new()));
    }
    holes
}

/// Whether two ranges of one table share a key.
#[must_use]
pub fn overlap(a: &TableSpan, b: &TableSpan) -> bool {
    let before = |left: &TableSpan, right: &TableSpan| !left.end.is_empty() && left.end <= right.start;
    a.table == b.table && a.keyspace_id == b.keyspace_id && !before(a, b) && !before(b, a)
}

/// Whether `outer` holds every key of `inner`.
#[must_use]
pub fn contains(outer: &TableSpan, inner: &TableSpan) -> bool {
    outer.table == inner.table
        && outer.keyspace_id == inner.keyspace_id
        && outer.start <= inner.start
        && End::of(&inner.end) <= End::of(&outer.end)
}

/// Whether `parts` are, in order and without hole or overlap, exactly the keys of `whole`, and none is empty.
#[must_use]
pub fn divides<'a>(whole: &TableSpan, parts: impl IntoIterator<Item = &'a TableSpan>) -> bool {
    let mut reached = Some(whole.start.as_slice());
    for part in parts {
        let next = part.table == whole.table
            && part.keyspace_id == whole.keyspace_id
            && reached == Some(part.start.as_slice())
            && (part.end.is_empty() || part.start < part.end);
        if !next {
            return false;
        }
        // After the end of the table nothing follows.
        reached = (!part.end.is_empty()).then_some(part.end.as_slice());
    }
    match reached {
        None => whole.end.is_empty(),
        Some(reached) => !whole.end.is_empty() && reached == whole.end.as_slice(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn span(start: &str, end: &str) -> TableSpan {
        TableSpan { keyspace_id: 0, table: TableId(1), start: start.into(), end: end.into() }
    }

    fn text(spans: &[TableSpan]) -> String {
        let of = |key: &[u8]| String::from_utf8_lossy(key).into_owned();
        spans.iter().map(|s| format!("{}-{}", of(&s.start), of(&s.end))).collect::<Vec<_>>().join(" ")
    }

    // behaviour: scheduling-129, maintainer-65
    #[test]
    fn holes_are_what_no_span_covers() {
        let check = |spans: &[TableSpan]| text(&holes(TableId(1), spans));
        assert_eq!(check(&[TableSpan::whole(TableId(1))]), "");
        assert_eq!(check(&[span("m", ""), span("", "m")]), "");
        assert_eq!(check(&[]), "-", "everything");
        assert_eq!(check(&[TableSpan::whole(TableId(2))]), "-", "another table");
        assert_eq!(check(&[span("", "m")]), "m-", "tail");
        assert_eq!(check(&[span("m", "")]), "-m", "head");
        assert_eq!(check(&[span("", "b"), span("c", "d"), span("e", "")]), "b-c d-e");
        assert_eq!(check(&[span("", "n"), span("m", ""), span("", "")]), "", "overlaps");
        assert_eq!(check(&[span("b", "c"), span("b", "d")]), "-b d-", "one start, two ends");
    }

    // behaviour: scheduling-9, scheduling-10
    #[test]
    fn ranges_are_ordered_by_keyspace_table_start_and_end_and_touching_ones_share_nothing() {
        let other = |keyspace_id, table| TableSpan { keyspace_id, table: TableId(table), ..span("a", "b") };
        let ordered = [other(0, 1), other(0, 2), other(1, 1)];
        assert!(ordered.is_sorted() && span("a", "b") < span("a", "c") && span("a", "c") < span("b", "a"));
        assert_eq!(span("a", "b").cmp(&span("a", "b")), std::cmp::Ordering::Equal);
        for (a, b, shared) in [
            (span("a", "m"), span("m", "z"), false),
            (span("", "b"), span("a", ""), true),
            (span("", ""), span("x", "y"), true),
            (span("", "a"), span("b", ""), false),
        ] {
            assert_eq!((overlap(&a, &b), overlap(&b, &a)), (shared, shared));
        }
        assert!(contains(&span("", ""), &span("a", "")) && !contains(&span("", "z"), &span("a", "")));
    }

    // behaviour: scheduling-74
    #[test]
    fn parts_divide_a_range_when_they_are_exactly_it_in_order() {
        let whole = span("", "");
        let check = |of: &TableSpan, parts: &[TableSpan]| divides(of, parts);
        assert!(check(&whole, &[span("", "m"), span("m", "")]));
        assert!(check(&span("a", "m"), &[span("a", "b"), span("b", "m")]));
        assert!(!check(&whole, &[]), "nothing");
        assert!(!check(&whole, &[span("m", ""), span("", "m")]), "order");
        assert!(!check(&whole, &[span("", "m"), span("n", "")]), "hole");
        assert!(!check(&whole, &[span("", "n"), span("m", "")]), "overlap");
        assert!(!check(&whole, &[span("", "m")]), "tail");
        assert!(!check(&whole, &[span("", "m"), span("m", "m"), span("m", "")]), "an empty part");
        assert!(!check(&whole, &[span("", ""), span("", "")]), "twice");
        assert!(!check(&span("a", "m"), &[span("a", "z")]), "too far");
    }

    // behaviour: scheduling-87
    #[test]
    fn ten_thousand_parts_follow_each_other_and_cover_their_table() {
        let key = |n: u32| if n == 0 || n == 10_000 { vec![] } else { n.to_be_bytes().to_vec() };
        let part = |n| TableSpan { start: key(n), end: key(n + 1), ..span("", "") };
        let parts: Vec<TableSpan> = (0..10_000).map(part).collect();
        assert!(divides(&span("", ""), &parts) && parts.is_sorted());
        assert!(parts.windows(2).all(|pair| pair[0].is_followed_by(&pair[1])));
        assert_eq!(holes(TableId(1), parts.iter().filter(|part| **part != parts[77])), [parts[77].clone()]);
    }

    // behaviour: scheduling-127, scheduling-128
    #[test]
    fn pieces_in_any_order_cover_a_table_once_the_last_one_is_there() {
        let mut cover = RangeCover::default();
        for (start, end) in [("m", "p"), ("a", "m"), ("a", "m"), ("c", "o"), ("p", "")] {
            cover.add(start.as_bytes(), end.as_bytes());
            assert!(!cover.is_full());
        }
        cover.add(b"x", b"b");
        assert!(!cover.is_full(), "a range that ends before it starts");
        cover.add(b"", b"a");
        assert!(cover.is_full());
    }

    proptest! {
        #[test]
        fn covers_and_holes_agree_with_counting_keys(
            ranges in prop::collection::vec((0u8..12, 0u8..13), 0..12)
        ) {
            let key = |n: u8| if n == 0 { vec![] } else { vec![n] };
            let end = |n: u8| if n == 12 { vec![] } else { vec![n] };
            let spans: Vec<TableSpan> = ranges
                .iter()
                .filter(|(start, end)| start < end)
                .map(|(s, e)| TableSpan { keyspace_id: 0, table: TableId(1), start: key(*s), end: end(*e) })
                .collect();
            let covered = |n: u8| spans.iter().any(|span| span.contains_key(&[n]));
            let gaps = holes(TableId(1), &spans);
            for n in 1..20 {
                let in_gap = gaps.iter().filter(|gap| gap.contains_key(&[n])).count();
                prop_assert_eq!(in_gap, usize::from(!covered(n)));
            }
            let mut cover = RangeCover::default();
            spans.iter().for_each(|span| cover.add(&span.start, &span.end));
            prop_assert_eq!(cover.is_full(), gaps.is_empty());
            for pair in spans.windows(2) {
                let shared = (0..20).any(|n| pair.iter().all(|span| span.contains_key(&[n])));
                prop_assert!(!shared || overlap(&pair[0], &pair[1]));
            }
        }
    }
}
