//! How fast both ends are read: [`Pace`] counts, pure, and [`Limit`] has the clock.
//!
//! A statement cannot be slowed once it runs. So each one is followed by a rest: an end is left alone until the rows that
//! were read have taken the time that they may.

use std::num::NonZeroU32;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::sql::End;

/// Between two looks at rows that change all the time, at least.
const SAMPLE: Duration = Duration::from_millis(2);

/// The rows of one end. Times are counted from the beginning of the comparison.
#[derive(Clone, Copy, Debug)]
struct Pace {
    rate: NonZeroU32,
    /// When the rows that were read have taken their time. Time that was not used is not made up for.
    free: Duration,
}

impl Pace {
    fn new(rate: NonZeroU32) -> Self {
        Self { rate, free: Duration::ZERO }
    }

    /// How long so many rows take at the limit; not a nanosecond less.
    fn time(&self, rows: u64) -> Duration {
        let rate = u64::from(self.rate.get());
        let part = (rows % rate * 1_000_000_000).div_ceil(rate);
        Duration::from_secs(rows / rate).saturating_add(Duration::from_nanos(part))
    }

    /// Rows were asked for.
    fn read(&mut self, at: Duration, rows: u64) {
        self.free = self.free.max(at).saturating_add(self.time(rows));
    }

    /// How long it is not to be read.
    fn rest(&self, now: Duration) -> Duration {
        self.free.saturating_sub(now)
    }
}

/// Most rows that are read at each end in a second, if anybody wants that.
pub(crate) struct Limit {
    rate: Option<NonZeroU32>,
    began: Instant,
    /// Of the source and of the target: rows of the source are looked at while others are read.
    paces: Option<Mutex<[Pace; 2]>>,
}

impl Limit {
    pub(crate) fn new(rows_per_second: Option<u32>) -> Self {
        let rate = rows_per_second.and_then(NonZeroU32::new);
        let paces = rate.map(|rate| Mutex::new([Pace::new(rate); 2]));
        Self { rate, began: Instant::now(), paces }
    }

    /// Rows of an end were asked for.
    pub(crate) fn read(&self, end: End, at: Instant, rows: u64) {
        if let Some(paces) = &self.paces {
            locked(paces)[end as usize].read(at.saturating_duration_since(self.began), rows);
        }
    }

    /// Leaves both ends alone until what was read has taken its time.
    pub(crate) async fn rest(&self) {
        let Some(paces) = &self.paces else { return };
        let rest = {
            let now = self.began.elapsed();
            let [source, target] = *locked(paces);
            source.rest(now).max(target.rest(now))
        };
        tokio::time::sleep(rest).await;
    }

    /// How long to wait before rows that change all the time are looked at again; `took` is what the last look took, which
    /// may be a scan of the table.
    pub(crate) fn between_looks(&self, rows: u64, took: Duration) -> Duration {
        let time = self.rate.map_or(Duration::ZERO, |rate| Pace::new(rate).time(rows));
        SAMPLE.max(time).max(took)
    }

    /// The size of a part that is read at once: no more than what a second allows.
    pub(crate) fn part_rows(&self, wanted: u32) -> u32 {
        wanted.min(self.rate.map_or(u32::MAX, NonZeroU32::get)).max(1)
    }
}

fn locked(paces: &Mutex<[Pace; 2]>) -> MutexGuard<'_, [Pace; 2]> {
    paces.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn pace(rate: u32) -> Pace {
        Pace::new(NonZeroU32::new(rate).unwrap())
    }

    #[test]
    fn rows_take_their_time_from_when_they_were_asked_for() {
        let mut pace = pace(100);
        assert_eq!(pace.rest(Duration::ZERO), Duration::ZERO);
        pace.read(SECOND, 250);
        assert_eq!(pace.rest(SECOND), SECOND * 5 / 2);
        assert_eq!(pace.rest(SECOND * 3), SECOND / 2, "the statement itself took two seconds");
        pace.read(SECOND * 3, 100);
        assert_eq!(
            pace.rest(SECOND * 3),
            SECOND * 3 / 2,
            "what was read without a rest is rested for together"
        );
        pace.read(SECOND * 100, 50);
        assert_eq!(pace.rest(SECOND * 100), SECOND / 2, "time that was not used is not made up for");
    }

    #[test]
    fn nothing_overflows_and_fractions_are_rounded_up() {
        assert_eq!(pace(3).time(1), Duration::from_nanos(333_333_334));
        assert_eq!(pace(u32::MAX).time(1), Duration::from_nanos(1));
        let mut slow = pace(1);
        for _ in 0..3 {
            slow.read(Duration::MAX, u64::MAX);
        }
        assert_eq!(slow.rest(Duration::ZERO), Duration::MAX);
    }

    #[test]
    fn looks_keep_to_the_limit_and_do_not_follow_each_other_closely() {
        let limit = |rate| Limit::new(rate);
        assert_eq!(limit(None).between_looks(100, Duration::ZERO), SAMPLE);
        assert_eq!(limit(Some(1000)).between_looks(1, Duration::ZERO), SAMPLE);
        assert_eq!(limit(Some(1000)).between_looks(100, Duration::ZERO), SECOND / 10);
        assert_eq!(limit(None).between_looks(1, SECOND), SECOND, "a look that is a scan");
    }

    #[test]
    fn a_part_is_what_a_second_allows() {
        let part = |rate| Limit::new(rate).part_rows(10_000);
        assert_eq!(
            [part(None), part(Some(0)), part(Some(7)), part(Some(20_000))],
            [10_000, 10_000, 7, 10_000]
        );
        assert_eq!(Limit::new(None).part_rows(0), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn both_ends_are_left_alone_until_the_slower_one_has_had_its_time() {
        let limit = Limit::new(Some(10));
        let began = Instant::now();
        limit.rest().await;
        assert_eq!(began.elapsed(), Duration::ZERO);
        limit.read(End::Source, began, 20);
        limit.read(End::Target, began, 50);
        tokio::time::sleep(SECOND).await;
        limit.rest().await;
        assert_eq!(began.elapsed(), SECOND * 5);
        limit.read(End::Source, Instant::now(), 10);
        limit.rest().await;
        limit.rest().await;
        assert_eq!(began.elapsed(), SECOND * 6);
        let none = Limit::new(None);
        none.read(End::Source, began, u64::MAX);
        none.rest().await;
        assert_eq!(began.elapsed(), SECOND * 6);
    }

    proptest! {
        /// VF-5: from any statement that began when nothing was owed, to the end of any later rest, no more rows are read than
        /// the limit allows, whatever the statements take and however often nobody rests between them; and a rest is no
        /// longer than that asks for.
        #[test]
        fn between_two_rests_the_limit_holds(
            rate in 1..5000_u32,
            steps in prop::collection::vec((0..3000_u64, 0..20_000_u64, 0..3000_u64, any::<bool>()), 1..40),
        ) {
            let mut pace = pace(rate);
            let mut now = Duration::ZERO;
            let mut begins: Vec<(Duration, u64)> = Vec::new();
            let mut rows = 0;
            for (idle, read, took, rests) in steps {
                now += Duration::from_millis(idle);
                if pace.rest(now).is_zero() {
                    begins.push((now, rows));
                }
                pace.read(now, read);
                rows += read;
                now += Duration::from_millis(took);
                let rest = pace.rest(now);
                if !rests {
                    continue;
                }
                now += rest;
                // In rows, times a billion.
                let counted = |before: u64| u128::from(rows - before) * 1_000_000_000;
                let allowed = |time: Duration| time.as_nanos() * u128::from(rate);
                for &(from, before) in &begins {
                    prop_assert!(counted(before) <= allowed(now - from), "{rows} rows in {now:?}");
                }
                // Each statement is rounded up by a nanosecond at most.
                let rounded = Duration::from_nanos(40);
                let is_tight = |&(from, before): &(Duration, u64)| {
                    allowed((now - from).saturating_sub(rounded)) <= counted(before)
                };
                prop_assert!(rest.is_zero() || begins.iter().any(is_tight), "{rest:?} was too long");
            }
        }
    }
}
