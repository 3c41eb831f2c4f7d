//! Carries what [`OperationLog`] decides to the metadata store, and tells people of what was done.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use coordinator::CoordinatorHandle;
use coordinator::operations::{Asked, Begin, End, LAST, OperationDoc, OperationLog};
use metrics::{Gauge, gauge};
use parking_lot::Mutex;
use serde_json::Value;
use tokio::sync::{MappedMutexGuard, MutexGuard};

use super::short;
use crate::http::{ApiFailure, Shared};

/// Between two attempts to store an answer while the metadata store is away.
const AGAIN: Duration = Duration::from_secs(1);

/// The operations that this node carries out when it leads.
#[derive(Default)]
pub(crate) struct Operations {
    /// What its newest coordinator knows; read from the store when it is needed first.
    log: tokio::sync::Mutex<Option<OperationLog>>,
    /// Wishes of nobody in particular: not stored, or everybody could fill the store.
    refused: Mutex<VecDeque<OperationDoc>>,
    /// Series of the last that ended here, the oldest first.
    shown: Mutex<VecDeque<Gauge>>,
}

impl Operations {
    /// What a coordinator of this process knows.
    ///
    /// # Errors
    /// When the store fails, or a newer coordinator was seen.
    async fn log(
        &self,
        leader: &CoordinatorHandle,
    ) -> Result<MappedMutexGuard<'_, OperationLog>, ApiFailure> {
        let version = leader.version();
        let mut log = self.log.lock().await;
        match log.as_ref().map(OperationLog::version) {
            Some(known) if known == version => {}
            Some(known) if known > version => return Err(coordinator::Error::NotOwner.into()),
            Some(_) | None => {
                let (found, unreadable) = leader.operations().await?;
                *log = Some(OperationLog::new(version, found, unreadable));
            }
        }
        Ok(MutexGuard::map(log, |log| {
            log.get_or_insert_with(|| OperationLog::new(version, Vec::new(), Vec::new()))
        }))
    }

    /// Decides about a wish. What is to be carried out is stored when this returns.
    ///
    /// # Errors
    /// When it cannot be stored, the key stands for another request, or too many are under way.
    pub(in crate::http) async fn begin(
        &self,
        leader: &CoordinatorHandle,
        asked: Asked,
    ) -> Result<Begin, ApiFailure> {
        let begin = self.log(leader).await?.begin(asked);
        let (doc, drop) = match &begin {
            Begin::New { doc, drop } | Begin::Again { doc, drop, .. } => (doc, drop),
            Begin::Before(_) | Begin::Applied(_) | Begin::Gone(_) => return Ok(begin),
            Begin::OtherRequest => {
                return Err(ApiFailure::invalid(
                    "this Idempotency-Key was used for a request with another body; use a new key for a new request",
                ));
            }
            Begin::Full => {
                return Err(ApiFailure::new(
                    "CDC:ErrClusterIsUnhealthy",
                    "too many operations are under way; ask again in a moment",
                ));
            }
        };
        match leader.put_operation(doc, None, drop).await {
            Ok(_) => Ok(begin),
            Err(error) => {
                let mut log = self.log(leader).await?;
                log.abandon(doc);
                log.keep_dropping(drop.clone());
                Err(error.into())
            }
        }
    }

    /// Stores the answer of an operation, and tells of it. While the store is away this is tried again behind the answer.
    pub(in crate::http) async fn end(
        state: &Shared,
        leader: &CoordinatorHandle,
        doc: OperationDoc,
        mut end: End,
    ) {
        for text in [&mut end.changefeed, &mut end.details, &mut end.error] {
            *text = short(text);
        }
        let own = &state.access.operations;
        let ended = doc.ended(end.clone());
        own.tell(&ended);
        let passes = end.passes();
        if !passes {
            own.settle(leader, ended.clone()).await;
        }
        if own.store(leader, &doc, &ended, passes).await {
            return;
        }
        let (state, leader) = (Arc::clone(state), leader.clone());
        tokio::spawn(async move {
            while !state.access.operations.store(&leader, &doc, &ended, passes).await {
                tokio::time::sleep(AGAIN).await;
            }
        });
    }

    /// Whether nothing remains to be done about an answer: it is stored, or this coordinator was replaced.
    async fn store(
        &self,
        leader: &CoordinatorHandle,
        doc: &OperationDoc,
        ended: &OperationDoc,
        passes: bool,
    ) -> bool {
        // An answer that says "later" stands only where nothing was changed.
        let known = match leader.put_operation(ended, passes.then_some(doc), &[]).await {
            Ok(true) => ended.clone(),
            // It was carried out, whatever its asker was told: that is what a repetition hears.
            Ok(false) => OperationDoc { coordinator: 0, ..doc.applied() },
            Err(error) if error.is_retryable() && !matches!(error, coordinator::Error::NotOwner) => {
                tracing::warn!(%error, operationID = doc.id, "the end of an operation is not stored yet");
                return false;
            }
            Err(error) => {
                tracing::warn!(%error, operationID = doc.id, "the end of an operation was not stored");
                return true;
            }
        };
        self.settle(leader, known).await;
        true
    }

    async fn settle(&self, leader: &CoordinatorHandle, doc: OperationDoc) {
        if let Some(log) = self.log.lock().await.as_mut().filter(|log| log.version() == leader.version()) {
            log.settle(doc);
        }
    }

    /// Remembers a wish that was refused for want of a user.
    pub(in crate::http) fn refuse(&self, asked: Asked, error: &str) {
        let doc = OperationDoc {
            operation: asked.operation.to_owned(),
            keyspace: asked.keyspace,
            begun_ms: asked.now_ms,
            user: short(&asked.user),
            ..OperationDoc::default()
        };
        let end = End {
            status: 401,
            changefeed: short(&asked.changefeed),
            error: short(error),
            now_ms: asked.now_ms,
            ..End::default()
        };
        let doc = doc.ended(end);
        self.tell(&doc);
        let mut refused = self.refused.lock();
        if refused.len() == LAST {
            refused.pop_front();
        }
        refused.push_back(doc);
    }

    /// Log and metrics (metrics §5.2).
    fn tell(&self, doc: &OperationDoc) {
        let result = if doc.status < 400 { "success" } else { "failed" };
        tracing::info!(
            operation = doc.operation,
            result,
            keyspace = doc.keyspace,
            changefeedID = format!("{}/{}", doc.keyspace, doc.changefeed),
            details = doc.details,
            status = doc.status,
            username = doc.user,
            duration = ?Duration::from_millis(u64::try_from(doc.ended_ms - doc.begun_ms).unwrap_or(0)),
            error = doc.error,
            operationID = doc.id,
            "operation"
        );
        let mut shown = self.shown.lock();
        if shown.len() == LAST {
            shown.pop_front();
        }
        shown.push_back(gauge_of(doc, result));
    }

    /// The newest, the newest first, each as `show` has it.
    ///
    /// # Errors
    /// When the store fails.
    pub(super) async fn last(
        &self,
        leader: &CoordinatorHandle,
        show: impl Fn(&OperationLog, &OperationDoc) -> Value,
    ) -> Result<Vec<Value>, ApiFailure> {
        let log = self.log(leader).await?;
        let refused = self.refused.lock();
        let mut all: Vec<(i64, Value)> =
            refused.iter().rev().chain(log.last()).map(|doc| (doc.begun_ms, show(&log, doc))).collect();
        // Stable: of one moment the refused ones are first, as they have no place among the others.
        all.sort_by_key(|(begun, _)| std::cmp::Reverse(*begun));
        Ok(all.into_iter().take(LAST).map(|(_, value)| value).collect())
    }

    /// One of them, as `show` has it.
    ///
    /// # Errors
    /// When the store fails.
    pub(super) async fn find(
        &self,
        leader: &CoordinatorHandle,
        id: &str,
        show: impl Fn(&OperationLog, &OperationDoc) -> Value,
    ) -> Result<Option<Value>, ApiFailure> {
        let log = self.log(leader).await?;
        Ok(log.get(id).map(|doc| show(&log, doc)))
    }
}

/// Shows when an operation ended, as long as its handle is kept.
#[expect(clippy::cast_precision_loss, reason = "milliseconds fit a float until the year 287396")]
fn gauge_of(doc: &OperationDoc, result: &str) -> Gauge {
    let gauge = gauge!(crate::metrics::OPERATION_TIME, "namespace" => "default",
        "changefeed" => doc.changefeed.clone(), "operation" => doc.operation.clone(), "result" => result.to_owned(),
        "username" => doc.user.clone(), "details" => doc.details.clone(), "error" => doc.error.clone(),
        "event_id" => doc.event.to_string());
    gauge.set(doc.ended_ms as f64);
    gauge
}
