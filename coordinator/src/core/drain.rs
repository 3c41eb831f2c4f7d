//! A node is emptied: who is told what, what is left, and when that is proven (coordinator §16).

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use heartbeatpb::{
    ChangefeedId, NodeId, NodeLiveness, SetDispatcherDrainTargetRequest, SetNodeLivenessRequest,
};
use messaging::ToMaintainerManager;

use super::{Action, Core, Feed, OpId, Reply, Write};
use crate::changefeed::Group;
use crate::drain::{Clear, DrainDoc, NodeState, Phase, REBROADCAST, Session};
use crate::error::Error;

/// A document that could not be stored is tried again after this time.
const RETRY: Duration = Duration::from_secs(1);
/// A maintainer that should not be on the node was reported within this time: three heartbeats.
const LATE: Duration = Duration::from_secs(3);

/// Why the last node is not drained.
const NOBODY: &str = "no other node could take over what this one does: start another one first (one that was being drained \
                      has to be restarted)";

/// How far the drain of a node is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DrainView {
    /// The node.
    pub target: NodeId,
    /// Epoch of the drain; 0 when none is under way.
    pub epoch: u64,
    /// What the node is believed to be.
    pub state: NodeState,
    /// What is left, at least. 0 is a promise: the node holds nothing and may be stopped, or it cannot be
    /// drained because a node of an older version takes part.
    pub remaining: u64,
    /// Maintainers on the node.
    pub maintainers: u64,
    /// Changes of placement that concern it.
    pub operators: u64,
    /// Dispatchers on it, by the reports of maintainers.
    pub dispatchers: u64,
    /// Dispatchers that are moving away from it.
    pub moves: u64,
    /// Changefeeds of which it is not known yet whether they have something on the node.
    pub pending: u64,
}

impl DrainView {
    pub(crate) fn of(target: &NodeId, state: NodeState, remaining: u64) -> Self {
        Self {
            target: target.clone(),
            epoch: 0,
            state,
            remaining,
            maintainers: 0,
            operators: 0,
            dispatchers: 0,
            moves: 0,
            pending: 0,
        }
    }
}

impl Core {
    /// What an earlier coordinator stored about drains; `None` when nothing was. To be called before
    /// [`Core::on_loaded`].
    pub fn on_drain_loaded(&mut self, doc: Option<DrainDoc>) {
        let doc = doc.unwrap_or_default();
        self.drain.epoch = self.drain.epoch.max(doc.epoch);
        self.drain.given = doc.epoch;
        self.drain.cancelled = doc.cancelled.iter().map(NodeId::from).collect();
        self.drain.completed = doc.completed.as_ref().map(NodeId::from);
        if let Some(target) = &doc.target {
            self.drain.phase = Phase::Active(Session::new(NodeId::from(target), doc.epoch, doc.requested_at));
        }
        self.drain.durable = Some(doc);
    }

    /// Every node was heard: goes on with what was stored, or clears what nodes were left with.
    pub(super) fn resume_drain(&mut self, now: Instant) {
        let members = self.members.clone();
        self.drain.cancelled.retain(|node| members.contains(node));
        if self.drain.completed.as_ref().is_some_and(|node| members.contains(node))
            && self.drain.active().is_none()
        {
            self.drain.completed = None;
        }
        let Some(session) = self.drain.active().cloned() else {
            self.clear_stale(now);
            return;
        };
        if !members.contains(&session.target) {
            self.drain.phase = Phase::None;
            self.begin_clear(session.epoch, now);
            return;
        }
        // A node that has applied something else under this epoch, or a larger one, would never take it.
        let conflicts = |record: &crate::drain::NodeRecord| {
            record.applied.as_ref().is_some_and(|applied| {
                applied.epoch > session.epoch
                    || (applied.epoch == session.epoch && applied.target.as_ref() != Some(&session.target))
            })
        };
        if self.nodes.values().any(conflicts)
            && let Some(epoch) = self.drain.next_epoch(0)
        {
            (self.drain.epoch, self.drain.given) = (epoch, epoch);
            self.drain.phase = Phase::Starting(Session::new(session.target, epoch, session.requested_at));
            self.store_drain(now);
            return;
        }
        self.tell_target(now);
        self.advance_liveness(now);
    }

    /// A person, or a tool, wants the node to be emptied, and asks again until nothing remains.
    pub(super) fn drain_node(
        &mut self,
        op: OpId,
        node: &NodeId,
        clock: Option<u64>,
        now: Instant,
    ) -> Result<Option<Reply>, Error> {
        if !self.members.contains(node) {
            if self.drain.completed.as_ref() == Some(node) {
                return Ok(Some(self.drained(node, 0, now)));
            }
            return Err(Error::NodeNotExists(node.to_string()));
        }
        let other = self.drain.session().is_some_and(|session| session.target != *node);
        if other || self.drain.clear.is_some() || !self.initialized {
            return Ok(Some(self.drained(node, 1, now)));
        }
        match &self.drain.phase {
            Phase::Active(_) => {
                self.tell_target(now);
                self.advance_liveness(now);
                let view = self.drain_view(now);
                Ok(Some(view.map_or_else(|| self.drained(node, 1, now), |view| Reply::Drain(Box::new(view)))))
            }
            Phase::Starting(_) => {
                self.drain_ops.push(op);
                Ok(None)
            }
            Phase::None => {
                let protocol = |node: &NodeId| self.nodes.get(node).and_then(|record| record.protocol);
                if self.members.iter().any(|node| protocol(node).is_none()) {
                    return Ok(Some(self.drained(node, 1, now)));
                }
                if self.members.iter().any(|node| protocol(node) == Some(0)) {
                    return Ok(Some(self.drained(node, 0, now)));
                }
                if !self.members.iter().any(|other| other != node && self.may_take_over(other, now)) {
                    return Err(Error::Drain(NOBODY));
                }
                let clock = clock.ok_or(Error::Drain("the clock of this node is not usable; set it"))?;
                let epoch = self
                    .drain
                    .next_epoch(clock)
                    .ok_or(Error::Drain("there is no further drain epoch; the clock is not usable"))?;
                (self.drain.epoch, self.drain.given) = (epoch, epoch);
                self.drain.phase = Phase::Starting(Session::new(node.clone(), epoch, clock / 1_000_000_000));
                self.drain_ops.push(op);
                self.store_drain(now);
                Ok(None)
            }
        }
    }

    /// Whether a node is not known to be on its way out.
    fn may_take_over(&self, node: &NodeId, now: Instant) -> bool {
        match self.nodes.get(node).map_or(NodeState::Unknown, |record| record.state(now)) {
            NodeState::Alive | NodeState::Unknown => true,
            NodeState::Draining | NodeState::Stopping => false,
        }
    }

    /// A person takes a drain back. The node keeps what it has and gets nothing new.
    pub(super) fn cancel_drain(&mut self, op: OpId, node: &NodeId, now: Instant) -> Result<(), Error> {
        let session = self
            .drain
            .session()
            .filter(|session| session.target == *node)
            .ok_or(Error::Drain("no drain of this node is under way"))?;
        let epoch = session.epoch;
        self.drain.phase = Phase::None;
        if self.members.contains(node) {
            self.drain.cancelled.insert(node.clone());
        }
        if let Some(record) = self.nodes.get_mut(node) {
            record.drain_requested = false;
        }
        for waiting in std::mem::take(&mut self.drain_ops) {
            self.out
                .push(Action::Reply { op: waiting, result: Err(Error::Drain("the drain was cancelled")) });
        }
        self.cancel_ops.push(op);
        self.begin_clear(epoch, now);
        Ok(())
    }

    fn drained(&self, node: &NodeId, remaining: u64, now: Instant) -> Reply {
        let state = self.nodes.get(node).map_or(NodeState::Unknown, |record| record.state(now));
        Reply::Drain(Box::new(DrainView::of(node, state, remaining)))
    }

    /// How far the drain under way is.
    #[must_use]
    pub fn drain_view(&self, now: Instant) -> Option<DrainView> {
        let session = self.drain.session()?;
        let target = &session.target;
        let count = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        let late = |at: Option<&Instant>| at.is_some_and(|at| now.duration_since(*at) < LATE);
        let holds =
            |feed: &&Feed| feed.changefeed.node() == Some(target) || late(feed.stale_told.get(target));
        let unknown = self.unknown_told.iter().filter(|((_, node), at)| node == target && late(Some(at)));
        let maintainers = self.feeds.values().filter(holds).count() + unknown.count();
        let (dispatchers, moves) = session.reported();
        let record = self.nodes.get(target);
        let state = record.map_or(NodeState::Unknown, |record| record.state(now));
        let mut view = DrainView {
            epoch: session.epoch,
            maintainers: count(maintainers),
            operators: count(self.operators_on(target)),
            dispatchers,
            moves,
            pending: count(self.untracked(session)),
            ..DrainView::of(target, state, 0)
        };
        let left = view.left();
        let stopped = record.is_some_and(crate::drain::NodeRecord::stopping_observed);
        let active = self.drain.active().is_some() && self.initialized;
        let complete = active && stopped && state != NodeState::Unknown && left == 0;
        view.remaining = if complete { 0 } else { left.max(1) };
        Some(view)
    }

    /// Changefeeds of which the current maintainer has not said what they have on the node. One whose
    /// placement changes, or that waits for a place, may have left something there.
    fn untracked(&self, session: &Session) -> usize {
        let unknown = |(id, feed): &(&ChangefeedId, &Feed)| {
            let changing = feed.is_changing()
                || matches!(feed.writing, Some(Write::BumpForAdd { .. } | Write::BumpForMove { .. }));
            let runs = feed.changefeed.info.state.should_run() && !feed.removing;
            let known = feed.changefeed.group() == Group::Replicating
                && session.has_report(id, feed.changefeed.info.epoch);
            changing || (runs && !known)
        };
        self.feeds.iter().filter(unknown).count() + self.creating.len()
    }

    /// Half a second passed: repeats what was not confirmed, and goes on with what was.
    pub(super) fn drain_tick(&mut self, now: Instant) {
        if !self.initialized {
            return;
        }
        let feeds = &self.feeds;
        if let Some(session) = self.drain.active_mut() {
            session.retain(|id, epoch| {
                feeds.get(id).is_some_and(|feed| {
                    feed.changefeed.group() == Group::Replicating && feed.changefeed.info.epoch == epoch
                })
            });
        }
        let stale = |told: Option<Instant>| told.is_none_or(|at| now.duration_since(at) >= REBROADCAST);
        if self.drain.active().is_some_and(|session| stale(session.told_at)) {
            self.tell_target(now);
        }
        if self.drain.clear.as_ref().is_some_and(|clear| stale(clear.told_at)) {
            self.tell_clear(now);
        }
        self.advance_liveness(now);
        self.store_drain(now);
    }

    /// Tells every node whom to empty. Who is not heard of, or cannot, is told by mistake at most: the fence
    /// is at the receiver.
    fn tell_target(&mut self, now: Instant) {
        let to: Vec<NodeId> = self.members.iter().filter(|node| self.takes_part(node)).cloned().collect();
        let Some(session) = self.drain.active_mut() else { return };
        session.told_at = Some(now);
        let request =
            SetDispatcherDrainTargetRequest { target: Some(session.target.clone()), epoch: session.epoch };
        for node in to {
            self.out.push(Action::Send {
                to: node,
                message: ToMaintainerManager::SetDrainTarget(request.clone()),
            });
        }
    }

    fn takes_part(&self, node: &NodeId) -> bool {
        self.bootstrapper.has_answered(node)
            && self.nodes.get(node).and_then(|record| record.protocol).is_some_and(|version| version > 0)
    }

    fn advance_liveness(&mut self, now: Instant) {
        let Some(view) = self.drain_view(now) else { return };
        let Some(session) = self.drain.active_mut() else { return };
        session.complete |= view.remaining == 0;
        let target = session.target.clone();
        let Some(record) = self.nodes.get_mut(&target) else { return };
        record.drain_requested = true;
        let command = match record.try_draining(now) {
            Some(node_epoch) => Some((NodeLiveness::Draining, node_epoch)),
            None if view.left() == 0 => {
                record.try_stopping(now).map(|node_epoch| (NodeLiveness::Stopping, node_epoch))
            }
            None => None,
        };
        if let Some((liveness, node_epoch)) = command {
            let request = SetNodeLivenessRequest { target: liveness, node_epoch };
            self.out
                .push(Action::Send { to: target, message: ToMaintainerManager::SetNodeLiveness(request) });
        }
    }

    /// A drain ended: every node is told until it says that it has no target any more.
    fn begin_clear(&mut self, epoch: u64, now: Instant) {
        let pending: BTreeSet<NodeId> =
            self.members.iter().filter(|node| self.takes_part(node)).cloned().collect();
        self.drain.clear = (!pending.is_empty()).then_some(Clear { epoch, pending, told_at: None });
        self.store_drain(now);
        self.tell_clear(now);
    }

    /// Nobody hears of the end before it is stored: a new coordinator would start what was ended.
    fn tell_clear(&mut self, now: Instant) {
        if !self.drain.is_durable() {
            return;
        }
        let Some(clear) = &mut self.drain.clear else { return };
        clear.told_at = Some(now);
        let request = SetDispatcherDrainTargetRequest { target: None, epoch: clear.epoch };
        for node in &clear.pending {
            let message = ToMaintainerManager::SetDrainTarget(request.clone());
            self.out.push(Action::Send { to: node.clone(), message });
        }
    }

    /// Nodes that hold a target although nothing is drained: they heard it from an earlier coordinator.
    fn clear_stale(&mut self, now: Instant) {
        let stale = |node: &NodeId| {
            let applied = self.nodes.get(node)?.applied.as_ref()?;
            (applied.target.is_some() && self.takes_part(node)).then_some(applied.epoch)
        };
        let newest = self.members.iter().filter_map(stale).max();
        let known = self.drain.clear.as_ref().map(|clear| clear.epoch);
        if let Some(epoch) = newest
            && known.is_none_or(|known| known < epoch)
        {
            self.begin_clear(epoch, now);
        }
    }

    /// A node said which target it has applied.
    pub(super) fn on_drain_applied(
        &mut self,
        from: &NodeId,
        target: Option<NodeId>,
        epoch: u64,
        now: Instant,
    ) {
        let Some(record) = self.nodes.get_mut(from) else { return };
        record.on_applied(target, epoch);
        self.drain.epoch = self.drain.epoch.max(epoch);
        let cleared = |clear: &Clear| {
            record
                .applied
                .as_ref()
                .is_some_and(|applied| applied.target.is_none() && applied.epoch >= clear.epoch)
        };
        if let Some(clear) = &mut self.drain.clear
            && cleared(clear)
        {
            clear.pending.remove(from);
            if clear.pending.is_empty() {
                self.drain.clear = None;
            }
        }
        if self.initialized && matches!(self.drain.phase, Phase::None) {
            self.clear_stale(now);
        }
    }

    /// A node joined late and can take part: it hears the target as soon as it has answered.
    pub(super) fn on_drain_joined(&mut self, node: &NodeId) {
        if let Some(session) = self.drain.active()
            && self.takes_part(node)
        {
            let request = SetDispatcherDrainTargetRequest {
                target: Some(session.target.clone()),
                epoch: session.epoch,
            };
            self.out.push(Action::Send {
                to: node.clone(),
                message: ToMaintainerManager::SetDrainTarget(request),
            });
        }
    }

    /// The set of members changes. A drain ends when its target leaves, and only then or by a cancel.
    pub(super) fn on_drain_members(&mut self, alive: &BTreeSet<NodeId>, now: Instant) {
        if self
            .drain
            .completed
            .as_ref()
            .is_some_and(|node| alive.contains(node) && !self.members.contains(node) && self.initialized)
        {
            self.drain.completed = None;
        }
        if !self.initialized {
            return;
        }
        let complete = self.drain_view(now).is_some_and(|view| view.remaining == 0);
        let ended = self
            .drain
            .session()
            .filter(|session| !alive.contains(&session.target))
            .map(|session| (session.target.clone(), session.epoch, complete || session.complete));
        self.drain.cancelled.retain(|node| alive.contains(node));
        if let Some(clear) = &mut self.drain.clear {
            clear.pending.retain(|node| alive.contains(node));
            if clear.pending.is_empty() {
                self.drain.clear = None;
            }
        }
        self.members.clone_from(alive);
        if let Some((target, epoch, complete)) = ended {
            if complete {
                self.drain.completed = Some(target.clone());
            }
            self.drain.phase = Phase::None;
            for op in std::mem::take(&mut self.drain_ops) {
                let result = Err(Error::NodeNotExists(target.to_string()));
                self.out.push(Action::Reply { op, result });
            }
            self.begin_clear(epoch, now);
        }
    }

    /// Makes durable what is not yet, one write at a time.
    fn store_drain(&mut self, now: Instant) {
        let waits = self.drain.retry_at.is_some_and(|at| now < at);
        if self.drain.writing.is_some() || waits || self.drain.is_durable() {
            return;
        }
        let doc = self.drain.doc();
        self.drain.writing = Some(doc.clone());
        self.out.push(Action::WriteDrain(doc));
    }

    /// The document of drains was stored, or not.
    pub fn on_drain_written(&mut self, result: Result<(), Error>, now: Instant) -> Vec<Action> {
        let Some(doc) = self.drain.writing.take() else { return Vec::new() };
        match result {
            Ok(()) => {
                self.drain.durable = Some(doc);
                self.drain.retry_at = None;
                if self.drain.is_durable() {
                    self.on_drain_durable(now);
                }
                self.store_drain(now);
            }
            Err(error) => {
                // What is stored now is not known. Whoever waits goes on waiting, as for every other write.
                tracing::debug!(%error, "the document of drains was not stored");
                self.drain.durable = None;
                self.drain.retry_at = Some(now + RETRY);
            }
        }
        self.schedule(now);
        std::mem::take(&mut self.out)
    }

    fn on_drain_durable(&mut self, now: Instant) {
        if let Phase::Starting(session) = &self.drain.phase {
            let session = session.clone();
            self.drain.cancelled.remove(&session.target);
            self.drain.completed = None;
            self.drain.phase = Phase::Active(session);
            self.tell_target(now);
            self.advance_liveness(now);
        }
        for op in std::mem::take(&mut self.drain_ops) {
            let view = self.drain_view(now);
            let result = view
                .map(|view| Reply::Drain(Box::new(view)))
                .ok_or(Error::Drain("no drain of this node is under way"));
            self.out.push(Action::Reply { op, result });
        }
        for op in std::mem::take(&mut self.cancel_ops) {
            self.out.push(Action::Reply { op, result: Ok(Reply::Done) });
        }
        if self.drain.clear.as_ref().is_some_and(|clear| clear.told_at.is_none()) {
            self.tell_clear(now);
        }
    }

    /// Nodes leave and nobody knows which: until that is known, or they are gone, nothing is placed.
    pub(super) fn is_frozen(&self) -> bool {
        self.drain.active().is_none() && self.members.iter().any(|node| self.is_leaving(node))
    }

    /// Whether a member is going away, other than one whose drain was taken back.
    pub(super) fn is_leaving(&self, node: &NodeId) -> bool {
        !self.drain.cancelled.contains(node) && self.nodes.get(node).is_some_and(|record| record.is_leaving())
    }

    /// Whether drains let a node be given a maintainer. A session supersedes an older clear.
    pub(super) fn drain_admits(&self, node: &NodeId) -> bool {
        match self.drain.active() {
            Some(session) => {
                session.target != *node
                    && self
                        .nodes
                        .get(node)
                        .is_some_and(|record| record.has_applied(&session.target, session.epoch))
            }
            None => !self.drain.clear.as_ref().is_some_and(|clear| clear.pending.contains(node)),
        }
    }

    /// The nodes that are to be emptied of maintainers.
    pub(super) fn emptied_nodes(&self) -> Vec<NodeId> {
        let Some(session) = self.drain.active() else { return Vec::new() };
        self.members
            .iter()
            .filter(|node| **node == session.target || self.is_leaving(node))
            .cloned()
            .collect()
    }
}

impl DrainView {
    /// The largest of the counts: the same thing may be in several of them.
    fn left(&self) -> u64 {
        if !heartbeatpb::Rule::DrainCountsMoves.holds() {
            return self.maintainers.max(self.dispatchers);
        }
        [self.maintainers, self.operators, self.dispatchers, self.moves, self.pending]
            .into_iter()
            .max()
            .unwrap_or(0)
    }
}
