//! The operators of one changefeed and mode: at most one per dispatcher, repeated until done.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use heartbeatpb::{
    ChangefeedId, DispatcherConfig, DispatcherId, MaintainerEpoch, MergeDispatcherRequest, Mode, NodeId,
    OperatorType, Rule, ScheduleAction, ScheduleDispatcherRequest, SchemaId, TableId, TableSpan,
    TableSpanStatus, Ts,
};
use replica::{SpanReplica, SpanSet, is_terminal};

mod merge;

use crate::operator::{Action, Kind, Operator};
use crate::span::{AddSpan, Afterwards, RemoveSpan};

/// A request without an observed effect is repeated after this time, then after twice the time, and so on.
pub const FIRST_RESEND: Duration = Duration::from_millis(500);
/// The longest time between two repetitions.
pub const LAST_RESEND: Duration = Duration::from_secs(10);
/// Operators that are older than this are worth a warning.
pub const SLOW: Duration = Duration::from_secs(30);
/// Requests repeated in one tick: what is left waits for the next one.
pub const RESEND_BATCH: usize = 10_000;

/// What the owner of a controller is told to do.
#[derive(Clone, PartialEq, Debug)]
pub enum Effect {
    /// Send a request to the dispatchers of a node.
    Send(NodeId, ScheduleDispatcherRequest),
    /// Send a request to join dispatchers to their node.
    Merge(NodeId, MergeDispatcherRequest),
    /// A temporary span left the desired state: whatever no other span covers of its table is to be placed.
    Uncovered(SpanReplica),
    /// An operator started.
    Started(Kind),
    /// An operator finished at this age.
    Finished(Kind, Duration),
}

/// What a controller works on for one event.
#[derive(Debug)]
pub struct Context<'a> {
    /// The spans.
    pub spans: &'a mut SpanSet,
    /// Nodes that live.
    pub alive: &'a BTreeSet<NodeId>,
    /// Now.
    pub now: Instant,
    /// What is to be done.
    pub out: &'a mut Vec<Effect>,
}

/// The oldest operator, when it is slow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Slow {
    /// Its dispatcher.
    pub span: DispatcherId,
    /// Its kind.
    pub kind: Kind,
    /// Its age.
    pub age: Duration,
    /// How many operators there are.
    pub operators: usize,
}

#[derive(Debug)]
struct Running {
    operator: Box<dyn Operator>,
    occupied: Vec<NodeId>,
    created_at: Instant,
    resend_at: Instant,
    pause: Duration,
}

/// Owns operators and drives them (scheduling §6). Every entry point is one indivisible step: a refused
/// operator had no effect of any kind, and one that finishes is gone when the call returns.
#[derive(Debug)]
pub struct Controller {
    changefeed: ChangefeedId,
    mode: Mode,
    epoch: Option<MaintainerEpoch>,
    running: BTreeMap<DispatcherId, Running>,
    due: BTreeSet<(Instant, DispatcherId)>,
    ages: BTreeSet<(Instant, DispatcherId)>,
    /// Operators in flight, by the nodes that have or may get a dispatcher by them.
    occupying: BTreeMap<NodeId, usize>,
    /// Moves in flight, by the node that they leave.
    leaving: BTreeMap<NodeId, usize>,
    /// `Some` once quiesced: the only ids that may still do anything.
    allowed: Option<BTreeSet<DispatcherId>>,
    warned_at: Option<Instant>,
}

impl Controller {
    /// A controller without operators. Every request that leaves it carries `epoch`.
    #[must_use]
    pub fn new(changefeed: ChangefeedId, mode: Mode, epoch: Option<MaintainerEpoch>) -> Self {
        Self {
            changefeed,
            mode,
            epoch,
            running: BTreeMap::new(),
            due: BTreeSet::new(),
            ages: BTreeSet::new(),
            occupying: BTreeMap::new(),
            leaving: BTreeMap::new(),
            allowed: None,
            warned_at: None,
        }
    }

    /// Number of unfinished operators.
    #[must_use]
    pub fn len(&self) -> usize {
        self.running.len()
    }

    /// Whether no operator runs.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.running.is_empty()
    }

    /// Whether an operator occupies the dispatcher.
    #[must_use]
    pub fn contains(&self, span: DispatcherId) -> bool {
        self.running.contains_key(&span)
    }

    /// The operator of a dispatcher.
    #[must_use]
    pub fn get(&self, span: DispatcherId) -> Option<&dyn Operator> {
        self.running.get(&span).map(|running| running.operator.as_ref())
    }

    /// The kinds of the unfinished operators.
    pub fn kinds(&self) -> impl Iterator<Item = Kind> {
        self.running.values().map(|running| running.operator.kind())
    }

    /// Moves in flight away from a node, whoever started them.
    #[must_use]
    pub fn moves_away_from(&self, node: &NodeId) -> usize {
        self.leaving.get(node).copied().unwrap_or(0)
    }

    /// Operators in flight by which a node has, or may get, a dispatcher: a node that is to be empty has none.
    #[must_use]
    pub fn occupying(&self, node: &NodeId) -> usize {
        self.occupying.get(node).copied().unwrap_or(0)
    }

    fn is_allowed(&self, span: DispatcherId) -> bool {
        self.allowed.as_ref().is_none_or(|allowed| allowed.contains(&span)) || !Rule::Quiesce.holds()
    }

    /// Starts an operator. Refused when the controller is quiesced, when the dispatcher is occupied, when its
    /// span is unknown, or when the node that it takes the span from does not have it.
    pub fn add(&mut self, operator: Box<dyn Operator>, cx: &mut Context<'_>) -> bool {
        let span = operator.span();
        if !self.is_allowed(span) || self.contains(span) {
            return false;
        }
        let Some(replica) = cx.spans.get(span) else { return false };
        let from = operator.takes_from();
        if from.is_some() && (from != replica.node.as_ref() || cx.spans.is_trigger(span)) {
            return false;
        }
        self.push(operator, cx);
        true
    }

    pub(super) fn push(&mut self, mut operator: Box<dyn Operator>, cx: &mut Context<'_>) {
        let span = operator.span();
        let nodes = operator.affected_nodes();
        if operator.holds_checkpoint() && Rule::OperatorsHold.holds() {
            cx.spans.hold(span, true);
        }
        let occupied = operator.occupied_nodes();
        for node in &occupied {
            *self.occupying.entry(node.clone()).or_default() += 1;
        }
        if let Some(node) = operator.moves_away_from() {
            *self.leaving.entry(node.clone()).or_default() += 1;
        }
        cx.out.push(Effect::Started(operator.kind()));
        let mut actions = Vec::new();
        operator.start(&mut actions);
        let resend_at = cx.now + FIRST_RESEND;
        self.due.insert((resend_at, span));
        self.ages.insert((cx.now, span));
        let running = Running { operator, occupied, created_at: cx.now, resend_at, pause: FIRST_RESEND };
        self.running.insert(span, running);
        self.settle(span, actions, cx);
        // After the start, so that an operator has set up its span before it ends because of a dead node.
        for node in nodes.into_iter().filter(|node| !cx.alive.contains(node)).collect::<Vec<_>>() {
            self.tell(span, cx, |operator, out| operator.on_node_removed(&node, out));
        }
    }

    /// Lets an operator hear something, and does what it says.
    fn tell(
        &mut self,
        span: DispatcherId,
        cx: &mut Context<'_>,
        event: impl FnOnce(&mut dyn Operator, &mut Vec<Action>),
    ) {
        let Some(running) = self.running.get_mut(&span) else { return };
        let mut actions = Vec::new();
        event(running.operator.as_mut(), &mut actions);
        if actions.iter().any(Action::is_request) {
            // A new phase: its first request has just been made, and its repetitions start afresh.
            self.due.remove(&(running.resend_at, span));
            running.pause = FIRST_RESEND;
            running.resend_at = cx.now + FIRST_RESEND;
            self.due.insert((running.resend_at, span));
        }
        self.settle(span, actions, cx);
    }

    fn settle(&mut self, span: DispatcherId, actions: Vec<Action>, cx: &mut Context<'_>) {
        // The id stays occupied while its span is being settled.
        self.perform(actions, cx);
        if self.running.get(&span).is_some_and(|running| running.operator.is_finished()) {
            self.finish(span, cx);
        }
    }

    fn finish(&mut self, span: DispatcherId, cx: &mut Context<'_>) {
        let Some(running) = self.running.remove(&span) else { return };
        self.due.remove(&(running.resend_at, span));
        self.ages.remove(&(running.created_at, span));
        for node in &running.occupied {
            decrease(&mut self.occupying, node);
        }
        if let Some(node) = running.operator.moves_away_from() {
            decrease(&mut self.leaving, node);
        }
        if running.operator.holds_checkpoint() {
            cx.spans.hold(span, false);
        }
        let age = cx.now.saturating_duration_since(running.created_at);
        cx.out.push(Effect::Finished(running.operator.kind(), age));
    }

    fn perform(&mut self, actions: Vec<Action>, cx: &mut Context<'_>) {
        for action in actions {
            match action {
                Action::Bind { span, to } => drop(cx.spans.bind(span, to)),
                Action::Scheduling { span } => drop(cx.spans.mark_scheduling(span)),
                Action::Replicating { span } => drop(cx.spans.mark_replicating(span)),
                Action::Release { span } => drop(cx.spans.mark_absent(span)),
                Action::Observe(status) => drop(cx.spans.observe(&status)),
                Action::Forget { span } => {
                    cx.out.extend(cx.spans.remove(span).map(Effect::Uncovered));
                }
                Action::Discard { span } => drop(cx.spans.remove(span)),
                Action::Resume { span } => resume(cx.spans, span),
                Action::Free { span } => self.interrupt(span, cx),
                Action::Replace { span, parts, nodes } => self.replace(span, &parts, &nodes, cx),
                Action::Merge { sources, target, on } => {
                    let request = MergeDispatcherRequest {
                        changefeed: self.changefeed.clone(),
                        sources,
                        merged: target,
                        mode: self.mode,
                        epoch: self.epoch,
                    };
                    cx.out.push(Effect::Merge(on, request));
                }
                Action::Create { span, on, operator } => {
                    // Computed each time: the committed checkpoint may have moved since the last one.
                    if let Some(replica) = cx.spans.get(span) {
                        let config = replica.create_config(cx.spans.committed(), self.mode);
                        cx.out.push(self.request(on, config, ScheduleAction::Create, operator));
                    }
                }
                Action::Remove { span, range, on, operator } => {
                    cx.out.push(self.removal(on, span, range, operator));
                }
            }
        }
    }

    /// Parts take the place of a span. The parent's id stays occupied while they are admitted.
    fn replace(
        &mut self,
        span: DispatcherId,
        parts: &[(DispatcherId, TableSpan)],
        nodes: &[NodeId],
        cx: &mut Context<'_>,
    ) {
        match cx.spans.replace(span, parts, Ts::MAX, nodes) {
            Some(true) => {
                for ((part, _), node) in parts.iter().zip(nodes) {
                    let add = AddSpan::new(*part, node.clone(), OperatorType::Split);
                    if !self.add(Box::new(add), cx) {
                        cx.spans.mark_absent(*part);
                    }
                }
            }
            Some(false) => {}
            None => drop(cx.spans.mark_absent(span)),
        }
    }

    fn request(
        &self,
        to: NodeId,
        config: DispatcherConfig,
        action: ScheduleAction,
        operator: OperatorType,
    ) -> Effect {
        let changefeed = self.changefeed.clone();
        Effect::Send(
            to,
            ScheduleDispatcherRequest { changefeed, config, action, operator, epoch: self.epoch },
        )
    }

    /// The request to remove a dispatcher; also for one that nobody wants and no operator knows.
    #[must_use]
    pub fn removal(
        &self,
        from: NodeId,
        dispatcher: DispatcherId,
        span: TableSpan,
        operator: OperatorType,
    ) -> Effect {
        let config = DispatcherConfig {
            span,
            start_ts: Ts::ZERO,
            dispatcher,
            schema: SchemaId::DDL,
            mode: self.mode,
            skip_dml_at_start: false,
        };
        self.request(from, config, ScheduleAction::Remove, operator)
    }

    /// A node reported a span.
    pub fn on_status(&mut self, from: &NodeId, status: &TableSpanStatus, cx: &mut Context<'_>) {
        if self.is_allowed(status.id) {
            self.tell(status.id, cx, |operator, out| operator.on_status(from, status, out));
        }
    }

    /// A node is gone: its spans are to be placed anew, except those whose operators decide for them.
    /// Ignored once quiesced: the next maintainer deals with it.
    pub fn on_node_removed(&mut self, node: &NodeId, cx: &mut Context<'_>) {
        if self.allowed.is_some() {
            return;
        }
        let spans: Vec<DispatcherId> =
            cx.spans.ids_by_node(node).filter(|span| !self.contains(*span)).collect();
        for span in spans {
            cx.spans.mark_absent(span);
        }
        let operators: Vec<DispatcherId> = self.running.keys().copied().collect();
        for span in operators {
            self.tell(span, cx, |operator, out| operator.on_node_removed(node, out));
        }
    }

    /// Repeats requests that are due.
    pub fn on_tick(&mut self, cx: &mut Context<'_>) {
        for _ in 0..RESEND_BATCH {
            let Some((at, span)) = self.due.first().copied().filter(|(at, _)| *at <= cx.now) else { break };
            self.due.remove(&(at, span));
            // A frozen operator is not looked at again, but it stays and keeps holding the checkpoint.
            if !self.is_allowed(span) {
                continue;
            }
            let Some(running) = self.running.get_mut(&span) else { continue };
            running.pause = (running.pause * 2).min(LAST_RESEND);
            running.resend_at = cx.now + running.pause;
            self.due.insert((running.resend_at, span));
            let mut actions = Vec::new();
            running.operator.resend(&mut actions);
            if Rule::OperatorResend.holds() {
                self.perform(actions, cx);
            }
        }
    }

    /// How many operators have run for `age` or longer: nothing else is to wait for them any more.
    #[must_use]
    pub fn older_than(&self, age: Duration, now: Instant) -> usize {
        self.ages.iter().take_while(|(at, _)| now.saturating_duration_since(*at) >= age).count()
    }

    /// The oldest operator, if it is slow and that was not said for a while.
    pub fn slow(&mut self, now: Instant) -> Option<Slow> {
        let (created_at, span) = self.ages.first().copied()?;
        let age = now.saturating_duration_since(created_at);
        let quiet = self.warned_at.is_none_or(|at| now.saturating_duration_since(at) >= SLOW);
        if age < SLOW || !quiet {
            return None;
        }
        self.warned_at = Some(now);
        let kind = self.running.get(&span)?.operator.kind();
        Some(Slow { span, kind, age, operators: self.running.len() })
    }

    /// Tables were dropped: their dispatchers are removed and their spans leave the desired state, in one step.
    /// [`TableId::DDL`] is the table trigger. Refused as a whole once quiesced, unless every span is allowed.
    pub fn remove_tables(&mut self, tables: &[TableId], cx: &mut Context<'_>) -> bool {
        let spans: BTreeSet<DispatcherId> =
            tables.iter().flat_map(|table| cx.spans.by_table(*table)).map(|span| span.id).collect();
        self.remove_spans(&spans, cx)
    }

    /// A schema was dropped, with all its tables.
    pub fn remove_schema(&mut self, schema: SchemaId, cx: &mut Context<'_>) -> bool {
        let spans: BTreeSet<DispatcherId> = cx.spans.by_schema(schema).map(|span| span.id).collect();
        self.remove_spans(&spans, cx)
    }

    fn remove_spans(&mut self, spans: &BTreeSet<DispatcherId>, cx: &mut Context<'_>) -> bool {
        if !spans.iter().all(|span| self.is_allowed(*span)) {
            return false;
        }
        // All removals know their nodes before any operator is cancelled: cancelling may unbind spans.
        let removals: Vec<RemoveSpan> = spans
            .iter()
            .filter_map(|span| cx.spans.get(*span))
            .filter_map(|span| {
                let node = span.node.clone()?;
                Some(RemoveSpan::new(span, node, OperatorType::Remove, Afterwards::Nothing))
            })
            .collect();
        for span in spans {
            self.cancel(*span, cx);
        }
        for removal in removals {
            self.push(Box::new(removal), cx);
        }
        for span in spans {
            cx.spans.remove(*span);
        }
        true
    }

    /// Ends an operator early, and with a reservation its merge. What it leaves behind is only safe together with
    /// the removal of the span, or for a merge, whose sources have gone on all the time.
    fn cancel(&mut self, span: DispatcherId, cx: &mut Context<'_>) {
        let merge = self.get(span).and_then(Operator::reserved_for);
        self.interrupt(merge.unwrap_or(span), cx);
        self.interrupt(span, cx);
    }

    fn interrupt(&mut self, span: DispatcherId, cx: &mut Context<'_>) {
        self.tell(span, cx, |operator, out| operator.on_cancelled(out));
    }

    /// From now on nothing but operators of `ids` starts, hears, sends or finishes; what else runs is frozen and
    /// keeps holding the checkpoint. Terminal: the maintainer is leaving.
    pub fn quiesce_except(&mut self, ids: impl IntoIterator<Item = DispatcherId>) {
        self.allowed = Some(ids.into_iter().filter(|id| !id.is_zero()).collect());
    }

    /// Whether the controller was quiesced.
    #[must_use]
    pub fn is_quiesced(&self) -> bool {
        self.allowed.is_some()
    }
}

fn decrease(counts: &mut BTreeMap<NodeId, usize>, node: &NodeId) {
    if let Some(count) = counts.get_mut(node) {
        *count -= 1;
        if *count == 0 {
            counts.remove(node);
        }
    }
}

/// The span's node runs it as before, unless it reported meanwhile that it does not.
fn resume(spans: &mut SpanSet, span: DispatcherId) {
    let gone = spans.get(span).is_some_and(|replica| is_terminal(replica.state));
    if gone {
        spans.mark_absent(span);
    } else {
        spans.mark_replicating(span);
    }
}

#[cfg(test)]
mod tests;
