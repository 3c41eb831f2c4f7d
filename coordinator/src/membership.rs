//! Who is in the cluster, by the registrations that the store holds.
//!
//! A core: registrations and time in, changes out. A registration that disappears is kept for a while, because a
//! store or a network that stumbles is no reason to move everything; a node that says goodbye leaves at once.
//!
//! ```text
//!             registered                    disappeared
//!   unknown ------------> member ------------------------------> missing
//!      ^                   |  ^          registered again          |
//!      |   said goodbye    |  +------------------------------------+
//!      +-------------------+            the delay is over          |
//!      +-----------------------------------------------------------+
//! ```
//!
//! The shell around it is [`Registry`], which follows the registrations; a node makes its own with [`Registration`].

mod registration;
mod registry;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use heartbeatpb::NodeId;

pub use self::registration::{NodeInfo, Registration};
pub use self::registry::{Registry, Views, follow_leader};

/// How long a node that disappeared is kept when its lease had this time to live.
#[must_use]
pub fn default_delay(session_ttl: Duration) -> Duration {
    Duration::from_secs(5).max(session_ttl / 2)
}

/// What others have to know.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Change {
    /// A node is in the cluster.
    Joined(NodeId),
    /// A node is out of it, for good: its id does not come back.
    Left(NodeId),
    /// A node has another address.
    Moved(NodeId),
}

/// A node that is, or was a moment ago, registered.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Member {
    address: String,
    missing_since: Option<Instant>,
}

/// The members of a cluster.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Membership {
    delay: Duration,
    members: BTreeMap<NodeId, Member>,
}

impl Membership {
    /// Nobody is known. Nodes that disappear are kept for `delay`.
    #[must_use]
    pub fn new(delay: Duration) -> Self {
        Self { delay, members: BTreeMap::new() }
    }

    /// A registration was written, or written again.
    pub fn on_registered(&mut self, node: &NodeId, address: &str) -> Option<Change> {
        let Some(member) = self.members.get_mut(node) else {
            let member = Member { address: address.to_owned(), missing_since: None };
            self.members.insert(node.clone(), member);
            return Some(Change::Joined(node.clone()));
        };
        member.missing_since = None;
        if member.address == address {
            return None;
        }
        address.clone_into(&mut member.address);
        Some(Change::Moved(node.clone()))
    }

    /// A registration disappeared, with its lease or by a hiccup.
    pub fn on_disappeared(&mut self, node: &NodeId, now: Instant) {
        if let Some(member) = self.members.get_mut(node) {
            member.missing_since.get_or_insert(now);
        }
    }

    /// A node took its registration back after it had stopped to write: nothing is to be waited for.
    pub fn on_goodbye(&mut self, node: &NodeId) -> Option<Change> {
        self.members.remove(node).map(|_| Change::Left(node.clone()))
    }

    /// Everything was read anew, as when a watch fell too far behind.
    pub fn on_read(&mut self, registered: &BTreeMap<NodeId, String>, now: Instant) -> Vec<Change> {
        for (node, member) in &mut self.members {
            if !registered.contains_key(node) {
                member.missing_since.get_or_insert(now);
            }
        }
        let mut changes: Vec<Change> =
            registered.iter().filter_map(|(node, address)| self.on_registered(node, address)).collect();
        changes.extend(self.on_time(now));
        changes
    }

    /// Time passes: whoever was missing for the whole delay is out.
    pub fn on_time(&mut self, now: Instant) -> Vec<Change> {
        let delay = self.delay;
        let over = |member: &Member| {
            member.missing_since.is_some_and(|since| now.saturating_duration_since(since) >= delay)
        };
        let gone: Vec<NodeId> =
            self.members.iter().filter(|(_, member)| over(member)).map(|(node, _)| node.clone()).collect();
        self.members.retain(|_, member| !over(member));
        gone.into_iter().map(Change::Left).collect()
    }

    /// When [`Membership::on_time`] has something to do next.
    #[must_use]
    pub fn next_wakeup(&self) -> Option<Instant> {
        self.members.values().filter_map(|member| member.missing_since).min().map(|since| since + self.delay)
    }

    /// The members with their addresses, those that are missing for a moment included.
    #[must_use]
    pub fn members(&self) -> BTreeMap<NodeId, String> {
        self.members.iter().map(|(node, member)| (node.clone(), member.address.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster() -> (Membership, Instant) {
        let mut cluster = Membership::new(Duration::from_secs(5));
        for node in ["a", "b"] {
            assert_eq!(cluster.on_registered(&node.into(), node), Some(Change::Joined(node.into())));
        }
        (cluster, Instant::now())
    }

    #[test]
    // behaviour: coordinator-ST-7
    fn a_node_that_returns_within_the_delay_never_left() {
        let (mut cluster, start) = cluster();
        let at = |seconds| start + Duration::from_secs(seconds);
        let before = cluster.clone();
        cluster.on_disappeared(&"a".into(), start);
        assert_eq!((cluster.on_time(at(4)), cluster.next_wakeup()), (vec![], Some(at(5))));
        assert_eq!(cluster.members(), before.members(), "it is a member all the time");
        assert_eq!(cluster.on_registered(&"a".into(), "a"), None);
        assert_eq!((cluster.on_time(at(60)), cluster.next_wakeup()), (vec![], None));
        // Again, and this time seen by a look at everything.
        cluster.on_disappeared(&"a".into(), at(60));
        assert_eq!(cluster.on_read(&before.members(), at(64)), vec![]);
        assert_eq!(cluster.on_time(at(99)), vec![]);
        assert_eq!(cluster, before);
    }

    #[test]
    // behaviour: coordinator-ST-8
    fn a_node_that_stays_away_leaves_exactly_once() {
        let (mut cluster, start) = cluster();
        let at = |seconds| start + Duration::from_secs(seconds);
        cluster.on_disappeared(&"a".into(), start);
        cluster.on_disappeared(&"a".into(), at(4));
        let only_b = BTreeMap::from([(NodeId::from("b"), "b".to_owned())]);
        assert_eq!(cluster.on_read(&only_b, at(4)), vec![], "a repetition does not begin anew");
        assert_eq!(cluster.on_time(at(5)), vec![Change::Left("a".into())]);
        assert_eq!(cluster.on_time(at(9)), vec![]);
        cluster.on_disappeared(&"a".into(), at(9));
        assert_eq!((cluster.members(), cluster.next_wakeup()), (only_b, None));
        assert_eq!(cluster.on_read(&BTreeMap::new(), at(10)), vec![]);
        assert_eq!(cluster.on_read(&BTreeMap::new(), at(15)), vec![Change::Left("b".into())]);
    }

    #[test]
    fn a_goodbye_is_believed_at_once_and_an_address_changes_in_place() {
        let (mut cluster, start) = cluster();
        assert_eq!(cluster.on_goodbye(&"a".into()), Some(Change::Left("a".into())));
        assert_eq!(cluster.on_goodbye(&"a".into()), None);
        cluster.on_disappeared(&"a".into(), start);
        assert_eq!(cluster.on_registered(&"b".into(), "elsewhere"), Some(Change::Moved("b".into())));
        assert_eq!(cluster.members(), BTreeMap::from([("b".into(), "elsewhere".to_owned())]));
        assert_eq!(default_delay(Duration::from_secs(10)), Duration::from_secs(5));
        assert_eq!(default_delay(Duration::from_secs(30)), Duration::from_secs(15));
    }
}
