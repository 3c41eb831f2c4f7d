//! A dispatcher as a part of a merge: where a source can stop, how it goes on, how the result begins (dispatcher §10).

use std::time::Instant;

use heartbeatpb::{BarrierKey, ComponentState, SchemaId, Ts};

use super::{Dispatcher, Intake, Phase, block};
use crate::arrival::Arrival;

/// A place at which a source can stop without leaving anything half done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Rest {
    /// Between events.
    Between,
    /// In front of a barrier: every row before it is durable, and the owner has not said what is to be done.
    Before(BarrierKey),
}

impl Dispatcher {
    /// Where it could stop now. `None` while a block event is flushed for, executed, or not known to the owner; while
    /// the checkpoint does not contain the last one, or whoever goes on there would execute it again; and during an
    /// initial copy, which would begin again.
    pub(crate) fn rest(&self) -> Option<Rest> {
        let copies = self.copy.is_some_and(|copy| self.checkpoint() < copy.at);
        let contained = self.last_done.is_none_or(|done| done.commit_ts <= self.resolved);
        if copies || !contained {
            return None;
        }
        match &self.phase {
            Phase::Ready if self.reports.is_empty() => Some(Rest::Between),
            Phase::Waiting(event) => {
                let barrier = block::key(event);
                self.reports.keys().all(|key| *key == barrier).then_some(Rest::Before(barrier))
            }
            Phase::Ready
            | Phase::OpeningTable(_)
            | Phase::Held(_)
            | Phase::FlushingAlone(_)
            | Phase::WritingAlone(_)
            | Phase::Flushing(_)
            | Phase::Writing(_)
            | Phase::Failed => None,
        }
    }

    /// It takes nothing more. What waits is read again by whoever goes on.
    pub(crate) fn stop_taking(&mut self) {
        self.intake = Intake::Stopped;
        self.inbox.clear();
    }

    /// Whether a merge has stopped it.
    pub(crate) fn is_stopped(&self) -> bool {
        self.intake == Intake::Stopped
    }

    /// Whether everything that it handed over is durable.
    pub(crate) fn is_drained(&self) -> bool {
        self.progress.is_empty()
    }

    /// Its merge was given up. Says whether its stream has to begin again at the checkpoint.
    pub(crate) fn go_on(&mut self) -> bool {
        self.state = ComponentState::Working;
        let stopped = self.is_stopped();
        if stopped {
            self.intake = Intake::UntilBegin;
        }
        stopped
    }

    /// It is the result of a merge that is being prepared: it counts nowhere yet.
    pub(crate) fn prepare(&mut self) {
        self.state = ComponentState::Preparing;
        self.intake = Intake::Stopped;
    }

    /// Whether it counts in the watermark: the result of a merge does not before its sources have let go.
    pub(crate) fn counts(&self) -> bool {
        !matches!(self.state, ComponentState::Preparing | ComponentState::MergeReady)
    }

    /// The result of a merge takes over, after `start_ts`.
    pub(crate) fn take_over(&mut self, start_ts: Ts, skip_dml: bool, schema: SchemaId, now: Instant) {
        self.state = ComponentState::Initializing;
        self.intake = Intake::Open;
        self.start_ts = start_ts;
        self.resolved = start_ts;
        self.skip_dml_at_start = skip_dml;
        self.schema = schema;
        self.measured_at = now;
        self.measured = (0, now);
    }

    /// Whether an arrival is taken in.
    pub(super) fn admits(&mut self, arrival: &Arrival) -> bool {
        match self.intake {
            Intake::Open => true,
            Intake::Stopped => false,
            Intake::UntilBegin => match arrival {
                Arrival::Begin(_) => {
                    self.intake = Intake::Open;
                    true
                }
                Arrival::Failed(_) => true,
                Arrival::Rows(..) | Arrival::Resolved { .. } | Arrival::Block(_) => false,
            },
        }
    }
}
