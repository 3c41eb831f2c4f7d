//! The maintainer's and the API's way to upstreams: opens them, runs log readers, knows their progress.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use event::CopyError;
use heartbeatpb::config::ChangefeedInfo;
use heartbeatpb::{ChangefeedId, Gid, MaintainerEpoch, RunningError, TableSpan, Ts, WallTime, codes};
use logservice::event_store::Gate;
use logservice::upstream::{
    CheckReport, Entrance, FeedSpec, ReaderPhase, ReaderProgress, ReaderStart, StartPoint, Upstream,
};
use logservice::{CopyEnds, Ends, LogService};
use metrics::{Gauge, gauge};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::copies::Copies;
use crate::http::ApiFailure;
use crate::resync::{Means, Resyncs};

impl From<logservice::Error> for ApiFailure {
    fn from(error: logservice::Error) -> Self {
        ApiFailure::new(error.code(), error.chain())
    }
}

/// A reader that has been without its upstream for so long is told to people by the changefeed's state. A restart of
/// the upstream is over by then.
const ABSENCE: Duration = Duration::from_secs(10);
/// Pauses between attempts to list the tables of an upstream that does not answer: the first, and the longest.
const TABLES_AGAIN: Duration = Duration::from_millis(100);
const TABLES_AGAIN_MAX: Duration = Duration::from_secs(1);

/// One running log reader.
struct Reader {
    epoch: Option<MaintainerEpoch>,
    upstream: Arc<dyn Upstream>,
    spec: FeedSpec,
    tables: usize,
    /// Where it was started.
    checkpoint: Ts,
    /// What is known to be stored; nothing at first.
    persisted: watch::Sender<Ts>,
    progress: Arc<ReaderProgress>,
    error: Arc<Mutex<Option<RunningError>>>,
    /// When it was first seen to try again in vain.
    absent: Mutex<Option<Instant>>,
    shutdown: CancellationToken,
    task: JoinHandle<()>,
    /// Bytes of the log that the source has to keep, where positions are bytes.
    unconfirmed: Option<Gauge>,
    /// Tables that are copied again beside it.
    resyncs: Arc<Resyncs>,
}

impl Reader {
    /// What keeps the reader from its upstream, once it has lasted.
    fn absence(&self) -> Option<(&'static str, String)> {
        let problem =
            self.progress.last_failure().filter(|_| self.progress.phase() == ReaderPhase::Connecting);
        let mut absent = self.absent.lock();
        let Some(problem) = problem else {
            *absent = None;
            return None;
        };
        (absent.get_or_insert_with(Instant::now).elapsed() >= ABSENCE).then_some(problem)
    }
}

/// Opens upstreams and owns the log readers of this node.
///
/// A reader belongs to a maintainer epoch: a newer epoch replaces it, an older one is refused, so a
/// maintainer that lost its changefeed cannot confirm anything upstream.
pub(crate) struct UpstreamHub {
    node: heartbeatpb::NodeId,
    log: LogService,
    readers: Mutex<BTreeMap<Gid, Reader>>,
    /// Rows that were flushed downstream, by changefeed.
    written: Mutex<BTreeMap<Gid, Arc<AtomicU64>>>,
    /// Starting and stopping a reader awaits; one at a time for each changefeed keeps their order.
    transitions: Mutex<BTreeMap<Gid, Arc<tokio::sync::Mutex<()>>>>,
    /// Shows the oldest position that sources have to keep.
    oldest: Mutex<Option<[Gauge; 2]>>,
    /// The node may not read for anybody any more.
    fenced: CancellationToken,
    /// Ways of existing rows past the stream.
    copies: OnceLock<Copies>,
}

/// What a reader of this changefeed is asked for.
///
/// # Errors
/// When a filter rule is wrong.
pub(crate) fn feed_spec(
    info: &ChangefeedInfo,
    epoch: Option<MaintainerEpoch>,
) -> Result<FeedSpec, logservice::Error> {
    let config = &info.config;
    Ok(FeedSpec {
        changefeed: info.id.clone(),
        epoch,
        start_ts: info.start_ts,
        upstream_uri: info.upstream_info.as_ref().map(|upstream| upstream.uri.clone()).unwrap_or_default(),
        filter: Arc::new(logservice::TableFilter::new(&config.filter.rules, config.case_sensitive)?),
        publish: Arc::new(logservice::upstream::PublishRules::new(
            &config.filter.publish,
            config.case_sensitive,
        )?),
        force_replicate: config.force_replicate,
        ignore_ineligible: config.ignore_ineligible_table,
        initial_copy: config.initial_copy.enabled,
        copy_parallel: usize::try_from(config.initial_copy.parallel.max(1)).unwrap_or(1),
        copy_part_bytes: config.initial_copy.part_bytes,
        streaming: config.source.streaming,
        copy_target: None,
        copy_crew: None,
        entrance: None,
        ddl: config.ddl.clone(),
    })
}

impl UpstreamHub {
    /// This node.
    pub(crate) fn node(&self) -> &heartbeatpb::NodeId {
        &self.node
    }

    pub(crate) fn new(node: heartbeatpb::NodeId, log: LogService) -> Self {
        Self {
            node,
            log,
            readers: Mutex::default(),
            written: Mutex::default(),
            transitions: Mutex::default(),
            oldest: Mutex::default(),
            fenced: CancellationToken::new(),
            copies: OnceLock::new(),
        }
    }

    /// Existing rows go past the stream where they can. Told once, before the first reader starts.
    pub(crate) fn copy_with(&self, copies: Copies) {
        let told = self.copies.set(copies).is_ok();
        debug_assert!(told, "ways past the stream are told once");
    }

    pub(crate) fn open(&self, uri: &str) -> Result<Arc<dyn Upstream>, ApiFailure> {
        Ok(logservice::upstream::open(uri)?)
    }

    pub(crate) async fn check(&self, spec: &FeedSpec) -> Result<CheckReport, ApiFailure> {
        Ok(self.open(&spec.upstream_uri)?.check(spec).await?)
    }

    pub(crate) async fn current_position(&self, uri: &str) -> Result<StartPoint, ApiFailure> {
        Ok(self.open(uri)?.current_position().await?)
    }

    /// Newest complete position that the reader has seen.
    pub(crate) fn resolved(&self, changefeed: &ChangefeedId) -> Option<Ts> {
        self.log.resolved(changefeed).map(|(ts, _)| ts)
    }

    /// The counter of rows that a changefeed's sink has flushed.
    pub(crate) fn written(&self, changefeed: &ChangefeedId) -> Arc<AtomicU64> {
        Arc::clone(self.written.lock().entry(changefeed.gid).or_default())
    }

    /// Shows what sources have to keep, of the readers of this node.
    #[expect(clippy::cast_precision_loss, reason = "bytes and times for people")]
    pub(crate) fn measure(&self) {
        let mut oldest: Option<WallTime> = None;
        for reader in self.readers.lock().values() {
            let confirmed = reader.checkpoint.max(*reader.persisted.borrow());
            if let Some(gauge) = &reader.unconfirmed {
                let received = reader.progress.received.load(Ordering::Relaxed);
                gauge.set(received.saturating_sub(confirmed.0) as f64);
            }
            let time = self.log.time_of(&reader.spec.changefeed, confirmed);
            oldest = oldest.into_iter().chain(time).min();
        }
        *self.oldest.lock() = oldest.map(|oldest| {
            let gauges = [crate::metrics::SAFEPOINT, crate::metrics::MIN_SAFEPOINT].map(|name| gauge!(name));
            gauges.iter().for_each(|gauge| gauge.set(oldest.millis() as f64));
            gauges
        });
    }

    /// The tables of a changefeed that are copied again, and how its streams are held.
    ///
    /// # Errors
    /// When its log is not followed here now.
    pub(crate) fn resyncs(&self, changefeed: &ChangefeedId) -> Result<(Arc<Resyncs>, Gate), ApiFailure> {
        let later = |what: &str| {
            ApiFailure::new(
                codes::NOT_INITIALIZED,
                format!("{what}; ask again when it is, as `changefeed query` tells"),
            )
        };
        let readers = self.readers.lock();
        let reader = readers.get(&changefeed.gid).filter(|reader| !reader.shutdown.is_cancelled());
        let reader = reader.ok_or_else(|| later("the log of the changefeed is not being read"))?;
        match reader.progress.phase() {
            ReaderPhase::Streaming | ReaderPhase::WaitingForRoom => {}
            ReaderPhase::Copying => return Err(later("the initial copy of the changefeed is not complete")),
            ReaderPhase::Connecting | ReaderPhase::Stopped => {
                return Err(later("the log of the changefeed is not being read"));
            }
        }
        let gate =
            self.log.gate(changefeed).ok_or_else(|| later("the log of the changefeed is not being read"))?;
        Ok((Arc::clone(&reader.resyncs), gate))
    }

    /// Numbers for a live view.
    pub(crate) fn progress(&self, changefeed: &ChangefeedId) -> Value {
        let written = self.written.lock().get(&changefeed.gid).map_or(0, |rows| rows.load(Ordering::Relaxed));
        let stats = self.log.stats(changefeed).unwrap_or_default();
        let readers = self.readers.lock();
        let Some(reader) = readers.get(&changefeed.gid) else {
            return json!({ "rows_written": written });
        };
        let progress = &reader.progress;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        json!({
            "tables": reader.tables,
            "copy_tables_total": read(&progress.copy_tables_total),
            "copy_tables_done": read(&progress.copy_tables_done),
            "copy_rows": read(&progress.copy_rows),
            "copy": progress.copy.view(),
            "resync": reader.resyncs.view(),
            "entering": reader.resyncs.entering(),
            "rows_read": read(&progress.log_rows),
            "transactions": read(&progress.transactions),
            "rows_written": written,
            "connected": progress.connected.load(Ordering::Relaxed),
            "phase": format!("{:?}", progress.phase()),
            "reader_problem": progress.last_error(),
            "store_memory_bytes": stats.memory_bytes,
            "store_disk_bytes": stats.disk_bytes,
        })
    }

    fn running_error(&self, error: &logservice::Error) -> RunningError {
        RunningError {
            time: crate::wiring::rfc3339_now(),
            node: self.node.to_string(),
            code: error.code().to_owned(),
            message: error.chain(),
        }
    }

    async fn stop_reader(&self, gid: Gid, wanted: impl Fn(&Reader) -> bool) {
        let reader = {
            let mut readers = self.readers.lock();
            match readers.get(&gid) {
                Some(reader) if wanted(reader) => readers.remove(&gid),
                Some(_) | None => None,
            }
        };
        if let Some(reader) = reader {
            reader.shutdown.cancel();
            match reader.task.await {
                Err(error) if !error.is_cancelled() => {
                    tracing::error!(%error, "a log reader ended abnormally");
                }
                Ok(()) | Err(_) => {}
            }
        }
    }

    /// Ends every reader where it stands, without another word to its upstream: this node may have lost its
    /// changefeeds to others. Does not wait, and none starts any more.
    pub(crate) fn fence(&self) {
        self.fenced.cancel();
        for reader in self.readers.lock().values() {
            reader.shutdown.cancel();
            reader.task.abort();
        }
    }

    /// Stops every reader; the node is shutting down.
    pub(crate) async fn stop_all(&self) {
        let gids: Vec<Gid> = self.readers.lock().keys().copied().collect();
        for gid in gids {
            self.stop_reader(gid, |_| true).await;
        }
    }

    /// Waits for the turn to start or stop the reader of a changefeed.
    async fn turn(&self, gid: Gid) -> tokio::sync::OwnedMutexGuard<()> {
        let turn = {
            let mut transitions = self.transitions.lock();
            // Those that nobody holds or waits for.
            transitions.retain(|_, turn| Arc::strong_count(turn) > 1);
            Arc::clone(transitions.entry(gid).or_default())
        };
        turn.lock_owned().await
    }

    /// Starts a reader in the place of an older one. It finds its upstream by itself, however long that takes.
    async fn start_reader(
        &self,
        info: &ChangefeedInfo,
        epoch: Option<MaintainerEpoch>,
        checkpoint: Ts,
    ) -> Result<(), logservice::Error> {
        let mut spec = feed_spec(info, epoch)?;
        let upstream = logservice::upstream::open(&spec.upstream_uri)?;
        if let Some(copies) = self.copies.get() {
            spec.copy_target = copies.of(info, epoch, self.written(&info.id))?;
        }
        self.stop_reader(info.id.gid, |reader| reader.epoch <= epoch).await;
        let writer = self.log.open(&info.id, checkpoint)?;
        spec.copy_crew = self.log.crew(&info.id, info.to_json().into());
        // A maintainer may be started ahead of what is stored: nothing is confirmed before it is told to be.
        let (persisted, persisted_view) = watch::channel(Ts::ZERO);
        let progress = Arc::new(ReaderProgress::default());
        let error: Arc<Mutex<Option<RunningError>>> = Arc::default();
        let shutdown = CancellationToken::new();
        let start = ReaderStart { start_ts: info.start_ts, checkpoint };
        let gate = self.log.gate(&info.id);
        let resyncs = Arc::new(Resyncs::new(spec.copy_target.clone(), gate.clone()));
        spec.entrance = Some(Arc::clone(&resyncs) as Arc<dyn Entrance>);
        if let Some(gate) = gate {
            let means = Means {
                upstream: Arc::clone(&upstream),
                spec: FeedSpec { start_ts: info.start_ts, ..spec.clone() },
                gate,
                reader: Arc::clone(&progress),
            };
            let (resyncs, shutdown) = (Arc::clone(&resyncs), shutdown.clone());
            // It ends with the reader, and what it leaves behind its successor ends.
            tokio::spawn(async move { resyncs.run(means, shutdown).await });
        }
        let task = {
            let (progress, error, shutdown) = (Arc::clone(&progress), Arc::clone(&error), shutdown.clone());
            let (node, id) = (self.node.clone(), info.id.clone());
            let (upstream, spec) = (Arc::clone(&upstream), spec.clone());
            tokio::spawn(async move {
                let result =
                    upstream.run_reader(spec, start, writer, persisted_view, progress, shutdown).await;
                if let Err(failure) = result {
                    tracing::warn!(changefeedID = %id, errorCode = failure.code(), error = failure.chain(), "log reader stopped");
                    *error.lock() = Some(RunningError {
                        time: crate::wiring::rfc3339_now(),
                        node: node.to_string(),
                        code: failure.code().to_owned(),
                        message: failure.chain(),
                    });
                }
            })
        };
        let counts_bytes = spec.upstream_uri.trim_start().starts_with("postgres");
        let unconfirmed = counts_bytes.then(|| {
            let (namespace, name) = (info.id.keyspace.to_string(), info.id.name.to_string());
            gauge!(crate::metrics::UNCONFIRMED, "namespace" => namespace, "changefeed" => name)
        });
        let absent = Mutex::default();
        let reader = Reader {
            epoch,
            upstream,
            spec,
            tables: 0,
            checkpoint,
            persisted,
            progress,
            error,
            absent,
            shutdown,
            task,
            unconfirmed,
            resyncs,
        };
        self.readers.lock().insert(info.id.gid, reader);
        if self.fenced.is_cancelled() {
            // It began while the fence came down.
            self.fence();
        }
        Ok(())
    }

    /// The tables of a changefeed at its checkpoint: earlier changes of the schema do not come again. An upstream that
    /// does not answer is asked again for a while: it may be starting.
    async fn tables(
        &self,
        info: &ChangefeedInfo,
        epoch: Option<MaintainerEpoch>,
        checkpoint: Ts,
    ) -> Result<Vec<maintainer::SourceTable>, logservice::Error> {
        let spec = feed_spec(info, epoch)?;
        let upstream = logservice::upstream::open(&spec.upstream_uri)?;
        let there = FeedSpec { start_ts: spec.start_ts.max(checkpoint), ..spec };
        let (begun, mut pause) = (Instant::now(), TABLES_AGAIN);
        let tables = loop {
            match upstream.tables(&there).await {
                Ok(tables) => break tables,
                Err(error) if error.is_retryable() && begun.elapsed() < ABSENCE => {
                    tracing::debug!(changefeedID = %info.id, error = error.chain(), "the upstream does not list its tables");
                }
                Err(error) => return Err(error),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(TABLES_AGAIN_MAX);
        };
        if let Some(reader) = self.readers.lock().get_mut(&info.id.gid).filter(|reader| reader.epoch == epoch)
        {
            reader.tables = tables.len();
        }
        let source = |table: logservice::upstream::SourceTable| maintainer::SourceTable {
            id: table.info.id,
            schema_id: table.info.schema_id,
            schema: table.info.schema.clone(),
            name: table.info.name.clone(),
            splittable: table.splittable,
        };
        Ok(tables.into_iter().map(source).collect())
    }
}

/// The description that comes with an order is the changefeed's document, as the metadata store has it.
impl CopyEnds for UpstreamHub {
    fn open(&self, changefeed: &ChangefeedId, feed: &[u8]) -> Result<Ends, logservice::Error> {
        let unusable = |message: String| {
            logservice::Error::CopyTarget(CopyError {
                code: codes::LOG_READER_FAILED,
                message: format!("this node cannot write parts of a copy of another node: {message}"),
                retryable: false,
            })
        };
        let (info, _) = ChangefeedInfo::from_json(feed, &changefeed.keyspace, &changefeed.name)
            .map_err(|error| unusable(error.to_string()))?;
        let spec = feed_spec(&info, None)?;
        let copies = self.copies.get().ok_or_else(|| unusable("it has no downstreams".to_owned()))?;
        let target = copies.of(&info, None, self.written(&info.id))?;
        let target = target.ok_or_else(|| unusable("the downstream takes no existing rows".to_owned()))?;
        Ok(Ends { upstream: logservice::upstream::open(&spec.upstream_uri)?, target })
    }
}

#[async_trait]
impl maintainer::Upstream for UpstreamHub {
    async fn start(
        &self,
        info: &ChangefeedInfo,
        epoch: Option<MaintainerEpoch>,
        checkpoint: Ts,
    ) -> Result<Vec<maintainer::SourceTable>, RunningError> {
        {
            let _turn = self.turn(info.id.gid).await;
            if self.fenced.is_cancelled() {
                return Err(
                    self.running_error(&logservice::Error::Closed { what: "this node has lost its lease" })
                );
            }
            let newer = self.readers.lock().get(&info.id.gid).is_some_and(|reader| reader.epoch > epoch);
            if newer {
                let current = MaintainerEpoch::to_wire(epoch);
                return Err(self.running_error(&logservice::Error::Superseded { current }));
            }
            self.start_reader(info, epoch, checkpoint).await.map_err(|e| self.running_error(&e))?;
        }
        // While the reader is on its way to its place.
        match self.tables(info, epoch, checkpoint).await {
            Ok(tables) => Ok(tables),
            Err(error) => {
                maintainer::Upstream::stop(self, &info.id, epoch).await;
                Err(self.running_error(&error))
            }
        }
    }

    fn confirm(&self, changefeed: &ChangefeedId, epoch: Option<MaintainerEpoch>, persisted: Ts) {
        // A reader of a replaced epoch is told nothing more.
        if let Some(reader) = self.readers.lock().get(&changefeed.gid).filter(|reader| reader.epoch == epoch)
        {
            reader.persisted.send_if_modified(|known| {
                let newer = persisted > *known;
                *known = persisted.max(*known);
                newer
            });
        }
    }

    fn raise_floor(&self, changefeed: &ChangefeedId, epoch: Option<MaintainerEpoch>, floor: Ts) {
        // While the readers are held, no log of another epoch takes the place of this one.
        let readers = self.readers.lock();
        if readers.get(&changefeed.gid).is_some_and(|reader| reader.epoch == epoch) {
            self.log.raise_floor(changefeed, floor);
        }
    }

    async fn stop(&self, changefeed: &ChangefeedId, epoch: Option<MaintainerEpoch>) {
        let _turn = self.turn(changefeed.gid).await;
        let mine = self.readers.lock().get(&changefeed.gid).is_some_and(|reader| reader.epoch == epoch);
        if mine {
            self.stop_reader(changefeed.gid, |reader| reader.epoch == epoch).await;
            self.log.close(changefeed);
        }
    }

    fn error(&self, changefeed: &ChangefeedId, epoch: Option<MaintainerEpoch>) -> Option<RunningError> {
        let readers = self.readers.lock();
        let reader = readers.get(&changefeed.gid).filter(|reader| reader.epoch == epoch)?;
        reader.error.lock().clone()
    }

    fn trouble(&self, changefeed: &ChangefeedId, epoch: Option<MaintainerEpoch>) -> Option<RunningError> {
        let readers = self.readers.lock();
        let reader = readers.get(&changefeed.gid).filter(|reader| reader.epoch == epoch)?;
        let (code, message) = reader.absence()?;
        Some(RunningError {
            time: crate::wiring::rfc3339_now(),
            node: self.node.to_string(),
            code: code.to_owned(),
            message,
        })
    }

    async fn split_points(
        &self,
        changefeed: &ChangefeedId,
        epoch: Option<MaintainerEpoch>,
        span: &TableSpan,
        pieces: usize,
    ) -> Result<maintainer::SplitPoints, RunningError> {
        let reader = {
            let readers = self.readers.lock();
            let reader = readers.get(&changefeed.gid).filter(|reader| reader.epoch == epoch);
            reader.map(|reader| (Arc::clone(&reader.upstream), reader.spec.clone()))
        };
        let Some((upstream, spec)) = reader else { return Ok(maintainer::SplitPoints::default()) };
        let points = upstream.split_points(&spec, span, pieces).await;
        let logservice::upstream::SplitPoints { keys, rows, bytes } =
            points.map_err(|error| self.running_error(&error))?;
        Ok(maintainer::SplitPoints { keys, rows, bytes })
    }

    fn time_of(&self, changefeed: &ChangefeedId, ts: Ts) -> Option<WallTime> {
        self.log.time_of(changefeed, ts)
    }

    fn lag_seconds(&self, changefeed: &ChangefeedId, ts: Ts) -> Option<f64> {
        self.log.time_of(changefeed, ts).map(|time| time.seconds_until(WallTime::now()))
    }
}

#[async_trait]
impl coordinator::RetentionHook for UpstreamHub {
    async fn drop_retention(&self, info: &ChangefeedInfo) -> Result<(), String> {
        let uri = info.upstream_info.as_ref().map(|upstream| upstream.uri.clone()).unwrap_or_default();
        let upstream = logservice::upstream::open(&uri).map_err(|e| e.chain())?;
        upstream.drop_retention(&info.id).await.map_err(|e| e.chain())?;
        self.written.lock().remove(&info.id.gid);
        Ok(())
    }
}

impl coordinator::UpstreamClock for UpstreamHub {
    /// Wall time of a position of a changefeed that is read here.
    fn time_of(&self, changefeed: &ChangefeedId, ts: Ts) -> Option<WallTime> {
        self.log.time_of(changefeed, ts)
    }
}

#[cfg(test)]
mod tests;
