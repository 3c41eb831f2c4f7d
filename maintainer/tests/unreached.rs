//! Members that are not reached: given up where a fence keeps them from writing, waited for where nothing does.

mod world;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use heartbeatpb::{ChangefeedId, NodeId};
use maintainer::Whom;
use world::{FakeFence, World, within};

/// How long is looked whether something happens that must not.
const WHILE: Duration = Duration::from_secs(5);

fn nodes(names: &[&str]) -> BTreeSet<NodeId> {
    names.iter().map(|name| NodeId::from(*name)).collect()
}

#[tokio::test(start_paused = true)]
async fn a_member_that_is_not_reached_is_fenced_and_not_waited_for() {
    let fence = Arc::new(FakeFence::default());
    let asked = Arc::clone(&fence);
    let world = World::with_fence(2, fence);
    world.bootstrap(1);
    // Nobody answers for it.
    world.nodes.send_replace(nodes(&["n1", "n2"]));
    let id = ChangefeedId::fresh("t");
    world.add(&id, 7);
    tokio::time::sleep(WHILE).await;
    assert!(world.status(&id).is_some_and(|status| !status.bootstrap_done), "it may answer yet");
    world.unreached.send_replace(nodes(&["n2"]));
    within("it works without the other", || world.status(&id).is_some_and(|status| status.bootstrap_done))
        .await;
    assert_eq!(asked.asked.lock().last().unwrap(), &(Some(7), Whom::AllBut(nodes(&["n1"]))));
    within("all tables are here", || world.dispatchers.lock().running.len() == 3).await;
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn where_nothing_can_be_fenced_a_member_that_is_not_reached_is_waited_for() {
    let world = World::new(2);
    world.bootstrap(1);
    world.nodes.send_replace(nodes(&["n1", "n2"]));
    world.unreached.send_replace(nodes(&["n2"]));
    let id = ChangefeedId::fresh("t");
    world.add(&id, 7);
    tokio::time::sleep(WHILE).await;
    assert!(world.status(&id).is_some_and(|status| !status.bootstrap_done), "two could write the same files");
    // Its lease has ended.
    world.nodes.send_replace(nodes(&["n1"]));
    within("it works without the other", || world.status(&id).is_some_and(|status| status.bootstrap_done))
        .await;
    world.stop().await;
}
