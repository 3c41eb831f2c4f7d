//! A shard: requests of some changefeeds, handled one after the other.

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::queue::{PendingQueue, Pushed, Request};

/// A queue and its bell. One worker takes from it.
#[derive(Debug, Default)]
pub(crate) struct Shard {
    queue: Mutex<PendingQueue>,
    bell: Notify,
}

impl Shard {
    /// Queues a request; never waits.
    pub(crate) fn push(&self, request: Request) -> Pushed {
        let pushed = self.queue.lock().push(request);
        self.bell.notify_one();
        pushed
    }

    /// The next request; `None` when the shard is closed and empty.
    pub(crate) async fn next(&self) -> Option<Request> {
        loop {
            {
                let mut queue = self.queue.lock();
                if let Some(request) = queue.pop() {
                    return Some(request);
                }
                if queue.is_finished() {
                    return None;
                }
            }
            self.bell.notified().await;
        }
    }

    /// Takes nothing more; the worker ends after what waits.
    pub(crate) fn close(&self) {
        self.queue.lock().close();
        self.bell.notify_one();
    }
}
