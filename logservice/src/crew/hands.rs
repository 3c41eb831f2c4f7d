//! The hands of a node: carries out the orders of other nodes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use event::CopyTarget;
use heartbeatpb::{ChangefeedId, NodeId};
use messaging::{Inbound, MessageCenter};
use metrics::{Counter, counter};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::jobs::{Jobs, Key, Step};
use super::orders::Waiting;
use super::topic::{CopyOrder, CopyOrderTopic, CopyReport, CopyReportTopic, OrderState};
use crate::upstream::Upstream;
use crate::{Error, metrics as names};

/// Waiting orders and reports. Orders are repeated, and reports come again with them.
const INBOX: usize = 1024;
/// How often it is looked for orders about which nobody asks.
const LOOK: Duration = Duration::from_secs(5);

/// Both ends of a changefeed.
pub struct Ends {
    /// Where a part is read.
    pub upstream: Arc<dyn Upstream>,
    /// Where it is written.
    pub target: Arc<dyn CopyTarget>,
}

impl std::fmt::Debug for Ends {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Ends")
    }
}

/// Opens both ends of changefeeds whose log another node reads.
pub trait CopyEnds: Send + Sync {
    /// The ends of a changefeed as the other node has described it. Nothing is connected yet.
    ///
    /// # Errors
    /// When the description is not understood, or an end takes no rows so.
    fn open(&self, changefeed: &ChangefeedId, feed: &[u8]) -> Result<Ends, Error>;
}

struct Hands {
    center: MessageCenter,
    ends: Arc<dyn CopyEnds>,
    jobs: Jobs,
    tasks: JoinSet<(Key, OrderState)>,
    running: BTreeMap<Key, AbortHandle>,
    /// Counts the parts.
    written: Counter,
}

/// Carries out orders, and hears the reports about those of this node, until `shutdown`.
pub(crate) async fn work(
    center: MessageCenter,
    ends: Arc<dyn CopyEnds>,
    waiting: Waiting,
    shutdown: CancellationToken,
) {
    let mut orders = center.register::<CopyOrderTopic>(INBOX);
    let mut reports = center.register::<CopyReportTopic>(INBOX);
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (jobs, tasks, running) = (Jobs::default(), JoinSet::new(), BTreeMap::new());
    let written = counter!(names::COPIED_PARTS);
    let mut hands = Hands { center, ends, jobs, tasks, running, written };
    loop {
        tokio::select! {
            () = shutdown.cancelled() => break,
            order = orders.recv() => match order {
                Some(order) => hands.on_order(order),
                None => break,
            },
            report = reports.recv() => match report {
                Some(Inbound { message, .. }) => waiting.on_report(message),
                None => break,
            },
            Some(ended) = hands.tasks.join_next() => {
                // One that was aborted belongs to nobody any more.
                if let Ok((key, state)) = ended {
                    hands.on_end(&key, state);
                }
            }
            _ = look.tick() => hands.forget(),
        }
    }
    hands.stop().await;
}

impl Hands {
    fn on_order(&mut self, order: Inbound<CopyOrder>) {
        let Inbound { from, message: order } = order;
        let key = (from, order.id);
        match self.jobs.on_order(&key, Instant::now()) {
            Step::Say(state) => self.say(&key, state),
            Step::Begin => {
                let ends = Arc::clone(&self.ends);
                let of = key.clone();
                let task = self.tasks.spawn(async move { (of, carry_out(&order, ends.as_ref()).await) });
                self.running.insert(key, task);
            }
        }
    }

    fn say(&self, (to, id): &(NodeId, super::OrderId), state: OrderState) {
        // Whoever does not hear it asks again.
        let _ = self.center.send::<CopyReportTopic>(to, CopyReport { id: *id, state });
    }

    fn on_end(&mut self, key: &Key, state: OrderState) {
        self.running.remove(key);
        if matches!(state, OrderState::Written { .. }) {
            self.written.increment(1);
        }
        self.jobs.on_end(key, state.clone());
        self.say(key, state);
    }

    fn forget(&mut self) {
        for key in self.jobs.forget(Instant::now()) {
            if let Some(task) = self.running.remove(&key) {
                tracing::info!(nodeID = %key.0, "nobody asks any more for a part that is copied for another node");
                task.abort();
            }
        }
    }

    /// Whoever waits need not find out by himself.
    async fn stop(mut self) {
        self.tasks.shutdown().await;
        for key in self.jobs.running() {
            let (code, message) = ("CDC:ErrLogServiceClosed".to_owned(), "this node stops".to_owned());
            self.say(key, OrderState::Failed { code, message });
        }
    }
}

async fn carry_out(order: &CopyOrder, ends: &dyn CopyEnds) -> OrderState {
    let written = async {
        let Ends { upstream, target } = ends.open(&order.changefeed, &order.feed)?;
        let snapshot = (order.at, order.time);
        let CopyOrder { right, table, part, format, .. } = order;
        let writer = target.write_for(*right, table, part, *format, snapshot).await?;
        upstream.copy_part(order, writer).await
    };
    match written.await {
        Ok((rows, bytes)) => OrderState::Written { rows, bytes },
        Err(error) => {
            tracing::warn!(changefeedID = %order.changefeed, table = %order.table.name, errorCode = error.code(),
                error = error.chain(), "a part was not copied for another node");
            OrderState::Failed { code: error.code().to_owned(), message: error.chain() }
        }
    }
}
