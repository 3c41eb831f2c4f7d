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
//!
//! # The way of a request
//!
//! ```text
//!   OrchestratorTopic ──► shard = hash(changefeed) mod 8 ──► queue ──► worker, one per shard
//!                                                             │
//!                         same changefeed and kind waits? ────┤
//!                           newer epoch ─► takes its place    │
//!                           a removing close, plain one waits ─► takes its place
//!                           else ─► dropped: the sender repeats it
//! ```
//!
//! # A changefeed on this node
//!
//! ```text
//!              bootstrap(e)                            sink open, still allowed
//!   Nothing ────────────────────► Initializing ────────────────────────────────► Manager ◄─┐ bootstrap: asked,
//!     │  ▲                        │     │                                          │  │     ┘ owner may change
//!     │  │   sink refuses: error  │     │ fence, node stops: nothing is left,      │  │
//!     │  └────────────────────────┘     └──────────► nobody is answered            │  │ fence: write path closed at once,
//!     │                                                                            │  └──────► it ends by itself, unheard
//!     │ close(e): success, tombstone e             close(e), e ≥ the owner's:        │
//!     ▼                                            not yet… not yet… success       ▼
//!   Tombstone(e) ◄───────────────────────────────────────────────────────────── Closing
//!     │
//!     ├── bootstrap with epoch ≤ e or none: dropped without an answer
//!     ├── bootstrap with a larger epoch: Initializing; the tombstone goes when the manager is there
//!     └── 24 hours: Nothing
//!
//!   close under an older epoch: success, and nothing happens
//!   close without epoch that removes nothing: no tombstone
//! ```
//!
//! # Fence and shutdown
//!
//! ```text
//!   local_fence ──► every write path closed, those of managers in creation too ──► requests dropped, no answers
//!   shutdown    ──► no new managers ──► queues closed ──► every manager closed in order, all at once ──► workers end
//! ```

mod handler;
mod orchestrator;
mod queue;
mod registry;
mod shard;
mod tombstone;

pub use orchestrator::{Orchestrator, OrchestratorHandle};
