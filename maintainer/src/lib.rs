//! The maintainer drives one changefeed: it places table spans on nodes and folds their progress into the
//! changefeed's checkpoint. The manager of a node starts and stops maintainers for the coordinator.
//!
//! Hears `MaintainerManagerTopic` and `MaintainerTopic`; tells `HeartbeatCollectorTopic`, `OrchestratorTopic`
//! and `CoordinatorTopic`. What it needs from an upstream it declares as [`Upstream`]; the node plugs it in.
//! `core` decides without clock or I/O; `maintainer` is the task around it; `manager` is the node's endpoint.
//! Start reading at `core.rs`.
//!
//! - **MT-1** The checkpoint never moves back, restarts and moves included.
//! - **MT-2** A span that has no home holds the checkpoint where it was.
//! - **MT-3** Every request carries the maintainer's epoch; a response of another epoch changes nothing.
//! - **MT-4** A node never runs two maintainers of one changefeed; a slot changes hands only after its holder
//!   has stopped, and never to an epoch that was stopped here before.
//! - **MT-5** After a removal began, nothing is created, and the last checkpoint stays a constraint.

mod checkpoint;
mod core;
mod drain;
mod liveness;
mod maintainer;
mod manager;
pub mod metrics;
mod upstream;

pub use checkpoint::{CheckpointFold, Fold};
pub use drain::DrainTarget;
pub use liveness::LivenessCell;
pub use manager::{MaintainerManager, ManagerConfig};
pub use upstream::{SourceTable, Upstream};
