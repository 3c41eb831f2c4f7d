//! What the bus counts and logs.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use heartbeatpb::{ChangefeedId, MaintainerCloseResponse};
use messaging::metrics::{DROPPED, ERRORS, RECEIVED, SENT, SLOW, WAITING};
use messaging::{MaintainerTopic, MessageCenter, MessagingConfig, StreamClass, ToMaintainer, Topic, codec};
use metrics::{Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit};

/// Keeps every series by its name and its labels' values.
#[derive(Default)]
struct Recorded(Mutex<BTreeMap<String, Arc<AtomicU64>>>);

impl Recorded {
    fn series(&self, key: &Key) -> Arc<AtomicU64> {
        let labels: Vec<_> = key.labels().map(|label| label.value()).collect();
        let name = format!("{}/{}", key.name(), labels.join("/"));
        Arc::clone(self.0.lock().expect("not poisoned").entry(name).or_default())
    }

    fn value(&self, name: &str, labels: &str) -> u64 {
        let series = self.0.lock().expect("not poisoned");
        series.get(&format!("{name}/{labels}")).map_or(0, |value| value.load(Ordering::Relaxed))
    }
}

impl Recorder for Recorded {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        Counter::from_arc(self.series(key))
    }

    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::from_arc(self.series(key))
    }

    fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::noop()
    }
}

/// Counts warnings.
#[derive(Clone, Default)]
struct Warnings(Arc<AtomicU64>);

impl tracing::Subscriber for Warnings {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() == tracing::Level::WARN && metadata.target().starts_with("messaging")
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, _: &tracing::Event<'_>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

fn closed() -> ToMaintainer {
    ToMaintainer::CloseResponse(MaintainerCloseResponse {
        changefeed: ChangefeedId::fresh("feed"),
        success: true,
        epoch: None,
    })
}

// behaviour: messaging-19
#[tokio::test(start_paused = true)]
async fn a_slow_handler_is_counted_each_time_and_logged_once_in_ten_seconds() {
    let recorded = Recorded::default();
    let _metrics = metrics::set_default_local_recorder(&recorded);
    let warnings = Warnings::default();
    let _logs = tracing::subscriber::set_default(warnings.clone());
    let center = MessageCenter::new("a".into(), MessagingConfig::default());
    let mut inbox = center.register::<MaintainerTopic>(16);
    let slow = || recorded.value(SLOW, "MaintainerCloseResponse");
    let logged = || warnings.0.load(Ordering::Relaxed);
    for handling_ms in [100, 101, 150, 200] {
        center.send::<MaintainerTopic>(center.node(), closed()).expect("room");
        inbox.recv().await.expect("registered");
        tokio::time::advance(Duration::from_millis(handling_ms)).await;
    }
    assert!(inbox.try_recv().is_none());
    assert_eq!((slow(), logged()), (3, 1), "100 ms are not slow yet");
    tokio::time::advance(Duration::from_secs(10)).await;
    assert!(inbox.try_recv().is_none());
    assert_eq!(slow(), 3, "waiting for a message is not handling one");
    center.send::<MaintainerTopic>(center.node(), closed()).expect("room");
    inbox.recv().await.expect("registered");
    tokio::time::advance(Duration::from_secs(1)).await;
    assert!(inbox.try_recv().is_none());
    assert_eq!((slow(), logged()), (4, 2));
}

#[tokio::test]
async fn what_is_sent_received_refused_and_dropped_is_counted() {
    let recorded = Recorded::default();
    let _metrics = metrics::set_default_local_recorder(&recorded);
    let center = MessageCenter::new("a".into(), MessagingConfig::default());
    let _inbox = center.register::<MaintainerTopic>(2);
    for _ in 0..2 {
        center.send::<MaintainerTopic>(center.node(), closed()).expect("room");
    }
    center.send::<MaintainerTopic>(center.node(), closed()).expect_err("full");
    center.send::<MaintainerTopic>(&"b".into(), closed()).expect_err("unknown");
    center.observe();
    assert_eq!(recorded.value(SENT, "command"), 2);
    assert_eq!(recorded.value(RECEIVED, "command"), 2);
    assert_eq!(recorded.value(ERRORS, "command/message_congested"), 1);
    assert_eq!(recorded.value(ERRORS, "message/error"), 1);
    assert_eq!(f64::from_bits(recorded.value(WAITING, "command")), 2.0);

    let peer = "b".into();
    let mut envelope = codec::envelope(&peer, center.node(), MaintainerTopic::NAME, &closed());
    envelope.r#type = 46;
    center.try_receive(StreamClass::Command, &peer, &envelope).expect_err("full");
    drop(_inbox);
    center.try_receive(StreamClass::Command, &peer, &envelope).expect("dropped");
    let _inbox = center.register::<MaintainerTopic>(2);
    center.try_receive(StreamClass::Command, &peer, &envelope).expect("dropped");
    center.try_receive(StreamClass::Event, &"c".into(), &envelope).expect("dropped");
    assert_eq!(recorded.value(DROPPED, "command/no-receiver"), 1);
    assert_eq!(recorded.value(DROPPED, "command/unknown-type"), 1);
    assert_eq!(recorded.value(DROPPED, "event/misaddressed"), 1);
    assert_eq!(recorded.value(RECEIVED, "command"), 2);
}
