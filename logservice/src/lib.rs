//! Reads an upstream log, stores it, and serves it to dispatchers.
//!
//! Five parts, each usable alone: an [`upstream`] checks prerequisites and runs a reader; the reader fills an
//! [`event_store`]; the event service of [`LogService`] slices the store into one ordered stream per dispatcher;
//! the [`Collector`] on the dispatcher's node checks the stream and delivers. Streams cross nodes as messages of
//! [`topic`]. Parts of an initial copy may be written by other nodes than the one that reads the log (`crew.rs`). Hears
//! `EventServiceTopic` and `CopyOrderTopic`, tells `EventCollectorTopic` and `CopyReportTopic`. Start reading at `upstream.rs`, then
//! `event_store.rs`.
//!
//! A dispatcher may have a part of a table. The store knows tables only; the event service picks by key what belongs to a
//! stream, without copying, and only that travels to another node:
//!
//! ```text
//!  store, table t    chunk 1        chunk 2        chunk 3
//!                   ┌──────────────┬──────────────┬──────────────┐
//!                   │ a k b z      │ c d          │ x a y        │
//!                   └──────────────┴──────────────┴──────────────┘
//!  stream ["", m)     a k b     ──▶  c d       ──▶  a         resolved when it has scanned, not only sent, all of it
//!  stream [m, "")           z   ──▶ (nothing)  ──▶  x   y     skips a chunk without room and without a message
//!  trimmed            by the slowest stream, and only while the streams leave no key out: a part that moves to another
//!                     node has no reader for a moment, and finds its rows
//! ```
//!
//! Life of a stream, as its receiver (left) and the event service see it:
//!
//! ```text
//!   subscribe ──▶ registering ──REGISTER──▶ registered ──READY──▶ (repeated until RESET)
//!                     ▲                                              │
//!                     │ NOT REGISTERED                             RESET(epoch, start, copied)
//!                     │                                              ▼
//!                 delivering ◀──HANDSHAKE(seq 1), ROWS, DDL, RESOLVED── streaming
//!                     │  gap, overflow: epoch + 1, RESET              │ schema change: waits until it is passed
//!                     └──unsubscribe: REMOVE──▶ gone                  └ no room, disk busy: waits for that alone
//! ```
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
//! - **LS-9** What a part of a table needs is kept while that part has no reader, and what it does not need is not kept
//!   for it.
//! - **LS-10** What any dispatcher may yet begin with is kept: nothing is dropped before the maintainer has taken over, and
//!   then nothing above its checkpoint that only a reader of another node has passed.

mod collector;
mod crew;
mod error;
mod event_service;
pub mod event_store;
mod filter;
pub mod metrics;
mod service;
pub mod topic;
pub mod upstream;
mod wire;

pub use collector::metrics as collector_metrics;
pub use collector::{
    CheckpointSlot, Collector, CollectorHandle, Credit, Delivery, DispatcherEvent, Subscription,
};
pub use crew::{
    CopyCrew, CopyEnds, CopyOrder, CopyOrderTopic, CopyReport, CopyReportTopic, Ends, OrderId, OrderState,
};
pub use error::*;
pub use filter::*;
pub use service::{LogConfig, LogService};
