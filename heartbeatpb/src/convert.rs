//! Between the wire and the domain: this file and its parts are the only ones that see both.
//!
//! Towards the wire every value has a form (`From`). From the wire a message may be unusable (`TryFrom`):
//! a field is missing, an id is zero, or an enum has a number that we do not know. Guessing there could open
//! two writers or lose rows, so it is refused; only an unknown liveness has a safe reading, alive
//! (maintainer §5.3). In a list of reports the unusable entries are left out and the others count.

mod block;
mod manager;
mod node;
mod schedule;
mod status;
#[cfg(test)]
mod tests;

use crate::wire::heartbeatpb as pb;
use crate::{
    ChangefeedId, ComponentState, DecodeError, DispatcherId, Gid, MaintainerEpoch, Mode, NodeId,
    NodeLiveness, TableId, TableSpan,
};

type Result<T> = std::result::Result<T, DecodeError>;

/// The value of a field that must be there.
fn need<T>(value: Option<T>, message: &'static str, field: &'static str) -> Result<T> {
    value.ok_or(DecodeError::Missing { message, field })
}

/// A list that is usable as a whole or not at all.
fn list<W, D: TryFrom<W, Error = DecodeError>>(items: Vec<W>) -> Result<Vec<D>> {
    items.into_iter().map(D::try_from).collect()
}

/// A list of independent reports: an unusable one must not hide the others.
fn reported<W, D: TryFrom<W, Error = DecodeError>>(items: Vec<W>) -> Vec<D> {
    items.into_iter().filter_map(|item| D::try_from(item).ok()).collect()
}

fn wire_list<D, W: From<D>>(items: Vec<D>) -> Vec<W> {
    items.into_iter().map(W::from).collect()
}

fn epoch(value: u64) -> Option<MaintainerEpoch> {
    MaintainerEpoch::from_wire(value)
}

fn wire_epoch(value: Option<MaintainerEpoch>) -> u64 {
    MaintainerEpoch::to_wire(value)
}

fn node(text: String) -> Option<NodeId> {
    (!text.is_empty()).then(|| NodeId::from(text))
}

fn wire_node(node: Option<NodeId>) -> String {
    node.map_or_else(String::new, |node| node.as_str().to_owned())
}

fn mode(value: i64, message: &'static str) -> Result<Mode> {
    match value {
        0 => Ok(Mode::Default),
        1 => Ok(Mode::Redo),
        _ => Err(DecodeError::Unusable { message, field: "mode" }),
    }
}

fn wire_mode(mode: Mode) -> i64 {
    match mode {
        Mode::Default => 0,
        Mode::Redo => 1,
    }
}

fn component(value: i32, message: &'static str) -> Result<ComponentState> {
    match pb::ComponentState::try_from(value) {
        Ok(pb::ComponentState::Working) => Ok(ComponentState::Working),
        Ok(pb::ComponentState::Stopped) => Ok(ComponentState::Stopped),
        Ok(pb::ComponentState::Removed) => Ok(ComponentState::Removed),
        Ok(pb::ComponentState::Initializing) => Ok(ComponentState::Initializing),
        Ok(pb::ComponentState::Preparing) => Ok(ComponentState::Preparing),
        Ok(pb::ComponentState::MergeReady) => Ok(ComponentState::MergeReady),
        Ok(pb::ComponentState::WaitingMerge) => Ok(ComponentState::WaitingMerge),
        Err(_) => Err(DecodeError::Unusable { message, field: "component state" }),
    }
}

fn wire_component(state: ComponentState) -> i32 {
    match state {
        ComponentState::Working => pb::ComponentState::Working,
        ComponentState::Stopped => pb::ComponentState::Stopped,
        ComponentState::Removed => pb::ComponentState::Removed,
        ComponentState::Initializing => pb::ComponentState::Initializing,
        ComponentState::Preparing => pb::ComponentState::Preparing,
        ComponentState::MergeReady => pb::ComponentState::MergeReady,
        ComponentState::WaitingMerge => pb::ComponentState::WaitingMerge,
    }
    .into()
}

fn liveness(value: i32) -> NodeLiveness {
    match pb::NodeLiveness::try_from(value) {
        Ok(pb::NodeLiveness::Alive) | Err(_) => NodeLiveness::Alive,
        Ok(pb::NodeLiveness::Draining) => NodeLiveness::Draining,
        Ok(pb::NodeLiveness::Stopping) => NodeLiveness::Stopping,
    }
}

fn wire_liveness(value: NodeLiveness) -> i32 {
    match value {
        NodeLiveness::Alive => pb::NodeLiveness::Alive,
        NodeLiveness::Draining => pb::NodeLiveness::Draining,
        NodeLiveness::Stopping => pb::NodeLiveness::Stopping,
    }
    .into()
}

impl From<DispatcherId> for pb::DispatcherId {
    fn from(id: DispatcherId) -> Self {
        Self { high: id.high, low: id.low }
    }
}

impl TryFrom<pb::DispatcherId> for DispatcherId {
    type Error = DecodeError;
    fn try_from(id: pb::DispatcherId) -> Result<Self> {
        let id = DispatcherId::new(id.high, id.low);
        if id.is_zero() {
            return Err(DecodeError::Unusable { message: "DispatcherID", field: "value" });
        }
        Ok(id)
    }
}

impl From<ChangefeedId> for pb::ChangefeedId {
    fn from(id: ChangefeedId) -> Self {
        Self {
            high: id.gid.high,
            low: id.gid.low,
            name: id.name.as_ref().to_owned(),
            keyspace: id.keyspace.as_ref().to_owned(),
        }
    }
}

impl From<pb::ChangefeedId> for ChangefeedId {
    fn from(id: pb::ChangefeedId) -> Self {
        Self { gid: Gid::new(id.high, id.low), name: id.name.into(), keyspace: id.keyspace.into() }
    }
}

fn changefeed(id: Option<pb::ChangefeedId>, message: &'static str) -> Result<ChangefeedId> {
    need(id, message, "changefeedID").map(ChangefeedId::from)
}

fn dispatcher(
    id: Option<pb::DispatcherId>,
    message: &'static str,
    field: &'static str,
) -> Result<DispatcherId> {
    DispatcherId::try_from(need(id, message, field)?)
}

impl From<TableSpan> for pb::TableSpan {
    fn from(span: TableSpan) -> Self {
        Self {
            table_id: span.table.0,
            start_key: span.start,
            end_key: span.end,
            keyspace_id: span.keyspace_id,
        }
    }
}

impl From<pb::TableSpan> for TableSpan {
    fn from(span: pb::TableSpan) -> Self {
        Self {
            keyspace_id: span.keyspace_id,
            table: TableId(span.table_id),
            start: span.start_key,
            end: span.end_key,
        }
    }
}
