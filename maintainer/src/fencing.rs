//! Which nodes have to be fenced downstream before anybody takes their place, how far that is, and under which number a
//! node is asked that comes back afterwards.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use heartbeatpb::{MaintainerEpoch, NodeId, Rule, RunningError};

use crate::fence::{FenceOutcome, Whom};

/// The first pause after an attempt that did not succeed; then twice that, and so on.
const PAUSE: Duration = Duration::from_millis(500);
/// The longest pause: so long may nodes that are gone keep their spans after the downstream is back.
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// An attempt that was not heard of for so long is taken for lost: the shell gives up earlier by itself.
const LOST: Duration = Duration::from_secs(30);
/// A downstream that could not be asked for so long is told to the coordinator as the changefeed's error.
const TOLD_AFTER: Duration = Duration::from_secs(10);

/// A node that is to close what it has is told so again after this time without an answer.
const CLOSE_RESEND: Duration = Duration::from_secs(1);
/// One that is closing it is asked again after this time.
const CLOSE_AGAIN: Duration = Duration::from_millis(100);

/// A node that was gone closes what it had.
#[derive(Debug)]
struct Closing {
    /// Under which number it was told to.
    number: MaintainerEpoch,
    again_at: Instant,
}

/// An attempt that was not heard of yet.
#[derive(Debug)]
struct Attempt {
    number: u64,
    whom: Whom,
    since: Instant,
}

/// What the end of an attempt means.
#[derive(PartialEq, Debug, Default)]
pub(crate) struct Heard {
    /// Lost nodes that cannot write any more.
    pub(crate) released: Vec<NodeId>,
    /// Whoever was no member cannot write any more.
    pub(crate) swept: bool,
    /// Members whose writers were fenced before, by whoever maintained the changefeed then.
    pub(crate) dead: Vec<NodeId>,
    /// What is to be told to the coordinator.
    pub(crate) error: Option<RunningError>,
}

/// The fences of one maintainer.
#[derive(Debug)]
pub(crate) struct Fencing {
    /// Whether the downstream has writers that can be fenced.
    applies: bool,
    /// Members when everybody else was fenced.
    swept: Option<BTreeSet<NodeId>>,
    /// Members when everybody else is to be fenced.
    sweep: Option<BTreeSet<NodeId>>,
    /// Nodes that are gone and may still write: their spans stay theirs.
    lost: BTreeSet<NodeId>,
    /// Nodes that were fenced: none of them can write under the number by which it was asked again.
    gone: BTreeSet<NodeId>,
    /// Those of them that are back.
    closing: BTreeMap<NodeId, Closing>,
    /// The epoch by which nodes are asked that were never gone.
    epoch: Option<MaintainerEpoch>,
    /// How many further numbers were used.
    used: u64,
    /// By which number a node is asked that was let in again.
    numbers: BTreeMap<NodeId, MaintainerEpoch>,
    attempt: Option<Attempt>,
    attempts: u64,
    again_at: Option<Instant>,
    pause: Duration,
    /// Why the last attempt did not succeed.
    trouble: Option<String>,
    /// Since when the downstream cannot be asked, and when that was told.
    failing: Option<Instant>,
}

impl Fencing {
    pub(crate) fn new(applies: bool, epoch: Option<MaintainerEpoch>) -> Self {
        Self {
            applies,
            epoch,
            used: 0,
            numbers: BTreeMap::new(),
            closing: BTreeMap::new(),
            swept: None,
            sweep: None,
            lost: BTreeSet::new(),
            gone: BTreeSet::new(),
            attempt: None,
            attempts: 0,
            again_at: None,
            pause: PAUSE,
            trouble: None,
            failing: None,
        }
    }

    /// Whether nobody but these nodes can write. If not, that is wanted from now on.
    pub(crate) fn only_these_write(&mut self, members: &BTreeSet<NodeId>) -> bool {
        let done = self.swept.as_ref().is_some_and(|swept| swept.is_subset(members));
        if !self.applies || done || !Rule::FenceFirst.holds() {
            return true;
        }
        self.sweep = Some(members.clone());
        false
    }

    /// A node is gone. `false`: nothing of it can be written, and its spans are free.
    pub(crate) fn lose(&mut self, node: &NodeId) -> bool {
        if self.applies && !self.gone.contains(node) {
            let waits = if Rule::FenceFirst.holds() { &mut self.lost } else { &mut self.gone };
            waits.insert(node.clone());
        }
        self.is_lost(node)
    }

    /// A node is gone before anybody took over: the sweep keeps it from writing, and what it has is closed if it comes back.
    pub(crate) fn forsake(&mut self, node: &NodeId) {
        if self.applies {
            self.gone.insert(node.clone());
        }
    }

    /// Whether writers can be fenced.
    pub(crate) fn applies(&self) -> bool {
        self.applies
    }

    /// What a node has is an earlier maintainer's and of no use: it is closed, and the node begins anew. `false`: that was
    /// done before, so that it would not help, or there are no numbers for it.
    pub(crate) fn renew(&mut self, node: &NodeId) -> bool {
        let room = self.epoch.is_some_and(|epoch| epoch.within(self.used + 2).is_some());
        let renewed = room && !self.numbers.contains_key(node) && !self.closing.contains_key(node);
        if renewed {
            self.gone.insert(node.clone());
        }
        renewed
    }

    /// Nodes that have to close what they have before anybody takes their place: nothing else keeps them from writing.
    pub(crate) fn must_close<'a>(&'a self, alive: &'a BTreeSet<NodeId>) -> impl Iterator<Item = &'a NodeId> {
        self.gone.intersection(alive).filter(|_| !self.applies)
    }

    /// The number by which a node is asked, and answers.
    pub(crate) fn number_of(&self, node: &NodeId) -> Option<MaintainerEpoch> {
        let closing = self.closing.get(node).map(|closing| closing.number);
        closing.or_else(|| self.numbers.get(node).copied()).or(self.epoch)
    }

    /// The newest number that was used for any node.
    pub(crate) fn newest(&self) -> Option<MaintainerEpoch> {
        self.epoch.and_then(|epoch| epoch.within(self.used))
    }

    /// Which of these nodes are fenced and have yet to close what they had; each is to be told now, by its number.
    /// A node that is none of these closes nothing.
    pub(crate) fn close(&mut self, alive: &BTreeSet<NodeId>, now: Instant) -> Vec<NodeId> {
        self.closing.retain(|node, _| alive.contains(node));
        let mut told = Vec::new();
        for node in self.gone.intersection(alive) {
            match self.closing.get_mut(node) {
                Some(closing) if now < closing.again_at => continue,
                Some(closing) => closing.again_at = now + CLOSE_RESEND,
                None => {
                    // Two are needed: one to close, and one to begin again.
                    let Some(epoch) = self.epoch.filter(|epoch| epoch.within(self.used + 2).is_some()) else {
                        continue;
                    };
                    self.used += 1;
                    let Some(number) = epoch.within(self.used) else { continue };
                    let closing = Closing { number, again_at: now + CLOSE_RESEND };
                    self.closing.insert(node.clone(), closing);
                }
            }
            told.push(node.clone());
        }
        told
    }

    /// Whether a node that is back will be let in.
    pub(crate) fn is_closing(&self, node: &NodeId) -> bool {
        self.closing.contains_key(node)
    }

    /// A node is closing what it has.
    pub(crate) fn on_closing(&mut self, node: &NodeId, now: Instant) {
        if let Some(closing) = self.closing.get_mut(node) {
            closing.again_at = closing.again_at.min(now + CLOSE_AGAIN);
        }
    }

    /// A node has closed what it had: it is asked by a number of its own from now on. Says whether that is news.
    pub(crate) fn on_closed(&mut self, node: &NodeId) -> bool {
        let Some(epoch) = self.epoch.filter(|_| self.closing.contains_key(node)) else { return false };
        let Some(number) = epoch.within(self.used + 1) else { return false };
        self.used += 1;
        self.closing.remove(node);
        self.gone.remove(node);
        self.numbers.insert(node.clone(), number);
        true
    }

    /// Whether a node is gone and may still write.
    pub(crate) fn is_lost(&self, node: &NodeId) -> bool {
        self.lost.contains(node)
    }

    /// Nodes that are gone and may still write.
    pub(crate) fn lost(&self) -> &BTreeSet<NodeId> {
        &self.lost
    }

    /// Whether a node can write nothing, whatever it says.
    pub(crate) fn is_gone(&self, node: &NodeId) -> bool {
        self.gone.contains(node)
    }

    /// Whether everybody but the members is being fenced right now: a newcomer is not to register meanwhile.
    pub(crate) fn is_sweeping(&self) -> bool {
        self.attempt.as_ref().is_some_and(|attempt| matches!(attempt.whom, Whom::AllBut(_)))
    }

    /// Whether the take-over waits for a sweep.
    pub(crate) fn wants_sweep(&self) -> bool {
        self.sweep.is_some()
    }

    /// Why the last attempt did not succeed.
    pub(crate) fn trouble(&self) -> Option<&str> {
        self.trouble.as_deref()
    }

    /// The next attempt, when it is time for one.
    pub(crate) fn begin(&mut self, now: Instant) -> Option<(u64, Whom)> {
        if self.attempt.as_ref().is_some_and(|attempt| now < attempt.since + LOST)
            || self.again_at.is_some_and(|at| now < at)
        {
            return None;
        }
        let whom = match &self.sweep {
            Some(members) => Whom::AllBut(members.clone()),
            None if self.lost.is_empty() => {
                self.attempt = None;
                return None;
            }
            None => Whom::Nodes(self.lost.clone()),
        };
        self.attempts += 1;
        self.attempt = Some(Attempt { number: self.attempts, whom: whom.clone(), since: now });
        Some((self.attempts, whom))
    }

    /// An attempt has ended. One that was given up may still say so: it is not heard.
    pub(crate) fn on_done(
        &mut self,
        number: u64,
        result: Result<FenceOutcome, RunningError>,
        now: Instant,
    ) -> Heard {
        let mut heard = Heard::default();
        let Some(attempt) = self.attempt.take_if(|attempt| attempt.number == number) else { return heard };
        let (busy, writers) = match result {
            Ok(outcome) => (outcome.busy, outcome.writers),
            Err(error) => {
                self.trouble = Some(error.message.clone());
                self.pause(now);
                let since = *self.failing.get_or_insert(now);
                if now.saturating_duration_since(since) >= TOLD_AFTER {
                    self.failing = Some(now);
                    heard.error = Some(error);
                }
                return heard;
            }
        };
        self.failing = None;
        self.trouble = (!busy.is_empty()).then(|| reasons(&busy));
        match attempt.whom {
            Whom::AllBut(members) => {
                // Members may have changed meanwhile: then it is looked at again.
                heard.swept = busy.is_empty();
                if let Some(writers) = writers.filter(|_| heard.swept && self.epoch.is_some()) {
                    heard.dead = members.difference(&writers).cloned().collect();
                }
                if heard.swept {
                    self.swept = Some(members);
                    self.sweep = None;
                }
            }
            Whom::Nodes(nodes) => {
                heard.released = nodes.into_iter().filter(|node| !busy.contains_key(node)).collect();
                for node in &heard.released {
                    self.lost.remove(node);
                    self.gone.insert(node.clone());
                }
            }
        }
        if busy.is_empty() {
            (self.again_at, self.pause) = (None, PAUSE);
        } else {
            self.pause(now);
        }
        heard
    }

    fn pause(&mut self, now: Instant) {
        self.again_at = Some(now + self.pause);
        self.pause = (self.pause * 2).min(PAUSE_MAX);
    }
}

fn reasons(busy: &BTreeMap<NodeId, String>) -> String {
    busy.iter().map(|(node, why)| format!("node {node}: {why}")).collect::<Vec<_>>().join("; ")
}
