//! Dispatcher managers are born, fenced and closed in order.
//!
//! The orchestrator of a node hears what maintainers want of its dispatcher managers: bootstrap, post-bootstrap,
//! close. It keeps at most one waiting request per changefeed and type (`pending.rs`), works on different
//! changefeeds in parallel (eight shards), remembers which epochs were closed here (`tombstones.rs`), and can
//! close every write path at once. Hears `OrchestratorTopic`; tells `MaintainerManagerTopic` and `MaintainerTopic`.
//! What a manager is, `dispatcher-manager` knows. Start reading at `orchestrator.rs`.
//!
//! - **DO-1** A node has at most one manager of a changefeed.
//! - **DO-2** A manager of an epoch that was closed here, or of an older one, is not created again.
//! - **DO-3** A newer owner's request is never dropped because an older owner's waits.
//! - **DO-4** After a local fence no manager exists that can write, one that is being created included, and no
//!   bootstrap is answered.

mod orchestrator;
mod pending;
mod tombstones;

pub use orchestrator::{FenceHandle, Orchestrator};
