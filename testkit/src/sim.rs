//! A whole cluster in one thread: the real shells and cores of coordinator, managers, maintainers, orchestrators and
//! dispatcher managers, on virtual time, over a network, a metadata store, an upstream and a downstream that are
//! simulated and do what a seed says.
//!
//! Every process has a runtime of its own with a clock that stands still until the simulation moves it, so that one
//! can be killed (its runtime is dropped), stopped for a while, or have a wrong time of day. Everything random
//! comes from the seed: the same plan gives the same history. What must always hold is checked while it runs, by
//! what the databases see rather than by what the nodes believe:
//!
//! - `ONE-WRITER`, `OPEN`: a key is written by one dispatcher at a time, and only while that is open.
//! - `CHECKPOINT`, `CHECKPOINT-BACK`: what is stored never passes a change that is not downstream, and never goes back.
//! - `DDL-ORDER`: a schema change is executed after the earlier and before the later rows of the tables it concerns.
//! - `RETENTION`, `FLOOR`: nobody needs a part of the log that was confirmed upstream, or dropped where it is read.
//! - `DRAIN-ZERO`: a node of which a drain says that nothing is left has nothing, and gets nothing.
//! - `STALL`, `EQUAL`: a while after the faults have ended the checkpoint has reached the end, every key is covered by
//!   exactly one dispatcher, and both ends are equal.
//!
//! A process joins through its lease and its registration, follows the others with `coordinator::membership`, gives up
//! whom `coordinator::reach` does not reach, and watches over its lease with `coordinator::watchdog`; what a lost process
//! had begun is fenced by maintainers, and refused by a target that keeps the rules of the PostgreSQL sink's registrations.
//!
//! ```text
//!   metadata store ── registrations (members.rs) ──► Registry ──► Greeter, over wire.rs ──► maintainers, coordinator
//!     │                                                                                        │
//!     └── when it confirmed the lease ──► Watchdog (process.rs) ── permit ──► sinks.rs          │ fence
//!                                                                               │              ▼
//!                                                                               └── rows ──► feed/target.rs, feed/writers.rs
//! ```
//!
//! Start reading at `run.rs`; `plan.rs` says what can happen.

mod coverage;
mod feed;
mod members;
mod people;
mod plan;
mod process;
mod run;
mod scenarios;
mod shrink;
mod sinks;
mod store;
mod streams;
mod upstream;
mod wire;
mod world;

pub use feed::DdlChoice;
pub use plan::{Event, Plan};
pub use process::elapsed;
pub use run::{Outcome, run};
pub use scenarios::{Scenario, scenarios};
pub use shrink::shrink;
pub use wire::Faults;
