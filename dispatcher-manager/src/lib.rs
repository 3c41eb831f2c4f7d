//! One changefeed's spans on one node make progress.
//!
//! A dispatcher manager owns the sink of a changefeed and one dispatcher per table span that its maintainer put
//! here. Events come from the event collector of `logservice`, rows and schema changes go to a `sink`, and
//! heartbeats, barriers and errors go to the maintainer over `messaging`. Every decision is made by synchronous
//! cores (`dispatcher.rs`, `core.rs`: events in, effects out); `manager.rs` is the one task around them, and
//! `collector.rs` hands a node's messages to its managers. Start reading at `core.rs`, then `dispatcher.rs`.
//!
//! Who creates, fences and closes managers is `dispatcher-orchestrator`.
//!
//! - **DM-1** A dispatcher's checkpoint is below every event that is not durable downstream, and never goes back.
//! - **DM-2** Only the owner's requests change anything; check and effect happen in one task, so nothing comes
//!   between them. Epochs never go back.
//! - **DM-3** Once the write path is closed nothing is written, taken or reported any more, and closing it waits
//!   for nobody.
//! - **DM-4** Rows before a block event are durable before it is reported or executed; nothing behind it is sent
//!   before it is done. A barrier is called done only after its effect.
//! - **DM-5** A report that needs an effect at the owner is repeated until it is acknowledged.
//! - **DM-6** A watermark contains every dispatcher that was accepted before it was computed.
//! - **DM-7** The journal holds requests in flight of the current owner, and removals that still run.

mod arrival;
mod block_status;
mod collector;
mod core;
mod dispatcher;
mod error;
mod heartbeat;
mod journal;
mod manager;
pub mod metrics;
mod progress;
mod sinks;
mod source;
mod table;
#[cfg(feature = "test-util")]
pub mod testing;
mod timeline;

pub use collector::{HeartbeatCollector, Routes};
pub use error::{Error, Fault};
pub use manager::{
    Bootstrapped, Closed, ManagerContext, ManagerHandle, ManagerView, WritePath, failed_bootstrap,
};
pub use sinks::SinkFactory;
pub use source::EventSource;
