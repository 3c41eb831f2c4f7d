//! The end of a process: in order, or at once when its lease is lost.

use std::time::Duration;

use super::Node;
use super::parts::Part;

/// How long each part may take to stop before the process goes on without it.
const PART: Duration = Duration::from_secs(10);
/// How long everything that writes may take to stop. What is left then is cut off.
const WRITE_PATH: Duration = Duration::from_secs(15);
/// How long the goodbye may take. Without one the lease ends by itself.
const GOODBYE: Duration = Duration::from_secs(5);
/// How long all the rest may take.
const REST: Duration = Duration::from_secs(10);
/// How long a process that may not write any more waits for its parts.
const ABANDON: Duration = Duration::from_secs(2);

impl Node {
    /// Stops everything in order; what does not stop in time is left to the end of the process. Others take over only
    /// when nothing here writes any more. Takes half a minute at most.
    ///
    /// # Errors
    /// None now; a failed part is logged.
    pub async fn stop(self) -> anyhow::Result<()> {
        if self.write_path.failure.borrow().is_some() {
            self.abandon().await;
            return Ok(());
        }
        tracing::info!("server is stopping");
        self.write_path.refuse_work();
        let Self { write_path, store, registration, guard, deciding, writing, serving, .. } = self;
        let quiet = async {
            let mut all = true;
            for part in deciding {
                all &= part.stop(PART).await;
            }
            if tokio::time::timeout(PART, write_path.upstreams.stop_all()).await.is_err() {
                tracing::warn!("log readers did not stop in time");
            }
            for part in writing {
                all &= part.stop(PART).await;
            }
            all
        };
        let quiet = tokio::time::timeout(WRITE_PATH, quiet).await.unwrap_or(false);
        // What is left may not write any more either.
        write_path.dispatchers.local_fence();
        write_path.upstreams.fence();
        drop(guard);
        if quiet && write_path.failure.borrow().is_none() {
            match tokio::time::timeout(GOODBYE, registration.take_back(store.as_ref())).await {
                Ok(Ok(())) => tracing::debug!("goodbye"),
                Ok(Err(error)) => {
                    tracing::warn!(%error, "the node could not say goodbye; its lease ends by itself")
                }
                Err(_) => tracing::warn!("saying goodbye took too long; the lease ends by itself"),
            }
        } else {
            // A write may still be on its way: others take over when the lease has ended, and not before.
            tracing::warn!("the node leaves without a goodbye; its lease ends by itself");
        }
        stop_all(serving, REST).await;
        tracing::info!("server has stopped");
        Ok(())
    }

    /// Leaves without a word to the store: the lease is lost, and with it the right to say one.
    async fn abandon(self) {
        let Self { guard, deciding, writing, serving, .. } = self;
        drop(guard);
        give_up(deciding.into_iter().chain(writing).chain(serving)).await;
        tracing::info!("server has stopped without a goodbye");
    }
}

/// Stops parts that have nothing to lose.
pub(super) async fn give_up(parts: impl IntoIterator<Item = Part>) {
    stop_all(parts, ABANDON).await;
}

/// Tells all of them at once, and waits for them in turn.
async fn stop_all(parts: impl IntoIterator<Item = Part>, limit: Duration) {
    let deadline = tokio::time::Instant::now() + limit;
    let parts: Vec<Part> = parts.into_iter().collect();
    for part in &parts {
        part.token().cancel();
    }
    for part in parts {
        part.stop(deadline.saturating_duration_since(tokio::time::Instant::now())).await;
    }
}
