//! Dispatcher managers are born, fenced and closed in order.
//!
//! Hears `OrchestratorTopic`, sorts requests into eight shards by changefeed, creates and asks the managers of
//! `dispatcher-manager`, and answers maintainers over `MaintainerManagerTopic` and `MaintainerTopic`. Also runs the
//! node's heartbeat collector. Start reading at `orchestrator.rs`, then `queue.rs` and `handler.rs`.
//!
//! - **DO-1** Per changefeed and kind at most one request waits: the newest owner's.
//! - **DO-2** A manager that was closed is not created again for the owner that closed it, nor an earlier one.
//! - **DO-3** A fence reaches every manager, also one that is being created, and waits for nothing.
//! - **DO-4** A fenced or closing node answers nothing and creates nothing.
//! - **DO-5** No lock is held while a manager is created, asked or closed.

mod handler;
mod orchestrator;
mod queue;
mod registry;
mod shard;
mod tombstone;

pub use orchestrator::{Orchestrator, OrchestratorHandle};
