//! Receivers that stand still.

use std::time::Duration;

use messaging::{QUEUE_CAPACITY, SendErrorKind};
use tokio::time::timeout;

use crate::support::{DEADLINE, Event, Events, Node, join, next, until};

// behaviour: messaging-8, messaging-20
#[tokio::test]
async fn a_receiver_that_stands_still_congests_its_sender_and_nothing_is_lost_or_out_of_order() {
    let (a, b) = (Node::start("a").await, Node::start("b").await);
    join(&[&a, &b]).await;
    let mut still = b.inbox(1);
    let mut events = b.center.register::<Events>(4);
    let (mut sent, mut refused) = (0, 0);
    // The streams take their windows' worth, then the queue fills, and stays full.
    while refused < 100 {
        match a.command(&b.id, sent) {
            Ok(()) => (sent, refused) = (sent + 1, 0),
            Err(error) => {
                assert_eq!(error.kind, SendErrorKind::MessageCongested);
                assert!(error.is_retryable());
                refused += 1;
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
    }
    assert!(sent > QUEUE_CAPACITY as u64);
    assert_eq!(a.peer(&b.id).map(|peer| peer.command.waiting), Some(QUEUE_CAPACITY));
    a.event(&b.id, Event(7, vec![])).unwrap();
    let event = timeout(DEADLINE, events.recv()).await.expect("the other stream has room").unwrap();
    assert_eq!(event.message.0, 7);
    for number in 0..sent {
        assert_eq!(next(&mut still).await.1, number);
    }
    a.command(&b.id, sent).unwrap();
    assert_eq!(next(&mut still).await.1, sent);
}

#[tokio::test]
async fn what_waits_for_a_peer_is_bounded_in_bytes() {
    let (a, b) = (Node::start("a").await, Node::start("b").await);
    join(&[&a, &b]).await;
    let mut still = b.center.register::<Events>(1);
    let (mut sent, mut refused) = (0, 0);
    while refused < 100 {
        match a.event(&b.id, Event(sent, vec![1; 1 << 20])) {
            Ok(()) => (sent, refused) = (sent + 1, 0),
            Err(error) => {
                assert_eq!(error.kind, SendErrorKind::MessageCongested);
                refused += 1;
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
    }
    let waiting = a.peer(&b.id).unwrap().event.waiting_bytes;
    assert!(waiting <= 64 << 20, "{waiting} bytes wait");
    for number in 0..sent {
        let event = timeout(DEADLINE, still.recv()).await.expect("in time").unwrap().message;
        assert_eq!((event.0, event.1.len()), (number, 1 << 20));
    }
}

#[tokio::test]
async fn a_receiver_that_stands_still_keeps_nobody_from_leaving() {
    let (mut a, mut b) = (Node::start("a").await, Node::start("b").await);
    join(&[&a, &b]).await;
    let _still = b.inbox(1);
    for number in 0..1000 {
        a.command(&b.id, number).unwrap();
    }
    until("it is stuck", || a.peer(&b.id).is_some_and(|peer| peer.command.waiting == 0)).await;
    let since = tokio::time::Instant::now();
    b.knows(&[(b.id.clone(), b.address.clone())].into());
    until("the peer is gone", || b.peer(&a.id).is_none()).await;
    b.close().await;
    a.close().await;
    assert!(since.elapsed() < Duration::from_secs(5), "took {:?}", since.elapsed());
}
