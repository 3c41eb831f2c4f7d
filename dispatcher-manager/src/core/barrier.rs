//! Barrier replies to dispatchers, and persisted checkpoints to the sink (dispatcher §11, §17.5).

use std::time::Instant;

use heartbeatpb::{
    CheckpointTsMessage, ComponentState, DispatcherStatus, HeartBeatResponse, InfluencedDispatchers, Mode,
    NodeId, WallTime,
};

use super::{Action, Core, Life};
use crate::table::Slot;

impl Core {
    /// The owner answers block statuses.
    pub(crate) fn on_heartbeat_response(
        &mut self,
        from: &NodeId,
        response: &HeartBeatResponse,
        now: Instant,
    ) {
        if response.mode != Mode::Default || !self.is_allowed("barrier reply", from, response.epoch) {
            return;
        }
        for status in &response.statuses {
            for slot in self.recipients(status) {
                self.with(slot, now, |dispatcher, effects| dispatcher.on_status(status, effects));
            }
        }
    }

    /// Dispatchers that hear a status: those between their first event and their end.
    fn recipients(&self, status: &DispatcherStatus) -> Vec<Slot> {
        let (mut slots, except) = match &status.influenced {
            None => return Vec::new(),
            Some(InfluencedDispatchers::Normal(ids)) => {
                (ids.iter().filter_map(|id| self.dispatchers.slot(*id)).collect(), None)
            }
            Some(InfluencedDispatchers::Schema { schema, except }) => {
                let mut slots = self.dispatchers.of_schema(*schema);
                let trigger = self.trigger.and_then(|trigger| self.dispatchers.slot(trigger.id));
                slots.extend(trigger.filter(|trigger| !slots.contains(trigger)));
                (slots, *except)
            }
            Some(InfluencedDispatchers::All { except }) => (self.dispatchers.slots(), *except),
        };
        slots.retain(|slot| {
            self.dispatchers.get(*slot).is_some_and(|dispatcher| {
                matches!(dispatcher.state, ComponentState::Working | ComponentState::WaitingMerge)
                    && !dispatcher.removing
                    && Some(dispatcher.id) != except
            })
        });
        slots
    }

    /// A checkpoint was persisted. The message carries no epoch: only the owner's node is believed, and the sink
    /// never hears of a smaller one.
    pub(crate) fn on_checkpoint(&mut self, from: &NodeId, message: &CheckpointTsMessage) {
        let registered = self.trigger.is_some_and(|trigger| trigger.registered);
        let known = self.life == Life::Open && *from == self.owner.node;
        if !known || !registered || !self.options.wants_checkpoints || message.checkpoint <= self.published {
            return;
        }
        self.published = message.checkpoint;
        let time = self.times.time_of(message.checkpoint).unwrap_or(WallTime(0));
        self.actions.push(Action::PublishCheckpoint { checkpoint: message.checkpoint, time });
    }
}
