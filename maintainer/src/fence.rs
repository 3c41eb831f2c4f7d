//! What a maintainer needs from a downstream, so that nodes that are gone cannot write; the node plugs the sinks in.

use std::collections::{BTreeMap, BTreeSet};

use async_trait::async_trait;
use heartbeatpb::config::ChangefeedInfo;
use heartbeatpb::{MaintainerEpoch, NodeId, RunningError};

/// Whose writers are to write no more.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Whom {
    /// Those of every node but these.
    AllBut(BTreeSet<NodeId>),
    /// Those of these nodes.
    Nodes(BTreeSet<NodeId>),
}

/// What a fence has come to.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct FenceOutcome {
    /// Nodes that may still write what they had begun, each with the reason. Of all others that were meant nothing
    /// reaches the downstream any more.
    pub busy: BTreeMap<NodeId, String>,
    /// After all but some nodes were fenced: those of them with a writer that may write. `None` where that is not known.
    pub writers: Option<BTreeSet<NodeId>>,
}

/// The downstream's end of a fence, as a maintainer sees it.
#[async_trait]
pub trait DownstreamFence: Send + Sync + 'static {
    /// Whether writers of this changefeed can be fenced. Where they cannot, nobody waits for it.
    fn applies_to(&self, info: &ChangefeedInfo) -> bool;

    /// Keeps writers of a changefeed from writing: returns when nothing that they had begun can reach the downstream
    /// any more, and what they begin later fails. Idempotent; dropping the future abandons the attempt, which may
    /// have had its effect, or may yet have it. `newest` is the newest number under which the maintainer of `epoch` has
    /// asked any node: named nodes cannot open a writer under it or an older one, and what they open under a newer one
    /// later is not meant.
    ///
    /// # Errors
    /// When the downstream cannot be asked, or refuses. It is tried again.
    async fn fence(
        &self,
        info: &ChangefeedInfo,
        epoch: Option<MaintainerEpoch>,
        newest: Option<MaintainerEpoch>,
        whom: &Whom,
    ) -> Result<FenceOutcome, RunningError>;
}

/// A downstream without writers that could be fenced.
#[derive(Clone, Copy, Debug, Default)]
pub struct NothingToFence;

#[async_trait]
impl DownstreamFence for NothingToFence {
    fn applies_to(&self, _info: &ChangefeedInfo) -> bool {
        false
    }

    async fn fence(
        &self,
        _info: &ChangefeedInfo,
        _epoch: Option<MaintainerEpoch>,
        _newest: Option<MaintainerEpoch>,
        _whom: &Whom,
    ) -> Result<FenceOutcome, RunningError> {
        Ok(FenceOutcome::default())
    }
}
