//! What the node that makes a copy knows of the others: who owns which span, and how their orders are doing.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use heartbeatpb::{ChangefeedId, NodeId, TableId};
use messaging::MessageCenter;
use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

use super::topic::{CopyOrder, CopyOrderTopic, CopyReport, OrderId, OrderState};
use crate::event_store::Store;

/// How often an order is repeated.
const AGAIN: Duration = Duration::from_secs(1);
/// Orders in a row without an answer after which a node is given up.
const UNANSWERED: u32 = 10;

/// Orders of this process that have not ended. Cheap to clone; all clones are one.
#[derive(Clone)]
pub(crate) struct Waiting {
    run: u64,
    next: Arc<AtomicU64>,
    orders: Arc<Mutex<FxHashMap<OrderId, watch::Sender<OrderState>>>>,
}

impl Default for Waiting {
    fn default() -> Self {
        Self { run: rand::random(), next: Arc::default(), orders: Arc::default() }
    }
}

impl Waiting {
    pub(super) fn on_report(&self, report: CopyReport) {
        if let Some(order) = self.orders.lock().get(&report.id) {
            order.send_replace(report.state);
        }
    }

    fn wait(&self, id: OrderId) -> Answers {
        let (state, answers) = watch::channel(OrderState::Running);
        self.orders.lock().insert(id, state);
        Answers { id, waiting: self.clone(), answers }
    }
}

/// Reports about one order, until it is dropped.
struct Answers {
    id: OrderId,
    waiting: Waiting,
    answers: watch::Receiver<OrderState>,
}

impl Drop for Answers {
    fn drop(&mut self) {
        self.waiting.orders.lock().remove(&self.id);
    }
}

/// The other nodes that have spans of a changefeed whose log is read here.
#[derive(Clone)]
pub struct CopyCrew {
    center: MessageCenter,
    store: Arc<Store>,
    feed: Bytes,
    waiting: Waiting,
}

impl std::fmt::Debug for CopyCrew {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CopyCrew").field("changefeed", self.changefeed()).finish_non_exhaustive()
    }
}

impl CopyCrew {
    pub(crate) fn new(center: MessageCenter, store: Arc<Store>, feed: Bytes, waiting: Waiting) -> Self {
        Self { center, store, feed, waiting }
    }

    pub(crate) fn changefeed(&self) -> &ChangefeedId {
        self.store.changefeed()
    }

    /// How the ends of the changefeed are described to other nodes.
    pub(crate) fn feed(&self) -> Bytes {
        self.feed.clone()
    }

    /// The name of the next order.
    pub(crate) fn next(&self) -> OrderId {
        OrderId { run: self.waiting.run, number: self.waiting.next.fetch_add(1, Ordering::Relaxed) }
    }

    /// The other node whose dispatcher has a key of a table; `None`: this one, or none as far as is known.
    pub(crate) fn owner(&self, table: TableId, key: &[u8]) -> Option<NodeId> {
        self.store.owners().of(table, key).filter(|node| node != self.center.node())
    }

    /// Has a node carry out an order. Answers rows and bytes of the part, or why nothing is known of it.
    pub(crate) async fn order(&self, node: &NodeId, order: CopyOrder) -> Result<(u64, u64), String> {
        let mut waiting = self.waiting.wait(order.id);
        let mut again = tokio::time::interval(AGAIN);
        again.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut unanswered = 0;
        loop {
            tokio::select! {
                biased;
                // It cannot be closed: the sender is in the map as long as `waiting` lives.
                _ = waiting.answers.changed() => match waiting.answers.borrow_and_update().clone() {
                    OrderState::Running => unanswered = 0,
                    OrderState::Written { rows, bytes } => return Ok((rows, bytes)),
                    OrderState::Failed { code, message } => return Err(format!("[{code}] {message}")),
                },
                _ = again.tick() => {
                    if unanswered == UNANSWERED {
                        return Err(format!("it has not answered {UNANSWERED} times in a row"));
                    }
                    unanswered += 1;
                    // What is lost now is sent again.
                    let _ = self.center.send::<CopyOrderTopic>(node, order.clone());
                }
            }
        }
    }
}
