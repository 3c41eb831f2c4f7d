//! Positions that can be confirmed to the server: ends of transactions, never a position inside a record.

use std::collections::VecDeque;

/// Ends closer together than this are thinned out: confirming an earlier one only makes the server keep, and
/// repeat after a reconnect, so much more.
const SPACING: u64 = 64 << 10;

/// Ends of transactions, and positions of keep-alives, that were received and are not confirmed yet.
///
/// A checkpoint may be any number, for example one less than the end of the oldest transaction that is not
/// downstream. The server skips every transaction whose commit record begins before the position that it is given, so
/// a position inside a commit record would lose the transaction. Only an end that was received is safe.
#[derive(Debug, Default)]
pub(crate) struct Bounds {
    /// Ascending; all but the last two are at least [`SPACING`] apart.
    ends: VecDeque<u64>,
    confirmed: Option<u64>,
}

impl Bounds {
    /// Everything that ends at or before `end` was received. Ends that were seen before change nothing.
    pub(crate) fn received(&mut self, end: u64) {
        if self.ends.back().copied().or(self.confirmed).is_some_and(|last| end <= last) {
            return;
        }
        if let Some(before_last) = self.ends.len().checked_sub(2).map(|at| self.ends[at])
            && end - before_last < SPACING
        {
            self.ends.pop_back();
        }
        self.ends.push_back(end);
    }

    /// The newest end at or before a checkpoint; it is what the server is told. `None`: not known on this
    /// connection, and what the server was told before stands.
    pub(crate) fn confirm(&mut self, checkpoint: u64) -> Option<u64> {
        while let Some(end) = self.ends.front().copied().filter(|end| *end <= checkpoint) {
            self.confirmed = Some(end);
            self.ends.pop_front();
        }
        self.confirmed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_inside_a_transaction_confirms_the_one_before() {
        let mut bounds = Bounds::default();
        assert_eq!(bounds.confirm(1000), None);
        for end in [100_000, 200_000, 300_000] {
            bounds.received(end);
        }
        assert_eq!(bounds.confirm(199_999), Some(100_000));
        assert_eq!(bounds.confirm(200_000), Some(200_000));
        assert_eq!(bounds.confirm(150_000), Some(200_000), "it never goes back");
        bounds.received(150_000);
        assert_eq!(bounds.confirm(u64::MAX), Some(300_000), "what is repeated changes nothing");
        bounds.received(300_000);
        assert!(bounds.ends.is_empty());
    }

    #[test]
    fn ends_are_thinned_out_and_the_newest_is_kept() {
        let mut bounds = Bounds::default();
        for end in 1..=100_000_u64 {
            bounds.received(end * 100);
        }
        assert!(bounds.ends.len() as u64 <= 10_000_000 / SPACING + 2, "{}", bounds.ends.len());
        let safe = bounds.confirm(5_000_000).unwrap();
        assert!(safe % 100 == 0 && safe <= 5_000_000 && safe > 5_000_000 - 2 * SPACING);
        assert_eq!(bounds.confirm(10_000_000), Some(10_000_000), "an idle server is told everything");
    }
}
