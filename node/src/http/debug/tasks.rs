//! The long-lived tasks of a node by name, what the runtime under them has to do, and whether it gets on.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::runtime::{Handle, RuntimeMetrics};
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;

/// How often the runtime is asked whether it gets on.
const BEAT: Duration = Duration::from_secs(1);
/// A runtime that has not answered for so long is stuck (metrics §7.1).
pub(crate) const STUCK: Duration = Duration::from_secs(5);

/// One of them.
struct Task {
    name: &'static str,
    began: Instant,
    handle: AbortHandle,
}

/// The long-lived tasks of a node.
pub(crate) struct Tasks {
    began: Instant,
    /// When the runtime got on last, in milliseconds since `began`.
    beat: AtomicU64,
    all: Mutex<Vec<Task>>,
}

impl Default for Tasks {
    fn default() -> Self {
        Self { began: Instant::now(), beat: AtomicU64::new(0), all: Mutex::default() }
    }
}

impl Tasks {
    /// One more, that has just begun.
    pub(crate) fn watch(&self, name: &'static str, handle: AbortHandle) {
        self.all.lock().push(Task { name, began: Instant::now(), handle });
    }

    /// Beats as long as the runtime gets on.
    pub(crate) async fn beat(&self, stop: &CancellationToken) {
        let mut tick = tokio::time::interval(BEAT);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                _ = tick.tick() => self.beat.store(millis(self.began.elapsed()), Ordering::Relaxed),
            }
        }
    }

    /// How long ago the runtime got on last.
    pub(crate) fn silence(&self) -> Duration {
        self.began.elapsed().saturating_sub(Duration::from_millis(self.beat.load(Ordering::Relaxed)))
    }

    pub(super) fn value(&self) -> Value {
        let tasks: Vec<Value> = self
            .all
            .lock()
            .iter()
            .map(|task| {
                let seconds = task.began.elapsed().as_secs();
                json!({ "name": task.name, "running": !task.handle.is_finished(), "seconds": seconds })
            })
            .collect();
        json!({ "tasks": tasks, "silent_ms": millis(self.silence()), "runtime": runtime() })
    }

    /// The same for people.
    pub(super) fn text(&self) -> String {
        let mut out = String::new();
        for task in &*self.all.lock() {
            let is = if task.handle.is_finished() { "ended, begun" } else { "running for" };
            let _ = writeln!(out, "task {:?} {is} {} s", task.name, task.began.elapsed().as_secs());
        }
        let _ = writeln!(out, "runtime {}", runtime());
        let _ = writeln!(out, "runtime got on {} ms ago", millis(self.silence()));
        out
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// What the async runtime has to do. Workers that are busy all the time starve everybody else.
fn runtime() -> Value {
    let Ok(handle) = Handle::try_current() else { return Value::Null };
    let metrics: RuntimeMetrics = handle.metrics();
    let busy: Vec<f64> = (0..metrics.num_workers())
        .map(|worker| metrics.worker_total_busy_duration(worker).as_secs_f64())
        .collect();
    json!({
        "workers": metrics.num_workers(),
        "alive_tasks": metrics.num_alive_tasks(),
        "waiting_tasks": metrics.global_queue_depth(),
        "busy_seconds": busy,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_that_ended_is_told_as_such_and_a_runtime_that_stands_is_found_out() {
        let tasks = Tasks::default();
        let (runs, ends) = (tokio::spawn(std::future::pending::<()>()), tokio::spawn(async {}));
        tasks.watch("port", runs.abort_handle());
        tasks.watch("leader", ends.abort_handle());
        ends.await.unwrap();
        let value = tasks.value();
        assert_eq!(
            (&value["tasks"][0]["running"], &value["tasks"][1]["running"]),
            (&json!(true), &json!(false))
        );
        assert!(value["runtime"]["alive_tasks"].as_u64().unwrap() > 0, "{value}");
        let text = tasks.text();
        assert!(text.contains("task \"port\" running") && text.contains("task \"leader\" ended"), "{text}");
        assert!(tasks.silence() < STUCK);
        let before = tasks.silence();
        std::thread::sleep(Duration::from_millis(20));
        assert!(tasks.silence() > before, "nobody beats");
        let stop = CancellationToken::new();
        tokio::select! {
            () = tasks.beat(&stop) => {}
            () = tokio::time::sleep(Duration::from_millis(50)) => {}
        }
        assert!(tasks.silence() <= Duration::from_millis(1000) && tasks.beat.load(Ordering::Relaxed) >= 20);
        runs.abort();
    }
}
