//! The coordinator makes a cluster converge: it gives each changefeed's maintainer to a node, makes
//! checkpoints and epochs durable, and carries out what people ask for.
//!
//! Hears `CoordinatorTopic`; tells `MaintainerManagerTopic`; looks at the set of members. `core` decides (no
//! clock, no I/O), [`Coordinator`] is the task around it, [`meta`] changes the stored documents by
//! compare-and-set, [`backend`] is the metadata store (embedded: [`backend::redb`]), [`Election`] says who
//! leads. What it needs from upstreams it declares as [`RetentionHook`] and [`UpstreamClock`]; the node plugs
//! them in. Start reading at `core.rs`.
//!
//! - **CO-1** Durable before effective: no command carries an epoch, state or checkpoint that is not stored.
//! - **CO-2** A stored epoch never becomes smaller; a stored checkpoint only by a resume under a newer epoch.
//! - **CO-3** Every write compares the coordinator's own election key: a replaced coordinator changes nothing.
//! - **CO-4** One operator per changefeed; a maintainer starts only after the previous one stopped or its node left.
//! - **CO-5** A stored intent to stop or remove is cleared only by its own completion, restarts included.
//! - **CO-6** Commands are repeated until their effect is seen; late and doubled ones change nothing.
//! - **CO-7** Nothing stored or received makes the coordinator panic.

pub mod backend;
pub mod changefeed;
mod config;
mod coordinator;
pub mod core;
pub mod drain;
mod election;
mod error;
mod handle;
pub mod layout;
pub mod membership;
pub mod meta;
pub mod metrics;
pub mod watchdog;

pub use changefeed::Group;
pub use config::CoordinatorConfig;
pub use coordinator::{Coordinator, Members, Neighbours, RetentionHook, UpstreamClock};
pub use core::{ChangefeedView, Counts, DrainView};
pub use election::Election;
pub use error::Error;
pub use handle::CoordinatorHandle;
pub use layout::Layout;
