//! Leaving: with the dispatcher managers closed, or left to the successor (maintainer §15).

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use heartbeatpb::{MaintainerCloseRequest, MaintainerCloseResponse, MaintainerEpoch, NodeId, TableId, Ts};
use messaging::ToOrchestrator;

use super::{Core, Effect};

/// A close request is repeated after this time, then after twice that.
const CLOSE_RESEND: Duration = Duration::from_millis(500);
/// The longest time between two repetitions.
const CLOSE_RESEND_MAX: Duration = Duration::from_secs(1);

/// A removal that began.
pub(super) struct Removal {
    /// Dispatcher managers are closed too.
    cascade: bool,
    /// The changefeed is deleted.
    removed: bool,
    closed: BTreeSet<NodeId>,
    asked: BTreeMap<NodeId, (Instant, Duration)>,
    /// Where the table trigger was when it was asked to leave. The successor starts where this maintainer says
    /// it is, and must not start behind a schema change that the trigger has not seen.
    trigger: Option<Ts>,
    leaving: bool,
}

impl Removal {
    fn begin(cascade: bool) -> Self {
        Self {
            cascade,
            removed: false,
            closed: BTreeSet::new(),
            asked: BTreeMap::new(),
            trigger: None,
            leaving: false,
        }
    }

    pub(super) fn trigger_checkpoint(&self) -> Option<Ts> {
        self.trigger
    }
}

impl Core {
    /// The coordinator wants the maintainer gone. `cascade`: its dispatcher managers too; `removed`: for good.
    pub(crate) fn on_remove(
        &mut self,
        epoch: Option<MaintainerEpoch>,
        cascade: bool,
        removed: bool,
        now: Instant,
        out: &mut Vec<Effect>,
    ) {
        // A request without an epoch is for a maintainer without one; a maintainer without one takes all.
        if self.stopped || (self.epoch.is_some() && epoch != self.epoch) {
            if !self.stopped {
                tracing::info!(changefeedID = %self.id, received = ?epoch, current = ?self.epoch, "removal of another epoch");
                out.push(Effect::Stale("remove_request"));
            }
            return;
        }
        if self.removal.is_none() && !self.initialized && !cascade && !removed {
            // Leaving now would drop the answers that are on their way, and nobody would ever be asked again.
            tracing::info!(changefeedID = %self.id, "not initialised yet: removal ignored, it will be repeated");
            return;
        }
        let begins = self.removal.is_none();
        let removal = self.removal.get_or_insert_with(|| Removal::begin(cascade));
        // A later, plainer request does not turn a deletion into a move.
        removal.cascade |= cascade || removed;
        if removed && !removal.removed {
            removal.removed = true;
            removal.closed.clear();
            removal.asked.clear();
        }
        if begins {
            tracing::info!(changefeedID = %self.id, epoch = ?self.epoch, cascade, removed, "maintainer is leaving");
            self.placement.operators.quiesce_except([self.trigger]);
            self.post = None;
            self.planning.clear();
            self.abandon_wishes(out);
        }
        self.continue_removal(now, out);
    }

    /// Does what is left to do; called whenever something changed and at every tick.
    pub(super) fn continue_removal(&mut self, now: Instant, out: &mut Vec<Effect>) {
        let trigger = self.placement.spans.trigger().map(|trigger| trigger.checkpoint);
        let Some(removal) = &mut self.removal else { return };
        if removal.leaving {
            return;
        }
        if removal.cascade {
            for node in self.alive.difference(&removal.closed) {
                let asked = removal.asked.get(node).copied();
                if asked.is_some_and(|(at, _)| now < at) {
                    continue;
                }
                let pause = asked.map_or(CLOSE_RESEND, |(_, pause)| (pause * 2).min(CLOSE_RESEND_MAX));
                removal.asked.insert(node.clone(), (now + pause, pause));
                let request = MaintainerCloseRequest {
                    changefeed: self.id.clone(),
                    removed: removal.removed,
                    epoch: self.fencing.number_of(node),
                };
                out.push(Effect::Orchestrate(node.clone(), ToOrchestrator::Close(request)));
            }
            // Before the first list of nodes nobody can be known to be closed.
            removal.leaving = !self.alive.is_empty() && self.alive.is_subset(&removal.closed);
        } else {
            if let Some(checkpoint) = trigger {
                removal.trigger = Some(checkpoint);
                self.placement.drive(now, |operators, cx| operators.remove_tables(&[TableId::DDL], cx));
                self.flush_operators(out);
            }
            let gone = !self.placement.operators.contains(self.trigger);
            if let Some(removal) = &mut self.removal {
                removal.leaving = gone;
            }
        }
        if self.removal.as_ref().is_some_and(|removal| removal.leaving) {
            out.push(Effect::Leave);
        }
    }

    /// A dispatcher manager says whether it is closed.
    pub(crate) fn on_close(
        &mut self,
        from: &NodeId,
        response: &MaintainerCloseResponse,
        now: Instant,
        out: &mut Vec<Effect>,
    ) {
        if self.stopped || !self.is_mine("close_response", from, response.epoch, out) {
            return;
        }
        if self.removal.is_none() {
            if response.success {
                self.on_closed_again(from, now, out);
                self.after_change(now, out);
            } else {
                self.fencing.on_closing(from, now);
            }
            return;
        }
        let Some(removal) = &mut self.removal else { return };
        // Still closing: it is asked again.
        if response.success {
            removal.closed.insert(from.clone());
            self.continue_removal(now, out);
        }
    }

    /// The log reader has stopped: nothing of this maintainer is left.
    pub(crate) fn on_left(&mut self) {
        self.stopped = true;
        self.changed();
    }
}
