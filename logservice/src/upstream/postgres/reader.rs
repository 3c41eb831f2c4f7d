//! The log reader: initial copy, then the stream, over as many connections as it takes.
//!
//! - **RD-1** A transaction is written to the store once, complete, and in commit order: at a reconnect the open
//!   one is forgotten, and what the server repeats is skipped.
//! - **RD-2** Only what the persisted checkpoint covers is confirmed to the server, and only ends of transactions.
//! - **RD-3** While the store is full nothing is read, but the connection is kept alive.
//! - **RD-4** A transaction that comes before it ends is written to the store when its commit comes, as if it came then.

mod claim;
mod copied;
mod follow;
mod guard;
mod huge;
mod link;
pub(super) mod pace;
mod replay;
mod unfinished;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use heartbeatpb::{Ts, WallTime};
use rustc_hash::FxHashMap;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use self::link::Link;
use self::pace::Pace;
use self::replay::Streaming;
use self::unfinished::Unfinished;
use super::admin;
use super::apply::{Step, Tables};
use super::backoff::Backoff;
use super::bounds::Bounds;
use super::catalog::CatalogTable;
use super::conn::{Connection, Purpose};
use super::copy::{self, Copied, CopyPlan};
use super::names::Names;
use super::options::ConnectOptions;
use super::origin::Origin;
use super::shape::Shape;
use super::slot;
use super::sql::{ident, lsn};
use crate::Error;
use crate::event_store::StoreWriter;
use crate::upstream::metrics::ReaderMetrics;
use crate::upstream::{FeedSpec, ReaderPhase, ReaderProgress, ReaderStart};

/// Between two status updates; also how often a silent server is asked for a sign of life.
const STATUS_EVERY: Duration = Duration::from_secs(1);
/// A server that owes an answer for so long is gone; equals the default of its own `wal_sender_timeout`.
const SILENCE: Duration = Duration::from_secs(60);
/// Committed transactions become visible at least this often while the stream does not pause.
const PUBLISH_EVERY: Duration = Duration::from_millis(5);
/// As [`PUBLISH_EVERY`], in bytes.
const PUBLISH_BYTES: usize = 1 << 20;
/// Bytes of an open transaction between two looks at the store's room.
const ROOM_EVERY: usize = 1 << 20;

/// Everything a reader is started with.
pub(crate) struct Reader {
    pub(crate) options: ConnectOptions,
    pub(crate) spec: FeedSpec,
    pub(crate) start: ReaderStart,
    pub(crate) writer: StoreWriter,
    pub(crate) persisted: watch::Receiver<Ts>,
    pub(crate) progress: Arc<ReaderProgress>,
    pub(crate) shutdown: CancellationToken,
}

/// How a connection's life ended without an error.
enum Ended {
    Shutdown,
    /// The server shall send the log in another way from now on.
    Otherwise(Streaming),
}

impl Reader {
    /// Runs until shutdown or a fatal error.
    pub(crate) async fn run(self) -> Result<(), Error> {
        let progress = Arc::clone(&self.progress);
        let result = self.run_inner().await;
        progress.connected.store(false, Ordering::Relaxed);
        progress.set_phase(ReaderPhase::Stopped);
        if let Err(error) = &result {
            progress.set_failure(error);
        }
        result
    }

    async fn run_inner(self) -> Result<(), Error> {
        let names = Names::of(&self.spec.changefeed);
        let application = names.application(self.spec.epoch);
        let copies = self.spec.initial_copy && self.start.checkpoint == self.start.start_ts;
        let mut session = Session {
            metrics: ReaderMetrics::new(),
            streaming: if self.spec.streaming { Streaming::On } else { Streaming::Never },
            names,
            application,
            options: self.options,
            spec: self.spec,
            resolved: self.start.checkpoint,
            resolved_time: WallTime::default(),
            asked: None,
            bounds: Arc::default(),
            complete: None,
            copied: !copies,
            tables: None,
            captured: false,
            checkpoint: self.start.checkpoint,
            straddling: None,
            start: self.start.start_ts,
            origin: None,
            promoted: false,
            seen: None,
            writer: self.writer,
            persisted: self.persisted,
            progress: self.progress,
            shutdown: self.shutdown,
        };
        let mut backoff = Backoff::default();
        loop {
            session.progress.set_phase(ReaderPhase::Connecting);
            let (began, resolved) = (Instant::now(), session.resolved);
            let error = match session.follow().await {
                Ok(Ended::Shutdown) => return Ok(()),
                Ok(Ended::Otherwise(streaming)) => {
                    session.publish_complete();
                    session.streaming = streaming;
                    continue;
                }
                // Whoever placed the tables has to read them again too.
                Err(error)
                    if error.is_retryable()
                        && !matches!(error, Error::Closed { .. } | Error::CopyOutdated { .. }) =>
                {
                    error
                }
                Err(error) => return Err(error),
            };
            session.publish_complete();
            // Forget the half transaction; the server sends it again from its beginning.
            session.writer.abort();
            session.progress.connected.store(false, Ordering::Relaxed);
            session.progress.set_phase(ReaderPhase::Connecting);
            session.progress.reconnects.fetch_add(1, Ordering::Relaxed);
            session.progress.set_failure(&error);
            let pause = backoff.after(began.elapsed(), session.resolved > resolved);
            tracing::warn!(
                changefeed = %session.spec.changefeed,
                errorCode = error.code(),
                error = error.chain(),
                pause_ms = pause.as_millis(),
                "lost the upstream, trying again"
            );
            tokio::select! {
                () = session.shutdown.cancelled() => return Ok(()),
                () = tokio::time::sleep(pause) => {}
            }
        }
    }
}

/// What outlives a connection.
struct Session {
    options: ConnectOptions,
    spec: FeedSpec,
    names: Names,
    application: String,
    /// Everything at or before this has been published.
    resolved: Ts,
    resolved_time: WallTime,
    /// Where the stream is asked to begin: the newest end of a transaction before which nothing is missing. Before one
    /// is known, it begins where the slot does.
    asked: Option<Ts>,
    bounds: Arc<parking_lot::Mutex<Bounds>>,
    /// A newer position that is complete in the store but not published yet. Outlives the connection: what is in
    /// the store must not be asked for again.
    complete: Option<(Ts, WallTime)>,
    /// Whether the initial copy is done, or was not wanted.
    copied: bool,
    /// Whether large transactions come before they end.
    streaming: Streaming,
    /// Read from the catalog once: a shape that changes while we are away must not go unnoticed.
    tables: Option<Vec<(CatalogTable, Arc<Shape>)>>,
    /// Schema changes come in the log.
    captured: bool,
    /// Where the reader began: the tables are known as they were there.
    checkpoint: Ts,
    /// The transaction in which that may be.
    straddling: Option<follow::Straddling>,
    /// Where the changefeed begins: the only position that may be one of the future.
    start: Ts,
    /// The history that this reader reads.
    origin: Option<Origin>,
    /// The server is a former standby that was promoted since the changefeed was read first.
    promoted: bool,
    /// The publication, as it was seen last.
    seen: Option<guard::Seen>,
    writer: StoreWriter,
    persisted: watch::Receiver<Ts>,
    progress: Arc<ReaderProgress>,
    shutdown: CancellationToken,
    metrics: ReaderMetrics,
}

impl Session {
    /// One connection's life.
    async fn follow(&mut self) -> Result<Ended, Error> {
        let shutdown = self.shutdown.clone();
        if !self.copied {
            let prepared = tokio::select! {
                prepared = self.prepare() => prepared,
                () = shutdown.cancelled() => return Ok(Ended::Shutdown),
            };
            let tables = prepared?;
            self.progress.set_phase(ReaderPhase::Copying);
            let plan = CopyPlan {
                changefeed: &self.spec.changefeed,
                options: &self.options,
                names: &self.names,
                application: &self.application,
                tables: &tables,
                parallel: self.spec.copy_parallel,
                part_bytes: self.spec.copy_part_bytes,
                target: self.spec.copy_target.as_ref(),
                crew: self.spec.copy_crew.as_ref(),
                progress: &self.progress,
                shutdown: &self.shutdown,
            };
            let copied = match copy::run(&plan, &self.writer).await {
                Ok(copied) => copied,
                Err(error) => return Err(self.explain_copy(&tables, error).await),
            };
            let Some(Copied { from: position, time, until }) = copied else { return Ok(Ended::Shutdown) };
            self.check_copied(&tables, until).await?;
            for (table, _) in &tables {
                self.writer.register_table(Arc::clone(&table.info));
            }
            self.copied = true;
            self.asked = Some(position);
            self.publish(position, time);
            tracing::info!(changefeed = %self.spec.changefeed, %position, "initial copy is complete");
        }
        let connected = tokio::select! {
            connected = self.connect() => connected,
            () = shutdown.cancelled() => return Ok(Ended::Shutdown),
        };
        let (conn, tables) = connected?;
        self.progress.connected.store(true, Ordering::Relaxed);
        self.progress.set_phase(ReaderPhase::Streaming);
        self.progress.set_last_error(None);
        let link = Link::new(conn, self);
        Stream {
            link,
            tables,
            resume: self.resolved,
            // What the server calls the position of a transaction at its beginning is where its commit record begins.
            // Beside an end of a transaction that tells which are in the store; beside any other checkpoint it does not.
            skip: self.asked.unwrap_or_default(),
            open: None,
            unfinished: Unfinished::new(self.writer.spool_memory()),
            otherwise: None,
            open_bytes: 0,
            announced: false,
            txn: follow::Txn::default(),
            side: None,
            guard: guard::Guard::new(),
            last_publish: Instant::now(),
            reported: 0,
            session: self,
        }
        .run()
        .await
    }

    /// Checks slot and publication, and reads the tables once.
    async fn prepare(&mut self) -> Result<Vec<(CatalogTable, Arc<Shape>)>, Error> {
        let mut conn = admin::connect(&self.options).await?;
        self.recognize(&mut conn).await?;
        slot::usable(&mut conn, &self.names, self.resolved, self.promoted).await?;
        let tables = self.read_tables(&mut conn).await?;
        conn.close().await;
        Ok(tables)
    }

    async fn read_tables(&mut self, conn: &mut Connection) -> Result<Vec<(CatalogTable, Arc<Shape>)>, Error> {
        // With schema changes in the log, what is known stays right: they bring what changes.
        if self.captured
            && let Some(known) = &self.tables
        {
            return Ok(known.clone());
        }
        let current = self.current_tables(conn).await?;
        if self.tables.is_none() {
            // Before that the copy sees to the tables of the downstream, which nobody else shall open.
            for table in current.iter().filter(|_| self.copied) {
                self.writer.register_table(Arc::clone(&table.info));
            }
            let known = current.into_iter().map(|table| {
                let shape = Arc::new(Shape::new(&table));
                (table, shape)
            });
            self.tables = Some(known.collect());
        }
        Ok(self.tables.clone().unwrap_or_default())
    }

    /// Takes the slot over and begins to stream. The connection for the stream is opened meanwhile: it takes nothing from
    /// anybody before it is told to stream.
    async fn connect(&mut self) -> Result<(Connection, Tables), Error> {
        let begun = Instant::now();
        let (options, application) = (self.options.clone(), self.application.clone());
        let open = || Connection::connect(&options, Purpose::Replication, &application);
        let (claimed, early) = tokio::join!(self.claim(), open());
        let (tables, ended) = claimed?;
        let mut conn = match early {
            Ok(conn) => conn,
            // The server may have had no connection left for it before the former reader's was ended.
            Err(_) => open().await?,
        };
        let known: FxHashMap<u32, Arc<Shape>> = tables
            .into_iter()
            .filter_map(|(table, shape)| Some((u32::try_from(table.info.id.0).ok()?, shape)))
            .collect();
        let sql = format!(
            "START_REPLICATION SLOT {} LOGICAL {} ({}, publication_names '{}'{})",
            ident(&self.names.slot),
            lsn(self.asked.unwrap_or_default().0),
            self.streaming.options(),
            ident(&self.names.slot).replace('\'', "''"),
            if self.captured || self.spec.ddl.sequence_values { ", messages 'true'" } else { "" },
        );
        conn.start_copy("start replication", &sql).await.map_err(|error| self.log_error(error))?;
        tracing::info!(changefeed = %self.spec.changefeed, epoch = ?self.spec.epoch, resolved = %self.resolved,
            ended_former = ended, took_ms = begun.elapsed().as_millis(), "the log is followed");
        let filter = Arc::clone(&self.spec.filter);
        Ok((conn, Tables::new(known, filter, self.captured, self.spec.ddl.truncate_table)))
    }

    /// A refusal that means that the log is gone gets its own name.
    fn log_error(&self, error: Error) -> Error {
        let Error::UpstreamQuery { message, sqlstate, .. } = &error else { return error };
        let lost = match sqlstate.as_str() {
            "42704" | "55000" => message.contains("slot") || message.contains("publication"),
            "58P01" => message.contains("WAL segment"),
            _ => false,
        };
        if !lost {
            return error;
        }
        let what = format!(
            "the log after {} is not available any more: {message}; remove the changefeed and create it again",
            lsn(self.resolved.0)
        );
        Error::LogLost { what }
    }

    /// Publishes what is complete, if that is news.
    fn publish_complete(&mut self) -> bool {
        let Some((ts, time)) = self.complete.take() else { return false };
        self.publish(ts, time);
        true
    }

    fn publish(&mut self, resolved: Ts, time: WallTime) {
        self.resolved = self.resolved.max(resolved);
        self.resolved_time = self.resolved_time.max(time);
        self.writer.publish(self.resolved, self.resolved_time);
    }
}

/// One streaming connection.
struct Stream<'s> {
    link: Link,
    tables: Tables,
    /// Transactions that end at or before this are in the store already.
    resume: Ts,
    /// Transactions that began to commit before this are not even looked at.
    skip: Ts,
    /// The open transaction; false when it is skipped.
    open: Option<bool>,
    /// Transactions that come before they end.
    unfinished: Unfinished,
    /// The log has to be sent in another way.
    otherwise: Option<Streaming>,
    open_bytes: usize,
    /// The last message announced a table.
    announced: bool,
    /// The open transaction, as far as schema changes in it need to know.
    txn: follow::Txn,
    /// For questions about schema changes.
    side: Option<Connection>,
    guard: guard::Guard,
    last_publish: Instant,
    /// Received bytes that were told.
    reported: u64,
    session: &'s mut Session,
}

impl Stream<'_> {
    async fn run(mut self) -> Result<Ended, Error> {
        self.link.send_status(false).await?;
        let mut quiet_since = Instant::now();
        // Whether bytes came since the socket was last waited for.
        let mut busy = false;
        // The server sends every change by itself: a reader that wakes for each costs both of them more than the change,
        // and so do publications of one transaction.
        let mut pace = Pace::new(self.link.conn.is_near(), self.link.conn.received(), Instant::now());
        loop {
            if self.drain().await?.is_none() {
                return Ok(self.stop().await);
            }
            if self.check_size()?.is_none() {
                return Ok(self.stop().await);
            }
            let filled = self.link.conn.try_fill().await?;
            if filled {
                quiet_since = Instant::now();
                busy = true;
            }
            if !busy || self.is_due() {
                self.publish();
            }
            if filled {
                // A server that is always ahead must still hear what is confirmed, and so must who stops this.
                if self.session.shutdown.is_cancelled() {
                    return Ok(self.stop().await);
                }
                if self.link.last_status.elapsed() >= STATUS_EVERY {
                    self.guard.turn(self.session)?;
                    self.link.send_status(false).await?;
                }
                tokio::task::coop::consume_budget().await;
                continue;
            }
            let pause =
                std::mem::take(&mut busy).then(|| pace.pause(self.link.conn.received(), Instant::now()));
            if pause.is_some_and(|pause| pause > pace::SHORT) {
                self.publish();
            }
            tokio::select! {
                biased;
                () = self.session.shutdown.cancelled() => return Ok(self.stop().await),
                _ = self.link.ticker.tick() => {
                    self.check_silence(quiet_since)?;
                    self.guard.turn(self.session)?;
                    let idle = self.link.conn.last_read().elapsed() >= STATUS_EVERY / 2;
                    self.link.send_status(idle).await?;
                }
                () = tokio::time::sleep(pause.unwrap_or_default()), if pause.is_some() => {}
                filled = self.link.conn.fill(), if pause.is_none() => {
                    filled?;
                    quiet_since = Instant::now();
                    busy = true;
                }
            }
        }
    }

    fn is_due(&self) -> bool {
        self.last_publish.elapsed() >= PUBLISH_EVERY
    }

    fn check_silence(&self, quiet_since: Instant) -> Result<(), Error> {
        if self.link.conn.last_read().elapsed() < SILENCE || quiet_since.elapsed() < SILENCE {
            return Ok(());
        }
        Err(Error::UpstreamUnreachable {
            address: self.link.conn.address().to_owned(),
            source: Box::new(std::io::Error::new(
                std::io::ErrorKind::TimedOut,
                format!("no sign of life for {} seconds", SILENCE.as_secs()),
            )),
        })
    }

    /// Handles every complete message in the buffer. `None`: told to stop.
    async fn drain(&mut self) -> Result<Option<()>, Error> {
        while let Some((tag, total)) = self.link.conn.peek()? {
            let step = match tag {
                b'd' => {
                    let body = self.link.conn.body(total);
                    let writer = &mut self.session.writer;
                    match self.unfinished.in_block() {
                        false => self.tables.handle(body, self.skip, self.open, writer)?,
                        true => replay::keep(&mut self.unfinished, body)?,
                    }
                }
                b'E' => {
                    let error = super::server_error::ServerError::parse(self.link.conn.body(total));
                    let table = self.announced.then(|| self.tables.newest());
                    return self.refused(error.into_stream_error(table));
                }
                b'c' | b'C' | b'Z' => return Err(self.ended_by_server()),
                b'N' | b'S' => Step::Nothing,
                _ => {
                    return Err(Error::protocol(format_args!("message {:?} in the stream", char::from(tag))));
                }
            };
            self.link.conn.advance(total);
            self.announced = matches!(step, Step::Announced);
            self.open_bytes += total;
            let performed = if let Step::StreamCommit(commit) = step {
                self.replay(commit).await?
            } else {
                self.perform(step).await?
            };
            if performed.is_none() {
                return Ok(None);
            }
            if let Some(error) = self.link.broken.take() {
                return Err(error);
            }
        }
        Ok(Some(()))
    }

    fn ended_by_server(&self) -> Error {
        Error::UpstreamUnreachable {
            address: self.link.conn.address().to_owned(),
            source: Box::new(std::io::Error::new(
                std::io::ErrorKind::ConnectionAborted,
                "the server ended the stream",
            )),
        }
    }

    #[inline]
    async fn perform(&mut self, step: Step) -> Result<Option<()>, Error> {
        match step {
            Step::Nothing | Step::Announced | Step::StreamCommit(_) => {}
            Step::Block { xid } => self.unfinished.begin(xid, || self.session.writer.spool()),
            Step::StreamAbort { xid, subxid } => self.unfinished.roll_back(xid, subxid),
            Step::Kept(heard) => return self.on_kept(heard).await,
            Step::Row => {
                if self.open_bytes >= ROOM_EVERY {
                    self.open_bytes = 0;
                    let room = self.session.writer.room();
                    return self.link.hold(room, &self.session.shutdown).await;
                }
            }
            Step::Begin { wanted, commit_lsn, time, xid } => {
                self.open = Some(wanted);
                self.open_bytes = 0;
                self.on_begin(commit_lsn, time, xid);
            }
            Step::Ddl => return Box::pin(self.on_ddl()).await,
            Step::Withheld => self.on_withheld()?,
            Step::Commit { end, time } => return self.commit(end, time).await,
            Step::KeepAlive { end, clock, reply } => {
                self.link.received = self.link.received.max(end);
                if self.open.is_none() && !self.unfinished.in_block() {
                    self.link.bounds.lock().received(end);
                    self.session.asked = self.session.asked.max(Some(Ts(end)));
                    // Every transaction that ends at or before this position has been sent.
                    let newest = self.session.complete.map_or(self.session.resolved, |(ts, _)| ts);
                    self.session.complete = Some((newest.max(Ts(end)), WallTime(clock)));
                }
                if reply {
                    self.link.send_status(false).await?;
                }
            }
        }
        Ok(Some(()))
    }

    async fn commit(&mut self, end: Ts, time: WallTime) -> Result<Option<()>, Error> {
        self.link.received = self.link.received.max(end.0);
        self.link.bounds.lock().received(end.0);
        if self.open.take() != Some(true) {
            return Ok(Some(()));
        }
        self.keep_tables(end)?;
        if end <= self.resume {
            self.session.writer.abort();
            return Ok(Some(()));
        }
        self.judge_withheld()?;
        let commit = self.session.writer.commit(end, time);
        if self.link.hold(commit, &self.session.shutdown).await?.is_none() {
            return Ok(None);
        }
        self.session.asked = Some(end);
        self.session.complete = Some((end, time));
        if self.session.writer.unpublished_bytes() >= PUBLISH_BYTES {
            self.publish();
        }
        Ok(self.streams_again(end))
    }

    fn publish(&mut self) {
        self.last_publish = Instant::now();
        let counts = self.tables.take_counts();
        let progress = &self.session.progress;
        progress.log_rows.fetch_add(counts.rows, Ordering::Relaxed);
        progress.transactions.fetch_add(counts.transactions, Ordering::Relaxed);
        let received = self.link.conn.received();
        let before = std::mem::replace(&mut self.reported, received);
        progress.bytes.fetch_add(received - before, Ordering::Relaxed);
        progress.received.store(self.link.received, Ordering::Relaxed);
        self.session.metrics.rows.increment(counts.rows);
        if self.session.publish_complete() {
            self.session.metrics.resolved.increment(1);
        }
    }

    /// Confirms what is persisted and says good-bye: told to stop, or to be connected in another way.
    async fn stop(mut self) -> Ended {
        self.session.writer.abort();
        if let Err(error) = self.link.send_status(false).await {
            tracing::debug!(error = error.chain(), "cannot confirm at the end");
        }
        self.link.conn.close().await;
        self.otherwise.map_or(Ended::Shutdown, Ended::Otherwise)
    }
}
