//! Nodes that end, and begin again.

use messaging::SendErrorKind;
use messaging::StreamClass;
use messaging::grpc::PeerEvent;

use crate::support::{Node, connected, join, list_of, listen, next, until};

// behaviour: messaging-12b
#[tokio::test]
async fn a_killed_node_that_starts_again_at_its_address_is_connected_again() {
    let mut a = Node::start("a").await;
    let b = Node::start("b").await;
    join(&[&a, &b]).await;
    a.kill();
    until("b notices", || !b.is_connected(&a.id)).await;
    // A process that starts again has a new id.
    let listener = tokio::net::TcpListener::bind(&a.address).await.unwrap();
    let again = Node::on("a2", listener, &a.address, None);
    let both = {
        let mut list = list_of(&[&b, &again]);
        list.insert(a.id.clone(), a.address.clone());
        list
    };
    // The old registration is still there for a while.
    b.knows(&both);
    again.knows(&both);
    connected(&[&b, &again]).await;
    assert_eq!(b.command(&a.id, 1).unwrap_err().kind, SendErrorKind::TargetNotFound);
    let mut inbox = again.inbox(4);
    b.command(&again.id, 2).unwrap();
    assert_eq!(next(&mut inbox).await, ("b".to_owned(), 2));
}

#[tokio::test]
async fn what_is_queued_when_a_node_stops_still_leaves() {
    let mut a = Node::start("a").await;
    let b = Node::start("b").await;
    join(&[&a, &b]).await;
    let mut inbox = b.inbox(1000);
    for number in 0..1000 {
        a.command(&b.id, number).unwrap();
    }
    a.close().await;
    for number in 0..1000 {
        assert_eq!(next(&mut inbox).await, ("a".to_owned(), number));
    }
    assert_eq!(a.command(&b.id, 1000).unwrap_err().kind, SendErrorKind::TargetNotFound);
}

#[tokio::test]
async fn whoever_asks_is_told_what_happens_to_streams_and_queues() {
    let mut b = Node::start("b").await;
    let (_silent, nowhere) = listen().await;
    let a = Node::start("a").await;
    let mut events = a.transport.events();
    join(&[&a, &b]).await;
    let mut opened = Vec::new();
    while opened.len() < 2 {
        match events.recv().await.unwrap() {
            PeerEvent::Opened { node, class, session: 1 } if node == b.id => opened.push(class),
            other => panic!("{other:?}"),
        }
    }
    opened.sort();
    assert_eq!(opened, [StreamClass::Event, StreamClass::Command]);
    b.kill();
    until("a notices", || !a.is_connected(&b.id)).await;
    // It cannot come back before its messages are queued: it is somewhere else.
    a.knows(&[(b.id.clone(), nowhere)].into());
    a.command(&b.id, 1).unwrap();
    assert_eq!(a.peer(&b.id).map(|peer| peer.command.waiting), Some(1));
    a.knows(&list_of(&[]));
    loop {
        match events.recv().await.unwrap() {
            PeerEvent::Dropped { node, class: StreamClass::Command, lost } => {
                assert_eq!((node, lost.envelopes), (b.id.clone(), 1));
                assert!(lost.bytes > 0);
                break;
            }
            PeerEvent::Broke { node, .. } => assert_eq!(node, b.id),
            other => panic!("{other:?}"),
        }
    }
}
