//! Where a span can be divided: keys at equal distances in a sample of its rows.

use event::KeyCodec;
use heartbeatpb::TableSpan;

/// Where a span can be divided, and how large it is, as far as an upstream knows.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct SplitPoints {
    /// Keys strictly inside the span, strictly increasing, at most one fewer than the pieces that were asked for. Fewer
    /// where not as many different keys are known, none for a table that cannot be divided. Row values: not for logs.
    pub keys: Vec<Vec<u8>>,
    /// About how many rows the span has; `None` when nothing is known.
    pub rows: Option<u64>,
    /// About how many bytes the span has upstream; `None` when nothing is known.
    pub bytes: Option<u64>,
}

/// Keys of rows of a whole table, and how large it is.
#[derive(Debug, Default)]
pub(crate) struct Sample {
    pub(crate) keys: Vec<Vec<u8>>,
    pub(crate) rows: Option<u64>,
    pub(crate) bytes: Option<u64>,
}

impl Sample {
    /// Adds a row by the values of its key; one that is none of the table's types is left out.
    pub(crate) fn add(&mut self, codec: &KeyCodec, values: &[&str]) {
        self.keys.extend(codec.encode_values(values));
    }

    /// Divides a span into `pieces` with as many rows of the sample each as possible.
    pub(crate) fn divide(mut self, span: &TableSpan, pieces: usize) -> SplitPoints {
        let all = self.keys.len() as u64;
        self.keys.retain(|key| span.contains_key(key));
        let own = self.keys.len() as u64;
        let share = |total: Option<u64>| match all {
            0 => total.filter(|_| span.is_whole()),
            all => total.map(|total| {
                u64::try_from(u128::from(total) * u128::from(own) / u128::from(all)).unwrap_or(u64::MAX)
            }),
        };
        let (rows, bytes) = (share(self.rows), share(self.bytes));
        self.keys.sort_unstable();
        let at = |piece: usize| self.keys.len() * piece / pieces.max(1);
        let mut keys: Vec<Vec<u8>> =
            (1..pieces).filter_map(|piece| self.keys.get(at(piece)).cloned()).collect();
        keys.dedup();
        keys.retain(|key| *key > span.start);
        SplitPoints { keys, rows, bytes }
    }
}

#[cfg(test)]
mod tests {
    use heartbeatpb::TableId;
    use proptest::prelude::*;

    use super::*;

    fn span(start: &[u8], end: &[u8]) -> TableSpan {
        TableSpan { start: start.to_vec(), end: end.to_vec(), ..TableSpan::whole(TableId(1)) }
    }

    fn sample(keys: &[u8]) -> Sample {
        Sample { keys: keys.iter().map(|key| vec![*key]).collect(), rows: Some(1000), bytes: Some(8000) }
    }

    #[test]
    fn a_span_is_divided_where_its_rows_are_and_knows_its_share() {
        let points = sample(&[10, 20, 30, 40, 50, 60, 70, 80]).divide(&span(&[], &[]), 4);
        assert_eq!(points.keys, [[30], [50], [70]]);
        assert_eq!((points.rows, points.bytes), (Some(1000), Some(8000)));
        let half = sample(&[10, 20, 30, 40, 50, 60, 70, 80]).divide(&span(&[50], &[]), 2);
        assert_eq!(half.keys, [[70]]);
        assert_eq!((half.rows, half.bytes), (Some(500), Some(4000)));
        let estimate = sample(&[10, 20]).divide(&span(&[], &[15]), 1);
        assert_eq!((estimate.keys.len(), estimate.rows), (0, Some(500)));
    }

    #[test]
    fn where_nothing_is_known_nothing_is_told() {
        assert_eq!(Sample::default().divide(&span(&[], &[]), 4), SplitPoints::default());
        let unread = Sample { keys: Vec::new(), rows: Some(7), bytes: None };
        assert_eq!(
            unread.divide(&span(&[], &[]), 4),
            SplitPoints { rows: Some(7), ..SplitPoints::default() }
        );
        let same = sample(&[5, 5, 5, 5]).divide(&span(&[5], &[]), 3);
        assert!(same.keys.is_empty(), "a bound is not inside");
    }

    proptest! {
        #[test]
        fn points_are_inside_and_in_order(
            keys in prop::collection::vec(any::<u8>(), 0..50),
            start in 0u8..200,
            end in 0u8..200,
            pieces in 0usize..10,
        ) {
            let (start, end) = (if start == 0 { vec![] } else { vec![start] }, if end <= start { vec![] } else { vec![end] });
            let span = span(&start, &end);
            let points = sample(&keys).divide(&span, pieces);
            prop_assert!(points.keys.len() < pieces.max(1));
            prop_assert!(points.keys.windows(2).all(|pair| pair[0] < pair[1]));
            prop_assert!(points.keys.iter().all(|key| *key > span.start && span.contains_key(key)));
        }
    }
}
