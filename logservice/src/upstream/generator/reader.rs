//! Emits the stream of a generator into a store.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use event::{RowOp, TableInfo};
use heartbeatpb::{Ts, WallTime};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::change::{Described, Shapes, describe};
use super::workload::{Change, RowText, Workload, shapes};
use super::{Feed, state};
use crate::Error;
use crate::event_store::{CopyWriter, StoreWriter};
use crate::upstream::{FeedSpec, ReaderPhase, ReaderProgress, ReaderStart};

/// Between two looks at the clock.
const TICK: Duration = Duration::from_millis(5);
/// Between two resolved positions while nothing happens.
const IDLE: Duration = Duration::from_millis(100);
/// A generator that fell further behind its rate than this does not catch up.
const LONGEST_DEBT: Duration = Duration::from_secs(1);
/// Bytes and transactions between two publications at full speed.
const BURST_BYTES: usize = 256 << 10;
const BURST_TRANSACTIONS: u64 = 1000;
/// Rows of a copy between two looks at the store's room.
const COPY_ROWS: u64 = 256;

pub(super) fn now() -> WallTime {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    WallTime(i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
}

pub(super) struct Reader<'a> {
    pub(super) workload: &'a dyn Workload,
    /// Transactions per second; 0 is as fast as possible.
    pub(super) rate: u64,
    /// Number of the last transaction.
    pub(super) last: u64,
    pub(super) spec: FeedSpec,
    pub(super) start: ReaderStart,
    pub(super) writer: StoreWriter,
    pub(super) persisted: watch::Receiver<Ts>,
    pub(super) progress: Arc<ReaderProgress>,
    pub(super) shutdown: CancellationToken,
}

/// The stream goes on, or the reader was told to stop.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Flow {
    On,
    Stop,
}

fn add(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

/// Waits for the store, but not beyond the shutdown.
async fn unless_stopped(
    shutdown: &CancellationToken,
    work: impl Future<Output = Result<(), Error>>,
) -> Result<Flow, Error> {
    tokio::select! {
        biased;
        () = shutdown.cancelled() => Ok(Flow::Stop),
        result = work => result.map(|()| Flow::On),
    }
}

/// How many transactions there may be by now.
#[derive(Debug)]
struct Pace {
    rate: u64,
    /// The first transaction that counts.
    first: u64,
    /// When it counted.
    since: Instant,
}

impl Pace {
    /// The last transaction that the rate allows, `next` being the next one. A stream that was held up for
    /// long goes on at its rate instead of catching up.
    fn due(&mut self, now: Instant, next: u64) -> u64 {
        if self.rate == 0 {
            return u64::MAX;
        }
        let allowed = now.duration_since(self.since).as_micros() * u128::from(self.rate) / 1_000_000;
        let due = self.first.saturating_add(u64::try_from(allowed).unwrap_or(u64::MAX)).saturating_sub(1);
        if due > next.saturating_add(self.rate.saturating_mul(LONGEST_DEBT.as_secs())) {
            (self.first, self.since) = (next, now);
            return next;
        }
        due
    }
}

impl Reader<'_> {
    pub(super) async fn run(mut self) -> Result<(), Error> {
        let feed = Feed { ddl_every: self.workload.ddl_every() };
        let progress = Arc::clone(&self.progress);
        progress.connected.store(true, Ordering::Relaxed);
        let result = self.stream(feed).await;
        progress.connected.store(false, Ordering::Relaxed);
        progress.set_phase(ReaderPhase::Stopped);
        result
    }

    async fn stream(&mut self, feed: Feed) -> Result<(), Error> {
        let ReaderStart { start_ts, checkpoint } = self.start;
        let copies = self.spec.initial_copy && checkpoint == start_ts;
        let populates = !self.spec.initial_copy && checkpoint < super::POPULATED;
        let position = if copies || populates { Feed::snapshot_after(checkpoint) } else { checkpoint };
        let mut tables = self.wanted(feed.ddls_at(position), feed.shape_since(position).max(start_ts));
        for table in tables.iter().flatten() {
            self.writer.register_table(Arc::clone(table));
        }
        let flow = if copies {
            self.copy(&tables, position).await?
        } else if populates {
            self.populate(&tables, position).await?
        } else {
            Flow::On
        };
        if flow == Flow::Stop {
            return Ok(());
        }
        self.publish(position);
        self.progress.set_phase(ReaderPhase::Streaming);
        let mut next = Feed::transactions_at(position) + 1;
        // A schema change just before the next transaction may be behind us already.
        let mut ddls = feed.ddls_at(position);
        let mut pace = Pace { rate: self.rate, first: next, since: Instant::now() };
        loop {
            let due = pace.due(Instant::now(), next).min(self.last);
            let mut emitted = 0;
            while next <= due && emitted < BURST_TRANSACTIONS && self.writer.unpublished_bytes() < BURST_BYTES
            {
                if let Some(ddl) = feed.ddl_before(next).filter(|ddl| *ddl > ddls) {
                    if self.ddl(ddl, next, &mut tables).await? == Flow::Stop {
                        return Ok(());
                    }
                    ddls = ddl;
                }
                if self.transaction(next, &tables).await? == Flow::Stop {
                    return Ok(());
                }
                (next, emitted) = (next + 1, emitted + 1);
            }
            self.publish(Feed::ts(next - 1).max(position));
            let pause = match () {
                () if next <= due => Duration::ZERO,
                () if next > self.last => IDLE,
                () => TICK,
            };
            tokio::select! {
                biased;
                () = self.shutdown.cancelled() => return Ok(()),
                () = pause_for(pause) => {}
            }
        }
    }

    /// Shapes of the tables that the filter lets through, by the workload's numbers.
    fn wanted(&self, ddls: u64, version: Ts) -> Vec<Option<Arc<TableInfo>>> {
        let wanted = |table: &Arc<TableInfo>| self.spec.filter.matches(&table.schema, &table.name);
        shapes(self.workload, ddls, version).into_iter().map(|table| table.filter(wanted)).collect()
    }

    fn publish(&mut self, resolved: Ts) {
        self.writer.publish(resolved, now());
        self.progress.received.store(resolved.0, Ordering::Relaxed);
        self.progress.confirmed.store(self.persisted.borrow().0, Ordering::Relaxed);
    }

    async fn transaction(&mut self, n: u64, tables: &[Option<Arc<TableInfo>>]) -> Result<Flow, Error> {
        let commit_ts = Feed::ts(n);
        self.writer.begin(Feed::start_ts(commit_ts));
        let mut failure = None;
        let mut rows = 0;
        let writer = &mut self.writer;
        self.workload.transaction(n, &mut |change: Change<'_>| {
            let Some(Some(table)) = tables.get(change.table) else { return };
            rows += 1;
            let mut old = change.old.map(|old| |out: &mut bytes::BytesMut| old.write(out));
            let mut new = change.new.map(|new| |out: &mut bytes::BytesMut| new.write(out));
            let result = writer.row(
                table.id,
                change.op,
                old.as_mut().map(|old| old as &mut dyn FnMut(&mut bytes::BytesMut)),
                new.as_mut().map(|new| new as &mut dyn FnMut(&mut bytes::BytesMut)),
            );
            if let Err(e) = result {
                failure = Some(e);
            }
        });
        if let Some(error) = failure {
            return Err(error);
        }
        add(&self.progress.log_rows, rows);
        add(&self.progress.transactions, 1);
        unless_stopped(&self.shutdown, self.writer.commit(commit_ts, now())).await
    }

    async fn ddl(&mut self, ddl: u64, n: u64, tables: &mut [Option<Arc<TableInfo>>]) -> Result<Flow, Error> {
        let Some(step) = self.workload.ddl(ddl) else { return Ok(Flow::On) };
        let commit_ts = Feed::ddl_ts(n);
        let time = now();
        let workload = self.workload;
        let Described { event, slots } = {
            let shapes = Shapes {
                before: &|slot| workload.table(slot, ddl - 1, commit_ts),
                after: &|slot| workload.table(slot, ddl, commit_ts),
                filter: &self.spec.filter,
            };
            describe(step, commit_ts, time, &shapes)
        };
        let mut flow = Flow::On;
        if let Some(event) = event {
            self.writer.begin(Feed::start_ts(commit_ts));
            self.writer.ddl(event);
            flow = unless_stopped(&self.shutdown, self.writer.commit(commit_ts, time)).await?;
        }
        for (slot, info) in slots {
            if let Some(info) = &info {
                self.writer.register_table(Arc::clone(info));
            }
            if let Some(place) = tables.get_mut(slot) {
                *place = info;
            }
        }
        Ok(flow)
    }

    /// Inserts the first rows as one transaction.
    async fn populate(&mut self, tables: &[Option<Arc<TableInfo>>], at: Ts) -> Result<Flow, Error> {
        let mut text = RowText::default();
        self.writer.begin(Feed::start_ts(at));
        for (number, table) in tables.iter().enumerate() {
            let Some(table) = table else { continue };
            for row in 0..self.workload.first_rows(number) {
                self.workload.first_row(number, row, &mut text);
                let mut new = |out: &mut bytes::BytesMut| text.write(out);
                self.writer.row(table.id, RowOp::Insert, None, Some(&mut new))?;
                if row % COPY_ROWS == COPY_ROWS - 1
                    && unless_stopped(&self.shutdown, self.writer.room()).await? == Flow::Stop
                {
                    return Ok(Flow::Stop);
                }
            }
            add(&self.progress.log_rows, self.workload.first_rows(number));
        }
        unless_stopped(&self.shutdown, self.writer.commit(at, now())).await
    }

    /// Copies the rows that exist at the start, as of `snapshot`.
    async fn copy(&mut self, tables: &[Option<Arc<TableInfo>>], snapshot: Ts) -> Result<Flow, Error> {
        self.progress.set_phase(ReaderPhase::Copying);
        let wanted = tables.iter().flatten().count() as u64;
        self.progress.copy_tables_total.store(wanted, Ordering::Relaxed);
        self.progress.copy_tables_done.store(0, Ordering::Relaxed);
        let changed = Feed::transactions_at(snapshot) > 0;
        let current = if changed { state::play(self.workload, snapshot) } else { Vec::new() };
        let time = now();
        for (number, table) in tables.iter().enumerate() {
            let Some(table) = table else { continue };
            let start = Feed::start_ts(snapshot);
            let mut copy = self.writer.copy_writer(Arc::clone(table), snapshot, start, time);
            let flow = if let Some(rows) = current.get(number) {
                self.copy_current(rows, &mut copy).await?
            } else {
                self.copy_first(number, &mut copy).await?
            };
            if flow == Flow::Stop {
                return Ok(flow);
            }
            copy.finish();
            add(&self.progress.copy_tables_done, 1);
        }
        Ok(Flow::On)
    }

    async fn copy_first(&self, table: usize, copy: &mut CopyWriter) -> Result<Flow, Error> {
        let mut text = RowText::default();
        for row in 0..self.workload.first_rows(table) {
            self.workload.first_row(table, row, &mut text);
            if self.copy_row(row, &text, copy).await? == Flow::Stop {
                return Ok(Flow::Stop);
            }
        }
        Ok(Flow::On)
    }

    async fn copy_current(&self, rows: &state::Rows, copy: &mut CopyWriter) -> Result<Flow, Error> {
        let mut text = RowText::default();
        for (number, row) in (0..).zip(rows.values()) {
            text.clear();
            for value in row {
                match value {
                    Some(value) => text.put(value),
                    None => text.null(),
                };
            }
            if self.copy_row(number, &text, copy).await? == Flow::Stop {
                return Ok(Flow::Stop);
            }
        }
        Ok(Flow::On)
    }

    async fn copy_row(&self, number: u64, row: &RowText, copy: &mut CopyWriter) -> Result<Flow, Error> {
        copy.row(&mut |out| row.write(out));
        add(&self.progress.copy_rows, 1);
        if number % COPY_ROWS == COPY_ROWS - 1 {
            return unless_stopped(&self.shutdown, copy.room()).await;
        }
        Ok(Flow::On)
    }
}

async fn pause_for(time: Duration) {
    if time.is_zero() {
        tokio::task::yield_now().await;
    } else {
        tokio::time::sleep(time).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_kept_and_a_long_stop_is_not_made_up_for() {
        let start = Instant::now();
        let mut pace = Pace { rate: 100, first: 1, since: start };
        let at = |millis: u64| start + Duration::from_millis(millis);
        assert_eq!(pace.due(at(0), 1), 0);
        assert_eq!(pace.due(at(10), 1), 1);
        assert_eq!(pace.due(at(1000), 51), 100, "half a second of debt is paid");
        assert_eq!(pace.due(at(60_000), 101), 101, "a minute is not");
        assert_eq!(pace.due(at(61_000), 102), 200);
        assert_eq!(Pace { rate: 0, first: 1, since: start }.due(at(0), 1), u64::MAX);
    }
}
