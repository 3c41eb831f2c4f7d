//! How a manager's task performs what its core wants.

use std::sync::Arc;
use std::time::{Duration, Instant};

use event::RowBatch;
use heartbeatpb::{DispatcherId, HeartBeatRequest, RunningError, Ts, WallTime};
use logservice::event_store::Position;
use logservice::{CheckpointSlot, Subscription};
use messaging::{MaintainerManagerTopic, ToMaintainerManager};
use sink::Flushed;

use super::task::{Done, Published, Task, now};
use crate::Fault;
use crate::arrival::Credit;
use crate::core::{Action, BootstrapStep};
use crate::progress::Ticket;
use crate::table::Slot;

/// How often a removed changefeed's traces are tried to be removed from the downstream.
const FORGET_ATTEMPTS: u32 = 3;
/// Pause between those attempts.
const FORGET_PAUSE: Duration = Duration::from_secs(2);

impl Task {
    /// Performs one action. Sends never wait; calls of the sink run beside.
    pub(super) fn perform(&mut self, action: Action, at: Instant) {
        if self.write_path.is_closed() && touches_downstream(&action) {
            return;
        }
        match action {
            Action::Write { slot, id, batch, ticket, credit } => self.write(slot, id, batch, ticket, credit),
            Action::OpenDispatcher { id, span, start_ts } => {
                let (sink, opens) = (Arc::clone(&self.sink), Arc::clone(&self.opens));
                let metrics = self.metrics.clone();
                self.calls.spawn(async move {
                    let _permit = opens.acquire().await;
                    let begun = now();
                    let opened = sink.open_dispatcher(id, &span, start_ts).await;
                    metrics.created(now().saturating_duration_since(begun));
                    let result = opened.map_err(|error| Fault::sink(&error));
                    Done::DispatcherOpened { id, asked: start_ts, result }
                });
            }
            Action::OpenTable { slot, id, table } => {
                let (sink, opens) = (Arc::clone(&self.sink), Arc::clone(&self.opens));
                self.calls.spawn(async move {
                    let _permit = opens.acquire().await;
                    let result = sink.open_table(id, &table).await.map_err(|error| Fault::sink(&error));
                    Done::TableOpened { slot, result }
                });
            }
            // At most one call per dispatcher is in flight, so a slow one delays nobody else.
            Action::Flush { slot, id } => {
                let sink = Arc::clone(&self.sink);
                self.calls.spawn(async move {
                    let flush = async {
                        if heartbeatpb::Rule::FlushBeforeBlock.holds() {
                            sink.flush_before_block(id).await
                        } else {
                            Ok(())
                        }
                    };
                    let result = flush.await.map_err(|error| Fault::sink(&error));
                    Done::FlushFinished { slot, result }
                });
            }
            Action::WriteBlock { slot, event } => {
                let sink = Arc::clone(&self.sink);
                let metrics = self.metrics.clone();
                self.calls.spawn(async move {
                    let begun = now();
                    metrics.ddl_started();
                    let result = sink.write_block_event(&event).await.map_err(|error| Fault::sink(&error));
                    metrics.ddl_ended(&event, now().saturating_duration_since(begun), result.is_ok());
                    Done::BlockWritten { slot, result }
                });
            }
            Action::CloseDispatcher { id } => self.sink.close_dispatcher(id),
            Action::Subscribe { slot, id, span, start_ts, event_service } => {
                let checkpoint = self.checkpoint_slot(slot, start_ts);
                self.context.source.subscribe(Subscription {
                    changefeed: self.id.clone(),
                    dispatcher: id,
                    span,
                    start_ts,
                    event_service,
                    checkpoint,
                });
            }
            Action::Unsubscribe { slot, id } => {
                if let Some(published) = self.checkpoints.get_mut(slot.index()) {
                    *published = None;
                }
                self.context.source.unsubscribe(&self.id, id);
            }
            Action::Copied { id, end } => {
                let position = Position { commit_ts: end.commit_ts, rows: end.rows };
                self.context.source.copied(&self.id, id, position);
            }
            Action::PublishCheckpoint { checkpoint, time } => {
                self.sink.publish_checkpoint(checkpoint, time);
            }
            Action::HeartBeat(request) => self.send_heartbeat(request, at),
            Action::BlockStatus(request) => {
                let message = ToMaintainerManager::BlockStatus(request.clone());
                match self.send(message) {
                    Ok(()) => self.core.on_block_statuses_sent(&request),
                    Err(()) => self.core.on_block_statuses_unsent(request, at),
                }
            }
            Action::ReportError(fault) => self.report(&fault),
            Action::Bootstrapped(step) => self.on_bootstrapped(step),
            Action::Stop => self.stop(),
            Action::Forget => self.forget(),
        }
    }

    fn write(&mut self, slot: Slot, id: DispatcherId, batch: RowBatch, ticket: Ticket, credit: Credit) {
        let flushed = self.flushed.clone();
        self.sink.write_rows(
            id,
            batch,
            Flushed::new(move || {
                drop(credit);
                // A task that has ended counts nothing any more.
                let _ = flushed.send((slot, ticket));
            }),
        );
    }

    fn checkpoint_slot(&mut self, slot: Slot, start_ts: Ts) -> Arc<CheckpointSlot> {
        let checkpoint = Arc::new(CheckpointSlot::new(start_ts));
        if self.checkpoints.len() <= slot.index() {
            self.checkpoints.resize_with(slot.index() + 1, || None);
        }
        let published = Published { slot: Arc::clone(&checkpoint), last: start_ts };
        self.checkpoints[slot.index()] = Some(published);
        checkpoint
    }

    fn send_heartbeat(&mut self, request: HeartBeatRequest, at: Instant) {
        if self.send(ToMaintainerManager::HeartBeat(request.clone())).is_err() {
            self.core.on_heartbeat_unsent(request, at);
        }
    }

    /// To the owner, as it is known now.
    fn send(&self, message: ToMaintainerManager) -> Result<(), ()> {
        let owner = &self.core.owner().node;
        self.context.center.send::<MaintainerManagerTopic>(owner, message).map_err(|error| {
            tracing::debug!(changefeed = %self.id, to = %owner, %error, "a message to the owner did not leave");
        })
    }

    fn report(&mut self, fault: &Fault) {
        let error = match &self.reported {
            Some(error) => error.clone(),
            None => self.running(fault),
        };
        self.reported = Some(error.clone());
        let request = HeartBeatRequest {
            changefeed: self.id.clone(),
            watermark: None,
            redo_watermark: None,
            statuses: Vec::new(),
            complete: false,
            error: Some(error),
            trouble: None,
        };
        // It is repeated anyway.
        let _ = self.send(ToMaintainerManager::HeartBeat(request));
    }

    pub(super) fn running(&self, fault: &Fault) -> RunningError {
        fault.running(self.context.center.node(), WallTime::now())
    }

    fn on_bootstrapped(&mut self, step: BootstrapStep) {
        if let Some(pending) = self.bootstrap.take() {
            self.answer_bootstrap(pending, step);
        }
    }

    fn forget(&mut self) {
        let sink = Arc::clone(&self.sink);
        let id = self.id.clone();
        self.calls.spawn(async move {
            for attempt in 1..=FORGET_ATTEMPTS {
                match sink.forget_changefeed().await {
                    Ok(()) => return Done::Forgotten { done: true },
                    Err(error) => {
                        tracing::warn!(changefeed = %id, attempt, code = error.code(), %error,
                            "the traces of a removed changefeed are still downstream");
                    }
                }
                tokio::time::sleep(FORGET_PAUSE).await;
            }
            Done::Forgotten { done: false }
        });
    }
}

/// What must not begin once the write path is closed.
fn touches_downstream(action: &Action) -> bool {
    match action {
        Action::OpenDispatcher { .. }
        | Action::OpenTable { .. }
        | Action::Write { .. }
        | Action::Flush { .. }
        | Action::WriteBlock { .. }
        | Action::PublishCheckpoint { .. } => true,
        Action::CloseDispatcher { .. }
        | Action::Subscribe { .. }
        | Action::Unsubscribe { .. }
        | Action::Copied { .. }
        | Action::HeartBeat(_)
        | Action::BlockStatus(_)
        | Action::ReportError(_)
        | Action::Bootstrapped(_)
        | Action::Stop
        | Action::Forget => false,
    }
}
