//! What people ask for, and what the next coordinator knows of it.

use std::sync::atomic::Ordering;

use coordinator::operations::{Asked, Begin, End, OperationDoc, OperationLog, OperationState};
use coordinator::{CoordinatorHandle, Error};
use heartbeatpb::Gid;

use super::node::{Node, info, replicating, until, within};

/// What is stored, by one who knows nothing else.
async fn read(coordinator: &CoordinatorHandle) -> OperationLog {
    let (found, unreadable) = coordinator.operations().await.unwrap();
    OperationLog::new(coordinator.version(), found, unreadable)
}

fn asked(id: &str, operation: &'static str, gid: Option<Gid>) -> Asked {
    Asked {
        id: id.to_owned(),
        operation,
        keyspace: "default".to_owned(),
        changefeed: "orders".to_owned(),
        gid,
        keeps: true,
        key: Some((id.to_owned(), String::new())),
        now_ms: 1,
        ..Asked::default()
    }
}

/// Begins one as whoever answers requests does.
async fn begin(coordinator: &CoordinatorHandle, log: &mut OperationLog, asked: Asked) -> OperationDoc {
    let doc = match log.begin(asked) {
        Begin::New { doc, .. } | Begin::Again { doc, .. } => doc,
        other @ (Begin::Before(_)
        | Begin::Applied(_)
        | Begin::Gone(_)
        | Begin::OtherRequest
        | Begin::Full) => {
            panic!("not begun: {other:?}")
        }
    };
    assert!(coordinator.put_operation(&doc, None, &[]).await.unwrap());
    doc
}

async fn state(coordinator: &CoordinatorHandle, id: &str) -> OperationState {
    read(coordinator).await.get(id).unwrap().state
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operation_is_applied_when_its_effect_is_and_what_was_refused_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let mut node = Node::start(dir.path());
    let coordinator = node.coordinator().await;
    let mut log = read(&coordinator).await;
    let wanted = info("orders");
    let gid = Some(wanted.id.gid);
    let create = begin(&coordinator, &mut log, asked("create", "create", gid)).await;
    assert_eq!(state(&coordinator, "create").await, OperationState::Running);
    coordinator.for_operation(create.clone()).create(wanted).await.unwrap();
    assert_eq!(state(&coordinator, "create").await, OperationState::Applied);
    until(&coordinator, "orders", "it replicates", replicating).await;

    let refused = begin(&coordinator, &mut log, asked("refused", "resume", gid)).await;
    let result = coordinator.for_operation(refused.clone()).resume("default", "orders", None).await;
    assert!(matches!(result, Err(Error::UpdateRefused { .. })));
    assert_eq!(state(&coordinator, "refused").await, OperationState::Running);
    for (id, operation) in [("pause", "pause"), ("update", "update"), ("resume", "resume")] {
        let doc = begin(&coordinator, &mut log, asked(id, operation, gid)).await;
        let named = coordinator.for_operation(doc);
        match id {
            "pause" => drop(named.pause("default", "orders").await.unwrap()),
            "resume" => drop(named.resume("default", "orders", None).await.unwrap()),
            _ => {
                let mut changed = coordinator.get_persisted("default", "orders").await.unwrap().info;
                changed.config.memory_quota += 1;
                named.update(changed).await.unwrap();
            }
        }
        assert_eq!(state(&coordinator, id).await, OperationState::Applied, "{id}");
    }

    // An answer is stored; one that says "later" only where nothing was changed.
    let later = End { status: 503, changefeed: "orders".to_owned(), ..End::default() };
    assert!(coordinator.put_operation(&refused.ended(later.clone()), Some(&refused), &[]).await.unwrap());
    assert!(!coordinator.put_operation(&create.ended(later.clone()), Some(&create), &[]).await.unwrap());
    assert_eq!(state(&coordinator, "refused").await, OperationState::Failed);
    assert_eq!(state(&coordinator, "create").await, OperationState::Applied);
    let done = End { status: 200, ..later };
    assert!(coordinator.put_operation(&create.ended(done), None, &["refused".to_owned()]).await.unwrap());
    assert_eq!(state(&coordinator, "create").await, OperationState::Success);
    assert!(read(&coordinator).await.get("refused").is_none());
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_next_coordinator_knows_what_was_done_and_the_one_before_can_store_nothing_more() {
    let dir = tempfile::tempdir().unwrap();
    let mut node = Node::start(dir.path());
    let coordinator = node.coordinator().await;
    coordinator.create(info("orders")).await.unwrap();
    until(&coordinator, "orders", "it replicates", replicating).await;
    let gid = coordinator.get("default", "orders").await.unwrap().info.id.gid;
    let mut log = read(&coordinator).await;
    let untouched = begin(&coordinator, &mut log, asked("untouched", "pause", Some(gid))).await;
    // The removal gets as far as its intent: the upstream never answers in this process.
    node.retention.failures.store(usize::MAX, Ordering::Relaxed);
    let removal = begin(&coordinator, &mut log, asked("removal", "delete", Some(gid))).await;
    let asker = tokio::spawn({
        let named = coordinator.for_operation(removal);
        async move { named.remove("default", "orders").await }
    });
    within("the removal is stored", async || state(&coordinator, "removal").await == OperationState::Applied)
        .await;
    node.kill().await;
    assert!(matches!(asker.await.unwrap(), Err(Error::Stopped)));
    drop(coordinator);

    let mut node = Node::start(dir.path());
    let coordinator = node.coordinator().await;
    within("the removal is finished", async || coordinator.get_persisted("default", "orders").await.is_err())
        .await;
    let mut log = read(&coordinator).await;
    // Somebody made another one of the same name meanwhile.
    coordinator.create(info("orders")).await.unwrap();
    let other = coordinator.get("default", "orders").await.unwrap().info.id.gid;
    let repeated = log.begin(Asked { id: "x".to_owned(), ..asked("removal", "delete", Some(other)) });
    assert!(matches!(repeated, Begin::Applied(_)), "{repeated:?}");
    let repeated = log.begin(Asked { id: "x".to_owned(), ..asked("untouched", "pause", Some(other)) });
    assert_eq!(repeated, Begin::Gone(untouched.clone()));

    coordinator.resign().await;
    node.coordinator_after(coordinator.version()).await;
    let late = coordinator.put_operation(&untouched, None, &[]).await;
    assert!(matches!(late, Err(Error::NotOwner)), "{late:?}");
    node.stop().await;
}
