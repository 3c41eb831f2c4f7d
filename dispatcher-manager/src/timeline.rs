//! Wall times of positions, learned from resolved events: for lag gauges and checkpoint markers.

use std::collections::VecDeque;

use heartbeatpb::{Ts, WallTime};

/// Positions closer in time than this are one entry.
const SPACING_MICROS: i64 = 50_000;
/// Entries kept. When full, every second one of the older half goes: old times become coarser, never wrong by
/// more than the gap that is left.
const CAPACITY: usize = 2048;

/// Pairs of position and wall time in order of both.
#[derive(Debug, Default)]
pub(crate) struct Timeline {
    entries: VecDeque<(Ts, WallTime)>,
}

impl Timeline {
    /// Everything up to `ts` had happened at `time`. A reader that has just started knows no time and says zero.
    pub(crate) fn note(&mut self, ts: Ts, time: WallTime) {
        if time == WallTime::default() {
            return;
        }
        if let Some(&(last_ts, last_time)) = self.entries.back()
            && (ts <= last_ts || time.0 < last_time.0.saturating_add(SPACING_MICROS))
        {
            return;
        }
        if self.entries.len() == CAPACITY {
            let mut at = 0;
            self.entries.retain(|_| {
                at += 1;
                at > CAPACITY / 2 || at % 2 == 1
            });
        }
        self.entries.push_back((ts, time));
    }

    /// Time of the newest known position at or before `ts`.
    pub(crate) fn time_of(&self, ts: Ts) -> Option<WallTime> {
        let after = self.entries.partition_point(|(at, _)| *at <= ts);
        after.checked_sub(1).map(|index| self.entries[index].1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_known_position_gives_the_time() {
        let mut times = Timeline::default();
        assert_eq!(times.time_of(Ts(5)), None);
        times.note(Ts(5), WallTime(0));
        assert_eq!(times.time_of(Ts(5)), None, "a lag of half a century helps nobody");
        times.note(Ts(10), WallTime(1_000_000));
        times.note(Ts(11), WallTime(1_000_001));
        times.note(Ts(20), WallTime(2_000_000));
        assert_eq!(times.time_of(Ts(9)), None);
        assert_eq!(times.time_of(Ts(15)), Some(WallTime(1_000_000)));
        assert_eq!(times.time_of(Ts(99)), Some(WallTime(2_000_000)));
    }

    #[test]
    fn it_stays_bounded_and_keeps_both_ends() {
        let mut times = Timeline::default();
        for i in 1..100_000u64 {
            times.note(Ts(i), WallTime(i64::try_from(i).expect("small") * SPACING_MICROS));
        }
        assert!(times.entries.len() <= CAPACITY);
        assert_eq!(times.time_of(Ts(1)), Some(WallTime(SPACING_MICROS)));
        assert_eq!(times.time_of(Ts(99_999)), Some(WallTime(99_999 * SPACING_MICROS)));
    }
}
