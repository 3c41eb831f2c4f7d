//! What ought to be heard and is not: nodes that obey another coordinator, and maintainers that nobody runs.

use std::time::{Duration, Instant};

use heartbeatpb::{ChangefeedId, MaintainerEpoch, NodeId};

use super::{Core, Feed};
use crate::changefeed::Group;

/// A node that was not heard for two of its heartbeats is asked again: it may have missed who the coordinator is,
/// and the answer to an earlier question of this node may have been taken for one to this coordinator's.
const ASK_AGAIN: Duration = Duration::from_secs(10);
/// A maintainer is reported every second. One that its node does not speak of for so long is not there.
const MISSING: Duration = Duration::from_secs(30);

/// When a node was heard.
#[derive(Clone, Copy, Debug)]
pub(super) struct Voice {
    /// It has spoken without a long pause since then.
    since: Instant,
    last: Instant,
    asked: Instant,
}

impl Core {
    /// A node said something.
    pub(super) fn on_voice(&mut self, from: &NodeId, now: Instant) {
        if self.members.contains(from) {
            let voice =
                self.voices.entry(from.clone()).or_insert(Voice { since: now, last: now, asked: now });
            if now.saturating_duration_since(voice.last) >= ASK_AGAIN {
                voice.since = now;
            }
            voice.last = now;
        }
    }

    /// Asks nodes that are silent, and takes maintainers that are not there for lost.
    pub(super) fn look_for_silence(&mut self, now: Instant) {
        let mut silent = Vec::new();
        for node in self.members.iter().filter(|node| self.bootstrapper.has_answered(node)) {
            let voice =
                self.voices.entry(node.clone()).or_insert(Voice { since: now, last: now, asked: now });
            if now.saturating_duration_since(voice.last.max(voice.asked)) >= ASK_AGAIN {
                voice.asked = now;
                silent.push(node.clone());
            }
        }
        for node in silent {
            self.ask(node);
        }
        let missing: Vec<(ChangefeedId, NodeId, Option<MaintainerEpoch>)> = self
            .feeds
            .iter()
            .filter_map(|(id, feed)| Some((id.clone(), self.missing(feed, now)?, feed.changefeed.info.epoch)))
            .collect();
        for (id, node, epoch) in missing {
            tracing::warn!(changefeed = %id, %node, "the node does not speak of the maintainer; it is started anew");
            if let Some(feed) = self.feeds.get_mut(&id) {
                feed.changefeed.mark_absent();
            }
            // Whatever is there after all has stopped when the node says so.
            self.stop(&id, Some(node), false, epoch, now);
        }
    }

    /// The node that should run the changefeed's maintainer and does not seem to.
    fn missing(&self, feed: &Feed, now: Instant) -> Option<NodeId> {
        let node = feed.changefeed.node()?;
        let voice = self.voices.get(node)?;
        let speaks = now.saturating_duration_since(voice.last) < ASK_AGAIN;
        let heard = feed.heard_at.map_or(voice.since, |at| at.max(voice.since));
        let missing = feed.is_idle()
            && feed.changefeed.group() == Group::Replicating
            && speaks
            && now.saturating_duration_since(heard) >= MISSING;
        missing.then(|| node.clone())
    }
}
