//! Who may write into a target: sinks register before they write, and a maintainer fences those of nodes that are gone.
//! The rules are those of the PostgreSQL sink's registrations.

use std::collections::{BTreeMap, BTreeSet};

use heartbeatpb::{MaintainerEpoch, NodeId};
use maintainer::{FenceOutcome, Whom};

use super::target::Session;
use super::{Feed, Wrong};
use crate::Random;

/// One in so many sessions does not end although it was told to.
const STUBBORN: u64 = 5;

/// A sink's place in the target.
pub(in crate::sim) struct Writer {
    node: NodeId,
    epoch: u64,
    fenced: bool,
}

/// The sinks that may write, and the fences that were put up.
#[derive(Default)]
pub(in crate::sim) struct Writers {
    by_sink: BTreeMap<u64, Writer>,
    /// Epoch of the newest fence.
    newest: u64,
    /// Nodes that were fenced by name, and under which epoch.
    named: BTreeMap<NodeId, u64>,
}

impl Writers {
    pub(super) fn may_write(&self, sink: u64) -> bool {
        self.by_sink.get(&sink).is_some_and(|writer| !writer.fenced)
    }

    /// The nodes with a sink that may write.
    fn that_may_write(&self) -> BTreeSet<NodeId> {
        self.by_sink.values().filter(|writer| !writer.fenced).map(|writer| writer.node.clone()).collect()
    }
}

impl Feed {
    /// A sink is opened; false when it may not write. Those of the same node that were there before cannot write
    /// any more.
    pub(in crate::sim) fn register(
        &mut self,
        (node, sink): (&NodeId, u64),
        epoch: Option<MaintainerEpoch>,
        random: &mut Random,
        wrong: &mut Wrong,
    ) -> bool {
        let epoch = MaintainerEpoch::to_wire(epoch);
        let named = self.writers.named.get(node).copied();
        if self.writers.newest > epoch || epoch > 0 && named.is_some_and(|named| named >= epoch) {
            return false;
        }
        let before: Vec<u64> =
            self.writers.by_sink.iter().filter(|(_, writer)| writer.node == *node).map(|(n, _)| *n).collect();
        for earlier in before {
            self.remove_writer(earlier, random, wrong);
        }
        self.writers.by_sink.insert(sink, Writer { node: node.clone(), epoch, fenced: false });
        true
    }

    /// Whether a sink may write.
    pub(in crate::sim) fn may_write(&self, sink: u64) -> bool {
        self.writers.may_write(sink)
    }

    /// Whether a node has a sink that may write. What dispatchers of other nodes do reaches nobody.
    pub(in crate::sim) fn takes_from(&self, node: &NodeId) -> bool {
        self.writers.by_sink.values().any(|writer| writer.node == *node && !writer.fenced)
    }

    /// Keeps sinks from writing; `None` when a newer maintainer has fenced already.
    pub(in crate::sim) fn fence(
        &mut self,
        (epoch, newest): (Option<MaintainerEpoch>, Option<MaintainerEpoch>),
        whom: &Whom,
        random: &mut Random,
        wrong: &mut Wrong,
    ) -> Option<FenceOutcome> {
        let (epoch, until) = (MaintainerEpoch::to_wire(epoch), MaintainerEpoch::to_wire(newest.max(epoch)));
        if self.writers.newest > epoch {
            return None;
        }
        self.writers.newest = epoch;
        match whom {
            Whom::AllBut(_) => self.writers.named.retain(|_, named| *named >= epoch),
            Whom::Nodes(nodes) => {
                for node in nodes {
                    let named = self.writers.named.entry(node.clone()).or_default();
                    *named = until.max(*named);
                }
            }
        }
        let meant = |writer: &Writer| match whom {
            // Also those that somebody else has fenced and not finished with.
            Whom::AllBut(nodes) => writer.fenced || !nodes.contains(&writer.node),
            // One that comes late does not mean what was let in again since.
            Whom::Nodes(nodes) => nodes.contains(&writer.node) && writer.epoch <= until,
        };
        let marked: Vec<u64> =
            self.writers.by_sink.iter().filter(|(_, writer)| meant(writer)).map(|(sink, _)| *sink).collect();
        let mut busy = BTreeMap::new();
        for sink in marked {
            let Some(writer) = self.writers.by_sink.get_mut(&sink) else { continue };
            writer.fenced = true;
            let node = writer.node.clone();
            if self.has_pending(sink) && random.between(1, STUBBORN) == 1 {
                busy.insert(node, "its session was told to end and has not".to_owned());
            } else {
                self.remove_writer(sink, random, wrong);
            }
        }
        let writers = matches!(whom, Whom::AllBut(_)).then(|| self.writers.that_may_write());
        Some(FenceOutcome { busy, writers })
    }

    /// Nothing of a sink reaches the target any more.
    pub(super) fn remove_writer(&mut self, sink: u64, random: &mut Random, wrong: &mut Wrong) {
        self.end_sessions(|session: &Session| session.sink == sink, random, wrong);
        self.by_holder.retain(|(_, of, _), _| *of != sink);
        self.writers.by_sink.remove(&sink);
    }
}
