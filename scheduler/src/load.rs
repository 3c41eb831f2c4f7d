//! How much each eligible node carries.

use std::collections::BTreeMap;

use heartbeatpb::NodeId;

/// Nodes that may take work, with the number of spans that they carry or are about to.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Loads(BTreeMap<NodeId, usize>);

impl Loads {
    /// Loads of eligible nodes.
    pub fn new(loads: impl IntoIterator<Item = (NodeId, usize)>) -> Self {
        Self(loads.into_iter().collect())
    }

    /// The least loaded node; the smaller id among equals.
    #[must_use]
    pub fn least(&self) -> Option<&NodeId> {
        self.0.iter().min_by_key(|(node, load)| (**load, *node)).map(|(node, _)| node)
    }

    /// One more span goes to `node`.
    pub fn add(&mut self, node: &NodeId) {
        if let Some(load) = self.0.get_mut(node) {
            *load += 1;
        }
    }

    /// Load of a node; `None` when it is not eligible.
    #[must_use]
    pub fn get(&self, node: &NodeId) -> Option<usize> {
        self.0.get(node).copied()
    }
}
