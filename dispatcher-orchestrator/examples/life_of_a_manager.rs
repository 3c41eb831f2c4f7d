//! Plays the maintainer of one changefeed against a node's orchestrator and prints what the node answers.
//!
//! `cargo run -p dispatcher-orchestrator --example life_of_a_manager`

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use dispatcher_manager::testing::{FakeSinks, FakeSource};
use dispatcher_manager::{EventSource, SinkFactory};
use dispatcher_orchestrator::Orchestrator;
use heartbeatpb::config::{DispatcherManagerConfig, ReplicaConfig};
use heartbeatpb::{
    ChangefeedId, DispatcherId, MaintainerBootstrapRequest, MaintainerCloseRequest, MaintainerEpoch,
    MaintainerPostBootstrapRequest, NodeId, Ts,
};
use messaging::{
    MaintainerManagerTopic, MaintainerTopic, MessageCenter, MessagingConfig, OrchestratorTopic, ToMaintainer,
    ToOrchestrator,
};
use tokio_util::sync::CancellationToken;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let center = MessageCenter::new(NodeId::from("example"), MessagingConfig::default());
    let node = center.node().clone();
    let mut answers = center.register::<MaintainerManagerTopic>(1024);
    let mut closes = center.register::<MaintainerTopic>(1024);
    let sinks = Arc::new(FakeSinks::default());
    let (orchestrator, handle) = Orchestrator::new(
        center.clone(),
        Arc::new(FakeSource::default()) as Arc<dyn EventSource>,
        Arc::clone(&sinks) as Arc<dyn SinkFactory>,
    );
    let shutdown = CancellationToken::new();
    let running = tokio::spawn(orchestrator.run(shutdown.clone()));

    let changefeed = ChangefeedId::fresh("example");
    let epoch = MaintainerEpoch::from_wire(1);
    let trigger = DispatcherId::random();
    let config = DispatcherManagerConfig {
        changefeed: changefeed.clone(),
        sink_uri: "blackhole://".into(),
        config: ReplicaConfig::default(),
        start_ts: Ts(100),
        target_ts: Ts::ZERO,
        epoch,
    };
    let bootstrap = MaintainerBootstrapRequest {
        changefeed: changefeed.clone(),
        config: config.to_bytes(),
        start_ts: Ts(100),
        trigger: Some(trigger),
        is_new: true,
        redo_trigger: None,
        keyspace_id: 0,
        epoch,
    };
    center.send::<OrchestratorTopic>(&node, ToOrchestrator::Bootstrap(bootstrap))?;
    println!("bootstrap:      {:?}", answers.recv().await.map(|inbound| inbound.message));

    let post_bootstrap = MaintainerPostBootstrapRequest {
        changefeed: changefeed.clone(),
        trigger,
        schemas: Vec::new(),
        redo_schemas: Vec::new(),
        epoch,
    };
    center.send::<OrchestratorTopic>(&node, ToOrchestrator::PostBootstrap(post_bootstrap))?;
    println!("post-bootstrap: {:?}", answers.recv().await.map(|inbound| inbound.message));
    println!("heartbeat:      {:?}", answers.recv().await.map(|inbound| inbound.message));
    println!("manager:        {:?}", handle.inspect(&changefeed).await);

    loop {
        let close = MaintainerCloseRequest { changefeed: changefeed.clone(), removed: true, epoch };
        center.send::<OrchestratorTopic>(&node, ToOrchestrator::Close(close))?;
        let inbound = closes.recv().await.ok_or("the message center is gone")?;
        let ToMaintainer::CloseResponse(response) = inbound.message;
        println!("close:          success {}", response.success);
        if response.success {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    sinks.sink.saw("forget").await;
    println!("the sink saw:   {:?}", sinks.sink.history());
    shutdown.cancel();
    running.await?;
    Ok(())
}
