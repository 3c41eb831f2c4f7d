//! The parts of a process: tasks with stop signals of their own.

use std::time::Duration;

use tokio::task::{AbortHandle, JoinHandle};
use tokio_util::sync::CancellationToken;

/// One part of the process: a task with its own stop signal.
pub(super) struct Part {
    name: &'static str,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Part {
    pub(super) fn start<F: Future<Output = ()> + Send + 'static>(
        name: &'static str,
        run: impl FnOnce(CancellationToken) -> F,
    ) -> Self {
        let stop = CancellationToken::new();
        let task = tokio::spawn(run(stop.clone()));
        Self { name, stop, task }
    }

    /// Its name, and a way to see whether it runs.
    pub(super) fn seen(&self) -> (&'static str, AbortHandle) {
        (self.name, self.task.abort_handle())
    }

    /// Its stop signal, for whoever has to stop it without waiting.
    pub(super) fn token(&self) -> CancellationToken {
        self.stop.clone()
    }

    /// Stops it, and waits for it for `limit` at most. Returns whether it has stopped.
    pub(super) async fn stop(self, limit: Duration) -> bool {
        self.stop.cancel();
        match tokio::time::timeout(limit, self.task).await {
            Ok(Ok(())) => tracing::debug!(part = self.name, "stopped"),
            Ok(Err(error)) => tracing::error!(part = self.name, %error, "ended abnormally"),
            Err(_) => {
                tracing::warn!(part = self.name, "did not stop in time");
                return false;
            }
        }
        true
    }
}
