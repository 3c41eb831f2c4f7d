//! Positions in the upstream's commit order.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A position in commit order: opaque, 64 bits, strictly increasing per transaction
/// (PostgreSQL: the commit record's end LSN). Only order and `±1` have a meaning.
/// 0 means unset, `u64::MAX` "no constraint".
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Ts(pub u64);

impl Ts {
    /// Unset.
    pub const ZERO: Self = Self(0);
    /// No constraint.
    pub const MAX: Self = Self(u64::MAX);

    /// The position just before this one; 0 stays 0.
    #[must_use]
    pub const fn before(self) -> Self {
        Self(self.0.saturating_sub(1))
    }

    /// The position just after this one.
    #[must_use]
    pub const fn after(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Ts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Debug for Ts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Wall-clock time that travels beside a [`Ts`], in microseconds since the Unix epoch.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct WallTime(pub i64);

impl WallTime {
    /// The time of day on this node.
    #[must_use]
    pub fn now() -> Self {
        crate::surroundings::wall_time()
    }

    /// Milliseconds since the Unix epoch.
    #[must_use]
    pub const fn millis(self) -> i64 {
        self.0.div_euclid(1000)
    }

    /// Seconds from this time to `later`, negative when `later` is earlier.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a lag in seconds for people and gauges")]
    pub fn seconds_until(self, later: WallTime) -> f64 {
        (later.0 - self.0) as f64 / 1e6
    }
}
