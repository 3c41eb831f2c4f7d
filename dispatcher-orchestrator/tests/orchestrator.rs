//! A node's orchestrator between a message center and managers with recording sinks.

use std::sync::Arc;
use std::time::Duration;

use dispatcher_manager::testing::{FakeSinks, FakeSource};
use dispatcher_manager::{EventSource, SinkFactory};
use dispatcher_orchestrator::{Orchestrator, OrchestratorHandle};
use heartbeatpb::config::{DispatcherManagerConfig, ReplicaConfig};
use heartbeatpb::{
    ChangefeedId, ConfigBytes, DispatcherId, Gid, MaintainerBootstrapRequest, MaintainerBootstrapResponse,
    MaintainerCloseRequest, MaintainerEpoch, MaintainerPostBootstrapRequest, NodeId, Ts,
};
use messaging::{
    Inbox, MaintainerManagerTopic, MaintainerTopic, MessageCenter, MessagingConfig, OrchestratorTopic,
    ToMaintainer, ToMaintainerManager, ToOrchestrator,
};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// Longest wait for anything; the clock of these tests runs as fast as nothing happens.
const DEADLINE: Duration = Duration::from_secs(120);
/// Long enough for an answer that would come to have come.
const SILENCE: Duration = Duration::from_secs(1);

struct Bench {
    center: MessageCenter,
    source: FakeSource,
    sinks: Arc<FakeSinks>,
    handle: OrchestratorHandle,
    answers: Inbox<MaintainerManagerTopic>,
    closes: Inbox<MaintainerTopic>,
    shutdown: CancellationToken,
    running: JoinHandle<()>,
}

fn id(n: u64) -> DispatcherId {
    DispatcherId::new(7, n)
}

fn epoch(n: u64) -> Option<MaintainerEpoch> {
    MaintainerEpoch::from_wire(n)
}

/// A changefeed of shard `n % 8`.
fn feed(n: u64) -> ChangefeedId {
    ChangefeedId { gid: Gid::new(0, n), name: format!("feed-{n}").into(), keyspace: "default".into() }
}

fn bootstrap(n: u64, e: u64, trigger: Option<u64>) -> MaintainerBootstrapRequest {
    let config = DispatcherManagerConfig {
        changefeed: feed(n),
        sink_uri: "blackhole://".into(),
        config: ReplicaConfig::default(),
        start_ts: Ts(50),
        target_ts: Ts::ZERO,
        epoch: epoch(e),
    };
    MaintainerBootstrapRequest {
        changefeed: feed(n),
        config: config.to_bytes(),
        start_ts: Ts(50),
        trigger: trigger.map(id),
        is_new: false,
        redo_trigger: None,
        keyspace_id: 0,
        epoch: epoch(e),
    }
}

impl Bench {
    fn new() -> Self {
        let center = MessageCenter::new(NodeId::from("n1"), MessagingConfig::default());
        let source = FakeSource::default();
        let sinks = Arc::new(FakeSinks::default());
        let answers = center.register::<MaintainerManagerTopic>(65_536);
        let closes = center.register::<MaintainerTopic>(65_536);
        let (orchestrator, handle) = Orchestrator::new(
            center.clone(),
            Arc::new(source.clone()) as Arc<dyn EventSource>,
            Arc::clone(&sinks) as Arc<dyn SinkFactory>,
        );
        let shutdown = CancellationToken::new();
        let running = tokio::spawn(orchestrator.run(shutdown.clone()));
        Self { center, source, sinks, handle, answers, closes, shutdown, running }
    }

    fn send(&self, message: ToOrchestrator) {
        self.center.send::<OrchestratorTopic>(&NodeId::from("n1"), message).expect("the own node is known");
    }

    fn ask(&self, n: u64, e: u64, trigger: Option<u64>) {
        self.send(ToOrchestrator::Bootstrap(bootstrap(n, e, trigger)));
    }

    async fn answer(&mut self) -> MaintainerBootstrapResponse {
        timeout(DEADLINE, async {
            loop {
                let inbound = self.answers.recv().await.expect("the inbox is ours");
                if let ToMaintainerManager::BootstrapResponse(response) = inbound.message {
                    return response;
                }
            }
        })
        .await
        .expect("answered in time")
    }

    async fn bootstrapped(&mut self, n: u64, e: u64, trigger: Option<u64>) -> MaintainerBootstrapResponse {
        self.ask(n, e, trigger);
        let answer = self.answer().await;
        assert_eq!((answer.changefeed.gid, answer.epoch), (feed(n).gid, epoch(e)));
        answer
    }

    /// Nothing but heartbeats comes for a while.
    async fn silence(&mut self) {
        let answer = timeout(SILENCE, async {
            loop {
                let inbound = self.answers.recv().await.expect("the inbox is ours");
                if !matches!(inbound.message, ToMaintainerManager::HeartBeat(_)) {
                    return;
                }
            }
        });
        assert!(answer.await.is_err(), "there is an answer");
    }

    async fn close(&mut self, n: u64, e: u64, removed: bool) -> bool {
        self.send(ToOrchestrator::Close(MaintainerCloseRequest {
            changefeed: feed(n),
            removed,
            epoch: epoch(e),
        }));
        let inbound = timeout(DEADLINE, self.closes.recv()).await.expect("answered in time");
        let ToMaintainer::CloseResponse(response) = inbound.expect("the inbox is ours").message;
        assert_eq!((response.changefeed.gid, response.epoch), (feed(n).gid, epoch(e)));
        response.success
    }

    async fn closed(&mut self, n: u64, e: u64, removed: bool) {
        let deadline = tokio::time::Instant::now() + DEADLINE;
        while !self.close(n, e, removed).await {
            assert!(tokio::time::Instant::now() < deadline, "it closes");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

// behaviour: dispatcher-25
#[tokio::test(start_paused = true)]
async fn a_manager_is_created_closed_and_created_again_by_newer_owners_only() {
    let mut x = Bench::new();
    let answer = x.bootstrapped(1, 5, Some(1)).await;
    assert_eq!((answer.checkpoint, answer.spans.len(), answer.error), (Ts(50), 1, None));
    x.closed(1, 5, false).await;
    assert!(x.handle.changefeeds().is_empty());
    x.ask(1, 4, None);
    x.silence().await;
    x.ask(1, 5, None);
    x.silence().await;
    assert_eq!(x.sinks.count(), 1);
    x.bootstrapped(1, 6, None).await;
    x.closed(1, 6, false).await;
    x.ask(1, 6, None);
    x.silence().await;
}

// behaviour: dispatcher-26, dispatcher-27
#[tokio::test(start_paused = true)]
async fn without_epochs_a_closed_changefeed_comes_back_unless_it_was_removed() {
    let mut x = Bench::new();
    assert!(x.close(1, 0, false).await);
    x.bootstrapped(1, 0, None).await;
    x.closed(1, 0, true).await;
    x.ask(1, 0, None);
    x.silence().await;
}

// behaviour: dispatcher-20
#[tokio::test(start_paused = true)]
async fn a_superseded_owner_is_told_that_it_is_done() {
    let mut x = Bench::new();
    x.bootstrapped(1, 2, None).await;
    assert!(x.close(1, 1, true).await);
    assert_eq!(x.handle.changefeeds(), vec![feed(1)]);
    x.bootstrapped(1, 3, None).await;
    x.closed(1, 3, false).await;
}

// behaviour: dispatcher-17
#[tokio::test(start_paused = true)]
async fn a_newer_owner_with_another_trigger_is_refused_and_the_old_one_can_close() {
    let mut x = Bench::new();
    x.bootstrapped(1, 1, Some(1)).await;
    let answer = x.bootstrapped(1, 2, Some(2)).await;
    let code = answer.error.expect("refused").code;
    assert_eq!(code, "CDC:ErrChangefeedInitTableTriggerDispatcherFailed");
    x.closed(1, 1, false).await;
}

// behaviour: dispatcher-22
#[tokio::test(start_paused = true)]
async fn a_post_bootstrap_is_answered_with_its_own_kind_of_message() {
    let mut x = Bench::new();
    let request = |trigger| {
        ToOrchestrator::PostBootstrap(MaintainerPostBootstrapRequest {
            changefeed: feed(1),
            trigger: id(trigger),
            schemas: Vec::new(),
            redo_schemas: Vec::new(),
            epoch: epoch(1),
        })
    };
    x.send(request(1));
    x.silence().await;
    x.bootstrapped(1, 1, Some(1)).await;
    for (trigger, ok) in [(2, false), (1, true)] {
        x.send(request(trigger));
        let inbound = timeout(DEADLINE, x.answers.recv()).await.expect("in time").expect("ours");
        let ToMaintainerManager::PostBootstrapResponse(response) = inbound.message else {
            panic!("another kind of answer");
        };
        assert_eq!((response.error.is_none(), response.epoch), (ok, epoch(1)));
    }
    assert!(x.source.subscription(id(1)).is_some());
}

// behaviour: dispatcher-24
#[tokio::test(start_paused = true)]
async fn a_creation_that_fails_is_answered_and_can_be_repeated() {
    let mut x = Bench::new();
    x.sinks.fail(true);
    let answer = x.bootstrapped(1, 1, Some(1)).await;
    assert_eq!(answer.error.map(|error| error.code).as_deref(), Some("CDC:ErrSinkUnavailable"));
    assert!(x.handle.changefeeds().is_empty());
    x.sinks.fail(false);
    x.sinks.sink.fail_open(true);
    let answer = x.bootstrapped(1, 1, Some(1)).await;
    assert_eq!(answer.error.map(|error| error.code).as_deref(), Some("CDC:ErrSinkUnavailable"));
    x.sinks.sink.fail_open(false);
    // The maintainer asks until it is answered; the half manager has to end first.
    let deadline = tokio::time::Instant::now() + DEADLINE;
    loop {
        x.ask(1, 1, Some(1));
        if let Ok(answer) = timeout(SILENCE, x.answer()).await {
            assert_eq!(answer.error, None);
            return;
        }
        assert!(tokio::time::Instant::now() < deadline, "it comes back");
    }
}

#[tokio::test(start_paused = true)]
async fn a_configuration_that_cannot_be_read_is_answered_and_not_shown() {
    let mut x = Bench::new();
    let config = ConfigBytes((*b"{\"sink-uri\": \"postgres://u:hunter2@h\", ").into());
    x.send(ToOrchestrator::Bootstrap(MaintainerBootstrapRequest { config, ..bootstrap(1, 1, None) }));
    let error = x.answer().await.error.expect("refused");
    assert_eq!(error.code, "CDC:ErrInvalidReplicaConfig");
    assert!(!error.message.contains("hunter2"));
    assert_eq!(x.sinks.count(), 0);
    x.bootstrapped(1, 1, None).await;
}

// behaviour: dispatcher-3
#[tokio::test(start_paused = true)]
async fn changefeeds_of_different_shards_do_not_wait_for_each_other() {
    let mut x = Bench::new();
    x.bootstrapped(2, 1, None).await;
    x.sinks.create(false);
    x.ask(1, 1, None);
    x.sinks.asked(2).await;
    x.bootstrapped(2, 1, None).await;
    x.sinks.create(true);
    assert_eq!(x.answer().await.changefeed.gid, feed(1).gid);
}

// behaviour: dispatcher-1, dispatcher-2
#[tokio::test(start_paused = true)]
async fn a_repeated_request_waits_once_behind_the_one_that_runs() {
    let mut x = Bench::new();
    x.sinks.create(false);
    x.ask(1, 1, None);
    x.sinks.asked(1).await;
    for _ in 0..5 {
        x.ask(1, 1, None);
    }
    tokio::time::sleep(Duration::from_millis(1)).await;
    x.sinks.create(true);
    x.answer().await;
    x.answer().await;
    x.silence().await;
    assert_eq!(x.sinks.count(), 1);
}

// behaviour: dispatcher-12, dispatcher-13
#[tokio::test(start_paused = true)]
async fn a_fence_stops_the_managers_at_once_and_silences_the_node() {
    let mut x = Bench::new();
    x.bootstrapped(1, 1, Some(1)).await;
    assert!(x.sinks.sink.is_running());
    x.handle.local_fence();
    assert!(x.handle.is_fenced());
    timeout(DEADLINE, x.sinks.sink.saw("ended")).await.expect("the sink ends");
    x.ask(2, 1, None);
    x.ask(1, 2, Some(1));
    x.silence().await;
    assert_eq!(x.sinks.count(), 1);
    x.handle.local_fence();
    x.shutdown.cancel();
    timeout(DEADLINE, x.running).await.expect("it ends").expect("without a panic");
}

// behaviour: dispatcher-14
#[tokio::test(start_paused = true)]
async fn a_fence_reaches_a_manager_that_is_being_created() {
    let mut x = Bench::new();
    x.sinks.create(false);
    x.ask(1, 1, Some(1));
    x.sinks.asked(1).await;
    x.handle.local_fence();
    x.silence().await;
    x.shutdown.cancel();
    let ended = timeout(DEADLINE, x.running).await.expect("the creation is given up although no sink comes");
    ended.expect("without a panic");
    assert!(x.handle.changefeeds().is_empty());
    assert!(!x.sinks.sink.is_running());
}

// behaviour: dispatcher-1
#[tokio::test(start_paused = true)]
async fn a_shutdown_closes_every_manager() {
    let mut x = Bench::new();
    x.bootstrapped(1, 1, Some(1)).await;
    x.bootstrapped(2, 1, Some(2)).await;
    x.sinks.create(false);
    x.ask(3, 1, None);
    x.sinks.asked(3).await;
    x.shutdown.cancel();
    timeout(DEADLINE, x.running).await.expect("it ends").expect("without a panic");
    assert!(!x.source.is_open(&feed(1)) && !x.source.is_open(&feed(2)) && !x.source.is_open(&feed(3)));
}
