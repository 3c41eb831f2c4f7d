//! The maintainer drives one changefeed: it places table spans on nodes, lets schema changes happen once, and folds
//! everybody's progress into the changefeed's checkpoint. The manager of a node starts and stops maintainers for
//! the coordinator.
//!
//! Hears `MaintainerManagerTopic` and `MaintainerTopic`; tells `HeartbeatCollectorTopic`, `OrchestratorTopic`
//! and `CoordinatorTopic`. What it needs from an upstream it declares as [`Upstream`]; the node plugs it in.
//!
//! Every decision is made in `core` and `barrier`, without clock, randomness or I/O; `maintainer` is the one task
//! around a core, with `mailbox` in front of it; `manager` is the node's endpoint, one task too. Start reading at
//! `core.rs`.
//!
//! - **MT-1** The checkpoint never moves back, and never passes a span that exists, whoever runs it or does not.
//! - **MT-2** Everything that the checkpoint is made of is changed by one task: each fold sees one state. Who lets
//!   go of a constraint has installed the next one before.
//! - **MT-3** Every request carries the maintainer's epoch; a response of another epoch changes nothing.
//! - **MT-4** A node never runs two maintainers of one changefeed; a place changes hands only after its holder
//!   has stopped, and never to an epoch that was stopped here before.
//! - **MT-5** After a removal began, nothing is created or moved, and the table trigger's last position stays a
//!   constraint. The log reader stops before the maintainer says that it has.
//! - **MT-6** An event is written after everybody has arrived, changes the tables once and in order, and lets
//!   everybody pass only then.
//! - **MT-7** Neither a status nor an error counts as told before it was handed over.

mod barrier;
mod checkpoint;
mod core;
mod drain;
mod liveness;
mod mailbox;
mod maintainer;
mod manager;
pub mod metrics;
mod placement;
mod placements;
#[cfg(feature = "test-util")]
pub mod testing;
mod upstream;

pub use core::{Holder, Place, Standstill};

pub use checkpoint::{CheckpointFold, Progress};
pub use drain::DrainTarget;
pub use liveness::LivenessCell;
pub use manager::{MaintainerManager, ManagerConfig};
pub use placements::{PlacementError, PlacementHandle};
pub use upstream::{SourceTable, SplitPoints, Upstream};
