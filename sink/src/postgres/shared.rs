//! What the tasks of one sink share. No lock is held across an await.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use event::TableInfo;
use heartbeatpb::{ChangefeedId, DispatcherId, TableId, TableSpan, WritePermit};
use parking_lot::Mutex;
use rustc_hash::{FxHashMap, FxHashSet};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::absence::Absence;
use super::config::PgConfig;
use super::failure::Failure;
use super::pieces::SpanProgress;
use super::progress;
use super::registration::Registration;
use super::target::Target;
use super::worker::QueuedChange;
use crate::Error;
use crate::causality::Causality;
use crate::metrics::{SinkMetrics, TxnMetrics};

/// A dispatcher that has batches in the sink or is open.
#[derive(Debug)]
pub(crate) struct DispatcherState {
    /// Batches accepted and not yet durable.
    pub(crate) outstanding: u64,
    /// Its keys.
    pub(crate) span: Arc<TableSpan>,
    open: bool,
}

/// State of one sink.
pub(crate) struct Shared {
    pub(crate) config: PgConfig,
    pub(crate) changefeed: ChangefeedId,
    /// The changefeed's identity as it is written downstream.
    pub(crate) gid: String,
    /// The right to write, as the target knows it.
    pub(crate) registration: Registration,
    /// The same, as this process knows it.
    pub(crate) permit: WritePermit,
    /// The statement that moves the progress of queues while the target knows the right.
    pub(crate) advance: String,
    pub(crate) queues: Mutex<Causality<QueuedChange>>,
    /// Workers that have taken something; changes only while the queues are locked.
    pub(crate) busy: AtomicUsize,
    /// Changes were pushed or completed.
    pub(crate) work: Notify,
    pub(crate) dispatchers: Mutex<FxHashMap<DispatcherId, DispatcherState>>,
    /// A dispatcher has no batch left.
    pub(crate) settled: Notify,
    /// Committed progress of the spans of dispatchers, as far as it is known.
    pub(crate) progress: Mutex<FxHashMap<(DispatcherId, TableId), SpanProgress>>,
    /// The last described shape of each table.
    pub(crate) targets: Mutex<FxHashMap<TableId, Arc<Target>>>,
    /// Tables that were found to lack rows which are to be updated: whole rows are written to them without looking.
    pub(crate) lacking: Mutex<FxHashSet<TableId>>,
    /// Whether the target answers.
    pub(crate) absence: Absence,
    failed: AtomicBool,
    failure: Mutex<Option<Error>>,
    /// The sink closes, by order or by failure.
    pub(crate) closing: CancellationToken,
    pub(crate) metrics: SinkMetrics,
    pub(crate) txn_metrics: TxnMetrics,
}

impl Shared {
    pub(crate) fn new(
        config: PgConfig,
        changefeed: ChangefeedId,
        registration: Registration,
        permit: WritePermit,
    ) -> Self {
        Self {
            gid: changefeed.gid.to_string(),
            advance: progress::advance_sql(&config.own_schema, registration.condition()),
            metrics: SinkMetrics::new(&changefeed, "TxnSink"),
            txn_metrics: TxnMetrics::new(&changefeed),
            config,
            changefeed,
            registration,
            permit,
            queues: Mutex::default(),
            busy: AtomicUsize::new(0),
            work: Notify::new(),
            dispatchers: Mutex::default(),
            settled: Notify::new(),
            progress: Mutex::default(),
            targets: Mutex::default(),
            lacking: Mutex::default(),
            absence: Absence::default(),
            failed: AtomicBool::new(false),
            failure: Mutex::new(None),
            closing: CancellationToken::new(),
        }
    }

    /// Waits until this process may write.
    pub(crate) async fn permitted(&self) -> Result<(), Error> {
        if self.permit.holds() {
            return Ok(());
        }
        tokio::select! {
            biased;
            () = self.closing.cancelled() => Err(Error::Closed),
            () = self.permit.granted() => Ok(()),
        }
    }

    /// Fails when this process may not write now.
    pub(crate) fn check_permit(&self) -> Result<(), Failure> {
        if self.permit.holds() { Ok(()) } else { Err(Failure::Suspended) }
    }

    /// The target did not answer, or has no room for us now.
    pub(crate) fn lost(&self, error: &Error) {
        if self.absence.failed(error) {
            tracing::warn!(changefeed = %self.changefeed, %error, "the downstream database does not answer, trying again");
        } else {
            tracing::debug!(changefeed = %self.changefeed, %error, "the downstream database still does not answer");
        }
    }

    /// The first fatal error closes the sink.
    pub(crate) fn fail(&self, error: Error) {
        if matches!(error, Error::Closed) {
            return;
        }
        self.failure.lock().get_or_insert(error);
        self.failed.store(true, Ordering::Release);
        self.closing.cancel();
    }

    pub(crate) fn healthy(&self) -> bool {
        !self.failed.load(Ordering::Acquire)
    }

    pub(crate) fn take_failure(&self) -> Option<Error> {
        self.failure.lock().take()
    }

    /// Progress of a dispatcher's span as the downstream has it; what is known already is not lowered.
    pub(crate) fn learn(&self, dispatcher: DispatcherId, table: TableId, mut read: SpanProgress) {
        let mut progress = self.progress.lock();
        if let Some(known) = progress.get(&(dispatcher, table)) {
            read.raise(known);
        }
        progress.insert((dispatcher, table), read);
    }

    /// The described target of a table, if it is for this shape.
    pub(crate) fn known_target(&self, info: &Arc<TableInfo>) -> Option<Arc<Target>> {
        let targets = self.targets.lock();
        let target = targets.get(&info.id)?;
        (Arc::ptr_eq(&target.info, info) || *target.info == **info).then(|| Arc::clone(target))
    }

    /// A dispatcher is about to write this span.
    pub(crate) fn open(&self, dispatcher: DispatcherId, span: &TableSpan) {
        let span = Arc::new(span.clone());
        let mut dispatchers = self.dispatchers.lock();
        let outstanding = dispatchers.get(&dispatcher).map_or(0, |state| state.outstanding);
        dispatchers.insert(dispatcher, DispatcherState { outstanding, span, open: true });
    }

    /// The span of a dispatcher that is open.
    pub(crate) fn span(&self, dispatcher: DispatcherId) -> Option<Arc<TableSpan>> {
        self.dispatchers.lock().get(&dispatcher).map(|state| Arc::clone(&state.span))
    }

    /// A batch of a dispatcher was accepted; answers its span.
    pub(crate) fn accept(&self, dispatcher: DispatcherId, table: TableId) -> Arc<TableSpan> {
        let whole = || Arc::new(TableSpan::whole(table));
        let mut dispatchers = self.dispatchers.lock();
        let state = dispatchers.entry(dispatcher).or_insert_with(|| DispatcherState {
            outstanding: 0,
            span: whole(),
            open: false,
        });
        state.outstanding += 1;
        if state.span.table == table { Arc::clone(&state.span) } else { whole() }
    }

    /// A batch of a dispatcher is durable.
    pub(crate) fn settle(&self, dispatcher: DispatcherId) {
        let mut dispatchers = self.dispatchers.lock();
        let Some(state) = dispatchers.get_mut(&dispatcher) else { return };
        state.outstanding = state.outstanding.saturating_sub(1);
        if state.outstanding > 0 {
            return;
        }
        if !state.open {
            let table = state.span.table;
            dispatchers.remove(&dispatcher);
            self.progress.lock().remove(&(dispatcher, table));
        }
        drop(dispatchers);
        self.settled.notify_waiters();
    }

    /// A dispatcher has ended; its batches in flight may still be flushed.
    pub(crate) fn close(&self, dispatcher: DispatcherId) {
        let mut dispatchers = self.dispatchers.lock();
        let Some(state) = dispatchers.get_mut(&dispatcher) else { return };
        state.open = false;
        if state.outstanding == 0 {
            let table = state.span.table;
            dispatchers.remove(&dispatcher);
            self.progress.lock().remove(&(dispatcher, table));
        }
    }

    /// Waits until a dispatcher has no batch left.
    pub(crate) async fn drained(&self, dispatcher: DispatcherId) -> Result<(), Error> {
        loop {
            let settled = self.settled.notified();
            tokio::pin!(settled);
            settled.as_mut().enable();
            if self.closing.is_cancelled() {
                return Err(Error::Closed);
            }
            if self.dispatchers.lock().get(&dispatcher).is_none_or(|state| state.outstanding == 0) {
                return Ok(());
            }
            tokio::select! {
                biased;
                () = self.closing.cancelled() => return Err(Error::Closed),
                () = settled => {}
            }
        }
    }
}
