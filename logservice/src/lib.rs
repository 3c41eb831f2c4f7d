//! Reads an upstream log, stores it, and serves it to dispatchers.
//!
//! Four parts, each usable alone: an [`upstream`] checks prerequisites and runs a reader; the reader fills an
//! [`event_store`]; the event service of [`LogService`] slices the store into one ordered stream per dispatcher;
//! the [`Collector`] on the dispatcher's node checks the stream and delivers. Streams cross nodes as messages of
//! [`topic`]. Hears `EventServiceTopic`, tells `EventCollectorTopic`. Start reading at `upstream.rs`, then
//! `event_store.rs`.
//!
//! - **LS-1** A dispatcher gets every row of its span after its start ts, in commit order, at least once.
//! - **LS-2** After a resolved ts nothing at or before it follows in the same epoch.
//! - **LS-3** A lost, repeated or reordered event is noticed by epoch and sequence, and repaired by a reset.
//! - **LS-4** Memory and disk are bounded; a full store stops the reader, it never drops.
//! - **LS-5** The upstream is told only persisted checkpoints.
//! - **LS-6** Behind a schema change a dispatcher gets nothing, neither rows nor a resolved ts, before it has told
//!   a checkpoint at or after the change: at a barrier nobody holds room that another one needs to come to it.
//! - **LS-7** A stream waits for its own rows' room, disk and dispatcher, never for another one's.
//! - **LS-8** Two schema changes never have one commit ts: barriers, acknowledgements and the place where a stream goes
//!   on know them by nothing else. The store refuses the second one.

mod collector;
mod error;
mod event_service;
pub mod event_store;
mod filter;
pub mod metrics;
mod service;
pub mod topic;
pub mod upstream;
mod wire;

pub use collector::{
    CheckpointSlot, Collector, CollectorHandle, Credit, Delivery, DispatcherEvent, Subscription,
};
pub use error::*;
pub use filter::*;
pub use service::{LogConfig, LogService};
