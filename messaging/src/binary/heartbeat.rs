//! Progress of dispatchers, told to the event service, and its answer.

use heartbeatpb::{DecodeError, DispatcherId, Ts};

use super::frame::{BinaryMessage, EventKind, ID_BYTES, Reader, frame, put_count, put_dispatcher, put_u64};

/// Version of an entry inside a heartbeat of version 2.
const ENTRY_VERSION: u8 = 1;

/// Progress of one dispatcher.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DispatcherProgress {
    /// The dispatcher.
    pub dispatcher: DispatcherId,
    /// Its checkpoint.
    pub checkpoint: Ts,
    /// Epoch of its stream; 0 from a sender of version 1.
    pub epoch: u64,
}

/// Collector to event service: what the dispatchers no longer need.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DispatcherHeartbeat {
    /// Cluster of the sender.
    pub cluster_id: u64,
    /// Progress of its dispatchers.
    pub dispatchers: Vec<DispatcherProgress>,
}

impl BinaryMessage for DispatcherHeartbeat {
    const NAME: &'static str = "DispatcherHeartbeat";

    fn encode(&self, out: &mut Vec<u8>) {
        frame(out, EventKind::DispatcherHeartbeat, 2, |out| {
            put_u64(out, self.cluster_id);
            put_count(out, self.dispatchers.len());
            for progress in &self.dispatchers {
                out.push(ENTRY_VERSION);
                put_dispatcher(out, progress.dispatcher);
                put_u64(out, progress.checkpoint.0);
                put_u64(out, progress.epoch);
            }
        });
    }

    fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let (version, mut payload, _) = Reader::open(bytes, EventKind::DispatcherHeartbeat, Self::NAME)?;
        let entry_bytes = match version {
            1 => ID_BYTES + 8,
            2 => 1 + ID_BYTES + 8 + 8,
            _ => return Err(payload.unusable("version")),
        };
        let cluster_id = payload.u64()?;
        let count = payload.count(entry_bytes)?;
        let mut dispatchers = Vec::with_capacity(count);
        for _ in 0..count {
            if version == 2 && payload.u8()? != ENTRY_VERSION {
                return Err(payload.unusable("entry version"));
            }
            let (dispatcher, checkpoint) = (payload.dispatcher()?, payload.ts()?);
            let epoch = if version == 2 { payload.u64()? } else { 0 };
            dispatchers.push(DispatcherProgress { dispatcher, checkpoint, epoch });
        }
        Ok(Self { cluster_id, dispatchers })
    }
}

/// Whether the service still serves a dispatcher.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ServedState {
    /// It does.
    Normal,
    /// It does not: register again.
    Removed,
}

/// One dispatcher's state at the service.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DispatcherServed {
    /// The dispatcher.
    pub dispatcher: DispatcherId,
    /// Its state.
    pub state: ServedState,
}

/// Event service to collector: which dispatchers it serves.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DispatcherHeartbeatResponse {
    /// Cluster of the sender.
    pub cluster_id: u64,
    /// States of dispatchers.
    pub dispatchers: Vec<DispatcherServed>,
}

impl BinaryMessage for DispatcherHeartbeatResponse {
    const NAME: &'static str = "DispatcherHeartbeatResponse";

    fn encode(&self, out: &mut Vec<u8>) {
        frame(out, EventKind::DispatcherHeartbeatResponse, 1, |out| {
            put_u64(out, self.cluster_id);
            put_count(out, self.dispatchers.len());
            for served in &self.dispatchers {
                put_dispatcher(out, served.dispatcher);
                out.push(match served.state {
                    ServedState::Normal => 0,
                    ServedState::Removed => 1,
                });
            }
        });
    }

    fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut payload = Reader::open_version(bytes, EventKind::DispatcherHeartbeatResponse, Self::NAME, 1)?;
        let cluster_id = payload.u64()?;
        let count = payload.count(ID_BYTES + 1)?;
        let mut dispatchers = Vec::with_capacity(count);
        for _ in 0..count {
            let dispatcher = payload.dispatcher()?;
            let state = match payload.u8()? {
                0 => ServedState::Normal,
                1 => ServedState::Removed,
                _ => return Err(payload.unusable("state")),
            };
            dispatchers.push(DispatcherServed { dispatcher, state });
        }
        Ok(Self { cluster_id, dispatchers })
    }
}
