//! Creating and removing dispatchers at the owner's request (dispatcher §8, §9).

use std::time::Instant;

use heartbeatpb::{
    ComponentState, DispatcherConfig, DispatcherId, Mode, NodeId, ScheduleAction, ScheduleDispatcherRequest,
    TableSpan, TableSpanStatus, Ts,
};
use sink::TableStart;

use super::{Action, Core, Opening, Purpose};
use crate::Fault;
use crate::dispatcher::Dispatcher;
use crate::table::Slot;

impl Core {
    /// Create or remove one dispatcher.
    pub(crate) fn on_schedule(&mut self, from: &NodeId, request: ScheduleDispatcherRequest, now: Instant) {
        let id = request.config.dispatcher;
        if id.is_zero() || request.config.mode != Mode::Default {
            tracing::debug!(changefeed = %self.id, %from, "dropped a schedule request that cannot be used");
            return;
        }
        if !self.is_allowed("schedule request", from, request.epoch) {
            return;
        }
        self.journal.prune(id, &self.owner);
        match request.action {
            ScheduleAction::Create => self.on_create(from, request),
            ScheduleAction::Remove => self.on_remove(from, request, now),
        }
    }

    fn on_create(&mut self, from: &NodeId, request: ScheduleDispatcherRequest) {
        let config = request.config.clone();
        let id = config.dispatcher;
        // A creation of this id is on its way, or done. The table trigger is created by the bootstrap only.
        let exists = self.dispatchers.slot(id).is_some();
        if self.journal.get(id).is_some() || exists || config.span == TableSpan::ddl() {
            return;
        }
        if self.dispatchers.any_overlaps(&config.span) {
            // The owner repeats the request; whoever has the keys is gone by then, or the owner is wrong.
            tracing::info!(changefeed = %self.id, dispatcher = %id, span = ?config.span, "the keys have a dispatcher");
            return;
        }
        self.journal.put(from, request);
        self.ask_sink(Opening { config, purpose: Purpose::Create });
    }

    pub(super) fn on_scheduled_opened(
        &mut self,
        mut config: DispatcherConfig,
        result: Result<TableStart, Fault>,
        now: Instant,
    ) {
        let id = config.dispatcher;
        // The sink was asked outside the fence: the request may be void by now.
        self.journal.prune(id, &self.owner);
        let wanted = self.journal.get(id).is_some_and(|request| request.action == ScheduleAction::Create);
        if !wanted {
            self.actions.push(Action::CloseDispatcher { id });
            return;
        }
        match result {
            Ok(_) if self.dispatchers.any_overlaps(&config.span) => {
                self.journal.delete(id);
                self.actions.push(Action::CloseDispatcher { id });
            }
            Ok(start) => {
                let same = start.start_ts <= config.start_ts;
                config.skip_dml_at_start = start.skip_dml_at_start || (same && config.skip_dml_at_start);
                config.start_ts = start.start_ts.max(config.start_ts);
                let slot = self.insert_dispatcher(&config, now);
                self.subscribe(slot);
                self.journal.created(id);
            }
            Err(fault) => {
                // Or every later request for this id would count as a duplicate.
                self.journal.delete(id);
                self.on_error(fault, now);
            }
        }
    }

    /// Puts a dispatcher into the table with its membership generation, before any event can reach it.
    pub(super) fn insert_dispatcher(&mut self, config: &DispatcherConfig, now: Instant) -> Slot {
        if self.next_heartbeat.is_none() {
            let first = now + self.options.first_heartbeat;
            self.next_heartbeat = Some(first);
            self.next_complete = Some(first);
        }
        let dispatcher = Dispatcher::new(config, self.options.check_splittable, now);
        self.grow(dispatcher.counts().then(|| dispatcher.checkpoint()));
        self.dispatchers.insert(dispatcher)
    }

    pub(super) fn subscribe(&mut self, slot: Slot) {
        let Some(dispatcher) = self.dispatchers.get(slot) else { return };
        self.actions.push(Action::Subscribe {
            slot,
            id: dispatcher.id,
            span: dispatcher.span.clone(),
            // A table that is being dropped holds the checkpoint no more, and may stand behind it.
            start_ts: dispatcher.checkpoint().max(self.durable),
            event_service: self.owner.node.clone(),
        });
    }

    /// The log is read on the owner's node: when that changes, every stream begins again there.
    pub(super) fn resubscribe(&mut self) {
        tracing::info!(changefeed = %self.id, log = %self.owner.node, epoch = ?self.owner.epoch,
            dispatchers = self.dispatchers.len(), "streams begin again at another node's log");
        let unregistered =
            self.trigger.filter(|trigger| !trigger.registered).and_then(|t| self.dispatchers.slot(t.id));
        for slot in self.dispatchers.slots() {
            let Some(dispatcher) = self.dispatchers.get(slot) else { continue };
            // The result of a merge has no stream before it takes over.
            if dispatcher.try_removing || !dispatcher.counts() || Some(slot) == unregistered {
                continue;
            }
            self.actions.push(Action::Unsubscribe { slot, id: dispatcher.id });
            self.subscribe(slot);
        }
    }

    fn on_remove(&mut self, from: &NodeId, request: ScheduleDispatcherRequest, now: Instant) {
        let id = request.config.dispatcher;
        self.give_up_merge_of(id, now);
        let Some(slot) = self.dispatchers.slot(id) else {
            self.on_remove_missing(id, request.config.mode, now);
            return;
        };
        self.journal.put(from, request);
        let Some(dispatcher) = self.dispatchers.get_mut(slot) else { return };
        if dispatcher.try_removing {
            return;
        }
        dispatcher.try_remove();
        self.actions.push(Action::Unsubscribe { slot, id });
        if let Some(trigger) = self.trigger.as_mut().filter(|trigger| trigger.id == id) {
            trigger.registered = false;
            // The maintainer moves away: its successor waits for this word.
            self.next_heartbeat = self.next_heartbeat.map(|at| at.min(now));
        }
        self.leaving.insert(slot);
        self.settle(slot);
    }

    /// The owner must converge, and an entry of a creation that failed must not swallow later requests.
    fn on_remove_missing(&mut self, id: DispatcherId, mode: Mode, now: Instant) {
        if heartbeatpb::Rule::JournalClearing.holds() {
            self.journal.delete(id);
        }
        self.tell_stopped(id, mode, now);
    }

    /// Nobody has this id here.
    pub(super) fn tell_stopped(&mut self, id: DispatcherId, mode: Mode, now: Instant) {
        let status = TableSpanStatus {
            id,
            state: ComponentState::Stopped,
            checkpoint: Ts::ZERO,
            event_size_per_second: 0.0,
            mode,
        };
        self.changed.push(status, now);
    }
}
