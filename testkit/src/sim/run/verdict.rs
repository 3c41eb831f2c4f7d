//! What must hold: of what is stored, all the time; of both databases, at the end.

use coordinator::backend::Store;
use futures_util::FutureExt;
use heartbeatpb::config::ChangefeedStatusDoc;

use super::Simulation;
use crate::sim::coverage;
use crate::sim::world::seconds;

impl Simulation<'_> {
    /// What is stored never goes back and never passes what is not written.
    pub(super) fn check_checkpoints(&self) {
        for id in &self.feeds {
            let key = self.layout.status(&id.keyspace, &id.name);
            let Some(Ok(found)) = self.store.get(&key).now_or_never() else { continue };
            let Some(stored) = found.found else { continue };
            let Ok(status) = serde_json::from_slice::<ChangefeedStatusDoc>(&stored.value) else { continue };
            let checkpoint = status.checkpoint_ts.0;
            let mut world = self.world.lock();
            let Some(feed) = world.feeds.get_mut(&id.gid) else { continue };
            let (before, first) = (feed.persisted, feed.first_outstanding());
            feed.persisted = checkpoint.max(before);
            if checkpoint < before {
                world.violated("CHECKPOINT-BACK", &format!("{}: {checkpoint} after {before}", id.name));
            }
            if first.is_some_and(|(first, ..)| first <= checkpoint) {
                let text = format!("{}: {checkpoint} is stored, and {first:?} is not downstream", id.name);
                world.violated("CHECKPOINT", &text);
            }
        }
    }

    pub(super) fn is_done(&self) -> bool {
        let world = self.world.lock();
        self.people.is_idle()
            && world.feeds.values().all(|feed| feed.persisted >= feed.head)
            && world.feeds.values().all(|feed| coverage::gap(&world, feed).is_none())
    }

    /// After the end: nothing stalled, nothing differs, everything is covered once.
    pub(super) fn judge(&mut self, converged: Option<u64>) {
        if self.world.lock().violation.is_some() {
            return;
        }
        let Some(took) = converged else {
            let text = self.stalled();
            self.world.lock().violated("STALL", &text);
            return;
        };
        let mut world = self.world.lock();
        world.note(format!("everything is right {:.1} s after the faults", seconds(took)));
        let feeds = std::mem::take(&mut world.feeds);
        for feed in feeds.values() {
            if let Some(difference) = feed.difference() {
                world.violated("EQUAL", &difference);
            }
        }
        world.feeds = feeds;
    }

    /// Who holds what up, for people.
    fn stalled(&self) -> String {
        let world = self.world.lock();
        let mut text = format!("people wait for {}; ", self.people.waiting());
        for feed in world.feeds.values() {
            let gap = coverage::gap(&world, feed);
            text += &format!(
                "{}: stored {}, committed {}, not downstream {:?}, reader {:?}, coverage {gap:?}; ",
                feed.id.name,
                feed.persisted,
                feed.head,
                feed.first_outstanding(),
                feed.reader
            );
        }
        text + &self.people.last_view()
    }
}
