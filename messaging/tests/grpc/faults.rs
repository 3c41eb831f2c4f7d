//! Connections that break in every way, and what arrives nevertheless.

use std::time::Duration;

use messaging::grpc::StreamReport;
use messaging::{HeartbeatCollectorTopic, Inbox, SendErrorKind};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::time::{Instant, sleep, timeout};

use crate::proxy::{Proxy, Weather};
use crate::support::{DEADLINE, Event, Events, List, Node, connected, listen, next, number, until};

/// Two nodes with a proxy between them; the first one dials.
struct Pair {
    a: Node,
    b: Node,
    proxy: Proxy,
}

impl Pair {
    async fn start() -> Self {
        let (listener, behind) = listen().await;
        let proxy = Proxy::new(&behind).await;
        let b = Node::on("b", listener, &proxy.address, None);
        let (nowhere, _) = listen().await;
        let a = Node::on("a", nowhere, "0.0.0.0:1", None);
        let pair = Self { a, b, proxy };
        let list = List::from([
            (pair.a.id.clone(), pair.a.address.clone()),
            (pair.b.id.clone(), pair.proxy.address.clone()),
        ]);
        pair.a.knows(&list);
        pair.b.knows(&list);
        connected(&[&pair.a, &pair.b]).await;
        assert!(pair.a.peer(&pair.b.id).unwrap().dials);
        pair
    }

    fn commands_at_a(&self) -> StreamReport {
        self.a.peer(&self.b.id).unwrap().command
    }
}

// behaviour: messaging-12, messaging-12b
#[tokio::test]
async fn what_is_queued_while_a_stream_is_broken_arrives_in_order_and_once() {
    let pair = Pair::start().await;
    let (mut at_a, mut at_b) = (pair.a.inbox(1000), pair.b.inbox(1000));
    pair.a.command(&pair.b.id, 0).unwrap();
    assert_eq!(next(&mut at_b).await.1, 0);
    pair.proxy.set(Weather::Cut);
    until("both notice", || !pair.a.is_connected(&pair.b.id) && !pair.b.is_connected(&pair.a.id)).await;
    for number in 1..=500 {
        pair.a.command(&pair.b.id, number).unwrap();
        pair.b.command(&pair.a.id, number).unwrap();
    }
    pair.proxy.set(Weather::Fine);
    let since = Instant::now();
    connected(&[&pair.a, &pair.b]).await;
    assert!(since.elapsed() < Duration::from_secs(6), "connected again after {:?}", since.elapsed());
    for number in 1..=500 {
        assert_eq!(next(&mut at_b).await.1, number);
        assert_eq!(next(&mut at_a).await.1, number);
    }
    assert!(at_a.try_recv().is_none() && at_b.try_recv().is_none());
    assert_eq!(pair.commands_at_a().sessions, 2);
}

// behaviour: messaging-12b
#[tokio::test]
async fn a_connection_that_ends_in_one_direction_is_made_anew() {
    for of_dialler in [true, false] {
        let pair = Pair::start().await;
        let mut at_b = pair.b.inbox(8);
        pair.proxy.set(Weather::Half { of_dialler });
        until("a stream breaks", || !pair.a.is_connected(&pair.b.id) || pair.commands_at_a().sessions > 1)
            .await;
        pair.proxy.set(Weather::Fine);
        until("a new session", || pair.commands_at_a().sessions > 1 && pair.commands_at_a().ready).await;
        connected(&[&pair.a, &pair.b]).await;
        pair.a.command(&pair.b.id, 1).unwrap();
        assert_eq!(next(&mut at_b).await.1, 1);
    }
}

#[tokio::test]
async fn a_peer_that_stands_still_for_a_moment_loses_nothing() {
    let pair = Pair::start().await;
    let mut at_b = pair.b.inbox(2000);
    pair.proxy.set(Weather::Still);
    for number in 0..2000 {
        pair.a.command(&pair.b.id, number).unwrap();
    }
    sleep(Duration::from_secs(2)).await;
    assert!(at_b.try_recv().is_none());
    pair.proxy.set(Weather::Slow(Duration::from_millis(1)));
    for number in 0..2000 {
        assert_eq!(next(&mut at_b).await.1, number);
    }
    assert_eq!(pair.commands_at_a().sessions, 1, "it was the same stream all the time");
}

// behaviour: messaging-13b
#[tokio::test]
async fn a_node_at_a_new_address_gets_what_was_queued_for_it() {
    let pair = Pair::start().await;
    let mut at_b = pair.b.inbox(8);
    pair.proxy.set(Weather::Cut);
    until("a notices", || !pair.a.is_connected(&pair.b.id)).await;
    pair.a.command(&pair.b.id, 1).unwrap();
    // The same process at another address, and the old one stays dead.
    let other = Proxy::new(&pair.b.listens).await;
    let list = List::from([
        (pair.a.id.clone(), pair.a.address.clone()),
        (pair.b.id.clone(), format!("http://{}", other.address)),
    ]);
    pair.a.knows(&list);
    until("connected there", || pair.a.is_connected(&pair.b.id)).await;
    pair.a.command(&pair.b.id, 2).unwrap();
    assert_eq!(next(&mut at_b).await.1, 1);
    assert_eq!(next(&mut at_b).await.1, 2);
    assert_eq!(pair.a.peer(&pair.b.id).unwrap().address, other.address);
}

/// Sends numbered commands both ways while the weather changes at random.
async fn stormy(seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    let pair = Pair::start().await;
    let (mut at_a, mut at_b) = (pair.a.inbox(20_000), pair.b.inbox(20_000));
    // Events have no numbers of the bus: what they show is the work of the streams alone.
    let mut events = pair.b.center.register::<Events>(40_000);
    let mut sent = 0;
    for _ in 0..12 {
        let weather = match random.random_range(0..6) {
            0 => Weather::Cut,
            1 => Weather::Still,
            2 => Weather::Half { of_dialler: random.random() },
            3 => Weather::Slow(Duration::from_micros(random.random_range(1..2000))),
            _ => Weather::Fine,
        };
        pair.proxy.set(weather);
        let until = Instant::now() + Duration::from_millis(random.random_range(1..150));
        while Instant::now() < until {
            sent += 1;
            // Refusals are losses that the sender knows of.
            let _ = pair.a.command(&pair.b.id, sent);
            let _ = pair.b.command(&pair.a.id, sent);
            let _ = pair.a.event(&pair.b.id, Event(sent, vec![0; random.random_range(0..2000)]));
            if random.random_range(0..20) == 0 {
                sleep(Duration::from_millis(random.random_range(0..5))).await;
            }
        }
    }
    pair.proxy.set(Weather::Fine);
    let last = sent + 1;
    for (from, to, inbox) in [(&pair.a, &pair.b, &mut at_b), (&pair.b, &pair.a, &mut at_a)] {
        check(from, to, inbox, last, seed).await;
    }
    let mut newest = 0;
    while let Ok(Some(inbound)) = timeout(Duration::from_millis(300), events.recv()).await {
        assert!(inbound.message.0 > newest, "seed {seed}: event {} after {newest}", inbound.message.0);
        newest = inbound.message.0;
    }
    assert!(newest > 0, "seed {seed}: no event arrived");
}

/// What arrives is in order and comes once; what is sent in the end arrives.
async fn check(from: &Node, to: &Node, inbox: &mut Inbox<HeartbeatCollectorTopic>, last: u64, seed: u64) {
    let (mut newest, deadline) = (0, Instant::now() + DEADLINE);
    while newest < last {
        assert!(Instant::now() < deadline, "seed {seed}: only {newest} of {last} arrived");
        match from.command(&to.id, last) {
            Ok(()) => {}
            Err(error) => assert!(error.is_retryable(), "seed {seed}: {error}"),
        }
        while let Ok(Some(inbound)) = timeout(Duration::from_millis(50), inbox.recv()).await {
            let number = number(&inbound.message);
            let fine = if number == last { number >= newest } else { number > newest };
            assert!(fine, "seed {seed}: {number} came after {newest}");
            newest = number;
        }
    }
}

// behaviour: messaging-12
#[tokio::test]
async fn commands_arrive_in_order_and_once_whatever_the_network_does() {
    let seeds = std::env::var("SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(4);
    for seed in 0..seeds {
        stormy(seed).await;
    }
}

#[tokio::test]
async fn a_message_larger_than_a_peer_takes_is_refused_at_once_and_breaks_nothing() {
    let pair = Pair::start().await;
    let mut events = pair.b.center.register::<Events>(4);
    let huge = Event(1, vec![0; 1 << 28]);
    let error = pair.a.event(&pair.b.id, huge).unwrap_err();
    assert_eq!(error.kind, SendErrorKind::InvalidMessage);
    pair.a.event(&pair.b.id, Event(2, vec![7; 20 << 20])).unwrap();
    let inbound = timeout(DEADLINE, events.recv()).await.unwrap().unwrap();
    assert_eq!((inbound.message.0, inbound.message.1.len()), (2, 20 << 20));
}
