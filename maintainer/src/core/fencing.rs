//! Nodes that are gone keep their spans until the downstream refuses what they write; those that come back are let in
//! under a new number, with nothing of what they had.

use std::collections::BTreeSet;
use std::time::Instant;

use heartbeatpb::{ConfigBytes, MaintainerCloseRequest, NodeId, Rule, RunningError, codes};
use messaging::{ToHeartbeatCollector, ToOrchestrator};

use super::{Core, Effect, Waits};
use crate::fence::FenceOutcome;

impl Core {
    /// Nodes that this maintainer may ask for anything: they live, and are not fenced.
    pub(super) fn members(&self) -> BTreeSet<NodeId> {
        let usable = |node: &&NodeId| !self.fencing.is_lost(node) && !self.fencing.is_gone(node);
        self.alive.iter().filter(usable).cloned().collect()
    }

    /// Nodes without which nothing begins, and that have yet to close what an earlier maintainer left there: this one, and
    /// all of them where nothing else keeps them from writing.
    pub(super) fn must_close(&self) -> impl Iterator<Item = &NodeId> {
        let own = Some(&self.me).filter(|me| self.fencing.is_gone(me) && self.fencing.applies());
        self.fencing.must_close(&self.alive).chain(own)
    }

    /// The set of nodes has changed: operators take a node that is gone for a silent one until it cannot write.
    pub(super) fn show_nodes(&mut self) {
        self.placement.alive = self.members();
        self.placement.alive.extend(self.fencing.lost().iter().cloned());
    }

    /// A node is gone. Its spans are free once nothing of it can be written.
    pub(super) fn on_node_gone(&mut self, node: &NodeId, now: Instant) {
        if !self.initialized {
            self.fencing.forsake(node);
        } else if self.fencing.lose(node) {
            tracing::info!(changefeedID = %self.id, %node, "a node is gone; its spans wait until it cannot write any more");
            return;
        }
        self.release_node(node, now);
    }

    fn release_node(&mut self, node: &NodeId, now: Instant) {
        self.show_nodes();
        if !Rule::OneSnapshot.holds() {
            self.fold.on_node_removed(node);
            self.settle();
        }
        // Its spans hold the checkpoint as absent ones before its watermark goes.
        self.placement.drive(now, |operators, cx| operators.on_node_removed(node, cx));
        self.fold.on_node_removed(node);
        self.errors.remove(node);
        self.set_trouble(Waits::Node(node.clone()), None);
        self.missing.remove(node);
    }

    /// Says once of nodes that are back what becomes of them.
    pub(super) fn note_returned(&self, before: &BTreeSet<NodeId>) {
        for node in self.alive.difference(before) {
            if self.fencing.is_lost(node) {
                tracing::info!(changefeedID = %self.id, %node,
                    "a node is back whose writers are being fenced; it is let in after that");
            } else if self.fencing.is_gone(node) && !self.fencing.is_closing(node) {
                tracing::warn!(changefeedID = %self.id, %node,
                    "a node is back whose writers were fenced; it is used again when the changefeed's maintainer starts anew");
            }
        }
    }

    /// Lets nodes in again that were fenced and are back: what they had is closed first, by a new number, so that nothing
    /// of it can be taken for what they are given then. Said again until they answer.
    pub(super) fn let_back(&mut self, now: Instant, out: &mut Vec<Effect>) {
        if self.stopped || self.removal.is_some() {
            return;
        }
        for node in self.fencing.close(&self.alive, now) {
            let epoch = self.fencing.number_of(&node);
            let request = MaintainerCloseRequest { changefeed: self.id.clone(), removed: false, epoch };
            out.push(Effect::Orchestrate(node, ToOrchestrator::Close(request)));
        }
    }

    /// A node that is back has closed what it had.
    pub(super) fn on_closed_again(&mut self, node: &NodeId, now: Instant, out: &mut Vec<Effect>) {
        if !self.fencing.on_closed(node) {
            return;
        }
        tracing::info!(changefeedID = %self.id, %node, number = ?self.fencing.number_of(node),
            "a node that was fenced is let in again");
        self.renew_members(now, out);
    }

    /// The configuration of a node's dispatchers: its sink registers by the number that it is given.
    pub(super) fn config_for(&self, node: &NodeId) -> ConfigBytes {
        let number = self.fencing.number_of(node);
        if number == self.epoch {
            return self.config.clone();
        }
        let mut settings = self.settings.clone();
        settings.epoch = number;
        settings.to_bytes()
    }

    /// What leaves for the dispatchers of a node carries the number by which the node is asked.
    pub(super) fn address(&self, node: NodeId, mut message: ToHeartbeatCollector) -> Effect {
        let number = self.fencing.number_of(&node);
        match &mut message {
            ToHeartbeatCollector::Schedule(request) => request.epoch = number,
            ToHeartbeatCollector::Merge(request) => request.epoch = number,
            ToHeartbeatCollector::HeartBeatResponse(response) => response.epoch = number,
            // It has no epoch, and goes to the own node only.
            ToHeartbeatCollector::CheckpointTs(_) => {}
        }
        Effect::Dispatch(node, message)
    }

    /// A member's sink may not write any more, because an earlier maintainer had given the node up: it is fenced again, so that
    /// nothing of it is on its way, and begins anew. `false`: that is not possible, and the changefeed has to.
    pub(super) fn on_fenced_sink(&mut self, from: &NodeId, now: Instant, out: &mut Vec<Effect>) -> bool {
        let possible = *from != self.me && self.epoch.is_some() && self.removal.is_none();
        if !possible || !self.fencing.lose(from) {
            return false;
        }
        tracing::info!(changefeedID = %self.id, node = %from, "the sink of a node may not write; the node begins anew");
        self.renew_members(now, out);
        self.ask_fence(now, out);
        self.after_change(now, out);
        true
    }

    /// Members have answered whose sinks cannot write: another maintainer had given them up. They would fail at their first
    /// row. What they have is closed, as that of a node that is back.
    fn on_dead(&mut self, nodes: &[NodeId], now: Instant, out: &mut Vec<Effect>) {
        for node in nodes.iter().filter(|node| self.bootstrapper.has_answered(node)) {
            tracing::info!(changefeedID = %self.id, %node, "a node was fenced under an earlier maintainer; it begins anew");
            self.fencing.forsake(node);
        }
        self.renew_members(now, out);
    }

    /// Asks the downstream for what is wanted of it, when it is time.
    pub(super) fn ask_fence(&mut self, now: Instant, out: &mut Vec<Effect>) {
        if self.stopped || self.removal.is_some() {
            return;
        }
        if let Some((attempt, whom)) = self.fencing.begin(now) {
            out.push(Effect::Fence { attempt, newest: self.fencing.newest(), whom });
        }
    }

    /// The downstream has refused nodes, or could not be asked.
    pub(crate) fn on_fenced(
        &mut self,
        attempt: u64,
        result: Result<FenceOutcome, RunningError>,
        now: Instant,
        out: &mut Vec<Effect>,
    ) {
        if self.stopped || self.removal.is_some() {
            return;
        }
        let sweeping = self.fencing.is_sweeping();
        let answered = result.is_ok();
        let heard = self.fencing.on_done(attempt, result, now);
        if answered {
            self.set_trouble(Waits::Fence, None);
        }
        match heard.error {
            // It is asked again until it answers.
            Some(error) if error.code == codes::SINK_UNAVAILABLE => {
                self.set_trouble(Waits::Fence, Some(error))
            }
            Some(error) => {
                let me = self.me.clone();
                self.record_error(&me, error);
            }
            None => {}
        }
        for node in &heard.released {
            tracing::info!(changefeedID = %self.id, %node, "a node that is gone cannot write any more");
            self.release_node(node, now);
        }
        if !self.initialized {
            self.on_dead(&heard.dead, now, out);
        }
        self.let_back(now, out);
        if sweeping && !self.fencing.is_sweeping() {
            // Those that joined meanwhile.
            for node in self.bootstrapper.silent().cloned().collect::<Vec<_>>() {
                self.ask_bootstrap(node, out);
            }
        }
        if heard.swept && self.bootstrapper.is_ready() {
            self.on_round_complete(now, out);
        }
        self.ask_fence(now, out);
        self.after_change(now, out);
    }
}
