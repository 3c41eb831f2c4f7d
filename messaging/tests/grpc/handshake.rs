//! What a node believes of whoever opens a stream.

use std::time::Duration;

use bytes::Bytes;
use messaging::codec::envelope;
use messaging::{HeartbeatCollectorTopic, SendErrorKind, Topic as _};
use tokio::time::{Instant, timeout};
use tonic::Code;

use crate::raw::{Raw, babble, frame, greeting};
use crate::support::{DEADLINE, List, Node, command, next, number, until};

/// Smaller than the address of any node here: its owner dials.
const SMALL: &str = "0.0.0.0:1";
/// Larger than the address of any node here: the node dials it.
const LARGE: &str = "9.9.9.9:1";

/// A node that knows a peer that is no node.
async fn node_and_peer(address: &str) -> Node {
    let node = Node::start("node").await;
    node.knows(&List::from([("peer".into(), address.to_owned())]));
    until("the peer is known", || node.peer(&"peer".into()).is_some()).await;
    node
}

async fn refusal(node: &Node, first: Option<heartbeatpb::wire::proto::Message>) -> (Code, String) {
    match Raw::open(&node.address, first).await {
        Err(status) => (status.code(), status.message().to_owned()),
        Ok(_) => panic!("the stream was accepted"),
    }
}

// behaviour: messaging-11
#[tokio::test]
async fn a_stream_that_begins_with_anything_but_a_handshake_is_refused() {
    let node = node_and_peer(SMALL).await;
    let hello = |payload: Vec<Bytes>| Some(frame(36, "peer", "node", "", payload));
    let firsts = [
        Some(frame(17, "peer", "node", HeartbeatCollectorTopic::NAME, vec![Bytes::from_static(b"\x01")])),
        Some(frame(0, "", "", "", vec![])),
        Some(frame(-1, "peer", "node", "", vec![Bytes::new()])),
        hello(vec![]),
        hello(vec![Bytes::from_static(b"\xff\xfe")]),
        hello(vec![Bytes::from_static(b"null")]),
        Some(greeting("peer", "node", "rows")),
        Some(greeting("", "node", "event")),
        None,
    ];
    for first in firsts {
        let (code, text) = refusal(&node, first).await;
        assert_eq!(code, Code::InvalidArgument, "{text}");
        assert!(text.starts_with("ErrorType: InvalidMessage, Reason: "), "{text}");
    }
    for bytes in
        [&b"\x00\x01\x02"[..], b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff"]
    {
        babble(&node.address, bytes).await.unwrap();
    }
    // The node lives, and the right greeting is welcome.
    Raw::open(&node.address, Some(greeting("peer", "node", "command"))).await.unwrap();
}

// behaviour: messaging-11
#[tokio::test]
async fn a_stream_for_another_node_is_refused() {
    let node = node_and_peer(SMALL).await;
    let (code, text) = refusal(&node, Some(greeting("peer", "somebody", "event"))).await;
    assert_eq!(code, Code::FailedPrecondition);
    assert!(text.starts_with("ErrorType: TargetMismatch, "), "{text}");
}

// behaviour: messaging-10, messaging-11
#[tokio::test]
async fn a_stream_of_a_peer_that_should_be_dialled_is_refused() {
    let node = node_and_peer(LARGE).await;
    let (code, text) = refusal(&node, Some(greeting("peer", "node", "event"))).await;
    assert_eq!(code, Code::FailedPrecondition, "{text}");
}

// behaviour: messaging-11
#[tokio::test]
async fn a_stream_of_an_unknown_node_waits_until_the_node_is_known() {
    let node = Node::start("node").await;
    let opening = tokio::spawn({
        let address = node.address.clone();
        async move { Raw::open(&address, Some(greeting("peer", "node", "command"))).await }
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!opening.is_finished(), "nobody knows it yet");
    node.knows(&List::from([("peer".into(), SMALL.to_owned())]));
    let raw = timeout(DEADLINE, opening).await.unwrap().unwrap().unwrap();
    let mut inbox = node.inbox(4);
    raw.out
        .send(envelope(&"peer".into(), &"node".into(), HeartbeatCollectorTopic::NAME, &command(5)))
        .unwrap();
    assert_eq!(next(&mut inbox).await, ("peer".to_owned(), 5));
}

// behaviour: messaging-11
#[tokio::test]
async fn a_stream_of_a_node_that_stays_unknown_is_refused_after_ten_seconds() {
    let node = Node::start("node").await;
    let since = Instant::now();
    let (code, text) = refusal(&node, Some(greeting("stranger", "node", "command"))).await;
    assert_eq!(code, Code::NotFound);
    assert!(text.starts_with("ErrorType: TargetNotFound, "), "{text}");
    assert!(since.elapsed() >= Duration::from_secs(10), "gave up after {:?}", since.elapsed());
}

// behaviour: messaging-11
#[tokio::test]
async fn a_second_stream_replaces_the_first_and_gets_what_is_queued() {
    let node = node_and_peer(SMALL).await;
    let peer = "peer".into();
    let mut first = Raw::open(&node.address, Some(greeting("peer", "node", "command"))).await.unwrap();
    node.command(&peer, 1).unwrap();
    assert_eq!(received(&mut first).await, 1);
    let mut second = Raw::open(&node.address, Some(greeting("peer", "node", "command"))).await.unwrap();
    for value in 2..100 {
        node.command(&peer, value).unwrap();
    }
    let mut got = Vec::new();
    while got.last() != Some(&99) {
        got.extend(received_frame(&mut second).await);
    }
    assert_eq!(got, (2..100).collect::<Vec<_>>(), "the old stream took nothing");
    let end = timeout(DEADLINE, first.inbound.message()).await.expect("the old stream ends");
    assert!(!matches!(end, Ok(Some(_))), "{end:?}");
    // What the old one still sends is not heard, what the new one sends is.
    let mut inbox = node.inbox(4);
    let say = |value| envelope(&peer, &node.id, HeartbeatCollectorTopic::NAME, &command(value));
    let _ = first.out.send(say(1));
    second.out.send(say(2)).unwrap();
    assert_eq!(next(&mut inbox).await, ("peer".to_owned(), 2));
    assert_eq!(node.peer(&peer).map(|peer| (peer.command.sessions, peer.command.ready)), Some((2, true)));
}

// behaviour: messaging-9
#[tokio::test]
async fn each_of_the_two_streams_is_ready_for_itself() {
    let node = node_and_peer(SMALL).await;
    let peer = "peer".into();
    let mut commands = Raw::open(&node.address, Some(greeting("peer", "node", "command"))).await.unwrap();
    node.command(&peer, 1).unwrap();
    let error = node.event(&peer, crate::support::Event(1, vec![])).unwrap_err();
    assert_eq!(error.kind, SendErrorKind::ConnectionNotFound);
    assert_eq!(received(&mut commands).await, 1);
}

#[tokio::test]
async fn a_peer_cannot_speak_for_another_node() {
    let node = node_and_peer(SMALL).await;
    let raw = Raw::open(&node.address, Some(greeting("peer", "node", "command"))).await.unwrap();
    let mut inbox = node.inbox(8);
    let say = |from: &str, to: &str, value| {
        raw.out
            .send(envelope(&from.into(), &to.into(), HeartbeatCollectorTopic::NAME, &command(value)))
            .unwrap();
    };
    say("other", "node", 1);
    say("peer", "other", 2);
    say("node", "node", 3);
    say("peer", "node", 4);
    assert_eq!(next(&mut inbox).await, ("peer".to_owned(), 4));
}

// behaviour: messaging-16
#[tokio::test]
async fn what_cannot_be_used_does_not_end_a_stream() {
    let node = node_and_peer(SMALL).await;
    let raw = Raw::open(&node.address, Some(greeting("peer", "node", "command"))).await.unwrap();
    let mut inbox = node.inbox(8);
    let topic = HeartbeatCollectorTopic::NAME;
    for odd in [
        frame(17, "peer", "node", topic, vec![]),
        frame(17, "peer", "node", topic, vec![Bytes::from_static(b"\xff\xff\xff")]),
        frame(999, "peer", "node", topic, vec![Bytes::new()]),
        frame(17, "peer", "node", "no-such-topic", vec![Bytes::new()]),
        greeting("peer", "node", "command"),
    ] {
        raw.out.send(odd).unwrap();
    }
    raw.out.send(envelope(&"peer".into(), &node.id, topic, &command(7))).unwrap();
    assert_eq!(next(&mut inbox).await, ("peer".to_owned(), 7));
}

async fn received(raw: &mut Raw) -> u64 {
    let mut numbers = received_frame(raw).await;
    assert_eq!(numbers.len(), 1);
    numbers.remove(0)
}

/// The numbers of the next frame.
async fn received_frame(raw: &mut Raw) -> Vec<u64> {
    let frame = timeout(DEADLINE, raw.inbound.message()).await.expect("in time").unwrap().unwrap();
    assert_eq!((frame.from.as_str(), frame.to.as_str()), ("node", "peer"));
    let opened = messaging::codec::open(&frame);
    assert_eq!((opened.unknown, opened.unreadable), (0, 0));
    opened.messages.iter().map(number).collect()
}
