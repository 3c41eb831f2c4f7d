//! `[verify]`: how both ends of a changefeed are compared without being asked.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{ConfigError, HumanDuration, SinkKind};

/// Shortest pause between two comparisons.
const LEAST_INTERVAL: Duration = Duration::from_secs(10);

/// `[verify]`: both ends are compared again and again, slowly.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct VerifyConfig {
    /// Pause between the end of a comparison and the beginning of the next. Zero: only when somebody asks.
    pub interval: HumanDuration,
    /// Most rows that are read at each end in a second.
    pub rows_per_second: u32,
}

impl Default for VerifyConfig {
    fn default() -> Self {
        Self { interval: HumanDuration::from_secs(0), rows_per_second: 1000 }
    }
}

impl VerifyConfig {
    pub(super) fn validate(&self, kind: SinkKind) -> Result<(), ConfigError> {
        let invalid = |key: &str, what: &str| Err(ConfigError::invalid(key, what));
        if self.rows_per_second == 0 {
            return invalid("verify.rows-per-second", "must be at least 1");
        }
        if self.interval.0.is_zero() {
            return Ok(());
        }
        if self.interval.0 < LEAST_INTERVAL {
            return invalid("verify.interval", "must be 10s or longer, or 0s to compare only when asked");
        }
        if kind != SinkKind::Postgres {
            return invalid(
                "verify.interval",
                "only two PostgreSQL databases can be compared, and the sink is something else",
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ReplicaConfig;

    #[test]
    fn comparisons_need_two_databases_a_pause_and_a_rate() {
        let check = |interval, rows_per_second, sink: &str| {
            let verify = VerifyConfig { interval: HumanDuration::from_secs(interval), rows_per_second };
            let mut config = ReplicaConfig { verify, ..ReplicaConfig::default() };
            config.validate_and_adjust(sink).map(|_| ()).map_err(|error| error.to_string())
        };
        for (interval, rows, sink, key) in [
            (9, 1, "postgres://h/d", "verify.interval"),
            (60, 0, "postgres://h/d", "verify.rows-per-second"),
            (60, 1, "blackhole://", "verify.interval"),
        ] {
            let error = check(interval, rows, sink).unwrap_err();
            assert!(error.contains(key), "{error}");
        }
        check(60, 1, "postgres://h/d").unwrap();
        check(0, 1, "blackhole://").unwrap();
    }
}
