//! Shows how much there is and how far everybody is.

use std::time::Duration;

use heartbeatpb::{Ts, WallTime};

use super::EventService;
use crate::event_store::Store;
use crate::metrics::Sizes;

/// How often it is looked.
pub(super) const LOOK: Duration = Duration::from_secs(5);
/// Every how many looks each dispatcher is measured.
const EACH: u64 = 2;

impl EventService {
    /// `waiting` requests wait for the service.
    pub(super) fn measure(&mut self, waiting: usize) {
        self.looks += 1;
        let each = self.looks.is_multiple_of(EACH);
        let now = WallTime::now();
        let mut sizes = Sizes { waiting, ..Sizes::default() };
        let stores: Vec<_> = self.stores.by_feed.lock().values().cloned().collect();
        for store in &stores {
            let stats = store.stats();
            sizes.tables += stats.tables;
            sizes.disk += stats.disk_bytes;
            sizes.unfinished += stats.unfinished_bytes;
            sizes.memory += stats.memory_bytes;
            sizes.received_lag = sizes.received_lag.max(since(store.resolved().1, now));
        }
        for (gid, feed) in &self.feeds {
            sizes.dispatchers += feed.streams.len();
            sizes.pending += feed.ready.len();
            let received = since(feed.store.resolved().1, now);
            let mut time = Remembered { store: &feed.store, last: None };
            let mut base = None;
            for stream in feed.streams.values().filter(|stream| stream.epoch > 0) {
                let ts = stream.resolved_sent.max(stream.start_ts);
                let sent = time.of(ts).map(|at| since(at, now));
                sizes.sent_lag = sizes.sent_lag.max(sent.unwrap_or_default());
                base = Some(base.map_or(ts, |base: Ts| base.min(ts)));
                if each {
                    let checkpoint = stream.progress.and_then(|(checkpoint, _)| time.of(checkpoint));
                    self.metrics.dispatcher(received, sent, checkpoint.map(|at| since(at, now)));
                }
            }
            let room =
                self.credits.iter().filter(|((of, _), _)| of == gid).map(|(_, credit)| credit.room()).sum();
            feed.metrics.set(room, base.map(|base| base.0), feed.store.disk_ratio());
        }
        self.metrics.sizes(&sizes);
    }
}

/// Seconds; none for what has no time.
fn since(time: WallTime, now: WallTime) -> f64 {
    if time == WallTime::default() { 0.0 } else { time.seconds_until(now).max(0.0) }
}

/// Asks a store for times; most dispatchers are at the same place.
struct Remembered<'s> {
    store: &'s Store,
    last: Option<(Ts, Option<WallTime>)>,
}

impl Remembered<'_> {
    fn of(&mut self, ts: Ts) -> Option<WallTime> {
        match self.last {
            Some((known, time)) if known == ts => time,
            Some(_) | None => {
                let time = self.store.time_of(ts);
                self.last = Some((ts, time));
                time
            }
        }
    }
}
