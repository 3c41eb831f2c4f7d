//! From what is stored and what the nodes report to a table (coordinator §10).

use std::collections::BTreeMap;
use std::time::Instant;

use heartbeatpb::{
    ChangefeedId, ComponentState, CoordinatorBootstrapResponse, MaintainerEpoch, MaintainerStatus, NodeId,
};
use replica::Heard;

use super::{Core, Write};
use crate::changefeed::Changefeed;
use crate::changefeed::operator::Operator;
use crate::meta::Stored;

/// Maintainers of one changefeed that nodes reported.
type Found = Vec<(NodeId, MaintainerStatus)>;

impl Core {
    /// The changefeeds were read from the store.
    pub fn on_loaded(&mut self, all: Vec<Stored>, now: Instant) -> Vec<super::Action> {
        if !self.initialized {
            self.loaded = Some(all);
            self.try_finish_bootstrap(now);
            self.schedule(now);
        }
        std::mem::take(&mut self.out)
    }

    pub(super) fn on_bootstrap_response(
        &mut self,
        from: &NodeId,
        mut answer: CoordinatorBootstrapResponse,
        now: Instant,
    ) {
        if self.members.contains(from) {
            let record = self.nodes.entry(from.clone()).or_default();
            record.protocol = Some(answer.drain_protocol_version);
            self.on_drain_applied(from, answer.drain_target.take(), answer.drain_epoch, now);
        }
        if !self.initialized {
            match self.bootstrapper.on_answer(from, answer) {
                Heard::Completed => self.try_finish_bootstrap(now),
                // Between the last answer and the end of loading: the newer answer counts.
                Heard::Unknown | Heard::Noted => {}
            }
            return;
        }
        let statuses = std::mem::take(&mut answer.statuses);
        match self.bootstrapper.on_answer(from, answer) {
            Heard::Unknown => return,
            Heard::Noted | Heard::Completed => self.bootstrapper.clear_answers(),
        }
        for status in &statuses {
            self.on_status(from, status, now);
        }
        self.on_drain_joined(from);
    }

    /// Fills the table once everybody has answered and everything is loaded.
    pub(super) fn try_finish_bootstrap(&mut self, now: Instant) {
        if self.initialized || !self.bootstrapper.is_ready() {
            return;
        }
        let Some(loaded) = self.loaded.take() else { return };
        let mut running: BTreeMap<ChangefeedId, Found> = BTreeMap::new();
        for (node, answer) in self.bootstrapper.answers() {
            for status in &answer.statuses {
                running.entry(status.changefeed.clone()).or_default().push((node.clone(), status.clone()));
            }
        }
        self.bootstrapper.clear_answers();
        self.initialized = true;
        for stored in loaded {
            let found = running.remove(&stored.info.id).unwrap_or_default();
            self.insert_loaded(stored, found, now);
        }
        for (node, status) in running.into_values().flatten() {
            if status.state == ComponentState::Working {
                self.refuse_unknown(&node, &status, now);
            }
        }
        self.resume_drain(now);
        tracing::info!(
            changefeeds = self.feeds.len(),
            nodes = self.members.len(),
            "coordinator is initialised"
        );
    }

    fn insert_loaded(&mut self, stored: Stored, found: Found, now: Instant) {
        let id = stored.info.id.clone();
        let was = stored.info.state;
        let intent = Self::intent_of(stored.status.progress);
        let epoch = stored.info.epoch;
        let mut changefeed = Changefeed::load(stored);
        let (owner, mut stale) = self.choose_owner(found, epoch);
        let runs = changefeed.info.state.should_run() && intent.is_none();
        let broken = (changefeed.info.state != was).then(|| changefeed.info.error.clone());

        let mut news = None;
        let mut stop: Option<(NodeId, Option<MaintainerEpoch>, bool)> = None;
        match (owner, intent) {
            (Some((node, status)), None) if runs => {
                changefeed.adopt(node);
                // The stored checkpoint stays what it is: only what is durable may be confirmed upstream.
                news = Some(changefeed.on_status(&status, now));
            }
            (Some((node, status)), intent) => stop = Some((node, status.epoch, intent.unwrap_or(false))),
            (None, Some(removed)) if stale.is_empty() => stop = Some((self.me.clone(), epoch, removed)),
            (None, _) => {}
        }
        if !runs {
            changefeed.stop();
        }
        let removing = intent == Some(true);
        if stop.is_none() && !stale.is_empty() {
            // The first one takes the place of the operator, so that nothing starts before it stopped.
            let (node, status) = stale.remove(0);
            stop = Some((node, status.epoch, removing));
        }
        self.names.insert(super::key_of(&id), id.clone());
        self.feeds.insert(id.clone(), super::Feed { removing, ..super::feed(changefeed) });
        if let Some((node, epoch, removed)) = stop {
            self.begin(&id, Operator::Stop { node, removed, epoch }, now);
        }
        for (node, status) in stale {
            self.refuse_stale(&node, &id, status.epoch, now);
        }
        if let Some(change) = news {
            self.on_state_change(&id, change, now);
        }
        if let Some(error) = broken {
            let state = heartbeatpb::config::ChangefeedState::Failed;
            if let Some(feed) = self.feeds.get_mut(&id) {
                // Past the check that the changefeed still runs: in memory it has failed already.
                let write = Write::State { state, error };
                feed.writing = Some(write.clone());
                self.out.push(super::Action::Write { id, write });
            }
        }
    }

    /// The maintainer that goes on, and those that have to stop: an exact epoch wins over a report without
    /// one. Two with the same right cannot both go on, and nobody can tell which is newer: neither does.
    fn choose_owner(
        &self,
        found: Found,
        epoch: Option<MaintainerEpoch>,
    ) -> (Option<(NodeId, MaintainerStatus)>, Found) {
        let (exact, rest): (Found, Found) = found
            .into_iter()
            .filter(|(_, status)| status.state != ComponentState::Stopped)
            .partition(|(_, status)| status.epoch == epoch);
        let tolerated = |status: &MaintainerStatus| {
            self.config.tolerate_epochless && (status.epoch.is_none() || epoch.is_none())
        };
        let (mut candidates, mut stale) = if exact.is_empty() {
            rest.into_iter().partition(|(_, status)| tolerated(status))
        } else {
            (exact, rest)
        };
        if candidates.len() > 1 {
            tracing::error!(
                count = candidates.len(),
                "several maintainers claim one changefeed; all are stopped"
            );
            stale.append(&mut candidates);
        }
        (candidates.pop(), stale)
    }
}
