//! What a broken network does to a topic, and that a seed decides it.

use std::time::Duration;

use heartbeatpb::{ChangefeedId, CheckpointTsMessage, Gid, Ts};
use messaging::testing::{Carried, Faults, Network};
use messaging::{
    HeartbeatCollectorTopic, Inbox, MessageCenter, MessagingConfig, SendErrorKind, ToHeartbeatCollector,
};

struct Pair {
    network: Network,
    a: MessageCenter,
    b: MessageCenter,
    inbox: Inbox<HeartbeatCollectorTopic>,
}

fn pair(seed: u64, link_capacity: usize, inbox_capacity: usize) -> Pair {
    let network = Network::with_capacity(seed, link_capacity);
    let [a, b] = ["a", "b"].map(|name| MessageCenter::new(name.into(), MessagingConfig::default()));
    network.join(&a);
    network.join(&b);
    let inbox = b.register(inbox_capacity);
    Pair { network, a, b, inbox }
}

fn message(number: u64) -> ToHeartbeatCollector {
    let changefeed = ChangefeedId { gid: Gid::new(1, 2), name: "feed".into(), keyspace: "default".into() };
    ToHeartbeatCollector::CheckpointTs(CheckpointTsMessage { changefeed, checkpoint: Ts(number) })
}

impl Pair {
    fn send(&self, number: u64) -> Result<(), SendErrorKind> {
        self.a.send::<HeartbeatCollectorTopic>(self.b.node(), message(number)).map_err(|error| error.kind)
    }

    async fn next(&mut self) -> u64 {
        let inbound = tokio::time::timeout(Duration::from_secs(60), self.inbox.recv()).await;
        match inbound.expect("arrives in time").expect("registered").message {
            ToHeartbeatCollector::CheckpointTs(message) => message.checkpoint.0,
            ToHeartbeatCollector::HeartBeatResponse(_)
            | ToHeartbeatCollector::Schedule(_)
            | ToHeartbeatCollector::Merge(_) => panic!("only checkpoints are sent here"),
        }
    }

    /// Everything that arrives until the network is quiet.
    async fn rest(&mut self) -> Vec<u64> {
        let mut got = Vec::new();
        while let Ok(Some(inbound)) = tokio::time::timeout(Duration::from_secs(60), self.inbox.recv()).await {
            if let ToHeartbeatCollector::CheckpointTs(message) = inbound.message {
                got.push(message.checkpoint.0);
            }
        }
        got
    }
}

async fn history(seed: u64) -> (Vec<u64>, Carried) {
    let mut pair = pair(seed, 1000, 1000);
    let delay = Duration::from_millis(1)..Duration::from_millis(50);
    pair.network.set_faults(Faults { loss: 0.2, duplication: 0.1, delay });
    for number in 0..200 {
        pair.send(number).expect("room");
    }
    (pair.rest().await, pair.network.carried())
}

#[tokio::test(start_paused = true)]
async fn one_seed_gives_one_history() {
    let (first, carried) = history(42).await;
    assert_eq!(history(42).await, (first.clone(), carried));
    assert_ne!(history(43).await.0, first);
    assert!(first.is_sorted_by(|one, next| one < next), "a stream keeps its order, and repeats nothing");
    assert!(carried.lost > 10 && carried.duplicated > 5, "{carried:?}");
    assert_eq!(carried.delivered - carried.duplicated, first.len() as u64, "what comes twice is heard once");
    assert_eq!(carried.delivered - carried.duplicated + carried.lost, 200);
}

// behaviour: messaging-12
#[tokio::test(start_paused = true)]
async fn what_is_queued_during_a_partition_arrives_in_order_after_it() {
    let mut pair = pair(1, 100, 100);
    pair.send(0).expect("room");
    assert_eq!(pair.next().await, 0);
    pair.network.partition(pair.a.node(), pair.b.node());
    for number in 1..=50 {
        pair.send(number).expect("room");
    }
    assert_eq!(pair.rest().await, Vec::<u64>::new());
    pair.network.heal(pair.a.node(), pair.b.node());
    assert_eq!(pair.rest().await, (1..=50).collect::<Vec<_>>());
}

#[tokio::test(start_paused = true)]
async fn what_travels_when_the_streams_break_is_lost() {
    let mut pair = pair(1, 100, 100);
    let second = Duration::from_secs(1);
    pair.network.set_link_faults(
        pair.a.node(),
        pair.b.node(),
        Faults { delay: second..second, ..Faults::NONE },
    );
    pair.send(1).expect("room");
    pair.send(2).expect("room");
    tokio::time::advance(Duration::from_millis(1)).await;
    tokio::task::yield_now().await;
    pair.network.isolate(pair.b.node());
    pair.network.heal(pair.a.node(), pair.b.node());
    assert_eq!(pair.rest().await, [2]);
    assert_eq!(pair.network.carried().lost, 1);
}

// behaviour: messaging-9
#[tokio::test(start_paused = true)]
async fn a_node_without_open_streams_is_not_connected_until_they_are() {
    let mut pair = pair(1, 100, 100);
    pair.network.close(pair.a.node(), pair.b.node());
    assert_eq!(pair.send(1), Err(SendErrorKind::ConnectionNotFound));
    assert_eq!(SendErrorKind::ConnectionNotFound.code(), 202);
    pair.network.heal(pair.a.node(), pair.b.node());
    pair.send(2).expect("room");
    assert_eq!(pair.rest().await, [2]);
}

// behaviour: messaging-13
#[tokio::test(start_paused = true)]
async fn a_node_that_left_is_unknown_and_one_that_came_back_works() {
    let mut pair = pair(1, 100, 100);
    pair.network.partition(pair.a.node(), pair.b.node());
    pair.send(1).expect("room");
    pair.network.leave(pair.b.node());
    assert_eq!(pair.send(2), Err(SendErrorKind::TargetNotFound));
    pair.network.join(&pair.b);
    pair.network.heal_all();
    pair.send(3).expect("room");
    assert_eq!(pair.rest().await, [3], "what was queued for the node that left is gone");
}

// behaviour: messaging-20
#[tokio::test(start_paused = true)]
async fn a_stalled_receiver_pushes_back_and_nothing_queued_is_lost() {
    let mut pair = pair(1, 4, 4);
    let mut accepted = Vec::new();
    let mut number = 0;
    // The pump moves messages on as long as there is room anywhere between the two nodes.
    for _ in 0..100 {
        if pair.send(number).is_ok() {
            accepted.push(number);
        }
        number += 1;
        tokio::task::yield_now().await;
    }
    assert_eq!(pair.send(number), Err(SendErrorKind::MessageCongested));
    assert_eq!(accepted.len(), 9, "four queued here, four there, one between");
    assert_eq!(pair.rest().await, accepted);
    pair.send(1000).expect("recovered");
    assert_eq!(pair.rest().await, [1000]);
}

#[tokio::test(start_paused = true)]
async fn dropping_the_network_ends_what_waits_in_front_of_a_full_receiver() {
    let mut pair = pair(1, 4, 1);
    for number in 0..4 {
        pair.send(number).expect("room");
        tokio::task::yield_now().await;
    }
    pair.network = Network::new(1);
    assert_eq!(pair.rest().await, [0]);
    assert_eq!(pair.send(9), Err(SendErrorKind::TargetNotFound));
}
