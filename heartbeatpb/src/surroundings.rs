//! What a process takes from outside of itself: random numbers for ids, and the wall clock. Both come from here and
//! from nowhere else, so that a simulation of many nodes in one thread can put its own in their place and a
//! seed gives the same history each time.

use crate::WallTime;

/// 128 random bits.
pub(crate) fn random_pair() -> (u64, u64) {
    #[cfg(feature = "test-util")]
    if let Some(pair) = simulated::random_pair() {
        return pair;
    }
    uuid::Uuid::new_v4().as_u64_pair()
}

/// The time of day.
pub(crate) fn wall_time() -> WallTime {
    #[cfg(feature = "test-util")]
    if let Some(time) = simulated::wall_time() {
        return time;
    }
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    WallTime(i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
}

/// Surroundings that a test makes for the nodes that it runs in its own thread.
#[cfg(feature = "test-util")]
pub mod simulated {
    use std::cell::RefCell;

    use crate::WallTime;

    /// What a simulated node finds around itself.
    #[derive(Debug)]
    struct Simulated {
        /// State of a splitmix64 generator.
        random: u64,
        wall: WallTime,
    }

    thread_local! {
        static CURRENT: RefCell<Option<Simulated>> = const { RefCell::new(None) };
    }

    /// From now on this thread draws its random numbers from `seed`, and its clock stands at `wall`.
    pub fn enter(seed: u64, wall: WallTime) {
        CURRENT.set(Some(Simulated { random: seed, wall }));
    }

    /// Sets the clock of this thread; does nothing outside of a simulation.
    pub fn set_wall(wall: WallTime) {
        CURRENT.with_borrow_mut(|current| {
            if let Some(current) = current {
                current.wall = wall;
            }
        });
    }

    /// This thread is in the real world again.
    pub fn leave() {
        CURRENT.set(None);
    }

    pub(super) fn random_pair() -> Option<(u64, u64)> {
        CURRENT.with_borrow_mut(|current| {
            let state = &mut current.as_mut()?.random;
            Some((splitmix(state), splitmix(state)))
        })
    }

    pub(super) fn wall_time() -> Option<WallTime> {
        CURRENT.with_borrow(|current| current.as_ref().map(|simulated| simulated.wall))
    }

    /// Sebastiano Vigna's splitmix64.
    fn splitmix(state: &mut u64) -> u64 {
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = *state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    #[cfg(test)]
    mod tests {
        use super::*;
        use crate::DispatcherId;

        #[test]
        fn a_seed_gives_the_same_ids_and_the_clock_stands_where_it_was_set() {
            let ids = |seed| {
                enter(seed, WallTime(7));
                let ids = [DispatcherId::random(), DispatcherId::random()];
                assert_eq!(WallTime::now(), WallTime(7));
                set_wall(WallTime(9));
                assert_eq!(WallTime::now(), WallTime(9));
                leave();
                ids
            };
            assert_eq!(ids(1), ids(1));
            assert_ne!(ids(1), ids(2));
            assert_ne!(ids(1)[0], ids(1)[1]);
            assert!(WallTime::now() > WallTime(9), "the real clock again");
        }
    }
}
