//! Which members this node can talk to, whatever the store says about them.
//!
//! A member renews its lease at the store, and may yet be cut off from this node: then nothing that is asked of it
//! arrives, and it stays a member for as long as that lasts. Members greet each other twice a second, and each greeting
//! names those whom its sender hears. Who was heard both ways and is not any more is *unreached*: whatever it does here
//! may be given to others, if what it still writes can be refused.
//!
//! A core: greetings and time in, changes out. The shell around it is [`Greeter`].
//!
//! ```text
//!             heard, and says that it hears this node        not so for `after`, and a majority is reached
//!   unknown -----------------------------------> reached ------------------------------------------------> unreached
//!                                                  ^                                                           |
//!                                                  +------------ so without a gap for 20 times `after` --------+
//! ```
//!
//! - **RE-1** Who has not heard a majority of the members, itself included, just now, gives up nobody: more likely it is the
//!   one that is cut off. Of two nodes neither gives up the other.
//! - **RE-2** Time for which this node did not run is no silence of others.
//! - **RE-3** A member that was never heard both ways is not judged: it may be of a version that does not greet.

mod greeter;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use heartbeatpb::NodeId;

pub use self::greeter::{Greeter, ReachViews};

/// Between two greetings.
pub const PERIOD: Duration = Duration::from_millis(500);
/// Whom a node names in its greeting was heard within this time: a few greetings may be lost or late.
const FRESH: Duration = Duration::from_millis(1600);
/// A pause of this node that is longer is no silence of others.
const STALL: Duration = Duration::from_secs(1);
/// A member that is reached again is trusted after this many times the silence for which it was given up: who changes
/// places again and again costs more than who stays away.
const TRUST: u32 = 20;

/// What others have to know.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ReachChange {
    /// A member is not reached any more.
    Lost(NodeId),
    /// A member is reached again, and has been for a while.
    Back(NodeId),
}

/// Another member.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Peer {
    /// When it greeted last.
    heard: Option<Instant>,
    /// When it greeted last and had heard this node.
    mutual: Option<Instant>,
    /// It has done so without a gap since then.
    steady: Option<Instant>,
}

/// The members as this node reaches them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Reach {
    me: NodeId,
    after: Duration,
    peers: BTreeMap<NodeId, Peer>,
    unreached: BTreeSet<NodeId>,
    ticked: Instant,
}

impl Reach {
    /// Nobody is known. A member is given up after a silence of `after`.
    #[must_use]
    pub fn new(me: NodeId, after: Duration, now: Instant) -> Self {
        Self { me, after, peers: BTreeMap::new(), unreached: BTreeSet::new(), ticked: now }
    }

    /// The set of members. Who left is forgotten.
    pub fn on_members(&mut self, members: &BTreeSet<NodeId>) {
        self.peers.retain(|node, _| members.contains(node));
        self.unreached.retain(|node| members.contains(node));
        for node in members.iter().filter(|node| **node != self.me) {
            self.peers.entry(node.clone()).or_default();
        }
    }

    /// A member greets, and names those whom it hears.
    pub fn on_greeting(&mut self, from: &NodeId, hears: &[NodeId], now: Instant) {
        let Some(peer) = self.peers.get_mut(from) else { return };
        peer.heard = Some(now);
        if hears.contains(&self.me) {
            let gap = peer.mutual.is_none_or(|at| now.saturating_duration_since(at) >= self.after);
            if gap || peer.steady.is_none() {
                peer.steady = Some(now);
            }
            peer.mutual = Some(now);
        }
    }

    /// Whom this node hears: what it says when it greets.
    #[must_use]
    pub fn hears(&self, now: Instant) -> Vec<NodeId> {
        let fresh = |peer: &Peer| peer.heard.is_some_and(|at| now.saturating_duration_since(at) < FRESH);
        self.peers.iter().filter(|(_, peer)| fresh(peer)).map(|(node, _)| node.clone()).collect()
    }

    /// Time passes; to be called about every [`PERIOD`].
    pub fn on_tick(&mut self, now: Instant) -> Vec<ReachChange> {
        let pause = now.saturating_duration_since(self.ticked);
        self.ticked = now;
        if pause > STALL {
            for peer in self.peers.values_mut() {
                for at in [&mut peer.heard, &mut peer.mutual].into_iter().flatten() {
                    *at = (*at + pause).min(now);
                }
            }
        }
        let mut changes = Vec::new();
        // Heard just now: while the last words of all others grow old together, one of them is always the first to be too old.
        if self.reaches_most(now, FRESH.min(self.after)) {
            let silent = |peer: &Peer| peer.mutual.is_some() && !self.is_mutual(peer, now);
            let lost =
                self.peers.iter().filter(|(node, peer)| silent(peer) && !self.unreached.contains(*node));
            changes.extend(lost.map(|(node, _)| ReachChange::Lost(node.clone())));
        }
        let trusted = |peer: &Peer| {
            let steady =
                peer.steady.is_some_and(|at| now.saturating_duration_since(at) >= TRUST * self.after);
            steady && self.is_mutual(peer, now)
        };
        let back = self.unreached.iter().filter(|node| self.peers.get(*node).is_some_and(&trusted));
        changes.extend(back.cloned().map(ReachChange::Back));
        for change in &changes {
            match change {
                ReachChange::Lost(node) => drop(self.unreached.insert(node.clone())),
                ReachChange::Back(node) => drop(self.unreached.remove(node)),
            }
        }
        changes
    }

    /// Members that are given up.
    #[must_use]
    pub fn unreached(&self) -> &BTreeSet<NodeId> {
        &self.unreached
    }

    /// Whether this node talks to most members, itself included.
    #[must_use]
    pub fn has_majority(&self, now: Instant) -> bool {
        self.reaches_most(now, self.after)
    }

    /// Whether most members, itself included, were heard both ways within a time.
    fn reaches_most(&self, now: Instant, within: Duration) -> bool {
        let fresh = |peer: &Peer| peer.mutual.is_some_and(|at| now.saturating_duration_since(at) < within);
        let reached = 1 + self.peers.values().filter(|peer| fresh(peer)).count();
        reached * 2 > self.peers.len() + 1
    }

    fn is_mutual(&self, peer: &Peer, now: Instant) -> bool {
        peer.mutual.is_some_and(|at| now.saturating_duration_since(at) < self.after)
    }
}

#[cfg(test)]
mod tests;
