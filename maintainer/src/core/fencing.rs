//! Nodes that are gone keep their spans until the downstream refuses what they write.

use std::collections::BTreeSet;
use std::time::Instant;

use heartbeatpb::{NodeId, Rule, RunningError, codes};

use super::{Core, Effect, Waits};
use crate::fence::FenceOutcome;

impl Core {
    /// Nodes that this maintainer may ask for anything: they live, and were not fenced under its epoch.
    pub(super) fn members(&self) -> BTreeSet<NodeId> {
        let usable = |node: &&NodeId| !self.fencing.is_lost(node) && !self.fencing.is_gone(node);
        self.alive.iter().filter(usable).cloned().collect()
    }

    /// The set of nodes has changed: operators take a node that is gone for a silent one until it cannot write.
    pub(super) fn show_nodes(&mut self) {
        self.placement.alive = self.members();
        self.placement.alive.extend(self.fencing.lost().iter().cloned());
    }

    /// A node is gone. Its spans are free once nothing of it can be written.
    pub(super) fn on_node_gone(&mut self, node: &NodeId, now: Instant) {
        if self.initialized && self.fencing.lose(node) {
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

    /// A node is there again that was fenced, or is about to be: it can be used again under another epoch only. Its spans
    /// are elsewhere, and to start the changefeed again for its sake would cost more than it is worth.
    pub(super) fn note_returned(&self, before: &BTreeSet<NodeId>) {
        let returned = |node: &&NodeId| self.fencing.is_lost(node) || self.fencing.is_gone(node);
        for node in self.alive.difference(before).filter(returned) {
            tracing::warn!(changefeedID = %self.id, %node,
                "a node is back whose writers were fenced; it is used again when the changefeed's maintainer starts anew");
        }
    }

    /// Asks the downstream for what is wanted of it, when it is time.
    pub(super) fn ask_fence(&mut self, now: Instant, out: &mut Vec<Effect>) {
        if self.stopped || self.removal.is_some() {
            return;
        }
        if let Some((attempt, whom)) = self.fencing.begin(now) {
            out.push(Effect::Fence { attempt, whom });
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
