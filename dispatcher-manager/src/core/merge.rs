//! Joining adjacent spans of one table into one, without a key that nobody or two dispatchers write (dispatcher §10).
//!
//! The changefeed has one log, which keeps what the slowest reader of a table needs. So nothing has to be prepared for
//! the joined span: its sources stay readers until the joined dispatcher is one. What is prepared is a place where all
//! sources can stop: between events, or all in front of the same barrier, never some before it and some behind it.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use heartbeatpb::{
    ComponentState, DispatcherConfig, DispatcherId, MergeDispatcherRequest, Mode, NodeId, TableSpan, Ts,
};
use sink::TableStart;

use super::{Action, Core, Opening, Purpose, report};
use crate::Fault;
use crate::dispatcher::{Dispatcher, Rest};
use crate::table::{DispatcherTable, Slot};

/// Results of merges that were given up and are remembered. Whoever repeats a request gives up as soon as it hears of
/// that, and has a few merges at a time.
const REFUSED: usize = 4096;

/// How long the sources may take to find a common place. Between events it is found at once. When some are in front of
/// a barrier and others behind it, waiting does not help: an owner counts no report of a span that it is joining, so the
/// barrier waits for the end of the merge. During an initial copy the owner does better to ask again later.
const FINDING: Duration = Duration::from_secs(2);
/// How long a merge may take in all: longer than a flush, shorter than what people call a stall.
const PATIENCE: Duration = Duration::from_secs(30);

/// Where a merge is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// The sources go on until all of them rest at one place.
    Preparing,
    /// The sources have stopped there; what they handed to the sink is being flushed.
    Draining(Rest),
    /// The sources hold nothing any more; the sink is asked how the joined span starts.
    Asking(TableStart),
    /// The joined dispatcher has taken over; the sources are being cleaned up.
    Committed,
}

#[derive(Debug)]
struct Merge {
    request: MergeDispatcherRequest,
    target: Slot,
    sources: Vec<Slot>,
    phase: Phase,
    begun: Instant,
}

impl Merge {
    /// When it is given up; never once it is committed.
    fn deadline(&self) -> Option<Instant> {
        match self.phase {
            Phase::Preparing => Some(self.begun + FINDING),
            Phase::Draining(_) | Phase::Asking(_) => Some(self.begun + PATIENCE),
            Phase::Committed => None,
        }
    }
}

/// The merges in progress: the journal that a new owner is told of.
#[derive(Debug, Default)]
pub(super) struct Merges {
    by_target: BTreeMap<DispatcherId, Merge>,
    /// Merges that are not committed, by source.
    by_source: BTreeMap<Slot, DispatcherId>,
    /// Results that the owner was told to be stopped, oldest first. That is final: it may hear it after it repeated its
    /// request, and a result that began nevertheless would have the keys of the sources that the owner goes on with.
    refused: VecDeque<DispatcherId>,
}

impl Merges {
    /// What is in progress, for a new owner.
    pub(super) fn requests(&self) -> Vec<MergeDispatcherRequest> {
        self.by_target.values().map(|merge| merge.request.clone()).collect()
    }

    /// Forgets merges whose sources are gone and whose result works, or is gone too.
    pub(super) fn forget_finished(&mut self, dispatchers: &DispatcherTable) {
        self.by_target.retain(|_, merge| {
            let cleaned = merge.sources.iter().all(|source| dispatchers.get(*source).is_none());
            let works = dispatchers.get(merge.target).is_none_or(|d| d.state == ComponentState::Working);
            merge.phase != Phase::Committed || !cleaned || !works
        });
    }

    /// When the next merge runs out of time.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.by_target.values().filter_map(Merge::deadline).min()
    }

    fn refuse(&mut self, target: DispatcherId) {
        if self.refused.contains(&target) {
            return;
        }
        if self.refused.len() == REFUSED {
            self.refused.pop_front();
        }
        self.refused.push_back(target);
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.by_target.len()
    }
}

/// Why a merge does not begin.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Refusal {
    /// A source is not ready; the owner asks again.
    NotYet,
    /// These sources can never be joined.
    Never(&'static str),
}

impl Core {
    /// Join adjacent spans.
    pub(crate) fn on_merge(&mut self, from: &NodeId, request: MergeDispatcherRequest, now: Instant) {
        let target = request.merged;
        if target.is_zero() || request.mode != Mode::Default {
            tracing::debug!(changefeed = %self.id, %from, "dropped a merge request that cannot be used");
            return;
        }
        if !self.is_allowed("merge request", from, request.epoch) {
            return;
        }
        if let Some(present) = self.dispatchers.slot(target).and_then(|slot| self.dispatchers.get(slot)) {
            // A repetition. Of a finished merge: its success has been lost.
            if present.state == ComponentState::Working && !present.try_removing {
                let status = report::status_of(present, present.state);
                self.changed.push(status, now);
            }
            return;
        }
        if self.journal.get(target).is_some() {
            return;
        }
        let sources = match self.merges.refused.contains(&target) {
            true => Err(Refusal::Never("it was given up")),
            false => self.sources(&request),
        };
        match sources {
            Ok(sources) => self.begin_merge(request, sources, now),
            Err(Refusal::NotYet) => {
                tracing::debug!(changefeed = %self.id, merged = %target, "a source of a merge is not ready");
            }
            Err(Refusal::Never(why)) => {
                // An owner that hears nothing would keep the sources reserved for ever.
                tracing::info!(changefeed = %self.id, merged = %target, why, "a merge is not possible");
                self.merges.refuse(target);
                self.tell_stopped(target, request.mode, now);
            }
        }
    }

    /// The sources in the order of their keys, if they can be joined now.
    fn sources(&self, request: &MergeDispatcherRequest) -> Result<Vec<Slot>, Refusal> {
        if request.sources.len() < 2 {
            return Err(Refusal::Never("it has fewer than two sources"));
        }
        let found = request.sources.iter().map(|id| {
            let slot = self.dispatchers.slot(*id)?;
            let dispatcher = self.dispatchers.get(slot)?;
            (!dispatcher.try_removing && !dispatcher.removing).then_some((slot, dispatcher))
        });
        let Some(found) = found.collect::<Option<Vec<_>>>() else {
            return Err(Refusal::Never("a source is not here"));
        };
        // A span that follows another is not that one, so no source comes twice.
        if !found.windows(2).all(|pair| pair[0].1.span.is_followed_by(&pair[1].1.span)) {
            return Err(Refusal::Never("its sources do not touch"));
        }
        if !found.iter().all(|(_, dispatcher)| dispatcher.state == ComponentState::Working) {
            return Err(Refusal::NotYet);
        }
        Ok(found.into_iter().map(|(slot, _)| slot).collect())
    }

    fn begin_merge(&mut self, request: MergeDispatcherRequest, sources: Vec<Slot>, now: Instant) {
        let of = |slot: &Slot| self.dispatchers.get(*slot);
        let (Some(first), Some(last)) = (sources.first().and_then(of), sources.last().and_then(of)) else {
            return;
        };
        let config = DispatcherConfig {
            span: TableSpan { end: last.span.end.clone(), ..first.span.clone() },
            start_ts: sources
                .iter()
                .filter_map(of)
                .map(|source| source.checkpoint())
                .min()
                .unwrap_or_default(),
            dispatcher: request.merged,
            schema: first.schema,
            mode: request.mode,
            skip_dml_at_start: false,
        };
        tracing::info!(changefeed = %self.id, merged = %request.merged, span = ?config.span, sources = sources.len(),
            "a merge begins");
        let target = self.insert_dispatcher(&config, now);
        if let Some(dispatcher) = self.dispatchers.get_mut(target) {
            dispatcher.prepare();
        }
        self.dispatchers.refresh(target);
        let id = request.merged;
        for source in &sources {
            if let Some(dispatcher) = self.dispatchers.get_mut(*source) {
                dispatcher.state = ComponentState::WaitingMerge;
            }
            self.merges.by_source.insert(*source, id);
        }
        let merge = Merge { request, target, sources, phase: Phase::Preparing, begun: now };
        self.merges.by_target.insert(id, merge);
        self.advance_merge(id);
    }

    /// A dispatcher has moved: perhaps the merge that waits for it can.
    pub(super) fn advance_merge_of(&mut self, slot: Slot) {
        if let Some(id) = self.merges.by_source.get(&slot).copied() {
            self.advance_merge(id);
        }
    }

    fn advance_merge(&mut self, id: DispatcherId) {
        if self.merges.by_target.get(&id).is_some_and(|merge| merge.phase == Phase::Preparing) {
            self.stop_sources(id);
        }
        let Some(merge) = self.merges.by_target.get_mut(&id) else { return };
        let Phase::Draining(rest) = merge.phase else { return };
        let sources = || merge.sources.iter().filter_map(|slot| self.dispatchers.get(*slot));
        if !sources().all(|source| source.is_drained()) {
            return;
        }
        let start = match rest {
            // What comes before the barrier is durable, its own transaction's rows included.
            Rest::Before(barrier) if barrier.is_sync_point => {
                TableStart { start_ts: barrier.commit_ts, skip_dml_at_start: false }
            }
            Rest::Before(barrier) if barrier.commit_ts > Ts::ZERO => {
                TableStart { start_ts: barrier.commit_ts.before(), skip_dml_at_start: true }
            }
            Rest::Before(_) | Rest::Between => {
                let start_ts = sources().map(|source| source.checkpoint()).min().unwrap_or_default();
                TableStart { start_ts, skip_dml_at_start: false }
            }
        };
        merge.phase = Phase::Asking(start);
        let Some(target) = self.dispatchers.get(merge.target) else { return };
        let config = DispatcherConfig {
            span: target.span.clone(),
            start_ts: start.start_ts,
            dispatcher: id,
            schema: target.schema,
            mode: target.mode,
            skip_dml_at_start: start.skip_dml_at_start,
        };
        self.ask_sink(Opening { config, purpose: Purpose::Merge });
    }

    /// Stops all sources at once if all of them rest at one place.
    fn stop_sources(&mut self, id: DispatcherId) {
        let Some(merge) = self.merges.by_target.get_mut(&id) else { return };
        let mut rests = merge.sources.iter().map(|slot| self.dispatchers.get(*slot).and_then(|d| d.rest()));
        let Some(Some(rest)) = rests.next() else { return };
        if !rests.all(|other| other == Some(rest)) {
            return;
        }
        for source in &merge.sources {
            if let Some(dispatcher) = self.dispatchers.get_mut(*source) {
                dispatcher.stop_taking();
            }
        }
        if let Some(target) = self.dispatchers.get_mut(merge.target) {
            target.state = ComponentState::MergeReady;
        }
        merge.phase = Phase::Draining(rest);
    }

    /// The sink told how the joined span starts.
    pub(super) fn on_merge_opened(
        &mut self,
        config: &DispatcherConfig,
        result: Result<TableStart, Fault>,
        now: Instant,
    ) {
        let id = config.dispatcher;
        let asking = self.merges.by_target.get(&id).and_then(|merge| match merge.phase {
            Phase::Asking(start) if start.start_ts == config.start_ts => Some(start),
            Phase::Preparing | Phase::Draining(_) | Phase::Asking(_) | Phase::Committed => None,
        });
        match (asking, result) {
            (Some(start), Ok(found)) => self.commit_merge(id, later(start, found), now),
            (Some(_), Err(fault)) => {
                self.give_up_merge(id, None, now);
                self.on_error(fault, now);
            }
            // It was given up meanwhile.
            (None, Ok(_)) => self.actions.push(Action::CloseDispatcher { id }),
            (None, Err(_)) => {}
        }
    }

    /// The joined dispatcher takes over. From here on it counts, and only then do the sources let go: no moment
    /// without a reader, no watermark without the span.
    fn commit_merge(&mut self, id: DispatcherId, start: TableStart, now: Instant) {
        let Some(merge) = self.merges.by_target.get_mut(&id) else { return };
        merge.phase = Phase::Committed;
        let (target, sources) = (merge.target, merge.sources.clone());
        let schema = sources.first().and_then(|slot| self.dispatchers.get(*slot)).map(|source| source.schema);
        if let Some(dispatcher) = self.dispatchers.get_mut(target) {
            let (old, new) = (dispatcher.schema, schema.unwrap_or(dispatcher.schema));
            dispatcher.take_over(start.start_ts, start.skip_dml_at_start, new, now);
            self.dispatchers.move_schema(target, old, new);
        }
        let joined = self.dispatchers.get(target);
        self.grow(joined.filter(|joined| joined.counts()).map(Dispatcher::checkpoint));
        self.dispatchers.refresh(target);
        self.subscribe(target);
        for slot in sources {
            self.merges.by_source.remove(&slot);
            let Some(source) = self.dispatchers.get_mut(slot) else { continue };
            source.try_remove();
            source.remove();
            self.actions.push(Action::Unsubscribe { slot, id: source.id });
            self.leaving.insert(slot);
        }
        tracing::info!(changefeed = %self.id, merged = %id, start_ts = %start.start_ts, "a merge is done");
    }

    /// A source or the result of a merge is to go: the merge cannot be done any more.
    pub(super) fn give_up_merge_of(&mut self, id: DispatcherId, now: Instant) {
        let slot = self.dispatchers.slot(id);
        let of_source = slot.and_then(|slot| self.merges.by_source.get(&slot)).copied();
        if let Some(target) = of_source {
            self.give_up_merge(target, slot, now);
        } else if self.merges.by_target.get(&id).is_some_and(|merge| merge.phase != Phase::Committed) {
            self.give_up_merge(id, None, now);
        }
    }

    /// Gives up what takes too long.
    pub(super) fn give_up_late_merges(&mut self, now: Instant) {
        if self.merges.deadline().is_none_or(|deadline| deadline > now) {
            return;
        }
        let late = |merge: &Merge| merge.deadline().is_some_and(|deadline| deadline <= now);
        let found = self.merges.by_target.iter().filter(|(_, merge)| late(merge)).map(|(id, _)| *id);
        for id in found.collect::<Vec<_>>() {
            self.give_up_merge(id, None, now);
        }
    }

    /// Undoes a merge that has not taken over: its sources go on where they stopped, except the one that is `leaving`;
    /// its result goes, and the owner is told.
    fn give_up_merge(&mut self, id: DispatcherId, leaving: Option<Slot>, now: Instant) {
        let Some(merge) = self.merges.by_target.remove(&id) else { return };
        tracing::info!(changefeed = %self.id, merged = %id, phase = ?merge.phase, "a merge is given up");
        for slot in merge.sources {
            self.merges.by_source.remove(&slot);
            let Some(source) = self.dispatchers.get_mut(slot) else { continue };
            // Registering again replaces the stream: there is no moment in which the log may forget what it needs.
            if source.go_on() && Some(slot) != leaving {
                self.subscribe(slot);
            }
        }
        self.dispatchers.remove(merge.target);
        self.merges.refuse(id);
        self.tell_stopped(id, merge.request.mode, now);
    }
}

/// What the downstream knows may be newer than the place where the sources stopped.
fn later(start: TableStart, found: TableStart) -> TableStart {
    match found.start_ts.cmp(&start.start_ts) {
        std::cmp::Ordering::Greater => found,
        std::cmp::Ordering::Equal => {
            TableStart { skip_dml_at_start: start.skip_dml_at_start || found.skip_dml_at_start, ..start }
        }
        std::cmp::Ordering::Less => start,
    }
}
