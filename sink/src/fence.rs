//! Keeping a writer that is gone from writing: what a downstream can be asked for, by its URI.

use std::collections::{BTreeMap, BTreeSet};

use heartbeatpb::{ChangefeedId, MaintainerEpoch, NodeId};

use crate::open::{Target, target};
use crate::{Error, postgres};

/// Whose sinks are to write no more.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Whom {
    /// Those of every node but these.
    AllBut(BTreeSet<NodeId>),
    /// Those of these nodes.
    Nodes(BTreeSet<NodeId>),
}

/// A fence that a maintainer asks for.
#[derive(Clone, Debug)]
pub struct FenceRequest {
    /// The changefeed whose writers are meant.
    pub changefeed: ChangefeedId,
    /// Epoch of the maintainer that asks. From then on no sink of an older epoch can be opened, and none of a fenced
    /// node under this one.
    pub epoch: Option<MaintainerEpoch>,
    /// The newest number that this maintainer has used. A named node can open no sink under it or an older one; what it
    /// opens under a newer one is not meant, however late this request is.
    pub newest: Option<MaintainerEpoch>,
    /// Whose sinks.
    pub whom: Whom,
}

/// What a fence has come to.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Fenced {
    /// Nodes that may still write what they had begun, each with the reason. Nobody else that was meant can write.
    pub busy: BTreeMap<NodeId, String>,
    /// After all but some nodes were fenced: those of them with a sink that may write. `None` where nobody registers.
    pub writers: Option<BTreeSet<NodeId>>,
}

/// Whether writers of a downstream can be fenced: where transactions can be refused. Files are written under names
/// of their own by each dispatcher, and a black hole keeps nothing.
#[must_use]
pub fn has_fence(uri: &str) -> bool {
    matches!(target(uri), Ok(Target::Postgres))
}

/// Keeps sinks from writing: returns when nothing that they had begun can reach the downstream any more, except of the
/// nodes that the answer names. What they begin later fails with [`Error::Fenced`]. Idempotent; where nothing can be
/// fenced, nothing happens.
///
/// # Errors
/// [`Error::Unavailable`] when the downstream does not answer; [`Error::Rejected`] when it refuses, or when a newer
/// maintainer has fenced already.
pub async fn fence(uri: &str, request: &FenceRequest) -> Result<Fenced, Error> {
    match target(uri)? {
        Target::Postgres => postgres::fence(uri, request).await,
        Target::File | Target::Blackhole(_) => Ok(Fenced::default()),
    }
}
