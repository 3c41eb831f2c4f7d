//! Where to divide a key range.
//!
//! An upstream says in which units a range can be cut (quantiles of its key, or what dispatchers saw of it), with
//! the traffic of each if that is known. Without units a range stays whole: a table without a primary key has none.

use heartbeatpb::TableSpan;
use replica::divides;

/// The most ranges that a table is divided into by its size.
pub const MAX_RANGES: usize = 1_000;

/// A piece of a range: comparable amounts of data on every upstream.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Unit {
    /// Its keys.
    pub span: TableSpan,
    /// Bytes per second written to it; 0 when that is not known.
    pub traffic: u64,
}

/// What the parts of a range are to have in common.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Method {
    /// As much traffic each.
    ByTraffic,
    /// As much data each.
    BySize,
}

/// How many ranges are wanted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BySize {
    /// So many.
    Count(usize),
    /// As many as are needed for so many units in each, if there are more units than the threshold; 0 never
    /// divides.
    Units {
        /// Units that may stay together.
        threshold: usize,
        /// Units in each range.
        per_range: usize,
    },
}

impl BySize {
    /// Into how many ranges so many units are divided; 1 when they stay together.
    #[must_use]
    pub fn ranges(self, units: usize) -> usize {
        match self {
            Self::Count(count) if units >= count => count,
            Self::Units { threshold, per_range } if threshold > 0 && units > threshold => {
                let per_range = per_range.max(1);
                if units / per_range > MAX_RANGES { MAX_RANGES } else { units.div_ceil(per_range) }
            }
            Self::Count(_) | Self::Units { .. } => 1,
        }
    }
}

/// Divides a range into ranges of as many units each, the larger portions first (scheduling §9.2). The range
/// itself is returned when it is not to be divided, or when the units are not exactly the range.
#[must_use]
pub fn by_size(span: &TableSpan, units: &[Unit], wanted: BySize) -> Vec<TableSpan> {
    let ranges = wanted.ranges(units.len());
    if ranges < 2 {
        return vec![span.clone()];
    }
    let (base, more) = (units.len() / ranges, units.len() % ranges);
    let ends = (1..=ranges).map(|n| n * base + n.min(more));
    cut(span, units, &ends.collect::<Vec<_>>())
}

/// Divides a range into about `count` ranges of as much traffic each (scheduling §9.3). A unit without traffic
/// weighs something too. The range itself is returned when it is not to be divided, or when the units are not
/// exactly the range.
#[must_use]
pub fn by_traffic(span: &TableSpan, units: &[Unit], count: usize) -> Vec<TableSpan> {
    let weight = |unit: &Unit| u128::from(unit.traffic) + 1;
    let mut rest_weight: u128 = units.iter().map(weight).sum();
    let Some(share) = rest_weight.checked_div(count as u128).filter(|_| count > 1) else {
        return vec![span.clone()];
    };
    let (mut rest, mut held, mut ends) = (count as u128, 0, Vec::new());
    for (n, unit) in units.iter().enumerate() {
        held += weight(unit);
        if rest == 1 {
            if rest_weight < share {
                break;
            }
            // More than was asked for, when what is left is worth it.
            rest = rest_weight.checked_div(share).unwrap_or(1);
        }
        if (units.len() - n) as u128 <= rest || held > share {
            ends.push(n + 1);
            rest = rest.saturating_sub(1);
            rest_weight = rest_weight.saturating_sub(held);
            held = 0;
        }
    }
    if ends.last() != Some(&units.len()) {
        ends.push(units.len());
    }
    cut(span, units, &ends)
}

/// The ranges that end after so many units each.
fn cut(span: &TableSpan, units: &[Unit], ends: &[usize]) -> Vec<TableSpan> {
    let starts = std::iter::once(0).chain(ends.iter().copied());
    let range = |(from, to): (usize, &usize)| {
        let (first, last) = (units.get(from)?, units.get(to.checked_sub(1)?)?);
        Some(TableSpan { start: first.span.start.clone(), end: last.span.end.clone(), ..span.clone() })
    };
    let ranges: Option<Vec<TableSpan>> = starts.zip(ends).map(range).collect();
    let exact = divides(span, units.iter().map(|unit| &unit.span));
    match ranges {
        Some(ranges) if exact && ranges.len() > 1 && divides(span, &ranges) => ranges,
        Some(_) | None => vec![span.clone()],
    }
}

#[cfg(test)]
mod tests {
    use heartbeatpb::TableId;

    use super::*;

    const TABLE: TableId = TableId(7);

    fn units(traffic: &[u64]) -> Vec<Unit> {
        let count = traffic.len();
        let key = |n: usize| if n == 0 || n == count { vec![] } else { (n as u32).to_be_bytes().to_vec() };
        let of = |(n, traffic): (usize, &u64)| Unit {
            span: TableSpan { start: key(n), end: key(n + 1), ..TableSpan::whole(TABLE) },
            traffic: *traffic,
        };
        traffic.iter().enumerate().map(of).collect()
    }

    /// How many units each range has, and their weight.
    fn sizes(units: &[Unit], ranges: &[TableSpan]) -> (Vec<usize>, Vec<u64>) {
        assert!(divides(&TableSpan::whole(TABLE), ranges), "no hole, no overlap, one table");
        let inside = |range: &TableSpan| -> Vec<u64> {
            let held = units.iter().filter(|unit| replica::contains(range, &unit.span));
            held.map(|unit| unit.traffic + 1).collect()
        };
        let of: Vec<Vec<u64>> = ranges.iter().map(inside).collect();
        (of.iter().map(Vec::len).collect(), of.iter().map(|range| range.iter().sum()).collect())
    }

    // behaviour: scheduling-121, scheduling-122
    #[test]
    fn units_are_spread_evenly_over_ranges() {
        let check = |count: usize, wanted| {
            let units = units(&vec![0; count]);
            sizes(&units, &by_size(&TableSpan::whole(TABLE), &units, wanted)).0
        };
        let of = |threshold, per_range| BySize::Units { threshold, per_range };
        assert_eq!(check(5, of(1, 1)), [1, 1, 1, 1, 1]);
        assert_eq!(check(5, of(1, 2)), [2, 2, 1]);
        assert_eq!(check(5, of(1, 3)), [3, 2]);
        assert_eq!(check(5, of(1, 4)), [3, 2]);
        assert_eq!(check(5, of(10, 2)), [5], "few enough to stay together");
        assert_eq!(check(5, of(0, 2)), [5], "never");
        assert_eq!(check(5, BySize::Count(2)), [3, 2]);
        assert_eq!(check(5, BySize::Count(6)), [5], "fewer units than ranges");
        let ranges: Vec<usize> = (1..=8).map(|per_range| check(1_000, of(1, per_range)).len()).collect();
        assert_eq!(ranges, [1000, 500, 334, 250, 200, 167, 143, 125]);
        assert_eq!(check(3_001, of(1, 1)).len(), MAX_RANGES);
    }

    // behaviour: scheduling-123
    #[test]
    fn units_that_are_not_exactly_the_range_divide_nothing() {
        let whole = TableSpan::whole(TABLE);
        let good = units(&[5, 5, 5, 5]);
        let mut gap = good.clone();
        gap.remove(1);
        let mut overlapping = good.clone();
        overlapping[1].span.end = overlapping[3].span.start.clone();
        let mut foreign = good.clone();
        foreign[0].span.table = TableId(8);
        for bad in [vec![], gap, overlapping, foreign, good[..3].to_vec()] {
            let unchanged = std::slice::from_ref(&whole);
            assert_eq!(by_size(&whole, &bad, BySize::Count(2)), unchanged);
            assert_eq!(by_traffic(&whole, &bad, 2), unchanged);
        }
        assert_eq!(by_traffic(&whole, &good, 0), [whole]);
    }

    // behaviour: scheduling-124
    #[test]
    fn traffic_is_spread_over_ranges() {
        let check = |traffic: &[u64], count| {
            let units = units(traffic);
            sizes(&units, &by_traffic(&TableSpan::whole(TABLE), &units, count))
        };
        let even = [100; 7];
        assert_eq!(check(&even, 1), (vec![7], vec![707]));
        assert_eq!(check(&even, 2), (vec![4, 3], vec![404, 303]));
        assert_eq!(check(&even, 3), (vec![3, 3, 1], vec![303, 303, 101]));
        for count in 7..=10 {
            assert_eq!(check(&even, count).0, [1; 7]);
        }
        assert_eq!(check(&[100, 1, 100, 1, 1, 1, 100], 4), (vec![1, 2, 3, 1], vec![101, 103, 6, 101]));
        assert_eq!(check(&[1000, 1, 1, 1, 100, 1, 99], 4).0, [1, 4, 1, 1]);
        assert_eq!(check(&[0; 7], 3), (vec![3, 3, 1], vec![3, 3, 1]));
        assert_eq!(check(&[0; 7], 7).0, [1; 7]);
        assert_eq!(check(&[2; 15_980], 5).1, [9591, 9591, 9591, 9591, 9576]);
    }

    // behaviour: scheduling-125
    #[test]
    fn any_heat_is_divided_in_the_end() {
        let heat: Vec<u64> = (0..1_000u64).map(|n| (n * 7_919) % 1_013 * u64::from(n % 3 == 0)).collect();
        let units = units(&heat);
        let (sizes, weights) = sizes(&units, &by_traffic(&TableSpan::whole(TABLE), &units, 100));
        assert_eq!(sizes.iter().sum::<usize>(), 1_000);
        let share = weights.iter().sum::<u64>() / 100;
        assert!(
            weights.iter().all(|weight| *weight <= share + 1_013),
            "no range has much more than its share"
        );
    }
}
