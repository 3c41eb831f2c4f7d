//! Whether everything that the upstream has is downstream (api-cli-config §8.6).

use axum::Json;
use axum::extract::{Path, State};
use axum::http::HeaderMap;
use heartbeatpb::WallTime;
use serde_json::json;

use super::{Answer, find};
use crate::http::models::time_text;
use crate::http::{Shared, facts};

/// Whether everything that the upstream has is downstream (§8.6).
pub(in crate::http) async fn synced(
    State(state): State<Shared>,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Answer {
    let feed = find(&state, &name).await?;
    let facts = facts::of(&state, &feed, &headers).await;
    let config = &feed.info.config.synced_status;
    let known = Known {
        now: WallTime::now(),
        checkpoint: facts.time_of(feed.checkpoint),
        last_synced: facts.time_of(feed.last_synced),
        resolved: facts.time_of(facts.resolved(feed.checkpoint)),
    };
    let (synced, text) = known.judge(config.synced_check_interval, config.checkpoint_interval);
    Ok(Json(json!({
        "synced": synced,
        "sink_checkpoint_ts": time_text(known.checkpoint),
        "puller_resolved_ts": time_text(known.resolved),
        "last_synced_ts": time_text(known.last_synced),
        "now_ts": time_text(Some(known.now)),
        "info": text,
    })))
}

/// The times from which follows whether everything is downstream.
struct Known {
    now: WallTime,
    checkpoint: Option<WallTime>,
    last_synced: Option<WallTime>,
    resolved: Option<WallTime>,
}

impl Known {
    /// Intervals in seconds; if one is zero both have their defaults. Times are compared in whole milliseconds, and
    /// what is unknown is long ago.
    fn judge(&self, quiet_after: u64, fresh_within: u64) -> (bool, &'static str) {
        let (quiet_after, fresh_within) =
            if quiet_after == 0 || fresh_within == 0 { (300, 15) } else { (quiet_after, fresh_within) };
        let after = |seconds: u64| i64::try_from(seconds.saturating_mul(1000)).unwrap_or(i64::MAX);
        let millis = |from: Option<WallTime>, to: WallTime| {
            from.map_or(i64::MAX, |from| to.millis().saturating_sub(from.millis()))
        };
        let quiet = millis(self.last_synced, self.now) > after(quiet_after);
        let fresh = |to: WallTime| millis(self.checkpoint, to) < after(fresh_within);
        if quiet && fresh(self.now) {
            (true, "The data syncing is finished")
        } else if quiet && self.resolved.is_some_and(fresh) {
            (
                false,
                "Check that the upstream is reachable; if it is not, the data syncing is finished, otherwise wait",
            )
        } else {
            (false, "The data syncing is not finished, please wait")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_772_352_000_000;

    fn known(last_synced: i64, checkpoint: i64, resolved: i64) -> Known {
        let at = |millis: i64| Some(WallTime(millis * 1000));
        Known {
            now: WallTime(NOW * 1000),
            checkpoint: at(checkpoint),
            last_synced: at(last_synced),
            resolved: at(resolved),
        }
    }

    #[test]
    // behaviour: api-A-15
    fn a_changefeed_is_synced_when_it_is_quiet_for_longer_and_fresh_for_less_than_the_intervals() {
        let synced = |known: Known| known.judge(300, 15).0;
        assert!(synced(known(NOW - 300_001, NOW - 14_999, NOW)));
        assert!(!synced(known(NOW - 300_000, NOW, NOW)), "equal is not longer");
        assert!(!synced(known(NOW - 300_001, NOW - 15_000, NOW)), "equal is not less");
        // The upstream stands still: nobody can say, and the words say what to do.
        let still = |known: Known| known.judge(300, 15).1.starts_with("Check");
        assert!(still(known(NOW - 400_000, NOW - 60_000, NOW - 45_001)));
        assert!(!still(known(NOW - 400_000, NOW - 60_000, NOW - 45_000)), "equal is not less");
        assert!(!still(known(NOW - 300_000, NOW - 60_000, NOW - 60_000)), "it is not quiet");
        // A zero means both defaults, and what is unknown is long ago.
        assert!(known(NOW - 300_001, NOW - 14_999, NOW).judge(0, 1).0);
        assert!(!known(NOW - 300_000, NOW - 14_999, NOW).judge(1, 0).0);
        assert!(!synced(Known { checkpoint: None, ..known(0, 0, 0) }));
        assert!(!still(Known { resolved: None, ..known(0, 0, 0) }));
    }
}
