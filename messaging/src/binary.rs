//! The binary form of event-service messages that steer the flow and carry no rows (messaging §11).
//!
//! Big-endian, except that a 128-bit id is its low half and then its high half, both little-endian. Every
//! length and count is compared with the bytes that are there before anything is allocated for it.

mod control;
mod frame;
mod heartbeat;
mod progress;

pub use control::{CongestionControl, FeedMemory, SpanMemory};
pub use frame::{BinaryMessage, EventKind, HEADER_BYTES};
pub use heartbeat::{
    DispatcherHeartbeat, DispatcherHeartbeatResponse, DispatcherProgress, DispatcherServed, ServedState,
};
pub use progress::{BatchResolved, Handshake, NotReusable, Ready, Resolved, SyncPoint};
