//! The network: envelopes on their way, with loss, repetition, delay, disorder and broken links.

use std::collections::BTreeMap;
use std::sync::Arc;

use heartbeatpb::NodeId;
use heartbeatpb::wire::proto::Message as Envelope;
use messaging::{MessageCenter, SendError, SendErrorKind, StreamClass, Transport};

use super::world::Shared;

/// Deliveries happen at multiples of this many milliseconds, so that a step of the world carries many of them.
pub(super) const GRAIN: u64 = 10;
/// An envelope that found its receiver's queue full is offered again after this many milliseconds.
const AGAIN: u64 = 20;

/// What goes wrong between nodes; chances in percent, times in milliseconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Faults {
    /// Chance that an envelope is lost.
    pub loss: u64,
    /// Chance that it arrives a second time.
    pub duplication: u64,
    /// Chance that it, or its repetition, is late and comes out of order.
    pub disorder: u64,
    /// Longest ordinary delay.
    pub delay: u64,
    /// Longest delay of what is late.
    pub late: u64,
}

/// An envelope on its way.
struct Flying {
    from: NodeId,
    to: NodeId,
    class: StreamClass,
    envelope: Arc<Envelope>,
}

/// The envelopes on their way.
#[derive(Default)]
pub(super) struct Wire {
    pub(super) faults: Faults,
    flying: BTreeMap<(u64, u64), Flying>,
    sequence: u64,
    /// Streams keep their order: nothing overtakes what was due last.
    last_due: BTreeMap<(NodeId, NodeId, StreamClass), u64>,
    pub(super) carried: u64,
    pub(super) lost: u64,
}

/// An envelope that has arrived.
pub(super) struct Arrived {
    pub(super) center: MessageCenter,
    pub(super) from: NodeId,
    pub(super) class: StreamClass,
    pub(super) envelope: Arc<Envelope>,
    to: NodeId,
}

impl Wire {
    fn push(&mut self, due: u64, flying: Flying) {
        self.sequence += 1;
        self.flying.insert((due.next_multiple_of(GRAIN), self.sequence), flying);
    }

    /// A connection broke: what travelled is lost.
    pub(super) fn lose_between(&mut self, one: &NodeId, other: &NodeId) {
        let before = self.flying.len();
        self.flying
            .retain(|_, f| !((f.from == *one && f.to == *other) || (f.from == *other && f.to == *one)));
        self.lost += (before - self.flying.len()) as u64;
    }

    /// A node is gone.
    pub(super) fn forget(&mut self, node: &NodeId) {
        self.flying.retain(|_, f| f.to != *node);
        self.last_due.retain(|(from, to, _), _| from != node && to != node);
    }
}

/// A node's plug.
pub(super) struct Plug {
    pub(super) from: NodeId,
    pub(super) world: Shared,
}

impl Transport for Plug {
    fn send(&self, to: &NodeId, class: StreamClass, envelope: Envelope) -> Result<(), SendError> {
        let mut guard = self.world.lock();
        let world = &mut *guard;
        if !world.processes.contains_key(to) {
            return Err(SendError::new(SendErrorKind::TargetNotFound, format!("node {to} is not known")));
        }
        if !world.linked(&self.from, to) {
            // Noticed, or not yet.
            return if world.chance(50) {
                Err(SendError::new(SendErrorKind::ConnectionNotFound, format!("no stream to {to}")))
            } else {
                world.wire.lost += 1;
                Ok(())
            };
        }
        let faults = world.wire.faults;
        let envelope = Arc::new(envelope);
        let (lost, twice) = (world.chance(faults.loss), world.chance(faults.duplication));
        let flying = |envelope: &Arc<Envelope>| Flying {
            from: self.from.clone(),
            to: to.clone(),
            class,
            envelope: Arc::clone(envelope),
        };
        let now = world.now;
        if lost {
            world.wire.lost += 1;
        } else if world.chance(faults.disorder) {
            let due = now + 1 + world.random.between(0, faults.late);
            world.wire.push(due, flying(&envelope));
        } else {
            let travel = world.random.between(1, faults.delay.max(1)) + world.slowness(&self.from, to);
            let last = world.wire.last_due.entry((self.from.clone(), to.clone(), class)).or_default();
            *last = (now + travel).max(*last);
            let due = *last;
            world.wire.push(due, flying(&envelope));
        }
        if twice {
            let due = now + 1 + world.random.between(0, faults.late.max(faults.delay));
            world.wire.push(due, flying(&envelope));
        }
        if let Some(later) = world.echo(&self.from) {
            world.wire.push(now + later, flying(&envelope));
        }
        Ok(())
    }
}

/// Hands over what has arrived.
pub(super) fn deliver(shared: &Shared) {
    let arrived = take_arrived(shared);
    for one in arrived {
        if one.center.try_receive(one.class, &one.from, &one.envelope).is_err() {
            let mut world = shared.lock();
            let due = world.now + AGAIN;
            let Arrived { from, class, envelope, to, .. } = one;
            world.wire.push(due, Flying { from, to, class, envelope });
        }
    }
}

fn take_arrived(shared: &Shared) -> Vec<Arrived> {
    let mut guard = shared.lock();
    let world = &mut *guard;
    let mut arrived = Vec::new();
    while let Some(entry) = world.wire.flying.first_entry() {
        if entry.key().0 > world.now {
            break;
        }
        let flying = entry.remove();
        let Some(process) = world.processes.get(&flying.to) else { continue };
        if process.paused {
            // It waits in the receiver's kernel.
            let due = world.now + AGAIN;
            world.wire.push(due, flying);
            continue;
        }
        let center = process.center.clone();
        world.wire.carried += 1;
        let Flying { from, to, class, envelope } = flying;
        arrived.push(Arrived { center, from, class, envelope, to });
    }
    arrived
}
