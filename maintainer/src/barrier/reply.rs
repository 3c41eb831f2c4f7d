//! What one request of block statuses is answered with, and what others are told because of it.

use std::collections::BTreeMap;

use heartbeatpb::{BarrierKey, BlockAction, DispatcherId, DispatcherStatus, InfluencedDispatchers, NodeId};

use super::{Outcome, action};

/// Collects answers while statuses are handled.
#[derive(Debug)]
pub(super) struct Reply {
    from: NodeId,
    ignored: Vec<(DispatcherId, BarrierKey)>,
    acks: BTreeMap<BarrierKey, Vec<DispatcherId>>,
    actions: BTreeMap<NodeId, Vec<DispatcherStatus>>,
    unusable: Vec<BarrierKey>,
}

impl Reply {
    pub(super) fn new(from: NodeId) -> Self {
        Self {
            from,
            ignored: Vec::new(),
            acks: BTreeMap::new(),
            actions: BTreeMap::new(),
            unusable: Vec::new(),
        }
    }

    /// The dispatcher is to say it again soon.
    pub(super) fn ignore(&mut self, id: DispatcherId, key: BarrierKey) {
        self.ignored.push((id, key));
    }

    /// The report was taken.
    pub(super) fn ack(&mut self, id: DispatcherId, key: BarrierKey) {
        let ids = self.acks.entry(key).or_default();
        if !ids.contains(&id) {
            ids.push(id);
        }
    }

    /// Dispatchers of a node are to do something.
    pub(super) fn act(&mut self, node: NodeId, ids: Vec<DispatcherId>, what: BlockAction, key: BarrierKey) {
        let influenced = InfluencedDispatchers::Normal(ids);
        self.actions.entry(node).or_default().push(action(influenced, what, key));
    }

    /// The event cannot be carried out.
    pub(super) fn refuse(&mut self, key: BarrierKey) {
        self.unusable.push(key);
    }

    /// One message per node, the sender's first: what was ignored, what was taken, what is to be done.
    pub(super) fn finish(mut self) -> Outcome {
        let to = |ids: Vec<DispatcherId>| Some(InfluencedDispatchers::Normal(ids));
        let ignored = self.ignored.into_iter().map(|(id, key)| DispatcherStatus {
            influenced: to(vec![id]),
            ack: None,
            ignored: Some(key),
            action: None,
        });
        let acks = self.acks.into_iter().map(|(key, ids)| DispatcherStatus {
            influenced: to(ids),
            ack: Some(key),
            ignored: None,
            action: None,
        });
        let own = self.actions.remove(&self.from).unwrap_or_default();
        let first: Vec<DispatcherStatus> = ignored.chain(acks).chain(own).collect();
        let mut responses = Vec::new();
        if !first.is_empty() {
            responses.push((self.from, first));
        }
        responses.extend(self.actions);
        Outcome { responses, unusable: self.unusable }
    }
}
