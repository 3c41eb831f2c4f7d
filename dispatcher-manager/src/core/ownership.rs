//! Who commands the manager: bootstrap, post-bootstrap, close (dispatcher §2–§5, §7.2).

use std::collections::BTreeMap;
use std::time::Instant;

use heartbeatpb::{
    BootstrapTableSpan, ComponentState, DispatcherConfig, DispatcherId, MaintainerBootstrapRequest,
    MaintainerBootstrapResponse, MaintainerEpoch, MaintainerPostBootstrapRequest,
    MaintainerPostBootstrapResponse, Mode, NodeId, Owner, SchemaId, TableSpan, Ts,
};
use sink::TableStart;

use super::{Action, Cleanup, Core, Life, Opening, Purpose, Trigger};
use crate::dispatcher::Dispatcher;
use crate::table::Slot;
use crate::{Error, Fault};

/// Where a bootstrap has got to.
#[derive(Debug)]
pub(crate) enum BootstrapStep {
    /// Answer with this.
    Reply(MaintainerBootstrapResponse),
    /// Answer with an error; the owner may be another one.
    Refuse(Fault),
    /// The request is stale: say nothing.
    Drop,
    /// The table trigger is being created; [`Action::Bootstrapped`] follows.
    Wait,
    /// The manager is closing: say nothing, the owner asks again.
    Closing,
    /// The manager is closed: another one may take its place.
    Closed,
}

/// Result of a post-bootstrap.
#[derive(Debug)]
pub(crate) enum PostBootstrapStep {
    /// Answer with this.
    Reply(MaintainerPostBootstrapResponse),
    /// Answer with an error.
    Refuse(Fault),
    /// Say nothing.
    Drop,
}

/// Result of a close.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum CloseStep {
    /// Somebody else's manager: nothing happens.
    NotAllowed,
    /// Going on in the background; ask again.
    Closing,
    /// Closed.
    Closed,
}

/// An error about the table trigger.
fn trigger_fault(what: &'static str) -> Fault {
    Error::Trigger(what).fault()
}

impl Core {
    /// A maintainer wants this manager. `created`: for this very request.
    pub(crate) fn on_bootstrap(
        &mut self,
        from: &NodeId,
        request: &MaintainerBootstrapRequest,
        created: bool,
    ) -> BootstrapStep {
        match self.life {
            Life::Open => {}
            Life::Closing => return BootstrapStep::Closing,
            Life::Closed => return BootstrapStep::Closed,
        }
        if !self.owner.can_update(from, request.epoch) {
            tracing::debug!(changefeed = %self.id, %from, epoch = ?request.epoch, owner = ?self.owner,
                "dropped a stale bootstrap");
            return BootstrapStep::Drop;
        }
        if request.redo_trigger.is_some() {
            return BootstrapStep::Refuse(trigger_fault("the redo pipeline is not available on this node"));
        }
        // Before the owner changes: the one before must still be able to close this manager.
        match (request.trigger, self.trigger) {
            (None, Some(_)) if !created => {
                return BootstrapStep::Refuse(trigger_fault(
                    "table trigger event dispatcher present during nil trigger bootstrap",
                ));
            }
            (Some(wanted), Some(present)) if wanted != present.id => {
                return BootstrapStep::Refuse(trigger_fault(
                    "table trigger event dispatcher id mismatch during bootstrap",
                ));
            }
            (None | Some(_), None | Some(_)) => {}
        }
        if !self.sink_healthy && (self.owner != asker(from, request) || self.wants_trigger(request)) {
            // Nothing is written here any more, and the owner that would have been told so and closed this manager is
            // gone, or cannot start. It goes by itself, and the request, repeated, finds a new one.
            tracing::info!(changefeed = %self.id, %from, epoch = ?request.epoch, "the sink has failed; a new owner gets a new manager");
            self.stop();
            return BootstrapStep::Closing;
        }
        let log_moved = self.owner.node != *from;
        if !self.owner.try_update(from, request.epoch) {
            return BootstrapStep::Drop;
        }
        // Not the largest one ever: the owner before may have begun at a checkpoint that was not stored when the leader
        // that knew it died. Schema changes behind the stored one are not in the tables of this owner.
        self.durable = request.start_ts;
        if log_moved {
            self.resubscribe();
        }
        if let Some(id) = request.trigger
            && self.trigger.is_none()
        {
            // Also repairs a creation that failed before: the owner asks again.
            self.open_trigger(id, request.start_ts, created && request.is_new);
            return BootstrapStep::Wait;
        }
        BootstrapStep::Reply(self.bootstrap_response())
    }

    /// Whether the request cannot be answered before a table trigger was made for it.
    fn wants_trigger(&self, request: &MaintainerBootstrapRequest) -> bool {
        request.trigger.is_some() && self.trigger.is_none()
    }

    fn open_trigger(&mut self, id: DispatcherId, start_ts: Ts, is_new: bool) {
        let config = DispatcherConfig {
            span: TableSpan::ddl(),
            start_ts,
            dispatcher: id,
            schema: SchemaId::DDL,
            mode: Mode::Default,
            skip_dml_at_start: false,
        };
        self.ask_sink(Opening { config, purpose: Purpose::Trigger { is_new } });
    }

    pub(super) fn on_trigger_opened(
        &mut self,
        mut config: DispatcherConfig,
        is_new: bool,
        result: Result<TableStart, Fault>,
        now: Instant,
    ) {
        let step = match result {
            Ok(start) => {
                if !is_new {
                    config.start_ts = start.start_ts.max(config.start_ts);
                    config.skip_dml_at_start = start.skip_dml_at_start;
                }
                self.trigger = Some(Trigger { id: config.dispatcher, registered: false });
                self.insert_dispatcher(&config, now);
                BootstrapStep::Reply(self.bootstrap_response())
            }
            Err(fault) => BootstrapStep::Refuse(fault),
        };
        self.actions.push(Action::Bootstrapped(step));
    }

    fn bootstrap_response(&mut self) -> MaintainerBootstrapResponse {
        let spans: Vec<BootstrapTableSpan> = self.dispatchers.iter().map(bootstrap_span).collect();
        let reported: BTreeMap<DispatcherId, Mode> = spans.iter().map(|span| (span.id, span.mode)).collect();
        let operators =
            self.journal.bootstrap(&self.owner, |id, mode| reported.get(&id).is_some_and(|m| *m == mode));
        let trigger = self.trigger.and_then(|trigger| self.dispatchers.slot(trigger.id));
        let checkpoint =
            trigger.and_then(|slot| self.dispatchers.get(slot)).map_or(Ts::ZERO, |trigger| trigger.start_ts);
        MaintainerBootstrapResponse {
            changefeed: self.id.clone(),
            spans,
            error: None,
            checkpoint,
            redo_checkpoint: Ts::ZERO,
            operators,
            merges: self.merges.requests(),
            epoch: self.owner.epoch,
        }
    }

    /// The owner knows all tables: the table trigger may start.
    pub(crate) fn on_post_bootstrap(
        &mut self,
        from: &NodeId,
        request: &MaintainerPostBootstrapRequest,
    ) -> PostBootstrapStep {
        if !self.is_allowed("post-bootstrap", from, request.epoch) {
            return PostBootstrapStep::Drop;
        }
        let Some(trigger) = self.trigger.filter(|trigger| trigger.id == request.trigger) else {
            return PostBootstrapStep::Refuse(trigger_fault(
                "table trigger event dispatcher is not here or has another id",
            ));
        };
        // Our sinks keep no names of their own, so the tables of the request are not stored.
        let slot = self.dispatchers.slot(trigger.id);
        // A leaving owner's removal may overtake its own post-bootstrap.
        let stays = |slot: &Slot| self.dispatchers.get(*slot).is_some_and(|trigger| !trigger.try_removing);
        if !trigger.registered
            && let Some(slot) = slot.filter(stays)
        {
            self.subscribe(slot);
            self.trigger = Some(Trigger { registered: true, ..trigger });
        }
        PostBootstrapStep::Reply(MaintainerPostBootstrapResponse {
            changefeed: self.id.clone(),
            trigger: Some(request.trigger),
            error: None,
            epoch: self.owner.epoch,
        })
    }

    /// The owner wants the manager closed. `removed`: the changefeed was deleted.
    pub(crate) fn on_close(
        &mut self,
        from: &NodeId,
        epoch: Option<MaintainerEpoch>,
        removed: bool,
    ) -> CloseStep {
        if !self.owner.lets_close(from, epoch) {
            return CloseStep::NotAllowed;
        }
        self.try_close(removed)
    }

    /// Closes in the background; says whether it is closed. `removed` is remembered.
    pub(crate) fn try_close(&mut self, removed: bool) -> CloseStep {
        if removed && self.cleanup == Cleanup::NotWanted {
            self.cleanup = Cleanup::Wanted;
        }
        match self.life {
            Life::Closed => {
                self.clean_up();
                CloseStep::Closed
            }
            Life::Closing => CloseStep::Closing,
            Life::Open => {
                self.stop();
                CloseStep::Closing
            }
        }
    }

    /// Closes the write path: nothing new is taken, sent or written from now on.
    pub(crate) fn stop(&mut self) {
        if self.life != Life::Open {
            return;
        }
        self.life = Life::Closing;
        for slot in self.dispatchers.slots() {
            let Some(dispatcher) = self.dispatchers.remove(slot) else { continue };
            self.actions.push(Action::Unsubscribe { slot, id: dispatcher.id });
            self.actions.push(Action::CloseDispatcher { id: dispatcher.id });
        }
        self.leaving.clear();
        self.merges.clear();
        self.copying.clear();
        self.resends.clear();
        self.blocks.clear();
        self.changed.clear();
        self.trigger = None;
        self.error = None;
        if self.opening.values().any(|opening| matches!(opening.purpose, Purpose::Trigger { .. })) {
            self.actions.push(Action::Bootstrapped(BootstrapStep::Closing));
        }
        self.opening.clear();
        // Entries of the journal stay: whoever asks about them finds no manager.
        self.actions.push(Action::Stop);
    }

    /// Everything has ended.
    pub(crate) fn on_stopped(&mut self) {
        self.life = Life::Closed;
        self.journal.clear();
        self.clean_up();
    }

    fn clean_up(&mut self) {
        if self.cleanup == Cleanup::Wanted {
            self.cleanup = Cleanup::Running;
            self.actions.push(Action::Forget);
        }
    }

    /// The sink removed its own traces, or could not: the next close tries again.
    pub(crate) fn on_forgotten(&mut self, done: bool) {
        self.cleanup = if done { Cleanup::Done } else { Cleanup::Wanted };
    }
}

fn asker(from: &NodeId, request: &MaintainerBootstrapRequest) -> Owner {
    Owner { node: from.clone(), epoch: request.epoch }
}

fn bootstrap_span(dispatcher: &Dispatcher) -> BootstrapTableSpan {
    let state = if dispatcher.removing { ComponentState::Stopped } else { dispatcher.state };
    BootstrapTableSpan {
        id: dispatcher.id,
        schema: dispatcher.schema,
        span: dispatcher.span.clone(),
        state,
        checkpoint: dispatcher.checkpoint(),
        block: dispatcher.block_state(),
        mode: dispatcher.mode,
    }
}
