//! The heartbeat collector of a node: hands what maintainers say to the manager that it is for.

use std::collections::HashMap;
use std::sync::Arc;

use heartbeatpb::{ChangefeedId, Gid, NodeId};
use messaging::{HeartbeatCollectorTopic, Inbox, MessageCenter, ToHeartbeatCollector};
use parking_lot::RwLock;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::manager::Command;

/// Messages that wait for the collector. It only routes, so this is a burst of a large bootstrap.
const INBOX: usize = 16_384;

/// Which manager hears messages of which changefeed.
#[derive(Clone, Default)]
pub struct Routes {
    managers: Arc<RwLock<HashMap<Gid, mpsc::Sender<Command>>>>,
}

impl std::fmt::Debug for Routes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Routes({})", self.managers.read().len())
    }
}

impl Routes {
    pub(crate) fn register(&self, changefeed: &ChangefeedId, manager: mpsc::Sender<Command>) {
        self.managers.write().insert(changefeed.gid, manager);
    }

    /// Removes a route unless another manager has taken its place.
    pub(crate) fn deregister(&self, changefeed: &ChangefeedId, manager: &mpsc::WeakSender<Command>) {
        let mut managers = self.managers.write();
        let same = match (managers.get(&changefeed.gid), manager.upgrade()) {
            (Some(present), Some(manager)) => present.same_channel(&manager),
            (Some(present), None) => present.is_closed(),
            (None, _) => false,
        };
        if same {
            managers.remove(&changefeed.gid);
        }
    }

    /// Hands a message over. A manager that does not keep up loses it: whoever sent it repeats it until it
    /// sees the effect.
    fn route(&self, from: NodeId, message: ToHeartbeatCollector) {
        let changefeed = changefeed_of(&message);
        let manager = self.managers.read().get(&changefeed.gid).cloned();
        let Some(manager) = manager else {
            tracing::debug!(?changefeed, %from, "no dispatcher manager for a message");
            return;
        };
        if let Err(error) = manager.try_send(Command::Message(from, message)) {
            let full = matches!(error, mpsc::error::TrySendError::Full(_));
            tracing::debug!(full, "a dispatcher manager did not take a message");
        }
    }
}

fn changefeed_of(message: &ToHeartbeatCollector) -> &ChangefeedId {
    match message {
        ToHeartbeatCollector::HeartBeatResponse(response) => &response.changefeed,
        ToHeartbeatCollector::Schedule(request) => &request.changefeed,
        ToHeartbeatCollector::Merge(request) => &request.changefeed,
        ToHeartbeatCollector::CheckpointTs(message) => &message.changefeed,
    }
}

/// The node's receiver of barrier replies, schedule requests and persisted checkpoints.
#[derive(Debug)]
pub struct HeartbeatCollector {
    inbox: Inbox<HeartbeatCollectorTopic>,
    routes: Routes,
}

impl HeartbeatCollector {
    /// Registers at the node's message center.
    #[must_use]
    pub fn new(center: &MessageCenter, routes: Routes) -> Self {
        Self { inbox: center.register::<HeartbeatCollectorTopic>(INBOX), routes }
    }

    /// Routes messages until `shutdown`.
    pub async fn run(mut self, shutdown: CancellationToken) {
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                inbound = self.inbox.recv() => match inbound {
                    Some(inbound) => self.routes.route(inbound.from, inbound.message),
                    None => return,
                },
            }
        }
    }
}
