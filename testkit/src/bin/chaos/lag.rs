//! How old the target is, measured from outside: a beat changes one row of every table, and the target is asked.
//!
//! The lag at a moment is the age of the oldest beat that was committed at the source and that some table of the
//! target does not show yet; nothing, when every table shows every beat. It is taken ten times a second.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use testkit::PgServer;
use tokio::sync::OwnedMutexGuard;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use crate::tables::{BEAT_KEY, Tables};

/// Time between two beats: the lag is known to about this much.
const BEAT: Duration = Duration::from_millis(50);
/// Time between two looks at the target.
const LOOK: Duration = Duration::from_millis(40);
/// Time between two points of the curve.
pub(crate) const SAMPLE: Duration = Duration::from_millis(100);
/// How long the target may take to answer a look; then it is asked on a new connection.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// What is known about the beats.
#[derive(Debug, Default)]
struct Beats {
    /// Beats that are not known to have arrived, with the moment in which their commit was confirmed.
    pending: VecDeque<(i64, Instant)>,
    /// The newest beat that every table of the target shows.
    arrived: i64,
    samples: Vec<(Instant, f64)>,
}

impl Beats {
    fn committed(&mut self, beat: i64, at: Instant) {
        if self.pending.back().is_none_or(|(last, _)| *last < beat) {
            self.pending.push_back((beat, at));
        }
    }

    fn arrived(&mut self, beat: i64) {
        self.arrived = self.arrived.max(beat);
    }

    /// Seconds.
    fn lag(&mut self, now: Instant) -> f64 {
        while self.pending.front().is_some_and(|(beat, _)| *beat <= self.arrived) {
            self.pending.pop_front();
        }
        self.pending.front().map_or(0.0, |(_, at)| now.saturating_duration_since(*at).as_secs_f64())
    }
}

/// Measures until it is dropped.
pub(crate) struct Lag {
    beats: Arc<Mutex<Beats>>,
    turn: Arc<tokio::sync::Mutex<()>>,
    _tasks: JoinSet<()>,
}

impl Lag {
    /// Starts beats, looks and samples.
    pub(crate) fn start(
        (source, from): (&Arc<PgServer>, &'static str),
        (target, to): (&Arc<PgServer>, &'static str),
        tables: Tables,
    ) -> Self {
        let beats = Arc::new(Mutex::new(Beats::default()));
        let turn = Arc::default();
        let mut tasks = JoinSet::new();
        tasks.spawn(beat(Arc::clone(source), from, tables, Arc::clone(&beats), Arc::clone(&turn)));
        tasks.spawn(look(Arc::clone(target), to, tables, Arc::clone(&beats)));
        tasks.spawn(sample(Arc::clone(&beats)));
        Self { beats, turn, _tasks: tasks }
    }

    /// The lag now, in seconds.
    pub(crate) fn now(&self) -> f64 {
        self.lock().lag(Instant::now())
    }

    /// No beat is sent while the guard lives.
    pub(crate) async fn hold(&self) -> OwnedMutexGuard<()> {
        Arc::clone(&self.turn).lock_owned().await
    }

    /// Samples from a moment on: seconds since then, and the lag in seconds.
    pub(crate) fn since(&self, start: Instant) -> Vec<(f64, f64)> {
        let beats = self.lock();
        let from = beats.samples.partition_point(|(at, _)| *at < start);
        beats.samples[from..].iter().map(|(at, lag)| ((*at - start).as_secs_f64(), *lag)).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Beats> {
        self.beats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn sample(beats: Arc<Mutex<Beats>>) {
    let mut ticks = tokio::time::interval(SAMPLE);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        ticks.tick().await;
        let now = Instant::now();
        let mut beats = beats.lock().unwrap_or_else(PoisonError::into_inner);
        let lag = beats.lag(now);
        beats.samples.push((now, lag));
    }
}

/// Changes a row of every table in one transaction, again and again.
async fn beat(
    source: Arc<PgServer>,
    database: &'static str,
    tables: Tables,
    beats: Arc<Mutex<Beats>>,
    turn: Arc<tokio::sync::Mutex<()>>,
) {
    let updates: Vec<String> = (0..tables.keyed)
        .map(|table| {
            let name = tables.name(table);
            format!("UPDATE {name} SET v = v + 1, at = clock_timestamp() WHERE id = {BEAT_KEY};")
        })
        .collect();
    let text = format!("BEGIN; {} COMMIT;", updates.concat());
    let current = format!("SELECT v FROM {} WHERE id = {BEAT_KEY}", tables.name(0));
    let mut ticks = tokio::time::interval(BEAT);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        // After a broken connection the source says whether its last beat was committed.
        let Ok(client) = source.client(database).await else {
            tokio::time::sleep(BEAT).await;
            continue;
        };
        let Ok(row) = client.query_one(&current, &[]).await else { continue };
        let mut number: i64 = row.get(0);
        loop {
            let now = Instant::now();
            beats.lock().unwrap_or_else(PoisonError::into_inner).committed(number, now);
            ticks.tick().await;
            let _mine = turn.lock().await;
            if client.batch_execute(&text).await.is_err() {
                break;
            }
            number += 1;
        }
    }
}

/// Asks the target which beat every table shows.
async fn look(target: Arc<PgServer>, database: &'static str, tables: Tables, beats: Arc<Mutex<Beats>>) {
    let rows: Vec<String> = (0..tables.keyed)
        .map(|table| format!("SELECT v FROM {} WHERE id = {BEAT_KEY}", tables.name(table)))
        .collect();
    // A table without the row shows nothing at all.
    let text = format!(
        "SELECT CASE WHEN count(*) = {} THEN min(v) END FROM ({}) beats",
        tables.keyed,
        rows.join(" UNION ALL ")
    );
    let mut ticks = tokio::time::interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let Ok(client) = target.client(database).await else {
            tokio::time::sleep(LOOK).await;
            continue;
        };
        let Ok(statement) = client.prepare(&text).await else {
            tokio::time::sleep(LOOK).await;
            continue;
        };
        loop {
            ticks.tick().await;
            let answer = tokio::time::timeout(ANSWER_LIMIT, client.query_one(&statement, &[])).await;
            let Ok(Ok(row)) = answer else { break };
            if let Some(beat) = row.get::<_, Option<i64>>(0) {
                beats.lock().unwrap_or_else(PoisonError::into_inner).arrived(beat);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lag_is_the_age_of_the_oldest_beat_that_has_not_arrived() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let mut beats = Beats::default();
        assert!(beats.lag(at(0)) < 1e-9, "nothing was sent");
        beats.committed(1, at(100));
        beats.committed(2, at(150));
        assert!((beats.lag(at(200)) - 0.1).abs() < 1e-9);
        beats.arrived(1);
        assert!((beats.lag(at(1150)) - 1.0).abs() < 1e-9);
        beats.committed(2, at(5000));
        assert!((beats.lag(at(5150)) - 5.0).abs() < 1e-9, "confirmed twice, sent once");
        beats.arrived(2);
        assert!(beats.lag(at(9000)) < 1e-9, "an idle source has no lag");
    }
}
