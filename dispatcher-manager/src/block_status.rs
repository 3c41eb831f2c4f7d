//! Block statuses on their way to the owner: batched, and without duplicates (dispatcher §13).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use heartbeatpb::{
    BarrierKey, BlockStage, BlockState, BlockStatusRequest, ChangefeedId, DispatcherId, Mode,
    TableSpanBlockStatus,
};

/// Statuses that arrive this long after the first travel with it.
pub(crate) const WINDOW: Duration = Duration::from_millis(10);
/// Statuses in one request: keeps a message well below a mebibyte.
pub(crate) const BATCH: usize = 2048;

/// What makes two statuses the same.
type Key = (DispatcherId, BarrierKey, Mode, BlockStage);

/// Statuses that wait, and the keys of those that wait or are being sent.
#[derive(Debug, Default)]
pub(crate) struct BlockStatuses {
    waiting: VecDeque<TableSpanBlockStatus>,
    keys: BTreeSet<Key>,
    since: Option<Instant>,
}

/// The key by which a status is recognised; reports without a barrier have effects of their own and none.
fn key(status: &TableSpanBlockStatus) -> Option<Key> {
    let state = &status.state;
    match state.stage {
        BlockStage::Waiting | BlockStage::Done if state.is_blocked => {
            Some((status.id, state.key, status.mode, state.stage))
        }
        BlockStage::None | BlockStage::Waiting | BlockStage::Writing | BlockStage::Done => None,
    }
}

/// The status of a barrier that is done.
pub(crate) fn done(id: DispatcherId, mode: Mode, key: BarrierKey) -> TableSpanBlockStatus {
    let state = BlockState {
        is_blocked: true,
        key,
        blocked: None,
        dropped: None,
        added: Vec::new(),
        schema_changes: Vec::new(),
        stage: BlockStage::Done,
        routes: Vec::new(),
    };
    TableSpanBlockStatus { id, mode, state }
}

impl BlockStatuses {
    /// Queues a status unless the same one waits or is being sent; says whether it did.
    pub(crate) fn push(&mut self, status: TableSpanBlockStatus, now: Instant) -> bool {
        if let Some(key) = key(&status)
            && !self.keys.insert(key)
        {
            return false;
        }
        self.waiting.push_back(status);
        self.since.get_or_insert(now);
        true
    }

    /// When the waiting statuses are to go.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.since.map(|since| since + WINDOW)
    }

    /// Statuses that wait.
    pub(crate) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// The requests to send, if it is time. Their keys stay taken until they are sent.
    pub(crate) fn take(&mut self, changefeed: &ChangefeedId, now: Instant) -> Vec<BlockStatusRequest> {
        if self.deadline().is_none_or(|deadline| deadline > now) {
            return Vec::new();
        }
        self.since = None;
        let mut by_mode: BTreeMap<Mode, Vec<TableSpanBlockStatus>> = BTreeMap::new();
        for status in self.waiting.drain(..) {
            by_mode.entry(status.mode).or_default().push(status);
        }
        let mut requests = Vec::new();
        for (mode, statuses) in by_mode {
            let mut rest = statuses.into_iter().peekable();
            while rest.peek().is_some() {
                let statuses = rest.by_ref().take(BATCH).collect();
                requests.push(BlockStatusRequest { changefeed: changefeed.clone(), mode, statuses });
            }
        }
        requests
    }

    /// A request has left: the same statuses may be sent again.
    pub(crate) fn sent(&mut self, request: &BlockStatusRequest) {
        for key in request.statuses.iter().filter_map(key) {
            self.keys.remove(&key);
        }
    }

    /// A request could not leave: its statuses wait again, before later ones.
    pub(crate) fn unsent(&mut self, request: BlockStatusRequest, now: Instant) {
        for status in request.statuses.into_iter().rev() {
            self.waiting.push_front(status);
        }
        self.since.get_or_insert(now);
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use heartbeatpb::Ts;

    use super::*;
    use crate::dispatcher::testing::id;

    fn status(n: u64, commit: u64, stage: BlockStage) -> TableSpanBlockStatus {
        let key = BarrierKey { commit_ts: Ts(commit), is_sync_point: false };
        let mut status = done(id(n), Mode::Default, key);
        status.state.stage = stage;
        status.state.is_blocked = stage != BlockStage::None;
        status
    }

    struct Bench(BlockStatuses, ChangefeedId, Instant);

    impl Bench {
        fn new() -> Self {
            Self(BlockStatuses::default(), ChangefeedId::fresh("test"), Instant::now())
        }

        fn push(&mut self, status: TableSpanBlockStatus) -> bool {
            self.0.push(status, self.2)
        }

        fn take(&mut self) -> Vec<BlockStatusRequest> {
            self.0.take(&self.1, self.2 + WINDOW)
        }
    }

    // behaviour: dispatcher-29
    #[test]
    fn requests_are_bounded_and_hold_one_mode() {
        let mut b = Bench::new();
        for n in 0..=(2 * BATCH as u64) {
            b.push(status(n, 100, BlockStage::Waiting));
        }
        let mut redo = status(1, 100, BlockStage::Waiting);
        redo.mode = Mode::Redo;
        assert!(b.push(redo));
        let requests = b.take();
        let sizes: Vec<_> = requests.iter().map(|r| (r.mode, r.statuses.len())).collect();
        let expected = [(Mode::Default, BATCH), (Mode::Default, BATCH), (Mode::Default, 1), (Mode::Redo, 1)];
        assert_eq!(sizes, expected);
    }

    // behaviour: dispatcher-30
    #[test]
    fn what_follows_within_the_window_travels_together() {
        let mut b = Bench::new();
        b.push(status(1, 100, BlockStage::Waiting));
        b.0.push(status(2, 100, BlockStage::Waiting), b.2 + WINDOW / 2);
        assert!(b.0.take(&b.1, b.2 + WINDOW / 2).is_empty());
        assert_eq!(b.take()[0].statuses.len(), 2);
        assert!(b.take().is_empty());
    }

    // behaviour: dispatcher-58, dispatcher-59
    #[test]
    fn the_same_status_is_suppressed_until_it_has_left() {
        for stage in [BlockStage::Done, BlockStage::Waiting] {
            let mut b = Bench::new();
            assert!(b.push(status(1, 100, stage)));
            assert!(!b.push(status(1, 100, stage)));
            let requests = b.take();
            assert!(!b.push(status(1, 100, stage)));
            b.0.sent(&requests[0]);
            assert!(b.push(status(1, 100, stage)));
        }
    }

    // behaviour: dispatcher-60
    #[test]
    fn statuses_that_differ_in_anything_are_kept() {
        let mut b = Bench::new();
        let first = status(1, 100, BlockStage::Waiting);
        let mut redo = first.clone();
        redo.mode = Mode::Redo;
        let mut point = first.clone();
        point.state.key.is_sync_point = true;
        for status in
            [first, redo, point, status(2, 100, BlockStage::Waiting), status(1, 101, BlockStage::Waiting)]
        {
            assert!(b.push(status));
        }
    }

    // behaviour: dispatcher-61
    #[test]
    fn waiting_and_done_of_one_barrier_keep_their_order() {
        let mut b = Bench::new();
        b.push(status(1, 100, BlockStage::Waiting));
        b.push(status(1, 100, BlockStage::Done));
        let stages: Vec<_> = b.take()[0].statuses.iter().map(|s| s.state.stage).collect();
        assert_eq!(stages, [BlockStage::Waiting, BlockStage::Done]);
    }

    // behaviour: dispatcher-62
    #[test]
    fn reports_without_a_barrier_are_never_suppressed() {
        let mut b = Bench::new();
        assert!(b.push(status(1, 100, BlockStage::None)));
        assert!(b.push(status(1, 100, BlockStage::None)));
    }

    // behaviour: dispatcher-63
    #[test]
    fn what_could_not_leave_goes_first_next_time() {
        let mut b = Bench::new();
        b.push(status(1, 100, BlockStage::Waiting));
        let request = b.take().remove(0);
        b.push(status(1, 100, BlockStage::Done));
        b.0.unsent(request, b.2);
        assert!(!b.push(status(1, 100, BlockStage::Waiting)));
        let stages: Vec<_> = b.take()[0].statuses.iter().map(|s| s.state.stage).collect();
        assert_eq!(stages, [BlockStage::Waiting, BlockStage::Done]);
    }
}
