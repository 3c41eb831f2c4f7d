//! The order of commands, whatever a network does: each carries a number that grows with every command from one
//! node to another under one topic, and one that was overtaken, or comes again, is dropped as if it had been lost.
//!
//! Handlers rely on it: a request to create, repeated until its effect was seen, must not arrive behind the request to
//! remove that followed it, and an old report must not undo a newer one.

use std::collections::HashMap;

use heartbeatpb::NodeId;
use heartbeatpb::wire::proto::Message as Envelope;
use parking_lot::Mutex;

/// Peers whose numbers are kept. A process that starts again is another node, so they add up; when there are more,
/// all are forgotten, and a late command of that moment is taken.
const PEERS: usize = 4_096;

/// Numbers of what leaves, by receiver and topic.
#[derive(Default)]
pub(crate) struct Departures(Mutex<Numbers>);

#[derive(Default)]
struct Numbers {
    by_peer: HashMap<NodeId, HashMap<&'static str, u64>>,
    /// Where the numbers of a peer begin that is not known (any more): above those that it may have heard.
    floor: u64,
}

impl Departures {
    /// Sends with the next number. One at a time, so that numbers leave in order; `send` does not block.
    pub(crate) fn next<R>(&self, to: &NodeId, topic: &'static str, send: impl FnOnce(u64) -> R) -> R {
        let mut numbers = self.0.lock();
        let Numbers { by_peer, floor } = &mut *numbers;
        if by_peer.len() >= PEERS && !by_peer.contains_key(to) {
            *floor = by_peer.values().flat_map(HashMap::values).max().copied().unwrap_or(*floor);
            by_peer.clear();
        }
        if !by_peer.contains_key(to) {
            by_peer.insert(to.clone(), HashMap::new());
        }
        let topics = by_peer.get_mut(to).expect("inserted just above");
        let number = topics.entry(topic).or_insert(*floor);
        *number += 1;
        send(*number)
    }
}

/// Numbers of what has arrived, by sender and topic.
#[derive(Default)]
pub(crate) struct Arrivals(Mutex<HashMap<NodeId, HashMap<String, u64>>>);

impl Arrivals {
    /// Whether an envelope has been overtaken, or was here before. Without a number nobody knows.
    pub(crate) fn is_late(&self, peer: &NodeId, envelope: &Envelope) -> bool {
        let peers = self.0.lock();
        let known = peers.get(peer).and_then(|topics| topics.get(&envelope.topic));
        envelope.sequence != 0 && known.is_some_and(|known| envelope.sequence <= *known)
    }

    /// An envelope was handed over.
    pub(crate) fn arrived(&self, peer: &NodeId, envelope: &Envelope) {
        if envelope.sequence == 0 {
            return;
        }
        let mut peers = self.0.lock();
        if let Some(known) = peers.get_mut(peer).and_then(|topics| topics.get_mut(&envelope.topic)) {
            *known = envelope.sequence.max(*known);
            return;
        }
        if peers.len() >= PEERS && !peers.contains_key(peer) {
            peers.clear();
        }
        peers.entry(peer.clone()).or_default().insert(envelope.topic.clone(), envelope.sequence);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn envelope(topic: &str, sequence: u64) -> Envelope {
        Envelope { topic: topic.to_owned(), sequence, ..Envelope::default() }
    }

    #[test]
    fn what_was_overtaken_or_comes_again_is_late() {
        let (arrivals, peer) = (Arrivals::default(), NodeId::from("a"));
        arrivals.arrived(&peer, &envelope("t", 5));
        assert!(arrivals.is_late(&peer, &envelope("t", 5)), "again");
        assert!(arrivals.is_late(&peer, &envelope("t", 4)), "overtaken");
        assert!(!arrivals.is_late(&peer, &envelope("t", 6)));
        assert!(!arrivals.is_late(&peer, &envelope("u", 1)), "topics are not ordered among each other");
        assert!(!arrivals.is_late(&"b".into(), &envelope("t", 1)));
        assert!(!arrivals.is_late(&peer, &envelope("t", 0)), "a peer that does not count");
    }

    #[test]
    fn numbers_grow_per_receiver_and_topic_and_never_begin_again() {
        let departures = Departures::default();
        let number = |to: &str, topic| departures.next(&to.into(), topic, |number| number);
        assert_eq!([number("a", "t"), number("a", "t"), number("a", "u"), number("b", "t")], [1, 2, 1, 1]);
        for peer in 0..PEERS {
            number(&format!("other {peer}"), "t");
        }
        assert!(number("a", "t") > 2);
        assert!(number("b", "t") > 1);
    }
}
