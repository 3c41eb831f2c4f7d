//! Topics of one node and of several, through the public API alone.

use std::time::Duration;

use bytes::Bytes;
use heartbeatpb::wire::proto::Message as Envelope;
use heartbeatpb::{ChangefeedId, CheckpointTsMessage, DecodeError, Gid, MaintainerCloseResponse, NodeId, Ts};
use messaging::testing::Network;
use messaging::{
    HeartbeatCollectorTopic, Inbox, MaintainerTopic, MessageCenter, MessagingConfig, SendErrorKind,
    StreamClass, ToHeartbeatCollector, ToMaintainer, Topic, WireMessage,
};

/// A topic of the event stream.
enum Events {}

/// An event that cannot be encoded: it shows that the own node gets it by reference.
#[derive(Clone, PartialEq, Debug)]
struct Event(u64);

impl WireMessage for Event {
    fn io_type(&self) -> i32 {
        messaging::codec::io_type::FIRST_OWN
    }

    fn encode(&self, out: &mut Vec<u8>) {
        assert!(self.0 < 1000, "must not be encoded");
        out.extend_from_slice(&self.0.to_be_bytes());
    }

    fn decode(_: i32, bytes: &[u8]) -> Result<Self, DecodeError> {
        let bytes = bytes.try_into().map_err(|_| DecodeError::Malformed { message: "Event" })?;
        Ok(Self(u64::from_be_bytes(bytes)))
    }
}

impl Topic for Events {
    const NAME: &'static str = "events-for-tests";
    const CLASS: StreamClass = StreamClass::Event;
    type Message = Event;
}

fn center(name: &str) -> MessageCenter {
    MessageCenter::new(name.into(), MessagingConfig::default())
}

fn feed() -> ChangefeedId {
    ChangefeedId { gid: Gid::new(1, 2), name: "feed".into(), keyspace: "default".into() }
}

fn checkpoint(ts: u64) -> ToHeartbeatCollector {
    ToHeartbeatCollector::CheckpointTs(CheckpointTsMessage { changefeed: feed(), checkpoint: Ts(ts) })
}

fn closed() -> ToMaintainer {
    ToMaintainer::CloseResponse(MaintainerCloseResponse { changefeed: feed(), success: true, epoch: None })
}

fn number(message: &ToHeartbeatCollector) -> u64 {
    match message {
        ToHeartbeatCollector::CheckpointTs(message) => message.checkpoint.0,
        ToHeartbeatCollector::HeartBeatResponse(_)
        | ToHeartbeatCollector::Schedule(_)
        | ToHeartbeatCollector::Merge(_) => panic!("only checkpoints are sent here"),
    }
}

async fn next(inbox: &mut Inbox<HeartbeatCollectorTopic>) -> u64 {
    let inbound = tokio::time::timeout(Duration::from_secs(10), inbox.recv()).await.expect("arrives in time");
    number(&inbound.expect("registered").message)
}

fn sealed(from: &str, to: &str, message: &ToHeartbeatCollector) -> Envelope {
    messaging::codec::envelope(&from.into(), &to.into(), HeartbeatCollectorTopic::NAME, message)
}

// behaviour: messaging-1, messaging-2
#[tokio::test]
async fn a_registered_topic_receives_and_a_dropped_inbox_deregisters() {
    let center = center("a");
    let to = center.node().clone();
    let mut inbox = center.register::<MaintainerTopic>(4);
    center.send::<MaintainerTopic>(&to, closed()).expect("room");
    let inbound = inbox.recv().await.expect("one message");
    assert_eq!((inbound.from, inbound.message), (to.clone(), closed()));
    drop(inbox);
    center.send::<MaintainerTopic>(&to, closed()).expect("dropped without an error");
    let mut inbox = center.register::<MaintainerTopic>(4);
    assert_eq!(inbox.try_recv(), None, "nothing of the time before");
}

// behaviour: messaging-1
#[tokio::test]
async fn a_second_registration_takes_the_topic_over() {
    let center = center("a");
    let to = center.node().clone();
    let mut first = center.register::<MaintainerTopic>(4);
    center.send::<MaintainerTopic>(&to, closed()).expect("room");
    let mut second = center.register::<MaintainerTopic>(4);
    assert!(first.recv().await.is_some(), "what was queued is not lost");
    assert!(first.recv().await.is_none(), "and then it is over");
    drop(first);
    center.send::<MaintainerTopic>(&to, closed()).expect("room");
    assert!(second.try_recv().is_some(), "dropping the old inbox leaves the new one alone");
}

// behaviour: messaging-4
#[tokio::test]
async fn a_message_for_an_unknown_topic_is_dropped_and_the_next_one_arrives() {
    let center = center("b");
    let mut inbox = center.register::<HeartbeatCollectorTopic>(4);
    let mut stray = sealed("a", "b", &checkpoint(1));
    stray.topic = "nobody".to_owned();
    center.receive(StreamClass::Command, &"a".into(), &stray).await;
    center.receive(StreamClass::Command, &"a".into(), &sealed("a", "b", &checkpoint(2))).await;
    assert_eq!(next(&mut inbox).await, 2);
}

// behaviour: messaging-3, messaging-16
#[tokio::test]
async fn what_cannot_be_read_is_dropped_and_the_rest_arrives_in_order() {
    let center = center("b");
    let mut inbox = center.register::<HeartbeatCollectorTopic>(8);
    let mut envelope = sealed("a", "b", &checkpoint(1));
    envelope.payload.push(Bytes::from_static(b"\xff"));
    envelope.payload.extend(sealed("a", "b", &checkpoint(2)).payload);
    center.receive(StreamClass::Command, &"a".into(), &envelope).await;
    envelope.payload.clear();
    center.receive(StreamClass::Command, &"a".into(), &envelope).await;
    envelope.r#type = 4711;
    envelope.payload.push(Bytes::new());
    center.receive(StreamClass::Command, &"a".into(), &envelope).await;
    center.receive(StreamClass::Command, &"a".into(), &sealed("a", "b", &checkpoint(3))).await;
    assert_eq!((next(&mut inbox).await, next(&mut inbox).await, next(&mut inbox).await), (1, 2, 3));
    assert_eq!(inbox.try_recv(), None);
}

#[tokio::test]
async fn a_peer_cannot_speak_for_another_node_or_to_another_node() {
    let center = center("b");
    let mut inbox = center.register::<HeartbeatCollectorTopic>(8);
    center.receive(StreamClass::Command, &"a".into(), &sealed("c", "b", &checkpoint(1))).await;
    center.receive(StreamClass::Command, &"a".into(), &sealed("a", "c", &checkpoint(2))).await;
    assert_eq!(inbox.try_recv(), None);
}

// behaviour: messaging-5
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn registrations_that_come_and_go_do_not_disturb_a_stable_topic() {
    const MESSAGES: u64 = 2000;
    let center = center("a");
    let to = center.node().clone();
    let mut stable = center.register::<HeartbeatCollectorTopic>(MESSAGES as usize);
    let churn = tokio::spawn({
        let center = center.clone();
        async move {
            for _ in 0..500 {
                let inbox = center.register::<MaintainerTopic>(1);
                tokio::task::yield_now().await;
                drop(inbox);
            }
        }
    });
    let noise = tokio::spawn({
        let (center, to) = (center.clone(), to.clone());
        async move {
            for _ in 0..MESSAGES {
                // May be refused while the queue of one message is full.
                let _ = center.send::<MaintainerTopic>(&to, closed());
                tokio::task::yield_now().await;
            }
        }
    });
    for number in 0..MESSAGES {
        center.send::<HeartbeatCollectorTopic>(&to, checkpoint(number)).expect("room");
        tokio::task::yield_now().await;
    }
    churn.await.expect("no panic");
    noise.await.expect("no panic");
    for number in 0..MESSAGES {
        assert_eq!(next(&mut stable).await, number);
    }
}

// behaviour: messaging-7
#[tokio::test]
async fn three_nodes_send_to_themselves_and_to_each_other() {
    let network = Network::new(1);
    let centers: Vec<_> = ["a", "b", "c"].into_iter().map(center).collect();
    centers.iter().for_each(|center| network.join(center));
    let mut inboxes: Vec<_> =
        centers.iter().map(|center| center.register::<HeartbeatCollectorTopic>(8)).collect();
    for (index, from) in centers.iter().enumerate() {
        let other = &centers[(index + 1) % 3];
        from.send::<HeartbeatCollectorTopic>(from.node(), checkpoint(index as u64)).expect("room");
        from.send::<HeartbeatCollectorTopic>(other.node(), checkpoint(10 + index as u64)).expect("room");
    }
    for (index, inbox) in inboxes.iter_mut().enumerate() {
        let before = (index + 2) % 3;
        let mut got = Vec::new();
        for _ in 0..2 {
            let inbound = inbox.recv().await.expect("registered");
            got.push((inbound.from, number(&inbound.message)));
        }
        got.sort();
        let mut expected = vec![
            (centers[index].node().clone(), index as u64),
            (centers[before].node().clone(), 10 + before as u64),
        ];
        expected.sort();
        assert_eq!(got, expected);
    }
}

// behaviour: messaging-7
#[tokio::test]
async fn the_own_node_gets_events_without_encoding() {
    let center = center("a");
    let mut inbox = center.register::<Events>(4);
    center.send::<Events>(center.node(), Event(4711)).expect("room");
    assert_eq!(inbox.recv().await.map(|inbound| inbound.message), Some(Event(4711)));
}

// behaviour: messaging-8
#[tokio::test]
async fn a_full_queue_refuses_and_other_topics_have_room() {
    let center = center("a");
    let to = center.node().clone();
    let mut slow = center.register::<HeartbeatCollectorTopic>(2);
    let mut other = center.register::<Events>(2);
    for number in 0..2 {
        center.send::<HeartbeatCollectorTopic>(&to, checkpoint(number)).expect("room");
    }
    let error = center.send::<HeartbeatCollectorTopic>(&to, checkpoint(2)).expect_err("full");
    assert_eq!(error.kind, SendErrorKind::MessageCongested);
    assert_eq!(
        error.to_string(),
        "ErrorType: MessageCongested, Reason: queue of heartbeat-collector is full"
    );
    center.send::<Events>(&to, Event(1)).expect("another topic");
    assert!(other.try_recv().is_some());
    assert_eq!(next(&mut slow).await, 0);
    center.send::<HeartbeatCollectorTopic>(&to, checkpoint(3)).expect("room again");
    assert_eq!((next(&mut slow).await, next(&mut slow).await), (1, 3));
}

// behaviour: messaging-8
#[tokio::test]
async fn a_full_stream_refuses_and_the_other_stream_has_room() {
    let network = Network::with_capacity(1, 4);
    let (a, b) = (center("a"), center("b"));
    network.join(&a);
    network.join(&b);
    network.partition(a.node(), b.node());
    let mut accepted = 0;
    let error = loop {
        match a.send::<HeartbeatCollectorTopic>(b.node(), checkpoint(accepted)) {
            Ok(()) => accepted += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind, SendErrorKind::MessageCongested);
    assert_eq!(accepted, 4);
    a.send::<Events>(b.node(), Event(1)).expect("events have their own queue");
}

// behaviour: messaging-9
#[tokio::test]
async fn an_unknown_node_and_an_empty_one_are_errors() {
    let alone = center("a");
    let error = alone.send::<MaintainerTopic>(&"b".into(), closed()).expect_err("no network");
    assert_eq!((error.kind, error.kind.code()), (SendErrorKind::TargetNotFound, 207));
    let network = Network::new(1);
    network.join(&alone);
    let error = alone.send::<MaintainerTopic>(&"b".into(), closed()).expect_err("not joined");
    assert_eq!(error.kind, SendErrorKind::TargetNotFound);
    let error = alone.send::<MaintainerTopic>(&NodeId::from(""), closed()).expect_err("no address");
    assert_eq!(error.kind, SendErrorKind::InvalidMessage);
}

#[tokio::test]
async fn an_envelope_that_does_not_fit_is_refused_as_a_whole() {
    let center = center("b");
    let mut inbox = center.register::<HeartbeatCollectorTopic>(2);
    let mut envelope = sealed("a", "b", &checkpoint(1));
    envelope.payload.extend(sealed("a", "b", &checkpoint(2)).payload);
    let offer = || center.try_receive(StreamClass::Command, &"a".into(), &envelope);
    center.send::<HeartbeatCollectorTopic>(center.node(), checkpoint(0)).expect("room");
    assert_eq!(offer().expect_err("room for one only").kind, SendErrorKind::MessageCongested);
    assert_eq!(next(&mut inbox).await, 0);
    offer().expect("room for both");
    assert_eq!((next(&mut inbox).await, next(&mut inbox).await), (1, 2), "nothing came twice");
}

// behaviour: messaging-20
#[tokio::test]
async fn receiving_waits_for_room_and_giving_up_is_possible() {
    let center = center("b");
    let mut inbox = center.register::<HeartbeatCollectorTopic>(1);
    let mut envelope = sealed("a", "b", &checkpoint(1));
    envelope.payload.extend(sealed("a", "b", &checkpoint(2)).payload);
    let receive = tokio::spawn({
        let (center, envelope) = (center.clone(), envelope.clone());
        async move { center.receive(StreamClass::Command, &"a".into(), &envelope).await }
    });
    assert_eq!((next(&mut inbox).await, next(&mut inbox).await), (1, 2), "more messages than room");
    receive.await.expect("no panic");
    let peer = NodeId::from("a");
    let mut stuck = Box::pin(center.receive(StreamClass::Command, &peer, &envelope));
    tokio::select! {
        biased;
        () = &mut stuck => panic!("there is room for one of two"),
        () = std::future::ready(()) => {}
    }
    drop(stuck);
    assert_eq!(next(&mut inbox).await, 1);
}
