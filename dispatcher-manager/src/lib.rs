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
//! - **DM-8** A key has one dispatcher that takes its rows: whoever is to have it comes when the one before has let go.
//!
//! # Who commands
//!
//! Every message is checked and has its effect in one step of the manager's task, so there is no lock to hold and
//! none to forget. `(node, epoch)` is the owner; a bootstrap may change it, nothing else may.
//!
//! ```text
//!               bootstrap(n, e)                            any other request (n, e)
//!   closing? ──► say nothing, n asks again                  (n, e) is the owner and open? ──no──► drop
//!   closed?  ──► the orchestrator makes another one                     │ yes
//!   stale?   ──► drop: e < epoch, e = epoch of another node             ▼
//!   trigger differs? ──► refuse, the owner stays                     effect
//!        │ no
//!        ▼
//!   owner := (n, e) ──► node changed: every stream begins again at n's log
//!        │
//!        ├── no trigger wanted, or it is here ──► answer: spans, requests and merges in flight
//!        └── trigger wanted ──► ask the sink ──► trigger in the table ──► answer
//!                                          └───► failed: error; the next bootstrap tries again
//! ```
//!
//! # Create and remove, and their journal
//!
//! ```text
//!   Create ── known id, journaled or keys taken? ── yes ──► nothing
//!      │ no
//!      ▼
//!   [journal: Create] ──► sink asked ──► still wanted? ──no──► sink forgets it
//!                            │ failed        │ yes
//!                            ▼               ▼
//!                journal cleared,      Initializing, in the watermark ──► subscribed ──► journal cleared
//!                error reported              │ first event
//!                                            ▼
//!                                         Working ──► told at once, and heard in barriers
//!                                            │ Remove [journal: Remove]
//!                                            ▼
//!                              takes nothing more, unsubscribed; waits for the sink and for I/O of a block event
//!                                            │
//!                                            ▼
//!                     next heartbeat: counts once more, Stopped with its checkpoint; then gone, journal cleared
//!
//!   Remove of nobody ──► journal cleared, Stopped with checkpoint 0
//! ```
//!
//! # Merging adjacent spans
//!
//! A changefeed has one log, which keeps what any reader of a table still needs: nothing has to be prepared for the
//! joined span, its sources just stay readers until the joined dispatcher is one. What has to be found is a place
//! where all of them can stop.
//!
//! ```text
//!             sources                             joined                        in the watermark
//!   request   Working                             –                             sources
//!      │      ≥ 2, adjacent, working              Stopped@0 if it can never be  sources
//!      ▼
//!   PREPARING WaitingMerge, go on                 Preparing                     sources
//!      │      until all rest at one place: between events with the last DDL in the checkpoint, or all in front of
//!      │      the same barrier; no initial copy, no report without acknowledgement
//!      ▼
//!   DRAINING  stopped: drop what arrives, hear    MergeReady                    sources
//!      │      no action; rows in flight flush
//!      ▼
//!   ASKING    stopped, hold nothing               MergeReady; the sink is asked sources
//!      │      start: smallest checkpoint; in front of a DDL at t: t − 1 without the rows at t; what the sink
//!      │      knows may be newer
//!      ▼
//!   COMMITTED unsubscribed after it subscribed;   Initializing ──► Working      joined, and sources once more
//!      │      Stopped in the next heartbeat
//!      ▼
//!   forgotten when the sources are gone and the joined one works or is gone
//!
//!   before COMMITTED: a source or the joined one removed, the sink refuses, 2 s without a common place, 30 s in all:
//!      sources ──► Working; those that had stopped register again at their checkpoint and take nothing until
//!                  their stream has begun again
//!      joined  ──► gone, Stopped@0. That is final: a request that is repeated later is answered with it again
//! ```
//!
//! A new owner is told of merges in flight and they go on; a merge needs nobody's help, and an owner that does not
//! want it removes the joined dispatcher.
//!
//! # A block event
//!
//! ```text
//!                        ┌── one whole table ─────► flush ──► execute ──► tables change? ──► NONE, repeated until ACK
//!   Ready ── event ──────┤                                                      └── no ──► Ready
//!                        │    trigger, all tables, reports without ACK
//!                        ├───────────────────────► Held ── last ACK ──┐
//!                        └── several spans ───────────────────────────┴──► flush ──► WAITING, repeated until ACK
//!                                                                                      │ Write          │ Pass
//!                                                                                      ▼                │
//!                                                                      WRITING: execute ── failed ──► Failed
//!                                                                                      │ done           │
//!                                                                                      └──────► DONE ◄──┘ ──► Ready
//! ```
//!
//! One commit ts names one DDL of a table: readers of a log join several of one transaction, or give each its own.
//! Rows come before the DDL of their commit ts.
//!
//! # Closing
//!
//! ```text
//!   close by the owner or under a newer epoch, or the node stops     fence: the node lost its lease
//!                            └────────────────┬─────────────────────────────┘
//!                                             ▼
//!   Open ──► Closing: write path closed, every dispatcher unsubscribed and forgotten, nothing said any more,
//!               │     calls of the sink abandoned, sink asked to end (and abandoned after 30 s)
//!               ▼
//!            Closed: whoever asks is told so; a removed changefeed's traces are deleted, again at each close until
//!                    that has worked
//! ```

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
