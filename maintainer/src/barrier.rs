//! The barrier: schema changes and sync points happen once, after everybody has arrived and before anybody
//! goes on (maintainer §16).
//!
//! ```text
//!   a dispatcher waits
//!          │
//!          ▼        all arrived, none of them moved or gone       ┌── every second: Write, to another participant
//!       Waiting ───────────────────────────────────────────▶ Selected      if the writer is gone
//!          │                                                  (writer)◀─┘
//!          │ somebody stands behind it, or says                    │ the writer is done
//!          │ that it is done: it was written                       ▼
//!          └──────────────────────────────────────────────▶ Selected, written
//!                                                                  │ earlier changes of tables are applied, and so is
//!                                                                  │ this one: drops, then additions, then moves
//!                                                                  ▼
//!                                                              Advanced ◀─┐ every second: Pass
//!                                                                  │    ──┘
//!                                                                  │ all have passed, or are gone
//!                                                                  ▼
//!                                                                forgotten
//!
//!   a dispatcher has executed it alone: queued ── its turn among changes of tables ──▶ applied, acknowledged, forgotten
//! ```
//!
//! Who takes part: the listed tables, each with all of its key ranges; or, when the table trigger arrives, all tables of
//! a schema or all there are, and for that it has to be the first thing in the queue of changes. What was heard from a
//! span that was moved, divided or joined since does not count: its successors come to the event again. A change of the
//! tables is applied once by a maintainer; one that begins anew knows from its start which ones are in its tables.

mod cost;
mod coverage;
mod event;
mod reply;
mod scan;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use heartbeatpb::{
    BarrierKey, BlockAction, BlockStage, BlockState, BlockStatusRequest, DispatcherId, DispatcherStatus,
    HeartBeatResponse, InfluencedDispatchers, NodeId, TableId, TableSpanBlockStatus, Ts,
};
use replica::MinSet;

use self::event::{Event, Stage};
use self::reply::Reply;
use crate::placement::Placement;

/// An event repeats its requests no more often.
pub(crate) const RESEND: Duration = Duration::from_secs(1);
/// An event that is not over is worth a warning this often.
pub(crate) const WARN: Duration = Duration::from_secs(10);

/// An event that takes long.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Overdue {
    pub(crate) key: BarrierKey,
    pub(crate) age: Duration,
    pub(crate) waits_for: String,
}

/// What follows from a request.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// One message per node.
    pub(crate) responses: Vec<(NodeId, Vec<DispatcherStatus>)>,
    /// Events that cannot be carried out.
    pub(crate) unusable: Vec<BarrierKey>,
}

/// Events of one mode.
pub(crate) struct Barrier {
    me: NodeId,
    /// Schema changes up to here were in the list of tables when the maintainer started.
    start: Ts,
    events: BTreeMap<BarrierKey, Event>,
    /// Events whose meaning for the tables has yet to be applied; strictly in order.
    queue: BTreeSet<BarrierKey>,
    /// Events whose meaning for the tables was applied by this maintainer.
    applied: BTreeSet<BarrierKey>,
    /// Tables that were dropped by those events, with their commit ts: whatever concerned them before was passed.
    ended: BTreeMap<TableId, Ts>,
    adding: MinSet<Ts>,
}

impl Barrier {
    /// A barrier without events, on node `me`.
    pub(crate) fn new(me: NodeId, start: Ts) -> Self {
        Self {
            me,
            start,
            events: BTreeMap::new(),
            queue: BTreeSet::new(),
            applied: BTreeSet::new(),
            ended: BTreeMap::new(),
            adding: MinSet::new(),
        }
    }

    /// Smallest commit ts of events that add tables: the checkpoint must not pass it.
    pub(crate) fn floor(&self) -> Option<Ts> {
        self.adding.min()
    }

    /// Who has yet to say something about the event at `commit_ts`, for people.
    pub(crate) fn waits_at(&self, commit_ts: Ts) -> Option<String> {
        let at = |event: &&Event| event.key.commit_ts == commit_ts;
        self.events.values().find(at).map(Event::waits_for)
    }

    /// Number of events that are not over.
    pub(crate) fn len(&self) -> usize {
        self.events.len()
    }

    /// Since when the oldest event waits.
    pub(crate) fn oldest(&self) -> Option<Instant> {
        self.events.values().map(|event| event.since).min()
    }

    /// Dispatchers of a node report.
    pub(crate) fn on_request(
        &mut self,
        from: &NodeId,
        request: &BlockStatusRequest,
        placement: &mut Placement,
        now: Instant,
    ) -> Outcome {
        let mut reply = Reply::new(from.clone());
        for status in &request.statuses {
            self.on_status(from, status, placement, &mut reply, now);
        }
        reply.finish()
    }

    fn on_status(
        &mut self,
        from: &NodeId,
        status: &TableSpanBlockStatus,
        placement: &mut Placement,
        reply: &mut Reply,
        now: Instant,
    ) {
        let (id, state) = (status.id, &status.state);
        let is_trigger = placement.spans.is_trigger(id);
        let Some(span) = placement.spans.get(id) else {
            tracing::debug!(dispatcher = %id, "block status of an unknown dispatcher");
            return;
        };
        if span.node.as_ref() != Some(from) && span.node.is_some() {
            tracing::debug!(dispatcher = %id, %from, "block status of a node that has lost the span");
            return;
        }
        if !is_trigger && !placement.spans.is_replicating(id) {
            reply.ignore(id, state.key);
            return;
        }
        // It has flushed everything before the event.
        placement.spans.raise(id, state.key.commit_ts.before());
        placement.spans.set_block(id, Some(state.clone()));
        let ack = match state.stage {
            BlockStage::Done => self.on_done(id, state.key, placement, now),
            BlockStage::None | BlockStage::Waiting | BlockStage::Writing if state.is_blocked => {
                self.on_waiting(id, state, placement, reply, now)
            }
            BlockStage::None | BlockStage::Waiting | BlockStage::Writing => {
                self.on_executed(state, placement, reply, now)
            }
        };
        if ack {
            reply.ack(id, state.key);
        }
    }

    fn insert(&mut self, event: Event) {
        if let Some(ts) = event.holds_checkpoint() {
            self.adding.insert(ts);
        }
        self.events.insert(event.key, event);
    }

    fn delete(&mut self, key: BarrierKey) {
        if let Some(event) = self.events.remove(&key)
            && let Some(ts) = event.holds_checkpoint()
        {
            self.adding.remove(ts);
        }
        self.queue.remove(&key);
    }

    /// Whether what an event means for the tables is in the desired state already.
    fn is_applied(&self, key: BarrierKey, placement: &Placement) -> bool {
        key.commit_ts <= self.start
            || key.commit_ts < placement.spans.committed()
            || self.applied.contains(&key)
    }

    /// A dispatcher waits at an event. Says whether its report is acknowledged.
    fn on_waiting(
        &mut self,
        id: DispatcherId,
        state: &BlockState,
        placement: &mut Placement,
        reply: &mut Reply,
        now: Instant,
    ) -> bool {
        let key = state.key;
        let is_trigger = placement.spans.is_trigger(id);
        if !self.events.contains_key(&key) {
            let Some(event) = Event::of(state, now) else {
                reply.refuse(key);
                return false;
            };
            self.insert(event);
        }
        let schedule_pending = !self.queue.is_empty();
        let Some(event) = self.events.get_mut(&key) else { return false };
        event.last_status = now;
        if event.stage != Stage::Waiting {
            // Somebody who was created anew joins in; it is told to pass with the next scan, and waited for.
            if let Some(span) = placement.spans.get(id) {
                event.join(span, &placement.spans);
            }
            return true;
        }
        if is_trigger && event.is_wide() && schedule_pending {
            // Who takes part is taken from the desired state, which has to include what earlier events add.
            return false;
        }
        let Some(span) = placement.spans.get(id) else { return false };
        event.arrive(span, is_trigger, &placement.spans);
        if event.is_complete(&placement.spans)
            && let Some((node, writer)) = self.choose(key, Some(id), placement, now)
        {
            reply.act(node, vec![writer], BlockAction::Write, key);
        }
        true
    }

    /// Everybody waits: somebody is to write, the one that came last unless it is for the table trigger to do.
    fn choose(
        &mut self,
        key: BarrierKey,
        last: Option<DispatcherId>,
        placement: &Placement,
        now: Instant,
    ) -> Option<(NodeId, DispatcherId)> {
        let must_queue = !self.is_applied(key, placement);
        let event = self.events.get_mut(&key)?;
        let trigger = placement.spans.trigger().map(|trigger| trigger.id);
        let writer = if event.is_wide() || event.trigger_related { trigger } else { last };
        event.select(writer, &placement.spans);
        event.last_resend = Some(now);
        if event.needs_schedule() && must_queue {
            self.queue.insert(key);
        }
        let writer = writer?;
        Some((self.node_of(writer, placement)?, writer))
    }

    fn node_of(&self, id: DispatcherId, placement: &Placement) -> Option<NodeId> {
        if placement.spans.is_trigger(id) {
            return Some(self.me.clone());
        }
        placement.spans.get(id).and_then(|span| span.node.clone())
    }

    /// A dispatcher executed an event alone, and tells what it means for the tables.
    fn on_executed(
        &mut self,
        state: &BlockState,
        placement: &mut Placement,
        reply: &mut Reply,
        now: Instant,
    ) -> bool {
        let key = state.key;
        if self.is_applied(key, placement) {
            return true;
        }
        if !self.events.contains_key(&key) {
            let Some(event) = Event::of(state, now) else {
                reply.refuse(key);
                return false;
            };
            if !event.needs_schedule() {
                return true;
            }
            self.insert(event);
            self.queue.insert(key);
        }
        self.apply_due(placement, now);
        // What has to wait for an earlier event stays known, and is acknowledged when it is reported again.
        self.applied.contains(&key)
    }

    /// A dispatcher has written an event, or passed it.
    fn on_done(
        &mut self,
        id: DispatcherId,
        key: BarrierKey,
        placement: &mut Placement,
        now: Instant,
    ) -> bool {
        let applied = self.is_applied(key, placement);
        let Some(event) = self.events.get_mut(&key).filter(|event| event.blocking) else { return false };
        event.last_status = now;
        if event.stage == Stage::Waiting {
            // Its turn came under an earlier maintainer: it was written.
            self.forward(key, placement, now);
        } else if let Stage::Selected { writer, .. } = event.stage
            && writer == Some(id)
        {
            if event.needs_schedule() && !applied {
                event.stage = Stage::Selected { writer, written: true };
                self.queue.insert(key);
                self.apply_due(placement, now);
            } else {
                event.advance();
            }
        }
        if let Some(event) = self.events.get_mut(&key)
            && let Some(span) = placement.spans.get(id)
        {
            event.pass(span);
        }
        self.finish(key, placement);
        true
    }

    /// Somebody has provably passed an event that is not complete here: everybody may.
    fn forward(&mut self, key: BarrierKey, placement: &mut Placement, now: Instant) {
        let applied = self.is_applied(key, placement);
        // Nobody but the table trigger meets every change of tables, and in order: what is applied before it is there may
        // be out of turn, such as the drop of a schema that a table has left meanwhile.
        let arrived = |trigger: &replica::SpanReplica| trigger.checkpoint >= key.commit_ts.before();
        let in_turn = placement.spans.trigger().is_some_and(arrived);
        let Some(event) = self.events.get_mut(&key) else { return };
        if event.needs_schedule() && !applied && !in_turn {
            event.proven = true;
            return;
        }
        event.select(None, &placement.spans);
        if event.needs_schedule() && !applied {
            event.stage = Stage::Selected { writer: None, written: true };
            self.queue.insert(key);
            self.apply_due(placement, now);
        } else {
            self.queue.remove(&key);
            event.advance();
        }
    }

    /// Applies events at the head of the queue that have been written, one after the other.
    fn apply_due(&mut self, placement: &mut Placement, now: Instant) {
        while let Some(key) = self.queue.first().copied() {
            let Some(event) = self.events.get_mut(&key) else {
                self.queue.remove(&key);
                continue;
            };
            let written = !event.blocking
                || match event.stage {
                    Stage::Selected { written, .. } => written,
                    Stage::Advanced { .. } => true,
                    Stage::Waiting => false,
                };
            if !written {
                return;
            }
            let ended = event.ending(&placement.spans);
            self.ended.extend(ended.into_iter().map(|table| (table, key.commit_ts)));
            placement.apply(event.dropped.as_ref(), &event.added, &event.schema_changes, key.commit_ts, now);
            self.queue.remove(&key);
            self.applied.insert(key);
            if event.blocking {
                event.close_gone(&placement.spans);
                event.advance();
            } else {
                self.delete(key);
            }
        }
    }

    fn finish(&mut self, key: BarrierKey, placement: &Placement) {
        let over = self.events.get_mut(&key).is_some_and(|event| {
            let applied = matches!(event.stage, Stage::Advanced { .. });
            applied && event.is_finished(&placement.spans)
        });
        if over {
            self.delete(key);
        }
    }

    /// What dispatchers said at the bootstrap. The legal writer of an event is asked to write, and answers that it
    /// is done if it is. Where anybody may write, that is who is writing already; when several seem to be, because
    /// passing may look the same, it is none of them in particular.
    pub(crate) fn restore(
        &mut self,
        reported: &[(DispatcherId, BlockState)],
        placement: &mut Placement,
        now: Instant,
    ) {
        let mut reached: BTreeMap<BarrierKey, BlockStage> = BTreeMap::new();
        let mut writing: BTreeMap<BarrierKey, Vec<DispatcherId>> = BTreeMap::new();
        for (id, state) in reported {
            if !state.is_blocked || state.stage == BlockStage::None || state.key.commit_ts == Ts::ZERO {
                continue;
            }
            let is_trigger = placement.spans.is_trigger(*id);
            let Some(span) = placement.spans.get(*id).cloned() else { continue };
            if !self.events.contains_key(&state.key) {
                // The first definition of a key is taken; dispatchers that are done repeat none.
                let Some(event) = Event::of(state, now) else { continue };
                self.insert(event);
            }
            placement.spans.raise(*id, state.key.commit_ts.before());
            placement.spans.set_block(*id, Some(state.clone()));
            let Some(event) = self.events.get_mut(&state.key) else { continue };
            match state.stage {
                BlockStage::Waiting => event.arrive(&span, is_trigger, &placement.spans),
                BlockStage::Done => drop(event.passed.insert(*id)),
                BlockStage::Writing => writing.entry(state.key).or_default().push(*id),
                BlockStage::None => {}
            }
            event.trigger_related |= is_trigger;
            let stage = reached.entry(state.key).or_insert(state.stage);
            *stage = (*stage).max(state.stage);
        }
        let trigger = placement.spans.trigger().map(|trigger| trigger.id);
        for (key, stage) in reached {
            let applied = self.is_applied(key, placement);
            let Some(event) = self.events.get_mut(&key) else { continue };
            let legal = if event.is_wide() || event.trigger_related { trigger } else { None };
            let passed = std::mem::take(&mut event.passed);
            match stage {
                BlockStage::None | BlockStage::Waiting if event.is_complete(&placement.spans) => {
                    let writer = legal.or_else(|| event.arrived.last().copied());
                    event.select(writer, &placement.spans);
                }
                BlockStage::None | BlockStage::Waiting => continue,
                BlockStage::Writing => {
                    let alone = match writing.get(&key).map(Vec::as_slice) {
                        Some([alone]) => Some(*alone),
                        Some(_) | None => None,
                    };
                    event.select(legal.or(alone), &placement.spans);
                }
                BlockStage::Done => {
                    event.select(legal, &placement.spans);
                    event.stage = Stage::Selected { writer: legal, written: true };
                }
            }
            for span in passed.iter().filter_map(|id| placement.spans.get(*id)) {
                event.pass(span);
            }
            if event.needs_schedule() && !applied {
                self.queue.insert(key);
            } else if stage == BlockStage::Done {
                event.advance();
            }
        }
        self.apply_due(placement, now);
    }

    /// Events that take long; each is named no more often than every [`WARN`].
    pub(crate) fn overdue(&mut self, now: Instant) -> Vec<Overdue> {
        let late = |event: &&mut Event| now.saturating_duration_since(event.warned_at) >= WARN;
        self.events
            .values_mut()
            .filter(late)
            .map(|event| {
                event.warned_at = now;
                let age = now.saturating_duration_since(event.since);
                Overdue { key: event.key, age, waits_for: event.waits_for() }
            })
            .collect()
    }
}

/// The message that carries statuses to a node.
pub(crate) fn response(
    changefeed: &heartbeatpb::ChangefeedId,
    epoch: Option<heartbeatpb::MaintainerEpoch>,
    statuses: Vec<DispatcherStatus>,
) -> HeartBeatResponse {
    HeartBeatResponse { changefeed: changefeed.clone(), mode: heartbeatpb::Mode::Default, statuses, epoch }
}

/// A status that tells dispatchers what to do.
fn action(influenced: InfluencedDispatchers, what: BlockAction, key: BarrierKey) -> DispatcherStatus {
    DispatcherStatus { influenced: Some(influenced), ack: None, ignored: None, action: Some((what, key)) }
}
