//! The mailbox of one maintainer: bounded, with heartbeats joined and block statuses without duplicates.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use heartbeatpb::{
    BarrierKey, BlockStage, BlockStatusRequest, DispatcherId, HeartBeatRequest, Mode, NodeId,
    TableSpanBlockStatus, TableSpanStatus, Watermark,
};
use parking_lot::Mutex;
use tokio::sync::Notify;

/// Control messages that may wait. All of them are repeated by their senders.
const CONTROL: usize = 1_024;
/// Block statuses that may wait; what does not fit is sent again after a while.
const BLOCK_STATUSES: usize = 1 << 20;

/// What makes two block statuses the same.
type StatusKey = (NodeId, Mode, DispatcherId, BarrierKey, BlockStage);

/// Everything that waited, taken at once. To be handled in the order of the fields: a node says that a dispatcher
/// works before it says where that dispatcher blocks.
#[derive(Debug)]
pub(crate) struct Batch<C> {
    pub(crate) control: VecDeque<C>,
    pub(crate) heartbeats: BTreeMap<NodeId, HeartBeatRequest>,
    pub(crate) block_statuses: Vec<(NodeId, BlockStatusRequest)>,
}

impl<C> Default for Batch<C> {
    fn default() -> Self {
        Self { control: VecDeque::new(), block_statuses: Vec::new(), heartbeats: BTreeMap::new() }
    }
}

impl<C> Batch<C> {
    fn is_empty(&self) -> bool {
        self.control.is_empty() && self.block_statuses.is_empty() && self.heartbeats.is_empty()
    }

    /// Number of messages.
    pub(crate) fn len(&self) -> usize {
        self.control.len() + self.block_statuses.len() + self.heartbeats.len()
    }
}

#[derive(Debug)]
struct State<C> {
    waiting: Batch<C>,
    /// Block statuses that wait, or are being handled.
    reserved: BTreeSet<StatusKey>,
    dropped: u64,
    suppressed: u64,
}

/// Filled by the manager's task, emptied by the maintainer's. The lock is held for the time of a queue operation.
#[derive(Debug)]
pub(crate) struct Mailbox<C> {
    state: Mutex<State<C>>,
    ready: Notify,
}

impl<C> Default for Mailbox<C> {
    fn default() -> Self {
        let state = State { waiting: Batch::default(), reserved: BTreeSet::new(), dropped: 0, suppressed: 0 };
        Self { state: Mutex::new(state), ready: Notify::new() }
    }
}

impl<C> Mailbox<C> {
    /// Queues a control message; says whether there was room.
    pub(crate) fn control(&self, message: C) -> bool {
        let mut state = self.state.lock();
        let fits = state.waiting.control.len() < CONTROL;
        if fits {
            state.waiting.control.push_back(message);
        } else {
            state.dropped += 1;
        }
        drop(state);
        self.ready.notify_one();
        fits
    }

    /// Joins a heartbeat with the one of the same node that waits.
    pub(crate) fn heartbeat(&self, from: NodeId, request: HeartBeatRequest) {
        let mut state = self.state.lock();
        match state.waiting.heartbeats.entry(from) {
            std::collections::btree_map::Entry::Vacant(entry) => {
                entry.insert(request);
            }
            std::collections::btree_map::Entry::Occupied(mut entry) => join(entry.get_mut(), request),
        }
        drop(state);
        self.ready.notify_one();
    }

    /// Queues block statuses, without those that wait or are being handled already, or that say nothing.
    pub(crate) fn block_statuses(&self, from: &NodeId, request: BlockStatusRequest) {
        let mut state = self.state.lock();
        let BlockStatusRequest { changefeed, mode, statuses } = request;
        let before = statuses.len();
        let survivors: Vec<TableSpanBlockStatus> = statuses
            .into_iter()
            .filter(|status| {
                status.state.key.commit_ts.0 != 0
                    && state.reserved.len() < BLOCK_STATUSES
                    && state.reserved.insert(key(from, status))
            })
            .collect();
        state.suppressed += u64::try_from(before - survivors.len()).unwrap_or(0);
        if survivors.is_empty() {
            return;
        }
        let request = BlockStatusRequest { changefeed, mode, statuses: survivors };
        state.waiting.block_statuses.push((from.clone(), request));
        drop(state);
        self.ready.notify_one();
    }

    /// Waits until there is something, and takes all of it. Safe to use in `select!`.
    pub(crate) async fn take(&self) -> Batch<C> {
        loop {
            {
                let mut state = self.state.lock();
                if !state.waiting.is_empty() {
                    return std::mem::take(&mut state.waiting);
                }
            }
            self.ready.notified().await;
        }
    }

    /// Block statuses were handled: the same ones count as new again.
    pub(crate) fn release(&self, handled: impl IntoIterator<Item = StatusKey>) {
        let mut state = self.state.lock();
        for key in handled {
            state.reserved.remove(&key);
        }
    }

    /// Number of messages that wait.
    pub(crate) fn len(&self) -> usize {
        self.state.lock().waiting.len()
    }

    /// Control messages that did not fit, and block statuses that were duplicates, since the last call.
    pub(crate) fn take_counts(&self) -> (u64, u64) {
        let mut state = self.state.lock();
        (std::mem::take(&mut state.dropped), std::mem::take(&mut state.suppressed))
    }
}

/// The key of a block status.
pub(crate) fn key(from: &NodeId, status: &TableSpanBlockStatus) -> StatusKey {
    (from.clone(), status.mode, status.id, status.state.key, status.state.stage)
}

/// The keys of all statuses of a request.
pub(crate) fn keys(from: &NodeId, request: &BlockStatusRequest) -> Vec<StatusKey> {
    request.statuses.iter().map(|status| key(from, status)).collect()
}

/// Joins a newer heartbeat of a node into an older one, without losing a state that a dispatcher went through.
fn join(older: &mut HeartBeatRequest, newer: HeartBeatRequest) {
    let HeartBeatRequest { changefeed: _, watermark, redo_watermark, statuses, complete, error, trouble } =
        newer;
    if watermark.is_some() {
        older.trouble = trouble;
    }
    older.watermark = later(older.watermark, watermark);
    older.redo_watermark = later(older.redo_watermark, redo_watermark);
    older.error = error.or_else(|| older.error.take());
    // A complete list is one only as long as nothing was said before it.
    older.complete = complete && older.statuses.is_empty();
    let mut last: BTreeMap<DispatcherId, usize> =
        older.statuses.iter().enumerate().map(|(position, status)| (status.id, position)).collect();
    for status in statuses {
        match last.get(&status.id).and_then(|position| older.statuses.get_mut(*position)) {
            Some(before) if before.state == status.state && before.mode == status.mode => {
                merge_status(before, status);
            }
            Some(_) | None => {
                last.insert(status.id, older.statuses.len());
                older.statuses.push(status);
            }
        }
    }
}

fn merge_status(before: &mut TableSpanStatus, status: TableSpanStatus) {
    before.checkpoint = before.checkpoint.max(status.checkpoint);
    if status.event_size_per_second > 0.0 {
        before.event_size_per_second = status.event_size_per_second;
    }
}

/// The watermark that the rule of acceptance would leave; the largest flushed position is kept in any case.
fn later(older: Option<Watermark>, newer: Option<Watermark>) -> Option<Watermark> {
    match (older, newer) {
        (Some(older), Some(newer)) => {
            let order = |mark: &Watermark| (mark.seq, mark.checkpoint, mark.resolved);
            let last_synced = older.last_synced.max(newer.last_synced);
            let kept = if order(&newer) > order(&older) { newer } else { older };
            Some(Watermark { last_synced, ..kept })
        }
        (one, other) => one.or(other),
    }
}

#[cfg(test)]
mod tests {
    use heartbeatpb::{BlockState, ChangefeedId, ComponentState, Ts};

    use super::*;

    fn status(n: u64, stage: BlockStage) -> TableSpanBlockStatus {
        let state = BlockState {
            is_blocked: stage != BlockStage::None,
            key: BarrierKey { commit_ts: Ts(n), is_sync_point: false },
            blocked: None,
            dropped: None,
            added: vec![],
            schema_changes: vec![],
            stage,
            routes: vec![],
        };
        TableSpanBlockStatus { id: DispatcherId::new(0, 1), mode: Mode::Default, state }
    }

    fn request(statuses: Vec<TableSpanBlockStatus>) -> BlockStatusRequest {
        BlockStatusRequest { changefeed: ChangefeedId::fresh("t"), mode: Mode::Default, statuses }
    }

    fn heartbeat(statuses: &[(u64, ComponentState, u64)], checkpoint: u64, seq: u64) -> HeartBeatRequest {
        let of = |(id, state, ts): &(u64, ComponentState, u64)| TableSpanStatus {
            id: DispatcherId::new(0, *id),
            state: *state,
            checkpoint: Ts(*ts),
            event_size_per_second: 0.0,
            mode: Mode::Default,
        };
        HeartBeatRequest {
            changefeed: ChangefeedId::fresh("t"),
            watermark: Some(Watermark {
                checkpoint: Ts(checkpoint),
                resolved: Ts(checkpoint),
                seq,
                last_synced: Ts(checkpoint),
            }),
            redo_watermark: None,
            statuses: statuses.iter().map(of).collect(),
            complete: false,
            error: None,
            trouble: None,
        }
    }

    // behaviour: maintainer-43, maintainer-44
    #[tokio::test]
    async fn a_block_status_is_queued_once_until_it_was_handled() {
        let mailbox: Mailbox<()> = Mailbox::default();
        let from = NodeId::from("n1");
        let both = |stage| [status(5, stage), status(5, stage)];
        let statuses = [both(BlockStage::Waiting), both(BlockStage::Done), both(BlockStage::None)].concat();
        mailbox.block_statuses(&from, request(statuses));
        mailbox.block_statuses(&from, request(vec![status(5, BlockStage::Done)]));
        let batch = mailbox.take().await;
        let stages: Vec<BlockStage> = batch
            .block_statuses
            .iter()
            .flat_map(|(_, request)| request.statuses.iter().map(|status| status.state.stage))
            .collect();
        assert_eq!(stages, [BlockStage::Waiting, BlockStage::Done, BlockStage::None], "in order");
        mailbox
            .block_statuses(&from, request(vec![status(5, BlockStage::Done), status(0, BlockStage::Done)]));
        assert_eq!((mailbox.len(), mailbox.take_counts()), (0, (0, 6)));
        for (from, request) in &batch.block_statuses {
            mailbox.release(keys(from, request));
        }
        mailbox.block_statuses(&from, request(vec![status(5, BlockStage::Done)]));
        assert_eq!(mailbox.len(), 1);
    }

    // behaviour: maintainer-45
    #[tokio::test]
    async fn heartbeats_of_a_node_are_joined_and_no_state_is_lost() {
        use ComponentState::{Stopped, Working};
        let mailbox: Mailbox<()> = Mailbox::default();
        mailbox.heartbeat("n1".into(), heartbeat(&[(1, Working, 5), (2, Working, 5)], 5, 1));
        mailbox.heartbeat("n1".into(), heartbeat(&[(1, Stopped, 6), (2, Working, 9)], 4, 2));
        mailbox.heartbeat("n1".into(), heartbeat(&[(1, Working, 7)], 9, 1));
        let single = heartbeat(&[(3, Working, 8)], 1, 1);
        mailbox.heartbeat("n2".into(), single.clone());
        let batch = mailbox.take().await;
        assert_eq!(batch.heartbeats.get(&NodeId::from("n2")), Some(&single), "untouched");
        let joined = &batch.heartbeats[&NodeId::from("n1")];
        let states: Vec<(u64, ComponentState, u64)> =
            joined.statuses.iter().map(|s| (s.id.low, s.state, s.checkpoint.0)).collect();
        assert_eq!(states, [(1, Working, 5), (2, Working, 9), (1, Stopped, 6), (1, Working, 7)]);
        let mark = joined.watermark.unwrap();
        assert_eq!((mark.checkpoint, mark.seq, mark.last_synced), (Ts(4), 2, Ts(9)), "the newest membership");
    }

    #[tokio::test]
    async fn control_messages_keep_their_order_and_are_bounded() {
        let mailbox: Mailbox<usize> = Mailbox::default();
        let taken = (0..CONTROL + 3).filter(|n| mailbox.control(*n)).count();
        assert_eq!((taken, mailbox.take_counts().0), (CONTROL, 3));
        assert!(mailbox.take().await.control.into_iter().eq(0..CONTROL));
    }
}
