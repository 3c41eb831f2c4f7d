//! Learning what nodes run, and starting the table trigger (maintainer §7).

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use heartbeatpb::{
    MaintainerBootstrapRequest, MaintainerBootstrapResponse, MaintainerEpoch, MaintainerPostBootstrapRequest,
    MaintainerPostBootstrapResponse, NodeId, RunningError, SchemaId, SchemaTables, TableName, codes,
};
use messaging::ToOrchestrator;
use replica::Heard;

use super::merge::{self, Plan};
use super::{Core, Effect, LOAD_RETRY, Waits};
use crate::barrier::Barrier;
use crate::upstream::SourceTable;

/// The first repetition of a post-bootstrap request, which may carry a million tables; then twice that, and so on.
const POST_RESEND: Duration = Duration::from_secs(1);
/// The longest time between two repetitions.
const POST_RESEND_MAX: Duration = Duration::from_secs(10);

/// A post-bootstrap request that was not answered yet.
pub(super) struct PostBootstrap {
    request: MaintainerPostBootstrapRequest,
    resend_at: Instant,
    pause: Duration,
}

impl Core {
    /// The set of live nodes is `alive`.
    pub(crate) fn on_nodes(&mut self, alive: BTreeSet<NodeId>, now: Instant, out: &mut Vec<Effect>) {
        let before = std::mem::replace(&mut self.alive, alive);
        if self.stopped {
            return;
        }
        if self.removal.is_some() {
            // The successor deals with nodes. What matters here is who has yet to close.
            self.continue_removal(now, out);
            return;
        }
        self.renew_members(now, out);
        self.let_back(now, out);
        self.note_returned(&before);
        self.ask_fence(now, out);
        self.after_change(now, out);
    }

    /// Nodes that can be asked have become others.
    pub(super) fn renew_members(&mut self, now: Instant, out: &mut Vec<Effect>) {
        let change = self.bootstrapper.on_nodes(&self.members(), now);
        self.show_nodes();
        for node in &change.removed {
            self.on_node_gone(node, now);
        }
        self.show_nodes();
        if !self.fencing.is_sweeping() {
            for node in change.added {
                self.ask_bootstrap(node, out);
            }
        }
        // Nobody may be waited for any more.
        let waits = !self.initialized && self.bootstrapper.is_ready();
        if change.completed || waits {
            self.on_round_complete(now, out);
        }
    }

    pub(super) fn ask_bootstrap(&self, node: NodeId, out: &mut Vec<Effect>) {
        let own = node == self.me;
        let request = MaintainerBootstrapRequest {
            changefeed: self.id.clone(),
            config: self.config_for(&node),
            start_ts: self.start,
            trigger: own.then_some(self.trigger),
            is_new: own && self.is_new,
            redo_trigger: None,
            keyspace_id: 0,
            epoch: self.fencing.number_of(&node),
        };
        out.push(Effect::Orchestrate(node, ToOrchestrator::Bootstrap(request)));
    }

    /// Whether a response belongs to this maintainer: a strict one takes that by which it asks the node only.
    pub(super) fn is_mine(
        &self,
        what: &'static str,
        from: &NodeId,
        epoch: Option<MaintainerEpoch>,
        out: &mut Vec<Effect>,
    ) -> bool {
        let current = self.fencing.number_of(from);
        let mine = current.is_none() || epoch == current;
        if !mine {
            tracing::debug!(changefeedID = %self.id, %from, what, received = ?epoch, ?current,
                "dropped a message of another epoch");
            out.push(Effect::Stale(what));
        }
        mine
    }

    /// A node says what it runs.
    pub(crate) fn on_bootstrap(
        &mut self,
        from: &NodeId,
        response: MaintainerBootstrapResponse,
        now: Instant,
        out: &mut Vec<Effect>,
    ) {
        if self.stopped || !self.is_mine("bootstrap_response", from, response.epoch, out) {
            return;
        }
        if let Some(error) = response.error {
            let renews = self.removal.is_none() && self.bootstrapper.has(from) && is_left_over(&error);
            if renews && self.fencing.renew(from) {
                tracing::info!(changefeedID = %self.id, node = %from, errorCode = error.code,
                    "a node still has what an earlier maintainer left there; it begins anew");
                self.renew_members(now, out);
                self.let_back(now, out);
                return self.after_change(now, out);
            }
            // The node is asked again. A downstream that does not answer is nothing that a new start could mend.
            if error.code == codes::SINK_UNAVAILABLE {
                self.set_trouble(Waits::Node(from.clone()), Some(error));
            } else {
                self.record_error(from, error);
            }
            return;
        }
        self.set_trouble(Waits::Node(from.clone()), None);
        if self.fencing.number_of(from) != self.epoch && !self.bootstrapper.has_answered(from) {
            self.begun.insert(from.clone());
        }
        if self.is_outdated(from, &response) && self.fencing.renew(from) {
            tracing::info!(changefeedID = %self.id, node = %from, spans = response.spans.len(),
                "a node is back with what an earlier maintainer left there; it begins anew");
            self.renew_members(now, out);
            self.let_back(now, out);
            return self.after_change(now, out);
        }
        // What it said before is in its answer.
        self.early.retain(|(node, _)| node != from);
        let heard = self.bootstrapper.on_answer(from, response);
        if *from == self.me {
            self.is_new = false;
        }
        match heard {
            Heard::Completed => self.on_round_complete(now, out),
            Heard::Unknown | Heard::Noted => {}
        }
        self.after_change(now, out);
    }

    /// Whether a node that came after the take-over has what this maintainer has not put there: it was given up by an
    /// earlier one, and fenced as everybody was who was no member at the take-over.
    fn is_outdated(&self, from: &NodeId, answer: &MaintainerBootstrapResponse) -> bool {
        let empty = answer.spans.is_empty() && answer.operators.is_empty() && answer.merges.is_empty();
        self.initialized
            && self.removal.is_none()
            && self.fencing.applies()
            && !empty
            && self.bootstrapper.has(from)
            && !self.bootstrapper.has_answered(from)
    }

    /// The log reader runs and delivers these tables, or could not be started.
    pub(crate) fn on_loaded(
        &mut self,
        result: Result<Vec<SourceTable>, RunningError>,
        now: Instant,
        out: &mut Vec<Effect>,
    ) {
        match result {
            Ok(tables) => {
                self.tables = Some(tables);
                if self.bootstrapper.is_ready() {
                    self.on_round_complete(now, out);
                }
                self.after_change(now, out);
            }
            Err(error) => {
                self.load_at = Some(now + LOAD_RETRY);
                self.on_local_error(error, now);
            }
        }
    }

    pub(super) fn on_round_complete(&mut self, now: Instant, out: &mut Vec<Effect>) {
        if self.initialized {
            // Of a node that joined later only that it answered counts. What it should not run is removed when
            // it reports it.
            self.bootstrapper.clear_answers();
            return;
        }
        // Without its own node, which may have to begin anew, there is no table trigger.
        if self.removal.is_some() || !self.bootstrapper.has(&self.me) {
            return;
        }
        if self.must_close().next().is_some() {
            return;
        }
        let members = self.bootstrapper.nodes().cloned().collect();
        let nobody_else = self.fencing.only_these_write(&members);
        self.ask_fence(now, out);
        let Some(tables) = self.tables.as_ref().filter(|_| nobody_else) else { return };
        let answers: Vec<(&NodeId, &MaintainerBootstrapResponse)> = self.bootstrapper.answers().collect();
        let input = merge::Input {
            answers: &answers,
            tables,
            trigger: self.trigger,
            start: self.start,
            divides_all: self.placement.divides_all,
        };
        match merge::plan(&input, &mut self.placement.ids) {
            Ok(plan) => self.take_over(plan, now, out),
            Err(message) => {
                self.own_error(codes::CHANGEFEED_INIT_TABLE_TRIGGER_DISPATCHER_FAILED, message.to_owned());
            }
        }
    }

    /// Carries a plan out; nothing in it can fail.
    fn take_over(&mut self, plan: Plan, now: Instant, out: &mut Vec<Effect>) {
        self.placement.spans.raise(self.trigger, plan.start);
        self.began = plan.start.max(self.start);
        self.barrier = Barrier::new(self.me.clone(), plan.start);
        let blocks = plan.carry_out(&mut self.placement, now);
        self.barrier.restore(&blocks, &mut self.placement, now);
        self.bootstrapper.clear_answers();
        let tables = self.tables.take().unwrap_or_default();
        let request = MaintainerPostBootstrapRequest {
            changefeed: self.id.clone(),
            trigger: self.trigger,
            schemas: schema_tables(&tables, self.names_wanted),
            redo_schemas: Vec::new(),
            epoch: self.fencing.number_of(&self.me),
        };
        self.post = Some(PostBootstrap { request, resend_at: now, pause: POST_RESEND });
        self.initialized = true;
        self.changed();
        out.push(Effect::Initialized);
        self.resend_post_bootstrap(now, out);
        for (from, request) in std::mem::take(&mut self.early) {
            self.on_block_status(&from, &request, now, out);
        }
    }

    pub(super) fn resend_post_bootstrap(&mut self, now: Instant, out: &mut Vec<Effect>) {
        let Some(post) = self.post.as_mut().filter(|post| post.resend_at <= now) else { return };
        post.resend_at = now + post.pause;
        post.pause = (post.pause * 2).min(POST_RESEND_MAX);
        let request = ToOrchestrator::PostBootstrap(post.request.clone());
        out.push(Effect::Orchestrate(self.me.clone(), request));
    }

    /// The table trigger runs, or cannot.
    pub(crate) fn on_post_bootstrap(
        &mut self,
        from: &NodeId,
        response: MaintainerPostBootstrapResponse,
        out: &mut Vec<Effect>,
    ) {
        if self.stopped || !self.is_mine("post_bootstrap_response", from, response.epoch, out) {
            return;
        }
        match response.error {
            Some(error) => self.record_error(from, error),
            None => self.post = None,
        }
    }

    /// Whether the table trigger has yet to confirm its start.
    #[cfg(test)]
    pub(super) fn is_post_pending(&self) -> bool {
        self.post.is_some()
    }
}

/// Whether a node cannot answer for what an earlier maintainer left there: its table trigger, or a sink that it fenced.
fn is_left_over(error: &RunningError) -> bool {
    let codes = [codes::SINK_FENCED, codes::CHANGEFEED_INIT_TABLE_TRIGGER_DISPATCHER_FAILED];
    codes.contains(&error.code.as_str())
}

fn schema_tables(tables: &[SourceTable], names_wanted: bool) -> Vec<SchemaTables> {
    let name = |name: &str| if names_wanted { name.to_owned() } else { String::new() };
    let mut schemas: BTreeMap<SchemaId, SchemaTables> = BTreeMap::new();
    for table in tables {
        let schema = schemas.entry(table.schema_id).or_insert_with(|| SchemaTables {
            id: table.schema_id,
            name: name(&table.schema),
            tables: Vec::new(),
        });
        schema.tables.push(TableName { id: table.id, name: name(&table.name) });
    }
    schemas.into_values().collect()
}
