//! How a stream begins when messages are lost: each side against one that the test plays. Time is virtual.

use std::sync::Arc;
use std::time::Duration;

use heartbeatpb::{ChangefeedId, DispatcherId, NodeId, TableId, TableSpan, Ts};
use logservice::topic::{EventCollectorTopic, EventServiceTopic, ToEventCollector, ToEventService};
use logservice::{CheckpointSlot, Collector, LogConfig, LogService, Subscription};
use messaging::{Inbox, MessageCenter, MessagingConfig};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::rig::*;

const DISPATCHER: DispatcherId = DispatcherId::new(1, 1);

/// The next reset that a collector asks for.
async fn next_reset(requests: &mut Inbox<EventServiceTopic>) -> (u64, Ts) {
    loop {
        let request = requests.recv().await.unwrap().message;
        if let ToEventService::Reset { epoch, start_ts, .. } = request {
            return (epoch, start_ts);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_lost_reset_is_asked_for_again_within_two_seconds_and_is_the_same_one() {
    let center = MessageCenter::new(NodeId::from("one"), MessagingConfig::default());
    let mut requests = center.register::<EventServiceTopic>(1024);
    let (task, collector) = Collector::new(center.clone());
    let shutdown = CancellationToken::new();
    let running = tokio::spawn(task.run(shutdown.clone()));
    let changefeed = ChangefeedId::fresh("one");
    let _deliveries = collector.open(changefeed.clone(), 1 << 20);
    collector.subscribe(Subscription {
        changefeed: changefeed.clone(),
        dispatcher: DISPATCHER,
        span: TableSpan::whole(TableId(1)),
        start_ts: Ts(7),
        event_service: center.node().clone(),
        checkpoint: Arc::new(CheckpointSlot::new(Ts(7))),
    });
    while !matches!(requests.recv().await.unwrap().message, ToEventService::Register { .. }) {}
    let ready = ToEventCollector::Ready { changefeed: changefeed.gid, dispatcher: DISPATCHER };
    center.send::<EventCollectorTopic>(center.node(), ready).unwrap();
    let first = next_reset(&mut requests).await;
    assert_eq!(first.1, Ts(7));
    for _ in 0..3 {
        let asked = Instant::now();
        assert_eq!(
            next_reset(&mut requests).await,
            first,
            "another epoch makes what is on its way worthless"
        );
        assert!(asked.elapsed() <= Duration::from_secs(2), "{:?}", asked.elapsed());
    }
    shutdown.cancel();
    running.await.unwrap();
}

/// A collector over a bus on which the test plays the event service.
struct Alone {
    center: MessageCenter,
    requests: Inbox<EventServiceTopic>,
    collector: logservice::CollectorHandle,
    changefeed: ChangefeedId,
    shutdown: CancellationToken,
}

impl Alone {
    fn new() -> Self {
        let center = MessageCenter::new(NodeId::from("one"), MessagingConfig::default());
        let requests = center.register::<EventServiceTopic>(1024);
        let (task, collector) = Collector::new(center.clone());
        let shutdown = CancellationToken::new();
        tokio::spawn(task.run(shutdown.clone()));
        Self { center, requests, collector, changefeed: ChangefeedId::fresh("one"), shutdown }
    }

    fn subscribe(&self) {
        self.collector.subscribe(Subscription {
            changefeed: self.changefeed.clone(),
            dispatcher: DISPATCHER,
            span: TableSpan::whole(TableId(1)),
            start_ts: Ts(7),
            event_service: self.center.node().clone(),
            checkpoint: Arc::new(CheckpointSlot::new(Ts(7))),
        });
    }

    fn tell(&self, event: ToEventCollector) {
        self.center.send::<EventCollectorTopic>(self.center.node(), event).unwrap();
    }

    fn ready(&self) -> ToEventCollector {
        ToEventCollector::Ready { changefeed: self.changefeed.gid, dispatcher: DISPATCHER }
    }

    /// The next request about the dispatcher itself; reports are left out.
    async fn next(&mut self) -> &'static str {
        loop {
            match self.requests.recv().await.unwrap().message {
                ToEventService::Register { .. } => return "register",
                ToEventService::Reset { .. } => return "reset",
                ToEventService::Remove { .. } => return "remove",
                ToEventService::Heartbeat { .. } | ToEventService::Credit { .. } => {}
            }
        }
    }

    /// What is asked within the next so many milliseconds.
    async fn within(&mut self, millis: u64) -> Vec<&'static str> {
        let until = Instant::now() + Duration::from_millis(millis);
        let mut asked = Vec::new();
        while let Ok(next) = tokio::time::timeout_at(until, self.next()).await {
            asked.push(next);
        }
        asked
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

// behaviour: dispatcher-94
#[tokio::test(start_paused = true)]
async fn a_service_that_says_again_that_it_is_ready_begins_nothing_anew() {
    let mut alone = Alone::new();
    let _deliveries = alone.collector.open(alone.changefeed.clone(), 1 << 20);
    alone.subscribe();
    assert_eq!(alone.next().await, "register");
    alone.tell(alone.ready());
    assert_eq!(alone.next().await, "reset");
    for _ in 0..3 {
        alone.tell(alone.ready());
    }
    assert_eq!(alone.within(400).await, [""; 0], "the reset is on its way");
}

// behaviour: dispatcher-97
#[tokio::test(start_paused = true)]
async fn a_stream_that_its_service_has_forgotten_registers_again_and_begins_again() {
    let mut alone = Alone::new();
    let mut deliveries = alone.collector.open(alone.changefeed.clone(), 1 << 20);
    alone.subscribe();
    assert_eq!(alone.next().await, "register");
    alone.tell(alone.ready());
    let mut epochs = Vec::new();
    for _ in 0..2 {
        let (epoch, start_ts) = next_reset(&mut alone.requests).await;
        epochs.push(epoch);
        let head = logservice::topic::EventHead {
            changefeed: alone.changefeed.gid,
            dispatcher: DISPATCHER,
            epoch,
            seq: 1,
        };
        alone.tell(ToEventCollector::Handshake { head, start_ts, table: None });
        assert!(matches!(deliveries.recv().await.unwrap().event, logservice::DispatcherEvent::Begin(_)));
        let forgotten =
            ToEventCollector::NotRegistered { changefeed: alone.changefeed.gid, dispatcher: DISPATCHER };
        alone.tell(forgotten);
        assert_eq!(alone.next().await, "register");
        alone.tell(alone.ready());
    }
    assert!(epochs[0] < epochs[1], "what is on its way of the stream before is told apart");
}

// behaviour: dispatcher-98
#[tokio::test(start_paused = true)]
async fn a_dispatcher_that_goes_while_it_registers_is_removed_behind_that_and_a_late_answer_is_ignored() {
    let mut alone = Alone::new();
    let _deliveries = alone.collector.open(alone.changefeed.clone(), 1 << 20);
    alone.subscribe();
    alone.collector.unsubscribe(&alone.changefeed, DISPATCHER);
    assert_eq!(alone.next().await, "register");
    assert_eq!(alone.next().await, "remove");
    alone.tell(alone.ready());
    assert_eq!(alone.within(3000).await, [""; 0], "nobody wants it any more");
}

/// Sends a request until the service, which may not listen yet, gives an answer that fits.
async fn ask(
    center: &MessageCenter,
    events: &mut Inbox<EventCollectorTopic>,
    request: &ToEventService,
    fits: impl Fn(&ToEventCollector) -> bool,
) {
    for _ in 0..1000 {
        let _ = center.send::<EventServiceTopic>(center.node(), request.clone());
        let until = Instant::now() + Duration::from_millis(50);
        while let Ok(Some(event)) = tokio::time::timeout_at(until, events.recv()).await {
            if fits(&event.message) {
                return;
            }
        }
    }
    panic!("no answer to {request:?}");
}

#[tokio::test(start_paused = true)]
async fn a_reset_that_comes_again_is_answered_and_begins_nothing_anew() {
    let center = MessageCenter::new(NodeId::from("one"), MessagingConfig::default());
    let dir = tempfile::tempdir().unwrap();
    let config = LogConfig { dir: dir.path().to_owned(), memory_bytes: 1 << 20, disk_bytes: 1 << 20 };
    let log = LogService::new(center.clone(), config);
    let mut events = center.register::<EventCollectorTopic>(1024);
    let (service, stop) = (log.clone(), CancellationToken::new());
    let task = tokio::spawn({
        let stop = stop.clone();
        async move { service.run(stop).await }
    });
    let changefeed = ChangefeedId::fresh("one");
    let mut writer = log.open(&changefeed, Ts(1)).unwrap();
    register(&mut writer, 1);
    let register = ToEventService::Register {
        changefeed: changefeed.clone(),
        dispatcher: DISPATCHER,
        span: TableSpan::whole(TableId(1)),
        start_ts: Ts(1),
    };
    ask(&center, &mut events, &register, |event| matches!(event, ToEventCollector::Ready { .. })).await;
    let reset = ToEventService::Reset {
        changefeed: changefeed.clone(),
        dispatcher: DISPATCHER,
        epoch: 5,
        start_ts: Ts(1),
        copied: None,
    };
    let handshake = |event: &ToEventCollector| matches!(event, ToEventCollector::Handshake { head, .. } if (head.epoch, head.seq) == (5, 1));
    ask(&center, &mut events, &reset, handshake).await;
    ask(&center, &mut events, &reset, handshake).await;
    let credit = ToEventService::Credit {
        changefeed: changefeed.clone(),
        opening: 1,
        received: 0,
        freed: 0,
        window: 1 << 20,
    };
    let mut sent = Sent::default();
    sent.transaction(&mut writer, 10, &[(1, 3)]).await;
    publish(&mut writer, 10);
    ask(
        &center,
        &mut events,
        &credit,
        |event| matches!(event, ToEventCollector::Rows { head, .. } if (head.epoch, head.seq) == (5, 2)),
    )
    .await;
    // Its receiver has not even seen the handshake: the number shows it what is missing.
    ask(&center, &mut events, &reset, |event| {
        let ToEventCollector::Resolved { entries, .. } = event else { return false };
        entries.iter().any(|(head, ts)| (head.epoch, head.seq, *ts) == (5, 2, Ts(1)))
    })
    .await;
    stop.cancel();
    task.await.unwrap();
}
