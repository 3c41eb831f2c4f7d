//! Measures what each stage of the data path costs a row change: reader, store, event service, wire, collector,
//! dispatchers, sink. Every stage has a thread of its own, whose processor time is read; rows come from a real server and
//! end in another one, or nowhere.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use async_trait::async_trait;
use clap::Parser;
use dispatcher_manager::{
    Bootstrapped, EventSource, HeartbeatCollector, ManagerContext, ManagerHandle, Routes, SinkFactory,
    WritePath,
};
use event::{BlockEvent, Datum, RowBatch, TableInfo, Tuple, TupleWriter};
use heartbeatpb::config::{DdlCapture, DdlConfig, DispatcherManagerConfig, ReplicaConfig};
use heartbeatpb::{
    ChangefeedId, DispatcherConfig, DispatcherId, MaintainerBootstrapRequest, MaintainerEpoch, Mode, NodeId,
    OperatorType, ScheduleAction, ScheduleDispatcherRequest, TableSpan, Ts, WallTime,
};
use logservice::event_store::{Store, StoreConfig};
use logservice::topic::{EventHead, SharedBatch, ToEventCollector};
use logservice::upstream::{self, FeedSpec, ReaderProgress, ReaderStart, StartPoint};
use logservice::{Collector, LogConfig, LogService, TableFilter};
use messaging::{
    HeartbeatCollectorTopic, Inbox, MaintainerManagerTopic, MessageCenter, MessagingConfig,
    ToHeartbeatCollector, ToMaintainerManager, WireMessage,
};
use parking_lot::Mutex;
use sink::{Flushed, Sink, SinkOptions, TableStart};
use testkit::Pair;
use testkit::figures::load;
use testkit::pair;
use testkit::plot::{self, Bar};
use testkit::process::thread_cpu_seconds;
use tokio::runtime::Handle;
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;

/// Row changes of one transaction of the backlog: three updates and an insert.
const CHANGES_PER_TRANSACTION: u64 = 4;
/// How long one round may take.
const LIMIT: Duration = Duration::from_secs(600);
/// Bytes of batches that are kept for the stages that are measured by themselves. Not many: memory that is kept is not
/// used again, and what nobody has used before costs more.
const KEPT_BYTES: usize = 16 << 20;
/// How often the stages that are measured by themselves take what was kept.
const TIMES: u32 = 16;
/// Rows that are in the store at most.
const STORE_BYTES: usize = 256 << 20;
/// Room of the receiver, as a node has it.
const QUOTA: usize = 64 << 20;

/// Measures what each stage costs a row change.
#[derive(Parser, Debug)]
#[command(name = "scale")]
struct Arguments {
    /// Transactions of the backlog: three updates and an insert each.
    #[arg(long, default_value_t = 250_000)]
    transactions: u64,
    /// How often the backlog is taken through all stages.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=9))]
    rounds: u64,
    /// Where rows end: `postgres`, or `blackhole`.
    #[arg(long, default_value = "postgres", value_parser = ["postgres", "blackhole"])]
    sink: String,
    /// Draws the costs into a file, as SVG.
    #[arg(long)]
    plot: Option<PathBuf>,
    /// A small backlog, once: whether the program works.
    #[arg(long)]
    quick: bool,
}

/// What a stage has cost.
#[derive(Clone, Debug)]
struct Cost {
    stage: &'static str,
    cpu_seconds: f64,
    changes: u64,
    /// Bytes that leave the stage, if it makes any.
    bytes: u64,
}

impl Cost {
    /// Of a change.
    #[expect(clippy::cast_precision_loss, reason = "counts of changes")]
    fn nanoseconds(&self) -> f64 {
        self.cpu_seconds / self.changes.max(1) as f64 * 1e9
    }
}

fn main() -> ExitCode {
    let mut arguments = Arguments::parse();
    if arguments.quick {
        (arguments.transactions, arguments.rounds) = (5_000, 1);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    match runtime.map_err(Into::into).and_then(|runtime| runtime.block_on(run(&arguments))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: &Arguments) -> Result<()> {
    let pair = Pair::start(pair::Tables::Pgbench(10), "on").await?;
    let uri = format!("{}?sslmode=disable", pair.source.uri("postgres"));
    let source = upstream::open(&uri)?;
    let mut feeds = Vec::new();
    for round in 0..arguments.rounds {
        let spec = spec(&uri, round)?;
        let start = source.create_retention(&spec, None).await?;
        pair.database(&format!("scale_{round}")).await?;
        feeds.push((spec, start));
    }
    let each = (arguments.transactions / 4).max(1);
    pair::pgbench(&pair.source, "postgres", &["-n", "-M", "prepared", "-c", "4", "-t", &each.to_string()])
        .await?;
    let end = Ts(pair.finish(1).await?);
    let mut rounds: Vec<Vec<Cost>> = Vec::new();
    for (round, (spec, start)) in feeds.into_iter().enumerate() {
        let database = format!("scale_{round}");
        let target = match arguments.sink.as_str() {
            "postgres" => format!("{}?sslmode=disable", pair.target.uri(&database)),
            _ => "blackhole://".to_owned(),
        };
        pair.target.sql("postgres", "CHECKPOINT").await?;
        let costs = Run { spec, start, end, target }.all_stages().await?;
        let fewest = each * 4 * CHANGES_PER_TRANSACTION;
        ensure!(
            costs.iter().all(|cost| cost.stage != "sink" || cost.changes >= fewest),
            "changes are missing"
        );
        if arguments.sink == "postgres" {
            pair.require_equal(&database).await?;
        }
        println!("round {}   load {}", round + 1, load());
        costs.iter().for_each(print_cost);
        rounds.push(costs);
    }
    println!("medians");
    let mut bars = Vec::new();
    for (at, cost) in rounds.first().into_iter().flatten().enumerate() {
        let mut same: Vec<&Cost> = rounds.iter().filter_map(|costs| costs.get(at)).collect();
        same.sort_by(|one, other| one.cpu_seconds.total_cmp(&other.cpu_seconds));
        let median = same.get(same.len() / 2).copied().unwrap_or(cost);
        print_cost(median);
        let value = median.nanoseconds();
        bars.push(Bar { name: cost.stage.to_owned(), value, text: format!("{value:.0} ns"), colour: 1 });
    }
    if let Some(path) = &arguments.plot {
        plot::save(path, plot::bars("Processor time of a row change, by stage", &bars))?;
    }
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "rates for people")]
fn print_cost(cost: &Cost) {
    let Cost { stage, cpu_seconds, changes, bytes } = cost;
    let per_second = *changes as f64 / cpu_seconds.max(0.01);
    let each = cost.nanoseconds();
    let bytes = *bytes as f64 / (*changes).max(1) as f64;
    println!(
        "{stage:12} {cpu_seconds:7.2} s  {each:7.0} ns/change  {per_second:11.0} changes/cpu-second  {bytes:6.1} bytes/change"
    );
}

fn spec(uri: &str, round: u64) -> Result<FeedSpec> {
    Ok(FeedSpec {
        changefeed: ChangefeedId::fresh(&format!("scale-{round}")),
        epoch: None,
        start_ts: Ts::ZERO,
        upstream_uri: uri.to_owned(),
        publish: Arc::default(),
        filter: Arc::new(TableFilter::new(&["*.*"], true)?),
        force_replicate: true,
        ignore_ineligible: false,
        initial_copy: false,
        copy_parallel: 1,
        copy_part_bytes: 64 << 20,
        streaming: true,
        copy_target: None,
        copy_crew: None,
        entrance: None,
        ddl: DdlConfig { capture: DdlCapture::Off, ..DdlConfig::default() },
    })
}

/// A thread with a runtime of its own, which has the name of a stage.
struct Stage {
    name: &'static str,
    handle: Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

fn thread_name(stage: &str) -> String {
    format!("st-{stage}")
}

impl Stage {
    fn new(name: &'static str) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::Builder::new().name(thread_name(name)).spawn(move || {
            // Ends when the sender is dropped, too.
            let _ = runtime.block_on(stopped);
            runtime.shutdown_timeout(Duration::from_secs(1));
        })?;
        Ok(Self { name, handle, stop: Some(stop), thread: Some(thread) })
    }

    /// Runs something on the thread and waits for it.
    async fn run<T: Send + 'static>(&self, task: impl Future<Output = T> + Send + 'static) -> Result<T> {
        self.handle.spawn(task).await.with_context(|| format!("the stage {}", self.name))
    }

    /// Processor time of the thread so far, in seconds.
    fn cpu_seconds(&self) -> Result<f64> {
        thread_cpu_seconds(&thread_name(self.name))
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic was told where it happened.
            let _ = thread.join();
        }
    }
}

/// A sink on a thread of its own, which keeps some of the batches that it takes.
struct Elsewhere {
    sink: Arc<dyn Sink>,
    handle: Handle,
    kept: Mutex<(Vec<RowBatch>, usize)>,
    changes: AtomicU64,
}

#[async_trait]
impl Sink for Elsewhere {
    async fn run(&self, shutdown: CancellationToken) -> Result<(), sink::Error> {
        let sink = Arc::clone(&self.sink);
        self.handle.spawn(async move { sink.run(shutdown).await }).await.unwrap_or(Err(sink::Error::Closed))
    }

    fn healthy(&self) -> bool {
        self.sink.healthy()
    }

    async fn open_dispatcher(
        &self,
        dispatcher: DispatcherId,
        span: &TableSpan,
        start_ts: Ts,
    ) -> Result<TableStart, sink::Error> {
        self.sink.open_dispatcher(dispatcher, span, start_ts).await
    }

    async fn open_table(&self, dispatcher: DispatcherId, table: &TableInfo) -> Result<(), sink::Error> {
        self.sink.open_table(dispatcher, table).await
    }

    fn write_rows(&self, dispatcher: DispatcherId, batch: RowBatch, flushed: Flushed) {
        self.changes.fetch_add(batch.row_count(), Ordering::Relaxed);
        let mut kept = self.kept.lock();
        if kept.1 < KEPT_BYTES {
            kept.1 += batch.bytes();
            kept.0.push(batch.clone());
        }
        drop(kept);
        self.sink.write_rows(dispatcher, batch, flushed);
    }

    async fn flush_before_block(&self, dispatcher: DispatcherId) -> Result<(), sink::Error> {
        self.sink.flush_before_block(dispatcher).await
    }

    async fn write_block_event(&self, event: &BlockEvent) -> Result<(), sink::Error> {
        self.sink.write_block_event(event).await
    }

    fn publish_checkpoint(&self, checkpoint: Ts, time: WallTime) {
        self.sink.publish_checkpoint(checkpoint, time);
    }

    fn close_dispatcher(&self, dispatcher: DispatcherId) {
        self.sink.close_dispatcher(dispatcher);
    }

    async fn forget_changefeed(&self) -> Result<(), sink::Error> {
        self.sink.forget_changefeed().await
    }

    fn wants_checkpoints(&self) -> bool {
        self.sink.wants_checkpoints()
    }
}

struct One(Arc<Elsewhere>);

#[async_trait]
impl SinkFactory for One {
    async fn create(&self, _: &DispatcherManagerConfig) -> Result<Arc<dyn Sink>, sink::Error> {
        Ok(Arc::clone(&self.0) as Arc<dyn Sink>)
    }
}

/// One way of the backlog through all stages.
struct Run {
    spec: FeedSpec,
    start: StartPoint,
    end: Ts,
    target: String,
}

impl Run {
    async fn all_stages(&self) -> Result<Vec<Cost>> {
        let (mut costs, kept) = self.together().await?;
        let changes = u64::from(TIMES) * kept.iter().map(RowBatch::row_count).sum::<u64>();
        let store = Stage::new("store")?;
        let batches = kept.clone();
        let stored = store.run(store_again(batches)).await??;
        costs.insert(1, Cost { stage: "store", cpu_seconds: store.cpu_seconds()?, changes, bytes: stored });
        let wire = Stage::new("wire")?;
        let sent = wire.run(async move { over_the_wire(&kept) }).await??;
        costs.insert(3, Cost { stage: "wire", cpu_seconds: wire.cpu_seconds()?, changes, bytes: sent });
        Ok(costs)
    }

    /// Reader to sink, all at the same time.
    async fn together(&self) -> Result<(Vec<Cost>, Vec<RowBatch>)> {
        let names = ["reader", "service", "collector", "dispatcher", "sink"];
        let stages = names.into_iter().map(Stage::new).collect::<Result<Vec<_>>>()?;
        let [reading, serving, collecting, dispatching, sinking] = &stages[..] else { bail!("five stages") };
        let dir = tempfile::Builder::new().prefix("millrace-scale-").tempdir()?;
        let center = MessageCenter::new(NodeId::from("scale"), MessagingConfig::default());
        let mut maintainer = center.register::<MaintainerManagerTopic>(65_536);
        let shutdown = CancellationToken::new();
        let log = LogService::new(center.clone(), log_config(dir.path().join("log")));
        let writer = log.open(&self.spec.changefeed, self.start.start_ts)?;
        let service = log.clone();
        let stop = shutdown.clone();
        drop(serving.handle.spawn(async move { service.run(stop).await }));
        let (collector, collector_handle) = Collector::new(center.clone());
        drop(collecting.handle.spawn(collector.run(shutdown.clone())));

        let options = SinkOptions::new(self.spec.changefeed.clone(), dir.path().join("sink"));
        let target = self.target.clone();
        let sink = sinking.run(async move { sink::open(&target, &options).await }).await??;
        let elsewhere = Arc::new(Elsewhere {
            sink,
            handle: sinking.handle.clone(),
            kept: Mutex::default(),
            changes: AtomicU64::new(0),
        });
        let tables = upstream::open(&self.spec.upstream_uri)?.tables(&self.spec).await?;
        let manager = self.manager(dispatching, &center, collector_handle, &elsewhere).await?;
        for (n, table) in (1..).zip(&tables) {
            self.schedule(&center, n, table).await?;
        }
        let before = stages.iter().map(Stage::cpu_seconds).collect::<Result<Vec<_>>>()?;
        let (persisted, receiver) = watch::channel(self.start.start_ts);
        let progress = Arc::new(ReaderProgress::default());
        let reader = reading.handle.spawn({
            let (spec, progress, shutdown) = (self.spec.clone(), Arc::clone(&progress), shutdown.clone());
            let start = ReaderStart { start_ts: self.start.start_ts, checkpoint: self.start.start_ts };
            let source = upstream::open(&self.spec.upstream_uri)?;
            async move { source.run_reader(spec, start, writer, receiver, progress, shutdown).await }
        });
        self.until_checkpoint(&mut maintainer, &log, &persisted).await?;
        let after = stages.iter().map(Stage::cpu_seconds).collect::<Result<Vec<_>>>()?;
        let changes = elsewhere.changes.load(Ordering::Relaxed);
        let costs = names.into_iter().zip(before.iter().zip(&after));
        let costs = costs.map(|(stage, (before, after))| Cost {
            stage,
            cpu_seconds: after - before,
            changes,
            bytes: 0,
        });
        let costs = costs.collect();
        dispatching.run(async move { manager.shut_down().await }).await?;
        shutdown.cancel();
        // Its connection ends with it.
        let _ = tokio::time::timeout(Duration::from_secs(5), reader).await;
        log.close(&self.spec.changefeed);
        let kept = std::mem::take(&mut elsewhere.kept.lock().0);
        Ok((costs, kept))
    }

    async fn manager(
        &self,
        stage: &Stage,
        center: &MessageCenter,
        collector: logservice::CollectorHandle,
        sink: &Arc<Elsewhere>,
    ) -> Result<ManagerHandle> {
        let routes = Routes::default();
        let context = ManagerContext {
            center: center.clone(),
            source: Arc::new(collector) as Arc<dyn EventSource>,
            sinks: Arc::new(One(Arc::clone(sink))),
            routes: routes.clone(),
        };
        let config = DispatcherManagerConfig {
            changefeed: self.spec.changefeed.clone(),
            sink_uri: self.target.clone(),
            config: ReplicaConfig { memory_quota: QUOTA as u64, ..ReplicaConfig::default() },
            start_ts: self.start.start_ts,
            target_ts: Ts::ZERO,
            epoch: MaintainerEpoch::from_wire(1),
        };
        let request = MaintainerBootstrapRequest {
            changefeed: self.spec.changefeed.clone(),
            config: config.to_bytes(),
            start_ts: self.start.start_ts,
            trigger: None,
            is_new: true,
            redo_trigger: None,
            keyspace_id: 0,
            epoch: MaintainerEpoch::from_wire(1),
        };
        let (center, node) = (center.clone(), center.node().clone());
        let made = stage.run(async move {
            tokio::spawn(HeartbeatCollector::new(&center, routes).run(CancellationToken::new()));
            let manager =
                ManagerHandle::create(context, WritePath::default(), config, &node, &request).await?;
            match manager.bootstrap(node, request, true).await {
                Bootstrapped::Answer(_) => Ok(manager),
                Bootstrapped::Failed(_) | Bootstrapped::Silent | Bootstrapped::Closed => {
                    bail!("the manager did not answer")
                }
            }
        });
        made.await?
    }

    async fn schedule(&self, center: &MessageCenter, n: u64, table: &upstream::SourceTable) -> Result<()> {
        let request = ToHeartbeatCollector::Schedule(ScheduleDispatcherRequest {
            changefeed: self.spec.changefeed.clone(),
            config: DispatcherConfig {
                span: TableSpan::whole(table.info.id),
                start_ts: self.start.start_ts,
                dispatcher: DispatcherId::new(1, n),
                schema: table.info.schema_id,
                mode: Mode::Default,
                skip_dml_at_start: false,
            },
            action: ScheduleAction::Create,
            operator: OperatorType::Add,
            epoch: MaintainerEpoch::from_wire(1),
        });
        let began = Instant::now();
        while center.send::<HeartbeatCollectorTopic>(center.node(), request.clone()).is_err() {
            ensure!(began.elapsed() < LIMIT, "nobody takes the tables");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    }

    /// Until everything is applied. What was applied is forgotten upstream, as when it was persisted.
    async fn until_checkpoint(
        &self,
        maintainer: &mut Inbox<MaintainerManagerTopic>,
        log: &LogService,
        persisted: &watch::Sender<Ts>,
    ) -> Result<()> {
        let began = Instant::now();
        loop {
            let inbound = tokio::time::timeout(LIMIT.saturating_sub(began.elapsed()), maintainer.recv());
            let inbound = inbound.await.context("the backlog takes too long")?.context("nobody is there")?;
            let ToMaintainerManager::HeartBeat(beat) = inbound.message else { continue };
            if let Some(error) = beat.error {
                bail!("{}: {}", error.code, error.message);
            }
            let Some(watermark) = beat.watermark else { continue };
            log.raise_floor(&self.spec.changefeed, watermark.checkpoint);
            persisted.send_replace(watermark.checkpoint);
            if watermark.checkpoint >= self.end {
                return Ok(());
            }
        }
    }
}

fn log_config(dir: PathBuf) -> LogConfig {
    LogConfig { dir, memory_bytes: STORE_BYTES, disk_bytes: 1 << 36 }
}

/// Puts batches into a store as a reader does. Answers their bytes.
async fn store_again(batches: Vec<RowBatch>) -> Result<u64> {
    let dir = tempfile::Builder::new().prefix("millrace-scale-").tempdir()?;
    let config =
        StoreConfig { dir: dir.path().join("store"), memory_bytes: STORE_BYTES, disk_bytes: 1 << 36 };
    let (store, mut writer) = Store::open(ChangefeedId::fresh("store"), config, Ts(1), Arc::default())?;
    let (mut ts, mut bytes) = (1, 0);
    for batch in (0..TIMES).flat_map(|_| &batches) {
        writer.register_table(Arc::clone(&batch.table));
        let mut open = None;
        for row in batch.iter() {
            if open != Some(row.txn.commit_ts) {
                if open.is_some() {
                    ts += 1;
                    writer.commit(Ts(ts), WallTime(0)).await?;
                }
                writer.begin(Ts(ts));
                open = Some(row.txn.commit_ts);
            }
            let put = |image: Option<Tuple<'_>>, out: &mut bytes::BytesMut| {
                let mut tuple = TupleWriter::new(out);
                image
                    .into_iter()
                    .flat_map(|image| image.iter())
                    .for_each(|datum: Datum<'_>| tuple.push(datum));
                tuple.finish();
            };
            let (mut old, mut new) = (
                |out: &mut bytes::BytesMut| put(row.old, out),
                |out: &mut bytes::BytesMut| put(row.new, out),
            );
            writer.row(
                batch.table.id,
                row.op,
                row.old.is_some().then_some(&mut old as _),
                row.new.is_some().then_some(&mut new as _),
            )?;
        }
        ts += 1;
        writer.commit(Ts(ts), WallTime(0)).await?;
        writer.publish(Ts(ts), WallTime(0));
        // As when it was applied.
        store.trim(batch.table.id, Ts(ts), None);
        bytes += batch.bytes() as u64;
    }
    store.close();
    Ok(bytes)
}

/// Turns batches into messages and back. Answers the bytes of the messages.
fn over_the_wire(batches: &[RowBatch]) -> Result<u64> {
    let gid = ChangefeedId::fresh("wire").gid;
    let (mut bytes, mut out) = (0, Vec::new());
    for (seq, batch) in (1..).zip((0..TIMES).flat_map(|_| batches)) {
        let head = EventHead { changefeed: gid, dispatcher: DispatcherId::new(1, 1), epoch: 1, seq };
        let message = ToEventCollector::Rows { head, batch: SharedBatch(batch.clone()) };
        out.clear();
        message.encode(&mut out);
        bytes += out.len() as u64;
        let back = ToEventCollector::decode(message.io_type(), &out)?;
        ensure!(matches!(back, ToEventCollector::Rows { .. }), "a message came back as another one");
    }
    Ok(bytes)
}
