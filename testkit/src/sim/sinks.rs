//! A node's sinks: they hand rows to the simulated database, which takes its time.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use dispatcher_manager::SinkFactory;
use event::{BlockEvent, Datum, RowBatch, RowOp, TableInfo};
use heartbeatpb::config::{ChangefeedInfo, DispatcherManagerConfig};
use heartbeatpb::{
    DispatcherId, Gid, MaintainerEpoch, NodeId, RunningError, TableSpan, Ts, WallTime, WritePermit, codes,
};
use maintainer::{DownstreamFence, FenceOutcome, Whom};
use sink::{Flushed, Sink, TableStart};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::feed::{Change, Wrong};
use super::world::{Shared, World};

/// How often a sink looks whether its rows are durable.
const LOOK: Duration = Duration::from_millis(10);

/// How long opening a sink waits for the permit to write.
const PATIENCE: Duration = Duration::from_secs(10);

/// Makes the sinks of one node.
pub(super) struct Sinks {
    pub(super) node: NodeId,
    pub(super) world: Shared,
    pub(super) permit: WritePermit,
}

#[async_trait]
impl SinkFactory for Sinks {
    async fn create(&self, config: &DispatcherManagerConfig) -> Result<Arc<dyn Sink>, sink::Error> {
        if tokio::time::timeout(PATIENCE, self.permit.granted()).await.is_err() {
            return Err(gone());
        }
        let latency = latency(&mut self.world.lock(), &self.node, 60);
        tokio::time::sleep(latency).await;
        let mut world = self.world.lock();
        if fails(&world, &self.node) {
            return Err(gone());
        }
        world.sessions += 1;
        let (sink, gid) = (world.sessions, config.changefeed.gid);
        let mut wrong = Wrong::new();
        let World { feeds, random, .. } = &mut *world;
        let feed = feeds.get_mut(&gid).ok_or_else(gone)?;
        let registered = feed.register((&self.node, sink), config.epoch, random, &mut wrong);
        world.all_violated(wrong);
        if !registered {
            return Err(fenced());
        }
        drop(world);
        let (node, world, permit) = (self.node.clone(), Arc::clone(&self.world), self.permit.clone());
        Ok(Arc::new(SimSink { node, world, permit, gid, sink, broken: watch::channel(false).0 }))
    }
}

fn gone() -> sink::Error {
    sink::Error::Unavailable { what: "the target does not answer".to_owned(), source: None }
}

fn fenced() -> sink::Error {
    sink::Error::Fenced { what: "this sink may not write any more".to_owned() }
}

fn fails(world: &World, node: &NodeId) -> bool {
    world.processes.get(node).is_none_or(|process| process.sink_fails_until > world.now)
}

/// How long the target takes for something, `most` milliseconds when it is well.
fn latency(world: &mut World, node: &NodeId, most: u64) -> Duration {
    Duration::from_millis(world.random.between(1, most) + world.sink_slowness(node))
}

/// A node's way to have others fenced.
pub(super) struct Fences {
    pub(super) node: NodeId,
    pub(super) world: Shared,
    pub(super) permit: WritePermit,
}

#[async_trait]
impl DownstreamFence for Fences {
    fn applies_to(&self, _info: &ChangefeedInfo) -> bool {
        true
    }

    async fn fence(
        &self,
        info: &ChangefeedInfo,
        epoch: Option<MaintainerEpoch>,
        newest: Option<MaintainerEpoch>,
        whom: &Whom,
    ) -> Result<FenceOutcome, RunningError> {
        self.permit.granted().await;
        let latency = latency(&mut self.world.lock(), &self.node, 60);
        tokio::time::sleep(latency).await;
        let refused = |code: &str, message: &str| RunningError {
            time: String::new(),
            node: self.node.to_string(),
            code: code.to_owned(),
            message: message.to_owned(),
        };
        let mut world = self.world.lock();
        if fails(&world, &self.node) {
            return Err(refused(codes::SINK_UNAVAILABLE, "the target does not answer"));
        }
        let mut wrong = Wrong::new();
        let World { feeds, random, .. } = &mut *world;
        let fenced = feeds
            .get_mut(&info.id.gid)
            .and_then(|feed| feed.fence((epoch, newest), whom, random, &mut wrong));
        world.note(format!("{}: fences {whom:?} as {epoch:?}: {fenced:?}", self.node));
        world.all_violated(wrong);
        fenced.ok_or_else(|| refused(codes::SINK_FENCED, "a newer maintainer has fenced already"))
    }
}

struct SimSink {
    node: NodeId,
    world: Shared,
    permit: WritePermit,
    gid: Gid,
    sink: u64,
    broken: watch::Sender<bool>,
}

impl SimSink {
    fn holder(&self, dispatcher: DispatcherId) -> (NodeId, u64, DispatcherId) {
        (self.node.clone(), self.sink, dispatcher)
    }

    async fn answer(&self) -> Result<(), sink::Error> {
        let latency = latency(&mut self.world.lock(), &self.node, 40);
        tokio::time::sleep(latency).await;
        let broken = *self.broken.borrow() || fails(&self.world.lock(), &self.node);
        if broken {
            self.broken.send_replace(true);
            return Err(gone());
        }
        if self.may_write() {
            return Ok(());
        }
        self.broken.send_replace(true);
        Err(fenced())
    }

    /// Whether the target takes something from this sink.
    fn may_write(&self) -> bool {
        self.world.lock().feeds.get(&self.gid).is_some_and(|feed| feed.may_write(self.sink))
    }
}

fn key_of(row: &event::RowChange<'_>) -> Option<u64> {
    let image = row.new.or(row.old)?;
    let Datum::Text(text) = image.get(0)? else { return None };
    std::str::from_utf8(text).ok()?.parse().ok()
}

#[async_trait]
impl Sink for SimSink {
    async fn run(&self, shutdown: CancellationToken) -> Result<(), sink::Error> {
        let mut broken = self.broken.subscribe();
        let mut look = tokio::time::interval(LOOK * 20);
        let result = loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break Ok(()),
                _ = broken.wait_for(|broken| *broken) => {
                    break Err(if self.may_write() { gone() } else { fenced() });
                }
                _ = look.tick() => {
                    let world = self.world.lock();
                    let refused = world.feeds.get(&self.gid).is_some_and(|feed| feed.has_refused(self.sink));
                    if refused || fails(&world, &self.node) {
                        self.broken.send_replace(true);
                    }
                }
            }
        };
        let mut guard = self.world.lock();
        let refused = fails(&guard, &self.node);
        let World { feeds, random, .. } = &mut *guard;
        let mut wrong = Wrong::new();
        if let Some(feed) = feeds.get_mut(&self.gid) {
            feed.retire(self.sink, refused, random, &mut wrong);
        }
        guard.all_violated(wrong);
        result
    }

    fn healthy(&self) -> bool {
        !*self.broken.borrow()
    }

    async fn open_dispatcher(
        &self,
        dispatcher: DispatcherId,
        span: &TableSpan,
        start_ts: Ts,
    ) -> Result<TableStart, sink::Error> {
        self.answer().await?;
        let mut world = self.world.lock();
        world.sessions += 1;
        let number = world.sessions;
        let feed = world.feeds.get_mut(&self.gid).ok_or_else(gone)?;
        let (start, skip) = feed.open(number, self.holder(dispatcher), span.table.0, start_ts.0);
        let text = format!(
            "{}: session {number} of table {} ({dispatcher:?}) asked from {start_ts}, starts at {start}",
            self.node, span.table.0
        );
        world.note(text);
        Ok(TableStart { start_ts: Ts(start), skip_dml_at_start: skip })
    }

    async fn open_table(&self, _dispatcher: DispatcherId, _table: &TableInfo) -> Result<(), sink::Error> {
        self.permit.granted().await;
        self.answer().await
    }

    fn write_rows(&self, dispatcher: DispatcherId, batch: RowBatch, flushed: Flushed) {
        let changes: Vec<Change> = batch
            .iter()
            .filter_map(|row| {
                let key = key_of(&row)?;
                Some(Change { ts: row.txn.commit_ts.0, key, deleted: row.op == RowOp::Delete })
            })
            .collect();
        if *self.broken.borrow() {
            return;
        }
        let mut world = self.world.lock();
        let starts = world.now + world.random.between(0, 20);
        let due = starts + world.random.between(1, 40) + world.sink_slowness(&self.node);
        let holder = self.holder(dispatcher);
        let Some(feed) = world.feeds.get_mut(&self.gid) else { return };
        if !feed.may_write(self.sink) {
            // It learns of it by what it writes, and not before.
            self.broken.send_replace(true);
        } else if !feed.write(&holder, (starts, due), changes, flushed) {
            let text = format!("{} writes rows of {dispatcher:?}, which is not open there", self.node);
            world.violated("OPEN", &text);
        }
    }

    async fn flush_before_block(&self, dispatcher: DispatcherId) -> Result<(), sink::Error> {
        let holder = self.holder(dispatcher);
        loop {
            if *self.broken.borrow() {
                return Err(gone());
            }
            let durable = self.world.lock().feeds.get(&self.gid).and_then(|feed| feed.is_durable(&holder));
            match durable {
                None => return Err(gone()),
                Some(true) => return Ok(()),
                Some(false) => {}
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn write_block_event(&self, event: &BlockEvent) -> Result<(), sink::Error> {
        self.permit.granted().await;
        self.answer().await?;
        let BlockEvent::Ddl(ddl) = event else {
            return Err(sink::Error::Config("there are no sync points here".to_owned()));
        };
        {
            let mut world = self.world.lock();
            let mut wrong = Wrong::new();
            let feed = world.feeds.get_mut(&self.gid).filter(|feed| feed.may_write(self.sink));
            feed.ok_or_else(fenced)?.execute(ddl, &mut wrong);
            let text = format!("{}: executes {} at {}", self.node, ddl.query, ddl.commit_ts);
            world.note(text);
            world.all_violated(wrong);
        }
        self.answer().await
    }

    fn publish_checkpoint(&self, _checkpoint: Ts, _time: WallTime) {}

    fn close_dispatcher(&self, dispatcher: DispatcherId) {
        if let Some(feed) = self.world.lock().feeds.get_mut(&self.gid) {
            feed.close(&self.holder(dispatcher));
        }
    }

    async fn forget_changefeed(&self) -> Result<(), sink::Error> {
        Ok(())
    }

    fn wants_checkpoints(&self) -> bool {
        false
    }
}
