//! What the owner says about a barrier: acknowledged, not usable yet, write or pass (dispatcher §16).

use heartbeatpb::{BarrierKey, BlockAction, DispatcherStatus};

use super::{Dispatcher, Effect, Phase, block};

/// What the pending barrier is, seen from an action.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Pending {
    None,
    Waiting(BarrierKey),
    Writing(BarrierKey),
}

impl Dispatcher {
    /// One instruction of the owner; it may say several things.
    pub(crate) fn on_status(&mut self, status: &DispatcherStatus, out: &mut Vec<Effect>) {
        if self.removing {
            return;
        }
        if let Some(key) = status.ack {
            self.on_ack(key, out);
        }
        if self.is_stopped() {
            // A merge is about to take the barrier over. The owner repeats what it wants until it sees the effect.
            return;
        }
        if let Some(key) = status.ignored
            && self.pending() == Pending::Waiting(key)
        {
            if let Some(state) = self.block_state() {
                out.push(Effect::Repeat(state));
            }
            return;
        }
        if let Some((action, key)) = status.action {
            self.on_action(action, key, out);
        }
    }

    fn pending(&self) -> Pending {
        match &self.phase {
            Phase::Waiting(event) => Pending::Waiting(block::key(event)),
            Phase::Writing(event) => Pending::Writing(block::key(event)),
            Phase::Ready
            | Phase::OpeningTable(_)
            | Phase::Held(_)
            | Phase::FlushingAlone(_)
            | Phase::WritingAlone(_)
            | Phase::Flushing(_)
            | Phase::Failed => Pending::None,
        }
    }

    /// An acknowledgement of a report that was not made yet changes nothing: it must not lift a blocker.
    fn on_ack(&mut self, key: BarrierKey, out: &mut Vec<Effect>) {
        let Some(report) = self.reports.remove(&key) else { return };
        self.blockers.remove(&key.commit_ts);
        if report.counted {
            self.pending_acks = self.pending_acks.saturating_sub(1);
            self.release_held(out);
        }
    }

    fn on_action(&mut self, action: BlockAction, key: BarrierKey, out: &mut Vec<Effect>) {
        match self.pending() {
            Pending::Waiting(pending) if pending == key => {
                let Phase::Waiting(event) = std::mem::replace(&mut self.phase, Phase::Ready) else { return };
                match action {
                    BlockAction::Write => self.execute(event, out),
                    BlockAction::Pass => self.finish_barrier(&event, out),
                }
            }
            // Being executed: done only when it is done.
            Pending::Writing(pending) if pending == key => {}
            Pending::Waiting(pending) | Pending::Writing(pending) if pending < key => {}
            Pending::Waiting(_) | Pending::Writing(_) => out.push(Effect::Done(key)),
            Pending::None => {
                // A failed dispatcher has not done what it failed at, nor anything after it. The resolved event of a
                // DDL comes behind it, that of a sync point may come before.
                let passed = match key.is_sync_point {
                    true => key.commit_ts < self.resolved,
                    false => key.commit_ts <= self.resolved,
                };
                if passed || self.last_done.is_some_and(|done| key <= done) {
                    out.push(Effect::Done(key));
                }
            }
        }
    }
}
