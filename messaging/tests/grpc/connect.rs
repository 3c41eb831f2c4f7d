//! Who dials, what a node says to itself and to others, and what a list of nodes changes.

use messaging::SendErrorKind;

use crate::support::{Event, Events, Node, connected, join, list_of, listen, next, until};

// behaviour: messaging-7
#[tokio::test]
async fn three_nodes_send_to_themselves_and_to_each_other() {
    let (a, b, c) = (Node::start("a").await, Node::start("b").await, Node::start("c").await);
    let nodes = [&a, &b, &c];
    join(&nodes).await;
    for (index, node) in nodes.iter().enumerate() {
        let mut inbox = node.inbox(8);
        let mut events = node.center.register::<Events>(8);
        for (sender, other) in nodes.iter().enumerate() {
            other.command(&node.id, sender as u64).unwrap();
            other.event(&node.id, Event(sender as u64, vec![7; 1000])).unwrap();
        }
        let mut got = Vec::new();
        for _ in 0..3 {
            got.push(next(&mut inbox).await);
            let event = events.recv().await.unwrap();
            let position = ["a", "b", "c"].iter().position(|id| *id == event.from.as_str());
            assert_eq!(event.message, Event(position.unwrap() as u64, vec![7; 1000]), "to {index}");
        }
        got.sort();
        assert_eq!(got, [("a".to_owned(), 0), ("b".to_owned(), 1), ("c".to_owned(), 2)]);
    }
}

// behaviour: messaging-10
#[tokio::test]
async fn of_each_pair_the_smaller_address_dials() {
    let (a, b) = (Node::start("a").await, Node::start("b").await);
    join(&[&a, &b]).await;
    let a_is_smaller = a.address < b.address;
    assert_eq!(a.peer(&b.id).unwrap().dials, a_is_smaller);
    assert_eq!(b.peer(&a.id).unwrap().dials, !a_is_smaller);
}

// behaviour: messaging-10
#[tokio::test]
async fn nodes_of_equal_addresses_connect_and_the_smaller_id_dials() {
    // Only one of two can listen at an address; the other one only dials.
    let (listener, address) = listen().await;
    let b = Node::on("b", listener, &address, None);
    let (nowhere, _) = listen().await;
    let a = Node::on("a", nowhere, &address, None);
    join(&[&a, &b]).await;
    assert!(a.peer(&b.id).unwrap().dials && !b.peer(&a.id).unwrap().dials);
    let mut inbox = a.inbox(4);
    b.command(&a.id, 1).unwrap();
    assert_eq!(next(&mut inbox).await, ("b".to_owned(), 1));
}

// behaviour: messaging-9
#[tokio::test]
async fn a_node_that_is_not_connected_and_one_that_is_not_known_are_told_apart() {
    let a = Node::start("a").await;
    assert_eq!(a.command(&"b".into(), 1).unwrap_err().kind, SendErrorKind::TargetNotFound);
    let (_nobody, address) = listen().await;
    a.knows(&[(a.id.clone(), a.address.clone()), ("b".into(), address)].into());
    until("b is known", || a.peer(&"b".into()).is_some()).await;
    let error = a.command(&"b".into(), 1).unwrap_err();
    assert_eq!(error.kind, SendErrorKind::ConnectionNotFound);
    assert!(error.is_retryable());
}

// behaviour: messaging-13
#[tokio::test]
async fn a_node_that_leaves_is_closed_and_works_when_it_is_back() {
    let (a, b) = (Node::start("a").await, Node::start("b").await);
    join(&[&a, &b]).await;
    let mut inbox = b.inbox(4);
    a.knows(&list_of(&[&a]));
    until("b is forgotten", || a.peer(&b.id).is_none()).await;
    assert_eq!(a.command(&b.id, 1).unwrap_err().kind, SendErrorKind::TargetNotFound);
    until("b notices", || !b.is_connected(&a.id)).await;
    a.knows(&list_of(&[&a, &b]));
    connected(&[&a, &b]).await;
    a.command(&b.id, 2).unwrap();
    assert_eq!(next(&mut inbox).await, ("a".to_owned(), 2));
}
