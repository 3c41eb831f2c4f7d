//! What the owner hears: aggregated heartbeats, changed states, errors (dispatcher §7.3, §12).

use std::time::Instant;

use heartbeatpb::{BlockStatusRequest, ComponentState, HeartBeatRequest, TableSpanStatus, Ts, Watermark};

use super::{Action, COMPLETE_EVERY, Core, ERROR_RESEND, Life};
use crate::Fault;
use crate::dispatcher::Dispatcher;
use crate::table::Slot;

/// A status without a measured rate.
pub(super) fn status_of(dispatcher: &Dispatcher, state: ComponentState) -> TableSpanStatus {
    TableSpanStatus {
        id: dispatcher.id,
        state,
        checkpoint: dispatcher.checkpoint(),
        event_size_per_second: 0.0,
        mode: dispatcher.mode,
    }
}

impl Core {
    /// The periodic heartbeat: watermark, dispatchers that have let go, and every so often all of them.
    pub(super) fn aggregate(&mut self, now: Instant) {
        let gone: Vec<Slot> = self
            .leaving
            .iter()
            .copied()
            .filter(|slot| self.dispatchers.get(*slot).is_some_and(|dispatcher| dispatcher.removing))
            .collect();
        // Those that are about to go still count, so that this watermark is not ahead of their last word.
        let (checkpoint, resolved) = self.dispatchers.watermark();
        for slot in std::mem::take(&mut self.copying) {
            if let Some(dispatcher) = self.dispatchers.get(slot)
                && let Some(end) = dispatcher.durable_part()
            {
                self.actions.push(Action::Copied { id: dispatcher.id, end });
            }
        }
        let complete = self.next_complete.is_none_or(|at| at <= now);
        if complete {
            self.next_complete = Some(now + COMPLETE_EVERY);
        }
        let mut statuses: Vec<TableSpanStatus> = gone
            .iter()
            .filter_map(|slot| self.dispatchers.get(*slot))
            .map(|dispatcher| status_of(dispatcher, ComponentState::Stopped))
            .collect();
        if complete {
            for dispatcher in self.dispatchers.iter_mut() {
                let listed = dispatcher.counts() && dispatcher.state != ComponentState::Initializing;
                if listed && !dispatcher.removing {
                    let rate = dispatcher.take_event_size_per_second(now);
                    let state = dispatcher.state;
                    statuses.push(TableSpanStatus {
                        event_size_per_second: rate,
                        ..status_of(dispatcher, state)
                    });
                }
            }
        }
        self.latest = Watermark { checkpoint, resolved, seq: self.seq, last_synced: self.last_synced };
        for slot in gone {
            self.clean(slot);
        }
        self.merges.forget_finished(&self.dispatchers);
        self.send_heartbeat(statuses, self.latest, complete);
    }

    /// The set of dispatchers grew. Whatever carries the new generation tells a watermark that counts the newcomer, which
    /// would be passed otherwise; `checkpoint` is where it begins, if it counts already.
    pub(super) fn grow(&mut self, checkpoint: Option<Ts>) {
        self.seq += 1;
        self.latest.seq = self.seq;
        let Some(checkpoint) = checkpoint else { return };
        let unknown = self.latest.checkpoint == Ts::ZERO;
        let lower = |ts: &mut Ts| *ts = if unknown { checkpoint } else { checkpoint.min(*ts) };
        lower(&mut self.latest.checkpoint);
        lower(&mut self.latest.resolved);
    }

    /// Forgets a dispatcher that has let go.
    fn clean(&mut self, slot: Slot) {
        self.leaving.remove(&slot);
        let Some(dispatcher) = self.dispatchers.remove(slot) else { return };
        self.journal.delete(dispatcher.id);
        if self.trigger.is_some_and(|trigger| trigger.id == dispatcher.id) {
            self.trigger = None;
        }
        self.actions.push(Action::CloseDispatcher { id: dispatcher.id });
    }

    pub(super) fn send_heartbeat(
        &mut self,
        statuses: Vec<TableSpanStatus>,
        watermark: Watermark,
        complete: bool,
    ) {
        self.actions.push(Action::HeartBeat(HeartBeatRequest {
            changefeed: self.id.clone(),
            watermark: Some(watermark),
            redo_watermark: None,
            statuses,
            complete,
            error: None,
            trouble: self.trouble.clone().map(Box::new),
        }));
    }

    /// A heartbeat could not leave. The next one repairs its watermark; its statuses go with it.
    pub(crate) fn on_heartbeat_unsent(&mut self, request: HeartBeatRequest, now: Instant) {
        if self.life != Life::Open {
            return;
        }
        let mut statuses = request.statuses;
        if request.complete {
            for status in &statuses {
                let slot = self.dispatchers.slot(status.id);
                if let Some(dispatcher) = slot.and_then(|slot| self.dispatchers.get_mut(slot)) {
                    dispatcher.take_event_size_back();
                }
            }
            statuses.retain(|status| status.state == ComponentState::Stopped);
            // The owner missed a complete list: give it the next one.
            self.next_complete = None;
        }
        self.changed.unsent(statuses, now);
    }

    /// Block statuses have left.
    pub(crate) fn on_block_statuses_sent(&mut self, request: &BlockStatusRequest) {
        self.blocks.sent(request);
    }

    /// Block statuses could not leave.
    pub(crate) fn on_block_statuses_unsent(&mut self, request: BlockStatusRequest, now: Instant) {
        if self.life == Life::Open {
            self.blocks.unsent(request, now);
        }
    }

    /// Something failed. The first failure is what matters: later ones follow from it.
    pub(crate) fn on_error(&mut self, fault: Fault, now: Instant) {
        if self.life != Life::Open {
            return;
        }
        if self.error.is_some() {
            self.later_errors += 1;
            tracing::debug!(changefeed = %self.id, code = fault.code, later = self.later_errors, "a later error");
            return;
        }
        tracing::warn!(
            changefeed = %self.id, code = fault.code, retryable = fault.retryable, error = fault.message,
            "the changefeed fails on this node"
        );
        self.error = Some((fault, now));
    }

    pub(super) fn repeat_error(&mut self, now: Instant) {
        if let Some((fault, at)) = &mut self.error
            && *at <= now
        {
            *at = now + ERROR_RESEND;
            let fault = fault.clone();
            self.actions.push(Action::ReportError(fault));
        }
    }
}
