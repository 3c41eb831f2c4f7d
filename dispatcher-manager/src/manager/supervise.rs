//! What happens when a manager's task ends in a way that nobody planned: the changefeed fails, the process does not.

use std::time::Duration;

use heartbeatpb::{HeartBeatRequest, Owner, WallTime};
use messaging::{MaintainerManagerTopic, ToMaintainerManager};
use tokio::sync::watch;

use super::task::Task;
use super::{ManagerContext, WritePath};
use crate::{Error, Fault};

/// How often the end is reported until the manager is taken away.
const REPEAT: Duration = Duration::from_secs(5);

/// Runs a task; after a panic, closes what it left open and reports until the last handle is gone.
pub(super) async fn run(
    task: Task,
    context: ManagerContext,
    write_path: WritePath,
    owner: watch::Receiver<Owner>,
    closed: watch::Sender<bool>,
) {
    let id = task.id.clone();
    let entrance = task.entrance.clone();
    let ended = tokio::spawn(task.run(closed.clone())).await;
    if !ended.is_err_and(|error| error.is_panic()) {
        return;
    }
    write_path.fence();
    context.routes.deregister(&id, &entrance);
    context.source.close(&id);
    closed.send_replace(true);
    tracing::error!(changefeed = %id, "the dispatcher manager panicked");
    let node = context.center.node().clone();
    let error = Fault { retryable: true, ..Error::Ended.fault() }.running(&node, WallTime::now());
    loop {
        let request = HeartBeatRequest {
            changefeed: id.clone(),
            watermark: None,
            redo_watermark: None,
            statuses: Vec::new(),
            complete: false,
            error: Some(error.clone()),
            trouble: None,
        };
        let to = owner.borrow().node.clone();
        let _ = context.center.send::<MaintainerManagerTopic>(&to, ToMaintainerManager::HeartBeat(request));
        tokio::select! {
            biased;
            () = closed.closed() => return,
            () = tokio::time::sleep(REPEAT) => {}
        }
    }
}
