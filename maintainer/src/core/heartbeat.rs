//! What nodes report of their dispatchers, and what is done about differences (maintainer §10).

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use heartbeatpb::{
    ComponentState, DispatcherId, HeartBeatRequest, Mode, NodeId, OperatorType, TableSpan, TableSpanStatus,
    codes,
};
use messaging::ToHeartbeatCollector;
use replica::{Standing, contains, is_terminal};

use super::{Core, Effect, Waits};

/// A node is told no more often that a dispatcher is not wanted.
const ORPHAN_PAUSE: Duration = Duration::from_secs(5);
/// Orphans that are remembered; with more of them the pause is not kept.
const ORPHANS: usize = 10_000;

impl Core {
    /// A node reports.
    pub(crate) fn on_heartbeat(
        &mut self,
        from: &NodeId,
        request: HeartBeatRequest,
        now: Instant,
        out: &mut Vec<Effect>,
    ) {
        if request.watermark.is_some()
            && !self.stopped
            && self.alive.contains(from)
            && !self.fencing.is_gone(from)
        {
            // Also before the take-over, which may wait for the same.
            self.set_trouble(Waits::Node(from.clone()), request.trouble.map(|trouble| *trouble));
        }
        // A late word of a node that is gone would bring its watermark back.
        if self.stopped || !self.initialized || !self.is_heard(from) {
            return;
        }
        if request.error.as_ref().is_some_and(|error| error.code == codes::SINK_FENCED)
            && self.on_fenced_sink(from, now, out)
        {
            return;
        }
        if let Some(mark) = request.watermark {
            self.fold.on_watermark(from, mark);
        }
        if let Some(mut error) = request.error {
            if error.node.is_empty() {
                error.node = from.to_string();
            }
            self.record_error(from, error);
        }
        // Only after the watermark: a status may end what held the checkpoint at a new dispatcher, and the
        // watermark that includes this dispatcher must be there by then.
        for status in request.statuses.iter().filter(|status| status.mode == Mode::Default) {
            self.on_status(from, status, now, out);
        }
        if request.complete && self.removal.is_none() {
            self.release_missing(from, &request.statuses);
        }
        self.after_change(now, out);
    }

    /// Whether a node's reports count. What waited with the answer of a node that was let in again was said before it.
    pub(super) fn is_heard(&self, from: &NodeId) -> bool {
        self.bootstrapper.has_answered(from) && !self.begun.contains(from)
    }

    fn on_status(&mut self, from: &NodeId, status: &TableSpanStatus, now: Instant, out: &mut Vec<Effect>) {
        let id = status.id;
        // A plain report about a span that runs where it should costs two look-ups.
        let occupied = self.placement.operators.contains(id);
        if occupied {
            self.placement.drive(now, |operators, cx| operators.on_status(from, status, cx));
        }
        let healing = self.removal.is_none();
        let Some(span) = self.placement.spans.get(id) else {
            if healing && !occupied && status.state == ComponentState::Working {
                self.remove_orphan(from, id, now, out);
            }
            return;
        };
        if span.node.as_ref() != Some(from) {
            tracing::debug!(dispatcher = %id, %from, "late report of a node that has lost the span");
            return;
        }
        self.placement.spans.observe(status);
        self.weigh(status);
        let lost = is_terminal(status.state)
            && !self.placement.operators.contains(id)
            && !occupied
            && !self.placement.spans.is_trigger(id);
        if healing && lost {
            self.release_lost(id);
        }
    }

    /// A dispatcher that nobody wants.
    fn remove_orphan(&mut self, from: &NodeId, id: DispatcherId, now: Instant, out: &mut Vec<Effect>) {
        if self.orphans.get(&id).is_some_and(|at| now < *at + ORPHAN_PAUSE) {
            return;
        }
        if self.orphans.len() >= ORPHANS {
            self.orphans.clear();
        }
        self.orphans.insert(id, now);
        tracing::info!(changefeedID = %self.id, dispatcher = %id, node = %from, "removing a dispatcher that is not wanted");
        let effect =
            self.placement.operators.removal(from.clone(), id, TableSpan::ddl(), OperatorType::Remove);
        if let operator::Effect::Send(node, request) = effect {
            out.push(self.address(node, ToHeartbeatCollector::Schedule(request)));
        }
    }

    /// A dispatcher ended that nobody asked to end. When another one covers its keys it was merged away;
    /// otherwise its span needs a new home.
    fn release_lost(&mut self, id: DispatcherId) {
        let spans = &mut self.placement.spans;
        let Some(span) = spans.get(id) else { return };
        let covered = spans.by_table(span.span.table).any(|other| {
            other.id != id
                && contains(&other.span, &span.span)
                && spans.standing(other.id) == Some(Standing::Replicating)
        });
        if covered {
            spans.remove(id);
        } else {
            spans.mark_absent(id);
        }
    }

    /// Two complete reports in a row leave a span out that the node should run: it is not there any more, and
    /// the word of its end was lost.
    fn release_missing(&mut self, from: &NodeId, statuses: &[TableSpanStatus]) {
        let mut reported: Vec<DispatcherId> = statuses.iter().map(|status| status.id).collect();
        reported.sort_unstable();
        let absent: BTreeSet<DispatcherId> = self
            .placement
            .spans
            .ids_by_node(from)
            .filter(|id| {
                // Nearly all are: they cost no further look-up.
                reported.binary_search(id).is_err()
                    && self.placement.spans.is_replicating(*id)
                    && !self.placement.operators.contains(*id)
            })
            .collect();
        let before = self.missing.insert(from.clone(), absent);
        let lost: Vec<DispatcherId> = match (&before, self.missing.get(from)) {
            (Some(before), Some(absent)) => absent.intersection(before).copied().collect(),
            (None, _) | (_, None) => Vec::new(),
        };
        for id in lost {
            tracing::warn!(changefeedID = %self.id, dispatcher = %id, node = %from, "a dispatcher has vanished");
            self.placement.spans.mark_absent(id);
        }
    }
}
