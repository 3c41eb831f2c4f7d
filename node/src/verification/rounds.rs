//! Comparisons that nobody asks for: `[verify] interval` of a changefeed, carried out by the node that leads.

use std::collections::BTreeMap;
use std::time::Duration;

use coordinator::ChangefeedView;
use heartbeatpb::Gid;
use heartbeatpb::config::ChangefeedState;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Wish;
use crate::http::{KEYSPACE, Shared};

/// How often it is looked for comparisons that are due.
const LOOK: Duration = Duration::from_secs(2);
/// Longest time that the beginning of one may take: others wait for it.
const BEGINNING: Duration = Duration::from_secs(30);

/// A changefeed that is to be compared again and again.
struct Watched {
    feed: Gid,
    interval: Duration,
    running: bool,
}

/// When each changefeed was last seen to be compared; pure.
#[derive(Default)]
struct Rounds {
    last: BTreeMap<Gid, Instant>,
}

impl Rounds {
    /// Those that are due, who waited longest first. Others than these are forgotten.
    fn due(&mut self, now: Instant, watched: &[Watched]) -> Vec<Gid> {
        self.last.retain(|feed, _| watched.iter().any(|one| one.feed == *feed));
        let mut due = Vec::new();
        for one in watched {
            if one.running {
                self.last.insert(one.feed, now);
            } else if self.last.get(&one.feed).is_none_or(|last| now - *last >= one.interval) {
                due.push(one.feed);
            }
        }
        due.sort_by_key(|feed| self.last.get(feed).copied());
        due
    }

    /// It was begun, or could not be: the pause begins.
    fn tried(&mut self, feed: Gid, now: Instant) {
        self.last.insert(feed, now);
    }
}

/// Compares what is due, as long as this node leads.
pub(crate) async fn run(state: Shared, stop: CancellationToken) {
    let mut rounds = Rounds::default();
    let mut tick = tokio::time::interval(LOOK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            _ = tick.tick() => {}
        }
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            () = round(&state, &mut rounds) => {}
        }
    }
}

async fn round(state: &Shared, rounds: &mut Rounds) {
    let leader = state.leader.borrow().clone();
    let Some(leader) = leader else {
        *rounds = Rounds::default();
        state.verifications.keep_only(&[]);
        return;
    };
    // Whoever cannot be asked is asked again.
    let Ok(feeds) = leader.list(Some(KEYSPACE)).await else { return };
    let known: Vec<Gid> = feeds.iter().map(|feed| feed.info.id.gid).collect();
    state.verifications.keep_only(&known);
    let watched: Vec<Watched> = feeds.iter().filter_map(|feed| watched(state, feed)).collect();
    for gid in rounds.due(Instant::now(), &watched) {
        let Some(feed) = feeds.iter().find(|feed| feed.info.id.gid == gid) else { continue };
        if state.verifications.is_full() {
            return;
        }
        let wish = Wish { rows_per_second: Some(feed.info.config.verify.rows_per_second), ..Wish::default() };
        let begun = state.verifications.begin(feed, wish, &state.upstreams, state.leader.clone());
        let problem = match tokio::time::timeout(BEGINNING, begun).await {
            Ok(Ok(_)) => None,
            Ok(Err(error)) => Some(error.message),
            Err(_) => Some(format!("it did not begin within {} s", BEGINNING.as_secs())),
        };
        if let Some(error) = problem {
            tracing::warn!(changefeedID = %feed.info.id, error, "both ends cannot be compared now");
        }
        rounds.tried(gid, Instant::now());
    }
}

/// A changefeed that gets on and is to be compared without being asked.
fn watched(state: &Shared, feed: &ChangefeedView) -> Option<Watched> {
    let interval = feed.info.config.verify.interval.0;
    let id = feed.info.id.gid;
    (!interval.is_zero() && feed.info.state == ChangefeedState::Normal).then(|| Watched {
        feed: id,
        interval,
        running: state.verifications.is_running(id),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(feed: u64, running: bool) -> Watched {
        Watched { feed: Gid::new(feed, 0), interval: Duration::from_secs(60), running }
    }

    #[test]
    fn the_pause_is_counted_from_the_end_and_who_waited_longest_is_first() {
        let (mut rounds, start) = (Rounds::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let (a, b) = (Gid::new(1, 0), Gid::new(2, 0));
        assert_eq!(rounds.due(at(0), &[one(1, false), one(2, false)]), [a, b]);
        rounds.tried(b, at(0));
        rounds.tried(a, at(5));
        // One of them takes its time.
        assert!(rounds.due(at(50), &[one(1, false), one(2, true)]).is_empty());
        assert_eq!(rounds.due(at(66), &[one(1, false), one(2, false)]), [a]);
        assert_eq!(rounds.due(at(120), &[one(1, false), one(2, false)]), [a, b]);
        rounds.tried(a, at(120));
        assert_eq!(rounds.due(at(200), &[one(1, false), one(2, false)]), [b, a]);
    }

    #[test]
    fn a_changefeed_that_is_not_watched_any_more_is_forgotten() {
        let (mut rounds, start) = (Rounds::default(), Instant::now());
        rounds.tried(Gid::new(1, 0), start);
        assert!(rounds.due(start, &[one(1, false)]).is_empty());
        assert!(rounds.due(start, &[]).is_empty());
        assert_eq!(rounds.due(start, &[one(1, false)]), [Gid::new(1, 0)], "it was paused and resumed");
    }
}
