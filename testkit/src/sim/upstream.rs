//! What a node's maintainers see of the upstream: a log reader that belongs to the newest epoch.

use std::time::Duration;

use async_trait::async_trait;
use heartbeatpb::config::ChangefeedInfo;
use heartbeatpb::{
    ChangefeedId, MaintainerEpoch, NodeId, RunningError, SchemaId, TableId, TableSpan, Ts, WallTime,
    WritePermit,
};
use maintainer::{SourceTable, SplitPoints, Upstream};

use super::feed::{KEYS, Kept, Reader};
use super::world::Shared;

/// How long a log reader waits for the permit to take the log over.
const PATIENCE: Duration = Duration::from_secs(10);

/// A node's upstreams.
pub(super) struct Hub {
    pub(super) node: NodeId,
    pub(super) world: Shared,
    /// A node whose lease is in doubt takes no log over and confirms nothing.
    pub(super) permit: WritePermit,
}

impl Hub {
    fn failure(&self, code: &str, message: &str) -> RunningError {
        RunningError {
            time: String::new(),
            node: self.node.to_string(),
            code: code.to_owned(),
            message: message.to_owned(),
        }
    }
}

#[async_trait]
impl Upstream for Hub {
    async fn start(
        &self,
        info: &ChangefeedInfo,
        epoch: Option<MaintainerEpoch>,
        checkpoint: Ts,
    ) -> Result<Vec<SourceTable>, RunningError> {
        if tokio::time::timeout(PATIENCE, self.permit.granted()).await.is_err() {
            return Err(self.failure("CDC:ErrUpstreamUnreachable", "the lease of this node is not confirmed"));
        }
        let latency = self.world.lock().random.between(1, 150);
        tokio::time::sleep(Duration::from_millis(latency)).await;
        let mut world = self.world.lock();
        if world.processes.get(&self.node).is_none_or(|process| process.lost) {
            return Err(self.failure("CDC:ErrUpstreamUnreachable", "this process has lost its lease"));
        }
        let Some(feed) = world.feeds.get_mut(&info.id.gid) else {
            return Err(self.failure("CDC:ErrUpstreamUnreachable", "there is no such database"));
        };
        if feed.reader.as_ref().is_some_and(|reader| reader.epoch > epoch) {
            return Err(self.failure("CDC:ErrLogReaderFailed", "a newer maintainer reads the log"));
        }
        let retained = feed.retained;
        feed.reader = Some(Reader { node: self.node.clone(), epoch });
        feed.kept = Kept::begin_at(checkpoint.0);
        let tables = feed
            .tables
            .values()
            .filter(|table| table.lives_at(checkpoint.0))
            .map(|table| SourceTable {
                id: TableId(table.id),
                schema_id: SchemaId(table.schema_at(checkpoint.0)),
                schema: format!("s{}", table.schema_at(checkpoint.0)),
                name: format!("t{}", table.id),
                splittable: true,
            })
            .collect();
        let text = format!("{}: reads the log of {} from {checkpoint} as {epoch:?}", self.node, info.id.name);
        world.note(text);
        if checkpoint.0 < retained && world.is_trusted(&self.node) {
            let text = format!("the log is read from {checkpoint}, but ends at {retained}");
            world.violated("RETENTION", &text);
        }
        Ok(tables)
    }

    async fn split_points(
        &self,
        _: &ChangefeedId,
        _: Option<MaintainerEpoch>,
        span: &TableSpan,
        pieces: usize,
    ) -> Result<SplitPoints, RunningError> {
        let latency = self.world.lock().random.between(1, 200);
        tokio::time::sleep(Duration::from_millis(latency)).await;
        let inside: Vec<Vec<u8>> = (1..KEYS)
            .map(|key| key.to_be_bytes().to_vec())
            .filter(|key| span.contains_key(key) && *key != span.start)
            .collect();
        let keys = (1..pieces).filter_map(|n| inside.get(n * inside.len() / pieces).cloned());
        let mut keys: Vec<Vec<u8>> = keys.collect();
        keys.dedup();
        Ok(SplitPoints { keys, rows: None, bytes: None })
    }

    fn confirm(&self, changefeed: &ChangefeedId, epoch: Option<MaintainerEpoch>, persisted: Ts) {
        let mut world = self.world.lock();
        let Some(feed) = world.feeds.get_mut(&changefeed.gid) else { return };
        let mine = Reader { node: self.node.clone(), epoch };
        if feed.reader.as_ref() != Some(&mine) || !self.permit.holds() {
            return;
        }
        feed.retained = feed.retained.max(persisted.0);
        if feed.first_outstanding().is_some_and(|(first, ..)| first <= persisted.0) {
            let text = format!(
                "{persisted} is confirmed upstream, and {:?} is not downstream",
                feed.first_outstanding()
            );
            world.violated("CHECKPOINT", &text);
        }
    }

    fn raise_floor(&self, changefeed: &ChangefeedId, epoch: Option<MaintainerEpoch>, floor: Ts) {
        let mut world = self.world.lock();
        let Some(feed) = world.feeds.get_mut(&changefeed.gid) else { return };
        if feed.reader == Some(Reader { node: self.node.clone(), epoch }) {
            feed.kept.raise_floor(floor.0);
        }
    }

    async fn stop(&self, changefeed: &ChangefeedId, epoch: Option<MaintainerEpoch>) {
        let latency = self.world.lock().random.between(1, 50);
        tokio::time::sleep(Duration::from_millis(latency)).await;
        let mut world = self.world.lock();
        let Some(feed) = world.feeds.get_mut(&changefeed.gid) else { return };
        if feed.reader == Some(Reader { node: self.node.clone(), epoch }) {
            feed.reader = None;
        }
    }

    fn error(&self, _: &ChangefeedId, _: Option<MaintainerEpoch>) -> Option<RunningError> {
        None
    }

    fn lag_seconds(&self, _: &ChangefeedId, _: Ts) -> Option<f64> {
        None
    }
}

#[async_trait]
impl coordinator::RetentionHook for Hub {
    async fn drop_retention(&self, _: &ChangefeedInfo) -> Result<(), String> {
        Ok(())
    }
}

impl coordinator::UpstreamClock for Hub {
    fn time_of(&self, _: &ChangefeedId, _: Ts) -> Option<WallTime> {
        None
    }
}
