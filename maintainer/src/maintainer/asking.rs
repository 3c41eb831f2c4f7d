//! What a maintainer asks the upstream and the downstream, beside its own task and for a limited time.

use std::sync::Arc;
use std::time::Duration;

use heartbeatpb::{MaintainerEpoch, RunningError, TableSpan, codes};

use super::{Fence, Maintainer, now};
use crate::core::Effect;
use crate::fence::Whom;

/// The upstream has this time to say where a span can be divided.
const POINTS_DEADLINE: Duration = Duration::from_secs(10);
/// The downstream has this time to refuse nodes that are gone.
const FENCE_DEADLINE: Duration = Duration::from_secs(20);

impl Maintainer {
    /// Asks the upstream where a span can be divided. Not for ever: without an answer it stays as it is.
    pub(super) fn ask_points(&mut self, question: u64, span: TableSpan, pieces: usize) {
        let upstream = Arc::clone(&self.upstream);
        let (id, epoch) = (self.id.clone(), self.epoch);
        self.question = (question, now());
        if let Some(before) = self.points.replace(tokio::spawn(async move {
            let asked = upstream.split_points(&id, epoch, &span, pieces);
            match tokio::time::timeout(POINTS_DEADLINE, asked).await {
                Ok(answer) => answer.map_err(|error| error.message),
                Err(_) => Err("it took too long".to_owned()),
            }
        })) {
            before.abort();
        }
    }

    /// Asks the downstream to refuse nodes that are gone. Not for ever: it is asked again.
    pub(super) fn begin_fence(&mut self, attempt: u64, newest: Option<MaintainerEpoch>, whom: Whom) {
        let fence = Arc::clone(&self.fence);
        let (info, epoch) = (self.info.clone(), self.epoch);
        let late = self.fence_error("the downstream did not answer in time when nodes were to be fenced");
        self.attempt = attempt;
        if let Some(before) = self.fencing.replace(tokio::spawn(async move {
            let asked = tokio::time::timeout(FENCE_DEADLINE, fence.fence(&info, epoch, newest, &whom)).await;
            asked.unwrap_or(Err(late))
        })) {
            before.abort();
        }
    }

    fn fence_error(&self, message: &str) -> RunningError {
        RunningError {
            time: String::new(),
            node: self.center.node().to_string(),
            code: codes::SINK_UNAVAILABLE.to_owned(),
            message: message.to_owned(),
        }
    }

    /// A fence has ended.
    pub(super) fn on_fence(&mut self, fence: Option<Fence>, out: &mut Vec<Effect>) {
        self.fencing = None;
        let result = fence.unwrap_or_else(|| Err(self.fence_error("fencing ended abnormally")));
        match &result {
            Ok(outcome) => {
                for (node, why) in &outcome.busy {
                    tracing::warn!(changefeedID = %self.id, %node, errorCode = codes::SINK_FENCE_BLOCKED, why,
                        "a node that is gone may still write; its spans wait");
                }
            }
            Err(error) => {
                tracing::warn!(changefeedID = %self.id, errorCode = error.code, error = error.message,
                    "cannot fence nodes that are gone; their spans wait");
            }
        }
        self.core.on_fenced(self.attempt, result, now(), out);
    }
}
