//! Puts a process together, starts it, and stops it from the edge inward.
//!
//! ```text
//!   start:  configuration, port, directory, store   all that can fail
//!           modules built, their topics registered  from here on messages wait for them
//!           modules run, the port is served         from here on they are answered
//!           session, registered under its lease     from here on others see this node
//!           watch over the lease, stand for election
//!
//!   stop:   DRAINING, STOPPING ──► coordinator resigns ──► maintainers ──► log readers ──► dispatchers
//!           ──► (nothing writes any more) goodbye, lease given back ──► log, network, port
//!
//!   suspended (the lease is not confirmed): nothing is written downstream, upstream or to the store
//!           ──► confirmed: goes on where it was   ──► gone: lost
//!
//!   lost:   DRAINING, STOPPING ──► write path closed, readers and maintainers cut off ──► the process ends
//! ```

mod lease;
mod parts;
mod start;
mod stop;
mod store;

use std::sync::Arc;

use coordinator::backend::Store;
use coordinator::membership::Registration;
use coordinator::watchdog::Lost;
use dispatcher_orchestrator::OrchestratorHandle;
use heartbeatpb::{NodeId, NodeLiveness, codes};
use maintainer::LivenessCell;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use self::lease::Guard;
use self::parts::Part;
use crate::upstream::UpstreamHub;

pub(crate) use lease::Lease;
pub use start::{Connect, Surroundings};

/// Now, as documents and errors carry it.
pub(crate) fn rfc3339_now() -> String {
    time::OffsetDateTime::now_utc().format(&time::format_description::well_known::Rfc3339).unwrap_or_default()
}

/// Everything of this process that writes somewhere in the name of the cluster.
#[derive(Clone)]
struct WritePath {
    liveness: Arc<LivenessCell>,
    dispatchers: OrchestratorHandle,
    upstreams: Arc<UpstreamHub>,
    /// Ends the maintainers.
    maintainers: CancellationToken,
    /// Ends what is done under the session: the coordinator first of all.
    session: CancellationToken,
    /// Why the process cannot go on.
    failure: watch::Sender<Option<String>>,
}

impl WritePath {
    /// No new work comes, as far as others ask.
    fn refuse_work(&self) {
        self.liveness.advance(NodeLiveness::Draining);
        self.liveness.advance(NodeLiveness::Stopping);
    }

    /// Closes it for good, at once and without waiting for anybody. The process has to end.
    fn fence(&self, why: &str) {
        let why = format!("[{}] {why}", codes::CAPTURE_SUICIDE);
        self.refuse_work();
        self.dispatchers.local_fence();
        self.upstreams.fence();
        self.session.cancel();
        self.maintainers.cancel();
        // Whoever is told finds that nothing is written any more.
        self.failure.send_if_modified(|failure| {
            let first = failure.is_none();
            if first {
                tracing::error!(error = why, "this node may not go on; downstream writes are stopped");
                *failure = Some(why);
            }
            first
        });
    }

    fn on_lost(&self, lost: Lost) {
        self.fence(&lost.to_string());
    }
}

/// A running server. Stop it with [`Node::stop`]; dropping it leaves its tasks running until the runtime ends.
pub struct Node {
    id: NodeId,
    address: std::net::SocketAddr,
    write_path: WritePath,
    store: Arc<dyn Store>,
    registration: Registration,
    guard: Guard,
    leader: watch::Receiver<Option<NodeId>>,
    members: watch::Receiver<coordinator::Members>,
    /// In the order in which they stop: before the log readers, after them, and when the node has said goodbye.
    deciding: Vec<Part>,
    writing: Vec<Part>,
    serving: Vec<Part>,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node").field("id", &self.id).field("address", &self.address).finish_non_exhaustive()
    }
}

impl Node {
    /// The id under which it is a member of its cluster; another one at each start.
    #[must_use]
    pub fn id(&self) -> &NodeId {
        &self.id
    }

    /// Where the API listens.
    #[must_use]
    pub fn address(&self) -> std::net::SocketAddr {
        self.address
    }

    /// Who leads the cluster, as far as this node knows.
    #[must_use]
    pub fn leader(&self) -> Option<NodeId> {
        self.leader.borrow().clone()
    }

    /// Who is in the cluster and where they are reached, as far as this node knows.
    #[must_use]
    pub fn members(&self) -> coordinator::Members {
        Arc::clone(&self.members.borrow())
    }

    /// Waits until the process cannot go on: it has stopped to write and is to be stopped and started anew. Returns why.
    pub async fn failed(&self) -> String {
        let mut failed = self.write_path.failure.subscribe();
        loop {
            if let Some(why) = failed.borrow_and_update().clone() {
                return why;
            }
            if failed.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}
