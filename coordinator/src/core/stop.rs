//! How a maintainer is stopped, and what has to be sure before that is said (CO-8).

use std::time::Instant;

use heartbeatpb::{ChangefeedId, MaintainerEpoch, NodeId};

use super::{Core, Write};
use crate::changefeed::Group;
use crate::changefeed::operator::{Operator, Slot};

impl Core {
    /// Stops the maintainer. A stop that is at work already keeps its node and its epoch, and may become a removal;
    /// if it is that of another maintainer, this one follows.
    pub(super) fn stop(
        &mut self,
        id: &ChangefeedId,
        node: Option<NodeId>,
        mut removed: bool,
        epoch: Option<MaintainerEpoch>,
        now: Instant,
    ) {
        let Some(feed) = self.feeds.get_mut(id) else { return };
        if let Some(Slot {
            operator: Operator::Stop { removed: was, epoch: of, .. },
            finishing,
            resend_at,
            ..
        }) = &mut feed.slot
        {
            let (other, upgrade) = (*of != epoch, removed && !*was);
            if !*finishing {
                if let Some(node) = node.filter(|_| other) {
                    feed.next_stop = Some((node, epoch));
                }
                if upgrade {
                    *was = true;
                    *resend_at = now;
                    self.resend(id, now);
                }
                return;
            }
            if !(upgrade || other && (node.is_some() || feed.changefeed.group() == Group::Stopped)) {
                return;
            }
            // What stopped was another maintainer, or it stopped as a pause and the nodes have yet to hear that the
            // changefeed is deleted.
            removed |= *was;
            feed.queue.retain(|write| !matches!(write, Write::StopDone { .. }));
        }
        // A move has stored a larger epoch than that of the maintainer which still runs.
        let outgoing = feed.slot.as_ref().and_then(|slot| slot.operator.outgoing());
        let (node, epoch) = outgoing.map_or((node, epoch), |(origin, epoch)| (Some(origin.clone()), epoch));
        let node = node.filter(|node| self.members.contains(node)).unwrap_or_else(|| self.me.clone());
        self.begin(id, Operator::Stop { node, removed, epoch }, now);
    }

    /// The maintainer is gone: the end of the operator is made durable before its place is given away.
    ///
    /// A maintainer older than the stored epoch was to move, and may have stopped for that: its dispatchers stayed
    /// where they were. When the changefeed is not to run they are closed under the stored epoch, which nobody has.
    pub(super) fn on_stopped(&mut self, id: &ChangefeedId, now: Instant) {
        let Some(feed) = self.feeds.get_mut(id) else { return };
        let Some(slot) = &mut feed.slot else { return };
        let Operator::Stop { removed, epoch, .. } = slot.operator else { return };
        let current = feed.changefeed.info.epoch;
        if let Some((node, epoch)) = feed.next_stop.take().filter(|(node, _)| self.members.contains(node)) {
            return self.begin(id, Operator::Stop { node, removed, epoch }, now);
        }
        if feed.changefeed.group() == Group::Stopped && epoch != current {
            return self.close_all(id, now);
        }
        slot.finishing = true;
        let write = if removed {
            Write::DropRetention { info: Box::new((*feed.changefeed.info).clone()) }
        } else {
            Write::StopDone { last: feed.changefeed.take_unsaved() }
        };
        self.want(id, write, now);
    }

    /// The node of the maintainer that is being stopped left. What runs goes on and takes over what is left
    /// elsewhere; if nothing is to run it is closed.
    pub(super) fn on_stop_lost(&mut self, id: &ChangefeedId, now: Instant) {
        let Some(feed) = self.feeds.get(id) else { return };
        let next = feed.next_stop.as_ref().is_some_and(|(node, _)| self.members.contains(node));
        if feed.changefeed.group() == Group::Stopped && !next {
            self.close_all(id, now);
        } else {
            self.on_stopped(id, now);
        }
    }

    /// The coordinator's own node closes the dispatchers everywhere, under the stored epoch.
    fn close_all(&mut self, id: &ChangefeedId, now: Instant) {
        let Some(feed) = self.feeds.get(id) else { return };
        let Some(Operator::Stop { removed, .. }) = feed.slot.as_ref().map(|slot| &slot.operator) else {
            return;
        };
        let (node, removed, epoch) = (self.me.clone(), *removed, feed.changefeed.info.epoch);
        self.begin(id, Operator::Stop { node, removed, epoch }, now);
    }
}
